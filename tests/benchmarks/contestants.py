"""One way of distilling in a process of its own: `python contestants.py NAME '{"teacher": ..., ...}'`; see peers.py.

    ours, ours_after_merge     lcprune in Lightning's Trainer: Logits; everything, or all from the first merge on
    trl_gkd                    trl's GKDTrainer with lmbda=0, which makes it learn from the text that it is given
    trl_distillation           trl's DistillationTrainer; it knows no text but the student's own, so the batch stands
                               in for what it would generate, at no cost: its chunked loss is the leanest of them
    modelopt                   nvidia-modelopt's KDTrainer for Hugging Face models
    optipfair                  optipfair's distill_model with its logits term alone

Each trains the same student with the same loss (a KL of the logits at temperature 1), AdamW (fused, but for optipfair's
own loop, which knows one only), gradients clipped to norm 1, float32 weights, and with bfloat16 in autocast beside a
bfloat16 teacher. A step is timed from one optimizer step to the next. The last line printed is one JSON object.
"""

import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.memory import resident

MB = 2**20


@dataclass(frozen=True)
class Work:
    """What all do alike; plain data, to be handed to a process."""

    teacher: str
    """Folder."""
    student: str
    """Folder of the merged student."""
    groups: list[list[int]]
    """The teacher's layers that were merged."""
    batch_size: int = 2
    block_size: int = 256
    steps: int = 5
    """That are timed, after `warmup` that are not."""
    warmup: int = 2
    device: str = "cpu"
    dtype: str = "bfloat16"
    activations: str = "keep"

    @property
    def total(self) -> int:
        """Optimizer steps."""
        return self.warmup + self.steps

    @property
    def half(self) -> bool:
        """Whether in bfloat16."""
        return self.dtype == "bfloat16"

    @property
    def recompute(self) -> bool:
        """Whether gradient checkpointing is on."""
        return self.activations == "recompute"

    def argument(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    def load(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Student and teacher, for those who want them loaded."""
        student = AutoModelForCausalLM.from_pretrained(self.student, dtype=torch.float32).to(self.device)
        dtype = torch.bfloat16 if self.half else torch.float32
        teacher = AutoModelForCausalLM.from_pretrained(self.teacher, dtype=dtype).to(self.device)
        return student.train(), teacher.eval().requires_grad_(False)


class Text(Dataset[dict[str, Tensor]]):
    """Random blocks, one batch per step, the same for all."""

    def __init__(self, work: Work) -> None:
        vocabulary = json.loads((Path(work.teacher) / "config.json").read_text())["vocab_size"]
        chance = torch.Generator().manual_seed(0)
        shape = (work.total * work.batch_size, work.block_size)
        self.blocks = torch.randint(2, vocabulary, shape, generator=chance)  # 0 and 1 are padding and end

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index]
        return {"input_ids": block, "attention_mask": torch.ones_like(block), "labels": block.clone()}


class Meter:
    """Seconds between optimizer steps, and memory beyond what the process held before it had a model."""

    def __init__(self, work: Work) -> None:
        self.work, self.marks = work, list[float]()
        self.held = 0 if work.device == "cuda" else resident("VmRSS")

    def start(self) -> None:
        """Training begins: what loading needed does not count."""
        if self.work.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):  # a kernel that cannot forget its peak leaves that of loading in
            Path("/proc/self/clear_refs").write_text("5")

    def mark(self) -> None:
        """An optimizer step is done."""
        if self.work.device == "cuda":
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def figures(self) -> dict[str, float]:
        """Median seconds of a step, and the peak in MB."""
        peak = torch.cuda.max_memory_allocated() if self.work.device == "cuda" else resident("VmHWM")
        steps = [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]
        return {
            "seconds": statistics.median(steps[-self.work.steps :]),
            "memory_mb": (peak - self.held) / MB,
            "steps": len(self.marks),
        }


def tokenizer() -> PreTrainedTokenizerFast:
    """Trainers ask for one; nothing is ever tokenized."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


# -- ours --------------------------------------------------------------------------------------------------------------


def ours(work: Work, train: str = "all") -> dict[str, float]:
    """lcprune, merged at step 0 of a fit."""
    from functools import partial

    from lightning.pytorch import Callback, LightningDataModule, Trainer

    from lcprune import AtSteps, DistillationModule, Drop, FixedPlan, Logits, ProgressiveCollapse
    from lcprune.distillation.objectives import with_scored

    meter = Meter(work)

    class Timing(Callback):
        def on_train_start(self, *_: object) -> None:
            meter.start()

        def on_train_batch_end(self, *_: object) -> None:
            meter.mark()

    class Blocks(LightningDataModule):
        def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
            return DataLoader(
                Text(work), work.batch_size, num_workers=0, collate_fn=lambda rows: with_scored(collated(rows))
            )

        def val_dataloader(self) -> list[dict[str, Tensor]]:
            return []

        def calibration_batches(self) -> list[dict[str, Tensor]]:
            return [next(iter(self.train_dataloader()))]

    module = DistillationModule(
        teacher=work.teacher,
        objective=[Logits()],
        train=train,  # type: ignore[arg-type]
        teacher_dtype=work.dtype,  # type: ignore[arg-type]
        optimizer=partial(torch.optim.AdamW, lr=1e-5, fused=True),
        activations=work.activations,  # type: ignore[arg-type]
    )
    depth = json.loads((Path(work.student) / "config.json").read_text())["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder,
            accelerator="gpu" if work.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if work.half else "32-true",
            max_steps=work.total,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                ProgressiveCollapse(AtSteps({0: depth}), planner=FixedPlan(work.groups), operator=Drop()),
                Timing(),
            ],
        )
        trainer.fit(module, datamodule=Blocks())
    return meter.figures()


# -- what users would take instead -------------------------------------------------------------------------------------


def settings(work: Work, folder: str) -> dict[str, Any]:
    """Of Hugging Face's Trainer, in the words of TrainingArguments."""
    return {
        "output_dir": folder,
        "max_steps": work.total,
        "per_device_train_batch_size": work.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": work.recompute,
        "learning_rate": 1e-5,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "bf16": work.half,
        "use_cpu": work.device == "cpu",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


def timed(meter: Meter) -> Any:
    """A callback of Hugging Face's Trainer."""
    from transformers import TrainerCallback

    class Timing(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            meter.start()

        def on_step_end(self, *_: object, **__: object) -> None:
            meter.mark()

    return Timing()


def collated(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of rows, tensors or lists."""
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def _fitted(meter: Meter, make: Callable[[str], Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        make(folder).train()
    return meter.figures()


def trl_gkd(work: Work) -> dict[str, float]:
    """Forward KL over full logits."""
    from datasets import Dataset as Table
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    meter = Meter(work)
    student, teacher = work.load()

    def make(folder: str) -> GKDTrainer:
        text = {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, "max_length": work.block_size, "disable_dropout": False}
        return GKDTrainer(
            student,
            teacher,
            args=GKDConfig(**settings(work, folder), **text),
            data_collator=collated,
            train_dataset=Table.from_list([{k: v.tolist() for k, v in row.items()} for row in _rows(work)]),
            processing_class=tokenizer(),
            callbacks=[timed(meter)],
        )

    return _fitted(meter, make)


def trl_distillation(work: Work) -> dict[str, float]:
    """Forward KL over chunks of logits."""
    from datasets import Dataset as Table
    from trl import DistillationConfig, DistillationTrainer

    class OnText(DistillationTrainer):
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            blocks = torch.tensor([row["input_ids"] for row in inputs], device=self.accelerator.device)
            ones = torch.ones_like(blocks)
            return {
                "prompt_ids": blocks[:, :1],
                "prompt_mask": ones[:, :1],
                "completion_ids": blocks[:, 1:],
                "completion_mask": ones[:, 1:],
                "num_items_in_batch": ones[:, 1:].sum(),
            }

    meter = Meter(work)
    student, teacher = work.load()

    def make(folder: str) -> OnText:
        text = {"beta": 0.0, "temperature": 1.0, "max_completion_length": work.block_size}
        return OnText(
            student,
            teacher,
            args=DistillationConfig(**settings(work, folder), **text),
            train_dataset=Table.from_list([{"prompt": "", "input_ids": r["input_ids"].tolist()} for r in _rows(work)]),
            processing_class=tokenizer(),
            callbacks=[timed(meter)],
        )

    return _fitted(meter, make)


def modelopt(work: Work) -> dict[str, float]:
    """Forward KL over full logits in float32."""
    from modelopt.torch.distill.plugins.huggingface import KDTrainer
    from transformers import TrainingArguments

    meter = Meter(work)
    student, teacher = work.load()

    def make(folder: str) -> KDTrainer:
        return KDTrainer(
            model=student,
            args=TrainingArguments(**settings(work, folder)),
            data_collator=collated,
            train_dataset=Text(work),
            callbacks=[timed(meter)],
            distill_args={"distill": True, "teacher_model": teacher, "temperature": 1.0},
        )

    return _fitted(meter, make)


def optipfair(work: Work) -> dict[str, float]:
    """Skewed KL, with a skew of 0, over full logits; its cross-entropy is computed and weighs nothing."""
    from optipfair.distillation import distill_model

    meter = Meter(work)
    student, teacher = work.load()
    if work.recompute:
        student.gradient_checkpointing_enable({"use_reentrant": False})

    class Marking(DataLoader[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
            meter.start()
            for number, batch in enumerate(super().__iter__()):
                if number:
                    meter.mark()
                yield batch
            meter.mark()

    weights = {"alpha": 0.0, "beta": 1.0, "gamma": 0.0, "delta": 0.0, "temperature": 1.0, "skew_alpha": 0.0}
    loop = {"epochs": 1, "learning_rate": 1e-5, "scheduler": "none", "accumulation_steps": 1, "show_progress": False}
    with torch.autocast(work.device, torch.bfloat16, enabled=work.half):
        distill_model(student, teacher, Marking(Text(work), work.batch_size), **weights, **loop)
    return meter.figures()


def _rows(work: Work) -> list[dict[str, Tensor]]:
    text = Text(work)
    return [text[index] for index in range(len(text))]


CONTESTANTS: dict[str, Callable[[Work], dict[str, float]]] = {
    "ours": ours,
    "ours_after_merge": lambda work: ours(work, "after_merge"),
    "trl_gkd": trl_gkd,
    "trl_distillation": trl_distillation,
    "modelopt": modelopt,
    "optipfair": optipfair,
}
MODULES = {"ours": ("lightning.pytorch", "lcprune.distillation.callbacks"), "trl": ("trl", "datasets")}
"""Loaded before memory is measured, so that libraries do not count."""


def main() -> None:
    """Runs one."""
    name, argument = sys.argv[1:]
    work = Work(**json.loads(argument))
    for module in MODULES.get(name.split("_")[0], (name,)):
        importlib.import_module(module)
    torch.manual_seed(0)
    print(json.dumps(CONTESTANTS[name](work)))


if __name__ == "__main__":
    main()
