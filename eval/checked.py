"""What was checked without an NPU, by the real torch_npu over the stand-in for CANN of tests/cann: the tables of it.

results/torch_npu_check.json is written by tests/cann/check.py, results/beside_msprobe.json by tests/cann/beside_msprobe.py.
They are no NPU's results, and stand in tables of their own.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from inference import DTYPES

from common import Column

NAME, BESIDE_MSPROBE = "torch_npu_check", "beside_msprobe"
PROVES = (
    "Unmodified torch_npu over a stand-in for CANN shows what torch_npu does with this code: what it launches, captures and "
    "copies, and that the numbers are right. It shows nothing of CANN, its kernels or speed."
)

# Of embed.py, eager: the operators of an image by levers and dtype.
BUDGETS = {
    "plain": {"levers": "none", "dtype": "float32"},
    "two": {"levers": "two", "dtype": "float32"},
    "default": {"levers": "default", "dtype": "float32"},
    "all": {"levers": "all", "dtype": "float32"},
    "half": {"levers": "all", "dtype": "float16"},
}
SUMMARY_COLUMNS = (
    Column("torch_npu", "torch_npu", "torch_npu"),
    Column("Beside", "同时安装", "beside"),
    Column("Ran", "可运行", "ran"),
    *(Column(f"Error, {dtype}", f"{dtype} 误差", f"error.{dtype}", ".1e") for dtype in DTYPES),
    Column("Graphs", "成图", "captured"),
    Column("Operators, plain", "算子数，原样", "operators.plain"),
    Column("default", "默认手段", "operators.default"),
    Column("all levers", "全部手段", "operators.all"),
    Column("all, float16", "全部，float16", "operators.half"),
)
MODE_COLUMNS = (
    Column("torch_npu", "", "torch_npu"),
    Column("Script", "", "script"),
    Column("Execution", "", "execution"),
    Column("Levers", "", "levers"),
    *(Column(f"Error, {dtype}", "", f"error.{dtype}", ".1e") for dtype in DTYPES),
    *(Column(f"Operators, {dtype}", "", f"launches.{dtype}") for dtype in DTYPES),
    Column("Captured", "", "captured"),
)
BUDGET_COLUMNS = (
    Column("torch_npu", "", "torch_npu"),
    Column("Operator", "", "operator"),
    Column("Plain transformers", "", "plain"),
    Column("Two levers", "", "two"),
    Column("Default levers", "", "default"),
    Column("All levers, float32", "", "all"),
    Column("All levers, half precision", "", "half"),
)

MSPROBE_TASKS = [(task, level) for task in ("tensor", "statistics") for level in ("L1", "mix")]  # L1 is its default level
MSPROBE_COLUMNS = (
    Column("Planted in layer 3's MLP", "", "planted"),
    Column("Images", "", "images"),
    Column("eval_accuracy names", "", "named"),
    Column("own error, worst token", "", "own_error", ".1e"),
    Column("faithful float32", "", "faithful"),
    *(Column(f"msprobe, {task}, {level}", "", f"msprobe.{task} {level}") for task, level in MSPROBE_TASKS),
)


def rows_where(stack: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in stack["rows"] if row["ran"] and all(row[name] == value for name, value in wanted.items())]


def share_of(rows: list[dict[str, Any]], of: list[dict[str, Any]]) -> str:
    return f"{len(rows)}/{len(of)}"


def rows_of_budgets(stack: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The row of each of BUDGETS that ran."""
    found = {name: rows_where(stack, script="embed", execution="eager", **way) for name, way in BUDGETS.items()}
    return {name: rows[0] for name, rows in found.items() if rows}


