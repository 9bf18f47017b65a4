"""Dropout of the student on the CPU, whose random numbers have 16 bits."""

import pytest
import torch
from conftest import tiny_teacher
from torch import nn

from skill_hf.models.families import build_student
from skill_hf.models.fast_layers import FastDropout, fast_dropout


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_value_is_dropped_with_the_probability_and_the_others_are_scaled(p, dtype):
    torch.manual_seed(0)
    dropped = fast_dropout(torch.full((400_001,), 2.0, dtype=dtype), p, training=True)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept].unique(), torch.tensor([2 / (1 - p)], dtype=dtype), rtol=1e-2, atol=0)
    for place in range(4):  # in the 64 bits that are drawn at once
        assert kept[place::4].float().mean().item() == pytest.approx(1 - p, abs=0.005)
    assert dropped.float().mean().item() == pytest.approx(2, rel=0.02)


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    dropped = fast_dropout(torch.ones(1_000_000), 0.5, training=True)
    kept = (dropped != 0).float() - 0.5
    for distance in range(1, 9):
        assert (kept[distance:] * kept[:-distance]).mean().abs() < 0.001  # 0.00025 is one standard deviation


def test_draws_follow_the_seed_and_gradients_the_draw():
    hidden_states = torch.randn(3, 7, 11, requires_grad=True)
    torch.manual_seed(3)
    first = fast_dropout(hidden_states, 0.4, training=True)
    second = fast_dropout(hidden_states, 0.4, training=True)
    torch.manual_seed(3)
    torch.testing.assert_close(fast_dropout(hidden_states, 0.4, training=True), first, rtol=0, atol=0)
    assert not torch.equal(first, second)
    first.sum().backward()
    torch.testing.assert_close(hidden_states.grad * hidden_states.detach(), first.detach())


@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0.0, True), (1e-6, True), (1 - 1e-6, True), (1.0, True)])
def test_what_16_bits_cannot_tell_is_left_to_torch(p, training):
    hidden_states = torch.randn(1000)
    torch.manual_seed(0)
    found = fast_dropout(hidden_states, p, training)
    torch.manual_seed(0)
    torch.testing.assert_close(found, nn.functional.dropout(hidden_states, p, training), rtol=0, atol=0)


def test_all_dropout_of_the_encoder_is_fast():
    student = build_student(tiny_teacher())
    assert {type(module) for module in student.modules() if isinstance(module, nn.Dropout)} == {FastDropout}
    config = student.config
    assert student.feature_projection.dropout.p == config.feat_proj_dropout
    assert student.encoder.dropout.p == student.encoder.layers[1].dropout.p == config.hidden_dropout
    assert student.encoder.layers[1].feed_forward.intermediate_dropout.p == config.activation_dropout


def test_attention_drops_weights_whichever_implementation_is_asked_for():
    student = build_student(tiny_teacher(attention_dropout=0.3))
    attention = student.encoder.layers[0].attention
    hidden_states, outputs = torch.randn(2, 9, student.config.hidden_size), {}
    for implementation in ("eager", "sdpa"):
        student.set_attn_implementation(implementation)
        torch.manual_seed(0)
        outputs[implementation] = attention(hidden_states)
    torch.testing.assert_close(outputs["eager"][0], outputs["sdpa"][0])
    assert outputs["eager"][1].shape == (2, student.config.num_attention_heads, 9, 9) and outputs["sdpa"][1] is None

    with torch.no_grad():  # dropped weights are right on average
        mean = attention(hidden_states.repeat(3000, 1, 1))[0].unflatten(0, (3000, 2)).mean(0)
        exact = attention.eval()(hidden_states)[0]
    assert (mean - exact).abs().max() < 0.1 * exact.std()


def test_half_precision_keeps_the_attention_that_rounds_least(monkeypatch):
    student = build_student(tiny_teacher(attention_dropout=0.3)).bfloat16()
    student.set_attn_implementation("sdpa")
    calls, fused = [], nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    hidden_states = torch.randn(1, 9, student.config.hidden_size)
    student.encoder.layers[0].attention(hidden_states.bfloat16())
    assert len(calls) == 1
    student.float().encoder.layers[0].attention(hidden_states)
    assert len(calls) == 1


def test_checkpoints_draw_the_same_again():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        student = build_student(tiny_teacher(attention_dropout=0.2, hidden_dropout=0.2, activation_dropout=0.2))
        student.config.layerdrop, student.config.apply_spec_augment = 0.0, False
        if checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = torch.randn(2, 4000)
        torch.manual_seed(1)
        student(inputs).last_hidden_state.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)
