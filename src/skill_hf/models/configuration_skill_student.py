# Copyright 2026 The skill-hf authors. Licensed under the Apache License, Version 2.0.
"""
Configuration of the pruned models of all families, and the checks of its fields. This file is published with every
student, next to that of its family, and imports no code of a family.
"""

import os
import reprlib
from functools import cache

from transformers.activations import ACT2FN


# Task models that families may have: end of the name of their class -> auto class.
TASKS = {
    "CTC": "AutoModelForCTC",
    "SequenceClassification": "AutoModelForAudioClassification",
    "AudioFrameClassification": "AutoModelForAudioFrameClassification",
    "XVector": "AutoModelForAudioXVector",
}
# Raised when a published field changes its meaning. Version 1 is the first; version 2 has `scaled_features`, and only
# students that have it set are of version 2, so that earlier code loads all others. Version 3 has `value_sizes`, also
# only where values are cut.
FORMAT_VERSION = 3
# What pruning changes: the fields that a stock config does not have, and all.
_PRUNED_LAYERS = ("remaining_heads", "intermediate_sizes", "removed_attention_blocks", "removed_ffn_blocks")
PRUNED_FIELDS = ("conv_dim", "num_hidden_layers", *_PRUNED_LAYERS, "remaining_layers", "value_sizes", "format_version")
# Lists with one entry for each layer.
PER_LAYER = ("remaining_heads", "intermediate_sizes", "remaining_layers", "value_sizes")
# What a published config cannot leave out: the defaults are those of an unpruned model.
_REQUIRED = ("format_version", *_PRUNED_LAYERS)
# No speech encoder comes near: what is larger is a damaged file, and would hang or ask for all memory.
MAX_SIZE = 2**20
MAX_LAYERS = 256
MAX_LABELS = 2**16
_FLOATS = ("float16", "bfloat16", "float32", "float64")
# What a field of the stock model may be: a count, with the least one; a list of counts above 0; a probability; a
# number of at least 0; true or false; one of some names.
_COUNTS = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "num_conv_pos_embeddings": 1,
    "num_conv_pos_embedding_groups": 1,
    "num_buckets": 1,
    "max_bucket_distance": 1,
    "mask_time_length": 1,
    "mask_time_min_masks": 0,
    "mask_feature_length": 1,
    "mask_feature_min_masks": 0,
    "num_codevectors_per_group": 1,
    "num_codevector_groups": 1,
    "num_negatives": 0,
    "codevector_dim": 1,
    "proj_codevector_dim": 1,
    "classifier_proj_size": 1,
    "xvector_output_dim": 1,
    "num_ctc_classes": 1,
    "num_clusters": 1,
    "adapter_attn_dim": 1,
    "num_labels": 0,
    "adapter_kernel_size": 1,
    "adapter_stride": 1,
    "num_adapter_layers": 1,
    "output_hidden_size": 1,
    "chunk_size_feed_forward": 0,
}
_MOST = {"num_hidden_layers": MAX_LAYERS, "num_attention_heads": 1024, "num_labels": MAX_LABELS}
_LISTS = ("conv_dim", "conv_stride", "conv_kernel", "tdnn_dim", "tdnn_kernel", "tdnn_dilation")
_OF_CONVOLUTIONS = ("conv_stride", "conv_kernel")
_PROBABILITIES = (
    "hidden_dropout",
    "activation_dropout",
    "attention_dropout",
    "feat_proj_dropout",
    "final_dropout",
    "layerdrop",
    "mask_time_prob",
    "mask_feature_prob",
    "replace_prob",
)
_NUMBERS = ("initializer_range", "layer_norm_eps", "contrastive_logits_temperature", "diversity_loss_weight")
_FLAGS = (
    "conv_bias",
    "conv_pos_batch_norm",
    "feat_proj_layer_norm",
    "do_stable_layer_norm",
    "apply_spec_augment",
    "ctc_zero_infinity",
    "use_weighted_layer_sum",
    "add_adapter",
    "masked_group_norm",
    "scaled_features",
    "is_encoder_decoder",
    "tie_last_hidden_states",
)
_NAMES = {
    "feat_extract_norm": ("group", "layer"),
    "feat_extract_activation": tuple(ACT2FN),
    "hidden_act": tuple(ACT2FN),
    "ctc_loss_reduction": ("sum", "mean", "none"),
    "problem_type": ("regression", "single_label_classification", "multi_label_classification"),
}
# The tensors that heads and feed-forward units are cut from: name in their block -> dimension.
CUT_TENSORS = {
    "attention": {
        "q_proj.weight": 0,
        "q_proj.bias": 0,
        "k_proj.weight": 0,
        "k_proj.bias": 0,
        "v_proj.weight": 0,
        "v_proj.bias": 0,
        "out_proj.weight": 1,
        "gru_rel_pos_const": 1,
    },
    "feed_forward": {
        "intermediate_dense.weight": 0,
        "intermediate_dense.bias": 0,
        "output_dense.weight": 1,
    },
}
# Of these, the ones that the dimensions of values are cut from: the last dimensions of each head.
CUT_VALUES = ("v_proj.weight", "v_proj.bias", "out_proj.weight")
# The linear map of each block that reads its heads or units; gates scale its columns.
READERS = {"attention": "out_proj", "feed_forward": "output_dense"}
# Arguments of transformers' own that are not among a config's fields.
_ARGUMENTS = (
    "tie_last_hidden_states",
    "num_labels",
    "torch_dtype",
    "name_or_path",
    "attn_implementation",
    "quantization_config",
    "_commit_hash",
)


