"""What `evaluate` and `export` find at a name."""

from pathlib import Path

import pytest
import yaml

from lcprune.cli.subjects import look_at
from lcprune.errors import InputError
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


def test_run_that_has_not_finished_is_named_with_the_way_to_its_student(tmp_path: Path):
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(
        InputError, match=f"exported no student yet: `lcprune export {path} --out {tmp_path}/run/student`"
    ):
        look_at(str(tmp_path / "run"))
