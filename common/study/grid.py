"""Draws images that packed models make.

    python -m common samples FILE --images 64 --out grid.png       # a grid of one model's images
    python -m common samples FILE FILE FILE --out strips.png       # a line for each model, each column from one noise
    python -m common samples FILE --images 1000 --png DIR          # one PNG in DIR for each image

FILE is a packed model, such as those in results/quick/models/, or a baseline. The noise of image i depends on (seed, i)
alone, so in each column all models start from the same noise. For models of digits, a line of real digits is added, and
a digit that differs from the first model's in its column is framed. An interrupted run continues with the next batch.
"""

import io
import math
import shutil
from pathlib import Path

from common.errors import UserError
from common.options import LARGEST_SEED, Parser, bounded_float, file_name, positive_int, whole_number

GAP = 2  # pixels between images
LONGEST_LINE = 64  # images of a model beside others


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("files", type=file_name, nargs="+", metavar="FILE", help="a packed model, or a baseline")
    parser.add_argument(
        "--images", type=whole_number(1, 10_000), metavar="N", help="default: 64 of one model, 12 of each of several"
    )
    parser.add_argument("--out", type=file_name, metavar="FILE", help="of the picture; default: grid.png")
    parser.add_argument("--png", type=file_name, metavar="DIR", help="writes each image there, in place of the picture")
    parser.add_argument("--sampler", choices=("ddpm", "ddim", "dpm++"), help="default: dpm++, or ddim with --eta")
    parser.add_argument("--steps", type=positive_int, metavar="N", help="default: 20; ddpm takes all")
    parser.add_argument("--eta", type=bounded_float(0, 1, 0.5), help="fresh noise of ddim, 0..1; default: 1")
    parser.add_argument("--seed", type=whole_number(0, LARGEST_SEED), default=0, metavar="N")
    parser.add_argument("--batch-size", type=whole_number(1, 100_000), default=50, metavar="N")
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:N; default: cuda where available, else cpu")
    options = parser.parse_args()
    if options.png and options.out:
        parser.error(f"argument --png: writes files and no picture, so --out {options.out} has no use; leave one out")
    out = options.out or Path("grid.png")
    if out.suffix.lower() != ".png":
        parser.error(f"argument --out: {out} does not end in .png; give a name that does")

    from common.ddpm.sampling import Sampling, generate
    from common.runtime.device import choose_device, device_name, set_up_torch
    from common.runtime.files import write_atomically
    from common.study.run import choose_method, preset_of

    if options.png and len({path.stem for path in options.files}) < len(options.files):
        raise UserError(f"FILE {options.files[-1]}: --png names images by their model's file; give names that differ")
    models, device = read_models(options.files), choose_device(options.device)
    usual = preset_of(models[options.files[0]].config)
    sampler, steps, eta = choose_method(options.sampler, options.steps, options.eta, usual)
    if len(models) > 1 and not options.png and (options.images or 0) > LONGEST_LINE:
        raise UserError(f"--images {options.images}: a line holds {LONGEST_LINE}; give fewer, or --png DIR")
    require_room(options.png, out)
    set_up_torch()
    sampling = Sampling(
        options.images or (64 if len(models) == 1 else 12), sampler, steps, eta, options.batch_size,
        options.seed, device_name(device), "fp32",
    )  # fmt: skip
    unfinished = (options.png or out).with_name(f"{(options.png or out).name}.unfinished")
    drawn = {
        path: generate(model.network(), model.sha256, sampling, device, unfinished, model.metadata["label"])
        for path, model in models.items()
    }
    if options.png:
        shutil.rmtree(unfinished / "png", ignore_errors=True)  # of a run that was stopped, perhaps of more images
        (unfinished / "png").mkdir()
        for path, images in drawn.items():
            for i, image in enumerate(images):
                (unfinished / "png" / f"{path.stem}-{i:05d}.png").write_bytes(png_of_grid([image]))
        (unfinished / "png").replace(options.png)  # which is new or empty
    elif len(models) == 1:
        write_atomically(out, png_of_grid(list(drawn[options.files[0]])))
    else:
        write_atomically(out, png_of_strips([(models[path], images) for path, images in drawn.items()], options.seed))
    shutil.rmtree(unfinished)
    labels = ", ".join(model.metadata["label"] for model in models.values())
    print(f"{labels}: {sampling.images} images, {sampling.method}; {options.png or out}")


def read_models(paths: list[Path]) -> dict:
    """{path: model}, of one shape of images and number of timesteps. Raises UserError."""
    from common.study.run import read_checkpoint, shape_text

    if twice := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"FILE {twice[0]}: is named twice; leave one out")
    models = {path: read_checkpoint(path, "FILE") for path in paths}
    shapes = {path: model.config.image_shape for path, model in models.items()}
    first = shapes[paths[0]]
    if first[0] not in (1, 3, 4):
        raise UserError(f"FILE {paths[0]}: makes images of {first[0]} channels; pictures have 1, 3 or 4")
    for path, shape in shapes.items():
        if shape != first:
            raise UserError(
                f"FILE {path}: makes {shape_text(shape)}, {paths[0]} {shape_text(first)}; give models of one network"
            )
        if models[path].config.timesteps != models[paths[0]].config.timesteps:
            raise UserError(f"FILE {path}: has other timesteps than {paths[0]}; give models of one network")
    return models


def require_room(folder: Path | None, picture: Path) -> None:
    """Raises UserError where the images cannot be written, or would mix with others."""
    from common.study.run import require_writable, require_writable_file

    if folder is None:
        return require_writable_file("--out", picture)
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:  # as of a name too long
        raise UserError(f"--png {folder}: cannot be read ({error.strerror}); name another folder") from None
    if taken:
        raise UserError(f"--png {folder}: is there and not an empty folder; name a new one")
    require_writable(f"--png {folder}", folder, needed_mib=64)


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


def png_of_strips(drawn: list, seed: int) -> bytes:
    """A PNG file with a line for each (model, its images); above those of digits a line of real ones."""
    from common.ddpm.digits import load_digits, some_of
    from common.presets import UNetConfig
    from common.study.strips import draw_strips

    strips, original = [(model.metadata["label"], images) for model, images in drawn], None
    if isinstance(drawn[0][0].config, UNetConfig):
        real = some_of(load_digits("mnist5k", "test"), len(drawn[0][1]), seed)
        strips, original = [("Real digits", real), *strips], 1
    file = io.BytesIO()
    draw_strips(strips, original).savefig(file, dpi=110, bbox_inches="tight")
    return file.getvalue()
