"""What finetuning learns from."""

import pytest
import torch
from torch import nn

from common.ddpm.digits import typical_variance
from common.ddpm.schedule import Schedule
from common.training.finetune_inputs import IMAGES, STEPS, joined, noised_digits, sample_states, sampled_states

SCHEDULE = Schedule()


class Blank(nn.Module):
    """Knows that all images are zero."""

    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.from_numpy((1 - SCHEDULE.alphas_cumprod) ** -0.5).float())

    def forward(self, x, t):
        return x * self.share[t][:, None, None, None]


BLANK = Blank()


def equal(batch, other):
    return [torch.equal(a, b) for a, b in zip(batch, other, strict=True)]


def mean_timestep(variance):
    weights = torch.tensor(SCHEDULE.image_weights(list(range(1000)), variance))
    return float((weights * torch.arange(1000)).sum() / weights.sum())


def test_noised_digits_follow_from_seed_and_update_and_timesteps_from_their_weight_in_the_image():
    digits = torch.randn(500, 1, 32, 32)
    variance = typical_variance(digits)
    draw, again, other = (noised_digits(BLANK, digits, SCHEDULE, 64, seed, "fp32", variance) for seed in (0, 0, 1))
    assert all(equal(draw(3), again(3)))
    assert not any(equal(draw(3), other(3))) and not any(equal(draw(3), draw(4)))
    timesteps = torch.cat([draw(i)[1] for i in range(100)])
    assert len(timesteps) == 6400
    assert abs(timesteps.double().mean() - mean_timestep(variance)) < 3


def test_states_have_the_noise_of_their_timesteps_and_follow_from_seed_and_turn():
    """The marginal distribution at timestep t of images that are zero is N(0, 1 - abar)."""
    shape = (STEPS, IMAGES, 1, 8, 8)
    states, outputs = sample_states(BLANK, SCHEDULE, shape[2:], STEPS, 0, 0, "fp32")
    assert states.shape == outputs.shape == shape
    expected = torch.from_numpy(1 - SCHEDULE.alphas_cumprod[SCHEDULE.spaced_timesteps(STEPS)])
    assert states.double().square().mean((1, 2, 3, 4)) == pytest.approx(expected, rel=0.25)  # of 2048 numbers each
    for turn, seed in ((1, 0), (0, 1)):
        assert not torch.equal(sample_states(BLANK, SCHEDULE, shape[2:], STEPS, turn, seed, "fp32")[0], states)


def test_states_come_with_their_own_timesteps_which_are_as_dense_as_they_weigh():
    draw = sampled_states(BLANK, SCHEDULE, (1, 4, 4), 32, 0, "fp32", variance=7.0)
    batches = [draw(i) for i in range(30)]
    for x, t, outputs in batches:
        assert x.shape == outputs.shape == (32, 1, 4, 4)
        assert torch.allclose(outputs, BLANK(x, t))  # of another timestep they would be others
    timesteps = torch.cat([t for _, t, _ in batches])
    assert set(timesteps.tolist()) <= set(SCHEDULE.spaced_timesteps(STEPS))
    assert abs(timesteps.double().mean() - mean_timestep(7.0)) < 5


def test_states_of_an_update_are_the_same_wherever_finetuning_resumes():
    first, second = (sampled_states(BLANK, SCHEDULE, (1, 4, 4), 32, 0, "fp32") for _ in range(2))
    of_first = [first(i) for i in range(25)]
    assert all(equal(second(24), of_first[24])) and all(equal(second(3), of_first[3]))
    met = [x for x, _, _ in of_first]
    of_turns = torch.cat(met[:20]).unique(dim=0), torch.cat(met[20:]).unique(dim=0)  # 20 updates share 32 x 20 states
    assert len(torch.cat(of_turns).unique(dim=0)) == len(of_turns[0]) + len(of_turns[1])


def test_joined_draws_stand_one_after_the_other():
    draws = [noised_digits(BLANK, torch.randn(9, 1, 2, 2), SCHEDULE, n, n, "fp32") for n in (3, 5)]
    parts = [draw(4) for draw in draws]
    assert all(equal(joined(*draws)(4), [torch.cat(pair) for pair in zip(*parts, strict=True)]))
