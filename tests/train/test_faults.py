"""What goes wrong around a training: each is told in two lines, and nothing is lost."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.train.runs import (
    SAMPLES,
    apart,
    begin,
    command,
    fill,
    final_weights,
    finish,
    identical,
    seen_in,
    told,
    two_ranks,
    with_train,
)
from voxelscale.config import Config
from voxelscale.errors import VoxelscaleError
from voxelscale.model.build import build_model
from voxelscale.model.bundle import load_untrusted
from voxelscale.ranks.workers import Workers
from voxelscale.samples.batch import normalisations
from voxelscale.store import Reader, Store, case_path
from voxelscale.train import fit, locks, loop, memory
from voxelscale.train.child import Child
from voxelscale.train.engine import Engine, Result
from voxelscale.train.launch import claim, start
from voxelscale.train.locks import alone_in, first_in
from voxelscale.train.log import STOP_FILE, note_out_of_memory, read_events
from voxelscale.train.memory import ran_out
from voxelscale.train.task import Table, Task
from voxelscale.train.validate import ScanScoring


class Numbers:
    """Samples of four numbers; the one at `bad` is not finite."""

    def __init__(self, bad: int = -1) -> None:
        self.bad = bad

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        numbers = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return index, numbers * (torch.nan if index == self.bad else 1)


@dataclass
class Judge:
    """Scores the greater the later; `failing` times it fails instead."""

    failing: int = 0
    metric: str = "score"
    calls: list[int] = field(default_factory=list)

    def score(self, model: nn.Module, rank: int, ranks: int) -> Table:
        self.calls.append(rank)
        model(torch.zeros(1, 4))
        if self.failing:
            self.failing -= 1
            raise VoxelscaleError("the judge fails", "ask again")
        return [[float(next(model.parameters()).double().norm())]]

    def summary(self, table: Table) -> dict[str, float]:
        return {"score": table[0][0]}


def collate(samples: Sequence[Any]) -> tuple[Tensor, Tensor]:
    inputs = torch.stack([numbers for _, numbers in samples])
    return inputs, inputs.sum(1, keepdim=True)


def toy(bad: int = -1, judge: Judge | None = None, keep: Any = None) -> Task:
    torch.manual_seed(0)
    return Task(
        model=nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        loss=nn.functional.mse_loss,
        source=Numbers(bad),
        collate=collate,
        describe=lambda sample: f"sample {sample[0]} (case {sample[0] % 3})",
        scoring=judge,
        keep=keep,
    )


def go(task: Task, tiny: Config, run: Path, **train: Any) -> Result:
    config = with_train(tiny, **{"samples": 40, "checkpoint_every": 8, "keep": 2, **train})
    with alone_in(run):
        workers = Workers(rank=0, ranks=1, virtual=1, device=torch.device("cpu"))
        return Engine(task, config, run, workers, 2).go(lambda: False)


def test_a_sample_that_is_not_finite_stops_the_run_and_is_named(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(VoxelscaleError, match=r"not finite at sample 21 \(case 0\)$"):
        go(toy(bad=21), tiny, tmp_path / "run")
    assert seen_in(tmp_path / "run")[-1] == 16
    go(toy(), tiny, tmp_path / "run")
    go(toy(), tiny, tmp_path / "whole")
    assert identical(final_weights(tmp_path / "run"), final_weights(tmp_path / "whole"))


def test_a_sample_that_is_not_finite_is_skipped(tiny: Config, tmp_path: Path) -> None:
    assert go(toy(bad=21), tiny, tmp_path, not_finite="skip").finished
    skipped = [e for e in read_events(tmp_path) if e["event"] == "skipped"]
    assert [(e["samples"], e["where"]) for e in skipped] == [(22, "sample 21 (case 0)")]
    assert all(bool(w.isfinite().all()) for w in final_weights(tmp_path).values())


@pytest.mark.parametrize("not_finite", ["stop", "skip"])
def test_no_checkpoint_holds_weights_that_are_not_finite(
    tiny: Config, tmp_path: Path, not_finite: str
) -> None:
    """With infinite gradients in the last step the loss is still finite."""
    task = toy()
    task.model[2].weight.register_hook(lambda g: g * (torch.inf if counted() == 4 else 1))  # type: ignore[index]
    steps = iter(range(100))

    def counted() -> int:
        return next(steps) + 1

    if not_finite == "skip":
        go(task, tiny, tmp_path, not_finite=not_finite)
    else:
        with pytest.raises(VoxelscaleError, match="weights are not finite after 8 samples"):
            go(task, tiny, tmp_path, not_finite=not_finite)
        assert not seen_in(tmp_path)


def test_out_of_memory_is_noted_and_reported(tiny: Config, tmp_path: Path) -> None:
    steps = iter(range(100))

    def too_large(output: Tensor, target: Tensor) -> Tensor:
        if next(steps) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return nn.functional.mse_loss(output, target)

    words = partial(ran_out, tiny, torch.device("cpu"))
    task = replace(toy(), loss=too_large, too_large=words)
    with pytest.raises(VoxelscaleError, match=r"2 patches of 16x16x16 voxels does not fit") as raised:
        go(task, tiny, tmp_path)
    assert "lower train.batch_size or data.patch_size, let --fit-memory" in raised.value.hint
    assert raised.value.__suppress_context__
    assert read_events(tmp_path)[-1] == {"event": "out_of_memory", "samples": 18}
    assert seen_in(tmp_path)[-1] == 16
    go(toy(), tiny, tmp_path)
    go(toy(), tiny, tmp_path / "whole")
    assert identical(final_weights(tmp_path), final_weights(tmp_path / "whole"))
    assert all(event["event"] == "train" for event in read_events(tmp_path))


def test_a_run_that_goes_on_has_not_run_out_of_memory(tiny: Config, tmp_path: Path) -> None:
    """Though it ran out just where its checkpoint is, as when it was resumed on a GPU in use."""
    with alone_in(tmp_path):
        workers = Workers(rank=0, ranks=1, virtual=1, device=torch.device("cpu"))
        assert Engine(toy(), with_train(tiny, samples=40), tmp_path, workers, 2).go(lambda: True).seen == 2
    note_out_of_memory(tmp_path)
    assert read_events(tmp_path)[-1] == {"event": "out_of_memory", "samples": 2}
    go(toy(), tiny, tmp_path)
    assert {event["event"] for event in read_events(tmp_path)} == {"train"}


def test_out_of_memory_of_anyones_network(tiny: Config) -> None:
    def too_large(output: Tensor, target: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    numbers = [(torch.ones(4), torch.ones(1))] * 4
    with pytest.raises(VoxelscaleError, match="more memory than there is") as raised:
        fit(nn.Linear(4, 1), too_large, numbers, tiny)
    assert "train.batch_size" in raised.value.hint


@pytest.mark.parametrize("where", ["before", "while it settles"])
def test_too_little_memory_before_the_first_step_is_noted(
    tiny: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        if where == "before":
            patch.setattr(memory, "available_memory", lambda _: 1000)
        else:
            patch.setattr(loop, "choose_arithmetic", fails)
        with pytest.raises(VoxelscaleError, match="2 patches of 16x16x16"):
            start(with_train(tiny, samples=8), store.path, tmp_path / "run")
    assert read_events(tmp_path / "run") == [{"event": "out_of_memory", "samples": 0}]
    assert start(with_train(tiny, samples=8), store.path, tmp_path / "run"), "with more memory it goes on"
    assert read_events(tmp_path / "run")[-1]["event"] == "validation"


def test_a_patch_that_does_not_suit_is_not_noted_as_out_of_memory(
    tiny: Config, store: Store, tmp_path: Path
) -> None:
    config = replace(tiny, model=replace(tiny.model, depth=9))
    with pytest.raises(VoxelscaleError):
        start(config, store.path, tmp_path / "run")
    assert read_events(tmp_path / "run") == []


def test_checkpoints_by_the_clock(tiny: Config, tmp_path: Path) -> None:
    go(toy(), tiny, tmp_path / "no", checkpoint_every=1000, checkpoint_seconds=0.0)
    assert seen_in(tmp_path / "no") == [40]
    go(toy(), tiny, tmp_path / "run", checkpoint_every=1000, checkpoint_seconds=1e-9, keep=3)
    assert seen_in(tmp_path / "run") == [36, 38, 40]


def test_the_best_checkpoint_is_kept_beside_the_last(tiny: Config, tmp_path: Path) -> None:
    judge = Judge()
    scores = iter([0.1, 0.9, 0.3, 0.2, 0.1])
    judge.summary = lambda table: {"score": next(scores)}  # type: ignore[method-assign]
    assert go(toy(judge=judge), tiny, tmp_path, validate_every=8).best == 0.9
    assert seen_in(tmp_path) == [32, 40]
    best = load_untrusted(tmp_path / "checkpoints" / "best.ckpt")
    assert best["state"]["seen"] == 16


def test_a_lost_validation_is_made_up_for(tiny: Config, tmp_path: Path) -> None:
    go(toy(judge=Judge()), tiny, tmp_path / "whole", validate_every=16)
    with pytest.raises(VoxelscaleError, match="the judge fails"):
        go(toy(judge=Judge(failing=1)), tiny, tmp_path / "run", validate_every=16)
    assert seen_in(tmp_path / "run")[-1] == 16

    def full(model: nn.Module, facts: dict[str, Any]) -> None:
        raise VoxelscaleError("no space for the model", "free some")

    with pytest.raises(VoxelscaleError, match="no space"):  # after it was written to the log
        go(toy(judge=Judge(), keep=full), tiny, tmp_path / "run", validate_every=16)
    go(toy(judge=Judge()), tiny, tmp_path / "run", validate_every=16)
    assert judged(tmp_path / "run") == judged(tmp_path / "whole")
    assert [samples for samples, _ in judged(tmp_path / "run")] == [16, 32, 40]


def judged(run: Path) -> list[tuple[int, float]]:
    return [(e["samples"], e["score"]) for e in read_events(run) if e["event"] == "validation"]


def test_two_ranks_judge_each_case_once(tiny: Config, store: Store) -> None:
    scoring = ScanScoring(
        store=store,
        cases=store.cases,
        config=tiny,
        normalise=normalisations(store),
        device=torch.device("cpu"),
        precision=torch.float32,
    )
    model = build_model(tiny.model, tiny.data.patch_size, store.spacing).eval()
    with torch.no_grad():
        alone, first, second = (scoring.score(model, *place) for place in ((0, 1), (0, 2), (1, 2)))
    assert [any(row) for row in first] == [number % 2 == 0 for number in range(len(store.cases))]
    assert [any(row) for row in second] == [number % 2 == 1 for number in range(len(store.cases))]
    assert alone == [[x + y for x, y in zip(a, b, strict=True)] for a, b in zip(first, second, strict=True)]


def test_no_whole_checkpoint_is_reported_and_the_best_is_the_last_resort(
    tiny: Config, tmp_path: Path
) -> None:
    go(toy(judge=Judge()), tiny, tmp_path)
    folder = tmp_path / "checkpoints"
    best = (folder / "best.ckpt").read_bytes()
    for path in folder.glob("*.ckpt"):
        path.unlink()
        path.write_bytes(best[:-10])
    files = sorted(path.name for path in folder.glob("[!.]*"))
    with pytest.raises(VoxelscaleError, match="no checkpoint in it is intact"):
        go(toy(judge=Judge()), tiny, tmp_path)
    assert sorted(path.name for path in folder.glob("[!.]*")) == files
    (folder / "best.ckpt").write_bytes(best)
    go(toy(judge=Judge()), tiny, tmp_path)
    assert len(list(folder.glob("*.damaged"))) == len(files) - 1


def test_a_checkpoint_of_another_network_is_refused(tiny: Config, store: Store, tmp_path: Path) -> None:
    config = with_train(tiny, samples=8)
    assert start(config, store.path, tmp_path / "run")
    other = replace(config, model=replace(config.model, filters=6))
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "other" / "checkpoints")
    (tmp_path / "other" / "config.yaml").write_text("model: {filters: 6}")
    before = {p.name: p.read_bytes() for p in (tmp_path / "other" / "checkpoints").iterdir()}
    with pytest.raises(VoxelscaleError, match="is of another network"):
        go_on_as(other, store, tmp_path / "other")
    assert {p.name: p.read_bytes() for p in (tmp_path / "other" / "checkpoints").iterdir()} == before


def go_on_as(config: Config, store: Store, run: Path) -> None:
    from voxelscale.train.loop import train

    train(config, store.path, run)


def test_a_folder_that_cannot_be_written(tiny: Config, store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VoxelscaleError, match="cannot be written"):
        start(tiny, store.path, tmp_path / "file" / "run")


def test_two_trainings_in_one_folder(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    with alone_in(tmp_path), pytest.raises(VoxelscaleError, match="another training is running"):
        go(toy(), tiny, tmp_path)
    (tmp_path / "checkpoints" / ".samples.9.part").touch()
    go(toy(), tiny, tmp_path)
    assert not list(tmp_path.rglob(".*.part"))


def test_a_second_command_changes_nothing_of_a_training(
    config: Config, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is its own Ctrl-C, for which two ranks have a file, the other one's."""
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    run = tmp_path / "run"
    claim(run, config)
    (run / STOP_FILE).touch()
    before = (run / "config.yaml").read_bytes()
    for ranks in (1, 2):
        other = with_train(config, ranks=ranks, threads=3)
        with alone_in(run), pytest.raises(VoxelscaleError, match="another training is running"):
            start(other, store.path, run)
    assert (run / "config.yaml").read_bytes() == before
    assert (run / STOP_FILE).exists()
    # As cv, search and scale start them.
    process = subprocess.Popen(["sleep", "9"], start_new_session=True)
    with first_in(run), (tmp_path / "said").open("wb+") as said:
        child = Child(run, process, said)
        (run / STOP_FILE).unlink()
        child.ask_to_stop()
        assert not (run / STOP_FILE).exists()
        (run / STOP_FILE).touch()
        child.kill()
        assert (run / STOP_FILE).exists()


