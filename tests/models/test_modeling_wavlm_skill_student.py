import copy
import json
import re
from bisect import bisect_right

import pytest
import torch
from conftest import LAYOUTS, STUDENT_CODE, family_config, padded_batch, tiny_config, tiny_teacher, with_noise
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCTC, BertConfig, BertModel, WavLMModel

from skill_hf import WavLMForSkillStudent, WavLMSkillStudentConfig
from skill_hf.models.families import build_student
from skill_hf.models.students import STUDENT_CLASSES


def assert_same_hidden_states(model, other, inputs, atol=1e-5):
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        actual = other(**inputs, output_hidden_states=True)
    states = actual.hidden_states
    if len(states) < len(expected.hidden_states):  # where layers are removed, the state passes them unchanged
        layers = other.config.remaining_layers
        states = [states[0], *(states[bisect_right(layers, layer)] for layer in model.config.remaining_layers)]
        assert len(actual.hidden_states) == len(layers) + 1
    for index, (one, two) in enumerate(zip(expected.hidden_states, states, strict=True)):
        torch.testing.assert_close(two, one, atol=atol, rtol=0, msg=lambda text, index=index: f"layer {index}: {text}")
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=atol, rtol=0)


def assert_same_function(model, other, inputs):
    """
    In float64, where the two differ by 1e-13 at most. In float32 layer norms over two or three channels, which pruned
    students of this size have, make any difference of rounding up to 100 times as large, by processor.
    """
    model, other = copy.deepcopy(model).double(), copy.deepcopy(other).double()
    assert_same_hidden_states(model, other, inputs | {"input_values": inputs["input_values"].double()}, atol=1e-10)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_stock_checkpoint_gives_the_same_hidden_states(teacher, tmp_path, padded, attn_implementation):
    teacher.save_pretrained(tmp_path)
    student = WavLMForSkillStudent.from_pretrained(tmp_path, attn_implementation=attn_implementation).eval()
    inputs = padded_batch()
    if not padded:
        del inputs["attention_mask"]
    assert_same_hidden_states(teacher, student, inputs)


def test_checkpoint_with_a_head_gives_its_encoder(tmp_path):
    from transformers import WavLMForCTC

    torch.manual_seed(0)
    model = WavLMForCTC(tiny_config(vocab_size=8)).eval()
    model.save_pretrained(tmp_path)
    assert_same_hidden_states(model.wavlm, WavLMForSkillStudent.from_pretrained(tmp_path).eval(), padded_batch())


def test_long_distances_share_buckets_as_in_the_stock_model():
    # 1.9 s: 94 frames, more than `max_bucket_distance`.
    teacher = tiny_teacher()
    inputs = {"input_values": torch.randn(1, 30_400)}
    assert_same_hidden_states(teacher, build_student(teacher).eval(), inputs)


def test_built_student_is_a_copy_that_uses_the_fused_kernel(teacher):
    student = build_student(teacher)
    assert student.training
    assert student.config._attn_implementation == "sdpa"
    assert_same_hidden_states(teacher, copy.deepcopy(student).eval(), padded_batch())
    with torch.no_grad():
        student.feature_projection.projection.weight.zero_()
    assert teacher.feature_projection.projection.weight.abs().sum() > 0


def test_position_bias_is_computed_once_and_not_per_row(monkeypatch):
    student = build_student(tiny_teacher()).eval()
    calls = []
    attention_class = type(student.encoder.layers[0].attention)
    compute = attention_class.compute_bias

    def counted(self, frames):
        calls.append(compute(self, frames))
        return calls[-1]

    monkeypatch.setattr(attention_class, "compute_bias", counted)
    student(torch.randn(3, 8000))
    assert len(calls) == 1
    assert calls[0].shape == (4, 24, 24)


def test_attention_weights(teacher):
    student = build_student(teacher).eval()
    student.set_attn_implementation("eager")
    output = student(torch.randn(2, 8000), output_attentions=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 24, 24)] * 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 24))


PRUNED = {
    "remaining_heads": [[], [1, 3], [0, 1, 2, 3]],
    "intermediate_sizes": [5, 0, 48],
    "removed_attention_blocks": [],
    "removed_ffn_blocks": [1],
}


def pruned_student(layout, **kwargs):
    """A student of WavLM in its base or large layout, or of one of `LAYOUTS`."""
    torch.manual_seed(0)
    config = family_config(layout) if layout in LAYOUTS else tiny_config(layout)
    student_class = STUDENT_CLASSES[config.model_type]
    fields = config.to_dict() | PRUNED | {"conv_dim": [3, 16, 5, 7, 16, 2, 11]} | kwargs
    return with_noise(student_class(student_class.config_class(**fields)))


