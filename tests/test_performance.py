"""eval_performance.py: its arithmetic by hand, what it times, what it keeps when something ends it."""

from __future__ import annotations

import json
import math

import eval_performance
import inference
import numpy as np
import pytest
import torch
from conftest import TINY
from eval_performance import compare_rows, flop_per_image, matrix_products, summarize, warm_up
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTModel

PUBLISHED_KEYS = {"batch_size", "image_size", "mean_time_s", "std_time_s", "p50_s", "p95_s", "throughput_img_s"}


@pytest.fixture
def measure(run, tiny_folder):
    def run_measurement(*flags, device="cpu"):
        common = ("--model_path", tiny_folder, "--device", device, "--num_runs", 3, "--rounds", 1)
        return run(*common, *flags, main=eval_performance.main, name="performance_eval")

    return run_measurement


def counted_flop(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()
    return counter.get_total_flops()


# --- arithmetic ---


@pytest.mark.parametrize("fields", [TINY, inference.VIT_LARGE], ids=["tiny", "300M"])
def test_the_flop_count_is_torchs_own(fields):
    config = ViTConfig(**fields, attn_implementation="eager")
    with torch.device("meta"):
        model, pixels = ViTModel(config), torch.empty(1, 3, config.image_size, config.image_size)
    assert flop_per_image(config, config.image_size) == counted_flop(lambda: model(pixels))


def test_the_models_forward_pass_costs_123_gflop():
    assert flop_per_image(ViTConfig(**inference.VIT_LARGE), 224) / 1e9 == pytest.approx(123.1, abs=0.05)


def test_the_limit_is_measured_on_the_models_own_products(tiny):
    total = sum(count * counted_flop(product) for count, product in matrix_products(tiny, 3))
    pooler = 2 * TINY["hidden_size"] ** 2
    assert total == 3 * (flop_per_image(tiny.module.config, TINY["image_size"]) - pooler)


def test_statistics_are_numpys():
    times = [0.4, 0.1, 0.3, 0.2, 0.25]
    row = summarize(times, 8)
    assert row["mean_time_s"] == pytest.approx(0.25)
    assert row["std_time_s"] == pytest.approx(math.sqrt(0.01))
    assert (row["p50_s"], row["min_time_s"]) == (0.25, 0.1)
    assert row["p95_s"] == pytest.approx(0.38)
    assert row["p99_s"] == pytest.approx(0.396)
    assert row["throughput_img_s"] == pytest.approx(32.0)
    assert row["raw_times_s"] == times


@pytest.mark.parametrize(("times", "unsteady"), [([1.0, 1.05, 1.09], False), ([1.0, 1.0, 1.2], True), ([2.0], False)])
def test_a_spread_of_more_than_a_tenth_is_called_unsteady(times, unsteady):
    assert summarize(times, 1)["unsteady"] is unsteady


def test_runs_are_compared_where_both_have_a_throughput():
    ours = [
        {"batch_size": 1, "throughput_img_s": 50.0},
        {"batch_size": 2, "out_of_memory": True},
        {"batch_size": 4, "throughput_img_s": 9.0},
    ]
    theirs = [{"batch_size": 1, "throughput_img_s": 40.0}, {"batch_size": 2, "throughput_img_s": 60.0}]
    expected = {"batch_size": 1, "throughput_img_s": 50.0, "other_throughput_img_s": 40.0, "ratio": 1.25}
    assert compare_rows(ours, theirs) == [expected]


# --- timing ---


@pytest.mark.parametrize(
    ("times", "runs"),
    [([1, 1, 1, 1], 3), ([4, 2, 1.5, 1.0, 1.01], 5), ([6, 3, 2, 1], 3), ([12, 6, 3], 3)],
    ids=["steady at once", "until two are alike", "bounded by time", "no fewer than asked for"],
)
def test_warm_up_ends_when_times_settle(monkeypatch, cpu, times, runs):
    clock = iter(times)
    monkeypatch.setattr(eval_performance, "time_once", lambda device, run: next(clock))
    assert warm_up(cpu, lambda: None, 3) == runs


def test_times_include_what_the_device_still_has_to_do(npu):
    device = inference.open_device("npu")
    values = torch.ones(4, device="npu")
    npu.queue.seconds_per_op = 0.02
    assert eval_performance.time_once(device, lambda: [values.add(1) for _ in range(5)]) >= 0.1


def test_inputs_change_from_run_to_run(cpu):
    crops = torch.arange(3, dtype=torch.uint8)[:, None, None, None]
    batches = eval_performance.inputs(crops, 2, cpu)
    assert [next(batches).flatten().tolist() for _ in range(4)] == [[0, 1], [1, 2], [2, 0], [0, 1]]


def test_peers_take_turns_and_the_median_ratio_counts(monkeypatch, tiny):
    seconds = iter([1.0, 2.0, 9.0, 2.0, 1.0, 1.5])  # bundle, peer | peer, bundle | bundle, peer
    order = []

    def time_once(device, run):
        run()
        return next(seconds)

    monkeypatch.setattr(eval_performance, "warm_up", lambda *arguments: 0)
    monkeypatch.setattr(eval_performance, "time_once", time_once)
    encoder = inference.Encoder(tiny, ["class_token"], 2)
    monkeypatch.setattr(encoder, "run", lambda batch: order.append("bundle"))
    crops = torch.zeros(3, 4, 4, 3, dtype=torch.uint8)
    row = eval_performance.take_turns(encoder, crops, lambda batch: order.append("peer"), crops, 2, 3)
    assert order == ["bundle", "peer", "peer", "bundle", "bundle", "peer"]
    assert (row["bundle_times_s"], row["peer_times_s"]) == ([1.0, 2.0, 1.0], [2.0, 9.0, 1.5])
    assert row["speed_ratio"] == pytest.approx(2.0)  # of 2, 4.5 and 1.5
    assert (row["median_time_s"], row["throughput_img_s"], row["bundle_throughput_img_s"]) == (2.0, 1.0, 2.0)


def test_the_limit_is_that_of_the_largest_batch_and_shares_come_from_turns(monkeypatch, tiny):
    seconds = {"bundle 1": 1.0, "bundle 4": 2.0, "products": 1.5}
    counted = []
    monkeypatch.setattr(eval_performance, "warm_up", lambda *arguments: 0)

    def time_once(device, run):
        with FlopCounterMode(display=False) as counter:
            what = run() or "products"
        counted.append(counter.get_total_flops())
        return seconds[what]

    monkeypatch.setattr(eval_performance, "time_once", time_once)
    encoder = inference.Encoder(tiny, ["class_token"], 1)
    monkeypatch.setattr(encoder, "run", lambda batch: f"bundle {len(batch)}")
    size = TINY["image_size"]
    monkeypatch.setattr(eval_performance, "copy_bandwidth", lambda device, runs, size: 20.0)
    limit = eval_performance.measure_limit(encoder, torch.zeros(4, size, size, 3, dtype=torch.uint8), [1, 4], 2, 4)
    assert [turn["share_of_limit_percent"] for turn in limit["turns"]] == pytest.approx([37.5, 75.0])
    assert limit["limit_img_s"] == pytest.approx(4 / 1.5)
    flop = flop_per_image(tiny.module.config, size)
    assert limit["matmul_tflops"] == pytest.approx(flop * 4 / 1.5 / 1e12)
    assert max(counted) == 4 * (flop - 2 * TINY["hidden_size"] ** 2)


# --- the evaluation ---


def test_a_run_on_the_cpu_has_the_published_keys_and_the_rest(measure):
    done = measure("--batch_sizes", 1, 3)
    assert done.code == 0
    result = done.result
    assert [row["batch_size"] for row in result["results"]] == [1, 3]
    for row in result["results"]:
        assert row.keys() >= PUBLISHED_KEYS | {"peak_resident_memory_mb", "p99_s", "min_time_s"}
        assert not row.keys() & {"npu_memory_mb", "gpu_memory_mb"}
        assert row["throughput_img_s"] == pytest.approx(row["batch_size"] / np.mean(row["raw_times_s"]))
        assert row["tflops"] == pytest.approx(row["throughput_img_s"] * result["gflop_per_image"] / 1e3)
        assert row["pipelined_throughput_img_s"] is None
    shares = [row["share_of_limit_percent"] for row in result["results"]]
    for turn, share in zip(result["limit"]["turns"], shares, strict=True):
        (bundle,), (products,) = turn["bundle_times_s"], turn["products_times_s"]
        assert share == pytest.approx(100 * (turn["batch_size"] / bundle) / (3 / products))
    assert (result["device"], result["dtype"], result["warmup"], result["num_runs"]) == ("cpu", "float32", 3, 3)
    assert (result["partial"], result["comparison"], result["end_to_end"]) == (False, None, None)
    assert {row["peer"] for row in result["peers"]} == {"transformers", "onnxruntime", "openvino"}
    assert [row["batch_size"] for row in result["peers"] if row["peer"] == "transformers"] == [1, 3]
    assert "=== Performance Summary ===" in done.log
    assert (done.folder / "performance_eval_cpu.json").exists()


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_a_run_on_an_npu_is_compared_with_the_published_one(npu, measure, execution):
    done = measure("--execution", execution, device="npu")
    assert done.code == 0, done.terminal
    result = done.result
    assert (done.folder / "performance_eval.json").exists()
    published = json.loads(eval_performance.PUBLISHED.read_text())["results"]
    assert [row["other_throughput_img_s"] for row in result["comparison"]["rows"]] == [
        row["throughput_img_s"] for row in published
    ]
    assert result["comparison"]["differences"]["device_name"] == [npu.NAME, "Ascend910_9362"]
    assert all(row["npu_memory_mb"] > 2.0 and row["pipelined_throughput_img_s"] > 0 for row in result["results"])
    assert {row["peer"] for row in result["peers"]} == {"transformers"}


def test_a_batch_that_does_not_fit_is_a_row_and_the_rest_goes_on(npu, measure):
    npu.memory.limit = 9_000_000
    done = measure("--batch_sizes", 1, 64, 2, device="npu")
    assert done.code == 0, done.terminal
    one, many, two = done.result["results"]
    assert many["out_of_memory"] is True
    assert many["reason"].startswith("NPU out of memory. Tried to allocate")
    assert one["throughput_img_s"] > 0
    assert two["throughput_img_s"] > 0
    assert [row["batch_size"] for row in done.result["peers"]] == [1, 2]


def test_the_limit_is_measured_at_half_the_batch_where_its_products_do_not_fit(monkeypatch, measure):
    def scarce(model, batch_size):
        if batch_size > 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, batch_size)

    real = eval_performance.matrix_products
    monkeypatch.setattr(eval_performance, "matrix_products", scarce)
    limit = measure("--batch_sizes", 1, 8).result["limit"]
    assert limit["batch_size"] == 2
    for turn in limit["turns"]:
        (bundle,), (products,) = turn["bundle_times_s"], turn["products_times_s"]
        assert turn["share_of_limit_percent"] == pytest.approx(100 * (turn["batch_size"] / bundle) / (2 / products))


