"""A file is the old one or the new one, whatever goes wrong in between."""

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compsrt.files import atomic_write, sha256

OLD = b"the old content"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(OLD)
    return path


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def assert_untouched(path: Path) -> None:
    assert path.read_bytes() == OLD
    assert os.listdir(path.parent) == [path.name], "a temporary file was left"


def test_bytes_replace_the_old_file(path):
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == [path.name]


def test_a_callback_writes_a_new_file(tmp_path):
    path = tmp_path / "state.pt"
    atomic_write(path, lambda file: torch.save({"step": 7}, file))
    assert torch.load(path, weights_only=True) == {"step": 7}


def test_a_path_may_be_text(tmp_path):
    atomic_write(str(tmp_path / "a"), b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_the_longest_possible_name_works(tmp_path):
    path = tmp_path / ("n" * 255)
    atomic_write(path, b"x")
    assert path.read_bytes() == b"x"


def test_a_full_disk_at_fsync_keeps_the_old_file(path, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="old file kept") as caught:
        atomic_write(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert_untouched(path)


def test_a_full_disk_in_the_middle_keeps_the_old_file(path):
    def write(file):
        file.write(b"half of ")
        no_space()

    with pytest.raises(OSError, match=r"No space left on device \(old file kept\)") as caught:
        atomic_write(path, write)
    assert caught.value.filename == str(path)
    assert_untouched(path)


def test_a_full_disk_under_torch_save_is_still_an_oserror(path):
    class FullDisk:
        def write(self, data):
            no_space()

    with pytest.raises(OSError, match="old file kept") as caught:
        atomic_write(path, lambda file: torch.save(torch.zeros(10_000), FullDisk()))
    assert caught.value.errno == errno.ENOSPC
    assert_untouched(path)


def test_a_rename_that_fails_names_only_the_destination(path, monkeypatch):
    def replace(source, destination):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), source, None, destination)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError) as caught:
        atomic_write(path, b"new")
    assert str(caught.value) == f"[Errno 13] Permission denied (old file kept): '{path}'"
    assert_untouched(path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, RuntimeError])
def test_other_errors_keep_the_old_file_and_pass_through(path, error):
    def write(file):
        file.write(b"half of ")
        raise error

    with pytest.raises(error):
        atomic_write(path, write)
    assert_untouched(path)


def test_an_error_about_another_file_stays_about_that_file(path, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        atomic_write(path, lambda file: file.write((tmp_path / "missing").read_bytes()))
    assert caught.value.filename == str(tmp_path / "missing")
    assert_untouched(path)


def test_a_missing_folder_is_named_by_the_path_asked_for(tmp_path):
    path = tmp_path / "no" / "such" / "file"
    with pytest.raises(FileNotFoundError) as caught:
        atomic_write(path, b"new")
    assert caught.value.filename == str(path)
    assert "kept" not in str(caught.value)


def test_a_folder_is_no_destination(tmp_path):
    with pytest.raises(IsADirectoryError):
        atomic_write(tmp_path, b"new")
    assert tmp_path.is_dir()


def test_the_mode_of_the_old_file_is_kept_and_a_new_one_obeys_the_umask(path, tmp_path):
    path.chmod(0o640)
    atomic_write(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "fresh", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640


def test_a_symbolic_link_stays_one(path, tmp_path):
    link = tmp_path / "best"
    link.symlink_to(path.name)
    atomic_write(link, b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"


def test_a_device_is_written_not_replaced():
    atomic_write(os.devnull, b"new")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_device_that_is_full_says_so():
    with pytest.raises(OSError) as caught:
        atomic_write("/dev/full", b"new")
    assert caught.value.errno == errno.ENOSPC


@given(content=st.binary(max_size=3000))
def test_sha256_is_that_of_the_content(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("sha") / "file"
    atomic_write(path, content)
    assert sha256(path) == hashlib.sha256(content).hexdigest()


def test_sha256_reads_more_than_one_piece(tmp_path):
    content = bytes(range(256)) * 8193  # 2 MiB and 256 bytes
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
