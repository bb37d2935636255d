"""Bulk runs: what is listed, what the parts hold, that nothing is lost whatever stops a run, memory, several processes."""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import json
import multiprocessing.queues
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import namedtuple
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import inference
import numpy as np
import pytest
import torch
from inference import Preprocess, Unreadable, UsageError
from PIL import Image
from torch.multiprocessing.reductions import reduce_tensor

import embed
from conftest import ROOT, SAMPLES, TINY, run_script
from embed import ImageList, list_images, read_crop

SIZE = TINY["hidden_size"]
EXTRA = {"index", "path", "size", "mtime", "failed_index", "failed_path", "failed_reason", "made_with"}


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """23 different small photographs."""
    folder = tmp_path_factory.mktemp("photos")
    originals = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.[jp]*g"))]
    for number in range(23):
        image = originals[number % len(originals)]
        image.resize((90 + 3 * number, 80 + 2 * number)).save(folder / f"{number:02d}.jpg", quality=90)
    return folder


@pytest.fixture
def flags(tiny_folder) -> list[object]:
    return ["--model_path", tiny_folder, "--device", "cpu", "--part_size", 5, "--batch_size", 2, "--num_workers", 0]


@pytest.fixture
def bulk(run, flags, photos, tmp_path):
    """Run in parts of 5, batches of 2: five parts of 23 photos, the last one short, the last batch of each too."""

    def run_bulk(*more, images=photos, output=tmp_path / "out"):
        done = run("--image_path", images, "--output", output, *flags, *more, main=embed.main, name="embed")
        done.parts = sorted(Path(output).glob("part-*.npz"))
        done.last = done.terminal.splitlines()[-1] if done.terminal else ""
        return done

    return run_bulk


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """Reading again after a disk error need not wait in tests."""
    sleep = time.sleep
    monkeypatch.setattr(inference.time, "sleep", lambda seconds: sleep(min(seconds, 0.2)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.npz"))}


def rows(folder: Path) -> dict[str, np.ndarray]:
    """Class tokens by path."""
    found = {}
    for path in sorted(folder.glob("part-*.npz")):
        part = np.load(path)
        assert len(part["index"]) == len(part["path"]) == len(part["class_token"])
        assert not found.keys() & set(part["path"].tolist())
        found |= dict(zip(part["path"].tolist(), part["class_token"]))
    return found


def failures(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]


def broken_copy(photos: Path, folder: Path, *names: str) -> Path:
    shutil.copytree(photos, folder)
    for name in names:
        data = (photos / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    return folder


# --- lists of images ---


def names(images: ImageList, folder: Path) -> list[str]:
    return [os.path.relpath(key.name, folder) for key in images]


def test_files_that_are_no_images_are_counted(tree):
    images = list_images([str(tree)])
    assert (images.ignored, [key.index for key in images]) == (2, list(range(7)))
    (tree / "sub" / "deep" / "d.tif").rename(tree / "sub" / "deep" / "d.txt")
    with pytest.raises(UsageError, match=r"no images in it \(1 other files ignored\)"):
        list_images([str(tree / "sub" / "deep")])


def test_two_stars_are_any_depth_and_follow_no_link_in_circles(tree):
    (tree / "sub" / "link").symlink_to(tree / "sub" / "deep")
    (tree / "again").symlink_to(tree)
    (tree / "sub" / "other").symlink_to(tree)
    assert names(list_images([str(tree / "**" / "*.*i*")]), tree) == ["e.gif", "sub/deep/d.tif"]
    assert names(list_images([str(tree / "**" / "deep" / "*")]), tree) == ["sub/deep/d.tif"]
    assert len(list_images([str(tree / "**")])) == 7
    with pytest.raises(UsageError, match="no such file or folder"):
        list_images([str(tree / "**" / "*.jpg")])
    with pytest.raises(UsageError, match=r"one \*\* at most"):
        list_images([str(tree / "**" / "deep" / "**" / "*.tif")])


def test_a_list_of_paths_is_read_line_by_line(tree, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_bytes(b"\xef\xbb\xbf" + f"{tree}/z.png\r\n\n{tree}/with space.jpg\n{tree}/gone.jpg".encode())
    assert names(list_images([str(listing)]), tree) == ["z.png", "with space.jpg", "gone.jpg"]


CAPTION = {
    "caption": "a tabby cat",
    "url": "https://example.org/cat.jpg",
    "key": "000120001",
    "status": "success",
    "width": 451,
}


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shard(tmp_path) -> Path:
    (tmp_path / "shards").mkdir()
    members = {
        "000120001.txt": b"a caption that the json has better",
        "000120001.jpg": (SAMPLES / "chelsea.jpg").read_bytes(),
        "000120001.json": json.dumps(CAPTION).encode(),
        "folder/000120000.PNG": (SAMPLES / "moon.png").read_bytes(),
        "000120002.jpg": (SAMPLES / "coffee.jpg").read_bytes()
        if (SAMPLES / "coffee.jpg").exists()
        else (SAMPLES / "chelsea.jpg").read_bytes(),
        "000120002.txt": "一杯咖啡\n".encode(),
        "000120002.json": b'{"url": "https://example.org/coffee.jpg"}',
        "000120002.cls": b"3",
    }
    return make_tar(tmp_path / "shards" / "00012.tar", members)


def test_a_tar_is_a_folder(shard):
    images = list_images([str(shard.parent)])
    assert [key.name for key in images] == [
        f"{shard}/{name}" for name in ("000120001.jpg", "folder/000120000.PNG", "000120002.jpg")
    ]
    assert images.ignored == 1
    for key, photo in zip(images, ("chelsea.jpg", "moon.png")):
        expected = inference.crops_of([SAMPLES / photo], Preprocess())[0]
        assert np.array_equal(read_crop(key, Preprocess()), expected)


def test_captions_come_along_from_a_tar(bulk, shard, photos):
    part = np.load(bulk(images=shard).parts[0])
    assert part["caption"].tolist() == ["a tabby cat", "", "一杯咖啡"]
    assert part["url"].tolist() == [CAPTION["url"], "", "https://example.org/coffee.jpg"]
    assert part["key"].tolist() == [CAPTION["key"], "", ""]
    assert part["path"].tolist() == [f"{shard}/{name}" for name in ("000120001.jpg", "folder/000120000.PNG", "000120002.jpg")]


def test_a_damaged_caption_costs_no_image(bulk, tmp_path):
    photo = (SAMPLES / "chelsea.jpg").read_bytes()
    bad = {"1.json": b"{", "2.json": b"[1]", "3.json": b'{"caption": null, "url": 5}', "4.json": b"\xff", "5.txt": b"\xff"}
    members = {
        name: data
        for number in range(1, 6)
        for name, data in [(f"{number}.jpg", photo)] + list(bad.items())[number - 1 : number]
    }
    part = np.load(bulk(images=make_tar(tmp_path / "a.tar", members)).parts[0])
    assert part["index"].tolist() == [0, 1, 2, 3, 4]
    assert part["caption"].tolist() == ["", "", "", "", "\ufffd"]
    assert part["url"].tolist() == ["", "", "5", "", ""]


def test_a_long_caption_does_not_fill_the_memory(bulk, tmp_path):
    members = {"1.jpg": (SAMPLES / "chelsea.jpg").read_bytes(), "1.txt": b"long " * 200_000}
    part = np.load(bulk(images=make_tar(tmp_path / "a.tar", members)).parts[0])
    assert part["caption"].tolist() == ["long " * 800]


def test_a_list_may_name_members_of_tars(shard, tmp_path):
    (tmp_path / "again.txt").write_text(f"{shard}/folder/000120000.PNG\n{shard}\n")
    images = list_images([str(tmp_path / "again.txt")])
    assert [key.name.rpartition("/")[2] for key in images] == [
        "000120000.PNG",
        "000120001.jpg",
        "000120000.PNG",
        "000120002.jpg",
    ]
    assert images[0][2:] == images[2][2:]
    assert images[1].json != images[0].json == (0, 0)
    (tmp_path / "again.txt").write_text(f"{shard}/nobody.png\n")
    with pytest.raises(UsageError, match=r"00012\.tar has no member nobody\.png"):
        list_images([str(tmp_path / "again.txt")])


def test_the_disk_that_an_image_takes_is_that_of_its_features():
    shapes = {"class_token": (1024,), "patch_tokens": (196, 1024)}
    assert embed.bytes_per_image(shapes, "float32") == 2 * embed.bytes_per_image(shapes, "float16") == 4 * 197 * 1024


@pytest.mark.parametrize(("each", "size"), [(8192, 10_000), (1 << 20, 256), (1 << 30, 1)])
def test_a_part_holds_fewer_images_where_their_features_are_large(bulk, flags, monkeypatch, tmp_path, each, size):
    place = flags.index("--part_size")
    del flags[place : place + 2]
    monkeypatch.setattr(embed, "bytes_per_image", lambda shapes, dtype: each)
    monkeypatch.setattr(embed, "check_disk", lambda bulk: None)
    bulk(images=SAMPLES / "chelsea.jpg")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["made_from"]["part_size"] == size


def test_the_folder_of_a_bare_name_is_here():
    assert (embed.ImageKey(0, "a.jpg").folder, embed.ImageKey(0, "b/a.jpg").folder) == (".", "b")


def test_a_folder_may_be_called_like_a_tar(tmp_path):
    (tmp_path / "a.tar").mkdir()
    (tmp_path / "a.tar" / "photo.jpg").touch()
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.tar/photo.jpg\n")
    for given in ("list.txt", "a.tar"):
        assert names(list_images([str(tmp_path / given)]), tmp_path) == ["a.tar/photo.jpg"]


def test_a_link_is_no_caption(tmp_path):
    make_tar(tmp_path / "a.tar", {"1.jpg": b"photo", "2.txt": b"another's"})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("3.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "2.txt"
        tar.addfile(tarfile.TarInfo("3.jpg"))
        tar.addfile(link)
    assert [key.txt for key in list_images([str(tmp_path / "a.tar")])] == [(0, 0), (0, 0)]


def test_a_shuffled_list_over_tars_reads_each_tar_once(tmp_path, monkeypatch):
    tars = [
        make_tar(tmp_path / f"{number}.tar", {f"{member}.jpg": b"%d" % member for member in range(9)}) for number in range(3)
    ]
    lines = [f"{tar}/{member}.jpg" for member in range(9) for tar in tars]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    opened, real = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda path, *more, **options: opened.append(path) or real(path, *more, **options))
    images = list_images([str(tmp_path / "list.txt")])
    assert [key.name for key in images] == lines
    assert [inference.read_bytes(key.file, key.offset, key.size) for key in images] == [
        b"%d" % member for member in range(9) for _ in tars
    ]
    assert sorted(opened) == sorted(map(str, tars))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:5000],
        lambda data: data[: 3 * 1024],
        lambda data: data[: 3 * 1024 + 200],
        lambda data: data[: 6 * 1024],
        lambda data: data[:1024] + bytes([data[1024] ^ 1]) + data[1025:],
        lambda data: data[:1024] + bytes(512) + data[1536:],
        lambda data: data + data,
        lambda data: b"",
        lambda data: b"text" * 999,
    ],
    ids=[
        "in data",
        "at a member",
        "in a header",
        "before the end",
        "flipped bit",
        "empty header",
        "two in one",
        "empty",
        "no tar",
    ],
)
def test_a_damaged_tar_is_named_wherever_it_is_damaged(tmp_path, damage):
    path = make_tar(tmp_path / "a.tar", {f"{number}.jpg": bytes(100 if number < 5 else 500) for number in range(6)})
    assert len(list_images([str(path)])) == 6
    (tmp_path / "photo.jpg").touch()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=r"/a\.tar: not a whole tar"):
        list_images([str(tmp_path)])


