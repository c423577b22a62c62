"""Files on disk: one sealed safetensors file for each thing that is kept.

A sealed file holds tensors and one JSON object that describes them, and the SHA-256 of all its own bytes, so that a
file with any byte changed is refused. Loading it can run no code.
"""

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save

from common.errors import UserError
from common.runtime.files import write_atomically

_KEY = "simplediffusion"
_UNSEALED = b"0" * 64
_SEAL = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')


class CheckpointError(UserError):
    """A file that cannot be used; the message says which, why and what to do."""


def save(path: str | Path, kind: str, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Writes a sealed file of `kind` ("model", "training", "fisher", ...)."""
    write_atomically(path, seal(kind, tensors, metadata))


def seal(kind: str, tensors: dict[str, torch.Tensor], metadata: dict) -> bytes:
    """The bytes of a sealed file; the same for the same content."""
    # One metadata entry: safetensors does not keep the order of several.
    header = json.dumps({"kind": kind, "sha256": _UNSEALED.decode(), **metadata}, sort_keys=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors_save(tensors, {_KEY: header})
    digest = hashlib.sha256(content).hexdigest().encode()
    return _SEAL.sub(lambda match: match[0].replace(_UNSEALED, digest), content, count=1)


def load(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and metadata of a sealed file of `kind`.

    Raises FileNotFoundError, or CheckpointError for a file that is foreign, truncated, altered or of another kind.
    """
    content = Path(path).read_bytes()
    seal = _SEAL.search(content)
    if seal is None:
        raise CheckpointError(f"{path} is not a file of this project, or its header is damaged")
    unsealed = content[: seal.start(1)] + _UNSEALED + content[seal.end(1) :]
    if hashlib.sha256(unsealed).hexdigest().encode() != seal[1]:
        raise CheckpointError(f"{path} is truncated or altered: its bytes do not fit its checksum; make it anew")
    try:
        tensors = safetensors_load(content)
        header_size = int.from_bytes(content[:8], "little")
        metadata = json.loads(json.loads(content[8 : 8 + header_size])["__metadata__"][_KEY])
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a file of this project: {error}") from None
    if metadata.pop("kind") != kind:
        raise CheckpointError(f"{path} is not a {kind} file")
    metadata.pop("sha256")
    return tensors, metadata


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, whatever the order, device or memory format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
