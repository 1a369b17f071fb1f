"""A training that begins with another model's weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Command
from tests.model.test_resenc import theirs
from tests.train.runs import begin, command, final_weights, finish, identical, two_ranks, with_train
from voxelscale.classes import Classes
from voxelscale.config import Config, ModelConfig, dump
from voxelscale.errors import VoxelscaleError
from voxelscale.model.build import build_model
from voxelscale.model.bundle import read_bundle
from voxelscale.store import Store
from voxelscale.train.launch import start
from voxelscale.train.optim import make_optimizer, set_learning_rate
from voxelscale.train.pretrained import Pretrained, config_like, read_pretrained, take_over

PATCH, SPACING = (16, 16, 16), (1.0, 1.0, 1.0)
TWO = Classes(names=("one", "two"), values=((1,), (2,)))


def network(seed: int, *, depth: int = 3, channels: int = 1, outputs: int = 1, **keys: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model(ModelConfig(depth=depth, filters=4, **keys), PATCH, SPACING, channels, outputs)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def given(model: nn.Module, **about: Any) -> Pretrained:
    known = {"channels": ("CT",), "classes": ("lesion",), "network": {}}
    return Pretrained(weights=model.state_dict(), **(known | about))


@pytest.fixture(scope="module")
def run(tiny: Config, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    assert start(with_train(tiny, samples=16), store.path, folder)
    return folder


def test_the_same_network_takes_all(store: Store) -> None:
    old, new = network(0), network(1)
    taken = take_over(new, given(old), ("CT",), store)
    assert identical(new.state_dict(), old.state_dict())
    assert set(taken.names) == set(old.state_dict())
    assert not taken.new


def test_other_classes_begin_a_new_head_alone(store: Store) -> None:
    for about in (
        {"classes": ("nodule",)},
        {"classes": ("one", "two"), "kind": "softmax"},
        {"classes": ()},
    ):
        old, new = network(0), network(1)
        before = new.state_dict()["head.weight"].clone()
        taken = take_over(new, given(old, **about), ("CT",), store)
        assert set(taken.new) == {"head.weight", "head.bias"}
        assert torch.equal(new.state_dict()["head.weight"], before)
    old, new = network(0, outputs=3), network(1, outputs=3)
    several = given(old, classes=TWO.names, kind="softmax")
    assert not take_over(new, several, ("CT",), replace(store, classes=TWO)).new
    swapped = given(old, classes=("two", "one"), kind="softmax")
    assert set(take_over(new, swapped, ("CT",), replace(store, classes=TWO)).new) == {
        "head.weight",
        "head.bias",
    }


def test_channels_are_taken_by_name(store: Store) -> None:
    """Not by place: PET's weights must not look at CT."""
    old, new = network(0, channels=2), network(1, channels=3)
    before, first = new.state_dict()["encode.levels.0.conv1.weight"].clone(), "encode.levels.0.conv1.weight"
    taken = take_over(new, given(old, channels=("PET", "CT")), ("CT", "MRI", "PET"), store)
    source, after = old.state_dict()[first], new.state_dict()[first]
    assert torch.equal(after[:, 0], source[:, 1])
    assert torch.equal(after[:, 1], before[:, 1])
    assert torch.equal(after[:, 2], source[:, 0])
    assert set(taken.new) == {first}
    other = network(2, channels=2)
    kept = other.state_dict()[first].clone()
    assert first in take_over(other, given(old, channels=("T1", "T2")), ("PET", "CT"), store).new
    assert torch.equal(other.state_dict()[first], kept)


def test_a_deeper_network_takes_the_levels_of_the_same_resolution(store: Store) -> None:
    old, new = network(0, depth=2), network(1, depth=3)
    taken = take_over(new, given(old), ("CT",), store)
    weights, source = new.state_dict(), old.state_dict()
    for name in ("up.weight", "level.conv1.weight", "level.norm2.bias"):
        assert torch.equal(weights[f"decode.levels.1.{name}"], source[f"decode.levels.0.{name}"])
    assert {name.rsplit(".", 2)[0] for name in taken.new} == {
        "encode.levels.2",
        "decode.levels.0",
        "decode.levels.0.level",
    }


CT_LESION = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "lesion": 1}}


