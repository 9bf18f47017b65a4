"""The student computes its convolutions in ways of its own, with the outputs and gradients of the stock model."""

import copy

import pytest
import torch
from conftest import WIDE_GROUPS, padded_batch, tiny_config, tiny_teacher
from torch import nn
from transformers.models.wavlm.modeling_wavlm import WavLMGroupNormConvLayer

from skill_hf import WavLMSkillStudentConfig
from skill_hf.compression.pruning import seed_gates
from skill_hf.distillation.teacher import fast_teacher, load_teacher
from skill_hf.models.families import build_student
from skill_hf.models.fast_layers import FastConv1d, FastConvLayer


def run(module, inputs, grad, **kwargs):
    """Output, and gradients of the input and of all weights that ask for one."""
    inputs = inputs.clone(memory_format=torch.preserve_format).requires_grad_(inputs.is_leaf)
    output = module(inputs, **kwargs)
    output.backward(grad)
    return {"output": output.detach(), "input": inputs.grad} | {
        name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad
    }


def assert_same(actual, expected, rtol=1e-5):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            actual[name], value, atol=rtol * scale, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "frames"),
    [(3, 2, 40), (3, 2, 41), (2, 2, 41), (10, 5, 52), (5, 2, 30), (3, 3, 31), (2, 3, 31)],
)
def test_convolution_is_the_stock_one(kernel, stride, frames, channels_last):
    torch.manual_seed(0)
    stock = nn.Conv1d(6, 5, kernel, stride)
    ours = FastConv1d(6, 5, kernel, stride)
    ours.load_state_dict(stock.state_dict())
    inputs = torch.randn(3, frames, 6).mT if channels_last else torch.randn(3, 6, frames)
    grad = torch.randn_like(stock(inputs))
    assert_same(run(ours, inputs.detach(), grad), run(stock, inputs.detach(), grad))


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_convolution_with_something_frozen(frozen):
    torch.manual_seed(0)
    stock, ours = (
        nn.Conv1d(4, 5, 3, 2, bias=frozen != "bias"),
        FastConv1d(4, 5, 3, 2, bias=frozen != "bias"),
    )
    ours.load_state_dict(stock.state_dict())
    inputs = torch.randn(2, 4, 21)
    for conv in (stock, ours):
        conv.weight.requires_grad_(frozen != "weight")
        inputs.grad = None
        output = conv(inputs.requires_grad_(frozen != "input"))
        output.square().sum().backward()
        conv.found = {
            name: tensor.grad.clone()
            for name, tensor in (("input", inputs), ("weight", conv.weight))
            if tensor.requires_grad
        }
        inputs = inputs.detach()
    assert (ours.found.keys() == stock.found.keys()) and frozen not in ours.found
    assert_same(ours.found, stock.found)


def group_norm_layers(channels=8):
    torch.manual_seed(0)
    config = WavLMSkillStudentConfig(**tiny_config(conv_dim=(channels,) * 7).to_dict())
    stock = WavLMGroupNormConvLayer(config)
    conv = FastConv1d(1, channels, config.conv_kernel[0], stride=config.conv_stride[0], bias=False)
    ours = FastConvLayer(conv, nn.GroupNorm(channels, channels), stock.activation)
    nn.init.normal_(stock.layer_norm.weight)
    nn.init.normal_(stock.layer_norm.bias)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


# A microphone's offset, which a mean has to take out, and a clip so quiet that the norm's epsilon counts.
@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (5.0, 1.0), (0.0, 1e-3), (0.5, 1e-3)])
def test_group_norm_folded_into_the_convolution_is_the_stock_one(offset, scale):
    stock, ours = group_norm_layers()
    samples = (offset + scale * torch.randn(3, 1, 4000)).double()
    grad = torch.randn_like(stock(samples.float()))
    # Against the stock layer in double precision: its own float32 suffers from the offset more than ours.
    expected = {name: value.float() for name, value in run(stock.double(), samples, grad.double()).items()}
    actual = run(ours, samples.float(), grad)
    del expected["input"], actual["input"]  # float32 rounds an offset of 5 by more than the noise's gradient
    assert_same(actual, expected, rtol=1e-5 if offset < 1 else 1e-4)


