"""Text to distil on when there is none: the teacher writes it, once.

    opening (BOS | a drawn token | a line of `prompts`) -> the teacher samples until EOS -> a line of HASH.jsonl

Temperature 1 and no truncation by default: the texts are then samples of the teacher's own distribution, and the mean
KL on them estimates the divergence of the two models as wholes. Truncated or cooler samples read better, but never
show the student the tails that it is held to. Where a model has no BOS a drawn token takes its place, which keeps the
texts apart (LLM-QAT, arXiv 2305.17888, section 3.1).

A batch of texts is a function of the settings and its number alone, so a killed run goes on behind its last whole
batch. The file is named by a hash of everything that decides it; beside it lies the same in words.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lcprune.data.author import Author
from lcprune.data.sources import read_texts
from lcprune.errors import DiskError, InputError
from lcprune.files import cache_folder
from lcprune.identity import content_of

COLUMN = "text"
"""Where a line of the stored file has its text."""

_FORMAT = 1  # of the sampling below; raised when the same settings come to give other texts


@dataclass(frozen=True)
class Generate:
    """How the teacher writes the text to distil on.

    Each process that needs the text finds the same file. Machines with a cache folder of their own each write one: on
    several machines set LCPRUNE_CACHE to a folder that they share.
    """

    documents: int = 256
    """Number of texts to write."""
    tokens: int = 512
    """Tokens that the teacher writes in a text, at most; an opening of data.generate.prompts comes on top."""
    model: str | None = None
    """Model that writes: a local folder, a hub name or demo:smollm2; null = the teacher."""
    prompts: Path | None = None
    """A file whose lines (.txt) or rows (.jsonl, .json, .csv, .parquet: data.text_column) open the texts, in turn."""
    temperature: float = 1.0
    """Divides the logits; 1 samples what the teacher believes, less makes it duller and more certain."""
    top_p: float = 1.0
    """Tokens are drawn from the likeliest with this much probability together; 1 = from all."""
    top_k: int = 0
    """Tokens are drawn from only so many of the likeliest; 0 = from all."""
    batch_size: int = 32
    """Texts written at once: more is faster and takes more memory."""
    seed: int = 0
    """Another seed gives other texts."""

    def __post_init__(self) -> None:
        if self.prompts is not None:
            object.__setattr__(self, "prompts", Path(self.prompts).expanduser())
        least = {"documents": 1, "tokens": 1, "top_k": 0, "batch_size": 1}
        mistakes = [
            f"{name}={getattr(self, name)} must be {minimum} or more"
            for name, minimum in least.items()
            if getattr(self, name) < minimum
        ]
        if not 0 < self.temperature < float("inf"):
            mistakes.append(f"temperature={self.temperature} must be greater than 0 (1 for the teacher's own)")
        if not 0 < self.top_p <= 1:
            mistakes.append(f"top_p={self.top_p} must be greater than 0 and at most 1")
        if self.model == "":
            mistakes.append("model is empty: name a local folder, a hub model or demo:smollm2, or leave it out")
        if mistakes:
            raise InputError(f"data.generate: {'; '.join(mistakes)}.")


def text_file(settings: Generate, *, teacher: str, column: str) -> Path:
    """The file with the text, one JSON object a line; written first unless it is there.

    The first to come writes and the others wait; the global random state is left as it was.

    Args:
        settings: How the text is written.
        teacher: Who writes it unless the settings name a model.
        column: Of the prompts, where their file has columns.

    Raises:
        InputError: There is no such model, it writes no text, or the prompts do not fit.
        RunError: The memory does not suffice.
        DiskError: The cache folder cannot be written.
    """
    name = settings.model or teacher
    prompts = _prompts(settings, column)
    origin = _origin(settings, name, prompts)
    content = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "generated" / f"{content[:16]}.jsonl"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not path.is_file():
                path.with_suffix(".json").write_text(json.dumps({"name": name, **origin}, indent=2) + "\n", "utf-8")
                _write(path, settings, Author(name, prompts))
    except OSError as error:
        raise _no_room(path, error) from error
    return path


def _write(path: Path, settings: Generate, author: Author) -> None:
    from transformers import GenerationConfig

    author.check(settings.tokens)
    how = GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_new_tokens=settings.tokens,
    )
    partial = path.with_suffix(".partial")
    done = _whole_batches(partial, settings.batch_size)
    _say(f"{author.name} writes {settings.documents - done} texts into {path}, once")
    progress = _Progress(done, settings.documents)
    with _random_state_kept(), partial.open("ab") as file:
        for first in range(done, settings.documents, settings.batch_size):
            texts = author.texts(range(first, min(first + settings.batch_size, settings.documents)), how, settings.seed)
            file.write("".join(json.dumps({COLUMN: text}, ensure_ascii=False) + "\n" for text in texts).encode())
            file.flush()
            os.fsync(file.fileno())
            progress.report(first + len(texts))
    partial.rename(path)


class _Progress:
    """How many texts there are and how long the others will take: on a terminal, and in a log not too often."""

    def __init__(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        self._started = self._last = time.monotonic()
        self._pause = 10 if sys.stderr.isatty() else 60  # seconds

    def report(self, done: int) -> None:
        now = time.monotonic()
        if now - self._last >= self._pause or done == self._total:
            left = (now - self._started) / (done - self._done) * (self._total - done)
            _say(f"{done} of {self._total} texts, {left / 60:.0f} min left")
            self._last = now


def _say(what: str) -> None:
    print(f"data.generate: {what}", file=sys.stderr, flush=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        _say(f"another process writes {path}, waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _random_state_kept() -> Iterator[None]:
    # All GPUs, since torch.manual_seed seeds them all.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def _prompts(settings: Generate, column: str) -> list[str]:
    """Those that open a text: as many as there are texts, at most."""
    if settings.prompts is None:
        return []
    rows = read_texts("data.generate.prompts", settings.prompts, column)
    if settings.prompts.suffix.lower() == ".txt":
        rows = [line for line in rows[0].splitlines() if line.strip()]
    return rows[: settings.documents]


def _whole_batches(partial: Path, batch_size: int) -> int:
    """How many texts a killed run has left in whole batches; what is behind them is cut off."""
    if not partial.is_file():
        return 0
    *lines, _torn = partial.read_bytes().split(b"\n")
    done = len(lines) // batch_size * batch_size
    with partial.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in lines[:done]))
    return done


def _origin(settings: Generate, name: str, prompts: Sequence[str]) -> dict[str, object]:
    """Everything that decides the texts, as plain data."""
    return {
        "format": _FORMAT,
        "settings": {key: value for key, value in asdict(settings).items() if key not in ("model", "prompts")},
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest() if prompts else None,
        "model": content_of(name),
        "computed": "bfloat16 on cuda" if torch.cuda.is_available() else "stored dtype on cpu",
    }


def _no_room(path: Path, error: OSError) -> DiskError:
    return DiskError(
        f"data.generate could not write {path} ({error}): make room there, or set LCPRUNE_CACHE to another folder."
    )
