import copy
import logging

import datasets
import numpy as np
import pytest
import torch
from conftest import noise_clips, padded_batch, tiny_teacher
from processes import run_in_processes
from safetensors.torch import load_file
from test_modeling_wavlm_skill_student import assert_same_hidden_states
from test_pruning import ALL_UNITS, BUDGETS, cost_of, gated_student
from test_skill_trainer import Kill, KillAt, make_trainer
from transformers import TrainerCallback

from skill_hf import SkillConfig, WavLMForSkillStudent
from skill_hf.compression.budgets import ParameterBudget
from skill_hf.compression.gates import OPEN_SHIFT
from skill_hf.compression.pruning import (
    CLOSED_PROBABILITY,
    cost_after_pruning,
    cut_closed_units,
    expected_cost,
    num_parameters,
)
from skill_hf.distillation.optimization import check_optimizer
from skill_hf.distillation.shrinking import cut_optimizer_state
from skill_hf.distillation.throughput import TIMINGS
from skill_hf.models.families import build_student


# Gates of a tiny student that lose all of their units, beside half of the units of every other one.
EMPTIED = ("encoder.layers.0.attention.head_gate", "encoder.layers.1.attention.block_gate")
EMPTIED += ("encoder.layers.1.feed_forward.dim_gate", "encoder.layers.2.feed_forward.block_gate")


def without_timings(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in TIMINGS}


def close(student, share=2):
    """Closes `EMPTIED` and every `share`-th unit of the other gates, so far that they are shut in every sample."""
    with torch.no_grad():
        for name, gate in student.named_gates():
            if name in EMPTIED:
                gate.log_alpha.fill_(-40)
            elif gate.size > 1:
                gate.log_alpha[::share] = -40


def half_closed_student(layout="base"):
    """The others are open, but for some in between that are only more likely to be open than not."""
    student = gated_student(layout)
    for _, gate in student.named_gates():
        gate.log_alpha.data = 40 * gate.log_alpha.abs()
        gate.log_alpha.data[-1] = 0.5
    close(student)
    return student


def parameter_costs(student):
    return ParameterBudget().unit_costs(student)


def test_shrunk_equals_gated(layout):
    student = half_closed_student(layout).train()
    gated = copy.deepcopy(student)
    state = torch.get_rng_state()
    before = {name: cost_after_pruning(student, costs.unit_costs(student)) for name, (costs, _) in BUDGETS.items()}
    expected = {name: expected_cost(student, costs.unit_costs(student)) for name, (costs, _) in BUDGETS.items()}
    assert cut_closed_units(student, 0, parameter_costs(student)) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert num_parameters(student) < 0.5 * num_parameters(gated)
    assert student.config.remaining_heads == [[], [], [1, 3]]
    assert student.config.intermediate_sizes == [24, 0, 0]
    assert student.config.removed_attention_blocks == [1]
    assert student.config.removed_ffn_blocks == [2]
    assert list(student.config.conv_dim) == [8] * 7
    for name, (budget, _) in BUDGETS.items():
        costs = budget.unit_costs(student)
        assert cost_after_pruning(student, costs) == before[name]
        torch.testing.assert_close(expected_cost(student, costs), expected[name], rtol=1e-9, atol=0)
    assert student.training
    assert_same_hidden_states(gated.eval(), student.eval(), padded_batch(), atol=1e-5)
    # Another cut finds nothing; the last one leaves what it would have left.
    assert cut_closed_units(student, 0, parameter_costs(student)) is None
    student.prune()
    gated.prune()
    expected, actual = gated.state_dict(), student.state_dict()
    assert student.config.to_dict() == gated.config.to_dict()
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


def test_a_shrunk_student_is_made_like_one_from_its_config(layout):
    """In the same order: that of the optimizer's state, and of the draws from one seed."""
    student = half_closed_student(layout)
    cut_closed_units(student, 0, parameter_costs(student))
    fresh = WavLMForSkillStudent(copy.deepcopy(student.config))
    fresh.add_gates(ALL_UNITS)
    shapes = [[(name, value.shape) for name, value in model.named_parameters()] for model in (student, fresh)]
    assert shapes[0] == shapes[1]
    assert student.gating.gates == [gate for _, gate in student.named_gates()]
    assert [gate.min_open for gate in student.gating.gates] == [gate.min_open for gate in fresh.gating.gates]


