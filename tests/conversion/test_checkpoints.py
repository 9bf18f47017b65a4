"""Files of DiariZen and torchaudio, and everything that is not a checkpoint of a known format."""

import argparse
import json
import os
import pickle

import pytest
import torch
from foreign_models import assert_same_states, dphubert_content, unpruned_content, without_positions

from skill_hf.conversion.checkpoints import infer_config, read_checkpoint
from skill_hf.conversion.converter import convert_checkpoint


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    return dphubert_content(tmp_path_factory.mktemp("pruned"), "large")


def save(content, directory):
    torch.save(content, directory / "file.bin")
    return directory / "file.bin"


def with_new_weight_norm(weights):
    """As newer versions of torch call its parts, in DiariZen's and torchaudio's files."""
    parts = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    return {
        name.replace(name.rpartition(".")[2], parts[name.rpartition(".")[2]])
        if name.rpartition(".")[2] in parts
        else name: tensor
        for name, tensor in weights.items()
    }


def test_diarizens_pruned_encoder(pruned, tmp_path):
    config = pruned["config"] | {
        "use_layerwise_prune": False,
        "extractor_conv_layer_config": list(map(list, pruned["config"]["extractor_conv_layer_config"])),
    }
    content = {"config": config, "state_dict": with_new_weight_norm(pruned["state_dict"])}
    student, extractor, checkpoint = convert_checkpoint(save(content, tmp_path))
    assert_same_states(student, pruned)
    assert extractor.do_normalize and checkpoint.left_out == []


def test_diarizens_whole_model_with_its_config_in_a_file(pruned, tmp_path):
    weights = {f"wavlm_model.{name}": tensor for name, tensor in with_new_weight_norm(pruned["state_dict"]).items()}
    path = save(weights | {"weight_sum.weight": torch.ones(1, 4), "conformer.a": torch.ones(2)}, tmp_path)
    with pytest.raises(ValueError, match="give its config with --config"):
        convert_checkpoint(path)
    (tmp_path / "config.json").write_text(json.dumps(pruned["config"] | {"wavlm_original_params": "94 M"}))
    student, _, checkpoint = convert_checkpoint(path, config_file=tmp_path / "config.json")
    assert_same_states(student, pruned)
    assert checkpoint.left_out == ["conformer", "weight_sum"]


def torchaudio_weights(content):
    """torchaudio's WavLM has one tensor of query, key and value, and no dummy weight."""
    weights = with_new_weight_norm(content["state_dict"])
    del weights["feature_extractor.dummy_weight"]
    for index in range(content["config"]["encoder_num_layers"]):
        prefix = f"encoder.transformer.layers.{index}.attention."
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{prefix}{part}_proj.{kind}") for part in "qkv"]
            weights[f"{prefix}attention.in_proj_{kind}"] = torch.cat(parts)
            weights[f"{prefix}attention.out_proj.{kind}"] = weights.pop(f"{prefix}out_proj.{kind}")
    return weights


def test_torchaudios_wavlm_by_its_shapes(tmp_path, layout):
    content = unpruned_content(tmp_path, layout, max_bucket_distance=800)
    weights = torchaudio_weights(content) | {"aux.weight": torch.ones(3, 32), "aux.bias": torch.ones(3)}
    student, extractor, checkpoint = convert_checkpoint(save(weights, tmp_path))
    assert_same_states(student, content)
    assert extractor.do_normalize == (layout == "large")
    assert checkpoint.left_out == ["aux"]
    assert student.config.remaining_heads == [[0, 1, 2, 3]] * 3
    assert not student.config.scaled_features


def test_a_weight_whose_norm_was_removed_gets_it_back(pruned, tmp_path):
    weights = dict(pruned["state_dict"])
    name = "encoder.transformer.pos_conv_embed.conv.weight"
    direction = weights.pop(f"{name}_v")
    weights[name] = weights.pop(f"{name}_g") * direction / direction.norm(dim=(0, 1), keepdim=True)
    student, _, _ = convert_checkpoint(save(pruned | {"state_dict": weights}, tmp_path))
    assert_same_states(student, pruned)


