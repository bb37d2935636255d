"""Which images there are: files, folders, globs, lists and tars, and the captions that stand beside images in a tar.

In: what --image_path names. Out: Sources, which holds any number of files in little memory, and tars by their names alone: a
tar is indexed (index_tar) by whoever reads it. Whatever a row's `path` says can be given back in a list.
"""

from __future__ import annotations

import glob
import hashlib
import marshal
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePath
from typing import Any, NamedTuple

import inference
from inference import UsageError, is_image_name, log

from bulk import storage

Span = tuple[int, int]  # offset and size within a file
NOWHERE = (0, 0)
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class ImageKey(NamedTuple):
    """One image: its name, where its bytes are, and where texts are that stand beside it in a tar."""

    name: str
    tar_length: int = 0  # how much of the name is the path of a tar
    offset: int = 0
    size: int = -1
    json: Span = NOWHERE
    txt: Span = NOWHERE
    mtime: int = 0  # in ns, as it was listed; 0: ask

    @property
    def file(self) -> str:
        return self.name[: self.tar_length] or self.name

    @property
    def folder(self) -> str:
        """What must be there for the image to be there: its folder, or its tar."""
        return self.file if self.tar_length else os.path.dirname(self.file) or "."


class ImageList:
    """Any number of images in order, each packed into about 30 bytes more than its name within its folder.

    The first of a folder has its whole name, those that follow have the place of that one.
    """

    def __init__(self, keys: Iterable[ImageKey] = ()) -> None:
        self._data, self._ends = bytearray(), array("Q")
        self._folder, self._first = None, 0  # of the last image, and the place of the first one there
        for key in keys:
            self.append(*key)

    def append(self, name: str, *in_tar: Any) -> None:
        """Add an image; `in_tar` are the fields of ImageKey behind the name."""
        if len(in_tar) == 6 and not in_tar[0]:
            in_tar = in_tar[2::3]  # of a file only size and mtime
        folder, slash, base = name.rpartition("/")
        if slash and folder == self._folder:
            self._data += marshal.dumps((self._first, base, *in_tar), 2)
        else:
            self._folder, self._first = folder, len(self._ends)
            self._data += marshal.dumps((name, *in_tar), 2)
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: int) -> ImageKey:
        name, *in_tar = self._fields(place)
        if isinstance(name, int):
            name = f"{self._fields(name)[0].rpartition('/')[0]}/{in_tar.pop(0)}"
        if len(in_tar) == 2:
            return ImageKey(name, size=in_tar[0], mtime=in_tar[1])
        return ImageKey(name, *in_tar)

    def _fields(self, place: int) -> tuple[Any, ...]:
        end = self._ends[place]  # an IndexError ends an iteration
        return marshal.loads(self._data[self._ends[place - 1] if place else 0 : end])


@dataclass
class Sources:
    """What was named: images that are files (or that a list names in a tar), whole tars, and how much of what was left out."""

    files: ImageList = field(default_factory=ImageList)
    tars: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        tars = f" and {len(self.tars):,} tars" if self.tars else ""
        rest = "".join(f", {count:,} {what}" for what, count in self.left_out.items())
        return f"{len(self.files):,} images{tars}{rest}"

    def sha256(self) -> str:
        """Digest of all names in order."""
        digest = hashlib.sha256()
        for key in self.files:
            digest.update(os.fsencode(f"{key.name}\0"))
        for tar in self.tars:
            digest.update(os.fsencode(f"\0{tar}\0"))
        return digest.hexdigest()


# --- what was named ---


def list_sources(arguments: Sequence[str]) -> Sources:
    """All that files, folders (recursively), glob patterns, .txt lists of paths and tars name, in a fixed order.

    A file that is named by itself is taken whatever its suffix, unless it is the caption of an image that is named too; in
    folders and from globs images and tars are taken by their suffixes. Raises UsageError where an argument names nothing or
    cannot be read, or where nothing is found.
    """
    sources = Sources()
    stems = {os.path.splitext(argument)[0] for argument in arguments if is_image_name(argument)}

    def take(path: str, named: bool) -> None:
        stem, suffix = os.path.splitext(path)
        is_caption = named and suffix.lower() in (".txt", ".json") and stem in stems  # a glob that the shell has resolved
        if storage.is_folder(path):
            if storage.is_remote(path):
                for entry in storage.find(path, sources.left_out):
                    _take_file(sources, *entry)
            else:
                for file in walk_files(path, sources.left_out):
                    _take_file(sources, file)
        elif named and not is_caption:
            _take_named(sources, path)
        else:
            _take_file(sources, path)

    for argument in map(storage.as_named, arguments):
        _for_each(argument, take)
    if not sources.files and not sources.tars:
        raise UsageError(f"--image_path {' '.join(arguments)}: no images in it ({sources})")
    return sources


