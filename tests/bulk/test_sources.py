"""Which images there are: folders, globs, lists, and what stands beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from inference import UsageError

from bulk import storage
from bulk.sources import ImageKey, ImageList, Sources, list_sources, read_lines
from bulk_runs import PHOTO, make_tar
from conftest import ROOT


def names(sources: Sources, folder: Path) -> list[str]:
    return [os.path.relpath(key.name, folder) for key in sources.files]


def photo_set(folder: Path, *more: str) -> Path:
    """Photos, each with its caption and fields beside it, as many tools write them."""
    folder.mkdir()
    for name in ("0.jpg", "0.txt", "0.json", "1.png", "1.txt", *more):
        (folder / name).write_bytes(PHOTO if name.endswith((".jpg", ".png")) else b"a caption\n")
    return folder


# --- folders and globs ---


def test_files_that_are_no_images_are_counted(tree):
    sources = list_sources([str(tree)])
    expected = ["a.jpeg", "b.JPG", "e.gif", "f.BMP", "z.png", "sub/c.Webp", "sub/deep/d.tif"]
    assert (names(sources, tree), dict(sources.left_out)) == (expected, {"other files ignored": 2})
    assert str(sources) == "7 images, 2 other files ignored"
    (tree / "sub" / "deep" / "d.tif").rename(tree / "sub" / "deep" / "d.txt")
    with pytest.raises(UsageError, match=r"no images in it \(0 images, 1 other files ignored\)"):
        list_sources([str(tree / "sub" / "deep")])


def test_two_stars_are_any_depth_and_follow_no_link_in_circles(tree):
    (tree / "sub" / "link").symlink_to(tree / "sub" / "deep")
    (tree / "again").symlink_to(tree)
    (tree / "sub" / "other").symlink_to(tree)
    assert names(list_sources([str(tree / "**" / "*.*i*")]), tree) == ["e.gif", "sub/deep/d.tif"]
    assert names(list_sources([str(tree / "**" / "deep" / "*")]), tree) == ["sub/deep/d.tif"]
    assert len(list_sources([str(tree / "**")]).files) == 7
    with pytest.raises(UsageError, match="no such file or folder"):
        list_sources([str(tree / "**" / "*.jpg")])
    with pytest.raises(UsageError, match=r"one \*\* at most"):
        list_sources([str(tree / "**" / "deep" / "**" / "*.tif")])


def test_a_glob_takes_images_by_their_suffix_and_no_text_for_a_list(tmp_path):
    folder = photo_set(tmp_path / "set", "notes.md", "2.tar")
    make_tar(folder / "2.tar", {"3.jpg": PHOTO})
    sources = list_sources([f"{folder}/*"])
    assert names(sources, folder) == ["0.jpg", "1.png"]
    assert sources.tars == [f"{folder}/2.tar"]
    assert dict(sources.left_out) == {"other files ignored": 4}
    with pytest.raises(UsageError, match="no images in it"):
        list_sources([f"{folder}/*.txt"])


def test_a_glob_that_the_shell_has_expanded_takes_no_caption_for_a_list_or_an_image(tmp_path):
    folder = photo_set(tmp_path / "set")
    sources = list_sources(sorted(map(str, folder.iterdir())))
    assert names(sources, folder) == ["0.jpg", "1.png"]
    assert dict(sources.left_out) == {"other files ignored": 3}


def test_a_text_that_is_no_caption_of_a_named_image_is_a_list(tmp_path):
    folder = photo_set(tmp_path / "set")
    (tmp_path / "0.TXT").write_text(f"{folder}/1.png\n")  # the stem of an image in another folder
    assert names(list_sources([f"{folder}/0.jpg", f"{tmp_path}/0.TXT"]), folder) == ["0.jpg", "1.png"]


def test_a_file_that_is_named_by_itself_is_taken_whatever_its_suffix(tmp_path):
    (tmp_path / "photo.dat").write_bytes(PHOTO)
    (tmp_path / "photo[1].jpg").write_bytes(PHOTO)
    given = [f"{tmp_path}/photo.dat", f"{tmp_path}/photo[1].jpg"]
    assert [key.name for key in list_sources(given).files] == given


@pytest.mark.parametrize(
    "system", ["@eaDir", ".thumbnails", ".thumb", ".Trash", ".Trash-1000", ".Trashes", "__MACOSX", "#recycle", "$RECYCLE.BIN"]
)
def test_folders_of_the_system_are_left_out_and_counted(tree, system):
    (tree / "sub" / system / "e.jpg").mkdir(parents=True)
    (tree / "sub" / system / "e.jpg" / "SYNOPHOTO_THUMB_XL.jpg").write_bytes(PHOTO)
    sources = list_sources([str(tree)])
    assert len(sources.files) == 7
    assert str(sources) == "7 images, 2 other files ignored, 1 system folders left out"
    named = list_sources([str(tree / "sub" / system)])
    assert len(named.files) == 1  # who asks for it gets it


def test_the_shadows_that_a_mac_writes_are_no_images(tree):
    (tree / "._a.jpeg").write_bytes(b"\x00\x05\x16\x07")
    assert list_sources([str(tree)]).left_out == {"other files ignored": 3}
    assert list_sources([f"{tree}/**/*.jpeg"]).left_out == {"other files ignored": 1}


@pytest.mark.parametrize("name", ["photos.tar.gz", "photos.TGZ", "photos.tar.zst", "photos.tar.bz2", "photos.tar.xz"])
def test_a_compressed_tar_is_named(tree, logged, name):
    (tree / name).touch()
    assert list_sources([str(tree)]).left_out == {"other files ignored": 3}
    assert f"{tree}/{name}: a compressed tar is ignored: " in "\n".join(logged) and "unpack it first" in "\n".join(logged)
    with pytest.raises(UsageError, match=rf"{name}: a compressed tar, .*; unpack it first"):
        list_sources([str(tree / name)])


def test_tars_are_known_by_name_alone(tree, monkeypatch):
    monkeypatch.setattr("tarfile.open", None)
    for name in ("b.tar", "a.TAR"):
        (tree / "sub" / name).write_bytes(b"not read before its turn comes")
    sources = list_sources([str(tree), str(tree / "sub" / "b.tar")])
    assert sources.tars == [f"{tree}/sub/a.TAR", f"{tree}/sub/b.tar", f"{tree}/sub/b.tar"]
    assert str(sources).startswith("7 images and 3 tars, ")


def test_a_folder_may_be_called_like_a_tar(tmp_path):
    (tmp_path / "a.tar").mkdir()
    (tmp_path / "a.tar" / "photo.jpg").touch()
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.tar/photo.jpg\n")
    for given in ("list.txt", "a.tar"):
        assert names(list_sources([str(tmp_path / given)]), tmp_path) == ["a.tar/photo.jpg"]


@pytest.mark.parametrize("name", ["pipe.tar", "pipe.txt"])
def test_a_pipe_is_not_waited_for(tree, name):
    os.mkfifo(tree / name)
    sources = list_sources([str(tree)])
    assert (len(sources.files), sources.tars) == (7, [])
    with pytest.raises(UsageError, match="not a regular file"):
        list_sources([str(tree / name)])


def test_a_folder_that_may_not_be_read_is_named_and_not_passed_over(tree, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=rf"--image_path {tree}: cannot be read \(.*Permission denied: '{tree}/sub/deep'\)"):
        list_sources([str(tree)])


def test_names_may_be_anything_that_a_file_system_takes(tmp_path):
    odd = ["a\nb.jpg", "caf\udce9.jpg", "x" * 251 + ".jpg", " .jpg", "%s{0}\\.jpg", "猫.jpg", "a..jpg", "a.jpg.jpg"]
    for name in odd:
        (tmp_path / name).write_bytes(PHOTO)
    sources = list_sources([str(tmp_path)])
    assert sorted(names(sources, tmp_path)) == sorted(odd)
    assert all(storage.read(key.file, key.offset, key.size) == PHOTO for key in sources.files)
    assert len(sources.sha256()) == 64


# --- lists ---

CODINGS: dict[str, Callable[[str], bytes]] = {
    "plain": str.encode,
    "UTF-8 with mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16, little end first": lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
    "UTF-16, big end first": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("encode", CODINGS.values(), ids=CODINGS.keys())
def test_a_list_of_paths_is_read_line_by_line_as_editors_write_it(tmp_path, encode, newline):
    # The bytes of U+0A0A are those of line ends, and U+2028 is one to str.splitlines.
    wanted = ["z.png", "with space.jpg", "gone.jpg", "ਊ猫ȍ.jpg", "a\u2028b.jpg", "no suffix", "last.jpg"]
    lines = [f"{tmp_path}/{name}" for name in wanted]
    lines.insert(1, "  ")
    (tmp_path / "list.txt").write_bytes(encode(newline.join(lines)))
    assert names(list_sources([str(tmp_path / "list.txt")]), tmp_path) == wanted


def test_a_list_has_names_of_files_whose_bytes_are_no_text(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    Path(os.fsdecode(name)).write_bytes(PHOTO)
    (tmp_path / "list.txt").write_bytes(name + b"\n")
    [key] = list_sources([str(tmp_path / "list.txt")]).files
    assert storage.read(key.file) == PHOTO


@pytest.mark.parametrize("text", [b"\xff\xfea", b"\xfe\xff\xd8\x00\x00a", b"\xff\xfe" + "a.jpg\n".encode("utf-16-le")[:-1]])
def test_a_damaged_list_is_one_line(tmp_path, text):
    (tmp_path / "list.txt").write_bytes(text)
    with pytest.raises(UsageError, match=r"list\.txt: .*UTF-16"):
        list_sources([str(tmp_path / "list.txt")])


def test_a_list_may_name_tars_and_their_members_as_a_path_of_a_part_does(tmp_path):
    (tmp_path / "laion.tar").mkdir()
    inner = make_tar(tmp_path / "laion.tar" / "0.tar", {"0.jpg": b"inner", "a/b.tar/1.jpg": b"deep"})
    upper = make_tar(tmp_path / "X.TAR", {"0.jpg": b"upper", "no suffix": b"any"})
    lines = [f"{inner}/0.jpg", f"{inner}/a/b.tar/1.jpg", f"{upper}/0.jpg", f"{upper}/no suffix", str(upper)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    sources = list_sources([str(tmp_path / "list.txt")])
    assert [key.name for key in sources.files] == lines[:4]
    data = [storage.read(key.file, key.offset, key.size) for key in sources.files]
    assert data == [b"inner", b"deep", b"upper", b"any"]
    assert sources.tars == [str(upper)]
    (tmp_path / "list.txt").write_text(f"{upper}/nobody.png\n")
    with pytest.raises(UsageError, match=r"list\.txt: .*X\.TAR has no member nobody\.png, or it is a link or sparse"):
        list_sources([str(tmp_path / "list.txt")])


def test_a_shuffled_list_over_tars_reads_each_tar_once(tmp_path, monkeypatch):
    import tarfile

    tars = [make_tar(tmp_path / f"{tar}.tar", {f"{member}.jpg": b"%d" % member for member in range(9)}) for tar in range(3)]
    lines = [f"{tar}/{member}.jpg" for member in range(9) for tar in tars]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    opened, real = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *given, **more: opened.append(more["fileobj"].name) or real(*given, **more))
    files = list_sources([str(tmp_path / "list.txt")]).files
    assert [key.name for key in files] == lines
    data = [storage.read(key.file, key.offset, key.size) for key in files]
    assert data == [b"%d" % member for member in range(9) for _ in tars]
    assert sorted(opened) == sorted(map(str, tars))


def test_a_list_of_nothing_names_no_images(tmp_path):
    (tmp_path / "list.txt").write_text("\n \r\n\n")
    with pytest.raises(UsageError, match=r"list\.txt: no images in it \(0 images\)"):
        list_sources([str(tmp_path / "list.txt")])


OTHER_ENCODING = """
    import os, sys, tarfile
    from bulk.decoding import read_crop
    from bulk.sources import list_sources
    from inference import Preprocess, UsageError
    folder = os.fsencode(sys.argv[1])
    found = [folder + b"/" + bytes.fromhex(name) + b".jpg" for name in sys.argv[2:]]
    for name in found:
        os.symlink(os.path.abspath("assets/samples/chelsea.jpg"), name)
    with open(folder + b"/list.txt", "wb") as file:
        file.write(b"\\n".join(sorted(found)))
    listed, walked = (list_sources([path]) for path in (sys.argv[1] + "/list.txt", sys.argv[1]))
    assert [os.fsencode(key.name) for key in listed.files] == sorted(found), list(listed.files)
    assert listed.sha256() == walked.sha256()
    assert all(read_crop(key, Preprocess()).shape == (224, 224, 3) for key in listed.files)
    with tarfile.open(sys.argv[1] + "/a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("\\u0ca0.jpg"))
    with open(folder + b"/list.txt", "wb") as file:
        file.write(folder + b"/a.tar/" + "\\u0ca0.jpg".encode())
    [member] = list_sources([sys.argv[1] + "/list.txt"]).files
    assert os.fsencode(member.name) == folder + b"/a.tar/" + "\\u0ca0.jpg".encode(), member
    with open(folder + b"/list.txt", "wb") as file:
        file.write("\\u0ca0.jpg".encode("utf-16"))
    try:
        list_sources([sys.argv[1] + "/list.txt"])
    except UsageError as error:
        assert "list.txt: not a list in UTF-16 of names that files can have here" in str(error), error
        print(sys.getfilesystemencoding())
"""


def in_another_encoding(folder: Path, *names: bytes, **variables: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(OTHER_ENCODING), str(folder), *(name.hex() for name in names)]
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"} | variables
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_names_are_read_where_the_system_knows_only_ascii(tmp_path):
    assert in_another_encoding(tmp_path, "猫".encode(), LC_ALL="C") == "ascii"


def test_names_are_read_on_a_chinese_system(tmp_path):
    locales = tmp_path / "locales"
    locales.mkdir()
    command = ["localedef", "--no-archive", "-i", "POSIX", "-f", "GBK", str(locales / "zh.GBK")]
    if shutil.which("localedef") is None or subprocess.run(command, capture_output=True, check=False).returncode > 1:
        pytest.skip("this system cannot make a locale in GBK")
    (tmp_path / "set").mkdir()
    names = "猫乗".encode("gbk"), "猫".encode()  # its own, with a second byte that is a backslash; and UTF-8
    assert in_another_encoding(tmp_path / "set", *names, LOCPATH=str(locales), LC_ALL="zh.GBK") == "gbk"


def test_lines_of_a_list_come_as_they_are_read(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a.jpg\n" + b"b.jpg\n" * 100_000)
    tracemalloc.start()
    assert next(lines := read_lines(str(tmp_path / "list.txt"))) == "a.jpg"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert sum(1 for _ in lines) == 100_000


# --- what holds the names ---


def test_a_million_names_fit_into_little_memory():
    count = 40_000  # a part of it, for the time it takes
    tracemalloc.start()
    images = ImageList()
    for number in range(count):
        images.append(f"photos/{number:012d}/image-{number:020d}.jpg")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held - count * len(images[0].name) < 25 * count
    assert images[39_999].name == "photos/000000039999/image-00000000000000039999.jpg"


def test_a_list_gives_back_what_was_put_into_it():
    keys = [ImageKey("a.jpg"), ImageKey("b\udce9\n.tar/c.jpg", 9, 1 << 40, 5, (1, 2), (3, 4)), ImageKey("")]
    images = ImageList(keys)
    assert (list(images), len(images), images[1]) == (keys, 3, keys[1])


def test_the_digest_of_a_list_tells_names_apart():
    def digest(*files: str, tars: tuple[str, ...] = ()) -> str:
        return Sources(ImageList(map(ImageKey, files)), list(tars)).sha256()

    different = [digest("ab", "c"), digest("a", "bc"), digest("c", "ab"), digest("abc"), digest("ab", tars=("c",))]
    different += [digest(tars=("ab", "c")), digest(tars=("c", "ab"))]
    assert len(set(different)) == len(different)


def test_what_must_be_there_for_an_image_is_its_folder_or_its_tar():
    assert (ImageKey("a.jpg").folder, ImageKey("b/a.jpg").folder) == (".", "b")
    member = ImageKey("b/c.tar/a.jpg", 7, 512, 9)
    assert (member.folder, member.file) == ("b/c.tar", "b/c.tar")


def test_an_image_in_the_topmost_folder_keeps_its_name():
    names = ["/photo.jpg", "/other.jpg", "plain.jpg", "/photos/a.jpg", "/photos/b.jpg"]
    assert [key.name for key in ImageList(map(ImageKey, names))] == names
