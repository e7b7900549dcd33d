"""A decoder layer as one operation, its gradient by hand: kernels one after another, and no graph between them.

    h  = norm(x)     q, k, v = turned(Q h), turned(K h), V h     x' = x + O attention(q, k, v)
    h' = norm(x')    g, u = G h', U h'                           y  = x' + D (silu(g) u)

The last layer computes what follows its attention for the tokens alone whose states are needed: those with a label.

Each capital is a frozen matrix with what low-rank adapters of K clients add to it. Sums with x and x', and those of the
slopes that several products have of h and h', are made within the products before they are rounded. What that saves, a
graph, modules and sums, is a twentieth of a local step. Layers of another form, and passes that need more, stay as they
are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedllm.native import kernels, layouts
from fedllm.native.kernels import Form
from fedllm.tasks.adapters.lora import Adapted
from fedllm.tasks.adapters.low_rank import Frozen
from fedllm.tasks.attention import SHORT
from fedllm.tasks.current import Forward, computing, current
from fedllm.tasks.gated import Gated
from fedllm.tasks.norms import Normed
from fedllm.tasks.prefixed import leaf_name
from fedllm.tasks.shifted import frozen
from fedllm.tasks.short_attention import Row, sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LINEARS = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {
    name: f"mlp.{name}_proj" for name in ("gate", "up", "down")
}
CHILDREN = {
    "": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "self_attn": {f"{name}_proj" for name in "qkvo"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
PROBE = (3, 4)  # lengths of two sequences
AFTER = ("o", "gate", "up", "down")  # attention
NEAR = 0.02  # of what a layer adds, in 16 bits

Pair = tuple[Tensor, Tensor]


def prepare(model: PreTrainedModel) -> int:
    """Give the decoder's layers that compute this such an operation; how many they are.

    Their norms, gates and rotary embeddings are prepared before.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not kernels.serve(model):
        return 0
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    found = [Whole.of(layer) for layer in layers if _has_form(layer)]
    same = [whole for whole in found if _is_near(whole)]
    for whole in same:
        whole.layer.forward = whole
    return len(same)


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer in a pass. `pair`: factors A (K, rank, in) and B (K, out, rank), where it has them."""

    weight: Tensor
    bias: Tensor | None
    scale: float = 0.0
    pair: Pair | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """What a pass through a layer has beside tensors that train. `sizes[k]` rows are client k's, `sizes_after[k]` of
    those that go on after attention: `wanted`, where these are not all."""

    linears: Mapping[str, Linear]
    norms: tuple[Normed, Normed]
    turns: Pair
    sequences: kernels.Sequences
    scaling: float
    sizes: tuple[int, ...]
    sizes_after: tuple[int, ...]
    wanted: Tensor | None = None

    def few(self, x: Tensor) -> Tensor:
        """The rows that go on after attention."""
        return x if self.wanted is None else x.index_select(0, self.wanted)

    def all(self, few: Tensor, rows: int) -> Tensor:
        """All rows, of which the others are zero."""
        if self.wanted is None:
            return few
        return few.new_zeros(rows, *few.shape[1:]).index_copy_(0, self.wanted, few)

    def counts(self, name: str) -> tuple[int, ...]:
        """Rows of each client in a product."""
        return self.sizes_after if name in AFTER else self.sizes

    def product(self, name: str, x: Tensor, pair: Pair | None, plus: Tensor | None = None) -> tuple[Tensor, Any]:
        """(T, in) to (T, out), added to `plus`; and what the slope needs."""
        linear = self.linears[name]
        matrix = layouts.matrix(linear.weight, Form.TURNED)
        if pair is None:
            return kernels.product(x, matrix, linear.bias, plus), None
        y = x.new_empty(len(x), len(linear.weight))
        return y, kernels.low_rank_(y, x, pair, self.counts(name), linear.scale, (x, matrix, linear.bias), plus)

    def slope(self, name: str, dy: Tensor, saved: Saved, plus: Tensor | None = None, needs_x: bool = True) -> Slopes:
        """Slopes of x, added to `plus`, and of both factors."""
        linear, matrix = self.linears[name], layouts.matrix(self.linears[name].weight, Form.PLAIN)
        if saved.pair is None:
            return (kernels.product(dy, matrix, None, plus) if needs_x else None), None, None
        kept, dx = (saved.x, saved.z, *saved.pair), torch.empty_like(saved.x) if needs_x else None
        da, db = kernels.low_rank_slope(dy, kept, self.counts(name), linear.scale, saved.needs, dx, matrix, plus)
        return dx, da, db


Slopes = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Saved:
    """What a product's slope needs. `needs`: whether the factors do."""

    x: Tensor
    z: Tensor
    pair: Pair | None
    needs: tuple[bool, bool]


