"""Similarity of the layers of a speech encoder: streaming measures over its hidden states, frame by frame."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..losses import LOSS_TERMS, check_weights, weights_from


class SimilarityAccumulator(ABC):
    """
    Streaming similarity of N layers to each other, or to the M layers of another model:
    [`~SimilarityAccumulator.update`] for each batch of hidden states, then [`~SimilarityAccumulator.compute`]. Memory
    does not depend on the number of frames.

    Frames are collected into chunks of fixed size before they are used, so the result does not depend on how they were
    split over calls of `update`, not even in rounding. All tensors are on the device of the first hidden state.

    Args:
        first_layer (`int`, *optional*, defaults to 0):
            Index of the first hidden state passed; used only in error messages.
    """

    # Large enough for efficient matrix products, small enough for memory: 80 MB with the 13 states of a Base model.
    chunk_frames = 2048
    # Whether features are compared one by one, so that both models must have as many.
    needs_equal_widths = False

    def __init__(self, first_layer: int = 0):
        self.first_layer = first_layer
        self.num_frames = 0
        self._chunks = []  # (chunk_frames, N, D), float32; of another model (chunk_frames, M, E) as well
        self._filled = 0

    @torch.no_grad()
    def update(self, hidden_states: Sequence[torch.Tensor], others: Sequence[torch.Tensor] | None = None) -> None:
        """
        Adds frames of every layer.

        Args:
            hidden_states (sequence of N `torch.FloatTensor` of shape `(frames, features)`):
                The same frames in every layer, without padding.
            others (sequence of M `torch.FloatTensor` of shape `(frames, features of the other model)`, *optional*):
                The same frames in every layer of another model. Given in all calls or in none.

        Raises:
            `ValueError`: if the shapes differ among layers or from earlier calls, the frames of both models differ in
                number, their features do where the measure compares them one by one, or a value is not finite.
        """
        models = [hidden_states] if others is None else [hidden_states, others]
        shapes = [_shape_of_all(states) for states in models]  # of each model (frames, layers, features)
        frames = shapes[0][0]
        if others is not None:
            if frames != shapes[1][0]:
                raise ValueError(f"The two models have {frames} and {shapes[1][0]} frames; they must be the same.")
            self.check_widths(shapes[0][2], shapes[1][2])
        if not self._chunks:
            # MPS has no float64, which the sums need.
            device = torch.device("cpu") if hidden_states[0].device.type == "mps" else hidden_states[0].device
            self._chunks = [torch.empty(self.chunk_frames, *shape[1:], device=device) for shape in shapes]
        elif len(self._chunks) != len(models):
            raise ValueError("Hidden states of another model must be given in all calls of `update` or in none.")
        self._check(models, shapes)
        start = 0
        while start < frames:
            count = min(frames - start, self.chunk_frames - self._filled)
            for chunk, states in zip(self._chunks, models, strict=True):
                for row, state in enumerate(states):
                    chunk[self._filled : self._filled + count, row] = state[start : start + count]
            start += count
            self._filled += count
            if self._filled == self.chunk_frames:
                self._flush()

    @classmethod
    def check_widths(cls, features: int, other_features: int) -> None:
        """
        Raises:
            `ValueError`: if this measure cannot compare models of these numbers of features.
        """
        if cls.needs_equal_widths and features != other_features:
            name = next((name for name, measure in SIMILARITY_MEASURES.items() if measure is cls), cls.__name__)
            others = [name for name, measure in SIMILARITY_MEASURES.items() if not measure.needs_equal_widths]
            raise ValueError(
                f"`{name}` compares features one by one, but one model has {features} of them and the other"
                f" {other_features}; compare these two by {' or '.join(others)}."
            )

    def _check(self, models: list[Sequence[torch.Tensor]], shapes: list[tuple[int, int, int]]) -> None:
        """Raises a `ValueError` unless these states fit the earlier ones and are finite."""
        for chunk, (_, layers, features) in zip(self._chunks, shapes, strict=True):
            if chunk.shape[1:] != (layers, features):
                raise ValueError(
                    f"{layers} hidden states with {features} features do not match the earlier {chunk.shape[1]} with"
                    f" {chunk.shape[2]} features."
                )
        finite = torch.stack([torch.isfinite(state).all() for states in models for state in states]).tolist()
        if not all(finite):
            raise ValueError(
                f"Hidden state {self._name(finite.index(False))} has NaN or infinite values; check the model's"
                " weights and the audio, and load the model in float32 if it is in half precision."
            )

    def _name(self, row: int) -> str:
        """What errors call a layer; those of the other model count on."""
        layers = self._chunks[0].shape[1]
        return str(self.first_layer + row) if row < layers else f"{self.first_layer + row - layers} of the other model"

    def _flush(self) -> None:
        if self._filled:
            frames, *others = (chunk[: self._filled] for chunk in self._chunks)
            self._accumulate(frames, *others)
            self.num_frames += self._filled
            self._filled = 0

    @torch.no_grad()
    def compute(self) -> np.ndarray:
        """
        Similarity of every pair of layers over all frames so far; more frames may follow.

        Returns:
            `numpy.ndarray` of shape `(N, N)`, float64: symmetric, with ones on its diagonal. With another model of
            shape `(N, M)`: a row for each layer of the first model, a column for each of the other.

        Raises:
            `ValueError`: if there are no frames, or too few for this measure.
        """
        self._flush()
        if not self.num_frames:
            raise ValueError("There is no audio to compare layers on; pass at least one waveform.")
        matrix = self._similarity().cpu().numpy()
        if len(self._chunks) == 2:
            return np.clip(matrix, -1, 1)  # rounding may leave it
        matrix = np.clip((matrix + matrix.T) / 2, -1, 1)
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
    def _accumulate(self, frames: torch.Tensor, others: torch.Tensor | None = None) -> None:
        """
        Takes in `frames` of shape `(frames, N, D)`, and `others` `(frames, M, E)` where there is another model,
        float32, which it may overwrite but not keep.
        """

    @abstractmethod
    def _similarity(self) -> torch.Tensor:
        """The `(N, N)`, or with another model `(N, M)`, float64 similarity of all frames accumulated."""


def _shape_of_all(states: Sequence[torch.Tensor]) -> tuple[int, int, int]:
    """Frames, layers and features of the hidden states of one model."""
    shapes = sorted({tuple(state.shape) for state in states})
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise ValueError(f"Hidden states must all have the same shape (frames, features), but have {shapes}.")
    frames, features = shapes[0]
    return frames, len(states), features


class LinearCKA(SimilarityAccumulator):
    r"""
    Linear centred kernel alignment over frames, between 0 and 1.

    `CKA(X, Y) = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)` with `X` and `Y` of shape `(frames, features)`, centred
    over frames; Kornblith et al. (arXiv 1905.00414), table 1 and equation 4.

    Holds the cross-products of all pairs of layers, `8 D^2 N (N + 1) / 2` bytes: 0.4 GB for a Base model (13 states of
    768 features), 2.7 GB for a Large one (25 of 1024), 36 GB for XLS-R 2B (49 of 1920). With another model
    `8 (D E N M + D^2 N + E^2 M)` bytes: 0.9 GB for two Base models, 2.5 GB for Base and Large.
    """

    def __init__(self, first_layer: int = 0):
        super().__init__(first_layer)
        self._pilot = None  # (W,), float32, of the W features of all layers side by side
        self._sums = None  # (W,), float64, of frames less the pilot
        self._starts = []  # of the features of each layer, and W
        self._pairs = []  # each a layer, and the run of layers whose features it is multiplied with
        self._products = []  # for each of them: (features of the layer, features of the run), float64

    def _prepare(self, flat: torch.Tensor) -> None:
        layers = sum(chunk.shape[1] for chunk in self._chunks)
        widths = [width for chunk in self._chunks for width in [chunk.shape[2]] * chunk.shape[1]]
        self._starts = [0, *np.cumsum(widths).tolist()]
        if len(self._chunks) == 1:
            self._pairs = [(i, range(i, layers)) for i in range(layers)]
        else:
            rows = self._chunks[0].shape[1]
            self._pairs = [(i, range(i, i + 1)) for i in range(layers)]
            self._pairs += [(i, range(rows, layers)) for i in range(rows)]
        # Features with a large mean would lose their variation in float32 products; any constant may be taken off
        # first, since `_similarity` corrects for what is left of the mean.
        self._pilot = flat.mean(0, dtype=torch.float64).float()
        self._sums = torch.zeros_like(self._pilot, dtype=torch.float64)
        sizes = [[part.stop - part.start for part in self._features(*pair)] for pair in self._pairs]
        self._products = [torch.zeros(size, dtype=torch.float64, device=flat.device) for size in sizes]

    def _features(self, layer: int, run: range) -> tuple[slice, slice]:
        """Where the features of a layer, and those of a run of layers, stand among all."""
        starts = self._starts
        return slice(starts[layer], starts[layer + 1]), slice(starts[run.start], starts[run.stop])

    def _accumulate(self, frames: torch.Tensor, others: torch.Tensor | None = None) -> None:
        flat = frames.flatten(1)
        if others is not None:
            flat = torch.cat([flat, others.flatten(1)], dim=1)
        if self._pilot is None:
            self._prepare(flat)
        flat.sub_(self._pilot)
        self._sums += flat.sum(0, dtype=torch.float64)
        for pair, product in zip(self._pairs, self._products, strict=True):
            rows, columns = self._features(*pair)
            product += flat[:, rows].T @ flat[:, columns]

    def _absorb(self, other) -> None:
        # With s the difference of the pilots: sum (x + s)(y + s)^T = sum x y^T + sum x s^T + s sum (y + s)^T.
        shift = other._pilot.double() - self._pilot.double()
        shifted_sums = other._sums + other.num_frames * shift
        for pair, product, absorbed in zip(self._pairs, self._products, other._products, strict=True):
            rows, columns = self._features(*pair)
            product += absorbed
            product.addr_(other._sums[rows], shift[columns]).addr_(shift[rows], shifted_sums[columns])
        self._sums += shifted_sums

    def _similarity(self) -> torch.Tensor:
        layers = len(self._starts) - 1
        norms = self._sums.new_zeros(layers, layers)  # ||X_j^T X_i||_F^2 of the pairs
        for (i, run), product in zip(self._pairs, self._products, strict=True):
            rows, columns = self._features(i, run)
            centred = torch.addr(product, self._sums[rows], self._sums[columns], alpha=-1 / self.num_frames)
            norms[i, run.start : run.stop] = centred.square_().view(len(centred), len(run), -1).sum((0, 2))
        scale = norms.diagonal().sqrt()
        if not scale.all():
            constant = self._name(int((scale == 0).nonzero()[0]))
            frames = "frame" if self.num_frames == 1 else "frames"
            raise ValueError(
                f"Hidden state {constant} does not vary over {self.num_frames} {frames}, so CKA is undefined; use"
                " more audio."
            )
        norms /= torch.outer(scale, scale)
        if len(self._chunks) == 2:
            rows = self._chunks[0].shape[1]
            return norms[:rows, rows:]
        return norms.triu() + norms.triu(1).T


class FrameCosine(SimilarityAccumulator):
    """Mean over frames of the cosine between two layers' features, `mean_t <x_t, y_t> / (|x_t| |y_t|)`."""

    needs_equal_widths = True

    def __init__(self, first_layer: int = 0):
        super().__init__(first_layer)
        self._cosines = 0

    def _accumulate(self, frames: torch.Tensor, others: torch.Tensor | None = None) -> None:
        unit = F.normalize(frames, dim=-1)
        other_unit = unit if others is None else F.normalize(others, dim=-1)
        self._cosines = self._cosines + (unit @ other_unit.mT).sum(0, dtype=torch.float64)

    def _absorb(self, other) -> None:
        self._cosines = self._cosines + other._cosines

    def _similarity(self) -> torch.Tensor:
        return self._cosines / self.num_frames


