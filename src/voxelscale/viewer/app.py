"""The viewer's server: its page, the cases' voxels and findings, and what the reader decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from voxelscale.config import ReadingConfig
from voxelscale.console import warn
from voxelscale.dataset.source import identity
from voxelscale.errors import VoxelscaleError
from voxelscale.viewer.cases import Case, Cases, Listed, finding_facts, lattice
from voxelscale.viewer.decisions import Desk, Refused, is_behind, read_journal
from voxelscale.viewer.guard import Door, Guard
from voxelscale.viewer.runs import runs_of

SCRIPTS = ("niivue", "planes", "viewer", "findings", "drawing", "brush", "keys")
FILES = {"viewer.css": "text/css", **{f"{name}.js": "text/javascript" for name in SCRIPTS}}
"""What is served of ``static/``, beside the page itself; nothing else is."""

MASKS = ("truth", "prediction", "probability", "decided")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a viewer shows, and to whom.

    Attributes:
        cases: in the order of the data set.
        reading: how they are read.
        folder: of the reader's decisions.
        reader: the reader's name.
        patients: whether patients' names are shown.
    """

    cases: Sequence[Listed]
    reading: ReadingConfig
    folder: Path
    reader: str
    patients: bool = False


LEAST_SHOWN = 13
"""Of 255: lower probabilities of voxels, which nearly all of a scan has, are not sent."""


class Viewer:
    """Answers the page's requests about the cases."""

    def __init__(self, shown: Shown) -> None:
        self.shown = shown
        self.cases = Cases(shown.cases, shown.reading)
        self._desks: dict[int, Desk] = {}
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1)
        self._waiting: set[int] = set()

    def desk(self, number: int) -> Desk:
        """The reader's decisions about a case; those about cases no longer in memory are forgotten."""
        case = self.cases.open(number)
        with self._lock:
            desk = self._desks.get(number)
            if desk is None or desk.case is not case or desk.outdated:
                desk = self._desks[number] = Desk(case, self.shown.folder, self.shown.reader)
                for other in set(self._desks) - self.cases.kept:
                    del self._desks[other]
                if desk.unsaved:
                    self._save(number)
            return desk

    def _save(self, number: int) -> None:
        """Write a case's mask soon; of several actions in a row once."""
        if number not in self._waiting:
            self._waiting.add(number)
            self._writer.submit(self._write, number, self._desks[number])

    def _write(self, number: int, desk: Desk) -> None:
        self._waiting.discard(number)
        try:
            desk.save()
        except VoxelscaleError as error:
            warn(f"{error.message}; {error.hint}")

    def catch_up(self) -> None:
        """Write what a kill kept from being written: the table of finished cases is read elsewhere."""
        for one in self.shown.cases:
            folder = self.shown.folder / one.name
            if is_behind(folder, read_journal(folder)):
                self._writer.submit(self._write_again, one)

    def _write_again(self, one: Listed) -> None:
        try:
            Desk(Case(one, self.shown.reading), self.shown.folder, self.shown.reader).save()
        except (VoxelscaleError, Refused) as error:
            warn(one.source.without_paths(str(error)))

    def close(self) -> None:
        """Write what has not been written yet."""
        self._writer.shutdown(wait=True)

    def listed(self) -> dict[str, Any]:
        """The cases, and how far the reader has come with each."""
        cases = []
        for one in self.shown.cases:
            lines = read_journal(self.shown.folder / one.name)
            finished = [line["value"] for line in lines if line["action"] == "finish"]
            state = "finished" if finished and finished[-1] else "begun" if lines else ""
            cases.append({"name": one.name, "state": state})
        return {"reader": self.shown.reader, "cases": cases}

    def facts(self, number: int) -> dict[str, Any]:
        """All that the page shows of a case, without its voxels."""
        case, desk = self.cases.open(number), self.desk(number)
        case.check()
        prediction, judged, grid = case.prediction, case.judged, case.image.grid
        findings = [finding_facts(f, grid) for f in prediction.findings]
        for facts, verdict, voxels in zip(findings, judged.verdicts, prediction.voxels, strict=True):
            facts |= {"truth": verdict, "voxels": len(voxels)}
        lesions = [
            finding_facts(lesion, grid) | {"label": name if not case.classes.single else "", "hits": hits}
            for lesion, name, hits in judged.lesions
        ]
        return {
            "number": number,
            "name": case.name,
            "patient": identity_of(case) if self.shown.patients else "",
            "lattice": lattice(case.image),
            "classes": list(case.classes.names),
            "regions": case.classes.regions,
            "threshold": prediction.facts.get("thresholds", {}).get("threshold"),
            "warnings": list(prediction.facts.get("warnings", [])),
            "findings": findings,
            "has_truth": case.truth is not None,
            "has_probability": prediction.probability is not None,
            "lesions": lesions,
            **state_of(desk),
        }

    def runs(self, number: int, what: str) -> bytes:
        """The runs of a mask, little-endian int32."""
        case = self.cases.open(number)
        nothing = np.zeros((1, 1, 1), np.uint8)
        if what == "truth":
            mask = case.truth.mask.array if case.truth else nothing
        elif what == "probability":
            found = case.prediction.probability
            mask = nothing if found is None else np.where(found >= LEAST_SHOWN, found, 0)
        else:
            mask = case.prediction.owners if what == "prediction" else self.desk(number).state.mask
        return runs_of(mask).astype("<i4").tobytes()

    def act(self, number: int, line: Any) -> dict[str, Any]:
        """Do one thing that the reader asks for."""
        if not isinstance(line, dict) or not isinstance(line.get("action"), str):
            raise Refused("no action")
        desk = self.desk(number)
        desk.act({name: line[name] for name in sorted(ASKED & set(line))}, line.get("after"))
        with self._lock:
            self._save(number)
        return state_of(desk)


