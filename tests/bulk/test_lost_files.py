"""Files, tars, folders and disks that do not give what was listed: what is left unwritten, and what stops a run."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
from inference import UsageError

import embed
from bulk import decoding
from bulk.decoding import Row, read_crop
from bulk.encoder import Encoder
from bulk.sources import ImageKey
from bulk_runs import column, contents, failing, failures, make_tar
from embed import LostFolders

pytestmark = pytest.mark.usefixtures("no_waits", "one_thread")


def test_a_file_that_the_disk_does_not_give_leaves_its_part_for_later(bulk, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        failing(patch, lambda path: path.endswith("06.jpg"))
        done = bulk()
    assert done.code == 2
    assert [path.name for path in done.parts] == ["part-00000.npz", "part-00002.npz", "part-00003.npz", "part-00004.npz"]
    assert "Part 1 is left unwritten: " in done.log and "06.jpg: Input/output error" in done.log
    assert done.last.startswith("error: 1 parts are left unwritten because files could not be read; ")
    assert done.last.endswith(f"4 of 5 parts are finished in {tmp_path}/out; run the same command again to go on")
    assert not (tmp_path / "out" / "failures.jsonl").exists()
    assert bulk().code == 0
    bulk(output=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_nothing_more_of_a_part_that_is_given_up_is_read_or_computed(bulk, monkeypatch):
    read, computed = [], []
    failing(monkeypatch, lambda path: read.append(path) or path.endswith("01.jpg"))
    submit = Encoder.submit
    monkeypatch.setattr(Encoder, "submit", lambda encoder, crops: computed.append(len(crops)) or submit(encoder, crops))
    done = bulk("--part_size", 20)
    assert done.code == 2
    assert (len(read), sum(computed)) == (5, 3)


def test_a_file_that_may_not_be_read_is_no_bad_image(bulk, monkeypatch):
    real = open

    def refuse(path, *arguments, **options):
        if str(path).endswith("06.jpg"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    done = bulk()
    assert (done.code, len(done.parts)) == (2, 4)
    assert "06.jpg: Permission denied" in done.log


@pytest.mark.parametrize("how", ["cut", "gone", "changing", "unreadable"])
def test_a_tar_that_cannot_be_read_costs_its_own_part_alone(bulk, photos, monkeypatch, tmp_path, how):
    folder, data = tmp_path / "shards", (photos / "00.jpg").read_bytes()
    folder.mkdir()
    for name in "abc":
        make_tar(folder / f"{name}.tar", {f"{number}.jpg": data for number in range(7)})
    bad, real = folder / "b.tar", embed.list_sources

    def spoil(arguments):
        sources = real(arguments)
        bad.unlink() if how == "gone" else bad.write_bytes(bad.read_bytes()[:5000])
        return sources

    with monkeypatch.context() as patch:
        if how in ("cut", "gone"):
            patch.setattr(embed, "list_sources", spoil)
        elif how == "unreadable":
            failing(patch, lambda path: path.endswith("b.tar"))
        else:
            crop = decoding.read_crop
            patch.setattr(
                decoding, "read_crop", lambda key, preprocess: ("b.tar" in key.name and os.utime(bad)) or crop(key, preprocess)
            )
        done = bulk(images=folder)
    assert done.code == 2
    if how == "changing":
        assert f"error: {bad} changed while it was read; " in done.last
        assert [path.name for path in done.parts] == ["part-00000-0000.npz", "part-00000.npz"]
    else:
        reason = {"cut": "not a whole tar", "gone": "cannot be read (No such file", "unreadable": "Input/output error"}[how]
        assert f"Part 1 is left unwritten: {bad}: {reason}" in done.log
        assert [path.name for path in done.parts][::2] == ["part-00000-0000.npz", "part-00002-0000.npz"]
        assert "2 of 3 parts are finished" in done.last
    make_tar(bad, {f"{number}.jpg": data for number in range(7)})
    done = bulk(images=folder)
    assert (done.code, len(done.parts)) == (0, 6), done.terminal
    assert column(tmp_path / "out", "index") == [tar * 10**9 + place for tar in (1, 2, 3) for place in range(7)]


@pytest.mark.parametrize("what", ["deleted", "emptied", "tar"])
def test_a_folder_that_is_gone_after_it_gave_images_stops_the_run(bulk, photos, monkeypatch, tmp_path, what):
    folder = shutil.copytree(photos, tmp_path / "disk")
    images = folder
    if what == "tar":
        images = make_tar(tmp_path / "disk.tar", {path.name: path.read_bytes() for path in sorted(photos.iterdir())})

    def lose(key, preprocess):
        if key.name.endswith("12.jpg"):
            images.unlink() if what == "tar" else shutil.rmtree(folder)
            if what == "emptied":
                folder.mkdir()
        return read_crop(key, preprocess)

    monkeypatch.setattr(decoding, "read_crop", lose)
    done = bulk(images=images)
    assert done.code == 2
    assert f"error: {images} is gone or empty, a lost disk or mount" in done.last
    names = ["part-00000-0000.npz", "part-00000-0001.npz"] if what == "tar" else ["part-00000.npz", "part-00001.npz"]
    found = [path.name for path in done.parts]
    assert found == names or (what == "tar" and found == names[:1])  # the second may have been on its way
    assert not (tmp_path / "out" / "failures.jsonl").exists()


def test_a_hundred_images_in_a_row_that_are_nowhere_stop_the_run(bulk, photos, tmp_path):
    good = sorted(map(str, photos.iterdir()))
    lines = good + [f"/nowhere/{number}/{number}.jpg" for number in range(1000)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    done = bulk(images=tmp_path / "list.txt")
    assert done.code == 2
    assert "(100 images in a row are not there)" in done.last
    assert [path.name for path in done.parts] == [
        f"part-0000{number}.npz" for number in range(4)
    ]  # the fifth has lost ones too
    (tmp_path / "list.txt").write_text("\n".join(good + lines[-99:]))
    done = bulk(images=tmp_path / "list.txt", output=tmp_path / "short")
    assert (done.code, len(failures(tmp_path / "short"))) == (0, 99)


def test_images_that_are_nowhere_among_others_are_no_lost_disk():
    lost, there, gone = LostFolders(), Row(9, 9, {}), Row(0, 0, {}, "No such file", folder_gone=True)
    for number in range(300):
        lost.count([ImageKey(f"/nowhere/{number}/a.jpg"), ImageKey("b.jpg")], [gone, there])
    assert lost.in_a_row == 0
    with pytest.raises(UsageError, match=r"/nowhere is gone or empty, .* \(100 images in a row are not there\)"):
        lost.count([ImageKey("/nowhere/a.jpg")] * 100, [gone] * 100)
