"""
Every field of `TrainingArguments` and every public method of `Trainer`: honoured in both stages, in a way of its own,
or refused by name before anything is loaded. A field that a newer transformers adds fails here until it is classified.
"""

import copy
import dataclasses
import inspect
import json
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_teacher
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, Wav2Vec2FeatureExtractor

from skill_hf import SkillConfig, SkillDistillationTrainer, SkillTrainingArguments
from skill_hf.compression.pruning import add_gates, fit_gates, prune
from skill_hf.data import SpeechCollator
from skill_hf.distillation import run_validation
from skill_hf.models.families import build_student
from skill_hf.recipe.argument_validation import CHOICES, FLAGS, NUMBERS, REFUSED, REFUSED_OF_TRAINER, check_arguments


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
WORKERS = {"dataloader_num_workers": 2}

# Options that change what is trained, and their companions: resumed in both stages equals uninterrupted, bit for bit.
HONOURED = {
    "per_device_train_batch_size": {"per_device_train_batch_size": 2},
    "num_train_epochs": {"max_steps": -1, "num_train_epochs": 2},
    "max_steps": {"max_steps": 7},
    "learning_rate": {"learning_rate": 3e-3},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
    "warmup_steps": {"warmup_steps": 2},
    "optim": {"optim": "adafactor"},
    "optim_args": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "weight_decay": {"weight_decay": 0.1},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 1e-2},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "max_grad_norm": {"max_grad_norm": 0.01},
    "bf16": {"bf16": True},
    "seed": {"seed": 1},
    "data_seed": {"data_seed": 7},
    "dataloader_drop_last": {"dataloader_drop_last": True, "max_steps": -1, "num_train_epochs": 2},
    # Its loader draws nothing from the global generator, so dropout differs.
    "dataloader_persistent_workers": WORKERS | {"dataloader_persistent_workers": True},
    "train_sampling_strategy": {"train_sampling_strategy": "group_by_length"},
    "load_best_model_at_end": {"load_best_model_at_end": True, "learning_rate": 0.05, **EVALUATED},
}
# Of these, those that reach the Trainer as others do, and some that have tests of their own.
LIKE_OTHERS = ("max_steps", "lr_scheduler_kwargs", "optim_args", "weight_decay", "adam_beta1", "adam_beta2")
LIKE_OTHERS += ("adam_epsilon", "data_seed", "dataloader_drop_last", "train_sampling_strategy")
LIKE_OTHERS += ("load_best_model_at_end", "dataloader_persistent_workers")
# Others by the same test: kinds of the above, and options that must change nothing.
MORE_KINDS = [
    {"train_sampling_strategy": "batch_rebalance"},
    {"train_sampling_strategy": "sequential"},
    {"optim": "rmsprop"},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}, **EVALUATED},
    {"lr_scheduler_type": "greedy", **EVALUATED},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1}},
    {"save_strategy": "best", "metric_for_best_model": "l1_loss", **EVALUATED},
]
# Training is the same with them as without, bit for bit, and resuming is exact.
WITHOUT_EFFECT = {
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {}},
    "activation_checkpointing": {"activation_checkpointing": True},
    "activation_checkpointing_kwargs": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    },
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "dataloader_num_workers": WORKERS,
    "dataloader_prefetch_factor": WORKERS | {"dataloader_prefetch_factor": 1},
    "dataloader_multiprocessing_context": WORKERS | {"dataloader_multiprocessing_context": "fork"},
    "dataloader_pin_memory": {"dataloader_pin_memory": False},
    "remove_unused_columns": {"remove_unused_columns": False},
    "length_column_name": {"length_column_name": "other"},
    "logging_strategy": {"logging_strategy": "epoch"},
    "logging_steps": {"logging_steps": 0.3},
    "logging_first_step": {"logging_first_step": True},
    "logging_nan_inf_filter": {"logging_nan_inf_filter": False},
    "log_on_each_node": {"log_on_each_node": False},
    "log_level": {"log_level": "error"},
    "log_level_replica": {"log_level_replica": "error"},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "non_padding"},
    "disable_tqdm": {"disable_tqdm": False},
    "report_to": {"report_to": []},
    "run_name": {"run_name": "name"},
    "project": {"project": "name"},
    "eval_do_concat_batches": {"eval_do_concat_batches": False, **EVALUATED},
    "eval_use_gather_object": {"eval_use_gather_object": True, **EVALUATED},
    "eval_accumulation_steps": {"eval_accumulation_steps": 1, **EVALUATED},
    "per_device_eval_batch_size": {"per_device_eval_batch_size": 1, **EVALUATED},
    "eval_strategy": {"eval_strategy": "steps"},
    "eval_steps": EVALUATED,
    "eval_delay": EVALUATED | {"eval_delay": 4},
    "eval_on_start": EVALUATED | {"eval_on_start": True},
    "prediction_loss_only": EVALUATED | {"prediction_loss_only": True},
    "metric_for_best_model": EVALUATED | {"metric_for_best_model": "eval_distillation_loss"},
    "greater_is_better": EVALUATED | {"metric_for_best_model": "loss", "greater_is_better": True},
    "save_strategy": {"save_strategy": "steps"},
    "save_steps": {"save_steps": 2},
    "save_on_each_node": {"save_on_each_node": True},
    "restore_callback_states_from_checkpoint": {"restore_callback_states_from_checkpoint": True},
    "ddp_find_unused_parameters": {"ddp_find_unused_parameters": True},
    "ddp_bucket_cap_mb": {"ddp_bucket_cap_mb": 25},
    "ddp_broadcast_buffers": {"ddp_broadcast_buffers": False},
    "ddp_static_graph": {"ddp_static_graph": False},
    "ddp_timeout": {"ddp_timeout": 100},
    "skip_memory_metrics": {"skip_memory_metrics": False},
    "tf32": {"tf32": False},
}
# Honoured in a way of their own, which another test (or the hardware that it needs) shows.
OWN_WAY = {
    "output_dir": "where all is written",
    "use_cpu": "all tests",
    "local_rank": "set by the launcher",
    "fp16": "refused on CPUs",
    "torch_compile": "test_shrinking.py",
    "torch_compile_backend": "checked by name",
    "torch_compile_mode": "checked by name",
    "full_determinism": "test_full_determinism",
    "debug": "test_debug",
    "accelerator_config": "test_accelerator_config",
    "dataloader_in_order": "refused if False",
    "average_tokens_across_devices": "refused if False",
    "ignore_data_skip": "test_ignore_data_skip",
    "save_total_limit": "test_save_total_limit",
    "enable_jit_checkpoint": "the state at a signal is that of any other checkpoint",
    "push_to_hub": "test_the_hub_is_tried_first",
    "hub_model_id": "test_hub.py",
    "hub_token": "test_hub.py",
    "hub_private_repo": "test_hub.py",
    "hub_revision": "test_hub.py",
    "hub_strategy": "checkpoints are not published: two values are refused",
    "ddp_backend": "checked by name",
    "trackio_space_id": "for trackio alone",
    "trackio_bucket_id": "for trackio alone",
    "trackio_static_space_id": "for trackio alone",
    "do_train": "for scripts: the trainer does not read it",
    "do_eval": "for scripts: the trainer does not read it",
    "do_predict": "for scripts: the trainer does not read it",
    "resume_from_checkpoint": "for scripts: the trainer does not read it",
}

