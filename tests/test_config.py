from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Command
from voxelscale.config import Config, dump, from_dict, from_stored, keys, load, load_stored, to_dict
from voxelscale.config.docs import docstrings, markdown, undocumented
from voxelscale.config.renamed import RENAMED, with_first_names
from voxelscale.errors import VoxelscaleError
from voxelscale.files import digest_of


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    config = load(sets=["train.samples=77", "prepare.spacing=[2.5,1,1]", "model.norm=batch"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config
    assert from_dict(to_dict(config)) == config


def test_a_file_lies_over_the_defaults_and_settings_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: {samples: 5, batch_size: 3}\noptim: {lr: 1e-4}\n")
    config = load(tmp_path / "mine.yaml", ["train.samples=9"])
    assert (config.train.samples, config.train.batch_size, config.optim.lr) == (9, 3, 1e-4)
    assert config.model == Config().model


@pytest.mark.parametrize(
    ("setting", "message", "hint"),
    [
        ("train.sampels=3", "unknown key train.sampels", "train.samples"),
        ("trian.samples=3", "unknown key trian", "train"),
        ("train.samples", "no '='", "train.samples=4000"),
        ("train.samples=many", "train.samples is 'many'", "whole number"),
        ("train.samples=1.5", "train.samples is 1.5", "whole number"),
        ("train.samples=0", "train.samples is 0", "at least 1"),
        ("train=3", "is a section", "KEY"),
        ("model.norm=layer", "model.norm is 'layer'", "instance"),
        ("model.dims=4", "model.dims is 4", "one of 2, 3"),
        ("model.kernel_size=4", "model.kernel_size is 4", "odd"),
        ("augment.flip=1", "augment.flip is 1", "true or false"),
        ("data.patch_size=[32,32]", "data.patch_size is [32, 32]", "a list of 3"),
        ("data.patch_size=[32,32,0]", "data.patch_size", "at least 1"),
        ("predict.patch_size=[0,32,32]", "predict.patch_size", "at least 1"),
        ("prepare.spacing=[1,1,-1]", "prepare.spacing", "above 0"),
        ("predict.threshold=1.0", "predict.threshold is 1.0", "between 0 and 1"),
        ("train.samples=[", "not YAML", "quote"),
    ],
)
def test_mistakes_are_reported_with_their_fix(setting: str, message: str, hint: str) -> None:
    with pytest.raises(VoxelscaleError) as caught:
        load(sets=[setting])
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("content", ["train: [", "- 1\n- 2\n", "!!python/object/apply:os.abort []\n"])
def test_a_bad_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(VoxelscaleError, match=r"bad\.yaml"):
        load(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "train: {samples: 9}\nmodel: {depth: 3}\ntrain: {batch_size: 4}\n",
            "the key train is there twice",
        ),
        ("train:\n  samples: 9\n  samples: 5\n", "the key samples is there twice"),
        ("train: {samples: 010}\n", "train.samples is '010'"),  # 8 in YAML 1.1
        ("train: {samples: 1:30}\n", "train.samples is '1:30'"),  # 90
        ("export: {codes: {a: [I9C, 162.30, b]}}\n", "export.codes"),  # the code 162.3
        ("export: {codes: {a: [X, no, b]}}\n", "export.codes"),  # the code False
    ],
)
def test_nothing_is_read_as_something_else(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(VoxelscaleError) as caught:
        load(path)
    assert said in caught.value.message


def test_numbers_of_yaml() -> None:
    sets = (
        "train.samples=20_000",
        "optim.lr=.5",
        "augment.noise_std=1e-3",
        "prepare.spacing=[1., 2, 1.5e+0]",
    )
    config = load(None, [*sets, "export.codes={a: [X, '0123', b], c: [SCT, 59820001, d], e: [X, 0123, f]}"])
    assert (config.train.samples, config.optim.lr, config.augment.noise_std) == (20_000, 0.5, 1e-3)
    assert config.prepare.spacing == (1.0, 2.0, 1.5)
    assert [code[1] for code in config.export.codes.values()] == ["0123", 59820001, "0123"]


@given(st.integers(1, 10**9), st.floats(1e-8, 10), st.sampled_from(["instance", "group", "none"]))
def test_values_survive_yaml(samples: int, rate: float, norm: str) -> None:
    config = load(sets=[f"train.samples={samples}", f"optim.lr={rate}", f"model.norm={norm}"])
    assert (config.train.samples, config.optim.lr, config.model.norm) == (samples, rate, norm)


def test_every_key_has_a_docstring() -> None:
    assert undocumented() == []
    assert set(keys()) <= set(docstrings())


def test_no_number_may_be_negative() -> None:
    """-1 for "off" or "all" would train by gradient ascent, or leave one scan out."""
    taken = []
    for section, tree in to_dict(Config()).items():
        for key, value in tree.items():
            numbers = value if isinstance(value, list) else [value]
            if not numbers or not all(type(n) in (int, float) for n in numbers):
                continue
            with suppress(VoxelscaleError):
                from_dict({section: {key: [-1] * len(value) if isinstance(value, list) else -1}})
                taken.append(f"{section}.{key}")
    assert taken == []


def test_the_printed_config_explains_every_key_and_is_read_back(
    voxelscale: Command, tmp_path: Path
) -> None:
    space = "{optim.lr: {float: [1e-4, 1e-2], log: true}, model.norm: {categorical: [a, 'no']}}"
    sets = ["train.samples=77", "prepare.spacing=[2.5,1,1]", "phantom.shapes='a: #b.sqlite'"]
    sets += ["search.first=[x]", f"search.space={space}"]
    code, out, _ = voxelscale("config", *[word for text in sets for word in ("--set", text)])
    assert code == 0
    (tmp_path / "mine.yaml").write_text(out)
    assert load(tmp_path / "mine.yaml") == load(sets=sets)
    section, before, explained = "", "", []
    for line in out.splitlines():
        if line and line[0] not in " #":
            section = line.rstrip(":")
            assert before.startswith("# "), section
        elif line.startswith("  ") and not line.startswith("  #"):
            explained += [f"{section}.{line.split(':')[0].strip()}"] if before.startswith("  # ") else []
        before = line
    assert explained == keys()
    assert (
        "  # Update rule; sources in `voxelscale.train.optim`. One of adamw, sgd, lars, lamb, muon." in out
    )


def test_the_page_of_keys_is_what_the_command_prints(voxelscale: Command) -> None:
    page = Path(__file__).parents[1] / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == markdown() == voxelscale("config", "--markdown")[1]


OLD = {
    "prepare.labels": "[2]",
    "prepare.fill_gaps": "1",
    "loss.hardest": "0.5",
    "optim.average": "0.2",
    "optim.clip": "3",
    "predict.flips": "true",
    "predict.low": "0.3",
}


def test_old_names_of_keys_are_read_with_a_notice(tmp_path: Path, voxelscale: Command) -> None:
    sets = [f"{key}={value}" for key, value in OLD.items()]
    renewed = load(sets=[f"{RENAMED[key]}={value}" for key, value in OLD.items()])
    assert load(sets=sets) == renewed
    (tmp_path / "old.yaml").write_text("prepare: {labels: [2], fill_gaps: 1}\nloss: {hardest: 0.5}\n")
    code, out, err = voxelscale("config", "--config", str(tmp_path / "old.yaml"))
    assert code == 0
    assert "hardest" not in out
    assert err.count("loss.hardest (now loss.top_k)") == 1
    (tmp_path / "new.yaml").write_text(out)
    assert load(tmp_path / "new.yaml") == load(tmp_path / "old.yaml") == load_stored(tmp_path / "old.yaml")
    # By which a run, a study or a prediction of before knows its config; none is made of the section scale.
    first = "b52972af4b3182307f3cd1701f1badc65426441914ee81b84401e4c6e37c29e6"
    before = replace(renewed, optim=replace(renewed.optim, name="adamw"))  # the default of then
    named = with_first_names({**to_dict(before), "scale": {}})
    assert digest_of(named) == first
    assert from_dict(named) == replace(before, optim=before.optim.settled())


def test_a_key_under_both_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "both.yaml").write_text("optim: {clip: 3, gradient_clipping: 4}\n")
    with pytest.raises(VoxelscaleError, match=r"both optim\.clip and optim\.gradient_clipping") as error:
        load(tmp_path / "both.yaml")
    assert "leave out optim.clip" in error.value.hint