def test_a_shrunk_student_trains():
    student = half_closed_student().train()
    student.freeze_feature_encoder()
    student.config.apply_spec_augment = False
    cut_closed_units(student, 0, parameter_costs(student))
    student(**padded_batch()).last_hidden_state.square().mean().backward()
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad != name.startswith("feature_extractor"), name
    assert student.encoder.layers[0].feed_forward.dim_gate.log_alpha.grad.abs().sum() > 0


def test_moments_follow_their_weights(layout):
    student = half_closed_student(layout)
    projection = torch.nn.Linear(3, 2)
    before = dict(student.named_parameters())
    optimizer = torch.optim.AdamW([{"params": [*before.values()]}, {"params": projection.parameters(), "lr": 7.0}])
    for parameter in [*before.values(), *projection.parameters()]:
        parameter.grad = torch.ones_like(parameter)
    before["masked_spec_embed"].grad = None  # no step, no state
    optimizer.step()
    for parameter in before.values():
        if parameter in optimizer.state:
            optimizer.state[parameter]["exp_avg"] = parameter.detach().clone()
            optimizer.state[parameter]["exp_avg_sq"] = 2 * parameter.detach()
    weights = {name: parameter.detach().clone() for name, parameter in before.items()}
    cut = cut_closed_units(student, 0, parameter_costs(student))
    cut_optimizer_state(optimizer, before, student, cut)

    after = dict(student.named_parameters())
    assert optimizer.param_groups[0]["params"] == [*after.values()]
    assert optimizer.param_groups[1]["params"] == [*projection.parameters()]
    assert optimizer.state.keys() == {*after.values(), *projection.parameters()} - {student.masked_spec_embed}
    for name, parameter in after.items():
        if parameter in optimizer.state:
            state = optimizer.state[parameter]
            assert torch.equal(state["exp_avg"], parameter), name
            assert torch.equal(state["exp_avg_sq"], 2 * parameter), name
            assert state["step"] == 1
    # By hand: odd channels, heads 1 and 3 of layer 2, odd units of layer 0, the bias that all heads of it have left.
    odd, rows = slice(1, None, 2), torch.cat([torch.arange(8, 16), torch.arange(24, 32)])
    by_hand = {
        "feature_extractor.conv_layers.3.conv.weight": lambda weight: weight[odd, odd],
        "feature_extractor.conv_layers.3.channel_gate.log_alpha": lambda weight: weight[odd],
        "feature_projection.layer_norm.bias": lambda weight: weight[odd],
        "feature_projection.projection.weight": lambda weight: weight[:, odd],
        "encoder.layers.2.attention.q_proj.weight": lambda weight: weight[rows],
        "encoder.layers.2.attention.out_proj.weight": lambda weight: weight[:, rows[odd]],  # odd dimensions of values
        "encoder.layers.2.attention.gru_rel_pos_const": lambda weight: weight[:, odd],
        "encoder.layers.2.attention.head_gate.log_alpha": lambda weight: weight[odd],
        "encoder.layers.0.feed_forward.output_dense.weight": lambda weight: weight[:, odd],
        "encoder.layers.0.attention.rel_attn_embed.weight": lambda weight: weight,
    }
    for name, indexed in by_hand.items():
        assert torch.equal(optimizer.state[after[name]]["exp_avg"], indexed(weights[name])), name
    bias = after["encoder.layers.0.attention.output_bias.bias"]
    assert torch.equal(optimizer.state[bias]["exp_avg"], weights["encoder.layers.0.attention.out_proj.bias"])


def log_alpha_of(probability):
    return torch.logit(torch.tensor(probability)).item() + OPEN_SHIFT


def open_student(**kwargs):
    student = build_student(tiny_teacher(**kwargs))
    student.add_gates()
    for _, gate in student.named_gates():
        gate.log_alpha.data.fill_(40.0)
    return student


