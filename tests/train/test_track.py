"""What MLflow and Weights & Biases are told of trainings, searches and folds, and what they are not."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Command
from voxelscale.config import Config, dump, load
from voxelscale.errors import VoxelscaleError
from voxelscale.experiments.folds import log_figures
from voxelscale.model.bundle import read_bundle
from voxelscale.store import Store
from voxelscale.train import track
from voxelscale.train.engine import Engine
from voxelscale.train.launch import start
from voxelscale.train.log import read_events
from voxelscale.train.track import FILE, Begun, Tracking, settings_of, tracked_study

mlflow = pytest.importorskip("mlflow.tracking")


@pytest.fixture
def settings(tiny: Config, tmp_path: Path) -> Path:
    config = replace(tiny, train=replace(tiny.train, samples=24, validate_at=(8,)))
    path = tmp_path / "settings.yaml"
    path.write_text(dump(config))
    return path


def runs_in(where: str) -> list[Any]:
    client = mlflow.MlflowClient(tracking_uri=where)
    found = client.get_experiment_by_name("voxelscale")
    return list(client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"]))


def history(where: str, run: str, name: str) -> list[Any]:
    points = mlflow.MlflowClient(tracking_uri=where).get_metric_history(run, name)
    return [(point.step, point.value) for point in points]


def check_training(where: str, run: Path, settings: Path, *, whole: bool = True) -> str:
    """Whether MLflow knows of the only run what the run's own log has; its id."""
    (told,) = runs_in(where)
    events = read_events(run)
    for event in ("train", "validation"):
        mine = [(e["samples"], e) for e in events if e["event"] == event]
        name = "loss" if event == "train" else "dice"
        points = [(samples, pytest.approx(e[name])) for samples, e in mine]
        assert history(where, told.info.run_id, f"{event}/{name}") == points
    assert told.info.status == ("FINISHED" if whole else "KILLED")
    assert told.info.run_name == run.name
    assert told.data.params["train.samples"] == str(load(settings).train.samples)
    assert told.data.params["model.filters"] == "4"
    assert told.data.tags["torch"] == torch.__version__
    return str(told.info.run_id)


