"""Files of this machine, and of object storage through fsspec (s3://, obs://, hdfs:// and others), in one way.

A path with a scheme is remote; file:// is this machine. Credentials are the library's business (environment variables, files
in the home folder): none are taken from a path. obs:// is spoken as S3, whose endpoint AWS_ENDPOINT_URL names.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import shutil
import stat
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import inference
from inference import BadImage, UsageError, first_line

MAX_FILE_BYTES = 1 << 30
DELAYS = (0.5, 2.0, None)  # between tries, in s, beside those of a library
BLOCK_BYTES = 4 << 20  # that are read ahead of a remote file
ATOMIC = {"s3", "obs", "gs", "gcs", "oss", "az", "abfs"}  # there an upload appears whole, elsewhere by a move


class Unreadable(Exception):
    """The disk, the network or missing rights did not give a file that may well be good."""


class Entry(NamedTuple):
    """A file as it is now: its size in bytes, and when it was changed, in ns."""

    path: str
    size: int
    mtime: int


def is_remote(path: str) -> bool:
    return "://" in path


def as_named(argument: str) -> str:
    """A path as it is used from here on. Raises UsageError for one that carries credentials."""
    if re.match(r"(s3|obs|hdfs):(/[^/]|/*$)", argument):  # it would be a folder of this machine, called s3:
        raise UsageError(f"{argument}: no address of object storage: they begin as s3://bucket/ does")
    shown, (path, _, query) = without_credentials(argument), argument.partition("?")
    secret = re.search(r"://[^/\s@]*:[^/\s@]*@", path) or without_credentials(query) != query
    if is_remote(argument) and secret:
        told = "credentials in a path would be written down; use the library's own way (such as AWS_PROFILE)"
        raise UsageError(f"{shown}: {told}")
    return argument.removeprefix("file://")


def without_credentials(text: str) -> str:
    """A text, such as what a library says, with no name and password in the addresses that it holds, and no signature."""
    text = re.sub(r"(?<=://)[^/\s@]*@(?=[^/\s])", "***@", text)
    return re.sub(r"((?:signature|sig|credential|token|password|secret)[\w-]*=)[^&\s\"']+", r"\1***", text, flags=re.IGNORECASE)


def remote(path: str) -> tuple[Any, str]:
    """The file system of a remote path and what the path is called there. Raises UsageError where a package is missing."""
    import fsspec

    scheme, _, rest = path.partition("://")
    try:
        return fsspec.core.url_to_fs(f"s3://{rest}" if scheme == "obs" else path, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        hint = (
            "pip install -r requirements-cluster.txt"
            if scheme in ("s3", "obs")
            else f"pip install what fsspec wants for {scheme}"
        )
        raise UsageError(f"{path}: {scheme}:// cannot be used ({first_line(error)}). Run: {hint}") from error


def _named(path: str, root: str, name: str) -> str:
    """What a file is called to the user that its system calls `name`, where the user's `path` is called `root` there."""
    path, root = path.rstrip("/"), root.rstrip("/")
    before = path.removesuffix(root) if root and path.endswith(root) else f"{path.partition('://')[0]}://"
    return before + name


def _entry(path: str, info: dict[str, Any]) -> Entry:
    changed = next((info[name] for name in ("LastModified", "mtime", "last_modified", "updated") if info.get(name)), 0)
    seconds = changed.timestamp() if isinstance(changed, datetime) else float(changed)
    return Entry(path, info["size"] or 0, round(seconds * 1e9))


# --- what is there ---


def find(path: str, left_out: Counter[str]) -> Iterator[Entry]:
    """All files below a remote folder, in a fixed order, one folder at a time; as sources.walk_files on this machine.

    Raises OSError where one cannot be listed: the library's own walk would leave it out without a word.
    """
    system, root = remote(path)
    folders = [root.rstrip("/")]
    while folders:
        folder, files, below = folders.pop(), [], []
        for info in system.ls(folder, detail=True):
            name, is_directory = info["name"].rstrip("/"), info["type"] == "directory"
            if name.strip("/") == folder.strip("/"):
                left_out.update({"folders without a name left out": 1} if is_directory else {})  # else it is its own marker
            elif not is_directory:
                files.append(_entry(_named(path, root, name), info))
            elif inference.SYSTEM_FOLDERS.fullmatch(name.rpartition("/")[2]):
                left_out["system folders left out"] += 1
            else:
                below.append(name)
        yield from sorted(files)
        folders += sorted(below, reverse=True)


def matches(pattern: str) -> list[str]:
    """Remote files and folders that a pattern without ** names, as glob.glob() takes it.

    Raises OSError where a folder cannot be listed: the library's own glob would leave out what is in it without a word.
    """
    system, root = remote(pattern)
    first, *parts = root.rstrip("/").split("/")
    found = [first]
    for part in parts:
        if not glob.has_magic(part):
            found = [f"{path}/{part}" for path in found]
            continue
        names = [info["name"].rstrip("/") for path in found for info in _listed(system, path)]
        fitting = [name for name in names if fnmatch.fnmatchcase(name.rpartition("/")[2], part)]
        found = [name for name in fitting if part.startswith(".") or not name.rpartition("/")[2].startswith(".")]
    shown = [_named(pattern, root, name) for name in sorted(set(found))]
    return [path for path in shown if is_folder(path) or is_file(path)]


def _listed(system: Any, folder: str) -> list[dict[str, Any]]:
    """What is in a folder; nothing where it is a file or not there."""
    with suppress(FileNotFoundError):
        return [info for info in system.ls(folder, detail=True) if info["name"].strip("/") != folder.strip("/")]
    return []


