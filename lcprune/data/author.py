"""The model that writes the text of a run: what its texts open with, how they are sampled, where they end.

    openings, padded on the left [B, T] -> generate -> tokens up to the first that no text can hold -> text

A text ends at EOS or at any other special token: what a tokenizer cannot write as text and read back is not stored.
"""

import re
import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from lcprune import models, weights
from lcprune.errors import InputError, RunError, reason

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class Author:
    """The model that writes, its tokenizer, and what its texts open with; the weights are loaded at the first text."""

    def __init__(self, name: str, prompts: Sequence[str]) -> None:
        self.name = name
        self.prompts = prompts
        self.config: PretrainedConfig = models.read_config(name).get_text_config()
        self.tokenizer: PreTrainedTokenizerBase = models.load_tokenizer(name)

    def check(self, tokens: int) -> None:
        """Refuses texts longer than the positions that the model knows."""
        positions = getattr(self.config, "max_position_embeddings", None)  # none where positions are relative
        longest = max((len(self._tokens(prompt)) for prompt in self.prompts), default=1)
        if positions is not None and longest + tokens > positions:
            raise InputError(
                f"data.generate.tokens={tokens} behind an opening of {longest} tokens is more than the {positions} "
                f"positions of {self.name}: lower it to {max(positions - longest, 0)}"
                f"{' or shorten the longest of data.generate.prompts' if self.prompts else ''}."
            )

    def texts(self, numbers: range, how: "GenerationConfig", seed: int) -> list[str]:
        """The texts of these numbers; seeds the global random state with the seed and the first number.

        Args:
            numbers: Which texts; a prompt opens every text whose number is its own modulo the number of prompts.
            how: How tokens are drawn, and how many at most; where a text ends is added to it.
            seed: Another seed gives other texts.

        Raises:
            InputError: The model cannot be loaded or writes no text.
            RunError: The memory does not suffice.
        """
        model, ends = self._model, self._ends  # loaded before the seed counts: loading may draw numbers
        torch.manual_seed(zlib.crc32(f"{seed}/generate/{numbers.start}".encode()))
        openings = [self._opening(number) for number in numbers]
        longest = max(map(len, openings))
        last = {opening[-1] for opening in openings}
        # Padding is masked on the left and cut off on the right, so that any token serves; but transformers takes an
        # opening that ends in it for one that was padded on the wrong side.
        padding = next(token for token in range(self.config.vocab_size) if token not in last)
        padded = [[padding] * (longest - len(opening)) + opening for opening in openings]
        mask = [[0] * (longest - len(opening)) + [1] * len(opening) for opening in openings]
        how.update(eos_token_id=sorted(ends) or None, pad_token_id=padding)
        model.generation_config = how  # else what this one leaves open is filled from the model's own, penalties too
        try:
            written = model.generate(  # type: ignore[operator]
                torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=how,
            )
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"the memory of {model.device} does not suffice for {self.name} to write {len(numbers)} texts at once: "
                "lower data.generate.batch_size or data.generate.tokens."
            ) from error
        return [
            self._text(number, opening, tokens)
            for number, opening, tokens in zip(numbers, openings, written[:, longest:].tolist(), strict=True)
        ]

    def _opening(self, number: int) -> list[int]:
        if self.prompts:
            return self._tokens(self.prompts[number % len(self.prompts)])
        for begin in (self.tokenizer.bos_token_id, self.config.bos_token_id):
            if isinstance(begin, int) and begin < self.config.vocab_size:
                return [begin]
        while True:
            token = int(torch.randint(self.config.vocab_size, ()))
            # A part of a character that takes several tokens opens no text.
            if token not in self._ends and "\ufffd" not in self._decode([token]):
                return [token]

    def _tokens(self, prompt: str) -> list[int]:
        tokens = self.tokenizer(prompt, verbose=False)["input_ids"]
        return tokens[:-1] if self._ends_by_itself else tokens

    def _text(self, number: int, opening: list[int], tokens: list[int]) -> str:
        """The opening as it was given and, up to the end, what was written behind it."""
        end = next((place for place, token in enumerate(tokens) if token in self._ends), len(tokens))
        before = self._decode(opening)
        # Decoded together: some tokenizers drop the space a text begins with.
        behind = self._decode([*opening, *tokens[:end]])[len(before) :].rstrip("\ufffd")
        if spelled := self._spelled.search(behind):
            behind = behind[: spelled.start()]
        return (self.prompts[number % len(self.prompts)] if self.prompts else before) + behind

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[return-value]

    @cached_property
    def _ends(self) -> set[int]:
        """EOS, and every other token that no text can hold: special ones, and what the tokenizer does not know."""
        added = self.tokenizer.added_tokens_decoder
        special = {token for token, what in added.items() if what.special} | set(self.tokenizer.all_special_ids)
        unknown = set(range(self.config.vocab_size)) - set(self.tokenizer.get_vocab().values())
        eos = self._model.generation_config.eos_token_id  # type: ignore[union-attr]
        return special | unknown | set(eos if isinstance(eos, list) else () if eos is None else (eos,))

    @cached_property
    def _ends_by_itself(self) -> bool:
        """Whether the tokenizer puts an EOS behind whatever it reads; behind an opening there is more to come."""
        return self.tokenizer("")["input_ids"][-1:] == [self.tokenizer.eos_token_id]

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        """A special token written out in ordinary ones: it would be read as the special token."""
        added = self.tokenizer.added_tokens_decoder.values()
        special = {what.content for what in added if what.special} | set(self.tokenizer.all_special_tokens)
        return re.compile("|".join(map(re.escape, sorted(special))) or r"(?!)")

    @cached_property
    def _model(self) -> "PreTrainedModel":
        return load(self.name)


def load(name: str) -> "PreTrainedModel":
    """The model in bfloat16 on this process's GPU, or as it is stored on the CPU."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    try:
        return weights.load(
            name, "data.generate.model", dtype=torch.bfloat16 if gpu else "auto", device_map={"": device}
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"model {name!r} cannot write the text of data.generate ({reason(error)}): name a causal language model "
            "with its weights in data.generate.model."
        ) from error
