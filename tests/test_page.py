"""The report page: what rows say, escaped, in one file; looked at by a browser where there is one."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pytest
from conftest import SETTINGS

from common.study.page import write_page
from common.study.rows import Figure, Row

FORMATS = {"layer1.conv.weight": "int4", "layer1.norm.weight": "fp16", "layer2.conv.weight": "fp32"}
HOSTILE = "<script>alert(1)</script> & \"'"
CHROMIUM = shutil.which("chromium")
LOOK = """<script>
const found = [], boxes = [...document.body.children].filter(e => e.getBoundingClientRect().height > 0);
for (let i = 1; i < boxes.length; i++)
  if (boxes[i].getBoundingClientRect().top < boxes[i - 1].getBoundingClientRect().bottom - 1)
    found.push("overlap " + i);
for (const image of document.images) if (!image.naturalWidth) found.push("broken image");
if (document.documentElement.scrollWidth > innerWidth) found.push("wider than the screen");
const table = document.querySelector("table.rows");
const order = () => [...table.tBodies[0].rows].map(r => r.cells[0].innerText);
table.querySelectorAll("button")[1].click();
found.push("by FID: " + order().join());
table.querySelectorAll("button")[1].click();
found.push("down: " + order().join());
document.title = found.join("; ");
</script>"""


def row(label, value, **facts):
    return Row(
        label=label, settings=SETTINGS, strategy=facts.pop("strategy", "Uniform"), fid=Figure(0.1, 0.01),
        kid=Figure(0, 0), inception_score=Figure(9, 0.1), fid_unbiased=value and Figure(value, 0.01), **facts,
    )  # fmt: skip


ROWS = [
    row("Baseline (FP32)", 0.09, strategy="Baseline", size_mib=8.0),
    row("Uniform (INT4)", 10.5, size_mib=1.0, file_mib=1.1, formats=FORMATS),
    row("none", None),
    row(HOSTILE, -0.02, size_mib=2.0, file_mib=2.0, formats=FORMATS | {"layer2.conv.weight": "int8"}),
]
MAPS = {"output_bias.maps": "int8"}  # of a row whose integers were rounded with feedback


class Text(HTMLParser):
    """The text of each cell of the page's first table, and every tag with its attributes."""

    def __init__(self, page):
        super().__init__()
        self.cells, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "td" and "data-value" in dict(attributes):
            self.cells.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "td" and self.cells and not self.cells[-1]:
            self.cells[-1] = data


@pytest.fixture
def page(tmp_path):
    picture = tmp_path / "fid-size.png"
    plt.figure(figsize=(2, 2)).savefig(picture)
    plt.close("all")
    return write_page(tmp_path, [ROWS], [picture])


def test_it_says_what_the_rows_say_and_nothing_is_code(page):
    text = page.read_text()
    parsed = Text(text)
    assert HOSTILE in parsed.cells and "10.500 ± 0.010" in parsed.cells and "1.100" in parsed.cells
    assert "86.25%" in parsed.cells  # 1.1 MiB of 8
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1  # the page's own, that sorts
    outside = [a for _, a in parsed.tags if any(k in a for k in ("src", "href")) and "data:" not in a.get("src", "")]
    assert outside == [] and not re.search(r"url\(|@import", text)
    assert "mnist features abcc2d22" in text


def test_it_has_the_lines_that_stand_below_the_printed_table(tmp_path):
    measured = replace(ROWS[1], loss_increase=Figure(2e-3, 1e-4), ms_per_step=5.0)
    text = write_page(tmp_path, [[ROWS[0], measured]], []).read_text()
    assert "<p>Uniform (INT4): loss x1000 on held-out images" in text and "Uniform (INT4) 5</p>" in text


def test_it_shows_the_format_of_each_tensor_that_any_row_quantizes(page):
    cells = [(a["title"], a["class"]) for tag, a in Text(page.read_text()).tags if tag == "td" and "title" in a]
    assert cells[:3] == [
        ("layer1.conv.weight: int4", "cell f-int4"), ("layer1.norm.weight: fp16", "cell f-fp16"),
        ("layer2.conv.weight: fp32", "cell f-fp32"),
    ]  # fmt: skip
    assert len(cells) == 6 and cells[5] == ("layer2.conv.weight: int8", "cell f-int8")


def test_rows_whose_networks_have_further_tensors_stand_beside_others(tmp_path):
    more = row("Uniform (INT4, feedback)", 0.1, formats=FORMATS | MAPS)
    tags = Text(write_page(tmp_path, [[ROWS[0], more, *ROWS[1:]]], []).read_text()).tags
    titles = [a["title"] for tag, a in tags if tag == "td" and "title" in a]
    assert len(titles) == 9 and not any("output_bias" in title for title in titles)


def test_groups_have_their_own_pictures(tmp_path):
    for name in ("fid-size-1", "fid-size-2", "weights-quick-1"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    other = [replace(r, settings=replace(SETTINGS, seed=1)) for r in ROWS]
    page = write_page(tmp_path, [ROWS, other], sorted(tmp_path.glob("*.png"))).read_text()
    order = [part[:40] for part in re.split(r"<h2>|base64,", page)[1:]]
    assert [part.partition("<")[0].partition('"')[0] for part in order] == [
        "Rows, 1 of 2", "ZmlkLXNpemUtMQ==", "Rows, 2 of 2", "ZmlkLXNpemUtMg==", "The network", "d2VpZ2h0cy1xdWljay0x",
    ]  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("size", ["1200,900", "500,900"])
def test_a_browser_shows_it_whole(page, tmp_path, size):
    looked = tmp_path / "looked.html"
    looked.write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}", "--dump-dom"]
    dom = subprocess.run([*command, looked.as_uri()], capture_output=True, text=True, timeout=60).stdout
    title = re.search(r"<title>(.*?)</title>", dom)[1]
    hostile = HOSTILE.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    up = ["Baseline (FP32)", "Uniform (INT4)"]
    assert title == (
        f"by FID: {','.join([hostile, *up, 'none'])}; down: {','.join([*reversed(up), hostile, 'none'])}"
    )  # what has no figure stays last
