"""The forward pass: what transformers computes, layers, several threads, lack of memory, a lost device, bad numbers."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import inference
import numpy as np
import pytest
import torch
from inference import UsageError, load_model, open_device

from conftest import SAMPLES, TINY

PHOTO = SAMPLES / "chelsea.jpg"
PHOTOS = [SAMPLES / name for name in ("astronaut.jpg", "chelsea.jpg", "coffee.jpg", "moon.png")]
TOKENS = 1 + (TINY["image_size"] // TINY["patch_size"]) ** 2
ROUNDING = 1e-6  # folded patches add up in another order, and no error in method is as small


def relative_l2(value: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


def some_crops(count: int, size: int = TINY["image_size"], seed: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def golden(folder: Path, model: inference.LoadedModel, crops: torch.Tensor) -> np.ndarray:
    """last_hidden_state of transformers' own model in float64."""
    from transformers import ViTModel

    pixels = inference.normalize(crops, model.preprocess, torch.float64)
    with torch.inference_mode():
        return ViTModel.from_pretrained(folder).double()(pixels, interpolate_pos_encoding=True).last_hidden_state.numpy()


def hidden_of(model: inference.LoadedModel, crops: torch.Tensor) -> np.ndarray:
    return inference.forward(model, crops.to(model.device.torch_device)).hidden.cpu().double().numpy()


def features_of(model: inference.LoadedModel, crops: torch.Tensor, names: list[str], batch_size: int = 99) -> dict:
    return inference.host_features(model, crops, names, batch_size)[0]


@pytest.fixture
def plain(cpu, tiny_folder) -> inference.LoadedModel:
    """A model of its own, for who changes it."""
    return load_model(cpu, str(tiny_folder))


# --- what comes out ---


def test_the_output_is_that_of_transformers_bit_for_bit(plain, tiny_folder):
    from transformers import ViTModel

    crops = some_crops(3)
    with torch.inference_mode():
        expected = ViTModel.from_pretrained(tiny_folder)(inference.normalize(crops, plain.preprocess).contiguous())
    outputs = inference.forward(plain, crops)
    assert torch.equal(outputs.hidden, expected.last_hidden_state)
    assert torch.equal(outputs.pooler, expected.pooler_output)
    assert outputs.layers == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_close_to_float32(cpu, tiny_folder, tiny, dtype):
    half = load_model(cpu, str(tiny_folder), dtype)
    names = ["class_token", "mean_patch_token", "patch_tokens", "pooler_output"]
    exact, rounded = (features_of(model, some_crops(4), names) for model in (tiny, half))
    for name in names:
        assert rounded[name].dtype == np.float32
        assert 1e-5 < relative_l2(rounded[name], exact[name]) < 0.03


def test_the_mean_of_half_precision_tokens_is_taken_in_float32(cpu, tiny_folder):
    model = load_model(cpu, str(tiny_folder), "bfloat16")
    found = features_of(model, some_crops(4), ["mean_patch_token", "patch_tokens"])
    assert relative_l2(found["mean_patch_token"], found["patch_tokens"].astype(np.float64).mean(1)) < ROUNDING


def test_features_do_not_depend_on_the_batch(tiny):
    batch = some_crops(9)
    together = features_of(tiny, batch, ["class_token"])["class_token"]
    for size in (1, 2, 4):
        apart = features_of(tiny, batch, ["class_token"], size)["class_token"]
        assert relative_l2(apart, together) < 5e-6


def test_norms_are_those_of_the_tokens_and_of_the_pooler(tiny):
    crops = some_crops(2)
    outputs = inference.forward(tiny, crops)
    found = features_of(tiny, crops, ["hidden_norm", "pooler_norm"])
    assert found["hidden_norm"] == pytest.approx(outputs.hidden.norm(dim=-1).mean(1).numpy(), rel=1e-6)
    assert found["pooler_norm"] == pytest.approx(outputs.pooler.norm(dim=-1).numpy(), rel=1e-6)


# --- layers ---


