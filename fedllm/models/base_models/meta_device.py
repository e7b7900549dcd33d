"""A base model's layers without its weights, for what can be told of an experiment before a model is loaded."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import torch
from torch import nn

from fedllm.files import cache_dir
from fedllm.models.base_models.gguf import folder_name
from fedllm.models.base_models.huggingface import hub_folder
from fedllm.models.base_models.load import ALIASES, quiet_dependencies
from fedllm.models.base_models.tiny_llama import tiny_model
from fedllm.models.base_models.wheel import SMOLLM2


def meta_model(name: str) -> nn.Module | None:
    """The model on torch's meta device; None where its configuration is not on this machine yet, or cannot be read.

    Nothing is downloaded or converted.
    """
    quiet_dependencies()
    from transformers import AutoConfig, AutoModelForCausalLM

    if name == "tiny-llama":
        tiny: nn.Module = tiny_model(torch.float32)
        return tiny
    try:
        config = AutoConfig.from_pretrained(str(_folder(name)), trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            found: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception:  # whatever is wrong with it is said when the model is loaded
        return None
    return found


def _folder(name: str) -> Path:
    if name in ALIASES:
        return cache_dir() / "models" / folder_name(PurePosixPath(SMOLLM2.member).stem, SMOLLM2.sha256)
    path = Path(name).expanduser()
    return path if path.is_dir() else hub_folder(name)
