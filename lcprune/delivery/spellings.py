"""What transformers 5 writes about a model, said in the words of transformers 4, too, which vLLM and llama.cpp know.

    rope_parameters: {rope_theta: 5e5, rope_type: llama3, factor: 8}    rope_theta: 5e5, rope_scaling: {rope_type: ...}
    dtype: bfloat16                                                     torch_dtype: bfloat16
    tokenizer_class: TokenizersBackend                                  the teacher's, else PreTrainedTokenizerFast
    extra_special_tokens: [...]                                         additional_special_tokens

A reader that does not know the new words takes its defaults instead of what it misses: other positions, without a word.
Every change is read back by this transformers, and undone where it reads otherwise than before.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoTokenizer

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
ROPE_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""What transformers 4 calls rotary settings, by model_type, where that is not as transformers 5 does."""
RENAMED = {"qwen3_moe": {"num_local_experts": "num_experts"}}
"""What transformers 4 calls other settings, by model_type."""
PER_LAYER = {"full_attention", "sliding_attention"}
"""The kinds of layers whose rotary settings transformers 4 can tell apart: a scaled one, and a base for the other."""
GENERIC = "PreTrainedTokenizerFast"
"""The class of transformers 4 that takes tokenizer.json as it is."""
_LENGTH = "original_max_position_embeddings"
_LEFT_OVER = ("is_local", "local_files_only", "auto_map")  # how it was loaded, and code that does not come along


def respell_config(folder: Path) -> None:
    """Adds the old words to the config of a folder, and takes out where its teacher kept code of its own."""
    content = _read(folder / CONFIG)
    content.pop("auto_map", None)
    added = {name: value for name, value in _old_words(content).items() if name not in content}
    if _meaning(content, added) == _meaning({**content, **added}, added):
        content |= added
    _write(folder / CONFIG, content)


def respell_tokenizer(folder: Path, teacher: Path | None) -> None:
    """Gives the tokenizer of a folder a class that transformers 4 knows, and settings that it reads.

    Args:
        folder: With the tokenizer as transformers 5 has saved it, and the model's config.
        teacher: The folder it comes from; None = not known.
    """
    file = folder / TOKENIZER
    content = {name: value for name, value in _read(file).items() if name not in _LEFT_OVER}
    _write(file, content)
    if not (folder / "tokenizer.json").is_file():
        return
    before = _tokens(folder)
    source = _read(teacher / TOKENIZER) if teacher is not None and (teacher / TOKENIZER).is_file() else {}
    for candidate in (_as_in(source, content), _generic(content)):
        _write(file, candidate)
        if _tokens(folder) == before:
            return
    _write(file, content)


def _old_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 4 has to be told beside."""
    names = {"dtype": "torch_dtype", **RENAMED.get(config["model_type"], {})}
    return {old: config[new] for new, old in names.items() if new in config} | _rotary(config)


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings, where transformers 4 can be told them."""
    ropes = config.get("rope_parameters") or {}
    if ropes.keys() == PER_LAYER:
        windowed = dict(ropes["sliding_attention"])
        base = {"rope_local_base_freq": windowed.pop("rope_theta")}
        return base | _one_rotary(config, ropes["full_attention"]) if windowed == {"rope_type": "default"} else {}
    return {} if any(isinstance(value, Mapping) for value in ropes.values()) else _one_rotary(config, ropes)


def _one_rotary(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    names = ROPE_NAMES.get(config["model_type"], {})
    alone = {names.get(key, key): rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    return alone | _scaling(config, rope)


def _scaling(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """One set of rotary settings without what stands beside it; some families of transformers 4 bear no more."""
    beside = {"rope_theta", "partial_rotary_factor"}
    if _LENGTH in config:
        beside.add(_LENGTH)
    if "type" in rope:  # the teacher's own word, from which transformers 5 has made the other
        beside.add("rope_type")
    scaling = {key: value for key, value in rope.items() if key not in beside}
    return {"rope_scaling": None if scaling == {"rope_type": "default"} else scaling} if scaling else {}


def _meaning(config: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """What this transformers understands, apart from these words themselves, which it may keep."""
    understood = CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config))).to_dict()
    return {name: value for name, value in understood.items() if name not in added}


def _as_in(source: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """With the teacher's class, and what transformers 5 moves from its settings into tokenizer.json."""
    known = {name: source[name] for name in ("add_bos_token", "add_eos_token") if name in source}
    kept = content["tokenizer_class"]
    if kept.endswith("Backend"):
        kept = source.get("tokenizer_class") or GENERIC
    return _generic({**content, **known, "tokenizer_class": kept})


def _generic(content: Mapping[str, Any]) -> dict[str, Any]:
    """With a class of transformers 4, and a list of special tokens under the name by which it takes a list."""
    content = dict(content)
    if content["tokenizer_class"].endswith("Backend"):
        content["tokenizer_class"] = GENERIC
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    return content


def _tokens(folder: Path) -> tuple[object, ...]:
    """What a folder's tokenizer does with text, as this transformers reads it."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.extra_special_tokens


def _read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
