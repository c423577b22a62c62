"""The least Fisher-weighted error at a given size: Fisher information decides how coarsely each tensor is stored.

    python layer_budget.py --times 10 13 16             # files 10, 13 and 16 times smaller than the FP32 tensors
    python layer_budget.py --times auto --margin 0.1    # the smallest that adds less than a tenth to the FID
    python layer_budget.py --times 16 --finetune 1000   # and a row whose codes were trained for 1000 updates
    python layer_budget.py --size 0.8 --coding fixed    # a format for each tensor, a file of at most 0.8 MiB
    python layer_budget.py --times 10 --controls 20     # and whether Fisher values do better than chance

An error dw of a weight counts as F dw^2, with F the Fisher information of its tensor. This ranks tensors. It does not
predict the increase of the loss; the values of --curvature gauss-newton do. --coding entropy rounds each tensor to
multiples of a step proportional to 1 / sqrt(F), compensates each error in the weights and layers that are rounded
later, and entropy-codes the result. --coding fixed gives each tensor one of fp32, fp16 and int8 to int2, the choice of
least error within the size; --rounding says how it rounds. The size is that of the whole file, headers included.
"""

from common.errors import run_main
from common.options import LARGEST_SEED, bounded_float, number, positive_int, strategy_parser
from common.presets import ROUNDINGS


def main():
    parser = strategy_parser(__doc__, formats=False)
    sizes = parser.add_mutually_exclusive_group(required=True)
    sizes.add_argument(
        "--size", type=bounded_float(1e-6, 1e6, 0.8), nargs="+", metavar="MIB", help="largest size of the file"
    )
    sizes.add_argument(
        "--times", type=factor, nargs="+", metavar="X", help="files X times smaller than FP32's tensors; or auto"
    )
    parser.add_argument(
        "--margin",
        type=bounded_float(1e-3, 1e3, 0.25),
        metavar="SHARE",
        help="for --times auto: the unbiased FID minus FP32's, plus two standard errors, must be less than this share "
        "of FP32's; default: 0.25",
    )
    parser.add_argument("--coding", choices=("entropy", "fixed"), default="entropy", help="what the file stores")
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        help="for --coding fixed: round integers to the nearest; or with scales of the least squared error; or with "
        "these scales and feedback: each error is compensated in weights and layers that are rounded later; "
        "default: feedback",
    )
    parser.add_argument(
        "--finetune",
        type=positive_int,
        metavar="N",
        help="add rows whose codes were trained for N updates of 64 inputs each; use some hundreds or more",
    )
    parser.set_defaults(timestep_weighting="image")
    options = parser.parse_args()
    if options.times and "auto" in options.times and len(options.times) > 1:
        parser.error("argument --times: auto stands alone")
    if options.controls and options.times and "auto" in options.times:
        parser.error("argument --controls: goes with given sizes only, not with --times auto")
    if options.margin is not None and not (options.times and "auto" in options.times):
        parser.error("argument --margin: goes with --times auto only")
    if options.times and "auto" in options.times and options.seed + 2 * options.seeds - 1 > LARGEST_SEED:
        parser.error(f"argument --seed: --times auto confirms on the seeds after --seeds, up to {LARGEST_SEED}")
    if options.finetune and options.coding != "entropy":
        parser.error("argument --finetune: goes with --coding entropy only")

    if options.rounding and options.coding != "fixed":
        parser.error("argument --rounding: goes with --coding fixed only; entropy coding has feedback always")

    from common.formats.packed import MIB
    from common.study.budget_models import build, limits_of
    from common.study.pipeline import run_models

    share = 0.25 if options.margin is None else options.margin

    def models(run, evaluator, baseline):
        if options.size:
            limits = {f"{number(size)} MiB": int(size * MIB) for size in options.size}
        elif "auto" in options.times:
            limits = {}
        else:
            limits = limits_of(baseline, options.times)
        rounding = options.rounding or ("feedback" if options.coding == "fixed" else "nearest")
        wanted = options.coding, limits, options.finetune, options.controls, share, rounding
        return build(run, evaluator, baseline, *wanted)

    run_models(options, models)


def factor(text: str) -> float | str:
    """An argparse type: a number of at least 1, or auto."""
    return text if text == "auto" else bounded_float(1, 1e6, 10)(text)


if __name__ == "__main__":
    run_main(main)
