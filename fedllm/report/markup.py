"""HTML from values. Every string is escaped unless it is already `Html`."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter

from fedllm.report.formatting import NOTHING

_NUMBER = re.compile(rf"{NOTHING}|[+-]?\d[\d,.]*(e[+-]?\d+)?( (B|[KMGT]iB|ms|s|min|h|%)( \d+ (s|min))?)?")


class Html(str):
    """Text that is already HTML."""


def escaped(text: str) -> Html:
    """`text` with the characters that mean something in HTML replaced."""
    return text if isinstance(text, Html) else Html(html.escape(text))


def joined(parts: Sequence[str]) -> Html:
    """Several pieces, one after the other."""
    return Html("".join(escaped(part) for part in parts))


def el(name: str, *children: str, attrs: Mapping[str, str] | None = None) -> Html:
    """One element; "td.number" is a td of class number. Children that are plain strings are escaped."""
    tag, *classes = name.split(".")
    pairs = {"class": " ".join(classes)} if classes else {}
    written = "".join(f' {key}="{html.escape(value)}"' for key, value in {**pairs, **(attrs or {})}.items())
    return Html(f"<{tag}{written}>{joined(children)}</{tag}>")


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, figures: bool = True) -> Html:
    """A table whose first column names the rows, once for a group of rows. With `figures`, columns that hold
    nothing but numbers are set flush right. A wide table names the column in each cell: a narrow screen shows its rows
    as lists."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(head)
    numeric = [figures and bool(column) and all(_NUMBER.fullmatch(cell) for cell in column) for column in columns]
    names = ["th", *("th.number" if number else "th" for number in numeric[1:])]
    wide = len(head) > 3
    top = [el(name, title, attrs={"scope": "col"}) for name, title in zip(names, head, strict=True)]
    body = []
    for first, group in groupby(rows, key=itemgetter(0)):
        members = list(group)
        scope = {"scope": "rowgroup", "rowspan": str(len(members))} if len(members) > 1 else {"scope": "row"}
        for place, (_, *others) in enumerate(members):
            cells = [
                el("td.number" if big else "td", cell, attrs={"data-column": title} if wide else None)
                for big, title, cell in zip(numeric[1:], head[1:], others, strict=True)
            ]
            named = {**scope, "data-column": head[0]} if wide else scope
            body.append(el("tr", *([] if place else [el("th", first, attrs=named)]), *cells))
    whole = el(
        "table.wide" if wide else "table", el("caption", caption), el("thead", el("tr", *top)), el("tbody", *body)
    )
    return el("div.scroll", whole, attrs={"tabindex": "0", "role": "region", "aria-label": caption})


def pairs(items: Sequence[tuple[str, str, str]]) -> Html:
    """Names, values and a remark on each (or "") as a description list."""
    return el("dl", *(el("div", el("dt", name), el("dd", value, el("small", remark))) for name, value, remark in items))


def folded(title: str, *children: str) -> Html:
    """Something that opens on demand."""
    return el("details", el("summary", title), *children)
