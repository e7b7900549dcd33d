"""Records for the benchmark of a round, and what each step takes of them, written once for every row.

The default corpus is the project's own: questions and answers of the handbook, written out in numbers that give
records of some 20 to 300 tokens of SmolLM2, short ones more often than long ones. A file may hold instruction, input
and output; prompt and response; or messages.

All rows see the text `prompt + "\\n" + completion + end token`, which is what the template `plain` writes, or that of
another template.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedllm
from fedllm.data.packaged import handbook
from fedllm.data.sources import file_rows
from fedllm.errors import DataError
from fedllm.messages.context import RoundContext
from fedllm.models.chat_turns import messages_of
from fedllm.models.objectives.sft import Sft
from fedllm.models.templates import Template, prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedllm.experiment.record import Experiment

Pair = tuple[str, str]  # prompt, completion
MOST_FACTS = 12
MOST_LOOKED_AT = 1000  # pairs for one that is taken


@dataclass(frozen=True)
class Choice:
    """Which records are taken: `num` of those that keep a label in `max_length` tokens; with `fill` only those that
    have at least so many tokens, so that each sequence is exactly as long. `template`: what makes text of them."""

    num: int
    max_length: int
    fill: bool
    template: Template = "plain"


def handbook_pairs(seed: int) -> Iterator[Pair]:
    """Endless: n facts of one organisation, n up to 12 with probability proportional to 1 / n."""
    rng, counts = random.Random(seed), range(1, MOST_FACTS + 1)
    names, records = handbook.names(), handbook.records(private=24, shared=12, test=False)
    while True:
        organisation = rng.choice(handbook.ORGANISATIONS)
        own = [record for record in records if record["organisation"] == organisation]
        (count,) = rng.choices(counts, [1 / n for n in counts])
        lines = [f"{record['prompt']} {record['response'].capitalize()}." for record in rng.sample(own, count)]
        asked = "one question" if count == 1 else f"{count} questions"
        yield f"Write down {asked} that newcomers ask at {names[organisation]}, with the answers.", "\n".join(lines)


def file_pairs(path: Path, seed: int) -> Iterator[Pair]:
    """The records of a file (.jsonl, .json, .csv, .parquet, also .gz) in a random order.

    Raises:
        DataError: no such file, or a record in none of the three forms.
    """
    pairs = [_pair(row, place) for place, row in file_rows(str(path))]
    random.Random(seed).shuffle(pairs)
    yield from pairs


def chosen(pairs: Iterator[Pair], tokenizer: PreTrainedTokenizerBase, choice: Choice) -> list[tuple[Pair, int]]:
    """Pairs and their numbers of tokens.

    Raises:
        DataError: there are too few.
    """
    found: list[tuple[Pair, int]] = []
    for prompt, completion in islice(pairs, MOST_LOOKED_AT * choice.num):
        records = [{"prompt": prompt, "response": completion}] if completion else []
        encoded = Sft().encode(records, tokenizer, choice.template, choice.max_length)
        example = encoded[0] if encoded else None
        if example is not None and (len(example.tokens) == choice.max_length or not choice.fill):
            found.append(((prompt, completion), len(example.tokens)))
        if len(found) == choice.num:
            return found
    raise DataError(
        f"the records hold {len(found)} that can be used with --max-length {choice.max_length}"
        f"{' and --fill' if choice.fill else ''}, but {choice.num} are needed; ask for fewer clients or steps"
    )


def write_clients(pairs: list[Pair], clients: int, path: Path) -> None:
    """What each client holds: records dealt in turn."""
    lines = [
        json.dumps({"client": f"client-{place % clients:03}", "prompt": prompt, "response": completion})
        for place, (prompt, completion) in enumerate(pairs)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_batches(experiment_file: Path, path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """What each client's steps take in each round, in order: fedllm's own draws, for the rows that are not fedllm."""
    experiment: Experiment = fedllm.load(experiment_file)
    train = experiment.federation.load(experiment.key).train
    with path.open("w", encoding="utf-8") as lines:
        for place in range(experiment.rounds):
            for client, records in train.items():
                ctx = RoundContext(place, experiment.key, len(train), len(train), experiment.rounds, client=client)
                for index in (i for step in experiment.work.plan(len(records), ctx) for micro in step for i in micro):
                    prompt = prompt_text(records[index], tokenizer, experiment.task.template)
                    row = {"prompt": prompt, "completion": records[index]["response"]}
                    lines.write(json.dumps({"round": place, "client": client, **row}) + "\n")


def _pair(row: Mapping[str, Any], place: str) -> Pair:
    if "instruction" in row and "output" in row:
        prompt, completion = "\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]
    elif "messages" in row or ("prompt" in row and "response" in row):
        turns = messages_of(row)
        last = max((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        prompt, completion = "\n".join(turn["content"] for turn in turns[:last]), turns[last]["content"]
    else:
        held = ", ".join(row) or "nothing"
        raise DataError(
            f"{place} holds {held}; a record needs instruction and output, prompt and response, or messages"
        )
    return str(prompt).strip(), str(completion).strip()  # so that the tokens are the same however the text is cut
