"""The machine's arithmetic rate: of the fastest kernel that is found for each precision, whoever's it is.

A product of large matrices by torch is no measure of it: MKL's in FP32 runs at half of what oneDNN's convolutions
reach. So the candidates are that product, and a convolution, each by torch and by OpenVINO (oneDNN's kernels). Of 8
bits torch has the product alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.published import timed

MATRIX = 2048
CHANNELS, SIDE, BATCH = 512, 16, 32  # of the convolution, 3x3
REPEATS = 3


@dataclass(frozen=True)
class Peak:
    """The operations a second of the fastest kernel, and which it is; a multiplication and an addition are two."""

    rate: float
    kernel: str


def peaks(device: torch.device, precisions: list[str], openvino: bool) -> dict[str, Peak]:
    """{precision: Peak}; with OpenVINO's kernels where asked."""
    found = {}
    for precision in precisions:
        kernels = _kernels(device, precision, openvino)
        rates = {name: operations / _seconds(device, work) for name, (work, operations) in kernels.items()}
        best = max(rates, key=rates.get)
        found[precision] = Peak(rates[best], best)
    return found


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    work()
    return min(timed(device, work) for _ in range(REPEATS))


def _kernels(device: torch.device, precision: str, openvino: bool) -> dict[str, tuple[Callable[[], object], float]]:
    """{name: (work, operations)}"""
    product, convolution = 2.0 * MATRIX**3, 2.0 * BATCH * CHANNELS**2 * 9 * SIDE**2
    kernels: dict[str, tuple[Callable[[], object], float]] = {}
    if precision != "int8":
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        a, b = torch.randn(2, MATRIX, MATRIX, device=device).to(dtype)
        x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, device=device).to(dtype, memory_format=torch.channels_last)
        w = torch.randn(CHANNELS, CHANNELS, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)

        def convolve():
            with torch.inference_mode():
                return F.conv2d(x, w, padding=1)

        kernels["product by torch"] = (lambda: a @ b, product)
        kernels["convolution by torch"] = (convolve, convolution)
    else:
        codes = torch.randint(-127, 128, (2, MATRIX, MATRIX), dtype=torch.int8, device=device)
        kernels["product by torch"] = (lambda: torch._int_mm(*codes), product)
    if openvino:
        kernels["product by openvino"] = (_openvino_work(precision, (MATRIX, MATRIX), (MATRIX, MATRIX)), product)
        shapes = (BATCH, CHANNELS, SIDE, SIDE), (CHANNELS, CHANNELS, 3, 3)
        kernels["convolution by openvino"] = (_openvino_work(precision, *shapes), convolution)
    return kernels


def _openvino_work(precision: str, shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> Callable[[], object]:
    """A product of matrices or a 3x3 convolution, compiled; of 8 bits where asked, from and to FP32."""
    import openvino
    from openvino import opset13

    from common.engines.openvino import compile_graph

    rng = np.random.default_rng(0)
    x = node = opset13.parameter(list(shape), np.float32)
    weight = rng.standard_normal(weight_shape, np.float32)
    if precision == "int8":
        node = opset13.fake_quantize(node, *(np.float32(edge) for edge in (-4, 4, -4, 4)), 256)
        codes = opset13.constant(np.clip(np.round(weight * 30), -127, 127).astype(np.int8))
        weight = opset13.multiply(opset13.convert(codes, "f32"), opset13.constant(np.float32(1 / 30)))
    else:
        weight = opset13.constant(weight)
    if len(shape) == 2:
        node = opset13.matmul(node, weight, False, True)
    else:
        node = opset13.convolution(node, weight, [1, 1], [1, 1], [1, 1], [1, 1])
    compiled = compile_graph(openvino.Model([node], [x]), precision)
    request, filled = compiled.create_infer_request(), rng.standard_normal(shape, np.float32)
    request.infer([filled])
    return request.infer  # again on the same input


def higher(a: dict[str, Peak], b: dict[str, Peak]) -> dict[str, Peak]:
    """Of two measurements, for each precision the one of the higher rate."""
    return {p: max((m[p] for m in (a, b) if p in m), key=lambda peak: peak.rate) for p in a | b}
