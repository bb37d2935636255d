"""An S3 server on the loopback address (moto's, a process of its own), and a proxy before it that disturbs as it is told."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SECRET = "TopSecretOfTheTests0123456789abcdefghijk"
PAGE = 20  # names in an answer of the server; Amazon's has a thousand
KEY = "AKIATESTSTESTSTESTST"
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "te", "upgrade"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@contextmanager
def s3_server(log: Path, port: int = 0) -> Iterator[str]:
    """The address of a server that lives for the block."""
    port = port or free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as file:
        names = os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)}
        server = subprocess.Popen(command, stdout=file, stderr=file, env=names)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(address), 60, log)
        yield address
    finally:
        server.kill()
        server.wait()


def answers(address: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{address}/moto-api/", timeout=5):
        return True
    return False


def wait_for(is_so: Callable[[], Any], seconds: float, log: Path | None = None) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := is_so()):
        assert time.monotonic() < deadline, f"it took more than {seconds} s" + (f": {log.read_text()[-2000:]}" if log else "")
        time.sleep(0.05)
    return found


def environment(address: str, secret: str = SECRET, key: str = KEY) -> dict[str, str]:
    """What leads boto to a server, and to nothing else."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "3",
        "no_proxy": "127.0.0.1",
    }


def use(monkeypatch: Any, address: str, **who: str) -> None:
    """Lead this process to a server, with clients of its own: s3fs keeps those that it has made."""
    from s3fs import S3FileSystem

    for name, value in environment(address, **who).items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()


def client(address: str, service: str = "s3", secret: str = SECRET, key: str = KEY) -> Any:
    """boto3, as another program would use it."""
    import boto3

    names = {"aws_access_key_id": key, "aws_secret_access_key": secret, "region_name": "us-east-1"}
    return boto3.client(service, endpoint_url=address, **names)


def upload(address: str, folder: Path, bucket: str, prefix: str = "") -> None:
    s3 = client(address)
    s3.create_bucket(Bucket=bucket)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            s3.upload_file(str(path), bucket, f"{prefix}{path.relative_to(folder)}")


def download(address: str, bucket: str, prefix: str, folder: Path) -> Path:
    s3 = client(address)
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for found in page.get("Contents", []):
            path = folder / found["Key"].removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(bucket, found["Key"], str(path))
    return folder


def require_credentials(address: str, is_required: bool) -> None:
    """Let the server look at who asks, and what they may do (moto's IAM), or not."""
    count, headers = b"0" if is_required else b"inf", {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset-auth", count, headers), timeout=10).close()


class Request(dict):
    """What came through the proxy: method, path, number (from 1, of those with this method and path)."""

    __getattr__ = dict.__getitem__


class Proxy:
    """Passes on what comes, but for what `fault(request)` says: None (pass it on), a status to answer, "cut" (give half of
    the body, then hang up), or seconds to wait first.
    """

    def __init__(self, address: str) -> None:
        self.fault: Callable[[Request], Any] = lambda _request: None
        self.seen: list[Request] = []
        self._target = address.removeprefix("http://")
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                proxy.answer(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # who asked has been killed
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            number = 1 + sum((old.method, old.path) == (handler.command, handler.path) for old in self.seen)
            request = Request(method=handler.command, path=handler.path, number=number, headers=dict(handler.headers))
            self.seen.append(request)
        fault = self.fault(request)
        if isinstance(fault, float):
            time.sleep(fault)
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        if isinstance(fault, int):
            self._refuse(handler, fault)
            return
        upstream = http.client.HTTPConnection(self._target, timeout=60)
        upstream.request(handler.command, handler.path, body, dict(handler.headers))
        reply = upstream.getresponse()
        data = reply.read()
        handler.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in HOP_BY_HOP | {"content-length"}:
                handler.send_header(name, value)
        length = reply.getheader("Content-Length") if handler.command == "HEAD" else len(data)
        handler.send_header("Content-Length", str(length or 0))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        if fault == "cut":
            handler.close_connection = True
            with suppress(OSError):
                handler.connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _refuse(handler: BaseHTTPRequestHandler, status: int) -> None:
        code = {403: "AccessDenied", 503: "ServiceUnavailable"}.get(status, "InternalError")
        told = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>made by the tests</Message></Error>".encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(told)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(told)
