import copy
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs
from conftest import STUDENT_CODE, noise_clips, padded_batch, tiny_config, tiny_teacher
from processes import run_in_processes
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    SEWConfig,
    SEWModel,
    TrainerCallback,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
    WavLMModel,
)

from skill_hf import SkillConfig, SkillDistillationTrainer, SkillTrainingArguments, WavLMForSkillStudent
from skill_hf.compression.macs import count_macs
from skill_hf.compression.multiplier import MultiplierEstimate
from skill_hf.compression.pruning import add_gates, fit_gates, prune
from skill_hf.distillation import unreadable_clips
from skill_hf.models.families import build_student


RECIPE = {"num_clusters": 2, "gate_learning_rate": 0.1, "calibration_samples": 6, "calibration_seconds": 2.0}


def make_trainer(output_dir, clips, teacher=None, recipe=None, callbacks=None, model=None, evaluate_on=None, **kwargs):
    optimizer, min_seconds = kwargs.pop("optimizer", None), kwargs.pop("min_seconds", 0.3)
    arguments = {
        "max_steps": 9,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = SkillDistillationTrainer(
        teacher=tiny_teacher() if teacher is None else teacher,
        skill_config=SkillConfig(**RECIPE | (recipe or {})),
        args=TrainingArguments(output_dir=str(output_dir), **arguments | kwargs),
        train_dataset=clips,
        eval_dataset=clips[:5] if evaluate_on is None else evaluate_on,
        callbacks=callbacks,
        model=model,
        optimizer_cls_and_kwargs=optimizer,
    )
    trainer.data_collator.min_seconds = min_seconds  # shorter clips than by default take less time
    return trainer


class Kill(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Kill


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def use_float16_on_cpus(monkeypatch, init_scale: float = 2.0**16) -> None:
    """
    Trainer and accelerate use float16 on GPUs only, though torch can do it anywhere. With a large enough scale of the
    loss the first steps overflow.
    """
    original = Accelerator.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale)
        self.scaler_handler = GradScalerKwargs(init_scale=init_scale)

    monkeypatch.setattr(Accelerator, "__init__", init)
    monkeypatch.setattr(AcceleratorState, "mixed_precision", property(lambda self: "fp16"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    clips = noise_clips(20, 14_000)
    trainer = make_trainer(tmp_path_factory.mktemp("run"), clips)
    trainer.train()
    return trainer, clips


def test_one_run_clusters_prunes_and_distils(uninterrupted):
    trainer, _ = uninterrupted
    assert sorted(layer for group in trainer.layer_groups for layer in group) == [0, 1, 2, 3]
    assert len(trainer.layer_groups) == 2
    assert trainer.layer_similarity.shape == (4, 4)
    assert trainer.layer_tree().shape == (3, 4)
    assert type(trainer.model) is WavLMForSkillStudent
    assert not trainer.model.named_gates()
    left = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert abs(left / trainer.teachers[0].num_parameters - 0.25) < 0.01
    assert trainer.state.global_step == 9
    assert trainer.args.max_steps == 9
    assert trainer.args.learning_rate == 1e-3


def test_logs(uninterrupted):
    trainer, _ = uninterrupted
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 10))
    names = "distillation_loss l1_loss cosine_loss sparsity target_sparsity lagrangian_loss lambda_1 lambda_2 stage"
    for row in rows:
        assert set(names.split()) <= set(row)
        assert row["distillation_loss"] == pytest.approx(row["l1_loss"] + row["cosine_loss"], abs=1e-5)
        assert row["loss"] == pytest.approx(row["distillation_loss"] + row["lagrangian_loss"], abs=1e-4)
    assert [row["stage"] for row in rows] == [1] * 6 + [2] * 3
    assert any(row["lambda_1"] for row in rows[:6]) and not any(row["lambda_1"] for row in rows[6:])
    assert rows[-1]["sparsity"] == pytest.approx(0.75, abs=0.01)
    # Peak of each stage's own schedule.
    assert rows[0]["learning_rate"] == pytest.approx(1e-3, rel=0.2)
    assert rows[6]["learning_rate"] <= 1e-4


def test_a_run_records_what_it_measured(uninterrupted):
    trainer, clips = uninterrupted
    record = trainer.record
    assert list(record.losses) == ["start", "before_cut", "after_cut", "end"]
    assert record.measured_on == "5 held-out clips"
    # The unpruned copy equals its teacher; what is measured at the end is what `evaluate` gives on the same clips.
    assert record.losses["start"]["distillation_loss"] == pytest.approx(-1, abs=1e-4)
    metrics = trainer.evaluate()
    assert record.losses["end"]["distillation_loss"] == pytest.approx(metrics["eval_distillation_loss"], abs=1e-5)
    assert record.losses["end"]["cosine_similarity"] == pytest.approx(-metrics["eval_cosine_loss"], abs=1e-5)
    assert record.cut["wanted"] == pytest.approx(0.25 * trainer.teachers[0].num_parameters, abs=1)
    assert sorted(record.silhouettes) == [2, 3]
    assert all(sorted(sum(groups, [])) == [0, 1, 2, 3] for groups in record.half_groups)
    assert len(record.half_groups) == 2
    assert [len(distances) for distances in record.layer_distances.values()] == [4, 4]


def test_a_run_reports_how_it_trained(uninterrupted):
    trainer, clips = uninterrupted
    report = trainer.report()
    assert report.student is trainer.model and report.teacher is trainer.teacher
    assert (report.steps.joint, report.steps.final, report.num_steps_done) == (6, 3, 9)
    assert report.learning_rates == (1e-3, 1 / (16 * 0.25 * trainer.teacher.config.hidden_size))
    assert (report.clips_per_step, report.precision, report.seed) == (4, "no", 42)
    assert report.sampling_rate == 16_000 and report.hub_model_id is None
    assert report.layer_groups == trainer.layer_groups
    assert report.train_dataset is clips and report.eval_dataset == clips[:5]
    assert report.results()["teacher_parameters"] == trainer.teachers[0].num_parameters
    np.testing.assert_array_equal(report.layer_tree, trainer.layer_tree())


class NoiseSeeds(TrainerCallback):
    """What the gates' noise was drawn from in each forward in training, step by step."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.steps.append([])

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def note(student, args):
            if student.training and student.gating is not None:
                self.steps[-1].append(student.gating.seed)

        model.student.register_forward_pre_hook(note)


@pytest.mark.parametrize("shared", [True, False])
def test_the_noise_of_the_gates_follows_seed_and_step(tmp_path, clips, shared):
    seen = {}
    for seed in (0, 1, 42):
        watch = NoiseSeeds()
        settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "seed": seed, "max_steps": 6}
        recipe = {"shared_gate_noise": shared}
        make_trainer(
            tmp_path / str(seed), clips, recipe=recipe, callbacks=[watch], save_strategy="no", **settings
        ).train()
        seen[seed] = [step for step in watch.steps if step]
        assert [len(step) for step in seen[seed]] == [2] * 4
        assert all(len(set(step)) == (1 if shared else 2) for step in seen[seed])
    drawn = [number for steps in seen.values() for step in steps for number in set(step)]
    assert len(set(drawn)) == len(drawn) == 3 * 4 * (1 if shared else 2)


def test_parameters_changed(uninterrupted):
    trainer, _ = uninterrupted
    name = "encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    before, after = trainer.teacher.state_dict()[name], trainer.model.state_dict()[name]
    assert before.shape == after.shape
    assert not torch.equal(before, after)
    assert not any(parameter.requires_grad for parameter in trainer.teacher.parameters())
    assert torch.equal(before, tiny_teacher().state_dict()[name])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_targets_are_the_stock_teacher_s_means(layout, padded, tied, tmp_path, clips):
    groups = [[0], [1, 3], [0, 2, 3]]
    teacher = tiny_teacher(layout, tie_last_hidden_states=tied)
    trainer = make_trainer(tmp_path, clips, teacher=teacher, recipe={"layer_groups": groups, "num_clusters": None})
    trainer.layer_groups = groups
    inputs = padded_batch()
    if not padded:
        del inputs["attention_mask"]
    with torch.no_grad():
        states = teacher(**inputs, output_hidden_states=True).hidden_states
    expected = torch.stack([torch.stack([states[index] for index in group]).mean(0) for group in groups])
    (targets,) = trainer.teacher_targets(**inputs)
    torch.testing.assert_close(targets, expected, atol=1e-5, rtol=0)
    assert not targets.requires_grad
    # One copy of the weights serves the teacher that users see and the one that runs.
    with torch.no_grad():
        teacher.feature_projection.projection.weight.zero_()
    assert not torch.allclose(trainer.teacher_targets(**inputs)[0], expected, atol=1e-3)


def test_evaluate_before_and_after(uninterrupted, tmp_path):
    trainer, clips = uninterrupted
    metrics = trainer.evaluate()
    assert trainer.model is trainer.student
    assert metrics["eval_distillation_loss"] == pytest.approx(
        metrics["eval_l1_loss"] + metrics["eval_cosine_loss"], abs=1e-5
    )
    # An unpruned copy predicts its teacher perfectly: an error of 0 and a cosine of 1.
    fresh = make_trainer(tmp_path, clips)
    assert fresh.evaluate()["eval_distillation_loss"] == pytest.approx(-1, abs=1e-4)
    assert metrics["eval_distillation_loss"] > -0.99


def test_evaluation_does_not_depend_on_the_batch_size(uninterrupted, tmp_path):
    """Layer norm: padding has no say. Means are over valid frames, not over batches."""
    _, clips = uninterrupted
    losses = []
    student = build_student(tiny_teacher("large"))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    for size in (1, 3, 5):
        trainer = make_trainer(tmp_path, clips, tiny_teacher("large"), model=student, per_device_eval_batch_size=size)
        losses.append(trainer.evaluate()["eval_distillation_loss"])
    assert losses[0] > -0.99
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_saved_student(uninterrupted, tmp_path):
    trainer, _ = uninterrupted
    trainer.save_model(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        *STUDENT_CODE,
        "preprocessor_config.json",
        "skill_config.json",
        "README.md",
        "architecture.png",
        "layer_similarity.png",
        "layer_distances.png",
        "training.png",
    }
    model = AutoModel.from_pretrained(tmp_path)
    assert not any("log_alpha" in name or "projections" in name for name in model.state_dict())
    assert model.config.apply_spec_augment
    assert model.config.layerdrop == 0
    with torch.no_grad():
        expected, actual = trainer.model(**padded_batch()), model(**padded_batch())
    assert torch.equal(expected.last_hidden_state, actual.last_hidden_state)


def test_student_remembers_the_hub_id_of_its_teacher(tmp_path, clips):
    teacher = tiny_teacher()
    assert make_trainer(tmp_path, clips, teacher=teacher).student.config.base_model is None
    teacher.config.name_or_path = "someone/teacher"  # a directory, perhaps, as seen from another one
    assert make_trainer(tmp_path, clips, teacher=teacher).student.config.base_model is None
    teacher.config._commit_hash = "0" * 40
    assert make_trainer(tmp_path, clips, teacher=teacher).student.config.base_model == "someone/teacher"
    # A student that is a teacher passes on what it knows.
    teacher = build_student(tiny_teacher())
    teacher.config.base_model = "someone/teacher"
    assert make_trainer(tmp_path, clips, teacher=teacher).student.config.base_model == "someone/teacher"


def test_checkpoints_hold_no_teacher(uninterrupted):
    trainer, _ = uninterrupted
    directories = {path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")}
    assert directories == {f"checkpoint-{step}" for step in (2, 4, 6, 8, 9)}
    for step, stage in ((4, 1), (6, 2), (8, 2)):
        directory = Path(trainer.args.output_dir) / f"checkpoint-{step}"
        names = {name.split(".")[0] for name in load_file(directory / "model.safetensors")}
        assert names == {"student"} | ({"multiplier_estimate"} if stage == 1 else set())
        assert json.loads((directory / "skill_state.json").read_text())["stage"] == stage


# Stage 1 ends at step 6: killed within it, at its last step, right after the cut and within stage 2.
@pytest.mark.parametrize("step", [3, 6, 8, *(pytest.param(step, marks=pytest.mark.nightly) for step in (5, 7))])
def test_killed_and_resumed_is_bitwise_the_same(uninterrupted, tmp_path, step):
    reference, clips = uninterrupted
    with pytest.raises(Kill):
        make_trainer(tmp_path, clips, callbacks=[KillAt(step)]).train()
    trainer = make_trainer(tmp_path, clips)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.layer_groups == reference.layer_groups
    expected, actual = reference.model.state_dict(), trainer.model.state_dict()
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


def test_killed_within_the_cut(uninterrupted, tmp_path, monkeypatch):
    """The checkpoint of stage 1's last step is there, that of the cut is not. Dropout follows the random state."""
    reference, clips = uninterrupted

    def kill(student):
        raise Kill

    trainer = make_trainer(tmp_path, clips)
    monkeypatch.setattr("skill_hf.compression.pruning.prune", kill)
    with pytest.raises(Kill):
        trainer.train()
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-6").is_dir()
    torch.manual_seed(123)
    trainer = make_trainer(tmp_path, clips)
    torch.rand(100)
    trainer.train(resume_from_checkpoint=True)
    expected, actual = reference.model.state_dict(), trainer.model.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


def test_resuming_passes_over_a_half_written_checkpoint(uninterrupted, tmp_path):
    reference, clips = uninterrupted
    with pytest.raises(Kill):
        make_trainer(tmp_path, clips, callbacks=[KillAt(5)]).train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    trainer = make_trainer(tmp_path, clips)
    trainer.train(resume_from_checkpoint=True)
    expected, actual = reference.model.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_resuming_a_finished_run_gives_the_student(uninterrupted):
    reference, clips = uninterrupted
    trainer = make_trainer(reference.args.output_dir, clips)
    trainer.train(resume_from_checkpoint=True)
    expected, actual = reference.model.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    with pytest.raises(ValueError, match="finished"):
        trainer.train()


def test_a_callback_that_stops_stage_1_leaves_the_student_uncut(uninterrupted, tmp_path):
    _, clips = uninterrupted
    trainer = make_trainer(tmp_path, clips, callbacks=[StopAt(4)])
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.model.named_gates()
    with pytest.raises(ValueError, match="gates"):
        trainer.save_model(str(tmp_path / "student"))


@pytest.mark.parametrize(
    ("recipe", "kwargs", "named"),
    [
        ({"target_sparsity": 0.5}, {}, "target_sparsity"),
        ({"budget": "macs"}, {}, "budget"),
        ({"num_clusters": 3}, {}, "num_clusters"),
        ({}, {"max_steps": 12}, "steps"),
        ({}, {"teacher": tiny_teacher(intermediate_size=40)}, "teacher"),
    ],
)
def test_checkpoint_of_another_recipe(uninterrupted, recipe, kwargs, named):
    reference, clips = uninterrupted
    trainer = make_trainer(reference.args.output_dir, clips, recipe=recipe, **kwargs)
    with pytest.raises(ValueError, match=f"a different recipe.*{named}"):
        trainer.train(resume_from_checkpoint=True)


def test_no_checkpoint_to_resume(tmp_path, clips):
    trainer = make_trainer(tmp_path, clips)
    with pytest.raises(ValueError, match="no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="skill_state.json"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


def test_save_strategy_no_leaves_nothing(tmp_path, clips):
    trainer = make_trainer(tmp_path, clips, save_strategy="no", max_steps=3)
    trainer.train()
    assert list(tmp_path.iterdir()) == []


def test_accumulated_steps_equal_one_large_batch(tmp_path):
    """Clips of unequal length: padded in the large batch, and of unequal weight in the small ones."""
    rng = np.random.default_rng(0)
    # Below the collator's minimum clips are padded, not cropped, so that both see the same frames.
    lengths = [9_000, 12_000, 15_000, 30_000, 8_000, 20_000, 25_000, 11_000]
    clips = [{"input_values": rng.standard_normal(length).astype(np.float32)} for length in lengths]
    teacher = tiny_teacher("large", hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    states = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path,
            clips,
            teacher,
            {"layer_groups": [[0, 1], [2, 3]], "final_steps": 1, "shared_gate_noise": True},
            max_steps=3,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            save_strategy="no",
            optim="sgd",
            learning_rate=0.1,
            min_seconds=2.0,
        )
        trainer.train()
        states.append(trainer)
    rows = [[row for row in trainer.state.log_history if "loss" in row] for trainer in states]
    for one, many in zip(*rows, strict=True):
        for name in ("loss", "distillation_loss", "l1_loss", "grad_norm", "lagrangian_loss"):
            assert many[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    large, small = (trainer.model.state_dict() for trainer in states)
    for name in large:
        torch.testing.assert_close(small[name], large[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "recipe",
    [
        {"layer_groups": [[0], [2], [3]], "projection_groups": [[0], [1, 2]], "num_clusters": None},
        {"student_layers": "last"},
        {"include_embeddings": False, "similarity": "cosine"},
        {"similarity": "mutual_knn", "contiguous": True},
        {"similarity": "distillation", "num_clusters": None, "linkage": "complete"},
        {"pruning_units": ["conv_channels", "attention_heads", "ffn_dims", "attention_blocks", "ffn_blocks"]},
        {"l2_weight": 1.0, "l1_weight": 0.0},
    ],
)
def test_variants_of_the_recipe_train(layout, tmp_path, clips, recipe):
    trainer = make_trainer(tmp_path, clips, tiny_teacher(layout), recipe, max_steps=3, save_strategy="no")
    trainer.train()
    left = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert abs(left / trainer.teachers[0].num_parameters - 0.25) < 0.01
    least = 1 / (16 * 0.25 * trainer.teacher.config.hidden_size)
    assert trainer.learning_rates[1] == pytest.approx(least * 2**0.5 if layout == "large" else least)
    if "layer_groups" in recipe:
        assert trainer.layer_similarity is None
        assert trainer.layer_groups == recipe["layer_groups"]
    number = 2 if recipe.keys() & {"projection_groups", "student_layers"} else 0
    assert len(trainer.distiller.projections) == number
    if not recipe.get("include_embeddings", True):
        assert min(layer for group in trainer.layer_groups for layer in group) == 1
    assert np.isfinite(trainer.evaluate()["eval_distillation_loss"])


def test_gradient_checkpointing_and_bf16_train(tmp_path, clips):
    kwargs = {"max_steps": 3, "save_strategy": "no", "bf16": True, "gradient_checkpointing": True}
    trainer = make_trainer(tmp_path, clips, **kwargs)
    trainer.train()
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert np.isfinite(trainer.evaluate()["eval_distillation_loss"])


@pytest.mark.parametrize("autocast", [True, False])
def test_targets_need_no_weights_in_float32_under_autocast(tmp_path, clips, autocast):
    trainer = make_trainer(tmp_path, clips, bf16=True)
    trainer.accelerator.native_amp = autocast  # False with DeepSpeed
    trainer.layer_groups = [[0, 1], [2]]
    (targets,) = trainer.teacher_targets(torch.randn(2, 4000))
    assert targets.dtype == torch.float32 and targets.isfinite().all()
    weight = trainer.encoders[1].encoder.layers[0].feed_forward.output_dense.weight
    assert weight.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.teacher.parameters())


def test_a_pruned_student_is_distilled_in_one_stage(tmp_path, clips):
    student = build_student(tiny_teacher())
    add_gates(student)
    fit_gates(student, sum(p.numel() for p in tiny_teacher().parameters()) // 2)
    prune(student)
    shapes = {name: tensor.shape for name, tensor in student.state_dict().items()}
    trainer = make_trainer(tmp_path, clips, model=student, recipe={"final_steps": 4}, max_steps=4)
    before = trainer.evaluate()["eval_distillation_loss"]
    trainer.train()
    assert {name: tensor.shape for name, tensor in trainer.model.state_dict().items()} == shapes
    assert trainer.evaluate()["eval_distillation_loss"] < before


def test_only_the_cut(tmp_path, clips):
    trainer = make_trainer(tmp_path, clips, recipe={"final_steps": 0}, max_steps=3)
    trainer.train()
    assert trainer.stage == 3
    assert not trainer.model.named_gates()
    resumed = make_trainer(tmp_path, clips, recipe={"final_steps": 0}, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    expected, actual = trainer.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_a_stream_shorter_than_a_stage_begins_again(tmp_path, clips):
    import datasets

    stream = datasets.Dataset.from_list(
        [{"input_values": clip["input_values"].tolist()} for clip in clips[:8]]
    ).to_iterable_dataset()
    trainer = make_trainer(tmp_path, stream, evaluate_on=clips[:2], save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 9


def test_learned_multipliers_drive_the_sparsity_past_the_target(tmp_path, clips):
    trainer = make_trainer(
        tmp_path,
        clips,
        recipe={
            "final_steps": 0,
            "target_sparsity": 0.5,
            "lagrange_multiplier": "learned",
            "gate_learning_rate": 0.2,
            "sparsity_warmup_steps": 10,
        },
        max_steps=120,
        save_strategy="no",
        lr_scheduler_type="constant",
        per_device_train_batch_size=1,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "sparsity" in row]
    assert rows[0]["sparsity"] < 0.2
    assert max(row["sparsity"] for row in rows) > 0.5
    # Once past it, the first multiplier falls again.
    assert rows[-1]["lambda_1"] < max(row["lambda_1"] for row in rows)
    left = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert abs(left / trainer.teachers[0].num_parameters - 0.5) < 0.01


@pytest.mark.parametrize("multiplier", ["estimated", "learned"])
def test_gates_have_a_limit_unless_the_recipe_is_the_published_one(tmp_path, clips, multiplier):
    largest = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if trainer.stage == 1:
                gates = trainer.student.gating.gates
                largest.append(max(gate.log_alpha.max().item() for gate in gates))

    recipe = {"lagrange_multiplier": multiplier, "layer_groups": [[0, 1], [2, 3]]}
    trainer = make_trainer(tmp_path, clips, recipe=recipe, callbacks=[Watch()], save_strategy="no")
    trainer.train()
    assert largest
    # They start at 4.6, on average, and at first some open further.
    if multiplier == "estimated":
        assert max(largest) == pytest.approx(4.6)
    else:
        assert max(largest) > 4.65


def test_an_estimated_multiplier_follows_the_target_whatever_the_scale_of_the_loss(tmp_path, clips):
    def sparsities(scale: float) -> np.ndarray:
        trainer = make_trainer(
            tmp_path / str(scale),
            clips,
            recipe={
                "final_steps": 0,
                "target_sparsity": 0.75,
                "gate_learning_rate": None,
                "l1_weight": scale,
                "cosine_weight": scale,
            },
            max_steps=80,
            save_strategy="no",
            max_grad_norm=0.0,
            adam_epsilon=1e-15,  # the default does not scale with the loss, and gradients of a near copy are small
            per_device_train_batch_size=1,
        )
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        # With a random teacher, none of whose units matter less than others, a gap is left; the cut closes it.
        assert rows[-1]["sparsity"] == pytest.approx(rows[-1]["target_sparsity"], abs=0.06)
        return np.array([row["sparsity"] for row in rows])

    np.testing.assert_allclose(sparsities(100.0), sparsities(1.0), atol=0.01)


def test_the_gap_to_the_target_adds_up_over_the_steps(tmp_path, clips, monkeypatch):
    gaps, add = [], MultiplierEstimate.add_gap

    def add_and_note(estimate, gap, learning_rate):
        gaps.append((gap.item(), learning_rate))
        add(estimate, gap, learning_rate)

    monkeypatch.setattr(MultiplierEstimate, "add_gap", add_and_note)
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "eval_strategy": "steps"}
    trainer = make_trainer(tmp_path, clips, callbacks=[KillAt(5)], eval_steps=2, **settings)
    with pytest.raises(Kill):
        trainer.train()
    assert len(gaps) == 5 and all(abs(gap) > 0.01 for gap, _ in gaps)
    assert {rate for _, rate in gaps} == {trainer.skill_config.resolve_gate_learning_rate(6)}
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")["multiplier_estimate.gap_sum"]
    assert saved.item() == pytest.approx(sum(gap * rate for gap, rate in gaps[:4]), rel=1e-5)
    trainer = make_trainer(tmp_path, clips, **settings | {"eval_steps": 2})
    trainer.train(resume_from_checkpoint=True)
    assert len(gaps) == 7 and gaps[5] == gaps[4]


@pytest.mark.parametrize("model", [pytest.param("copy", marks=pytest.mark.nightly), "pruned"])
def test_macs_as_the_budget(layout, tmp_path, clips, model, caplog):
    """Killed in stage 1 and resumed; from an exact copy of the teacher, or from a student that was pruned before."""
    teacher = tiny_teacher(layout)
    whole, recipe = count_macs(teacher, 1.5), {"budget": "macs", "budget_seconds": 1.5, "target_sparsity": 0.6}
    student = None
    if model == "pruned":
        student = build_student(teacher)
        student.add_gates(["ffn_dims"])
        fit_gates(student, round(0.8 * teacher.num_parameters()))
        student.prune()
    with pytest.raises(Kill):
        make_trainer(tmp_path, clips, teacher, recipe, [KillAt(3)], copy.deepcopy(student)).train()
    trainer = make_trainer(tmp_path, clips, teacher, recipe, model=student)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.teacher_cost == whole
    share = count_macs(trainer.model, 1.5) / whole
    assert abs(share - 0.4) < 0.005
    assert "multiply-accumulates for 1.5 seconds of audio, but the target is" in caplog.text
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["sparsity"] == pytest.approx(1 - share, abs=1e-6)
    assert rows[-1]["target_sparsity"] == 0.6
    # The share of parameters is another one.
    assert abs(trainer.model.num_parameters() / teacher.num_parameters() - share) > 0.01


def test_macs_are_counted_at_the_rate_of_the_audio(tmp_path):
    trainer = SkillDistillationTrainer(
        tiny_teacher(),
        SkillConfig(budget="macs", budget_seconds=3.0),
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        processing_class=Wav2Vec2FeatureExtractor(sampling_rate=8_000),
    )
    assert trainer.teacher_cost == count_macs(tiny_teacher(), 3.0, sampling_rate=8_000)


def test_epochs_count_for_both_stages(tmp_path, clips):
    trainer = make_trainer(tmp_path, clips, max_steps=-1, num_train_epochs=2, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 10
    assert (trainer.steps.joint, trainer.steps.final) == (7, 3)


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        ({"num_clusters": 5}, "num_clusters.*4 layers"),
        ({"num_clusters": 4, "include_embeddings": False}, "num_clusters.*3 layers"),
        ({"num_clusters": None, "layer_groups": [[0], [99]]}, "layer 99"),
        ({"pruning_units": ["ffn_dims"]}, "target_sparsity.*ffn_dims.*teacher's parameters can"),
        ({"pruning_units": ["ffn_dims"], "budget": "macs"}, "ffn_dims.*multiply-accumulates for 10 seconds of audio"),
        ({"budget": "macs", "budget_seconds": 0.02}, "`budget_seconds` is 0.02, 320 samples.* 400 for one frame"),
        ({"projection_groups": [[0]]}, "projection_groups"),
    ],
)
def test_recipe_that_does_not_fit_the_teacher(tmp_path, clips, recipe, match):
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, clips, recipe=recipe)


def test_teachers_that_cannot_be(tmp_path, clips):
    config = SEWConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8)
    SEWModel(config).save_pretrained(tmp_path / "sew")
    with pytest.raises(ValueError, match="is a `sew`; teachers"):
        make_trainer(tmp_path, clips, teacher=str(tmp_path / "sew"))
    with pytest.raises(ValueError, match="missing` cannot be loaded"):
        make_trainer(tmp_path, clips, teacher=str(tmp_path / "missing"))
    tiny_teacher().save_pretrained(tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="weights of teacher `.*torn` cannot be loaded"):
        make_trainer(tmp_path, clips, teacher=str(tmp_path / "torn"))
    weights.unlink()
    with pytest.raises(ValueError, match="weights of teacher `.*torn` cannot be loaded"):
        make_trainer(tmp_path, clips, teacher=str(tmp_path / "torn"))
    with pytest.raises(ValueError, match="hidden_size"):
        other = WavLMForSkillStudent.config_class(**tiny_config(hidden_size=64).to_dict())
        make_trainer(tmp_path, clips, model=WavLMForSkillStudent(other))
    with pytest.raises(ValueError, match="WavLMForSkillStudent without gates"):
        make_trainer(tmp_path, clips, model=tiny_teacher())


def test_teacher_from_a_directory_with_a_feature_extractor(tmp_path, clips):
    tiny_teacher().half().save_pretrained(tmp_path / "teacher")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path / "teacher")
    rng = np.random.default_rng(0)
    rows = [{"audio": {"array": rng.standard_normal(40_000), "sampling_rate": 16_000}, "text": "a"} for _ in range(8)]
    trainer = make_trainer(tmp_path / "out", rows, teacher=str(tmp_path / "teacher"), max_steps=3)
    assert trainer.processing_class.do_normalize
    assert trainer.teacher.dtype == torch.float32
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_sampling_by_length(tmp_path, clips, strategy):
    rows = datasets.Dataset.from_list([row | {"length": len(row["input_values"])} for row in clips])
    settings = {"train_sampling_strategy": strategy, "max_steps": 3}
    trainer = make_trainer(tmp_path, rows, evaluate_on=rows.select(range(5)), **settings)
    trainer.train()
    assert trainer.state.global_step == 3


def test_defaults_are_the_published_recipe(tmp_path):
    args = SkillTrainingArguments(output_dir=str(tmp_path))
    assert (args.max_steps, args.learning_rate, args.max_grad_norm) == (75_000, None, 10.0)
    assert SkillConfig().resolve_learning_rates(args.learning_rate, args.max_steps, 768) == (2e-4, 1e-4)
    assert args.get_warmup_steps(50_000) == 15_000
    assert args.weight_decay == 0
    assert args.logging_steps == 50
    assert args.save_total_limit == 2


@pytest.mark.parametrize(("steps", "logging_steps"), [(1, 1), (60, 3), (999, 49), (1000, 50), (-1, 50)])
def test_a_short_run_has_lines_to_show(tmp_path, steps, logging_steps):
    assert SkillTrainingArguments(output_dir=str(tmp_path), max_steps=steps).logging_steps == logging_steps
    assert SkillTrainingArguments(output_dir=str(tmp_path), max_steps=steps, logging_steps=7).logging_steps == 7


def train_on_eight_clips(output, number):
    """Eight clips a step, on one of `number` processes."""
    rng = np.random.default_rng(0)
    lengths = [9_000, 12_000, 15_000, 30_000, 8_000, 20_000, 25_000, 11_000]
    clips = [{"input_values": rng.standard_normal(length).astype(np.float32)} for length in lengths]
    trainer = make_trainer(
        output,
        clips,
        tiny_teacher("large", hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0),
        {"num_clusters": 2, "final_steps": 2, "shared_gate_noise": True},
        max_steps=6,
        save_strategy="no",
        optim="sgd",
        learning_rate=0.1,
        per_device_train_batch_size=8 // number,
        min_seconds=2.0,  # so that all clips are padded, to the same length on each process
    )
    trainer.train()
    trainer.save_model(str(output))
    return trainer, (trainer.layer_groups, trainer.model.state_dict(), trainer.state.log_history)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    results = run_in_processes(train_on_eight_clips, tmp_path / "2", number=2)
    (groups, weights, logs), (other_groups, other_weights, _) = results
    _, (single_groups, single_weights, _) = train_on_eight_clips(tmp_path / "1", number=1)
    assert all((tmp_path / number / "model.safetensors").is_file() for number in "12")
    assert groups == other_groups == single_groups
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    for name, tensor in single_weights.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-3)
    losses = [row["distillation_loss"] for row in logs if "loss" in row and row["stage"] == 2]
    assert losses[-1] < losses[0]
    assert type(AutoModel.from_pretrained(tmp_path / "2")) is WavLMForSkillStudent
    assert type(WavLMForSkillStudent.from_pretrained(tmp_path / "2").to_wavlm()) is WavLMModel


