"""The commands export and import-nnunet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from voxelscale.cli.common import verb
from voxelscale.console import count
from voxelscale.files import check_output


@verb("Prediction")
def export(
    model: Annotated[Path, typer.Argument(help="Folder of a run, or a model file.")],
    to: Annotated[str, typer.Option(help="onnx, torch-export, torchscript or monai-bundle.")],
    out: Annotated[Path, typer.Option(help="The file to write; of monai-bundle the folder.")],
    free_patch: Annotated[
        bool, typer.Option("--free-patch", help="Windows of any size, not the model's patch alone.")
    ] = False,
) -> None:
    """Write a model's network for other programs.

    \b
    voxelscale export run/ --to onnx --out model.onnx
    voxelscale export model.vxs --to torch-export --out model.pt2 --free-patch
    voxelscale export run/ --to torchscript --out model.ts
    voxelscale export run/ --to monai-bundle --out bundle/

    The network takes HU of CT at the model's spacing and gives probabilities. A channel that is normalised
    by the image's own statistics it takes normalised: a window's statistics are not the image's. Spacing,
    channels, classes and more are in the file (docs/export.md); examples/onnx_sliding_window.py predicts a
    scan with the ONNX file and without Voxelscale. The networks of an ensemble become one. False-positive
    reduction and calibration are not exported.

    The file is tried first, by onnxruntime, PyTorch or MONAI: where its probabilities differ from the
    model's by more than 1e-4 it is refused. ONNX and MONAI need pip install 'voxelscale[export]'.
    """
    from voxelscale.tune.export import export_model

    apart = export_model(model, to, out, free=free_patch)
    print(f"{to} in {out}; its probabilities differ from the model's by {apart:.1e} at most")


@verb("Prediction", name="import-nnunet")
def import_nnunet(
    folder: Annotated[
        Path, typer.Argument(help="nnU-Net's folder of a trained model: plans.json, dataset.json, fold_*.")
    ],
    out: Annotated[Path, typer.Option(help="The model file to write, *.vxs.")],
    folds: Annotated[str, typer.Option(help="Such as 0,1,2 or all; default: those that are there.")] = "",
    checkpoint: Annotated[str, typer.Option(help="Name of the checkpoints.")] = "checkpoint_final.pth",
) -> None:
    """Make a model file of a model that nnU-Net trained.

    \b
    voxelscale import-nnunet nnUNetTrainer__nnUNetPlans__3d_fullres/ --out model.vxs
    voxelscale import-nnunet folder/ --out model.vxs --folds 0,1 --checkpoint checkpoint_best.pth
    voxelscale predict model.vxs scans/ predictions/

    predict then does as nnU-Net does: its cropping, normalisation, resampling, windows, mirroring and mean
    of folds, which gives its masks but for voxels where two classes are equally probable. Findings, reports
    and DICOM are as of any model. Mirroring takes 8 times as long: predict.test_time_augmentation=false.

    For nnU-Net 2: PlainConvUNet and ResidualEncoderUNet, 2d, 3d_lowres and 3d_fullres, classes and regions.
    What our prediction would do in another way is refused: cascades, other readers, resampling or
    preprocessors.
    """
    check_output(out, file=True)
    from voxelscale.tune.nnunet import import_nnunet as run

    bundle = run(folder, out, [fold.strip() for fold in folds.split(",") if fold.strip()], checkpoint)
    what = f"{count(len(bundle.networks), 'network')} for {', '.join(bundle.classes.names[:10])}"
    print(f"{what} in {out}")
