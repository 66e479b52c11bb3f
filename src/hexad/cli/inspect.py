"""`hexad inspect`: what a model is, what runs it here, what a token costs, and how fast this machine is."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from hexad.config import EngineConfig
    from hexad.graph import Graph, Node
    from hexad.placement import Hardware

WIDTH = 100
"""Columns the report fits into."""

TOKENS = 512
"""Context of the decoded token, and length of the prompt, that the costs are given for."""

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def inspect(model: str, settings: Mapping[str, Any]) -> None:
    """Prints the report on a model. settings: fields of EngineConfig. Raises HexadErrors."""
    from rich.console import Console

    from hexad.checkpoint.open import open_checkpoint
    from hexad.checkpoint.store import resolve
    from hexad.config import EngineConfig
    from hexad.errors import InsufficientMemoryError
    from hexad.graph.fuse import fuse
    from hexad.models import build_graph
    from hexad.placement import probe
    from hexad.runner.model_runner import make_backend, plan_memory, weight_bytes

    config = EngineConfig(**settings)
    console = Console(highlight=False)
    if console.width > WIDTH or not sys.stdout.isatty():
        console.width = WIDTH
    with open_checkpoint(resolve(model)) as checkpoint:
        graph = fuse(build_graph(checkpoint.config, checkpoint.weights, checkpoint.path))
        backend = make_backend("cpu")
        try:
            context = int(checkpoint.config["max_position_embeddings"])
            memory = str(plan_memory(graph, backend, config, context))
        except InsufficientMemoryError as error:
            memory = str(error)
        with console.status("measuring this machine …"):
            hardware = probe(config.threads, rates=True)
        report = Report(
            file=checkpoint.path.name,
            model=checkpoint.config,
            graph=graph,
            packed=weight_bytes(graph, backend),
            config=config,
            hardware=hardware,
            memory=memory,
        )
        report.print(console)


@dataclass(frozen=True)
class Report:
    """Everything the report needs. graph: fused. packed: bytes of each weight in memory, by name.

    memory: the plan, or why there is none.
    """

    file: str
    model: Mapping[str, Any]
    graph: Graph
    packed: Mapping[str, int]
    config: EngineConfig
    hardware: Hardware
    memory: str

    def print(self, console: Console) -> None:
        """Writes the report, at most WIDTH columns wide."""
        from rich.text import Text

        name = str(self.model.get("name") or self.model["model_type"])
        console.print(Text.assemble((_printable(name), "bold"), "  ", (_printable(self.file), "dim")))
        sections: tuple[tuple[str, Callable[[], RenderableType]], ...] = (
            ("Model", self._model),
            (f"Graph, fused, compute {self.config.compute}", self._graph),
            (f"A token, {TOKENS} tokens into the context", self._token),
            ("Memory", lambda: Text(self.memory)),
            ("Limits of this machine", self._limits),
        )
        for title, section in sections:
            console.print(f"\n[bold cyan]{title}[/]")
            console.print(section())

    def _model(self) -> Table:
        model = self.model
        heads, kv_heads = model["num_attention_heads"], model["num_key_value_heads"]
        tied = "tied to the embedding" if model["tie_word_embeddings"] else "its own table"
        rope = next(rope for n in self.graph.nodes if (rope := n.attrs.get("rope")) is not None)
        rotated = "" if rope.rotary_dim == rope.head_dim else f", {rope.rotary_dim} features rotated"
        scaling = model.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        scaled = "" if kind == "default" else f", scaled: {kind}"
        windows = sorted({n.attrs["window"] or 0 for n in self.graph.nodes if "attention" in n.op})
        seen = "".join(f", {window:,} tokens back" for window in windows if window)
        return _pairs(
            ("architecture", model["model_type"]),
            ("layers", f"{model['num_hidden_layers']} of width {model['hidden_size']:,}"),
            ("attention", f"{heads} query heads of {rope.head_dim} on {kv_heads} KV heads{seen}"),
            ("positions", f"RoPE, base {rope.theta:,.0f}{rotated}{scaled}"),
            ("context", f"{model['max_position_embeddings']:,} tokens"),
            ("MLP", f"{model['intermediate_size']:,}, gated by SiLU"),
            ("vocabulary", f"{model['vocab_size']:,}; output head {tied}"),
        )

    def _graph(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for column in ("op", "reads", "format", "layout", "kernel"):
            table.add_column(column, no_wrap=column != "reads")
        for column in ("in file", "packed"):
            table.add_column(column, justify="right", no_wrap=True)
        for layers, rows in self._sections():
            if layers:
                sizes = [_size(sum(row.sizes[i] for row in rows) * len(layers)) for i in (0, 1)]
                each = f"{len(layers)} alike, each:" if len(layers) > 1 else ""
                title = f"layer{'s' * (len(layers) > 1)} {_ranges(layers)}"
                table.add_row(title, each, "", "", "", *sizes, style="bold")
            for row in rows:
                op = f"  {row.op}" if layers else row.op
                table.add_row(op, row.reads, row.format, row.layout, row.kernel, *row.bytes)
        names = {name for node in self.graph.nodes for name in node.weights}
        in_file = sum(self.graph.weights[name].nbytes for name in names)
        packed = sum(self.packed[name] for name in names)
        table.add_section()
        table.add_row("total", "", "", "", "", _size(in_file), _size(packed), style="bold")
        return table

    def _sections(self) -> list[tuple[list[int], list[_Row]]]:
        """The graph's rows in order, as (layers, rows): layers that look alike once, other nodes with []."""
        seen: set[str] = set()
        blocks: dict[tuple[str, int], list[_Row]] = {}
        for place, (node, layer) in enumerate(zip(self.graph.nodes, _layers(self.graph), strict=True)):
            key = ("node", place) if layer is None else ("layer", layer)
            blocks.setdefault(key, []).extend(self._rows(node, seen))
        sections: list[tuple[list[int], list[_Row]]] = []
        for (kind, number), rows in blocks.items():
            alike = [layers for layers, found in sections if kind == "layer" and layers and found == rows]
            if alike:
                alike[0].append(number)
            else:
                sections.append(([number] if kind == "layer" else [], rows))
        return sections

    def _rows(self, node: Node, seen: set[str]) -> list[_Row]:
        """A node's rows: one for each format of its matrices. seen: tensors of earlier rows, stored once."""
        from hexad.backends.cpu.layouts import layout_of

        weights = self.graph.weights
        if node.op == "take_rows":
            return [_Row("take_rows", "rows that need logits", "", "", "", (0, 0))]
        if "attention" in node.op:
            rope = "RoPE, " if node.attrs.get("rope") is not None else ""
            reads = f"{rope}{node.attrs['heads']} heads on {node.attrs['kv_heads']} KV"
            kv_dtype = self.config.resolved_kv_dtype.upper()
            return [_Row("attention", reads, kv_dtype, "paged", self._kernel("float"), (0, 0))]
        if node.op == "embed":
            return [self._row(node, node.weights, "row lookup", seen)]
        matrices = [name for name in node.weights if len(weights[name].shape) == 2]
        if not matrices:
            return [self._row(node, node.weights, self._kernel("float"), seen)]
        rows: list[_Row] = []
        for format in dict.fromkeys(weights[name].format.name for name in matrices):
            names = [name for name in matrices if weights[name].format.name == format]
            int8 = self.config.compute == "int8" and layout_of(weights[names[0]]).quantised
            if not rows:  # the node's first row has its vectors too
                names = [name for name in node.weights if name in names or name not in matrices]
            rows.append(self._row(node, names, self._kernel("int8" if int8 else "float"), seen))
        return rows

    def _row(self, node: Node, names: Sequence[str], kernel: str, seen: set[str]) -> _Row:
        from hexad.backends.cpu.layouts import layout_of

        weights = self.graph.weights
        reads = [_short(name) for name in names if not name.endswith(".bias")]
        reads += ["bias"] * any(name.endswith(".bias") for name in names)
        reads += ["tied"] * any(name in seen for name in names)
        reads += ["residual"] * (node.attrs.get("epilogue") == "add")
        reads += [act] if (act := node.attrs.get("act")) else []
        fresh = [name for name in names if name not in seen]
        seen.update(names)
        format = layout = ""
        for weight in (weights[name] for name in names if len(weights[name].shape) == 2):
            format, layout = weight.format.name, layout_of(weight).name
        sizes = sum(weights[name].nbytes for name in fresh), sum(self.packed[name] for name in fresh)
        return _Row(node.op.removeprefix("fused_"), ", ".join(reads), format, layout, kernel, sizes)

    def _kernel(self, arithmetic: str) -> str:
        return f"{arithmetic} · {self.hardware.isa or 'cpu'}"

    def _token(self) -> Table:
        from hexad.graph.cost import cost, kv_bytes_per_token

        kv_dtype = self.config.resolved_kv_dtype
        total = cost(self.graph, self.graph.weights, rows=1, context=TOKENS, kv_dtype=kv_dtype).total
        kv = kv_bytes_per_token(self.graph, kv_dtype)
        moved = total.weight_bytes + total.kv_read_bytes + total.kv_written_bytes
        return _pairs(
            (
                "arithmetic",
                f"{_count(total.flops)}FLOP: {_count(total.linear_macs)}MAC with weights, "
                f"{_count(total.attention_macs)}MAC in attention",
            ),
            (
                "bytes moved",
                f"{_size(moved)}: {_size(total.weight_bytes)} of weights, "
                f"{_size(moved - total.weight_bytes)} of KV cache",
            ),
            ("KV cache", f"{_size(kv)} a token ({kv_dtype})"),
        )

    def _limits(self) -> Table:
        from hexad.graph.cost import FLOAT_SHARE, cost, limits

        hardware, kv_dtype = self.hardware, self.config.resolved_kv_dtype
        threads = self.config.threads or hardware.cpus
        cpus = f"{threads} thread{'s' * (threads > 1)} on {hardware.cpus} CPU{'s' * (hardware.cpus > 1)}"
        if hardware.bandwidth is None or hardware.int8_rate is None:
            return _pairs(("machine", f"{cpus}; its rates were not measured"))
        decode = cost(self.graph, self.graph.weights, rows=1, context=TOKENS, kv_dtype=kv_dtype)
        prefill = cost(self.graph, self.graph.weights, rows=TOKENS, context=TOKENS, kv_dtype=kv_dtype)
        found = limits(
            decode, prefill, prompt=TOKENS, bandwidth=hardware.bandwidth, int8_rate=hardware.int8_rate
        )
        return _pairs(
            ("machine", f"{cpus}, {hardware.isa}"),
            ("measured", f"{_count(hardware.bandwidth)}B/s read, {_count(hardware.int8_rate)}MAC/s int8"),
            ("decode", f"at most {found.decode:,.0f} tok/s: bandwidth ÷ bytes moved per token"),
            (
                "prefill",
                f"at most {found.prefill:,.0f} tok/s for {TOKENS} tokens: weights at the int8 rate, "
                f"attention at 1/{FLOAT_SHARE} of it",
            ),
        )


