"""What classes are called in DICOM: coded concepts (PS3.16).

A class has the code that the user gives it (``export.codes``); else that of the concept of its name in
the standard's context groups for segments, lesions first; else "Lesion", and its name is the label.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Triplet = tuple[str, str, str]
"""Scheme, value, meaning."""

ABNORMAL: Triplet = ("SCT", "49755003", "Morphologically Abnormal Structure")
ANATOMICAL: Triplet = ("SCT", "91723000", "Anatomical Structure")
TISSUE: Triplet = ("SCT", "85756007", "Tissue")
LESION: Triplet = ("SCT", "52988006", "Lesion")
LUNG: Triplet = ("SCT", "39607008", "Lung")

GROUPS = (("cid7194", ABNORMAL), ("cid7192", ANATOMICAL), ("cid7191", TISSUE))
"""Context groups of morphologically abnormal, anatomical and tissue segmentation property types, and the
category of each (CID 7150)."""

NO_LESIONS = {"background", "normal"}
"""Concepts of CID 7194 that are none."""

SYNONYMS = {
    "tumor": "neoplasm",
    "tumour": "neoplasm",
    "cancer": "neoplasm",
    "gtv": "neoplasm",
    "lungnodule": "nodule",
    "nodulelung": "nodule",
    "pulmonarynodule": "nodule",
    "lungtumor": "neoplasm",
    "lungtumour": "neoplasm",
    "lungcancer": "neoplasm",
    "lunglesion": "lesion",
}
"""Other words for concepts, in small letters and nothing but these."""


@dataclass(frozen=True, kw_only=True)
class Concept:
    """What a class is, in codes.

    Attributes:
        category, kind: the segmented property's (PS3.3 C.8.20.4).
        site: where in the body; None: not said.
    """

    category: Triplet
    kind: Triplet
    site: Triplet | None = None


def concept_of(name: str, codes: Mapping[str, Any], *, chest: bool) -> Concept:
    """The concept of a class.

    Args:
        name: of the class, as the data set calls it.
        codes: what the user gives; names regardless of capitals.
        chest: whether findings lie in or at the lungs.
    """
    given = {str(key).casefold(): value for key, value in codes.items()}.get(name.casefold())
    word = _plain(name)
    if given is not None:
        scheme, value, meaning = (str(part).strip() for part in given)
        kind = (scheme, value, meaning)
        category = _category_of(kind) or ABNORMAL
    else:
        category, kind = _known(SYNONYMS.get(word, word)) or (ABNORMAL, LESION)
    in_lung = category == ABNORMAL and (chest or "lung" in word or "pulmonary" in word)
    return Concept(category=category, kind=kind, site=LUNG if in_lung else None)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())


def _concepts(group: str) -> Mapping[str, Any]:
    """The codes of a context group by their names in small letters."""
    from pydicom.sr.codedict import codes

    found = {word.casefold(): code for word, code in getattr(codes, group).concepts.items()}
    return {word: code for word, code in found.items() if word not in NO_LESIONS}


def _known(word: str) -> tuple[Triplet, Triplet] | None:
    for group, category in GROUPS:
        if (code := _concepts(group).get(word)) is not None:
            return category, (code.scheme_designator, code.value, code.meaning)
    return None


def _category_of(kind: Triplet) -> Triplet | None:
    for group, category in GROUPS:
        if any((c.scheme_designator, c.value) == kind[:2] for c in _concepts(group).values()):
            return category
    return None


def coded(triplet: Triplet) -> Any:
    """As highdicom takes it."""
    from highdicom.sr import CodedConcept

    scheme, value, meaning = triplet
    return CodedConcept(value=value, scheme_designator=scheme, meaning=meaning)