def summary_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each wheel: the worst error of each dtype, and the operators of an image."""
    rows = []
    for stack in result["stacks"]:
        versions, graphs = stack.get("versions") or {}, rows_where(stack, execution="graph")
        errors = {dtype: [row["relative_l2_error"] for row in rows_where(stack, dtype=dtype)] for dtype in DTYPES}
        rows.append(
            {
                "torch_npu": stack["torch_npu"],
                "beside": ", ".join(f"{name} {versions.get(name, '-')}" for name in ("torch", "transformers", "numpy")),
                "ran": share_of(rows_where(stack), stack["rows"]),
                "error": {dtype: max(found, default=None) for dtype, found in errors.items()},
                "captured": share_of(rows_where(stack, captured=True), graphs),
                "operators": {name: row["launches"] for name, row in rows_of_budgets(stack).items()},
            }
        )
    return rows


def mode_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each wheel, script, execution and set of levers: what all dtypes gave."""
    rows = []
    for stack in result["stacks"]:
        ways = dict.fromkeys((row["script"], row["execution"], row["levers"]) for row in stack["rows"])
        for script, execution, levers in ways:
            way = {"script": script, "execution": execution, "levers": levers}
            found = rows_where(stack, **way)
            row = {"torch_npu": stack["torch_npu"], **way, "script": f"{script}.py"}
            row |= {"error": {one["dtype"]: one["relative_l2_error"] for one in found}}
            row |= {"launches": {one["dtype"]: one["launches"] for one in found}}
            rows.append(row | {"captured": all(one["captured"] for one in found) if execution == "graph" else None})
    return rows


def budget_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each operator of an image, eager, by embed.py; wheels with the same budget stand together."""
    budgets: dict[tuple, tuple[list[str], dict[str, Counter]]] = {}
    for stack in result["stacks"]:
        found = {name: Counter(row["operators"]) for name, row in rows_of_budgets(stack).items()}
        key = tuple((name, *sorted(counts.items())) for name, counts in found.items())
        budgets.setdefault(key, ([], found))[0].append(stack["torch_npu"])
    rows = []
    for names, found in budgets.values():
        label = {"torch_npu": ", ".join(names)}
        for operator in sorted(set().union(*found.values())):
            rows.append(label | {"operator": operator} | {name: counts[operator] for name, counts in found.items()})
        rows.append(label | {"operator": "all"} | {name: counts.total() for name, counts in found.items()})
    return rows


def audit_cells(result: dict[str, Any]) -> list[str]:
    """What the audit's rows say of it: hardware, output, accuracy, performance."""
    rows, all_rows = summary_rows(result), {"rows": [row for stack in result["stacks"] for row in stack["rows"]]}
    ways = share_of(rows_where(all_rows), all_rows["rows"])
    graphs = share_of(rows_where(all_rows, captured=True), rows_where(all_rows, execution="graph"))
    worst = [[row["error"][dtype] for row in rows] for dtype in ("float32", "float16")]
    strict, half = ("-" if None in found else f"{max(found):.1e}" for found in worst)
    default, least = (max(row["operators"][name] for row in rows) for name in ("default", "half"))
    operators = f"operators an image: {default} (default), {least} (float16, all levers)"
    return [
        f"no hardware; torch_npu {', '.join(row['torch_npu'] for row in rows)}",
        f"runs: {ways} ways",
        f"error against the CPU: {strict} (float32), {half} (float16)",
        f"no speed; {operators}; captured as a graph: {graphs} ways",
    ]


def msprobe_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each planted error. Of msprobe: whether it flags the planted row, and how many others."""
    rows = []
    for found in result["rows"]:
        ours = found["eval_accuracy"]
        row = {"planted": f"{found['size']:g}" if found["size"] else "nothing", "images": found["images"], "msprobe": {}}
        row |= {"named": ", ".join(ours.get("named", ())) or ("nothing" if ours["ran"] else "did not run")}
        row |= {"own_error": max(ours.get("own_errors", {}).values(), default=None), "faithful": ours.get("faithful")}
        for task, said in found["msprobe"].items():
            if not said["ran"]:
                row["msprobe"][task] = "did not run"
                continue
            others = sum(flag["row"] not in said["planted_rows"] for flag in said["flagged"])
            kinds = sorted({flag["result"] for flag in said["flagged"] if flag["row"] in said["planted_rows"]})
            told = ([f"names it ({', '.join(kinds)})"] if kinds else []) + ([f"{others} other rows"] if others else [])
            row["msprobe"][task] = ", ".join(told) or f"all {said['rows']} rows pass"
        rows.append(row)
    return rows