def test_what_is_closed_for_good():
    student = open_student(intermediate_size=120)
    gates = dict(student.named_gates())
    likely, unlikely = log_alpha_of(1.1 * CLOSED_PROBABILITY), log_alpha_of(0.9 * CLOSED_PROBABILITY)
    gates["encoder.layers.0.feed_forward.dim_gate"].log_alpha.data[:5] = torch.tensor([likely] * 2 + [unlikely] * 3)
    # None is likely, but one of 120 is open, also out of training.
    gates["encoder.layers.1.feed_forward.dim_gate"].log_alpha.data.fill_(unlikely)
    # No features without a channel.
    gates["feature_extractor.conv_layers.2.channel_gate"].log_alpha.data.fill_(-40.0)
    cut_closed_units(student, 0, parameter_costs(student))
    assert student.config.intermediate_sizes == [117, 1, 120]
    assert list(student.config.conv_dim) == [16, 16, 1, 16, 16, 16, 16]


def test_no_less_is_left_than_the_target_asks_for():
    student = open_student()
    costs, whole = parameter_costs(student), num_parameters(student)
    gate = dict(student.named_gates())["encoder.layers.1.feed_forward.dim_gate"]
    ffn_dim = cost_of(costs, "encoder.layers.1.feed_forward.dim_gate")
    gate.log_alpha.data = torch.linspace(-60, -20, 48)
    assert cost_after_pruning(student, costs) == whole - 48 * ffn_dim
    assert cut_closed_units(student, whole, costs) is None
    assert num_parameters(student) == whole
    cut_closed_units(student, whole - 10 * ffn_dim - 1, costs)
    assert num_parameters(student) == whole - 10 * ffn_dim
    # The likeliest stay.
    left = dict(student.named_gates())["encoder.layers.1.feed_forward.dim_gate"].log_alpha
    assert torch.equal(left, torch.linspace(-60, -20, 48)[10:])


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_optimizers_that_can_be_cut(cls):
    check_optimizer(cls, {"lr": 0.1}, torch.device("cpu"), "FSDP", "use data parallelism")


def test_widths_stay_multiples(layout):
    student = build_student(tiny_teacher(layout)).eval()
    student.add_gates(ALL_UNITS[:3], width_multiple=8)
    for name, gate in student.named_gates():
        gate.log_alpha.data.fill_(40.0)
        if name.endswith("dim_gate"):
            gate.log_alpha.data[5:] = -40.0
            gate.log_alpha.data[:5] = 0.2  # five likely ones: 4.3 expected, a multiple of one half
        elif name.endswith("channel_gate"):
            gate.log_alpha.data[:3] = -40.0
    before = {name: gate.num_open() for name, gate in student.named_gates()}
    expected = student(**padded_batch()).last_hidden_state
    assert cut_closed_units(student, 0, parameter_costs(student)) is not None
    assert {name: gate.num_open() for name, gate in student.named_gates()} == before
    torch.testing.assert_close(student(**padded_batch()).last_hidden_state, expected, atol=1e-5, rtol=0)
    assert all(gate.size % 8 == 0 for name, gate in student.named_gates() if not name.endswith("head_gate"))
    assert set(student.config.intermediate_sizes) == {8}
    assert set(student.config.conv_dim) == {16}


def test_an_optimizer_gets_its_learning_rate_and_keeps_what_can_be_cut(tmp_path, clips):
    class Slow(torch.optim.SGD):
        def __init__(self, params, lr, parts=False):
            super().__init__(params, lr, momentum=0.9)
            self.parts = parts

        def step(self, closure=None):
            super().step(closure)
            if self.parts:
                for state in self.state.values():
                    state["parts"] = [state["momentum_buffer"]]

    make_trainer(tmp_path, clips, recipe={"shrink_steps": 2}, optimizer=(Slow, {}))
    with pytest.raises(ValueError, match="optimizer Slow: its `parts`"):
        make_trainer(tmp_path, clips, recipe={"shrink_steps": 2}, optimizer=(Slow, {"parts": True}))