METHODS_OVERRIDDEN = [
    "compute_loss",
    "create_accelerator_and_postprocess",
    "create_model_card",
    "create_optimizer",
    "create_optimizer_and_scheduler",
    "create_scheduler",
    "evaluate",
    "evaluation_loop",
    "get_batch_samples",
    "get_eval_dataloader",
    "get_test_dataloader",
    "get_train_dataloader",
    "hyperparameter_search",
    "init_hf_repo",
    "log",
    "loss_is_scaled_for_ga",
    "predict",
    "prediction_step",
    "push_to_hub",
    "train",
    "training_step",
]
METHODS_INHERITED = [
    "add_callback",
    "autocast_smart_context_manager",
    "call_model_init",
    "compute_loss_context_manager",
    "end",
    "floating_point_ops",
    "get_cp_size",
    "get_decay_parameter_names",
    "get_learning_rates",
    "get_num_trainable_parameters",
    "get_optimizer_cls_and_kwargs",
    "get_optimizer_group",
    "get_sp_size",
    "get_total_train_batch_size",
    "get_tp_size",
    "is_local_process_zero",
    "is_world_process_zero",
    "log_metrics",
    "metrics_format",
    "num_examples",
    "pop_callback",
    "remove_callback",
    "save_metrics",
    "save_model",
    "save_state",
    "set_initial_training_values",
    "store_flos",
]

