"""Students of every family, in the layouts that published checkpoints have, against the stock models."""

import copy

import numpy as np
import pytest
import torch
import transformers
from conftest import LAYOUTS, LAYOUTS_OF_HEADS, all_layouts, family_config, family_teacher, padded_batch, with_noise
from test_modeling_wavlm_skill_student import assert_same_hidden_states
from transformers import AutoModel, SEWConfig, SEWModel, Wav2Vec2FeatureExtractor

import skill_hf
from skill_hf import SkillConfig, SkillDistillationTrainer, SkillTrainingArguments
from skill_hf.compression.budgets import MacBudget, ParameterBudget
from skill_hf.compression.macs import count_macs
from skill_hf.compression.pruning import cost_after_pruning
from skill_hf.compression.units import KINDS
from skill_hf.distillation.teacher import fast_teacher, load_teacher, target_means
from skill_hf.losses import group_means
from skill_hf.models.configuration_skill_student import TASKS
from skill_hf.models.families import build_student, student_config
from skill_hf.models.students import STUDENT_CLASSES, STUDENTS
from skill_hf.publishing import model_card


def inputs_of(padded: bool) -> dict[str, torch.Tensor]:
    inputs = padded_batch()
    return inputs if padded else {"input_values": inputs["input_values"]}


def close_at_random(student, seed: int = 0):
    """Puts a random gate on each unit, of which a third or so is closed; layer 0 has no heads left."""
    student.add_gates(list(KINDS))
    generator = torch.Generator().manual_seed(seed)
    for name, gate in student.named_gates():
        gate.log_alpha.data = 2 * torch.randn(gate.size, generator=generator) - 0.5
        if name.startswith("encoder.layers.0.attention"):
            gate.log_alpha.data.fill_(-9)
    return student


def random_student(layout: str, seed: int = 0, **kwargs):
    return close_at_random(build_student(family_teacher(layout, **kwargs)).eval(), seed)


