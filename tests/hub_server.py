"""
A small Hugging Face Hub on 127.0.0.1 that the real `huggingface_hub` client talks to, for tests of publishing.

Commits are kept as directories, `{directory}/{repo_id}/{commit}/`. A client process finds the server by the variables
of `HubServer.environment`, which must be set before `huggingface_hub` is imported. They turn Xet off: files travel by
plain HTTP.

    POST /api/repos/create                                      new repository, private or not
    POST /api/validate-yaml                                     metadata of a card must be YAML
    GET  /api/models/{repo}[/revision/{revision}]               commit, files, private flag
    GET  /api/models/{repo}/tree/{revision}[/{path}]            files with sizes and ids
    POST /api/models/{repo}/branch/{branch}                     new branch
    POST /api/models/{repo}/preupload/{revision}                which files go as LFS objects
    POST /{repo}.git/info/lfs/objects/batch                     where LFS objects go
    PUT  /lfs/{oid}  and  POST /lfs/{oid}/verify                one LFS object
    POST /api/models/{repo}/commit/{revision}[?create_pr=1]     additions and deletions, as lines of JSON
    HEAD, GET /{repo}/resolve/{revision}/{path}                 one file
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml


REPO, REVISION = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = [  # method, path, endpoint: a method of the handler
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", f"/api/models/{REPO}(?:/revision/{REVISION})?", "info"),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}(?:/(?P<path>.+))?", "tree"),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)", "branch"),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", "preupload"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "upload"),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", "verify"),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", "commit"),
    ("HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
]
LFS_SUFFIXES = (".safetensors", ".bin", ".png")


class HubError(Exception):
    """An answer in the Hub's form: status, `X-Error-Code` (or none), `X-Error-Message`."""


