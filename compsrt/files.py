"""Files that are either the old one or the new one, and checksums.

A checkpoint that took hours must not be lost because the disk filled up while its successor was
being written. So a file is written beside its destination under another name, forced to the disk,
and renamed over the destination, which a POSIX file system does in one step. Imports nothing of the
package.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".compsrt-*.tmp"  # what is being written, or was when its process was killed


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object] | bytes) -> None:
    """Write a file so that at every moment ``path`` holds the whole old or the whole new content.

    Args:
        path: the destination; its folder must exist. A symbolic link is followed, and the mode of
            an existing file is kept. What is neither file nor folder (``/dev/stdout``, a pipe) is
            written directly, since it cannot be replaced.
        write: the content, or a function that writes it to a binary file object.

    Raises:
        OSError: the write failed (no such folder, no permission, disk full, ...). ``filename`` is
            ``path``, ``strerror`` says whether an old file was kept; no temporary file is left.
            Whatever else ``write`` raises passes through, with the same promise.
    """
    try:
        old = os.stat(path)
    except FileNotFoundError:
        old = None
    if old is not None and stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if old is not None and not stat.S_ISREG(old.st_mode):
        with open(path, "wb") as file:
            _write_to(file, write)
        return

    destination = Path(os.path.realpath(path))
    # No part of the name is the destination's: that one may already be as long as names can be.
    temporary = destination.parent / TEMPORARY.replace("*", secrets.token_hex(8))
    try:
        # "x" and the default mode: the umask applies, as it would to a plain open().
        with open(temporary, "xb") as file:
            _write_to(file, write)
            file.flush()
            os.fsync(file.fileno())
        if old is not None:
            os.chmod(temporary, stat.S_IMODE(old.st_mode))
        os.replace(temporary, destination)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            _name_destination(error, path, temporary, kept=old is not None)
        raise
    _sync_folder(destination.parent)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content as 64 hexadecimal digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _write_to(file: BinaryIO, write: Callable[[BinaryIO], object] | bytes) -> None:
    if isinstance(write, bytes):
        file.write(write)
        return
    try:
        write(file)
    except RuntimeError as error:
        # torch.save on a full disk: its zip writer reports that it could not finish, and the
        # operating system's reason is only the context of that.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _name_destination(error: OSError, path: str | Path, temporary: Path, *, kept: bool) -> None:
    """Let the error speak of the file the caller asked for, not of the temporary one."""
    if error.strerror is None:  # a message of the callback's own, not the operating system's
        return
    if error.filename is not None and str(error.filename) != str(temporary):
        return  # about a file that the callback tried to read, say
    error.filename = str(path)
    if error.filename2 is not None:
        del error.filename2
    if kept:
        error.strerror = f"{error.strerror} (old file kept)"


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable. The new file is in place and complete by now, so a file
    system that cannot sync a folder is no failure."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
