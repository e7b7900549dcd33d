"""Figures as plain data in plotly's schema: colours, traces, axes, and the JSON that stands in the page.

Nothing here imports plotly. Texts that come from data are escaped, because plotly reads tags in labels; values that are
not finite never get into a figure.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.report.formatting import finite
from fedllm.report.markup import Html

Trace = dict[str, Any]

# Mid-tones that can be told apart on white and on near-black, also with a colour vision deficiency.
PALETTE = (
    "#4477aa", "#dd8833", "#2f9e77", "#a05fb0", "#cc5566", "#3fa7c4",
    "#a39a35", "#8c6d5a", "#6f7fd0", "#d077a5", "#6aa84f", "#8a9099",
)  # fmt: skip
SHADE = {
    "base": "#8a9099",
    "local_only": "#dd8833",
    "fedavg": "#a05fb0",
    "federated": "#4477aa",
    "centralised": "#2f9e77",
}
DASHES = ("solid", "dash")
_OVER_ROUNDS = "%{fullData.name}<br>round %{x}: %{y:.5~g}<extra></extra>"


@dataclass(frozen=True)
class Figure:
    """A picture and the words that go with it: `title` names it, `note` says how to read it."""

    title: str
    note: str
    traces: tuple[Trace, ...]
    layout: Mapping[str, Any]

    @property
    def data(self) -> dict[str, Any]:
        """What plotly draws."""
        return {"data": list(self.traces), "layout": dict(self.layout)}

    def json(self) -> Html:
        """`data` as JSON that cannot end the script element it stands in. Raises ValueError for NaN."""
        text = json.dumps(self.data, allow_nan=False, separators=(",", ":"))
        for char in "<>&\u2028\u2029":
            text = text.replace(char, f"\\u{ord(char):04x}")
        return Html(text)


def colour(index: int) -> str:
    """The colour of the run, client or label with this number."""
    return PALETTE[index % len(PALETTE)]


def plain(text: str, *, limit: int = 36) -> str:
    """Text that plotly shows as it is, shortened in the middle."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}…{text[len(text) - limit // 2 + 1 :]}"
    return html.escape(text, quote=False)


def line(
    name: str, points: Mapping[int, float | None], *, shade: str, dash: str = "solid", thin: bool = False
) -> Trace:
    """A line through the finite points, with markers where there are few; a single point always has one."""
    xs = [x for x, y in points.items() if finite(y)]
    marked = len(xs) == 1 or (len(xs) <= 25 and dash == "solid" and not thin)
    return {
        "type": "scatter",
        "mode": "lines+markers" if marked else "lines",
        "name": plain(name),
        "x": xs,
        "y": [points[x] for x in xs],
        "hovertemplate": _OVER_ROUNDS,
        "line": {"color": shade, "width": 1.2 if thin else 2, "dash": dash},
        "marker": {"size": 5},
        "opacity": 0.75 if thin else 1,
    }