def test_what_an_earlier_version_let_pass_is_still_read(tmp_path: Path) -> None:
    """In files that it wrote: models and runs; they hold all sections, whatever they are used for."""
    tree = to_dict(Config())
    tree["export"]["codes"] = {"a": ["I9C", 162.3, "b"], "c": ["SCT", 59820001, "d"]}
    tree["scale"] |= {"workers": [1, 4, 1], "seeds": [3, 3], "recipes": ["linear", "linear"]}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    for config in (load_stored(path), from_stored(tree)):
        assert config.export.codes == {"a": ["I9C", "162.3", "b"], "c": ["SCT", 59820001, "d"]}
        assert (config.scale.workers, config.scale.seeds) == ((1, 4), (3,))
    with pytest.raises(VoxelscaleError, match="config: "):
        load(path)


def test_every_renamed_key_has_a_name_of_today() -> None:
    assert set(RENAMED.values()) <= set(keys())
    assert not set(RENAMED) & set(keys())


def test_every_config_can_be_a_key_of_a_table() -> None:
    """As results are kept by config; the keys that are tables themselves do not count."""
    sets = ("export.codes={a: [SCT, 1, b]}", "search.space={model.depth: {int: [2, 5]}}")
    assert hash(load(None, sets)) == hash(Config())
    assert hash(load(None, ("train.seed=1",))) != hash(Config())
