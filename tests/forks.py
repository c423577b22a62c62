"""Scripts in forked processes on the tiny preset: torch is loaded once, so that starting one takes milliseconds.

Not collected by pytest: for the long tests, python tests/bad_inputs.py, kill_anywhere.py and two_at_once.py.
"""

import importlib
import os
import pkgutil
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUICK = ("--preset", "quick", "--device", "cpu")
MEMORY = 3 * 2**29  # what a script may take beyond what it starts with
NO_NETWORK = "http://127.0.0.1:9"  # nothing listens there, so that a download fails at once


def preload() -> None:
    """Imports all that the scripts need, in one thread, as forks ask for; makes `quick` a preset of seconds."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    os.environ |= {"http_proxy": NO_NETWORK, "https_proxy": NO_NETWORK}
    sys.path.insert(0, str(ROOT))
    for module in ("PIL.Image", "matplotlib.pyplot", "pytorch_fid.inception", "torch._dynamo", "torchvision.datasets"):
        importlib.import_module(module)
    common = importlib.import_module("common")
    for found in pkgutil.walk_packages(common.__path__, "common."):
        if not found.name.endswith("__main__"):
            try:
                importlib.import_module(found.name)
            except SystemExit:
                continue  # the old place of a command, which says so and ends
    from conftest import TINY

    presets = common.presets.PRESETS
    quick = presets["quick"]
    presets["quick"] = replace(
        quick, network=TINY, images=260, steps=2, eta=1.0, fisher_digits=4, fisher_grid_digits=1,
        training=replace(quick.training, batch_size=4, steps=12, warmup_steps=4),
    )  # fmt: skip
    load_digits = common.ddpm.digits.load_digits
    set_everywhere("load_digits", lambda *which: load_digits(*which)[:500])  # so that their features take no time
    load_digits("mnist5k", "test")  # parses the digits, and keeps them for all processes
    set_everywhere("CHECKPOINTS", Path("checkpoints"))
    set_everywhere("BOOTSTRAP", 20)
    finest = common.choose.allocation._finest
    set_everywhere("_finest", lambda *search: finest(*search[:-1], 0.2))  # sizes need not be hit to 0.01%


def set_everywhere(name: str, value: object) -> None:
    """Replaces what the modules of common/ know by that name, wherever they have it from."""
    holders = [m for key, m in sys.modules.items() if key.startswith("common.") and hasattr(m, name)]
    assert holders, f"nothing in common/ is named {name} any more"
    for module in holders:
        setattr(module, name, value)


def start(folder: Path, command: list[str], output: Path, inside: Callable[[], None] = lambda: None) -> int:
    """Forks a process that runs `command`, as it would follow `python`, in `folder`; returns its id.

    Its output goes to `output`.out and `output`.err. `inside` runs in it before the command does.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        for descriptor, path in enumerate((os.devnull, f"{output}.out", f"{output}.err")):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        inside()
        code = run(command)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def run(command: list[str]) -> int:
    """Runs a command as the interpreter would; returns its exit code."""
    module = command[0] == "-m"
    sys.argv = command[1:] if module else list(command)
    try:
        if module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except SystemExit as exit_:
        if exit_.code is None or isinstance(exit_.code, int):
            return exit_.code or 0
        print(exit_.code, file=sys.stderr)
        return 1
    return 0


def wait(process: int, seconds: float) -> int | None:
    """The exit code of a process, negative where a signal ended it; None, and it is killed, where it takes longer."""
    limit = time.monotonic() + seconds
    pause = 0.002
    while time.monotonic() < limit:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(0.05, pause * 1.2)
    kill(process)
    return None


def kill(process: int) -> int:
    """SIGKILL to a process and those that it started; its exit code, which tells whether it had ended before."""
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:  # it has not come to its own group yet
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def finish(folder: Path, command: list[str], output: Path, inside: Callable[[], None] = lambda: None) -> str:
    """Runs a command that must succeed; returns what it printed."""
    code = wait(start(folder, command, output, inside), 300)
    assert code == 0, f"{' '.join(command)}: exit code {code}\n{Path(f'{output}.err').read_text()[-2000:]}"
    return Path(f"{output}.out").read_text()
