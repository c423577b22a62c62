"""One Fisher threshold per group of layers: the mean of the group's tensors; those below it are quantized.

python layer_group.py --groups 12/3456 12/345/6
python layer_group.py --groups 123/456 --format int8
"""

import argparse
from functools import partial

from common.choose.rules import below_group_mean
from common.errors import run_main
from common.options import strategy_parser

PUBLISHED = {"12/3456": (23.84, 67.9)}


def parse_groups(text: str) -> str:
    """An argparse type: layers 1 to 6, each once, in groups separated by slashes."""
    layers = text.replace("/", "")
    for layer in layers:
        if layer not in "123456":
            raise argparse.ArgumentTypeError(f"{text!r} names layer {layer!r}; layers are 1 to 6, e.g. 12/3456")
        if layers.count(layer) > 1:
            raise argparse.ArgumentTypeError(f"{text!r} names layer {layer} twice; name each once, e.g. 12/3456")
    missing = [layer for layer in "123456" if layer not in layers]
    if missing:
        raise argparse.ArgumentTypeError(f"{text!r} lacks layer {', '.join(missing)}; name each once, e.g. 12/3456")
    if not all(text.split("/")):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty group; write e.g. 12/3456")
    return text


def main():
    parser = strategy_parser(__doc__)
    parser.add_argument(
        "--groups", type=parse_groups, nargs="+", default=["12/3456"], metavar="G", help="one row for each"
    )
    options = parser.parse_args()

    from common.study.pipeline import Choice, run_strategy

    choices = [
        Choice("Groups", groups, partial(below_group_mean, groups=groups), PUBLISHED.get(groups))
        for groups in options.groups
    ]
    run_strategy(options, choices)


if __name__ == "__main__":
    run_main(main)
