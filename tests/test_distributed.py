"""Two processes, as torchrun starts them, make the images and the rows of one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY
from tiny_runs import PROCESSES, files, finish, table

from common.ddpm.sampling import Sampling, generate
from common.ddpm.unet import UNet
from common.errors import UserError, run_main
from common.presets import TrainingConfig
from common.runtime import distributed, sealed
from common.training.loop import train

CPU = torch.device("cpu")


def environments():
    """What torchrun sets in each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


@pytest.fixture
def start_two(start):
    """Starts the script in two processes that share a folder."""

    def start_two(folder, *arguments):
        return [start(folder, *arguments, environment=environment) for environment in environments()]

    return start_two


@pytest.fixture
def two(whole, start_two):
    """The folder of a training by two processes that nothing stopped; made once."""
    if not any(whole.iterdir()):
        for process in start_two(whole):
            finish(process, whole)
    return whole


def test_two_processes_print_and_write_as_one(two, start, start_two, tmp_path):
    """On the same baseline: images, Fisher values, packed files and rows, byte for byte."""
    one = tmp_path / "one"
    (one / "checkpoints").mkdir(parents=True)
    shutil.copy(two / "checkpoints" / "quick.safetensors", one / "checkpoints")
    finish(start(one), one)
    assert files(one) == files(two)
    assert table(one) == table(two)
    assert (two / "stdout1.txt").read_text() == ""


def test_training_by_two_is_the_training_of_one_up_to_rounding(two, start, tmp_path):
    finish(start(tmp_path), tmp_path)
    of_two, of_one = (
        next(json.loads(line)["fid"] for line in rows.read_text().splitlines() if "Baseline" in line)
        for rows in (folder / "results" / "quick" / "results.jsonl" for folder in (two, tmp_path))
    )
    assert of_two == pytest.approx(of_one, rel=1e-2)


def train_a_share(environment, network, config, digits, folder):
    os.environ.update(environment)
    distributed.start(CPU)
    ema, losses = train(UNet(network), config, digits, folder / "state.safetensors", CPU, "fp32")
    sealed.save(folder / f"{distributed.rank()}.safetensors", "ema", ema, {"losses": losses})


def test_two_processes_train_on_the_whole_of_each_batch(tiny_config, monkeypatch, tmp_path):
    """The weights of one process, but for the order of sums; half of each batch ends a hundred times further away."""
    config = TrainingConfig(
        data="mnist5k", batch_size=8, steps=6, lr=1e-3, muon_lr=1e-3, warmup_steps=2, ema=0.9, image_share=0.5
    )
    digits = torch.randint(0, 256, (20, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shares = [
        PROCESSES.Process(target=train_a_share, args=(environment, tiny_config, config, digits, tmp_path))
        for environment in environments()
    ]
    for process in shares:
        process.start()
    one, losses = train(UNet(tiny_config), config, digits, tmp_path / "one.safetensors", CPU, "fp32")
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "processes", lambda: 2)
        for exchange in ("mean", "broadcast"):
            patch.setattr(distributed, exchange, lambda value: value)
        patch.setattr(distributed, "average_gradients", lambda parameters: None)
        half, _ = train(UNet(tiny_config), config, digits, tmp_path / "half.safetensors", CPU, "fp32")
    for process in shares:
        process.join(120)
        assert process.exitcode == 0
    (first, metadata), (second, _) = (sealed.load(tmp_path / f"{rank}.safetensors", "ema") for rank in range(2))

    def distance(weights):
        return max(float((weights[name] - tensor).abs().max()) for name, tensor in one.items())

    assert distance(first) == distance(second) < 1e-5 < 1e-3 < distance(half)
    assert metadata["losses"] == pytest.approx(losses, rel=1e-5)


def test_two_killed_in_training_resume(two, start_two, tmp_path):
    """One of the two is killed; torchrun then ends the other; the same command ends in the same bytes."""
    state = tmp_path / "checkpoints" / "quick.training.safetensors"
    processes = start_two(tmp_path)
    limit = time.monotonic() + 120
    while not state.exists():
        assert time.monotonic() < limit
        time.sleep(0.001)
    for process in reversed(processes):
        process.kill()
        process.join()
    assert processes[1].exitcode == -signal.SIGKILL
    assert not (tmp_path / "checkpoints" / "quick.safetensors").exists()
    for process in start_two(tmp_path):
        finish(process, tmp_path)
    left = {name for name in files(tmp_path) if Path(name).name.startswith(".")}
    assert {name: content for name, content in files(tmp_path).items() if name not in left} == files(two)


def test_each_process_samples_its_share_alone(monkeypatch, tiny_network, tmp_path):
    class AllSampled(Exception):
        pass

    def stop():
        raise AllSampled

    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "on_first", lambda work: work())
    monkeypatch.setattr(distributed, "barrier", stop)
    sampling = Sampling(
        images=10, sampler="ddim", steps=1, eta=0.0, batch_size=2, seed=0, device="cpu", precision="fp32"
    )
    with pytest.raises(AllSampled):
        generate(tiny_network, "weights", sampling, CPU, tmp_path, "label")
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == [
        "0000002.safetensors",
        "0000006.safetensors",
    ]


