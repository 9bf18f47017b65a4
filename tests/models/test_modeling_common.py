"""
What transformers asks of its own models (the behaviours of its `ModelTesterMixin`, which is not in the
published package), asked of the student and its task heads, in both layouts, with layers that are narrow, empty and
removed. What depends on the layers of a family is asked of HuBERT, too.
"""

import copy
import inspect

import pytest
import torch
from conftest import WIDE_GROUPS, padded_batch, with_noise
from test_modeling_wavlm_skill_student import PRUNED, pruned_student
from transformers import AutoModelForAudioClassification, PreTrainedModel

from skill_hf import (
    HubertForSkillStudent,
    HubertSkillStudentForCTC,
    WavLMForSkillStudent,
    WavLMSkillStudentConfig,
    WavLMSkillStudentForAudioFrameClassification,
    WavLMSkillStudentForCTC,
    WavLMSkillStudentForSequenceClassification,
    WavLMSkillStudentForXVector,
)
from skill_hf.compression.budgets import ParameterBudget
from skill_hf.compression.pruning import cut_closed_units


HEADS = (
    WavLMSkillStudentForCTC,
    WavLMSkillStudentForSequenceClassification,
    WavLMSkillStudentForAudioFrameClassification,
    WavLMSkillStudentForXVector,
)
CLASSES = (WavLMForSkillStudent, *HEADS)
OF_HUBERT = (HubertForSkillStudent, HubertSkillStudentForCTC)
SMALL_HEADS = {"classifier_proj_size": 12, "tdnn_dim": (12,) * 5, "xvector_output_dim": 12, "vocab_size": 9}
STILL = {  # nothing random in training
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
HEADS_LEFT = [len(heads) for heads in PRUNED["remaining_heads"]]

by_class = pytest.mark.parametrize("model_class", CLASSES, ids=lambda model_class: model_class.__name__)
by_head = pytest.mark.parametrize("model_class", HEADS, ids=lambda model_class: model_class.__name__)


def by_class_and_layout(*classes):
    """WavLM's in both layouts, HuBERT's in the Large one."""
    cases = [
        pytest.param(model_class, layout, id=f"{layout}-{model_class.__name__}")
        for model_class in classes
        for layout in (("hubert-large",) if model_class in OF_HUBERT else ("base", "large"))
    ]
    return pytest.mark.parametrize(("model_class", "layout"), cases)


def make_model(model_class, layout, **kwargs):
    encoder = pruned_student(layout, num_labels=3, **SMALL_HEADS | kwargs)
    if isinstance(encoder, model_class):
        return encoder
    torch.manual_seed(0)
    model = with_noise(model_class(encoder.config))  # some heads start so close to 0 that nothing could be compared
    model.base_model.load_state_dict(encoder.state_dict())
    return model


def labels_for(model_class, frames=24):
    if model_class in (WavLMSkillStudentForCTC, HubertSkillStudentForCTC):
        return {"labels": torch.tensor([[1, 2, 3], [4, 5, -100]])}
    if model_class is WavLMSkillStudentForAudioFrameClassification:
        return {"labels": torch.nn.functional.one_hot(torch.arange(2 * frames).reshape(2, frames) % 3, 3)}
    return {} if model_class is WavLMForSkillStudent else {"labels": torch.tensor([0, 2])}


def first_output(output):
    return output.last_hidden_state if "last_hidden_state" in output else output.logits


@torch.no_grad()
def run(model, **kwargs):
    return model(**padded_batch(), **kwargs)


@by_class
def test_save_and_load(model_class, layout, tmp_path):
    model = make_model(model_class, layout)
    expected = first_output(run(model))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    for directory in ("whole", "shards"):
        loaded, info = model_class.from_pretrained(tmp_path / directory, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert not loaded.training
        torch.testing.assert_close(first_output(run(loaded)), expected, atol=0, rtol=0)
    varying = ("_name_or_path", "architectures", "dtype")
    there, here = loaded.config.to_dict(), model.config.to_dict()
    assert {name for name in there if there[name] != here.get(name)} <= set(varying)
    assert there["architectures"] == [model_class.__name__]


@by_class
def test_torch_save_and_deepcopy(model_class, layout, tmp_path):
    model = make_model(model_class, layout)
    expected = first_output(run(model))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    anew = model_class(model.config).eval()
    anew.load_state_dict(torch.load(tmp_path / "model.pt"))
    for other in (anew, copy.deepcopy(model)):
        torch.testing.assert_close(first_output(run(other)), expected, atol=0, rtol=0)


@by_class
def test_every_missing_weight_is_initialised(model_class, layout):
    config = make_model(model_class, layout).config
    # Built on the meta device and then filled, as by loading a checkpoint that lacks everything.
    load = PreTrainedModel.from_pretrained.__func__
    torch.manual_seed(0)
    model = load(model_class, None, config=config, state_dict={})
    for name, parameter in model.named_parameters():
        if "pos_conv_embed" in name:
            continue  # the stock method forgets its weight norm; a checkpoint without it is refused
        assert not parameter.is_meta, name
        assert parameter.isfinite().all(), name
        spread = parameter.std().item() if parameter.numel() > 1 else 0.0
        # Neither left as it was in memory, nor huge.
        assert abs(parameter.mean().item()) <= 1 + 1e-6 and spread < 2, name
    torch.manual_seed(0)
    again = load(model_class, None, config=config, state_dict={})
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        if "pos_conv_embed" not in name:
            torch.testing.assert_close(one, two, msg=name)
    # What stock models initialise to a constant is that constant here.
    for layer in model.base_model.encoder.layers:
        assert (layer.layer_norm.weight == 1).all() and (layer.layer_norm.bias == 0).all()
        if layer.attention.heads:
            assert (layer.attention.gru_rel_pos_const == 1).all()
        elif layer.attention.output is not None:
            assert (layer.attention.output.bias == 0).all()


@by_class
def test_forward_signature(model_class):
    names = list(inspect.signature(model_class.forward).parameters)
    assert names[:3] == ["self", "input_values", "attention_mask"]


@by_class
def test_deterministic_out_of_training(model_class, layout):
    model = make_model(model_class, layout)
    torch.testing.assert_close(first_output(run(model)), first_output(run(model)), atol=0, rtol=0)


@by_class
@pytest.mark.parametrize("in_config", [False, True])
def test_hidden_states(model_class, layout, in_config):
    model = make_model(model_class, layout)
    model.config.output_hidden_states = in_config
    output = run(model) if in_config else run(model, output_hidden_states=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 24, 32)] * 4


@by_class
@pytest.mark.parametrize("in_config", [False, True])
def test_attention_weights(model_class, layout, in_config):
    model = make_model(model_class, layout)
    model.set_attn_implementation("eager")
    model.config.output_attentions = in_config
    output = run(model) if in_config else run(model, output_attentions=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, heads, 24, 24) for heads in HEADS_LEFT]
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert (weights[1, :, :, 18:] == 0).all()  # 6000 of 8000 samples are 18 frames