FIELDS = {item.name for item in dataclasses.fields(TrainingArguments)}
OWN_FIELDS = {item.name for item in dataclasses.fields(SkillTrainingArguments)} - FIELDS
RNG = np.random.default_rng(0)
CLIPS = [
    {"input_values": RNG.standard_normal(n).astype(np.float32), "length": n / 16_000, "other": n}
    for n in RNG.integers(4000, 8000, 14).tolist()
]


def make_trainer(output_dir, callbacks=None, model=None, recipe=None, rows=CLIPS, teacher=None, **kwargs):
    """Stage 1 ends at step 4 of 6; five steps are an epoch."""
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "save_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    own = {name: kwargs.pop(name) for name in ("optimizer_cls_and_kwargs", *REFUSED_OF_TRAINER) if name in kwargs}
    eval_dataset = kwargs.pop("eval_dataset", CLIPS[:4])
    settings = {"layer_groups": [[0, 1], [2]], "calibration_samples": 2, "calibration_seconds": 0.5}
    return SkillDistillationTrainer(
        teacher=tiny_teacher(num_hidden_layers=2) if teacher is None else teacher,
        skill_config=SkillConfig(**settings | {"gate_learning_rate": 0.1} | (recipe or {})),
        args=TrainingArguments(output_dir=str(output_dir), **arguments | kwargs),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        model=model,
        callbacks=callbacks,
        data_collator=SpeechCollator(Wav2Vec2FeatureExtractor(do_normalize=False), min_seconds=0.2),
        **own,
    )


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def differing(expected, actual) -> list[str]:
    assert expected.keys() == actual.keys()
    return [
        name
        for name, tensor in expected.items()
        if tensor.shape != actual[name].shape or not torch.equal(tensor, actual[name])
    ]


def train_and_resume(directory, make_callbacks=lambda: None, **kwargs):
    """Trains, resumes from checkpoints of both stages, asserts that the students are equal; returns the trainer."""
    trainer = make_trainer(directory, callbacks=make_callbacks(), **kwargs)
    trainer.train()
    assert trainer.stage == 3
    expected, joint = weights_of(trainer), trainer.steps.joint
    saved = sorted(int(path.name.removeprefix("checkpoint-")) for path in Path(directory).glob("checkpoint-*"))
    within = [
        [step for step in saved if step < joint],
        [step for step in saved if joint <= step < trainer.steps.total],
    ]
    for steps in within:
        if steps:
            again = make_trainer(directory, callbacks=make_callbacks(), **kwargs)
            again.train(resume_from_checkpoint=str(Path(directory) / f"checkpoint-{steps[len(steps) // 2]}"))
            assert differing(expected, weights_of(again)) == []
    assert any(within)
    shutil.rmtree(directory)
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("plain"))
    trainer.train()
    return weights_of(trainer)


# ---- The tables ----


def test_every_field_is_classified():
    tables = [HONOURED.keys(), WITHOUT_EFFECT.keys(), OWN_WAY.keys(), REFUSED.keys() - OWN_WAY.keys()]
    assert set().union(*tables) >= FIELDS, "classify what a newer transformers has added"
    assert sum(map(len, tables)) == len(set().union(*tables))
    # `transformers` before 5.24 has no `activation_checkpointing`.
    assert set().union(*tables) - FIELDS <= {"activation_checkpointing", "activation_checkpointing_kwargs"}
    assert set(NUMBERS) | set(CHOICES) | set(REFUSED) <= FIELDS | OWN_FIELDS
    for item in dataclasses.fields(TrainingArguments):
        number = isinstance(item.default, (int, float)) and not isinstance(item.default, bool)
        if number and item.name not in (*REFUSED, "local_rank"):
            assert item.name in NUMBERS
        if isinstance(item.default, bool):
            assert item.name in FLAGS or item.name == "fsdp"


def test_every_method_is_classified():
    public = {name for name in dir(Trainer) if not name.startswith("_")}
    assert public == {*METHODS_OVERRIDDEN, *METHODS_INHERITED}
    overridden = {name for name in public if getattr(SkillDistillationTrainer, name) is not getattr(Trainer, name)}
    assert overridden == set(METHODS_OVERRIDDEN)
    arguments = inspect.signature(Trainer.__init__).parameters.keys() - {"self"}
    own = inspect.signature(SkillDistillationTrainer.__init__).parameters.keys()
    assert arguments - own == {*REFUSED_OF_TRAINER, "callbacks", "optimizer_cls_and_kwargs"}