@pytest.mark.parametrize("removed", [[], [0]])
def test_unequal_widths_save_load_and_stock_form(layout, tmp_path, removed):
    student = pruned_student(layout, removed_attention_blocks=removed)
    student.save_pretrained(tmp_path)
    for loaded in (WavLMForSkillStudent.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is WavLMForSkillStudent
        for name in PRUNED:
            assert getattr(loaded.config, name) == getattr(student.config, name)
        assert loaded.state_dict().keys() == student.state_dict().keys()
        assert_same_hidden_states(student, loaded.eval(), padded_batch(), atol=0)
    stock = student.to_stock()
    assert type(stock) is WavLMModel
    assert_same_function(student, stock, padded_batch())
    assert_same_hidden_states(stock, student.to_wavlm(), padded_batch(), atol=0)
    stock.save_pretrained(tmp_path / "stock")
    loaded = WavLMModel.from_pretrained(tmp_path / "stock").eval()
    assert_same_hidden_states(stock, loaded, padded_batch(), atol=0)


def test_files_of_a_saved_student(tmp_path):
    pruned_student("base").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", *STUDENT_CODE}


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCTC])
def test_student_published_with_two_files_is_saved_with_all(tmp_path, auto_class):
    """As those of before the split, whose config and weights are the same."""
    student = pruned_student("base")
    student.save_pretrained(tmp_path / "before")
    for name in STUDENT_CODE - {"configuration_wavlm_skill_student.py", "modeling_wavlm_skill_student.py"}:
        (tmp_path / "before" / name).unlink()
    config = json.loads((tmp_path / "before" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_wavlm_skill_student.WavLMForSkillStudent"
    loaded = auto_class.from_pretrained(tmp_path / "before").eval()
    assert_same_hidden_states(student, loaded.base_model, padded_batch(), atol=0)
    loaded.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == STUDENT_CODE


def test_encoder_of_a_student_loads_into_a_head(tmp_path):
    student = pruned_student("base")
    student.save_pretrained(tmp_path)
    model = AutoModelForCTC.from_pretrained(tmp_path, vocab_size=8).eval()
    assert_same_hidden_states(student, model.wavlm, padded_batch(), atol=0)
    assert model(torch.randn(1, 8000)).logits.shape == (1, 24, 8)


@pytest.mark.parametrize("kwargs", [{}, {"removed_attention_blocks": [0]}])
def test_gradient_checkpointing_gives_the_same_gradients(layout, kwargs):
    student = pruned_student(
        layout, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0, **kwargs
    )
    student.config.apply_spec_augment = False
    student.train()
    inputs, gradients = padded_batch(), []
    for enable in (False, True):
        student.zero_grad()
        if enable:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        student(**inputs).last_hidden_state.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def padded_and_alone(student, with_mask=True):
    """Largest difference between a clip's hidden states alone and behind padding in a batch."""
    batch = padded_batch()
    with torch.no_grad():
        mask = {"attention_mask": batch["attention_mask"]} if with_mask else {}
        together = student(batch["input_values"], **mask, output_hidden_states=True).hidden_states
        clip = {"input_values": batch["input_values"][1:, :6000]}
        if with_mask:
            clip["attention_mask"] = torch.ones(1, 6000, dtype=torch.long)
        alone = student(**clip, output_hidden_states=True).hidden_states
    frames = alone[0].shape[1]
    return max((one[0] - two[1, :frames]).abs().max().item() for one, two in zip(alone, together, strict=True))


def test_padding_changes_nothing_for_layer_norm_and_masked_group_norm():
    assert padded_and_alone(pruned_student("large")) < 1e-4
    assert padded_and_alone(pruned_student("base", masked_group_norm=True)) < 1e-4
    # The stock group norm is what it is; without a mask nobody can tell padding from silence.
    assert padded_and_alone(pruned_student("base")) > 1e-2
    assert padded_and_alone(pruned_student("base", masked_group_norm=True), with_mask=False) > 1e-2


def test_masked_group_norm_without_padding_is_the_stock_one():
    inputs = {"input_values": padded_batch()["input_values"]}
    stock, masked = pruned_student("base"), pruned_student("base", masked_group_norm=True)
    assert_same_hidden_states(stock, masked, inputs, atol=0)
    assert_same_hidden_states(stock, masked, inputs | {"attention_mask": torch.ones(2, 8000, dtype=torch.long)})


def test_masked_group_norm_survives_saving_gates_and_checkpointing(tmp_path):
    student = pruned_student(
        "base", masked_group_norm=True, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0
    )
    student.save_pretrained(tmp_path)
    assert padded_and_alone(AutoModel.from_pretrained(tmp_path)) < 1e-4
    off = AutoModel.from_pretrained(tmp_path, masked_group_norm=False)
    assert padded_and_alone(off) > 1e-2

    student.config.apply_spec_augment, student.config.layerdrop = False, 0.0
    student.train()
    gradients = []
    for enable in (False, True):
        student.zero_grad()
        if enable:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        output = student(**padded_batch()).last_hidden_state
        student(torch.randn(1, 4000))  # a forward between forward and backward: nothing of it may leak
        output.square().sum().backward()
        gradients.append(student.feature_extractor.conv_layers[0].conv.weight.grad.clone())
    torch.testing.assert_close(*gradients)

    student.gradient_checkpointing_disable()
    student.add_gates()
    student.eval()
    with torch.no_grad():
        gated = student(**padded_batch()).last_hidden_state
        student.prune()
        torch.testing.assert_close(student(**padded_batch()).last_hidden_state, gated, atol=1e-4, rtol=0)
    assert padded_and_alone(student) < 1e-4


def test_stock_form_of_a_masked_group_norm_warns(caplog):
    student = pruned_student("base", masked_group_norm=True)
    stock = student.to_wavlm()
    assert "masked_group_norm" in caplog.text
    assert_same_function(student, stock, {"input_values": padded_batch()["input_values"]})


def test_stock_form_keeps_every_other_field():
    student = pruned_student("large", final_dropout=0.3, num_labels=5, mask_time_prob=0.2)
    config = student.to_wavlm().config
    assert (config.final_dropout, config.num_labels, config.mask_time_prob) == (0.3, 5, 0.2)
    assert not hasattr(config, "remaining_heads") and not hasattr(config, "auto_map")


def test_hub_id_of_the_teacher_is_kept_and_a_local_path_is_not(tmp_path, monkeypatch):
    tiny_teacher().save_pretrained(tmp_path / "someone" / "teacher")
    assert WavLMSkillStudentConfig.from_pretrained(tmp_path / "someone" / "teacher").base_model is None
    monkeypatch.setattr("os.path.exists", lambda path: False)
    config_dict, _ = WavLMSkillStudentConfig.get_config_dict(tmp_path / "someone" / "teacher")
    assert config_dict["base_model"] == str(tmp_path / "someone" / "teacher")


def test_a_student_with_gates_is_not_saved(tmp_path):
    student = pruned_student("base")
    student.add_gates()
    with pytest.raises(ValueError, match=r"prune\(\)"):
        student.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("remaining_heads", [[0], [1]]),
        ("remaining_heads", [[0], [4], []]),
        ("remaining_heads", [[1, 0], [], []]),
        ("remaining_heads", 3),
        ("remaining_heads", [[True], [], []]),
        ("remaining_heads", [["0"], [], []]),
        ("remaining_heads", [[0, 0], [], []]),
        ("remaining_heads", [[-1], [], []]),
        ("intermediate_sizes", [1, 2]),
        ("intermediate_sizes", [1, 2, -1]),
        ("intermediate_sizes", [1, 2, "3"]),
        ("intermediate_sizes", [1, 2, True]),
        ("conv_dim", [16, 16, 16, 0, 16, 16, 16]),
        ("masked_group_norm", "yes"),
        ("base_model", 7),
        ("format_version", 4),
        ("format_version", "1"),
        ("format_version", None),
        ("removed_attention_blocks", 0),
        ("removed_attention_blocks", [3]),
        ("removed_ffn_blocks", [1, 1]),
        ("max_bucket_distance", 8),
        ("num_buckets", 3),
        ("removed_attention_blocks", [1]),
        ("removed_ffn_blocks", [0]),
    ],
)
def test_impossible_config_names_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        WavLMSkillStudentConfig(**tiny_config().to_dict() | PRUNED | {field: value})


