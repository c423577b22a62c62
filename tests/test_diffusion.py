"""Schedule and samplers against diffusers on the same noise; noise streams; the training loss in closed form."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm

from common.ddpm.noise import NoiseStreams
from common.ddpm.samplers import sample
from common.ddpm.schedule import Schedule, denoising_loss

LINEAR = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.fixture
def ddpm():
    return DDPMScheduler(**LINEAR, variance_type="fixed_small", clip_sample=True, prediction_type="epsilon")


@pytest.fixture
def ddim():
    return DDIMScheduler(
        **LINEAR, clip_sample=True, set_alpha_to_one=True, timestep_spacing="trailing", prediction_type="epsilon"
    )


def in_float64(scheduler):
    """diffusers keeps a float32 schedule, whose 1 - abar is off by 6e-4 of itself at t = 0; its formulas are exact."""
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


class FakeDenoiser:
    """Noise that depends on the timestep alone, so that rounding is not fed back; large enough to be clipped."""

    def __init__(self, dtype=torch.float32):
        self.eps = torch.randn(1000, 1, 32, 32, generator=torch.Generator().manual_seed(7), dtype=dtype)

    def __call__(self, x, t):
        return self.eps[t]


def test_schedule_is_the_published_one(ddpm):
    schedule = Schedule()
    assert schedule.betas[0] == pytest.approx(1e-4, abs=1e-18)
    assert schedule.betas[-1] == pytest.approx(0.02, abs=1e-16)
    # float64 here, float32 in diffusers: a product of 1,000 factors differs by up to 1,000 roundings of 6e-8.
    np.testing.assert_allclose(schedule.alphas_cumprod, ddpm.alphas_cumprod.numpy(), rtol=6e-5)


def test_add_noise_equals_diffusers(ddpm):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.rand(6, 1, 32, 32, generator=generator) * 2 - 1, torch.randn(6, 1, 32, 32, generator=generator)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    expected = ddpm.add_noise(x0, noise, t)
    assert torch.allclose(Schedule().add_noise(x0, t, noise), expected, rtol=0, atol=1e-5)


def test_every_ddpm_step_equals_diffusers(ddpm, monkeypatch):
    """The whole chain, each side on its own x; the same noise."""
    schedule, network, ddpm = Schedule(), FakeDenoiser(torch.float64), in_float64(ddpm)
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 1, 32, 32, generator=generator, dtype=torch.float64)
    ddpm.set_timesteps(1000)
    assert ddpm.timesteps.tolist() == list(range(999, -1, -1))
    clipped = 0
    for t in range(999, -1, -1):
        noise = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, noise=noise, **__: noise)
        eps = network(ours, torch.full((2,), t))
        result = ddpm.step(eps, t, theirs)
        clipped += int((result.pred_original_sample.abs() == 1).any() and (result.pred_original_sample.abs() < 1).any())
        theirs = result.prev_sample
        ours = schedule.ddpm_step(ours, eps, t, noise)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10), t
    assert clipped > 500  # the chain went through steps where some pixels are clipped and others are not


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [10, 20, 50, 1000])
def test_every_ddim_step_equals_diffusers(ddim, steps, eta):
    schedule, network, ddim = Schedule(), FakeDenoiser(torch.float64), in_float64(ddim)
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 1, 32, 32, generator=generator, dtype=torch.float64)
    ddim.set_timesteps(steps)
    timesteps = schedule.spaced_timesteps(steps)
    assert timesteps == ddim.timesteps.tolist()
    for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
        eps = network(ours, torch.full((2,), t))
        noise = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
        result = ddim.step(eps, t, theirs, eta=eta, use_clipped_model_output=True, variance_noise=noise)
        theirs = result.prev_sample
        ours = schedule.ddim_step(ours, eps, t, t_next, eta, noise)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10), t


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_every_dpm_step_equals_diffusers(steps):
    """Given the same predicted digits, which diffusers does not clip to a fixed range."""
    schedule, network = Schedule(), FakeDenoiser(torch.float64)
    theirs_of = DPMSolverMultistepScheduler(
        **LINEAR,
        algorithm_type="sde-dpmsolver++",
        solver_order=2,
        prediction_type="sample",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        lower_order_final=False,
    )
    theirs_of.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)
    theirs_of.set_timesteps(steps)
    abar = torch.tensor([schedule.alphas_cumprod[t] for t in theirs_of.timesteps.tolist()] + [1.0], dtype=torch.float64)
    theirs_of.sigmas = ((1 - abar) / abar).sqrt()  # in float64; diffusers rounds them to float32
    timesteps = schedule.spaced_timesteps(steps)
    assert timesteps == theirs_of.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 1, 32, 32, generator=generator, dtype=torch.float64)
    before = None
    for t, t_next in zip(timesteps, [*timesteps[1:], -1], strict=True):
        x0 = schedule.predict_x0(ours, network(ours, torch.full((2,), t)), t)
        noise = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
        theirs = theirs_of.step(x0, t, theirs, variance_noise=noise).prev_sample
        ours, before = schedule.dpm_step(ours, x0, before, t, t_next, noise), (t, x0)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6), t


def test_first_dpm_step_is_that_of_ddim():
    schedule = Schedule()
    x, eps, noise = torch.randn(3, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t, t_next in ((999, 949), (500, 3)):
        first = schedule.dpm_step(x, schedule.predict_x0(x, eps, t), None, t, t_next, noise)
        assert torch.allclose(first, schedule.ddim_step(x, eps, t, t_next, 1.0, noise), rtol=0, atol=1e-9)


def test_sample_is_the_chain_of_diffusers_ddpm(ddpm, monkeypatch):
    """From `sample` itself: the first noise starts the chain, each later one belongs to one step."""
    network, steps = FakeDenoiser(), []
    ours = sample(network, Schedule(), NoiseStreams(3, [4, 9]), "ddpm", 1000, on_step=lambda: steps.append(1))
    streams = NoiseStreams(3, [4, 9])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: streams.draw())
    x = streams.draw()
    for t in range(999, -1, -1):
        x = ddpm.step(network(x, torch.full((2,), t)), t, x).prev_sample
    assert len(steps) == 1000
    assert torch.allclose(ours, x, rtol=0, atol=1e-4)


def test_sample_is_the_chain_of_diffusers_ddim(ddim):
    network, steps = FakeDenoiser(), []
    ours = sample(network, Schedule(), NoiseStreams(3, [4, 9]), "ddim", 20, on_step=lambda: steps.append(1))
    ddim.set_timesteps(20)
    x = NoiseStreams(3, [4, 9]).draw()
    for t in ddim.timesteps.tolist():
        x = ddim.step(network(x, torch.full((2,), t)), t, x, use_clipped_model_output=True).prev_sample
    assert len(steps) == 20
    assert torch.allclose(ours, x, rtol=0, atol=1e-4)


def test_sample_is_the_stochastic_chain_of_diffusers_ddim(ddim):
    network = FakeDenoiser()
    ours = sample(network, Schedule(), NoiseStreams(3, [4, 9]), "ddim", 20, eta=1.0)
    ddim.set_timesteps(20)
    streams = NoiseStreams(3, [4, 9])
    x = streams.draw()
    for t in ddim.timesteps.tolist():
        eps = network(x, torch.full((2,), t))
        result = ddim.step(eps, t, x, eta=1.0, use_clipped_model_output=True, variance_noise=streams.draw())
        x = result.prev_sample
    assert torch.allclose(ours, x, rtol=0, atol=1e-4)


def test_ddim_with_eta_one_over_all_steps_is_the_ancestral_sampler():
    """Song et al. 2021, section 4.1; where nothing is clipped, as here with x_0 well inside."""
    schedule = Schedule()
    x, eps, noise = torch.randn(3, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (1, 10, 500, 999):
        abar = schedule.alphas_cumprod[t]
        x_t = float(abar) ** 0.5 * x.clamp(-0.9, 0.9) + float(1 - abar) ** 0.5 * eps
        ours = schedule.ddim_step(x_t, eps, t, t - 1, 1.0, noise)
        assert torch.allclose(ours, schedule.ddpm_step(x_t, eps, t, noise), rtol=0, atol=1e-9), t


def test_a_denoiser_that_knows_the_digit_samples_it():
    """With the exact noise of one digit at every step, both samplers end in that digit."""
    schedule = Schedule()
    digit = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def network(x, t):
        abar = float(schedule.alphas_cumprod[int(t[0])])
        return (x - abar**0.5 * digit) / (1 - abar) ** 0.5

    for sampler, steps, eta in (("ddpm", 1000, 1.0), ("ddim", 7, 0.0), ("ddim", 7, 1.0), ("dpm++", 7, 1.0)):
        images = sample(network, schedule, NoiseStreams(0, range(2)), sampler, steps, eta)
        assert torch.allclose(images, digit.expand_as(images), rtol=0, atol=1e-4), sampler


def test_timesteps_at_even_places_follow_their_density():
    """Uniform: the t of numbered places; by image weight: counts in proportion to abar (1 - abar)."""
    schedule, places = Schedule(), (torch.arange(200_000) + 0.5) / 200_000
    assert torch.equal(schedule.timesteps_at(places, 0.0), torch.arange(200_000) // 200)
    abar = torch.from_numpy(schedule.alphas_cumprod)
    weights = abar * (1 - abar) / (abar * (1 - abar)).sum()
    for share in (1.0, 0.75):
        counts = schedule.timesteps_at(places, share).bincount(minlength=1000)
        assert (counts - 200_000 * (share * weights + (1 - share) / 1000)).abs().max() <= 1
    assert schedule.timesteps_at(torch.tensor([0.0, 1.0]), 0.75).tolist() == [0, 999]


def test_ddim_takes_any_number_of_steps(ddim):
    schedule = Schedule()
    assert schedule.spaced_timesteps(1) == [999]
    for steps in (3, 7, 30, 333):  # numbers that do not divide T
        ddim.set_timesteps(steps)
        assert schedule.spaced_timesteps(steps) == ddim.timesteps.tolist()
    assert schedule.spaced_timesteps(1000) == list(range(999, -1, -1))
    for steps in range(1, 1001):
        timesteps = schedule.spaced_timesteps(steps)
        assert len(timesteps) == steps
        assert timesteps[0] == 999
        assert timesteps[-1] >= 0
        assert all(a > b for a, b in pairwise(timesteps))


def test_noise_of_an_image_depends_on_seed_and_index_alone():
    together = NoiseStreams(5, range(6))
    first, second = together.draw(), together.draw()
    assert first.shape == (6, 1, 32, 32)
    for indices in ([3], [5, 3], [0, 3, 1]):
        streams = NoiseStreams(5, indices)
        assert torch.equal(streams.draw(), first[indices])
        assert torch.equal(streams.draw(), second[indices])


def test_noise_differs_between_seeds_indices_and_draws():
    streams, others = NoiseStreams(0, range(3)), NoiseStreams(1, range(3))
    draws = [*streams.draw(), *streams.draw(), *others.draw(), *others.draw()]
    correlations = np.corrcoef(np.stack([d.flatten().numpy() for d in draws])) - np.eye(len(draws))
    assert abs(correlations).max() < 5 / 32  # 5 standard errors of a correlation of 1,024 independent pairs


def test_every_seed_of_64_bits_has_its_own_noise():
    largest = 2**64 - 1
    draws = [NoiseStreams(seed, [i]).draw() for seed in (2**63, 2**63 + 1, largest) for i in (0, 1, largest)]
    assert len({draw.numpy().tobytes() for draw in draws}) == len(draws)
    # Small keys are what they were when given to numpy as a list.
    expected = np.random.Generator(np.random.Philox(key=[7, 3])).standard_normal((1, 32, 32), dtype=np.float32)
    assert np.array_equal(NoiseStreams(7, [3]).draw()[0], expected)


def test_noise_is_standard_normal():
    noise = NoiseStreams(0, range(200)).draw().double()
    n = noise.numel()
    assert abs(float(noise.mean())) < 5 / n**0.5
    assert abs(float(noise.square().mean()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float(noise.pow(4).mean()) - 3) < 5 * (96 / n) ** 0.5  # the variance of z^4 is 105 - 9


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 12), ("ddim", 6)])
@pytest.mark.parametrize("batches", [[1] * 7, [4, 3], [2, 5]])
def test_batches_do_not_matter(tiny_network, sampler, steps, batches):
    schedule = Schedule(12)
    starts = np.cumsum([0, *batches])

    def images(network, bounds):
        parts = [sample(network, schedule, NoiseStreams(0, range(a, b)), sampler, steps) for a, b in pairwise(bounds)]
        return torch.cat(parts)

    def pixelwise(x, t):
        return torch.sin(3 * x + t.view(-1, 1, 1, 1))

    assert torch.equal(images(pixelwise, starts), images(pixelwise, [0, 7]))
    # Convolutions sum in another order at another batch size: equal up to rounding.
    assert torch.allclose(images(tiny_network, starts), images(tiny_network, [0, 7]), rtol=0, atol=1e-4)


def test_images_differ_from_each_other(tiny_network):
    images = sample(tiny_network, Schedule(12), NoiseStreams(0, range(3)), "ddim", 5)
    assert all((images[a] - images[b]).abs().max() > 0.1 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_loss_of_closed_form_networks():
    schedule = Schedule()
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.rand(4, 1, 32, 32, generator=generator) * 2 - 1, torch.randn(4, 1, 32, 32, generator=generator)
    t = torch.tensor([0, 10, 500, 999])
    zero = denoising_loss(lambda x, t: torch.zeros_like(x), schedule, x0, t, noise)
    assert torch.allclose(zero, noise.square().mean((1, 2, 3)))
    assert torch.equal(denoising_loss(lambda x, t: noise, schedule, x0, t, noise), torch.zeros(4))
    # The network sees x_t and t: what it can solve for the noise with leaves no loss.
    abar = torch.from_numpy(schedule.alphas_cumprod)

    def solved(x, t):
        a = abar[t].view(-1, 1, 1, 1)
        return (x.double() - a.sqrt() * x0) / (1 - a).sqrt()

    assert denoising_loss(solved, schedule, x0, t, noise).max() < 1e-8
