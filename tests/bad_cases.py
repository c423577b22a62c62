"""What tests/bad_inputs.py gives to the scripts and tools, and what each answer must say."""

import ctypes
import itertools
import json
import os
import pickle
import resource
import shlex
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

SCRIPTS = ("simplediffusion.py", "whole_threshold.py", "layer_group.py", "layer_ratio.py", "layer_math.py")
BUDGET = "layer_budget.py"
QUICK = "--preset quick --device cpu"
HUGE = "99999999999999999999"
BASELINE = "checkpoints/quick.safetensors"
PACKED, CODED = "packed.safetensors", "coded.safetensors"  # INT4 and entropy-coded models of the baseline
ROWS = "results/quick/results.jsonl"
DEEP = "[" * 100_000 + "]" * 100_000
IS_ROOT = os.geteuid() == 0


@dataclass
class Case:
    """name: of the case. command: what follows `python`. said: what the answer must name.

    setup(folder) damages a folder in which scripts have run, or an empty one where `bare`. `inside` runs in the process
    before the command. expect: "refused"; "heals", exit code 0 and a note that holds `said`; or "either".
    """

    name: str
    command: list[str]
    said: tuple[str, ...]
    setup: Callable[[Path], None] = lambda folder: None
    expect: str = "refused"
    bare: bool = False
    inside: Callable[[], None] = lambda: None
    shell: str = ""
    named: tuple[str, ...] = ()

    @property
    def programs(self) -> tuple[str, ...]:
        """What the line may begin with."""
        if self.named:
            return self.named
        if self.command[0] != "-m":
            return (self.command[0],)
        if self.command[1] == "common":
            return (f"python -m common {self.command[2]}",) if len(self.command) > 2 else ("python -m common",)
        return (f"python -m {self.command[1]}", self.command[1].rpartition(".")[2] + ".py")


def command_of(line: str, *more: str) -> list[str]:
    """What follows `python` for "common report --x" or "layer_ratio.py --x", and arguments that no shell splits."""
    words = [*shlex.split(line), *more]
    return words if words[0].endswith(".py") else ["-m", *words]


def case(name: str, line: str, *said: str, more: tuple[str, ...] = (), **settings) -> Case:
    return Case(f"{name} [{shlex.split(line)[0]}]", command_of(line, *more), said, **settings)


def all_cases() -> list[Case]:
    kinds = (
        numbers, choices, combinations, devices, paths_out, paths_checkpoint, damaged_models, damaged_states,
        damaged_rows, damaged_sensitivity, folders_of_images, own_models, mnist, inception, tools, processes,
    )  # fmt: skip
    return list(itertools.chain.from_iterable(kind() for kind in kinds))


# Files


def put(name: str, content: bytes | str, folder: Path) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def puts(name: str, content: bytes | str) -> Callable[[Path], None]:
    return partial(put, name, content)


def clear(path: Path) -> Path:
    """The path, with nothing there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def folder_at(name: str) -> Callable[[Path], None]:
    return lambda folder: (clear(folder / name) / "below").mkdir(parents=True)


def pipe_at(name: str) -> Callable[[Path], None]:
    return lambda folder: os.mkfifo(clear(folder / name))


def link_at(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: clear(folder / name).symlink_to(target)


def loop_at(name: str) -> Callable[[Path], None]:
    return link_at(name, Path(name).name)


def change(pattern: str, how: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Changes the bytes of all files of a pattern; at least one."""

    def setup(folder: Path) -> None:
        paths = [path for path in folder.glob(pattern) if path.is_file()]
        assert paths, f"no {pattern}"
        for path in paths:
            path.write_bytes(how(path.read_bytes()))

    return setup


def each(pattern: str, at: Callable[[str], Callable[[Path], None]]) -> Callable[[Path], None]:
    """Puts something else in the place of all files of a pattern; at least one."""

    def setup(folder: Path) -> None:
        paths = list(folder.glob(pattern))
        assert paths, f"no {pattern}"
        for path in paths:
            at(str(path.relative_to(folder)))(folder)

    return setup


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "truncated in its header": lambda content: content[:40],
    "altered": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "longer": lambda content: content + b"\0",
    "text": lambda content: b"not a checkpoint\n" * 100,
}


# Numbers

BAD_INTS = ("0", "-1", "1.5", "", "1_0", "٣", "1e3", "nan", "inf", " 5", HUGE)
INTS = (  # option, the scripts that have it
    ("--images", [f"{script} {QUICK}" for script in SCRIPTS]),
    ("--steps", [f"{script} {QUICK}" for script in (*SCRIPTS, "common timesteps")]),
    ("--batch-size", [f"{script} {QUICK}" for script in (*SCRIPTS, "common learning-curve")]),
    ("--controls", [f"{script} {QUICK}" for script in SCRIPTS[1:]]),
    ("--training-steps", [f"simplediffusion.py {QUICK} --retrain"]),
    ("--keep-every", [f"simplediffusion.py {QUICK} --retrain"]),
    ("--finetune", [f"{BUDGET} {QUICK} --times 4"]),
    ("--digits", [f"common sensitivity {QUICK}"]),
    ("--ddim", [f"benchmarks.samplers {QUICK}"]),
    ("--dpm", [f"benchmarks.samplers {QUICK}"]),
    ("--rounds", ["benchmarks.speed --device cpu"]),
    ("--images", ["benchmarks.memory"]),
)
BAD_FLOATS = ("", "nan", "inf", "-inf", "0_1", "0.٣", " 0.5", "1e400", HUGE, "0x1p-1", "half", "0,5")
FLOATS = (
    ("--eta", f"simplediffusion.py {QUICK} --sampler ddim"),
    ("--threshold", f"whole_threshold.py {QUICK}"),
    ("--ratio", f"layer_ratio.py {QUICK}"),
    ("--alpha", f"layer_math.py {QUICK}"),
    ("--k", f"layer_math.py {QUICK}"),
    ("--size", f"{BUDGET} {QUICK}"),
    ("--times", f"{BUDGET} {QUICK}"),
)
BAD_SEEDS = ("1.5", "-1", str(2**64), "", "nan", "1_0", "٣", " 1", "1e3", "1" * 5000)


def numbers() -> Iterator[Case]:
    for option, lines in INTS:
        for value, line in zip(BAD_INTS, itertools.cycle(lines)):
            if (option, value) == ("--seed", "0"):
                continue
            yield case(f"number {option} {value!r}", line, option, value or "''", more=(option, value))
    for option, line in FLOATS:
        for value in BAD_FLOATS:
            yield case(f"number {option} {value!r}", line, option, value or "''", more=(f"{option}={value}",))
    for (option, line), value in itertools.product(FLOATS, ("-0.1", "-11", "1e9")):
        if (option, value) != ("--k", "-0.1"):
            yield case(f"number {option} {value}", line, option, value, more=(f"{option}={value}",))
    for value, script in zip(BAD_SEEDS, itertools.cycle((*SCRIPTS, BUDGET))):
        line = f"{script} {QUICK}" + (" --times 4" if script == BUDGET else "")
        yield case(f"number --seed {value[:20]!r}", line, "--seed", value or "''", more=(f"--seed={value}",))


# Words


