"""Compile the stand-in for CANN's libraries that lets an unmodified torch_npu run where there is no NPU.

    python tests/cann/build.py .venv/bin/python                            # build, print the folder
    python tests/cann/build.py .venv/bin/python inference.py --device npu  # run a script over it

From Python: environment(python) gives what a child process of that interpreter needs. README.md beside this file has the
variables that the stand-in listens to. What it takes is learnt from the wheel: the symbols that torch_npu's libraries leave
undefined are written by hand (*.cpp) or answered by generated stubs that return 0; an operator that nobody wrote says so.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("STANDIN_CACHE") or HERE / ".build")
SOURCES = {"runtime.cpp": "-O1", "operators.cpp": "-O2", "products.cpp": "-O3"}
FLAGS = ("-std=gnu++17", "-fPIC", "-march=native", "-Wall", "-Wextra", "-fvisibility=default")
KNOWN = ("2.9.0", "2.9.0.post2", "2.13.0")
# CANN's libraries by the names under which torch_npu links or opens them: one library answers to all.
NAMES = (
    *("libascendcl", "libhccl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel"),
    *("libopapi", "libnnopbase", "libruntime"),
)
# What torch_npu looks up by name and only has to find: the call is traced and returns 0.
LOOKED_UP = (
    *("aclrtSetDeviceSatMode", "aclrtSetSysParamOpt", "aclrtCtxSetSysParamOpt", "aclrtSetOpExecuteTimeOut", "aclSetCompileopt"),
    *("aclrtSetStreamAttribute", "aclrtSetStreamFailureMode", "aclrtSetStreamOverflowSwitch", "aclmdlRIDebugPrint"),
    "HcclSetConfig",
)
SYSTEM_VERSIONS = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP)_")  # of symbols that a CUDA library cannot bring
# What the interpreter in question has, without importing it.
PROBE = """
import importlib.metadata as m, importlib.util as u, json
def at(name):
    spec = u.find_spec(name)
    return spec and list(spec.submodule_search_locations)[0]
def record(name):
    return m.distribution(name).read_text("RECORD") or ""
print(json.dumps([at("torch"), at("torch_npu"), m.version("torch_npu") if at("torch_npu") else None,
                  record("torch_npu") + record("torch") if at("torch_npu") and at("torch") else None]))
"""


class StandinError(Exception):
    """The stand-in cannot be built here; the message is one line that says why."""


def environment(python: str | Path) -> dict[str, str]:
    """The variables that an interpreter's processes need to run over the stand-in, which is built where that is due."""
    folder = build(python)
    path = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": f"{folder}:{path}" if path else str(folder)}


def build(python: str | Path) -> Path:
    """The folder of libraries for the torch and torch_npu of an interpreter. Raises StandinError."""
    torch, torch_npu, version, record = _probe(str(python))
    if torch_npu is None or torch is None:
        raise StandinError(f"{python}: {'torch_npu' if torch else 'torch'} is not installed for it")
    if version not in KNOWN:
        raise StandinError(f"torch_npu {version} is not known to the stand-in, which was tried with {', '.join(KNOWN)}")
    own = _key(*[(HERE / name).read_bytes() for name in (*SOURCES, "standin.h")], repr((SOURCES, FLAGS)), _compiler())
    linked = _key(own, record, Path(__file__).read_bytes())
    with _locked():
        objects = _cached(f"objects-{own}", _compile)
        return _cached(f"{version}-{linked}", lambda folder: _link(folder, objects, Path(torch), Path(torch_npu)))


def _probe(python: str) -> list:
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=60, check=True)
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise StandinError(f"{python}: this interpreter does not answer ({said[-1]})") from None


def _compiler() -> str:
    """What the compiler is and which processor it compiles for: both decide what comes out."""
    return _run(_cxx(), "--version") + _run(_cxx(), "-march=native", "-Q", "--help=target")


def _cxx() -> str:
    return os.environ.get("CXX") or "g++"


def _run(*command: str | Path) -> str:
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, check=False)
    except FileNotFoundError:
        raise StandinError(f"{command[0]} is not installed: a C++ compiler with binutils is needed") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        raise StandinError(f"{Path(command[0]).name} failed: {said[0]}")
    return done.stdout


