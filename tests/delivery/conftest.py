"""What every test of this room may ask for."""

import pytest
from transformers import PreTrainedTokenizerFast

from tests.builders import tiny_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One of its own per test: some tests break its save_pretrained."""
    return tiny_tokenizer()
