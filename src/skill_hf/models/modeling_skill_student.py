# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""
Code shared by the pruned models of all families: the stock model with layers of unequal width. This file is published
with every student, next to that of its family, and imports no code of a family: a student loads as long as
transformers includes its own family.

- Each layer keeps its own subset of heads, feed-forward units and convolution channels. A block may be empty.
- `masked_group_norm` computes the statistics of the group norm only over valid samples.

Parameter names are those of the stock models, so every stock checkpoint of a family loads.
"""

import copy
import importlib.util

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_skill_student import CUT_TENSORS, CUT_VALUES, PRUNED_FIELDS, READERS, refuse_training_checkpoint
from .fast_layers import FastConv1d, FastDropout, FastPositionalConv, is_traced, lay_out
from .student_layers import OutputBias, SkillStudentAttention, SkillStudentFeedForward, conv_layers
from .weight_checks import check_declared, check_finite, check_weights, declared_weights, mismatched_weights


logger = logging.get_logger(__name__)

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
    """Base of the encoders and task models of all families: loading and publishing."""

    _supports_sdpa = True
    _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = False
    _can_set_attn_implementation_cached_value = True  # otherwise guessed from the wording of this file
    model_tags = ("skill-hf", "skill", "distillation", "structured-pruning", "speech")

    def post_init(self):
        super().post_init()
        self.model_tags = list(type(self).model_tags)  # transformers adds to the list in place

    @classmethod
    def from_pretrained(cls, *args, ignore_mismatched_sizes=False, output_loading_info=False, **kwargs):
        """
        Like [`~transformers.PreTrainedModel.from_pretrained`], but encoder weights that do not fit the config are an
        error; the stock method would start from random weights.

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
                " `ignore_mismatched_sizes=True` to reinitialise these weights."
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
        Like [`~transformers.PreTrainedModel.save_pretrained`].

        Raises:
            `ValueError`: if the student has gates or is fused.
        """
        if self.base_model.gating is not None:
            raise ValueError(
                "This student has gates, which other programs cannot read; call `prune()` before saving it."
            )
        self.base_model.refuse_fused("saved")
        for name in PRUNED_FIELDS:  # a head may have been given another encoder since it was made
            setattr(self.config, name, copy.deepcopy(getattr(self.base_model.config, name)))
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def fuse(self):
        """
        Prepares the student for inference, in place, and sets it to eval mode: folds the weight norm of the positional
        convolution and merges query, key and value into one linear map. On a CPU it also reorders the weights of
        convolutions for their kernels and computes the positional one with a Fourier transform. Outputs stay the same
        (1e-5). The transformed weight needs additional memory: 38 MB for Base models.

        Call it on the device where the student will run, after `.to(device)`. A fused student can be neither saved nor
        trained; use `from_pretrained` to get one that can.

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
        Like [`~transformers.PreTrainedModel.push_to_hub`]. After `import skill_hf`, a model card that lists what is
        left of each layer is uploaded as well.
        """
        if "push_to_hub" in ACTIONS:
            return _act("push_to_hub", self, repo_id, **kwargs)
        if importlib.util.find_spec("skill_hf") is not None:
            logger.warning(
                "This student runs the code of its own repository, which may differ from the installed skill-hf"
                " package: it is pushed without the package's model card. To include the card, `import skill_hf`,"
                " load the student again and push it."
            )
        return super().push_to_hub(repo_id, **kwargs)


class SkillStudentModel(SkillStudent):
    """
    Mixin that gives the stock encoder of a family, the next base class, unequal layer widths; same inputs and outputs.
    A family sets `config_class` and the classes of its layers.

    `from_pretrained` loads a published student, or any stock checkpoint of the family as an unpruned student with the
    same hidden states.
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
        self.feature_extractor.conv_layers = nn.ModuleList(conv_layers(config))
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
        Like the stock model's, with support for `config.masked_group_norm`, which requires padding on the right, as
        feature extractors produce it.
        """
        # Reading a mask on a GPU would wait for the device. Subclasses of tensors may have no values.
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
        A stock model of the family, such as [`~transformers.WavLMModel`], with the same outputs. Convolutions stay
        narrow; removed heads and feed-forward units are restored as zeros, so it loads anywhere but saves little.

        Raises:
            `ValueError`: if the student is fused or has `scaled_features`.
        """
        self.refuse_fused("converted to a stock model")
        if self.config.scaled_features:
            raise ValueError("This student has `scaled_features`, which no stock model supports: use it as it is.")
        if self.config.masked_group_norm and self.config.feat_extract_norm == "group":
            logger.warning(
                "The stock model has no `masked_group_norm`: it gives the same outputs only for clips without padding."
            )
        stock_class = self.stock_class()
        config_class, student_fields = stock_class.config_class, self.config_class().to_dict()
        added = student_fields.keys() - config_class().to_dict().keys() | {"model_type", "architectures"}
        fields = {name: value for name, value in self.config.to_dict().items() if name not in added}
        stock, weights = stock_class(config_class(**fields)), self.state_dict()
        state = stock.state_dict()
        for index in range(self.config.num_hidden_layers):
            for block, reader in READERS.items():
                kept, number = self.config.remaining_units(block, index)
                prefix = f"encoder.layers.{index}.{block}."
                if f"{prefix}output_bias.bias" in weights:
                    weights[f"{prefix}{reader}.bias"] = weights.pop(f"{prefix}output_bias.bias")
                for name in [name for name in state if name.startswith(prefix)]:
                    whole, narrow = torch.zeros_like(state[name]), weights.pop(name, None)
                    tensor = name.removeprefix(prefix)
                    dim = CUT_TENSORS[block].get(tensor)
                    if narrow is not None and dim is not None:
                        width = whole.shape[dim] // number  # neighbouring entries of one head or unit
                        entries = torch.tensor(kept)[:, None] * width + torch.arange(width)
                        if tensor in CUT_VALUES:
                            entries = entries[:, : self.config.value_sizes[index]]
                        whole.index_copy_(dim, entries.flatten(), narrow.to(whole))
                    elif narrow is not None:
                        whole = narrow.to(whole)
                    state[name] = whole
        stock.load_state_dict(state | weights)
        return stock.to(device=self.device, dtype=self.dtype).train(self.training)

    def refuse_fused(self, use):
        """Raises a `ValueError` if the student is fused; `use` is the rejected action, such as "saved"."""
        if getattr(self, "_is_fused", False):
            raise ValueError(f"This student is fused and cannot be {use}. Load it again with `from_pretrained`.")

    # Like `add_adapter` of transformers, these work where the package that does it is installed: a student loaded from
    # the Hub has no use for them, and the file that describes it holds no training code.

    def add_gates(self, units=None, width_multiple=1):
        """
        Puts a trainable gate on each of `units`, in place, for training with the skill-hf package.

        Args:
            units (`Iterable[str]`, *optional*, defaults to `("conv_channels", "attention_heads", "ffn_dims")`):
                Kinds of units; `attention_blocks`, `ffn_blocks` and `layers` are possible as well.
            width_multiple (`int`, *optional*, defaults to 1):
                The cut rounds widths of convolutions and feed-forward blocks to a multiple of this.

        Raises:
            `ImportError`: without the skill-hf package.
            `ValueError`: if the student is fused or already has gates, or a kind of unit is unknown.
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
        Removes the units that the gates close, and the gates, in place.

        Raises:
            `ImportError`: without the skill-hf package.
            `ValueError`: if the student has no gates.
        """
        _act("prune", self)


class SkillStudentHead(SkillStudent):
    """Mixin for a stock task model of a family, the next base class, with a student of `encoder_class` as encoder."""

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
