"""Images of a folder, at the size and with the channels that a network takes, split by name."""

import hashlib
import os
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common.ddpm.digits import DataError
from common.runtime.sealed import shorten

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
DECODERS = ("PNG", "JPEG", "WEBP")  # not all of Pillow's, some of which start other programs
MAX_BYTES = 2**26  # of a file
MAX_PIXELS = 2**26
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
HELD_OUT_SHARE = 0.2
FEWEST = {"train": 16, "test": 4}  # fewer say nothing


def is_held_out(name: str) -> bool:
    """Whether the file of this name, relative to its folder, with "/" between parts, is in the split "test".

    A hash of the name decides, so a file stays where it is whatever else comes into the folder.
    """
    first = hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8]
    return int.from_bytes(first, "big") < HELD_OUT_SHARE * 2**64


def describe_folder(folder: Path) -> str:
    """Its name, and a hash of the names and sizes of the images in it. Raises DataError."""
    sizes = [(name, (folder / name).stat().st_size) for name in list_images(folder)]
    return f"{shorten(folder.absolute().name)} {hashlib.sha256(repr(sizes).encode()).hexdigest()[:8]}"


def split_names(folder: Path, split: str) -> list[str]:
    """The names of the images in the split "train" or "test". Raises DataError where they are too few."""
    names = [name for name in list_images(folder) if is_held_out(name) == (split == "test")]
    if len(names) < FEWEST[split]:
        what = "held out, by a hash of their names" if split == "test" else "to calibrate with"
        raise DataError(
            f"--data {folder}: only {len(names)} images there are {what}; give at least {FEWEST[split]}, better some "
            "hundreds in all"
        )
    return names


@lru_cache(maxsize=2)
def load_folder(folder: Path, split: str, shape: tuple[int, int, int]) -> torch.Tensor:
    """uint8 (N, C, H, W), or (N, H, W) where C is 1, for `shape` (C, H, W): the png, jpg and webp files in `folder` and
    in the folders in it, in the order of their names. split: "train", or "test", a fifth of them.

    Images of another size are cut to the shape's proportions around their middle, and then scaled. Raises DataError for
    a folder with too few images, and for a file that is none or has too few channels.
    """
    channels, height, width = shape
    if channels not in MODES:
        raise DataError(f"--data {folder}: files of images have 1, 3 or 4 channels, and the model takes {channels}")
    names = split_names(folder, split)
    images = torch.empty(len(names), channels, height, width, dtype=torch.uint8)
    for image, name in zip(images, tqdm(names, desc=f"reading {split}", unit="image"), strict=True):
        image.copy_(_read(folder / name, channels, height, width))
    return images.squeeze(1) if channels == 1 else images


def list_images(folder: Path) -> list[str]:
    """The names, relative to `folder`, of all files in it and below with an image's ending, sorted."""
    remedy = "name the folder that holds the images, or use --data mnist5k"
    if not folder.is_dir():
        what = "is a file, not a folder" if os.path.lexists(folder) else "no such folder"
        raise DataError(f"--data {folder}: {what}; {remedy}")
    try:
        paths = [path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS]
    except OSError as error:
        raise DataError(f"--data {folder}: cannot be read ({error.strerror}); {remedy}") from None
    if not paths:
        raise DataError(f"--data {folder}: no images (png, jpg or webp) in it; {remedy}")
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _read(path: Path, channels: int, height: int, width: int) -> torch.Tensor:
    """uint8 (C, H, W) of one file."""
    try:
        if not path.is_file():  # reading a named pipe would never end
            raise DataError(f"{path}: {'a folder' if path.is_dir() else 'not a file, or a link to none'}; remove it")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: larger than {MAX_BYTES >> 20} MiB; make it smaller, or remove it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of great sizes, which are refused here, and of remarks beside the pixels
            with Image.open(path, formats=DECODERS) as image:  # reads the header alone
                pixels = np.array(_at_size(path, image, channels, height, width))
    except DataError:
        raise
    except Exception as error:  # Pillow lets through what its decoders raise, of many kinds
        reason = " ".join((str(error) or type(error).__name__).split())[:160]
        raise DataError(f"{path}: not a readable image ({reason}); make it anew, or remove it") from None
    return torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1)


def _at_size(path: Path, image: Image.Image, channels: int, height: int, width: int) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{path} is {image.width}x{image.height}, too large; make it smaller, or remove it")
    if getattr(image, "is_animated", False):
        raise DataError(f"{path} holds more than one picture; save each as a file of its own")
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{path} has more than 8 bits a pixel ({image.mode}); save it with 8")
    if channels == 3 and image.mode in ("1", "L", "LA"):
        raise DataError(f"{path} is grey, and the model takes 3 channels; name a folder of colour images")
    if channels == 4 and not image.has_transparency_data:
        raise DataError(f"{path} has no transparency, and the model takes 4 channels")
    if channels < 4 and image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        raise DataError(f"{path} has transparent pixels; put it on a background first")
    image = ImageOps.exif_transpose(image).convert(MODES[channels])  # upright, as a camera means it
    if image.size == (width, height):
        return image
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, image.width - left, image.height - top)
    return image.resize((width, height), Image.Resampling.LANCZOS, box)