def _key(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


# --- the cache ---


@contextmanager
def _locked() -> Iterator[None]:
    """One build at a time, whoever else asks."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, made anew where it is missing or not what its manifest says."""
    target = CACHE / name
    if target.is_dir():
        if _intact(target):
            return target
        print(f"stand-in for CANN: {target} is damaged and is built again", file=sys.stderr)
        shutil.rmtree(target)
    for old in CACHE.glob(f"{name.rpartition('-')[0]}-*"):
        if old.stat().st_mtime < time.time() - 86400:  # a younger one may be in use
            shutil.rmtree(old)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made = Path(folder) / "made"
        made.mkdir()
        make(made)
        (made / "manifest.json").write_text(json.dumps(_contents(made)))
        made.rename(target)
    return target


def _contents(folder: Path) -> dict[str, str]:
    """The hash of each file, or where a link leads."""
    return {
        path.name: os.readlink(path) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json"
    }


def _intact(folder: Path) -> bool:
    try:
        return json.loads((folder / "manifest.json").read_text()) == _contents(folder)
    except (OSError, ValueError):
        return False


# --- compiling ---


def _compile(folder: Path) -> None:
    """The hand-written part, the same for every wheel."""

    def one(name: str) -> None:
        _run(_cxx(), *FLAGS, SOURCES[name], "-c", HERE / name, "-o", folder / f"{name}.o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, SOURCES))


def _link(folder: Path, objects: Path, torch: Path, torch_npu: Path) -> None:
    """libascendcl.so with stubs for what else this wheel wants, the names of CANN's other libraries, and CUDA's if need be."""
    parts = sorted(objects.glob("*.o"))
    written = _symbols(parts, "--defined-only")
    libraries = [*torch_npu.glob("*.so"), *torch_npu.glob("lib/*.so")]
    skipped = {"libop_plugin_atb.so"}  # wants libatb, which nobody here opens
    wanted = _undefined([path for path in libraries if path.name not in skipped], torch)
    operators = _operator_names(torch_npu / "lib" / "libtorch_npu.so")
    lines = ['extern "C" { int standin_called(const char*); int standin_missing(const char*);']
    lines += [f'int {name}() {{ return standin_called("{name}"); }}' for name in sorted(wanted.union(LOOKED_UP) - written)]
    for name in sorted(operators - written):
        lines.append(f'int {name}GetWorkspaceSize() {{ return standin_missing("{name}"); }} int {name}() {{ return 500002; }}')
    (folder / "stubs.cpp").write_text("\n".join([*lines, "}"]))
    library = folder / "libascendcl.so"
    _share(library, folder / "stubs.cpp", *parts, "-pthread")
    for name in NAMES[1:]:
        (folder / f"{name}.so").symlink_to(library.name)
    _stub_cuda(folder, torch)


def _share(library: Path, *what: str | Path) -> None:
    _run(_cxx(), "-shared", "-fPIC", "-O0", "-o", library, *what, f"-Wl,-soname,{library.name}")


def _symbols(paths: Iterable[Path], kind: str) -> set[str]:
    """Names in the symbol tables: with the version that they ask for, if any."""
    names = set()
    for path in paths:
        dynamic = [] if path.suffix == ".o" else ["-D"]
        for line in _run("nm", *dynamic, kind, path).splitlines():
            fields = line.split()
            if len(fields) >= 2 and fields[-2] not in "wv":  # weak ones may stay undefined
                names.add(fields[-1])
    return names


def _undefined(libraries: list[Path], torch: Path) -> set[str]:
    """What the libraries want less what they, torch, the C library and Python define. Plain C names only."""
    wanted = {name for name in _symbols(libraries, "--undefined-only") if "@" not in name and not name.startswith("_")}
    given = _symbols([*libraries, *torch.glob("lib/*.so")], "--defined-only")
    process = ctypes.CDLL(None)
    return {name for name in wanted - given if not hasattr(process, name)}


def _operator_names(library: Path) -> set[str]:
    """The operators that torch_npu looks up by name; later versions (V2 and so on) only where somebody wrote them.

    Their absence is how torch_npu finds out that a CANN is older.
    """
    found = set(re.findall(rb"\0(aclnn[A-Z][A-Za-z0-9]+)\0", library.read_bytes()))
    names = {name.decode() for name in found if not name.endswith(b"GetWorkspaceSize")}
    return {name for name in names if not re.search(r"V[0-9]$|^aclnn(NotFound|NpuFormat)", name)}


# --- a CUDA build of torch, which PyPI gives for x86_64 ---


def _stub_cuda(folder: Path, torch: Path) -> None:
    """One library for everything of CUDA that torch's libraries link to: it answers that there is no device."""
    inside = {path.name for path in torch.parent.glob("torch*/**/*.so*")}
    libraries = [path for path in torch.glob("lib/*.so") if path.name not in ("libtorch_cuda_linalg.so", "libcaffe2_nvrtc.so")]
    needed = {name for path in libraries for name in re.findall(r"NEEDED.*\[(.+)\]", _run("readelf", "-d", path))}
    system = {name: _open(name) for name in needed - inside}
    missing = sorted(name for name, library in system.items() if library is None)
    if not missing:
        return
    there = [ctypes.CDLL(None), *filter(None, system.values())]
    undefined, given = _symbols(libraries, "--undefined-only"), _symbols(libraries, "--defined-only")
    versions: dict[str, list[str]] = {}
    for entry in sorted(undefined):
        name, _, version = entry.partition("@")
        elsewhere = name.startswith("_Z") or name in given or any(hasattr(library, name) for library in there)
        if not (SYSTEM_VERSIONS.match(version) if version else elsewhere):
            versions.setdefault(version, []).append(name)
    source, script = folder / "cuda.cpp", folder / "cuda.map"
    source.write_text("".join(_cuda_stub(name) for names in versions.values() for name in names))
    script.write_text("".join(_version_node(version, names) for version, names in versions.items() if version))
    library = folder / "libstandin_cuda.so"
    _share(library, source, f"-Wl,--version-script={script}")
    for name in missing:
        (folder / name).symlink_to(library.name)


def _cuda_stub(name: str) -> str:
    if "String" in name or "Name" in name:
        return f'extern "C" const char* {name}() {{ return "no CUDA here"; }}\n'
    return f'extern "C" long {name}() {{ return 100; }}\n'  # cudaErrorNoDevice


def _version_node(version: str, names: list[str]) -> str:
    return f"{version} {{ {' '.join(f'{name};' for name in names)} }};\n"


def _open(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments else 2
    python, *script = arguments
    try:
        variables = environment(python)
    except StandinError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if script:
        os.execve(python, [python, *script], {**os.environ, **variables})
    print(variables["LD_LIBRARY_PATH"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
