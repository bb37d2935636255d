"""Where an error begins: each block's own error beside what it inherits, also under massive activations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import inference
import pytest
import torch

import stages
from bulk import levers
from conftest import SAMPLES, TESTS, save_checkpoint

TRAINED = TESTS / "data" / "trained_vit"  # tests/make_trained_fixture.py


@pytest.fixture(scope="module")
def grown(tmp_path_factory, cpu):
    """By size: the trained fixture with massive activations on three tokens and channels, and its stages in float64."""
    from transformers import ViTModel

    made: dict[float, tuple[Path, stages.Stages]] = {}

    def grow(size: float) -> tuple[Path, stages.Stages]:
        if size not in made:
            module = ViTModel.from_pretrained(TRAINED)
            with torch.no_grad():
                module.embeddings.position_embeddings[0, [1, 20, 43], torch.tensor([[7], [50], [33]])] += size
            folder = save_checkpoint(tmp_path_factory.mktemp("grown") / str(size), module)
            golden, plain = (inference.load_model(cpu, str(folder), dtype) for dtype in ("float64", "float32"))
            crops = inference.crops_of([SAMPLES / "chelsea.jpg", SAMPLES / "coffee.jpg"], plain.preprocess)
            made[size] = folder, stages.prepare_stages(golden, plain, crops)
        return made[size]

    return grow


HOOKED = tuple(lever for lever in levers.DEFAULT_LEVERS if lever != "packed_weights")  # which passes linear layers by


def measured(made: tuple[Path, stages.Stages], device: inference.Device, change=None, used=HOOKED) -> list[dict]:
    """The rows of the stages for a model with levers on a device, after `change`."""
    folder, prepared = made
    model = levers.with_levers(inference.load_model(device, str(folder)), used)
    if change:
        with torch.no_grad():
            change(model)
    return stages.measure_stages(prepared, model, stages.Arithmetic("float32"))


def last_linear(part: torch.nn.Module, block: str) -> torch.nn.Module:
    """The linear layer at the end of a layer's "attention" or "MLP", in either version of transformers, packed or not."""
    named = dict(part.named_modules())
    names = {"attention": ("attention.o_proj", "attention.output.dense"), "MLP": ("mlp.fc2", "output.dense")}[block]
    return next(named[name] for name in names if name in named)


def times(factor: float, number: int, block: str):
    def change(model):
        part = last_linear(inference.layers_of(model.module)[number - 1], block)
        part.register_forward_hook(lambda _part, _inputs, output: output * factor)

    return change


@pytest.mark.parametrize("size", [0.0, 100.0, 1000.0])
@pytest.mark.parametrize(("number", "block"), [(1, "MLP"), (4, "attention"), (4, "MLP"), (6, "attention")])
def test_a_small_fault_is_named_under_massive_activations(grown, cpu, size, number, block):
    rows = measured(grown(size), cpu, times(1 + 1e-5, number, block))
    assert [row["stage"] for row in rows if row["at_fault"]] == [f"layer {number} {block}"]


@pytest.mark.parametrize("size", [0.0, 100.0, 1000.0])
def test_nothing_is_at_fault_where_nothing_is_wrong(grown, cpu, size):
    assert [row["stage"] for row in measured(grown(size), cpu, used=levers.DEFAULT_LEVERS) if row["at_fault"]] == []


@pytest.mark.parametrize("size", [0.0, 1000.0])
def test_a_small_fault_is_named_on_an_npu_too(npu, grown, size):
    rows = measured(grown(size), inference.open_device("npu"), times(1 + 1e-5, 3, "MLP"))
    assert [row["stage"] for row in rows if row["at_fault"]] == ["layer 3 MLP"]