# ---- Clips that cannot be read ----

BAD = {"audio": np.full(40_000, np.nan, np.float32)}


def test_held_out_loss_does_not_depend_on_the_batch_size_whatever_is_bad(clips, tmp_path):
    """Group norm, clips of many lengths, and batches of which all, some or no clips can be read."""
    heldout = [BAD, BAD, *clips[:3], BAD, clips[3], BAD]
    student = build_student(tiny_teacher())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    losses = {}
    for size, workers in ((1, 0), (2, 0), (2, 2), (5, 0), (8, 0)):
        for rows in (heldout, clips[:4]):
            settings = {"per_device_eval_batch_size": size, "dataloader_num_workers": workers}
            trainer = make_trainer(tmp_path, clips, model=student, evaluate_on=rows, **settings)
            trainer.layer_groups = [[0, 1], [2, 3]]
            metrics = trainer.evaluate()
            assert metrics["eval_loss"] == metrics["eval_distillation_loss"]
            losses[size, workers, len(rows)] = metrics["eval_loss"]
            assert trainer.eval_data_collator.num_skipped == len(rows) - 4
    assert list(losses.values()) == pytest.approx([next(iter(losses.values()))] * len(losses), abs=1e-5)
    assert -0.99 < losses[1, 0, 4] < 1


