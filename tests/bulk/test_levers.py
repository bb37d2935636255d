"""Levers: the forward pass taken apart computes what transformers computes, each lever alone and all together."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import inference
import numpy as np
import pytest
import torch
import transformers
from inference import DeviceLost, UsageError, load_model, open_device

import embed
import eval_accuracy
import eval_performance
import tune
from bulk import levers
from conftest import ROOT, SAMPLES, TINY
from test_forward import LAYERS, assert_equal_to_the_library, golden, hidden_of, of_the_library, relative_l2, some_crops

ROUNDING = 1e-6  # other products add up in another order, and no error in method is as small
SHARING = ("folded_patches", "stacked_qkv")  # which leave a model its own weights
ON_THE_CPU = (*SHARING, "packed_weights")
ON_AN_NPU = tuple(lever for lever in levers.LEVERS if lever != "packed_weights")
STAGES = [
    *("patch embedding", "position embedding"),
    *(f"layer {number} {half}" for number in (1, 2, 3) for half in ("attention", "MLP")),
    "final norm",
]


@pytest.fixture
def plain(cpu, tiny_folder) -> inference.LoadedModel:
    """A model of its own: stacking makes views of its weights."""
    return load_model(cpu, str(tiny_folder))


def with_lean(model: inference.LoadedModel, used: tuple[str, ...] = ()) -> inference.LoadedModel:
    """The model by the taken apart forward pass, also where no lever is on."""
    return dataclasses.replace(model, levers=used, lean=levers.Lean(model, used))


# --- the same numbers ---


def test_without_a_lever_it_is_transformers_bit_for_bit_in_every_layer(plain, tiny_folder):
    expected = of_the_library(tiny_folder, plain, some_crops(3))
    model = with_lean(plain)
    outputs, without = inference.forward(model, some_crops(3), LAYERS), inference.forward(model, some_crops(3))
    assert list(outputs.layers) == ["1", "1_normed", "2", "2_normed", "3", "3_normed"]
    assert_equal_to_the_library(outputs, expected)
    assert torch.equal(without.hidden, expected["hidden"]) and torch.equal(without.pooler, expected["pooler"])
    assert without.layers == {}
    assert torch.equal(model.module.layernorm(outputs.layers["3"]), expected["hidden"])


@pytest.mark.parametrize("used", [*((lever,) for lever in ON_THE_CPU), ON_THE_CPU], ids="+".join)
@pytest.mark.parametrize("size", [32, 64, 96])
def test_levers_change_nothing_but_rounding(cpu, tiny_folder, used, size):
    plain = load_model(cpu, str(tiny_folder), image_size=size)
    crops = some_crops(3, size)
    expected = inference.forward(plain, crops, LAYERS)
    model = levers.with_levers(plain, used)
    assert (model.levers, plain.levers) == (used, ())
    outputs = inference.forward(model, crops, LAYERS)
    assert relative_l2(outputs.hidden.numpy(), expected.hidden.numpy()) <= ROUNDING
    assert relative_l2(outputs.pooler.numpy(), expected.pooler.numpy()) <= ROUNDING
    for name, value in expected.layers.items():
        assert relative_l2(outputs.layers[name].numpy(), value.numpy()) <= ROUNDING, name
    if size == 64:
        assert relative_l2(hidden_of(model, crops), golden(tiny_folder, model, crops)) <= ROUNDING


def patches_of(model: inference.LoadedModel, crops: torch.Tensor) -> np.ndarray:
    """What the patch embedding gives, the normalisation of the crops included."""
    found = {}
    lean = model.lean or levers.Lean(model, ())
    lean.forward(model, crops, (), lambda stage, tokens: found.setdefault(stage, tokens))
    return found["patch embedding"].double().numpy()


@pytest.mark.parametrize("shade", [None, 250], ids=["noise", "nearly white"])
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_folded_patches_lose_no_digits(cpu, tiny_folder, dtype, most, shade):
    crops = some_crops(3) if shade is None else (shade + some_crops(3) % 5).to(torch.uint8)
    plain = load_model(cpu, str(tiny_folder), dtype)
    folded = levers.with_levers(plain, ("folded_patches",))
    exact = patches_of(load_model(cpu, str(tiny_folder), "float64"), crops)
    error = relative_l2(patches_of(folded, crops), exact)
    assert error < most
    assert error < 1.1 * relative_l2(patches_of(plain, crops), exact)


def test_folded_patches_follow_mean_spread_and_scale(cpu, tiny_folder):
    other = inference.Preprocess(64, 64, 3, 1 / 200, (0.1, 0.5, 0.7), (0.4, 0.2, 0.9))
    plain = dataclasses.replace(load_model(cpu, str(tiny_folder)), preprocess=other)
    folded = levers.with_levers(plain, ("folded_patches",))
    assert relative_l2(patches_of(folded, some_crops(3)), patches_of(plain, some_crops(3))) < ROUNDING


def linears_of(model: inference.LoadedModel) -> list[list[torch.nn.Linear]]:
    """Those of each layer: query, key, value, and three more."""
    layers = inference.layers_of(model.module)
    return [[part for part in layer.modules() if isinstance(part, torch.nn.Linear)] for layer in layers]


def test_stacked_weights_are_those_of_the_model_and_take_no_room_of_their_own(plain):
    before = {name: value.clone() for name, value in plain.module.named_parameters()}
    hidden = inference.forward(plain, some_crops(2)).hidden
    levers.with_levers(plain, ("stacked_qkv",))
    for linears in linears_of(plain):
        for name in ("weight", "bias"):
            query, key, value = (getattr(part, name) for part in linears[:3])
            assert key.data_ptr() - query.data_ptr() == value.data_ptr() - key.data_ptr() == query.nbytes
            assert query.untyped_storage().nbytes() == 3 * query.nbytes
    assert all(torch.equal(value, before[name]) for name, value in plain.module.named_parameters())
    assert torch.equal(inference.forward(plain, some_crops(2)).hidden, hidden)  # transformers' own pass goes on working


@pytest.mark.parametrize("used", [("stacked_qkv",), ("packed_weights",), ON_THE_CPU], ids="+".join)
def test_a_model_without_biases_in_its_attention_has_the_levers_too(cpu, tmp_path, used):
    config = transformers.ViTConfig(**TINY, qkv_bias=False)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    plain = load_model(cpu, str(tmp_path), allow_unlocked=True)
    expected = hidden_of(plain, some_crops(2))
    assert relative_l2(hidden_of(levers.with_levers(plain, used), some_crops(2)), expected) <= ROUNDING


@pytest.fixture
def calls(monkeypatch) -> list[tuple[int, ...]]:
    """The weight's shape of each torch.nn.functional.linear."""
    found, linear = [], torch.nn.functional.linear

    def watched(values, weight, bias=None):
        found.append(tuple(weight.shape))
        return linear(values, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    return found


def test_one_product_takes_the_place_of_three(plain, calls):
    inference.forward(levers.with_levers(plain, SHARING), some_crops(1))
    width, mlp = TINY["hidden_size"], TINY["intermediate_size"]
    assert [shape[0] for shape in calls] == [width, *3 * [3 * width, width, mlp, width], width]  # patches, layers, pooler


@pytest.mark.parametrize("stacked", [(), ("stacked_qkv",)], ids=["alone", "stacked"])
def test_packed_weights_stand_in_memory_once(plain, calls, stacked):
    before = sum(value.nbytes for value in plain.module.parameters())
    gone = sum(part.weight.nbytes for linears in linears_of(plain) for part in linears)
    model = levers.with_levers(plain, (*stacked, "packed_weights"))
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in model.module.parameters()}
    assert sum(storages.values()) == before - gone < before / 2
    calls.clear()
    inference.forward(model, some_crops(1))
    assert calls == [(TINY["hidden_size"],) * 2]  # the pooler; the patches' is a convolution


