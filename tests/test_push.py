"""Uploads to a stand-in of the hub that speaks its HTTP interface, in this process."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoImageProcessor

from sparsecli import cli
from sparsecli.console import Failure
from sparsecli.data.images import image_processor
from sparsecli.interchange.hub import check_repository
from sparsecli.interchange.pushing import run
from sparsecli.model.auto import build_classifier
from sparsecli.model.card import CARD, Card
from sparsecli.model.loading import load_classifier, load_network
from sparsecli.spec.vision import VisionSpec

TOKEN = "a-token"
IMAGES = VisionSpec.model_validate(
    {
        "kind": "vision",
        "image_size": 8,
        "patch_size": 4,
        "classes": 3,
        "d_model": 16,
        "layers": 1,
        "heads": 2,
        "feed_forward": {"kind": "dense", "d_ff": 32},
    }
)


class Hub(ThreadingHTTPServer):
    """Repositories by name: their files by path. Weights go by LFS, as on the hub; other files in the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, str]] = []


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        """Nothing."""

    def answer(self, value: object = None, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_PUT(self) -> None:
        content = self.body()
        number = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == number
        self.server.objects[number] = content
        self.answer()

    def do_POST(self) -> None:
        hub, content = self.server, self.body()
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
            return
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            asked = json.loads(content)
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repositories:
                self.answer({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
                return
            hub.repositories[name] = {}
            hub.private[name] = asked.get("private") is True or asked.get("visibility") == "private"
            self.answer({"url": f"{hub.url}/{name}", "name": name})
        elif parts == ["api", "validate-yaml"]:  # of the card's front matter
            front = yaml.safe_load(json.loads(content)["content"].split("---")[1])
            errors = [] if front["library_name"] == "sparsecli" else [{"message": "no library"}]
            self.answer({"errors": errors, "warnings": []})
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.url}/objects/{each['oid']}"}}}
                for each in json.loads(content)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif parts[4] == "preupload":
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(content)["files"]
            ]
            self.answer({"files": files})
        elif parts[5] != "main":
            self.answer({"error": "Invalid rev id"}, 404)
        else:
            name = "/".join(parts[2:4])
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append((name, parts[5], value["summary"]))
                elif line["key"] == "file":
                    hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                else:
                    hub.repositories[name][value["path"]] = hub.objects[value["oid"]]
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/{name}/commit/0"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_the_hub_gets_the_files_of_the_model_and_no_others(
    finished: tuple[Path, object], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished[0] / "model"
    (folder / "notes.txt").write_text("mine")
    words = ["sparsecli", "push", str(finished[0]), "someone/tiny", "--private", "--message", "First"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    (folder / "notes.txt").unlink()
    files = hub.repositories["someone/tiny"]
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {CARD, "config.json", "model.safetensors", "tokenizer.json", "sparsecli_model.py"} <= files.keys()
    assert hub.commits == [("someone/tiny", "main", "First")]
    assert hub.private["someone/tiny"]

    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(load_network(tmp_path)(ids).logits, load_network(folder)(ids).logits)

    run(model=str(folder), repository="someone/tiny")  # again: another commit
    assert hub.commits[1:] == [("someone/tiny", "main", "Upload model")]


def test_a_model_of_images(hub: Hub, tmp_path: Path) -> None:
    folder, there = tmp_path / "ours", tmp_path / "there"
    model = build_classifier(IMAGES)
    model.save_pretrained(folder)
    with pytest.raises(Failure, match=r"ours/preprocessor_config\.json: no such file"):
        run(model=str(folder), repository="someone/digits")
    assert not hub.repositories
    image_processor(IMAGES.image_size).save_pretrained(folder)
    Card("A model of images.", [], task="image-classification").write(folder, "digits")
    uploaded = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "tokenizer.json").write_text("of something else")
    run(model=str(folder), repository="someone/digits")
    assert hub.repositories["someone/digits"] == uploaded
    there.mkdir()
    for name, content in uploaded.items():
        (there / name).write_bytes(content)
    pixels = AutoImageProcessor.from_pretrained(there)(Image.new("RGB", (9, 7)), return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(load_classifier(there)(**pixels).logits, model.eval()(**pixels).logits)

    (folder / "model.safetensors").write_bytes(uploaded["model.safetensors"][:-1])
    with pytest.raises(Failure, match="cut short or damaged"):
        run(model=str(folder), repository="someone/digits")
    assert len(hub.commits) == 1


def test_what_the_hub_refuses_is_one_line(
    finished: tuple[Path, object], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(finished[0])
    with pytest.raises(Failure, match=r"^someone/tiny: there is no such branch other on the hub"):
        run(model=model, repository="someone/tiny", revision="other")
    for name in ("smol", "me/smol model", "a/b/c", "me/a--b"):
        with pytest.raises(Failure, match=r"^NAME: expected USER/NAME of .*, got ") as caught:
            check_repository(name)
        assert caught.value.exit_code == 2
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(Failure, match=r"^someone/tiny: the hub does not let you write there; log in with"):
        run(model=model, repository="someone/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Failure, match=r"^someone/tiny: cannot be uploaded: .*offline"):
        run(model=model, repository="someone/tiny")
    with pytest.raises(Failure, match="no such file or folder"):
        run(model=str(tmp_path / "none"), repository="someone/tiny")
    assert not hub.repositories["someone/tiny"]


def test_a_plan_uploads_nothing(
    finished: tuple[Path, object], hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model=str(finished[0]), repository="someone/tiny", dry_run=True)
    assert "model.safetensors" in capsys.readouterr().out
    assert not hub.repositories
