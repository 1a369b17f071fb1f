"""DICOM Segmentation objects (PS3.3 A.51), by highdicom."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxelscale.dicom_out.codes import coded
from voxelscale.dicom_out.objects import MANUFACTURER, PLACEHOLDER, RESEARCH, Algorithm, elements_of, uid_of
from voxelscale.dicom_out.original import CT_IMAGE, REQUIRED, Original
from voxelscale.dicom_out.segments import STEPS, Segment

LARGEST = 2**30
"""Bytes of an array that holds overlapping segments one beside the other."""

SERIES_NUMBER = {"BINARY": 9701, "FRACTIONAL": 9702}


def sources_of(original: Original) -> list[Any]:
    """Headers of the source's slices as highdicom takes them: what is needed of them, and nothing else.

    Each slice is a file of its own here, whatever it came in; `refer` puts the true references.
    """
    from pydicom import Dataset

    made = []
    for frame in original.frames:
        one = Dataset()
        one.SpecificCharacterSet = "ISO_IR 192"
        for keyword in REQUIRED:  # `belong` puts the values: others' warnings would quote the patient
            setattr(one, keyword, "")
        for keyword, value in original.lossy.items():
            setattr(one, keyword, value)
        one.StudyInstanceUID = original.study
        one.SOPClassUID = CT_IMAGE
        one.SOPInstanceUID = _stand_in(original, frame.place)
        one.SeriesInstanceUID = original.series
        one.Modality = original.modality
        one.FrameOfReferenceUID = original.frame_of_reference
        one.PositionReferenceIndicator = ""
        one.Rows, one.Columns = original.slices.shape[1:]
        one.ImageOrientationPatient = original.orientation
        one.ImagePositionPatient = [
            round(float(v), 6) + 0.0 for v in original.slices.positions[frame.place]
        ]
        one.PixelSpacing = [round(v, 9) for v in original.spacing]
        one.SliceThickness = round(original.slices.spacing[0], 6)
        if original.slices.regular:
            one.SpacingBetweenSlices = one.SliceThickness
        made.append(one)
    return made


def _stand_in(original: Original, place: int) -> str:
    return uid_of("stand-in", original.series, place)


def made_by(original: Original, algorithm: Algorithm, what: str, **numbers: int) -> dict[str, Any]:
    """What highdicom's objects have in common: by whom and when they were made.

    The UIDs stand for those that `objects.finished` puts.

    Args:
        what: the object is, in its series' description.
        numbers: of the series and the instance.
    """
    return {
        "series_instance_uid": PLACEHOLDER,
        "sop_instance_uid": PLACEHOLDER,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": MANUFACTURER,
        "software_versions": algorithm.version,
        "device_serial_number": algorithm.serial_number,
        "series_description": f"{RESEARCH}: {MANUFACTURER} {what}",
        "content_date": original.date,
        "content_time": original.time,
        "series_date": original.date,
        "series_time": original.time,
        **numbers,
    }


def belong(dataset: Any, original: Original) -> None:
    """Say whose an object is, and of which study."""
    dataset.SpecificCharacterSet = "ISO_IR 192"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keyword, value in original.about.items():
            setattr(dataset, keyword, value)


WHOLE_INSTANCES = ("SourceImageSequence", "ReferencedInstanceSequence", "ReferencedSOPSequence")
"""Sequences that name files; others name frames, too."""


def refer(dataset: Any, original: Original) -> None:
    """Put references to the source's slices in the place of those to `sources_of`."""
    frames = {_stand_in(original, frame.place): frame for frame in original.frames}
    for element in elements_of(dataset):
        if element.VR != "SQ":
            continue
        kept, known = [], set[str]()
        for item in element.value:
            whole = element.keyword in WHOLE_INSTANCES and "PurposeOfReferenceCodeSequence" not in item
            frame = frames.get(str(item.get("ReferencedSOPInstanceUID", "")))
            if frame is not None:
                item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = frame.sop_class, frame.sop_uid
                if frame.number is not None and not whole:
                    item.ReferencedFrameNumber = frame.number
            if whole:  # highdicom may have put one item into several sequences
                if (uid := str(item.ReferencedSOPInstanceUID)) in known:
                    continue  # another frame of the same file
                known.add(uid)
            kept.append(item)
        if len(kept) < len(element.value):
            element.value = kept


