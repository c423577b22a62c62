"""Sealed files: whatever is changed in one is refused; a write leaves the old file or the new one."""

import hashlib
import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch

from common.errors import WriteError
from common.runtime import files
from common.runtime.files import write_atomically
from common.runtime.sealed import CheckpointError, hash_tensors, load, require, save

TENSORS = {
    "float": torch.tensor([[1.5, -2.25], [0.0, float("inf")]]),
    "half": torch.tensor([1.0, -0.5], dtype=torch.float16),
    "codes": torch.tensor([0, 127, 255], dtype=torch.uint8),
    "none": torch.zeros(0, 3),
}
METADATA = {"weights_sha256": "0" * 64, "nested": {"list": [1, 2.5, None, "ü \" \\ '"]}, "flag": True}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file.safetensors"
    save(path, "model", TENSORS, METADATA)
    return path


def test_what_is_saved_is_loaded(file):
    tensors, metadata = load(file, "model")
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor)


def test_any_safetensors_reader_can_open_it(file):
    for name, tensor in safetensors.torch.load_file(file).items():
        assert torch.equal(tensor, TENSORS[name])


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_any_one_byte_changed_is_refused(file, flip):
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=file.name):
            load(file, "model")
    file.write_bytes(content)
    load(file, "model")


def test_upper_case_in_the_checksum_is_a_change(file):
    """The one kind of change that a lenient reader of hexadecimal digits would let pass."""
    content = file.read_bytes()
    start = content.index(b'sha256\\": \\"') + len(b'sha256\\": \\"')
    places = [i for i in range(start, start + 64) if content[i : i + 1].isalpha()]
    assert places
    for place in places:
        file.write_bytes(content[:place] + content[place : place + 1].upper() + content[place + 1 :])
        with pytest.raises(CheckpointError):
            load(file, "model")


def test_truncated_at_any_length_is_refused(file):
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=file.name):
            load(file, "model")


@pytest.mark.parametrize("place", ["before", "after"])
def test_bytes_added_are_refused(file, place):
    content = file.read_bytes()
    file.write_bytes(b"\0" + content if place == "before" else content + b"\0")
    with pytest.raises(CheckpointError):
        load(file, "model")


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "foreign"
    safetensors.torch.save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="not a file of this project"):
        load(path, "model")
    safetensors.torch.save_file({"weight": torch.ones(3)}, path, metadata={"simplediffusion": "{}"})
    with pytest.raises(CheckpointError, match="not a file of this project"):
        load(path, "model")
    torch.save({"weight": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match="not a file of this project"):
        load(path, "model")
    for size in (0, 1, 100, 10_000):
        path.write_bytes(np.random.default_rng(size).bytes(size))
        with pytest.raises(CheckpointError, match="not a file of this project"):
            load(path, "model")


def test_a_foreign_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "foreign"
    safetensors.torch.save_file({"weight": torch.ones(3)}, path)
    os.truncate(path, 2**40)  # which takes no room on the disk, and more memory than there is
    with pytest.raises(CheckpointError, match="not a file of this project"):
        load(path, "model")


@pytest.mark.parametrize("body", [b"", b"{}", b"garbage", b'{"__metadata__":{}}', b"\xff\xfe"])
def test_a_foreign_file_with_a_fitting_checksum_is_refused(tmp_path, body):
    """Someone else's bytes around a seal that fits: an error of one line, no traceback."""
    unsealed = len(body).to_bytes(8, "little") + body + b'\\"sha256\\": \\"' + b"0" * 64 + b'\\"'
    digest = hashlib.sha256(unsealed).hexdigest().encode()
    path = tmp_path / "foreign"
    path.write_bytes(unsealed.replace(b"0" * 64, digest))
    with pytest.raises(CheckpointError, match="not a file of this project"):
        load(path, "model")


def test_a_foreign_safetensors_file_with_a_fitting_checksum_is_refused(tmp_path):
    header = json.dumps({"kind": "model", "sha256": "0" * 64})
    unsealed = safetensors.torch.save({"weight": torch.ones(3)}, {"another program": header})
    path = tmp_path / "foreign"
    path.write_bytes(unsealed.replace(b"0" * 64, hashlib.sha256(unsealed).hexdigest().encode()))
    with pytest.raises(CheckpointError, match="not a file of this project"):
        load(path, "model")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"sha256": "0" * 64}, "kind"),
        ([["sha256", 0], "sha256", {"sha256": "0" * 64}], "not a file of this project"),
        ({"kind": "model", "sha256": "0" * 64, "version": "1"}, "version is not a number"),
        ({"kind": "model", "sha256": "0" * 64, "version": True}, "version is not a number"),
        ({"kind": "model", "sha256": "0" * 64, "version": -1}, "version is not a number"),
        ({"kind": "model", "sha256": "0" * 64, "deep": "DEEP"}, "recursion"),
    ],
)
def test_a_sealed_header_that_says_nonsense_is_refused(tmp_path, metadata, reason):
    path = tmp_path / "foreign"
    header = json.dumps(metadata).replace('"DEEP"', "[" * 100_000 + "]" * 100_000)
    unsealed = safetensors.torch.save({"weight": torch.ones(3)}, {"simplediffusion": header})
    path.write_bytes(unsealed.replace(b"0" * 64, hashlib.sha256(unsealed).hexdigest().encode()))
    with pytest.raises(CheckpointError, match=reason):
        load(path, "model")


