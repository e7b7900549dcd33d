"""A base model with quantised matrices: read, checked and quantised once, then read from the cache folder.

    CACHE/models/NAME-int8-DIGEST/    quantized.safetensors, its SHA-256, config.json, the tokenizer's files

Quantised are the linear layers and a plain embedding, with the head that is tied to it; norms and biases stay as they
are. The digest is that of the names, sizes and times of the files that were read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedllm.errors import ModelError
from fedllm.models.base_models.cache import build_once, progress
from fedllm.models.base_models.huggingface import from_folder
from fedllm.models.layers.quantized_linear import BITS, Quantized, QuantizedEmbedding, QuantizedLinear
from fedllm.tensors.tree import Tree, detached_copies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedllm.models.base_models.huggingface import Loaded

FILE, SUM = "quantized.safetensors", "sha256"
PARTS = ("codes", "scale", "low")


def from_cache(source: Path, kind: str, dtype: torch.dtype) -> Loaded:
    """A model of a folder, its matrices in `kind`; `source` is what it came from.

    Raises:
        ModelError: the folder cannot be read, or what is kept of it is damaged.
    """

    def build(out: Path, work: Path) -> None:
        with progress(f"quantising {source.name} to {kind}, once"):
            model, tokenizer, _ = from_folder(source, torch.float32)
            quantise(model, kind)
            save_file(detached_copies(_state(model)), out / FILE)
            model.config.save_pretrained(out)
            tokenizer.save_pretrained(out)
            (out / SUM).write_text(_sha256(out / FILE), encoding="ascii")

    folder = build_once(f"{source.name}-{kind}-{_digest(source)}", build)
    if _sha256(folder / FILE) != (folder / SUM).read_text(encoding="ascii"):
        raise ModelError(f"{folder / FILE} is damaged: it is not what was written; delete {folder}")
    return *_read(folder, kind, dtype), source


def quantise(model: PreTrainedModel, kind: str) -> None:
    """Put quantised layers in the place of a loaded model's own."""
    made: dict[int, Quantized] = {}
    for path, module in [(path, module) for path, module in model.named_modules() if _fits(module)]:
        weight = module.weight
        matrix = made.setdefault(weight.data_ptr(), Quantized.of(weight.detach(), BITS[kind]))
        _put(model, path, module, matrix)


def _fits(module: nn.Module) -> bool:
    """Layers of a class of their own may do something else with their weight."""
    return type(module) in (nn.Linear, nn.Embedding)


def _put(model: nn.Module, path: str, module: nn.Module, matrix: Quantized) -> None:
    place, _, name = path.rpartition(".")
    layer: nn.Module
    if isinstance(module, nn.Embedding):
        layer = QuantizedEmbedding(matrix, module.padding_idx)
    else:
        assert isinstance(module, nn.Linear)
        layer = QuantizedLinear(matrix, module.bias)
    setattr(model.get_submodule(place), name, layer.train(module.training))


def _state(model: PreTrainedModel) -> Tree:
    """All tensors by name; a head that is tied to the embedding is that."""
    found = {name: leaf.detach() for name, leaf in model.state_dict().items()}
    if _is_tied(model):
        head = next(path for path, module in model.named_modules() if module is model.get_output_embeddings())
        found = {name: leaf for name, leaf in found.items() if name.rpartition(".")[0] != head}
    return found


def _read(folder: Path, kind: str, dtype: torch.dtype) -> tuple[PreTrainedModel, object]:
    """The kept model, without a full weight at any time."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    held = load_file(folder / FILE)
    for path, module in [(path, module) for path, module in model.named_modules() if f"{path}.codes" in held]:
        codes, scale, low = (held.pop(f"{path}.{part}") for part in PARTS)
        _put(model, path, module, Quantized(codes, scale, low, _size_in(module), BITS[kind], dtype))
    _share(model)
    rest = {name: leaf.to(dtype) if leaf.is_floating_point() else leaf for name, leaf in held.items()}
    missing = model.load_state_dict(rest, strict=False, assign=True).missing_keys
    assert not [name for name in missing if name.rpartition(".")[2] not in PARTS], missing
    return model, tokenizer


def _share(model: PreTrainedModel) -> None:
    """A head that is tied to the embedding has its codes."""
    if _is_tied(model):
        head = next(path for path, module in model.named_modules() if module is model.get_output_embeddings())
        _put(model, head, model.get_output_embeddings(), model.get_input_embeddings().product)


def _is_tied(model: PreTrainedModel) -> bool:
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    return tied and isinstance(model.get_input_embeddings(), QuantizedEmbedding)


def _size_in(module: nn.Module) -> int:
    return int(module.embedding_dim if isinstance(module, nn.Embedding) else module.in_features)  # type: ignore[arg-type]


def _digest(source: Path) -> str:
    files = sorted([*source.glob("*.safetensors"), *source.glob("*.json")])
    told: Mapping[str, tuple[int, int]] = {f.name: (f.stat().st_size, f.stat().st_mtime_ns) for f in files}
    return hashlib.sha256(repr((str(source), told)).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
