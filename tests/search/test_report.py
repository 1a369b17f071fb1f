"""What the page and the status say about a search, read back from them."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tests.pages import checked

from voxelscale.pages.charts import Frame, draw_axes, log_ticks
from voxelscale.search.axes import axis_of, shading_of
from voxelscale.search.figures import duration, param_text, value_range, value_text
from voxelscale.search.report import status_table, write_report
from voxelscale.search.results import SearchResults, State, Stretch, TrialResult, Value, utilisation
from voxelscale.search.timeline import busy_share, device_spans, period

NOW = 10_000.0
VOID = {"meta", "br"}
KEYS = ("optim.name", "optim.lr", "optim.momentum", "model.depth", "data.patch_size", "augment.enabled")
EVIL = '<img src="x" onerror=1> & "$body"'


class Balanced(HTMLParser):
    """Fails on a tag that is not closed where it should be; counts the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def trial(number: int, state: State, *values: float, **more: Any) -> TrialResult:
    params: dict[str, Value] = {"optim.name": "adamw", "optim.lr": 1e-3 * (number + 1), "model.depth": 3}
    return TrialResult(number=number, state=state, values=values, **{"params": params, **more})


def search(*trials: TrialResult, **more: Any) -> SearchResults:
    facts: dict[str, Any] = {
        "name": "lesions",
        "objectives": ("dice",),
        "maximise": (True,),
        "keys": KEYS,
        "log": frozenset({"optim.lr"}),
        "target": 60,
        "sampler": "tpe",
        "pruner": "asha",
    }
    return SearchResults(trials=trials, **{**facts, **more})


def many(count: int, objectives: tuple[str, ...] = ("dice",)) -> SearchResults:
    """A plausible search with every state, conditional keys and lists."""
    chance, trials = random.Random(1), []
    states: list[State] = ["done", "pruned", "done", "infeasible", "done", "diverged", "failed", "running"]
    for number in range(count):
        state, dice = states[number % 8], chance.uniform(0.1, 0.9)
        params: dict[str, Value] = {
            "optim.name": chance.choice(["adamw", "sgd"]),
            "optim.lr": 10 ** chance.uniform(-4, -2),
            "model.depth": chance.choice([2, 3, 4]),
            "data.patch_size": chance.choice(["[32, 32, 32]", "[16, 32, 32]", "[128, 128, 128]"]),
            "augment.enabled": chance.choice([True, False]),
        }
        if params["optim.name"] == "sgd":
            params["optim.momentum"] = chance.uniform(0.8, 0.99)
        begun = 1000.0 + 15 * number
        stretch = Stretch(
            worker=f"node{number % 4}",
            devices=(f"node{number % 4}/0",),
            begun=begun,
            ended=None if state == "running" else begun + 50,
        )
        drawn = {"dice": dice, "time": chance.uniform(10, 9000), "parameters": chance.uniform(1e5, 1e8)}
        trials.append(
            TrialResult(
                number=number,
                state=state,
                params=params,
                values=tuple(drawn[name] for name in objectives) if state == "done" else (),
                curve=() if state in ("infeasible", "failed") else ((500, dice / 2), (5000, dice)),
                stretches=(stretch,),
                note="no memory" if state == "infeasible" else "",
            )
        )
    more = tuple(name == "dice" for name in objectives)
    importances = {"optim.lr": 0.7, "model.depth": 0.3}
    return search(*trials, objectives=objectives, maximise=more, importances=importances)


