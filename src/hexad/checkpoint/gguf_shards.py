"""A GGUF model in one file or in several, called NAME-00001-of-0000N.gguf and so on.

Every part has the keys `split.no` (from 0), `split.count` and `split.tensors.count` (of all parts together);
the first one has the model's metadata.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hexad.checkpoint.gguf import GGUFFile
from hexad.errors import CheckpointError
from hexad.weights import Weight

NUMBER, COUNT, TENSOR_COUNT = "split.no", "split.count", "split.tensors.count"
OF_EACH_PART = (NUMBER, "general.alignment")
"""Keys that a part has a value of its own for. What else it sets, it must set as the first part does."""

_PART = re.compile(r"(?P<name>.*)-(?P<part>[0-9]{5})-of-(?P<parts>[0-9]{5})\.gguf", re.DOTALL)


def open_gguf(path: Path) -> GGUFFile:
    """The model that this file holds, or is any one part of; the other parts lie beside it.

    Raises what GGUFFile does, and CheckpointError for parts that are missing or do not belong together.
    """
    names = _names_of_parts(path.name)
    files: list[GGUFFile] = []
    try:
        for name in names:
            part = path.with_name(name)
            if len(names) > 1 and not os.path.exists(part):
                raise CheckpointError(
                    f"{part}: part {len(files) + 1} of {len(names)} of this model is missing. Put all its "
                    "parts into one folder, under the names they were made with."
                )
            files.append(GGUFFile(part))
            _check_part(files, len(names))
        return files[0] if len(names) == 1 else GGUFShards(files)
    except BaseException:
        for file in files:
            file.close()
        raise


class GGUFShards(GGUFFile):
    """The parts of a model as one file: path and metadata of the first, tensors of all, in order.

    Raises CheckpointError for a tensor that two parts have, and where the parts have more or fewer tensors
    than the first one says.
    """

    def __init__(self, parts: Sequence[GGUFFile]) -> None:
        first = parts[0]
        self.path, self.version, self.metadata = first.path, first.version, first.metadata
        self._parts = parts
        tensors: dict[str, Weight] = {}
        for part in parts:
            if twice := tensors.keys() & part.tensors.keys():
                _fail(part, f"tensor {min(twice)!r} is in a part before this one, too")
            tensors.update(part.tensors)
        expected = first.metadata.get(TENSOR_COUNT)
        if expected != len(tensors) or isinstance(expected, bool):
            _fail(first, f"{TENSOR_COUNT} is {expected!r:.80}, but its parts have {len(tensors)} tensors")
        self.tensors = tensors

    def release(self) -> None:
        """Lets go of the pages that were read."""
        for part in self._parts:
            part.release()

    def close(self) -> None:
        """Unmaps every part; see GGUFFile."""
        self.tensors = {}
        for part in self._parts:
            part.close()


def _names_of_parts(name: str) -> list[str]:
    """The names of all parts of the model that a file of this name is a part of: often just the one."""
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match["part"]) <= int(match["parts"]):
        return [name]
    return [f"{match['name']}-{i:05}-of-{match['parts']}.gguf" for i in range(1, int(match["parts"]) + 1)]


def _check_part(files: Sequence[GGUFFile], count: int) -> None:
    """Whether the last file is the next part of a model in `count` files."""
    first, part = files[0].metadata, files[-1]
    found = part.metadata.get(COUNT, 1) or 1  # 0, too, is a whole model
    if found != count or isinstance(found, bool):
        _fail(
            part,
            f"{COUNT} is {part.metadata.get(COUNT)!r:.80}, but by its name the model has {count} part"
            f"{'s' * (count > 1)}. A part is called NAME-00001-of-00003.gguf, say; rename it back.",
        )
    if count == 1:
        return
    number = part.metadata.get(NUMBER)
    if number != len(files) - 1 or isinstance(number, bool):
        _fail(part, f"{NUMBER} is {number!r:.80}, but by its name it is part {len(files)}, {len(files) - 1}")
    for key, value in part.metadata.items():
        if key not in OF_EACH_PART and (key not in first or first[key] != value):
            _fail(part, f"sets {key!r:.80} to {value!r:.80}, which the first part does not")


def _fail(file: GGUFFile, reason: str) -> NoReturn:
    raise CheckpointError(f"{file.path}: {reason}")
