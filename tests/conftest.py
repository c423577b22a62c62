"""A network small enough to train in a test, the quick preset made of it, and the settings of a row."""

from dataclasses import replace

import pytest

from common.presets import PRESETS, TrainingConfig, UNetConfig
from common.study.rows import Settings

SETTINGS = Settings(
    preset="quick", baseline="b" * 64, metric="mnist features abcc2d22", data="mnist5k", sampler="dpm++", steps=10,
    eta=0.0, images=500, seed=0, precision="fp32", batch_size=50, device="cpu", torch="2",
)  # fmt: skip
TINY = UNetConfig(channels=(4, 8, 16, 32, 32, 24), groups=2, heads=2, dropout=0.0)


@pytest.fixture
def tiny_config():
    return TINY


@pytest.fixture
def tiny_network(tiny_config):
    """Random weights, the same in every test, in evaluation mode."""
    import torch

    from common.ddpm.unet import UNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(tiny_config).eval()


@pytest.fixture
def tiny_preset(monkeypatch, tmp_path):
    """Makes `quick` a preset of a few seconds, with its checkpoint and its results in an empty folder."""
    from common.study import run

    training = TrainingConfig(
        data="mnist5k", batch_size=8, steps=12, lr=1e-3, muon_lr=1e-3, warmup_steps=4, ema=0.9, image_share=0.5
    )
    preset = replace(
        PRESETS["quick"],
        network=TINY,
        training=training,
        images=260,
        steps=2,
        eta=1.0,
        fisher_digits=4,
        fisher_grid_digits=2,
    )
    monkeypatch.setitem(PRESETS, "quick", preset)
    monkeypatch.setattr(run, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return preset


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder for what the tests of a module compare with, made once."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def start(tiny_config):
    """Starts simplediffusion.py in a folder and returns its process; ends what a failed test left running."""
    from tiny_runs import PROCESSES, run_script

    processes = []

    def start(folder, *arguments, die_at_write=None, environment=None):
        run = (str(folder), tiny_config, arguments, die_at_write, environment or {})
        process = PROCESSES.Process(target=run_script, args=run)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()
