"""Students of files of DPHuBERT's format, and the way back."""

import json

import pytest
import torch
from conftest import LAYOUTS, family_teacher, padded_batch, tiny_teacher
from foreign_models import DUMMY_WEIGHT, assert_same_states, dphubert_content, without_positions
from safetensors.torch import load_file, save_file
from test_modeling_wavlm_skill_student import PRUNED, pruned_student
from transformers import AutoModel, AutoModelForCTC, HubertModel

from skill_hf import WavLMForSkillStudent, WavLMSkillStudentForCTC
from skill_hf.compression.pruning import fit_gates
from skill_hf.conversion.converter import convert_checkpoint, convert_student, save_checkpoint
from skill_hf.models.families import STUDENT_CLASSES, build_student
from skill_hf.models.loading import load_feature_extractor, load_model


def save(content, directory):
    save_checkpoint(content, directory / "file.pth")
    return directory / "file.pth"


def scaled_student(directory, layout="base", **kwargs):
    return convert_checkpoint(save(dphubert_content(directory, layout, **kwargs), directory))[0]


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("removed", [[], [0]])
def test_hidden_states_are_those_of_a_direct_computation(tmp_path, layout, removed, soft):
    content = dphubert_content(tmp_path, layout, soft, removed_attention_blocks=removed)
    student, extractor, checkpoint = convert_checkpoint(save(content, tmp_path), base_model="you/teacher")
    assert checkpoint.family == "wavlm"
    assert extractor.do_normalize == content["config"]["normalize_waveform"]
    assert student.config.base_model == "you/teacher"
    assert student.config.scaled_features == soft
    assert student.config.removed_attention_blocks == removed
    student.save_pretrained(tmp_path / "student")
    for loaded in (AutoModel.from_pretrained(tmp_path / "student"), load_model(tmp_path / "student")):
        assert type(loaded) is WavLMForSkillStudent
        assert_same_states(loaded, content)
    assert_same_states(loaded.fuse(), content)


def test_without_its_first_attention_block_a_file_has_no_position_bias(tmp_path, layout):
    content = dphubert_content(tmp_path, layout)
    config, weights = content["config"], content["state_dict"]
    config["encoder_use_attention"][0] = False
    config["encoder_remaining_heads"][0] = [1, 2]  # as DPHuBERT leaves it if a gate of the whole block closes
    for name in [name for name in weights if name.startswith("encoder.transformer.layers.0.attention.")]:
        del weights[name]
    student, _, _ = convert_checkpoint(save(content, tmp_path))
    assert student.config.removed_attention_blocks == [0]
    assert not student.encoder.layers[0].attention.rel_attn_embed.weight.any()
    assert_same_states(student, content)


@pytest.mark.parametrize("removed", [[], [0]])
@pytest.mark.parametrize("mask_time_prob", [0.0, 0.1])
def test_round_trip_gives_the_same_tensors_and_config(tmp_path, layout, removed, mask_time_prob):
    student = pruned_student(
        layout, removed_attention_blocks=removed, mask_time_prob=mask_time_prob, scaled_features=layout == "large"
    )
    if layout == "large":
        student.feature_extractor.scale = torch.rand(11)
    student.save_pretrained(tmp_path)
    back, _, _ = convert_checkpoint(save(convert_student(tmp_path), tmp_path))
    assert_equal_tensors(back, student)
    fields, ours = back.config.to_dict(), student.config.to_dict()
    assert {name for name in ours if fields[name] != ours[name]} <= {"architectures", "dtype"}


