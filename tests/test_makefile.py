"""What `make clean` removes can be had again in minutes; results cannot."""

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("target", "left"), [("clean", {"results"}), ("distclean", set())])
def test_what_is_left(target, left, tmp_path):
    for name in ("results", "data", "common/__pycache__", ".venv/bin", ".ruff_cache", ".pytest_cache"):
        (tmp_path / name).mkdir(parents=True)
    subprocess.run(["make", "-s", "-f", MAKEFILE, target], cwd=tmp_path, check=True)
    assert {path.name for path in tmp_path.iterdir()} == left | {"data", "common"}
    assert not list((tmp_path / "common").iterdir())
