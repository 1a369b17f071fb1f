"""False-positive reduction: what it learns from, what it does to findings, and the command."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import Command
from torch import Tensor

from voxelscale.config import Config
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_sealed
from voxelscale.geometry import Scan
from voxelscale.model.build import build_model
from voxelscale.model.bundle import Bundle, Calibration, load_untrusted, read_bundle, write_bundle
from voxelscale.model.false_positives import FalsePositiveNet, crop_shape
from voxelscale.predict.predictor import Predictor
from voxelscale.samples.batch import Normalisation
from voxelscale.store import Store
from voxelscale.tune.refine import find_candidates

CPU = torch.device("cpu")
QUICK = [
    *("--set", "refine.samples=256", "--set", "refine.batch_size=16"),
    *("--set", "refine.candidates=0.008"),
]
CURVE = Calibration(scores=(0.0, 1.0), probabilities=(0.0, 0.5))


@pytest.fixture(scope="module")
def untrained(tiny: Config, store: Store) -> Bundle:
    """A network that takes noise for lesions: its probabilities are about 0.01 everywhere."""
    torch.manual_seed(1)
    network = build_model(tiny.model, tiny.data.patch_size, store.spacing)
    config = replace(tiny, predict=replace(tiny.predict, threshold=0.012, candidates=0.01))
    return Bundle(
        config=config,
        weights=network.state_dict(),
        spacing=store.spacing,
        normalisation=Normalisation.of_fingerprint(store.fingerprint["lesion_hu"]),
        trained={"data": store.fingerprint["digest"]},
        calibration=CURVE,
    )


@pytest.fixture(scope="module")
def refined(untrained: Bundle, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder after the command."""
    from voxelscale.config import load
    from voxelscale.tune.refine import refine

    run = tmp_path_factory.mktemp("run")
    write_bundle(run / "model.vxs", untrained)
    assert refine(run, store.path, load(sets=QUICK[1::2], base=untrained.config)) is not None
    return run


def a_scan(store: Store) -> Scan:
    info = store.split("test")[0]
    return Scan(store.read(info.case)[0], np.asarray(info.affine))


def test_the_command(voxelscale: Command, untrained: Bundle, store: Store, tmp_path: Path) -> None:
    write_bundle(tmp_path / "model.vxs", untrained)
    code, out, err = voxelscale("--quiet", "refine", tmp_path, store.path, *QUICK)
    assert (code, err) == (0, "")
    assert "candidates that are none" in out
    after = read_bundle(tmp_path)
    assert after.false_positives is not None
    assert after.calibration is None, "it was of other scores"
    assert after.identity != untrained.identity
    assert after.config.predict.candidates == 0.008
    assert all(torch.equal(after.weights[name], w) for name, w in untrained.weights.items())
    # Again: nothing is left to do, and a calibration made since stays.
    write_bundle(tmp_path / "model.vxs", replace(after, calibration=CURVE))
    assert voxelscale("--quiet", "refine", tmp_path, store.path, *QUICK)[0] == 0
    assert read_bundle(tmp_path).calibration == CURVE
    assert read_bundle(tmp_path).identity == after.identity


