"""From raw scans to masks and findings on the scans' own voxels."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from voxelscale import __version__
from voxelscale.channels import ONE_CT
from voxelscale.config import PredictConfig, ReadingConfig
from voxelscale.console import Progress, count, duration, notice
from voxelscale.dataset.listing import Source
from voxelscale.dataset.reading import read_image, read_more
from voxelscale.errors import VoxelscaleError
from voxelscale.files import write_atomic
from voxelscale.findings import Finding, read_prediction, write_findings
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan, reorient
from voxelscale.infer.sliding_window import Share
from voxelscale.lungs import lung_field
from voxelscale.model.bundle import Bundle
from voxelscale.predict.case import (
    CASE_FACTS,
    clear,
    facts_of,
    key_of,
    probability_file,
    settings_of,
    stamp_of,
)
from voxelscale.predict.predictor import LUNG_MARGIN_MM, Predictor, Seen, check_usable
from voxelscale.store.plausible import about


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What became of a prediction.

    Attributes:
        findings: by case, most confident first.
        kept: how many cases were there already.
        failed: case, error and hint of each that is not.
        rank: of this process; 0 knows of all cases, the others of their own.
        facts: by case, what else its ``findings.json`` says.
    """

    findings: dict[str, list[Finding]]
    kept: int
    failed: tuple[tuple[str, str, str], ...]
    rank: int = 0
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def warnings(self) -> dict[str, tuple[str, ...]]:
        """By case, what speaks against relying on its findings."""
        return {case: tuple(facts.get("warnings", ())) for case, facts in self.facts.items()}


@dataclass(frozen=True, kw_only=True)
class Together(Share):
    """This process's share of scans that several predict together.

    Attributes:
        all_well: whether it is so in all of these processes.
    """

    all_well: Callable[[bool], bool]


_Read = tuple[str, list[Scan]]
"""The stamp of a scan's files, and its channels."""


