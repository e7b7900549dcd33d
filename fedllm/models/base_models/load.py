"""The base model: frozen weights and their tokenizer, by a name that the experiment gives.

A name is a packaged alias (`fedllm ls models`), a local folder with safetensors, a `.gguf` file, or a model of the
Hugging Face hub (`owner/name`). Nothing that is loaded is code: no pickle weights, no remote code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from fedllm.errors import ConfigError, ModelError, nearest
from fedllm.models.base_models.cache import build_once
from fedllm.models.base_models.gguf import convert
from fedllm.models.base_models.huggingface import from_folder, from_hub, hub_folder
from fedllm.models.base_models.positions import num_positions
from fedllm.models.base_models.quantized import from_cache, quantise
from fedllm.models.base_models.tiny_llama import tiny_model, tiny_tokenizer
from fedllm.models.base_models.vocabulary import require_tokenizer
from fedllm.models.base_models.wheel import fetch
from fedllm.tensors.checksum import checksum
from fedllm.tensors.tree import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fedllm.models.base_models.huggingface import Loaded

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "float32": torch.float32,
        "float64": torch.float64,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
)
CPU_FILE = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True, eq=False)
class Base:
    """A loaded base model in eval mode, nothing in it trainable, its key-value cache off.

    `folder`: what was loaded; None for a model of the hub and for one that is built in code (`materialise` writes it).
    `name`: what the experiment asked for. `title`: for people. `unpackable`: why its sequences run one at a time; None
    if they share a row. `caching`: whether they then generate with a cache. (`model_probe` finds out.)
    `positions`: the most tokens of a sequence; None where there is no hard limit.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path | None
    name: str
    title: str
    unpackable: str | None = None
    caching: bool = True
    positions: int | None = None

    @cached_property
    def digest(self) -> str:
        """A checksum of its weights as they were loaded, of its configuration and of its tokenizer."""
        own = {"_name_or_path", "transformers_version", "use_cache"}  # of the place and the process
        settings: list[Any] = [{k: v for k, v in self.model.config.to_dict().items() if k not in own}]
        settings += [getattr(self.model.generation_config, "eos_token_id", None), self.tokenizer.chat_template]
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        # what stands before are its latest settings of padding and truncation
        words = core.to_str().partition('"added_tokens"')[2] if core is not None else repr(self.tokenizer.get_vocab())
        told = [checksum(self.model.state_dict()), json.dumps(settings, sort_keys=True, default=str), words]
        return hashlib.sha256("\0".join(told).encode()).hexdigest()


@dataclass(frozen=True)
class Alias:
    """A model that needs no hub. `auto`: the dtype that "auto" stands for, "auto" for the processor's choice. `folder`:
    of its files, None for a model that is built in code."""

    title: str
    about: str
    load: Callable[[torch.dtype], Loaded]
    auto: str = "auto"
    folder: Callable[[], Path | None] = lambda: None


def load_base(name: str, *, dtype: str = "auto", device: str = "auto", quantize: str | None = None) -> Base:
    """Load a base model in a dtype (`resolve_dtype`) onto a device (`resolve_device`), its matrices in `quantize`.

    Raises ModelError: unknown name, files that are missing or of another kind, a download that fails, a tokenizer that
    does not fit the model.
    """
    quiet_dependencies()
    place = resolve_device(device)
    alias = ALIASES.get(name)
    if alias is not None:
        wanted = alias.auto if dtype == "auto" else dtype
        title = alias.title
        number, read = resolve_dtype(wanted, device=place), alias.load
    else:
        number, (source, title) = resolve_dtype(dtype, device=place), _locate(name)
        read = partial(from_folder, source) if source else partial(from_hub, name)
    model, tokenizer, folder = read(number) if quantize is None else _quantized(name, read, quantize, number)
    require_tokenizer(tokenizer, model, name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.use_cache = False
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    try:
        model.to(place).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:  # out of memory, or a device that torch was built without
        reason = str(error).splitlines()[0]
        raise ModelError(f"{name} cannot be moved to device '{place}': {reason}") from error
    positions = num_positions(model)
    return Base(model=model, tokenizer=tokenizer, folder=folder, name=name, title=title, positions=positions)


def _quantized(name: str, read: Callable[[torch.dtype], Loaded], kind: str, dtype: torch.dtype) -> Loaded:
    """From what is kept of the model's files; a model that is built in code has none."""
    source = _source(name)
    if source is not None:
        return from_cache(source, kind, dtype)
    model, tokenizer, folder = read(dtype)
    if folder is None and name not in ALIASES:  # the hub's files are here now
        return from_cache(hub_folder(name), kind, dtype)
    quantise(model, kind)
    return model, tokenizer, folder


def _source(name: str) -> Path | None:
    """The folder of a model's files, as far as there is one already."""
    if name in ALIASES:
        return ALIASES[name].folder()
    source, _ = _locate(name)
    try:
        return source or hub_folder(name)
    except OSError:
        return None


def materialise(base: Base) -> Path:
    """A folder that holds the base model: the one it came from, the hub's local copy, or, for a model that is built in
    code, one written to the cache at first use (float32, whatever dtype is loaded)."""
    if base.folder is not None:
        return base.folder
    alias = ALIASES.get(base.name)
    if alias is None:
        return hub_folder(base.name)
    model, tokenizer, _ = alias.load(torch.float32)  # built again: an adapter may have changed the layers of base.model

    def build(out: Path, work: Path) -> None:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)

    return build_once(f"{base.name}-{digest(model.state_dict())[:16]}", build)


