"""Training and sampling killed with SIGKILL and started again end in the bytes and the table of a run that was not."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

# New processes come from a server that has torch loaded and has run nothing, so that starting one takes no time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo", "torch._refs", "common.experiment"])

STEPS = 12


def run_script(folder: str, network, arguments: tuple[str, ...], die_at_write: int | None) -> None:
    """simplediffusion.py in `folder`, on a preset of a few seconds; killed in the middle of its n-th write."""
    import simplediffusion
    from common import checkpoint, experiment, training
    from common.config import PRESETS, run_main

    os.chdir(folder)
    PRESETS["quick"] = replace(
        PRESETS["quick"],
        network=network,
        training=replace(PRESETS["quick"].training, batch_size=4, steps=STEPS, warmup_steps=4),
        images=260,
        sampler="ddim",
        ddim_steps=2,
        eta=1.0,
        fisher_digits=4,
        fisher_grid_digits=1,
    )
    experiment.CHECKPOINTS = Path("checkpoints")
    load_digits = experiment.load_digits
    experiment.load_digits = lambda *which: load_digits(*which)[:500]  # so that their features take no time
    training.SAVE_SECONDS = -1  # after every step
    writes, fsync = [], os.fsync

    def dying_fsync(descriptor):
        writes.append(descriptor)
        if len(writes) == die_at_write:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    checkpoint.os.fsync = dying_fsync
    sys.argv = ["simplediffusion.py", "--preset", "quick", "--device", "cpu", "--batch-size", "100", *arguments]
    with (
        open("stdout.txt", "w") as out,
        open("stderr.txt", "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        run_main(simplediffusion.main)


@pytest.fixture
def start(tiny_config):
    """Starts the script in a folder and returns its process; ends what a failed test left running."""
    processes = []

    def start(folder, *arguments, die_at_write=None):
        process = PROCESSES.Process(target=run_script, args=(str(folder), tiny_config, arguments, die_at_write))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def finish(process, folder):
    process.join(120)
    assert process.exitcode == 0, (folder / "stderr.txt").read_text()


def files(folder) -> dict[str, bytes]:
    """What a run is for: checkpoint, images, Fisher values, packed models, rows."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(name): (folder / name).read_bytes() for name in names if name.parts[0] in ("checkpoints", "results")}


def table(folder) -> str:
    printed = (folder / "stdout.txt").read_text()
    return printed[printed.index("\nPreset quick") :]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def uninterrupted(whole, start):
    """The folder of a run that nothing stopped; made once."""
    if not any(whole.iterdir()):
        finish(start(whole), whole)
    return whole


def assert_same(folder, uninterrupted):
    expected, got = files(uninterrupted), files(folder)
    # Writes that were killed may leave a part of a file under a temporary name, which nothing reads.
    left = {name for name in got if Path(name).name.startswith(".")}
    assert got.keys() - left == expected.keys()
    for name, content in expected.items():
        assert got[name] == content, name
    assert table(folder) == table(uninterrupted)


def test_what_a_run_leaves(uninterrupted):
    names = list(files(uninterrupted))
    assert names.count("checkpoints/quick.safetensors") == 1
    assert sum(name.startswith("checkpoints/") for name in names) == 1
    assert sum(name.startswith("results/quick/images/") for name in names) == 2  # baseline and uniform
    assert "results/quick/models/uniform-fp16.safetensors" in names
    assert "results/quick/results.jsonl" in names
    assert not any(Path(name).name.startswith(".") for name in names)


def test_the_same_command_twice_prints_the_same_table(uninterrupted, start):
    before, printed = files(uninterrupted), table(uninterrupted)
    finish(start(uninterrupted), uninterrupted)
    assert "found trained" in (uninterrupted / "stdout.txt").read_text()
    assert files(uninterrupted) == before
    assert table(uninterrupted) == printed


def test_killed_in_the_middle_of_every_fifth_write(uninterrupted, start, tmp_path):
    """Each run is killed as it writes its fifth file, half of which is on the disk, until one comes to the end."""
    kills = 0
    while True:
        process = start(tmp_path, die_at_write=5)
        process.join(120)
        if process.exitcode != -signal.SIGKILL:
            break
        kills += 1
        assert kills < 12
    finish(process, tmp_path)
    # Twelve states, the checkpoint, and the images, three batches and their whole for each of two models.
    assert kills >= 4
    assert_same(tmp_path, uninterrupted)


def kill_when(process, happened, after):
    """SIGKILL, `after` seconds from when the process has come so far; tells whether it was still running."""
    limit = time.monotonic() + 120
    while not happened() and process.is_alive():
        assert time.monotonic() < limit
        time.sleep(0.001)
    time.sleep(after)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_killed_in_training_and_in_sampling(uninterrupted, start, tmp_path):
    state = tmp_path / "checkpoints" / "quick.training.safetensors"
    images = tmp_path / "results" / "quick" / "images"
    assert kill_when(start(tmp_path), state.exists, after=0.01)
    assert not (tmp_path / "checkpoints" / "quick.safetensors").exists()
    assert kill_when(start(tmp_path), lambda: any(images.glob("*.parts/0*")), after=0.005)
    finish(start(tmp_path), tmp_path)
    assert_same(tmp_path, uninterrupted)


def test_a_resumed_run_repeats_no_finished_step(start, tmp_path):
    """It continues, rather than beginning anew and ending in the same bytes for that reason."""
    process = start(tmp_path, die_at_write=8)  # the first write is that of the digits' statistics
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    process = start(tmp_path, die_at_write=STEPS - 6 + 2)  # the states of the other steps, the checkpoint, one more
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "checkpoints" / "quick.safetensors").exists()
