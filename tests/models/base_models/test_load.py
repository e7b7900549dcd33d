"""Base models: hand-derived facts of the tiny one, folders and GGUF files against what was written."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedllm.errors import ConfigError, ModelError
from fedllm.models.base_models import load as base_module
from fedllm.models.base_models.load import ALIASES, Base, load_base, materialise, resolve_device, resolve_dtype
from fedllm.models.base_models.tiny_llama import END, START, UNKNOWN, tiny_model, tiny_tokenizer
from fedllm.tensors import tree

ROOT = Path(__file__).parents[3]
TOKENIZER = tiny_tokenizer()
SPECIAL = {START: 256, END: 257, UNKNOWN: 258}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """tiny-llama as a user's own folder."""
    tiny_model(torch.float32).save_pretrained(tmp_path / "mine")
    TOKENIZER.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def greedy(base: Base, prompt: str) -> list[int]:
    ids = base.tokenizer(prompt, return_tensors="pt")
    answer = base.model.generate(**ids, max_new_tokens=16, do_sample=False)
    new: list[int] = answer[0, ids.input_ids.shape[1] :].tolist()
    return new


# tiny-llama


def test_tiny_has_the_shape_that_is_stated() -> None:
    base = load_base("tiny-llama")
    config = base.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 64, 192)
    assert (config.num_attention_heads, config.num_key_value_heads, config.tie_word_embeddings) == (4, 2, True)
    attention, mlp, norms = 64 * (64 + 32 + 32 + 64), 3 * 64 * 192, 2 * 64
    assert sum(p.numel() for p in base.model.parameters()) == 259 * 64 + 2 * (attention + mlp + norms) + 64
    assert base.model.dtype == torch.float32
    assert base.title == ALIASES["tiny-llama"].title


def test_a_base_is_frozen_and_ready() -> None:
    base = load_base("tiny-llama")
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.model.config.use_cache is False
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == SPECIAL[END]


def test_tiny_is_one_model_in_every_dtype_and_at_every_build() -> None:
    exact = tree.map_leaves(lambda leaf: leaf.double(), load_base("tiny-llama", dtype="float64").model.state_dict())
    for dtype in ("float32", "bfloat16"):
        other = load_base("tiny-llama", dtype=dtype).model
        assert other.dtype == getattr(torch, dtype)
        assert tree.equal(exact, tree.map_leaves(lambda leaf: leaf.double(), other.state_dict()))


def test_tiny_leaves_the_global_generators_alone() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    tiny_model(torch.float32)
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert drawn == (random.random(), float(np.random.rand()), float(torch.rand(())))


def test_tiny_answers_are_not_degenerate() -> None:
    base = load_base("tiny-llama", dtype="float64")
    answers = [greedy(base, prompt) for prompt in ("What is the capital?", "Name a fruit.", "abc", "Der Hund")]
    assert min(len(set(answer)) for answer in answers) >= 6
    assert len({tuple(answer) for answer in answers}) == 4


