"""Images of a model, batch by batch, kept on disk: a run that was stopped continues with the next batch.

Each batch is a part, a file of its own; when all are there, they are joined and deleted. Scripts that run at once may
make the same images: each writes the same bytes, and whichever comes first joins for all.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from common.ddpm.architecture import schedule_of
from common.ddpm.digits import to_uint8
from common.ddpm.noise import NoiseStreams
from common.ddpm.samplers import sample
from common.errors import UserError
from common.runtime import distributed, sealed
from common.runtime.device import autocast, cast_weights
from common.runtime.files import locked


@dataclass(frozen=True)
class Sampling:
    """All that the images of given weights depend on; `device` is its `device_name`."""

    images: int
    sampler: str
    steps: int
    eta: float
    batch_size: int
    seed: int
    device: str
    precision: str

    @property
    def method(self) -> str:
        return f"{self.sampler} {self.steps} steps" + (f", eta {self.eta:g}" if self.sampler == "ddim" else "")


def image_file(folder: Path, sampling: Sampling, weights: str) -> Path:
    """Where the images of the weights of hash `weights` are kept."""
    settings = [asdict(sampling), weights, torch.__version__]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return folder / f"{key[:16]}.safetensors"


def load_images(path: Path) -> torch.Tensor:
    """uint8 (N, H, W) or (N, C, H, W)."""
    return sealed.load(path, "images")[0]["images"]


def generate(
    network: nn.Module, weights: str, sampling: Sampling, device: torch.device, folder: Path, label: str
) -> torch.Tensor:
    """uint8 (N, H, W), or (N, C, H, W) of more channels than one: images of `network` in evaluation mode, whose weights
    have the hash `weights`.

    Finished batches are read back from `folder`; a file that is damaged or holds other images is named in a line and
    made anew. Several processes share the batches, and the folder.
    """
    path = image_file(folder, sampling, weights)
    metadata = {"sampling": asdict(sampling), "weights": weights, "torch": torch.__version__}
    shape = stored_shape(network.architecture.image_shape)
    while missing := distributed.on_first(lambda: _join(path, metadata, sampling, shape)):
        _sample_parts(network, metadata, sampling, device, path, distributed.shard(missing), label)
        distributed.barrier()
    return load_images(path)


def stored_shape(shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Of one image (C, H, W) as it is kept: without the channel where there is one alone."""
    return shape[1:] if shape[0] == 1 else shape


def _part_file(path: Path, start: int) -> Path:
    return path.with_suffix(".parts") / f"{start:07d}.safetensors"


def _join(path: Path, metadata: dict, sampling: Sampling, shape: tuple[int, ...]) -> list[int]:
    """Makes the file of all images of its parts, unless it is there; returns the starts of the parts that are missing.

    Under a lock, so that no other script replaces or deletes what is being read.
    """
    with locked(path):
        if _read(path, metadata, (sampling.images, *shape)) is None:
            images, missing = torch.empty(sampling.images, *shape, dtype=torch.uint8), []
            for start in range(0, sampling.images, sampling.batch_size):
                batch = images[start : start + sampling.batch_size]
                part = _read(_part_file(path, start), metadata | {"start": start}, tuple(batch.shape))
                if part is None:
                    missing.append(start)
                else:
                    batch.copy_(part)
            if missing:
                return missing
            sealed.save(path, "images", {"images": images}, metadata)
        shutil.rmtree(path.with_suffix(".parts"), ignore_errors=True)  # another script may still be writing there
    return []


def _read(path: Path, metadata: dict, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The images, of this shape together, of a file whose metadata are those given; None where there are none.

    A file that holds anything else is named in a line, and deleted.
    """
    try:
        tensors, found = sealed.load(path, "images")
        images = tensors.get("images", torch.empty(0))
        if {"torch": torch.__version__} | found == metadata and (images.dtype, images.shape) == (torch.uint8, shape):
            return images
        problem = f"{path} does not hold the images that belong there"
    except FileNotFoundError:
        return None
    except sealed.CheckpointError as error:
        problem = str(error)
    print(f"{problem}: these images are sampled anew")
    path.unlink(missing_ok=True)
    return None


def _sample_parts(
    network: nn.Module,
    metadata: dict,
    sampling: Sampling,
    device: torch.device,
    path: Path,
    starts: list[int],
    label: str,
) -> None:
    """Samples the batches that begin at `starts` into their parts, but for those that another script has made."""
    network = network.to(device, memory_format=torch.channels_last).eval()
    cast_weights(network, sampling.precision)
    schedule, shape = schedule_of(network.architecture), network.architecture.image_shape
    with tqdm(total=len(starts) * sampling.steps, desc=label, unit="step") as bar:
        for start in starts:
            part = _part_file(path, start)
            if part.exists() or path.exists():
                bar.update(sampling.steps)
                continue
            indices = range(start, min(start + sampling.batch_size, sampling.images))
            with autocast(device, sampling.precision):
                images = sample(
                    network,
                    schedule,
                    NoiseStreams(sampling.seed, indices, shape),
                    sampling.sampler,
                    sampling.steps,
                    sampling.eta,
                    device,
                    on_step=bar.update,
                )
            try:
                sealed.save(part, "images", {"images": to_uint8(images)}, metadata | {"start": start})
            except (OSError, UserError):
                if not path.exists():  # if it does, another script has joined its parts, and deleted their folder
                    raise
