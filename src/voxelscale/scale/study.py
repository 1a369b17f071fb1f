"""The scaling study: the same training at 1 to N workers, and what that does to time and Dice.

Every trial sees the same samples in the same order, and as many of them unless its recipe adds some; only
the number of workers, the recipe and the seed differ. Workers beyond the devices at hand are emulated
(`voxelscale.ranks.workers`), with the same updates as real ones. The time at N workers is modelled
(`voxelscale.scale.cost`), as N devices are not there to be timed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from voxelscale.config import Config, load, to_dict
from voxelscale.config.renamed import with_first_names
from voxelscale.console import Progress, count, notice
from voxelscale.errors import VoxelscaleError
from voxelscale.experiments.once import samples_seen
from voxelscale.files import digest_of, write_atomic
from voxelscale.train.clock import Clock
from voxelscale.train.optim import peak_rate
from voxelscale.train.recipes import resolve

LOOK = 2.0
"""Seconds between checks of the running trainings' progress."""

UNCHANGED = "unchanged"
"""The recipe's name for one worker's settings at every number of workers."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training of the study.

    Attributes:
        recipe: a name as `train.recipe`, or ``unchanged``; ``name:key=value;key=value`` lays settings
            over it, as an ablation does.
        workers: how many.
        seed: of the training.
        config: what is trained with, the recipe applied.
    """

    recipe: str
    workers: int
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """For files: by what it is trained with, so that recipes of the same settings share it."""
        return f"w{self.workers:04d}_s{self.seed}_{_trained(self.config)[:8]}"

    @property
    def global_batch(self) -> int:
        """Samples of an update."""
        return self.workers * self.config.train.batch_size

    @property
    def clock(self) -> Clock:
        """Its updates."""
        optim, train = self.config.optim, self.config.train
        return Clock(train.samples, self.workers, train.batch_size, optim.grow_from, optim.grow_share)

    @property
    def updates(self) -> int:
        """Of the whole training."""
        return self.clock.updates


@dataclass(frozen=True, kw_only=True)
class TrialScore:
    """Result of a trial.

    Attributes:
        dice: of the final model on the validation scans; 0 where the training diverged.
        curve: (samples, Dice) of every validation.
        diverged: whether the loss ceased to be finite.
    """

    dice: float
    curve: tuple[tuple[int, float], ...] = ()
    diverged: bool = False


@dataclass(kw_only=True)
class Stop:
    """What the study wishes of its trials, whose threads get no Ctrl-C.

    Attributes:
        asked: to save and stop.
        at_once: not even to save.
    """

    asked: bool = False
    at_once: bool = False


TrainOne = Callable[[Trial, Path, Stop], TrialScore]
"""Trains one trial in the folder it is given and returns its result; it checks for a request to stop."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The trials of one recipe at one number of workers.

    Attributes:
        recipe, workers, global_batch, updates, learning_rate: what they have in common.
        seeds: how many trials.
        dice: their mean; `dice_low`, `dice_high`: 95 % interval by Student's t over seeds.
        relative: mean over seeds of the Dice over that of one worker with the first recipe, same seed,
            where that is above 0; with `relative_low`, `relative_high`, which are None where one of
            several seeds has such a Dice.
        relative_own: the same over one worker with this recipe; None where there is none.
        samples_to_target: mean over seeds of the samples after which the validation Dice first was at
            or above the target; None where a seed never was.
        diverged: how many trials did.
    """

    recipe: str
    workers: int
    global_batch: int
    updates: int
    learning_rate: float
    seeds: int
    dice: float
    dice_low: float
    dice_high: float
    relative: float | None
    relative_low: float | None
    relative_high: float | None
    relative_own: float | None
    samples_to_target: float | None
    diverged: int


def plan(config: Config) -> list[Trial]:
    """The study's trials: recipes x workers x seeds of ``config.scale``, all of a seed before the next.

    Raises:
        VoxelscaleError: a recipe or one of its settings is unknown.
    """
    scale = config.scale
    trials = []
    for seed in scale.seeds:
        for recipe in scale.recipes:
            for workers in scale.workers:
                settled = replace(config, train=replace(config.train, seed=seed))
                settled = apply_recipe(settled, recipe, workers)
                trials.append(Trial(recipe=recipe, workers=workers, seed=seed, config=settled))
    return trials


