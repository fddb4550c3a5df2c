"""Where a model's weights lie and how many bytes they are."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lcprune import weights
from tests.builders import save_tiny, tiny_llama


def test_copies_in_another_format_do_not_count(tmp_path: Path):
    folder = save_tiny(tmp_path / "model", tiny_llama(2))
    (size,) = (file.stat().st_size for file in folder.glob("*.safetensors"))
    (folder / "consolidated.safetensors").write_bytes((folder / weights.ONE_FILE).read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert weights.size_of(folder) == size
    assert weights.size_of(tmp_path) == 0


def test_shards_count_together(tmp_path: Path):
    model = tiny_llama(2)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert weights.size_of(tmp_path) == sum(shard.stat().st_size for shard in shards)


def test_model_of_the_hub_is_measured_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert weights.size_of(weights.folder_of("someone/llama")) == 0
    place = tmp_path / "models--someone--llama"
    folder = save_tiny(place / "snapshots" / "abc", tiny_llama(2))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    assert weights.folder_of("someone/llama") == folder
    assert weights.size_of(weights.folder_of("someone/llama")) > 0


@pytest.mark.parametrize("said", [None, "float16", "float32", "bfloat16"])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_dtype_of_a_model_is_that_of_its_files(held: torch.dtype, said: str | None, tmp_path: Path):
    model = tiny_llama(2, dtype=held)
    model.model.norm.float()
    folder = save_tiny(tmp_path, model)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "dtype": said}), encoding="utf-8")
    assert weights.config_of(str(folder)).dtype == held


def test_dtype_of_a_model_without_its_files_is_that_of_its_config(tmp_path: Path):
    tiny_llama(2, dtype=torch.bfloat16).config.save_pretrained(tmp_path)
    assert weights.config_of(str(tmp_path)).dtype == torch.bfloat16
