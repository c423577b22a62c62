"""Device, precision and seeds: how torch is set up before any work."""

import contextlib
import ctypes
import hashlib
import os
import platform
import re

import torch
from torch import nn

from common.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def bf16_is_faster(device: torch.device) -> bool:
    """Whether bfloat16 has hardware of its own; a processor without it emulates it, many times slower than FP32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def set_up_torch() -> None:
    """No TF32 and no reduced-precision sums, which round as coarsely as the formats under study; freed memory is kept.

    By default glibc gives large blocks back to the kernel, which clears every page anew for the next tensor. On CUDA
    only operations that always sum in the same order are allowed, so that a resumed run can end in the same bytes;
    tests/test_cuda.py checks it where there is a GPU.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def autocast(device: torch.device, precision: str):
    """The context in which the network runs at `precision`, "fp32" or "bf16"."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def cast_weights(network: nn.Module, precision: str) -> None:
    """Rounds once what `autocast` would round at each call: the weights of convolutions and linear layers."""
    if precision == "bf16":
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.to(torch.bfloat16)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed of its own for each purpose, e.g. derive_seed(seed, "step", step)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def choose_device(name: str | None) -> torch.device:
    """The device of --device; by default CUDA where available. Raises UserError for one that is absent or unknown."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]*))?", name)
    if match is None:
        raise UserError(f"--device {name or repr(name)}: not a device; use cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA device is available here; use --device cpu")
    if int(match[1] or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What a row says of the device, since another rounds otherwise: "cpu", or "cuda" and the GPU's name."""
    return f"cuda {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
