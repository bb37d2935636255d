"""The tests of the whole tree that need an NPU in their own process, in a process of each wheel."""

from __future__ import annotations

import re

import pytest

from cann import harness
from conftest import TESTS


@pytest.mark.parametrize("stack", ["2.13.0", "2.9.0"])  # what differs in 2.9.0.post2 is in the other files
def test_what_needs_an_npu_passes(stack, tmp_path):
    words = [
        "-q",
        "-m",
        "npu",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "--basetemp",
        tmp_path / "base",
        "--rootdir",
        TESTS.parent,
    ]
    argv = ["-m", "pytest", *words, "--rootdir", TESTS.parent, "--ignore", TESTS / "cann", TESTS]
    done = harness.python(stack, tmp_path, *map(str, argv), seconds=600)
    assert done.code == 0, done.out[-6000:] + done.err[-2000:]
    ran = re.search(r"(\d+) passed", done.out)
    assert ran and int(ran[1]) > 60, done.out[-2000:]
    assert any(line.startswith("aclnnFlashAttentionScore ") for line in done.trace)
