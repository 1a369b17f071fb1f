"""``python -m voxelscale.cli``, which torchrun starts."""

from voxelscale.cli import main

if __name__ == "__main__":
    main()
