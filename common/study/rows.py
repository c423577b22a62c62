"""Rows: what a table, a figure and results.jsonl hold of one measured model."""

import json
import math
import stat
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

from common.errors import UserError
from common.options import CURVATURES
from common.presets import FORMATS, PRESETS, ROUNDINGS
from common.runtime.files import locked, write_atomically

REAL, BASELINE = "Real test digits", "Baseline"  # strategies of the rows that others are compared with
ENGINE = "Engine"  # that of rows whose differences are to the baseline by torch in FP32, whatever sampled them


@dataclass(frozen=True)
class Figure:
    """A value and its standard error."""

    value: float
    error: float

    def text(self, digits: int, factor: float = 1.0) -> str:
        return f"{factor * self.value:.{digits}f} ± {factor * self.error:.{digits}f}"


@dataclass(frozen=True)
class Settings:
    """What two rows must share to stand in one table. images: of each of `seeds` draws, whose seeds are `seed`,
    `seed` + 1, ...; device: the name of a GPU, or "cpu"."""

    preset: str
    baseline: str | None  # hash of the weights that the differences are to
    metric: str
    data: str
    sampler: str
    steps: int
    eta: float
    images: int
    seed: int
    precision: str
    batch_size: int
    device: str
    torch: str
    seeds: int = 1  # of rows that do not say it
    engine: str = "torch"  # of those, too


@dataclass(frozen=True)
class Row:
    """One measured model, or the real digits.

    strategy, setting: the rule and its number; variant: what stands in its place or was done beyond it ("finetuned",
    "magnitude", ...), with `draw` or `updates` as its number. format: that of the quantized tensors ("entropy" where
    all are coded together). published: (FID, MiB) of the row published for it. formats: of each tensor; kept: the
    weights of layers 1 to 6 that stay FP32, by layer. rounding: how integers were chosen, where not to the nearest.
    curvature: "gauss-newton" where its values decided; None where Fisher values did, or nothing of the kind.
    nearest_training_digit, training_digit_excess: see `common.metrics.memorised`; of the baseline and the real digits
    alone. changed: the share of the images that became other digits (`common.metrics.changed`). loss_increase: over the
    baseline's on held-out digits; place: (how many of the permutations of its Fisher values do as well or better, of
    how many); size_apart: the largest difference of their sizes from the row's, or of a control's from its rule's, as a
    share. ms_per_step: milliseconds of an image and step, in the row's own sampling; of rows that were sampled without
    a break, on whatever else the machine did.
    """

    label: str
    settings: Settings
    fid: Figure
    kid: Figure
    inception_score: Figure | None
    strategy: str
    setting: str = ""
    variant: str | None = None
    draw: int | None = None
    updates: int | None = None
    format: str | None = None
    timestep_weighting: str | None = None
    curvature: str | None = None
    weights: str | None = None
    digits_seen: int | None = None
    size_mib: float | None = None
    file_mib: float | None = None
    file: str | None = None
    image_file: str | None = None
    published: tuple[float | None, float] | None = None
    fid_unbiased: Figure | None = None
    fid_unbiased_difference: Figure | None = None
    fid_difference: Figure | None = None
    kid_difference: Figure | None = None
    psnr: Figure | None = None
    changed: Figure | None = None
    nearest_training_digit: Figure | None = None
    training_digit_excess: Figure | None = None
    formats: dict[str, str] | None = None
    kept: dict[str, list[str]] | None = None
    rounding: str | None = None
    loss_increase: Figure | None = None
    place: tuple[int, int] | None = None
    size_apart: float | None = None
    ms_per_step: float | None = None

    @property
    def identity(self) -> tuple:
        """Rows of the same identity are one measurement: the later replaces the earlier."""
        return self.label, self.weights, self.settings

    def to_json(self) -> dict:
        """One flat object: settings among the others, a figure as `key` and `key_error`, nothing that is None."""
        flat = {key: value for key, value in asdict(self.settings).items() if (key, value) != ("engine", "torch")}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Figure):
                flat |= {field.name: value.value, f"{field.name}_error": value.error}
            elif field.name != "settings" and value is not None:
                flat[field.name] = value
        return flat


_FIGURES = (
    "fid", "fid_unbiased", "kid", "inception_score", "fid_difference", "fid_unbiased_difference", "kid_difference",
    "psnr", "changed", "loss_increase", "nearest_training_digit", "training_digit_excess",
)  # fmt: skip
_POSITIVE = ("fid", "inception_score", "nearest_training_digit")
_TEXTS = ("label", "strategy", "setting", "variant", "format", "timestep_weighting", "weights", "file", "image_file")
_PATHS = ("file", "image_file")  # which may hold any character
_COUNTS = ("draw", "updates", "digits_seen")
_SIZES = ("size_mib", "file_mib", "ms_per_step")
_NOT_ALWAYS = (
    "loss_increase", "place", "size_apart", "nearest_training_digit", "training_digit_excess", "ms_per_step",
    "fid_difference", "fid_unbiased_difference", "kid_difference", "psnr", "changed",  # where the baseline is at hand
)  # fmt: skip


