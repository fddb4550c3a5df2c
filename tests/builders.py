"""Tiny offline models, tokenizers and batches, built from configs with a fixed seed.

Every weight is random, norms and biases included: a layer that is left out, doubled or read in the wrong place shows in
the logits. The character tokenizer and the models share a vocabulary of 97: two special tokens, 95 characters.
"""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

PAD, EOS = "<pad>", "<eos>"
CHARACTERS = string.digits + string.ascii_letters + string.punctuation.replace("`", "") + " \n"
VOCABULARY = len((PAD, EOS)) + len(CHARACTERS)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

Family = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "phi",
    "phi3",
    "mixtral",
    "qwen3_moe",
    "opt",
    "gpt2",
    "gpt_neox",
    "bloom",
    "falcon",
    "falcon-7b",
    "falcon-rw",
]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3")
"""The families that every suite runs over."""
ALL_FAMILIES: tuple[Family, ...] = get_args(Family)
"""Every record of the table, for the suites about families."""

Common = dict[str, Any]


def _window_every(number: int, common: Common) -> Common:
    """A sliding window in all layers but every `number`th."""
    depth = common["num_hidden_layers"]
    types = ["full_attention" if (index + 1) % number == 0 else "sliding_attention" for index in range(depth)]
    return {"sliding_window": 8, "layer_types": types, **common}


def _renamed(common: Common, **names: str) -> Common:
    """The same values under a family's own names; an empty name leaves one out."""
    return {names.get(name, name): value for name, value in common.items() if names.get(name, name)}


def _many_heads(common: Common, **names: str) -> Common:
    return _renamed(common, num_key_value_heads="", **names)


_GPT = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}

# What sets each family apart: qwen2 has biases on q, k, v; qwen3 norms its queries and keys and states its head size;
# mistral (here), qwen2 (in its later layers), gemma2 and gemma3 (in turn) look through a sliding window; smollm3 (here)
# does so where it has no rotary positions.
_CONFIGS: dict[Family, Callable[[Common], PreTrainedConfig]] = {
    "llama": lambda common: LlamaConfig(**common),
    "mistral": lambda common: MistralConfig(sliding_window=8, **common),
    "qwen2": lambda common: Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=2, **common),
    "qwen3": lambda common: Qwen3Config(head_dim=8, **common),
    "smollm3": lambda common: SmolLM3Config(
        no_rope_layer_interval=2, use_sliding_window=True, sliding_window=8, **common
    ),
    "gemma": lambda common: GemmaConfig(head_dim=8, **common),
    "gemma2": lambda common: Gemma2Config(
        head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0, **_window_every(2, common)
    ),
    "gemma3_text": lambda common: Gemma3TextConfig(head_dim=8, query_pre_attn_scalar=8, **_window_every(3, common)),
    "olmo2": lambda common: Olmo2Config(**common),
    "phi": lambda common: PhiConfig(qk_layernorm=True, **common),
    "phi3": lambda common: Phi3Config(sliding_window=8, original_max_position_embeddings=256, **common),
    "mixtral": lambda common: MixtralConfig(num_local_experts=4, **common),
    "qwen3_moe": lambda common: Qwen3MoeConfig(
        head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **common
    ),
    "opt": lambda common: OPTConfig(
        word_embed_proj_dim=32, **_many_heads(common, intermediate_size="ffn_dim", initializer_range="init_std")
    ),
    "gpt2": lambda common: GPT2Config(
        **_many_heads(common, intermediate_size="n_inner", max_position_embeddings="n_positions", **_GPT)
    ),
    "gpt_neox": lambda common: GPTNeoXConfig(**_many_heads(common)),
    "bloom": lambda common: BloomConfig(
        **_many_heads(
            common, intermediate_size="", max_position_embeddings="", **(_GPT | {"hidden_size": "hidden_size"})
        )
    ),
    "falcon": lambda common: FalconConfig(
        new_decoder_architecture=True,
        bias=True,
        **_renamed(common, num_key_value_heads="num_kv_heads", intermediate_size="ffn_hidden_size"),
    ),
    "falcon-7b": lambda common: FalconConfig(**_many_heads(common, intermediate_size="ffn_hidden_size")),
    "falcon-rw": lambda common: FalconConfig(
        parallel_attn=False,
        multi_query=False,
        alibi=True,
        bias=True,
        **_many_heads(common, intermediate_size="ffn_hidden_size"),
    ),
}


def tiny_config(n_layers: int = 6, tied: bool = True, *, model_type: Family = "llama") -> PreTrainedConfig:
    """Four query heads of 8, two KV heads where a family shares them, 64 channels."""
    return _CONFIGS[model_type](
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": n_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": tied,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
        }
    )


def tiny_llama(
    n_layers: int = 6,
    tied: bool = True,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    model_type: Family = "llama",
) -> PreTrainedModel:
    """A causal LM in eval mode; the global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # dtype here, as from_pretrained does: model.to(dtype) would round the rotary frequencies too.
        model = AutoModelForCausalLM.from_config(tiny_config(n_layers, tied, model_type=model_type), dtype=dtype)
        _randomise_vectors(model)
    return model.eval()


def _randomise_vectors(model: nn.Module) -> None:
    """Moves norm weights off one and biases off zero, where an exchange of two would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; decode(encode(text)) == text for ASCII without backtick and tab; others become '?'."""
    vocabulary = {token: index for index, token in enumerate((PAD, EOS, *CHARACTERS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def save_tiny(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """Saves the model (a six-layer Llama when none is given) and the tokenizer as a Hugging Face folder."""
    (tiny_llama() if model is None else model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def token_batches(n_batches: int = 3, batch_size: int = 2, length: int = 16, *, seed: int = 0) -> list[Tensor]:
    """Random token ids of shape (batch_size, length), special tokens excluded."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, length)
    return [torch.randint(2, VOCABULARY, shape, generator=generator) for _ in range(n_batches)]