@by_class
def test_gradients_reach_hidden_states_and_attention_weights(model_class, layout):
    model = make_model(model_class, layout)
    model.set_attn_implementation("eager")
    output = model(**padded_batch(), output_hidden_states=True, output_attentions=True)
    tensors = [*output.hidden_states, *(weights for weights in output.attentions if weights.numel())]
    for tensor in tensors:
        tensor.retain_grad()
    first_output(output).sum().backward()
    assert all(tensor.grad is not None for tensor in tensors)


@by_class
def test_tuple_and_dict_outputs_agree(model_class, layout):
    model = make_model(model_class, layout)
    as_dict = run(model, output_hidden_states=True, **labels_for(model_class))
    as_tuple = run(model, output_hidden_states=True, return_dict=False, **labels_for(model_class))
    flat = as_dict.to_tuple()
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(flat)
    torch.testing.assert_close(as_tuple, flat, atol=0, rtol=0)


@by_class_and_layout(*CLASSES, *OF_HUBERT)
def test_batch_equals_single_rows(model_class, layout):
    # In float64: see `assert_same_function`.
    model = make_model(model_class, layout).double()
    torch.manual_seed(1)
    batch = torch.randn(3, 8000, dtype=torch.float64)
    with torch.no_grad():
        together = model(batch, output_hidden_states=True)
        for row in range(3):
            alone = model(batch[row : row + 1], output_hidden_states=True)
            for one, two in zip(alone.hidden_states, together.hidden_states, strict=True):
                torch.testing.assert_close(one[0], two[row], atol=1e-10, rtol=0)
            torch.testing.assert_close(first_output(alone)[0], first_output(together)[row], atol=1e-10, rtol=0)


