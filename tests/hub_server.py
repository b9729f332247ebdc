"""A Hub to test against, in memory, over real HTTP on loopback.

What huggingface_hub 2.4 and datasets 5.2 ask for when they make, fill, read and delete repositories of models, datasets
and Spaces (`ROUTES` has all of it):

- `/api/whoami-v2`, `/api/validate-yaml`, `/api/repos/create`, `/api/repos/delete`
- of a repository, below `/api/models/ORG/NAME` (or datasets, spaces): its info, `revision`, `refs`, `branch`, `tag`,
  `commits`, `tree`, `paths-info`, `preupload` (which files go by LFS?) and `commit` (NDJSON: header, file, lfsFile,
  deletedFile, deletedFolder)
- Git LFS: `.git/info/lfs/objects/batch`, then upload and verify where it says
- `/ORG/NAME/resolve/REVISION/PATH` with HEAD and Range

The surface was traced from those two clients and is described in the Hub's API (https://huggingface.co/docs/hub/api)
and in Git LFS's (https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md). There is no Xet, no pagination, no
pull request: clients set `HF_HUB_DISABLE_XET=1`. Private repositories want the server's token, as does all writing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
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
    """An answer other than what was asked for, with the code by which huggingface_hub tells such answers apart."""

    def __init__(self, status: int, code: str, message: str = ""):
        super().__init__(message or code)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Reply:
    status: int = 200
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | dict(headers or {}))

    @classmethod
    def of_error(cls, error: HubError) -> Reply:
        headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
        return cls.of_json({"error": str(error)}, error.status, headers)


@dataclass
class Request:
    """A request as it came in, and the status of the answer."""

    method: str
    path: str  # without the query
    size: int
    range: str | None
    status: int | None = None


@dataclass
class Failure:
    """Requests whose path has `path` (a regular expression) in it fail, the next `left` ones or, if None, for good."""

    path: str
    status: int
    left: int | None

    def hits(self, path: str) -> bool:
        if self.left == 0 or not re.search(self.path, path):
            return False
        if self.left is not None:
            self.left -= 1
        return True


# ---- what a repository is -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredFile:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's id of what Git holds, which of an LFS file is the pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        blob = pointer.encode() if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def content_id(self) -> str:
        """By which clients recognise the content: in ETags, and to skip what is there already."""
        return self.sha256 if self.is_lfs else self.blob_id

    def describe(self, path: str) -> dict[str, Any]:
        size = len(self.content)
        lfs = {"lfs": {"oid": self.sha256, "sha256": self.sha256, "size": size, "pointerSize": 130}}
        return {"type": "file", "path": path, "size": size, "oid": self.blob_id} | (lfs if self.is_lfs else {})


@dataclass(frozen=True)
class Commit:
    parent: str | None
    title: str
    date: str
    files: Mapping[str, StoredFile]

    @property
    def id(self) -> str:
        listed = sorted((path, file.blob_id) for path, file in self.files.items())
        return hashlib.sha1(json.dumps([self.parent, self.title, self.date, listed]).encode()).hexdigest()


class Repository:
    """Commits, and the branches and tags that name them. A new one has what the Hub puts in: `.gitattributes`."""

    def __init__(self, repo_id: str, repo_type: str, private: bool, sdk: str | None = None):
        self.repo_id, self.repo_type, self.private, self.sdk = repo_id, repo_type, private, sdk
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit("main", "initial commit", {".gitattributes": StoredFile(GIT_ATTRIBUTES, is_lfs=False)})

    def sha(self, revision: str = "main") -> str:
        """The id of the commit that a branch, tag or commit id names."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files(self, revision: str = "main") -> Mapping[str, StoredFile]:
        return self.commits[self.sha(revision)].files

    def history(self, revision: str = "main") -> Iterator[tuple[str, Commit]]:
        """Newest first."""
        sha: str | None = self.sha(revision)
        while sha:
            yield sha, self.commits[sha]
            sha = self.commits[sha].parent

    def commit(self, branch: str, title: str, files: Mapping[str, StoredFile]) -> str:
        """Make these the files of the branch."""
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        commit = Commit(self.branches.get(branch), title, date, dict(files))
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        return commit.id

    def folder(self, revision: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """What is in a folder ("" is the root), folders first, as the Hub describes it."""
        start = f"{folder.rstrip('/')}/" if folder else ""
        folders, files = set(), []
        for path, file in self.files(revision).items():
            if not path.startswith(start):
                continue
            *above, _ = path.removeprefix(start).split("/")
            depth = len(above) if recursive else min(len(above), 1)
            folders |= {start + "/".join(above[: number + 1]) for number in range(depth)}
            if recursive or not above:
                files.append(file.describe(path))
        if folder and not folders and not files:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        return [describe_folder(path) for path in sorted(folders)] + files

    def paths(self, revision: str, paths: Iterable[str]) -> list[dict[str, Any]]:
        """Those of the paths that exist."""
        files = self.files(revision)
        found = []
        for path in paths:
            if path in files:
                found.append(files[path].describe(path))
            elif any(other.startswith(f"{path.rstrip('/')}/") for other in files):
                found.append(describe_folder(path))
        return found

    def describe(self, revision: str) -> dict[str, Any]:
        sha = self.sha(revision)
        *_, (_, first) = self.history(sha)
        described = {
            "id": self.repo_id,
            "author": self.repo_id.split("/")[0],
            "sha": sha,
            "createdAt": first.date,
            "lastModified": self.commits[sha].date,
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


# ---- the server -----------------------------------------------------------------------------------------------------


class HubServer(ThreadingHTTPServer):
    """Serves at a free port while `with` lasts. `requests` is all that was asked of it so far."""

    daemon_threads = True
    block_on_close = False  # clients keep connections open; nobody waits for them to hang up

    def __init__(self, user: str = "tester", token: str = "hf_loopback"):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.user, self.token = user, token
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
        """Let the next `count` requests (all, if None) fail whose path has the regular expression `path` in it."""
        self.failures.append(Failure(path, status, count))

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        try:
            return self.repositories[repo_type, repo_id]
        except KeyError:
            raise HubError(404, "RepoNotFound", f"Repository not found: {repo_type} {repo_id}") from None

    def files(self, repo_id: str, repo_type: str = "model") -> dict[str, bytes]:
        """What the main branch holds now."""
        with self.lock:
            return {path: file.content for path, file in self.repository(repo_id, repo_type).files().items()}


@dataclass(frozen=True)
class Route:
    """What answers requests for a path (a regular expression, whose named groups are arguments of `answer`)."""

    methods: str
    path: str
    answer: Callable[..., Reply]
    needs_token: bool = False


class HubHandler(BaseHTTPRequestHandler):
    """Answers one connection's requests: each goes by `ROUTES` to a method that gets the path's parts and replies."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms between its headers and its content
    body: bytes
    query: dict[str, list[str]]

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.body, self.query = self.read_body(), parse_qs(url.query)
        logged = Request(self.command, unquote(url.path), len(self.body), self.headers["Range"])
        with self.server.lock:
            self.server.requests.append(logged)
            try:
                reply = self.reply(url.path)
            except HubError as error:
                reply = Reply.of_error(error)
            logged.status = reply.status
        self.send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815, the names are http.server's

    def log_message(self, *_: object) -> None:
        """Nothing on stderr: `HubServer.requests` has it."""

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
        if failure := next((failure for failure in self.server.failures if failure.hits(unquote(path))), None):
            raise HubError(failure.status, "Injected", "The server was told to fail here")
        for route in self.ROUTES:
            if self.command in route.methods and (match := re.fullmatch(route.path, path)):
                if route.needs_token and not self.is_authorised():
                    raise HubError(401, "Unauthorized", "Invalid username or password.")
                parts = {name: unquote(value) for name, value in match.groupdict(default="").items()}
                if "repo_id" not in parts:
                    return route.answer(self, **parts)
                repo_type = parts.pop("repo_type", None) or REPO_TYPES[parts.pop("prefix")]
                return route.answer(self, self.open_repository(parts.pop("repo_id"), repo_type), **parts)
        raise HubError(404, "NotFound", f"{self.command} {path} is no part of this server")

    def open_repository(self, repo_id: str, repo_type: str) -> Repository:
        """The repository, if it is there for this client."""
        repository = self.server.repository(repo_id, repo_type)
        if repository.private and not self.is_authorised():
            raise HubError(401, "RepoNotFound", "Repository not found")  # as the Hub: whether it is there is private
        return repository

    def is_authorised(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {self.server.token}"

    def json_body(self) -> Any:
        return json.loads(self.body or b"{}")

    def url(self, repository: Repository) -> str:
        return f"{self.server.endpoint}/{URL_PREFIXES[repository.repo_type]}{repository.repo_id}"

    # ---- users and repositories ----

    def whoami(self) -> Reply:
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return Reply.of_json({"type": "user", "name": self.server.user, "orgs": [], "auth": access})

    def validate_yaml(self) -> Reply:
        return Reply.of_json({"errors": [], "warnings": []})

    def create(self) -> Reply:
        asked = self.json_body()
        repo_id, repo_type = self.named_in(asked)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))  # huggingface_hub 2 and 1
        repository = Repository(repo_id, repo_type, private, asked.get("sdk"))
        known = self.server.repositories.setdefault((repo_type, repo_id), repository)
        answer = {"url": self.url(repository), "name": repo_id, "id": hashlib.sha1(repo_id.encode()).hexdigest()[:24]}
        if known is not repository:
            return Reply.of_json(answer | {"error": f"You already created this {repo_type} repo"}, 409)
        return Reply.of_json(answer)

    def delete(self) -> Reply:
        repo_id, repo_type = self.named_in(self.json_body())
        self.open_repository(repo_id, repo_type)
        del self.server.repositories[repo_type, repo_id]
        return Reply.of_json({})

    def named_in(self, asked: dict[str, Any]) -> tuple[str, str]:
        return f"{asked.get('organization') or self.server.user}/{asked['name']}", asked.get("type") or "model"

    # ---- reading a repository ----

    def info(self, repository: Repository, revision: str = "") -> Reply:
        return Reply.of_json(repository.describe(revision or "main"))

    def tree(self, repository: Repository, revision: str, path: str) -> Reply:
        recursive = self.query.get("recursive", [""])[0].lower() in ("true", "1")
        return Reply.of_json(repository.folder(revision, path, recursive))

    def paths_info(self, repository: Repository, revision: str) -> Reply:
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = self.json_body()["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        return Reply.of_json(repository.paths(revision, paths))

    def commits(self, repository: Repository, revision: str) -> Reply:
        authors = [{"user": self.server.user}]
        return Reply.of_json(
            [
                {"id": sha, "title": commit.title, "message": "", "date": commit.date, "authors": authors}
                for sha, commit in repository.history(revision)
            ]
        )

    def resolve(self, repository: Repository, revision: str, path: str) -> Reply:
        sha = repository.sha(revision)
        file = repository.files(sha).get(path)
        if file is None:
            missing = Reply.of_error(HubError(404, "EntryNotFound", "Entry not found"))
            return Reply(404, missing.content, {**missing.headers, "X-Repo-Commit": sha})
        headers = {
            "Content-Type": "application/octet-stream",
            "X-Repo-Commit": sha,
            "ETag": f'"{file.content_id}"',
            "Accept-Ranges": "bytes",
        }
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")) and self.command == "GET":
            return self.part(file.content, int(asked[1]), int(asked[2] or len(file.content) - 1), headers)
        return Reply(200, file.content, headers)

    @staticmethod
    def part(content: bytes, first: int, last: int, headers: dict[str, str]) -> Reply:
        if first >= len(content):
            return Reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        last = min(last, len(content) - 1)
        headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return Reply(206, content[first : last + 1], headers)

    # ---- branches and tags ----

    def refs(self, repository: Repository) -> Reply:
        def describe(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]

        branches, tags = describe("heads", repository.branches), describe("tags", repository.tags)
        return Reply.of_json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def create_branch(self, repository: Repository, revision: str) -> Reply:
        start = self.json_body().get("startingPoint", "main")
        return self.name_commit(repository.branches, revision, repository.sha(start))

    def create_tag(self, repository: Repository, revision: str) -> Reply:
        return self.name_commit(repository.tags, self.json_body()["tag"], repository.sha(revision))

    @staticmethod
    def name_commit(names: dict[str, str], name: str, sha: str) -> Reply:
        if name in names:
            raise HubError(409, "Conflict", f"Reference already exists: {name}")
        names[name] = sha
        return Reply.of_json({})

    def delete_branch(self, repository: Repository, revision: str) -> Reply:
        return self.forget_name(repository.branches, revision)

    def delete_tag(self, repository: Repository, revision: str) -> Reply:
        return self.forget_name(repository.tags, revision)

    @staticmethod
    def forget_name(names: dict[str, str], name: str) -> Reply:
        if names.pop(name, None) is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return Reply.of_json({})

    # ---- writing a repository ----

    def preupload(self, repository: Repository, revision: str) -> Reply:
        """Which files go by LFS, and what is there already under their names."""
        there = repository.files(revision)
        answer = []
        for file in self.json_body()["files"]:
            path = file["path"]
            by_name = any(fnmatch(path.rpartition("/")[2], pattern) for pattern in LFS_PATTERNS)
            is_lfs = by_name or file["size"] > LFS_FROM_BYTES or b"\0" in base64.b64decode(file["sample"])
            old = there[path].content_id if path in there else None
            mode = "lfs" if is_lfs else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": old})
        return Reply.of_json({"files": answer})

    def lfs_batch(self, repository: Repository) -> Reply:
        """Where to upload those objects that are not here."""
        objects = []
        for asked in self.json_body()["objects"]:
            described = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.lfs_objects:
                place = f"{self.server.endpoint}/lfs/{asked['oid']}"
                described["actions"] = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
            objects.append(described)
        kind = {"Content-Type": "application/vnd.git-lfs+json"}
        return Reply.of_json({"transfer": "basic", "objects": objects}, headers=kind)

    def lfs_upload(self, sha256: str) -> Reply:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, "BadRequest", "The content has another SHA-256")
        self.server.lfs_objects[sha256] = self.body
        return Reply.of_json({})

    def lfs_verify(self, sha256: str) -> Reply:
        if len(self.lfs_object(sha256)) != self.json_body()["size"]:
            raise HubError(400, "BadRequest", "The content has another size")
        return Reply.of_json({})

    def lfs_object(self, sha256: str) -> bytes:
        if sha256 not in self.server.lfs_objects:
            raise HubError(404, "EntryNotFound", f"No LFS object {sha256}")
        return self.server.lfs_objects[sha256]

    def commit(self, repository: Repository, revision: str) -> Reply:
        if revision not in repository.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, title = dict(repository.files(revision)), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                title = entry["value"]["summary"]
                head = repository.sha(revision)
                if entry["value"].get("parentCommit", head) != head:
                    raise HubError(412, "PreconditionFailed", "A commit has happened since")
            else:
                self.apply(entry["key"], entry["value"], files)
        sha = repository.commit(revision, title, files)
        url = f"{self.url(repository)}/commit/{sha}"
        return Reply.of_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def apply(self, operation: str, value: dict[str, Any], files: dict[str, StoredFile]) -> None:
        """Do one operation of a commit to the files."""
        path = value["path"]
        if operation == "file":
            files[path] = StoredFile(base64.b64decode(value["content"]), is_lfs=False)
        elif operation == "lfsFile":
            files[path] = StoredFile(self.lfs_object(value["oid"]), is_lfs=True)
        elif operation == "deletedFile":
            files.pop(path, None)
        elif operation == "deletedFolder":
            for inside in [other for other in files if other.startswith(f"{path.rstrip('/')}/")]:
                del files[inside]
        else:
            raise HubError(400, "BadRequest", f"Unknown operation: {operation}")

    ROUTES: ClassVar[list[Route]] = [
        Route("GET", "/api/whoami-v2", whoami, needs_token=True),
        Route("POST", "/api/validate-yaml", validate_yaml),
        Route("POST", "/api/repos/create", create, needs_token=True),
        Route("DELETE", "/api/repos/delete", delete, needs_token=True),
        Route("GET", API, info),
        Route("GET", f"{API}/revision/{REVISION}", info),
        Route("GET", f"{API}/refs", refs),
        Route("GET", f"{API}/commits/{REVISION}", commits),
        Route("GET", f"{API}/tree/{REVISION}(?:/(?P<path>.+))?", tree),
        Route("POST", f"{API}/paths-info/{REVISION}", paths_info),
        Route("GET HEAD", f"{WEB}/resolve/{REVISION}/(?P<path>.+)", resolve),
        Route("POST", f"{API}/branch/{REVISION}", create_branch, needs_token=True),
        Route("DELETE", f"{API}/branch/{REVISION}", delete_branch, needs_token=True),
        Route("POST", f"{API}/tag/{REVISION}", create_tag, needs_token=True),
        Route("DELETE", f"{API}/tag/{REVISION}", delete_tag, needs_token=True),
        Route("POST", f"{API}/preupload/{REVISION}", preupload, needs_token=True),
        Route("POST", rf"{WEB}\.git/info/lfs/objects/batch", lfs_batch, needs_token=True),
        Route("PUT", f"/lfs/{SHA256}", lfs_upload),  # where it is was told to those alone who have the token
        Route("POST", f"/lfs/{SHA256}/verify", lfs_verify),
        Route("POST", f"{API}/commit/{REVISION}", commit, needs_token=True),
    ]
