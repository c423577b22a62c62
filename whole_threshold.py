"""One Fisher threshold for all tensors: those below it are quantized.

    python whole_threshold.py --threshold 0.01 0.1 1
    python whole_threshold.py --threshold 0.1 --format int4

Values are normalised by the largest, so a threshold of 1 quantizes every tensor but that one.
"""

from functools import partial

from common.choose.rules import below
from common.errors import run_main
from common.options import bounded_float, number, strategy_parser

# The poster's global threshold, 71.48 MiB; its FID stems from 100 images and compares with nothing.
PUBLISHED = {1.0: (None, 71.48)}


def main():
    parser = strategy_parser(__doc__)
    parser.add_argument(
        "--threshold", type=bounded_float(0, 1, 0.1), nargs="+", default=[1.0], metavar="X", help="one row for each"
    )
    options = parser.parse_args()

    from common.study.pipeline import Choice, run_strategy

    choices = [
        Choice("Threshold", number(threshold), partial(below, threshold=threshold), PUBLISHED.get(threshold))
        for threshold in options.threshold
    ]
    run_strategy(options, choices)


if __name__ == "__main__":
    run_main(main)
