"""Local servers that answer like S3, Google Cloud Storage and the Hugging Face hub."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fsspec
import pytest


@contextlib.contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """moto's S3 server in this process, with an empty bucket named bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    files = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    type(files).clear_instance_cache()  # their clients know the endpoint of an earlier server
    files.mkdir("bucket")
    try:
        yield files
    finally:
        type(files).clear_instance_cache()
        server.stop()


@contextlib.contextmanager
def gs_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """gcp-storage-emulator in this process, with an empty bucket named bucket."""
    import gcsfs
    from gcp_storage_emulator.server import create_server

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    # gcsfs asks another server for the kind of each bucket, with credentials that it looks for on the network.
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    gcsfs.GCSFileSystem.clear_instance_cache()
    try:
        yield fsspec.filesystem("gs", use_listings_cache=False, skip_instance_cache=True)
    finally:
        gcsfs.GCSFileSystem.clear_instance_cache()
        server.stop()


class Hub(ThreadingHTTPServer):
    """Repositories of models, by the part of the hub's HTTP API that huggingface_hub uses for them.

    Attributes:
      repositories: by id, whether it is private, and its files.
      down: whether every request fails.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.down = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.down or self.headers.get("Authorization") != "Bearer token":
            self._answer(503 if self.server.down else 401, {"error": "no"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            known = name in self.server.repositories
            self.server.repositories.setdefault(
                name, {"private": asked.get("private", asked.get("visibility") == "private"), "files": {}}
            )
            self._answer(409 if known else 200, {"url": f"{self.server.url}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            asked = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            self._answer(200, {"files": modes})
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            lines = [json.loads(line) for line in body.splitlines()]
            files = self.server.repositories[found[1]]["files"]
            files |= {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commit = self._commit(found[1])
            self._answer(200, {"commitOid": commit, "commitUrl": f"{self.server.url}/{found[1]}/commit/{commit}"})
        else:
            self._answer(404, {"error": self.path})

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def _get(self) -> None:
        path = self.path.partition("?")[0]
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(?:revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = info or file
        repository = self.server.repositories.get(found[1]) if found else None
        if self.server.down:
            self._answer(503, {"error": "down"})
        elif repository is None or found is None or (repository["private"] and not self.headers.get("Authorization")):
            self._answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif found[2] not in (None, "main", self._commit(found[1])):
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in path:
            self._answer(
                200,
                [
                    {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                    for name, content in repository["files"].items()
                ],
            )
        elif info:
            names = [{"rfilename": name} for name in repository["files"]]
            self._answer(
                200,
                {"id": found[1], "sha": self._commit(found[1]), "private": repository["private"], "siblings": names},
            )
        elif file and file[3] not in repository["files"]:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        elif file:
            content = repository["files"][file[3]]
            self._answer(200, content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": self._commit(found[1])})

    def _commit(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.server.repositories[name]["files"].items())).encode()).hexdigest()

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def hub_server(monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[Hub]:
    """The hub of this process, with a cache of its own and the token `token`."""
    from huggingface_hub import constants

    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setenv("HF_TOKEN", "token")
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
