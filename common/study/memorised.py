"""Whether the baseline copies the digits that it was trained on: figures of its row and of that of the real digits."""

from dataclasses import replace
from pathlib import Path

from common.study.rows import BASELINE, REAL, Figure, Row


def compared_with_training(rows: list[Row], training, held_out, device) -> list[Row]:
    """The rows, those of the baseline and of the real digits with what `common.metrics.memorised` says of the
    baseline's images and of `held_out` digits; both, and `training`: uint8 (N, 32, 32)."""
    import torch

    from common.ddpm.sampling import load_images
    from common.metrics.memorised import excess_of_training, median_and_error, nearest

    def median(images: torch.Tensor) -> Figure:
        return Figure(*median_and_error(nearest(images, training, device)[0]))

    compared = []
    for row in rows:
        if row.strategy == REAL:
            row = replace(row, nearest_training_digit=median(held_out))
        if row.strategy == BASELINE:
            images, digits = load_images(Path(row.image_file)), torch.cat([training, held_out])
            excess = excess_of_training(nearest(images, digits, device)[1], len(training), len(digits))
            row = replace(row, nearest_training_digit=median(images), training_digit_excess=Figure(*excess))
        compared.append(row)
    return compared


def format_nearest(rows: list[Row]) -> str:
    """What rows of the same settings say of copies, in lines below their table; empty where they say nothing."""
    said = {row.strategy: row for row in rows if row.nearest_training_digit}
    if BASELINE not in said:
        return ""
    medians = [f"generated {said[BASELINE].nearest_training_digit.text(2)}"]
    if REAL in said:
        medians.append(f"held-out {said[REAL].nearest_training_digit.text(2)}")
    lines = [
        f"\nMedian distance to the nearest training digit: {', '.join(medians)}. A copy would be at 0. Being nearer "
        "than held-out digits is no proof of copying: smooth or typical digits are nearer to all others, seen or not."
    ]
    if excess := said[BASELINE].training_digit_excess:
        lines.append(
            "Of training and held-out digits together, the nearest to a generated one is a training digit more often "
            f"than their numbers say, by {excess.text(1, 100)} percentage points. More than two errors: the network "
            "leans towards the digits that it was trained on, whether it copies them or not."
        )
    return "\n".join(lines)
