"""Typed events: what a run says while it runs. The display, the report and the audits read nothing else.

One JSON object a line, appended and flushed; `event` names the type in snake case, `at` is seconds since the epoch.
A number that is not finite is written as null, and is None when it is read again. A line that was cut off by a crash is
dropped when the log is opened again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedllm.errors import RunError

Scores = Mapping[str, float | None]  # None: no number, as of a model that has diverged


@dataclass(frozen=True)
class Event:
    """Something that happened."""


@dataclass(frozen=True)
class RunStarted(Event):
    """`settings` is the resolved experiment; `model` the title of the base model; `seconds` had
    passed since the command began."""

    name: str
    experiment_hash: str
    engine: str
    model: str
    rounds: int
    clients: int
    trainable: int
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    seconds: float = 0.0


@dataclass(frozen=True)
class Resumed(Event):
    """The run goes on with `round`; what the log holds of it or later was lost. `seconds`: as of `RunStarted`."""

    round: int
    seconds: float = 0.0


@dataclass(frozen=True)
class DataReported(Event):
    """`train`, `heldout`: records per client; `labels`: per client, records per label; `divergence`: mean
    Jensen-Shannon divergence (base 2) of the clients' label histograms from the pooled one; `left_out`: records
    that no client holds; `cut`: examples shortened to `max_length`; `dropped`: examples left without a label; the same
    of held-out records, and `heldout_choices`: those of multiple choice that are too long to be scored."""

    train: Mapping[str, int]
    heldout: Mapping[str, int]
    labels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    divergence: float | None = None
    left_out: int = 0
    cut: int = 0
    dropped: int = 0
    heldout_cut: int = 0
    heldout_dropped: int = 0
    heldout_choices: int = 0


@dataclass(frozen=True)
class EngineChosen(Event):
    """Where this process runs the clients, and why there."""

    engine: str
    reason: str


@dataclass(frozen=True)
class EngineStarted(Event):
    """Workers that train at most `stack` clients at a time within `memory_budget` bytes; None: no budget. `threads`: of
    each stack of the first round. `parameters`: of the base model; `peak`: floating-point operations a second that the
    workers reach together in products of its shapes."""

    workers: int
    stack: int
    memory_budget: int | None
    parameters: int
    peak: float | None
    threads: int = 1


@dataclass(frozen=True)
class EngineAdjusted(Event):
    """What an engine did about memory that does not suffice, or about a process that was lost."""

    round: int
    text: str


@dataclass(frozen=True)
class MemoryMeasured(Event):
    """Peak memory of the process so far in bytes, on the device where it computes: what the engine's estimates add up
    to, and what was measured."""

    round: int
    predicted: int
    measured: int


@dataclass(frozen=True)
class RoundStarted(Event):
    """The cohort is drawn."""

    round: int
    cohort: tuple[str, ...]


@dataclass(frozen=True)
class MessageSent(Event):
    """Serialised bytes of one message. `direction` is "down" or "up"; `parts` are the values' bytes per part, the
    rest is the header."""

    round: int
    call: str
    client: str
    direction: str
    bytes: int
    parts: Mapping[str, int]


@dataclass(frozen=True)
class ClientFinished(Event):
    """A client's reply has arrived. The figures are None where the aggregator sees none of them."""

    round: int
    client: str
    loss: float | None
    tokens: int | None
    seconds: float


@dataclass(frozen=True)
class ClientFailed(Event):
    """A client was lost in this round, in the call of that name; an evaluation follows `round` complete rounds."""

    round: int
    client: str
    reason: str
    call: str = "work"


