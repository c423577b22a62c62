"""Finetuning on networks whose best codes are known."""

import math

import pytest
import torch
from torch import nn

from common.choose import rounding
from common.ddpm.schedule import Schedule
from common.runtime import sealed
from common.training import finetune as finetuning
from common.training import finetune_inputs, price, quantized
from common.training.finetune import finetune
from common.training.finetune_inputs import noised_digits


class Scale(nn.Module):
    """a x"""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([a]))

    def forward(self, x, t):
        return self.a * x


def digits_of(seed=0):
    return torch.randn(20, 1, 32, 32, generator=torch.Generator().manual_seed(seed))


def size(weights, steps):
    return sum(part.nbytes for part in rounding.encode(weights, steps, price=0.0).values())


def run(network, start, step, updates, path, limit=1000):
    """At a limit that is far above what one code takes, and so at no price."""
    draw = noised_digits(network, digits_of(), Schedule(), 64, 0, "fp32")
    weights, steps = {"a": torch.tensor([start])}, {"a": step}
    weights, steps = finetune(network, weights, steps, draw, size, limit, updates, "fp32", path)
    return weights["a"].item(), steps["a"]


def test_a_code_moves_to_where_the_prediction_is_again_that_of_the_network(monkeypatch, tmp_path):
    monkeypatch.setattr(finetuning, "RATE", 0.2)
    network = Scale(0.24)
    monkeypatch.setattr(finetuning, "STEP_RATE", 0.05)
    weight, step = run(network, 0.7, 0.1, 1000, tmp_path / "state")
    assert round(weight / step) * step == pytest.approx(0.24, abs=0.005)  # code 3, whose step has become 0.08
    assert network.a.item() == pytest.approx(0.24)  # what it learns from is left alone


def test_weights_that_lose_nothing_stay(tmp_path):
    assert run(Scale(0.5), 0.5, 0.25, 5, tmp_path / "state") == (0.5, 0.25)


class Matrix(nn.Module):
    """Its output is its weight times the input; so for white inputs the loss is the squared error of the weight."""

    def __init__(self, rows):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x, t):
        return (x.flatten(1) @ self.weight.T)[:, :, None, None]


def test_codes_of_a_gaussian_source_come_to_the_size_asked_for(monkeypatch, tmp_path):
    """And to within 0.6 bits of the rate-distortion bound, 2^(-2 bits); quantization that decides for each weight by
    itself comes to 0.25 bits (Gish & Pierce 1968)."""
    monkeypatch.setattr(finetuning, "RATE", 0.01)
    monkeypatch.setattr(finetuning, "STEP_RATE", 0.005)
    network, updates, limit = Matrix(64), 400, 1024  # 2 bits a weight; the start has 3.1
    own, step = network.weight.detach(), 0.5
    white = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert size({"weight": own}, {"weight": step}) > 1.5 * limit
    found, redundant = [], []
    for seed in range(3):
        draw = noised_digits(network, white, Schedule(), 64, seed, "fp32")
        start = ({"weight": own}, {"weight": step})
        weights, steps = finetune(network, *start, draw, size, limit, updates, "fp32", tmp_path / f"{seed}")
        found.append(size(weights, steps))
        codes = (weights["weight"] / steps["weight"]).round()
        error = float((steps["weight"] * codes - own).square().mean() / own.square().mean())
        redundant.append(8 * found[-1] / own.numel() + 0.5 * math.log2(error))
    assert 0.95 * limit < sorted(found)[1] < 1.05 * limit
    assert 0.2 < sorted(redundant)[1] < 0.6


def test_a_finetuning_that_was_stopped_ends_in_the_same_weights(monkeypatch, tmp_path):
    monkeypatch.setattr("common.training.finetune.SAVE_SECONDS", -1)
    whole = run(Scale(0.24), 0.7, 0.1, 20, tmp_path / "whole")

    def stop_at_15(i, updates, rate_factor=finetuning.rate_factor):
        if i == 15:
            raise KeyboardInterrupt
        return rate_factor(i, updates)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("common.training.finetune.rate_factor", stop_at_15)
        run(Scale(0.24), 0.7, 0.1, 20, tmp_path / "state")
    assert sealed.load(tmp_path / "state", "finetuning")[1]["updates"] == 10
    assert run(Scale(0.24), 0.7, 0.1, 20, tmp_path / "state") == whole
    assert run(Scale(0.24), 0.7, 0.1, 20, tmp_path / "state") == whole  # from the finished state


