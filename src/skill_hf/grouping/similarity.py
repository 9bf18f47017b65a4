"""Similarity of the layers of a speech encoder: streaming measures over its hidden states, frame by frame."""

import contextlib
import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.batches import checked_input_values, equal_length_batches
from ..losses import LOSS_TERMS, check_weights, weights_from
from ..models.loading import load_feature_extractor, load_model, refuse_adapter
from ..models.model_modes import eval_mode
from ..models.properties import receptive_field


class SimilarityAccumulator(ABC):
    """
    Streaming similarity of N layers: [`~SimilarityAccumulator.update`] for each batch of hidden states, then
    [`~SimilarityAccumulator.compute`]. Memory does not depend on the number of frames.

    Frames are collected into chunks of fixed size before they are used, so the result does not depend on how they were
    split over calls of `update`, not even in rounding. All tensors are on the device of the first hidden state.

    Args:
        first_layer (`int`, *optional*, defaults to 0):
            Index of the first hidden state passed; used only in error messages.
    """

    # Large enough for efficient matrix products, small enough for memory: 80 MB with the 13 states of a Base model.
    chunk_frames = 2048

    def __init__(self, first_layer: int = 0):
        self.first_layer = first_layer
        self.num_frames = 0
        self._chunk = None  # (chunk_frames, N, D), float32
        self._filled = 0

    @torch.no_grad()
    def update(self, hidden_states: Sequence[torch.Tensor]) -> None:
        """
        Adds frames of every layer.

        Args:
            hidden_states (sequence of N `torch.FloatTensor` of shape `(frames, features)`):
                The same frames in every layer, without padding.

        Raises:
            `ValueError`: if the shapes differ between layers or from earlier calls, or a value is not finite.
        """
        shapes = sorted({tuple(state.shape) for state in hidden_states})
        if len(shapes) != 1 or len(shapes[0]) != 2:
            raise ValueError(f"Hidden states must all have the same shape (frames, features), but have {shapes}.")
        frames, features = shapes[0]
        if self._chunk is None:
            # MPS has no float64, which the sums need.
            device = torch.device("cpu") if hidden_states[0].device.type == "mps" else hidden_states[0].device
            self._chunk = torch.empty(self.chunk_frames, len(hidden_states), features, device=device)
        elif self._chunk.shape[1:] != (len(hidden_states), features):
            raise ValueError(
                f"{len(hidden_states)} hidden states with {features} features do not match the earlier"
                f" {self._chunk.shape[1]} with {self._chunk.shape[2]} features."
            )
        finite = torch.stack([torch.isfinite(state).all() for state in hidden_states]).tolist()
        if not all(finite):
            raise ValueError(
                f"Hidden state {self.first_layer + finite.index(False)} has NaN or infinite values; check the model's"
                " weights and the audio, and load the model in float32 if it is in half precision."
            )
        start = 0
        while start < frames:
            count = min(frames - start, self.chunk_frames - self._filled)
            for row, state in enumerate(hidden_states):
                self._chunk[self._filled : self._filled + count, row] = state[start : start + count]
            start += count
            self._filled += count
            if self._filled == self.chunk_frames:
                self._flush()

    def _flush(self) -> None:
        if self._filled:
            self._accumulate(self._chunk[: self._filled])
            self.num_frames += self._filled
            self._filled = 0

    @torch.no_grad()
    def compute(self) -> np.ndarray:
        """
        Similarity of every pair of layers over all frames so far; more frames may follow.

        Returns:
            `numpy.ndarray` of shape `(N, N)`, float64: symmetric, with ones on its diagonal.

        Raises:
            `ValueError`: if there are no frames, or too few for this measure.
        """
        self._flush()
        if not self.num_frames:
            raise ValueError("There is no audio to compare layers on; pass at least one waveform.")
        matrix = self._similarity().cpu().numpy()
        matrix = np.clip((matrix + matrix.T) / 2, -1, 1)  # rounding may leave it
        np.fill_diagonal(matrix, 1)
        return matrix

    @torch.no_grad()
    def absorb(self, other: "SimilarityAccumulator") -> None:
        """Adds all frames of `other`, an accumulator of the same kind and layers; `other` is not changed."""
        self._flush()
        other._flush()
        if other.num_frames and self.num_frames:
            self._absorb(other)
            self.num_frames += other.num_frames
        elif other.num_frames:
            self.__dict__.update(copy.deepcopy(other.__dict__))

    @abstractmethod
    def _absorb(self, other) -> None:
        """Adds what `other` has accumulated; neither is empty."""

    @abstractmethod
    def _accumulate(self, frames: torch.Tensor) -> None:
        """Adds `frames` of shape `(frames, N, D)`, float32; may overwrite them, but must not keep them."""

    @abstractmethod
    def _similarity(self) -> torch.Tensor:
        """The `(N, N)` float64 similarity of all frames accumulated."""


