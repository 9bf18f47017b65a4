"""`examples/finetune_ctc.py` on a handful of the demo's utterances."""

import importlib.util
import json
import re
import subprocess
import sys
import unicodedata

import datasets
import jiwer
import pytest
import soundfile
import torch
from conftest import STUDENT_CODE
from example_helpers import DEMO, command_line, copy_clips, isolate, read_metadata, run_main, save_student
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCTC, AutoProcessor, Wav2Vec2CTCTokenizer, Wav2Vec2Processor, pipeline


SPEECH = DEMO / "audio"

import example_utils  # noqa: E402
import finetune_ctc  # noqa: E402


SHORT = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    isolate(tmp_path_factory, monkeypatch)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with a `student` and the shortest utterances: four in `speech/train`, two in `speech/test`."""
    folder = tmp_path_factory.mktemp("ctc")
    save_student(folder / "student")
    for split, target, number in (("train", "train", 4), ("heldout", "test", 2)):
        rows = read_metadata(SPEECH / split)
        rows.sort(key=lambda row: soundfile.info(SPEECH / split / row["file_name"]).frames)
        copy_clips(SPEECH / split, folder / "speech" / target, rows[:number])
    return folder


def settings_of(shared, output_dir, **settings) -> dict:
    own = {"model": shared / "student", "dataset_name": shared / "speech", "output_dir": output_dir}
    return SHORT | own | settings


def prepare(settings):
    kinds = (finetune_ctc.CTCModelArguments, finetune_ctc.CTCDataArguments, finetune_ctc.CTCTrainingArguments)
    return finetune_ctc.prepare(*example_utils.parse(command_line(settings), kinds))[0]


@pytest.fixture(scope="module")
def finished(shared):
    """Output folder and printed lines of a short run."""
    output_dir = shared / "finished"
    status, lines, _ = run_main(finetune_ctc, settings_of(shared, output_dir))
    assert status == 0
    return output_dir, lines


def clip_of(shared, row: int = 0):
    audio, rate = soundfile.read(
        shared / "speech" / "test" / read_metadata(shared / "speech" / "test")[row]["file_name"], dtype="float32"
    )
    assert rate == 16_000
    return audio


# ------------------------------------------------------------------------------------------------------ what it leaves
def test_output_dir_holds_model_and_processor(finished):
    output_dir, _ = finished
    assert {path.name for path in output_dir.iterdir()} >= {
        "all_results.json",
        "config.json",
        "model.safetensors",
        *STUDENT_CODE,
        "preprocessor_config.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    assert isinstance(AutoProcessor.from_pretrained(output_dir), Wav2Vec2Processor)
    model = AutoModelForCTC.from_pretrained(output_dir)
    vocabulary = json.loads((output_dir / "vocab.json").read_text())
    assert model.lm_head.out_features == len(vocabulary) == model.config.vocab_size
    assert vocabulary[finetune_ctc.PAD] == model.config.pad_token_id == 0
    assert model.config.ctc_zero_infinity


def test_the_pipeline_writes_what_the_script_printed(shared, finished):
    output_dir, lines = finished
    recognizer = pipeline("automatic-speech-recognition", model=str(output_dir))
    heard = [recognizer(clip_of(shared, row))["text"] for row in range(2)]
    assert lines[-1] == f"pipeline(model={str(output_dir)!r}): {{'text': {heard[0]!r}}}"
    said = [row["text"] for row in read_metadata(shared / "speech" / "test")]
    pairs = zip(said, heard, strict=True)
    assert lines[-6:-2] == [line for pair in pairs for line in (f"said:  {pair[0]}", f"heard: {pair[1]}")]
    results = json.loads((output_dir / "all_results.json").read_text())
    assert results["character_error_rate"] == pytest.approx(jiwer.cer(said, heard))
    assert results["word_error_rate"] == pytest.approx(jiwer.wer(said, heard))


def test_encoder_and_head_train_and_the_convolutions_do_not(shared, finished):
    before = load_file(shared / "student" / "model.safetensors")
    after = load_file(finished[0] / "model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[f"wavlm.{name}"])}
    assert {name for name in before if name.startswith("encoder.")} <= changed
    assert not any(name.startswith("feature_extractor.") for name in changed)


@pytest.mark.nightly
def test_one_clip_is_learnt_by_heart(shared, tmp_path):
    """The whole way from text to labels, loss and back to text: it must be able to reach no error at all."""
    rows = [row | {"text": "ONE TWO, three"} for row in read_metadata(shared / "speech" / "train")[:1]]
    for split in ("train", "test"):
        copy_clips(shared / "speech" / "train", tmp_path / "data" / split, rows)
    short = {
        "max_steps": 300,
        "learning_rate": 3e-3,
        "mask_time_prob": 0,
        "logging_steps": 100,
        "per_device_train_batch_size": 1,
    }
    settings = settings_of(shared, tmp_path / "out", dataset_name=tmp_path / "data", **short)
    status, lines, _ = run_main(finetune_ctc, settings)
    assert status == 0
    assert lines[-1].endswith("{'text': 'ONE TWO THREE'}")
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["word_error_rate"] == 0


def test_lora_leaves_an_ordinary_model(shared, tmp_path):
    assert (
        run_main(finetune_ctc, settings_of(shared, tmp_path, lora=True, lora_modules=["q_proj", "out_proj"]))[0] == 0
    )
    before = load_file(shared / "student" / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert {name for name, tensor in before.items() if not torch.equal(tensor, after[f"wavlm.{name}"])} == {
        "encoder.layers.0.attention.q_proj.weight",
        "encoder.layers.0.attention.out_proj.weight",
    }
    assert set(after) == {f"wavlm.{name}" for name in before} | {"lm_head.weight", "lm_head.bias"}


def test_it_loads_without_this_package(shared, finished):
    code = (
        "import sys; sys.modules['skill_hf'] = None\n"
        "from transformers import AutoModelForCTC, AutoProcessor\n"
        f"model = AutoModelForCTC.from_pretrained({str(finished[0])!r}, trust_remote_code=True)\n"
        f"AutoProcessor.from_pretrained({str(finished[0])!r})\n"
        "print(type(model).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == "WavLMSkillStudentForCTC"


# --------------------------------------------------------------------------------------------------------- the details
@pytest.mark.parametrize(
    "text, normalised",
    [
        ("Don't  stop—me now!", "DON'T STOP ME NOW"),
        ("it’s snake_case, 42", "IT'S SNAKE CASE 42"),
        ("Größe, naïve", "GRÖSSE NAÏVE"),
        (" . ", ""),
        (None, ""),
        ("rock 'n' roll ' dogs' 'tis", "ROCK 'N' ROLL DOGS' 'TIS"),
        ("‘single’ “double” «angles» 100% $5 + 3 = a|b", "SINGLE' DOUBLE ANGLES 100 5 3 A B"),
        ("मैं हिन्दी बोलता हूँ।", "मैं हिन्दी बोलता हूँ"),
        ("ฉันกำลังพูดภาษาไทย", "ฉันกำลังพูดภาษาไทย"),
        ("ຂ້ອຍກຳລັງເວົ້າ", "ຂ້ອຍກຳລັງເວົ້າ"),
        ("مُحَمَّدٌ، كَتَبَ؟", "مُحَمَّدٌ كَتَبَ"),
        ("שָׁלוֹם, עוֹלָם!", unicodedata.normalize("NFC", "שָׁלוֹם עוֹלָם")),
        ("Tiếng Việt.", "TIẾNG VIỆT"),
        (unicodedata.normalize("NFD", "Tiếng Việt."), "TIẾNG VIỆT"),
        (unicodedata.normalize("NFD", "한국어!"), "한국어"),
        ("日本語、テスト。", "日本語 テスト"),
        ("தமிழ் ខ្មែរ བོད་ཡིག", "தமிழ் ខ្មែរ བོད ཡིག"),
        ("می\u200cخواهم \u200c.", "می\u200cخواهم"),
        ("ක්\u200dරියා", "ක්\u200dරියා"),
        ("п'ять пʼять п’ять", "П'ЯТЬ П'ЯТЬ П'ЯТЬ"),
        ("❤️ love 👩\u200d👩\u200d👧 👍🏽 you 1️⃣ 🇩🇪", "LOVE YOU 1"),
        ("\u0301 x \ufeffa\u00adb\u200fc\td\ne", "X ABC D E"),
        ("´a` ¨ ² ½", "A ² ½"),
    ],
)
def test_text_is_capitals_without_punctuation(text, normalised):
    assert finetune_ctc.normalise_text(text) == normalised
    assert finetune_ctc.normalise_text(normalised) == normalised  # nothing is left to do
    if normalised:
        tokenizer = finetune_ctc.make_tokenizer([normalised])
        labels = tokenizer(normalised).input_ids
        assert tokenizer.unk_token_id not in labels
        assert tokenizer.decode(labels, group_tokens=False) == normalised


def test_every_letter_digit_and_mark_stays_and_nothing_else():
    """One character of each category of Unicode between two letters."""
    for code in [*range(0x20, 0x3000), *range(0xA000, 0xD7A4), *range(0x1F000, 0x1FA00)]:
        character = chr(code)
        category = unicodedata.category(character)
        left = finetune_ctc.normalise_text(f"x{character}x")
        if character in "'\u2019\u02bc":
            assert left == "X'X"
        elif category[0] in "PSZ" or category == "Cc":
            assert left == "X X", hex(code)
        elif category == "Cf":
            assert left in ("XX", f"X{character}X"), hex(code)
        elif category[0] in "LNM":
            expected = unicodedata.normalize("NFC", unicodedata.normalize("NFC", f"x{character}x").upper())
            assert left == expected or character == "\u20e3", hex(code)


def test_vocabulary_is_of_the_training_text_and_blank_is_padding(tmp_path):
    finetune_ctc.make_tokenizer(["BAD DAD", "A'A"]).save_pretrained(tmp_path)
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == {"<pad>": 0, "<unk>": 1, "|": 2, "'": 3, "A": 4, "B": 5, "D": 6}
    assert len(tokenizer) == 7 and tokenizer.pad_token_id == 0
    assert tokenizer("BAD DÉ").input_ids == [5, 4, 6, 2, 6, 1]
    assert tokenizer.decode([0, 5, 5, 4, 0, 4, 2, 2, 6, 0]) == "BAA D"


def test_frames_needed_is_where_the_loss_becomes_finite():
    labels = [3, 3, 4, 4, 4, 5]
    needed = finetune_ctc.frames_needed(labels)
    for frames in (needed - 1, needed):
        loss = torch.nn.functional.ctc_loss(
            torch.zeros(frames, 1, 6).log_softmax(-1), torch.tensor([labels]), [frames], [len(labels)]
        )
        assert torch.isfinite(loss) == (frames == needed)


def test_labels_are_padded_where_the_loss_does_not_look(shared, tmp_path):
    trainer = prepare(settings_of(shared, tmp_path))
    rows = [trainer.train_dataset[index] for index in range(2)]
    batch = trainer.data_collator(rows)
    lengths = [len(row["labels"]) for row in rows]
    assert lengths[0] != lengths[1]
    assert batch["labels"].shape == (2, max(lengths))
    assert (batch["labels"] != -100).sum(1).tolist() == lengths
    assert batch["attention_mask"].sum(1).tolist() == [row["length"] for row in rows]
    # The batch has the mean of the losses that the clips have alone.
    model = trainer.model.eval()
    with torch.no_grad():
        together = model(**batch).loss
        alone = torch.stack([model(**trainer.data_collator([row])).loss for row in rows])
    torch.testing.assert_close(together, alone.mean(), atol=1e-4, rtol=1e-4)


def test_clips_that_ctc_cannot_align_are_left_out_of_training_alone(shared, tmp_path, caplog):
    for split in ("train", "test"):
        rows = read_metadata(shared / "speech" / split)
        rows[0]["text"] = "ABC " * 500
        rows[1]["text"] = " ?! " if split == "train" else rows[1]["text"]
        copy_clips(shared / "speech" / split, tmp_path / "data" / split, rows)
    trainer = prepare(settings_of(shared, tmp_path / "out", dataset_name=tmp_path / "data"))
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (2, 2)
    assert "Left out 1 of 4 clips: they have no transcript." in caplog.text
    assert "Left out 1 of 3 clips: they have too few frames for their transcripts." in caplog.text


def test_long_clips_are_left_out_of_training_alone(shared, tmp_path):
    rows = read_metadata(shared / "speech" / "train")
    seconds = [soundfile.info(shared / "speech" / "train" / row["file_name"]).duration for row in rows]
    trainer = prepare(settings_of(shared, tmp_path, max_seconds=sorted(seconds)[1]))
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (2, 2)


def test_spec_augment_is_what_was_asked_for_not_the_teacher_s(shared, finished, tmp_path):
    assert AutoConfig.from_pretrained(shared / "student").mask_time_prob == 0.5
    assert AutoConfig.from_pretrained(finished[0]).mask_time_prob == 0.1
    trainer = prepare(settings_of(shared, tmp_path, mask_time_prob=0.3))
    assert trainer.model.config.mask_time_prob == 0.3
    masked = load_file(shared / "student" / "model.safetensors")["masked_spec_embed"]
    torch.testing.assert_close(trainer.model.wavlm.masked_spec_embed.data, masked)


def test_the_default_data_is_the_demo_s(monkeypatch):
    args = finetune_ctc.CTCDataArguments()
    train, test = example_utils.load_splits(args)
    assert (len(train), len(test)) == (118, 26)
    own = finetune_ctc.CTCDataArguments(dataset_name="other", test_split="test.clean")
    assert (own.dataset_name, own.test_dataset_name, own.test_split) == ("other", None, "test.clean")


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model": "no/such-directory/x"}, "The model `no/such-directory/x` cannot be loaded"),
        ({"text_column": "words"}, "has no column `words`; set `text_column` to one of: audio, speaker"),
        ({"max_seconds": -1}, "`max_seconds` must be a number above 0 and at most 1000000, but is -1.0"),
        ({"max_seconds": 0.5}, "None of the 4 clips can be used: they are longer than 0.5 s"),
        ({"train_split": "validation"}, "has no split `validation`"),
        ({"lora": True, "lora_modules": ["nothing"]}, "Target modules .*nothing.* not found"),
    ],
)
def test_bad_input_is_one_line_before_training(shared, tmp_path, settings, message):
    status, _, errors = run_main(finetune_ctc, settings_of(shared, tmp_path, **settings))
    assert status == 2
    assert len(errors) == 1 and re.search(message, errors[0]), errors


def test_without_any_transcript_it_says_so(shared, tmp_path):
    dataset = datasets.Dataset.from_dict({"audio": ["a.wav", "b.wav"], "text": [None, "..."]})
    with pytest.raises(ValueError, match="None of the 2 clips can be used: they have no transcript"):
        finetune_ctc.with_transcripts(dataset, "text")


def test_without_jiwer_it_says_what_to_install(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, errors = run_main(finetune_ctc, settings_of(shared, tmp_path))
    assert status == 2 and errors == ["error: The error rates need jiwer, which is not installed: pip install jiwer."]
