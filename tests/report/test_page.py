"""The page: whole, self-contained, safe against what data says, with the figures that the log holds."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedllm.errors import RunError
from fedllm.events import (
    ClientFailed,
    DataReported,
    Diagnosed,
    Evaluated,
    Event,
    Resumed,
    RoundFinished,
    RunStarted,
    Warned,
)
from fedllm.report import page, write_report
from fedllm.report.citation import bibtex

MakeEvents = Callable[..., list[Event]]
Write = Callable[..., Path]
VOID = {"meta"}
EVIL = "<script>alert(1)</script>"


class Outline(HTMLParser):
    """Checks that elements close in order; keeps tags, attributes and the text of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.tiles: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "dt":
            self.tiles.append(data)
        if not {"script", "style"} & set(self.open):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page without the drawing library's four megabytes."""
    monkeypatch.setattr(page, "_plotly", lambda: "var Plotly = {};")


def outline(runs: list[Path], tmp_path: Path) -> Outline:
    return Outline(write_report(runs, tmp_path / "out" / "report.html").read_text(encoding="utf-8"))


def test_library_is_inlined_once_and_allowed_by_its_hash(events: MakeEvents, folder: Write, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert write_report([folder("a", events(rounds=2))], out) == out
    text = out.read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert [len(script) > 1_000_000 for script in scripts] == [True, False]
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy
    assert "http" not in text.replace(scripts[0], "").replace("http-equiv", "")


def test_one_run_has_all_chapters(small: None, events: MakeEvents, folder: Write, tmp_path: Path) -> None:
    run = folder("archives-5e90c1d7", events(), {"epsilon": 3.5, "best_round": 20, "peak_rss_bytes": 2**30})
    seen = outline([run], tmp_path)
    chapters = (
        "Results Training Clients Updates Communication Data Time Failures and warnings Settings Reproduce and cite"
    )
    assert [tag for tag, _ in seen.tags].count("section") == 10
    assert all(word in seen.text for word in chapters.split())
    assert ["nll, per token", "2.720", "1.816", "1.542", "1.524"] in seen.rows
    assert ["exact_match/private, per record", "0.0384", "0.2988", "0.3777", "0.3827"] in seen.rows
    assert "local-only: each client alone, as many steps" in seen.text
    assert ["round 7", "clinic", "no reply within 30 s"] in seen.rows
    assert ["records that no client holds", "17"] in seen.rows
    assert ["epsilon", "3.500"] in seen.rows
    assert ["peak memory", "1 GiB"] in seen.rows
    assert "9 examples are longer than 128 tokens" in seen.text
    assert "fedllm run experiment.yaml" in seen.text
    assert "version = {0.1.0}" in seen.text and "arXiv:2409.15723" in seen.text
    assert "adapter:" in seen.text  # the settings as YAML
    assert seen.count("figure") == 19


def test_tables_can_be_read_aloud(small: None, events: MakeEvents, folder: Write, tmp_path: Path) -> None:
    seen = outline([folder("a", events()), folder("b", events(speed=0.1))], tmp_path)
    assert seen.count("table") == seen.count("caption") > 5
    scopes = {attrs.get("scope") for tag, attrs in seen.tags if tag == "th"}
    assert scopes == {"col", "row", "rowgroup"}
    labels = [attrs for tag, attrs in seen.tags if attrs.get("role") == "img"]
    assert len(labels) == seen.count("figure")
    assert all(attrs["aria-label"] for attrs in labels)


def test_worst_client_is_named(small: None, folder: Write, tmp_path: Path) -> None:
    scores = {"a": {"nll": 1.0, "accuracy": 0.25}, "b": {"nll": 3.0, "accuracy": 0.75}}
    alone = {"a": {"nll": 0.5, "accuracy": 0.125}, "b": {"nll": 4.0, "accuracy": 0.5}}
    metrics = {"nll": 2.0, "accuracy": 0.5}
    run = folder("a", [Evaluated("local_only", 1, metrics, alone), Evaluated("federated", 1, metrics, scores)])
    seen = outline([run], tmp_path)
    assert ["federated", "b", "3", "2", "1", "a"] in seen.rows
    assert ["federated", "a", "0.2500", "0.5000", "0.7500", "b"] in seen.rows
    assert "better than training alone: 1 of 2 in nll, 2 of 2 in accuracy." in seen.text


def test_own_records_are_compared_with_own_records(small: None, folder: Write, tmp_path: Path) -> None:
    # alone, "b" is better on everybody's records (nll) and worse on its own (own/nll) than the federation is
    together = {"a": {"nll": 1.0}, "b": {"nll": 3.0}}
    alone = {"a": {"nll": 5.0, "own/nll": 0.5}, "b": {"nll": 2.0, "own/nll": 4.0}}
    run = folder(
        "a",
        [
            Evaluated("federated", 1, {"nll": 2.0}, together),
            Evaluated("local_only", 1, {"nll": 3.5, "own/nll": 2.25}, alone),
        ],
    )
    seen = outline([run], tmp_path)
    assert ["metric", "local-only", "local-only, own", "federated"] in seen.rows
    assert ["nll, per token", "3.500", "2.250", "2"] in seen.rows
    assert "own: each client's model on its own held-out records" in seen.text
    assert ["nll", "local-only", "b", "4", "2.250", "0.5000", "a"] in seen.rows
    assert "better than training alone: 1 of 2 in nll." in seen.text
    assert "own/nll by client" not in seen.text


def test_nobody_is_worst_where_all_are_equal(small: None, folder: Write, tmp_path: Path) -> None:
    run = folder("a", [Evaluated("federated", 1, {"nll": 2.0}, {"a": {"nll": 2.0}, "b": {"nll": 2.0}})])
    assert ["nll", "federated", "—", "2", "2", "2", "—"] in outline([run], tmp_path).rows


def test_several_runs_have_a_column_each(small: None, events: MakeEvents, folder: Write, tmp_path: Path) -> None:
    one = folder("one", events())
    two = folder("two", events(speed=0.15, bytes_up=480_000, rounds=10))
    seen = outline([one, two], tmp_path)
    assert ["metric", "model", "one", "two"] in seen.rows
    assert ["federated", "1.542", "1.788"] in [row[-3:] for row in seen.rows]
    assert ["sent up", "140 MiB", "17.9 MiB"] in seen.rows
    assert ["stages[0].quantize.bits", "—", "4"] in seen.rows
    assert ["rounds", "20", "10"] in seen.rows
    assert not any(row[:1] == ["seed"] for row in seen.rows)


def test_words_from_data_stay_words(small: None, events: MakeEvents, folder: Write, tmp_path: Path) -> None:
    made: list[Event] = []
    for event in events(rounds=3):
        if isinstance(event, RunStarted):
            event = replace(event, name=EVIL, model=EVIL, engine=EVIL, settings={EVIL: EVIL}, versions={EVIL: EVIL})
        if isinstance(event, DataReported):
            event = replace(event, train={EVIL: 3}, labels={EVIL: {EVIL: 3}})
        if isinstance(event, Evaluated):
            event = replace(event, note=EVIL, metrics={EVIL: 1.0}, clients={EVIL: {EVIL: 1.0}})
        if isinstance(event, RoundFinished):
            event = replace(event, note=EVIL)
        made.append(event)
    made += [Warned(EVIL), ClientFailed(0, EVIL, '"><img src=x onerror=alert(1)>')]
    runs = [folder("run<b>", made), folder('other"', made)]
    for chosen in (runs, runs[:1]):
        seen = outline(chosen, tmp_path)
        scripts = [attrs for tag, attrs in seen.tags if tag == "script"]
        assert [attrs for attrs in scripts if attrs != {"type": "application/json"}] == [{}, {}]
        assert seen.count("img") == 0
        assert seen.text.count(EVIL) > 5
        assert not any(name.startswith("on") for _, attrs in seen.tags for name in attrs)


def test_a_run_without_evaluation_gives_a_page(small: None, events: MakeEvents, folder: Write, tmp_path: Path) -> None:
    bare = [event for event in events(rounds=4) if not isinstance(event, Evaluated)]
    seen = outline([folder("a", bare)], tmp_path)
    assert "Nothing was evaluated" in seen.text
    assert "nan" not in seen.text.lower()
    assert seen.count("figure") > 3


def test_an_empty_log_gives_a_page(small: None, folder: Write, tmp_path: Path) -> None:
    seen = outline([folder("a", [])], tmp_path)
    assert "not finished: 0 rounds" in seen.text
    assert seen.count("figure") == 0


def test_lost_rounds_of_a_resumed_run_are_not_shown(
    small: None, events: MakeEvents, folder: Write, tmp_path: Path
) -> None:
    made = events(rounds=2)
    cut = [event for event in made if not isinstance(event, Evaluated | Diagnosed)]
    lost = [replace(event, loss=777.0) for event in made if isinstance(event, RoundFinished) and event.round == 1]
    seen = outline([folder("a", [*cut[:-1], *lost, Resumed(1), *lost, Resumed(1), *cut])], tmp_path)
    assert "777" not in seen.text
    assert [row[0] for row in seen.rows if len(row) == 7] == ["round", "1", "2"]


def test_an_unfinished_run_says_so(small: None, events: MakeEvents, folder: Write, tmp_path: Path) -> None:
    made = events(rounds=9)
    third = next(place for place, event in enumerate(made) if isinstance(event, RoundFinished) and event.round == 2)
    assert "not finished: 3 of 9 rounds" in outline([folder("a", made[: third + 1])], tmp_path).text


def test_a_diverged_run_shows_dashes(small: None, events: MakeEvents, folder: Write, tmp_path: Path) -> None:
    """Figures that are not finite are null in JSON files."""
    nothing = {"nll": None, "exact_match": 0.0}
    made = [
        replace(event, metrics=nothing, clients={"archive": nothing})
        if isinstance(event, Evaluated) and event.which == "federated"
        else replace(event, loss=None)
        if isinstance(event, RoundFinished)
        else event
        for event in events(rounds=2)
    ]
    run = folder("a", made, {"share_of_peak": None, "tokens_per_second": None, "eval": {"federated": nothing}})
    seen = outline([run], tmp_path)
    assert ["nll, per token", "2.720", "2.563", "—", "2.205"] in seen.rows
    assert "nan" not in seen.text.lower() and "None" not in seen.text
    outline([run, folder("b", events(rounds=2))], tmp_path)


def test_a_headline_says_what_it_is_a_mean_over(small: None, events: MakeEvents, folder: Write, tmp_path: Path) -> None:
    seen = outline([folder("a", events(rounds=2))], tmp_path)
    assert seen.tiles[:2] == ["nll, per token", "exact_match, per record"]
    assert "a client with more of them counts for more" in seen.text
    assert "local-only is the mean over the clients" in seen.text


def test_a_wide_table_can_be_a_list(small: None, events: MakeEvents, folder: Write, tmp_path: Path) -> None:
    """Where a screen is narrow each cell says its column; tables of up to three columns fit."""
    seen = outline([folder("a", events(rounds=2))], tmp_path)
    wide = [attrs for tag, attrs in seen.tags if tag == "table" and attrs.get("class") == "wide"]
    named = [attrs["data-column"] for tag, attrs in seen.tags if tag == "td" and "data-column" in attrs]
    assert wide and {"base", "federated", "mean of clients", "time"} <= set(named)
    assert "whole run" not in named


def test_groups_do_not_bury_the_final_figures(small: None, folder: Write, tmp_path: Path) -> None:
    split = {"nll": 2.0, **{f"nll/{place}": 1.0 + place for place in range(30)}}
    clients = {"a": {"nll": 1.0, "nll/0": 1.0}, "b": {"nll": 3.0, "nll/1": 3.0}}
    seen = outline([folder("a", [Evaluated("federated", 1, split, clients)])], tmp_path)
    assert "Final figures of each group" in seen.text and ["nll/29, per token", "30"] in seen.rows
    assert [row[0] for row in seen.rows[:2]] == ["metric", "nll, per token"] and seen.rows[2][0] != "nll/0, per token"
    assert not any(row[0] == "nll/0" for row in seen.rows)  # of one client: neither best nor worst


def test_no_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="fedllm run"):
        write_report([tmp_path], tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_citation_leaves_an_unknown_version_out() -> None:
    assert "{{The fedllm authors}}" in bibtex("0.1.0")
    assert "version = {0.1.0}," in bibtex("0.1.0")
    assert "version" not in bibtex(None)
