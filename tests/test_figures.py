"""What the figures show, against the numbers of the rows: points, error bars, bands, labels, scales, pixels."""

from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import SETTINGS
from matplotlib.collections import PolyCollection
from matplotlib.text import Text

from common.choose.layers import layer_weights
from common.fisher.information import FisherTable
from common.formats.packed import tensor_shapes
from common.study import figures, frontier
from common.study.rows import Figure, Row


def row(strategy, fid, fid_error, psnr=None, **facts):
    """A row of which only the facts that are given matter. fid, psnr: values; the error of psnr is 0.5."""
    psnr = Figure(psnr, 0.5) if psnr is not None else None
    return Row(
        label=facts.pop("label", strategy), settings=SETTINGS, strategy=strategy, fid=Figure(fid, fid_error),
        kid=Figure(0, 0), inception_score=Figure(1, 0), psnr=psnr, **facts,
    )  # fmt: skip


REAL = row("Real test digits", 0.05, 0.004, label="Real test digits (500)")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def bars(axis):
    """{label: [(x, y, error), ...]} of an axis' error bars, from the ends of the bars themselves."""
    found = {}
    for container in axis.containers:
        (lines,) = container.lines[2]
        ends = [segment for segment in lines.get_segments() if len(segment)]
        points = np.column_stack(container.lines[0].get_data())
        found[container.get_label()] = []
        for (x, y), ((x0, low), (x1, high)) in zip(points, ends, strict=True):
            assert x0 == x1 == x and (low + high) / 2 == pytest.approx(y)
            found[container.get_label()].append((x, y, (high - low) / 2))
    return found


def close_to(expected):
    return {label: [pytest.approx(point) for point in points] for label, points in expected.items()}


def band(axis):
    """(lowest, highest) of the only band."""
    (patch,) = axis.patches
    return patch.get_y(), patch.get_y() + patch.get_height()


def test_fid_and_psnr_against_size():
    rows = [
        REAL,
        row("Baseline", 0.08, 0.008, size_mib=8.0, file_mib=8.1),
        row("Uniform", 0.09, 0.009, psnr=40, size_mib=4.0),
        row("Budget", 0.2, 0.02, psnr=30, size_mib=0.9, file_mib=0.8, format="int4", timestep_weighting="image"),
        row("Budget", 0.3, 0.03, psnr=25, size_mib=0.7, file_mib=0.5, format="int4", timestep_weighting="image"),
        row("Budget", 0.4, 0.04, psnr=20, size_mib=0.6, format="entropy", variant="finetuned",
            updates=600, timestep_weighting="first"),
    ]  # fmt: skip
    fid, psnr = frontier.draw_fid_against_size(rows).axes
    assert bars(fid) == close_to(
        {
            "Baseline": [(8.1, 0.08, 0.008)],
            "Uniform": [(4.0, 0.09, 0.009)],
            "Budget, int4": [(0.5, 0.3, 0.03), (0.8, 0.2, 0.02)],
            "Budget, entropy, 600 updates, Fisher values: first": [(0.6, 0.4, 0.04)],
        }
    )
    assert {label: points for label, points in bars(psnr).items() if points} == close_to(
        {
            "Uniform": [(4.0, 40, 0.5)],
            "Budget, int4": [(0.5, 25, 0.5), (0.8, 30, 0.5)],
            "Budget, entropy, 600 updates, Fisher values: first": [(0.6, 20, 0.5)],
        }
    )
    assert band(fid) == pytest.approx((0.046, 0.054)) and not psnr.patches
    assert (fid.get_xscale(), fid.get_yscale(), psnr.get_xscale(), psnr.get_yscale()) == ("log", "log", "log", "linear")
    assert fid.get_ylabel() == "FID (mnist features)" and "dB" in psnr.get_ylabel()
    assert fid.get_xlabel() == psnr.get_xlabel() == "MiB of the file"
    # One colour for a way, the same in both; its name in that colour, beside its smallest file.
    colours = [{c.get_label(): c.lines[0].get_color() for c in axis.containers} for axis in (fid, psnr)]
    assert colours[0] == colours[0] | colours[1] and len(set(colours[0].values())) == 4
    names = {text.get_text(): text for text in fid.texts if text.get_text() in colours[0]}
    assert {name: text.get_color() for name, text in names.items()} == colours[0]
    assert names["Budget, int4"].xy == (0.5, 0.3) and names["Uniform"].xy == (4.0, 0.09)
    assert [text.get_text() for text in fid.get_legend().get_texts()] == [REAL.label] and not psnr.get_legend()
    assert linked(fid) == {"Uniform", "Budget, int4", "Budget, entropy, 600 updates, Fisher values: first"}
    assert {(0.5, 0.27), (0.5, 0.33), (0.8, 0.18), (0.8, 0.22)} in shaded(fid)  # one error on either side of two points


