"""The report: one file that needs nothing else, every text escaped, everything that is missing named."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lcprune.delivery import pictures, plots, report, runs
from lcprune.delivery.likeness import Inside, Likeness
from lcprune.delivery.plots import Spot, unbeaten
from lcprune.delivery.samples import Sample
from lcprune.delivery.sections import Look
from lcprune.delivery.wording import aligned, change, count, number, retained
from lcprune.errors import InputError
from lcprune.merging.heatmaps import WeightDistances
from lcprune.merging.lineage import MergeHistory
from tests.delivery.run_folders import METRICS, figures, six_to_three, step, write

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


class Elements(HTMLParser):
    """Every element's name and attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page(folder: Path, look: Look | None = None) -> str:
    report.write([(runs.read(folder), Look() if look is None else look)], folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def inside(layers: int) -> Inside:
    pairs = tuple((1.0, 2.0) for _ in range(layers - 1))
    cosines = tuple(tuple(0.5 + 0.5 * (a == b) for a in range(layers + 1)) for b in range(layers + 1))
    return Inside(cosines, WeightDistances(("self_attn.q_proj.weight", "mlp.up_proj.weight"), pairs, pairs))


def full_look() -> Look:
    likeness = Likeness(128, inside(6), inside(3), (0.99, 0.9, 0.95))
    return Look(likeness, (0.98, 0.7, 0.6), (Sample("Once", " upon a time", " in a while"),))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a report of everything; read only."""
    folder = write(tmp_path_factory.mktemp("whole") / "run")
    page(folder, full_look())
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures: most of a report's time goes into them."""
    monkeypatch.setattr(pictures, "missing", lambda: "matplotlib, pip install 'lcprune[report]'.")


def test_page_needs_no_network_and_no_second_file(whole: Path):
    elements = Elements((whole / "report.html").read_text()).found
    links = [
        attributes[name] or ""
        for _, attributes in elements
        for name in ("src", "srcset", "href", "data", "poster", "xlink:href")
        if name in attributes
    ]
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in elements}
    assert not re.search(r"@import|url\(", (whole / "report.html").read_text())


def test_pictures_are_in_the_page_in_both_themes_and_beside_it_as_png(whole: Path):
    names = {path.name for path in whole.glob("report-*.png")}
    assert names == {
        f"report-{name}.png"
        for name in (
            *("loss", "perplexity", "kinship"),
            *("stream-teacher", "stream-student", "weights-teacher", "weights-student"),
        )
    }
    assert all((whole / name).read_bytes().startswith(b"\x89PNG") for name in names)
    tags = [tag for tag, _ in Elements((whole / "report.html").read_text()).found]
    assert tags.count("img") == tags.count("source") == len(names)


def test_every_picture_says_what_it_shows(whole: Path):
    pictures_ = [attributes for tag, attributes in Elements((whole / "report.html").read_text()).found if tag == "img"]
    assert all(attributes["alt"] for attributes in pictures_)


def test_title_has_the_model_and_its_depth_before_and_after(whole: Path):
    text = Elements((whole / "report.html").read_text()).text
    assert "six-layers: 6 \N{RIGHTWARDS ARROW} 3 layers" in text
    for figure in ("600.0 K", "1.50\N{MULTIPLICATION SIGN}", "22.00", "75.0%", "40.0%"):
        assert figure in text


def test_tree_is_in_the_page_and_beside_it(whole: Path):
    drawn = (whole / "report-tree.svg").read_text()
    assert drawn.startswith("<svg")
    assert len(re.findall(r'class="num teacher"', (whole / "report.html").read_text())) == 6


def test_tokens_are_counted_by_the_recipe(whole: Path):
    run = runs.read(whole)
    assert run.tokens_per_step == 32 * 4 * 2
    assert "4 steps on 1,024 tokens" in (whole / "report.html").read_text()


