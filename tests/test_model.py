"""Sizes against the published ones; packed files: what is saved is what is loaded and what is sampled from."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from attack_files import hostile_files, limited_memory, models, outcome

from common.choose.layers import is_norm, layer_weights
from common.ddpm.noise import NoiseStreams
from common.ddpm.samplers import sample
from common.ddpm.schedule import Schedule
from common.errors import UserError
from common.formats.numbers import fake_quantize
from common.formats.packed import MIB, full_precision, load_model, save_model, size_mib, tensor_shapes
from common.presets import FORMATS, UNetConfig
from common.runtime import sealed
from common.runtime.sealed import CheckpointError

# As many values as a real run keeps, since the header holds them.
ABOUT = {"label": "Baseline (FP32)", "preset": "quick", "loss_curve": [0.123456] * 220}


@pytest.fixture
def baseline(tiny_network):
    return full_precision(tiny_network.config, tiny_network.state_dict(), ABOUT)


@pytest.fixture
def quantize(baseline):
    """The uniform model of a format."""

    def make(fmt):
        return baseline.quantize(layer_weights(baseline.state), fmt, {"label": f"Uniform ({fmt.upper()})"})

    return make


def equal(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_published_sizes():
    config = UNetConfig()
    names = layer_weights(tensor_shapes(config))
    assert len(names) == 58
    baseline, uniform = size_mib(config, {}), size_mib(config, dict.fromkeys(names, "fp16"))
    assert f"{baseline:.2f}" == "134.20"
    assert f"{uniform:.2f}" == "67.70"
    assert f"{1 - uniform / baseline:.2%}" == "49.55%"
    assert baseline == 35_178_689 * 4 / MIB


@pytest.mark.parametrize("fmt", FORMATS)
def test_size_is_that_of_the_published_shapes(fmt):
    """Counted from the widths alone: codes, one scale per output channel, norms in fp16."""
    width = int(fmt.removeprefix("int").removeprefix("fp"))
    total = 35_178_689 * 4
    for i, c in enumerate((64, 128, 256, 512, 512, 384), start=1):
        shapes = [(c, c * 9)] * 4  # (outputs, entries for each)
        shapes.append((2 * c, c * 9) if i <= 3 else (c // 2, c * 16))
        if i in (2, 6):
            shapes += [(3 * c, c), (c, c)]
        for outputs, entries in shapes:
            scales = 4 * outputs if fmt.startswith("int") else 0
            total += math.ceil(outputs * entries * width / 8) + scales - 4 * outputs * entries
        total -= 0 if fmt == "fp32" else 4 * 2 * c  # four norms of c entries, two bytes less for each
    config = UNetConfig()
    assert size_mib(config, dict.fromkeys(layer_weights(tensor_shapes(config)), fmt)) * MIB == total


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_saved_model_is_loaded_bit_for_bit(quantize, tmp_path, fmt):
    model, path = quantize(fmt), tmp_path / "model.safetensors"
    save_model(path, model)
    loaded = load_model(path)
    assert loaded.config == model.config
    assert loaded.formats == model.formats
    assert loaded.metadata == model.metadata
    assert equal(loaded.stored, model.stored)
    assert equal(loaded.state, model.state)
    assert loaded.sha256 == model.sha256

    # Size in the table: the bytes of the tensors, by shapes and as stored; the file adds its header.
    tensors = sealed.load(path, "model")[0]
    assert model.size_mib() * MIB == sum(tensor.nbytes for tensor in tensors.values())
    assert model.size_mib() == size_mib(model.config, model.formats)
    assert (
        0 < path.stat().st_size - model.size_mib() * MIB < 60 * 1024
    )  # 4 KiB are left for the longer numbers of paper

    # The same bytes again.
    again = tmp_path / "again.safetensors"
    save_model(again, loaded)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_network_of_a_model_has_the_quantized_weights(baseline, quantize, fmt):
    """Not the FP32 ones beside them: each weight of layers 1 to 6 is what its format can store."""
    model = quantize(fmt)
    network = model.network()
    assert not network.training
    assert equal(network.state_dict(), model.state)
    for name, tensor in network.named_parameters():
        original = baseline.state[name]
        if name not in layer_weights(baseline.state):
            assert model.formats[name] == "fp32"
            assert torch.equal(tensor, original)
            continue
        stored = "fp16" if original.dim() == 1 and fmt.startswith("int") else fmt
        assert model.formats[name] == stored
        transposed = name in [f"layer{i}.resample.weight" for i in (4, 5, 6)]
        assert torch.equal(tensor, fake_quantize(original, stored, 1 if transposed else 0))
        if fmt != "fp32" and original.dim() > 1:
            assert not torch.equal(tensor, original)


def test_norms_stay_in_fp16_under_integers(quantize):
    model = quantize("int2")
    norms = [name for name in layer_weights(model.state) if is_norm(name)]
    assert len(norms) == 24
    for name, tensor in model.stored.items():
        if name in norms:
            assert (model.formats[name], tensor.dtype) == ("fp16", torch.float16)
    assert sum(fmt == "int2" for fmt in model.formats.values()) == 58 - 24
    assert not any(f"{name}:scale" in model.stored for name in norms)


def test_fewer_bits_move_the_images_further(baseline, quantize):
    schedule, errors = Schedule(), []

    def images(model):
        return sample(model.network(), schedule, NoiseStreams(0, range(4)), "ddim", 4)

    expected = images(baseline)
    assert torch.equal(images(quantize("fp32")), expected)
    for fmt in ("fp16", "int8", "int4", "int2"):
        errors.append(float((images(quantize(fmt)) - expected).square().mean()))
    assert errors[0] > 0
    assert all(b > 4 * a for a, b in pairwise(errors)), errors


def test_quantizing_changes_the_named_tensors_alone(baseline):
    name = "layer2.block1.conv1.weight"
    model = baseline.quantize([name], "int4", {"label": "one"})
    assert {n for n, fmt in model.formats.items() if fmt != "fp32"} == {name}
    assert {n for n in model.state if not torch.equal(model.state[n], baseline.state[n])} == {name}
    assert model.metadata == {**ABOUT, "label": "one"}
    assert model.sha256 != baseline.sha256
    assert baseline.is_baseline and not model.is_baseline
    assert set(baseline.formats.values()) == {"fp32"} and baseline.metadata == ABOUT


def test_quantizing_again_leaves_nothing_of_the_first_time(baseline):
    names = layer_weights(baseline.state)
    model = baseline.quantize(names, "int8", {}).quantize(names, "fp16", {})
    assert model.stored.keys() == baseline.stored.keys()
    assert model.size_mib() == size_mib(model.config, model.formats)


def test_nothing_quantized_is_the_baseline(baseline):
    model = baseline.quantize([], "int4", {})
    assert model.is_baseline
    assert model.sha256 == baseline.sha256
    assert model.size_mib() == baseline.size_mib() == size_mib(baseline.config, {})


def test_fp16_that_overflows_is_refused(baseline):
    state = {name: tensor.clone() for name, tensor in baseline.state.items()}
    state["layer1.block1.conv1.weight"][0, 0, 0, 0] = 1e6
    model = full_precision(baseline.config, state, ABOUT)
    with pytest.raises(UserError, match="does not fit fp16"):
        model.quantize(layer_weights(state), "fp16", {})


def test_weights_that_do_not_fit_their_hash_are_refused(baseline, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, baseline)
    tensors, metadata = sealed.load(path, "model")
    tensors["output_conv.bias"] += 1
    sealed.save(path, "model", tensors, metadata)
    with pytest.raises(CheckpointError, match="do not fit their hash"):
        load_model(path)


def test_any_byte_of_a_weight_changed_is_refused(quantize, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, quantize("int4"))
    content = path.read_bytes()
    for place in range(0, len(content), len(content) // 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError):
            load_model(path)


def test_what_is_sealed_but_wrong_inside_is_refused_before_memory_is_taken(tmp_path):
    results, path = {}, tmp_path / "attacked.safetensors"
    for wrong, content in hostile_files().items():
        path.write_bytes(content)
        with limited_memory():
            results[wrong] = outcome(path)
    assert len(results) > 100
    assert {wrong: result for wrong, result in results.items() if result != "refused"} == {}


def test_the_models_that_are_attacked_are_read(tmp_path):
    """Else the attacks would show nothing."""
    for fmt, model in models().items():
        save_model(tmp_path / fmt, model)
        assert load_model(tmp_path / fmt).sha256 == model.sha256


def test_weights_of_another_type_are_stored_as_float32(tiny_network, tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in tiny_network.state_dict().items()}
    model = full_precision(tiny_network.config, state, ABOUT)
    save_model(tmp_path / "model", model)
    assert equal(load_model(tmp_path / "model").state, {name: tensor.float() for name, tensor in state.items()})


def test_the_model_that_comes_with_the_software_is_read():
    """A file without a format version."""
    model = load_model(Path(__file__).parents[1] / "checkpoints" / "quick.safetensors")
    assert model.sha256 == "4914ccb0c4dea4323f8e050f636abeb6fbd9cb3bba4bf156a32ae7bfc4703bef"


def test_a_file_of_another_kind_is_no_model(tmp_path):
    sealed.save(tmp_path / "file", "images", {"images": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="not a model file"):
        load_model(tmp_path / "file")


def test_the_file_tells_what_a_sampler_needs(baseline, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, replace(baseline, config=replace(baseline.config, dropout=0.25)))
    _, metadata = sealed.load(path, "model")
    assert metadata["data_range"] == [-1.0, 1.0]
    assert metadata["formats"] == dict.fromkeys(baseline.state, "fp32")
    assert load_model(path).config == replace(baseline.config, dropout=0.25)
