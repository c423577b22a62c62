"""Images of a model, batch by batch, kept on disk: a run that was stopped continues with the next batch."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from common.ddpm.digits import to_uint8
from common.ddpm.noise import NoiseStreams
from common.ddpm.samplers import sample
from common.ddpm.schedule import Schedule
from common.runtime import distributed, sealed
from common.runtime.device import autocast, cast_weights


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
    """uint8 (N, 32, 32)."""
    return sealed.load(path, "images")[0]["images"]


def generate(
    network: nn.Module, weights: str, sampling: Sampling, device: torch.device, folder: Path, label: str
) -> torch.Tensor:
    """uint8 (N, 32, 32): images of `network` in evaluation mode, whose weights have the hash `weights`.

    Finished batches are read back from `folder`. Several processes share the batches, and the folder.
    """
    path = image_file(folder, sampling, weights)
    if distributed.broadcast(path.exists()):
        return load_images(path)
    network = network.to(device, memory_format=torch.channels_last).eval()
    cast_weights(network, sampling.precision)
    schedule = Schedule(network.config.timesteps)
    starts = range(0, sampling.images, sampling.batch_size)
    parts = path.with_suffix(".parts")
    mine = distributed.shard(starts)
    with tqdm(total=len(mine) * sampling.steps, desc=label, unit="step") as bar:
        for start in mine:
            part = parts / f"{start:07d}.safetensors"
            if part.exists():
                bar.update(sampling.steps)
                continue
            indices = range(start, min(start + sampling.batch_size, sampling.images))
            with autocast(device, sampling.precision):
                images = sample(
                    network,
                    schedule,
                    NoiseStreams(sampling.seed, indices),
                    sampling.sampler,
                    sampling.steps,
                    sampling.eta,
                    device,
                    on_step=bar.update,
                )
            sealed.save(part, "images", {"images": to_uint8(images)}, {"start": start})
    distributed.barrier()
    if distributed.rank() > 0:
        distributed.barrier()
        return load_images(path)
    images = torch.cat([load_images(parts / f"{start:07d}.safetensors") for start in starts])
    sealed.save(path, "images", {"images": images}, {"sampling": asdict(sampling), "weights": weights})
    shutil.rmtree(parts)
    distributed.barrier()
    return images
