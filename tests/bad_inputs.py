"""Gives the scripts and tools what nobody should, and looks at how they answer.

Takes some minutes; pytest does not collect it.

    python tests/bad_inputs.py                   # all cases of tests/bad_cases.py
    python tests/bad_inputs.py --jobs 4 results  # those with "results" in their names

A bad input is answered well by one line on stderr that begins with the program's name and ": error:", names what is
wrong and what to do, an exit code other than 0, within a minute, and with every file and folder as it was.
"""

import argparse
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path

import bad_cases
from bad_cases import Case
from forks import QUICK, ROOT, finish, kill, preload, start

SECONDS = 60
BAR = re.compile(r"\d+%\||\d+(it|step|tensor|image|round|work|file)s? \[|\[\d\d:\d\d")
REMEDY = re.compile(
    r"\b(give|use|delete|remove|name|names|save|put|make|makes|choose|ask|move|get|fetch|run|must|at least|at most|lie|"
    r"goes with|expected|take|takes|need|needs|needed|required|not allowed with|leave|free|checkout|write|see|missing|"
    r"whole number|stands alone|start from|pip install|is now)\b|e\.g\. |--help|python |\d\.\.\d"
)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file, link and folder below, with a digest of what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = path.lstat().st_mode
        content = ""
        if stat.S_ISLNK(kind):
            content = os.readlink(path)
        elif stat.S_ISREG(kind):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = f"{stat.S_IFMT(kind)} {content}"
    return found


def faults(case: Case, code: int | None, out: str, err: str, before: dict, after: dict) -> list[str]:
    """What is wrong with an answer."""
    found = []
    lines = [line.rpartition("\r")[2] for line in err.splitlines(keepends=False) if line.strip()]
    lines = [line for line in lines if line.strip() and not BAR.search(line)]
    if code is None:
        return [f"no end after {SECONDS} s"]
    if code < 0:
        return [f"ended by signal {-code}"]
    if "Traceback" in err or "Traceback" in out:
        return ["traceback: " + (lines[-1] if lines else "")[:160]]
    if case.expect == "either" and code == 0:
        return []
    if case.expect == "heals":
        if code != 0:
            return [f"exit code {code} instead of healing: {(lines or [''])[-1][:200]}"]
        return [f"does not say {said!r}" for said in case.said if said not in out + err]
    if code == 0:
        return ["accepted: exit code 0"]
    if len(lines) != 1:
        found.append(f"{len(lines)} lines on stderr: {' / '.join(line[:120] for line in lines[:3])}")
    line = lines[-1] if lines else ""
    if not line.startswith(tuple(f"{name}: error: " for name in case.programs)):
        found.append(f"does not begin with {case.programs[0]}: error:")
    found += [f"does not say {said!r}" for said in case.said if said not in line and repr(said)[1:-1] not in line]
    if "[Errno" in line:
        found.append("[Errno")
    if not REMEDY.search(line.partition(": error: ")[2]):
        found.append("no remedy")
    changed = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
    if changed:
        found.append(f"files changed: {', '.join(sorted(changed)[:4])}")
    return [*found, f"said: {line[:300]}"] if found else []


def try_all(cases: list[Case], base: Path, jobs: int) -> list[list[str]]:
    """Prints and returns the faults of the answer to each case. One thread forks all: threads and forks do not mix."""
    found: list[list[str]] = [[] for _ in cases]
    running: dict[int, tuple[int, dict, float]] = {}  # process: number of its case, files before, when to give up
    waiting = list(range(len(cases)))
    while waiting or running:
        while waiting and len(running) < jobs:
            number = waiting.pop(0)
            folder = base / f"case-{number}"
            if cases[number].bare:
                folder.mkdir()
            else:
                shutil.copytree(base / "prepared", folder)
            try:
                cases[number].setup(folder)
            except Exception as error:  # as when a file has got another name
                found[number] = [f"cannot be set up: {error!r}"]
                print(f"{cases[number].name}: {found[number][0]}", flush=True)
                continue
            before = snapshot(folder)
            process = start_case(folder, cases[number], base / f"answer-{number}")
            running[process] = number, before, time.monotonic() + SECONDS
        for process, (number, before, limit) in list(running.items()):
            done, status = os.waitpid(process, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            if not done and time.monotonic() < limit:
                continue
            if not done:
                kill(process)
            del running[process]
            out, err = ((base / f"answer-{number}.{end}").read_text(errors="replace") for end in ("out", "err"))
            folder = base / f"case-{number}"
            found[number] = faults(cases[number], code, out, err, before, snapshot(folder))
            shutil.rmtree(folder)
            if found[number]:
                print(f"{cases[number].name}: {'; '.join(found[number])}", flush=True)
        time.sleep(0.01)
    return found


def start_case(folder: Path, case: Case, output: Path) -> int:
    """Starts a case; forked, or where it has a line of shell in a process of its own, as a person starts it."""
    if not case.shell:
        return start(folder, case.command, output, case.inside)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "ROOT": str(ROOT)}
    return start(folder, [], output, lambda: os.execvpe("bash", ["bash", "-c", case.shell], environment))


def prepare(base: Path) -> None:
    """What most cases start from: a small trained baseline, with all that the scripts keep."""
    folder = base / "prepared"
    folder.mkdir()
    for command in (
        ["simplediffusion.py", *QUICK, "--keep-every", "6"],
        ["layer_ratio.py", *QUICK, "--format", "int4"],
        ["layer_budget.py", *QUICK, "--times", "4", "--finetune", "3"],
        ["-m", "common", "sensitivity", *QUICK, "--digits", "4", "--formats", "int4"],
    ):
        finish(folder, command, base / "preparing")
    for kind, name in (("ratio-0.25-int4", bad_cases.PACKED), ("budget-4x-entropy", bad_cases.CODED)):
        (path,) = (folder / "results/quick/models").glob(f"{kind}*.safetensors")
        shutil.copy(path, folder / name)
    bad_cases.make_images(folder / "digits")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("filter", nargs="?", default="", help="a part of the names of the cases to try")
    parser.add_argument("--jobs", type=int, default=2 * (os.cpu_count() or 1), help="cases at once")
    options = parser.parse_args()
    preload()
    cases = [case for case in bad_cases.all_cases() if options.filter in case.name]
    assert len({case.name for case in cases}) == len(cases), "two cases of one name"
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        prepare(base)
        answers = try_all(cases, base, options.jobs)
    failed = sum(map(bool, answers))
    print(f"{len(cases) - failed} of {len(cases)} answered well")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