@dataclass(frozen=True)
class _Row:
    """One line of the graph. sizes: bytes in the file and packed."""

    op: str
    reads: str
    format: str
    layout: str
    kernel: str
    sizes: tuple[int, int]

    @property
    def bytes(self) -> tuple[str, str]:
        return _size(self.sizes[0]) if self.sizes[0] else "", _size(self.sizes[1]) if self.sizes[1] else ""


def _layers(graph: Graph) -> list[int | None]:
    """The layer of each node, by its weights' names; a node without weights goes with what it reads."""
    layers: list[int | None] = []
    for node in graph.nodes:
        found = {int(match[1]) for name in node.weights if (match := _LAYER.search(name))}
        if not node.weights and node.op != "take_rows":
            found = {layer for value in node.inputs if (layer := layers[value]) is not None}
        layers.append(max(found, default=None))
    return layers


def _short(name: str) -> str:
    """model.layers.0.self_attn.q_proj.weight → q"""
    parts = name.removesuffix(".weight").split(".")
    return "norm" if "norm" in parts[-1] else parts[-1].removesuffix("_proj")


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] → "0–2, 5"; many are shortened: "0, 2, …, 14"."""
    text: list[str] = []
    start = previous = numbers[0]
    for number in [*numbers[1:], -1]:
        if number != previous + 1:
            text.append(str(start) if start == previous else f"{start}–{previous}")
            start = number
        previous = number
    return ", ".join(text if len(text) <= 4 else [*text[:2], "…", text[-1]])


def _pairs(*pairs: tuple[str, str]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, text in pairs:
        table.add_row(f"[dim]{name}[/]", text)
    return table


def _size(count: float) -> str:
    """Bytes: "345 KiB", "28.7 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def _count(count: float) -> str:
    """Numbers, decimal: "134 M", "23.0 G"; the unit follows."""
    for prefix in ("", "k", "M", "G", "T"):
        if count < 1000 or prefix == "T":
            break
        count /= 1000
    return f"{count:.0f} {prefix}" if count >= 100 or not prefix else f"{count:.1f} {prefix}"


def _printable(text: str) -> str:
    """Text out of a file, without what would steer a terminal."""
    return "".join(character if character.isprintable() else "�" for character in text)
