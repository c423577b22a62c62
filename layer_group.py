"""One Fisher threshold per group of layers: the mean of the group's tensors; those below it are quantized.

python layer_group.py --groups 12/3456 12/345/6
python layer_group.py --groups 123/456 --format int8
python layer_group.py --model DIR --data FOLDER --groups 1,2,3/4,5,6,7,8,9,10,11      # of more than nine layers
"""

import argparse
from functools import partial

from common.choose.layers import check_groups, parse_groups
from common.choose.rules import below_group_mean
from common.errors import run_main
from common.options import strategy_parser

PUBLISHED = {"12/3456": (23.84, 67.9)}


OWN_LAYERS = 6


def groups_of(text: str) -> str:
    """An argparse type: numbers of layers, each once, in groups separated by slashes."""
    try:
        parse_groups(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from None
    return text


def first_two_and_others(layers: int) -> str:
    """The default, 12/3456 where there are six layers."""
    separator = "," if layers > 9 else ""
    parts = (range(1, 3), range(3, layers + 1))
    return "/".join(separator.join(map(str, part)) for part in parts if part)


def main():
    parser = strategy_parser(__doc__)
    parser.add_argument(
        "--groups",
        type=groups_of,
        nargs="+",
        metavar="G",
        help="one row for each; default: the first two layers and the others, 12/3456 (--dry-run lists a --model's)",
    )
    options = parser.parse_args()
    layers = OWN_LAYERS
    if options.model:
        from common.study.run import layers_of_model

        layers = len(layers_of_model(options.model))
    options.groups = options.groups or [first_two_and_others(layers)]
    try:
        for groups in options.groups:
            check_groups(groups, layers)
    except ValueError as error:
        parser.error(f"argument --groups: {error}")

    from common.study.pipeline import Choice, run_strategy

    choices = [
        Choice("Groups", groups, partial(below_group_mean, groups=groups), PUBLISHED.get(groups))
        for groups in options.groups
    ]
    run_strategy(options, choices)


if __name__ == "__main__":
    run_main(main)
