"""A real HTTP server on a free port that answers with prepared bytes, and the same steps for both clients."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from editserver_client import AsyncClient, Client


@dataclass
class Reply:
    """What to answer: JSON, raw bytes, or chunks sent apart; `hang_up` closes the connection after what was sent."""

    status: int = 200
    json: Any = None
    raw: bytes | None = None
    chunks: list[bytes] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    hang_up: bool = False
    delay: float = 0.0


def sse(*events: Any, status: int = 200, done: bool = True, hang_up: bool = False) -> Reply:
    """A stream with one server-sent event per chunk."""
    chunks = [f"data: {json.dumps(event)}\n\n".encode() for event in events]
    if done:
        chunks.append(b"data: [DONE]\n\n")
    headers = {"content-type": "text/event-stream; charset=utf-8"}
    return Reply(status=status, chunks=chunks, headers=headers, hang_up=hang_up)


@dataclass
class Seen:
    """A request as it arrived; `path` is the raw target."""

    method: str
    path: str
    headers: dict[str, str]
    json: Any
    at: float


class ContractServer:
    """Answers each (method, target) with the replies queued for it, in order."""

    def __init__(self, port: int = 0) -> None:
        self.seen: list[Seen] = []
        self.client_left = threading.Event()
        self._replies: dict[tuple[str, str], deque[Reply]] = defaultdict(deque)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None: ...

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                decoded = json.loads(body) if body else None
                outer.seen.append(Seen(self.command, self.path, headers, decoded, time.monotonic()))
                queue = outer._replies[self.command, self.path]
                missing = {"error": {"message": f"nothing at {self.path}", "code": "unknown_route", "param": None}}
                try:
                    outer._write(self, queue.popleft() if queue else Reply(404, json=missing))
                except ConnectionError:
                    self.close_connection = True
                    outer.client_left.set()

            do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815  (the names of http.server)

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def on(self, method: str, path: str, *replies: Reply) -> None:
        self._replies[method, path].extend(replies)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @staticmethod
    def _write(handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        time.sleep(reply.delay)
        handler.close_connection = reply.hang_up
        if reply.hang_up and reply.chunks is None:
            return
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        if reply.chunks is None:
            body = reply.raw if reply.raw is not None else json.dumps(reply.json).encode()
            handler.send_header("content-length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)
            return
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        for chunk in reply.chunks:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            handler.wfile.flush()
            time.sleep(0.001)  # so that chunks arrive apart
        if not reply.hang_up:
            handler.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def server() -> Iterator[ContractServer]:
    running = ContractServer()
    yield running
    running.close()


@dataclass
class Streamed:
    """What a stream gave: its events, the stream itself, the error that ended it, the whole answer."""

    events: list[Any]
    stream: Any
    error: Exception | None = None
    final: Any = None


class SyncDriver:
    name = "sync"

    def call(self, url: str, action: Callable[[Any], Any], **settings: Any) -> Any:
        with Client(url, **settings) as client:
            return action(client)

    def stream(self, url: str, action: Callable[[Any], Any], **settings: Any) -> Streamed:
        with Client(url, **settings) as client:
            result = Streamed([], action(client))
            try:
                with result.stream as stream:
                    for event in stream:
                        result.events.append(event)
                    result.final = stream.final()
            except Exception as error:
                result.error = error
            return result


class AsyncDriver:
    name = "async"

    def call(self, url: str, action: Callable[[Any], Any], **settings: Any) -> Any:
        async def steps() -> Any:
            async with AsyncClient(url, **settings) as client:
                return await action(client)

        return asyncio.run(steps())

    def stream(self, url: str, action: Callable[[Any], Any], **settings: Any) -> Streamed:
        async def steps() -> Streamed:
            async with AsyncClient(url, **settings) as client:
                result = Streamed([], action(client))
                try:
                    async with result.stream as stream:
                        async for event in stream:
                            result.events.append(event)
                        result.final = await stream.final()
                except Exception as error:
                    result.error = error
                return result

        return asyncio.run(steps())


@pytest.fixture(params=[SyncDriver(), AsyncDriver()], ids=lambda driver: driver.name)
def driver(request: pytest.FixtureRequest) -> Any:
    """Every promise about I/O holds for both clients."""
    return request.param


@pytest.fixture
def reply() -> type[Reply]:
    return Reply


@pytest.fixture
def sse_reply() -> Callable[..., Reply]:
    return sse


@pytest.fixture
def start_server() -> Callable[[int], ContractServer]:
    return ContractServer
