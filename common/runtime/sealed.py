"""One sealed safetensors file for each thing that is kept.

A sealed file holds tensors and one JSON object that describes them, and the SHA-256 of all its own bytes, so that a
file with any byte changed is refused. Loading it can run no code. The seal tells damage, not forgery: anyone can
compute a checksum, so what a file says of itself is checked before it is used.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save

from common.errors import UserError
from common.runtime.files import write_atomically

VERSION = 1  # of the format; files without one are of version 0, which differs in nothing else
_KEY = "simplediffusion"
LARGEST_HEADER = 100_000_000  # bytes, as in safetensors
_UNSEALED = b"0" * 64
_SEAL = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')
# What safetensors, torch and json meet in a header that others made.
_MISREAD = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


class CheckpointError(UserError):
    """A file that cannot be used; the message says which, why and what to do."""


def save(path: str | Path, kind: str, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Writes a sealed file of `kind` ("model", "training", "fisher", ...)."""
    write_atomically(path, seal(kind, tensors, metadata))


def seal(kind: str, tensors: dict[str, torch.Tensor], metadata: dict) -> bytes:
    """The bytes of a sealed file; the same for the same content."""
    # One metadata entry: safetensors does not keep the order of several.
    header = json.dumps({"kind": kind, "sha256": _UNSEALED.decode(), "version": VERSION, **metadata}, sort_keys=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors_save(tensors, {_KEY: header})
    digest = hashlib.sha256(content).hexdigest().encode()
    return _SEAL.sub(lambda match: match[0].replace(_UNSEALED, digest), content, count=1)


def load(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and metadata of a sealed file of `kind`.

    Raises FileNotFoundError, or CheckpointError for a file that is foreign, truncated, altered, of another kind or of
    a newer version. `require` checks what it holds.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise CheckpointError(f"{path} is a device or a pipe; name a file")
    with path.open("rb") as file:
        start = file.read(8)
        header_size = int.from_bytes(start, "little")
        header = file.read(header_size) if header_size <= LARGEST_HEADER else b""
        seal = _SEAL.search(header)
        if seal is None:
            raise CheckpointError(
                f"{path} is not a file of this project, or its header is damaged; name another, or delete it"
            )
        try:
            content = b"".join((start, header, file.read()))
        except MemoryError:
            raise CheckpointError(f"{path} is larger than the memory that is free; name another file") from None
    digest = hashlib.sha256(start + header[: seal.start(1)] + _UNSEALED)
    digest.update(memoryview(content)[8 + seal.end(1) :])
    if digest.hexdigest().encode() != seal[1]:
        raise CheckpointError(f"{path} is truncated or altered: its bytes do not fit its checksum; make it anew")
    try:
        tensors = safetensors_load(content)
        metadata = json.loads(json.loads(header)["__metadata__"][_KEY])
        found, version = metadata.pop("kind"), metadata.pop("version", 0)
        metadata.pop("sha256")
    except _MISREAD as error:
        raise CheckpointError(f"{path} is not a file of this project: {_in_one_line(error)}") from None
    if type(version) is not int or version < 0:
        raise CheckpointError(f"{path} is not a file of this project: its version is not a number")
    if version > VERSION:
        raise CheckpointError(
            f"{path} is of format version {version}, and this software reads versions up to {VERSION}; "
            "update the software"
        )
    if found != kind:
        raise CheckpointError(f"{path} is not a {kind} file")
    return tensors, metadata


def require(
    path: str | Path,
    stored: tuple[dict[str, torch.Tensor], dict],
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int | None]]],
    metadata: Mapping[str, type],
) -> tuple[dict[str, torch.Tensor], dict]:
    """What `load` read of `path`, where it holds `tensors`, {name: (type, shape)}, with None for any length, and
    `metadata`, {key: its type in JSON}, and no others. Raises CheckpointError for anything else.
    """
    try:
        require_tensors(stored[0], tensors)
        require_metadata(stored[1], metadata)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged or of another version ({error}); delete it, and the command makes it anew"
        ) from None
    return stored


def require_tensors(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[torch.dtype, Sequence[int | None]]]
) -> None:
    """Raises ValueError naming one of the tensors `found` that is missing, unknown, or of another type or shape."""
    _require_names("tensor", found, expected)
    for name, (dtype, shape) in expected.items():
        tensor = found[name]
        lengths = zip(tensor.shape, shape, strict=False)
        if tensor.dtype != dtype or tensor.dim() != len(shape) or any(n not in (m, None) for m, n in lengths):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} ({wanted})")


def require_metadata(found: Mapping[str, object], expected: Mapping[str, type]) -> None:
    """Raises ValueError naming one key of `found` that is missing, unknown or of another type. A float may be whole."""
    _require_names("entry", found, expected)
    for key, kind in expected.items():
        if type(found[key]) is not kind and not (kind is float and type(found[key]) is int):
            raise ValueError(f"entry {key} is not of type {kind.__name__}")


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, whatever the order, device or memory format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # numpy knows no bfloat16
    return digest.hexdigest()


def _require_names(what: str, found: Mapping, expected: Mapping) -> None:
    for name in sorted(expected.keys() - found.keys()):
        raise ValueError(f"{what} {name} is missing")
    for name in sorted(found.keys() - expected.keys()):
        raise ValueError(f"{what} {shorten(name)} is unknown")


def shorten(value: object) -> str:
    """What a file says, short enough for one line and without control characters."""
    text = str(value).encode("unicode_escape").decode()
    return text if len(text) <= 60 else text[:60] + "..."


def _in_one_line(error: Exception) -> str:
    return shorten(error) if str(error) else type(error).__name__
