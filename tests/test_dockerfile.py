"""The Dockerfile's commands, run without Docker: its files copied, its RUN lines in an environment.

What this cannot show is said in the file itself: that the base image has all that the packages need.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from voxelscale import __version__

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines())
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line and line[0] != "#"]


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """In place of the base image: an empty environment that finds packages in the present one."""
    folder = tmp_path / "python"
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "present.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = folder / "bin" / "pip"
    pip.write_text('#!/bin/sh\nexec python -m pip "$@"\n')
    pip.chmod(0o755)
    return folder


@pytest.mark.slow
def test_its_commands_make_an_environment_with_the_program(environment: Path, tmp_path: Path) -> None:
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"
    # Nothing is fetched: what is asked for must be what is there, or the test fails.
    variables |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    place, ends = tmp_path / "image", {}
    for word, rest in instructions():
        if word == "ARG":
            name, _, value = rest.partition("=")
            variables[name] = value
        elif word == "WORKDIR":
            place = tmp_path / "image" / rest.removeprefix("/")
            place.mkdir(parents=True)
        elif word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copied(source, place / target)
        elif word == "RUN":
            done = subprocess.run(
                ["sh", "-euc", rest], cwd=place, env=variables, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
        else:
            ends[word] = rest
    assert ends["USER"] == "1000:1000"
    (program,) = json.loads(ends["ENTRYPOINT"])
    command = [environment / "bin" / program, "--version"]
    told = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, check=True)
    assert told.stdout == f"voxelscale {__version__}\n"
    assert list(environment.glob("lib/python*/site-packages/voxelscale/__init__.py"))
    assert json.loads(ends["CMD"]) == ["--help"]
    assert ends.keys() == {"FROM", "ENV", "USER", "ENTRYPOINT", "CMD"}


def copied(source: str, target: Path) -> None:
    """Copy what Docker would: only what .dockerignore lets it see."""
    assert f"!{source}" in (ROOT / ".dockerignore").read_text().splitlines()
    if (ROOT / source).is_dir():
        shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    else:
        target.mkdir(exist_ok=True)
        shutil.copy(ROOT / source, target)
