"""What is given to others: sdist and wheel, and what the project says of its version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from voxelscale import __version__
from voxelscale.config import Config, dump

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "voxelscale"
KEPT = (
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
    "constraints.txt",
)


def built(kind: str, source: Path, out: Path) -> Path:
    """Build an sdist or a wheel as pip does, by setuptools, without fetching anything."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy, because setuptools leaves files beside what it builds."""
    folder = tmp_path_factory.mktemp("source")
    for name in KEPT:
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for name in own_files():
        (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "src" / name).write_bytes((ROOT / "src" / name).read_bytes())
    (folder / "tests").mkdir()
    (folder / "tests" / "test_any.py").touch()
    return built("sdist", folder, folder / "dist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the unpacked sdist: what is missing there is missing in the wheel."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return built("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in an environment of its own, which sees the packages that it needs in the present one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    into = ["--python", str(folder / "bin" / "python")]
    pip = [sys.executable, "-m", "pip", *into, "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "present.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def own_files() -> set[str]:
    return {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def in_environment(environment: Path, *command: object, cwd: Path) -> str:
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    program, *arguments = map(str, command)
    done = subprocess.run(
        [environment / "bin" / program, *arguments],
        env=variables,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    info = f"voxelscale-{__version__}.dist-info"
    about = {
        f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")
    }
    licences = {f"{info}/licenses/LICENSE"}
    licences |= {f"{info}/licenses/src/voxelscale/viewer/static/niivue.LICENSE.txt"}
    assert names == own_files() | about | licences
    assert wheel.name == f"voxelscale-{__version__}-py3-none-any.whl"


def test_the_sdist_holds_what_builds_it(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    made = {name for name in names if ".egg-info/" in name}
    assert names - made == {f"src/{name}" for name in own_files()} | {*KEPT, "PKG-INFO", "setup.cfg"}


def test_the_installed_wheel_runs(environment: Path, tmp_path: Path) -> None:
    assert (
        in_environment(environment, "voxelscale", "--version", cwd=tmp_path)
        == f"voxelscale {__version__}\n"
    )
    where = "import voxelscale; print(voxelscale.__file__)"
    assert str(environment) in in_environment(environment, "python", "-c", where, cwd=tmp_path)
    assert "train:" in in_environment(environment, "voxelscale", "config", cwd=tmp_path)
    tiny = ("--set", "phantom.cases=1", "--set", "phantom.size_mm=[100,150,200]")
    in_environment(environment, "voxelscale", "-q", "phantom", "scans", *tiny, cwd=tmp_path)
    assert len(list((tmp_path / "scans" / "images").iterdir())) == 1


@pytest.mark.slow
def test_the_installed_wheel_runs_the_quickstart(environment: Path, tiny: Config, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(dump(tiny))
    told = in_environment(
        environment,
        "voxelscale",
        "quickstart",
        "all",
        "--config",
        "tiny.yaml",
        "--set",
        "train.ranks=2",
        cwd=tmp_path,
    )
    assert '"report": "all/report.html"' in told


PROGRAM = """
from pathlib import Path

from torch import Tensor, nn

from voxelscale.api import Finding, Model, Points, array_of, evaluate, fit, froc, load_scan, load_weights
from voxelscale.config import Config, load


def look(path: Path, model: Model) -> list[Finding]:
    array, affine = array_of(load_scan(path))
    prediction = model.predict(array, affine=affine, settings=["predict.threshold=0.3"])
    dice: float = evaluate(prediction, "truth.nii.gz").overlap.dice
    curve = froc([Points(marks=[(1, 2, 3, 0.5)], lesions=[(1, 2, 3, 4)]), evaluate("a.nii.gz", "b.nii.gz")])
    print(dice, curve.cpm, prediction.probability.mean())
    return [finding for finding in prediction.findings if (finding.mean_hu or 0) > -300]


class Samples:
    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        raise IndexError(i)


config: Config = load(sets=["train.samples=10"])
result = fit(nn.Linear(1, 1), nn.MSELoss(), Samples(), config, run="run", validate=lambda model: 0.5)
weights: dict[str, Tensor] = load_weights("run")
seen: str = result.seen
"""


@pytest.mark.slow
def test_a_users_program_is_checked_strictly_against_the_wheel(environment: Path, tmp_path: Path) -> None:
    """Its last line is wrong. That this alone is found shows: the types are the wheel's, and whole."""
    (tmp_path / "program.py").write_text(PROGRAM)
    if (ROOT / ".mypy_cache").is_dir():  # PyTorch's types, where `make lint` has looked at them before
        shutil.copytree(ROOT / ".mypy_cache", tmp_path / "cache")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", "cache"]
    mypy += ["--config-file", str(ROOT / "pyproject.toml")]
    mypy += ["--python-executable", str(environment / "bin" / "python"), "program.py"]
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(mypy, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    (found,) = done.stdout.splitlines()
    assert found.startswith(f"program.py:{PROGRAM.count(chr(10))}: error: Incompatible types in assignment")


def test_all_say_the_same_version() -> None:
    """Package, citation, changelog and README."""
    said = {
        "CITATION.cff": r"^version: (\S+)$",
        "CHANGELOG.md": r"^## (\d\S+)",
        "README.md": r"version = \{(\S+)\}",
    }
    for name, pattern in said.items():
        found = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert found is not None, name
        assert found[1] == __version__, name


def test_every_dependency_has_its_version_and_its_reason() -> None:
    """Those of benchmarks are explained together."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = {name: {_name(one) for one in each} for name, each in extras.items()}
    asked[""] = {_name(one) for one in project["dependencies"]}
    fixed = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split("\n")}
    assert set().union(*asked.values()) - {"voxelscale"} <= fixed
    explained = (ROOT / "docs" / "dependencies.md").read_text().lower()
    unexplained = set().union(*(names for extra, names in asked.items() if extra != "bench"))
    assert {name for name in unexplained if name not in explained} == set()


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!; ]", requirement, maxsplit=1)[0].lower()
