"""RT Structure Sets (PS3.3 A.19): outlines along the pixels' edges on the source's slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from voxelscale.dicom_out.codes import coded
from voxelscale.dicom_out.objects import MANUFACTURER, PLACEHOLDER, RESEARCH, Algorithm, plain
from voxelscale.dicom_out.original import Frame, Original
from voxelscale.dicom_out.outlines import outlines
from voxelscale.dicom_out.seg import belong
from voxelscale.dicom_out.segments import Segment
from voxelscale.pages.page import class_colour

STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
STUDY_MANAGEMENT = "1.2.840.10008.3.1.2.3.1"
"""SOP class by which the standard has the study referred to; retired, and still asked for by readers."""

SERIES_NUMBER = 9704
DECIMALS = 4
"""Of a coordinate in mm: a hundredth of what pixel edges need."""


def structure_set(segments: Sequence[Segment], original: Original, algorithm: Algorithm) -> Any:
    """A structure set with a region a segment.

    It is written with implicit VRs: with explicit ones an outline's text would end at 64 KiB.
    """
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ImplicitVRLittleEndian

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = STRUCTURE_SET
    belong(dataset, original)
    dataset.SOPInstanceUID = dataset.SeriesInstanceUID = PLACEHOLDER
    dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "RTSTRUCT", SERIES_NUMBER, 1
    dataset.SeriesDescription = f"{RESEARCH}: {MANUFACTURER} contours"
    dataset.SeriesDate, dataset.SeriesTime = original.date, original.time
    dataset.OperatorsName = ""
    dataset.Manufacturer = dataset.ManufacturerModelName = MANUFACTURER
    dataset.SoftwareVersions = algorithm.version
    dataset.DeviceSerialNumber = algorithm.serial_number
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = original.frame_of_reference, ""
    dataset.StructureSetLabel = "FINDINGS"
    dataset.StructureSetDescription = f"{RESEARCH}: contours by {MANUFACTURER}"
    dataset.StructureSetDate, dataset.StructureSetTime = original.date, original.time
    dataset.ApprovalStatus = "UNAPPROVED"
    dataset.ReferencedFrameOfReferenceSequence = [_reference(original)]
    dataset.StructureSetROISequence = [_region(s, original, algorithm) for s in segments]
    dataset.ROIContourSequence = [_drawn(segment, original) for segment in segments]
    dataset.RTROIObservationsSequence = [_observation(segment) for segment in segments]
    return dataset


def _reference(original: Original) -> Any:
    from pydicom import Dataset

    series = Dataset()
    series.SeriesInstanceUID = original.series
    files = {frame.sop_uid: frame for frame in original.frames}
    series.ContourImageSequence = [_image(frame, whole=True) for frame in files.values()]
    study = Dataset()
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = STUDY_MANAGEMENT, original.study
    study.RTReferencedSeriesSequence = [series]
    frame_of_reference = Dataset()
    frame_of_reference.FrameOfReferenceUID = original.frame_of_reference
    frame_of_reference.RTReferencedStudySequence = [study]
    return frame_of_reference


def _image(frame: Frame, *, whole: bool = False) -> Any:
    """A reference to a slice, or to the whole file that it is in."""
    from pydicom import Dataset

    image = Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = frame.sop_class, frame.sop_uid
    if frame.number is not None and not whole:
        image.ReferencedFrameNumber = frame.number
    return image


def _region(segment: Segment, original: Original, algorithm: Algorithm) -> Any:
    from pydicom import Dataset

    region = Dataset()
    region.ROINumber = segment.number
    region.ReferencedFrameOfReferenceUID = original.frame_of_reference
    region.ROIName = segment.name
    region.ROIDescription = plain(f"{RESEARCH}: {segment.class_name}")
    region.ROIGenerationAlgorithm = "AUTOMATIC"
    region.ROIGenerationDescription = plain(f"{MANUFACTURER} {algorithm.version} {algorithm.model}")
    return region


def _drawn(segment: Segment, original: Original) -> Any:
    from pydicom import Dataset

    drawn = Dataset()
    drawn.ReferencedROINumber = segment.number
    code = class_colour(segment.number - 1)
    drawn.ROIDisplayColor = [int(code[at : at + 2], 16) for at in (1, 3, 5)]
    drawn.ContourSequence = list(_contours(segment, original))
    return drawn


def _contours(segment: Segment, original: Original) -> Iterator[Any]:
    from pydicom import Dataset

    corner = np.asarray(segment.start[1:])
    for place, plane in segment.planes():
        for outline in outlines(plane > 0):
            index = np.column_stack([np.full(len(outline), place), outline + corner])
            contour = Dataset()
            contour.ContourImageSequence = [_image(original.by_place[place])]
            contour.ContourGeometricType = "CLOSED_PLANAR"
            contour.NumberOfContourPoints = len(index)
            points = np.round(original.slices.index_to_mm(index), DECIMALS) + 0.0
            contour.ContourData = [
                f"{value:.{DECIMALS}f}".rstrip("0").rstrip(".") for value in points.ravel()
            ]
            yield contour


def _observation(segment: Segment) -> Any:
    from pydicom import Dataset

    observation = Dataset()
    observation.ObservationNumber = observation.ReferencedROINumber = segment.number
    observation.ROIObservationLabel = segment.name[:16]
    observation.RTROIIdentificationCodeSequence = [coded(segment.concept.kind)]
    observation.RTROIInterpretedType = ""
    observation.ROIInterpreter = ""
    return observation
