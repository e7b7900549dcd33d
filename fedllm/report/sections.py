"""The sections of a report: which figures and tables stand together."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.events import DataReported, RunStarted
from fedllm.report import diagnostics, figures, groups, personal, privacy, tables
from fedllm.report.citation import bibtex
from fedllm.report.markup import Html, el, folded, joined
from fedllm.report.plot import Figure
from fedllm.report.run_history import RunHistory

Section = tuple[str, Html]


def sections(histories: Sequence[RunHistory]) -> list[Section]:
    """All chapters in order; one that has nothing to show is empty."""
    several = len(histories) > 1
    cost = None if several else tables.cost(histories[0])
    overview = tables.overview(histories) if several else Html("")
    sent = _figures([*figures.traffic(histories), *figures.parts(histories)], tables.spending(histories))
    return [
        ("Results", joined([overview, tables.headline(histories)])),
        ("Training", _figures([*figures.loss(histories), *figures.metrics(histories), *groups.by_group(histories)])),
        ("Clients", _clients(histories)),
        ("Updates", _updates(histories)),
        ("Privacy", _privacy(histories)),
        ("Communication", sent),
        ("Data", _data(histories)),
        ("Time", joined([_figures(figures.seconds(histories), cost), *_numbers(histories)])),
        ("Failures and warnings", joined([_troubles(history, named=several) for history in histories])),
        ("Settings", _settings(histories)),
        ("Reproduce and cite", _reproduce(histories)),
    ]


def _figures(drawn: Sequence[Figure], beside: Html | None = None) -> Html:
    """Figures in a grid, with something beside the last; each has its data in the element after its place."""
    shown = [
        el(
            "figure",
            el("figcaption", el("b", picture.title), picture.note),
            el("div.plot", attrs={"role": "img", "aria-label": f"{picture.title}. {picture.note}"}),
            el("script", picture.json(), attrs={"type": "application/json"}),
        )
        for picture in drawn
    ]
    cells = [*shown, beside] if beside else shown
    return el("div.figures", *cells) if cells else Html("")


def _troubles(history: RunHistory, *, named: bool) -> Html:
    return joined([el("h3", history.label) if named else Html(""), tables.troubles(history)])


def _numbers(histories: Sequence[RunHistory]) -> list[Html]:
    found = [(history.label, tables.rounds(history)) for history in histories]
    return [folded(f"Every round of {label} in numbers", body) for label, body in found if body]


def _clients(histories: Sequence[RunHistory]) -> Html:
    several = len(histories) > 1
    gains = [] if several else [tables.gains(histories[0])]
    split = [] if several else groups.by_client_and_group(histories[0])
    drawn = _figures([*personal.gains(histories), *figures.clients(histories), *split])
    own = [part for history in histories for part in personal.numbers(history, named=several)]
    return joined([*gains, drawn, *tables.worst(histories), *own])


def _updates(histories: Sequence[RunHistory]) -> Html:
    """What the server saw of them, round by round."""
    several = len(histories) > 1
    told = [(history.label, text) for history in histories if (text := diagnostics.absence(history))]
    found = [(history.label, body) for history in histories if (body := diagnostics.numbers(history))]
    return joined(
        [
            *(el("p", f"{label}: {text}" if several else text) for label, text in told),
            _figures(diagnostics.figures(histories)),
            *(folded(f"What the updates of {label} showed in numbers", body) for label, body in found),
        ]
    )


def _privacy(histories: Sequence[RunHistory]) -> Html:
    """In words first, of several runs in pictures first; empty where no run promises anything."""
    drawn, facts, words = privacy.chapter(histories)
    seen = [_figures(drawn, facts if len(histories) == 1 else None), facts if len(histories) > 1 else Html("")]
    several = len(histories) > 1
    return joined([*([] if several else words), *seen, *(words if several else []), *map(privacy.numbers, histories)])


def _data(histories: Sequence[RunHistory]) -> Html:
    """One block per distinct partition."""
    found = [(history.label, data) for history in histories if (data := history.last(DataReported))]
    distinct: list[tuple[list[str], DataReported]] = []
    for label, data in found:
        same = next((labels for labels, other in distinct if other == data), None)
        if same is None:
            distinct.append(([label], data))
        else:
            same.append(label)
    titles = [el("h3", ", ".join(labels)) if len(distinct) > 1 else Html("") for labels, _ in distinct]
    return joined(
        [
            joined([title, _figures(figures.partition(data), tables.records(data))])
            for title, (_, data) in zip(titles, distinct, strict=True)
        ]
    )


def _settings(histories: Sequence[RunHistory]) -> Html:
    several = len(histories) > 1
    texts = [
        folded(f"All settings of {history.label}" if several else "All settings, every default written out",
               el("pre", history.settings))
        for history in histories
        if history.settings
    ]  # fmt: skip
    return joined([tables.differences(histories) if several else Html(""), *texts, tables.versions(histories)])


def _reproduce(histories: Sequence[RunHistory]) -> Html:
    started = [found for history in histories if (found := history.last(RunStarted))]
    hashes = ", ".join(dict.fromkeys(found.experiment_hash[:8] for found in started))
    where = "In the run's folder" if len(histories) == 1 else "In each run's folder"
    versions = dict.fromkeys(str(found.versions["fedllm"]) for found in started if "fedllm" in found.versions)
    return joined(
        [
            el("p", f"{where}; the same settings give the same experiment hash ({hashes or 'not recorded'})."),
            el("pre", "fedllm run experiment.yaml"),
            el("h3", "How to cite"),
            el("pre", bibtex(", ".join(versions) or None)),
        ]
    )
