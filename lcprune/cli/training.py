"""`fit`, `validate`, `test`, `predict`: LightningCLI around our module, data and callback.

After `fit` the student is exported and a table says what became of it. Its recipe is saved beside its metrics as
recipe.yaml. What can be known to fail is refused before weights are loaded.
"""

import json
import sys
from argparse import RawDescriptionHelpFormatter, _SubParsersAction
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import lightning
from jsonargparse import ActionConfigFile, DefaultHelpFormatter, set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from transformers import PreTrainedTokenizerBase

from lcprune import __version__, models, weights
from lcprune.cli import messages, named, nulls, recipe_files, resuming, trainers
from lcprune.cli.closing import Delivery, close
from lcprune.cli.messages import ParseError, cause_of, key_of, one_line, one_sentence
from lcprune.cli.quiet import quieten
from lcprune.cli.ranks import end_with_launcher
from lcprune.cli.records import keep_metrics, keep_template, leave_nothing, log_apart, put_aside, say_where
from lcprune.cli.resuming import (
    LAST,
    OF_SLURM,
    checkpoint_of_slurm,
    checkpoints,
    last_checkpoint,
    last_state,
    requeued_from,
    run_folder,
)
from lcprune.data.chat import with_template
from lcprune.data.module import TextDataModule
from lcprune.delivery.export import RECIPE, check_target
from lcprune.delivery.runs import STUDENT
from lcprune.distillation import checkpoint, companions
from lcprune.distillation.beforehand import say_if_slow
from lcprune.distillation.callbacks import ProgressiveCollapse
from lcprune.distillation.module import DistillationModule
from lcprune.distillation.optim import RewarmingCosine, RewarmingWSD  # noqa: F401 - short names in recipes
from lcprune.distillation.signals import STATUS, SaveOnSignal, Terminated
from lcprune.distillation.strategies import check_launcher
from lcprune.distillation.throughput import Throughput  # noqa: F401
from lcprune.errors import InputError, Stopped
from lcprune.files import write_text
from lcprune.merging.gradients import Magnitude, Taylor  # noqa: F401
from lcprune.merging.greedy import GreedyPlanner  # noqa: F401
from lcprune.merging.progressive import ProgressivePlanner  # noqa: F401
from lcprune.merging.search import RefitSearch  # noqa: F401

_OF_A_RUN = "an example:\n  lcprune {} --config recipes/shortgpt.yaml --ckpt_path runs/shortgpt/checkpoints/last.ckpt\n"
EXAMPLES = {
    "fit": """examples:
  lcprune fit --config recipes/quickstart.yaml
  lcprune fit --config recipes/come.yaml --config recipes/models/llama-3.2-1b.yaml --data.path my.jsonl
  lcprune fit --config recipes/come.yaml --ckpt_path runs/come/checkpoints/last.ckpt        # goes on with a run
  lcprune fit --config recipes/recover.yaml --model.student short --data.path my.jsonl
  lcprune plan --config recipes/come.yaml                                                   # what it would do
""",
    **{command: _OF_A_RUN.format(command) for command in ("validate", "test", "predict")},
}
"""What the help of every command ends with."""


class _Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's, with examples as they were written."""


class Parser(LightningArgumentParser):
    """Says what is wrong in one sentence instead of printing the usage of everything."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises InputError; jsonargparse calls this for every mistake in a recipe or on the command line."""
        cause = cause_of(ex)
        if isinstance(cause, ParseError) and (key := key_of(message)):
            raise ParseError(f"{key}: {cause}") from ex  # of the parser of a class inside this one
        raise cause or ParseError(one_sentence(message, self._settings())) from ex

    def _settings(self) -> set[str]:
        """Every setting of this parser and its subcommands, dotted, and those of lcprune's classes that fit there."""
        actions = list(self._actions)
        for action in self._actions:
            if isinstance(action, _SubParsersAction) and action.choices:
                actions += [child for parser in action.choices.values() for child in parser._actions]
        hints = {action.dest: getattr(action, "_typehint", None) for action in actions}
        return hints.keys() | {
            f"{dest}.{name}" for dest, hint in hints.items() for name in messages.fields_within(hint)
        }


