"""Models from the hub, against a stand-in of it on 127.0.0.1: nothing here leaves the machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

from minillada.errors import BadInput, BadLuck
from minillada.weights import checkpoint, hub

GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = "someone/tiny"
COMMITS = {"main": "a" * 40, "other": "b" * 40}
EXTRA = {  # what a repository holds besides, and a loader has no use for
    "modeling_llada.py": b"raise SystemExit('executed')",
    "pytorch_model.bin": b"\x80\x04",
    "README.md": b"# tiny",
    "original/model.safetensors": b"xxxx",
    "generation_config.json": b"{}",
}


class Hub(ThreadingHTTPServer):
    """As much of the hub as a download needs: what a revision is, the list of its files, the files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.cut: dict[str, int] = {}  # file -> how often its download breaks off in the middle
        self.lies: dict[str, str] = {}  # header or key of JSON -> what is answered in its place
        self.revisions = {}
        for (revision, commit), golden in zip(COMMITS.items(), ("llada_dense", "llada_qkv_bias"), strict=True):
            paths = [p for p in (GOLDEN / golden).iterdir() if p.name != "expected.safetensors"]
            self.revisions[revision] = self.revisions[commit] = {p.name: p.read_bytes() for p in paths} | EXTRA

    def fetched(self) -> set[str]:
        return {path.rsplit("/", 1)[1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path}


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        for revision, files in self.server.revisions.items():
            commit = COMMITS.get(revision, revision)
            if path == f"/api/models/{REPOSITORY}/revision/{revision}":
                names = [{"rfilename": name} for name in files]
                return self.json({"_id": "1", "id": REPOSITORY, "sha": commit, "siblings": names})
            if path == f"/api/models/{REPOSITORY}/tree/{revision}":
                entry = {"type": "file", "oid": "0" * 40}
                return self.json([{**entry, "path": name, "size": len(data)} for name, data in files.items()])
            name = path.removeprefix(f"/{REPOSITORY}/resolve/{revision}/")
            if name in files:
                return self.file(name, files[name], commit)
        missing = "RevisionNotFound" if REPOSITORY in path else "RepoNotFound"
        return self.answer(404, b"", {"X-Error-Code": missing, "X-Error-Message": "no such thing"})

    def json(self, value: object) -> None:
        for entry in value if isinstance(value, list) else [value]:
            entry |= {key: lie for key, lie in self.server.lies.items() if key in entry}
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def file(self, name: str, data: bytes, commit: str) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        headers |= {key: lie for key, lie in self.server.lies.items() if key[0].isupper()}
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        status = 206 if "Range" in self.headers else 200
        headers |= {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if status == 206 else {}
        breaks = self.command == "GET" and self.server.cut.get(name, 0) > 0
        if breaks:
            self.server.cut[name] -= 1
        self.answer(status, data[begin:], headers, sent=(len(data) - begin) // 2 if breaks else None)

    def answer(self, status: int, body: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
        self.close_connection = self.close_connection or sent is not None


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The stand-in, with this process's huggingface_hub pointed at it and at an empty cache."""
    from huggingface_hub import constants

    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()


def test_a_model_of_the_hub_loads_like_a_directory(server):
    model, tokenizer = checkpoint.load(REPOSITORY)
    local, _ = checkpoint.load(GOLDEN / "llada_dense")
    assert tokenizer is None and model.config == local.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), local.parameters(), strict=True))


def test_only_the_files_that_are_read_are_downloaded(server):
    path = hub.fetch(REPOSITORY)
    expected = {p.name for p in (GOLDEN / "llada_dense").iterdir()} - {"expected.safetensors"}
    assert server.fetched() == expected | {"generation_config.json"}
    assert {p.name for p in path.iterdir()} == server.fetched()


def test_a_second_load_downloads_nothing(server):
    checkpoint.load(REPOSITORY)
    server.requests.clear()
    checkpoint.load(REPOSITORY)
    assert not server.fetched()


@pytest.mark.parametrize("revision", ["other", COMMITS["other"]])
def test_a_revision_is_a_branch_or_a_commit(server, revision):
    assert checkpoint.load(REPOSITORY, revision=revision)[0].config.qkv_bias


def test_a_broken_download_goes_on_where_it_stopped(server, monkeypatch):
    from huggingface_hub import constants

    name = "model-00002-of-00003.safetensors"
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what a small file can be resumed by
    server.cut[name] = 1
    checkpoint.load(REPOSITORY)
    size = (GOLDEN / "llada_dense" / name).stat().st_size
    ranges = [r for method, path, r in server.requests if path.endswith(name) and method == "GET"]
    assert ranges == [None, f"bytes={size // 2 // 1000 * 1000}-"]


def test_a_directory_here_wins_over_the_hub(server, tmp_path, monkeypatch):
    checkpoint.save(checkpoint.load(GOLDEN / "llada_gqa_tied")[0], tmp_path / REPOSITORY)
    monkeypatch.chdir(tmp_path)
    assert checkpoint.load(REPOSITORY)[0].config.tie_head
    assert not server.requests
    with pytest.raises(BadInput, match="revision: expected none"):
        checkpoint.load(REPOSITORY, revision="main")


@pytest.mark.parametrize(
    ("repository", "revision", "line"),
    [
        ("someone/else", None, "got none by that name, here or there"),
        (REPOSITORY, "gone", "got no revision 'gone'"),
        ("../../nothing", None, "expected a directory or the id of a model on the hub"),
        ("a//b", None, "expected a directory or the id of a model on the hub"),
        ("-x/y", None, "expected a directory or the id of a model on the hub"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(server, repository, revision, line):
    with pytest.raises((BadInput, BadLuck), match=line) as told:
        checkpoint.load(repository, revision=revision)
    assert "\n" not in str(told.value)


def test_no_network_is_one_line(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(BadLuck, match="expected a directory here, or the hub or its cache to give it") as told:
        checkpoint.load(REPOSITORY)
    assert "\n" not in str(told.value)


UP = "../../../../outside"


PLACES = ("ETag", "X-Linked-ETag", "X-Repo-Commit", "X-Xet-Hash", "sha", "oid")


@pytest.mark.parametrize(
    ("place", "lie"), [*((place, UP) for place in PLACES), ("ETag", "C:\\x"), ("sha", "/tmp/x"), ("ETag", "a" * 300)]
)
def test_a_hostile_hub_writes_nothing_outside_its_cache(server, tmp_path, place, lie):
    server.lies = {place: lie}
    with pytest.raises(BadInput, match=r"^hub: expected hashes from 127\.0\.0\.1, got ") as told:
        checkpoint.load(REPOSITORY)
    assert "\n" not in str(told.value) and "; use another hub" in str(told.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors" or "outside" in path.name]


@pytest.mark.parametrize("revision", ["../../x", "a/../../b", "", "a b", "-x"])
def test_a_revision_is_no_path(server, revision):
    with pytest.raises(BadInput, match=r"^revision: expected a branch, tag or commit, got "):
        checkpoint.load(REPOSITORY, revision=revision)
    assert not server.requests


LOAD = "import sys; from minillada.weights.checkpoint import load; print(load(sys.argv[1])[0].config.n_layer)"


def test_the_environment_decides_where_from_where_to_and_whether_at_all(server, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
    environment = {key: value for key, value in environment.items() if key not in ("HF_HUB_CACHE", "HF_HUB_OFFLINE")}

    def load(**more: str):
        command = [sys.executable, "-W", "error", "-c", LOAD, REPOSITORY]
        home = Path(__file__).parents[1]
        return subprocess.run(command, capture_output=True, text=True, env=environment | more, cwd=home, timeout=60)

    nothing = load(HF_HUB_OFFLINE="1")
    assert nothing.returncode == 1 and "BadLuck" in nothing.stderr and not server.requests
    online = load()
    assert online.stdout == "3\n", online.stderr
    assert (tmp_path / "home" / "hub" / "models--someone--tiny").is_dir()
    server.requests.clear()
    offline = load(HF_HUB_OFFLINE="1")
    assert offline.stdout == "3\n" and not server.requests, offline.stderr
