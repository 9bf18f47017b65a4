import json

import datasets
import numpy as np
import pytest
from conftest import tiny_teacher
from example_helpers import isolate, run_main, save_feature_extractor
from level_encoder import LevelEncoder, make_dataset, training_arguments, write_clip

import skill_hf.superb.registry as registry
from skill_hf.superb.evaluation import evaluate_task, prepare_examples
from skill_hf.superb.slot_filling import SlotFilling


def draw_texts(number: int, seed: int) -> list[str]:
    """Words of the letters A to E, some in slots; the first text has both types."""
    rng = np.random.default_rng(seed)
    texts = ["B-city BAD E-city AT B-time DEE E-time"]
    while len(texts) < number:
        words = ["".join(rng.choice(list("ABCDE"), rng.integers(1, 4))) for _ in range(3)]
        slot = rng.choice(["city", "time", ""])
        texts.append(" ".join([words[0], *([f"B-{slot}", words[1], f"E-{slot}"] if slot else words[1:2]), words[2]]))
    return texts


def dataset_of(texts: list, **columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"audio": ["clip.wav"] * len(texts), "text": texts, **columns})


def read(task: SlotFilling, dataset: datasets.Dataset) -> list[str]:
    return task.read({"train": dataset})["train"]


def spoken(text: str, levels: dict[str, int]) -> list[int]:
    """Each symbol of a text for two frames, with one frame of silence after it."""
    return [level for symbol in SlotFilling("text").split(text) for level in (levels[symbol],) * 2 + (0,)]


def make_splits(directory) -> dict[str, datasets.Dataset]:
    split = SlotFilling("text").split
    drawn = {
        name: draw_texts(number, seed=number) for name, number in {"train": 64, "validation": 4, "test": 8}.items()
    }
    symbols = sorted({symbol for text in drawn["train"] for symbol in split(text)})
    levels = {symbol: level for level, symbol in enumerate(symbols, 1)}
    return {
        name: make_dataset(directory / name, [spoken(text, levels) for text in texts], {"text": texts})
        for name, texts in drawn.items()
    }


def evaluate(tmp_path, encoder, steps: int) -> dict:
    task = SlotFilling("text", lstm_size=0)  # what each frame is needs no context
    examples = prepare_examples(task, encoder, make_splits(tmp_path), tmp_path / "cache")
    return evaluate_task(task, examples, training_arguments(tmp_path / "heads", steps), [2e-2])


def test_encoder_that_hears_every_symbol_fills_all_slots(tmp_path):
    result = evaluate(tmp_path, LevelEncoder(), 100)
    assert (result["sf_f1"], result["sf_cer"]) == (100, 0)
    assert result["layer_weights"][1] > 0.5


def test_encoder_that_hears_nothing_fills_none(tmp_path):
    result = evaluate(tmp_path, LevelEncoder(deaf=True), 20)
    assert result["sf_f1"] < 50 and result["sf_cer"] > 60


def test_symbols_are_characters_and_marks():
    task = SlotFilling("text")
    assert read(task, dataset_of(["go to B-city rome , e-mail it E-city & eat"])) == [
        "GO TO B-city ROME EMAIL IT E-city AND EAT"
    ]
    assert task.split("GO B-city RO ME E-city B-a X E-a") == [
        *"GO ",
        "B-city",
        *"RO ME",
        "E-city",
        " ",
        "B-a",
        "X",
        "E-a",
    ]
    assert task.symbols[0] == "<blank>" and {"B-city", "E-city", " ", "R"} < set(task.symbols)
    assert not any(len(symbol) > 1 for symbol in set(task.symbols) - {"<blank>", "B-city", "E-city"})
    symbols = [symbol for symbol in task.split("GO B-city ROMMEE E-city") for _ in range(2)]
    best = [task.indices[symbol] for symbol in symbols]
    assert task.decode(np.array(best)) == "GO B-city ROME E-city"  # repetitions are one
    best = [index for symbol in symbols[::2] for index in (task.indices[symbol], 0)]
    assert task.decode(np.array([*best, -100])) == "GO B-city ROMMEE E-city"


