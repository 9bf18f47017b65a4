"""Distance between student and teacher at every hidden state, distilled or not."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.properties import student_states
from .forward_pass import check_models, run_over_clips
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
            Speech encoders with the input `input_values` and hidden states of the same size. The student may lack some
            layers of the teacher. Each runs in eval mode on its own device.
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
        `dict[str, numpy.ndarray]`: `cka` and `cosine`, each float64 of shape `(num_hidden_layers + 1,)`, as many as
        the teacher has; index 0 is the input of the first layer. Where the student lacks layers, the output of the
        layer below is compared (see [`~skill_hf.models.properties.student_states`]).

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
    _check_sizes(teacher.config, student.config)
    layers = range(teacher.config.num_hidden_layers + 1)
    counterparts = student_states(student.config, len(layers) - 1)
    measures = {"cka": [LinearCKA() for _ in layers], "cosine": [FrameCosine() for _ in layers]}
    models, extractors = [teacher, student], [feature_extractor] * 2
    check_models(models, extractors, ["teacher", "student"])

    def consume(teacher_states, states) -> None:
        states = [states[index] for index in counterparts]
        pairs = zip(_frames(teacher_states, "teacher"), _frames(states, "student"), strict=True)
        for layer, (teacher_frames, student_frames) in enumerate(pairs):
            for accumulators in measures.values():
                accumulators[layer].update([teacher_frames, student_frames.to(teacher_frames.device)])

    title = "Layer distances"
    run_over_clips(models, audio, extractors, consume, batch_size=batch_size, title=title, progress=progress)
    return {
        name: np.array([_distance(accumulator, layer) for layer, accumulator in enumerate(accumulators)])
        for name, accumulators in measures.items()
    }


def _check_sizes(teacher: PreTrainedConfig, student: PreTrainedConfig) -> None:
    remaining = getattr(student, "remaining_layers", None)
    if teacher.hidden_size != student.hidden_size:
        raise ValueError(
            f"The teacher has `hidden_size` {teacher.hidden_size}, but the student has {student.hidden_size}; they"
            " must be equal."
        )
    if remaining is None and student.num_hidden_layers != teacher.num_hidden_layers:
        raise ValueError(
            f"The teacher has `num_hidden_layers` {teacher.num_hidden_layers}, but the student has"
            f" {student.num_hidden_layers}; they must be equal, unless its config has `remaining_layers`."
        )
    if remaining is not None and max(remaining) >= teacher.num_hidden_layers:
        raise ValueError(
            f"The student has the layers {remaining} of a teacher, but this one has only {teacher.num_hidden_layers}"
            " layers, numbered from 0."
        )


def _frames(states: Sequence[torch.Tensor], role: str) -> Iterator[torch.Tensor]:
    """Each hidden state `(B, frames, features)` of a batch as `(all frames, features)`, float32."""
    for layer, state in enumerate(states):
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
