"""Models in several GGUF files: all parts are one model, and parts that do not belong together are none."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from tests.gguf_writer import (
    BOOL,
    I32,
    TYPE_F32,
    U16,
    Tensor,
    Typed,
    llama,
    write,
    write_parts,
)

from hexad.checkpoint import open_checkpoint
from hexad.checkpoint.gguf import GGUFFile
from hexad.checkpoint.gguf_shards import open_gguf
from hexad.errors import CheckpointError, UnsupportedError

FIRST, SECOND, THIRD = (f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3))


def save(folder, files):
    for name, raw in files.items():
        (folder / name).write_bytes(raw)


def parts(sizes=(0, 9, 11)):
    """A tiny model of 20 tensors; as GGUF's own splitter may do, the first part has none of them."""
    metadata, tensors = llama(layers=2)
    assert len(tensors) == sum(sizes) == 20
    return write_parts(metadata, tensors, sizes)


@pytest.mark.parametrize("sizes", [(0, 9, 11), (1, 1, 18), (19, 1, 0)])
@pytest.mark.parametrize("given", [FIRST, SECOND, THIRD])
def test_any_part_opens_the_whole_model(tmp_path, sizes, given):
    save(tmp_path, parts(sizes))
    (tmp_path / "whole.gguf").write_bytes(write(*llama(layers=2)))
    with open_checkpoint(tmp_path / given) as split, open_checkpoint(tmp_path / "whole.gguf") as whole:
        assert split.path == tmp_path / FIRST
        assert split.config == whole.config
        assert split.weights.keys() == whole.weights.keys()
        for name, weight in whole.weights.items():
            assert split.weights[name].shape == weight.shape
            np.testing.assert_array_equal(split.weights[name].dequantise(), weight.dequantise())


def test_tensors_are_in_the_order_of_the_parts_and_outlive_close(tmp_path):
    save(tmp_path, parts())
    _, tensors = llama(layers=2)
    with open_gguf(tmp_path / FIRST) as file:
        assert list(file.tensors) == [tensor.name for tensor in tensors]
        arrays = [next(iter(weight.arrays.values())) for weight in file.tensors.values()]
    assert not file.tensors
    assert [array.tobytes() for array in arrays] == [tensor.data for tensor in tensors]


def test_close_unmaps_every_part(tmp_path):
    save(tmp_path, write_parts({"a": ["x"]}, [], (0, 0, 0)))
    file = open_gguf(tmp_path / FIRST)
    maps = [part._map for part in file._parts]
    file.close()
    assert [mapped.closed for mapped in maps] == [True] * 3
    with pytest.raises(CheckpointError, match="closed"):
        file.metadata["a"].tolist()


def test_each_part_has_an_alignment_of_its_own(tmp_path):
    def part(number, alignment, value):
        tensors = [Tensor(f"{number}.{i}", (1,), TYPE_F32, np.float32(value + i).tobytes()) for i in range(2)]
        keys = {
            "general.alignment": alignment,
            "split.no": Typed(U16, number),
            "split.count": Typed(U16, 2),
            "split.tensors.count": Typed(I32, 4),
        }
        return write(keys, tensors, alignment=alignment)

    save(tmp_path, {"m-00001-of-00002.gguf": part(0, 8, 1.0), "m-00002-of-00002.gguf": part(1, 4096, 5.0)})
    file = open_gguf(tmp_path / "m-00001-of-00002.gguf")
    values = {name: weight.dequantise()[0] for name, weight in file.tensors.items()}
    assert values == {"0.0": 1.0, "0.1": 2.0, "1.0": 5.0, "1.1": 6.0}


@pytest.mark.parametrize("name", ["model.gguf", "model-00001-of-00001.gguf", "model-00002-of-00001.gguf"])
@pytest.mark.parametrize("keys", [{}, {"split.no": 0, "split.count": 1}, {"split.count": Typed(U16, 0)}])
def test_one_file_may_say_that_it_is_one(tmp_path, name, keys):
    path = tmp_path / name
    metadata, tensors = llama(layers=1)
    path.write_bytes(write(metadata | keys, tensors))
    assert len(open_checkpoint(path).weights) == len(tensors)


# What is wrong with the parts, of which any may be opened: the part named in the message, and why.


@pytest.mark.parametrize(("given", "missing"), list(permutations([FIRST, SECOND, THIRD], 2)))
def test_missing_part_is_named(tmp_path, given, missing):
    save(tmp_path, parts())
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=r"part \d of 3 of this model is missing") as caught:
        open_checkpoint(tmp_path / given)
    assert str(caught.value).startswith(f"{tmp_path / missing}: ")


def changed(**keys):
    """The parts, with keys of the second one changed: "__" stands for "."; None removes one."""
    metadata, tensors = llama(layers=2)
    files = write_parts(metadata, tensors, (0, 9, 11))
    own = {
        "split.no": Typed(U16, 1),
        "split.count": Typed(U16, 3),
        "split.tensors.count": Typed(I32, 20),
    }
    own |= {key.replace("__", "."): value for key, value in keys.items()}
    files[SECOND] = write({k: v for k, v in own.items() if v is not None}, tensors[:9])
    return files