def test_interrupted_it_goes_on(
    voxelscale: Command,
    untrained: Bundle,
    store: Store,
    refined: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A scan that was looked at is not looked at again, one whose line is torn is; the end is the same."""
    (whole,) = (refined / "refine").glob("*.jsonl")
    lines = whole.read_text().splitlines()
    (tmp_path / "refine").mkdir()
    (tmp_path / "refine" / whole.name).write_text("\n".join(lines)[:-20])
    write_bundle(tmp_path / "model.vxs", untrained)
    looked: list[int] = []
    look = Predictor.probability

    def count(self: Predictor, image: Scan) -> object:
        looked.append(1)
        return look(self, image)

    monkeypatch.setattr(Predictor, "probability", count)
    assert voxelscale("--quiet", "refine", tmp_path, store.path, *QUICK)[0] == 0
    assert len(looked) == 1
    assert read_bundle(tmp_path).identity == read_bundle(refined).identity


def test_settings_of_predict_change_the_candidates(
    untrained: Bundle, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float | None] = []

    def probability(self: Predictor, image: Scan) -> object:
        seen.append(self._config.low_threshold)
        found = np.zeros(image.array.shape, np.float32)
        found[2, 2:10, 2:10], found[2, 2, 2] = 0.3, 0.9
        return found

    monkeypatch.setattr(Predictor, "probability", probability)
    few = replace(store, cases=store.split("train")[:1])
    places = []
    for low in (None, 0.2, None):
        predict = replace(untrained.config.predict, threshold=0.5, low_threshold=low)
        config = replace(untrained.config, predict=predict)
        config = replace(config, refine=replace(config.refine, candidates=0.4))
        places.append(find_candidates(untrained, few, config, tmp_path).others[0][1][2])
    assert places[0] == places[2] == 2
    assert places[1] == 5.5, "not those that were looked for by other settings"
    assert seen == [None, 0.2], "the same settings look once"


def test_it_learns_to_tell_lesions_apart(refined: Path, store: Store) -> None:
    bundle = read_bundle(refined)
    network = bundle.false_positive_network(CPU)
    assert network is not None
    (path,) = (refined / "refine").glob("*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines() if line]
    seconds: dict[str, list[float]] = {"lesions": [], "others": []}
    for entry in found:
        image, _ = store.read(entry["case"])
        for kind, values in seconds.items():
            crops = [crop(image, centre, crop_shape(store.spacing)) for centre in entry[kind]]
            with torch.inference_mode():
                values += network(bundle.normalisation(torch.stack(crops))).sigmoid()[:, 0].tolist()
    assert min(map(len, seconds.values())) >= 5
    assert np.median(seconds["lesions"]) > np.quantile(seconds["others"], 0.9)


def crop(image: np.ndarray[tuple[int, ...], np.dtype[np.int16]], centre: object, shape: object) -> Tensor:
    """(1, z, y, x) about a place, by padding the whole scan with air."""
    wide, size = 80, np.asarray(shape)
    padded = np.pad(image, wide, constant_values=-1024)
    first = np.array([round(c) for c in centre]) - size // 2 + wide  # type: ignore[attr-defined]
    z, y, x = (slice(a, a + n) for a, n in zip(first, size, strict=True))
    return torch.from_numpy(padded[z, y, x].copy())[None]


def test_scores_are_the_geometric_mean_of_both(refined: Path, store: Store) -> None:
    bundle, scan = read_bundle(refined), a_scan(store)
    config = bundle.config.predict
    findings, mask = Predictor(bundle, config, CPU, torch.float32).look("a", scan)
    first, same = Predictor(replace(bundle, false_positives=None), config, CPU, torch.float32).look(
        "a", scan
    )
    assert np.array_equal(mask.array, same.array)
    assert len(findings) == len(first) > 5
    assert [f.probability for f in findings] == sorted((f.probability for f in findings), reverse=True)
    network = bundle.false_positive_network(CPU)
    assert network is not None
    by_place = {f.index: f for f in findings}
    for finding in first:
        one = bundle.normalisation(crop(scan.array, finding.index, crop_shape(store.spacing)))[None]
        with torch.inference_mode():
            looks = [network(one.flip(axes)).sigmoid().item() for axes in ((), (2,), (3,), (4,))]
        judged = by_place[finding.index]
        assert judged.score == judged.probability
        assert judged.score == pytest.approx((finding.probability * np.mean(looks)) ** 0.5, rel=1e-4)


def test_in_an_ensemble_each_network_keeps_its_own(
    voxelscale: Command, refined: Path, untrained: Bundle, store: Store, tmp_path: Path
) -> None:
    other = {name: weight * 1.01 for name, weight in untrained.weights.items()}
    write_bundle(tmp_path / "other.vxs", replace(untrained, weights=other))
    assert voxelscale("ensemble", tmp_path / "other.vxs", refined, "--out", tmp_path / "all.vxs")[0] == 0
    both = read_bundle(tmp_path / "all.vxs")
    assert [one.false_positives is not None for one in both.networks] == [False, True]
    config = read_bundle(refined).config.predict
    findings, _ = Predictor(both, config, CPU, torch.float32).look("a", a_scan(store))
    plain = replace(both, others=tuple(replace(one, false_positives=None) for one in both.others))
    first, _ = Predictor(plain, config, CPU, torch.float32).look("a", a_scan(store))
    assert {f.index for f in findings} == {f.index for f in first}
    assert {f.index: f.score for f in findings} != {f.index: f.score for f in first}


def test_mistakes_are_reported(
    voxelscale: Command,
    untrained: Bundle,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, bundle in {
        "elsewhere": replace(untrained, trained={"data": "another"}),
        "several": replace(untrained, others=(untrained,)),
        "plain": untrained,
    }.items():
        write_bundle(tmp_path / f"{name}.vxs", bundle)
    for name, more, words in (
        ("elsewhere", [], "was not trained on"),
        ("several", [], "is an ensemble"),
        ("plain", ["--set", "predict.min_volume_mm3=1e9"], "0 candidates that are none"),
        ("plain", ["--set", "refine.candidates=2"], "refine.candidates is 2"),
        ("none", [], "none.vxs"),
    ):
        code, _, err = voxelscale("--quiet", "refine", tmp_path / f"{name}.vxs", store.path, *QUICK, *more)
        assert (code, len(err.strip().splitlines())) == (2, 2)
        assert words in err
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    code, _, err = voxelscale("--quiet", "refine", tmp_path / "plain.vxs", store.path, *QUICK)
    assert (code, "in one process" in err) == (2, True)


@pytest.mark.parametrize("fault", ["list", "shape", "name", "nan", "number"])
def test_a_judge_that_is_none_is_refused(untrained: Bundle, tmp_path: Path, fault: str) -> None:
    weights: dict[str, object] = dict(FalsePositiveNet().state_dict())
    first = next(iter(weights))
    tensor = weights[first]
    assert isinstance(tensor, Tensor)
    bad: dict[str, object] = {
        "list": [1],
        "shape": {**weights, first: tensor[:1]},
        "name": {**weights, "more": tensor},
        "nan": {**weights, first: tensor * float("nan")},
        "number": {**weights, first: 1.0},
    }
    write_bundle(tmp_path / "model.vxs", untrained)
    content = load_untrusted(tmp_path / "model.vxs") | {"judge": bad[fault]}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_sealed(tmp_path / "model.vxs", buffer.getvalue())
    with pytest.raises(VoxelscaleError, match="not a model bundle"):
        read_bundle(tmp_path / "model.vxs")
