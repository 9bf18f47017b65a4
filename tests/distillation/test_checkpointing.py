"""Whether a checkpoint is whole and of this run, and which one a run resumes from."""

import json
import logging
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import noise_clips, tiny_teacher
from safetensors.torch import load_file, save_file
from test_skill_trainer import Kill, KillAt, make_trainer
from transformers import AutoModel, Wav2Vec2FeatureExtractor

from skill_hf import WavLMForSkillStudent
from skill_hf.distillation.checkpoint_validation import (
    MANIFEST_NAME,
    CheckpointError,
    check_checkpoint,
    check_same_run,
)
from skill_hf.distillation.checkpointing import find_checkpoint, rotate, write_manifest
from skill_hf.distillation.run_identity import describe_data, describe_run
from skill_hf.models.families import build_student
from skill_hf.recipe.skill_training_args import SkillTrainingArguments
from skill_hf.version import __version__


RECIPE = {"layer_groups": [[0, 1], [2, 3]], "num_clusters": None, "final_steps": 2}
SHORT = {"max_steps": 5, "save_steps": 1, "learning_rate": 1e-3}


def make(output_dir, clips, recipe=None, **kwargs):
    return make_trainer(output_dir, clips, recipe=RECIPE | (recipe or {}), **SHORT | kwargs)