LARGE_PAGES = """
import inference, mmap, torch, eval_performance
from bulk import levers
args = eval_performance.make_parser().parse_args()
levers.load_as_asked(args, inference.open_device("cpu"))
print(max(torch.empty(3 << 20, dtype=torch.uint8).data_ptr() % mmap.PAGESIZE for _ in range(3)))
"""


@pytest.mark.parametrize(("asked", "is_aligned"), [(None, True), ("0", False)])
def test_the_cpu_has_large_pages_unless_they_are_switched_off(tiny_folder, asked, is_aligned):
    """torch aligns what is to be in them with pages, and decides on it at the first tensor of a process."""
    variables = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    variables |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}"} | ({} if asked is None else {"THP_MEM_ALLOC_ENABLE": asked})
    command = [sys.executable, "-c", LARGE_PAGES, "--model_path", str(tiny_folder), "--allow_unlocked"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert (int(done.stdout) == 0) == is_aligned


@pytest.mark.parametrize("wrong", ["missing", "raises", "other numbers"])
def test_packed_weights_stay_off_where_torch_has_no_right_kernels_for_them(plain, monkeypatch, wrong):
    kernels, linear = SimpleNamespace(), torch.nn.functional.linear
    if wrong != "missing":
        kernels._reorder_linear_weight = lambda weight: weight

        def product(values, weight, _bias, _activation, _scalars, _algorithm):
            if wrong == "raises":
                raise RuntimeError("no kernel for this processor")
            return linear(values, weight)  # and no bias

        kernels._linear_pointwise = product
    levers.can_pack.cache_clear()
    monkeypatch.setattr(torch.ops, "mkldnn", kernels)
    try:
        assert levers.with_levers(plain, ON_THE_CPU).levers == SHARING
    finally:
        levers.can_pack.cache_clear()


@pytest.mark.parametrize("used", [(), ON_THE_CPU], ids=["none", "levers"])
def test_a_crop_that_is_a_view_is_the_crop(plain, used):
    """As a slice of the decoding workers' memory is, and a batch that a graph copies into."""
    crops = some_crops(4)
    model = levers.with_levers(plain, used)
    assert torch.equal(hidden_of_view(model, crops), inference.forward(model, crops).hidden[1:3])


def hidden_of_view(model: inference.LoadedModel, crops: torch.Tensor) -> torch.Tensor:
    wide = torch.zeros(4, crops.shape[1], crops.shape[2] + 9, 3, dtype=torch.uint8)
    wide[:, :, 5:-4] = crops
    return inference.forward(model, wide[1:3, :, 5:-4]).hidden


# --- which levers a model has ---


def described(kind: str, dtype: torch.dtype, hidden_act: str = "gelu") -> SimpleNamespace:
    """As much of a loaded model as decides which levers it has."""
    module = type("ViTModel", (), {"config": SimpleNamespace(hidden_act=hidden_act), "layernorm": None})()
    return SimpleNamespace(module=module, device=SimpleNamespace(kind=kind), dtype=dtype)


def test_an_mlp_of_another_activation_is_not_fused():
    asked = levers.fitting(described("npu", torch.float16), levers.LEVERS)
    fitting = levers.fitting(described("npu", torch.float16, "gelu_pytorch_tanh"), levers.LEVERS)
    assert set(asked) - set(fitting) == {"fused_mlp"}


def test_another_activation_has_its_own_values_with_packed_weights(cpu, tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**TINY, hidden_act="relu")).save_pretrained(tmp_path)
    plain = load_model(cpu, str(tmp_path), allow_unlocked=True)
    expected = hidden_of(plain, some_crops(2))
    model = levers.with_levers(plain, ON_THE_CPU)
    assert model.levers == ON_THE_CPU and relative_l2(hidden_of(model, some_crops(2)), expected) <= ROUNDING