def test_links_and_sparse_members_are_ignored_counted_and_named(tmp_path, caplog):
    Image.effect_noise((300, 300), 50).save(tmp_path / "hole.bmp")
    with open(tmp_path / "hole.bmp", "r+b") as file:
        file.truncate(10_000_000)
    (tmp_path / "link.jpg").symlink_to("hole.bmp")
    os.link(tmp_path / "hole.bmp", tmp_path / "zwin.bmp")
    subprocess.run(["tar", "-S", "-C", tmp_path, "-cf", tmp_path / "a.tar", "hole.bmp", "link.jpg", "zwin.bmp"], check=True)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.add(SAMPLES / "chelsea.jpg", "chelsea.jpg")
    caplog.set_level("WARNING", "webssl")
    inference.log.propagate = True
    images = list_images([str(tmp_path / "a.tar")])
    assert [key.name for key in images] == [f"{tmp_path}/a.tar/chelsea.jpg"]
    assert images.ignored == 3
    assert "a.tar: 3 images that are links or sparse are ignored (hole.bmp ...)" in caplog.text
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.tar/hole.bmp\n")
    with pytest.raises(UsageError, match=r"no member hole\.bmp, or it is a link or sparse"):
        list_images([str(tmp_path / "list.txt")])


@pytest.mark.parametrize("name", ["pipe.tar", "pipe.txt"])
def test_a_pipe_is_not_waited_for(tree, name):
    os.mkfifo(tree / name)
    assert len(list_images([str(tree)])) == 7
    with pytest.raises(UsageError, match="not a regular file"):
        list_images([str(tree / name)])


