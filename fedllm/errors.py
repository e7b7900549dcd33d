"""Every error that fedllm raises at a user, and nothing else.

    FedllmError(ValueError)
    |-- ConfigError        a file, key, name or value of an experiment
    |   `-- CheckError     a combination that `check` refuses before a model loads
    |-- DataError          records, fields, partitions (file and line where there is one)
    |-- ModelError         a base model that cannot be had, read or used
    |-- WireError          bytes that do not hold what they claim
    |-- ClientError        one client failed (client, round, step)
    |-- RunError           a run folder, a checkpoint, a resume, a limit that was reached
    `-- MissingExtra       an optional dependency, with its install line

Each message is one sentence: what is wrong, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MOST_NAMES = 50  # that an error lists


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


class RunError(FedllmError):
    """A run folder, a checkpoint, a resume or a limit."""


class MissingExtra(FedllmError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'fedllm[{extra}]'")


def reason(error: BaseException) -> str:
    """What went wrong in one line: an error's sentence, with its type where it is none of fedllm's own."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FedllmError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def nearest(name: str, known: Iterable[str]) -> str:
    """A tail for an error about an unknown name: the nearest known one, else all of them."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    if len(names) > MOST_NAMES:
        return f"; known: {', '.join(names[:MOST_NAMES])} and {len(names) - MOST_NAMES} more"
    return f"; known: {', '.join(names)}" if names else ""
