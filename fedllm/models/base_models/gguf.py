"""GGUF files: converted once to a safetensors folder in the cache, which loads a hundred times faster.

The weights are dequantised. They are kept in bfloat16 where every matrix of the file is quantised or bfloat16
already: rounding to 8 bits of mantissa is small beside a quantiser's step (SmolLM2 in Q4_1: 0.14 % of the weights'
2-norm, under 0.2 % of the perplexity), and the model is then the same numbers in every dtype it is loaded in.
A file that holds a matrix in float16 or float32 is kept in float32.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch

from fedllm.errors import ModelError
from fedllm.models.base_models.cache import build_once, progress


def convert(path: Path) -> Path:
    """The converted folder of a GGUF file, named by the file's SHA-256. Raises ModelError."""
    name = folder_name(path.stem, _sha256(path))
    return build_once(name, lambda out, work: write_folder(path, out, dtype=kept_dtype(path)))


def folder_name(stem: str, sha256: str) -> str:
    """The name of a converted file's folder."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', stem)[:80]}-{sha256[:16]}"


def write_folder(path: Path, out: Path, *, dtype: torch.dtype) -> None:
    """Dequantise a GGUF file and write model and tokenizer to the folder `out` as safetensors and JSON."""
    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise ModelError(f"reading {path.name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The reader's own bars know no off switch.
    with progress(f"converting {path.name}, once"), redirect_stderr(StringIO()):
        folder = str(path.parent)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name, trust_remote_code=False)
        # Without dequantize=True the model stays marked as quantised, and cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=path.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        )
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def kept_dtype(path: Path) -> torch.dtype:
    """The dtype that a file's matrices are kept in."""
    from gguf import GGMLQuantizationType, GGUFReader

    full = {GGMLQuantizationType.F16, GGMLQuantizationType.F32}
    matrices = (tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1)
    return torch.float32 if any(tensor.tensor_type in full for tensor in matrices) else torch.bfloat16


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