def groups_of(segments: Sequence[Segment], original: Original, *, fractional: bool) -> list[list[Segment]]:
    """The segments by the objects that hold them: one, unless it would not fit into memory."""
    rows, columns = original.slices.shape[1:]
    if not fractional and not _overlap(segments):
        return [list(segments)]
    groups: list[list[Segment]] = []
    places: set[int] = set()
    for segment in segments:
        more = places | {place for place, _ in segment.planes()}
        count = len(groups[-1]) + 1 if groups else 1
        if not groups or len(more) * rows * columns * count * (4 if fractional else 1) > LARGEST:
            groups.append([])
            more = {place for place, _ in segment.planes()}
        groups[-1].append(segment)
        places = more
    return groups


def _overlap(segments: Sequence[Segment]) -> bool:
    """Whether two segments share a pixel."""
    for number, one in enumerate(segments):
        for other in segments[:number]:
            low = np.maximum(one.start, other.start)
            ends = [np.add(s.start, s.values.shape) for s in (one, other)]
            high = np.minimum(*ends)
            if (low < high).all():
                parts = [
                    s.values[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, s.start, strict=True))]
                    for s in (one, other)
                ]
                if ((parts[0] > 0) & (parts[1] > 0)).any():
                    return True
    return False


def segmentation(
    segments: Sequence[Segment],
    original: Original,
    algorithm: Algorithm,
    instance: int,
    *,
    fractional: bool,
) -> Any:
    """A SEG on the source's own frames, numbered from 1 in the order of the segments.

    Args:
        instance: InstanceNumber.
        fractional: whether the segments hold probabilities.
    """
    import highdicom as hd

    logging.getLogger("highdicom").setLevel(logging.ERROR)  # which would name the patient's files
    places = sorted({place for segment in segments for place, _ in segment.planes()})
    kind = "FRACTIONAL" if fractional else "BINARY"
    what = "probabilities" if fractional else "segmentation"
    dataset = hd.seg.Segmentation(
        source_images=sources_of(original),
        pixel_array=_pixels(segments, places, original, fractional=fractional),
        segmentation_type=kind,
        segment_descriptions=[_description(n, s, algorithm) for n, s in enumerate(segments, start=1)],
        fractional_type="PROBABILITY",
        max_fractional_value=STEPS,
        plane_positions=[
            hd.PlanePositionSequence(
                "PATIENT", [round(float(v), 6) + 0.0 for v in original.slices.positions[place]]
            )
            for place in places
        ],
        content_label="PROBABILITY" if fractional else "FINDINGS",
        content_description=f"{RESEARCH}: {what} by {MANUFACTURER}",
        content_creator_name=f"{MANUFACTURER}^",
        **made_by(original, algorithm, what, series_number=SERIES_NUMBER[kind], instance_number=instance),
    )
    belong(dataset, original)
    refer(dataset, original)
    return dataset


def _pixels(
    segments: Sequence[Segment], places: Sequence[int], original: Original, *, fractional: bool
) -> NDArray[Any]:
    """(place, row, column) numbers of segments, or (..., segment) where they overlap or are shares."""
    shape = (len(places), *original.slices.shape[1:])
    at = {place: n for n, place in enumerate(places)}
    if not fractional and not _overlap(segments):
        numbers = np.zeros(shape, np.uint8 if len(segments) < 256 else np.uint16)
        for number, segment in enumerate(segments, start=1):
            for place, plane in segment.planes():
                numbers[at[place]][segment.box[1:]][plane] = number
        return numbers
    stacked = np.zeros((*shape, len(segments)), np.float32 if fractional else np.uint8)
    for number, segment in enumerate(segments):
        for place, plane in segment.planes():
            stacked[at[place]][segment.box[1:]][..., number] = plane
    return stacked


def _description(number: int, segment: Segment, algorithm: Algorithm) -> Any:
    import highdicom as hd

    concept = segment.concept
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=segment.name,
        segmented_property_category=coded(concept.category),
        segmented_property_type=coded(concept.kind),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=MANUFACTURER,
            family=coded(("DCM", "123110", "Artificial Intelligence")),
            version=algorithm.version,
            parameters={"model": algorithm.model} if algorithm.model else None,
        ),
        tracking_uid=segment.tracking,
        tracking_id=segment.name,
        anatomic_regions=[coded(concept.site)] if concept.site else None,
    )