class _PlainConfig(WavLMSkillStudentConfig):
    pass


def test_config_without_an_init_of_its_own_checks_its_fields():
    """Transformers 5 would write one that does not."""
    fields = tiny_config().to_dict() | PRUNED
    with pytest.raises(ValueError, match="remaining_heads"):
        _PlainConfig(**fields | {"remaining_heads": [[99], [], []]})
    config = _PlainConfig(**fields)
    assert config.intermediate_sizes == PRUNED["intermediate_sizes"]
    assert config.auto_map == WavLMSkillStudentConfig().auto_map


def edit_config(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("field", ["format_version", "remaining_heads", "intermediate_sizes", "removed_ffn_blocks"])
@pytest.mark.parametrize("auto_class", [WavLMForSkillStudent, AutoModel, AutoModelForCTC])
def test_published_config_without_a_field(tmp_path, field, auto_class):
    pruned_student("base").save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.pop(field))
    with pytest.raises(ValueError, match=field):
        auto_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("auto_class", [WavLMForSkillStudent, AutoModel, AutoModelForCTC])
@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("remaining_heads", [[], [1, 2, 3], [0, 1, 2, 3]], r"`remaining_heads\[1\]`: .* has shape"),
        ("remaining_heads", [[2], [1, 3], [0, 1, 2, 3]], r"`remaining_heads\[0\]`.* is missing"),
        ("remaining_heads", [[], [1, 3], []], r"`remaining_heads\[2\]`"),
        ("intermediate_sizes", [6, 0, 48], r"`intermediate_sizes\[0\]`"),
        ("intermediate_sizes", [5, 0, 0], r"`intermediate_sizes\[2\]`"),
        ("removed_ffn_blocks", [], r"`intermediate_sizes\[1\]`"),
        ("conv_dim", [3, 16, 5, 7, 15, 2, 11], r"`conv_dim\[4\]`"),
        ("conv_dim", [3, 16, 5, 7, 16, 2, 12], r"`conv_dim\[6\]`"),
        ("hidden_size", 64, "`hidden_size`"),
        ("num_buckets", 16, "`num_buckets`"),
        ("num_hidden_layers", 2, "`remaining_heads`"),
        ("remaining_heads", [[], [1, 9], [0, 1, 2, 3]], r"`remaining_heads\[1\]`"),
        ("format_version", 7, "`format_version` is 7"),
    ],
)
def test_published_config_that_its_weights_contradict(tmp_path, auto_class, field, value, named):
    pruned_student("base").save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.update({field: value}))
    for kwargs in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=named):
            auto_class.from_pretrained(tmp_path, **kwargs)


