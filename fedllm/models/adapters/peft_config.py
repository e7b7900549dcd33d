"""What the configuration of a LoRA adapter in PEFT's layout says of its function: W x + s B A x, or something else.

A setting that changes this function, or the frozen W, is refused by its name: an adapter that is read as plain LoRA
would be another model. So is a setting that nobody here knows, if it is set. Where layers and ranks lie is seen from
the weights themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.errors import ConfigError

INIT = "task.adapter.lora.init_from"
LONGEST = 60  # letters of a value in an error
# Of PEFT's LoraConfig: what says where an adapter came from, where it stands or how it was trained.
APART = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of initial values
        *("megatron_core", "qalora_group_size"),  # of settings that are refused themselves
    }
)
# Initial values for which PEFT leaves the base model as it is; it changes the weights for the others (pissa, olora,
# corda, loftq, lora_ga), each time that such an adapter is put on them.
LEAVE_WEIGHTS = frozenset({True, False, None, "gaussian", "orthogonal", "eva", "mica"})


def lora_scale(file: Path) -> float:
    """The scale s of a LoRA adapter, one for all its layers, by its `adapter_config.json`.

    Raises:
        ConfigError: it is no plain LoRA adapter on the base model's own weights.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        rank, alpha, kind = config["r"], config["lora_alpha"], config.get("peft_type", "LORA")
        scale = float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise ConfigError(f"{INIT}: {file} is no configuration of a LoRA adapter") from error
    if kind != "LORA":
        raise ConfigError(f"{INIT}: {file} is an adapter of type {kind}; start from one of type LORA")
    _require_plain(config, file)
    return scale


def _require_plain(config: Mapping[str, Any], file: Path) -> None:
    start = config.get("init_lora_weights", True)
    if isinstance(start, list | dict) or start not in LEAVE_WEIGHTS:
        raise ConfigError(
            f"{INIT}: {file} has init_lora_weights: {start}, so that its factors belong to base weights which PEFT "
            "changes when it loads them; save it in PEFT as plain LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    for name, value in config.items():
        if name not in APART and value and value != "none":
            text = json.dumps(value)
            shown = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
            raise ConfigError(
                f"{INIT}: {file} has {name}: {shown}, which the adapter lora does not compute; start from an adapter "
                "without it"
            )
