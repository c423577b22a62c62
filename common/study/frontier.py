"""Figures of rows: what a file of so many bytes costs, and what each part of a method buys."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from common.fisher.information import WORDS
from common.study.rows import BASELINE, REAL, Figure, Row

FID_NAMES = {"fid": "FID", "fid_unbiased": "unbiased FID", "fid_unbiased_difference": "unbiased FID minus FP32's"}
# Ten colours that differ in print and to most colour-blind eyes (Petroff 2021), and markers for the next ten.
# The two greys come last: bands are grey.
COLOURS = ("#3f90da", "#ffa90e", "#bd1f01", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#92dadd", "#94a4a2", "#717581")
MARKERS = ("o", "s", "^")
LINE_HEIGHT = 12  # of a label, in points, and
LETTER = 4.6  # the width of one of its letters
FEW_WAYS = 4  # of joined points, whose sizes there is room to name


def draw_fid_against_size(rows: list[Row]):
    """FID (`_fid_shown`), and PSNR to the FP32 images, against the size of the file. A way to make files of any size is
    a line with a band of one standard error, named where its files are smallest; of the others points are drawn. Where
    the ways are few, each point of a line has its size or format beside it."""
    measured = [row for row in rows if row.size_mib]
    if len(measured) < 2:
        return None
    shown = _fid_shown(measured)
    figure, axes = plt.subplots(1, 2, figsize=(15, 6), width_ratios=(3, 2))
    styles = dict(zip(dict.fromkeys(map(_drawn_as, measured)), _styles(), strict=False))
    few = len({_drawn_as(row) for row in measured if is_joined(row)}) <= FEW_WAYS
    for axis, key in zip(axes, (shown, "psnr"), strict=True):
        ends = {}
        for kind, (marker, colour) in styles.items():
            chosen = [row for row in measured if _drawn_as(row) == kind and getattr(row, key)]
            points = sorted(((row.file_mib or row.size_mib, getattr(row, key)) for row in chosen), key=lambda at: at[0])
            if not points:
                continue
            joined = is_joined(chosen[0])
            if joined:
                _band(axis, points, colour)
            for row in chosen if joined and few else []:
                at = row.file_mib or row.size_mib, getattr(row, key).value
                name = row.setting.partition(",")[0] or (row.format or "").upper()
                free = (5, 5 if key == shown else -11)  # FID falls with the size, PSNR rises
                axis.annotate(name, at, free, textcoords="offset points", fontsize=7, color=colour)
            _errorbar(axis, points, fmt=marker + ("-" if joined else ""), color=colour, label=kind)
            ends[kind] = points[0][0], points[0][1].value, colour
        axis.set(xlabel="MiB of the file", xscale="log")
        axis.set_xlim(right=1.1 * axis.get_xlim()[1])
        axis.grid(alpha=0.3, which="both")
        if axis is axes[0]:
            _level_to_compare(axis, rows, shown)
            _fid_scale(axis, [getattr(row, shown) for row in measured if getattr(row, shown)])
            _make_room(axis, ends)
            _name_ends(axis, ends)
            _mark_published(axis, measured)
            bands = [label for label in axis.get_legend_handles_labels()[1] if label not in ends]
            if bands:
                of = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
                axis.legend([of[label] for label in bands], bands, loc="upper right", fontsize=8)
        _plain_ticks(axis)
    around = ", linear around 0" if axes[0].get_yscale() == "symlog" else ""
    axes[0].set(ylabel=f"{FID_NAMES[shown]} ({_features(rows)}{around})", title="What a file of this size costs")
    axes[1].set(ylabel="PSNR to the FP32 images, dB", title="The same models: how near their images are to FP32's")
    figure.tight_layout()
    return figure


def draw_waterfall(rows: list[Row]):
    """The unbiased FID, less FP32's, of each part that `python -m common waterfall` measured: a bar for each part, a
    panel for each size of file, the largest first. None where fewer than three parts have one size."""
    sizes: dict[str, dict[str, Figure]] = {}
    mib: dict[str, float] = {}
    for row in rows:
        if row.strategy == "Budget" and row.format == "entropy" and row.fid_unbiased_difference and row.draw is None:
            kind = _drawn_as(row).removeprefix("Budget, entropy").removeprefix(", ")
            size = row.setting.partition(",")[0]
            sizes.setdefault(size, {})[kind or "all parts"] = row.fid_unbiased_difference
            mib[size] = row.size_mib or 0.0
    sizes = {size: sizes[size] for size in sorted(sizes, key=mib.get, reverse=True) if len(sizes[size]) > 2}
    if not sizes:
        return None
    names = list(dict.fromkeys(name for parts in sizes.values() for name in parts))[::-1]
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(3 + 3.2 * len(sizes), 1 + 0.4 * len(names)), sharey=True, squeeze=False
    )
    for axis, (size, parts) in zip(axes[0], sizes.items(), strict=True):
        for place, name in enumerate(names):
            if name in parts:
                value, error = parts[name].value, parts[name].error
                axis.barh(place, value, xerr=error, color=COLOURS[2] if name == "all parts" else COLOURS[0], capsize=3)
                axis.annotate(
                    parts[name].text(3), (max(value + error, 0), place), (4, 0), textcoords="offset points",
                    va="center", fontsize=8,
                )  # fmt: skip
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set_xlim(right=40 * max(part.value for part in parts.values()))  # room for the numbers
        axis.set(title=f"{size} smaller" if size.endswith("x") else size, yticks=range(len(names)), yticklabels=names)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, axis="x")
    figure.supxlabel(FID_NAMES["fid_unbiased_difference"], fontsize=10)
    figure.tight_layout()
    return figure


def draw_fid_against_ratio(rows: list[Row]):
    """FID against the ratio that stays FP32, one line for each format and Fisher timestep."""
    ratios = sorted((row for row in rows if row.strategy == "Ratio"), key=lambda row: float(row.setting))
    if len(ratios) < 2:
        return None
    shown = _fid_shown(ratios)
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for fmt, weighting, word in dict.fromkeys((row.format, row.timestep_weighting, _values_of(row)) for row in ratios):
        chosen = [r for r in ratios if (r.format, r.timestep_weighting, _values_of(r)) == (fmt, weighting, word)]
        _errorbar(
            axis, [(float(row.setting), getattr(row, shown)) for row in chosen if getattr(row, shown)],
            fmt="o-", label=f"Ratio ({fmt.upper()}, {word} values: {weighting})",
        )  # fmt: skip
    _level_to_compare(axis, rows, shown)
    axis.set(
        xlabel="ratio of each layer's weights that stays FP32",
        ylabel=f"{FID_NAMES[shown]} ({_features(rows)})",
    )
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def draw_learning_curve(rows: list[Row]):
    """FID of the baseline as it was trained, against the digits that it had seen."""
    curve = sorted((row for row in rows if row.digits_seen), key=lambda row: row.digits_seen)
    if len(curve) < 2:
        return None
    shown = "fid_unbiased" if all(row.fid_unbiased for row in curve) else "fid"
    figure, axis = plt.subplots(figsize=(7, 4.5))
    points = [(row.digits_seen, getattr(row, shown)) for row in curve]
    _errorbar(axis, points, fmt="o-", label="averaged weights")
    _level_to_compare(axis, rows, shown)
    _fid_scale(axis, [figure for _, figure in points])
    axis.set(xlabel="digits seen", ylabel=f"{FID_NAMES[shown]} ({_features(rows)})")
    _plain_ticks(axis)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, which="both")
    return figure


def _drawn_as(row: Row) -> str:
    """What a row is drawn as: budgets by coding, rounding, variant, updates and the weighting of timesteps, the others
    by their rule and rounding."""
    if row.strategy != "Budget":
        return ", ".join(filter(None, [row.strategy, row.rounding]))
    weighting = f"{_values_of(row)} values: {row.timestep_weighting}"
    if weighting == "Fisher values: image":  # the default
        weighting = None
    variant = f"{row.updates} updates" if row.updates else row.variant
    return ", ".join(filter(None, ["Budget", row.format, row.rounding, variant, weighting]))


def _features(rows: list[Row]) -> str:
    """The features' name without the hash of their weights."""
    return rows[0].settings.metric.rsplit(" ", 1)[0]


