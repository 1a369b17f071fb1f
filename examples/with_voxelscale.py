"""The training of plain_loop.py through voxelscale: on one device or many, and it can be resumed."""

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet

from voxelscale.config import load
from voxelscale.train import fit

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("scans", type=Path, help="folder with images/ and labels/")
parser.add_argument("out", type=Path, help="folder of the run; if it has begun, it goes on")
parser.add_argument("--samples", type=int, default=2000)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--width", type=int, default=16, help="channels of the first level")
parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting")
args = parser.parse_args()


class Patches:
    """Sample i: 32 x 32 x 32 voxels from anywhere in a scan, by a generator seeded with i."""

    def __init__(self, folder: Path) -> None:
        images, labels = (sorted((folder / name).iterdir()) for name in ("images", "labels"))
        pairs = zip(images, labels, strict=True)
        self.scans = [[sitk.GetArrayFromImage(sitk.ReadImage(path)) for path in pair] for pair in pairs]

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(i)
        image, mask = self.scans[random.integers(len(self.scans))]
        box = tuple(slice(start, start + 32) for start in random.integers(0, np.array(image.shape) - 31))
        return image[None, *box].astype(np.float32) / 1000, mask[None, *box].astype(np.float32)


torch.manual_seed(0)
w = args.width
model = BasicUNet(features=(w, w, 2 * w, 4 * w, 8 * w, w), out_channels=1)
loss = DiceCELoss(sigmoid=True)
patches = Patches(args.scans)
print(f"{len(patches.scans)} scans, {args.samples} patches, batches of {args.batch} a worker")

budget = [f"train.samples={args.samples}", f"train.batch_size={args.batch}"]
config = load(Path(__file__).with_name("settings.yaml"), [*budget, *args.set])
result = fit(model, loss, patches, config, run=args.out)
print(f"{result.seen} patches seen; weights in {args.out / 'weights.vxs'}")
