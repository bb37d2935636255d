"""Reading files of this machine: what is wrong with the path itself, what may be read later, and what is tried again."""

from __future__ import annotations

import errno
import os

import inference
import pytest
from inference import BadImage, UsageError

from bulk import storage
from bulk.storage import Unreadable, read


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The waits between tries, which take no time here."""
    asked: list[float] = []
    monkeypatch.setattr(inference.time, "sleep", asked.append)
    return asked


@pytest.mark.parametrize("name", ["gone.jpg", "gone/too.jpg", "file/below.jpg", "circle", "x" * 300, "null\0byte"])
def test_a_path_that_is_wrong_is_the_images_own_fault_and_costs_no_wait(tmp_path, waits, name):
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(BadImage):
        read(str(tmp_path / name))
    assert not waits


@pytest.mark.parametrize(
    ("number", "tries"), [(errno.EACCES, 1), (errno.EPERM, 1), (errno.EIO, 3), (errno.ESTALE, 3), (errno.ETIMEDOUT, 3)]
)
def test_what_cannot_be_read_now_is_not_called_a_bad_image(tmp_path, monkeypatch, waits, number, tries):
    path = tmp_path / "good.jpg"
    path.write_bytes(b"x")
    opened = []

    def refuse(*arguments):
        opened.append(arguments)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(Unreadable, match=f"good.jpg: {os.strerror(number)}"):
        read(str(path))
    assert (len(opened), len(waits)) == (tries, tries - 1)


def test_a_file_that_is_read_at_the_second_try_is_read(tmp_path, monkeypatch, waits):
    path = tmp_path / "good.jpg"
    path.write_bytes(b"x")
    stat, errors = os.stat, [OSError(errno.EIO, "flaky")]

    def flaky(*given, **options):
        if errors:
            raise errors.pop()
        return stat(*given, **options)

    monkeypatch.setattr(os, "stat", flaky)
    assert read(str(path)) == b"x"
    assert waits == [0.5]


def test_a_stretch_of_a_file_is_read_whole_or_not_at_all(tmp_path, waits):
    path = tmp_path / "shard"
    path.write_bytes(b"0123456789")
    assert read(str(path), 2, 3) == b"234"
    assert read(str(path)) == b"0123456789"
    with pytest.raises(Unreadable, match="shorter than it was"):
        read(str(path), 8, 3)


def test_a_file_over_the_limit_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "large.jpg"
    with path.open("wb") as file:
        file.truncate(storage.MAX_FILE_BYTES + 1)
    with pytest.raises(BadImage, match="1,073,741,825 bytes, over the limit of 1,073,741,824"):
        read(str(path))


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/design=blue/",
        "s3://bucket/tokenizer=x/a.jpg",
        "abfs://container@account.dfs.core.windows.net/x",
        "hdfs://me@host/x",
    ],
)
def test_an_address_without_a_secret_is_taken(address):
    assert storage.as_named(address) == address


@pytest.mark.parametrize("address", ["s3://key:secret@bucket/x", "s3://bucket/a.jpg?X-Amz-Signature=0123"])
def test_an_address_with_a_secret_is_refused_and_not_shown(address):
    with pytest.raises(UsageError, match="credentials in a path") as refused:
        storage.as_named(address)
    assert "secret@" not in str(refused.value) and "0123" not in str(refused.value)
