"""What finetuning shows to the network."""

import pytest
import torch
from torch import nn

from common.ddpm.digits import typical_variance
from common.ddpm.schedule import Schedule
from common.training import finetune_inputs
from common.training.finetune_inputs import BATCH, STEPS, sample_states, sampler_of_digits, with_states


def test_draws_follow_from_the_seed_and_timesteps_from_their_weight_in_the_image():
    digits, schedule = torch.randn(500, 1, 32, 32), Schedule()
    variance = typical_variance(digits)
    draw, again, other = (sampler_of_digits(digits, schedule, seed, variance) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(draw(3), again(3), strict=True))
    assert not torch.equal(draw(3)[0], other(3)[0]) and not torch.equal(draw(3)[0], draw(4)[0])
    timesteps = torch.cat([draw(i)[1] for i in range(100)])
    assert len(timesteps) == 100 * BATCH
    weights = torch.tensor(schedule.image_weights(list(range(1000)), variance))
    expected = float((weights * torch.arange(1000)).sum() / weights.sum())
    assert abs(timesteps.double().mean() - expected) < 3


class Blank(nn.Module):
    """Knows that all images are zero."""

    def __init__(self, schedule):
        super().__init__()
        self.share = nn.Parameter(torch.from_numpy((1 - schedule.alphas_cumprod) ** -0.5).float())

    def forward(self, x, t):
        return x * self.share[t][:, None, None, None]


def test_states_have_the_noise_of_their_timesteps_and_follow_from_the_seed(monkeypatch):
    """The marginal distribution at timestep t of images that are zero is N(0, 1 - abar)."""
    schedule = Schedule()
    network = Blank(schedule)
    timesteps, states = sample_states(network, schedule, (1, 8, 8), 10, 0, "fp32")
    assert timesteps.tolist() == schedule.spaced_timesteps(STEPS)
    assert states.shape == (STEPS, 10 * BATCH // 2 // STEPS, 1, 8, 8)
    expected = torch.from_numpy(1 - schedule.alphas_cumprod[timesteps.numpy()])
    assert states.double().square().mean((1, 2, 3, 4)) == pytest.approx(expected, rel=0.25)  # of 1024 numbers each
    monkeypatch.setattr(finetune_inputs, "AT_ONCE", 5)
    assert torch.equal(sample_states(network, schedule, (1, 8, 8), 10, 0, "fp32")[1], states)
    assert not torch.equal(sample_states(network, schedule, (1, 8, 8), 10, 1, "fp32")[1], states)
    monkeypatch.setattr(finetune_inputs, "KEPT_BYTES", 3 * STEPS * 256 + 1)
    assert sample_states(network, schedule, (1, 8, 8), 10, 0, "fp32")[1].shape[1] == 3


def test_half_of_a_batch_are_states_at_their_own_timesteps():
    schedule = Schedule()
    draw = sampler_of_digits(torch.zeros(9, 1, 2, 2), schedule, 0)
    timesteps = torch.tensor(schedule.spaced_timesteps(STEPS))
    states = (1000.0 + timesteps)[:, None, None, None, None].expand(-1, 4, 1, 2, 2)
    mixed = with_states(draw, timesteps, states, 0)
    kept = draw(5)
    for i in range(20):
        x, t = mixed(i)
        drawn, at = draw(i)
        of_states = x[:, 0, 0, 0] > 500
        assert int(of_states.sum()) == BATCH // 2
        assert torch.equal(x[of_states, 0, 0, 0], 1000.0 + t[of_states])
        assert int((t - at)[of_states].abs().max()) <= 49  # timesteps of states: 49, 99, .. 999
        assert torch.equal(x[~of_states], drawn[~of_states]) and torch.equal(t[~of_states], at[~of_states])
    assert all(torch.equal(a, b) for a, b in zip(draw(5), kept, strict=True))  # `mixed` left them alone
