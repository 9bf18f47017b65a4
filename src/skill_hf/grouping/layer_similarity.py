"""How alike the layers of a speech encoder are to each other, or to those of another one, over audio."""

import contextlib
import os
from collections.abc import Iterable

import numpy as np
from transformers import PreTrainedModel

from ..losses import weights_from
from ..models.loading import load_feature_extractor, load_model
from .forward_pass import check_models, run_over_clips
from .similarity import SIMILARITY_MEASURES


def layer_similarity(
    teacher: PreTrainedModel | str | os.PathLike,
    audio: Iterable,
    similarity: str = "cka",
    include_embeddings: bool = True,
    *,
    other: PreTrainedModel | str | os.PathLike | None = None,
    feature_extractor=None,
    other_feature_extractor=None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
    num_parts: int = 0,
    **weights: float,
) -> np.ndarray | list[np.ndarray]:
    r"""
    Similarity of every pair of a teacher's layers, or of each of its layers to each layer of another model, in one
    pass over `audio`.

    A batch holds only neighbouring waveforms of the same length. So nothing is ever padded, which models with group
    norm (the Base sizes) would not survive unchanged, and the result depends on `batch_size` only by rounding.

    Args:
        teacher ([`~transformers.PreTrainedModel`], `str` or `os.PathLike`):
            Speech encoder that takes `input_values`, or the Hub id or local directory of one, which is then loaded in
            float32 together with its feature extractor. It runs in eval mode, on the device where it is.
        audio (iterable of waveforms):
            Each a 1-D float `numpy.ndarray`, `torch.Tensor` or list of samples at the model's sampling rate, or a row
            with `audio` or `input_values` as [`SkillDistillationTrainer`] takes it. It is read once and lazily, so a
            generator will do, and so does a dataset.
        similarity (`str`, *optional*, defaults to `"cka"`):
            Measure: `cka` ([`LinearCKA`]), `cosine` ([`FrameCosine`]), `distillation` ([`DistillationSimilarity`]) or
            `mutual_knn` ([`MutualKNN`]).
        include_embeddings (`bool`, *optional*, defaults to `True`):
            Whether hidden state 0, the input of the first layer, takes part.
        other ([`~transformers.PreTrainedModel`], `str` or `os.PathLike`, *optional*):
            Another speech encoder, such as the teacher's student, for the rectangular matrix between the layers of
            both. Frames must match: both models have one sampling rate and one frame rate. `cka` and `mutual_knn`
            compare models of any width, `cosine` and `distillation` of the same width.
        feature_extractor ([`~transformers.SequenceFeatureExtractor`], *optional*):
            Prepares each waveform (normalises it, where the checkpoint asks for that). Without one, waveforms are the
            `input_values` as they stand, unless `teacher` is an id or a directory.
        other_feature_extractor ([`~transformers.SequenceFeatureExtractor`], *optional*):
            The same for `other`; without one, and if `other` is a loaded model, that of `teacher`.
        batch_size (`int`, *optional*, defaults to 8):
            Largest number of waveforms in one forward pass.
        seed (`int`, *optional*, defaults to 0):
            Seed of the sample of frames of `mutual_knn`.
        l1_weight, l2_weight, cosine_weight (`float`, *optional*, default to 1, 0 and 1):
            Weights of the terms of `distillation`.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        num_parts (`int`, *optional*, defaults to 0):
            Divides `audio` into so many parts, which each take every `num_parts`-th clip, and measures them as well,
            in the same pass. How much they differ shows how far the result depends on the choice of audio. Each part
            takes the memory of the measure once.

    Returns:
        `numpy.ndarray` of shape `(N, N)`, float64: symmetric, with ones on its diagonal. N is the number of layers,
        plus one with `include_embeddings`. With `num_parts` a list of such: that of all audio, then those of the parts
        that have enough audio for the measure. With `other` matrices are of shape `(N, M)` instead: a row for each
        layer of `teacher`, a column for each of `other`.

    Raises:
        `ValueError`: if the measure is unknown, a model cannot be loaded or takes no `input_values`, the two models
            cannot be compared, there is no audio, a waveform is not 1-D float, not finite or too short for one frame,
            or hidden states are not finite.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import WavLMConfig, WavLMModel

    >>> from skill_hf import layer_similarity

    >>> teacher = WavLMModel(WavLMConfig(hidden_size=96, num_hidden_layers=4, intermediate_size=192))
    >>> audio = [np.random.default_rng(i).standard_normal(16_000) for i in range(4)]
    >>> layer_similarity(teacher, audio, progress=False).shape
    (5, 5)
    >>> student = WavLMModel(WavLMConfig(hidden_size=48, num_hidden_layers=2, intermediate_size=96))
    >>> layer_similarity(teacher, audio, other=student, progress=False).shape
    (5, 3)
    ```
    """
    if similarity not in SIMILARITY_MEASURES:
        raise ValueError(f"`similarity` must be one of {', '.join(SIMILARITY_MEASURES)}, but is {similarity!r}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, but is {batch_size}.")
    weights_from(weights)  # misspelt names are an error whatever the measure
    first_layer = 0 if include_embeddings else 1
    parts = []
    for part in range(num_parts or 1):
        options = {
            "distillation": weights,
            "mutual_knn": {"seed": (seed, part) if part else seed},
        }
        parts.append(SIMILARITY_MEASURES[similarity](first_layer=first_layer, **options.get(similarity, {})))

    teacher, feature_extractor = _load(teacher, feature_extractor, "feature_extractor", "The model")
    models, extractors, roles = [teacher], [feature_extractor], ["teacher"]
    if other is not None:
        other, other_feature_extractor = _load(
            other, other_feature_extractor, "other_feature_extractor", "The other model"
        )
        models.append(other)
        extractors.append(feature_extractor if other_feature_extractor is None else other_feature_extractor)
        roles.append("other")
    check_models(models, extractors, roles)
    if other is not None:
        parts[0].check_widths(teacher.config.hidden_size, other.config.hidden_size)

    num_clips = 0

    def consume(*states_of_models) -> None:
        nonlocal num_clips
        num_in_batch = len(states_of_models[0][0])
        for first_clip in range(min(len(parts), num_in_batch)):
            clips = slice(first_clip, None, len(parts))
            part = parts[(num_clips + first_clip) % len(parts)]
            frames = [
                [state[clips].flatten(0, 1).to(teacher.device) for state in states[first_layer:]]
                for states in states_of_models
            ]
            part.update(*frames)
        num_clips += num_in_batch

    title = f"Layer similarity ({similarity})"
    run_over_clips(models, audio, extractors, consume, batch_size=batch_size, title=title, progress=progress)
    matrices = []
    if num_parts:
        for part in parts:
            with contextlib.suppress(ValueError):
                matrices.append(part.compute())
    total, *others = parts
    for part in others:
        total.absorb(part)
    matrix = total.compute()
    return [matrix, *matrices] if num_parts else matrix


def _load(model, feature_extractor, name: str, what: str) -> tuple:
    """The model of a Hub id or directory, and its feature extractor; a loaded one comes back as it is."""
    if not isinstance(model, (str, os.PathLike)):
        return model, feature_extractor
    source, model = model, load_model(model, what=what)
    if feature_extractor is None:
        feature_extractor = load_feature_extractor(source, what)
        if feature_extractor is None:
            raise ValueError(f"`{source}` has no preprocessor_config.json; pass `{name}`.")
    return model, feature_extractor
