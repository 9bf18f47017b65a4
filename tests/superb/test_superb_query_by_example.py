import itertools
import json

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_teacher
from example_helpers import isolate, run_main, save_feature_extractor
from level_encoder import LevelEncoder, make_dataset, write_clip

import skill_hf.superb.query_by_example as query_by_example
from skill_hf.superb.features import cache_hidden_states
from skill_hf.superb.query_by_example import (
    evaluate_query_by_example,
    frame_distances,
    read_truth,
    search,
    subsequence_dtw,
)


# Words are steps of loudness; none is a part of another.
WORDS = {"ONE": [1, 2, 3], "TWO": [4, 9, 5], "TEN": [7, 1, 8, 6], "SIX": [11, 12, 10], "NIL": [14, 3, 13, 2]}


def spoken(text: str, frames: int) -> list[int]:
    return [level for word in text.split() for level in WORDS[word] for _ in range(frames)]


def make_splits(directory) -> dict[str, datasets.Dataset]:
    """Queries are spoken more slowly than the words of documents."""
    documents = [" ".join(words) for words in itertools.combinations(WORDS, 3)]
    texts = {"documents": documents, "validation": ["ONE", "SIX"], "test": ["TWO", "TEN", "NIL", "ONE TWO"]}
    return {
        name: make_dataset(
            directory / name, [spoken(text, 2 + (name != "documents")) for text in split_texts], {"text": split_texts}
        )
        for name, split_texts in texts.items()
    }


def test_encoder_that_hears_every_step_finds_all_words(tmp_path):
    splits = make_splits(tmp_path)
    result = evaluate_query_by_example(LevelEncoder(), splits, "text", tmp_path / "cache")
    assert result["qbe_mtwv"] == pytest.approx(1)
    assert result["layer"] == 1
    assert result["validation"]["1"]["qbe_mtwv"] == pytest.approx(1)
    assert result["validation"]["0"]["qbe_mtwv"] < 0.3
    assert result["num_clips"] == {"documents": 10, "validation": 2, "test": 4}


def test_encoder_that_hears_nothing_finds_next_to_nothing(tmp_path):
    result = evaluate_query_by_example(LevelEncoder(deaf=True), make_splits(tmp_path), "text", tmp_path / "cache")
    assert 0 <= result["qbe_mtwv"] < 0.3


def test_alignment_is_the_cheapest_of_all():
    rng = np.random.default_rng(0)
    for query_frames, frames in ((4, 6),) * 8 + ((5, 3), (1, 4), (3, 1)):
        distances = rng.random((query_frames, frames))
        costs = []
        for path in itertools.product(range(frames), repeat=query_frames):
            if all(0 <= after - before <= 2 for before, after in itertools.pairwise(path)):
                costs.append(sum(distances[frame, column] for frame, column in enumerate(path)) / query_frames)
        padded = torch.nn.functional.pad(torch.from_numpy(distances), (0, 3), value=torch.inf)
        batch = torch.stack(
            [padded, torch.nn.functional.pad(torch.ones(query_frames, frames), (0, 3), value=torch.inf)]
        )
        found = subsequence_dtw(batch)
        assert found[0].item() == pytest.approx(min(costs))
        assert found[1].item() == pytest.approx(1)


def test_distances_are_those_of_scipy_scaled_by_frame_of_the_query():
    from scipy.spatial.distance import cdist

    rng = np.random.default_rng(0)
    query, documents = rng.standard_normal((3, 5)), [rng.standard_normal((frames, 5)) for frames in (4, 7)]
    unit = torch.nn.functional.normalize
    states = torch.nn.utils.rnn.pad_sequence([unit(torch.from_numpy(document)) for document in documents], True)
    found = frame_distances(unit(torch.from_numpy(query)), states, torch.tensor([4, 7]))
    assert torch.isinf(found[0, :, 4:]).all()
    for document, distances_found in zip(documents, found, strict=True):
        expected = np.exp(cdist(query, document, "cosine")) - 1
        low, high = expected.min(1, keepdims=True), expected.max(1, keepdims=True)
        assert np.allclose(distances_found[:, : len(document)], (expected - low) / (high - low))


def test_scores_are_standardised_and_no_batch_changes_them(tmp_path, monkeypatch):
    splits = make_splits(tmp_path)
    encoder = LevelEncoder()
    states = {
        name: cache_hidden_states(encoder, dataset, tmp_path / "cache" / name) for name, dataset in splits.items()
    }
    scores = search(states["test"], states["documents"], layer=1)
    assert scores.shape == (4, 10)
    assert np.allclose(scores.mean(1), 0, atol=1e-5) and np.allclose(scores.std(1), 1, atol=1e-5)
    monkeypatch.setattr(query_by_example, "BATCH_FRAMES", 50)  # two documents at a time
    assert np.allclose(scores, search(states["test"], states["documents"], layer=1), atol=1e-5)


