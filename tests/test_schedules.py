"""Noise schedules and predictions beside diffusers' own."""

import inspect
import itertools

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm

from common.ddpm.architecture import schedule_of
from common.ddpm.pipelines import SCHEDULERS, DiffusersConfig, checked_scheduler
from common.ddpm.schedule import denoising_loss
from common.fisher.gauss_newton import gauss_newton, random_signs
from common.fisher.information import fisher_information

UNET = {"sample_size": 8, "block_out_channels": [4, 8], "norm_num_groups": 2, "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 4}  # fmt: skip
NOISES = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"beta_schedule": "laplace", "num_train_timesteps": 500},
    {"trained_betas": np.linspace(1e-3, 0.05, 100).tolist(), "num_train_timesteps": 100},
    {"rescale_betas_zero_snr": True},
    {"clip_sample": False},
    {"clip_sample_range": 2.0},
]
PREDICTIONS = ("epsilon", "v_prediction", "sample")
PAIRS = [
    (noise | {"prediction_type": prediction})
    for noise, prediction in itertools.product(NOISES, PREDICTIONS)
    if not (noise.get("rescale_betas_zero_snr") and prediction == "epsilon")
]


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if hasattr(diffusers, name)])
def test_entries_that_are_left_out_are_what_the_class_takes(name):
    defaults = inspect.signature(getattr(diffusers, name)).parameters
    for key, value in checked_scheduler({"_class_name": name}).items():
        assert key not in defaults or value == defaults[key].default, key


def ours(config: dict):
    return schedule_of(DiffusersConfig.of(UNET, {"_class_name": "DDPMScheduler"} | config))


def tensors(*seeds: int) -> list[torch.Tensor]:
    return [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def target_of(scheduler, x0, t, noise) -> torch.Tensor:
    kinds = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, t)}
    return kinds[scheduler.config.prediction_type]


