"""Decoder layers that run as one operation (`layers/decoder_layer.py`): which layers can, and in which passes.

This saves a twentieth of a local step: the autograd graph, the modules and some sums. Layers of another form, and
passes that need more, use the model's own layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedllm.models.adapters.lora import Adapted
from fedllm.models.kernels import ops
from fedllm.models.layers.attention import SHORT
from fedllm.models.layers.base_delta_linear import frozen
from fedllm.models.layers.decoder_layer import LINEARS, Linear, Plan, counted, decoder_layer
from fedllm.models.layers.forward_context import Forward, current, forward_context
from fedllm.models.layers.low_rank_linear import Frozen
from fedllm.models.layers.prefix_attention import leaf_name
from fedllm.models.layers.rms_norm import RMSNorm
from fedllm.models.layers.short_attention import Row, sequences
from fedllm.models.layers.swiglu import SwiGLU

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATHS = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {
    name: f"mlp.{name}_proj" for name in ("gate", "up", "down")
}
CHILDREN = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {f"{name}_proj" for name in "qkvo"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
PROBE = (3, 4)  # lengths of two sequences
NEAR = {torch.bfloat16: 0.02, torch.float32: 1e-4}  # of what a layer adds


def prepare(model: PreTrainedModel) -> bool:
    """Give the decoder's layers that compute this such an operation; whether all of them do.

    Their norms, gates and rotary embeddings are prepared before.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not ops.supports(model):
        return False
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    found = [FusedDecoderLayer.of(layer) for layer in layers if _has_form(layer)]
    same = [whole for whole in found if _is_near(whole)]
    for whole in same:
        whole.layer.forward = whole
    return 0 < len(layers) == len(same)


@dataclass(frozen=True, eq=False)
class FusedDecoderLayer:
    """A layer's forward pass. `plain`: the one that it has of its own; `parts`: those of its modules."""

    layer: Any
    plain: Callable[..., Any]
    parts: Mapping[str, Any]

    @staticmethod
    def of(layer: nn.Module) -> FusedDecoderLayer:
        """Of a prepared layer."""
        return FusedDecoderLayer(
            layer, layer.forward, {name: vars(layer.get_submodule(name)).get("forward") for name in CHILDREN[""]}
        )

    def __call__(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        """(1, T, d) of a packed row to (1, T, d); otherwise as the layer itself."""
        plan = None if args else self._plan(hidden_states, current(), options)
        if plan is None:
            return self.plain(hidden_states, *args, **options)
        return decoder_layer(hidden_states[0], plan)[None]

    def _plan(self, hidden: Tensor, now: Forward, options: Mapping[str, Any]) -> Plan | None:
        """None where the layer's own pass is needed."""
        attention, turns = self.layer.self_attn, options.get("position_embeddings")
        packed = now.lengths is not None and max(now.lengths) <= SHORT and options.get("attention_mask") is None
        if not packed or turns is None or options.get("past_key_values") is not None or not self._is_untouched():
            return None
        if leaf_name(attention.layer_idx, "key") in now.stack or not ops.supports(hidden, *turns):
            return None
        linears = dict(self._linears(now))
        if len(linears) < len(LINEARS):
            return None
        assert now.lengths is not None
        sizes = now.client_tokens or (hidden.shape[1],)
        wanted = now.wanted if attention.layer_idx == attention.config.num_hidden_layers - 1 else None
        return Plan(
            linears=linears,
            norms=(self.parts["input_layernorm"], self.parts["post_attention_layernorm"]),
            turns=(turns[0][0], turns[1][0]),
            sequences=sequences(Row(now.lengths, now.shared)),
            scaling=attention.scaling,
            sizes=sizes,
            sizes_after=sizes if wanted is None else counted(wanted, sizes),
            wanted=wanted,
        )

    def _is_untouched(self) -> bool:
        """Whether the modules still are what they were found to be, and their norms stand still."""
        own = all(vars(self.layer.get_submodule(name)).get("forward") is part for name, part in self.parts.items())
        return own and not any(
            part.norm.weight.requires_grad for part in self.parts.values() if isinstance(part, RMSNorm)
        )

    def _linears(self, now: Forward) -> Iterator[tuple[str, Linear]]:
        for name, path in PATHS.items():
            found = _linear(self.layer.get_submodule(path), now)
            if found is not None:
                yield name, found


def _linear(layer: nn.Module, now: Forward) -> Linear | None:
    """None where it is more than a frozen matrix with low-rank adapters."""
    if type(layer) is not nn.Linear:
        return None
    adapted, found = vars(layer).get("forward"), Linear(layer.weight, layer.bias)
    if isinstance(adapted, Adapted):
        if not adapted.is_plain(now):
            return None
        b, still = now.stack.get(f"{adapted.path}.lora_B"), frozen(layer, adapted.path, now.stack)
        if (adapted.dropout and now.dropout) or not isinstance(still, Frozen) or still.rest is not None:
            return None
        if b is not None:
            found = Linear(still.weight, still.bias, adapted.scale, (now.stack[f"{adapted.path}.lora_A"], b))
    elif adapted is not None:
        return None
    fits = all(size % 4 == 0 for size in found.weight.shape) and ops.supports_product(found.weight)
    trains = found.weight.requires_grad or (found.bias is not None and found.bias.requires_grad)
    return found if fits and not trains else None


def _has_form(layer: nn.Module) -> bool:
    """Whether its modules are these and no others, and are prepared."""
    if not all(_children(layer, path) == names for path, names in CHILDREN.items()):
        return False
    attention: Any = layer.get_submodule("self_attn")
    parts = {name: vars(layer.get_submodule(name)).get("forward") for name in CHILDREN[""]}
    prepared = all(isinstance(part, RMSNorm) for name, part in parts.items() if name.endswith("norm"))
    prepared = prepared and isinstance(parts["mlp"], SwiGLU) and parts["self_attn"] is not None
    plain = isinstance(vars(attention).get("scaling"), float) and not [*attention.parameters(recurse=False)]
    window, size = getattr(attention.config, "sliding_window", None), vars(attention).get("head_dim", 1)
    return prepared and plain and (window is None or window >= SHORT) and size % ops.WIDTH == 0


def _children(layer: nn.Module, path: str) -> set[str]:
    return {name for name, _ in layer.get_submodule(path).named_children()}


@torch.no_grad()
def _is_near(whole: FusedDecoderLayer) -> bool:
    """Whether the layer adds that much to a row of two sequences."""
    attention, tokens = whole.layer.self_attn, sum(PROBE)
    drawn = torch.Generator().manual_seed(0)
    dtype = attention.q_proj.weight.dtype
    x = torch.randn(1, tokens, attention.q_proj.in_features, generator=drawn).to(dtype)
    angles = torch.linspace(0, 9, tokens * attention.head_dim).view(1, tokens, -1)
    turns = angles.cos().to(dtype), angles.sin().to(dtype)
    with forward_context(Forward({}, PROBE)):
        if whole._plan(x, current(), {"position_embeddings": turns}) is None:
            return False
        found, expected = whole(x, position_embeddings=turns), whole.plain(x, position_embeddings=turns)
    if not isinstance(expected, Tensor) or expected.shape != x.shape:
        return False
    return float((found - expected).float().norm()) <= NEAR[dtype] * float((expected - x).float().norm())