class SkillStudentConfig:
    r"""
    The fields of the stock configuration of a family, the next base class, and the remaining units of each layer.
    `num_attention_heads` and `intermediate_size` keep the teacher's values; `conv_dim` contains the remaining
    channels.

    The configuration of a family has this class as its first base, and sets `model_type` and `tasks`.

    Fields that neither class has are left out, so unknown content of a teacher's file is never published.

    Args:
        remaining_heads (`list[list[int]]`, *optional*):
            For each layer, the indices of the remaining attention heads in the teacher, in ascending order; a list may
            be empty. All heads by default.
        intermediate_sizes (`list[int]`, *optional*):
            For each layer, the number of remaining feed-forward units, which may be 0. All by default.
        removed_attention_blocks (`list[int]`, *optional*):
            Layers without attention. (A layer without heads that is not listed here still adds the bias of its output
            projection.)
        removed_ffn_blocks (`list[int]`, *optional*):
            Layers without a feed-forward block, not even its output bias.
        masked_group_norm (`bool`, *optional*, defaults to `False`):
            With `feat_extract_norm="group"`: compute the statistics of the group norm only over the valid samples in
            `attention_mask` (padding must be on the right), so that a clip has the same hidden states alone and padded
            in a batch. Off by default, since the teacher was trained with statistics that include padding.
        base_model (`str`, *optional*):
            Hub id of the teacher.
        format_version (`int`, *optional*, defaults to 3):
            Version of these fields. Later versions are rejected. The first version that has all fields that are set is
            kept and saved.
        scaled_features (`bool`, *optional*, defaults to `False`):
            Whether each channel of the last convolution is multiplied by its own factor before the norm of the feature
            projection (`feature_extractor.scale` in the weights). Students converted from DPHuBERT's format may have
            it: the remaining values of the gates of these channels.
        remaining_layers (`list[int]`, *optional*):
            The index in the teacher of each of the `num_hidden_layers`, in ascending order; by default the lowest
            ones. Training needs it, to compare a student of fewer layers with its teacher.
        value_sizes (`list[int]`, *optional*):
            For each layer, the number of remaining dimensions of the values in each of its heads, at least 1. All by
            default: `hidden_size / num_attention_heads`.

    Raises:
        `ValueError`: if a field has a wrong type, is out of range or does not fit the others; the message names the
            field.
    """

    tasks = ()  # keys of `TASKS`

    def __init_subclass__(cls, **kwargs):
        # Transformers 5 writes an `__init__` for each class whose own body has none, which would check nothing.
        if "__init__" not in vars(cls):
            cls.__init__ = cls.__init__
        super().__init_subclass__(**kwargs)

    def __init__(
        self,
        remaining_heads=None,
        intermediate_sizes=None,
        removed_attention_blocks=None,
        removed_ffn_blocks=None,
        masked_group_norm=False,
        base_model=None,
        format_version=FORMAT_VERSION,
        scaled_features=False,
        remaining_layers=None,
        value_sizes=None,
        **kwargs,
    ):
        # A bool is an int, and 1.0 == 1: neither is a version.
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"`format_version` is {_short(format_version)}, but this code reads versions 1 to {FORMAT_VERSION}:"
                " update skill-hf (`pip install -U skill-hf`) or, without skill-hf, pass"
                " `trust_remote_code=True`."
            )
        stock_fields = _fields_of(self.stock_class())
        kwargs = {name: value for name, value in kwargs.items() if name in stock_fields or name in _ARGUMENTS}
        kwargs.pop("num_feat_extract_layers", None)  # follows from `conv_dim`
        flags = {"masked_group_norm": masked_group_norm, "scaled_features": scaled_features}
        for name, value in {**kwargs, **flags}.items():
            _check_field(name, value)
        for name in _NUMBERS:
            if name in kwargs:  # in JSON 1 may stand for 1.0
                kwargs[name] = float(kwargs[name])
        convolutions = {name: kwargs.get(name, stock_fields[name]) for name in ("conv_dim", *_OF_CONVOLUTIONS)}
        for name in _OF_CONVOLUTIONS:
            if len(convolutions[name]) != len(convolutions["conv_dim"]):
                raise ValueError(
                    f"`{name}` must list one entry for each of {len(convolutions['conv_dim'])} convolutions"
                    f" (`conv_dim`), but is {_short(convolutions[name])}."
                )
        # `save_pretrained` would name only the class being saved; a student serves every auto class. Never taken from
        # a file, which could name code of others.
        kwargs["auto_map"] = self.student_classes()
        super().__init__(**kwargs)
        self._validate_stock_shapes()
        layers, heads = self.num_hidden_layers, self.num_attention_heads
        self.remaining_heads = (
            [list(range(heads)) for _ in range(layers)] if remaining_heads is None else remaining_heads
        )
        self.intermediate_sizes = (
            [self.intermediate_size] * layers if intermediate_sizes is None else intermediate_sizes
        )
        self.removed_attention_blocks = [] if removed_attention_blocks is None else removed_attention_blocks
        self.removed_ffn_blocks = [] if removed_ffn_blocks is None else removed_ffn_blocks
        self.remaining_layers = list(range(layers)) if remaining_layers is None else remaining_layers
        self.value_sizes = [self.hidden_size // heads] * layers if value_sizes is None else value_sizes
        self.masked_group_norm = masked_group_norm
        self.scaled_features = scaled_features
        self.base_model = base_model
        self._validate_pruned_shapes()
        has_cut_values = any(size != self.hidden_size // heads for size in self.value_sizes)
        self.format_version = 3 if has_cut_values else 2 if scaled_features else 1
        # Pruning changes them in place.
        self.remaining_heads = [list(left) for left in self.remaining_heads]
        for name in (*_PRUNED_LAYERS[1:], "remaining_layers", "value_sizes"):
            setattr(self, name, list(getattr(self, name)))

    @classmethod
    def stock_class(cls):
        """The configuration class of the family's stock models, such as [`~transformers.WavLMConfig`]."""
        return next(
            base for base in cls.__mro__ if "model_type" in vars(base) and not issubclass(base, SkillStudentConfig)
        )

    @classmethod
    def student_classes(cls):
        """Auto class -> file and name of the student class that it loads, by the naming scheme of all families."""
        family = cls.stock_class().__name__.removesuffix("Config")
        configuration, modeling = f"configuration_{cls.model_type}", f"modeling_{cls.model_type}"
        return {
            "AutoConfig": f"{configuration}.{family}SkillStudentConfig",
            "AutoModel": f"{modeling}.{family}ForSkillStudent",
            **{TASKS[task]: f"{modeling}.{family}SkillStudentFor{task}" for task in cls.tasks},
        }

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        family, stock_family = config_dict.get("model_type", cls.model_type), cls.stock_class().model_type
        if family == stock_family:
            # A stock checkpoint is an unpruned student. The class names are those of the stock model.
            config_dict = {k: v for k, v in config_dict.items() if k not in ("model_type", "architectures")}
            if not os.path.exists(pretrained_model_name_or_path):  # a local path tells others nothing
                config_dict["base_model"] = str(pretrained_model_name_or_path)
        elif family != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} contains a model of type `{family}`; {cls.model_type} needs a"
                f" student of its own type or a stock `{stock_family}` checkpoint."
            )
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if config_dict.get("model_type") == cls.model_type:
            missing = [name for name in _REQUIRED if name not in config_dict]
            if missing:
                raise ValueError(
                    f"The config of this student lacks `{'`, `'.join(missing)}`: config.json is damaged or belongs to"
                    " a different model. Download the file again, or save the student again."
                )
        return super().from_dict(config_dict, **kwargs)

    def remaining_units(self, block, layer):
        """Indices in the teacher of the remaining heads or units of a block of `READERS`, and their number there."""
        if block == "attention":
            return self.remaining_heads[layer], self.num_attention_heads
        return range(self.intermediate_sizes[layer]), self.intermediate_size

    def _validate_stock_shapes(self):
        """Raises a `ValueError` if fields of the stock model don't fit each other; a family may add checks."""
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(
                    f"`{name}` must divide `hidden_size`, {self.hidden_size}, but is {getattr(self, name)}."
                )

    def _validate_pruned_shapes(self):
        layers, heads = self.num_hidden_layers, self.num_attention_heads
        for name in PER_LAYER:
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or len(value) != layers:
                raise ValueError(f"`{name}` must list one entry for each of {layers} layers, but is {_short(value)}.")
        for layer, left in enumerate(self.remaining_heads):
            if (
                not isinstance(left, (list, tuple))
                or not all(_is_index(head, heads) for head in left)
                or list(left) != sorted(set(left))
            ):
                raise ValueError(
                    f"`remaining_heads[{layer}]` must be ascending head indices below {heads}, but is {_short(left)}."
                )
        if not all(_is_index(layer, MAX_LAYERS) for layer in self.remaining_layers) or list(
            self.remaining_layers
        ) != sorted(set(self.remaining_layers)):
            raise ValueError(
                f"`remaining_layers` must be ascending indices below {MAX_LAYERS}, but is"
                f" {_short(self.remaining_layers)}."
            )
        head_dim = self.hidden_size // heads
        for layer, size in enumerate(self.value_sizes):
            if not _is_index(size, head_dim + 1) or size == 0:
                raise ValueError(
                    f"`value_sizes[{layer}]` must be an integer from 1 to {head_dim} (`hidden_size` divided by"
                    f" `num_attention_heads`), but is {_short(size)}."
                )
        for layer, size in enumerate(self.intermediate_sizes):
            if not _is_index(size, MAX_SIZE + 1):
                raise ValueError(
                    f"`intermediate_sizes[{layer}]` must be an integer from 0 to {MAX_SIZE}, but is {_short(size)}."
                )
        for name, field in (
            ("removed_attention_blocks", "remaining_heads"),
            ("removed_ffn_blocks", "intermediate_sizes"),
        ):
            removed, left = getattr(self, name), getattr(self, field)
            if not isinstance(removed, (list, tuple)):
                raise ValueError(f"`{name}` must be a list of layers, but is {_short(removed)}.")
            for layer in removed:
                if not _is_index(layer, layers):
                    raise ValueError(f"`{name}` must contain layers below {layers}, but contains {_short(layer)}.")
                if left[layer]:
                    raise ValueError(f"`{name}` names layer {layer}, but `{field}[{layer}]` is {_short(left[layer])}.")
            if list(removed) != sorted(set(removed)):
                raise ValueError(
                    f"`{name}` must be a sorted list of layers without duplicates, but is {_short(removed)}."
                )
        if self.base_model is not None and not isinstance(self.base_model, str):
            raise ValueError(f"`base_model` must be a Hub id, but is {_short(self.base_model)}.")