def written(results: SearchResults, folder: Path) -> tuple[str, Balanced]:
    write_report(results, folder / "report.html", NOW)
    html = (folder / "report.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    for drawn in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        for element in ElementTree.fromstring(drawn).iter():
            for place in ("d", "x", "y", "cx", "cy", "width", "height"):
                numbers = re.findall(r"nan|inf|-?[\d.]+", element.get(place) or "")
                assert all(math.isfinite(float(n)) for n in numbers)
    assert not re.search(r'(src|href)="', html)  # nothing is loaded from elsewhere
    return html, parser


def classed(parser: Balanced, tag: str, *names: str) -> list[dict[str, str | None]]:
    return [a for t, a in parser.seen if t == tag and set(names) <= set((a.get("class") or "").split())]


def test_the_page_of_a_whole_search(tmp_path: Path) -> None:
    results = many(64)
    html, parser = written(results, tmp_path)
    best = results.best
    assert best is not None
    assert f"<b>{best.values[0]:.4f}</b><span>trial {best.number}</span>" in html
    for state, count in {"done": 24, "pruned": 8, "failed": 8, "running": 8, "waiting": 0}.items():
        assert f'class="key is-{state}">{count} {state}<' in html
    assert f"best, trial {best.number}" in html
    assert "6 keys · sampler tpe" in html
    assert "--config best.yaml" in html
    assert "70.0 %" in html
    assert "PED-ANOVA (Watanabe, Bansal, Hutter, IJCAI 2023)" in html
    assert f"{100 * utilisation(results, NOW):.1f} %" in html
    assert len(classed(parser, "path", "strand", "ghost")) == 8
    assert len(classed(parser, "path", "strand")) == 24 + 8
    assert len(classed(parser, "path", "strand", "is-best")) == 1
    assert len(classed(parser, "circle", "ring")) >= len(best.params)
    assert "Pareto front" not in html
    rows = re.search(r'<table class="sortable">.*?<tbody>(.*?)</tbody>', html, re.DOTALL)
    assert rows is not None
    assert rows[1].count("<tr>") == 64
    assert rows[1].count("no memory") == 8


def test_the_default_stands_beside_the_best(tmp_path: Path) -> None:
    results = search(trial(0, "done", 0.5), trial(1, "done", 0.75, params={"optim.momentum": 0.9}))
    html, _ = written(results, tmp_path)
    assert "<td>Dice</td><td><b>0.7500</b></td><td>0.5000</td>" in html
    assert "<td>optim.momentum</td><td><b>0.9</b></td><td>–</td>" in html
    assert "<td>optim.lr</td><td><b>–</b></td><td>0.001</td>" in html


def test_least_is_best_where_it_is(tmp_path: Path) -> None:
    results = search(
        trial(0, "done", 90.0), trial(1, "done", 30.0), objectives=("time",), maximise=(False,)
    )
    html, _ = written(results, tmp_path)
    assert "Best time</span><b>30 s</b><span>trial 1<" in html
    shading = shading_of(results)
    assert shading.of(30.0) > shading.of(60.0) > shading.of(90.0)
    assert "best time 30 s (trial 1)" in status_table(results, NOW)


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [trial(0, "waiting")],
        [trial(0, "running", stretches=(Stretch(worker="a", devices=("a/0",), begun=NOW, ended=None),))],
        [trial(0, "done", 0.0, curve=((100, 0.0),))],
        [trial(0, "done", 0.5, curve=((0, 0.5), (100, 0.5)), params={})],
        [trial(0, "failed", note="it broke"), trial(1, "pruned", curve=((10, 0.1),))],
        [trial(n, "done", 0.5, curve=((5, 0.5),), params=dict.fromkeys(KEYS, 7)) for n in range(5)],
        [trial(n, "done", 0.1 * n, params={KEYS[0]: [None, True, 1, "1"][n]}) for n in range(4)],
    ],
)
def test_little_is_no_fault(trials: list[TrialResult], tmp_path: Path) -> None:
    html, _ = written(search(*trials), tmp_path)
    assert "Pareto front" not in html
    two = [replace(t, values=(*t.values, 5.0) if t.values else ()) for t in trials]
    results = search(*two, objectives=("dice", "time"), maximise=(True, False))
    html, _ = written(results, tmp_path)
    assert "Pareto front" in html
    assert "lesions: " in status_table(results, NOW)
    assert "no key" not in written(search(*trials, keys=()), tmp_path)[0]


def test_nothing_is_named_best_without_a_done_trial(tmp_path: Path) -> None:
    results = search(trial(0, "pruned", curve=((500, 0.9),)))
    html, _ = written(results, tmp_path)
    assert "--config best.yaml" not in html
    assert "is-best" not in html.split("</style>")[2]
    assert "is-best" in written(search(trial(0, "done", 0.9)), tmp_path)[0].split("</style>")[2]
    assert "no best yet" in status_table(results, NOW)


def test_text_is_escaped(tmp_path: Path) -> None:
    work = Stretch(worker=EVIL, devices=(EVIL,), begun=1.0, ended=9.0)
    bad = trial(0, "done", 0.5, params={EVIL: EVIL}, stretches=(work,), note=EVIL)
    more = {"objectives": ("dice", EVIL), "maximise": (True, True)}
    two = replace(bad, values=(0.5, 0.5))
    facts = {"name": EVIL, "keys": (EVIL,), "sampler": EVIL, "importances": {EVIL: 1.0}}
    html, parser = written(search(two, **more, **facts), tmp_path)
    assert not classed(parser, "img")
    assert not any(tag == "img" for tag, _ in parser.seen)
    assert html.count("&lt;img") > 10


