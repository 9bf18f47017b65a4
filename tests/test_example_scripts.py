"""Example scripts on outputs that can't be written, sources in the way, broken folders: one line, nothing done."""

import hashlib
import sys

import pytest
import soundfile
import torch
from conftest import tiny_teacher
from example_helpers import DEMO, EXAMPLES, isolate, read_metadata, run_main, save_feature_extractor, save_student

from skill_hf.cli import export
from skill_hf.data import read_audio


sys.path.insert(0, str(EXAMPLES / "study"))

import calibrate_latency  # noqa: E402
import draw_study  # noqa: E402
import export_student  # noqa: E402
import extract_hidden_states  # noqa: E402
import finetune_ctc  # noqa: E402
import finetune_keyword_spotting  # noqa: E402
import pretrain_teacher  # noqa: E402
import probe_teacher  # noqa: E402
import run_study  # noqa: E402
import run_superb  # noqa: E402
import select_audio  # noqa: E402
import select_keywords  # noqa: E402


SCRIPTS = {
    module.__name__: module
    for module in (
        calibrate_latency,
        draw_study,
        export_student,
        extract_hidden_states,
        finetune_ctc,
        finetune_keyword_spotting,
        pretrain_teacher,
        probe_teacher,
        run_study,
        run_superb,
        select_audio,
        select_keywords,
    )
}


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    isolate(tmp_path_factory, monkeypatch)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A `student`, a stock `teacher` with a CTC head's config, and a folder of speech with metadata."""
    folder = tmp_path_factory.mktemp("scripts")
    save_student(folder / "student")
    tiny_teacher(num_hidden_layers=1).save_pretrained(folder / "teacher")
    save_feature_extractor(folder / "teacher")
    (folder / "speech").mkdir()
    samples = read_audio(DEMO / "audio" / "heldout" / read_metadata(DEMO / "audio" / "heldout")[0]["file_name"])
    for index in range(3):
        soundfile.write(folder / "speech" / f"{index}.wav", samples[8000 * index :][:8000], 16_000)
    (folder / "speech" / "metadata.csv").write_text(
        "file_name,speaker,chapter,text,label\n" + "".join(f"{index}.wav,{index},1,GO,go\n" for index in range(3))
    )
    return folder


def checksums(root) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def refused(script: str, settings: dict, message: str) -> None:
    status, lines, errors = run_main(SCRIPTS[script], settings)
    assert (status, lines, len(errors)) == (2, [], 1), errors
    assert message in errors[0], errors[0]


# Script -> the option that names its output, and what it needs besides.
OUTPUTS = {
    "calibrate_latency": ("output", {}),
    "export_student": ("output_dir", {"model": "{shared}/student"}),
    "extract_hidden_states": ("output_dir", {"model": "{shared}/student", "audio_dir": "{shared}/speech"}),
    "finetune_ctc": ("output_dir", {"model": "{shared}/student"}),
    "finetune_keyword_spotting": ("output_dir", {"model": "{shared}/student"}),
    "pretrain_teacher": ("output_dir", {"librispeech": "{shared}/speech", "speech_commands": "{shared}/speech"}),
    "probe_teacher": ("output", {"librispeech": "{shared}/speech", "speech_commands": "{shared}/speech"}),
    "run_study": ("results", {"librispeech": "{shared}/speech", "speech_commands": "{shared}/speech"}),
    "run_superb": ("output_dir", {"model": "{shared}/student"}),
    "select_audio": ("output", {"source": "{shared}/speech"}),
    "select_keywords": ("output", {"source": "{shared}/speech"}),
}


def filled(settings: dict, **places) -> dict:
    return {name: str(value).format(**places) for name, value in settings.items()}


@pytest.mark.parametrize("script", OUTPUTS)
def test_an_output_that_cannot_be_written_is_found_first(shared, tmp_path, monkeypatch, script):
    def computed(*args, **kwargs):
        raise AssertionError("something was computed before the output was tried")

    for module, name in (
        (calibrate_latency, "fit_latency"),
        (export, "load_student"),
        (extract_hidden_states, "load_clips"),
        (finetune_ctc, "load_splits"),
        (finetune_keyword_spotting, "load_splits"),
        (pretrain_teacher, "training_utterances"),
        (probe_teacher, "word_task"),
        (run_study, "speech_to_distil"),
        (run_superb, "load_encoder"),
        (select_audio, "read_metadata"),
        (select_keywords, "read_metadata"),
    ):
        monkeypatch.setattr(module, name, computed)
    (tmp_path / "file").write_text("kept")
    option, settings = OUTPUTS[script]
    settings = filled(settings, shared=shared)
    for path in ("file/out", "file/deep/out", "n" * 300):
        refused(script, {**settings, option: tmp_path / path}, "cannot be written to (")
    assert checksums(tmp_path) == {"file": hashlib.sha256(b"kept").hexdigest()}


