"""Commands written wrong, the help's groups, and completion in a shell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Command
from voxelscale import cli
from voxelscale.config import keys
from voxelscale.suggest import KEYS, nearest_keys


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        ("tarin store run", "no such command: tarin", "did you mean voxelscale train?"),
        ("inference run scans out", "no such command: inference", "did you mean voxelscale predict?"),
        ("frobnicate", "no such command: frobnicate", "voxelscale --help lists the commands"),
        ("search stauts", "stauts: no such command or folder", "did you mean voxelscale search status?"),
        ("search stauts search/", "stauts: no such command or folder", "voxelscale search status"),
        ("train store", "train: missing argument RUN", "write voxelscale train STORE RUN"),
        ("search store", "search: missing argument OUT", "write voxelscale search STORE OUT"),
        ("froc a.csv", "froc: missing option --annotations", "--annotations ANNOTATIONS --series SERIES"),
        ("train store run --sett a=b", "train: no such option: --sett", "did you mean --set?"),
        ("train store run --batch-size 4", "no such option: --batch-size", "--set train.batch_size=VALUE?"),
        ("train store run --frobnicate", "no such option: --frobnicate", "voxelscale train --help"),
        ("phantom out --cases few", "phantom: invalid value for '--cases'", "voxelscale phantom --help"),
        ("compare a b c d", "compare: got unexpected extra argument", "voxelscale compare --help"),
        ("config --set", "option '--set' requires an argument", "voxelscale"),
        ("config --set optim.learning_rate=1", "unknown key optim.learning_rate", "did you mean optim.lr?"),
        ("config --set trian.sampels=1", "unknown key trian.sampels", "did you mean train.samples?"),
        ("config --set train.frobnicate=1", "unknown key train.frobnicate", "known keys here: samples,"),
        ("config --set model.norm=instnace", "model.norm is 'instnace'", "did you mean instance?"),
        ("search a b --sampler tppe", "search.sampler is 'tppe'", "did you mean tpe?"),
    ],
)
def test_a_command_written_wrong_is_two_lines_with_the_right_one(
    voxelscale: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: str,
    error: str,
    hint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = voxelscale(*arguments.split())
    lines = err.splitlines()
    assert (code, out, len(lines)) == (2, "", 2), err
    assert lines[0].startswith("error: ")
    assert error in lines[0]
    assert lines[1].startswith("hint: ")
    assert hint in lines[1]


def test_a_folder_that_is_named_like_a_command_is_a_store(
    voxelscale: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("statuses").mkdir()
    code, _, err = voxelscale("search", "statuses", "out")
    assert code == 2
    assert "statuses/dataset.json" in err


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.epochs", ["train.samples"]),
        ("train.lr", ["optim.lr"]),
        ("data.num_workers", ["data.readers"]),
        ("data.patch", ["data.patch_size"]),
        ("data.batch", ["train.batch_size"]),
        ("model.warmup", ["optim.warmup"]),
        ("loss.overlap", ["predict.overlap"]),
        ("model.pach_size", ["data.patch_size", "predict.patch_size"]),
        ("trian", ["train"]),
        ("optim.quux", []),
        ("quux.frob", []),
    ],
)
def test_config_keys_that_were_meant(key: str, meant: list[str]) -> None:
    assert nearest_keys(key, keys()) == meant


def test_other_tools_names_lead_to_keys_that_exist() -> None:
    assert set(KEYS.values()) <= set(keys())


def test_the_help_lists_every_command_once_by_group(voxelscale: Command) -> None:
    code, out, _ = voxelscale()
    assert code == 0
    assert out == voxelscale("--help")[1]
    groups = ["Data:", "Training:", "Prediction:", "Evaluation:", "Studies:", "Help:"]
    assert [line for line in out.splitlines() if line in groups] == groups
    listed = [line.split()[0] for line in out[out.index("Data:") :].splitlines() if line.startswith("  ")]
    commands = [c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback]
    assert sorted(listed) == sorted([*commands, "search"])


def complete(shell: str, words: str) -> list[str]:
    """What a shell offers after these words, the last of them unfinished."""
    line = f"voxelscale {words}"
    environment = {
        **os.environ,
        "_VOXELSCALE_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "\n".join(line.split(" ")),
        "COMP_CWORD": str(line.count(" ")),
        "_TYPER_COMPLETE_ARGS": line,
    }
    done = subprocess.run(
        [sys.executable, "-c", "from voxelscale.cli import main; main()"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("pre", ["prepare", "predict"]),
        ("search st", ["status"]),
        ("search store/ out/ --tri", ["--trials"]),
        ("predict run/ scans/ out/ --sp", ["--split"]),
        ("train store/ run/ --set optim.w", ["optim.weight_decay=", "optim.warmup="]),
    ],
)
def test_bash_completes(words: str, offered: list[str]) -> None:
    assert complete("bash", words) == offered


def test_zsh_completes_with_what_each_command_does() -> None:
    assert '"train":"Train a U-Net' in " ".join(complete("zsh", "tra"))


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_shown_for_the_shell(shell: str) -> None:
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "voxelscale.cli", "--show-completion", shell],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"_VOXELSCALE_COMPLETE=complete_{shell}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("evaluate predictions scans", "the same command starts again from the beginning"),
        ("predict run scans out", "the same command resumes where this one stopped"),
    ],
)
def test_ctrl_c_promises_only_what_is_true(
    voxelscale: Command, monkeypatch: pytest.MonkeyPatch, arguments: str, words: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("voxelscale.evaluate.evaluate.evaluate_folder", interrupt)
    monkeypatch.setattr("voxelscale.model.bundle.read_bundle", interrupt)
    code, _, err = voxelscale(*arguments.split())
    assert (code, err) == (130, f"error: interrupted\nhint: {words}\n")


@pytest.mark.parametrize("level", ["-q", "--quiet", "-v", "--verbose"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_verbosity_stands_anywhere(voxelscale: Command, level: str, place: int) -> None:
    words = ["config", "--set", "train.samples=7"]
    code, out, _ = voxelscale(*words[:place], level, *words[place:])
    assert code == 0
    assert "samples: 7" in out


def test_after_two_dashes_a_word_is_no_option(
    voxelscale: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "error: -q: " in voxelscale("inspect", "--", "-q")[2]