def test_the_front(tmp_path: Path) -> None:
    points = [(0.5, 10.0), (0.8, 30.0), (0.7, 40.0), (0.8, 50.0), (0.9, 60.0), (0.4, 20.0)]
    trials = [trial(n, "done", *values) for n, values in enumerate(points)]
    trials.append(trial(6, "pruned", curve=((5, 0.99),)))
    results = search(*trials, objectives=("dice", "time"), maximise=(True, False))
    assert [t.number for t in results.front] == [0, 1, 4]
    html, _ = written(results, tmp_path)
    section = html.split("<h2>Pareto front</h2>")[1].split("<h2>")[0]
    shown = re.findall(r'class="dot is-done".*?<title>trial (\d+)', section)
    assert sorted(shown) == ["0", "1", "4"]
    assert len(re.findall(r'class="dot is-rest"', section)) == 3
    assert re.findall(r"<tr><td>(\d+)</td>", section) == ["4", "1", "0"]
    # The stairs go through all of the front: an end, a corner for each further one, an end.
    stairs = re.search(r'class="line is-best" d="([^"]*)"', section)
    assert stairs is not None
    assert stairs[1].count("H") == 4


@pytest.mark.parametrize("more", [(True, True), (True, False), (False, True), (False, False)])
def test_stairs_touch_the_front_whatever_is_better(more: tuple[bool, bool], tmp_path: Path) -> None:
    chance = random.Random(0)
    trials = [trial(n, "done", chance.random(), chance.random()) for n in range(30)]
    results = search(*trials, objectives=("a", "b"), maximise=more)
    html, _ = written(results, tmp_path)
    section = html.split("<h2>Pareto front</h2>")[1].split("<h2>")[0]
    stairs = re.search(r'class="line is-best" d="([^"]*)"', section)
    assert stairs is not None
    x, y = map(float, re.findall(r"M([\d.]+) ([\d.]+)", stairs[1])[0])
    corners = {(x, y)}
    for step, value in re.findall(r"([HV])([\d.]+)", stairs[1]):
        x, y = (float(value), y) if step == "H" else (x, float(value))
        corners.add((x, y))
    marks = re.findall(r'class="dot is-done" cx="([\d.]+)" cy="([\d.]+)"', section)
    assert len(marks) == len(results.front) > 1
    assert {(float(x), float(y)) for x, y in marks} <= corners


def test_values_out_of_scale_do_not_squeeze_the_rest() -> None:
    worst, best = value_range([0.8, 0.82, 0.84, 0.85, 0.01], more=True)
    assert best == 0.85
    assert 0.7 < worst < 0.8
    assert value_range([10.0, 11.0, 12.0, 900.0], more=False) == (13.0, 10.0)
    assert value_range([0.5], more=True) == (0.5, 0.5)


def test_scales_of_keys() -> None:
    results = many(64)
    rate = axis_of(results, "optim.lr")
    assert rate.log
    middle = math.sqrt(rate.low * rate.high)
    assert rate.share(middle) == pytest.approx(0.5)
    patch = axis_of(results, "data.patch_size")
    assert [text for _, text in patch.marks] == ["16×32×32", "32×32×32", "128×128×128"]
    assert patch.at("[32, 32, 32]") == 1.0
    assert [text for _, text in axis_of(results, "model.depth").marks] == ["2", "3", "4"]
    assert [text for _, text in axis_of(results, "augment.enabled").marks] == ["false", "true"]
    assert axis_of(results, "optim.momentum").choices == ()
    mixed = [trial(n, "done", 0.5, params={"k": value}) for n, value in enumerate((1, True, "1", None))]
    axis = axis_of(search(*mixed), "k")
    assert len({axis.at(value) for value in (1, True, "1", None)}) == 4


def test_devices() -> None:
    stretches = (
        Stretch(worker="a", devices=("a/0", "a/1"), begun=100.0, ended=200.0),
        Stretch(worker="b", devices=("b/0",), begun=300.0, ended=None),
    )
    again = Stretch(worker="a", devices=("a/0",), begun=300.0, ended=400.0)
    results = search(trial(0, "running", stretches=stretches), trial(1, "done", 0.5, stretches=(again,)))
    spans = device_spans(results, 500.0)
    assert list(spans) == ["a/0", "a/1", "b/0"]
    assert [busy_share(own) for own in spans.values()] == pytest.approx([200 / 300, 1.0, 1.0])
    assert period(results, 500.0) == (100.0, 500.0)
    assert period(search(results.trials[1]), 500.0) == (300.0, 400.0)
    assert period(search(), 500.0) == (500.0, 500.0)


