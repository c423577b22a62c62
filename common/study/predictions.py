"""The figure of what was predicted of quantizing each tensor, against what was measured."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from common.errors import UserError
from common.study.increases import Increases, read_increases


def draw_sensitivity(path: Path):
    """The figure of a sensitivity.jsonl; None where there is none, or it is of an earlier version or damaged, which is
    said in a line."""
    if not path.exists():
        return None
    try:
        _, measured = read_increases(path)
    except UserError as error:
        print(f"{error}; its figure is left out")
        return None
    return draw_predictions(measured) if measured[0].gauss_newton else None


def draw_predictions(measured: list[Increases]):
    """Measured against predicted increases of the loss, one point for each tensor and format and a star for all tensors
    together; one panel for each prediction. Increases that are zero or negative have no logarithm and are left out."""
    hows = list(measured[0].predicted())
    figure, axes = plt.subplots(1, len(hows), figsize=(12, 5), sharey=True)
    for axis, how in zip(axes, hows, strict=True):
        for colour, m in enumerate(measured):
            predicted, increase, error = m.predicted()[how], np.array(m.mean), np.array(m.error)
            shown = (predicted > 0) & (increase > 0)
            bars = np.minimum(error[shown], 0.999 * increase[shown]), error[shown]  # the lower end stays on the axis
            style = {"color": f"C{colour}", "linestyle": "none"}
            label = f"{m.format}: {shown.sum()} of {len(shown)} tensors"
            axis.errorbar(predicted[shown], increase[shown], bars, marker="o", ms=4, alpha=0.6, label=label, **style)
            if m.together[0] > 0 and predicted.sum() > 0:
                axis.plot(
                    predicted.sum(),
                    m.together[0],
                    marker="*",
                    ms=16,
                    mec="black",
                    label=f"{m.format}: together",
                    **style,
                )
        axis.axline((1e-6, 1e-6), (1e-3, 1e-3), color="0.5", linewidth=1, label="as predicted")
        axis.set(xscale="log", yscale="log", xlabel=f"predicted increase of the loss: {how}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set(ylabel="measured increase of the loss")
    figure.suptitle(
        "One point for each tensor quantized alone, with 1 standard error, where the loss increased", fontsize=9
    )
    lowest = min((x for m in measured for x in m.mean if x > 0), default=1e-9)
    axes[0].set_ylim(bottom=lowest / 2)  # long error bars of small increases would reach far below
    return figure
