"""Crops to features: batches, precision, layers, graphs, and what a lack of memory does."""

from __future__ import annotations

import importlib.metadata
import threading
from pathlib import Path

import inference
import numpy as np
import pytest
import torch
from inference import DeviceLost, UsageError, load_model, open_device

from bulk.encoder import Encoder, can_pin_memory, leaves_no_allocator
from bulk.levers import DEFAULT_LEVERS, with_levers
from conftest import TINY

BOTH = ["class_token", "mean_patch_token"]
ROUNDING = 1e-6  # folded patches add up in another order, and no error in method is as small


def relative_l2(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def some_crops(count: int, size: int = TINY["image_size"]) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def on_npu(folder: Path) -> inference.LoadedModel:
    return with_levers(load_model(open_device("npu"), str(folder)), DEFAULT_LEVERS)


def library(folder: Path, model: inference.LoadedModel, crops: torch.Tensor) -> object:
    """What transformers' own model gives for these crops."""
    from transformers import ViTModel

    module = ViTModel.from_pretrained(folder).requires_grad_(False)
    return module(inference.normalize(crops, model.preprocess), output_hidden_states=True)


@pytest.mark.parametrize("levers", [(), DEFAULT_LEVERS], ids=["plain", "levers"])
def test_features_are_what_transformers_computes(cpu, tiny, tiny_folder, levers):
    expected = library(tiny_folder, tiny, some_crops(3))
    names = ["class_token", "mean_patch_token", "patch_tokens", "pooler_output", "class_token_layer_1", "patch_tokens_layer_2"]
    found = Encoder(with_levers(load_model(cpu, str(tiny_folder)), levers), names, 2).submit(some_crops(3))()
    hidden, states = expected.last_hidden_state.numpy(), [state.numpy() for state in expected.hidden_states]
    reference = [hidden[:, 0], hidden[:, 1:].mean(1), hidden[:, 1:], expected.pooler_output.numpy()]
    reference += [states[1][:, 0], states[2][:, 1:]]
    for name, values in zip(names, reference, strict=True):
        assert found[name].shape == values.shape
        assert relative_l2(found[name], values) < ROUNDING


def test_what_is_asked_for_comes_with_what_tells_whether_it_is_finite(tiny):
    assert set(Encoder(tiny, ["pooler_output"], 2).submit(some_crops(2))()) == {"pooler_output", *BOTH}


def test_a_feature_that_is_not_there_is_named_at_once(tiny):
    with pytest.raises(UsageError, match="class_token_layer_4: no such feature"):
        Encoder(tiny, ["class_token", "class_token_layer_4"], 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_close_to_float32_and_comes_as_float32(cpu, tiny_folder, tiny, dtype):
    half = load_model(cpu, str(tiny_folder), dtype)
    names = [*BOTH, "patch_tokens"]
    exact, rounded = (Encoder(model, names, 4).submit(some_crops(4))() for model in (tiny, half))
    for name in names:
        assert rounded[name].dtype == np.float32
        assert 1e-5 < relative_l2(rounded[name], exact[name]) < 0.03


@pytest.mark.parametrize("size", [1, 2, 4])
def test_features_do_not_depend_on_the_batch(tiny, size):
    batch = some_crops(9)
    together, apart = (Encoder(tiny, ["class_token"], count).submit(batch)()["class_token"] for count in (9, size))
    assert together.shape == apart.shape == (9, TINY["hidden_size"])
    assert relative_l2(apart, together) < 5e-6


def test_batches_are_no_larger_than_asked_for(tiny, monkeypatch):
    sizes, forward = [], inference.forward
    monkeypatch.setattr(inference, "forward", lambda *given: sizes.append(len(given[1])) or forward(*given))
    Encoder(tiny, ["class_token"], 4).submit(some_crops(9))()
    assert sizes == [4, 4, 1]


def test_an_image_is_finite_only_if_all_of_its_tokens_are(tiny, monkeypatch):
    forward = inference.forward

    def poisoned(*given):
        outputs = forward(*given)
        hidden = outputs.hidden.clone()
        hidden[1, 7, 5] = float("inf")
        return outputs._replace(hidden=hidden)

    monkeypatch.setattr(inference, "forward", poisoned)
    found = Encoder(tiny, ["class_token"], 3).submit(some_crops(3))()
    assert np.isfinite(found["class_token"]).all()
    assert inference.finite_rows(found).tolist() == [True, False, True]


@pytest.mark.parametrize("levers", [(), ("folded_patches", "stacked_qkv")], ids=["plain", "levers"])
def test_layers_take_no_second_forward_pass_and_leave_no_hooks(cpu, tiny_folder, levers):
    model = with_levers(load_model(cpu, str(tiny_folder)), levers)
    calls, wide = [], TINY["intermediate_size"]
    widening = [part for part in model.module.modules() if isinstance(part, torch.nn.Linear) and part.out_features == wide]
    for part in widening:
        part.register_forward_hook(lambda part, _inputs, _output: calls.append(part))
    hooks = [len(part._forward_hooks) for part in model.module.modules()]
    names = ["class_token", "class_token_layer_1", "mean_patch_token_layer_1", "class_token_layer_2_normed"]
    found = Encoder(model, names, 4).submit(some_crops(4))()
    assert calls == widening and len(calls) == TINY["num_hidden_layers"]
    assert set(found) == {*names, "mean_patch_token"}
    assert [len(part._forward_hooks) for part in model.module.modules()] == hooks


# --- memory ---


def small_machine(monkeypatch, most: int) -> None:
    """Make the CPU's memory too little for batches of more than `most`."""
    forward = inference.forward

    def limited(model, crops, layers=()):
        if len(crops) > most:
            torch.empty(1 << 60, dtype=torch.uint8)
        return forward(model, crops, layers)

    monkeypatch.setattr(inference, "forward", limited)


def test_out_of_memory_halves_the_batch_goes_on_and_says_so(tiny, monkeypatch, logged):
    expected = Encoder(tiny, ["class_token"], 3).submit(some_crops(8))()["class_token"]
    small_machine(monkeypatch, 3)
    encoder = Encoder(tiny, ["class_token"], 8)
    assert relative_l2(encoder.submit(some_crops(8))()["class_token"], expected) < 5e-6
    assert encoder.batch_size == 2
    assert "Out of memory on cpu with batch size 8: going on with 4" in "\n".join(logged)


def test_out_of_memory_halves_what_there_was_and_not_what_was_allowed(tiny, monkeypatch, logged):
    small_machine(monkeypatch, 3)
    encoder = Encoder(tiny, ["class_token"], 1 << 20)
    assert len(encoder.submit(some_crops(8))()["class_token"]) == 8
    assert encoder.batch_size == 2
    assert [line.rpartition("size ")[2] for line in logged] == ["8: going on with 4", "4: going on with 2"]


def test_out_of_memory_with_one_image_ends_the_run(tiny, monkeypatch):
    small_machine(monkeypatch, 0)
    with pytest.raises(UsageError, match="out of memory on cpu with a single image"):
        Encoder(tiny, ["class_token"], 4).submit(some_crops(4))


def test_out_of_memory_that_is_told_when_features_are_fetched_is_as_good(tiny, monkeypatch):
    expected = Encoder(tiny, ["class_token"], 4).submit(some_crops(4))()["class_token"]
    to_numpy, calls = inference.to_numpy, []

    def late(tensor):
        calls.append(len(tensor))
        if len(calls) == 1:
            raise RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB")
        return to_numpy(tensor)

    monkeypatch.setattr(inference, "to_numpy", late)
    encoder = Encoder(tiny, ["class_token"], 4)
    found = encoder.submit(some_crops(4))()["class_token"]
    assert (relative_l2(found, expected) < 5e-6, encoder.batch_size) == (True, 2)
    assert calls[1:] == [2] * (len(calls) - 1)


def test_another_error_is_no_lack_of_memory(tiny, monkeypatch):
    def broken(*_given):
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    monkeypatch.setattr(inference, "forward", broken)
    encoder = Encoder(tiny, ["class_token"], 4)
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        encoder.submit(some_crops(4))
    assert encoder.batch_size == 4


def test_a_device_whose_queue_failed_is_asked_for_nothing_more(tiny, monkeypatch):
    calls = []

    def broken(*_given):
        calls.append(None)
        try:
            raise RuntimeError("NPU out of memory")
        except RuntimeError:
            raise RuntimeError("The Inner error is reported as above.\nand so on") from None

    monkeypatch.setattr(inference, "forward", broken)
    encoder = Encoder(tiny, ["class_token"], 4)
    with pytest.raises(DeviceLost):
        encoder.submit(some_crops(4))
    assert (len(calls), encoder.batch_size) == (1, 4)


def test_what_a_device_drops_in_silence_is_never_taken_for_features(tiny, monkeypatch):
    encoder = Encoder(tiny, ["class_token"], 4)
    encoder.submit(some_crops(4))()
    monkeypatch.setattr(torch.Tensor, "cpu", lambda value: torch.zeros_like(value))  # nothing comes back from it
    fetch = encoder.submit(some_crops(4))
    with pytest.raises(DeviceLost):
        fetch()


# --- graphs and copies ---


def test_graphs_are_refused_on_the_cpu(tiny):
    with pytest.raises(UsageError, match="--execution graph: the CPU has no graphs to capture; use it with cuda or npu"):
        Encoder(tiny, ["class_token"], 4, "graph")


def test_the_cpu_needs_no_pinned_memory_and_has_nothing_to_give_back(cpu, tiny):
    assert not can_pin_memory(cpu)
    encoder = Encoder(tiny, ["class_token"], 4)
    encoder.release()
    assert len(encoder.submit(some_crops(2))()["class_token"]) == 2


def test_a_device_without_pinned_memory_is_used_all_the_same(npu, tiny_folder, tiny, monkeypatch):
    empty = torch.empty

    def refuse(*given, pin_memory=False, **more):
        if pin_memory:
            raise RuntimeError("Cannot pin memory")
        return empty(*given, **more)

    model = on_npu(tiny_folder)
    monkeypatch.setattr(torch, "empty", refuse)
    assert not can_pin_memory(model.device)
    found, expected = (Encoder(each, BOTH, 4).submit(some_crops(6))() for each in (model, tiny))
    assert all(relative_l2(found[name], expected[name]) < ROUNDING for name in BOTH)


def test_a_replayed_graph_gives_what_eager_gives(whole_captures, tiny_folder):
    model = on_npu(tiny_folder)
    names = [*BOTH, "pooler_output", "class_token_layer_1"]
    eager, graph = (Encoder(model, names, 4, execution) for execution in ("eager", "graph"))
    batch = some_crops(11)
    expected = eager.submit(batch)()
    for _ in range(2):
        for name, value in graph.submit(batch)().items():
            assert value.shape == expected[name].shape
            assert relative_l2(value.astype(float), expected[name].astype(float)) < 1e-6
    assert (graph.execution, graph.fallback) == ("graph", None)


def test_batches_that_are_under_way_together_do_not_mix(whole_captures, tiny_folder, tiny):
    model = on_npu(tiny_folder)
    expected = Encoder(tiny, ["class_token"], 4).submit(some_crops(12))()["class_token"]
    for execution in ("eager", "graph"):
        encoder = Encoder(model, ["class_token"], 4, execution)
        fetches = [encoder.submit(crops) for crops in some_crops(12).split(4)]
        found = np.concatenate([fetch()["class_token"] for fetch in fetches])
        assert relative_l2(found, expected) < ROUNDING


def test_a_graph_replays_without_calling_the_model(whole_captures, tiny_folder, monkeypatch):
    encoder = Encoder(on_npu(tiny_folder), ["class_token"], 4, "graph")
    first = encoder.submit(some_crops(4))()["class_token"]
    monkeypatch.setattr(inference, "forward", None)
    assert np.array_equal(encoder.submit(some_crops(4).flip(0))()["class_token"], first[::-1])


@pytest.fixture
def captures(whole_captures, monkeypatch) -> list[None]:
    """An entry for each graph that is captured."""
    made, make = [], torch.npu.NPUGraph
    monkeypatch.setattr(torch.npu, "NPUGraph", lambda: made.append(None) or make())
    return made


def test_one_capture_serves_every_batch(captures, tiny_folder):
    encoder = Encoder(on_npu(tiny_folder), ["class_token"], 4, "graph")
    for count in (4, 4, 3, 1, 11):
        assert len(encoder.submit(some_crops(count))()["class_token"]) == count
    assert len(captures) == 1
    encoder.batch_size = 2
    assert encoder.submit(some_crops(5))()["class_token"].shape == (5, TINY["hidden_size"])
    assert len(captures) == 2


def test_a_task_queue_that_excludes_graphs_is_noticed_before_the_capture(captures, tiny_folder, monkeypatch):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    encoder = Encoder(on_npu(tiny_folder), ["class_token"], 4, "graph")
    assert encoder.submit(some_crops(4))()["class_token"].shape == (4, TINY["hidden_size"])
    assert (encoder.execution, encoder.fallback) == ("eager", "TASK_QUEUE_ENABLE=2 excludes graph capture; unset it")
    assert not captures


def test_a_graph_is_captured_while_other_threads_pin_memory(whole_captures, tiny_folder, monkeypatch):
    forward = inference.forward

    def beside_a_loader(*given):
        thread = threading.Thread(target=lambda: torch.ones(3).pin_memory())
        thread.start()
        thread.join()
        return forward(*given)

    monkeypatch.setattr(inference, "forward", beside_a_loader)
    encoder = Encoder(on_npu(tiny_folder), ["class_token"], 2, "graph")
    encoder.submit(some_crops(2))()
    assert (encoder.execution, encoder.fallback) == ("graph", None)


def test_a_graph_that_was_given_back_is_captured_anew(whole_captures, tiny_folder, monkeypatch):
    encoder = Encoder(on_npu(tiny_folder), ["class_token"], 4, "graph")
    first = encoder.submit(some_crops(4))()["class_token"]
    encoder.release()
    calls, forward = [], inference.forward
    monkeypatch.setattr(inference, "forward", lambda *given: calls.append(None) or forward(*given))
    assert np.array_equal(encoder.submit(some_crops(4))()["class_token"], first)
    assert calls


def test_a_capture_that_fails_goes_on_with_eager_and_says_so_once(whole_captures, tiny_folder, tiny, logged, monkeypatch):
    def refuse(*_given, **_more):
        raise RuntimeError("capture is not supported here\nin more lines")

    encoder = Encoder(on_npu(tiny_folder), ["class_token"], 3, "graph")
    stream = torch.npu.current_stream()
    monkeypatch.setattr(torch.npu.NPUGraph, "capture_begin", refuse)
    found = encoder.submit(some_crops(7))()["class_token"]
    assert (encoder.execution, encoder.fallback) == ("eager", "capture is not supported here")
    [line] = [line for line in logged if "going on with eager execution" in line]
    assert "cannot be captured as a graph (capture is not supported here)" in line
    assert torch.npu.current_stream() == stream
    assert relative_l2(found, Encoder(tiny, ["class_token"], 3).submit(some_crops(7))()["class_token"]) < ROUNDING


@pytest.mark.parametrize(
    ("version", "cripples"),
    [("2.9.0", True), ("2.9.0.post2", True), ("2.10.0rc1", True), ("2.13.0", False), ("2.14.0+git1", False), ("3.0.0", False)],
)
def test_captures_that_fail_cripple_a_torch_npu_before_2_13(npu, cpu, monkeypatch, version, cripples):
    device = open_device("npu")
    monkeypatch.setattr(importlib.metadata, "version", {"torch_npu": version}.__getitem__)
    assert leaves_no_allocator(device) == cripples
    assert not leaves_no_allocator(cpu)


def test_where_a_failed_capture_cripples_torch_npu_only_what_is_known_to_work_is_tried(
    captures, tiny_folder, tiny, monkeypatch
):
    monkeypatch.setattr("bulk.encoder.leaves_no_allocator", lambda device: True)
    model = with_levers(load_model(open_device("npu"), str(tiny_folder)), ("folded_patches",))
    encoder = Encoder(model, ["class_token"], 4, "graph")
    found = encoder.submit(some_crops(4))()["class_token"]
    assert (encoder.execution, len(captures)) == ("eager", 0)
    assert "it is tried with folded_patches and fused_attention alone" in encoder.fallback
    assert relative_l2(found, Encoder(tiny, ["class_token"], 4).submit(some_crops(4))()["class_token"]) < ROUNDING
    encoder = Encoder(on_npu(tiny_folder), ["class_token"], 4, "graph")
    encoder.submit(some_crops(4))()
    assert (encoder.execution, len(captures)) == ("graph", 1)


def test_a_capture_that_fails_and_cripples_torch_npu_ends_the_run(npu, tiny_folder, monkeypatch):
    def refuse(*_given, **_more):
        raise RuntimeError("capture is not supported here\nin more lines")

    monkeypatch.setattr("bulk.encoder.leaves_no_allocator", lambda device: True)
    monkeypatch.setattr(torch.npu.NPUGraph, "capture_begin", refuse)
    told = r"cannot be captured as a graph \(capture is not supported here\), .*: run again with --execution eager"
    with pytest.raises(UsageError, match=told):
        Encoder(on_npu(tiny_folder), ["class_token"], 3, "graph").submit(some_crops(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("execution", ["eager", "graph"])
def test_a_gpu_gives_what_the_cpu_gives(tiny_folder, tiny, execution):
    model = load_model(open_device("cuda"), str(tiny_folder))
    expected = Encoder(tiny, ["class_token"], 4).submit(some_crops(11))()["class_token"]
    result = Encoder(model, ["class_token"], 4, execution).submit(some_crops(11))()["class_token"]
    assert relative_l2(result, expected) < 1e-5
