"""Query by example, as in SUPERB (arXiv 2105.01051): searches spoken queries in documents, without training."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from ..data.batches import make_batches
from ..encoders import FilterBank, PretrainedEncoder
from ..metrics import load_metric
from .features import CachedHiddenStates, cache_hidden_states
from .tasks import check_column, label_rows


# As s3prl does: a shorter query would fit anywhere.
MIN_QUERY_FRAMES = 5

# Frames of documents with their padding that are compared with a query at once.
BATCH_FRAMES = 16_384


def read_truth(queries: datasets.Dataset, documents: datasets.Dataset, column: str) -> np.ndarray:
    """
    Which documents contain a query.

    If both sets have the column, it contains texts, words or classes: a document contains a query if the query's words
    occur in it consecutively, ignoring case. If only the queries have it, it contains the names of the documents with
    this query, as a list or separated by blanks; names are file names, with or without extension.

    Args:
        queries (`datasets.Dataset`): spoken queries.
        documents (`datasets.Dataset`): documents to search.
        column (`str`): name of the column.

    Returns:
        `np.ndarray` of shape `(queries, documents)`, bool.

    Raises:
        `ValueError`: if the column is missing, a name matches no document or several, or no document contains a query.
    """
    if column in documents.column_names:
        texts = [
            [f" {' '.join(text.upper().split())} " for (text,) in label_rows(dataset, [column], name)]
            for dataset, name in ((queries, "query"), (documents, "document"))
        ]
        truth = np.array([[query in document for document in texts[1]] for query in texts[0]])
    else:
        truth = _read_names(queries, documents, column)
    if not truth.any():
        raise ValueError(f"No document contains any of the {len(queries)} queries, according to `{column}`.")
    return truth


def _read_names(queries: datasets.Dataset, documents: datasets.Dataset, column: str) -> np.ndarray:
    check_column(queries, column, "query")
    rows: dict[str, list[int]] = {}
    for row, audio in enumerate(documents["audio"]):
        path = audio.get("path") if isinstance(audio, Mapping) else audio
        for name in {Path(path).name, Path(path).stem} if isinstance(path, str) else ():
            rows.setdefault(name, []).append(row)
    truth = np.zeros((len(queries), len(documents)), dtype=bool)
    for row, names in enumerate(queries[column]):
        for name in names.split() if isinstance(names, str) else names or []:
            found = rows.get(name, [])
            if len(found) != 1:
                raise ValueError(
                    f"`{column}` of query {row} names {name}, which {'matches several' if found else 'matches none'}"
                    " of the documents."
                )
            truth[row, found[0]] = True
    return truth


def subsequence_dtw(distances: torch.Tensor) -> torch.Tensor:
    """
    Cost per query frame of the best alignment of a query with a part of a document: `min_j D_Nj / N` with
    `D_ij = d_ij + min(D_(i-1)j, D_(i-1)(j-1), D_(i-1)(j-2))` and `D_1j = d_1j`.

    This is dtw-python's step pattern `asymmetric` with open begin and end, as used by s3prl.

    Args:
        distances (`torch.Tensor` of shape `(..., query frames, document frames)`): distances between frames; infinity
            for padding of a document.

    Returns:
        `torch.Tensor` of shape `(...)`
    """
    costs = distances[..., 0, :]
    for row in distances[..., 1:, :].unbind(-2):
        before = F.pad(costs, (2, 0), value=torch.inf)
        costs = row + torch.stack([before[..., 2:], before[..., 1:-1], before[..., :-2]]).amin(0)
    return costs.amin(-1) / distances.shape[-2]


def frame_distances(query: torch.Tensor, documents: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
    """
    `exp(1 - cosine) - 1`, scaled for each query frame to the range from 0 to 1 over the frames of a document: s3prl's
    `cosine_exp` with `minmax_norm`.

    Args:
        query (`torch.Tensor` of shape `(query frames, size)`): vectors of length 1.
        documents (`torch.Tensor` of shape `(documents, frames, size)`): the same, padded.
        num_frames (`torch.Tensor` of shape `(documents,)`): frames without padding.

    Returns:
        `torch.Tensor` of shape `(documents, query frames, frames)`, infinity for padding.
    """
    distances = (1 - torch.einsum("qd,ntd->nqt", query, documents)).expm1()
    padding = torch.arange(documents.shape[1], device=documents.device) >= num_frames[:, None, None]
    lowest = distances.masked_fill(padding, torch.inf).amin(-1, keepdim=True)
    highest = distances.masked_fill(padding, -torch.inf).amax(-1, keepdim=True)
    scaled = (distances - lowest) / (highest - lowest).clamp_min(1e-9)
    return scaled.masked_fill(padding, torch.inf)


@torch.inference_mode()
def search(
    queries: CachedHiddenStates,
    documents: CachedHiddenStates,
    layer: int,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """
    Scores how well each query matches each document, with the hidden states of one layer.

    As in s3prl, each dimension of the hidden states is standardised over all frames of queries and documents, and the
    negative costs of [`subsequence_dtw`] over the documents of a query. A query of fewer than five frames gets the
    same score for all documents.

    Args:
        queries, documents ([`CachedHiddenStates`]): clips.
        layer (`int`): index of the hidden state.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): device for the computation.

    Returns:
        `np.ndarray` of shape `(queries, documents)`, float32; mean 0 and standard deviation 1 over the documents.
    """
    mean, std = (moment.to(device) for moment in _mean_and_std([queries, documents], layer))

    def unit(clip: np.ndarray) -> torch.Tensor:
        states = torch.from_numpy(np.array(clip[:, layer], dtype=np.float32)).to(device)
        return F.normalize((states - mean) / std, dim=-1)

    units = [unit(query) for query in queries]
    scores = np.zeros((len(queries), len(documents)), dtype=np.float32)
    for batch in make_batches(enumerate(documents), BATCH_FRAMES, len(documents), equal_lengths=False):
        items, clips = zip(*batch, strict=True)
        states = nn.utils.rnn.pad_sequence([unit(clip) for clip in clips], batch_first=True)
        num_frames = torch.tensor([len(clip) for clip in clips], device=device)
        costs = [
            subsequence_dtw(frame_distances(query, states, num_frames))
            if len(query) >= MIN_QUERY_FRAMES
            else states.new_zeros(len(clips))
            for query in units
        ]
        scores[:, items] = -torch.stack(costs).cpu().numpy()
    return (scores - scores.mean(1, keepdims=True)) / np.maximum(scores.std(1, keepdims=True), 1e-9)


def _mean_and_std(parts: Sequence[CachedHiddenStates], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    count, total, squares = 0, 0.0, 0.0
    for part in parts:
        for clip in part:
            states = clip[:, layer].astype(np.float64)
            count, total, squares = count + len(states), total + states.sum(0), squares + np.square(states).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float().clamp_min(1e-9)


def evaluate_query_by_example(
    encoder: PretrainedEncoder | FilterBank,
    splits: Mapping[str, datasets.Dataset],
    column: str,
    cache_dir: str | os.PathLike,
    max_seconds: float | None = None,
    cache_dtype: str = "float16",
    settings: dict | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """
    Searches the queries of the validation set with each layer, and those of the test set with the best layer.

    SUPERB uses QUESST 2014: only English queries and documents are searched, but the score includes all languages,
    with the others counted as missed. Published values are therefore lower.

    Args:
        encoder ([`PretrainedEncoder`] or [`FilterBank`]): frozen.
        splits (`Mapping[str, Dataset]`): `documents`, and queries in `validation` and `test`; with undecoded `audio`.
        column (`str`): column for [`read_truth`].
        cache_dir (`str` or `PathLike`): a directory for these splits and this encoder.
        max_seconds, cache_dtype, settings: of [`cache_hidden_states`].
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): device for the search.

    Returns:
        `dict`: `qbe_mtwv`, the maximum term-weighted value of the test set; `layer`, 0 for the first of the encoder's
        hidden states; `validation` (layer -> metric); `num_clips`.

    Raises:
        `ValueError`: errors of [`read_truth`] (before anything is encoded) and of [`cache_hidden_states`].
    """
    truths = {split: read_truth(splits[split], splits["documents"], column) for split in ("validation", "test")}
    states = {
        split: cache_hidden_states(
            encoder,
            dataset,
            Path(cache_dir) / split,
            max_seconds=max_seconds,
            dtype=cache_dtype,
            settings={**(settings or {}), "split": split},
        )
        for split, dataset in splits.items()
    }

    def mtwv(split: str, layer: int) -> float:
        scores = search(states[split], states["documents"], layer, device)
        truth = truths[split][np.ix_(states[split].rows, states["documents"].rows)]
        result = load_metric("term_weighted_value").compute(
            predictions=scores.ravel(),
            references=truth.ravel().astype(int),
            queries=np.repeat(np.arange(len(truth)), truth.shape[1]).astype(str),
        )
        return result["mtwv"]

    validation = [mtwv("validation", layer) for layer in tqdm(range(encoder.num_layers), "Searching", unit="layer")]
    best = int(np.argmax(validation))
    return {
        "qbe_mtwv": mtwv("test", best),
        "layer": best,
        "validation": {str(layer): {"qbe_mtwv": value} for layer, value in enumerate(validation)},
        "num_clips": {split: len(split_states) for split, split_states in states.items()},
    }
