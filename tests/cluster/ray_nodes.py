"""A Ray cluster of two nodes on this machine, each with an NPU that is none, in a network namespace where one can be made."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from object_store import free_port, wait_for

from conftest import ROOT, script_environment

HEAD, OTHER = "127.0.0.1", "127.0.0.2"
MARK = "NODE_OF_THE_TESTS"
# Behind the NPU stands the CPU; each image takes as many seconds more as the file `pause` says, while it is there.
SEAM = """

_open_device, _decode = open_device, decode


def open_device(name, *rest):
    return _open_device("cpu", *rest)


def decode(*rest):
    import time

    begun = time.monotonic()
    with suppress(OSError, ValueError):
        while time.monotonic() - begun < float((ROOT / "pause").read_text()):
            time.sleep(0.05)
    return _decode(*rest)
"""


def copy_of_bundle(folder: Path) -> Path:
    """The scripts with the seam, and with less patience."""
    folder.mkdir()
    for name in ("inference.py", "embed.py", "embed_cluster.py", "locked_models.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "bulk", folder / "bulk", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "inference.py").open("a") as file:
        file.write(SEAM)
    script = folder / "embed_cluster.py"
    text = script.read_text()
    assert "SLOW_S = 60" in text
    script.write_text(text.replace("SLOW_S = 60", "SLOW_S = 3"))
    return folder


class Processes:
    """What /proc knows of those whose environment has a mark, and of what they have begun."""

    def __init__(self, mark: str) -> None:
        self.parents: dict[int, int] = {}
        self.names: dict[int, str] = {}
        marked = set()
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                pid = int(path.name)
                self.parents[pid] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                self.names[pid] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                    marked.add(pid)
        self.all = set(marked)
        while more := {pid for pid, parent in self.parents.items() if parent in self.all} - self.all:
            self.all |= more

    def called(self, name: str) -> list[int]:
        """Those begun by a raylet, not what they have forked themselves."""
        found = [pid for pid in self.all if self.names[pid].startswith(name)]
        return [pid for pid in found if "raylet" in self.names.get(self.parents[pid], "")]


def kill(pids: set[int] | list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Cluster:
    def __init__(self, folder: Path, stand_ins: dict[Path, Path]) -> None:
        """stand_ins: files for which the second node has others, where it can have a view of files of its own."""
        self.run, self.folder, self.port = secrets.token_hex(4), folder, free_port()
        self.temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: it is part of sockets' names
        self.holder, self.prefix = self._network()
        self.stand_ins = stand_ins if self._may("unshare", "-m", "true") else {}
        self.environment = script_environment(
            **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"},
            **{
                "RAY_memory_monitor_refresh_ms": "0",
                "RAY_worker_register_timeout_seconds": "600",
                "RAY_ADDRESS": f"{HEAD}:{self.port}",
            },
        )
        self.nodes: dict[str, subprocess.Popen] = {}

    @staticmethod
    def _may(*command: str) -> bool:
        with suppress(OSError):
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        return False

    def _network(self) -> tuple[subprocess.Popen | None, list[str]]:
        """A process that keeps a network namespace with nothing but a loopback device, and what enters it."""
        if not self._may("unshare", "-n", "ip", "link", "set", "lo", "up"):
            return None, []
        ready = self.folder / "network"
        held = ["unshare", "-n", "sh", "-c", f"ip link set lo up && touch '{ready}' && exec sleep 3600"]
        holder = subprocess.Popen(held)
        wait_for(ready.exists, 30)
        return holder, ["nsenter", "-t", str(holder.pid), "-n"]

    def _mark(self, node: str) -> str:
        return f"{MARK}={self.run}-{node}"

    def start(self, node: str) -> None:
        """Begin a node unless it is there; returns when the head knows it."""
        if node in self.nodes:
            return
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--node-ip-address", node, "--num-cpus", "2"]
        ray += ["--resources", '{"NPU": 1}', "--object-store-memory", "80000000", "--disable-usage-stats"]
        if node == HEAD:
            ray += ["--head", "--port", str(self.port), "--include-dashboard=false", "--temp-dir", self.temporary]
        else:
            ray += ["--address", f"{HEAD}:{self.port}"]
        command = self.prefix + ray
        if node == OTHER and self.stand_ins:
            mounts = " && ".join(f"mount --bind '{other}' '{file}'" for file, other in self.stand_ins.items())
            command = [*self.prefix, "unshare", "-m", "sh", "-c", f'{mounts} && exec "$@"', "sh", *ray]
        name, _, value = self._mark(node).partition("=")
        log = self.folder / f"{node}.log"
        for _ in range(4):  # Ray gives a node 30 s, and a machine may be busy
            with log.open("wb") as file:
                begun = subprocess.Popen(
                    command, env=self.environment | {name: value}, stdout=file, stderr=file, stdin=subprocess.DEVNULL
                )
            self.nodes[node] = begun
            while begun.poll() is None:
                if b"Ray runtime started" in log.read_bytes():
                    return
                time.sleep(0.1)
            self.kill(node)
        raise AssertionError(f"Ray does not start: {log.read_text()[-2000:]}")

    def processes(self, node: str) -> Processes:
        return Processes(self._mark(node))

    def workers(self, node: str) -> list[int]:
        return self.processes(node).called("ray::Maker")

    def kill(self, node: str) -> None:
        """As if its power failed: all its processes at once."""
        kill(self.processes(node).all)
        self.nodes.pop(node).wait()

    def drive(self, bundle: Path, *arguments: object, **variables: str) -> Run:
        command = [*self.prefix, sys.executable, str(bundle / "embed_cluster.py"), *map(str, arguments)]
        return Run(command, self.environment | variables, Path(tempfile.mkdtemp(dir=self.folder)) / "terminal")

    def close(self) -> None:
        for node in (OTHER, HEAD):
            if node in self.nodes:
                self.kill(node)
        if self.holder:
            self.holder.kill()
            self.holder.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)


class Run:
    """embed_cluster.py as a process of its own."""

    def __init__(self, command: list[str], environment: dict[str, str], terminal: Path) -> None:
        self._terminal = terminal
        with terminal.open("wb") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=terminal.parent)

    @property
    def terminal(self) -> str:
        return self._terminal.read_text(errors="replace")

    @property
    def last(self) -> str:
        return self.terminal.strip().splitlines()[-1]

    def end(self, seconds: float = 400) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill([self.process.pid])
            raise AssertionError(f"it did not end within {seconds} s: {self.terminal[-3000:]}") from None