def test_the_lock_is_one_that_network_disks_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NFS gives an exclusive lock only of a file that is open for writing (flock(2), "NFS details")."""
    real = fcntl.flock

    def nfs(handle: int, how: int) -> None:
        if how & fcntl.LOCK_EX and not fcntl.fcntl(handle, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(handle, how)

    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    monkeypatch.setattr(fcntl, "flock", nfs)
    with (
        alone_in(tmp_path),
        pytest.raises(VoxelscaleError, match="another training is running"),
        alone_in(tmp_path),
    ):
        pass
    monkeypatch.setattr(fcntl, "flock", none)
    with alone_in(tmp_path), alone_in(tmp_path):
        assert "no locks on this disk (Operation not supported)" in capsys.readouterr().err


def test_a_full_disk(config: Config, store: Store, small_disk: Path, whole_two: dict[str, Tensor]) -> None:
    """With two ranks: the fault of one must be reported from elsewhere than the run's folder."""
    run = small_disk / "run"
    arguments = two_ranks(config, store, run)
    process = begin(arguments, run, 16)
    fill(small_disk / "filler")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "cannot be written (No space left on device)" in told(errors)[0]
    assert seen_in(run)[-1] < SAMPLES
    (small_disk / "filler").unlink()
    finish(arguments)
    assert apart(final_weights(run), whole_two) <= 1e-5