def test_what_cannot_shrink(tmp_path, clips):
    with pytest.raises(ValueError, match="`shrink_steps`.*Adafactor.*`exp_avg_sq_row`.*adamw_torch"):
        make_trainer(tmp_path, clips, recipe={"shrink_steps": 2}, optim="adafactor")
    make_trainer(tmp_path, clips, optim="adafactor")
    with pytest.raises(ValueError, match="`shrink_steps` must be an integer of at least 0, but is -1"):
        SkillConfig(shrink_steps=-1)


RECIPE = {"shrink_steps": 2, "final_steps": 2, "pruning_units": ALL_UNITS, "sparsity_warmup_steps": 3}
RECIPE |= {"target_sparsity": 0.75}


class CloseGates(TrainerCallback):
    """Stands in for hundreds of steps after which gates have closed: some at step 1, more at step 5."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if model.has_gates and state.global_step in (1, 5):
            close(model.student, share=4 if state.global_step == 1 else 3)


class Record(TrainerCallback):
    def __init__(self):
        self.stages, self.sizes, self.resumed = 0, [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.stages += 1

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.sizes.append(num_parameters(model.student))


def make_shrinking(output_dir, clips, *callbacks, layout="base", **kwargs):
    kwargs = {"max_steps": 10, "save_steps": 3} | kwargs
    recipe = RECIPE | kwargs.pop("recipe", {})
    return make_trainer(output_dir, clips, tiny_teacher(layout), recipe, [CloseGates(), *callbacks], **kwargs)


@pytest.mark.parametrize(("layout", "killed_at"), [("base", (4, 7)), ("large", (8,))])
def test_killed_and_resumed_is_bitwise_the_same(layout, killed_at, tmp_path, clips, caplog):
    """
    The student shrinks in steps 2 and 6 and is cut in step 8. Checkpoints of steps 3 and 6: one between both, which
    the second shrinking still lies before, and one that was written right behind it.
    """
    caplog.set_level(logging.INFO, "skill_hf.distillation.shrinking")
    record = Record()
    reference = make_shrinking(tmp_path / "whole", clips, record, layout=layout)
    reference.train()
    sizes = record.sizes
    assert sizes[0] == sizes[1] > sizes[2] == sizes[5] > sizes[6] == sizes[7] > sizes[8] == sizes[9]
    assert record.stages == 2  # the loop was never left within a stage
    for step, before, after in ((2, sizes[0], sizes[2]), (6, sizes[2], sizes[6])):
        assert f"Step {step}: permanently closed units are cut, {before:,} parameters become {after:,}" in (
            caplog.text
        )
    rows = [row for row in reference.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["num_parameters"] for row in rows] == [*sizes[1:8], sizes[7], *sizes[8:]]
    assert abs(reference.model.num_parameters() / reference.teachers[0].num_parameters - 0.25) < 0.01
    assert not reference.model.named_gates()
    # What was closed for good stayed closed.
    assert reference.model.config.remaining_heads[:2] == [[], []]
    weights = load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors")
    left = [value.numel() for name, value in weights.items() if "student" in name and "log_alpha" not in name]
    assert sum(left) == sizes[6]
    expected = reference.model.state_dict()
    for step in killed_at:
        with pytest.raises(Kill):
            make_shrinking(tmp_path / str(step), clips, KillAt(step), layout=layout).train()
        trainer = make_shrinking(tmp_path / str(step), clips, layout=layout)
        trainer.train(resume_from_checkpoint=True)
        actual = trainer.model.state_dict()
        assert expected.keys() == actual.keys()
        assert [name for name in expected if not torch.equal(expected[name], actual[name])] == [], step
        again = [row for row in trainer.state.log_history if "loss" in row]
        assert list(map(without_timings, again)) == list(map(without_timings, rows))
    with pytest.raises(ValueError, match="a different recipe.*shrink_steps"):
        make_shrinking(tmp_path / "whole", clips, layout=layout, recipe={"shrink_steps": 3}).train(
            resume_from_checkpoint=True
        )


@pytest.mark.nightly
def test_a_compiled_run_that_was_killed_ends_like_one_in_eager_mode(fresh_compiler, tmp_path, clips):
    def make(name, *callbacks, **kwargs):
        settings = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "layerdrop"), 0.0)
        few = {"conv_dim": (16, 16), "conv_kernel": (40, 16), "conv_stride": (20, 16)}  # a graph has a part for each
        teacher = tiny_teacher(apply_spec_augment=False, num_hidden_layers=2, **few, **settings)
        kwargs |= {"max_steps": 6, "save_steps": 3, "learning_rate": 1e-4}
        recipe = RECIPE | {"final_steps": 2, "sparsity_warmup_steps": 2}
        return make_trainer(tmp_path / name, clips, teacher, recipe, [CloseGates(), *callbacks], **kwargs)

    eager = make("eager")
    eager.train()
    settings = {"torch_compile": True, "torch_compile_backend": "eager"}
    with pytest.raises(Kill):
        make("compiled", KillAt(4), **settings).train()
    compiled = make("compiled", **settings)
    compiled.train(resume_from_checkpoint=True)
    sizes = [
        [row["num_parameters"] for row in trainer.state.log_history if "loss" in row] for trainer in (eager, compiled)
    ]
    assert sizes[0] == sizes[1] and len(set(sizes[0])) == 3
    expected, actual = eager.model.state_dict(), compiled.model.state_dict()
    assert expected.keys() == actual.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, atol=1e-5, rtol=1e-4)


def test_without_checkpoints_and_with_less_memory(tmp_path, clips):
    record = Record()
    kwargs = {"save_strategy": "no", "bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    trainer = make_shrinking(tmp_path, clips, record, **kwargs, per_device_train_batch_size=2)
    trainer.train()
    assert record.sizes[6] < record.sizes[2] < record.sizes[0]
    assert list(tmp_path.iterdir()) == []
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def train_on_eight_clips(output, number):
    """Eight clips a step without dropout, on one of `number` processes."""
    rng = np.random.default_rng(0)
    clips = [{"input_values": rng.standard_normal(n).astype(np.float32)} for n in rng.integers(8_000, 30_000, 8)]
    record = Record()
    trainer = make_shrinking(
        output,
        clips,
        record,
        layout="large",
        recipe={"shared_gate_noise": True},
        save_strategy="no",
        optim="sgd",
        learning_rate=0.1,
        per_device_train_batch_size=8 // number,
        gradient_accumulation_steps=1,
        min_seconds=2.0,  # so that all clips are padded, to the same length on each process
    )
    for config in (trainer.student.config, trainer.teacher.config):
        config.hidden_dropout = config.attention_dropout = config.activation_dropout = 0.0
    for module in trainer.student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "heads"):
            module.dropout = 0.0
    trainer.train()
    return trainer, (record.sizes, trainer.model.state_dict())


@pytest.mark.nightly
def test_two_processes_equal_one(tmp_path):
    results = run_in_processes(train_on_eight_clips, tmp_path / "2", number=2)
    (sizes, weights), (other_sizes, other_weights) = results
    _, (single_sizes, single_weights) = train_on_eight_clips(tmp_path / "1", number=1)
    assert sizes == other_sizes == single_sizes
    assert sizes[6] < sizes[2] < sizes[0]
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    for name, tensor in single_weights.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-3)


@pytest.mark.nightly
def test_a_compiled_run_is_not_compiled_for_each_length(fresh_compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    clips = [clip for index in range(10) for clip in noise_clips(2, 9_000 + 1_000 * index)]
    rows = datasets.Dataset.from_list([row | {"length": len(row["input_values"])} for row in clips])
    settings = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2, "max_steps": 20}
    settings |= {"torch_compile": True, "torch_compile_backend": "eager"}
    recipe = RECIPE | {"final_steps": 10}
    trainer = make_trainer(
        tmp_path, rows, tiny_teacher(num_hidden_layers=2), recipe, evaluate_on=clips[:5], **settings
    )
    trainer.train()
    lengths = {row["audio_seconds_per_step"] for row in trainer.state.log_history if "audio_seconds_per_step" in row}
    assert len(lengths) > torch._dynamo.config.recompile_limit
