"""Finetuning on a network whose best codes are known."""

import pytest
import torch
from torch import nn

from common.ddpm.schedule import Schedule
from common.runtime import sealed
from common.training import finetune as finetuning
from common.training.finetune import BATCH, finetune, sampler_of_digits


class Scale(nn.Module):
    """a x"""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([a]))

    def forward(self, x, t):
        return self.a * x


def run(network, start, step, updates, path):
    draw = sampler_of_digits(torch.randn(20, 1, 32, 32, generator=torch.Generator().manual_seed(0)), Schedule(), 0)
    return finetune(network, {"a": torch.tensor([start])}, {"a": step}, draw, Schedule(), updates, "fp32", path)


def test_a_code_moves_to_where_the_prediction_is_again_that_of_the_network(monkeypatch, tmp_path):
    monkeypatch.setattr("common.training.finetune.PEAK_RATE", 0.1)
    network = Scale(0.24)
    latent = run(network, 0.7, 0.1, 150, tmp_path / "state")
    assert round(latent["a"].item() / 0.1) in (2, 3)
    assert network.a.item() == pytest.approx(0.24)  # what it learns from is left alone


def test_weights_that_lose_nothing_stay(tmp_path):
    assert run(Scale(0.5), 0.5, 0.25, 5, tmp_path / "state") == {"a": torch.tensor([0.5])}


def test_weights_start_in_the_cells_of_their_codes_on_the_side_of_the_networks_own(monkeypatch, tmp_path):
    monkeypatch.setattr("common.training.finetune.PEAK_RATE", 0.0)
    latent = [run(Scale(own), 0.7, 0.1, 1, tmp_path / f"{own}")["a"].item() for own in (0.9, 0.73, 0.5)]
    assert latent == pytest.approx([0.745, 0.73, 0.655])


def test_a_finetuning_that_was_stopped_ends_in_the_same_weights(monkeypatch, tmp_path):
    monkeypatch.setattr("common.training.finetune.SAVE_SECONDS", -1)
    whole = run(Scale(0.24), 0.7, 0.1, 20, tmp_path / "whole")

    def stop_at_10(i, updates, rate_factor=finetuning.rate_factor):
        if i == 10:
            raise KeyboardInterrupt
        return rate_factor(i, updates)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("common.training.finetune.rate_factor", stop_at_10)
        run(Scale(0.24), 0.7, 0.1, 20, tmp_path / "state")
    assert sealed.load(tmp_path / "state", "finetuning")[1]["updates"] == 10
    assert run(Scale(0.24), 0.7, 0.1, 20, tmp_path / "state") == whole
    assert run(Scale(0.24), 0.7, 0.1, 20, tmp_path / "state") == whole  # from the finished state


def test_a_weight_in_another_memory_format_resumes_to_the_same_bytes(monkeypatch, tmp_path):
    monkeypatch.setattr("common.training.finetune.SAVE_SECONDS", -1)
    draw = sampler_of_digits(torch.randn(20, 1, 32, 32, generator=torch.Generator().manual_seed(0)), Schedule(), 0)

    class Blocks(nn.Sequential):
        def forward(self, x, t):
            return super().forward(x)

    def finetuned(name, stop=None):
        torch.manual_seed(0)
        network = Blocks(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
        network.to(memory_format=torch.channels_last)
        weights = {name: (w.detach() / 0.1).round() * 0.1 for name, w in network.named_parameters()}
        formats = []

        def draw_or_stop(i):
            formats.append(i)
            if i == stop:
                raise KeyboardInterrupt
            return draw(i)

        steps = dict.fromkeys(weights, 0.1)
        return finetune(network, weights, steps, draw_or_stop, Schedule(), 8, "fp32", tmp_path / name)

    whole = finetuned("whole")
    with pytest.raises(KeyboardInterrupt):
        finetuned("stopped", stop=4)
    moments = []
    load_state = finetuning._load_state

    def watched(tensors, done, latent, optimizer):
        done = load_state(tensors, done, latent, optimizer)
        moments.extend(optimizer.state[u]["exp_avg"] for u in latent.values() if u.dim() == 4)
        return done

    monkeypatch.setattr("common.training.finetune._load_state", watched)
    resumed = finetuned("stopped")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert len(moments) == 2 and moments[0].is_contiguous(memory_format=torch.channels_last)


def test_the_key_differs_with_all_that_the_result_depends_on(monkeypatch):
    settings = {
        "network": "a" * 64, "weights": "b" * 64, "steps": {"w": 0.1}, "data": "mnist", "seed": 0,
        "precision": "fp32", "updates": 10,
    }  # fmt: skip
    others = {
        "network": "c" * 64, "weights": "c" * 64, "steps": {"w": 0.2}, "data": "mnist5k", "seed": 1,
        "precision": "bf16", "updates": 11,
    }  # fmt: skip
    keys = [finetuning.state_key(**settings), *(finetuning.state_key(**settings | {k: v}) for k, v in others.items())]
    for constant in ("METHOD_VERSION", "BATCH", "PEAK_RATE", "WARMUP", "INSIDE"):
        with monkeypatch.context() as patch:
            patch.setattr(finetuning, constant, 7)
            keys.append(finetuning.state_key(**settings))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        keys.append(finetuning.state_key(**settings))
    assert len(set(keys)) == len(keys) == 14
    assert finetuning.state_key(**settings) == keys[0]


GOOD = {
    "latent/a": torch.tensor([7.0]), "exp_avg/a": torch.zeros(1), "exp_avg_sq/a": torch.zeros(1),
    "step/a": torch.tensor(3.0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({**GOOD, "latent/b": torch.zeros(1)}, {}),
        ({**GOOD, "latent/a": torch.zeros(2)}, {}),
        ({**GOOD, "latent/a": torch.tensor([torch.nan])}, {}),
        ({key: GOOD[key] for key in ("latent/a", "exp_avg/a", "step/a")}, {}),
        (GOOD, {"updates": "3"}),
        (GOOD, {"updates": 6}),
        (GOOD, {"name": "another"}),
        (GOOD, {"more": 1}),
        (None, {}),
    ],
)
def test_a_state_that_is_not_this_finetunings_is_named_and_finetuning_begins_anew(tmp_path, capsys, tensors, metadata):
    whole, path = run(Scale(0.24), 0.7, 0.1, 5, tmp_path / "whole"), tmp_path / "state"
    if tensors is None:
        path.write_bytes(b"no state")
    else:
        sealed.save(path, "finetuning", tensors, {"updates": 3, "name": "state"} | metadata)
    assert run(Scale(0.24), 0.7, 0.1, 5, path) == whole
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line)
    assert str(path) in line and line.endswith("finetuning begins anew")
    assert sealed.load(path, "finetuning")[1]["updates"] == 5


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    factors = [finetuning.rate_factor(i, 100) for i in range(100)]
    assert factors[0] < 0.11 and max(factors) == factors[9] > 0.95 and factors[-1] < 1e-3


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