class LinearCKA(SimilarityAccumulator):
    r"""
    Linear centred kernel alignment over frames, between 0 and 1.

    `CKA(X, Y) = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)` with `X` and `Y` of shape `(frames, features)`, centred
    over frames; Kornblith et al. (arXiv 1905.00414), table 1 and equation 4.

    Stores the cross-products of all pairs of layers, `8 D^2 N (N + 1) / 2` bytes: 0.4 GB for a Base model (13 states
    of 768 features), 2.7 GB for a Large one (25 of 1024).
    """

    def __init__(self, first_layer: int = 0):
        super().__init__(first_layer)
        self._pilot = None  # (N, D), float32
        self._sums = None  # (N, D), float64, of frames less the pilot
        self._products = []  # for each layer i: (D, (N - i) D), float64, with layers i, ..., N - 1

    def _accumulate(self, frames: torch.Tensor) -> None:
        _, layers, features = frames.shape
        if self._pilot is None:
            # Features with a large mean would lose their variation in float32 products; any constant may be taken off
            # first, since `_similarity` corrects for what is left of the mean.
            self._pilot = frames.mean(0, dtype=torch.float64).float()
            self._sums = torch.zeros_like(self._pilot, dtype=torch.float64)
            self._products = [
                torch.zeros(features, (layers - i) * features, dtype=torch.float64, device=frames.device)
                for i in range(layers)
            ]
        frames.sub_(self._pilot)
        self._sums += frames.sum(0, dtype=torch.float64)
        flat = frames.flatten(1)  # (frames, N D)
        for i, product in enumerate(self._products):
            product += frames[:, i].T @ flat[:, i * features :]

    def _absorb(self, other) -> None:
        # With s the difference of the pilots: sum (x + s)(y + s)^T = sum x y^T + sum x s^T + s sum (y + s)^T.
        shift = other._pilot.double() - self._pilot.double()
        shifted_sums = other._sums + other.num_frames * shift
        for i, product in enumerate(self._products):
            product += other._products[i]
            product.addr_(other._sums[i], shift[i:].flatten()).addr_(shift[i], shifted_sums[i:].flatten())
        self._sums += shifted_sums

    def _similarity(self) -> torch.Tensor:
        layers, features = self._sums.shape
        norms = self._sums.new_zeros(layers, layers)  # ||X_j^T X_i||_F^2, upper triangle
        for i, product in enumerate(self._products):
            centred = torch.addr(product, self._sums[i], self._sums[i:].flatten(), alpha=-1 / self.num_frames)
            norms[i, i:] = centred.square_().view(features, layers - i, features).sum((0, 2))
        scale = norms.diagonal().sqrt()
        if not scale.all():
            constant = self.first_layer + int((scale == 0).nonzero()[0])
            frames = "frame" if self.num_frames == 1 else "frames"
            raise ValueError(
                f"Hidden state {constant} does not vary over {self.num_frames} {frames}, so CKA is undefined; use"
                " more audio."
            )
        norms /= torch.outer(scale, scale)
        return norms.triu() + norms.triu(1).T


class FrameCosine(SimilarityAccumulator):
    """Mean over frames of the cosine between two layers' features, `mean_t <x_t, y_t> / (|x_t| |y_t|)`."""

    def __init__(self, first_layer: int = 0):
        super().__init__(first_layer)
        self._cosines = 0

    def _accumulate(self, frames: torch.Tensor) -> None:
        unit = F.normalize(frames, dim=-1)
        self._cosines = self._cosines + (unit @ unit.mT).sum(0, dtype=torch.float64)

    def _absorb(self, other) -> None:
        self._cosines = self._cosines + other._cosines

    def _similarity(self) -> torch.Tensor:
        return self._cosines / self.num_frames


class DistillationSimilarity(SimilarityAccumulator):
    """
    One minus the distillation distance of two layers, relative to the two layers that are farthest apart.

    `d_ij = mean_t [l1 mean_d |x - y| + l2 mean_d (x - y)^2 + cosine (1 - cos(x, y))]`, similarity `1 - d_ij / max(d)`:
    the loss of DPHuBERT (arXiv 2305.17651) between two layers of the teacher, shifted so that equal layers have
    distance 0. The farthest pair has similarity 0; if all layers are equal, all similarities are 1.

    Args:
        first_layer (`int`, *optional*, defaults to 0):
            Index of the first hidden state passed; used only in error messages.
        l1_weight, l2_weight, cosine_weight (`float`, *optional*, default to 1, 0 and 1):
            Weights of the mean absolute error, the mean squared error and the cosine distance, by keyword: one for
            each of [`~skill_hf.losses.LOSS_TERMS`].

    Raises:
        `ValueError`: if all weights are 0.
    """

    def __init__(self, first_layer: int = 0, **weights: float):
        super().__init__(first_layer)
        self.weights = weights_from(weights)
        check_weights(self.weights)
        self._distances = 0

    def _accumulate(self, frames: torch.Tensor) -> None:
        for name, weight in self.weights.items():
            if weight:
                self._distances = self._distances + weight * LOSS_TERMS[name].layer_distances(frames)

    def _absorb(self, other) -> None:
        self._distances = self._distances + other._distances

    def _similarity(self) -> torch.Tensor:
        largest = self._distances.max()
        return 1 - self._distances / largest if largest > 0 else torch.ones_like(self._distances)


