"""Weights of groups and normalised states, against direct computations."""

import copy

import numpy as np
import pytest
import torch
from conftest import family_teacher, tiny_teacher
from test_skill_trainer import Kill, KillAt, make_trainer
from torch.nn import functional as F
from transformers import AutoModel

from skill_hf import SkillConfig
from skill_hf.data import calibration_waveforms
from skill_hf.losses import sparsity_at
from skill_hf.models.families import build_student
from skill_hf.models.modeling_wavlm_skill_student import WavLMForSkillStudent


GROUPS = [[0], [1, 2, 3]]
BATCH = {"input_values": torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))}


def made(tmp_path, clips, recipe, student=None, teacher=None):
    """A trainer with the groups of `GROUPS` and a distiller without gates, in eval mode."""
    recipe = {"layer_groups": GROUPS, **recipe}
    trainer = make_trainer(tmp_path, clips, teacher or tiny_teacher(), recipe, model=student)
    trainer.steps = trainer.skill_config.resolve_steps(9)
    trainer._setup()
    trainer.distiller = trainer._make_distiller().eval()
    return trainer


def other_student():
    """A student that differs from its teacher."""
    student = build_student(tiny_teacher())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return student


@torch.no_grad()
def states_of(*models):
    return [copy.deepcopy(model).eval()(**BATCH, output_hidden_states=True).hidden_states for model in models]


def term(prediction, target):
    return (F.l1_loss(prediction, target) - F.cosine_similarity(prediction, target, dim=-1).mean()).item()


def mean(states, group):
    return torch.stack([states[index] for index in group]).mean(0)


def loss_of(trainer, **kwargs):
    with torch.no_grad():
        targets = trainer.teacher_targets(**BATCH)
        return trainer.distiller(**BATCH, targets=targets, **kwargs)["distillation_loss"].item()


@pytest.mark.parametrize(
    ("recipe", "weights"),
    [
        ({}, (1 / 2, 1 / 2)),
        ({"group_weights": "size"}, (1 / 4, 3 / 4)),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_weights_of_groups(recipe, weights, tmp_path, clips):
    student = other_student()
    trainer = made(tmp_path, clips, recipe, student)
    theirs, ours = states_of(tiny_teacher(), student)
    expected = [term(mean(ours, group), mean(theirs, group)) for group in GROUPS]
    assert loss_of(trainer) == pytest.approx(
        sum(weight * one for weight, one in zip(weights, expected, strict=True)), abs=1e-5
    )


@pytest.mark.parametrize("layout", ["base", "large"])
def test_normalised_states(layout, tmp_path, clips):
    teacher, student = tiny_teacher(layout), build_student(tiny_teacher(layout))
    with torch.no_grad():
        for parameter in student.encoder.parameters():
            parameter *= 1.05
    trainer = made(tmp_path, clips, {"normalize_states": True}, student, teacher)
    config = trainer.skill_config
    heard = calibration_waveforms(clips, config.calibration_samples, config.calibration_seconds, 42, **trainer.reading)
    with torch.no_grad():
        passes = [
            teacher(torch.as_tensor(np.asarray(clip))[None].float(), output_hidden_states=True).hidden_states
            for clip in heard
        ]
    frames = [torch.cat([states[index][0] for states in passes]) for index in range(4)]
    theirs, ours = states_of(teacher, student)
    normed = [
        [
            (state - all_frames.mean(0)) / all_frames.std(0, correction=0)
            for state, all_frames in zip(states, frames, strict=True)
        ]
        for states in (theirs, ours)
    ]
    expected = [term(mean(normed[1], group), mean(normed[0], group)) for group in GROUPS]
    assert loss_of(trainer) == pytest.approx(sum(expected) / 2, abs=1e-4)


@pytest.mark.parametrize("recipe", [{"normalize_states": True}, {"group_weights": "size"}], ids=str)
def test_a_copy_of_the_teacher_predicts_exactly(recipe, tmp_path, clips):
    assert loss_of(made(tmp_path, clips, recipe)) == pytest.approx(-1, abs=1e-5)


EVERYTHING = {"group_weights": "size", "normalize_states": True, "num_clusters": 2}


def test_a_run_with_all_of_it_resumes_to_the_same_student(tmp_path, clips):
    recipe = EVERYTHING | {"shrink_steps": 2, "final_steps": 3, "sparsity_warmup_steps": 3}
    reference = make_trainer(tmp_path / "whole", clips, recipe=recipe)
    reference.train()
    expected = reference.model.state_dict()
    for step in (3, 7):
        with pytest.raises(Kill):
            make_trainer(tmp_path / str(step), clips, recipe=recipe, callbacks=[KillAt(step)]).train()
        trainer = make_trainer(tmp_path / str(step), clips, recipe=recipe)
        trainer.train(resume_from_checkpoint=True)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in trainer.model.state_dict().items())
    reference.save_model(str(tmp_path / "student"))
    assert isinstance(AutoModel.from_pretrained(tmp_path / "student"), WavLMForSkillStudent)


@pytest.mark.parametrize(
    "targets, projections, number",
    [("average", None, 2), ("average", False, 0), ("separate", None, 2), ("separate", True, 4)],
)
def test_with_two_teachers(targets, projections, number, tmp_path, clips):
    recipe = EVERYTHING | {"teacher_targets": targets, "use_projections": projections, "final_steps": 3}
    trainer = make_trainer(tmp_path, clips, [tiny_teacher(), family_teacher("hubert-base")], recipe)
    trainer.train()
    assert len(trainer.distiller.state_norms) == 2
    assert len(trainer.distiller.projections) == number
    assert sum(trainer.distiller.weights_of_groups()) == pytest.approx(1)


def test_sparsity_rises_linearly():
    steps = [0, 1, 2, 4, 9]
    assert [sparsity_at(step, 0.8, 4) for step in steps] == pytest.approx([0, 0.2, 0.4, 0.8, 0.8])
    assert [sparsity_at(step, 0.8, 4, start=0.4) for step in steps] == pytest.approx([0.4, 0.5, 0.6, 0.8, 0.8])
    assert sparsity_at(0, 0.8, 0) == 0.8


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"group_weights": "depth"}, "`group_weights` must be one of equal, size, but is 'depth'"),
        ({"student_layers": "all"}, "`student_layers` must be one of group, last, but is 'all'"),
    ],
)
def test_values_that_are_none(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SkillConfig(**kwargs)
