"""What the labels of a data set distinguish: classes that exclude each other, or overlapping regions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Value = int | str
"""A value of a mask, or the name of a segment (DICOM SEG) or a region of interest (RTSTRUCT)."""

IGNORED = -1
"""Stored label of a voxel that neither trains nor counts."""

UNKNOWN = -2
"""In `Classes.stored`: a value that no class has."""

MOST_CLASSES = 32767
MOST_REGIONS = 15
"""A stored label is an int16; of regions each has one of its bits."""

MOST_VALUE = 2**31 - 1


class UnknownValues(ValueError):
    """A mask holds values that no class has.

    Attributes:
        values: the values.
    """

    def __init__(self, values: Sequence[int]) -> None:
        self.values = tuple(values)
        super().__init__(f"values without a name: {', '.join(map(str, values))}")


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The foreground classes of a data set, by name; background is implied.

    A label is stored as an int16: 0 is background and `IGNORED` is ignored. Of classes the first has 1, the
    second 2, and so on; of regions the stored label has the k-th bit where the k-th region is.

    Attributes:
        names: in the order of the network's outputs.
        values: what each is in the data set's labels; () of the only class: every value above 0.
        regions: whether they are regions, which may overlap: each has a sigmoid of its own. Classes exclude
            each other and share a softmax.
        order: of regions, the value that a predicted mask has for each; they are written in this order,
            later ones over earlier ones (nnU-Net's ``regions_class_order``).
        ignore: label values that neither train nor count.
        background: label values other than 0 that are background.
    """

    names: tuple[str, ...] = ("lesion",)
    values: tuple[tuple[Value, ...], ...] = ((),)
    regions: bool = False
    order: tuple[int, ...] = ()
    ignore: tuple[int, ...] = ()
    background: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raise a ValueError where they contradict themselves."""
        if not self.names or len(self.names) != len(self.values):
            raise ValueError("a class needs a name and values")
        if len(set(self.names)) < len(self.names):
            raise ValueError("two classes have one name")
        if len(self.names) > (MOST_REGIONS if self.regions else MOST_CLASSES):
            most = MOST_REGIONS if self.regions else MOST_CLASSES
            raise ValueError(
                f"{len(self.names)} {'regions' if self.regions else 'classes'}, at most {most}"
            )
        if len(self.names) > 1 and not all(self.values):
            raise ValueError(f"{self.names[self.values.index(())]} has no values")
        every = [value for group in (*self.values, self.ignore, self.background) for value in group]
        wrong = next((v for v in every if isinstance(v, int) and not 0 < v <= MOST_VALUE), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is no label value: they are above 0")
        for kind, others in (("ignore", self.ignore), ("background", self.background)):
            both = {value for group in self.values for value in group} & set(others)
            if both:
                raise ValueError(f"the value {min(both, key=str)} is both a class and {kind}")
        if set(self.ignore) & set(self.background):
            raise ValueError("a value is both ignored and background")
        self._check_regions() if self.regions else self._check_classes()

    def _check_classes(self) -> None:
        owner: dict[Value, str] = {}
        for name, group in zip(self.names, self.values, strict=True):
            for value in group:
                if owner.setdefault(value, name) != name:
                    raise ValueError(f"the value {value} belongs to both {owner[value]} and {name}")

    def _check_regions(self) -> None:
        groups = [frozenset(group) for group in self.values]
        for at, group in enumerate(groups):
            if group in groups[:at]:
                first = self.names[groups.index(group)]
                raise ValueError(f"the regions {first} and {self.names[at]} have the same values")
        if len(self.order) != len(self.names):
            raise ValueError(f"{len(self.names)} regions need as many values in regions_class_order")
        for value in sorted({value for group in groups for value in group if isinstance(value, int)}):
            of = self._pattern(value)
            written = int(self.written(np.asarray([of], np.int16))[0])
            if self._pattern(written) != of:
                raise ValueError(
                    f"regions_class_order writes the value {value} as {written}, which is of other regions"
                )

    def _pattern(self, value: Value) -> int:
        """The stored label of a voxel whose label has this value, one of a class or region."""
        found = [at for at, group in enumerate(self.values) if value in group]
        return sum(1 << at for at in found) if self.regions else (found[0] + 1 if found else 0)

    @property
    def single(self) -> bool:
        """Whether there is one class only, for which one sigmoid does."""
        return len(self.names) == 1

    @property
    def plain(self) -> bool:
        """Whether there is one class and nothing is ignored: masks of 0 and 1."""
        return self.single and not self.ignore

    @property
    def outputs(self) -> int:
        """Channels of the network's logits: one a region, or a class and background, or 1 of one class."""
        return len(self.names) if self.regions or self.single else len(self.names) + 1

    @property
    def numbers(self) -> tuple[int, ...]:
        """Values by which masks are read: () where every value above 0 is the only class."""
        return tuple(value for group in self.values for value in group if isinstance(value, int))

    def stored(self, mask: NDArray[Any]) -> NDArray[Any]:
        """Stored labels of a mask with the data set's values: uint8 of 0 and 1 where `plain`, else int16.

        Args:
            mask: whole numbers of at least 0.

        Raises:
            UnknownValues: it has values that are no class's, neither ignored nor background.
        """
        if not mask.size:
            return np.zeros(mask.shape, np.uint8 if self.plain else np.int16)
        present = _values_in(mask)
        wanted = {value: self._stored_value(value) for value in present}
        if unknown := [value for value, label in wanted.items() if label == UNKNOWN]:
            raise UnknownValues(unknown)
        kind = np.uint8 if self.plain else np.int16
        if max(present) > 2 * len(present) + 65536:  # too large for a table
            place = np.searchsorted(present, mask)
            return np.asarray([wanted[value] for value in present], kind)[place]
        table = np.zeros(max(present) + 1, kind)
        for value, label in wanted.items():
            table[value] = label
        return np.asarray(table[mask])

    def _stored_value(self, value: int) -> int:
        if value == 0 or value in self.background:
            return 0
        if value in self.ignore:
            return IGNORED
        if self.values == ((),):
            return 1
        return self._pattern(value) or UNKNOWN

    def where(self, stored: Any, at: int) -> Any:
        """Where the class or region number `at`, from 0, is; bool.

        Args:
            stored: an array or a tensor of stored labels.
        """
        return (stored > 0) & ((stored >> at) & 1 == 1) if self.regions else stored == at + 1

    def each(self, stored: NDArray[Any]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Every class or region by name, and where it is."""
        for at, name in enumerate(self.names):
            yield name, self.where(stored, at)

    @property
    def written_values(self) -> tuple[int, ...]:
        """The value that each has in a predicted mask: the data set's own, 1 of one class."""
        if self.regions:
            return self.order
        if self.single:
            return (1,)
        first = [next((v for v in group if isinstance(v, int)), 0) for group in self.values]
        return tuple(first) if all(first) else tuple(range(1, len(self.names) + 1))

    def written(self, stored: NDArray[Any]) -> NDArray[Any]:
        """A predicted mask of stored labels: uint8 where its values fit, else int32."""
        values = self.written_values
        out = np.zeros(stored.shape, np.uint8 if max(values) <= 255 else np.int32)
        for at, value in enumerate(values):
            out[self.where(stored, at)] = value
        return out

    def of_written(self, mask: NDArray[Any]) -> NDArray[Any]:
        """Stored labels of a mask that `written` made.

        Raises:
            UnknownValues: it holds other values.
        """
        values = self.written_values
        pattern = {v: self._pattern(v) if self.regions else at + 1 for at, v in enumerate(values)}
        present = _values_in(mask) if mask.size else []
        if unknown := [value for value in present if value and not pattern.get(value)]:
            raise UnknownValues(unknown)
        out = np.zeros(mask.shape, np.uint8 if self.single else np.int16)
        for value in present:
            if value:
                out[mask == value] = pattern[value]
        return out

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "names": list(self.names),
            "values": [list(group) for group in self.values],
            "regions": self.regions,
            "order": list(self.order),
            "ignore": list(self.ignore),
            "background": list(self.background),
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Classes:
        """What `to_dict` made.

        Raises:
            ValueError, TypeError, KeyError: it is nothing of the kind.
        """
        names, values = tree["names"], tree["values"]
        if not all(isinstance(name, str) and name.isprintable() for name in names):
            raise ValueError("a class's name is no text")
        groups = tuple(tuple(_value(value) for value in group) for group in values)
        order, ignore, background = (
            tuple(_number(value) for value in tree[key]) for key in ("order", "ignore", "background")
        )
        return cls(
            names=tuple(names),
            values=groups,
            regions=bool(tree["regions"]),
            order=order,
            ignore=ignore,
            background=background,
        )


LESION = Classes()
"""One class: every value above 0."""

NODULE = Classes(names=("nodule",))


def _values_in(mask: NDArray[Any]) -> list[int]:
    """The values of a mask, ascending; by counting where they are small, as sorting takes seconds."""
    most = int(mask.max())
    if most < 65536:
        there = np.zeros(most + 1, bool)
        for plane in mask.reshape(len(mask), -1):  # of a whole scan at once the count takes 8 bytes a voxel
            if plane.max() == 0:
                there[0] = True
            else:
                there |= np.bincount(plane.astype(np.uint16, copy=False), minlength=most + 1) > 0
        return np.flatnonzero(there).tolist()
    return [int(value) for value in np.unique(mask)]


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _value(value: Any) -> Value:
    return value if isinstance(value, str) else _number(value)
