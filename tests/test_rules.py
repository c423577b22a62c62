"""The four rules on values small enough to check by hand."""

import argparse

import pytest

from common.choose.layers import check_groups
from layer_group import below_group_mean, groups_of
from layer_math import below_layer_threshold
from layer_ratio import below_top_ratio
from whole_threshold import below


def test_threshold_is_strict_at_ties():
    values = {"a": 0.1, "b": 0.25, "c": 0.25, "d": 1.0}
    assert below(values, 0.25) == {"a"}
    assert below(values, 0.2500001) == {"a", "b", "c"}


def test_threshold_one_leaves_the_largest_alone():
    assert below({"a": 0.001, "b": 0.999999, "c": 1.0}, 1.0) == {"a", "b"}


def test_threshold_zero_quantizes_nothing():
    assert below({"a": 0.0, "b": 1.0}, 0.0) == set()


LAYERS = {f"layer{i}.block1.conv1.weight": value for i, value in enumerate([1.0, 0.5, 0.1, 0.2, 0.3, 0.4], start=1)}


def chosen_layers(names):
    return {name[len("layer")] for name in names}


def test_group_mean_of_its_own_tensors():
    # 12: mean 0.75; 3456: mean 0.25.
    assert chosen_layers(below_group_mean(LAYERS, "12/3456")) == {"2", "3", "4"}
    # 12: 0.75; 345: 0.2, which layer 4 equals; 6 alone is its own mean.
    values = LAYERS | {"layer3.block1.conv1.weight": 0.125, "layer4.block1.conv1.weight": 0.25,
                       "layer5.block1.conv1.weight": 0.375}  # fmt: skip
    assert chosen_layers(below_group_mean(values, "12/345/6")) == {"2", "3"}


def test_group_mean_counts_tensors_not_layers():
    # Mean over the four tensors of the group 0.4; over the two layers' means it would be 0.6.
    values = dict.fromkeys([f"layer{i}.x.weight" for i in (3, 4, 5, 6)], 1.0)
    values |= {"layer1.a.weight": 1.0, "layer2.a.weight": 0.1, "layer2.b.weight": 0.05, "layer2.c.weight": 0.45}
    assert below_group_mean(values, "12/3456") == {"layer2.a.weight", "layer2.b.weight"}


@pytest.mark.parametrize("value", [0.1, 0.7, 1.0, 1e-9])
@pytest.mark.parametrize("tensors", [1, 3, 7, 11])
def test_group_of_equal_values_has_none_below_its_mean(value, tensors):
    # A mean that is rounded up lies above all of them: 7 * 0.7 / 7 in binary, for one.
    values = {f"layer1.{i}.weight": value for i in range(tensors)}
    others = {name: 0.5 for name in LAYERS if not name.startswith("layer1")}
    assert below_group_mean(values | others, "1/23456") == set()


@pytest.mark.parametrize("text", ["12/3456", "12/345/6", "123/45/6", "123/456", "1/2/3/4/5/6", "123456", "62/1534"])
def test_groups_accepted(text):
    assert groups_of(text) == text
    check_groups(text, 6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("12/3457", "layer '7'"),
        ("012/3456", "layer '0'"),
        ("12,3456", "layer '3456'"),
        ("12/345", "lacks layer 6"),
        ("2/345", "lacks layer 1, 6"),
        ("", "empty group"),
        ("12/23456", "layer 2 twice"),
        ("112/3456", "layer 1 twice"),
        ("12//3456", "empty group"),
        ("12/3456/", "empty group"),
    ],
)
def test_groups_refused(text, said):
    with pytest.raises((argparse.ArgumentTypeError, ValueError)) as error:
        check_groups(groups_of(text), 6)
    assert said in str(error.value) and repr(text) in str(error.value)


def layer(*values, number=1):
    return {f"layer{number}.{i}.weight": value for i, value in enumerate(values)}


def places(names):
    return sorted(int(name.split(".")[1]) for name in names)