def test_a_scan_that_turns_unreadable(
    config: Config, store: Store, tmp_path: Path, whole_two: dict[str, Tensor]
) -> None:
    run, copy = tmp_path / "run", tmp_path / "store"
    shutil.copytree(store.path, copy)
    arguments = two_ranks(config, copy, run, ranks=1, virtual_workers=2)
    process = begin(arguments, run, 16)
    path = case_path(copy, store.split("train")[0].case)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert f"{path}: damaged" in told(errors)[0]
    path.write_bytes(content)
    finish(arguments)
    assert apart(final_weights(run), whole_two) <= 1e-5


def test_reading_a_damaged_case_names_it(store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    info = store.cases[0]
    path, reader = case_path(tmp_path / "store", info.case), Reader(tmp_path / "store")
    assert reader.region(info.case, (0, 0, 0), info.shape).shape == (2, *info.shape)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    for start_at in ((0, 0, 0), (-2, 0, 0)):
        with pytest.raises(VoxelscaleError, match=f"{info.case}.b2nd: damaged"):
            reader.region(info.case, start_at, info.shape)
    path.write_bytes(content)
    assert reader.region(info.case, (0, 0, 0), info.shape).shape == (2, *info.shape)


def test_a_loss_that_is_not_finite_with_two_ranks(config: Config, store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wild = replace(
        config, optim=replace(config.optim, name="sgd", lr=1e30, warmup=0.0, gradient_clipping=0.0)
    )
    arguments = two_ranks(with_train(wild, "none"), store, run)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    error, _ = told(done.stderr)
    assert "the training diverged: the loss is not finite at sample" in error


@pytest.mark.slow
def test_under_torchrun_a_fault_is_reported_once(tiny: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ours = command(tiny, tmp_path / "no_store", run)
    engine = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    done = subprocess.run([*engine, "--no-python", *ours], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert done.stderr.count("no_store/dataset.json: not there") == 1, done.stderr


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_is_started_again(
    config: Config, store: Store, tmp_path: Path, whole_two: dict[str, Tensor]
) -> None:
    run = tmp_path / "run"
    ours = two_ranks(config, store, run)
    engine = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    process = begin([*engine, "--no-python", *ours], run, 16)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "a rank was lost" in errors
    assert apart(final_weights(run), whole_two) <= 1e-5
