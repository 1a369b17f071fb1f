"""Coded concepts of classes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom.sr.codedict import codes

from voxelscale.config import load
from voxelscale.dicom_out.codes import concept_of
from voxelscale.errors import VoxelscaleError


@pytest.mark.parametrize(
    ("name", "kind", "category", "in_lung"),
    [
        ("nodule", codes.SCT.Nodule, "Morphologically Abnormal Structure", False),
        ("Lung_Nodule", codes.SCT.Nodule, "Morphologically Abnormal Structure", True),
        ("pulmonary nodule", codes.SCT.Nodule, "Morphologically Abnormal Structure", True),
        ("tumour", codes.SCT.Neoplasm, "Morphologically Abnormal Structure", False),
        ("cyst", codes.SCT.Cyst, "Morphologically Abnormal Structure", False),
        ("Liver", codes.SCT.Liver, "Anatomical Structure", False),
        ("hippocampus", codes.SCT.Hippocampus, "Anatomical Structure", False),
        ("soft tissue", codes.SCT.SoftTissue, "Tissue", False),
        ("anterior", codes.SCT.Lesion, "Morphologically Abnormal Structure", False),
        ("background", codes.SCT.Lesion, "Morphologically Abnormal Structure", False),
    ],
)
def test_a_class_is_called_by_the_standard(name: str, kind: object, category: str, in_lung: bool) -> None:
    concept = concept_of(name, {}, chest=False)
    scheme, value, _ = concept.kind
    assert (value, scheme) == (kind.value, kind.scheme_designator)  # type: ignore[attr-defined]
    assert concept.category[2] == category
    assert (concept.site is not None) == in_lung
    if category == "Morphologically Abnormal Structure":
        chest = concept_of(name, {}, chest=True)
        assert chest.site is not None
        assert chest.site[2] == "Lung"


def test_a_user_names_a_code() -> None:
    own = {"Anterior": ["SCT", 10200004, "Liver"], "other": ["99X", "A", "Another"]}
    assert concept_of("anterior", own, chest=True).kind == ("SCT", "10200004", "Liver")
    assert concept_of("anterior", own, chest=True).category[2] == "Anatomical Structure"
    assert concept_of("other", own, chest=False).kind == ("99X", "A", "Another")


@pytest.mark.parametrize(
    "codes", ["{a: b}", "{a: [SCT, 1]}", "{a: [SCT, '', x]}", "{a: [S, 12345678901234567, x]}"]
)
def test_what_is_no_code_is_refused(codes: str, tmp_path: Path) -> None:
    with pytest.raises(VoxelscaleError) as caught:
        load(None, [f"export.codes={codes}"])
    assert "export.codes" in caught.value.message
    assert "[scheme, value, meaning]" in caught.value.hint