def test_compiled_norms_stay_off_where_nothing_can_be_compiled(plain, monkeypatch, logged):
    def fail(*_given):
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(levers, "_add_norm", lambda: fail)
    plain = dataclasses.replace(plain, device=SimpleNamespace(kind="cuda", torch_device=torch.device("cpu")))
    assert levers.fitting(plain, levers.LEVERS) == SHARING
    assert logged == ["WARNING fused_norms stays off: torch.compile does not work here (no C compiler)"]
    monkeypatch.setattr(levers, "_add_norm", lambda: lambda more, tokens, *_norm: (more + tokens, more + tokens))
    assert levers.fitting(plain, levers.LEVERS) == SHARING
    assert "its numbers are wrong" in logged[-1]
    norm = torch.nn.functional.layer_norm

    def half(more, tokens, *of):
        return more, norm(more + tokens, more.shape[-1:], *of)

    monkeypatch.setattr(levers, "_add_norm", lambda: half)
    assert levers.fitting(plain, levers.LEVERS) == SHARING
    assert levers.fitting(plain, levers.DEFAULT_LEVERS) == SHARING
    assert len(logged) == 3  # what is not asked for is not tried


@pytest.mark.filterwarnings("ignore")
def test_norms_are_compiled_once_for_all_batch_sizes(plain, monkeypatch):
    made = []

    def backend(module: torch.fx.GraphModule, _inputs: list) -> Callable:
        made.append(module)
        return module.forward

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend=backend))
    levers._add_norm.cache_clear()
    expected = {count: inference.forward(plain, some_crops(count)).hidden for count in (1, 2, 5)}
    plain = dataclasses.replace(plain, device=SimpleNamespace(kind="cuda", torch_device=torch.device("cpu")))
    model = levers.with_levers(plain, ("fused_norms",))
    assert model.levers == ("fused_norms",)
    for count, hidden in expected.items():
        assert relative_l2(inference.forward(model, some_crops(count)).hidden.numpy(), hidden.numpy()) <= ROUNDING
    assert len(made) == 1
    levers._add_norm.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "dtype", "has"),
    [
        ("cpu", torch.float32, ON_THE_CPU),
        ("cpu", torch.float64, SHARING),
        ("cpu", torch.bfloat16, SHARING),
        ("cuda", torch.float16, (*SHARING, "fused_norms")),
        ("npu", torch.float32, ("folded_patches", "fused_attention", "stacked_qkv", "fused_norms")),
        ("npu", torch.float16, ON_AN_NPU),
        ("npu", torch.bfloat16, ON_AN_NPU),
    ],
)
def test_a_model_has_the_levers_of_its_device_and_dtype(kind, dtype, has, monkeypatch):
    monkeypatch.setattr(levers, "can_compile_norms", lambda _norm: True)
    model = described(kind, dtype)
    assert levers.fitting(model, levers.LEVERS) == has
    assert levers.fitting(model, levers.LEVERS[1::-1]) == tuple(lever for lever in has if lever in levers.LEVERS[:2])
    assert levers.fitting(model, ()) == ()


