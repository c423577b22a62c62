"""Starts two scripts at once in one folder, and looks for crashes, lost rows and other bytes than one after the other.

python tests/two_at_once.py               # 20 times; some minutes; pytest does not collect it
python tests/two_at_once.py --times 100 --seed 1
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from forks import QUICK, finish, preload, start, wait
from tiny_runs import content_of

OUT = Path("results/quick")
ROWS = 15  # of each of two processes
BASELINE = ["simplediffusion.py", *QUICK]
RATIO = ["layer_ratio.py", *QUICK, "--ratio", "0.2", "0.4"]
THRESHOLD = ["whole_threshold.py", *QUICK, "--threshold", "0.01", "0.1"]
FINETUNED = ["layer_budget.py", *QUICK, "--times", "4", "--finetune", "5"]
REPORT = ["-m", "common", "report", "--preset", "quick", "--markdown"]
PAIRS = {  # what runs at once: (the commands, whether a trained baseline is there)
    "training twice": (BASELINE, BASELINE, False),
    "baseline twice": (BASELINE, [*BASELINE, "--seed", "1"], True),
    "the same baseline twice": ([*BASELINE, "--seed", "2"], [*BASELINE, "--seed", "2"], True),
    "ratio and threshold": (RATIO, THRESHOLD, True),
    "ratio twice": (RATIO, RATIO, True),
    "finetuning twice": (FINETUNED, FINETUNED, True),
    "ratio and report": (RATIO, REPORT, True),
}


def kept(folder: Path) -> dict[str, object]:
    """What must not depend on who came first: bytes of files but figures and locks, and rows in any order."""
    found: dict[str, object] = {}
    for path in [p for top in ("checkpoints", "results") for p in (folder / top).rglob("*") if p.is_file()]:
        if path.suffix != ".lock" and path.parent.name != "figures":
            content = content_of(path)
            rows = path.name == "results.jsonl"
            found[str(path.relative_to(folder))] = sorted(content.splitlines()) if rows else content
    return found


def try_pair(name: str, base: Path, expected: dict, delay: float) -> list[str]:
    """Runs a pair at once, the second after `delay` seconds; returns what is wrong."""
    first, second, trained = PAIRS[name]
    work = base / "work"
    shutil.copytree(base / ("trained" if trained else "new"), work)
    outputs = [base / "first", base / "second"]
    processes = [start(work, first, outputs[0])]
    time.sleep(delay)
    processes.append(start(work, second, outputs[1]))
    found = []
    for process, output in zip(processes, outputs, strict=True):
        if (code := wait(process, 120)) != 0:
            lines = Path(f"{output}.err").read_text().strip().splitlines()
            found.append(f"the {output.name} ended with {code}: {lines[-1][-200:] if lines else ''}")
    got = kept(work)
    found += [f"left over: {name}" for name in sorted(got.keys() - expected.keys())]
    found += [f"missing: {name}" for name in sorted(expected.keys() - got.keys())]
    for name in sorted(expected.keys() & got.keys()):
        if name.endswith("results.jsonl"):
            lost = set(expected[name]) - set(got[name])
            if lost:
                found.append(f"{len(lost)} of {len(expected[name])} rows lost: {json.loads(min(lost))['label']}, ...")
            if len(got[name]) > len(expected[name]):
                found.append(f"{len(got[name]) - len(expected[name])} rows too many")
        elif got[name] != expected[name]:
            found.append(f"other bytes: {name}")
    shutil.rmtree(work)
    return found


def append_rows(path: Path, like: dict, process: int) -> None:
    """Appends rows one by one, as the scripts do."""
    from common.study.rows import ResultStore, row_from_json

    for i in range(ROWS):
        ResultStore(path).add([row_from_json(like | {"label": f"row {i} of process {process}"})])


def rows_kept(base: Path) -> int:
    """How many rows of two processes that append at once are there in the end."""
    like = json.loads((base / "trained" / OUT / "results.jsonl").read_text().splitlines()[-1])
    path = base / "together.jsonl"
    processes = []
    for number in range(2):
        process = os.fork()
        if not process:
            try:
                append_rows(path, like, number)
                os._exit(0)
            except Exception:
                traceback.print_exc()
                os._exit(1)
        processes.append(process)
    for process in processes:
        wait(process, 60)
    return len(path.read_text().splitlines()) if path.exists() else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="spread over the pairs")
    parser.add_argument("--seed", type=int, default=0, help="of the delays between the two starts")
    options = parser.parse_args()
    preload()
    draw = random.Random(options.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "new").mkdir()
        (base / "trained").mkdir()
        finish(base / "trained", BASELINE, base / "first")
        expected = {}
        for name, (first, second, trained) in PAIRS.items():
            whole = base / "whole"
            shutil.copytree(base / ("trained" if trained else "new"), whole)
            for command in (first, second):
                finish(whole, command, base / "first")
            expected[name] = kept(whole)
            shutil.rmtree(whole)
        for i in range(options.times):
            name = list(PAIRS)[i % len(PAIRS)]
            delay = draw.choice((0.0, draw.uniform(0, 1)))
            found = try_pair(name, base, expected[name], delay)
            failed += bool(found)
            for fault in found:
                print(f"{name}, {delay:.2f} s apart: {fault}", flush=True)
        rows = rows_kept(base)
    print(f"{options.times - failed} of {options.times} pairs left what one after the other leaves")
    print(f"{rows} of {2 * ROWS} rows kept that two processes appended")
    sys.exit(0 if not failed and rows == 2 * ROWS else 1)


if __name__ == "__main__":
    main()
