"""The space of a search: what may be declared, and what comes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxelscale.config import Config, from_dict, load, to_dict
from voxelscale.errors import VoxelscaleError
from voxelscale.search.space import keys_of, read_space

SPACE: dict[str, Any] = {
    "data.patch_size": {"int": [16, 32], "step": 8, "shape": [0.5, 1, 1]},
    "model.depth": {"int": [2, 4]},
    "optim.momentum": {"float": [0.8, 0.99], "if": {"optim.name": ["sgd"]}},
    "optim.name": {"categorical": ["adamw", "sgd"]},
    "optim.lr": {"float": ["1e-4", 1e-2], "log": True},
    "model.norm": {"categorical": ["batch", "instance"]},
}


def with_space(space: dict[str, Any], *sets: str) -> Config:
    return load(None, [f"search.space={space!r}".replace("True", "true").replace("None", "null"), *sets])


def suggest(config: Config, seed: int) -> dict[str, Any]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return read_space(config).suggest(study.ask())


@given(st.integers(0, 2**31))
def test_what_is_suggested_is_a_config_within_the_bounds(seed: int) -> None:
    config = with_space(SPACE)
    params = suggest(config, seed)
    made = read_space(config).apply(config, params)
    edge = params["data.patch_size"]
    assert made.data.patch_size == (edge // 2, edge, edge)
    assert 2 <= made.model.depth <= 4
    assert 1e-4 <= made.optim.used.lr <= 1e-2
    assert ("optim.momentum" in params) == (params["optim.name"] == "sgd")
    untouched = {k: v for k, v in to_dict(made)["loss"].items()}
    assert untouched == to_dict(config)["loss"]


@given(st.integers(0, 2**31))
def test_a_config_is_found_again_in_the_space(seed: int) -> None:
    config = with_space(SPACE)
    space, params = read_space(config), suggest(config, seed)
    found, moved = space.values_of(space.apply(config, params))
    assert moved == []
    assert found == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in params.items()}
    assert space.apply(config, found) == space.apply(config, params)


def test_values_outside_the_space_are_moved_to_the_nearest_and_named() -> None:
    sets = ("optim.name=adamw", "optim.lr=0.5", "model.depth=7", "data.patch_size=[64,64,64]")
    config = with_space(SPACE, *sets)
    found, moved = read_space(config).values_of(config)
    assert set(moved) == {"optim.lr", "model.depth", "data.patch_size"}
    assert (found["optim.lr"], found["model.depth"], found["data.patch_size"]) == (1e-2, 4, 32)


@pytest.mark.parametrize(
    ("key", "choices", "found"),
    [
        ("augment.rotate_deg", [[0, 0, 0], [15, 15, 30]], "[15, 15, 30]"),
        ("optim.lr", ["1e-3", "5e-3"], "5e-3"),
        ("optim.weight_decay", [None, 0.5], None),
        ("augment.strength", [0, 1, 2], 1),
    ],
)
def test_the_config_is_found_however_its_value_is_written(key: str, choices: Any, found: Any) -> None:
    config = replace(Config(), search=replace(Config().search, space={key: {"categorical": choices}}))
    assert read_space(config).values_of(config) == ({key: found}, [])


@pytest.mark.parametrize(
    ("how", "nearest"),
    [
        ({"int": [20, 252], "log": True}, 252),
        ({"categorical": [50, 10]}, 50),
        ({"categorical": [0, 10]}, 0),
    ],
)
def test_no_limit_is_nearest_to_the_largest(how: dict[str, Any], nearest: int) -> None:
    """0 stands for all scans, not for none."""
    config = with_space({"data.cases": how}, "data.cases=0")
    assert read_space(config).values_of(config) == (
        {"data.cases": nearest},
        ["data.cases"] if nearest else [],
    )


def test_null_is_no_number_of_the_space() -> None:
    config = with_space({"predict.low_threshold": {"float": [0.1, 0.5], "step": "1e-1"}})
    assert read_space(config).values_of(config) == (
        {"predict.low_threshold": 0.1},
        ["predict.low_threshold"],
    )


def test_a_grid_of_thousands_has_them_all() -> None:
    assert len(read_space(with_space({"data.cases": {"int": [1, 2000]}})).grid()) == 2000
    endless = read_space(with_space({"data.cases": {"int": [1, 10**9]}}))
    with pytest.raises(VoxelscaleError, match="more than 100,000 points"):
        endless.grid()


def test_what_a_search_could_always_say_is_still_read() -> None:
    """Options that are null, and 1 for true: a search of an earlier version is resumed."""
    rate = {"float": [1e-4, 1e-2], "log": 1, "step": None, "if": None, "points": 5.0}
    found = read_space(with_space({"optim.lr": rate, "model.depth": {"int": [2, 4], "log": None}}))
    assert (len(found.grid()), keys_of(found)[1]) == (15, frozenset({"optim.lr"}))
    with pytest.raises(VoxelscaleError, match="bounds None"):
        read_space(with_space({"model.depth": {"int": None}}))


def test_a_grid_has_every_point_once_and_no_inactive_values() -> None:
    space: dict[str, Any] = {
        "optim.name": {"categorical": ["adamw", "sgd"]},
        "optim.momentum": {"float": [0.8, 0.9], "points": 3, "if": {"optim.name": "sgd"}},
        "model.depth": {"int": [2, 4]},
    }
    grid = read_space(with_space(space)).grid()
    assert len(grid) == 3 * (1 + 3)
    assert len({tuple(sorted(point.items())) for point in grid}) == len(grid)
    assert all(("optim.momentum" in point) == (point["optim.name"] == "sgd") for point in grid)
    assert {p["optim.momentum"] for p in grid if "optim.momentum" in p} == {0.8, 0.8 + 0.05, 0.9}


def test_lists_can_be_chosen_among() -> None:
    space: dict[str, Any] = {"data.patch_size": {"categorical": [[16, 16, 16], [8, 32, 32]]}}
    config = with_space(space)
    made = {read_space(config).apply(config, suggest(config, seed)).data.patch_size for seed in range(20)}
    assert made == {(16, 16, 16), (8, 32, 32)}


def test_the_default_space_holds_the_default_config_and_fits_any_patch() -> None:
    for patch in ("[64,64,64]", "[12,96,96]", "[16,16,16]"):
        config = load(None, [f"data.patch_size={patch}"])
        space = read_space(config)
        found, moved = space.values_of(config)
        assert moved == []
        own = config.optim.used
        assert space.apply(config, found) == replace(
            config, optim=replace(config.optim, lr=own.lr, momentum=own.momentum)
        )
    named = {p.key for p in space.parameters}
    study = {
        "data.patch_size",
        "data.patches_per_case",
        "model.depth",
        "model.filters",
        "model.kernel_size",
    }
    assert study | {"train.batch_size", "optim.lr"} <= named


@pytest.mark.parametrize(
    ("name", "rates"), [("sgd", (1e-3, 1e-1)), ("lars", (0.1, 10.0)), ("muon", (5e-4, 5e-2))]
)
def test_the_default_space_is_the_optimisers(name: str, rates: tuple[float, float]) -> None:
    space = read_space(load(None, [f"optim.name={name}"]))
    by = {p.key: p.distribution for p in space.parameters}
    assert (by["optim.lr"].low, by["optim.lr"].high) == pytest.approx(rates)  # type: ignore[attr-defined]
    assert "optim.momentum" in by
    # A search of before lists its momentum.
    before = read_space(
        load(None, [f"optim.name={name}", "optim.momentum=0.99", "optim.weight_decay=0.01"])
    )
    adamw = read_space(load(None, ["optim.name=adamw"]))
    assert {p.key for p in before.parameters} == {p.key for p in adamw.parameters}
    assert next(p.distribution for p in before.parameters if p.key == "optim.lr").low == 1e-4  # type: ignore[attr-defined]


def test_a_searched_optimiser_brings_its_own_defaults() -> None:
    config = with_space({"optim.name": {"categorical": ["adamw", "sgd", "muon"]}})
    space = read_space(config)
    used = {name: space.apply(config, {"optim.name": name}).optim.used for name in ("adamw", "sgd", "muon")}
    assert [used[name].weight_decay for name in used] == [1e-2, 3e-5, 1e-2]
    assert (used["sgd"].momentum, used["muon"].momentum) == (0.99, 0.95)
    decay = with_space({"optim.weight_decay": {"float": [1e-6, 1e-1], "log": True}}, "optim.name=sgd")
    assert read_space(decay).values_of(decay) == ({"optim.weight_decay": 3e-5}, [])


@pytest.mark.parametrize(
    ("model", "settled"),
    [
        ({"depth": 3, "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]}, {"model.kernel_size"}),
        ({"depth": 3, "blocks": [1, 2, 3]}, set()),
        ({"preset": "resenc_m"}, {"model.kernel_size", "model.filters", "model.norm"}),
    ],
)
def test_what_a_plan_says_of_each_level_follows_the_depth(model: dict[str, Any], settled: set[str]) -> None:
    """The default space takes the plan of coarse slices, and of a preset."""
    config = from_dict({"model": model})
    space, plain = read_space(config), read_space(Config())
    assert {p.key for p in plain.parameters} - {p.key for p in space.parameters} == settled
    for depth in (2, 5):
        applied = space.apply(config, {"model.depth": depth}).model
        assert applied.depth == depth
        assert applied.kernels == config.model.of_depth(depth).kernels
        assert applied.blocks == config.model.of_depth(depth).blocks


def test_in_two_dimensions_a_patch_stays_flat() -> None:
    config = with_space(
        {"data.patch_size": {"int": [16, 32], "step": 8}}, "model.dims=2", "data.patch_size=[1,16,16]"
    )
    made = read_space(config).apply(config, {"data.patch_size": 24})
    assert made.data.patch_size == (1, 24, 24)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"model.dept": {"int": [2, 4]}}, ("model.dept", "model.depth")),
        ({"phantom.cases": {"int": [2, 4]}}, ("phantom.cases", "data.cases")),
        ({"train.seed": {"int": [0, 4]}}, ("train.seed", "retrain")),
        ({"model.depth": 3}, ("model.depth", "{int: [2, 5]}")),
        ({"model.depth": {"int": [4, 2]}}, ("model.depth", "[minimum, maximum]")),
        ({"model.depth": {"int": ["a", 2]}}, ("model.depth", "[minimum, maximum]")),
        ({"model.depth": {"int": [2.5, 4]}}, ("model.depth", "whole")),
        ({"model.depth": {"int": [2, 4], "stp": 2}}, ("stp", "step")),
        ({"model.depth": {"int": [2, 5], "step": 2}}, ("step 2", "divide")),
        ({"model.depth": {"float": [2.0, 4.0]}}, ("model.depth", "whole number")),
        ({"model.kernel_size": {"int": [3, 5]}}, ("model.kernel_size is 4", "odd")),
        ({"model.norm": {"categorical": ["batch", "bach"]}}, ("bach", "one of")),
        ({"model.norm": {"categorical": []}}, ("model.norm", "categorical")),
        ({"optim.lr": {"float": [0.0, 1.0], "log": True}}, ("optim.lr", "above 0")),
        ({"optim.lr": {"float": [-1.0, 1.0]}}, ("optim.lr", "above 0")),
        ({"optim.lr": {"float": [0.1, 1.0], "shape": [1, 1, 1]}}, ("shape", "float")),
        ({"data.patch_size": {"int": [16, 32], "shape": [1, 1]}}, ("shape", "z, y, x")),
        ({"train.ranks": {"int": [1, 4]}}, ("train.ranks up to 4", "devices")),
        ({"model.depth": {"int": [2, 4], "step": 0}}, ("step 0", "whole number above 0")),
        ({"model.depth": {"int": [2, 4], "step": 0.5}}, ("step 0.5", "whole number above 0")),
        ({"augment.noise_std": {"float": [0, 0.1], "step": "wide"}}, ("step 'wide'", "number above 0")),
        ({"augment.noise_std": {"float": [0, 0.1], "points": "all"}}, ("points 'all'", "whole number")),
        ({"optim.weight_decay": {"float": [0, float("inf")]}}, ("inf", "[minimum, maximum]")),
        ({"optim.lr": {"float": [1e-4, 1e-2], "log": "no"}}, ("log 'no'", "true or false")),
        ({"optim.lr": {"float": [1e-4, 1e-2], "if": "optim.name"}}, ("if 'optim.name'", "if: {")),
        ({"optim.step_at": {"int": [0, 1]}}, ("optim.step_at", "a list")),
        (
            {"optim.momentum": {"float": [0.8, 0.9], "if": {"optim.name": "sgd"}}},
            ("optim.name", "not searched"),
        ),
        (
            {
                "optim.name": {"categorical": ["adamw", "sgd"]},
                "optim.momentum": {"float": [0.8, 0.9], "if": {"optim.name": "lars"}},
            },
            ("never 'lars'", "values"),
        ),
        (
            {
                "model.depth": {"int": [2, 4], "if": {"model.filters": [8]}},
                "model.filters": {"int": [4, 8], "if": {"model.depth": [2]}},
            },
            ("model.depth, model.filters", "depend"),
        ),
    ],
)
def test_a_faulty_space_is_refused_with_the_key_and_the_fix(
    space: dict[str, Any], words: tuple[str, ...]
) -> None:
    config = load(None)
    config.search.space.update(space)
    with pytest.raises(VoxelscaleError) as told:
        read_space(config)
    text = f"{told.value.message} {told.value.hint}"
    assert all(word in text for word in words), text


def test_a_space_with_an_old_name_of_a_key_searches_the_same_key() -> None:
    config = load(sets=["search.space={optim.clip: {float: [1, 20]}}"])
    space = read_space(config)
    assert space.apply(config, {"optim.clip": 3.0}).optim.gradient_clipping == 3.0
    both = "search.space={optim.clip: {float: [1, 20]}, optim.gradient_clipping: {float: [1, 20]}}"
    with pytest.raises(VoxelscaleError, match="old and its new name"):
        read_space(load(sets=[both]))
