"""Held-out records and the work's `max_length`: what is too long to be scored, or is scored in part."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fedllm.batch import Example
from fedllm.errors import DataError
from fedllm.federation import Record, naming
from fedllm.tasks.model import LoadedModel
from fedllm.tasks.turns import answered


@dataclass(frozen=True)
class Unfit:
    """How many held-out records are too long. `cut`: scored without their end; `dropped`: not scored, as no labelled
    token is left; `choices`: left out of the accuracy, as one of their choices does not fit."""

    cut: int = 0
    dropped: int = 0
    choices: int = 0

    def warnings(self, max_length: int) -> list[str]:
        """A sentence for each kind that there is."""
        tokens = f"{max_length} tokens, the work's max_length"
        told = {
            f"{self.cut} held-out records are cut to {tokens}": self.cut,
            f"{self.dropped} held-out records keep no labelled token in {tokens}, and are not scored": self.dropped,
            f"{self.choices} held-out records have a choice that does not fit into {tokens}, and are left out of the "
            "accuracy": self.choices,
        }
        return [text for text, count in told.items() if count]


def unfit(model: LoadedModel, groups: Sequence[Sequence[Record]], metrics: Collection[str], max_length: int) -> Unfit:
    """Count the records that are too long for the metrics `nll` and `accuracy`; generated answers have no limit.

    Raises:
        DataError: a record does not suit a metric.
    """
    cut = dropped = choices = 0
    for records in groups:
        if "nll" in metrics:
            for example in model.encode_all(records, max_length):
                cut += example is not None and example.cut > 0
                dropped += example is None
        if "accuracy" in metrics:
            choices += sum(options_of(model, record, max_length) is None for record in records)
    return Unfit(cut, dropped, choices)


def options_of(model: LoadedModel, record: Record, max_length: int) -> list[Example] | None:
    """A record with each of its choices as the answer; None if one of them does not fit.

    Raises:
        DataError: the record has no choices, or none of them is the right one; with its place.
    """

    def encoded(records: Sequence[Record]) -> list[Example | None]:
        choices, answer = records[0].get("choices"), records[0].get("answer")
        if not isinstance(choices, list) or type(answer) is not int or not 0 <= answer < len(choices):
            raise DataError("the metric accuracy needs records with 'choices' and 'answer'; map them with fields")
        return list(model.encode_all((answered(records[0], text) for text in choices), max_length))

    options = naming([record], encoded)
    fitting = [option for option in options if option is not None and not option.cut]
    return fitting if len(fitting) == len(options) else None
