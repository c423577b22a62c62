"""The report as one page of HTML: results/<preset>/report.html, without parts outside the file."""

import base64
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from common.choose.layers import layer_of
from common.presets import FORMATS
from common.runtime.files import write_atomically
from common.study.columns import MAIN, MORE, NOTHING, cells, filled
from common.study.held_out import format_losses
from common.study.memorised import format_nearest
from common.study.report import MORE_FOOT, describe, feet_of, format_times
from common.study.rows import BASELINE, Row, kind_of

NAME = "report.html"
SAID = (format_nearest, format_losses, format_times)  # below the table
CAPTIONS = {  # of the figures, by how their names begin: what to see
    "samples": "The first images of each row. Each column starts from the same noise, so a digit that differs from "
    "FP32's is one that quantization changed.",
    "fid-size": "What a file of so many bytes costs: the lower and the further left, the better. A band is one "
    "standard error.",
    "waterfall": "What each part of layer_budget.py buys, in files of equal bytes.",
    "fid-ratio": "How FID falls with the share of each layer that stays FP32.",
    "learning-curve": "How FID fell as the baseline was trained.",
    "fisher-tensors": "Fisher information of each weight tensor, one line for each timestep: how much the loss feels a "
    "change there.",
    "fisher-groups": "Fisher information over the timesteps, of layers 1 and 2 and of layers 3 to 6.",
    "sensitivity": "The increase of the loss as predicted and as measured, each tensor quantized alone.",
    "weights": "How large the weights of each layer are.",
    "loss": "The loss as the baseline was trained.",
}


@dataclass(frozen=True)
class Cell:
    """text: what is read; value: what is sorted by, "" where there is none."""

    text: str
    value: float | str


def write_page(folder: Path, groups: list[list[Row]], pictures: list[Path]) -> Path:
    """Writes the report on `groups`, rows of the same settings, with `pictures`, PNG files as `figures.draw_all` names
    them; returns its path. All that rows say is escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    several, shown = len(groups) > 1, []
    for number, rows in enumerate(groups, start=1):
        columns = filled((*MAIN, *MORE, "permutations as good", "p"), rows)
        own = [path for path in pictures if _group_of(path, several) == number]
        shown.append(
            {
                "heading": "Rows" + (f", {number} of {len(groups)}" if several else ""),
                "settings": describe(rows[0]),
                "heads": ["Model", *columns],
                "cells": [
                    [Cell(text, _number(text)) for text in [row.label, *cells(row, columns, rows)]] for row in rows
                ],
                "foot": ". ".join([*feet_of(rows), MORE_FOOT]),
                "lines": [line for said in SAID for line in said(rows).splitlines()],
                "kept": _kept(rows),
                "pictures": [_picture(path) for path in own],
            }
        )
    baseline = groups[0][0].settings
    page = environment.get_template("page.html.j2").render(
        title=f"simplediffusion: {kind_of(baseline.preset).lower()} {baseline.preset}",
        about="What making a diffusion model smaller costs. Unbiased FID is the distance between the features of "
        "generated and of real digits; - FP32 is what quantization adds to it, on the same noise. A difference within "
        "two of its errors is no evidence of a difference.",
        groups=shown,
        pictures=[_picture(path) for path in pictures if _group_of(path, several) is None],
        tensors=[path.read_text() for path in sorted(folder.glob("tensors-*.txt"))],
        formats=[*FORMATS, "entropy"],
    )
    path = folder / NAME
    write_atomically(path, page.encode())
    return path


def _number(text: str) -> float | str:
    """What a cell is sorted by: the number that it begins with, or else its text."""
    if text == NOTHING:
        return ""
    try:
        return float(text.split()[0].rstrip("%,"))
    except ValueError:
        return text


def _kept(rows: list[Row]) -> dict | None:
    """The formats of the tensors that any row quantizes; None where no row says which."""
    said = [row for row in rows if row.formats and row.strategy != BASELINE and row.format != "entropy"]
    shared = [name for name in (said[0].formats if said else {}) if all(name in row.formats for row in said)]
    names = [name for name in shared if any(row.formats[name] != "fp32" for row in said)]
    if not names:
        return None
    layers: dict[str, int] = {}
    for name in names:
        layers[layer_of(name)] = layers.get(layer_of(name), 0) + 1
    used = {row.formats[name] for row in said for name in names}
    return {
        "formats": [name for name in FORMATS if name in used],
        "layers": list(layers.items()),
        "rows": [(row.label, [(name, row.formats[name]) for name in names]) for row in said],
    }


def _group_of(picture: Path, several: bool) -> int | None:
    """The number of the group that a figure shows; None where it shows the network."""
    kind, _, number = picture.stem.rpartition("-")
    of_rows = ("samples", "fid-size", "waterfall", "fid-ratio", "learning-curve")
    if several:
        return int(number) if kind in of_rows and number.isdigit() else None
    return 1 if picture.stem in of_rows else None


def _picture(path: Path) -> dict[str, str]:
    caption = next((text for start, text in CAPTIONS.items() if path.stem.startswith(start)), path.stem)
    return {"alt": caption, "data": base64.b64encode(path.read_bytes()).decode()}
