"""`hexad bench --profile`: what each kind of op takes of a run, and how near the machine's limit that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from hexad.backends.backend import OpTime, Profile
from hexad.cli.bench_run import Run, Work

if TYPE_CHECKING:
    from hexad.cli.bench import Machine
    from hexad.graph import Graph, Node


@dataclass(frozen=True, slots=True)
class Part:
    """All ops of one kind in a phase. bytes, macs: what the cost model has the phase read and multiply there.
    least_seconds: what that takes at best."""

    name: str
    time: OpTime
    bytes: int = 0
    macs: int = 0
    least_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of one or more runs. parts: sum up to seconds. least_seconds: of all the work at once."""

    name: str
    steps: int
    seconds: float
    least_seconds: float
    parts: Sequence[Part]

    @classmethod
    def of(cls, name: str, runs: Sequence[Run], stretch: slice, needed: Work, machine: Machine) -> Phase:
        """Between two of each run's three marks: its begin, the last of the first tokens, its end. stretch:
        which of the marks. needed: what one run needs."""
        needed = Work(*(len(runs) * count for count in needed))
        seconds, steps, profiles = 0.0, 0, []
        for run in runs:
            times: Sequence[float] = (0.0, run.last_first_token, run.seconds)
            begin, *_, end = times[stretch]
            seconds += end - begin
            steps += sum(begin < step.end <= end for step in run.steps)
            profiles.append((run.profiles[stretch][0], run.profiles[stretch][-1]))
        profile = _between(profiles)
        parts = {part.name: part for part in _of_nodes(profile, needed, machine)}
        parts |= {name: Part(name, time) for name, time in profile.others.items()}
        ops = sum(part.time.seconds for part in parts.values())
        native = profile.calls.seconds
        rest = [
            Part("begin and end of calls", OpTime(profile.calls.runs, 0, native - ops)),
            Part("Python between calls", OpTime(profile.calls.runs, 0, seconds - native)),
        ]
        return cls(name, steps, seconds, machine.least_seconds(needed), [*parts.values(), *rest])

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "phase": self.name,
            "steps": self.steps,
            "seconds": self.seconds,
            "limit_seconds": self.least_seconds,
            "parts": [
                {
                    "name": part.name,
                    "runs": part.time.runs,
                    "barriers": part.time.barriers,
                    "seconds": part.time.seconds,
                    "waited_seconds": part.time.waited,
                    "bytes": part.bytes,
                    "macs": part.macs,
                    "limit_seconds": part.least_seconds,
                }
                for part in self.parts
            ],
        }

    def lines(self) -> list[str]:
        """A table, per step."""
        title = f"{self.name}, {self.steps:,} step{'s' * (self.steps > 1)}"
        columns = ("ms", "%", "waiting %", "barriers", "MB", "GB/s", "GMAC/s", "limit %")
        lines = ["", f"{title:<32}" + "".join(f"{column:>10}" for column in columns)]
        times = [part.time for part in self.parts]
        total = Part(
            "all",
            reduce(OpTime.plus, times)._replace(seconds=self.seconds),
            sum(part.bytes for part in self.parts),
            sum(part.macs for part in self.parts),
            self.least_seconds,
        )
        return lines + [self._line(part) for part in (*self.parts, total)]

    def _line(self, part: Part) -> str:
        time, seconds = part.time, part.time.seconds or 1e-9
        values = [
            f"{1e3 * time.seconds / self.steps:.3f}",
            f"{100 * time.seconds / self.seconds:.1f}",
            f"{100 * time.waited / seconds:.0f}" if time.barriers else "",
            f"{time.barriers / self.steps:.0f}" if time.barriers else "",
            f"{part.bytes / 1e6 / self.steps:,.2f}" if part.bytes else "",
            f"{part.bytes / 1e9 / seconds:.1f}" if part.bytes else "",
            f"{part.macs / 1e9 / seconds:,.0f}" if part.macs else "",
            f"{100 * part.least_seconds / seconds:.0f}" if part.least_seconds else "",
        ]
        return f"{part.name:<32}" + "".join(f"{value:>10}" for value in values)


def _between(stretches: Iterable[tuple[Profile, Profile]]) -> Profile:
    """What was added to the first of each two profiles until the second was taken, over all of them."""
    differences = []
    for before, after in stretches:
        both = [[*p.nodes, *p.others.values(), p.calls] for p in (before, after)]
        differences.append([new.plus(old, -1) for old, new in zip(*both, strict=True)])
    sums = [reduce(OpTime.plus, column) for column in zip(*differences, strict=True)]
    *times, calls = (time._replace(waited=min(time.waited, time.seconds)) for time in sums)
    nodes = len(after.nodes)
    return Profile(times[:nodes], dict(zip(after.others, times[nodes:], strict=True)), calls)


def _of_nodes(profile: Profile, needed: Work, machine: Machine) -> Iterable[Part]:
    found: dict[str, Part] = {}
    for (name, cost), time in zip(machine.nodes, profile.nodes, strict=True):
        part = found.get(name, Part(name, OpTime()))
        found[name] = Part(
            name,
            part.time.plus(time),
            part.bytes + needed.moved(cost),
            part.macs + needed.macs(cost),
            part.least_seconds + machine.least_seconds(needed, cost),
        )
    return found.values()


def kinds(graph: Graph) -> list[str]:
    """What a node has in common with its likes, of every node: "gate+up Q4_0", "attention"."""
    return [_kind(graph, node) for node in graph.nodes]


def _kind(graph: Graph, node: Node) -> str:
    matrices = [name for name in node.weights if len(graph.weights[name].shape) == 2]
    formats = "/".join(dict.fromkeys(graph.weights[name].format.name for name in matrices))
    title = node.op.removeprefix("fused_")
    if title == "linear":
        modules = (name.removesuffix(".weight").rpartition(".")[2] for name in matrices)
        title = "+".join(module.removesuffix("_proj") for module in modules)
    return f"{title} {formats}".strip()
