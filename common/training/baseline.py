"""The FP32 baseline of a run: trained, or found trained."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from common.ddpm.digits import load_digits
from common.ddpm.unet import UNet
from common.errors import UserError
from common.formats.packed import Model, full_precision, load_model, save_model
from common.runtime import distributed, files
from common.runtime.sealed import CheckpointError
from common.study.run import Run, cost_estimate, preset_checkpoint, read_checkpoint, training_precision
from common.training.loop import train


def train_baseline(run: Run, keep_every: int | None = None) -> Model:
    """Trains, or continues training, the preset's baseline; writes it to the checkpoint and returns it.

    The averaged weights after each `keep_every` steps are kept beside it, as baselines of their own.
    """
    state_path = training_state_file(run)
    digits = load_digits(run.data, "train", run.data_dir)
    precision = training_precision(run.device)
    print(cost_estimate(run))
    print(f"training in {precision}; state in {state_path}, so the same command continues after an interruption")
    metadata = {"preset": run.preset_name, "weights": "ema", "training": asdict(run.training), "precision": precision}

    def keep(step: int, ema: dict[str, torch.Tensor]) -> None:
        due = keep_every and step % keep_every == 0 and step < run.training.steps
        if due and distributed.rank() == 0:
            seen = step * run.training.batch_size
            label = {"label": f"FP32 after {seen:,} digits", "digits_seen": seen}
            save_model(kept_file(run, seen), full_precision(run.preset.network, ema, metadata | label))

    state, losses = train(UNet(run.preset.network), run.training, digits, state_path, run.device, precision, keep)
    width = max(1, len(losses) // 200)
    curve = [sum(losses[i : i + width]) / len(losses[i : i + width]) for i in range(0, len(losses), width)]
    metadata |= {
        "label": "Baseline (FP32)",
        "digits_seen": run.training.steps * run.training.batch_size,
        "loss_curve": [round(loss, 6) for loss in curve],
    }
    model = full_precision(run.preset.network, state, metadata)
    if distributed.rank() == 0:
        save_model(run.checkpoint, model)
        files.remove(state_path)
    print(f"trained: last loss {curve[-1]:.4f}; {run.checkpoint}")
    return model


def training_state_file(run: Run) -> Path:
    return run.checkpoint.with_suffix(".training.safetensors")


def kept_file(run: Run, digits_seen: int | str) -> Path:
    """Where training keeps the weights that have seen so many digits; with "*", the pattern of all."""
    return run.checkpoint.with_suffix(f".after-{digits_seen}.safetensors")


def load_baseline(run: Run) -> Model:
    """The FP32 model of --checkpoint. Raises UserError where it is missing, quantized or of another architecture."""
    model = load_checkpoint(run)
    if not model.is_baseline:
        raise UserError(
            f"--checkpoint {run.checkpoint} is quantized already; strategies start from an FP32 baseline: "
            f"{preset_checkpoint(run.preset_name)}"
        )
    return model


def load_checkpoint(run: Run) -> Model:
    """The model of --checkpoint, of the preset's architecture. Raises UserError."""
    if not run.checkpoint.exists():
        raise UserError(
            f"--checkpoint {run.checkpoint}: no such file; make the baseline with: "
            f"python simplediffusion.py --preset {run.preset_name}"
        )
    model = read_checkpoint(run.checkpoint)
    expected = replace(run.preset.network, dropout=model.config.dropout)
    if model.config != expected:
        raise CheckpointError(
            f"--checkpoint {run.checkpoint} has another architecture, channels {model.config.channels}, than preset "
            f"{run.preset_name}, {expected.channels}; give the --preset that made it"
        )
    return model


def find_baseline(run: Run, model: Model) -> Model | None:
    """The baseline that a packed model came from, where the preset's checkpoint is it."""
    path = preset_checkpoint(run.preset_name)
    if path.exists():
        baseline = load_model(path)
        if baseline.sha256 == model.metadata.get("baseline"):
            return baseline
    print(f"{path} is not the baseline of {run.checkpoint}: no differences to it are given")
    return None
