"""Models of other programs for the tests of conversion: files of their formats, and what such a model computes."""

import math

import torch
from test_modeling_wavlm_skill_student import pruned_student
from torch.nn import functional as F

from skill_hf.conversion.converter import convert_student


DUMMY_WEIGHT = "feature_extractor.dummy_weight"


def waveforms() -> torch.Tensor:
    return torch.randn(2, 4000, generator=torch.Generator().manual_seed(3))


def dphubert_content(directory, layout="base", soft=True, **kwargs) -> dict:
    """A file's content, of a pruned student and, if `soft`, with gates that were between 0 and 1."""
    # Layer norms over two or three channels would only tell how numbers are rounded.
    pruned_student(layout, **{"conv_dim": [8, 16, 9, 7, 16, 8, 11]} | kwargs).save_pretrained(directory)
    content = convert_student(directory)
    if soft:
        weights = content["state_dict"]
        mask = torch.rand(weights[DUMMY_WEIGHT].shape, generator=torch.Generator().manual_seed(5))
        weights[DUMMY_WEIGHT] = 0.1 + 0.9 * mask
    del content["skill_hf"]  # which no other program writes
    return content


def unpruned_content(directory, layout="base", **kwargs) -> dict:
    whole = {"remaining_heads": None, "intermediate_sizes": None, "removed_ffn_blocks": None, "conv_dim": (16,) * 7}
    return dphubert_content(directory, layout, soft=False, **whole | kwargs)


def without_positions(content: dict) -> dict:
    """The same for a family without WavLM's position bias: DPHuBERT's format of HuBERT and wav2vec 2.0."""
    config = dict(content["config"])
    config["encoder_num_heads"] = [len(heads) for heads in config.pop("encoder_remaining_heads")]
    config["encoder_head_dim"] = config["encoder_embed_dim"] // config.pop("encoder_total_num_heads")[0]
    del config["encoder_num_buckets"], config["encoder_max_distance"]
    weights = {name: tensor for name, tensor in content["state_dict"].items() if "rel_" not in name}
    return {"config": config, "state_dict": weights}


def bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """WavLM, arXiv 2110.13900, equation 5, with the direction in the upper half."""
    half = num_buckets // 2
    exact, length = half // 2, abs(distance)
    if length >= exact:
        length = min(half - 1, exact + int(math.log(length / exact) / math.log(max_distance / exact) * (half - exact)))
    return length + (half if distance > 0 else 0)


