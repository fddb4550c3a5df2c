"""From a model to a shorter one that was taught by it, in Python: what the command line does, on objects.

    text = lcprune.TextDataModule(tokenizer="my-model", path="my.jsonl")
    model = AutoModelForCausalLM.from_pretrained("my-model")
    history = lcprune.collapse(model, text.calibration_batches(), target_depth=20)
    model, history = lcprune.distill(model, "my-model", text, history=history, steps=200)
    lcprune.export(model, "short", tokenizer="my-model", history=history)

`lcprune.plan`, `execute` and `collapse` are in merging/collapse.py. This module stands above all rooms.
"""

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch.nn import Parameter
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lcprune.data.module import TextDataModule
from lcprune.delivery.pictures import Scores
from lcprune.distillation.callbacks import ProgressiveCollapse
from lcprune.distillation.given import GivenModels
from lcprune.distillation.levels import Boundary, Level, Logits
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.optim import RewarmingCosine
from lcprune.distillation.teacher import cast
from lcprune.errors import InputError
from lcprune.files import path_of
from lcprune.merging.calibration import Batch, Calibration
from lcprune.merging.checks import check_kind, check_model, checked_batches
from lcprune.merging.collapse import remember
from lcprune.merging.criteria import (
    AngularDistance,
    BlockInfluence,
    Criterion,
    OutputSimilarity,
    TrialPerplexity,
    score_all,
)
from lcprune.merging.gradients import Magnitude, Taylor
from lcprune.merging.heatmaps import state_cosines, weight_distances
from lcprune.merging.lineage import HISTORY, MergeHistory
from lcprune.merging.within import calibration_perplexity
from lcprune.models import name_of

CRITERIA: tuple[Criterion, ...] = (
    BlockInfluence(),
    AngularDistance(),
    AngularDistance(span=2),
    OutputSimilarity(),
    TrialPerplexity(),
    Magnitude(),
    Taylor(),
)
"""Every criterion there is; the angle over two layers is CoMe's score of a pair."""


def score(
    model: PreTrainedModel, batches: Sequence[Batch], *, criteria: Sequence[Criterion] | Criterion = CRITERIA
) -> Scores:
    """How safe every layer is to lose; what `lcprune score` prints and draws. The model is left as it is.

    Args:
        model: A causal LM of a known family.
        batches: Calibration batches, `input_ids` [B, T] each.
        criteria: What to judge by, one or several; TrialPerplexity tries every layer out and takes longest.

    Returns:
        `criteria`: name -> one number a layer, in the layers' order, **lower = safer to merge**, each in its
        criterion's own unit (a span of two layers has one entry less, inf = not allowed); `cosines`: between the stream
        at every two boundaries; `weights`: L2 distances between neighbours.

    Raises:
        InputError: For a family that lcprune does not know, without batches, or where two criteria have one name.
    """
    criteria = tuple(criteria) if isinstance(criteria, Iterable) and not isinstance(criteria, str) else (criteria,)
    for criterion in criteria:
        check_kind("criteria", criterion, Criterion, "lcprune.BlockInfluence()")
    names = _names(criteria)
    check_model(model)
    calibration = Calibration(model, batches)
    tokens = calibration.stats(1, 2).tokens  # one pass for all criteria that look at the stream
    cosines = state_cosines(model, calibration.batches).tolist()
    distances = weight_distances(model)
    columns = score_all(criteria, calibration)
    return Scores(
        model=model.config.name_or_path or "",
        dtype=str(model.dtype).removeprefix("torch."),
        tokens=tokens,
        criteria=dict(zip(names, columns, strict=True)),
        weights=distances,
        cosines=tuple(map(tuple, cosines)),
    )


def perplexity(model: PreTrainedModel, text: TextDataModule | Iterable[Batch]) -> float:
    """Exp of the mean cross-entropy of the next token; what runs log as `val/perplexity`. The model is left as it is.

    Args:
        model: A causal LM of a known family.
        text: A data module, whose held-out blocks count; or batches, `input_ids` [B, T] each. Padding and labels of
            -100 are not scored.

    Raises:
        InputError: For a family that lcprune does not know, or where no token is scored.
    """
    if isinstance(text, TextDataModule):
        text.setup("validate")
        text = text.val_dataloader()
    check_model(model)
    return calibration_perplexity(Calibration(model, checked_batches(text)))


