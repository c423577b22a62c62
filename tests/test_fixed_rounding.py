"""Integers of a fixed number of bits: scales against trying them all, feedback against what it is to lessen."""

import numpy as np
import pytest
import torch
from torch import nn

from common.choose.allocation import fixed_formats, format_errors
from common.choose.feedback import make_feedback, measure_feedback
from common.choose.fixed_rounding import FixedRounding
from common.errors import UserError
from common.formats.numbers import (
    SHRINKS,
    fake_quantize,
    largest_code,
    largest_weight_scale,
    least_error_scale,
    quantize_integer,
    stored_bytes,
)
from common.formats.packed import full_precision, load_model, save_model

INTEGERS = [f"int{bits}" for bits in range(2, 9)]
SHAPES = {"linear": ((6, 40), 0), "convolution": ((5, 4, 3, 3), 0), "transposed": ((4, 5, 3, 3), 1)}


def heavy_tailed(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, size=shape)).float()


def channel_errors(weight, quantized, axis):
    return (quantized.dequantize() - weight).double().square().transpose(0, axis).flatten(1).sum(1)


@pytest.mark.parametrize("fmt", INTEGERS)
@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
def test_least_error_scales_are_those_of_trying_each(shape, axis, fmt):
    weight, largest = heavy_tailed(shape), largest_code(fmt)
    scale = least_error_scale(weight, fmt, axis)
    found = channel_errors(weight, quantize_integer(weight, fmt, axis, scale), axis)
    plain = channel_errors(weight, quantize_integer(weight, fmt, axis), axis)
    assert (found <= plain).all()
    for channel, row in enumerate(weight.transpose(0, axis).flatten(1).numpy()):
        errors = []
        for shrink in (1.0, *SHRINKS):
            s = np.float32(np.float32(abs(row).max()) / largest * np.float32(shrink))
            codes = np.clip(np.rint(row / s), -largest, largest)
            errors.append(np.square(codes * np.float64(s) - row).sum())
        assert float(found[channel]) == pytest.approx(min(errors), rel=1e-4)
    if fmt in ("int2", "int3"):
        assert found.sum() < 0.8 * plain.sum()


def test_scales_of_zeros_and_of_what_is_not_finite():
    weight = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    assert torch.equal(least_error_scale(weight, "int8", 0)[:1], torch.ones(1))
    assert torch.equal(FixedRounding("least-error").quantize("w", weight, "int8", 0).dequantize()[0], torch.zeros(2))
    with pytest.raises(UserError, match="not finite"):
        least_error_scale(torch.tensor([[1.0, torch.nan]]), "int4", 0)


def test_the_nearest_rounding_is_the_published_one():
    weight = heavy_tailed((6, 40))
    quantized = FixedRounding().quantize("w", weight, "int4", 0)
    assert torch.equal(quantized.dequantize(), fake_quantize(weight, "int4"))
    assert torch.equal(quantized.scale, largest_weight_scale(weight, "int4", 0))


