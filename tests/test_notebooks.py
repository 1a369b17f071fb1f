"""The notebooks run from top to bottom in a real kernel, as `jupyter execute` runs them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"


def opened(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def kinds(notebook: Any) -> list[set[tuple[str, ...]]]:
    """What each code cell gave: texts, tables, figures."""
    outputs = (cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    return [{(one.output_type, *sorted(one.get("data", ()))) for one in each} for each in outputs]


@pytest.mark.slow
@pytest.mark.usefixtures("cold_starts")
@pytest.mark.parametrize("name", ["scan_to_findings", "own_network"])
def test_a_notebook_runs_and_gives_what_is_shown(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = FOLDER / f"{name}.ipynb"
    kept, run = opened(path), opened(path)
    NotebookClient(run, timeout=1200, kernel_name="python3").execute()
    assert kinds(run) == kinds(kept)
    # A command's exit code is not the cell's: what failed only says so.
    printed = [one.get("text", "") for cell in run.cells for one in cell.get("outputs", ())]
    assert not [text for text in printed if "error:" in text or "Traceback" in text]


def test_the_notebooks_are_whole_and_small() -> None:
    for path in FOLDER.glob("*.ipynb"):
        nbformat.validate(opened(path))
        assert path.stat().st_size < 100_000, path.name
