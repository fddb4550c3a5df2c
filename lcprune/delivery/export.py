"""A student becomes a Hugging Face folder that needs nothing of ours, proved by reloading it.

    .student.tmp-4711/   weights, config, tokenizer, history.json, recipe.yaml, README.md, SHA256SUMS
          |  reloaded with plain transformers: same weights bit for bit, same logits, depth as the history says
          v
    student/             renamed into place; an earlier export leaves only now

Whatever fails or is killed before the rename leaves `out` as it was.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lcprune.delivery.card import model_card
from lcprune.delivery.inherited import SENTENCEPIECE, TERMS, inherit, teacher_folder
from lcprune.delivery.spellings import respell_config, respell_tokenizer
from lcprune.errors import DiskError, InputError, RunError
from lcprune.files import PARTIAL, check_place, left_behind
from lcprune.identity import CHECKSUMS, write_checksums
from lcprune.merging.calibration import evaluating
from lcprune.merging.lineage import HISTORY, MergeHistory
from lcprune.merging.shards import SHARD_BYTES, ShardWriter
from lcprune.merging.streaming import stored_tensors
from lcprune.models import License, load_tokenizer, name_of
from lcprune.weights import size_of

RECIPE = "recipe.yaml"
FILES = (
    *(HISTORY, RECIPE, CHECKSUMS, "README.md", "config.json", "generation_config.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *(SENTENCEPIECE, "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("evaluation.json", "report.html", "report-*.svg", "report-*.png"),
    *TERMS,
)
"""What `export`, `evaluate` and `report` write into a student's folder, as patterns; any other is the user's."""
FOLDERS = ("additional_chat_templates",)
"""The same of folders."""
REPLACED = ".old-"
"""Between the hidden name of an earlier export and the number of the process that puts another in its place."""
PROOF_SHAPE = (2, 32)
"""Batch and length of the token ids on which student and reloaded folder must agree."""
TOLERANCE_IN_ULPS = 8
"""How far logits may differ, in units of the dtype's precision at the largest logit.

