"""Hostile labels, models, checkpoints and tables each told in one line, soon, in little memory."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.formats.hostile_labels import SEGMENTATIONS, STRUCTURES, make, write_scan_and_labels
from tests.formats.watched import Child, Outcome
from tests.train.runs import with_train

from voxelscale.config import Config
from voxelscale.store import Store, open_store
from voxelscale.train.launch import start

SECONDS, MIB = 5.0, 300.0


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with Child(heavy=True) as started:
        yield started


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A scan with a SEG and an RTSTRUCT, and how many voxels the lesion has."""
    folder = tmp_path_factory.mktemp("labelled")
    return folder, write_scan_and_labels(folder)


@pytest.mark.parametrize("name", ["seg.dcm", "rt.dcm"])
def test_the_labels_are_right_before_they_are_changed(
    labelled: tuple[Path, int], child: Child, name: str
) -> None:
    outcome = child.ask({"read": "pair", "path": str(labelled[0] / name)})
    assert outcome.kind == "read", outcome
    assert int(outcome.message) == labelled[1]


@pytest.mark.parametrize("name", [*SEGMENTATIONS, *STRUCTURES])
def test_hostile_dicom_labels(labelled: tuple[Path, int], tmp_path: Path, child: Child, name: str) -> None:
    path = make(name, labelled[0], tmp_path)
    assert_told(child.ask({"read": "pair", "path": str(path)}), path)


def assert_told(outcome: Outcome, path: Path) -> None:
    """It was refused in one line that names the file, with a hint, in bounded time and memory."""
    assert outcome.kind == "refused", outcome
    assert path.name in outcome.message, outcome
    assert outcome.hint, outcome
    assert "\n" not in outcome.message + outcome.hint, outcome
    assert len(outcome.message) < len(str(path)) + 300, outcome
    assert outcome.seconds < SECONDS, outcome
    assert outcome.grown_mib < MIB, outcome


# ---------------------------------------------------------------- models and checkpoints


