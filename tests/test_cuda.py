"""The same work on a GPU; skipped where there is none. TEST_DEVICE=cpu runs it without one, to check the tests."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.choose import rounding
from common.choose.feedback import measure_feedback
from common.ddpm import sampling as sampling_module
from common.ddpm.noise import NoiseStreams
from common.ddpm.samplers import sample
from common.ddpm.sampling import Sampling, generate
from common.ddpm.schedule import Schedule, denoising_loss
from common.ddpm.unet import UNet
from common.fisher.information import fisher_information
from common.presets import TrainingConfig
from common.runtime import device as device_module
from common.runtime.device import autocast, cast_weights, device_name, set_up_torch
from common.runtime.replay import WARM_UP, Replayed
from common.training import finetune as finetune_module
from common.training import loop
from common.training.finetune import finetune
from common.training.finetune_inputs import noised_digits
from common.training.loop import train

CPU = torch.device("cpu")
DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
on_gpu = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def torch_as_the_scripts_set_it_up():
    before = torch.are_deterministic_algorithms_enabled()
    set_up_torch()
    yield
    torch.use_deterministic_algorithms(before)


def images(network, device, indices=range(4), precision="fp32"):
    network = network.to(device, memory_format=torch.channels_last)
    cast_weights(network, precision)
    with autocast(device, precision):
        return sample(network, Schedule(), NoiseStreams(0, indices), "ddim", 5, 1.0, device).cpu()


def copy_of(network):
    copy = UNet(network.config).eval()
    copy.load_state_dict(network.state_dict())
    return copy


def test_cuda_is_set_up_to_sum_in_fp32_and_always_in_the_same_order(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", called.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(device_module.platform, "libc_ver", lambda: ("", ""))
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = True
    set_up_torch()
    assert called == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction
    assert not matmul.allow_fp16_accumulation


@on_gpu
def test_images_are_those_of_the_cpu_but_for_rounding(tiny_network):
    assert torch.allclose(images(copy_of(tiny_network), DEVICE), images(tiny_network, CPU), rtol=0, atol=1e-3)


@on_gpu
def test_an_image_does_not_depend_on_its_batch(tiny_network):
    together = images(tiny_network, DEVICE)
    for indices in ([2], [3, 1]):
        assert torch.allclose(images(tiny_network, DEVICE, indices), together[indices], rtol=0, atol=1e-3)


@on_gpu
def test_bf16_is_near_fp32_and_not_the_same(tiny_network):
    exact, rounded = images(copy_of(tiny_network), DEVICE), images(copy_of(tiny_network), DEVICE, precision="bf16")
    assert 0 < float((exact - rounded).square().mean()) < 1e-2
    assert torch.equal(images(copy_of(tiny_network), DEVICE, precision="bf16"), rounded)


@on_gpu
def test_kept_images_are_on_the_cpu_and_sampled_once(tiny_network, tmp_path, monkeypatch):
    sampling = Sampling(5, "ddim", 2, 1.0, 2, 0, device_name(DEVICE), "fp32")
    first = generate(copy_of(tiny_network), "weights", sampling, DEVICE, tmp_path / "one", "label")
    assert first.device == CPU and first.shape == (5, 32, 32)
    assert torch.equal(generate(copy_of(tiny_network), "weights", sampling, DEVICE, tmp_path / "other", "label"), first)
    monkeypatch.setattr(sampling_module, "sample", lambda *_, **__: pytest.fail("sampled again"))
    assert torch.equal(generate(copy_of(tiny_network), "weights", sampling, DEVICE, tmp_path / "one", "label"), first)


@on_gpu
def test_work_that_is_replayed_does_the_same_to_other_inputs():
    total, calls = torch.zeros(3, device=DEVICE), []

    def work(x, y):
        calls.append(x)
        total.add_(x)
        return x * y

    replayed = Replayed(work, DEVICE)
    for i in range(1, 7):
        x = torch.full((3,), float(i), device=DEVICE)
        assert replayed(x, x + 1).tolist() == [i * (i + 1)] * 3
    assert total.tolist() == [21] * 3
    assert len(calls) == (WARM_UP + 1 if DEVICE.type == "cuda" else 6)


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_training_ends_in_the_same_bytes(tiny_config, tmp_path, monkeypatch, precision):
    config = TrainingConfig(
        data="mnist5k", batch_size=4, steps=6, lr=1e-3, muon_lr=1e-3, warmup_steps=2, ema=0.9, image_share=0.5
    )
    digits = torch.randint(0, 256, (10, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = replace(tiny_config, dropout=0.1)

    class Stopped(Exception):
        pass

    def stop(step, ema):
        if step == 4:
            raise Stopped

    whole = train(UNet(network), config, digits, tmp_path / "whole", DEVICE, precision)
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    with pytest.raises(Stopped):
        train(UNet(network), config, digits, tmp_path / "stopped", DEVICE, precision, stop)
    resumed = train(UNet(network), config, digits, tmp_path / "stopped", DEVICE, precision)
    assert resumed[1] == whole[1]
    assert (tmp_path / "stopped").read_bytes() == (tmp_path / "whole").read_bytes()


@on_gpu
def test_resumed_finetuning_ends_in_the_same_weights(tiny_network, tmp_path, monkeypatch):
    network = copy_of(tiny_network).to(DEVICE)
    digits = torch.rand(20, 1, 32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 2 - 1
    draw = noised_digits(network, digits, Schedule(device=DEVICE), 8, 0, "fp32")
    steps = {name: 0.05 for name, _ in network.named_parameters()}
    weights = {name: (w.detach() / 0.05).round() * 0.05 for name, w in network.named_parameters()}

    def size(weights, steps):
        return sum(part.nbytes for part in rounding.encode(weights, steps, price=0.0).values())

    def finetuned(name, stop=None):
        def draw_or_stop(i):
            if i == stop:
                raise KeyboardInterrupt
            return draw(i)

        return finetune(network, weights, steps, draw_or_stop, size, 20_000, 20, "fp32", tmp_path / name)

    whole = finetuned("whole")
    monkeypatch.setattr(finetune_module, "SAVE_SECONDS", -1)
    with pytest.raises(KeyboardInterrupt):
        finetuned("stopped", stop=15)
    resumed = finetuned("stopped")
    assert resumed[1] == whole[1] and all(torch.equal(resumed[0][name], whole[0][name]) for name in whole[0])
    assert not all(torch.equal(whole[0][name], weights[name]) for name in weights)


@pytest.fixture
def samples():
    """Digits, timesteps and noise, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(6, 1, 32, 32, generator=generator) * 2 - 1
    return x0, torch.tensor([1, 100, 300, 500, 700, 999]), torch.randn(6, 1, 32, 32, generator=generator)


