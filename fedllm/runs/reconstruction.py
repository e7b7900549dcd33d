"""What the server could read of a client's texts in the first round, tried on the round itself.

A run is the same to the bit when it is computed again, so that no message has to be kept for this: the first round's
update is made once more, as the aggregator sees it (of one client, or the sum where it hides single ones), and
attacked. Only the noise of clients is drawn anew, for nobody knows what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedllm.engines.client import Site, noise_key
from fedllm.engines.client_store import ClientStore
from fedllm.engines.loopback import one_by_one
from fedllm.errors import RunError, nearest
from fedllm.evaluation.audits.dager import Reconstruction, dager
from fedllm.evaluation.audits.overlap import best_overlaps
from fedllm.evaluation.audits.spans import layer_spans
from fedllm.events import ClientFailed, Event
from fedllm.experiment.record import Experiment
from fedllm.messages.context import RoundContext
from fedllm.messages.traits import Bracket, Fact
from fedllm.messages.update import Request
from fedllm.models.loaded_model import LoadedModel
from fedllm.runs.loaded_run import open_run
from fedllm.runs.server_round import ObservedCall, initial_state, requests_for
from fedllm.runs.state import ServerState
from fedllm.stages.round_trip import decode_all

BLOCKS = ("model.layers.0.self_attn", "model.layers.1.self_attn")


@dataclass(frozen=True)
class Leak:
    """What was reconstructed.

    Args:
        clients: whose update, or whose sum, the server saw. texts: how many went into it; exact: found whole.
        tokens: different tokens of these texts; recalled: how many are in the bag; bag: its size; chance: what share of
            tokens a bag of this size would have by chance. budget: directions that the update has.
        rouge_1, rouge_2: means over the texts. original, reconstructed: of the text that was found best.
        reason: why there is no more; empty where there is nothing to say.
    """

    clients: tuple[str, ...]
    texts: int
    exact: int
    tokens: int
    recalled: int
    bag: int
    chance: float
    budget: int
    rouge_1: float
    rouge_2: float
    original: str
    reconstructed: str
    reason: str


def reconstruct(folder: Path, client: str | None = None) -> Leak:
    """Attack the first round of a run, as its server saw it.

    Raises:
        RunError: no such run or client, or a run to which the attack does not apply, with the reason.
    """
    opened = open_run(folder)
    experiment, model = opened.experiment, opened.model
    refusal = _not_covered(experiment)
    if refusal:
        raise RunError(f"{folder}: {refusal}; this attack does not apply, which is no proof of safety")
    population = experiment.federation.load(experiment.key)
    initial = model.initial_params(experiment.key)
    cohort = experiment.federation.sample(population.clients, 0, experiment.key)
    hidden = Fact.HIDDEN not in experiment.aggregator.traits.loses
    chosen = cohort[0] if client is None and cohort else str(client)
    if chosen not in cohort:
        raise RunError(f"{folder}: no client '{chosen}' took part in the first round{nearest(chosen, cohort)}")
    run = initial_state(experiment, initial)
    everyone = RoundContext(0, experiment.key, len(cohort), len(population.clients), experiment.rounds)
    site = Site(experiment, model, population, ClientStore(None), noise_key=noise_key(experiment, None))
    seen = cohort if hidden else [chosen]
    every = requests_for(experiment, run, cohort, everyone)
    requests = {name: every[name] for name in seen}
    delta = _seen(experiment, run, site, requests, everyone)
    spans = [layer_spans(delta, {**initial, **run.params}, block) for block in BLOCKS]
    if spans[0] is None or spans[1] is None:
        raise RunError(
            f"{folder}: the update holds neither weights nor lora_B of the first two blocks' queries, keys and values; "
            "this attack does not apply, which is no proof of safety"
        )
    references = [text for name in seen for text in _texts(site, requests[name])]
    return _leak(tuple(seen), references, dager(model, spans[0], spans[1]), spans[0].rank, model)


def as_json(found: Leak) -> dict[str, Any]:
    """Plain values."""
    return {**asdict(found), "clients": list(found.clients)}


def _not_covered(experiment: Experiment) -> str:
    """Why the theory says nothing about this run; empty where it does."""
    work, stages = experiment.work, experiment.pipeline
    adapter = experiment.task.adapter
    if Fact.GRADIENTS in work.traits.loses:
        return "its local work takes no gradients, whose directions are those of the inputs"
    if work.rule != "sgd":
        return f"the local steps are {work.rule}, whose scaling of each entry hides the space of the inputs"
    if getattr(work, "weight_decay", 0) and adapter.needs_weights:
        return "weight_decay moves the weights as well, along all directions"
    if getattr(adapter, "dropout", 0):
        return "the adapter's dropout makes other inputs of the texts"
    if getattr(adapter, "init", "zero") != "zero" or getattr(adapter, "init_from", None):
        return "its adapter does not begin with lora_B = 0, so that more than lora_B moves in the first step"
    if work.idle:
        return f"{work.idle}, so that nothing was sent"
    if any(Fact.SHAPE in stage.traits.loses for stage in stages):
        return "a stage sends the update in another shape than the weights"
    if experiment.task.scope.phases:
        return "its local work has several phases"
    return ""


def _seen(
    experiment: Experiment, run: ServerState, site: Site, requests: dict[str, Request], everyone: RoundContext
) -> dict[str, Any]:
    """What the server reads: the total, back from the wire and divided by its weight, before any noise of its own."""
    failures: list[str] = []

    def heard(event: Event) -> None:
        if isinstance(event, ClientFailed):
            failures.append(event.reason)

    watch = ObservedCall(one_by_one(site, heard), heard, 0, shown=False, upload=experiment.aggregator.upload)
    total = experiment.aggregator.reduce(watch, requests)
    kept = [stage for stage in experiment.pipeline if stage.traits.bracket in (Bracket.WIRE, Bracket.WEIGH)]
    known = replace(everyone, cohort=len(requests))
    found, _ = decode_all(kept, total, run.params, [{} for _ in kept], known)
    if "delta" not in found.parts:
        raise RunError("the first round could not be made once more: " + (failures or ["no client answered"])[0])
    return dict(found.parts["delta"].tree)


def _texts(site: Site, request: Request) -> list[tuple[int, ...]]:
    """The texts of a client's batches in the round, without the last token, which no update holds."""
    ctx, examples = request.ctx, site.examples(str(request.ctx.client))
    plan = site.experiment.work.for_profile(ctx.profile).plan(len(examples), ctx)
    used = sorted({place for step in plan for micro in step for place in micro})
    return [tuple(examples[place].tokens[: examples[place].needed].tolist()) for place in used]


def _leak(
    clients: tuple[str, ...],
    references: Sequence[tuple[int, ...]],
    found: Reconstruction,
    budget: int,
    model: LoadedModel,
) -> Leak:
    there = {token for text in references for token in text}
    overlaps = best_overlaps(found.texts, references)
    best = max(range(len(references)), key=lambda at: overlaps[at].rouge_1 + overlaps[at].rouge_2)
    size = int(model.base.model.get_input_embeddings().num_embeddings)
    decode = model.base.tokenizer.decode
    return Leak(
        clients=clients,
        texts=len(references),
        exact=sum(one.exact for one in overlaps),
        tokens=len(there),
        recalled=len(there & set(found.bag)),
        bag=len(found.bag),
        chance=len(found.bag) / size,
        budget=budget,
        rouge_1=sum(one.rouge_1 for one in overlaps) / len(overlaps),
        rouge_2=sum(one.rouge_2 for one in overlaps) / len(overlaps),
        original=str(decode(list(references[best]))),
        reconstructed=str(decode(list(overlaps[best].found))),
        reason=found.reason,
    )
