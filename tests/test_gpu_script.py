"""The script that checks a GPU, run on a processor as a user runs it there."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu_phases.machine import Ceilings, Layer, layers_of, limit_of
from benchmarks.gpu_phases.runs import on_gpu
from torch.utils.flop_counter import FlopCounterMode

from voxelscale.model.unet import UNet

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
PHASES = [
    *("facts", "ceilings", "correctness", "speed", "synchronisations", "training", "prediction"),
    *("convolutions", "memory", "resume", "ranks", "compiled"),
]


def run(out: Path, *arguments: str, launch: tuple[str, ...] = ()) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, rows and what was printed."""
    command = [sys.executable, *launch, str(SCRIPT), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path = out / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return done.returncode, [json.loads(line) for line in lines], done.stdout + done.stderr


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_every_phase_is_right_on_a_processor(tmp_path: Path) -> None:
    # On a busy machine a phase takes longer than the minute that it may take on one with a GPU.
    code, rows, printed = run(tmp_path, "--limit", "500", "--seconds", "550")
    assert [row["phase"] for row in rows] == PHASES
    assert {row["phase"]: row["why"] for row in rows if row["status"] != "ok"} == {}, printed
    assert code == 0
    for phase in PHASES:
        assert f"\n{phase} " in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "results.jsonl"]
    figures = {row["phase"]: row["figures"] for row in rows}
    for part in ("norms", "losses", "optimisers", "samples", "windows", "networks"):
        checks = figures["correctness"][part]
        assert all(found <= limit for found, limit in checks.values())
        # Of samples, threads and batches must change nothing here.
        assert any(found > 0 for found, _ in checks.values()) == (part != "samples")
    layers, total = figures["convolutions"]["layers"], figures["convolutions"]["total_ms"]
    summed = sum(row["channels last"] * row["count"] for row in layers)
    assert math.isclose(summed, total["channels last"], rel_tol=1e-3)
    assert figures["resume"]["usual"]["resumed"] == 0
    assert 0 <= figures["ranks"]["two_ranks_against_virtual"] <= 1e-5
    assert "GPU" in figures["speed"]["left_out"]["ours, graph, bf16, channels last"]
    assert figures["training"]["validated"]["validations"] > 0
    assert "1024x1024x1024" in figures["memory"]["refused"]


def test_a_crash_is_a_row_and_the_next_phase_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOXELSCALE_GPU_FAULT", "facts=crash")
    code, rows, printed = run(tmp_path, "--only", "facts,ceilings")
    assert code == 1
    assert [(row["phase"], row["status"]) for row in rows] == [("facts", "failed"), ("ceilings", "ok")]
    assert "SIGABRT" in rows[0]["why"]
    assert "1 ok, 1 failed" in printed


def test_a_phase_over_its_limit_is_ended_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOXELSCALE_GPU_FAULT", "facts=hang")
    code, rows, _ = run(tmp_path, "--only", "facts", "--limit", "6")
    assert code == 1
    assert (rows[0]["status"], rows[0]["why"]) == ("failed", "over its limit of 6 s")
    assert rows[0]["figures"]["cores"] >= 1


def test_phases_for_which_no_time_is_left_are_skipped(tmp_path: Path) -> None:
    code, rows, _ = run(tmp_path, "--only", "facts,speed", "--seconds", "5")
    assert code == 0
    assert [(row["status"], row["why"]) for row in rows] == [("skipped", "no time left")] * 2


def test_an_unknown_phase_is_refused(tmp_path: Path) -> None:
    code, rows, printed = run(tmp_path, "--only", "nonsense")
    assert (code, rows) == (2, [])
    assert "no phase nonsense" in printed


def test_weak_scaling_of_two_ranks(tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    code, rows, printed = run(tmp_path, "--nodes", launch=launch)
    assert code == 0, printed
    found = [(row["figures"]["ranks"], row["figures"]["compress"]) for row in rows]
    assert found == [(1, "none"), (2, "none"), (2, "bf16")]
    one, two, half = (row["figures"] for row in rows)
    assert one["efficiency"] == 1
    assert two["gradient_mb"] == pytest.approx(2 * half["gradient_mb"], rel=1e-3)
    assert two["efficiency"] == pytest.approx(
        two["patches_per_second"] / (2 * one["patches_per_second"]), rel=1e-3
    )
    assert two["all_reduce_ms"] > 0


def test_what_a_trace_of_a_gpu_says() -> None:
    def event(kind: str, name: str, start: float, length: float) -> dict[str, Any]:
        return {"cat": kind, "name": name, "ts": start, "dur": length}

    events = [
        event("cpu_op", "aten::add", 0, 5),
        *(event("cuda_runtime", "cudaLaunchKernel", start, 2) for start in (0, 10, 20, 30)),
        event("cuda_runtime", "cudaStreamSynchronize", 40, 100),
        *(event("cuda_runtime", "cudaEventSynchronize", start, 1) for start in (140, 150)),
        event("kernel", "one", 100, 20),
        event("kernel", "two", 110, 20),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 150, 10),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 180, 20),
    ]
    found = on_gpu(events, steps=2)
    assert found["stream_synchronisations"] == 0.5
    assert found["waits"] == {"cudaEventSynchronize": 1.0, "cudaStreamSynchronize": 0.5}
    assert (found["kernels"], found["launches"], found["pageable_copies"]) == (1.0, 2.0, 0.5)
    assert found["busy_share"] == pytest.approx((30 + 10 + 20) / 100)
    assert found["step_ms"] == pytest.approx(0.05)


def test_the_limit_of_a_convolution() -> None:
    counts = layers_of(lambda: UNet(depth=2, filters=4), batch=2, size=(8, 8, 8))
    # Two levels of two on the way down, the upsampling, two on the way up, and the head.
    assert sum(counts.values()) == 8
    assert counts[Layer(1, 4, (8, 8, 8), (3, 3, 3), False, True)] == 1
    layer = Layer(4, 8, (4, 4, 4), (3, 3, 3), False, False)
    assert counts[layer] == 1
    outputs = 2 * 4**3 * 8
    conv, image = torch.nn.Conv3d(4, 8, 3, padding=1, bias=False), torch.zeros(2, 4, 4, 4, 4)
    with FlopCounterMode(display=False) as counter:
        assert conv(image).numel() == outputs
    by_flop = limit_of(layer, 2, Ceilings(bandwidth=math.inf, flops=1.0))
    assert by_flop == 3 * counter.get_total_flops()
    by_bytes = limit_of(layer, 2, Ceilings(bandwidth=1.0, flops=math.inf))
    assert by_bytes == 3 * 2 * (image.numel() + outputs + conv.weight.numel())
