"""Loads the models of one `evaluate` job and measures them: text, tasks, what they write, how fast."""

import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lcprune import __version__, weights
from lcprune.cli.heldout import HeldOutText
from lcprune.cli.subjects import Subject
from lcprune.delivery import choices, decoding, harness, speed
from lcprune.delivery.choices import Question
from lcprune.delivery.evaluate import Evaluation, ModelEvaluation, TaskFigures, of_answers
from lcprune.delivery.figures import model_figures
from lcprune.delivery.samples import openings
from lcprune.distillation import comparison
from lcprune.distillation.pair import Storage
from lcprune.distillation.teacher import DtypeName, Teacher, load
from lcprune.merging.progress import track
from lcprune.models import load_tokenizer, public_name

PROMPTS, WRITTEN = 8, 128
"""Texts that repetition is looked for in, and tokens that each model adds at most."""
SAMPLES = 3
"""Texts that are kept, to be read."""

Models = Mapping[str, PreTrainedModel]
"""`student`, and before it `teacher` where there is one."""


@dataclass(frozen=True)
class Tasks:
    """What is asked, by whom."""

    own: dict[str, list[Question]]
    """Questions of our own files, by task."""
    harness: harness.Tasks | None
    """Tasks of lm-eval."""
    limit: int | None
    """At most so many questions of each."""

    @property
    def of_harness(self) -> tuple[str, ...]:
        """Names of lm-eval's tasks."""
        return () if self.harness is None else self.harness.names

    def answered(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, TaskFigures]:
        """A model's figures on every task."""
        answers = {name: choices.answer(model, tokenizer, questions, name) for name, questions in self.own.items()}
        figures = {name: of_answers(found) for name, found in answers.items()}
        if self.harness is not None:
            figures |= harness.answer(model, tokenizer, self.harness, self.limit)
        return figures


@dataclass(frozen=True)
class Job:
    """One model to evaluate; nothing is loaded yet."""

    subject: Subject
    """The model."""
    teacher: str | None
    """What it is compared with; None = nothing."""
    text: HeldOutText
    """What perplexity is measured on."""
    dtype: DtypeName
    """Of both models, but for the text of a recipe."""
    asked_dtype: bool
    """Whether that was asked for, instead of what a recipe says."""
    device: torch.device
    """Where everything runs."""
    out: Path
    """Where the JSON goes."""

    @property
    def names(self) -> dict[str, str]:
        """What the models are called where they are loaded."""
        teacher = {} if self.teacher is None else {"teacher": self.teacher}
        return {**teacher, "student": self.subject.model}

    @property
    def held(self) -> Storage:
        """How the teacher is held for the text."""
        return Storage(self.dtype) if self.asked_dtype or self.text.teacher is None else self.text.teacher

    def precision(self) -> AbstractContextManager[object]:
        """What the student reads the text in: the recipe's precision, unless a dtype was asked for."""
        return nullcontext() if self.asked_dtype else self.text.precision()


@dataclass
class Known:
    """What teachers have answered already: several models may share one."""

    answers: dict[tuple[str, DtypeName], dict[str, TaskFigures]] = field(default_factory=dict)
    """By teacher and dtype."""


@dataclass(frozen=True)
class _OfText:
    """What the text has shown."""

    perplexity: dict[str, float]
    """Of each model."""
    agreement: dict[str, float]
    """`top1` and `kl`; empty without a teacher."""
    tokens: int
    """Number of tokens that were predicted."""


def evaluated(job: Job, tasks: Tasks, known: Known) -> Evaluation:
    """Loads and measures.

    Args:
        job: What.
        tasks: What it is asked.
        known: Answers so far; the teacher's are added.
    """
    tokenizer = load_tokenizer(job.subject.model)
    models, text = _read_text(job)
    answers = _answered(job, models, tokenizer, tasks, known)
    prompts = _prompts(job.text.batches)
    texts = {who: decoding.all_continuations(model, prompts, WRITTEN, who) for who, model in models.items()}
    rates = _timed(models, job.text.batches[0]["input_ids"], prompts[0])
    figures = {
        who: ModelEvaluation(
            name=public_name(job.subject.name if who == "student" else job.names[who]),
            size=model_figures(model, weights.folder_of(job.names[who])),
            perplexity=text.perplexity[who],
            tasks=answers[who],
            repetition=decoding.repetition(texts[who]),
            tokens_per_second=rates[who],
            cache_bytes_per_token=decoding.cache_bytes_per_token(model),
            peak_bytes=speed.peak_bytes(model, job.text.batches[0]["input_ids"]),
        )
        for who, model in models.items()
    }
    return Evaluation(
        figures["student"],
        figures.get("teacher"),
        text.agreement,
        _samples(tokenizer, prompts, texts),
        _settings(job, tasks, prompts, text.tokens),
        _versions(tasks),
    )


