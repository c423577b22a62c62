"""Tables of rows: those of one run, and all that results.jsonl holds.

python -m common report --preset quick                # prints every row, draws the figures into results/quick/figures/
python -m common report --preset quick --markdown     # prints the tables as Markdown
python -m common report --preset quick --frontier     # draws FID and PSNR against the size of the file, nothing else
python -m common report --preset quick --sensitivity  # the tables and the figure of python -m common sensitivity
"""

from dataclasses import asdict
from pathlib import Path

from common.errors import UserError
from common.options import Parser, file_name
from common.presets import PRESETS
from common.study.memorised import format_nearest
from common.study.rows import BASELINE, Figure, ResultStore, Row, group_rows

COLUMNS = [
    "Model", "unbiased FID", "- FP32", "KID - FP32", "KID x1000", "FID at N", "- FP32", "Score", "PSNR dB", "MiB",
    "smaller", "file MiB", "published FID, MiB",
]  # fmt: skip
FOOT = (
    "unbiased FID: as of infinitely many images, below 0 by chance alone; FID at N: of these images, mostly bias, "
    "compares only with as many; - FP32: paired, on the same noise (of KID x1000)"
)


def format_table(rows: list[Row]) -> str:
    """Rows of the same settings as text, under a header that names the features, the data and the sampling."""
    table = [COLUMNS] + [_cells(row, rows) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in table
    ]
    foot = f"\n{FOOT}"
    if any(row.published for row in rows):
        foot += (
            "\npublished: at the paper size, Inception features; its FIDs are of the unquantized weights "
            "(docs/differences.md) and compare with no column here"
        )
    return f"\n{describe(rows[0])}\n" + "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]) + foot


def format_markdown(rows: list[Row]) -> str:
    """The table as Markdown, without the published column where it is empty."""
    table = [COLUMNS] + [_cells(row, rows) for row in rows]
    if not any(row.published for row in rows):
        table = [line[:-1] for line in table]
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([f"\n{describe(rows[0])}", "", lines[0], "|" + "---|" * len(table[0]), *lines[1:], "", FOOT])


def describe(row: Row) -> str:
    """What the rows of a table share: features, data and sampling."""
    seeds = "seed {seed}" if row.settings.seeds == 1 else "each of {seeds} seeds from {seed}"
    return (
        "Preset {preset}, baseline {baseline:.8}; {metric}; reference: {data} training digits; {images} images, "
        "{sampler} {steps} steps, eta {eta:g}, " + seeds + ", sampled in {precision} on {device}, batch {batch_size}; "
        "errors: 1 standard error"
    ).format(**asdict(row.settings))


def _cells(row: Row, rows: list[Row]) -> list[str]:
    baseline_size = next((other.size_mib for other in rows if other.strategy == BASELINE), None)

    def size(mib: float | None) -> str:
        return "-" if mib is None else f"{mib:.2f}" if mib >= 10 else f"{mib:.3f}"

    def figure(value: Figure | None, digits: int, factor: float = 1.0) -> str:
        return "-" if value is None else value.text(digits, factor)

    return [
        row.label,
        figure(row.fid_unbiased, 4),
        figure(row.fid_unbiased_difference, 4),
        figure(row.kid_difference, 2, 1000),
        figure(row.kid, 2, 1000),
        figure(row.fid, 3),
        figure(row.fid_difference, 4),
        figure(row.inception_score, 3),
        figure(row.psnr, 1),
        size(row.size_mib),
        "-" if not row.size_mib or not baseline_size else f"{1 - row.size_mib / baseline_size:.2%}",
        size(row.file_mib),
        "-" if row.published is None else ", ".join("-" if v is None else f"{v:.2f}" for v in row.published),
    ]


def format_kept(rows: list[Row]) -> str:
    """Which weights of layers 1 to 6 each quantized row keeps in FP32 (entropy coding: none), by layer."""
    lines = []
    for row in rows:
        if row.kept is None or row.strategy == BASELINE or row.format == "entropy":
            continue
        total = sum(map(len, row.kept.values()))
        lines.append(f"\n{row.label} keeps {total} of 58 weights of layers 1 to 6 in FP32" + (":" if total else ""))
        lines += [f"  {layer}: {', '.join(names)}" for layer, names in row.kept.items() if names]
    return "\n".join(lines)


def format_tensors(model, table) -> str:
    """Every tensor: shape, Fisher value at timestep 1 with its error, over the grid, format and KiB; then the total."""
    import torch

    grid = table.estimates("uniform")[0]
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


def main():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="which of results/<preset> to read; default: paper where CUDA is available, else quick",
    )
    parser.add_argument("--out", type=file_name, metavar="DIR", help="the scripts' --out; default: results/<preset>")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--markdown", action="store_true", help="tables alone, as Markdown")
    parts.add_argument("--frontier", action="store_true", help="FID and PSNR against the size of the file alone")
    parts.add_argument("--sensitivity", action="store_true", help="what python -m common sensitivity measured alone")
    options = parser.parse_args()

    from common.study.held_out import format_losses
    from common.study.run import choose_preset

    folder = options.out or Path("results") / choose_preset(options.preset, None)[0]
    if options.sensitivity:
        from common.study.increases import FILE, format_sensitivity

        print(format_sensitivity(folder / FILE))
    rows = [] if options.sensitivity else ResultStore(folder / "results.jsonl").rows()
    if not rows and not options.sensitivity:
        raise UserError(
            f"{folder / 'results.jsonl'}: no rows there; python simplediffusion.py makes the first, "
            "with this --preset and --out"
        )
    groups = group_rows(rows)
    for group in [] if options.frontier else groups:
        print(format_markdown(group) if options.markdown else format_table(group))
        for said in filter(None, (format_nearest(group), format_losses(group))):
            print(f"\n{said.strip()}")
    if options.markdown:
        return

    from common.study.figures import draw_all

    only = "fid-size" if options.frontier else "sensitivity" if options.sensitivity else ""
    for path in draw_all(folder, groups, only):
        print(path)
