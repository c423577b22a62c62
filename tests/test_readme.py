"""What the README shows works as it stands there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["mean"].keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert namespace["nbytes"](namespace["stored"]) <= 120


def test_the_layout_names_the_modules_of_each_room_and_no_others():
    block = re.search(r"^common/\n(.*?)^benchmarks/", README, flags=re.DOTALL | re.MULTILINE)[1]
    rooms, room = {}, None
    for line in block.splitlines():
        if opened := re.match(r"  (\w+)/ +", line):
            room, line = opened[1], line[opened.end() :]
        rooms.setdefault(room, []).extend(re.split(r"  +", line.strip())[0].split())
    formerly = {"report", "sensitivity", "timesteps", "learning_curve", "features"}  # say what to type instead
    for room, named in rooms.items():
        there = {path.stem for path in (ROOT / "common" / (room or "")).glob("*.py")} - {"__init__", "__main__"}
        assert sorted(named) == sorted(there - (set() if room else formerly)), room
    assert rooms.keys() - {None} == {path.parent.name for path in (ROOT / "common").glob("*/__init__.py")}
