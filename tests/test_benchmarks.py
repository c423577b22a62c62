"""What the benchmarks print and how they count; times themselves belong to them, not here."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import graphs, memory, peak, peers, profile, published, samplers, speed, time_per_image
from common.ddpm.unet import UNet
from common.errors import UserError
from common.presets import PRESETS
from common.study.rows import Figure


def run(module, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    module.main()
    return capsys.readouterr().out


def test_operations_of_the_paper_network_are_those_known():
    network = UNet(PRESETS["paper"].network).eval()
    attention = 4 * 256**2 * (128 + 384)  # two products of 256 pixels by 256 in each layer that has it
    assert speed.forward_flops(network, torch.device("cpu")) == pytest.approx(7.13e9 + attention, rel=0.001)


def test_speed_names_each_way_and_compares_it_with_the_published_one(tiny_preset, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(peak, "MATRIX", 64)
    monkeypatch.setattr(peak, "CHANNELS", 8)
    monkeypatch.setattr(graphs, "PRECISIONS", ("int8",))
    monkeypatch.setattr(speed, "fid_apart", lambda device: [speed.Timing("FID", "published", 6.0, None)])
    monkeypatch.setattr(speed, "bf16_is_faster", lambda device: False)
    printed = run(speed, monkeypatch, capsys, "--preset", "quick", "--rounds", "1", "--json", str(tmp_path / "s.json"))
    timings = json.loads((tmp_path / "s.json").read_text())["timings"]
    ways = [(t["work"], t["way"]) for t in timings]
    assert len(ways) == len(set(ways))
    sampled = {way for work, way in ways if work == speed.SAMPLING}
    assert sampled == {"published", "fp32", "openvino int8"}
    assert {way for work, way in ways if work.startswith("training")} == {"published", "fp32"}
    assert {way for work, way in ways if work.startswith("10^9 operations")} == {"fp32", "int8"}
    assert all(t["seconds"] > 0 for t in timings)
    for timing in timings:
        assert timing["work"] in printed
    table = speed.format_timings([speed.Timing("a", "published", 3.0, 0.5), speed.Timing("a", "fp32", 0.5, None)])
    assert table.splitlines()[1].split() == ["a", "published", "3000.000", "1.00x", "50.0%"]
    assert table.splitlines()[2].split() == ["a", "fp32", "500.000", "6.00x", "-"]


@pytest.mark.parametrize("name", ["", "file/speed.json"])
def test_speed_that_cannot_write_its_times_says_so_before_it_begins(monkeypatch, capsys, tmp_path, name):
    (tmp_path / "file").touch()
    monkeypatch.setattr(speed, "speed", lambda *_: pytest.fail("it began"))
    with pytest.raises(UserError, match=f"^--json {tmp_path}.*name a"):
        run(speed, monkeypatch, capsys, "--json", str(tmp_path / name))


def test_peers_none_of_which_is_installed_are_an_error(tiny_preset, monkeypatch, capsys):
    monkeypatch.setattr(peers, "_version", lambda package: None)
    with pytest.raises(UserError, match=r"pip install (torchao optimum-quanto|optimum-quanto torchao)"):
        run(peers, monkeypatch, capsys, "--preset", "quick", "--device", "cpu")


@pytest.mark.parametrize("step", [1.0, 1.24, 1.25, 1.99, 0.3, 0.0131, 77.0])
def test_the_number_of_a_step_for_nncodec(step):
    below, above = (2 ** (qp // 4) * (1 + qp % 4 / 4) for qp in (peers._nncodec_qp(step), peers._nncodec_qp(step) + 1))
    assert below <= step < above


def test_profile_finds_the_operator_that_takes_the_time(tiny_preset, monkeypatch, capsys):
    a = torch.randn(1000, 1000)
    shares = profile.operator_shares(lambda: (a @ a, a[:2] + 1), torch.device("cpu"))
    assert next(iter(shares)) == "mm" and sum(shares.values()) == pytest.approx(1)
    monkeypatch.setattr(profile, "bf16_is_faster", lambda device: False)
    printed = run(profile, monkeypatch, capsys, "--preset", "quick")
    assert [line.split(":")[0] for line in printed.splitlines()] == ["sampling, fp32", "training, fp32", "Fisher, fp32"]
    assert all("others" in line for line in printed.splitlines())


def test_published_way_drops_attention_weights_at_all_times(tiny_network):
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([3, 700])
    with torch.inference_mode():
        plain = tiny_network(x, t)
        with published.with_dropout():
            assert not torch.equal(tiny_network(x, t), tiny_network(x, t))
        assert torch.equal(tiny_network(x, t), plain)


def test_samplers_names_the_fewest_steps_that_are_near():
    rows = [
        SimpleNamespace(
            settings=SimpleNamespace(sampler=sampler, steps=steps, eta=1.0),
            fid_unbiased=Figure(fid, 0.01),
            inception_score=Figure(9.0, 0.1),
        )
        for sampler, steps, fid in (("ddim", 10, 0.4), ("ddim", 50, 0.21), ("ddim", 100, 0.2), ("ddpm", 1000, 0.2))
    ]
    printed = samplers.format_samplers(rows, [(0.2, 0.02), (0.01, 0.02), (0.0, 0.02), (0.0, 0.0)]).splitlines()
    assert printed[-1].endswith("DDPM's: 50, ddim")
    assert " ".join(printed[2].split()) == "ddim 10, eta 1 0.400 ± 0.010 +0.200 ± 0.020 9.000 ± 0.100"


def test_memory_prints_a_line_for_each_work(tiny_preset, monkeypatch, capsys):
    monkeypatch.setattr(memory, "PRECISIONS", ("int8",))
    printed = run(memory, monkeypatch, capsys, "--images", "260").splitlines()
    assert printed[2].split() == ["images", "260"]
    for line, work in zip(printed[3:6], memory.WORKS, strict=True):
        assert line.split()[0] == work and all(float(mib) > 50 for mib in line.split()[1:])
    assert [line.rsplit(maxsplit=1)[0] for line in printed[8:]] == ["torch fp32", "torch bf16", "openvino int8"]
    assert all(float(line.split()[-1]) > 1 for line in printed[8:])


def test_time_per_image_names_the_cheapest_way_that_is_as_good():
    ways = [
        time_per_image.Way("published", 40_000.0, (0.0, 0.0)),
        time_per_image.Way("DDPM 1000, torch fp32", 10_000.0, (0.0, 0.0)),
        time_per_image.Way("DPM-Solver++ 20, torch fp32", 200.0, (0.001, 0.002)),
        time_per_image.Way("DPM-Solver++ 10, openvino int8", 40.0, (0.02, 0.002)),
        time_per_image.Way("DPM-Solver++ 20, openvino int8", 80.0, (0.002, 0.002)),
    ]
    printed = time_per_image.format_ways(ways).splitlines()
    waterfall = [line.rsplit(maxsplit=3) for line in printed[printed.index("", 1) + 2 :]]
    assert [line[0].strip() for line in waterfall] == [ways[i].name for i in (0, 1, 2, 4)]
    assert [line[1:] for line in waterfall] == [
        ["40000.00", "1x", "1.0x"], ["10000.00", "4x", "4.0x"], ["200.00", "200x", "50.0x"], ["80.00", "500x", "2.5x"]
    ]  # fmt: skip
    assert "none of" in time_per_image.format_ways([*ways[:2], ways[3]])
