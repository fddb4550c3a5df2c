"""What can be known to fail before any weight is loaded, from the settings of a run alone."""

import platform
import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import PretrainedConfig

from lcprune.distillation.levels import Labels, Logits
from lcprune.distillation.phases import Phase
from lcprune.distillation.strategies import is_ddp, is_sharding, is_tensor_parallel
from lcprune.distillation.teacher import DtypeName
from lcprune.distillation.trained import Trained, trained_layers, trains_adapters
from lcprune.errors import InputError
from lcprune.merging.calibration import Batch
from lcprune.merging.checks import checked_batches
from lcprune.merging.lineage import Lineage
from lcprune.merging.packed import UNPACKABLE, check_packable


def try_out(make_optimizer: OptimizerCallable, make_scheduler: LRSchedulerCallable | None) -> Optimizer:
    """Makes optimizer and scheduler for a Parameter that nobody needs, so that their own mistakes show.

    Args:
        make_optimizer: From Parameters.
        make_scheduler: From the optimizer; None = there is none.

    Returns:
        The optimizer.

    Raises:
        InputError: If one of them cannot be made or stepped, or the scheduler does not follow the optimizer's steps.
    """
    try:
        optimizer = make_optimizer(iter([Parameter(torch.zeros(1))]))
        if make_scheduler is not None:
            _step(make_scheduler(optimizer))
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError) as error:
        name = "model.optimizer or model.lr_scheduler" if make_scheduler else "model.optimizer"
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"{name} cannot be made as it is set ({reason}): correct its init_args.") from error
    return optimizer


