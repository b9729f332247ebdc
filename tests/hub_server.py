"""A Hugging Face Hub for tests: in memory, over real HTTP on the loopback interface.

It implements what huggingface_hub 2.4 and datasets 5.2 request to create, fill and read repositories of models,
datasets and Spaces; `HubHandler.ROUTES` lists all of it. The requests were traced from the two clients. They follow the
Hub API (https://huggingface.co/docs/hub/api) and the batch API of Git LFS
(https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md). A repository has one branch and no tags. Xet,
pagination and pull requests are missing; clients set `HF_HUB_DISABLE_XET=1`. Private repositories and all writing need
the server's token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit


LFS_PATTERNS = ("*.safetensors", "*.bin", "*.parquet", "*.npy", "*.npz", "*.gz", "*.zip", "*.faiss", "*.mp4", "*.png")
LFS_FROM_BYTES = 10 * 2**20
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
URL_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
REPO_TYPES = {prefix: repo_type for repo_type, prefix in URL_PREFIXES.items()}

API = r"/api/(?P<repo_type>model|dataset|space)s/(?P<repo_id>[^/]+/[^/]+)"
WEB = r"/(?P<prefix>datasets/|spaces/|)(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
SHA256 = r"(?P<sha256>[0-9a-f]{64})"


class HubError(Exception):
    """An error response, with the `X-Error-Code` by which huggingface_hub distinguishes errors."""

    def __init__(self, status: int, code: str, message: str = ""):
        super().__init__(message or code)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Reply:
    """Status, body and headers of a response."""

    status: int = 200
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | dict(headers or {}))

    @classmethod
    def from_error(cls, error: HubError) -> Reply:
        headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
        return cls.from_json({"error": str(error)}, error.status, headers)


@dataclass
class Request:
    """A received request and the status of its response."""

    path: str  # without the query
    status: int | None = None


@dataclass
class Failure:
    """Make the next `left` requests fail whose path contains a match of the regular expression `path`."""

    path: str
    status: int
    left: float

    def applies_to(self, path: str) -> bool:
        if self.left <= 0 or not re.search(self.path, path):
            return False
        self.left -= 1
        return True


@dataclass(frozen=True)
class StoredFile:
    """Content of a file in a commit, stored in Git or by LFS."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's id of the blob; for an LFS file, of its pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        blob = pointer.encode() if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def content_id(self) -> str:
        """Id that clients compare to skip unchanged files, and the ETag."""
        return self.sha256 if self.is_lfs else self.blob_id

    def describe(self, path: str) -> dict[str, Any]:
        """Return the file's entry in a tree listing."""
        size = len(self.content)
        lfs = {"lfs": {"oid": self.sha256, "sha256": self.sha256, "size": size, "pointerSize": 130}}
        return {"type": "file", "path": path, "size": size, "oid": self.blob_id} | (lfs if self.is_lfs else {})