@pytest.mark.parametrize("fmt", ["int2", "int4", "int8"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
def test_feedback_of_inputs_that_do_not_meet_is_rounding_to_the_nearest(shape, axis, fmt):
    weight = heavy_tailed(shape)
    columns = weight.numel() // shape[axis]
    moment = torch.diag(torch.rand(columns, generator=torch.Generator().manual_seed(0)).double() + 0.1)
    feedback = {"w": make_feedback([(np.arange(columns), moment)], transposed=axis == 1)}
    expected = FixedRounding("least-error").quantize("w", weight, fmt, axis)
    for rounding in (FixedRounding("feedback", feedback), FixedRounding("feedback")):  # with it, and without any
        found = rounding.quantize("w", weight, fmt, axis)
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("fmt", ["int2", "int3", "int4", "int8"])
def test_feedback_on_a_grid_makes_better_outputs_and_keeps_to_the_range(fmt):
    torch.manual_seed(0)
    weight, x = heavy_tailed((40, 60)), (torch.randn(3000, 60) @ torch.randn(60, 60)).relu()
    feedback = {"w": make_feedback([(np.arange(60), x.T @ x)])}
    errors = []
    for method in ("nearest", "least-error", "feedback"):
        quantized = FixedRounding(method, feedback).quantize("w", weight, fmt, 0)
        assert quantized.codes.dtype == torch.int8 and quantized.codes.abs().max() <= largest_code(fmt)
        errors.append(float(((quantized.dequantize() - weight) @ x.T).square().mean()))
    assert errors[2] < 0.7 * errors[1] and errors[1] <= errors[0]


def test_what_is_cut_off_is_made_good_as_well():
    """Two columns that are nearly one: what the first lacks at the end of the range, the second takes over."""
    x = torch.tensor([1.05, 1.0]) + 0.01 * torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    feedback = make_feedback([(np.arange(2), (x.T @ x).double())])
    rows = np.array([[1.9, 0.0], [-1.9, 0.0], [0.0, 1.9]])  # the first column is rounded first
    codes = feedback.round(rows, largest=1)
    assert codes.tolist() == [[1, 1], [-1, -1], [0, 1]]
    assert feedback.round(rows).tolist() == [[2, 0], [-2, 0], [0, 2]]


def test_errors_of_formats_are_those_of_the_rounding():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(30, 20))
    x = torch.randn(200, 30) @ torch.randn(30, 30)
    feedback = measure_feedback(layer, lambda call, x: call(x).square().sum(1), (x,))
    weights, axes = {name: p.detach() for name, p in layer.named_parameters()}, {"0.weight": 0, "0.bias": 0}
    plain, least, fed = (format_errors(weights, axes, FixedRounding(m, feedback)) for m in (
        "nearest", "least-error", "feedback"
    ))  # fmt: skip
    assert (
        list(plain["0.bias"]) == ["fp16", "fp32"]
        and plain["0.bias"] == fed["0.bias"]
        and plain["0.weight"]["fp32"] == 0
    )
    assert plain["0.weight"]["int4"] == pytest.approx(
        float((fake_quantize(weights["0.weight"], "int4") - weights["0.weight"]).square().sum()), rel=1e-5
    )
    assert (
        least["0.weight"]["int2"] < plain["0.weight"]["int2"] and least["0.weight"]["fp16"] == plain["0.weight"]["fp16"]
    )
    assert 0 < feedback["0.weight"].gain < 0.9 and fed["0.weight"]["fp16"] == plain["0.weight"]["fp16"]
    assert fed["0.weight"]["int4"] == pytest.approx(feedback["0.weight"].gain * least["0.weight"]["int4"])
    limit = stored_bytes(weights["0.weight"].shape, "int8") + stored_bytes(weights["0.bias"].shape, "fp16")
    assert fixed_formats(weights, axes, {"0.weight": 1.0, "0.bias": 1e-9}, limit, fed) == {
        "0.weight": "int8",
        "0.bias": "fp16",
    }


@pytest.mark.parametrize("method", ["least-error", "feedback"])
def test_files_are_those_of_nearest_rounding_and_read_back(tiny_network, method, tmp_path):
    """Same tensors, same types and sizes: readers of version 1 need not know how codes were chosen."""
    model = full_precision(tiny_network.config, tiny_network.state_dict(), {"label": "Baseline (FP32)"})
    names = [name for name in model.state if name.startswith("layer")]
    name = "layer5.resample.weight"
    shape = model.state[name].shape
    columns = shape[0] * shape[2] * shape[3]
    factor = torch.randn(columns, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    feedback = {name: make_feedback([(np.arange(columns), factor @ factor.T)], transposed=True)}
    rounding = FixedRounding(method, feedback)
    plain, other = model.quantize(names, "int3", {}), model.quantize(names, "int3", {}, rounding.quantize)
    save_model(tmp_path / "model", other)
    assert load_model(tmp_path / "model").sha256 == other.sha256 != plain.sha256
    assert {key: (t.dtype, t.shape) for key, t in other.stored.items()} == {
        key: (t.dtype, t.shape) for key, t in plain.stored.items()
    }
    expected = rounding.quantize(name, model.state[name], "int3", 1).dequantize()
    assert torch.equal(other.state[name], expected)
