"""An object store that is slow, refuses, cuts answers short, does not know us: one clear line, nothing lost, no secret told."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("moto", reason="moto is not installed: pip install -r tests/cluster/requirements.txt")
pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -r requirements-cluster.txt")

import inference
from object_store import (
    KEY,
    SECRET,
    Proxy,
    client,
    download,
    environment,
    require_credentials,
    s3_server,
    upload,
    use,
    wait_for,
)
from PIL import Image

import embed
import embed_cluster
from bulk import rounds, storage
from conftest import ROOT, SAMPLES, script_environment

ALL = [f"features/part-{number:05d}.npz" for number in range(3)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    originals = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.[jp]*g"))]
    for number in range(9):
        (folder / str(number // 4)).mkdir(exist_ok=True)
        originals[number % len(originals)].resize((90 + 3 * number, 80)).save(folder / str(number // 4) / f"{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, photos):
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as address:
        upload(address, photos, "data", "photos/")
        yield address


@pytest.fixture
def s3(server, monkeypatch):
    """A proxy before the server, and a new bucket for the output."""
    proxy = Proxy(server)
    use(monkeypatch, proxy.address)
    monkeypatch.setattr(rounds, "LEASE_S", 3)
    sleep = time.sleep
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: sleep(min(seconds, 0.3)))
    store = client(server)
    bucket = f"out-{time.time_ns()}"
    store.create_bucket(Bucket=bucket)
    yield SimpleNamespace(store=store, address=server, bucket=bucket, proxy=proxy, output=f"s3://{bucket}/features")
    proxy.close()


@pytest.fixture
def flags(tiny_folder) -> list[str]:
    common = ("--model_path", tiny_folder, "--device", "cpu", "--part_size", 4, "--batch_size", 2, "--num_workers", 0)
    return [*map(str, common)]


@pytest.fixture
def bulk(run, flags, tmp_path, s3, monkeypatch):
    """Run embed.py on what is there; whatever it tells, or leaves in a file, holds no secret."""

    def run_bulk(*more, images="s3://data/photos", output=s3.output):
        done = run("--image_path", images, "--output", output, *flags, *more, main=embed.main, name="embed")
        done.last = done.terminal.strip().splitlines()[-1]
        no_secret_in(done.terminal, done.log, str(os.listdir(tmp_path)))
        assert "Traceback" not in done.log + done.terminal
        return done

    return run_bulk


def no_secret_in(*texts: str) -> None:
    for text in texts:
        assert SECRET not in text
        assert KEY not in text


def names(s3) -> list[str]:
    listed = s3.store.list_objects_v2(Bucket=s3.bucket).get("Contents", [])
    return [found["Key"] for found in listed if found["Key"].endswith(".npz")]


def features(s3, folder: Path) -> dict[str, bytes]:
    """By name of the image."""
    download(s3.address, s3.bucket, "features/", folder)
    parts = [np.load(path) for path in sorted(folder.glob("part-*.npz"))]
    assert not any(part["failed_path"].size for part in parts)
    return {name: row.tobytes() for part in parts for name, row in zip(part["path"].tolist(), part["class_token"])}


@pytest.fixture(scope="module")
def expected(photos, tiny_folder, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    common = ("--model_path", tiny_folder, "--device", "cpu", "--part_size", 4, "--batch_size", 2, "--num_workers", 0)
    log = ("--output_log", folder / "log")
    assert embed.main([*map(str, ("--image_path", photos, "--output", folder / "out", *common, *log))]) == 0
    parts = [np.load(path) for path in sorted((folder / "out").glob("part-*.npz"))]
    names = [name.replace(f"{photos}/", "s3://data/photos/") for part in parts for name in part["path"].tolist()]
    return dict(zip(names, (row.tobytes() for part in parts for row in part["class_token"])))


PASSING = {
    "slow": lambda request: 0.3,
    "503 now and then": lambda request: 503 if request.number == 1 and request.method != "POST" else None,
    "503 twice for each image": lambda request: 503 if ".jpg" in request.path and request.number < 3 else None,
    "500 at each upload": lambda request: 500 if request.method == "PUT" and request.number == 1 else None,
    "cut in the middle": lambda request: "cut" if request.method == "GET" and request.number < 3 else None,
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_waited_for(fault, bulk, s3, expected, tmp_path):
    s3.proxy.fault = PASSING[fault]
    done = bulk()
    assert done.code == 0, done.terminal
    assert features(s3, tmp_path / "out") == expected


@pytest.mark.parametrize("fault", [503, 403, "cut"])
def test_an_image_that_cannot_be_read_leaves_its_part_unwritten_and_no_other(fault, bulk, s3, expected, tmp_path):
    s3.proxy.fault = lambda request: fault if request.method == "GET" and request.path.endswith("5.jpg") else None
    done = bulk()
    assert done.code == 2
    assert "Part 1 is left unwritten: s3://data/photos/1/5.jpg: " in done.log
    assert done.last.endswith("2 of 3 parts are finished in " + s3.output + "; run the same command again to go on")
    assert names(s3) == [ALL[0], ALL[2]]
    s3.proxy.fault = lambda request: None
    again = bulk()
    assert (again.code, "1 of 3 parts to do" in again.log) == (0, True)
    assert features(s3, tmp_path / "out") == expected


def test_a_part_that_cannot_be_uploaded_ends_the_run_and_the_same_command_goes_on(bulk, s3, expected, tmp_path):
    s3.proxy.fault = lambda request: 503 if request.method == "PUT" and "part-00001" in request.path else None
    done = bulk()
    assert done.code == 2
    assert f"{s3.output}/part-00001.npz: cannot be written (" in done.last
    assert done.last.endswith("run the same command again to go on")
    assert ALL[0] in names(s3) and ALL[1] not in names(s3)
    s3.proxy.fault = lambda request: None
    assert bulk().code == 0
    assert features(s3, tmp_path / "out") == expected


@pytest.mark.parametrize("fault", [503, 403])
@pytest.mark.parametrize("way", ["photos", "photos/*/*.jpg", "photos/**", "photos/**/*.jpg"])
def test_what_cannot_be_listed_is_not_left_out(way, fault, bulk, s3):
    """fsspec's own walk leaves it out without a word."""
    s3.proxy.fault = lambda request: fault if "prefix=photos%2F1" in request.path else None
    done = bulk(images=f"s3://data/{way}")
    assert (done.code, names(s3)) == (2, [])
    assert f"--image_path s3://data/{way}: cannot be read (" in done.last


