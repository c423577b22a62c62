"""Images of a model, batch by batch, kept on disk: a run that was stopped continues with the next batch.

Each batch is a part, a file of its own; when all are there, they are joined and deleted. Scripts that run at once may
make the same images: each writes the same bytes, and whichever comes first joins for all.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from common.ddpm.architecture import Architecture, schedule_of
from common.ddpm.digits import to_uint8
from common.ddpm.noise import NoiseStreams
from common.ddpm.samplers import Denoiser, sample
from common.errors import UserError
from common.runtime import distributed, sealed
from common.runtime.device import autocast, cast_weights
from common.runtime.files import locked


@dataclass(frozen=True)
class Sampling:
    """All that the images of given weights depend on; `device` is its `device_name`, `engine` what runs the network:
    torch, or another with its version."""

    images: int
    sampler: str
    steps: int
    eta: float
    batch_size: int
    seed: int
    device: str
    precision: str
    engine: str = "torch"

    def to_json(self) -> dict:
        """What files of images say; those of torch do not name it."""
        return {key: value for key, value in asdict(self).items() if (key, value) != ("engine", "torch")}

    @property
    def method(self) -> str:
        return f"{self.sampler} {self.steps} steps" + (f", eta {self.eta:g}" if self.sampler == "ddim" else "")


# prepare(network, sampling, device) gives the function (x, t) -> predicted noise that samples.
Prepare = Callable[[nn.Module, Sampling, torch.device], Denoiser]
WARM_UP = 2  # steps of a process's first batch, whose time does not count


def prepare_torch(network: nn.Module, sampling: Sampling, device: torch.device) -> Denoiser:
    """The network itself, on the device and in the precision of `sampling`."""
    network = network.to(device, memory_format=torch.channels_last).eval()
    cast_weights(network, sampling.precision)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with autocast(device, sampling.precision):
            return network(x, t)

    return denoise


def image_file(folder: Path, sampling: Sampling, weights: str) -> Path:
    """Where the images of the weights of hash `weights` are kept."""
    settings = [sampling.to_json(), weights, torch.__version__]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return folder / f"{key[:16]}.safetensors"


def load_images(path: Path) -> torch.Tensor:
    """uint8 (N, H, W) or (N, C, H, W)."""
    return sealed.load(path, "images")[0]["images"]


def generate(
    network: nn.Module,
    weights: str,
    sampling: Sampling,
    device: torch.device,
    folder: Path,
    label: str,
    prepare: Prepare = prepare_torch,
    on_time: Callable[[float], None] = lambda seconds: None,
) -> torch.Tensor:
    """uint8 (N, H, W), or (N, C, H, W) of more channels than one: images of `network` in evaluation mode, whose weights
    have the hash `weights`.

    Finished batches are read back from `folder`; a file that is damaged or holds other images is named in a line and
    made anew. Several processes share the batches, and the folder. on_time(seconds) is called with the time of an image
    and step, for each step of a whole batch that this process samples after a warm-up.
    """
    path = image_file(folder, sampling, weights)
    metadata = {"sampling": sampling.to_json(), "weights": weights, "torch": torch.__version__}
    shape, denoise = stored_shape(network.architecture.image_shape), None
    while missing := distributed.on_first(lambda: _join(path, metadata, sampling, shape)):
        denoise = denoise or prepare(network, sampling, device)  # by all processes, which may have to meet in it
        starts = distributed.shard(missing)
        _sample_parts(denoise, network.architecture, metadata, sampling, device, path, starts, label, on_time)
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
    denoise: Denoiser,
    architecture: Architecture,
    metadata: dict,
    sampling: Sampling,
    device: torch.device,
    path: Path,
    starts: list[int],
    label: str,
    on_time: Callable[[float], None],
) -> None:
    """Samples the batches that begin at `starts` into their parts, but for those that another script has made.

    Raises UserError where images are not numbers.
    """
    if not starts:
        return
    schedule, shape = schedule_of(architecture), architecture.image_shape
    whole, warm_up = min(sampling.batch_size, sampling.images), WARM_UP
    with tqdm(total=len(starts) * sampling.steps, desc=label, unit="step") as bar:
        for start in starts:
            part = _part_file(path, start)
            if part.exists() or path.exists():
                bar.update(sampling.steps)
                continue
            indices = range(start, min(start + sampling.batch_size, sampling.images))
            times: list[float] = []

            def on_step(times=times):
                bar.update()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # so that the time is that of this step
                times.append(time.perf_counter())

            images = sample(
                denoise,
                schedule,
                NoiseStreams(sampling.seed, indices, shape),
                sampling.sampler,
                sampling.steps,
                sampling.eta,
                device,
                on_step=on_step,
            )
            if images.isnan().any():
                raise UserError(f"{label}: the network predicts what is no number; its weights are too large")
            if len(indices) == whole:
                for before, after in list(pairwise(times))[max(0, warm_up - 1) :]:
                    on_time((after - before) / whole)
                warm_up = 0
            try:
                sealed.save(part, "images", {"images": to_uint8(images)}, metadata | {"start": start})
            except (OSError, UserError):
                if not path.exists():  # if it does, another script has joined its parts, and deleted their folder
                    raise