@dataclass(frozen=True)
class RoundFinished(Event):
    """A round is complete: its checkpoint, where one was due, is on disk."""

    round: int
    clients: int
    loss: float | None
    bytes_up: int
    bytes_down: int
    tokens: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class PrivacyPromised(Event):
    """What a run promises each `unit`, a client or an example, before its first round: (epsilon, delta) after all of
    them, None without noise. `noised_by`: server or client. `relation`: of the runs that are compared, add-remove or
    replace-one. `sampling`: the scheme of the clients as plain values; `simulated`: its draws follow from the run's
    public seed. `seeded_noise`: the noise does, too. `in_the_clear`: losses, counts and scores leave the clients beside
    what is promised. `adaptive`: the clip moves. `assumptions`: what it all rests on, in words."""

    unit: str
    mechanism: str
    noised_by: str
    epsilon: float | None
    delta: float
    target_epsilon: float | None
    noise_multiplier: float
    clip: float
    relation: str
    accountant: str
    sampling: Mapping[str, Any]
    simulated: bool
    seeded_noise: bool
    in_the_clear: bool
    adaptive: bool
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class PrivacySpent(Event):
    """What all rounds so far have spent of the privacy of one `unit`, a client or an example: (epsilon, delta), None
    without noise. `noise_multiplier`: noise over clip, the clip of this round. `signal_to_noise`: of this round's sum,
    its 2-norm over that of its noise, estimated from the noised sum; None where clients add the noise."""

    round: int
    mechanism: str
    unit: str
    epsilon: float | None
    delta: float
    noise_multiplier: float
    clip: float
    signal_to_noise: float | None = None


@dataclass(frozen=True)
class Diagnosed(Event):
    """A round's clients and the aggregation, as the server sees them (docs/explanation/diagnostics.md has the
    formulas); None: does not apply.

    `drift`: mean over the `answered`; `clients`: of each whose update was kept. `cosines`: of these in their order, the
    upper triangle row by row, `cosine` its mean. `bias`, `bias_of_means`: relative to `product_norm`, which has the
    adapter's scale. `effective_rank`, `energy_above` the `smallest_rank`: means over the layers.
    """

    round: int
    answered: int
    drift: float
    clients: Mapping[str, float]
    cosine: float | None
    dissimilarity: float | None
    bias: float | None
    bias_of_means: float | None
    product_norm: float | None
    effective_rank: float | None
    energy_above: float | None
    smallest_rank: int | None
    cosines: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evaluated(Event):
    """`which` is base, federated, local_only, fedavg or centralised; `round` counts completed rounds."""

    which: str
    round: int
    metrics: Scores
    clients: Mapping[str, Scores] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class PersonalEvaluated(Event):
    """The own models of some clients after `round` completed rounds. `matrix`: of each on each of their test sets;
    `others`: of each on those of the others together; `union`: on all of them. `population`: how many clients there
    are."""

    round: int
    matrix: Mapping[str, Mapping[str, Scores]]
    others: Mapping[str, Scores]
    union: Mapping[str, Scores]
    population: int


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """`round` rounds are complete and on disk."""

    round: int


@dataclass(frozen=True)
class Progress(Event):
    """Work outside of rounds (baselines, evaluations): step `done` of `total`."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Warned(Event):
    """Something that a user should know; the run goes on. `round`: an alarm of that round; None: of no round."""

    text: str
    round: int | None = None


@dataclass(frozen=True)
class RunFinished(Event):
    """The run's end, and why if it is not the last round."""

    rounds: int
    seconds: float
    note: str = ""


Emit = Callable[[Event], None]


def kind(event: type[Event] | Event) -> str:
    """The type's name as written in the log: RoundFinished is "round_finished"."""
    cls = event if isinstance(event, type) else type(event)
    return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


KINDS: dict[str, type[Event]] = {kind(cls): cls for cls in Event.__subclasses__()}


def to_json(event: Event) -> dict[str, Any]:
    """An event as the log writes it, without its time."""
    return {"event": kind(event), **event.__dict__}


def from_json(record: Mapping[str, Any]) -> Event | None:
    """The event of a line. None for a type of a newer version; unknown fields are passed over.

    Raises:
        RunError: a field is missing.
    """
    cls = KINDS.get(record["event"])
    if cls is None:
        return None
    found = {item.name: record[item.name] for item in fields(cls) if item.name in record}
    try:
        # JSON has no tuples, and no event has a list.
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})
    except TypeError as error:
        raise RunError(f"an event cannot be read: {error}") from error


def read(path: Path) -> Iterator[tuple[float, Event]]:
    """The events of a log with their times. Unknown types and fields (of a newer version) are passed over.

    Raises:
        RunError: a line is no event.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
                at, event = float(record["at"]), from_json(record)
            except (ValueError, LookupError, TypeError) as error:
                raise RunError(f"{path}, line {number}, is no event ({error}); delete the line") from error
            if event is not None:
                yield at, event
