"""Formats by hand, against torch's own quantizer, and packed bytes against fake-quantization bit for bit."""

import math

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.formats.numbers import (
    bits,
    channel_axes,
    fake_quantize,
    pack,
    pack_codes,
    quantize_integer,
    stored_bytes,
    stored_format,
    unpack,
    unpack_codes,
)
from common.presets import FORMATS

INTEGERS = [fmt for fmt in FORMATS if fmt.startswith("int")]
# Numbers of entries that are no multiple of eight, so that streams end inside a byte.
SHAPES = [(1, 1), (3, 5), (5, 3, 3, 3), (7, 2, 4, 4), (13, 1, 1, 1)]


def weights(shape, seed=0):
    """Channels of very different size along both axes."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    for axis in (0, 1):
        size = torch.logspace(-2, 1, shape[axis])
        w = w * size.view([-1 if i == axis else 1 for i in range(len(shape))])
    return w


def equal_bits(a, b):
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_unpacked_is_fake_quantized_bit_for_bit(fmt, shape, axis):
    w = weights(shape)
    w.select(axis, shape[axis] // 2).zero_()  # one channel of zeros
    for weight in (w, w.transpose(0, 1).contiguous().transpose(0, 1)):  # and another memory layout
        stored = pack(weight, fmt, axis)
        assert equal_bits(unpack(stored, fmt, weight.shape, axis), fake_quantize(weight, fmt, axis))
        assert sum(t.nbytes for t in stored.values()) == stored_bytes(weight.shape, fmt, axis)


def test_int4_by_hand():
    """Scales 1 and 1/2; halves go to even; two codes to a byte, two's complement, high bits first."""
    w = torch.tensor([[7.0, -3.5, 1.4, 0.5], [-3.5, 0.25, 1.0, -0.5]])
    quantized = quantize_integer(w, "int4", axis=0)
    assert quantized.scale.tolist() == [1.0, 0.5]
    assert quantized.codes.tolist() == [[7, -4, 1, 0], [-7, 0, 2, -1]]
    assert fake_quantize(w, "int4").tolist() == [[7.0, -4.0, 1.0, 0.0], [-3.5, 0.0, 1.0, -0.5]]
    stored = pack(w, "int4")
    assert stored[""].dtype == torch.uint8
    assert stored[""].tolist() == [0x7C, 0x10, 0x90, 0x2F]
    assert stored["scale"].tolist() == [1.0, 0.5]


def test_int2_by_hand_along_axis_1():
    w = torch.tensor([[4.0, 0.1], [-1.0, -0.06], [2.5, 0.01]])
    assert fake_quantize(w, "int2", axis=1).tolist() == [
        [4.0, pytest.approx(0.1)],
        [0.0, pytest.approx(-0.1)],
        [4.0, 0.0],
    ]
    assert pack(w, "int2", axis=1)[""].tolist() == [0b01_01_00_11, 0b01_00_0000]


def test_int3_stream_by_hand():
    codes = torch.tensor([3, -3, 1, -1, 0], dtype=torch.int8)
    assert pack_codes(codes, 3).tolist() == [0b011_101_00, 0b1_111_000_0]


@pytest.mark.parametrize("fmt", INTEGERS)
def test_every_code_survives_packing(fmt):
    largest = 2 ** (bits(fmt) - 1) - 1
    codes = torch.arange(-largest, largest + 1, dtype=torch.int8)
    for count in range(1, 18):
        many = codes.repeat(math.ceil(count / len(codes)))[:count]
        stream = pack_codes(many, bits(fmt))
        assert stream.numel() == math.ceil(count * bits(fmt) / 8)
        assert torch.equal(unpack_codes(stream, bits(fmt), many.shape), many)
    stream = pack_codes(codes, bits(fmt))
    assert torch.equal(unpack_codes(stream, bits(fmt), codes.shape), codes)


