"""What a run is made from beside its settings: the content of its data files and of its base model.

Neither is part of the experiment's hash, so the run folder keeps checksums of both (`about.inputs` in
`experiment.yaml`), and a run whose inputs have changed since is not resumed.

    data    SHA-256 of each file
    model   a checksum of weights, configuration and tokenizer, and the dtype in which it was loaded
    start   a checksum of the adapter's initial values
    stamp   names, sizes and times of the model's files: while they are the same, no model has to be loaded to compare
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.errors import FedllmError
from fedllm.experiment.record import Experiment
from fedllm.models.loaded_model import LoadedModel, load, stamp

Inputs = Mapping[str, Any]


def inputs_of(experiment: Experiment, model: LoadedModel) -> Inputs:
    """Of the experiment now."""
    return {
        "data": {file: _sha256(Path(file).expanduser()) for file in experiment.federation.files()},
        "dtype": str(model.base.model.dtype),
        "model": model.base.digest,
        "start": model.start_digest(experiment.key),
        "stamp": stamp(experiment.task),
    }


def changed(experiment: Experiment, then: Inputs, now: Inputs) -> list[str]:
    """What has changed, for an error."""
    return [*changed_data(then, now), *changed_model(experiment, then, now)]


def changed_data(then: Inputs, now: Inputs) -> list[str]:
    """The files of data among it."""
    known = then.get("data", {})
    return [f"the data file {file}" for file in known if now["data"].get(file) != known[file]]


def changed_model(experiment: Experiment, then: Inputs, now: Inputs) -> list[str]:
    """The model, and what the adapter begins with, among it. A model in another dtype cannot be compared."""
    if then.get("dtype") != now["dtype"]:
        return []
    if then.get("model") != now["model"]:
        return [f"the base model {experiment.task.model}"]
    return [] if then.get("start") == now["start"] else ["what the adapter begins with"]


def changed_since(experiment: Experiment, then: Inputs) -> list[str]:
    """The same of a finished run, whose model is loaded only if its files are other ones."""
    found = changed_data(then, {"data": {file: _sha256(Path(file).expanduser()) for file in then.get("data", {})}})
    if then.get("stamp") in (None, stamp(experiment.task)):
        return found
    try:
        return [*found, *changed_model(experiment, then, inputs_of(experiment, load(experiment.task)))]
    except FedllmError:
        return [*found, f"the base model {experiment.task.model}"]


def _sha256(path: Path) -> str:
    """Of a file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
