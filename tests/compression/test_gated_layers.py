"""Gates of whole layers, against stock models whose layers are deleted."""

import copy
import json

import pytest
import torch
from conftest import LAYOUTS_OF_HEADS, family_teacher, padded_batch, tiny_config, tiny_teacher
from test_modeling_wavlm_skill_student import assert_same_hidden_states
from test_pruning import num_macs, num_parameters
from test_skill_trainer import Kill, KillAt, make_trainer
from torch import nn
from transformers import AutoModel, TrainerCallback, WavLMForSequenceClassification

from skill_hf import WavLMForSkillStudent, WavLMSkillStudentConfig
from skill_hf.cli.info import describe, format_text
from skill_hf.compression.budgets import MacBudget, ParameterBudget
from skill_hf.compression.layer_dropping import drop_layers
from skill_hf.compression.pruning import cost_after_pruning, cut_closed_units, fit_gates, min_cost
from skill_hf.grouping.layer_distances import layer_distances
from skill_hf.models.families import build_student
from skill_hf.models.properties import student_states
from skill_hf.publishing.model_card import student_card
from skill_hf.publishing.plots import plot_architecture


def without_layers(teacher, dropped):
    stock = copy.deepcopy(teacher)
    kept = [index for index in range(teacher.config.num_hidden_layers) if index not in dropped]
    stock.encoder.layers = nn.ModuleList([stock.encoder.layers[index] for index in kept])
    stock.config.num_hidden_layers = len(kept)
    return stock


def set_gates(student, closed):
    for name, gate in student.named_gates():
        gate.log_alpha.data.fill_(
            -40.0 if name in {f"encoder.layers.{layer}.layer_gate" for layer in closed} else 40.0
        )


@pytest.mark.parametrize("layout", [*LAYOUTS_OF_HEADS, "mms"])
def test_gated_pruned_and_stock_model_are_the_same(layout, tmp_path):
    teacher = family_teacher(layout)
    teacher.eval()
    student = build_student(teacher).eval()
    student(**padded_batch(), output_hidden_states=True)  # now transformers has its own hooks on the layers
    student.add_gates(["layers"])
    assert [name for name, _ in student.named_gates()] == [f"encoder.layers.{layer}.layer_gate" for layer in (1, 2)]
    set_gates(student, [1])
    gated, stock = copy.deepcopy(student), without_layers(teacher, [1])
    with torch.no_grad():
        states = gated(**padded_batch(), output_hidden_states=True).hidden_states
    assert torch.equal(states[1], states[2])
    expected = [cost_after_pruning(student, budget.unit_costs(student)) for budget in (ParameterBudget(), MACS)]
    student.prune()
    assert [num_parameters(student), num_macs(student)] == expected
    assert num_parameters(student) == num_parameters(stock)
    assert (student.config.num_hidden_layers, student.config.remaining_layers) == (2, [0, 2])
    assert_same_hidden_states(gated, student, padded_batch(), atol=1e-6)
    assert_same_hidden_states(stock, student, padded_batch())
    student.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert loaded.config.remaining_layers == [0, 2]
    assert_same_hidden_states(student, loaded, padded_batch(), atol=0)
    assert_same_hidden_states(stock, student.to_stock(), padded_batch())


MACS = MacBudget(0.7, 8_000)


def test_an_undecided_gate_mixes_input_and_output_in_training(layout):
    student = build_student(tiny_teacher(layout)).eval()
    with torch.no_grad():
        plain = student(**padded_batch(), output_hidden_states=True).hidden_states
        student.add_gates(["layers"])
        student.train()
        for module in student.modules():
            module.training = module is student  # noise of the gates, but no dropout
        student.config.apply_spec_augment = False
        student.gating.seed = 0
        for _, gate in student.named_gates():
            gate.log_alpha.data.fill_(-0.3)
        states = student(**padded_batch(), output_hidden_states=True).hidden_states
        value = student.named_gates()[0][1].value
        assert 0 < value < 1
        torch.testing.assert_close(states[2], plain[1] + value * (plain[2] - plain[1]))


def test_open_gates_change_nothing_in_eval_mode():
    teacher = tiny_teacher()
    student = build_student(teacher).eval()
    student.add_gates(["layers"])
    for _, gate in student.named_gates():
        gate.log_alpha.data.fill_(1.0)  # a head's gate would be 0.77 here
    assert_same_hidden_states(teacher, student, padded_batch())


