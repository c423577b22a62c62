"""The tensors of a baseline with their Fisher values: a table by layer, and one of every tensor."""

from pathlib import Path

import torch

from common.choose.layers import layer_of
from common.fisher.information import FisherTable
from common.formats.packed import Model


def tensors_file(folder: Path, baseline: str) -> Path:
    """Where the table of every tensor of the baseline of this hash is kept."""
    return folder / f"tensors-{baseline[:8]}.txt"


def format_layers(model: Model, table: FisherTable) -> str:
    """By layer: tensors, parameters, the mean Fisher value of an entry at timestep 1 and over the grid, and KiB."""
    grid = table.estimates("uniform")[0]
    lines = [f"{'layer':20}{'tensors':>8}{'parameters':>14}{'Fisher t=1':>14}{'mean over t':>14}{'KiB':>10}"]
    for layer in dict.fromkeys(map(layer_of, model.state)):
        names = [name for name in model.state if layer_of(name) == layer]
        entries = torch.tensor([model.state[name].numel() for name in names], dtype=torch.float64)
        columns = [table.names.index(name) for name in names]
        first, mean = ((values[columns].double() @ entries / entries.sum()) for values in (table.values[0], grid))
        size = sum(_kib(model, name) for name in names)
        lines.append(f"{layer:20}{len(names):>8}{int(entries.sum()):>14,}{first:>14.2e}{mean:>14.2e}{size:>10.1f}")
    parameters = sum(tensor.numel() for tensor in model.state.values())
    lines.append(f"{'total':20}{len(model.state):>8}{parameters:>14,}{'':28}{model.size_mib() * 1024:>10.1f}")
    return "\n".join(lines)


def format_tensors(model: Model, table: FisherTable) -> str:
    """Every tensor: shape, Fisher value at timestep 1 with its error, over the grid, format and KiB; then the total."""
    grid = table.estimates("uniform")[0]
    width = max(map(len, model.state)) + 2
    lines = [f"{'tensor':{width}}{'shape':>18}{'Fisher t=1':>24}{'mean over t':>13}{'format':>8}{'KiB':>10}"]
    for name, tensor in model.state.items():
        i = table.names.index(name)
        value = f"{table.values[0, i]:.3e} ± {table.errors[0, i]:.1e}"
        shape, size = "x".join(map(str, tensor.shape)), _kib(model, name)
        lines.append(f"{name:{width}}{shape:>18}{value:>24}{grid[i]:>13.3e}{model.formats[name]:>8}{size:>10.1f}")
    parameters = sum(tensor.numel() for tensor in model.state.values())
    lines.append(f"{'total':{width}}{f'{parameters:,}':>18}{'':24}{'':13}{'':8}{model.size_mib() * 1024:>10.1f}")
    return "\n".join(lines)


def _kib(model: Model, name: str) -> float:
    return sum(t.nbytes for key, t in model.stored.items() if key.partition(":")[0] == name) / 1024
