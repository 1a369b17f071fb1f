"""The commands as a user types them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.conftest import Command, assert_same_place
from voxelscale import __version__
from voxelscale.config import Config, dump
from voxelscale.dataset.listing import list_sources
from voxelscale.errors import VoxelscaleError
from voxelscale.evaluate.text import size_name
from voxelscale.model.bundle import read_bundle, write_bundle
from voxelscale.parallel import map_processes
from voxelscale.phantom.dataset import write_phantoms

VERBS = [
    "phantom",
    "inspect",
    "prepare",
    "train",
    "scale",
    "cv",
    "best",
    "predict",
    "calibrate",
    "evaluate",
    "compare",
    "froc",
    "report",
    "quickstart",
    "config",
]


@pytest.fixture(scope="module")
def config_file(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(dump(tiny))
    return path


@pytest.fixture(scope="module")
def job(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main job through the commands, in a folder."""
    folder = tmp_path_factory.mktemp("job")
    steps = [
        ["phantom", "scans"],
        ["prepare", "scans", "store"],
        ["train", "store", "run", "--set", "train.samples=200", "--set", "optim.lr=0.01"],
        ["predict", "run", "scans", "predictions", "--store", "store", "--split", "test"],
    ]
    for step in steps:
        arguments = [sys.executable, "-m", "voxelscale.cli", "--quiet", *step, "--config", str(config_file)]
        done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout
    return folder


def test_help_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys; sys.argv = ['voxelscale', '--help']\n"
        "from voxelscale import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'SimpleITK', 'scipy', 'blosc2', 'yaml', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verbs_help_teaches_by_example(voxelscale: Command, verb: str) -> None:
    code, out, _ = voxelscale(verb, "--help")
    assert code == 0
    assert f"  voxelscale {verb}" in out


def test_version(voxelscale: Command) -> None:
    assert voxelscale("--version") == (0, f"voxelscale {__version__}\n", "")


def test_masks_lie_on_their_scans(job: Path) -> None:
    cases = sorted(p.name for p in (job / "predictions").iterdir() if p.is_dir())
    assert len(cases) == 1
    for case in cases:
        scan = sitk.ReadImage(str(job / "scans" / "images" / f"{case}.nii.gz"))
        mask = sitk.ReadImage(str(job / "predictions" / case / "mask.nii.gz"))
        assert_same_place(mask, scan)


def test_predictions_say_what_they_were_asked_for(job: Path) -> None:
    """So that evaluate knows of a missing one, and calibrate of training scans."""
    (case,) = [path.name for path in (job / "predictions").iterdir() if path.is_dir()]
    record = json.loads((job / "predictions" / "predict.json").read_text())
    table = json.loads((job / "store" / "dataset.json").read_text())
    split = {info["case"]: info["split"] for info in table["cases"]}[case]
    assert split == "test"
    assert record == {"cases": [case], "splits": {table["fingerprint"]["digest"]: {case: split}}}


def test_findings_are_in_patient_mm(job: Path) -> None:
    with (job / "predictions" / "findings.csv").open() as handle:
        table = list(csv.DictReader(handle))
    (folder,) = [p for p in (job / "predictions").iterdir() if p.is_dir()]
    rows = json.loads((folder / "findings.json").read_text())["findings"]
    assert len(rows) == len(table)
    scan = sitk.ReadImage(str(job / "scans" / "images" / f"{folder.name}.nii.gz"))
    for row in rows:
        there = scan.TransformContinuousIndexToPhysicalPoint(row["index_zyx"][::-1])
        assert (row["x"], row["y"], row["z"]) == pytest.approx(there, abs=1e-3)


