"""Clients that came after a run and have a personal part of their own: their files in the run folder.

RUN/clients/NAME/adapter                the whole adapter in PEFT's layout, as that of a client of the run
RUN/clients/NAME/personal.safetensors   the personal part alone
RUN/clients/NAME/personal.json          what it was trained on, and how
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm.engines.checksummed_files import read_facts, read_tree, with_sum, written
from fedllm.events import DataReported, read
from fedllm.files import atomic_folder, write_durably
from fedllm.models.loaded_model import LoadedModel
from fedllm.runs.artifacts import base_name
from fedllm.runs.folder import Folder
from fedllm.tensors.tree import Tree

PART, FACTS = "personal.safetensors", "personal.json"
ADVICE = "delete the folder that it is in, and make it again with fedllm personalise"


def run_clients(folder: Folder) -> tuple[str, ...]:
    """The clients of the run, from its log; those that were never drawn included."""
    if not folder.events.is_file():
        return ()
    reported = [event for _, event in read(folder.events) if isinstance(event, DataReported)]
    return tuple(reported[-1].train) if reported else ()


def personalised(folder: Folder) -> tuple[str, ...]:
    """The names of those who came after the run."""
    return tuple(sorted(path.parent.name for path in folder.clients.glob(f"*/{FACTS}")))


def own_part(folder: Folder, name: str) -> Tree:
    """The personal part of one of them.

    Raises:
        RunError: its file is damaged or gone.
    """
    return read_tree(folder.clients / name / PART, ADVICE)


def facts_of(folder: Folder, name: str) -> dict[str, Any]:
    """What it was trained on, and how.

    Raises:
        RunError: its file is damaged.
    """
    return read_facts(folder.clients / name / FACTS, ADVICE)


def save_personal(
    folder: Folder, name: str, model: LoadedModel, params: Tree, own: Tree, facts: Mapping[str, Any]
) -> None:
    """All three, or none. `params`: complete, with `own` in place.

    Raises:
        RunError: the disk.
    """
    with atomic_folder(folder.clients / name) as part:
        (part / "adapter").mkdir()
        model.adapter.save(params, part / "adapter", base_name(model))
        write_durably(part / PART, written(own))
        write_durably(part / FACTS, with_sum(facts).encode())
