"""One self-contained HTML page about one run or several.

No request leaves the page: the drawing library and the style stand in it, and a content security policy names the two
scripts that may run by their hashes, so that nothing from a run's data could ever become code.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from fedllm.errors import not_written
from fedllm.events import RunStarted
from fedllm.report import tables
from fedllm.report.formatting import figure, labelled
from fedllm.report.markup import Html, el, pairs
from fedllm.report.run_history import RunHistory, load_all
from fedllm.report.sections import sections
from fedllm.report.style import SCRIPT, STYLE


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page about `runs` (run folders) to the file `out` and return it.

    Raises RunError where a folder is no run folder, or the file cannot be written.
    """
    page = render(load_all(runs))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise not_written(out, error) from error
    return out


def render(histories: Sequence[RunHistory]) -> str:
    """The whole page."""
    chosen = [(title, body) for title, body in sections(histories) if body]
    library = _plotly()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
        f"script-src '{_hash(library)}' '{_hash(SCRIPT)}'; base-uri 'none'; form-action 'none'"
    )
    links = [el("a", title, attrs={"href": f"#{_anchor(title)}"}) for title, _ in chosen]
    chapters = [el("section", el("h2", title), body, attrs={"id": _anchor(title)}) for title, body in chosen]
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        el("title", _title(histories)),
        el("style", Html(STYLE)),
    ]
    body = [
        el("header", *_opening(histories), el("nav", *links, attrs={"aria-label": "Sections"})),
        el("noscript", el("p.kind", "The figures need JavaScript; every number is in the tables.")),
        el("main", *chapters),
        el("footer", "Made by fedllm from the run's own event log. Rounds are counted from 1."),
        el("script", Html(library)),
        el("script", Html(SCRIPT)),
    ]
    return "<!doctype html>\n" + el("html", el("head", *head), el("body", *body), attrs={"lang": "en"}) + "\n"


def _plotly() -> str:
    """The drawing library's source. Imported here, because it is needed for nothing else."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _title(histories: Sequence[RunHistory]) -> str:
    names = [_name(history) for history in histories]
    models = list(dict.fromkeys(history.model for history in histories))
    return f"{', '.join(dict.fromkeys(names))} \N{EM DASH} {', '.join(models)}"


def _name(history: RunHistory) -> str:
    started = history.last(RunStarted)
    return started.name if started else history.label


def _opening(histories: Sequence[RunHistory]) -> list[Html]:
    models = " and ".join(dict.fromkeys(history.model for history in histories))
    if len(histories) > 1:
        names = " and ".join([", ".join(history.label for history in histories[:-1]), histories[-1].label])
        return [el("p.kind", f"fedllm report, {len(histories)} runs"), el("h1", models), el("p.lede", names)]
    history = histories[0]
    started = history.last(RunStarted)
    facts = [models, tables.ending(history)]
    if started:
        facts += [f"{figure(started.clients)} clients", f"{figure(started.trainable)} trainable parameters"]
        facts += [f"{started.engine} engine", f"experiment {started.experiment_hash[:8]}"]
    lede = el("p.lede", " \N{MIDDLE DOT} ".join(facts))
    return [el("p.kind", "fedllm report"), el("h1", _name(history)), lede, _key_figures(history)]


def _key_figures(history: RunHistory) -> Html:
    found = history.evaluations
    items: list[tuple[str, str, str]] = []
    if "federated" in found:
        metrics = found["federated"].metrics
        for name in [name for name in metrics if "/" not in name][:2]:
            before = found["base"].metrics.get(name) if "base" in found else None
            items.append((labelled(name), figure(metrics[name]), "" if before is None else f"base {figure(before)}"))
    costs = tables.costs(history)
    wanted = ("sent up", "sent down", "time", "tokens per second", "share of the matrix peak", "epsilon")
    return pairs(items + [(name, costs[name], "") for name in wanted if name in costs])