def test_gradient_reaches_the_samples_through_the_folded_norm():
    stock, ours = group_norm_layers()
    samples = torch.randn(2, 1, 1000)
    grad = torch.randn_like(stock(samples))
    assert_same(run(ours, samples, grad), run(stock, samples, grad))


class Wrapper(nn.Module):
    """Has no attribute of the layer that it holds, like those of peft."""

    def __init__(self, conv):
        super().__init__()
        self.base = conv
        self.calls = 0

    def forward(self, hidden_states):
        self.calls += 1
        return self.base(hidden_states)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("masked_group_norm", [False, True])
def test_a_convolution_in_a_wrapper_is_called(layout, masked_group_norm, with_gradients):
    student = build_student(tiny_teacher(layout)).eval()
    student.config.masked_group_norm = masked_group_norm
    with torch.set_grad_enabled(with_gradients):
        expected = student(**padded_batch()).last_hidden_state
        wrappers = []
        for owner in (student.feature_extractor.conv_layers[0], student.encoder.pos_conv_embed):
            owner.conv = Wrapper(owner.conv)
            wrappers.append(owner.conv)
        actual = student(**padded_batch()).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert [wrapper.calls for wrapper in wrappers] == [1, 1]


def test_hooks_see_what_they_see_in_the_stock_model(layout):
    """And nothing writes into what they have kept."""
    teacher = tiny_teacher(layout)
    found = []
    for model in (teacher, build_student(teacher).eval()):
        seen = {}
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv1d, nn.GroupNorm, nn.Linear)) and not name.endswith("_proj"):
                module.register_forward_hook(
                    lambda module, args, output, n=name, outputs=seen: outputs.update({n: output})
                )
        with torch.no_grad():
            model(torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)))
        found.append({name: output for name, output in seen.items() if "gru_rel_pos" not in name})
    assert found[0].keys() == found[1].keys()
    for name, output in found[0].items():
        torch.testing.assert_close(
            found[1][name], output, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_gradients_of_gradients_and_transformations():
    torch.manual_seed(0)
    stock, ours = nn.Conv1d(4, 5, 3, 2), FastConv1d(4, 5, 3, 2)
    ours.load_state_dict(stock.state_dict())
    inputs = torch.randn(2, 4, 21)
    penalties = []
    for conv in (stock, ours):
        samples = inputs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(conv(samples).square().sum(), samples, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), [samples, conv.weight]))
    for actual, expected in zip(penalties[1], penalties[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    gradients = [torch.func.grad(lambda x, conv=conv: conv(x).square().sum())(inputs) for conv in (stock, ours)]
    torch.testing.assert_close(*gradients)


def test_checkpoints_hand_the_gradient_on_to_the_audio():
    student = build_student(tiny_teacher())
    student.config.apply_spec_augment, student.config.layerdrop = False, 0.0
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        samples = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(0)
        student(samples).last_hidden_state.square().mean().backward()
        gradients.append(samples.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("masked_group_norm", [False, True])
def test_a_batch_in_parts_gives_the_same_outputs(monkeypatch, masked_group_norm):
    # In float64, since a kernel may sum in another order for another number of clips.
    student = build_student(tiny_teacher()).eval().double()
    student.config.masked_group_norm = masked_group_norm
    inputs = {name: tensor.repeat(3, 1)[:5] for name, tensor in padded_batch().items()}
    inputs["input_values"] = inputs["input_values"].double()
    encoder = student.feature_extractor
    sizes = []
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda *args: sizes.append(len(args[0])) or encode(*args))
    with torch.no_grad():
        expected = student(**inputs).last_hidden_state
        encoder.max_values = {"cpu": 2 * 16 * 8000 // 5}  # two clips
        actual = student(**inputs).last_hidden_state
    assert sizes == [5, 2, 2, 1]
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def test_checkpoints_of_a_few_clips_give_the_same_gradients(layout):
    student = build_student(tiny_teacher(layout))
    student.config.apply_spec_augment, student.config.layerdrop = False, 0.0
    student.config.masked_group_norm = layout == "base"
    student.add_gates()
    student.feature_extractor.max_values = {"cpu": 2 * 16 * 8000 // 5}  # two clips
    inputs = {name: tensor.repeat(3, 1)[:5] for name, tensor in padded_batch().items()}
    sizes, grads = [], []
    student.feature_extractor.conv_layers[0].register_forward_hook(
        lambda module, args, output: sizes.append(len(output))
    )
    for checkpointed in (False, True):
        if checkpointed:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        seed_gates(student, 0)
        torch.manual_seed(0)
        student.zero_grad()
        student(**inputs).last_hidden_state.square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in student.named_parameters()})
    assert sorted(sizes) == sorted([5] + 2 * [2, 2, 1])  # once more in the backward pass
    assert all(value is not None for name, value in grads[0].items() if "conv" in name)
    for name, value in grads[0].items():
        if value is not None:
            torch.testing.assert_close(grads[1][name], value, atol=1e-5, rtol=1e-3)


def test_a_mask_without_padding_changes_nothing(layout):
    student = build_student(tiny_teacher(layout)).eval()
    inputs = torch.randn(2, 4000)
    outputs = student(inputs, attention_mask=torch.ones(2, 4000)).last_hidden_state
    assert torch.equal(outputs, student(inputs).last_hidden_state)


def test_bfloat16_autocast_trains_near_float32(layout):
    student = build_student(tiny_teacher(layout))
    student.config.apply_spec_augment, student.config.layerdrop = False, 0.0
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs, grads = torch.randn(2, 4000), []
    for enabled in (False, True):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = student(inputs).last_hidden_state.float().square().mean()
        loss.backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in student.feature_extractor.parameters()]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.95  # 0.96 where the processor multiplies in bfloat16


def test_the_fast_teacher_transforms_its_positional_weight_once(layout):
    teacher = tiny_teacher(layout).eval()
    fast, inputs = fast_teacher(teacher), torch.randn(2, 4000)
    calls = []
    fast.encoder.pos_conv_embed.fourier.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected, found = (model(inputs, output_hidden_states=True).hidden_states for model in (teacher, fast))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert calls == [1]
    shared = {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    own = {name for name, tensor in fast.state_dict().items() if tensor.data_ptr() not in shared}
    assert own == {"encoder.pos_conv_embed.conv.weight"}
    assert nn.utils.parametrize.is_parametrized(teacher.encoder.pos_conv_embed.conv)
    with pytest.raises(ValueError, match="fused"):
        load_teacher(fast)


def test_weights_cast_once_are_those_that_autocast_casts(layout):
    teacher = tiny_teacher(layout).eval()
    weights = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    fast, cast = fast_teacher(teacher), fast_teacher(teacher, torch.bfloat16)
    inputs = torch.randn(2, 4000)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected, found = (model(inputs, output_hidden_states=True).hidden_states for model in (fast, cast))
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert cast.encoder.layers[0].attention.q_proj.weight.dtype == torch.bfloat16
    assert cast.encoder.pos_conv_embed.conv.weight.dtype == torch.bfloat16
    assert cast.encoder.pos_conv_embed.fourier is None
    assert all(torch.equal(weight, weights[name]) for name, weight in teacher.state_dict().items())


def test_a_bias_in_half_precision_is_near_float32(layout):
    student = build_student(tiny_teacher(layout, **WIDE_GROUPS)).eval()
    half = copy.deepcopy(student).bfloat16()
    inputs = torch.randn(2, 4000)
    with torch.no_grad():
        expected, found = student(inputs).last_hidden_state, half(inputs.bfloat16()).last_hidden_state
    assert torch.nn.functional.cosine_similarity(expected, found.float(), dim=-1).min() > 0.99
