"""What README and docs/ show works as it stands there, and their figures are those of the rows that are kept."""

import re
from itertools import chain
from pathlib import Path

import pytest
from cogapp import Cog

from common.formats.packed import MIB, load_model
from common.study.rows import Figure, ResultStore

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FIGURE = re.compile(r"-?\d[\d.,]* ± \d[\d.,]*\d")
GENERATED = re.compile(r"<!-- \[\[\[cog.*?\[\[\[end\]\]\] -->", re.DOTALL)


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)


def test_fisher_values_and_a_small_file_of_any_module():
    blocks = python_blocks("own-code.md")
    assert len(blocks) == 2
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["mean"].keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert namespace["nbytes"](namespace["stored"]) <= 120


def test_the_strategy_that_is_shown(monkeypatch):
    import common.study.pipeline as pipeline

    runs = []
    monkeypatch.setattr(pipeline, "run_strategy", lambda options, choices: runs.append((options, choices)))
    monkeypatch.setattr("sys.argv", ["median.py", "--format", "int4"])
    (block,) = python_blocks("add-a-strategy.md")
    exec(block, {"__name__": "__main__", "__doc__": None})
    ((options, (choice,)),) = runs
    assert options.format == "int4" and choice.strategy == "Median"
    assert choice.rule({"a": 1.0, "b": 0.2, "c": 0.3}) == {"b"}


def test_the_files_that_are_kept_are_those_of_the_rows():
    kept = (ResultStore(ROOT / "reference" / folder / "results.jsonl") for folder in ("quick", "budget"))
    rows = {row.label: row.weights for store in kept for row in store.rows() if row.strategy == "Budget"}
    files = sorted((ROOT / "reference" / "frontier" / "models").iterdir())
    assert [path.name for path in files] == [f"quick-{of}.safetensors" for of in ("10x", "13x", "16x", "24x-finetuned")]
    for path in files:
        model = load_model(path)
        assert path.stat().st_size < MIB and rows[model.metadata["label"]] == model.sha256


def test_the_layout_names_the_modules_of_each_room_and_no_others():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"^common/\n(.*?)^benchmarks/", text, flags=re.DOTALL | re.MULTILINE)[1]
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


@pytest.mark.parametrize("page", NAMES)
def test_the_tables_are_those_of_the_rows(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = ["cog", "--check", "-P", "-I", "docs", "-p", "from tables import *", page]
    assert Cog().main(arguments) == 0, f"{page}: make docs"


@pytest.mark.parametrize("page", NAMES)
def test_every_figure_with_an_error_is_that_of_a_row(page):
    """But where a sentence says that its rows were not kept."""
    known = figures_of_rows()
    text = GENERATED.sub("", (ROOT / page).read_text())
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?= *(?:-|\d\.) )", text)]
    sentences = chain.from_iterable(re.split(r"(?<=[.:]) (?=[A-Z*`\[])", paragraph) for paragraph in paragraphs)
    said = chain.from_iterable(FIGURE.findall(sentence) for sentence in sentences if "not kept" not in sentence)
    assert [figure for figure in said if figure not in known] == []


def figures_of_rows() -> set[str]:
    known = set()
    for path in (ROOT / "reference").glob("*/results.jsonl"):
        for row in ResultStore(path).rows():
            for figure in vars(row).values():
                if isinstance(figure, Figure):
                    known |= {figure.text(digits, factor) for digits in range(5) for factor in (1, 100, 1000)}
    return known


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        if target and not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_no_generated_line_is_lost(tmp_path):
    """A page whose table was edited by hand is one that cog would change."""
    page = tmp_path / "page.md"
    page.write_text("<!-- [[[cog print('| 1 |') ]]] -->\n| 2 |\n<!-- [[[end]]] -->\n")
    assert Cog().main(["cog", "--check", "-P", str(page)]) != 0
