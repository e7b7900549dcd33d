"""Held-out records and the work's `max_length`: what is too long to be scored, or is scored in part."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from fedllm.errors import DataError, Record, with_record_place
from fedllm.models.batch import Example
from fedllm.models.chat_turns import answered
from fedllm.models.loaded_model import LoadedModel


@dataclass(frozen=True)
class Unfit:
    """How many held-out records are too long. `cut`: scored without their end; `dropped`: not scored, as no target
    token is left; `choices`: left out of the accuracy, as one of their choices does not fit."""

    cut: int = 0
    dropped: int = 0
    choices: int = 0

    def warnings(self, max_length: int) -> list[str]:
        """A sentence for each kind that there is."""
        tokens = f"{max_length} tokens, the work's max_length"
        told = {
            f"{self.cut} held-out records are cut to {tokens}": self.cut,
            f"{self.dropped} held-out records keep no target token in {tokens}, and are not scored": self.dropped,
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


def is_choice(record: Record) -> bool:
    """Whether a record has choices and the index of the right one."""
    choices, answer = record.get("choices"), record.get("answer")
    return isinstance(choices, list) and type(answer) is int and 0 <= answer < len(choices)


def options_of(model: LoadedModel, record: Record, max_length: int) -> list[Example] | None:
    """A record of multiple choice with each choice as its answer; None if one of them does not fit.

    Raises:
        DataError: the template does not fit the record; with its place.
    """
    options = with_record_place([record], lambda _: list(model.encode_all(_answered(record), max_length)))
    fitting = [option for option in options if option is not None and not option.cut]
    return fitting if len(fitting) == len(options) else None


def _answered(record: Record) -> Iterator[Record]:
    if not is_choice(record):
        raise DataError("the metric accuracy needs 'choices', a list, and 'answer', one of them")
    return (answered(record, text) for text in record["choices"])
