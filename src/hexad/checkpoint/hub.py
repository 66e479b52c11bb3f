"""Models on the Hugging Face Hub: "hf:owner/repo[:file]", and the part of the store that keeps them.

A repository with GGUF files gives one of them: the file named, or the best by type. Else it is a model's
folder (config.json and safetensors), of which only what is needed is fetched; any safetensors name as the
file, such as hf:owner/repo:model.safetensors, asks for the folder whatever else there is.

What is fetched is in huggingface_hub's own cache, where a file appears when it is whole. A model of several
files is not taken for one before the last of them is there.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hexad.checkpoint import hf_folder
from hexad.errors import CheckpointError, DownloadError, ModelNotFoundError

# The type taken where a repository has several: about 4 bits first, as users of llama.cpp expect, then what
# is next best on a machine of a common size.
_PREFERRED_TYPES = (
    *("Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1", "Q6_K", "Q8_0"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "BF16", "F16", "F32", "Q2_K", "Q2_K_S"),
)

# Beside the weights: what hexad and its tokenizers read.
_SMALL_FILES = re.compile(
    r"(generation|tokenizer)_config\.json|(tokenizer|special_tokens_map|added_tokens|vocab)\.json|merges\.txt"
    r"|tokenizer\.model|chat_template\.(jinja|json)|additional_chat_templates/[\w.-]+\.jinja"
)

_NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>.+))?")
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_NO_MODEL = re.compile(r"(^|/)(mmproj|imatrix)", re.IGNORECASE)  # a vision tower, a quantiser's statistics


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model the store has or can fetch. path: its file or folder; None until downloaded. size: in bytes."""

    name: str
    path: Path | None
    size: int


def locate(model: str, cache: Path, *, refresh: bool) -> Path:
    """The local path of "hf:owner/repo[:file]": a GGUF file, of several parts the first, or a folder.

    cache: huggingface_hub's. Unless `refresh`, what is in it is taken without asking the Hub, so that it
    works offline: what is named, or the best of this repository's models there.

    Raises ModelNotFoundError for a name of another form, DownloadError if it cannot be fetched.
    """
    match = _NAME.fullmatch(model)
    if match is None:
        raise ModelNotFoundError(f"{model!r} is not of the form hf:owner/repo or hf:owner/repo:file.")
    repo, file = match["repo"], match["file"]
    if file is not None:
        file = hf_folder.SINGLE if file.endswith(".safetensors") else _parts(file)[0]

    if not refresh:
        found = {name: path for owner, name, path in _stored(cache) if owner == repo}
        chosen = file or (choose(model, list(found)) if found else None)
        if chosen in found:
            return found[chosen]

    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(repo) if file in (None, hf_folder.SINGLE) else []
        file = file or choose(model, names)
        if file == hf_folder.SINGLE:
            return _fetch_folder(model, repo, names, cache)
        return _fetch(repo, _parts(file), cache)
    except DownloadError:
        raise
    except Exception as error:
        reason = _failure(error, cache)
        if reason is None:
            raise
        raise DownloadError(f"{model} could not be downloaded: {reason}") from error