@pytest.mark.parametrize("script", ["export_student", "finetune_ctc", "finetune_keyword_spotting"])
def test_the_model_is_not_overwritten(shared, tmp_path, script):
    (tmp_path / "link").symlink_to(shared / "student")
    before = checksums(shared / "student")
    for model, output in (
        ("{shared}/student", "{shared}/student"),
        ("{shared}/student", "{shared}/./student/"),
        ("{shared}/student", "{shared}/teacher/../student"),
        ("{shared}/student", "{tmp}/link"),
        ("{tmp}/link", "{shared}/student"),
    ):
        settings = filled({"model": model, "output_dir": output}, shared=shared, tmp=tmp_path)
        refused(script, settings, "is the `model`")
    assert checksums(shared / "student") == before


@pytest.mark.parametrize("script", ["finetune_ctc", "finetune_keyword_spotting"])
def test_another_model_is_not_overwritten(shared, script):
    before = checksums(shared)
    settings = {"model": shared / "student", "output_dir": shared / "teacher"}
    refused(script, settings, "contains another model (['WavLMModel']), which would be overwritten; choose another")
    settings = {"model": shared / "student", "output_dir": shared / "speech", "dataset_name": shared / "speech"}
    refused(script, settings, "is the `dataset_name`")
    assert checksums(shared) == before


def test_the_network_to_grow_from_is_not_overwritten(shared, tmp_path):
    before = checksums(shared)
    settings = filled(OUTPUTS["pretrain_teacher"][1], shared=shared)
    for name, output in (
        ("init_from", shared / "teacher"),
        ("librispeech", shared / "speech"),
    ):
        sources = {**settings, "init_from": shared / "teacher"}
        refused("pretrain_teacher", {**sources, "output_dir": output}, f"is the `{name}`")
    (tmp_path / "model").symlink_to(shared / "teacher")
    sources = {**settings, "init_from": shared / "teacher", "output_dir": tmp_path}
    refused("pretrain_teacher", sources, "is the `init_from`")
    assert checksums(shared) == before


# ------------------------------------------------------------------------------------------------- folders with tables
HEADER = "file_name,speaker,chapter,text,label\n"
ROW = "0.wav,1,1,GO,go\n"
# What is wrong -> content of metadata.csv, or `None`, and what is said.
TABLES = {
    "no table": (None, "has no metadata.csv; pass the directory that contains it"),
    "empty": ("", "has no column file_name"),
    "no rows": (HEADER, "has no rows"),
    "another table": ("path,who\n0.wav,1\n", "has no column file_name and no column speaker"),
    "UTF-16": ((HEADER + ROW).encode("utf-16"), "is not a CSV file in UTF-8"),
    "a short row": (HEADER + "0.wav\n", "Row 1 of {path} lacks a value; it needs file_name, speaker"),
    "no name": (HEADER + ",1,1,GO,go\n", "Row 1 of {path} lacks a value"),
    "a name outside": (HEADER + "../0.wav,1,1,GO,go\n", "names '../0.wav', which is not in the directory"),
    "an absolute name": (HEADER + "/etc/passwd,1,1,GO,go\n", "names '/etc/passwd', which is not in the directory"),
    "no such file": (HEADER + "1.wav,1,1,GO,go\n", "1.wav does not exist; correct its name"),
    "no audio": (HEADER + "text.wav,1,1,GO,go\n", "text.wav cannot be read as audio"),
    "another rate": (HEADER + "8k.wav,1,1,GO,go\n", "8k.wav must be mono at 16000 Hz, but has 1 channel(s) at 8000"),
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("script", ["pretrain_teacher", "select_audio", "probe_teacher"])
def test_a_broken_folder_of_speech(shared, tmp_path, monkeypatch, script, case):
    content, message = TABLES[case]
    source = tmp_path / "source"
    source.mkdir()
    if content is not None:
        (source / "metadata.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    soundfile.write(source / "0.wav", torch.zeros(800).numpy(), 16_000)
    soundfile.write(source / "8k.wav", torch.zeros(800).numpy(), 8000)
    (source / "text.wav").write_text("this is no audio")
    if script == "probe_teacher":
        # All clips are to be probed.
        monkeypatch.setattr(probe_teacher, "heldout_split", lambda *args: "speakers")
        monkeypatch.setattr(probe_teacher, "check_folds", lambda *args: None)
    settings = {
        "pretrain_teacher": {"librispeech": source, "speech_commands": source, "output_dir": tmp_path / "out"},
        "select_audio": {"source": source, "output": tmp_path / "out"},
        "probe_teacher": {
            "librispeech": source,
            "speech_commands": source,
            "output": tmp_path / "out.json",
            "teacher": shared / "teacher",
            "untrained_seeds": 1,
        },
    }[script]
    refused(script, settings, message.replace("{path}", str(source / "metadata.csv")))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_what_was_selected_before_stays(shared, tmp_path):
    (tmp_path / "train").mkdir()
    for script in ("select_audio", "select_keywords"):
        refused(
            script, {"source": shared / "speech", "output": tmp_path}, "already exists; remove it, or choose another"
        )
    refused("select_keywords", {"source": shared / "speech", "output": tmp_path / "out"}, "There are fewer than 40")
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("references.wavlm.json", "{", "references.wavlm.json is not a readable JSON file"),
        ("students.0.jsonl", "[1]\n", "students.0.jsonl has a line that is not a student of the study: [1]"),
        (
            "students.1.jsonl",
            '{"sparsity": 0.5}\n',
            "students.1.jsonl has a line that is not a student of",
        ),
    ],
)
def test_results_of_a_study_that_are_none(tmp_path, name, content, message):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / name).write_text(content)
    (tmp_path / "page.md").write_text("text")
    settings = {"results": tmp_path / "results", "page": tmp_path / "page.md", "figures": tmp_path / "figures"}
    refused("draw_study", settings, message)
    refused("draw_study", settings | {"results": tmp_path / "none"}, "There is no directory")
    refused("draw_study", settings | {"page": tmp_path / "none.md"}, "There is no page")
    assert (tmp_path / "page.md").read_text() == "text" and not (tmp_path / "figures").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"ks": 1}', "\0"])
