"""A matrix product that is a little wrong on the NPU: eval_accuracy names the half of the layer that it is in, and no other."""

from __future__ import annotations

import json

import pytest

from cann import bundle
from conftest import TINY

LAYERS = TINY["num_hidden_layers"]
PRODUCTS = 1 + 4 * LAYERS + 1  # aclnnAddmm of a pass: patches; query, key and value, output, two of the MLP; the pooler
TOKENS = (TINY["image_size"] // TINY["patch_size"]) ** 2 + 1
ATTENTION, MLP = 1 + 4 * 1 + 2, 1 + 4 * 1 + 4  # of layer 2
ONE_IMAGE = f"@{TOKENS}-{2 * TOKENS}"


@pytest.mark.parametrize(
    ("planted", "named"),
    [
        ("", []),
        (f"aclnnAddmm:{MLP}%{PRODUCTS}=1e-3", ["layer 2 MLP"]),
        (f"aclnnAddmm:{MLP}%{PRODUCTS}=1e-5", ["layer 2 MLP"]),
        (f"aclnnAddmm:{ATTENTION}%{PRODUCTS}=1e-3", ["layer 2 attention"]),
        (f"aclnnAddmm:{ATTENTION}%{PRODUCTS}{ONE_IMAGE}=1e-4", ["layer 2 attention"]),
        (f"aclnnAddmm:{MLP}%{PRODUCTS}{ONE_IMAGE}=1e-4", ["layer 2 MLP"]),
    ],
)
def test_what_is_planted_is_named_alone(tiny_folder, tmp_path, planted, named):
    scene = bundle.Scene("2.13.0", tmp_path / "run", tiny_folder)
    flags = ("--image_path", bundle.photos(), "--views", 0, "--probe", 0)
    done = scene.run("eval/eval_accuracy.py", *flags, **({"STANDIN_WRONG": planted} if planted else {}))
    assert done.code in (0, 1), done.err
    assert len([name for name in done.operators() if name == "Addmm"]) % PRODUCTS == 0
    (path,) = (tmp_path / "run" / "results").glob("accuracy_eval*.json")
    result = json.loads(path.read_text())
    assert [row["stage"] for row in result["stages"] if row["at_fault"]] == result["begins_at"] == named
