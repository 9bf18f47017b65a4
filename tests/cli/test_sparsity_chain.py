"""Several sparsities of one command: the same as commands by hand, killed and resumed, and what is refused."""

import json
import shutil

import pytest
from conftest import tiny_teacher
from short_distillation import command_line, on_folder, results_of, write_inputs
from transformers import AutoModel

from skill_hf.cli import distill


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("shared"))


def words(shared, folder, **settings) -> list[str]:
    settings = {"eval_audio_dir": str(shared / "heldout"), "sparsity_warmup_steps": 3} | settings
    return command_line(on_folder(shared, folder, **settings))


@pytest.fixture(scope="module")
def by_hand(shared):
    """The students of two commands, the second of which starts from the first."""
    first, second = shared / "by_hand" / "first", shared / "by_hand" / "second"
    assert distill.main(words(shared, first, target_sparsity=0.2)) == 0
    assert distill.main(words(shared, second, target_sparsity=0.4, student_name_or_path=str(first))) == 0
    return first, second


@pytest.fixture(scope="module")
def chained(shared):
    """A chain that nothing disturbed."""
    output_dir = shared / "chain"
    assert distill.main(words(shared, output_dir, target_sparsity=[0.2, 0.4], **CHECKPOINTS)) == 0
    return output_dir


def copy_of(chained, tmp_path):
    return shutil.copytree(chained, tmp_path / "out")


