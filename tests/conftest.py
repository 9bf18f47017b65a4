import gc
import os


# A name that is looked for on the Hub is not found at once, instead of after many attempts; read at import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    HubertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    UniSpeechConfig,
    UniSpeechSatConfig,
    Wav2Vec2Config,
    WavLMConfig,
    WavLMModel,
)


# The code that travels with each student of WavLM, whoever saves it: of all families, and of its own.
STUDENT_CODE = {
    "configuration_skill_student.py",
    "configuration_wavlm_skill_student.py",
    "fast_layers.py",
    "modeling_skill_student.py",
    "modeling_wavlm_skill_student.py",
    "student_layers.py",
    "weight_checks.py",
}

# As the names of files have them.
FAMILIES = ("hubert", "unispeech", "unispeech_sat", "wav2vec2", "wavlm")
SHARED_CODE = (
    "configuration_skill_student",
    "fast_layers",
    "modeling_skill_student",
    "student_layers",
    "weight_checks",
)

IMPORTED_WITH_THE_PACKAGE = sorted(
    [
        "skill_hf.models",
        "skill_hf.models.students",
        "skill_hf.version",
        *(f"skill_hf.models.{name}" for name in SHARED_CODE),
        *(
            f"skill_hf.models.{kind}_{family}_skill_student"
            for family in FAMILIES
            for kind in ("configuration", "modeling")
        ),
    ]
)

torch.set_num_threads(1)  # tiny models: a second thread only waits


def pytest_collection_modifyitems(items):
    # Files with long tests come first, so that no worker is left alone with one in the end.
    lengthy = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("nightly")}
    items.sort(key=lambda item: item.path not in lengthy)


def pytest_collection_finish():
    # Each training collects garbage, for which it would look through all imported modules again.
    gc.collect()
    gc.freeze()


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}


def tiny_config(layout: str = "base", **kwargs) -> WavLMConfig:
    """WavLM's Base layout (group norm, post-LN) or Large layout (layer norm, pre-LN) in tiny."""
    fields = TINY | {"num_buckets": 32, "max_bucket_distance": 80} | (LARGE if layout == "large" else {})
    return WavLMConfig(**fields | kwargs)


# For tests in bfloat16: on processors with AMX torch 2.13 computes a positional convolution of groups of 8 or 12
# channels wrongly, whatever the model. Published models have 48 or more.
WIDE_GROUPS = {"num_conv_pos_embedding_groups": 2}


def tiny_teacher(layout: str = "base", **kwargs) -> WavLMModel:
    """A random teacher. Noise on every parameter: at initialisation biases and norms would hide what is left out."""
    torch.manual_seed(0)
    return with_noise(WavLMModel(tiny_config(layout, **kwargs)))


def with_noise(model: PreTrainedModel) -> PreTrainedModel:
    """`model` in eval mode, with noise on every parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


# What published checkpoints differ in. Those of `LAYOUTS_OF_HEADS` have all that heads depend on.
LAYOUTS = {
    "hubert-base": (HubertConfig, {}),
    "hubert-large": (HubertConfig, LARGE),
    "distilhubert": (HubertConfig, {"feat_proj_layer_norm": False, "num_hidden_layers": 2}),
    "hubert-batch-norm": (HubertConfig, {"conv_pos_batch_norm": True}),
    "wav2vec2-base": (Wav2Vec2Config, {}),
    "wav2vec2-robust": (Wav2Vec2Config, LARGE | {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}),
    "xls-r": (Wav2Vec2Config, LARGE),
    "mms": (Wav2Vec2Config, LARGE | {"adapter_attn_dim": 8}),
    "unispeech-base": (UniSpeechConfig, {}),
    "unispeech-large": (UniSpeechConfig, LARGE),
    "unispeech-sat-base": (UniSpeechSatConfig, {}),
    "unispeech-sat-large": (UniSpeechSatConfig, LARGE),
    "wavlm-base": (WavLMConfig, {"num_buckets": 32, "max_bucket_distance": 80}),
    "wavlm-large": (WavLMConfig, LARGE | {"num_buckets": 32, "max_bucket_distance": 80}),
}
LAYOUTS_OF_HEADS = ("hubert-large", "xls-r", "unispeech-base", "unispeech-sat-base", "wavlm-base")


def all_layouts(*by_day: str) -> list:
    """Parameters of a test of all `LAYOUTS`; those not in `by_day` are nightly."""
    return [pytest.param(name, marks=[] if name in by_day else pytest.mark.nightly) for name in LAYOUTS]


def family_config(layout: str, **kwargs) -> PreTrainedConfig:
    config_class, fields = LAYOUTS[layout]
    heads = {"classifier_proj_size": 8, "vocab_size": 9, "tdnn_dim": (8, 8), "tdnn_kernel": (3, 1)}
    heads |= {"tdnn_dilation": (1, 1), "xvector_output_dim": 8, "codevector_dim": 8, "proj_codevector_dim": 8}
    known = config_class().to_dict()
    return config_class(**TINY | {name: size for name, size in heads.items() if name in known} | fields | kwargs)


def family_teacher(layout: str, **kwargs) -> PreTrainedModel:
    """A random teacher as [`tiny_teacher`], in one of `LAYOUTS`."""
    torch.manual_seed(0)
    return with_noise(AutoModel.from_config(family_config(layout, **kwargs)))


@pytest.fixture(params=["base", "large"])
def layout(request) -> str:
    return request.param


@pytest.fixture
def teacher(layout):
    return tiny_teacher(layout)


def noise_clips(number: int, most_samples: int) -> list[dict]:
    """Clips of noise of 8000 samples or more, below `most_samples`, as `input_values`."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(8_000, most_samples, number)
    return [{"input_values": rng.standard_normal(length).astype(np.float32)} for length in lengths]


@pytest.fixture
def clips() -> list[dict]:
    """20 clips of 0.5 to 0.9 seconds of noise, as `input_values`."""
    return noise_clips(20, 14_000)


def padded_batch() -> dict[str, torch.Tensor]:
    """Two clips, the second padded by a quarter."""
    torch.manual_seed(1)
    attention_mask = torch.ones(2, 8000, dtype=torch.long)
    attention_mask[1, 6000:] = 0
    return {"input_values": torch.randn(2, 8000) * attention_mask, "attention_mask": attention_mask}


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()