class MutualKNN(SimilarityAccumulator):
    """
    Share of a frame's `k` nearest neighbours that two layers have in common, averaged over a sample of frames.

    `mean_t |S_x(t) & S_y(t)| / k`, where `S(t)` are the `k` other frames with the largest cosine to frame t; Huh et
    al. (arXiv 2405.07987), appendix A, on normalised features.

    Each frame gets a random number that depends on `seed` and on its position among all frames; the frames with the
    smallest numbers are the sample.

    Args:
        k (`int`, *optional*, defaults to 10):
            Number of neighbours.
        max_frames (`int`, *optional*, defaults to 2000):
            Size of the sample; if there are fewer frames, all are used.
        seed (`int` or sequence of them, *optional*, defaults to 0):
            Seed of the sample.
        first_layer (`int`, *optional*, defaults to 0):
            Index of the first hidden state passed; used only in error messages.
    """

    def __init__(self, k: int = 10, max_frames: int = 2000, seed: int = 0, first_layer: int = 0):
        super().__init__(first_layer)
        self.k = k
        self.max_frames = max_frames
        self._generator = np.random.default_rng(seed)
        self._keys = np.empty(0)
        self._sample = None  # (at most max_frames, N, D), float32

    def _accumulate(self, frames: torch.Tensor) -> None:
        keys = self._generator.random(len(frames))
        if self._sample is None:
            self._sample = frames[:0].clone()
        # In a long stream most frames have keys above the largest in the sample; they need not be copied.
        largest = self._keys.max() if len(self._keys) == self.max_frames else np.inf
        chosen = np.flatnonzero(keys < largest)
        keys = np.concatenate([self._keys, keys[chosen]])
        kept = np.sort(np.argsort(keys)[: self.max_frames])
        sample = torch.cat([self._sample, frames[torch.from_numpy(chosen).to(frames.device)]])
        self._keys, self._sample = keys[kept], sample[torch.from_numpy(kept).to(frames.device)]

    def _absorb(self, other) -> None:
        keys = np.concatenate([self._keys, other._keys])
        kept = np.sort(np.argsort(keys)[: self.max_frames])
        sample = torch.cat([self._sample, other._sample])
        self._keys, self._sample = keys[kept], sample[torch.from_numpy(kept).to(sample.device)]

    def _similarity(self) -> torch.Tensor:
        count, layers, _ = self._sample.shape
        if count <= self.k:
            raise ValueError(
                f"mutual_knn compares {self.k} neighbours and needs at least {self.k + 1} frames, but the audio has"
                f" {count}; use more audio."
            )
        neighbours = torch.stack([self._nearest(self._sample[:, i]) for i in range(layers)])  # (N, count, k)
        overlap = torch.ones(layers, layers, dtype=torch.float64, device=neighbours.device)
        member = torch.empty(count, count, dtype=torch.bool, device=neighbours.device)
        for i in range(layers):
            member.fill_(False).scatter_(1, neighbours[i], True)
            for j in range(i + 1, layers):
                overlap[i, j] = overlap[j, i] = member.gather(1, neighbours[j]).double().mean()
        return overlap

    def _nearest(self, features: torch.Tensor) -> torch.Tensor:
        # float64: with a large common mean all cosines are near 1 and float32 could not rank them.
        features = F.normalize(features.double(), dim=-1)
        return (features @ features.T).fill_diagonal_(-torch.inf).topk(self.k).indices


# By their names in a recipe, `SIMILARITIES` of `recipe/skill_config.py`.
SIMILARITY_MEASURES: dict[str, type[SimilarityAccumulator]] = {
    "cka": LinearCKA,
    "cosine": FrameCosine,
    "distillation": DistillationSimilarity,
    "mutual_knn": MutualKNN,
}


