"""Pages say what the files say, in both languages, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import inference
import pytest
from made_results import (
    BLOCKED,
    ENVIRONMENT,
    MAKERS,
    RANDOM,
    checked_result,
    inference_result,
    performance_result,
    provenance,
    save,
    save_all,
    stage,
    write,
)

import evidence
import tables


def page(root: Path, name: str, language: str = "en") -> str:
    return tables.render(tables.TABLES[name](evidence.read_evidence(root)), language)


def cells(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# --- what the tables say ---


def test_the_figures_are_those_of_the_files(page_bundle):
    save_all(page_bundle)
    absolute = ["2.3400", "3.25e-04", "4.50e-05"]
    hidden = ["CPU", "Hidden", "0.1234", *absolute, "0.9999900", "1.23e-07", "5.68e-06", "PASS"]
    assert hidden in cells(page(page_bundle, "accuracy"))
    speed = ["CPU", "4", "941.18", "94.12", "941.18", "-", "4.25", "900", "62.5", "unsteady"]
    assert speed in cells(page(page_bundle, "performance"))
    details = evidence.details_page(evidence.read_evidence(page_bundle))
    assert ["CPU", "folder of photos to features", "10.00", "27.8", "3,472", "434"] in cells(details)


@pytest.mark.parametrize(("language", "said"), [("en", "HF32 or TF32 allowed"), ("zh", "允许 HF32 或 TF32")])
def test_a_figure_says_which_arithmetic_and_execution_gave_it(page_bundle, language, said):
    save(page_bundle, "performance_eval", "npu", dtype="float16", execution="graph")
    save(page_bundle, "accuracy_eval", "npu", allow_hf32=True)
    audited = cells(page(page_bundle, "audit", language))
    assert audited[6][1].endswith(", **float16**, **graph**") or audited[6][1].endswith("，**float16**，**graph**")
    assert said in audited[5][1] and "float16" not in audited[5][1]
    assert all("**float16**" in row[0] for row in cells(page(page_bundle, "performance", language))[2:] if "NPU" in row[0])
    assert all(said in row[0] for row in cells(page(page_bundle, "accuracy", language))[2:] if "NPU" in row[0])


def test_a_path_in_what_a_library_says_does_not_keep_the_page_from_being_written(page_bundle):
    told = "cannot import name 'x' from 'y' (/tmp/peers/y.py); /data/venv/lib/libtorch_npu.so: undefined symbol"
    fields = {"peers": [{"peer": "y", "unavailable": told}], "npu_blocked_reason": told, "execution_fallback": None}
    path = page_bundle / "results" / "performance_eval_cpu.json"
    inference.write_json(path, performance_result(device="cpu", **fields))
    written = evidence.read_evidence(page_bundle).records["performance_eval_cpu"]
    masked = "cannot import name 'x' from 'y' (.../y.py); .../libtorch_npu.so: undefined symbol"
    assert (written["peers"][0]["unavailable"], written["npu_blocked_reason"]) == (masked, masked)


def test_before_an_npu_has_run_the_published_run_stands_in_a_column_of_its_own(page_bundle):
    write(page_bundle, "inference", BLOCKED)
    write(page_bundle, "performance_eval", BLOCKED)
    text = page(page_bundle, "audit")
    head, _, repository, hardware, photo, accuracy, speed, files = cells(text)
    checked = "Real torch_npu, over a stand-in for CANN"
    assert head == ["Audit item", "Result", checked, "Published Ascend run (not made by this code)"]
    assert repository[1:] == ["webssl-mae300m-npu"] * 3
    assert hardware[1:] == ["NPU, `#+NPU`; no NPU here", "not measured", "Ascend910_9362, CANN 8.5.1, torch_npu 2.9.0.post1"]
    assert photo[1] == "**BLOCKED**" and photo[3].startswith("**runs**: 1 x 197 x 1024, 12.63 ms")
    assert accuracy[1] == "not measured" and accuracy[3] == (
        "**PASS** (bar 1%): filtered MRE 0.1172%, unfiltered mean 1.886%, cosine 0.999989"
    )
    assert speed[3] == "best 332.75 images/s (batch 8), latency 11.81 ms (batch 1)"
    assert "`inference`: [json](results/inference.json), [png](assets/inference_result.png); `accuracy_eval`: [png]" in files[1]
    assert files[2] == "-" and files[3].startswith(
        "`inference`: [json](results/published/inference.json), [log](logs/published/inference.log); "
    )
    assert text.splitlines()[-1].startswith("**BLOCKED**: torch_npu is not installed. A host with an Ascend NPU lifts it: ")


def test_each_reason_for_blocked_stands_once(page_bundle):
    for name, reason in (("inference", "a"), ("accuracy_eval", "b"), ("performance_eval", "a")):
        write(page_bundle, name, BLOCKED | {"reason": reason})
    assert "\n**BLOCKED**: a; b. " in page(page_bundle, "audit")


def test_after_an_npu_has_run_its_figures_fill_this_codes_column(page_bundle):
    save_all(page_bundle, "npu", device_name="Ascend910")
    write(page_bundle, "env_info", ENVIRONMENT | {"npu_model": "Ascend910_9999"})
    *_, hardware, photo, accuracy, speed, _files = cells(page(page_bundle, "audit"))
    assert hardware[1] == "NPU, `#+NPU`; Ascend910_9999"
    assert photo[1] == "**runs**: 2 x 17 x 128, 12.50 ms, 160.00 images/s"
    assert accuracy[1].endswith("relative L2 1.2e-07, worst token 5.7e-06 against float64")
    assert speed[1].startswith("best 4.25 images/s (batch 4), latency 470.59 ms (batch 1): 0.01 times the published rate")
    assert "not measured" not in page(page_bundle, "audit") and "BLOCKED" not in page(page_bundle, "audit")


def test_every_device_and_the_published_run_stand_in_one_table(page_bundle):
    for kind in ("npu", "cuda", "cpu"):
        save_all(page_bundle, kind)
    published = "published, **not this code**"
    for name in ("accuracy", "performance"):
        devices = [row[0] for row in cells(page(page_bundle, name))[2:]]
        assert list(dict.fromkeys(devices)) == ["NPU", "GPU", "CPU", published]
    rows = [row for row in cells(page(page_bundle, "performance")) if row[0] == published]
    assert [published, "1", "11.69", "0.24", "11.81", "11.87", "85.56", "1163", "-"] == rows[0][:9]
    assert [row[6] for row in rows] == ["85.56", "179.20", "276.05", "332.75"]
    rows = [row for row in cells(page(page_bundle, "accuracy")) if row[0] == published]
    assert rows[0][1:] == ["Pooler", "0.2185", "0.8035", "4.51e-03", "1.10e-03", "0.9999937", "-", "-", "PASS"]
    assert rows[1][1:] == ["Hidden", "0.1172", "1.8862", "4.59e-02", "1.86e-03", "0.9999894", "-", "-", "PASS"]


def test_what_ran_without_an_npu_stands_beside_the_npus_column_and_never_in_it(page_bundle):
    write(page_bundle, "inference", BLOCKED)
    write(page_bundle, "torch_npu_check", checked_result())
    *_, hardware, photo, accuracy, speed, files = cells(page(page_bundle, "audit"))
    assert photo[1] == "**BLOCKED**" and accuracy[1] == speed[1] == "not measured"
    assert hardware[2] == "no hardware; torch_npu 2.13.0, 2.9.0" and photo[2] == "runs: 14/15 ways"
    assert accuracy[2] == "error against the CPU: 2.8e-07 (float32), 1.5e-03 (float16)"
    assert speed[2] == "no speed; operators an image: 147 (default), 51 (float16, all levers); captured as a graph: 2/4 ways"
    assert files[2] == "`torch_npu_check`: [json](results/torch_npu_check.json)"
    proven = {"en": "It shows nothing of CANN, its kernels or speed.", "zh": "不证明 CANN、其算子与速度。"}
    for language, proves in proven.items():
        text = page(page_bundle, "torch_npu", language)
        shown = ["2.9.0", "7/8", "2.8e-07", "1.5e-03", "8.5e-03", "1/2", "194", "147", "99", "51"]
        assert cells(text)[3] == shown and text.endswith(proves)


def test_the_operators_of_an_image_stand_by_name_and_wheels_with_the_same_ones_together(page_bundle):
    write(page_bundle, "torch_npu_check", checked_result())
    rows = cells(evidence.details_page(evidence.read_evidence(page_bundle)).split("## Operators an image")[1])[2:]
    assert rows == [
        ["2.13.0, 2.9.0", "aclnnAdd", "49", "49", "49", "1", "1"],
        ["2.13.0, 2.9.0", "aclnnAddmm", "145", "146", "98", "98", "50"],
        ["2.13.0, 2.9.0", "all", "194", "195", "147", "99", "51"],
    ]


def test_deliverables_say_what_is_missing_where_it_ran_and_what_is_blocked(page_bundle):
    for name in ("inference.py", "eval/eval_accuracy.py", "eval/eval_performance.py"):
        (page_bundle / name).parent.mkdir(exist_ok=True)
        (page_bundle / name).touch()
    save_all(page_bundle)
    save(page_bundle, "performance_eval", "cuda")
    write(page_bundle, "accuracy_eval", BLOCKED)
    states = dict(cells(page(page_bundle, "deliverables"))[2:])
    assert states["[inference.py](inference.py)"] == "complete; ran on CPU"
    assert states["[eval/eval_accuracy.py](eval/eval_accuracy.py)"] == "complete; ran on CPU; NPU **BLOCKED**"
    assert states["[eval/eval_performance.py](eval/eval_performance.py)"] == "complete; ran on GPU, CPU"
    told = states["[logs/](logs/), [results/](results/), [assets/](assets/)"]
    assert "results/inference.json, results/performance_eval.json" in told and told.endswith("; NPU **BLOCKED**")
    assert "results/accuracy_eval.json" not in told
    (page_bundle / "inference.py").unlink()
    assert "missing: inference.py" in page(page_bundle, "deliverables")


def test_the_picks_of_the_tuner_stand_in_a_line_for_each_device(page_bundle):
    save(page_bundle, "tuned", "cuda", device_name="A card", weights=RANDOM)
    line = (
        "- GPU, **random weights**, A card: throughput 2,000.00 images/s (float16, graph, batch 64); "
        "faithful 1,000.00 images/s (float32, eager, batch 8, without stacked_qkv, TASK_QUEUE_ENABLE=1)"
    )
    assert page(page_bundle, "tuned").strip() == line
    assert "吞吐 2,000.00 图片/秒 (float16, graph, 批大小 64)" in page(page_bundle, "tuned", "zh")
    latency = {"picks": {"latency": {**MAKERS["tuned"]()["rows"][3]}}}
    save(page_bundle, "tuned", "cuda", **latency)
    assert "latency 4.00 ms (float16 (HF32, TF32 allowed), eager, batch 1)" in page(page_bundle, "tuned")


def test_random_weights_stand_in_every_row_that_shows_them(page_bundle):
    save_all(page_bundle, weights=RANDOM)
    for name in ("accuracy", "performance"):
        rows = [row for row in cells(page(page_bundle, name)) if row[0].startswith("CPU")]
        assert rows and all("**random&nbsp;weights**" in row[0] for row in rows)


def test_the_rows_of_an_interrupted_run_count_until_there_is_a_whole_one(page_bundle):
    write(page_bundle, "performance_eval", BLOCKED)
    write(page_bundle, "performance_eval_partial", performance_result(device="npu", partial=True))
    assert "NPU, **partial**" in page(page_bundle, "performance")
    assert page(page_bundle, "audit").count("**partial**") == 1
    save(page_bundle, "performance_eval", "npu")
    assert "partial" not in page(page_bundle, "performance")


def test_the_key_lines_of_the_run_that_was_saved_are_quoted(page_bundle):
    save(page_bundle, "inference")
    write(page_bundle, "performance_eval", BLOCKED)
    blocked = ("[INFO] Results saved to results/performance_eval.json", "[ERROR] BLOCKED: no torch_npu. Run it")
    (page_bundle / "logs" / "performance_eval.log").write_text("".join(f"2026-05-15 04:33:04,368 {line}\n" for line in blocked))
    text = "".join(
        f"2026-05-15 04:33:04,368 [INFO] {line}\n"
        for rate, end in (("1.5", "Results saved to results/inference_cpu.json"), ("2.5", "stopped"))
        for line in ("Device: cpu, A (asked for)", "Loading", f"Inference time: {rate}s", end)
    )
    (page_bundle / "logs" / "inference_cpu.log").write_text(text)
    quoted = page(page_bundle, "log")
    assert "[ERROR] BLOCKED: no torch_npu. Run it" in quoted
    assert (
        "logs/inference_cpu.log: 2026-05-15 04:33:04,368 [INFO] Inference time: 1.5s" in quoted
        and "2.5" not in quoted
        and "Loading" not in quoted
    )


def test_versions_say_which_stacks_pip_resolves(page_bundle):
    tried = [{"cann": "8.5", "python": "3.10", "resolves": True}, {"cann": "8.5", "python": "3.11", "resolves": False}]
    write(page_bundle, "install_resolution", {"resolved": tried})
    found = page(page_bundle, "versions")
    assert "# CANN 8.5: torch_npu 2.9.0, 2.9.0.post1; Python 3.10\n" in found
    assert "pip install torch==2.9.0 --index-url https://download.pytorch.org/whl/cpu && pip install torch_npu==2.9.0 " in found
    assert "; Python -\n" in found and page(page_bundle, "versions", "zh") == found


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_chinese_tables_hold_no_english_sentence(page_bundle, name):
    """Names, units, verdicts and what a log says stay."""
    save_all(page_bundle, weights=RANDOM)
    write(page_bundle, "inference", BLOCKED)
    text = re.sub(
        r"```.*?```|`[^`]*`|\[\w+/(?=\])|\]\([^)]*\)|[\w/]+\.(md|py|json|log|png|txt)",
        " ",
        page(page_bundle, name, "zh"),
        flags=re.DOTALL,
    )
    words = set(re.findall(r"[A-Za-z][a-z]{2,}", text))
    known = {
        "torch",
        "numpy",
        "npu",
        "pip",
        "Python",
        "float",
        "Some",
        "threads",
        "commit",
        "post",
        "aarch",
        "RMS",
        "transformers",
    }
    known |= {"cpu", "bfloat", "json", "log", "png", "webssl", "mae", "Ascend", "eager", "graph", "stacked", "qkv"}
    assert words - known == set()


def test_both_languages_have_the_same_figures(page_bundle):
    save_all(page_bundle)
    for name in tables.TABLES:
        found = []
        for language in ("en", "zh"):
            rows = [
                row for row in cells(page(page_bundle, name, language)) if row[0] != "---" and not re.search(r"[(（]h", row[-1])
            ]
            found.append([re.findall(r"\d[\d.,e%-]*\d", " ".join(row)) for row in rows[1:]])
        assert found[0] == found[1], name
        assert name in ("log", "versions", "tuned", "decode") or found[0]


def test_results_in_full_stand_on_a_page_of_their_own(page_bundle, make_pages):
    save_all(page_bundle)
    assert make_pages().code == 0
    text = (page_bundle / "results" / "README.md").read_text(encoding="utf-8")
    assert ["CPU", "1.50", "0.50", "-", "-", "-"] in cells(text)  # the cold start
    assert ["CPU", "transformers", "1", "1.90", "2.40", "1.062", "3", "-"] in cells(text)
    assert "The ratio is the median over turns" in text
    assert ["published Ascend run, **not this code**", "8", "24.04"] in [row[:2] + row[4:5] for row in cells(text)]
    made = ["CPU", "Some CPU, 2 threads", "checkpoint", "float32", "2026-05-15T04:33:04+00:00", "a1b2c3d4" * 5, "no"]
    assert cells(text).count(made) == 3  # the accuracy says also what it is against
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if not (page_bundle / "results" / link).exists()] == []


def stage_names(root: Path, device: str) -> list[str]:
    """The stages that results/README.md shows of a device."""
    table = evidence.details_page(evidence.read_evidence(root)).split("## Where the error begins")[1].split("\n## ")[0]
    return [row[1] for row in cells(table) if row[0].startswith(device) and len(row) == 9]


def test_of_fifty_stages_the_ten_worst_are_shown_and_the_rest_is_counted(page_bundle):
    """By their own errors, not by what they inherit, in the order of the forward pass; one that is not finite is the worst."""
    errors = {f"layer {number}": 1e-7 * (number * 7 % 25) for number in range(1, 25)}
    rows = [stage(name, error) | {"relative_l2_error": 1 - error} for name, error in errors.items()]
    rows.insert(3, stage("broken", None))
    save(page_bundle, "accuracy_eval", stages=rows)
    save(page_bundle, "accuracy_eval", "cuda", stages=rows[:12])
    worst = sorted(errors, key=errors.get)[-9:]
    expected = [row["stage"] for row in rows if row["stage"] in ("broken", *worst)]
    assert stage_names(page_bundle, "CPU") == expected and expected != worst
    assert len(stage_names(page_bundle, "GPU")) == 10
    text = evidence.details_page(evidence.read_evidence(page_bundle))
    assert text.count("\nThe 10 stages with the largest own errors; the JSON has 2 more of the GPU, 15 more of the CPU.\n") == 1


def test_of_few_stages_all_are_shown(page_bundle):
    rows = [stage(f"layer {number}", 1e-7) for number in range(10)]
    save(page_bundle, "accuracy_eval", stages=rows)
    assert stage_names(page_bundle, "CPU") == [row["stage"] for row in rows]
    assert "largest own errors" not in evidence.details_page(evidence.read_evidence(page_bundle))


def test_every_cause_of_blocked_has_its_chinese():
    reasons = [reason for _pattern, reason, _what_to_do in inference.NPU_ERRORS]
    assert len(reasons) > 9
    for reason in reasons:
        assert not re.search("[a-z]{3}", re.sub("torch_npu|torch|libc|Python", "", tables.chinese(reason)))


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device_name": f"Ascend910, {inference.STAND_IN}"}, f"made on the {inference.STAND_IN}"),
        ({"model": "another model (128 wide)"}, "its model is 'another model (128 wide)'"),
        ({"model": None}, "its model is None"),
        ({"device": "cuda"}, "its device is 'cuda'"),
        ({"image_path": "/home/me/photo.jpg"}, "a path of somebody's machine (/home/me/photo.jpg)"),
        ({"command": "python inference.py --model_path C:\\weights"}, "a path of somebody's machine"),
    ],
)
def test_what_is_no_evidence_is_refused(page_bundle, make_pages, changes, words):
    write(page_bundle, "inference", inference_result(**{"device": "npu"} | changes))
    before = content(page_bundle)
    done = make_pages()
    assert done.code == 2
    assert done.err.startswith("error: results/inference.json: ") and words in done.err and done.err.count("\n") == 1
    assert content(page_bundle) == before


@pytest.mark.parametrize("name", [*MAKERS, "tuned"])
@pytest.mark.parametrize("suffix", ["", "_partial", "_cuda", "_partial_cuda"])
def test_every_result_is_read_and_refused_where_it_is_no_evidence(page_bundle, name, suffix):
    changes = {"device": "cuda" if "cuda" in suffix else "npu"}
    write(page_bundle, name + suffix, provenance(**changes))
    assert name + suffix in evidence.read_evidence(page_bundle).records
    write(page_bundle, name + suffix, provenance(model="another model", **changes))
    with pytest.raises(inference.UsageError, match=rf"^results/{name}{suffix}\.json: its model is 'another model'"):
        evidence.read_evidence(page_bundle)


def test_the_check_over_the_stand_in_may_say_so_and_nothing_else_may(page_bundle):
    write(page_bundle, "torch_npu_check", checked_result())
    assert "torch_npu_check" in evidence.read_evidence(page_bundle).records
    write(page_bundle, "env_info", ENVIRONMENT | {"npu_model": f"Ascend910, {inference.STAND_IN}"})
    with pytest.raises(inference.UsageError, match=rf"^results/env_info.json: made on the {inference.STAND_IN}"):
        evidence.read_evidence(page_bundle)


def test_a_record_of_the_check_that_was_made_elsewhere_is_refused(page_bundle):
    write(page_bundle, "torch_npu_check", checked_result(device="npu"))
    with pytest.raises(inference.UsageError, match=r"^results/torch_npu_check.json: its device is 'npu'"):
        evidence.read_evidence(page_bundle)


def test_paths_of_a_system_and_in_the_bundle_are_no_reason_to_refuse(page_bundle):
    paths = "weights/w /usr/local/Ascend/cann .../photo.jpg ~/ascend/log https://pytorch.org/whl/cpu 1.2 img/s /dev/davinci0"
    save(page_bundle, "inference", command=paths)
    assert "inference_cpu" in evidence.read_evidence(page_bundle).records


OURS = '"device": "cpu", "model": "webssl-mae300m-full2b-224", "weights": {"source": "random"}'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        (f"{{{OURS}}}", "('results' is missing)"),
        (f'{{{OURS}, "results": 5}}', "('int' object is not iterable)"),
    ],
)
def test_a_malformed_result_is_named(page_bundle, make_pages, text, why):
    write(page_bundle, "performance_eval_cpu", text)
    done = make_pages()
    assert done.code == 2 and "results/performance_eval_cpu.json" in done.err and done.err.count("\n") == 1
    assert why in done.err


# --- between the markers ---


def test_a_second_run_changes_nothing_and_the_check_agrees(page_bundle, make_pages):
    save_all(page_bundle)
    assert make_pages().code == 0
    before = content(page_bundle)
    assert make_pages().out == ["Nothing has changed"]
    assert content(page_bundle) == before
    assert make_pages("--check").code == 0
    assert "Text.\n" in (page_bundle / "README.md").read_text()


def test_the_check_finds_drift_of_every_kind_and_writes_nothing(page_bundle, make_pages):
    save_all(page_bundle)
    make_pages()
    for name in ("README.md", "README.zh.md", "results/README.md"):
        text = (page_bundle / name).read_text(encoding="utf-8")
        (page_bundle / name).write_text(text.replace("941.18", "141.18"), encoding="utf-8")
        before = content(page_bundle)
        found = make_pages("--check")
        assert found.code == 1 and found.out == [f"{name}: not what the files give; run: python eval/evidence.py"]
        assert content(page_bundle) == before
        (page_bundle / name).write_text(text, encoding="utf-8")
    save(page_bundle, "performance_eval", num_runs=4)
    assert [line.split(":")[0] for line in make_pages("--check").out] == ["assets/performance_eval_result.png"]
    (page_bundle / "assets" / "env_check.png").unlink()
    assert any(line.startswith("assets/env_check.png: missing") for line in make_pages("--check").out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("<!-- evidence:audit -->\n<!-- /evidence:audit -->\n", ""), "<!-- evidence:audit --> must stand there once"),
        (("<!-- /evidence:log -->", ""), "and once <!-- /evidence:log --> after it"),
        (("evidence:log", "evidence:lgo"), "evidence:lgo is not known"),
        (("# A model", "<!-- evidence:log -->\n<!-- /evidence:log -->"), "<!-- evidence:log --> must stand there once"),
        (("<!-- evidence:log -->", "<!-- /evidence:log --><!-- evidence:log -->"), "once <!-- /evidence:log --> after it"),
    ],
)
def test_a_marker_out_of_place_is_named_before_anything_is_written(page_bundle, make_pages, change, words):
    text = (page_bundle / "README.zh.md").read_text()
    (page_bundle / "README.zh.md").write_text(text.replace(*change))
    before = content(page_bundle)
    done = make_pages()
    assert done.code == 2 and done.err.startswith("error: README.zh.md") and words in done.err
    assert content(page_bundle) == before


def test_colours_without_their_photos_are_named(page_bundle, make_pages):
    path = save(page_bundle, "pca", image_path=None)
    done = make_pages()
    assert done.code == 2 and f"results/{path.name}: not as its script writes it" in done.err and done.err.count("\n") == 1


def test_an_unforeseen_error_is_one_line_and_its_traceback_is_in_the_log(page_bundle, make_pages, monkeypatch):
    monkeypatch.setattr(evidence, "details_page", lambda _evidence: 1 / 0)
    done = make_pages()
    assert done.code == 70 and done.err.count("\n") == 1
    assert "Traceback" in (page_bundle / "logs" / "trial" / "evidence.log").read_text()
