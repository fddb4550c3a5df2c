"""What a student gets from its teacher's folder beside weights: the tokenizer's older file, and the licence.

transformers 5 reads tokenizer.model and does not save it; llama.cpp's converter needs it for several families.
"""

import shutil
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedTokenizerBase

from lcprune.models import load_tokenizer

SENTENCEPIECE = "tokenizer.model"
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Files that say under what a model may be passed on, and have to go with it, as patterns."""


def teacher_folder(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """Where the files of a tokenizer's model lie, for one of the hub those in its cache; None = it was made here."""
    name = tokenizer.name_or_path
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def inherit(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Puts the teacher's files into the folder of a student.

    Args:
        folder: Of the student.
        tokenizer: The student's, which knows where it comes from.
    """
    teacher = teacher_folder(tokenizer)
    if teacher is None:
        return
    for file in (file for pattern in TERMS for file in teacher.glob(pattern) if file.is_file()):
        shutil.copyfile(file, folder / file.name)
    vocabulary = _sentencepiece(tokenizer.name_or_path, teacher)
    # Tokens that were added to it since are not in that file.
    if vocabulary is not None and load_tokenizer(str(teacher)).get_vocab() == tokenizer.get_vocab():
        shutil.copyfile(vocabulary, folder / SENTENCEPIECE)


def _sentencepiece(name: str, teacher: Path) -> Path | None:
    """The tokenizer's older file; of a model on the hub it is fetched, for to load the model took other files."""
    if (teacher / SENTENCEPIECE).is_file():
        return teacher / SENTENCEPIECE
    if Path(name).is_dir():
        return None
    try:
        return Path(hf_hub_download(name, SENTENCEPIECE))
    except (OSError, HfHubHTTPError, ValueError):
        return None