@pytest.mark.parametrize(
    "text, tags, expected",
    [
        ("wake me at six thirty .", "O O O time time O", "WAKE ME AT B-time SIX THIRTY E-time"),
        ("from rome to oslo", ["O", "city", "O", "city"], "FROM B-city ROME E-city TO B-city OSLO E-city"),
        ("rome oslo now", "B-city B-city O", "B-city ROME E-city B-city OSLO E-city NOW"),
        ("new york", "B-city I-city", "B-city NEW YORK E-city"),
        ("six rome", "time city", "B-time SIX E-time B-city ROME E-city"),
        ("rome , oslo", "city O city", "B-city ROME E-city B-city OSLO E-city"),
        ("rome , oslo", "city city city", "B-city ROME OSLO E-city"),
        ("send the e-mail to b-side ! ann", "O O O O name name name", "SEND THE EMAIL TO B-name BSIDE ANN E-name"),
    ],
)
def test_tags_of_words_become_marks(text, tags, expected):
    assert read(SlotFilling("text", "iob"), dataset_of([text], iob=[tags])) == [expected]


@pytest.mark.parametrize(
    "text, message",
    [
        ("TO ROME E-city", "Row 1 of the train set: `E-city` ends a slot, but none began"),
        ("TO B-city ROME", "Row 1 of the train set: the slot `city` has no end, `E-city`"),
        ("B-city NEW B-part YORK E-part E-city", "`B-part` begins a slot within another, `city`"),
        ("B-city ROME E-town", "`E-town` ends a slot, but the slot that began is `city`"),
        ("GO B-city . E-city", "`city` contains no word"),
        ("", "Row 1 of the train set has no text"),
        (None, "Row 1 of the train set has no text"),
        ("?", "Row 1 of the train set has no text"),
    ],
)
def test_malformed_texts_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        read(SlotFilling("text"), dataset_of(["GO B-city ROME E-city", text]))


def test_other_bad_columns_are_named():
    with pytest.raises(ValueError, match="Row 0 of the train set: it has 2 words, but 1 tags"):
        read(SlotFilling("text", "iob"), dataset_of(["GO ON"], iob=["O"]))
    with pytest.raises(ValueError, match="Row 0 .* 2 words, but 0 tags"):
        read(SlotFilling("text", "iob"), dataset_of(["GO ON", "GO"], iob=[None, "O"]))
    with pytest.raises(ValueError, match="no column `iob`"):
        read(SlotFilling("text", "iob"), dataset_of(["GO"]))
    with pytest.raises(ValueError, match="The train set has no slot in `text`"):
        read(SlotFilling("text"), dataset_of(["GO", "STOP"]))


def test_registry_takes_tags_where_there_are_some():
    task = registry.load_task("sf", dataset_of(["a"], iob=["O"]), lstm_size=8)
    assert (task.column, task.tags, task.lstm_size, task.metric, task.greater_is_better) == (
        "text",
        "iob",
        8,
        "sf_f1",
        True,
    )
    assert registry.load_task("sf", dataset_of(["a"])).tags is None
    assert registry.load_task("sf", dataset_of(["a"])).lstm_size == 1024


def test_example_measures_slot_filling(tmp_path, tmp_path_factory, monkeypatch):
    import run_superb

    isolate(tmp_path_factory, monkeypatch)
    tiny_teacher().save_pretrained(save_feature_extractor(tmp_path / "teacher"))
    for split in ("train", "validation", "test"):
        rows = [{"file_name": f"{row}.wav", "text": text} for row, text in enumerate(draw_texts(6, seed=0))]
        for row in rows:
            write_clip(tmp_path / "data" / split / row["file_name"], list(range(1, 30)))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / split / "metadata.jsonl").write_text(lines, encoding="utf-8")
    settings = {
        "task": "sf",
        "model": tmp_path / "teacher",
        "dataset_name": tmp_path / "data",
        "validation_split": "validation",
        "lstm_size": 8,
        "learning_rates": 1e-3,
        "cache_dir": tmp_path / "cache",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "use_cpu": True,
    }
    status, _, errors = run_main(run_superb, settings)
    assert (status, errors) == (0, [])
    results = json.loads((tmp_path / "out" / "teacher" / "all_results.json").read_text(encoding="utf-8"))
    assert results["sf"]["scores"].keys() == {"sf_f1", "sf_cer"}
    assert 0 <= results["sf"]["scores"]["sf_f1"] <= 100
    assert len(results["sf"]["runs"]["test"]["layer_weights"]) == 4