@pytest.mark.parametrize("place", ["cpu", pytest.param("npu", marks=pytest.mark.npu)])
def test_layers_are_what_the_library_calls_hidden_states(request, tiny_folder, tmp_path, run, place):
    from transformers import ViTModel

    if place == "npu":
        request.getfixturevalue("npu")

    done = run(
        *("--image_path", *PHOTOS[:2], "--model_path", tiny_folder, "--device", place),
        *("--layers", -2, 1, -1, 2, 3, "--output", tmp_path / "plain.npz"),
    )
    assert done.code == 0
    run(
        *("--image_path", *PHOTOS[:2], "--model_path", tiny_folder, "--device", place, "--layers", 1, -2, -1),
        *("--norm_layers", "--output", tmp_path / "normed.npz"),
    )
    plain, normed = np.load(tmp_path / "plain.npz"), np.load(tmp_path / "normed.npz")
    library = ViTModel.from_pretrained(tiny_folder).requires_grad_(False)
    preprocess = inference.read_preprocess(tiny_folder, 64)
    pixels = inference.normalize(inference.crops_of(PHOTOS[:2], preprocess), preprocess)
    output = library(pixels, output_hidden_states=True)
    kinds = ("class_token", "mean_patch_token")
    names = ["", "_layer_1", "_layer_2", "_layer_3"]
    assert set(plain) - {"index", "path"} == {f"{kind}{name}" for name in names for kind in kinds}
    names = ["", "_layer_1_normed", "_layer_2_normed"]
    assert set(normed) - {"index", "path"} == {f"{kind}{name}" for name in names for kind in kinds}
    for number in (1, 2, 3):
        tokens = output.hidden_states[number].numpy()
        if number == 3:  # some versions norm the last one; ours are as the layer leaves them
            normed_last = library.layernorm(torch.from_numpy(plain["class_token_layer_3"])).numpy()
            assert relative_l2(normed_last, plain["class_token"]) < ROUNDING
            continue
        assert relative_l2(plain[f"class_token_layer_{number}"], tokens[:, 0]) < ROUNDING
        assert relative_l2(plain[f"mean_patch_token_layer_{number}"], tokens[:, 1:].mean(1)) < ROUNDING
        tokens = library.layernorm(output.hidden_states[number]).numpy()
        assert relative_l2(normed[f"class_token_layer_{number}_normed"], tokens[:, 0]) < ROUNDING
        assert relative_l2(normed[f"mean_patch_token_layer_{number}_normed"], tokens[:, 1:].mean(1)) < ROUNDING


LAYERS = ("1", "2", "3", "1_normed", "2_normed", "3_normed")


