"""Codings of a baseline, each of which makes files of a given size."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from common.choose import allocation
from common.choose.allocation import WIDTHS, BudgetError, fixed_formats
from common.choose.asymmetric import encode_in_turn, exact_inputs, round_in_turn
from common.choose.feedback import Feedback
from common.choose.fixed_rounding import FixedRounding
from common.choose.rounding import PRICE_OF_A_BIT, Rounding
from common.formats import entropy
from common.formats.numbers import along, fake_quantize, stored_bytes
from common.formats.packed import Model, Quantizer, file_bytes, full_precision, tensor_shapes
from common.study.output_bias import BYTES_OF_A_MAP, OutputBiasFit, affordable_maps

OFFSETS = 64  # bytes: what offsets in a header take more at most where the file is larger


class Allocator(Protocol):
    """One coding of a baseline."""

    def smallest(self, metadata: dict) -> int:
        """Bytes of the smallest file there is, whatever the Fisher values."""

    def fit(self, limit: int, values: dict[str, float], metadata: dict) -> Model:
        """The model of least Fisher-weighted error whose file has at most `limit` bytes. Raises BudgetError."""


@dataclass(frozen=True)
class EntropyCoding:
    """Steps by Fisher values, rounded by `feedback` at a `price` of a bit (in squared steps), entropy-coded; multiples
    of the step, from which finetuning can start, or the integers of a trellis; `by_rows`: a step for each output
    channel; `inputs`: what the network is called with where layers are rounded one after the other
    (`common.choose.asymmetric`); the output's bias taken off where `bias` is given."""

    baseline: Model
    feedback: dict[str, Feedback]
    price: float = PRICE_OF_A_BIT
    trellis: bool = False
    by_rows: bool = False
    inputs: tuple[torch.Tensor, ...] | None = None
    bias: OutputBiasFit | None = None

    def smallest(self, metadata: dict) -> int:
        zeros = {name: np.zeros(tuple(weight.shape), np.int64) for name, weight in self.baseline.state.items()}
        return file_bytes(coded_model(self.baseline, entropy.encode(zeros, dict.fromkeys(zeros, 1.0)), metadata))

    def fit(self, limit: int, values: dict[str, float], metadata: dict) -> Model:
        maps = affordable_maps(limit) if self.bias else 0
        spare = maps * BYTES_OF_A_MAP
        while maps:
            try:
                model = self.bias.correct(self._fit_weights(limit - spare, values, metadata), maps)
            except BudgetError:
                break
            if (excess := file_bytes(model) - limit) <= 0:
                return model
            spare += excess
        return self._fit_weights(limit, values, metadata)

    def _fit_weights(self, limit: int, values: dict[str, float], metadata: dict) -> Model:
        def size(stored) -> int:
            return file_bytes(coded_model(self.baseline, stored, metadata))

        ratios = self._row_ratios() if self.by_rows else {}
        left = {name: value * self._gain(name, ratios) for name, value in values.items()}
        stored = allocation.entropy_coded(
            self.baseline.state, left, size, limit, self.feedback, self.price, self.trellis, ratios
        )
        if self.inputs is not None:
            in_turn = allocation.fit_again(self._in_turn(stored), size, limit)
            if in_turn is None:
                tqdm.write(
                    f"{metadata['label']}: it did not fit layer after layer, so all are rounded for FP32's inputs"
                )
            stored = in_turn or stored
        return coded_model(self.baseline, stored, metadata)

    def _in_turn(self, stored: dict[str, torch.Tensor]) -> Callable[[float], dict[str, torch.Tensor]]:
        """encode(factor): layers rounded one after the other, with the steps of what is `stored` times a factor."""
        weights = self.baseline.state
        steps = entropy.steps_of(stored, {name: weight.shape for name, weight in weights.items()})
        network = self.baseline.network().to(self.inputs[0].device)
        exact = exact_inputs(network, self.inputs)
        how = Rounding(self.feedback, self.price, self.trellis)
        finest = {name: allocation.finest_step(float(weight.abs().max())) for name, weight in weights.items()}

        def encode(factor: float) -> dict[str, torch.Tensor]:
            changed = {name: np.maximum(step * factor, finest[name]) for name, step in steps.items()}
            return encode_in_turn(network, self.inputs, exact, weights, changed, how)

        return encode

    def _row_ratios(self) -> dict[str, np.ndarray]:
        """Of the tensors that have two dimensions or more: by the second moments of rows, where they are known."""
        ratios = {}
        for name, (shape, axis) in tensor_shapes(self.baseline.config).items():
            if len(shape) > 1:
                rows = shape[axis]
                of_rows = self.feedback[name].even_scales(rows) if name in self.feedback else np.ones(rows)
                ratios[name] = along(of_rows, axis, len(shape))
        return ratios

    def _gain(self, name: str, ratios: dict[str, np.ndarray]) -> float:
        """The share of a weight's error that is left once its neighbours have made good the rest."""
        if name not in self.feedback:
            return 1.0
        feedback = self.feedback[name]
        return (feedback.with_scales(ratios[name].ravel()) if name in ratios else feedback).gain