def test_published_weights_that_are_incomplete_or_of_another_model(tmp_path):
    student = pruned_student("base")
    student.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("encoder.layers.2.attention.v_proj.weight", "feature_extractor.conv_layers.1.conv.weight"):
        save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"{re.escape(name)} is missing"):
            AutoModel.from_pretrained(tmp_path)
    extra = {"encoder.layers.1.feed_forward.output_dense.weight": torch.zeros(32, 4)}
    save_file(weights | extra, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"`intermediate_sizes\[1\]`.*output_dense.weight is unexpected"):
        AutoModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModel.from_pretrained(tmp_path)


def test_a_config_cannot_turn_the_check_of_its_weights_off(tmp_path):
    pruned_student("base").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name: weight for name, weight in weights.items() if not name.startswith("encoder.layers.2.")}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    edit_config(tmp_path, lambda config: config.update(quantization_config={"quant_method": "nope"}))
    with pytest.raises(ValueError):
        WavLMForSkillStudent.from_pretrained(tmp_path)


def test_fewer_layers_if_the_caller_asks_for_them(teacher, tmp_path):
    teacher.save_pretrained(tmp_path)
    student = WavLMForSkillStudent.from_pretrained(tmp_path, num_hidden_layers=2).eval()
    stock = WavLMModel.from_pretrained(tmp_path, num_hidden_layers=2).eval()
    assert_same_hidden_states(stock, student, padded_batch())


def test_positional_arguments_and_lists_are_those_of_the_stock_model():
    tuples = {"remaining_heads": ((), (1, 3), (0, 1)), "intermediate_sizes": (5, 0, 48)}
    student = WavLMForSkillStudent(WavLMSkillStudentConfig(**tiny_config().to_dict() | PRUNED | tuples))
    student.add_gates()
    student.prune()
    assert student.config.remaining_heads[1] == [1, 3]
    batch = padded_batch()
    student(batch["input_values"], batch["attention_mask"], None)


def test_tags_of_one_model_are_not_those_of_others():
    one, other = pruned_student("base"), pruned_student("base")
    one.add_model_tags("private")
    assert "private" in one.model_tags
    assert "private" not in other.model_tags and "private" not in pruned_student("base").model_tags


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masked_group_norm_takes_masks_of_any_type(dtype):
    student, batch = pruned_student("base", masked_group_norm=True), padded_batch()
    with torch.no_grad():
        expected = student(**batch).last_hidden_state
        actual = student(batch["input_values"], attention_mask=batch["attention_mask"].to(dtype)).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


def test_code_that_a_published_config_names_is_not_taken_over(tmp_path):
    pruned_student("base").save_pretrained(tmp_path / "evil")
    evil = {"AutoConfig": "../../evil.Config", "AutoModel": "someone/else--evil.Model"}
    edit_config(tmp_path / "evil", lambda config: config.update(auto_map=evil))
    for kwargs in ({}, {"trust_remote_code": True}):
        model = AutoModel.from_pretrained(tmp_path / "evil", **kwargs)
        assert type(model) is WavLMForSkillStudent
    model.save_pretrained(tmp_path / "again")
    auto_map = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert auto_map == WavLMSkillStudentConfig().auto_map
    assert {value.split(".")[0] for value in auto_map.values()} == {
        "configuration_wavlm_skill_student",
        "modeling_wavlm_skill_student",
    }


def test_checkpoint_of_another_family(tmp_path):
    BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bert"):
        WavLMForSkillStudent.from_pretrained(tmp_path)
