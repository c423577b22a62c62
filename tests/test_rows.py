"""Rows as JSON: what is written is read back, what no row can hold is refused, nobody's rows are lost."""

import json
import multiprocessing
from dataclasses import replace

import conftest
import pytest

from common.errors import UserError
from common.study.report import format_table
from common.study.rows import REAL, Figure, ResultStore, Row, group_rows, row_from_json

SETTINGS = replace(conftest.SETTINGS, steps=20, eta=1.0)
ROW = Row(
    "Budget 10x, random 2 (entropy)", SETTINGS, fid=Figure(0.5, 0.1), kid=Figure(-0.1, 0.01),
    inception_score=Figure(9, 0.1), strategy="Budget", setting="10x, random 2", variant="random", draw=2,
    format="entropy", weights="w", size_mib=0.8, file_mib=0.81, published=(None, 71.48), psnr=Figure(20, 0.5),
    formats={"a": "entropy"}, kept={"layer1": []},
)  # fmt: skip


JUDGED = replace(
    ROW, rounding="feedback", loss_increase=Figure(-1e-4, 2e-5), place=(3, 20), size_apart=0.004
)  # fmt: skip


def test_what_is_said_of_the_loss_is_read_back_and_absent_from_old_rows():
    flat = json.loads(json.dumps(JUDGED.to_json()))
    assert (flat["loss_increase"], flat["loss_increase_error"], flat["place"]) == (-1e-4, 2e-5, [3, 20])
    assert row_from_json(flat) == JUDGED
    assert not {"rounding", "loss_increase", "place", "size_apart"} & ROW.to_json().keys()


def test_a_row_measured_again_keeps_what_was_said_of_its_loss(tmp_path):
    store = ResultStore(tmp_path / "results.jsonl")
    store.add([JUDGED])
    store.add([replace(JUDGED, loss_increase=None, place=None, size_apart=None, digits_seen=5)])
    assert store.rows() == [replace(JUDGED, digits_seen=5)]
    store.add([replace(JUDGED, loss_increase=Figure(1, 2), place=None)])
    store.add([replace(JUDGED, weights="others", loss_increase=None, place=None, size_apart=None)])
    store.add([replace(JUDGED, psnr=None, loss_increase=None)])  # a file alone, whose baseline is not at hand
    judged, other = store.rows()
    assert judged.psnr == JUDGED.psnr
    assert (judged.loss_increase, judged.place) == (Figure(1, 2), (3, 20)) and other.place is None


def test_what_is_written_is_read_back():
    flat = json.loads(json.dumps(ROW.to_json()))
    assert (flat["fid"], flat["fid_error"], flat["images"], flat["published"]) == (0.5, 0.1, 500, [None, 71.48])
    assert "updates" not in flat and "curvature" not in flat and row_from_json(flat) == ROW
    other = replace(ROW, curvature="gauss-newton")
    assert row_from_json(other.to_json()) == other


