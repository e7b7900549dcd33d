"""A decoder layer as one operation: which layers and passes take it, and that it computes what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fedllm.models import fused_decoder
from fedllm.models.adapters.bottleneck import Bottleneck
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.lora_xs import LoraXs
from fedllm.models.adapters.prefix import Prefix
from fedllm.models.adapters.soft_prompt import SoftPrompt
from fedllm.models.adapters.sparse_lora import SparseLora
from fedllm.models.adapters.weights import BitFit, Full, Norms
from fedllm.models.base_models.tiny_llama import tiny_tokenizer
from fedllm.models.batch import IGNORE, Batch, Example, collate
from fedllm.models.fused_decoder import FusedDecoderLayer
from fedllm.models.kernels import ops, prepack
from fedllm.models.layers.activation_checkpointing import Recomputed
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.rng import Key
from tests.models.kernels import decoders
from tests.models.kernels.decoders import distance
from tests.needs import needs_products

pytestmark = needs_products
SIZES: dict[str, Any] = {**decoders.SIZES, "vocab_size": 259, "hidden_size": 48, "intermediate_size": 100}
TAKEN = {
    "llama": transformers.LlamaConfig(**SIZES, head_dim=16),
    "biases": transformers.LlamaConfig(**SIZES, head_dim=16, attention_bias=True, mlp_bias=True),
    "qwen2": transformers.Qwen2Config(**{**SIZES, "hidden_size": 64}),
    "mistral": transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=4096),
}
LEFT = {
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),  # norms of queries and keys
    "gemma3": transformers.Gemma3TextConfig(**SIZES, head_dim=16),
    "phi3": transformers.Phi3Config(**{**SIZES, "hidden_size": 64}),
    "a short window": transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=16),
    "odd heads": transformers.LlamaConfig(**SIZES, head_dim=12),
    "multipliers": transformers.GraniteConfig(**{**SIZES, "hidden_size": 64}, residual_multiplier=0.5),
}


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """A model is loaded anew."""
    load.cache_clear()
    yield
    load.cache_clear()


def saved(config: Any, place: Path) -> Path:
    """A random model whose layers matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, std=0.15)
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def loaded(folder: Path, dtype: str = "bfloat16", **lora: Any) -> LoadedModel:
    return load(Task(str(folder), Lora(rank=3, **lora), dtype=dtype, device="cpu"))


def whole(model: LoadedModel) -> list[FusedDecoderLayer]:
    """Of the layers that have it."""
    forwards = [vars(module).get("forward") for module in model.base.model.modules()]
    inner = [each.forward for each in forwards if isinstance(each, Recomputed)]
    return [each for each in inner if isinstance(each, FusedDecoderLayer)]


def batch_of(lengths: tuple[tuple[int, ...], ...], labels: int = 999, **options: Any) -> Batch:
    """At most so many tokens of each sequence have a label, its last ones."""

    def example(length: int) -> Example:
        tokens = torch.arange(length) * 7 % 251 + length % 5
        targets = tokens.roll(-1)
        targets[-1] = IGNORE
        targets[: max(0, length - 1 - labels)] = IGNORE
        return Example(tokens, targets)

    return collate([[example(length) for length in own] for own in lengths], **options)


