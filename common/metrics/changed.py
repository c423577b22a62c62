"""Which digits quantization turned into others, as the digit classifier reads them."""

import math

import torch

from common.metrics.features import load_features
from common.metrics.scores import extract

SURE = 0.9  # the probability from which a digit counts as read


def changed_digits(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """The places at which the classifier is sure of both images, uint8 (N, 32, 32), and reads another digit."""
    classifier = load_features("mnist", torch.device("cpu"))
    (_, read), (_, read_after) = (extract(images, classifier) for images in (before, after))
    sure = (read.max(1) >= SURE) & (read_after.max(1) >= SURE)
    return (sure & (read.argmax(1) != read_after.argmax(1))).nonzero()[0].tolist()


def share_changed(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """The share of the N images at those places, and its standard error: a binomial's, of one more that changed and one
    more that did not, since none of N does not say that none ever would."""
    changed, n = len(changed_digits(before, after)), len(before)
    likely = (changed + 1) / (n + 2)
    return changed / n, math.sqrt(likely * (1 - likely) / n)
