"""Bad input, and what lcprune says to it: the corpus that test_bad_input.py runs, to be read as documentation.

An entry is a name, the mistake, and the parts that the one sentence must have: field, value and the way out.
"""

Parts = tuple[str, ...]


def of(class_path: str, **init_args: object) -> dict[str, object]:
    """A class in a recipe."""
    return {"class_path": class_path, "init_args": init_args}


# What is changed in a good recipe (dotted with `__`).
RECIPES: dict[str, tuple[dict[str, object], Parts]] = {
    "misspelt trainer key": ({"trainer__max_stepz": 3}, ("max_stepz", "did you mean", "max_steps")),
    "callback given twice": (
        {"trainer__callbacks": 2 * [of("lightning.pytorch.callbacks.ModelCheckpoint", every_n_train_steps=3)]},
        ("trainer.callbacks holds ModelCheckpoint twice", "leave one of them out"),
    ),
    "metric that nothing logs": (
        {"trainer__callbacks": [of("EarlyStopping", monitor="val_loss")], "collapse__schedule": None},
        ("trainer.callbacks: EarlyStopping has monitor=val_loss", "does not log", "val/perplexity"),
    ),
    "callback that needs another module": (
        {"trainer__callbacks": ["LearningRateFinder"], "collapse__schedule": None},
        ("trainer.callbacks: LearningRateFinder looks for a learning rate", "model.optimizer", "remove it"),
    ),
    "refit with one sequence of text": (
        {"collapse__refit": "RidgeRefit", "data__calibration_blocks": 1},
        ("RidgeRefit has one calibration sequence", "data.calibration_blocks", "one strength"),
    ),
    "search with one sequence of text": (
        {"collapse__planner": "RefitSearch", "data__calibration_blocks": 1},
        ("RefitSearch has one calibration sequence", "data.calibration_blocks"),
    ),
    "precision that merges do not keep": ({"trainer__precision": "64-true"}, ("trainer.precision=64-true", "32-true")),
    "misspelt section": ({"modle": {"teacher": "x"}}, ("modle", "did you mean model")),
    "misspelt argument of a class": (
        {"collapse__schedule": of("Evenly", target_dept=4)},
        ("collapse.schedule", "target_dept", "did you mean", "target_depth"),
    ),
    "unknown planner": ({"collapse__planner": "OneShotRankin"}, ("OneShotRankin", "did you mean OneShotRanking")),
    "unknown level": ({"model__objective": [{"class_path": "Logitz"}]}, ("Logitz", "did you mean Logits")),
    "class of another family": ({"collapse__operator": "OneShotRanking"}, ("collapse.operator", "OneShotRanking")),
    "unknown optimizer": ({"model__optimizer": {"class_path": "torch.optim.AdamX"}}, ("model.optimizer", "AdamX")),
    "no optimizer": ({"model__optimizer": None}, ("optimizer=null", "torch.optim.AdamW")),
    "empty optimizer": ({"model__optimizer": ""}, ("model.optimizer: ''", "package.Class")),
    "number for an optimizer": ({"model__optimizer": 3}, ("model.optimizer: '3'", "package.Class")),
    "null for a number": (
        {"collapse__schedule": of("Evenly", target_depth=4, merges=None)},
        ("Evenly cannot be made with", "merges=None", "leave it out for its default"),
    ),
    "word for a learning rate": (
        {"model__optimizer": of("torch.optim.AdamW", lr="fast")},
        ("model.optimizer: lr=fast must be a number",),
    ),
    "negative learning rate": (
        {"model__optimizer": of("torch.optim.AdamW", lr=-1)},
        ("model.optimizer", "Invalid learning rate: -1.0", "init_args"),
    ),
    "scheduler that divides by zero": (
        {"model__lr_scheduler": of("StepLR", step_size=0)},
        ("model.lr_scheduler cannot be made", "init_args"),
    ),
    "misspelt argument of a scheduler": (
        {"model__lr_scheduler": of("RewarmingCosine", warmup=3)},
        ("model.lr_scheduler", "'warmup'", "did you mean warmup_steps"),
    ),
    "negative warmup": (
        {"model__lr_scheduler": of("RewarmingCosine", warmup_steps=-1)},
        ("warmup_steps=-1", "negative"),
    ),
    "text for a number": ({"data__block_size": "x"}, ("data.block_size=x", "whole number")),
    "fraction for a whole number": ({"trainer__max_steps": 1.5}, ("trainer.max_steps=1.5", "whole number")),
    "list for a number": ({"trainer__max_steps": [3]}, ("trainer.max_steps=[3]", "whole number")),
    "number for a name": ({"model__teacher": 3}, ("model.teacher=3 must be text",)),
    "number for a folder": ({"model__student": 3}, ("model.student=3 must be text or a path",)),
    "null for a whole number": ({"data__block_size": None}, ("data.block_size=null must be a whole number", "512")),
    "null for a choice": ({"model__train": None}, ("model.train=null must be one of all, layers",)),
    "no class for a schedule": ({"collapse__schedule": {}}, ("collapse.schedule names no class", "AtSteps, ByTokens")),
    "abstract class for a schedule": (
        {"collapse__schedule": "StepSchedule"},
        ("collapse.schedule names no class: give one of AtSteps, ByTokens, Evenly, EveryNSteps, WhenRecovered.",),
    ),
    "abstract class for an operator": (
        {"collapse__operator": "lcprune.Operator"},
        ("collapse.operator names no class: give one of Concat, Drop, Rdsc",),
    ),
    "abstract class for a criterion": (
        {"collapse__planner": {"class_path": "OneShotRanking", "init_args": {"criterion": "TrialCriterion"}}},
        ("collapse.planner", "criterion names no class: give one of AngularDistance,"),
    ),
    "no class for a planner": ({"collapse__planner": {}}, ("collapse.planner names no class", "OneShotRanking")),
    "null for a name": ({"model__teacher": None}, ("model.teacher=None must be text",)),
    "empty name": ({"model__teacher": ""}, ("data.tokenizer is empty", "hub model", "demo:smollm2")),
    "word outside a list": ({"model__train": "layer"}, ("model.train=layer", "all, layers")),
    "precision that is none": ({"trainer__precision": "int3"}, ("trainer.precision=int3", "bf16-mixed")),
    "callback that is none": ({"trainer__callbacks": 3}, ("trainer.callbacks: '3'", "package.Class")),
    "devices that are none": ({"trainer__devices": "many"}, ("trainer: ", "devices", "int > 0")),
    "accelerator that is none": ({"trainer__accelerator": "quantum"}, ("accelerator='quantum'", "cpu")),
    "strategy that is none": ({"trainer__strategy": "nonsense"}, ("strategy='nonsense'", "ddp")),
    "ranks that are spawned": (
        {"trainer__strategy": "ddp_spawn", "trainer__devices": 2, "collapse__schedule": None},
        ("trainer.strategy=DDPStrategy by spawn", "use strategy ddp"),
    ),
    "ranks that are forked": ({"trainer__strategy": "ddp_notebook"}, ("strategy=DDPStrategy by fork", "strategy ddp")),
    "time that is none": ({"trainer__max_time": "soon"}, ("duration='soon'", "DD:HH:MM:SS")),
    "no steps": ({"trainer__max_steps": 0, "collapse__schedule": None}, ("trainer.max_steps=0 trains nothing",)),
    "no epochs": ({"trainer__max_epochs": 0, "collapse__schedule": None}, ("max_epochs=0 trains", "raise it")),
    "no batches": ({"trainer__limit_train_batches": 0}, ("limit_train_batches=0 trains nothing", "lcprune collapse")),
    "steps below nothing": ({"trainer__max_steps": -5}, ("max_steps", "-5", "non-negative")),
    "accumulation of nothing": (
        {"trainer__accumulate_grad_batches": 0},
        ("trainer.accumulate_grad_batches=0", "1 or more"),
    ),
    "negative clipping": ({"trainer__gradient_clip_val": -1}, ("trainer.gradient_clip_val=-1", "leave it out")),
    "seed out of range": ({"seed_everything": 2**70}, (f"seed_everything={2**70}", "between 0 and 4294967295")),
    "target depth 0": ({"collapse__schedule": of("Evenly", target_depth=0)}, ("target_depth=0", "at least 1")),
    "target depth of the model": (
        {"collapse__schedule": of("Evenly", target_depth=6)},
        ("target depth 6", "between 1 and 5"),
    ),
    "target depth above the model's": (
        {"collapse__schedule": of("Evenly", target_depth=40)},
        ("target depth 40", "between 1 and 5", "6 layers"),
    ),
    "more merges than anybody can count": (
        {"collapse__schedule": of("EveryNSteps", every=1, first=0, last=10**30)},
        ("EveryNSteps", "target depth 0", "between 1 and 5"),
    ),
    "merge behind the end": ({"trainer__max_steps": 2}, ("step 3", "max_steps=2", "train longer")),
    "negative weight": ({"model__objective": [of("Logits", weight=-1)]}, ("weight=-1", "positive")),
    "word for a weight": (
        {"model__objective": [of("Logits", weight="x")]},
        ("model.objective: weight=x must be a number",),
    ),
    "level twice": ({"model__objective": [{"class_path": "Logits"}, {"class_path": "Logits"}]}, ("none twice",)),
    "missing model": ({"model__teacher": "./nowhere"}, ("./nowhere", "does not exist", "demo:smollm2")),
    "model that is not on the hub": ({"model__teacher": "nobody/nothing-at-all"}, ("nobody/nothing-at-all", "local")),
    "layer that is not there": (
        {"collapse__planner": of("FixedPlan", groups=[[5, 6, 7]])},
        ("layer 7", "0 to 5"),
    ),
    "optimizer that cannot start afresh": (
        {"model__optimizer": of("torch.optim.NAdam", lr=1e-3)},
        ("NAdam", "starts at zero", "AdamW"),
    ),
    "scheduler of a figure": (
        {"model__lr_scheduler": of("lightning.pytorch.cli.ReduceLROnPlateau", monitor="val/perplexity")},
        ("ReduceLROnPlateau", "RewarmingCosine"),
    ),
    "nothing to train before the first merge": (
        {"model__train": "after_merge", "collapse__schedule": of("Evenly", target_depth=4, first=3)},
        ("train=after_merge trains nothing before the first merge", "collapse.schedule.first: 0"),
    ),
    "boundary alone under ddp": (
        {"trainer__strategy": "ddp", "model__objective": [{"class_path": "Boundary"}]},
        ("Boundary", "add Logits", "ddp_find_unused_parameters_true"),
    ),
    "strategy that cannot merge": ({"trainer__strategy": "fsdp"}, ("fsdp",)),
}

