"""The table and the picture of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.compare.works import WORKS

Session = Mapping[str, Any]
COLOURS = {"hexad": "#1f6fb4", "peer": "#c8ccd2", "limit": "#c4432b"}


def table(sessions: Sequence[Session], settings: Mapping[str, int]) -> str:
    """Medians of each engine's latest session for each work; hexad's, and the limit, of the latest one."""
    works = [work for work in WORKS if _latest(sessions, "hexad", work)]
    rows: list[list[object]] = []
    for label in _labels(sessions):
        cells = [_cell(sessions, label, work) for work in works]
        facts = next(s["engines"][label] for s in reversed(sessions) if label in s["engines"])
        weights = facts["weights"]["name"].rpartition(".")[2]
        peaks = [facts["peak_bytes_alone"]]
        if _latest(sessions, label, "batch"):
            peaks.append(max(s["engines"][label]["peak_bytes"] for s in sessions if label in s["engines"]))
        memory = " / ".join(f"{peak / 1e6:,.0f}" for peak in peaks)
        rows.append([f"{label} {facts['version']}", weights, *cells, f"{facts['load_seconds']:.1f}", memory])
        if label == "hexad":
            fractions = [f"{_speed(sessions, label, w) / _limit(sessions, w):.0%}" for w in works]
            rows.append(["hexad ÷ the limit", "", *fractions, "", ""])
    rows.append(["the limit", "", *(f"{_limit(sessions, work):,.0f}" for work in works), "", ""])
    titles = [_title(work, settings) for work in works]
    header = ["engine", "weights", *titles, "load, s", "peak MB, one / batch"]
    runs = sorted(
        {
            len(engine[work])
            for s in sessions
            for engine in s["engines"].values()
            for work in works
            if work in engine
        }
    )
    return f"{report.table(header, rows)}\n\ntok/s, medians of {'/'.join(map(str, runs))} rounds"


def picture(sessions: Sequence[Session], settings: Mapping[str, int], title: str, path: Path) -> str:
    """Writes it, a bar for each engine and a line for the limit; returns what to tell the user."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: matplotlib is not installed (pip install 'hexad[plot]')"
    works = [work for work in WORKS if _latest(sessions, "hexad", work)]
    labels = _labels(sessions)[::-1]
    figure = Figure(figsize=(4.2 * len(works), 1.4 + 0.45 * len(labels)), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
    for axes, work in zip(figure.subplots(1, len(works), squeeze=False)[0], works, strict=True):
        speeds = [
            _speed(sessions, label, work) if _latest(sessions, label, work) else 0.0 for label in labels
        ]
        colours = [COLOURS["hexad" if label == "hexad" else "peer"] for label in labels]
        bars = axes.barh(labels, speeds, color=colours)
        axes.bar_label(bars, [f"{speed:,.0f}" if speed else "–" for speed in speeds], padding=3)
        limit = _limit(sessions, work)
        axes.axvline(limit, color=COLOURS["limit"], label=f"limit {limit:,.0f}")
        axes.set_title(_title(work, settings), fontsize=10)
        axes.set_xlim(0, 1.15 * max(limit, *speeds))
        axes.legend(frameon=False, loc="lower right", labelcolor=COLOURS["limit"], handlelength=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="#e8eaed", linewidth=0.8)
        if work != works[0]:
            axes.set_yticklabels([])
    figure.savefig(path)
    return f"drawn in {path}"


def _title(work: str, settings: Mapping[str, int]) -> str:
    return {
        "prefill": f"prefill {settings['prefill']}",
        "decode": f"decode {settings['decode']}",
        "batch": f"{settings['requests']} requests",
    }[work]


def _labels(sessions: Sequence[Session]) -> list[str]:
    """hexad first, the others in the order in which they were measured first."""
    return list(dict.fromkeys(label for session in sessions for label in session["engines"]))


def _latest(sessions: Sequence[Session], label: str, work: str) -> Session | None:
    return next((s for s in reversed(sessions) if s["engines"].get(label, {}).get(work)), None)


def _speed(sessions: Sequence[Session], label: str, work: str) -> float:
    session = _latest(sessions, label, work)
    assert session is not None
    return statistics.median(session["engines"][label][work])


def _limit(sessions: Sequence[Session], work: str) -> float:
    session = _latest(sessions, "hexad", work)
    assert session is not None
    return statistics.median(session["limits"][work])


def _cell(sessions: Sequence[Session], label: str, work: str) -> str:
    """Its median, and of a peer how much faster hexad was in the same rounds."""
    session = _latest(sessions, label, work)
    if session is None:
        return "–"
    speed = statistics.median(session["engines"][label][work])
    if label == "hexad":
        return f"{speed:,.0f}"
    return f"{speed:,.0f} ({statistics.median(session['engines']['hexad'][work]) / speed:.2f}×)"
