"""Any recipe gives objects or one InputError, never a traceback; no weights are loaded on the way."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lcprune.cli import recipe_files
from lcprune.cli.training import RecipeCLI, collapse_of
from lcprune.errors import InputError
from tests.cli.recipe import recipe, text_file

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.sampled_from([10**400, -1, 0.5, 1e308, float("nan"), float("inf")])
    | st.sampled_from(
        ["", "x", "os.system", "Drop", "Evenly", "torch.optim.SGD", "ä\u2028", "../..", "null", "1e3", "[1"]
    )
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["class_path", "init_args", "x"]), inner)
    ),
    max_leaves=5,
)
places = st.lists(st.integers(0, 9), min_size=1, max_size=5)


def mutate(content: object, place: list[int], value: object) -> None:
    """Gives another value to the entry that is found by walking down by these numbers, or takes it away."""
    *above, last = place
    for number in above:
        inner = list(content.values() if isinstance(content, dict) else content if isinstance(content, list) else ())
        inner = [each for each in inner if isinstance(each, dict | list) and each]
        if not inner:
            break
        content = inner[number % len(inner)]
    assert isinstance(content, dict | list)
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = keys[last % len(keys)]
    if value == "x":
        del content[key]
    else:
        content[key] = value


@pytest.fixture(scope="module")
def good(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("fuzz")
    return recipe(tiny_folder, text_file(folder), folder / "run")


def assert_made_or_refused(good: dict[str, object], folder: Path, changes: list[tuple[list[int], object]]) -> None:
    content = copy.deepcopy(good)
    for place, value in changes:
        if content:
            mutate(content, place, copy.deepcopy(value))
    path = folder / "mutated.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    try:
        cli = RecipeCLI(["--config", str(path)], run=False)
        collapse_of(cli).check(cli.trainer, cli.model)
    except InputError as error:
        assert str(error).strip()  # noqa: PT017 - or it is a recipe, and there is nothing to compare
        assert "\n" not in str(error)  # noqa: PT017


changes = st.lists(st.tuples(places, values), min_size=1, max_size=2)
checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


# A wrong name is looked up, and libraries warn of what they find.
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=12, deadline=None, suppress_health_check=checks)
@given(changes)
def test_any_recipe_is_made_or_refused(good: dict[str, object], tmp_path: Path, changes: list):
    assert_made_or_refused(good, tmp_path, changes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400, deadline=None, derandomize=False, suppress_health_check=checks)
@given(changes)
def test_any_recipe_is_made_or_refused_at_length(good: dict[str, object], tmp_path: Path, changes: list):
    assert_made_or_refused(good, tmp_path, changes)


@settings(suppress_health_check=checks, deadline=None)
@given(st.text(max_size=60) | st.binary(max_size=60))
def test_any_file_is_a_recipe_or_refused(tmp_path: Path, content: str | bytes):
    path = tmp_path / "any.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        recipe_files.check(path)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
