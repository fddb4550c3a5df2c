"""Tiny offline models, tokenizers and batches, built from configs with a fixed seed.

Every weight is random, norms and biases included: a layer that is left out, doubled or read in the wrong place shows in
the logits. The character tokenizer and the models share a vocabulary of 97: two special tokens, 95 characters.
"""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
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

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3")

# What sets each family apart: qwen2 has biases on q, k, v; qwen3 norms its queries and keys and states its head size;
# mistral (here) and qwen2 (in its later layers, a list in the config) look through a sliding window.
_CONFIGS: dict[Family, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": lambda **common: MistralConfig(sliding_window=8, **common),
    "qwen2": lambda **common: Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=2, **common),
    "qwen3": lambda **common: Qwen3Config(head_dim=8, **common),
}


def tiny_config(n_layers: int = 6, tied: bool = True, *, model_type: Family = "llama") -> PreTrainedConfig:
    """Four query heads of 8, two KV heads, 64 channels."""
    return _CONFIGS[model_type](
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def tiny_llama(
    n_layers: int = 6,
    tied: bool = True,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    model_type: Family = "llama",
) -> PreTrainedModel:
    """A Llama-shaped causal LM in eval mode; the global random state is left as it was."""
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
