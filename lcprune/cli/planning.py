"""`plan`: what a recipe would do, before anything is loaded: from its settings and the model's config alone."""

import argparse
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lcprune.amounts import count
from lcprune.cli import options
from lcprune.cli.machines import StandIns
from lcprune.cli.quiet import quieten
from lcprune.cli.training import collapse_of
from lcprune.distillation.footprint import Memory
from lcprune.distillation.forecast import Batches, Forecast, forecast

EXAMPLES = """examples:
  lcprune plan --config recipes/come.yaml --config recipes/models/llama-3.2-1b.yaml
  lcprune plan --config recipes/qlora.yaml --config recipes/models/llama-3.1-8b.yaml --data.batch_size 1
  lcprune plan --config recipes/come.yaml --tflops 150      # hours, on a device that does so many in training
  lcprune plan --config recipes/come.yaml --json            # for programs; bytes and operations
"""
GIB = 2**30


def _tflops(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0, such as 150")
    return number


def run(command: str, arguments: list[str]) -> None:
    """`lcprune plan --config RECIPE.yaml [--config OVERLAY.yaml]`."""
    quieten()
    own, recipe_arguments = options.split(
        command,
        "--config RECIPE.yaml",
        arguments,
        ("--json", bool, "Print one JSON object instead of tables."),
        (
            "--tflops",
            _tflops,
            "10^12 operations per second that a device does in training; adds how long the run takes.",
        ),
        about="Shows what a recipe would do: depth over time, parameters, memory and work. No weights are loaded.",
        examples=EXAMPLES,
    )
    cli = StandIns(recipe_arguments)
    data = cli.datamodule
    found = forecast(cli.model, collapse_of(cli), cli.trainer, Batches(data.batch_size, data.block_size))
    seconds = _seconds(found, own.tflops, cli.trainer.world_size)
    if own.json:
        print(json.dumps(found.to_dict() | {"seconds": seconds}))
    else:
        _show(found, seconds)


def _seconds(found: Forecast, tflops: float | None, devices: int) -> float | None:
    if tflops is None or found.flops is None:
        return None
    return found.flops / (tflops * 1e12 * devices)


def _show(found: Forecast, seconds: float | None) -> None:
    console = Console()
    console.print(
        f"[bold]{found.teacher}[/]: {found.layers} layers, {count(found.parameters)} parameters", highlight=False
    )
    console.print(_depths(found))
    console.print(_phases(found))
    console.print(_memory(found))
    if found.whole:
        console.print(f"while layers merge, the student is whole: {found.whole / GIB:,.2f} GiB more", highlight=False)
    for line in _lines(found, seconds):
        console.print(line, highlight=False, soft_wrap=True)


def _depths(found: Forecast) -> Table:
    table = Table(title="depth over time", title_justify="left")
    for heading in ("from step", "layers", "parameters", "trained", "memory", "TFLOP a step"):
        table.add_column(heading, justify="right")
    for stage in found.stages:
        most = "<= " if stage.at_most else ""
        table.add_row(
            f"{stage.step:,}",
            str(stage.depth),
            count(stage.parameters),
            most + count(stage.trained),
            f"{most}{stage.memory.total / GIB:,.2f} GiB",
            f"{most}{stage.flops / 1e12:,.2f}",
        )
    return table


def _phases(found: Forecast) -> Table:
    table = Table(title="what is optimized", title_justify="left")
    for heading in ("steps", "objective", "trains"):
        table.add_column(heading)
    for stretch in found.phases:
        end = "the end" if stretch.end is None else f"{stretch.end:,}"
        table.add_row(f"{stretch.first:,} to {end}", " + ".join(stretch.objective), stretch.train)
    return table


def _memory(found: Forecast) -> Table:
    peak: Memory = found.peak
    table = Table(title="memory per device, at most", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    names = {
        "teacher": "teacher's weights",
        "student": "student's own weights",
        "averages": "averages of the weights",
        "gathered": "whole layers, for a time",
        "optimizer": "optimizer's state",
        "activations": "activations",
        "states": "teacher's states",
        "loss": "loss, a chunk at a time",
        "gradients": "gradients beside these",
    }
    for field, name in names.items():
        if not getattr(peak, field) and field in ("averages", "gathered"):
            continue
        table.add_row(name, f"{getattr(peak, field) / GIB:,.2f} GiB")
    table.add_row("[bold]in all[/]", f"[bold]{peak.total / GIB:,.2f} GiB[/]")
    for setting, total in found.otherwise.items():
        table.add_row(setting, f"{total / GIB:,.2f} GiB")
    return table


def _lines(found: Forecast, seconds: float | None) -> list[str]:
    if found.steps is None or found.tokens is None or found.flops is None:
        return [
            f"{found.tokens_per_step:,} tokens a step; how many steps, epochs and text decide (trainer.max_epochs)",
            _WITHOUT,
        ]
    late = [f"{_listed(found.too_late)} layers would come at or behind the last step"] if found.too_late else []
    time = "" if seconds is None else f", {seconds / 3600:,.1f} hours at the speed given"
    return [
        f"{found.tokens_per_step:,} tokens a step, {found.tokens:,} in {found.steps:,} steps at most",
        f"{found.flops / 1e15:,.2f} PFLOP of training{time}",
        *late,
        _WITHOUT,
    ]


def _listed(depths: Sequence[int]) -> str:
    return " and ".join(map(str, depths))


_WITHOUT = "[dim]not counted: libraries, the allocator's holes, planning, refits, validation, loading[/]"