class DistillationSimilarity(SimilarityAccumulator):
    """
    One minus the distillation distance of two layers, relative to the two layers that are farthest apart.

    `d_ij = mean_t [l1 mean_d |x - y| + l2 mean_d (x - y)^2 + cosine (1 - cos(x, y))]`, similarity `1 - d_ij / max(d)`:
    the loss of DPHuBERT (arXiv 2305.17651) between two layers of the teacher, shifted so that equal layers are at
    distance 0. The farthest pair, of those in the matrix, is at similarity 0; when no two layers differ all are at 1.

    Args:
        first_layer (`int`, *optional*, defaults to 0):
            Index of the first hidden state passed; used only in error messages.
        l1_weight, l2_weight, cosine_weight (`float`, *optional*, default to 1, 0 and 1):
            Weights of the mean absolute error, the mean squared error and the cosine distance, by keyword: one for
            each of [`~skill_hf.losses.LOSS_TERMS`].

    Raises:
        `ValueError`: if all weights are 0.
    """

    needs_equal_widths = True

    def __init__(self, first_layer: int = 0, **weights: float):
        super().__init__(first_layer)
        self.weights = weights_from(weights)
        check_weights(self.weights)
        self._distances = 0

    def _accumulate(self, frames: torch.Tensor, others: torch.Tensor | None = None) -> None:
        others = frames if others is None else others
        for name, weight in self.weights.items():
            if weight:
                self._distances = self._distances + weight * LOSS_TERMS[name].layer_distances(frames, others)

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
        self._samples = []  # (at most max_frames, N, D), float32; of another model (..., M, E) as well

    def _accumulate(self, frames: torch.Tensor, others: torch.Tensor | None = None) -> None:
        models = [frames] if others is None else [frames, others]
        keys = self._generator.random(len(frames))
        # Most frames of a long stream have keys above the largest in the sample; they need not be copied.
        largest = self._keys.max() if len(self._keys) == self.max_frames else np.inf
        chosen = np.flatnonzero(keys < largest)
        rows = torch.from_numpy(chosen).to(frames.device)
        self._add(keys[chosen], [states[rows] for states in models])

    def _absorb(self, other) -> None:
        self._add(other._keys, other._samples)

    def _add(self, keys: np.ndarray, samples: list[torch.Tensor]) -> None:
        keys = np.concatenate([self._keys, keys])
        kept = np.sort(np.argsort(keys)[: self.max_frames])
        rows = torch.from_numpy(kept).to(samples[0].device)
        earlier = self._samples or [sample[:0] for sample in samples]
        self._samples = [torch.cat(pair)[rows] for pair in zip(earlier, samples, strict=True)]
        self._keys = keys[kept]

    def _similarity(self) -> torch.Tensor:
        count = len(self._samples[0])
        if count <= self.k:
            raise ValueError(
                f"mutual_knn compares {self.k} neighbours and needs at least {self.k + 1} frames, but the audio has"
                f" {count}; use more audio."
            )
        nearest = [torch.stack([self._nearest(layer) for layer in sample.unbind(1)]) for sample in self._samples]
        of_rows, of_columns = nearest[0], nearest[-1]  # (N, count, k) and (M, count, k)
        overlap = torch.ones(len(of_rows), len(of_columns), dtype=torch.float64, device=of_rows.device)
        member = torch.empty(count, count, dtype=torch.bool, device=of_rows.device)
        for i, neighbours in enumerate(of_rows):
            member.fill_(False).scatter_(1, neighbours, True)
            for j in range(i + 1 if of_rows is of_columns else 0, len(of_columns)):
                overlap[i, j] = member.gather(1, of_columns[j]).double().mean()
        return overlap.triu() + overlap.triu(1).T if of_rows is of_columns else overlap

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