def test_evaluate_and_report(voxelscale: Command, job: Path, tmp_path: Path) -> None:
    code, out, _ = voxelscale("evaluate", job / "predictions", job / "scans")
    assert code == 0
    summary = json.loads((job / "predictions" / "evaluation.json").read_text())
    assert f"Dice {summary['dice']['mean']:.3f}" in out
    assert f"surface Dice {summary['surface_dice'][0]['mean']:.3f} within 1 mm" in out
    found = {row["value"]: row["lesions"] for row in summary["nodules"]["kind"]}
    assert sum(found.values()) == summary["lesion_count"]
    assert all(f"kind {kind}" in out for kind in found)
    assert sum(row["lesions"] for row in summary["sizes"]) == summary["lesion_count"]
    with (job / "predictions" / "cases.csv").open() as handle:
        assert "surface_dice_1mm" in next(csv.DictReader(handle))
    code, out, _ = voxelscale("compare", *[job / "predictions"] * 2, job / "scans", "--json")
    same = json.loads(out)["measures"]["dice"]
    # Too few scans for a p-value.
    assert (code, same["a"], same["difference"], same["p"]) == (0, summary["dice"]["mean"], 0, None)
    page = tmp_path / "report.html"
    code, out, _ = voxelscale(
        "report", job / "predictions", job / "scans", "--run", job / "run", "--out", page
    )
    assert (code, out) == (0, f"report in {page}\n")
    html = page.read_text()
    assert f"{summary['dice']['mean']:.3f}" in html
    assert f"HD95 {summary['hd95_mm']['median']:.1f} mm" in html
    for row in summary["sizes"]:
        assert (f"<td>{size_name(row)}</td>" in html) == (row["lesions"] > 0)
    # The case, and what went wrong in it: the most confident false positive or the largest missed lesion.
    assert html.count('<svg class="slice"') == 4 * 2
    assert html.count('<svg class="chart"') == 3


def test_the_same_command_keeps_what_is_done(voxelscale: Command, job: Path, config_file: Path) -> None:
    mask = next((job / "predictions").glob("*/mask.nii.gz"))
    before = mask.stat().st_mtime_ns
    arguments = ["predict", job / "run", job / "scans", job / "predictions", "--store", job / "store"]
    assert voxelscale(*arguments)[0] == 0
    assert mask.stat().st_mtime_ns == before
    assert voxelscale(*arguments, "--set", "predict.threshold=0.6")[0] == 0
    assert mask.stat().st_mtime_ns > before
    code, out, _ = voxelscale("prepare", job / "scans", job / "store", "--config", config_file)
    assert (code, "5 of them kept" in out) == (0, True)
    code, out, _ = voxelscale("train", job / "store", job / "run")
    assert (code, out) == (0, f"model in {job / 'run' / 'model.vxs'}\n")


def test_ranks_share_the_scans_out(
    voxelscale: Command, job: Path, config_file: Path, tmp_path: Path
) -> None:
    what = [job / "run", job / "scans"]
    more = ["--config", config_file, "--store", job / "store", "--split", "train", "--quiet"]
    assert voxelscale("predict", *what, tmp_path / "alone", *more)[0] == 0
    done = in_two_ranks("predict", *what, tmp_path / "shared", *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("masks and findings in") == 1
    cases = sorted(p.name for p in (tmp_path / "alone").iterdir() if p.is_dir())
    assert len(cases) == 3
    for case in cases:
        alone, shared = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / how / case / "mask.nii.gz")))
            for how in ("alone", "shared")
        )
        assert np.array_equal(alone, shared)
    assert_same_findings(tmp_path / "alone", tmp_path / "shared")


def test_ranks_look_at_one_scan_together(voxelscale: Command, job: Path, tmp_path: Path) -> None:
    """Two ranks, each a part of the windows; then with a scan that is torn."""
    good = sorted((job / "scans" / "images").iterdir())[0]
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "good.nii.gz").write_bytes(good.read_bytes())
    assert voxelscale("predict", job / "run", scans, tmp_path / "alone", "--quiet")[0] == 0
    done = in_two_ranks("predict", job / "run", scans, tmp_path / "shared", "--quiet")
    assert done.returncode == 0, done.stderr
    # The copies do not say that they are phantoms: one warning, from rank 0 alone.
    assert done.stderr.count("synthetic scans only") == 1
    assert_same_findings(tmp_path / "alone", tmp_path / "shared")
    # What is there stays; a scan that no rank can read is told once, and holds nobody up.
    before = (tmp_path / "shared" / "good" / "mask.nii.gz").stat().st_mtime_ns
    (scans / "torn.nii.gz").write_bytes(good.read_bytes()[:3000])
    done = in_two_ranks("predict", job / "run", scans, tmp_path / "shared", "--quiet")
    assert done.returncode != 0
    assert done.stderr.count("1 not predicted: torn") == 1
    assert (tmp_path / "shared" / "good" / "mask.nii.gz").stat().st_mtime_ns == before
    assert_same_findings(tmp_path / "alone", tmp_path / "shared")


