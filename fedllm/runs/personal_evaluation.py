"""After the last round: the clients' own models on each other's held-out records."""

from __future__ import annotations

from fedllm.data.federation import Population
from fedllm.evaluation.personal import cross_scores, spread_evenly
from fedllm.evaluation.scores import Scorer
from fedllm.events import Emit, PersonalEvaluated, Progress
from fedllm.experiment.record import Experiment
from fedllm.models.loaded_model import LoadedModel
from fedllm.runs.folder import Folder
from fedllm.runs.loaded_run import loaded
from fedllm.runs.state import ServerState


def scored(
    experiment: Experiment,
    folder: Folder,
    model: LoadedModel,
    population: Population,
    state: ServerState,
    emit: Emit,
) -> PersonalEvaluated:
    """The models of `evaluation.personal.clients` clients that have held-out records, spread evenly. A client that was
    never drawn has what its method gives a newcomer.

    Raises:
        RunError: a client's memory is gone or damaged.
    """
    assert experiment.evaluation.personal is not None, "nobody asked"
    some = [client for client, records in population.heldout.items() if len(records)]
    clients = spread_evenly(some, experiment.evaluation.personal.clients)
    opened = loaded(folder, experiment, model, state)

    def told(done: int) -> None:
        emit(Progress("own models", done, len(clients)))

    scorer = Scorer.of(experiment.evaluation, experiment.work.max_length, population)
    told(0)
    found = cross_scores(scorer, model, opened.params_of, population.heldout, clients, told)
    return PersonalEvaluated(state.round, *found, population=len(population.clients))
