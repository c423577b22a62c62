"""Choices that save as much as another, by hand."""

import torch

from common.choose import controls
from common.choose.layers import layer_weights
from common.formats.packed import full_precision, size_mib
from common.options import strategy_parser
from common.study import pipeline
from common.study.run import resolve


def test_takes_what_fits_in_order():
    savings = {"a": 5, "b": 4, "c": 3, "d": 1}
    assert controls.within(["a", "b", "c", "d"], savings, 8) == {"a", "c"}
    assert controls.within(["d", "c", "b", "a"], savings, 8) == {"d", "c", "b"}
    assert controls.within(["a", "b"], savings, 3) == set()


def test_random_orders_are_of_the_same_names_and_follow_from_the_seed():
    names = list("abcdefghij")
    orders = [tuple(controls.random_order(names, 0, draw)) for draw in range(20)]
    assert all(sorted(order) == names for order in orders) and len(set(orders)) == 20
    assert orders[3] == tuple(controls.random_order(names, 0, 3)) != tuple(controls.random_order(names, 1, 3))


def test_smallest_weights_come_first():
    weights = {"a": torch.tensor([1.0, -9.0]), "b": torch.tensor([0.1, -0.1]), "c": torch.tensor([2.0, 2.0])}
    assert controls.smallest_first(weights, ["a", "b", "c"]) == ["b", "c", "a"]


def test_nearest_format_by_size():
    sizes = {"fp16": 4.2, "int8": 2.2, "int4": 1.1}
    assert [controls.nearest_format(sizes, size) for size in (9.0, 3.3, 1.6, 0.1)] == ["fp16", "fp16", "int4", "int4"]


def test_control_models_are_about_as_large(tiny_preset, tiny_network):
    baseline = full_precision(tiny_network.config, tiny_network.state_dict(), {"label": "Baseline (FP32)"})
    run = resolve(strategy_parser("").parse_args(["--preset", "quick", "--device", "cpu", "--format", "int4"]))
    names = [name for name in layer_weights(baseline.state) if "layer5" in name or "layer2" in name]
    chosen = baseline.quantize(names, "int4", pipeline.quantized_metadata(run, baseline, "Ratio", "0.5"))
    models = list(pipeline.control_models(run, baseline, chosen, 2))
    labels = [model.metadata["label"] for model in models]
    assert labels[:3] == [f"{kind} as Ratio 0.5 (INT4)" for kind in ("Random 1", "Random 2", "Smallest weights")]
    smallest_saving = 1e-4  # MiB, of the weights of a GroupNorm
    for model in models[:3]:
        assert chosen.size_mib() <= model.size_mib() < 1.1 * chosen.size_mib() + smallest_saving
        assert model.formats != chosen.formats
    nearest = min(("fp16", "int8", "int7", "int6", "int5"), key=lambda fmt: abs(
        size_mib(baseline.config, dict.fromkeys(layer_weights(baseline.state), fmt)) - chosen.size_mib()
    ))  # fmt: skip
    assert labels[3] == f"Uniform ({nearest.upper()})"