@given(st.lists(st.text() | st.sampled_from(sorted(SPECIAL))).map("".join))
def test_any_text_comes_back_exactly(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


@given(st.text().filter(lambda text: "<|" not in text))
def test_a_token_is_a_byte(text: str) -> None:
    assert TOKENIZER(text).input_ids == list(text.encode())


def test_the_chat_template_is_chatml_without_a_system_message_of_its_own() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    whole = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    assert TOKENIZER.apply_chat_template(turns, tokenize=False) == whole
    asked = TOKENIZER.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = TOKENIZER(whole).input_ids
    assert ids[0] == SPECIAL[START] and ids.count(SPECIAL[END]) == 2


def test_tiny_is_written_once_and_loads_as_the_same_model(cache_folder: Path) -> None:
    base = load_base("tiny-llama")
    assert base.folder is None
    folder = materialise(base)
    before = (folder / "config.json").stat()
    other = load_base("tiny-llama", dtype="bfloat16")
    other.model.model.norm = torch.nn.Identity()  # as an adapter may change it
    assert folder.parent == cache_folder / "models" and materialise(other) == folder
    assert (folder / "config.json").stat().st_mtime_ns == before.st_mtime_ns
    loaded = load_base(str(folder), dtype="float32")
    assert tree.equal(loaded.model.state_dict(), base.model.state_dict())
    assert loaded.tokenizer.chat_template == base.tokenizer.chat_template
    assert loaded.tokenizer("Grüße <|im_end|>").input_ids == base.tokenizer("Grüße <|im_end|>").input_ids
    assert loaded.folder == folder == materialise(loaded)


# folders


def test_a_folder_is_titled_by_its_name_and_cast(folder: Path) -> None:
    base = load_base(str(folder), dtype="float64")
    assert (base.name, base.title, base.folder) == (str(folder), "mine", folder)
    assert base.model.dtype == torch.float64
    exact = tiny_model(torch.float64).state_dict()
    assert tree.equal(base.model.state_dict(), exact)
    assert not any(p.requires_grad for p in base.model.parameters()) and base.model.config.use_cache is False


def test_a_relative_folder_is_kept_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert load_base("mine").folder == folder.resolve()


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_base(str(folder)).tokenizer.pad_token == END


def test_pickle_weights_are_refused(folder: Path) -> None:
    torch.save(tiny_model(torch.float32).state_dict(), folder / "pytorch_model.bin")
    load_base(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds pytorch_model\.bin, but no safetensors"):
        load_base(str(folder))


def test_code_that_comes_with_a_model_is_not_run(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}')
    with pytest.raises(ModelError, match="cannot be read"):
        load_base(str(folder))
    assert not marker.exists()


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights, such as model\.layers\.1\.mlp\.up_proj"):
        load_base(str(folder))


def test_torn_weights_are_one_sentence(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"the model in {folder} cannot be read") as caught:
        load_base(str(folder))
    assert "\n" not in str(caught.value)


def test_folders_of_another_kind_say_what_they_are(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter, not a base model"):
        load_base(str(folder))
    (folder / "adapter_config.json").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_base(str(folder))


# names


def test_an_unknown_name_gets_the_nearest_alias() -> None:
    with pytest.raises(ModelError, match=r"unknown model 'smollm2-135m'.*did you mean 'smollm2-135m-instruct'\?"):
        load_base("smollm2-135m")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "", "../up/down"])
def test_a_path_that_is_not_there_is_no_model_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_module, "from_hub", None)
    with pytest.raises(ModelError, match=r"unknown model|neither a model folder"):
        load_base(name)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"neither a model folder nor a \.gguf file"):
        load_base(str(tmp_path / "model.safetensors"))
    with pytest.raises(ModelError, match=r"there is no file .*missing\.gguf"):
        load_base(str(tmp_path / "missing.gguf"))


def test_a_model_of_the_hub_without_a_network_is_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"'no-such-owner/model' is no folder here and cannot be read") as caught:
        load_base("no-such-owner/model")
    assert "\n" not in str(caught.value)


def test_a_model_of_the_hub_is_read_from_its_local_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    copy = tmp_path / "hub" / "models--someone--tiny"
    (copy / "refs").mkdir(parents=True)
    (copy / "refs" / "main").write_text("0" * 40)
    (copy / "snapshots").mkdir()
    folder.rename(copy / "snapshots" / ("0" * 40))
    base = load_base("someone/tiny", dtype="float32")
    assert (base.name, base.title, base.folder) == ("someone/tiny", "someone/tiny", None)
    assert tree.equal(base.model.state_dict(), tiny_model(torch.float32).state_dict())
    assert materialise(base) == copy / "snapshots" / ("0" * 40)


# dtype and device


def test_auto_is_bfloat16_only_where_the_processor_has_it(tmp_path: Path) -> None:
    for line, fast in {
        "flags\t\t: fpu avx512f avx512_bf16 amx_tile": True,
        "flags\t\t: fpu amx_bf16 amx_tile": True,
        "flags\t\t: fpu avx2 avx512f": False,
        "Features\t: fp asimd bf16 i8mm": True,
        "Features\t: fp asimd": False,
        "model name\t: bf16": False,
    }.items():
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\nbogomips\t: 1\n")
        assert base_module._fast_bfloat16("cpu", tmp_path / "cpuinfo") is fast, line
    assert base_module._fast_bfloat16("cpu", tmp_path / "absent") is False
    assert base_module._fast_bfloat16("mps") is False


def test_dtypes_go_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("float64") is torch.float64
    with pytest.raises(ConfigError, match=r"unknown dtype 'bfloat'; did you mean 'bfloat16'\?"):
        resolve_dtype("bfloat")
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(base_module, "_fast_bfloat16", lambda device, fast=fast: fast)
        assert resolve_dtype("auto") is dtype
        assert load_base("tiny-llama").model.dtype is torch.float32


