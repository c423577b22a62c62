"""Kills the scripts with SIGKILL at random moments, starts them again, and compares bytes with an undisturbed run's.

    python tests/kill_anywhere.py                 # 100 times; some minutes; pytest does not collect it
    python tests/kill_anywhere.py --times 20 --seed 1 --phase packing

Each time a script is killed once, and half of the times once or twice more on its way. In the end all files under
checkpoints/ and results/ must be those of a run that nothing stopped, and no file of a temporary name may be left.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from forks import QUICK, finish, kill, preload, set_everywhere, start, wait
from tiny_runs import content_of

OUT = "results/quick"


@dataclass(frozen=True)
class Phase:
    """One kind of work: the command that does it once all files that match `absent` are removed. Kills come before
    the first file of `until` is there."""

    name: str
    command: list[str]
    absent: tuple[str, ...]
    until: str = "nothing"


BASELINE = ["simplediffusion.py", *QUICK]
MADE = (f"{OUT}/images", f"{OUT}/models", f"{OUT}/results.jsonl")
FINETUNED = ["layer_budget.py", *QUICK, "--times", "4", "--finetune", "20"]
PHASES = (
    Phase("training", BASELINE, ("checkpoints/*", f"{OUT}/fisher-*", *MADE), until="checkpoints/quick.safetensors"),
    Phase("sampling", BASELINE, MADE),
    Phase("Fisher", BASELINE, (f"{OUT}/fisher-*",), until=f"{OUT}/fisher-*"),
    Phase("finetuning", FINETUNED, (f"{OUT}/finetun*", *MADE)),
    Phase("packing", ["layer_ratio.py", *QUICK, "--ratio", "0.2", "0.4", "0.6"], MADE[1:]),
)


def files(folder: Path) -> dict[str, bytes]:
    """All files under checkpoints/ and results/ but locks."""
    paths = [p for top in ("checkpoints", "results") for p in (folder / top).rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): content_of(p) for p in paths if p.suffix != ".lock"}


def remove(folder: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in list(folder.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def measure(phase: Phase, base: Path, whole: Path) -> float:
    """Makes `whole`, the folder of a run that nothing stops; returns the seconds that the phase takes."""
    remove(whole, phase.absent)  # rows hold what an earlier command said of their models
    finish(whole, phase.command, base / "output")
    work = base / "timed"
    shutil.copytree(whole, work)
    remove(work, phase.absent)
    began = time.monotonic()
    process = start(work, phase.command, base / "output")
    while not any(work.glob(phase.until)) and (code := wait_a_moment(process)) is None:
        pass
    seconds = time.monotonic() - began
    if any(work.glob(phase.until)):
        code = wait(process, 300)
    assert code == 0, (base / "output.err").read_text()
    assert files(work) == files(whole), f"{phase.name}: two undisturbed runs differ"
    shutil.rmtree(work)
    return seconds


def wait_a_moment(process: int) -> int | None:
    """The exit code, or None where the process is still at work after a hundredth of a second."""
    time.sleep(0.01)
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def disturb(phase: Phase, base: Path, whole: Path, seconds: float, draw: random.Random) -> tuple[int, list[str]]:
    """Kills the phase's command, once or more, and lets it end; returns the number of kills and what is wrong then."""
    work = base / "work"
    shutil.copytree(whole, work)
    remove(work, phase.absent)
    wanted = draw.choice((1, 1, 2, 3))
    kills, moments = 0, []
    while kills < wanted and len(moments) < 20:
        moments.append(draw.uniform(0, seconds))
        process = start(work, phase.command, base / "output")
        time.sleep(moments[-1])
        killed = kill(process) < 0
        kills += killed
        if not killed:  # it had come to its end: begin again, unless that was a second kill
            if kills:
                break
            shutil.rmtree(work)
            shutil.copytree(whole, work)
            remove(work, phase.absent)
    code = wait(start(work, phase.command, base / "output"), 300)
    found = []
    if code != 0:
        found.append(f"exit code {code}: {(base / 'output.err').read_text()[-300:].strip()}")
    expected, got = files(whole), files(work)
    found += [f"left over: {name}" for name in sorted(got.keys() - expected.keys())]
    found += [f"missing: {name}" for name in sorted(expected.keys() - got.keys())]
    found += [f"other bytes: {name}" for name in sorted(expected) if name in got and got[name] != expected[name]]
    shutil.rmtree(work)
    return kills, [f"killed after {', '.join(f'{moment:.3f}' for moment in moments)} s: {fault}" for fault in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100, help="spread evenly over the phases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phase", choices=[phase.name for phase in PHASES])
    options = parser.parse_args()
    preload()
    set_everywhere("SAVE_SECONDS", -1)  # states are written after every step
    draw = random.Random(options.seed)
    phases = [phase for phase in PHASES if options.phase in (None, phase.name)]
    good = done = 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        trained = base / "trained"
        trained.mkdir()
        finish(trained, BASELINE, base / "output")
        for number, phase in enumerate(phases):
            whole = base / phase.name
            shutil.copytree(trained, whole)
            seconds = measure(phase, base, whole)
            times = options.times // len(phases) + (number < options.times % len(phases))
            answers = [disturb(phase, base, whole, seconds, draw) for _ in range(times)]
            failed = [found for _, found in answers if found]
            kills = sum(kills for kills, _ in answers)
            same = times - len(failed)
            print(f"{phase.name}: {seconds:.2f} s, {kills} kills, {same} of {times} ended in the same bytes")
            for found in failed:
                print("\n".join(f"  {line}" for line in found), flush=True)
            good, done = good + same, done + times
    print(f"{good} of {done} ended in the same bytes")
    sys.exit(0 if good == done else 1)


if __name__ == "__main__":
    main()
