"""Integers of a fixed number of bits: which of them stand for a weight."""

from dataclasses import dataclass, field

import numpy as np
import torch

from common.choose.feedback import Feedback
from common.formats.numbers import (
    IntegerTensor,
    along,
    fake_quantize,
    largest_code,
    least_error_scale,
    quantize_integer,
)


@dataclass(frozen=True)
class FixedRounding:
    """One of `presets.ROUNDINGS`; `feedback` of the weights that are rounded by it, where the method is "feedback"."""

    method: str = "nearest"
    feedback: dict[str, Feedback] = field(default_factory=dict)

    def quantize(self, name: str, weight: torch.Tensor, fmt: str, axis: int) -> IntegerTensor:
        """The integers and scales of a weight. Raises UserError where it is not finite."""
        if self.method == "nearest":
            return quantize_integer(weight, fmt, axis)
        scale = least_error_scale(weight, fmt, axis)
        if self.method == "feedback" and name in self.feedback:
            return _with_feedback(weight, scale, fmt, axis, self.feedback[name])
        return quantize_integer(weight, fmt, axis, scale)

    def error(self, name: str, weight: torch.Tensor, fmt: str, axis: int) -> float:
        """The squared error of a weight in any format, summed over its entries; with feedback the part that its
        neighbours do not make good."""
        weight = weight.float()
        if not fmt.startswith("int"):
            return _squared(fake_quantize(weight, fmt, axis) - weight)
        scale = None if self.method == "nearest" else least_error_scale(weight, fmt, axis)
        left = self.feedback[name].gain if self.method == "feedback" and name in self.feedback else 1.0
        return left * _squared(quantize_integer(weight, fmt, axis, scale).dequantize() - weight)


def _with_feedback(weight: torch.Tensor, scale: torch.Tensor, fmt: str, axis: int, feedback: Feedback) -> IntegerTensor:
    """Codes on the grid of these scales, each output channel's own: what is a row to feedback is a channel here."""
    scaled = weight.detach().cpu().double() / along(scale.cpu(), axis, weight.dim()).double()
    rows = feedback.rows(scaled).numpy()
    codes = feedback.with_scales(scale.cpu().double().numpy().ravel()).round(rows, largest=largest_code(fmt))
    codes = np.ascontiguousarray(feedback.weight(codes, weight.shape).astype(np.int8))
    return IntegerTensor(torch.from_numpy(codes), scale.cpu(), axis)


def _squared(error: torch.Tensor) -> float:
    return float(error.double().square().sum())