@pytest.mark.parametrize("fault", [503, 403])
def test_a_tar_or_list_that_cannot_be_looked_at_is_not_taken_for_none(fault, bulk, s3):
    for name in ("x.tar", "x.txt"):
        s3.store.put_object(Bucket=s3.bucket, Key=f"in/{name}", Body=b"")
        s3.proxy.fault = lambda request, name=name: fault if name in request.path else None
        for images in (f"s3://{s3.bucket}/in/{name}", f"s3://{s3.bucket}/i*/{name}"):
            done = bulk(images=images)
            assert (done.code, f"--image_path {images}: cannot be read (" in done.last) == (2, True), done.terminal


def test_a_part_that_a_token_that_has_expired_cannot_read_is_not_put_aside(bulk, s3):
    """The store answers 400 then, which s3fs makes the error of a damaged file."""
    assert bulk().code == 0
    s3.proxy.fault = lambda request: 400 if request.method in ("GET", "HEAD") and "part-00001.npz" in request.path else None
    done = bulk()
    assert (done.code, f"{s3.output}/part-00001.npz: cannot be read (" in done.last) == (2, True)
    assert names(s3) == ALL


def test_a_bucket_that_is_not_there(bulk, s3, tmp_path):
    done = bulk(images="s3://nosuchbucket/photos", output=tmp_path / "out")
    assert (done.code, "--image_path s3://nosuchbucket/photos: no such file or folder" in done.last) == (2, True)
    done = bulk(output="s3://nosuchbucket/features")
    assert (done.code, "--output s3://nosuchbucket/features: " in done.last, "Loading" in done.log) == (2, True, False)
    assert "does not exist" in done.last


def test_a_store_that_does_not_answer(bulk, s3, monkeypatch):
    use(monkeypatch, "http://127.0.0.1:9")
    done = bulk()
    assert (done.code, "Could not connect" in done.last) == (2, True)


@pytest.fixture
def reader(s3, server):
    """Key and secret of a user who may read all and write nothing; the server looks at who asks from now on."""
    iam = client(server, "iam")
    name = f"reader{time.time_ns()}"
    iam.create_user(UserName=name)
    actions = ["s3:GetObject", "s3:ListBucket", "s3:HeadObject", "s3:HeadBucket"]
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}]}
    iam.put_user_policy(UserName=name, PolicyName="read", PolicyDocument=json.dumps(policy))
    made = iam.create_access_key(UserName=name)["AccessKey"]
    require_credentials(server, True)
    yield {"key": made["AccessKeyId"], "secret": made["SecretAccessKey"]}
    require_credentials(server, False)


def test_who_may_read_but_not_write_is_told_so_before_anything_is_computed(bulk, s3, reader, monkeypatch, tmp_path):
    use(monkeypatch, s3.proxy.address, **reader)
    done = bulk()
    assert done.code == 2
    assert f"--output {s3.output}: {s3.output}/.lock: cannot be written (" in done.last
    assert "Access" in done.last
    assert "Loading" not in done.log
    assert not any(request.path.endswith(".jpg") for request in s3.proxy.seen)
    assert reader["secret"] not in done.log + done.terminal
    assert bulk(output=tmp_path / "out").code == 0  # reading is allowed


