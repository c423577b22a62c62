"""Files of any content: written whole or not at all, removed, and locked against other processes."""

import contextlib
import errno
import fcntl
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.errors import WriteError

_TEMPORARY_END = "?" * 8  # the random letters that tempfile adds
_REMEDIES = {
    errno.ENOSPC: "free some space or name another folder",
    errno.EDQUOT: "free some space or name another folder",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "a part of its path is a file; name another folder",
    errno.EEXIST: "a part of its path is a file; name another folder",
    errno.ENAMETOOLONG: "give a shorter name",
}


def write_atomically(path: str | Path, content: bytes) -> None:
    """The file is either as it was or complete: written under a temporary name, flushed to disk, renamed.

    Deletes what earlier writes of it that were killed have left. Makes the folders that are missing; the umask sets
    who may read the file. Raises WriteError, which names the path, the reason and the remedy.
    """
    path = Path(path)
    with _said_in_one_line(path):
        if path.exists() and not path.is_file():  # renaming would replace a device or a pipe
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR) if path.is_dir() else "Not a regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = _temporary(path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(temporary, 0o666 & ~_umask())
                os.replace(temporary, path)  # while the lock is held, so that nobody takes it for left behind
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _remove_left_behind(path)
        _flush_folder(path.parent)


def remove(path: Path) -> None:
    """Deletes the file, and what writes of it that were killed have left behind; not what others are writing now.

    Raises WriteError.
    """
    with _said_in_one_line(path, "removed"):
        path.unlink(missing_ok=True)
        _remove_left_behind(path)


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Waits until no other process or thread is in here with the same `path`. Raises WriteError.

    The lock, a file beside `path`, goes with the process that holds it. It is not reentrant.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    with _said_in_one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except BaseException:
                os.close(descriptor)
                raise
            if os.fstat(descriptor).st_nlink:
                break
            os.close(descriptor)  # whoever held it has removed it: lock the new one
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _temporary(path: Path) -> tuple[int, str]:
    """Descriptor and name of a new file beside `path`, locked as long as it is open."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with contextlib.suppress(OSError):  # some network disks have no locks; there `remove` lets everything be
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        os.close(descriptor)  # `remove` came between


def _remove_left_behind(path: Path) -> None:
    """Deletes what writes of `path` that were killed have left: temporary files that nobody holds locked."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.{_TEMPORARY_END}"):
        with contextlib.suppress(OSError), temporary.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink()


def _flush_folder(folder: Path) -> None:
    """So that the new name outlives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _said_in_one_line(path: Path, done: str = "written") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno, "name another folder")
        raise WriteError(f"{path}: cannot be {done} ({error.strerror or error}); {remedy}") from None
