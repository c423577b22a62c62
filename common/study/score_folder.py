"""FID, KID and Inception-style score of a folder of images, from anywhere, against the digits.

    python -m common metrics DIR

Errors are those of drawing other generated images from the same model; the reference digits are held fixed.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from common.metrics.scores import describe, load_reference, require_enough, score
from common.options import Parser


def load_folder(folder: Path) -> torch.Tensor:
    """The images of a folder, in the order of their names: uint8 (N, 32, 32); 28x28 ones are padded with black.

    Raises UserError for a folder without images, or an image of another size.
    """
    from PIL import Image, UnidentifiedImageError

    from common.ddpm.digits import pad_digits

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = sorted(
        p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
    )
    if not paths:
        raise UserError(f"{folder}: no images (png, jpg, bmp, gif or webp)")

    def read() -> Iterator[torch.Tensor]:
        for path in tqdm(paths, desc="reading", unit="image", disable=len(paths) < 2_000):
            try:
                with Image.open(path) as image:
                    pixels = torch.from_numpy(np.array(image.convert("L")))
            except (UnidentifiedImageError, OSError) as error:
                raise UserError(f"{path}: not a readable image ({error})") from None
            if pixels.shape == (28, 28):
                pixels = pad_digits(pixels)
            if pixels.shape != (32, 32):
                raise UserError(f"{path} is {pixels.shape[1]}x{pixels.shape[0]}; digits must be 28x28 or 32x32")
            yield pixels

    return torch.stack(list(read()))


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="white digits on black, 28x28 or 32x32")
    parser.add_argument("--metric", choices=("mnist", "inception"), default="mnist", help="whose features are used")
    parser.add_argument("--inception-weights", type=Path, metavar="FILE", help="default: download them")
    parser.add_argument("--data", choices=("mnist", "mnist5k"), default="mnist5k", help="the digits to compare with")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="holds MNIST/raw")
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda where available, else cpu")
    options = parser.parse_args()

    from common.ddpm.digits import load_digits
    from common.metrics.features import load_features
    from common.runtime.device import choose_device, set_up_torch

    images = load_folder(options.folder)
    set_up_torch()
    network = load_features(options.metric, choose_device(options.device), options.inception_weights)
    require_enough(len(images), network)
    digits = load_digits(options.data, "train", options.data_dir)
    scores = score(images, network, load_reference(digits, network, cache=None))
    print(f"{len(images)} images against {len(digits)} digits of {options.data}; {describe(network)}")
    print(f"FID {scores.fid.value:.3f} ± {scores.fid.error:.3f}")
    print(f"KID {1e3 * scores.kid.value:.3f} ± {1e3 * scores.kid.error:.3f} (x 1000)")
    print(f"Score {scores.inception_score.value:.3f} ± {scores.inception_score.error:.3f}")