def shaded(axis):
    """The corners of each area beside a line."""
    areas = [area for area in axis.collections if isinstance(area, PolyCollection)]
    return [{tuple(np.round(at, 9)) for at in path.vertices} for area in areas for path in area.get_paths()]


def linked(axis):
    """Names of the ways whose points are joined."""
    return {c.get_label() for c in axis.containers if c.lines[0].get_linestyle() == "-"}


def test_names_do_not_overlap():
    alike = [row(f"Rule {i}", 0.1 + i / 1000, 0.01, size_mib=1.0) for i in range(9)]
    figure = frontier.draw_fid_against_size([REAL, *alike])
    axis = figure.axes[0]
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # without the line to its point
    assert len(boxes) == 9 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_published_sizes_are_marked_at_the_paper_preset_alone():
    rows = [row("Baseline", 0.1, 0.01, size_mib=8.0, published=(22.8, 134.2)), row("Uniform", 0.1, 0.01, size_mib=4.0)]
    paper = [replace(r, settings=replace(r.settings, preset="paper")) for r in rows]
    marked = [
        [line.get_xdata()[0] for line in frontier.draw_fid_against_size(of).axes[0].lines if len(line.get_xdata()) == 2]
        for of in (rows, paper)
    ]
    assert marked == [[], [134.2]]


def test_waterfall():
    def part(variant, value, setting="10x"):
        name = ", ".join(filter(None, [setting, variant]))
        difference = Figure(value, 0.01)
        return row(
            "Budget", 1, 0.1, setting=name, variant=variant, format="entropy", timestep_weighting="image",
            fid_unbiased_difference=difference,
        )  # fmt: skip

    rows = [part("nearest", 0.3), part("no feedback", 0.2), part(None, 0.1), part(None, 0.5, "13x"), REAL]
    (axis,) = frontier.draw_waterfall(rows).axes  # 13x has one part
    assert axis.get_title() == "10x smaller"
    names = [label.get_text() for label in axis.get_yticklabels()]
    found = {names[round(bar.get_y() + bar.get_height() / 2)]: bar.get_width() for bar in axis.patches}
    assert found == {"nearest": 0.3, "no feedback": 0.2, "all parts": 0.1}
    ends = [s[:, 0] for bars in axis.containers if hasattr(bars, "lines") for s in bars.lines[2][0].get_segments()]
    assert sorted(map(tuple, ends)) == [pytest.approx((v - 0.01, v + 0.01)) for v in (0.1, 0.2, 0.3)]
    assert frontier.draw_waterfall(rows[1:]) is None
    smaller = [replace(part(kind, 0.5, "16x"), size_mib=0.5) for kind in ("nearest", "no feedback", None)]
    panels = frontier.draw_waterfall([*smaller, *(replace(one, size_mib=0.8) for one in rows)]).axes
    assert [panel.get_title() for panel in panels] == ["10x smaller", "16x smaller"]