def test_ratio_zero_quantizes_all_and_one_nothing():
    values = layer(0.3, 0.2, 1.0) | layer(0.5, number=2)
    assert below_top_ratio(values, 0.0) == set(values)
    assert below_top_ratio(values, 1.0) == set()


def test_ratio_keeps_the_largest_of_each_layer():
    values = layer(0.1, 0.4, 0.2, 0.3) | layer(0.004, 0.001, 0.003, 0.002, number=5)
    assert below_top_ratio(values, 0.5) == {
        "layer1.0.weight", "layer1.2.weight", "layer5.1.weight", "layer5.3.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "tensors", "kept"),
    [(0.25, 9, 2), (0.25, 11, 3), (0.35, 9, 3), (0.35, 11, 4), (0.5, 9, 5), (0.5, 10, 5), (0.05, 9, 0), (0.06, 9, 1)],
)
def test_ratio_rounds_to_the_nearest_tensor_half_up(ratio, tensors, kept):
    # 2.25, 2.75, 3.15, 3.85, 4.5, 5, 0.45 and 0.54 tensors.
    values = layer(*[i / tensors for i in range(tensors)])
    assert places(below_top_ratio(values, ratio)) == list(range(tensors - kept))


def test_ratio_keeps_the_earlier_of_equal_tensors():
    assert places(below_top_ratio(layer(0.5, 0.9, 0.5, 0.5), 0.5)) == [2, 3]


def test_math_threshold_by_hand():
    # Mean 5, standard deviation 2 (of the population): k = 0.5 * 5 / 2 = 1.25, threshold 2.5.
    values = layer(2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0)
    assert places(below_layer_threshold(values, alpha=0.5)) == [0]
    # k = 0.2: threshold 4.6.
    assert places(below_layer_threshold(values, alpha=0, k=0.2)) == [0, 1, 2, 3]
    # k = 0.5: threshold 4, which three equal.
    assert places(below_layer_threshold(values, alpha=0, k=0.5)) == [0]
    # A negative k puts the threshold above the mean: 6.
    assert places(below_layer_threshold(values, alpha=0, k=-0.5)) == [0, 1, 2, 3, 4, 5]


def test_math_k_is_held_at_its_lower_end():
    values = layer(2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0)
    # alpha 0 would give k = 0 and the threshold 5; held at 0.1 it is 4.8. The layer below lies between the two.
    assert places(below_layer_threshold(values, alpha=0)) == [0, 1, 2, 3]
    between = layer(4.9, 7.0, 3.1, 5.0, 7.0, 3.0)  # mean 5, std 1.637: thresholds 5 and 4.836
    assert places(below_layer_threshold(between, alpha=0)) == [2, 5]
    assert places(below_layer_threshold(between, alpha=0, k=0)) == [0, 2, 5]


def test_math_k_is_held_at_its_upper_end():
    # Mean 10, std 3: alpha 1 would give k = 3.33 and the threshold 0; held at 2.0 it is 4, above the smallest.
    values = layer(1.0, *[11.0] * 9)
    assert places(below_layer_threshold(values, alpha=1)) == [0]
    assert places(below_layer_threshold(values, alpha=0, k=10 / 3)) == []


def test_math_has_a_threshold_for_each_layer():
    # Both layers have the same spread about their mean, so the same places are chosen in each.
    first = (2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0)
    values = layer(*first) | layer(*[v / 1024 for v in first], number=4)
    assert below_layer_threshold(values, alpha=0.5) == {"layer1.0.weight", "layer4.0.weight"}


def test_math_leaves_norms_out():
    values = layer(2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0)
    norms = {"layer1.block1.norm1.weight": 1e-6, "layer1.block2.norm2.weight": 1e6}
    assert below_layer_threshold(values | norms, alpha=0.5) == {"layer1.0.weight"}


@pytest.mark.parametrize("value", [0.1, 1.0, 1 / 3])
def test_math_of_equal_values_chooses_none(value):
    assert below_layer_threshold(layer(*[value] * 10), alpha=0.5) == set()
    assert below_layer_threshold(layer(*[value] * 10), alpha=0, k=0.0) == set()
    assert below_layer_threshold(layer(value), alpha=0.5) == set()