# The text of a recipe's file.
TEXTS: dict[str, tuple[str, Parts]] = {
    "empty file": ("", ("holds no sections", "model, data, trainer, collapse")),
    "a word": ("hello\n", ("holds no sections", "recipes/")),
    "a list": ("- model\n- data\n", ("holds no sections", "recipes/")),
    "no YAML": ("model: {teacher: [\n", ("is not YAML", "line 2", "correct it")),
    "tabs": ("model:\n\tteacher: x\n", ("is not YAML", "line 2", "correct it")),
    "bytes that are no text": ("\x00\x01", ("is not YAML", "name a text file")),
    "deep nesting": ("model: " + "[" * 3000 + "]" * 3000, ("is not YAML", "name a text file")),
    "section twice": ("model: {teacher: x}\nmodel: {teacher: y}\n", ("'model' twice", "line 2", "keep one")),
    "setting twice": ("data: {seed: 1, path: x, seed: 2}\n", ("'seed' twice", "line 1", "keep one")),
    "section without settings": ("model:\ndata: {seed: 1}\n", ("no settings under 'model'", "line 1", "leave")),
    "number for a section": ("trainer: 3\n", ("no settings under 'trainer'", "line 1", "leave")),
    "key that is no name": ("1: 2\n", ("the key '1'", "line 1", "the sections are model")),
    "section in another language": ("modèle: 3\n", ("'modèle' is not a setting", "did you mean model?")),
    "object of Python's": (
        "model: {teacher: !!python/object/apply:os.getcwd []}\n",
        ("is not YAML", "python/object/apply:os.getcwd"),
    ),
}

