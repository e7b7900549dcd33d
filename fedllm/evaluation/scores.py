"""Held-out scores as sums and counts, so that clients' figures add up like any other part.

    nll           mean negative log-likelihood of a target token, in nats      perplexity   exp(nll)
    exact_match   greedy answer equals the response                              rouge_l      its ROUGE-L
    accuracy      multiple choice by log-likelihood a token; ties share the point; a record with a choice that does not
                  fit into `max_length` is left out

With `by` each metric is also given over the records of each value of that field: `exact_match/private`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedllm.data.federation import Population
from fedllm.errors import ConfigError, DataError, Record, nearest, place_of, with_record_place
from fedllm.evaluation.record_length import Unfit, is_choice, options_of, unfit
from fedllm.evaluation.settings import Evaluation
from fedllm.evaluation.text_metrics import choice_score, exact_match, rouge_l
from fedllm.models.batch import Example
from fedllm.models.chat_turns import response_text
from fedllm.models.loaded_model import LoadedModel
from fedllm.tensors.tree import Tree

Pair = tuple[float, float]  # a record's share of a metric's sum and count
LOWER_IS_BETTER = frozenset({"nll", "perplexity"})


@dataclass(frozen=True)
class Scorer:
    """What is measured. `groups`: the values of the field `evaluation.by`, of all clients."""

    evaluation: Evaluation
    max_length: int
    groups: tuple[str, ...] = ()

    @staticmethod
    def of(evaluation: Evaluation, max_length: int, population: Population) -> Scorer:
        """The scorer of clients' held-out records, each cut to `max_length` tokens.

        Raises:
            DataError: a held-out record lacks the field `by`, or what a metric needs.
        """
        if "accuracy" in evaluation.metrics:
            _require_choices(population, evaluation.limit)
        by, groups = evaluation.by, set()
        if by is not None:
            distinct = {id(records): (client, records) for client, records in population.heldout.items()}
            for client, records in distinct.values():
                for record in records:
                    if by not in record:
                        where = place_of(record) or f"a held-out record of {client}"
                        raise DataError(f"evaluation.by: {where} has no '{by}'{nearest(by, record)}")
                    groups.add(str(record[by]))
        return Scorer(evaluation, max_length, tuple(sorted(groups)))

    def sums(self, model: LoadedModel, params: Tree, records: Sequence[Record]) -> Tree:
        """Tensors `sum/METRIC` and `count/METRIC`, float64, the same names whatever the records."""
        chosen = self.chosen(records)
        return self.add_up(chosen, self.pairs(model, params, chosen))

    def chosen(self, records: Sequence[Record]) -> Sequence[Record]:
        """The first `limit` of a client's records."""
        return records[: self.evaluation.limit]

    def unfit(self, model: LoadedModel, population: Population) -> Unfit:
        """The held-out records that `max_length` is too short for; one that many clients hold counts once.

        Raises:
            DataError: a record does not suit a metric.
        """
        distinct = {id(records): self.chosen(records) for records in population.heldout.values()}
        return unfit(model, list(distinct.values()), self._measured(), self.max_length)

    def pairs(self, model: LoadedModel, params: Tree, records: Sequence[Record]) -> dict[str, list[Pair]]:
        """Each metric's value and count of each record."""
        return {metric: METRICS[metric](self, model, params, records) for metric in self._measured()}

    def add_up(self, records: Iterable[Record], measured: Mapping[str, Sequence[Pair]]) -> Tree:
        """Sums and counts over records, in all and by group."""
        totals = {name: [0.0, 0.0] for name in self._names()}
        for metric, pairs in measured.items():
            for record, (value, count) in zip(records, pairs, strict=True):
                group = [f"{metric}/{record[self.evaluation.by]}"] if self.evaluation.by is not None else []
                for name in (metric, *group):
                    totals[name][0] += value
                    totals[name][1] += count
        leaves = {f"sum/{name}": total[0] for name, total in totals.items()}
        leaves |= {f"count/{name}": total[1] for name, total in totals.items()}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in leaves.items()}

    def figures(self, sums: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Sums to the metrics that were asked for. A metric that nothing was measured for is left out."""
        found: dict[str, float] = {}
        for name in self._names():
            count = float(sums.get(f"count/{name}", 0.0))
            if count > 0:
                found[name] = float(sums[f"sum/{name}"]) / count
        metrics = self.evaluation.metrics
        if "perplexity" in metrics:
            found |= {f"perplexity{n[3:]}": math.exp(min(v, 700.0)) for n, v in found.items() if n.startswith("nll")}
        return {name: value for name, value in found.items() if name.partition("/")[0] in metrics}

    def _measured(self) -> list[str]:
        names = ["nll" if name == "perplexity" else name for name in self.evaluation.metrics]
        return list(dict.fromkeys(names))

    def _names(self) -> Iterable[str]:
        for metric in self._measured():
            yield metric
            yield from (f"{metric}/{group}" for group in self.groups)


def _require_choices(population: Population, limit: int | None) -> None:
    """Refuse a record that is to be scored and is no multiple choice.

    Raises:
        DataError: names the record.
    """
    distinct = {id(records): (client, records) for client, records in population.heldout.items()}
    for client, records in distinct.values():
        for record in records[:limit]:
            if not is_choice(record):
                where = place_of(record) or f"a held-out record of {client}"
                raise DataError(
                    f"the metric accuracy needs 'choices', a list, and 'answer', one of them, which {where} has not; "
                    "map them with federation.shards.fields, or leave accuracy out of evaluation.metrics"
                )


def nll(scorer: Scorer, model: LoadedModel, params: Tree, records: Sequence[Record]) -> list[Pair]:
    """Sum and number of target tokens. A record that many clients hold is scored once, batch by batch."""
    places: dict[bytes, int] = {}  # of each distinct example, by its content
    owners: list[int | None] = []
    found: list[Pair] = []
    waiting: list[Example] = []

    def score() -> None:
        losses = model.sequence_nll(params, waiting, scorer.evaluation.batch_size)
        found.extend((float(row.double().sum()), float(len(row))) for row in losses)
        waiting.clear()

    for example in model.encode_all(records, scorer.max_length):
        if example is None:
            owners.append(None)
            continue
        owners.append(places.setdefault(_content(example), len(places)))
        if owners[-1] == len(found) + len(waiting):
            waiting.append(example)
            if len(waiting) == scorer.evaluation.batch_size:
                score()
    score()
    return [(0.0, 0.0) if place is None else found[place] for place in owners]


def _content(example: Example) -> bytes:
    """What makes two examples the same."""
    return hashlib.sha256(torch.stack([example.tokens, example.targets]).numpy().tobytes()).digest()


def generated(
    measure: Callable[[str, str], float],
) -> Callable[[Scorer, LoadedModel, Tree, Sequence[Record]], list[Pair]]:
    """A metric on greedy answers."""

    def metric(scorer: Scorer, model: LoadedModel, params: Tree, records: Sequence[Record]) -> list[Pair]:
        settings = scorer.evaluation
        prompts = [tuple(model.prompt(record)) for record in records]
        distinct = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))  # little padding
        answers: dict[tuple[int, ...], str] = {}
        for at in range(0, len(distinct), settings.batch_size):
            chosen = distinct[at : at + settings.batch_size]
            answers |= dict(zip(chosen, model.generate(params, chosen, settings.max_new_tokens), strict=True))
        wanted = [with_record_place([record], lambda some: response_text(some[0])) for record in records]
        return [(measure(answers[prompt], text), 1.0) for prompt, text in zip(prompts, wanted, strict=True)]

    return metric


def accuracy(scorer: Scorer, model: LoadedModel, params: Tree, records: Sequence[Record]) -> list[Pair]:
    """Multiple choice: `choices` (texts) and `answer` (index of the right one) beside the prompt or the turns."""
    pairs: list[Pair] = []
    for record in records:
        options = options_of(model, record, scorer.max_length)
        if options is None:
            pairs.append((0.0, 0.0))
            continue
        losses = model.sequence_nll(params, options, scorer.evaluation.batch_size)
        pairs.append((choice_score([-float(row.mean()) for row in losses], int(record["answer"])), 1.0))
    return pairs


METRICS: Mapping[str, Callable[[Scorer, LoadedModel, Tree, Sequence[Record]], list[Pair]]] = {
    "nll": nll,
    "exact_match": generated(exact_match),
    "rouge_l": generated(rouge_l),
    "accuracy": accuracy,
}


def check_metrics(evaluation: Evaluation) -> None:
    """Refuse unknown metrics.

    Raises:
        ConfigError: names the nearest known one.
    """
    known = [*METRICS, "perplexity"]
    for name in evaluation.metrics:
        if name not in known:
            raise ConfigError(f"evaluation.metrics: unknown metric '{name}'{nearest(name, known)}")
