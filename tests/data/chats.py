"""Chat templates as the families write them, and tokenizers that have their special tokens."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lcprune.data.columns import Conversation
from tests import builders

FOLDER = Path(__file__).with_name("templates")
MARKERS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
}
"""Template -> how it ends an answer."""
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "</s>", "<s>"),
)
ANSWERS = ("Two clips.\n\n  - one\n  - two ...", "\\o/ 48/2 = <<48/2=24>>24!")
"""What the assistant says in `CHAT`."""
CHAT: Conversation = (
    {"role": "user", "content": "How many clips?"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "And now? Say 'Two clips.'"},
    {"role": "assistant", "content": ANSWERS[1]},
)


def template(name: str) -> Path:
    """The file of a template."""
    return FOLDER / f"{name}.jinja"


def characters() -> PreTrainedTokenizerFast:
    """The builders' tokenizer, a token to a character, with the special tokens of all templates; no template."""
    tokenizer = builders.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL), "eos_token": "</s>", "bos_token": "<s>"})
    tokenizer.chat_template = None
    return tokenizer


def merges() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose tokens are words and runs of line breaks: tokens lie across the ends of what is written."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([f"{message['content']}\n\n\n\n assistant Two" for message in CHAT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[:-2])})
    return tokenizer