def history(folder) -> list[dict]:
    states = [json.loads(path.read_text()) for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(states, key=lambda state: state["global_step"])["log_history"]


def weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def assert_same(output_dir, by_hand):
    for folder, expected in zip(("sparsity-0.2", "sparsity-0.4"), by_hand, strict=True):
        assert weights(output_dir / folder) == weights(expected)


def test_a_chain_is_the_same_as_commands_by_hand(chained, by_hand):
    assert_same(chained, by_hand)
    assert {path.name for path in chained.iterdir()} == {"sparsity-0.2", "sparsity-0.4"}


def test_the_target_rises_from_the_sparsity_of_the_student_before(chained):
    first, second = (
        [line["target_sparsity"] for line in history(chained / f"sparsity-{sparsity}") if "target_sparsity" in line]
        for sparsity in (0.2, 0.4)
    )
    before = results_of(chained / "sparsity-0.2")["sparsity"]
    assert first[0] < before <= second[0] < 0.4 and (first[-1], second[-1]) == (0.2, 0.4)


def test_each_student_is_complete_and_refers_to_the_teacher(shared, chained, by_hand):
    teacher = tiny_teacher(num_hidden_layers=2).num_parameters()
    configs = []
    for sparsity, expected in zip((0.2, 0.4), by_hand, strict=True):
        folder = chained / f"sparsity-{sparsity}"
        files = {path.name for path in folder.iterdir() if path.is_file()}
        assert files == {path.name for path in expected.iterdir()} | {"finished_run.json"}
        assert {"README.md", "architecture.png", "layer_similarity.png", "all_results.json"} <= files
        results, of_hand = results_of(folder), results_of(expected)
        assert results["seconds"].keys() == of_hand["seconds"].keys()
        for changing in ("seconds", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"):
            del results[changing], of_hand[changing]
        assert results == of_hand
        left = AutoModel.from_pretrained(folder).num_parameters()
        assert results["sparsity"] == 1 - left / teacher == pytest.approx(sparsity, abs=0.02)
        configs.append(json.loads((folder / "config.json").read_text()))
    first, second = configs
    assert first["num_attention_heads"] == second["num_attention_heads"] == 4
    assert first["intermediate_size"] == second["intermediate_size"] == 48
    for earlier, later in zip(first["remaining_heads"], second["remaining_heads"], strict=True):
        assert set(later) <= set(earlier)


class Killed(BaseException):
    """Nothing is saved after it."""


def killed_in(monkeypatch, step: int) -> list[str]:
    """Kills the run in this training step, counted from now; the output folder of each step that is begun."""
    trained, original = [], distill.SkillDistillationTrainer.training_step

    def training_step(trainer, *args, **kwargs):
        trained.append(trainer.args.output_dir)
        if len(trained) == step:
            raise Killed
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(distill.SkillDistillationTrainer, "training_step", training_step)
    return trained


@pytest.mark.parametrize(
    "step",
    [*(pytest.param(step, marks=pytest.mark.nightly) for step in (1, 3)), 6],
    ids=["before a checkpoint", "stage 1", "stage 2"],
)
def test_killed_in_the_second_student_and_resumed(shared, chained, by_hand, tmp_path, monkeypatch, step):
    output_dir = copy_of(chained, tmp_path)
    shutil.rmtree(output_dir / "sparsity-0.4")
    settings = words(shared, output_dir, target_sparsity=[0.2, 0.4], resume_from_checkpoint="auto", **CHECKPOINTS)
    trained = killed_in(monkeypatch, step)
    with pytest.raises(Killed):
        distill.main(settings)
    assert not (output_dir / "sparsity-0.4" / "model.safetensors").exists()
    assert distill.main(settings) == 0
    assert trained == [str(output_dir / "sparsity-0.4")] * 7  # the step that was killed twice
    assert_same(output_dir, by_hand)


def test_what_is_finished_is_not_done_again(shared, chained, by_hand, tmp_path, monkeypatch):
    trained = killed_in(monkeypatch, 1)
    output_dir = copy_of(chained, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in output_dir.glob("*/*") if path.is_file()}
    settings = words(shared, output_dir, target_sparsity=[0.2, 0.4], resume_from_checkpoint=True)
    assert distill.main(settings) == 0
    assert not trained
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.nightly
def test_overwriting_begins_with_the_first(shared, chained, by_hand, tmp_path, monkeypatch, capsys):
    """What is left of the earlier chain is not taken for this one's."""
    output_dir = copy_of(chained, tmp_path)
    settings = words(shared, output_dir, target_sparsity=[0.2, 0.4], overwrite_output_dir=True, **CHECKPOINTS)
    trained = killed_in(monkeypatch, 3)
    with pytest.raises(Killed):
        distill.main(settings)
    assert not list(output_dir.glob("*/finished_run.json")) and not list(output_dir.glob("sparsity-0.4/checkpoint-*"))
    careful = [*settings, "--resume_from_checkpoint", "True", "--overwrite_output_dir", "False"]
    assert "sparsity-0.4` contains an earlier run" in error_of(careful, capsys)
    assert distill.main([*settings, "--resume_from_checkpoint", "True"]) == 0
    assert len(trained) == 7 + 6
    assert_same(output_dir, by_hand)


# Settings, and words of the error.
BAD = {
    "falling": ({"target_sparsity": [0.5, 0.2]}, "`target_sparsity` must rise, as each student starts from the one"),
    "the same twice": ({"target_sparsity": [0.2, 0.2]}, "before, but are 0.2, 0.2."),
    "one of 1": ({"target_sparsity": [0.2, 1]}, "`target_sparsity` must be a finite number above 0 and below 1"),
    "one of 0": ({"target_sparsity": [0, 0.2]}, "`target_sparsity` must be a finite number above 0 and below 1"),
    "a word": ({"target_sparsity": [0.2, "half"]}, "`target_sparsity` must be a finite number, but is 'half'"),
    "one checkpoint": (
        {"target_sparsity": [0.2, 0.4], "resume_from_checkpoint": "some/checkpoint-2"},
        "`resume_from_checkpoint` is some/checkpoint-2, but each sparsity has its own checkpoints; pass True or auto.",
    ),
}
BAD_LATER = {
    "unreachable at the end": ({"target_sparsity": [0.2, 0.99]}, "`target_sparsity` is 0.99, but"),
    "nothing to resume": (
        {"target_sparsity": [0.1, 0.3], "resume_from_checkpoint": True},
        "There is no checkpoint to resume from in",
    ),
    "a folder with a run": ({"target_sparsity": [0.1, 0.4]}, "sparsity-0.4` contains an earlier run"),
    "other settings of finished ones": (
        {"target_sparsity": [0.2, 0.4], "resume_from_checkpoint": True, "seed": 7},
        "sparsity-0.2` belongs to a different run: seed (checkpoint: 42, now: 7)",
    ),
    "one more between finished ones": (
        {"target_sparsity": [0.2, 0.3, 0.4], "resume_from_checkpoint": True},
        "sparsity-0.4` contains an earlier run",
    ),
    "another recipe of finished ones": (
        {"target_sparsity": [0.2, 0.4], "resume_from_checkpoint": True, "linkage": "single"},
        "sparsity-0.2` belongs to a different recipe: linkage (checkpoint: average, now: single)",
    ),
}


def error_of(settings, capsys) -> str:
    assert distill.main(settings) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    return error


@pytest.mark.parametrize("name", BAD)
def test_refused_before_any_audio_is_read(shared, tmp_path, monkeypatch, capsys, name):
    settings, expected = BAD[name]
    monkeypatch.setattr(distill, "load_data", lambda *args: pytest.fail("the audio was read"))
    assert expected in error_of(words(shared, tmp_path / "out", **settings), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", BAD_LATER)
def test_refused_before_the_first_student(shared, chained, tmp_path, monkeypatch, capsys, name):
    settings, expected = BAD_LATER[name]
    trained = killed_in(monkeypatch, 1)
    assert expected in error_of(words(shared, copy_of(chained, tmp_path), **settings), capsys)
    assert not trained


def test_settings_of_each_student(tmp_path):
    """From words and from a file, over a recipe; with names on the Hub, and a start for all."""
    given = {"recipe": "wavlm-base-plus-09", "target_sparsity": [0.5, 0.75, 0.9], "audio_dir": "x"}
    given |= {"output_dir": str(tmp_path / "small"), "student_name_or_path": "shorter"}
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(given))
    students = distill.parse(command_line(given))
    assert students == distill.parse([str(file)])
    folders = [str(tmp_path / "small" / f"sparsity-{sparsity}") for sparsity in (0.5, 0.75, 0.9)]
    assert [skill_config.target_sparsity for _, _, skill_config, _ in students] == [0.5, 0.75, 0.9]
    assert [training_args.output_dir for *_, training_args in students] == folders
    assert [model_args.student_name_or_path for model_args, *_ in students] == ["shorter", *folders[:2]]
    assert {training_args.max_steps for *_, training_args in students} == {75_000}
    names = [training_args.hub_model_id for *_, training_args in students]
    assert names == ["small-sparsity-0.5", "small-sparsity-0.75", "small-sparsity-0.9"]
    students = distill.parse(command_line(given | {"hub_model_id": "you/wavlm"}))
    assert students[0][3].hub_model_id == "you/wavlm-sparsity-0.5"


def test_one_value_is_one_student(tmp_path):
    needed = {"audio_dir": "x", "output_dir": str(tmp_path)}
    ((model_args, _, skill_config, training_args),) = distill.parse(command_line(needed | {"target_sparsity": 0.5}))
    assert (skill_config.target_sparsity, training_args.output_dir) == (0.5, str(tmp_path))
    assert model_args.student_name_or_path is training_args.hub_model_id is None
    assert len(distill.parse(command_line(needed))) == 1
