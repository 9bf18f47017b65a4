"""`skill-hf distill` on synthetic audio and a tiny random teacher: all ways in, what it writes, bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import STUDENT_CODE, tiny_config, tiny_teacher
from safetensors.torch import load_file
from short_distillation import command_line, on_folder, results_of, write_inputs
from transformers import AutoModel, BertConfig, Data2VecAudioConfig, WavLMConfig

from skill_hf.cli import distill
from skill_hf.compression.macs import count_macs
from skill_hf.models.loading import load_config


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "demo")]

import demo_comparison  # noqa: E402
import run_skill  # noqa: E402


RATE = 16_000
STUDENT_FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    *STUDENT_CODE,
    "preprocessor_config.json",
    "skill_config.json",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("shared"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def finished(shared):
    """The output of a run with everything: held-out audio, an unreadable file, checkpoints."""
    output_dir = shared / "finished"
    shutil.copytree(shared / "audio", shared / "audio_and_text")
    (shared / "audio_and_text" / "text.wav").write_text("this is no audio")
    settings = on_folder(
        shared,
        output_dir,
        audio_dir=str(shared / "audio_and_text"),
        eval_audio_dir=str(shared / "heldout"),
        max_eval_samples=50,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=3,
    )
    assert distill.main(command_line(settings)) == 0
    return output_dir


# ------------------------------------------------------------------------------------------------------ what it writes
def test_output_dir_holds_student_figures_card_and_results(finished):
    files = {path.name for path in finished.iterdir() if path.is_file()}
    figures = {"layer_similarity.png", "layer_distances.png", "architecture.png", "training.png"}
    assert files >= STUDENT_FILES | figures | {"all_results.json", "trainer_state.json"}
    for name in figures:
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in finished.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_results_say_what_was_done(finished):
    results = results_of(finished)
    assert results["teacher"].endswith("teacher")
    assert results["teacher_parameters"] == tiny_teacher(num_hidden_layers=2).num_parameters()
    saved = sum(tensor.numel() for tensor in load_file(finished / "model.safetensors").values())
    assert results["student_parameters"] == saved
    assert results["sparsity"] == pytest.approx(1 - saved / results["teacher_parameters"])
    assert results["sparsity"] == pytest.approx(results["target_sparsity"], abs=0.02)
    assert results["target_sparsity"] == 0.3
    assert results["budget"] == "parameters"
    assert sorted(sum(results["layer_groups"], [])) == [0, 1, 2]
    assert results["eval_distillation_loss"] == pytest.approx(results["eval_l1_loss"] + results["eval_cosine_loss"])
    assert set(results["seconds"]) == {"set_up", "calibration_and_cut", "stage_1", "stage_2", "evaluation"}
    assert all(seconds > 0 for seconds in results["seconds"].values())


def test_results_of_another_budget(shared, tmp_path):
    assert distill.main(command_line(on_folder(shared, tmp_path / "out", budget="macs", budget_seconds=2.0))) == 0
    results = results_of(tmp_path / "out")
    assert results["budget"] == "macs"
    assert results["teacher_macs"] == count_macs(tiny_teacher(num_hidden_layers=2), 2.0)
    assert results["student_macs"] == count_macs(AutoModel.from_pretrained(tmp_path / "out"), 2.0)
    assert results["sparsity"] == 1 - results["student_macs"] / results["teacher_macs"]
    assert results["sparsity"] == pytest.approx(0.3, abs=0.005)
    assert results["teacher_parameters"] == tiny_teacher(num_hidden_layers=2).num_parameters()
    assert results["student_parameters"] < results["teacher_parameters"]


def test_saved_directory_loads_and_runs(finished):
    student = AutoModel.from_pretrained(finished).eval()
    assert type(student).__name__ == "WavLMForSkillStudent"
    assert student.num_parameters() == results_of(finished)["student_parameters"]
    with torch.no_grad():
        output = student(torch.randn(1, RATE), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.isfinite(output.last_hidden_state).all()


def test_check_of_the_saved_student_notices_other_weights(finished, tmp_path):
    class Trained:
        model = AutoModel.from_pretrained(finished).eval()
        args = type("Arguments", (), {"output_dir": str(finished)})

    distill.check_saved_student(Trained)
    with torch.no_grad():
        Trained.model.encoder.layers[1].final_layer_norm.bias[0] += 0.01
    with pytest.raises(RuntimeError, match="differs from the trained one by 0.01"):
        distill.check_saved_student(Trained)
    Trained.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(RuntimeError, match="lacks extra"):
        distill.check_saved_student(Trained)


# --------------------------------------------------------------------------------------------------------- the ways in
@pytest.mark.parametrize(
    ("form", "streaming"),
    [
        ("csv", True),
        ("parquet", False),
        pytest.param("csv", False, marks=pytest.mark.nightly),
        pytest.param("parquet", True, marks=pytest.mark.nightly),
    ],
)
def test_datasets_in_memory_and_streaming(shared, tmp_path, form, streaming):
    corpus = tmp_path / "corpus"
    for split, folder in (("train", "audio"), ("test", "heldout")):
        paths = sorted(str(path) for path in (shared / folder).iterdir())
        table = datasets.Dataset.from_dict({"audio": paths, "speaker": ["a"] * len(paths)})
        corpus.mkdir(exist_ok=True)
        getattr(table, f"to_{form}")(str(corpus / f"{split}.{form}"))
    settings = on_folder(
        shared,
        tmp_path / "out",
        audio_dir=None,
        dataset_name=str(corpus),
        eval_split="test",
        streaming=streaming,
        max_eval_samples=2,
    )
    if form == "csv":
        settings |= {"per_device_train_batch_size": None, "seconds_per_batch": 1.5, "shuffle_buffer": 4}
    assert distill.main(command_line(settings)) == 0
    results = results_of(tmp_path / "out")
    assert results["sparsity"] == pytest.approx(0.3, abs=0.02)
    assert np.isfinite(results["eval_distillation_loss"])


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_one_file_of_settings_is_the_same_as_the_command_line(shared, tmp_path, suffix):
    settings = on_folder(shared, tmp_path / "out", layer_groups=[[0, 1], [2]], pruning_units=["ffn_dims"])
    settings |= {"target_sparsity": 0.05}
    file = tmp_path / f"recipe{suffix}"
    # PyYAML reads 1e-3 as text.
    text = json.dumps(settings, indent=1) if suffix == ".json" else yaml.safe_dump(settings).replace("0.001", "1e-3")
    assert suffix == ".json" or "learning_rate: 1e-3" in text
    file.write_text(text)
    assert distill.parse([str(file)]) == distill.parse(command_line(settings))


def test_groups_set_by_hand_have_no_similarity_to_show(shared, tmp_path):
    settings = on_folder(shared, tmp_path / "out", layer_groups=[[0], [2]], logging_steps=50)
    assert distill.main(command_line(settings)) == 0
    assert results_of(tmp_path / "out")["layer_groups"] == [[0], [2]]
    assert (tmp_path / "out" / "architecture.png").is_file()
    assert not (tmp_path / "out" / "layer_similarity.png").exists()
    assert not (tmp_path / "out" / "training.png").exists()  # no line was logged


def test_start_from_another_student(shared, finished, tmp_path):
    settings = on_folder(shared, tmp_path / "out", student_name_or_path=str(finished), target_sparsity=0.5)
    assert distill.main(command_line(settings)) == 0
    before, after = (json.loads((path / "config.json").read_text()) for path in (finished, tmp_path / "out"))
    for old, new in zip(before["remaining_heads"], after["remaining_heads"], strict=True):
        assert set(new) <= set(old)
    assert results_of(tmp_path / "out")["sparsity"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("step", [2, 4])
def test_resumed_run_ends_with_the_same_weights(shared, finished, tmp_path, step):
    output_dir = tmp_path / "out"
    shutil.copytree(finished / f"checkpoint-{step}", output_dir / f"checkpoint-{step}")
    settings = on_folder(
        shared,
        output_dir,
        audio_dir=str(shared / "audio_and_text"),
        save_strategy="steps",
        save_steps=2,
        resume_from_checkpoint=True,
    )
    assert distill.main(command_line(settings)) == 0
    assert (output_dir / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert ("stage_1" in results_of(output_dir)["seconds"]) == (step == 2)


def test_error_in_the_loop_keeps_its_traceback(shared, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(distill.SkillDistillationTrainer, "training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        distill.main(command_line(on_folder(shared, tmp_path / "out")))


# ----------------------------------------------------------------------------------------------------------- bad input
def save_config(directory, config):
    config.save_pretrained(directory)
    return str(directory)


def bad_audio(directory, name, content):
    directory.mkdir()
    if isinstance(content, bytes):
        (directory / name).write_bytes(content)
    else:
        soundfile.write(directory / name, content, RATE, subtype="FLOAT")
    return str(directory)


def text_file(path, text):
    path.write_text(text)
    return [str(path)]


NAN = np.full(RATE, np.nan, np.float32)

# What is wrong -> settings made of a temporary and the shared directory, and words that the message must hold.
BAD = {
    "missing directory": (lambda tmp, _: {"audio_dir": f"{tmp}/none"}, "none` does not exist"),
    "missing held-out directory": (lambda tmp, _: {"eval_audio_dir": f"{tmp}/none"}, "none` does not exist"),
    "no audio in it": (
        lambda tmp, _: {"audio_dir": bad_audio(tmp / "a", "a.txt", b"text")},
        "has no file that ends in",
    ),
    "no audio file": (
        lambda tmp, _: {"audio_dir": bad_audio(tmp / "a", "a.wav", b"text")},
        "cannot be decoded as audio",
    ),
    "empty file": (lambda tmp, _: {"audio_dir": bad_audio(tmp / "a", "a.wav", b"")}, "is empty (0 bytes)"),
    "no samples": (lambda tmp, _: {"audio_dir": bad_audio(tmp / "a", "a.wav", NAN[:0])}, "no samples"),
    "NaN samples": (
        lambda tmp, _: {"audio_dir": bad_audio(tmp / "a", "a.wav", NAN)},
        "contains NaN or infinite samples",
    ),
    "NaN samples, held out": (
        lambda tmp, _: {"eval_audio_dir": bad_audio(tmp / "a", "a.wav", NAN)},
        "contains NaN or infinite samples",
    ),
    "NaN samples, groups by hand": (
        lambda tmp, _: {"audio_dir": bad_audio(tmp / "a", "a.wav", NAN), "layer_groups": [[0], [2]]},
        "contains NaN or infinite samples",
    ),
    "missing dataset": (
        lambda tmp, _: {"audio_dir": None, "dataset_name": f"{tmp}/none"},
        "is not a local directory, cannot be loaded",
    ),
    "no data": (lambda *_: {"audio_dir": None}, "either `dataset_name` or `audio_dir`"),
    "two sets of data": (lambda *_: {"dataset_name": "x"}, "either `dataset_name` or `audio_dir`"),
    "split of a folder": (lambda *_: {"eval_split": "test"}, "`eval_split` is a split of `dataset_name`"),
    "no clips to evaluate": (
        lambda *_: {"max_eval_samples": 0},
        "`max_eval_samples` must be an integer from 1 to",
    ),
    "crop without length": (lambda *_: {"max_seconds": 0.01}, "`max_seconds`"),
    "missing teacher": (
        lambda tmp, _: {"teacher_name_or_path": f"{tmp}/none"},
        "none` cannot be loaded; pass a Hub id or a directory",
    ),
    "another family": (
        lambda tmp, _: {"teacher_name_or_path": save_config(tmp / "t", Data2VecAudioConfig())},
        "is a `data2vec-audio`; teachers and students",
    ),
    "text model": (
        lambda tmp, _: {"teacher_name_or_path": save_config(tmp / "t", BertConfig(num_hidden_layers=1))},
        "is a `bert`; teachers and students",
    ),
    "teacher without weights": (
        lambda tmp, _: {"teacher_name_or_path": save_config(tmp / "t", tiny_config())},
        "model.safetensors",
    ),
    "student of another size": (
        lambda tmp, shared: {"student_name_or_path": other_student(tmp / "s")},
        "`hidden_size` 16, but the teacher has 32",
    ),
    "sparsity 0": (lambda *_: {"target_sparsity": 0}, "`target_sparsity` must be a finite number above 0 and below 1"),
    "sparsity 1": (lambda *_: {"target_sparsity": 1}, "`target_sparsity` must be a finite number above 0 and below 1"),
    "sparsity 1.5": (
        lambda *_: {"target_sparsity": 1.5},
        "`target_sparsity` must be a finite number above 0 and below 1",
    ),
    "unreachable sparsity": (lambda *_: {"target_sparsity": 0.99}, "`target_sparsity` is 0.99, but"),
    "both cuts": (lambda *_: {"num_clusters": 2, "distance_threshold": 0.1}, "`num_clusters` (2) and `distance_thres"),
    "too many clusters": (lambda *_: {"num_clusters": 9}, "`num_clusters` is 9, but the teacher has only 3 layers"),
    "layer 99": (lambda *_: {"layer_groups": [[0], [99]]}, "`layer_groups` names layer 99"),
    "no groups": (lambda *_: {"layer_groups": [[0], [-1]]}, "`layer_groups` must be a list of lists of indices"),
    "another recipe": (
        lambda tmp, shared: {"resume_from_checkpoint": str(shared / "finished" / "checkpoint-2"), "linkage": "single"},
        "belongs to a different recipe: linkage (checkpoint: average, now: single)",
    ),
    "another number of steps": (
        lambda tmp, shared: {"resume_from_checkpoint": str(shared / "finished" / "checkpoint-2"), "max_steps": 9},
        "belongs to a different recipe: steps",
    ),
    "no checkpoint": (
        lambda tmp, shared: {"resume_from_checkpoint": str(shared / "teacher")},
        "is not a complete checkpoint of SkillDistillationTrainer: it has no skill_state.json",
    ),
    "nothing to resume": (lambda *_: {"resume_from_checkpoint": True}, "There is no checkpoint to resume from"),
    "too few steps": (lambda *_: {"final_steps": 7}, "`final_steps` (7) must not exceed"),
    "output is a file": (lambda tmp, shared: {"output_dir": str(shared / "teacher" / "config.json")}, "config.json"),
    "unknown option": (lambda *_: {"target_sparsty": 0.5}, "--target_sparsty"),
    "word for a number": (
        lambda *_: {"max_steps": "many"},
        "`max_steps` must be an integer from -1 to 2147483647, but is 'many'",
    ),
    "missing file of settings": (lambda tmp, _: [f"{tmp}/none.json"], "none.json"),
    "broken JSON": (lambda tmp, _: text_file(tmp / "a.json", "{"), "a.json cannot be read"),
    "broken YAML": (lambda tmp, _: text_file(tmp / "a.yaml", "a: ["), "a.yaml cannot be read"),
    "no settings": (lambda tmp, _: text_file(tmp / "a.json", "[1]"), "must contain a mapping of names to values"),
    "unknown setting": (
        lambda tmp, _: text_file(tmp / "a.json", '{"audio_dir": "x", "targt": 1}'),
        "no setting 'targt'",
    ),
    "list for a number": (
        lambda tmp, _: text_file(tmp / "a.json", '{"audio_dir": "x", "max_seconds": [1]}'),
        "a.json must be a number above 0 and at most 1000000, but is [1]",
    ),
    "word for a number in a file": (
        lambda tmp, _: text_file(tmp / "a.yaml", "max_steps: many"),
        "a.yaml must be an integer from -1 to 2147483647, but is 'many'",
    ),
}


def other_student(directory):
    config = WavLMConfig(**{**tiny_config(num_hidden_layers=2).to_diff_dict(), "hidden_size": 16})
    AutoModel.from_config(config).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_before_training(shared, finished, tmp_path, monkeypatch, capsys, name):
    def trained(*args, **kwargs):
        raise AssertionError("a training step was done")

    monkeypatch.setattr(distill.SkillDistillationTrainer, "training_step", trained)
    make, words = BAD[name]
    changes = make(tmp_path, shared)
    arguments = changes if isinstance(changes, list) else command_line(on_folder(shared, tmp_path / "out", **changes))
    assert distill.main(arguments) == 2
    output = capsys.readouterr()
    (error,) = [line for line in output.err.splitlines() if line.startswith("error")]
    assert error.startswith("error: ") and words in error
    assert "Traceback" not in output.err + output.out
    assert not list(tmp_path.glob("out/checkpoint-*")) and not (tmp_path / "out" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------------------------ the demo
@pytest.mark.parametrize(
    "name, teacher, output", [("wavlm", "teacher", "demo"), ("hubert", "teacher-hubert", "demo-hubert")]
)
def test_settings_of_the_demos(name, teacher, output):
    model_args, data_args, skill_config, training_args = distill.parse(run_skill.demo_arguments(name))[0]
    assert Path(model_args.teacher_name_or_path) == EXAMPLES / "demo" / teacher
    assert load_config(model_args.teacher_name_or_path).model_type == name
    assert Path(data_args.audio_dir).is_dir() and Path(data_args.eval_audio_dir).is_dir()
    assert Path(training_args.output_dir) == EXAMPLES.parent / "outputs" / output
    assert skill_config.target_sparsity == 0.75
    assert training_args.eval_on_start


def test_demo_of_another_name(capsys):
    assert run_skill.main(["--demo", "whisper"]) == 2
    assert capsys.readouterr().err == "error: `--demo` must be one of wavlm, hubert, but is 'whisper'.\n"


@pytest.fixture(scope="module")
def demo(shared):
    """Output folder and printed text of the demo, with the tiny teacher and noise in place of what is shipped."""
    settings = json.loads(run_skill.DEMO_SETTINGS.read_text()) | on_folder(shared, shared / "demo", max_steps=9)
    settings["num_clusters"] = 2  # of three
    file = shared / "demo.json"
    file.write_text(json.dumps(settings | {"eval_audio_dir": str(shared / "heldout")}))
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(run_skill, "DEMO_SETTINGS", file)
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert run_skill.main(["--demo", "wavlm", "--logging_steps", "3"]) == 0
    return shared / "demo", "\n".join(printed)


def test_demo_compares_with_chance_and_with_the_cut(demo):
    output_dir, printed = demo
    results = results_of(output_dir)
    students = results["comparison"]["students"]
    assert list(students) == [
        "SKILL, after the cut, before stage 2",
        "SKILL, both stages",
        "pruned at random, same number of steps",
    ]
    sizes = [student["parameters"] for student in students.values()]
    assert sizes[0] == sizes[1] == results["student_parameters"]
    assert sizes[2] == pytest.approx(sizes[0], rel=0.02)
    losses = [student["eval_distillation_loss"] for student in students.values()]
    assert len(set(losses)) == 3
    assert losses[1] == results["eval_distillation_loss"]
    for name, loss in zip(students, losses, strict=True):
        (line,) = [line for line in printed.splitlines() if line.startswith(name)]
        assert f"{loss:.3f}" in line


def test_demo_shows_the_distance_at_every_layer(demo):
    output_dir, printed = demo
    comparison = results_of(output_dir)["comparison"]
    assert comparison["dphubert_layers"] == [[0], [1], [1], [2]]
    for measure in ("cka", "cosine"):
        distances = comparison["layer_distances"][measure]
        assert {name: len(values) for name, values in distances.items()} == {"SKILL": 3, "DPHuBERT's layers": 3}
        assert distances["SKILL"] != distances["DPHuBERT's layers"]
    assert (output_dir / "layer_distances_compared.png").read_bytes().startswith(b"\x89PNG")
    assert "DPHuBERT's layers" in printed
    assert not (output_dir / "_comparison").exists()


def test_random_pruning_keeps_weights_as_they_are(layout):
    teacher = tiny_teacher(layout)
    units = ["conv_channels", "attention_heads", "ffn_dims"]
    size = round(0.5 * teacher.num_parameters())
    student, other = (demo_comparison.prune_at_random(teacher, units, size, seed) for seed in range(2))
    assert not student.named_gates()
    assert student.num_parameters() == pytest.approx(size, rel=0.02)
    assert student.config.remaining_heads != other.config.remaining_heads
    for kept, whole in zip(student.encoder.layers, teacher.encoder.layers, strict=True):
        columns = {tuple(column.tolist()) for column in whole.feed_forward.output_dense.weight.T}
        assert {tuple(column.tolist()) for column in kept.feed_forward.output_dense.weight.T} < columns
        columns = {tuple(column.tolist()) for column in whole.attention.out_proj.weight.T}
        assert {tuple(column.tolist()) for column in kept.attention.out_proj.weight.T} < columns


# ----------------------------------------------------------------------------------------------------- as a program
def program(*words) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent / "src"), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # NCCL takes one GPU for each process
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_program_ends_with_one_line_and_a_code(tmp_path):
    result = program(str(EXAMPLES / "run_skill.py"), "--audio_dir", f"{tmp_path}/none")
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr


@pytest.mark.nightly
def test_accelerate_launches_the_module(shared, tmp_path):
    settings = on_folder(shared, tmp_path / "out")
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--cpu"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "skill_hf.cli.main", "distill"]
    result = program(*launch, *command_line(settings))
    assert result.returncode == 0, result.stderr[-3000:]
    assert (
        AutoModel.from_pretrained(tmp_path / "out").num_parameters()
        == results_of(tmp_path / "out")["student_parameters"]
    )


@pytest.mark.slow
def test_two_processes_agree_and_save_one_student(shared, tmp_path):
    # Without `use_cpu`: there is no GPU to choose.
    settings = on_folder(shared, tmp_path / "out", eval_audio_dir=str(shared / "heldout"), use_cpu=None)
    # `accelerate launch --cpu` starts several processes only by way of MPI.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = program(*launch, str(EXAMPLES / "run_skill.py"), *command_line(settings))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("Stage 1, up to step 4") == 1  # only one process speaks
    results = results_of(tmp_path / "out")
    assert results["sparsity"] == pytest.approx(0.3, abs=0.02)
    assert AutoModel.from_pretrained(tmp_path / "out").num_parameters() == results["student_parameters"]
