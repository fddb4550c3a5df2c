"""A LightningModule of the user's own whose model ProgressiveCollapse shortens.

    class Mine(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained("my-model")

What the callback asks of such a module are plain attributes, read and kept by `Guest`:

    student    the causal LM that becomes shorter; without that attribute the module's only PreTrainedModel
    history    MergeHistory, kept by the callback; set it beforehand for a model that was shortened before

What is learned, by what, and which Parameters are trained stays the module's own business. There is no teacher: a
planner compares with, and a refit aims at, the model as it stands before the merge.
"""

from functools import partial
from typing import TypeAlias

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from transformers import PretrainedConfig, PreTrainedModel

from lcprune.distillation.beginning import Reference
from lcprune.distillation.boundary import StepBoundary
from lcprune.distillation.checkpoint import KEY, Record
from lcprune.distillation.fingerprint import Fingerprint, fingerprint_of
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.phases import Begin, Phase
from lcprune.distillation.randomness import restore_rng_state, rng_state, states_of_ranks
from lcprune.distillation.standing import Standing
from lcprune.distillation.teacher import DTYPES, DtypeName
from lcprune.distillation.trained import Trained
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.architectures import layout_of
from lcprune.merging.lineage import Lineage, MergeHistory

STUDENT, HISTORY = "student", "history"
"""Attributes of a user's module: its model, and how it came to be."""
RANDOMNESS, STANDING, BOUNDARY = "_lcprune_rng", "_lcprune_standing", "_lcprune_boundary"
"""Attributes that are ours: the random state that a resumed run begins with, where the run stands, and whether its
weights are just being changed."""