def walk_files(folder: str, left_out: Counter[str]) -> Iterator[str]:
    """Paths of all files below `folder` in a fixed order; a link back to where the walk has been is not followed.

    Folders that systems fill with thumbnails or with what was deleted are not entered, and counted in `left_out`.
    """

    def fail(error: OSError) -> None:
        raise error

    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        entered = sorted(name for name in folders if not inference.SYSTEM_FOLDERS.fullmatch(name))
        if len(entered) < len(folders):
            left_out["system folders left out"] += len(folders) - len(entered)
        folders[:] = entered
        yield from (os.path.join(parent, name) for name in sorted(files))


def _matches(pattern: str) -> list[str]:
    """What a pattern names; with ** by a walk, where glob.glob would list a file for each way through a circle of links."""
    is_remote = storage.is_remote(pattern)
    base, deep, rest = pattern.partition("**")
    if "**" in rest:
        raise UsageError(f"--image_path {pattern}: a pattern may have one ** at most")
    roots = sorted(storage.matches(base) if is_remote else glob.glob(base)) if base else ["."]
    if not deep or not rest.strip("/*"):
        return roots
    if is_remote:
        found = {entry.path for root in roots for entry in storage.find(root, Counter())}
    else:
        found = {os.path.normpath(path) for root in roots for path in walk_files(root, Counter())}
    return sorted(path for path in found if PurePath(path).match(rest.strip("/")))


def _for_each(argument: str, take: Callable[[str, bool], None]) -> None:
    """Call take(path, named) for all that a path or glob pattern names, in a fixed order; `named`: by itself, not by a pattern.

    Raises UsageError where it names nothing, or where it cannot be read.
    """
    is_remote = storage.is_remote(argument)
    try:
        with storage.translated(argument) if is_remote else nullcontext():
            named = storage.is_folder(argument) or storage.is_file(argument) if is_remote else os.path.exists(argument)
            found = [argument.rstrip("/") if is_remote else argument] if named else _matches(argument)
            for path in found:
                take(path, named)
    except OSError as error:
        told = (error.strerror or inference.first_line(error)) if is_remote else error
        raise UsageError(f"--image_path {argument}: cannot be read ({told})") from error
    if not found:
        raise UsageError(f"--image_path {argument}: no such file or folder")


def _take_file(sources: Sources, path: str, size: int = -1, mtime: int = 0) -> None:
    """A file that was found: taken by its suffix."""
    lower = path.lower()
    if is_image_name(path):
        sources.files.append(path, *((0, 0, size, NOWHERE, NOWHERE, mtime) if mtime else ()))
    elif lower.endswith(".tar") and (mtime or storage.is_file(path)):
        sources.tars.append(path)
    else:
        if lower.endswith(COMPRESSED_TARS):
            log.warning(f"{path}: a compressed tar is ignored: its images cannot be read by place; unpack it first")
        sources.left_out["other files ignored"] += 1


def _take_named(sources: Sources, path: str) -> None:
    """A file that was named by itself."""
    lower = path.lower()
    if lower.endswith(COMPRESSED_TARS):
        raise UsageError(f"--image_path {path}: a compressed tar, whose images cannot be read by place; unpack it first")
    if not lower.endswith((".tar", ".txt")):
        sources.files.append(path)
    elif not storage.is_file(path):  # a pipe would be waited for
        raise UsageError(f"--image_path {path}: not a regular file")
    elif lower.endswith(".tar"):
        sources.tars.append(path)
    else:
        _take_lines(sources, path)


def _take_lines(sources: Sources, path: str) -> None:
    indexes: dict[str, dict[str, ImageKey]] = {}  # each tar is read once
    is_file = lru_cache(1024)(storage.is_file)  # of a tar once, not for each member: object storage takes 10 ms
    for name in map(storage.as_named, read_lines(path)):
        tar = _tar_of(name, is_file)
        if name.lower().endswith(".tar") and storage.is_file(name):
            sources.tars.append(name)
        elif tar is None:
            sources.files.append(name)
        else:
            if tar not in indexes:
                indexes[tar] = {key.name: key for key in index_tar(tar, everything=True).images}
            if name not in indexes[tar]:
                raise UsageError(f"{path}: {tar} has no member {name[len(tar) + 1 :]}, or it is a link or sparse")
            sources.files.append(*indexes[tar][name])