def test_budget_of_layers_and_heads_together(layout):
    student = build_student(tiny_teacher(layout)).eval()
    student.add_gates(["attention_heads", "ffn_dims", "layers"])
    for index, (_, gate) in enumerate(student.named_gates()):
        gate.log_alpha.data = torch.linspace(-1, 2, gate.size) - 0.1 * index
    costs, whole = ParameterBudget().unit_costs(student), num_parameters(build_student(tiny_teacher(layout)))
    wanted = max(whole // 2, min_cost(student, costs))
    fit_gates(student, wanted, costs)
    student.prune()
    assert abs(num_parameters(student) - wanted) < 0.02 * whole
    assert len(student.encoder.layers) == student.config.num_hidden_layers == len(student.config.remaining_layers)


def test_shrinking_moves_the_layers_above(layout):
    student = build_student(tiny_teacher(layout)).eval()
    student.encoder.layers[2].requires_grad_(False)
    student.add_gates(["ffn_dims", "layers"])
    set_gates(student, [1])
    dict(student.named_gates())["encoder.layers.2.feed_forward.dim_gate"].log_alpha.data[3] = -40.0
    gated, before = copy.deepcopy(student), student.state_dict()
    cut = cut_closed_units(student, 0, ParameterBudget().unit_costs(student))
    assert cut.name_of("encoder.layers.1.layer_norm.weight") is None
    assert cut.name_of("encoder.layers.2.feed_forward.dim_gate.log_alpha").startswith("encoder.layers.1.feed_forward")
    gates = {"encoder.layers.1.layer_gate", *(f"encoder.layers.{layer}.feed_forward.dim_gate" for layer in (0, 1))}
    assert {name for name, _ in student.named_gates()} == gates
    assert {parameter.requires_grad for parameter in student.encoder.layers[0].parameters()} == {True}
    frozen = [name for name, parameter in student.encoder.layers[1].named_parameters() if parameter.requires_grad]
    assert all(name.endswith("log_alpha") for name in frozen)
    assert student.encoder.layers[1].final_layer_norm.weight.equal(before["encoder.layers.2.final_layer_norm.weight"])
    assert_same_hidden_states(gated, student, padded_batch(), atol=1e-5)
    student.prune()
    assert_same_hidden_states(gated, student, padded_batch(), atol=1e-5)
    assert student.config.intermediate_sizes[1] == 47


def test_the_first_layer_always_stays():
    student = build_student(tiny_teacher(num_hidden_layers=2)).eval()
    for _ in range(2):
        student.add_gates(["layers"])
        set_gates(student, [1])
        student(**padded_batch())
        student.prune()
        assert student.config.remaining_layers == [0]


# ---- The map of hidden states ----
def test_a_missing_layer_is_stood_for_by_the_one_below():
    config = WavLMSkillStudentConfig(num_hidden_layers=3, remaining_layers=[1, 2, 5])
    assert student_states(config, 7) == [0, 0, 1, 2, 2, 2, 3, 3]
    assert student_states(tiny_config(), 3) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="`remaining_layers` must be ascending indices below 256, but is \\[2, 1\\]"):
        WavLMSkillStudentConfig(num_hidden_layers=2, remaining_layers=[2, 1])
    with pytest.raises(ValueError, match="`remaining_layers` must list one entry for each of 2 layers"):
        WavLMSkillStudentConfig(num_hidden_layers=2, remaining_layers=[1])


def test_distances_of_a_shorter_student(teacher):
    audio = [torch.randn(4000 + 500 * n, generator=torch.Generator().manual_seed(n)).numpy() for n in range(3)]
    student = drop_layers(build_student(teacher).eval(), [1])
    distances = layer_distances(teacher, student, audio, progress=False)["cosine"]
    with torch.no_grad():
        pairs = []
        for clip in map(torch.from_numpy, audio):
            states = [model(clip[None], output_hidden_states=True).hidden_states for model in (teacher, student)]
            pairs.append([(states[0][index][0], states[1][other][0]) for index, other in enumerate((0, 1, 1, 2))])
    joined = [[torch.cat(frames) for frames in zip(*pair, strict=True)] for pair in zip(*pairs, strict=True)]
    expected = [1 - torch.cosine_similarity(*pair).mean().item() for pair in joined]
    assert distances == pytest.approx(expected, abs=1e-5)
    with pytest.raises(
        ValueError, match="The student has the layers \\[0, 2\\] of a teacher, but this one has only 2"
    ):
        layer_distances(student, student, audio, progress=False)


# ---- A whole run ----
RECIPE = {"pruning_units": ["ffn_dims", "layers"], "target_sparsity": 0.35, "shrink_steps": 2, "final_steps": 3}
RECIPE |= {"layer_groups": [[0, 1], [2, 3]], "sparsity_warmup_steps": 2}