@torch.no_grad()
def direct_states(config: dict, weights: dict, samples: torch.Tensor) -> tuple[list, torch.Tensor]:
    """
    What a model of DPHuBERT's format computes, in float64 and one head after another.

    Returns:
        Hidden states, the input of the first layer first and none of them after the final norm of pre-norm models, and
        the model's output.
    """
    weights = {name: tensor.double() for name, tensor in weights.items()}
    pre_norm, width = config["encoder_layer_norm_first"], config["encoder_embed_dim"]

    def norm(name, hidden):
        return F.layer_norm(hidden, hidden.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(name, hidden):
        return F.linear(hidden, weights[f"{name}.weight"], weights[f"{name}.bias"])

    hidden = samples.double()[:, None]
    for index, (_, _, stride) in enumerate(config["extractor_conv_layer_config"]):
        name = f"feature_extractor.conv_layers.{index}"
        hidden = F.conv1d(hidden, weights[f"{name}.conv.weight"], weights.get(f"{name}.conv.bias"), stride)
        if config["extractor_mode"] == "layer_norm":
            hidden = norm(f"{name}.layer_norm", hidden.mT).mT
        elif index == 0:
            mean, variance = hidden.mean(-1, keepdim=True), hidden.var(-1, keepdim=True, correction=0)
            hidden = (hidden - mean) / (variance + 1e-5).sqrt()
            hidden = hidden * weights[f"{name}.layer_norm.weight"][:, None]
            hidden = hidden + weights[f"{name}.layer_norm.bias"][:, None]
        hidden = F.gelu(hidden)
    hidden = hidden.mT * weights[DUMMY_WEIGHT]
    hidden = linear("encoder.feature_projection.projection", norm("encoder.feature_projection.layer_norm", hidden))

    prefix = "encoder.transformer.pos_conv_embed.conv"
    direction, kernel = weights[f"{prefix}.weight_v"], config["encoder_pos_conv_kernel"]
    kernels = weights[f"{prefix}.weight_g"] * direction / direction.square().sum((0, 1), keepdim=True).sqrt()
    groups = config["encoder_pos_conv_groups"]
    positions = F.conv1d(hidden.mT, kernels, weights[f"{prefix}.bias"], padding=kernel // 2, groups=groups)
    hidden = hidden + F.gelu(positions[..., : hidden.shape[1]]).mT
    if not pre_norm:
        hidden = norm("encoder.transformer.layer_norm", hidden)

    frames, states, table = hidden.shape[1], [hidden], None
    buckets = config.get("encoder_num_buckets")
    if buckets and config["encoder_use_attention"][0]:
        table = weights["encoder.transformer.layers.0.attention.rel_attn_embed.weight"]
        indices = [
            [bucket(key - query, buckets, config["encoder_max_distance"]) for key in range(frames)]
            for query in range(frames)
        ]
        table = table[torch.tensor(indices)]  # (query, key, head)
    for index in range(config["encoder_num_layers"]):
        layer = f"encoder.transformer.layers.{index}"
        heads = (
            config["encoder_remaining_heads"][index] if buckets else list(range(config["encoder_num_heads"][index]))
        )
        if config["encoder_use_attention"][index]:
            source = norm(f"{layer}.layer_norm", hidden) if pre_norm else hidden
            size = width // config["encoder_total_num_heads"][0] if buckets else config["encoder_head_dim"]
            added = weights[f"{layer}.attention.out_proj.bias"].expand_as(hidden)
            for place, head in enumerate(heads):
                rows = slice(place * size, (place + 1) * size)
                query, key, value = (
                    F.linear(
                        source,
                        weights[f"{layer}.attention.{part}_proj.weight"][rows],
                        weights[f"{layer}.attention.{part}_proj.bias"][rows],
                    )
                    for part in "qkv"
                )
                scores = query @ key.mT / math.sqrt(size)
                if table is not None:
                    gates = linear(
                        f"{layer}.attention.gru_rel_pos_linear", source[..., head * size : (head + 1) * size]
                    )
                    update, reset = gates[..., :4].sum(-1).sigmoid(), gates[..., 4:].sum(-1).sigmoid()
                    constant = weights[f"{layer}.attention.gru_rel_pos_const"][0, head, 0, 0]
                    scores = scores + (update * (reset * constant - 1) + 2)[..., None] * table[..., head]
                attended = scores.softmax(-1) @ value
                added = added + F.linear(attended, weights[f"{layer}.attention.out_proj.weight"][:, rows])
            hidden = hidden + added
        if not pre_norm:
            hidden = norm(f"{layer}.layer_norm", hidden)
        if config["encoder_use_feed_forward"][index]:
            source = norm(f"{layer}.final_layer_norm", hidden) if pre_norm else hidden
            units = F.gelu(linear(f"{layer}.feed_forward.intermediate_dense", source))
            hidden = hidden + linear(f"{layer}.feed_forward.output_dense", units)
        if not pre_norm:
            hidden = norm(f"{layer}.final_layer_norm", hidden)
        states.append(hidden)
    return states, norm("encoder.transformer.layer_norm", hidden) if pre_norm else hidden


@torch.no_grad()
def assert_same_states(student, content: dict, atol: float = 1e-5) -> None:
    """A student's hidden states are those of the file's model."""
    states, last = direct_states(content["config"], content["state_dict"], waveforms())
    output = student.eval()(waveforms(), output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, last.float(), atol=atol, rtol=0)
    assert len(output.hidden_states) == len(states)
    for ours, theirs in zip(output.hidden_states, states, strict=True):
        torch.testing.assert_close(ours, theirs.float(), atol=atol, rtol=0)
