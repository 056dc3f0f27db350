"""A real S3 server on loopback, and a relay in front of it that delays, refuses and watches."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from engine_builds import ROOT
from processes import wait_for

BUCKET = "test-bucket"
USER = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "2",
    "PYTHONPATH": str(ROOT),
}


class S3Server:
    """`moto_server` in a process of its own.

    Args:
        log: Where its output goes.
        checked: Refuse keys that nobody was given; otherwise any key will do.
    """

    def __init__(self, log: Path, *, checked: bool = False) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        program = str(Path(sys.executable).parent / "moto_server")
        extra = {"INITIAL_NO_AUTH_ACTION_COUNT": "0"} if checked else {}
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [program, "-H", "127.0.0.1", "-p", str(self.port)],
                stdout=output, stderr=output, env=os.environ | extra,
            )  # fmt: skip
        assert wait_for(self._answers, 60), log.read_text()

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def client(self) -> Any:
        """A client of another make, so that what is checked does not rest on what is tested."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=USER["AWS_REGION"],
            aws_access_key_id=USER["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=USER["AWS_SECRET_ACCESS_KEY"],
        )

    def objects(self, prefix: str) -> dict[str, str]:
        """sha256 of every object below a prefix, by the rest of its key.

        Without the empty objects that Arrow makes for a folder out of which it deletes something.
        """
        s3 = self.client()
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        return {
            key.removeprefix(f"{prefix}/"): hashlib.sha256(
                s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            ).hexdigest()
            for page in pages
            for key in [o["Key"] for o in page.get("Contents", [])]
            if not key.endswith("/")
        }

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


#: Told method and path of each request before it is passed on; a number refuses it with that status
#: of HTTP.
Watcher = Callable[[str, str], int | None]


class Relay:
    """A proxy in front of an `S3Server`; use it as a context manager."""

    def __init__(self, server: S3Server, watcher: Watcher) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or every answer waits 40 ms for an acknowledgement

            def _pass_on(self) -> None:
                body = self._body()
                refusal = watcher(self.command, self.path)
                if refusal is not None:
                    self._answer(refusal, {}, b"")
                    return
                dropped = ("expect", "transfer-encoding", "content-length")
                headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
                upstream = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                upstream.request(self.command, self.path, body, headers)
                reply = upstream.getresponse()
                self._answer(reply.status, dict(reply.getheaders()), reply.read())
                upstream.close()

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                length = headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Clients are killed in the middle of requests here; that is no news."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