# Name and content of data.path, with what is changed beside it.
DATA: dict[str, tuple[str, bytes, dict[str, object], Parts]] = {
    "empty file": ("x.jsonl", b"", {}, ("data.path=", "is empty", "give a file with text")),
    "file of blanks": ("x.txt", b"  \n ", {}, ("is blank", "give a file")),
    "unknown kind of file": ("x.docx", b"x", {}, ("'.docx'", ".jsonl, .json, .csv, .parquet, .txt", "convert")),
    "no JSON": ("x.jsonl", b'{"text": \n', {}, ("could not be read", "really is jsonl")),
    "no Parquet": ("x.parquet", b"PAR1garbage", {}, ("could not be read", "really is parquet")),
    "rows that are no UTF-8": (
        "x.jsonl",
        '{"text": "für alle"}\n'.encode("latin-1") * 99,
        {},
        ("x.jsonl could not be read", "check that it really is jsonl in UTF-8"),
    ),
    "no UTF-8": ("x.txt", b"\xe4\xf6\xfc" * 99, {}, ("could not be read", "UTF-8")),
    "numbers for text": ("x.jsonl", b'{"text": 3}\n' * 9, {}, ("data.text_column='text'", "int values", "strings")),
    "lists for text": ("x.jsonl", b'{"text": ["a"]}\n' * 9, {}, ("data.text_column='text'", "list values", "strings")),
    "another column": ("x.jsonl", b'{"body": "x"}\n' * 9, {}, ("data.text_column='text'", "columns body", "set")),
    "nothing but nulls": ("x.jsonl", b'{"text": null}\n' * 9, {}, ("holds no text", "give a file")),
    "block longer than the text": (
        "x.txt",
        b"a" * 999,
        {"data__block_size": 10**5},
        ("100000", "lower data.block_size"),
    ),
    "block longer than any text": ("x.txt", b"a" * 999, {"data__block_size": 10**30}, ("lower data.block_size",)),
    "batch larger than the text": (
        "x.txt",
        b"a" * 9999,
        {"data__batch_size": 5000},
        ("data.batch_size=5000", "lower data.batch_size"),
    ),
    "several mistakes at once": (
        "x.txt",
        b"a" * 999,
        {"data__batch_size": 0, "data__block_size": 1, "data__validation_fraction": 1.5},
        ("data.batch_size=0 must be 1 or more", "data.block_size=1", "data.validation_fraction=1.5"),
    ),
    "two sources": ("x.txt", b"a" * 999, {"data__dataset": "a/b"}, ("data.path", "data.dataset='a/b'", "keep one")),
    "missing file": ("x.txt", b"", {"data__path": "nowhere.jsonl"}, ("data.path=nowhere.jsonl", "does not exist")),
}


