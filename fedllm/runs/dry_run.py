"""Checks before the first round that need the loaded model and the data: updates that fit bandwidths, records that fit
the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedllm.data.federation import Population
from fedllm.errors import CheckError, ClientError
from fedllm.experiment.record import Experiment
from fedllm.messages.context import ClientContext, Profile, RoundContext
from fedllm.models.loaded_model import LoadedModel
from fedllm.runs import server_round
from fedllm.stages.round_trip import encode_all, receive_all
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from fedllm.training.base import ClientJob
from fedllm.training.phases import run_phases

GENERATED = frozenset({"exact_match", "rouge_l"})  # metrics of answers


def dry_run(experiment: Experiment, model: LoadedModel, profiles: Mapping[str, Profile]) -> None:
    """Let one client of each profile with a bandwidth send what it would send in the first round, without training.

    Raises:
        CheckError: its bandwidth does not hold the least that can be sent; names the client and what would do.
    """
    last_first = reversed(list(profiles.items()))
    capped = {profile: client for client, profile in last_first if profile.bandwidth is not None}
    if not capped:
        return
    fresh, stages = model.with_constants(experiment.key).initial_params(experiment.key), experiment.pipeline
    run = server_round.initial_state(experiment, fresh)
    everyone = RoundContext(0, experiment.key, len(profiles), len(profiles), experiment.rounds)
    for client, request in server_round.requests_for(experiment, run, list(capped.values()), everyone).items():
        memories: list[Tree] = [{} for _ in stages]
        local = ClientContext(request.ctx, initial_params=fresh)
        params, arrival = receive_all(stages, request.params, request.extras, memories, local)
        (outcome,) = run_phases(experiment.work, [ClientJob(request.ctx, tree.overlay(fresh, params), ())], model)
        assert not isinstance(outcome, str), outcome
        update, facts = outcome
        try:
            encode_all(stages, update, arrival, memories, replace(local, facts={**facts, "examples": 1.0}))
        except ClientError as error:
            raise CheckError(f"federation: client {client}: {error}") from error


def require_positions(experiment: Experiment, model: LoadedModel, population: Population) -> None:
    """Read the records that evaluation will use, if the model has a table of positions.

    Raises:
        DataError: one of them has more tokens, or would be given more in an answer, than the model has positions.
    """
    evaluation, length = experiment.evaluation, experiment.work.max_length
    if model.base.positions is None or not evaluation.metrics:
        return
    for records in population.heldout.values():
        for record in records[: evaluation.limit]:
            texts = record["choices"] if "accuracy" in evaluation.metrics and "choices" in record else ()
            for _ in model.encode_all([record, *({**record, "response": text} for text in texts)], length):
                pass
            if not GENERATED.isdisjoint(evaluation.metrics):
                model.require_answers(len(model.prompt(record)), evaluation.max_new_tokens)