def test_the_page_of_many_trials_is_small(tmp_path: Path) -> None:
    written(many(500), tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_status() -> None:
    work = Stretch(worker="node7", devices=("node7/0",), begun=NOW - 90, ended=None)
    dice = [0.5, 0.9, 0.7, 0.6, 0.8, 0.4]
    done = [trial(n, "done", value) for n, value in enumerate(dice)]
    running = trial(6, "running", curve=((1500, 0.25), (3000, 0.375)), stretches=(work,))
    results = search(*done, running, trial(7, "infeasible"), keys=("optim.lr", "model.depth"))
    head, now, best = status_table(results, NOW).split("\n\n")
    assert head.startswith("lesions: 6 done, 1 running, 1 infeasible of 60; devices 100.0 % busy;")
    assert head.endswith("best Dice 0.9000 (trial 1)")
    assert now.splitlines()[1].split() == ["6", "node7", "0.3750", "3,000", "1.5"]
    rows = [line.split() for line in best.splitlines()]
    assert rows[0] == ["best", "Dice", "lr", "depth"]
    assert [row[0] for row in rows[1:]] == ["1", "4", "2", "3", "0"]
    assert rows[1] == ["1", "0.9000", "0.002", "3"]
    assert len({len(line) for line in best.splitlines()}) == 1


def test_status_of_nothing() -> None:
    assert status_table(search(), NOW) == (
        "lesions: 0 done, 0 running of 60; devices 0.0 % busy; no best yet"
    )


def test_figures_as_text() -> None:
    assert [duration(s) for s in (1.25, 45, 150, 7300, 200_000)] == [
        "1.2 s",
        "45 s",
        "2.5 min",
        "2.0 h",
        "2.3 d",
    ]
    assert value_text("parameters", 1_234_567) == "1.23M"
    assert [param_text(v) for v in (True, None, 1e-5, 3, "a")] == ["true", "null", "1e-5", "3", "a"]


@pytest.mark.parametrize(("low", "high"), [(1e-4, 1e-2), (3.0, 4.0), (1e-9, 1e9), (0.5, 0.5), (7.0, 7.1)])
def test_ticks_of_a_logarithmic_axis(low: float, high: float) -> None:
    ticks = log_ticks(low, high, 5)
    assert len(ticks) <= 6
    assert ticks == sorted(ticks)
    assert all(low * 0.99 <= tick <= high * 1.01 for tick in ticks)


def test_marks_too_long_for_one_row_take_two() -> None:
    frame = Frame(x=(0, 3), y=(0, 1), width=340)
    for text, rows in (("ab", 1), ("[128, 128, 128]", 2)):
        drawn = draw_axes(frame, x_label="", x_marks=[(i, text) for i in range(4)])
        heights = re.findall(rf'y="([\d.]+)" text-anchor="middle">{re.escape(text)}', drawn)
        assert len(set(heights)) == rows


def test_axes_of_what_cannot_be_negative_start_at_0(tmp_path: Path) -> None:
    trials = [trial(0, "done", 0.0, curve=((100, 0.0),)), trial(1, "done", 0.0, curve=((100, 0.0),))]
    html, _ = written(search(*trials), tmp_path)
    assert not re.search(r'text-anchor="(?:end|middle)">-\d', html)
    checked(html)


def test_the_wide_parts_of_the_page_scroll_by_keyboard(tmp_path: Path) -> None:
    html, _ = written(many(64, ("dice", "time")), tmp_path)
    page = checked(html)
    assert len(page.all("div", "scroll")) == 4  # importances, parallel coordinates, devices, front
    assert len(page.all("div", "wide")) == 3  # best parameters, front, trials


def test_a_trial_worse_than_the_scale_is_a_stroke_and_no_dot(tmp_path: Path) -> None:
    values = [0.8, 0.82, 0.84, 0.85, 0.01]
    html, _ = written(search(*(trial(n, "done", value) for n, value in enumerate(values))), tmp_path)
    depth = next(
        f for f in re.findall(r"<figure>.*?</figure>", html, re.DOTALL) if "against model.depth" in f
    )
    assert depth.count("h0") == 4
    assert depth.count("v-7") == 1
