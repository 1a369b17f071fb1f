"""Which number of workers is worth its price, against sums by hand, and how the page says it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.pages import checked
from tests.scale.test_figure import costed, study

from voxelscale.scale.advice import Prices, advice, best, verdict
from voxelscale.scale.report import write_results

EVEN = [0.8, 0.8]
ALL = (1, 2, 4, 8, 16, 32, 64)


def test_the_knee_by_hand() -> None:
    """10 s of start and 64 s of work: 74, 42, 26, 18, 14, 12, 11 s."""
    findings = costed(study(*(("a", n, EVEN) for n in ALL)), start=10.0)
    product = {f.row.workers: f.row.workers * (10 + 64 / f.row.workers) ** 2 for f in findings}
    assert [f.time.total for f in findings] == [74, 42, 26, 18, 14, 12, 11]
    chosen = best(findings, 0.9)
    assert chosen is not None
    assert chosen.row.workers == min(product, key=lambda n: product[n]) == 8
    lines = advice(findings, 0.9, Prices(per_hour=3600.0, watts=3.6e6, node_devices=4))
    # 8 workers for 18 s are 144 device seconds, against 74.
    assert lines[0].startswith("Worth its price: 8 workers on 2 nodes with the recipe a. ")
    assert "takes 18 s and 0.04 device hours (price 144; 144 kWh)" in lines[0]
    assert "4.11 times as fast as one worker, for 1.95 times its device hours" in lines[0]
    assert "compute for 44 % of that time" in lines[0]
    assert lines[1:] == [
        "Fastest: 64 workers with a, 11 s, for 4.89 times the device hours of the above.",
        "Cheapest: 1 worker with a, 0.0206 device hours, but 1.23 min.",
    ]


def test_dice_that_is_lost_or_not_certain_is_not_recommended() -> None:
    rows = study(("a", 1, EVEN), ("a", 2, [0.798, 0.8]), ("a", 4, [0.6, 0.9]), ("a", 8, [0.5, 0.5]))
    assert [verdict(row, 0.9) for row in rows] == ["kept", "kept", "not certain", "lost"]
    chosen = best(costed(rows, 10.0), 0.9)
    assert chosen is not None
    assert chosen.row.workers == 2
    lines = advice(costed(rows, 10.0), 0.9, Prices())
    assert "Not recommended: a with 8 workers; that does not keep 90 % of one worker's Dice." in lines
    assert not any("(price" in line or "kWh" in line for line in lines), "no price is known"


def test_one_seed_is_never_certain() -> None:
    rows = study(("a", 1, [0.8]), ("a", 2, [0.8]), ("b", 2, [0.0]))
    assert [verdict(row, 0.9) for row in rows] == ["not certain", "not certain", "lost"]
    first, second, third = advice(costed(rows), 0.9, Prices())
    assert first.startswith("Worth its price: 2 workers")
    assert second.startswith("It is not certain that this keeps 90 % of one worker's Dice")
    assert third == "Not recommended: b with 2 workers; that does not keep 90 % of one worker's Dice."


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([("a", 2, EVEN), ("a", 4, EVEN)], "one worker was not trained"),
        ([("a", 1, [0.0, 0.0]), ("a", 2, EVEN)], "one worker was not trained"),
    ],
)
def test_nothing_is_recommended_without_one_worker(
    rows: list[tuple[str, int, list[float]]], why: str
) -> None:
    found = costed(study(*rows))
    assert {verdict(f.row, 0.9) for f in found} == {"unknown"}
    (line,) = advice(found, 0.9, Prices())
    assert why in line


def test_the_page_says_it(tmp_path: Path) -> None:
    findings = costed(study(*(("<r>", n, EVEN) for n in ALL)), start=10.0)
    prices = Prices(per_hour=2.5, watts=400.0, node_devices=4)
    facts = {"cluster": {"title": "a <cluster>"}, "machine": "one core", "notes": ["how"]}
    write_results(findings, facts, tmp_path, 0.9, prices)
    html = (tmp_path / "scaling.html").read_text(encoding="utf-8")
    page = checked(html)
    shown = re.sub(r"<[^>]*>", " ", html)
    assert "a &lt;cluster&gt;" in html
    assert "timed on one core" in shown
    assert "Worth its price: 8 workers on 2 nodes" in shown
    assert len(page.all("div", "card")) == 4
    first = html[html.index("What a training costs</h2>") :]
    head = re.findall(r'<th scope="col">(.*?)</th>', first[: first.index("</thead>")])
    assert head == [
        *("recipe", "workers", "nodes", "time of a training", "device hours", "price", "kWh"),
        *("Dice (95 % interval)", "Dice, % of 1 worker", "devices busy, %", "one worker&#x27;s Dice"),
    ]
    eight = re.findall(r"<tr>(.*?)</tr>", first[: first.index("</tbody>")])[4]
    cells = re.findall("<td>(.*?)</td>", eight)
    assert cells[:7] == ["&lt;r&gt;", "8", "2", "18 s", "0.04", "0.1", "0.016"]
    assert cells[-2:] == ["44", "kept"]
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert written["advice"] == advice(findings, 0.9, prices)
    assert written["rows"][3]["price"] == pytest.approx(2.5 * 144 / 3600)
    assert written["rows"][3]["kwh"] == pytest.approx(0.4 * 144 / 3600)


def test_prices_that_are_not_known_are_no_columns(tmp_path: Path) -> None:
    write_results(costed(study(("a", 1, EVEN))), {}, tmp_path, 0.9, Prices())
    html = (tmp_path / "scaling.html").read_text(encoding="utf-8")
    checked(html)
    assert '<th scope="col">price</th>' not in html
    assert '<th scope="col">kWh</th>' not in html
    assert json.loads((tmp_path / "scaling.json").read_text())["rows"][0]["price"] is None