def test_an_interrupted_run_keeps_its_rows_and_an_older_result(monkeypatch, measure):
    assert measure("--batch_sizes", 1).code == 0
    real = eval_performance.measure_row

    def interrupted(encoder, crops, batch_size, args):
        if batch_size == 4:
            raise KeyboardInterrupt
        return real(encoder, crops, batch_size, args)

    monkeypatch.setattr(eval_performance, "measure_row", interrupted)
    done = measure("--batch_sizes", 1, 2, 4)
    assert done.code == 130
    assert "stopped; what was measured so far (2 batch sizes) is in" in done.terminal
    partial = json.loads((done.folder / "performance_eval_partial_cpu.json").read_text())
    assert (partial["partial"], [row["batch_size"] for row in partial["results"]]) == (True, [1, 2])
    older = json.loads((done.folder / "performance_eval_cpu.json").read_text())
    assert (older["partial"], [row["batch_size"] for row in older["results"]]) == (False, [1])


def test_a_device_that_cannot_be_used_leaves_the_older_result(measure, tmp_path):
    older = tmp_path / "results" / "performance_eval.json"
    older.parent.mkdir()
    older.write_text("{}")
    done = measure(device="npu")
    assert done.code == 3
    assert done.log.splitlines()[-1].endswith("(README: versions)")
    assert "[ERROR] BLOCKED: torch_npu is not installed." in done.log
    assert older.read_text() == "{}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compare", "missing.json"], "--compare missing.json: not a result of eval_performance.py"),
        (["--execution", "graph"], "--execution graph: the CPU has no graphs to capture"),
    ],
)
def test_mistakes_are_one_line(measure, flags, message):
    done = measure(*flags)
    assert done.code == 2
    assert done.terminal.splitlines()[-1].startswith(f"error: {message}")


