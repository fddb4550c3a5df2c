"""What `evaluate` and `export` find at a name."""

from pathlib import Path

import yaml

from lcprune.cli.subjects import look_at
from lcprune.merging.lineage import MergeHistory
from tests.builders import save_tiny


def test_student_is_found_inside_its_run_and_where_the_run_has_put_it(tmp_path: Path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for place in (run / "student", elsewhere):
        save_tiny(place)
        (place / "history.json").write_text(MergeHistory(6, teacher="teacher").to_json())
    (run / "recipe.yaml").write_text(yaml.safe_dump({"out": str(elsewhere)}))
    found = look_at(str(run))
    assert (Path(found.model), found.home, found.teacher) == (run / "student", run, "teacher")
    (run / "student").rename(tmp_path / "gone")
    found = look_at(str(run))
    assert (Path(found.model), found.home, found.recipe) == (elsewhere, run, run / "recipe.yaml")
