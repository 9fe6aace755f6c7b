"""A Hub of models on a loopback port: what huggingface_hub asks for when it uploads and downloads.

Repositories have branches of commits, large files are in a store of their own and reach a commit only if
they were put there before; requests can be made to fail.
"""

import base64
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_secretSecretSecret1234567890"
LARGE = (".safetensors", ".png")  # what the server keeps in its store of large files


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: Any = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # id → path → contents
    history: dict[str, list[str]] = field(default_factory=dict)  # branch → ids, newest first
    titles: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], title: str) -> str:
        number = hashlib.sha1(f"{branch} {title} {len(self.commits)}".encode()).hexdigest()
        self.commits[number], self.titles[number] = files, title
        self.history.setdefault(branch, []).insert(0, number)
        return number

    def resolve(self, revision: str) -> str | None:
        if revision in self.history:
            return self.history[revision][0]
        return revision if revision in self.commits else None

    def files(self, revision: str) -> dict[str, bytes]:
        number = self.resolve(revision)
        assert number, f"no revision {revision}"
        return self.commits[number]


@dataclass
class Failure:
    """What happens in place of the real answer, `times` times.

    Status 0 drops the connection amid the body; a negative one is a signal to this process, and then that.
    """

    method: str
    path: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"


class HubServer:
    """The state of the Hub, which tests set up and look at."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[tuple[str, str]] = []
        self.role = "write"
        self.endpoint = ""
        self.lock = Lock()

    def add(self, name: str, **options: Any) -> Repo:
        repo = self.repos[name] = Repo(**options)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return repo

    def fail(self, method: str, path: str, status: int, times: int = 1, **options: Any) -> None:
        self.failures.append(Failure(method, path, status, times, **options))

    def asked(self, method: str, path: str) -> int:
        """How often something was asked for."""
        return sum(m == method and bool(re.search(path, p)) for m, p in self.requests)

    def failure(self, method: str, path: str) -> Failure | None:
        with self.lock:
            self.requests.append((method, path))
            for failure in self.failures:
                if failure.times and failure.method == method and re.search(failure.path, path):
                    failure.times -= 1
                    return failure
        return None


@contextmanager
def serve() -> Iterator[HubServer]:
    """A running Hub with nothing on it."""
    hub = HubServer()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet, or the client's delayed acknowledgement costs 40 ms
    state: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def read_body(self, share: float = 1.0) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if share < 1:
                    break
            else:
                self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(int(self.headers.get("Content-Length") or 0) * share))

    def answer(self) -> None:
        url = urlparse(self.path)
        path = unquote(url.path)
        failure = self.state.failure(self.command, path)
        if failure and failure.status <= 0:
            self.read_body(0.5)
            if failure.status < 0:
                os.kill(os.getpid(), -failure.status)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self.read_body()
        if failure:
            self.reply(failure.status, failure.body, **failure.headers)
            return
        given = self.headers.get("Authorization")
        self.owner = given == f"Bearer {TOKEN}"
        if given and not self.owner:
            self.reply(401, {"error": "Invalid username or password."})
        elif self.command in ("POST", "PUT") and not self.owner and not path.startswith("/lfs/"):
            self.reply(401, {"error": "Unauthorized"})
        else:
            with self.state.lock:
                self.route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def route(self, path: str, body: bytes) -> None:
        if path == "/api/whoami-v2":
            token = {"role": self.state.role, "displayName": "test"}
            self.reply(200, {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": token}})
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path.startswith("/lfs/"):
            content = path.removeprefix("/lfs/")
            assert sha256(body) == content, "the body is not what was announced"
            self.state.store[content] = body
            self.reply(200)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)(?:/(.+))?)?", path):
            self.model(found[1], found[2] or "", found[3] or "main", body)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(found[1], found[2], found[3])
        else:
            self.reply(404, {"error": f"no such address: {path}"})

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = {"url": f"{self.state.endpoint}/{name}"}
        if name in self.state.repos:
            self.reply(409, {**url, "error": "You already created this model repo"})
            return
        self.state.add(name, private=wanted.get("visibility") == "private")
        self.reply(200, {**url, "name": name})

    def batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for entry in wanted["objects"]:
            href = f"{self.state.endpoint}/lfs/{entry['oid']}?signature=signedSecret"
            known = entry["oid"] in self.state.store
            objects.append(entry if known else {**entry, "actions": {"upload": {"href": href}}})
        self.reply(200, {"transfer": "basic", "objects": objects})

    def model(self, name: str, what: str, rest: str, body: bytes) -> None:
        repo = self.state.repos.get(name)
        if repo is None or (repo.private and not self.owner):
            self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        if what == "settings":
            repo.gated = json.loads(body)["gated"]
            self.reply(200, {})
        elif what == "branch":
            self.branch(repo, rest, json.loads(body or b"{}").get("startingPoint", "main"))
        elif what == "refs":
            refs = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commits[0]}
                for branch, commits in repo.history.items()
            ]
            self.reply(200, {"branches": refs, "tags": [], "converts": []})
        elif what == "tree" and "/" in rest:  # no repository here has folders
            self.reply(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
        elif repo.resolve(rest) is None:
            self.reply(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        elif what == "commits":
            listed = [
                {
                    "id": number,
                    "title": repo.titles[number],
                    "message": "",
                    "date": "2026-01-01T00:00:00.000Z",
                    "authors": [],
                }
                for number in repo.history[rest]
            ]
            self.reply(200, listed)
        elif what == "tree":
            self.reply(200, [self.entry(path, content) for path, content in repo.files(rest).items()])
        elif what == "preupload":
            self.preupload(repo.files(rest), json.loads(body)["files"])
        elif what == "commit":
            self.commit(name, rest, body)
        else:
            siblings = [{"rfilename": path} for path in repo.files(rest)]
            facts = {"id": name, "private": repo.private, "gated": repo.gated, "sha": repo.resolve(rest)}
            self.reply(200, {"_id": "1", **facts, "siblings": siblings, "tags": []})

    def branch(self, repo: Repo, name: str, start: str) -> None:
        if name in repo.history:
            self.reply(409, {"error": f"Reference already exists: {name}"})
            return
        commit = repo.resolve(start)
        assert commit
        repo.history[name] = [commit]
        self.reply(200, {})

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        return entry

    def preupload(self, there: dict[str, bytes], files: list[dict[str, Any]]) -> None:
        answers = []
        for file in files:
            path = file["path"]
            large = path.endswith(LARGE)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in there:
                answer["oid"] = (sha256 if large else git_hash)(there[path])
            answers.append(answer)
        self.reply(200, {"files": answers})

    def commit(self, name: str, branch: str, body: bytes) -> None:
        repo = self.state.repos[name]
        files, title = dict(repo.files(branch)), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.state.store:
                    self.reply(400, {"error": f"{value['path']}: its contents were never uploaded"})
                    return
                files[value["path"]] = self.state.store[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        number = repo.commit(branch, files, title)
        self.reply(200, {"commitOid": number, "commitUrl": f"{self.state.endpoint}/{name}/commit/{number}"})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.state.repos.get(name)
        if repo is None or (repo.private and not self.owner):
            self.reply(404, b"", X_Error_Code="RepoNotFound")
        elif repo.gated and not self.owner:
            self.reply(401, b"", X_Error_Code="GatedRepo", X_Error_Message="Access to it is restricted")
        elif repo.resolve(revision) is None:
            self.reply(404, b"", X_Error_Code="RevisionNotFound")
        elif path not in repo.files(revision):
            self.reply(404, b"", X_Error_Code="EntryNotFound")
        else:
            content = repo.files(revision)[path]
            digest = (sha256 if path.endswith(LARGE) else git_hash)(content)
            self.reply(200, content, ETag=f'"{digest}"', X_Repo_Commit=repo.resolve(revision) or "")