@pytest.mark.parametrize(
    ("fmt", "expected"),
    zip(FORMATS, [4000, 2000, 1000, 875, 750, 625, 500, 375, 250], strict=True),
)
def test_bytes_of_a_thousand_numbers(fmt, expected):
    w = weights((10, 100))
    scales = 40 if fmt in INTEGERS else 0
    assert pack(w, fmt)[""].nbytes == expected
    assert stored_bytes(w.shape, fmt) == expected + scales


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("fmt", INTEGERS)
def test_every_width_is_that_of_torch(fmt, axis):
    w, largest = weights((6, 9, 3, 3)), 2 ** (bits(fmt) - 1) - 1
    scales = w.abs().amax([i for i in range(4) if i != axis]) / largest
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    assert torch.equal(quantize_integer(w, fmt, axis).scale, scales)
    expected = torch.fake_quantize_per_channel_affine(w, scales, zeros, axis, -largest, largest)
    assert torch.equal(fake_quantize(w, fmt, axis), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("fmt", INTEGERS)
def test_no_weight_moves_by_more_than_half_a_step(fmt, axis):
    w = weights((6, 8, 3, 3))
    scale = quantize_integer(w, fmt, axis).scale
    steps = scale.view([-1 if i == axis else 1 for i in range(4)])
    error = (w - fake_quantize(w, fmt, axis)).abs()
    assert (error <= steps / 2 * (1 + 1e-5)).all()
    assert (error / steps).max() > 0.45  # the bound is nearly reached: the steps are no finer than they claim
    largest = 2 ** (bits(fmt) - 1) - 1
    assert torch.allclose(scale * largest, w.abs().amax([i for i in range(4) if i != axis]))


@pytest.mark.parametrize("axis", [0, 1])
def test_channels_do_not_touch_each_other(axis):
    w = weights((4, 4, 3, 3))
    before = fake_quantize(w, "int4", axis)
    w.select(axis, 2).mul_(1000)
    after = fake_quantize(w, "int4", axis)
    others = [0, 1, 3]
    assert torch.equal(after.index_select(axis, torch.tensor(others)), before.index_select(axis, torch.tensor(others)))


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantizing_twice_is_quantizing_once(fmt):
    once = fake_quantize(weights((5, 7)), fmt)
    assert torch.allclose(fake_quantize(once, fmt), once, rtol=1e-6, atol=0)


def test_zeros_stay_zeros():
    zeros = torch.zeros(3, 5)
    for fmt in FORMATS:
        assert equal_bits(fake_quantize(zeros, fmt), zeros)
    quantized = quantize_integer(torch.tensor([[0.0, 0.0], [127.0, 1.0]]), "int8", axis=0)
    assert quantized.scale.tolist() == [1.0, 1.0]  # not zero: 0 / 0 has no integer on every machine
    assert quantized.codes.tolist() == [[0, 0], [127, 1]]


def test_fp16_is_half_precision():
    w = weights((50, 50))
    assert pack(w, "fp16")[""].dtype == torch.float16
    assert torch.equal(fake_quantize(w, "fp16"), w.half().float())
    assert not torch.equal(fake_quantize(w, "fp16"), w)
    assert torch.equal(fake_quantize(w, "fp32"), w)


def test_the_input_is_left_alone():
    w = weights((5, 7))
    kept = w.clone()
    for fmt in FORMATS:
        fake_quantize(w, fmt).add_(1)
        assert torch.equal(w, kept), fmt


def test_fp16_takes_its_largest_number_and_refuses_more():
    assert fake_quantize(torch.tensor([-65504.0, 1.0]), "fp16").tolist() == [-65504.0, 1.0]
    for value in (65536.0, -1e30, math.inf, math.nan):
        with pytest.raises(UserError, match="does not fit fp16"):
            fake_quantize(torch.tensor([1.0, value]), "fp16")
        with pytest.raises(UserError, match="does not fit fp16"):
            pack(torch.tensor([1.0, value]), "fp16")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("fmt", INTEGERS)
def test_no_integer_stands_for_what_is_not_finite(fmt, value):
    for make in (pack, fake_quantize):
        with pytest.raises(UserError, match=f"not finite: no {fmt}"):
            make(torch.tensor([[1.0, value], [1.0, 2.0]]), fmt)
    with pytest.raises(UserError, match=f"not finite: no {fmt}"):
        quantize_integer(torch.tensor([[1.0, value]]), fmt, 0, torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_of_other_types_are_packed_as_their_float32_values(fmt, dtype):
    w = weights((5, 3, 3, 3)).to(dtype)
    expected, stored = pack(w.float(), fmt), pack(w, fmt)
    assert stored.keys() == expected.keys()
    assert all(stored[p].dtype == expected[p].dtype and torch.equal(stored[p], expected[p]) for p in expected)
    assert equal_bits(unpack(stored, fmt, w.shape), fake_quantize(w.float(), fmt))
    assert equal_bits(fake_quantize(w, fmt), fake_quantize(w.float(), fmt))


def test_codes_of_any_type_are_packed_as_integers():
    codes = torch.tensor([3, -3, 1, -1, 0])
    for dtype in (torch.bfloat16, torch.int64):
        assert pack_codes(codes.to(dtype), 3).tolist() == [0b011_101_00, 0b1_111_000_0]


def test_one_dimension_never_goes_below_fp16():
    for fmt in INTEGERS:
        assert stored_format(fmt, torch.Size([64])) == "fp16"
        assert stored_format(fmt, torch.Size([64, 1])) == fmt
    for fmt in ("fp32", "fp16"):
        assert stored_format(fmt, torch.Size([64])) == fmt


@pytest.mark.parametrize("fmt", ["int1", "int9", "int16", "fp8", "bf16", "float", ""])
def test_unknown_formats_are_refused(fmt):
    with pytest.raises(ValueError, match="unknown format"):
        bits(fmt)
    with pytest.raises(ValueError, match="unknown format"):
        fake_quantize(torch.ones(2, 2), fmt)
    with pytest.raises(ValueError, match="unknown format"):
        pack(torch.ones(2, 2), fmt)
    with pytest.raises(ValueError, match="unknown format"):
        stored_bytes(torch.Size([2, 2]), fmt)


def test_output_channels_are_axis_1_of_transposed_convolutions_alone(tiny_network):
    axes = channel_axes(tiny_network)
    assert axes.keys() == dict(tiny_network.named_parameters()).keys()
    assert {name for name, axis in axes.items() if axis == 1} == {f"layer{i}.resample.weight" for i in (4, 5, 6)}
    assert set(axes.values()) == {0, 1}
    assert channel_axes(nn.ConvTranspose2d(2, 3, 4)) == {"weight": 1, "bias": 0}
    assert channel_axes(nn.Linear(2, 3)) == {"weight": 0, "bias": 0}


def test_a_scale_of_an_output_channel_acts_as_one_of_its_outputs():
    """What makes an axis the output channel: scaling along it scales that channel of the output, and nothing else."""
    for module in (nn.Conv2d(3, 4, 3, bias=False), nn.ConvTranspose2d(3, 4, 3, bias=False)):
        axis = channel_axes(module)["weight"]
        x = torch.randn(1, 3, 8, 8)
        with torch.no_grad():
            before = module(x)
            module.weight.select(axis, 1).mul_(2)
            ratio = module(x) / before
        assert torch.allclose(ratio[:, 1], torch.tensor(2.0))
        assert torch.allclose(ratio[:, [0, 2, 3]], torch.tensor(1.0))
