"""Pictures and files of the images that models make."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.ddpm import sampling
from common.ddpm.digits import load_labelled_digits, some_of
from common.ddpm.sampling import Sampling, generate
from common.errors import UserError
from common.formats.packed import full_precision, save_model
from common.study import grid
from common.study.grid import png_of_grid
from common.study.score_folder import load_folder
from common.study.strips import draw_strips


@pytest.fixture
def files(tiny_network, tmp_path, monkeypatch):
    """Two models' files, a.safetensors and b.safetensors, in the folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        state = {k: v + (name == "b") * 0.01 for k, v in tiny_network.state_dict().items()}
        save_model(tmp_path / f"{name}.safetensors", full_precision(tiny_network.config, state, {"label": name}))
    return tmp_path


@pytest.fixture
def command(monkeypatch):
    def run(line):
        monkeypatch.setattr(sys, "argv", ["python -m common samples", *line.split()])
        grid.main()

    return run


def images_of(network, folder, name, count=12):
    settings = Sampling(count, "dpm++", 2, 1.0, 50, 0, "cpu", "fp32")
    return generate(network, name, settings, torch.device("cpu"), folder / "own", name)


def test_a_grid_places_images_row_by_row(tmp_path):
    images = [torch.full((3, 4, 6), 40 * i, dtype=torch.uint8) for i in range(5)]
    (tmp_path / "grid.png").write_bytes(png_of_grid(images))
    grid = np.array(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (4 + 2 + 4, 6 + 2 + 6 + 2 + 6, 3)
    assert (grid[:4, :6] == 0).all() and (grid[6:, 8:14] == 160).all() and (grid[6:, 16:] == 255).all()


def test_a_grid_of_64_is_what_one_model_is_drawn_as(files, command, tiny_network):
    command("a.safetensors --steps 2 --out grid.png")
    assert (files / "grid.png").read_bytes() == png_of_grid(list(images_of(tiny_network, files, "a", 64)))


def test_the_images_as_files_are_those_that_rows_score(files, command, tiny_network):
    command("a.safetensors --images 260 --steps 2 --png there")
    assert sorted(path.name for path in files.iterdir()) == ["a.safetensors", "b.safetensors", "there"]
    assert sorted(path.name for path in (files / "there").iterdir())[::259] == ["a-00000.png", "a-00259.png"]
    assert torch.equal(load_folder(files / "there"), images_of(tiny_network, files, "a", 260))  # so metrics agree


def test_an_interrupted_folder_of_images_continues(files, command, tiny_network, monkeypatch):
    true_sample, batches = sampling.sample, []

    def dies_at_the_third(*arguments, **more):
        batches.append(None)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return true_sample(*arguments, **more)

    monkeypatch.setattr(sampling, "sample", dies_at_the_third)
    line = "a.safetensors --images 10 --batch-size 2 --steps 2 --png there"
    with pytest.raises(KeyboardInterrupt):
        command(line)
    assert not (files / "there").exists()
    command(line)
    assert len(batches) == 3 + 3
    assert torch.equal(load_folder(files / "there"), images_of(tiny_network, files, "a")[:10])
    assert not list(files.glob("*.unfinished"))


def test_a_folder_has_no_images_of_a_longer_run_that_was_stopped(files, command, monkeypatch):
    def stopped(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", stopped)
        command("a.safetensors --images 4 --steps 2 --png there")
    command("a.safetensors --images 3 --steps 2 --png there")
    assert len(list((files / "there").iterdir())) == 3


def test_several_models_stand_below_real_digits(files, command, monkeypatch):
    drawn = []
    monkeypatch.setattr(grid, "png_of_strips", lambda *strips: drawn.append(strips) or b"picture")
    command("a.safetensors b.safetensors --steps 2 --seed 3 --out two.png")
    (models, seed), = drawn  # fmt: skip
    assert [model.metadata["label"] for model, _ in models] == ["a", "b"] and seed == 3
    assert [images.shape for _, images in models] == [(12, 32, 32)] * 2
    assert (files / "two.png").read_bytes() == b"picture"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a.safetensors --png full", "--png full: is there and not an empty folder; name a new one"),
        ("a.safetensors --png a.safetensors", "--png a.safetensors: is there and not an empty folder"),
        ("a.safetensors full/a.safetensors --png new", "full/a.safetensors: --png names images by their model's file"),
        ("a.safetensors a.safetensors", "a.safetensors: is named twice; leave one out"),
        ("a.safetensors b.safetensors --images 65", "--images 65: a line holds 64; give fewer, or --png DIR"),
        ("a.safetensors large.safetensors", "large.safetensors: makes 16x16 images of 3 channels, a.safetensors 32x32"),
        ("a.safetensors short.safetensors", "short.safetensors: has other timesteps than a.safetensors"),
    ],
)
def test_what_cannot_be_drawn_is_refused(files, command, monkeypatch, line, said):
    (files / "full").mkdir()
    (files / "full" / "a.safetensors").write_bytes((files / "a.safetensors").read_bytes())
    if "large" in line or "short" in line:
        monkeypatch.setattr("common.study.run.read_checkpoint", lambda path, _: FakeModel(path.stem))
    before = sorted(files.rglob("*"))
    with pytest.raises(UserError) as refused:
        command(line)
    assert said in str(refused.value)
    assert sorted(files.rglob("*")) == before


class FakeModel:
    """Of another shape of images, or of fewer timesteps."""

    def __init__(self, name):
        shape, timesteps = (3, 16, 16) if name == "large" else (1, 32, 32), 250 if name == "short" else 1000
        self.config = type("Config", (), {"image_shape": shape, "timesteps": timesteps})


def test_strips_frame_what_became_another_digit():
    digits, labels = load_labelled_digits("mnist5k", "test")
    one, other = digits[labels == 1][:4], digits[labels == 0][:4]
    changed = torch.stack([one[0], other[1], one[2], other[3]])
    axes = draw_strips([("real", other), ("before", one), ("after", changed), ("none", one)], original=1).axes
    assert [[patch.get_x() for patch in axis.patches] for axis in axes] == [[], [], [32, 96], []]
    assert "framed" in axes[0].get_title()
    assert all(not axis.patches for axis in draw_strips([("before", one), ("after", changed)]).axes)


def test_some_digits_are_each_once_and_depend_on_the_seed():
    digits = torch.arange(50).view(50, 1)
    assert sorted(some_of(digits, 60, 0).flatten().tolist()) == list(range(50))
    assert some_of(digits, 7, 0).tolist() == some_of(digits, 50, 0)[:7].tolist() != some_of(digits, 7, 1).tolist()
