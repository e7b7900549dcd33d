"""`fedllm chat`: a run's model at the prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from fedllm.errors import DataError
from fedllm.runs.loaded_run import LoadedRun, open_run

Turns = list[dict[str, str]]


def chat_with(
    folder: Path, *, prompt: str | None, client: str | None, compare: bool, system: str | None, max_new_tokens: int
) -> None:
    """Answer one prompt, or each line until the end of the input."""
    opened, console = open_run(folder, client=client), Console()
    opening = _opening(opened) if system is None else system
    turns: Turns = [{"role": "system", "content": opening}] if opening else []
    if prompt is None and sys.stdin.isatty():
        console.print(f"{opened.model.base.title}, tuned in {folder}. An empty line ends.", highlight=False)
    for line in _lines(console) if prompt is None else [prompt]:
        asked = line.encode(errors="replace").decode()  # a terminal may send bytes that are no text
        turns.append({"role": "user", "content": asked})
        answer = _answer(opened, console, turns, compare, max_new_tokens)
        turns.append({"role": "assistant", "content": answer})


def _answer(opened: LoadedRun, console: Console, turns: Turns, compare: bool, max_new_tokens: int) -> str:
    record = {"messages": [*turns, {"role": "assistant", "content": "..."}]}
    prompt = opened.model.prompt(record)
    if compare:
        (base,) = opened.model.generate({}, [prompt], max_new_tokens)
        _show(console, "base   ", base)
    (tuned,) = opened.model.generate(opened.params, [prompt], max_new_tokens)
    _show(console, "tuned  " if compare else "", tuned)
    return tuned.strip()


def _show(console: Console, who: str, answer: str) -> None:
    """What a model says cannot move a terminal's cursor."""
    plain = "".join(char if char.isprintable() or char == "\n" else " " for char in answer.strip())
    console.print(f"{who}{plain}", highlight=False, markup=False, soft_wrap=True)


def _opening(opened: LoadedRun) -> str | None:
    """The system prompt that the run's own records begin with; none if the data is no longer there."""
    try:
        population = opened.experiment.federation.load(opened.experiment.key)
    except DataError:
        return None
    first = next(iter(next(iter(population.train.values()))))
    return str(first["system"]) if first.get("system") else None


def _lines(console: Console) -> Iterator[str]:
    """Lines of a person until an empty one; lines of a pipe until its end, without the empty ones."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    while True:
        try:
            line = console.input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        yield line
