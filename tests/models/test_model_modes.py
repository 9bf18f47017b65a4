import pytest
from conftest import tiny_teacher
from torch import nn

from skill_hf.models.families import build_student
from skill_hf.models.model_modes import eval_mode, padding_ignored


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_gets_its_own_mode_back(fails):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.ReLU()))
    model[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    try:
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("fails", [False, True])
def test_only_students_have_a_setting_for_padding_and_get_it_back(fails):
    teacher, student, other = tiny_teacher(), build_student(tiny_teacher()), build_student(tiny_teacher())
    other.config.masked_group_norm = True
    assert student.config.masked_group_norm is False
    try:
        with padding_ignored(teacher, student, other):
            assert student.config.masked_group_norm and other.config.masked_group_norm
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert student.config.masked_group_norm is False and other.config.masked_group_norm is True
    assert not hasattr(teacher.config, "masked_group_norm")