@dataclass(frozen=True)
class FixedWidths:
    """One format for each tensor, the best choice there is for its `rounding`; layers rounded one after the other where
    `inputs` are given, and the output's bias taken off where `bias` is."""

    baseline: Model
    rounding: FixedRounding = field(default_factory=FixedRounding)
    inputs: tuple[torch.Tensor, ...] | None = None
    bias: OutputBiasFit | None = None

    def smallest(self, metadata: dict) -> int:
        return file_bytes(in_formats(self.baseline, self._narrowest(), metadata))

    def fit(self, limit: int, values: dict[str, float], metadata: dict) -> Model:
        maps = affordable_maps(limit) if self.bias else 0
        spare = 0
        if maps:
            spare = self.bias.bytes_of(in_formats(self.baseline, self._narrowest(), metadata), maps) + OFFSETS
        try:
            formats = self._formats(limit - spare, values, metadata)
        except BudgetError:
            if not maps:
                raise
            maps, formats = 0, self._formats(limit, values, metadata)
        make = partial(in_formats, formats=formats, metadata=metadata, quantizer=self.rounding.quantize)
        model = make_in_turn(self.baseline, make, self.rounding, self.inputs)
        return self.bias.correct(model, maps, limit) if maps else model

    def _formats(self, limit: int, values: dict[str, float], metadata: dict) -> dict[str, str]:
        """Those of the least error in a file of so many bytes. Raises BudgetError."""
        shapes, axes = tensor_shapes(self.baseline.config), _axes(self.baseline)
        least = sum(stored_bytes(shapes[name][0], fmt, axes[name]) for name, fmt in self._narrowest().items())
        header = 0
        while True:  # until the header, whose length follows from the formats, fits too
            formats = fixed_formats(self.baseline.state, axes, values, max(least, limit - header), self._errors)
            there = file_bytes(in_formats(self.baseline, formats, metadata))  # however it is rounded
            excess = there - limit
            if excess <= 0:
                return formats
            if limit - header <= least:
                raise BudgetError(there)
            header += excess

    @cached_property
    def _errors(self) -> dict[str, dict[str, float]]:
        return allocation.format_errors(self.baseline.state, _axes(self.baseline), self.rounding)

    def _narrowest(self) -> dict[str, str]:
        """The format of fewest bytes of each tensor."""
        return {
            name: min(WIDTHS if len(shape) > 1 else WIDTHS[-2:], key=lambda fmt: stored_bytes(shape, fmt, axis))
            for name, (shape, axis) in tensor_shapes(self.baseline.config).items()
        }


def _axes(model: Model) -> dict[str, int]:
    """{tensor: its axis of output channels}"""
    return {name: axis for name, (_, axis) in tensor_shapes(model.config).items()}


def in_formats(baseline: Model, formats: dict[str, str], metadata: dict, quantizer: Quantizer | None = None) -> Model:
    """The baseline with each tensor in a format of its own, {name: format}."""
    model = replace(baseline, metadata=metadata)
    for fmt in set(formats.values()):
        model = model.quantize([name for name, chosen in formats.items() if chosen == fmt], fmt, metadata, quantizer)
    return model


def make_in_turn(
    baseline: Model,
    make: Callable[[Model], Model],
    rounding: FixedRounding,
    inputs: tuple[torch.Tensor, ...] | None,
) -> Model:
    """`make` of the baseline, each layer first replaced by the best one for the inputs that the layers before it leave,
    as they are made (`common.choose.asymmetric`). Without `inputs`, `make(baseline)`.

    make: gives each tensor its format, and integers by `rounding`. Layers whose format is a floating-point one are
    replaced too.
    """
    model = make(baseline)
    if inputs is None:
        return model
    best, axes = dict(baseline.state), _axes(baseline)

    @torch.inference_mode(False)  # whose tensors autograd would not take
    def settle(name: str, weight: torch.Tensor) -> torch.Tensor:
        best[name] = weight.float()
        fmt = model.formats[name]
        if fmt.startswith("int"):
            return rounding.quantize(name, best[name], fmt, axes[name]).dequantize()
        return fake_quantize(best[name], fmt, axes[name])

    exact, rounded = (of.network().to(inputs[0].device) for of in (baseline, model))
    round_in_turn(rounded, inputs, exact_inputs(exact, inputs), baseline.state, rounding.feedback, settle)
    return make(full_precision(baseline.config, best, baseline.metadata))


def coded_model(baseline: Model, stored: dict[str, torch.Tensor], metadata: dict) -> Model:
    """The model of what `common.formats.entropy` stores."""
    return Model(baseline.config, stored, dict.fromkeys(baseline.state, "entropy"), metadata)


def make_allocator(
    baseline: Model,
    coding: str,
    feedback: dict[str, Feedback],
    rounding: str = "nearest",
    bias: OutputBiasFit | None = None,
    inputs: tuple[torch.Tensor, ...] | None = None,
) -> Allocator:
    if coding == "entropy":
        return EntropyCoding(baseline, feedback, inputs=inputs, bias=bias)
    return FixedWidths(baseline, FixedRounding(rounding, feedback), inputs, bias)
