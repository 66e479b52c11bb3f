"""The store's models of the Hugging Face Hub, against a hub that is made here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.local_server import Handler, serving

from hexad.checkpoint import store
from hexad.checkpoint.hub import choose
from hexad.errors import DownloadError, ModelNotFoundError


@pytest.mark.parametrize("model", ["hf:", "hf:repo", "hf:a/b/c", "hf:a/b:", "hf:../..:x y/.."])
def test_a_malformed_name_is_refused(home: Path, model: str) -> None:
    with pytest.raises(ModelNotFoundError):
        store.resolve(model)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["README.md", "only.gguf"], "only.gguf"),
        (["m.IQ9_X.gguf", "mmproj-F16.gguf", "imatrix_m.gguf"], "m.IQ9_X.gguf"),
        (["m-Q8_0.gguf", "m-Q4_0.gguf", "m-F16.gguf"], "m-Q4_0.gguf"),
        (["m-Q4_0.gguf", "m-Q4_K_S.gguf", "m-Q4_K_M.gguf", "m-Q5_K_M.gguf"], "m-Q4_K_M.gguf"),
        (["m-Q2_K.gguf", "m-BF16.gguf", "m-IQ4_XS.gguf"], "m-BF16.gguf"),
        (["m-Q6_K.gguf", "m-q8_0.gguf"], "m-Q6_K.gguf"),
        (["m-F16-00001-of-00002.gguf", "m-F16-00002-of-00002.gguf"], "m-F16-00001-of-00002.gguf"),
        (
            ["q/m-Q4_K_M-00002-of-00002.gguf", "q/m-Q4_K_M-00001-of-00002.gguf", "m-Q4_0.gguf"],
            "q/m-Q4_K_M-00001-of-00002.gguf",
        ),
        (["model.safetensors", "config.json"], "model.safetensors"),
        (["model.safetensors.index.json", "model-00001-of-00001.safetensors"], "model.safetensors"),
        (["model.safetensors", "config.json", "m-Q8_0.gguf"], "m-Q8_0.gguf"),
        (["model.safetensors", "pytorch_model.bin", "mmproj.gguf"], "model.safetensors"),
    ],
)
def test_the_best_model_of_a_repository_is_chosen(names: list[str], chosen: str) -> None:
    assert choose("hf:o/r", names) == chosen


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["README.md", "adapter_model.safetensors"], "has no GGUF file and no model.safetensors"),
        (["m-00002-of-00002.gguf"], "has no GGUF file"),
        (
            ["a-Q4_0.gguf", "b-Q4_0.gguf"],
            "several GGUF files; name one:\n  hf:o/r:a-Q4_0.gguf\n  hf:o/r:b-Q4_0.gguf",
        ),
        (["a-IQ1_S.gguf", "a-TQ1_0.gguf", "model.safetensors"], "several GGUF files"),
        (["config.json", "pytorch_model.bin"], "PyTorch pickles only.*save_pretrained"),
        (["consolidated.00.pth"], "PyTorch pickles only"),
    ],
)
def test_a_repository_without_a_clear_choice_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(DownloadError, match=f"(?s){message}"):
        choose("hf:o/r", names)


def index_of(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": shard for i, shard in enumerate(shards)}}).encode()


REPOSITORIES = {
    "owner/repo": {"tiny-Q4_0.gguf": b"GGUF four bits", "tiny-Q8_0.gguf": b"GGUF eight bits"},
    "owner/parts": {f"q/m-F16-0000{i}-of-00003.gguf": b"GGUF" + bytes(i) for i in (1, 2, 3)},
    "owner/folder": {
        "README.md": b"nobody needs this",
        "config.json": b"{}",
        "tokenizer.json": b"{ }",
        "additional_chat_templates/tool.jinja": b"{{ messages }}",
        "model.safetensors": b"whole",
        "pytorch_model.bin": b"never",
        "onnx/model.onnx": b"never",
        "model.safetensors.index.json": index_of("never.safetensors"),
        "original/consolidated.safetensors": b"never",
    },
    "owner/shards": {
        "config.json": b"{}",
        "model.safetensors.index.json": index_of("one.safetensors", "two.safetensors", "one.safetensors"),
        "one.safetensors": b"first",
        "two.safetensors": b"second",
        "three.safetensors": b"never",
    },
    "owner/both": {"config.json": b"{}", "model.safetensors": b"folder", "m-Q8_0.gguf": b"GGUF"},
    "owner/escape": {
        "config.json": b"{}",
        "model.safetensors.index.json": index_of("../../../one.safetensors"),
    },
    "owner/halves": {"model.safetensors": b"no config"},
}
GIT = "0" * 40


@pytest.fixture
def hub() -> Iterator[SimpleNamespace]:
    """A hub with REPOSITORIES, a gated one, and no other. requests: how many there were of a kind; files: the
    names of those sent; broken: names of files whose download breaks off half-way."""
    state = SimpleNamespace(requests=Counter(), files=[], broken=set(), url="", commit=GIT)

    class HubHandler(Handler):
        def do_HEAD(self) -> None:  # noqa: N802
            state.requests[self.command] += 1
            path = self.path.partition("?")[0].removeprefix("/api/models").lstrip("/")
            repo, rest = "/".join(path.split("/")[:2]), path.split("/")[2:]
            contents = REPOSITORIES.get(repo)
            name = "/".join(rest[2:])
            if repo == "owner/gated":
                self.answer(403, X_Error_Code="GatedRepo")
            elif contents is None:
                self.answer(404, X_Error_Code="RepoNotFound")
            elif rest[0] == "tree":
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": name}
                    for name, data in contents.items()
                ]
                self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
            elif (data := contents.get(name)) is not None:
                tag = f'"{hashlib.sha1(data).hexdigest()}"'
                half = data[: len(data) // 2] if self.command == "GET" and name in state.broken else data
                length = str(len(data))
                self.answer(200, half, ETag=tag, X_Repo_Commit=state.commit, Content_Length=length)
                if self.command == "GET":
                    state.files.append(name)
            else:
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=state.commit)

        def do_GET(self) -> None:  # noqa: N802
            self.do_HEAD()

    with serving(HubHandler) as state.url:
        yield state


Pull = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub_pull(home: Path, tmp_path: Path) -> Pull:
    """Pulls or resolves in a process of its own: huggingface_hub reads its settings when it is imported."""

    def run(
        model: str, endpoint: str, *, function: str = "pull", **settings: str
    ) -> subprocess.CompletedProcess[str]:
        script = (
            "import sys, time\nfrom hexad.checkpoint import store\nfrom hexad.errors import CheckpointError\n"
            "time.sleep = lambda seconds: None\n"  # huggingface_hub sleeps between its tries
            f"try: print(store.{function}(sys.argv[1]))\n"
            "except (store.DownloadError, CheckpointError) as error:\n"
            "    sys.exit(f'{type(error).__name__}: {error}')"
        )
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1",
            **settings,
        }
        command = [sys.executable, "-c", script, model]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_a_named_hub_file_is_fetched_once(home: Path, hub: SimpleNamespace, hub_pull: Pull) -> None:
    model = "hf:owner/repo:tiny-Q8_0.gguf"
    first = hub_pull(model, hub.url)
    assert first.returncode == 0, first.stderr
    path = Path(first.stdout.strip())
    assert path.is_relative_to(home / "hf")
    assert path.read_bytes() == b"GGUF eight bits"
    hub.requests.clear()
    assert hub_pull(model, hub.url, function="resolve").stdout == first.stdout
    assert not hub.requests
    assert [(m.name, m.path, m.size) for m in store.list_models()[1:]] == [(model, path, 15)]


def test_a_hub_repository_gives_its_best_file(hub: SimpleNamespace, hub_pull: Pull) -> None:
    result = hub_pull("hf:owner/repo", hub.url)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).name == "tiny-Q4_0.gguf"


def test_a_stored_hub_file_is_used_offline_and_a_pull_asks_the_hub(
    hub: SimpleNamespace, hub_pull: Pull
) -> None:
    stored = hub_pull("hf:owner/repo:tiny-Q8_0.gguf", hub.url).stdout
    offline = hub_pull("hf:owner/repo", "http://127.0.0.1:9", function="resolve")
    assert offline.stdout == stored, offline.stderr
    assert hub_pull("hf:owner/repo", hub.url).stdout.strip().endswith("tiny-Q4_0.gguf")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("hf:owner/other:m.gguf", "no such repository"),
        ("hf:owner/other", "no such repository"),
        ("hf:owner/repo:m.gguf", "no such file"),
        ("hf:owner/gated:m.gguf", "gated"),
        ("hf:owner/-bad-.:m.gguf", "owner/-bad-."),
    ],
)
def test_what_the_hub_refuses_is_explained(
    hub: SimpleNamespace, hub_pull: Pull, model: str, reason: str
) -> None:
    result = hub_pull(model, hub.url)
    assert result.stderr.startswith(f"DownloadError: {model} could not be downloaded: ")
    assert reason in result.stderr


@pytest.mark.parametrize("model", ["hf:owner/repo", "hf:owner/repo:tiny-Q4_0.gguf"])
def test_no_way_to_the_hub_is_explained(hub_pull: Pull, model: str) -> None:
    offline = hub_pull(model, "http://127.0.0.1:9")
    assert f"DownloadError: {model} could not be downloaded: " in offline.stderr
    assert "cannot be reached" in offline.stderr
    forbidden = hub_pull(model, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert forbidden.stderr.startswith("DownloadError: ")
    assert "HF_HUB_OFFLINE" in forbidden.stderr


def stored() -> dict[str, tuple[Path | None, int]]:
    """What the store lists beside its aliases: path and size by name."""
    return {model.name: (model.path, model.size) for model in store.list_models() if model.name[:3] == "hf:"}


@pytest.mark.parametrize("model", ["hf:owner/parts", "hf:owner/parts:q/m-F16-00002-of-00003.gguf"])
def test_all_parts_of_a_gguf_are_fetched(hub: SimpleNamespace, hub_pull: Pull, model: str) -> None:
    result = hub_pull(model, hub.url)
    assert result.returncode == 0, result.stderr
    first = Path(result.stdout.strip())
    assert first.name == "m-F16-00001-of-00003.gguf"
    for i in (1, 2, 3):
        assert first.with_name(f"m-F16-0000{i}-of-00003.gguf").read_bytes() == b"GGUF" + bytes(i)
    assert stored() == {"hf:owner/parts:q/m-F16-00001-of-00003.gguf": (first, 3 * 4 + 1 + 2 + 3)}
    assert hub_pull(model, "http://127.0.0.1:9", function="resolve").stdout == result.stdout


@pytest.mark.parametrize(
    ("repo", "needed"),
    [
        (
            "owner/folder",
            ["additional_chat_templates/tool.jinja", "config.json", "model.safetensors", "tokenizer.json"],
        ),
        (
            "owner/shards",
            ["config.json", "model.safetensors.index.json", "one.safetensors", "two.safetensors"],
        ),
    ],
)
def test_a_folder_is_fetched_without_what_it_does_not_need(
    home: Path, hub: SimpleNamespace, hub_pull: Pull, repo: str, needed: list[str]
) -> None:
    result = hub_pull(f"hf:{repo}", hub.url)
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.strip())
    assert folder.is_relative_to(home / "hf")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(folder)) for path in files) == sorted(hub.files) == needed
    contents = REPOSITORIES[repo]
    assert all(path.read_bytes() == contents[str(path.relative_to(folder))] for path in files)
    assert stored() == {f"hf:{repo}": (folder, sum(len(contents[name]) for name in needed))}
    hub.requests.clear()
    for name in (f"hf:{repo}", f"hf:{repo}:model.safetensors", f"hf:{repo}:one.safetensors"):
        assert hub_pull(name, hub.url, function="resolve").stdout == result.stdout
    assert not hub.requests


def test_a_gguf_comes_before_the_folder_beside_it(hub: SimpleNamespace, hub_pull: Pull) -> None:
    gguf = Path(hub_pull("hf:owner/both", hub.url).stdout.strip())
    assert gguf.name == "m-Q8_0.gguf"
    folder = Path(hub_pull("hf:owner/both:model.safetensors", hub.url, function="resolve").stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == b"folder"
    listed = {"hf:owner/both:m-Q8_0.gguf": (gguf, 4), "hf:owner/both:model.safetensors": (folder, 8)}
    assert stored() == listed
    for name, (path, _) in listed.items():
        assert hub_pull(name, "http://127.0.0.1:9", function="resolve").stdout.strip() == str(path)
    assert hub_pull("hf:owner/both", "http://127.0.0.1:9", function="resolve").stdout.strip() == str(gguf)


@pytest.mark.parametrize(
    ("repo", "broken"),
    [
        ("owner/folder", "model.safetensors"),
        ("owner/folder", "tokenizer.json"),
        ("owner/shards", "two.safetensors"),
        ("owner/parts", "q/m-F16-00003-of-00003.gguf"),
    ],
)
def test_what_broke_off_is_no_model_and_is_completed(
    hub: SimpleNamespace, hub_pull: Pull, repo: str, broken: str
) -> None:
    hub.broken.add(broken)
    assert f"DownloadError: hf:{repo} could not be downloaded" in hub_pull(f"hf:{repo}", hub.url).stderr
    assert stored() == {}
    assert hub_pull(f"hf:{repo}", "http://127.0.0.1:9", function="resolve").returncode != 0
    hub.broken.clear()
    hub.files.clear()
    result = hub_pull(f"hf:{repo}", hub.url, function="resolve")
    assert result.returncode == 0, result.stderr
    assert len(stored()) == 1
    assert broken in hub.files
    assert "config.json" not in hub.files  # what had come was kept


def test_of_two_versions_the_latest_is_used(hub: SimpleNamespace, hub_pull: Pull) -> None:
    old = hub_pull("hf:owner/folder", hub.url).stdout
    hub.commit = "1" * 40
    assert hub_pull("hf:owner/folder", hub.url, function="resolve").stdout == old
    new = hub_pull("hf:owner/folder", hub.url).stdout
    assert Path(new.strip()).name == hub.commit
    assert hub_pull("hf:owner/folder", hub.url, function="resolve").stdout == new
    assert [path for path, _ in stored().values()] == [Path(new.strip())]


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("hf:owner/escape", "CheckpointError: .*index.json.*'../../../one.safetensors'"),
        ("hf:owner/halves", "DownloadError: .*it needs config.json"),
        ("hf:owner/repo:model.safetensors", "DownloadError: .*it needs config.json"),
    ],
)
def test_a_repository_that_is_no_models_is_refused(
    hub: SimpleNamespace, hub_pull: Pull, model: str, error: str
) -> None:
    assert re.match(error, hub_pull(model, hub.url).stderr)
    assert stored() == {}
