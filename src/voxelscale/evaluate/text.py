"""An evaluation in lines for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from voxelscale.console import count


def text_summary(summary: Mapping[str, Any]) -> list[str]:
    """What `voxelscale.evaluate.evaluate.evaluate_folder` returned, in lines for a person."""
    if "classes" in summary:
        return _text_classes(summary)
    lines = [
        f"{count(summary['scans'], 'scan')}, {count(summary['lesion_count'], 'lesion')}"
        f"{_text_coverage(summary.get('coverage'))}",
        *_text_healthy(summary["healthy"]),
        *_text_overlap(summary),
        _text_sensitivity(summary),
    ]
    for row in summary["iou"]:
        lines.append(
            f"components with IoU of {row['iou']:g} or more: sensitivity {text_value(row['sensitivity'])}, "
            f"precision {text_value(row['precision'])}, "
            f"average precision {text_value(row['average_precision'])}"
        )
    return [*lines, *_text_tables(summary)]


def _text_classes(summary: Mapping[str, Any]) -> list[str]:
    """Of each class a heading and its lines, then the mean."""
    lines = []
    for name, own in summary["classes"].items():
        lines += [f"class {name}", *(f"  {line}" for line in text_summary(own))]
    return [*lines, f"{text_mean_dice(summary)}{_text_coverage(summary.get('coverage'))}"]


def text_mean_dice(summary: Mapping[str, Any]) -> str:
    """The mean Dice over classes of an evaluation of several."""
    mean, there = summary["mean_dice"], len(summary["classes"])
    if mean["mean"] is None:
        return "mean Dice over classes: no value, as all masks are empty"
    of = count(there, "class", "classes")
    of = of if mean["classes"] == there else f"{mean['classes']} of {of}"
    return f"mean Dice over {of} {mean['mean']:.3f} ({text_interval(mean['interval'], mean['patients'])})"


def _text_coverage(row: Mapping[str, Any] | None) -> str:
    """Where not all of the data set is scored."""
    if row is None or row["scored"] == row["with_truth"]:
        return ""
    return f"; scored {row['scored']} of {count(row['with_truth'], 'case')} with truth"


def _text_healthy(row: Mapping[str, Any]) -> list[str]:
    if not row["scans"]:
        return []
    scans, wrong = count(row["scans"], "healthy scan"), count(row["false_positives"], "false positive")
    return [f"{scans}: {row['without_false_positives']} without a false positive, {wrong} in all"]


def _text_overlap(summary: Mapping[str, Any]) -> list[str]:
    dice = summary["dice"]
    if not dice["cases"]:
        return ["Dice and surface Dice: no value, as all masks are empty"]
    surface = ", ".join(
        f"{row['mean']:.3f} within {row['tolerance_mm']:g} mm "
        f"({text_interval(row['interval'], row['patients'])})"
        for row in summary["surface_dice"]
    )
    empty = summary["scans"] - dice["cases"]
    without = f"; {count(empty, 'scan')} without: both masks are empty" if empty else ""
    return [
        f"Dice {dice['mean']:.3f} ({text_interval(dice['interval'], dice['patients'])}), "
        f"median {dice['median']:.3f}, minimum {dice['least']:.3f}, "
        f"pooled {summary['dice_pooled']:.3f}{without}",
        f"surface Dice {surface}",
        _text_distances(summary["hd95_mm"]),
    ]


def _text_sensitivity(summary: Mapping[str, Any]) -> str:
    cpm, patients = summary["froc"], summary["patients_with_lesions"]
    if cpm["cpm"] is None:
        return (
            "sensitivity and CPM: no value without a lesion; "
            f"{summary['operating_point']['fp_per_scan']:.3g} false positives per scan"
        )
    return (
        f"sensitivity at 1 FP/scan {summary['sensitivity_at_1_fp']:.3f} "
        f"({text_interval(summary['sensitivity_at_1_fp_interval'], patients, 'patient with a lesion')}), "
        f"CPM {cpm['cpm']:.3f} ({text_interval(cpm['cpm_interval'], patients, 'patient with a lesion')})"
    )


def _text_tables(summary: Mapping[str, Any]) -> list[str]:
    """Lesions by size, and synthetic nodules by their traits; rows without any are left out."""
    lines = [f"{'lesions':20}  number  found  at 1 FP/scan   Dice  volume"]
    for row in summary["sizes"]:
        if row["lesions"]:
            dice, volume = text_value(row["dice"]), text_change(row["volume_error"])
            lines.append(f"{_text_counts(size_name(row), row)}  {dice:>5}  {volume:>6}")
    for trait, rows in summary["nodules"].items():
        lines += [_text_counts(f"{trait} {row['value']}", row) for row in rows]
    return lines if len(lines) > 1 else []


def _text_counts(name: str, row: Mapping[str, Any]) -> str:
    at_1 = text_value(row["sensitivity_at_1_fp"])
    return f"{name:20}  {row['lesions']:6}  {row['detected']:5}  {at_1:>12}"


def _text_distances(row: Mapping[str, Any]) -> str:
    without = f", {row['one_mask_empty']} without: one mask is empty" if row["one_mask_empty"] else ""
    if not row["cases"]:
        return f"HD95: of no case{without}"
    return (
        f"HD95 mean {row['mean']:.1f} mm, median {row['median']:.1f} mm, "
        f"of {count(row['cases'], 'case')}{without}"
    )


def text_interval(bounds: Sequence[float] | None, patients: int, noun: str = "patient") -> str:
    """A 95 % interval, or why there is none: so few patients."""
    if bounds is None:
        return f"no interval: {count(patients, noun, noun.replace('patient', 'patients'))}"
    return f"95 % {bounds[0]:.3f} to {bounds[1]:.3f}"


def text_value(value: float | None) -> str:
    """Three digits, or a dash where there is no value."""
    return "-" if value is None else f"{value:.3f}"


def text_change(share: float | None) -> str:
    """A signed share in per cent, or a dash where there is none."""
    return "-" if share is None else f"{100 * share:+.0f} %"


def size_name(row: Mapping[str, Any]) -> str:
    """A row of ``sizes``, named by its diameters."""
    if row["below_mm"] is None:
        return f"{row['from_mm']:g} mm and more"
    return (
        f"{row['from_mm']:g} to {row['below_mm']:g} mm"
        if row["from_mm"]
        else f"below {row['below_mm']:g} mm"
    )