@by_class_and_layout(*CLASSES, *OF_HUBERT)
@pytest.mark.parametrize("padded", [False, True])
def test_sdpa_equals_eager(model_class, layout, padded):
    model = make_model(model_class, layout)
    inputs = padded_batch() if padded else {"input_values": padded_batch()["input_values"]}
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert model.base_model.config._attn_implementation == implementation
        with torch.no_grad():
            outputs.append(model(**inputs, output_hidden_states=True))
    for one, two in zip(outputs[0].hidden_states, outputs[1].hidden_states, strict=True):
        torch.testing.assert_close(one, two, atol=2e-6, rtol=0)
    torch.testing.assert_close(first_output(outputs[0]), first_output(outputs[1]), atol=1e-5, rtol=0)


@by_class_and_layout(*CLASSES, *OF_HUBERT)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_bf16(model_class, layout, tmp_path, attn_implementation):
    model = make_model(model_class, layout, **WIDE_GROUPS)
    model.save_pretrained(tmp_path)
    half = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation=attn_implementation)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    batch = padded_batch()
    with torch.no_grad():
        output = half(batch["input_values"].bfloat16(), attention_mask=batch["attention_mask"])
    expected, actual = first_output(run(model)).flatten(), first_output(output)
    assert actual.dtype == torch.bfloat16 and actual.isfinite().all()
    assert torch.cosine_similarity(expected, actual.float().flatten(), dim=0) > 0.99
    half.save_pretrained(tmp_path / "half")
    assert model_class.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@by_class_and_layout(*HEADS, HubertSkillStudentForCTC)
def test_training_reaches_every_weight_and_checkpointing_changes_no_gradient(model_class, layout):
    model = make_model(model_class, layout, **STILL).train()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        loss = model(**padded_batch(), **labels_for(model_class)).loss
        assert loss.isfinite()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    encoder = model.base_model_prefix
    unused = {f"{encoder}.masked_spec_embed"}
    if model.config.do_stable_layer_norm:
        # Norms in front of a block that is empty: what is left of it doesn't look at its input.
        unused |= {f"{encoder}.encoder.layers.0.layer_norm.{kind}" for kind in ("weight", "bias")}
        unused |= {f"{encoder}.encoder.layers.1.final_layer_norm.{kind}" for kind in ("weight", "bias")}
    names = {name for name, _ in model.named_parameters()}
    assert names - gradients[0].keys() <= unused
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@by_head
def test_a_head_of_another_size_starts_anew_only_if_asked(model_class, layout, tmp_path):
    model = make_model(model_class, layout)
    if model_class is WavLMSkillStudentForXVector:
        change, named = {"xvector_output_dim": 7}, "feature_extractor.weight"
    elif model_class is WavLMSkillStudentForCTC:
        change, named = {"vocab_size": 5}, "lm_head.weight"
    else:
        change, named = {"num_labels": 5}, "classifier.weight"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named):
        model_class.from_pretrained(tmp_path, **change)
    other = model_class.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **change)
    assert all(parameter.isfinite().all() for parameter in other.parameters())
    torch.testing.assert_close(other.base_model.state_dict(), model.base_model.state_dict(), atol=0, rtol=0)


@by_class_and_layout(*CLASSES, HubertSkillStudentForCTC)  # the stock encoder of HuBERT has no such method
def test_freezing(model_class, layout):
    model = make_model(model_class, layout, **STILL).train()
    model.freeze_feature_encoder()
    first_output(model(**padded_batch())).sum().backward()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".conv_layers." in f".{name}"}
    assert all(parameter.grad is None for parameter in model.base_model.feature_extractor.parameters())


@by_head
def test_weighted_layer_sum_reads_every_hidden_state(model_class, layout):
    if model_class is WavLMSkillStudentForCTC:
        return  # the stock head has none
    model = make_model(model_class, layout, use_weighted_layer_sum=True)
    assert model.layer_weights.shape == (4,)
    first_output(model(**padded_batch())).sum().backward()
    assert (model.layer_weights.grad != 0).all()


