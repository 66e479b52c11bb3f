"""Mutated, hand-made and large model files: whatever they are, hexad ends soon, with HexadErrors at most.

A longer run: scripts/fuzz. What must hold, and how it is measured: tests/fuzz/worker.py.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from tests.fuzz import runner, worker
from tests.fuzz.case import KINDS, Case, make, valid
from tests.fuzz.gguf_cases import layout, one_gguf
from tests.fuzz.make_corpus import array, spm, tokenizer
from tests.fuzz.runner import fuzz, replay
from tests.gguf_writer import ARRAY, F32, I8, STRING, U8, Tensor, Typed, write, write_parts

from hexad.errors import CheckpointError, PromptError

CORPUS = Path(__file__).parent / "corpus"
COUNTS = {"gguf": 700, "safetensors": 400, "folder": 400}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_break_no_rule(kind):
    done, findings = fuzz(kind, seed=0, count=COUNTS[kind])
    assert findings == []
    assert done == COUNTS[kind]


@pytest.mark.parametrize("kind", [folder.name for folder in sorted(CORPUS.iterdir())])
def test_corpus_breaks_no_rule(kind):
    cases = sorted((CORPUS / kind).iterdir())
    assert len(cases) > 20
    assert replay(cases) == []


REPLACE = {"type": "Replace", "pattern": {"String": "l"}, "content": "l" * 10}


def spm_pieces(tokens):
    """A SentencePiece vocabulary of these tokens, all of one score."""
    return spm(
        ggml__tokens=tokens,
        ggml__scores=array(F32, len(tokens), bytes(4 * len(tokens))),
        ggml__token_type=array(I8, len(tokens), b"\1" * len(tokens)),
    )


def folder(model=None, **changes):
    """A folder that opens, but for these changes to its tokenizer.json."""
    files = valid("folder")[0].files
    changed = json.loads(files["tokenizer.json"]) | changes
    for key, value in (model or {}).items():
        changed["model"][key] |= value
    return Case(files | {"tokenizer.json": json.dumps(changed).encode()})


EMPTY_ARRAY = struct.pack("<IQ", U8, 0)
LARGE = {
    "tensors": one_gguf({}, [Tensor(f"{i:x}", (1,), 0, bytes(4)) for i in range(2**14)]),
    "keys": one_gguf({f"{i:x}": Typed(U8, 1) for i in range(2**14)}, []),
    "arrays in an array": one_gguf({"a": array(ARRAY, 2**15, EMPTY_ARRAY * 2**15)}, []),
    "strings of two bytes": one_gguf({"a": array(STRING, 2**18, (struct.pack("<Q", 2) + b"ab") * 2**18)}, []),
    "text of four bytes a character": one_gguf({"a": "🥄" + "a" * 10_000_000}, []),
    "tokens": tokenizer(
        ggml__tokens=[f"{i:x}" for i in range(50_000)],
        ggml__token_type=Typed(ARRAY, [1] * 50_000, I8),
        ggml__merges=Typed(ARRAY, [], STRING),
    ),
    "control tokens": tokenizer(
        ggml__tokens=[f"<{i:x}>" for i in range(50_000)],
        ggml__token_type=Typed(ARRAY, [3] * 50_000, I8),
        ggml__merges=Typed(ARRAY, [], STRING),
    ),
    "token that holds all the others": tokenizer(
        ggml__tokens=["a" * i for i in range(1, 1500)],
        ggml__token_type=Typed(ARRAY, [3] * 1499, I8),
        ggml__merges=Typed(ARRAY, [], STRING),
    ),
    "merges of negative int8": tokenizer(ggml__merges=array(I8, 2**22, b"\x80" * 2**22)),
    "tokens of negative int8": tokenizer(ggml__tokens=array(I8, 2**22, b"\x80" * 2**22)),
    "merges of one pair": tokenizer(ggml__merges=["h e"] * 100_000),
    "template of expressions": tokenizer(chat_template="{{ x }}" * 200_000),
    "template of text": tokenizer(chat_template="{{ '" + "x" * 3_000_000 + "' }}"),
    "kind of five megabytes": tokenizer(ggml__model="x" * 5_000_000),
    "a thousand parts": Case(
        files := write_parts({"general.architecture": "llama"}, [], [0] * 1000), min(files)
    ),
}
LARGE |= {
    "pieces made of each other": spm_pieces([letter * i for letter in "abcdefgh" for i in range(1, 513)]),
    "id of 4 million": folder(model={"vocab": {"zz": 2**22 - 2}}),
    "normalizer that multiplies": folder(
        normalizer={
            "type": "Sequence",
            "normalizers": [REPLACE, {"type": "Sequence", "normalizers": [REPLACE] * 11}],
        }
    ),
    "normalizer that prepends megabytes": folder(normalizer={"type": "Prepend", "prepend": "x" * 5_000_000}),
    "settings of small objects": Case(
        folder().files | {"tokenizer_config.json": b'{"a":[' + b'{"":0},' * 900_000 + b"1]}"}
    ),
}
"""Where a few bytes of a file could become many of memory, or much time."""


def test_large_files_break_no_rule(tmp_path):
    paths = []
    for name, case in LARGE.items():
        case.save(tmp_path / name)
        paths.append(tmp_path / name)
    assert replay(paths) == []


# The fuzzer itself.


def test_valid_files_are_read_to_the_end(tmp_path):
    """Mutations begin from models that open, with a tokenizer and a chat template that work."""
    whole = [case for case in valid("gguf") if b"tokenizer.ggml.tokens" in case.files[case.opened]]
    assert len(whole) == 6
    for case in [*whole, *valid("folder")]:
        assert worker.Exercise(case.save(tmp_path / "case")).errors == []


def test_layout_finds_every_integer_and_text():
    metadata = {"general.name": "tiny", "a": Typed(ARRAY, ["x", "yz"], STRING), "b": 7}
    raw = write(metadata, [Tensor("t", (3, 1), 0, bytes(12))])
    end, spans = layout(raw)
    assert [raw[start : start + size] for start, size in spans["text"]] == [
        b"general.name", b"tiny", b"a", b"x", b"yz", b"b", b"t",
    ]  # fmt: skip
    numbers = {
        group: [int.from_bytes(raw[start : start + size], "little") for start, size in places]
        for group, places in spans.items()
        if group != "text"
    }
    assert numbers == {
        "count": [1, 3, 2, 2],
        "length": [12, 4, 1, 1, 2, 1, 1],
        "type": [8, 9, 8, 4, 0],
        "dims": [1, 3],
        "offset": [0],
        "value": [7],
    }
    assert end + -end % 32 == len(raw) - 32  # the tensor's 12 bytes, padded
    assert not any(raw[end:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_repeats_its_case(kind):
    assert make(kind, 1, 5) == make(kind, 1, 5)
    assert len({repr(make(kind, seed, i)) for seed in range(2) for i in range(50)}) > 90


def spend(seconds):
    end = worker.time.process_time() + seconds
    while worker.time.process_time() < end:
        pass


BREACHES = {
    "an exception": (lambda path: {}["no such key"], "KeyError: 'no such key'"),
    "a recursion": (lambda path: BREACHES["a recursion"][0](path), "RecursionError"),
    "a warning": (lambda path: worker.warnings.warn("overflow", stacklevel=1), "UserWarning: overflow"),
    "time": (lambda path: spend(0.2), "s of processor time; at most 0.1"),
    "memory": (lambda path: bytearray(b"x") * 120_000_000, "grew the resident set by 1"),
    "a long message": (lambda path: raised(CheckpointError(f"{path}: " + "x" * 3000)), "a message of 30"),
    "a terminal's commands": (lambda path: raised(CheckpointError(f"{path}: \x1b[2J")), "a message that no"),
    "a lone surrogate": (lambda path: raised(CheckpointError(f"{path}: \ud800")), "a message that no"),
    "a message without a file": (lambda path: raised(CheckpointError("broken")), "names no file: broken"),
}


def raised(error):
    raise error


@pytest.mark.parametrize("breach", BREACHES)
def test_every_breach_is_reported(tmp_path, monkeypatch, breach):
    action, reason = BREACHES[breach]
    monkeypatch.setattr(worker.Exercise, "_open", lambda self: action(self.path))
    monkeypatch.setattr(worker, "SECONDS", 0.1 if breach == "time" else 60)
    if breach == "memory" and not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status to read it from")
    assert reason in worker.misfit(tmp_path, tmp_path, 100)


def test_hexad_errors_are_no_breach(tmp_path, monkeypatch):
    for error in (CheckpointError(f"{tmp_path}: broken"), PromptError("too long")):
        monkeypatch.setattr(worker.Exercise, "_open", lambda self, error=error: raised(error))
        assert worker.misfit(tmp_path, tmp_path, 100) is None


def test_a_case_that_kills_or_hangs_is_named_and_the_others_run(tmp_path, monkeypatch):
    (tmp_path / "sick_worker.py").write_text(
        "import os, time\n"
        "from tests.fuzz import worker\n"
        "worker.HANG_SECONDS = 1.0\n"
        "acts = {'dies': os.abort, 'hangs': lambda: time.sleep(60), 'good': lambda: None}\n"
        "worker.Exercise._open = lambda self: acts[self.path.name]()\n"
        "worker.main()\n"
    )
    monkeypatch.setattr(runner, "WORKER", "sick_worker")
    monkeypatch.setenv("PYTHONPATH", f"{runner.ROOT}:{tmp_path}", prepend=os.pathsep)
    paths = [tmp_path / name for name in ("good", "dies", "hangs", "good")]
    for path in paths:
        path.touch()
    findings = replay(paths)
    assert [finding.case for finding in findings] == [str(tmp_path / "dies"), str(tmp_path / "hangs")]
    assert "Abort" in findings[0].reason
    assert "Timeout" in findings[1].reason