# ---- Honoured ----


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param(kwargs, id=name, marks=[pytest.mark.nightly] if name in LIKE_OTHERS else [])
        for name, kwargs in HONOURED.items()
    ],
)
def test_honoured_in_both_stages(kwargs, plain, tmp_path):
    trainer = train_and_resume(tmp_path / "run", **{"save_steps": 2} | kwargs)
    weights = weights_of(trainer)
    assert weights.keys() != plain.keys() or differing(plain, weights)


@pytest.mark.nightly
@pytest.mark.parametrize("kwargs", MORE_KINDS, ids=lambda kwargs: "-".join(map(str, list(kwargs.values())[:1])))
def test_more_kinds(kwargs, tmp_path):
    train_and_resume(tmp_path / "run", **{"save_steps": 2} | kwargs)


# Those that don't touch the loop run together: one run each would only take time.
ALONE = (
    "gradient_checkpointing",
    "activation_checkpointing_kwargs",
    "eval_on_start",
    "restore_callback_states_from_checkpoint",
    "logging_strategy",
)
TOGETHER = {}
for _name, _kwargs in WITHOUT_EFFECT.items():
    if _name in FIELDS and _name not in (*ALONE, "logging_steps", "activation_checkpointing", "skip_memory_metrics"):
        TOGETHER |= {key: value for key, value in _kwargs.items() if "checkpointing" not in key}


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.nightly) for name in ALONE if name in FIELDS), "all the others"]
)
def test_options_that_change_nothing(name, plain, tmp_path):
    kwargs = TOGETHER if name == "all the others" else WITHOUT_EFFECT[name]
    trainer = train_and_resume(tmp_path / "run", **{"save_steps": 2} | kwargs)
    if "checkpointing" in name:  # recomputed, hence rounded in another order
        for key, tensor in weights_of(trainer).items():
            torch.testing.assert_close(tensor, plain[key], atol=1e-4, rtol=1e-3)
    else:
        assert differing(plain, weights_of(trainer)) == []


def test_measuring_memory_changes_nothing(tmp_path):
    """Its thread takes the interpreter a hundred times a second, so the run is short."""
    weights = []
    for skip in (True, False):
        trainer = make_trainer(tmp_path, skip_memory_metrics=skip, max_steps=2, save_strategy="no")
        trainer.train()
        weights.append(weights_of(trainer))
    assert differing(*weights) == []


def test_workers_that_outlive_an_epoch_crop_anew(tmp_path):
    """Six epochs of one batch each: the crops of a batch that comes again are others."""
    rows = CLIPS[:2]
    seen = {}
    for persistent in (False, True):
        kwargs = {"dataloader_num_workers": 1, "dataloader_persistent_workers": persistent}
        trainer = make_trainer(tmp_path, rows=rows, save_strategy="no", **kwargs)
        batches, compute_loss = [], trainer.compute_loss

        def record(model, inputs, *args, batches=batches, compute_loss=compute_loss, **kwargs):
            if model.training:
                batches.append(inputs["input_values"].sort(0).values)
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = record
        trainer.train()
        seen[persistent] = batches
    assert len(seen[True]) == 6
    assert all(torch.equal(*pair) for pair in zip(seen[True], seen[False], strict=True))
    assert not torch.equal(seen[True][0], seen[True][1])


@pytest.mark.nightly
def test_rebalanced_and_grouped_by_a_column(tmp_path):
    rows = datasets.Dataset.from_list([row | {"input_values": row["input_values"].tolist()} for row in CLIPS])
    kwargs = {"train_sampling_strategy": "group_by_length", "length_column_name": "other"}
    train_and_resume(tmp_path / "run", rows=rows, **kwargs)


def test_best_student_of_stage_2(tmp_path):
    kwargs = {"load_best_model_at_end": True, "metric_for_best_model": "distillation_loss", "learning_rate": 0.05}
    kwargs |= EVALUATED | {"max_steps": 9}
    trainer = make_trainer(tmp_path, recipe={"final_learning_rate": 0.5}, **kwargs)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_distillation_loss" in row]
    best = min(
        (row for row in rows if row["step"] > trainer.steps.joint), key=lambda row: row["eval_distillation_loss"]
    )
    assert best["step"] < 9
    assert trainer.evaluate()["eval_distillation_loss"] == pytest.approx(best["eval_distillation_loss"], abs=1e-6)
    assert trainer.args.load_best_model_at_end