@pytest.mark.parametrize(
    ("devices", "tokens"), [("2", 512), ("'4'", 1024), ("[0, 1]", 512), ("auto", None), ("-1", None)]
)
def test_tokens_are_not_guessed_where_the_machine_decides(tmp_path: Path, devices: str, tokens: int | None):
    trainer = f"{{accelerator: gpu, devices: {devices}, num_nodes: 1, accumulate_grad_batches: 2}}"
    folder = write(tmp_path / "run", recipe__yaml=f"trainer: {trainer}\ndata: {{block_size: 32, batch_size: 4}}\n")
    assert runs.read(folder).tokens_per_step == tokens


@pytest.mark.usefixtures("undrawn")
def test_text_from_data_is_escaped_wherever_it_comes_from(tmp_path: Path):
    operator = {"class_path": EVIL}
    history = MergeHistory(6, (step(1, 2, at=0, operator=operator, scores={EVIL: 1.0}),), teacher=EVIL)
    folder = write(
        tmp_path / "<b>run",
        history,
        recipe__yaml=f"# {EVIL}\nmodel: {{teacher: '{EVIL}'}}\n",
        evaluation__json=json.dumps({"models": {"student": {"tasks": {EVIL: {EVIL: 0.5}}}}}),
    )
    look = Look(samples=(Sample(EVIL, EVIL, EVIL),), missing=(EVIL,))
    elements = Elements(page(folder, look))
    tags = [tag for tag, _ in elements.found]
    assert "script" not in tags
    assert tags.count("b") == 2  # ours, over the sample
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert elements.text.count(EVIL) >= 8


