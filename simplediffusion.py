"""The baseline: train (or resume, or find it trained), then images, Fisher information, FID and size.

python simplediffusion.py                        # preset paper where CUDA is available, else quick
python simplediffusion.py --preset quick --retrain --checkpoint results/quick/baseline.safetensors
python simplediffusion.py --preset paper --dry-run
python simplediffusion.py --preset paper --training-steps 2000
python simplediffusion.py --format int4 --rounding feedback     # the uniform model, rounded with feedback
python simplediffusion.py --checkpoint PACKED_FILE              # a quantized model's row, from its file alone
"""

from common.errors import run_main
from common.options import LARGEST_SEED, file_name, positive_int, script_parser, whole_number
from common.presets import ROUNDINGS


def main():
    parser = script_parser(__doc__, formats=True)
    parser.add_argument(
        "--retrain",
        action="store_true",
        help="train anew and write --checkpoint, or continue a training that was stopped",
    )
    parser.add_argument(
        "--training-steps", type=positive_int, metavar="N", help="steps to train, if it trains; default: the preset's"
    )
    parser.add_argument(
        "--training-seed",
        type=whole_number(0, LARGEST_SEED),
        metavar="N",
        help="seed of the training, if it trains: of the initial weights, the digits and the noise; default: 0",
    )
    parser.add_argument(
        "--keep-every", type=positive_int, metavar="N", help="keep the weights every N steps of the training"
    )
    parser.add_argument(
        "--baseline", type=file_name, metavar="FILE", help="baseline of a packed --checkpoint; default: the preset's"
    )
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default="nearest",
        help="how to round integers: to the nearest, as published; or with scales of the least squared error; or with "
        "these scales and feedback: each error is compensated in weights and layers that are rounded later",
    )
    options = parser.parse_args()
    if options.rounding != "nearest" and not options.format.startswith("int"):
        parser.error(f"argument --rounding {options.rounding}: goes with --format int8 to int2")

    from common.study.pipeline import run_baseline

    changed = {"steps": options.training_steps, "seed": options.training_seed}
    changed = {name: value for name, value in changed.items() if value is not None}
    run_baseline(options, options.retrain, changed, options.keep_every, options.baseline)


if __name__ == "__main__":
    run_main(main)