def test_a_million_names_fit_into_little_memory():
    import tracemalloc

    tracemalloc.start()
    images = ImageList()
    for number in range(100_000):
        images.append(f"photos/{number:012d}/image-{number:020d}.jpg")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held / len(images) < 50 + 60
    assert images[99_999].name == "photos/000000099999/image-00000000000000099999.jpg"


def test_the_digest_of_a_list_tells_names_apart():
    def digest(*given: str) -> str:
        images = ImageList()
        for name in given:
            images.append(name)
        return images.sha256()

    assert len({digest("ab", "c"), digest("a", "bc"), digest("c", "ab"), digest("abc")}) == 4


# --- what the parts hold ---


def test_a_row_is_one_image_with_its_place_path_and_features(bulk, photos, tiny):
    done = bulk()
    assert done.code == 0, done.terminal
    assert [path.name for path in done.parts] == [f"part-0000{number}.npz" for number in range(5)]
    parts = [np.load(path) for path in done.parts]
    assert np.concatenate([part["index"] for part in parts]).tolist() == list(range(23))
    paths = np.concatenate([part["path"] for part in parts]).tolist()
    assert paths == sorted(str(path) for path in photos.iterdir())
    for part in parts:
        assert (part["class_token"].dtype, part["class_token"].shape) == (np.float32, (len(part["index"]), SIZE))
        for path, class_token, mean in zip(part["path"], part["class_token"], part["mean_patch_token"], strict=True):
            crop = inference.crops_of([path], tiny.preprocess)
            hidden = inference.forward(tiny, crop).hidden[0].numpy()
            assert class_token == pytest.approx(hidden[0], abs=1e-5)
            assert mean == pytest.approx(hidden[1:].mean(0), abs=1e-5)


def test_decoding_in_workers_changes_nothing_and_needs_no_shared_memory(bulk, monkeypatch, request, tmp_path):
    bulk(output=tmp_path / "here")
    request.addfinalizer(lambda: ForkingPickler.register(torch.Tensor, reduce_tensor))
    ForkingPickler.register(torch.Tensor, lambda tensor: pytest.fail("a tensor was sent"))
    monkeypatch.setattr(embed, "LOADER_TIMEOUT_S", 2)
    bulk("--num_workers", 2, output=tmp_path / "workers")
    assert contents(tmp_path / "here") == contents(tmp_path / "workers")


def test_a_broken_image_costs_itself_alone_and_is_listed(bulk, photos, tmp_path):
    whole = bulk(output=tmp_path / "whole")
    broken = broken_copy(photos, tmp_path / "photos", "03.jpg", "22.jpg")
    done = bulk(images=broken, output=tmp_path / "out")
    assert (done.code, len(done.parts)) == (0, 5)
    found = failures(tmp_path / "out")
    assert [(failure["index"], failure["path"]) for failure in found] == [
        (3, str(broken / "03.jpg")),
        (22, str(broken / "22.jpg")),
    ]
    assert all(failure["reason"].startswith("OSError: ") for failure in found)
    first, reference = np.load(done.parts[0]), np.load(whole.parts[0])
    assert first["index"].tolist() == [0, 1, 2, 4]
    assert np.array_equal(first["class_token"], reference["class_token"][[0, 1, 2, 4]])
    assert first["size"].tolist() == [(broken / f"{number:02d}.jpg").stat().st_size for number in (0, 1, 2, 4)]
    assert first["failed_index"].tolist() == [3]
    assert np.load(done.parts[4])["class_token"].shape == (2, SIZE)
    assert "23 images in " in done.log and " 2 failed" in done.log


def test_nan_features_are_a_failure_of_their_image(bulk, monkeypatch, tmp_path):
    forward, seen = inference.forward, []

    def poisoned(model, crops, layers=()):
        outputs = forward(model, crops, layers)
        hidden = outputs.hidden.clone()
        seen.append(len(crops))
        if len(seen) == 3:  # place 4, alone in the last batch of part 0
            hidden[0, 0, 0] = float("inf")
        return outputs._replace(hidden=hidden)

    monkeypatch.setattr(inference, "forward", poisoned)
    bulk()
    assert [(failure["index"], failure["reason"]) for failure in failures(tmp_path / "out")] == [
        (4, "its features hold NaN or Inf")
    ]


def test_a_run_without_a_single_feature_is_not_a_success(bulk, photos, tmp_path):
    done = bulk(images=broken_copy(photos, tmp_path / "photos", *os.listdir(photos)))
    assert done.code == 2
    assert "not one of these images gave features" in done.terminal


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ([], {"class_token": (SIZE,), "mean_patch_token": (SIZE,)}),
        (["--save_patch_tokens"], {"class_token": (SIZE,), "mean_patch_token": (SIZE,), "patch_tokens": (16, SIZE)}),
        (["--save_pooler"], {"class_token": (SIZE,), "mean_patch_token": (SIZE,), "pooler_output": (SIZE,)}),
        (["--layers", 2], {"class_token_layer_2": (SIZE,), "mean_patch_token_layer_2": (SIZE,)}),
    ],
)
def test_what_is_saved_is_what_was_asked_for(bulk, asked, expected):
    part = np.load(bulk(*asked).parts[0])
    assert {name: part[name].shape[1:] for name in part.files if name not in EXTRA} == expected


