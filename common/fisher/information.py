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

WORDS = {"fisher": "Fisher", "gauss-newton": "Gauss-Newton"}  # what values of each kind are called
NOTHING_REACHED = "the loss depends on none of these weights; train the network, or another, first"


def fisher_information(
    network: nn.Module, loss: SampleLoss, samples: tuple[torch.Tensor, ...], chunk: int = 16, on_chunk=lambda n: None
) -> tuple[dict[str, float], dict[str, float]]:
    """Per parameter: the mean over entries and samples of the squared gradient, and its standard error over samples.

    This is the diagonal of the empirical Fisher information, averaged over the entries of a tensor. Times the squared
    errors of weights it ranks tensors; it is not by how much a squared loss grows: see `common.fisher.gauss_newton`.
    Values and errors are those of `sample_values`.
    """
    mean, error = _mean_and_error(sample_values(network, loss, samples, chunk, on_chunk))
    names = [name for name, _ in network.named_parameters()]
    return dict(zip(names, mean.tolist(), strict=True)), dict(zip(names, error.tolist(), strict=True))


def sample_values(
    network: nn.Module, loss: SampleLoss, samples: tuple[torch.Tensor, ...], chunk: int = 16, on_chunk=lambda n: None
) -> torch.Tensor:
    """(N, parameters), float64, on the CPU: each sample's mean over a parameter's entries of the squared gradient.

    The network's mode is left alone: put it in evaluation mode first. Gradients take memory for `chunk` samples,
    whatever their number. Several processes share the chunks.
    """
    starts = range(0, len(samples[0]), chunk)
    values = []  # (chunk, parameters) of each chunk
    for start in distributed.shard(starts):
        batch = tuple(s[start : start + chunk] for s in samples)
        values.append(torch.stack([v.double() for v in squared_gradients(network, loss, batch).values()], dim=1).cpu())
        on_chunk(len(batch[0]))
    return torch.cat(distributed.gather(values, len(starts)))