def test_the_unbiased_difference_is_drawn_where_rows_have_it():
    def unbiased(value, error):
        return {"fid_unbiased": Figure(1 + value, 0.5), "fid_unbiased_difference": Figure(value, error)}

    real = row("Real test digits", 0.05, 0.004, fid_unbiased=Figure(0.01, 0.002))
    baseline = row("Baseline", 0.08, 0.008, size_mib=8.0, fid_unbiased=Figure(0.02, 0.005), digits_seen=300)
    rows = [
        real, baseline,
        row("Uniform", 0.09, 0.009, psnr=40, size_mib=4.0, **unbiased(-0.001, 0.002)),
        row("Ratio", 0.2, 0.02, psnr=30, size_mib=0.9, setting="0.5", format="int4", **unbiased(0.1, 0.02)),
        row("Ratio", 0.3, 0.02, psnr=30, size_mib=0.8, setting="0.25", format="int4", **unbiased(0.2, 0.03)),
    ]  # fmt: skip
    fid, _ = frontier.draw_fid_against_size(rows).axes
    found = {label: points for label, points in bars(fid).items() if points}
    ratio = [(0.8, 0.2, 0.03), (0.9, 0.1, 0.02)]
    assert found == close_to({"Uniform": [(4.0, -0.001, 0.002)], "Ratio": ratio})
    assert fid.get_yscale() == "symlog" and fid.get_ylabel() == (
        "unbiased FID minus FP32's (mnist features, linear around 0)"
    )
    assert band(fid) == pytest.approx((-0.005, 0.005))  # one error of FP32's own FID
    assert linked(fid) == {"Uniform"}
    (axis,) = frontier.draw_fid_against_ratio(rows).axes
    (points,) = bars(axis).values()
    assert points == [pytest.approx((0.25, 0.2, 0.03)), pytest.approx((0.5, 0.1, 0.02))]
    early = row("Training", 0.5, 0.05, digits_seen=100, fid_unbiased=Figure(0.4, 0.04))
    (axis,) = frontier.draw_learning_curve([real, baseline, early]).axes
    (points,) = bars(axis).values()
    assert points == [pytest.approx((100, 0.4, 0.04)), pytest.approx((300, 0.02, 0.005))]
    assert band(axis) == pytest.approx((0.008, 0.012)) and axis.get_ylabel().startswith("unbiased FID (")


def test_one_size_is_no_figure():
    assert frontier.draw_fid_against_size([REAL, row("Baseline", 0.08, 0.008, size_mib=8.0)]) is None


def test_fid_against_ratio():
    facts = {"strategy": "Ratio", "timestep_weighting": "first"}
    rows = [
        REAL,
        row("Uniform", 0.9, 0.09, format="fp16"),
        row(setting="0.5", fid=0.2, fid_error=0.02, format="fp16", **facts),
        row(setting="0.25", fid=0.3, fid_error=0.03, format="fp16", **facts),
        row(setting="0.25", fid=0.7, fid_error=0.07, format="int4", **facts),
    ]
    (axis,) = frontier.draw_fid_against_ratio(rows).axes
    fp16, int4 = bars(axis).values()  # a line each, from left to right
    assert fp16 == [pytest.approx((0.25, 0.3, 0.03)), pytest.approx((0.5, 0.2, 0.02))]
    assert int4 == [pytest.approx((0.25, 0.7, 0.07))]
    assert "FP16" in axis.containers[0].get_label() and "INT4" in axis.containers[1].get_label()
    assert band(axis) == pytest.approx((0.046, 0.054))
    assert (axis.get_xscale(), axis.get_yscale()) == ("linear", "linear")
    assert frontier.draw_fid_against_ratio(rows[:3]) is None


def test_learning_curve():
    rows = [row("Baseline", fid, error, digits_seen=seen) for seen, fid, error in ((300, 0.1, 0.01), (100, 0.5, 0.05))]
    (axis,) = frontier.draw_learning_curve([REAL, *rows]).axes
    (points,) = bars(axis).values()
    assert points == [pytest.approx((100, 0.5, 0.05)), pytest.approx((300, 0.1, 0.01))]
    assert band(axis) == pytest.approx((0.046, 0.054))
    assert axis.get_yscale() == "log" and axis.get_xlabel() == "digits seen"
    assert axis.get_ylabel() == "FID (mnist features)"
    assert frontier.draw_learning_curve([REAL, rows[0]]) is None