The weights are compared bit for bit, so the logits only have to prove what is not a weight: config, rotary frequencies,
tied head, masks. Plain kernels repeat exactly (measured on CPU: 0); a compiled layer or another attention kernel in the
student rounds differently, by a few of these units, while any wrong setting moves logits by their own size.
"""


def export(
    student: PreTrainedModel,
    out: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path,
    history: MergeHistory,
    recipe: str | None = None,
    figures: Mapping[str, float] | None = None,
    license: License | str | None = None,
) -> Path:
    """Writes `student` as a Hugging Face folder, proves it by reloading, and only then puts it at `out`.

    The proof loads one more copy of the model on the student's device. Its mode, device and gradients stay.

    Args:
        student: The shortened model, whole and unwrapped, its config mended.
        out: The folder to make; an empty folder or an earlier export is replaced.
        tokenizer: The teacher's tokenizer, or the teacher's name.
        history: The merges that led to the student.
        recipe: Text of the resolved recipe, kept as recipe.yaml.
        figures: Measurements for the model card, by metric name.
        license: The base model's licence, or its name as the hub spells it; None when it is not known.

    Returns:
        The absolute path of the folder.

    Raises:
        InputError: `out` is something that an export must not replace.
        DiskError: The disk is full or may not be written; nothing was left behind.
        RunError: The folder does not give the student back; nothing was left behind.
    """
    _check_depth(student, history, "The student")
    _check_plain(student)
    out = Path(out).expanduser()
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(name_of("tokenizer", tokenizer))
    with _replacing(out) as folder:
        student.save_pretrained(folder)
        _complete(folder, tokenizer)
        _write_account(folder, student, history, recipe=recipe, figures=figures or {}, license=license)
        _prove(student, folder, history)
        write_checksums(folder)
    return out.resolve()


def export_stream(
    student: PreTrainedModel,
    tensors: Iterable[tuple[str, Iterable[Tensor]]],
    out: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    history: MergeHistory,
    recipe: str | None = None,
    license: License | str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """`export` for a student that is not in memory: every tensor is written as it comes.

    The proof reads every file again: names, shapes, dtypes and bytes must be those that were written, and the names
    those of the student's structure. No logits are computed, for that would take the whole model.

    Args:
        student: The shortened model's structure, config mended; its parameters say shape and dtype only.
        tensors: Every parameter by name, once, in one piece or several.
        out: As for `export`, like the others.
        tokenizer: The teacher's tokenizer.
        history: The merges that led to the student.
        recipe: Text of the resolved recipe.
        license: The base model's licence.
        shard_bytes: Most bytes of one file of weights.

    Returns:
        The absolute path of the folder.

    Raises:
        InputError: As for `export`, like the others.
        DiskError: The disk is full or may not be written; nothing was left behind.
        RunError: What was written is not what is read; nothing was left behind.
    """
    _check_depth(student, history, "The student")
    with _replacing(out) as folder:
        writer = ShardWriter(folder, stored_tensors(student), shard_bytes)
        for name, pieces in tensors:
            writer.write(name, pieces)
        student.config.architectures = [type(student).__name__]
        student.config.save_pretrained(folder)
        if student.generation_config is not None:
            student.generation_config.save_pretrained(folder)
        _complete(folder, tokenizer)
        _write_account(folder, student, history, recipe=recipe, figures={}, license=license)
        writer.verify()
        write_checksums(folder)
    return out.resolve()


def _complete(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """What goes with weights and config."""
    _save_tokenizer(tokenizer, folder)
    inherit(folder, tokenizer)
    respell_config(folder)
    respell_tokenizer(folder, teacher_folder(tokenizer))


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # The tokenizers library has no class of its own for what the disk refuses: "No space left ... (os error 28)".
        if type(error) is not Exception or "os error" not in str(error):
            raise
        raise OSError(str(error)) from error


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder, put at `out` when the block ends well; else nothing has happened."""
    check_target(out)
    out = out.resolve()
    folder = _beside(out, PARTIAL)
    try:
        for left in (folder, *left_behind(out.parent, out.name)):  # a killed process may have had our number
            shutil.rmtree(left, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        _put_in_place(folder, out)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_target(out: Path, sources: Mapping[str, Iterable[str | Path]] | None = None) -> None:
    """Raises InputError unless an export may be written to `out`; to be called before any weight is loaded.

    Args:
        out: The folder.
        sources: What the student is made of, by the setting that names it: models' names and paths. One of them may lie
            in an earlier export, or be one, and must not be replaced.
    """
    out = out.resolve()
    for setting, names in (sources or {}).items():
        if (lost := _inside(out, names)) is not None:
            raise InputError(
                f"out={out} holds {setting}={lost}, which stays as it is: name another folder for the student."
            )
    if out.exists() and (objection := _objection(out)):
        raise InputError(f"out={out} exists and {objection}: name a new folder, or move that one away.")
    check_place(f"out={out}", out)


def _inside(out: Path, names: Iterable[str | Path]) -> str | Path | None:
    """The first of these that is `out` or lies below it."""
    places = ((name, Path(name).expanduser().resolve()) for name in names)
    return next((name for name, place in places if place.exists() and out in (place, *place.parents)), None)


def _objection(out: Path) -> str:
    """Why no export may take the place of this, to be put behind its name; empty = one may."""
    found = sorted(out.iterdir()) if out.is_dir() else []
    if out.is_dir() and not found:
        return ""
    # A run folder holds a history too, but no config.json: it must survive a slip of the hand.
    if not all((out / name).is_file() for name in (HISTORY, "config.json")):
        holding = f"those hold {HISTORY} and config.json"
        return f"is neither an empty folder nor an earlier export of lcprune ({holding})"
    alien = next((path for path in found if not _is_written(path)), None)
    return "" if alien is None else f"holds {alien.name}, which no export has written and which would be lost"


def _is_written(path: Path) -> bool:
    return path.is_dir() == (path.name in FOLDERS) and any(path.match(pattern) for pattern in (*FILES, *FOLDERS))


def _beside(out: Path, mark: str) -> Path:
    """A hidden sibling of `out`: the same disk, so that a rename is one indivisible act."""
    return out.with_name(f".{out.name}{mark}{os.getpid()}")


def _write_account(
    folder: Path,
    student: PreTrainedModel,
    history: MergeHistory,
    *,
    recipe: str | None,
    figures: Mapping[str, float],
    license: License | str | None,
) -> None:
    counted = {"layers": history.depth, "parameters": student.num_parameters(), "bytes on disk": size_of(folder)}
    card = model_card(history, figures={**counted, **figures}, license=license, recipe=recipe)
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / HISTORY).write_text(history.sealed(), encoding="utf-8")
    if recipe is not None:
        (folder / RECIPE).write_text(recipe, encoding="utf-8")