@pytest.mark.parametrize("kind", ["cpu", "npu"])
def test_code_that_came_with_a_checkpoint_has_no_levers_and_stays_as_it_is(plain, kind):
    foreign = type("MyModel", (type(plain.module),), {})
    device = SimpleNamespace(kind=kind, torch_device=torch.device("cpu"))
    model = dataclasses.replace(plain, module=foreign(plain.module.config), device=device)
    assert levers.fitting(model, levers.LEVERS) == ()
    assert levers.with_levers(model, levers.LEVERS) is model


def test_without_levers_the_model_stays_as_it_is(plain):
    assert levers.with_levers(plain, ()) is plain
    assert levers.with_levers(plain, ("fused_attention", "fused_mlp")) is plain  # the CPU has neither


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ([], ("folded_patches", "fused_attention", "stacked_qkv", "packed_weights")),
        (["--without", "stacked_qkv"], ("folded_patches", "fused_attention", "packed_weights")),
        (["--without", "folded_patches", "fused_attention", "stacked_qkv", "packed_weights"], ()),
        (["--with", "fused_mlp"], ("folded_patches", "fused_attention", "stacked_qkv", "packed_weights", "fused_mlp")),
        (
            ["--with", "fused_norms", "fused_mlp", "--without", "fused_norms", "stacked_qkv"],
            ("folded_patches", "fused_attention", "packed_weights", "fused_mlp"),
        ),
    ],
    ids=" ".join,
)
def test_flags_switch_levers_off_and_on(flags, asked):
    parser = argparse.ArgumentParser()
    levers.add_lever_arguments(parser)
    assert levers.asked_levers(parser.parse_args(flags)) == asked


@pytest.mark.parametrize("flags", [["--with", "stacked_qkv"], ["--with", "speed"], ["--without", "speed"]], ids=" ".join)
def test_a_lever_that_is_not_there_is_refused(flags, capsys):
    parser = argparse.ArgumentParser()
    levers.add_lever_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(flags)
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "more"),
    [(embed, ["--image_path", "x", "--output", "y"]), (eval_accuracy, []), (eval_performance, []), (tune, [])],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_scripts_of_many_batches_take_the_flags(script, more):
    args = script.make_parser().parse_args([*more, "--without", "stacked_qkv", "--with", "fused_norms"])
    assert levers.asked_levers(args) == ("folded_patches", "fused_attention", "packed_weights", "fused_norms")


