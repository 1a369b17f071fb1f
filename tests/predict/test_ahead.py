"""The next scan is read while a GPU predicts, with the CPU in the GPU's place."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.uploads import META

from voxelscale.config import Config, ReadingConfig
from voxelscale.dataset.listing import Source, list_sources
from voxelscale.dataset.reading import read_image
from voxelscale.geometry import Scan
from voxelscale.model.build import build_model
from voxelscale.model.bundle import Bundle
from voxelscale.predict import work as predict_work
from voxelscale.predict.predictor import Predictor
from voxelscale.predict.work import Work
from voxelscale.samples.batch import Normalisation

CPU = torch.device("cpu")


@pytest.fixture
def bundle(tiny: Config) -> Bundle:
    torch.manual_seed(0)
    weights = build_model(tiny.model, tiny.data.patch_size, (5.0, 4.0, 4.0)).state_dict()
    how = Normalisation(low=-1000, high=400, mean=-300, std=350)
    return Bundle(config=tiny, weights=weights, spacing=(5.0, 4.0, 4.0), normalisation=how, trained={})


def test_the_next_scan_is_read_meanwhile(
    bundle: Bundle, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = list_sources(scans)[:4]
    sources[2] = replace(sources[2], image=tmp_path / "none.mhd")
    config = replace(bundle.config.predict, refuse_unusable=False)
    read: dict[str, threading.Thread] = {}

    def spy(source: Source, reading: ReadingConfig) -> Scan:
        assert source.case not in read, "read twice"
        read[source.case] = threading.current_thread()
        return read_image(source, reading)

    def work(name: str, device: torch.device) -> Work:
        found = Work(bundle, config, tmp_path / name, device, ReadingConfig())
        found.__dict__["predictor"] = Predictor(bundle, config, CPU, torch.float32)
        return found

    monkeypatch.setattr(predict_work, "read_image", spy)
    here = threading.current_thread()
    wanted = work("cpu", CPU).each(sources)
    assert set(read.values()) == {here}
    read.clear()
    work("gpu", META).each(sources[1:2])
    read.clear()
    found = work("gpu", META).each(sources)
    # The second is there already, so nobody begins to read it; the third follows it.
    assert [source.case for source in sources if source.case not in read] == [sources[1].case]
    assert read[sources[0].case] is here
    assert here not in (read[sources[2].case], read[sources[3].case])
    assert found.findings == wanted.findings
    assert found.kept == 1
    assert [case for case, *_ in found.failed] == [case for case, *_ in wanted.failed] == [sources[2].case]
