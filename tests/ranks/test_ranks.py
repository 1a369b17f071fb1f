"""Who takes part, and which faults mean that a peer is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from voxelscale.errors import VoxelscaleError
from voxelscale.ranks import workers
from voxelscale.ranks.faults import lost_peer
from voxelscale.ranks.workers import join, local_rank

HANGS = """
import ctypes
from voxelscale.ranks.launch import end_with_parent
end_with_parent(by_kernel=True)
print("begun", flush=True)
ctypes.PyDLL(None).sleep(120)  # with Python's lock
"""
STARTS = """
import os, subprocess, sys
from voxelscale.ranks.launch import PARENT
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, PARENT: str(os.getpid())})
print(child.pid, flush=True)
child.wait()
"""

LOST = [
    dist.DistNetworkError("The client socket has failed to connect"),
    dist.DistStoreError("wait timeout after 1000ms"),
    dist.DistBackendError(
        "NCCL error: remote process exited or there was a network error, NCCL version 2.27"
    ),
    dist.DistBackendError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1"),
    RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv operation"),
]
OTHERS = [
    dist.DistBackendError(
        "NCCL error: invalid usage. Duplicate GPU detected : rank 0 and rank 1 both on 1000"
    ),
    dist.DistBackendError("NCCL error: unhandled cuda error"),
    RuntimeError("[gloo] Invalid scalar type"),
    RuntimeError("Connection closed by peer"),
    ValueError("gloo: timed out"),
]


@pytest.mark.parametrize("error", LOST)
def test_a_lost_peer(error: Exception) -> None:
    assert lost_peer(error)


@pytest.mark.parametrize("error", OTHERS)
def test_a_fault_that_would_come_again(error: Exception) -> None:
    assert not lost_peer(error)


@pytest.mark.parametrize(("gpus", "backend"), [(2, "nccl"), (1, "gloo")])
def test_ranks_that_share_a_gpu_take_gloo(
    monkeypatch: pytest.MonkeyPatch, gpus: int, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda name, **how: asked.update(how, name=name))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(workers, "meet", lambda *place: torch._C._distributed_c10d.HashStore())
    place = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    for name, value in {**place, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    with join(1, 1) as joined:
        assert joined.device == torch.device("cuda", 1 % gpus)
    assert asked["name"] == backend
    assert asked["device_id"] == (joined.device if backend == "nccl" else None)


@pytest.mark.parametrize(
    ("said", "ranks", "gpus", "place"),
    [
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 8, 4, (3, 4)),
        ({}, 2, 1, (0, 1)),  # one GPU is shown to each
        ({}, 1, 8, (0, 1)),
    ],
)
def test_a_rank_s_place_on_its_machine(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], ranks: int, gpus: int, place: tuple[int, int]
) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert local_rank(ranks, gpus) == place


def test_a_rank_that_cannot_know_its_gpu_does_not_take_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(VoxelscaleError, match="which of 4 GPUs"):
        local_rank(8, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_rank_that_hangs_in_native_code_ends_with_its_parent() -> None:
    command = [sys.executable, "-c", STARTS, HANGS]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    rank = int(parent.stdout.readline())
    assert parent.stdout.readline() == "begun\n"
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{rank}/cmdline").exists() and Path(f"/proc/{rank}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