def test_inference_runs_its_few_photos_as_transformers_does(run, tiny_folder, tmp_path):
    photo = SAMPLES / "chelsea.jpg"
    common = ("--image_path", photo, "--model_path", tiny_folder, "--device", "cpu", "--output", tmp_path / "f.npz")
    assert run(*common, "--without", "stacked_qkv").code == 2
    assert run(*common).result["levers"] == []
    preprocess = inference.read_preprocess(tiny_folder, 64)
    pixels = inference.normalize(inference.crops_of([photo], preprocess), preprocess).contiguous()
    with torch.inference_mode():
        expected = transformers.ViTModel.from_pretrained(tiny_folder)(pixels).last_hidden_state
    assert np.array_equal(np.load(tmp_path / "f.npz")["class_token"], expected[:, 0].numpy())


@pytest.mark.parametrize("load", [levers.load_as_asked, levers.load_from_args])
def test_a_model_is_loaded_with_the_levers_that_are_asked_for(cpu, tiny_folder, tmp_path, logged, load):
    flags = ["--model_path", str(tiny_folder), "--results_dir", str(tmp_path), "--output_log", str(tmp_path / "log")]
    args = tune.make_parser().parse_args([*flags, "--without", "folded_patches", "packed_weights", "--with", "fused_mlp"])
    args.script = "x"
    model = load(args, cpu)
    assert model.levers == ("stacked_qkv",) == tuple(model.lean.blocks[0].levers)
    args.without = list(levers.LEVERS)
    assert load(args, cpu).levers == ()
    told = ["INFO Levers: stacked_qkv", "INFO Levers: none"] if load is levers.load_from_args else []
    assert [line for line in logged if "Levers" in line] == told


def test_too_little_memory_for_the_levers_is_one_line_and_a_lost_device_is_lost(plain, monkeypatch):
    def fail(error: Exception) -> None:
        def stack(_linears):
            raise error

        monkeypatch.setattr(levers, "stacked", stack)

    fail(RuntimeError("NPU out of memory. Tried to allocate 2.00 MiB"))
    with pytest.raises(UsageError, match=r"^cpu has too little memory for the model; try --dtype float16$"):
        levers.with_levers(plain, ("stacked_qkv",))
    fail(RuntimeError("The Inner error is reported as above. The current working operator name is aclnnCat."))
    with pytest.raises(DeviceLost, match=r"^aclnnCat failed on the device"):
        levers.with_levers(plain, ("stacked_qkv",))
    fail(ZeroDivisionError("no lack of memory"))
    with pytest.raises(ZeroDivisionError):
        levers.with_levers(plain, ("stacked_qkv",))


# --- watching the stages ---


