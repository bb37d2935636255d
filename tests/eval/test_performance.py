"""eval_performance.py: arithmetic by hand, what is timed, what a run says, what is kept when something ends it."""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from types import SimpleNamespace

import inference
import numpy as np
import pytest
import torch

import eval_performance
from bulk.encoder import Encoder
from eval_performance import EARNED_BY, flop_per_image, median_interval, summarize, warm_up

PUBLISHED_KEYS = {"batch_size", "image_size", "mean_time_s", "std_time_s", "p50_s", "p95_s", "throughput_img_s"}


class Clock:
    """A host and a device whose times are fixed: a call takes `host` seconds to queue `device` seconds of work."""

    def __init__(self, monkeypatch, host: float, device: float) -> None:
        self.now, self.busy_until, self.host, self.device, self.calls = 100.0, 0.0, host, device, 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(inference, "synchronize", self.synchronize)

    def run(self, _batch) -> None:
        self.calls += 1
        self.busy_until = max(self.busy_until, self.now) + self.device
        self.now += 10 if self.calls <= 6 else self.host  # the first calls take longer, as they do

    def synchronize(self, _device) -> None:
        self.now = max(self.now, self.busy_until)


# --- arithmetic ---


def test_the_forward_pass_of_the_300m_costs_123_gflop():
    from transformers import ViTConfig, ViTModel

    card = inference.CARDS[0]
    config = ViTConfig(
        hidden_size=card.width, num_hidden_layers=card.layers, num_attention_heads=card.heads, intermediate_size=4096
    )
    with torch.device("meta"):
        module = ViTModel(config)
    model = SimpleNamespace(module=module, preprocess=SimpleNamespace(image_size=224))
    layer = 8 * 197 * 1024**2 + 4 * 197 * 1024 * 4096 + 4 * 197**2 * 1024
    assert flop_per_image(model) == 2 * 196 * 768 * 1024 + 24 * layer + 2 * 1024**2
    assert flop_per_image(model) / 1e9 == pytest.approx(123.1, abs=0.05)


def test_statistics_are_numpys():
    times = [0.4, 0.1, 0.3, 0.2, 0.25]
    row = summarize(times, [], 8)
    assert row["mean_time_s"] == pytest.approx(0.25)
    assert row["std_time_s"] == pytest.approx(math.sqrt(0.01))
    assert row["p50_s"] == 0.25
    assert row["p95_s"] == pytest.approx(0.38)
    assert row["p99_s"] == pytest.approx(0.396)
    assert row["throughput_img_s"] == pytest.approx(32.0)
    assert row["raw_times_s"] == times


@pytest.mark.parametrize(
    ("times", "unsteady"),
    [
        ([1.0, 1.05, 1.1], False),
        ([1.0, 1.0, 1.2], True),
        ([2.0], False),
        ([1.0] * 99 + [9.0], False),
        ([1.0] * 9 + [1.3], True),
    ],
)
def test_a_spread_of_more_than_a_tenth_is_called_unsteady(times, unsteady):
    assert summarize(times, [], 1)["unsteady"] is unsteady


@pytest.mark.parametrize(("percent", "runs"), [(95, 130), (99, 662)])
def test_percentiles_are_earned_as_mlperf_asks(percent, runs):
    """The least n with P(Binomial(n, 1 - p) <= 1) <= 1%: LoadGen's early_stopping.cc has 64 for P90 and 662 for P99."""
    below = percent / 100
    at_most_one = {number: below**number + number * (1 - below) * below ** (number - 1) for number in (runs - 1, runs)}
    assert at_most_one[runs] <= 0.01 < at_most_one[runs - 1]
    assert EARNED_BY[percent] == runs


@pytest.mark.parametrize(
    ("runs", "shown"), [(129, {95: None, 99: None}), (130, {95: 7.0, 99: None}), (662, {95: 7.0, 99: 8.0})]
)
def test_a_percentile_is_shown_once_it_is_earned(runs, shown):
    row = {"batch_size": 1, "p95_s": 7.0, "p99_s": 8.0, "raw_times_s": [0.0] * runs}
    (said,) = eval_performance.rows({"results": [row], "weights": {}})
    assert {percent: said.get(f"earned_p{percent}_s") for percent in shown} == shown


def test_the_published_runs_p95_stands_as_it_was_published():
    (said,) = eval_performance.rows({"results": [{"batch_size": 1, "p95_s": 7.0}], "num_runs": 10})
    assert (said["earned_p95_s"], said["remarks"]) == (7.0, None)


