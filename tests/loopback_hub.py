"""A small Hub on 127.0.0.1: what huggingface_hub asks of the real one to create, upload, list and download models.

Repositories live in memory as lists of commits; data sets are read from among them. Large files go through the LFS
batch protocol and a PUT, small ones inside the commit, as on the real Hub; downloads answer HEAD and (ranged) GET. Xet
is not spoken: clients run with ``HF_HUB_DISABLE_XET=1``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

__all__ = ["LoopbackHub"]

TOKEN = "hf_loopback"
_OWNER = "me"
_LARGE = (".safetensors", ".bin", ".pt")


@dataclass
class Commit:
    """One commit: message, branch or pull request it is on, and the whole tree after it."""

    message: str
    files: dict[str, bytes]
    pull_request: int | None = None
    description: str = ""

    @property
    def sha(self) -> str:
        content = "".join(f"{path}:{hashlib.sha1(data).hexdigest()}" for path, data in sorted(self.files.items()))
        return hashlib.sha1(f"{self.message}\n{content}".encode()).hexdigest()


@dataclass
class Repository:
    """A repository of models; a gated one tells what it is to everyone, and gives its files to nobody here."""

    private: bool | None = None
    gated: bool = False
    refs: dict[str, Commit] = field(default_factory=lambda: {"main": Commit("initial commit", {})})
    commits: list[Commit] = field(default_factory=list)

    def at(self, revision: str) -> Commit | None:
        if revision in self.refs:
            return self.refs[revision]
        return next((c for c in [*self.commits, *self.refs.values()] if c.sha == revision), None)


class LoopbackHub:
    """``with LoopbackHub() as hub:`` serves until the block ends.

    Attributes:
        url: for ``HF_ENDPOINT``.
        repositories: {id: Repository}.
        requests: (method, path) of every request, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: str) -> dict[str, str]:
        """Environment variables that make a new process talk to this Hub and to nothing else."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": cache,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content of a repository, by path."""
        commit = self.repositories[repo_id].at(revision)
        assert commit is not None
        return commit.files

    def add(self, repo_id: str, files: dict[str, bytes], message: str = "upload") -> None:
        """Commit ``files`` to a repository's main branch, making it if need be."""
        repo = self.repositories.setdefault(repo_id, Repository())
        repo.refs["main"] = Commit(message, {**repo.refs["main"].files, **files})
        repo.commits.append(repo.refs["main"])


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {key: value[-1] for key, value in parse_qs(parts.query).items()}
        self.hub.requests.append((self.command, self.path))
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        routes = (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate_yaml),
            (r"/api/whoami-v2", self._whoami),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", self._preupload),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", self._commit),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>.+)", self._branch),
            (r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?P<under>/.*)?", self._tree),
            (r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>.+)", self._info),
            (r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)", self._info),
            (r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            (r"/lfs/(?P<oid>[0-9a-f]{64})", self._lfs_put),
            (
                r"(?:/datasets)?/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<file>.+)",
                self._resolve,
            ),
        )
        for pattern, route in routes:
            match = re.fullmatch(pattern, path)
            if match:
                return route(body=body, query=query, **match.groupdict())
        self._json({"error": f"no route for {path}"}, 404)

    # --- writing ------------------------------------------------------------------------------------------------

    def _create(self, body: bytes, query: dict[str, str]) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or _OWNER}/{wanted['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        private = wanted.get("private", wanted.get("visibility") == "private")
        self.hub.repositories[repo_id] = Repository(private)
        self._json({"url": url, "name": repo_id, "id": "0"})

    def _validate_yaml(self, body: bytes, query: dict[str, str]) -> None:
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        errors = []
        try:
            data = yaml.safe_load(match.group(1)) if match else {}
            if data.get("base_model_relation") and not data.get("base_model"):
                errors.append({"message": "base_model_relation needs base_model"})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _whoami(self, body: bytes, query: dict[str, str]) -> None:
        self._json({"name": _OWNER, "type": "user", "orgs": []})

    def _preupload(self, repo: str, revision: str, body: bytes, query: dict[str, str]) -> None:
        if repo not in self.hub.repositories:
            return self._missing("RepoNotFound")
        files = json.loads(body)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self._json({"files": modes})

    def _lfs_batch(self, repo: str, body: bytes, query: dict[str, str]) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{item['oid']}"}
            known = item["oid"] in self.hub.blobs
            objects.append({**item} if known else {**item, "actions": {"upload": upload}})
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str, body: bytes, query: dict[str, str]) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json({"error": "wrong content"}, 400)
        self.hub.blobs[oid] = body
        self._send(b"")

    def _branch(self, repo: str, branch: str, body: bytes, query: dict[str, str]) -> None:
        found = self.hub.repositories[repo]
        found.refs.setdefault(branch, found.refs["main"])
        self._json({})

    def _commit(self, repo: str, revision: str, body: bytes, query: dict[str, str]) -> None:
        found = self.hub.repositories.get(repo)
        parent = found and found.at(revision)
        if found is None or parent is None:
            return self._missing("RepoNotFound" if found is None else "RevisionNotFound")
        files, header = dict(parent.files), {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                header = value
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        number = 1 + sum(ref.startswith("refs/pr/") for ref in found.refs) if query.get("create_pr") else None
        commit = Commit(header["summary"], files, number, header.get("description", ""))
        found.refs[revision if number is None else f"refs/pr/{number}"] = commit
        found.commits.append(commit)
        url = f"{self.hub.url}/{repo}/commit/{commit.sha}"
        answer: dict[str, Any] = {"success": True, "commitOid": commit.sha, "commitUrl": url}
        if number is not None:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        self._json(answer)

    # --- reading ------------------------------------------------------------------------------------------------

    def _info(self, repo: str, body: bytes, query: dict[str, str], revision: str = "main") -> None:
        commit = self._found(repo, revision)
        if commit is None:
            return
        private = bool(self.hub.repositories[repo].private)
        siblings = [{"rfilename": path, "size": len(data)} for path, data in sorted(commit.files.items())]
        gated = "auto" if self.hub.repositories[repo].gated else False
        self._json({"id": repo, "modelId": repo, "sha": commit.sha, "private": private, "tags": [], "downloads": 0,
                    "gated": gated, "siblings": siblings})  # fmt: skip

    def _tree(self, repo: str, revision: str, under: str | None, body: bytes, query: dict[str, str]) -> None:
        commit = self._found(repo, revision)
        if commit is None:
            return
        prefix = (under or "").strip("/")
        entries = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in sorted(commit.files.items())
            if not prefix or path.startswith(f"{prefix}/")
        ]
        self._json(entries)

    def _resolve(self, repo: str, revision: str, file: str, body: bytes, query: dict[str, str]) -> None:
        commit = self._found(repo, revision)
        if commit is None:
            return
        headers = {"X-Repo-Commit": commit.sha}
        if self.hub.repositories[repo].gated:
            return self._refuse_gated()
        if file not in commit.files:
            return self._missing("EntryNotFound", headers)
        data = commit.files[file]
        large = file.endswith(_LARGE)
        digest = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(data).hexdigest()
        headers |= {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span:
            start, end = int(span[1]), int(span[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._send(data[start : end + 1], 206, headers)
        self._send(data, 200, headers)

    def _found(self, repo: str, revision: str) -> Commit | None:
        """The commit; or None, answered with what the Hub says then."""
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._missing("RepoNotFound")
            return None
        commit = found.at(revision)
        if commit is None:
            self._missing("RevisionNotFound")
        return commit

    # --- answers ------------------------------------------------------------------------------------------------

    def _chunked(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _missing(self, code: str, headers: dict[str, str] | None = None) -> None:
        self._json({"error": code}, 404, {"X-Error-Code": code, **(headers or {})})

    def _refuse_gated(self) -> None:
        # The Hub tells the nameless that they lack a token, and others that they have not been let in.
        status = 403 if self.headers.get("Authorization") == f"Bearer {TOKEN}" else 401
        self._json({"error": "Access to this model is restricted."}, status, {"X-Error-Code": "GatedRepo"})

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
