"""A loaded task: the base model with its adapter, one per process.

It has a greedy generation of its own beside transformers' `generate`: parameters come in with each call and enter
through the adapter, as in training, so that one loaded model answers for any client.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm.errors import CheckError, DataError, with_record_place
from fedllm.models import fused_decoder
from fedllm.models.adapters.base import Attached, ClientExamples, HasBaseline, Movable, WorksOut
from fedllm.models.adapters.lora import Lora
from fedllm.models.base_models.load import Base, load_base
from fedllm.models.base_models.vocabulary import require_rows
from fedllm.models.batch import Batch, Example, collate
from fedllm.models.kernels import ops
from fedllm.models.kernels.build import library
from fedllm.models.layers import activation_checkpointing, model_probe, rms_norm, rotary, swiglu
from fedllm.models.layers.cross_entropy import row_losses, softcap
from fedllm.models.task import Scope, Task
from fedllm.models.templates import prompt_tokens
from fedllm.rng import Key
from fedllm.tensors.base_delta import BaseDelta
from fedllm.tensors.checksum import checksum
from fedllm.tensors.tree import Tree, matches

TOGETHER = 64  # records in one call of the tokenizer


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """What works and evaluations call. Parameters come in with every call; the model keeps none but `constants`: the
    adapter's tensors that the scope freezes, the same on every client. Empty parameters are the base model itself.
    `fused`: whether all of its decoder's layers can run as one operation each."""

    task: Task
    base: Base
    adapter: Attached
    constants: Tree = field(default_factory=dict)
    fused: bool = False

    @property
    def trains_by_kernels(self) -> bool:
        """Whether kernels compute all but a small part of a local step, whose bits do not depend on threads."""
        adapter = self.task.adapter
        return self.fused and isinstance(adapter, Lora) and not adapter.dropout

    @property
    def device(self) -> str:
        """Where it computes."""
        return str(self.base.model.device)

    @property
    def why_not_stackable(self) -> str | None:
        """Why clients must train one at a time: the adapter or the architecture; None if they can be stacked."""
        adapter = self.task.adapter
        if not adapter.stackable:
            return f"adapter {type(adapter).__name__.lower()} trains one client at a time"
        return self.base.unpackable

    @property
    def shares_prefixes(self) -> bool:
        """Whether what a client's sequences begin with in common is computed once. Not in float64, which is for proofs:
        transformers' norms round to float32, and the gradients of the common tokens would add up in another order."""
        wide = self.base.model.dtype == torch.float64
        return self.task.adapter.shares and self.base.unpackable is None and not wide

    def start_digest(self, key: Key) -> str:
        """A checksum of the adapter's tensors at the start of a run, frozen ones included."""
        return checksum(self.adapter.initial_params(key.fold("adapter")))

    @property
    def backend(self) -> Mapping[str, str]:
        """`kernels`: whose computes what is no large product, where there is a choice: bfloat16 or float32 on a CPU."""
        return {"kernels": library().about} if ops.have_choice(self.base.model) else {}

    def with_constants(self, key: Key) -> LoadedModel:
        """This model with the frozen tensors of the run's key."""
        leaves = self.adapter.initial_params(key.fold("adapter"))
        frozen = {name: leaf.to(self.device) for name, leaf in leaves.items() if not self.task.scope.trains(name)}
        own = self.adapter.moved(BaseDelta()) if isinstance(self.adapter, Movable) else {}
        return replace(self, constants={**frozen, **own})

    def with_base_delta(self, base_delta: BaseDelta) -> LoadedModel:
        """This model with what was added to its frozen weights."""
        if not base_delta.steps:
            return self
        assert isinstance(self.adapter, Movable), "an adapter whose frozen side does not move"
        return replace(self, constants={**self.constants, **self.adapter.moved(base_delta)})

    def initial_params(self, key: Key) -> Tree:
        """The initial value of every tensor that trains.

        Raises:
            CheckError: the scope selects no tensor, or has a pattern that fits none.
        """
        leaves = self.adapter.initial_params(key.fold("adapter"))
        some = ", ".join([*list(leaves)[:2], "..."][: len(leaves)]) or "none"
        scope = self.task.scope
        for name, patterns in self._patterns():
            for pattern in patterns:
                if leaves and not any(matches(leaf, [pattern.removeprefix("!")]) for leaf in leaves):
                    what = f"'{pattern}' fits no tensor of the adapter (its tensors: {some})"
                    raise CheckError(f"task.scope.{name}: {what}")
        trained = {name: leaf for name, leaf in leaves.items() if scope.trains(name)}
        if not trained:
            raise CheckError(f"task.scope selects no tensor of the adapter on {self.task.model} (its tensors: {some})")
        if not scope.alternate and not any(scope.trains_in_round(name, 0) for name in trained):
            raise CheckError("task.scope.hold leaves nothing to train; name fewer tensors")
        for turn, pattern in enumerate(scope.alternate):
            if not any(scope.trains_in_round(name, turn) for name in trained):
                raise CheckError(f"task.scope.alternate: nothing trains in the turn of '{pattern}'; leave it out")
        return trained

    def _patterns(self) -> Iterator[tuple[str, Sequence[str]]]:
        """All patterns of the scope, by key."""
        scope = self.task.scope
        for name in ("train", "share", "freeze", "alternate", "hold"):
            yield name, vars(scope)[name]
        for at, phase in enumerate(scope.phases):
            yield f"phases[{at}].train", phase.train
            yield f"phases[{at}].beside", phase.beside

    @property
    def baseline(self) -> LoadedModel:
        """This model with the plain adapter of its kind, all of which trains; itself where it has that one."""
        settings, adapter = self.task.adapter.baseline, self.adapter
        if settings is self.task.adapter or not isinstance(adapter, HasBaseline):
            return self
        return replace(self, task=replace(self.task, adapter=settings, scope=Scope()), adapter=adapter.baseline)

    def worked_out(self, params: Tree, job: ClientExamples) -> Tree:
        """What the adapter works out of a client's examples at the end of its work."""
        return self.adapter.worked_out(self, params, job) if isinstance(self.adapter, WorksOut) else {}

    def losses(self, stack: Tree, batch: Batch) -> Tensor:
        """(K,): one mean loss per client."""
        return self.task.objective(self, stack, batch)

    def row_losses(self, stack: Tree, batch: Batch) -> Tensor:
        """(N,): negative log-likelihood of each labelled row, in nats."""
        if stack:
            constants = {name: leaf.expand(len(batch.counts), *leaf.shape) for name, leaf in self.constants.items()}
            stack = {**constants, **stack}
        hidden = self.adapter.hidden(stack, batch)
        rows, targets = batch.rows.to(hidden.device), batch.targets.to(hidden.device)
        return row_losses(hidden[rows], self.adapter.head(stack), targets, softcap(self.base.model))

    def encode(self, record: Mapping[str, Any], max_length: int) -> Example | None:
        """A record to an example of the task's objective; None if nothing of it carries a label."""
        (found,) = self.encode_all([record], max_length)
        return found

    def encode_all(self, records: Iterable[Mapping[str, Any]], max_length: int) -> Iterator[Example | None]:
        """The same of several, some at a time.

        Raises:
            DataError: an example has more tokens than the model has positions, or one that it does not know.
        """
        rest = iter(records)
        while some := list(islice(rest, TOGETHER)):
            for found in self.task.objective.encode(some, self.base.tokenizer, self.task.template, max_length):
                if found is not None:
                    self._require_fit(found)
                yield found

    def _require_fit(self, example: Example) -> None:
        require_rows(example.tokens.tolist(), self.base.tokenizer, self.base.model)
        if len(example.tokens) > self._room:
            what = f"a record of {len(example.tokens)} tokens"
            advice = f"set work.sgd.max_length to {self._room} or less"
            raise DataError(f"{self._positions}, too few for {what}; {advice}")

    def prompt(self, record: Mapping[str, Any]) -> list[int]:
        """The tokens before a record's last response.

        Raises:
            DataError: the template does not fit the record, or a token has no row; with the record's place.
        """
        ids = with_record_place([record], lambda _: prompt_tokens(record, self.base.tokenizer, self.task.template))
        require_rows(ids, self.base.tokenizer, self.base.model)
        return ids

    @torch.no_grad()
    def sequence_nll(self, params: Tree, examples: Sequence[Example], batch_size: int = 16) -> list[Tensor]:
        """For each example, the negative log-likelihoods of its target tokens."""
        stack = {name: leaf[None] for name, leaf in params.items()}
        found: list[Tensor] = []
        for at in range(0, len(examples), batch_size):
            batch = collate([examples[at : at + batch_size]], share=self.shares_prefixes)
            losses = self.row_losses(stack, batch).cpu()
            found += [losses[batch.row_sequences == place] for place in range(len(batch.lengths))]
        return found

    @torch.no_grad()
    def generate(self, params: Tree, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
        """Greedy continuations, without special tokens; batched, with a cache, until an end token.

        Raises:
            DataError: the model has fewer positions than the longest prompt with an answer of `max_new_tokens`.
        """
        eos, device = int(self.base.tokenizer.eos_token_id), self.base.model.device
        width = max(map(len, prompts))
        self.require_answers(width, max_new_tokens)
        tokens = torch.tensor([[eos] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        cache, given, ends = None, tokens, torch.tensor(self.end_tokens, device=device)
        params = {**self.constants, **params} if params else {}
        alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            logits, cache = self.adapter.logits(params, given, mask, cache)
            chosen = torch.where(alive, logits.argmax(1), eos)
            alive &= ~torch.isin(chosen, ends)
            tokens = torch.cat([tokens, chosen[:, None]], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            if not bool(alive.any()):
                break
            given = tokens if cache is None else chosen[:, None]
        return [str(text) for text in self.base.tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)]

    def require_answers(self, prompt: int, max_new_tokens: int) -> None:
        """
        Raises:
            DataError: the model has too few positions for a prompt of so many tokens with its answer.
        """
        left = self._room - prompt + 1  # the last token of an answer is not read
        if left < max(1, max_new_tokens):
            what = f"a prompt of {prompt} tokens and max_new_tokens {max_new_tokens}"
            raise DataError(
                f"{self._positions}, too few for {what}; "
                + (f"set max_new_tokens to {left} or less" if left > 0 else "shorten the prompt")
            )

    @property
    def _room(self) -> float:
        """The longest sequence that the model can read."""
        positions = self.base.positions
        return math.inf if positions is None else positions - self.task.adapter.virtual_tokens

    @property
    def _positions(self) -> str:
        """For errors."""
        virtual = self.task.adapter.virtual_tokens
        taken = f", {virtual} of them taken by the adapter" if virtual else ""
        return f"{self.base.title} has {self.base.positions} positions{taken}"

    @property
    def end_tokens(self) -> list[int]:
        """What ends an answer: the tokenizer's end token, and those that the model names for generation."""
        settings = self.base.model.generation_config
        named = settings.eos_token_id if settings is not None else None
        listed = named if isinstance(named, list) else [] if named is None else [named]
        return sorted({int(self.base.tokenizer.eos_token_id), *listed})


def load(task: Task) -> LoadedModel:
    """Load the base model and attach the adapter: once per process and task, as long as the files stay as they are.

    Raises:
        ModelError: the base model cannot be had, or fedllm does not compute what it does.
        ConfigError: the adapter does not fit it.
    """
    return _load(task, stamp(task))


def stamp(task: Task) -> str:
    """Names, sizes and times of a model's files and of those of an adapter to start from, hashed; of what is given by
    its path. While they are the same, so is what is in them."""
    told = []
    for name in (task.model, getattr(task.adapter, "init_from", None)):
        place = Path(name or "-").expanduser()
        place = place / "adapter" if (place / "adapter").is_dir() else place
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            if path.is_file():
                told.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    return hashlib.sha256(repr(told).encode()).hexdigest()


@lru_cache(maxsize=1)
def _load(task: Task, stamp: str) -> LoadedModel:
    base = load_base(task.model, dtype=task.dtype, device=task.device, quantize=task.quantize)
    unpackable = model_probe.prepare(base.model, task.model)
    rms_norm.prepare(base.model)
    swiglu.prepare(base.model)
    rotary.prepare(base.model)
    fused = unpackable is None and fused_decoder.prepare(base.model)
    activation_checkpointing.prepare(base.model)
    base = replace(base, unpackable=unpackable, caching=unpackable is None or model_probe.supports_cache(base.model))
    return LoadedModel(task, base, task.adapter.attach(base), fused=fused)


load.cache_clear = _load.cache_clear  # type: ignore[attr-defined]  # as of what it stands in front of