def test_features_can_be_saved_in_half(bulk, tmp_path):
    full, half = (np.load(bulk("--feature_dtype", kind, output=tmp_path / kind).parts[0]) for kind in ("float32", "float16"))
    assert half["class_token"].dtype == np.float16
    assert np.array_equal(half["class_token"], full["class_token"].astype(np.float16))


def test_the_manifest_says_what_made_the_parts(bulk, photos, tiny_folder, tmp_path):
    bulk()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    made_from, rounds = manifest["made_from"], manifest["rounds"]
    assert made_from["weights"]["sha256"]["model.safetensors"] == inference.sha256(tiny_folder / "model.safetensors")
    assert (made_from["device"], made_from["dtype"], made_from["image_size"], made_from["deterministic"]) == (
        "cpu",
        "float32",
        64,
        True,
    )
    assert made_from["features"] == {"class_token": [SIZE], "mean_patch_token": [SIZE]}
    assert [(step["images"], step["parts"], step["first_index"], step["image_list_sha256"]) for step in rounds] == [
        (23, 5, 0, list_images([str(photos)]).sha256())
    ]
    assert manifest["versions"].keys() == {"python", "torch", "torch_npu", "transformers", "numpy", "pillow"}


# --- nothing lost ---


def test_the_same_command_again_keeps_what_is_there_and_does_the_rest(bulk, tmp_path):
    done = bulk()
    before, times = contents(tmp_path / "out"), {path: path.stat().st_mtime_ns for path in done.parts}
    for part in (1, 4):
        done.parts[part].unlink()
    (tmp_path / "out" / ".part-00001.npz.0123abcd.tmp").write_bytes(b"half a part")
    again = bulk()
    assert contents(tmp_path / "out") == before
    assert [path.stat().st_mtime_ns == times[path] for path in again.parts] == [True, False, True, True, False]
    assert "2 of 5 parts to do" in again.log
    assert not list((tmp_path / "out").glob(".*.tmp"))
    assert "0 images in " in bulk().log


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--part_size", 6], "part_size (5, now 6)"),
        (["--dtype", "float16"], 'dtype ("float32", now "float16")'),
        (["--feature_dtype", "float16"], "feature_dtype"),
        (["--image_size", 32], "image_size (64, now 32)"),
        (["--save_patch_tokens"], "features"),
        (["--layers", 1], "features"),
        (["--allow_hf32"], "allow_hf32 (false, now true)"),
        (["--without", "folded_patches"], "levers"),
        (["--model_path", "native"], ""),
        (["--image_path", str(SAMPLES)], "list of images (23, now 6); --add takes those that no part holds"),
    ],
)
def test_a_command_that_does_not_fit_the_manifest_is_refused(bulk, tiny_native, tmp_path, changes, named):
    before = contents(tmp_path / "out") if bulk().code == 0 else None
    done = bulk(*[tiny_native if flag == "native" else flag for flag in changes])
    assert done.code == 2
    assert f"out: begun with another {named}" in done.last
    assert contents(tmp_path / "out") == before


def test_another_kind_of_device_does_not_go_on(npu, bulk, tmp_path):
    bulk()
    done = bulk("--device", "npu")
    assert done.code == 2
    assert 'out: begun with another device ("cpu", now "npu")' in done.last


def test_parts_of_other_versions_are_named_at_the_end(bulk, monkeypatch, tmp_path):
    done = bulk()
    assert "not all made with the same" not in done.log
    done.parts[3].unlink()
    real = inference.versions
    monkeypatch.setattr(inference, "versions", lambda: real() | {"pillow": "99.0"})
    again = bulk()
    assert again.code == 0
    assert "[WARNING] The parts were not all made with the same versions and device: from part-00000.npz: " in again.log
    assert "from part-00003.npz: {" in again.log and '"pillow": "99.0"' in again.log


def test_parts_without_a_manifest_are_left_alone(bulk, tmp_path):
    bulk()
    (tmp_path / "out" / "manifest.json").unlink()
    done = bulk()
    assert done.code == 2
    assert "it holds parts but no manifest.json" in done.terminal


@pytest.mark.parametrize("damage", ["empty", "cut", "array"])
def test_a_part_that_is_not_whole_is_named_and_made_again(bulk, tmp_path, damage):
    done = bulk()
    before, path = contents(tmp_path / "out"), done.parts[1]
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    path.write_bytes({"empty": b"", "cut": before[path.name][:-900], "array": array.getvalue()}[damage])
    again = bulk()
    assert again.code == 0
    assert f"{path} is damaged (" in again.log and "put aside as part-00001.npz.damaged" in again.log
    assert contents(tmp_path / "out") == before
    assert "1 of 5 parts to do" in again.log


def test_a_full_disk_is_one_line_and_finished_parts_stay(bulk, monkeypatch, tmp_path):
    write, written = np.lib.format.write_array, []

    def full(file, values, **options):
        written.append(file)
        if len(written) == 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, values, **options)

    monkeypatch.setattr(np.lib.format, "write_array", full)
    done = bulk()
    assert done.code == 2
    path = tmp_path / "out" / "part-00002.npz"
    assert done.last == (
        f"error: {path}: cannot be written (No space left on device); "
        f"2 of 5 parts are finished in {tmp_path}/out; run the same command again to go on"
    )
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "manifest.json", "part-00000.npz", "part-00001.npz"]