@pytest.mark.parametrize(
    ("count", "places"), [(5, None), (6, (0, 5)), (8, (0, 7)), (9, (1, 7)), (10, (1, 8)), (17, (4, 12)), (100, (39, 60))]
)
def test_the_medians_interval_is_that_of_the_tables(count, places):  # order statistics at 95%, e.g. Conover, table A3
    times = [float(number) for number in reversed(range(count))]
    assert median_interval(times) == (None if places is None else [float(place) for place in places])


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


@pytest.mark.parametrize(("device", "bound"), [(3.0, False), (1.3, False), (1.2, True), (0.5, True)])
def test_a_row_holds_what_the_device_and_what_the_host_takes(npu, monkeypatch, tiny_folder, device, bound):
    model = inference.load_model(inference.open_device("npu"), str(tiny_folder))
    clock = Clock(monkeypatch, 1.0, device)
    encoder = SimpleNamespace(model=model, run=clock.run, release=None)
    crops = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    row = eval_performance.measure_row(encoder, crops, 4, argparse.Namespace(warmup=6, num_runs=5))
    assert row["raw_times_s"] == pytest.approx([max(1.0, device)] * 5)
    assert (row["enqueue_s"], row["launch_bound"]) == (pytest.approx(1.0), bound)
    assert row["pipelined_throughput_img_s"] == pytest.approx(4 / max(1.0, device))
    assert (row["warmup_runs"], clock.calls) == (6, 16)


def test_the_cpu_queues_nothing(monkeypatch, tiny):
    clock = Clock(monkeypatch, 1.0, 1.0)
    encoder = SimpleNamespace(model=tiny, run=clock.run)
    row = eval_performance.measure_row(encoder, torch.zeros(2, 64, 64, 3), 4, argparse.Namespace(warmup=1, num_runs=2))
    assert (row["enqueue_s"], row["launch_bound"], row["pipelined_throughput_img_s"]) == (None, False, None)


def test_peak_memory_is_a_rows_own_and_in_mebibytes(npu, tiny_folder):
    model = inference.load_model(inference.open_device("npu"), str(tiny_folder))
    encoder = Encoder(model, eval_performance.FEATURES, 1)
    crops, args = torch.zeros(1, 64, 64, 3, dtype=torch.uint8), argparse.Namespace(warmup=1, num_runs=1)
    many, one = (eval_performance.measure_row(encoder, crops, size, args)["npu_memory_mb"] for size in (64, 1))
    assert one == torch.npu.max_memory_allocated() / 2**20
    assert many > one + 64 * 64 * 64 * 3 / 2**20


def test_inputs_change_from_run_to_run(cpu):
    crops = torch.arange(3, dtype=torch.uint8)[:, None, None, None]
    batches = eval_performance.inputs(crops, 2, cpu)
    assert [next(batches).flatten().tolist() for _ in range(4)] == [[0, 1], [1, 2], [2, 0], [0, 1]]


# --- the evaluation ---


def test_a_run_on_the_cpu_has_the_published_keys_and_the_rest(measure, no_engines):
    done = measure("--batch_sizes", 1, 3)
    assert done.code == 0
    result = done.result
    assert [row["batch_size"] for row in result["results"]] == [1, 3]
    for row in result["results"]:
        assert row.keys() >= PUBLISHED_KEYS | {"peak_resident_memory_mb", "p99_s"}
        assert not row.keys() & {"npu_memory_mb", "gpu_memory_mb"}
        assert row["throughput_img_s"] == pytest.approx(row["batch_size"] / np.mean(row["raw_times_s"]))
        assert row["tflops"] == pytest.approx(row["throughput_img_s"] * result["gflop_per_image"] / 1e3)
    shares = [row["share_of_limit_percent"] for row in result["results"]]
    for turn, share in zip(result["limit"]["turns"], shares, strict=True):
        (bundle,), (products,) = turn["bundle_times_s"], turn["peer_times_s"]
        assert share == pytest.approx(100 * (turn["batch_size"] / bundle) / (3 / products))
    assert (result["device"], result["dtype"], result["warmup"], result["num_runs"]) == ("cpu", "float32", 3, 3)
    assert (result.get("partial"), result["end_to_end"]) == (None, None)
    assert {row["peer"] for row in result["peers"]} == {"transformers", "onnxruntime", "openvino"}
    assert [row["batch_size"] for row in result["peers"] if row["peer"] == "transformers"] == [1, 3]
    for line in ("--- Batch size: 3 ---", "=== Performance Summary ===", "Image size: 64, Batch sizes: [1, 3]", "P95: "):
        assert line in done.log
    assert [path.name for path in done.folder.iterdir()] == ["performance_eval_cpu.json"]


