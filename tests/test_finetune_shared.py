"""Two processes that finetune together."""

import os

import pytest
import torch
from test_distributed import environments
from test_finetune import Matrix, size
from tiny_runs import PROCESSES

from common.ddpm.schedule import Schedule
from common.runtime import distributed, sealed
from common.training.finetune import finetune
from common.training.finetune_inputs import noised_digits

CPU = torch.device("cpu")


def finetuned(path):
    network = Matrix(32)
    white = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    draw = noised_digits(network, white, Schedule(), 64, 0, "fp32")
    start = {"weight": network.weight.detach()}, {"weight": 0.5}
    return finetune(network, *start, draw, size, 700, 30, "fp32", path)


def finetune_a_share(environment, folder):
    os.environ.update(environment)
    distributed.start(CPU)
    weights, steps = finetuned(folder / "state")
    sealed.save(folder / f"{distributed.rank()}", "finetuned", weights, {"steps": steps})


def test_two_processes_finetune_on_the_whole_of_each_batch(monkeypatch, tmp_path):
    """The weights of one process, but for the order of sums; those of a half alone end further away."""
    shares = [PROCESSES.Process(target=finetune_a_share, args=(e, tmp_path)) for e in environments()]
    for process in shares:
        process.start()
    one, steps = finetuned(tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "processes", lambda: 2)
        for exchange in ("mean", "broadcast"):
            patch.setattr(distributed, exchange, lambda value: value)
        patch.setattr(distributed, "average_gradients", lambda parameters: None)
        patch.setattr(distributed, "barrier", lambda: None)
        half, _ = finetuned(tmp_path / "half")
    for process in shares:
        process.join(120)
        assert process.exitcode == 0
    (first, metadata), (second, _) = (sealed.load(tmp_path / f"{rank}", "finetuned") for rank in range(2))
    assert torch.equal(first["weight"], second["weight"])
    assert metadata["steps"] == pytest.approx(steps, rel=1e-4)
    apart = [float((weights["weight"] - one["weight"]).abs().max()) for weights in (first, half)]
    assert apart[0] < 1e-3 < apart[1]
