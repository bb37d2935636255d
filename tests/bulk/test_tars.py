"""Inside a tar: which members are images, which texts are theirs, and that damage is seen."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import inference
import numpy as np
import pytest
from inference import Preprocess, UsageError
from PIL import Image

from bulk import storage
from bulk.decoding import read_crop, read_texts
from bulk.sources import ImageKey, index_tar, list_sources
from bulk_runs import PHOTO, make_tar
from conftest import SAMPLES


def captions(path: Path, everything: bool = False) -> dict[str, str]:
    """What each image's .txt says, by the name of its member."""
    found = {}
    for key in index_tar(str(path), everything).images:
        found[key.name[len(str(path)) + 1 :]] = read_texts(key).get("caption", "")
    return found


def bytes_of(key: ImageKey) -> bytes:
    return storage.read(key.file, key.offset, key.size)


# --- images ---


def test_the_images_of_a_tar_are_what_unpacking_it_gives(tmp_path):
    members = {"0.jpg": PHOTO, "folder/1.PNG": (SAMPLES / "moon.png").read_bytes(), "2.cls": b"3", "3.json": b"{}"}
    tar = make_tar(tmp_path / "00012.tar", members)
    images, notes = index_tar(str(tar))
    assert ([key.name for key in images], notes) == ([f"{tar}/0.jpg", f"{tar}/folder/1.PNG"], [])
    for key, photo in zip(images, ("chelsea.jpg", "moon.png"), strict=True):
        assert np.array_equal(read_crop(key, Preprocess()), inference.crops_of([SAMPLES / photo], Preprocess())[0])


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_names_of_members_may_be_long_or_odd(tmp_path, format):
    names = ["x" * 300 + ".jpg", "猫.jpg", "caf\udce9.jpg", "./1.jpg", "/2.jpg", "a\nb.jpg", ".jpg.jpg", "a.tar/3.jpg", " .jpg"]
    tar = make_tar(tmp_path / "a.tar", [(name, name[:9].encode("utf-8", "surrogateescape")) for name in names], format)
    images = list(index_tar(str(tar)).images)
    assert [key.name for key in images] == [f"{tar}/{name}" for name in names]
    assert [bytes_of(key).decode("utf-8", "surrogateescape") for key in images] == [name[:9] for name in names]
    listed = [key for key in images if "\n" not in key.name]
    (tmp_path / "list.txt").write_bytes(b"\n".join(os.fsencode(key.name) for key in listed))
    files = list(list_sources([str(tmp_path / "list.txt")]).files)
    assert [key[:4] for key in files] == [key[:4] for key in listed]


def test_a_tar_within_a_tar_is_no_image(tmp_path):
    inner = make_tar(tmp_path / "inner.tar", {"0.jpg": b"inner"})
    outer = make_tar(tmp_path / "outer.tar", {"inner.tar": inner.read_bytes(), "0.jpg": b"outer"})
    assert [bytes_of(key) for key in index_tar(str(outer)).images] == [b"outer"]


def test_the_shadows_that_a_mac_packs_are_skipped(tmp_path):
    tar = make_tar(tmp_path / "a.tar", {"._0.jpg": b"shadow", "0.jpg": PHOTO, "a/._0.jpg": b"shadow", "a/0.jpg": PHOTO})
    for everything in (False, True):
        assert captions(tar, everything) == {"0.jpg": "", "a/0.jpg": ""}
    assert index_tar(str(tar)).notes == []


def test_of_members_of_one_name_the_last_counts_and_that_is_said(tmp_path):
    members = [("0.jpg", b"first"), ("0.txt", b"old"), ("1.jpg", b"1"), ("0.jpg", b"last"), ("0.txt", b"new")]
    tar = make_tar(tmp_path / "a.tar", members)
    images, notes = index_tar(str(tar))
    assert [bytes_of(key) for key in images] == [b"last", b"1"]
    assert captions(tar) == {"0.jpg": "new", "1.jpg": ""}
    assert notes == ["2 members come a second time, and the last counts (0.jpg ...)"]


def test_links_and_sparse_members_are_ignored_counted_and_named(tmp_path):
    Image.effect_noise((300, 300), 50).save(tmp_path / "hole.bmp")
    with open(tmp_path / "hole.bmp", "r+b") as file:
        file.truncate(10_000_000)
    (tmp_path / "link.jpg").symlink_to("hole.bmp")
    os.link(tmp_path / "hole.bmp", tmp_path / "zwin.bmp")
    subprocess.run(["tar", "-S", "-C", tmp_path, "-cf", tmp_path / "a.tar", "hole.bmp", "link.jpg", "zwin.bmp"], check=True)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.add(SAMPLES / "chelsea.jpg", "chelsea.jpg")
    images, notes = index_tar(str(tmp_path / "a.tar"))
    assert [key.name for key in images] == [f"{tmp_path}/a.tar/chelsea.jpg"]
    assert notes == ["3 images that are links or sparse are ignored (hole.bmp ...); unpack the tar"]
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.tar/hole.bmp\n")
    with pytest.raises(UsageError, match=r"no member hole\.bmp, or it is a link or sparse"):
        list_sources([str(tmp_path / "list.txt")])


