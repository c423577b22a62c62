"""Tables of rows: those of one run, and all that results.jsonl holds.

python -m common report --preset quick                # prints every row, draws figures/, and writes report.html
python -m common report --preset quick --markdown     # prints the tables as Markdown
python -m common report --preset quick --frontier     # draws only FID and PSNR against the size of the file
python -m common report --preset quick --sensitivity  # the tables and the figure of python -m common sensitivity
python -m common report --model DIR                   # the rows of a model of diffusers
"""

from dataclasses import asdict
from pathlib import Path

from common.choose.layers import layer_weights
from common.errors import UserError
from common.options import DIGITS, Parser, file_name
from common.presets import PRESETS
from common.study.columns import MAIN, MORE, cells, filled, markdown_table
from common.study.memorised import format_nearest
from common.study.rows import BASELINE, ResultStore, Row, group_rows, kind_of

FOOT = (
    "unbiased FID: as of infinitely many images, below 0 by chance alone; - FP32: what quantization adds, on the same "
    "noise (KID x1000)"
)
FOOT_OF_CHANGED = "changed: images that became another digit than FP32's, where a classifier is sure of both"
WIDTH = 120  # of a terminal
MORE_FOOT = "FID at N: of these images, mostly bias, compares only with as many"

FOOT_OF_RANDOM = (
    "random features: of a fixed convolutional network that was never trained, so no Score; they order models "
    "of digits nearly as trained features do (docs/your-own-model.md)"
)


def format_table(rows: list[Row]) -> str:
    """Rows of the same settings as text, under a header that names the features, the data and the sampling.

    Where labels are long, the columns that are missed least make room, so that a line fits the terminal.
    """
    columns = [name for name in MAIN if name != "changed %" or rows[0].settings.data in DIGITS]
    for least in ("KID - FP32", "smaller", "PSNR dB"):
        if len(_lines(rows, columns)[0]) > WIDTH:
            columns.remove(least)
    return "\n".join([f"\n{describe(rows[0])}", *_lines(rows, columns), *feet_of(rows)])


def format_more(rows: list[Row]) -> str:
    """A second table of the same rows, with the columns that the first has no room for."""
    columns = filled(MORE, rows)
    feet = [MORE_FOOT]
    if "published FID / MiB" in columns:
        feet.append(
            "published: with Inception features, of the unquantized weights (docs/differences.md); compares with no "
            "column here"
        )
    return "\n".join(["", *_lines(rows, columns), *feet])


def _lines(rows: list[Row], columns: tuple[str, ...] | list[str]) -> list[str]:
    table = [["Model", *columns]] + [[row.label, *cells(row, columns, rows)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in table
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def format_markdown(rows: list[Row]) -> str:
    """All columns that say something, as Markdown."""
    columns = filled((*MAIN, *MORE), rows)
    table = [["Model", *columns]] + [[row.label, *cells(row, columns, rows)] for row in rows]
    feet = [*feet_of(rows), MORE_FOOT]
    return "\n".join([f"\n{describe(rows[0])}", "", markdown_table(table), "", *feet])


def feet_of(rows: list[Row]) -> list[str]:
    """The lines that explain the columns of a table."""
    changed = [FOOT_OF_CHANGED] if rows[0].settings.data in DIGITS else []
    return [FOOT, *changed, *([FOOT_OF_RANDOM] if rows[0].settings.metric.startswith("random ") else [])]


def describe(row: Row) -> str:
    """What the rows of a table share: features, data and sampling."""
    seeds = "seed {seed}" if row.settings.seeds == 1 else "each of {seeds} seeds from {seed}"
    engine = "" if row.settings.engine == "torch" else " by {engine}"
    return (
        "{kind} {preset}, baseline {baseline:.8}; {metric}; reference: {data} training {real}; {images} images, "
        "{sampler} {steps} steps, eta {eta:g}, "
        + seeds
        + ", sampled in {precision}"
        + engine
        + " on {device}, batch {batch_size}; "
        "errors: 1 standard error"
    ).format(
        **(asdict(row.settings) | {"baseline": row.settings.baseline or "-"}),
        kind=kind_of(row.settings.preset),
        real="digits" if row.settings.data in DIGITS else "images",
    )


def format_kept(rows: list[Row]) -> str:
    """Which weights of the layers each quantized row keeps in FP32 (entropy coding: none), by layer."""
    lines = []
    for row in rows:
        if row.kept is None or row.strategy == BASELINE or row.format == "entropy":
            continue
        total = sum(map(len, row.kept.values()))
        layers = "layers 1 to 6" if row.settings.preset in PRESETS else "the layers"
        there = len(layer_weights(row.formats or {})) or 58  # as rows have it that do not say their formats
        lines.append(f"\n{row.label} keeps {total} of {there} weights of {layers} in FP32" + (":" if total else ""))
        lines += [f"  {layer}: {', '.join(names)}" for layer, names in row.kept.items() if names]
    return "\n".join(lines)


def format_times(rows: list[Row]) -> str:
    """A line with the milliseconds of an image and step of each of the rows whose sampling was timed."""
    timed = [f"{row.label} {row.ms_per_step:.3g}" for row in rows if row.ms_per_step is not None]
    return f"ms an image and step, whatever else the machine did: {'; '.join(timed)}" if timed else ""


def main():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="which of results/<preset> to read; default: paper where CUDA is available, else quick",
    )
    parser.add_argument(
        "--model", type=file_name, metavar="DIR", help="reads results/ and the name of the scripts' --model"
    )
    parser.add_argument("--out", type=file_name, metavar="DIR", help="the scripts' --out; default: results/<preset>")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--markdown", action="store_true", help="print only the tables, as Markdown")
    parts.add_argument("--frontier", action="store_true", help="draw only FID and PSNR against the size of the file")
    parts.add_argument("--sensitivity", action="store_true", help="only what python -m common sensitivity measured")
    options = parser.parse_args()

    from common.study.held_out import format_losses
    from common.study.run import choose_preset, model_name

    if options.model and options.preset:
        parser.error(f"argument --model: stands in place of --preset {options.preset}; give one of them")
    name = model_name(options.model) if options.model else choose_preset(options.preset, None)[0]
    folder = options.out or Path("results") / name
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
        print(format_markdown(group) if options.markdown else format_table(group) + "\n" + format_more(group))
        for said in filter(None, (format_nearest(group), format_losses(group), format_times(group))):
            print(f"\n{said.strip()}")
    if options.markdown:
        return

    from common.study.figures import draw_all

    only = "fid-size" if options.frontier else "sensitivity" if options.sensitivity else ""
    drawn = draw_all(folder, groups, only)
    print("\n".join(map(str, drawn)))
    if not only:
        from common.study.page import write_page

        print(f"all of it on one page: {write_page(folder, groups, drawn)}")
