"""MLflow and Weights & Biases: a run's settings, metrics and files are logged there, nothing of its scans.

Each has a thread of its own, so that no training waits for a server. One that fails gives one warning and
gets nothing more. Nothing here is imported before `train.track` asks for it. `docs/guide.md`,
"Tracking", says what is sent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from voxelscale import __version__
from voxelscale.config import Config, to_dict
from voxelscale.console import warn
from voxelscale.files import write_atomic

FILE = "track.json"
"""In a run's folder: its names in the trackers, so that a resumed run continues in the same one."""

PROJECT = "voxelscale"
"""MLflow's experiment and Weights & Biases' project, where MLFLOW_EXPERIMENT_NAME or WANDB_PROJECT is not
set."""

SECTIONS = ("data", "augment", "model", "loss", "optim", "train", "predict")
"""Of the config, what a run is made by, and what is sent. Others have paths and the names of scans."""

NOT_SENT = {"train.start_from", "train.track", "train.track_to"}
"""Keys of these sections that may hold a path or a server."""

PATIENCE = 60.0
"""Seconds that the end of a run waits for what has not been sent."""

MOST_AT_ONCE = 100
"""Parameters of a request; MLflow takes no more."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A run that is to be tracked.

    Attributes:
        folder: of the run; nothing of it is sent but its name.
        name: what it is called.
        known: by what the tracker knows it already; "": it is new.
        parent: by what it knows the search or cross-validation that this one is a part of; "": of none.
        group: that one's name.
        where: MLflow's server or folder; "": as the environment says.
        settings: to be sent, by key.
    """

    folder: Path
    name: str
    known: str = ""
    parent: str = ""
    group: str = ""
    where: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


class Tracker(Protocol):
    """What MLflow and Weights & Biases have in common; every method may take long or raise anything."""

    def begin(self, run: Begun) -> str:
        """Begin the run or go on with it; by what it is known from now on."""

    def log(self, numbers: Mapping[str, float], samples: int) -> None:
        """Log metrics; `samples`: how many were trained on."""

    def note(self, facts: Mapping[str, str]) -> None:
        """Words about the run."""

    def keep(self, path: Path) -> None:
        """A file of the run."""

    def end(self, how: str) -> None:
        """Say that it has ended: FINISHED, KILLED (it may go on) or FAILED."""


class _Mlflow:
    def begin(self, run: Begun) -> str:
        # Its own telemetry; and a server that is away is not waited for as long as MLflow would.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each retry would be a warning
        where, artefacts = _place(run.where)
        self._client = MlflowClient(tracking_uri=where)
        if run.known and self._resumed(run.known):
            self._id = run.known
            return self._id
        tags = {"voxelscale": __version__} | ({"mlflow.parentRunId": run.parent} if run.parent else {})
        made = self._client.create_run(self._experiment(artefacts), run_name=run.name, tags=tags)
        self._id = str(made.info.run_id)
        settings = [Param(key, str(value)) for key, value in run.settings.items()]
        for first in range(0, len(settings), MOST_AT_ONCE):
            self._client.log_batch(self._id, params=settings[first : first + MOST_AT_ONCE])
        return self._id

    def _resumed(self, known: str) -> bool:
        """Whether the run is there; it then goes on."""
        from mlflow.exceptions import MlflowException

        try:
            there = bool(self._client.get_run(known).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # another server
                return False
            raise
        if there:  # it was not deleted
            self._client.update_run(known, status="RUNNING")
        return there

    def _experiment(self, artefacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artefacts))
            except MlflowException:  # of several runs that begin together one makes it
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def log(self, numbers: Mapping[str, float], samples: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_plain(name), value, now, samples) for name, value in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def note(self, facts: Mapping[str, str]) -> None:
        for name, value in facts.items():
            self._client.set_tag(self._id, _plain(name), value)

    def keep(self, path: Path) -> None:
        self._client.log_artifact(self._id, str(path))

    def end(self, how: str) -> None:
        self._client.set_terminated(self._id, how)


def _place(where: str) -> tuple[str | None, str | None]:
    """MLflow's tracking URI, and where its files go: a folder keeps both, a server sees to its own."""
    if not where or "://" in where:
        return where or None, None
    folder = Path(where).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()


def _plain(name: str) -> str:
    """A name with only what MLflow allows in it."""
    return re.sub(r"[^\w\-./ ]", "_", name)


class _Wandb:
    def begin(self, run: Begun) -> str:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        known = run.known or secrets.token_hex(4)
        # Without the command line, the folder, the machine's name, the packages, the code.
        quiet = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=known,
            resume="allow",
            name=run.name,
            group=run.group or None,
            dir=str(run.folder),
            config=dict(run.settings),
            settings=quiet,
            reinit="create_new",
        )
        self._run.define_metric("*", step_metric="samples")
        return known

    def log(self, numbers: Mapping[str, float], samples: int) -> None:
        self._run.log({**numbers, "samples": samples})

    def note(self, facts: Mapping[str, str]) -> None:
        self._run.config.update(dict(facts), allow_val_change=True)

    def keep(self, path: Path) -> None:
        # A copy: a link would show where the run lies, and change with it.
        copied = shutil.copy2(path, self._run.dir)
        self._run.save(copied, base_path=self._run.dir, policy="now")

    def end(self, how: str) -> None:
        self._run.finish(exit_code=int(how == "FAILED"))


