"""Exported files against the model itself: lengths, batch sizes and padding that they were not made with."""

import copy
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import all_layouts, padded_batch, tiny_config, tiny_teacher
from test_modeling_wavlm_skill_student import pruned_student
from torch import nn
from transformers import WavLMForAudioFrameClassification

import skill_hf
from skill_hf import (
    WavLMForSkillStudent,
    WavLMSkillStudentConfig,
    WavLMSkillStudentForCTC,
    WavLMSkillStudentForSequenceClassification,
    WavLMSkillStudentForXVector,
)
from skill_hf.export import (
    NamedOutputs,
    OnnxModel,
    compare_outputs,
    export_onnx,
    export_program,
    quantize_onnx,
)
from skill_hf.models.families import build_student


# Layer 0 keeps the relative positions of all, but no heads; layer 1 has no feed-forward block.
LEFT = {
    "conv_dim": [5, 16, 6, 7, 16, 8, 11],
    "remaining_heads": [[], [1, 3], [0, 1, 2, 3]],
    "intermediate_sizes": [5, 0, 48],
    "removed_ffn_blocks": [1],
}
# What a test needs that is about something else; an exporter takes seconds for each layer.
ONE_LAYER = {"num_hidden_layers": 1, "remaining_heads": [[1, 3]], "intermediate_sizes": [5], "removed_ffn_blocks": []}
# A frame of 340 samples, not of 400.
FEW_CONVOLUTIONS = {
    "conv_dim": [5, 16],
    "conv_kernel": [40, 16],
    "conv_stride": [20, 16],
    "num_feat_extract_layers": 2,
}

HEAD = {
    "vocab_size": 9,
    "num_labels": 5,
    "classifier_proj_size": 12,
    "tdnn_dim": [24, 24, 24, 24, 60],
    "xvector_output_dim": 20,
}

# One frame ends at 400 samples, the second at 720, and so on; files are traced at some 7000 samples.
LENGTHS = (400, 719, 720, 5200, 9001, 31_999)