def test_own_error_stands_beside_what_is_inherited(grown, cpu):
    rows = {row["stage"]: row for row in measured(grown(0.0), cpu, times(1.01, 3, "attention"))}
    assert rows["layer 3 attention"]["own_relative_l2_error"] == pytest.approx(0.01, rel=0.01)
    assert rows["layer 5 MLP"]["own_relative_l2_error"] < 1e-6
    assert rows["layer 5 MLP"]["median_token_relative_l2_error"] > 1e-4
    assert rows["layer 2 MLP"]["median_token_relative_l2_error"] < 1e-6
    assert {row["float32_own_relative_l2_error"] < 1e-6 for row in rows.values()} == {True}


def off(part: torch.nn.Module) -> None:
    part.register_forward_hook(lambda _part, _inputs, output: output + 0.5 * output.roll(1, -1))


BIG_FAULTS = {
    "patch embedding": lambda module: off(module.embeddings.patch_embeddings),
    "position embedding": lambda module: module.embeddings.position_embeddings.mul_(1.5),
    "layer 4 attention": lambda module: off(last_linear(inference.layers_of(module)[3], "attention")),
    "layer 6 MLP": lambda module: off(last_linear(inference.layers_of(module)[5], "MLP")),
    "final norm": lambda module: off(module.layernorm),
    "pooler": lambda module: off(module.pooler.dense),
}


@pytest.mark.parametrize("stage", BIG_FAULTS)
def test_nothing_that_comes_after_a_big_fault_is_blamed_for_it(grown, cpu, stage):
    rows = measured(grown(0.0), cpu, lambda model: BIG_FAULTS[stage](model.module), used=())
    assert [row["stage"] for row in rows if row["at_fault"]] == [stage]


def test_plain_float32_is_measured_against_float64(grown, cpu):
    for row in measured(grown(0.0), cpu, used=()):
        assert 0 < row["relative_l2_error"] < 2e-6, row["stage"]
        assert 0 < row["own_relative_l2_error"] == row["float32_own_relative_l2_error"]


def test_the_position_embedding_and_the_final_norm_answer_for_themselves(grown, cpu):
    def shift(model):
        model.module.embeddings.position_embeddings.mul_(1.001)
        model.module.layernorm.weight.mul_(1.001)

    rows = measured(grown(0.0), cpu, shift)
    assert [row["stage"] for row in rows if row["at_fault"]] == ["position embedding", "final norm"]


def test_the_median_tells_a_stage_that_three_huge_tokens_hide(grown, cpu):
    rows = {row["stage"]: row for row in measured(grown(1000.0), cpu, times(1.001, 4, "MLP"))}
    before, after = rows["layer 4 attention"], rows["layer 4 MLP"]
    assert after["median_token_relative_l2_error"] > 30 * before["median_token_relative_l2_error"]
    assert after["relative_l2_error"] < after["median_token_relative_l2_error"] / 10


def test_the_fixture_has_the_statistics_of_trained_weights(cpu):
    model = inference.load_model(cpu, str(TRAINED))
    assert (model.pooler, model.weights.note) == ("trained", None)
    crops = inference.crops_of([str(path) for path in sorted(SAMPLES.glob("*.jpg"))], model.preprocess)
    norms = inference.forward(model, crops, ["4"]).layers["4"].norm(dim=-1).mean(0)
    outliers = norms > 3 * norms.median()
    assert outliers.nonzero().flatten().tolist() == [1, 20, 43]
    channels = inference.forward(model, crops, ["4"]).layers["4"][:, 1].abs().mean(0)
    assert channels.topk(2).indices.sort().values.tolist() == [7, 50]


def test_a_line_comes_each_time_ten_seconds_have_passed(monkeypatch):
    """Not by caplog: pytest hangs its handler on a logger that does not propagate too, and which test ran before decides."""
    clock, told = iter(range(0, 1000, 6)), []
    monkeypatch.setattr(stages.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(stages, "log", SimpleNamespace(info=told.append))
    assert list(stages.with_progress("CPU", "abcdefg")) == list("abcdefg")
    # The clock moves on 6 s each time it is read: at each batch, and once more after a line.
    assert told == [f"CPU: batch {number} of 7" for number in (2, 4, 6)]