def assert_same_logits(model, other, atol: float = 1e-5):
    with torch.no_grad():
        expected, actual = model(**inputs_of(True)).logits, other(**inputs_of(True)).logits
    torch.testing.assert_close(actual, expected, atol=atol, rtol=atol)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_states_are_those_of_the_stock_model(layout, tmp_path):
    teacher = family_teacher(layout)
    teacher.save_pretrained(tmp_path)
    student_class = STUDENT_CLASSES[teacher.config.model_type]
    students = [
        build_student(teacher).eval(),
        student_class.from_pretrained(tmp_path).eval(),
        student_class.from_pretrained(tmp_path, attn_implementation="eager").eval(),
        fast_teacher(load_teacher(tmp_path)),
    ]
    for padded in (True, False):
        for student in students:
            assert_same_hidden_states(teacher, student, inputs_of(padded))
    assert type(students[0]) is student_class
    with torch.no_grad():
        weights = students[2](**inputs_of(True), output_attentions=True).attentions
        teacher.set_attn_implementation("eager")
        expected = teacher(**inputs_of(True), output_attentions=True).attentions
    assert len(weights) == len(expected) == teacher.config.num_hidden_layers
    if not layout.startswith("wavlm"):  # whose stock model returns means over heads
        for one, two in zip(weights, expected, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pruned_equals_gated_saved_fused_and_stock(layout, tmp_path):
    gated = random_student(layout)
    student = copy.deepcopy(gated)
    expected = {
        budget: cost_after_pruning(student, budget.unit_costs(student))
        for budget in (ParameterBudget(), MacBudget(0.7, 8_000))
    }
    student.prune()
    assert list(expected.values()) == [student.num_parameters(), count_macs(student, 0.7, sampling_rate=8_000)]
    assert student.config.remaining_heads[0] == []
    for padded in (True, False):
        assert_same_hidden_states(gated, student, inputs_of(padded), atol=1e-4)

    student.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(student)
    assert_same_hidden_states(student, loaded, inputs_of(True), atol=0)
    stock = student.to_stock()
    assert type(stock).__module__.startswith("transformers.")
    assert_same_hidden_states(student, stock, inputs_of(True))
    assert_same_hidden_states(student, loaded.fuse(), inputs_of(True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_are_means_of_the_hidden_states(layout):
    teacher, groups = family_teacher(layout), [[0], [1, 2]]
    inputs = inputs_of(True)
    with torch.no_grad():
        expected = group_means(teacher(**inputs, output_hidden_states=True).hidden_states, groups)
    torch.testing.assert_close(target_means(fast_teacher(teacher), groups, **inputs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", all_layouts(*LAYOUTS_OF_HEADS))
def test_heads_give_the_logits_of_the_stock_ones(layout, tmp_path):
    """Unpruned; with gates, once these are pruned and saved; and in the stock class on `to_stock()`."""
    config = family_config(layout)
    student_class = STUDENT_CLASSES[config.model_type]
    stock_tasks = [task for task, auto in TASKS.items() if type(config) in getattr(transformers, auto)._model_mapping]
    assert list(student_class.config_class.tasks) == stock_tasks
    for task in stock_tasks:
        auto_class = getattr(transformers, TASKS[task])
        torch.manual_seed(0)
        stock = with_noise(auto_class.from_config(config))
        stock.save_pretrained(tmp_path / task)
        name = student_class.config_class.student_classes()[TASKS[task]].rpartition(".")[2]
        head = getattr(skill_hf, name).from_pretrained(tmp_path / task).eval()
        assert_same_logits(stock, head)
        gated = copy.deepcopy(head)
        close_at_random(gated.base_model)
        head = copy.deepcopy(gated)
        head.base_model.prune()
        assert_same_logits(gated, head, atol=1e-4)
        head.save_pretrained(tmp_path / f"{task}-student")
        loaded = auto_class.from_pretrained(tmp_path / f"{task}-student").eval()
        assert type(loaded) is type(head)
        assert_same_logits(head, loaded, atol=0)
        setattr(stock, stock.base_model_prefix, head.base_model.to_stock())
        assert_same_logits(head, stock)


# Of each family one by day: `distillation/test_shrinking.py` resumes runs of WavLM.
@pytest.mark.parametrize("layout", all_layouts("hubert-batch-norm", "xls-r", "unispeech-base", "unispeech-sat-large"))
def test_a_run_resumes_to_the_same_student(layout, tmp_path, monkeypatch):
    """Both stages, with a shrinking in the first."""
    monkeypatch.setattr(model_card, "save_figures", lambda directory, report: [])  # they take half of the time
    rng = np.random.default_rng(0)
    clips = [{"input_values": rng.standard_normal(n).astype(np.float32)} for n in rng.integers(4000, 8000, 6).tolist()]

    def make_trainer(name: str, **kwargs) -> SkillDistillationTrainer:
        arguments = {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 3, "learning_rate": 1e-3}
        arguments["save_total_limit"] = None
        arguments |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
        return SkillDistillationTrainer(
            teacher=family_teacher(layout),
            skill_config=SkillConfig(
                num_clusters=2, shrink_steps=2, gate_learning_rate=0.5, calibration_samples=2, calibration_seconds=0.4
            ),
            args=SkillTrainingArguments(output_dir=str(tmp_path / name), **arguments | kwargs),
            train_dataset=clips,
            eval_dataset=clips[:2],
            processing_class=Wav2Vec2FeatureExtractor(do_normalize=False),
        )

    trainer = make_trainer("run")
    statistics = [copy.deepcopy(buffer) for buffer in trainer.student.buffers()]
    trainer.train()
    assert trainer.student.num_parameters() < 0.4 * trainer.teachers[0].num_parameters
    assert all(torch.equal(*pair) for pair in zip(statistics, trainer.student.buffers(), strict=True))
    trainer.save_model(str(tmp_path / "student"))
    assert type(AutoModel.from_pretrained(tmp_path / "student")) is STUDENT_CLASSES[trainer.teacher.config.model_type]
    resumed = make_trainer("run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    weights = resumed.student.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.student.state_dict().items())


def test_checkpoints_with_old_names_of_the_weight_norm(tmp_path):
    teacher = family_teacher("hubert-base")
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    weights = teacher.state_dict()
    for name in list(weights):
        for new, former in old.items():
            if name.endswith(new):
                weights[name.replace(new, former)] = weights.pop(name)
    teacher.config.save_pretrained(tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert_same_hidden_states(teacher, load_teacher(tmp_path), inputs_of(True), atol=0)
    student = skill_hf.HubertForSkillStudent.from_pretrained(tmp_path).eval()
    assert_same_hidden_states(teacher, student, inputs_of(True))


@pytest.mark.parametrize("layout", ["wav2vec2-base", "unispeech-base", "unispeech-sat-base"])
def test_checkpoints_of_pretraining_give_their_encoder(layout, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForPreTraining.from_config(family_teacher(layout).config).eval()
    model.save_pretrained(tmp_path)
    assert_same_hidden_states(model.base_model, build_student(load_teacher(tmp_path)).eval(), inputs_of(True))


def test_batch_norm_keeps_its_statistics_in_training():
    student = build_student(family_teacher("hubert-batch-norm")).train()
    norm = student.encoder.pos_conv_embed.batch_norm
    before = norm.running_mean.clone()
    student(torch.randn(2, 8000))
    assert not norm.training and torch.equal(norm.running_mean, before)
    assert student.encoder.pos_conv_embed.conv.training


@pytest.mark.parametrize("student_class", STUDENTS)
def test_fields_are_checked_whatever_the_family(student_class):
    """Transformers 5 would write an `__init__` that checks nothing for a class without one."""
    with pytest.raises(ValueError, match=r"`remaining_heads\[0\]` must be ascending head indices"):
        student_class.config_class(num_hidden_layers=1, remaining_heads=[[99]])
    with pytest.raises(ValueError, match="`format_version` is 4"):
        student_class.config_class(format_version=4)


def test_models_that_cannot_be_teachers(tmp_path):
    SEWModel(
        SEWConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8)
    ).save_pretrained(tmp_path / "sew")
    with pytest.raises(
        ValueError, match="is a `sew`; teachers and students must be of one of the families hubert, .*wav2vec2, wavlm"
    ):
        load_teacher(tmp_path / "sew")
    adapted = family_teacher("wav2vec2-base", add_adapter=True)
    with pytest.raises(ValueError, match="has `add_adapter`, which changes the encoder's frames"):
        load_teacher(adapted)
    with pytest.raises(ValueError, match="is a `data2vec-audio`"):
        student_config(transformers.Data2VecAudioConfig())
