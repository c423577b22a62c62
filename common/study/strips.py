"""Strips of images: a line for each model, each column from the same noise."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle

from common.metrics.changed import changed_digits


def as_picture(image: torch.Tensor) -> np.ndarray:
    """An image (H, W) or (C, H, W), as matplotlib and Pillow take it."""
    return (image if image.dim() == 2 else image.permute(1, 2, 0)).numpy()


def draw_strips(strips: list[tuple[str, torch.Tensor]], original: int | None = None):
    """A line of N images, uint8 (N, H, W) or (N, C, H, W), for each label.

    original: the place of the line of 32x32 digits with which those below are compared; a digit that became another one
    is framed.
    """
    lines, columns = len(strips), len(strips[0][1])
    figure, axes = plt.subplots(lines, 1, figsize=(0.75 * columns, 0.8 * lines), squeeze=False)
    framed = False
    for line, (axis, (label, images)) in enumerate(zip(axes[:, 0], strips, strict=True)):
        axis.imshow(as_picture(torch.cat(list(images), dim=-1)), cmap="gray", vmin=0, vmax=255)
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
        height, width = images.shape[-2:]
        for i in changed_digits(strips[original][1], images) if original is not None and line > original else []:
            axis.add_patch(Rectangle((i * width, 0), width - 1, height - 1, fill=False, edgecolor="red", linewidth=2))
            framed = True
    below = f"From {strips[original][0]} down, each" if original else "Each"
    said = f"{below} column starts from the same noise" + ("; framed: a digit that became another" if framed else "")
    axes[0, 0].set_title(said, fontsize=9)
    return figure
