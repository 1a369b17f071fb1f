"""A scan as the CT series that a scanner would send, for trials with an archive. The person is invented."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voxelscale.files import write_atomic
from voxelscale.geometry import Scan

AIR = -1024
"""HU of the stored value 0."""

ROOT = "2.25."
"""Of UIDs that are made from a UUID (PS3.5, B.2)."""


@dataclass(frozen=True, kw_only=True)
class Person:
    """Whom an invented scan is of, and how it was taken.

    Attributes:
        number: PatientID; the UIDs are made of it, `study` and `series`.
        name: PatientName, family and given name.
        study, series: which of the person's.
        date: of the study, YYYYMMDD.
        kernel, description, body_part: as the scanner would write them.
    """

    number: str
    name: str = "Phantom^Synthetic"
    study: int = 1
    series: int = 1
    date: str = "20260101"
    kernel: str = "B50f"
    description: str = "CT THORAX 2.5 B50f"
    body_part: str = "CHEST"


def write_series(image: Scan, person: Person, folder: Path) -> list[Path]:
    """Write a scan as CT Image Storage, a file a slice, explicit VR little endian.

    The same scan of the same person has the same UIDs.

    Args:
        image: HU (z, y, x), axes along those of the patient.

    Returns:
        the files, in the order of their slices.
    """
    common = _common(image, person)
    at = f"{person.number}/{person.study}/{person.series}"
    return [_write_slice(image, z, f"{at}/{z}", common, folder) for z in range(len(image.array))]


def _uid(text: str) -> str:
    """A UID that follows from a text alone."""
    return ROOT + str(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))


def _common(image: Scan, person: Person) -> dict[str, Any]:
    """What all slices say (PS3.3, A.3: patient, study, equipment, series, frame of reference, CT image)."""
    spacing, study = image.grid.spacing, f"{person.number}/{person.study}"
    direction = image.grid.direction[:, :2].T.ravel()
    return {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2",
        "StudyDate": person.date,
        "StudyTime": "101500",
        "AccessionNumber": "",
        "Modality": "CT",
        "Manufacturer": "Voxelscale",
        "ManufacturerModelName": "Phantom",
        "DeviceSerialNumber": "1",
        "SoftwareVersions": "1",
        "ReferringPhysicianName": "",
        "StudyDescription": "CT THORAX",
        "SeriesDescription": person.description,
        "PatientName": person.name,
        "PatientID": person.number,
        "PatientBirthDate": "19600101",
        "PatientSex": "O",
        "BodyPartExamined": person.body_part,
        "PatientPosition": "HFS",
        "KVP": 120,
        "SliceThickness": _decimal(spacing[0]),
        "ConvolutionKernel": person.kernel,
        "StudyInstanceUID": _uid(study),
        "SeriesInstanceUID": _uid(f"{study}/{person.series}"),
        "StudyID": str(person.study),
        "SeriesNumber": person.series,
        "AcquisitionNumber": 1,
        "FrameOfReferenceUID": _uid(f"{study}/frame"),
        "PositionReferenceIndicator": "",
        "ImageOrientationPatient": [_decimal(v) for v in direction],
        "PixelSpacing": [_decimal(spacing[1]), _decimal(spacing[2])],
        "Rows": image.array.shape[1],
        "Columns": image.array.shape[2],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
        "RescaleIntercept": AIR,
        "RescaleSlope": 1,
        "RescaleType": "HU",
        "WindowCenter": -600,
        "WindowWidth": 1500,
    }


def _write_slice(image: Scan, z: int, name: str, common: dict[str, Any], folder: Path) -> Path:
    import io

    from pydicom import dcmwrite
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    dataset = Dataset()
    for keyword, value in common.items():
        setattr(dataset, keyword, value)
    dataset.SOPInstanceUID = _uid(name)
    dataset.InstanceNumber = z + 1
    dataset.ImagePositionPatient = [_decimal(v) for v in image.grid.index_to_mm((z, 0, 0))]
    dataset.PixelData = (np.clip(image.array[z].astype(np.int32) - AIR, 0, 65535)).astype("<u2").tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = common["SOPClassUID"]
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    content = io.BytesIO()
    dcmwrite(content, dataset, enforce_file_format=True)
    path = folder / f"{z + 1:04d}.dcm"
    write_atomic(path, content.getvalue())
    return path


def _decimal(value: Any) -> float:
    """A number that fits a decimal string's 16 characters."""
    return round(float(value), 6)