@pytest.mark.parametrize("restored", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_early_stopping(tmp_path, restored):
    """Never in stage 1; stage 2 is finished by it, and a resumed run stops where the other one did."""
    kwargs = EVALUATED | {"metric_for_best_model": "loss", "max_steps": 15, "learning_rate": 0.05}
    kwargs |= {"load_best_model_at_end": True, "restore_callback_states_from_checkpoint": restored}
    # An improvement of 10 is none that a loss of this kind makes.
    trainer = train_and_resume(tmp_path / "run", lambda: [EarlyStoppingCallback(2, 10.0)], **kwargs)
    assert trainer.steps.joint == 10
    assert trainer.state.global_step == 13
    trainer.save_model(str(tmp_path / "student"))


def test_a_run_that_stopped_early_is_finished(tmp_path):
    kwargs = EVALUATED | {"metric_for_best_model": "loss", "max_steps": 9}
    expected = make_trainer(tmp_path, callbacks=[EarlyStoppingCallback(1, 10.0)], **kwargs)
    expected.train()
    assert expected.state.global_step == 8
    again = make_trainer(tmp_path, callbacks=[EarlyStoppingCallback(1, 10.0)], **kwargs)
    again.train(resume_from_checkpoint=True)
    assert (again.stage, again.state.global_step) == (3, 8)
    assert differing(weights_of(expected), weights_of(again)) == []


def test_a_stateful_callback_that_the_checkpoint_does_not_know(tmp_path):
    kwargs = EVALUATED | {"metric_for_best_model": "loss"}
    make_trainer(tmp_path, **kwargs).train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    again = make_trainer(tmp_path, callbacks=[EarlyStoppingCallback(9)], **kwargs)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.state.global_step == 6


def test_full_determinism(tmp_path):
    try:
        train_and_resume(tmp_path / "run", full_determinism=True)
    finally:
        torch.use_deterministic_algorithms(False)


def test_debug(tmp_path):
    make_trainer(tmp_path, debug="underflow_overflow", save_strategy="no").train()


def test_ignore_data_skip(tmp_path):
    """It asks for a run that isn't the same: it starts its epoch from the beginning and ends all the same."""
    make_trainer(tmp_path).train()
    trainer = make_trainer(tmp_path, ignore_data_skip=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 6


def test_save_total_limit(tmp_path):
    make_trainer(tmp_path, save_total_limit=2).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}


def test_accelerator_config(tmp_path):
    config = {
        "non_blocking": True,
        "dispatch_batches": False,
        "gradient_accumulation_kwargs": {"sync_each_batch": True},
    }
    train_and_resume(tmp_path / "run", accelerator_config=config)


# ---- Methods ----


def test_predict_reads_whole_clips(tmp_path):
    trainer = make_trainer(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=3)
    trainer.eval_data_collator = dataclasses.replace(trainer.data_collator, crop="none")
    trainer.train()
    held_out = trainer.evaluate(CLIPS[:4])
    output = trainer.predict(
        datasets.Dataset.from_list([{"input_values": row["input_values"].tolist()} for row in CLIPS[:4]])
    )
    assert output.predictions is None and output.label_ids is None
    for name in trainer.evaluation_metrics:
        assert output.metrics[f"test_{name}"] == pytest.approx(held_out[f"eval_{name}"], abs=1e-6)
    assert trainer.model is trainer.student
    assert trainer.predict(CLIPS[:2], metric_key_prefix="x").metrics["x_loss"] != output.metrics["test_loss"]


def test_another_dataset_is_evaluated_with_persistent_workers(tmp_path):
    kwargs = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_trainer(tmp_path, save_strategy="no", **kwargs)
    trainer.train()
    losses = [trainer.evaluate(rows)["eval_loss"] for rows in (CLIPS[:2], CLIPS[2:4], CLIPS[:2])]
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("call", [lambda t: t.hyperparameter_search(), lambda t: t.create_optimizer_and_scheduler(9)])
def test_methods_that_are_refused(tmp_path, call):
    with pytest.raises(ValueError, match="cannot be called"):
        call(make_trainer(tmp_path))


# ---- Refused ----

NAN = math.nan
NOT_NUMBERS = (None, "abc", "1", NAN, math.inf, -math.inf, -1, [1], {}, True, np.float64("nan"), 10**400, 1j)
BAD_VALUES = {
    "max_steps": [0, 4.5, -2],
    "per_device_train_batch_size": [0, 2.5],
    "per_device_eval_batch_size": [0],
    "seconds_per_batch": [0],
    "seconds_per_step": [640],  # without `seconds_per_batch`
    "gradient_accumulation_steps": [0, 0.5],
    "adam_beta1": [1, 2],
    "adam_epsilon": [0],
    "learning_rate": [0],
    "logging_steps": [0, 2.5],
    "save_steps": [0, 1.5],
    "warmup_steps": [1.5],
    "save_total_limit": [0],
    "seed": [2**32, 2**40, 0.5],
    "dataloader_num_workers": [0.5],
    "dataloader_prefetch_factor": [2],
    "dataloader_persistent_workers": [True, 1, "true"],
    "dataloader_multiprocessing_context": ["fork", "thread"],
    "train_sampling_strategy": ["foo", None],
    "optim": ["adam", 1],
    "lr_scheduler_type": ["foo"],
    "eval_strategy": ["never"],
    "save_strategy": ["all"],
    "hub_strategy": ["checkpoint", "all_checkpoints", "x"],
    "log_level": ["loud", 3],
    "report_to": ["wandb", "foo", 5, ["comet_ml"]],
    "debug": ["tpu_metrics_debug", "foo"],
    "bf16": ["false", 1, None],
    "overwrite_output_dir": ["false", 1],
    "fp16": [True],
    "gradient_checkpointing": ["no"],
    "gradient_checkpointing_kwargs": [{"use_reentrant": True}, {"foo": 1}, 3, "{"],
    "torch_compile_backend": ["foo", 1],
    "torch_compile_mode": ["foo"],
    "metric_for_best_model": [3],
    "output_dir": [7, ""],
    "ddp_backend": ["foo"],
    "include_num_input_tokens_seen": ["some", 3],
    "accelerator_config": [
        {"split_batches": True},
        {"even_batches": False},
        {"use_seedable_sampler": False},
        {"gradient_accumulation_kwargs": {"num_steps": 2}},
        {"foo": 1},
        5,
    ],
    # The values that a run refuses by name.
    "neftune_noise_alpha": [5.0],
    "label_smoothing_factor": [0.1],
    "label_names": [["labels"]],
    "use_liger_kernel": [True],
    "liger_kernel_config": [{"rope": True}],
    "use_cache": [True],
    "auto_find_batch_size": [True],
    "optim_target_modules": [["q_proj"]],
    "average_tokens_across_devices": [False],
    "bf16_full_eval": [True],
    "fp16_full_eval": [True],
    "batch_eval_metrics": [True],
    "include_for_metrics": [["inputs"]],
    "save_only_model": [True],
    "dataloader_in_order": [False],
    "hub_always_push": [True],
    "fsdp": ["full_shard", True],
    "fsdp_config": [{"min_num_params": 1}],
    "deepspeed": ["config.json", {"zero_optimization": {"stage": 2}}],
    "parallelism_config": [1],
}


def accepts_none(name: str) -> bool:
    return NUMBERS[name].optional or name in (
        "max_steps",
        "num_train_epochs",
        "logging_steps",
        "per_device_train_batch_size",
    )  # of `SkillTrainingArguments`


def test_every_refused_field_has_a_bad_value():
    assert set(REFUSED) <= set(BAD_VALUES)


def assert_one_line(error: BaseException, *parts: str) -> None:
    message = str(error)
    assert "\n" not in message
    assert len(message) < 1500
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", sorted({*NUMBERS, *BAD_VALUES}))
def test_bad_value_is_named_at_once(name):
    values = list(BAD_VALUES.get(name, ()))
    if name in NUMBERS:
        values += [value for value in NOT_NUMBERS if value is not None or not accepts_none(name)]
    for value in values:
        if name == "max_steps" and value is not True and value == -1:
            continue
        with pytest.raises(ValueError) as error:
            SkillTrainingArguments(**{"output_dir": "x", "use_cpu": True, "report_to": "none"} | {name: value})
        assert_one_line(error.value, "foo" if value == {"foo": 1} and name[0] == "a" else f"`{name}")


def test_values_that_are_changed_later_are_checked(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args.learning_rate = math.nan
    with pytest.raises(ValueError, match="`learning_rate` is nan"):
        trainer.train()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args.max_grad_norm = -1
    with pytest.raises(ValueError, match="`max_grad_norm` is -1"):  # before the teacher is loaded
        SkillDistillationTrainer("/nowhere", args=args)
    with pytest.raises(ValueError, match="TrainingArguments, but is a dict"):
        SkillDistillationTrainer("/nowhere", args={})


def test_numbers_of_numpy_become_those_of_python(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args.max_steps, args.learning_rate, args.bf16 = np.int64(9), np.float32(0.5), np.bool_(False)
    check_arguments(args)
    assert json.dumps([args.max_steps, args.learning_rate, args.bf16]) == "[9, 0.5, false]"


@pytest.mark.parametrize("name", REFUSED_OF_TRAINER)
def test_arguments_of_the_trainer_that_are_refused(tmp_path, name):
    value = (torch.optim.AdamW([torch.zeros(1)]), None) if name == "optimizers" else lambda *args: None
    with pytest.raises(ValueError, match=f"`{name}` is not supported: ") as error:
        make_trainer(tmp_path, **{name: value})
    assert_one_line(error.value)


# What shows only with data, steps and optimizer: before calibration, which would call the teacher.
RUNS = [
    (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 15},
        "`dataloader_drop_last` is True, but 14 clips",
    ),
    ({"metric_for_best_model": "wer", **EVALUATED}, "`metric_for_best_model` is 'wer', but it must be one of loss"),
    ({"metric_for_best_model": "loss", "eval_dataset": {"a": CLIPS[:2]}, **EVALUATED}, "one of a_loss"),
    (
        {"load_best_model_at_end": True, "save_strategy": "best"},
        "`load_best_model_at_end` is True, but nothing is evaluated",
    ),
    (
        {"save_strategy": "best", "metric_for_best_model": "loss"},
        "`save_strategy` is 'best', but nothing is evaluated",
    ),
    ({"load_best_model_at_end": True, **EVALUATED, "eval_delay": 99}, "`eval_delay` is 99"),
    ({"callbacks": [EarlyStoppingCallback()], **EVALUATED}, "EarlyStoppingCallback.*metric_for_best_model"),
    ({"callbacks": [EarlyStoppingCallback()], "metric_for_best_model": "loss"}, "nothing is evaluated"),
    ({"callbacks": [3]}, "`callbacks` contains 3"),
    ({"callbacks": 3}, "`callbacks` must be a list"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "`lr_scheduler_kwargs` is None.*num_decay_steps"),
    ({"lr_scheduler_kwargs": {"foo": 1}}, "`lr_scheduler_kwargs` is .*foo"),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 5.0}}, "`lr_scheduler_kwargs`"),
    ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}}, "`lr_scheduler_kwargs`"),
    ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": NAN}}, "`lr_scheduler_kwargs`"),
    ({"optim": "adamw_bnb_8bit"}, "`optim` is 'adamw_bnb_8bit', but"),
    ({"optim": "lomo"}, "`optim` is 'lomo', but"),
    ({"optim": "galore_adamw"}, "`optim` is 'galore_adamw', but"),
    ({"optim_args": "foo"}, "`optim` is .* `optim_args` 'foo' cannot be created"),
    ({"optim_args": "momentum=0.9"}, "`optim_args` is .*has no argument `momentum`"),
    ({"optimizer_cls_and_kwargs": (torch.optim.LBFGS, {})}, "`optimizer_cls_and_kwargs` is"),
    ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"foo": 1})}, "`optimizer_cls_and_kwargs` is"),
    ({"optimizer_cls_and_kwargs": 3}, "`optimizer_cls_and_kwargs` is 3"),
    ({"recipe": {"final_steps": 6}}, "`final_steps` is 6, but .* nothing would be pruned"),
    ({"rows": []}, "`train_dataset` has no rows"),
    ({"rows": None}, "no `train_dataset`"),
    (
        {"train_sampling_strategy": "group_by_length", "rows": [{"audio": "a.wav"}] * 4},
        "`train_sampling_strategy` is 'group_by_length', but the rows have no numbers in a column `length`",
    ),
    (
        {
            "train_sampling_strategy": "batch_rebalance",
            "rows": datasets.Dataset.from_list([{"x": 1}]).to_iterable_dataset(),
        },
        "`train_sampling_strategy` is 'batch_rebalance', but a stream",
    ),
]