# What is typed; PLAN is a file with a plan of no merges.
COMMANDS: dict[str, tuple[list[str], Parts]] = {
    "unknown command": (["fitt"], ("'fitt'", "did you mean fit")),
    "missing recipe": (["fit", "--config", "nowhere.yaml"], ("nowhere.yaml", "does not exist", "check the path")),
    "option cut short": (["fit", "--model.objectiv", "Logits"], ("'model.objectiv'", "did you mean model.objective?")),
    "misspelt option": (["fit", "--trainer.max_stepz", "3"], ("max_stepz", "did you mean")),
    "misspelt section of a setting": (
        ["fit", "--model.optimiser.lr", "3"],
        ("'model.optimiser.lr'", "did you mean model.optimizer?"),
    ),
    "option of a class, without it": (
        ["fit", "--collapse.targetdepth", "3"],
        ("'collapse.targetdepth'", "did you mean collapse.schedule.target_depth?"),
    ),
    "option of another class, without it": (
        ["fit", "--collapse.candidate", "3"],
        ("'collapse.candidate'", "did you mean collapse.planner.candidates?"),
    ),
    "collapse without out": (["collapse", "--config", "x.yaml"], ("--out", "missing")),
    "missing plan": (["collapse", "--config", "x.yaml", "--plan", "nowhere.json", "--out", "o"], ("nowhere.json",)),
    "plan and plan-only": (["collapse", "--plan-only", "--plan", "PLAN"], ("--plan-only", "one of them")),
    "export of nothing": (["export", "nowhere.ckpt", "--out", "o"], ("nowhere.ckpt", "does not exist")),
    "export without out": (["export", "x.ckpt"], ("--out",)),
    "fit without a recipe": (["fit"], ("needs a recipe", "quickstart.yaml")),
    "text for a depth": (["collapse", "--target-depth", "abc", "--out", "o"], ("--target-depth", "abc")),
    "option without a value": (["collapse", "--out"], ("--out",)),
    "plan and depth": (["collapse", "--plan", "PLAN", "--target-depth", "4", "--out", "o"], ("give one of them",)),
    "two budgets": (
        ["collapse", "--target-depth", "4", "--target-size", "1MB", "--out", "o"],
        ("target_depth", "target_size", "give one of them"),
    ),
    "budget of no unit": (["collapse", "--target-size", "much", "--out", "o"], ("much", "200MB")),
    "dtype that is none": (["collapse", "--dtype", "int3", "--out", "o"], ("--dtype int3", "bfloat16")),
    "device that is none": (["score", "--device", "toaster"], ("--device toaster", "cuda:1")),
    "device that is not there": (["score", "--device", "cuda:99"], ("cuda:99", "torch finds", "leave --device out")),
    "misspelt option of a command": (
        ["collapse", "--target-dept", "4", "--out", "o"],
        ("--target-dept is not an option", "did you mean --target-depth?", "`lcprune collapse --help`."),
    ),
    "misspelt short option": (["data", "--shwo=3"], ("--shwo=3", "did you mean --show?", "`lcprune data --help`.")),
    "number that is none": (["cache", "--top-k", "x", "--out", "o"], ("--top-k", "'x'", "`lcprune cache --help`.")),
    "shell that is none": (
        ["completion", "csh"],
        ("lcprune: completion: argument shell", "`lcprune completion --help`."),
    ),
    "plan into a folder": (
        ["collapse", "--plan-only", "--out", "/tmp"],
        ("--out /tmp", "is a folder", "name a file"),
    ),
    "plan below a file": (["collapse", "--plan-only", "--out", f"{__file__}/p.json"], ("corpus.py", "is not a folder")),
    "scores below a file": (["score", "--out", f"{__file__}/scores"], ("corpus.py", "is not a folder", "another")),
    "report below a file": (["report", "r", "--out", f"{__file__}/r.html"], ("corpus.py", "is not a folder")),
    "student below a file": (["collapse", "--out", f"{__file__}/s"], ("corpus.py", "is not a folder")),
    "layers that are none": (["cache", "--layers", "x", "--out", "o"], ("'x'", "3,7")),
}