def test_a_training_is_logged_to_mlflow_in_a_folder_and_resumed_in_the_same_run(
    settings: Path, store: Store, tmp_path: Path, voxelscale: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, where = tmp_path / "run", tmp_path / "mlflow"
    words = ["--config", settings, "--set", "train.track=[mlflow]", "--set", f"train.track_to={where}"]
    with monkeypatch.context() as stopping:
        seen = Engine._stop_file
        stopping.setattr(Engine, "_stop_file", lambda engine: engine.state.seen >= 10 or seen(engine))
        assert voxelscale("train", store.path, run, *words)[0] == 130
    uri = f"sqlite:///{where}/mlflow.db"
    known = check_training(uri, run, settings, whole=False)
    code, _, errors = voxelscale("--quiet", "train", store.path, run, *words)
    assert (code, errors) == (0, "")
    assert check_training(uri, run, settings) == known
    assert json.loads((run / FILE).read_text()) == {"mlflow": known}
    (model,) = where.glob("artifacts/**/model.vxs")
    assert model.read_bytes() == (run / "model.vxs").read_bytes()
    assert list(where.glob("artifacts/**/environment.json"))
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    told = b"".join(path.read_bytes() for path in where.rglob("*") if path.is_file())
    told = told.replace(str(where).encode(), b"")  # where the artefacts are
    for secret in (tmp_path, store.path, *(info.case for info in store.cases)):
        assert str(secret).encode() not in told
    kept = read_bundle(run).config.train
    assert (kept.track, kept.track_to) == ((), "")
    mlflow.MlflowClient(tracking_uri=uri).delete_run(known)
    for gone in (known, "0" * 32):
        (run / FILE).write_text(json.dumps({"mlflow": gone}))
        Tracking(load(settings, ["train.track=[mlflow]", f"train.track_to={where}"]), run).end("FINISHED")
    assert len(runs_in(uri)) == 2, "one that was deleted, or that the server does not know, begins anew"


class Recorded:
    """A tracker that remembers, or fails, or hangs."""

    told: list[tuple[str, Any]]
    fails: str = ""
    hangs: float = 0.0

    def begin(self, run: Begun) -> str:
        self._do("begin", run)
        return f"id-{run.name}"

    def log(self, numbers: Mapping[str, float], samples: int) -> None:
        self._do("log", (dict(numbers), samples))

    def note(self, facts: Mapping[str, str]) -> None:
        self._do("note", dict(facts))

    def keep(self, path: Path) -> None:
        self._do("keep", path.name)

    def end(self, how: str) -> None:
        self._do("end", how)

    def _do(self, what: str, value: Any) -> None:
        if what == self.fails:
            raise ConnectionError("the server is away\nand more of it")
        if what == "log":
            time.sleep(self.hangs)
        self.told.append((what, value))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    made = type("Made", (Recorded,), {"told": []})
    monkeypatch.setitem(track.TRACKERS, "mlflow", made)
    return made


def tracked(config: Config) -> Config:
    return replace(config, train=replace(config.train, track=("mlflow",)))


@pytest.mark.parametrize("fails", ["begin", "log", "keep", "end"])
def test_one_that_fails_warns_once_and_nothing_waits(
    fails: str, tiny: Config, tmp_path: Path, recorded: type[Recorded], capsys: pytest.CaptureFixture[str]
) -> None:
    recorded.fails = fails
    (tmp_path / "model.vxs").write_text("")
    tracking = Tracking(tracked(tiny), tmp_path)
    tracking.ready()
    for samples in range(5):
        tracking.log({"train/loss": 1.0}, samples)
    tracking.end("FINISHED", [tmp_path / "model.vxs"])
    errors = capsys.readouterr().err
    assert errors == "warning: MLflow: logging stopped (the server is away); the training continues\n"


def test_one_that_hangs_is_given_up_at_the_end(
    tiny: Config,
    tmp_path: Path,
    recorded: type[Recorded],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorded.hangs = 30.0
    monkeypatch.setattr(track, "PATIENCE", 0.2)
    tracking = Tracking(tracked(tiny), tmp_path)
    tracking.log({"train/loss": 1.0}, 1)
    tracking.end("FINISHED")
    assert capsys.readouterr().err.count("MLflow: does not answer; the end of the run was not sent") == 1


def test_a_run_that_is_corrected_before_its_first_step_is_a_new_one(
    tiny: Config,
    store: Store,
    tmp_path: Path,
    recorded: type[Recorded],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its settings are others, and what is sent of a run does not change."""

    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_step", too_large)
        with pytest.raises(VoxelscaleError, match="does not fit"):
            start(tracked(tiny), store.path, tmp_path / "run")
    smaller = replace(tiny, train=replace(tiny.train, samples=4), model=replace(tiny.model, filters=2))
    (tmp_path / "run" / "wandb").mkdir()
    assert start(tracked(smaller), store.path, tmp_path / "run")
    begun = [value for what, value in recorded.told if what == "begin"]
    assert [(one.known, one.settings["model.filters"]) for one in begun] == [("", 4), ("", 2)]


def test_one_that_is_not_installed_is_named(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.entities", None)
    Tracking(tracked(tiny), tmp_path).end("FINISHED")
    assert "mlflow.entities is not installed: pip install voxelscale[track]" in capsys.readouterr().err


def test_parts_of_a_study_name_it(tiny: Config, tmp_path: Path, recorded: type[Recorded]) -> None:
    study = tmp_path / "cv"
    with tracked_study(tracked(tiny), study) as tracking:
        assert tracking is not None
        Tracking(tracked(tiny), study / "fold_0" / "run").end("FINISHED")
        tracking.log({"cv/dice": float("nan"), "cv/cpm": 0.5}, 2)
        tracking.done = True
    begun = [value for what, value in recorded.told if what == "begin"]
    assert [(one.name, one.parent, one.group) for one in begun] == [
        ("cv", "", ""),
        ("fold_0/run", "id-cv", "cv"),
    ]
    assert ("log", ({"cv/cpm": 0.5}, 2)) in recorded.told, "what is no number is left out"
    assert recorded.told[-1] == ("end", "FINISHED")
    with tracked_study(tiny, tmp_path / "other") as none:
        assert none is None
    assert not (tmp_path / "other").exists()


def test_folds_tell_figures_and_no_case(tiny: Config, tmp_path: Path, recorded: type[Recorded]) -> None:
    own = {"dice": {"mean": 0.7, "interval": [0.6, 0.8]}, "sensitivity_at_1_fp": 0.5}
    own |= {"froc": {"cpm": 0.4, "cpm_interval": None}}
    summary = {"classes": {"a": own, "b": own}, "mean_dice": {"mean": 0.7}, "cases": [{"case": "Smith"}]}
    rows: list[dict[str, Any]] = [
        {"fold": 0, "dice": 0.6, "cases": 2},
        {"fold": 1, "dice": None, "cases": 2},
    ]
    with tracked_study(tracked(tiny), tmp_path / "cv") as tracking:
        assert tracking is not None
        log_figures(tracking, rows, summary)
    told = [value for what, value in recorded.told if what == "log"]
    assert told[0] == ({"fold/dice": 0.6}, 0)
    for name in "ab":
        numbers = {"dice": 0.7, "cpm": 0.4, "dice_low": 0.6, "dice_high": 0.8}
        assert ({f"cv/{name}/{key}": value for key, value in numbers.items()}, 2) in told
    assert told[-1] == ({"cv/mean_dice": 0.7}, 2)
    assert len(told) == 4
    assert recorded.told[-1] == ("end", "FINISHED")
    assert "Smith" not in repr(recorded.told)


def test_what_is_sent_has_no_path_and_no_server(tiny: Config) -> None:
    config = load(
        sets=[
            "train.start_from=/data/patient_17/model.vxs",
            "reading.name_key=/secret/key",
            "prepare.splits=/data/splits.json",
            "train.track_to=http://host:5000",
            "search.storage=postgresql://user:word@host/db",
        ],
        base=tiny,
    )
    told = repr(settings_of(config))
    assert "train.samples" in told
    for secret in ("patient_17", "secret", "splits", "host", "word"):
        assert secret not in told
    with pytest.raises(VoxelscaleError) as caught:
        load(sets=["train.track_to=https://user:word@host"])
    assert "MLFLOW_TRACKING_PASSWORD" in caught.value.hint


@pytest.mark.slow
def test_a_search_and_its_trials(tiny: Config, store: Store, tmp_path: Path, voxelscale: Command) -> None:
    path, where = tmp_path / "search.yaml", tmp_path / "mlflow"
    path.write_text(dump(tracked(tiny)))
    words = ["--config", path, "--trials", "2", "--set", f"train.track_to={where}"]
    words += ["--set", "search.samples=16", "--set", "search.space={optim.lr: {float: [0.001, 0.01]}}"]
    code, _, errors = voxelscale("search", store.path, tmp_path / "search", *words)
    assert code == 0, errors
    told = {run.info.run_name: run for run in runs_in(f"sqlite:///{where}/mlflow.db")}
    study = told.pop("search")
    assert sorted(told) == ["trials/0000", "trials/0001"]
    assert {run.data.tags["mlflow.parentRunId"] for run in told.values()} == {study.info.run_id}
    assert study.data.metrics["best/dice"] == max(
        history(f"sqlite:///{where}/mlflow.db", run.info.run_id, "validation/dice")[-1][1]
        for run in told.values()
    )
    assert "best/optim.lr" in study.data.tags
    assert study.info.status == "FINISHED"


def test_wandb_offline(
    settings: Path, store: Store, tmp_path: Path, voxelscale: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    words = ["--config", settings, "--set", "train.track=[wandb]"]
    code, _, errors = voxelscale("--quiet", "train", store.path, run, *words)
    assert (code, errors) == (0, "")
    known = json.loads((run / FILE).read_text())["wandb"]
    (folder,) = (run / "wandb").glob(f"offline-run-*-{known}")
    told = read_wandb(folder / f"run-{known}.wandb")
    while not told["ended"]:  # its own process writes it, and a command's end would wait for that
        time.sleep(0.1)
        told = read_wandb(folder / f"run-{known}.wandb")
    events = read_events(run)
    for event, name in (("train", "loss"), ("validation", "dice")):
        wanted = [(e["samples"], pytest.approx(e[name])) for e in events if e["event"] == event]
        rows = [row for row in told["history"] if f"{event}/{name}" in row]
        assert [(row["samples"], row[f"{event}/{name}"]) for row in rows] == wanted
    assert told["config"]["train.samples"] == 24
    assert (folder / "files" / "model.vxs").exists()
    whole = (folder / f"run-{known}.wandb").read_bytes()
    assert str(store.path).encode() not in whole
    assert not any(info.case.encode() in whole for info in store.cases)


BLOCK, HEAD = 32768, 7


def records(data: bytes) -> Iterator[bytes]:
    """What LevelDB's log format holds: W&B's file after its head of 7 bytes, in blocks of 32 KiB."""
    at, whole = 7, b""
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:
            return
        whole += data[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4):  # all of it, or its last part
            yield whole
            whole = b""


def read_wandb(path: Path) -> dict[str, Any]:
    """Config and history of an offline run, and whether it has ended."""
    from wandb.proto import wandb_internal_pb2

    told = dict[str, Any](config={}, history=[], ended=False)
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        told["ended"] |= record.HasField("exit")
        if record.HasField("run"):
            told["config"] |= {one.key: json.loads(one.value_json) for one in record.run.config.update}
        if record.HasField("history"):
            items = record.history.item
            told["history"].append(
                {one.key or one.nested_key[0]: json.loads(one.value_json) for one in items}
            )
    return told


REQUIRED = "VOXELSCALE_REQUIRE_MLFLOW"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server, which needs the whole package."""
    if importlib.util.find_spec("flask") is None or importlib.util.find_spec("huey") is None:
        assert not os.environ.get(REQUIRED), "the whole of MLflow is to be installed"
        pytest.skip("the whole of MLflow is not installed")
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", 1]
    words += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", folder]
    off = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            stdout=log,
            stderr=log,
            env={**os.environ, **off},
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(url), process, folder / "log.txt")
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_until(there: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while not there():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


@pytest.mark.slow
def test_a_training_is_logged_to_a_real_server(
    server: str, settings: Path, store: Store, tmp_path: Path, voxelscale: Command
) -> None:
    run = tmp_path / "run"
    words = ["--config", settings, "--set", "train.track=[mlflow]", "--set", f"train.track_to={server}"]
    code, _, errors = voxelscale("--quiet", "train", store.path, run, *words)
    assert (code, errors) == (0, "")
    known = check_training(server, run, settings)
    files = mlflow.MlflowClient(tracking_uri=server).list_artifacts(known)
    assert {file.path: file.file_size for file in files}["model.vxs"] == (run / "model.vxs").stat().st_size


def test_a_server_that_is_away_does_not_stop_a_training(
    settings: Path, store: Store, tmp_path: Path, voxelscale: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    words = ["--config", settings, "--set", "train.track=[mlflow]", "--set", f"train.track_to={address}"]
    code, _, errors = voxelscale("--quiet", "train", store.path, tmp_path / "run", *words)
    assert code == 0
    assert errors.count("\n") == 1, errors
    assert errors.startswith("warning: MLflow: logging stopped (")
    assert (tmp_path / "run" / "model.vxs").is_file()
