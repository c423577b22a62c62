"""One share for every layer: that share of its tensors, those with the largest Fisher values, stays FP32.

python layer_ratio.py --ratio 0.25 0.35
python layer_ratio.py --ratio 0.5 --format int8
"""

from functools import partial

from common.choose.rules import below_top_ratio
from common.errors import run_main
from common.options import bounded_float, number, strategy_parser

PUBLISHED = {0.25: (22.42, 102.26)}


def main():
    parser = strategy_parser(__doc__)
    parser.add_argument(
        "--ratio", type=bounded_float(0, 1, 0.25), nargs="+", default=[0.25], metavar="P", help="one row for each"
    )
    options = parser.parse_args()

    from common.study.pipeline import Choice, run_strategy

    choices = [
        Choice("Ratio", number(ratio), partial(below_top_ratio, ratio=ratio), PUBLISHED.get(ratio))
        for ratio in options.ratio
    ]
    run_strategy(options, choices)


if __name__ == "__main__":
    run_main(main)
