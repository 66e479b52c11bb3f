"""The picture of `hexad bench --plot`: speed over time, and how first tokens and gaps are distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hexad.cli.bench_run import Run, Spread, latencies
from hexad.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 60
"""Points in time of the upper picture."""

OUTPUT, PROMPT, MARK = "#1f6fb4", "#c8ccd2", "#c4432b"


def check(path: Path) -> None:
    """Raises ConfigError if nothing can be drawn here, or not in the format that the path's ending names."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'hexad[plot]'."
        ) from error
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigError(f"--plot {path}: the name must end in one of .{', .'.join(known)}.")


def plot(runs: Sequence[Run], title: str, subtitle: str, path: Path) -> None:
    """Writes the picture, in the format that the path's ending names. Of several runs the upper part shows
    the last. Raises ConfigError where it cannot be written."""
    seconds = latencies(runs)
    _draw(partial(_draw_speed, run=runs[-1]), seconds["ttft"], seconds["itl"], title, subtitle, path)


def plot_arrivals(
    arrivals: Sequence[tuple[float, float]],
    ttft: Sequence[float],
    itl: Sequence[float],
    title: str,
    subtitle: str,
    path: Path,
) -> None:
    """Like `plot`, of (when, how many) tokens that arrived from a server."""
    _draw(partial(_draw_arrivals, arrivals=arrivals), ttft, itl, title, subtitle, path)


def _draw(
    draw_speed: Callable[[Axes], None],
    ttft: Sequence[float],
    itl: Sequence[float],
    title: str,
    subtitle: str,
    path: Path,
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)
    axes = figure.subplot_mosaic([["speed", "speed"], ["ttft", "itl"]])
    axes["speed"].set_title(subtitle, fontsize=10, color="#50565e", parse_math=False)
    draw_speed(axes["speed"])
    _draw_distribution(axes["ttft"], ttft, "time to first token, ms", "requests")
    _draw_distribution(axes["itl"], itl, "time between two tokens, ms", "tokens")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The picture cannot be written to {path}: {error}") from error


def _draw_arrivals(axes: Axes, arrivals: Sequence[tuple[float, float]]) -> None:
    width = max((when for when, _ in arrivals), default=0.0) / BINS or 1.0
    bins = [0.0] * BINS
    for when, tokens in arrivals:
        bins[min(int(when / width), BINS - 1)] += tokens / width
    axes.stairs(bins, [i * width for i in range(BINS + 1)], fill=True, color=OUTPUT)
    axes.set(xlabel="seconds", ylabel="output tokens/s", xlim=(0, BINS * width))
    axes.set_ylim(0, 1.15 * max(bins) or 1.0)
    _plain_frame(axes)


def _draw_speed(axes: Axes, run: Run) -> None:
    width = run.seconds / BINS
    output, prompt = [0.0] * BINS, [0.0] * BINS
    firsts: dict[float, int] = {}
    for times in run.token_times:
        firsts[times[0]] = firsts.get(times[0], 0) + 1
    begin = 0.0
    for step in run.steps:
        # A stream computes a token for each that it draws; all else is of prompts.
        of_prompts = step.computed - (step.drawn - firsts.get(step.end, 0))
        _spread(output, begin / width, step.end / width, step.drawn)
        _spread(prompt, begin / width, step.end / width, of_prompts)
        begin = step.end
    edges = [i * width for i in range(BINS + 1)]
    total = [(a + b) / width for a, b in zip(output, prompt, strict=True)]
    axes.stairs(total, edges, baseline=[a / width for a in output], fill=True, color=PROMPT, label="prompt")
    axes.stairs([a / width for a in output], edges, fill=True, color=OUTPUT, label="output")
    axes.set(xlabel="seconds", ylabel="tokens/s", xlim=(0, run.seconds), ylim=(0, 1.15 * max(total)))
    axes.legend(frameon=False, loc="upper right", ncols=2)
    _plain_frame(axes)


def _spread(bins: list[float], begin: float, end: float, amount: float) -> None:
    """Shares an amount among the bins between two points in time, which are counted in bins."""
    for i in range(int(begin), min(int(end), len(bins) - 1) + 1):
        bins[i] += amount * (min(end, i + 1) - max(begin, i)) / (end - begin)


def _draw_distribution(axes: Axes, seconds: Sequence[float], label: str, of_what: str) -> None:
    """The share of values up to each value: unlike a histogram's, its shape depends on no width of bins."""
    axes.set(xlabel=label, ylabel=f"share of {of_what}", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(lambda share, place: f"{share:.0%}")
    _plain_frame(axes)
    if not seconds:
        return
    ms = [1000 * value for value in seconds]
    axes.ecdf(ms, color=OUTPUT, linewidth=2)
    _, median, p99 = Spread.of(ms)
    for value, share, name in ((median, 0.5, "median"), (p99, 0.99, "p99")):
        axes.plot([value], [share], "o", color=MARK, markersize=5, zorder=3)
        text = f"{name} {value:,.{1 if value < 100 else 0}f} ms"
        axes.annotate(text, (value, share), (8, -12), textcoords="offset points", color=MARK)
    # A few stragglers shall not squeeze all others into a corner; the words need room, too.
    # Without a width of its own, all at 0 ms, the picture still needs one.
    axes.set_xlim(0, min(1.05 * max(ms), 2 * p99 - min(ms)) + 0.25 * p99 or 1.0)


def _plain_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#e8eaed", linewidth=0.8)
    axes.set_axisbelow(True)
