"""Images, tars and output in object storage: the same rows, bit for bit, as from and to folders of this machine."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("moto", reason="moto is not installed: pip install -r tests/cluster/requirements.txt")
pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -r requirements-cluster.txt")

import inference
import fsspec
from object_store import PAGE, Proxy, client, download, s3_server, upload, use
from PIL import Image

import embed
from bulk import rounds, storage
from conftest import SAMPLES


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Nine small photographs at two depths, one of them damaged, and two tars with captions of seven and five."""
    folder = tmp_path_factory.mktemp("data")
    originals = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.[jp]*g"))]

    def photo(number: int) -> bytes:
        file = io.BytesIO()
        originals[number % len(originals)].resize((90 + 3 * number, 80 + 2 * number)).save(file, "JPEG")
        return file.getvalue()

    for number in range(9):
        path = folder / "photos" / ("sub" if number % 3 == 2 else "") / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number)[: 900 if number == 4 else None])
    (folder / "photos" / "notes.md").write_text("no image")
    (folder / "shards").mkdir()
    for first, count in ((20, 7), (40, 5)):
        with tarfile.open(folder / "shards" / f"{first:05d}.tar", "w") as tar:
            for number in range(first, first + count):
                texts = {"txt": f"caption {number}", "json": json.dumps({"url": f"https://example.org/{number}"})}
                for suffix, text in {"jpg": photo(number), **{name: text.encode() for name, text in texts.items()}}.items():
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(text)
                    tar.addfile(info, io.BytesIO(text))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, data):
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as address:
        upload(address, data, "data")
        yield address


@pytest.fixture
def s3(server, monkeypatch):
    """A new bucket for the output, where the library looks for it. The data lies in another."""
    use(monkeypatch, server)
    monkeypatch.setattr(rounds, "LEASE_S", 3)
    store = client(server)
    bucket = f"out-{time.time_ns()}"
    store.create_bucket(Bucket=bucket)
    return SimpleNamespace(store=store, address=server, bucket=bucket)


@pytest.fixture
def bulk(run, tiny_folder):
    """Run embed.py in parts of 4, batches of 2."""

    def run_bulk(*images, output, flags=()):
        common = ("--model_path", tiny_folder, "--device", "cpu", "--part_size", 4, "--batch_size", 2, "--num_workers", 0)
        return run("--image_path", *images, "--output", output, *common, *flags, main=embed.main, name="embed")

    return run_bulk


def rows(folder: Path, was: str = "", now: str = "") -> list[tuple]:
    """All that parts hold of their images but for times: names, where they begin with `was`, with `now` instead."""
    found = []
    for path in sorted(folder.glob("part-*.npz")):
        with np.load(path) as part:
            for name in ("path", "failed_path"):
                assert all(value.startswith(was) for value in part[name].tolist())
            names = ("index", "size", "caption", "url", "key", "class_token", "mean_patch_token")
            values = [part[name] for name in names]
            paths = [now + value.removeprefix(was) for value in part["path"].tolist()]
            found.append((path.name, paths, *((value.dtype.str, value.shape, value.tobytes()) for value in values)))
            failed = [now + value.removeprefix(was) for value in part["failed_path"].tolist()]
            found.append((failed, part["failed_index"].tolist(), part["failed_reason"].tolist()))
    assert found
    return found


def fetched(s3, folder: Path, prefix: str = "features/") -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return download(s3.address, s3.bucket, prefix, folder)


def times(s3) -> dict:
    listed = s3.store.list_objects_v2(Bucket=s3.bucket)["Contents"]
    return {found["Key"]: found["ETag"] for found in listed if ".npz" in found["Key"]}


WAYS = {
    "a folder": ["photos"],
    "a folder with a slash": ["photos/"],
    "one image": ["photos/sub/02.jpg"],
    "a glob": ["photos/*.jpg"],
    "a deep glob": ["photos/**/0*.jpg"],
    "all below": ["photos/**"],
    "a tar": ["shards/00020.tar"],
    "a folder of tars": ["shards"],
    "all": ["photos", "shards/*.tar"],
}