def choose(model: str, files: Sequence[str]) -> str:
    """The model to take from a repository's file list: a GGUF file, the only one or of the preferred type, by
    the name of its first part; "model.safetensors" for the folder, also where that is in shards.

    Raises DownloadError naming the files if there is no model or no clear choice.
    """
    ggufs = gguf_models(files)
    if len(ggufs) == 1:
        return ggufs[0]
    for type_name in _PREFERRED_TYPES:
        pattern = re.compile(rf"[-._/]{type_name}(-00001-of-\d{{5}})?\.gguf$", re.IGNORECASE)
        matches = [file for file in ggufs if pattern.search(file)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            break
    if ggufs:
        listing = "".join(f"\n  {model}:{file}" for file in sorted(ggufs))
        raise DownloadError(f"{model} has several GGUF files; name one:{listing}")
    if hf_folder.SINGLE in files or hf_folder.INDEX in files:
        return hf_folder.SINGLE
    if any(re.search(r"\.(bin|pt|pth)$", file) for file in files):
        raise DownloadError(
            f"{model} has its weights as PyTorch pickles only, which could run code; hexad never opens "
            "these. Choose a repository with safetensors or a GGUF file, or convert it where you trust it, "
            "with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)."
        )
    raise DownloadError(f"{model} has no GGUF file and no {hf_folder.SINGLE}. Choose a repository with one.")


def gguf_models(files: Iterable[str]) -> list[str]:
    """The GGUF files among these that are models; of one in several parts the first part."""
    return [
        file
        for file in files
        if file.endswith(".gguf") and not _NO_MODEL.search(file) and _parts(file)[0] == file
    ]


def stored_models(cache: Path) -> list[StoredModel]:
    """The whole models in huggingface_hub's cache, by name; of several versions of one the latest."""
    found = _stored(cache)
    with_gguf = {repo for repo, name, _ in found if name != hf_folder.SINGLE}
    models = []
    for repo, name, path in found:
        if name != hf_folder.SINGLE:
            files = [path.with_name(part) for part in _parts(path.name)]
        else:
            files = [file for file in path.rglob("*") if file.is_file() and file.suffix != ".gguf"]
        short = name == hf_folder.SINGLE and repo not in with_gguf
        size = sum(file.stat().st_size for file in files)
        models.append(StoredModel(f"hf:{repo}" if short else f"hf:{repo}:{name}", path, size))
    return sorted(models, key=lambda model: model.name)


def mb(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.0f} MB"


def _parts(file: str) -> list[str]:
    """The files a GGUF model is in: itself, or all parts of the set that it belongs to."""
    match = _PART.search(file)
    if match is None:
        return [file]
    count = int(match[2])
    return [f"{file[: match.start()]}-{i + 1:05}-of-{count:05}.gguf" for i in range(max(1, count))]


def _stored(cache: Path) -> list[tuple[str, str, Path]]:
    """(repository, name as `choose` gives it, path) of the whole models, the latest version of each."""
    if not os.path.isdir(cache):  # unlike Path.is_dir, False for names no folder can have
        return []
    found: dict[tuple[str, str], Path] = {}
    paths = [
        path
        for pattern in ("**/*.gguf", hf_folder.CONFIG)
        for path in cache.glob(f"models--*/snapshots/*/{pattern}")
        if path.exists()
    ]
    for path in sorted(paths, key=lambda path: path.lstat().st_mtime):
        repository, _, _, *file = path.relative_to(cache).parts
        repo, name = repository.removeprefix("models--").replace("--", "/"), "/".join(file)
        if path.name == hf_folder.CONFIG:
            if _is_whole(path.parent):
                found[repo, hf_folder.SINGLE] = path.parent
        elif gguf_models([name]) and all(path.with_name(part).exists() for part in _parts(path.name)):
            found[repo, name] = path
    return [(repo, name, path) for (repo, name), path in found.items()]


def _is_whole(folder: Path) -> bool:
    """Whether no weights are left to fetch; they come last."""
    try:
        return bool(hf_folder.weight_files(folder))
    except CheckpointError:
        return False


def _fetch_folder(model: str, repo: str, names: Sequence[str], cache: Path) -> Path:
    """Fetches what a model's folder needs of these names, the weights last."""
    weights = next((name for name in (hf_folder.SINGLE, hf_folder.INDEX) if name in names), None)
    if weights is None or hf_folder.CONFIG not in names:
        raise DownloadError(
            f"{model} is no model's repository: it needs {hf_folder.CONFIG} and {hf_folder.SINGLE} or "
            f"{hf_folder.INDEX}."
        )
    small = [name for name in names if _SMALL_FILES.fullmatch(name)]
    folder = _fetch(repo, [hf_folder.CONFIG, *small], cache).parent
    if weights == hf_folder.INDEX:
        index = _fetch(repo, [weights], cache, folder.name)
        _fetch(repo, hf_folder.shards_of(index), cache, folder.name)
    else:
        _fetch(repo, [weights], cache, folder.name)
    return folder


def _fetch(repo: str, names: Sequence[str], cache: Path, commit: str | None = None) -> Path:
    """Fetches files of one version, the latest unless told; returns the first one's path.

    Not by `snapshot_download`, which where the Hub breaks off may return a folder with only some of them.
    """
    from huggingface_hub import hf_hub_download

    first = Path(hf_hub_download(repo, names[0], revision=commit, cache_dir=cache))
    commit = first.relative_to(cache).parts[2]
    for name in names[1:]:
        hf_hub_download(repo, name, revision=commit, cache_dir=cache)
    return first


def _failure(error: Exception, cache: Path) -> str | None:
    """Why the Hub did not deliver and what to do; None if the error is not about that."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated. Accept its terms on its page, then hf auth login or set HF_TOKEN."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private (log in with hf auth login or set HF_TOKEN)."
    if isinstance(error, errors.HFValidationError):
        return f"{error}"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return "the repository has no such file. Leave the file out to see which it has."
    if constants.HF_HUB_OFFLINE and isinstance(
        error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError
    ):
        return "HF_HUB_OFFLINE is set and the file is not in the store. Unset it, or pass a local path."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({mb(shutil.disk_usage(cache.parent).free)} free in {cache.parent})."
    if isinstance(error, PermissionError):
        return f"{error}. The store is {cache.parent}; HEXAD_HOME sets another folder."
    if isinstance(error, errors.HfHubHTTPError):
        return f"the Hub answered {str(error).splitlines()[0]}"
    # Which HTTP library raises here depends on huggingface_hub's version.
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, errors.LocalEntryNotFoundError) or library in ("httpx", "httpx2", "requests"):
        return (
            "the Hugging Face Hub cannot be reached and the file is not in the store. Check the network (and "
            "HF_ENDPOINT, HTTPS_PROXY), or pass the path of a local file."
        )
    return None
