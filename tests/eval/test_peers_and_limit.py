"""What speed stands beside: the rate of the model's own matrix products, and what one would use instead, in turns."""

from __future__ import annotations

import inference
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import common
import eval_performance
from bulk import levers
from bulk.encoder import Encoder
from conftest import TINY
from eval_performance import flop_per_image, matrix_products


def counted_flop(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()
    return counter.get_total_flops()


# --- the limit ---


def test_levers_do_not_change_the_flop_count(cpu, tiny_folder):
    lean = levers.with_levers(inference.load_model(cpu, str(tiny_folder)), levers.DEFAULT_LEVERS)
    plain = inference.load_model(cpu, str(tiny_folder))
    size = TINY["image_size"]
    plain.module.config._attn_implementation = "eager"  # torch does not count the CPU's fused attention
    counted = counted_flop(lambda: plain.module(pixel_values=torch.zeros(1, 3, size, size)))
    assert lean.levers
    assert flop_per_image(lean) == flop_per_image(plain) == counted


def test_the_limit_is_measured_on_the_models_own_products(tiny):
    total = sum(count * counted_flop(product) for count, product in matrix_products(tiny, 3))
    assert total == 3 * (flop_per_image(tiny) - 2 * TINY["hidden_size"] ** 2)  # the pooler


def test_the_limit_of_packed_weights_is_that_of_packed_products(cpu, tiny_folder):
    """Else a forward pass could be faster than its limit."""
    found = {}
    for used in ((), ("packed_weights",)):
        model = levers.with_levers(inference.load_model(cpu, str(tiny_folder)), used)
        torch.manual_seed(0)
        products = list(matrix_products(model, 3))
        with FlopCounterMode(display=False) as counter:
            found[used] = [(count, product()) for count, product in products]
        attention = 3 * 2 * 2 * 2 * 17 * 17 * 64  # images, heads, two products, a multiply-add, tokens, tokens, width
        assert (counter.get_total_flops() == attention) == (used != ())
    for (count, own), (packed_count, packed) in zip(*found.values(), strict=True):
        assert count == packed_count
        assert (packed - own).norm() < 1e-6 * own.norm()


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
    encoder = Encoder(tiny, ["class_token"], 1)
    monkeypatch.setattr(encoder, "run", lambda batch: f"bundle {len(batch)}")
    size = TINY["image_size"]
    crops, flop = torch.zeros(4, size, size, 3, dtype=torch.uint8), flop_per_image(tiny)
    limit = eval_performance.measure_limit(encoder, crops, [1, 4], 2, flop / 1e9, 4)
    assert [turn["share_of_limit_percent"] for turn in limit["turns"]] == pytest.approx([37.5, 75.0])
    assert limit["limit_img_s"] == pytest.approx(4 / 1.5)
    assert limit["matmul_tflops"] == pytest.approx(flop * 4 / 1.5 / 1e12)
    assert max(counted) == 4 * (flop - 2 * TINY["hidden_size"] ** 2)


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


# --- the peers ---


def test_peers_take_turns_and_the_median_ratio_counts(monkeypatch, tiny):
    seconds = iter([1.0, 2.0, 9.0, 2.0, 1.0, 1.5])  # bundle, peer | peer, bundle | bundle, peer
    order = []

    def time_once(device, run):
        run()
        return next(seconds)

    monkeypatch.setattr(eval_performance, "warm_up", lambda *arguments: 0)
    monkeypatch.setattr(eval_performance, "time_once", time_once)
    encoder = Encoder(tiny, ["class_token"], 2)
    monkeypatch.setattr(encoder, "run", lambda batch: order.append("bundle"))
    crops = torch.zeros(3, 4, 4, 3, dtype=torch.uint8)
    row = eval_performance.take_turns(encoder, crops, lambda batch: order.append("peer"), crops, 2, 3)
    assert order == ["bundle", "peer", "peer", "bundle", "bundle", "peer"]
    assert (row["bundle_times_s"], row["peer_times_s"]) == ([1.0, 2.0, 1.0], [2.0, 9.0, 1.5])
    assert row["speed_ratio"] == pytest.approx(2.0)  # of 2, 4.5 and 1.5
    assert (row["throughput_img_s"], row["bundle_throughput_img_s"]) == (1.0, 2.0)


@pytest.mark.filterwarnings("ignore")  # of exporters
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_computes_what_transformers_does(cpu, tiny_folder, engine):
    pytest.importorskip(engine)
    plain = inference.load_model(cpu, str(tiny_folder))
    crops = eval_performance.sample_crops(plain.preprocess)[:3]
    expected = inference.forward(plain, crops).hidden.numpy()
    pixels = inference.normalize(crops, plain.preprocess)
    peer = getattr(eval_performance, f"{engine}_peer")(plain, None, pixels)
    assert np.abs(peer(pixels) - expected).max() < 1e-4 * np.abs(expected).max()


def test_engines_that_compute_in_float32_are_peers_of_float32_alone(measure, no_engines):
    done = measure("--batch_sizes", 1, "--dtype", "bfloat16")
    assert {row["peer"] for row in done.result["peers"]} == {"transformers"}


def test_as_torch_npu_leaves_it_is_tanh_gelu_and_hf32_and_the_other_peer_is_not(npu, monkeypatch, tiny_folder, cpu):
    def outputs(encoder, crops, peer, pixels, size, rounds):
        found = {"output": peer(pixels.to("npu")).last_hidden_state.cpu()}
        return found | {"hf32_after": [torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32]}

    monkeypatch.setattr(eval_performance, "take_turns", outputs)
    args = eval_performance.make_parser().parse_args(["--model_path", str(tiny_folder)])
    model = inference.load_model(inference.open_device("npu"), str(tiny_folder))
    crops = eval_performance.sample_crops(model.preprocess)[:1]
    encoder = Encoder(model, eval_performance.FEATURES, 1)
    rows = {row["peer"]: row for row in eval_performance.measure_peers(encoder, crops, args, [1])}
    golden = inference.forward(inference.load_model(cpu, str(tiny_folder), "float64"), crops).hidden
    errors = {name: float((row["output"] - golden).norm() / golden.norm()) for name, row in rows.items()}
    assert errors["transformers"] < 2e-6
    assert 5e-5 < errors["as torch_npu leaves it"] < 1e-2
    left = inference.load_model(model.device, str(tiny_folder), exact_gelu=False)
    inference.set_float32_precision("npu", True, False)
    expected = inference.forward(left, crops[:1].to("npu")).hidden.cpu()
    assert float((rows["as torch_npu leaves it"]["output"][:1] - expected).norm() / expected.norm()) < 1e-6
    assert [row["hf32_after"] for row in rows.values()] == [[False, False]] * 2


# --- --deterministic ---


def test_what_determinism_costs_is_measured_in_a_child_process(cpu, tiny_folder, monkeypatch):
    flags = ["--model_path", str(tiny_folder), "--device", "cpu", "--num_runs", "2", "--warmup", "1"]
    args, device = eval_performance.make_parser().parse_args(flags), cpu
    row = {"batch_size": 2, "p50_s": 0.5}
    asked = []
    monkeypatch.setattr(eval_performance, "ask_child", lambda *given: asked.append(given[1]) or common.ask_child(*given))
    cost = eval_performance.measure_deterministic_cost(args, device, row)
    assert asked[0]["args"].items() >= {"deterministic": True, "device": "cpu"}.items()
    assert (cost["batch_size"], cost["p50_s"]) == (2, 0.5)
    assert cost["ratio"] == pytest.approx(cost["deterministic_p50_s"] / 0.5), cost
    monkeypatch.setattr(eval_performance, "ask_child", lambda *asked: common.ask_child("sys.exit('no room')", *asked[1:]))
    cost = eval_performance.measure_deterministic_cost(args, device, row)
    assert cost == {"batch_size": 2, "unavailable": "exit code 1: no room"}


def test_the_child_opens_its_device_as_it_is_told(cpu, tiny_folder, monkeypatch):
    opened = []
    monkeypatch.setattr(inference, "open_device", lambda *given: opened.append(given) or cpu)
    flags = ["--model_path", str(tiny_folder), "--device", "npu:1", "--allow_hf32", "--num_runs", "1", "--warmup", "1"]
    args = vars(eval_performance.make_parser().parse_args(flags)) | {"deterministic": True}
    assert eval_performance.median_time({"args": args, "batch_size": 2}) > 0
    assert opened == [("npu:1", True, True)]
