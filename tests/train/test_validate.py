"""The validation beside the training, with stand-ins for a GPU's streams."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from voxelscale.config import Config
from voxelscale.errors import VoxelscaleError
from voxelscale.infer.sliding_window import WindowTooLarge
from voxelscale.ranks.workers import Workers
from voxelscale.samples.batch import normalisations
from voxelscale.store import Store
from voxelscale.train import validate
from voxelscale.train.checkpoint import State
from voxelscale.train.loop import patch_task
from voxelscale.train.task import Task
from voxelscale.train.validate import ScanScoring, Validation, side_stream, start_validation

CPU = torch.device("cpu")
ALONE = Workers(rank=0, ranks=1, virtual=1, device=CPU)


@pytest.fixture
def task(tiny: Config, store: Store) -> Task:
    return patch_task(tiny, store, CPU)


def begun(task: Task) -> Validation:
    model = task.model.eval().requires_grad_(False)
    found = start_validation(task, model, ALONE, torch.float32, State(digest=""), 0)
    assert found is not None
    return found


def test_the_thread_computes_on_a_stream_that_waits_for_the_callers(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[tuple[str, threading.Thread]] = []

    def note(what: str) -> None:
        if not did or did[-1][0] != what:
            did.append((what, threading.current_thread()))

    @contextmanager
    def entered() -> Iterator[None]:
        note("enter")
        yield
        note("leave")

    def side(device: torch.device) -> Any:
        note("ask")
        return entered()

    monkeypatch.setattr(validate, "side_stream", side)
    task.model.register_forward_pre_hook(lambda *_: note("compute"))
    figures = begun(task).figures(ALONE)
    assert 0 <= figures["dice"] <= 1
    assert [what for what, _ in did] == ["ask", "enter", "compute", "leave"]
    here, *there = [thread for _, thread in did]
    assert here is threading.current_thread()
    assert here not in there
    assert len(set(there)) == 1


class Cuda:
    """What `side_stream` asks of CUDA, in order."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def Stream(self, device: torch.device, priority: int) -> Cuda:
        assert priority == 0
        return self

    def Event(self) -> Cuda:
        return self

    def record(self, stream: str) -> None:
        self.did.append(f"record {stream}")

    def wait_event(self, event: Cuda) -> None:
        self.did.append("wait")

    def synchronize(self) -> None:
        self.did.append("synchronize")

    def current_stream(self, device: torch.device) -> str:
        return "the caller's"

    def set_device(self, device: torch.device) -> None:
        self.did.append(str(device))

    @contextmanager
    def stream(self, stream: Cuda) -> Iterator[None]:
        self.did.append("begin")
        yield
        self.did.append("end")


def test_a_side_stream_waits_for_the_caller_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    for name in ("Stream", "Event", "current_stream", "set_device", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    side = side_stream(torch.device("cuda", 7))
    assert cuda.did == ["record the caller's"]
    with side:
        cuda.did.append("work")
    assert cuda.did[1:] == ["cuda:7", "wait", "begin", "work", "end", "synchronize"]
    cuda.did.clear()
    with pytest.raises(ValueError, match="fault"), side_stream(torch.device("cuda", 7)):
        raise ValueError("fault")
    assert cuda.did[-1] == "synchronize"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), WindowTooLarge("a window", "")])
def test_too_little_memory_is_the_validations(task: Task, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    task.model.register_forward_pre_hook(fail)
    with pytest.raises(VoxelscaleError, match="validation needs more memory than the training") as caught:
        begun(task).figures(ALONE)
    assert not isinstance(caught.value, WindowTooLarge)
    assert "predict.patch_size" in caught.value.hint


def test_other_errors_are_their_own(task: Task) -> None:
    def fail(*_: Any) -> None:
        raise VoxelscaleError("damaged", "put it back")

    task.model.register_forward_pre_hook(fail)
    with pytest.raises(VoxelscaleError, match="damaged"):
        begun(task).figures(ALONE)


class NoNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it no tensor becomes a number, for which a GPU would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_case_is_waited_for_once(tiny: Config, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = store.split("val")
    config = replace(tiny, predict=replace(tiny.predict, patch_size=(16, 16, 16)))
    scoring = ScanScoring(
        store=store,
        cases=cases,
        config=config,
        normalise=normalisations(store),
        device=CPU,
        precision=torch.float32,
    )
    model = Bright().eval()
    lists: list[torch.Size] = []
    own = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        lists.append(tensor.shape)
        return own(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    with NoNumbers():  # type: ignore[no-untyped-call]
        table = scoring.score(model, 0, 1)
    assert lists == [torch.Size([2])] * len(cases)
    monkeypatch.undo()
    for info, row in zip(cases, table, strict=True):
        (image,), labels = store.read_channels(info.case)
        (how,) = normalisations(store)(info.case)
        bright, true = how(torch.from_numpy(image)).numpy() > 0, labels > 0
        assert row == [(bright & true).sum(), bright.sum() + true.sum()]


class Bright(nn.Module):
    """Takes what is brighter than the mean for a lesion."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
