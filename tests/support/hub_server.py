"""A stand-in for the Hugging Face Hub that keeps its repositories in memory.

It answers the requests that `huggingface_hub` makes to create a model repository, commit to it and
download from it, with the status codes and headers of the Hub (https://huggingface.co/docs/hub/api;
large files by the Git LFS batch protocol). What it does not know is answered with 501 and kept in
`unserved`, so that a test does not pass on a request the Hub would have answered otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

SIGNATURE = "lets-whoever-has-it-write"
"""In the addresses of large files."""
_LARGE = (".safetensors", ".bin", ".model", ".onnx", ".gguf", ".pt", ".npz")
_LARGE_BYTES = 10_000_000
_LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "other", "unknown")
_RELATIONS = ("adapter", "finetune", "merge", "quantized")
_ATTRIBUTES = {
    ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"  # as every new repo
}


@dataclass
class Commit:
    """A state of a repository."""

    oid: str
    message: str
    files: dict[str, bytes]
    large: frozenset[str]
    """Paths kept by LFS."""


@dataclass
class Repository:
    """A model repository."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})
    """Commits of each branch and pull request, newest last."""
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def commits(self) -> list[Commit]:
        """Those of main."""
        return self.branches["main"]

    def add(
        self, message: str, files: dict[str, bytes], large: frozenset[str], branch: str = "main"
    ) -> Commit:
        """Append a commit; returns it."""
        commits = self.branches[branch]
        parent = commits[-1].oid if commits else ""
        digest = hashlib.sha1(f"{parent}\n{branch}\n{len(commits)}\n{message}".encode())
        for name in sorted(files):
            digest.update(name.encode() + hashlib.sha1(files[name]).digest())
        commits.append(Commit(digest.hexdigest(), message, files, large))
        return commits[-1]

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or an id names."""
        if revision in self.branches:
            return self.branches[revision][-1]
        oid = self.tags.get(revision, revision)
        known = (commit for commits in self.branches.values() for commit in commits)
        return next((commit for commit in known if commit.oid == oid), None)


@dataclass
class Fault:
    """What goes wrong with some requests."""

    method: str
    path: str
    """A pattern that the path fits."""
    status: int = 0
    """Of the answer; 0: the connection is cut."""
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body_bytes: int = 0
    """Of the request's body that are taken before the connection is cut."""
    is_done: bool = False
    """Whether what was asked is done all the same, so that only the answer is lost."""
    action: Callable[[], object] | None = None
    """What happens meanwhile."""


class Hub:
    """The stand-in, served from a thread on a free port of this machine."""

    def __init__(self, token: str):
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        """LFS objects by SHA-256."""
        self.requests: list[tuple[str, str]] = []
        """(method, path) of every request."""
        self.unserved: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        """What goes wrong, each as often as it says."""
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is to be set to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault of a request, used up once more."""
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def put(self, repo_id: str, folder: Path) -> str:
        """Commit a folder's files to a public repository, as others would have; returns the id."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        large = frozenset(name for name in files if _is_large(name, files[name], len(files[name])))
        repository = self.repositories.setdefault(repo_id, Repository(private=False))
        return repository.add("Add model", _ATTRIBUTES | files, large).oid

    def revisions(self, repo_id: str) -> list[str]:
        """Revisions at which files of a repository were asked for since the log was cleared, in
        order; one that follows another one twice is there twice.
        """
        pattern = re.compile(rf"/{re.escape(repo_id)}/resolve/([^/]+)/")
        found = (pattern.match(path) for _, path in self.requests)
        return [revision for revision, _ in groupby(match[1] for match in found if match)]