@pytest.mark.parametrize("first", ["the image", "the mask"])
def test_masks_beside_an_image_are_left_out_counted_and_said_and_a_list_can_name_them(tmp_path, first):
    names = ["0.jpg", "0.seg.png", "0.depth.png", "1.left.jpg", "1.right.jpg", "a.b/2.png", "a.b/2.jpg"]
    names = names if first == "the image" else names[::-1]
    tar = make_tar(tmp_path / "a.tar", {name: PHOTO for name in names} | {"0.txt": b"zero", "1.txt": b"one"})
    found, notes = captions(tar), index_tar(str(tar)).notes
    leader = "a.b/2.png" if first == "the image" else "a.b/2.jpg"
    assert found == {"0.jpg": "zero", "1.left.jpg": "one", "1.right.jpg": "one", leader: ""}
    told = next(name for name in names if name not in found)
    assert notes == [f"3 images beside one of the same key are left out ({told} ...); a list can name them"]
    (tmp_path / "list.txt").write_text(f"{tar}/0.seg.png\n{tar}/{told}\n")
    assert len(list_sources([str(tmp_path / "list.txt")]).files) == 2


# --- texts ---


def test_screenshots_keep_their_own_captions(tmp_path):
    names = [f"Screen Shot 2024-01-02 at 10.0{minute}.00" for minute in range(3)]
    members = {f"{name}.jpg": PHOTO for name in names} | {f"{name}.txt": name.encode() for name in names}
    tar = make_tar(tmp_path / "a.tar", members)  # all images, then all texts
    assert captions(tar) == {f"{name}.jpg": name for name in names}
    assert index_tar(str(tar)).notes == []
    make_tar(tar, dict(list(members.items())[:4]))  # one text of the three: it has an owner
    assert captions(tar) == {f"{names[0]}.jpg": names[0], f"{names[1]}.jpg": "", f"{names[2]}.jpg": ""}


def test_a_text_that_no_image_owns_is_its_whole_group_s(tmp_path):
    members = {
        "0.left.jpg": PHOTO,
        "0.right.jpg": PHOTO,
        "0.txt": b"both",
        "1.jpg": PHOTO,
        "1.en.txt": b"one's",
        "0.1.cls": b"",
    }
    assert captions(make_tar(tmp_path / "a.tar", members)) == {"0.left.jpg": "both", "0.right.jpg": "both", "1.jpg": "one's"}


def test_its_own_text_comes_before_its_group_s(tmp_path):
    members = {"0.txt": b"group's", "0.left.jpg": PHOTO, "0.left.TXT": b"own", "0.right.jpg": PHOTO, "other/0.txt": b"not here"}
    assert captions(make_tar(tmp_path / "a.tar", members)) == {"0.left.jpg": "own", "0.right.jpg": "group's"}


def test_of_several_texts_none_is_taken_and_that_is_said_once(tmp_path):
    members = {"0.jpg": PHOTO, "0.en.txt": b"cat", "0.de.txt": b"Katze", "0.a.json": b"{}", "0.b.json": b"{}", "1.jpg": PHOTO}
    tar = make_tar(tmp_path / "a.tar", members | {"1.txt": b"own", "1.en.txt": b"one", "1.de.txt": b"eins"})
    assert captions(tar) == {"0.jpg": "", "1.jpg": "own"}
    assert index_tar(str(tar)).notes == ["1 images have several texts and get none of them as caption (0.jpg ...)"]


