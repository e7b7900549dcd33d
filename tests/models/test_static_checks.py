"""What is decided of a task without its model's weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedllm.errors import FedllmError
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.peft import Peft
from fedllm.models.base_models import load
from fedllm.models.static_checks import check_task
from fedllm.models.task import Task

REFUSED = {
    "no folder": (Task("/nonexistent/model"), "unknown model '/nonexistent/model'"),
    "a misspelt alias": (Task("tiny-lama"), "unknown model 'tiny-lama'.*did you mean 'tiny-llama'"),
    "no such file": (Task("missing.gguf"), "there is no file missing.gguf"),
    "no such device": (Task("tiny-llama", device="gpu"), "unknown device 'gpu'; did you mean 'cuda'"),
    "no such layer": (Task("tiny-llama", Lora(targets=("q_porj",))), r"lora\.targets: 'q_porj' fits no layer; did you"),
    "too high a rank": (Task("tiny-llama", Lora(rank=500)), r"lora\.rank is 500, above the size"),
    "no start": (Task("tiny-llama", Lora(init_from="nowhere")), r"init_from: nowhere holds no adapter_model"),
    "no adapter of peft": (Task("tiny-llama", Peft("ia4")), "unknown type 'ia4'; did you mean 'ia3'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task, message = REFUSED[case]
    with pytest.raises(FedllmError, match=message):
        check_task(task)


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedllmError, match=r"has no config\.json; a model folder is what"):
        check_task(Task(str(tmp_path)))


def test_nothing_is_loaded_and_a_model_of_the_hub_is_left_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "load_base", None)
    check_task(Task("tiny-llama", Lora(rank=2, targets=("q_proj",))))
    check_task(Task("someone/else-entirely"))


def test_what_a_processor_has_no_instructions_for(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    for line, emulated in {
        "flags : fpu avx2 avx512f": True,
        "flags : avx512_bf16": False,
        "Features : asimd": True,
    }.items():
        file.write_text(f"processor : 0\n{line}\n")
        assert load.emulates_bfloat16("cpu", file) is emulated, line
    file.write_text("processor : 0\n")
    assert not load.emulates_bfloat16("cpu", file), "a processor that says nothing is given the benefit of the doubt"
    assert not load.emulates_bfloat16("mps", file) and not load.emulates_bfloat16("cpu", tmp_path / "absent")
