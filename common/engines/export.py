"""Models as files that run without this project and without torch: OpenVINO's graph, or ONNX."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.engines.costs import input_ranges
from common.engines.integers import codes_of
from common.engines.openvino import HINTS, quiet

OPSET = 20  # of ONNX
NAMES = {"openvino": "model.xml", "onnx": "model.onnx"}


def save_openvino(folder: Path, graph) -> Path:
    """Writes model.xml and model.bin; weights keep their precision."""
    import openvino

    path = folder / NAMES["openvino"]
    openvino.save_model(graph, path, compress_to_fp16=False)
    return path


def save_onnx(folder: Path, network: nn.Module, x: torch.Tensor, t: torch.Tensor, graph=None) -> Path:
    """Writes model.onnx, for any number of images; inputs x and t, as the network's.

    graph: the openvino.Model whose layers of 8 bits become those of the file: between QuantizeLinear and
    DequantizeLinear, with ranges that do not change, and weights stored as int8.
    """
    import onnx

    path = folder / NAMES["onnx"]
    batch = {name: {0: "images"} for name in ("x", "t", "noise")}
    with quiet():  # the exporter that needs no further package is the older one
        torch.onnx.export(
            network.cpu().float(), (x[:2], t[:2]), str(path), dynamo=False, opset_version=OPSET,
            input_names=["x", "t"], output_names=["noise"], dynamic_axes=batch,
        )  # fmt: skip
    if graph is not None:
        model = onnx.load(path)
        _quantize(model.graph, input_ranges(graph), codes_of(graph))
        onnx.checker.check_model(model)
        onnx.save(model, path)
    return path


def _quantize(graph, ranges: dict[str, tuple[float, float, int]], codes: dict[str, tuple[np.ndarray, np.ndarray]]):
    """Puts the layers of `ranges` {layer: (lowest, highest, levels) of its input} in 8 bits, with the weights of
    `codes` {weight: (int8, scale of each output channel)}."""
    from onnx import helper, numpy_helper

    initial = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []

    def constant(name: str, value) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    for node in graph.node:
        layer = node.name.rpartition("/")[0].strip("/").replace("/", ".")
        if layer in ranges and node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            low, high, levels = ranges[layer]
            step = (high - low) / (levels - 1)
            scale = constant(f"{layer}.input_scale", np.float32(step))
            zero = constant(f"{layer}.input_zero", np.uint8(round(-low / step)))
            rounded, coarse = f"{layer}.input_codes", f"{layer}.input_8_bits"
            nodes.append(helper.make_node("QuantizeLinear", [node.input[0], scale, zero], [rounded]))
            nodes.append(helper.make_node("DequantizeLinear", [rounded, scale, zero], [coarse]))
            integers, scales = codes[f"{layer}.weight"]
            axis = 1 if node.op_type == "ConvTranspose" else 0
            if node.op_type == "MatMul":  # x W', with W' stored
                integers, axis = integers.T, 1
            if initial[node.input[1]].dims != list(integers.shape):
                raise ValueError(f"{layer}: the exporter laid its weight out as {initial[node.input[1]].dims}")
            graph.initializer.remove(initial[node.input[1]])
            weight_codes = constant(f"{layer}.weight_codes", np.ascontiguousarray(integers))
            weight_scale = constant(f"{layer}.weight_scale", scales.astype(np.float32))
            weight = f"{layer}.weight_8_bits"
            nodes.append(helper.make_node("DequantizeLinear", [weight_codes, weight_scale], [weight], axis=axis))
            node.input[0], node.input[1] = coarse, weight
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


_LOADS = {
    "openvino": """import openvino

model = openvino.Core().compile_model("model.xml", "CPU", {{"INFERENCE_PRECISION_HINT": "{hint}"}})
predict = lambda x, t: model([x, np.full(len(x), t)])[0]""",
    "onnx": """import onnxruntime

model = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
predict = lambda x, t: model.run(None, {{"x": x, "t": np.full(len(x), t)}})[0]""",
}
_SCRIPT = '''"""Makes images.png: {images} images by DDIM in {steps} steps. Needs numpy, pillow and {package}."""

import numpy as np
from PIL import Image
{load}

images, steps, timesteps, shape = {images}, {steps}, {timesteps}, {shape}
abar = np.cumprod(1 - np.linspace(1e-4, 0.02, timesteps))  # the share of the image's variance that is left
times = [round(timesteps - i * timesteps / steps) - 1 for i in range(steps)] + [-1]
random = [np.random.Generator(np.random.Philox(key=np.array([0, i], np.uint64))) for i in range(images)]
x = np.stack([r.standard_normal(shape, np.float32) for r in random])
for t, t_next in zip(times, times[1:]):
    a, a_next = abar[t], abar[t_next] if t_next >= 0 else 1.0
    x0 = np.clip((x - (1 - a) ** 0.5 * predict(x, t)) / a**0.5, -1, 1)
    x = (a_next**0.5 * x0 + ((1 - a_next) / (1 - a)) ** 0.5 * (x - a**0.5 * x0)).astype(np.float32)
pixels = np.round(np.clip(x, -1, 1) * 127.5 + 127.5).astype(np.uint8)  # (images, channels, height, width)
row = np.concatenate(list(pixels), axis=2).transpose(1, 2, 0)
Image.fromarray(row.squeeze()).save("images.png")
'''


def sampling_script(
    target: str, timesteps: int, shape: tuple[int, ...], steps: int, precision: str, images: int = 10
) -> str:
    """A script that samples from the exported file without this project: image i of seed 0, as `--sampler ddim --eta 0`
    makes it."""
    package = {"openvino": "openvino", "onnx": "onnxruntime"}[target]
    return _SCRIPT.format(
        images=images, steps=steps, package=package, load=_LOADS[target].format(hint=HINTS[precision]),
        timesteps=timesteps, shape=tuple(shape),
    )  # fmt: skip
