import json

import pytest
from conftest import family_teacher, tiny_teacher

from skill_hf import SkillConfig
from skill_hf.compression.macs import count_macs
from skill_hf.compression.pruning import add_gates, fit_gates, prune
from skill_hf.models.families import build_student
from skill_hf.publishing.run_record import RunRecord
from skill_hf.publishing.run_report import RunReport


@pytest.fixture(scope="module")
def models():
    teacher = tiny_teacher()
    student = build_student(teacher)
    add_gates(student)
    fit_gates(student, teacher.num_parameters() // 2)
    prune(student)
    return student, teacher


def report(models, name=None, **recipe) -> RunReport:
    student, teacher = models
    return RunReport(student, teacher, name, SkillConfig(**recipe), RunRecord(), layer_groups=[[0], [1, 2]])


def test_sparsity_is_that_of_the_budget(models):
    student, teacher = models
    assert report(models).sparsity == 1 - student.num_parameters() / teacher.num_parameters()
    expected = 1 - count_macs(student, 2.0) / count_macs(teacher, 2.0)
    assert report(models, budget="macs", budget_seconds=2.0).sparsity == expected


@pytest.mark.parametrize(("recipe", "cost"), [({}, "parameters"), ({"budget": "macs"}, "macs")])
def test_results_are_plain_values(models, recipe, cost):
    student, teacher = models
    costs = [count_macs(model) if recipe else model.num_parameters() for model in models]
    results = report(models, "some/teacher", **recipe).results()
    assert json.loads(json.dumps(results)) == results
    assert results == {
        "teacher": "some/teacher",
        "teacher_parameters": teacher.num_parameters(),
        "student_parameters": student.num_parameters(),
        f"student_{cost}": costs[0],
        f"teacher_{cost}": costs[1],
        "sparsity": 1 - costs[0] / costs[1],
        "budget": cost,
        "target_sparsity": 0.75,
        "layer_groups": [[0], [1, 2]],
        "record": RunRecord().to_dict(),
    }


def test_statistics_of_batch_norm_are_no_parameters():
    teacher = family_teacher("hubert-batch-norm")
    student = build_student(teacher)
    results = RunReport(student, teacher, None, SkillConfig(), RunRecord()).results()
    assert results["student_parameters"] == results["teacher_parameters"] == teacher.num_parameters()
    assert results["sparsity"] == 0
    assert sum(tensor.numel() for tensor in student.state_dict().values()) > results["student_parameters"]


def test_results_name_no_path(models, tmp_path):
    (tmp_path / "teacher").mkdir()
    for name in (tmp_path / "teacher", str(tmp_path / "teacher")):
        assert report(models, name).results()["teacher"] == "teacher"
    for name in ("", None):
        assert not report(models, name).results()["teacher"]
