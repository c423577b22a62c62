"""FID, KID and Inception-style score of a folder of images, from anywhere, against the digits.

    python -m common metrics DIR

DIR holds png, jpg, bmp, gif or webp files of one picture each, white digits on black, 28x28 or 32x32. Colours become
grey, 16 bits become 8. Transparent pixels are refused, since what is behind them is not known. Images that are mostly
light cause a warning: digits that are black on white must be inverted first.

Errors are those of drawing other generated images from the same model; the reference digits are held fixed.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common.ddpm.digits import load_digits, pad_digits
from common.errors import UserError
from common.metrics.features import load_features
from common.metrics.scores import describe, load_reference, require_enough, score
from common.options import Parser, file_name
from common.runtime.device import choose_device, set_up_torch

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
DECODERS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")  # not all of Pillow's, some of which start other programs
MAX_BYTES = 2**24  # of a file; 32x32 pixels take a few kB, a camera's remarks some more


def load_folder(folder: Path) -> torch.Tensor:
    """The images of a folder, in the order of their names: uint8 (N, 32, 32); 28x28 ones are padded with black.

    Raises UserError for a folder without images, and for a file that is no image of a digit, or not only one.
    """
    return read_images(list_images(folder))


def list_images(folder: Path) -> list[Path]:
    """The paths with an image's ending, sorted by name. Raises UserError where there are none."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    except FileNotFoundError:
        raise UserError(f"{folder}: no such folder; name one that holds images") from None
    except NotADirectoryError:
        raise UserError(f"{folder} is a file, not a folder; name the folder that holds the images") from None
    except OSError as error:  # no permission, a loop of links
        raise UserError(f"{folder}: cannot be read ({error.strerror}); name another folder") from None
    if not paths:
        raise UserError(f"{folder}: no images (png, jpg, bmp, gif or webp) in it; name the folder that holds them")
    return paths


def read_images(paths: list[Path]) -> torch.Tensor:
    """uint8 (N, 32, 32). Raises UserError for the first file that is no image of a digit."""
    images = torch.empty(len(paths), 32, 32, dtype=torch.uint8)
    for place, path in enumerate(tqdm(paths, desc="reading", unit="image", disable=len(paths) < 2_000)):
        try:
            if not path.is_file():  # reading a named pipe would never end
                what = "a folder" if path.is_dir() else "not a file, or a link to none"
                raise UserError(f"{path}: {what}; remove it")
            if path.stat().st_size > MAX_BYTES:
                raise UserError(f"{path}: larger than {MAX_BYTES >> 20} MiB; images must be 28x28 or 32x32")
            pixels = torch.from_numpy(_read_image(path))
        except UserError:
            raise
        except Exception as error:  # Pillow lets through what its decoders raise, of many kinds
            reason = " ".join((str(error) or type(error).__name__).split())[:160]
            raise UserError(
                f"{path}: not a readable image ({reason}); make it anew, 28x28 or 32x32, or remove it"
            ) from None
        images[place] = pad_digits(pixels) if pixels.shape == (28, 28) else pixels
    return images


def _read_image(path: Path) -> np.ndarray:
    """The grey values of a file, uint8 (28, 28) or (32, 32)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of great sizes, which are refused here, and of remarks beside the pixels
        with Image.open(path, formats=DECODERS) as image:  # reads the header alone
            if image.size not in ((28, 28), (32, 32)):
                raise UserError(f"{path} is {image.width}x{image.height}; digits must be 28x28 or 32x32")
            if getattr(image, "is_animated", False):
                raise UserError(f"{path} holds more than one picture; save each as a file of its own")
            image = ImageOps.exif_transpose(image)
            sixteen_bits = image.mode.startswith("I")  # which Pillow's conversions cut off at 255
            if image.has_transparency_data and (sixteen_bits or image.convert("RGBA").getextrema()[3][0] < 255):
                raise UserError(f"{path} has transparent pixels; put it on black first")
            if sixteen_bits:
                return (np.array(image, dtype=np.float64) * (255 / 65535)).round().astype(np.uint8)
            return np.array(image.convert("L"))


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=file_name, metavar="DIR", help="white digits on black, 28x28 or 32x32")
    parser.add_argument("--metric", choices=("mnist", "inception"), default="mnist", help="whose features are used")
    parser.add_argument("--inception-weights", type=file_name, metavar="FILE", help="default: download them")
    parser.add_argument("--data", choices=("mnist", "mnist5k"), default="mnist5k", help="the digits to compare with")
    parser.add_argument("--data-dir", type=file_name, default=Path("data"), metavar="DIR", help="holds MNIST/raw")
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:N; default: cuda where available, else cpu")
    options = parser.parse_args()
    if options.inception_weights is not None and options.metric != "inception":
        raise UserError(f"--inception-weights {options.inception_weights}: goes with --metric inception only")

    paths = list_images(options.folder)
    set_up_torch()
    network = load_features(options.metric, choose_device(options.device), options.inception_weights)
    require_enough(len(paths), network)
    digits = load_digits(options.data, "train", options.data_dir)
    images = read_images(paths)
    mean = images.sum(dtype=torch.int64) / images.numel()  # of MNIST it is 25
    if mean > 127:
        print(
            f"{Path(sys.argv[0]).name}: warning: the images are light (mean {mean:.0f} of 255): digits must be white "
            "on black; invert them if they are black on white",
            file=sys.stderr,
        )
    scores = score(images, network, load_reference(digits, network, cache=None))
    print(f"{len(images)} images against {len(digits)} digits of {options.data}; {describe(network)}")
    print(f"FID {scores.fid_unbiased.value:.4f} ± {scores.fid_unbiased.error:.4f} as of infinitely many images")
    print(f"FID {scores.fid.value:.3f} ± {scores.fid.error:.3f} of {len(images)}, which compares with as many only")
    print(f"KID {1e3 * scores.kid.value:.3f} ± {1e3 * scores.kid.error:.3f} (x 1000)")
    print(f"Score {scores.inception_score.value:.3f} ± {scores.inception_score.error:.3f}")
