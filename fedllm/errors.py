"""Every error that fedllm raises at a user, and the helpers that word them.

    FedllmError(ValueError)
    |-- ConfigError        a file, key, name or value of an experiment
    |   `-- CheckError     a combination that `check` refuses before a model loads
    |-- DataError          records, fields, partitions (file and line where there is one)
    |-- ModelError         a base model that cannot be had, read or used
    |-- WireError          bytes that do not hold what they claim
    |-- ClientError        one client failed (client, round, step)
    |-- RoundVoid          a sum that cannot be had; its round counts as an empty one
    |-- RunError           a run folder, a checkpoint, a resume, a limit that was reached
    |-- PrivacyError       a privacy guarantee that cannot be given, or not be computed
    |-- SecureSumError     a party that refuses to go on with a secure sum
    `-- MissingExtra       an optional dependency, with its install line

Each message is one sentence: what is wrong, where, and what to do.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

MOST_NAMES = 50  # that an error lists
SIMILAR = 0.6  # of two names, from which on one may be meant by the other
ELSEWHERE = {  # what others call a setting or a value -> what it is called here
    "learning_rate": ("lr",),
    "local_steps": ("steps",),
    "max_steps": ("steps",),
    "num_train_epochs": ("epochs",),
    "local_epochs": ("epochs",),
    "per_device_train_batch_size": ("batch_size",),
    "gradient_accumulation_steps": ("accumulation",),
    "max_seq_length": ("max_length",),
    "max_seq_len": ("max_length",),
    "max_grad_norm": ("clip_norm",),
    "optim": ("optimizer",),
    "scheduler": ("lr_schedule",),
    "lr_scheduler_type": ("lr_schedule", "shape"),
    "num_rounds": ("rounds",),
    "num_clients": ("clients",),
    "dataset": ("data",),
    "split": ("partition",),
    "partitioner": ("partition",),
    "base_model": ("model",),
    "model_name_or_path": ("model",),
    "torch_dtype": ("dtype",),
    "random_seed": ("seed",),
    "gpu": ("cuda",),
    "r": ("rank",),
    "lora_r": ("rank",),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "target_modules": ("targets",),
    "use_rslora": ("rslora",),
}


class FedllmError(ValueError):
    """Something that a user can mend. The command line prints it and exits with code 2."""


class ConfigError(FedllmError):
    """A file, key, name or value of an experiment."""


class CheckError(ConfigError):
    """A combination that cannot be right, refused before a model loads."""


class DataError(FedllmError):
    """Records, fields or partitions."""


class ModelError(FedllmError):
    """A base model that cannot be had, read or used."""


class WireError(FedllmError):
    """Bytes that do not hold what they claim."""


class ClientError(FedllmError):
    """One client could not do its work; the round goes on without it."""


class RoundVoid(FedllmError):
    """A sum that cannot be had, and why; the round counts as an empty one."""


class RunError(FedllmError):
    """A run folder, a checkpoint, a resume or a limit."""


class PrivacyError(FedllmError):
    """A guarantee of differential privacy that cannot be given, or not be computed."""


class SecureSumError(FedllmError):
    """A party refuses to go on with a secure sum; `privacy/secure_aggregation/faults.py` has the kinds."""


class MissingExtra(FedllmError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'fedllm[{extra}]'")


def reason(error: BaseException) -> str:
    """What went wrong in one line: an error's sentence, with its type where it is none of fedllm's own."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FedllmError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def nearest(name: str, known: Iterable[str], similar: float = SIMILAR) -> str:
    """A tail for an error about an unknown name: the known one that means the same elsewhere or is spelt most like it,
    else all of them.

    similar: of two spellings, from 0 to 1, from which on one may be meant by the other. Proper names, such as those of
    methods, need more than the names of settings: fedmedian is no misspelt fedadam.
    """
    names = sorted(known)
    close = [other for other in ELSEWHERE.get(name, ()) if other in names]
    close = close or get_close_matches(name, names, n=1, cutoff=similar)
    if close:
        return f"; did you mean '{close[0]}'?"
    if len(names) > MOST_NAMES:
        return f"; known: {', '.join(names[:MOST_NAMES])} and {len(names) - MOST_NAMES} more"
    return f"; known: {', '.join(names)}" if names else ""


def require(holds: bool, owner: object, *, field: str, value: object, allowed: str) -> None:
    """Pass if `holds`. A NaN fails every comparison, so it is refused as well.

    Raises:
        ConfigError: "top_k.fraction is 2.0; it must be above 0 and at most 1".
    """
    if not holds:
        raise ConfigError(f"{config_name(owner)}.{field} is {value!r}; it must be {allowed}")


def config_name(component: object) -> str:
    """As an experiment file writes it: TopK is top_k."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(component).__name__).lower()


def counted(number: int, noun: str) -> str:
    """ "1 round", "2 rounds"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


Record = Mapping[str, Any]


Found = TypeVar("Found")


class LocatedRecord(dict[str, Any]):
    """A record that knows where it was read: `place`, such as "notes/train.jsonl:3"."""

    __slots__ = ("place",)

    def __init__(self, record: Record, place: str) -> None:
        super().__init__(record)
        self.place = place


def place_of(record: Record) -> str | None:
    """Where a record was read, if it knows."""
    return record.place if isinstance(record, LocatedRecord) else None


def with_record_place(records: Sequence[Record], action: Callable[[Sequence[Record]], Found]) -> Found:
    """What an action finds of records.

    Raises:
        DataError: the action's own, with the place of the first record that it fails for alone.
    """
    try:
        return action(records)
    except DataError:
        for record in records:
            try:
                action([record])
            except DataError as error:
                place = place_of(record)
                if place is None:
                    raise
                raise DataError(f"{place}: {error}") from error
        raise


def not_written(path: Path, error: OSError, then: str = "") -> RunError:
    """The error of a file or folder that the disk refuses, with what would help.

    `then`: what to do after that; default: nothing more than to try again.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    help = "make room on the disk" if full else "choose a place that can be written to" if not then else "mend that"
    return RunError(f"{path} could not be written ({error.strerror or error}); {help}{then and f', then {then}'}")