class RecipeCLI(LightningCLI):
    """Reads recipes. With `run=False` it only makes the objects, as `collapse` and `score` need them."""

    def __init__(self, arguments: list[str], *, run: bool = True) -> None:
        """Parses and, if `run`, executes.

        Args:
            arguments: The subcommand (if `run`) and its arguments.
            run: As in LightningCLI.
        """
        self.export_to: Path | None = None
        self.record: checkpoint.Record | None = None
        self._asked_for = arguments[0] if run else None
        recipe_files.check_all(arguments)
        if not run:
            arguments = recipe_files.without_fit(arguments)
        # To read what stands below the fields of classes takes a second, and nothing but help shows it.
        set_parsing_settings(docstring_parse_attribute_docstrings=any(map(_shows_help, arguments)))
        with _argv(arguments):
            super().__init__(
                DistillationModule,
                TextDataModule,
                save_config_callback=SaveConfigCallback if arguments[:1] == ["fit"] else None,
                save_config_kwargs={"config_filename": RECIPE, "overwrite": True},
                trainer_class=trainers.Trainer,
                trainer_defaults={"enable_model_summary": False},
                auto_configure_optimizers=False,
                seed_everything_default=0,
                parser_kwargs={arguments[0]: {"epilog": EXAMPLES[arguments[0]]}} if run else {},
                run=run,
            )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Our parser for the command and every subcommand (lightning 2.5 has no argument for it)."""
        kwargs.setdefault("dump_header", [f"lcprune=={__version__}", f"lightning=={lightning.__version__}"])
        kwargs.setdefault("formatter_class", _Help)
        parser = Parser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="A recipe; later ones override earlier ones."
        )
        return parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one asked for: a parser of every one takes twice as long as all that comes after it."""
        return {command: skip for command, skip in super().subcommands().items() if command == self._asked_for}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`collapse:` beside trainer, model and data; one more option; the tokenizer follows the teacher."""
        parser.add_lightning_class_args(ProgressiveCollapse, "collapse")
        parser.add_argument("--out", type=Path | None, default=None, help="Folder for the student after fit.")
        parser.link_arguments("model.teacher", "data.tokenizer")

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """As Lightning's, with what a run needs beside what the recipe asks for."""
        trainers.complete(self._get(self.config_init, "trainer", default={}))
        with trainers.mistakes_in_words():
            trainer = super().instantiate_trainer(**kwargs)
        trainers.check_amounts(trainer)
        return trainer

    def parse_arguments(self, parser: LightningArgumentParser, args: object) -> None:
        """As Lightning's; says where models are that lie here, and looks at the seed, which it uses at once."""
        super().parse_arguments(parser, args)  # type: ignore[arg-type]
        settings = self.config.get(str(self.config.get("subcommand")), self.config)
        for setting in ("model.teacher", "model.student", "data.tokenizer"):
            if isinstance(given := settings.get(setting), str | Path):
                settings[setting] = models.located(str(given))
        seed = settings.get("seed_everything")
        if isinstance(seed, int) and not 0 <= seed < 2**32:
            raise InputError(f"seed_everything={seed} must lie between 0 and {2**32 - 1}.")

    def before_fit(self) -> None:
        """What can go wrong at the end or at the start is looked at first."""
        self._find_named(last_state)
        if self._get(self.config_init, "ckpt_path") is None and (path := requeued_from(self.trainer)):
            self._go_on_from(path)
        if (path := self._get(self.config_init, "ckpt_path")) is not None:
            checkpoint.check_goes_on(Path(path))
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainers.check_trains(self.trainer)
        self._check_model()
        if self.record is not None:
            self.model.check_goes_on(self.record)
        companions.check_always(self.trainer, self.model)
        collapse_of(self).check(self.trainer, self.model)
        self.model.open_cache()
        if str(self.trainer.precision).startswith("bf16"):
            say_if_slow(
                self.trainer.strategy.root_device,
                f"trainer.precision={self.trainer.precision}",
                "--trainer.precision 32-true",
            )
        say_where(self.run_folder, self._get(self.config_init, "trainer", default={}).get("default_root_dir"))
        self.export_to = self._get(self.config, "out") or self.run_folder / STUDENT
        check_target(self.export_to, self.sources)
        self._read_text()
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            leave_nothing(self.trainer)
            return
        self.trainer.callbacks.append(SaveOnSignal())  # type: ignore[attr-defined]  # behind Lightning's own
        if self._get(self.config_init, "ckpt_path") is not None:
            keep_metrics(self.run_folder)
        else:
            put_aside(self.run_folder, checkpoints(self.trainer))
        keep_template(self.run_folder, self.template)

    def _read_text(self) -> None:
        """Before a run leaves anything; the other ranks read theirs, and wait for this one, in `fit`."""
        if self.trainer.is_global_zero:
            self.datamodule.trainer = self.trainer
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
            if (callback := collapse_of(self)).schedule is not None:
                callback.check_text(self.datamodule.calibration_batches())

    def _find_named(self, last: Callable[[Trainer], Path | None]) -> None:
        """`--ckpt_path last` and `hpc` become paths, and the checkpoint is looked over as any other."""
        name = self._get(self.config_init, "ckpt_path")
        if name in (LAST, OF_SLURM):
            self._go_on_from(last(self.trainer) if name == LAST else checkpoint_of_slurm(self.trainer))

    def _go_on_from(self, path: Path | None) -> None:
        self.record = None if path is None else checkpoint.read(path)
        self.config_init[str(self.subcommand)]["ckpt_path"] = None if path is None else str(path)

    def before_validate(self) -> None:
        """Looks at the checkpoint before weights are loaded."""
        if self._get(self.config, "out") is not None:
            raise InputError(f"--out is where fit exports the student, {self.subcommand} exports none: drop it.")
        if self._get(self.config, "return_predictions") is False:
            raise InputError("return_predictions=false keeps from predict what it writes: drop it.")
        self._find_named(last_checkpoint)
        self._check_model()
        log_apart(self.trainer.loggers, str(self.subcommand))

    before_test = before_predict = before_validate

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning's would let a checkpoint's hyper_parameters override recipe and flags without a word."""

    def instantiate_classes(self) -> None:
        """As Lightning's, with what a class of the recipe objects to in one sentence."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps what a constructor raises, and names the setting.
            if cause := cause_of(error) or (key_of(str(error)) and InputError(one_sentence(str(error)))):
                raise cause from error
            if sentence := messages.unmade(str(error)):
                raise InputError(sentence) from error
            raise

    def before_instantiate_classes(self) -> None:
        """Looks at what the recipe names and reads our record of the checkpoint, before anything is made."""
        settings = self.config.get(str(self.config.get("subcommand")), self.config)
        nulls.check(self._parser(self.subcommand)._actions, settings)
        named.check(settings)
        path = settings.get("ckpt_path")
        resuming.check_name(path)
        self.record = None if path in (None, LAST, OF_SLURM) else checkpoint.read(Path(path))

    def _check_model(self) -> None:
        check_launcher(self.trainer.strategy)
        self.model.history  # noqa: B018 - reads the config: an unknown model or family is refused here
        weights.check(self.model.teacher_name)
        if self.record is not None:
            self.record.check_fits(self.model.teacher_name, self.model.fingerprint)
            self.record.check_adapters(None if self.model.lora is None else self.model.lora.record)
            self.record.check_begun(self.model.begun)
            self.model.resume_from = Path(self._get(self.config_init, "ckpt_path"))

    @property
    def run_folder(self) -> Path:
        """Where this run's metrics, checkpoints and student are."""
        return run_folder(self.trainer)

    def after_fit(self) -> None:
        """Exports the student and prints what became of it."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self.export_to is not None
        delivery = Delivery(self.export_to, self.run_folder, self.tokenizer, self.recipe_text)
        close(self.trainer, self.model, self.datamodule, delivery)

    @property
    def sources(self) -> dict[str, list[str | Path]]:
        """What the student is made of, by the setting that names it."""
        origin, student = self.datamodule.origin, self.model.student_folder
        return {
            "model.teacher": [self.model.teacher_name],
            "model.student": [] if student is None else [student],
            "data.path": [] if origin.path is None else [*origin.path.paths],
            "data.validation_path": [] if origin.validation_path is None else [*origin.validation_path.paths],
        }

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's: the teacher's, which writes conversations as the text was read."""
        return with_template(models.load_tokenizer(self.model.teacher_name), self.template)

    @cached_property
    def template(self) -> str | None:
        """What data.chat_template says, as it was when first asked for."""
        file = self.datamodule.chat_template
        return None if file is None else file.read_text(encoding="utf-8")

    @property
    def recipe_text(self) -> str:
        """The resolved recipe as YAML."""
        return self._parser(self.subcommand).dump(self.config.get(str(self.subcommand), self.config), skip_none=False)

    def predict(self, **kwargs: object) -> None:
        """Runs Lightning's predict and writes one JSON line per block."""
        batches = self.trainer.predict(**kwargs)  # type: ignore[arg-type]
        tokenizer = models.load_tokenizer(self.model.teacher_name)
        rank = self.trainer.global_rank
        path = self.run_folder / f"predictions{f'-{rank}' if rank else ''}.jsonl"
        rows = [
            {"prompt": tokenizer.decode(prompt), "continuation": tokenizer.decode(continuation)}
            for batch in batches or ()
            for prompt, continuation in zip(batch["prompt"], batch["continuation"], strict=True)  # type: ignore[index, call-overload]
        ]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        rank_zero_only(print)(f"predictions: {path}")


