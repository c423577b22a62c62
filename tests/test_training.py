"""Learning rate, EMA and batches in closed form; a run that was stopped ends as one that was not."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import TINY

from common.ddpm.schedule import Schedule, denoising_loss
from common.ddpm.unet import UNet
from common.presets import TrainingConfig
from common.runtime import sealed
from common.runtime.sealed import CheckpointError
from common.training import loop
from common.training.baseline import kept_file, training_state_file
from common.training.loop import EpochOrder, TrainingError, ema_decay, learning_rate_factor, stratified, train

CONFIG = TrainingConfig(
    data="mnist5k", batch_size=4, steps=8, lr=1e-3, muon_lr=1e-3, warmup_steps=2, ema=0.9, image_share=0.5, seed=3
)
CPU = torch.device("cpu")


@pytest.fixture
def digits():
    return torch.randint(0, 256, (10, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(tiny_config, digits, tmp_path):
    """Trains a fresh network; other digits, configuration or network where asked for."""

    def start(config=CONFIG, digits=digits, network=tiny_config, state=tmp_path / "state.safetensors"):
        return train(UNet(network), config, digits, state, CPU, "fp32")

    return start


@pytest.fixture(scope="module")
def whole_state(tmp_path_factory):
    """Tensors and metadata of the state that `run` ends with; made once."""
    digits = torch.randint(0, 256, (10, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    train(UNet(TINY), CONFIG, digits, path, CPU, "fp32")
    return sealed.load(path, "training")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_learning_rate_closed_form():
    config = replace(CONFIG, steps=110, warmup_steps=10)
    factors = [learning_rate_factor(config, step) for step in range(10)]
    assert factors == pytest.approx([0.1 * (i + 1) for i in range(10)])
    # Half a cosine over the 100 steps that follow.
    half = math.sqrt(0.5) / 2
    for step, expected in ((10, 1.0), (35, 0.5 + half), (60, 0.5), (85, 0.5 - half), (110, 0.0)):
        assert learning_rate_factor(config, step) == pytest.approx(expected, abs=1e-12)
    rates = [learning_rate_factor(config, step) for step in range(10, 111)]
    assert all(a > b for a, b in pairwise(rates))


def test_a_run_that_is_all_warm_up_has_a_learning_rate():
    config = replace(CONFIG, steps=4, warmup_steps=4)
    assert [learning_rate_factor(config, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_ema_ramp_closed_form():
    config = replace(CONFIG, ema=0.999)
    assert ema_decay(config, 0) == 0.1
    assert ema_decay(config, 8) == 0.5
    assert ema_decay(config, 89) == pytest.approx(10 / 11)
    assert ema_decay(config, 8_989) < 0.999 == ema_decay(config, 8_991) == ema_decay(config, 10**6)
    # What is left of the initial weights after 100 steps: 9! / (101 ... 109), since the product telescopes.
    left = math.prod(ema_decay(config, step) for step in range(100))
    assert left == pytest.approx(math.prod(range(1, 10)) / math.prod(range(101, 110)))


def test_every_digit_is_seen_once_an_epoch():
    order = EpochOrder(20, 8, seed=0)
    places = torch.cat([order.indices(step) for step in range(10)])  # four epochs; batches cross their borders
    epochs = places.split(20)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(20))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


def test_order_depends_on_seed_and_step_alone():
    order = EpochOrder(20, 8, seed=0)
    in_turn = [order.indices(step) for step in range(10)]
    for step in (9, 2, 5):  # a resumed run begins anywhere
        resumed = EpochOrder(20, 8, seed=0)
        for later in range(step, 10):
            assert torch.equal(resumed.indices(later), in_turn[later])
    assert not torch.equal(EpochOrder(20, 8, seed=1).indices(0), in_turn[0])


@pytest.mark.parametrize("n", [1, 3, 64])
def test_one_place_from_each_stratum(n):
    torch.manual_seed(0)
    seen = torch.stack([stratified(n, CPU) for _ in range(200)])
    assert seen.shape == (200, n)
    assert torch.equal((seen * n).floor(), torch.arange(n).expand(200, n).double())
    generators = (torch.Generator().manual_seed(seed) for seed in (3, 3, 4))
    first, same, other = (stratified(n, CPU, generator) for generator in generators)
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("share", [0.0, 0.75])
def test_a_share_of_the_timesteps_is_as_dense_as_it_weighs(run, tmp_path, monkeypatch, share):
    drawn = []

    def watched(network, schedule, x0, t, noise):
        drawn.append(t)
        return denoising_loss(network, schedule, x0, t, noise)

    monkeypatch.setattr(loop, "denoising_loss", watched)
    run(replace(CONFIG, steps=5, batch_size=10, image_share=share), state=tmp_path / "state")
    abar = Schedule().alphas_cumprod
    by_weight = float((abar * (1 - abar) * range(1000)).sum() / (abar * (1 - abar)).sum())
    expected = share * by_weight + (1 - share) * 499.5
    assert torch.cat(drawn).double().mean() == pytest.approx(expected, abs=25) and 499.5 - by_weight > 150


def test_ema_of_a_run_closed_form(run, tmp_path):
    """From the weights of each step, which runs without averaging give."""
    config = replace(CONFIG, warmup_steps=100, ema=0.0)  # a rate that does not depend on the length of the run
    (start, _), *weights = (
        run(replace(config, steps=steps, lr=lr, muon_lr=lr), state=tmp_path / f"{steps}-{lr}")
        for steps, lr in ((1, 0.0), (1, 0.1), (2, 0.1), (3, 0.1))
    )
    averaged, _ = run(replace(config, steps=3, lr=0.1, muon_lr=0.1, ema=0.9999), state=tmp_path / "ema")
    for name, initial in start.items():
        expected = initial
        for (state, _), decay in zip(weights, (1 / 10, 2 / 11, 3 / 12), strict=True):
            expected = decay * expected + (1 - decay) * state[name]
        assert torch.allclose(averaged[name], expected, rtol=0, atol=1e-6), name


def test_on_step_gives_the_average_that_a_run_of_so_many_steps_ends_with(run, tiny_config, digits, tmp_path):
    config, seen = replace(CONFIG, warmup_steps=100, steps=3), {}  # a rate that does not depend on the run's length

    def keep(step, ema):
        seen[step] = {name: tensor.clone() for name, tensor in ema.items()}

    train(UNet(tiny_config), config, digits, tmp_path / "whole", CPU, "fp32", keep)
    assert list(seen) == [1, 2, 3]
    for steps in seen:
        assert equal(seen[steps], run(replace(config, steps=steps), state=tmp_path / f"{steps}")[0])


def test_first_step_moves_weights_by_the_learning_rates(run, tmp_path):
    config = replace(CONFIG, steps=1, warmup_steps=5, ema=0.0)
    before, _ = run(replace(config, lr=0.0, muon_lr=0.0), state=tmp_path / "before")
    after, _ = run(replace(config, lr=0.05, muon_lr=0.1), state=tmp_path / "after")
    by_adam = {name for name in before if before[name].dim() == 1} | {"shallow_conv.weight", "output_conv.weight"}
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in by_adam])
    assert float(moved.max()) == pytest.approx(0.01, rel=1e-3)  # lr / warmup_steps
    assert float(moved.median()) == pytest.approx(0.01, rel=1e-2)
    for name in before.keys() - by_adam:
        step = (after[name] - before[name]).flatten(1)
        scale = 0.02 * max(1, step.shape[0] / step.shape[1]) ** 0.5  # muon_lr / warmup_steps
        assert 0.6 * scale < torch.linalg.svdvals(step)[0] < 1.3 * scale, name


def test_the_average_holds_no_graph(run):
    """A graph of the averages would grow with each step, until the memory is full."""
    weights, _ = run(replace(CONFIG, steps=2))
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_training_lowers_the_loss(run, tiny_config):
    digits = torch.zeros(4, 32, 32, dtype=torch.uint8)  # all black: the noise is x_t but for a constant
    config = replace(CONFIG, steps=40, lr=5e-3, muon_lr=2e-2, batch_size=8, warmup_steps=5)
    _, losses = run(config, digits=digits)
    assert len(losses) == 40
    assert sum(losses[:5]) / 5 > 0.7  # a fresh network predicts next to nothing of noise of variance 1
    assert sum(losses[-5:]) / 5 < 0.5 * sum(losses[:5]) / 5


def test_same_seed_same_weights_and_another_seed_others(run, tmp_path):
    first, losses = run(state=tmp_path / "a")
    torch.rand(5)  # whatever random numbers were drawn before
    second, losses_again = run(state=tmp_path / "b")
    assert equal(first, second)
    assert losses == losses_again
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    other, _ = run(replace(CONFIG, seed=4), state=tmp_path / "c")
    assert not equal(first, other)


class Stopped(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("stops", [[1], [7], [3, 4, 6]])
def test_a_stopped_run_ends_in_the_same_bytes(run, tiny_config, tmp_path, monkeypatch, stops, dropout):
    network = replace(tiny_config, dropout=dropout)
    whole, whole_losses = run(network=network, state=tmp_path / "whole")

    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    state, loss = tmp_path / "stopped", loop.denoising_loss
    done = 0
    for stop in stops:
        calls = []

        def stopping(*arguments, calls=calls, stop=stop, done=done):
            if done + len(calls) == stop:
                raise Stopped
            calls.append(1)
            return loss(*arguments)

        monkeypatch.setattr(loop, "denoising_loss", stopping)
        with pytest.raises(Stopped):
            run(network=network, state=state)
        assert len(calls) == stop - done  # it went on from where it was, and repeated nothing
        done = stop
    monkeypatch.setattr(loop, "denoising_loss", loss)
    resumed, losses = run(network=network, state=state)
    assert equal(whole, resumed)
    assert losses == whole_losses
    assert state.read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_state_older_than_the_stop_repeats_the_steps_between(run, tmp_path, monkeypatch):
    whole, whole_losses = run(state=tmp_path / "whole")
    state, loss, calls = tmp_path / "stopped", loop.denoising_loss, []

    def stopping(*arguments):
        if len(calls) == 6:
            raise Stopped
        calls.append(1)
        monkeypatch.setattr(loop, "SAVE_SECONDS", -1 if len(calls) == 3 else 60)
        return loss(*arguments)

    monkeypatch.setattr(loop, "denoising_loss", stopping)
    with pytest.raises(Stopped):
        run(state=state)
    assert sealed.load(state, "training")[1]["step"] == 3
    monkeypatch.setattr(loop, "denoising_loss", loss)
    resumed, losses = run(state=state)
    assert equal(whole, resumed)
    assert losses == whole_losses


def test_a_finished_state_gives_its_weights_without_a_step(run, tmp_path, monkeypatch):
    """Where a process ended between the last step and the checkpoint."""
    whole, losses = run()
    monkeypatch.setattr(loop, "denoising_loss", None)
    again, losses_again = run()
    assert equal(whole, again)
    assert losses == losses_again


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(run, tmp_path, monkeypatch, value):
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    loss, calls = loop.denoising_loss, []

    def spoiled(*arguments):
        calls.append(1)
        return loss(*arguments) * (value if len(calls) == 4 else 1)

    monkeypatch.setattr(loop, "denoising_loss", spoiled)
    with pytest.raises(TrainingError, match="not finite at step 3"):
        run()
    tensors, metadata = sealed.load(tmp_path / "state.safetensors", "training")
    assert metadata["step"] == 3
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_loss_that_is_not_finite_is_found_at_the_next_saving(run, tmp_path, monkeypatch):
    """Between savings nobody looks; no state and no weights come of it, and the message names the first bad step."""
    loss, calls = loop.denoising_loss, []

    def spoiled(*arguments):
        calls.append(1)
        return loss(*arguments) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(loop, "denoising_loss", spoiled)
    with pytest.raises(TrainingError, match="not finite at step 2"):
        run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("training", {"config": replace(CONFIG, lr=2e-3)}),
        ("training", {"config": replace(CONFIG, seed=4)}),
        ("digits", {"digits": torch.zeros(10, 32, 32, dtype=torch.uint8)}),
        ("architecture", {"dropout": 0.1}),
    ],
)
def test_a_state_of_another_run_is_refused_and_kept(run, tiny_config, tmp_path, key, change):
    run()
    state = tmp_path / "state.safetensors"
    content = state.read_bytes()
    if "dropout" in change:
        change = {"network": replace(tiny_config, **change)}
    with pytest.raises(TrainingError, match=f"another {key}.*delete it"):
        run(**change)
    assert state.read_bytes() == content


def test_a_state_does_not_say_what_is_off(run, tmp_path):
    """So states of before a field was there continue."""
    run()
    _, metadata = sealed.load(tmp_path / "state.safetensors", "training")
    assert "output_bias" not in metadata["architecture"]


def test_a_damaged_state_is_refused(run, tmp_path):
    run()
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or altered"):
        run()


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"losses": torch.zeros(3)}, {}),
        ({"weights/output_conv.bias": torch.zeros(9)}, {}),
        ({"weights/output_conv.bias": None}, {}),
        ({"exp_avg/output_conv.bias": None}, {}),
        ({"momentum/layer9.weight": torch.zeros(2)}, {}),
        ({"ema/output_conv.bias": torch.tensor([math.nan])}, {}),
        ({}, {"step": None}),
        ({}, {"step": "8"}),
        ({}, {"step": 9}),
        ({}, {"digits": None}),
    ],
)
def test_a_sealed_state_with_wrong_content_is_refused_and_kept(whole_state, run, tmp_path, tensors, metadata):
    stored = [
        {k: v for k, v in (a | b).items() if v is not None}
        for a, b in zip(whole_state, (tensors, metadata), strict=True)
    ]
    state = tmp_path / "state.safetensors"
    sealed.save(state, "training", *stored)
    content = state.read_bytes()
    with pytest.raises(TrainingError, match=r"is damaged.*delete it to begin anew") as error:
        run()
    assert str(state) in str(error.value) and "\n" not in str(error.value)
    assert state.read_bytes() == content


def test_each_baseline_has_files_of_its_own_beside_it():
    """Dots in names are no suffixes: runs of two learning rates share nothing."""
    names = ["runs/lr0.001", "runs/lr0.002", "runs/a", "runs/a.safetensors"]
    for of in (training_state_file, lambda path: kept_file(path, 640)):
        assert len({of(Path(name)) for name in names} | set(map(Path, names))) == 2 * len(names)
    assert training_state_file(Path("c/quick.safetensors")) == Path("c/quick.training.safetensors")