def _mean_and_error(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(parameters,) each: the mean over samples and its standard error, of (N, parameters)."""
    return values.mean(0), (values.var(0, correction=0) / max(1, len(values) - 1)).sqrt()


@dataclass(frozen=True)
class FisherTable:
    """Fisher values of one network's parameters over timesteps: first one that stands alone, then a grid.

    values, errors: float64 (timesteps, parameters), not normalised; covariance: float64 (parameters, T, T), that of the
    values at the T timesteps of the grid, which saw the same samples; `weights`: the hash of the weights they belong
    to; `image_weights` (T,): how much each timestep of the grid weighs in the finished image; kind: "fisher", or
    "gauss-newton" where values are those of `common.fisher.gauss_newton`.
    """

    names: list[str]
    timesteps: list[int]
    values: torch.Tensor
    errors: torch.Tensor
    covariance: torch.Tensor
    samples: list[int]
    settings: dict
    weights: str
    image_weights: list[float]
    kind: str = "fisher"

    def estimates(self, weighting: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(parameters,) values and standard errors: at the "first" timestep, or their mean over the grid, whose
        timesteps weigh alike ("uniform") or by `image_weights` ("image")."""
        if weighting == "first":
            return self.values[0], self.errors[0]
        weights = {"uniform": [1.0] * len(self.image_weights), "image": self.image_weights}[weighting]
        weights = torch.tensor(weights, dtype=torch.float64)
        weights /= weights.sum()
        return weights @ self.values[1:], (self.covariance @ weights @ weights).clamp(min=0).sqrt()

    def at(self, weighting: str, names: list[str]) -> dict[str, float]:
        """The `estimates` of `names`, divided by the largest of them. Raises UserError where all are zero."""
        values, _ = self.estimates(weighting)
        chosen = {name: float(values[self.names.index(name)]) for name in names}
        largest = max(chosen.values())
        if not largest > 0:
            raise UserError(f"all {WORDS[self.kind]} values are zero (timesteps: {weighting}): {NOTHING_REACHED}")
        return {name: value / largest for name, value in chosen.items()}


def measure(
    network: nn.Module,
    loss: SampleLoss,
    batches: list[tuple[int, tuple[torch.Tensor, ...]]],
    weights: str,
    settings: dict,
    image_weights: list[float],
    kind: str = "fisher",
) -> FisherTable:
    """The mean squared gradient of `loss` at each timestep of `batches`, (timestep, samples); shows a progress bar.

    The first stands alone; the others are the grid, and hold as many samples each: sample n of all is of one digit. Of
    a network of few timesteps one may come more than once.
    Raises UserError where a value is not finite or all are zero.
    """
    names = [name for name, _ in network.named_parameters()]
    values, errors, of_grid = [], [], []
    everyone = distributed.processes()
    with tqdm(total=sum(len(samples[0]) for _, samples in batches), desc=WORDS[kind], unit="image") as bar:
        for _, samples in batches:
            found = sample_values(network, loss, samples, on_chunk=lambda n: bar.update(n * everyone))
            mean, error = _mean_and_error(found)
            for name, finite in zip(names, (mean.isfinite() & error.isfinite()).tolist(), strict=True):
                if not finite:
                    raise UserError(
                        f"the {WORDS[kind]} value of {name} is not finite: the network's weights or its loss are too "
                        "large; train it anew"
                    )
            of_grid += [found] if values else []
            values.append(mean)
            errors.append(error)
    values, errors = torch.stack(values), torch.stack(errors)
    if not values.any():
        raise UserError(f"all {WORDS[kind]} values are zero: {NOTHING_REACHED}")
    counts = [len(samples[0]) for _, samples in batches]
    covariance = covariance_of_means(torch.stack(of_grid))
    timesteps = [t for t, _ in batches]
    return FisherTable(names, timesteps, values, errors, covariance, counts, settings, weights, image_weights, kind)


def covariance_of_means(values: torch.Tensor) -> torch.Tensor:
    """(parameters, T, T): the covariance, over samples, of the means of `values` (T, N, parameters); zero for N = 1."""
    centred = (values - values.mean(1, keepdim=True)).permute(2, 0, 1)  # (parameters, T, N)
    n = values.shape[1]
    return centred @ centred.mT / (n * max(1, n - 1))


def save(path: Path, table: FisherTable) -> None:
    """Writes the table as a sealed file."""
    metadata = {k: v for k, v in asdict(table).items() if k not in ("values", "errors", "covariance", "kind")}
    tensors = {"values": table.values, "errors": table.errors, "covariance": table.covariance}
    sealed.save(path, table.kind, tensors, metadata)


def load(path: Path, weights: str, kind: str = "fisher") -> FisherTable:
    """Reads a table. Raises CheckpointError where it is damaged, of another kind or version, UserError where it belongs
    to other weights than those of hash `weights`."""
    table, cube = (torch.float64, (None, None)), (torch.float64, (None, None, None))
    lists = dict.fromkeys(("names", "timesteps", "samples", "image_weights"), list)
    tensors, metadata = sealed.require(
        path,
        sealed.load(path, kind),
        {"values": table, "errors": table, "covariance": cube},
        lists | {"settings": dict, "weights": str},
    )
    table = FisherTable(**tensors, **metadata, kind=kind)
    if table.weights != weights:
        raise UserError(
            f"{path} holds the {WORDS[kind]} values of other weights ({table.weights[:12]!r}, not {weights[:12]}); "
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
    if table.covariance.shape != (len(table.names), rows - 1, rows - 1):
        return "its covariance is not that of each name and its grid"
    variances = table.covariance.diagonal(dim1=1, dim2=2)
    if not table.covariance.isfinite().all() or not (variances >= 0).all():
        return "its covariance is not finite, or its variances are negative"
    if not all((t.isfinite() & (t >= 0)).all() for t in (table.values, table.errors)) or not table.values.any():
        return "its values are not finite, negative or all zero"
    return ""