class Guest:
    """A user's module as ProgressiveCollapse needs it; keeps nothing itself.

    Args:
        module: With a causal LM of a known family, see the first lines of this file.

    Raises:
        InputError: The module has no Hugging Face model, or several and none called `student`.
    """

    phases: tuple[Phase, ...] = ()
    """None are known: the objective is the module's own."""
    phases_begin: Begin = "run"
    """As without phases."""
    train_usually: Trained = "all"
    """What it says itself counts, Parameter by Parameter."""
    original: PreTrainedModel | None = None
    """There is no teacher."""

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        self.next_merge: int | None = None
        models = {name: child for name, child in module.named_children() if isinstance(child, PreTrainedModel)}
        if STUDENT not in models and len(models) != 1:
            found = f"several ({', '.join(models)})" if models else "none among its attributes"
            raise InputError(
                f"ProgressiveCollapse shortens the Hugging Face model of a {type(module).__name__}, which has {found}: "
                f"give it one PreTrainedModel, or call the one that is to become shorter `{STUDENT}`."
            )
        self.name = STUDENT if STUDENT in models else next(iter(models))
        self.student = models[self.name]

    @property
    def history(self) -> MergeHistory:
        """How the student came from the model that training, or an earlier run, began with."""
        history = vars(self.module).get(HISTORY)
        if history is None:
            depth = len(layout_of(self.student.config).layers_of(self.student))
            self.history = history = MergeHistory(depth, teacher=self.student.config.name_or_path or "")
        if not isinstance(history, MergeHistory):
            raise InputError(
                f"{type(self.module).__name__}.{HISTORY} is a {type(history).__name__}, ProgressiveCollapse keeps the "
                "merges there as a MergeHistory: give yours another name."
            )
        return history

    @history.setter
    def history(self, history: MergeHistory) -> None:
        vars(self.module)[HISTORY] = history

    @property
    def standing(self) -> Standing:
        """Where the run stands; kept by the callback."""
        standing = vars(self.module).setdefault(STANDING, Standing())
        assert isinstance(standing, Standing)
        return standing

    @standing.setter
    def standing(self, standing: Standing) -> None:
        vars(self.module)[STANDING] = standing

    @property
    def boundary(self) -> StepBoundary:
        """Whether layers are merging right now: then there is nothing to save."""
        boundary = vars(self.module).setdefault(BOUNDARY, StepBoundary())
        assert isinstance(boundary, StepBoundary)
        return boundary

    @property
    def begun(self) -> MergeHistory:
        """The history without this run's merges."""
        history = self.history
        before = tuple(step for step in history.steps if step.global_step is None)
        return MergeHistory(history.teacher_depth, before, history.teacher)

    @property
    def teacher_config(self) -> PretrainedConfig:
        """Of the model's family."""
        return self.student.config

    def check_optimizer(self) -> None:
        """Nothing: a user's optimizer is made by the module, and looked at when training starts."""

    def check_cache(self, lineages: list[Lineage] | None) -> None:
        """Nothing: there is no teacher whose answers could be missing."""

    def choose_trained(self) -> None:
        """Nothing: merged Parameters stay as trainable as they were."""

    def reference(self) -> Reference:
        """The student as it stands, which the same student is repaired towards once it has merged."""
        view = surgery.second_view(self.student)
        return Reference(view, MergeHistory(len(layout_of(view.config).layers_of(view))))

    @property
    def resumes(self) -> bool:
        """Whether a checkpoint has been loaded and training has not gone on from it yet."""
        return RANDOMNESS in vars(self.module)

    def begin_anew(self) -> None:
        """Makes merges that another run has made those of before this one."""
        self.history = self.history.of_before()

    def continue_randomness(self) -> None:
        """Goes on with the random numbers of an interrupted run."""
        if (state := vars(self.module).pop(RANDOMNESS, None)) is not None:
            restore_rng_state(state)

    @property
    def fingerprint(self) -> Fingerprint:
        """What a checkpoint must have in common with the model that training began with."""
        return fingerprint_of(self.student.config) | {"num_hidden_layers": self.history.teacher_depth}

    @property
    def record(self) -> Record:
        """What a checkpoint has to say beside the weights."""
        name = str(self.student.dtype).removeprefix("torch.")
        dtype: DtypeName = next((known for known in DTYPES if known == name), "float32")
        states, standing = states_of_ranks(rng_state()), self.standing.to_dict()
        return Record(self.history, self.fingerprint, dtype, states, standing=standing, prefix=f"{self.name}.")

    def restore(self, record: Record) -> None:
        """Gives the student the structure that a checkpoint's weights have.

        Raises:
            InputError: If it was written from another model, or this one has merged otherwise.
        """
        record.check_fits(self.history.teacher, self.fingerprint)
        rest = record.history.after(self.history)
        if rest is None:
            raise InputError(
                f"The model of this {type(self.module).__name__} was merged otherwise than the checkpoint's: load it "
                "into a new module, with the model that the checkpoint's run began with."
            )
        surgery.replay(self.student, rest)
        self.history, self.standing = record.history, Standing.of(record.standing)
        rank = self.module.global_rank
        vars(self.module)[RANDOMNESS] = record.rng[rank if rank < len(record.rng) else 0]


Shortened: TypeAlias = DistillationModule | Guest
"""What ProgressiveCollapse merges layers of."""


def model_comes_later(module: LightningModule) -> bool:
    """Whether a user's module makes its model in `configure_model`, after callbacks are set up."""
    return not isinstance(module, DistillationModule) and is_overridden("configure_model", module)


def welcome(module: LightningModule) -> None:
    """Makes a user's module tell its checkpoints how deep it is, and take their word for it; once is enough.

    Callbacks are asked only after the weights were read, and not at all for weights-only checkpoints.
    """
    if not isinstance(module, DistillationModule):
        module.on_save_checkpoint = partial(_save, module)  # type: ignore[method-assign]
        module.on_load_checkpoint = partial(_load, module)  # type: ignore[method-assign]


def _save(module: LightningModule, checkpoint: dict[str, object]) -> None:
    type(module).on_save_checkpoint(module, checkpoint)
    guest = Guest(module)
    guest.boundary.rewind(checkpoint, module.trainer.global_step)
    checkpoint[KEY] = guest.record.to_dict()


def _load(module: LightningModule, checkpoint: dict[str, object]) -> None:
    if KEY in checkpoint:  # else it was written before there was anything to merge
        Guest(module).restore(Record.of(checkpoint))
    type(module).on_load_checkpoint(module, checkpoint)
