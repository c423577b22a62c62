"""The baseline: train (or resume, or find it trained), then images, Fisher information, FID and size.

python simplediffusion.py                        # preset paper where CUDA is available, else quick
python simplediffusion.py --preset quick --retrain
python simplediffusion.py --preset paper --dry-run
python simplediffusion.py --preset paper --training-steps 2000
python simplediffusion.py --checkpoint results/quick/models/uniform-fp16.safetensors
"""

from common.errors import run_main
from common.options import positive_int, script_parser


def main():
    parser = script_parser(__doc__)
    parser.add_argument(
        "--retrain",
        action="store_true",
        help="train anew and replace --checkpoint, or continue a training that was stopped",
    )
    parser.add_argument(
        "--training-steps", type=positive_int, metavar="N", help="of the training, if any; default: the preset's"
    )
    parser.add_argument(
        "--keep-every", type=positive_int, metavar="N", help="keep the weights each N steps of the training, if any"
    )
    options = parser.parse_args()

    from common.study.pipeline import run_baseline

    run_baseline(options, options.retrain, options.training_steps, options.keep_every)


if __name__ == "__main__":
    run_main(main)