class Work:
    """Scans to predict with a model, and what is written of each.

    Args:
        bundle: the model.
        config: windows and thresholds.
        out: the folder that gets a folder of each case.
        device: where it computes.
        reading: its ``fill_gaps`` and ``select`` say how images are read.
    """

    def __init__(
        self, bundle: Bundle, config: PredictConfig, out: Path, device: torch.device, reading: ReadingConfig
    ) -> None:
        self._bundle, self._config, self._out, self._device = bundle, config, out, device
        self._reading = reading

    @cached_property
    def predictor(self) -> Predictor:
        """Made when it is first needed."""
        return Predictor(self._bundle, self._config, self._device)

    def is_done(self, source: Source) -> bool:
        """Whether what was written of a scan is whole and unchanged."""
        folder, classes = self._out / source.case, self._bundle.classes
        if facts_of(folder).get("key") != self._key(stamp_of(source)):
            return False
        try:
            read_prediction(folder / "findings.json")
        except VoxelscaleError:  # somebody changed it
            return False
        names = ["mask.nii.gz", "findings.csv"]
        if self._config.probabilities:
            names += [probability_file(classes, name) for name in classes.names]
        return all((folder / name).is_file() for name in names)

    def each(self, sources: Sequence[Source], together: Together | None = None) -> Predictions:
        """Predict the scans one after another; of several processes only the one with part 0 has the
        findings."""
        findings: dict[str, list[Finding]] = {}
        facts: dict[str, dict[str, Any]] = {}
        failed: list[tuple[str, str, str]] = []
        kept = 0
        with Progress("predict", len(sources)) as progress, ThreadPoolExecutor(1) as reader:
            following: Future[_Read] | None = None
            for done, source in enumerate(sources, start=1):
                case, read = source.case, following
                following = self._ahead(sources[done:], reader) if together is None else None
                try:
                    if together is None and self.is_done(source):
                        findings[case], facts[case] = read_prediction(self._out / case / "findings.json")
                        kept += 1
                    else:
                        findings[case], facts[case] = self._look(source, together, read)
                except VoxelscaleError as error:
                    failed.append((case, error.message, error.hint))
                progress.update(done, case)
        if together is not None and together.part:
            return Predictions(findings={}, kept=0, failed=())
        return Predictions(findings=findings, kept=kept, failed=tuple(failed), facts=facts)

    def _look(
        self, source: Source, together: Together | None, read: Future[_Read] | None
    ) -> tuple[list[Finding], dict[str, Any]]:
        started = time.monotonic()
        if read is not None:
            stamp, images = read.result()
        elif together is None:
            stamp, images = self._stamped(source)
        else:
            stamp, images = stamp_of(source), self._read_together(source, together)
        lungs, warnings = None, self._of_channels(source)
        if self._bundle.of_ct:
            upright = reorient(images[0])
            lungs = lung_field(upright)
            one, refuse = about(upright, lungs, source), self._config.refuse_unusable
            warnings += check_usable(self._bundle, one, str(source.image), refuse)
            del upright
        if together is not None and together.part:
            self.predictor.assist(images, together, lungs)
            return [], {}
        folder = self._out / source.case
        if facts_of(folder).get("scan", stamp) != stamp:
            warnings.append("replaces the prediction of another scan, or of another state of this one")
        seen = self.predictor.see(source.case, images[0], together, lungs, images[1:])
        facts = self._facts_of(source.case, seen, warnings)
        clear(folder)
        write_scan(seen.mask, folder / "mask.nii.gz")
        if self._config.probabilities:
            for name, kept in seen.probabilities:
                write_scan(Scan(kept, seen.mask.affine), folder / name)
        paths = folder / "findings.csv", folder / "findings.json"
        write_findings(seen.findings, *paths, facts, labelled=not self._bundle.classes.single)
        seconds = round(time.monotonic() - started, 2)
        notice(f"{source.case}: {count(len(seen.findings), 'finding')} in {duration(seconds)}", level=2)
        made = {
            "key": self._key(stamp),
            "scan": stamp,
            "model": self._bundle.identity,
            "settings": settings_of(self._bundle, self._config, self._reading),
            "seconds": seconds,
            **self._named,
        }
        # Last, so that its being there says that the case is whole.
        write_atomic(folder / CASE_FACTS, json.dumps(made))
        return seen.findings, facts

    @property
    def _named(self) -> dict[str, Any]:
        """What a case's facts say of the classes: the only one's name, or all of several."""
        classes = self._bundle.classes
        return {"class": classes.names[0]} if classes.single else {"classes": classes.to_dict()}

    def _of_channels(self, source: Source) -> list[str]:
        """The warnings of channels that may be others than the model's.

        Raises:
            VoxelscaleError: they are.
        """
        wanted, given = self._bundle.channels, source.channels
        if self._bundle.plain and len(given) == 1:  # its file names none
            of_ct = any(facts is not None and facts.ct for facts in self._bundle.trained_on)
            other = of_ct and given[0].scheme != "ct"
            return [f"its channel is {given[0].name}; it is taken for CT"] if other else []
        names, known = ([channel.name for channel in each] for each in (given, wanted))
        if [name.casefold() for name in names] == [name.casefold() for name in known]:
            return []
        if len(wanted) == 1 and given == ONE_CT:  # as of files of which nothing is said
            return [f"its channel is not named; it is taken for {known[0]}"]
        raise VoxelscaleError(
            f"{source.image}: has the {_list('channel', names)}, the model the {_list('channel', known)}",
            f"if they are the same, set reading.channels=[{', '.join(known)}]",
        )

    def _facts_of(self, case: str, seen: Seen, warnings: Sequence[str]) -> dict[str, Any]:
        """What ``findings.json`` says beside the findings (docs/measures.md, "What predict writes")."""
        lungs, config = seen.lungs, self._config
        return {
            "case": case,
            "warnings": list(warnings),
            "looked_at": round(seen.share, 4),
            "lungs": None
            if lungs is None
            else {
                "found": lungs.ok,
                "problem": lungs.problem,
                "volume_ml": round(lungs.volume_ml, 1),
                "margin_mm": LUNG_MARGIN_MM,
                "left_out": seen.left_out,
            },
            "thresholds": {
                "threshold": config.threshold,
                "low": config.low_threshold,
                "candidates": config.candidates,
            },
            "merge_mm": config.merge_mm,
            "fill_gaps": self._reading.fill_gaps,
            "select": list(self._reading.select),
            "model": self._bundle.identity,
            "voxelscale": __version__,
            **self._named,
        }

    def _key(self, stamp: str) -> str:
        return key_of(stamp, self._bundle, self._config, self._reading)

    def _ahead(self, left: Sequence[Source], reader: ThreadPoolExecutor) -> Future[_Read] | None:
        """Begin to read the next scan, if it is to be predicted and a GPU would wait for it."""
        if self._device.type == "cpu" or not left or self.is_done(left[0]):
            return None
        return reader.submit(self._stamped, left[0])

    def _stamped(self, source: Source) -> _Read:
        """The stamp of a scan's files, as they are before they are read, and its channels."""
        return stamp_of(source), self._read(source)

    def _read(self, source: Source) -> list[Scan]:
        """The channels."""
        self._of_channels(source)
        image = read_image(source, self._reading)
        return (
            [image, *read_more(source, self._reading, image.grid)] if len(source.channels) > 1 else [image]
        )

    def _read_together(self, source: Source, together: Together) -> list[Scan]:
        """The channels, where all could read them: a process that could not must not leave the others
        waiting."""
        try:
            images = self._read(source)
        except VoxelscaleError:
            together.all_well(False)
            raise
        if not together.all_well(True):
            raise VoxelscaleError(f"{source.image}: another process could not read it", "run it again")
        return images


def _list(what: str, names: Sequence[str]) -> str:
    return f"{what if len(names) == 1 else f'{what}s'} {', '.join(names)}"
