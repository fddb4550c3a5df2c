"""`report`: shows what became of one run or several, in one HTML file with its pictures beside it.

What is on disk already costs nothing to show. Similarities and generated text need the weights of teacher and student:
`--blocks` and `--samples` say how much of that to make; with 0 for both, no weights are loaded.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lcprune import models
from lcprune.cli import bars, options
from lcprune.cli.arguments import CommandParser
from lcprune.cli.heldout import first_blocks
from lcprune.cli.quiet import quieten
from lcprune.cli.training import Parser
from lcprune.data.module import TextDataModule
from lcprune.delivery import report, runs
from lcprune.delivery.likeness import Likeness, compare, kinship, merge_untrained
from lcprune.delivery.runs import Run
from lcprune.delivery.samples import Sample, prompts, side_by_side
from lcprune.delivery.sections import Look
from lcprune.distillation import checkpoint
from lcprune.distillation.beginning import history_of
from lcprune.distillation.teacher import DtypeName, load, second_view
from lcprune.errors import InputError
from lcprune.files import check_file
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch
from lcprune.merging.lineage import MergeHistory

EXAMPLES = """\
examples:
  lcprune report runs/quickstart                                # -> runs/quickstart/report.html
  lcprune report runs/quickstart --samples 0 --blocks 0         # from files alone, in seconds
  lcprune report runs/a runs/b runs/c --out comparison.html     # quality against size and speed
"""


def run(command: str, arguments: list[str]) -> None:
    """`lcprune report RUN [RUN ...]`."""
    own = _parser().parse_args(arguments)
    out = _check(own)
    found = [_with_history(runs.read(folder)) for folder in own.runs]
    quieten()
    looked = []
    for each in found:
        with bars.shown():
            looked.append((each, _look(each, own)))
    written = report.write(looked, out)
    for each, look in looked:
        for sentence in (*each.missing, *look.missing):
            print(f"not in the report of {each.name}: {sentence[0].lower()}{sentence[1:]}")
    print(f"report: {written[0]} and {len(written) - 1} pictures beside it")


def _parser() -> CommandParser:
    parser = CommandParser("report", str(__doc__), EXAMPLES)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="Folder that lcprune fit or collapse wrote.")
    parser.add_argument(
        "--out", type=Path, help="The HTML file; default: report.html in the folder of the (first) run."
    )
    parser.add_argument("--samples", type=int, default=3, help="Number of texts that both models continue; default: 3.")
    parser.add_argument(
        "--blocks", type=int, default=4, help="Number of calibration blocks for similarities; default: 4."
    )
    dtype = options.dtype("what both models are held in and compute in; default: model.dtype of the run's recipe.")
    for name, kind, text in (options.DEVICE, dtype):
        parser.add_argument(name, type=kind, help=text)
    return parser


def _check(own: Namespace) -> Path:
    """Where the report goes; raises InputError for what cannot be."""
    options.check_loading(own)
    for name in ("samples", "blocks"):
        if getattr(own, name) < 0:
            raise InputError(f"--{name} {getattr(own, name)} must be 0 or more; 0 leaves that part out.")
    out: Path = own.out or own.runs[0] / "report.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {out} must be a file ending in .html; the pictures are put beside it.")
    check_file("--out", out)
    return out


def _with_history(found: Run) -> Run:
    """The run, with the history of its newest checkpoint where no student was exported."""
    path = runs.newest_checkpoint(found.folder)
    if found.history is not None or path is None:
        return found
    try:
        history = checkpoint.read(path).history
    except InputError as error:
        return replace(found, missing=(*found.missing, f"The history: {error}"))
    note = f"The end of the run: it has not finished, the family tree is that of its checkpoint {path.name}."
    return replace(
        found,
        history=replace(history, teacher=models.public_name(history.teacher)),
        missing=(*found.missing, note),
    )


@dataclass(frozen=True)
class _Pair:
    """What a run's weights and text are."""

    run: Run
    teacher: PreTrainedModel
    student: PreTrainedModel
    data: TextDataModule
    dtype: DtypeName

    @property
    def history(self) -> MergeHistory:
        assert self.run.history is not None
        return self.run.history