def apply_recipe(config: Config, recipe: str, workers: int) -> Config:
    """The config with the recipe's settings for that number of workers, and of ``name:key=value;...``."""
    name, _, settings = recipe.partition(":")
    known = "none" if name == UNCHANGED else name
    named = load(None, [f"train.recipe={known}"], config)
    settled, _ = resolve(named, workers)
    pairs = [pair for pair in settings.split(";") if pair]
    return load(None, pairs, settled)


def run_study(config: Config, out: Path, train_one: TrainOne, jobs: int = 1) -> list[Row]:
    """Train every trial of the plan that is not done, `jobs` at a time, and sum them up.

    Each outcome is written to ``<out>/trials/`` when it is there, so that the same call resumes where an
    earlier one stopped.

    Args:
        config: of the study (``config.scale``) and of the trainings.
        out: its folder.
        train_one: of `TrainOne`; called in threads.

    Raises:
        VoxelscaleError: a trial failed, or `out` holds a study of another config.
        KeyboardInterrupt: the trials then have saved and stopped, after a second one without saving.
    """
    trials = plan(config)
    claim(config, out)
    each: dict[str, Trial] = {}
    for trial in trials:
        each.setdefault(trial.name, trial)  # recipes of the same settings share a training
    outcomes = {name: done for name, t in each.items() if (done := read_outcome(out, t)) is not None}
    left = [trial for name, trial in each.items() if name not in outcomes]
    total = sum(trial.config.train.samples for trial in each.values())

    def seen() -> int:
        return total - sum(t.config.train.samples - _seen(out, t) for t in left if t.name not in outcomes)

    with Progress("scale", total, done=seen(), rate=False) as progress:
        note = ""

        def show() -> None:
            done = f"samples; {len(outcomes)} of {count(len(each), 'training')} done"
            progress.update(seen(), "; ".join(filter(None, (done, note))))

        for trial, outcome in _in_parallel(left, out, train_one, jobs, show):
            write_outcome(out, trial, outcome)
            outcomes[trial.name] = outcome
            workers = count(trial.workers, "worker")
            note = f"{trial.recipe}, {workers}, seed {trial.seed}: Dice {outcome.dice:.3f}"
            show()
    return summarise(trials, [outcomes[trial.name] for trial in trials], config.scale.target)


def _seen(out: Path, trial: Trial) -> int:
    """Samples that a trial has been trained on so far."""
    return min(samples_seen(out / "runs" / trial.name), trial.config.train.samples)


def _in_parallel(
    trials: Sequence[Trial],
    out: Path,
    train_one: TrainOne,
    jobs: int,
    show: Callable[[], None],
) -> Iterator[tuple[Trial, TrialScore]]:
    waiting, stop = iter(trials), Stop()
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="trial")
    flying: dict[Future[TrialScore], Trial] = {}
    try:
        while True:
            for trial in waiting if len(flying) < jobs else ():
                flying[pool.submit(train_one, trial, out / "runs" / trial.name, stop)] = trial
                if len(flying) >= jobs:
                    break
            if not flying:
                return
            for future in wait(flying, timeout=LOOK, return_when=FIRST_COMPLETED).done:
                yield flying.pop(future), future.result()
            show()
    except KeyboardInterrupt:
        notice("\nstopping the trainings after this step; once more to stop at once")
        raise
    finally:
        stop.asked = True
        pool.shutdown(wait=False, cancel_futures=True)
        try:
            # Not for the threads: an interrupted join takes a running one for ended (Python 3.11, 3.12).
            wait([future for future in flying if not future.cancelled()])
        except KeyboardInterrupt:
            stop.at_once = True
            raise


