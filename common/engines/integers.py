"""The integers that a graph's layers hold: those of the packed file, to the last code."""

from collections.abc import Iterable

import numpy as np
import torch

from common.formats import entropy
from common.formats.numbers import IntegerTensor, along, bits, quantize_integer, unpack_codes
from common.formats.packed import Model, tensor_shapes

LAYERS = ("Convolution", "ConvolutionBackpropData", "MatMul")  # OpenVINO's names of what has weights
LARGEST_CODE = 127


def stored_integers(model: Model) -> dict[str, IntegerTensor]:
    """{weight: its codes and scales} of the weights that 8-bit integers hold as they are stored: int2 to int8, and
    those of entropy coding that are all within 127 of their steps."""
    shapes = tensor_shapes(model.config)
    if model.is_entropy_coded:
        steps = entropy.steps_of(model.stored, {name: shape for name, (shape, _) in shapes.items()})
        found = {name: _multiples(model.state[name], steps[name], axis) for name, (_, axis) in shapes.items()}
        return {name: of for name, of in found.items() if of is not None and of.codes.dim() > 1}
    return {
        name: IntegerTensor(
            unpack_codes(model.stored[name], bits(fmt), shapes[name][0]),
            model.stored[f"{name}:scale"],
            shapes[name][1],
        )
        for name, fmt in model.formats.items()
        if fmt.startswith("int")
    }


def _multiples(weight: torch.Tensor, step: np.ndarray, axis: int) -> IntegerTensor | None:
    """The weight as multiples of its step, or of those of its rows; None where they reach beyond 8 bits."""
    step = torch.as_tensor(step)
    codes = (weight / step).round()
    if weight.dim() < 2 or codes.abs().max() > LARGEST_CODE:
        return None
    return IntegerTensor(codes.to(torch.int8), step.flatten().expand(weight.shape[axis]).contiguous(), axis)


def decoding_note(model: Model) -> str | None:
    """What is said where the file's own format is not what the products are taken in."""
    if model.is_entropy_coded:
        return "is entropy-coded: it is decoded first, and its codes run as 8-bit integers where they fit"
    narrow = {fmt for fmt in model.formats.values() if fmt.startswith("int") and fmt != "int8"}
    if narrow:
        return f"has weights in {', '.join(sorted(narrow))}: their codes run as 8-bit integers, with the same values"
    return None


def layer_name(operation) -> str:
    """The torch module that an operation of a converted graph belongs to: "layer1.block1.conv1"."""
    return operation.get_friendly_name().split("/")[0].removeprefix("__module.")


def layer_operations(graph) -> dict:
    """{layer: its operation} of the convolutions and linear layers of a graph."""
    return {layer_name(operation): operation for operation in graph.get_ops() if operation.get_type_name() in LAYERS}


def integer_layers(graph) -> dict[str, tuple]:
    """{layer: (constant of its int8 codes, the node that reads it, constant of its scales, the node that multiplies)}
    of a graph whose weights nncf has quantized."""
    found = {}
    for name, operation in layer_operations(graph).items():
        multiply = operation.input_value(1).get_node()
        if multiply.get_type_name() != "Multiply":
            continue
        convert, scale = (multiply.input_value(i).get_node() for i in range(2))
        if convert.get_type_name() != "Convert":
            continue
        codes = convert.input_value(0).get_node()
        if codes.get_type_name() == "Constant" and codes.get_output_element_type(0).get_type_name() == "i8":
            found[name] = codes, convert, scale, multiply
    return found


def restore_layers(graph, network: torch.nn.Module, layers: Iterable[str]) -> None:
    """Takes the products of these layers out of integers: their inputs as they are, their weights the network's."""
    from openvino import opset13

    operations = layer_operations(graph)
    for name in layers:
        operation = operations[name]
        weight = network.get_submodule(name).weight.detach().float().cpu().contiguous()
        operation.input(0).replace_source_output(operation.input_value(0).get_node().input_value(0))
        operation.input(1).replace_source_output(opset13.constant(weight.numpy(), dtype=np.float32).output(0))


def set_integers(graph, network: torch.nn.Module, integers: dict[str, IntegerTensor], axes: dict[str, int]) -> None:
    """Gives each integer layer of the graph the codes and scales in `integers` {weight: ...}, or else the nearest
    8-bit codes of the network's weight. axes: {weight: axis of output channels}."""
    from openvino import opset13

    weights = dict(network.named_parameters())
    for layer, (codes, convert, scale, multiply) in integer_layers(graph).items():
        name = f"{layer}.weight"
        chosen = integers.get(name) or quantize_integer(weights[name].detach(), "int8", axes[name])
        if tuple(codes.data.shape) != tuple(chosen.codes.shape):
            raise ValueError(f"{name}: the graph has {codes.data.shape}, the network {tuple(chosen.codes.shape)}")
        scales = along(chosen.scale, chosen.axis, chosen.codes.dim())
        new_codes = opset13.constant(chosen.codes.numpy(), dtype=np.int8, name=codes.get_friendly_name())
        new_scale = opset13.constant(scales.numpy(), dtype=np.float32, name=scale.get_friendly_name())
        convert.input(0).replace_source_output(new_codes.output(0))
        multiply.input(1).replace_source_output(new_scale.output(0))


def codes_of(graph) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{weight: (int8 codes, float32 scales, one for each output channel)}"""
    return {
        f"{layer}.weight": (np.array(codes.data), np.array(scale.data).reshape(-1))
        for layer, (codes, _, scale, _) in integer_layers(graph).items()
    }
