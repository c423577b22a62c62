"""Draws a grid of images that a packed model makes.

    python -m common samples results/quick/models/FILE.safetensors --images 64 --out grid.png

Image i depends on (seed, i) alone, so the grids of two models of one network show the same noise place by place.
"""

import io
import math
from pathlib import Path

from common.errors import UserError
from common.options import Parser, bounded_float, file_name, positive_int, whole_number

GAP = 2  # pixels between images


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("file", type=file_name, metavar="FILE", help="a packed model, or a baseline")
    parser.add_argument("--images", type=whole_number(1, 10_000), default=64, metavar="N")
    parser.add_argument("--out", type=file_name, default=Path("grid.png"), metavar="FILE", help="of the picture")
    parser.add_argument("--sampler", choices=("ddpm", "ddim", "dpm++"), default="dpm++")
    parser.add_argument("--steps", type=positive_int, metavar="N", help="default: 20; ddpm takes all")
    parser.add_argument("--eta", type=bounded_float(0, 1, 0.5), default=1.0, help="fresh noise of ddim, 0..1")
    parser.add_argument("--seed", type=whole_number(0, 2**64 - 1), default=0, metavar="N")
    parser.add_argument("--batch-size", type=whole_number(1, 100_000), default=50, metavar="N")
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:N; default: cuda where available, else cpu")
    options = parser.parse_args()
    if options.out.suffix.lower() != ".png":
        parser.error(f"argument --out: {options.out} does not end in .png; give a name that does")

    from tqdm import tqdm

    from common.ddpm.architecture import schedule_of
    from common.ddpm.digits import to_uint8
    from common.ddpm.noise import NoiseStreams
    from common.ddpm.samplers import sample
    from common.runtime.device import choose_device, set_up_torch
    from common.runtime.files import write_atomically
    from common.study.run import read_checkpoint, require_writable_file

    model, device = read_checkpoint(options.file, "FILE"), choose_device(options.device)
    if (channels := model.config.image_shape[0]) not in (1, 3, 4):
        raise UserError(f"FILE {options.file}: makes images of {channels} channels; pictures have 1, 3 or 4")
    require_writable_file("--out", options.out)
    steps = options.steps or (model.config.timesteps if options.sampler == "ddpm" else min(20, model.config.timesteps))
    if steps > model.config.timesteps or (options.sampler == "ddpm" and steps < model.config.timesteps):
        raise UserError(f"--steps {steps}: the model has {model.config.timesteps} timesteps, of which ddpm takes all")
    set_up_torch()
    network, schedule = model.network().to(device), schedule_of(model.config, device)
    starts = range(0, options.images, options.batch_size)
    images = []
    with tqdm(total=len(starts) * steps, desc=model.metadata["label"], unit="step") as bar:
        for start in starts:
            indices = range(start, min(start + options.batch_size, options.images))
            noise = NoiseStreams(options.seed, indices, model.config.image_shape)
            drawn = sample(network, schedule, noise, options.sampler, steps, options.eta, device, bar.update)
            images += list(to_uint8(drawn.cpu()))
    write_atomically(options.out, png_of_grid(images))
    print(f"{model.metadata['label']}: {len(images)} images, {options.sampler} {steps} steps; {options.out}")


def png_of_grid(images: list) -> bytes:
    """A PNG file of images, uint8 (H, W) or (C, H, W), row by row in as many columns as rows, or one more."""
    import numpy as np
    from PIL import Image

    channels, (height, width) = images[0].shape[:-2], images[0].shape[-2:]
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    grid = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, *channels), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        grid[top : top + height, left : left + width] = image if image.dim() == 2 else image.permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(grid).save(file, "PNG")
    return file.getvalue()
