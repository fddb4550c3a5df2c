"""A model's name as a user writes it, and what is read of the model without its weights."""

from pathlib import Path

import pytest

from lcprune import models
from lcprune.errors import InputError


def test_hub_name_stays_as_it_is():
    assert models.resolve("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"


def test_local_folder_is_kept_and_home_expanded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert models.resolve(str(tiny_folder)) == models.resolve(f"~/{tiny_folder.name}") == str(tiny_folder)


def test_local_folder_is_located_and_other_names_stay(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny_folder.parent)
    for name in (tiny_folder.name, f"./{tiny_folder.name}/", str(tiny_folder)):
        assert models.located(name) == str(tiny_folder)
    for name in ("demo:smollm2", "owner/name", "/nowhere/at/all", ""):
        assert models.located(name) == name


@pytest.mark.parametrize(
    ("model", "words"), [("./nowhere", "does not exist"), ("{}", "no config.json"), ("{}/file", "is not a folder")]
)
def test_path_without_a_model_is_refused(model: str, words: str, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=words):
        models.resolve(model.format(tmp_path))


def test_adapter_is_told_from_a_folder_without_a_model(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter for another model: merge it into that one"):
        models.resolve(str(tmp_path))


def test_config_and_tokenizer_are_read_from_a_folder(tiny_folder: Path):
    assert models.read_config(str(tiny_folder)).model_type == "llama"
    assert models.load_tokenizer(str(tiny_folder)).eos_token == "<eos>"


@pytest.mark.parametrize("model", ["no/such-model", "not a name"])
def test_unknown_model_is_named_with_the_ways_out(model: str):
    for read in (models.read_config, models.load_tokenizer):
        with pytest.raises(InputError, match=rf"{model}.*HF_HUB_OFFLINE is set.*local folder"):
            read(model)


def test_config_of_an_unknown_kind_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}', encoding="utf-8")
    with pytest.raises(InputError, match="abacus"):
        models.read_config(str(tmp_path))


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: mit", models.License("mit")),
        ("license: other\nlicense_name: mine\nlicense_link: LICENSE", models.License("other", "mine", "LICENSE")),
        ("tags: [a]", None),
        ("license: [mit, apache-2.0]", None),
    ],
)
def test_licence_is_read_from_the_card(front: str, expected: models.License | None, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n", encoding="utf-8")
    assert models.license_of(str(tmp_path)) == expected
