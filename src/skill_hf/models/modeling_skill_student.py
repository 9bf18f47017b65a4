# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""
What the pruned models of all families share: layers of unequal width, otherwise the stock model. This file is
published with every student, beside the one of its family, and imports no family's code: a student loads as long as
transformers has its own family.

- Each layer keeps its own subset of heads, of feed-forward units and of convolution channels. A block may be empty.
- `masked_group_norm` takes the statistics of the group norm over valid samples only.

Parameter names are those of the stock models, so every stock checkpoint of a family loads.
"""

import copy
import importlib.util

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import logging

from .configuration_skill_student import CUT_TENSORS, refuse_training_checkpoint
from .fast_layers import (
    FastConv1d,
    FastConvLayer,
    FastDropout,
    FastPositionalConv,
    eager_attention_forward,
    frozen,
    is_bare,
    is_traced,
    lay_out,
)
from .weight_checks import check_declared, check_finite, check_weights, declared_weights, mismatched_weights


logger = logging.get_logger(__name__)

# What pruning changes in the config.
_PRUNED = ("conv_dim", "remaining_heads", "intermediate_sizes", "removed_attention_blocks", "removed_ffn_blocks")


def _conv_layers(config):
    """The stock convolutions of `conv_dim` channels. In Base models the first one has a norm, in Large models all."""
    inputs = 1
    for index, channels in enumerate(config.conv_dim):
        conv = FastConv1d(
            inputs, channels, config.conv_kernel[index], stride=config.conv_stride[index], bias=config.conv_bias
        )
        norm = None
        if config.feat_extract_norm == "layer":
            norm = nn.LayerNorm(channels)
        elif index == 0:
            norm = nn.GroupNorm(num_groups=channels, num_channels=channels)
        yield FastConvLayer(conv, norm, ACT2FN[config.feat_extract_activation])
        inputs = channels


class OutputBias(nn.Module):
    """
    What is left of an output projection without inputs: its bias, expanded to the shape of the layer's input. Its name
    is not that of a projection, which LoRA would try to adapt.
    """

    def __init__(self, hidden_size):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states):
        return self.bias.expand(*hidden_states.shape[:-1], -1)


class SkillStudentAttention(nn.Module):
    """
    Self-attention over the heads that are left, without its `forward`: a family calls the steps below, and returns
    what the layers of its stock model take.

    Args:
        config ([`SkillStudentConfig`]): `remaining_heads[layer_index]` may be empty.
        layer_index (`int`): which layer this is.
    """

    def __init__(self, config, layer_index):
        super().__init__()
        self.config = config
        self.heads = list(config.remaining_heads[layer_index])
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.dropout = config.attention_dropout

        width = len(self.heads) * self.head_dim
        if self.heads:
            self.k_proj = nn.Linear(config.hidden_size, width)
            self.v_proj = nn.Linear(config.hidden_size, width)
            self.q_proj = nn.Linear(config.hidden_size, width)
            self.qkv_proj = None  # see `fuse`
            self.out_proj = nn.Linear(width, config.hidden_size)
            self.output_bias = None
        else:
            self.out_proj = None
            removed = layer_index in config.removed_attention_blocks
            self.output_bias = None if removed else OutputBias(config.hidden_size)

    def without_heads(self, hidden_states):
        """Output and attention weights, as those of `attend`, where no heads are left."""
        batch, frames, _ = hidden_states.shape
        output = torch.zeros_like(hidden_states) if self.output_bias is None else self.output_bias(hidden_states)
        eager = self.config._attn_implementation == "eager"
        # Weights of no head rather than `None`, which would not be collected: the n-th stay those of layer n.
        return output, hidden_states.new_zeros(batch, 0, frames, frames) if eager else None

    def project(self, hidden_states):
        """Query, key and value, each `(batch, heads, frames, head_dim)`."""
        return [
            features.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for features in self._project(hidden_states)
        ]

    def attend(self, query, key, value, mask, implementation):
        """
        Args:
            query, key, value (`torch.Tensor` of shape `(batch, heads, frames, head_dim)`): as of `project`.
            mask (`torch.Tensor` of shape `(batch, heads, frames, frames)`): added to the scores.
            implementation (`str`): `"eager"` or the name of an attention function of transformers.

        Returns:
            `tuple`: output `(batch, frames, hidden_size)`; attention weights `(batch, heads, frames, frames)`, or
            `None` unless the implementation is `"eager"`.
        """
        attention = eager_attention_forward
        dropout = self.dropout if self.training else 0.0
        # On a CPU the fused attention has no kernel with dropout, and takes the same steps as the eager one, but
        # slower. In half precision it is the more precise one.
        in_steps = implementation == "sdpa" and dropout and query.is_cpu and query.dtype == torch.float32
        if implementation != "eager" and not in_steps:
            attention = ALL_ATTENTION_FUNCTIONS[implementation]
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask=mask,
            dropout=dropout,
            scaling=self.head_dim**-0.5,
            is_causal=False,
        )  # (B, T, H, head_dim)
        return self.out_proj(output.flatten(2)), None if in_steps else weights

    def _project(self, hidden_states):
        """Query, key and value, each `(batch, frames, heads * head_dim)`."""
        if self.qkv_proj is None:
            return [projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        return self.qkv_proj(hidden_states).chunk(3, dim=-1)

    def fuse(self):
        """One linear map for query, key and value, unless theirs are something else or somebody looks at them."""
        if not self.heads or self.qkv_proj is not None:
            return
        projections = self.q_proj, self.k_proj, self.v_proj
        if any(type(projection) is not nn.Linear for projection in projections) or not is_bare(*projections):
            return
        weight, bias = (torch.cat([getattr(one, kind) for one in projections]) for kind in ("weight", "bias"))
        self.qkv_proj = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.qkv_proj.weight, self.qkv_proj.bias = frozen(weight), frozen(bias)
        del self.q_proj, self.k_proj, self.v_proj

    @property
    def output(self):
        """The module that writes the block's output: `out_proj`, the bias that is left of it, or `None`."""
        return self.output_bias if self.out_proj is None else self.out_proj