def _step(scheduler: LRScheduler | ReduceLROnPlateau) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise InputError(
            "model.lr_scheduler=ReduceLROnPlateau follows a figure, and schedulers are stepped after every optimizer "
            "step here: take RewarmingCosine, RewarmingWSD or one of torch's that follow the step."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer has not been stepped before
        scheduler.step()


@runtime_checkable
class CalibrationSource(Protocol):
    """A data module that can hand out text to plan merges by."""

    def calibration_batches(self) -> Sequence[Batch]:
        """Batches of training text, the same at every call."""


def calibration_text(source: CalibrationSource) -> tuple[Batch, ...]:
    """All batches that it hands out, to be walked through more than once.

    Raises:
        InputError: There is none, or one is no batch.
    """
    given, whose = source.calibration_batches(), f"calibration_batches() of {type(source).__name__}"
    try:
        batches = checked_batches(given)
    except InputError as error:
        raise InputError(f"{whose}: {error}") from error
    if not batches:
        raise InputError(
            f"{whose} hands out no batches, and merges are planned by text: let it return one or more, the same at "
            "every call."
        )
    return batches


def check_documents(config: PretrainedConfig, source: object) -> None:
    """Documents that share a block need a model whose attention keeps them apart.

    Args:
        config: The teacher's.
        source: The trainer's data module.

    Raises:
        InputError: If the model's does not.
    """
    if config.model_type in UNPACKABLE and isinstance(source, CalibrationSource):
        for batch in calibration_text(source):
            if "position_ids" in batch:
                check_packable(config, len(batch["input_ids"]))


def check_strategy(strategy: Strategy, phases: Sequence[Phase], usually: Trained) -> None:
    """Plain DDP waits for the gradient of every trained Parameter, and only a loss on the logits reaches all.

    Args:
        strategy: The trainer's; others than DDP do not wait.
        phases: Of the run.
        usually: What is trained where a phase does not say.

    Raises:
        InputError: If a phase would leave it waiting.
    """
    if not is_ddp(strategy):
        return
    assert isinstance(strategy, DDPStrategy)
    if strategy._ddp_kwargs.get("find_unused_parameters"):
        return
    for phase in phases:
        on_head = any(isinstance(level, Logits | Labels) for level in phase.objective)
        if not on_head and phase.trained(usually) not in ("merged", "lora_merged"):
            raise InputError(
                f"model: objective {[type(level).__name__ for level in phase.objective]} reaches no layer behind the "
                "last merged one, for whose gradients trainer.strategy=ddp would wait: add Logits, set train: merged, "
                "or use strategy ddp_find_unused_parameters_true."
            )


def check_precision(precision: str, dtype: DtypeName, phases: Sequence[Phase], usually: Trained) -> None:
    """The trainer's precision and the type of the student's weights go together.

    Args:
        precision: The trainer's.
        dtype: As model.dtype.
        phases: Of the run.
        usually: What is trained where a phase does not say.

    Raises:
        InputError: They do not.
    """
    adapters_alone = all(trains_adapters(phase.trained(usually)) for phase in phases)  # which are float32
    if precision == "16-mixed" and dtype != "float32" and not adapters_alone:
        raise InputError(
            f"model.dtype={dtype} with trainer.precision=16-mixed: gradients of {dtype} weights cannot be unscaled; "
            "set model.dtype: float32, which precision computes with in float16."
        )


def check_merges(precision: str) -> None:
    """Raises InputError for a trainer's precision in which layers cannot merge during training."""
    if precision == "64-true":
        raise InputError(
            "trainer.precision=64-true: merges and refits keep a student's weights in float32 or less; use 32-true."
        )


def check_sharding(strategy: Strategy, precision: str, phases: Sequence[Phase], others: Mapping[str, bool]) -> None:
    """Under FSDP2 only what reaches every layer by a call of the whole model is known to work.

    Args:
        strategy: The trainer's; any but FSDP2's passes.
        precision: The trainer's.
        phases: Of the run.
        others: Settings that nothing is known to work with there -> whether they are on.

    Raises:
        InputError: Naming all that does not go together.
    """
    if not is_sharding(strategy):
        return
    wrong = [setting for setting, is_on in others.items() if is_on]
    if is_tensor_parallel(strategy):
        wrong.append("a tensor_parallel_size other than 1 (auto cuts layers along their heads within a machine)")
    if precision not in ("32-true", "bf16-mixed"):
        wrong.append(f"trainer.precision={precision} (32-true and bf16-mixed work)")
    for level in dict.fromkeys(type(level).__name__ for phase in phases for level in phase.objective):
        if level == "Local":
            wrong.append("the level Local, which calls single layers")
    if any(not any(isinstance(level, Logits) for level in phase.objective) for phase in phases):
        wrong.append("an objective without Logits, which ends in the middle of the model")
    if wrong:
        raise InputError(
            f"trainer.strategy=ModelParallelStrategy cuts student and teacher into shards and does not work with "
            f"{', nor with '.join(wrong)}: change that, or use strategy ddp."
        )


def check_trains(phases: Sequence[Phase], usually: Trained, lineage: Lineage, first_merge: float) -> None:
    """Every phase before the first merge of a run has something to train.

    Args:
        phases: Of the run.
        usually: What is trained where a phase does not say.
        lineage: With which it begins.
        first_merge: Its optimizer step; infinite = there is none.

    Raises:
        InputError: If one has not.
    """
    step = 0
    for phase in phases:
        what = phase.trained(usually)
        if step < first_merge and not trained_layers(what, lineage):
            raise _nothing_yet(what, f", from step {step} on")
        step += phase.steps or 0


def check_trained(what: Trained, lineage: Lineage, refused: Sequence[int]) -> None:
    """A phase that is on has something to train.

    Args:
        what: Its setting.
        lineage: The student's.
        refused: Optimizer steps of merges that were undone.

    Raises:
        InputError: If it has not.
    """
    if trained_layers(what, lineage):
        return
    if refused:
        raise InputError(
            f"train={what} has nothing to train, because the merge at step {', '.join(map(str, refused))} is undone: "
            "raise collapse.max_perplexity_jump, merge more gently (collapse.refit, fewer layers at a time), or train "
            "all or layers."
        )
    raise _nothing_yet(what)


def _nothing_yet(what: Trained, since: str = "") -> InputError:
    return InputError(
        f"train={what} trains nothing before the first merge{since}: merge at step 0 (collapse.schedule.first: 0), or "
        "train all or layers until then."
    )


def warn_of_phases(phases: Sequence[Phase], begun: int, end: float) -> None:
    """Says so where the last phase, which a run is for, never begins.

    Args:
        phases: Of the run.
        begun: The optimizer step at which they begin for the last time.
        end: Optimizer steps of the run.
    """
    last = begun + sum(phase.steps or 0 for phase in phases[:-1])
    if len(phases) > 1 and last >= end:
        rank_zero_warn(
            f"phases: the last one begins at step {last}, and the run ends after {end:.0f}: it is never trained; "
            "shorten the phases before it, or train longer"
        )


def warn_of_tokens(last: int, read: int, steps: float) -> None:
    """Says, after the first optimizer step, where a merge by tokens is not reached before the last step.

    Args:
        last: Tokens at the last merge.
        read: Tokens of the first step.
        steps: Optimizer steps of the run.
    """
    if read * steps <= last:
        rank_zero_warn(
            f"collapse.schedule: this run reads about {read * steps:.0f} tokens ({read} a step), and the last merge is "
            f"due at token {last}: merge earlier, or train longer"
        )


def say_if_slow(device: torch.device, setting: str, instead: str) -> None:
    """Says so where products in bfloat16 have no instructions of their own: they take several times as long.

    Args:
        device: Where they are computed.
        setting: What asks for bfloat16, as the user would write it.
        instead: What to write for float32.
    """
    if device.type == "cpu" and _lacks_bfloat16():
        rank_zero_info(
            f"{setting}: this CPU has no instructions for bfloat16 and takes several times as long as in float32: "
            f"{instead} is faster here"
        )


def _lacks_bfloat16() -> bool:
    """Whether this is an x86 CPU without instructions for bfloat16 (AVX512_BF16; one with AMX has these, too)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False  # torch does not tell
    is_supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if is_supported is None:  # an older torch: of CPUs with AVX512, some have them
        return torch.backends.cpu.get_cpu_capability() != "AVX512"
    return not is_supported()
