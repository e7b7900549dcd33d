"""What a run shows while it runs, and its summary when it is over.

On a terminal a block that is redrawn in place: rounds, the cohort's losses, bytes, time left, newest metrics. Elsewhere
plain lines, each flushed. Names and reasons come from clients: they are shown without control characters and never read
as markup.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedllm.cli import tables
from fedllm.cli.run_progress import RunProgress, line, model_label, scores_line
from fedllm.errors import counted
from fedllm.events import ClientFailed, Event, Progress, RunFinished, Warned
from fedllm.report.fairness import BETTER_THAN
from fedllm.report.formatting import NOTHING, duration, figure, part_of_whole, printable, remaining, size
from fedllm.report.run_history import COMPARED, by_model

Clock = Callable[[], float]
_SHOWN = 12  # clients of a cohort that are listed one by one
_QUIET = 10.0  # seconds between two plain lines about the same progress


class Display:
    """A listener of a run's events; on a terminal it draws between `with` and the block's end.

    `clock` counts seconds; the time left is the mean time per round, evaluations included, times the rounds to come.
    """

    def __init__(self, console: Console | None = None, *, clock: Clock = time.monotonic) -> None:
        self._console = console or Console()
        self._clock = clock
        self._scene = RunProgress()
        self._told = float("-inf")  # when the last plain line about progress was printed
        self._live = (
            Live(console=self._console, get_renderable=self.render, refresh_per_second=4)
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def recall(self, events: Iterable[Event]) -> None:
        """Take in, without a word, what the log of a run that is resumed already holds."""
        for event in events:
            self._scene.see(event, self._clock())

    def __call__(self, event: Event) -> None:
        now = self._clock()
        self._scene.see(event, now)
        if self._live and not isinstance(event, ClientFailed | Warned | RunFinished):
            return
        if isinstance(event, Progress) and event.done < event.total:
            if now - self._told < _QUIET:
                return
            self._told = now
        text = line(event, self._scene, now)
        if text is not None:
            style = "yellow" if isinstance(event, ClientFailed | Warned) else ""
            self._console.print(Text(printable(text), style=style), soft_wrap=True)
            self._console.file.flush()

    def render(self) -> RenderableType:
        """The block that a terminal shows."""
        return _picture(self._scene, self._clock())


def _picture(scene: RunProgress, now: float) -> RenderableType:
    bars = Table.grid(padding=(0, 2))
    if scene.rounds:
        left = scene.pace.left(scene.rounds, now) if scene.pace else None
        bars.add_row(*_bar("rounds", scene.done, scene.rounds, left))
    if scene.side_task:
        left = scene.aside_pace.left(scene.side_task.total, now) if scene.aside_pace else None
        bars.add_row(
            *_bar(
                COMPARED.get(scene.side_task.what, scene.side_task.what),
                scene.side_task.done,
                scene.side_task.total,
                left,
            )
        )
    up, down = scene.traffic
    sums = Text(f"loss {figure(scene.loss)}   up {size(up)}   down {size(down)}")
    told = [
        Text.assemble((model_label(event), "cyan"), "  ", printable(scores_line(event.metrics)))
        for event in scene.scores.values()
    ]
    return Group(Text(printable(scene.title), style="bold"), bars, sums, *_cohort(scene), *told)


def _bar(name: str, done: int, total: int, left: float | None) -> list[RenderableType]:
    bar = ProgressBar(total=max(total, 1), completed=done, width=32)
    tail = "" if left is None or done >= total else f"left {remaining(left)}"
    return [Text(printable(name)), bar, Text(f"{done}/{total}"), Text(tail, style="dim")]


def _cohort(scene: RunProgress) -> list[RenderableType]:
    """The round under way: every client of a small cohort, the newest replies of a large one."""
    if not scene.cohort:
        return []
    finished = scene.finished
    shown = scene.cohort if len(scene.cohort) <= _SHOWN else tuple(finished)[-_SHOWN:]
    cells = [
        Text.assemble(
            printable(client), " ", (finished.get(client, "\N{HORIZONTAL ELLIPSIS}"), _tint(finished.get(client)))
        )
        for client in shown
    ]
    number = "" if scene.begun is None else f"round {scene.begun + 1}, "
    head = Text(f"{number}{len(finished)} of {counted(len(scene.cohort), 'client')}", style="dim")
    return [head, Padding(Columns(cells, equal=True, padding=(0, 3)), (0, 0, 0, 2))]


def _tint(outcome: str | None) -> str:
    return "dim" if outcome is None else "yellow" if outcome == "lost" else "green"


def _scores(summary: Mapping[str, Any], console: Console) -> None:
    """The evaluation of a run folder's summary.json: a row per metric, a column per model that was evaluated."""
    models = by_model(summary.get("eval") or {})
    metrics = dict.fromkeys(name for scores in models.values() for name in scores)
    if not metrics:
        console.print(Text("nothing was evaluated"))
        return
    rows = ([metric, *(figure(scores.get(metric)) for scores in models.values())] for metric in metrics)
    shown = ["metric", *models]
    tables.show(console, shown, rows, numbers=True, bold={COMPARED["federated"]}, box=box.SIMPLE_HEAD)


