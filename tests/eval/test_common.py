"""What the evaluations share: tables, child processes, and what is kept whatever ends a run."""

from __future__ import annotations

import argparse
import json
import math

import inference
import pytest

import common
from common import Column


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (Column("", "", "a", ".1f"), "1.2"),
        (Column("", "", "a", ".0f", 1e3), "1250"),
        (Column("", "", "b.c"), "text"),
        (Column("", "", "b.c.d"), "-"),
        (Column("", "", "none", ".1f"), "-"),
        (Column("", "", "absent", ".1f"), "-"),
        (Column("", "", "yes", ".1f"), "yes"),
        (Column("", "", "no"), "no"),
    ],
)
def test_a_cell_has_the_columns_format_or_says_that_there_is_nothing(column, shown):
    assert column.cell({"a": 1.25, "b": {"c": "text"}, "none": None, "yes": True, "no": False}) == shown


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "one", "1.5"])
def test_a_number_that_makes_no_sense_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number above zero and at most 1"):
        common.positive_float(text, 1)
    assert common.positive_float("0.5", 1) == 0.5


# --- what is kept ---


@pytest.fixture
def args(tmp_path) -> argparse.Namespace:
    return argparse.Namespace(script="tuned", results=tmp_path)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "stopped"),
        (KeyboardInterrupt("stopped; the next command"), KeyboardInterrupt, "stopped"),  # of what runs inside
        (inference.UsageError("no disk"), inference.UsageError, "no disk"),
        (ValueError("broken\nmore"), RuntimeError, "ValueError: broken"),
    ],
)
def test_whatever_ends_a_block_its_last_words_say_where_what_was_measured_is(args, cpu, tmp_path, error, kind, words):
    whole, partial = tmp_path / "tuned_cpu.json", tmp_path / "tuned_partial_cpu.json"
    whole.write_text("an older result")
    with pytest.raises(kind) as ended, common.keeping(args, {"device": "cpu", "rows": []}, cpu):
        raise error
    assert str(ended.value) == f"{words}; nothing was measured yet" and not partial.exists()
    with pytest.raises(kind) as ended, common.keeping(args, {"device": "cpu", "rows": []}, cpu) as keep:
        keep(rows=[1.0, math.nan])
        assert json.loads(partial.read_text()) == {"partial": True, "device": "cpu", "rows": [1.0, None]}
        raise error
    assert str(ended.value) == f"{words}; what was measured so far is in {partial}"
    assert partial.exists() and whole.read_text() == "an older result"


def test_what_was_kept_on_the_way_goes_when_all_is_done(args, cpu, tmp_path):
    result = {"device": "npu"}
    with common.keeping(args, result, cpu) as keep:
        keep(rows=[1])
        assert (tmp_path / "tuned_partial.json").exists()
    assert list(tmp_path.iterdir()) == [] and result == {"device": "npu", "rows": [1]}


def test_nothing_is_kept_of_a_device_that_has_stopped_computing(args, cpu, tmp_path, monkeypatch):
    def stopped(device):
        raise inference.DeviceLost(f"{device.kind} computes nothing")

    partial = tmp_path / "tuned_partial_cpu.json"
    said = "^cpu computes nothing; what was measured so far is in "
    with pytest.raises(inference.DeviceLost, match=said), common.keeping(args, {"device": "cpu"}, cpu) as keep:
        keep(rows=[1])
        monkeypatch.setattr(inference, "require_computing", stopped)
        keep(rows=[1, 2])
    assert json.loads(partial.read_text())["rows"] == [1]


# --- child processes ---


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
