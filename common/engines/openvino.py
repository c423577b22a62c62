"""Networks run by OpenVINO on a CPU.

A torch network becomes a graph, and the graph is compiled for the shape of the first batch that it meets. Smaller
batches are filled up to that shape with zeros, whose results are dropped.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import nn

from common.ddpm.samplers import Denoiser
from common.errors import UserError

REQUIREMENTS = "requirements-openvino.txt"
PACKAGES = ("openvino", "nncf")  # the second for 8 bits
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16", "mixed": "bf16"}  # of what is not in integers


def require_installed(*packages: str, option: str = "--engine openvino") -> None:
    """Raises UserError naming the packages that are not installed."""
    if missing := [package for package in packages if not installed_version(package)]:
        raise UserError(f"{option}: {' and '.join(missing)} cannot be found; pip install -r {REQUIREMENTS}")


def is_installed() -> bool:
    """Whether all precisions of this engine can be had."""
    return all(map(installed_version, PACKAGES))


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def sums_saturate() -> bool:
    """Whether OpenVINO cuts off sums of two products of 8 bits at 16 bits here, as on CPUs without VNNI: the largest
    activations and weights of one convolution, whose result is known."""
    import openvino as ov
    from openvino import opset13 as ops

    image = ops.parameter([1, 16, 1, 1], np.float32)
    low, high = np.float32(0), np.float32(255)
    codes = ops.fake_quantize(image, low, high, low, high, 256)
    weights = ops.convert(ops.constant(np.full((16, 16, 1, 1), 127, np.int8)), np.float32)
    weights = ops.multiply(weights, ops.constant(np.float32(1)))
    sums = ops.convolution(codes, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    compiled = ov.Core().compile_model(ov.Model([sums], [image]), "CPU")
    found = compiled(np.full((1, 16, 1, 1), 255, np.float32))[0].flat[0]
    return bool(abs(found - 16 * 255 * 127) > 0.01 * 16 * 255 * 127)


@lru_cache(maxsize=1)
def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 here; where the CPU cannot, it takes FP32 in its place."""
    import openvino as ov
    from openvino import opset13 as ops

    number = ops.parameter([1], np.float32)
    compiled = compile_graph(ov.Model([ops.relu(number)], [number]), "bf16")
    return compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.bf16


def convert(network: nn.Module, x: torch.Tensor, t: torch.Tensor):
    """The openvino.Model of a network in evaluation mode; inputs x (N, ...) float32 and t (N,) int64, of any N."""
    import openvino

    shapes = [([-1, *x.shape[1:]], openvino.Type.f32), ([-1], openvino.Type.i64)]
    with quiet():
        return openvino.convert_model(network.cpu().float(), example_input=(x[:2], t[:2]), input=shapes)


def compile_graph(graph, precision: str, shape: tuple[int, ...] | None = None):
    """The graph compiled for this machine's CPU, for x of `shape` or, by default, of any number of images.

    As many threads as torch has, so that OMP_NUM_THREADS holds for both.
    """
    import openvino

    if shape is not None:
        graph = graph.clone()
        graph.reshape({0: list(shape), 1: [shape[0]]})
    return openvino.Core().compile_model(
        graph,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": HINTS[precision.split()[0]],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # several processes would be pinned to the same cores
        },
    )


def denoiser(graph, precision: str) -> Denoiser:
    """(x, t) -> predicted noise, float32 on the CPU."""
    compiled = None
    size = 0

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        nonlocal compiled, size
        if len(x) > size:
            compiled, size = compile_graph(graph, precision, tuple(x.shape)), len(x)
        filled = np.zeros((size, *x.shape[1:]), np.float32)
        filled[: len(x)] = x.numpy()
        times = np.zeros(size, np.int64)
        times[: len(x)] = t.numpy()
        return torch.from_numpy(compiled([filled, times])[0][: len(x)].copy())

    return denoise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and bars of other packages, and without what they would send to their makers over the
    network; what they raise is not kept back."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    before = os.environ.get("CI")
    os.environ["CI"] = "true"  # where openvino and nncf send nothing
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.pop("CI")
        if before is not None:
            os.environ["CI"] = before