def test_a_shape_that_torch_cannot_hold_is_refused(tmp_path):
    """No entries, so the file is as long as it says; torch cannot count such lengths."""
    shape = [0, 2**62, 2**62]
    metadata = {"simplediffusion": json.dumps({"kind": "model", "sha256": "0" * 64})}
    header = json.dumps({"__metadata__": metadata, "w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    unsealed = len(header).to_bytes(8, "little") + header.encode()
    path = tmp_path / "foreign"
    path.write_bytes(unsealed.replace(b"0" * 64, hashlib.sha256(unsealed).hexdigest().encode()))
    with pytest.raises(CheckpointError, match="not a file of this project"):
        load(path, "model")


def test_files_without_a_version_are_read_and_newer_ones_refused(file, monkeypatch):
    assert b'\\"version\\": 1' in file.read_bytes()
    save(file, "model", TENSORS, METADATA | {"version": 2})
    with pytest.raises(CheckpointError, match=r"format version 2, .* up to 1; update the software"):
        load(file, "model")
    header = json.dumps({"kind": "model", "sha256": "0" * 64, **METADATA})  # as version 0 wrote it
    unsealed = safetensors.torch.save(TENSORS, {"simplediffusion": header})
    start = unsealed.index(b'sha256\\": \\"') + len(b'sha256\\": \\"')
    digest = hashlib.sha256(unsealed).hexdigest().encode()
    file.write_bytes(unsealed[:start] + digest + unsealed[start + 64 :])
    assert load(file, "model")[1] == METADATA


@pytest.mark.parametrize(
    ("tensors", "metadata", "reason"),
    [
        ({"a": torch.zeros(2, 3)}, {"step": 1.0}, "entry step is not of type int"),
        ({"a": torch.zeros(2, 3)}, {"step": True}, "entry step is not of type int"),
        ({"a": torch.zeros(2, 3)}, {}, "entry step is missing"),
        ({"a": torch.zeros(2, 3)}, {"step": 1, "more": 1}, "entry more is unknown"),
        ({}, {"step": 1}, "tensor a is missing"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, {"step": 1}, "tensor b is unknown"),
        ({"a": torch.zeros(2, 4)}, {"step": 1}, r"tensor a is torch.float32 \(2, 4\), not torch.float32 \(any, 3\)"),
        ({"a": torch.zeros(2)}, {"step": 1}, r"tensor a is .*\(2,\)"),
        ({"a": torch.zeros(2, 3).double()}, {"step": 1}, r"tensor a is torch.float64"),
    ],
)
def test_what_a_file_should_hold_is_required(tmp_path, tensors, metadata, reason):
    path, expected = tmp_path / "state", ({"a": (torch.float32, (None, 3))}, {"step": int})
    save(path, "training", {"a": torch.zeros(2, 3)}, {"step": 1})
    assert require(path, load(path, "training"), *expected)[1] == {"step": 1}
    save(path, "training", tensors, metadata)
    with pytest.raises(CheckpointError, match=rf"state is damaged or of another version \({reason}.*\); delete it"):
        require(path, load(path, "training"), *expected)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe; name a file"):
        load(tmp_path / "pipe", "model")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", "model")


def test_another_kind_is_refused(file):
    with pytest.raises(CheckpointError, match="is not a training file"):
        load(file, "training")


def test_same_content_gives_same_bytes(file, tmp_path):
    again = tmp_path / "again"
    backwards = dict(reversed(METADATA.items()))
    columns = dict(TENSORS) | {"float": TENSORS["float"].T.contiguous().T}
    for _ in range(20):  # safetensors orders what it keeps in a hash map anew each time
        save(again, "model", dict(reversed(columns.items())), backwards)
        assert again.read_bytes() == file.read_bytes()


def test_the_checksum_is_that_of_the_file_without_it(file):
    content = file.read_bytes()
    start = content.index(b'sha256\\": \\"') + len(b'sha256\\": \\"')
    digest = content[start : start + 64]
    unsealed = content[:start] + b"0" * 64 + content[start + 64 :]
    assert hashlib.sha256(unsealed).hexdigest().encode() == digest


def failing(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(files.os, call, failing)
    with pytest.raises(WriteError, match=r"file: cannot be written \(No space left on device\); free some space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_whole_before_it_takes_its_name(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    events = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor):
        events.append("flushed")
        fsync(descriptor)

    def watched_replace(source, target):
        events.append("renamed")
        with open(source, "rb") as file:
            assert file.read() == b"new"
        assert path.read_bytes() == b"old"
        assert os.path.dirname(source) == os.path.dirname(target) == str(tmp_path)  # a rename within one disk
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", watched_fsync)
    monkeypatch.setattr(files.os, "replace", watched_replace)
    write_atomically(path, b"new")
    assert events[:2] == ["flushed", "renamed"]
    assert path.read_bytes() == b"new"


def test_folders_are_made(tmp_path):
    write_atomically(tmp_path / "a" / "b" / "file", b"x")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"x"


def test_removing_takes_what_killed_writes_left(tmp_path):
    path = tmp_path / "state.safetensors"
    write_atomically(path, b"x")
    left = tmp_path / ".state.safetensors.abcd1234"
    others = [tmp_path / name for name in (".other.safetensors.abcd1234", "state.safetensors.bak", "other")]
    for other in [left, *others]:
        other.write_bytes(b"x")
    files.remove(path)
    assert sorted(tmp_path.iterdir()) == sorted(others)
    files.remove(path)  # nothing there is no error


def test_a_killed_write_leaves_a_name_that_removing_knows(tmp_path, monkeypatch):
    """The temporary name as a process that vanishes leaves it: no clean-up runs."""
    path = tmp_path / "state.safetensors"
    monkeypatch.setattr(files.os, "replace", failing)
    monkeypatch.setattr(files.Path, "unlink", lambda *_, **__: None)
    with pytest.raises(WriteError, match="No space left"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
    files.remove(path)
    assert list(tmp_path.iterdir()) == []


def test_hash_of_tensors_sees_content_alone():
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    base = hash_tensors({"a": image, "b": torch.zeros(2)})
    assert hash_tensors({"b": torch.zeros(2), "a": image.to(memory_format=torch.channels_last)}) == base
    changed = image.clone()
    changed[0, 1, 2, 3] += 1
    others = [
        {"a": changed, "b": torch.zeros(2)},
        {"a": image, "c": torch.zeros(2)},
        {"a": image},
        {"a": image.reshape(1, 2, 4, 3), "b": torch.zeros(2)},
        {"a": image, "b": torch.zeros(2, dtype=torch.int32)},
        {"a": image, "b": -torch.zeros(2)},
    ]
    hashes = [hash_tensors(other) for other in others]
    assert len({base, *hashes}) == len(others) + 1


def test_tensors_that_numpy_does_not_know_have_hashes():
    values = torch.tensor([1.0, -0.5], dtype=torch.bfloat16)
    digest = hashlib.sha256(b"w torch.bfloat16 (2,) " + bytes([0x80, 0x3F, 0x00, 0xBF])).hexdigest()
    assert hash_tensors({"w": values}) == digest
    assert hash_tensors({"w": torch.tensor(1.5)}) == hashlib.sha256(b"w torch.float32 () \0\0\xc0\x3f").hexdigest()