def library_after(module: torch.nn.Module, stage: str, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers' own modules make of the tokens that a stage has left."""
    layers = inference.layers_of(module)
    if stage == "patch embedding":
        embeddings = module.embeddings
        tokens = torch.cat([embeddings.cls_token.expand(len(tokens), -1, -1), tokens], 1) + embeddings.position_embeddings
    if stage == "final norm":
        return tokens
    number, half = (int(stage.split()[1]), stage.split()[2]) if stage.startswith("layer") else (0, "MLP")
    if half == "attention":
        block = levers.Block(layers[number - 1], module.config.num_attention_heads, ())
        tokens = block.mlp(block.norm_after(tokens)) + tokens
    for layer in layers[number:]:
        left = layer(tokens)
        tokens = left[0] if isinstance(left, tuple) else left
    return module.layernorm(tokens)


@pytest.mark.parametrize("used", [(), ON_THE_CPU], ids=["none", "levers"])
def test_watching_is_told_every_stage_in_order_and_changes_nothing(plain, used):
    told = []
    model = with_lean(plain, used)
    outputs = model.lean.forward(model, some_crops(2), LAYERS, lambda stage, tokens: told.append((stage, tokens)) or tokens)
    alone = inference.forward(model, some_crops(2), LAYERS)
    assert [stage for stage, _ in told] == STAGES
    assert [tuple(tokens.shape) for _, tokens in told] == [(2, 16, 128), *8 * [(2, 17, 128)]]
    assert torch.equal(outputs.hidden, alone.hidden) and torch.equal(outputs.pooler, alone.pooler)
    assert all(torch.equal(outputs.layers[name], alone.layers[name]) for name in LAYERS)
    states = dict(told)
    assert torch.equal(states["final norm"], outputs.hidden)
    for number in (1, 2, 3):
        assert torch.equal(states[f"layer {number} MLP"], outputs.layers[str(number)])


@pytest.mark.parametrize("used", [(), SHARING], ids=["none", "levers"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_given_back_goes_on_in_place_of_what_a_stage_left(plain, stage, used):
    model, seen = with_lean(plain, used), {}

    def watch(name: str, tokens: torch.Tensor) -> torch.Tensor:
        seen[name] = tokens.roll(1, 0) if name == stage else tokens
        return seen[name]

    outputs = model.lean.forward(model, some_crops(2), LAYERS, watch)
    with torch.inference_mode():
        expected = library_after(plain.module, stage, seen[stage])
        pooled = plain.module.pooler(expected)
    assert relative_l2(outputs.hidden.numpy(), expected.numpy()) < ROUNDING
    assert relative_l2(outputs.pooler.numpy(), pooled.numpy()) < ROUNDING
    assert torch.equal(outputs.layers["3"], seen["layer 3 MLP"])
    if used == ():
        assert torch.equal(outputs.hidden, expected)
    elsewhere = inference.forward(model, some_crops(2)).hidden
    assert relative_l2(outputs.hidden.numpy(), elsewhere.numpy()) > 0.01


# --- several threads ---


@pytest.mark.parametrize("threads", [2, 8])
def test_each_of_several_threads_gets_its_own_rows(plain, threads):
    """In lockstep: all of them are in the same layer of the one model at the same time."""
    model, together = levers.with_levers(plain, ON_THE_CPU), threading.Barrier(threads, timeout=60)
    batches = [some_crops(2, seed=seed) for seed in range(threads)]
    expected = [inference.forward(model, crops, LAYERS) for crops in batches]

    def wait_for_the_others(*_given) -> None:
        together.wait()

    for layer in inference.layers_of(plain.module):
        for part in layer.children():
            if isinstance(part, torch.nn.LayerNorm):
                part.register_forward_pre_hook(wait_for_the_others)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            found = list(pool.map(lambda crops: inference.forward(model, crops, LAYERS), batches))
            for outputs, theirs in zip(found, expected, strict=True):
                assert torch.equal(outputs.hidden, theirs.hidden) and torch.equal(outputs.pooler, theirs.pooler)
                assert all(torch.equal(outputs.layers[name], theirs.layers[name]) for name in LAYERS)


# --- attention without a mask ---


class Masks(torch.overrides.TorchFunctionMode):
    """The mask of each call of scaled_dot_product_attention; None where it has none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append(args[3] if len(args) > 3 else kwargs.get("attn_mask"))
        return function(*args, **kwargs)


def masks_in(graph: torch.fx.Graph) -> Iterator[object]:
    """The same of a traced graph."""
    for node in graph.nodes:
        if "scaled_dot_product_attention" in str(node.target):
            yield node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")


NO_MASKS = TINY["num_hidden_layers"] * [None]
WAYS = pytest.mark.parametrize(
    "used", [(), ("folded_patches",), ("stacked_qkv",), SHARING], ids=["none", "folded", "stacked", "both"]
)


@WAYS
@pytest.mark.parametrize("capturing", [False, True])
def test_attention_has_no_mask_also_while_a_graph_is_captured(plain, monkeypatch, used, capturing):
    model = with_lean(plain, used)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with Masks() as masks:
        inference.device_features(model, some_crops(2), inference.JUDGED)
    assert masks.seen == NO_MASKS


@WAYS
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_attention_has_no_mask_when_compiled(plain, used):
    model, found = with_lean(plain, used), []

    def backend(module: torch.fx.GraphModule, _inputs: list) -> Callable:
        found.extend(masks_in(module.graph))
        return module.forward

    expected = inference.forward(model, some_crops(2)).hidden
    compiled = torch.compile(lambda crops: inference.forward(model, crops).hidden, backend=backend)
    assert torch.equal(compiled(some_crops(2)), expected)
    assert found == NO_MASKS
    torch._dynamo.reset()


def test_the_compiled_peer_has_no_mask(plain, monkeypatch):
    compiled, found = torch.compile, []

    def backend(module: torch.fx.GraphModule, _inputs: list) -> Callable:
        found.extend(masks_in(module.graph))
        return module.forward

    monkeypatch.setattr(torch, "compile", lambda module, **_asked: compiled(module, backend=backend))
    pixels = inference.normalize(some_crops(2), plain.preprocess).contiguous()
    expected = plain.module(pixel_values=pixels).last_hidden_state
    run = eval_performance.compile_peer(plain, eval_performance.Arithmetic("transformers", plain=True), pixels)
    assert relative_l2(run(pixels).last_hidden_state.numpy(), expected.numpy()) < ROUNDING
    assert found == NO_MASKS
    torch._dynamo.reset()


def test_what_is_exported_for_the_peers_has_no_mask_and_computes_the_same(plain):
    pixels = inference.normalize(some_crops(2), plain.preprocess).contiguous()
    expected = plain.module(pixel_values=pixels).last_hidden_state
    module = eval_performance.only_last_hidden_state(plain)
    with Masks() as masks:
        assert relative_l2(module(pixels).numpy(), expected.numpy()) < ROUNDING
    exported = torch.export.export(
        module, (pixels,), dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}}, strict=False
    )
    assert masks.seen == list(masks_in(exported.graph)) == NO_MASKS
    assert relative_l2(exported.module()(pixels).numpy(), expected.numpy()) < ROUNDING


@pytest.mark.skipif(not os.environ.get("WEBSSL_TRANSFORMERS"), reason="WEBSSL_TRANSFORMERS names no version, such as 5.17.*")
@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="its packages are those of transformers 4")
def test_masks_of_another_transformers(tmp_path):
    """5.17 gives a ViT a mask while a graph is captured, which the versions that are installed here do not."""
    target, version = tmp_path / "transformers", os.environ["WEBSSL_TRANSFORMERS"]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", target, f"transformers=={version}"]
    subprocess.run(pip, check=True, timeout=300)
    environment = {name: value for name, value in os.environ.items() if name != "WEBSSL_TRANSFORMERS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "mask or bit_for_bit", Path(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


# --- on an NPU ---


@pytest.mark.parametrize("used", [(), *((lever,) for lever in ON_AN_NPU[:4]), ON_AN_NPU], ids="+".join)
def test_levers_on_an_npu_are_float32(npu, tiny_folder, used):
    model = levers.with_levers(load_model(npu, str(tiny_folder)), used)
    assert model.levers == tuple(lever for lever in used if lever != "fused_mlp")
    assert relative_l2(hidden_of(model, some_crops(4)), golden(tiny_folder, model, some_crops(4))) <= ROUNDING


@pytest.mark.parametrize("lever", ["fused_norms", "fused_mlp", "fused_attention"])
def test_fused_kernels_of_half_precision_are_as_exact_as_half_precision_is(npu, tiny_folder, lever):
    plain = load_model(npu, str(tiny_folder), "float16")
    exact = golden(tiny_folder, plain, some_crops(4))
    own = relative_l2(hidden_of(plain, some_crops(4)), exact)
    model = levers.with_levers(load_model(npu, str(tiny_folder), "float16"), (lever,))
    assert model.levers == (lever,)
    assert relative_l2(hidden_of(model, some_crops(4)), exact) < 2 * own


def test_fused_attention_is_called_in_each_layer_without_a_copy(npu, tiny_folder, monkeypatch):
    calls, torch_npu = [], sys.modules["torch_npu"]
    fused = torch_npu.npu_fusion_attention
    monkeypatch.setattr(
        torch_npu, "npu_fusion_attention", lambda *args, **asked: calls.append((args, asked)) or fused(*args, **asked)
    )
    model = levers.with_levers(load_model(npu, str(tiny_folder)), ("fused_attention",))
    hidden_of(model, some_crops(2))
    assert len(calls) == TINY["num_hidden_layers"]
    (query, _, _, heads, layout), asked = calls[0]
    assert (tuple(query.shape), heads, layout, asked) == ((2, 17, 2, 64), 2, "BSND", {"scale": 64**-0.5, "sync": True})
    assert query.is_contiguous()


def test_levers_of_an_npu_leave_models_of_other_devices_alone(npu, tiny_folder, cpu):
    levers.with_levers(load_model(npu, str(tiny_folder)), levers.LEVERS)
    model = load_model(cpu, str(tiny_folder))
    assert relative_l2(hidden_of(model, some_crops(2)), golden(tiny_folder, model, some_crops(2))) < ROUNDING


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_what_the_cpu_gives(tiny_folder, tiny):
    model = levers.with_levers(load_model(open_device("cuda"), str(tiny_folder)), levers.LEVERS)
    assert relative_l2(hidden_of(model, some_crops(5)), hidden_of(tiny, some_crops(5))) < 1e-5
