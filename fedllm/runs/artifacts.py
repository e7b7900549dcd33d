"""What a run writes: the adapter, the clients' own adapters and the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.engines.checksummed_files import RESUME
from fedllm.engines.client_store import ClientStore
from fedllm.engines.process_memory import peak_memory
from fedllm.evaluation.scores import LOWER_IS_BETTER
from fedllm.events import (
    ClientFinished,
    DataReported,
    EngineStarted,
    Evaluated,
    Event,
    PersonalEvaluated,
    PrivacySpent,
    read,
)
from fedllm.experiment.record import Experiment
from fedllm.files import atomic_folder, to_json_text
from fedllm.models.base_models.load import Base, materialise
from fedllm.models.loaded_model import LoadedModel
from fedllm.report.fairness import personal_summary
from fedllm.runs.folder import Folder, write_whole
from fedllm.runs.state import ServerState
from fedllm.stages.round_trip import has_personal, personal_all
from fedllm.tensors.tree import Tree


def write_adapters(experiment: Experiment, folder: Folder, model: LoadedModel, state: ServerState) -> None:
    """The adapter, and the clients' own.

    Raises:
        RunError: the disk, or a client's memory is gone.
    """
    bound = model.with_constants(experiment.key)
    initial = model.initial_params(experiment.key)
    complete = {**bound.constants, **initial}
    save_adapter(model, state.base_delta.folded({**complete, **state.params}), folder.path / "adapter", RESUME)
    for client, own in personal_leaves(experiment, folder, state, {**initial, **state.params}).items():
        save_adapter(model, {**complete, **state.params, **own}, folder.path / "clients" / client / "adapter", RESUME)


def write_summary(folder: Folder, figures: Mapping[str, Any]) -> None:
    """Last of all, for it marks the run as finished."""
    write_whole(folder.summary, to_json_text(figures, indent=2) + "\n")


def save_adapter(model: LoadedModel, params: Tree, folder: Path, then: str = "") -> None:
    """One adapter folder, whole or not at all. `then`: what to do once a disk that refuses it has been mended."""
    with atomic_folder(folder, then) as part:
        model.adapter.save(params, part, base_name(model))


def save_base(base: Base, folder: Path) -> None:
    """One model folder that transformers loads, whole or not at all."""
    with atomic_folder(folder) as part:
        base.model.save_pretrained(part)
        base.tokenizer.save_pretrained(part)


def base_name(model: LoadedModel) -> str:
    """What an adapter's configuration calls its base: the folder that was loaded, or the hub id."""
    base = model.base
    if base.folder is None and "/" in base.name:
        return base.name
    return str(materialise(base))


def personal_leaves(experiment: Experiment, folder: Folder, state: ServerState, params: Tree) -> dict[str, Tree]:
    """What the model of each client that remembers something has of its own. `params`: complete, of the server.

    Raises:
        RunError: a client's memory is gone or damaged.
    """
    stages = experiment.pipeline
    if not has_personal(stages) or not folder.memories.is_dir():
        return {}
    store = ClientStore(folder.memories)
    found: dict[str, Tree] = {}
    clients = {path.name for path in folder.memories.iterdir() if path.is_dir()}
    store.require({client: version for client, version in state.remembered.items() if client not in clients})
    for client in sorted(clients):
        memories = store.load(client, state.round, len(stages))
        found[client] = personal_all(stages, params, memories, state.states, client)
    return found


def newcomer(experiment: Experiment, state: ServerState, params: Tree, client: str) -> Tree:
    """What the model of a client that remembers nothing has of its own."""
    stages = experiment.pipeline
    return personal_all(stages, params, [{} for _ in stages], state.states, client)


def summary(
    experiment: Experiment,
    folder: Folder,
    state: ServerState,
    *,
    engine: str,
    seconds: float,
    title: str,
    failure: str = "",
) -> dict[str, Any]:
    """The figures of `summary.json`. `failure`: why the run has no result."""
    told = DataReported | ClientFinished | EngineStarted | Evaluated | PersonalEvaluated | PrivacySpent
    events = [event for _, event in read(folder.events) if isinstance(event, told)]
    totals, spent = state.totals, [event for event in events if isinstance(event, PrivacySpent)]
    evaluated = {event.which: event for event in events if isinstance(event, Evaluated)}
    tables = {
        which: dict(evaluated[which].metrics) if which in evaluated else None
        for which in ("base", "federated", "local_only", "fedavg", "centralised")
    }
    federated = evaluated.get("federated")
    personal = [event for event in events if isinstance(event, PersonalEvaluated)]
    own = {"personal": personal_summary(personal[-1], evaluated)} if personal else {}
    return {
        "experiment_hash": folder.about["experiment_hash"],
        "engine": engine,
        "model": title,
        "rounds": state.round,
        "failure": failure or None,
        "seconds": round(seconds, 3),
        "seconds_per_round": round(totals.seconds / max(1, state.round), 4),
        "tokens_trained": totals.tokens,
        "tokens_per_second": round(totals.tokens / totals.seconds, 2) if totals.seconds else 0.0,
        "tokens_computed": totals.computed,
        "share_of_peak": share_of_peak(totals.computed, totals.seconds, events),
        "bytes_up": totals.bytes_up,
        "bytes_down": totals.bytes_down,
        "evaluation_bytes": totals.evaluation_bytes,
        "peak_rss_bytes": peak_memory(),
        "best_round": state.best[0] if state.best else None,
        "eval": tables,
        "notes": {which: event.note for which, event in evaluated.items() if event.note},
        "clients": _clients(events, federated),
        "worst": _worst(federated),
        "epsilon": spent[-1].epsilon if spent else None,
        **own,
    }


def share_of_peak(tokens: int, seconds: float, events: Sequence[Event]) -> float | None:
    """4 x parameters x computed tokens a second, the work of a pass forward and back through a frozen model, over what
    the engine's workers reach in matrix products; None where no engine has measured that."""
    found = [event for event in events if isinstance(event, EngineStarted)]
    if not found or not found[-1].peak or not seconds:
        return None
    return round(4 * found[-1].parameters * tokens / seconds / found[-1].peak, 4)


def _clients(events: Sequence[Event], federated: Evaluated | None) -> dict[str, dict[str, Any]]:
    clients: dict[str, dict[str, Any]] = {}
    for event in events:
        if isinstance(event, DataReported):
            clients = {c: {"train": n, "heldout": event.heldout.get(c, 0)} for c, n in event.train.items()}
        elif isinstance(event, ClientFinished) and event.client in clients:
            clients[event.client]["loss"] = event.loss
    for client, scores in (federated.clients if federated else {}).items():
        clients.setdefault(client, {})["eval"] = dict(scores)
    return clients


def _worst(federated: Evaluated | None) -> dict[str, float]:
    """The worst client's figure of each metric."""
    if federated is None:
        return {}
    found: dict[str, float] = {}
    for name in {name for scores in federated.clients.values() for name in scores}:
        values = [value for scores in federated.clients.values() if (value := scores.get(name)) is not None]
        if values:
            found[name] = max(values) if name.partition("/")[0] in LOWER_IS_BETTER else min(values)
    return dict(sorted(found.items()))