def _values_of(row: Row) -> str:
    return WORDS[row.curvature or "fisher"]


def _styles():
    for marker in MARKERS:
        for colour in COLOURS:
            yield marker, colour


def _errorbar(axis, points: list[tuple[float, Figure]], **style) -> None:
    x, y = [x for x, _ in points], [figure.value for _, figure in points]
    axis.errorbar(x, y, [figure.error for _, figure in points], capsize=3, **style)


def _band(axis, points: list[tuple[float, Figure]], colour: str) -> None:
    x, low, high = zip(*((x, f.value - f.error, f.value + f.error) for x, f in points), strict=True)
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def is_joined(row: Row) -> bool:
    """Whether a row is one of a way to make files of any size."""
    return row.strategy in ("Uniform", "Budget") and row.draw is None


def _make_room(axis, ends: dict[str, tuple[float, float, str]]) -> None:
    """Moves the left end of the logarithmic x axis so far that the names of `ends` fit left of their points."""
    (low, high), width = axis.get_xlim(), axis.bbox.width * 72 / axis.figure.dpi
    for name, (x, _, _) in ends.items():
        share = min(0.8, (LETTER * len(name) + 16) / width)  # of the axis
        low = min(low, high * (x / high) ** (1 / (1 - share)))
    axis.set_xlim(left=low)