def test_names_from_data_never_become_paths(tmp_path: Path):
    history = MergeHistory(6, (step(1, 2, at=0),), teacher="../../outside")
    folder = write(tmp_path / "a" / "run", history)
    page(folder, full_look())
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"run"}


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("recipe__yaml", "there is no recipe.yaml"),
        ("metrics__csv", "no metrics in metrics.csv"),
        ("figures__json", "there is no figures.json"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_missing_file_is_named_in_the_report(tmp_path: Path, missing: str, sentence: str):
    assert sentence in page(write(tmp_path / "run", **{missing: None}))


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ({"figures__json": "{"}, "figures.json is not what lcprune fit writes"),
        ({"figures__json": '{"teacher": 3}'}, "figures.json is not what lcprune fit writes"),
        ({"recipe__yaml": "- just\n- a list\n"}, "recipe.yaml is not a YAML mapping"),
        ({"recipe__yaml": "a: [1"}, "recipe.yaml is not a YAML mapping"),
        ({"metrics__csv": "nothing"}, "no metrics in metrics.csv"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_broken_file_is_named_in_the_report(tmp_path: Path, broken: dict[str, str], sentence: str):
    assert sentence in page(write(tmp_path / "run", **broken))


@pytest.mark.usefixtures("undrawn")
def test_speeds_that_were_not_measured_are_left_out(tmp_path: Path):
    said = json.dumps({**figures(six_to_three()), "speed": {}})
    timed = Elements(page(write(tmp_path / "timed"))).text
    untimed = Elements(page(write(tmp_path / "untimed", figures__json=said))).text
    assert "tokens/s, was" in timed
    assert "tokens/s, was" not in untimed


def test_run_without_merges_says_so(tmp_path: Path):
    text = Elements(page(write(tmp_path / "run", MergeHistory(6, teacher="a/b")))).text
    assert "b: 6 layers, none merged" in text
    assert "no layers were merged" in text


@pytest.mark.usefixtures("undrawn")
def test_resumed_and_diverged_runs_say_so(tmp_path: Path):
    more = METRICS + "3.0,0,4,nan,nan,,,\n"
    shown = page(write(tmp_path / "run", metrics__1__csv=METRICS, metrics__csv=more.replace(",0,0,", ",0,9,")))
    assert "resumed at step 0" in shown
    assert "The loss from step 5 on: it was no finite number" in shown


@pytest.mark.usefixtures("undrawn")
def test_report_without_matplotlib_has_everything_but_the_pictures(tmp_path: Path):
    elements = Elements(page(write(tmp_path / "run"), full_look()))
    assert "pip install 'lcprune[report]'" in elements.text
    assert "Family tree" in elements.text
    assert "img" not in [tag for tag, _ in elements.found]


def test_folder_that_is_no_run_is_refused_in_one_sentence(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"{folder.name} is no run: name a folder that lcprune fit"):
            runs.read(folder)


EVALUATION = {
    "models": {
        "teacher": {
            "perplexity": 20.0,
            "tasks": {"piqa": {"acc": 0.648, "acc_norm": 0.65, "rows": 1000, "stderr": 0.0151}},
            "tokens_per_second": {"decode": 30.0},
        },
        "student": {
            "perplexity": 25.0,
            "tasks": {"piqa": {"acc": 0.619, "acc_norm": 0.62, "rows": 1000, "stderr": None}},
            "tokens_per_second": {"decode": 45.0},
        },
    },
    "agreement": {"top1": 0.75, "kl": 0.3},
    "retained": {"piqa": 0.9, "arc_easy": 0.8, "perplexity_ratio": 1.25},
}


@pytest.mark.usefixtures("undrawn")
def test_evaluation_is_shown_task_by_task_with_what_was_retained(tmp_path: Path):
    text = Elements(page(write(tmp_path / "run", evaluation__json=json.dumps(EVALUATION)))).text
    assert "piqa acc0.64800.01510.619095.5%" in text
    assert "tokens/s, decode30.0045.00150.0%" in text
    assert "piqa rows" not in text


def test_tasks_kept_is_the_mean_over_the_tasks():
    assert retained(EVALUATION) == pytest.approx(0.85)
    assert retained(None) is None


@pytest.mark.parametrize("evaluation", ["[]", "{}", '{"models": 3}', '{"models": {"student": {"tasks": 1}}}', "{"])
@pytest.mark.usefixtures("undrawn")
def test_strange_evaluation_is_left_out(tmp_path: Path, evaluation: str):
    assert "As lcprune evaluate measured it" not in page(write(tmp_path / "run", evaluation__json=evaluation))


def test_several_runs_are_compared_first_and_keep_their_files_apart(tmp_path: Path):
    history = six_to_three()
    folders = [
        write(tmp_path / name, figures__json=json.dumps(figures(history, perplexity, parameters)))
        for name, perplexity, parameters in (("small", 30.0, 500_000), ("large", 22.0, 800_000))
    ]
    out = tmp_path / "both.html"
    report.write([(runs.read(folder), Look()) for folder in folders], out)
    text = Elements(out.read_text()).text
    assert text.index("2 runs compared") < text.index("six-layers: 6")
    assert "1  small" in text
    assert "50.0%" in text
    assert {"both-size.png", "both-speed.png", "both-1-loss.png", "both-2-loss.png", "both-2-tree.svg"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_frontier_joins_what_no_other_beats_in_both():
    spots = [Spot("0", 1.0, 1.0), Spot("1", 0.8, 1.1), Spot("2", 0.9, 1.2), Spot("3", 0.7, 1.5), Spot("4", 0.7, 1.5)]
    assert [spot.mark for spot in unbeaten(spots, -1)] == ["3", "4", "1", "0"]
    assert [spot.mark for spot in unbeaten(spots, 1)] == ["0"]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (999.0, "999"), (12_800.0, "12.8k"), (3e6, "3M"), (1.5e9, "1.5B")]
)
def test_tokens_are_written_short(value: float, shown: str):
    assert plots.short(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(16.55, "16.55"), (1204.4, "1,204"), (194.13, "194.1"), (3.1e7, "3.1e+07"), (None, "\N{EN DASH}")],
)
def test_number_has_the_digits_that_tell_something(value: float | None, shown: str):
    assert number(value) == shown


def test_column_of_figures_has_the_same_decimals_throughout():
    assert aligned([0.0202, -0.00239, None]) == ["0.02020", "\N{MINUS SIGN}0.00239", "\N{EN DASH}"]
    assert aligned([2571.2, 31.5]) == ["2,571", "32"]
    assert aligned([]) == []


def test_counts_and_changes_are_written_for_people():
    assert [count(value) for value in (40_256, 113_300_000, 44_390_243_902)] == ["40.3 K", "113.3 M", "44.4 B"]
    assert [change(24, 30), change(6, 5), change(3, 3)] == ["\N{MINUS SIGN}20.0%", "+20.0%", "0.0%"]
