"""Predict a scan with what `voxelscale export --to onnx` wrote, by NumPy, onnxruntime and SimpleITK alone.

python onnx_sliding_window.py model.onnx mask.nii.gz scan.nii.gz [the scans of further channels]
"""

import itertools
import json
import sys

import numpy as np
import onnxruntime
import SimpleITK as sitk

model, out, *scans = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
facts = json.loads(session.get_modelmeta().custom_metadata_map["voxelscale"])
if facts["resampling"] != "linear, before the normalisation":
    sys.exit("a model from nnU-Net: predict with Voxelscale, or with nnU-Net itself")
patch, softmax = [1] * (3 - len(facts["patch"])) + facts["patch"], facts["activation"] == "softmax"


def on_lattice(image, lattice, fill):
    return sitk.GetArrayFromImage(sitk.Resample(image, lattice, sitk.Transform(), sitk.sitkLinear, fill))


# The model's lattice covers the same box as the scan, turned to LPS, with voxels of the model's spacing.
images = [sitk.ReadImage(path, sitk.sitkFloat32) for path in scans]
upright = sitk.DICOMOrient(images[0], "LPS")
old, new = np.array(upright.GetSpacing()), np.array(facts["spacing_zyx_mm"][::-1])
lattice = sitk.Image(
    np.round(np.array(upright.GetSize()) * old / new).astype(int).tolist(), sitk.sitkFloat32
)
lattice.SetSpacing(new.tolist())
lattice.SetDirection(upright.GetDirection())
lattice.SetOrigin(upright.TransformContinuousIndexToPhysicalPoint(((new / old - 1) / 2).tolist()))
volume = []
for image, channel in zip(images, facts["channels"], strict=True):
    low = float(sitk.GetArrayViewFromImage(image).min())
    values = on_lattice(image, lattice, channel.get("beyond_the_image", low))
    if channel["scheme"] == "zscore":  # by the whole image, which a window does not know
        values = (values - values[values != 0].mean()) / values[values != 0].std()
    elif channel["scheme"] == "minmax":
        values = (values - values.min()) / (values.max() - values.min())
    pads = [
        (max(0, p - n) // 2, (max(0, p - n) + 1) // 2) for n, p in zip(values.shape, patch, strict=True)
    ]
    volume.append(np.pad(values, pads, constant_values=values.min()))

# Windows overlap, and weigh less towards their borders; the mean is that of the logarithms of the odds.
starts, weight = [], np.ones(1)
for n, p in zip(volume[0].shape, patch, strict=True):
    count = int(np.ceil((n - p) / max(1, int(p * (1 - facts["overlap"]))))) + 1
    starts.append(np.linspace(0, n - p, count).round().astype(int))
    weight = weight[..., None] * np.exp(-32 * ((np.arange(p) - (p - 1) / 2) / p) ** 2).clip(1e-2)
total = np.zeros((len(facts["outputs"]) + 1, *volume[0].shape), np.float32)
for place in itertools.product(*starts):
    box = (slice(None), *(slice(start, start + p) for start, p in zip(place, patch, strict=True)))
    window = np.stack(volume)[box].reshape(1, len(volume), *facts["patch"])
    found = session.run(None, {facts["input"]: window})[0].reshape(-1, *patch).clip(1e-7, 1 - 1e-7)
    odds = np.log(found) - (0 if softmax else np.log1p(-found))
    total[box] += np.concatenate([weight * odds, weight])
odds = np.exp(total[:-1] / total[-1])
found = odds / odds.sum(0) if softmax else odds / (1 + odds)

# Back on the scan's own voxels: of classes the most probable one, of regions each that is probable enough.
z, y, x = (slice(a, n - b) for n, (a, b) in zip(volume[0].shape, pads, strict=True))
each = [sitk.GetImageFromArray(one[z, y, x].astype(np.float32)) for one in found]
for one in each:
    one.CopyInformation(lattice)
each, values = [on_lattice(one, images[0], 0.0) for one in each], facts["classes"]["written_values"]
mask = np.array([0, *values])[np.argmax(each, axis=0)] if softmax else np.zeros(each[0].shape, int)
for one, value in zip(each, values, strict=False):
    mask[(one >= facts["classes"]["threshold"]) & (not softmax)] = value
result = sitk.GetImageFromArray(mask.astype(np.uint8 if max(values) < 256 else np.int32))
result.CopyInformation(images[0])
sitk.WriteImage(result, out)
