"""eval_performance.py and what it uses: arithmetic by hand, what is timed, what is kept when something ends it."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import stat
import sys
import time
from types import SimpleNamespace

import inference
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import common
import end_to_end
import eval_performance
import npu_watch
from conftest import SAMPLES, TESTS, TINY
from eval_performance import EARNED_BY, flop_per_image, matrix_products, median_interval, summarize, warm_up

PUBLISHED_KEYS = {"batch_size", "image_size", "mean_time_s", "std_time_s", "p50_s", "p95_s", "throughput_img_s"}


@pytest.fixture
def measure(run, tiny_folder):
    def run_measurement(*flags, device="cpu"):
        common = ("--model_path", tiny_folder, "--device", device, "--num_runs", 3, "--rounds", 1)
        return run(*common, *flags, main=eval_performance.main, name="performance_eval")

    return run_measurement


@pytest.fixture
def no_peers(monkeypatch):
    monkeypatch.setattr(eval_performance, "measure_peers", lambda *arguments: iter(()))


@pytest.fixture
def quick_npu(monkeypatch, no_peers):
    """What takes child processes, or seconds of sampling, left out."""
    monkeypatch.setattr(eval_performance, "measure_deterministic_cost", lambda *arguments: None)
    monkeypatch.setattr(eval_performance, "measure_power", lambda *arguments: None)


@pytest.fixture
def children_have_npu(monkeypatch, tmp_path):
    """Child processes find the simulated NPU, as on a machine that has one."""
    code = f"import os, sys\nos.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'\nsys.path.insert(0, {str(TESTS)!r})\n"
    (tmp_path / "sitecustomize.py").write_text(f"{code}import npu_simulator\nnpu_simulator.install()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


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


def counted_flop(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()
    return counter.get_total_flops()


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


def test_levers_do_not_change_the_flop_count(cpu, tiny, tiny_folder):
    plain = inference.load_model(cpu, str(tiny_folder), levers=())
    size = TINY["image_size"]
    plain.module.config._attn_implementation = "eager"  # torch does not count the CPU's fused attention
    counted = counted_flop(lambda: plain.module(pixel_values=torch.zeros(1, 3, size, size)))
    assert tiny.levers
    assert flop_per_image(tiny) == flop_per_image(plain) == counted


def test_the_limit_is_measured_on_the_models_own_products(tiny):
    total = sum(count * counted_flop(product) for count, product in matrix_products(tiny, 3))
    assert total == 3 * (flop_per_image(tiny) - 2 * TINY["hidden_size"] ** 2)  # the pooler


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
    (said,) = eval_performance.rows({"results": [row]})
    assert {percent: said.get(f"earned_p{percent}_s") for percent in shown} == shown


@pytest.mark.parametrize(
    ("count", "places"), [(5, None), (6, (0, 5)), (8, (0, 7)), (9, (1, 7)), (10, (1, 8)), (17, (4, 12)), (100, (39, 60))]
)
def test_the_medians_interval_is_that_of_the_tables(count, places):  # order statistics at 95%, e.g. Conover, table A3
    times = [float(number) for number in reversed(range(count))]
    assert median_interval(times) == (None if places is None else [float(place) for place in places])


def test_hours_follow_from_the_best_rates():
    folder = {"rows": [{"what": "this bundle", "images_per_s": 500.0}, {"what": "transformers loop", "images_per_s": 900.0}]}
    sizes = [{"batch_size": size, "throughput_img_s": rate} for size, rate in ((1, 90.0), (8, 1000.0), (64, 800.0))]
    whole, bulk = end_to_end.scale_rows({"results": sizes, "end_to_end": {"folder": folder}})
    assert whole["what"] == "forward pass, batch 8"
    assert (whole["million_h"], whole["billion_8_h"]) == pytest.approx((1000 / 3600, 125_000 / 3600))
    assert (bulk["images_per_s"], bulk["billion_64_h"]) == pytest.approx((500.0, 1e9 / 64 / 500 / 3600))


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


def test_times_include_what_the_device_still_has_to_do(npu):
    device = inference.open_device("npu")
    values = torch.ones(4, device="npu")
    npu.queue.seconds_per_op = 0.02
    assert inference.time_once(device, lambda: [values.add(1) for _ in range(5)]) >= 0.1


def test_peak_memory_is_a_rows_own_and_in_mebibytes(npu, tiny_folder):
    model = inference.load_model(inference.open_device("npu"), str(tiny_folder))
    encoder = inference.Encoder(model, eval_performance.FEATURES, 1)
    crops, args = torch.zeros(1, 64, 64, 3, dtype=torch.uint8), argparse.Namespace(warmup=1, num_runs=1)
    many, one = (eval_performance.measure_row(encoder, crops, size, args)["npu_memory_mb"] for size in (64, 1))
    assert one == npu.memory.peak / 2**20
    assert many > one + 64 * 64 * 64 * 3 / 2**20


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
    assert (row["throughput_img_s"], row["bundle_throughput_img_s"]) == (1.0, 2.0)


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
    crops, flop = torch.zeros(4, size, size, 3, dtype=torch.uint8), flop_per_image(tiny)
    limit = eval_performance.measure_limit(encoder, crops, [1, 4], 2, flop / 1e9, 4)
    assert [turn["share_of_limit_percent"] for turn in limit["turns"]] == pytest.approx([37.5, 75.0])
    assert limit["limit_img_s"] == pytest.approx(4 / 1.5)
    assert limit["matmul_tflops"] == pytest.approx(flop * 4 / 1.5 / 1e12)
    assert max(counted) == 4 * (flop - 2 * TINY["hidden_size"] ** 2)


def test_as_torch_npu_leaves_it_is_tanh_gelu_and_hf32_and_the_other_peer_is_not(npu, monkeypatch, tiny_folder, cpu):
    def outputs(encoder, crops, peer, pixels, size, rounds):
        found = {"output": peer(pixels.to("npu")).last_hidden_state.cpu()}
        return found | {"hf32_after": [npu.module.conv.allow_hf32, npu.module.matmul.allow_hf32]}

    monkeypatch.setattr(eval_performance, "take_turns", outputs)
    args = eval_performance.make_parser().parse_args(["--model_path", str(tiny_folder)])
    model = inference.load_model(inference.open_device("npu"), str(tiny_folder))
    crops = eval_performance.sample_crops(model.preprocess)[:1]
    encoder = inference.Encoder(model, eval_performance.FEATURES, 1)
    rows = {row["peer"]: row for row in eval_performance.measure_peers(encoder, crops, args, [1])}
    golden = inference.forward(inference.load_model(cpu, str(tiny_folder), "float64", levers=()), crops).hidden
    errors = {name: float((row["output"] - golden).norm() / golden.norm()) for name, row in rows.items()}
    assert errors["transformers"] < 2e-6
    assert 5e-5 < errors["as torch_npu leaves it"] < 1e-2
    left = inference.load_model(model.device, str(tiny_folder), levers=(), exact_gelu=False)
    inference.set_float32_precision("npu", True, False)
    expected = inference.forward(left, crops[:1].to("npu")).hidden.cpu()
    assert torch.equal(rows["as torch_npu leaves it"]["output"][:1], expected)
    assert [row["hf32_after"] for row in rows.values()] == [[False, False]] * 2


# --- npu-smi ---

WATCH = """NpuID(Idx)  ChipId(Idx) Pwr(W)      Temp(C)     AI Core(%)
0           0           170.5       45          0
0           1           -           47          80
1           0           90.0        40          0
NpuID(Idx)  ChipId(Idx) Pwr(W)      Temp(C)     AI Core(%)
0           0           180.5       46          1
0           1           -           49          NA
dcmi module get no answer (simulated)
0           1
"""
MAPPING = """\tNPU ID     Chip ID     Chip Logic ID     Chip Name
\t0          0           0                 Ascend910
\t0          1           1                 Ascend910
\t0          2           -                 Mcu
\t1          0           2                 Ascend910
"""
PROCESSES = """
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| 0     Ascend910           | OK            | 170.5       45                0    / 0             |
| 0     1                   | 0000:9D:00.0  | 0           0    / 0          3130 / 65536         |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
| 0       1                 | 48988         | python                   | 13330                   |
| 0       1                 | {pid:<13} | python                   | 1024                    |
| 0       1                 | 50001         |                          | 134                     |
| 1       0                 | 60000         | sglang                   | 60970                   |
| No running processes found in NPU 2                                                            |
"""


@pytest.fixture
def npu_smi(tmp_path, monkeypatch):
    """An npu-smi on the PATH that says what A3's does, and whose watch goes on for ever."""
    for name, text in (("watch", WATCH), ("mapping", MAPPING), ("processes", PROCESSES.format(pid=os.getpid()))):
        (tmp_path / name).write_text(text)
    script = tmp_path / "bin" / "npu-smi"
    script.parent.mkdir()
    ways = f'watch) cat "{tmp_path}/watch"; exec sleep 600;; -m) cat "{tmp_path}/mapping";; *) cat "{tmp_path}/processes";;'
    script.write_text(f'#!/bin/sh\ncase "$2" in {ways} esac\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


def npu_number(index: int) -> SimpleNamespace:
    return SimpleNamespace(torch_device=SimpleNamespace(index=index))


@pytest.mark.parametrize(("visible", "index", "chip"), [(None, 0, ("0", "0")), (None, 2, ("1", "0")), ("1,2", 0, ("0", "1"))])
def test_a_device_of_torch_is_found_among_cards_of_two_chips(npu_smi, monkeypatch, visible, index, chip):
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    assert npu_watch.chip_of(npu_number(index)) == chip


def test_other_processes_on_the_chip_are_named(npu_smi):
    assert npu_watch.others_on(("0", "1")) == ["python (48988)", " (50001)"]
    assert npu_watch.others_on(("1", "0")) == []  # one there is this one, whatever number the host gives it


def test_the_power_is_the_cards_and_the_rest_the_chips_own(npu_smi):
    with npu_watch.watching(("0", "1")) as lines:
        time.sleep(0.5)
    found = npu_watch.summarize_watch(lines, ("0", "1"), 100.0)
    assert found == {
        "samples": 2,
        "watts": pytest.approx(175.5),
        "temperature_c": 49.0,
        "ai_core_percent": 80.0,
        "images_per_s": 100.0,
        "joules_per_image": pytest.approx(1.755),
    }
    alone = npu_watch.summarize_watch([{"NpuID": "0", "ChipId": "1", "Pwr": "100"}], ("0", "1"), 50.0)
    assert (alone["joules_per_image"], alone["temperature_c"], alone["ai_core_percent"]) == (2.0, None, None)


def test_without_npu_smi_there_is_no_power_and_nobody_else(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with npu_watch.watching(("0", "0")) as lines:
        pass
    assert npu_watch.summarize_watch(lines, ("0", "0"), 1.0) is None
    assert npu_watch.others_on(("0", "0")) == []
    assert npu_watch.chip_of(npu_number(3)) == ("3", "0")


def test_a_hanging_npu_smi_says_nothing(monkeypatch):
    def hang(command, timeout, **options):
        raise npu_watch.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(npu_watch.subprocess, "run", hang)
    assert npu_watch.npu_smi("-m") == ""


def test_watch_with_all_of_its_columns():
    names = (
        "NpuID(Idx)  ChipId(Idx) Pwr(W) Temp(C) AI Core(%) AI Cpu(%) Ctrl Cpu(%) Memory(%) Memory BW(%) NPU Util(%) AI Cube(%)"
    )
    (line,) = npu_watch.parse_watch(f"npu-smi info watch\n{names}\n2 0 90.1 34 55 1 2 3 4 5 6\n")
    assert (line["Pwr"], line["Temp"], line["AI Core"], line["Memory BW"]) == ("90.1", "34", "55", "4")


# --- the evaluation ---


@pytest.fixture
def no_engines(monkeypatch):
    """An engine that is installed takes seconds to convert the model."""
    for engine in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, engine, None)


@pytest.mark.filterwarnings("ignore")  # of exporters
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_computes_what_transformers_does(cpu, tiny_folder, engine):
    pytest.importorskip(engine)
    plain = inference.load_model(cpu, str(tiny_folder), levers=())
    crops = eval_performance.sample_crops(plain.preprocess)[:3]
    expected = inference.forward(plain, crops).hidden.numpy()
    pixels = inference.normalize(crops, plain.preprocess)
    peer = getattr(eval_performance, f"{engine}_peer")(plain, None, pixels)
    assert np.abs(peer(pixels) - expected).max() < 1e-4 * np.abs(expected).max()


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


def test_engines_that_compute_in_float32_are_peers_of_float32_alone(measure, no_engines):
    done = measure("--batch_sizes", 1, "--dtype", "bfloat16")
    assert {row["peer"] for row in done.result["peers"]} == {"transformers"}


def test_others_on_the_npu_are_said_and_its_power_is_measured(npu, npu_smi, no_peers, monkeypatch, measure):
    monkeypatch.setattr(eval_performance, "measure_deterministic_cost", lambda *arguments: None)
    real = eval_performance.measure_power
    monkeypatch.setattr(eval_performance, "measure_power", lambda *arguments: real(*arguments, seconds=0.3))
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1")
    done = measure("--batch_sizes", 2, device="npu")
    assert done.code == 0, done.terminal
    assert "Other processes are on this NPU, and its times may be too long: python (48988)" in done.terminal
    power = done.result["power"]
    assert power["joules_per_image"] == pytest.approx(175.5 / power["images_per_s"])
    assert re.search(r"Power of the card \(W\).*\n.* 175\.5 ", done.log)


def test_what_determinism_costs_is_measured_in_a_child_process(npu, children_have_npu, tiny_folder, monkeypatch):
    flags = ["--model_path", str(tiny_folder), "--device", "npu", "--num_runs", "2", "--warmup", "1"]
    args, device = eval_performance.make_parser().parse_args(flags), inference.open_device("npu")
    row = {"batch_size": 2, "p50_s": 0.5}
    cost = eval_performance.measure_deterministic_cost(args, device, row)
    assert (cost["batch_size"], cost["p50_s"]) == (2, 0.5)
    assert cost["ratio"] == pytest.approx(cost["deterministic_p50_s"] / 0.5), cost
    monkeypatch.setattr(eval_performance, "ask_child", lambda *asked: common.ask_child("sys.exit('no room')", *asked[1:]))
    cost = eval_performance.measure_deterministic_cost(args, device, row)
    assert cost == {"batch_size": 2, "unavailable": "exit code 1: no room"}


def test_where_nothing_fits_what_to_do_is_told(monkeypatch, no_peers, measure):
    monkeypatch.setattr(eval_performance, "measure_row", lambda *_given: (_ for _ in ()).throw(MemoryError("no room")))
    done = measure("--batch_sizes", 1, 2)
    assert done.code == 2
    assert "out of memory at every batch size of [1, 2]; try a smaller one" in done.terminal.splitlines()[-1]


@pytest.mark.parametrize(("flags", "times"), [((), 1), (("--deterministic",), 0)])
def test_what_determinism_costs_is_not_measured_against_itself(npu, quick_npu, monkeypatch, measure, flags, times):
    asked = []
    monkeypatch.setattr(eval_performance, "measure_deterministic_cost", lambda *_given: asked.append(1))
    assert measure("--batch_sizes", 1, *flags, device="npu").code == 0
    assert len(asked) == times


@pytest.mark.parametrize(
    ("code", "answers", "ended"),
    [
        ("print('noise'); tell(1); tell([2, None]); time.sleep(300)", [1, [2, None]], None),
        ("tell(1); sys.exit('no room')", [1], ("crashed", "exit code 1: no room")),
        ("tell(1); os._exit(0)", [1], ("crashed", "exit code 0: it said nothing")),
        ("tell(given['one']); time.sleep(300)", [1], ("no answer in time", "no answer within 0.5 s")),
    ],
    ids=["noise", "crash", "silent end", "hangs"],
)
def test_a_child_tells_its_answers_or_what_ended_it(code, answers, ended):
    found, error = [], None
    try:
        for answer in common.ask_child(code, {"one": 1}, 2, 0.5):
            found.append(answer)
    except common.ChildError as raised:
        error = (raised.status, str(raised))
    assert (found, error) == (answers, ended)


@pytest.mark.parametrize("fault", ["", "late_memory", "workspace_memory"])
@pytest.mark.parametrize("version", ["7.3", "26"])
def test_a_batch_that_does_not_fit_is_a_row_and_the_rest_goes_on(npu, quick_npu, measure, fault, version):
    npu.machine.version, npu.machine.faults = version, set(filter(None, [fault]))
    npu.memory.limit = 9_000_000
    done = measure("--batch_sizes", 1, 64, 2, device="npu")
    assert done.code == 0, done.terminal
    one, many, two = done.result["results"]
    assert many["out_of_memory"] is True
    assert "out of memory" in many["reason"]
    assert one["throughput_img_s"] > 0
    assert two["throughput_img_s"] > 0
    assert [turn["batch_size"] for turn in done.result["limit"]["turns"]] == [1, 2]


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
    "error", [torch.OutOfMemoryError("out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_the_limit_is_measured_at_half_the_batch_where_its_products_do_not_fit(monkeypatch, no_peers, measure, error):
    def scarce(model, batch_size):
        if batch_size > 2:
            raise error
        return real(model, batch_size)

    real = eval_performance.matrix_products
    monkeypatch.setattr(eval_performance, "matrix_products", scarce)
    limit = measure("--batch_sizes", 1, 8).result["limit"]
    assert limit["batch_size"] == 2
    for turn in limit["turns"]:
        (bundle,), (products,) = turn["bundle_times_s"], turn["peer_times_s"]
        assert turn["share_of_limit_percent"] == pytest.approx(100 * (turn["batch_size"] / bundle) / (2 / products))


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "stopped; what was measured so far is in "),
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
            assert inference.stopping.last_words.startswith("stopped; what was measured so far is in ")
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


def test_the_cpu_has_no_graphs(measure):
    done = measure("--execution", "graph")
    assert done.code == 2
    assert done.terminal.splitlines()[-1].startswith("error: --execution graph: the CPU has no graphs to capture")


# --- end to end ---


def test_photos_are_made_in_the_sizes_asked_for(tmp_path):
    mean = end_to_end.make_photos(tmp_path, 8, (0.01, 0.04))
    sizes = [Image.open(path).size for path in sorted(tmp_path.iterdir())]
    megapixels = [width * height / 1e6 for width, height in sizes]
    assert len(sizes) == 8
    assert 0.0095 < min(megapixels) < max(megapixels) < 0.0405
    assert np.mean(megapixels) == pytest.approx(mean, rel=0.02)
    assert len({round(width / height, 1) for width, height in sizes}) > 2


@pytest.fixture
def fixed_ways(monkeypatch):
    """Three ways with fixed costs, in seconds, and rates, in images a second; counts what each was given."""
    costs = {"this bundle": (2.0, 1000.0), "slow loop": (0.1, 2.0), "fast loop": (1.0, 4000.0)}
    given = {what: [] for what in costs}

    def quietly(device, way, share):
        given[way].append(len(share))
        fixed, rate = costs[way]
        return fixed + len(share) / rate

    monkeypatch.setattr(end_to_end, "quietly", quietly)
    return {what: what for what in costs}, given


def test_a_turn_is_long_enough_for_fixed_costs_to_be_small(fixed_ways):
    ways, given = fixed_ways
    bundle, slow, fast = end_to_end.measure_folder(None, ways, list("abcdefghij"), 2, None)
    assert all(0 < row["fixed_percent"] <= 5.1 for row in (bundle, slow, fast))
    assert bundle["images_per_s"] == pytest.approx(1000, rel=0.06)
    assert fast["images_per_s"] == pytest.approx(4000, rel=0.06)
    assert bundle["images_per_turn"] == given["this bundle"][-1] >= 40_000
    assert slow["images_per_turn"] < 200  # a slow way is not made to take as many
    assert slow["ratio_to_this_bundle"] == pytest.approx(slow["images_per_s"] / bundle["images_per_s"])
    assert [len(row["images_per_s_by_turn"]) for row in (bundle, slow, fast)] == [2, 2, 2]


def test_where_fixed_costs_are_not_small_that_is_said_and_nothing_subtracted(fixed_ways, caplog, monkeypatch):
    rows = end_to_end.measure_folder(None, fixed_ways[0], list("abcdefghij"), 2, 0.001)
    bundle = rows[0]
    assert bundle["fixed_percent"] > 90
    assert bundle["images_per_s"] == pytest.approx(5 / (2 + 5 / 1000))
    found = {"folder": {"images": 10, "megapixels_mean": 1.0, "rows": rows}}
    monkeypatch.setattr(inference.log, "propagate", True)
    end_to_end.log_end_to_end({"results": [], "end_to_end": found})
    assert "Fixed costs are 100% of this bundle's turns, and nothing is subtracted" in caplog.text


def check_cold_start(cold) -> None:
    assert cold["total_s"] == pytest.approx(cold["import_s"] + cold["load_s"] + cold["first_image_s"])
    assert min(cold.values()) > 0
    assert 100 < cold["peak_memory_mb"] < 2000


def test_a_cold_start_is_that_of_a_process_of_its_own(tiny, tiny_folder):
    ballast = np.ones(2**28)  # 2 GiB: the memory of a cold start is its own, not that of the process which starts it
    check_cold_start(end_to_end.measure_cold_start(tiny, tiny_folder, 1))
    assert ballast.sum() > 0


def test_a_cold_start_on_an_npu(npu, children_have_npu, tiny_folder):
    model = inference.load_model(inference.open_device("npu"), str(tiny_folder))
    check_cold_start(end_to_end.measure_cold_start(model, tiny_folder, 1))


END_TO_END = ("--batch_sizes", 1, "--end_to_end", 3, "--megapixels", 0.01, 0.05, "--turn_seconds", 0.001)


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_end_to_end_takes_photos_through_each_way(npu, quick_npu, monkeypatch, measure, device):
    monkeypatch.setattr(end_to_end, "measure_cold_start", lambda model, checkpoint, rounds: {"total_s": 1.5})
    done = measure(*END_TO_END, device=device)
    assert done.code == 0, done.terminal
    folder = done.result["end_to_end"]["folder"]
    rates = {row["what"]: row["images_per_s"] for row in folder["rows"]}
    ways = ("this bundle", "transformers loop", "image-feature-extraction pipeline", "decoding alone", "computing alone")
    assert tuple(rates) == ways
    for row in folder["rows"]:
        assert row["ratio_to_this_bundle"] == pytest.approx(rates[row["what"]] / rates["this bundle"])
    assert (folder["images"], done.result["end_to_end"]["cold_start"]) == (3, {"total_s": 1.5})
    assert "=== End to end ===" in done.log


def test_a_failed_cold_start_keeps_what_was_measured(monkeypatch, no_peers, measure):
    monkeypatch.setattr(end_to_end, "COLD_START", "print('noise'); raise SystemExit('no room')")
    done = measure(*END_TO_END)
    assert done.code == 2
    last = done.terminal.splitlines()[-1]
    assert last.startswith("error: the cold start failed (exit code 1: no room); what was measured so far is in ")
    assert len(done.result["results"]) == 1


def test_the_bundles_way_saves_a_row_for_each_photo(monkeypatch, cpu, tiny, tmp_path):
    made = []
    real = end_to_end.embed.embed
    monkeypatch.setattr(
        end_to_end.embed, "embed", lambda args, images, model: made.append(len(images)) or real(args, images, model)
    )
    ways = end_to_end.ways_through(tiny, tiny_plain(cpu, tiny), "eager", tmp_path)
    photos = sorted(str(path) for path in SAMPLES.glob("*.jpg"))
    end_to_end.quietly(cpu, ways["this bundle"], photos * 3)
    assert made == [3 * len(photos)]


def test_the_bundles_halves_alone_take_each_photo_once(monkeypatch, cpu, tiny, tmp_path):
    computed, decoded = [], []
    submit, loader = inference.Encoder.submit, end_to_end.embed.decoding_loader
    monkeypatch.setattr(inference.Encoder, "submit", lambda self, crops: computed.append(len(crops)) or submit(self, crops))
    monkeypatch.setattr(
        end_to_end.embed,
        "decoding_loader",
        lambda *given: (decoded.append(len(batch.rows)) or batch for batch in loader(*given)),
    )
    ways = end_to_end.ways_through(tiny, tiny_plain(cpu, tiny), "eager", tmp_path)
    photos = sorted(str(path) for path in SAMPLES.glob("*.jpg")) * 3
    end_to_end.quietly(cpu, ways["decoding alone"], photos)
    assert (sum(decoded), max(decoded), computed) == (len(photos), 8, [])
    end_to_end.quietly(cpu, ways["computing alone"], photos)
    assert (sum(computed), max(computed), sum(decoded)) == (len(photos), 8, len(photos))


def test_a_cold_start_loads_float32_as_the_real_checkpoint_is(monkeypatch, measure, no_peers):
    from safetensors.torch import load_file

    found = []

    def look(_model, checkpoint, _rounds):
        found.extend({values.dtype for values in load_file(checkpoint / "model.safetensors").values()})
        raise KeyboardInterrupt

    monkeypatch.setattr(end_to_end, "measure_cold_start", look)
    assert measure(*END_TO_END, "--dtype", "bfloat16").code == 130
    assert found == [torch.float32]


def tiny_plain(cpu, tiny):
    return inference.load_model(cpu, tiny.weights.path, levers=())
