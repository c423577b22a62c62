"""Training on top of rounding, with the price of bits in the loss: codes move to where they are short and the network's
outputs are those of the FP32 network.

To the gradient of the squared difference of the outputs comes that of the bits (`common.training.price`), times a price
that moves so that the file shrinks to the size asked for.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

from common.formats.packed import MIB
from common.formats.row_steps import PARTS, Step
from common.runtime import distributed
from common.runtime.device import autocast
from common.training import finetune_inputs, price, quantized
from common.training.finetune_inputs import Draw
from common.training.finetune_state import REFRESH, load_state, read_state, save_state
from common.training.loop import SAVE_SECONDS
from common.training.price import SizeControl
from common.training.quantized import Quantized, start_from

METHOD_VERSION = 7  # grows whenever `finetune`, or what draws its inputs, comes to give other weights
RATE, STEP_RATE = 0.004, 0.0005  # of Adam: of latent weights, in steps; of the logarithms of steps
WARMUP = 0.05  # of the updates: Adam's first ones are all of full length
RECOUNT = 10  # of REFRESH, from one file that is made to the next ..
RECOUNT_WEIGHTS = 4_000_000  # .. of so many weights: for more, a file takes longer and its headers are a smaller part
SPARE = 0.003  # of the bytes: what the last codes may differ from the ramp


def state_key(network: str, weights: str, steps: dict[str, Step], data: str, seed: int, precision: str, **more) -> str:
    """64 hexadecimal digits that differ wherever `finetune` would give other weights: a name for its state.

    network, weights: hashes of the network's own weights and of those it starts from; data, seed: of its digits; more:
    limit, updates and device.
    """
    method = [METHOD_VERSION, RATE, STEP_RATE, WARMUP, quantized.INSIDE, PARTS]
    method += [REFRESH, RECOUNT, RECOUNT_WEIGHTS, SPARE]
    method += [price.ABSENT, price.PROPORTIONAL, price.INTEGRAL, price.RESPONSE, price.FARTHEST, price.MEMORY]
    method += [finetune_inputs.BATCH, finetune_inputs.STATES, finetune_inputs.SAMPLER, finetune_inputs.STEPS]
    method += [finetune_inputs.IMAGES]
    method += [torch.__version__]
    start = sorted((name, np.ravel(step).tolist()) for name, step in steps.items())
    of = [network, weights, start, data, seed, precision, sorted(more.items()), *method]
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()


def finetune(
    network: nn.Module,
    weights: dict[str, torch.Tensor],
    steps: dict[str, Step],
    draw: Draw,
    size: Callable[[dict[str, torch.Tensor], dict[str, Step]], int],
    limit: int,
    updates: int,
    precision: str,
    state_path: Path,
) -> tuple[dict[str, torch.Tensor], dict[str, Step]]:
    """Weights and steps, {name: tensor} and {name: step, or steps by rows}, by which `network` predicts what it does
    with its own, and whose codes take a file of about `limit` bytes. They start from `weights` and `steps`; the weights
    are not rounded, and what is no parameter of the network stays as it is.

    draw(i): inputs of update i, their timesteps and the network's own outputs; the same in all processes, which share
    them. size(weights, steps): bytes of the file of the weights rounded to these steps. precision: "fp32" or "bf16", of
    the products.

    Continues from `state_path`, whose name should be of all that the result depends on, where it exists, writes it
    about once a minute, and leaves the result there for the caller to remove. A state that is damaged or of another
    name is said in one line, and finetuning begins anew.
    """

    def all_of(trained: Quantized) -> tuple[dict[str, torch.Tensor], dict[str, Step]]:
        """With what is no parameter of the network, in the order of `weights`."""
        return weights | trained.unrounded(), steps | trained.steps()

    trained = start_from(network, weights, steps)
    parameters = list(trained.parameters().values())
    groups = [{"params": list(trained.latents.values())}, {"params": list(trained.log_steps.values())}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999), fused=True)
    for p in parameters:
        p.grad = torch.zeros_like(p)  # also of those that the network does not use
    done, control = 0, SizeControl(limit * (1 - SPARE), updates, sum(u.numel() for u in trained.latents.values()))
    if (state := distributed.on_first(lambda: read_state(state_path, trained, control))) is not None:
        tensors, done, found = state
        load_state(tensors, trained, optimizer)
        control = SizeControl(**found)
    recount = REFRESH * RECOUNT * max(1, control.weights // RECOUNT_WEIGHTS)
    saved_at = time.monotonic()
    bar = tqdm(range(done, updates), desc="finetuning", initial=done, total=updates, unit="step")
    for i in bar:
        batch = draw(i)
        x, t, target = (distributed.part(of_all) for of_all in batch)
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast(x.device, precision):
            difference = functional_call(network, trained.rounded(), (x, t)).float() - target
        numbers = len(batch[0]) * math.prod(difference.shape[1:])  # of all processes
        loss = difference.square().sum() * (distributed.processes() / numbers)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        distributed.average_gradients(parameters)
        control.take_loss(i, float(distributed.mean(loss.detach())))
        speed = rate_factor(i, updates)
        if i % REFRESH == 0:
            lengths, bits = price.measure(trained.latents)
            if i % recount == 0:
                in_file = distributed.on_first(lambda: size(*all_of(trained)))
                control.overhead = in_file - bits / 8
            control.take_bits(i, bits, speed)
        for name, u in trained.latents.items():
            u.grad.add_(lengths[name].slope(u.detach()), alpha=control.price)
        for group, rate in zip(optimizer.param_groups, (RATE, STEP_RATE), strict=True):
            group["lr"] = rate * speed
        with trained.steps_alone():
            optimizer.step()
        bar.set_postfix_str(f"{control.size / MIB:.3f} MiB, error {control.error:.2e}", refresh=False)
        due = time.monotonic() - saved_at > SAVE_SECONDS and (i + 1) % REFRESH == 0  # so that codes are looked at first
        if distributed.rank() == 0 and (due or i + 1 == updates):
            save_state(state_path, i + 1, trained, optimizer if i + 1 < updates else None, control)
            saved_at = time.monotonic()
    distributed.barrier()
    return all_of(trained)


def rate_factor(update: int, updates: int) -> float:
    """Half a cosine down to zero, times a linear warm-up."""
    return min(1, (update + 1) / (WARMUP * updates)) * 0.5 * (1 + math.cos(math.pi * update / updates))