def test_a_cluster_is_begun_only_for_a_bucket_that_is_there_and_may_be_written(run, flags, s3, reader, monkeypatch):
    """Found before Ray is started, and before any worker is."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements-cluster.txt")
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    use(monkeypatch, s3.proxy.address, **reader)
    told = {
        ("s3://data/photos", s3.output): f"--output {s3.output}: {s3.output}/.lock: cannot be written (",
        ("s3://data/photos", "s3://nosuchbucket/features"): "--output s3://nosuchbucket/features: ",
    }
    for (images, output), line in told.items():
        done = run("--image_path", images, "--output", output, *flags, main=embed_cluster.main, name="embed_cluster")
        assert (done.code, line in done.terminal.strip().splitlines()[-1]) == (2, True), done.terminal
        no_secret_in(done.terminal, done.log)
    require_credentials(s3.address, False)
    use(monkeypatch, s3.proxy.address)
    named = ("--image_path", "s3://nosuchbucket/photos", "--output", s3.output, *flags)
    done = run(*named, main=embed_cluster.main, name="embed_cluster")
    assert (done.code, "--image_path s3://nosuchbucket/photos: no such file or folder" in done.terminal) == (2, True)


def test_wrong_credentials(bulk, s3, reader, monkeypatch, tmp_path):
    wrong = [{"key": "AKIANOBODYNOBODYNOBO", "secret": SECRET}, {"key": reader["key"], "secret": SECRET}]
    for who in wrong:
        use(monkeypatch, s3.proxy.address, **who)
        for output in (s3.output, tmp_path / "out"):
            done = bulk(output=output)
            assert (done.code, "Loading" in done.log) == (2, False)
            assert any(told in done.last for told in ("Key", "signature", "Signature", "Forbidden")), done.last
            assert who["key"] not in done.last
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    done = bulk()
    assert done.code == 2
    assert any(told in done.last for told in ("credentials", "Forbidden")), done.last  # newer s3fs asks as nobody then


@pytest.mark.parametrize("where", ["images", "output", "list"])
def test_a_path_with_credentials_is_refused_and_not_shown(where, bulk, s3, tmp_path):
    paths = {"images": "s3://data/photos", "output": str(tmp_path / "out")}
    address = f"s3://{KEY}:{SECRET}@data/photos/0/1.jpg"
    if where == "list":
        paths["images"] = tmp_path / "list.txt"
        paths["images"].write_text(f"s3://data/photos/0/0.jpg\n{address}\n")
    else:
        paths[where] = address
    done = bulk(**paths)
    assert (done.code, "s3://***@data/photos/0/1.jpg: credentials in a path" in done.last) == (2, True)
    (tmp_path / "list.txt").unlink(missing_ok=True)
    signed = f"https://data.example.org/1.jpg?X-Amz-Credential={KEY}&X-Amz-Signature={SECRET}"
    assert "credentials in a path" in bulk(images=signed).last


def test_no_secret_in_anything_that_is_written(bulk, s3, tmp_path):
    """Nor the address of the store, which may be nobody's business either: in parts, manifest, failures, log."""
    s3.store.put_object(Bucket=s3.bucket, Key="in/bad.jpg", Body=b"no image")
    s3.store.copy_object(Bucket=s3.bucket, Key="in/good.jpg", CopySource={"Bucket": "data", "Key": "photos/0/0.jpg"})
    assert bulk(images=f"s3://{s3.bucket}/in").code == 0
    for path in download(s3.address, s3.bucket, "features/", tmp_path / "out").iterdir():
        data = path.read_bytes()
        if path.suffix == ".npz":
            with np.load(path) as part:
                data = b"".join(repr(part[name].tolist()).encode() for name in part.files)
        for secret in (SECRET, KEY, s3.address, s3.proxy.address):
            assert secret.encode() not in data, path


def test_a_mistyped_address_makes_no_folder(bulk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output in ("s3:/bucket/features", "s3://", "obs:"):
        assert (bulk(output=output).code, Path(output.partition("/")[0]).exists()) == (2, False)


def test_no_room_for_what_is_about_to_be_uploaded(s3, monkeypatch, bulk):
    """A part is written to this machine first."""

    class Full(io.BytesIO):
        def write(self, _data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "open", lambda path, mode: Full(), raising=False)
    full = pytest.raises(inference.UsageError, match=r"x: cannot be written \(No space left on device\)")
    with full, storage.replacing(f"{s3.output}/x") as file:
        file.write(b"x")


def test_killed_in_the_midst_of_an_upload_no_part_of_it_is_there(flags, s3, bulk, expected, tmp_path):
    hanging = []
    s3.proxy.fault = lambda request: hanging.append(request) or 600.0 if "part-00001.npz" in request.path else None
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import embed; sys.exit(embed.main())"
    command = [sys.executable, "-c", code, "--image_path", "s3://data/photos", "--output", s3.output, *flags]
    command += ["--output_log", str(tmp_path / "log")]
    with (tmp_path / "terminal").open("wb") as file:
        running = subprocess.Popen(command, env=script_environment(**environment(s3.proxy.address)), stderr=file)
    wait_for(lambda: any(request.method == "PUT" for request in hanging), 120, tmp_path / "terminal")
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert names(s3) == [ALL[0]]
    s3.proxy.fault = lambda request: None
    done = bulk()
    assert done.code == 0
    assert re.search("[12] of 3 parts to do", done.log), done.log  # one that had reached the proxy whole may still arrive
    assert "looking for 3 s whether its run is alive" in done.log
    assert features(s3, tmp_path / "out") == expected
