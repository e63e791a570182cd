"""A Hugging Face hub for tests, on 127.0.0.1: what huggingface_hub asks of the HTTP API to make a repository, to push
with git LFS, to list and to fetch. Repositories live in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER = "somebody"
WRITES, READS = "hf_test_writes", "hf_test_reads"  # tokens
LARGE = (".safetensors", ".gguf", ".pt")


@dataclass
class Repository:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.branches.get(revision, self.commits.get(revision))

    def commit(self, revision: str) -> str:
        """The id of what the revision has now."""
        files = self.files(revision) or {}
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = dict(files)
        return digest


class Hub:
    """State and records of the stub."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files, by SHA-256
        self.uploads: list[str] = []  # SHA-256 of each large file that arrived
        self.requests: list[str] = []
        self.stall_after: int | None = None  # uploads that arrive before the next ones get no answer
        self.stalled, self.released = threading.Event(), threading.Event()
        self.address = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do(self) -> None:
        hub = self.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path.startswith("/objects/"):  # a signed address: needs no token
            return self.put(path.rpartition("/")[2], body)
        if token and token not in (WRITES, READS):
            return self.answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body), token)
        name, rest = self.split(path)
        repository = hub.repositories.get(name)
        if repository is None or (repository.private and not token):
            return self.answer(
                404 if token else 401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
            )
        if self.command == "POST" and token != WRITES:
            return self.answer(403, {"error": "no right"}, X_Error_Message="no right to write")
        return self.of_repository(name, repository, rest, body)

    do_GET = do_HEAD = do_POST = do_PUT = do

    @staticmethod
    def split(path: str) -> tuple[str, list[str]]:
        """OWNER/NAME and what is asked of it: [word, revision, path]."""
        parts = path.removeprefix("/api/models").lstrip("/").split("/")
        if parts[1].endswith(".git"):
            return f"{parts[0]}/{parts[1][:-4]}", ["batch"]
        return "/".join(parts[:2]), [*parts[2:4], "/".join(parts[4:])][: len(parts) - 2]

    def put(self, digest: str, body: bytes) -> None:
        hub = self.hub
        if hub.stall_after is not None and len(hub.uploads) >= hub.stall_after:
            hub.stalled.set()
            hub.released.wait(30)
            return self.answer(400)
        assert hashlib.sha256(body).hexdigest() == digest
        hub.objects[digest] = body
        hub.uploads.append(digest)
        self.answer(200)

    def create(self, wanted: dict[str, Any], token: str) -> None:
        name = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        if token != WRITES or not name.startswith(OWNER + "/"):
            return self.answer(403 if token else 401, {"error": "no right"}, X_Error_Message="no right to create")
        if name in self.hub.repositories:
            return self.answer(409, {"error": "exists", "url": f"{self.hub.address}/{name}"})
        self.hub.repositories[name] = Repository(wanted.get("visibility") == "private")
        self.answer(200, {"url": f"{self.hub.address}/{name}"})

    def of_repository(self, name: str, repository: Repository, rest: list[str], body: bytes) -> None:
        what, revision, path = [*rest, "", "", ""][:3]
        if what == "batch":
            return self.batch(json.loads(body))
        if what == "branch":
            repository.branches.setdefault(revision, dict(repository.branches["main"]))
            return self.answer(200)
        files = repository.files(revision or "main")
        if files is None:
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        if what in ("", "revision"):
            sha = repository.commit(revision or "main")
            return self.answer(200, {"id": name, "sha": sha, "private": repository.private, "siblings": []})
        if what == "tree":
            return self.answer(200, [_entry(path, content) for path, content in sorted(files.items())])
        if what == "preupload":
            modes = [
                {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False, "oid": None}
                for each in json.loads(body)["files"]
            ]  # fmt: skip
            return self.answer(200, {"files": modes})
        if what == "commit":
            return self.commit(repository, revision, body)
        assert what == "resolve", self.path
        if path not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        etag = hashlib.sha256(files[path]).hexdigest() if path.endswith(LARGE) else _git_hash(files[path])
        self.answer(200, files[path], ETag=f'"{etag}"', X_Repo_Commit=repository.commit(revision))

    def batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for each in wanted["objects"]:
            entry = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.address}/objects/{each['oid']}"}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, revision: str, body: bytes) -> None:
        files = repository.branches[revision]
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                repository.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = repository.commit(revision)
        self.answer(200, {"commitUrl": f"{self.hub.address}/{OWNER}/x/commit/{sha}", "commitOid": sha})


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
    if path.endswith(LARGE):
        digest = hashlib.sha256(content).hexdigest()
        entry |= {"oid": "0" * 40, "lfs": {"oid": digest, "size": len(content), "pointerSize": 134}}
    return entry


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens while the block runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that were killed, or do not read on
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