def _check_depth(model: PreTrainedModel, history: MergeHistory, what: str) -> None:
    depth = model.config.get_text_config().num_hidden_layers
    if depth != history.depth:
        raise RunError(f"{what} has num_hidden_layers={depth}, its history ends at {history.depth}: not exported.")


def _check_plain(student: PreTrainedModel) -> None:
    inner = next((name for name, _ in student.named_parameters() if ".lora_" in name or ".base_layer." in name), None)
    if inner is not None:
        raise InputError(
            f"The student still has adapters ({inner}), which a plain folder cannot hold: make them part of its "
            "weights first, with lcprune.distillation.adapters.fold(student)."
        )


def _prove(student: PreTrainedModel, folder: Path, history: MergeHistory) -> None:
    try:
        # The student's own attention kernel: another one would differ in the last bits and prove nothing.
        reloaded = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=student.dtype,
            device_map={"": student.device},
            attn_implementation=student.config._attn_implementation,
        )
        _check_depth(reloaded, history, "The exported folder, reloaded,")
        _check_weights(student, reloaded)
        _check_logits(student, reloaded)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"No memory on {student.device} for the second copy that proves the export; nothing was left behind: "
            "export from the run's checkpoint in a process of its own (lcprune export)."
        ) from error


def _check_weights(student: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    ours, theirs = student.state_dict(), reloaded.state_dict()
    differing = ours.keys() ^ theirs.keys()
    differing |= {name for name in ours.keys() & theirs.keys() if not _same_bits(ours[name], theirs[name])}
    if differing:
        raise RunError(
            f"The exported folder, reloaded, differs from the student in {len(differing)} of {len(ours)} tensors, "
            f"first {min(differing)}: not exported, nothing was left behind."
        )


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def _check_logits(student: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    vocabulary = student.config.get_text_config().vocab_size
    ids_BT = torch.arange(PROOF_SHAPE[0] * PROOF_SHAPE[1], device=student.device).view(PROOF_SHAPE) * 7919 % vocabulary
    # Compiled layers round otherwise than the plain ones that are reloaded.
    with evaluating(student), evaluating(reloaded), torch.compiler.set_stance("force_eager"):
        expected_BTV = student(input_ids=ids_BT, use_cache=False).logits
        received_BTV = reloaded(input_ids=ids_BT, use_cache=False).logits
    if not torch.isfinite(expected_BTV).all():
        raise RunError("The student's logits are not finite: training diverged, and there is nothing to export.")
    difference = (received_BTV.float() - expected_BTV.float()).abs().max().item()
    allowed = TOLERANCE_IN_ULPS * torch.finfo(student.dtype).eps * expected_BTV.float().abs().max().item()
    if not difference <= allowed:
        raise RunError(
            f"The exported folder, reloaded, gives other logits than the student (largest difference {difference:.3g}, "
            f"allowed {allowed:.3g}{_differing_buffers(student, reloaded)}): not exported, nothing was left behind."
        )


def _differing_buffers(student: PreTrainedModel, reloaded: PreTrainedModel) -> str:
    """The usual suspects: model.to(dtype) rounds rotary frequencies that from_pretrained keeps in float32."""
    ours, theirs = dict(student.named_buffers()), dict(reloaded.named_buffers())
    names = [name for name in ours.keys() & theirs.keys() if not _same_bits(ours[name], theirs[name])]
    return f"; buffers that differ: {', '.join(sorted(names))}" if names else ""


def _put_in_place(folder: Path, out: Path) -> None:
    """Two renames; a kill between them leaves both exports whole, under their hidden names, until the next is there."""
    old = _beside(out, REPLACED)
    replaces = out.exists()
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if replaces:
            old.rename(out)
        raise
    for left in (old, *left_behind(out.parent, out.name, REPLACED)):
        shutil.rmtree(left, ignore_errors=True)


def _cannot_write(out: Path, error: OSError | SafetensorError) -> DiskError:
    # safetensors reports a full disk by an exception of its own that is no OSError.
    reason = getattr(error, "strerror", None) or str(error)
    return DiskError(
        f"The export to {out} failed ({reason}); nothing was left behind and {out} is as it was: "
        "make room or name a folder on another disk, then export again."
    )