class CloseLayer(TrainerCallback):
    """Stands in for hundreds of steps after which the gate of a layer has closed."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        gates = dict(model.student.named_gates()) if model.has_gates else {}
        if state.global_step == 1:
            gates["encoder.layers.1.layer_gate"].log_alpha.data.fill_(-40.0)


@pytest.mark.nightly
def test_a_run_that_removes_a_layer_ends_the_same_after_every_kill(tmp_path, clips):
    def make(name, *callbacks):
        callbacks = [CloseLayer(), *callbacks]
        return make_trainer(tmp_path / name, clips, tiny_teacher(), RECIPE, callbacks, max_steps=8, save_steps=3)

    reference = make("whole")
    reference.train()
    student = reference.model
    assert student.config.remaining_layers == [0, 2]
    assert reference.distiller.student_groups == [[0, 1], [1, 2]]
    assert len(reference.record.layer_distances["cka"]) == 4
    saved = json.loads((tmp_path / "whole" / "checkpoint-3" / "config.json").read_text())
    assert saved["remaining_layers"] == [0, 2]  # it was removed while the run went on
    expected = student.state_dict()
    for step in (4, 7):
        with pytest.raises(Kill):
            make(str(step), KillAt(step)).train()
        trainer = make(str(step))
        trainer.train(resume_from_checkpoint=True)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in trainer.model.state_dict().items())
    reference.save_model(str(tmp_path / "student"))
    assert_same_hidden_states(
        student, WavLMForSkillStudent.from_pretrained(tmp_path / "student").eval(), padded_batch()
    )


def test_a_student_of_fewer_layers_learns_from_the_layers_it_lacks(tmp_path, clips):
    teacher = tiny_teacher()
    student = drop_layers(build_student(teacher), [2])
    trainer = make_trainer(tmp_path, clips, teacher, {"layer_groups": [[1], [2, 3]], "final_steps": 2}, model=student)
    trainer.steps = trainer.skill_config.resolve_steps(9)
    trainer.layer_groups, trainer.distiller = [[1], [2, 3]], None
    batch = {"input_values": torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))}
    distiller = trainer._make_distiller().eval()
    teacher.eval()
    with torch.no_grad():
        states = [model(**batch, output_hidden_states=True).hidden_states for model in (teacher, student.eval())]
        targets = trainer.teacher_targets(**batch)
        losses = distiller(**batch, targets=targets)
    pairs = [(states[1][1], states[0][1]), (states[1][2], (states[0][2] + states[0][3]) / 2)]
    expected = [nn.functional.l1_loss(*pair) - torch.cosine_similarity(*pair, dim=-1).mean() for pair in pairs]
    assert losses["distillation_loss"].item() == pytest.approx(sum(expected).item() / 2, abs=1e-5)


def test_a_teacher_that_lacks_layers_itself_has_layers_of_its_own(tmp_path, clips):
    shorter = drop_layers(build_student(tiny_teacher()), [1])
    assert build_student(shorter).config.remaining_layers == [0, 1]
    trainer = make_trainer(tmp_path, clips, shorter, {"layer_groups": [[0], [1, 2]]})
    trainer.train()
    assert trainer.distiller.student_groups == [[0], [1, 2]]


def test_what_cannot_be(tmp_path, clips):
    deeper = drop_layers(build_student(tiny_teacher(num_hidden_layers=5)), [1, 2])
    with pytest.raises(ValueError, match="`model` has the teacher's layers \\[0, 3, 4\\], but the teacher has only 3"):
        make_trainer(tmp_path, clips, tiny_teacher(), model=deeper)
    weighing = WavLMForSequenceClassification(tiny_config(num_labels=3, use_weighted_layer_sum=True))
    with pytest.raises(ValueError, match="contains layers, but the teacher's head weighs the hidden states of all"):
        make_trainer(tmp_path, clips, weighing, {"pruning_units": ["layers"], "target_sparsity": 0.2})


# ---- What people see ----
def test_card_figure_and_info_name_layers_as_the_teacher_does(tmp_path):
    student = drop_layers(build_student(tiny_teacher()).eval(), [1])
    student.save_pretrained(tmp_path / "student")
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    info = describe(str(tmp_path / "student"), str(tmp_path / "teacher"))
    assert (info["attention_heads"], info["remaining_layers"]) == ([4, 0, 4], [0, 2])
    lines = format_text(info).splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("layer ")) + 1
    assert [line.split()[0] for line in lines[first : first + 3]] == ["1", "2", "3"]
    assert lines[first + 1].count("0 of 4  layer removed") == 1 and lines[first + 1].count("layer removed") == 2
    assert describe(str(tmp_path / "student"))["attention_heads"] == [4, 0, 4]  # without its teacher
    rows = [line for line in str(student_card(student)).splitlines() if line.startswith("| 2 |")]
    assert rows[-2:][0] == "| 2 | 0 of 4 | 0 of 48 |"
    axes = {axes.get_title(): axes for axes in plot_architecture(student.config, tiny_config()).axes}
    assert [bar.get_height() for bar in axes["Attention heads per layer"].containers[1]] == [4, 0, 4]


def test_a_layer_on_top_that_is_missing(tmp_path):
    student = drop_layers(build_student(tiny_teacher()).eval(), [2])
    student.save_pretrained(tmp_path / "student")
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    info = describe(str(tmp_path / "student"), str(tmp_path / "teacher"))
    assert (info["ffn_dims"], info["left"]["parameters"] < 1) == ([48, 48, 0], True)
    assert describe(str(tmp_path / "student"))["ffn_dims"] == [48, 48]
    axes = {axes.get_title(): axes for axes in plot_architecture(student.config, tiny_config()).axes}
    assert [bar.get_height() for bar in axes["Feed-forward units per layer"].containers[1]] == [48, 48, 0]
