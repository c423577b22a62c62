"""Several processes under torchrun: each does a share, all hold the result, the first one prints and writes.

One process alone needs none of this, and every function here then returns what it was given.
"""

import atexit
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from common.errors import UserError

Result = TypeVar("Result")
TIMEOUT = timedelta(hours=12)  # of a wait for the slowest process, which may be sampling


def start(device: torch.device) -> torch.device:
    """Joins the processes that torchrun started, if it did; returns this process's own device, which is then current.

    Raises UserError where the processes outnumber the GPUs.
    """
    started = "TORCHELASTIC_RUN_ID" in os.environ
    if started and device.type == "cuda":
        wanted, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if device.index is not None:
            raise UserError(
                f"--device {device}: {wanted} processes need a GPU each; leave it out, or give --device cpu"
            )
        if wanted > there:
            raise UserError(
                f"{wanted} processes need a GPU each, and {there} are there: give torchrun "
                f"--nproc_per_node={there}, or use --device cpu"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if started and not dist.is_initialized():
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=TIMEOUT)
        atexit.register(dist.destroy_process_group)
    return device


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def shard(items):
    """This process's part of a sequence: every n-th item."""
    return items[rank() :: processes()]


def part(batch: torch.Tensor) -> torch.Tensor:
    """This process's part of a batch (N, ...); lengths differ by one at most."""
    return batch.tensor_split(processes())[rank()]


def gather(items: list, total: int) -> list:
    """The `total` items of all processes, in the order of the sequence that `shard` divided."""
    if processes() == 1:
        return items
    parts = [None] * processes()
    dist.all_gather_object(parts, items)
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]


def broadcast(value):
    """The first process's value; for what must not differ, such as whether a file is there."""
    if processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first(work: Callable[[], Result]) -> Result:
    """What `work()` returns in the first process, given to all; what it raises there is raised in all.

    For work that can fail: if the first process alone raised, the others would wait for it in vain.
    """
    if processes() == 1:
        return work()
    result = error = None
    if rank() == 0:
        try:
            result = work()
        except Exception as raised:
            error = raised
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result


def barrier() -> None:
    """Returns when every process has come here."""
    if processes() > 1:
        dist.barrier()


def mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of the processes' tensors."""
    if processes() > 1:
        dist.all_reduce(tensor)
        tensor /= processes()
    return tensor


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its mean over the processes.

    One exchange of all of them, always in the same order: DistributedDataParallel orders its buckets anew after the
    first step, so that with three processes or more a resumed run would round differently.
    """
    if processes() > 1:
        gradients = [p.grad for p in parameters]
        flat = mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view(gradient.shape))