def assert_equal_tensors(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_the_format_by_its_names(tmp_path):
    """Names and shapes that DPHuBERT's model has, for one that is pruned in every way."""
    content = dphubert_content(tmp_path, "base", removed_attention_blocks=[0], num_hidden_layers=3)
    assert content["config"] == {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": [
            (8, 10, 5),
            (16, 3, 2),
            (9, 3, 2),
            (7, 3, 2),
            (16, 3, 2),
            (8, 2, 2),
            (11, 2, 2),
        ],
        "extractor_conv_bias": False,
        "encoder_embed_dim": 32,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": 16,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 3,
        "encoder_use_attention": [True, True, True],  # the first stores the position bias of all
        "encoder_use_feed_forward": [True, False, True],
        "encoder_total_num_heads": [4, 4, 4],
        "encoder_remaining_heads": [[], [1, 3], [0, 1, 2, 3]],
        "encoder_num_buckets": 32,
        "encoder_max_distance": 80,
        "encoder_attention_dropout": 0.1,
        "encoder_ff_interm_features": [5, 0, 48],
        "encoder_ff_interm_dropout": 0.1,
        "encoder_dropout": 0.1,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.1,
        "aux_num_out": None,
        "normalize_waveform": False,
        "extractor_prune_conv_channels": False,
        "encoder_prune_attention_heads": False,
        "encoder_prune_attention_layer": False,
        "encoder_prune_feed_forward_intermediate": False,
        "encoder_prune_feed_forward_layer": False,
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in content["state_dict"].items()}
    layer = "encoder.transformer.layers.{}.{}"
    assert shapes[DUMMY_WEIGHT] == (11,)
    assert shapes["feature_extractor.conv_layers.0.layer_norm.weight"] == (8,)
    assert shapes["encoder.feature_projection.projection.weight"] == (32, 11)
    assert shapes["encoder.transformer.pos_conv_embed.conv.weight_g"] == (1, 1, 16)
    assert shapes["encoder.transformer.pos_conv_embed.conv.weight_v"] == (32, 8, 16)
    assert shapes["encoder.transformer.layer_norm.weight"] == (32,)
    assert shapes[layer.format(0, "attention.rel_attn_embed.weight")] == (32, 4)
    assert shapes[layer.format(0, "attention.q_proj.weight")] == (0, 32)
    assert shapes[layer.format(0, "attention.out_proj.weight")] == (32, 0)
    assert shapes[layer.format(1, "attention.k_proj.bias")] == (16,)
    assert shapes[layer.format(1, "attention.gru_rel_pos_const")] == (1, 4, 1, 1)
    assert shapes[layer.format(1, "attention.gru_rel_pos_linear.weight")] == (8, 8)
    assert shapes[layer.format(2, "feed_forward.output_dense.weight")] == (32, 48)
    assert shapes[layer.format(2, "final_layer_norm.bias")] == (32,)
    assert not any("layers.1.feed_forward" in name for name in shapes)
    assert len(shapes) == 7 + 2 + 1 + 4 + 3 + 2 + 3 * (4 + 11) + 1 + 2 * 4


@pytest.mark.parametrize("family", ["hubert", "wav2vec2"])
def test_other_families_by_the_table_of_students(tmp_path, layout, family):
    content = without_positions(dphubert_content(tmp_path, layout))
    student, _, _ = convert_checkpoint(save(content, tmp_path), family=family)
    assert type(student) is STUDENT_CLASSES[family]
    assert_same_states(student, content)
    student.save_pretrained(tmp_path / "student")
    back, _, _ = convert_checkpoint(save(convert_student(tmp_path / "student"), tmp_path))
    assert type(back) is type(student)
    assert_equal_tensors(back, student)


def test_a_stock_model_is_written_too(tmp_path):
    tiny_teacher().save_pretrained(tmp_path)
    content = convert_student(tmp_path)
    assert content["config"]["encoder_remaining_heads"] == [[0, 1, 2, 3]] * 3
    assert content["config"]["encoder_ff_interm_features"] == [48] * 3
    assert_same_states(tiny_teacher(), content)


def test_what_the_format_cannot_express_is_refused(tmp_path):
    pruned_student("base", hidden_act="relu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`hidden_act` of the student is 'relu'"):
        convert_student(tmp_path)