@cache
def _fields_of(stock_class):
    return stock_class().to_dict()


def _check_field(name, value):
    """Raises a `ValueError` if this value of the stock field `name` is never valid."""
    if name in _COUNTS:
        least = _COUNTS[name]
        most = _MOST.get(name, MAX_SIZE)
        optional = name in ("output_hidden_size", "num_labels", "adapter_attn_dim") and value is None
        right = optional or _is_index(value, most + 1) and value >= least
        wanted = f"an integer from {least} to {most}"
    elif name in _LISTS:
        right = isinstance(value, (list, tuple)) and 1 <= len(value) <= MAX_LAYERS
        wanted = f"a list of 1 to {MAX_LAYERS} integers"
        for index, size in enumerate(value if right else ()):
            if not _is_index(size, MAX_SIZE + 1) or size == 0:
                raise ValueError(f"`{name}[{index}]` must be an integer from 1 to {MAX_SIZE}, but is {_short(size)}.")
    elif name in _PROBABILITIES:
        right = _is_number(value) and value <= 1
        wanted = "a number from 0 to 1"
    elif name in _NUMBERS:
        right = _is_number(value)
        wanted = f"a number from 0 to {MAX_SIZE}"
    elif name in _FLAGS:
        right = isinstance(value, bool)
        wanted = "true or false"
    elif name in ("output_attentions", "output_hidden_states", "return_dict"):
        right = value is None or isinstance(value, bool)
        wanted = "true or false"
    elif name in _NAMES:
        right = isinstance(value, str) and value in _NAMES[name] or name == "problem_type" and value is None
        wanted = f"one of {', '.join(_NAMES[name])}"
    elif name in ("dtype", "torch_dtype"):
        right = value is None or str(value).removeprefix("torch.") in _FLOATS
        wanted = f"one of {', '.join(_FLOATS)}"
    elif name.endswith("_token_id"):
        values = value if isinstance(value, list) and name == "eos_token_id" else [value]
        right = value is None or all(type(one) is int and abs(one) <= MAX_SIZE for one in values)
        wanted = "an integer"
    elif name in ("id2label", "label2id"):
        right = value is None or isinstance(value, dict) and len(value) <= MAX_LABELS
        right = right and all(str(key).isdigit() for key in (value or {}) if name == "id2label")
        # transformers' own scripts write the numbers as text.
        numbers = value.values() if right and value and name == "label2id" else ()
        right = right and all(_is_index(one, MAX_SIZE) or isinstance(one, str) and one.isdigit() for one in numbers)
        wanted = "a dict of labels and their numbers"
    elif name in ("name_or_path", "_name_or_path", "transformers_version"):
        right = value is None or isinstance(value, (str, os.PathLike))
        wanted = "text"
    elif name == "architectures":
        right = value is None or isinstance(value, list) and all(isinstance(one, str) for one in value)
        wanted = "a list of class names"
    else:
        return
    if not right:
        raise ValueError(f"`{name}` must be {wanted}, but is {_short(value)}.")


def _is_number(value):
    """Whether it is a number; a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def _short(value):
    """Short form of a value, since a broken file may contain anything, of any length."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # a number of more digits than Python prints
        return f"a {type(value).__name__}"


def _is_index(value, end=float("inf")):
    return type(value) is int and 0 <= value < end  # not `isinstance`: a bool is an int


def refuse_training_checkpoint(directory=None):
    """Raises a `ValueError` if a directory is a checkpoint of a trainer, with gates, projections and multipliers."""
    if directory is not None and os.path.isfile(os.path.join(directory, "skill_state.json")):
        raise ValueError(
            f"`{directory}` is a training checkpoint, not a student: resume its run with"
            " `train(resume_from_checkpoint=...)`, which ends with a student, and save that with `save_model`."
        )
