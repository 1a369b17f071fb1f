"""How long a training takes at N workers: formulas over measured parts.

A step's parts are measured on one worker (`scale.measure`), the link's two figures are known
(`scale.links`); what N workers take follows from them. Nothing here imports PyTorch.

Notation: N workers, S bytes of gradients, alpha seconds a step of a collective, beta bytes a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from voxelscale.scale.links import Link

MODEL = 3
"""Grows whenever formulas or their parts change: what was measured for another one is measured again."""

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""DistributedDataParallel's bounds: gradients of 1 MiB go first, then 25 MiB at a time."""


@dataclass(frozen=True, kw_only=True)
class Interconnect:
    """How workers are connected: devices of a node by one link, nodes by another.

    Attributes:
        within: between devices of a node.
        between: between nodes; None: `within` connects all.
        per_node: devices of a node.
        rails: adapters of a node; its devices share them.
        hidden: share, 0 to 1, of communication and input that truly runs beside the arithmetic, by
            `hidden_share`.
        compression: bytes sent per byte of gradient; 0.5 with bf16 on the wire.
    """

    within: Link
    between: Link | None = None
    per_node: int = 1
    rails: int = 1
    hidden: float = 1.0
    compression: float = 1.0


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one worker's step takes, measured without any other.

    Attributes:
        forward_seconds: of a micro-batch, with the loss.
        backward_seconds: of a micro-batch, without communication.
        update_seconds: clipping and the optimiser, once an update.
        input_seconds: reading a micro-batch with all of a worker's reader threads, nothing else running.
        batch_seconds: making the network's input from what was read (augmentation), on the training
            device: a figure for each of several micro-batches, as they differ by what they drew.
        jitter_seconds: forward and backward pass of each of several micro-batches, less
            ``forward_seconds + backward_seconds``: the same arithmetic, which yet varies.
        gradients: of each parameter in the order of the backward pass, the share of it after which
            the gradient is there (0 to 1) and its bytes.
        blocking_bytes: of each all-reduce that forward or backward must wait for (``sync_batch``'s
            statistics).
        case_seconds: validating one scan.
        fixed_seconds: of a run, whatever its length: starting the process, imports, opening the store,
            settling the arithmetic, the first step's own cost, the last checkpoint, the bundle.
    """

    forward_seconds: float
    backward_seconds: float
    update_seconds: float
    input_seconds: float
    batch_seconds: tuple[float, ...]
    jitter_seconds: tuple[float, ...] = ()
    gradients: tuple[tuple[float, int], ...]
    blocking_bytes: tuple[int, ...] = ()
    case_seconds: float = 0.0
    fixed_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What is to be done, whatever the number of workers.

    Attributes:
        samples: patches to train on.
        batch_size: patches of a micro-batch.
        micro_batches: that each worker sees per update, one after another.
        validations: how many in the run.
        cases: scans of a validation.
        stages: where the global batch grows, samples seen and updates made at each stage's end
            (`voxelscale.train.clock.Clock.stages`); (): samples / global batch updates of one size.
    """

    samples: int
    batch_size: int
    micro_batches: int = 1
    validations: int = 1
    cases: int = 0
    stages: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class UpdateTime:
    """Seconds of one update, by what they are spent on.

    Attributes:
        compute: one worker's arithmetic, mean.
        straggling: waiting for the worker whose micro-batches took longest.
        communication: all of the gradients' and the norms' all-reduces.
        exposed: what of it the backward pass does not hide.
        input_wait: for samples that are not read yet.
    """

    compute: float
    straggling: float
    communication: float
    exposed: float
    input_wait: float

    @property
    def total(self) -> float:
        """Seconds from one update to the next."""
        return self.compute + self.straggling + self.exposed + self.input_wait