class _RefusedError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | dict[str, str] = ""):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Code": code} if isinstance(code, str) and code else code or {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.query = parse_qs(parts.query)
        hub = self.hub
        with hub.lock:
            fault = hub.take_fault(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and not fault.is_done and not fault.status:
            self.rfile.read(min(fault.body_bytes, length))
            self.cut(fault)
            return
        self.body = self.rfile.read(length)
        with hub.lock:
            hub.requests.append((self.command, path))
            if fault is not None and fault.action is not None and fault.status:
                fault.action()
            try:
                if fault is not None and fault.is_done:
                    self.wfile = io.BytesIO()
                elif fault is not None:
                    raise _RefusedError(fault.status, "the stand-in was asked to", fault.headers)
                for method, pattern, action in _ROUTES:
                    match = pattern.fullmatch(path)
                    if match and (method == self.command or (method, self.command) == _READS):
                        action(self, *(group for group in match.groups() if group))
                        return
                hub.unserved.append((self.command, self.path))
                raise _RefusedError(501, "the stand-in does not know this request")
            except _RefusedError as refusal:
                self.refuse(refusal)
            finally:
                if fault is not None and fault.is_done:
                    self.cut(fault)

    def cut(self, fault: Fault) -> None:
        """End the connection without an answer."""
        if fault.action is not None:
            fault.action()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815 - names of http.server

    # --- answers ------------------------------------------------------------------------------

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.answer(status, body, Content_Type="application/json; charset=utf-8", **headers)

    def refuse(self, refusal: _RefusedError) -> None:
        headers = {"X_Error_Message": refusal.message, "X_Request_Id": "Root=1-stand-in"}
        headers |= refusal.headers
        self.answer_json({"error": refusal.message}, refusal.status, **headers)

    def link(self, path: str) -> str:
        return f"{self.hub.endpoint}/{path}"

    def object_link(self, oid: str) -> str:
        """Large files lie on another host, under an address that needs no token."""
        return f"http://localhost:{self.server.server_address[1]}/objects/{oid}"  # type: ignore[index]

    # --- who may do what ----------------------------------------------------------------------

    def is_member(self) -> bool:
        """Whether the request carries the token; a wrong one is refused whatever is asked."""
        given = self.headers.get("Authorization")
        if given is None:
            return False
        if given != f"Bearer {self.hub.token}":
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return True

    def readable(self, repo_id: str) -> Repository:
        member = self.is_member()
        repository = self.hub.repositories.get(repo_id)
        if repository is not None and (member or not repository.private):
            return repository
        if member:
            raise _RefusedError(404, "Repository not found", "RepoNotFound")
        # The Hub does not tell strangers which private repositories exist.
        raise _RefusedError(401, "Invalid username or password.", "RepoNotFound")

    def writable(self, repo_id: str) -> Repository:
        repository = self.readable(repo_id)
        if not self.is_member():
            raise _RefusedError(401, "Invalid username or password.")
        return repository

    def commit_of(self, repo_id: str, revision: str) -> Commit:
        found = self.readable(repo_id).find(revision)
        if found is None:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def _refuse_token(self) -> None:
        if "Authorization" in self.headers:  # object storage takes signed addresses or this
            raise _RefusedError(400, "Only one auth mechanism allowed")

    # --- writing ------------------------------------------------------------------------------

    def validate_yaml(self) -> None:
        self.is_member()
        errors = card_errors(json.loads(self.body)["content"])
        if self.headers.get("Accept") == "text/plain":
            text = "\n".join(f"- Error: {message}" for message in errors).encode()
            self.answer(400 if errors else 200, text, Content_Type="text/plain")
        else:
            found = {"errors": [{"message": message} for message in errors], "warnings": []}
            self.answer_json(found, 400 if errors else 200)

    def create(self) -> None:
        if not self.is_member():
            raise _RefusedError(401, "Invalid username or password.")
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        url = self.link(repo_id)
        if repo_id in self.hub.repositories:
            message = "You already created this model repo"
            self.answer_json({"error": message, "url": url}, 409, X_Error_Message=message)
            return
        private = asked.get("visibility", "public") == "private"
        repository = self.hub.repositories[repo_id] = Repository(private)
        repository.add("initial commit", dict(_ATTRIBUTES), frozenset())
        self.answer_json({"url": url, "name": repo_id, "id": "0" * 24})

    def branch(self, repo_id: str, name: str) -> None:
        repository = self.writable(repo_id)
        if name in repository.branches:
            raise _RefusedError(409, "Reference already exists")
        repository.branches[name] = list(repository.commits)
        self.answer_json({})

    def tag(self, repo_id: str, revision: str) -> None:
        repository, name = self.writable(repo_id), json.loads(self.body)["tag"]
        if name in repository.tags:
            raise _RefusedError(409, "Tag already exists")
        repository.tags[name] = self.commit_of(repo_id, revision).oid
        self.answer_json({})

    def refs(self, repo_id: str) -> None:
        found = self.readable(repo_id)
        heads = {name: commits[-1].oid for name, commits in found.branches.items()}

        def rows(kind: str, named: dict[str, str]) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid}
                for name, oid in named.items()
            ]

        branches = {name: oid for name, oid in heads.items() if not name.startswith("refs/")}
        tags = rows("tags", found.tags)
        self.answer_json({"branches": rows("heads", branches), "tags": tags, "converts": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        repository = self.writable(repo_id)
        if repository.find(revision) is None:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head, answers = self.commit_of(repo_id, revision), []
        for file in json.loads(self.body)["files"]:
            name, known = file["path"], head.files.get(file["path"])
            large = _is_large(name, base64.b64decode(file["sample"]), file["size"])
            answer = {"path": name, "uploadMode": "lfs" if large else "regular"}
            answer["shouldIgnore"] = False
            if known is not None:
                answer["oid"] = hashlib.sha256(known).hexdigest() if large else blob_id(known)
            answers.append(answer)
        self.answer_json({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self.writable(repo_id)
        asked = json.loads(self.body)
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256":
            raise _RefusedError(422, "expected an upload by sha256")
        objects = []
        for item in asked["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                verify = {"href": self.link(f"{repo_id}.git/info/lfs/objects/verify")}
                signed = f"size={item['size']}&X-Amz-Signature={SIGNATURE}"
                upload = {"href": f"{self.object_link(item['oid'])}?{signed}"}
                entry |= {"authenticated": True, "actions": {"upload": upload, "verify": verify}}
            objects.append(entry)
        self.answer_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        self._refuse_token()
        found = hashlib.sha256(self.body).hexdigest()
        if found != oid or len(self.body) != int(self.query["size"][0]):
            raise _RefusedError(400, f"expected the object {oid}, found {found}")
        self.hub.objects[oid] = self.body
        self.answer(200, b"", ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

    def lfs_verify(self, repo_id: str) -> None:
        self.writable(repo_id)
        self._stored(json.loads(self.body))
        self.answer_json({"message": "ok"})

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self.writable(repo_id)
        if revision not in repository.branches:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        rows = [json.loads(line) for line in self.body.splitlines()]
        if not rows or rows[0]["key"] != "header":
            raise _RefusedError(400, "the first line has to be the header")
        head = repository.branches[revision][-1]
        if rows[0]["value"].get("parentCommit", head.oid) != head.oid:
            raise _RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files, large = dict(head.files), set(head.large)
        for row in rows[1:]:
            key, value = row["key"], row["value"]
            name = value["path"]
            large.discard(name)
            if key == "file":
                files[name] = base64.b64decode(value["content"], validate=True)
            elif key == "lfsFile":
                files[name] = self._stored(value)
                large.add(name)
            elif key == "deletedFile" and name in files:
                del files[name]
            else:
                raise _RefusedError(400, f"{key} {name}: A file with this name doesn't exist")
        errors = card_errors(files.get("README.md", b"").decode())
        if errors:
            raise _RefusedError(400, f"Invalid metadata in README.md: {errors[0]}")
        request = {}
        if "create_pr" in self.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.branches)
            repository.branches[f"refs/pr/{number}"] = list(repository.branches[revision])
            revision = f"refs/pr/{number}"
            request = {"pullRequestUrl": self.link(f"{repo_id}/discussions/{number}")}
        made = repository.add(rows[0]["value"]["summary"], files, frozenset(large), revision)
        url = self.link(f"{repo_id}/commit/{made.oid}")
        done = {"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""}
        self.answer_json(done | request)

    def _stored(self, pointer: dict[str, Any]) -> bytes:
        found = self.hub.objects.get(pointer["oid"])
        if found is None or len(found) != pointer["size"]:
            raise _RefusedError(400, f"LFS object {pointer['oid']} was not uploaded")
        return found

    # --- reading ------------------------------------------------------------------------------

    def info(self, repo_id: str, revision: str = "main") -> None:
        found = self.commit_of(repo_id, revision)
        private = self.hub.repositories[repo_id].private
        siblings = [self._sibling(found, name) for name in sorted(found.files)]
        value = {"id": repo_id, "modelId": repo_id, "sha": found.oid, "private": private}
        self.answer_json({**value, "siblings": siblings, "tags": [], "disabled": False})

    def _sibling(self, commit: Commit, name: str) -> dict[str, Any]:
        """A file of a commit as its info lists it, with `blobs` in the query by its digests."""
        row: dict[str, Any] = {"rfilename": name}
        if "blobs" in self.query:
            data = commit.files[name]
            row |= {"size": len(data), "blobId": blob_id(data)}
            if name in commit.large:
                pointer = _pointer(data)
                sizes = {"size": len(data), "pointerSize": len(pointer)}
                row["blobId"] = blob_id(pointer)
                row["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), **sizes}
        return row

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        found = self.commit_of(repo_id, revision)
        files = {k: v for k, v in found.files.items() if k.startswith(folder)}
        if not files:
            raise _RefusedError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        rows = []
        for name, data in sorted(files.items()):
            row = {"type": "file", "path": name, "size": len(data), "oid": blob_id(data)}
            if name in found.large:
                pointer = _pointer(data)
                sizes = {"size": len(data), "pointerSize": len(pointer)}
                row["oid"] = blob_id(pointer)
                row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), **sizes}
            rows.append(row)
        self.answer_json(rows)

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        found = self.commit_of(repo_id, revision)
        headers = {"X_Repo_Commit": found.oid, "Accept_Ranges": "bytes"}
        data = found.files.get(name)
        if data is None:
            headers |= {"X_Error_Code": "EntryNotFound", "X_Error_Message": "Entry not found"}
            self.answer(404, b"Entry not found", **headers)
        elif name in found.large:
            oid = hashlib.sha256(data).hexdigest()
            self.hub.objects[oid] = data
            headers |= {"X_Linked_Size": str(len(data)), "X_Linked_ETag": f'"{oid}"'}
            self.answer(302, b"", Location=self.object_link(oid), **headers)
        else:
            self.answer(200, data, ETag=f'"{blob_id(data)}"', **headers)

    def lfs_get(self, oid: str) -> None:
        self._refuse_token()
        self.answer(200, self.hub.objects[oid], ETag=f'"{oid}"')


_READS = ("GET", "HEAD")
_ID = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (method, re.compile(pattern), action)
    for method, pattern, action in (
        ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
        ("POST", r"/api/repos/create", _Handler.create),
        ("POST", rf"/api/models/{_ID}/branch/(.+)", _Handler.branch),
        ("POST", rf"/api/models/{_ID}/tag/(.+)", _Handler.tag),
        ("GET", rf"/api/models/{_ID}/refs", _Handler.refs),
        ("POST", rf"/api/models/{_ID}/preupload/([^/]+)", _Handler.preupload),
        ("POST", rf"/api/models/{_ID}/commit/([^/]+)", _Handler.commit),
        ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
        ("POST", rf"/{_ID}\.git/info/lfs/objects/verify", _Handler.lfs_verify),
        ("PUT", r"/objects/([0-9a-f]{64})", _Handler.lfs_put),
        ("GET", r"/objects/([0-9a-f]{64})", _Handler.lfs_get),
        ("GET", rf"/api/models/{_ID}", _Handler.info),
        ("GET", rf"/api/models/{_ID}/revision/([^/]+)", _Handler.info),
        ("GET", rf"/api/models/{_ID}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
        ("GET", rf"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
    )
]


def card_errors(content: str) -> list[str]:
    """What the Hub would not accept of a card's metadata, as far as this toolkit writes it."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return []
    try:
        values = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAMLException: {error}"]
    if not isinstance(values, dict):
        return ["metadata must be a mapping"]
    errors = []
    if values.get("license", "other") not in _LICENSES:
        errors.append(f'"license" must be one of [{", ".join(_LICENSES)}]')
    if values.get("base_model_relation", "finetune") not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(_RELATIONS)}]')
    base = values.get("base_model")
    if base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
        errors.append(f'"base_model" with value "{base}" is not a model id from the Hub')
    for code in values.get("language") or []:
        if not re.fullmatch(r"[a-z]{2,3}", str(code)):
            errors.append('"language" must only contain lowercase ISO 639-1, 639-2 or 639-3 codes')
    for index, model in enumerate(values.get("model-index") or []):
        where = f'"model-index[{index}]'
        if not isinstance(model.get("name"), str):
            errors.append(f'{where}.name" is required')
        for number, result in enumerate(model.get("results", [])):
            for path in ("task.type", "dataset.type", "dataset.name"):
                section, key = path.split(".")
                if not isinstance(result.get(section, {}).get(key), str):
                    errors.append(f'{where}.results[{number}].{path}" is required')
            for metric in result.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                    errors.append(f'{where}.results[{number}].metrics" need a type and a value')
    return errors


def blob_id(data: bytes) -> str:
    """The id that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _pointer(data: bytes) -> bytes:
    oid = hashlib.sha256(data).hexdigest()
    lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{oid}", f"size {len(data)}")
    return ("\n".join(lines) + "\n").encode()


def _is_large(name: str, sample: bytes, size: int) -> bool:
    return name.endswith(_LARGE) or size > _LARGE_BYTES or b"\0" in sample[:512]