def choices() -> Iterator[Case]:
    options = {
        "--preset": ("huge", "", "Quick"), "--data": ("cifar", ""), "--format": ("int1", "fp32", "INT8", ""),
        "--timestep-weighting": ("2", "", "all"), "--fisher-timestep": ("2", ""), "--curvature": ("hessian", ""),
        "--sampler": ("euler", ""), "--precision": ("fp8", ""), "--engine": ("onnx", ""),
        "--metric": ("clip", ""),
    }  # fmt: skip
    scripts = itertools.cycle(SCRIPTS[1:])
    for option, values in options.items():
        for value in values:
            yield case(f"word {option} {value!r}", next(scripts), option, value or "''", more=(option, value))
    yield case("word --coding", f"{BUDGET} {QUICK} --times 4 --coding zip", "--coding", "zip")
    yield case("word --formats", f"common sensitivity {QUICK} --formats int8 int9", "--formats", "int9")
    yield case("word --preset", "common report --preset huge", "--preset", "huge")
    yield case("word --preset", "benchmarks.profile --preset huge", "--preset", "huge")
    yield case("word --metric", "common metrics digits --metric clip", "--metric", "clip")
    lines = (*SCRIPTS, f"{BUDGET} --times 4", "common report", "common metrics digits", "common features --out f")
    for line in (*lines, "benchmarks.memory", "benchmarks.peers"):
        yield case(f"unknown option {line}", f"{line} --thresold 1", "--thresold")
    for line in (
        "whole_threshold.py --thresh 1",
        "layer_ratio.py --form int8",
        "common report --mark",
        "benchmarks.speed --round 1",
    ):
        yield case(f"abbreviated option {line}", line, line.split()[-2 if line[-1] in "18" else -1])
    yield case("an argument too many", "layer_ratio.py 0.25", "0.25")
    yield case("an argument too many", "common metrics digits digits2", "digits2")
    for line in (
        "whole_threshold.py --threshold",
        "layer_group.py --groups",
        "layer_ratio.py --checkpoint",
        "common report --out",
    ):
        yield case(f"option without its value {line}", line, line.split()[-1])
    for line in (
        "layer_ratio.py --ratio 0.1 --ratio 0.2",
        "layer_ratio.py --seed 0 --seed 1",
        "simplediffusion.py --out a --out b",
        "layer_group.py --groups 12/3456 --groups 123/456",
    ):
        yield case(f"option twice {line}", f"{line} {QUICK}", line.split()[1])
    groups = (
        "", "/", "12/3456/", "/12/3456", "12//3456", "12/3457", "12/345", "12/34 56", "1122/3456", "12/23456",
        "0/123456", "１２/3456", "12\\3456", "a/b", "12/3456,", "-1",
    )  # fmt: skip
    for value in groups:
        yield case(f"--groups {value!r}", f"layer_group.py {QUICK}", "--groups", value, more=(f"--groups={value}",))


# Options that do not go together


def combinations() -> Iterator[Case]:
    quick = {script: f"{script} {QUICK}" for script in (*SCRIPTS, BUDGET)}
    base, ratio, budget = quick["simplediffusion.py"], quick["layer_ratio.py"], quick[BUDGET]
    math = quick["layer_math.py"]
    yield case("--steps 1001", f"{base} --steps 1001", "--steps 1001", "1000")
    yield case("--steps 1001", f"{budget} --times 4 --steps 1001", "--steps 1001", "1000")
    yield case("--sampler ddpm --steps 10", f"{ratio} --sampler ddpm --steps 10", "--steps 10", "--sampler ddpm")
    yield case("--eta with dpm++", f"{ratio} --sampler dpm++ --eta 0.5", "--eta 0.5", "--sampler ddim")
    yield case("--eta with ddpm", f"{math} --sampler ddpm --eta 0.5", "--eta 0.5", "--sampler ddim")
    for script in (*SCRIPTS, BUDGET):
        line = quick[script] + (" --times 4" if script == BUDGET else "")
        yield case(f"--images 256 {script}", f"{line} --images 256", "256", "--images", "257")
    yield case("--images 1", f"common timesteps {QUICK} --images 1", "1 images", "--images", "257")
    yield case("--images 256 for Inception", f"{ratio} --metric inception --images 300", "--metric inception")
    yield case("--alpha and --k", f"{math} --alpha 0.5 --k 1", "--alpha", "--k")
    yield case("--size and --times", f"{budget} --size 1 --times 10", "--size", "--times")
    yield case("neither --size nor --times", budget, "--size", "--times")
    yield case("--times auto 10", f"{budget} --times auto 10", "--times", "auto")
    yield case("--times auto auto", f"{budget} --times auto auto", "--times", "auto")
    yield case("--times Auto", f"{budget} --times Auto", "--times", "Auto")
    yield case("--times 0.5", f"{budget} --times 0.5", "--times", "0.5")
    yield case("--times 0.99", f"{budget} --times 0.99", "--times", "0.99")
    yield case("--times 1e6", f"{budget} --times 1e6", "1e+06", "--times", "--size")
    yield case("--times 4 500", f"{budget} --times 4 500", "500x", "--times")
    yield case("--times 500 fixed", f"{budget} --times 500 --coding fixed", "500x", "--times")
    yield case("--size 1e-6", f"{budget} --size 1e-6", "1e-06", "--size")
    yield case("--size 0.001", f"{budget} --size 0.001", "0.001", "--size")
    yield case("--size 1e-6 fixed", f"{budget} --size 1e-6 --coding fixed", "1e-06", "--size")
    yield case("--finetune fixed", f"{budget} --times 4 --coding fixed --finetune 5", "--finetune", "--coding")
    yield case("--rounding entropy", f"{budget} --times 4 --rounding feedback", "--rounding", "--coding fixed")
    yield case("--rounding fp16", f"{base} --rounding feedback", "--rounding feedback", "--format")
    yield case("--rounding up", f"{base} --format int4 --rounding up", "--rounding", "up")
    yield case("waterfall --times 500", f"common waterfall {QUICK} --times 500", "500x", "--times")
    yield case("waterfall --times auto", f"common waterfall {QUICK} --times auto", "--times", "auto")
    yield case("--controls auto", f"{budget} --times auto --controls 2", "--controls", "--times auto")
    yield case("--format budget", f"{budget} --times 4 --format int8", "--format", "int8")
    yield case("--training-steps of a trained one", f"{base} --training-steps 3", "--training-steps 3", "--retrain")
    yield case("--keep-every of a trained one", f"{base} --keep-every 3", "--keep-every 3", "--retrain")
    yield case("--keep-every beyond the end", f"{base} --retrain --keep-every 500", "--keep-every 500")
    yield case("--inception-weights alone", f"{ratio} --inception-weights w.pth", "w.pth", "--metric inception")
    yield case(
        "--inception-weights alone", "common metrics digits --inception-weights w.pth", "w.pth", "--metric inception"
    )
    yield case("--markdown --frontier", "common report --markdown --frontier", "--frontier", "--markdown")
    yield case("--sensitivity --markdown", "common report --sensitivity --markdown", "--sensitivity", "--markdown")
    yield case("--sampler in samplers", f"benchmarks.samplers {QUICK} --sampler ddim", "--sampler", "--ddim")
    yield case("--steps in samplers", f"benchmarks.samplers {QUICK} --steps 5", "--steps", "--ddim")
    yield case("--ddim 1001", f"benchmarks.samplers {QUICK} --ddim 1001", "--ddim", "1001", "1000")
    yield case("--dpm 1001", f"benchmarks.samplers {QUICK} --dpm 10 1001", "--dpm", "1001", "1000")
    yield case("--digits 1", f"common sensitivity {QUICK} --digits 1", "--digits", "1")
    yield case("--digits beyond the test digits", f"common sensitivity {QUICK} --digits 5000", "--digits", "5000")


# Devices