@dataclass(frozen=True, kw_only=True)
class TrainingTime:
    """Seconds of a whole training at `workers` workers, by what they are spent on.

    Attributes:
        stages: samples seen and updates made at the end of each stretch of updates of one size; the last
            global batch is whole.
        update: one of them; it takes as long at every size, as no worker gets more than its micro-batch.
        validation: all validations, shared out over the workers.
        fixed: what does not depend on the length.
    """

    workers: int
    stages: tuple[tuple[int, int], ...]
    update: UpdateTime
    validation: float
    fixed: float

    @property
    def samples(self) -> int:
        """Trained on."""
        return self.stages[-1][0]

    @property
    def updates(self) -> int:
        """How many."""
        return self.stages[-1][1]

    @property
    def total(self) -> float:
        """The training's wall time, seconds."""
        return self.updates * self.update.total + self.validation + self.fixed

    @property
    def samples_per_second(self) -> float:
        """Throughput while it trains: samples of a mean update / its time."""
        return self.samples / self.updates / self.update.total

    @property
    def device_hours(self) -> float:
        """What is paid for: all workers for the whole wall time."""
        return self.workers * self.total / 3600

    @property
    def busy(self) -> float:
        """Utilisation, 0 to 1: the share of the wall time in which a device computes updates."""
        return self.updates * self.update.compute / self.total

    def updates_after(self, samples: float) -> int:
        """Whole updates until so many samples were seen; all of them where there are not so many."""
        first, before = 0, 0
        for end, updates in self.stages:
            if samples <= end:
                size = (end - first) // (updates - before)
                return before + math.ceil((samples - first) / size)
            first, before = end, updates
        return self.updates

    def seconds_after(self, samples: float) -> float:
        """Wall time until so many samples were seen: start-up, the updates up to there, and validation,
        which comes after equal numbers of samples.
        """
        share = min(samples / self.samples, 1.0)
        return self.fixed + self.updates_after(samples) * self.update.total + share * self.validation


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Three scalings of one number of workers against one worker. They are never one figure.

    More workers may process more samples a second (throughput) and yet need more of them, or never
    reach the Dice at all.

    Attributes:
        throughput_speedup: samples a second over one worker's.
        throughput_efficiency: that divided by the number of workers; 1 is ideal.
        target_speedup: one worker's time to the target Dice over this one's; None where either never
            reached it.
        dice_relative: Dice over one worker's; None where it was not measured.
    """

    workers: int
    throughput_speedup: float
    throughput_efficiency: float
    target_speedup: float | None
    dice_relative: float | None


def ring_seconds(link: Link, workers: int, size: float) -> float:
    """All-reduce by a ring: ``2 (N-1) alpha + 2 (N-1)/N S / beta``.

    Reduce-scatter, then all-gather: 2(N-1) steps, each of S/N bytes (Thakur, Rabenseifner and Gropp,
    "Optimization of collective communication operations in MPICH", 2005, sec. 4.5; Patarasuk and Yuan
    2009). No algorithm sends less; its latency grows with N.
    """
    steps = 2 * (workers - 1)
    return steps * link.alpha_seconds + steps / workers * size / link.beta_bytes_per_second


def tree_seconds(link: Link, workers: int, size: float) -> float:
    """All-reduce by a double binary tree: ``2 log2(N) alpha + 2 S / beta``, with the tree's own alpha.

    Two trees, each reducing and then broadcasting half of the bytes, in which every inner node of one
    is a leaf of the other, so that each worker sends and receives S twice, pipelined (Sanders, Speck
    and Traeff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", 2009; NCCL
    since 2.4). Filling the pipeline is left out; log2 is rounded up to whole levels.
    """
    if workers == 1:
        return 0.0
    levels = math.ceil(math.log2(workers))
    return 2 * levels * link.tree_alpha + 2 * size / link.beta_bytes_per_second


def flat_seconds(link: Link, workers: int, size: float) -> float:
    """The faster of ring and tree, as NCCL chooses by its own estimate of both; 0 for one worker."""
    return min(ring_seconds(link, workers, size), tree_seconds(link, workers, size))


def all_reduce_seconds(network: Interconnect, workers: int, size: float) -> float:
    """All-reduce of `size` bytes over all workers.

    Over several nodes NCCL's ring and tree pass through all workers, and Gloo's ring does, too: no node
    reduces its own first. With G devices a node, M nodes, R adapters a node and N workers::

        ring = (2(N-1) - 2(M-1)) alpha_within + 2(M-1) alpha_between + 2(N-1)/N S / beta
        tree = 2(G-1) alpha_within + 2 log2(M) alpha_between + 2 S / beta
        beta = min(beta_within, R beta_between)

    (NCCL src/graph/tuning.cc, ``nInterSteps`` of a ring and the latency of a tree.) The faster one counts.
    A last node that is not full counts as full. Reductions in switches and by NVLink SHARP are left out.
    """
    if network.between is None or workers <= network.per_node:
        return flat_seconds(network.within, workers, size)
    within, between, devices = network.within, network.between, network.per_node
    nodes = math.ceil(workers / devices)
    rate = min(within.beta_bytes_per_second, network.rails * between.beta_bytes_per_second)
    steps, outer = 2 * (workers - 1), 2 * (nodes - 1)
    ring = (steps - outer) * within.alpha_seconds + outer * between.alpha_seconds
    tree = 2 * (devices - 1) * within.tree_alpha + 2 * math.ceil(math.log2(nodes)) * between.tree_alpha
    return min(ring + steps / workers * size / rate, tree + 2 * size / rate)


def buckets(
    gradients: Sequence[tuple[float, int]], first: int = FIRST_BUCKET, rest: int = BUCKET
) -> list[tuple[float, int]]:
    """DistributedDataParallel's buckets: when each is ready (share of the backward pass), and its bytes.

    Gradients fill a bucket in the order in which they come; it is closed by the one that brings it to
    its bound (PyTorch's ``compute_bucket_assignment_by_size``), and ready with its last.
    """
    made: list[tuple[float, int]] = []
    held = 0
    for ready, size in gradients:
        held += size
        if held >= (rest if made else first):
            made.append((ready, held))
            held = 0
    if held:
        made.append((gradients[-1][0], held))
    return made


def exposed_seconds(step: StepCost, network: Interconnect, workers: int) -> tuple[float, float]:
    """The gradients' communication of one update: what the backward pass does not hide, and all of it.

    Bucket i's all-reduce begins when it is ready and the one before has ended (one stream of
    communication)::

        end_i = max(end_(i-1), ready_i x backward) + all_reduce(bytes_i)
        exposed = end_last - backward

    The last bucket is ready with the backward pass's end, so it is never hidden. Only the share
    ``network.hidden`` of communication runs beside the arithmetic::

        hidden x exposed + (1 - hidden) x all

    With several micro-batches an update this is the last one's backward pass; the others send nothing.
    """
    end = total = 0.0
    for ready, size in buckets(step.gradients):
        takes = all_reduce_seconds(network, workers, size * network.compression)
        end = max(end, ready * step.backward_seconds) + takes
        total += takes
    exposed = max(0.0, end - step.backward_seconds)
    return network.hidden * exposed + (1 - network.hidden) * total, total


def hidden_share(gpu: bool, spare_cores: int = 0) -> float:
    """The one rule for `Interconnect.hidden`, for published times and for the check alike.

    1 on a GPU, whose links and readers need none of its arithmetic, and where a processor has cores that no
    worker computes on; 0 where all cores compute, so that what moves bytes delays what computes.

    Args:
        gpu: whether the step was measured on a GPU.
        spare_cores: of a node, beside those of its workers; 0 for a node that is used fully.
    """
    return 1.0 if gpu or spare_cores > 0 else 0.0


def expected_greatest(values: Sequence[float], draws: int) -> float:
    """The mean of the maximum of `draws` independent draws from `values`.

    ``sum_i x_(i) ((i/n)^k - ((i-1)/n)^k)`` over the sorted values: the maximum is at most x_(i) with
    probability (i/n)^k.
    """
    n = len(values)
    return sum(
        value * ((i / n) ** draws - ((i - 1) / n) ** draws)
        for i, value in enumerate(sorted(values), start=1)
    )


def update_time(step: StepCost, network: Interconnect, workers: int, micro_batches: int = 1) -> UpdateTime:
    """One update of N workers.

    With k micro-batches a worker::

        compute = k (mean of batch + forward + backward + jitter) + update
        straggling = (expected maximum of N workers' (batch + jitter) - its mean) sqrt(k)
        input_wait = max(0, k input - compute), the readers running ahead while the device computes
        communication as in `exposed_seconds`; what blocks (sync_batch) is added in full

    So that a step takes max(compute, input supply) + straggling + exposed communication. Where only
    a share ``hidden`` of the reading runs beside the arithmetic, the rest of it adds up:
    ``input_wait = hidden max(0, k input - compute) + (1 - hidden) k input``. What making a batch takes
    (by what it drew) and how long the passes take (the machine's own jitter) vary independently.
    """
    varying = [
        made + late for made in step.batch_seconds or (0.0,) for late in step.jitter_seconds or (0.0,)
    ]
    mean = sum(varying) / len(varying)
    arithmetic = mean + step.forward_seconds + step.backward_seconds
    compute = micro_batches * arithmetic + step.update_seconds
    supply = micro_batches * step.input_seconds
    exposed, total = exposed_seconds(step, network, workers)
    blocking = sum(all_reduce_seconds(network, workers, size) for size in step.blocking_bytes)
    return UpdateTime(
        compute=compute,
        straggling=max(0.0, expected_greatest(varying, workers) - mean) * math.sqrt(micro_batches),
        communication=total + micro_batches * blocking,
        exposed=exposed + micro_batches * blocking,
        input_wait=network.hidden * max(0.0, supply - compute) + (1 - network.hidden) * supply,
    )


def training_time(step: StepCost, network: Interconnect, workers: int, budget: Budget) -> TrainingTime:
    """A whole training::

        updates = ceil(samples / (N k b)), or those of the stages of a growing batch
        total = updates x update + validations x ceil(cases / N) x case + fixed

    A validation's scans are shared out whole, so the slowest rank has ceil(cases / N) of them.
    """
    size = workers * budget.micro_batches * budget.batch_size
    updates = math.ceil(budget.samples / size)
    return TrainingTime(
        workers=workers,
        stages=budget.stages or ((updates * size, updates),),
        update=update_time(step, network, workers, budget.micro_batches),
        validation=budget.validations * math.ceil(budget.cases / workers) * step.case_seconds,
        fixed=step.fixed_seconds,
    )


def compare(
    one: TrainingTime,
    many: TrainingTime,
    *,
    reached: tuple[float | None, float | None] = (None, None),
    dice: tuple[float, float] | None = None,
) -> Scaling:
    """Throughput, time to the target Dice, and Dice, each against one worker.

    Args:
        reached: samples after which one worker and many first had the target Dice; None: never.
        dice: of one worker and of many.
    """
    speedup = many.samples_per_second / one.samples_per_second
    first, later = reached
    reached_both = first is not None and later is not None
    return Scaling(
        workers=many.workers,
        throughput_speedup=speedup,
        throughput_efficiency=speedup * one.workers / many.workers,
        target_speedup=one.seconds_after(first) / many.seconds_after(later)  # type: ignore[arg-type]
        if reached_both
        else None,
        dice_relative=dice[1] / dice[0] if dice and dice[0] else None,
    )
