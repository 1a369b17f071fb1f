"""The time model against formulas worked by hand, PyTorch's own buckets, and real ranks."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import _compute_bucket_assignment_by_size  # type: ignore[attr-defined]

from voxelscale.config import Config, load
from voxelscale.errors import VoxelscaleError
from voxelscale.experiments.once import Training, TrainingResult
from voxelscale.scale import scale as command
from voxelscale.scale.clusters import CLUSTERS, cluster_of
from voxelscale.scale.cost import (
    Budget,
    Interconnect,
    StepCost,
    all_reduce_seconds,
    buckets,
    compare,
    expected_greatest,
    exposed_seconds,
    flat_seconds,
    hidden_share,
    ring_seconds,
    training_time,
    tree_seconds,
    update_time,
)
from voxelscale.scale.links import LINKS, Link, fit_link, parse_link
from voxelscale.scale.measure import (
    budget_of,
    describe,
    measure_link,
    measure_start,
    measure_step,
    validate_model,
)
from voxelscale.store import Store
from voxelscale.train.clock import Clock

MB = 2**20
PLAIN = Link(name="plain", alpha_seconds=1e-3, beta_bytes_per_second=1e6, source="test")
STEP = StepCost(
    forward_seconds=0.1,
    backward_seconds=0.2,
    update_seconds=0.01,
    input_seconds=0.05,
    batch_seconds=(0.01, 0.01, 0.04),
    gradients=((0.25, MB), (0.5, 20 * MB), (0.75, 10 * MB), (1.0, MB)),
    case_seconds=3.0,
    fixed_seconds=7.0,
)
links = st.builds(
    lambda alpha, beta: Link(name="any", alpha_seconds=alpha, beta_bytes_per_second=beta, source="test"),
    st.floats(0, 1e-2),
    st.floats(1e3, 1e12),
)
worker_counts = st.integers(1, 1024)


def test_ring_and_tree_by_hand() -> None:
    # 4 workers, 1 MB at 1 MB/s: 6 steps of a quarter; two levels up and down.
    assert ring_seconds(PLAIN, 4, 1e6) == pytest.approx(6e-3 + 1.5)
    assert tree_seconds(PLAIN, 4, 1e6) == pytest.approx(4e-3 + 2.0)
    assert flat_seconds(PLAIN, 4, 1e6) == pytest.approx(1.506)
    # Few bytes and many workers: the tree's latency wins.
    assert flat_seconds(PLAIN, 64, 4) == pytest.approx(12e-3 + 8e-6)
    assert tree_seconds(PLAIN, 5, 0) == pytest.approx(6e-3)
    # A tree has a latency of its own: with 10 ms a step the ring wins again at 4 workers.
    slow = replace(PLAIN, tree_alpha_seconds=10e-3)
    assert tree_seconds(slow, 4, 1e6) == pytest.approx(40e-3 + 2.0)
    assert ring_seconds(slow, 4, 1e6) == ring_seconds(PLAIN, 4, 1e6)
    assert flat_seconds(slow, 4, 4) == pytest.approx(6e-3 + 6e-6)


def test_several_nodes_by_hand() -> None:
    fast = Link(name="fast", alpha_seconds=0.0, beta_bytes_per_second=1e8, source="test")
    network = Interconnect(within=fast, between=PLAIN, per_node=4, rails=2)
    # 16 workers are 4 nodes: a ring passes between nodes in 6 of 30 steps, and 30/16 MB leave each node by
    # two adapters.
    assert all_reduce_seconds(network, 16, 1e6) == pytest.approx(6e-3 + 30 / 16 / 2)
    # Of few bytes a tree is faster, with 2 log2(4) steps between nodes.
    assert all_reduce_seconds(network, 16, 4) == pytest.approx(4e-3 + 8 / 2e6)
    # One node needs no network.
    assert all_reduce_seconds(network, 4, 1e6) == pytest.approx(0.015)
    assert all_reduce_seconds(network, 1, 1e6) == 0


@given(links, st.floats(0, 1e10))
def test_one_worker_communicates_nothing(link: Link, size: float) -> None:
    assert flat_seconds(link, 1, size) == 0
    assert all_reduce_seconds(Interconnect(within=link), 1, size) == 0


@given(st.floats(1e3, 1e12), st.floats(1, 1e10))
def test_a_ring_tends_to_twice_the_bytes(beta: float, size: float) -> None:
    link = Link(name="any", alpha_seconds=0.0, beta_bytes_per_second=beta, source="test")
    times = [ring_seconds(link, 2**power, size) for power in range(12)]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2 * size / beta, rel=1e-3)
    assert times[-1] < 2 * size / beta


@given(links, worker_counts, st.floats(0, 1e10), st.floats(0, 1e10))
def test_more_bytes_take_longer(link: Link, workers: int, some: float, more: float) -> None:
    some, more = sorted((some, more))
    assert flat_seconds(link, workers, some) <= flat_seconds(link, workers, more) * (1 + 1e-12)


@given(links, worker_counts, st.floats(0, 1), st.integers(1, 8))
def test_an_update_takes_at_least_its_arithmetic(link: Link, workers: int, hidden: float, k: int) -> None:
    time = update_time(STEP, Interconnect(within=link, hidden=hidden), workers, k)
    arithmetic = k * (0.1 + 0.2 + 0.02) + 0.01
    assert time.compute == pytest.approx(arithmetic)
    assert time.total >= time.compute
    assert 0 <= time.exposed <= time.communication * (1 + 1e-9)
    assert time.total >= k * STEP.input_seconds


@given(links, st.integers(2, 1024))
def test_the_last_bucket_is_never_hidden(link: Link, workers: int) -> None:
    exposed, total = exposed_seconds(STEP, Interconnect(within=link), workers)
    last = buckets(STEP.gradients)[-1][1]
    assert exposed >= all_reduce_seconds(Interconnect(within=link), workers, last) * (1 - 1e-9)
    nothing_hidden, _ = exposed_seconds(STEP, Interconnect(within=link, hidden=0.0), workers)
    assert nothing_hidden == pytest.approx(total)


def test_overlap_by_hand() -> None:
    # Buckets of 1, 30 and 1 MB (the second is closed by what reaches 25), ready at 0.05, 0.15, 0.2 s.
    assert buckets(STEP.gradients) == [(0.25, MB), (0.75, 30 * MB), (1.0, MB)]
    link = Link(name="any", alpha_seconds=0.0, beta_bytes_per_second=1000 * MB, source="test")
    # Two workers: S / beta. The second ends at 0.18, so only the last millisecond shows.
    exposed, total = exposed_seconds(STEP, Interconnect(within=link), 2)
    assert exposed == pytest.approx(0.001)
    assert total == pytest.approx(0.032)
    # At 100 MB/s the second ends at 0.45 and the third at 0.46.
    slow = replace(link, beta_bytes_per_second=100 * MB)
    assert exposed_seconds(STEP, Interconnect(within=slow), 2)[0] == pytest.approx(0.26)
    # Half of the bytes: 0.15 + 0.15 + 0.005.
    half = Interconnect(within=slow, compression=0.5)
    assert exposed_seconds(STEP, half, 2)[0] == pytest.approx(0.105)


@given(st.lists(st.integers(1, 40 * MB // 4), min_size=1, max_size=30))
def test_buckets_are_pytorchs(numbers: list[int]) -> None:
    meta = [torch.empty(n, device="meta") for n in numbers]
    groups, _ = _compute_bucket_assignment_by_size(meta, [MB, 25 * MB])
    ours = buckets([(i / len(numbers), 4 * n) for i, n in enumerate(numbers, start=1)])
    # PyTorch lists an unfilled last bucket last too, as all are of one type.
    assert [size for _, size in ours] == [sum(4 * numbers[i] for i in group) for group in groups]
    assert [ready for ready, _ in ours] == [(max(group) + 1) / len(numbers) for group in groups]


def test_the_greatest_of_some_draws() -> None:
    values = [3.0, 1.0, 2.0]
    for draws in (1, 2, 3):
        every = [max(pick) for pick in itertools.product(values, repeat=draws)]
        assert expected_greatest(values, draws) == pytest.approx(sum(every) / len(every))
    assert expected_greatest(values, 10_000) == pytest.approx(3.0)


def test_input_that_does_not_keep_up() -> None:
    slow = replace(STEP, input_seconds=1.0)
    network = Interconnect(within=PLAIN)
    assert update_time(slow, network, 1).total == pytest.approx(1.0)
    assert update_time(STEP, network, 1).input_wait == 0
    # Where reading takes the same cores it adds up.
    shared = update_time(STEP, replace(network, hidden=0.0), 1)
    assert shared.input_wait == pytest.approx(0.05)


def test_sync_batch_waits_for_its_statistics() -> None:
    step = replace(STEP, gradients=((1.0, 4),), blocking_bytes=(0, 0))
    network = Interconnect(within=PLAIN)
    # Two workers: 2 ms an all-reduce.
    assert update_time(step, network, 2, micro_batches=1).exposed == pytest.approx(6e-3, rel=1e-2)
    assert update_time(step, network, 1).exposed == 0


def test_a_training_by_hand() -> None:
    free = Link(name="free", alpha_seconds=0.0, beta_bytes_per_second=math.inf, source="test")
    step = replace(STEP, batch_seconds=(0.02,))
    budget = Budget(samples=1000, batch_size=2, validations=2, cases=5)
    one = training_time(step, Interconnect(within=free), 1, budget)
    assert (one.updates, one.samples) == (500, 1000)
    assert one.total == pytest.approx(500 * 0.33 + 2 * 5 * 3.0 + 7.0)
    four = training_time(step, Interconnect(within=free), 4, budget)
    assert (four.updates, four.samples) == (125, 1000)
    assert four.total == pytest.approx(125 * 0.33 + 2 * 2 * 3.0 + 7.0)
    three = training_time(step, Interconnect(within=free), 3, budget)
    assert (three.updates, three.samples) == (167, 1002)
    assert one.seconds_after(1000) == pytest.approx(one.total)
    assert one.seconds_after(0) == pytest.approx(7.0)
    assert one.device_hours == pytest.approx(one.total / 3600)
    assert four.device_hours == pytest.approx(4 * four.total / 3600)
    assert four.busy == pytest.approx(125 * 0.33 / four.total)


@pytest.mark.parametrize(("samples", "workers", "grow_from"), [(8192, 64, 4), (1000, 12, 2), (100, 8, 0)])
def test_time_to_samples_counts_the_updates_of_a_growing_batch(
    samples: int, workers: int, grow_from: int
) -> None:
    free = Link(name="free", alpha_seconds=0.0, beta_bytes_per_second=math.inf, source="test")
    clock = Clock(samples, workers, 1, grow_from, 0.4)
    budget = Budget(samples=samples, batch_size=1, stages=clock.stages)
    time = training_time(replace(STEP, batch_seconds=(0.02,)), Interconnect(within=free), workers, budget)
    assert (time.updates, time.samples) == (clock.updates, clock.end)
    for made, step in enumerate(clock.steps(0), start=1):
        assert time.updates_after(step.end) == made
        assert time.updates_after(step.first + 1) == made
        assert time.seconds_after(step.end) == pytest.approx(7.0 + 0.33 * made)
    assert time.seconds_after(10 * samples) == pytest.approx(time.total)
    half = time.seconds_after(samples / 2) - 7.0
    if grow_from == 4:  # the recipe: half of the samples take 78 % of the updates
        assert half / (time.total - 7.0) == pytest.approx(0.78, abs=0.01)


def test_what_varies_in_the_passes_makes_workers_wait_too() -> None:
    network = Interconnect(within=PLAIN)
    still = replace(STEP, batch_seconds=(0.02,))
    assert update_time(still, network, 64).straggling == 0
    jitter = replace(still, jitter_seconds=(0.0, 0.0, 0.06))
    time = update_time(jitter, network, 2)
    assert time.compute == pytest.approx(0.33 + 0.02)
    every = [max(a, b) for a in jitter.jitter_seconds for b in jitter.jitter_seconds]
    assert time.straggling == pytest.approx(sum(every) / 9 - 0.02)
    # Both at once: all nine sums are as likely.
    both = replace(STEP, jitter_seconds=jitter.jitter_seconds)
    sums = [made + late for made in both.batch_seconds for late in both.jitter_seconds]
    wanted = sum(max(a, b) for a in sums for b in sums) / 81 - sum(sums) / 9
    assert update_time(both, network, 2).straggling == pytest.approx(wanted)


def test_one_rule_says_what_runs_beside_the_arithmetic() -> None:
    assert hidden_share(gpu=True) == hidden_share(gpu=True, spare_cores=3) == 1
    assert hidden_share(gpu=False) == hidden_share(gpu=False, spare_cores=-1) == 0
    assert hidden_share(gpu=False, spare_cores=6) == 1


def test_three_scalings_are_distinguished() -> None:
    free = Link(name="free", alpha_seconds=0.0, beta_bytes_per_second=math.inf, source="test")
    step = replace(STEP, batch_seconds=(0.02,), fixed_seconds=0.0, case_seconds=0.0)
    budget = Budget(samples=1000, batch_size=1)
    one, ten = (training_time(step, Interconnect(within=free), n, budget) for n in (1, 10))
    # Ten times the samples a second, but half as many again are needed, and the Dice is 2 % less.
    told = compare(one, ten, reached=(600, 900), dice=(0.8, 0.784))
    assert told.throughput_speedup == pytest.approx(10)
    assert told.throughput_efficiency == pytest.approx(1)
    assert told.target_speedup == pytest.approx(10 / 1.5)
    assert told.dice_relative == pytest.approx(0.98)
    assert compare(one, ten, reached=(600, None)).target_speedup is None


def test_links_are_read() -> None:
    link = parse_link("alpha=5us,beta=12GB/s")
    assert [link.alpha_seconds, link.beta_bytes_per_second] == pytest.approx([5e-6, 12e9])
    bits = parse_link(" beta = 100 Gb/s , alpha = 1.5e3 ns ")
    assert [bits.alpha_seconds, bits.beta_bytes_per_second] == pytest.approx([1.5e-6, 12.5e9])
    assert parse_link("alpha=0s,beta=1GiB/s").beta_bytes_per_second == 2**30
    assert parse_link("InfiniBand-EDR") is LINKS["infiniband-edr"]
    tree = parse_link("alpha=5us,beta=12GB/s,tree=9us")
    assert [link.tree_alpha, tree.tree_alpha, tree.alpha_seconds] == pytest.approx([5e-6, 9e-6, 5e-6])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("infiniband-edx", "did you mean infiniband-edr"),
        ("alpha=5us", "beta is missing"),
        ("alpha=5us,beta=12", "needs a unit"),
        ("alpha=5us,beta=12GBps", "has no unit 'GBps'"),
        ("alpha=fast,beta=12GB/s", "not a number"),
        ("alpha=-5us,beta=12GB/s", "not a number"),
        ("alpha=5us,beta=0GB/s", "beta is 0"),
        ("alpha=1e999s,beta=1GB/s", "not finite"),
        ("alpha=5us,alpha=6us,beta=1GB/s", "given twice"),
        ("alpha=5us,gamma=1,beta=1GB/s", "unknown part 'gamma=1'"),
        ("", "alpha=5us,beta=12GB/s"),
    ],
)
def test_links_that_are_not(text: str, said: str) -> None:
    with pytest.raises(VoxelscaleError) as caught:
        parse_link(text)
    assert said in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("name", [name for name in LINKS if name != "gloo-memory"])
def test_presets_say_where_they_are_from(name: str) -> None:
    link = LINKS[name]
    nominal = {"edr": 12.5e9, "hdr": 25e9, "ndr": 50e9, "a100": 300e9, "h100": 450e9}
    nominal |= {"1g": 0.125e9, "10g": 1.25e9, "25g": 3.125e9, "100g": 12.5e9, "p100": 40e9, "gen3": 15.75e9}
    line_rate = nominal[name.split("-")[1]]
    assert 0.7 * line_rate < link.beta_bytes_per_second < line_rate
    assert "alpha:" in link.source
    assert "beta:" in link.source


@pytest.mark.parametrize("name", list(CLUSTERS))
def test_clusters_are_whole_and_keys_beside_them_win(name: str) -> None:
    cluster = cluster_of(load(None, [f"scale.cluster={name}"]).scale)
    assert cluster == CLUSTERS[name]
    assert parse_link(cluster.within).source
    assert parse_link(cluster.between).source
    assert cluster.source
    assert cluster.title
    given = [
        "scale.node_devices=3",
        "scale.rails=2",
        "scale.interconnect=ethernet-25g",
        "scale.node_link=pcie-gen3",
    ]
    mine = cluster_of(load(None, [f"scale.cluster={name}", *given]).scale)
    assert (mine.devices, mine.rails, mine.between, mine.within) == (3, 2, "ethernet-25g", "pcie-gen3")


def test_clusters_by_hand() -> None:
    assert [CLUSTERS[name].devices for name in ("reedbush-h", "reedbush-l", "dgx-a100", "dgx-h100")] == [
        2,
        4,
        8,
        8,
    ]
    plain = cluster_of(Config().scale)
    assert (plain.devices, plain.between, plain.rails) == (1, "infiniband-edr", 1)
    with pytest.raises(VoxelscaleError, match="reedbush-x") as caught:
        cluster_of(load(None, ["scale.cluster=reedbush-x"]).scale)
    assert "did you mean reedbush-" in caught.value.hint
    # A study's stored config lists its link, as it did before there were clusters.
    assert cluster_of(load(None, ["scale.interconnect=infiniband-hdr"]).scale).between == "infiniband-hdr"


def test_the_adapters_of_a_node_count_with_one_device_in_it() -> None:
    seconds = []
    for rails in (1, 4):
        config = load(None, ["scale.interconnect=alpha=0us,beta=10GB/s", f"scale.rails={rails}"])
        network, notes = command._network(config, cluster_of(config.scale))
        assert ("4 network adapters a node" in notes) == (rails == 4)
        seconds.append(all_reduce_seconds(network, 8, 1e9))
    assert seconds == pytest.approx([2 * 7 / 8 / 10, 2 * 7 / 8 / 40])


def test_a_fit_finds_the_link_again() -> None:
    sizes = [4**power for power in range(1, 14)]
    exact = [ring_seconds(LINKS["ethernet-10g"], 4, size) for size in sizes]
    link = fit_link("x", 4, sizes, exact, "test")
    assert link.alpha_seconds == pytest.approx(20e-6)
    assert link.beta_bytes_per_second == pytest.approx(LINKS["ethernet-10g"].beta_bytes_per_second)
    assert link.residual < 1e-9
    rng = random.Random(0)
    noisy = fit_link("x", 4, sizes, [t * rng.uniform(0.9, 1.1) for t in exact], "test")
    assert noisy.alpha_seconds == pytest.approx(20e-6, rel=0.1)
    assert 0.02 < noisy.residual < 0.1
    with pytest.raises(VoxelscaleError):
        fit_link("x", 2, [4, 4096, 2**20], [3.0, 2.0, 1.0], "test")


def test_the_model_needs_no_pytorch() -> None:
    code = "import sys, voxelscale.scale.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_real_link_is_measured() -> None:
    link = measure_link(2, sizes=(4, 65_536, 2**20, 2**23), rounds=5)
    assert link.beta_bytes_per_second > 0
    assert link.alpha_seconds >= 0
    assert "2 gloo ranks" in link.name
    assert 0 < link.residual < 10


def test_a_real_step_is_measured(tiny: Config, store: Store) -> None:
    step = measure_step(tiny, store, rounds=3)
    assert min(step.forward_seconds, step.backward_seconds, step.update_seconds, step.input_seconds) > 0
    assert step.case_seconds > 0
    assert len(step.batch_seconds) == 64
    assert len(step.jitter_seconds) == 3
    a_pass = step.forward_seconds + step.backward_seconds
    assert statistics.median(step.jitter_seconds) == pytest.approx(0, abs=a_pass)
    shares = [share for share, _ in step.gradients]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] == 1


def test_a_start_is_a_whole_training_of_one_update(tiny: Config, store: Store) -> None:
    trained: list[Training] = []

    def waits(training: Training, /, *_: object, **__: object) -> TrainingResult:
        trained.append(training)
        time.sleep(0.5)
        return TrainingResult(ending="finished")

    step = replace(STEP, case_seconds=0.01, forward_seconds=0.02, backward_seconds=0.03)
    config = replace(tiny, optim=replace(tiny.optim, grow_from=1))
    seconds = measure_start(config, store, step, train=waits)
    beside = 0.01 + 0.02 + 0.03 + 0.02 + 0.01
    assert seconds >= 0.5 - beside - 1e-3
    (training,) = trained
    how = training.config.train
    assert (how.samples, how.ranks, how.validate_cases) == (tiny.train.batch_size, 1, 1)
    assert training.config.optim.grow_from == 0
    assert not training.run.parent.exists(), "it leaves nothing behind"

    def fails(*_: object, **__: object) -> TrainingResult:
        return TrainingResult(ending="failed", fault=VoxelscaleError("no power", "plug it in"))

    with pytest.raises(VoxelscaleError, match="no power"):
        measure_start(config, store, step, train=fails)


def test_gradients_are_all_counted(tiny: Config, store: Store) -> None:
    from voxelscale.model.build import build_model

    step = measure_step(tiny, store, rounds=1, validation=False)
    model = build_model(tiny.model, tiny.data.patch_size, store.spacing)
    assert sum(size for _, size in step.gradients) == 4 * sum(p.numel() for p in model.parameters())


def test_the_model_is_held_against_two_real_ranks(tiny: Config, store: Store) -> None:
    check = validate_model(tiny, store, rounds=2)
    assert check.measured > 0
    assert check.error_percent == pytest.approx(100 * (check.predicted.total / check.measured - 1))
    assert check.predicted.communication > 0
    assert check.predicted.total > check.predicted.compute
    assert f"{check.error_percent:+.1f} %" in describe(check)
    assert f"{100 * check.hidden:.0f} % of communication" in describe(check)


def test_the_budget_of_a_config(tiny: Config, store: Store) -> None:
    train = replace(tiny.train, samples=100, validate_every=30, virtual_workers=3)
    budget = budget_of(replace(tiny, train=train), store)
    # Validated after 30, 60, 90 and at the end.
    assert budget == Budget(
        samples=100, batch_size=2, micro_batches=3, validations=4, cases=len(store.split("val"))
    )
    more = replace(train, validate_at=(10, 60, 100, 500))  # 60 and 100 are due anyway, 500 never
    assert budget_of(replace(tiny, train=more), store).validations == 5
