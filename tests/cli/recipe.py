"""A recipe for a tiny model and a page of text, as a user would write it."""

import json
import random
from pathlib import Path

import yaml

WORDS = ("layer", "merge", "teacher", "student", "stream", "depth", "norm", "head", "token", "loss")


def text_file(folder: Path, words: int = 600) -> Path:
    """A .txt file of random words, the same every time."""
    path = folder / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=words)), encoding="utf-8")
    return path


def recipe(model: Path, text: Path, run: Path, **changes: object) -> dict[str, object]:
    """Six layers to four in two merges over six steps.

    Args:
        model: Folder of the teacher.
        text: What to train on.
        run: The run folder.
        changes: Dotted settings with `__` for dots, e.g. trainer__max_steps=3.
    """
    content: dict[str, object] = {
        "seed_everything": 0,
        "trainer": {
            "default_root_dir": str(run),
            "accelerator": "cpu",
            "max_steps": 6,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(run), "name": "", "version": ""},
            },
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"save_last": True, "every_n_train_steps": 3, "save_top_k": 0},
                }
            ],
        },
        "collapse": {
            "schedule": {
                "class_path": "Evenly",
                "init_args": {"target_depth": 4, "merges": 2, "first": 0, "last": 3},
            },
            "planner": "OneShotRanking",
            "operator": "Drop",
        },
        "model": {
            "teacher": str(model),
            "objective": [{"class_path": "Logits"}, {"class_path": "Boundary"}],
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            "lr_scheduler": {"class_path": "RewarmingCosine", "init_args": {"warmup_steps": 2, "rewarm_steps": 1}},
        },
        "data": {"path": str(text), "block_size": 32, "batch_size": 4, "calibration_blocks": 4},
    }
    for name, value in changes.items():
        *parents, last = name.split("__")
        place: dict = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    return content


def write(folder: Path, content: dict[str, object]) -> Path:
    """The recipe as a YAML file."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False), encoding="utf-8")
    return path


def checkpointed(model: Path, folder: Path, **changes: object) -> Path:
    """A run in `folder` that keeps a checkpoint of every step; merges at 0 and 3, six steps."""
    folder.mkdir(exist_ok=True)
    saving = {"save_last": True, "every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving}
    changes = {"trainer__callbacks": [callback], **changes}
    return write(folder, recipe(model, text_file(folder), folder / "run", **changes))
