"""A stand-in of the Hugging Face hub on loopback: the endpoints that its libraries use, no more.

It speaks what huggingface_hub and datasets speak with the real one, LFS but not Xet: repositories
with commits, branches and tags, private and gated ones, and the errors with their own codes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_aTokenThatNobodyMaySee"
"""Of the user `me`, who may read and write."""
GUEST = "hf_anotherTokenOfAGuest"
"""Of the user `guest`, who is let into nothing that is private or gated."""
USERS = {TOKEN: "me", GUEST: "guest"}
LFS = (".safetensors", ".png", ".bin", ".parquet")
CARD_BASE = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Repo:
    """A repository: commits, oldest first, and what branches and tags stand for."""

    private: bool = False
    gated: bool = False
    """Its pages are open, its files are for `me` alone."""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], message: str = "") -> str:
        """A new commit of main that consists of these files; its hash."""
        sha = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs["main"] = sha
        self.messages.append(message)
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        """Of the newest commit of main."""
        return self.commits[self.refs["main"]]


class Hub(ThreadingHTTPServer):
    """The server; what it was asked is in ``asked``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        """By ``models/OWNER/NAME`` or ``datasets/OWNER/NAME``."""
        self.asked: list[tuple[str, str, str]] = []
        """Method, path and Authorization header of every request."""
        self.uploaded: dict[str, bytes] = {}
        self.fails_with: int = 0
        """Status of every answer, where the hub is out of order."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: Mapping[str, bytes], **kind: bool) -> Repo:
        """A repository with one commit, such as ``models/me/tiny``."""
        self.repos[name] = Repo(**kind)
        self.repos[name].commit(files)
        return self.repos[name]

    def add_folder(self, name: str, folder: Path, **kind: bool) -> Repo:
        files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*")}
        return self.add(name, files, **kind)

    def downloads(self) -> set[str]:
        """Names of the files that were fetched."""
        return {
            path.rpartition("/")[2] for method, path, _ in self.asked
            if method == "GET" and "/resolve/" in path
        }  # fmt: skip


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    # -- who asks for what ---------------------------------------------------------------------

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.where, self.query = unquote(parts.path), parse_qs(parts.query)
        self.body = self._read_body()
        header = self.headers.get("Authorization", "")
        self.server.asked.append((self.command, self.where, header))
        try:
            if self.server.fails_with:
                raise _Refused(self.server.fails_with)
            self.user = self._user(header)
            for pattern, method in ROUTES:
                if found := re.fullmatch(pattern, self.where):
                    getattr(self, method)(**found.groupdict())
                    return
            raise _Refused(404, "EntryNotFound", f"the stand-in has no {self.where}")
        except _Refused as no:
            headers = {"X-Error-Code": no.code, "X-Error-Message": no.message}
            self._send(no.status, {"error": no.message}, {k: v for k, v in headers.items() if v})

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _user(self, header: str) -> str:
        if not header:
            return ""
        user = USERS.get(header.removeprefix("Bearer "))
        if user is None:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        return user

    def _repo(self, kind: str, repo: str) -> Repo:
        found = self.server.repos.get(f"{kind or 'models'}/{repo}")
        if found is None or (found.private and self.user != "me"):
            # as the hub does: who is nobody does not learn whether it is there
            raise (
                _Refused(404, "RepoNotFound", "Repository not found")
                if self.user
                else _Refused(401, "", "Invalid username or password.")
            )
        return found

    def _commit(self, repo: Repo, revision: str | None) -> str:
        sha = repo.refs.get(revision or "main", revision)
        if sha not in repo.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return str(sha)

    def _send(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | dict(
            headers or {}
        )
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -- reading -------------------------------------------------------------------------------

    def info(self, kind: str, repo: str, revision: str | None = None) -> None:
        found = self._repo(kind, repo)
        sha = self._commit(found, revision)
        self._send(200, {
            "_id": "0", "id": repo, "modelId": repo, "sha": sha, "private": found.private,
            "gated": "manual" if found.gated else False, "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": name} for name in found.commits[sha]],
        })  # fmt: skip

    def auth_check(self, kind: str, repo: str) -> None:
        if self._repo(kind, repo).gated and self.user != "me":
            raise _Refused(403 if self.user else 401, "GatedRepo", "Access to it is restricted.")
        self._send(200, {})

    def tree(self, kind: str, repo: str, revision: str, path: str | None = None) -> None:
        found = self._repo(kind, repo)
        files = found.commits[self._commit(found, revision)]
        start = f"{path}/" if path else ""
        names = [name for name in files if name.startswith(start)]
        if path and not names:
            raise _Refused(404, "EntryNotFound", f"{path} does not exist")
        entries: dict[str, dict[str, Any]] = {}
        for name in names:
            rest = name[len(start) :]
            if "/" in rest:
                folder = start + rest.partition("/")[0]
                entries[folder] = {"type": "directory", "path": folder, "oid": "0", "size": 0}
            if "/" not in rest or self.query.get("recursive", ["false"])[0].lower() == "true":
                entries[name] = _entry(name, files[name])
        self._send(200, list(entries.values()))

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        found = self._repo(kind, repo)
        files = found.commits[self._commit(found, revision)]
        if self.headers.get("Content-Type", "").startswith("application/json"):
            asked = json.loads(self.body)["paths"]
        else:
            asked = parse_qs(self.body.decode())["paths"]
        entries = [_entry(name, files[name]) for name in asked if name in files]
        for name in asked:
            if any(each.startswith(f"{name}/") for each in files):
                entries.append({"type": "directory", "path": name, "oid": "0", "size": 0})
        self._send(200, entries)

    def resolve(self, repo: str, revision: str, path: str, kind: str | None = None) -> None:
        found = self._repo((kind or "models/").rstrip("/"), repo)
        sha = self._commit(found, revision)
        if path not in found.commits[sha]:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        if found.gated and self.user != "me":
            raise _Refused(403 if self.user else 401, "GatedRepo", "Access to it is restricted.")
        data = found.commits[sha][path]
        headers = {
            "X-Repo-Commit": sha, "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)), "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
        }  # fmt: skip
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, data, headers)
        first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
        if first >= len(data):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        part = data[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        return self._send(206, part, headers)

    # -- writing -------------------------------------------------------------------------------

    def whoami(self) -> None:
        if not self.user:
            raise _Refused(401, "", "Invalid username or password.")
        self._send(200, {"type": "user", "name": self.user, "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user
        if self.user != "me" or owner != "me":
            raise _Refused(403, "", f"You don't have the rights to create a model under {owner}")
        name = f"models/{owner}/{asked['name']}"
        url = f"{self.server.url}/{owner}/{asked['name']}"
        if name in self.server.repos:
            said = {"error": "You already created this model repo", "url": url}
            return self._send(409, said)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = self.server.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        repo.private = private
        return self._send(200, {"url": url, "name": name})

    def validate(self) -> None:
        """As the hub does, which takes no card whose base is a folder on somebody's machine."""
        import yaml

        front = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        base = front.get("base_model", "")
        if not CARD_BASE.fullmatch(base):
            error = {"message": f'"base_model" with value "{base}" is not valid.'}
            return self._send(400, {"errors": [error], "warnings": []})
        return self._send(200, {"errors": [], "warnings": []})

    def _writable(self, repo: str) -> Repo:
        found = self._repo("models", repo)
        if self.user != "me":
            raise _Refused(403, "", "You don't have the rights to write here")
        return found

    def preupload(self, repo: str, revision: str) -> None:
        self._writable(repo)
        files = [
            {"path": each["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if each["path"].endswith(LFS) else "regular"}
            for each in json.loads(self.body)["files"]
        ]  # fmt: skip
        self._send(200, {"files": files})

    def lfs(self, repo: str) -> None:
        self._writable(repo)
        objects = [
            each | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
            for each in json.loads(self.body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.uploaded[oid] = self.body
        self._send(200, {})

    def commit(self, repo: str, revision: str) -> None:
        found = self._writable(repo)
        files, message = dict(found.files), ""
        for line in self.body.splitlines():
            key, value = (each := json.loads(line))["key"], each["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.uploaded[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = found.commit(files, message)
        url = f"{self.server.url}/{repo}/commit/{sha}"
        self._send(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


REPO = r"(?P<repo>[^/]+/[^/]+)"
KIND = r"(?P<kind>models|datasets)"
ROUTES = [
    (r"/api/whoami-v2", "whoami"),
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate"),
    (rf"/api/{KIND}/{REPO}", "info"),
    (rf"/api/{KIND}/{REPO}/auth-check", "auth_check"),
    (rf"/api/{KIND}/{REPO}/revision/(?P<revision>.+)", "info"),
    (rf"/api/{KIND}/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    (rf"/api/{KIND}/{REPO}/paths-info/(?P<revision>.+)", "paths_info"),
    (rf"/api/models/{REPO}/preupload/(?P<revision>.+)", "preupload"),
    (rf"/api/models/{REPO}/commit/(?P<revision>.+)", "commit"),
    (rf"/{REPO}\.git/info/lfs/objects/batch", "lfs"),
    (r"/lfs/(?P<oid>\w+)", "put"),
    (rf"/(?P<kind>datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if name.endswith(LFS):
        sha = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 130}
    return entry


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub, empty, as long as the block runs."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def use(server: Hub, patch: pytest.MonkeyPatch, home: Path) -> None:
    """Makes it the hub of this process, with a cache of its own and no token."""
    import datasets.config
    import huggingface_hub.constants as constants
    from huggingface_hub import HfFileSystem

    # the libraries read their environment once, when they are imported
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        patch.setattr(constants, name, value)
    for name, value in {
        "HF_ENDPOINT": server.url,
        "HUB_DATASETS_URL": server.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "HF_HUB_OFFLINE": False,
    }.items():
        patch.setattr(datasets.config, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    HfFileSystem.clear_instance_cache()


def go_offline(server: Hub, patch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1; what the hub was asked before is forgotten."""
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    server.asked.clear()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub of this process, empty."""
    with serving() as server:
        use(server, monkeypatch, tmp_path / "hf")
        yield server
