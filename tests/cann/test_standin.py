"""The stand-in for CANN itself: what its variables do, and that its mistakes are told in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cann import build, harness, stacks

STACK = next((name for name in stacks.STACKS if stacks.is_made(name)), "2.13.0")


def bare(body: str, **variables: str) -> harness.Outcome:
    return harness.run(STACK, body, fresh=True, prelude=harness.BARE, **variables)


# --- through ctypes ---


def test_it_can_be_told_from_cann():
    assert bare("say(standin=cann.standin_for_cann())").found == {"standin": 1}


def test_memory_is_bounded_on_each_device_and_on_the_host():
    result = bare(
        """
        size = ctypes.c_size_t
        free, total = size(), size()
        say(host=[type(made(cann.aclrtMallocHost, size(600))) is int for _ in range(2)])
        cann.aclrtSetDevice(1)
        block = made(cann.aclrtMalloc, size(600), 0)
        cann.aclrtGetMemInfo(1, ctypes.byref(free), ctypes.byref(total))
        say(free=free.value, total=total.value, full=made(cann.aclrtMalloc, size(1500), 0))
        say(text=cann.aclGetRecentErrMsg().decode(), again=cann.aclGetRecentErrMsg().decode())
        cann.aclrtFree(block)
        say(room_again=type(made(cann.aclrtMalloc, size(2048), 0)) is not int, twice=cann.aclrtFree(block))
        """,
        STANDIN_DEVICE_BYTES="2048",
        STANDIN_HOST_BYTES="1024",
    )
    found = result.found
    text = found.pop("text")
    assert "EE9999: Inner Error!" in text and "aclrtMalloc: failed to allocate 1500 bytes, error code is 207001" in text
    assert found.pop("again") == ""  # an error is told once
    assert found == {"host": [False, True], "free": 1024, "total": 2048, "full": 207001, "room_again": True, "twice": 107000}


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 3), ("0,2", 2), ("1", 1), ("2,0", 0), ("0,0", 0), ("0,7", 1), ("", 0), ("all", 0)]
)
def test_visible_devices_are_an_ascending_list(visible, count):
    variables = {} if visible is None else {"ASCEND_RT_VISIBLE_DEVICES": visible}
    body = "n = ctypes.c_uint32(); cann.aclrtGetDeviceCount(ctypes.byref(n)); say(count=n.value)"
    assert bare(body, STANDIN_DEVICES="3", **variables).found == {"count": count}


@pytest.mark.parametrize("rule", ["aclrtMalloc", "aclrtMalloc=", "aclrtMalloc=1x", "aclrtMalloc:x=1", "aclrtMalloc@5=1", "=1"])
def test_a_rule_that_is_none_is_refused(rule):
    result = bare("made(cann.aclrtMalloc, ctypes.c_size_t(1), 0)", STANDIN_FAIL=rule)
    assert result.code == 2
    assert result.err == f"stand-in for CANN: STANDIN_FAIL: {rule} is not NAME[:CALLS][@A-B]=VALUE\n"


@pytest.mark.parametrize(
    ("calls", "failed"),
    [("", "111111"), (":2", "010000"), (":2-4", "011100"), (":5-", "000011"), (":2%3", "010010"), (":0%3", "001001")],
)
def test_an_error_for_chosen_calls(calls, failed):
    body = """
    say(codes=[cann.aclrtResetDevice(0) for _ in range(6)], text=cann.aclGetRecentErrMsg().decode())
    """
    result = bare(body, STANDIN_FAIL=f"aclrtResetDevice{calls}=507899,other=1")
    assert result.found["codes"] == [507899 * int(digit) for digit in failed]
    assert "aclrtResetDevice failed as STANDIN_FAIL asks, error code is 507899" in result.found["text"]
    assert [line.endswith("error=507899") for line in result.calls("aclrtResetDevice")] == [digit == "1" for digit in failed]


CAPTURE = """
origin, other = made(cann.aclrtCreateStream), made(cann.aclrtCreateStream)
fork, join = (made(cann.aclrtCreateEventExWithFlag, 0) for _ in range(2))
numbers = (ctypes.c_char * 3)(b"a", b"b", b"c")
at = ctypes.addressof(numbers)
def copy(to, source, stream):
    one, to, source = ctypes.c_size_t(1), ctypes.c_void_p(at + to), ctypes.c_void_p(at + source)
    return cann.aclrtMemcpyAsync(to, one, source, one, 3, stream)
cann.aclmdlRICaptureBegin(origin, 1)
cann.aclrtRecordEvent(fork, origin)
cann.aclrtStreamWaitEvent(other, fork)
copy(1, 0, other)
"""


def test_a_fork_that_joins_is_captured_and_replayed():
    result = bare(
        CAPTURE
        + """
