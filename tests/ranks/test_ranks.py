"""Who takes part, and which faults mean that a peer is gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from voxelscale.ranks.faults import lost_peer
from voxelscale.ranks.workers import join

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
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with join(1, 1) as workers:
        assert workers.device == torch.device("cuda", 1 % gpus)
    assert asked["name"] == backend
    assert asked["device_id"] == (workers.device if backend == "nccl" else None)
