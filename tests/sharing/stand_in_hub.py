"""The part of the Hub's HTTP API that pushing and pulling need, on 127.0.0.1: git and LFS in dictionaries."""

import base64
import contextlib
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml
from huggingface_hub import constants

LFS = (".safetensors", ".png")


class StandInHub:
    """Repositories by name. A repository: `private`, and `commits`, a dict commit -> {path: bytes}, oldest first.

    requests: (method, path, body) of all that was asked. refused: (status, message) to answer everything with.
    """

    def __init__(self):
        self.repos, self.blobs, self.requests, self.refused = {}, {}, [], None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            thread.join()
            self.server.server_close()

    def create(self, name, private=False, **files):
        self.repos[name] = {"private": private, "commits": {}}
        self.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n", **files})

    def commit(self, name, files):
        commits = self.repos[name]["commits"]
        sha = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits[sha] = files
        return sha

    def files(self, name, revision="main"):
        """(commit, files) of a branch or a commit; None where there is none such."""
        commits = self.repos[name]["commits"]
        sha = list(commits)[-1] if revision == "main" else revision
        return (sha, commits[sha]) if sha in commits else None


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub

    def log_message(self, *_):
        pass

    def answer(self, status, document=None, content=None, **headers):
        body = json.dumps(document).encode() if content is None else content
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, body))
        if self.hub.refused is not None:
            status, message = self.hub.refused
            return self.answer(status, {"error": message})
        parts = path.strip("/").split("/")
        if parts[0] == "lfs":
            self.hub.blobs[parts[1]] = body
            return self.answer(200, {})
        if parts[:2] == ["api", "validate-yaml"]:
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self.answer(200, {"errors": [], "warnings": []})
        if parts[:3] == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        repo = f"{owner}/{name.removesuffix('.git')}"
        if repo not in self.hub.repos:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return (self.api if api else self.file)(repo, rest, body)

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        document = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            return self.answer(409, document | {"error": "You already created this model repo"})
        self.hub.create(name, asked.get("visibility") == "private" or asked.get("private", False))
        return self.answer(200, document)

    def api(self, repo, rest, body):
        action, revision = rest if rest else ("revision", "main")
        found = self.hub.files(repo, revision)
        if found is None:
            return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        sha, files = found
        if action == "revision":
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            facts = {"id": repo, "sha": sha, "private": self.hub.repos[repo]["private"], "siblings": siblings}
            return self.answer(200, facts)
        if action == "tree":
            return self.answer(200, [entry(path, content) for path, content in files.items()])
        if action == "preupload":
            asked = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False} for file in asked]
            return self.answer(200, {"files": modes})
        lines = [json.loads(line) for line in body.splitlines()]
        if lines[0]["value"].get("parentCommit", sha) != sha:
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        changed = dict(files)
        for line in lines:
            self.change(changed, line["key"], line["value"])
        sha = self.hub.commit(repo, changed)
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def change(self, files, key, value):
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self.hub.blobs[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]

    def file(self, repo, rest, body):
        if rest[:2] == ["info", "lfs"]:
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        sha, files = self.hub.files(repo, rest[1])
        content = files["/".join(rest[2:])]
        digest = hashlib.sha256(content).hexdigest()
        return self.answer(200, content=content, ETag=f'"{digest}"', X_Repo_Commit=sha)


def mode(path):
    return "lfs" if path.endswith(LFS) else "regular"


def entry(path, content):
    digest = hashlib.sha256(content).hexdigest()
    facts = {"type": "file", "path": path, "size": len(content), "oid": digest[:40]}
    return facts | ({"lfs": {"oid": digest, "size": len(content), "pointerSize": 130}} if mode(path) == "lfs" else {})


def speak_to(monkeypatch, url, cache):
    """Let huggingface_hub, which reads its settings when it is imported, speak to the server at `url`."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