def test_results_of_superb_that_are_none(shared, tmp_path, content):
    (tmp_path / "student").mkdir()
    path = tmp_path / "student" / "all_results.json"
    path.write_text(content)
    status, _, errors = run_main(run_superb, {"model": shared / "student", "output_dir": tmp_path})
    assert status == 2 and len(errors) == 1 and str(path) in errors[0]
    assert path.read_text() == content


# ------------------------------------------------------------------------------------------------- trainings that fail
SHORT = {
    "max_steps": 3,
    "warmup_steps": 0,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.mark.parametrize(
    "settings", [{"learning_rate": 1e30, "max_grad_norm": 0}, {"learning_rate": 1e38, "max_steps": 1}]
)
def test_a_training_that_diverges_saves_nothing(shared, tmp_path, settings):
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    (output_dir / "model.safetensors").write_text("before")
    data = {"dataset_name": shared / "speech", "test_split": "train", "output_dir": output_dir}
    settings = {**SHORT, "model": shared / "student", **data, **settings, "save_strategy": "steps", "save_steps": 1}
    status, _, errors = run_main(finetune_keyword_spotting, settings | {"label_column": "speaker"})
    assert status == 2 and len(errors) == 1
    assert "Lower `learning_rate`, which is 1e+3" in errors[0] and "nan" in errors[0].lower()
    assert (output_dir / "model.safetensors").read_text() == "before" and not (output_dir / "config.json").exists()
    # A checkpoint of the first step, whose loss was finite, at most.
    assert {checkpoint.name for checkpoint in output_dir.glob("checkpoint-*")} <= {"checkpoint-1"}


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("True", "There is no checkpoint to resume from in `output_dir`"),
        ("{tmp}", "is not a checkpoint, since it has no trainer_state.json"),
        ("{tmp}/none", "is not a checkpoint, since it has no trainer_state.json"),
        ("{tmp}/broken", "broken cannot be resumed: "),
    ],
)
def test_a_checkpoint_that_is_none(shared, tmp_path, resume, message):
    (tmp_path / "broken").mkdir()
    for name in ("trainer_state.json", "model.safetensors"):
        (tmp_path / "broken" / name).write_text("{")
    data = {"dataset_name": shared / "speech", "test_split": "train", "label_column": "speaker"}
    settings = {**SHORT, "model": shared / "student", **data, "output_dir": tmp_path / "out"}
    settings["resume_from_checkpoint"] = resume.format(tmp=tmp_path)
    status, _, errors = run_main(finetune_keyword_spotting, settings)
    assert status == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))
