"""The mean error of a quantized network's output, in few maps: measured, coded, taken off."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.choose import rounding
from common.choose.feedback import no_feedback
from common.choose.output_bias import CONTRAST, MAPS, MIXTURE, MIXTURE_STEP, STEP, factor, lacking_contrast
from common.ddpm.architecture import described, schedule_of
from common.ddpm.digits import to_model_range
from common.ddpm.unet import OutputBias, UNet
from common.formats import entropy
from common.formats.packed import file_bytes, full_precision, load_model, save_model, tensor_shapes
from common.presets import UNetConfig
from common.study import codings, output_bias
from common.study.codings import EntropyCoding, FixedWidths, coded_model
from common.study.output_bias import OutputBiasFit, clipped_bias, measure_outputs, predict

TINY = UNetConfig(channels=(4, 8, 16, 32, 32, 24), groups=4, heads=2, dropout=0.0, timesteps=1000)
TIMESTEPS = torch.arange(49, TINY.timesteps, 50)  # of a sampler of 20 steps


def rounded(model, step=1e-3):
    """The model entropy-coded at fine steps."""
    return coded_model(model, rounding.encode(model.state, dict.fromkeys(model.state, step), price=0.0), {"label": "m"})


def in_int8(model):
    return model.quantize([n for n, s in model.state.items() if s.dim() > 1], "int8", {})


@pytest.fixture(scope="module")
def baseline():
    torch.manual_seed(0)
    return full_precision(TINY, UNet(TINY).state_dict(), {"label": "Baseline (FP32)"})


@pytest.fixture(scope="module")
def fit(baseline):
    inputs = torch.randn(OutputBias.GRID, 6, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    return OutputBiasFit(schedule_of(TINY), inputs, TIMESTEPS, predict(baseline.network(), inputs, TIMESTEPS, "test"))


def test_factors_of_a_known_product_give_it_back_to_half_a_step():
    rng = np.random.default_rng(0)
    of_time, of_pixels = rng.uniform(0.5, 1.5, (20, 1)), rng.normal(size=(1, 64))
    mean, error = of_time * of_pixels, np.full(20, 0.01)
    codes, steps = factor(mean, error, 1)
    assert codes[MAPS].shape == (1, 64) and codes[MIXTURE].shape == (20, 1)
    assert steps == {MAPS: pytest.approx(0.01), MIXTURE: MIXTURE_STEP}
    product = codes[MIXTURE] * steps[MIXTURE] @ (codes[MAPS] * steps[MAPS])
    largest = abs(of_pixels).max() * np.sqrt(np.square(of_time).mean())
    bound = 1.6 * steps[MAPS] * STEP / 2 + largest * MIXTURE_STEP / 2  # of the maps, and of the mixture
    assert abs(product - mean).max() < 1.05 * bound


def test_rows_of_large_error_count_little():
    mean = np.array([[1.0, 0.0], [0.0, 5.0]])  # over the root of its error 10 and 5
    codes, steps = factor(mean, np.array([0.01, 1.0]), 1)
    product = codes[MIXTURE] * steps[MIXTURE] @ (codes[MAPS] * steps[MAPS])
    assert product[0] == pytest.approx([1, 0], abs=0.8)  # maps in steps of the typical error, 0.7
    assert product[1] == pytest.approx([0, 0], abs=0.8)


def test_the_mixture_is_that_of_the_grid_and_interpolated_between():
    module = OutputBias(replace(TINY, output_bias=2))
    with torch.no_grad():
        module.maps[0], module.maps[1] = 1.0, 100.0
        module.mixture.copy_(torch.stack([torch.arange(1.0, 21.0), torch.zeros(20)], dim=1))
        module.mixture[-1, 1] = 1.0
        x, output = torch.randn(5, 1, 32, 32), torch.full((5, 1, 32, 32), 0.5)
        found = module(x, output, torch.tensor([0, 49, 99, 111, 999]))
    expected = [1.0, 1.0, 2.0, 2 + 12 / 50, 20.0 + 100.0]  # below the grid as at its first timestep
    assert torch.allclose(found, output + torch.tensor(expected)[:, None, None, None])


def test_contrast_scales_the_digits_that_the_output_implies():
    module, schedule = OutputBias(replace(TINY, output_bias=1, output_contrast=True)), schedule_of(TINY)
    schedule.clip = None
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 4, 1, 32, 32, generator=generator)
    with torch.no_grad():
        module.contrast.copy_(torch.arange(1, 21) / 40)  # 1 / 40 more each 50 timesteps
        level = schedule.noise_level
        between = level(74) * (1 / level(49) + 2 / level(99)) / 2 / 40  # of what is added to the noise
        below = level(0) / level(49) / 40
        for t, contrast in ((0, below), (49, 1 / 40), (74, between), (499, 10 / 40), (999, 20 / 40)):
            before, after = (schedule.predict_x0(x, of, t) for of in (output, module(x, output, torch.full((4,), t))))
            assert torch.allclose(after, (1 + contrast) * before, rtol=1e-4, atol=1e-3 * float(before.std())), t


def test_lacking_contrast_of_images_that_are_known_to_be_paler():
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(4000, 8))
    paler = 0.3 + 0.8 * (wanted - wanted.mean(0)) + 0.5 * rng.normal(size=(4000, 8))  # the noise has no part in it
    assert lacking_contrast(wanted, paler) == pytest.approx(0.25, abs=0.03)
    assert lacking_contrast(wanted, wanted) == 0 and lacking_contrast(wanted, 1.25 * wanted) == pytest.approx(
        -0.2, abs=1e-3
    )
    assert lacking_contrast(wanted, -wanted) == lacking_contrast(wanted, 0.1 * wanted) == 1.0  # the most
    assert lacking_contrast(np.ones((3, 8)), rng.normal(size=(3, 8))) == 0


def test_a_network_without_it_is_as_before():
    assert UNet(TINY).output_bias is None and not any("output_bias" in name for name in tensor_shapes(TINY))
    assert not {"output_bias", "output_contrast"} & described(TINY).keys()
    assert CONTRAST not in tensor_shapes(replace(TINY, output_bias=1))
    assert "output_contrast" not in described(replace(TINY, output_bias=1))


@pytest.mark.parametrize(("maps", "contrast"), [(0, True), (2, 1), (2, None), (2, "yes")])
def test_contrasts_that_make_no_network(maps, contrast):
    with pytest.raises(ValueError, match="output_contrast"):
        replace(TINY, output_bias=maps, output_contrast=contrast)


@pytest.mark.parametrize("count", [-1, 65, 1.5, True])
def test_numbers_of_maps_that_make_no_network(count):
    with pytest.raises(ValueError, match="output_bias"):
        replace(TINY, output_bias=count)


@pytest.mark.parametrize("of", [rounded, in_int8])
def test_a_known_shift_is_taken_off(of, baseline, fit):
    """The output's own bias is off by 0.5 at all timesteps, so the correction is 0.5 everywhere."""
    off = dict(baseline.state) | {"output_conv.bias": baseline.state["output_conv.bias"] + 0.5}
    model = of(full_precision(TINY, off, baseline.metadata))
    corrected = fit.correct(model, 2)
    assert corrected.config == replace(TINY, output_bias=2, output_contrast=True)
    assert replace(fit, contrast=False).correct(model, 2).config == replace(TINY, output_bias=2)
    for name, weight in model.state.items():
        assert torch.equal(corrected.state[name], weight)
    before = predict(model.network(), fit.inputs, TIMESTEPS, "test") - fit.outputs
    after = predict(corrected.network(), fit.inputs, TIMESTEPS, "test") - fit.outputs
    assert before.mean() == pytest.approx(0.5, abs=0.02)
    assert abs(after.mean()) < 0.02 and after.square().mean() < 0.01 * before.square().mean()