def test_adapter_on_top(layout):
    model = make_model(WavLMForSkillStudent, layout, add_adapter=True, output_hidden_size=20)
    assert run(model).last_hidden_state.shape == (2, 3, 20)


def test_an_encoder_on_top_of_which_an_adapter_is_new(layout, tmp_path):
    make_model(WavLMForSkillStudent, layout).save_pretrained(tmp_path)
    model = WavLMSkillStudentForCTC.from_pretrained(tmp_path, add_adapter=True)
    assert run(model).logits.shape == (2, 3, 9)


@by_class_and_layout(WavLMForSkillStudent, HubertForSkillStudent)
def test_spec_augment_masks_in_training_only(model_class, layout):
    kwargs = STILL | {"apply_spec_augment": True, "mask_time_prob": 0.5, "mask_time_length": 2}
    model = make_model(model_class, layout, **kwargs)
    expected = run(model, output_hidden_states=True).hidden_states[0]
    assert not torch.allclose(run(model.train(), output_hidden_states=True).hidden_states[0], expected)
    torch.testing.assert_close(run(model.eval(), output_hidden_states=True).hidden_states[0], expected)


def test_config_survives_its_json_form(layout, tmp_path):
    config = make_model(WavLMForSkillStudent, layout, masked_group_norm=True, base_model="someone/teacher").config
    config.save_pretrained(tmp_path)
    loaded = WavLMSkillStudentConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert WavLMSkillStudentConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert WavLMSkillStudentConfig().to_dict()["model_type"] == "wavlm_skill_student"


def test_labels_of_a_saved_classifier_come_back(tmp_path):
    names = {0: "yes", 1: "no", 2: "stop"}
    model = make_model(WavLMSkillStudentForSequenceClassification, "base")
    model.config.id2label, model.config.label2id = names, {name: index for index, name in names.items()}
    model.save_pretrained(tmp_path)
    assert AutoModelForAudioClassification.from_pretrained(tmp_path).config.id2label == names


def close_at_random(student):
    student.add_gates(["conv_channels", "attention_heads", "ffn_dims", "ffn_blocks"])
    generator = torch.Generator().manual_seed(0)
    for _, gate in student.named_gates():
        gate.log_alpha.data = 2 * torch.randn(gate.size, generator=generator) - 0.5


def prune_encoder(model):
    close_at_random(model.wavlm)
    model.wavlm.prune()


def prune_twice(model):
    prune_encoder(model)
    prune_encoder(model)


def shrink_and_prune(model):
    close_at_random(model.base_model)
    for _, gate in model.wavlm.named_gates():
        gate.log_alpha.data -= 8.0 * (gate.log_alpha.data < 0)
    assert cut_closed_units(model.wavlm, 1, ParameterBudget().unit_costs(model.wavlm)) is not None
    model.wavlm.prune()


def replace_encoder(model):
    other = copy.deepcopy(model.wavlm)
    close_at_random(other)
    other.prune()
    model.wavlm = other


@by_head
@pytest.mark.parametrize(
    "prune",
    [
        shrink_and_prune,
        *(pytest.param(way, marks=pytest.mark.nightly) for way in (prune_encoder, prune_twice, replace_encoder)),
    ],
)
def test_pruned_under_a_head_it_is_saved_whole(model_class, layout, tmp_path, prune):
    model = make_model(model_class, layout)
    same = model_class(model.config)
    before = same.config.to_dict()
    prune(model)
    assert model.wavlm.num_parameters() < same.wavlm.num_parameters()
    expected = first_output(run(model))
    model.save_pretrained(tmp_path / "head")
    loaded, info = model_class.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(first_output(run(loaded)), expected, atol=0, rtol=0)
    for name in ("conv_dim", *PRUNED):
        assert getattr(model.config, name) == getattr(model.wavlm.config, name)
    assert type(model)(model.config).wavlm.num_parameters() == model.wavlm.num_parameters()
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert {layer.attention.config._attn_implementation for layer in model.wavlm.encoder.layers} == {
            implementation
        }
    # A model that was made of the same config keeps its shapes.
    same.save_pretrained(tmp_path / "same")
    assert {name: same.config.to_dict()[name] for name in PRUNED} == {name: before[name] for name in PRUNED}
    assert model_class.from_pretrained(tmp_path / "same").num_parameters() == same.num_parameters()