def _look(found: Run, own: Namespace) -> Look:
    """Runs teacher and student where they are to be had; else says why not."""
    if not own.samples and not own.blocks:
        return Look()
    try:
        pair = _pair(found, own)
    except InputError as error:
        return Look(missing=(f"Similarities and generated text: {error}",))
    missing: list[str] = []
    likeness, before = _likeness(pair, own.blocks, missing)
    return Look(likeness, before, _samples(pair, own.samples), tuple(missing))


def _pair(found: Run, own: Namespace) -> _Pair:
    """Loads both models and the text; raises InputError if one of the three cannot be had."""
    if found.student is None or found.history is None:
        way = runs.unfinished(found.folder)
        raise InputError(f"there are no weights of the student{f'; {way}' if way else ' (RUN/student)'}.")
    if not found.teacher:
        raise InputError("neither recipe nor history names the original.")
    config = models.read_config(found.teacher)
    depth = layout_of(config).depth_of(config)
    if depth != found.history.teacher_depth:
        raise InputError(
            f"{found.teacher} has {depth} layers, the student's original had {found.history.teacher_depth}."
        )
    data = _text(found)
    data.setup()
    dtype: DtypeName = own.dtype or _dtype(found)
    device = own.device or _device(found)
    teacher = load(found.teacher, dtype, device)
    student = load(str(found.student), dtype, device, named="the student")
    return _Pair(found, teacher, student, data, dtype)


def _text(found: Run) -> TextDataModule:
    """The run's own text, by its recipe."""
    settings = found.setting("data")
    if not isinstance(settings, dict):
        raise InputError("the recipe names no text (data).")
    parser = Parser()
    parser.add_class_arguments(TextDataModule, "data")
    config = parser.parse_object({"data": {**settings, "tokenizer": found.teacher}})
    return parser.instantiate_classes(config).data


def _dtype(found: Run) -> DtypeName:
    named = found.setting("model", "dtype")
    return named if named in ("bfloat16", "float16") else "float32"


def _device(found: Run) -> str:
    return "cuda" if torch.cuda.is_available() and found.setting("trainer", "accelerator") != "cpu" else "cpu"


def _likeness(pair: _Pair, blocks: int, missing: list[str]) -> tuple[Likeness | None, tuple[float, ...] | None]:
    """Both models on a few calibration blocks, and before it the student as it was before it was trained."""
    if not blocks:
        return None, None
    batches = list(first_blocks(pair.data.calibration_batches(), blocks))
    before = None
    if pair.run.log.series:
        try:
            before = kinship(pair.teacher, _untrained(pair, batches), pair.history.lineage, batches)
        except InputError as error:
            missing.append(f"The student merged but not trained: {error}")
    return compare(pair.teacher, pair.student, pair.history.lineage, batches), before


def _untrained(pair: _Pair, batches: Sequence[Batch]) -> PreTrainedModel:
    """The student as it would be without training: where the run began, merged as it was."""
    folder = pair.run.setting("model", "student")
    depth = pair.history.teacher_depth
    if isinstance(folder, str):
        begun = history_of(Path(folder), pair.run.teacher, pair.teacher.config)
        model = load(folder, pair.dtype, pair.teacher.device, named="model.student")
    else:
        begun, model = MergeHistory(depth), second_view(pair.teacher)
    merge_untrained(model, begun, pair.history, batches)
    return model


def _samples(pair: _Pair, count: int) -> tuple[Sample, ...]:
    begun = prompts(pair.data.val_dataloader(), count)
    return side_by_side(pair.teacher, pair.student, models.load_tokenizer(pair.run.teacher), begun)