def test_heads_of_other_families_are_known_for_published_widths(tmp_path, layout):
    content = without_positions(unpruned_content(tmp_path, layout))
    weights = torchaudio_weights(content)
    for index in range(3):  # these families have a tensor of each
        for part in "qkv":
            weights[f"encoder.transformer.layers.{index}.attention.{part}_proj.weight"] = torch.zeros(32, 32)
    with pytest.raises(ValueError, match="give its config"):
        infer_config(weights)
    whole = {
        **weights,
        "encoder.feature_projection.projection.weight": torch.empty(768, 16, device="meta"),
        "encoder.transformer.pos_conv_embed.conv.weight_v": torch.empty(768, 48, 128, device="meta"),
    }
    for index in range(3):
        prefix = f"encoder.transformer.layers.{index}."
        whole[f"{prefix}attention.q_proj.weight"] = torch.empty(768, 768, device="meta")
    config = infer_config(whole)
    assert config["encoder_num_heads"] == 12
    assert (config["encoder_pos_conv_kernel"], config["encoder_pos_conv_groups"]) == (128, 16)
    assert config["encoder_layer_norm_first"] == config["normalize_waveform"] == (layout == "large")
    assert config["extractor_conv_layer_config"][0] == (16, 10, 5)


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mknod, (str(self.path),))


def first(content):
    return next(iter(content["state_dict"]))


REFUSED = [
    (lambda content: 7, "its content is of type int, which is none of the formats"),
    (lambda content: {}, "its content, nothing, is of none of the formats"),
    (lambda content: {"epoch": 3, "optimizer": {}}, "its content, epoch, optimizer, is of none of the formats"),
    (lambda content: {"layer.weight": torch.ones(2)}, "its content, layer.weight, is of none of the formats"),
    (lambda content: {"state_dict": {}}, "its content, state_dict, is of none of the formats"),
    (lambda content: content | {"state_dict": [1]}, "its weights are a list, not tensors by name"),
    (lambda content: content | {"config": [1]}, "its `config` is a list, not names and values"),
    (lambda content: {"state_dict": content["state_dict"]}, "which do not tell the whole shape of this model"),
    (
        lambda content: {"state_dict": {f"student_model.{n}": t for n, t in content["state_dict"].items()}},
        "it is a checkpoint of DPHuBERT's training",
    ),
    (
        lambda content: content | {"state_dict": content["state_dict"] | {"a.hard_concrete.log_alpha": torch.ones(3)}},
        "it still has gates (hard_concrete)",
    ),
    (
        lambda content: (
            content | {"state_dict": content["state_dict"] | {first(content): torch.ones(1).expand(10**5, 10**5)}}
        ),
        "is larger than the file says",
    ),
    (
        lambda content: content | {"state_dict": content["state_dict"] | {first(content): torch.ones(2).int()}},
        "is of type int32, but must be floating",
    ),
    (lambda content: {"cfg": argparse.Namespace(a=1), "model": {}}, "it contains objects (argparse.Namespace)"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_one_line_for_what_is_of_no_known_format(pruned, tmp_path, change, message):
    path = save(change(pruned), tmp_path)
    with pytest.raises(ValueError) as caught:
        convert_checkpoint(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path, pruned):
    path = tmp_path / "file"
    with pytest.raises(ValueError, match="there is no such file"):
        read_checkpoint(path)
    with pytest.raises(ValueError, match="it is a directory; name the file"):
        read_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_checkpoint(tmp_path / "pipe")
    whole = save(pruned, tmp_path).read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], pickle.dumps(Runs(tmp_path / "ran"))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a pickle of plain data|it contains objects"):
            read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_config_files(tmp_path, pruned):
    path = save(pruned, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(pruned["config"]))
    with pytest.raises(ValueError, match="it has a config of its own"):
        read_checkpoint(path, tmp_path / "config.json")
    path = save(pruned["state_dict"], tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="its `config` is a list"):
        read_checkpoint(path, tmp_path / "config.json")
    for file in ("missing.json", "file.bin"):
        with pytest.raises(ValueError, match=f"{file} is not a JSON file that can be read"):
            read_checkpoint(path, tmp_path / file)
