"""Students without some layers, against stock models whose layers are deleted."""

import copy

import numpy as np
import pytest
import torch
from conftest import LAYOUTS_OF_HEADS, family_config, family_teacher, padded_batch, tiny_teacher, with_noise
from test_modeling_wavlm_skill_student import assert_same_hidden_states, pruned_student
from torch import nn
from transformers import AutoModel, AutoModelForAudioClassification, AutoModelForCTC

from skill_hf import layer_similarity
from skill_hf.compression.layer_dropping import block_influence, drop_layers, layers_to_drop
from skill_hf.models.families import build_student


@pytest.mark.parametrize("layout", LAYOUTS_OF_HEADS)
def test_a_shorter_student_is_the_stock_model_without_these_layers(layout, tmp_path):
    teacher = family_teacher(layout)
    student = drop_layers(build_student(teacher).eval(), [1])
    stock = copy.deepcopy(teacher)
    stock.encoder.layers = nn.ModuleList([stock.encoder.layers[index] for index in (0, 2)])
    stock.config.num_hidden_layers = 2
    assert student.config.num_hidden_layers == 2 and not student.training
    assert_same_hidden_states(stock, student, padded_batch())
    student.save_pretrained(tmp_path)
    assert_same_hidden_states(student, AutoModel.from_pretrained(tmp_path).eval(), padded_batch(), atol=0)
    assert_same_hidden_states(stock, student.to_stock(), padded_batch())


@pytest.mark.parametrize("auto_class", [AutoModelForCTC, AutoModelForAudioClassification])
@pytest.mark.parametrize("layout", ["xls-r", "wavlm-base"])
def test_a_head_stays_on_what_is_left(layout, auto_class, tmp_path):
    stock = with_noise(auto_class.from_config(family_config(layout)))
    student = drop_layers(build_student(stock).eval(), [1])
    del stock.base_model.encoder.layers[1]
    student.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(student) and loaded.config.num_hidden_layers == 2
    with torch.no_grad():
        expected, *logits = (model(**padded_batch()).logits for model in (stock, student, loaded))
    for actual in logits:
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_a_head_that_weighs_all_layers():
    config = family_config("wavlm-base", use_weighted_layer_sum=True)
    student = build_student(AutoModelForAudioClassification.from_config(config))
    with pytest.raises(ValueError, match=r"weighs the hidden states of all layers \(`use_weighted_layer_sum`\)"):
        drop_layers(student, [1])
    assert drop_layers(student.base_model, [1]).config.num_hidden_layers == 2


def test_the_first_layer_may_go_and_its_positions_stay():
    teacher = tiny_teacher()
    student = drop_layers(build_student(teacher).eval(), [0])
    embedding = student.encoder.layers[0].attention.rel_attn_embed.weight
    assert torch.equal(embedding, teacher.encoder.layers[0].attention.rel_attn_embed.weight)
    assert student.encoder.layers[1].feed_forward.output_dense.weight.equal(
        teacher.encoder.layers[2].feed_forward.output_dense.weight
    )


def test_what_was_pruned_moves_with_its_layer():
    student = pruned_student("base", removed_attention_blocks=[0])
    shorter = drop_layers(student, [0])
    assert shorter.config.remaining_heads == student.config.remaining_heads[1:]
    assert shorter.config.intermediate_sizes == student.config.intermediate_sizes[1:]
    assert shorter.config.removed_attention_blocks == []
    assert shorter.config.removed_ffn_blocks == [layer - 1 for layer in student.config.removed_ffn_blocks]
    assert student.config.num_hidden_layers == 3
    shorter.add_gates()  # it can be pruned further


def test_block_influence_is_one_minus_the_cosine_of_input_and_output():
    teacher = tiny_teacher()
    audio = [torch.randn(n, generator=torch.Generator().manual_seed(n)).numpy() for n in (4000, 5000)]
    influence = block_influence(layer_similarity(teacher, audio, "cosine", progress=False))
    with torch.no_grad():
        states = [teacher(torch.from_numpy(clip)[None], output_hidden_states=True).hidden_states for clip in audio]
    joined = [torch.cat([clip[index][0] for clip in states]) for index in range(4)]
    expected = [
        1 - torch.cosine_similarity(*pair, dim=-1).mean().item() for pair in zip(joined, joined[1:], strict=False)
    ]
    np.testing.assert_allclose(influence, expected, atol=1e-6)


def test_orders():
    influence = [0.0, 0.3, 0.1, 0.2, 0.4]
    assert layers_to_drop(5, 2, "bottom") == [1, 2]
    assert layers_to_drop(5, 2, "top") == [3, 4]
    assert layers_to_drop(5, 2, "influence", influence) == [2, 3]  # not the first, whose influence is the least
    assert layers_to_drop(5, 4, "influence", influence) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers_to_drop(3, 3, "top"), "`num_dropped` must be from 0 to 2, but is 3"),
        (lambda: layers_to_drop(3, 1, "middle"), "`order` must be one of influence, bottom, top, but is 'middle'"),
        (lambda: layers_to_drop(3, 1), "`influence` must have a value for each of 3 layers, but has None"),
        (lambda: block_influence(np.ones((2, 3))), r"but has the shape \(2, 3\)"),
        (lambda: drop_layers(build_student(tiny_teacher()), [3]), "`layers` must be indices from 0 to 2, each once"),
        (lambda: drop_layers(build_student(tiny_teacher()), [1, 1]), "each once"),
        (lambda: drop_layers(build_student(tiny_teacher()), [0, 1, 2]), "leave at least one"),
    ],
)
def test_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_student_with_gates():
    student = build_student(tiny_teacher())
    student.add_gates()
    with pytest.raises(ValueError, match=r"has gates; call `prune\(\)`"):
        drop_layers(student, [0])