class HubServer(ThreadingHTTPServer):
    """
    Args:
        directory (`Path`): where repositories are kept.
        users (`dict[str, str]`): token -> user, who may write to their own namespace and open pull requests elsewhere.

    Attributes:
        url (`str`): the endpoint.
        requests (`list[tuple[str, dict]]`): endpoint, or `"unknown"`, and its arguments, in the order of arrival. The
            arguments of `create` and `commit` hold what was sent.
        failures (`dict[str, list[int]]`): endpoint -> statuses to answer its next requests with, doing nothing.
        private (`dict[str, bool]`): repository -> whether it is private.
        branches (`dict[str, dict[str, str]]`): repository -> branch or pull request -> commit.
    """

    daemon_threads = True

    def __init__(self, directory: Path, users: dict[str, str]):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.directory, self.users = Path(directory), users
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests, self.failures, self.private, self.branches = [], {}, {}, {}
        self.objects: dict[str, bytes] = {}  # LFS
        self.lock = threading.RLock()

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables of a client process; its caches and its settings lie in `home`."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return variables | ({"HF_TOKEN": token} if token else {})

    def create(self, repo_id: str, private: bool = False) -> None:
        self.private[repo_id], self.branches[repo_id] = private, {}
        self.commit(repo_id, "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})

    def commit(self, repo_id: str, branch: str, add: dict[str, bytes], delete=()) -> str:
        """Stores a commit on top of what `branch` was; returns its hash."""
        with self.lock:
            parent = self.branches[repo_id].get(branch)
            commit = hashlib.sha1(f"{repo_id} {branch} {parent} {sorted(add)} {delete}".encode()).hexdigest()
            folder = self.directory / repo_id / commit
            if parent is None:
                folder.mkdir(parents=True)
            else:
                shutil.copytree(self.directory / repo_id / parent, folder)
            for name in delete:
                (folder / name).unlink()
            for name, content in add.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            self.branches[repo_id][branch] = commit
            return commit

    def find(self, repo_id: str, revision: str | None = None) -> str:
        """The commit that a branch, a pull request or a (full) hash stands for."""
        if repo_id not in self.branches:
            raise HubError(404, "RepoNotFound", "Repository not found")
        commit = self.branches[repo_id].get(revision or "main", revision)
        if not (self.directory / repo_id / commit).is_dir():
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def files(self, repo_id: str, revision: str | None = None) -> dict[str, Path]:
        """Name in the repository -> path on this machine, in the order of names."""
        folder = self.directory / repo_id / self.find(repo_id, revision)
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # the client keeps its connections
    server: HubServer

    def handle_any(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        try:
            for method, pattern, endpoint in ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    arguments = {name: value and unquote(value) for name, value in match.groupdict().items()}
                    self.server.requests.append((endpoint, arguments))
                    if self.server.failures.get(endpoint):
                        raise HubError(self.server.failures[endpoint].pop(0), None, "refused by the test")
                    return getattr(self, endpoint)(arguments, **arguments)
            self.server.requests.append(("unknown", {"method": self.command, "path": self.path}))
            raise HubError(404, None, f"unknown path {path}")
        except HubError as error:
            status, code, message = error.args
            headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
            self.answer({"error": message}, status, **headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *args) -> None:
        """Requests are kept in `HubServer.requests`, not printed."""

    def answer(self, body: dict | list | bytes, status: int = 200, **headers) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ---- Who may do what ----

    def user(self) -> str | None:
        if "Authorization" not in self.headers:
            return None
        token = self.headers["Authorization"].removeprefix("Bearer ")
        if token not in self.server.users:
            raise HubError(401, None, "Invalid username or password.")
        return self.server.users[token]

    def require_user(self, owner: str | None = None) -> str:
        user = self.user()
        if user is None:
            raise HubError(401, None, "Invalid username or password.")
        if owner is not None and user != owner:
            raise HubError(403, None, f"You don't have the rights to write to the namespace {owner}")
        return user

    def find(self, repo_id: str, revision: str | None = None) -> str:
        commit = self.server.find(repo_id, revision)
        if self.server.private[repo_id] and self.user() != repo_id.split("/")[0]:
            raise HubError(404, "RepoNotFound", "Repository not found")  # its existence is private, too
        return commit

    # ---- Endpoints ----

    def create(self, log) -> None:
        sent = json.loads(self.body)
        log |= sent
        owner = self.require_user(sent["organization"])
        repo_id = f"{owner}/{sent['name']}"
        exists = repo_id in self.server.branches
        if not exists:
            self.server.create(repo_id, private=sent.get("visibility") == "private")
        self.answer({"url": f"{self.server.url}/{repo_id}"}, 409 if exists else 200)

    def validate(self, log) -> None:
        content = json.loads(self.body)["content"]
        problem = [] if read_metadata(content) else [{"message": "the metadata is no YAML mapping, or missing"}]
        broken = problem if content.startswith("---") else []
        self.answer({"errors": broken, "warnings": [] if broken else problem}, 400 if broken else 200)

    def info(self, log, repo_id, revision) -> None:
        commit = self.find(repo_id, revision)
        files = self.server.files(repo_id, commit)
        answer = {"id": repo_id, "sha": commit, "private": self.server.private[repo_id]}
        answer["siblings"] = [{"rfilename": name} for name in files]
        if "README.md" in files:
            answer["cardData"] = read_metadata(files["README.md"].read_text(encoding="utf-8"))
        self.answer(answer)

    def tree(self, log, repo_id, revision, path) -> None:
        prefix = f"{path}/" if path else ""
        files = self.server.files(repo_id, self.find(repo_id, revision)).items()
        entries = [describe(name, file.read_bytes()) for name, file in files if name.startswith(prefix)]
        if path and not entries:
            raise HubError(404, "EntryNotFound", f"{path} does not exist")
        self.answer(entries)

    def branch(self, log, repo_id, branch) -> None:
        self.require_user(repo_id.split("/")[0])
        branches = self.server.branches[repo_id]
        status = 409 if branch in branches else 200
        branches.setdefault(branch, self.find(repo_id, json.loads(self.body).get("startingPoint")))
        self.answer({}, status)

    def preupload(self, log, repo_id, revision) -> None:
        present = self.server.files(repo_id, self.find(repo_id, revision))
        answers = []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            answer = {"path": name, "shouldIgnore": False, "uploadMode": "lfs" if is_lfs(name) else "regular"}
            if name in present:
                entry = describe(name, present[name].read_bytes())
                answer["oid"] = entry.get("lfs", entry)["oid"]
            answers.append(answer)
        self.answer({"files": answers})

    def batch(self, log, repo_id) -> None:
        self.require_user()
        objects = [{"oid": sent["oid"], "size": sent["size"]} for sent in json.loads(self.body)["objects"]]
        for item in objects:
            href = f"{self.server.url}/lfs/{item['oid']}"
            if item["oid"] not in self.server.objects:
                item["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, log, oid) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, None, "the content has another hash")
        self.server.objects[oid] = self.body
        self.answer({})

    def verify(self, log, oid) -> None:
        sent = json.loads(self.body)
        if len(self.server.objects.get(oid, b"")) != sent["size"]:
            raise HubError(404, None, "no such object")
        self.answer({})

    def commit(self, log, repo_id, revision) -> None:
        pull_request = "create_pr=1" in urlsplit(self.path).query
        self.require_user(None if pull_request else repo_id.split("/")[0])
        parent = self.find(repo_id, revision)
        add, delete = {}, []
        for line in self.body.splitlines():
            key, value = json.loads(line).values()
            if key == "header":
                log |= value
            elif key == "file":
                add[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                add[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                delete.append(value["path"])
        log |= {"add": sorted(add), "delete": delete}
        if pull_request:
            branches = self.server.branches[repo_id]
            number = 1 + sum(name.startswith("refs/pr/") for name in branches)
            revision = f"refs/pr/{number}"
            branches[revision] = parent
        commit = self.server.commit(repo_id, revision, add, delete)
        url = f"{self.server.url}/{repo_id}"
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{url}/commit/{commit}"}
        self.answer(answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if pull_request else {}))

    def resolve(self, log, repo_id, revision, path) -> None:
        commit = self.find(repo_id, revision)
        files = self.server.files(repo_id, commit)
        if path not in files:
            raise HubError(404, "EntryNotFound", f"{path} does not exist")
        content = files[path].read_bytes()
        entry = describe(path, content)
        etag = entry.get("lfs", entry)["oid"]
        self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=commit)


def read_metadata(card: str) -> dict | None:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
    return metadata if isinstance(metadata, dict) else None


def is_lfs(name: str) -> bool:
    return name.endswith(LFS_SUFFIXES)


def describe(name: str, content: bytes) -> dict:
    """A file as the Hub lists it. The id of a regular file is that of git, that of an LFS object is its SHA-256."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": name, "size": len(content), "oid": oid}
    if is_lfs(name):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return entry