@pytest.mark.parametrize(("kwargs", "match"), RUNS, ids=[match[:40] for _, match in RUNS])
def test_found_out_before_calibration(tmp_path, monkeypatch, kwargs, match):
    def fail(*args, **kwargs):
        raise AssertionError("calibration has begun")

    monkeypatch.setattr("skill_hf.grouping.calibration.calibration_waveforms", fail)
    with pytest.raises(ValueError, match=match) as error:
        make_trainer(tmp_path, **kwargs).train()
    assert_one_line(error.value)
    assert not list(tmp_path.glob("checkpoint-*"))


class Averaging(torch.optim.SGD):
    def eval(self):
        pass


def test_an_optimizer_with_modes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="its averaged weights"):
        make_trainer(tmp_path, optimizer_cls_and_kwargs=(Averaging, {})).train()


def test_a_pruned_student_needs_no_stage_1(tmp_path):
    student = build_student(tiny_teacher(num_hidden_layers=2))
    add_gates(student)
    fit_gates(student, student.num_parameters() // 2)
    prune(student)
    start = copy.deepcopy(student)
    make_trainer(tmp_path, model=student, recipe={"final_steps": 6}, save_steps=3).train()
    make_trainer(tmp_path, model=start, recipe={"final_steps": 6}, save_steps=3).train(resume_from_checkpoint=True)


def test_the_check_draws_no_random_numbers(tmp_path):
    trainer = make_trainer(tmp_path, optim="sgd", lr_scheduler_type="cosine")
    trainer.resolve_recipe()
    before = torch.get_rng_state()
    run_validation.check_data(trainer)
    run_validation.check_run(trainer)
    assert torch.equal(before, torch.get_rng_state())


# ---- SkillTrainingArguments ----


@pytest.mark.parametrize(
    ("kwargs", "max_steps", "epochs"),
    [
        ({}, 75_000, 3.0),
        ({"num_train_epochs": 1}, -1, 1),
        ({"num_train_epochs": 3.0}, -1, 3.0),
        ({"max_steps": 9}, 9, 3.0),
        ({"max_steps": -1}, -1, 3.0),
        ({"max_steps": 9, "num_train_epochs": 2}, 9, 2),
    ],
)
def test_epochs_that_are_given_count(tmp_path, kwargs, max_steps, epochs):
    args = SkillTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **kwargs)
    assert (args.max_steps, args.num_train_epochs) == (max_steps, epochs)
    again = dataclasses.replace(args, seed=1)
    assert (again.max_steps, again.num_train_epochs) == (max_steps, epochs)


