"""embed_cluster.py on two nodes: what embed.py writes, bit for bit, whatever dies; and a clear line where it cannot begin."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements-cluster.txt")

import inference
from object_store import wait_for
from PIL import Image
from ray_nodes import HEAD, OTHER, Cluster, copy_of_bundle, kill

import embed
from bulk_runs import PHOTO, contents, make_tar
from conftest import ROOT

BULK = ["--part_size", 5, "--batch_size", 2, "--num_workers", 0, "--max_megapixels", 1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def bundle(place) -> Path:
    return copy_of_bundle(place / "bundle")


@pytest.fixture(scope="module")
def weights(place, tiny_folder) -> Path:
    return shutil.copytree(tiny_folder, place / "weights")


@pytest.fixture(scope="module")
def images(place, photos) -> list[Path]:
    """23 photos, of which one is damaged and one too large; a tar of seven, in two parts."""
    folder = shutil.copytree(photos, place / "photos")
    (folder / "07.jpg").write_bytes(PHOTO[:2000])
    Image.new("RGB", (1200, 1000)).save(folder / "99.jpg")
    return [
        folder,
        make_tar(place / "shard.tar", {f"{number}.jpg": (photos / f"{number:02d}.jpg").read_bytes() for number in range(7)}),
    ]


@pytest.fixture(scope="module")
def expected(place, images, weights) -> Path:
    """What embed.py writes."""
    log = ("--output_log", place / "embed.log", "--results_dir", place / "results")
    flags = ("--image_path", *images, "--output", place / "expected", "--model_path", weights, "--device", "cpu", *BULK, *log)
    assert embed.main([*map(str, flags)]) == 0
    return place / "expected"


@pytest.fixture(scope="module")
def stand_ins(place, bundle, weights) -> dict[str, tuple[Path, Path]]:
    """Files of the same content, which the second node has instead: what is written to one changes what that node alone has."""
    metadata = importlib.metadata.distribution("Pillow")._path / "METADATA"
    files = {"code": bundle / "bulk" / "sources.py", "weights": weights / "model.safetensors", "versions": metadata}
    return {name: (file, shutil.copy(file, place / f"other {name}")) for name, file in files.items()}


@pytest.fixture(scope="module")
def nodes(place, stand_ins):
    cluster = Cluster(place, dict(stand_ins.values()))
    try:
        cluster.start(HEAD)
        cluster.start(OTHER)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def cluster(nodes, bundle):
    """Both nodes, and no haste or hurry left over."""
    nodes.start(OTHER)
    (bundle / "pause").unlink(missing_ok=True)
    return nodes


@pytest.fixture
def begin(cluster, bundle, images, weights, tmp_path):
    """Begin a run. more: further flags."""

    def begin_run(*more, named=images, output=tmp_path / "out", scripts=bundle, **variables):
        flags = ("--image_path", *named, "--output", output, "--model_path", weights, "--device", "npu", *BULK)
        return cluster.drive(scripts, *flags, "--output_log", tmp_path / "log", *more, **variables)

    return begin_run


def assert_same(folder: Path, expected: Path) -> None:
    assert contents(folder) == contents(expected)
    assert (folder / "failures.jsonl").read_bytes() == (expected / "failures.jsonl").read_bytes()


def in_the_midst(run, output: Path) -> None:
    """Return when a run has written a part, and is slow with the others."""
    wait_for(lambda: list(output.glob("part-*.npz")) or run.process.poll() is not None, 300)
    assert run.process.poll() is None, run.terminal


def test_two_nodes_write_what_embed_writes_bit_for_bit(begin, cluster, expected, tmp_path):
    """Among it a damaged image, one over --max_megapixels, a tar in several parts. What made it stands in the manifest."""
    run = begin("--num_workers", 1)
    assert run.end() == 0, run.terminal
    assert_same(tmp_path / "out", expected)
    assert "6 of 6 parts to do; 2 workers, batch size 2" in run.terminal
    assert "All 6 parts are in" in run.last
    made, alone = (json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "out", expected))
    assert made["made_from"] == alone["made_from"]
    assert "embed_cluster.py" in made["command"]
    assert "All 6 parts are in" in (tmp_path / "log").read_text()
    again = begin("--workers", 1)
    assert (again.end(), "0 of 6 parts to do; 1 workers" in again.terminal) == (0, True), again.terminal


def test_an_actor_that_is_killed_is_begun_anew(begin, cluster, bundle, expected, tmp_path):
    (bundle / "pause").write_text("0.2")
    run = begin()
    in_the_midst(run, tmp_path / "out")
    killed = [*cluster.workers(HEAD), *cluster.workers(OTHER)]
    assert len(killed) == 2
    kill(killed[:1])
    assert run.end() == 0, run.terminal
    assert_same(tmp_path / "out", expected)


def test_a_node_that_dies_costs_no_part(begin, cluster, bundle, expected, tmp_path):
    """The other one makes what it had: there is no third to begin its worker on."""
    (bundle / "pause").write_text("0.2")
    run = begin()
    in_the_midst(run, tmp_path / "out")
    cluster.kill(OTHER)
    assert run.end() == 0, run.terminal
    assert_same(tmp_path / "out", expected)


def test_a_driver_that_is_killed_goes_on_and_no_second_one_is_let_in(begin, cluster, bundle, expected, tmp_path):
    (bundle / "pause").write_text("0.2")
    run = begin()
    in_the_midst(run, tmp_path / "out")
    (bundle / "pause").write_text("1000")
    second = begin()
    assert second.end() == 2
    assert "another run writes to it; wait for it, or use another folder" in second.last
    run.process.kill()
    run.end()
    wait_for(lambda: not cluster.workers(HEAD) + cluster.workers(OTHER), 60)
    (bundle / "pause").unlink()
    there = contents(tmp_path / "out")
    assert 0 < len(there) < 7
    again = begin("--workers", 1)
    assert again.end() == 0, again.terminal
    assert f"{6 - len(there.keys() - {'part-00005-0000.npz'})} of 6 parts to do" in again.terminal
    assert_same(tmp_path / "out", expected)


def test_a_run_that_is_stopped_says_how_to_go_on(begin, bundle, tmp_path):
    """Ray puts a handler of its own for SIGTERM in the place of ours."""
    (bundle / "pause").write_text("0.2")
    run = begin("--workers", 1)
    in_the_midst(run, tmp_path / "out")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 130
    assert "stopped; " in run.last and run.last.endswith("run the same command again to go on")


def test_a_part_that_cannot_be_read_is_left_unwritten_and_no_other(begin, images, expected, tmp_path):
    tar = tmp_path / "shard.tar"
    tar.write_bytes(images[1].read_bytes()[:-15_000])
    run = begin("--workers", 1, named=[images[0], tar])
    assert run.end() == 2
    assert f"Part 5 is left unwritten: {tar}: not a whole tar (" in run.terminal
    assert "1 parts are left unwritten because files could not be read; 5 of 6 parts are finished in" in run.last
    assert contents(tmp_path / "out") == {
        name: data for name, data in contents(expected).items() if not name.startswith("part-00005")
    }


def test_nothing_is_waited_for_that_the_cluster_has_not(begin):
    for flags, needs in ((("--device", "cuda"), "GPUs for 1 workers"), (("--workers", "3"), "NPUs for 3 workers")):
        run = begin(*flags)
        assert run.end() == 2
        assert f"the cluster has too few {needs}; it has CPU: 4, NPU: 2, memory: " in run.last


def test_a_device_that_a_worker_cannot_use_is_blocked(begin):
    """The bundle itself, without what the tests put behind the NPU."""
    run = begin("--workers", 1, scripts=ROOT)
    assert run.end() == 3, run.terminal
    assert "BLOCKED: " in run.last


def test_nodes_that_differ_are_named_with_what_differs(begin, cluster, stand_ins, tmp_path):
    if not cluster.stand_ins:
        pytest.skip("a node cannot have a view of files of its own here (unshare -m)")
    data = {what: file.read_bytes() for what, (file, _) in stand_ins.items()}
    version = importlib.metadata.version("Pillow")
    changed = {"code": data["code"] + b"# another\n", "weights": data["weights"][:-1] + bytes([data["weights"][-1] ^ 1])}
    changed["versions"] = data["versions"].replace(f"Version: {version}".encode(), b"Version: 0.1", 1)
    try:
        for what, (_, other) in stand_ins.items():
            other.write_bytes(changed[what])
        digests = [inference.sha256(path)[:12] for what in ("code", "weights") for path in stand_ins[what]]
        run = begin()
        assert run.end() == 2, run.terminal
    finally:
        for what, (_, other) in stand_ins.items():
            other.write_bytes(data[what])
    assert f"than node {HEAD}" in run.last or f"than node {OTHER}" in run.last
    assert HEAD in run.last and OTHER in run.last
    for shown in (*digests, "other code (sources.py ", "other weights (", "other versions (", "'0.1'", version):
        assert shown in run.last
    assert not list((tmp_path / "out").glob("part-*"))


def test_no_cluster_or_one_with_another_token(begin, tmp_path):
    runs = [begin(RAY_ADDRESS="127.0.0.1:9", output=tmp_path / "a"), begin(RAY_AUTH_TOKEN="0" * 64, output=tmp_path / "b")]
    for run in runs:
        assert run.end() == 2, run.terminal
        assert "RAY_ADDRESS=127.0.0.1:" in run.last and "there is no cluster, or it is another token's" in run.last


def test_without_ray_it_says_what_to_install(run, photos, tmp_path, monkeypatch):
    import embed_cluster

    monkeypatch.setitem(sys.modules, "ray", None)
    named = ("--image_path", photos, "--output", tmp_path / "out", "--device", "cpu")
    done = run(*named, main=embed_cluster.main, name="embed_cluster")
    assert (done.code, "pip install -r requirements-cluster.txt" in done.terminal) == (2, True)
    assert not (tmp_path / "out").exists()