def summarise(trials: Sequence[Trial], outcomes: Sequence[TrialScore], target: float) -> list[Row]:
    """A row for each recipe and number of workers, in the order of the plan.

    Args:
        target: share of the first recipe's mean Dice at one worker that "time to a target Dice" means.
    """
    dice = {(t.recipe, t.workers, t.seed): o.dice for t, o in zip(trials, outcomes, strict=True)}
    groups: dict[tuple[str, int], list[tuple[Trial, TrialScore]]] = {}
    for trial, outcome in zip(trials, outcomes, strict=True):
        groups.setdefault((trial.recipe, trial.workers), []).append((trial, outcome))
    first = trials[0].recipe
    alone = [o.dice for t, o in zip(trials, outcomes, strict=True) if (t.recipe, t.workers) == (first, 1)]
    # A Dice of 0 is no target: every training has reached it before its first sample.
    aim = target * statistics.mean(alone) if any(alone) else math.inf
    return [_row(group, dice, first, aim) for group in groups.values()]


def _row(
    group: Sequence[tuple[Trial, TrialScore]],
    dice: dict[tuple[str, int, int], float],
    first: str,
    aim: float,
) -> Row:
    trial, outcomes = group[0][0], [outcome for _, outcome in group]
    scores = [outcome.dice for outcome in outcomes]

    def over(recipe: str) -> list[float]:
        pairs = [(o.dice, dice.get((recipe, 1, t.seed), 0.0)) for t, o in group]
        return [score / one for score, one in pairs if one > 0]

    relative, own = over(first), over(trial.recipe)
    reached = [next((seen for seen, score in o.curve if score >= aim), None) for o in outcomes]
    known = [seen for seen in reached if seen is not None]
    low, high = t_interval(scores)
    # Of several seeds one may be left that has a Dice to compare with: that says nothing of the others.
    certain = len(relative) > 1 or len(relative) == len(group)
    relative_low, relative_high = t_interval(relative) if certain else (None, None)
    return Row(
        recipe=trial.recipe,
        workers=trial.workers,
        global_batch=trial.global_batch,
        updates=trial.updates,
        learning_rate=peak_rate(trial.config.optim, trial.global_batch),
        seeds=len(group),
        dice=statistics.mean(scores),
        dice_low=low,
        dice_high=high,
        relative=statistics.mean(relative) if relative else None,
        relative_low=relative_low,
        relative_high=relative_high,
        relative_own=statistics.mean(own) if own else None,
        samples_to_target=statistics.mean(known) if len(known) == len(reached) else None,
        diverged=sum(outcome.diverged for outcome in outcomes),
    )


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean by Student's t; the mean twice where there is one value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, mean
    from scipy.special import stdtrit

    spread = statistics.stdev(values) / math.sqrt(len(values))
    reach = float(stdtrit(len(values) - 1, 0.975)) * spread
    return mean - reach, mean + reach


def claim(config: Config, out: Path, data: str = "") -> None:
    """Note the study's config and store, or check that they are those that `out` was started with.

    Args:
        data: the store's digest; "": not known.

    Raises:
        VoxelscaleError: they are others.
    """
    path = out / "study.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    now = {"config": _trained(config), **({"store": data} if data else {})}
    for what, fact in now.items():
        if known.get(what, fact) != fact:
            hint = f"choose another folder, or resume with the {what} that it was started with"
            raise VoxelscaleError(f"{out}: holds a study of another {what}", hint)
    if not now.items() <= known.items():
        write_atomic(path, json.dumps({**known, **now}))


def _trained(config: Config) -> str:
    """A digest of what shapes a training; more workers, recipes or seeds may be added to a study."""
    return digest_of(with_first_names({**to_dict(config), "scale": {}, "search": {}}))


def read_outcome(out: Path, trial: Trial) -> TrialScore | None:
    """What an earlier call found, or None."""
    try:
        facts = json.loads(_outcome_path(out, trial).read_text(encoding="utf-8"))
        curve = tuple((int(seen), float(dice)) for seen, dice in facts["curve"])
        return TrialScore(dice=facts["dice"], curve=curve, diverged=facts["diverged"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_outcome(out: Path, trial: Trial, outcome: TrialScore) -> None:
    """Note what a trial found, for `read_outcome`; the study in `out` then does not train it."""
    facts = {"recipe": trial.recipe, "workers": trial.workers, "seed": trial.seed, **asdict(outcome)}
    write_atomic(_outcome_path(out, trial), json.dumps(facts))


def _outcome_path(out: Path, trial: Trial) -> Path:
    return out / "trials" / f"{trial.name}.json"
