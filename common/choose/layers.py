"""What the names of a network's tensors say: their layer, and which of them the strategies choose among.

A layer is a block at the top: layer1 to layer6 of this project's own network, and of a UNet2DModel of diffusers the
blocks of its two halves and the one between (down_blocks.0, mid_block, up_blocks.3). What comes before and after them
(the first and the last convolution, the embedding of the timestep) is in no layer that is chosen among.
"""

import re
from collections.abc import Iterable

_IN_LAYERS = re.compile(r"layer\d+\.|down_blocks\.\d+\.|mid_block\.|up_blocks\.\d+\.")
_HALVES = ("layer", "down_blocks", "mid_block", "up_blocks")  # in the order of the forward pass


def layer_of(name: str) -> str:
    """The layer of a tensor, or the module that it belongs to before or after the layers."""
    block = _IN_LAYERS.match(name)
    return block[0].rstrip(".") if block else name.partition(".")[0]


def layer_weights(names: Iterable[str]) -> list[str]:
    """The weights (no biases) of the layers; of this project's own network the 58 tensors that the published rules
    choose among."""
    return [name for name in names if _IN_LAYERS.match(name) and name.endswith(".weight")]


def layers_in_order(names: Iterable[str]) -> list[str]:
    """The layers of these weights of layers, in the order of the forward pass: the first is number 1."""

    def place(layer: str) -> tuple[int, int]:
        half, number = re.fullmatch(r"([a-z_]+)\.?(\d*)", layer).groups()
        return _HALVES.index(half), int(number or 0)

    return sorted({layer_of(name) for name in names}, key=place)


def is_norm(name: str) -> bool:
    """Whether a tensor belongs to a GroupNorm."""
    return "norm" in name.rpartition(".")[0].rpartition(".")[2]


def by_layer(values: dict[str, float]) -> dict[str, dict[str, float]]:
    """{layer: {name: value}}, in the order of `values`."""
    layers: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        layers.setdefault(layer_of(name), {})[name] = value
    return layers


def parse_groups(text: str) -> list[list[int]]:
    """The numbers of layers in each group, as in "12/3456" or, where there are more than nine, "1,2/3,10".

    Raises ValueError for anything else, an empty group, and a layer that is named twice.
    """
    groups = [part.split(",") if "," in text else list(part) for part in text.split("/")]
    if not all(groups) or [""] in groups:
        raise ValueError(f"{text!r} has an empty group; write e.g. 12/3456")
    names = [name for group in groups for name in group]
    for name in names:
        if not (name.isascii() and name.isdecimal() and len(name) < 4):
            raise ValueError(f"{text!r} names layer {name!r}; layers are whole numbers, e.g. 12/3456 or 1,2/3,10")
        if names.count(name) > 1:
            raise ValueError(f"{text!r} names layer {name} twice; name each once, e.g. 12/3456")
    return [[int(name) for name in group] for group in groups]


def check_groups(text: str, layers: int) -> None:
    """Raises ValueError where `text`, which `parse_groups` can read, does not name each of so many layers."""
    named = [number for group in parse_groups(text) for number in group]
    for number in named:
        if not 1 <= number <= layers:
            raise ValueError(f"{text!r} names layer {str(number)!r}; layers are 1 to {layers}")
    missing = [str(number) for number in range(1, layers + 1) if number not in named]
    if missing:
        raise ValueError(f"{text!r} lacks layer {', '.join(missing)}; name each once")
