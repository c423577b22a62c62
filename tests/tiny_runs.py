"""simplediffusion.py in processes of its own, on a preset of a few seconds."""

import contextlib
import multiprocessing
import os
import re
import signal
import stat
import sys
from dataclasses import replace
from pathlib import Path

# New processes come from a server that has torch loaded and has run nothing, so that starting one takes no time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "torch._dynamo", "torch._refs", "common.study.pipeline"])

STEPS = 12


def run_script(folder: str, network, arguments: tuple[str, ...], die_at_write: int | None, environment: dict) -> None:
    """simplediffusion.py in `folder`, on a preset of a few seconds; killed in the middle of its n-th write."""
    os.environ.update(environment)
    import simplediffusion
    from common.errors import run_main
    from common.presets import PRESETS
    from common.runtime import files
    from common.study import run
    from common.training import loop

    os.chdir(folder)
    PRESETS["quick"] = replace(
        PRESETS["quick"],
        network=network,
        training=replace(PRESETS["quick"].training, batch_size=4, steps=STEPS, warmup_steps=4),
        images=260,
        sampler="ddim",
        steps=2,
        eta=1.0,
        fisher_digits=4,
        fisher_grid_digits=1,
    )
    run.CHECKPOINTS = Path("checkpoints")
    load_digits = run.load_digits
    run.load_digits = lambda *which: load_digits(*which)[:500]  # so that their features take no time
    loop.SAVE_SECONDS = -1  # after every step
    writes, fsync = [], os.fsync

    def dying_fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return fsync(descriptor)
        writes.append(descriptor)
        if len(writes) == die_at_write:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    files.os.fsync = dying_fsync
    sys.argv = ["simplediffusion.py", "--preset", "quick", "--device", "cpu", "--batch-size", "100", *arguments]
    with (
        open(f"stdout{environment.get('RANK', '')}.txt", "w") as out,
        open(f"stderr{environment.get('RANK', '')}.txt", "w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        run_main(simplediffusion.main)


def finish(process, folder):
    process.join(120)
    assert process.exitcode == 0, "".join(path.read_text() for path in folder.glob("stderr*.txt"))


def files(folder) -> dict[str, bytes]:
    """What a run is for: checkpoint, images, Fisher values, packed models, rows but for the times in them."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(name): content_of(folder / name) for name in names if name.parts[0] in ("checkpoints", "results")}


def content_of(path) -> bytes:
    """The bytes of a file; of rows without the times, which no two runs share."""
    content = path.read_bytes()
    return re.sub(rb'"ms_per_step": [^,}]*, ', b"", content) if path.name == "results.jsonl" else content


def table(folder) -> str:
    (printed,) = (path.read_text() for path in (folder / "stdout.txt", folder / "stdout0.txt") if path.exists())
    return printed[printed.index("\nPreset quick") :]