def in_two_ranks(*arguments: object) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "voxelscale.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def assert_same_findings(one: Path, other: Path) -> None:
    """Two folders of predictions have the same table, to a rounding."""
    tables = [list(csv.reader((folder / "findings.csv").open())) for folder in (one, other)]
    assert [row[0] for row in tables[0]] == [row[0] for row in tables[1]]
    alone, shared = (np.asarray([row[1:] for row in table[1:]], float) for table in tables)
    assert np.allclose(alone, shared, atol=1e-3)


def test_a_folder_of_predictions_has_one_table_whatever_the_commands(
    voxelscale: Command, job: Path, tmp_path: Path
) -> None:
    """Predicted case by case, the table holds all of them; those of another model are left out."""
    images = sorted((job / "scans" / "images").iterdir())[:3]
    for image in images[:2]:
        assert voxelscale("predict", job / "run", image, tmp_path / "each")[0] == 0
    together = tmp_path / "two"
    together.mkdir()
    for image in images[:2]:
        (together / image.name).symlink_to(image)
    assert voxelscale("predict", job / "run", together, tmp_path / "both")[0] == 0
    table = (tmp_path / "both" / "findings.csv").read_text()
    assert (tmp_path / "each" / "findings.csv").read_text() == table
    assert len(table.splitlines()) > 1

    other = read_bundle(job / "run")
    weights = {name: weight * 1.01 for name, weight in other.weights.items()}
    write_bundle(tmp_path / "other.vxs", replace(other, weights=weights))
    code, _, errors = voxelscale("predict", tmp_path / "other.vxs", images[2], tmp_path / "each")
    assert code == 0
    assert "each: 2 cases of another model" in errors
    cases = {
        line.split(",")[0] for line in (tmp_path / "each" / "findings.csv").read_text().splitlines()[1:]
    }
    assert cases <= {images[2].name.removesuffix(".nii.gz")}


