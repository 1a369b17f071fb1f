"""Tables, JSON and XML that somebody spoilt: a VoxelscaleError of one line, or success, and nothing else.

Every input is a function of (seed, number); a fault is told with both.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import SHARED
from tests.dataset.test_inputs import old_nnunet
from tests.dataset.test_layouts import decathlon, image, luna16, nnunet
from tests.formats.mutation import Random, mutate

from voxelscale.config import ReadingConfig
from voxelscale.dataset.listing import list_scans, list_sources
from voxelscale.dataset.reading import read_case
from voxelscale.errors import VoxelscaleError
from voxelscale.findings import Finding, read_findings, write_findings
from voxelscale.formats import write_scan
from voxelscale.geometry import Scan, affine_from_itk
from voxelscale.labels import read_labels

SECONDS = 1.5
LEAST = 50
"""Inputs to have been tried, however busy the machine is."""

SLOW = 2.0
"""Seconds of processor time that no small file may take."""

SEED = int(os.environ.get("VOXELSCALE_FUZZ_SEED", 1))

Made = tuple[Path, Callable[[], object]]
"""The file to be changed, and what reads it."""

ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 10**400, 1e400, float("nan"), "", " ", "x", "\0", "\ud800", "../../x"),
    *("/etc/passwd", "C:\\x", [], {}, [[]], [None], {"": ""}, {"0": "CT"}, ["a", "b"], "9" * 5000),
)


def odd_json(data: bytes, random: Random) -> bytes:
    """JSON with one to three of its values or keys replaced, dropped, or doubled."""
    tree = json.loads(data)
    for _ in range(int(random.integers(1, 4))):
        holder = tree
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = keys[int(random.integers(len(keys)))]
            if isinstance(holder[key], dict | list) and random.random() < 0.7:
                holder = holder[key]
                continue
            if random.random() < 0.2:
                del holder[key]
            else:
                holder[key] = copy.deepcopy(ODD[int(random.integers(len(ODD)))])
            break
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def odd_csv(data: bytes, random: Random) -> bytes:
    """A table with one to three of its fields replaced, or rows cut, lengthened, or doubled."""
    rows = list(csv.reader(io.StringIO(data.decode())))
    words = ["", "nan", "inf", "-1", "1e400", "x", "a\nb", '"', "1e9", "../x", "/dev/zero", "é", "9" * 4000]
    for _ in range(int(random.integers(1, 4))):
        row = rows[int(random.integers(len(rows)))]
        at = int(random.integers(len(row) + 1))
        match int(random.integers(4)):
            case 0:
                del row[at:]
            case 1:
                row.insert(at, words[int(random.integers(len(words)))])
            case 2:
                rows.append(list(row))
            case _ if at < len(row):
                row[at] = words[int(random.integers(len(words)))]
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def odd_xml(data: bytes, random: Random) -> bytes:
    """XML with one to three of its texts replaced, or an element emptied, dropped, or doubled."""
    words = [
        b"",
        b"nan",
        b"-1",
        b"1e400",
        b"x",
        b"1e9",
        b"99999999999999999999",
        b"FALSE",
        b" 4 ",
        b"106.0",
    ]
    for _ in range(int(random.integers(1, 4))):
        found = list(re.finditer(rb"<(\w+)>([^<]*)</\1>\s*", data))
        if not found:
            break
        hit = found[int(random.integers(len(found)))]
        element, name = hit.group(), hit[1]
        new = b"<%s>%s</%s>" % (name, words[int(random.integers(len(words)))], name)
        instead = (new, new, b"", element + element, b"<%s/>" % name)[int(random.integers(5))]
        data = data[: hit.start()] + instead + data[hit.end() :]
    return data


def table(folder: Path) -> Made:
    rows = ["image,label,case,patient"]
    for name in ("a", "b"):
        write_scan(image(), folder / f"{name}.nii.gz")
        rows.append(f"{name}.nii.gz,{name}.nii.gz,{name},p{name}")
    path = folder / "dataset.csv"
    path.write_text("\n".join(rows) + "\n")
    return path, lambda: (list_sources(path), list_scans(path))


def nodules(folder: Path) -> Made:
    luna16(folder)
    path = folder / "annotations.csv"

    def read() -> None:
        for source in list_sources(folder, "luna16"):
            read_case(source, ReadingConfig(allow_empty=True))

    return path, read


def described(make: Callable[[Path], None]) -> Callable[[Path], Made]:
    def made(folder: Path) -> Made:
        make(folder)
        path = folder / "dataset.json"
        return path, lambda: (list_sources(path), list_scans(path))

    return made


def findings(folder: Path) -> Made:
    one = Finding(
        case="a",
        x=1.0,
        y=-2.0,
        z=3.0,
        index=(1.0, 2.0, 3.0),
        diameter_mm=5.0,
        axial_diameter_mm=6.0,
        volume_mm3=65.0,
        mean_hu=-3.0,
        probability=0.5,
    )
    write_findings([one, one], folder / "findings.csv", folder / "findings.json")
    path = folder / "findings.json"

    def read() -> None:
        again = read_findings(path)
        write_findings(again, folder / "again.csv", folder / "again.json")
        assert all(np.isfinite([f.x, f.y, f.z, f.diameter_mm, f.probability]).all() for f in again)

    return path, read


LIDC_XML = """<?xml version="1.0"?>
<LidcReadMessage xmlns="http://www.nih.gov"><ResponseHeader><SeriesInstanceUid>1.2.3</SeriesInstanceUid>
</ResponseHeader><readingSession><unblindedReadNodule><noduleID>1</noduleID>
<roi><imageZposition>104.0</imageZposition><inclusion>TRUE</inclusion>
<edgeMap><xCoord>4</xCoord><yCoord>4</yCoord></edgeMap><edgeMap><xCoord>9</xCoord><yCoord>4</yCoord></edgeMap>
<edgeMap><xCoord>9</xCoord><yCoord>9</yCoord></edgeMap><edgeMap><xCoord>4</xCoord><yCoord>9</yCoord></edgeMap>
</roi></unblindedReadNodule><unblindedReadNodule><noduleID>2</noduleID><roi>
<imageZposition>106.0</imageZposition><inclusion>TRUE</inclusion><edgeMap><xCoord>7</xCoord><yCoord>7</yCoord>
</edgeMap></roi></unblindedReadNodule><nonNodule><nonNoduleID>3</nonNoduleID>
<imageZposition>108.0</imageZposition><locus><xCoord>3</xCoord><yCoord>5</yCoord></locus></nonNodule>
</readingSession></LidcReadMessage>
"""


def readings(folder: Path) -> Made:
    path = folder / "1.xml"
    path.write_text(LIDC_XML)
    affine = affine_from_itk((-20.0, -30.0, 100.0), (1.0, 1.0, 2.0), np.eye(3))
    scan = Scan(np.zeros((12, 20, 24), np.int16), affine)

    def read() -> None:
        labels = read_labels(path, scan, series="1.2.3")
        assert labels.mask.array.shape == scan.array.shape

    return path, read


Change = Callable[[bytes, Random], bytes]
MADE: dict[str, tuple[Callable[[Path], Made], Change]] = {
    "dataset.csv": (table, odd_csv),
    "annotations.csv": (nodules, odd_csv),
    "decathlon": (described(decathlon), odd_json),
    "nnunet": (described(nnunet), odd_json),
    "older-nnunet": (described(old_nnunet), odd_json),
    "findings.json": (findings, odd_json),
    "lidc.xml": (readings, odd_xml),
}


def spoilt(valid: bytes, odd: Change, random: Random) -> bytes:
    """Half of them bytes at random, half of them by what the format is made of."""
    if random.random() < 0.5:
        return odd(valid, random)
    return mutate(valid, valid, random)


@pytest.mark.parametrize(
    "name",
    MADE,
)
def test_spoilt_tables(tmp_path: Path, name: str) -> None:
    make, odd = MADE[name]
    path, read = make(tmp_path)
    read()  # as it was, it is read
    valid, good, tried = path.read_bytes(), 0, 0
    faults: list[str] = []
    end = time.monotonic() + SECONDS
    while tried < LEAST or (time.monotonic() < end and len(faults) < 5):
        random = np.random.Generator(np.random.Philox(key=[SEED, tried]))
        path.write_bytes(spoilt(valid, odd, random))
        began, fault = time.process_time(), ""
        try:
            read()
            good += 1
        except VoxelscaleError as error:
            if "\n" in error.message or not error.hint or not error.message:
                fault = repr(error.message)
        except Exception:
            fault = traceback.format_exc()[-1200:]
        if time.process_time() - began > SLOW:
            fault += f" {time.process_time() - began:.1f} s"
        if fault:
            faults.append(f"seed {SEED}, input {tried}: {fault}")
        tried += 1
    print(f"{name}: {tried} inputs, {good} read")
    assert not faults, "\n".join(faults)
    assert 0 < good < tried  # neither has every one been refused unread, nor none


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real tables are not here")
def test_real_readings_cut_anywhere(tmp_path: Path) -> None:
    """LIDC's own file, ended at a hundred places: it is told, as long as a tag is open."""
    whole = (SHARED / "lidc" / "LIDC-IDRI-0001" / "69.xml").read_bytes().rstrip()
    affine = affine_from_itk((-166.0, -171.7, -340.0), (0.703125, 0.703125, 2.5), np.eye(3))
    scan = Scan(np.zeros((4, 512, 512), np.int16), affine)
    path = tmp_path / "cut.xml"
    for end in np.linspace(len(b"<LidcReadMessage") * 20, len(whole) - 1, 100).astype(int):
        path.write_bytes(whole[:end])
        with pytest.raises(VoxelscaleError, match=r"cut\.xml"):
            read_labels(path, scan)


def test_readings_in_an_unknown_encoding(tmp_path: Path) -> None:
    path, read = readings(tmp_path)
    path.write_text(LIDC_XML.replace('version="1.0"', 'version="1.0" encoding="UTF-99"'))
    with pytest.raises(VoxelscaleError, match=r"1\.xml"):
        read()
