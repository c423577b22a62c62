"""The tables of the pages, made from the rows that are kept in reference/; `make docs` writes them into the pages.

A page holds the call in a comment, and cog (cogapp) puts what it prints below it:

    <!-- [[[cog table("quick", "unbiased FID, MiB", seeds=3) ]]] -->
    <!-- [[[end]]] -->
"""

import json
from pathlib import Path

import numpy as np

from common.study.columns import COLUMNS, cells, markdown_table
from common.study.increases import FILE, Increases, rank_correlation, read_increases
from common.study.rows import ResultStore, Row

REFERENCE = Path(__file__).parent.parent / "reference"
MACHINES = {"AVX-512": "avx512", "AMX": "amx"}  # {what a table calls it: its folder in reference/speed}


def table(folders: str, columns: str, labels: list[str] | None = None, **settings) -> None:
    """Prints the rows of reference/`folders` (names separated by spaces) with these settings, such as seeds=3, as
    Markdown: all, or those of `labels`, in that order; columns: names of `common.study.columns`, separated by commas.
    Of rows that several folders hold, the first folder's is taken. Raises KeyError for a row that is not there."""
    rows: dict[str, Row] = {}
    for folder in folders.split():
        rows = read_rows(folder, **settings) | rows
    chosen = [rows[label] for label in labels] if labels else list(rows.values())
    wanted = [name.strip() for name in columns.split(",")]
    print(markdown_table([["", *wanted], *([row.label, *cells(row, wanted, list(rows.values()))] for row in chosen)]))


def matrix(folder: str, column: str, lines: dict[str, str], heads: list[str], **settings) -> None:
    """Prints one cell for each line, {what it says: label with {} for the head}, and head."""
    rows = read_rows(folder, **settings)
    cells = [[said, *(COLUMNS[column](rows[label.format(head)]) for head in heads)] for said, label in lines.items()]
    print(markdown_table([[column, *heads], *cells]))


def read_rows(folder: str, **settings) -> dict[str, Row]:
    """{label: row} of reference/`folder` where all the `settings` are these. Raises KeyError where two rows would have
    one label."""
    rows: dict[str, Row] = {}
    for row in ResultStore(REFERENCE / folder / "results.jsonl").rows():
        if all(getattr(row.settings, key) == value for key, value in settings.items()):
            if row.label in rows:
                raise KeyError(f"reference/{folder} has two rows {row.label}: name more settings")
            rows[row.label] = row
    return rows


def correlations(folders: list[str], formats: list[str]) -> None:
    """Prints the rank correlations of predictors with the increase of the loss, a column for each preset and format."""
    predictors = {
        "Fisher, timestep 1": lambda m: m.fisher["timestep 1"],
        "the same times the squared error of quantizing": lambda m: np.multiply(
            m.fisher["timestep 1"], m.squared_error
        ),
        "the squared error alone": lambda m: m.squared_error,
    }
    measured = [(f"{folder} {m.format.upper()}", m) for folder in folders for m in increases(folder, formats)]
    lines = []
    for said, values in predictors.items():
        pairs = (rank_correlation(np.array(values(m)), np.array(m.mean)) for _, m in measured)
        lines.append([said, *(_pair(*pair, 2) for pair in pairs)])
    print(markdown_table([["", *(head for head, _ in measured)], *lines]))


def predictions(folder: str, formats: list[str]) -> None:
    """Prints the increase of the loss x 10^6 where all tensors are quantized at once, and what was predicted."""
    measured = increases(folder, formats)
    lines = [["measured", *(_millionths(*m.together) for m in measured)]]
    for how, said in (("Gauss-Newton", "predicted by Gauss-Newton values"), ("Fisher / 2", "half of F dw²")):
        lines.append([said, *(_millionths(m.predicted()[how].sum()) for m in measured)])
    print(markdown_table([["", *(m.format.upper() for m in measured)], *lines]))


def layers(folders: list[str], formats: list[str]) -> None:
    """Prints the increase of the loss x 10^6, summed over the tensors of each layer."""
    measured = [(f"{folder}, {m.format.upper()}", m) for folder in folders for m in increases(folder, formats)]
    heads = list(measured[0][1].layers)
    lines = [[said, *(_millionths(*pair) for pair in m.layers.values())] for said, m in measured]
    print(markdown_table([["", *(f"layer {head.removeprefix('layer')}" for head in heads)], *lines]))


def speed(preset: str, work: str) -> None:
    """Prints the times of one kind of work that `python -m benchmarks.speed` kept, for each machine: milliseconds, how
    many times faster than the published way that is, and the share of the machine's peak."""
    kept = [json.loads((REFERENCE / "speed" / machine / f"{preset}.json").read_text()) for machine in MACHINES.values()]
    of_ways = [{t["way"]: t for t in timings["timings"] if t["work"] == work} for timings in kept]
    heads = [head for name in MACHINES for head in (f"{name}: ms", "faster", "of the peak")]
    lines = [[way, *(cell for timings in of_ways for cell in _time(timings, way))] for way in of_ways[0]]
    print(markdown_table([[f"{work}, {preset}", *heads], *lines]))


def increases(folder: str, formats: list[str]) -> list[Increases]:
    """What `python -m common sensitivity` kept in reference/`folder`, in the order of `formats`."""
    by_format = {m.format: m for m in read_increases(REFERENCE / folder / FILE)[1]}
    return [by_format[name] for name in formats]


def _time(timings: dict[str, dict], way: str) -> tuple[str, str, str]:
    seconds, of_peak = timings[way]["seconds"], timings[way]["of_peak"]
    share = "-" if of_peak is None else f"{of_peak:.0%}"
    return f"{1000 * seconds:.2f}", f"{timings['published']['seconds'] / seconds:.1f}x", share


def _pair(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _millionths(*figures: float) -> str:
    """A value, or value and error, x 10^6: small ones with two digits."""
    return " ± ".join(f"{1e6 * x:.2g}" if abs(x) < 1e-6 else f"{1e6 * x:,.0f}" for x in figures)
