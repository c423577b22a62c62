"""The FP32 baseline: a network trained on digits, from the first step to its file."""

from dataclasses import asdict
from pathlib import Path

import torch

from common.ddpm.unet import UNet
from common.formats.packed import Model, full_precision, save_model
from common.presets import TrainingConfig, UNetConfig
from common.runtime import distributed
from common.runtime.files import remove
from common.training.loop import train

CURVE_POINTS = 200  # of the losses that the file keeps, at the least


def train_baseline(
    network: UNetConfig,
    training: TrainingConfig,
    digits: torch.Tensor,
    path: Path,
    device: torch.device,
    precision: str,
    preset_name: str,
    keep_every: int | None = None,
) -> Model:
    """Trains, or continues training, on `digits` (uint8, (N, 32, 32)); writes the model to `path` and returns it.

    The averaged weights after each `keep_every` steps are kept beside it, as baselines of their own. Raises
    TrainingError as `train` does.
    """
    state_path = training_state_file(path)
    print(f"training in {precision}; state in {state_path}, so the same command continues after an interruption")
    metadata = {"preset": preset_name, "weights": "ema", "training": asdict(training), "precision": precision}

    def keep(step: int, ema: dict[str, torch.Tensor]) -> None:
        due = keep_every and step % keep_every == 0 and step < training.steps
        if due and distributed.rank() == 0:
            seen = step * training.batch_size
            label = {"label": f"FP32 after {seen:,} digits", "digits_seen": seen}
            save_model(kept_file(path, seen), full_precision(network, ema, metadata | label))

    state, losses = train(UNet(network), training, digits, state_path, device, precision, keep)
    width = max(1, len(losses) // CURVE_POINTS)
    curve = [sum(losses[i : i + width]) / len(losses[i : i + width]) for i in range(0, len(losses), width)]
    metadata |= {
        "label": "Baseline (FP32)",
        "digits_seen": training.steps * training.batch_size,
        "loss_curve": [round(loss, 6) for loss in curve],
    }
    model = full_precision(network, state, metadata)
    if distributed.rank() == 0:
        save_model(path, model)
        remove(state_path)
    print(f"trained: last loss {curve[-1]:.4f}; {path}")
    return model


def training_state_file(path: Path) -> Path:
    """Where the training of the baseline at `path` keeps its state."""
    return _beside(path, "training")


def kept_file(path: Path, digits_seen: int | str) -> Path:
    """Where the training of the baseline at `path` keeps the weights that have seen so many digits; with "*", the
    pattern of all."""
    return _beside(path, f"after-{digits_seen}")


def _beside(path: Path, what: str) -> Path:
    """A file of its own for each `path`, dots in its name or not."""
    stem, suffix = path.name.removesuffix(".safetensors"), ".safetensors" if path.name.endswith(".safetensors") else ""
    return path.with_name(f"{stem}.{what}{suffix}")
