"""Models in transformers' own layout: config.json, safetensors and a tokenizer, in a folder or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedllm.errors import ModelError
from fedllm.models.base_models.cache import progress
from fedllm.models.base_models.vocabulary import MISSING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase, Path | None]


def require_model(folder: Path) -> None:
    """
    Raises:
        ModelError: a local folder is no model's with safetensors weights, as far as its files' names tell.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter, not a base model; name the model that it was trained on")
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} has no config.json; a model folder is what transformers' save_pretrained writes")
    if not any(folder.glob("*.safetensors")):
        found = ", ".join(path.name for path in sorted(folder.glob("*.bin"))) or "no weights"
        raise ModelError(
            f"{folder} holds {found}, but no safetensors; fedllm reads no pickle weights, which can hold code: "
            "save the model as safetensors first"
        )


def from_folder(folder: Path, dtype: torch.dtype) -> Loaded:
    """A local folder with safetensors weights. Raises ModelError for any other."""
    require_model(folder)
    try:
        return *_read(str(folder), dtype), folder
    except ModelError:
        raise
    except Exception as error:  # config, weights and tokenizer each fail in their own way
        raise ModelError(f"the model in {folder} cannot be read: {_first_line(error)}") from error


def from_hub(name: str, dtype: torch.dtype) -> Loaded:
    """`owner/name` of the hub, or its copy in the hub's local cache. Raises ModelError."""
    try:
        with progress(f"loading {name} from the hub or its local cache"):
            return *_read(name, dtype), None
    except ModelError:
        raise
    except Exception as error:  # as above, and whatever the network does
        raise ModelError(
            f"'{name}' is no folder here and cannot be read from the hub ({_first_line(error)}); check the name and "
            "the connection"
        ) from error


def hub_folder(name: str) -> Path:
    """Where the hub's local cache holds a model that was loaded from it."""
    from transformers.utils.hub import cached_file

    return Path(cached_file(name, "config.json", local_files_only=True)).parent


def _read(source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:  # files that are missing, or need another package; a network fails with OSError
        raise ModelError(f"{source} {MISSING}") from error
    model, found = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if found["missing_keys"]:  # transformers would leave them random
        first = sorted(found["missing_keys"])[0]
        raise ModelError(f"{source} lacks {len(found['missing_keys'])} of the model's weights, such as {first}")
    return model, tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