class SkillStudentFeedForward(nn.Module):
    """
    Feed-forward block with `intermediate_sizes[layer_index]` units, possibly none.

    Args:
        config ([`SkillStudentConfig`]): names widths and removed blocks.
        layer_index (`int`): which layer this is.
    """

    def __init__(self, config, layer_index):
        super().__init__()
        size = config.intermediate_sizes[layer_index]
        if size:
            self.intermediate_dense = nn.Linear(config.hidden_size, size)
            self.intermediate_act_fn = (
                ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act
            )
            self.intermediate_dropout = FastDropout(config.activation_dropout)
            self.output_dense = nn.Linear(size, config.hidden_size)
            self.output_bias = None
        else:
            self.intermediate_dense = self.output_dense = None
            removed = layer_index in config.removed_ffn_blocks
            self.output_bias = None if removed else OutputBias(config.hidden_size)
        self.output_dropout = FastDropout(config.hidden_dropout)

    def forward(self, hidden_states):
        """`(batch, frames, hidden_size)` -> `(batch, frames, hidden_size)`."""
        if self.output is None:
            return torch.zeros_like(hidden_states)
        if self.intermediate_dense is not None:
            hidden_states = self.intermediate_act_fn(self.intermediate_dense(hidden_states))
            hidden_states = self.intermediate_dropout(hidden_states)
        return self.output_dropout(self.output(hidden_states))

    @property
    def output(self):
        """The module that writes the block's output: `output_dense`, the bias that is left of it, or `None`."""
        return self.output_bias if self.output_dense is None else self.output_dense


# What acts on students from outside, by name. The skill-hf package puts its functions here when it is imported. This
# file names none of its modules: they may move, but files that are published stay as they are.
ACTIONS = {}


