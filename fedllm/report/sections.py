"""The sections of a report: which figures and tables stand together."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.events import DataReported, RunStarted
from fedllm.report import diagnostics, figures, groups, tables
from fedllm.report.citation import bibtex
from fedllm.report.markup import Html, el, folded, joined
from fedllm.report.plot import Figure
from fedllm.report.run_history import RunHistory

Section = tuple[str, Html]


def sections(stories: Sequence[RunHistory]) -> list[Section]:
    """All chapters in order; one that has nothing to show is empty."""
    several = len(stories) > 1
    cost = None if several else tables.cost(stories[0])
    overview = tables.overview(stories) if several else Html("")
    sent = _figures([*figures.traffic(stories), *figures.parts(stories)], tables.spending(stories))
    return [
        ("Results", joined([overview, tables.headline(stories)])),
        ("Training", _figures([*figures.loss(stories), *figures.metrics(stories), *groups.by_group(stories)])),
        ("Clients", _clients(stories)),
        ("Updates", _updates(stories)),
        ("Communication", sent),
        ("Data", _data(stories)),
        ("Time", joined([_figures(figures.seconds(stories), cost), *_numbers(stories)])),
        ("Failures and warnings", joined([_troubles(story, named=several) for story in stories])),
        ("Settings", _settings(stories)),
        ("Reproduce and cite", _reproduce(stories)),
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


def _troubles(story: RunHistory, *, named: bool) -> Html:
    return joined([el("h3", story.label) if named else Html(""), tables.troubles(story)])


def _numbers(stories: Sequence[RunHistory]) -> list[Html]:
    found = [(story.label, tables.rounds(story)) for story in stories]
    return [folded(f"Every round of {label} in numbers", body) for label, body in found if body]


def _clients(stories: Sequence[RunHistory]) -> Html:
    several = len(stories) > 1
    gains = [] if several else [tables.gains(stories[0])]
    split = [] if several else groups.by_client_and_group(stories[0])
    return joined([*gains, _figures([*figures.clients(stories), *split]), *tables.worst(stories)])


def _updates(stories: Sequence[RunHistory]) -> Html:
    """What the server saw of them, round by round."""
    several = len(stories) > 1
    told = [(story.label, text) for story in stories if (text := diagnostics.absence(story))]
    found = [(story.label, body) for story in stories if (body := diagnostics.numbers(story))]
    return joined(
        [
            *(el("p", f"{label}: {text}" if several else text) for label, text in told),
            _figures(diagnostics.figures(stories)),
            *(folded(f"What the updates of {label} showed in numbers", body) for label, body in found),
        ]
    )


def _data(stories: Sequence[RunHistory]) -> Html:
    """One block per distinct partition."""
    found = [(story.label, data) for story in stories if (data := story.last(DataReported))]
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


def _settings(stories: Sequence[RunHistory]) -> Html:
    several = len(stories) > 1
    texts = [
        folded(f"All settings of {story.label}" if several else "All settings, every default written out",
               el("pre", story.settings))
        for story in stories
        if story.settings
    ]  # fmt: skip
    return joined([tables.differences(stories) if several else Html(""), *texts, tables.versions(stories)])


def _reproduce(stories: Sequence[RunHistory]) -> Html:
    started = [found for story in stories if (found := story.last(RunStarted))]
    hashes = ", ".join(dict.fromkeys(found.experiment_hash[:8] for found in started))
    where = "In the run's folder" if len(stories) == 1 else "In each run's folder"
    versions = dict.fromkeys(str(found.versions["fedllm"]) for found in started if "fedllm" in found.versions)
    return joined(
        [
            el("p", f"{where}; the same settings give the same experiment hash ({hashes or 'not recorded'})."),
            el("pre", "fedllm run experiment.yaml"),
            el("h3", "How to cite"),
            el("pre", bibtex(", ".join(versions) or None)),
        ]
    )