@pytest.mark.parametrize("scheme", ["s3", "obs"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_read_and_written_there_is_what_is_read_and_written_here(way, scheme, bulk, data, s3, tmp_path):
    if scheme == "obs" and way not in ("a folder", "a glob", "all"):
        pytest.skip("the same code as s3://")
    here = bulk(*(data / path for path in WAYS[way]), output=tmp_path / "here")
    there = bulk(*(f"{scheme}://data/{path}" for path in WAYS[way]), output=f"{scheme}://{s3.bucket}/features/")
    assert (here.code, there.code) == (0, 0), there.terminal
    found = fetched(s3, tmp_path / "there")
    assert rows(found, f"{scheme}://data/") == rows(tmp_path / "here", f"{data}/")
    assert (found / "failures.jsonl").read_text().replace(f"{scheme}://data/", f"{data}/") == (
        tmp_path / "here" / "failures.jsonl"
    ).read_text()
    assert sorted(path.name for path in found.iterdir() if path.name != ".lock") == sorted(
        path.name for path in (tmp_path / "here").iterdir() if path.name != ".lock"
    )
    assert json.loads((found / "manifest.json").read_text())["rounds"][0]["first_index"] == 0


def test_file_is_this_machine(bulk, data, tmp_path):
    """The names too: what file:// wrote, a plain path goes on with."""
    assert bulk(f"file://{data}/photos", output=f"file://{tmp_path}/out").code == 0
    assert rows(tmp_path / "out", f"{data}/")
    again = bulk(data / "photos", output=tmp_path / "out")
    assert (again.code, "0 of 3 parts to do" in again.log) == (0, True)
    (tmp_path / "list.txt").write_text(f"file://{data}/photos/00.jpg\nfile://{data}/shards/00020.tar/0021.jpg\n")
    assert bulk(tmp_path / "list.txt", output=tmp_path / "listed").code == 0
    assert rows(tmp_path / "listed", f"{data}/")[0][1] == ["photos/00.jpg", "shards/00020.tar/0021.jpg"]


def test_a_list_may_lie_there_and_name_what_lies_there(bulk, data, s3, tmp_path):
    """Images, members of tars, and whole tars; what a row calls its image can be given back in a list."""
    names = ["photos/03.jpg", "shards/00020.tar/0024.jpg", "photos/sub/05.jpg", "shards/00040.tar", "photos/gone.jpg"]
    for folder, root in ((tmp_path, data), (None, "s3://data")):
        listing = "".join(f"{root}/{name}\n" for name in names)
        if folder:
            (folder / "list.txt").write_text(listing)
        else:
            s3.store.put_object(Bucket=s3.bucket, Key="list.txt", Body=listing.encode())
    assert bulk(tmp_path / "list.txt", output=tmp_path / "here").code == 0
    there = bulk(f"s3://{s3.bucket}/list.txt", output=f"s3://{s3.bucket}/features")
    assert there.code == 0, there.terminal
    here, found = rows(tmp_path / "here", f"{data}/"), rows(fetched(s3, tmp_path / "there"), "s3://data/")
    assert found[0] == here[0]
    assert found[2:] == here[2:]
    assert found[1][:2] == here[1][:2] == (["photos/gone.jpg"], [3])


def test_here_and_there_can_be_mixed(bulk, data, s3, tmp_path):
    assert bulk(data / "photos", output=tmp_path / "here").code == 0
    assert bulk("s3://data/photos", output=tmp_path / "from there").code == 0
    assert bulk(data / "photos", output=f"s3://{s3.bucket}/features").code == 0
    expected = rows(tmp_path / "here", f"{data}/")
    assert rows(tmp_path / "from there", "s3://data/") == expected
    assert rows(fetched(s3, tmp_path / "to there"), f"{data}/") == expected


def test_only_what_is_missing_is_made_again(bulk, s3):
    output = f"s3://{s3.bucket}/features"
    assert bulk("s3://data/photos", "s3://data/shards", output=output).code == 0
    before = times(s3)
    s3.store.delete_object(Bucket=s3.bucket, Key="features/part-00001.npz")
    s3.store.delete_object(Bucket=s3.bucket, Key="features/part-00003-0000.npz")
    again = bulk("s3://data/photos", "s3://data/shards", output=output)
    assert (again.code, "2 of 5 parts to do" in again.log) == (0, True)
    assert times(s3) == before
    assert "another list of images" in bulk("s3://data/photos", output=output).terminal


def test_what_has_changed_there_is_made_again(bulk, data, server, s3, tmp_path):
    upload(server, data, s3.bucket, "own/")
    images, output = f"s3://{s3.bucket}/own/photos", f"s3://{s3.bucket}/features"
    assert bulk(images, f"s3://{s3.bucket}/own/shards", output=output).code == 0
    before = times(s3)
    time.sleep(1)  # the server's times have whole seconds
    s3.store.upload_file(str(data / "photos" / "00.jpg"), s3.bucket, "own/photos/07.jpg")
    s3.store.upload_file(str(data / "shards" / "00040.tar"), s3.bucket, "own/shards/00020.tar")
    again = bulk(images, f"s3://{s3.bucket}/own/shards", output=output)
    assert again.code == 0
    assert f"2 have changed, and their parts are made anew: {images}/07.jpg, s3://{s3.bucket}/own/shards/00020.tar" in again.log
    now = times(s3)
    assert {name for name in before if before[name] != now.get(name)} == {
        "features/part-00001.npz",
        "features/part-00003.npz",
        "features/part-00003-0000.npz",
    }
    part = fetched(s3, tmp_path / "there") / "part-00003.npz"
    assert np.load(part)["caption"].tolist() == ["caption 44"]


def test_further_images_and_failed_ones_get_further_parts(bulk, data, server, s3, tmp_path):
    upload(server, data, s3.bucket, "own/")
    images, output = f"s3://{s3.bucket}/own", f"s3://{s3.bucket}/features"
    assert bulk(images, output=output).code == 0
    before = times(s3)
    s3.store.upload_file(str(data / "photos" / "00.jpg"), s3.bucket, "own/photos/new.jpg")
    added = bulk(images, output=output, flags=["--add"])
    assert (added.code, "1 of 1 parts to do" in added.log) == (0, True), added.terminal
    s3.store.upload_file(str(data / "photos" / "01.jpg"), s3.bucket, "own/photos/04.jpg")
    retried = bulk(images, output=output, flags=["--retry_failed"])
    assert retried.code == 0, retried.terminal
    assert before.items() <= times(s3).items()
    folder = fetched(s3, tmp_path / "there")
    assert np.load(folder / "part-00005.npz")["path"].tolist() == [f"{images}/photos/new.jpg"]
    assert np.load(folder / "part-00006.npz")["path"].tolist() == [f"{images}/photos/04.jpg"]
    assert (folder / "failures.jsonl").read_text() == ""


def test_tars_are_read_by_ranges(bulk, data, server, s3, monkeypatch, tmp_path):
    """What is asked for of a tar is a stretch each time, and each image once."""
    proxy = Proxy(server)
    use(monkeypatch, proxy.address)
    assert bulk("s3://data/shards/00020.tar", output=tmp_path / "out").code == 0
    proxy.close()
    asked = [request for request in proxy.seen if request.method == "GET" and request.path.endswith("00020.tar")]
    assert len(asked) >= 7
    assert all(request.headers.get("Range", "").startswith("bytes=") for request in asked)
    assert bulk(data / "shards" / "00020.tar", output=tmp_path / "here").code == 0
    assert rows(tmp_path / "out", "s3://data/") == rows(tmp_path / "here", f"{data}/")


def test_folders_of_systems_and_markers_are_no_images(s3):
    for key in (
        "a/",
        "a/x.jpg",
        "a/.thumbnails/x.jpg",
        "a/b/",
        "a/b/@eaDir/y.jpg",
        "a/b/y.JPG",
        "a/b.jpg",
        "a/B/z.jpg",
        "a/t.txt",
    ):
        s3.store.put_object(Bucket=s3.bucket, Key=key, Body=b"")
    sources = embed.list_sources([f"s3://{s3.bucket}/a"])
    names = [key.name.removeprefix(f"s3://{s3.bucket}/a/") for key in sources.files]
    assert names == ["b.jpg", "x.jpg", "B/z.jpg", "b/y.JPG"]
    assert sources.left_out == {"system folders left out": 2, "other files ignored": 1}


def test_a_prefix_of_thousands_is_listed_whole(s3):
    """This server answers PAGE names at once, others a thousand."""
    for number in range(3 * PAGE + 1):
        s3.store.put_object(Bucket=s3.bucket, Key=f"many/{number:05d}.jpg", Body=b"")
    for way in ("many", "many/*", "m*/*.jpg"):
        assert len(embed.list_sources([f"s3://{s3.bucket}/{way}"]).files) == 3 * PAGE + 1
    assert len(storage.names_in(f"s3://{s3.bucket}/many")) == 3 * PAGE + 1


def test_workers_read_there_though_this_process_has(bulk, s3, monkeypatch, tmp_path):
    """They are forked from one that has a client with connections, threads and locks, in the midst of its requests."""
    monkeypatch.setattr(rounds, "LEASE_S", 0.15)  # the lock is written again every 0.05 s
    assert bulk("s3://data", output=f"s3://{s3.bucket}/features").code == 0
    expected = rows(fetched(s3, tmp_path / "alone"))
    for attempt in range(3):
        done = bulk("s3://data", output=f"s3://{s3.bucket}/again{attempt}", flags=["--num_workers", 2])
        assert done.code == 0, done.terminal
        assert rows(fetched(s3, tmp_path / "workers", f"again{attempt}/")) == expected


def test_other_systems_are_written_by_a_move_and_keep_their_hosts(bulk, data, monkeypatch, tmp_path):
    """As hdfs://host/ has it: its files are called without the host there."""

    class WithHost(type(fsspec.filesystem("memory"))):
        protocol, store, pseudo_dirs = "hosted", {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            path = str(path)
            if path.startswith("hosted://"):
                host, _, path = path.removeprefix("hosted://").partition("/")
                assert host == "node:8020"
            return super()._strip_protocol("/" + path.lstrip("/"))

    fsspec.register_implementation("hosted", WithHost, clobber=True)
    system = WithHost()
    system.put(f"{data}/photos", "/photos", recursive=True)
    names = [key.name for key in embed.list_sources(["hosted://node:8020/photos"]).files]
    assert names[0] == "hosted://node:8020/photos/00.jpg"
    assert len(names) == 9
    assert len(embed.list_sources(["hosted://node:8020/photos/0*.jpg"]).files) == 6
    moved = []
    monkeypatch.setattr(
        WithHost, "mv", lambda self, old, new, **_: (moved.append(new), type(system).__mro__[1].mv(self, old, new))
    )
    done = bulk("hosted://node:8020/photos", output="hosted://node:8020/features")
    assert done.code == 0, done.terminal
    assert "/features/part-00000.npz" in moved
    system.get("/features", f"{tmp_path}/there", recursive=True)
    assert bulk(data / "photos", output=tmp_path / "here").code == 0
    assert rows(tmp_path / "there", "hosted://node:8020/") == rows(tmp_path / "here", f"{data}/")


def test_a_system_that_is_not_installed_says_what_to_install(bulk, tmp_path, monkeypatch):
    assert "Run: pip install what fsspec wants for nosuch" in bulk("nosuch://x/y.jpg", output=tmp_path / "out").terminal
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    for address in ("s3://data/y.jpg", "obs://data/y.jpg"):
        done = bulk(address, output=tmp_path / "out")
        assert (done.code, "Run: pip install -r requirements-cluster.txt" in done.terminal) == (2, True)


def test_a_block_that_raises_writes_nothing(s3):
    with pytest.raises(ZeroDivisionError), storage.replacing(f"s3://{s3.bucket}/x") as file:
        file.write(b"a half")
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError):
        storage.entry_of(f"s3://{s3.bucket}/x")
    assert storage.names_in(f"s3://{s3.bucket}") == []
    with pytest.raises(inference.UsageError, match="cannot be written"), storage.replacing("s3://nosuchbucket/x") as file:
        file.write(b"x")
