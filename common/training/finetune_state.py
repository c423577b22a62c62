"""What finetuning keeps of itself about once a minute, so that it continues with the same result."""

import math
from dataclasses import asdict, fields
from pathlib import Path

import torch
from tqdm import tqdm

from common.runtime import sealed
from common.runtime.sealed import CheckpointError
from common.training.price import SizeControl
from common.training.quantized import Quantized

MOMENTS = ("exp_avg", "exp_avg_sq")
REFRESH = 10  # updates from one look at all codes to the next; states are kept there


def save_state(
    path: Path, done: int, quantized: Quantized, optimizer: torch.optim.Adam | None, control: SizeControl
) -> None:
    """optimizer: None once the last update is done."""
    tensors = quantized.parameters()
    if optimizer is not None:
        for name, p in list(tensors.items()):
            tensors |= {f"{key}/{name}": value for key, value in optimizer.state[p].items()}
    sealed.save(path, "finetuning", tensors, {"updates": done, "name": path.name, "control": asdict(control)})


def read_state(
    path: Path, quantized: Quantized, control: SizeControl
) -> tuple[dict[str, torch.Tensor], int, dict] | None:
    """Tensors, number of updates done and the fields of a `SizeControl`; None, said in one line, where the file is not
    this finetuning's."""
    if not path.exists():
        return None
    try:
        tensors, metadata = sealed.load(path, "finetuning")
        sealed.require_metadata(metadata, {"updates": int, "name": str, "control": dict})
        done, found = metadata["updates"], metadata["control"]
        sealed.require_metadata(found, {field.name: type(getattr(control, field.name)) for field in fields(control)})
        same = metadata["name"] == path.name and all(
            found[key] == getattr(control, key) for key in ("end", "updates", "weights")
        )
        if not same or not 0 < done <= control.updates or (done % REFRESH and done < control.updates):
            raise ValueError("it is of another finetuning")
        if not all(math.isfinite(value) for value in found.values()) or not min(found["start"], found["size"]) > 0:
            raise ValueError("its sizes or prices cannot be")
        parameters = quantized.parameters()
        expected = {name: (torch.float32, p.shape) for name, p in parameters.items()}
        if done < control.updates:
            expected |= {f"{key}/{n}": (torch.float32, p.shape) for key in MOMENTS for n, p in parameters.items()}
            expected |= {f"step/{name}": (torch.float32, ()) for name in parameters}
        sealed.require_tensors(tensors, expected)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("its numbers are not finite")
    except CheckpointError as error:
        tqdm.write(f"{error}; finetuning begins anew")
        return None
    except ValueError as error:
        tqdm.write(f"{path} is damaged or of another version ({error}); finetuning begins anew")
        return None
    return tensors, done, found


def load_state(
    tensors: dict[str, torch.Tensor],
    quantized: Quantized,
    optimizer: torch.optim.Adam,
) -> None:
    """Copies the tensors that `read_state` gave into place."""
    for name, p in quantized.parameters().items():
        p.data.copy_(tensors[name])
        if f"step/{name}" in tensors:
            moments = {key: torch.empty_like(p).copy_(tensors[f"{key}/{name}"]) for key in MOMENTS}
            optimizer.state[p] = {"step": tensors[f"step/{name}"].to(p.device), **moments}  # where its kernel reads it
