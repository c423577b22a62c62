"""A diffusers model to try the scripts on: makes coloured digits, trains a UNet2DModel on them, writes its folder.

    python -m examples.coloured_digits --out examples/out
    python layer_budget.py --model examples/out/coloured --data examples/out/digits --times 8 13

The digits are those of mnist5k, 32x32, each in a colour of its own on another, as PNG files. The training, in bfloat16
where the processor has it, continues where it was stopped when the same command is given again.
"""

import io
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.ddpm.architecture import build
from common.ddpm.digits import load_digits
from common.ddpm.folder import load_folder
from common.ddpm.pipelines import DiffusersConfig
from common.errors import run_main
from common.options import Parser, file_name, positive_int
from common.presets import PRESETS
from common.runtime.device import choose_device, set_up_torch
from common.runtime.files import remove, write_atomically
from common.study.run import training_precision
from common.training.loop import train

UNET = {
    "sample_size": 32,
    "block_out_channels": [16, 32, 64, 128],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "attention_head_dim": 16,
}
TRAINING = replace(PRESETS["quick"].training, data="coloured digits", steps=4_000, ema=0.998)
# Of predicted noise, the share of the flat grounds is too small to be learned where there is much noise, and colours
# come out too bright.
SCHEDULER = {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"}
LEAST_CONTRAST = 0.6  # Euclidean distance of the two colours, each channel of 0..1


def colour(digit: np.ndarray, number: int) -> np.ndarray:
    """uint8 (32, 32, 3) of a digit (32, 32): two colours, which follow from the digit's number, mixed by its grey."""
    rng = np.random.default_rng([0, number])
    while True:
        ground, ink = rng.uniform(size=(2, 3))
        if np.linalg.norm(ink - ground) >= LEAST_CONTRAST:
            share = digit[..., None] / 255
            return np.round(255 * ((1 - share) * ground + share * ink)).astype(np.uint8)


def write_digits(folder: Path) -> None:
    """The 5,000 digits of mnist5k as 0000.png and so on, but for those that are there."""
    digits = torch.cat([load_digits("mnist5k", split) for split in ("train", "test")]).numpy()
    for number, digit in enumerate(tqdm(digits, desc="digits", unit="image")):
        path = folder / f"{number:04}.png"
        if not path.exists():
            file = io.BytesIO()
            Image.fromarray(colour(digit, number)).save(file, "PNG")
            write_atomically(path, file.getvalue())


def write_pipeline(folder: Path, config: DiffusersConfig, state: dict[str, torch.Tensor]) -> None:
    """A folder that DDPMPipeline.from_pretrained loads."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    network = UNet2DModel(**config.unet)
    network.load_state_dict(state)
    scheduler = DDPMScheduler(prediction_type=SCHEDULER["prediction_type"])
    DDPMPipeline(network, scheduler).save_pretrained(folder)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=file_name, default=Path("examples/out"), metavar="DIR")
    parser.add_argument("--steps", type=positive_int, default=TRAINING.steps, help="of the training, 64 digits each")
    options = parser.parse_args()
    set_up_torch()
    device = choose_device(None)
    config = DiffusersConfig.of(UNET, SCHEDULER)
    write_digits(options.out / "digits")
    digits = load_folder(options.out / "digits", "train", config.image_shape)
    network = build(config)
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {len(digits)} digits")
    training = replace(TRAINING, steps=options.steps)
    state_path, start = options.out / "training.safetensors", time.monotonic()
    state, losses = train(
        network, training, digits, state_path, device, training_precision(device), architecture=config
    )
    write_pipeline(options.out / "coloured", config, state)
    remove(state_path)
    minutes = (time.monotonic() - start) / 60
    print(f"last loss {sum(losses[-100:]) / len(losses[-100:]):.4f}; {minutes:.1f} min; {options.out / 'coloured'}")


if __name__ == "__main__":
    run_main(main)
