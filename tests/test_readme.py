"""What the README shows works as it stands there."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["mean"].keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert namespace["nbytes"](namespace["stored"]) <= 120


def test_every_module_stands_in_the_layout():
    layout = README[README.index("## Layout") :]
    words = set(re.findall(r"\w+", layout))
    modules = {path.stem for path in (Path(__file__).parent.parent / "common").glob("*.py")} - {"__init__", "__main__"}
    assert modules <= words