def of_the_library(folder: Path, model: inference.LoadedModel, crops: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, the pooler's, and what its layers leave, by transformers alone, before and after the norm."""
    from transformers import ViTModel

    library = ViTModel.from_pretrained(folder)
    with torch.inference_mode():
        output = library(inference.normalize(crops, model.preprocess).contiguous(), output_hidden_states=True)
        found = {"hidden": output.last_hidden_state, "pooler": output.pooler_output, "3_normed": output.last_hidden_state}
        for number in (1, 2):
            tokens = output.hidden_states[number]
            found |= {str(number): tokens, f"{number}_normed": library.layernorm(tokens)}
    return found


def assert_equal_to_the_library(outputs: inference.Outputs, expected: dict[str, torch.Tensor]) -> None:
    found = outputs.layers | {"hidden": outputs.hidden, "pooler": outputs.pooler}
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


@pytest.mark.parametrize("size", [64, 96])
def test_layers_are_equal_to_the_librarys_bit_for_bit_and_the_output_is_the_same_with_and_without(cpu, tiny_folder, size):
    model = load_model(cpu, str(tiny_folder), image_size=size)
    crops = some_crops(3, size)
    outputs, without = inference.forward(model, crops, LAYERS), inference.forward(model, crops)
    assert sorted(outputs.layers) == sorted(LAYERS)
    assert torch.equal(outputs.hidden, without.hidden) and torch.equal(outputs.pooler, without.pooler)
    assert torch.equal(outputs.layers["3_normed"], without.hidden)
    if size == 64:  # the library would interpolate in each pass
        assert_equal_to_the_library(outputs, of_the_library(tiny_folder, model, crops))


@pytest.mark.parametrize("threads", [2, 8])
def test_each_of_several_threads_gets_its_own_rows(plain, tiny_folder, threads):
    """In lockstep: all of them are in the same layer of the one model at the same time."""
    together = threading.Barrier(threads, timeout=60)

    def wait_for_the_others(*_given) -> None:
        together.wait()

    for layer in inference.layers_of(plain.module):
        for part in layer.children():
            if isinstance(part, torch.nn.LayerNorm):
                part.register_forward_pre_hook(wait_for_the_others)
    batches = [some_crops(2, seed=seed) for seed in range(threads)]
    expected = [of_the_library(tiny_folder, plain, crops) for crops in batches]
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            found = list(pool.map(lambda crops: inference.forward(plain, crops, LAYERS), batches))
            for outputs, theirs in zip(found, expected, strict=True):
                assert_equal_to_the_library(outputs, theirs)


def test_two_threads_that_want_other_layers_do_not_disturb_each_other(plain):
    names = [["class_token_layer_1"], ["patch_tokens_layer_2_normed", "class_token"]]
    alone = [features_of(plain, some_crops(3, seed=seed), wanted) for seed, wanted in enumerate(names)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            jobs = [pool.submit(features_of, plain, some_crops(3, seed=seed), wanted) for seed, wanted in enumerate(names)]
            for job, expected in zip(jobs, alone, strict=True):
                found = job.result()
                assert sorted(found) == sorted(expected)
                assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_layers_take_no_second_forward_pass_and_leave_no_hooks(plain):
    calls, layers = [], inference.layers_of(plain.module)
    assert len(layers) == TINY["num_hidden_layers"]
    norms = [part for layer in layers for part in layer.children() if isinstance(part, torch.nn.LayerNorm)]
    for norm in norms:
        norm.register_forward_hook(lambda norm, _inputs, _output: calls.append(norm))
    names = ["class_token", "class_token_layer_1", "mean_patch_token_layer_1", "class_token_layer_2_normed"]
    found = inference.device_features(plain, some_crops(4), names)
    assert calls == norms
    assert set(found) == {*names, "mean_patch_token"}
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in plain.module.modules() if part not in norms]
    assert set(hooks) == {0}


@pytest.mark.parametrize("layer", [0, 4, -4, 10**20])
def test_a_layer_that_is_not_there_is_named(run, tiny_folder, layer):
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu", "--layers", layer)
    assert done.code == 2
    expected = f"error: --layers {layer}: this model has layers 1 to 3, from the end -1 to -3"
    assert done.terminal.splitlines()[-1] == expected


# --- numbers that are none ---


def poison(monkeypatch, image: int, token: int, value: float) -> None:
    """What every forward pass leaves holds a bad number, in one token of one image."""
    forward = inference.forward

    def poisoned(*given):
        outputs = forward(*given)
        hidden = outputs.hidden.clone()
        hidden[image, token, 5] = value
        return outputs._replace(hidden=hidden)

    monkeypatch.setattr(inference, "forward", poisoned)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bad_number_in_any_single_token_is_found_and_its_photo_named(cpu, tiny_folder, dtype, value):
    model = load_model(cpu, str(tiny_folder), dtype)
    hint = {"float32": "the weights may be damaged", "float16": "try --dtype float32"}[dtype]
    for token in range(TOKENS):
        with pytest.MonkeyPatch.context() as monkeypatch:
            poison(monkeypatch, 1, token, float(value))
            found = features_of(model, some_crops(3), ["pooler_output"])
            assert inference.finite_rows(found).tolist() == [True, False, True], token
            said = f"{PHOTOS[1]}: its features in {dtype} hold NaN or Inf; nothing was saved; {hint}"
            if token in (0, TOKENS - 1):
                with pytest.raises(UsageError) as refused:
                    inference.features(model, PHOTOS[:3], names=["pooler_output"])
                assert str(refused.value) == said


def test_two_infinities_that_cancel_are_found_too(tiny, monkeypatch):
    poison(monkeypatch, 0, 4, float("inf"))
    poison(monkeypatch, 0, 9, float("-inf"))
    assert inference.finite_rows(features_of(tiny, some_crops(2), ["pooler_output"])).tolist() == [False, True]


def test_numbers_as_large_as_half_precision_has_them_are_numbers(cpu, tiny_folder, monkeypatch):
    model = load_model(cpu, str(tiny_folder), "float16")
    forward = inference.forward

    def large(*given):
        outputs = forward(*given)
        return outputs._replace(hidden=torch.full_like(outputs.hidden, 64_992))

    monkeypatch.setattr(inference, "forward", large)
    found = features_of(model, some_crops(2), ["class_token"])
    assert inference.finite_rows(found).all()
    assert (found["mean_patch_token"] == 64_992).all()


@pytest.mark.parametrize("name", ["class_token_layer_1", "pooler_output"])
def test_a_bad_number_in_a_feature_that_was_asked_for_is_found(name):
    found = {"class_token": np.ones((3, 4)), "mean_patch_token": np.ones((3, 4)), name: np.ones((3, 4))}
    assert inference.finite_rows(found).all()
    found[name][2, 1] = np.inf
    assert inference.finite_rows(found).tolist() == [True, True, False]
    with pytest.raises(UsageError, match=r"^c\.jpg: "):
        inference.require_finite(found, ["a.jpg", "b.jpg", "c.jpg"], type("Model", (), {"dtype_name": "float32"}))


# --- lack of memory ---

NPU_OUT_OF_MEMORY = (
    "NPU out of memory. Tried to allocate 2.00 MiB (NPU 0; 61.28 GiB total capacity; 60.9 GiB already allocated)"
)


def small_machine(monkeypatch, most: int, error: Exception | None = None) -> list[int]:
    """Memory for `most` images at once, and `error` for more; gives the sizes of the batches that are tried."""
    forward, sizes = inference.forward, []

    def limited(model, crops, layers=()):
        sizes.append(len(crops))
        if len(crops) > most:
            if error is None:
                torch.empty(1 << 60, dtype=torch.uint8)  # in the words of the CPU's allocator
            raise error
        return forward(model, crops, layers)

    monkeypatch.setattr(inference, "forward", limited)
    return sizes


@pytest.mark.parametrize(
    "error",
    [RuntimeError(NPU_OUT_OF_MEMORY), torch.OutOfMemoryError(NPU_OUT_OF_MEMORY), MemoryError(), None],
    ids=["torch_npu 2.9.0", "torch_npu since", "Python", "the CPU's allocator"],
)
def test_out_of_memory_halves_the_batch_says_so_and_goes_on(tiny, monkeypatch, logged, error):
    names = ["class_token", "patch_tokens"]
    expected = features_of(tiny, some_crops(11), names)
    sizes = small_machine(monkeypatch, 3, error)
    found, batch_size = inference.host_features(tiny, some_crops(11), names, 11)
    assert (batch_size, sizes) == (2, [11, 5, 2, 2, 2, 2, 2, 1])
    told = "WARNING Out of memory on cpu with batch size {}: going on with {}"
    assert logged == [told.format(11, 5), told.format(5, 2)]
    for name in names:
        assert relative_l2(found[name], expected[name]) < 5e-6


@pytest.mark.parametrize("error", [RuntimeError(NPU_OUT_OF_MEMORY), torch.OutOfMemoryError(NPU_OUT_OF_MEMORY)])
def test_out_of_memory_with_a_single_image_is_one_clear_line(run, tiny_folder, monkeypatch, error):
    sizes = small_machine(monkeypatch, 0, error)
    done = run("--image_path", PHOTO, "--model_path", tiny_folder, "--device", "cpu")
    assert (done.code, done.result, sizes) == (2, None, [1])
    expected = "error: out of memory on cpu with a single image: use --dtype float16, or free the device"
    assert done.terminal.splitlines()[-1] == expected
    assert "Traceback" not in done.terminal + done.log


def test_a_single_photo_is_tried_once_whatever_the_batch_size(tiny, monkeypatch, logged):
    sizes = small_machine(monkeypatch, 0)
    with pytest.raises(UsageError, match="out of memory on cpu with a single image"):
        inference.features(tiny, PHOTO)
    assert (sizes, logged) == ([1], [])


def test_a_run_whose_batch_was_halved_is_timed_with_what_fitted(run, tiny_folder, monkeypatch):
    small_machine(monkeypatch, 2)
    done = run("--image_path", *PHOTOS, "--model_path", tiny_folder, "--device", "cpu")
    assert (done.code, done.result["batch_size"]) == (0, 2)
    assert done.result["throughput_img_s"] == pytest.approx(2 / done.result["inference_time_s"])
    assert done.log.count("Out of memory on cpu with batch size 4: going on with 2") == 1
    assert done.result["last_hidden_shape"][0] == 4


def test_other_errors_are_not_tried_again(tiny, monkeypatch):
    sizes = small_machine(monkeypatch, 3, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        features_of(tiny, some_crops(8), ["class_token"])
    assert sizes == [8]


def test_a_failed_attempt_has_let_go_of_its_memory_before_the_next(tiny, monkeypatch):
    forward, halved, held, left = inference.forward, inference.halved, [], []

    def limited(model, crops, layers=()):
        if len(crops) > 2:
            there = torch.ones(3)
            held.append(weakref.ref(there))
            raise torch.OutOfMemoryError(str(there))
        return forward(model, crops, layers)

    def watched(*given):
        left.append(held[-1]() is not None)
        return halved(*given)

    monkeypatch.setattr(inference, "forward", limited)
    monkeypatch.setattr(inference, "halved", watched)
    features_of(tiny, some_crops(8), ["class_token"], 8)
    assert left == [False, False]


# --- on an accelerator ---


def test_float32_on_an_npu_is_float32(npu, tiny_folder):
    model, crops = load_model(npu, str(tiny_folder)), some_crops(4)
    exact = golden(tiny_folder, model, crops)
    assert relative_l2(hidden_of(model, crops), exact) <= 1e-6
    left_alone = load_model(npu, str(tiny_folder), exact_gelu=False)
    assert relative_l2(hidden_of(left_alone, crops), exact) > 2e-5  # torch_npu's GELU is tanh
    inference.set_float32_precision("npu", True, False)
    assert relative_l2(hidden_of(model, crops), exact) > 1e-5  # HF32 in the convolution


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_what_the_cpu_gives(tiny_folder, tiny):
    model = load_model(open_device("cuda"), str(tiny_folder))
    expected, found = (features_of(each, some_crops(11), ["class_token"], 4)["class_token"] for each in (tiny, model))
    assert relative_l2(found, expected) < 1e-5