def test_short_queries_fit_all_documents_alike(tmp_path):
    documents = make_dataset(tmp_path / "documents", [[1, 2, 3, 4] * 4, [5, 6, 7, 8] * 4], {"text": ["A", "B"]})
    queries = make_dataset(tmp_path / "queries", [[1, 2, 3, 4], [1, 2, 3, 4, 1]], {"text": ["A", "A"]})
    encoder = LevelEncoder()
    queries, documents = (
        cache_hidden_states(encoder, dataset, tmp_path / "cache" / name)
        for name, dataset in {"queries": queries, "documents": documents}.items()
    )
    scores = search(queries, documents, layer=1)
    assert (scores[0] == 0).all()
    assert scores[1].tolist() == pytest.approx([1, -1], abs=1e-5)  # and longer ones the better fit


def test_words_names_and_classes_say_which_document_holds_a_query():
    def dataset_of(**columns) -> datasets.Dataset:
        return datasets.Dataset.from_dict(columns)

    texts = ["we go home", "Go  on", "gone home"]
    paths = [{"path": f"/data/{name}", "bytes": None} for name in ("a.wav", "b.wav", "c.d.wav")]
    documents = dataset_of(audio=paths, text=texts)
    truth = read_truth(dataset_of(text=["go", "GO HOME", "home"]), documents, "text")
    assert truth.tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 1]]
    for names in (["a b", "c.d"], [["a.wav", "b"], ["c.d.wav"]]):
        truth = read_truth(dataset_of(documents=names), documents, "documents")
        assert truth.tolist() == [[1, 1, 0], [0, 0, 1]]
    assert read_truth(dataset_of(documents=["a", None]), documents, "documents").tolist() == [[1, 0, 0], [0, 0, 0]]
    labels = dataset_of(word=[1, 0]).cast_column("word", datasets.ClassLabel(names=["no", "yes"]))
    assert read_truth(labels, labels, "word").tolist() == [[1, 0], [0, 1]]

    with pytest.raises(ValueError, match="`documents` of query 1 names d, which matches none of the documents"):
        read_truth(dataset_of(documents=["a", "d"]), documents, "documents")
    twice = dataset_of(audio=[{"path": "/x/a.wav"}, {"path": "/y/a.wav"}])
    with pytest.raises(ValueError, match="query 0 names a, which matches several"):
        read_truth(dataset_of(documents=["a"]), twice, "documents")
    with pytest.raises(ValueError, match="No document contains any of the 1 queries, according to `text`"):
        read_truth(dataset_of(text=["stay"]), documents, "text")
    with pytest.raises(ValueError, match="The query set has no column `word`"):
        read_truth(dataset_of(text=["stay"]), documents, "word")


def test_example_measures_query_by_example(tmp_path, tmp_path_factory, monkeypatch):
    import run_superb

    isolate(tmp_path_factory, monkeypatch)
    tiny_teacher().save_pretrained(save_feature_extractor(tmp_path / "teacher"))
    texts = {"train": ["ONE TWO", "TWO TEN", "SIX"], "validation": ["ONE"], "test": ["TWO", "SIX"]}
    for split, split_texts in texts.items():
        rows = [{"file_name": f"{row}.wav", "word": text} for row, text in enumerate(split_texts)]
        for row in rows:
            write_clip(tmp_path / "data" / split / row["file_name"], spoken(row["word"], 4))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / split / "metadata.jsonl").write_text(lines, encoding="utf-8")
    settings = {
        "task": "qbe",
        "model": tmp_path / "teacher",
        "dataset_name": tmp_path / "data",
        "cache_dir": tmp_path / "cache",
        "output_dir": tmp_path / "out",
        "use_cpu": True,
    }
    status, _, errors = run_main(run_superb, settings)
    assert status == 2 and "--validation_split" in errors[0]
    status, _, errors = run_main(run_superb, settings | {"validation_split": "validation"})
    assert (status, errors) == (0, [])
    results = json.loads((tmp_path / "out" / "teacher" / "all_results.json").read_text(encoding="utf-8"))
    assert 0 <= results["qbe"]["scores"]["qbe_mtwv"] <= 1
    assert results["qbe"]["runs"]["test"]["validation"].keys() == {"0", "1", "2", "3"}