def devices() -> Iterator[Case]:
    names = ("cpu:1", "cuda", "cuda:99", "tpu", "", "meta", "CPU", "cuda:-1", "cuda:1.5", "mps", "cpu,cuda")
    for name, script in zip(names, itertools.cycle(SCRIPTS)):
        said = ("--device", name or "''", "cpu")
        yield case(f"--device {name!r}", f"{script} --preset quick", *said, more=("--device", name))
    for tool in ("common metrics digits", "benchmarks.speed", "benchmarks.profile", "common timesteps --preset quick"):
        for name in ("cuda:99", "tpu", "cpu:1"):
            yield case(f"--device {name} {tool}", f"{tool} --device {name}", "--device", name, "cpu")


# --out

LONG_NAME = "n" * 300
LONG_PATH = "/".join(["folder"] * 700)


def on_a_full_disk() -> None:
    """Mounts a full file system of 1 MiB at ./full, seen by this process alone, where that is allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) == 0:  # CLONE_NEWNS
        libc.mount(b"none", b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
        if libc.mount(b"tmpfs", b"full", b"tmpfs", 0, b"size=1m") == 0:
            Path("full/filler").write_bytes(b"\0" * (2**20 - 8192))


def files_of_at_most(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def paths_out() -> Iterator[Case]:
    empty = lambda name: lambda folder: (folder / name).mkdir()  # noqa: E731
    places = {
        "a file": ("file", puts("file", "kept")),
        "below a file": ("file/below", puts("file", "kept")),
        "/proc": ("/proc", empty("unused")),
        "below /proc": ("/proc/results", empty("unused")),
        "/dev/null": ("/dev/null", empty("unused")),
        "a loop of links": ("loop", loop_at("loop")),
        "below a loop of links": ("loop/below", loop_at("loop")),
        "a link to nothing": ("link", link_at("link", "nowhere/at/all")),
        "a pipe": ("pipe", pipe_at("pipe")),
        "a long name": (LONG_NAME, empty("unused")),
        "a long path": (LONG_PATH, empty("unused")),
        "empty": ("", empty("unused")),
    }
    scripts = itertools.cycle((*SCRIPTS, f"{BUDGET} --times 4"))
    for name, (out, setup) in places.items():
        yield case(f"--out {name}", f"{next(scripts)} {QUICK}", "--out", out, setup=setup, more=("--out", out))
    for tool in ("timesteps", "sensitivity", "learning-curve"):
        setup = puts("file", "kept")
        yield case(f"--out a file {tool}", f"common {tool} {QUICK} --out file", "--out", "file", setup=setup)
    for tool in ("samplers", "peers"):
        setup = puts("file", "kept")
        yield case(f"--out a file {tool}", f"benchmarks.{tool} {QUICK} --out file", "--out", "file", setup=setup)
    if IS_ROOT:
        line = f"layer_ratio.py {QUICK} --out full"
        yield case("--out a full disk", line, "--out full", setup=empty("full"), inside=on_a_full_disk)
    else:
        closed = lambda folder: (folder / "closed").mkdir(mode=0o500)  # noqa: E731
        yield case("--out closed", f"layer_ratio.py {QUICK} --out closed", "--out closed", "denied", setup=closed)
    line, inside = f"layer_ratio.py {QUICK} --seed 5", files_of_at_most(10_000)
    yield case("files of at most 10,000 bytes", line, "too large", setup=empty("unused"), inside=inside)
    yield case(
        "--out of bytes that are no text", f"layer_ratio.py {QUICK}", more=("--out", "\udcff"), expect="either"
    )  # fmt: skip
    for inner in ("images", "models", "reference"):
        for kind, at in (
            ("file", lambda name: lambda f: put(name, "kept", clear(f / name) and f)),
            ("pipe", pipe_at),
            ("loop", loop_at),
        ):
            name = f"results/quick/{inner}"
            yield case(f"{inner}/ is a {kind}", f"layer_ratio.py {QUICK} --seed 3 --data mnist5k", name, setup=at(name))
    taken = each("results/quick/models/ratio-0.25-int4*", folder_at)
    yield case("a packed model is a folder", f"layer_ratio.py {QUICK} --format int4", "ratio-0.25-int4", setup=taken)
    yield case(
        "results is a file",
        f"layer_ratio.py {QUICK}",
        "--out",
        "results/quick",
        setup=lambda f: put("results", "kept", clear(f / "results") and f),
    )


# --checkpoint


def paths_checkpoint() -> Iterator[Case]:
    places = {
        "missing": ("absent.safetensors", None),
        "a folder": ("folder", folder_at("folder")),
        "a pipe": ("pipe", pipe_at("pipe")),
        "a loop of links": ("loop", loop_at("loop")),
        "a link to nothing": ("link", link_at("link", "nowhere")),
        "below a file": ("file/below", puts("file", "kept")),
        "a long name": (LONG_NAME, None),
        "/dev/zero": ("/dev/zero", None),
        "/dev/null": ("/dev/null", None),
        "a socket of the system": ("/proc/self/mem", None),
        "-": ("-", None),
        "bytes that are no text": ("\udcff", None),
        "empty": ("", None),
    }
    for name, (path, setup) in places.items():
        for script in ("simplediffusion.py", "layer_ratio.py"):
            said = ("--checkpoint", "" if path == "\udcff" else path)
            settings = {"setup": setup} if setup else {}
            more = ("--checkpoint", path)
            yield case(f"--checkpoint {name}", f"{script} {QUICK}", *said, more=more, **settings)
    for name in ("a folder", "a pipe", "/dev/zero"):
        path, setup = places[name]
        settings = {"setup": setup} if setup else {}
        yield case(
            f"--checkpoint {name}, no preset", "whole_threshold.py --device cpu", "--checkpoint", path,
            more=("--checkpoint", path), **settings,
        )  # fmt: skip
    for name, setup in {
        "a folder": folder_at(BASELINE), "a pipe": pipe_at(BASELINE), "a loop": loop_at(BASELINE),
        "absent": lambda f: (f / BASELINE).unlink(),
    }.items():  # fmt: skip
        for line in ("layer_math.py", f"{BUDGET} --times 4", "common timesteps", "common sensitivity"):
            yield case(f"the baseline is {name} {line}", f"{line} {QUICK}", BASELINE, setup=setup)
    yield case("the baseline is a pipe", f"simplediffusion.py {QUICK}", BASELINE, setup=pipe_at(BASELINE))
    for script in (*SCRIPTS[1:], f"{BUDGET} --times 4", "common timesteps", "common sensitivity"):
        yield case(f"quantized {script}", f"{script} {QUICK} --checkpoint {PACKED}", PACKED, "quantized", BASELINE)
    yield case("entropy-coded", f"layer_ratio.py {QUICK} --checkpoint {CODED}", CODED, "quantized", BASELINE)
    yield case(
        "--retrain over a quantized model", f"simplediffusion.py {QUICK} --retrain --checkpoint {PACKED}", PACKED
    )
    for option in ("--format int4", "--format int4 --rounding feedback"):
        line = f"simplediffusion.py {QUICK} --checkpoint {PACKED} {option}"
        yield case(f"{option} of a quantized model", line, "--format int4", PACKED, "leave the option out")
    retrain = f"simplediffusion.py {QUICK} --retrain --checkpoint"
    yield case("--baseline of a training", f"{retrain} new.safetensors --baseline {BASELINE}", "--baseline")
    yield case("--retrain a folder", f"{retrain} folder", "--checkpoint", "folder", setup=folder_at("folder"))
    yield case("--retrain a pipe", f"{retrain} pipe", "--checkpoint", "pipe", setup=pipe_at("pipe"))
    yield case("--retrain a loop", f"{retrain} loop", "--checkpoint", "loop", setup=loop_at("loop"))
    yield case("--retrain below a file", f"{retrain} file/x", "--checkpoint", "file", setup=puts("file", "kept"))
    yield case("--retrain a foreign file", f"{retrain} notes.txt", "notes.txt", setup=puts("notes.txt", "my notes"))
    yield case("--retrain a long name", f"{retrain} {LONG_NAME}", LONG_NAME)
    yield case(
        "--retrain empty", f"simplediffusion.py {QUICK} --retrain", "--checkpoint", more=("--checkpoint", "")
    )  # fmt: skip
    yield case("--retrain /dev/null", f"{retrain} /dev/null", "--checkpoint", "/dev/null")
    yield case(
        "another preset's", f"layer_ratio.py --preset paper --device cpu --checkpoint {BASELINE}", BASELINE, "--preset"
    )
    for script in ("simplediffusion.py", "layer_group.py"):
        for name, damage in DAMAGES.items():
            line = f"{script} {QUICK}"
            yield case(f"baseline {name}", line, "quick.safetensors", setup=change(BASELINE, damage))
    features = "results/quick/sensitivity.jsonl"
    yield case("--checkpoint of another kind of file", f"layer_ratio.py {QUICK} --checkpoint {features}", features)


# Models that are well sealed and false


def header(content: bytes, said: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if said is None else said) + content


def falsified(alter: Callable[[dict, dict], None], source: str = BASELINE) -> Callable[[Path], None]:
    """false.safetensors: the model of `source` after alter(tensors, metadata), its checksum right."""

    def setup(folder: Path) -> None:
        from common.runtime import sealed

        tensors, metadata = sealed.load(folder / source, "model")
        alter(tensors, metadata)
        sealed.save(folder / "false.safetensors", "model", tensors, metadata)

    return setup


def damaged_models() -> Iterator[Case]:
    import torch

    def tensor(change_it):  # of the first weight of a layer
        def alter(tensors, metadata):
            name = next(name for name in tensors if name.startswith("layer") and tensors[name].dim() == 4)
            tensors[name] = change_it(tensors[name])

        return alter

    def shape(**values):
        return lambda tensors, metadata: metadata["architecture"].update(values)

    def about(**values):
        return lambda tensors, metadata: metadata["about"].update(values)

    def part(suffix, change_it):  # of the first tensor of that name
        def alter(tensors, metadata):
            name = next(name for name in tensors if name.endswith(suffix))
            tensors[name] = change_it(tensors[name])

        return alter

    alterations: dict[str, tuple[Callable, str]] = {
        "without architecture": (lambda t, m: m.pop("architecture"), BASELINE),
        "without formats": (lambda t, m: m.pop("formats"), BASELINE),
        "without about": (lambda t, m: m.pop("about"), BASELINE),
        "about is a list": (lambda t, m: m.update(about=[1]), BASELINE),
        "architecture is text": (lambda t, m: m.update(architecture="big"), BASELINE),
        "two channels": (shape(channels=[4, 8]), BASELINE),
        "channels are text": (shape(channels="abc"), BASELINE),
        "channels of 0": (shape(channels=[0] * 6), BASELINE),
        "channels below 0": (shape(channels=[-4, -8, -16, -32, -32, -24]), BASELINE),
        "channels of terabytes": (shape(channels=[2**22 * k for k in (1, 2, 4, 8, 8, 6)]), BASELINE),
        "an unknown part of the shape": (shape(depth=3), BASELINE),
        "groups 0": (shape(groups=0), BASELINE),
        "heads 7": (shape(heads=7), BASELINE),
        "timesteps of 10^12": (shape(timesteps=10**12), BASELINE),
        "timesteps 0": (shape(timesteps=0), BASELINE),
        "timesteps is text": (shape(timesteps="many"), BASELINE),
        "an unknown format": (lambda t, m: m["formats"].update({next(iter(m["formats"])): "int9"}), BASELINE),
        "formats is a list": (lambda t, m: m.update(formats=["fp32"]), BASELINE),
        "a format lacking": (lambda t, m: m["formats"].pop(next(iter(m["formats"]))), BASELINE),
        "a tensor lacking": (lambda t, m: t.pop(next(iter(t))), BASELINE),
        "a tensor too many": (lambda t, m: t.update(extra=torch.zeros(3)), BASELINE),
        "a tensor of another shape": (tensor(lambda x: x[:1].contiguous()), BASELINE),
        "a tensor of another type": (tensor(lambda x: x.double()), BASELINE),
        "a weight that is NaN": (tensor(lambda x: x * float("nan")), BASELINE),
        "weights altered": (tensor(lambda x: x + 1), BASELINE),
        "scale lacking": (lambda t, m: t.pop(next(n for n in t if n.endswith(":scale"))), PACKED),
        "scale of another shape": (part(":scale", lambda x: x[:1].contiguous()), PACKED),
        "scale NaN": (part(":scale", lambda x: x * float("nan")), PACKED),
        "codes too few": (tensor(lambda x: x) if False else part("weight", lambda x: x.flatten()[:1].clone()), PACKED),
        "steps lacking": (lambda t, m: t.pop("entropy:steps"), CODED),
        "steps negative": (part("entropy:steps", lambda x: -x), CODED),
        "steps NaN": (part("entropy:steps", lambda x: x * float("nan")), CODED),
        "steps too few": (part("entropy:steps", lambda x: x[:1].clone()), CODED),
        "a word that lacks its label": (lambda t, m: m["about"].pop("label"), BASELINE),
        "a label that is a number": (about(label=7), BASELINE),
        "a label of many lines": (about(label="a\nb"), BASELINE),
        "digits_seen is text": (about(digits_seen="many"), BASELINE),
        "without digits_seen": (lambda t, m: m["about"].pop("digits_seen"), BASELINE),
        "training is a number": (about(training=3), BASELINE),
    }
    for number, (name, (alter, source)) in enumerate(alterations.items()):
        script = "layer_ratio.py" if source == BASELINE and number % 2 else "simplediffusion.py"
        line = f"{script} {QUICK} --checkpoint false.safetensors"
        yield case(f"model {name}", line, "false.safetensors", setup=falsified(alter, source))

    def scrambled(folder: Path) -> None:  # each tensor of an entropy-coded model filled with random bytes
        def alter(tensors, metadata):
            for name in tensors:
                generator = torch.Generator().manual_seed(0)
                noise = torch.randint(0, 256, (tensors[name].nbytes,), dtype=torch.uint8, generator=generator)
                tensors[name] = noise.view(tensors[name].dtype).reshape(tensors[name].shape)

        falsified(alter, CODED)(folder)

    line = f"simplediffusion.py {QUICK} --checkpoint false.safetensors"
    yield case("model of random codes", line, "false.safetensors", setup=scrambled)
    for preset in ("huge", 7, ["quick"]):
        yield case(
            f"model of preset {preset!r}", "layer_ratio.py --device cpu --checkpoint false.safetensors",
            "false.safetensors", "preset", setup=falsified(about(preset=preset)),
        )  # fmt: skip
    raw = {
        "header of exabytes": header(b"{}", 2**60),
        "header longer than the file": header(b"{}", 1000),
        "header deeply nested": header(DEEP.encode()),
        "header not UTF-8": header(b"\xff\xfe{}"),
        "header that is a list": header(b"[1, 2]"),
        "header of a tensor of terabytes": header(
            b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}'
        ),
        "header with offsets below 0": header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}')
        + b"0000",
        "foreign safetensors": header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}') + b"0000",
        "pickle": pickle.dumps({"weights": [1, 2, 3]}),
        "zip": b"PK\x03\x04" + b"\0" * 100,
    }
    for name, content in raw.items():
        line = f"layer_ratio.py {QUICK} --checkpoint raw.safetensors"
        yield case(f"model file: {name}", line, "raw.safetensors", setup=puts("raw.safetensors", content))


# What the scripts keep


def damaged_states() -> Iterator[Case]:
    kept = {"images": "results/quick/images/*.safetensors", "reference": "results/quick/reference/*"}
    line = f"layer_ratio.py {QUICK} --format int4"
    for what, pattern in kept.items():
        for name, damage in DAMAGES.items():
            yield case(f"kept {what} {name}", line, f"{what}/", setup=change(pattern, damage), expect="heals")
    for name, damage in DAMAGES.items():
        yield case(
            f"Fisher values {name}", line, "fisher-", setup=change("results/quick/fisher-*", damage), expect="heals"
        )  # fmt: skip

    def parts(content: bytes, folder: Path) -> None:
        for path in folder.glob("results/quick/images/*.safetensors"):
            put(f"{path.stem}.parts/0000000.safetensors", content, path.parent)
            path.unlink()

    for name in ("empty", "text"):
        setup = partial(parts, DAMAGES[name](b""))
        yield case(f"a batch of images {name}", line, ".parts", setup=setup, expect="heals")

    for what, pattern in (*kept.items(), ("fisher", "results/quick/fisher-*")):
        for name, at in (("folders", folder_at), ("pipes", pipe_at)):
            yield case(f"kept {what} are {name}", line, f"{what}", setup=each(pattern, at), expect="either")

    def small(folder: Path) -> None:
        import torch

        from common.runtime import sealed

        for path in folder.glob("results/quick/images/*.safetensors"):
            sealed.save(path, "images", {"images": torch.zeros(1, 32, 32, dtype=torch.uint8)}, {})

    yield case("kept images of another shape", line, "images/", setup=small, expect="heals")
    state = "checkpoints/quick.training.safetensors"
    again = f"simplediffusion.py {QUICK} --retrain"
    for name, damage in DAMAGES.items():
        yield case(f"state of the training {name}", again, state, setup=puts(state, damage(b"x" * 1000)))
    yield case("state of the training a folder", again, state, setup=folder_at(state))
    yield case("state of the training a pipe", again, state, setup=pipe_at(state))
    yield case("state of the training a loop", again, state, setup=loop_at(state))
    finetune = f"{BUDGET} {QUICK} --times 4 --finetune 3"
    yield case(
        "a finetuned model truncated",
        finetune,
        "finetuned/",
        setup=change("results/quick/finetuned/*", DAMAGES["truncated"]),
        expect="heals",
    )
    yield case(
        "a finetuned model a folder",
        finetune,
        "finetuned",
        setup=each("results/quick/finetuned/*", folder_at),
        expect="either",
    )

    def state_of_finetuning(at: Callable[[str], Callable[[Path], None]]) -> Callable[[Path], None]:
        def setup(folder: Path) -> None:
            (path,) = folder.glob("results/quick/finetuned/*")
            path.unlink()
            at(f"results/quick/finetuning-{path.stem.split('-')[0]}.safetensors")(folder)

        return setup

    for name, at in (("text", lambda name: puts(name, "text")), ("a folder", folder_at), ("a pipe", pipe_at)):
        setup = state_of_finetuning(at)
        yield case(f"state of finetuning {name}", finetune, "finetuning-", setup=setup, expect="either")
    curve, kept_ones = f"common learning-curve {QUICK}", "checkpoints/quick.after-*"
    for name, damage in DAMAGES.items():
        yield case(f"kept weights {name}", curve, "quick.after-", setup=change(kept_ones, damage))
    yield case("kept weights a folder", curve, "quick.after-", setup=each(kept_ones, folder_at))
    yield case("kept weights a pipe", curve, "quick.after-", setup=each(kept_ones, pipe_at))
    none = each(kept_ones, lambda name: lambda folder: (folder / name).unlink())
    yield case("kept weights of nothing", curve, "quick.after-", "--keep-every", setup=none)

    def other_training(folder: Path) -> None:
        falsified(lambda t, m: m["about"].update(training={"steps": 1}))(folder)
        for path in folder.glob(kept_ones):
            shutil.copy(folder / "false.safetensors", path)

    yield case("kept weights of another training", curve, "quick.after-", setup=other_training)


# Rows


def rows_with(alter: Callable[[list], object]) -> Callable[[Path], None]:
    """results.jsonl after alter(rows), which changes them or returns others."""

    def setup(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
        rows = alter(rows) or rows
        (folder / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))

    return setup


def damaged_rows() -> Iterator[Case]:
    def last(**values):
        return rows_with(lambda rows: rows[-1].update(values))

    def lacks(key):
        return rows_with(lambda rows: [row.pop(key, None) for row in rows] and None)

    def line_added(content: bytes):
        return change(ROWS, lambda before: before + content)

    setups = {f"without {key}": lacks(key) for key in (
        "fid", "fid_error", "label", "preset", "baseline", "kid", "inception_score_error", "steps", "eta",
    )}  # fmt: skip
    setups |= {
        "fid is text": last(fid="low"), "fid is null": last(fid=None), "fid is NaN": last(fid=float("nan")),
        "fid is infinite": last(fid=float("inf")), "fid is true": last(fid=True), "fid is a list": last(fid=[1]),
        "error below 0": last(fid_error=-1.0), "size below 0": last(size_mib=-1.0), "size 0": last(size_mib=0),
        "size is text": last(size_mib="8"), "label is a number": last(label=7), "label is null": last(label=None),
        "label is a list": last(label=["a"]), "label empty": last(label=""), "steps is text": last(steps="20"),
        "eta is text": last(eta="1"), "images below 0": last(images=-5), "preset is a number": last(preset=5),
        "published is short": last(published=[1]), "published is text": last(published="22, 7"),
        "kept is a list": last(kept=[1, 2]), "formats is a list": last(formats=["fp32"]),
        "psnr without its error": last(psnr=3.0, psnr_error=None),
        "psnr is text": last(psnr="high", psnr_error="low"), "file_mib is text": last(file_mib="big"),
        "baseline is a number": last(baseline=12), "strategy is a number": last(strategy=3),
        "a number of 5,000 digits": line_added(b'{"label": ' + b"1" * 5000 + b"}\n"),
        "deeply nested": line_added(DEEP.encode() + b"\n"), "not UTF-8": line_added(b"\xff\xfe\n"),
        "half a line": line_added(b'{"label": "Base'), "a number": line_added(b"7\n"), "a list": line_added(b"[1]\n"),
        "null": line_added(b"null\n"), "text": line_added(b'"row"\n'), "an empty object": line_added(b"{}\n"),
        "zeros": line_added(b"\0" * 1000),
    }  # fmt: skip
    for name, setup in setups.items():
        yield case(f"rows {name}", "common report --preset quick", "results.jsonl", setup=setup)
    for key in ("size_mib", "format", "kept", "formats", "weights", "setting", "image_file"):  # no row needs them
        yield case(
            f"rows without {key}", "common report --preset quick", "results.jsonl", setup=lacks(key), expect="either"
        )
    for name in ("without fid", "fid is text", "deeply nested", "not UTF-8", "half a line", "label is a list", "null"):
        yield case(f"rows {name}", f"layer_ratio.py {QUICK}", "results.jsonl", setup=setups[name])
    for name, setup in {
        "a folder": folder_at(ROWS), "a pipe": pipe_at(ROWS), "a loop": loop_at(ROWS),
        "/dev/zero": link_at(ROWS, "/dev/zero")
    }.items():  # fmt: skip
        for line in ("common report --preset quick", f"layer_ratio.py {QUICK}", f"common timesteps {QUICK}"):
            yield case(f"rows are {name} {line.split()[1]}", line, "results.jsonl", setup=setup)
    report = "common report --preset quick"
    yield case("rows absent", report, "results.jsonl", "simplediffusion.py", setup=lambda f: (f / ROWS).unlink())
    yield case("rows empty", report, "results.jsonl", setup=puts(ROWS, ""))
    yield case("rows empty lines", report, "results.jsonl", setup=line_added(b"\n\n"), expect="either")
    yield case(
        "rows with a mark of byte order", report, "results.jsonl", setup=change(ROWS, lambda c: b"\xef\xbb\xbf" + c)
    )
    for name, value in {
        "is absent": "results/quick/images/absent.safetensors", "is a folder": "results", "is a pipe": "pipe",
        "is foreign": "results/quick/results.jsonl", "is a number": 5, "is /dev/zero": "/dev/zero",
    }.items():  # fmt: skip

        def setup(folder, value=value):
            os.mkfifo(folder / "pipe")
            rows_with(lambda rows: [row.update(image_file=value) for row in rows if "image_file" in row] and None)(
                folder
            )

        yield case(f"images of rows: {name}", report, str(value).rpartition("/")[2], setup=setup, expect="either")
    for out in ("absent", "file", "loop", "", LONG_NAME):
        setup = lambda f: (put("file", "", f), loop_at("loop")(f))  # noqa: E731
        yield case(f"report --out {out[:20]!r}", "common report", out, setup=setup, more=("--out", out), bare=True)
    yield case("figures/ is a file", report, "figures", setup=puts("results/quick/figures", "kept"))
    yield case("figures/ is a loop", report, "figures", setup=loop_at("results/quick/figures"))
    yield case("a figure is a folder", report, "fid-size.png", setup=folder_at("results/quick/figures/fid-size.png"))


def damaged_sensitivity() -> Iterator[Case]:
    name = "results/quick/sensitivity.jsonl"

    def altered(**values) -> Callable[[Path], None]:
        def setup(folder):
            lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
            lines[-1].update(values)
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

        return setup

    setups = {
        "absent": lambda f: (f / name).unlink(), "a folder": folder_at(name), "a pipe": pipe_at(name),
        "a loop": loop_at(name), "empty": puts(name, ""), "text": puts(name, "text\n"),
        "not UTF-8": puts(name, b"\xff\n"),
        "its first line alone": change(name, lambda c: c.split(b"\n")[0] + b"\n"),
        "half": change(name, lambda c: c[: len(c) // 2]), "deeply nested": puts(name, DEEP + "\n"),
        "means of text": altered(mean=["a"]), "means too few": altered(mean=[1.0]),
        "names is a number": altered(names=3),
        "layers is a list": altered(layers=[1]), "fisher is a list": altered(fisher=[1]),
        "layers of text": altered(layers={"layer1": ["a", "b"]}),
    }  # fmt: skip
    for what, setup in setups.items():
        yield case(
            f"sensitivity {what}", "common report --preset quick --sensitivity", "sensitivity.jsonl", setup=setup
        )


# Images


def png(width: int, height: int, depth: int = 8, colour: int = 0, rows: bytes | None = None) -> bytes:
    """A PNG file of grey 0, or of `rows`; its header is believed even where its pixels are too few."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    channels = {0: 1, 2: 3, 6: 4}[colour]
    if rows is None:
        rows = (b"\0" + b"\0" * (width * channels * depth // 8)) * height
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def make_images(folder: Path) -> None:
    """300 pictures of noise, 32x32."""
    folder.mkdir()
    for i in range(300):
        rows = b"".join(b"\0" + bytes((i * 7 + x * y) % 256 for x in range(32)) for y in range(32))
        (folder / f"{i:03}.png").write_bytes(png(32, 32, rows=rows))


def animation(folder: Path) -> None:
    from PIL import Image

    frames = [Image.new("L", (32, 32), shade) for shade in (0, 100, 200)]
    frames[0].save(folder / "digits" / "x.gif", save_all=True, append_images=frames[1:])


def folders_of_images() -> Iterator[Case]:
    line = "common metrics digits --device cpu"
    images = {
        "16 bits": png(32, 32, depth=16), "RGBA": png(32, 32, colour=6), "a bomb": png(100_000, 100_000, rows=b""),
        "a larger bomb": png(2**31 - 1, 2**31 - 1, rows=b""), "truncated": png(32, 32)[:50], "empty": b"",
        "text": b"not an image", "of 31 pixels": png(31, 32), "of 1 pixel": png(1, 1), "of 28 by 32": png(28, 32),
        "without pixels": png(32, 32, rows=b""), "a web page": b"<html><script>alert(1)</script></html>",
        "of 10,000 pixels": png(10_000, 10_000),
    }  # fmt: skip
    for name, content in images.items():
        expect = "either" if name == "16 bits" else "refused"
        yield case(f"image {name}", line, "x.png", setup=puts("digits/x.png", content), expect=expect)
    setups = {
        "a folder": folder_at("digits/x.png"), "a pipe": pipe_at("digits/x.png"), "a loop": loop_at("digits/x.png"),
        "a link to nothing": link_at("digits/x.png", "nowhere"), "/dev/zero": link_at("digits/x.png", "/dev/zero"),
    }  # fmt: skip
    for name, setup in setups.items():
        yield case(f"image is {name}", line, "x.png", setup=setup)
    yield case("image animated", line, "x.gif", setup=animation)
    if not IS_ROOT:
        yield case(
            "image closed",
            line,
            "x.png",
            setup=lambda f: (put("digits/x.png", png(32, 32), f), (f / "digits/x.png").chmod(0)),
        )

    def black(folder: Path) -> None:
        for i in range(300):
            put(f"black/{i}.png", png(32, 32), folder)

    folders = {
        "absent": ("absent", None), "a file": ("file", puts("file", "")),
        "empty": ("none", lambda f: (f / "none").mkdir()),
        "of text": ("texts", puts("texts/a.txt", "a")), "of one image": ("one", puts("one/a.png", png(32, 32))),
        "a loop": ("loop", loop_at("loop")), "a pipe": ("pipe", pipe_at("pipe")), "a long name": (LONG_NAME, None),
        "no name": ("", None), "of folders": ("deep", puts("deep/a/a.png", png(32, 32))),
        "of all-black images": ("black", black),
    }  # fmt: skip
    for name, (path, setup) in folders.items():
        settings = {"setup": setup} if setup else {}
        expect = "either" if name == "of all-black images" else "refused"
        yield case(
            f"folder {name}", "common metrics --device cpu", "257" if name == "of one image" else path,
            more=(path,), expect=expect, **settings,
        )  # fmt: skip
    yield case("no folder", "common metrics", "DIR")


# Digits


def idx(dims: tuple[int, ...], content: bytes | None = None, kind: int = 8) -> bytes:
    """A file as MNIST has them; of zeros where no content is given."""
    size = 1
    for n in dims:
        size *= n
    start = bytes([0, 0, kind, len(dims)]) + struct.pack(f">{len(dims)}I", *dims)
    return start + (bytes(i % 10 for i in range(size)) if content is None else content)


def mnist_files(**other: Callable[[Path], None] | bytes | None) -> Callable[[Path], None]:
    """mnist/MNIST/raw with few digits; `other` files in the place of some: train_images, train_labels, and of test."""
    names = {
        "train_images": ("train-images-idx3-ubyte", idx((600, 28, 28))),
        "train_labels": ("train-labels-idx1-ubyte", idx((600,))),
        "test_images": ("t10k-images-idx3-ubyte", idx((400, 28, 28))),
        "test_labels": ("t10k-labels-idx1-ubyte", idx((400,))),
    }  # fmt: skip

    def setup(folder: Path) -> None:
        for key, (name, content) in names.items():
            content = other.get(key, content)
            if callable(content):
                content(f"mnist/MNIST/raw/{name}")(folder)
            elif content is not None:
                put(f"mnist/MNIST/raw/{name}", content, folder)

    return setup


@cache
def own_model_files() -> dict[str, bytes]:
    """{name: content} of a folder of diffusers: a network for 8x8 images of 3 channels, which nobody has trained."""
    import torch
    from safetensors.torch import save

    from common.ddpm.pipelines import DiffusersConfig
    from common.formats.packed import tensor_shapes

    unet = {
        "_class_name": "UNet2DModel", "sample_size": 8, "block_out_channels": [4, 8], "norm_num_groups": 2,
        "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "layers_per_block": 1, "attention_head_dim": 4,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(DiffusersConfig.of(unet))
    state = {name: torch.randn(shape, generator=generator) for name, (shape, _) in shapes.items()}
    return {
        "own/model_index.json": json.dumps({"_class_name": "DDPMPipeline", "unet": [], "scheduler": []}).encode(),
        "own/unet/config.json": json.dumps(unet).encode(),
        "own/unet/diffusion_pytorch_model.safetensors": save(state),
        "own/scheduler/scheduler_config.json": json.dumps({"_class_name": "DDPMScheduler"}).encode(),
    }


def own_model(folder: Path, **changed: bytes | Callable[[bytes], bytes]) -> None:
    """Writes `own_model_files` and pictures/, 60 PNG files; changed: {end of a name: content, or a function
    of what it would be}, with __ for a dot."""
    files = own_model_files() | {f"pictures/{i}.png": png(8, 8, colour=2) for i in range(60)}
    for end, content in changed.items():
        (name,) = (name for name in files if name.endswith(end.replace("__", ".")))
        files[name] = content(files[name]) if callable(content) else content
    for name, content in files.items():
        put(name, content, folder)


def own_models() -> Iterator[Case]:
    line = "layer_ratio.py --model own --data pictures --images 300 --steps 2 --device cpu"

    def refused(name: str, *said: str, line: str = line, more: Callable[[Path], None] | None = None, **changed) -> Case:
        def setup(folder: Path) -> None:
            own_model(folder, **changed)
            if more:
                more(folder)

        return case(f"own model: {name}", line, *said, setup=setup, bare=True)

    def entries(**new) -> Callable[[bytes], bytes]:
        return lambda content: json.dumps(json.loads(content) | new).encode()

    weights = "own/unet/diffusion_pytorch_model.safetensors"
    two = puts(weights.replace("model.s", "model.fp16.s"), b"")
    yield refused("no folder", "--model absent", line=line.replace("own", "absent"))
    yield refused("a file", "--model", "not a folder", line=line.replace("own", f"{weights}"))
    yield refused("no config", "--model own", "config.json", more=lambda f: (f / "own/unet/config.json").unlink())
    yield refused("two files of weights", "--model own", "fp16", more=two)
    yield refused(
        "a pickle",
        "--model own",
        "pickle",
        more=lambda f: (f / weights).rename(f / "own/unet/diffusion_pytorch_model.bin"),
    )
    yield refused("no weights", "--model own", "safetensors", more=lambda f: (f / weights).unlink())
    yield refused("truncated", "--model own", "safetensors", model__safetensors=lambda content: content[:-8])
    for name, said, new in (
        ("another class", "UNet1DModel", {"_class_name": "UNet1DModel"}),
        ("classes", "num_class_embeds", {"num_class_embeds": 10}),
        ("channels", "out_channels", {"out_channels": 6}),
        ("shapes", "tensor", {"block_out_channels": [4, 4]}),
        ("numbers", "layers_per_block", {"layers_per_block": 10**12}),
        ("blocks", "down_block_types", {"down_block_types": ["Block", "Block"]}),
    ):
        yield refused(name, "--model own", said, **{"unet/config__json": entries(**new)})
    yield refused("config of text", "--model own", "config.json", **{"unet/config__json": b"{"})
    yield refused("deep config", "--model own", "config.json", **{"unet/config__json": DEEP.encode()})
    yield refused("latents", "--model own", "vqvae", index__json=entries(vqvae=["diffusers", "VQModel"]))
    flow = entries(_class_name="FlowMatchEulerDiscreteScheduler")
    yield refused("flow matching", "--model own", "FlowMatch", scheduler_config__json=flow)
    yield refused("prediction", "--model own", "prediction_type", scheduler_config__json=entries(prediction_type="x"))
    yield refused("no --data", "--data", line=line.replace("--data pictures", ""))
    yield refused("digits in colour", "--data mnist5k", line=line.replace("pictures", "mnist5k"))
    yield refused("no pictures", "--data nothing", line=line.replace("pictures", "nothing"))
    yield refused("an empty folder", "--data own/scheduler", line=line.replace("pictures", "own/scheduler"))
    yield refused(
        "few pictures", "--data pictures", more=lambda f: [path.unlink() for path in list(f.glob("pictures/*"))[5:]]
    )
    yield refused("a grey picture", "pictures/7.png", "grey", more=puts("pictures/7.png", png(8, 8)))
    yield refused("a broken picture", "pictures/7.png", more=puts("pictures/7.png", png(8, 8, colour=2)[:45]))
    yield refused("a preset too", "--preset quick", line=f"{line} --preset quick")
    yield refused("features of digits", "--metric mnist", line=f"{line} --metric mnist")
    yield refused("too many layers", "--groups", line=line.replace("layer_ratio", "layer_group") + " --groups 123/456")
    yield refused("--retrain", "--retrain", line=line.replace("layer_ratio", "simplediffusion") + " --retrain")
    yield refused("report of two", "--model", line="common report --model own --preset quick")
    yield case("a folder without --model", f"layer_ratio.py {QUICK} --data pictures", "--data pictures", "--model")
    yield case("unpack into a full folder", f"common unpack {PACKED} --out results", "--out results")
    yield case("unpack no model", f"common unpack {ROWS} --out new", ROWS)
    yield case("unpack without --out", f"common unpack {PACKED}", "--out")
    yield case("samples of no model", "common samples absent.safetensors", "absent.safetensors")
    yield case("samples to a jpg", f"common samples {PACKED} --out grid.jpg", "--out", "grid.jpg")
    yield case("samples in many steps", f"common samples {PACKED} --steps 2000", "--steps 2000")
    yield case("samples as files among others", f"common samples {PACKED} --png results", "--png results")
    yield case("samples as files and a picture", f"common samples {PACKED} --png new --out a.png", "--png", "a.png")
    yield case("samples of one model twice", f"common samples {PACKED} {PACKED}", PACKED)


def mnist() -> Iterator[Case]:
    files = {
        "images of text": {"train_images": b"not a file of digits" * 100},
        "images empty": {"train_images": b""},
        "images truncated": {"train_images": idx((600, 28, 28))[:5000]},
        "images longer": {"train_images": idx((600, 28, 28)) + b"\0" * 5},
        "fewer labels than images": {"train_labels": idx((590,))},
        "fewer images than labels": {"train_images": idx((590, 28, 28))},
        "fewer test labels": {"test_labels": idx((390,))},
        "no digits at all": {"train_images": idx((0, 28, 28)), "train_labels": idx((0,))},
        "digits of 14 pixels": {"train_images": idx((600, 14, 14))},
        "images that are labels": {"train_images": idx((600,))},
        "2^32 - 1 images": {"train_images": idx((2**32 - 1, 28, 28), b"\0" * 1000)},
        "labels of 200": {"train_labels": idx((600,), bytes([200]) * 600)},
        "images of floats": {"train_images": idx((600, 28, 28), kind=13)},
        "images a folder": {"train_images": folder_at},
        "images a pipe": {"train_images": pipe_at},
        "labels a loop": {"train_labels": loop_at},
        "labels absent": {"train_labels": None},
        "test images truncated": {"test_images": idx((400, 28, 28))[:5000]},
        "test images a pipe": {"test_images": pipe_at},
    }
    for number, (name, other) in enumerate(files.items()):
        line = ("layer_ratio.py", "simplediffusion.py", f"{BUDGET} --times 4")[number % 3]
        line = f"{line} {QUICK} --data mnist --data-dir mnist"
        yield case(f"MNIST {name}", line, "mnist", "--data", setup=mnist_files(**other))
    for name, path, setup in (
        ("a file", "file", puts("file", "")), ("a loop", "loop", loop_at("loop")),
        ("absent", "absent", folder_at("unused")),
        ("a long name", LONG_NAME, folder_at("unused")), ("empty", "", folder_at("unused")),
        ("a pipe", "pipe", pipe_at("pipe")),
    ):  # fmt: skip
        for line in (
            f"layer_ratio.py {QUICK} --data mnist",
            "common metrics digits --data mnist",
            "common features --out f.safetensors",
        ):
            yield case(
                f"--data-dir {name} {line.split()[1]}", line, "--data-dir", path, setup=setup, more=("--data-dir", path)
            )
    yield case("features without --out", "common features", "--out")
    for name, out, setup in (
        ("a folder", "folder", folder_at("folder")),
        ("below a file", "file/x", puts("file", "")),
        ("empty", "", folder_at("unused")),
    ):
        files_too = lambda f, setup=setup: (mnist_files()(f), setup(f))  # noqa: E731
        yield case(
            f"features --out {name}",
            "common features --data-dir mnist",
            "--out",
            out,
            more=("--out", out),
            setup=files_too,
        )


# Weights of Inception


class Code:
    """Unpickled, makes a file."""

    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def torch_file(folder: Path) -> None:
    import torch

    torch.save({"weight": torch.zeros(3)}, folder / "weights.pth")


def inception() -> Iterator[Case]:
    setups = {
        "a folder": folder_at("weights.pth"), "a pipe": pipe_at("weights.pth"), "a loop": loop_at("weights.pth"),
        "empty": puts("weights.pth", b""), "text": puts("weights.pth", "weights"), "absent": folder_at("unused"),
        "a pickle with code": puts("weights.pth", pickle.dumps(Code())), "zeros": puts("weights.pth", b"\0" * 10_000),
        "a pickle of numbers": puts("weights.pth", pickle.dumps([1, 2])), "another network's": torch_file,
        "/dev/zero": link_at("weights.pth", "/dev/zero"), "a safetensors": puts("weights.pth", header(b"{}")),
    }  # fmt: skip
    for name, setup in setups.items():
        line = f"layer_ratio.py {QUICK} --metric inception --images 3000 --inception-weights weights.pth"
        yield case(f"Inception {name}", line, "--inception-weights", "weights.pth", setup=setup)
    line = "common metrics digits --metric inception --inception-weights weights.pth"
    for name in ("a folder", "a pipe", "a pickle with code"):
        yield case(f"Inception {name}", line, "--inception-weights", "weights.pth", setup=setups[name])
    empty = ("--inception-weights", "")
    yield case(
        "Inception ''", f"layer_ratio.py {QUICK} --metric inception --images 3000", "--inception-weights", more=empty
    )


# Tools


def tools() -> Iterator[Case]:
    yield Case("no command [common]", ["-m", "common"], ("COMMAND",))
    for word in ("", "reports", "rep", "Report", "-1", "speed"):
        yield Case(
            f"command {word!r} [common]", ["-m", "common", word], (word or "''", "report"), named=("python -m common",)
        )
    yield Case(
        "option in the command's place [common]",
        ["-m", "common", "--preset", "quick"],
        ("--preset",),
        named=("python -m common",),
    )
    for old in ("report", "metrics", "sensitivity", "timesteps", "learning_curve", "features"):
        said = f"python -m common {old.replace('_', '-')}"
        yield Case(
            f"old place [common.{old}]",
            ["-m", f"common.{old}", "--preset", "quick"],
            (said,),
            named=(f"python -m common.{old}",),
        )
    for name, path, setup in (
        ("a folder", "folder", folder_at("folder")), ("below a file", "file/x.json", puts("file", "")),
        ("empty", "", folder_at("unused")),
        ("a long name", LONG_NAME, folder_at("unused")),
    ):  # fmt: skip
        line = "benchmarks.speed --device cpu --rounds 1"
        yield case(f"--json {name}", line, "--json", path, more=("--json", path), setup=setup)
    yield case("samplers of too few images", f"benchmarks.samplers {QUICK} --images 100", "--images", "100", "257")


# Whole processes


def processes() -> Iterator[Case]:
    def shell(name: str, line: str, program: str, *said: str, **settings) -> Case:
        return Case(f"process: {name}", ["", ""], said, shell=line, named=(program,), bare=True, **settings)

    yield shell("--images 0", "$PYTHON $ROOT/simplediffusion.py --images 0", "simplediffusion.py", "--images", "'0'")
    yield shell("--groups", "$PYTHON $ROOT/layer_group.py --groups 12", "layer_group.py", "--groups", "lacks layer 3")
    line = "$PYTHON $ROOT/layer_ratio.py --preset quick --device cpu --checkpoint absent.safetensors --out out"
    yield shell("missing checkpoint", line, "layer_ratio.py", "absent.safetensors", "simplediffusion.py")
    yield shell("command", "$PYTHON -m common reprot", "python -m common", "reprot", "report")
    yield shell(
        "old command", "$PYTHON -m common.report --preset quick", "python -m common.report", "python -m common report"
    )
    yield shell("report", "$PYTHON -m common report --out none", "python -m common report", "none")
    yield shell("--rounds", "$PYTHON -m benchmarks.speed --rounds 0", "python -m benchmarks.speed", "--rounds", "'0'")
    sizes = "$PYTHON $ROOT/layer_ratio.py --preset quick --device cpu --dry-run"
    yield shell("stdout is full", f"{sizes} > /dev/full", "layer_ratio.py", "No space left")
    yield shell(
        "help to a full stdout", "$PYTHON $ROOT/layer_ratio.py --help > /dev/full", "layer_ratio.py", "No space left"
    )
    yield shell("stdout is closed", f"{sizes} >&-", "layer_ratio.py", expect="either")
    yield shell("nobody reads on", f"{sizes} | true", "layer_ratio.py", expect="either")
    latin = f"LC_ALL=C PYTHONIOENCODING=ascii {sizes}"
    yield shell("a terminal of ASCII", latin, "layer_ratio.py", expect="either")
