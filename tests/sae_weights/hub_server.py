"""A small Hub: as much of its HTTP interface as the real client asks for, over repositories held in memory.

Large files (and files of tensors) are LFS files: a HEAD or GET of them is redirected to another host name, with the
sha256 in ``X-Linked-Etag``, as the Hub does; small ones are answered at once under git's sha1.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 3
"""Entries of a tree per page: the client has to follow the Link header."""


@dataclass
class Hub:
    """Repositories: repo → commit → path → bytes; refs: (repo, branch or tag) → commit."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[tuple[str, str], str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    spoilt: set[str] = field(default_factory=set)
    """Paths whose content the download host serves with one bit flipped."""
    log: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of every request."""
    port: int = 0

    def commit(self, repo: str, files: dict[str, bytes], *, ref: str = "main") -> str:
        """Put a commit on ``ref``."""
        content = b"".join(name.encode() + hashlib.sha256(data).digest() for name, data in sorted(files.items()))
        sha = hashlib.sha1(content).hexdigest()
        self.repos.setdefault(repo, {})[sha] = dict(files)
        self.refs[repo, ref] = sha
        return sha

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, sorted."""
        got = {
            path for method, path in self.log if method == "GET" and ("/resolve/" in path or path.startswith("cdn/"))
        }
        return sorted({path.rpartition("/")[2] for path in got})


def is_lfs(path: str, data: bytes) -> bool:
    return path.endswith((".safetensors", ".npz", ".pt", ".pth")) or len(data) > 100_000


def entry(path: str, data: bytes) -> dict:
    git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    stated = {"type": "file", "path": path, "size": len(data), "oid": git}
    if is_lfs(path, data):
        stated["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return stated


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client that goes away between two requests
            super().handle()

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def do_POST(self):
        self.answer(body=True)

    def reply(self, status, data=b"", headers=None, *, body=True):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def refuse(self, code, status=404):
        self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def json(self, value, headers=None):
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def answer(self, *, body):
        hub = self.hub
        url = urlsplit(self.path)
        path = unquote(url.path).strip("/")
        hub.log.append((self.command, path))
        parts = path.split("/")
        if parts[0] == "cdn":
            # Another host: the client must not send its token there.
            assert "authorization" not in {name.lower() for name in self.headers}
            repo, sha, name = "/".join(parts[1:3]), parts[3], "/".join(parts[4:])
            data = hub.repos[repo][sha][name]
            if name in hub.spoilt:
                data = data[:-1] + bytes([data[-1] ^ 1])
            return self.reply(200, data, body=body)
        repo = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
        if repo not in hub.repos:
            return self.refuse("RepoNotFound")
        kind, revision, rest = (parts[4], parts[5], parts[6:]) if parts[0] == "api" else (parts[2], parts[3], parts[4:])
        sha = hub.refs.get((repo, revision), revision)
        files = hub.repos[repo].get(sha)
        if files is None:
            return self.refuse("RevisionNotFound")
        name = "/".join(rest)
        if kind == "revision":
            return self.json({"id": repo, "modelId": repo, "sha": sha, "siblings": []})
        if kind == "paths-info":
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            wanted = json.loads(asked)["paths"] if asked.startswith("{") else parse_qs(asked)["paths"]
            found = [entry(p, files[p]) for p in wanted if p in files]
            found += [
                {"type": "directory", "path": p, "oid": "0" * 40}
                for p in wanted
                if p not in files and any(f.startswith(f"{p}/") for f in files)
            ]
            return self.json(found)
        if kind == "tree":
            return self.tree(files, name, url)
        assert kind == "resolve"
        if repo in hub.gated:
            return self.refuse("GatedRepo", 403)
        if name not in files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        stated = entry(name, files[name])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{stated["oid"]}"'}
        if "lfs" not in stated:
            return self.reply(200, files[name], headers, body=body)
        headers["X-Linked-Etag"] = f'"{stated["lfs"]["oid"]}"'
        headers["X-Linked-Size"] = str(stated["size"])
        headers["Location"] = f"http://localhost:{hub.port}/cdn/{repo}/{sha}/{name}"
        return self.reply(302, b"", headers)

    def tree(self, files, folder, url):
        prefix = f"{folder}/" if folder else ""
        deep = parse_qs(url.query).get("recursive") == ["true"]
        below = [f.removeprefix(prefix) for f in files if f.startswith(prefix)]
        inside = set(below) if deep else {f.split("/")[0] for f in below}
        if not inside:
            return self.refuse("EntryNotFound")
        entries = [
            entry(prefix + one, files[prefix + one])
            if prefix + one in files
            else {"type": "directory", "path": prefix + one, "oid": "0" * 40}
            for one in sorted(inside)
        ]
        start = int(parse_qs(url.query).get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            query = f"cursor={start + PAGE}&recursive={str(deep).lower()}"
            headers["Link"] = f'<{self.hub.url}{url.path}?{query}>; rel="next"'
        return self.json(entries[start : start + PAGE], headers)


def serve(hub: Hub) -> ThreadingHTTPServer:
    """Start it on a free port, in a thread of its own."""
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
