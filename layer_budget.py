"""The smallest loss at a given size: Fisher information decides how coarsely each tensor is stored.

    python layer_budget.py --times 10 13 16             # files 10, 13 and 16 times smaller than the FP32 tensors
    python layer_budget.py --times auto                 # the smallest whose FID is within one standard error of FP32's
    python layer_budget.py --size 0.8 --coding fixed    # a width for each tensor, a file of at most 0.8 MiB

An error dw of a weight costs F dw^2. --coding entropy rounds each tensor to multiples of a step proportional to
1 / sqrt(F), each error made good by the neighbours that are rounded later, and entropy-codes the result; --coding fixed
chooses for each tensor one of fp32, fp16 and int8 to int2, the best choice there is under the size. The file counts,
with all that is in it.
"""

import math

from common.config import UserError, bounded_float, run_main, script_parser


def entropy_coded(baseline, values: dict[str, float], about: dict, limit: int, feedback=None):
    """The model with steps by Fisher `values`, rounded by `feedback`, whose file has at most `limit` bytes. Raises
    BudgetError."""
    from common import budget
    from common.model import Model, file_bytes

    def model(stored) -> Model:
        return Model(baseline.config, stored, dict.fromkeys(baseline.state, "entropy"), about)

    return model(
        budget.entropy_coded(baseline.state, values, lambda stored: file_bytes(model(stored)), limit, feedback)
    )


def fixed_widths(baseline, values: dict[str, float], about: dict, limit: int, feedback=None):
    """The model with one format for each tensor whose file has at most `limit` bytes. Raises BudgetError."""
    from dataclasses import replace

    from common.budget import BudgetError, fixed_formats
    from common.model import file_bytes, tensor_shapes

    axes = {name: axis for name, (_, axis) in tensor_shapes(baseline.config).items()}
    header = 0
    while True:
        try:
            formats, fits = fixed_formats(baseline.state, axes, values, limit - header), True
        except BudgetError as error:
            formats, fits = error.formats, False
        model = replace(baseline, about=about)
        for fmt in set(formats.values()):
            model = model.quantize([name for name, chosen in formats.items() if chosen == fmt], fmt, about)
        excess = file_bytes(model) - limit
        if not fits and excess > 0:
            raise BudgetError(file_bytes(model))
        if excess <= 0:
            return model
        header += excess


CODINGS = {"entropy": entropy_coded, "fixed": fixed_widths}


def smallest(baseline, coding: str, about: dict) -> int:
    """Bytes of the smallest file there is, whatever the Fisher values."""
    from common.budget import BudgetError

    try:
        CODINGS[coding](baseline, dict.fromkeys(baseline.state, 1.0), about, 0)
    except BudgetError as error:
        return error.smallest


def build(run, bench, baseline, coding: str, limits: dict[str, int]) -> list:
    """One model for each limit, {what was asked for: bytes}; with "auto", those of `search`.

    Raises UserError, before any work, for a limit that is too small.
    """
    from tqdm import tqdm

    from common import budget
    from common.experiment import fisher_table, rounding_feedback
    from common.model import MIB

    def about(setting: str) -> dict:
        note = "" if run.fisher_timestep == "image" else f", Fisher timestep {run.fisher_timestep}"
        kept = {key: value for key, value in baseline.about.items() if key != "loss_curve"}
        return kept | {
            "label": f"Budget {setting} ({coding}{note})",
            "strategy": "Budget",
            "setting": setting,
            "format": coding,
            "published": None,
            "baseline": baseline.sha256,
        }

    size = baseline.size_mib() * MIB
    least = smallest(baseline, coding, about(max(limits, key=len, default=""))) + 100  # labels of other lengths
    for asked, limit in limits.items():
        if limit < least:
            more, less = math.ceil(1e4 * least / MIB) / 1e4, math.floor(10 * size / least) / 10
            raise UserError(
                f"{asked}, {limit:,} bytes, cannot be reached with {coding} coding: "
                f"ask for --size {more:g} or more, --times {less:g} or less"
            )
    table = fisher_table(run, baseline)
    shrunk = budget.shrink(*table.estimates(run.fisher_timestep))
    values = dict(zip(table.names, shrunk.tolist(), strict=True))

    feedback = rounding_feedback(run, baseline) if coding == "entropy" else {}
    for name, rounding in feedback.items():
        values[name] *= rounding.gain  # what is left of an error once its neighbours have made it good

    def make(setting: str, limit: int):
        return CODINGS[coding](baseline, values, about(setting), limit, feedback)

    if limits:
        return [make(asked, limit) for asked, limit in tqdm(limits.items(), desc="fitting", unit="file")]
    return search(run, bench, baseline, lambda times: make(f"{times:g}x", int(size / times)), size / least)


def search(run, bench, baseline, make, most: float) -> list:
    """Halves the interval of sizes in which the difference of FID to FP32 comes to exceed its standard error.

    Returns the models that were tried, by size; prints the smallest that keeps within. make(times) is the model that
    many times smaller than FP32; `most`: the most there can be.
    """
    from common.experiment import measure

    reference = measure(run, bench, baseline).scores.fid
    low, high, tried = 2.0, min(most, 128.0), {}
    while high / low > 1.05:
        times = float(f"{(low * high) ** 0.5:.3g}")
        tried[times] = make(times)
        difference, error = measure(run, bench, tried[times]).scores.fid.minus(reference)
        low, high = (times, high) if difference <= error else (low, times)
    further = f"the next tried, {high:g}, is not" if high in tried else "nothing larger was tried"
    if low in tried:
        print(f"largest factor whose FID is within one standard error of FP32's: {low:g}; {further}")
    else:
        print(
            f"no factor that was tried, {', '.join(f'{t:g}' for t in sorted(tried))}, keeps within one standard error"
        )
    return [tried[times] for times in sorted(tried)]


def main():
    parser = script_parser(__doc__)
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument(
        "--size", type=bounded_float(1e-6, 1e6, 0.8), nargs="+", metavar="MIB", help="of the file, at most"
    )
    sizes.add_argument(
        "--times", type=factor, nargs="+", metavar="X", help="files X times smaller than FP32's tensors; or auto"
    )
    parser.add_argument("--coding", choices=CODINGS, default="entropy", help="what the file stores")
    parser.set_defaults(fisher_timestep="image")
    options = parser.parse_args()
    if options.times and "auto" in options.times and len(options.times) > 1:
        parser.error("argument --times: auto stands alone")

    from common.experiment import run_models
    from common.model import MIB

    def models(run, bench, baseline):
        if options.size:
            limits = {f"{size:g} MiB": int(size * MIB) for size in options.size}
        elif "auto" in options.times:
            limits = {}
        else:
            limits = {f"{times:g}x": int(baseline.size_mib() * MIB / times) for times in options.times}
        return build(run, bench, baseline, options.coding, limits)

    run_models(options, models)


def factor(text: str) -> float | str:
    """An argparse type: a number of at least 1, or auto."""
    return text if text == "auto" else bounded_float(1, 1e6, 10)(text)


if __name__ == "__main__":
    run_main(main)
