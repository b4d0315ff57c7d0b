"""A small local server for the parts of the Hub API that pushing to and pulling from a model repository uses."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml


class Repository:
    """Commits as maps from path to content, oldest first; a commit is whole or it is not there."""

    def __init__(self):
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.commit({})

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class HubServer(ThreadingHTTPServer):
    """
    Attributes:
        requests (`list[tuple[str, str]]`): the method and path of every request, in order.
        stall (`threading.Event`): while set, an upload to LFS is left half received.
        stalled (`threading.Event`): set by the server when an upload has stalled.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.stall, self.stalled = threading.Event(), threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, content: object, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def dispatch(self) -> None:
        path, _, query = self.path.partition("?")
        path = unquote(path)
        self.server.requests.append((self.command, path))
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, *match.groups())
        self.reply({"error": f"no such route: {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def repository(self, name: str, revision: str = "main") -> tuple[Repository, str, dict[str, bytes]] | None:
        """The repository and its files at a revision; `None` when the error has been sent."""
        repository = self.server.repositories.get(name)
        if repository is None:
            self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return None
        commit = repository.at(revision)
        if commit is None:
            self.reply({"error": f"Invalid rev id: {revision}"}, 404, X_Error_Code="RevisionNotFound")
            return None
        return repository, *commit

    def whoami(self) -> None:
        self.reply({"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self) -> None:
        metadata = yaml.safe_load(json.loads(self.body())["content"].split("---")[1])
        valid = isinstance(metadata, dict) and isinstance(metadata.get("tags", []), list)
        self.reply(
            {"warnings": [], "errors": [] if valid else [{"message": "invalid metadata"}]}, 200 if valid else 400
        )

    def create(self) -> None:
        request = json.loads(self.body())
        name = f"{request.get('organization') or 'user'}/{request['name']}"
        exists = name in self.server.repositories
        self.server.repositories.setdefault(name, Repository())
        url = f"{self.server.endpoint}/{name}"
        self.reply({"url": url, "id": name, "name": name}, 409 if exists else 200)

    def preupload(self, name: str, revision: str) -> None:
        files = json.loads(self.body())["files"]
        self.reply(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
            }
        )

    def lfs_batch(self, name: str) -> None:
        objects = json.loads(self.body())["objects"]
        for item in objects:
            if item["oid"] not in self.server.objects:
                item["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{item['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if self.server.stall.is_set():
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.server.stalled.set()
            self.close_connection = True
            self.rfile.read()
            return
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            self.reply({"error": "checksum"}, 400)
            return
        self.server.objects[oid] = content
        self.reply({})

    def commit(self, name: str, revision: str) -> None:
        found = self.repository(name, revision)
        lines = [json.loads(line) for line in self.body().splitlines()]
        if found is None:
            return
        repository, _, files = found
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files)
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{self.server.endpoint}/{name}/commit/{sha}"})

    def info(self, name: str, revision: str | None) -> None:
        found = self.repository(name, revision or "main")
        if found is not None:
            _, sha, files = found
            siblings = [{"rfilename": path} for path in sorted(files)]
            self.reply({"id": name, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def tree(self, name: str, revision: str, folder: str | None) -> None:
        found = self.repository(name, revision)
        if found is not None:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in sorted(found[2].items())
                if path.startswith(folder or "")
            ]
            self.reply(entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.repository(name, revision)
        if found is None:
            return
        _, sha, files = found
        if path not in files:
            self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        content = files[path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.reply(content, X_Repo_Commit=sha, ETag=etag, Content_Type="application/octet-stream")


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", f"/api/models/{REPO}/preupload/(.+)", _Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/(.+)", _Handler.commit),
    ("GET", f"/api/models/{REPO}(?:/revision/(.+))?", _Handler.info),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)(?:/(.*))?", _Handler.tree),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(.+)", _Handler.lfs_upload),
    ("GET HEAD", f"/{REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
