"""Files on disk: what one process writes, another neither breaks nor removes; what cannot be done is told."""

import errno
import fcntl
import multiprocessing
import os
import stat

import pytest

from common.errors import WriteError
from common.runtime import files
from common.runtime.files import locked, remove, write_atomically


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_sets_who_may_read(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"x")
        assert os.umask(umask) == umask  # as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_the_folder_is_flushed_after_the_rename(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def watched_replace(*names):
        events.append("rename")
        replace(*names)

    monkeypatch.setattr(files.os, "fsync", watched_fsync)
    monkeypatch.setattr(files.os, "replace", watched_replace)
    write_atomically(tmp_path / "file", b"x")
    assert events == ["file", "rename", "folder"]


def test_what_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        ("folder", "Is a directory); name a file"),
        ("pipe", "Not a regular file); name a file"),
        ("file/below", "File exists); a part of its path is a file; name another folder"),
        ("file/below/it", "Not a directory); a part of its path is a file; name another folder"),
        ("x" * 300, "File name too long); give a shorter name"),
    ):
        with pytest.raises(WriteError) as refusal:
            write_atomically(tmp_path / name, b"new")
        assert str(refusal.value) == f"{tmp_path / name}: cannot be written ({reason}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_what_cannot_be_removed_is_told_in_one_line(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.Path, "unlink", denied)
    with pytest.raises(WriteError, match=r"file: cannot be removed \(Permission denied\)"):
        remove(tmp_path / "file")


def test_removing_spares_what_another_writes(tmp_path, monkeypatch):
    """Whoever removes the file while another is in the middle of writing it does not break that write."""
    path, fsync = tmp_path / "file", os.fsync

    def removing_fsync(descriptor):
        remove(path)
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", removing_fsync)
    monkeypatch.setattr(files, "_flush_folder", lambda _: None)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_writing_clears_what_a_killed_write_left_and_spares_what_another_writes(tmp_path):
    path = tmp_path / "rows"
    (tmp_path / ".rows.abcdefgh").write_bytes(b"half")
    (tmp_path / ".rows.lock").touch()
    with (tmp_path / ".rows.ijklmnop").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        write_atomically(path, b"whole")
        assert {p.name for p in tmp_path.iterdir()} == {"rows", ".rows.lock", ".rows.ijklmnop"}


def test_removing_takes_names_as_they_are_written(tmp_path):
    """Brackets in a name are no pattern: only what belongs to this file goes."""
    left = {name: tmp_path / f".{name}.abcd1234" for name in ("[ab]", "a")}
    for path in left.values():
        path.write_bytes(b"x")
    remove(tmp_path / "[ab]")
    assert list(tmp_path.iterdir()) == [left["a"]]


def test_a_write_that_remove_overtakes_begins_anew(tmp_path, monkeypatch):
    """`remove` comes between the making of the temporary and its lock."""
    path, flock, calls = tmp_path / "file", fcntl.flock, []

    def late_flock(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:
            remove(path)
        flock(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", late_flock)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_without_locks_can_be_written(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    remove(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WriteError, match=r"file: cannot be written \(No locks available\)"), locked(tmp_path / "file"):
        pass


def _append(path, start, lines):
    start.wait()
    for _ in range(lines):
        with locked(path):
            write_atomically(path, (path.read_bytes() if path.exists() else b"") + b"line\n")


def test_a_lock_holds_between_processes(tmp_path):
    """Reading, adding a line and writing, by four at once: no line is lost, and the lock leaves nothing."""
    context = multiprocessing.get_context("fork")
    path, start = tmp_path / "folder" / "rows", context.Event()
    processes = [context.Process(target=_append, args=(path, start, 20)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert path.read_bytes() == b"line\n" * 80
    assert list(path.parent.iterdir()) == [path]
