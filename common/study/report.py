"""Tables of rows: those of one run, and all that results.jsonl holds.

python -m common report --preset quick                # prints every row, draws the figures into results/quick/figures/
python -m common report --preset quick --markdown     # prints the tables as Markdown
python -m common report --preset quick --frontier     # draws FID and PSNR against the size of the file, nothing else
python -m common report --preset quick --sensitivity  # prints the tables of python -m common sensitivity
"""

import json
from pathlib import Path

from common.errors import UserError
from common.options import Parser
from common.presets import PRESETS
from common.runtime.files import write_atomically

# Rows that share these can stand in one table.
SETTINGS = (
    "preset",
    "baseline",
    "metric",
    "data",
    "sampler",
    "steps",
    "eta",
    "images",
    "seed",
    "precision",
    "batch_size",
    "device",
    "torch",
)

COLUMNS = [
    "Model", "FID", "FID - FP32", "KID x1000", "Score", "PSNR dB", "MiB", "smaller", "file MiB", "published FID, MiB",
]  # fmt: skip


def add_rows(path: Path, rows: list[dict]) -> None:
    """Adds rows to the JSON lines of `path`; a row of the same label, weights and settings is replaced."""
    lines = {_identity(row): row for row in read_rows(path, absent_is_empty=True)}
    lines |= {_identity(row): row for row in rows}
    write_atomically(path, "".join(json.dumps(row, sort_keys=True) + "\n" for row in lines.values()).encode())


def read_rows(path: Path, absent_is_empty: bool = False) -> list[dict]:
    """The rows of a results.jsonl. Raises UserError where it is damaged, or missing unless `absent_is_empty`."""
    if not path.exists():
        if absent_is_empty:
            return []
        raise UserError(
            f"{path}: no such file; python simplediffusion.py makes the first rows, with this --preset and --out"
        )
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            _identity(row)
        return rows
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged or of an earlier version ({error}); move it away and run the scripts again"
        ) from None


def _identity(row: dict) -> tuple:
    return (row["label"], row.get("weights"), *(row[key] for key in SETTINGS))


def format_table(rows: list[dict]) -> str:
    """Rows of the same settings as text, under a header that names the features, the data and the sampling."""
    table = [COLUMNS] + [_cells(row, rows) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in table
    ]
    foot = ""
    if any(row.get("published") for row in rows):
        foot = (
            "\npublished: at the paper size, Inception features; its FIDs are of the unquantized weights "
            "(README, what differs) and compare with no column here"
        )
    return f"\n{describe(rows[0])}\n" + "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]) + foot


def format_markdown(rows: list[dict]) -> str:
    """The table as Markdown, without the published column where it is empty."""
    table = [COLUMNS] + [_cells(row, rows) for row in rows]
    if not any(row.get("published") for row in rows):
        table = [line[:-1] for line in table]
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([f"\n{describe(rows[0])}", "", lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def describe(row: dict) -> str:
    """What the rows of a table share: features, data and sampling."""
    return (
        "Preset {preset}, baseline {baseline:.8}; {metric}; reference: {data} training digits; {images} images, "
        "{sampler} {steps} steps, eta {eta:g}, seed {seed}, sampled in {precision} on {device}, batch {batch_size}; "
        "errors: 1 standard error"
    ).format(**row)


def _cells(row: dict, rows: list[dict]) -> list[str]:
    baseline_size = next((other["size_mib"] for other in rows if other["label"].startswith("Baseline")), None)

    def figure(key: str, digits: int, factor: float = 1.0) -> str:
        if row.get(key) is None:
            return "-"
        return f"{factor * row[key]:.{digits}f} ± {factor * row[key + '_error']:.{digits}f}"

    size, file = row.get("size_mib"), row.get("file_mib")
    published = row.get("published")
    return [
        row["label"],
        figure("fid", 3),
        figure("fid_difference", 4),
        figure("kid", 2, 1000),
        figure("inception_score", 3),
        figure("psnr", 1),
        "-" if size is None else f"{size:.2f}" if size >= 10 else f"{size:.3f}",
        "-" if not size or not baseline_size else f"{1 - size / baseline_size:.2%}",
        "-" if file is None else f"{file:.2f}" if file >= 10 else f"{file:.3f}",
        "-" if published is None else f"{'-' if published[0] is None else f'{published[0]:.2f}'}, {published[1]:.2f}",
    ]


def format_kept(rows: list[dict]) -> str:
    """Which weights of layers 1 to 6 each quantized row keeps in FP32 (entropy coding: none), by layer."""
    lines = []
    for row in rows:
        if row.get("strategy", "Baseline") == "Baseline" or row["format"] == "entropy":
            continue
        total = sum(map(len, row["kept"].values()))
        lines.append(f"\n{row['label']} keeps {total} of 58 weights of layers 1 to 6 in FP32" + (":" if total else ""))
        lines += [f"  {layer}: {', '.join(names)}" for layer, names in row["kept"].items() if names]
    return "\n".join(lines)


def format_tensors(model, table) -> str:
    """Every tensor: shape, Fisher value at timestep 1 with its error, over the grid, format and KiB; then the total."""
    import torch

    grid = table.estimates("all")[0]
    lines = [f"{'tensor':34}{'shape':>18}{'Fisher t=1':>24}{'mean over t':>13}{'format':>8}{'KiB':>10}"]
    for name, tensor in model.state.items():
        i = table.names.index(name)
        value = f"{table.values[0, i]:.3e} ± {table.errors[0, i]:.1e}"
        shape = "x".join(map(str, tensor.shape))
        size = sum(t.nbytes for key, t in model.stored.items() if key.partition(":")[0] == name) / 1024
        lines.append(f"{name:34}{shape:>18}{value:>24}{grid[i]:>13.3e}{model.formats[name]:>8}{size:>10.1f}")
    parameters = sum(torch.numel(t) for t in model.state.values())
    lines.append(f"{'total':34}{f'{parameters:,}':>18}{'':24}{'':13}{'':8}{model.size_mib() * 1024:>10.1f}")
    return "\n".join(lines)


def group_rows(rows: list[dict]) -> list[list[dict]]:
    """Rows by their settings, in the order of first appearance; real digits first, then the baseline."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in SETTINGS), []).append(row)
    order = {"Real": 0, "Base": 1, "Unif": 2}
    return [sorted(group, key=lambda row: order.get(row["label"][:4], 3)) for group in groups.values()]


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="which of results/<preset> to read")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the scripts' --out; default: results/<preset>")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--markdown", action="store_true", help="tables alone, as Markdown")
    only.add_argument("--frontier", action="store_true", help="FID and PSNR against the size of the file alone")
    only.add_argument("--sensitivity", action="store_true", help="what python -m common sensitivity measured alone")
    options = parser.parse_args()
    folder = options.out or Path("results") / options.preset
    if options.sensitivity:
        from common.study.sensitivity import FILE, format_sensitivity

        print(format_sensitivity(folder / FILE))
        return
    groups = group_rows(read_rows(folder / "results.jsonl"))
    for group in [] if options.frontier else groups:
        print(format_markdown(group) if options.markdown else format_table(group))
    if options.markdown:
        return

    from common.study.figures import draw_all

    for path in draw_all(folder, groups, only="fid-size" if options.frontier else ""):
        print(path)
