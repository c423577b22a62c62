"""Training and sampling killed with SIGKILL and started again end in the bytes and the table of a run that was not."""

import shutil
import signal
import time
from pathlib import Path

import pytest
from tiny_runs import STEPS, files, finish, table


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
    assert sum(name.startswith("results/quick/models/uniform-fp16-") for name in names) == 1
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


def test_two_scripts_at_once_in_one_folder(uninterrupted, start, tmp_path):
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    # Neither is of a group: the rank is but a part of the name of the file that each prints into.
    for process in [start(tmp_path, environment={"RANK": str(i)}) for i in range(2)]:
        finish(process, tmp_path)
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