def make_model(model_class=WavLMForSkillStudent, layout="base", one_layer=False, **kwargs):
    torch.manual_seed(0)
    fields = tiny_config(layout, **HEAD).to_dict()
    if model_class.config_class is WavLMSkillStudentConfig:
        fields |= LEFT | (ONE_LAYER if one_layer else {})
    elif one_layer:
        fields["num_hidden_layers"] = 1
    if one_layer:
        fields |= FEW_CONVOLUTIONS
    model = model_class(model_class.config_class(**fields | kwargs)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def inputs_of(batch: int, length: int, padded: bool) -> dict[str, torch.Tensor]:
    """Noise; of a padded batch each clip is shorter than the one before it, but for the first."""
    attention_mask = torch.ones(batch, length, dtype=torch.long)
    if padded:
        for row in range(batch):
            attention_mask[row, length - row * length // 4 - length // 8 :] = 0
    noise = torch.randn(batch, length, generator=torch.Generator().manual_seed(length))
    return {"input_values": noise * attention_mask, "attention_mask": attention_mask}


@torch.no_grad()
def assert_same_outputs(saved, model, output_hidden_states, lengths=LENGTHS):
    reference = NamedOutputs(model, output_hidden_states)
    for batch in (1, 3):
        for length in lengths:
            for padded in (False, True) if length > 9000 else (False,):
                inputs = inputs_of(batch, length, padded)
                expected, actual = reference(**inputs), saved(**inputs)
                assert actual.keys() == expected.keys()
                for name, values in expected.items():
                    torch.testing.assert_close(
                        actual[name],
                        values,
                        atol=1e-4,
                        rtol=0,
                        msg=lambda text, case=(name, batch, length, padded): f"{case}: {text}",
                    )


@pytest.fixture(scope="module", params=["base", pytest.param("large", marks=pytest.mark.nightly)])
def encoder(request, tmp_path_factory):
    """A pruned student and its ONNX file with all hidden states."""
    removed = [0] if request.param == "base" else []
    model = make_model(layout=request.param, removed_attention_blocks=removed, **FEW_CONVOLUTIONS)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert export_onnx(model, path, output_hidden_states=True) < 1e-4
    return model, path


@pytest.mark.slow
def test_onnx_encoder(encoder):
    model, path = encoder
    saved = OnnxModel(path)
    assert_same_outputs(saved, model, output_hidden_states=True)
    assert [(put.name, put.type, put.shape) for put in saved.session.get_inputs()] == [
        ("input_values", "tensor(float)", ["batch", "samples"]),
        ("attention_mask", "tensor(int64)", ["batch", "samples"]),
    ]
    names = ["last_hidden_state", *(f"hidden_states.{index}" for index in range(4))]
    assert [put.name for put in saved.session.get_outputs()] == names
    for put in saved.session.get_outputs():
        batch, frames, hidden_size = put.shape
        assert (batch, type(frames), hidden_size) == ("batch", str, 32)


@pytest.mark.slow
@pytest.mark.parametrize("layout", all_layouts("hubert-batch-norm"))
def test_onnx_of_all_families(tmp_path, layout):
    student = pruned_student(layout, **ONE_LAYER | FEW_CONVOLUTIONS)
    assert export_onnx(student, tmp_path / "model.onnx", output_hidden_states=True) < 1e-4
    assert_same_outputs(OnnxModel(tmp_path / "model.onnx"), student, True, lengths=(720, 9001))
    clips = [inputs_of(1, length, False)["input_values"][0] for length in (5000, 16_001)]
    report = quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", clips)
    assert 0.98 < min(report["cosine_similarity"].values()) < 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", all_layouts("mms"))
def test_program_of_all_families(tmp_path, layout):
    student = pruned_student(layout, **ONE_LAYER | FEW_CONVOLUTIONS)
    assert export_program(student, tmp_path / "model.pt2", output_hidden_states=True) < 1e-5
    saved = torch.export.load(tmp_path / "model.pt2").module()
    assert_same_outputs(saved, student, True, lengths=(720, 9001))


@pytest.mark.nightly
def test_files_tell_nothing_of_the_machine(encoder, program):
    for _, path in (encoder, program):
        for module in (skill_hf, torch, transformers):
            assert str(Path(module.__file__).parent).encode() not in path.read_bytes()


@pytest.mark.slow
def test_onnx_mask_of_ones_is_no_mask(encoder):
    model, path = encoder
    inputs = inputs_of(2, 9000, padded=False)
    with torch.no_grad():
        expected = model(inputs["input_values"]).last_hidden_state
    torch.testing.assert_close(OnnxModel(path)(**inputs)["last_hidden_state"], expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_class", "layout", "kwargs"),
    [
        (
            WavLMSkillStudentForCTC,
            "base",
            {"masked_group_norm": True, "add_adapter": True, "num_adapter_layers": 2, "output_hidden_size": 32},
        ),
        pytest.param(
            WavLMSkillStudentForSequenceClassification,
            "large",
            {"use_weighted_layer_sum": True},
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            WavLMSkillStudentForXVector, "large", {"use_weighted_layer_sum": True}, marks=pytest.mark.nightly
        ),
        # Stock, and so its attention.
        pytest.param(WavLMForAudioFrameClassification, "base", {}, marks=pytest.mark.nightly),
    ],
)
@pytest.mark.nightly
def test_onnx_head(tmp_path, model_class, layout, kwargs):
    model = make_model(model_class, layout, one_layer=True, **kwargs)
    assert export_onnx(model, tmp_path / "model.onnx") < 1e-4
    saved = OnnxModel(tmp_path / "model.onnx")
    x_vector = model_class is WavLMSkillStudentForXVector
    # Of fewer frames its convolutions make nothing, or one of which there is no deviation.
    assert_same_outputs(saved, model, False, lengths=[length for length in LENGTHS if length >= 5200 or not x_vector])
    names = [put.name for put in saved.session.get_outputs()]
    assert names == (["logits", "embeddings"] if x_vector else ["logits"])


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A pruned student and its program with all hidden states."""
    model, path = make_model(**FEW_CONVOLUTIONS), tmp_path_factory.mktemp("program") / "model.pt2"
    assert export_program(model, path, output_hidden_states=True) < 1e-5
    return model, path


@pytest.mark.slow
def test_program(program):
    model, path = program
    saved = torch.export.load(path).module()
    assert_same_outputs(saved, model, True, lengths=[length for length in LENGTHS if length >= 720])


@pytest.mark.nightly
def test_program_needs_torch_alone(program, tmp_path):
    model, path = program
    inputs = padded_batch()
    with torch.no_grad():
        torch.save((inputs, model(**inputs).last_hidden_state), tmp_path / "case.pt")
    code = """
import sys
sys.modules["transformers"] = sys.modules["skill_hf"] = None
import torch
inputs, expected = torch.load("case.pt")
actual = torch.export.load(sys.argv[1]).module()(**inputs)
torch.testing.assert_close(actual["last_hidden_state"], expected)
"""
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=tmp_path)


@pytest.mark.nightly
def test_exported_model_is_left_as_it_was(tmp_path):
    model = make_model(layout="large", one_layer=True).bfloat16().train()
    model(padded_batch()["input_values"].bfloat16(), output_hidden_states=True)  # installs hooks, which are copied
    before = copy.deepcopy(model.state_dict())
    export_program(model, tmp_path / "model.pt2")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])
    saved = torch.export.load(tmp_path / "model.pt2").module()
    assert_same_outputs(saved, model.float().eval(), False, lengths=(720, 9001))


@pytest.mark.parametrize("export", [export_onnx, export_program])
@pytest.mark.parametrize("model_class", [WavLMForSkillStudent, WavLMSkillStudentForCTC])
def test_gates_are_refused(tmp_path, export, model_class):
    model = make_model(model_class)
    model.base_model.add_gates()
    with pytest.raises(ValueError, match=rf"{model_class.__name__} has gates; .*prune\(\)"):
        export(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_onnx_file_that_differs_is_removed(encoder, tmp_path, monkeypatch):
    model, path = encoder
    made = SimpleNamespace(model=SimpleNamespace(graph=[]), save=lambda target, **options: shutil.copy(path, target))
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: made)
    assert export_onnx(model, tmp_path / "same.onnx", output_hidden_states=True) < 1e-4
    with torch.no_grad():
        model.encoder.layers[1].layer_norm.bias[3] += 0.1
    with pytest.raises(RuntimeError, match="`last_hidden_state` of the exported WavLMForSkillStudent differs"):
        export_onnx(model, tmp_path / "other.onnx", output_hidden_states=True)
    with torch.no_grad():
        model.encoder.layers[1].layer_norm.bias[3] -= 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["same.onnx"]


class ElsewhereDouble(nn.Module):
    """Twice what it gets, but for exporters."""

    def forward(self, hidden_states):
        return hidden_states if torch.compiler.is_exporting() else 2 * hidden_states


@pytest.mark.nightly
def test_program_that_differs_is_removed(tmp_path):
    model = make_model(one_layer=True)
    model.encoder.dropout = ElsewhereDouble()
    with pytest.raises(RuntimeError, match="`last_hidden_state` of the exported WavLMForSkillStudent differs"):
        export_program(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_batch_size_that_is_fixed_is_an_error(tmp_path):
    model = make_model(one_layer=True)
    model.encoder.dropout.register_forward_hook(lambda module, args, output: output.reshape(2, -1, output.shape[-1]))
    with pytest.raises(Exception, match="batch|input_values"):
        export_program(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def optimised(path, folder):
    """The operators that onnxruntime makes of a file."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3  # it warns that such a file is for this processor
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


@pytest.mark.slow
def test_onnxruntime_makes_no_slow_operator_of_norms(encoder, tmp_path):
    """Its fused addition and layer norm takes four times as long as both on a CPU."""
    operators = optimised(encoder[1], tmp_path)
    assert "LayerNormalization" in operators
    assert "SkipLayerNormalization" not in operators


@pytest.mark.slow
def test_int8(encoder, tmp_path):
    import onnx

    model, path = encoder
    clips = [inputs_of(1, length, False)["input_values"][0] for length in (5000, 16_001)]
    report = quantize_onnx(path, tmp_path / "int8.onnx", clips)
    assert report["megabytes_before"] == path.stat().st_size / 1e6
    assert report["megabytes"] == (tmp_path / "int8.onnx").stat().st_size / 1e6
    assert report["cosine_similarity"].keys() == {"last_hidden_state", *(f"hidden_states.{i}" for i in range(4))}

    saved = OnnxModel(tmp_path / "int8.onnx")
    cosines = []
    for clip in clips:
        mask = torch.ones(1, len(clip), dtype=torch.long)
        with torch.no_grad():
            expected = model(clip[None], output_hidden_states=True).hidden_states[2]
        cosines += torch.cosine_similarity(saved(clip[None], mask)["hidden_states.2"], expected, dim=-1)[0].tolist()
    assert report["cosine_similarity"]["hidden_states.2"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert 0.98 < min(report["cosine_similarity"].values()) < 1

    graph = onnx.load(tmp_path / "int8.onnx").graph
    operators = [node.op_type for node in graph.node]
    # Of the positional convolution the inputs and outputs, too, and its bias; onnxruntime then multiplies integers.
    convolutions = len(model.config.conv_dim)
    assert operators.count("Conv") == convolutions + 1
    assert operators.count("DequantizeLinear") == convolutions + 4
    assert operators.count("QuantizeLinear") == 2
    assert optimised(tmp_path / "int8.onnx", tmp_path).count("QLinearConv") == 1
    # Query, key, value, output and gate of two layers; two feed-forward blocks; the projection of the features.
    assert operators.count("MatMulInteger") == 2 * 5 + 2 * 2 + 1
    largest = max(graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    assert largest.data_type == onnx.TensorProto.INT8
    for batch, length in ((1, 720), (3, 12_345)):
        inputs = inputs_of(batch, length, padded=True)
        expected = OnnxModel(path)(**inputs)["last_hidden_state"]
        actual = saved(**inputs)["last_hidden_state"]
        assert torch.cosine_similarity(actual, expected, dim=-1).mean() > 0.98


@pytest.mark.nightly
def test_int8_without_a_grouped_convolution(tmp_path):
    model = make_model(one_layer=True, num_conv_pos_embedding_groups=1)
    export_onnx(model, tmp_path / "model.onnx")
    noise = inputs_of(1, 5000, False)["input_values"][0]
    report = quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", [noise])
    assert 0.98 < report["cosine_similarity"]["last_hidden_state"] < 1
    assert "QuantizeLinear" not in optimised(tmp_path / "int8.onnx", tmp_path)


def test_compare_outputs_means_over_frames():
    def reference(input_values, attention_mask):
        assert attention_mask.shape == input_values.shape
        assert attention_mask.all()
        return {"states": torch.tensor([3.0, 0.0]).expand(1, input_values.shape[1], 2)}

    def other(input_values, attention_mask):
        states = reference(input_values, attention_mask)["states"].clone()
        states[:, 0] = torch.tensor([0.0, 3.0])  # a right angle in the first frame
        return {"states": states}

    compared = compare_outputs(reference, other, [np.zeros(1), np.zeros(4, dtype=np.float32)])
    assert compared == {"states": {"largest_difference": 1.0, "cosine_similarity": pytest.approx(3 / 5)}}
    compared = compare_outputs(reference, reference, [np.zeros(3)])
    assert compared == {"states": {"largest_difference": 0.0, "cosine_similarity": pytest.approx(1)}}


def test_no_audio_to_compare_on(tmp_path):
    with pytest.raises(ValueError, match="no audio"):
        compare_outputs(None, None, [])
    with pytest.raises(ValueError, match="no audio"):
        quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", [])


def test_missing_packages_are_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    missing = ("onnxscript", "onnxruntime")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    with pytest.raises(ImportError, match=r"onnxscript and onnxruntime.*pip install skill-hf\[export\]"):
        export_onnx(make_model(), tmp_path / "model.onnx")
    with pytest.raises(ImportError, match=r"onnxruntime.*pip install skill-hf\[export\]"):
        quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx", [])


@torch.no_grad()
def assert_compiles(model, backend, cases, atol=0.0, **options):
    # transformers hooks the layers at the first forward that asks for hidden states, behind a lock that torch cannot
    # trace.
    model(**cases[0], **options)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for inputs in cases:
        expected, actual = model(**inputs, **options), compiled(**inputs, **options)
        assert actual.keys() == expected.keys()
        torch.testing.assert_close(actual.to_tuple(), expected.to_tuple(), atol=atol, rtol=0)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.nightly), {"output_hidden_states": True}])
def test_compiles_without_graph_break(fresh_compiler, layout, masked, options):
    inputs = padded_batch()
    if not masked:
        del inputs["attention_mask"]
    assert_compiles(make_model(layout=layout), "eager", [inputs], **options)


@pytest.mark.nightly
def test_convolutions_compile_to_train_on_other_lengths(fresh_compiler):
    # By the whole of torch's compiler: it is its last part that some layouts of gradients are too much for.
    teacher = tiny_teacher(conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), num_hidden_layers=1)
    module = build_student(teacher).feature_extractor.train()
    compiled = torch.compile(module, dynamic=True)
    for samples in (80, 93):
        inputs, gradients = torch.randn(2, samples), []
        for forward in (module, compiled):
            module.zero_grad()
            forward(inputs).square().sum().backward()
            gradients.append({name: weight.grad for name, weight in module.named_parameters()})
        torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


@pytest.mark.nightly
def test_head_compiles_for_other_lengths(fresh_compiler):
    options = {"masked_group_norm": True, "use_weighted_layer_sum": True}
    model = make_model(WavLMSkillStudentForSequenceClassification, one_layer=True, **options)
    assert_compiles(model, "eager", [padded_batch(), inputs_of(3, 9001, padded=True)])


@pytest.mark.nightly
def test_compiles_with_inductor(fresh_compiler):
    model = make_model(num_hidden_layers=1, remaining_heads=[[0, 2]], intermediate_sizes=[5], removed_ffn_blocks=[])
    assert_compiles(model, "inductor", [padded_batch()], atol=1e-4, output_hidden_states=True)