def test_figures_and_seeds_that_earlier_rows_lack():
    more = {"fid_unbiased": Figure(-0.01, 0.02), "fid_unbiased_difference": Figure(-0.02, 0.01)}
    new = replace(ROW, settings=replace(SETTINGS, seeds=3), **more)
    flat = json.loads(json.dumps(new.to_json()))
    assert (flat["seeds"], flat["fid_unbiased"], flat["fid_unbiased_difference_error"]) == (3, -0.01, 0.01)
    assert row_from_json(flat) == new and new.identity != ROW.identity
    old = {key: value for key, value in ROW.to_json().items() if key != "seeds"}
    assert row_from_json(old) == ROW and ROW.settings.seeds == 1
    line = format_table([row_from_json(old)]).splitlines()[4]
    assert line.split("  ")[0] == ROW.label and line.removeprefix(ROW.label).split()[:3] == ["-", "-", "-"]
    assert "-0.010 ± 0.020" in format_table([new]) and "each of 3 seeds from 0" in format_table([new])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fid", None), ("fid", "0.1"), ("fid", float("nan")), ("fid", -1.0), ("fid", True), ("fid_error", -0.1),
        ("fid_error", None), ("size_mib", 0), ("size_mib", "1"), ("file_mib", -1), ("label", 7), ("label", ""),
        ("label", "two\nlines"), ("images", "500"), ("images", -1), ("baseline", 7), ("published", [1]), ("draw", 1.5),
        ("kept", {"layer1": "all"}), ("formats", []), ("formats", {"a": "fp99"}), ("formats", {"a": []}),
        ("curvature", "hessian"), ("curvature", 1), ("nearest_training_digit", -1.0), ("seeds", "2"),
        ("unknown", 1), ("rounding", "up"), ("rounding", []), ("loss_increase", "1"), ("place", [21, 20]), ("place", 3),
        ("place", [0.0, 20]), ("place", [-1, 20]), ("place", [1, 2, 3]), ("size_apart", -0.1), ("size_apart", "1"),
    ],
)  # fmt: skip
def test_what_no_row_can_hold_is_refused(key, value):
    with pytest.raises(ValueError, match=key.removesuffix("_error")):
        row_from_json(ROW.to_json() | {key: value})


@pytest.mark.parametrize("key", ["fid", "fid_error", "kid", "label", "strategy", "preset", "baseline", "torch"])
def test_what_a_row_lacks_is_named(key):
    with pytest.raises(ValueError, match=key):
        row_from_json({k: v for k, v in ROW.to_json().items() if k != key})


def test_a_ratio_is_a_number():
    with pytest.raises(ValueError, match="setting of 'half' is not a ratio"):
        row_from_json(ROW.to_json() | {"strategy": "Ratio", "setting": "half"})


@pytest.mark.parametrize(
    "content", [b'{"label": "Base', b"text", b"\xff\xfe", b"7", b"[" * 100_000, b'{"a":' * 100_000, b"\n"]
)
def test_damaged_lines_are_named(tmp_path, content):
    path = tmp_path / "results.jsonl"
    path.write_bytes(content + b"\n")
    with pytest.raises(UserError, match=r"results\.jsonl"):
        ResultStore(path).rows()


def test_what_is_no_file_is_not_read(tmp_path):
    path = tmp_path / "results.jsonl"
    path.mkdir()
    with pytest.raises(UserError, match="is not a file"):
        ResultStore(path).rows()
    assert ResultStore(tmp_path / "absent" / "results.jsonl").rows() == []


def test_a_row_of_the_same_identity_is_replaced_where_it_stands(tmp_path):
    store = ResultStore(tmp_path / "out" / "results.jsonl")
    first, second = replace(ROW, label="one"), replace(ROW, label="two")
    store.add([first, second])
    store.add([replace(first, digits_seen=5)])
    assert store.rows() == [replace(first, digits_seen=5), second]
    store.add([replace(first, weights="others")])
    assert len(store.rows()) == 3


def test_a_file_is_left_alone_where_nothing_is_new(tmp_path):
    store = ResultStore(tmp_path / "results.jsonl")
    store.add([ROW])
    before = store.path.stat().st_ino
    store.add([ROW])
    assert store.path.stat().st_ino == before
    store.add([replace(ROW, updates=3)])
    assert store.path.stat().st_ino != before


def test_groups_begin_with_real_digits_and_the_baseline():
    seed1 = replace(ROW, settings=replace(SETTINGS, seed=1))
    baseline, real = replace(ROW, strategy="Baseline"), replace(ROW, strategy=REAL)
    assert group_rows([ROW, seed1, baseline, real]) == [[real, baseline, ROW], [seed1]]


def add(path, process):
    for i in range(15):
        ResultStore(path).add([replace(ROW, label=f"{process} {i}")])


def test_rows_that_two_processes_add_are_all_kept(tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=add, args=(tmp_path / "results.jsonl", name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    labels = {row.label for row in ResultStore(tmp_path / "results.jsonl").rows()}
    assert labels == {f"{name} {i}" for name in "ab" for i in range(15)}