def distill(
    student: PreTrainedModel | str | Path,
    teacher: PreTrainedModel | str | Path,
    text: TextDataModule | str | Path,
    *,
    history: MergeHistory | None = None,
    collapse: ProgressiveCollapse | None = None,
    objective: list[Level] | Level | None = None,
    steps: int = 1000,
    learning_rate: float = 1e-4,
) -> tuple[PreTrainedModel, MergeHistory]:
    """Trains a student to do what its teacher does; may merge layers meanwhile.

    Everything trains, by AdamW, with a warm-up over the first tenth and a cosine; on one device, in bfloat16 autocast
    where it is a GPU. For other settings take `DistillationModule` and a Trainer of your own: this is those two.

    Args:
        student: A model in memory, trained in place; or a folder that lcprune wrote; or the teacher's own name.
        teacher: The original: a model in memory, which is not changed, or a hub name or folder.
        text: What to train on; a path is a file as TextDataModule reads it, with the teacher's tokenizer.
        history: How a student in memory came from the teacher, as `collapse` returns it; None = it has all its layers.
        collapse: Merges during training, such as ProgressiveCollapse(Evenly(20, merges=3, last=100)).
        objective: What is optimized; default: Logits and Boundary(0.5).
        steps: Optimizer steps, of `text.batch_size * text.block_size` tokens each.
        learning_rate: The peak.

    Returns:
        The student, on the CPU, in eval mode and in the dtype it was given in (float32 from a folder), and how it came
        from the teacher, the merges of this run included.

    Raises:
        InputError: If student, teacher and history do not fit each other, before anything is trained.
    """
    if steps < 1:
        raise InputError(f"steps={steps} must be 1 or more.")
    if collapse is not None and not isinstance(collapse, ProgressiveCollapse):
        raise InputError(f"collapse={collapse!r} is no ProgressiveCollapse: write ProgressiveCollapse({collapse!r}).")
    if isinstance(objective, Level):
        objective = [objective]
    unnamed = not isinstance(text, TextDataModule) or text.named_tokenizer is None
    if isinstance(teacher, PreTrainedModel) and not teacher.config.name_or_path and unnamed:
        raise InputError(
            "text is to be read with the tokenizer of a teacher that has no name: give TextDataModule(tokenizer=NAME, "
            "path=...) as text."
        )
    module = _module(student, teacher, history, _Learning(objective, steps, learning_rate))
    if not isinstance(text, TextDataModule):
        text = TextDataModule(tokenizer=module.teacher_name, path=path_of("text", text))
    dtype = student.dtype if isinstance(student, PreTrainedModel) else torch.float32
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        callbacks=[] if collapse is None else [collapse],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(module, datamodule=text)
    trained = module.student.to("cpu").eval()  # type: ignore[arg-type]
    cast(trained, dtype)
    remember(trained, module.history)
    return trained, module.history


def load_history(folder: str | Path) -> MergeHistory:
    """How an exported student came from its teacher: `history.lineage` says which teacher layers each layer was.

    Args:
        folder: What `lcprune collapse`, `fit` or `export` wrote (or a run's folder, with the student inside); or the
            JSON file itself, a plan too.

    Raises:
        InputError: There is no history in it, or the file is none.
    """
    place = path_of("folder", folder)
    found = [path for path in (place, place / HISTORY, place / "student" / HISTORY) if path.is_file()]
    if not found:
        raise InputError(
            f"folder={str(folder)!r} holds no {HISTORY}: name a folder that lcprune collapse, fit or export wrote, or "
            "the JSON file itself."
        )
    return MergeHistory.load(found[0])


@dataclass(frozen=True)
class _Learning:
    """How `distill` learns, as it was asked to."""

    given: list[Level] | None
    steps: int
    rate: float

    @property
    def objective(self) -> list[Level]:
        return [Logits(), Boundary(0.5)] if self.given is None else self.given

    def optimizer(self, parameters: Iterable[Parameter]) -> Optimizer:
        return torch.optim.AdamW(parameters, lr=self.rate, weight_decay=0.0, fused=True)

    def lr_scheduler(self, optimizer: Optimizer) -> RewarmingCosine:
        return RewarmingCosine(optimizer, warmup_steps=self.steps // 10, rewarm_steps=self.steps // 50)


def _module(
    student: PreTrainedModel | str | Path,
    teacher: PreTrainedModel | str | Path,
    history: MergeHistory | None,
    learning: _Learning,
) -> DistillationModule:
    if isinstance(student, PreTrainedModel):
        return GivenModels(
            student,
            teacher,
            history=history,
            objective=learning.objective,
            optimizer=learning.optimizer,
            lr_scheduler=learning.lr_scheduler,
        )
    if isinstance(teacher, PreTrainedModel):
        raise InputError(
            f"student={str(student)!r} is a name and the teacher a model in memory: give both as names, or load the "
            "student with AutoModelForCausalLM.from_pretrained."
        )
    if history is not None:
        raise InputError(f"student={str(student)!r} brings its own history: leave history out.")
    name, folder = name_of("teacher", teacher), path_of("student", student)
    return DistillationModule(
        teacher=name,
        student=None if name in (str(student), str(folder)) else folder,
        objective=learning.objective,
        optimizer=learning.optimizer,
        lr_scheduler=learning.lr_scheduler,
    )


def _names(criteria: Sequence[Criterion]) -> list[str]:
    """What each is called in the scores; raises InputError if two are called the same."""
    names = list(map(_name, criteria))
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(
            f"criteria: {names.count(twice)} of them are called {twice}, and scores are kept by name: give each once; "
            "one with settings of its own is a frozen dataclass that has them as fields."
        )
    return names


def _name(criterion: Criterion) -> str:
    """The class, and the arguments where they are not the defaults."""
    usual = not is_dataclass(criterion) or all(
        repr(getattr(criterion, field.name)) == repr(_default_of(field)) for field in fields(criterion)
    )
    return type(criterion).__name__ if usual else repr(criterion)


def _default_of(field: Field[object]) -> object:
    """What a field is without an argument; MISSING if it needs one."""
    return field.default if field.default_factory is MISSING else field.default_factory()
