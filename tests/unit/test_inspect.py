"""`hexad inspect`: what the report says about a graph."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from tests.tiny_models import TinyModel, tiny_llama

from hexad.backends.cpu.layouts import layout_of
from hexad.cli.inspect import WIDTH, Report
from hexad.config import EngineConfig
from hexad.errors import BackendError
from hexad.graph.fuse import fuse
from hexad.placement import Hardware
from hexad.weights import Q4_0, Q4_1, Q8_0, Weight, WeightFormat
from hexad.weights.ggml import FORMATS

MACHINE = Hardware(2, 2**33, "avx512vnni", bandwidth=20e9, int8_rate=600e9)


class Exotic(WeightFormat):
    """A format without a packed layout."""

    name, block_size, block_bytes = "IQ9_XXS", 32, 30

    def dequantise(self, weight: Weight) -> NDArray[np.float32]:
        raise NotImplementedError

    def take_rows(self, weight: Weight, rows: NDArray[np.int64]) -> Weight:
        raise NotImplementedError


def report(model: TinyModel, hardware: Hardware = MACHINE, *, fused: bool = True, **config: Any) -> list[str]:
    graph = fuse(model.graph()) if fused else model.graph()
    packed = dict.fromkeys(model.weights, 1024)
    stream = io.StringIO()
    console = Console(file=stream, width=WIDTH, highlight=False)
    Report("m.gguf", model.config, graph, packed, EngineConfig(**config), hardware, "weights [all]").print(
        console
    )
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert max(map(len, lines)) <= WIDTH
    return lines


def find(lines: list[str], *words: str) -> str:
    """The one line that has all these words."""
    found = [line for line in lines if all(word in line for word in words)]
    assert len(found) == 1, (words, found)
    return found[0]


def quantised(**changes: Any) -> TinyModel:
    return tiny_llama(**{"layers": 6, "format": Q4_1, "intermediate": 128, **changes})


def test_config_and_machine() -> None:
    lines = report(quantised())
    assert lines[0] == "tiny llama  m.gguf"
    assert "6 of width 64" in find(lines, "layers  ")
    assert "4 query heads of 16 on 2 KV heads" in find(lines, "attention  ", "query")
    assert "tied to the embedding" in find(lines, "vocabulary")
    assert find(lines, "weights [all]")
    assert "2 threads on 2 CPUs, avx512vnni" in find(lines, "machine  ")
    assert "20.0 GB/s read, 600 GMAC/s int8" in find(lines, "measured")
    assert "1 thread on 2 CPUs" in find(report(quantised(), threads=1), "machine  ")


def test_windows_and_scaled_positions_are_told() -> None:
    model = quantised(model_type="mistral")
    plain = report(model)
    model.config |= {"sliding_window": 40, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    lines = report(model)
    assert "on 2 KV heads, 40 tokens back" in find(lines, "attention  ", "query")
    assert "RoPE, base 10,000, scaled: linear" in find(lines, "positions")
    assert find(plain, "attention  ", "query").endswith("KV heads")
    assert find(plain, "positions").endswith("10,000")


def test_alike_layers_are_folded() -> None:
    lines = report(quantised())
    assert "6 alike, each:" in find(lines, "layers 0–5")
    assert len([line for line in lines if line.startswith("  linear")]) == 4
    assert "int8 · avx512vnni" in find(lines, "  linear", "norm, q, k, v", "Q4_1", "w4m")
    assert "RoPE, 4 heads on 2 KV" in find(lines, "  attention", "F16", "float · avx512vnni")


def test_unlike_layers_are_not() -> None:
    formats = {"layers.2.mlp.down_proj": Q8_0, "layers.4.mlp.down_proj": Q8_0, "layers.5.": Q4_0}
    lines = report(quantised(formats=formats))
    assert "3 alike" in find(lines, "layers 0–1, 3")
    assert "2 alike" in find(lines, "layers 2, 4")
    assert find(lines, "layer 5").split()[:2] == ["layer", "5"]
    assert "w8" in find(lines, "down, residual", "Q8_0")


def test_a_node_of_mixed_formats_has_a_row_for_each() -> None:
    lines = report(quantised(formats={"v_proj": Q8_0}, attention_bias=True))
    assert "w4m" in find(lines, "norm, q, k, bias", "Q4_1")
    row = next(i for i, line in enumerate(lines) if "norm, q, k, bias" in line)
    assert lines[row + 1].split()[:4] == ["linear", "v", "Q8_0", "w8"]


def test_what_has_no_layout_is_refused() -> None:
    model = quantised()
    for name, weight in model.weights.items():
        if "gate_proj" in name or "up_proj" in name:
            model.weights[name] = Weight(Exotic(), weight.shape, {})
    with pytest.raises(BackendError, match="no packed layout for IQ9_XXS weights"):
        report(model)


def test_every_format_that_is_read_has_a_layout() -> None:
    """Of about the size it has in the file: scales of 6 bits become bytes."""
    for format in FORMATS.values():
        shape = (64, 2 * max(32, format.block_size))
        packed = layout_of(Weight(format, shape, {})).nbytes(shape)
        assert format.nbytes(shape) <= packed <= 1.04 * format.nbytes(shape)


def test_float_compute_shows() -> None:
    lines = report(quantised(), compute="float")
    assert not any("int8 ·" in line for line in lines)
    assert "float · avx512vnni" in find(lines, "norm, q, k, v", "w4m")
    assert "(f32)" in find(lines, "KV cache", "a token")


def test_q8_cache_shows() -> None:
    lines = report(quantised(), kv_dtype="q8")
    assert "Q8" in find(lines, "  attention", "RoPE", "paged", "float · avx512vnni").split()
    assert f"{6 * 2 * 2 * (16 + 4)} B a token (q8)" in find(lines, "KV cache", "a token")


def test_bytes_count_a_tied_table_once() -> None:
    model = quantised(layers=1)
    in_file = sum(weight.nbytes for weight in model.weights.values())
    total = find(report(model), "total")
    assert total.split()[1:] == [f"{in_file / 1024:.1f}", "KiB", f"{len(model.weights):.1f}", "KiB"]
    assert "tied" in find(report(model), "logits  ", "norm, embed_tokens, tied")
    assert "norm, lm_head" in find(report(quantised(tied=False)), "logits  ")


def test_costs_and_limits() -> None:
    lines = report(quantised())
    macs = 6 * (64 * 128 + 64 * 64 + 3 * 64 * 128) + 64 * 160
    assert f"{macs / 1e3:.0f} kMAC with weights" in find(lines, "arithmetic")
    kv = 6 * 2 * 32 * 2
    assert f"{kv} B a token (f16)" in find(lines, "KV cache", "a token")
    moved = sum(weight.nbytes for weight in quantised().weights.values()) + kv * 513
    assert f"at most {20e9 / moved:,.0f} tok/s" in find(lines, "decode")
    attention = 6 * 512 * 513 * 64
    seconds = (512 * (macs - 64 * 160) + 64 * 160 + 4 * attention) / 600e9
    assert f"at most {512 / seconds:,.0f} tok/s" in find(lines, "prefill")


def test_unmeasured_rates_are_not_invented() -> None:
    lines = report(quantised(), Hardware(1, 2**30))
    assert "not measured" in find(lines, "machine  ")
    assert not any("tok/s" in line for line in lines)


def test_a_graph_that_nothing_fused_is_shown_too() -> None:
    lines = report(quantised(layers=1), fused=False)
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [
        "norm", "linear", "linear", "linear", "rope", "rope", "attention", "linear", "add",
        "norm", "linear", "linear", "gated", "linear", "add",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["[red]x[/red]", "\x1b[31mx\x07", "a\nb"])
def test_names_from_files_steer_nothing(name: str) -> None:
    model = quantised()
    model.config["name"] = name
    shown = report(model)[0].removesuffix("  m.gguf")
    assert shown == "".join(c if c.isprintable() else "�" for c in name)