def resolve_device(device: str = "auto") -> str:
    """A torch device: "auto" is cuda if there is one, else cpu. Raises ConfigError or ModelError."""
    cuda = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if cuda else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{device}'{nearest(device, ('auto', 'cpu', 'cuda'))}") from error
    if kind == "cuda" and not cuda:
        raise ModelError(f"device '{device}' was asked for, but torch finds no CUDA device; use 'auto' or 'cpu'")
    return device


def resolve_dtype(dtype: str = "auto", *, device: str = "cpu") -> torch.dtype:
    """A torch dtype by name: "auto" is bfloat16 where the device multiplies matrices in it fast, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if _fast_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype '{dtype}'{nearest(dtype, ('auto', *DTYPES))}")
    return DTYPES[dtype]


def quiet_dependencies() -> None:
    """Switch off telemetry, progress bars and chatter of the libraries below, and keep their caches small, unless the
    user has set them.

    It must run before they are imported or used, since they read these variables once. Torch and oneDNN each remember
    how to multiply matrices of a thousand past shapes, a quarter of a megabyte apiece, torch once more for each thread.
    Rows without padding bring new shapes at every step, and each step repeats its own some thirty times: a few do.
    """
    for variable, value in {
        "LRU_CACHE_CAPACITY": "1",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",  # else transformers asks a web service to convert pickle weights
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(variable, value)


def emulates_bfloat16(device: str, cpu_file: Path = CPU_FILE) -> bool:
    """True of a device that is known to have no instructions for products in bfloat16, which are then slow."""
    if device.startswith("cuda"):
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and _cpu_flags(cpu_file).isdisjoint(BFLOAT16_FLAGS) and bool(_cpu_flags(cpu_file))


def _fast_bfloat16(device: str, cpu_file: Path = CPU_FILE) -> bool:
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and not _cpu_flags(cpu_file).isdisjoint(BFLOAT16_FLAGS)


def _cpu_flags(cpu_file: Path) -> frozenset[str]:
    """What the processor says that it can do; nothing where it does not say."""
    if not cpu_file.exists():
        return frozenset()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", cpu_file.read_text(), flags=re.MULTILINE)
    return frozenset() if flags is None else frozenset(flags[1].split())


def _locate(name: str) -> tuple[Path | None, str]:
    """The local folder of a name and its title; no folder if the name can only be one of the hub."""
    path = place_of(name)
    if path is None:
        return None, name
    if path.is_dir():
        return path, path.name
    return convert(path), f"{path.stem}, dequantised"


def place_of(name: str) -> Path | None:
    """The folder or .gguf file that a model's name means; None if it can only be one of the hub.

    Raises:
        ModelError: it is none of the three.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path.resolve()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {path}; check the path of the model")
        return path
    if path.exists():
        raise ModelError(f"{path} is neither a model folder nor a .gguf file")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        return None
    raise ModelError(
        f"unknown model '{name}': no packaged name, folder, .gguf file or 'owner/name' of the hub"
        f"{nearest(name, ALIASES)}"
    )


def _load_smollm2(dtype: torch.dtype) -> Loaded:
    return from_folder(fetch(), dtype)


def _load_tiny(dtype: torch.dtype) -> Loaded:
    return tiny_model(dtype), tiny_tokenizer(), None


ALIASES: Mapping[str, Alias] = MappingProxyType(
    {
        "smollm2-135m-instruct": Alias(
            title="SmolLM2-135M-Instruct, Q4_1 dequantised",
            about="135 M parameters, English, chat; 93 MB from the Python index at first use",
            load=_load_smollm2,
            folder=lambda: fetch(),
        ),
        "tiny-llama": Alias(
            title="tiny random Llama",
            about="0.1 M random parameters over bytes, for tests and dry runs; nothing to download",
            load=_load_tiny,
            auto="float32",
        ),
    }
)