@pytest.mark.parametrize("of", [rounded, in_int8])
def test_paler_digits_get_their_contrast_back(of, baseline):
    """What the model predicts has 0.8 of the contrast that is wanted, and is too dark by 0.1. At little noise alone,
    since elsewhere this network's digits are clipped."""
    model, schedule = of(baseline), schedule_of(TINY)
    generator = torch.Generator().manual_seed(1)
    inputs = 0.2 * torch.randn(OutputBias.GRID, 40, 1, 32, 32, generator=generator)
    outputs = predict(model.network(), inputs, TIMESTEPS, "test").clone()
    wanted = outputs.clone()
    for i, t in enumerate(TIMESTEPS.tolist()):
        x0 = (inputs[i] - schedule.noise_level(t) * outputs[i]) / (1 - schedule.noise_level(t) ** 2) ** 0.5
        wanted[i] -= (0.25 * (x0 - x0.mean(0)) + 0.1) / schedule.noise_ratio(t)
    corrected = OutputBiasFit(schedule, inputs, TIMESTEPS, wanted).correct(model, 3)
    assert corrected.state[CONTRAST][:2].tolist() == pytest.approx([0.25, 0.25], abs=0.02)
    found = predict(corrected.network(), inputs, TIMESTEPS, "test")
    before, after = ((of[:2] - wanted[:2]).square().mean() for of in (outputs, found))
    assert after < 0.1 * before


