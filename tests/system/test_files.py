"""Files that are whole or not there, on the file systems that there are."""

import errno
import hashlib
import os
import stat

import pytest
import torch
from safetensors import safe_open

from dinoforge.errors import RunError
from dinoforge.system import files

METADATA = {name: name * 3 for name in "zyxabcdef"} | {"é": '"quoted" \n\x1b naïve 名'}


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_permissions_are_those_of_any_new_file(tmp_path, umask):
    tensors = {"a": torch.ones(3)}
    files.write_atomically(tmp_path / "a.safetensors", lambda aside: files.save_tensors(tensors, aside, METADATA))
    files.write_text(tmp_path / "b.txt", "b")
    with files.written_aside(tmp_path / "folder") as aside:
        aside.mkdir()
        files.save_tensors(tensors, aside / "c.safetensors", METADATA)
        (aside / "d.json").touch()
    for name in ("a.safetensors", "b.txt", "folder/c.safetensors", "folder/d.json"):
        assert mode(tmp_path / name) == 0o666 & ~umask, name


def test_a_disk_without_permissions_takes_files(tmp_path, monkeypatch):
    def refuse(path, mode, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    files.write_atomically(tmp_path / "a", lambda aside: files.save_tensors({"a": torch.ones(3)}, aside, METADATA))
    assert (tmp_path / "a").exists()


def test_the_same_contents_make_the_same_bytes(tmp_path):
    tensors = {"b": torch.arange(5.0), "a": torch.ones(2, 3)}
    digests = set()
    for number in range(8):  # the library's order is random
        path = tmp_path / str(number)
        files.save_tensors(tensors, path, METADATA)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == METADATA
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES])
def test_a_file_system_that_does_not_sync_folders_takes_files(tmp_path, monkeypatch, number):
    sync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_text(tmp_path / "a", "whole")
    assert (tmp_path / "a").read_text() == "whole"


def test_a_disk_that_fails_is_no_such_file_system(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match="Input/output error"):
        files.write_text(tmp_path / "a", "whole")
    assert not (tmp_path / "a").exists()


def test_a_file_is_synced_by_a_handle_that_may_write(tmp_path, monkeypatch):
    """Windows refuses others."""
    import fcntl

    def as_windows(descriptor):
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY

    monkeypatch.setattr(os, "fsync", as_windows)
    files.write_text(tmp_path / "a", "whole")


@pytest.mark.parametrize(
    ("name", "stranger"),
    [
        (".DS_Store", True),
        ("._teacher.safetensors", True),
        ("Desktop.ini", True),
        ("Thumbs.db", True),
        (".nfs0000000000c2", True),
        ("lost+found", True),
        ("@Recycle", True),
        ("__MACOSX", True),
        (".gitkeep", True),
        ("teacher.safetensors", False),
        ("step_00000100", False),
        (".hidden", False),
    ],
)
def test_strangers(name, stranger):
    assert files.is_stranger(name) == stranger
