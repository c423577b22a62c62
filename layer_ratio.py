"""One ratio per layer: the given share of each layer's tensors, those of the largest Fisher values, stays FP32.

python layer_ratio.py --ratio 0.25 0.35
python layer_ratio.py --ratio 0.5 --format int8
"""

import math
from functools import partial

from common.config import bounded_float, run_main, strategy_parser
from common.layers import by_layer

PUBLISHED = {0.25: (22.42, 102.26)}


def below_top_ratio(values: dict[str, float], ratio: float) -> set[str]:
    """Names of the tensors outside the top `ratio` (0..1) of their layer, counted to the nearest whole tensor, a half
    up; of equal values the earlier tensor stays."""
    chosen = set()
    for members in by_layer(values).values():
        kept = math.floor(ratio * len(members) + 0.5)
        chosen |= set(sorted(members, key=lambda name: -values[name])[kept:])
    return chosen


def main():
    parser = strategy_parser(__doc__)
    parser.add_argument(
        "--ratio", type=bounded_float(0, 1, 0.25), nargs="+", default=[0.25], metavar="P", help="one row for each"
    )
    options = parser.parse_args()

    from common.experiment import Choice, run_strategy

    choices = [
        Choice("Ratio", f"{ratio:g}", partial(below_top_ratio, ratio=ratio), PUBLISHED.get(ratio))
        for ratio in options.ratio
    ]
    run_strategy(options, choices)


if __name__ == "__main__":
    run_main(main)
