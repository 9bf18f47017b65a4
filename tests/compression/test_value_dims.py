"""Dimensions of values inside heads: removed, saved, restored as stock models."""

import copy
import json

import pytest
import torch
from conftest import LAYOUTS_OF_HEADS, family_teacher, padded_batch, tiny_teacher
from safetensors.torch import load_file
from test_latency import latency_costs
from test_modeling_wavlm_skill_student import assert_same_hidden_states
from test_skill_trainer import Kill, KillAt, make_trainer
from transformers import AutoModel

from skill_hf import WavLMSkillStudentConfig
from skill_hf.compression.pruning import sort_values
from skill_hf.conversion.converter import convert_student
from skill_hf.models.families import build_student


KIND = "attention_value_dims"


def pruned(layout, *other_kinds):
    """A student with 5, 8 and 1 dimensions left in the values of its three layers."""
    student = build_student(family_teacher(layout)).eval()
    student.add_gates([KIND, *other_kinds])
    for name, gate in student.named_gates():
        gate.log_alpha.data.fill_(40.0)
        if name.endswith("value_gate"):
            layer = int(name.split(".")[2])
            gate.log_alpha.data[[5, 8, 1][layer] :] = -40.0
        elif name == "encoder.layers.1.attention.head_gate":
            gate.log_alpha.data[1] = -40.0
    gated = copy.deepcopy(student)
    student.prune()
    return gated, student


@pytest.mark.parametrize("layout", LAYOUTS_OF_HEADS)
def test_pruned_is_gated_saved_fused_and_stock(layout, tmp_path):
    gated, student = pruned(layout, "attention_heads")
    assert student.config.value_sizes == [5, 8, 1]
    assert [len(layer.attention.v_proj.weight) for layer in student.encoder.layers] == [20, 24, 4]
    assert_same_hidden_states(gated, student, padded_batch())
    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 3
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert_same_hidden_states(student, loaded, padded_batch(), atol=0)
    stock = student.to_stock()
    assert type(stock).__mro__[0] is type(family_teacher(layout))
    assert_same_hidden_states(student, stock, padded_batch())
    assert_same_hidden_states(student, loaded.fuse(), padded_batch())
    for implementation in ("eager", "sdpa"):
        again = AutoModel.from_pretrained(tmp_path, attn_implementation=implementation).eval()
        assert_same_hidden_states(student, again, padded_batch())


def test_sorted_values_give_the_same_outputs():
    student = build_student(tiny_teacher()).eval()
    whole = copy.deepcopy(student)
    sort_values(student)
    assert_same_hidden_states(whole, student, padded_batch())
    attention = student.encoder.layers[1].attention
    norms = attention.v_proj.weight.norm(dim=1) * attention.out_proj.weight.norm(dim=0)
    assert (norms.unflatten(0, (4, 8)).diff(dim=1) <= 0).all()
    assert not torch.equal(attention.v_proj.weight, whole.encoder.layers[1].attention.v_proj.weight)


def test_a_dead_dimension_goes_last():
    student = build_student(tiny_teacher()).eval()
    with torch.no_grad():
        student.encoder.layers[0].attention.out_proj.weight[:, 3::8] = 0
    expected = student(**padded_batch()).last_hidden_state
    student.add_gates([KIND])
    for name, gate in student.named_gates():
        gate.log_alpha.data.fill_(40.0)
        if name.startswith("encoder.layers.0."):
            gate.log_alpha.data[-1] = -40.0
    student.prune()
    assert student.config.value_sizes == [7, 8, 8]
    torch.testing.assert_close(student(**padded_batch()).last_hidden_state, expected)


@pytest.mark.nightly
def test_a_run_that_shrinks_ends_the_same_after_a_kill(tmp_path, clips):
    recipe = {"pruning_units": ["ffn_dims", KIND], "target_sparsity": 0.3, "shrink_steps": 2, "final_steps": 3}
    recipe["gate_learning_rate"] = 4.0

    def make(name, *callbacks):
        return make_trainer(tmp_path / name, clips, recipe=recipe, callbacks=list(callbacks))

    reference = make("whole")
    reference.train()
    assert min(reference.model.config.value_sizes) < 8
    with pytest.raises(Kill):
        make("killed", KillAt(5)).train()
    trainer = make("killed")
    trainer.train(resume_from_checkpoint=True)
    expected = reference.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainer.model.state_dict().items())
    saved = load_file(tmp_path / "whole" / "checkpoint-8" / "model.safetensors")
    assert "student.encoder.layers.0.attention.v_proj.weight" in saved


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([8, 8], "`value_sizes` must list one entry for each of 3 layers"),
        ([8, 0, 8], r"`value_sizes\[1\]` must be an integer from 1 to 8 .*, but is 0"),
        ([8, 8, 9], r"`value_sizes\[2\]` must be an integer from 1 to 8 .*, but is 9"),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        WavLMSkillStudentConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=3, value_sizes=sizes)


def test_what_has_no_place_for_them(tmp_path, clips):
    _, student = pruned("wavlm-base")
    student.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="values of 1 to 8 dimensions .*in models of DPHuBERT's format all have 8"):
        convert_student(tmp_path)


def test_a_latency_that_nobody_has_measured(tmp_path, clips):
    recipe = {"budget": "latency", "latency_costs": latency_costs(), "pruning_units": ["ffn_dims", KIND]}
    with pytest.raises(ValueError, match="contains attention_value_dims, but `latency_costs` do not tell"):
        make_trainer(tmp_path, clips, recipe=recipe)
