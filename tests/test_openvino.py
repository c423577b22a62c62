"""Networks that OpenVINO runs: what torch predicts, in the integers of the packed file."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.choose.layers import layer_weights
from common.ddpm.sampling import Sampling, generate
from common.ddpm.schedule import Schedule
from common.ddpm.unet import UNet
from common.engines import calibration as calibrating
from common.engines import costs as costs_module
from common.engines import openvino as engine_module
from common.engines.calibration import integer_graph, kept_graph, noised_images
from common.engines.costs import fake_quantized, input_ranges, layer_costs, most_costly
from common.engines.engine import OpenVINO, engine_name, left_layers, warning
from common.engines.integers import (
    codes_of,
    decoding_note,
    integer_layers,
    layer_operations,
    restore_layers,
    set_integers,
    stored_integers,
)
from common.engines.openvino import compile_graph, convert, denoiser, has_bfloat16, sums_saturate
from common.errors import UserError
from common.formats import entropy
from common.formats.numbers import along, bits, channel_axes, unpack_codes
from common.formats.packed import full_precision, tensor_shapes
from common.formats.row_steps import stored_steps
from common.runtime import sealed
from common.study.codings import coded_model

pytest.importorskip("openvino")
pytest.importorskip("nncf")

exact = pytest.mark.skipif(sums_saturate(), reason="OpenVINO cuts off sums of 8-bit products on this CPU")


@pytest.fixture(scope="module")
def network():
    from conftest import TINY

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(TINY).eval()


@pytest.fixture(scope="module")
def model(network):
    return full_precision(network.config, network.state_dict(), {"label": "Baseline (FP32)"})


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (40, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def calibration(images):
    return noised_images(images, Schedule(), 5, "noise")


@pytest.fixture(scope="module")
def graph(network, calibration):
    return convert(network, calibration.x, calibration.t)


@pytest.fixture(scope="module")
def kept(network, model, calibration, tmp_path_factory):
    """Folder, graph and costs of the network in 8 bits; made once."""
    folder = tmp_path_factory.mktemp("kept")
    return folder, *kept_graph(folder, network, model.sha256, {}, calibration)


def predicted(network, x, t):
    with torch.inference_mode():
        return network(x, t)


def mean_square(difference):
    return float(difference.double().square().mean())


def test_fp32_is_what_torch_predicts(network, graph, calibration):
    x, t = calibration.x[:7], calibration.t[:7]
    expected = predicted(network, x, t)
    given = denoiser(graph, "fp32")(x, t)
    assert given.dtype == torch.float32 and given.shape == x.shape
    assert mean_square(given - expected) < 1e-10 * mean_square(expected)


def test_an_image_does_not_depend_on_its_batch(graph, calibration):
    x, t = calibration.x, calibration.t
    denoise = denoiser(graph, "fp32")
    whole = denoise(x[:8], t[:8])
    assert torch.equal(denoise(x[:3].contiguous(), t[:3]), whole[:3])  # filled up to eight
    channels_last = x[5:8].to(memory_format=torch.channels_last)
    assert torch.equal(denoise(channels_last, t[5:8]), whole[5:8])
    assert len(denoise(x[:9], t[:9])) == 9


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_codes_are_those_of_the_packed_model(network, model, calibration, kept, fmt):
    packed = model.quantize(layer_weights(model.state), fmt, {"label": "Uniform"})
    if fmt == "int8":
        graph = integer_graph(packed.network(), calibration, stored_integers(packed))
    else:
        graph = kept[1].clone()
        set_integers(graph, packed.network(), stored_integers(packed), channel_axes(network))
    found = codes_of(graph)
    names = [name for name, stored in packed.formats.items() if stored == fmt]
    assert len(names) == 34 and found.keys() - set(names) == {
        f"{name}.weight" for name in ("shallow_conv", "late_conv", "output_conv")
    }
    for name in names:
        expected = unpack_codes(packed.stored[name], bits(fmt), packed.state[name].shape)
        assert np.array_equal(found[name][0], expected.numpy()), name
        assert np.array_equal(found[name][1], packed.stored[f"{name}:scale"].numpy()), name
    assert ("int4" in (decoding_note(packed) or "")) == (fmt == "int4")


@pytest.mark.parametrize("by_rows", [False, True])
def test_entropy_codes_that_fit_are_kept_as_they_are(network, model, by_rows):
    weights, steps = layer_weights(model.state), dict.fromkeys(model.state, 0.01)
    if by_rows:
        for name, (shape, axis) in tensor_shapes(model.config).items():
            if len(shape) > 1:
                steps[name] = stored_steps(along(0.01 * np.exp2(np.arange(shape[axis]) % 5 / 8), axis, len(shape)))
    codes = {name: (w.numpy() / steps[name]).round().astype(np.int64) for name, w in model.state.items()}
    codes[weights[1]].flat[0] = 128  # one beyond 8 bits
    coded = coded_model(model, entropy.encode(codes, steps), {"label": "Budget"})
    found = stored_integers(coded)
    assert "entropy-coded" in decoding_note(coded)
    for name, weight in coded.state.items():
        fits = weight.dim() > 1 and abs(codes[name]).max() <= 127
        assert (name in found) == fits
        if fits:
            assert np.array_equal(found[name].codes.numpy(), codes[name])
            assert torch.equal(found[name].dequantize(), weight)


def test_every_convolution_and_linear_layer_runs_in_8_bits_and_nothing_else(network, kept, calibration):
    _, graph, costs = kept
    products = {
        name for name, module in network.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Linear)
    }  # fmt: skip
    assert integer_layers(graph).keys() == layer_operations(graph).keys() == costs.keys() == products
    assert sum(operation.get_type_name() == "FakeQuantize" for operation in graph.get_ops()) == len(products)
    x, t = calibration.x, calibration.t
    expected = predicted(network, x, t)
    error = mean_square(denoiser(graph, "int8")(x, t) - expected) / mean_square(expected)
    assert 1e-6 < error < 5e-3
    (compiled,) = [compile_graph(graph, "int8", (4, 1, 32, 32))]
    kinds = [op.get_rt_info()["runtimePrecision"] for op in compiled.get_runtime_model().get_ops()
             if op.get_rt_info()["layerType"] in ("Convolution", "FullyConnected", "Deconvolution")]  # fmt: skip
    assert {str(getattr(kind, "value", kind)) for kind in kinds} <= {"u8", "i8"} and kinds


def test_an_output_bias_is_added_and_takes_no_8_bits(network, model, calibration, kept):
    biased = UNet(replace(network.config, output_bias=2, output_contrast=True)).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in biased.output_bias.parameters():
        parameter.data.normal_(generator=generator)
    biased.load_state_dict(network.state_dict(), strict=False)
    x, t = calibration.x[:9], calibration.t[:9]
    expected = predicted(biased, x, t)
    assert mean_square(predicted(network, x, t) - expected) > 0.1 * mean_square(expected)
    given = denoiser(convert(biased, calibration.x, calibration.t), "fp32")(x, t)
    assert mean_square(given - expected) < 1e-10 * mean_square(expected)
    packed = full_precision(biased.config, biased.state_dict(), {"label": "m"}).quantize(
        ["output_bias.maps"], "int8", {}
    )
    graph = integer_graph(biased, calibration, stored_integers(packed))
    assert integer_layers(graph).keys() == integer_layers(kept[1]).keys()
    assert mean_square(denoiser(graph, "int8")(x, t) - expected) < 5e-3 * mean_square(expected)


def test_layers_that_are_left_have_the_weights_of_the_network(network, kept, calibration):
    _, graph, costs = kept
    all_left = graph.clone()
    restore_layers(all_left, network, costs)
    x, t = calibration.x[:4], calibration.t[:4]
    expected = predicted(network, x, t)
    assert mean_square(denoiser(all_left, "fp32")(x, t) - expected) < 1e-10 * mean_square(expected)
    part = graph.clone()
    restore_layers(part, network, ["late_conv"])
    assert integer_layers(part).keys() == costs.keys() - {"late_conv"}


@exact
def test_costs_are_the_errors_that_each_layer_alone_brings(network, kept, calibration, monkeypatch):
    """Brute force: the graph with one layer in 8 bits against FP32, on the images that the costs are of."""
    _, graph, once = kept
    x, t = calibration.x, calibration.t
    monkeypatch.setattr(costs_module, "IMAGES", 400)
    monkeypatch.setattr(costs_module, "BATCH", 100)
    assert calibration.variance > 2  # so that weights of the variance 1 would show
    of_all = x.repeat(10, 1, 1, 1), t.repeat(10), calibration.variance
    costs = layer_costs(network, graph, *of_all)  # with 10 draws of signs for each
    assert sorted(costs) == sorted(once) and max(costs, key=costs.get) == max(once, key=once.get)
    expected = predicted(network, x, t)
    weights = torch.tensor(Schedule().image_weights(t.tolist(), calibration.variance))
    measured = {}
    for name in list(costs)[:2] + list(costs)[-1:]:
        alone = graph.clone()
        restore_layers(alone, network, costs.keys() - {name})
        squares = (denoiser(alone, "fp32")(x, t) - expected).double().square().flatten(1).mean(1)
        measured[name] = float((squares * weights).sum() / weights.sum())
    assert [costs[name] for name in measured] == pytest.approx(list(measured.values()), rel=0.4)
    assert list(once.values()) == sorted(once.values(), reverse=True)


def test_the_fewest_layers_that_bring_a_share_of_the_error():
    costs = {"b": 6.0, "c": 3.0, "a": 1.0}
    assert most_costly(costs, 0.5) == ["b"] and most_costly(costs, 0.8) == ["b", "c"]
    assert most_costly(costs, 1.0) == ["b", "c", "a"]
    assert left_layers(costs, "int8") == [] and left_layers(costs, "mixed 2") == ["b", "c"]
    assert left_layers(costs, "mixed") == most_costly(costs)


def test_fake_quantized_is_the_nearest_level(kept):
    a = torch.tensor([-9.0, -0.49, 0.26, 2.0])
    assert fake_quantized(a, -1.0, 1.0, 5).tolist() == [-1.0, -0.5, 0.5, 1.0]
    assert all(low < high and levels == 256 for low, high, levels in input_ranges(kept[1]).values())


def test_calibration_is_of_the_timesteps_that_the_sampler_meets(images):
    twice = [noised_images(images, Schedule(), 5, "noise") for _ in range(2)]
    assert torch.equal(twice[0].x, twice[1].x) and torch.equal(twice[0].t, twice[1].t)
    met = Schedule().spaced_timesteps(5)
    assert {int(t): int((twice[0].t == t).sum()) for t in twice[0].t.unique()} == dict.fromkeys(sorted(met), 8)


def test_a_kept_graph_is_read_back_and_a_damaged_one_made_anew(network, model, calibration, kept, capsys, monkeypatch):
    folder, graph, costs = kept
    (path,) = folder.glob("openvino-int8-*")
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(calibrating, "integer_graph", lambda *_: pytest.fail("made anew"))
        _, again = kept_graph(folder, network, model.sha256, {}, calibration)
    assert again == costs and list(again) == list(costs) and capsys.readouterr().out == ""
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    kept_graph(folder, network, model.sha256, {}, calibration)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and path.name in printed and "anew" in printed
    tensors, about = sealed.load(path, "openvino")
    for nonsense in (
        ({"graph": torch.zeros(9, dtype=torch.uint8)}, {}),
        ({}, {"costs": about["costs"] | {"no layer": 1.0}}),
    ):
        sealed.save(path, "openvino", tensors | nonsense[0], about | nonsense[1])
        kept_graph(folder, network, model.sha256, {}, calibration)
        assert "anew" in capsys.readouterr().out
    remade, costs_remade = kept_graph(folder, network, model.sha256, {}, calibration)
    assert costs_remade == costs
    x, t = calibration.x[:4], calibration.t[:4]
    assert torch.equal(denoiser(remade, "int8")(x, t), denoiser(graph, "int8")(x, t))
    with pytest.raises(ZeroDivisionError):  # of other images it is made anew
        monkeypatch.setattr(calibrating, "integer_graph", lambda *_: 1 / 0)
        kept_graph(folder, network, model.sha256, {}, replace(calibration, name="others"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "mixed", "mixed 2"])
def test_images_are_near_those_of_torch_and_timed(network, model, images, kept, tmp_path, precision):
    sampling = Sampling(5, "dpm++", 5, 1.0, 2, 0, "cpu", "fp32")
    by_torch = generate(network, "w", sampling, torch.device("cpu"), tmp_path, "torch")
    prepare = OpenVINO(images, "noise", kept[0]).prepare(model.sha256, {})
    times: list[float] = []
    sampling = replace(sampling, precision=precision, engine="openvino")
    made = generate(network, "w", sampling, torch.device("cpu"), tmp_path, "ov", prepare, times.append)
    assert made.shape == by_torch.shape and made.dtype == torch.uint8
    error = mean_square(made.float() - by_torch.float()) ** 0.5
    assert error < {"fp32": 0.2, "bf16": 12}.get(precision, 40)
    if precision not in ("fp32", "bf16"):
        graph = OpenVINO(images, "noise", kept[0]).graph(network, model.sha256, {}, sampling)
        assert integer_layers(graph).keys() == integer_layers(kept[1]).keys() - left_layers(kept[2], precision)
    assert len(times) == 3 + 4 and all(0 < seconds < 10 for seconds in times)  # whole batches, after the first steps


def test_without_the_packages_one_line_says_so(monkeypatch):
    monkeypatch.setattr(engine_module, "installed_version", lambda package: None if package == "nncf" else "1")
    with pytest.raises(UserError, match=r"^--engine openvino: nncf .*requirements-openvino\.txt"):
        engine_name("openvino", "int8", "mnist")
    assert engine_name("torch", "fp32", "mnist") == "torch"
    assert engine_name("openvino", "fp32", "mnist").startswith("openvino ")


@pytest.mark.parametrize("saturates", [True, False])
def test_rows_of_a_cpu_that_cuts_off_sums_say_so(monkeypatch, saturates):
    monkeypatch.setattr("common.engines.engine.sums_saturate", lambda: saturates)
    monkeypatch.setattr("common.engines.engine.has_bfloat16", lambda: True)
    for precision in ("int8", "mixed", "mixed 3"):
        assert engine_name("openvino", precision, "mnist").endswith(" on mnist, sums of 16 bits") == saturates
        assert warning(precision).startswith(f"--precision {precision}: this CPU has no VNNI") == saturates
    assert "16 bits" not in engine_name("openvino", "bf16", "mnist") and not warning("bf16") and not warning("fp32")


@pytest.mark.parametrize("there", [True, False])
def test_rows_of_a_cpu_without_bfloat16_say_so(monkeypatch, there):
    monkeypatch.setattr("common.engines.engine.sums_saturate", lambda: False)
    monkeypatch.setattr("common.engines.engine.has_bfloat16", lambda: there)
    for precision in ("bf16", "int8", "mixed", "mixed 3"):
        assert engine_name("openvino", precision, "mnist").endswith(", no bfloat16") != there
    assert "bfloat16" not in engine_name("openvino", "fp32", "mnist")
    assert warning("bf16").startswith("--precision bf16: this CPU has no bfloat16") != there


def test_bfloat16_is_there_where_products_are_rounded_to_it(network, graph, calibration):
    x, t = calibration.x[:7], calibration.t[:7]
    expected = predicted(network, x, t)
    error = mean_square(denoiser(graph, "bf16")(x, t) - expected) / mean_square(expected)
    assert 1e-7 < error < 1e-3 if has_bfloat16() else error < 1e-10


@exact
def test_a_network_of_diffusers_in_colour(tmp_path):
    pytest.importorskip("diffusers")
    from common.ddpm.architecture import build
    from common.ddpm.pipelines import DiffusersConfig

    unet = {
        "sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": [8, 16], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4, "attention_head_dim": 8,
    }  # fmt: skip
    network = build(DiffusersConfig.of(unet)).eval()
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    engine, device = OpenVINO(images, "noise", tmp_path), torch.device("cpu")
    x, t = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([5, 500, 999])
    expected = predicted(network, x, t)
    for precision, low, high in (("fp32", 0, 1e-10), ("int8", 1e-7, 1e-2)):
        sampling = Sampling(3, "ddim", 2, 0.0, 3, 0, "cpu", precision, "openvino")
        given = engine.prepare("w", {})(network, sampling, device)(x, t)
        assert low <= mean_square(given - expected) / mean_square(expected) < high, precision
    assert len(engine.graph(network, "w", {}, sampling).inputs) == 2
