"""One threshold per layer from its Fisher values: mean - k * std; tensors below it are quantized.

    python layer_math.py --alpha 0.5      # k = alpha * mean / std, clamped to [0.1, 2.0]
    python layer_math.py --k 0.5          # k itself

GroupNorm weights are left out: they stay FP32 and do not enter the mean and std.
"""

from functools import partial

from common.choose.rules import below_layer_threshold
from common.errors import run_main
from common.options import bounded_float, number, strategy_parser

PUBLISHED = {0.5: (23.16, 81.57)}


def main():
    parser = strategy_parser(__doc__)
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument(
        "--alpha", type=bounded_float(0, 10, 0.5), nargs="+", default=[0.5], metavar="A", help="one row for each"
    )
    rule.add_argument("--k", type=bounded_float(-10, 10, 0.5), nargs="+", metavar="K", help="one row for each")
    options = parser.parse_args()

    from common.study.pipeline import Choice, run_strategy

    if options.k:
        choices = [Choice("Math k", number(k), partial(below_layer_threshold, alpha=0, k=k)) for k in options.k]
    else:
        choices = [
            Choice("Math alpha", number(alpha), partial(below_layer_threshold, alpha=alpha), PUBLISHED.get(alpha))
            for alpha in options.alpha
        ]
    run_strategy(options, choices)


if __name__ == "__main__":
    run_main(main)
