"""Adapters on disk: PEFT's own layout, `adapter_config.json` and `adapter_model.safetensors`, written without PEFT."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedllm.errors import ConfigError
from fedllm.models.adapters.peft_config import INIT, lora_scale
from fedllm.tensors.tree import Tree

PREFIX, SUFFIX = "base_model.model.", ".weight"


def write_peft_lora(
    params: Tree,
    folder: Path,
    *,
    base_name: str,
    rank: int,
    alpha: float,
    dropout: float,
    rslora: bool,
    turned: bool = False,
) -> None:
    """Write LoRA factors so that `PeftModel.from_pretrained(base, folder)` loads them.

    The scale is that of `rank` and `alpha` for every layer. PEFT derives it from a layer's own rank, so a layer of
    another rank is given an alpha of its own. `turned`: the base model keeps its weights as (in, out), as GPT-2 does.
    """
    ranks = {name.removesuffix(".lora_A"): len(leaf) for name, leaf in params.items() if name.endswith(".lora_A")}
    others = {name: size for name, size in ranks.items() if size != rank}
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": turned,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": {n: alpha * (math.sqrt(r / rank) if rslora else r / rank) for n, r in others.items()},
    }
    leaves = {f"{PREFIX}{name}{SUFFIX}": leaf for name, leaf in params.items()}
    _write(folder, leaves, {**_peft("LORA", base_name), **config})


def num_key_heads(config: Any) -> int:
    """Key heads of a layer; a configuration that does not name them has as many as there are query heads."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def write_peft_prompt(prompt: Tensor, folder: Path, *, base_name: str, config: Any) -> None:
    """Write a (tokens, hidden) soft prompt as PEFT's prompt tuning. `config`: the base model's."""
    sizes = {
        "num_virtual_tokens": len(prompt),
        "token_dim": prompt.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": getattr(config, "num_attention_heads", 1),  # a prompt has none; PEFT asks for them
        "num_layers": config.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",
    }
    _write(folder, {"prompt_embeddings": prompt}, {**_peft("PROMPT_TUNING", base_name), **sizes})


def write_peft_prefix(prefix: Tensor, folder: Path, *, base_name: str, config: Any) -> None:
    """Write (tokens, layers x (keys, values) x key heads x d) as PEFT's prefix tuning. `config`: the base model's."""
    heads, layers = num_key_heads(config), config.num_hidden_layers
    sizes = {
        "num_virtual_tokens": len(prefix),
        "token_dim": prefix.shape[1] // (2 * layers),
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": layers,
        "encoder_hidden_size": config.hidden_size,
        "prefix_projection": False,
    }
    _write(folder, {"prompt_embeddings": prefix}, {**_peft("PREFIX_TUNING", base_name), **sizes})


def write_weights(params: Tree, folder: Path, *, base_name: str) -> None:
    """Write weights of the base model by their names, which is no layout of PEFT's."""
    _write(folder, params, {"fedllm": "weights", "base_model_name_or_path": base_name})


def write_branches(params: Tree, folder: Path, *, base_name: str, facts: Mapping[str, Any]) -> None:
    """Write several LoRAs whose mix depends on the input, which is no layout of PEFT's."""
    _write(folder, params, {"fedllm": "multi_lora", "base_model_name_or_path": base_name, **facts})


def adapter_file(folder: Path) -> Path:
    """The weights of a run folder's adapter, or of a folder in PEFT's layout.

    Raises:
        ConfigError: there is none.
    """
    file = (folder / "adapter" if (folder / "adapter").is_dir() else folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise ConfigError(f"{INIT}: {folder} holds no adapter_model.safetensors")
    return file


def read_peft_lora(folder: Path, shapes: Mapping[str, tuple[int, ...]], *, scale: float) -> Tree:
    """Read LoRA factors from a run folder or a folder in PEFT's layout.

    Raises:
        ConfigError: no adapter there, it is not plain LoRA, or its layers, ranks or scale are not those of the task.
    """
    file = adapter_file(folder)
    place = file.parent
    found = lora_scale(place / "adapter_config.json")
    leaves = {key.removeprefix(PREFIX).removesuffix(SUFFIX): leaf for key, leaf in load_file(file).items()}
    for name, shape in shapes.items():
        if name not in leaves:
            raise ConfigError(f"{INIT}: {file} has no {name}; set targets to the adapter's own")
        if tuple(leaves[name].shape) != shape:
            raise ConfigError(f"{INIT}: {name} is {tuple(leaves[name].shape)} in {file}, the task needs {shape}")
    for name in leaves:
        if name not in shapes:
            raise ConfigError(f"{INIT}: {file} has {name}, which the task does not train; set targets to the adapter's")
    if not math.isclose(found, scale, rel_tol=1e-6):
        raise ConfigError(f"{INIT}: {place} was trained with the scale {found:g}, the task has {scale:g}; set alpha")
    return leaves


def _peft(kind: str, base_name: str) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
    }


def _write(folder: Path, leaves: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    plain = {name: leaf.detach().cpu().contiguous() for name, leaf in leaves.items()}
    save_file(plain, folder / "adapter_model.safetensors", {"format": "pt"})