def read_lines(path: str) -> Iterator[str]:
    """Lines of a list that are not empty, decoded as names of files are; UTF-16 and UTF-8 by their byte-order marks."""
    with storage.opened(path) as file:
        start = file.read(3)
        file.seek(0)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            try:
                text = file.read().decode("utf-16")
                os.fsencode(text)
            except UnicodeError as error:
                raise UsageError(f"{path}: not a list in UTF-16 of names that files can have here ({error})") from error
            lines: Iterable[str] = text.split("\n")
        else:
            file.seek(3 if start == b"\xef\xbb\xbf" else 0)
            lines = map(os.fsdecode, file)
        for line in lines:
            if line.strip():
                yield line.rstrip("\r\n")


def _tar_of(name: str, is_file: Callable[[str], bool]) -> str | None:
    """The tar of which `name` names a member: the shortest beginning that ends in .tar and is a file."""
    for found in re.finditer(r"\.tar(?=/)", name, re.IGNORECASE):
        if is_file(name[: found.end()]):
            return name[: found.end()]
    return None


# --- inside a tar ---


class TarIndex(NamedTuple):
    """The images of a tar in their order, and what is to be said of the rest."""

    images: ImageList
    notes: list[str]


def index_tar(path: str, everything: bool = False) -> TarIndex:
    """Find the images of a tar and their captions, without unpacking it; `everything`: take each member for an image.

    A caption is the text with the image's own name, else the only text of its group that no other image has by name; a group
    is what has the same name up to the first dot, as in webdataset. Where an image has its group's very name, others of the
    group (masks such as 0.seg.png) are left out. Raises UsageError where the tar cannot be read, or is damaged, which tarfile
    mostly takes for its end.
    """
    members, notes, mtime = _read_members(path)
    stems = {os.path.splitext(name)[0]: _group(name) for name in members if is_image_name(name)}
    texts: dict[tuple[str, str], list[Span]] = {}  # by group and suffix, those that are no image's own
    for name, span in members.items():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in (".txt", ".json") and stem not in stems:
            texts.setdefault((_group(name), suffix.lower()), []).append(span)
    images, masks, ambiguous, leaders = ImageList(), [], [], set()
    for name, (offset, size) in members.items():
        if not (everything or is_image_name(name)):
            continue
        stem, group = os.path.splitext(name)[0], _group(name)
        if not everything and stems.get(group) == group:
            if stem != group or group in leaders:
                masks.append(name)
                continue
            leaders.add(group)
        spans = []
        for suffix in (".json", ".txt"):
            own = members.get(stem + suffix) or members.get(stem + suffix.upper())
            others = texts.get((group, suffix), [])
            if own is None and len(others) > 1 and ambiguous[-1:] != [name]:
                ambiguous.append(name)
            spans.append(own or (others[0] if len(others) == 1 else NOWHERE))
        images.append(f"{path}/{name}", len(path), offset, size, *spans, mtime)
    if masks:
        notes.append(f"{len(masks):,} images beside one of the same key are left out ({masks[0]} ...); a list can name them")
    if ambiguous:
        notes.append(f"{len(ambiguous):,} images have several texts and get none of them as caption ({ambiguous[0]} ...)")
    return TarIndex(images, notes)


def _group(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _read_members(path: str) -> tuple[dict[str, Span], list[str], int]:
    """Where each plain member's bytes are, the last one of each name, what is to be said of the others, and the tar's time."""
    members: dict[str, Span] = {}
    twice, refused = [], []
    try:
        mtime = storage.entry_of(path).mtime
        with storage.opened(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte for each
                if info.size < 0:  # older tarfiles go back by it, and round in circles
                    raise tarfile.ReadError(f"a member of {info.size} bytes")
                name = _as_file_name(info.name)
                if info.isdir() or os.path.basename(name).startswith("._"):
                    continue
                if not info.isreg() or info.issparse():
                    refused += [name] if is_image_name(name) else []
                    continue
                twice += [name] if name in members else []
                members[name] = (info.offset_data, info.size)
            end = file.seek(tar.offset)  # type: ignore[attr-defined]
            rest = file.read(1 << 20)
        if len(rest) < 512 or rest.strip(b"\0"):
            raise tarfile.ReadError(f"cut or damaged at byte {end:,}")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UsageError(f"{path}: not a whole tar ({error}); fetch it again") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    notes = []
    if refused:
        notes.append(f"{len(refused):,} images that are links or sparse are ignored ({refused[0]} ...); unpack the tar")
    if twice:
        notes.append(f"{len(twice):,} members come a second time, and the last counts ({twice[0]} ...)")
    return members, notes, mtime


def _as_file_name(member: str) -> str:
    """A member's name as names of files are decoded: pax has letters that the system's encoding may not have."""
    try:
        os.fsencode(member)
        return member
    except UnicodeEncodeError:
        return os.fsdecode(member.encode("utf-8", "surrogateescape"))
