"""The model that finetuning makes of an entropy-coded one: made once, kept, and found by the same command again."""

import json
import os
from pathlib import Path

import torch
from tqdm import tqdm

from common.choose import allocation, rounding
from common.ddpm.architecture import schedule_of
from common.errors import UserError
from common.formats import entropy
from common.formats.packed import Model, file_bytes, load_model, save_model
from common.runtime import distributed
from common.runtime.files import remove
from common.study.codings import coded_model
from common.study.diffusion_fisher import training_digits
from common.study.run import Run, training_precision
from common.training.finetune import finetune, state_key
from common.training.finetune_inputs import BATCH, STATES, joined, noised_digits, sampled_states


def finetuned(run: Run, baseline: Model, model: Model, metadata: dict, limit: int, updates: int) -> Model:
    """A model of at most `limit` bytes whose codes, and steps of output channels, were trained to predict what the
    baseline does. They begin as those of `model`. Raises BudgetError.

    The result is kept, and found by the same command again; the state of the training, ten times as large, goes.
    """
    shapes = {name: tensor.shape for name, tensor in model.state.items()}
    steps = entropy.steps_of(model.stored, shapes)
    precision, seed = training_precision(run.device), run.training.seed
    more = {"limit": limit, "updates": updates, "device": run.sampling.device}
    key = state_key(baseline.sha256, model.sha256, steps, run.data, seed, precision, **more)
    state_path = run.out / f"finetuning-{key[:16]}.safetensors"
    kept_path = run.out / "finetuned" / f"{key[:16]}-{limit}.safetensors"
    kept = distributed.on_first(lambda: _kept_result(kept_path, metadata))
    if kept is None:

        def stored_bytes(stored) -> int:
            return file_bytes(coded_model(baseline, stored, metadata))

        def size(weights, steps) -> int:
            return stored_bytes(rounding.encode(weights, steps, price=0.0))

        network = baseline.network().to(run.device, memory_format=torch.channels_last)
        digits, schedule = training_digits(run), schedule_of(baseline.config, run.device)
        of_all = {"seed": seed, "precision": precision, "variance": run.image_variance}
        draw = joined(
            noised_digits(network, digits, schedule, BATCH - STATES, **of_all),
            sampled_states(network, schedule, digits.shape[1:], STATES, **of_all),
        )
        weights, steps = finetune(network, model.state, steps, draw, size, limit, updates, precision, state_path)
        stored = distributed.on_first(lambda: allocation.requantize_to_size(weights, steps, stored_bytes, limit))
        kept = coded_model(baseline, stored, metadata)
        if distributed.rank() == 0:
            save_model(kept_path, kept)
    if distributed.rank() == 0:
        remove(state_path)
    return kept


def _kept_result(path: Path, metadata: dict) -> Model | None:
    """The model of an earlier finetuning, if it is there, whole and says the same of itself."""
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise UserError(f"{path}: is not a file, and a model has to be kept there; move it away")
    try:
        model = load_model(path)
    except (UserError, OSError) as error:
        tqdm.write(f"{error}; it is made anew")
        return None
    return model if model.metadata == json.loads(json.dumps(metadata)) else None