ASKED = {"action", "finding", "mm", "diameter_mm", "label", "slices", "value"}
"""What a line of the journal takes from the page; who and when are the server's own."""


def state_of(desk: Desk) -> dict[str, Any]:
    """What the page shows of the reader's decisions."""
    outcome = desk.outcome()
    return {name: outcome[name] for name in ("marks", "finished", "lines")} | {"can_undo": desk.can_undo}


def identity_of(case: Case) -> str:
    """The patient's identifier in the scan's header, or the data set's name of the patient."""
    source = case.listed.source
    known = identity(source.files[0] if source.files else source.image)
    return known[0] if known and known[0] else source.patient


Answer = Callable[[Request], Any]


def build(shown: Shown, door: Door) -> tuple[Guard, Viewer]:
    """The application, and what must be closed after it."""
    viewer = Viewer(shown)

    def number(request: Request) -> int:
        return int(request.path_params["number"])

    def image(request: Request) -> Any:
        return viewer.cases.open(number(request)).image

    def plane(request: Request) -> bytes:
        axis, at = request.path_params["axis"], request.path_params["at"]
        content: bytes = image(request).plane(axis, at)
        return content

    def runs(request: Request, what: str) -> bytes:
        return viewer.runs(number(request), what)

    def facts(request: Request) -> dict[str, Any]:
        answer = viewer.facts(number(request))
        following = number(request) + 1
        if following < len(shown.cases):
            viewer.cases.open(following)  # is read meanwhile
        return answer

    async def act(request: Request) -> Response:
        try:
            line = await request.json()
        except ValueError:
            return JSONResponse({"error": "no JSON"}, 400)
        return await _answered(lambda _: viewer.act(number(request), line), request)

    routes = [
        Route("/", page),
        Route("/static/{name}", static),
        Route("/api/cases", _get(lambda _: viewer.listed())),
        Route("/api/case/{number:int}", _get(facts)),
        Route("/api/case/{number:int}/overview.nii", _get(lambda r: image(r).overview)),
        Route("/api/case/{number:int}/plane/{axis:int}/{at:int}", _get(plane)),
        *(Route(f"/api/case/{{number:int}}/{what}", _get(partial(runs, what=what))) for what in MASKS),
        Route("/api/case/{number:int}/act", act, methods=["POST"]),
    ]
    if shown.cases:
        viewer.cases.open(0)  # is read while the browser starts
    viewer.catch_up()
    app = Starlette(routes=routes)
    app.state.cases = shown.cases
    return Guard(app, door), viewer


def _get(answer: Answer) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        return await _answered(answer, request)

    return endpoint


async def _answered(answer: Answer, request: Request) -> Response:
    """What a function that may read files answers, or in one line why it does not."""
    try:
        content = await run_in_threadpool(answer, request)
    except Refused as error:
        return JSONResponse({"error": str(error)}, 409)
    except IndexError as error:
        return JSONResponse({"error": str(error)}, 404)
    except VoxelscaleError as error:
        # Files may be named after the patient: the page says the case's name instead.
        source = request.app.state.cases[int(request.path_params["number"])].source
        message, hint = (source.without_paths(text) for text in (error.message, error.hint))
        return JSONResponse({"error": message, "hint": hint}, 422)
    if isinstance(content, bytes):
        return Response(content, media_type="application/octet-stream")
    return JSONResponse(content)


async def page(request: Request) -> Response:
    """The page."""
    return Response(_static("viewer.html"), media_type="text/html")


async def static(request: Request) -> Response:
    """One of `FILES`."""
    name = request.path_params["name"]
    if name not in FILES:
        return JSONResponse({"error": "no such file"}, 404)
    return Response(_static(name), media_type=FILES[name])


def _static(name: str) -> bytes:
    return resources.files("voxelscale.viewer").joinpath("static", name).read_bytes()
