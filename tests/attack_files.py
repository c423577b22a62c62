"""Attacks load_model with damaged and with hostile files; each must be refused with one line of UserError.

    python tests/attack_files.py

Damaged: packed models with one byte altered, truncated, or with bytes added. Hostile: validly sealed, wrong inside, and
read under a limit of memory. Prints the counts; exit code 1 where a file was accepted or met another exception.
"""

import contextlib
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.choose import rounding
from common.choose.layers import layer_weights
from common.ddpm.unet import UNet
from common.errors import UserError
from common.formats import coder
from common.formats.packed import Model, full_precision, load_model, save_model
from common.formats.trellis import NO_TRELLIS
from common.presets import UNetConfig
from common.runtime import sealed

ALTERATIONS = 10_000
TRUNCATIONS = 1_000
EXTRA_MEMORY = 512 * 2**20  # bytes; what the hostile files claim is more
CONFIG = UNetConfig(channels=(2, 4, 8, 16, 16, 12), groups=1, heads=2, dropout=0.0)
CONV = "layer2.block1.conv1.weight"
BIAS = "layer2.block1.conv1.bias"


def models() -> dict[str, Model]:
    """One tiny model in fp16, one in int4, and entropy-coded ones: with trellises, with steps by rows, of version 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = UNet(CONFIG).state_dict()
    state[CONV][0, 0, 0, 0] = 30.0  # a code that has a remainder
    metadata = {"label": "Baseline (FP32)", "preset": "quick", "digits_seen": 1, "training": {}}
    baseline = full_precision(CONFIG, state, metadata)
    names = layer_weights(state)
    coded = rounding.encode(state, dict.fromkeys(state, 0.05), trellis=True)
    rows = {name: np.exp2(np.arange(len(w)) % 5 / 8).reshape(-1, *[1] * (w.dim() - 1)) for name, w in state.items()}
    by_rows = rounding.encode(state, {name: 0.05 * of if of.ndim > 1 else 0.05 for name, of in rows.items()})
    return {
        "fp16": baseline.quantize(names, "fp16", {"label": "Uniform (FP16)"}),
        "int4": baseline.quantize(names, "int4", {"label": "Uniform (INT4)"}),
        "entropy 2": Model(CONFIG, coded, dict.fromkeys(state, "entropy"), metadata),
        "entropy 3": Model(CONFIG, by_rows, dict.fromkeys(state, "entropy"), metadata),
        "entropy": load_model(Path(__file__).parent / "data/entropy-version-1.safetensors"),
    }


def hostile_files() -> dict[str, bytes]:
    """{what is wrong: a file with a seal that fits}."""
    files, contents = {}, {}
    for fmt, model in models().items():
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder, fmt), model)
            contents[fmt] = sealed.load(Path(folder, fmt), "model")

    def add(wrong: str, fmt: str, change: Callable[[dict, dict], None]) -> None:
        """The file of `fmt` after `change`(tensors, metadata)."""
        tensors, metadata = deepcopy(contents[fmt])
        change(tensors, metadata)
        files[f"{fmt}: {wrong}"] = sealed.seal("model", tensors, metadata)

    def claim(wrong: str, fmt: str = "fp16", **fields) -> None:
        add(wrong, fmt, lambda tensors, metadata: metadata["architecture"].update(fields))

    def say(wrong: str, **entries) -> None:
        add(wrong, "fp16", lambda tensors, metadata: metadata.update(entries))

    def store(wrong: str, fmt: str, **parts) -> None:
        """Each part is a function of the tensor that was stored."""
        changes = {f"entropy:{name}": part for name, part in parts.items()}
        add(wrong, fmt, lambda tensors, _: tensors.update({n: f(tensors[n].clone()) for n, f in changes.items()}))

    for key in ("architecture", "formats", "about", "weights_sha256", "data_range"):
        add(f"{key} missing", "fp16", lambda tensors, metadata, key=key: metadata.pop(key))
        say(f"{key} of the wrong type", **{key: 7})
    say("an unknown entry", code="import os")
    say("a label that is no text", about={"label": ["x"]})
    say("no label", about={})
    say("a preset that is no text", about={"label": "x", "preset": []})
    say("another range", data_range=[0, 1])

    for field in contents["int4"][1]["architecture"]:
        add(f"{field} missing", "int4", lambda tensors, metadata, f=field: metadata["architecture"].pop(f))
        claim(f"{field} is text", **{field: "1"})
        claim(f"{field} is null", **{field: None})
    claim("an unknown field", depth=3)
    for width in (0, -2, 2**11, 2**20, 2**40, 2**4000):
        for fmt in ("fp16", "entropy", "entropy 2"):
            claim(f"width {width:.3g}" if width < 2**50 else "width 2^4000", fmt, channels=_channels(width))
    claim("no channels", channels=[])
    claim("channels of halves", channels=[2.5, 5.0, 10.0, 20.0, 20.0, 15.0])
    claim("channels within channels", channels=[[2], [4], [8], [16], [16], [12]])
    for field, values in {
        "timesteps": (0, -1, 10**12, 1000.0, True),
        "groups": (0, -1, 3, 10**12),
        "heads": (0, 3, 10**12),
        "dropout": (-1.0, 2.0, float("nan")),
        "attention_layers": ([7], [2, 2], [-1], [[2]]),
        "output_bias": (-1, 1, 65, 10**12, 1.0, True, None, "1"),  # 1: its tensors are not there
        "output_contrast": (True, 1, None, "1"),  # without an output bias
    }.items():
        for value in values:
            claim(f"{field} {value}", **{field: value})
    claim("wider than any file could hold", "entropy", channels=_channels(256))
    claim("wider than any file could hold", "entropy 2", channels=_channels(256))
    claim("wider than these codes stand for", "entropy 2", channels=_channels(64))
    claim("an output bias that these codes lack", "entropy 2", output_bias=1)
    claim("an output bias that these codes lack", "entropy", output_bias=1)
    claim("a little wider than these codes", "entropy 2", channels=_channels(4))

    def set_format(name: str, fmt: object) -> Callable[[dict, dict], None]:
        return lambda tensors, metadata: metadata["formats"].update({name: fmt})

    add("an unknown format", "int4", set_format(CONV, "int9"))
    add("a format that is no text", "int4", set_format(CONV, ["int4"]))
    add("entropy for one tensor", "int4", set_format(CONV, "entropy"))
    add("another format than is stored", "int4", set_format(CONV, "fp32"))
    add("integers of one dimension", "int4", set_format(BIAS, "int4"))
    add("a format of an unknown tensor", "int4", set_format("layer7.weight", "fp16"))
    add("a tensor without a format", "int4", lambda tensors, metadata: metadata["formats"].pop(CONV))
    add("formats are entropy, tensors are not", "int4", lambda _, metadata: metadata.update(formats="entropy"))

    def put(name: str, tensor: torch.Tensor) -> Callable[[dict, dict], None]:
        return lambda tensors, metadata: tensors.update({name: tensor})

    add("a tensor missing", "fp16", lambda tensors, metadata: tensors.pop(CONV))
    add("a scale missing", "int4", lambda tensors, metadata: tensors.pop(f"{CONV}:scale"))
    add("a tensor too many", "fp16", put("more", torch.zeros(1)))
    add("another shape", "fp16", put(CONV, torch.zeros(4, 4, 3, 4, dtype=torch.float16)))
    add("another type", "fp16", put(CONV, torch.zeros(4, 4, 3, 3, dtype=torch.float64)))
    add("codes too short", "int4", put(CONV, torch.zeros(71, dtype=torch.uint8)))
    add("codes too long", "int4", put(CONV, torch.zeros(73, dtype=torch.uint8)))
    add("codes of another type", "int4", put(CONV, torch.zeros(72, dtype=torch.int8)))
    add("scale too short", "int4", put(f"{CONV}:scale", torch.ones(3)))
    add("scale of another type", "int4", put(f"{CONV}:scale", torch.ones(4, dtype=torch.float16)))
    add("scale of no number", "int4", put(f"{CONV}:scale", torch.full((4,), float("nan"))))
    add("a weight that is infinite", "fp16", _infinite)

    store("one step too few", "entropy", steps=lambda steps: steps[1:])
    store("steps of another type", "entropy", steps=lambda steps: steps.double())
    for step in (0.0, -1.0, float("nan"), float("inf"), 1e38):
        store(f"a step {step}", "entropy", steps=lambda steps, step=step: torch.full_like(steps, step))
    store("one range too few", "entropy", ranges=lambda ranges: ranges[1:])
    store("ranges of three", "entropy", ranges=lambda ranges: torch.cat([ranges, ranges[:, :1]], 1))
    store("ranges of another type", "entropy", ranges=lambda ranges: ranges.long())
    store("a negative length", "entropy", ranges=lambda ranges: ranges * torch.tensor([1, -1], dtype=torch.int16))
    store("no length", "entropy", ranges=lambda ranges: ranges * torch.tensor([1, 0], dtype=torch.int16))
    store("ranges beyond the tables", "entropy", ranges=lambda ranges: ranges + torch.tensor([0, 9], dtype=torch.int16))
    store("symbols of codes too large", "entropy", ranges=lambda ranges: ranges - torch.tensor([999, 0]).short())
    store("a table too short", "entropy", tables=lambda tables: tables[1:])
    store("tables of zeros", "entropy", tables=torch.zeros_like)
    store("tables of another type", "entropy", tables=lambda tables: tables.short())
    store("no symbols", "entropy", symbols=lambda symbols: symbols[:0])
    store("symbols cut short", "entropy", symbols=lambda symbols: symbols[4:])
    store("symbols of half a word", "entropy", symbols=lambda symbols: symbols[2:])
    store("symbols that end in zeros", "entropy", symbols=lambda symbols: torch.cat([symbols, torch.zeros(4).byte()]))
    store("symbols too many", "entropy", symbols=lambda symbols: torch.cat([symbols, torch.ones(4).byte()]))
    store("no remainders", "entropy", remainders=lambda remainders: remainders[:0])
    store("remainders too many", "entropy", remainders=lambda remainders: torch.cat([remainders, remainders + 1]))
    store("remainders of another type", "entropy", remainders=lambda remainders: remainders.float())
    for version, other in (
        ("entropy", "entropy 2"),
        ("entropy 2", "entropy"),
        ("entropy 2", "entropy 3"),
        ("entropy 3", "entropy 2"),
    ):
        add(f"called {other}", version, lambda tensors, metadata, other=other: metadata.update(formats=other))
    for version in ("entropy 2", "entropy 3"):
        store("one step too few", version, steps=lambda steps: steps[1:])
        store("steps of another type", version, steps=lambda steps: steps.double())
        for step in (0.0, -1.0, float("nan"), float("inf"), 1e38):
            store(f"a step {step}", version, steps=lambda steps, step=step: torch.full_like(steps, step))
        store("one layout too few", version, layout=lambda layout: layout[1:])
        for dtype in (torch.int64, torch.complex64):
            store(f"layouts of type {dtype}", version, layout=lambda layout, dtype=dtype: layout.to(dtype))
        for number in (*range(1, 10), 255):
            store(f"all layouts {number}", version, layout=lambda layout, n=number: torch.full_like(layout, n))
        store("layouts of zeros", version, layout=torch.zeros_like)
        store("no codes", version, codes=lambda codes: codes[:0])
        store("codes cut short", version, codes=lambda codes: codes[:-1])
        store("codes begin later", version, codes=lambda codes: codes[1:])
        store("codes too many", version, codes=lambda codes: torch.cat([codes, torch.zeros(1).byte()]))
        store("codes of zeros", version, codes=torch.zeros_like)
        store("codes of ones", version, codes=lambda codes: torch.full_like(codes, 255))
        store("codes of another type", version, codes=lambda codes: codes.short())
        add("codes missing", version, lambda tensors, metadata: tensors.pop("entropy:codes"))
        add("layouts missing", version, lambda tensors, metadata: tensors.pop("entropy:layout"))
        add("tables beside codes", version, put("entropy:tables", torch.ones(3).byte()))
    store("steps by rows of the other dimension", "entropy 3", layout=lambda layout: layout + 3 * (layout >= 3))
    store("steps by rows of one tensor less", "entropy 3", layout=lambda layout: layout * (layout.cumsum(0) > 3))
    for exponent in (513, -513, 2**23, -(2**23)):
        store(f"an exponent of {exponent}", "entropy 3", codes=lambda codes, e=exponent: _stream_of(e))
    store("steps that are infinite by rows", "entropy 3", steps=lambda steps: torch.full_like(steps, 3e38))
    add("symbols missing", "entropy", lambda tensors, metadata: tensors.pop("entropy:symbols"))
    return files


def _stream_of(exponent: int) -> torch.Tensor:
    """Codes that begin with this exponent of a step."""
    codes = np.full((1, 99), exponent, np.int32)
    return torch.from_numpy(np.frombuffer(coder.write([(codes, NO_TRELLIS)]), np.uint8).copy())


def _channels(width: int) -> list[int]:
    return [width * factor for factor in (1, 2, 4, 8, 8, 6)]


def _infinite(tensors: dict, metadata: dict) -> None:
    """With the hash of the weights as they are."""
    tensors[CONV][0, 0, 0, 0] = float("inf")
    metadata["weights_sha256"] = sealed.hash_tensors({name: tensor.float() for name, tensor in tensors.items()})


@contextlib.contextmanager
def limited_memory(extra: int = EXTRA_MEMORY) -> Iterator[None]:
    """Within it the process can take no more than `extra` bytes of address space beyond what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(path: Path) -> str:
    """What load_model makes of a file: "refused", or what it did instead."""
    try:
        load_model(path)
    except UserError as error:
        told = str(error)
        return "refused" if "\n" not in told and path.name in told and len(told) < 1000 else f"told unclearly: {told}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def damaged(content: bytes, alterations: int, truncations: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Places all over the file, values at random; lengths all over; bytes before and after."""
    random = np.random.default_rng(seed)
    places = np.linspace(0, len(content), alterations, endpoint=False) + random.random(alterations)
    for place in (places * len(content) / places.max() * (1 - 1e-9)).astype(int):
        value = (content[place] + int(random.integers(1, 256))) % 256
        yield "altered", content[:place] + bytes([value]) + content[place + 1 :]
    for length in np.linspace(0, len(content), truncations, endpoint=False).astype(int):
        yield "truncated", content[:length]
    for count in range(1, 50):
        yield "with bytes added", content + random.bytes(count)
        yield "with bytes added", random.bytes(count) + content


def main() -> None:
    counts: dict[str, Counter] = {}

    def attack(kind: str, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        result = outcome(path)
        counts.setdefault(kind, Counter())[result] += 1
        if result != "refused":
            print(f"{kind}: {result}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "attacked.safetensors")
        for seed, (fmt, model) in enumerate(models().items()):
            save_model(path, model)
            content = path.read_bytes()
            load_model(path)  # as it is, it is read
            share = ALTERATIONS // 4
            for kind, attacked in damaged(content, share, TRUNCATIONS // 4, seed):
                attack(f"{fmt} {kind}", path, attacked)
        for wrong, content in hostile_files().items():
            path.write_bytes(content)
            with limited_memory():
                result = outcome(path)
            counts.setdefault("hostile", Counter())[result] += 1
            if result != "refused":
                print(f"{wrong}: {result}")
    for kind, results in counts.items():
        print(f"{kind}: {results['refused']} of {results.total()} refused")
    if any(set(results) != {"refused"} for results in counts.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