# --- end to end ---


def test_photos_are_made_in_the_sizes_asked_for(tmp_path):
    mean = eval_performance.make_photos(tmp_path, 8, (0.01, 0.04))
    sizes = [Image.open(path).size for path in sorted(tmp_path.iterdir())]
    megapixels = [width * height / 1e6 for width, height in sizes]
    assert len(sizes) == 8
    assert 0.0095 < min(megapixels) < max(megapixels) < 0.0405
    assert np.mean(megapixels) == pytest.approx(mean, rel=0.02)
    assert len({round(width / height, 1) for width, height in sizes}) > 2


def test_end_to_end_measures_the_real_thing(measure):
    ballast = np.ones(2**28)  # 2 GiB: the memory of a cold start is its own, not that of the process which starts it
    done = measure("--batch_sizes", 1, "--end_to_end", 4, "--megapixels", 0.01, 0.05)
    assert done.code == 0, done.terminal
    found = done.result["end_to_end"]
    cold = found["cold_start"]
    assert cold["total_s"] == pytest.approx(cold["import_s"] + cold["load_s"] + cold["first_image_s"])
    assert cold["total_s"] / cold["bare_minimum_s"] == pytest.approx(cold["ratio_to_bare"])
    assert 100 < cold["bare_peak_memory_mb"] < 2000
    assert ballast.sum() > 0
    folder = found["folder"]
    rates = {row["what"]: row["images_per_s"] for row in folder["rows"]}
    ways = ["this bundle", "transformers loop", "image-feature-extraction pipeline", "decoding alone", "computing alone"]
    assert list(rates) == ways
    for row in folder["rows"]:
        assert row["ratio_to_this_bundle"] == pytest.approx(rates[row["what"]] / rates["this bundle"])
    assert folder["images"] == 4
    assert found["preprocessing"]["ratio_to_library"] > 0
