"""Finetuning on a network whose best codes are known."""

import pytest
import torch
from torch import nn

from common.diffusion import Schedule
from common.finetune import BATCH, finetune, sampler_of_digits


class Scale(nn.Module):
    """a x"""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([a]))

    def forward(self, x, t):
        return self.a * x


def test_a_code_moves_to_where_the_prediction_is_again_that_of_the_network(monkeypatch):
    monkeypatch.setattr("common.finetune.PEAK_RATE", 0.1)
    network = Scale(0.24)
    draw = sampler_of_digits(torch.randn(20, 1, 32, 32), Schedule(), 0)
    latent = finetune(network, {"a": torch.tensor([0.7])}, {"a": 0.1}, draw, Schedule(), 150)
    assert round(latent["a"].item() / 0.1) in (2, 3)
    assert network.a.item() == pytest.approx(0.24)  # what it learns from is left alone


def test_weights_that_lose_nothing_stay():
    draw = sampler_of_digits(torch.randn(20, 1, 32, 32), Schedule(), 0)
    start = {"a": torch.tensor([0.5])}
    assert finetune(Scale(0.5), start, {"a": 0.25}, draw, Schedule(), 5) == start


def test_draws_follow_from_the_seed_and_timesteps_from_their_weight_in_the_image():
    digits, schedule = torch.randn(500, 1, 32, 32), Schedule()
    draw, again, other = (sampler_of_digits(digits, schedule, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(draw(3), again(3), strict=True))
    assert not torch.equal(draw(3)[2], other(3)[2]) and not torch.equal(draw(3)[2], draw(4)[2])
    timesteps = torch.cat([draw(i)[1] for i in range(100)])
    assert len(timesteps) == 100 * BATCH
    weights = torch.tensor(schedule.image_weights(list(range(1000))))
    expected = float((weights * torch.arange(1000)).sum() / weights.sum())
    assert abs(timesteps.double().mean() - expected) < 3
