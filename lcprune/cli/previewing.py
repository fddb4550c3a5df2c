"""`data`: which tokens of the recipe's text are learned, shown on some documents and counted over all; loads no model.

What is learned stands out in colour, or in [[ ]] where there is none.
"""

from collections.abc import Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lcprune.cli import options
from lcprune.cli.machines import StandIns
from lcprune.cli.quiet import quieten
from lcprune.data.corpus import Corpus
from lcprune.data.packing import Packed
from lcprune.errors import InputError
from lcprune.models import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 3
"""How many documents are shown unless another number is asked for."""
LEARNED = "bold green"
READ = "dim"
EXAMPLES = """examples:
  lcprune data --config recipes/chat.yaml --data.path my.jsonl
  lcprune data --config recipes/chat.yaml --data.path my.jsonl --show 10 | less
"""


def run(command: str, arguments: list[str]) -> None:
    """`lcprune data --config RECIPE.yaml`."""
    quieten()
    own, recipe_arguments = options.split(
        command,
        "--config RECIPE.yaml",
        arguments,
        ("--show", int, f"Number of training documents to show; default: {SHOWN}."),
        about="Shows which tokens of the recipe's text are learned, and counts them. No weights are loaded.",
        examples=EXAMPLES,
    )
    shown = SHOWN if own.show is None else own.show
    if shown < 0:
        raise InputError(f"--show {shown} must be 0 or more.")
    module = StandIns(recipe_arguments).datamodule
    corpus = module.read()
    both = module.pack(corpus)
    console = Console()
    tokenizer = load_tokenizer(module.tokenizer)
    for number, (ids, learned) in enumerate(islice(_documents(corpus), shown), 1):
        console.rule(f"document {number}: {len(ids):,} tokens, {int(learned.sum()):,} learned", align="left")
        console.print(
            marked(ids, learned, tokenizer, at_most=module.block_size, coloured=_coloured(console)), soft_wrap=True
        )
    console.print(counts(both, corpus))


def marked(ids: Tensor, learned: Tensor, tokenizer: "PreTrainedTokenizerBase", *, at_most: int, coloured: bool) -> Text:
    """The text of a document in which what is learned stands out.

    Args:
        ids: Its tokens [T].
        learned: Which of them are learned, bool [T].
        tokenizer: Whose tokens.
        at_most: How many tokens are written out.
        coloured: In colour instead of brackets.
    """
    text = Text()
    pairs = zip(ids[:at_most].tolist(), learned[:at_most].tolist(), strict=True)
    for wanted, run_of in groupby(pairs, key=lambda pair: pair[1]):
        words = str(tokenizer.decode([token for token, _ in run_of], clean_up_tokenization_spaces=False))
        if coloured:
            text.append(words, LEARNED if wanted else READ)
        else:
            text.append(f"[[{words}]]" if wanted else words)
    if len(ids) > at_most:
        text.append(f" ... and {len(ids) - at_most:,} more tokens", "italic")
    return text


def counts(both: dict[str, Packed], corpus: Corpus) -> Table:
    """Documents, tokens and blocks of the training and the validation part."""
    what = "plain text" if set(corpus.kinds) == {"text"} else " and ".join(dict.fromkeys(corpus.kinds))
    table = Table(title=f"{what}, data.packing={corpus.packing}", title_justify="left")
    for heading in ("", *both):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {
        "documents": [f"{done.documents:,}" for done in both.values()],
        "longer than a block": [f"{corpus.long[part]:,}" for part in both],
        "nothing to learn, left out": [f"{done.left_out:,}" for done in both.values()],
        "tokens": [f"{done.tokens:,}" for done in both.values()],
        "learned": [f"{done.learned:,} ({done.learned / max(done.tokens, 1):.0%})" for done in both.values()],
        "blocks": [f"{len(done):,}" for done in both.values()],
        "of them full": [f"{done.tokens / max(done.blocks['input_ids'].numel(), 1):.0%}" for done in both.values()],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _documents(corpus: Corpus) -> Iterator[tuple[Tensor, Tensor]]:
    """The documents of the training part, as they are learned from in their blocks."""
    for ids, learned in corpus.training.documents():
        if corpus.packing != "concatenate":
            learned = learned.clone()
            learned[:1] = False
        yield ids, learned


def _coloured(console: Console) -> bool:
    return console.is_terminal and not console.no_color
