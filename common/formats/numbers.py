"""Number formats: fake-quantization, and the packed tensors that a file stores.

fp32 and fp16 are stored as they are. int2..int8 are symmetric integers with one FP32 scale per output channel
(Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 2.2): w is stored as
q = round(w / s), |q| <= 2^(b-1) - 1, s = max |w| / (2^(b-1) - 1), and read as q * s. A smaller s, which cuts the
largest weights off, can make the squared error less (section 2.3.1, "MSE"); the file is the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from common.errors import UserError
from common.presets import FORMATS

FP16_MAX = 65504.0
SHRINKS = tuple(round(1 - 0.02 * i, 2) for i in range(1, 41))  # of the scale: 0.98 down to 0.2


@dataclass(frozen=True)
class IntegerTensor:
    """codes: int8 with the shape of the weight, |code| <= 2^(bits-1) - 1; scale: float32, one per channel of `axis`."""

    codes: torch.Tensor
    scale: torch.Tensor
    axis: int

    def dequantize(self) -> torch.Tensor:
        return self.codes.float() * along(self.scale, self.axis, self.codes.dim())


def bits(fmt: str) -> int:
    """Bits of one number. Raises ValueError for an unknown format."""
    if fmt not in FORMATS:
        raise ValueError(f"unknown format {fmt}; known are {', '.join(FORMATS)}")
    return int(fmt.removeprefix("fp").removeprefix("int"))


def stored_format(fmt: str, shape: torch.Size) -> str:
    """The format that a tensor of `shape` takes where `fmt` is asked for: 1-D tensors never go below fp16."""
    return "fp16" if fmt.startswith("int") and len(shape) < 2 else fmt


def channel_axes(network: nn.Module) -> dict[str, int]:
    """The output-channel axis of each parameter: 1 for transposed convolutions (C_in, C_out, ...), else 0."""
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return {
        f"{prefix}.{name}".lstrip("."): 1 if isinstance(module, transposed) and parameter.dim() > 1 else 0
        for prefix, module in network.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }


def largest_code(fmt: str) -> int:
    """2^(b-1) - 1 of int<b>."""
    return 2 ** (bits(fmt) - 1) - 1


def quantize_integer(weight: torch.Tensor, fmt: str, axis: int, scale: torch.Tensor | None = None) -> IntegerTensor:
    """Nearest symmetric integers of the weight's float32 values. scale: one per channel of `axis`, float32; by default
    `largest_weight_scale`.

    Raises UserError for weights that are not finite.
    """
    weight, largest = weight.float(), largest_code(fmt)
    usual = largest_weight_scale(weight, fmt, axis)  # which raises
    scale = usual if scale is None else scale
    codes = (weight / along(scale, axis, weight.dim())).round().clamp(-largest, largest).to(torch.int8)
    return IntegerTensor(codes, scale, axis)


def largest_weight_scale(weight: torch.Tensor, fmt: str, axis: int) -> torch.Tensor:
    """The scale of each channel, float32, that reaches its largest weight; of a channel of zeros 1.

    Raises UserError for weights that are not finite.
    """
    scale = weight.float().abs().amax(dim=[i for i in range(weight.dim()) if i != axis]) / largest_code(fmt)
    if not scale.isfinite().all():
        raise UserError(f"a weight is not finite: no {fmt} stands for it")
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def least_error_scale(weight: torch.Tensor, fmt: str, axis: int) -> torch.Tensor:
    """The scale of each channel, float32, with the least squared error of nearest integers: `largest_weight_scale` or
    that times one of `SHRINKS`, of equal ones the largest.

    Raises UserError for weights that are not finite.
    """
    weight = weight.float()
    others = [i for i in range(weight.dim()) if i != axis]

    def error(scale: torch.Tensor) -> torch.Tensor:
        difference = quantize_integer(weight, fmt, axis, scale).dequantize() - weight
        return difference.square().sum(dim=others, dtype=torch.float64)

    whole = best = largest_weight_scale(weight, fmt, axis)
    least = error(best)
    for shrink in SHRINKS:
        scale = whole * shrink
        better = (of_scale := error(scale)) < least
        best, least = torch.where(better, scale, best), torch.where(better, of_scale, least)
    return best


def fake_quantize(weight: torch.Tensor, fmt: str, axis: int = 0) -> torch.Tensor:
    """FP32 weights with the values that `fmt` can store. Raises UserError where it can store no such value."""
    if fmt == "fp32":
        return weight.float().clone()
    if fmt == "fp16":
        return _to_fp16(weight).float()
    return quantize_integer(weight, fmt, axis).dequantize()


def pack(
    weight: torch.Tensor,
    fmt: str,
    axis: int = 0,
    quantize: Callable[[torch.Tensor, str, int], IntegerTensor] = quantize_integer,
) -> dict[str, torch.Tensor]:
    """What a file stores of one weight: {"": tensor} or, for integers, {"": codes (bytes,) uint8, "scale": float32},
    those of quantize(weight, fmt, axis).

    On the CPU, wherever the weight is and whatever real numbers it is of.
    """
    if fmt == "fp32":
        return {"": weight.float().cpu()}
    if fmt == "fp16":
        return {"": _to_fp16(weight).cpu()}
    quantized = quantize(weight, fmt, axis)
    return {"": pack_codes(quantized.codes, bits(fmt)), "scale": quantized.scale.cpu()}


def unpack(stored: dict[str, torch.Tensor], fmt: str, shape: torch.Size, axis: int = 0) -> torch.Tensor:
    """The FP32 weight that `pack` stored, on the CPU: equal to `fake_quantize` bit for bit."""
    if fmt in ("fp32", "fp16"):
        return stored[""].float().cpu()
    return IntegerTensor(unpack_codes(stored[""], bits(fmt), shape), stored["scale"].cpu(), axis).dequantize()


def stored_parts(shape: Sequence[int], fmt: str, axis: int = 0) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """{part: (type, shape)} of the tensors that `pack` makes of a weight of `shape`; takes no memory for them."""
    if fmt in ("fp32", "fp16"):
        return {"": (torch.float32 if fmt == "fp32" else torch.float16, tuple(shape))}
    length = (math.prod(shape) * bits(fmt) + 7) // 8
    return {"": (torch.uint8, (length,)), "scale": (torch.float32, (shape[axis],))}


def stored_bytes(shape: Sequence[int], fmt: str, axis: int = 0) -> int:
    """Bytes of the tensors that `pack` makes of a weight of `shape`."""
    return sum(math.prod(part) * dtype.itemsize for dtype, part in stored_parts(shape, fmt, axis).values())


def pack_codes(codes: torch.Tensor, width: int) -> torch.Tensor:
    """int8 codes to uint8 (ceil(numel * width / 8),): `width` bits each in two's complement, high bit first."""
    unsigned = codes.to("cpu", torch.int8).contiguous().numpy().reshape(-1, 1).view(np.uint8)
    return torch.from_numpy(np.packbits(np.unpackbits(unsigned, axis=1)[:, 8 - width :]))


def unpack_codes(stream: torch.Tensor, width: int, shape: torch.Size) -> torch.Tensor:
    """The int8 codes that `pack_codes` packed."""
    numel = int(np.prod(shape))
    field = np.unpackbits(stream.cpu().numpy(), count=numel * width).reshape(numel, width)
    sign = np.repeat(field[:, :1], 8 - width, axis=1)
    return torch.from_numpy(np.packbits(np.concatenate([sign, field], axis=1)).view(np.int8)).reshape(shape)


def along(scale: torch.Tensor | np.ndarray, axis: int, dim: int) -> torch.Tensor | np.ndarray:
    """A scale per channel of `axis`, to be multiplied with a weight of `dim` dimensions; of the scale's own type."""
    return scale.reshape([-1 if i == axis else 1 for i in range(dim)])


def _to_fp16(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.float()
    if not (largest := weight.abs().max()) <= FP16_MAX:  # nor does NaN
        raise UserError(f"a weight of {largest:.3g} does not fit fp16 (largest {FP16_MAX:.0f})")
    return weight.half()