UNFIT = {
    "count missing": (SECOND, changed(split__count=None), "split.count is None, but .* has 3 parts"),
    "count of another": (SECOND, changed(split__count=4), "split.count is 4, but by its name"),
    "count true": (SECOND, changed(split__count=Typed(BOOL, True)), "split.count is True"),
    "count text": (SECOND, changed(split__count="3"), "split.count is '3'"),
    "number missing": (SECOND, changed(split__no=None), "split.no is None, but by its name it is part 2"),
    "number of another": (SECOND, changed(split__no=2), "split.no is 2"),
    "number true": (SECOND, changed(split__no=Typed(BOOL, True)), "split.no is True"),
    "total of another": (SECOND, changed(split__tensors__count=21), "sets 'split.tensors.count' to 21"),
    "metadata of its own": (SECOND, changed(llama__expert_count=8), "sets 'llama.expert_count' to 8"),
    "metadata that differs": (SECOND, changed(llama__block_count=3), "sets 'llama.block_count' to 3"),
    "parts swapped": (
        FIRST,
        dict(zip(parts(), list(parts().values())[::-1], strict=True)),
        "split.no is 2, but by its name it is part 1, 0",
    ),
    "truncated": (THIRD, parts() | {THIRD: parts()[THIRD][:-64]}, "the file ends at"),
    "not GGUF": (SECOND, parts() | {SECOND: b"<html>404</html>"}, "not a GGUF file"),
    "empty": (SECOND, parts() | {SECOND: b""}, "the file is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_parts_that_do_not_belong_together_are_refused(tmp_path, case):
    named, files, reason = UNFIT[case]
    save(tmp_path, files)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(tmp_path / FIRST)
    assert str(caught.value).startswith(f"{tmp_path / named}: ")


def test_tensor_of_two_parts_is_refused(tmp_path):
    metadata, tensors = llama(layers=2)
    save(tmp_path, write_parts(metadata, [*tensors, tensors[3]], (0, 9, 12)))
    with pytest.raises(CheckpointError, match=f"{THIRD}: tensor '{tensors[3].name}' is in a part before"):
        open_checkpoint(tmp_path / SECOND)


@pytest.mark.parametrize("total", [19, 21, -1, None])
def test_total_of_tensors_is_compared(tmp_path, total):
    metadata, tensors = llama(layers=2)
    files = write_parts(metadata, tensors, (0, 20))
    for i, name in enumerate(files):
        keys = {"split.no": i, "split.count": 2}
        keys |= {} if total is None else {"split.tensors.count": Typed(I32, total)}
        files[name] = write((metadata if i == 0 else {}) | keys, tensors if i else [])
    save(tmp_path, files)
    with pytest.raises(CheckpointError, match=f"split.tensors.count is {total}, but its parts have 20") as e:
        open_checkpoint(tmp_path / "model-00001-of-00002.gguf")
    assert str(e.value).startswith(f"{tmp_path}")


@pytest.mark.parametrize("name", ["renamed.gguf", "model-1-of-3.gguf", "model-00000-of-00003.gguf"])
def test_part_under_another_name_is_told_so(tmp_path, name):
    (tmp_path / name).write_bytes(parts()[FIRST])
    with pytest.raises(CheckpointError, match=r"by its name the model has 1 part.* rename it back"):
        open_checkpoint(tmp_path / name)


def test_name_of_a_part_on_a_whole_model_is_told_so(tmp_path):
    save(tmp_path, dict.fromkeys(parts(), write(*llama(layers=1))))
    with pytest.raises(CheckpointError, match=r"split\.count is None, but by its name the model has 3 parts"):
        open_checkpoint(tmp_path / FIRST)


def test_failing_part_closes_the_others(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(GGUFFile, "close", lambda self: closed.append(self.path.name))
    save(tmp_path, parts() | {THIRD: b""})
    with pytest.raises(CheckpointError):
        open_gguf(tmp_path / FIRST)
    assert closed == [FIRST, SECOND]


def test_what_the_parts_hold_is_checked_as_in_one_file(tmp_path):
    metadata, tensors = llama(layers=2)
    save(tmp_path, write_parts(metadata | {"llama.expert_count": 8}, tensors, (0, 9, 11)))
    with pytest.raises(UnsupportedError, match=f"{FIRST}: sets 'llama.expert_count' to 8"):
        open_checkpoint(tmp_path / THIRD)


@pytest.mark.oracle
@pytest.mark.parametrize("small_first_shard", [True, False])
def test_reads_the_parts_that_the_gguf_package_writes(tmp_path, small_first_shard):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(
        tmp_path / "model.gguf", "llama", split_max_tensors=3, small_first_shard=small_first_shard
    )
    writer.add_context_length(77)
    writer.add_token_list(["a", "b"])
    rng = np.random.default_rng(0)
    tensors = {f"w{i}": rng.standard_normal((i + 1, 8)).astype(np.float32) for i in range(8)}
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    paths = sorted(tmp_path.glob("*.gguf"))
    assert len(paths) == 3 + small_first_shard
    for path in paths:
        with open_gguf(path) as file:
            assert file.metadata["llama.context_length"] == 77
            assert file.metadata["tokenizer.ggml.tokens"].tolist() == ["a", "b"]
            assert list(file.tensors) == list(tensors)
            for name, array in tensors.items():
                np.testing.assert_array_equal(file.tensors[name].dequantise(), array)
