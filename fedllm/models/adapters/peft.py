"""Any adapter of Hugging Face's peft by its name: `peft: {type: ia3, settings: {target_modules: [k_proj]}}`.

The layers are peft's own. Its trained parameters are taken out as tensors and put in for each forward pass, so one
client trains at a time, in one thread. Sequences are padded on the right. Where fedllm has an adapter of its own (LoRA,
prompt tuning), that one is faster: it is stacked, and it generates with a cache.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedllm.errors import ConfigError, nearest
from fedllm.models.adapters.base import Adapter, Attached, Decoder, trained_dtype
from fedllm.models.base_models.load import Base
from fedllm.models.batch import Batch
from fedllm.models.layers.cross_entropy import Head, capped, logits_of, softcap
from fedllm.models.layers.forward_context import Forward, forward_context
from fedllm.rng import Key
from fedllm.tensors.tree import Tree

OURS = frozenset({"peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"})
LOOPS = {"adalora": "moves ranks between layers by calls between its steps"}  # types that need a trainer of their own
# Initial values of peft's LoRA that it makes from a pass over data, or from base weights that it changes.
STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva")
REFUSALS = (TypeError, ValueError, AttributeError, RuntimeError, ImportError)  # of peft, or of what it calls
UNSAFE = frozenset({"prompt_tuning_init_state_dict_path", "tokenizer_kwargs", "adapters"})  # files that may hold code


@dataclass(frozen=True)
class Peft(Adapter):
    """An adapter of peft.

    Args:
        type: peft's name of it in lower case: ia3, prefix_tuning, lora (with `use_dora`), vera, ...
        settings: of its config class, JSON values.
    """

    type: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            json.dumps(dict(self.settings))
        except TypeError as error:
            raise ConfigError(f"task.adapter.peft.settings must be plain JSON values: {error}") from error

    def __hash__(self) -> int:
        return hash((self.type, json.dumps(dict(self.settings), sort_keys=True)))

    @property
    def needs_weights(self) -> bool:
        """peft's layers hold and merge them."""
        return True

    @property
    def virtual_tokens(self) -> int:
        """Those of its prompts."""
        return int(self.settings.get("num_virtual_tokens") or 0)

    def attach(self, base: Base) -> Attached:
        """Wrap a copy of the base model's structure; the weights are shared.

        Raises:
            ConfigError: an unknown type or setting, or one that peft refuses or fedllm cannot train.
        """
        config = self.config()
        return AttachedPeft(self, Decoder(base), config, Wrapped.of(base, config, seed=0, settings=self))

    def config(self) -> Any:
        """peft's own.

        Raises:
            ConfigError: an unknown type or setting, or one that peft refuses.
        """
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        known = {kind.value.lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if self.type not in known:
            raise ConfigError(f"task.adapter.peft.type: unknown type '{self.type}'{nearest(self.type, known)}")
        if self.type in LOOPS:
            raise ConfigError(f"task.adapter.peft.type: {self.type} {LOOPS[self.type]}, which fedllm does not make")
        start = self.settings.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(STARTS):
            raise ConfigError(
                f"task.adapter.peft.settings: init_lora_weights: {start} changes the base model's weights or needs a "
                "pass over data; leave it out, or use lora with init: singular"
            )
        cls = known[self.type]
        allowed = {item.name for item in fields(cls) if item.init} - OURS - UNSAFE
        for name in self.settings:
            if name not in allowed:
                raise ConfigError(f"task.adapter.peft.settings: {self.type} has no '{name}'{nearest(name, allowed)}")
        try:
            return cls(**self.settings, task_type="CAUSAL_LM")
        except (TypeError, ValueError) as error:
            raise ConfigError(f"task.adapter.peft.settings: {_first_line(error)}") from error


@dataclass(frozen=True, eq=False)
class Wrapped:
    """A peft model. `trained`: peft's name of each tensor. `added`: modules of peft, not of the base model."""

    model: Any
    trained: Mapping[str, str]
    added: Sequence[nn.Module]

    @staticmethod
    def of(base: Base, config: Any, *, seed: int, settings: Peft, share: bool = True) -> Wrapped:
        """Wrap a copy of the base model, of its structure alone if it is to `share` the weights."""
        from peft import get_peft_model

        weights = [*base.model.parameters(), *base.model.buffers()]
        before = _told(weights)
        inner = copy.deepcopy(base.model, {id(leaf): leaf for leaf in weights} if share else {})
        own, head = {id(module) for module in inner.modules()}, inner.get_output_embeddings()
        try:
            with _seeded(seed), warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=FutureWarning)  # between peft and transformers
                warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # `merged` sees to it
                model = get_peft_model(inner, copy.deepcopy(config))
        except (LookupError, ArithmeticError, *REFUSALS) as error:
            raise ConfigError(f"task.adapter.peft: {settings.type} on {base.name}: {_first_line(error)}") from error
        if before != _told(weights):
            raise ConfigError(f"task.adapter.peft: these settings of {settings.type} change the base model's weights")
        if model.get_base_model().get_output_embeddings() is not head:
            raise ConfigError("task.adapter.peft: the output head cannot be adapted; leave it out of target_modules")
        trained = {_leaf_name(name): name for name, value in model.named_parameters() if value.requires_grad}
        model.eval()
        return Wrapped(model, trained, [module for module in model.modules() if id(module) not in own])

    def values(self) -> Mapping[str, Tensor]:
        """The parameter of each tensor."""
        found = dict(self.model.named_parameters())
        return {leaf: found[name] for leaf, name in self.trained.items()}

    def load(self, params: Tree) -> None:
        """Set the parameters."""
        with torch.no_grad():
            for name, value in self.values().items():
                value.copy_(params[name])

    @contextmanager
    def dropping(self, generators: tuple[torch.Generator, ...]) -> Iterator[None]:
        """The adapter's own dropout, keyed by the client's generator; none in evaluation."""
        if not generators:
            yield
            return
        with _seeded(int(torch.randint(2**62, (), generator=generators[0]))):
            for module in self.added:
                module.training = True
            try:
                yield
            finally:
                self.model.eval()


