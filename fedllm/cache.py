"""The cache folder: what is worked out once and can be made again at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$FEDLLM_CACHE`, else `$XDG_CACHE_HOME/fedllm`, else `~/.cache/fedllm`. It need not exist."""
    if chosen := os.environ.get("FEDLLM_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "fedllm"
    return Path.home() / ".cache" / "fedllm"
