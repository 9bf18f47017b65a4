"""Files of fairseq's format, as WavLM's authors, fairseq and s3prl write it."""

import pytest
import torch
from foreign_models import assert_same_states, unpruned_content, without_positions

from skill_hf.conversion.checkpoints import read_checkpoint
from skill_hf.conversion.converter import convert_checkpoint
from skill_hf.conversion.fairseq_format import read_conv_layers


CONV_LAYERS = "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2"


def fairseq_name(name: str, layer_norms: bool) -> str:
    """The name that fairseq gives a weight of DPHuBERT's format."""
    parts = name.split(".")
    if name.startswith("feature_extractor.conv_layers."):
        place = "0" if parts[3] == "conv" else "2.1" if layer_norms else "2"
        return f"feature_extractor.conv_layers.{parts[2]}.{place}.{parts[4]}"
    if name.startswith("encoder.feature_projection."):
        return f"{'layer_norm' if parts[2] == 'layer_norm' else 'post_extract_proj'}.{parts[3]}"
    if name.startswith("encoder.transformer.pos_conv_embed."):
        return f"encoder.pos_conv.0.{parts[4]}"
    for ours, theirs in (
        ("encoder.transformer.", "encoder."),
        (".attention.", ".self_attn."),
        ("gru_rel_pos_linear", "grep_linear"),
        ("gru_rel_pos_const", "grep_a"),
        ("rel_attn_embed", "relative_attention_bias"),
        ("feed_forward.intermediate_dense", "fc1"),
        ("feed_forward.output_dense", "fc2"),
    ):
        name = name.replace(ours, theirs)
    if parts[-2] == "layer_norm" and "layers" in parts:
        return name.replace(".layer_norm.", ".self_attn_layer_norm.")
    return name


def settings(content) -> dict:
    config = content["config"]
    layer_norms = config["extractor_mode"] == "layer_norm"
    return {
        "extractor_mode": "layer_norm" if layer_norms else "default",
        "encoder_layers": 3,
        "encoder_embed_dim": 32,
        "encoder_ffn_embed_dim": 48,
        "encoder_attention_heads": 4,
        "activation_fn": "gelu",
        "layer_norm_first": layer_norms,
        "conv_feature_layers": CONV_LAYERS,
        "conv_bias": layer_norms,
        "normalize": layer_norms,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "num_buckets": 32,
        "max_distance": 80,
        "relative_position_embedding": True,
        "gru_rel_pos": True,
    }


def fairseq_weights(content) -> dict:
    layer_norms = content["config"]["extractor_mode"] == "layer_norm"
    weights = {
        fairseq_name(name, layer_norms): tensor
        for name, tensor in content["state_dict"].items()
        if name != "feature_extractor.dummy_weight"
    }
    return weights | {
        "mask_emb": torch.arange(32.0),
        "final_proj.weight": torch.ones(2, 2),
        "label_embs_concat": torch.ones(3),
    }


def save(content, directory):
    torch.save(content, directory / "file.pt")
    return directory / "file.pt"


def test_wavlm_of_its_authors(tmp_path, layout):
    content = unpruned_content(tmp_path, layout)
    path = save({"cfg": settings(content), "model": fairseq_weights(content)}, tmp_path)
    student, extractor, checkpoint = convert_checkpoint(path)
    assert checkpoint.family == "wavlm"
    assert_same_states(student, content)
    assert extractor.do_normalize == (layout == "large")
    # The embedding of SpecAugment is there, so it stays on, as in the stock model.
    assert torch.equal(student.masked_spec_embed, torch.arange(32.0))
    assert student.config.apply_spec_augment and student.config.mask_time_prob > 0


@pytest.mark.parametrize("is_s3prl", [True, False])
@pytest.mark.parametrize("name", ["hubert", "wav2vec2"])
def test_settings_of_model_and_task_apart(tmp_path, layout, is_s3prl, name):
    content = without_positions(unpruned_content(tmp_path, layout))
    model = settings(content) | {"_name": name}
    task = {"normalize": model.pop("normalize")}
    weights = fairseq_weights(content) | ({"quantizer.vars": torch.ones(2)} if name == "wav2vec2" else {})
    if is_s3prl:
        saved = {"model_cfg": model, "task_cfg": task, "model_weight": weights}
    else:
        saved = {"args": None, "cfg": {"model": model, "task": task}, "model": weights}
    checkpoint = read_checkpoint(save(saved, tmp_path))
    assert checkpoint.family == name
    assert checkpoint.config["normalize_waveform"] == (layout == "large")
    assert checkpoint.config["encoder_num_heads"] == 4
    ours = set(checkpoint.weights) - {"masked_spec_embed"}
    assert ours == set(content["state_dict"])
    assert all(torch.equal(checkpoint.weights[key], content["state_dict"][key]) for key in ours)
    checkpoint = read_checkpoint(save(saved, tmp_path), family="wav2vec2")
    assert checkpoint.family == "wav2vec2"


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        (None, 7),
        ("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2", 7),
        (" [(512, 10, 5)] + 4 * [(512, 3, 2)]", 5),
        ([[512, 10, 5]], 1),
    ],
)
def test_conv_layers(text, layers):
    value = read_conv_layers(text)
    assert len(value) == layers
    assert [list(entry) for entry in value][0] == [512, 10, 5]


@pytest.mark.parametrize(
    "text",
    [
        "exit()",
        "[(1,2,3)] * 10**9",
        "[(1,2,3)] * 999",
        "[[0]] * 200 * 200",
        "1 + 1",
        "",
        "[(512,10,5)",
    ],
)
def test_conv_layers_that_are_no_list_of_convolutions(text):
    with pytest.raises(ValueError, match="no list of convolutions"):
        read_conv_layers(text)


REFUSED = [
    ({"layer_type": "conformer"}, "`layer_type` of its settings is 'conformer'; only 'transformer' is converted"),
    ({"pos_conv_depth": 5}, "`pos_conv_depth` of its settings is 5"),
    ({"activation_fn": "relu"}, "`activation_fn` of its settings is 'relu'"),
    ({"extractor_mode": "batch"}, "`extractor_mode` of its settings is 'batch'"),
    ({"conv_feature_layers": "open('/etc/passwd')"}, "no list of convolutions"),
    ({"encoder_attention_heads": "4"}, "`encoder_total_num_heads` must be a number of heads"),
    ({"encoder_layers": 10**9}, "`encoder_num_layers` must be a whole number from 1 to 256"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_one_line_for_settings_of_other_models(tmp_path, changed, message, wavlm):
    path = save({"cfg": settings(wavlm) | changed, "model": fairseq_weights(wavlm)}, tmp_path)
    with pytest.raises(ValueError) as caught:
        convert_checkpoint(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory):
    return unpruned_content(tmp_path_factory.mktemp("wavlm"))


def test_other_content(tmp_path, wavlm):
    weights = fairseq_weights(wavlm)
    path = save({"cfg": None, "model": weights}, tmp_path)
    with pytest.raises(ValueError, match="the settings of its model"):
        convert_checkpoint(path)
    path = save({"cfg": settings(wavlm), "model": weights | {"adapter.weight": torch.ones(2)}}, tmp_path)
    with pytest.raises(ValueError, match="adapter.weight is not part of such a model"):
        convert_checkpoint(path)
    tuned = {f"w2v_encoder.w2v_model.{name}": tensor for name, tensor in weights.items()}
    path = save({"cfg": settings(wavlm), "model": tuned}, tmp_path)
    with pytest.raises(ValueError, match="it was fine-tuned for a task"):
        convert_checkpoint(path)