def level(name: str, value: float, *, shade: str) -> Trace:
    """A horizontal line to compare with, one of the `levels` of `over_rounds`, which sets its ends."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": plain(name),
        "x": [],
        "y": [value, value],
        "hovertemplate": "%{fullData.name}: %{y:.5~g}<extra></extra>",
        "line": {"color": shade, "width": 1.5, "dash": "dot"},
    }


def columns(name: str, values: Mapping[int, float], *, shade: str) -> Trace:
    """Upright bars over rounds."""
    kept = {x: y for x, y in values.items() if finite(y)}
    return {
        "type": "bar", "name": plain(name), "x": list(kept), "y": list(kept.values()),
        "marker": {"color": shade}, "hovertemplate": _OVER_ROUNDS,
    }  # fmt: skip


def bars(name: str, rows: Sequence[str], values: Mapping[str, float], *, shade: str) -> Trace:
    """Lying bars, one a row; rows stand at 0, 1, ... so that two long names are never one."""
    places = [(place, row) for place, row in enumerate(rows) if finite(values.get(row))]
    return {
        "type": "bar",
        "orientation": "h",
        "name": plain(name),
        "y": [place for place, _ in places],
        "x": [values[row] for _, row in places],
        "customdata": [plain(row, limit=80) for _, row in places],
        "hovertemplate": "%{customdata}<br>%{fullData.name}: %{x:.5~g}<extra></extra>",
        "marker": {"color": shade},
    }


def matrix(rows: Sequence[str], values: Sequence[Sequence[float | None]]) -> Trace:
    """A square of values in [-1, 1], a row and a column for each name; None stays empty."""
    names = [plain(row, limit=80) for row in rows]
    return {
        "type": "heatmap",
        "x": list(range(len(rows))),
        "y": list(range(len(rows))),
        "z": [list(row) for row in values],
        "customdata": [[[one, other] for other in names] for one in names],
        "hovertemplate": "%{customdata[0]}, %{customdata[1]}: %{z:.3f}<extra></extra>",
        "texttemplate": "%{z:.2f}" if len(rows) <= 8 else "",
        "hoverongaps": False,
        "zmin": -1,
        "zmax": 1,
        "colorscale": [[0, "#cc5566"], [0.5, "rgba(138,144,153,0.12)"], [1, "#4477aa"]],
        "xgap": 2,
        "ygap": 2,
        "colorbar": {"thickness": 10, "outlinewidth": 0, "tickvals": [-1, 0, 1]},
    }


def squared(title: str, note: str, trace: Trace, *, rows: Sequence[str]) -> Figure:
    """A matrix with its names on both axes; the first row is on top."""
    axis = {"tickvals": list(range(len(rows))), "ticktext": [plain(row, limit=16) for row in rows], "showgrid": False}
    upright = {**axis, "range": [len(rows) - 0.5, -0.5]}
    return Figure(title, note, (trace,), _layout(axis, upright, height=140 + 22 * len(rows) + 60, legend=False))


def over_rounds(
    title: str,
    note: str,
    traces: Sequence[Trace],
    *,
    levels: Sequence[Trace] = (),
    unit: str = "",
    from_zero: bool = False,
    legend: bool = False,
) -> Figure:
    """A figure whose x axis counts rounds, from the first to the last that has a point. `levels` cross all of it. It
    has a legend if `legend` is set or if there are several lines."""
    first, last = _span(traces)
    across: dict[str, Any] = {"title": {"text": "round"}, "range": [first, last]}
    if last - first <= 9:
        across["dtick"] = 1
    drawn = (*traces, *({**trace, "x": [first, last]} for trace in levels))
    positive = all(y >= 0 for trace in drawn for y in trace["y"])
    mode = "tozero" if from_zero else "nonnegative" if positive else "normal"
    upright = {"title": {"text": plain(unit)}, "rangemode": mode}
    height = 320 + 12 * max(0, len(drawn) - 5)  # a narrow screen's legend has a row for two names or for one
    return Figure(title, note, drawn, _layout(across, upright, height=height, legend=legend or len(drawn) > 1))


def _span(traces: Sequence[Trace]) -> tuple[float, float]:
    """The ends of the round axis: all points with a little room, half a round beside bars and a single point."""
    rounds = [x for trace in traces for x in trace["x"]] or [0]
    first, last = min(rounds), max(rounds)
    wide = first == last or any(trace["type"] == "bar" for trace in traces)
    room = 0.5 if wide else 0.03 * (last - first)
    return first - room, last + room


def by_rows(
    title: str,
    note: str,
    traces: Sequence[Trace],
    *,
    rows: Sequence[str],
    unit: str = "",
    stacked: bool = False,
    legend: bool = False,
) -> Figure:
    """A figure with one lying bar, or group of bars, for each row; the first row is on top. `legend` as in
    `over_rounds`."""
    deep = len(rows) * (26 if stacked else 12 + 12 * len(traces))
    upright: dict[str, Any] = {"range": [len(rows) - 0.4, -0.6], "showgrid": False}
    if len(rows) <= 40:
        upright |= {"tickvals": list(range(len(rows))), "ticktext": [plain(row, limit=24) for row in rows]}
    else:
        upright |= {"showticklabels": False, "title": {"text": f"{len(rows)} rows, names on hover"}}
    layout = _layout(
        {"title": {"text": plain(unit)}, "rangemode": "tozero"},
        upright,
        height=130 + min(deep, max(430, 18 * min(len(rows), 40))),
        legend=legend or len(traces) > 1,
    )
    return Figure(title, note, tuple(traces), {**layout, "barmode": "stack" if stacked else "group"})


def _layout(across: Mapping[str, Any], upright: Mapping[str, Any], *, height: int, legend: bool) -> dict[str, Any]:
    """Transparent, without gestures that would fight with scrolling; the page's style sheet sets inks and grids."""
    axis = {
        "fixedrange": True,
        "automargin": True,
        "zeroline": False,
        "gridcolor": "#888",
        "ticklabelstandoff": 6,
        "exponentformat": "power",
        "minexponent": 5,
    }
    return {
        "height": height,
        "margin": {"l": 48, "r": 12, "t": 12, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "dragmode": False,
        "hovermode": "closest",
        "bargap": 0.25,
        "showlegend": legend,
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "traceorder": "normal",
        },
        "xaxis": {**axis, **across},
        "yaxis": {**axis, **upright},
    }