def loss(call, x0, t, noise):
    return denoising_loss(call, Schedule(), x0, t, noise)


@on_gpu
def test_fisher_information_is_that_of_the_cpu(tiny_network, samples):
    expected, errors = fisher_information(copy_of(tiny_network), loss, samples)
    there = tuple(s.to(DEVICE) for s in samples)
    values, their_errors = fisher_information(copy_of(tiny_network).to(DEVICE), loss, there)
    largest = max(expected.values())
    for name in expected:
        assert values[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-9 * largest)
        assert their_errors[name] == pytest.approx(errors[name], rel=1e-3, abs=1e-9 * largest)


def inverse_of(factor):
    """Of the damped second moment, in the columns' own order."""
    inverse, places = factor.upper.T @ factor.upper, np.argsort(factor.order)
    return inverse[np.ix_(places, places)]


@on_gpu
def test_feedback_is_that_of_the_cpu(tiny_network, samples):
    expected = measure_feedback(copy_of(tiny_network), loss, samples)
    there = tuple(s.to(DEVICE) for s in samples)
    for name, feedback in measure_feedback(copy_of(tiny_network).to(DEVICE), loss, there).items():
        # Columns of equal weight may change places, so what does not depend on the order is compared.
        assert feedback.gain == pytest.approx(expected[name].gain, rel=1e-2)
        for ours, theirs in zip(feedback.factors, expected[name].factors, strict=True):
            inverses = [inverse_of(factor) for factor in (ours, theirs)]
            assert np.abs(inverses[0] - inverses[1]).max() < 0.02 * np.abs(inverses[1]).max()