def row_from_json(flat: dict) -> Row:
    """The row that `Row.to_json` wrote. Raises ValueError naming the key that is missing, unknown or no such value."""
    if not isinstance(flat, dict):
        raise ValueError(f"{str(flat)[:40]!r} is not a row")
    flat, values = dict(flat), {}
    needed = (field.name for field in fields(Settings) if field.default is MISSING)
    for key in ("label", "strategy", *needed, "fid", "kid"):
        if key not in flat:
            raise ValueError(f"{key} is missing")
    values["settings"] = _settings(flat)
    for key in _FIGURES:
        if key in flat:
            value, error = _number(key, flat.pop(key)), _number(f"{key}_error", flat.pop(f"{key}_error", None))
            if error < 0 or (value < -1e-6 and key in _POSITIVE):
                raise ValueError(f"{key} of {value:g} ± {error:g} cannot be")
            values[key] = Figure(value, error)
    for key, value in flat.items():
        values[key] = checked(key, value)
    if values["strategy"] == "Ratio" and not _is_number(values.get("setting", "")):
        raise ValueError(f"setting of {values.get('setting', '')[:40]!r} is not a ratio")
    return Row(**({"inception_score": None} | values))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _settings(flat: dict) -> Settings:
    kinds = {"steps": int, "images": int, "seed": int, "seeds": int, "batch_size": int, "eta": float}
    values = {}
    for field in fields(Settings):
        value, kind = flat.pop(field.name, field.default), kinds.get(field.name, str)
        if kind is float:
            value = _number(field.name, value)
        elif type(value) is not kind and not (value is None and field.name == "baseline"):
            raise ValueError(f"{field.name} of {str(value)[:40]!r} is not a {kind.__name__}")
        elif kind is int and value < 0:
            raise ValueError(f"{field.name} of {value} cannot be")
        values[field.name] = value
    return Settings(**values)


def checked(key: str, value):
    """The value of a row's field as a row holds it. Raises ValueError where it cannot be one."""
    if key in _TEXTS:
        valid = isinstance(value, str) and (value or key == "setting") and (value.isprintable() or key in _PATHS)
    elif key == "curvature":
        valid = value in CURVATURES
    elif key in _COUNTS:
        valid = type(value) is int and value >= 0
    elif key in _SIZES:
        valid = _number(key, value) > 0
    elif key == "published":
        value = tuple(value) if isinstance(value, list) else value
        pair = isinstance(value, tuple) and len(value) == 2
        valid = pair and all(_number(key, v) > 0 for v in value if v is not None)
    elif key == "formats":
        valid = isinstance(value, dict) and all(v in (*FORMATS, "entropy") for v in value.values())
    elif key == "kept":
        valid = isinstance(value, dict) and all(
            isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value.values()
        )
    elif key == "rounding":
        valid = value in ROUNDINGS
    elif key == "place":
        value = tuple(value) if isinstance(value, list) else value
        pair = isinstance(value, tuple) and len(value) == 2 and all(type(v) is int for v in value)
        valid = pair and 0 <= value[0] <= value[1]
    elif key == "size_apart":
        valid = _number(key, value) >= 0
    else:
        raise ValueError(f"{str(key)[:40]!r} is unknown")
    if not valid:
        raise ValueError(f"{key} of {str(value)[:40]!r} cannot be")
    return value


def _number(key: str, value) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{key} of {str(value)[:40]!r} is not a number")
    return float(value)


@dataclass(frozen=True)
class ResultStore:
    """The rows of a results.jsonl, one JSON object a line; several processes may add to it at once."""

    path: Path

    def rows(self) -> list[Row]:
        """All rows, in the order in which they were first added; none where the file is absent. Raises UserError naming
        the line where it is damaged."""
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise UserError(f"{self.path}: is not a file; move it away, or name another folder with --out")
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); name another folder with --out") from None
        except UnicodeDecodeError:
            raise UserError(f"{self.path} is not text; move it away and run the scripts again") from None
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(row_from_json(json.loads(line)))
            except (ValueError, RecursionError) as error:
                reason = "nested too deep" if isinstance(error, RecursionError) else error
                raise UserError(
                    f"{self.path}, line {number}, is damaged or of another version ({reason}); "
                    "move the file away and run the scripts again"
                ) from None
        return rows

    def add(self, rows: Iterable[Row]) -> None:
        """Adds rows; those of the same identity are replaced where they stand, but for what the new one does not say of
        the loss, the baseline or copies of training digits: the same weights have the same."""
        with locked(self.path):
            kept = {row.identity: row for row in self.rows()}
            for row in rows:
                before = kept.get(row.identity, row)
                known = {key: getattr(before, key) for key in _NOT_ALWAYS if getattr(row, key) is None}
                kept[row.identity] = replace(row, **known)
            lines = [json.dumps(row.to_json(), sort_keys=True, allow_nan=False) + "\n" for row in kept.values()]
            content = "".join(lines).encode()
            if not self.path.is_file() or self.path.read_bytes() != content:
                write_atomically(self.path, content)


def kind_of(name: str) -> str:
    """What a row's `preset` is: a preset, or a model of the user's own."""
    return "Preset" if name in PRESETS else "Model"


def group_rows(rows: list[Row]) -> list[list[Row]]:
    """Rows by their settings, in the order of first appearance; real digits first, then the baseline."""
    groups: dict[Settings, list[Row]] = {}
    for row in rows:
        compared = replace(row.settings, engine="torch", precision="fp32") if row.strategy == ENGINE else row.settings
        groups.setdefault(compared, []).append(row)
    order = {REAL: 0, BASELINE: 1, "Uniform": 2}
    return [sorted(group, key=lambda row: order.get(row.strategy, 3)) for group in groups.values()]
