"""What the page and the status say about a search, and what its figures are handed."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.pages import Page, checked

from voxelscale.search import figures
from voxelscale.search.report import status_table, write_report
from voxelscale.search.results import SearchResults, State, Stretch, TrialResult, Value
from voxelscale.search.study import study_of
from voxelscale.search.text import duration, param_text, value_range, value_text
from voxelscale.search.timeline import busy_share, device_spans, period, utilisation

NOW = 10_000.0
KEYS = ("optim.name", "optim.lr", "optim.momentum", "model.depth", "data.patch_size", "augment.enabled")
EVIL = '<img src="x" onerror=1> & "$body"'


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


def written(results: SearchResults, folder: Path) -> tuple[str, Page]:
    """The page without its scripts, which are Plotly's and the page's own; and its elements."""
    write_report(results, folder / "report.html", NOW)
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = checked(html)
    html = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r'(src|href)="|https?:', html)  # nothing is loaded from elsewhere
    return html, page


def plots(page: Page) -> list[str | None]:
    """The titles of the interactive figures."""
    return [attributes["aria-label"] for attributes in page.all("div", "plot")]


def named(figure: Any, name: str) -> Any:
    return next(trace for trace in figure.data if trace.name == name)


def test_the_page_of_a_whole_search(tmp_path: Path) -> None:
    results = many(64)
    html, page = written(results, tmp_path)
    best = results.best
    assert best is not None
    assert f"<b>{best.values[0]:.4f}</b><span>trial {best.number}</span>" in html
    for state, count in {"done": 24, "pruned": 8, "failed": 8, "running": 8, "waiting": 0}.items():
        assert f'class="key is-{state}">{count} {state}<' in html
    assert f"best, trial {best.number}" in html
    assert "6 keys · sampler tpe" in html
    assert "--config best.yaml" in html
    assert "PED-ANOVA (Watanabe, Bansal, Hutter, IJCAI 2023)" in html
    assert f"{100 * utilisation(results, NOW):.1f} %" in html
    objective = [f"Dice against {key}" for key in KEYS]
    assert plots(page) == [
        "Trials by Dice",
        "Learning curves: validation Dice",
        "Importance of each key",
        "Parallel coordinates",
        "The two most important keys",
        *objective,
        f"When which device worked: {100 * utilisation(results, NOW):.1f} % of the time overall",
    ]
    assert page.all("script")[-3:] == [{}, {}, {}], "Plotly, what draws the figures, the page's own"
    assert "prefers-color-scheme: dark) { .plot { filter: invert" in html
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
    assert figures.history(results).data[-1].y[-1] == 30.0
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
    assert "best so far" not in html
    assert "best so far" in written(search(trial(0, "done", 0.9)), tmp_path)[0]
    assert "no best yet" in status_table(results, NOW)


def test_text_is_escaped(tmp_path: Path) -> None:
    work = Stretch(worker=EVIL, devices=(EVIL,), begun=1.0, ended=9.0)
    bad = trial(0, "done", 0.5, params={EVIL: EVIL}, stretches=(work,), note=EVIL)
    more = {"objectives": ("dice", EVIL), "maximise": (True, True)}
    two = replace(bad, values=(0.5, 0.5))
    facts = {"name": EVIL, "keys": (EVIL,), "sampler": EVIL, "importances": {EVIL: 1.0}}
    html, page = written(search(two, **more, **facts), tmp_path)
    assert not page.all("img")
    assert html.count("&lt;img") > 10


def test_plotly_takes_no_name_for_a_tag_or_a_link(tmp_path: Path) -> None:
    link = '<a href="javascript:alert(1)">here</a></script><script>alert(1)</script>'
    work = Stretch(worker=link, devices=(link,), begun=1.0, ended=9.0)
    facts = {"params": {link: link}, "stretches": (work,), "note": link, "curve": ((5, 0.5),)}
    trials = [trial(n, "done", 0.1 * n, 1.0, **facts) for n in range(3)]
    more: dict[str, Any] = {"objectives": (link, link), "maximise": (True, True)}
    results = search(*trials, trial(3, "pruned", **facts), keys=(link,), importances={link: 1.0}, **more)
    html, _ = written(results, tmp_path)
    drawn = re.findall(r'<script type="application/json">(.*?)</script>', html)
    assert len(drawn) == 7
    for figure in drawn:
        assert "<" not in figure
        assert "javascript" in figure or "alert" not in figure
        assert not re.search(r"(?i)\\u003ca|\\u003cscript", figure), "a tag of the data's"


def test_the_front(tmp_path: Path) -> None:
    points = [(0.5, 10.0), (0.8, 30.0), (0.7, 40.0), (0.8, 50.0), (0.9, 60.0), (0.4, 20.0)]
    trials = [trial(n, "done", *values) for n, values in enumerate(points)]
    trials.append(trial(6, "pruned", curve=((5, 0.99),)))
    results = search(*trials, objectives=("dice", "time"), maximise=(True, False))
    assert [t.number for t in results.front] == [0, 1, 4]
    html, _ = written(results, tmp_path)
    section = html.split("<h2>Pareto front</h2>")[1].split("<h2>")[0]
    assert re.findall(r"<tr><td>(\d+)</td>", section) == ["4", "1", "0"]
    drawn = figures.front(results)
    assert sorted(zip(named(drawn, "on the front").x, named(drawn, "on the front").y, strict=True)) == [
        (10.0, 0.5),
        (30.0, 0.8),
        (60.0, 0.9),
    ]
    assert len(named(drawn, "beaten").x) == 3


@pytest.mark.parametrize("more", [(True, True), (True, False), (False, True), (False, False)])
def test_the_front_is_marked_whatever_is_better(more: tuple[bool, bool]) -> None:
    chance = random.Random(0)
    trials = [trial(n, "done", chance.random(), chance.random()) for n in range(30)]
    results = search(*trials, objectives=("a", "b"), maximise=more)
    front = {(t.values[1], t.values[0]) for t in results.front}
    marks = named(figures.front(results), "on the front")
    assert set(zip(marks.x, marks.y, strict=True)) == front
    assert len(front) > 1


def test_values_out_of_scale_do_not_squeeze_the_rest() -> None:
    worst, best = value_range([0.8, 0.82, 0.84, 0.85, 0.01], more=True)
    assert best == 0.85
    assert 0.7 < worst < 0.8
    assert value_range([10.0, 11.0, 12.0, 900.0], more=False) == (13.0, 10.0)
    assert value_range([0.5], more=True) == (0.5, 0.5)


def test_optuna_gets_the_done_trials_with_their_numbers_and_scales() -> None:
    results = many(64)
    study = study_of(results)
    complete = [t for t in study.trials if t.values]
    assert [(t.number, t.value) for t in complete] == [(t.number, t.values[0]) for t in results.done]
    kinds: dict[str, Any] = {key: kind for t in complete for key, kind in t.distributions.items()}
    assert kinds["optim.lr"].log
    assert kinds["data.patch_size"].choices == ("16×32×32", "32×32×32", "128×128×128")
    assert (kinds["model.depth"].low, kinds["model.depth"].high) == (2, 4)
    assert kinds["augment.enabled"].choices == ("false", "true")
    assert not kinds["optim.momentum"].log
    values: tuple[Value, ...] = (1, True, "1", None)
    mixed = [trial(n, "done", 0.5, params={"k": value}) for n, value in enumerate(values)]
    assert len({t.params["k"] for t in study_of(search(*mixed, keys=("k",))).trials}) == 4


def test_figures_of_a_whole_search() -> None:
    results = many(64)
    history = figures.history(results)
    assert {trace.name: len(trace.x) for trace in history.data if trace.name != "best so far"} == {
        "done": 24,
        "pruned": 8,
        "running": 8,
        "infeasible": 8,
        "diverged": 8,
        "failed": 8,
    }
    assert set(named(history, "failed").marker.symbol) == {"line-ns-open"}, "without a value: strokes"
    best = results.best
    assert best is not None
    assert max(named(history, "best so far").y) == best.values[0]
    curves = figures.curves(results)
    assert named(curves, f"best, trial {best.number}").y[:2] == (best.values[0] / 2, best.values[0])
    assert named(curves, "pruned").x.count(None) == 8, "each trial is a line of its own"
    assert named(curves, "pruned").hovertext[0].startswith("trial 1, pruned: Dice ")
    (bars,) = figures.importances(results).data
    assert (bars.y, bars.text) == (("optim.lr", "model.depth"), ("70.0 %", "30.0 %"))
    lines = [
        trace
        for trace in figures.parallel_coordinates(results, study_of(results)).data
        if trace.mode == "lines"
    ]
    assert len(lines) == 24
    momentum = [dict(trace.customdata)["optim.momentum"] for trace in lines]
    without = [trial for trial in results.done if "optim.momentum" not in trial.params]
    assert momentum.count("None") == len(without) > 0
    slices = figures.slices(results, study_of(results))
    assert list(slices) == list(KEYS)
    assert slices["model.depth"].layout.yaxis.range[0] < slices["model.depth"].layout.yaxis.range[1]
    assert slices["optim.name"].layout.xaxis.ticktext == ("adamw", "sgd")
    done, marked = slices["model.depth"].data
    assert len(done.x) == 24
    assert marked.marker.symbol == ("line-ns-open",) * 8 + ("circle-open",), "pruned, best"
    assert (marked.x[-1], marked.y[-1]) == (best.params["model.depth"], best.values[0])
    contour = figures.contour(results, study_of(results))
    assert contour is not None
    assert contour.layout.xaxis.title.text == "model.depth"
    rows = figures.devices(results, NOW).layout.yaxis.categoryarray
    assert [row.split()[0] for row in rows] == [f"node{n}/0" for n in range(4)]


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


def test_the_page_of_many_trials_is_small_beside_plotly(tmp_path: Path) -> None:
    html, _ = written(many(500), tmp_path)
    assert len(html) < 1_000_000
    assert (tmp_path / "report.html").stat().st_size < 7_000_000


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


def test_axes_of_what_cannot_be_negative_start_at_0() -> None:
    trials = [trial(0, "done", 0.0, curve=((100, 0.0),)), trial(1, "done", 0.0, curve=((100, 0.0),))]
    assert figures.history(search(*trials)).layout.yaxis.range[0] == 0


def test_the_wide_parts_of_the_page_scroll_by_keyboard(tmp_path: Path) -> None:
    _, page = written(many(64, ("dice", "time")), tmp_path)
    assert len(page.all("div", "scroll")) == 1  # parallel coordinates
    assert len(page.all("div", "wide")) == 3  # best parameters, front, trials


def test_a_trial_worse_than_the_scale_is_a_stroke_and_no_dot() -> None:
    values = [0.8, 0.82, 0.84, 0.85, 0.01]
    done = figures.history(search(*(trial(n, "done", value) for n, value in enumerate(values)))).data[0]
    assert done.marker.symbol == ("circle", "circle", "circle", "circle", "line-ns-open")
    assert 0.7 < done.y[4] < 0.8
    assert done.hovertext[4] == "trial 4, done: 0.0100"
