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
    monkeypatch.setattr("common.finetune.VECTOR_RATE", 0.01)
    network = Scale(0.24)
    draw = sampler_of_digits(torch.randn(20, 1, 32, 32), Schedule(), 0)
    tuned = finetune(network, {"a": torch.tensor([0.7])}, {"a": 0.1}, draw, Schedule(), 150)
    assert round(tuned["a"].item() / 0.1) in (2, 3)
    assert network.a.item() == pytest.approx(0.24)  # what it learns from is left alone


def test_weights_that_lose_nothing_stay():
    draw = sampler_of_digits(torch.randn(20, 1, 32, 32), Schedule(), 0)
    start = {"a": torch.tensor([0.5])}
    assert torch.equal(finetune(Scale(0.5), start, {"a": 0.25}, draw, Schedule(), 5)["a"], start["a"])


def test_a_weight_begins_at_its_code_on_the_side_of_the_networks_own():
    """Without updates, the codes; with one, those change first whose own weights lie beyond the middle."""
    draw = sampler_of_digits(torch.randn(20, 1, 32, 32), Schedule(), 0)
    for own, code, moved in ((0.56, 5, 6), (0.54, 5, 5), (0.44, 5, 4)):
        start = {"a": torch.tensor([code * 0.1])}
        assert finetune(Scale(own), start, {"a": 0.1}, draw, Schedule(), 0)["a"].item() == pytest.approx(code * 0.1)
        once = finetune(Scale(own), start, {"a": 0.1}, draw, Schedule(), 2)
        assert once["a"].item() == pytest.approx(moved * 0.1)


def test_draws_follow_from_the_seed_and_most_timesteps_from_their_weight_in_the_image():
    digits, schedule = torch.randn(500, 1, 32, 32), Schedule()
    draw, again, other = (sampler_of_digits(digits, schedule, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(draw(3), again(3), strict=True))
    assert not torch.equal(draw(3)[2], other(3)[2]) and not torch.equal(draw(3)[2], draw(4)[2])
    timesteps = torch.cat([draw(i)[1] for i in range(100)])
    assert len(timesteps) == 100 * BATCH
    weights = torch.tensor(schedule.image_weights(list(range(1000))))
    by_weight = float((weights * torch.arange(1000)).sum() / weights.sum())
    assert abs(timesteps.double().mean() - (0.75 * by_weight + 0.25 * 499.5)) < 3