def test_a_broken_scan_does_not_stop_the_others(voxelscale: Command, job: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    good = next((job / "scans" / "images").iterdir())
    (scans / "good.nii.gz").write_bytes(good.read_bytes())
    (scans / "torn.nii.gz").write_bytes(good.read_bytes()[:3000])
    code, out, err = voxelscale("predict", job / "run", scans, tmp_path / "out")
    assert code == 2
    assert "good: " in out
    assert "error: " in err
    assert "torn.nii.gz" in err
    assert "1 not predicted: torn" in err
    assert (tmp_path / "out" / "good" / "mask.nii.gz").is_file()
    assert not (tmp_path / "out" / "torn").exists()


def test_an_oblique_flipped_scan_is_found_at_the_same_place(
    voxelscale: Command, job: Path, tmp_path: Path
) -> None:
    """Axes stored in another order and direction: the same patient, the same positions in mm."""
    source = next((job / "scans" / "images").iterdir())
    image = sitk.ReadImage(str(source))
    turned = sitk.PermuteAxes(sitk.Flip(image, [True, False, True]), [2, 0, 1])
    sitk.WriteImage(image, str(tmp_path / "plain.mha"))
    sitk.WriteImage(turned, str(tmp_path / "turned.mha"))
    for name in ("plain", "turned"):
        assert voxelscale("predict", job / "run", tmp_path / f"{name}.mha", tmp_path / name)[0] == 0
    masks = {
        name: sitk.ReadImage(str(tmp_path / name / name / "mask.nii.gz")) for name in ("plain", "turned")
    }
    assert masks["turned"].GetDirection() == pytest.approx(turned.GetDirection(), abs=1e-6)
    back = sitk.Resample(masks["turned"], masks["plain"], sitk.Transform(), sitk.sitkNearestNeighbor)
    assert np.array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(masks["plain"]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepare", "nowhere", "store"], "nowhere"),
        (["prepare", "no\nwhere\x1b[2J\udcff", "store"], r"no\nwhere\x1b[2J\udcff"),
        (["train", "nowhere", "run"], "nowhere"),
        (["predict", "nowhere", "scans", "out"], "nowhere"),
        (["evaluate", "nowhere", "scans"], "scans"),
        (["compare", "nowhere", "neither", "scans"], "scans"),
        (["report", "nowhere", "scans"], "scans"),
        (["phantom", "out", "--set", "phantom.cases=0"], "phantom.cases is 0"),
        (["phantom", "out", "--config", "no.yaml"], "no.yaml"),
        (["config", "--set", "train.sample=3"], "train.sample"),
        (["predict", "starter", "scans", "out", "--split", "val"], "--split without --store"),
        (["phantom", "out", "--copies", "3"], "--copies without --into"),
        (["phantom", "out", "--originals"], "--originals without --into"),
    ],
)
def test_mistakes_are_two_lines(
    voxelscale: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = voxelscale(*arguments)
    lines = err.strip().splitlines()
    assert (code, out, len(lines)) == (2, "", 2), err
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert lines[1].startswith("hint: ")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"\x80\x02cos\nsystem\n"])
def test_a_hostile_model_is_refused(voxelscale: Command, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.vxs").write_bytes(content)
    code, _, err = voxelscale("predict", tmp_path / "model.vxs", tmp_path, tmp_path / "out")
    assert code == 2
    assert "Traceback" not in err


def test_a_pipe_that_is_closed_is_no_fault_of_the_disk() -> None:
    command = [sys.executable, "-m", "voxelscale.cli", "config", "--markdown"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    process.stdout.close()  # before anything is written, as head does after its lines
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_a_command_without_standard_output_is_done() -> None:
    """As of a service; Python has no stdout then."""
    command = [sys.executable, "-m", "voxelscale.cli", "config", "--markdown"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_name_that_the_terminal_cannot_show() -> None:
    command = [sys.executable, "-m", "voxelscale.cli", "config", "--set", "phantom.shapes=患.sqlite"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"shapes: \u60a3.sqlite" in done.stdout


def _ended_by_the_system(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_worker_that_the_system_ends_is_an_error_with_a_hint() -> None:
    work = map_processes(_ended_by_the_system, [0, 1], label="prepare", name=str, workers=1)
    with pytest.raises(VoxelscaleError, match="prepare: the system ended one of its processes"):
        list(work)


def test_quiet_anywhere(voxelscale: Command, tmp_path: Path, config_file: Path) -> None:
    code, out, err = voxelscale("phantom", tmp_path / "a", "--cases", 1, "--config", config_file, "--quiet")
    assert (code, err) == (0, "")
    assert "1 phantom in" in out
    assert "phantom: 1/1" in voxelscale("phantom", tmp_path / "b", "--cases", 1, "--config", config_file)[2]


def begin_phantoms(config_file: Path, out: Path, *, workers: bool = False) -> subprocess.Popen[str]:
    """A command that makes 60 phantoms, as soon as some are there, or as soon as it starts processes."""
    command = [sys.executable, "-m", "voxelscale.cli", "phantom", str(out), "--config", str(config_file)]
    command += ["--cases", "60"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60

    def begun() -> bool:
        if not workers:
            return any(out.glob("truth/*.json"))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return any(b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)

    while not begun():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_nothing_goes_on_when_a_command_is_killed(config_file: Path, tmp_path: Path) -> None:
    process = begin_phantoms(config_file, tmp_path)
    process.kill()
    process.communicate(timeout=30)  # until nobody holds the other end
    assert len(list(tmp_path.glob("truth/*.json"))) < 60


def test_ctrl_c_while_workers_start_is_one_line(config_file: Path, tmp_path: Path) -> None:
    process = begin_phantoms(config_file, tmp_path, workers=True)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-2:] == [
        "error: interrupted",
        "hint: the same command resumes where this one stopped",
    ]
    assert "Traceback" not in err


def test_ctrl_c_leaves_nothing_half_written(tiny: Config, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "scans"
    process = begin_phantoms(config_file, out)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everybody
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "the same command resumes" in err
    done = len(list(out.glob("truth/*.json")))
    assert 0 < done < 60
    files = [p.name for folder in ("images", "labels") for p in (out / folder).iterdir()]
    assert not [name for name in files if name.startswith(".")]
    again = write_phantoms(replace(tiny.phantom, cases=done), out, workers=1)
    assert len(list_sources(again)) == done