TRACKERS: dict[str, Callable[[], Tracker]] = {"mlflow": _Mlflow, "wandb": _Wandb}
CALLED = {"mlflow": "MLflow", "wandb": "Weights & Biases"}
TO_INSTALL = "pip install voxelscale[track]"


class Tracking:
    """All trackers of a run; no method waits or raises.

    Args:
        config: of the run; ``train.track`` says which trackers.
        folder: the run's.

    Attributes:
        done: of `tracked_study`, set by its user: whether all was done.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.done = False
        known, above = _known(folder), folder.parent.parent
        parents = _known(above)
        self._threads = []
        for kind in config.train.track:
            begun = Begun(
                folder=folder,
                name=str(folder.resolve().relative_to(above.resolve()))
                if parents
                else folder.resolve().name,
                known=known.get(kind, ""),
                parent=parents.get(kind, ""),
                group=above.resolve().name if parents else "",
                where=config.train.track_to,
                settings=settings_of(config),
            )
            self._threads.append(_Sender(kind, begun))

    def ready(self, seconds: float = PATIENCE) -> None:
        """Wait until all know the run, so that parts of it can name it; at most so long."""
        deadline = time.monotonic() + seconds
        for one in self._threads:
            one.begun.wait(max(0.0, deadline - time.monotonic()))

    def log(self, numbers: Mapping[str, float], samples: int) -> None:
        """Log metrics, without those that are not finite; `samples`: how many were trained on."""
        finite = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
        self._send(lambda tracker: tracker.log(finite, samples))

    def note(self, facts: Mapping[str, object]) -> None:
        """Words about the run."""
        words = {name: str(value) for name, value in facts.items()}
        self._send(lambda tracker: tracker.note(words))

    def end(self, how: str, files: Sequence[Path] = ()) -> None:
        """Send the files that are there, and how it ended: FINISHED, KILLED or FAILED.

        What is not sent in `PATIENCE` seconds is given up.
        """
        for path in files:
            if path.is_file():
                self._send(lambda tracker, path=path: tracker.keep(path))  # type: ignore[misc]
        self._send(lambda tracker: tracker.end(how))
        deadline = time.monotonic() + PATIENCE
        for one in self._threads:
            one.finish(max(0.0, deadline - time.monotonic()))

    def _send(self, what: Callable[[Tracker], None]) -> None:
        for one in self._threads:
            one.queue.put(what)


@contextlib.contextmanager
def tracked_study(config: Config, folder: Path, files: Sequence[str] = ()) -> Iterator[Tracking | None]:
    """Within it a search or cross-validation is tracked, as the run that its trainings belong to.

    Args:
        config: of its trainings; None is given where it asks for no tracker.
        folder: of the search or cross-validation.
        files: names in the folder that are sent at the end.
    """
    if not config.train.track:
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    tracking = Tracking(config, folder)
    tracking.ready()
    try:
        yield tracking
    finally:
        tracking.end("FINISHED" if tracking.done else "KILLED", [folder / name for name in files])


class _Sender:
    """A thread that calls one tracker with what is in its queue; None ends it."""

    def __init__(self, kind: str, run: Begun) -> None:
        self.queue: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self.begun = threading.Event()
        self._kind, self._run = kind, run
        self._thread = threading.Thread(target=self._all, daemon=True, name=f"track-{kind}")
        self._thread.start()

    def _all(self) -> None:
        try:
            tracker = TRACKERS[self._kind]()
            _remember(self._run.folder, self._kind, tracker.begin(self._run))
            self.begun.set()
            while (what := self.queue.get()) is not None:
                what(tracker)
        except Exception as error:  # whatever it is, the training goes on
            self._give_up(error)
        finally:
            self.begun.set()

    def _give_up(self, error: Exception) -> None:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if isinstance(error, ModuleNotFoundError):
            reason = f"{error.name} is not installed: {TO_INSTALL}"
        warn(f"{CALLED[self._kind]}: logging stopped ({reason}); the training continues")

    def finish(self, seconds: float) -> None:
        """Wait for the end, at most so long."""
        self.queue.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            warn(f"{CALLED[self._kind]}: does not answer; the end of the run was not sent")


def settings_of(config: Config) -> dict[str, Any]:
    """What is sent of a config, by ``section.key``."""
    tree = to_dict(config)
    flat = {f"{section}.{key}": value for section in SECTIONS for key, value in tree[section].items()}
    return {key: value for key, value in flat.items() if key not in NOT_SENT}


def _known(folder: Path) -> dict[str, str]:
    """By what each tracker knows the run in a folder."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return {str(kind): str(known) for kind, known in content.items()}
    except (OSError, ValueError, AttributeError):
        return {}


_REMEMBERING = threading.Lock()


def _remember(folder: Path, kind: str, known: str) -> None:
    with _REMEMBERING:
        write_atomic(folder / FILE, json.dumps({**_known(folder), kind: known}))
