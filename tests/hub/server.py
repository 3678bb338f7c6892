"""A Hub on the loopback interface: what huggingface_hub, transformers, peft and datasets ask of it, kept in memory.

Repositories with branches, tags, commits, LFS, private visibility, forks and renames. Requests are logged, with the
token they carried, so that a test can say who asked for what.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow")
DATE = "2026-01-01T00:00:00.000Z"
RESOLVE = re.compile(r"^/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
API = re.compile(r"^/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/([^/]+)(?:/([^/]+)(?:/(.+))?)?)?$")
LFS_BATCH = re.compile(r"^/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch$")


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@dataclass
class Repository:
    """Commits are mappings of path to content, named by a hash of content and parent; refs point at them."""

    name: str
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        parent = self.branches.get(branch, "")
        listing = [f"{path} {sha1(content)}" for path, content in sorted(files.items())]
        oid = sha1("\n".join([parent, *listing]).encode())
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        known = {**self.tags, **self.branches}
        return known.get(revision) or (revision if revision in self.commits else None)


class LocalHub(ThreadingHTTPServer):
    """
    The server; use it as a context manager.

    Args:
        users (`dict[str, str]`): Token to user name. A private repository is seen by its owner alone.
    """

    daemon_threads = True

    def __init__(self, users: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = users
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.moved: dict[tuple[str, str], str] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Content of a repository by path."""
        repository = self.repositories[kind, name]
        return repository.commits[repository.resolve(revision)]

    def publish(self, name: str, files: dict[str, bytes]) -> None:
        """Makes a repository by hand, as an upload from elsewhere would."""
        self.repositories["model", name] = Repository(name)
        self.repositories["model", name].commit(files)

    def fork(self, name: str, to: str) -> None:
        """Another owner's copy: same files, no history."""
        self.publish(to, dict(self.files(name)))

    def rename(self, name: str, to: str) -> None:
        """The old name answers with a redirect, as on the Hub."""
        self.repositories["model", to] = self.repositories.pop(("model", name))
        self.moved["model", name] = to


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *words) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # --- plumbing ---

    def answer(self) -> None:
        self.body = self.read_body()
        self.path, self.query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        authorization = self.headers.get("Authorization") or ""
        token = authorization.removeprefix("Bearer ") or None
        self.user = self.server.users.get(token)
        with self.server.lock:
            self.server.requests.append((self.command, unquote(self.path), token))
            self.route()

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def route(self) -> None:
        if match := RESOLVE.match(self.path):
            kind, name, revision, path = match.groups()
            return self.with_repository(kind or "models", name, self.resolve, unquote(revision), unquote(path))
        if match := LFS_BATCH.match(self.path):
            return self.with_repository(match[1] or "models", match[2], self.lfs_batch)
        if self.path.startswith("/lfs/"):
            self.server.objects[self.path.removeprefix("/lfs/")] = self.body
            return self.send(200)
        if self.path.startswith("/api/repos/"):
            return self.manage(self.path.removeprefix("/api/repos/"), json.loads(self.body))
        if self.path == "/api/whoami-v2":
            return self.json({"name": self.user, "type": "user", "orgs": []}) if self.user else self.error(401)
        if self.path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if match := API.match(self.path):
            kind, name, action, revision, path = match.groups()
            revision, path = unquote(revision or "main"), unquote(path or "")
            actions = {
                (None, "GET"): self.info,
                ("revision", "GET"): self.info,
                ("tree", "GET"): self.tree,
                ("paths-info", "POST"): self.paths_info,
                ("refs", "GET"): self.refs,
                ("branch", "POST"): self.branch,
                ("tag", "POST"): self.tag,
                ("preupload", "POST"): self.preupload,
                ("commit", "POST"): self.commit,
            }
            if (action, self.command) in actions:
                return self.with_repository(kind, name, actions[action, self.command], revision, path)
        return self.error(404)

    def with_repository(self, kind: str, name: str, action, *arguments) -> None:
        key = KINDS[kind], unquote(name)
        if new := self.server.moved.get(key):
            return self.send(307, headers={"Location": self.path.replace(name, new, 1)})
        repository = self.server.repositories.get(key)
        if repository is None or (repository.private and self.user != key[1].split("/")[0]):
            return self.error(404 if self.user else 401, "RepoNotFound")
        return action(repository, *arguments)

    def send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, value, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, code: str = "NotFound") -> None:
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    # --- repositories ---

    def manage(self, action: str, request: dict) -> None:
        if self.user is None:
            return self.error(401)
        name = f"{request.get('organization') or self.user}/{request.get('name')}"
        key = request.get("type", "model"), name
        prefix = "" if key[0] == "model" else f"{key[0]}s/"
        described = {"url": f"{self.server.url}/{prefix}{name}", "name": name, "id": name}
        if action != "create":
            return self.error(404)
        if key in self.server.repositories:
            return self.json(described, 409)
        private = request.get("private") or request.get("visibility") == "private"
        self.server.repositories[key] = Repository(name, bool(private))
        self.server.repositories[key].commit({})
        return self.json(described)

    def found(self, repository: Repository, revision: str) -> dict[str, bytes] | None:
        oid = repository.resolve(revision)
        if oid is None:
            self.error(404, "RevisionNotFound")
            return None
        self.oid = oid
        return repository.commits[oid]

    def info(self, repository: Repository, revision: str, path: str) -> None:
        if (files := self.found(repository, revision)) is not None:
            shared = {"private": repository.private, "tags": [], "lastModified": DATE, "createdAt": DATE}
            siblings = [{"rfilename": name} for name in sorted(files)]
            self.json({"id": repository.name, "sha": self.oid, "siblings": siblings, **shared})

    def refs(self, repository: Repository, revision: str, path: str) -> None:
        lists = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        self.json(
            {
                key: [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]
                for key, (kind, refs) in lists.items()
            }
            | {"converts": []}
        )

    def branch(self, repository: Repository, name: str, path: str) -> None:
        if name in repository.branches:
            return self.error(409)
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repository.branches[name] = repository.resolve(start)
        return self.send(200)

    def tag(self, repository: Repository, revision: str, path: str) -> None:
        repository.tags[json.loads(self.body)["tag"]] = repository.resolve(revision)
        self.send(200)

    # --- reading ---

    def entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": sha1(content)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def tree(self, repository: Repository, revision: str, folder: str) -> None:
        files = self.found(repository, revision)
        if files is None:
            return
        prefix, entries = f"{folder}/" if folder else "", {}
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        for path, content in sorted(files.items()):
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                for depth in range(1, len(parts)):
                    parent = prefix + "/".join(parts[:depth])
                    if recursive or depth == 1:
                        entries[parent] = {"type": "directory", "path": parent, "oid": sha1(parent.encode())}
                if recursive or len(parts) == 1:
                    entries[path] = self.entry(path, content)
        if folder and not entries:
            self.error(404, "EntryNotFound")
        else:
            self.json(list(entries.values()))

    def paths_info(self, repository: Repository, revision: str, path: str) -> None:
        if (files := self.found(repository, revision)) is not None:
            if (self.headers.get("Content-Type") or "").startswith("application/json"):
                paths = json.loads(self.body)["paths"]
            else:
                paths = parse_qs(self.body.decode())["paths"]
            self.json([self.entry(name, files[name]) for name in paths if name in files])

    def resolve(self, repository: Repository, revision: str, path: str) -> None:
        files = self.found(repository, revision)
        if files is None:
            return
        commit = {"X-Repo-Commit": self.oid}
        if path not in files:
            return self.send(404, headers={"X-Error-Code": "EntryNotFound", **commit})
        content, status = files[path], 200
        entry = self.entry(path, content)
        headers = {"ETag": f'"{entry.get("lfs", entry)["oid"]}"', "Accept-Ranges": "bytes", **commit}
        if "lfs" in entry:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": headers["ETag"]}
        if span := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(span[1]), int(span[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        return self.send(status, content, headers)

    # --- writing ---

    def preupload(self, repository: Repository, revision: str, path: str) -> None:
        self.json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }
        )

    def lfs_batch(self, repository: Repository) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}}
            known = wanted["oid"] in self.server.objects
            objects.append(wanted if known else {**wanted, "actions": {"upload": upload}})
        self.json({"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, branch: str, path: str) -> None:
        if self.user != repository.name.split("/")[0]:
            return self.error(403)
        if branch not in repository.branches:
            return self.error(404, "RevisionNotFound")
        files = dict(repository.commits[repository.branches[branch]])
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"])
            elif key == "deletedFolder":
                prefix = value["path"].rstrip("/") + "/"
                files = {name: content for name, content in files.items() if not name.startswith(prefix)}
        oid = repository.commit(files, branch)
        return self.json(
            {
                "commitOid": oid,
                "commitUrl": f"{self.server.url}/{repository.name}/commit/{oid}",
                "pullRequestUrl": None,
                "success": True,
            }
        )