def sample_one_batch(environment, folder):
    os.environ.update(environment)
    distributed.start(CPU)
    sampling = Sampling(2, "ddim", 1, 0.0, 2, 0, "cpu", "fp32")

    def prepare(network, sampling, device):
        distributed.barrier()  # as where one process makes what the others read
        return network

    images = generate(UNet(TINY), "weights", sampling, CPU, folder, "label", prepare)
    assert images.shape == (2, 32, 32)


def test_processes_that_have_no_batch_prepare_too(tmp_path):
    shares = [PROCESSES.Process(target=sample_one_batch, args=(e, tmp_path)) for e in environments()]
    for process in shares:
        process.start()
    for process in shares:
        process.join(60)
    codes = [process.exitcode for process in shares]
    for process in shares:
        process.kill()
    assert codes == [0, 0]


@pytest.mark.parametrize(
    ("device", "said"),
    [("cuda", "--nproc_per_node=1, or use --device cpu"), ("cuda:1", "--device cuda:1: .* leave it out")],
)
def test_processes_without_a_gpu_each_are_told_what_to_give(monkeypatch, device, said):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=said):
        distributed.start(torch.device(device))


def test_torchrun_starts_a_script():
    """The launcher itself, with what takes no time; one process speaks for both."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "simplediffusion.py"]
    arguments = ["--preset", "quick", "--device", "cpu", "--dry-run"]
    result = subprocess.run(
        [sys.executable, *command, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent.parent,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2,203,") == 1
    assert "2 processes of" in result.stdout


def share_a_result_and_an_error(environment, told):
    os.environ.update(environment)
    distributed.start(CPU)

    def fail():
        raise UserError(f"from process {distributed.rank()}")

    result = distributed.on_first(lambda: {"rank": distributed.rank()})
    try:
        distributed.on_first(fail)
    except UserError as error:
        told.put((distributed.rank(), result, str(error)))


def test_what_the_first_process_finds_or_raises_is_that_of_all():
    told = PROCESSES.Queue()
    processes = [PROCESSES.Process(target=share_a_result_and_an_error, args=(e, told)) for e in environments()]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(told.get() for _ in processes) == [(rank, {"rank": 0}, "from process 0") for rank in range(2)]


def test_an_error_of_one_process_alone_is_told(monkeypatch):
    """Where it is of all, torchrun has ended the others before they speak."""
    waits = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("TQDM_DISABLE", "0")
    monkeypatch.setattr("common.errors.time.sleep", waits.append)
    monkeypatch.setattr(sys, "stdout", sys.stdout)

    def main():
        raise UserError("the file is damaged")

    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="error: the file is damaged"):
            run_main(main)
    assert len(waits) == 1 and waits[0] > 1


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_put_together_are_the_whole(monkeypatch, processes):
    """`gather` undoes `shard`, however the items divide."""
    for total in (1, 2, 5, 6):
        parts = []
        for rank in range(processes):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(distributed, "processes", lambda: processes)
            parts.append(distributed.shard(list(range(total))))
        monkeypatch.setattr(
            distributed.dist, "all_gather_object", lambda box, _, parts=parts: box.__setitem__(slice(None), parts)
        )
        assert distributed.gather(parts[0], total) == list(range(total))