def is_folder(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    system, root = remote(path)
    return system.isdir(root)


def is_file(path: str) -> bool:
    """Whether it is a file that can be read by place: no folder, no pipe. Raises OSError where storage does not answer."""
    if not is_remote(path):
        return os.path.isfile(path)
    system, root = remote(path)
    with translated(path), suppress(FileNotFoundError):  # the library's own isfile() says no whatever happens
        return system.info(root)["type"] == "file"
    return False


def entry_of(path: str) -> Entry:
    """A file as it is now. Raises OSError."""
    if is_remote(path):
        system, root = remote(path)
        with translated(path):
            return _entry(path, system.info(root))
    status = os.stat(path)
    return Entry(path, status.st_size, status.st_mtime_ns)


@contextmanager
def translated(path: str) -> Iterator[None]:
    """Whatever a remote library raises becomes an OSError: each has classes of its own."""
    try:
        yield
    except (OSError, UsageError, BadImage, tarfile.TarError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
        raise
    except Exception as error:
        told = without_credentials(f"{type(error).__name__}: {first_line(error)}")
        raise OSError(errno.EIO, told, path) from error


# --- reading ---


def read(path: str, offset: int = 0, size: int = -1) -> bytes:
    """The bytes of a file, or of a stretch of it. Raises BadImage where the path itself is at fault, else Unreadable.

    A disk or network error is tried again twice; what is not there, or may not be read, is not.
    """
    for delay in DELAYS:
        try:
            return _read_remote(path, offset, size) if is_remote(path) else _read_local(path, offset, size)
        except ValueError as error:  # a null byte in the path
            raise BadImage(str(error)) from error
        except OSError as error:
            missing = isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
            if missing or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                raise BadImage(error.strerror or "No such file or directory") from error
            if delay is None or isinstance(error, PermissionError):
                raise Unreadable(f"{path}: {error.strerror or first_line(error)}") from error
            time.sleep(delay)
    raise AssertionError("unreachable")


def _read_local(path: str, offset: int, size: int) -> bytes:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("a folder, not an image" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    size = status.st_size if size < 0 else size
    _require_small(size)
    with open(path, "rb") as file:
        file.seek(offset)
        return _whole(file.read(size), size)


def _read_remote(path: str, offset: int, size: int) -> bytes:
    system, root = remote(path)
    with translated(path):
        if offset == 0:  # no member of a tar: all of it, even if it has another size than when it was listed
            _require_small(size if size >= 0 else system.size(root) or 0)
            return system.cat_file(root)
        return _whole(system.cat_file(root, start=offset, end=offset + size), size) if size else b""


def _require_small(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise BadImage(f"{size:,} bytes, over the limit of {MAX_FILE_BYTES:,}")


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise OSError(errno.EIO, "the file is shorter than it was")
    return data


@contextmanager
def opened(path: str) -> Iterator[Any]:
    """A file to read by place. Raises OSError."""
    if not is_remote(path):
        with open(path, "rb") as file:
            yield file
        return
    system, root = remote(path)
    with translated(path), system.open(root, "rb", block_size=BLOCK_BYTES) as file:
        yield file


# --- the output folder ---


def names_in(folder: str) -> list[str]:
    """Names of the files in a folder, in no order; none where it is not there. Raises UsageError where nobody answers."""
    try:
        if not is_remote(folder):
            return os.listdir(folder) if os.path.isdir(folder) else []
        system, root = remote(folder)
        with translated(folder), suppress(FileNotFoundError):
            return [path.rpartition("/")[2] for path in system.ls(root, detail=False)]
    except OSError as error:
        raise UsageError(f"{folder}: cannot be listed ({error.strerror or first_line(error)})") from error
    return []


@contextmanager
def replacing(path: str) -> Iterator[Any]:
    """A binary file to write that takes the place of `path` at the end, whole or not at all. Raises UsageError."""
    if not is_remote(path):
        with inference.replacing(Path(path)) as file:
            yield file
        return
    system, root = remote(path)
    try:
        with tempfile.TemporaryDirectory() as folder:  # not system.open(): a block that raises would leave what it wrote
            local = f"{folder}/whole"
            with open(local, "wb") as file:
                yield file
            for delay in DELAYS:
                try:
                    _upload(system, local, path, root)
                    return
                except OSError as error:
                    if delay is None or isinstance(error, (PermissionError, FileNotFoundError)):
                        raise
                    time.sleep(delay)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or first_line(error)})") from error


def _upload(system: Any, local: str, path: str, root: str) -> None:
    with translated(path):
        if path.partition("://")[0] in ATOMIC:
            system.put_file(local, root)
        else:
            system.put_file(local, f"{root}.tmp")
            system.mv(f"{root}.tmp", root)


def read_whole(path: str) -> bytes:
    """A small file of the output, as it was at one moment. Raises OSError."""
    if not is_remote(path):
        return Path(path).read_bytes()
    system, root = remote(path)
    with translated(path):
        return system.cat_file(root)


def remove(path: str) -> None:
    """Delete a file, if it is there."""
    if is_remote(path):
        system, root = remote(path)
        with translated(path), suppress(FileNotFoundError):
            system.rm_file(root)
    else:
        Path(path).unlink(missing_ok=True)


def move(path: str, new: str) -> None:
    if is_remote(path):
        system, root = remote(path)
        with translated(path):
            system.mv(root, remote(new)[1])
    else:
        os.replace(path, new)


def free_bytes(folder: str) -> int | None:
    """None where there is no end to it."""
    return None if is_remote(folder) else shutil.disk_usage(folder).free