def nnunet_file(
    path: Path, model: nn.Module, described: Mapping[str, Any] = CT_LESION, **about: Any
) -> Path:
    """As nnU-Net writes it: with a plan, and NumPy's numbers in the log."""
    plans = {"configurations": {"3d_fullres": about}}
    arguments = {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": described}
    log = {"train_losses": [np.float64(-0.5), np.float32(0.1)], "ema_fg_dice": [np.float64(0.8)]}
    content = {
        "network_weights": model.state_dict(),
        "init_args": arguments,
        "logging": log,
        "current_epoch": 1,
    }
    torch.save(content, path)
    return path


def test_nnunets_residual_encoder_gives_the_same_answers(store: Store, tmp_path: Path) -> None:
    """And its two outputs, of background and lesion, become one."""
    config = ModelConfig(depth=3, filters=4, blocks=(1, 2, 1))
    torch.manual_seed(0)
    reference = theirs(config, PATCH, SPACING, 1, 2)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.3)
    arguments = {"n_stages": 3, "features_per_stage": [4, 8, 16], "kernel_sizes": [[3, 3, 3]] * 3}
    arguments["n_blocks_per_stage"] = [1, 2, 1]
    path = nnunet_file(
        tmp_path / "checkpoint_final.pth",
        reference,
        patch_size=PATCH,
        architecture={"arch_kwargs": arguments},
    )
    fitting = config_like(path)
    assert (fitting.data.patch_size, fitting.model.depth, fitting.model.blocks) == (PATCH, 3, (1, 2, 1))
    model = build_model(fitting.model, PATCH, SPACING)
    assert not take_over(model, read_pretrained(path), ("CT",), store).new
    image = torch.randn(2, 1, *PATCH)
    background, lesion = reference(image).unbind(1)
    torch.testing.assert_close(model(image)[:, 0], lesion - background, atol=1e-4, rtol=1e-4)


def test_nnunets_regions_have_channels_by_name_and_a_head(store: Store, tmp_path: Path) -> None:
    """As BraTS's; T1's weights must not look at FLAIR. The eleventh channel comes after the second."""
    channels = {str(n): f"c{n}" for n in range(11)}
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    described = {"channel_names": channels, "labels": labels, "regions_class_order": [1, 2]}
    first, head = torch.randn(4, 11, 3, 3, 3), torch.randn(2, 4, 1, 1, 1)
    holder = nn.Module()
    holder.state_dict = lambda: {  # type: ignore[method-assign,assignment]
        "encoder.stages.0.0.convs.0.conv.weight": first,
        "decoder.seg_layers.0.weight": head,
        "decoder.seg_layers.0.bias": torch.zeros(2),
    }
    path = nnunet_file(tmp_path / "checkpoint_final.pth", holder, described)
    regions = Classes(names=("whole", "core"), values=((1, 2), (2,)), regions=True, order=(1, 2))
    model = network(1, depth=2, channels=11, outputs=2)
    ours = ("c10", *(f"c{n}" for n in range(10)))
    take_over(model, read_pretrained(path), ours, replace(store, classes=regions))
    found = model.state_dict()
    assert torch.equal(found["encode.levels.0.conv1.weight"], first.roll(1, 1))
    assert torch.equal(found["head.weight"], head)


