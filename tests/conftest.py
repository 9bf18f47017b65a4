import gc
import os


# A name that is looked for on the Hub is not found at once, instead of after many attempts; read at import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from transformers import WavLMConfig, WavLMModel


# The code that travels with each student of WavLM, whoever saves it: of all families, and of its own.
STUDENT_CODE = {
    "configuration_skill_student.py",
    "configuration_wavlm_skill_student.py",
    "fast_layers.py",
    "modeling_skill_student.py",
    "modeling_wavlm_skill_student.py",
    "weight_checks.py",
}

IMPORTED_WITH_THE_PACKAGE = [
    "skill_hf.models",
    "skill_hf.models.configuration_skill_student",
    "skill_hf.models.configuration_wavlm_skill_student",
    "skill_hf.models.fast_layers",
    "skill_hf.models.modeling_skill_student",
    "skill_hf.models.modeling_wavlm_skill_student",
    "skill_hf.models.weight_checks",
    "skill_hf.version",
]

torch.set_num_threads(1)  # tiny models: a second thread only waits


def pytest_collection_modifyitems(items):
    # Files with long tests come first, so that no worker is left alone with one in the end.
    lengthy = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("nightly")}
    items.sort(key=lambda item: item.path not in lengthy)


def pytest_collection_finish():
    # Each training collects garbage, for which it would look through all imported modules again.
    gc.collect()
    gc.freeze()


def tiny_config(layout: str = "base", **kwargs) -> WavLMConfig:
    """WavLM's Base layout (group norm, post-LN) or Large layout (layer norm, pre-LN) in tiny."""
    large = layout == "large"
    return WavLMConfig(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "conv_dim": (16,) * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "num_buckets": 32,
            "max_bucket_distance": 80,
            "do_stable_layer_norm": large,
            "feat_extract_norm": "layer" if large else "group",
            "conv_bias": large,
        }
        | kwargs
    )


def tiny_teacher(layout: str = "base", **kwargs) -> WavLMModel:
    """A random teacher. Noise on every parameter: at initialisation biases and norms would hide what is left out."""
    torch.manual_seed(0)
    teacher = WavLMModel(tiny_config(layout, **kwargs))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return teacher.eval()


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
