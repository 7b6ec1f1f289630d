"""Plots as SVG for one HTML page: the page's own colours and font, the same bytes every time."""

import contextlib
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Matplotlib knows no CSS variables: each stand-in below is replaced by var(--name) in the SVG, so
# that a plot follows the page into dark mode.
_SERIES = ("series-1", "series-2", "series-3", "series-4")
_STAND_INS = {
    name: f"#010a{i:02}" for i, name in enumerate(("ink", "soft", "line", "quiet", *_SERIES), 1)
}
_DASHES = ["-", "--", ":", "-."]
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": _STAND_INS["ink"],
    "axes.labelcolor": _STAND_INS["soft"],
    "axes.edgecolor": _STAND_INS["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _STAND_INS["line"],
    "grid.linewidth": 0.6,
    "xtick.color": _STAND_INS["line"],
    "ytick.color": _STAND_INS["line"],
    "xtick.labelcolor": _STAND_INS["soft"],
    "ytick.labelcolor": _STAND_INS["soft"],
    "legend.frameon": False,
}
_WIDTH = 5.2  # inches; narrow, so that text stays legible when a phone scales the plot down

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # label -> x, y


def bars(
    title: str,
    values: Mapping[str, float],
    *,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    highlight: str | None = None,
    label: str = "{:.3f}",
) -> str:
    """Draws one horizontal bar a label, from top to bottom, with whiskers where it has an interval.

    The title names the plot for those who cannot see it, here and below. The bar of the label
    `highlight` stands out; `label` is the format of the value beside each bar.
    """
    with _axes(title, 0.5 + 0.32 * len(values)) as axes:
        positions = np.arange(len(values))
        colours = [
            _STAND_INS["series-1" if highlight in (None, name) else "quiet"] for name in values
        ]
        axes.barh(positions, list(values.values()), height=0.62, color=colours)
        for position, (name, value) in zip(positions, values.items(), strict=True):
            low, high = (intervals or {}).get(name, (value, value))
            if high > low:
                axes.plot([low, high], [position] * 2, color=_STAND_INS["ink"], linewidth=1.3)
            axes.annotate(
                label.format(value),
                (high, position),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=_STAND_INS["ink"],
            )
        axes.set_yticks(positions, list(values))
        axes.tick_params(axis="y", length=0, labelcolor=_STAND_INS["ink"])
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        return _svg(axes, title)


def lines(
    title: str,
    series: Series,
    *,
    xlabel: str,
    ylabel: str,
    smooth: bool = True,
    bands: Mapping[str, Sequence[float]] | None = None,
    marks: Sequence[float] = (),
    logarithmic: bool = False,
) -> str:
    """Draws one line a series; if `smooth`, a long one faintly, with its moving mean on top.

    A label with a band has it on both sides of its line. `marks` are upright lines. Where a value
    is above 0, `logarithmic` draws y so.
    """
    with _axes(title, 2.9) as axes:
        positive: list[float] = []
        for i, (name, (x, y)) in enumerate(series.items()):
            colour, dash = _STAND_INS[_SERIES[i % 4]], _DASHES[i // 4 % 4]
            x, y = np.asarray(x, float), np.asarray(y, float)
            half = np.asarray((bands or {}).get(name, np.zeros(len(y))), float)
            positive += y[y > 0].tolist()
            window = len(y) // 20
            if smooth and window > 1:
                axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
                mean = np.full(window, 1 / window)
                y, half = (np.convolve(each, mean, mode="valid") for each in (y, half))
                x = x[(window - 1) // 2 :][: len(y)]
            marker = "o" if len(y) < 12 else None
            axes.plot(x, y, dash, color=colour, linewidth=1.7, marker=marker, ms=3.5, label=name)
            if half.any():
                axes.fill_between(x, y - half, y + half, color=colour, alpha=0.16, linewidth=0)
        for mark in marks:
            axes.axvline(mark, color=_STAND_INS["quiet"], linewidth=0.9, linestyle=":")
        axes.xaxis.get_major_locator().set_params(integer=True)  # Steps, or queries.
        if logarithmic and positive:
            axes.set_yscale("log", nonpositive="mask")
            # Whole decades, named in plain text: the page has no mathematics.
            low, high = np.floor(np.log10(min(positive))), np.ceil(np.log10(max(positive)))
            axes.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        return _with_labels(axes, title, xlabel, ylabel, legend=len(series) > 1)


def histogram(
    title: str, samples: Mapping[str, Sequence[float]], *, xlabel: str, ylabel: str = "share"
) -> str:
    """Draws the distribution of each sample as the share in 20 equal bins, its mean as a tick."""
    with _axes(title, 2.9) as axes:
        together = np.concatenate([np.asarray(values, float) for values in samples.values()])
        low, high = min(0.0, together.min()), together.max()
        edges = np.linspace(low, high if high > low else low + 1, 21)
        for i, (name, values) in enumerate(samples.items()):
            shares, _ = np.histogram(values, edges)
            shares = shares / max(1, len(values))
            colour, dash = _STAND_INS[_SERIES[i % 4]], _DASHES[i // 4 % 4]
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.16)
            axes.stairs(shares, edges, color=colour, linewidth=1.5, linestyle=dash, label=name)
            axes.plot(np.mean(values), 0, marker="^", ms=8, color=colour, clip_on=False, zorder=5)
        axes.set_ylim(bottom=0)
        return _with_labels(axes, title, xlabel, ylabel, legend=len(samples) > 1)


@contextlib.contextmanager
def _axes(title: str, height: float) -> Iterator[Any]:
    """Matplotlib's axes to draw on, in the page's style."""
    # Matplotlib takes half a second to import, and a program draws at its end.
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The salt makes the ids repeat from run to run and differ between plots of one page.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure.add_subplot()


def _with_labels(axes: Any, title: str, xlabel: str, ylabel: str, legend: bool) -> str:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y")
    if legend:
        longest = max(len(name) for name in axes.get_legend_handles_labels()[1])
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=2 if longest > 14 else 3,
            borderaxespad=0.2,
            handlelength=1.6,
            columnspacing=1.4,
        )
    return _svg(axes, title)


def _svg(axes: Any, title: str) -> str:
    buffer = io.StringIO()
    axes.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg ") :]
    for noise in (
        r"\s*<metadata>.*?</metadata>",
        r"\s*<style.*?</style>",
        r' id="(?![mp][0-9a-f]{10}")[^"]*"',  # names of groups, alike in every plot
        r" font-family: [^;]+;",  # the page's font instead
    ):
        svg = re.sub(noise, "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    for name, colour in _STAND_INS.items():
        svg = svg.replace(colour, f"var(--{name})")
    box = re.search(r'viewBox="[^"]+"', svg).group()
    head = f'<svg role="img" aria-label="{html.escape(title)}" {box}>'
    return head + svg[svg.index(">") + 1 :]
