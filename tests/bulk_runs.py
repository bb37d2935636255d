"""What the tests of bulk runs share: tars and photos to give, disks that fail, and what is in the parts."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from bulk import storage
from conftest import SAMPLES

PHOTO = (SAMPLES / "chelsea.jpg").read_bytes()


def make_tar(path: Path, members: dict[str, bytes] | Iterable[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def broken_copy(photos: Path, folder: Path, *names: str) -> Path:
    """A copy of a folder of photos, in which those of these names are cut."""
    shutil.copytree(photos, folder)
    for name in names:
        data = (photos / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    return folder


def failing(monkeypatch, fails: Callable[[str], bool]) -> None:
    """Make the disk fail for the files whose name `fails` is true of."""
    real = storage.read

    def read(path: str, *span: int) -> bytes:
        if fails(path):
            raise storage.Unreadable(f"{path}: Input/output error")
        return real(path, *span)

    monkeypatch.setattr(storage, "read", read)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.npz"))}


def rows(folder: Path) -> dict[str, np.ndarray]:
    """Class tokens by path; no path twice."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("part-*.npz")):
        part = np.load(path)
        assert len(part["index"]) == len(part["path"]) == len(part["class_token"])
        assert not found.keys() & set(part["path"].tolist())
        found |= dict(zip(part["path"].tolist(), part["class_token"]))
    return found


def column(folder: Path, name: str) -> list:
    """One column of all parts, in the order of their names."""
    return [value for path in sorted(folder.glob("part-*.npz")) for value in np.load(path)[name].tolist()]


def failures(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