def _name_ends(axis, ends: dict[str, tuple[float, float, str]]) -> None:
    """Writes each name, {name: (x, y, colour)}, left of its point, and above where another is in the way."""
    placed: list[tuple[float, float, float]] = []  # right end, width, height above the axis' lower edge, all in points
    to_points = 72 / axis.figure.dpi
    for name, (x, y, colour) in sorted(ends.items(), key=lambda end: end[1][1]):
        right, at = (to_points * c for c in axis.transData.transform((x, y)))
        width, height = LETTER * len(name), at
        while any(right - width < r and r - w < right and abs(height - h) < LINE_HEIGHT for r, w, h in placed):
            height += 1
        placed.append((right, width, height))
        axis.annotate(
            name, (x, y), (-8, height - at), textcoords="offset points", ha="right", va="center", fontsize=8,
            color=colour, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5},
        )  # fmt: skip


def _mark_published(axis, measured: list[Row]) -> None:
    """Ticks at the sizes that were published for the paper's network; the FIDs there compare with none here."""
    sizes = {row.published[1] for row in measured if row.published and row.settings.preset == "paper"}
    for i, size in enumerate(sorted(sizes)):
        label = None if i else "sizes that were published in FP16 and FP32"
        axis.axvline(size, ymax=0.04, color="black", linewidth=2, label=label)


def _fid_shown(rows: list[Row]) -> str:
    """The field to draw: the unbiased difference to FP32, of the rows that have it; FID of N images where none has."""
    return "fid_unbiased_difference" if any(row.fid_unbiased_difference for row in rows) else "fid"


def _level_to_compare(axis, rows: list[Row], shown: str) -> None:
    """A band, the FID of real test digits with one standard error; of differences, where FP32 is, with one error of its
    own FID: a difference inside it is smaller than what the baseline is known to."""
    difference = shown == "fid_unbiased_difference"
    for row in rows:
        if difference and row.strategy == BASELINE and row.fid_unbiased:
            error = row.fid_unbiased.error
            axis.axhspan(-error, error, color="0.85", label="FP32, and one error of its own FID")
        elif not difference and row.strategy == REAL and (fid := getattr(row, shown)):
            axis.axhspan(fid.value - fid.error, fid.value + fid.error, color="0.8", label=row.label)
    if difference:
        axis.axhline(0, color="0.6", linewidth=1)


def _fid_scale(axis, drawn: list[Figure]) -> None:
    """A logarithmic axis; where a bar reaches below zero, linear around it as far as that bar and the usual error."""
    low = min(figure.value - figure.error for figure in drawn)
    if low > 0:
        axis.set_yscale("log")
    else:
        linear = max(-low, float(np.median([figure.error for figure in drawn])), 1e-6)
        axis.set_yscale("symlog", linthresh=linear)
        axis.set_ylim(bottom=1.2 * low - 0.1 * linear)
    axis.set_ylim(top=2 * max(figure.value + figure.error for figure in drawn))


def _plain_ticks(axis) -> None:
    """Numbers without powers of ten, where a logarithmic axis has room for them."""
    for side in (axis.xaxis, axis.yaxis):
        if side.get_scale() == "log":
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_minor_formatter(NullFormatter())
        side.set_major_formatter("{x:g}")