def test_it_is_measured_at_the_timesteps_of_the_mixture_on_training_digits(baseline):
    digits = torch.randint(0, 256, (9, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    run = SimpleNamespace(
        device=torch.device("cpu"), preset=SimpleNamespace(fisher_grid_digits=3), load_images={"train": digits}.get
    )
    measured = measure_outputs(run, baseline)
    assert measured.timesteps.tolist() == TIMESTEPS.tolist() and measured.inputs.shape == (20, 3, 1, 32, 32)
    x0 = to_model_range(digits).flatten(1)
    nearest = torch.cdist(measured.inputs[0].flatten(1), x0).min(1).values  # at the least noise
    assert (nearest < 0.5 * torch.cdist(x0, x0 + 2 * torch.eye(9, 1024)).mean()).all()
    assert not torch.equal(measured.inputs[0], measured.inputs[1])
    t = measured.timesteps[:1].expand(3)
    assert torch.allclose(measured.outputs[0], baseline.network()(measured.inputs[0], t), atol=1e-5)


@pytest.mark.parametrize("t", [49, 499, 999])
def test_errors_that_clipping_makes_one_sided_are_taken_off(t):
    """Of a digit that is -0.9 everywhere, errors of 0.2 make -0.7 and -1.1, clipped -1: on average -0.85 where it
    should be -0.9. So -0.1 is missing, for then they are -0.8 and -1."""
    schedule, x = schedule_of(TINY), torch.zeros(2, 1, 4, 4)
    signs = torch.tensor([1.0, -1.0])[:, None, None, None].expand_as(x)
    abar = float(schedule.alphas_cumprod[t])
    per_x0 = -((abar / (1 - abar)) ** 0.5)  # of the noise
    exact = torch.full_like(x, -0.9 * per_x0)
    found = clipped_bias(schedule, x, t, exact, exact + 0.2 * per_x0 * signs)
    assert torch.allclose(found / per_x0, torch.tensor(-0.1), atol=2e-4)


@pytest.mark.parametrize("of", [rounded, in_int8])
def test_corrected_files_are_read_again(of, baseline, fit, tmp_path):
    corrected = fit.correct(of(baseline), 3)
    save_model(tmp_path / "model.safetensors", corrected)
    read = load_model(tmp_path / "model.safetensors")
    assert (read.config, read.sha256) == (corrected.config, corrected.sha256)
    assert (tmp_path / "model.safetensors").stat().st_size == file_bytes(corrected)


def test_files_of_a_trellis_are_extended_without_a_change():
    generator = torch.Generator().manual_seed(0)
    weights = {"conv": torch.randn(16, 8, 3, 3, generator=generator), "bias": torch.randn(16, generator=generator)}
    feedback = {"conv": no_feedback(weights["conv"].shape)}
    stored = rounding.encode(weights, {"conv": 0.3, "bias": 0.01}, feedback, trellis=True)
    assert stored["entropy:layout"].max() > 0
    shapes = {name: weight.shape for name, weight in weights.items()}
    extended = entropy.extend(stored, shapes, {"more": np.array([[3, -2]])}, {"more": 0.5})
    decoded, former = entropy.decode(extended, shapes | {"more": torch.Size([1, 2])}), entropy.decode(stored, shapes)
    assert decoded["more"].tolist() == [[1.5, -1.0]]
    assert all(torch.equal(decoded[name], former[name]) for name in weights)


def test_a_file_with_a_correction_keeps_to_its_limit(baseline, fit, monkeypatch):
    monkeypatch.setattr(output_bias, "FILE_PER_MAP", 1)
    monkeypatch.setattr(codings, "BYTES_OF_A_MAP", 1)  # far too few at first
    values, limit = dict.fromkeys(baseline.state, 1.0), 20_000
    model = EntropyCoding(baseline, {}, bias=fit).fit(limit, values, {"label": "m"})
    assert model.config.output_bias == output_bias.MOST_MAPS
    assert 0.97 * limit < file_bytes(model) <= limit


def test_fixed_widths_leave_room_for_all_maps_and_are_rounded_once(baseline, fit, monkeypatch):
    monkeypatch.setattr(output_bias, "FILE_PER_MAP", 1)
    times, once = [], codings.make_in_turn
    monkeypatch.setattr(codings, "make_in_turn", lambda *given: times.append(None) or once(*given))
    coding, values = FixedWidths(baseline, bias=fit), dict.fromkeys(baseline.state, 1.0)
    least, most = coding.smallest({"label": "m"}), 2**20 * baseline.size_mib()
    limits = np.geomspace(least + 8_000, most, 4).astype(int).tolist()
    for limit in limits:
        model = coding.fit(limit, values, {"label": "m"})
        assert model.config.output_bias == output_bias.MOST_MAPS
        assert 0.98 * limit < file_bytes(model) <= limit
    assert len(times) == len(limits)
    assert coding.fit(least + 1_000, values, {"label": "m"}).config == TINY  # no room for maps


def test_a_file_has_as_many_maps_as_fit_beside_its_codes(baseline, fit):
    model = rounded(baseline, 0.01)
    sizes = [file_bytes(fit.correct(model, maps)) for maps in (1, 2, 3)]
    assert file_bytes(model) < sizes[0] < sizes[1] < sizes[2]
    for limit, maps in ((sizes[2], 3), (sizes[2] - 1, 2), (sizes[0], 1)):
        found = fit.correct(model, 3, limit)
        assert found.config.output_bias == maps and file_bytes(found) <= limit
    assert fit.correct(model, 3, sizes[0] - 1) is model


def test_a_model_without_an_error_has_maps_of_zeros(baseline, fit):
    model = rounded(baseline)
    same = replace(fit, outputs=predict(model.network(), fit.inputs, TIMESTEPS, "test"))
    corrected = same.correct(model, 1)
    assert corrected.state[MAPS].eq(0).all() and corrected.state[CONTRAST].eq(0).all()


def test_small_files_have_none(baseline, fit):
    model = EntropyCoding(baseline, {}, bias=fit).fit(20_000, dict.fromkeys(baseline.state, 1.0), {"label": "m"})
    assert model.config == TINY