def run(command: str, arguments: list[str]) -> None:
    """One of Lightning's commands."""
    if not arguments:
        raise InputError(f"{command} needs a recipe: lcprune {command} --config recipes/quickstart.yaml.")
    quieten()
    end_with_launcher()
    try:
        RecipeCLI([command, *arguments])
    except Terminated as stop:
        # Rank 0 speaks for all: its launcher kills it at another one's status.
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            raise Stopped(f"{stop}.", STATUS) from stop
    except SystemExit as stop:
        # Lightning answers Ctrl-C by leaving in its own way.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except MisconfigurationException as error:
        raise InputError(f"{one_line(error)}.") from error
    except ValueError as error:
        # The parser makes objects of the recipe's classes too, and wraps what they object to.
        raise cause_of(error) or messages.too_seldom(error) or error from error


def collapse_of(cli: RecipeCLI) -> ProgressiveCollapse:
    """The recipe's ProgressiveCollapse."""
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, ProgressiveCollapse))  # type: ignore[attr-defined]


def _shows_help(argument: str) -> bool:
    name = argument.partition("=")[0]
    return name in ("-h", "--help", "--print_config") or name.endswith(".help")


@contextmanager
def _argv(arguments: list[str]) -> Iterator[None]:
    """The arguments where jsonargparse and Lightning's launchers for several processes look for them."""
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        yield
    finally:
        sys.argv = before
