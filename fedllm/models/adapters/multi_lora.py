"""Several LoRAs on the same layers, each under a name of its own: its branch.

    y = W x + s sum_b w_b B_b A_b dropout(x)       tensors `LAYER.BRANCH.lora_A` (rank, in), `LAYER.BRANCH.lora_B`

The branches of a pass are those whose tensors are in it; one alone counts in full (w = 1): it is LoRA, to the bit.
Of several, w_b is what `mixer` says:

    constant     `weights`; the branches are one LoRA of their summed rank, B = [w_1 B_1, w_2 B_2, ...]
    router       softmax(G x)_b for each token and layer, `LAYER.router` G (branches, in), in float32
                 (FedALT, arXiv:2503.11880)
    fused        one LoRA of factors w_1 A_1 + w_2 A_2 and w_1 B_1 + w_2 B_2, `mixer.factors` (2,) worked out by a
                 client in the last round (FDLoRA, arXiv:2406.07925); zero until then: the first branch counts in full
    similarity   for each sequence: w of the last branch is cap * mean_i cos(e(x), e(x_i)), of the first 1 - w, with e
                 the last hidden state before the answer under the last branch alone, x_i reference inputs (FedDPA,
                 arXiv:2403.19211: the weight is the personal adapter's, as in the paper; its code weighs the other)

Since cos(e, e_i) is linear in e_i / |e_i|, `mixer.reference` (hidden size) holds the mean of these, and no input. It is
zero until somebody knows references; until then the first branch counts in full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fedllm.errors import ConfigError
from fedllm.models.adapters.base import Adapter, Attached, ClientExamples, Decoder, InLayers, Scoring, trained_dtype
from fedllm.models.adapters.fusion import fused, search
from fedllm.models.adapters.lora import AttachedLora, Lora
from fedllm.models.adapters.mixed_linear import SEQUENCES, Mixed
from fedllm.models.adapters.peft_format import write_branches
from fedllm.models.adapters.similarity import Similarity
from fedllm.models.adapters.targets import targeted
from fedllm.models.base_models.load import Base
from fedllm.models.batch import Batch, collate
from fedllm.models.layers.linear import replace_forward
from fedllm.rng import Key
from fedllm.tensors.tree import Tree

Mixer = Literal["constant", "router", "similarity", "fused"]
MIXERS = get_args(Mixer)
FACTORS, PROBED = "mixer.factors", 8  # (2,): of `fused`, and the examples on which they are looked for
REFERENCES = 5  # of a client's examples, as FedDPA's code draws for each input
REFERENCE = "mixer.reference"  # (hidden size,): the mean of the references' directions


@dataclass(frozen=True)
class MultiLora(Adapter):
    """Several named low-rank adapters on the same layers.

    Args:
        branches: their names, first the one that clients share.
        rank, alpha, targets, dropout, rslora: of each, as of `lora`; the branches have one dropout mask.
        mixer: how the branches of a pass are weighed: constant, router, similarity or fused.
        weights: of `constant` (all 1 if left out), and of `similarity` in passes of several branches that know no
            sequence apart, which are those of local training.
        cap: of `similarity`, the largest weight of the last branch.
        distinct: each branch begins with an A of its own, in place of the same one.
    """

    branches: tuple[str, ...] = ("shared", "personal")
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all_linear",)
    dropout: float = 0.0
    rslora: bool = False
    mixer: Mixer = "constant"
    weights: tuple[float, ...] = ()
    cap: float = 0.5
    distinct: bool = False
    stackable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        names = self.branches
        if not names or len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
            raise ConfigError(f"task.adapter.multi_lora.branches is {list(names)}; give different names of letters")
        if self.weights and (len(self.weights) != len(names) or not all(map(math.isfinite, self.weights))):
            raise ConfigError(
                f"task.adapter.multi_lora.weights is {list(self.weights)}; give one finite number for each of "
                f"{', '.join(names)}"
            )
        if self.mixer not in MIXERS:
            raise ConfigError(f"task.adapter.multi_lora.mixer is {self.mixer!r}; it must be one of {', '.join(MIXERS)}")
        if self.mixer in ("similarity", "fused") and len(names) != 2:
            raise ConfigError(f"task.adapter.multi_lora.mixer {self.mixer} weighs two branches; give two")
        if not 0 <= self.cap <= 1:
            raise ConfigError(f"task.adapter.multi_lora.cap is {self.cap}; it must be from 0 to 1")
        try:
            self.plain  # noqa: B018
        except ConfigError as error:
            raise ConfigError(str(error).replace("adapter.lora", "adapter.multi_lora")) from None

    @property
    def plain(self) -> Lora:
        """One of them, as an adapter by itself."""
        return Lora(self.rank, self.alpha, self.targets, self.dropout, self.rslora)

    @property
    def baseline(self) -> MultiLora:
        """The first branch, which by itself is LoRA."""
        return replace(self, branches=self.branches[:1], mixer="constant", weights=())

    @property
    def shares(self) -> bool:
        """Not where each sequence has weights of its own, nor with dropout."""
        return not self.dropout and self.mixer != "similarity"

    @property
    def constants(self) -> tuple[float, ...]:
        """The weight of each branch in passes of several that do not look at their input."""
        return self.weights or (1.0,) * len(self.branches)

    def attach(self, base: Base) -> Attached:
        """Extend the targeted layers of the base model.

        Raises:
            ConfigError: a target selects no layer, or the rank is above a layer's size.
        """
        layers = targeted(base.model, self.targets, self.rank, "task.adapter.multi_lora")
        for name, layer in layers.items():
            replace_forward(base.model, name, Mixed(layer, name, self.plain.scale, self.dropout))
        return AttachedMultiLora(Decoder(base), self, layers)


@dataclass(frozen=True, eq=False)
class AttachedMultiLora(InLayers):
    """Several LoRAs on a loaded base model."""

    settings: MultiLora
    layers: Mapping[str, nn.Linear]

    def initial_params(self, key: Key) -> Tree:
        """Each A uniform, each B zero; a router uniform as A; no references."""
        settings, params = self.settings, dict[str, Tensor]()
        dtype = trained_dtype(self.decoder.base)
        for name, layer in self.layers.items():
            for branch in settings.branches:
                named = key.fold("lora", name, *([branch] if settings.distinct else []))
                params[f"{name}.{branch}.lora_A"] = _uniform(named, settings.rank, layer.in_features, dtype)
                params[f"{name}.{branch}.lora_B"] = torch.zeros(layer.out_features, settings.rank, dtype=dtype)
            if settings.mixer == "router":
                size = len(settings.branches)
                params[f"{name}.router"] = _uniform(key.fold("router", name), size, layer.in_features, dtype)
        if settings.mixer == "similarity":
            params[REFERENCE] = torch.zeros(self._width, dtype=dtype)
        if settings.mixer == "fused":
            params[FACTORS] = torch.zeros(2, dtype=dtype)
        return params

    def hidden(self, stack: Tree, batch: Batch) -> Tensor:
        """(T, d)."""
        if self._looks_at_inputs(stack):
            return self._per_sequence(stack, batch)
        return self.decoder.row(self._joined(stack), batch)

    def logits(self, params: Tree, tokens: Tensor, mask: Tensor, cache: Any | None) -> tuple[Tensor, Any | None]:
        """(B, V) of the next token. The weights of a sequence are those of its prompt, which is what the first call is
        given; they stand beside its cache."""
        stack, inputs = {name: leaf[None] for name, leaf in params.items()}, {"input_ids": tokens}
        if not self._looks_at_inputs(stack):
            return self.decoder.padded(self._joined(stack), inputs, mask, cache)
        if cache is None:
            states = self._similarity.prompts(self._last(stack), tokens, mask)
            cache = self._similarity.weights(states, stack[REFERENCE].expand(len(states), -1)), None
        weights, inner = cache
        found, inner = self.decoder.padded(self._joined(stack, weights), inputs, mask, inner)
        return found, None if inner is None else (weights, inner)

    @property
    def baseline(self) -> AttachedMultiLora:
        """The first branch alone, on the same layers."""
        return replace(self, settings=self.settings.baseline)

    def worked_out(self, model: Scoring, params: Tree, job: ClientExamples) -> Tree:
        """References from some of a client's examples; in the last round, the two factors of the mix."""
        if not job.examples or len(self._present(params)) < 2:
            return {}
        if self.settings.mixer == "fused" and job.last:
            return {FACTORS: self._factors(model, params, job)}
        if self.settings.mixer != "similarity":
            return {}
        order = torch.randperm(len(job.examples), generator=job.rng("references"))[:REFERENCES]
        return {REFERENCE: self.reference(params, collate([[job.examples[at] for at in order.tolist()]]))}

    @torch.no_grad()
    def _factors(self, model: Scoring, params: Tree, job: ClientExamples) -> Tensor:
        """(2,): those of the least loss on some of a client's examples."""
        order = torch.randperm(len(job.examples), generator=job.rng("fusion"))[:PROBED].tolist()
        some = [job.examples[at] for at in order]

        def losses(w: Tensor) -> Tensor:
            stack = {name: leaf.expand(len(w), *leaf.shape) for name, leaf in params.items()}
            return model.losses({**stack, FACTORS: w.to(params[FACTORS])}, collate([some] * len(w))).cpu()

        return torch.tensor(search(losses), dtype=torch.float64)

    def reference(self, params: Tree, batch: Batch) -> Tensor:
        """(hidden size,): what `mixer.reference` holds of the inputs of a batch of one client."""
        stack = {name: leaf[None] for name, leaf in params.items()}
        states = self._similarity.states(self._last(stack), batch)
        return self._similarity.reference(states).to(trained_dtype(self.decoder.base))

    def save(self, params: Tree, folder: Path, base_name: str) -> None:
        """PEFT's layout: one LoRA of the summed rank; where the mix depends on the input, a LoRA in a folder for each
        branch, and all tensors beside them."""
        if self._folds(params):
            self._plain.save(self._single(params), folder, base_name)
            return
        settings = self.settings
        facts = {"mixer": settings.mixer, "branches": list(settings.branches), "rank": settings.rank,
                 "alpha": settings.alpha, "rslora": settings.rslora, "cap": settings.cap}  # fmt: skip
        write_branches(params, folder, base_name=base_name, facts=facts)
        for branch in settings.branches:
            self._plain.save(self._branch(params, branch), folder / branch, base_name)

    def merged(self, params: Tree, base: Base | None = None) -> Mapping[str, Tensor]:
        """W + s sum_b w_b B_b A_b, float32 or wider.

        Raises:
            ConfigError: the mix depends on the input.
        """
        if not self._folds(params):
            raise ConfigError(
                f"task.adapter.multi_lora mixes its branches by {self.settings.mixer}, anew for each input, which no "
                "merged weight can hold; export --to peft writes each branch"
            )
        return self._plain.merged(self._single(params), base)

    @property
    def _plain(self) -> AttachedLora:
        """One of them, as an adapter by itself."""
        return AttachedLora(self.decoder, self.settings.plain, self.layers)

    @property
    def _similarity(self) -> Similarity:
        return Similarity(self.decoder, self.settings.cap)

    @property
    def _width(self) -> int:
        return int(self.decoder.base.model.get_input_embeddings().embedding_dim)

    def _looks_at_inputs(self, stack: Tree) -> bool:
        """Whether sequences are to be weighed one by one: several branches, and references for each client."""
        reference = stack.get(REFERENCE)
        return reference is not None and len(self._present(stack)) > 1 and not reference.requires_grad

    def _present(self, stack: Mapping[str, Tensor]) -> list[int]:
        """The branches of a pass, by place."""
        first = next(iter(self.layers))
        return [at for at, name in enumerate(self.settings.branches) if f"{first}.{name}.lora_B" in stack]

    def _joined(self, stack: Tree, sequences: Tensor | None = None) -> Tree:
        """The stack for the layers: of each, the factors of all branches side by side, as one LoRA.

        sequences: (S, branches) weights, one row for each sequence of the pass.
        """
        places = self._present(stack)
        routed = self.settings.mixer == "router" and len(places) == len(self.settings.branches) > 1
        ours = (".lora_A", ".lora_B", ".router")
        found = {n: leaf for n, leaf in stack.items() if not n.startswith("mixer.") and not n.endswith(ours)}
        fusing = FACTORS in stack and len(places) == 2
        constant = len(places) > 1 and not routed and not fusing and sequences is None
        weights = [self.settings.constants[at] if constant else 1.0 for at in places]
        for name in self.layers if places else ():
            sides = {}
            for side in "AB":
                each = [stack[f"{name}.{self.settings.branches[at]}.lora_{side}"] for at in places]
                if side == "B":
                    each = [leaf if weight == 1 else leaf * weight for leaf, weight in zip(each, weights, strict=True)]
                if fusing:
                    each = [fused(each[0], each[1], stack[FACTORS])]
                sides[side] = each[0] if len(each) == 1 else torch.cat(each, 1 if side == "A" else 2)
            found |= {f"{name}.lora_A": sides["A"], f"{name}.lora_B": sides["B"]}
            if routed:
                found[f"{name}.router"] = stack[f"{name}.router"]
        if sequences is not None:
            found[SEQUENCES] = sequences
        return found

    def _per_sequence(self, stack: Tree, batch: Batch) -> Tensor:
        """(T, d), each sequence with weights of its own."""
        states = self._similarity.states(self._last(stack), batch)
        own = stack[REFERENCE][batch.sequence_clients.to(states.device)]
        weights = self._similarity.weights(states, own)
        if self.decoder.base.unpackable is None:
            return self.decoder.row(self._joined(stack, weights), replace(batch, shared=()))
        rows = []
        for at, (start, stop) in enumerate(pairwise([0, *accumulate(batch.lengths)])):
            k = int(batch.sequence_clients[at])
            alone = {name: leaf[k : k + 1] for name, leaf in stack.items()}
            one = replace(batch.apart.only(at), dropout=())
            rows.append(self.decoder.row(self._joined(alone, weights[at : at + 1]), one)[: stop - start])
        return torch.cat(rows)

    def _last(self, stack: Tree) -> Tree:
        """The stack with the last branch alone, whose states inputs are compared by."""
        last = self.settings.branches[-1]
        kept = {name: leaf for name, leaf in stack.items() if f".{last}.lora_" in name or ".lora_" not in name}
        return self._joined({name: leaf for name, leaf in kept.items() if not name.endswith(".router")})

    def _folds(self, params: Tree) -> bool:
        """Whether the branches are one LoRA."""
        if self.settings.mixer == "router" and len(self._present(params)) > 1:
            return False
        return REFERENCE not in params or not bool(params[REFERENCE].any())

    def _single(self, params: Tree) -> Tree:
        """The one LoRA. Without references the first branch counts in full."""
        if self.settings.mixer == "similarity":
            return self._branch(params, self.settings.branches[0])
        found = self._joined({name: leaf[None] for name, leaf in params.items()})
        return {name: leaf[0] for name, leaf in found.items() if ".lora_" in name}

    def _branch(self, params: Tree, branch: str) -> Tree:
        """One of them, under the names of a LoRA by itself."""
        sides = ((name, side) for name in self.layers for side in "AB")
        return {f"{name}.lora_{side}": params[f"{name}.{branch}.lora_{side}"] for name, side in sides}


def _uniform(key: Key, rows: int, size: int, dtype: torch.dtype) -> Tensor:
    """(rows, size) of uniform(-1/sqrt(size), 1/sqrt(size))."""
    uniform = torch.rand(rows, size, generator=key.generator(), dtype=torch.float64) * 2 - 1
    made: Tensor = (uniform / math.sqrt(size)).to(dtype)
    return made
