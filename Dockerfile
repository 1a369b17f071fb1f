# Voxelscale in a container, for processors and NVIDIA GPUs:
#
#     docker build -t voxelscale .
#     docker run --rm -v "$PWD:/data" --user "$(id -u):$(id -g)" voxelscale predict model.vxs scans/ predictions/
#
# With GPUs: docker run --gpus all --shm-size 8g. For processors alone, some gigabytes smaller, name PyTorch's package
# index of builds without CUDA (see pytorch.org): docker build --build-arg TORCH_INDEX=ADDRESS .
#
# It has not been built with Docker yet. tests/test_dockerfile.py runs its commands in an environment of Python,
# not in this base image.
FROM python:3.11-slim-bookworm

ARG TORCH_INDEX=
ARG EXTRAS=gpu,hospital

WORKDIR /opt/voxelscale
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml MANIFEST.in README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"

# Whoever runs it has no home here; `docker run --user` may be anyone.
ENV HOME=/tmp
USER 1000:1000
WORKDIR /data
ENTRYPOINT ["voxelscale"]
CMD ["--help"]