def computed(model: LoadedModel, batch: Batch) -> list[Tensor]:
    """Losses of the clients, and their gradients."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.float64 if model.base.model.dtype == torch.float64 else torch.float32
    leaves = {}
    for name, leaf in model.initial_params(Key(0)).items():
        noise = 0.05 * torch.randn(len(batch.counts), *leaf.shape, generator=generator)
        leaves[name] = (leaf + noise).to(wide).requires_grad_()
    losses = model.losses(leaves, batch)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), list(leaves.values()))]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each pass through a layer that has it, whether it was taken."""
    plan, seen = FusedDecoderLayer._plan, list[bool]()

    def watched(self: FusedDecoderLayer, *args: Any) -> Any:
        found = plan(self, *args)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(FusedDecoderLayer, "_plan", watched)
    return seen


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("targets", [("all_linear",), ("v_proj", "up_proj")], ids=["all", "some"])
@pytest.mark.parametrize("labels", [999, 7])
def test_gradients(name: str, targets: Any, labels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No further from float64 than layer by layer, with clients of unequal lengths, and few labels."""
    folder, batch = saved(TAKEN[name], tmp_path), batch_of(((40, 33), (50,), (3,)), labels)
    exact = computed(loaded(folder, "float64", targets=targets), batch)
    model = loaded(folder, targets=targets)
    assert len(whole(model)) == 2
    mine = computed(model, batch)
    monkeypatch.setattr(FusedDecoderLayer, "_plan", lambda *rest: None)
    theirs = computed(model, batch)
    assert not all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert distance(mine, exact) <= 1.1 * distance(theirs, exact) < 0.05
    assert torch.allclose(mine[0].double(), exact[0], rtol=0.01)


@pytest.mark.parametrize("name", LEFT)
def test_layers_of_another_form_keep_their_own_pass(name: str, tmp_path: Path) -> None:
    assert not whole(loaded(saved(LEFT[name], tmp_path)))


def test_layers_computed_twice_and_weights_laid_out_have_the_same_bits(tmp_path: Path, passes: list[bool]) -> None:
    model = loaded(saved(TAKEN["biases"], tmp_path))
    lengths = ((40, 33), (50,))
    passes.clear()
    once, twice = (computed(model, batch_of(lengths, recompute=again)) for again in (False, True))
    with prepack.kept_layouts():
        laid_out = computed(model, batch_of(lengths))
    assert passes == [True] * (2 + 4 + 2)
    for other in (twice, laid_out):
        assert all(torch.equal(a, b) for a, b in zip(once, other, strict=True))


def test_common_beginnings(tmp_path: Path, passes: list[bool]) -> None:
    model = loaded(saved(TAKEN["llama"], tmp_path))
    tokens = torch.arange(40)
    targets = torch.full((40,), IGNORE)
    ends = [(torch.full((n,), n), torch.full((n,), 7)) for n in (5, 9)]
    examples = [Example(torch.cat([tokens, end]), torch.cat([targets, labels])) for end, labels in ends]
    shared, apart = (collate([examples, examples[:1]], share=share) for share in (True, False))
    passes.clear()
    mine, theirs = computed(model, shared), computed(model, apart)
    assert shared.shared and all(passes)
    assert distance(mine, [each.double() for each in theirs]) < 0.02


@pytest.mark.parametrize("share", [False, True])
def test_the_last_layer_computes_what_has_a_label(share: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bits that all tokens together have; nobody asks for the others."""
    model, batch = loaded(saved(TAKEN["biases"], tmp_path)), batch_of(((40, 35), (50,), (3,)), 7, share=share)
    stack = {name: torch.stack([leaf + 0.1] * 3) for name, leaf in model.initial_params(Key(0)).items()}
    rows = list[int]()
    monkeypatch.setattr(ops, "gated", lambda gate, up, true=ops.gated: (rows.append(len(gate)), true(gate, up))[1])
    some = model.adapter.hidden(stack, batch)
    monkeypatch.setattr(fused_decoder, "counted", lambda wanted, sizes: sizes)
    monkeypatch.setattr(fused_decoder.Plan, "few", lambda plan, x: x)
    monkeypatch.setattr(fused_decoder.Plan, "all", lambda plan, few, rows: few)
    every = model.adapter.hidden(stack, batch)
    tokens = sum(batch.client_computed)
    assert rows == [tokens, len(batch.rows), tokens, tokens] and len(batch.rows) == 23 < tokens
    others = sorted(set(range(len(some))) - set(batch.rows.tolist()))
    assert torch.equal(some[batch.rows], every[batch.rows])
    assert not some[others].any() and every[others].any()


def test_a_client_has_the_bits_that_it_has_alone(tmp_path: Path) -> None:
    model, batch = loaded(saved(TAKEN["llama"], tmp_path)), batch_of(((40, 33), (50,), (3,)))
    leaves = {name: torch.stack([leaf] * 3) for name, leaf in model.initial_params(Key(0)).items()}
    together = model.losses(leaves, batch)
    alone = [model.losses({n: leaf[:1] for n, leaf in leaves.items()}, batch.only(k)) for k in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_a_pass_that_needs_more_is_the_layers_own(tmp_path: Path, passes: list[bool]) -> None:
    model = loaded(saved(TAKEN["llama"], tmp_path), dropout=0.5)
    passes.clear()
    computed(model, batch_of(((40,),)))
    assert passes == [True] * 2
    passes.clear()
    computed(model, batch_of(((40,),), dropout=[torch.Generator()]))  # while it trains
    computed(model, batch_of(((600,),)))  # too long for the attention kernel
    model.generate({}, [[1, 2, 3]], 2)  # a padded batch, with a cache
    assert passes and not any(passes)


@pytest.mark.parametrize(
    "adapter",
    [
        LoraXs(rank=3),
        SparseLora(rank=3),
        Bottleneck(size=3),
        Prefix(tokens=2),
        SoftPrompt(tokens=2),
        Full(),
        Norms(),
        BitFit(),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
def test_other_adapters_have_the_layers_own_pass(
    adapter: Any, tmp_path: Path, passes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what that gives: a soft prompt stands in front of the layers."""
    model = load(Task(str(saved(TAKEN["biases"], tmp_path)), adapter, dtype="bfloat16", device="cpu"))
    passes.clear()
    mine = computed(model, batch_of(((40, 33),)))
    assert passes and all(passes) == isinstance(adapter, SoftPrompt) and any(passes) == all(passes)
    monkeypatch.setattr(FusedDecoderLayer, "_plan", lambda *rest: None)
    theirs = computed(model, batch_of(((40, 33),)))
    assert all(bool(gradient.any()) for gradient in mine[1:])
    assert distance(mine, [each.double() for each in theirs]) < 0.05


def test_a_module_that_was_given_another_pass_ends_it(tmp_path: Path, passes: list[bool]) -> None:
    model = loaded(saved(TAKEN["llama"], tmp_path))
    layer = whole(model)[0].layer
    for path in ("mlp", "self_attn.o_proj"):
        module, before = layer.get_submodule(path), vars(layer.get_submodule(path))["forward"]
        module.forward = lambda *args, **options: before(*args, **options)  # noqa: B023
        passes.clear()
        computed(model, batch_of(((40,),)))
        assert passes == [False, True]
        module.forward = before


def test_other_numbers_are_left_to_torch(tmp_path: Path) -> None:
    folder = saved(TAKEN["llama"], tmp_path)
    assert not whole(loaded(folder, "float64"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "supports_product", lambda weight: False)
        assert not whole(loaded(folder, rslora=True))
