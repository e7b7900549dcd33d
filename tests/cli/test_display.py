"""The live display on and off a terminal, and the summary, with a clock that the test turns."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from rich.console import Console

from fedllm.cli.display import Display, print_summary
from fedllm.cli.run_progress import StepRate
from fedllm.events import (
    ClientFailed,
    ClientFinished,
    Evaluated,
    Event,
    MessageSent,
    Progress,
    Resumed,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
    Warned,
)

MIB = 2**20


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Stage:
    """A display, its clock, and what was printed."""

    def __init__(self, *, terminal: bool) -> None:
        self.clock = Clock()
        self.file = FlushCounter()
        self.console = Console(file=self.file, force_terminal=terminal, width=100, color_system=None)
        self.display = Display(self.console, clock=self.clock)

    def play(self, *events: Event, seconds: float = 0.0) -> None:
        for event in events:
            self.clock.now += seconds
            self.display(event)

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()

    def picture(self) -> str:
        page = Console(file=StringIO(), width=100, color_system=None)
        page.print(self.display.render())
        return page.file.getvalue()  # type: ignore[attr-defined]


class FlushCounter(StringIO):
    flushed = 0

    def flush(self) -> None:
        self.flushed += 1


def started(rounds: int = 10) -> RunStarted:
    return RunStarted("archives", "5e90", "serial", "SmolLM2", rounds, 4, 9, {}, {})


def round_of(number: int) -> tuple[Event, ...]:
    return (
        RoundStarted(number, ("a", "b")),
        RoundFinished(number, 2, 2.5 - number / 10, 3 * MIB, 5 * MIB, 64, 4.0),
    )


def test_pace_is_the_mean_time_per_step() -> None:
    pace = StepRate(start=100.0, first=2, done=2, newest=100.0)
    assert pace.left(10, 101.0) is None
    pace.step(4, 108.0)  # two steps in 8 seconds: 4 each, six to come
    assert pace.left(10, 108.0) == 24.0
    assert pace.left(10, 110.0) == 22.0
    assert pace.left(10, 900.0) == 0.0


def test_plain_lines_off_a_terminal() -> None:
    stage = Stage(terminal=False)
    with stage.display:
        stage.play(started(), Warned("9 examples were cut"), Evaluated("base", 0, {"nll": 2.72}))
        stage.play(*round_of(0), seconds=3.0)  # the clock runs from the first cohort
        stage.play(ClientFailed(1, "b", "no reply", "evaluate"))
        stage.play(Evaluated("federated", 1, {"nll": 1.96, "accuracy": 0.5}))
        stage.play(RunFinished(1, 65.0, "time is up"))
    assert stage.lines == [
        "archives · SmolLM2 · serial: 10 rounds, 4 clients",
        "warning: 9 examples were cut",
        "base: nll 2.720",
        "round 1/10  loss 2.500  clients 2  up 3 MiB  down 5 MiB  4.0 s  left 27 s",
        "evaluation after round 1: lost b: no reply",
        "federated after round 1: nll 1.960  accuracy 0.5000",
        "finished 1 round in 1 min 05 s: time is up",
    ]
    assert stage.file.flushed >= len(stage.lines)


def test_the_last_round_has_no_time_left() -> None:
    stage = Stage(terminal=False)
    stage.play(started(1), *round_of(0))
    assert stage.lines[-1].endswith("4.0 s")


def test_time_left_after_a_resume_counts_only_new_rounds() -> None:
    stage = Stage(terminal=False)
    stage.play(started(10), Resumed(6))
    stage.play(*round_of(6), seconds=5.0)  # one round in 5 seconds, three to come
    assert stage.lines[1] == "resumed with round 7/10"
    assert stage.lines[2].startswith("round 7/10 ")
    assert stage.lines[2].endswith("left 15 s")


def test_time_left_covers_evaluations_between_rounds() -> None:
    stage = Stage(terminal=False)
    stage.play(started(4))
    stage.play(*round_of(0), Evaluated("federated", 1, {}), *round_of(1), seconds=2.0)
    # from 102 to 110 seconds: two rounds in 8 seconds, two to come
    assert stage.lines[-1].endswith("left 8 s")


def test_plain_progress_is_told_every_ten_seconds_and_at_the_end() -> None:
    stage = Stage(terminal=False)
    stage.play(*(Progress("local_only", done, 31) for done in range(32)), seconds=1.0)
    assert stage.lines == [
        "local-only 0/31",
        "local-only 10/31  left 21 s",
        "local-only 20/31  left 11 s",
        "local-only 30/31  left 1 s",
        "local-only 31/31",
    ]


def test_a_second_comparison_starts_its_own_clock() -> None:
    stage = Stage(terminal=False)
    stage.play(Progress("local_only", 0, 1), Progress("local_only", 1, 1), seconds=50.0)
    stage.play(Progress("centralised", 0, 4), Progress("centralised", 2, 4), seconds=20.0)
    assert stage.lines[-1] == "centralised 2/4  left 20 s"


def test_picture_on_a_terminal() -> None:
    stage = Stage(terminal=True)
    stage.play(started())
    stage.play(*round_of(0), Evaluated("base", 0, {"nll": 2.72}), seconds=3.0)
    stage.play(
        Evaluated("federated", 1, {"nll": 1.96}),
        RoundStarted(1, ("a", "b", "c", "d")),
        MessageSent(1, "work", "a", "down", 2 * MIB, {}),
        ClientFinished(1, "a", 1.25, 64, 1.0),
        ClientFinished(1, "b", None, None, 1.0),
        ClientFailed(1, "c", "gone"),
    )
    seen = " ".join(stage.picture().split())
    assert "archives · SmolLM2 · serial" in seen
    assert "1/10 left 24 s" in seen  # one round in 3 seconds, nine to come, 3 seconds gone
    assert "loss 2.500 up 3 MiB down 7 MiB" in seen
    assert "round 2, 3 of 4 clients" in seen
    assert "a 1.250 b done c lost d …" in seen
    assert "base nll 2.720" in seen
    assert "federated after round 1 nll 1.960" in seen


def test_recall_takes_the_log_in_and_a_resume_takes_lost_rounds_back() -> None:
    stage = Stage(terminal=False)
    lost = Evaluated("federated", 3, {"nll": 9.0})
    stage.display.recall(
        [started(), Evaluated("base", 0, {"nll": 2.72}), *round_of(0), *round_of(1), *round_of(2), lost]
    )
    assert stage.lines == []
    stage.play(Resumed(2), *round_of(2), seconds=2.0)
    assert stage.lines[0] == "resumed with round 3/10"
    assert stage.lines[1].endswith("4.0 s  left 14 s")  # one round in 2 seconds, seven to come
    seen = " ".join(stage.picture().split())
    assert "loss 2.300 up 9 MiB down 15 MiB" in seen
    assert "base nll 2.720" in seen
    assert "9.000" not in seen


def test_a_resume_without_the_log_shows_no_total() -> None:
    stage = Stage(terminal=False)
    stage.play(Resumed(2), *round_of(2))
    assert stage.lines[0] == "resumed with round 3"
    assert stage.lines[1].startswith("round 3  loss")


def test_evaluation_is_not_counted_and_its_losses_are_named() -> None:
    stage = Stage(terminal=False)
    stage.play(started(), RoundStarted(4, ("a",)), MessageSent(4, "work", "a", "up", MIB, {}))
    lost = ClientFailed(4, "a", "x"), ClientFailed(5, "b", "y", "evaluate")
    stage.play(MessageSent(5, "evaluate", "a", "up", 7 * MIB, {}), *lost)
    assert "up 1 MiB down 0 B" in " ".join(stage.picture().split())
    assert stage.lines[1:] == ["round 5: lost a: x", "evaluation after round 5: lost b: y"]


def test_picture_shows_a_comparison_instead_of_the_cohort() -> None:
    stage = Stage(terminal=True)
    stage.play(started(1), *round_of(0))
    stage.play(Progress("local_only", 0, 8), Progress("local_only", 2, 8), seconds=4.0)
    seen = " ".join(stage.picture().split())
    assert "1/1" in seen
    assert "local-only" in seen and "2/8 left 12 s" in seen
    assert "clients" not in seen
    stage.play(RunFinished(1, 10.0))
    assert "local-only" not in stage.picture()


def test_a_large_cohort_shows_its_newest_replies() -> None:
    stage = Stage(terminal=True)
    cohort = tuple(f"site{place:03d}" for place in range(300))
    stage.play(started(), RoundStarted(0, cohort))
    stage.play(*(ClientFinished(0, client, 1.0, 1, 1.0) for client in cohort[:50]))
    seen = stage.picture()
    assert "50 of 300 clients" in seen
    assert "site049" in seen and "site038" in seen
    assert "site037" not in seen and "site050" not in seen
    assert len(seen.splitlines()) < 20


def test_terminal_prints_notices_above_and_leaves_the_picture() -> None:
    stage = Stage(terminal=True)
    with stage.display:
        stage.play(started(1), Warned("careful"), *round_of(0), ClientFailed(0, "b", "gone"), RunFinished(1, 2.0))
    written = stage.file.getvalue()
    for text in ("warning: careful", "round 1: lost b: gone", "finished 1 round in 2.0 s", "1/1"):
        assert text in written
    assert "clients 2" not in written  # the plain line about a round


@pytest.mark.parametrize("terminal", [True, False])
def test_words_from_clients_are_neither_markup_nor_control(terminal: bool) -> None:
    stage = Stage(terminal=terminal)
    stage.play(started(), RoundStarted(0, ("[red]x[/red]", "y\x1b[2J")))
    stage.play(ClientFailed(0, "[bold]b", "gone\x1b]0;owned\x07\nsecond"), Warned("[/]"))
    written = stage.file.getvalue() + stage.picture()
    assert "lost [bold]b: gone ]0;owned  second" in written
    assert "warning: [/]" in written
    assert "\x1b]0" not in written and "\x1b[2J" not in written and "\x07" not in written
    assert "[red]x[/red]" in stage.picture()


SUMMARY = {
    "experiment_hash": "5e90c1d7aa42",
    "engine": "serial",
    "model": "SmolLM2-135M",
    "rounds": 20,
    "seconds": 104.2,
    "seconds_per_round": 4.41,
    "tokens_trained": 202_240,
    "tokens_per_second": 1965.22,
    "bytes_up": 140 * MIB,
    "bytes_down": 139 * MIB,
    "evaluation_bytes": 12 * MIB,
    "peak_rss_bytes": 2 * 2**30,
    "eval": {
        "base": {"nll": 2.72, "exact_match": 0.048},
        "federated": {"nll": 1.542, "exact_match": 0.472, "exact_match/private": None},
        "local_only": {"nll": 1.816, "own/nll": 1.75},
        "centralised": None,
    },
    "clients": {"a": {"nll": 1.0}},
    "epsilon": None,
    "best_round": 15,
}


def printed(summary: dict[str, object], width: int = 80, *, joined: bool = True) -> list[str]:
    console = Console(file=StringIO(), width=width)
    print_summary(summary, console)
    lines: list[str] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [" ".join(line.split()) if joined else line.strip() for line in lines]


def test_the_summary_has_a_row_per_metric_and_a_column_per_model() -> None:
    lines = [re.split(r" {2,}", line) for line in printed(SUMMARY, joined=False)]
    assert ["metric", "base", "local-only", "local-only, own", "federated"] in lines
    assert ["nll", "2.720", "1.816", "1.750", "1.542"] in lines
    assert ["exact_match", "0.0480", "—", "—", "0.4720"] in lines
    assert ["exact_match/private", "—", "—", "—", "—"] in lines


def test_printed_summary() -> None:
    lines = printed(SUMMARY)
    assert lines[0] == "SmolLM2-135M · serial · 20 rounds"
    assert "nll 2.720 1.816 1.750 1.542" in lines
    assert "sent 140 MiB up, 139 MiB down" in lines
    assert "evaluation 12 MiB sent" in lines
    assert "time 1 min 44 s, 4.4 s per round" in lines
    assert "tokens 202,240, 1,965 per second" in lines
    assert "peak memory 2 GiB" in lines
    assert "best round 15" in lines
    assert "experiment 5e90c1d7" in lines
    assert not any("epsilon" in line for line in lines)


def test_printed_summary_with_privacy_and_without_evaluation() -> None:
    lines = printed({**SUMMARY, "epsilon": 3.21, "eval": {"base": None, "federated": None}})
    assert "epsilon 3.210" in lines
    assert "nothing was evaluated" in lines


def test_printed_summary_of_little() -> None:
    assert [line for line in printed({"rounds": 0}) if line] == ["0 rounds", "nothing was evaluated"]
    assert printed({"rounds": 1})[0] == "1 round"


def test_one_of_a_thing_is_named_in_the_singular() -> None:
    stage = Stage(terminal=False)
    stage.play(RunStarted("a", "5e90", "serial", "M", 1, 1, 9, {}, {}), RunFinished(1, 2.0, ""))
    assert stage.lines == ["a · M · serial: 1 round, 1 client", "finished 1 round in 2.0 s"]
