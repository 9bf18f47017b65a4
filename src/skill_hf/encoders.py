"""Hidden states of clips, from pretrained encoders or filterbanks; the same in a batch as for each clip alone."""

import functools
import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from scipy.fft import dct
from scipy.signal import savgol_filter
from transformers import PreTrainedModel, Wav2Vec2FeatureExtractor
from transformers.audio_utils import mel_filter_bank

from .models.loading import load_feature_extractor, refuse_adapter
from .models.properties import receptive_field


# In others, such as Conformers, convolutions between the layers see padding, whatever the norm.
MASKED_FAMILIES = ("hubert", "unispeech", "unispeech_sat", "wav2vec2", "wavlm")


def ignores_padding(config) -> bool:
    """Whether the network gives a clip the same hidden states alone and padded in a batch, with an attention mask."""
    family = config.model_type.removesuffix("_skill_student").replace("-", "_")
    if family not in MASKED_FAMILIES or getattr(config, "conv_pos_batch_norm", False):
        return False
    return config.feat_extract_norm == "layer" or getattr(config, "masked_group_norm", False)


def feature_extractor_for(model: str, config) -> Wav2Vec2FeatureExtractor:
    """
    The feature extractor of a model; it returns an attention mask if the network needs one to ignore padding.

    Args:
        model (`str`): Hub id or local directory.
        config (`PreTrainedConfig`): of the network.

    Raises:
        `ValueError`: if it is missing or cannot be used.
    """
    feature_extractor = load_feature_extractor(model)
    if feature_extractor is None:
        raise ValueError(f"`{model}` has no preprocessor_config.json, which describes how to prepare its audio.")
    if ignores_padding(config):
        feature_extractor.return_attention_mask = True
    return feature_extractor


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that Python, or PyTorch on a CPU or a GPU, ran out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and re.search("allocate memory|out of memory", str(error)) is not None


class PretrainedEncoder:
    """
    All hidden states of a speech encoder, frozen.

    Args:
        model ([`~transformers.PreTrainedModel`]): WavLM, HuBERT, wav2vec 2.0 or similar, or a student; it runs on its
            device and in its dtype, in eval mode.
        feature_extractor (`Wav2Vec2FeatureExtractor`): the model's own, which normalises.
        layers (`Sequence[int]`, *optional*): hidden states to keep, 0 to the number of layers; by default all.

    Raises:
        `ValueError`: if the model has an adapter of convolutions (`add_adapter`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        feature_extractor: Wav2Vec2FeatureExtractor,
        layers: Sequence[int] | None = None,
    ):
        refuse_adapter(model.config, "The encoder")
        self.model = model.eval()
        self.feature_extractor = feature_extractor
        self.layers = list(range(model.config.num_hidden_layers + 1)) if layers is None else list(layers)
        self.equal_lengths = not ignores_padding(model.config)
        self.num_layers, self.hidden_size = len(self.layers), model.config.hidden_size
        self.sampling_rate = feature_extractor.sampling_rate
        self.min_samples = receptive_field(model.config)
        self.frame_seconds = math.prod(model.config.conv_stride) / self.sampling_rate

    def prepare(self, samples: np.ndarray) -> np.ndarray:
        """A waveform at the model's rate, normalised as the model expects it."""
        return self.feature_extractor(samples, sampling_rate=self.sampling_rate)["input_values"][0]

    def num_frames(self, num_samples: int) -> int:
        return int(self.model._get_feat_extract_output_lengths(torch.tensor(num_samples)))

    @torch.inference_mode()
    def __call__(self, waveforms: list[np.ndarray]) -> list[torch.Tensor]:
        """
        Args:
            waveforms (`list[np.ndarray]`): results of `prepare`; all of the same length if `equal_lengths`.

        Returns:
            `list[torch.Tensor]`, one for each clip, of shape `(frames, layers, hidden size)`, float32.
        """
        batch = self.feature_extractor.pad(
            {"input_values": waveforms},
            padding=True,
            return_attention_mask=not self.equal_lengths,
            return_tensors="pt",
        ).to(self.model.device)
        batch["input_values"] = batch["input_values"].to(self.model.dtype)
        states = self.model(**batch, output_hidden_states=True).hidden_states
        kept = torch.stack([states[layer] for layer in self.layers], dim=2).float()  # (batch, frames, layers, hidden)
        return [clip[: self.num_frames(len(waveform))] for clip, waveform in zip(kept, waveforms, strict=True)]


class FilterBank:
    """
    Classical features of speech recognition, as a baseline for pretrained encoders: one "layer" of log-mel filterbanks
    or their cepstra (MFCC), with first and second differences, from windows of 25 ms every 10 ms.

    The differences are regressions over five frames. Filterbanks have 80 bands (240 features), as in SUPERB (arXiv
    2105.01051); MFCC are 13 cepstra of 40 bands (39 features). Features are not normalised per clip, since their mean
    over time would be zero.

    Args:
        kind (`str`): `"fbank"` or `"mfcc"`.

    Raises:
        `ValueError`: if there is no such kind.
    """

    KINDS = ("fbank", "mfcc")
    sampling_rate = 16_000
    window, hop = 400, 160
    frame_seconds = hop / sampling_rate

    def __init__(self, kind: str):
        if kind not in self.KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(self.KINDS)}, but is {kind!r}.")
        self.kind = kind
        self.num_layers, self.hidden_size = 1, 240 if kind == "fbank" else 39
        self.equal_lengths = False
        self.min_samples = self.window + 4 * self.hop  # five frames, which the differences need

    def prepare(self, samples: np.ndarray) -> np.ndarray:
        return samples

    def num_frames(self, num_samples: int) -> int:
        return (num_samples - self.window) // self.hop + 1

    def __call__(self, waveforms: list[np.ndarray]) -> list[torch.Tensor]:
        """Waveforms of shape `(samples,)` -> tensors of shape `(frames, 1, features)`, float32."""
        return [self._features(waveform) for waveform in waveforms]

    def _features(self, waveform: np.ndarray) -> torch.Tensor:
        bands = 80 if self.kind == "fbank" else 40
        frames = torch.from_numpy(waveform).unfold(0, self.window, self.hop) * torch.hann_window(self.window)
        power = torch.fft.rfft(frames, n=512).abs().square()
        log_mel = (power @ _mel_filters(bands)).clamp_min(1e-6).log().numpy()
        # About unit size, so that one range of learning rates serves these and hidden states.
        features = log_mel / 4 if self.kind == "fbank" else dct(log_mel, norm="ortho")[:, :13] / 10
        differences = [savgol_filter(features, 5, 2 if order == 2 else 1, deriv=order, axis=0) for order in (1, 2)]
        return torch.from_numpy(np.concatenate([features, *differences], axis=1).astype(np.float32))[:, None]


@functools.cache
def _mel_filters(bands: int) -> torch.Tensor:
    filters = mel_filter_bank(257, bands, 20.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(filters.astype(np.float32))