def _personal(summary: Mapping[str, Any], console: Console) -> None:
    """The clients' own models, a row per metric: on whose records, how far apart, and who is better off."""
    found = (summary.get("personal") or {}).get("metrics") or {}
    rows, told = [], []
    for metric, figures in found.items():
        own = figures["own"] or {}
        worst = f"{figure(own.get('worst'))} {printable(str(own.get('worst_client', '')))}".strip()
        rows.append([metric, *map(figure, (own.get("mean"), figures["others"], figures["all"])), worst,
                     *map(figure, (own.get("std"), own.get("gap")))])  # fmt: skip
        better = [(title, figures["better_than"].get(which)) for which, title in BETTER_THAN.items()]
        told += [f"{part_of_whole(part)} of the clients are better off than with {title} ({metric})"
                 for title, part in better if part is not None]  # fmt: skip
    if rows:
        console.print(Text("own models, means over clients, by whose records", style="dim"))
        names = ["own", "others'", "all", "worst client", "std", "worst-best"]
        tables.show(console, ["metric", *names], rows, numbers=True, box=box.SIMPLE_HEAD)
    for text in told:
        console.print(Text(text), soft_wrap=True)


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """The table, then what the run took: bytes, seconds, tokens, memory, and epsilon where there is one."""
    title = [str(summary[key]) for key in ("model", "engine") if summary.get(key)]
    if summary.get("rounds") is not None:
        title.append(counted(summary["rounds"], "round"))
    console.print(Text(printable(" \N{MIDDLE DOT} ".join(title)), style="bold"))
    _scores(summary, console)
    _personal(summary, console)
    taken = Table.grid(padding=(0, 2))
    for name, text in _taken(summary):
        taken.add_row(Text(name, style="dim"), Text(text))
    console.print(taken)
    console.file.flush()


def _taken(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    per_round, speed = summary.get("seconds_per_round"), summary.get("tokens_per_second")
    each = "" if per_round is None else f", {duration(per_round)} per round"
    fast = "" if speed is None else f", {figure(round(speed, 1))} per second"
    share = summary.get("share_of_peak")
    fast += "" if share is None else f", {part_of_whole(share)} of the matrix peak"
    spelled = {
        "sent": f"{size(summary.get('bytes_up'))} up, {size(summary.get('bytes_down'))} down",
        "evaluation": f"{size(summary.get('evaluation_bytes'))} sent",
        "time": duration(summary.get("seconds")) + each,
        "tokens": figure(summary.get("tokens_trained")) + fast,
        "peak memory": size(summary.get("peak_rss_bytes")),
        "epsilon": figure(summary.get("epsilon")),
        "best round": figure(summary.get("best_round")),
        "experiment": printable(str(summary.get("experiment_hash") or NOTHING)[:8]),
    }
    return [(name, text) for name, text in spelled.items() if not text.startswith(NOTHING)]