NOT_IN_FORMAT = {
    "distilhubert": "`feat_proj_layer_norm` of the student is False",
    "hubert-batch-norm": "`conv_pos_batch_norm` of the student is True",
    "mms": "`adapter_attn_dim` of the student is 8",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_written_with_its_hidden_states_or_refused(name, tmp_path):
    student = build_student(family_teacher(name))
    student.save_pretrained(tmp_path)
    if name in NOT_IN_FORMAT:
        with pytest.raises(ValueError, match=f"{NOT_IN_FORMAT[name]}; models of DPHuBERT's format have"):
            convert_student(tmp_path)
    else:
        assert_same_states(student, convert_student(tmp_path))


# ------------------------------------------------------------------------------------ students with `scaled_features`


def test_gated_equals_pruned_with_scaled_features(tmp_path, layout):
    student = scaled_student(tmp_path, layout)
    scale = student.feature_extractor.scale.clone()
    student.add_gates()
    torch.manual_seed(7)
    with torch.no_grad():
        for _, gate in student.named_gates():
            gate.log_alpha.copy_(3 * torch.randn_like(gate.log_alpha))
        fit_gates(student, round(0.7 * sum(parameter.numel() for parameter in student.parameters())))
        gated = student(**padded_batch(), output_hidden_states=True).hidden_states
        kept = dict(student.named_gates())["feature_extractor.conv_layers.6.channel_gate"].deterministic().nonzero()
        student.prune()
        pruned = student(**padded_batch(), output_hidden_states=True).hidden_states
    for before, after in zip(gated, pruned, strict=True):
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert 0 < len(kept) < 11
    assert torch.equal(student.feature_extractor.scale, scale[kept.flatten()])
    student.save_pretrained(tmp_path / "pruned")
    assert_equal_tensors(AutoModel.from_pretrained(tmp_path / "pruned"), student)


@torch.no_grad()
def test_scaled_features_wherever_the_features_are_computed(tmp_path):
    """With statistics over valid samples alone, clip by clip, with checkpoints, in a copy and in half precision."""
    student = scaled_student(tmp_path)
    batch = padded_batch()
    student.config.masked_group_norm = True
    padded = student(**batch).last_hidden_state[1]
    alone = student(batch["input_values"][1:, :6000]).last_hidden_state[0]
    torch.testing.assert_close(padded[: len(alone)], alone, atol=1e-4, rtol=0)
    copy = build_student(student)
    assert_equal_tensors(copy, student)
    copy.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.enable_grad():
        features = copy.feature_extractor(batch["input_values"])
    torch.testing.assert_close(features, student.feature_extractor(batch["input_values"]), atol=1e-5, rtol=0)
    assert student.to(torch.bfloat16).feature_extractor.scale.dtype == torch.bfloat16
    assert student(batch["input_values"].bfloat16()).last_hidden_state.isfinite().all()


def test_scaled_features_under_a_head(tmp_path):
    student = scaled_student(tmp_path)
    student.save_pretrained(tmp_path)
    model = AutoModelForCTC.from_pretrained(tmp_path)
    assert type(model) is WavLMSkillStudentForCTC
    model.save_pretrained(tmp_path / "ctc")
    assert_equal_tensors(AutoModel.from_pretrained(tmp_path / "ctc"), student)


def test_only_scaled_students_are_of_the_second_version_of_the_format(tmp_path):
    pruned_student("base").save_pretrained(tmp_path / "plain")
    scaled_student(tmp_path).save_pretrained(tmp_path / "scaled")
    fields = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "scaled")}
    assert [fields[name]["format_version"] for name in ("plain", "scaled")] == [1, 2]
    # What was published before the field was there.
    del fields["plain"]["scaled_features"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(fields["plain"]))
    loaded = AutoModel.from_pretrained(tmp_path / "plain")
    assert loaded.config.remaining_heads == PRUNED["remaining_heads"]
    assert loaded.feature_extractor.scale is None


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (
            lambda weights: weights.pop("feature_extractor.scale"),
            "`scaled_features`: feature_extractor.scale is missing",
        ),
        (lambda weights: weights.update({"feature_extractor.scale": torch.ones(3)}), r"`conv_dim\[-1\]`"),
    ],
)
def test_a_scale_that_does_not_fit(tmp_path, damage, pattern):
    scaled_student(tmp_path).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    damage(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=pattern):
        AutoModel.from_pretrained(tmp_path)


def test_a_scale_that_the_config_does_not_have(tmp_path):
    scaled_student(tmp_path).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaled_features": False}))
    with pytest.raises(ValueError, match="`scaled_features`: feature_extractor.scale is unexpected"):
        AutoModel.from_pretrained(tmp_path)


def test_scaled_features_have_no_stock_form(tmp_path):
    with pytest.raises(ValueError, match="`scaled_features`, which no stock model supports"):
        scaled_student(tmp_path).to_stock()


# ----------------------------------------------------------------------------------------------------- what is refused


def change_config(**settings):
    return lambda content: content["config"].update(settings)


def drop(part, name):
    return lambda content: content[part].pop(name)


def change_weight(name, change):
    return lambda content: content["state_dict"].update({name: change(content["state_dict"].get(name))})