def test_a_weight_in_another_memory_format_resumes_to_the_same_bytes(monkeypatch, tmp_path):
    monkeypatch.setattr("common.training.finetune.SAVE_SECONDS", -1)
    white = torch.randn(20, 1, 32, 32, generator=torch.Generator().manual_seed(0))

    class Blocks(nn.Sequential):
        def forward(self, x, t):
            return super().forward(x)

    def finetuned(name, stop=None):
        torch.manual_seed(0)
        network = Blocks(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
        network.to(memory_format=torch.channels_last)
        draw = noised_digits(network, white, Schedule(), 64, 0, "fp32")
        weights = {name: (w.detach() / 0.1).round() * 0.1 for name, w in network.named_parameters()}
        formats = []

        def draw_or_stop(i):
            formats.append(i)
            if i == stop:
                raise KeyboardInterrupt
            return draw(i)

        steps = dict.fromkeys(weights, 0.1)
        return finetune(network, weights, steps, draw_or_stop, size, 300, 24, "fp32", tmp_path / name)[0]

    whole = finetuned("whole")
    with pytest.raises(KeyboardInterrupt):
        finetuned("stopped", stop=15)
    moments = []
    load_state = finetuning.load_state

    def watched(tensors, trained, optimizer):
        load_state(tensors, trained, optimizer)
        moments.extend(optimizer.state[u]["exp_avg"] for u in trained.latents.values() if u.dim() == 4)

    monkeypatch.setattr(finetuning, "load_state", watched)
    resumed = finetuned("stopped")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert len(moments) == 2 and moments[0].is_contiguous(memory_format=torch.channels_last)


def test_the_key_differs_with_all_that_the_result_depends_on(monkeypatch):
    settings = {
        "network": "a" * 64, "weights": "b" * 64, "steps": {"w": 0.1}, "data": "mnist", "seed": 0,
        "precision": "fp32", "updates": 10, "limit": 1000, "device": "cpu",
    }  # fmt: skip
    others = {
        "network": "c" * 64, "weights": "c" * 64, "steps": {"w": 0.2}, "data": "mnist5k", "seed": 1,
        "precision": "bf16", "updates": 11, "limit": 1001, "device": "a GPU",
    }  # fmt: skip
    keys = [finetuning.state_key(**settings), *(finetuning.state_key(**settings | {k: v}) for k, v in others.items())]
    constants = [(finetuning, name) for name in ("METHOD_VERSION", "RATE", "STEP_RATE", "WARMUP", "PARTS")]
    constants += [(finetuning, name) for name in ("REFRESH", "RECOUNT", "RECOUNT_WEIGHTS", "SPARE")]
    constants += [(finetune_inputs, name) for name in ("BATCH", "STATES", "SAMPLER", "STEPS", "IMAGES")]
    constants += [
        (price, "ABSENT"),
        (price, "PROPORTIONAL"),
        (price, "INTEGRAL"),
        (price, "RESPONSE"),
        (price, "FARTHEST"),
        (price, "MEMORY"),
        (quantized, "INSIDE"),
    ]
    for module, name in constants:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 77)
            keys.append(finetuning.state_key(**settings))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        keys.append(finetuning.state_key(**settings))
    assert len(set(keys)) == len(keys) == 1 + len(others) + len(constants) + 1
    assert finetuning.state_key(**settings) == keys[0]


CONTROL = {
    "end": 1000 * (1 - finetuning.SPARE), "updates": 20, "start": 100.0, "size": 100.0, "overhead": 90.0,
    "weights": 1, "error": 0.1, "base": 0.0, "slope": 0.0, "excess": 0.0,
}  # fmt: skip
GOOD = {f"{kind}/{name}": value for name, value in (("latent/a", torch.tensor([7.0])), ("log-step/a", torch.zeros(())))
        for kind, value in (("exp_avg", 0 * value), ("exp_avg_sq", 0 * value), ("step", torch.tensor(10.0)))
}  # fmt: skip
GOOD |= {"latent/a": torch.tensor([7.0]), "log-step/a": torch.zeros(())}


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({**GOOD, "latent/b": torch.zeros(1)}, {}),
        ({**GOOD, "latent/a": torch.zeros(2)}, {}),
        ({**GOOD, "log-step/a": torch.tensor(torch.nan)}, {}),
        ({key: value for key, value in GOOD.items() if not key.startswith("exp_avg_sq")}, {}),
        (GOOD, {"updates": "3"}),
        (GOOD, {"updates": 21}),
        (GOOD, {"updates": 13}),  # where codes are not looked at
        (GOOD, {"name": "another"}),
        (GOOD, {"more": 1}),
        (GOOD, {"control": CONTROL | {"end": 998.0}}),
        (GOOD, {"control": CONTROL | {"weights": 2}}),
        (GOOD, {"control": CONTROL | {"base": "x"}}),
        (GOOD, {"control": CONTROL | {"excess": math.nan}}),
        (GOOD, {"control": CONTROL | {"size": 0.0}}),
        (None, {}),
    ],
)
def test_a_state_that_is_not_this_finetunings_is_named_and_finetuning_begins_anew(tmp_path, capsys, tensors, metadata):
    whole, path = run(Scale(0.24), 0.7, 0.1, 20, tmp_path / "whole"), tmp_path / "state"
    if tensors is None:
        path.write_bytes(b"no state")
    else:
        sealed.save(path, "finetuning", tensors, {"updates": 10, "name": "state", "control": CONTROL} | metadata)
    assert run(Scale(0.24), 0.7, 0.1, 20, path) == whole
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line)
    assert str(path) in line and line.endswith("finetuning begins anew")
    assert sealed.load(path, "finetuning")[1]["updates"] == 20


def test_a_state_that_is_this_finetunings_is_taken(tmp_path, capsys):
    whole, path = run(Scale(0.24), 0.7, 0.1, 20, tmp_path / "whole"), tmp_path / "state"
    sealed.save(path, "finetuning", GOOD, {"updates": 10, "name": "state", "control": CONTROL})
    assert run(Scale(0.24), 0.7, 0.1, 20, path) != whole
    assert not capsys.readouterr().out


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    factors = [finetuning.rate_factor(i, 100) for i in range(100)]
    assert factors[0] < 0.21 and max(factors) == factors[4] > 0.95 and factors[-1] < 1e-3