@dataclass(frozen=True, eq=False)
class Whole:
    """A layer's forward pass. `plain`: the one that it has of its own; `parts`: those of its modules."""

    layer: Any
    plain: Callable[..., Any]
    parts: Mapping[str, Any]

    @staticmethod
    def of(layer: nn.Module) -> Whole:
        """Of a prepared layer."""
        return Whole(
            layer, layer.forward, {name: vars(layer.get_submodule(name)).get("forward") for name in CHILDREN[""]}
        )

    def __call__(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        """(1, T, d) of a packed row to (1, T, d); otherwise as the layer itself."""
        plan = None if args else self._plan(hidden_states, current(), options)
        if plan is None:
            return self.plain(hidden_states, *args, **options)
        leaves = [leaf for name in LINEARS for leaf in plan.linears[name].pair or (None, None)]
        y: Tensor = _Whole.apply(hidden_states[0], plan, *leaves)  # type: ignore[no-untyped-call]
        return y[None]

    def _plan(self, hidden: Tensor, now: Forward, options: Mapping[str, Any]) -> Plan | None:
        """None where the layer's own pass is needed."""
        attention, turns = self.layer.self_attn, options.get("position_embeddings")
        packed = now.lengths is not None and max(now.lengths) <= SHORT and options.get("attention_mask") is None
        if not packed or turns is None or options.get("past_key_values") is not None or not self._is_untouched():
            return None
        if leaf_name(attention.layer_idx, "key") in now.stack or not kernels.serve(hidden, *turns):
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
            sizes_after=sizes if wanted is None else _counted(wanted, sizes),
            wanted=wanted,
        )

    def _is_untouched(self) -> bool:
        """Whether the modules still are what they were found to be, and their norms stand still."""
        own = all(vars(self.layer.get_submodule(name)).get("forward") is part for name, part in self.parts.items())
        return own and not any(
            part.norm.weight.requires_grad for part in self.parts.values() if isinstance(part, Normed)
        )

    def _linears(self, now: Forward) -> Iterator[tuple[str, Linear]]:
        for name, path in LINEARS.items():
            found = _linear(self.layer.get_submodule(path), now)
            if found is not None:
                yield name, found


def _linear(layer: nn.Module, now: Forward) -> Linear | None:
    """None where it is more than a frozen matrix with low-rank adapters."""
    if type(layer) is not nn.Linear:
        return None
    adapted, found = vars(layer).get("forward"), Linear(layer.weight, layer.bias)
    if type(adapted) is Adapted:
        b, still = now.stack.get(f"{adapted.path}.lora_B"), frozen(layer, adapted.path, now.stack)
        if (adapted.dropout and now.dropout) or not isinstance(still, Frozen) or still.rest is not None:
            return None
        if b is not None:
            found = Linear(still.weight, still.bias, adapted.scale, (now.stack[f"{adapted.path}.lora_A"], b))
    elif adapted is not None:
        return None
    fits = all(size % 4 == 0 for size in found.weight.shape) and kernels.serve_product(found.weight)
    trains = found.weight.requires_grad or (found.bias is not None and found.bias.requires_grad)
    return found if fits and not trains else None


def _has_form(layer: nn.Module) -> bool:
    """Whether its modules are these and no others, and are prepared."""
    if not all(_children(layer, path) == names for path, names in CHILDREN.items()):
        return False
    attention: Any = layer.get_submodule("self_attn")
    parts = {name: vars(layer.get_submodule(name)).get("forward") for name in CHILDREN[""]}
    prepared = all(isinstance(part, Normed) for name, part in parts.items() if name.endswith("norm"))
    prepared = prepared and isinstance(parts["mlp"], Gated) and parts["self_attn"] is not None
    plain = isinstance(vars(attention).get("scaling"), float) and not [*attention.parameters(recurse=False)]
    window, size = getattr(attention.config, "sliding_window", None), vars(attention).get("head_dim", 1)
    return prepared and plain and (window is None or window >= SHORT) and size % kernels.WIDTH == 0


def _children(layer: nn.Module, path: str) -> set[str]:
    return {name for name, _ in layer.get_submodule(path).named_children()}