def test_devices_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(ModelError, match="'cuda:0' was asked for, but torch finds no CUDA device"):
        resolve_device("cuda:0")
    with pytest.raises(ConfigError, match=r"unknown device 'cdua'; did you mean 'cuda'\?"):
        resolve_device("cdua")
    with pytest.raises(ModelError, match="tiny-llama cannot be moved to device 'xpu'"):
        load_base("tiny-llama", device="xpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda"


def test_naming_the_aliases_does_not_import_transformers() -> None:
    script = "import sys, fedllm.models.base_models.load as b; print(sorted(b.ALIASES), 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['smollm2-135m-instruct', 'tiny-llama'] False"


# GGUF


def interleave(weight: Tensor, heads: int) -> Tensor:
    """The row order of a query or key projection in a GGUF file: the halves of each head's rotation alternate."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, quantised: str) -> None:
    """tiny-llama as a GGUF file with its matrices quantised as named."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType
    from gguf.quants import quantize

    model = tiny_model(torch.float32)
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = [*TOKENIZER.convert_ids_to_tokens(list(range(258))), "Ġt"]  # readers ask for one merge at least
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(SPECIAL[START])
    writer.add_eos_token_id(SPECIAL[END])
    writer.add_chat_template(TOKENIZER.chat_template)
    for name, weight in model.named_parameters():
        written = weight.detach()
        if "q_proj" in name or "k_proj" in name:
            written = interleave(written, 4 if "q_proj" in name else 2)
        kind = GGMLQuantizationType[quantised if weight.dim() > 1 else "F32"]
        writer.add_tensor(gguf_name(name), quantize(written.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    for long, short in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "mlp.": "ffn_",
        "_proj": "",
    }.items():
        name = name.replace(long, short)
    return name


def dequantised(weight: Tensor, quantised: str) -> Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind = GGMLQuantizationType[quantised]
    return torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind).copy())


@pytest.mark.parametrize("quantised", ["F32", "Q8_0"])
def test_a_gguf_file_is_converted_once_and_loads_dequantised(
    cache_folder: Path, tmp_path: Path, quantised: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "My model.gguf"
    write_gguf(path, quantised)
    base = load_base(str(path), dtype="float32")
    assert base.title == "My model, dequantised"
    assert base.folder is not None and base.folder.parent == cache_folder / "models"
    for name, weight in tiny_model(torch.float32).named_parameters():
        expected = weight.detach()
        if quantised != "F32" and weight.dim() > 1:  # each row is quantised alone, in whatever order rows stand
            expected = dequantised(expected, quantised).to(torch.bfloat16).float()
        assert torch.equal(base.model.get_parameter(name), expected), name
    turns = [{"role": "user", "content": "Grüße"}]
    assert base.tokenizer.apply_chat_template(turns, tokenize=False) == "<|im_start|>user\nGrüße<|im_end|>\n"
    assert base.tokenizer("Hé t<|im_end|>").input_ids == [*"Hé".encode(), 258, SPECIAL[END]]
    said = capsys.readouterr().err
    assert said.count("converting My model.gguf, once") == 1 and "%|" not in said
    assert load_base(str(path)).folder == base.folder
    assert "converting" not in capsys.readouterr().err


def test_a_gguf_file_that_is_none_leaves_nothing(cache_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF but no more than that")
    with pytest.raises(ModelError, match=r"broken-[0-9a-f]{16} could not be prepared") as caught:
        load_base(str(path))
    assert "\n" not in str(caught.value)
    assert [item.suffix for item in (cache_folder / "models").iterdir()] == [".lock"]


# The real model


@pytest.mark.model
def test_smollm2_is_what_its_name_says(smollm2: str) -> None:
    base = load_base(smollm2, dtype="float32")
    config = base.model.config
    assert sum(p.numel() for p in base.model.parameters()) == 134_515_008
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (9, 3, 49_152)
    assert config.tie_word_embeddings is True and config.rope_parameters["rope_theta"] == 100_000
    assert base.title == "SmolLM2-135M-Instruct, Q4_1 dequantised"
    assert base.tokenizer("<|im_end|>").input_ids == [base.tokenizer.pad_token_id] == [2]
    text = "  tabs\t,  中文, 🙂\n<|im_start|>"
    assert base.tokenizer.decode(base.tokenizer(text).input_ids) == text


@pytest.mark.model
def test_smollm2_knows_language(smollm2: str) -> None:
    base = load_base(smollm2, dtype="float32")
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = base.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "Paris" in base.tokenizer.decode(greedy(base, prompt))
    text = "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France."
    ids = base.tokenizer(text, return_tensors="pt").input_ids
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    perplexity, control = (float(base.model(x, labels=x).loss.exp()) for x in (ids, shuffled))
    assert perplexity < 20 < 200 < control