@dataclass(frozen=True, eq=False)
class AttachedPeft:
    """A peft adapter on a loaded base model. An empty stack is the base model."""

    settings: Peft
    decoder: Decoder
    config: Any
    wrapped: Wrapped

    def initial_params(self, key: Key) -> Tree:
        """peft's own initial values, drawn from `key`."""
        base = self.decoder.base
        made = Wrapped.of(base, self.config, seed=key.fold("peft").seed32(), settings=self.settings)
        return {name: value.detach().to("cpu", trained_dtype(base), copy=True) for name, value in made.values().items()}

    def hidden(self, stack: Tree, batch: Batch) -> Tensor:
        """(T, d)."""
        assert len(batch.counts) == 1, "an adapter of peft is not stackable"
        if not stack:
            return self.decoder.row({}, batch)
        params = {name: leaf[0] for name, leaf in stack.items()}
        with self.wrapped.dropping(batch.dropout):
            padded = self._padded(params, batch.tokens.split(batch.lengths))
        return torch.cat([row[:length] for row, length in zip(padded, batch.lengths, strict=True)])

    def head(self, stack: Tree) -> Head:
        """The frozen head."""
        return self.decoder.head()

    def logits(self, params: Tree, tokens: Tensor, mask: Tensor, cache: Any | None) -> tuple[Tensor, Any | None]:
        """(B, V) of the next token, without a cache."""
        if not params:
            return self.decoder.padded({}, {"input_ids": tokens}, mask, cache)
        rows = [row[keep] for row, keep in zip(tokens, mask.bool(), strict=True)]
        padded = self._padded(params, rows)
        last = torch.stack([hidden[len(row) - 1] for hidden, row in zip(padded, rows, strict=True)])
        return capped(logits_of(last, self.decoder.head()), softcap(self.decoder.base.model)), None

    def save(self, params: Tree, folder: Path, base_name: str) -> None:
        """peft's own layout, by peft itself."""
        made = Wrapped.of(self.decoder.base, self.config, seed=0, settings=self.settings)
        made.load(params)
        made.model.peft_config["default"].base_model_name_or_path = base_name
        made.model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # a form for a model card, not filled in

    def merged(self, params: Tree, base: Base | None = None) -> Mapping[str, Tensor]:
        """The weights that the adapter changes, as peft merges them into a copy; the head stays the base model's."""
        refusal = f"a {self.settings.type} adapter cannot be merged into weights; export --to peft"
        if self.config.is_prompt_learning:
            raise ConfigError(refusal)
        base = self.decoder.base if base is None else base
        made = Wrapped.of(base, self.config, seed=0, settings=self.settings, share=False)
        made.load(params)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=UserWarning)  # a tied head is seen to by whoever writes it
                whole = made.model.to(trained_dtype(self.decoder.base)).merge_and_unload()
        except REFUSALS as error:
            raise ConfigError(refusal) from error
        own = dict(base.model.named_parameters())
        merged = {name: leaf.detach() for name, leaf in whole.named_parameters() if name in own}
        return {name: leaf for name, leaf in merged.items() if not torch.equal(leaf, own[name].to(leaf.dtype))}

    def _padded(self, params: Tree, rows: Sequence[Tensor]) -> Tensor:
        """Sequences (L,) of one client to their last hidden states (S, longest, d), padded on the right."""
        device, longest = self.decoder.base.model.device, max(map(len, rows))
        tokens = nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
        mask = torch.stack([torch.arange(longest) < len(row) for row in rows]).long().to(device)
        leaves = {self.wrapped.trained[name]: params[name].to(value) for name, value in self.wrapped.values().items()}
        inputs = {"input_ids": tokens, "attention_mask": mask, "output_hidden_states": True, "logits_to_keep": 1}
        with forward_context(Forward({})):
            output = functional_call(self.wrapped.model, leaves, (), inputs)
        hidden: Tensor = output.hidden_states[-1][:, -longest:]  # without a prompt that peft may have put before
        return hidden


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """peft draws from the global generators: seed them here, and give them back as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _told(weights: Sequence[Tensor]) -> list[tuple[int, str]]:
    """Where weights lie and what they add up to: what another place, or a change in it, changes."""
    return [(leaf.data_ptr(), repr(leaf.sum(dtype=torch.float64).item())) for leaf in weights]


def _leaf_name(name: str) -> str:
    """peft's parameter name without its wrapper and its adapter's name."""
    return name.removeprefix("base_model.model.").replace(".default", "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
