"""nnU-Net's own planner, preprocessor, trainer and predictor.

Two things are changed. The schedule is fitted to the number of updates, step by step, and there are no
validations meanwhile. And there may be bfloat16, which nnU-Net has not on processors: the forward pass
under autocast, as its own on GPUs is.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import Answer, Case
from .protocol import Course, Job, Place, Trained, set_seeds

NAME = "Dataset001_Contest"
TARGETS = {"default": 8.0, "small": 0.25}
"""GB of GPU memory that the planner plans for, by the name of the plan."""


def write_raw(place: Place) -> Path:
    """The fold's training cases in nnU-Net's layout, as links, with the inner split beside them."""
    raw = place.shared / "raw" / NAME
    if (raw / "dataset.json").is_file():
        return raw
    data = place.data
    for kind in ("imagesTr", "labelsTr"):
        (raw / kind).mkdir(parents=True, exist_ok=True)
    for name in place.split.train:
        case = data.cases[name]
        links = {
            raw / "imagesTr" / f"{name}_0000.nii.gz": case.image,
            raw / "labelsTr" / f"{name}.nii.gz": case.label,
        }
        for link, file in links.items():
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())
    inner = [{"train": list(place.split.rest), "val": list(place.split.choose)}]
    (raw / "inner.json").write_text(json.dumps(inner))
    described = {
        "channel_names": {"0": data.channel},
        "labels": {"background": 0} | {name: k for k, name in enumerate(data.labels, start=1)},
        "numTraining": len(place.split.train),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(described))
    return raw


def _paths(place: Place) -> None:
    """nnU-Net reads these from the environment."""
    os.environ |= {
        "nnUNet_raw": str(place.shared / "raw"),
        "nnUNet_preprocessed": str(place.shared / "nnunet"),
        "nnUNet_results": str(place.own / "results"),
        "nnUNet_n_proc_DA": "1",
        "nnUNet_compile": "f",
    }


def prepare(place: Place) -> None:
    """Fingerprint, plans and preprocessed cases."""
    raw = write_raw(place)
    _paths(place)
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprint_dataset,
        plan_experiment_dataset,
        preprocess_dataset,
    )

    folder = place.shared / "nnunet" / NAME
    extract_fingerprint_dataset(1, num_processes=1, clean=False, verbose=False, show_progress_bar=False)
    for plan, target in TARGETS.items():
        if not (folder / f"{plan}.json").is_file():
            plan_experiment_dataset(1, gpu_memory_target_in_gb=target, overwrite_plans_name=plan)
        if not (folder / f"{plan}.done").is_file():
            preprocess_dataset(1, plan, ("3d_fullres",), [1], verbose=False, show_progress_bar=False)
            (folder / f"{plan}.done").touch()
    (folder / "splits_final.json").write_text((raw / "inner.json").read_text())


def plan_of(place: Place, plan: str) -> dict[str, Any]:
    """What the planner wrote."""
    path = place.shared / "nnunet" / NAME / f"{plan}.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def train(job: Job, place: Place, course: Course) -> Trained:
    """Settings: plan=default|small, precision=fp32|bf16, format=as_is|channels_last, lr and
    mirror=true|false."""
    _paths(place)
    set_seeds(job.seed)
    trainer_class = _trainer(mirror=job.value("mirror", "true") == "true")
    plans = plan_of(place, job.value("plan", "default")) | {"continue_training": False}
    described = json.loads((place.shared / "raw" / NAME / "dataset.json").read_text())
    fold: Any = 0 if job.on == "choose" else "all"
    trainer = trainer_class(plans, "3d_fullres", fold, described, torch.device("cpu"))
    trainer.initial_lr = float(job.value("lr", str(trainer.initial_lr))) * job.rate
    trainer.disable_checkpointing = True
    os.environ |= {"nnUNet_n_proc_DA": "0"}  # it augments in this process
    trainer.on_train_start()
    network: torch.nn.Module = trainer.network
    if job.value("format", "as_is") == "channels_last":
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if (precision := job.value("precision", "fp32")) == "bf16":
        _in_bf16(network)
    network.train()
    while not course.done:
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * course.decay
        trainer.train_step(next(trainer.dataloader_train))
        course.tick()
    course.finish()
    return Trained(
        batch=trainer.batch_size,
        predict=_Predictor(trainer, place.data.detect),
        facts={
            "patch": list(trainer.configuration_manager.patch_size),
            "lr": trainer.initial_lr,
            "precision": precision,
            "parameters": sum(weight.numel() for weight in network.parameters()),
        },
    )


def _trainer(*, mirror: bool) -> Any:
    """Its default trainer, or its own variant that does not mirror."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.training.nnUNetTrainer.variants.data_augmentation import (
        nnUNetTrainerNoMirroring as without,
    )

    return nnUNetTrainer if mirror else without.nnUNetTrainerNoMirroring


def _in_bf16(network: torch.nn.Module) -> None:
    """Let the network compute in bfloat16 and answer in float32, of which the loss is made."""
    forward = network.forward

    def in_bf16(x: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            found = forward(x)
        return [part.float() for part in found] if isinstance(found, list | tuple) else found.float()

    network.forward = in_bf16


class _Predictor:
    """Its sliding window, without mirroring."""

    def __init__(self, trainer: Any, detect: bool) -> None:
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        trainer.set_deep_supervision_enabled(False)
        trainer.network.eval()
        self._predictor = nnUNetPredictor(
            use_mirroring=False, device=torch.device("cpu"), verbose=False, allow_tqdm=False
        )
        self._predictor.manual_initialization(
            trainer.network,
            trainer.plans_manager,
            trainer.configuration_manager,
            [trainer.network.state_dict()],
            trainer.dataset_json,
            type(trainer).__name__,
            trainer.inference_allowed_mirroring_axes,
        )
        self._reader = trainer.plans_manager.image_reader_writer_class()
        self._detect = detect

    def __call__(self, case: Case) -> Answer:
        image, properties = self._reader.read_images([str(case.image)])
        with _quiet():
            found = self._predictor.predict_single_npy_array(
                image, properties, save_or_return_probabilities=self._detect
            )
        if self._detect:
            labels, probabilities = found
            return Answer(labels=np.asarray(labels), probability=np.asarray(probabilities)[1])
        return Answer(labels=np.asarray(found))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        yield