@pytest.mark.parametrize("layout, batch_size, accumulate", [("base", 1, 1), ("large", 2, 2)])
def test_training_skips_what_cannot_be_read(clips, tmp_path, caplog, batch_size, accumulate, layout):
    # More than a batch, so that some batches have nothing else, the first of a stage too.
    rows = [BAD] * 5 + [{"audio": clip["input_values"]} for clip in clips[:7]]
    trainer = make_trainer(
        tmp_path,
        rows,
        tiny_teacher(layout),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        max_steps=12,
        evaluate_on=rows,
        recipe={"layer_groups": [[0, 1], [2, 3]], "calibration_samples": 12},
    )
    trainer.train()
    assert trainer.data_collator.num_skipped >= 5
    assert "Clips left out of training batches so far" in caplog.text
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    logged = [row for row in trainer.state.log_history if "distillation_loss" in row]
    assert logged and all(row["distillation_loss"] != 0 and np.isfinite(row["grad_norm"]) for row in logged)
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_a_batch_without_a_clip_changes_nothing_but_the_penalty(clips, tmp_path):
    recipe = {"layer_groups": [[0, 1], [2, 3]], "lagrange_multiplier": "learned"}
    trainer = make_trainer(tmp_path, clips, recipe=recipe)
    trainer._setup()
    trainer.steps = trainer.skill_config.resolve_steps(9)
    trainer.stage = 1
    trainer.student.add_gates(trainer.skill_config.pruning_units)
    trainer.student.config.apply_spec_augment = False
    distiller = trainer._make_distiller().train()
    batch = trainer.data_collator([BAD, BAD])
    outputs = distiller(**batch, targets=trainer.teacher_targets(**batch), gate_seed=0, target_sparsity=0.5)
    assert outputs["num_frames"] == 0
    assert all(outputs[name] == 0 for name in ("distillation_loss", "l1_loss", "cosine_loss"))
    assert outputs["loss"] == outputs["lagrangian_loss"]
    outputs["loss"].backward()
    for name, parameter in distiller.named_parameters():
        if parameter.grad is not None and not name.endswith("log_alpha") and "lambda" not in name:
            assert not parameter.grad.any(), name
    assert distiller.lambda_1.grad.isfinite()


