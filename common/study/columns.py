"""The columns of tables: what each says of a row. MAIN fits a terminal of 120 characters; the report has all."""

from collections.abc import Callable

from common.study.rows import BASELINE, Figure, Row

NOTHING = "-"


def cells(row: Row, columns: tuple[str, ...] | list[str], rows: list[Row]) -> list[str]:
    """The cells of a row; sizes are compared with that of the baseline among `rows`."""
    full = next((size_of(other) for other in rows if other.strategy == BASELINE), None)
    return [_smaller(row, full) if name == "smaller" else COLUMNS[name](row) for name in columns]


def size_of(row: Row) -> float | None:
    """MiB of the packed file, headers included; of a row that has none, the baseline say, of its tensors."""
    return row.file_mib or row.size_mib


def _smaller(row: Row, full: float | None) -> str:
    return NOTHING if not full or not size_of(row) else f"{1 - size_of(row) / full:.2%}"


def _figure(key: str, most_digits: int, factor: float = 1.0) -> Callable[[Row], str]:
    """Cells with two digits of the error, or fewer where that takes more than `most_digits` decimals."""

    def cell(row: Row) -> str:
        figure: Figure | None = getattr(row, key)
        if figure is None:
            return NOTHING
        enough = (d for d in range(most_digits) if factor * figure.error * 10**d >= 9.5)
        return figure.text(next(enough, most_digits), factor)

    return cell


def _size(mib: float | None) -> str:
    return NOTHING if mib is None else f"{mib:.2f}" if mib >= 10 else f"{mib:.3f}"


def _published(row: Row) -> str:
    if row.published is None or row.settings.preset != "paper":
        return NOTHING
    return " / ".join(NOTHING if value is None else f"{value:.2f}" for value in row.published)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "unbiased FID": _figure("fid_unbiased", 4),
    "- FP32": _figure("fid_unbiased_difference", 4),
    "KID - FP32": _figure("kid_difference", 2, 1000),
    "PSNR dB": _figure("psnr", 1),
    "changed %": _figure("changed", 1, 100),
    "MiB": lambda row: _size(size_of(row)),
    "Score": _figure("inception_score", 2),
    "KID x1000": _figure("kid", 2, 1000),
    "FID at N": _figure("fid", 3),
    "FID at N - FP32": _figure("fid_difference", 4),
    "tensors MiB": lambda row: _size(row.size_mib),
    "loss increase x1000": _figure("loss_increase", 4, 1000),
    "permutations as good": lambda row: NOTHING if row.place is None else "{} of {}".format(*row.place),
    "p": lambda row: NOTHING if row.place is None else f"{(row.place[0] + 1) / (row.place[1] + 1):.2g}",
    "published FID / MiB": _published,
}
MAIN = ("unbiased FID", "- FP32", "KID - FP32", "PSNR dB", "changed %", "MiB", "smaller")
MORE = (
    "Score", "KID x1000", "FID at N", "FID at N - FP32", "tensors MiB", "loss increase x1000", "published FID / MiB",
)  # fmt: skip


def filled(columns: tuple[str, ...], rows: list[Row]) -> list[str]:
    """Those of `columns` that say something of one of the rows."""
    return [name for name in columns if any(cells(row, [name], rows) != [NOTHING] for row in rows)]


def markdown_table(lines: list[list[str]]) -> str:
    """Lines of cells, the first of them the heads, as Markdown."""
    head, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rest])
