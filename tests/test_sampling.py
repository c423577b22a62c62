"""Kept images: read back where they are those asked for, else made anew; scripts that run at once share them."""

import shutil
from dataclasses import replace

import pytest
import torch

from common.ddpm import sampling as module
from common.ddpm.sampling import Sampling, generate, image_file
from common.errors import UserError
from common.presets import UNetConfig
from common.runtime import sealed

SAMPLING = Sampling(images=5, sampler="ddim", steps=1, eta=0.0, batch_size=2, seed=0, device="cpu", precision="fp32")
BATCHES = 3


class Half(torch.nn.Module):
    architecture = UNetConfig()

    def forward(self, x, t):
        return x / 2


class NoNumber(Half):
    def forward(self, x, t):
        return x * torch.nan


def test_images_that_are_no_numbers_are_refused_and_not_kept(tmp_path):
    with pytest.raises(UserError, match="label: the network predicts what is no number"):
        generate(NoNumber(), "a", SAMPLING, torch.device("cpu"), tmp_path, "label")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.fixture
def make(tmp_path):
    """Images under the name of any weights; in a folder, by default always the same one."""

    def make(weights="a", sampling=SAMPLING, folder=tmp_path):
        return generate(Half(), weights, sampling, torch.device("cpu"), folder, "label")

    return make


@pytest.fixture
def sampled(monkeypatch):
    """How many images each call of `sample` made."""
    sizes, sample = [], module.sample

    def counting(*arguments, **keywords):
        images = sample(*arguments, **keywords)
        sizes.append(len(images))
        return images

    monkeypatch.setattr(module, "sample", counting)
    return sizes


@pytest.fixture
def stopped(make, monkeypatch, tmp_path):
    """The folder of parts of a run that was stopped when all its batches were made."""
    with monkeypatch.context() as patch:
        patch.setattr(module.distributed, "barrier", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make()
    (folder,) = tmp_path.glob("*.parts")
    assert len(list(folder.iterdir())) == BATCHES
    return folder


def test_kept_images_are_read_back_without_sampling(make, sampled, capsys, tmp_path):
    images = make()
    before = image_file(tmp_path, SAMPLING, "a").read_bytes()
    assert torch.equal(make(), images)
    assert sampled == [2, 2, 1]
    assert image_file(tmp_path, SAMPLING, "a").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [image_file(tmp_path, SAMPLING, "a").name]
    assert capsys.readouterr().out == ""


def swap_weights(path, other):
    shutil.copy(other, path)


def swap_shape(path, _):
    tensors, metadata = sealed.load(path, "images")
    sealed.save(path, "images", {"images": tensors["images"][:4]}, metadata)


def swap_type(path, _):
    tensors, metadata = sealed.load(path, "images")
    sealed.save(path, "images", {"images": tensors["images"].float()}, metadata)


def swap_torch(path, _):
    tensors, metadata = sealed.load(path, "images")
    sealed.save(path, "images", tensors, metadata | {"torch": "1.0"})


def swap_kind(path, _):
    sealed.save(path, "model", *sealed.load(path, "images"))


def damage(path, _):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", [swap_weights, swap_shape, swap_type, swap_torch, swap_kind, damage])
def test_kept_images_that_are_not_those_asked_for_are_named_and_made_anew(make, sampled, capsys, tmp_path, change):
    images, path = make(), image_file(tmp_path, SAMPLING, "a")
    before = path.read_bytes()
    make("b")
    change(path, image_file(tmp_path, SAMPLING, "b"))
    assert torch.equal(make(), images)
    assert path.read_bytes() == before and len(sampled) == 3 * BATCHES
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and str(path) in printed and "anew" in printed


def test_kept_images_of_another_seed_are_not_read_back(make, capsys, tmp_path):
    expected = make()
    other = replace(SAMPLING, seed=1)
    make(sampling=other)
    shutil.copy(image_file(tmp_path, other, "a"), image_file(tmp_path, SAMPLING, "a"))
    assert torch.equal(make(), expected)


def test_a_damaged_part_is_found_first_and_made_anew(make, stopped, sampled, capsys, tmp_path):
    expected = make(folder=tmp_path / "whole")
    sampled.clear()
    damage(stopped / "0000002.safetensors", None)
    (stopped / "0000004.safetensors").unlink()
    assert torch.equal(make(), expected)
    assert sampled == [2, 1]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "0000002.safetensors" in printed and "anew" in printed
    assert not stopped.exists()


def test_parts_of_other_weights_are_made_anew(make, stopped, sampled, tmp_path):
    stopped.rename(image_file(tmp_path, SAMPLING, "b").with_suffix(".parts"))
    make("b")
    assert sampled == [2, 2, 1]


def test_parts_out_of_order_are_made_anew(make, stopped, sampled, tmp_path):
    expected = make(folder=tmp_path / "whole")
    sampled.clear()
    shutil.copy(stopped / "0000000.safetensors", stopped / "0000002.safetensors")
    assert torch.equal(make(), expected) and sampled == [2]


@pytest.mark.parametrize("at", range(BATCHES))
def test_another_script_that_comes_first_does_the_work_of_both(make, monkeypatch, tmp_path, at):
    """It makes the same images from beginning to end while this one is at its batch number `at`."""
    expected, sample, calls = make(folder=tmp_path / "whole"), module.sample, []

    def interrupted(*arguments, **keywords):
        calls.append(len(calls))
        if calls[-1] == at:
            assert torch.equal(make(), expected)
        return sample(*arguments, **keywords)

    monkeypatch.setattr(module, "sample", interrupted)
    assert torch.equal(make(), expected)
    # Each batch once, but for the one that both were at.
    assert len(calls) == BATCHES + 1
    path = image_file(tmp_path, SAMPLING, "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, "whole"])
    assert path.read_bytes() == image_file(tmp_path / "whole", SAMPLING, "a").read_bytes()


def test_another_script_that_deletes_the_folder_under_a_write(make, monkeypatch, tmp_path):
    expected, save, calls = make(folder=tmp_path / "whole"), sealed.save, []

    def interrupted(path, *arguments):
        calls.append(path)
        if len(calls) == 2:
            assert torch.equal(make(), expected)
            raise FileNotFoundError(path)
        save(path, *arguments)

    monkeypatch.setattr(module.sealed, "save", interrupted)
    assert torch.equal(make(), expected)


def test_a_part_that_cannot_be_written_is_an_error(make, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(module.sealed, "save", full)
    with pytest.raises(OSError, match="No space"):
        make()