@torch.no_grad()
def _is_near(whole: Whole) -> bool:
    """Whether the layer adds that much to a row of two sequences."""
    attention, tokens = whole.layer.self_attn, sum(PROBE)
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, attention.q_proj.in_features, generator=drawn).bfloat16()
    angles = torch.linspace(0, 9, tokens * attention.head_dim).view(1, tokens, -1)
    turns = angles.cos().bfloat16(), angles.sin().bfloat16()
    with computing(Forward({}, PROBE)):
        if whole._plan(x, current(), {"position_embeddings": turns}) is None:
            return False
        found, expected = whole(x, position_embeddings=turns), whole.plain(x, position_embeddings=turns)
    if not isinstance(expected, Tensor) or expected.shape != x.shape:
        return False
    return float((found - expected).float().norm()) <= NEAR * float((expected - x).float().norm())


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, *leaves: Tensor | None) -> Tensor:
        pairs, z = dict(zip(LINEARS, _pairs(leaves), strict=True)), {}
        h, r = _normed(plan.norms[0], x)
        q, z["q"] = plan.product("q", h, pairs["q"])
        k, z["k"] = plan.product("k", h, pairs["k"])
        v, z["v"] = plan.product("v", h, pairs["v"])
        heads = q.shape[1] // plan.turns[0].shape[1], k.shape[1] // plan.turns[0].shape[1]
        q, k = (kernels.rotary(state.view(len(x), n, -1), *plan.turns) for state, n in zip((q, k), heads, strict=True))
        v = v.view(len(x), heads[1], -1)
        o, p = kernels.attention(_by_head(q, k, v), plan.sequences, None, plan.scaling)
        o = plan.few(o.flatten(1))
        middle, z["o"] = plan.product("o", o, pairs["o"], plus=plan.few(x))
        h2, r2 = _normed(plan.norms[1], middle)
        gate, z["gate"] = plan.product("gate", h2, pairs["gate"])
        up, z["up"] = plan.product("up", h2, pairs["up"])
        m = kernels.gated(gate, up)
        y, z["down"] = plan.product("down", m, pairs["down"], plus=middle)
        kept = (x, h, r, q, k, v, p, o, middle, h2, r2, gate, up, m)
        ctx.save_for_backward(*kept, *(z[name] for name in LINEARS), *leaves)
        ctx.plan = plan
        return plan.all(y, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        plan, needs_x = ctx.plan, ctx.needs_input_grad[0]
        x, h, r, q, k, v, p, o, middle, h2, r2, gate, up, m, *rest = ctx.saved_tensors
        inputs = {"q": h, "k": h, "v": h, "o": o, "gate": h2, "up": h2, "down": m}
        needs = zip(ctx.needs_input_grad[2::2], ctx.needs_input_grad[3::2], strict=True)
        z, pairs = rest[: len(LINEARS)], _pairs(rest[len(LINEARS) :])
        of = {
            name: Saved(inputs[name], own, pair, both)
            for name, own, pair, both in zip(LINEARS, z, pairs, needs, strict=True)
        }
        found: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        dy = plan.few(dy)
        dm, *found["down"] = plan.slope("down", dy, of["down"])
        d_gate, d_up = kernels.gated_slope(dm, gate, up)
        dh2, *found["gate"] = plan.slope("gate", d_gate, of["gate"])
        dh2, *found["up"] = plan.slope("up", d_up, of["up"], plus=dh2)
        d_middle = kernels.norm_slope(dh2, middle, plan.norms[1].norm.weight, r2, plus=dy)
        do, *found["o"] = plan.slope("o", d_middle, of["o"])
        do = plan.all(do, len(x)).view(len(x), -1, v.shape[2])
        dq, dk, dv = kernels.attention_slope(do, (*_by_head(q, k, v), p), plan.sequences, None, plan.scaling)
        dq, dk = (kernels.rotary_slope(state, *plan.turns) for state in (dq, dk))
        dh, *found["q"] = plan.slope("q", dq.flatten(1), of["q"], needs_x=needs_x)
        dh, *found["k"] = plan.slope("k", dk.flatten(1), of["k"], plus=dh, needs_x=needs_x)
        dh, *found["v"] = plan.slope("v", dv.flatten(1), of["v"], plus=dh, needs_x=needs_x)
        dx = None
        if needs_x:
            dx = kernels.norm_slope(dh, x, plan.norms[0].norm.weight, r, plus=plan.all(d_middle, len(x)))
        return dx, None, *(slope for name in LINEARS for slope in found[name])


def _counted(rows: Tensor, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """How many of some rows are each client's, who has so many of all."""
    ends = torch.tensor(sizes).cumsum(0)
    counts = torch.bincount(torch.searchsorted(ends, rows, right=True), minlength=len(sizes))
    return tuple(counts.tolist())


def _normed(normed: Normed, x: Tensor) -> Pair:
    return kernels.norm(x, normed.norm.weight, normed.eps)  # type: ignore[arg-type]


def _by_head(*states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (state.transpose(0, 1) for state in states)
    return q, k, v


def _pairs(leaves: Any) -> list[Pair | None]:
    """A and B of each linear layer."""
    return [None if a is None else (a, b) for a, b in zip(leaves[::2], leaves[1::2], strict=True)]