def test_nnunets_plain_network_by_hand(store: Store, tmp_path: Path) -> None:
    """A convolution of each kind, under the names that nnU-Net gives them."""
    model = network(1, depth=2)
    ours = {name: torch.randn_like(weight) for name, weight in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    for level in range(2):
        for n in (0, 1):
            for kind, name in (
                ("conv.weight", f"conv{n + 1}.weight"),
                *((f"norm.{k}", f"norm{n + 1}.{k}") for k in ("weight", "bias")),
            ):
                state[f"encoder.stages.{level}.0.convs.{n}.{kind}"] = ours[f"encode.levels.{level}.{name}"]
                if not level:
                    value = ours[f"decode.levels.0.level.{name}"]
                    value = (
                        torch.cat(value.chunk(2, 1)[::-1], 1) if (n, kind) == (0, "conv.weight") else value
                    )
                    state[f"decoder.stages.0.convs.{n}.{kind}"] = value
                state[f"encoder.stages.{level}.0.convs.{n}.all_modules.0.weight"] = torch.randn(1)
    state["decoder.transpconvs.0.weight"] = torch.randn(8, 4, 2, 2, 2)
    state["decoder.transpconvs.0.bias"] = torch.randn(4)
    state["decoder.seg_layers.0.weight"] = torch.randn(2, 4, 1, 1, 1)
    state["decoder.seg_layers.0.bias"] = torch.randn(2)
    holder = nn.Module()
    holder.state_dict = lambda: state  # type: ignore[method-assign,assignment]
    path = nnunet_file(tmp_path / "checkpoint_best.pth", holder)
    taken = take_over(model, read_pretrained(path), ("CT",), store)
    found = model.state_dict()
    for name in taken.names:
        if not name.startswith(("head", "decode.levels.0.up")):
            assert torch.equal(found[name], ours[name]), name
    assert len(taken.names) == 6 * 3 + 2 + 2
    deep = torch.randn(1, 8, 3, 3, 3)
    up = nn.functional.conv_transpose3d(
        deep, state["decoder.transpconvs.0.weight"], state["decoder.transpconvs.0.bias"], stride=2
    )
    rows = nn.functional.conv3d(deep, found["decode.levels.0.up.weight"], found["decode.levels.0.up.bias"])
    voxels = rows.view(1, 2, 2, 2, 4, 3, 3, 3).permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(1, 4, 6, 6, 6)
    torch.testing.assert_close(voxels, up)


def test_files_that_are_none(run: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"network_weights": {"a": Evil()}}, tmp_path / "evil.pth")
    torch.save(
        {"network_weights": {"decoder.seg_layers.0.bias": torch.tensor([float("nan")])}},
        tmp_path / "nan.pth",
    )
    torch.save([1], tmp_path / "list.pth")
    whole = (run / "model.vxs").read_bytes()
    (tmp_path / "cut.vxs").write_bytes(whole[: len(whole) // 2])
    for name in ("evil.pth", "nan.pth", "list.pth", "cut.vxs", "none.vxs"):
        with pytest.raises(VoxelscaleError) as caught:
            read_pretrained(tmp_path / name)
        assert name in caught.value.message
    assert not (tmp_path / "executed").exists()


def test_rates_of_old_and_new_weights(tiny: Config) -> None:
    model = network(0)
    old = [name for name, _ in model.named_parameters() if name.startswith("encode")]
    optimizer = make_optimizer(model, replace(tiny.optim, pretrained_lr=0.1), old)
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.05 if name in old else 0.5)
    assert len(make_optimizer(model, tiny.optim, old).param_groups) == 2


def test_the_command_and_a_resumed_run(
    tiny: Config, store: Store, run: Path, tmp_path: Path, voxelscale: Command
) -> None:
    """A frozen encoder stays as it was, bit for bit; a killed run does not need the model any more."""
    source = tmp_path / "model.vxs"
    shutil.copy(run / "model.vxs", source)
    config = with_train(tiny, samples=48, checkpoint_every=8)
    config = replace(config, optim=replace(config.optim, pretrained_lr=0.5))
    more = ("--from", str(source), "--set", "train.freeze=encoder")
    arguments = command(config, store, tmp_path / "new", *more)
    process = begin(arguments, tmp_path / "new", 8)
    process.kill()
    process.communicate()
    source.rename(tmp_path / "moved.vxs")
    finish(arguments)
    weights, before = final_weights(tmp_path / "new"), read_bundle(run).weights
    frozen = {name for name in before if name.startswith("encode.")}
    assert frozen
    assert all(torch.equal(weights[name], before[name]) for name in frozen)
    assert all(
        not torch.equal(weights[name], before[name])
        for name in before
        if name.endswith("conv1.weight") and name not in frozen
    )
    assert set(json.loads((tmp_path / "new" / "pretrained.json").read_text())["taken"]) == set(before)
    (tmp_path / "moved.vxs").rename(source)
    whole = command(config, store, tmp_path / "whole", *more)
    finish(whole)
    assert identical(final_weights(tmp_path / "whole"), weights)
    code, _, errors = voxelscale("train", store.path, tmp_path / "new", "--from", run)
    assert (code, "train.start_from" in errors) == (2, True)
    assert str(tmp_path) not in (tmp_path / "new" / "model.vxs").read_bytes().decode("latin-1")


def test_batch_norm_cannot_be_frozen(
    store: Store, tiny: Config, tmp_path: Path, voxelscale: Command
) -> None:
    """Its statistics would follow the new data, and the encoder would see something else."""
    (tmp_path / "batch.yaml").write_text(dump(with_train(tiny, "batch", samples=2)))
    words = ("--config", tmp_path / "batch.yaml")
    assert voxelscale("train", store.path, tmp_path / "first", *words)[0] == 0
    more = (*words, "--from", tmp_path / "first")
    code, _, errors = voxelscale(
        "train", store.path, tmp_path / "new", *more, "--set", "train.freeze=encoder"
    )
    assert code == 2
    assert "train.freeze=encoder: the statistics of batch norm in encode." in errors
    # What was refused can be corrected in the same folder.
    assert voxelscale("train", store.path, tmp_path / "new", *more)[0] == 0


def test_two_ranks_begin_alike(tiny: Config, store: Store, run: Path, tmp_path: Path) -> None:
    config = with_train(tiny, samples=8, batch_size=2)
    for arguments in (command(config, store, tmp_path / "one"), two_ranks(config, store, tmp_path / "two")):
        finish(
            [*arguments, "--from", str(run), "--set", "train.freeze=all_but_head", "--set", "optim.lr=0.1"]
        )
    one, two = (final_weights(tmp_path / name) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)
        assert torch.equal(one[name], read_bundle(run).weights[name]) == (not name.startswith("head."))


def test_weights_of_quite_another_network(
    store: Store, tiny: Config, run: Path, tmp_path: Path, voxelscale: Command
) -> None:
    other = replace(tiny, model=replace(tiny.model, filters=5, norm="none"))
    (tmp_path / "other.yaml").write_text(dump(other))
    code, _, errors = voxelscale(
        "train", store.path, tmp_path / "new", "--from", run, "--config", tmp_path / "other.yaml"
    )
    assert code == 2
    assert "none of its weights fits" in errors
    code, _, errors = voxelscale("train", store.path, tmp_path / "no", "--set", "train.freeze=encoder")
    assert (code, "start_from" in errors) == (2, True)