cann.aclrtRecordEvent(join, other)
cann.aclrtStreamWaitEvent(origin, join)
copy(2, 1, origin)
model = made(lambda out: cann.aclmdlRICaptureEnd(origin, out))
say(before=numbers.raw.decode())
cann.aclmdlRIExecuteAsync(model, other)
cann.aclrtSynchronizeStream(other)
say(after=numbers.raw.decode())
"""
    )
    assert result.found == {"before": "abc", "after": "aaa"}
    assert [line.split()[2] for line in result.calls("aclrtMemcpyAsync")] == ["captured"] * 2 + ["replayed"] * 2


def test_a_fork_that_does_not_join_answers_107025_and_lets_the_streams_go():
    result = bare(
        CAPTURE
        + """
say(end=made(lambda out: cann.aclmdlRICaptureEnd(origin, out)), text=cann.aclGetRecentErrMsg().decode())
say(later=[copy(2, 0, other), cann.aclrtSynchronizeStream(other)], numbers=numbers.raw.decode())
"""
    )
    assert (result.found["end"], result.found["later"], result.found["numbers"]) == (107025, [0, 0], "aba")
    assert "a stream that was not joined to the original stream" in result.found["text"]


def test_to_wait_for_a_stream_that_is_captured_spoils_the_capture():
    ending = """
