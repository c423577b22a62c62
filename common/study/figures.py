"""The figures of a results folder."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from common.choose.layers import by_layer, layer_weights
from common.ddpm.sampling import load_images
from common.errors import UserError
from common.fisher import information
from common.formats.packed import Model, load_model
from common.options import DIGITS
from common.runtime.files import write_atomically
from common.runtime.sealed import CheckpointError
from common.study.frontier import draw_fid_against_ratio, draw_fid_against_size, draw_learning_curve, draw_waterfall
from common.study.increases import FILE
from common.study.predictions import draw_sensitivity
from common.study.rows import BASELINE, Row
from common.study.strips import draw_strips

SHOWN_IMAGES = 12
GROUPS = {"layers 1-2": "12", "layers 3-6": "3456"}


def draw_all(folder: Path, groups: list[list[Row]], only: str = "") -> list[Path]:
    """Draws what the rows and files of `folder` allow, of the figures whose names begin with `only`, and writes them
    where all could be drawn; returns their paths. Raises UserError."""
    drawn = {}

    def keep(name: str, draw: Callable, *arguments) -> None:
        figure = draw(*arguments) if name.startswith(only) else None
        if figure is not None:
            picture = io.BytesIO()
            figure.savefig(picture, dpi=110, bbox_inches="tight")
            plt.close(figure)
            drawn[folder / "figures" / f"{name}.png"] = picture.getvalue()

    for number, rows in enumerate(groups, start=1):
        suffix = f"-{number}" if len(groups) > 1 else ""
        keep(f"samples{suffix}", draw_samples, rows)
        keep(f"fid-size{suffix}", draw_fid_against_size, rows)
        keep(f"waterfall{suffix}", draw_waterfall, rows)
        keep(f"fid-ratio{suffix}", draw_fid_against_ratio, rows)
        keep(f"learning-curve{suffix}", draw_learning_curve, rows)
    for path in sorted(
        {row.file for rows in groups for row in rows if row.strategy == BASELINE and row.file and row.digits_seen}
    ):
        if not Path(path).exists():
            continue
        model = load_model(path)
        name = Path(path).stem
        keep(f"weights-{name}", draw_weights, model)
        keep(f"loss-{name}", draw_loss, model)
        table = folder / f"fisher-{model.sha256[:12]}.safetensors"
        if not table.exists():
            continue
        try:
            values = information.load(table, model.sha256)
        except CheckpointError as error:  # of an earlier version, say
            print(f"{error}; its figures are left out")
            continue
        keep(f"fisher-tensors-{name}", draw_fisher_by_tensor, values)
        keep(f"fisher-groups-{name}", draw_fisher_by_group, values)
    keep("sensitivity", draw_sensitivity, folder / FILE)
    for path in drawn:
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"{path}: is not a file, and a figure has to be written there; move it away")
    for path, picture in drawn.items():
        write_atomically(path, picture)
    return list(drawn)


def draw_samples(rows: list[Row]):
    """The first images of each model; one column, one noise. Digits that are others than the baseline's are framed."""
    there = [row for row in rows if row.image_file and Path(row.image_file).is_file()]
    originals = [i for i, row in enumerate(there) if row.weights == row.settings.baseline]
    compared = originals[0] if originals and there[0].settings.data in DIGITS else None
    strips = [(row.label, load_images(Path(row.image_file))[:SHOWN_IMAGES]) for row in there]
    return draw_strips(strips, compared) if strips else None


def draw_fisher_by_tensor(table: information.FisherTable):
    """Fisher value of each weight tensor of each layer, one line per timestep, log scale."""
    layers = by_layer(dict.fromkeys(layer_weights(table.names), 0.0))
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), sharey=True)
    colours = plt.get_cmap("viridis")
    order = np.argsort(table.timesteps)
    for axis, (layer, names) in zip(axes.flat, layers.items(), strict=True):
        columns = [table.names.index(name) for name in names]
        for place, i in enumerate(order):
            axis.plot(table.values[i, columns], color=colours(place / (len(order) - 1)), marker=".", linewidth=1)
        axis.set_xticks(range(len(names)))
        short = [name.removeprefix(f"{layer}.").removesuffix(".weight") for name in names]
        axis.set_xticklabels(short, rotation=60, ha="right", fontsize=7)
        axis.set(yscale="log", title=layer)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("Fisher value")
    figure.tight_layout()
    scale = plt.cm.ScalarMappable(plt.Normalize(min(table.timesteps), max(table.timesteps)), colours)
    figure.colorbar(scale, ax=axes, label="timestep (0: finished image)")
    return figure


def draw_fisher_by_group(table: information.FisherTable):
    """Mean and median Fisher value of the weights of layers 1-2 and 3-6 over timesteps, log scale."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    order = np.argsort(table.timesteps)
    timesteps = np.array(table.timesteps)[order]
    names = layer_weights(table.names)
    for colour, (label, layers) in enumerate(GROUPS.items()):
        columns = [table.names.index(name) for name in names if name[len("layer")] in layers]
        values = table.values[order][:, columns]
        error = table.errors[order][:, columns].mean(1)  # at most: all tensors saw the same digits
        axis.errorbar(timesteps, values.mean(1), error, fmt="o-", color=f"C{colour}", capsize=2, label=f"{label}, mean")
        axis.plot(timesteps, values.median(1).values, "s--", color=f"C{colour}", label=f"{label}, median", markersize=4)
    axis.set(yscale="log", xlabel="timestep (0: finished image)", ylabel="Fisher value")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def draw_weights(model: Model):
    """Histograms of the convolution and projection weights of each layer."""
    layers = by_layer({n: 0.0 for n in layer_weights(model.state) if model.state[n].dim() > 1})
    figure, axes = plt.subplots(2, 3, figsize=(12, 6))
    for axis, (layer, names) in zip(axes.flat, layers.items(), strict=True):
        values = torch.cat([model.state[name].flatten() for name in names]).numpy()
        axis.hist(values, bins=200, log=True)
        axis.set_title(f"{layer}: {len(values):,} weights, std {values.std():.3f}", fontsize=9)
        axis.set(xlabel="weight", ylabel="count")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def draw_loss(model: Model):
    """The training loss, averaged over a few steps."""
    curve, training = model.metadata.get("loss_curve"), model.metadata["training"]
    if not curve:
        return None
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(np.linspace(0, training["steps"], len(curve)), curve)
    axis.set(
        yscale="log", xlabel=f"step of {training['batch_size']} digits", ylabel="loss (mean squared error of the noise)"
    )
    axis.grid(alpha=0.3, which="both")
    return figure