def test_too_little_disk_is_refused_before_anything_is_computed(bulk, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    done = bulk()
    assert done.code == 2
    assert "needed and 0.000 GB free; make room" in done.terminal
    assert not done.parts
    monkeypatch.undo()
    assert bulk("--feature_dtype", "float16").code == 0  # what it advises


def test_a_batch_is_no_larger_than_what_there_is(bulk, monkeypatch):
    assert bulk("--batch_size", 999999999).code == 0
    assert "batch size 5, eager" in bulk("--batch_size", 999999999, output=bulk().parts[0].parent / "again").log

    def refuse(*_given):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(embed.mmap, "mmap", refuse)
    done = bulk(output=bulk().parts[0].parent / "more")
    assert (done.code, "use a smaller --batch_size or --num_workers" in done.last) == (2, True)


def test_the_manifest_has_the_command_to_repeat(bulk, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["embed.py", "--image_path", str(photos), "--output", "a b"])
    bulk()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    expected = f"python embed.py --image_path {photos} --output 'a b'"
    assert manifest["command"] == manifest["rounds"][0]["command"] == expected


def test_the_last_part_to_hold_an_image_counts_whatever_its_number(tmp_path):
    failed = {"failed_index": np.array([0]), "failed_path": np.array(["a.jpg"]), "failed_reason": np.array(["damaged"])}
    none = {name: values[:0] for name, values in failed.items()}
    common = {"made_with": np.array("")}
    np.savez(tmp_path / "part-99999.npz", path=np.array(["b.jpg"]), **failed, **common)
    np.savez(tmp_path / "part-100000.npz", path=np.array(["a.jpg"]), **none, **common)
    assert embed.write_failures(tmp_path) == 0


def test_the_disk_that_is_needed_is_told_and_one_long_path_changes_little(bulk, tmp_path):
    folder = tmp_path.joinpath(*["x" * 200] * 15)
    folder.mkdir(parents=True)
    shutil.copy(SAMPLES / "chelsea.jpg", folder)
    (tmp_path / "list.txt").write_text(f"{SAMPLES}/chelsea.jpg\n" * 299 + f"{folder}/chelsea.jpg\n")
    done = bulk("--part_size", 300, "--batch_size", 50, images=tmp_path / "list.txt")
    told = float(done.log.split("1 parts to write, ")[1].split(" GB needed")[0])
    taken = done.parts[0].stat().st_size
    assert told * 1e9 == pytest.approx(300 * 2 * 4 * SIZE, rel=0.3, abs=600_000)
    assert taken < 1.2 * 300 * 2 * 4 * SIZE
    assert np.load(done.parts[0])["path"][-1] == f"{folder}/chelsea.jpg"


def test_an_output_that_cannot_be_made_is_named(bulk, tmp_path):
    (tmp_path / "file").touch()
    done = bulk(output=tmp_path / "file" / "out")
    assert done.code == 2
    assert done.last.startswith(f"error: --output {tmp_path}/file/out: the folder cannot be made or written (")
    for wrong in ("", tmp_path / "out.npz"):
        assert bulk(output=wrong).code == 2


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_an_output_folder_that_goes_is_no_success(bulk, monkeypatch, tmp_path, how):
    def gone(key, preprocess):
        if key.index == 21:
            os.rename(tmp_path / "out", tmp_path / "moved")  # at once, where rmtree may race with a part that is being written
            if how == "deleted":
                shutil.rmtree(tmp_path / "moved", ignore_errors=True)
        return read_crop(key, preprocess)

    monkeypatch.setattr(embed, "read_crop", gone)
    done = bulk()
    assert done.code == 2
    assert "it was deleted, moved or unmounted during the run" in done.last
    assert "All 5 parts" not in done.log


@pytest.mark.parametrize("error", ["killed", "timeout", ConnectionResetError, EOFError, BrokenPipeError])
def test_a_worker_that_is_lost_is_one_line(bulk, monkeypatch, request, error):
    parent = os.getpid()

    def deadly(key, preprocess):
        if key.index == 12 and error == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if key.index == 12 and error == "timeout":
            threading.Event().wait(60)
        return read_crop(key, preprocess)

    def in_whatever_runs(_signal, _frame):  # as torch's own handler does
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    submit = inference.Encoder.submit
    monkeypatch.setattr(inference.Encoder, "submit", lambda *given: threading.Event().wait(0.1) or submit(*given))
    before = signal.getsignal(signal.SIGCHLD)
    request.addfinalizer(lambda: signal.signal(signal.SIGCHLD, before))
    loader = torch.utils.data.DataLoader

    def start(*given, **options):
        signal.signal(signal.SIGCHLD, in_whatever_runs)
        return loader(*given, **options)

    monkeypatch.setattr(torch.utils.data, "DataLoader", start)
    monkeypatch.setattr(embed, "read_crop", deadly)
    monkeypatch.setattr(embed, "LOADER_TIMEOUT_S", 1 if error == "timeout" else 60)
    if not isinstance(error, str):
        get, calls = multiprocessing.queues.Queue.get, itertools.count()

        def broken(queue, *arguments, **options):
            if os.getpid() == parent and next(calls) == 5:
                raise error(104, "Connection reset by peer")
            return get(queue, *arguments, **options)

        monkeypatch.setattr(multiprocessing.queues.Queue, "get", broken)
    done = bulk("--num_workers", 1)
    assert done.code == 2, done.terminal
    lost, hangs = (
        "a decoding worker was lost, most likely for lack of memory (",
        "no image came for 1 s, as from a disk or network",
    )
    assert done.last.startswith(f"error: {hangs if error == 'timeout' else lost}")
    assert not multiprocessing.active_children()  # none is waited for
    assert done.last.endswith("run the same command again to go on")


# --- files that are not there ---


def failing(monkeypatch, fails) -> None:
    """Make the disk fail for the images whose name `fails` is true of."""
    real = inference.read_bytes

    def read(path, *span):
        if fails(path):
            raise Unreadable(f"{path}: Input/output error")
        return real(path, *span)

    monkeypatch.setattr(inference, "read_bytes", read)


def test_a_file_that_the_disk_does_not_give_leaves_its_part_for_later(bulk, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        failing(patch, lambda path: path.endswith("06.jpg"))
        done = bulk()
    assert done.code == 2
    assert [path.name for path in done.parts] == ["part-00000.npz", "part-00002.npz", "part-00003.npz", "part-00004.npz"]
    assert "Part 1 is left unwritten: " in done.log and "06.jpg: Input/output error" in done.log
    assert done.last.endswith(f"4 of 5 parts are finished in {tmp_path}/out; run the same command again to go on")
    assert not (tmp_path / "out" / "failures.jsonl").exists()
    assert bulk().code == 0
    bulk(output=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_nothing_more_of_a_part_that_is_given_up_is_read_or_computed(bulk, monkeypatch):
    read, computed = [], []
    failing(monkeypatch, lambda path: read.append(path) or path.endswith("00.jpg"))
    submit = inference.Encoder.submit
    monkeypatch.setattr(
        inference.Encoder, "submit", lambda encoder, crops: computed.append(len(crops)) or submit(encoder, crops)
    )
    done = bulk("--part_size", 20)
    assert done.code == 2
    assert (len(read), sum(computed)) == (4, 3)


def test_a_file_that_may_not_be_read_is_no_bad_image(bulk, monkeypatch, photos, tmp_path):
    real = open

    def refuse(path, *arguments, **options):
        if str(path).endswith("06.jpg"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    done = bulk()
    assert (done.code, len(done.parts)) == (2, 4)
    assert "06.jpg: Permission denied" in done.log


def test_a_lack_of_memory_is_no_bad_image(bulk, monkeypatch, tmp_path):
    real = Image.open

    def short(file, **options):
        if file.getbuffer().nbytes == 0x99999:
            raise MemoryError
        return real(file, **options)

    monkeypatch.setattr(Image, "open", short)
    photo = (SAMPLES / "chelsea.jpg").read_bytes()
    for name in ("a", "b"):
        (tmp_path / f"{name}.jpg").write_bytes(photo + bytes(0x99999 - len(photo) if name == "b" else 0))
    done = bulk("--part_size", 1, images=tmp_path)
    assert (done.code, len(done.parts)) == (2, 1)
    assert "b.jpg: not enough memory to decode it" in done.log


@pytest.fixture
def no_locks(monkeypatch):
    def refuse(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)


def test_where_no_locks_are_it_is_said_once(no_locks, bulk, monkeypatch):
    done = bulk()
    assert (done.code, len(done.parts)) == (0, 5)
    assert done.log.count("no locks there (No locks available)") == 1
    done.parts[1].unlink()
    failing(monkeypatch, lambda path: path.endswith("06.jpg"))
    assert bulk().code == 2


def test_wrong_lines_cost_only_themselves(bulk, photos, tmp_path):
    good = sorted(map(str, photos.iterdir()))
    wrong = [
        "/nowhere/at/all.jpg",
        "https://example.org/a.jpg",
        f" {good[0]}",
        f"{photos}/gone.jpg",
        str(photos),
        f"{good[1]}/x.jpg",
    ]
    lines = [line for pair in itertools.zip_longest(good, wrong) for line in pair if line]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    started = time.monotonic()
    done = bulk(images=tmp_path / "list.txt")
    assert done.code == 0
    assert time.monotonic() - started < 10
    assert rows(tmp_path / "out").keys() == set(good)
    assert {failure["path"] for failure in failures(tmp_path / "out")} == set(wrong)


@pytest.mark.parametrize("what", ["deleted", "emptied", "tar"])
def test_a_folder_that_is_gone_after_it_gave_images_stops_the_run(bulk, photos, monkeypatch, tmp_path, what):
    folder = tmp_path / "disk"
    shutil.copytree(photos, folder)
    images = folder
    if what == "tar":
        images = make_tar(tmp_path / "disk.tar", {path.name: path.read_bytes() for path in sorted(photos.iterdir())})

    def lose(key, preprocess):
        if key.index == 12:
            images.unlink() if what == "tar" else shutil.rmtree(folder)
            if what == "emptied":
                folder.mkdir()
        return read_crop(key, preprocess)

    monkeypatch.setattr(embed, "read_crop", lose)
    done = bulk(images=images)
    assert done.code == 2
    assert f"error: {images} is gone or empty, a lost disk or mount" in done.last
    assert [path.name for path in done.parts] == ["part-00000.npz", "part-00001.npz"]
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


# --- folders that grow ---


def test_a_run_in_two_steps_has_the_rows_of_one(bulk, photos, tmp_path):
    folder = tmp_path / "growing"
    folder.mkdir()
    for name in ("03.jpg", "07.jpg", "11.jpg", "12.jpg", "13.jpg", "14.jpg", "20.jpg"):
        shutil.copy2(photos / name, folder)
    bulk(images=folder)
    before = contents(tmp_path / "out")
    shutil.copytree(photos, folder, dirs_exist_ok=True)
    refused = bulk(images=folder)
    assert refused.code == 2 and "--add takes those that no part holds" in refused.last
    done = bulk("--add", images=folder)
    assert (done.code, len(done.parts)) == (0, 2 + 4)
    assert {name: contents(tmp_path / "out")[name] for name in before} == before
    bulk(images=folder, output=tmp_path / "whole")
    whole, ours = rows(tmp_path / "whole"), rows(tmp_path / "out")
    assert ours.keys() == whole.keys() and len(ours) == 23
    assert all(np.allclose(ours[path], whole[path], atol=1e-5) for path in whole)
    indices = np.concatenate([np.load(path)["index"] for path in done.parts])
    assert indices.tolist() == list(range(23))
    again = bulk("--add", images=folder)
    assert (again.code, len(again.parts)) == (0, 6) and "0 images in " in again.log


def test_added_parts_go_on_where_they_stopped_and_may_follow_an_unfinished_run(bulk, photos, tmp_path):
    folder = tmp_path / "growing"
    folder.mkdir()
    for number in range(12):
        shutil.copy2(photos / f"{number:02d}.jpg", folder)
    bulk(images=folder).parts[1].unlink()
    shutil.copytree(photos, folder, dirs_exist_ok=True)
    done = bulk("--add", images=folder)
    assert len(rows(tmp_path / "out")) == 23
    before = contents(tmp_path / "out")
    done.parts[-2].unlink()
    again = bulk("--add", images=folder)
    assert "1 of 4 parts to do" in again.log
    assert contents(tmp_path / "out") == before


def test_changed_files_are_named_and_failures_done_again(bulk, photos, tmp_path):
    folder = broken_copy(photos, tmp_path / "photos", "03.jpg", "21.jpg")
    bulk(images=folder)
    shutil.copy2(photos / "03.jpg", folder)
    Image.open(photos / "08.jpg").resize((70, 70)).save(folder / "08.jpg")
    done = bulk("--retry_failed", images=folder)
    assert (done.code, len(done.parts)) == (0, 6)
    assert f"1 files have changed since their rows were made, which stay: {folder}/08.jpg" in done.log
    assert len(rows(tmp_path / "out")) == 22
    assert [failure["path"] for failure in failures(tmp_path / "out")] == [f"{folder}/21.jpg"]
    shutil.copy2(photos / "21.jpg", folder)
    assert bulk("--retry_failed", images=folder).code == 0
    assert rows(tmp_path / "out").keys() == {str(path) for path in folder.iterdir()}
    assert failures(tmp_path / "out") == []
    assert np.load(tmp_path / "out" / "part-00006.npz")["index"].tolist() == [25]
    done = bulk(images=folder)
    assert (done.code, f"{tmp_path}/out: repeat the last command, or use --add; it was: python " in done.last) == (2, True)


# --- devices, memory, graphs ---


def test_out_of_memory_in_a_bulk_run_halves_the_batch_and_changes_nothing_else(npu, bulk, monkeypatch, tmp_path):
    expected = bulk("--device", "npu", "--batch_size", 16, "--part_size", 20, output=tmp_path / "roomy")
    load_model = inference.load_model

    def load_and_limit(*arguments, **options):
        model = load_model(*arguments, **options)
        npu.memory.limit = npu.memory.allocated + 1_500_000
        return model

    monkeypatch.setattr(inference, "load_model", load_and_limit)
    done = bulk("--device", "npu", "--batch_size", 16, "--part_size", 20, output=tmp_path / "tight")
    assert done.code == 0
    assert "[WARNING] Out of memory on npu:0 with batch size 16: going on with 8" in done.log
    for part, reference in zip(done.parts, expected.parts, strict=True):
        values, exact = np.load(part)["class_token"], np.load(reference)["class_token"]
        assert np.linalg.norm(values - exact) < 5e-6 * np.linalg.norm(exact)


def test_a_bulk_run_by_graph_equals_eager(npu, bulk, tmp_path):
    eager, graph = (bulk("--device", "npu", "--execution", kind, output=tmp_path / kind) for kind in ("eager", "graph"))
    for part, reference in zip(graph.parts, eager.parts, strict=True):
        values, exact = np.load(part)["class_token"], np.load(reference)["class_token"]
        assert np.linalg.norm(values - exact) < 1e-6 * np.linalg.norm(exact)


def test_workers_fit_the_cores_the_ranks_and_memory(npu, monkeypatch):
    device = inference.open_device("npu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(32), raising=False)
    assert embed.default_num_workers(device, 64, 224) == 16
    assert embed.default_num_workers(device, 512, 448) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert embed.default_num_workers(device, 64, 224) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    assert embed.default_num_workers(device, 64, 224) == 3


# --- processes ---


@pytest.fixture(autouse=True)
def one_thread():
    """A forked child computes in one thread: so does what it is compared with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def start(tmp_path, flags, photos):
    """Start a run that waits for `seconds` at each batch, in a process group of its own; go on when its first part is there."""
    running = []

    def child(arguments: list[str], terminal: Path, seconds: float) -> None:
        os.setsid()
        os.dup2(os.open(terminal, os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        torch.set_num_threads(1)
        submit = inference.Encoder.submit
        inference.Encoder.submit = lambda encoder, crops: threading.Event().wait(seconds) or submit(encoder, crops)
        os._exit(embed.main(arguments))

    def start_run(output: Path, seconds: float = 0.2) -> SimpleNamespace:
        arguments = [
            "--image_path",
            photos,
            "--output",
            output,
            *flags,
            "--num_workers",
            1,
            "--output_log",
            tmp_path / "slow.log",
        ]
        process = multiprocessing.get_context("fork").Process(
            target=child, args=(list(map(str, arguments)), tmp_path / "terminal", seconds)
        )
        process.start()
        running.append(process)
        deadline = time.monotonic() + 60
        while not (output / "part-00000.npz").exists():
            assert process.is_alive() and time.monotonic() < deadline, (tmp_path / "terminal").read_text()
            time.sleep(0.01)
        return process

    yield start_run
    for process in running:
        process.kill()
        process.join()


def test_runs_of_one_command_share_the_parts_and_others_are_refused(start, bulk, tmp_path):
    process = start(tmp_path / "shared", seconds=0.5)
    for flags, reason in ((("--image_size", 32), "begun with another image_size"), (("--add",), "another run writes to it")):
        refused = bulk(*flags, images=SAMPLES, output=tmp_path / "shared")
        assert refused.code == 2 and reason in refused.last
    done = bulk(output=tmp_path / "shared")
    process.join(30)
    assert (done.code, process.exitcode) == (0, 0)
    made = [int(log.split(" images in ")[0].split()[-1]) for log in (done.log, (tmp_path / "slow.log").read_text())]
    assert sum(made) == 23 and min(made) >= 5
    bulk(output=tmp_path / "whole")
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")


def test_after_kill_9_the_same_command_goes_on_at_once(start, bulk, tmp_path):
    process = start(tmp_path / "killed")
    process.kill()
    process.join()
    survived = contents(tmp_path / "killed")
    assert 1 <= len(survived) < 5
    assert bulk("--num_workers", 1, output=tmp_path / "killed").code == 0
    bulk(output=tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM to all", "SIGHUP to all", "twice"])
def test_a_stopped_run_says_how_to_go_on(start, tmp_path, how):
    process = start(tmp_path / "stopped")
    name = "SIGINT" if how == "twice" else how.split()[0]
    if how.endswith("all"):
        os.killpg(process.pid, getattr(signal, name))
    else:
        os.kill(process.pid, getattr(signal, name))
    if how == "twice":
        os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.01)
    terminal = (tmp_path / "terminal").read_text()
    finished = len(contents(tmp_path / "stopped"))
    assert process.exitcode == 130, terminal
    last = terminal.splitlines()[-1]
    assert last.endswith(f" of 5 parts are finished in {tmp_path}/stopped; run the same command again to go on")
    assert last.startswith(f"stopped; {finished}" if how != "twice" else "stopped; ")
    assert "Traceback" not in terminal and "killed by signal" not in terminal


def test_parts_are_shared_out_without_locks_too_and_the_number_of_ranks_may_change(no_locks, bulk, monkeypatch, tmp_path):
    whole = bulk(output=tmp_path / "whole")
    assert whole.code == 0
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    first = bulk(output=tmp_path / "shared")
    assert (first.code, [path.name for path in first.parts]) == (0, ["part-00001.npz", "part-00004.npz"])
    assert "[INFO]" not in first.terminal and "[INFO]" in first.log
    assert not (tmp_path / "shared" / "failures.jsonl").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    bulk(output=tmp_path / "shared")
    monkeypatch.setenv("RANK", "1")
    bulk(output=tmp_path / "shared")
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")
    assert (tmp_path / "shared" / "failures.jsonl").exists()


def test_of_two_processes_that_end_at_once_one_is_the_last(tmp_path):
    ours, theirs = multiprocessing.Pipe()

    def other() -> None:
        with embed.FolderLock(tmp_path) as lock:
            lock.start_work()
            theirs.send("there")
            theirs.recv()
            theirs.send(lock.is_alone(then=fcntl.LOCK_UN))

    process = multiprocessing.get_context("fork").Process(target=other)
    with embed.FolderLock(tmp_path) as lock:
        lock.start_work()
        process.start()
        assert ours.poll(30) and ours.recv() == "there"
        first = lock.is_alone(then=fcntl.LOCK_UN)
        ours.send("go on")
        assert ours.poll(30) and (first, ours.recv()) == (False, True)
    process.join()


def test_who_waits_for_the_plan_is_not_at_work(bulk, photos, tmp_path, monkeypatch):
    """Else torchrun's --add would be refused, and its --retry_failed do nothing, whenever ranks come at once."""
    folder = broken_copy(photos, tmp_path / "photos", "03.jpg")
    bulk(images=folder)
    shutil.copy2(photos / "03.jpg", folder)
    waiting, theirs = multiprocessing.Pipe()

    def other() -> None:
        with embed.FolderLock(tmp_path / "out") as lock:
            theirs.send("there")
            with lock.one_at_a_time():
                pass

    process = multiprocessing.get_context("fork").Process(target=other)
    plan = embed.plan

    def plan_beside_another(*given):
        process.start()
        assert waiting.poll(30) and waiting.recv() == "there"
        return plan(*given)

    monkeypatch.setattr(embed, "plan", plan_beside_another)
    done = bulk("--retry_failed", images=folder)
    process.join(30)
    assert (done.code, len(done.parts), failures(tmp_path / "out")) == (0, 6, [])


def test_what_another_left_unmade_is_told(bulk, photos, tmp_path, monkeypatch):
    ours, theirs = multiprocessing.Pipe()

    def other() -> None:  # holds a part, and goes without having made it
        with embed.FolderLock(tmp_path / "out") as lock:
            lock.start_work()
            lock.claim(2)
            theirs.send("there")
            theirs.recv()

    process, finish = multiprocessing.get_context("fork").Process(target=other), embed.finish
    process.start()
    assert ours.poll(30) and ours.recv() == "there"

    def finish_alone(*given):
        ours.send("end")
        process.join(30)
        finish(*given)

    monkeypatch.setattr(embed, "finish", finish_alone)
    done = bulk()
    assert (done.code, len(done.parts)) == (2, 4)
    assert "1 parts are left unwritten because another process ended early, or could not read files" in done.last


@pytest.mark.parametrize(("rank", "ranks"), [("1", None), (None, "2"), ("2", "2"), ("x", "2")])
def test_half_an_environment_of_torchrun_is_refused(bulk, monkeypatch, rank, ranks):
    for name, value in (("RANK", rank), ("WORLD_SIZE", ranks)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    done = bulk()
    assert (done.code, done.parts) == (2, [])
    assert "RANK" in done.last and "torchrun" in done.last


def troubled_rank(arguments: list[str], folder: Path) -> None:
    """Rank 1 is killed at its first start, and slow at its second; rank 0 waits until it is there. 12.jpg cannot be read."""
    rank = os.environ["RANK"]
    if (rank, os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    submit = inference.Encoder.submit

    def slow(encoder, crops):
        if rank == "1":
            (folder / "there").touch()
        while rank == "0" and not (folder / "there").exists():
            threading.Event().wait(0.05)
        threading.Event().wait(0.3 if rank == "1" else 0)
        return submit(encoder, crops)

    inference.Encoder.submit = slow
    sys.exit(embed.main(arguments))


def torchrun(arguments: list[str], folder: Path) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "start_method": "fork", "max_restarts": 1}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="test", **options)
    elastic_launch(config, troubled_rank)(arguments, folder)


def test_torchrun_brings_a_killed_rank_back_and_lets_no_spoiled_part_end_the_others(bulk, flags, photos, monkeypatch, tmp_path):
    flags = ["--image_path", photos, "--output", tmp_path / "out", *flags, "--output_log", tmp_path / "ranks.log"]
    with monkeypatch.context() as patch:
        failing(patch, lambda path: path.endswith("12.jpg"))
        process = multiprocessing.get_context("fork").Process(target=torchrun, args=(list(map(str, flags)), tmp_path))
        process.start()
        process.join(60)
    log = (tmp_path / "ranks.log").read_text()
    assert process.exitcode == 1, log
    assert "Part 2 is left unwritten" in log
    assert log.count("Rank 1 of 2") == 1
    assert sorted(contents(tmp_path / "out")) == [f"part-0000{part}.npz" for part in (0, 1, 3, 4)], log
    assert log.count("1 parts are left unwritten because files could not be read; 4 of 5 parts are finished") == 1
    assert bulk().code == 0
    bulk(output=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert failures(tmp_path / "out") == []


def test_wrong_flags_are_answered_before_torch_is_imported(tmp_path):
    started = time.perf_counter()
    done = run_script("embed.py", "--image_path", "x", "--output", "f.npz")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "a folder is wanted" in done.stderr
    code = "import sys, embed; embed.make_parser().format_help(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert time.perf_counter() - started < 30