@pytest.mark.parametrize("config", PAIRS, ids=str)
def test_noise_target_and_loss(config):
    theirs, schedule = DDPMScheduler(**config), ours(config)
    x0, noise = tensors(0, 1)
    t = torch.tensor([0, 1, schedule.timesteps // 2, schedule.timesteps - 1])
    noisy = theirs.add_noise(x0, noise, t)
    assert torch.allclose(schedule.add_noise(x0, t, noise), noisy, atol=3e-5)
    target = target_of(theirs, x0, t, noise)
    assert torch.allclose(schedule.target(x0, t, noise), target, atol=3e-5)
    loss = denoising_loss(lambda x, t: 0.5 * x, schedule, x0, t, noise)
    assert torch.allclose(loss, (0.5 * noisy - target).square().mean((1, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("config", [c for c in PAIRS if c.get("beta_schedule") not in ("sigmoid", "laplace")], ids=str)
def test_steps_of_ddim(config):
    x, output, fresh = tensors(2, 3, 4)
    schedule = ours(config)
    stride = schedule.timesteps // 50
    t = 40 * stride + 1
    theirs = DDIMScheduler(**config)
    theirs.set_timesteps(50)
    step = theirs.step(output, t, x, eta=0.7, use_clipped_model_output=True, variance_noise=fresh)
    assert torch.allclose(schedule.predict_x0(x, output, t), step.pred_original_sample, atol=2e-3, rtol=1e-3)
    assert torch.allclose(schedule.ddim_step(x, output, t, t - stride, 0.7, fresh), step.prev_sample, atol=3e-4)


@pytest.mark.parametrize("config", PAIRS, ids=str)
def test_steps_of_ddpm(config, monkeypatch):
    x, output, fresh = tensors(2, 3, 4)
    schedule = ours(config)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: fresh)
    theirs = DDPMScheduler(**config)
    for t, tolerance in (
        (0, 3e-4),
        (1, 3e-3),
        (schedule.timesteps * 4 // 5, 3e-4),
    ):  # 1 - abar loses digits in their float32 where it is small
        step = theirs.step(output, t, x)
        here = schedule.ddpm_step(x, output, t, fresh if t else 0 * x)
        assert torch.allclose(here, step.prev_sample, atol=tolerance)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_sampling_from_noise_alone_is_finite(prediction):
    schedule = ours({"rescale_betas_zero_snr": True, "prediction_type": prediction})
    x, output, fresh = tensors(5, 6, 7)
    first, second, third = schedule.spaced_timesteps(3)
    assert schedule.alphas_cumprod[first] == pytest.approx(0, abs=1e-12)
    x0 = schedule.predict_x0(x, output, first)
    after = schedule.dpm_step(x, x0, None, first, second, fresh)
    again = schedule.dpm_step(after, schedule.predict_x0(after, output, second), (first, x0), second, third, fresh)
    assert after.isfinite().all() and again.isfinite().all()
    assert schedule.ddim_step(x, output, first, second, 1.0, fresh).isfinite().all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_fisher_and_gauss_newton_values_are_those_of_autograd_on_the_loss_of_diffusers(prediction):
    from common.ddpm.architecture import build

    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction}
    architecture = DiffusersConfig.of(UNET, {"_class_name": "DDPMScheduler"} | config)
    torch.manual_seed(0)
    network, schedule, theirs = build(architecture).eval(), schedule_of(architecture), DDPMScheduler(**config)
    x0, noise = tensors(8, 9)
    t = torch.tensor([1, 250, 500, 900])
    values, _ = fisher_information(network, lambda net, *b: denoising_loss(net, schedule, *b), (x0, t, noise))
    expected = dict.fromkeys(values, 0.0)
    for i in range(4):
        network.zero_grad()
        one = slice(i, i + 1)
        output = network(theirs.add_noise(x0[one], noise[one], t[one]), t[one])
        (output - target_of(theirs, x0[one], t[one], noise[one])).square().mean().backward()
        for name, parameter in network.named_parameters():
            expected[name] += parameter.grad.square().mean().item() / 4
    largest = max(expected.values())
    assert values == pytest.approx(expected, rel=1e-2, abs=1e-6 * largest)
    output = lambda net, x0, t, noise: net(schedule.add_noise(x0, t, noise), t)  # noqa: E731
    curvature, _ = gauss_newton(network, output, (x0, t, noise), seed=3)
    expected, signs = dict.fromkeys(values, 0.0), random_signs(x0.shape, 3)
    for i in range(4):
        network.zero_grad()
        (
            network(theirs.add_noise(x0[i : i + 1], noise[i : i + 1], t[i : i + 1]), t[i : i + 1]) * signs[i]
        ).sum().backward()
        for name, parameter in network.named_parameters():
            expected[name] += parameter.grad.square().mean().item() / 4 / x0[0].numel()
    assert curvature == pytest.approx(expected, rel=1e-2, abs=1e-6 * max(expected.values()))


def test_an_error_weighs_as_it_moves_the_predicted_image():
    abar = ours({}).alphas_cumprod[[10, 500]]
    for prediction, moved in (("epsilon", (1 - abar) / abar), ("v_prediction", 1 - abar), ("sample", 1 + 0 * abar)):
        schedule = ours({"prediction_type": prediction, "clip_sample": False})
        x, output, error = tensors(0, 1, 2)
        for i, t in enumerate((10, 500)):
            change = schedule.predict_x0(x, output + error, t) - schedule.predict_x0(x, output, t)
            assert change.square().mean() / error.square().mean() == pytest.approx(moved[i], rel=1e-3)
        assert schedule.image_weights([10, 500]) == pytest.approx((moved * abar**2).tolist())
        share = 7 / (7 + (1 - abar) / abar)  # of images of variance 7, by Wiener's filter
        assert schedule.image_weights([10, 500], 7.0) == pytest.approx((moved * share**2).tolist())