# ---- The Hub, the launcher ----


def test_the_hub_is_tried_first(tmp_path):
    """In a process of its own: `huggingface_hub` reads its endpoint once. Nobody listens there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_training_arguments import make_trainer
try:
    make_trainer({str(tmp_path / "run")!r}, push_to_hub=True, hub_token="hf_x")
except OSError as error:
    print("message:", error)
"""
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path), "PATH": ""}
    environment |= {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    lines = [line for line in result.stdout.splitlines() if line.startswith("message:")]
    assert len(lines) == 1, result.stderr
    assert "`push_to_hub` is True, but `run` cannot be written to" in lines[0]
    assert "hf_x" not in result.stdout


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_DEEPSPEED", "1"),
        ("ACCELERATE_MIXED_PRECISION", "fp16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
    ],
)
def test_what_the_launcher_asks_for_is_checked(monkeypatch, variable, value):
    args = TrainingArguments(output_dir="x", use_cpu=True, report_to="none")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match="mixed_precision|fsdp_version|DeepSpeed") as error:
        check_arguments(args)
    assert_one_line(error.value)


def test_processes_that_would_not_know_each_other(monkeypatch):
    args = TrainingArguments(output_dir="x", report_to="none")
    assert args.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`use_cpu` is False, but there is no GPU for the 2 processes"):
        SkillDistillationTrainer("/nowhere", args=args)


def test_the_card_names_the_precision_of_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = make_trainer(tmp_path, save_strategy="no")
    assert not trainer.args.bf16
    trainer.train()
    trainer.save_model()
    assert "bfloat16 mixed" in (tmp_path / "README.md").read_text()