@pytest.fixture(scope="module")
def run(tiny: Config, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight samples, with its model."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    assert start(with_train(tiny, samples=8), store.path, folder)
    return folder


Edit = Callable[[dict[str, Any]], object]
Damage = Callable[[bytes], bytes]


def sealed(edit: Edit) -> Damage:
    """The content changed, under a right checksum: whoever alters it can compute that, too."""

    def damage(data: bytes) -> bytes:
        content = torch.load(io.BytesIO(data[SEAL:]), weights_only=True)
        changed = edit(content)
        buffer = io.BytesIO()
        torch.save(content if changed is None else changed, buffer)
        return resealed(buffer.getvalue())

    return damage


def resealed(payload: bytes) -> bytes:
    return b"voxelscale sealed 1\n" + hashlib.sha256(payload).digest() + payload


def flipped(place: float) -> Damage:
    """One bit changed, so far into the file."""

    def damage(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[int(place * (len(data) - 1))] ^= 16
        return bytes(changed)

    return damage


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {WITNESS}",)


WITNESS = f"/tmp/voxelscale-bomb-{os.getpid()}"
"""Is made by who executes what a pickle says."""

SEAL = len(b"voxelscale sealed 1\n") + 32
WHOLE: dict[str, Damage] = {
    "empty": lambda data: b"",
    "cut-in-the-name": lambda data: data[:10],
    "cut-in-the-digest": lambda data: data[:30],
    "cut-after-the-digest": lambda data: data[:SEAL],
    "cut-in-the-middle": lambda data: data[: len(data) // 2],
    "cut-at-the-end": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "flip-in-the-name": flipped(0.0),
    "flip-in-the-digest": lambda data: data[:25] + bytes([data[25] ^ 1]) + data[26:],
    "flip-in-the-middle": flipped(0.5),
    "flip-at-the-end": flipped(1.0),
    "sealed-nothing": lambda data: resealed(b""),
    "sealed-half": lambda data: resealed(data[SEAL : len(data) // 2]),
    "sealed-flip": lambda data: resealed(flipped(0.02)(data[SEAL:])),
    "pickle-bomb": lambda data: resealed(pickle.dumps(Bomb())),
    "pickle-bomb-unsealed": lambda data: pickle.dumps(Bomb()),
    "torch-bomb": sealed(lambda content: {**content, "more": Bomb()}),
    "a-list": sealed(lambda content: [content]),
    "a-tensor": sealed(lambda content: torch.zeros(3)),
    "nothing-in-it": sealed(lambda content: content.clear()),
    "format-text": sealed(lambda content: content.update(format="1")),
    "format-list": sealed(lambda content: content.update(format=[1])),
}


def each(content: dict[str, Any], key: str, change: Callable[[torch.Tensor], object]) -> None:
    """Change every tensor of a table."""
    content[key] = {name: change(value) for name, value in content[key].items()}


def in_config(section: str, key: str, value: object) -> Damage:
    return sealed(lambda content: content["config"][section].update({key: value}))


MODELS: dict[str, Damage] = {
    **WHOLE,
    "bomb-as-weight": sealed(lambda content: content["weights"].update(x=Bomb())),
    "weights-none": sealed(lambda content: content.update(weights={})),
    "weights-a-list": sealed(lambda content: content.update(weights=[1])),
    "weights-text": sealed(lambda content: each(content, "weights", str)),
    "weights-of-another-shape": sealed(lambda content: each(content, "weights", lambda v: v[None])),
    "weights-under-other-names": sealed(
        lambda content: content.update(weights={f"x{k}": v for k, v in content["weights"].items()})
    ),
    "weights-named-by-numbers": sealed(
        lambda content: content.update(weights=dict(enumerate(content["weights"].values())))
    ),
    "weights-nan": sealed(lambda content: each(content, "weights", lambda v: v * float("nan"))),
    "weights-complex": sealed(lambda content: each(content, "weights", lambda v: v.to(torch.complex64))),
    "weights-sparse": sealed(lambda content: each(content, "weights", lambda v: v.to_sparse())),
    "weights-expanded": sealed(
        lambda content: each(content, "weights", lambda v: torch.zeros(1).expand(1 << 40))
    ),
    "spacing-zero": sealed(lambda content: content.update(spacing=[0.0, 1.0, 1.0])),
    "spacing-negative": sealed(lambda content: content.update(spacing=[-1.0, 1.0, 1.0])),
    "spacing-nan": sealed(lambda content: content.update(spacing=[float("nan"), 1.0, 1.0])),
    "spacing-tiny": sealed(lambda content: content.update(spacing=[1e-6, 1e-6, 1e-6])),
    "spacing-huge": sealed(lambda content: content.update(spacing=[1e300, 1.0, 1.0])),
    "spacing-two": sealed(lambda content: content.update(spacing=[1.0, 1.0])),
    "normalisation-text": sealed(lambda content: content["normalisation"].update(mean="much")),
    "normalisation-nan": sealed(lambda content: content["normalisation"].update(mean=float("nan"))),
    "normalisation-zero": sealed(lambda content: content["normalisation"].update(std=0.0)),
    "normalisation-more": sealed(lambda content: content["normalisation"].update(skew=1.0)),
    "trained-a-list": sealed(lambda content: content.update(trained=[1])),
    "config-a-list": sealed(lambda content: content.update(config=[1])),
    "config-unknown": sealed(lambda content: content["config"].update(evil=1)),
    "network-unknown": in_config("model", "name", "os.system"),
    "network-wide": in_config("model", "filters", 10**7),
    "network-wider": sealed(
        lambda content: content["config"]["model"].update(filters=10**5, max_filters=10**5)
    ),
    "network-deep": in_config("model", "depth", 10**7),
    "network-kernel": in_config("model", "kernel_size", 9999),
    "patch-huge": in_config("data", "patch_size", [10**6, 10**6, 10**6]),
}


@pytest.fixture(scope="module")
def image_file(scans: Path) -> Path:
    return sorted((scans / "images").iterdir())[0]


@pytest.fixture(scope="module")
def loaded(run: Path, image_file: Path, child: Child, tmp_path_factory: pytest.TempPathFactory) -> Child:
    """The child once it has imported what reading a model takes: the bounds are on what a file costs."""
    out = tmp_path_factory.mktemp("loaded")
    assert child.ask({"command": ["predict", str(run), str(image_file), str(out)]}).kind != "died"
    return child


@pytest.mark.parametrize("name", MODELS)
def test_hostile_models(run: Path, image_file: Path, tmp_path: Path, loaded: Child, name: str) -> None:
    path = tmp_path / f"{name}.vxs"
    path.write_bytes(MODELS[name]((run / "model.vxs").read_bytes()))
    outcome = loaded.ask({"command": ["predict", str(path), str(image_file), str(tmp_path / "out")]})
    assert_told(outcome, path)
    assert not Path(WITNESS).exists()


CHECKPOINTS: dict[str, Damage] = {
    **WHOLE,
    "bomb-as-weight": sealed(lambda content: content["model"].update(x=Bomb())),
    "model-missing": sealed(lambda content: content.pop("model") and None),
    "model-a-list": sealed(lambda content: content.update(model=[1, 2])),
    "model-text": sealed(lambda content: each(content, "model", str)),
    "model-of-another-shape": sealed(lambda content: each(content, "model", lambda v: v[None])),
    "model-named-by-numbers": sealed(
        lambda content: content.update(model=dict(enumerate(content["model"].values())))
    ),
    "optimizer-missing": sealed(lambda content: content.pop("optimizer") and None),
    "optimizer-a-number": sealed(lambda content: content.update(optimizer=7)),
    "optimizer-empty": sealed(lambda content: content.update(optimizer={})),
    "optimizer-groups-a-number": sealed(lambda content: content["optimizer"].update(param_groups=7)),
    "optimizer-state-a-list": sealed(lambda content: content["optimizer"].update(state=[1])),
    "optimizer-moments-text": sealed(lambda content: content["optimizer"]["state"][0].update(mean="small")),
    "optimizer-moments-of-another-shape": sealed(
        lambda content: content["optimizer"]["state"][0].update(mean=torch.zeros(7))
    ),
    "optimizer-moments-of-another-rule": sealed(
        lambda content: content["optimizer"]["state"][0].update(exp_avg=torch.zeros(7))
    ),
    "optimizer-momentum-missing": sealed(
        lambda content: (
            [kept.pop("momentum", 0) for kept in content["optimizer"]["state"].values()] and None
        )
    ),
    "optimizer-steps-missing": sealed(
        lambda content: content["optimizer"]["state"][0].pop("step") and None
    ),
    "optimizer-rate-text": sealed(
        lambda content: content["optimizer"]["param_groups"][0].update(lr="fast")
    ),
    "optimizer-betas-number": sealed(
        lambda content: content["optimizer"]["param_groups"][0].update(betas=1)
    ),
    "state-missing": sealed(lambda content: content.pop("state") and None),
    "state-a-number": sealed(lambda content: content.update(state=5)),
    "state-more": sealed(lambda content: content["state"].update(evil=1)),
    "state-seen-text": sealed(lambda content: content["state"].update(seen="4")),
    "state-seen-negative": sealed(lambda content: content["state"].update(seen=-4)),
    "state-seen-fraction": sealed(lambda content: content["state"].update(seen=2.5)),
    "state-seen-nan": sealed(lambda content: content["state"].update(seen=float("nan"))),
    "state-best-text": sealed(lambda content: content["state"].update(best="all")),
    "state-seconds-text": sealed(lambda content: content["state"].update(seconds="long")),
    "state-another-data-set": sealed(lambda content: content["state"].update(digest="x")),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hostile_checkpoints(store: Store, run: Path, tmp_path: Path, child: Child, name: str) -> None:
    """The only one there is: there is none before it to go on from."""
    begun = tmp_path / "run"
    path = only_checkpoint(run, begun, name)
    outcome = child.ask({"command": ["train", str(store.path), str(begun), "--set", "train.samples=8"]})
    named = path.parent if "no checkpoint in it is intact" in outcome.message else path
    assert_told(outcome, named)
    assert not Path(WITNESS).exists()


def only_checkpoint(run: Path, begun: Path, name: str) -> Path:
    """A copy of a run that has nothing but this damaged checkpoint."""
    shutil.copytree(run, begun)
    checkpoints = sorted((begun / "checkpoints").iterdir())
    whole = (begun / "checkpoints" / "samples_000000000008.ckpt").read_bytes()
    for other in checkpoints:
        other.unlink()
    path = begun / "checkpoints" / "samples_000000000004.ckpt"
    path.write_bytes(CHECKPOINTS[name](whole))
    return path


# ---------------------------------------------------------------- as a person runs them

PATIENCE = 30.0
"""Seconds of processor time; a hang meets pytest's limit."""

MOST_MIB = 1024.0
"""Of a process and of its children: PyTorch alone takes a third of it."""


def typed(*arguments: object) -> tuple[int, list[str], float, float]:
    """A command as its own process: exit code, lines of stderr, processor seconds, MiB at its peak."""
    command = [sys.executable, "-W", "default", "-m", "voxelscale.cli", "--quiet", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        lines = errors.read().splitlines()
    return process.returncode, lines, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def assert_two_lines(told: tuple[int, list[str], float, float], name: str) -> None:
    """One error that names the file, one hint, nothing else."""
    code, lines, seconds, mib = told
    assert code == 2, lines
    assert len(lines) == 2, lines
    assert lines[0].startswith("error: "), lines
    assert name in lines[0], lines
    assert lines[1].startswith("hint: "), lines
    assert seconds < PATIENCE
    assert mib < MOST_MIB


@pytest.mark.parametrize("name", ["cut-in-the-middle", "flip-in-the-middle", "torch-bomb", "weights-nan"])
def test_models_on_the_command_line(run: Path, image_file: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.vxs"
    path.write_bytes(MODELS[name]((run / "model.vxs").read_bytes()))
    assert_two_lines(typed("predict", path, image_file, tmp_path / "out"), path.name)
    assert not (tmp_path / "out").exists()
    assert not Path(WITNESS).exists()


@pytest.mark.parametrize("name", ["state-a-number", "optimizer-moments-of-another-shape"])
def test_checkpoints_on_the_command_line(store: Store, run: Path, tmp_path: Path, name: str) -> None:
    path = only_checkpoint(run, tmp_path / "run", name)
    before = path.read_bytes()
    told = typed("train", store.path, tmp_path / "run", "--set", "train.samples=8")
    assert_two_lines(told, path.name)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["seg-frames-word", "rt-a-million-points"])
def test_labels_on_the_command_line(labelled: tuple[Path, int], tmp_path: Path, name: str) -> None:
    path = make(name, labelled[0], tmp_path)
    (tmp_path / "set.csv").write_text(f"image,label\nct,{path.name}\n")
    assert_two_lines(typed("prepare", tmp_path / "set.csv", tmp_path / "store"), path.name)


def test_each_of_many_hostile_labels_is_reported_and_the_good_one_prepared(
    labelled: tuple[Path, int], tmp_path: Path
) -> None:
    names = [*SEGMENTATIONS, *STRUCTURES]
    paths = [make(name, labelled[0], tmp_path) for name in names]
    shutil.copy(labelled[0] / "seg.dcm", tmp_path / "good.dcm")
    rows = [f"ct,{path.name},{name}" for name, path in zip(names, paths, strict=True)]
    (tmp_path / "set.csv").write_text("\n".join(["image,label,case", *rows, "ct,good.dcm,good"]) + "\n")
    sets = ["--set", "prepare.workers=1", "--set", "prepare.plan=false", "--set", "prepare.split=[1,0,0]"]
    code, lines, seconds, mib = typed("prepare", tmp_path / "set.csv", tmp_path / "store", *sets)
    assert code == 2
    assert "not in HU" in lines.pop(0)  # the one good case, of values from 0 on
    errors = [line for line in lines if line.startswith("error: ")]
    hints = [line for line in lines if line.startswith("hint: ")]
    assert len(lines) == 2 * len(names) + 1, lines
    assert len(errors) == len(hints) == len(names)
    for path in paths:
        assert sum(str(path) in line for line in errors) == 1
    assert lines[-1].startswith(f"{len(names)} not prepared: ")
    assert seconds < PATIENCE
    assert mib < MOST_MIB
    (case,) = open_store(tmp_path / "store").cases
    assert case.case == "good"
    assert sum(case.lesion_volumes_mm3) == pytest.approx(labelled[1] * 0.75 * 0.75 * 2.5)


def test_a_tree_whose_segmentation_is_of_another_series(labelled: tuple[Path, int], tmp_path: Path) -> None:
    make("seg-another-series", labelled[0], tmp_path / "tree")
    told = typed("prepare", tmp_path / "tree", tmp_path / "store")
    assert "seg-another-series.dcm: refers to a series that is not there" in told[1][0]
    assert_two_lines((told[0], told[1][1:], *told[2:]), str(tmp_path / "tree" / "ct"))
    assert "has no mask" in told[1][1]
