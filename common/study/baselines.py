"""The baseline that a run starts from: found, checked, or trained."""

import os
from dataclasses import replace
from pathlib import Path

from common.ddpm.pipelines import DiffusersConfig
from common.errors import UserError
from common.formats.diffusers_folder import read_folder
from common.formats.packed import Model, load_model, size_mib
from common.runtime import distributed
from common.runtime.sealed import CheckpointError
from common.study.run import (
    Run,
    cost_estimate,
    preset_checkpoint,
    read_checkpoint,
    require_writable,
    training_precision,
)
from common.training.baseline import train_baseline, training_state_file

# Weights of the baselines that come with the software: no training replaces them.
SHIPPED = ("4914ccb0",)


def load_baseline(run: Run) -> Model:
    """The FP32 model of --checkpoint. Raises UserError where it is missing, quantized or of another architecture."""
    model = load_checkpoint(run)
    if not model.is_baseline:
        other = f"an FP32 baseline to start from, such as {preset_checkpoint(run.preset_name)}"
        raise UserError(
            f"--checkpoint {run.checkpoint} is quantized already; "
            + (f"name {other}" if run.is_own else "leave it out, and give --model, the folder that it came from")
        )
    return model


def load_checkpoint(run: Run) -> Model:
    """The model of --model or --checkpoint, of the preset's architecture. Raises UserError."""
    if run.checkpoint == run.model:
        return distributed.on_first(lambda: read_folder(run.model, run.preset_name))
    if not is_there(run.checkpoint):
        is_usual = run.checkpoint == preset_checkpoint(run.preset_name)
        named = "" if is_usual else f" --retrain --checkpoint {run.checkpoint}"
        raise UserError(
            f"--checkpoint {run.checkpoint}: no such file; make the baseline with: "
            f"python simplediffusion.py --preset {run.preset_name}{named}"
        )
    model = read_checkpoint(run.checkpoint)
    if not run.is_own:
        if model.config != run.preset.network:
            raise CheckpointError(f"--checkpoint {run.checkpoint} is of another network than --model {run.model}")
        return model
    if isinstance(model.config, DiffusersConfig):
        raise CheckpointError(f"--checkpoint {run.checkpoint} came from a --model of diffusers; leave --preset out")
    expected = replace(run.preset.network, dropout=model.config.dropout)
    if not model.is_baseline:  # rounding adds these
        added = {"output_bias": model.config.output_bias, "output_contrast": model.config.output_contrast}
        expected = replace(expected, **added)
    if model.config != expected:
        raise CheckpointError(
            f"--checkpoint {run.checkpoint} has another architecture, channels {model.config.channels}, than preset "
            f"{run.preset_name}, {expected.channels}; give the --preset that made it"
        )
    if model.is_baseline and type(model.metadata.get("digits_seen")) is not int:
        raise UserError(f"--checkpoint {run.checkpoint}: does not say how many digits it has seen; make it anew")
    return model


def is_there(path: Path) -> bool:
    """Whether anything is at --checkpoint. Raises UserError where that cannot be said, as of a name too long."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"--checkpoint {path}: cannot be read ({error.strerror}); name another file") from None
    return True


def original_of(run: Run, model: Model, named: Path | None) -> tuple[Model | None, Path]:
    """The baseline that a packed model came from, and its file: `named` (--baseline), or else the preset's checkpoint
    where it is that; none, and a line that says so, where it is not. Raises UserError where `named` is another."""
    if named and not run.is_own:
        raise UserError(f"--baseline {named}: of models of diffusers --model DIR names the baseline")
    path = named or run.model or preset_checkpoint(run.preset_name)
    if named or (run.is_own and path.exists()) or run.model:
        baseline = read_folder(path, run.preset_name) if run.model else read_checkpoint(path, "--baseline")
        if baseline.sha256 == model.metadata.get("baseline"):
            return baseline, path
    wanted = str(model.metadata.get("baseline"))[:8]
    if named:
        raise UserError(
            f"--baseline {named}: its weights are {baseline.sha256[:8]}, and {run.checkpoint} came from {wanted}; "
            "name the file that it was made of"
        )
    if run.is_own:
        said, remedy = f"{path} is not the baseline of {run.checkpoint}", "--baseline FILE names another"
    else:
        said = f"the baseline of {run.checkpoint} is not given" if run.model is None else f"{path} is another"
        remedy = "--model DIR names it"
    print(f"{said} ({wanted}): no differences to it are given; {remedy}")
    return None, path


def check_training(run: Run, named: bool) -> None:
    """Raises UserError where training would replace what is not a baseline of one's own; `named`: by --checkpoint."""
    path = run.checkpoint
    if is_there(path):
        if not path.is_file():
            raise UserError(f"--checkpoint {path}: is there and not a file; name another")
        try:
            model = load_model(path)
        except (OSError, UserError):
            if named:
                raise UserError(
                    f"--checkpoint {path}: is not a baseline of this software, or damaged, and would be replaced; "
                    "delete it first, or name another"
                ) from None
        else:
            if not model.is_baseline:
                raise UserError(f"--checkpoint {path}: is a quantized model and would be replaced; name another file")
            if model.sha256.startswith(SHIPPED):
                raise UserError(
                    f"--retrain: {path} is the baseline that comes with the software; "
                    "name a file for the new one: --checkpoint FILE"
                )
    state = training_state_file(path)
    if os.path.lexists(state) and not state.is_file():
        raise UserError(
            f"--checkpoint {path}: {state}, where its training keeps its state, is not a file; move it away"
        )
    require_writable(f"--checkpoint {path}", path.parent, needed_mib=5 * size_mib(run.preset.network, {}))


def train(run: Run, keep_every: int | None) -> Model:
    """Trains, or continues training, the preset's network; writes it to --checkpoint and returns it."""
    digits = run.load_images("train")
    print(cost_estimate(run))
    return train_baseline(
        run.preset.network, run.training, digits, run.checkpoint, run.device, training_precision(run.device),
        run.preset_name, keep_every,
    )  # fmt: skip