def test_a_link_is_no_caption(tmp_path):
    make_tar(tmp_path / "a.tar", {"1.jpg": b"photo", "2.txt": b"another's"})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("3.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "2.txt"
        tar.addfile(tarfile.TarInfo("3.jpg"))
        tar.addfile(link)
    assert captions(tmp_path / "a.tar") == {"1.jpg": "", "3.jpg": ""}


CAPTION = {
    "caption": "a tabby cat",
    "url": "https://example.org/cat.jpg",
    "key": "000120001",
    "status": "success",
    "width": 451,
}


def test_what_img2dataset_wrote_comes_along(tmp_path):
    members = {
        "000120001.txt": b"a caption that the json has better",
        "000120001.jpg": PHOTO,
        "000120001.json": json.dumps(CAPTION).encode(),
        "folder/000120000.PNG": PHOTO,
        "000120002.jpg": PHOTO,
        "000120002.txt": "一杯咖啡\n".encode(),
        "000120002.json": b'{"url": "https://example.org/coffee.jpg"}',
    }
    images = index_tar(str(make_tar(tmp_path / "00012.tar", members))).images
    assert [read_texts(key) for key in images] == [
        {name: CAPTION[name] for name in ("caption", "url", "key")},
        {},
        {"caption": "一杯咖啡", "url": "https://example.org/coffee.jpg"},
    ]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("0.json", b"{", {}),
        ("0.json", b"[1]", {}),
        ("0.json", b"", {}),
        ("0.json", b"\xff", {}),
        ("0.json", b"[" * 100_000, {}),
        ("0.json", b'{"caption": null, "url": 5, "key": ["a"]}', {"url": "5", "key": "['a']"}),
        ("0.json", b'{"caption": "\\ud800"}', {"caption": "\ud800"}),
        ("0.txt", b"\xff", {"caption": "\ufffd"}),
        ("0.txt", b"", {"caption": ""}),
        ("0.txt", b"long " * 200_000, {"caption": "long " * 800}),
    ],
)
def test_a_damaged_or_endless_text_costs_no_image(tmp_path, name, data, expected):
    [key] = index_tar(str(make_tar(tmp_path / "a.tar", {"0.jpg": PHOTO, name: data}))).images
    assert read_texts(key) == expected


# --- damage ---

DAMAGE = {
    "in data": lambda data: data[:5000],
    "at a member": lambda data: data[: 3 * 1024],
    "in a header": lambda data: data[: 3 * 1024 + 200],
    "before the end": lambda data: data[: 6 * 1024],
    "flipped bit": lambda data: data[:1024] + bytes([data[1024] ^ 1]) + data[1025:],
    "empty header": lambda data: data[:1024] + bytes(512) + data[1536:],
    "two in one": lambda data: data + data,
    "empty": lambda data: b"",
    "no tar": lambda data: b"text" * 999,
    "a folder's name": lambda data: None,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_tar_is_named_wherever_it_is_damaged(tmp_path, damage):
    path = make_tar(tmp_path / "a.tar", {f"{number}.jpg": bytes(100 if number < 5 else 500) for number in range(6)})
    assert len(index_tar(str(path)).images) == 6
    data = damage(path.read_bytes())
    path.unlink()
    path.mkdir() if data is None else path.write_bytes(data)
    with pytest.raises(
        UsageError, match=r"/a\.tar: (not a whole tar \(.*\); fetch it again|cannot be read \(Is a directory\))"
    ):
        index_tar(str(path))


def with_size(data: bytes, size: bytes) -> bytes:
    """A tar whose first header says another size, and is no longer wrong in itself."""
    header = bytearray(data[:512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + bytes(3) + b"\x40" + bytes(7)], ids=["negative", "beyond all disks"])
def test_a_member_of_an_impossible_size_is_damage(tmp_path, size):
    path = make_tar(tmp_path / "a.tar", {"0.jpg": b"", "1.jpg": bytes(100)})
    path.write_bytes(with_size(path.read_bytes(), size))
    with pytest.raises(UsageError, match=r"a\.tar: "):
        index_tar(str(path))


def test_whatever_byte_is_flipped_an_image_is_as_it_was_or_the_tar_is_named(tmp_path):
    path = make_tar(tmp_path / "a.tar", {f"{number}.jpg": bytes([65 + number]) * 700 for number in range(3)})
    whole, random = path.read_bytes(), np.random.default_rng(0)
    named = 0
    for place in random.integers(0, 3 * 1536, 200):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        path.write_bytes(flipped)
        try:
            found = [bytes_of(key) for key in index_tar(str(path)).images]
        except UsageError:
            named += 1
            continue
        assert place % 1536 >= 512 and [len(data) for data in found] == [700] * 3  # no header: none has a checksum of data
    assert named > 30


def test_an_empty_tar_has_no_images_and_is_no_damage(tmp_path):
    images, notes = index_tar(str(make_tar(tmp_path / "a.tar", {})))
    assert (len(images), notes) == (0, [])


def test_many_members_fit_into_little_memory(tmp_path):
    tar = make_tar(tmp_path / "a.tar", {f"{number:09d}.jpg": b"" for number in range(3000)})
    tracemalloc.start()
    assert len(index_tar(str(tar)).images) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3000 * 700


def test_a_large_tar_is_read_by_its_headers_alone(tmp_path, monkeypatch):
    tar = make_tar(tmp_path / "a.tar", {f"{number}.jpg": bytes(1 << 20) for number in range(8)})
    read = []
    real = io.BufferedReader.read

    class Counting(io.BufferedReader):
        def read(self, size: int = -1) -> bytes:
            data = real(self, size)
            read.append(len(data))
            return data

    monkeypatch.setattr("builtins.open", lambda path, mode: Counting(io.FileIO(path, "r")))
    assert len(index_tar(str(tar)).images) == 8
    assert sum(read) < 100_000
