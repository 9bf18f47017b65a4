"""What is for inference alone: `fuse()`, and flex attention."""

import copy
from functools import partial

import pytest
import torch
from conftest import padded_batch, tiny_config, tiny_teacher
from test_modeling_wavlm_skill_student import assert_same_hidden_states, pruned_student
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention
from torch.nn.utils import parametrize

from skill_hf import WavLMSkillStudentConfig, WavLMSkillStudentForCTC
from skill_hf.distillation.teacher import load_teacher
from skill_hf.models import fast_layers, modeling_wavlm_skill_student
from skill_hf.models.families import build_student


def test_fused_student_gives_the_same_hidden_states(layout):
    student = pruned_student(layout)
    fused = copy.deepcopy(student)
    assert fused.fuse() is fused
    assert_same_hidden_states(student, fused, padded_batch())
    assert_same_hidden_states(student, fused.fuse(), {"input_values": torch.randn(1, 3000)})  # a second time

    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert not any(map(parametrize.is_parametrized, fused.modules()))
    for layer, heads in zip(fused.encoder.layers, fused.config.remaining_heads, strict=True):
        if heads:
            assert layer.attention.qkv_proj.out_features == 3 * len(heads) * layer.attention.head_dim
            assert not hasattr(layer.attention, "q_proj")
    # A copied module shares its parametrised class with the original.
    assert parametrize.is_parametrized(student.encoder.pos_conv_embed.conv, "weight")


def test_fused_student_copies_no_weight_of_a_convolution(monkeypatch):
    student = pruned_student("base").eval()
    copied = []
    convolve = torch.nn.functional.conv2d

    def counted(inputs, weight, *args, **kwargs):
        copied.append(weight.data_ptr() not in {parameter.data_ptr() for parameter in student.parameters()})
        return convolve(inputs, weight, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "conv2d", counted)
    inputs = torch.randn(1, 4000)
    with torch.no_grad():
        student(inputs)
        assert any(copied)
        copied.clear()
        student.fuse()(inputs)
    assert len(copied) == 6 and not any(copied)  # the first is a matrix product, the positional one a transform


def test_fused_student_in_another_dtype_and_back():
    student = pruned_student("base").fuse()
    expected = copy.deepcopy(student)
    student.to(torch.float64).to(torch.float32)
    assert_same_hidden_states(expected, student, padded_batch())
    student.to(torch.bfloat16)
    with torch.no_grad():
        assert student(torch.randn(1, 4000, dtype=torch.bfloat16)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("kernel, padding, groups", [(128, 64, 4), (5, 0, 1), (6, 3, 2)])
def test_fourier_transform_gives_the_same_convolution(kernel, padding, groups):
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(8, 12, kernel, padding=padding, groups=groups, bias=kernel != 5).requires_grad_(False)
    transformed = fast_layers.FourierConv1d(conv)
    for frames in (kernel, 129, 130, 300):
        inputs = torch.randn(2, frames, 8)
        torch.testing.assert_close(transformed(inputs), conv(inputs.mT).mT, atol=1e-5, rtol=0)


def test_layers_that_are_no_plain_linear_maps_stay(teacher):
    student = build_student(teacher).eval()
    expected = copy.deepcopy(student)

    class Adapted(torch.nn.Linear):
        pass

    student.encoder.layers[0].attention.q_proj.__class__ = Adapted
    seen = []
    student.encoder.layers[2].attention.v_proj.register_forward_hook(lambda *args: seen.append(args))
    student.fuse()
    fused = [layer.attention.qkv_proj is not None for layer in student.encoder.layers]
    assert fused == [False, True, False]
    assert_same_hidden_states(expected, student, padded_batch())
    assert seen


def test_head_of_a_fused_student():
    torch.manual_seed(0)
    model = WavLMSkillStudentForCTC(WavLMSkillStudentConfig(**tiny_config(vocab_size=9).to_dict())).eval()
    inputs = padded_batch()
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(model.fuse()(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_fused_student_cannot_be_saved_or_pruned(tmp_path):
    student = build_student(tiny_teacher()).fuse()
    with pytest.raises(ValueError, match="is fused and cannot be saved.*from_pretrained"):
        student.save_pretrained(tmp_path / "student")
    assert not (tmp_path / "student").exists()
    with pytest.raises(ValueError, match="is fused and cannot be pruned"):
        student.add_gates(["ffn_dims"])
    with pytest.raises(ValueError, match="is fused and cannot be converted to a stock model"):
        student.to_wavlm()
    with pytest.raises(ValueError, match="is fused and cannot be a teacher"):
        load_teacher(student)

    student = build_student(tiny_teacher())
    student.add_gates(["ffn_dims"])
    with pytest.raises(ValueError, match="has gates; call `prune\\(\\)` before fusing it"):
        student.fuse()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_same_hidden_states(layout, monkeypatch):
    student = pruned_student(layout)
    expected = copy.deepcopy(student)
    student.set_attn_implementation("flex_attention")
    inputs = padded_batch()
    biases = []
    forward = fast_layers.flex_attention_forward

    def counted(query, key, value, gate, values, *args):
        biases.append(values.shape)
        return forward(query, key, value, gate, values, *args)

    monkeypatch.setattr(modeling_wavlm_skill_student, "flex_attention_forward", counted)
    # The kernel is for GPUs; elsewhere the fused attention takes its place.
    assert_same_hidden_states(expected, student, inputs, atol=0)
    assert not biases

    for layer in student.encoder.layers:
        monkeypatch.setattr(layer.attention, "_uses_flex", lambda hidden_states: True)
    monkeypatch.setattr(fast_layers, "_flex_attention", lambda compiled: flex_attention.flex_attention)
    assert_same_hidden_states(expected, student, inputs)
    assert_same_hidden_states(expected, student, {"input_values": inputs["input_values"]})
    heads = [len(heads) for heads in student.config.remaining_heads if heads]
    frames = student._get_feat_extract_output_lengths(inputs["input_values"].shape[1])
    assert biases == 2 * [(number, 2 * int(frames) - 1) for number in heads]


@pytest.mark.nightly
def test_flex_attention_is_compiled_once_for_each_number_of_heads(monkeypatch, fresh_compiler):
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    fast_layers._flex_attention.cache_clear()
    numbers = (3, 4, 5, 7, 2, 1, 12, 6, 8, 9, 10)
    with torch.no_grad():
        for frames in (24, 40, 33):
            for heads in numbers:
                query, key, value = torch.randn(3, 2, heads, frames, 16)
                gate, values = torch.rand(2, heads, frames), torch.randn(heads, 2 * frames - 1)
                fast_layers.flex_attention_forward(query, key, value, gate, values)
            assert counter.frame_count == len(numbers)
    fast_layers._flex_attention.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="its kernel is for GPUs")
def test_flex_attention_on_a_gpu(layout):
    student = pruned_student(layout, hidden_size=64).cuda()  # 16 a head, the least that the kernel takes
    expected = copy.deepcopy(student)
    student.set_attn_implementation("flex_attention")
    assert student.encoder.layers[0].attention._uses_flex(torch.zeros(1, device="cuda"))
    inputs = {name: tensor.cuda() for name, tensor in padded_batch().items()}
    assert_same_hidden_states(expected, student, inputs, atol=1e-3)