def _act(action, student, *args, **kwargs):
    if action not in ACTIONS:
        raise ImportError(
            f"`{action}` needs the skill-hf package: `pip install skill-hf`, then `import skill_hf` and load the"
            " student again."
        )
    return ACTIONS[action](student, *args, **kwargs)


class SkillStudent:
    """What encoders and task models of all families share: how they are loaded and published."""

    _supports_sdpa = True
    _can_set_attn_implementation_cached_value = True  # otherwise guessed from the wording of this file
    model_tags = ("skill-hf", "skill", "distillation", "structured-pruning", "speech")

    def post_init(self):
        super().post_init()
        self.model_tags = list(type(self).model_tags)  # transformers adds to the list in place

    @classmethod
    def from_pretrained(cls, *args, ignore_mismatched_sizes=False, output_loading_info=False, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], but weights of the encoder that do not fit its config are
        an error, where the stock method would start from random ones.

        Raises:
            `ValueError`: if weights and config disagree; the message names the field.
        """
        refuse_training_checkpoint(*args[:1])
        model, info = super().from_pretrained(*args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs)
        mismatched = mismatched_weights(info)
        if getattr(model, "hf_quantizer", None) is None:  # quantised weights have names of their own
            found = dict.fromkeys(info["missing_keys"], ("is missing", None))
            found |= dict.fromkeys(info["unexpected_keys"], ("is unexpected", None))
            check_weights(model, found | mismatched, fewer_layers="num_hidden_layers" in kwargs)
            check_finite(model, but={*info["missing_keys"], *mismatched})
        if mismatched and not ignore_mismatched_sizes:
            raise ValueError(
                f"{'; '.join(f'{name} {problem}' for name, (problem, _) in sorted(mismatched.items()))}. Pass"
                " `ignore_mismatched_sizes=True` to initialise these weights again."
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, *args, **kwargs):
        # In transformers 4 and 5 alike, the model has shapes here but no memory yet, and then gets all that its config
        # describes, whatever the weights are.
        if getattr(model.config, "quantization_config", None) is None:
            check_declared(model, declared_weights(model, state_dict, checkpoint_files))
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        """
        As [`~transformers.PreTrainedModel.save_pretrained`].

        Raises:
            `ValueError`: if the student has gates or is fused.
        """
        if self.base_model.gating is not None:
            raise ValueError("This student has gates, which no other program reads; call `prune()` before saving it.")
        self.base_model.refuse_fused("saved")
        for name in _PRUNED:  # a head may have been given another encoder since it was made
            setattr(self.config, name, copy.deepcopy(getattr(self.base_model.config, name)))
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def fuse(self):
        """
        Prepares the student for inference, in place, and sets it to eval mode: folds the weight norm of the positional
        convolution and makes one linear map of query, key and value; on a CPU it puts the weights of convolutions in
        the order that kernels read and computes the positional one by the Fourier transform. Outputs stay the same
        (1e-5). The Fourier transform of its weight takes memory: 38 MB for Base models.

        Call it where the student is to run, after `.to(device)`. It can be neither saved nor trained any more;
        `from_pretrained` gives one that can.

        Returns:
            The model itself.

        Raises:
            `ValueError`: if the student has gates.
        """
        if self.base_model.gating is not None:
            raise ValueError("This student has gates; call `prune()` before fusing it.")
        self.requires_grad_(False).eval()
        for module in list(self.base_model.modules()):
            if isinstance(module, SkillStudentAttention | FastPositionalConv):
                module.fuse()
            elif isinstance(module, FastConv1d):
                lay_out(module)
        self.base_model._is_fused = True
        return self

    def push_to_hub(self, repo_id, **kwargs):
        """
        As [`~transformers.PreTrainedModel.push_to_hub`]. After `import skill_hf` a model card that tells what is left
        of each layer goes along.
        """
        if "push_to_hub" in ACTIONS:
            return _act("push_to_hub", self, repo_id, **kwargs)
        if importlib.util.find_spec("skill_hf") is not None:
            logger.warning(
                "This student runs the code of its own repository, which may be of another version than the skill-hf"
                " package that is installed: it is pushed as transformers does it, without the package's model card."
                " To have the card, `import skill_hf`, load the student again and push that."
            )
        return super().push_to_hub(repo_id, **kwargs)


class SkillStudentModel(SkillStudent):
    """
    What makes the stock encoder of a family, the next base class, one of unequal layer widths; same inputs and
    outputs. A family sets `config_class` and the classes of its layers.

    `from_pretrained` takes a published student or any stock checkpoint of the family, of which it makes an unpruned
    student with the same hidden states.
    """

    attention_class = None  # a subclass of `SkillStudentAttention`
    feature_encoder_class = None  # a subclass of `FastFeatureEncoder` and the stock class
    positional_conv_class = None  # a subclass of `FastPositionalConv` and the stock class

    # What the skill-hf package has put gates on this student with; `None` if it has none. Models with gates are
    # neither saved nor fused.
    gating = None

    def __init__(self, config):
        config = copy.deepcopy(config)  # pruning changes it, and other models may be made of the same one
        super().__init__(config)
        self.feature_extractor = self.feature_encoder_class(config)
        self.feature_extractor.conv_layers = nn.ModuleList(_conv_layers(config))
        self.feature_projection.dropout = FastDropout(config.feat_proj_dropout)
        self.encoder.pos_conv_embed = self.positional_conv_class(config)
        self.encoder.dropout = FastDropout(config.hidden_dropout)
        for index, layer in enumerate(self.encoder.layers):
            layer.dropout = FastDropout(config.hidden_dropout)
            layer.attention = self.attention_class(config, index)
            layer.feed_forward = SkillStudentFeedForward(config, index)
        if config.scaled_features:
            self.feature_extractor.scale = torch.ones(config.conv_dim[-1])
        self.post_init()

    @classmethod
    def stock_class(cls):
        """The class of the family's stock models, such as [`~transformers.WavLMModel`]."""
        return next(
            base for base in cls.__mro__ if issubclass(base, PreTrainedModel) and not issubclass(base, SkillStudent)
        )

    @property
    def _can_record_outputs(self):
        # Transformers 4 has none, and hands hidden states and attention weights on by itself.
        return {**(super()._can_record_outputs or {}), "attentions": self.attention_class}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, OutputBias):
            nn.init.zeros_(module.bias)

    def forward(self, input_values, attention_mask=None, mask_time_indices=None, *args, **kwargs):
        """
        As the stock model's, with `config.masked_group_norm`, for which padding must be on the right, where
        feature extractors put it.
        """
        # To look at values costs nothing on the CPU alone. Subclasses of tensors may have none.
        readable = type(attention_mask) is torch.Tensor and attention_mask.is_cpu and not is_traced()
        if readable and attention_mask.all():
            attention_mask = None  # nothing is padded
        group_norm = self.config.feat_extract_norm == "group"
        if self.config.masked_group_norm and group_norm and attention_mask is not None:
            input_values = self.feature_extractor(input_values, attention_mask.long().sum(-1))
        return super().forward(input_values, attention_mask, mask_time_indices, *args, **kwargs)

    @torch.no_grad()
    def to_stock(self):
        """
        A stock model of the family, such as [`~transformers.WavLMModel`], with the same outputs. Convolutions stay as
        narrow as they are; heads and feed-forward units that were cut come back as zeros, so it loads anywhere and
        saves little.

        Raises:
            `ValueError`: if the student is fused or has `scaled_features`.
        """
        self.refuse_fused("made a stock model")
        if self.config.scaled_features:
            raise ValueError("This student has `scaled_features`, which no stock model has: use it as it is.")
        if self.config.masked_group_norm and self.config.feat_extract_norm == "group":
            logger.warning(
                "The stock model has no `masked_group_norm`: it gives the same outputs for clips without padding only."
            )
        stock_class = self.stock_class()
        config_class, student_fields = stock_class.config_class, self.config_class().to_dict()
        added = student_fields.keys() - config_class().to_dict().keys() | {"model_type", "architectures"}
        fields = {name: value for name, value in self.config.to_dict().items() if name not in added}
        stock, weights = stock_class(config_class(**fields)), self.state_dict()
        state = stock.state_dict()
        for index, layer in enumerate(self.encoder.layers):
            for block, projection, kept, number in (
                ("attention", "out_proj", layer.attention.heads, self.config.num_attention_heads),
                (
                    "feed_forward",
                    "output_dense",
                    range(self.config.intermediate_sizes[index]),
                    self.config.intermediate_size,
                ),
            ):
                prefix = f"encoder.layers.{index}.{block}."
                if f"{prefix}output_bias.bias" in weights:
                    weights[f"{prefix}{projection}.bias"] = weights.pop(f"{prefix}output_bias.bias")
                for name in [name for name in state if name.startswith(prefix)]:
                    whole, narrow = torch.zeros_like(state[name]), weights.pop(name, None)
                    dim = CUT_TENSORS[block].get(name.removeprefix(prefix))
                    if narrow is not None and dim is not None:
                        width = whole.shape[dim] // number  # neighbouring entries of one head or unit
                        entries = torch.tensor(kept)[:, None] * width + torch.arange(width)
                        whole.index_copy_(dim, entries.flatten(), narrow.to(whole))
                    elif narrow is not None:
                        whole = narrow.to(whole)
                    state[name] = whole
        stock.load_state_dict(state | weights)
        return stock.to(device=self.device, dtype=self.dtype).train(self.training)

    def refuse_fused(self, use):
        """Raises a `ValueError`, of `use` such as "saved", if the student is fused."""
        if getattr(self, "_is_fused", False):
            raise ValueError(f"This student is fused and cannot be {use}. Load it again with `from_pretrained`.")

    # Like `add_adapter` of transformers, these work where the package that does it is installed: a student loaded from
    # the Hub has no use for them, and the file that describes it holds no training code.

    def add_gates(self, units=None, width_multiple=1):
        """
        Puts a trainable gate on each of `units`, in place, for training with the skill-hf package.

        Args:
            units (`Iterable[str]`, *optional*, defaults to `("conv_channels", "attention_heads", "ffn_dims")`):
                Kinds of units; `attention_blocks` and `ffn_blocks` as well.
            width_multiple (`int`, *optional*, defaults to 1):
                What the cut rounds widths of convolutions and feed-forward blocks to a multiple of.

        Raises:
            `ImportError`: without the skill-hf package.
            `ValueError`: if the student is fused or has gates already, or a kind of unit is unknown.
        """
        self.refuse_fused("pruned")
        _act("add_gates", self, units, width_multiple)

    def named_gates(self):
        """Pairs of name and gate, in the order of the layers. Needs the skill-hf package."""
        return _act("named_gates", self)

    def num_expected_parameters(self):
        """Expected number of parameters after the cut, a differentiable scalar. Needs the skill-hf package."""
        return _act("num_expected_parameters", self)

    def prune(self):
        """
        Cuts what the gates close, in place, and removes the gates.

        Raises:
            `ImportError`: without the skill-hf package.
            `ValueError`: if the student has no gates.
        """
        _act("prune", self)


class SkillStudentHead(SkillStudent):
    """What makes a stock task model of a family, the next base class, one over a student of `encoder_class`."""

    encoder_class = None

    def __init__(self, config, *args, **kwargs):
        # The stock model first makes a stock encoder, which may refuse the fused attention that the student has.
        attn_implementation, config._attn_implementation = config._attn_implementation, "eager"
        super().__init__(config, *args, **kwargs)
        config._attn_implementation = attn_implementation
        encoder = self.encoder_class(config)
        setattr(self, self.base_model_prefix, encoder)
        self.config = encoder.config  # one object, so that the head's is right after its encoder was pruned
        self.post_init()