@pytest.mark.parametrize("where", ["train", "heldout"])
def test_sets_that_are_mostly_bad_are_refused_at_the_start(clips, tmp_path, where):
    bad = [BAD] * 4 + clips[:3]
    trainer = make_trainer(
        tmp_path,
        bad if where == "train" else clips,
        evaluate_on={"a": clips[:3], "b": bad} if where == "heldout" else clips[:3],
        recipe={"layer_groups": [[0, 1], [2, 3]], "calibration_samples": 20},
    )
    with pytest.raises(ValueError, match="4 of the 7 clips tried cannot be read; the first: row .* NaN"):
        trainer.train()
    assert trainer.state.global_step == 0


class Vanishing(torch.utils.data.Dataset):
    """Clips of a disk that goes away."""

    def __init__(self, clips):
        self.clips, self.is_gone = clips, False

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        return BAD if self.is_gone else {"audio": self.clips[index]["input_values"]}


class TakeAway(TrainerCallback):
    def __init__(self, dataset):
        self.dataset = dataset

    def on_step_end(self, args, state, control, **kwargs):
        self.dataset.is_gone = state.global_step >= 3


def test_clips_that_vanish_end_the_run(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(unreadable_clips, "CLIPS_JUDGED", 8)
    rows = Vanishing(clips)
    trainer = make_trainer(tmp_path, rows, evaluate_on=clips[:3], callbacks=[TakeAway(rows)])
    with pytest.raises(ValueError, match=r"% of the clips of the last 2 steps cannot be read.*checkpoint-\d") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert 3 < trainer.state.global_step < trainer.steps.joint + 1
