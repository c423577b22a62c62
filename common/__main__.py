"""The tools beside the scripts: python -m common COMMAND [options]"""

import sys
from importlib import import_module

from common.errors import run_main
from common.options import Parser

COMMANDS = {  # name: (module, what it does)
    "report": ("common.study.report", "every row so far as tables, and the figures"),
    "metrics": ("common.study.score_folder", "FID, KID and score of a folder of digits"),
    "sensitivity": ("common.study.sensitivity", "does Fisher information say which tensors quantization hurts?"),
    "timesteps": ("common.study.timesteps", "which steps of sampling does quantization hurt?"),
    "engines": ("common.study.engines", "what do engines and precisions cost, and what do they save?"),
    "export": ("common.study.export", "writes a model that runs without this project, in OpenVINO's format or ONNX"),
    "waterfall": ("common.study.waterfall", "what does each part of layer_budget.py buy?"),
    "learning-curve": ("common.study.learning_curve", "how FID fell in training"),
    "unpack": ("common.study.unpack", "writes a packed model as a folder that diffusers loads"),
    "samples": ("common.study.grid", "draws a grid of images of a packed model"),
    "features": ("common.study.train_features", "trains the digit classifier whose features the metrics use"),
}


def main():
    listed = "\n".join(f"  {name:16}{does}" for name, (_, does) in COMMANDS.items())
    parser = Parser(
        prog="python -m common",
        description=f"{__doc__}\n\ncommands:\n{listed}\n\nEach has a --help of its own.",
        usage="python -m common COMMAND [options]",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those above")
    if sys.argv[1:] and sys.argv[1].startswith("-") and sys.argv[1] not in ("-h", "--help"):
        parser.error(f"argument COMMAND: comes first, before {sys.argv[1]}; choose from {', '.join(COMMANDS)}")
    options = parser.parse_args(sys.argv[1:2])
    sys.argv = [f"python -m common {options.command}", *sys.argv[2:]]  # what the command's own messages begin with
    import_module(COMMANDS[options.command][0]).main()


if __name__ == "__main__":
    run_main(main)
