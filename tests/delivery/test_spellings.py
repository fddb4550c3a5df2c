"""What an export says is read alike by transformers 5, and by readers that know only the words of transformers 4."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from lcprune.delivery.export import export
from lcprune.delivery.spellings import respell_config, respell_tokenizer
from lcprune.merging.lineage import MergeHistory
from tests.builders import ALL_FAMILIES, Family, tiny_config, tiny_llama, tiny_tokenizer

LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
    "original_max_position_embeddings": 64,
}
LONG = {"type": "longrope", "rope_type": "longrope", "rope_theta": 777.0, "short_factor": [1.0] * 4}
WINDOWED = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def _config(model_type: Family, **changed: object) -> PreTrainedConfig:
    plain = tiny_config(4, model_type=model_type)
    return type(plain).from_dict({**plain.to_dict(), **changed})


def _saved(folder: Path, config: PreTrainedConfig) -> dict[str, Any]:
    config.save_pretrained(folder)
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.mark.parametrize(
    ("model_type", "rope", "words"),
    [
        ("llama", LLAMA3, {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
        ("mistral", {"rope_type": "default", "rope_theta": 777.0}, {"rope_theta": 777.0, "rope_scaling": None}),
        (
            "qwen2",
            {"type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64},
            {
                "rope_theta": 5e5,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            },
        ),
        (
            "gemma3_text",
            WINDOWED,
            {
                **{"rope_theta": 1e6, "rope_local_base_freq": 1e4},
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            "phi",
            {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.75},
            {"rope_theta": 777.0, "partial_rotary_factor": 0.75},
        ),
        (
            "phi3",
            {**LONG, "long_factor": [2.0] * 4},
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        ),
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 777.0, "rotary_pct": 0.5},
        ),
    ],
)
def test_rotary_settings_are_said_in_the_older_words_too(
    tmp_path: Path, model_type: Family, rope: dict[str, object], words: dict[str, object]
):
    before = _saved(tmp_path, _config(model_type, rope_parameters=rope))
    respell_config(tmp_path)
    after = json.loads((tmp_path / "config.json").read_text())
    assert {name: after[name] for name in words} == words
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_config_says_the_same_as_before(tmp_path: Path, model_type: Family):
    saved = _saved(tmp_path, _config(model_type, dtype="bfloat16"))
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    respell_config(tmp_path)
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    kept = after.keys() - before.keys()  # words that this transformers keeps and does not use
    assert {name: value for name, value in after.items() if name not in kept} == before
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["torch_dtype"] == "bfloat16"
    assert {name: content[name] for name in saved} == saved


def test_number_of_experts_is_said_in_the_older_word_too(tmp_path: Path):
    _saved(tmp_path, _config("qwen3_moe"))
    respell_config(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_experts"] == 4


def test_rotary_settings_that_the_older_words_cannot_say_stay_alone(tmp_path: Path):
    ropes = {**WINDOWED, "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    before = _saved(tmp_path, _config("gemma3_text", rope_parameters=ropes))
    respell_config(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).keys() - before.keys() <= {"torch_dtype"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "PreTrainedTokenizerFast"),
        ("TokenizersBackend", "PreTrainedTokenizerFast"),
        ("PreTrainedTokenizerFast", "PreTrainedTokenizerFast"),
    ],
)
def test_tokenizer_has_a_class_that_transformers_4_knows(tmp_path: Path, source: str | None, expected: str):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["~"]})
    for folder in (teacher, student):
        tiny_config(4).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    told = json.loads((teacher / "tokenizer_config.json").read_text())
    (teacher / "tokenizer_config.json").write_text(json.dumps({**told, "tokenizer_class": source}))
    AutoTokenizer.from_pretrained(teacher).save_pretrained(student)
    respell_tokenizer(student, None if source is None else teacher)
    written = json.loads((student / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == expected
    assert written["additional_special_tokens"] == ["~"]
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & written.keys()
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (student, teacher))
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.extra_special_tokens == ["~"]


def test_class_that_would_read_the_tokenizer_otherwise_is_not_put_back(tmp_path: Path):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    for folder in (teacher, student):
        tiny_config(4).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    before = AutoTokenizer.from_pretrained(student).backend_tokenizer.to_str()
    (teacher / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    respell_tokenizer(student, teacher)
    assert json.loads((student / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(student).backend_tokenizer.to_str() == before


def test_export_is_respelled_and_names_no_code_that_it_lacks(tmp_path: Path):
    student = tiny_llama(4)
    student.config.auto_map = {"AutoConfig": "configuration_mine.MyConfig"}
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    tokenizer._auto_map = {"AutoTokenizer": ["tokenization_mine.MyTokenizer", None]}
    out = export(student, tmp_path / "short", tokenizer=tokenizer, history=MergeHistory(4))
    config, settings = (json.loads((out / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert "auto_map" not in config.keys() | settings.keys()
    assert (config["rope_theta"], config["torch_dtype"]) == (10000.0, "float32")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoModelForCausalLM.from_pretrained(out).config.rope_parameters == student.config.rope_parameters