def ready(trainer):
    """A trainer that knows its run, as `train()` does before it looks at checkpoints."""
    trainer.resolve_recipe()
    trainer.run = describe_run(trainer)
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps, the cut and two more, with a checkpoint of each step; and its clips."""
    clips = noise_clips(12, 16_000)
    trainer = make(tmp_path_factory.mktemp("finished"), clips)
    trainer.train()
    return trainer, clips


@pytest.fixture(scope="module")
def looking(finished):
    """A trainer of the same run that has not begun."""
    trainer, clips = finished
    return ready(make(trainer.args.output_dir, clips))


def copy_of(finished, step: int, folder: Path) -> Path:
    trainer, _ = finished
    return Path(shutil.copytree(Path(trainer.args.output_dir) / f"checkpoint-{step}", folder / f"checkpoint-{step}"))


def same_weights(actual, expected) -> bool:
    actual, expected = actual.state_dict(), expected.state_dict()
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


# ----------------------------------------------------------------------------------------------------------- is whole
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
FILES += ("skill_state.json", "skill_config.json", "config.json", MANIFEST_NAME)


@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_checkpoints_are_whole(finished, looking, tmp_path, step):
    directory = copy_of(finished, step, tmp_path)
    check_checkpoint(directory, looking)
    check_checkpoint(directory.rename(tmp_path / "best"), looking)
    # The cut starts its own optimizer.
    assert (tmp_path / "best" / "optimizer.pt").is_file() == (step != 3)


def removed(path):
    path.unlink()


def emptied(path):
    path.write_bytes(b"")


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_byte_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def one_bit_changed(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def longer(path):
    path.write_bytes(path.read_bytes() + b"\n")


def foreign(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def made_a_directory(path):
    path.unlink()
    path.mkdir()


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES = (removed, emptied, cut_short, one_byte_short, one_bit_changed, longer, foreign, made_a_directory, dangling)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(finished, looking, tmp_path, name, damage):
    directory = copy_of(finished, 2, tmp_path)
    damage(directory / name)
    if name == MANIFEST_NAME and damage in (longer, one_byte_short):
        check_checkpoint(directory, looking)  # a line break more or less is no other content
        return
    with pytest.raises(ValueError) as refused:
        check_checkpoint(directory, looking)
    message = str(refused.value)
    assert str(directory) in message and "\n" not in message and len(message) < 500
    if damage is one_bit_changed and name in ("skill_state.json", "skill_config.json"):
        return  # what it says may have become that of another run
    assert isinstance(refused.value, CheckpointError)
    assert "is not a complete checkpoint of SkillDistillationTrainer: " in message
    listed = json.loads((looking_dir(looking) / "checkpoint-2" / MANIFEST_NAME).read_text())["files"]
    assert any(word in message for word in ((*FILES, *listed) if name == MANIFEST_NAME else (name,)))


def looking_dir(looking) -> Path:
    return Path(looking.args.output_dir)


def edit(name, *path, value):
    """Changes one value of a JSON file; `checkpoint_files.json` fits the file again, as if it was written so."""

    def change(directory):
        content = json.loads((directory / name).read_text())
        where = content
        for key in path[:-1]:
            where = where[key]
        where[path[-1]] = value
        (directory / name).write_text(json.dumps(content))
        (directory / MANIFEST_NAME).unlink()
        write_manifest(directory)

    return change


def edit_weights(change):
    def apply(directory):
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors")
        (directory / MANIFEST_NAME).unlink()
        write_manifest(directory)

    return apply


NAME = "student.encoder.layers.1.feed_forward.output_dense.weight"
GATE = "student.encoder.layers.1.feed_forward.dim_gate.log_alpha"
STATE, PROGRESS = "skill_state.json", "trainer_state.json"
IMPOSSIBLE = {
    "stage 7": (edit(STATE, "stage", value=7), "`stage` in skill_state.json must be from 1 to 2, but is 7"),
    "stage True": (edit(STATE, "stage", value=True), "`stage`"),
    "stage as text": (edit(STATE, "stage", value="1"), "`stage`"),
    "no stage": (edit(STATE, "stage", value=None), "`stage`"),
    "stage 2 before the cut": (edit(STATE, "stage", value=2), "`global_step` in trainer_state.json must be from 3"),
    "steps as a list": (edit(STATE, "steps", value=[1]), "`steps` in skill_state.json"),
    "steps below 0": (edit(STATE, "steps", "joint", value=-1), "`steps.joint`"),
    "a step of 10**9": (
        edit(PROGRESS, "global_step", value=10**9),
        "`global_step` in trainer_state.json must be from 0 to 3, but is 1000000000",
    ),
    "a step below 0": (edit(PROGRESS, "global_step", value=-1), "`global_step`"),
    "half a step": (edit(PROGRESS, "global_step", value=1.5), "`global_step`"),
    "a step of NaN": (edit(PROGRESS, "global_step", value=math.nan), "`global_step`"),
    "another step": (edit(PROGRESS, "global_step", value=1), "`global_step` in trainer_state.json is 1"),
    "a field of another program": (
        edit(PROGRESS, "surprise", value=1),
        "trainer_state.json is not a valid Trainer state",
    ),
    "layer 99": (edit(STATE, "layer_groups", value=[[0], [99]]), "groups layer 99, but the teacher has only 3 layers"),
    "no groups": (edit(STATE, "layer_groups", value=[]), "`layer_groups`"),
    "an empty group": (edit(STATE, "layer_groups", value=[[0], []]), "`layer_groups`"),
    "groups as text": (edit(STATE, "layer_groups", value="[[0]]"), "`layer_groups`"),
    "layers as text": (edit(STATE, "layer_groups", value=[["0"]]), "`layer_groups`"),
    "other groups": (edit(STATE, "layer_groups", value=[[0, 1, 2]]), "has other groups than the recipe: [[0, 1, 2]]"),
    "similarity that is not square": (edit(STATE, "layer_similarity", value=[[1, 0]]), "`layer_similarity`"),
    "a record as a list": (edit(STATE, "record", value=[1]), "`record` in skill_state.json is not valid (it must be"),
    "no record": (
        edit(STATE, "record", value=None),
        "`record` in skill_state.json is not valid (it must be an object",
    ),
    "silhouettes of names": (
        edit(STATE, "record", "silhouettes", value={"two": 0.5}),
        "`silhouettes` must be numbers",
    ),
    "losses as text": (edit(STATE, "record", "losses", value={"start": "1"}), "`losses` must be"),
    "a cut without numbers": (edit(STATE, "record", "cut", value={"left": 1}), "`cut` must be the numbers `left`,"),
    "distances without CKA": (edit(STATE, "record", "layer_distances", value={"cosine": [1.0]}), "`layer_distances`"),
    "10**9 layers": (
        edit("config.json", "num_hidden_layers", value=10**9),
        "`num_hidden_layers` must be an integer from 1 to 256",
    ),
    "hidden states of 10**9": (edit("config.json", "hidden_size", value=10**9), "`hidden_size` in config.json"),
    "heads that there are not": (
        edit("config.json", "remaining_heads", value=[[9]] * 3),
        "config.json is not a valid student config",
    ),
    "widths of another student": (edit("config.json", "intermediate_sizes", value=[9] * 3), "has shape"),
    "widths of 10**15": (edit("config.json", "intermediate_sizes", value=[10**15] * 3), "`intermediate_sizes[0]`"),
    "widths of 10**18": (edit("config.json", "intermediate_sizes", value=[10**18] * 3), "`intermediate_sizes[0]`"),
    "files as a list": (edit(MANIFEST_NAME, "files", value=[]), "checkpoint_files.json"),
    "a weight less": (edit_weights(lambda weights: weights.pop(NAME)), f"model.safetensors lacks {NAME}"),
    "a weight more": (edit_weights(lambda weights: weights.update(x=torch.ones(1))), "model.safetensors contains x"),
    "a weight of another shape": (edit_weights(lambda weights: weights.update({NAME: torch.ones(1)})), "shape [1]"),
    "NaN": (edit_weights(lambda weights: weights[NAME].fill_(math.nan)), f"{NAME} in model.safetensors contains NaN"),
    "an infinite gate": (edit_weights(lambda weights: weights[GATE].fill_(math.inf)), GATE),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_state_out_of_its_range_is_named(finished, looking, tmp_path, case):
    directory = copy_of(finished, 2, tmp_path)
    change, words = IMPOSSIBLE[case]
    if case == "files as a list":
        (directory / MANIFEST_NAME).write_text('{"files": [1]}')
    else:
        change(directory)
    with pytest.raises(CheckpointError) as refused:
        check_checkpoint(directory, looking)
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "null", "[]", "{", "NaN", "[" * 10_000, '{"a": 1}', "\0", "\ufeff{}"])
@pytest.mark.parametrize("name", [STATE, PROGRESS, "skill_config.json"])
def test_json_of_any_kind(finished, looking, tmp_path, name, content):
    directory = copy_of(finished, 2, tmp_path)
    (directory / name).write_text(content)
    with pytest.raises(ValueError) as refused:
        check_checkpoint(directory, looking)
    assert str(directory) in str(refused.value) and "\n" not in str(refused.value)


def test_json_that_is_not_utf_8(finished, looking, tmp_path):
    directory = copy_of(finished, 2, tmp_path)
    (directory / STATE).write_bytes(b'{"stage": "\xff"}')
    with pytest.raises(CheckpointError, match="skill_state.json cannot be read"):
        check_checkpoint(directory, looking)


# ---------------------------------------------------------------------------------------------------- which one it is
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_the_last_whole_one_is_resumed(finished, tmp_path, caplog, name):
    reference, clips = finished
    for step in (1, 2):
        copy_of(finished, step, tmp_path)
    (tmp_path / "checkpoint-2" / name).unlink()
    trainer = make(tmp_path, clips)
    trainer.train(resume_from_checkpoint=True)
    assert same_weights(trainer.model, reference.model)
    assert f"checkpoint-2` is not a complete checkpoint of SkillDistillationTrainer: it has no {name}." in caplog.text
    assert "skipped" in caplog.text


def test_one_that_is_given_is_refused(finished, tmp_path):
    _, clips = finished
    copy_of(finished, 1, tmp_path)
    directory = copy_of(finished, 2, tmp_path)
    (directory / "optimizer.pt").unlink()
    trainer = make(tmp_path, clips)
    with pytest.raises(CheckpointError, match="checkpoint-2.*it has no optimizer.pt"):
        trainer.train(resume_from_checkpoint=str(directory))
    # Nothing was loaded: the trainer can still begin elsewhere.
    assert trainer.stage == 0 and trainer.layer_groups is None


@pytest.mark.parametrize("given", [5, 1.5, "", [], {}, b"checkpoint-2"])
def test_what_is_no_directory(given, tmp_path):
    def check(directory):
        raise AssertionError

    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be a directory, or True"):
        find_checkpoint(given, str(tmp_path), check)
    assert find_checkpoint(None, str(tmp_path), check) is find_checkpoint(False, str(tmp_path), check) is None


def test_none_is_whole(finished, tmp_path):
    _, clips = finished
    (copy_of(finished, 1, tmp_path) / "scheduler.pt").unlink()
    (copy_of(finished, 2, tmp_path) / PROGRESS).unlink()
    (tmp_path / "checkpoint-4").write_text("a file")
    with pytest.raises(ValueError, match="There is no checkpoint to resume from in .*checkpoint-4.*-2.*-1") as refused:
        make(tmp_path, clips).train(resume_from_checkpoint=True)
    assert "it has no scheduler.pt" in str(refused.value) and "\n" not in str(refused.value)


def test_auto_begins_or_goes_on(finished, tmp_path):
    reference, clips = finished
    with pytest.raises(Kill):
        trainer = make_trainer(tmp_path, clips, recipe=RECIPE, callbacks=[KillAt(3)], **SHORT)
        trainer.train(resume_from_checkpoint="auto")
    trainer = make(tmp_path, clips)
    trainer._begin = None
    trainer.train(resume_from_checkpoint="auto")
    assert same_weights(trainer.model, reference.model)
    # What is damaged is for its owner to remove.
    for path in tmp_path.glob("checkpoint-*"):
        (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint to resume from.*it has no model.saf.*`overwrite_output_dir`"):
        make(tmp_path, clips).train(resume_from_checkpoint="auto")


def test_auto_after_a_kill_in_calibration(tmp_path, clips):
    recipe = {"layer_groups": None, "num_clusters": 2}
    trainer = make(tmp_path, clips, recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.ensemble, "calibrate", killed)
        with pytest.raises(Kill):
            trainer.train(resume_from_checkpoint="auto")
    trainer = make(tmp_path, clips, recipe)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.stage == 3


def killed(*args, **kwargs):
    raise Kill


def test_auto_has_to_prune_something_too(tmp_path, clips):
    with pytest.raises(ValueError, match="nothing would be pruned"):
        make(tmp_path, clips, {"final_steps": 5}).train(resume_from_checkpoint="auto")


def test_weights_alone_cannot_be_resumed(finished, tmp_path):
    _, clips = finished
    directory = copy_of(finished, 2, tmp_path)
    (directory / "optimizer.pt").unlink()
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    del manifest["files"]["optimizer.pt"]
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"written without optimizer.pt \(by `save_only_model`\)"):
        make(tmp_path, clips).train(resume_from_checkpoint=True)


def test_an_earlier_version_s_checkpoint(finished, tmp_path):
    _, clips = finished
    directory = copy_of(finished, 2, tmp_path)
    state = json.loads((directory / STATE).read_text())
    assert state["version"] == __version__
    del state["run"], state["version"]
    (directory / STATE).write_text(json.dumps(state))
    (directory / MANIFEST_NAME).unlink()
    with pytest.raises(
        ValueError,
        match=f"does not record its run. It was written by a version before this was recorded; this is"
        f" skill-hf {__version__}. Resume with that version, or start again",
    ):
        make(tmp_path, clips).train(resume_from_checkpoint=True)


def test_the_version_that_wrote_a_checkpoint_is_named_in_refusals(finished, looking, tmp_path):
    _, clips = finished
    directory = copy_of(finished, 2, tmp_path)
    edit(STATE, "version", value="9.8")(directory)
    check_checkpoint(directory, looking)  # no reason to refuse it by itself
    edit(STATE, "record", "fields_of_9_8", value=1)(directory)
    check_checkpoint(directory, looking)
    other = ready(make(tmp_path / "other", clips, recipe={"cosine_weight": 2.0}))
    written_by = f" It was written by skill-hf 9.8; this is skill-hf {__version__}."
    with pytest.raises(ValueError, match=f"belongs to a different recipe: cosine_weight.*{written_by}"):
        check_checkpoint(directory, other)
    edit(STATE, "stage", value=7)(directory)
    with pytest.raises(
        CheckpointError, match=f"`stage` in skill_state.json must be from 1 to 2, but is 7.{written_by}"
    ):
        check_checkpoint(directory, looking)


def test_a_training_checkpoint_is_no_student(finished):
    trainer, clips = finished
    directory = f"{trainer.args.output_dir}/checkpoint-2"
    for load in (AutoModel.from_pretrained, WavLMForSkillStudent.from_pretrained):
        with pytest.raises(ValueError, match="a training checkpoint, not a student: resume.*resume_from_checkpoint"):
            load(directory)
    with pytest.raises(ValueError, match="a training checkpoint, not a student"):
        make("unused", clips, teacher=directory)


# ------------------------------------------------------------------------------------------------------- the same run
def longer_clips(clips):
    return [{"input_values": np.append(clip["input_values"], clip["input_values"])} for clip in clips]


OTHER_RUNS = {
    "learning_rate": {"learning_rate": 2e-3},
    "seed": {"seed": 1},
    "data_seed": {"data_seed": 1},
    "batch_size": {"per_device_train_batch_size": 2},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "warmup_steps": {"warmup_steps": 1},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "optim": {"optim": "sgd"},
    "optimizer": {"optimizer": (torch.optim.AdamW, {"amsgrad": True})},
    "adam_beta2": {"adam_beta2": 0.98},
    "weight_decay": {"weight_decay": 0.1},
    "max_grad_norm": {"max_grad_norm": 2.0},
    "precision": {"bf16": True},
    "dataloader_drop_last": {"dataloader_drop_last": True},
    "data.rows": {"data": lambda clips: clips[:-1]},
    "data.checksum": {"data": longer_clips},
    "teacher.num_parameters": {"teacher": tiny_teacher(hidden_dropout=0.0, intermediate_size=40)},
    "teacher_weights": {"teacher": "other weights"},
    "student_weights": {"model": "a student"},
    "target_sparsity": {"recipe": {"target_sparsity": 0.5}},
    "layer_groups": {"recipe": {"layer_groups": [[0], [1, 2, 3]]}},
    "steps.final": {"recipe": {"final_steps": 1}},
    "steps.joint": {"max_steps": 6},
    "final_learning_rate": {"recipe": {"final_learning_rate": 1e-3}},
}


@pytest.mark.parametrize("named", OTHER_RUNS)
def test_settings_that_change_the_student_are_named(finished, named):
    reference, clips = finished
    settings = dict(OTHER_RUNS[named])
    change = settings.pop("data", lambda clips: clips)
    if settings.get("teacher") == "other weights":
        settings["teacher"] = tiny_teacher()
        with torch.no_grad():
            settings["teacher"].encoder.layers[0].final_layer_norm.bias[0] += 1
    if "model" in settings:
        settings["model"] = build_student(tiny_teacher())
    trainer = make(reference.args.output_dir, change(clips), **settings)
    with pytest.raises(ValueError) as refused:
        trainer.train(resume_from_checkpoint=True)
    message = str(refused.value)
    assert "belongs to a different r" in message and f"{named} (checkpoint: " in message and ", now: " in message
    assert not isinstance(refused.value, CheckpointError) and "\n" not in message
    assert trainer.stage == 0


SAME_RUNS = {
    "intervals": {"save_steps": 2, "logging_steps": 5, "eval_strategy": "steps", "eval_steps": 2},
    "limit": {"save_total_limit": 1},
    "workers": {"dataloader_num_workers": 1},
    "reports": {"report_to": [], "run_name": "again", "log_level": "info"},
    "progress": {"disable_tqdm": False},
    "evaluation": {"per_device_eval_batch_size": 2, "evaluate_on": []},
}


@pytest.mark.parametrize("case", SAME_RUNS)
def test_settings_that_do_not_may_change(finished, case):
    reference, clips = finished
    trainer = ready(make("unused", clips, **SAME_RUNS[case]))
    for step in (2, 3, 4):
        check_checkpoint(Path(reference.args.output_dir) / f"checkpoint-{step}", trainer)


def test_as_many_clips_a_step_in_other_batches(finished, caplog):
    reference, clips = finished
    kwargs = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    check_checkpoint(Path(reference.args.output_dir) / "checkpoint-2", ready(make("unused", clips, **kwargs)))
    assert "batch_size (checkpoint: 4, now: 2); gradient_accumulation_steps (checkpoint: 1, now: 2)" in caplog.text
    assert "not be bit-identical" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_drop_last": True},
        {"train_dataset": datasets.Dataset.from_list([{"input_values": [0.0] * 9_000}] * 9).to_iterable_dataset()},
    ],
    ids=["grouped by length", "last clips dropped", "stream"],
)
def test_other_batches_are_refused_where_the_order_depends_on_them(tmp_path, clips, settings):
    settings = dict(settings)
    data = settings.pop("train_dataset", clips)
    trainer = ready(make_trainer(tmp_path, data, recipe=RECIPE, evaluate_on=[], **SHORT | settings))
    trainer.skill_config.save_pretrained(tmp_path)
    state = json.loads(json.dumps(trainer._skill_state(), default=str))
    check_same_run(tmp_path, state, trainer)
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    other = ready(make_trainer(tmp_path, data, recipe=RECIPE, evaluate_on=[], **SHORT | settings))
    with pytest.raises(ValueError, match=r"a different run: batch_size \(checkpoint: 4, now: 2\); gradient_acc"):
        check_same_run(tmp_path, state, other)


def test_an_earlier_run_is_never_resumed_in_place_of_this_one(finished, tmp_path):
    """The same recipe with other data and another learning rate, killed at its start and resumed."""
    _, clips = finished
    for step in (4, 5):
        copy_of(finished, step, tmp_path)
    other = {"data": longer_clips(clips), "learning_rate": 5e-4}
    with pytest.raises(
        ValueError, match=r"contains an earlier run \(checkpoint-4, checkpoint-5\).*overwrite_output_dir"
    ):
        make(tmp_path, other["data"], learning_rate=other["learning_rate"]).train()
    with pytest.raises(ValueError, match="a different run: learning_rate"):
        make(tmp_path, other["data"], learning_rate=other["learning_rate"]).train(resume_from_checkpoint=True)
    trainer = make_trainer(
        tmp_path,
        other["data"],
        recipe=RECIPE,
        callbacks=[KillAt(2)],
        **SHORT | {"learning_rate": other["learning_rate"]},
    )
    trainer.args.overwrite_output_dir = True
    with pytest.raises(Kill):
        trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1"}
    make(tmp_path, other["data"], learning_rate=other["learning_rate"]).train(resume_from_checkpoint=True)


def test_another_teacher_is_named_before_its_sizes(finished):
    reference, clips = finished
    trainer = make(reference.args.output_dir, clips, teacher=tiny_teacher(num_hidden_layers=4))
    with pytest.raises(ValueError, match="a different recipe: teacher.num_parameters"):
        trainer.train(resume_from_checkpoint=True)


# --------------------------------------------------------------------------------------------- what data are the same
def audio_rows(folder: Path, seed: int = 0, number: int = 5, samples: int = 400) -> list[dict]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(number):
        (folder / f"{index}.wav").write_bytes(rng.bytes(samples))
    return [{"audio": str(folder / f"{index}.wav")} for index in range(number)]


def test_data_are_told_apart_wherever_they_lie(tmp_path):
    described = describe_data(audio_rows(tmp_path / "a"))
    assert described == describe_data(audio_rows(tmp_path / "b"))
    assert described == describe_data([{"audio": {"path": row["audio"]}} for row in audio_rows(tmp_path / "c")])
    others = {
        "content": audio_rows(tmp_path / "d", seed=1),
        "length": audio_rows(tmp_path / "e", samples=401),
        "number": audio_rows(tmp_path / "f", number=6),
        "order": audio_rows(tmp_path / "g")[::-1],
    }
    for name, rows in others.items():
        assert describe_data(rows) != described, name
    table = datasets.Dataset.from_list(audio_rows(tmp_path / "h"))
    assert describe_data(table)["checksum"] == described["checksum"]
    assert describe_data(table) != describe_data(table.add_column("text", ["a"] * 5))
    assert json.loads(json.dumps(describe_data(table))) == describe_data(table)


def test_data_that_tell_nothing(tmp_path):
    class Random:
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return {"input_values": np.random.standard_normal(10)}

    class Broken(Random):
        def __getitem__(self, index):
            raise OSError("gone")

    assert describe_data(Random()) == {"columns": None, "rows": 10, "checksum": None}
    for data in ([], None, Broken(), [1, 2], [{"audio": object()}], (row for row in [])):
        assert json.dumps(describe_data(data))

    def rows():
        raise AssertionError("a stream is not read")
        yield {}

    stream = datasets.IterableDataset.from_generator(rows)
    assert describe_data(stream)["rows"] is None
    assert describe_data(stream) == describe_data(stream.shuffle(seed=3, buffer_size=2))


# --------------------------------------------------------------------------------------------- the directory of a run
def student_in(folder):
    build_student(tiny_teacher()).save_pretrained(folder)


OCCUPIED = {
    "a student": student_in,
    "another model": lambda folder: tiny_teacher().save_pretrained(folder),
    "a config": lambda folder: (folder / "config.json").write_text("{}"),
    "a pickle": lambda folder: (folder / "pytorch_model.bin").write_bytes(b""),
    "an empty checkpoint": lambda folder: (folder / "checkpoint-7").mkdir(),
    "a checkpoint of another trainer": lambda folder: (folder / "checkpoint-12" / "x").mkdir(parents=True),
}


@pytest.mark.parametrize("case", OCCUPIED)
def test_a_new_run_does_not_begin_in_another_one_s_directory(finished, tmp_path, case):
    _, clips = finished
    OCCUPIED[case](tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    trainer = make(tmp_path, clips)
    for resume in (None, f"{finished[0].args.output_dir}/checkpoint-2"):
        with pytest.raises(ValueError, match="contains an earlier run.*overwrite_output_dir=True"):
            trainer.train(resume_from_checkpoint=resume)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert trainer.layer_groups is None  # before calibration


def test_other_files_do_not_matter(finished, tmp_path):
    reference, clips = finished
    for name in ("README.md", "notes.txt", "runs", ".git"):
        (tmp_path / name).mkdir()
    trainer = make(tmp_path, clips)
    trainer.train()
    assert same_weights(trainer.model, reference.model)


def test_a_run_that_overwrites_another(finished, tmp_path):
    reference, clips = finished
    copy_of(finished, 4, tmp_path)
    (tmp_path / "checkpoint-12").mkdir()
    student_in(tmp_path)
    args = {"output_dir": str(tmp_path), "overwrite_output_dir": True}
    assert SkillTrainingArguments(**args).overwrite_output_dir
    assert not SkillTrainingArguments(output_dir=str(tmp_path)).overwrite_output_dir
    trainer = make(tmp_path, clips)
    trainer.args.overwrite_output_dir = True
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in range(1, 6)}
    assert same_weights(trainer.model, reference.model)
    trainer.save_model()
    assert same_weights(WavLMForSkillStudent.from_pretrained(tmp_path), reference.model)


@pytest.mark.parametrize("role", ["teacher", "model"])
@pytest.mark.parametrize("relation", ["is", "contains"])
def test_what_a_student_is_made_from_stays(finished, tmp_path, role, relation):
    _, clips = finished
    source = tmp_path / "a" / "checkpoint-7"
    model = tiny_teacher() if role == "teacher" else build_student(tiny_teacher())
    model.save_pretrained(source)
    Wav2Vec2FeatureExtractor().save_pretrained(source)
    output_dir = {"is": source, "contains": source.parent}[relation]
    before = {path: path.read_bytes() for path in source.iterdir() if path.is_file()}

    def trainer_in(output_dir, overwrite=True):
        kwargs = {"teacher": str(source)} if role == "teacher" else {"model": type(model).from_pretrained(source)}
        trainer = make(output_dir, clips, save_strategy="no", **kwargs)
        trainer.args.overwrite_output_dir = overwrite
        return trainer

    for resume in (None, True):
        with pytest.raises(ValueError, match=f"{relation} the `{role}`, .*would be overwritten"):
            trainer_in(output_dir).train(resume_from_checkpoint=resume)
    trainer = trainer_in(tmp_path / "b")
    trainer.train()
    with pytest.raises(ValueError, match=f"{relation} the `{role}`, .*would be overwritten"):
        trainer.save_model(str(output_dir))
    trainer.args.output_dir = str(output_dir)
    with pytest.raises(ValueError, match=f"{relation} the `{role}`, .*would be overwritten"):
        trainer.push_to_hub()
    assert {path: path.read_bytes() for path in source.iterdir() if path.is_file()} == before


# ----------------------------------------------------------------------------------------------------------- rotation
@pytest.mark.parametrize(
    ("newest", "limit", "best", "left"),
    [
        (6, None, None, [1, 2, 4, 6, 9]),
        (6, 0, None, [1, 2, 4, 6, 9]),
        (6, 3, None, [2, 4, 6]),
        (6, 1, None, [6]),
        (6, 1, 2, [2, 6]),
        (6, 2, 2, [2, 6]),
        (6, 3, 1, [1, 4, 6]),
        (2, 2, None, [1, 2]),
        (9, 2, None, [6, 9]),
        (6, 9, None, [1, 2, 4, 6, 9]),
    ],
)
def test_rotation_keeps_the_newest_of_this_run(tmp_path, newest, limit, best, left):
    """Those of later steps are of before the run was resumed, and not whole: it would have resumed from them."""
    for step in (1, 2, 4, 6, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path / f"checkpoint-{newest}", limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert sorted(int(path.name.removeprefix("checkpoint-")) for path in tmp_path.iterdir()) == left


def test_the_last_whole_one_is_not_rotated_away_by_one_that_is_not(finished, tmp_path, caplog):
    reference, clips = finished
    caplog.set_level(logging.WARNING)
    copy_of(finished, 1, tmp_path)
    (copy_of(finished, 4, tmp_path) / "optimizer.pt").unlink()
    with pytest.raises(Kill):
        make_trainer(tmp_path, clips, recipe=RECIPE, callbacks=[KillAt(3)], **SHORT | {"save_total_limit": 1}).train(
            resume_from_checkpoint=True
        )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    trainer = make(tmp_path, clips, save_total_limit=1)
    trainer.train(resume_from_checkpoint=True)
    assert same_weights(trainer.model, reference.model)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
