"""The documentation site: whole, without a warning, and with nothing that is loaded from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer

from voxelscale import api, cli

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(out / "trees")]
    done = subprocess.run(
        [*sphinx, ROOT / "docs", out / "html"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return out / "html"


class Page(HTMLParser):
    """What a page loads by itself, where its links lead, and its ids."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.add(given.get("id", ""))
        self.loads += [given[name] for name in ("src", "srcset", "poster", "data") if name in given]
        if "href" in given:
            (self.links if tag == "a" else self.loads).append(given["href"])


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_missing(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 20
    for path, page in pages.items():
        for url in page.loads:
            assert url.startswith("data:image/") or not urlsplit(url).netloc, f"{path.name} loads {url}"
        for url in (*page.loads, *page.links):
            parts = urlsplit(url)
            if not parts.scheme and not parts.netloc and parts.path:
                assert (path.parent / unquote(parts.path)).exists(), f"{path.name}: {url}"
    for sheet in site.rglob("*.css"):
        told = re.findall(r"(?:@import|url\()[^;)]*//[^;)]*", sheet.read_text(encoding="utf-8"))
        assert [url for url in told if "data:" not in url] == [], sheet.name


def test_every_command_and_every_public_name_is_explained(site: Path) -> None:
    commands = Page(site / "reference" / "commands.html").ids
    root = typer.main.get_command(cli.app)
    assert {name for name in root.commands if name not in commands} == set()  # type: ignore[attr-defined]
    functions = Page(site / "reference" / "api.html").ids
    assert {name for name in api.__all__ if f"voxelscale.api.{name}" not in functions} == set()


def test_a_notebook_is_shown_with_what_its_cells_gave(site: Path) -> None:
    page = (site / "tutorials" / "scan_to_findings.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page
    assert "<th>diameter_mm</th>" in page
    assert "not a scan for this model" in page
