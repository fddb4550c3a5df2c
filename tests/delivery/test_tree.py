"""The family tree: every layer once, every merge where and when it happened."""

import re

import pytest

from lcprune.delivery.page import svg
from lcprune.delivery.tree import colors, family_tree
from lcprune.merging.lineage import MergeHistory
from tests.delivery.run_folders import DROP, six_to_three, step

LADDER = MergeHistory(80, tuple(step(at, at + 1, at=3 * at) for at in range(10, 40)))


@pytest.mark.parametrize("history", [MergeHistory(4), six_to_three(), LADDER])
def test_tree_names_every_teacher_layer_exactly_once_and_every_student_layer(history: MergeHistory):
    drawn = svg(family_tree(history))
    assert re.findall(r'class="num teacher"[^>]*>(\d+)<', drawn) == [str(n) for n in range(history.teacher_depth)]
    assert re.findall(r'class="num student"[^>]*>(\d+)<', drawn) == [str(n) for n in range(history.depth)]


@pytest.mark.parametrize("history", [MergeHistory(4), six_to_three(), LADDER])
def test_leaves_descend_as_the_lineage_says(history: MergeHistory):
    assert tuple(leaf.ancestors for leaf in family_tree(history).leaves) == history.lineage


def test_every_teacher_layer_has_one_line_that_begins_at_its_own_row():
    lines = [line for line in family_tree(six_to_three()).lines if line.begin == 0]
    assert sorted(line.row for line in lines) == [0, 1, 2, 3, 4, 5]


def test_merged_layer_lies_in_the_middle_of_its_ancestors():
    assert [leaf.row for leaf in family_tree(six_to_three()).leaves] == [0.5, 3.0, 5.0]


def test_merges_of_one_step_are_one_stage_with_the_depth_it_leads_to():
    assert [(stage.global_step, stage.depth) for stage in family_tree(six_to_three()).stages] == [(0, 5), (2, 3)]


def test_merge_of_what_merged_in_the_same_stage_gets_a_column_further_on():
    tree = family_tree(MergeHistory(6, (step(3, 4), step(0, 1), step(1, 2, 3))))
    assert [joint.column for joint in tree.joints] == [1, 1, 2]
    assert len(tree.stages) == 1


def test_members_whose_weights_an_operator_leaves_out_are_dashed():
    lines = family_tree(MergeHistory(3, (step(0, 1, operator=DROP),))).lines
    assert {line.row: line.kept for line in lines if line.begin == 0} == {0: True, 1: False, 2: True}
    assert not family_tree(six_to_three()).leaves_out


def test_operator_of_a_strange_history_is_not_imported_to_draw_it():
    strange = {"class_path": "nowhere.to.be.found.Average"}
    assert "(Average)" in svg(family_tree(MergeHistory(3, (step(0, 1, operator=strange),))))


def test_headings_are_few_enough_for_a_telephone_and_end_with_the_last_stage():
    headings = family_tree(LADDER).headings
    assert len(headings) <= 5
    assert headings[-1][1] == family_tree(LADDER).stages[-1]


def test_colors_go_from_the_first_to_the_last_of_the_scale():
    assert colors(1) == ["#0072B2"]
    assert (colors(9)[0], colors(9)[4], colors(9)[8]) == ("#0072B2", "#C9608F", "#E69F00")
    assert len(set(colors(30))) == 30
