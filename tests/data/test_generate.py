"""Text that a model writes itself: what decides it, what it may hold, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import jsonargparse
import pytest
import torch
from transformers import GenerationConfig

from lcprune.data import author
from lcprune.data.author import Author
from lcprune.data.generate import Generate, text_file
from lcprune.data.module import TextDataModule
from lcprune.errors import DiskError, InputError
from lcprune.models import load_tokenizer
from tests.builders import EOS, PAD, save_tiny, tiny_llama

SMALL = {"documents": 7, "tokens": 9, "batch_size": 3}
Written = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LCPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer writes as well as six, and sooner."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", tiny_llama(1))


@pytest.fixture
def write(tiny_folder: Path) -> Written:
    """The file of a few small texts; any setting can be given."""

    def build(**settings: object) -> Path:
        return text_file(Generate(**SMALL | settings), teacher=str(tiny_folder), column="text")  # type: ignore[arg-type]

    return build


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def refuse(*_: object) -> None:
    raise AssertionError("the model was loaded")


def test_same_seed_gives_the_same_file_and_another_seed_another_text(
    write: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first, other = write(), write(seed=1)
    monkeypatch.setenv("LCPRUNE_CACHE", str(tmp_path / "another"))
    again = write()
    assert again != first
    assert again.name == first.name != other.name
    assert again.read_bytes() == first.read_bytes() != other.read_bytes()
    assert len(set(texts_of(first))) == 7


def test_second_use_finds_the_file_without_the_model(write: Written, monkeypatch: pytest.MonkeyPatch):
    path = write()
    monkeypatch.setattr(author, "load", refuse)
    assert write() == path
    with pytest.raises(AssertionError, match="was loaded"):
        write(temperature=0.5)


@pytest.mark.parametrize("torn", [b"", b'{"text": "x"}\n{"te'])
def test_killed_run_goes_on_behind_its_last_whole_batch(
    write: Written, cache: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes
):
    whole = write()
    content = whole.read_bytes()
    whole.unlink()
    texts, started = Author.texts, []

    def stop(self: Author, numbers: range, how: GenerationConfig, seed: int) -> list[str]:
        started.append(numbers.start)
        if started == [0, 3]:
            raise KeyboardInterrupt
        return texts(self, numbers, how, seed)

    monkeypatch.setattr(Author, "texts", stop)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert not whole.exists()
    with whole.with_suffix(".partial").open("ab") as file:
        file.write(torn)
    assert write().read_bytes() == content
    assert started == [0, 3, 3, 6]
    assert {path.suffix for path in (cache / "generated").iterdir()} <= {".jsonl", ".json", ".lock"}


def test_global_random_state_is_left_alone(write: Written):
    before = torch.random.get_rng_state()
    write()
    assert torch.random.get_rng_state().equal(before)


def test_texts_hold_neither_padding_nor_special_tokens(write: Written):
    texts = texts_of(write(documents=64, batch_size=32, tokens=60))
    lengths = {len(text) for text in texts}  # a character is a token, and one opens the text
    assert max(lengths) == 61
    assert len(lengths) > 10  # EOS ended the others
    assert not [text for text in texts if PAD in text or EOS in text]


def test_text_ends_where_a_special_token_is_spelled_out(tiny_folder: Path):
    writer = Author(str(tiny_folder), ["ask "])
    letters = writer.tokenizer("good<pa")["input_ids"] + [writer.tokenizer.convert_tokens_to_ids(c) for c in "d> bad"]
    assert writer._text(0, writer._tokens("ask "), letters) == "ask good"


def test_prompts_open_the_texts_in_turn_as_they_were_given(write: Written, tmp_path: Path):
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    prompts = ["a longer opening ", "b", "<eos>c?\n"]
    lines.write_text("\n\n".join(prompts[:2]), encoding="utf-8")
    rows.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    for path, expected in ((lines, prompts[:2]), (rows, prompts)):
        texts = texts_of(write(prompts=path))
        assert all(text.startswith(expected[number % len(expected)]) for number, text in enumerate(texts))
        assert len(set(texts)) == 7


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "bloom"])
def test_openings_of_different_length_do_not_disturb_each_other(tmp_path: Path, family: str):
    folder = save_tiny(tmp_path / "model", tiny_llama(2, model_type=family))  # type: ignore[arg-type]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": "x" * n + "ab"}) + "\n" for n in (0, 9, 3)), encoding="utf-8")
    sure = {"documents": 3, "tokens": 9, "top_k": 1, "prompts": prompts}
    together, alone = (
        text_file(Generate(batch_size=size, **sure), teacher=str(folder), column="text")  # type: ignore[arg-type]
        for size in (3, 1)
    )
    assert together != alone
    assert texts_of(together) == texts_of(alone)


def test_texts_begin_from_bos_where_there_is_one(tmp_path: Path):
    model = tiny_llama(1)
    model.config.bos_token_id = model.generation_config.bos_token_id = 1
    writer = Author(str(save_tiny(tmp_path / "model", model)), [])
    assert writer._opening(0) == [1]
    assert writer._text(0, [1], [20, 21, 0, 22]) == writer.tokenizer.decode([20, 21])


def test_models_own_habits_of_sampling_do_not_count(write: Written, tiny_folder: Path, tmp_path: Path):
    other = save_tiny(tmp_path / "model", tiny_llama(1))
    habits = {"eos_token_id": 1, "do_sample": True, "temperature": 0.1, "repetition_penalty": 1.9, "top_k": 2}
    (other / "generation_config.json").write_text(json.dumps(habits), encoding="utf-8")
    assert texts_of(write(model=str(other))) == texts_of(write())


def test_content_of_the_model_decides_and_its_name_does_not(write: Written, tmp_path: Path):
    same = save_tiny(tmp_path / "same", tiny_llama(1))
    other = save_tiny(tmp_path / "other", tiny_llama(1, seed=1))
    assert write(model=str(same)) == write()
    assert write(model=str(other)) != write()


def test_content_of_the_prompts_decides_and_their_file_does_not(write: Written, tmp_path: Path):
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    for path in (one, other):
        path.write_text("a\nb\n", encoding="utf-8")
    first = write(prompts=one)
    assert write(prompts=other) == first
    other.write_text("a\nc\n", encoding="utf-8")
    assert write(prompts=other) != first


def test_module_trains_on_what_the_teacher_wrote_and_says_where_it_is(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    settings = Generate(documents=12, tokens=60, batch_size=12)

    def module() -> TextDataModule:
        return TextDataModule(tokenizer=str(tiny_folder), generate=settings, block_size=16, validation_blocks=2)

    module().prepare_data()
    monkeypatch.setattr(author, "load", refuse)
    data = module()
    with caplog.at_level("INFO"):
        data.setup("fit")
    path = text_file(settings, teacher=str(tiny_folder), column="text")
    assert str(path) in caplog.text
    written = "".join(texts_of(path))
    spoken = data.train_dataloader().dataset[0][0].tolist()  # type: ignore[index]
    words = spoken[: spoken.index(1) if 1 in spoken else None]
    assert load_tokenizer(str(tiny_folder)).decode(words) in written


def test_settings_are_a_section_of_the_recipe_and_flags(tmp_path: Path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TextDataModule, "data")
    (tmp_path / "recipe.yaml").write_text("data: {generate: {documents: 8, top_p: 0.9}}", encoding="utf-8")
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--data.generate.documents", "64"]
    from_file = parser.parse_args(arguments).data.generate
    from_flag = parser.parse_args(["--data.generate.tokens", "9"]).data.generate
    assert Generate(**vars(from_file)) == Generate(documents=64, top_p=0.9)
    assert Generate(**vars(from_flag)) == Generate(tokens=9)


def test_wrong_settings_are_told_all_at_once():
    with pytest.raises(InputError) as caught:
        Generate(documents=0, tokens=0, batch_size=0, temperature=0, top_p=1.5, top_k=-1, model="")
    fields = ("documents=0", "tokens=0", "batch_size=0", "temperature=0", "top_p=1.5", "top_k=-1", "model is empty")
    assert [field for field in fields if field not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"path": Path(__file__).with_name("x.txt")}, r"data\.path=.* and data\.generate are both set"),
        ({"dataset": "some/set"}, r"data\.dataset='some/set' and data\.generate are both set"),
        ({"generate": Generate(prompts=Path("nowhere.txt"))}, r"data\.generate\.prompts=nowhere\.txt does not exist"),
    ],
)
def test_text_that_is_given_and_written_is_refused(arguments: dict[str, object], words: str):
    with pytest.raises(InputError, match=words):
        TextDataModule(**{"generate": Generate()} | arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["no/such-model", "./nowhere"])
def test_unknown_model_is_refused_in_one_sentence(write: Written, name: str):
    with pytest.raises(InputError, match=f"model '{name}'"):
        write(model=name)


def test_model_without_weights_is_refused(write: Written, tmp_path: Path):
    folder = save_tiny(tmp_path / "model", tiny_llama(1))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"data\.generate\.model: the folder .* holds neither model\.safetensors"):
        write(model=str(folder))


def test_text_longer_than_the_models_positions_is_refused(write: Written, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("x" * 200, encoding="utf-8")
    with pytest.raises(InputError, match=r"tokens=256 behind an opening of 1 tokens .* lower it to 255\."):
        write(tokens=256)
    with pytest.raises(InputError, match=r"of 200 tokens .* lower it to 56 or shorten the longest"):
        write(tokens=57, prompts=prompts)


def test_cache_that_cannot_be_written_is_named(write: Written, cache: Path):
    cache.write_text("a file", encoding="utf-8")
    with pytest.raises(DiskError, match="LCPRUNE_CACHE"):
        write()