def test_samples_are_the_images(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    kept = {name: torch.randint(50, 200, (15, 32, 32), dtype=torch.uint8, generator=generator) for name in ("a", "b")}
    for name in kept:
        (tmp_path / name).touch()
    monkeypatch.setattr(figures, "load_images", lambda path: kept[path.name])
    rows = [
        row("Real", 0, 0),
        *(row("Uniform", 0, 0, label=n, image_file=str(tmp_path / n)) for n in ("a", "b", "gone")),
    ]
    axes = figures.draw_samples(rows).axes
    assert [axis.get_ylabel() for axis in axes] == ["a", "b"]
    for axis, images in zip(axes, kept.values(), strict=True):
        (strip,) = axis.get_images()
        assert strip.get_clim() == (0, 255)  # not stretched to the darkest and lightest of its own
        shown = np.asarray(strip.get_array())
        assert shown.shape == (32, 12 * 32)
        for i in range(12):
            assert np.array_equal(shown[:, 32 * i : 32 * (i + 1)], images[i])
    assert figures.draw_samples(rows[:1]) is None


@pytest.fixture
def table(tiny_config):
    """Values and errors that differ everywhere; timesteps out of order."""
    names = list(tensor_shapes(tiny_config))
    values = torch.arange(1, 3 * len(names) + 1, dtype=torch.float64).view(3, -1)
    timesteps = [500, 1, 1000]
    return FisherTable(names, timesteps, values, values / 10, torch.empty(0), [1] * 3, {}, "b" * 64, [])


def columns_of(table, layers):
    chosen = [name for name in layer_weights(table.names) if name[len("layer")] in layers]
    return [table.names.index(name) for name in chosen]


def test_fisher_by_group(table):
    (axis,) = figures.draw_fisher_by_group(table).axes
    order = [1, 0, 2]
    lines = {line.get_label(): line for line in axis.get_lines()}
    for label, layers in (("layers 1-2", "12"), ("layers 3-6", "3456")):
        columns = columns_of(table, layers)
        values, errors = table.values[order][:, columns].numpy(), table.errors[order][:, columns].numpy()
        expected = zip([1, 500, 1000], values.mean(1), errors.mean(1), strict=True)
        assert bars(axis)[f"{label}, mean"] == [pytest.approx(point) for point in expected]
        median = torch.from_numpy(values).median(1).values
        np.testing.assert_array_equal(lines[f"{label}, median"].get_data(), ([1, 500, 1000], median))
    assert axis.get_yscale() == "log" and "timestep" in axis.get_xlabel()


def test_fisher_by_tensor(table):
    *axes, colours = figures.draw_fisher_by_tensor(table).axes
    assert [axis.get_title() for axis in axes] == [f"layer{n}" for n in range(1, 7)]
    for axis, layer in zip(axes, "123456", strict=True):
        columns = columns_of(table, layer)
        drawn = [line.get_ydata() for line in axis.get_lines()]
        np.testing.assert_array_equal(drawn, table.values[[1, 0, 2]][:, columns])  # in the order of the timesteps
        names = [table.names[i].removeprefix(f"layer{layer}.").removesuffix(".weight") for i in columns]
        assert [tick.get_text() for tick in axis.get_xticklabels()] == names
        assert axis.get_yscale() == "log"
    assert colours.get_ylim() == (1, 1000)


def test_weights_are_counted(tiny_network):
    state = tiny_network.state_dict()
    for axis, layer in zip(figures.draw_weights(SimpleNamespace(state=state)).axes, "123456", strict=True):
        chosen = [
            tensor for name, tensor in state.items()
            if name in layer_weights(state) and name.startswith(f"layer{layer}") and tensor.dim() > 1
        ]  # fmt: skip
        values = torch.cat([tensor.flatten() for tensor in chosen])
        heights = [bar.get_height() for bar in axis.patches]
        assert sum(heights) == len(values)
        assert axis.patches[0].get_x() == pytest.approx(float(values.min()))
        assert axis.patches[-1].get_x() + axis.patches[-1].get_width() == pytest.approx(float(values.max()))
        assert f"{len(values):,} weights, std {values.std(correction=0):.3f}" in axis.get_title()


def test_loss():
    model = SimpleNamespace(metadata={"loss_curve": [0.9, 0.5, 0.2], "training": {"steps": 40, "batch_size": 8}})
    (axis,) = figures.draw_loss(model).axes
    (line,) = axis.get_lines()
    np.testing.assert_array_equal(line.get_data(), ([0, 20, 40], [0.9, 0.5, 0.2]))
    assert axis.get_yscale() == "log" and axis.get_xlabel() == "step of 8 digits"
    model.metadata["loss_curve"] = []
    assert figures.draw_loss(model) is None