say(wait=cann.aclrtSynchronizeStream(other), end=made(lambda out: cann.aclmdlRICaptureEnd(origin, out)))
"""
    assert bare(CAPTURE + ending).found == {"wait": 107027, "end": 507903}


# --- through torch_npu ---


def test_what_was_not_waited_for_is_stale():
    """Streams are threads: with a delay, each missing synchronisation shows."""
    result = harness.run(
        STACK,
        """
        x = torch.ones(4, device="npu")
        host = torch.zeros(4).pin_memory()
        start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
        side = torch.npu.Stream()
        torch.npu.synchronize()

        start.record()
        y = x + 1  # takes 0.3 s
        end.record()
        host.copy_(y, non_blocking=True)
        say(at_once=host[0].item(), done=end.query())
        torch.npu.synchronize()
        say(waited_for=host[0].item(), done_then=end.query(), milliseconds=start.elapsed_time(end))

        y = torch.zeros(4, device="npu")
        torch.npu.synchronize()
        y += x
        with torch.npu.stream(side):
            early = y * 1
            side.synchronize()
            say(without_a_wait=early.cpu()[0].item())
        torch.npu.synchronize()
        y += x
        with torch.npu.stream(side):
            side.wait_stream(torch.npu.default_stream())
            late = y * 1
            side.synchronize()
            say(with_a_wait=late.cpu()[0].item())
        """,
        STANDIN_DELAY="aclnnAdds=300000,aclnnInplaceAdd=300000",
    )
    milliseconds = result.found.pop("milliseconds")
    assert result.found == {
        "at_once": 0,
        "done": False,
        "waited_for": 2,
        "done_then": True,
        "without_a_wait": 0,
        "with_a_wait": 2,
    }, result.err
    assert 300 <= milliseconds < 3000


def test_an_operator_made_wrong_and_one_that_nobody_wrote():
    result = harness.run(
        STACK,
        """
        x = torch.ones(4, 2, device="npu")
        say(products=[(x * 3)[:, 0].tolist() for _ in range(4)], rows=(x + 1)[:, 1].tolist())
        say(unknown=error_of(lambda: (torch.bincount(torch.arange(3, device="npu")), torch.npu.synchronize())))
        say(name=torch.npu.get_device_name(0), count=torch.npu.device_count())
        """,
        fresh=True,
        STANDIN_WRONG="aclnnMuls:2%3=0.5,aclnnAdds@1-3=1",
        STANDIN_SOC="Ascend910B2",
        STANDIN_DEVICES="4",
    )
    assert result.found["products"] == [[3.0] * 4, [4.5] * 4, [3.0] * 4, [3.0] * 4]
    assert result.found["rows"] == [2, 4, 4, 2]
    assert (result.found["name"], result.found["count"]) == ("Ascend910B2", 4)
    assert result.found["unknown"]
    assert "stand-in for CANN: operator aclnnBincount is not there" in result.err
    assert result.calls("aclnnMuls")[0].split(maxsplit=2)[2] == "eager float32[4,2] -> float32[4,2]"


def test_products_are_accurate_in_every_layout_and_type():
    result = harness.run(
        STACK,
        """
        def apart(ours, exact):
            return ((ours.cpu().double() - exact).norm() / exact.norm()).item()
        a, b, bias = torch.randn(197, 1024), torch.randn(1024, 300), torch.randn(300)
        def product(a, b):
            return torch.addmm(bias.to(a), a, b)
        exact = product(a.double(), b.double())
        say(plain=apart(product(a.npu(), b.npu()), exact))
        say(turned=apart(product(a.npu(), b.t().contiguous().npu().t()), exact))
        say(strided=apart(product(a.npu()[:, ::2], b.npu()[::2]), product(a.double()[:, ::2], b.double()[::2])))
        say(one_row=apart(a[:1].npu() @ b.npu(), a[:1].double() @ b.double()))
        say(half=apart(a.half().npu() @ b.half().npu(), a.half().double() @ b.half().double()))
        torch.npu.matmul.allow_hf32 = True
        say(hf32=apart(a.npu() @ b.npu(), a.double() @ b.double()))
        q, k, v = torch.randn(3, 2, 4, 19, 32)
        for layout, turn in (("BNSD", lambda t: t), ("BSND", lambda t: t.transpose(1, 2).contiguous())):
            ours = torch_npu.npu_fusion_attention(turn(q).npu(), turn(k).npu(), turn(v).npu(), 4, layout, scale=0.2)[0]
            exact = torch.softmax(q.double() @ k.double().transpose(2, 3) * 0.2, -1) @ v.double()
            say(**{layout: apart(ours, turn(exact))})
        """,
    )
    bars = {"half": 5e-4, "hf32": 5e-4}
    for name, error in result.found.items():
        assert error < bars.get(name, 5e-7), name
    assert result.found["hf32"] > 1e-5
    assert len(result.found) == 8, result.err


EXPRESSIONS = """
x.permute(2, 0, 1).contiguous()
torch.cat(x.chunk(3, 2)[::-1], 2) + x[:1, :, :1]
torch.stack([x[0], x[1]], 1)
torch.stack([x, y], -1)
x.to(torch.float16) * 3
x.bfloat16() / y.bfloat16()
(x * 100).int() // 7
2 ** x
x.clamp(-0.5, 0.5) - y * 2
torch.where(x > 0, x, y).masked_fill(y < 0, 7)
torch.maximum(x, y).sqrt().isfinite()
(x >= y) & (x != 0)
x.sum(1) - x.mean((1, 2), keepdim=True)[:, 0]
x.amax(-1) + x.min()
x.std(0) + x.var(2, keepdim=True).sum(0)
torch.linalg.vector_norm(x, dim=-1) + x.norm()
x.argmax(1).float() + x.softmax(-1).sum(1)
(x > 5).any() | (x < 5).all()
x.index_select(1, torch.tensor([2, 0], device=x.device))
x[torch.tensor([1, 1], device=x.device), torch.tensor([0, 2], device=x.device)]
x.exp().log().tanh().sigmoid().neg().abs().rsqrt().cos() + x.erf()
torch.nn.functional.layer_norm(x, (6,), y[0, 0], None, 1e-6)
x.bool().logical_not() == y.bool()
torch.arange(3, 30, 3, device=x.device) * 2.5
torch.zeros_like(x).fill_(3).add_(y, alpha=2).mul_(x).div_(2).sub_(1)
x.expand(4, 2, 3, 6)[1].reshape(-1)[::5].clone()
x @ y.transpose(1, 2)
torch.full((3,), 2**60 + 1, device=x.device).clone()
x.double().half().float().double()
"""


def test_operators_agree_with_the_cpu():
    result = harness.run(
        STACK,
        f"""
        x, y = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
        lines = {EXPRESSIONS.split(chr(10))!r}
        for line in filter(None, lines):
            def compare():
                exact = eval(line, dict(torch=torch, x=x, y=y))
                seen = eval(line, dict(torch=torch, x=x.npu(), y=y.npu())).cpu()
                assert seen.dtype == exact.dtype or seen.dtype == torch.float32, seen.dtype
                torch.testing.assert_close(seen.double(), exact.double(), rtol=1e-6, atol=1e-6, equal_nan=True)
            say(**{{line: error_of(compare)}})
        with torch.autocast("npu", dtype=torch.float16):
            product = x.npu() @ torch.ones(6, 2, device="npu")
        say(autocast=str(product.dtype), close=torch.allclose(product.cpu().float(), x @ torch.ones(6, 2), 1e-2, 1e-2))
        """,
    )
    assert result.code == 0, result.err
    assert (result.found.pop("autocast"), result.found.pop("close")) == ("torch.float16", True)
    assert {line: error for line, error in result.found.items() if error} == {}
    assert "is not there" not in result.err


# --- the build ---


def test_a_damaged_cache_is_built_again_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "CACHE", tmp_path)
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "library.so").write_bytes(b"whole")
        (folder / "link.so").symlink_to("library.so")

    folder = build._cached("2.13.0-key", make)
    assert build._cached("2.13.0-key", make) == folder and len(made) == 1 and capsys.readouterr().err == ""
    for damage in (
        lambda: (folder / "library.so").write_bytes(b"hal"),
        lambda: (folder / "link.so").unlink(),
        lambda: (folder / "manifest.json").unlink(),
        lambda: (folder / "manifest.json").write_text("{"),
    ):
        damage()
        assert (build._cached("2.13.0-key", make) / "library.so").read_bytes() == b"whole"
        assert capsys.readouterr().err == f"stand-in for CANN: {folder} is damaged and is built again\n"
    assert len(made) == 5
    os.utime(folder, (0, 0))
    build._cached("2.13.0-other", make)
    assert [path.name for path in tmp_path.iterdir()] == ["2.13.0-other"]  # an old one is of no use any more


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CACHE", tmp_path)

    def make(folder: Path) -> None:
        (folder / "half").touch()
        raise build.StandinError("no room")

    with pytest.raises(build.StandinError):
        build._cached("2.13.0-key", make)
    assert list(tmp_path.iterdir()) == []


def command_line(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    python, _ = harness.libraries(STACK)
    command = [sys.executable, str(build.HERE / "build.py"), *(str(python if part is STACK else part) for part in arguments)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_what_is_missing_is_told_in_one_line(tmp_path):
    cases = (
        (command_line(STACK, CXX="/no/g++"), "error: /no/g++ is not installed: a C++ compiler with binutils is needed"),
        (command_line(tmp_path / "python"), f"error: {tmp_path}/python: this interpreter does not answer"),
        (command_line(sys.executable), f"error: {sys.executable}: torch_npu is not installed for it"),
    )
    for done, message in cases:
        assert done.returncode == 2
        assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1


def test_a_version_that_nobody_tried_is_refused(monkeypatch):
    monkeypatch.setattr(build, "_probe", lambda python: ["torch", "torch_npu", "2.99.0", "record"])
    with pytest.raises(build.StandinError, match=r"torch_npu 2\.99\.0 is not known to the stand-in"):
        build.build("python")


# --- the stacks ---


def test_a_wheel_that_cannot_be_had_or_read_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WEBSSL_STACKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(stacks.StackError, match=r"^stack 2\.13\.0: \S+ -m pip download failed: ERROR: [^\n]*$"):
        stacks._wheel("2.13.0", "torch_npu", "2.13.0")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    damaged = tmp_path / "wheels" / f"torch_npu-2.13.0-{tag}-{tag}-linux_x86_64.whl"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(b"half of it")
    assert stacks._wheel("2.13.0", "torch_npu", "2.13.0") == damaged
    with pytest.raises(stacks.StackError, match=r"^stack 2\.13\.0: \S+ -m pip install failed: ERROR: [^\n]*$") as told:
        stacks._install("2.13.0", Path(sys.executable), "--target", tmp_path / "nowhere", "--no-deps", damaged)
    assert "torch" in str(told.value) and "invalid" in str(told.value)


def test_stacks_that_cannot_be_had_do_not_keep_the_others(monkeypatch, capsys):
    def interpreter(name: str) -> Path:
        if name == "2.9.0":
            raise stacks.StackError("stack 2.9.0: no room")
        return Path(f"/{name}/python")

    monkeypatch.setattr(stacks, "interpreter", interpreter)
    assert stacks.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["2.13.0: /2.13.0/python", "2.9.0.post2: /2.9.0.post2/python"]
    assert printed.err == "error: stack 2.9.0: no room\n"
    assert stacks.main(["2.8.0"]) == 2
    assert capsys.readouterr().err == "error: there is no stack 2.8.0; there are 2.13.0, 2.9.0, 2.9.0.post2\n"


def test_a_stack_that_was_not_finished_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("WEBSSL_STACKS", str(tmp_path))
    made = []
    monkeypatch.setattr(stacks, "_make", lambda name, stack, folder, base: made.append(name) or folder.mkdir(parents=True))
    half = stacks._folder("2.13.0")
    (half / "bin").mkdir(parents=True)
    assert not stacks.is_made("2.13.0")
    for _ in range(2):
        assert stacks.interpreter("2.13.0") == half / "bin" / "python"
    assert made == ["2.13.0"] and not (half / "bin").exists() and stacks.is_made("2.13.0")