def layer_similarity(
    teacher: PreTrainedModel | str | os.PathLike,
    audio: Iterable,
    similarity: str = "cka",
    include_embeddings: bool = True,
    *,
    feature_extractor=None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
    num_parts: int = 0,
    **weights: float,
) -> np.ndarray | list[np.ndarray]:
    r"""
    Similarity of every pair of a teacher's layers, in one pass over `audio`.

    A batch contains only consecutive waveforms of the same length. There is thus no padding, which would change the
    outputs of models with group norm (the Base sizes), and the result depends on `batch_size` only by rounding.

    Args:
        teacher ([`~transformers.PreTrainedModel`], `str` or `os.PathLike`):
            Speech encoder with the input `input_values`, or the Hub id or local directory of one, which is then loaded
            in float32 with its feature extractor. It runs in eval mode on its own device.
        audio (iterable of waveforms):
            Each a 1-D float `numpy.ndarray`, `torch.Tensor` or list of samples at the model's sampling rate, or a row
            with `audio` or `input_values`, as for [`SkillDistillationTrainer`]. It is read once and lazily, so
            generators and datasets both work.
        similarity (`str`, *optional*, defaults to `"cka"`):
            Measure: `cka` ([`LinearCKA`]), `cosine` ([`FrameCosine`]), `distillation` ([`DistillationSimilarity`]) or
            `mutual_knn` ([`MutualKNN`]).
        include_embeddings (`bool`, *optional*, defaults to `True`):
            Whether hidden state 0, the input of the first layer, takes part.
        feature_extractor ([`~transformers.SequenceFeatureExtractor`], *optional*):
            Prepares each waveform (normalises it, if the checkpoint requires this). Without one, waveforms are used as
            `input_values` unchanged, unless `teacher` is an id or a directory.
        batch_size (`int`, *optional*, defaults to 8):
            Maximum number of waveforms in one forward pass.
        seed (`int`, *optional*, defaults to 0):
            Seed of the sample of frames of `mutual_knn`.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        num_parts (`int`, *optional*, defaults to 0):
            Also computes the similarity of each of this many parts of `audio` (every `num_parts`-th clip), in the same
            pass. Their differences show how much the result depends on the choice of audio. Each part needs the memory
            of the measure once.
        l1_weight, l2_weight, cosine_weight (`float`, *optional*, default to 1, 0 and 1):
            Weights of the terms of `distillation`, by keyword: one for each of [`~skill_hf.losses.LOSS_TERMS`].

    Returns:
        `numpy.ndarray` of shape `(N, N)`, float64: symmetric, with ones on its diagonal. N is the number of layers,
        plus one with `include_embeddings`. With `num_parts`, a list: the matrix of all audio, then those of the parts
        with enough audio for the measure.

    Raises:
        `ValueError`: if the measure is unknown, the model cannot be loaded or has no input `input_values`, there is no
            audio, a waveform is not 1-D float, not finite or too short for one frame, or hidden states are not finite.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import WavLMConfig, WavLMModel

    >>> from skill_hf import layer_similarity

    >>> teacher = WavLMModel(WavLMConfig(hidden_size=96, num_hidden_layers=4, intermediate_size=192))
    >>> audio = [np.random.default_rng(i).standard_normal(16_000) for i in range(4)]
    >>> layer_similarity(teacher, audio, progress=False).shape
    (5, 5)
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

    source = teacher if isinstance(teacher, (str, os.PathLike)) else None
    if source is not None:
        teacher = load_model(source)
    refuse_adapter(teacher.config, "`teacher`")
    if teacher.main_input_name != "input_values":
        raise ValueError(
            f"`teacher` must be a speech encoder with the input `input_values`, but {type(teacher).__name__} takes"
            f" `{teacher.main_input_name}`."
        )
    if source is not None and feature_extractor is None:
        feature_extractor = load_feature_extractor(source)
        if feature_extractor is None:
            raise ValueError(f"`{source}` has no preprocessor_config.json; pass `feature_extractor`.")

    waveforms = checked_input_values(audio, feature_extractor, receptive_field(teacher.config))
    num_waveforms = len(audio) if hasattr(audio, "__len__") else None
    num_clips = 0
    with (
        torch.no_grad(),
        eval_mode(teacher),
        tqdm(desc=f"Layer similarity ({similarity})", total=num_waveforms, unit="clip", disable=not progress) as bar,
    ):
        for batch in equal_length_batches(waveforms, batch_size):
            inputs = batch.to(teacher.device, teacher.dtype)  # (B, samples)
            hidden_states = teacher(input_values=inputs, output_hidden_states=True).hidden_states[first_layer:]
            for first_clip in range(min(len(parts), len(batch))):
                clips = slice(first_clip, None, len(parts))
                part = parts[(num_clips + first_clip) % len(parts)]
                part.update([state[clips].flatten(0, 1) for state in hidden_states])
            num_clips += len(batch)
            bar.update(len(batch))
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