@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_a_run_on_an_npu_says_how_it_was_executed(npu, quick_npu, measure, execution):
    done = measure("--execution", execution, "--batch_sizes", 1, 2, device="npu")
    assert done.code == 0, done.terminal
    result = done.result
    assert (result["execution"], result["execution_fallback"]) == (execution, None)
    assert all(row["npu_memory_mb"] > 2.0 and row["pipelined_throughput_img_s"] > 0 for row in result["results"])


def test_the_cpu_has_no_graphs(measure):
    done = measure("--execution", "graph")
    assert done.code == 2
    assert done.terminal.splitlines()[-1].startswith("error: --execution graph: the CPU has no graphs to capture")


@pytest.mark.parametrize(("flags", "times"), [((), 1), (("--deterministic",), 0)])
def test_what_determinism_costs_is_not_measured_against_itself(npu, quick_npu, monkeypatch, measure, flags, times):
    asked = []
    monkeypatch.setattr(eval_performance, "measure_deterministic_cost", lambda *_given: asked.append(1))
    assert measure("--batch_sizes", 1, *flags, device="npu").code == 0
    assert len(asked) == times


def test_where_nothing_fits_what_to_do_is_told(monkeypatch, no_peers, measure):
    monkeypatch.setattr(eval_performance, "measure_row", lambda *_given: (_ for _ in ()).throw(MemoryError("no room")))
    done = measure("--batch_sizes", 1, 2)
    assert done.code == 2
    assert "out of memory at every batch size of [1, 2]; try a smaller one" in done.terminal.splitlines()[-1]


def test_a_batch_that_the_cpu_cannot_hold_is_a_row(no_peers, monkeypatch, measure):
    def scarce(crops, batch_size, device):
        if batch_size > 1000:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to ..."
            )
        return real(crops, batch_size, device)

    real = eval_performance.inputs
    monkeypatch.setattr(eval_performance, "inputs", scarce)
    done = measure("--batch_sizes", 1, 1_000_000)
    assert done.code == 0, done.terminal
    one, many = done.result["results"]
    assert one["throughput_img_s"] > 0
    assert many["out_of_memory"] is True


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "stopped; what was measured so far is in "),
        (signal.SIGTERM, 130, "stopped; what was measured so far is in "),
        (inference.UsageError("no disk"), 2, "error: no disk; what was measured so far is in "),
        (
            ZeroDivisionError("by zero"),
            70,
            "error: RuntimeError: ZeroDivisionError: by zero; what was measured so far is in ",
        ),
    ],
)
def test_whatever_ends_a_run_its_rows_and_an_older_result_are_kept(monkeypatch, no_peers, measure, error, code, line, tmp_path):
    assert measure("--batch_sizes", 1).code == 0
    real, partial = eval_performance.measure_row, tmp_path / "results" / "performance_eval_partial_cpu.json"

    def ended(encoder, crops, batch_size, args):
        if batch_size == 4:
            saved = json.loads(partial.read_text())  # before anything ends it: SIGKILL asks nobody
            assert [row["batch_size"] for row in saved["results"]] == [1, 2]
            if isinstance(error, int):
                signal.raise_signal(error)
            raise error
        return real(encoder, crops, batch_size, args)

    monkeypatch.setattr(eval_performance, "measure_row", ended)
    done = measure("--batch_sizes", 1, 2, 4)
    assert done.code == code
    assert done.terminal.splitlines()[-1].startswith(f"{line}{partial}")
    kept = json.loads(partial.read_text())
    assert (kept["partial"], [row["batch_size"] for row in kept["results"]]) == (True, [1, 2])
    older = json.loads((done.folder / "performance_eval_cpu.json").read_text())
    assert (older.get("partial"), [row["batch_size"] for row in older["results"]]) == (None, [1])
    assert measure("--batch_sizes", 1).code == 0
    assert not partial.exists()


def test_a_run_that_is_ended_before_its_first_row_leaves_nothing(monkeypatch, measure, tmp_path):
    def ended(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_performance, "measure_row", ended)
    done = measure()
    assert (done.code, done.result) == (130, None)
    assert done.terminal.splitlines()[-1] == "stopped; nothing was measured yet"
