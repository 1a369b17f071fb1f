"""A structured report of the measurements (PS3.16, TID 1500), by highdicom.

Each finding is one measurement group: TID 1411 where a segment shows it, else TID 1501. A segment's group
is extended by the end points of both axes (SCOORD3D, from which the lengths are inferred): TID 1411 and
the measurements in it are extensible, and a length without its place cannot be checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxelscale.dicom_out.codes import LUNG, Concept, Triplet, coded
from voxelscale.dicom_out.objects import MANUFACTURER, Algorithm, uid_of
from voxelscale.dicom_out.original import Original
from voxelscale.dicom_out.seg import belong, made_by, refer, sources_of
from voxelscale.findings import Finding
from voxelscale.findings.calipers import Ends

SERIES_NUMBER = 9703

MM, MM3 = ("UCUM", "mm", "millimeter"), ("UCUM", "mm3", "cubic millimeter")
HU, PERCENT = ("UCUM", "[hnsf'U]", "Hounsfield unit"), ("UCUM", "%", "Percent")
VOLUME = ("SCT", "118565006", "Volume")
LONG_AXIS, SHORT_AXIS = ("SCT", "103339001", "Long Axis"), ("SCT", "103340004", "Short Axis")
ATTENUATION, MEAN = ("DCM", "112031", "Attenuation Coefficient"), ("SCT", "373098007", "Mean")
CERTAINTY = ("DCM", "111012", "Certainty of Finding")
ABSENT = ("SCT", "272519000", "Absent")
CT_CHEST, CT = ("LN", "24627-2", "CT Chest"), ("LN", "25045-6", "CT unspecified body region")
IMAGING = ("LN", "18748-4", "Diagnostic imaging study")


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A finding as it is reported.

    Attributes:
        name, tracking: by which it is known in all objects.
        shown: the SEG that shows it, and the segment's number there; None: none does.
    """

    finding: Finding
    name: str
    tracking: str
    concept: Concept
    shown: tuple[Any, int] | None


def report(
    measured: Sequence[Measured], kinds: Sequence[Triplet], original: Original, algorithm: Algorithm
) -> Any:
    """A Comprehensive 3D SR of the findings; without any it says that each kind of them is absent.

    Args:
        kinds: of what was looked for.
    """
    import highdicom as hd

    content = hd.sr.MeasurementReport(
        observation_context=_observer(algorithm),
        procedure_reported=coded(_procedure(measured, original)),
        imaging_measurements=[_group(one, original, algorithm) for one in measured]
        or [_nothing(kinds, original, algorithm)],
        title=coded(("DCM", "126000", "Imaging Measurement Report")),
    )
    shown = {id(one.shown[0]): one.shown[0] for one in measured if one.shown is not None}
    dataset = hd.sr.Comprehensive3DSR(
        evidence=[*sources_of(original), *shown.values()],
        content=content,
        is_complete=True,
        is_final=False,
        is_verified=False,
        **made_by(original, algorithm, "measurements", series_number=SERIES_NUMBER, instance_number=1),
    )
    belong(dataset, original)
    refer(dataset, original)
    return dataset


def _observer(algorithm: Algorithm) -> Any:
    import highdicom as hd

    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=uid_of("device", algorithm.model, algorithm.version),
        name=MANUFACTURER,
        manufacturer_name=MANUFACTURER,
        model_name=f"{MANUFACTURER} {algorithm.version}",
        serial_number=algorithm.serial_number,
    )
    context = hd.sr.ObserverContext(
        observer_type=coded(("DCM", "121007", "Device")), observer_identifying_attributes=device
    )
    return hd.sr.ObservationContext(observer_device_context=context)


def _procedure(measured: Sequence[Measured], original: Original) -> Triplet:
    if original.modality != "CT":
        return IMAGING
    return CT_CHEST if any(one.concept.site == LUNG for one in measured) else CT


def _nothing(kinds: Sequence[Triplet], original: Original, algorithm: Algorithm) -> Any:
    """A group that says what was not found."""
    import highdicom as hd

    absent = [hd.sr.QualitativeEvaluation(coded(kind), coded(ABSENT)) for kind in dict.fromkeys(kinds)]
    tracking = uid_of("nothing", original.series, original.case, algorithm.model)
    return hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(uid=tracking, identifier="nothing found"),
        algorithm_id=_identified(algorithm),
        qualitative_evaluations=absent,
    )


def _identified(algorithm: Algorithm) -> Any:
    import highdicom as hd

    return hd.sr.AlgorithmIdentification(
        name=MANUFACTURER,
        version=algorithm.version,
        parameters=[f"model {algorithm.model}"] if algorithm.model else None,
    )


def _group(one: Measured, original: Original, algorithm: Algorithm) -> Any:
    """A finding's measurement group."""
    import highdicom as hd

    measures, places = _measurements(one.finding, original)
    args: dict[str, Any] = {
        "tracking_identifier": hd.sr.TrackingIdentifier(uid=one.tracking, identifier=one.name),
        "finding_category": coded(one.concept.category),
        "finding_type": coded(one.concept.kind),
        "finding_sites": [hd.sr.FindingSite(coded(one.concept.site))] if one.concept.site else None,
        "algorithm_id": _identified(algorithm),
        "measurements": measures,
    }
    if one.shown is None:
        group = hd.sr.MeasurementsAndQualitativeEvaluations(**args)
    else:
        dataset, number = one.shown
        segment = hd.sr.ReferencedSegment(
            sop_class_uid=dataset.SOPClassUID,
            sop_instance_uid=dataset.SOPInstanceUID,
            segment_number=number,
            source_series=hd.sr.SourceSeriesForSegmentation(original.series),
        )
        group = hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(**args, referenced_segment=segment)
    for item in group[0].ContentSequence:
        if item.ValueType == "NUM" and (ends := places.get(item.ConceptNameCodeSequence[0].CodeValue)):
            _place(item, ends, original)
    return group


def _measurements(finding: Finding, original: Original) -> tuple[list[Any], dict[str, Ends]]:
    """The figures, and by the codes of lengths their end points."""
    import highdicom as hd

    def measure(name: Triplet, value: float, unit: Triplet, derivation: Triplet | None = None) -> Any:
        how = coded(derivation) if derivation else None
        return hd.sr.Measurement(name=coded(name), value=float(value), unit=coded(unit), derivation=how)

    made = [
        measure(VOLUME, finding.volume_mm3, MM3),
        measure(LONG_AXIS, finding.axial_diameter_mm, MM),
    ]
    if finding.short_axis_mm is not None:
        made.append(measure(SHORT_AXIS, finding.short_axis_mm, MM))
    if finding.mean_hu is not None and original.modality == "CT":
        made.append(measure(ATTENUATION, finding.mean_hu, HU, MEAN))
    made.append(measure(CERTAINTY, 100 * finding.probability, PERCENT))
    ends = {LONG_AXIS[1]: finding.axial_ends, SHORT_AXIS[1]: finding.short_axis_ends}
    return made, {code: pair for code, pair in ends.items() if pair is not None}


def _place(item: Any, ends: Ends, original: Original) -> None:
    """Say where a length was measured."""
    import highdicom as hd

    line = hd.sr.CoordinatesForMeasurement3D(
        graphic_type="POLYLINE",
        graphic_data=np.asarray(ends, np.float64),
        frame_of_reference_uid=original.frame_of_reference,
    )
    if "ContentSequence" not in item:
        item.ContentSequence = hd.sr.ContentSequence()
    item.ContentSequence.append(line)
