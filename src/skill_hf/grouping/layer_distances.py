"""Distance between student and teacher at every hidden state, distilled or not."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.batches import checked_input_values, equal_length_batches
from ..models.model_modes import eval_mode
from ..models.properties import receptive_field
from .similarity import FrameCosine, LinearCKA


def layer_distances(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    audio: Iterable,
    *,
    feature_extractor=None,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    r"""
    Distance between student and teacher at every hidden state, distilled or not, in one pass over `audio`.

    - `cka`: `1 - CKA(h_l^T, h_l^S)`, linear CKA over all frames (Kornblith et al., arXiv 1905.00414, table 1; see
      [`~skill_hf.grouping.similarity.LinearCKA`]). Invariant to rotations, which a linear projection could undo.
    - `cosine`: `1 - mean_t <h_l^T, h_l^S> / (|h_l^T| |h_l^S|)` between the hidden states themselves, without the
      projections of the distillation loss.

    Sums are computed in float64. A batch contains only consecutive waveforms of the same length, so there is no
    padding.

    Args:
        teacher, student ([`~transformers.PreTrainedModel`]):
            Speech encoders with the input `input_values` and the same number and size of hidden states. Each runs in
            eval mode on its own device.
        audio (iterable of waveforms):
            Each a 1-D float `numpy.ndarray`, `torch.Tensor` or list of samples at the models' sampling rate,
            preferably not used in training. It is read once and lazily.
        feature_extractor ([`~transformers.SequenceFeatureExtractor`], *optional*):
            Prepares each waveform; without one, waveforms are used as `input_values` unchanged.
        batch_size (`int`, *optional*, defaults to 8):
            Maximum number of waveforms in one forward pass.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `dict[str, numpy.ndarray]`: `cka` and `cosine`, each float64 of shape `(num_hidden_layers + 1,)`; index 0 is
        the input of the first layer.

    Raises:
        `ValueError`: if the hidden states of the two models do not match, there is no audio, a waveform is not 1-D
            float, not finite or too short for one frame, or a hidden state is constant or not finite.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import WavLMConfig, WavLMModel

    >>> from skill_hf.analysis import layer_distances

    >>> config = WavLMConfig(hidden_size=96, num_hidden_layers=4, intermediate_size=192)
    >>> audio = [np.random.default_rng(i).standard_normal(16_000) for i in range(4)]
    >>> layer_distances(WavLMModel(config), WavLMModel(config), audio, progress=False)["cka"].shape
    (5,)
    ```
    """
    for name in ("num_hidden_layers", "hidden_size"):
        sizes = [getattr(model.config, name) for model in (teacher, student)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The teacher has `{name}` {sizes[0]}, but the student has {sizes[1]}; they must be equal."
            )
    layers = range(teacher.config.num_hidden_layers + 1)
    measures = {"cka": [LinearCKA() for _ in layers], "cosine": [FrameCosine() for _ in layers]}
    waveforms = checked_input_values(audio, feature_extractor, receptive_field(teacher.config))
    total = len(audio) if hasattr(audio, "__len__") else None
    num_clips = 0
    with (
        torch.no_grad(),
        eval_mode(teacher),
        eval_mode(student),
        tqdm(desc="Layer distances", total=total, unit="clip", disable=not progress) as bar,
    ):
        for batch in equal_length_batches(waveforms, batch_size):
            pairs = zip(_frames(teacher, batch, "teacher"), _frames(student, batch, "student"), strict=True)
            for layer, (teacher_frames, student_frames) in enumerate(pairs):
                for accumulators in measures.values():
                    accumulators[layer].update([teacher_frames, student_frames.to(teacher_frames.device)])
            num_clips += len(batch)
            bar.update(len(batch))
    if not num_clips:
        raise ValueError("There is no audio to compare layers on; pass at least one waveform.")
    return {
        name: np.array([_distance(accumulator, layer) for layer, accumulator in enumerate(accumulators)])
        for name, accumulators in measures.items()
    }


def _frames(model: PreTrainedModel, batch: torch.Tensor, role: str) -> Iterator[torch.Tensor]:
    """Each hidden state of `batch` `(B, samples)` as `(frames, features)`, float32."""
    inputs = batch.to(model.device, model.dtype)
    for layer, state in enumerate(model(input_values=inputs, output_hidden_states=True).hidden_states):
        if not torch.isfinite(state).all():
            raise ValueError(f"Hidden state {layer} of the {role} has NaN or infinite values; check its weights.")
        yield state.flatten(0, 1).float()


def _distance(accumulator, layer: int) -> float:
    try:
        return 1 - accumulator.compute()[0, 1]
    except ValueError as error:
        # The accumulator counts two rows, teacher and student, and would name the wrong layer.
        raise ValueError(
            f"Hidden state {layer} of the teacher or of the student does not vary over the audio; use more audio."
        ) from error