FIRST = "feature_extractor.conv_layers.0.conv.weight"
REFUSED = [
    (drop("config", "encoder_embed_dim"), "`encoder_embed_dim` must be a whole number from 1 to 1048576, but"),
    (drop("config", "encoder_dropout"), "it lacks `encoder_dropout`"),
    (drop("config", "encoder_total_num_heads"), "`encoder_total_num_heads` must be a number of heads for each of 3"),
    (change_config(encoder_num_layers=10**9), "`encoder_num_layers` must be a whole number from 1 to 256"),
    (change_config(encoder_num_layers=True), "`encoder_num_layers` must be"),
    (change_config(encoder_num_layers=4), "for each of 4 layers"),
    (change_config(encoder_pos_conv_groups=5), "`encoder_pos_conv_groups` must divide `encoder_embed_dim`, 32"),
    (
        change_config(encoder_pos_conv_kernel=15),
        "pos_conv_embed.conv.weight_g has shape (1, 1, 16) instead of (1, 1, 15)",
    ),
    (change_config(encoder_dropout="much"), "`encoder_dropout` must be a number from 0 to 1, but is 'much'"),
    (
        change_config(encoder_remaining_heads=[[], [1, 9], [0, 1, 2, 3]]),
        "`encoder_remaining_heads[1]` must be ascending",
    ),
    (
        change_config(encoder_remaining_heads=[[], [3], [0, 1, 2, 3]]),
        "k_proj.weight has shape (16, 32) instead of (8, 32)",
    ),
    (change_config(encoder_remaining_heads=[3, 3, 3]), "`encoder_remaining_heads` must be a list of heads for each"),
    (
        change_config(encoder_total_num_heads=[4, 4, 2]),
        "`encoder_total_num_heads` is [4, 4, 2], but a student has",
    ),
    (change_config(encoder_ff_interm_features=[5, 0, -1]), "`encoder_ff_interm_features` must be a number of units"),
    (change_config(encoder_use_attention=[1, 2, 3]), "`encoder_use_attention` must be true or false for each of 3"),
    (change_config(encoder_layer_norm_first=True), "`encoder_layer_norm_first` is True and `extractor_mode` 'group'"),
    (
        change_config(extractor_mode="batch_norm"),
        "`extractor_mode` must be one of group_norm, layer_norm, but",
    ),
    (change_config(extractor_mode=None), "`extractor_mode` must be one of"),
    (
        change_config(extractor_conv_layer_config=[(3, 10)]),
        "must list channels, kernel and stride of each",
    ),
    (change_config(extractor_conv_layer_config=[]), "`extractor_conv_layer_config`"),
    (change_config(extractor_conv_layer_config=[(0, 10, 5)]), "`extractor_conv_layer_config[0]` must be an integer"),
    (drop("state_dict", FIRST), f"{FIRST} is missing"),
    (change_weight(FIRST, lambda tensor: tensor[:1]), f"{FIRST} has shape (1, 1, 10) instead of (8, 1, 10)"),
    (change_weight("encoder.new", lambda _: torch.ones(2)), "encoder.new is not part of such a model"),
    (change_weight(DUMMY_WEIGHT, lambda _: torch.ones(4)), f"{DUMMY_WEIGHT} has shape (4,) instead of (11,)"),
    (change_weight(FIRST, lambda tensor: tensor * float("nan")), f"NaN or infinite weights in {FIRST}"),
    (change_weight(FIRST, torch.zeros_like), f"all zeros, such as {FIRST}"),
]


@pytest.mark.parametrize(("damage", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_one_line_for_what_does_not_fit(tmp_path, damage, message, damaged_content):
    content = {**damaged_content, "config": dict(damaged_content["config"])}
    content["state_dict"] = dict(content["state_dict"])
    damage(content)
    path = save(content, tmp_path)
    with pytest.raises(ValueError) as caught:
        convert_checkpoint(path)
    text = str(caught.value)
    assert message in text
    assert str(path) in text
    assert "\n" not in text and len(text) < 700


@pytest.fixture(scope="module")
def damaged_content(tmp_path_factory):
    return dphubert_content(tmp_path_factory.mktemp("model"), "base")


def test_families_that_a_file_is_not_of(tmp_path, damaged_content):
    path = save(damaged_content, tmp_path)
    for family in ("hubert", "bert"):
        with pytest.raises(ValueError, match=f"it is of WavLM, not `{family}`"):
            convert_checkpoint(path, family=family)
    path = save(without_positions(damaged_content), tmp_path)
    with pytest.raises(ValueError, match="another family than WavLM"):
        convert_checkpoint(path, family="wavlm")
    with pytest.raises(ValueError, match="is a `bert`; teachers and students"):
        convert_checkpoint(path, family="bert")


def test_a_feature_extractor_goes_along(tmp_path, layout):
    content = dphubert_content(tmp_path / "model", layout)
    _, extractor, _ = convert_checkpoint(save(content, tmp_path))
    extractor.save_pretrained(tmp_path / "model")
    assert load_feature_extractor(tmp_path / "model").do_normalize == (layout == "large")
    assert convert_student(tmp_path / "model")["config"]["normalize_waveform"] == (layout == "large")


def test_nothing_that_is_no_student_is_written(tmp_path):
    HubertModel.config_class().save_pretrained(tmp_path)
    with pytest.raises(ValueError):
        convert_student(tmp_path)
