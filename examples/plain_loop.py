"""A plain PyTorch training on one device: MONAI's BasicUNet on patches of a folder of scans."""

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import BasicUNet
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("scans", type=Path, help="folder with images/ and labels/")
parser.add_argument("out", type=Path, help="file of weights to write")
parser.add_argument("--samples", type=int, default=2000)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--width", type=int, default=16, help="channels of the first level")
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


device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
w = args.width
model = BasicUNet(features=(w, w, 2 * w, 4 * w, 8 * w, w), out_channels=1).to(device)
loss = DiceCELoss(sigmoid=True)
patches = Patches(args.scans)
print(f"{len(patches.scans)} scans, {args.samples} patches, batches of {args.batch}, on one {device}")

optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
loader = DataLoader(patches, args.batch, sampler=range(args.samples))
for step, (image, mask) in enumerate(loader):
    value = loss(model(image.to(device)), mask.to(device))
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    print(f"{(step + 1) * args.batch} patches: loss {value.item():.3f}")
torch.save(model.state_dict(), args.out)
print(f"weights in {args.out}")