class Repository:
    """Files of each commit of the main branch, oldest first. As on the Hub, the first contains `.gitattributes`."""

    def __init__(self, repo_id: str, repo_type: str, private: bool, sdk: str | None = None):
        self.repo_id, self.repo_type, self.private, self.sdk = repo_id, repo_type, private, sdk
        self.commits: dict[str, Mapping[str, StoredFile]] = {}
        self.commit({".gitattributes": StoredFile(GIT_ATTRIBUTES, is_lfs=False)})

    def sha(self, revision: str = "main") -> str:
        """Return the commit id of "main" or a commit id."""
        sha = next(reversed(self.commits)) if revision == "main" else revision
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files(self, revision: str = "main") -> Mapping[str, StoredFile]:
        return self.commits[self.sha(revision)]

    def commit(self, files: Mapping[str, StoredFile]) -> str:
        """Commit these files as the whole content of the repository and return the commit id."""
        listed = sorted((path, file.blob_id) for path, file in files.items())
        sha = hashlib.sha1(json.dumps([self.repo_id, len(self.commits), listed]).encode()).hexdigest()
        self.commits[sha] = dict(files)
        return sha

    def folder(self, revision: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """List a folder ("" is the root) in the Hub's format, folders first."""
        start = f"{folder.rstrip('/')}/" if folder else ""
        folders, files = set(), []
        for path, file in self.files(revision).items():
            if not path.startswith(start):
                continue
            *parents, _ = path.removeprefix(start).split("/")
            depth = len(parents) if recursive else min(len(parents), 1)
            folders |= {start + "/".join(parents[: number + 1]) for number in range(depth)}
            if recursive or not parents:
                files.append(file.describe(path))
        if folder and not folders and not files:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        return [describe_folder(path) for path in sorted(folders)] + files

    def paths(self, revision: str, paths: Iterable[str]) -> list[dict[str, Any]]:
        """Describe the paths that exist."""
        files = self.files(revision)
        described = []
        for path in paths:
            if path in files:
                described.append(files[path].describe(path))
            elif any(other.startswith(f"{path.rstrip('/')}/") for other in files):
                described.append(describe_folder(path))
        return described

    def describe(self, revision: str) -> dict[str, Any]:
        """Return the repository's info at a revision."""
        sha = self.sha(revision)
        described = {
            "id": self.repo_id,
            "author": self.repo_id.split("/")[0],
            "sha": sha,
            "private": self.private,
            "disabled": False,
            "gated": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": path} for path in self.files(sha)],
        }
        return described | ({"sdk": self.sdk} if self.sdk else {})


def describe_folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


class HubServer(ThreadingHTTPServer):
    """Hub on a free port, running inside a `with` block. `requests` lists all requests so far."""

    daemon_threads = True
    block_on_close = False  # clients keep connections open, and closing would wait for them

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.token = "hf_loopback"
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.RLock()
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.failures: list[Failure] = []

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def fail_next(self, count: int | None, path: str = "", status: int = 503) -> None:
        """Make the next `count` requests (None: all) fail whose path contains a match of a regular expression."""
        self.failures.append(Failure(path, status, math.inf if count is None else count))

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        """Return a repository, or raise `HubError` 404."""
        try:
            return self.repositories[repo_type, repo_id]
        except KeyError:
            raise HubError(404, "RepoNotFound", f"Repository not found: {repo_type} {repo_id}") from None

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """Return the files of the main branch."""
        with self.lock:
            return {path: file.content for path, file in self.repository(repo_id, repo_type).files().items()}


@dataclass(frozen=True)
class Route:
    """Handler of a path. The path is a regular expression, and its named groups are the arguments of `answer`."""

    methods: str
    path: str
    answer: Callable[..., Reply]
    needs_token: bool = False


class HubHandler(BaseHTTPRequestHandler):
    """Answer the requests of one connection with the methods in `ROUTES`."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each response waits 40 ms between headers and body
    body: bytes
    query: dict[str, list[str]]

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.body, self.query = self.read_body(), parse_qs(url.query)
        logged = Request(unquote(url.path))
        with self.server.lock:
            self.server.requests.append(logged)
            try:
                reply = self.reply(url.path)
            except HubError as error:
                reply = Reply.from_error(error)
            logged.status = reply.status
        self.send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815, the names are http.server's

    def log_message(self, *_: object) -> None:
        """Print nothing; `HubServer.requests` records the requests."""

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.content)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.content)

    def reply(self, path: str) -> Reply:
        if failure := next((failure for failure in self.server.failures if failure.applies_to(unquote(path))), None):
            raise HubError(failure.status, "Injected", "Injected failure")
        for route in self.ROUTES:
            if self.command in route.methods and (match := re.fullmatch(route.path, path)):
                if route.needs_token and not self.is_authorised():
                    raise HubError(401, "Unauthorized", "Invalid username or password.")
                groups = {name: unquote(value) for name, value in match.groupdict(default="").items()}
                if "repo_id" not in groups:
                    return route.answer(self, **groups)
                repo_type = groups.pop("repo_type", None) or REPO_TYPES[groups.pop("prefix")]
                return route.answer(self, self.open_repository(groups.pop("repo_id"), repo_type), **groups)
        raise HubError(404, "NotFound", f"{self.command} {path} is not implemented")

    def open_repository(self, repo_id: str, repo_type: str) -> Repository:
        """Return the repository if this client may read it."""
        repository = self.server.repository(repo_id, repo_type)
        if repository.private and not self.is_authorised():
            raise HubError(401, "RepoNotFound", "Repository not found")  # as the Hub, which hides its existence
        return repository

    def is_authorised(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {self.server.token}"

    def json_body(self) -> Any:
        return json.loads(self.body or b"{}")

    def url(self, repository: Repository) -> str:
        return f"{self.server.endpoint}/{URL_PREFIXES[repository.repo_type]}{repository.repo_id}"

    def validate_yaml(self) -> Reply:
        return Reply.from_json({"errors": [], "warnings": []})

    def create(self) -> Reply:
        request = self.json_body()
        repo_id, repo_type = f"{request['organization']}/{request['name']}", request.get("type") or "model"
        private = request.get("visibility") == "private" or bool(request.get("private"))  # huggingface_hub 2 and 1
        repository = Repository(repo_id, repo_type, private, request.get("sdk"))
        existing = self.server.repositories.setdefault((repo_type, repo_id), repository)
        answer = {"url": self.url(repository), "name": repo_id, "id": hashlib.sha1(repo_id.encode()).hexdigest()[:24]}
        if existing is not repository:
            return Reply.from_json(answer | {"error": f"You already created this {repo_type} repo"}, 409)
        return Reply.from_json(answer)

    def info(self, repository: Repository, revision: str = "") -> Reply:
        return Reply.from_json(repository.describe(revision or "main"))

    def tree(self, repository: Repository, revision: str, path: str) -> Reply:
        recursive = self.query.get("recursive", [""])[0].lower() in ("true", "1")
        return Reply.from_json(repository.folder(revision, path, recursive))

    def paths_info(self, repository: Repository, revision: str) -> Reply:
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = self.json_body()["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        return Reply.from_json(repository.paths(revision, paths))

    def resolve(self, repository: Repository, revision: str, path: str) -> Reply:
        sha = repository.sha(revision)
        file = repository.files(sha).get(path)
        if file is None:
            missing = Reply.from_error(HubError(404, "EntryNotFound", "Entry not found"))
            return Reply(404, missing.content, {**missing.headers, "X-Repo-Commit": sha})
        headers = {
            "Content-Type": "application/octet-stream",
            "X-Repo-Commit": sha,
            "ETag": f'"{file.content_id}"',
            "Accept-Ranges": "bytes",
        }
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        if (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")) and self.command == "GET":
            return self.byte_range(file.content, int(span[1]), int(span[2] or len(file.content) - 1), headers)
        return Reply(200, file.content, headers)

    @staticmethod
    def byte_range(content: bytes, first: int, last: int, headers: dict[str, str]) -> Reply:
        if first >= len(content):
            return Reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        last = min(last, len(content) - 1)
        headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return Reply(206, content[first : last + 1], headers)

    def preupload(self, repository: Repository, revision: str) -> Reply:
        """Return which files use LFS, and the ids of the files that exist under these names."""
        existing = repository.files(revision)
        answer = []
        for file in self.json_body()["files"]:
            path = file["path"]
            by_name = any(fnmatch(path.rpartition("/")[2], pattern) for pattern in LFS_PATTERNS)
            is_lfs = by_name or file["size"] > LFS_FROM_BYTES or b"\0" in base64.b64decode(file["sample"])
            old = existing[path].content_id if path in existing else None
            mode = "lfs" if is_lfs else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": old})
        return Reply.from_json({"files": answer})

    def lfs_batch(self, repository: Repository) -> Reply:
        """Return upload URLs for the objects that are missing."""
        objects = []
        for requested in self.json_body()["objects"]:
            described = {"oid": requested["oid"], "size": requested["size"]}
            if requested["oid"] not in self.server.lfs_objects:
                url = f"{self.server.endpoint}/lfs/{requested['oid']}"
                described["actions"] = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            objects.append(described)
        kind = {"Content-Type": "application/vnd.git-lfs+json"}
        return Reply.from_json({"transfer": "basic", "objects": objects}, headers=kind)

    def lfs_upload(self, sha256: str) -> Reply:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, "BadRequest", "SHA-256 does not match the content")
        self.server.lfs_objects[sha256] = self.body
        return Reply.from_json({})

    def lfs_verify(self, sha256: str) -> Reply:
        if len(self.lfs_object(sha256)) != self.json_body()["size"]:
            raise HubError(400, "BadRequest", "Size does not match the content")
        return Reply.from_json({})

    def lfs_object(self, sha256: str) -> bytes:
        if sha256 not in self.server.lfs_objects:
            raise HubError(404, "EntryNotFound", f"No LFS object {sha256}")
        return self.server.lfs_objects[sha256]

    def commit(self, repository: Repository, revision: str) -> Reply:
        files = dict(repository.files(revision))
        for line in self.body.splitlines():
            entry = json.loads(line)
            if entry["key"] != "header":  # the message
                self.apply(entry["key"], entry["value"], files)
        sha = repository.commit(files)
        url = f"{self.url(repository)}/commit/{sha}"
        return Reply.from_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def apply(self, operation: str, value: dict[str, Any], files: dict[str, StoredFile]) -> None:
        """Apply one operation of a commit to the files."""
        path = value["path"]
        if operation == "file":
            files[path] = StoredFile(base64.b64decode(value["content"]), is_lfs=False)
        elif operation == "lfsFile":
            files[path] = StoredFile(self.lfs_object(value["oid"]), is_lfs=True)
        elif operation == "deletedFile":
            files.pop(path, None)
        else:
            raise HubError(400, "BadRequest", f"Unknown operation: {operation}")

    ROUTES: ClassVar[list[Route]] = [
        Route("POST", "/api/validate-yaml", validate_yaml),
        Route("POST", "/api/repos/create", create, needs_token=True),
        Route("GET", API, info),
        Route("GET", f"{API}/revision/{REVISION}", info),
        Route("GET", f"{API}/tree/{REVISION}(?:/(?P<path>.+))?", tree),
        Route("POST", f"{API}/paths-info/{REVISION}", paths_info),
        Route("GET HEAD", f"{WEB}/resolve/{REVISION}/(?P<path>.+)", resolve),
        Route("POST", f"{API}/preupload/{REVISION}", preupload, needs_token=True),
        Route("POST", rf"{WEB}\.git/info/lfs/objects/batch", lfs_batch, needs_token=True),
        Route("PUT", f"/lfs/{SHA256}", lfs_upload),  # only clients with the token learn this URL
        Route("POST", f"/lfs/{SHA256}/verify", lfs_verify),
        Route("POST", f"{API}/commit/{REVISION}", commit, needs_token=True),
    ]