def _read_text(job: Job) -> tuple[Models, _OfText]:
    """The models, and what they make of the text; there the teacher may be held otherwise, as in its run."""
    student = load(job.subject.model, job.dtype, job.device, named="MODEL")
    batches = track(job.text.batches, "reading held-out text")
    if job.teacher is None:
        with job.precision():
            perplexity, tokens = comparison.alone(student, batches)
        return {"student": student}, _OfText({"student": perplexity}, {}, tokens)
    teacher = load(job.teacher, job.held.dtype, job.device, job.held.packed, named="--teacher")
    with job.precision():
        found = comparison.compare(student, Teacher(teacher), batches)
    if job.held != Storage(job.dtype):
        del teacher
        teacher = load(job.teacher, job.dtype, job.device, named="--teacher")
    perplexity_of = {"teacher": found.teacher_perplexity, "student": found.perplexity}
    agreement = {"top1": found.agreement, "kl": found.kl}
    return {"teacher": teacher, "student": student}, _OfText(perplexity_of, agreement, found.tokens)


def _answered(
    job: Job, models: Models, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, known: Known
) -> dict[str, dict[str, TaskFigures]]:
    answers = {"student": tasks.answered(models["student"], tokenizer)}
    if job.teacher is not None:
        key = (job.teacher, job.dtype)
        if key not in known.answers:
            known.answers[key] = tasks.answered(models["teacher"], tokenizer)
        answers["teacher"] = known.answers[key]
    return answers


def _prompts(batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """What the texts begin with: the openings of the first rows."""
    return list(islice(chain.from_iterable(map(openings, batches)), PROMPTS))


def _timed(models: Models, ids_BT: Tensor, prompt_T: Tensor) -> dict[str, dict[str, float]]:
    prefill = speed.prefill(models, ids_BT)
    number = min(decoding.room(model, len(prompt_T), speed.DECODED) for model in models.values())
    decode = speed.decode(models, prompt_T, number)
    return {who: {"prefill": prefill[who], "decode": decode[who]} for who in models}


def _samples(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Tensor], texts: Mapping[str, Sequence[Sequence[int]]]
) -> list[dict[str, str]]:
    return [
        {
            "prompt": str(tokenizer.decode(prompts[place])),
            **{who: str(tokenizer.decode(list(written[place]))) for who, written in texts.items()},
        }
        for place in range(min(SAMPLES, len(prompts)))
    ]


def _settings(job: Job, tasks: Tasks, prompts: Sequence[Tensor], tokens: int) -> dict[str, object]:
    batches = job.text.batches
    return {
        "text": job.text.source,
        "blocks": sum(len(batch["input_ids"]) for batch in batches),
        "block_size": batches[0]["input_ids"].shape[1],
        "tokens": tokens,
        "dtype": job.dtype,
        "teacher_on_text": None if job.teacher is None else job.held.packed or job.held.dtype,
        "device": str(job.device),
        "limit": tasks.limit,
        "tasks": {**dict.fromkeys(tasks.own, "file"), **dict.fromkeys(tasks.of_harness, "lm-eval")},
        "texts_written": {"prompts": len(prompts), "prompt_tokens": [*map(len, prompts)], "new_tokens": WRITTEN},
    }


def _versions(tasks: Tasks) -> dict[str, str]:
    libraries = {name: version(name) for name in ("torch", "transformers")}
    asked = {} if tasks.harness is None else {"lm_eval": tasks.harness.version}
    return {"lcprune": __version__, "python": platform.python_version(), **libraries, **asked}
