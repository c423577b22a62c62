"""Fisher information of any module's parameters: the mean of the squared gradient of the loss, sample by sample."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from common.errors import UserError
from common.fisher.gradients import SampleLoss, squared_gradients
from common.runtime import distributed, sealed
from common.runtime.sealed import CheckpointError

NOTHING_REACHED = "the loss depends on none of these weights; train the network, or another, first"


def fisher_information(
    network: nn.Module, loss: SampleLoss, samples: tuple[torch.Tensor, ...], chunk: int = 16, on_chunk=lambda n: None
) -> tuple[dict[str, float], dict[str, float]]:
    """Per parameter: the mean over entries and samples of the squared gradient, and its standard error over samples.

    This is the diagonal of the empirical Fisher information, averaged over the entries of a tensor. The network's mode
    is left alone: put it in evaluation mode first. Memory grows with `chunk` samples, not with their number. Several
    processes share the chunks.
    """
    total = len(samples[0])
    starts = range(0, total, chunk)
    sums = []  # (parameters, 2) of each chunk
    for start in distributed.shard(starts):
        batch = tuple(s[start : start + chunk] for s in samples)
        values = torch.stack([v.double() for v in squared_gradients(network, loss, batch).values()])
        sums.append(torch.stack([values.sum(1), values.square().sum(1)], dim=1).cpu())
        on_chunk(len(batch[0]))
    first, second = (torch.stack(distributed.gather(sums, len(starts))).sum(0) / total).unbind(1)
    error = ((second - first**2).clamp(min=0) / max(1, total - 1)).sqrt()
    names = [name for name, _ in network.named_parameters()]
    return dict(zip(names, first.tolist(), strict=True)), dict(zip(names, error.tolist(), strict=True))


@dataclass(frozen=True)
class FisherTable:
    """Fisher values of one network's parameters over timesteps.

    values, errors: float64 (timesteps, parameters), not normalised; `weights`: the hash of the weights they belong to;
    `image_weights`: how much each timestep after the first weighs in the finished image.
    """

    names: list[str]
    timesteps: list[int]
    values: torch.Tensor
    errors: torch.Tensor
    samples: list[int]
    settings: dict
    weights: str
    image_weights: list[float]

    def estimates(self, timestep: int | str) -> tuple[torch.Tensor, torch.Tensor]:
        """(parameters,) values and standard errors at a timestep, or their mean over the grid: "all" weighs its
        timesteps alike, "image" by `image_weights`. The first timestep is there for the published rules, not a part of
        the grid."""
        if timestep not in ("all", "image"):
            row = self.timesteps.index(timestep)
            return self.values[row], self.errors[row]
        weights = torch.ones(len(self.values) - 1) if timestep == "all" else torch.tensor(self.image_weights)
        weights = (weights.double() / weights.sum())[:, None]
        return (weights * self.values[1:]).sum(0), (weights * self.errors[1:]).square().sum(0).sqrt()

    def at(self, timestep: int | str, names: list[str]) -> dict[str, float]:
        """The `estimates` of `names`, divided by the largest of them. Raises UserError where all are zero."""
        values, _ = self.estimates(timestep)
        chosen = {name: float(values[self.names.index(name)]) for name in names}
        largest = max(chosen.values())
        if not largest > 0:
            raise UserError(f"all Fisher values are zero at timestep {timestep}: {NOTHING_REACHED}")
        return {name: value / largest for name, value in chosen.items()}


def measure(
    network: nn.Module,
    loss: SampleLoss,
    batches: dict[int, tuple[torch.Tensor, ...]],
    weights: str,
    settings: dict,
    image_weights: list[float],
) -> FisherTable:
    """Fisher values at each timestep of `batches`, {timestep: samples for `loss`}; shows a progress bar.

    Raises UserError where a value is not finite or all are zero.
    """
    names = [name for name, _ in network.named_parameters()]
    values, errors = [], []
    everyone = distributed.processes()
    with tqdm(total=sum(len(b[0]) for b in batches.values()), desc="Fisher", unit="digit") as bar:
        for samples in batches.values():
            mean, error = fisher_information(network, loss, samples, on_chunk=lambda n: bar.update(n * everyone))
            if bad := [name for name in names if not math.isfinite(mean[name]) or not math.isfinite(error[name])]:
                raise UserError(
                    f"the Fisher value of {bad[0]} is not finite: the network's weights or its loss are too large; "
                    "train it anew"
                )
            values.append([mean[name] for name in names])
            errors.append([error[name] for name in names])
    values, errors = torch.tensor(values, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)
    if not values.any():
        raise UserError(f"all Fisher values are zero: {NOTHING_REACHED}")
    samples = [len(b[0]) for b in batches.values()]
    return FisherTable(names, list(batches), values, errors, samples, settings, weights, image_weights)


def save(path: Path, table: FisherTable) -> None:
    """Writes the table as a sealed file."""
    metadata = {k: v for k, v in asdict(table).items() if k not in ("values", "errors")}
    sealed.save(path, "fisher", {"values": table.values, "errors": table.errors}, metadata)


def load(path: Path, weights: str) -> FisherTable:
    """Reads a table. Raises CheckpointError where it is damaged or of another version, UserError where it belongs to
    other weights than those of hash `weights`."""
    table = torch.float64, (None, None)
    lists = dict.fromkeys(("names", "timesteps", "samples", "image_weights"), list)
    tensors, metadata = sealed.require(
        path,
        sealed.load(path, "fisher"),
        {"values": table, "errors": table},
        lists | {"settings": dict, "weights": str},
    )
    table = FisherTable(**tensors, **metadata)
    if table.weights != weights:
        raise UserError(
            f"{path} holds the Fisher values of other weights ({table.weights[:12]!r}, not {weights[:12]}); "
            "delete it and run again"
        )
    if fault := _fault(table):
        raise CheckpointError(f"{path} is damaged: {fault}; delete it and run again")
    return table


def _fault(table: FisherTable) -> str:
    """What no measured table is like; empty where nothing is."""
    if not all(isinstance(name, str) for name in table.names) or len(set(table.names)) < len(table.names):
        return "its names are not names"
    if not all(type(n) is int and n >= 0 for n in table.timesteps + table.samples):
        return "its timesteps or samples are not whole numbers"
    if not all(type(w) in (int, float) and 0 <= w < math.inf for w in table.image_weights):
        return "its weights of timesteps are not positive numbers"
    rows = len(table.timesteps)
    if not len(table.samples) == len(table.image_weights) + 1 == rows:
        return "its lists are not of one length"
    if not table.values.shape == table.errors.shape == (rows, len(table.names)):
        return "its values are not one for each timestep and name"
    if not all((t.isfinite() & (t >= 0)).all() for t in (table.values, table.errors)) or not table.values.any():
        return "its values are not finite, negative or all zero"
    return ""
