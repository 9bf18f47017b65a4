"""Fine-tuned teachers: heads are kept, distilled, pruned around, saved and resumed."""

import copy
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import torch
from conftest import family_config, noise_clips, padded_batch, tiny_config, with_noise
from short_distillation import SHORT, command_line, write_audio
from test_skill_trainer import RECIPE, Kill, KillAt
from transformers import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForCTC,
    AutoProcessor,
    TrainingArguments,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WavLMForXVector,
    pipeline,
)

from skill_hf import (
    SkillConfig,
    SkillDistillationTrainer,
    Wav2Vec2ForSkillStudent,
    Wav2Vec2SkillStudentForCTC,
    WavLMSkillStudentForCTC,
)
from skill_hf.cli import distill, shorten
from skill_hf.compression.budgets import MacBudget, ParameterBudget
from skill_hf.compression.macs import count_macs
from skill_hf.compression.pruning import cost_after_pruning
from skill_hf.data.collator import SpeechCollator
from skill_hf.data.labels import LabelEncoder
from skill_hf.distillation.task_heads import CLASSIFICATION, CTC, FRAMES, HEADS, HeadLoss
from skill_hf.distillation.teacher import Teacher
from skill_hf.losses import ctc_losses, logits_divergence
from skill_hf.models.families import build_student, head_of
from skill_hf.models.processors import load_tokenizer
from skill_hf.publishing import hub, model_card


VOCABULARY = {"<pad>": 0, "<unk>": 1, "|": 2, **{letter: 3 + index for index, letter in enumerate("ABCDEF")}}
LABELS = {"id2label": {0: "yes", 1: "no", 2: "stop"}, "label2id": {"yes": 0, "no": 1, "stop": 2}}
AUTO_CLASSES = {
    "ctc": AutoModelForCTC,
    "classification": AutoModelForAudioClassification,
    "frame-classification": AutoModelForAudioFrameClassification,
}


def fine_tuned(task: str = "ctc", layout: str = "base", **fields):
    """A random model with a head, none of whose parameters is at its initial value."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "classifier_proj_size": 8}
    return with_noise(AUTO_CLASSES[task].from_config(tiny_config(layout, **sizes | LABELS | fields)))


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Wav2Vec2Processor:
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.json"
    path.write_text(json.dumps(VOCABULARY))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(path), unk_token="<unk>", pad_token="<pad>", word_delimiter_token="|", bos_token=None, eos_token=None
    )
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True), tokenizer)


@pytest.fixture(scope="module")
def ctc_directory(processor, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fine-tuned") / "ctc"
    fine_tuned().save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def make_trainer(output_dir, clips, teacher, recipe=None, callbacks=None, task=None, processor=None, **kwargs):
    arguments = {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1}
    arguments |= {"learning_rate": 1e-3, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    trainer = SkillDistillationTrainer(
        teacher=teacher,
        skill_config=SkillConfig(**RECIPE | {"target_sparsity": 0.5} | (recipe or {})),
        args=TrainingArguments(output_dir=str(output_dir), **arguments | kwargs),
        train_dataset=clips,
        eval_dataset=clips[:3],
        callbacks=callbacks,
        task=task,
        processing_class=processor or Wav2Vec2FeatureExtractor(return_attention_mask=True),
    )
    trainer.data_collator.min_seconds = 0.3
    return trainer


# ---- The losses, against other computations ----


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_is_that_of_torch_and_scipy(temperature):
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 5, 7), 3 * torch.randn(2, 5, 7)
    actual = logits_divergence(student, teacher, temperature)
    assert actual.shape == (2, 5)
    p, q = (torch.distributions.Categorical(logits=logits / temperature) for logits in (teacher, student))
    expected = temperature**2 * torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    p, q = (scipy.special.softmax(logits.double().numpy() / temperature, -1) for logits in (teacher, student))
    np.testing.assert_allclose(actual, temperature**2 * scipy.special.rel_entr(p, q).sum(-1), atol=1e-5)
    assert logits_divergence(teacher, teacher, temperature).abs().max() < 1e-6


def batch_sums(head: str, labels, **settings):
    model = fine_tuned({name: task for task, name in HEADS.items()}[head], **settings)
    inputs = padded_batch()
    loss = HeadLoss(head, 1.0, 1.0, 1.0)
    with torch.no_grad():
        logits = model(**inputs).logits
        mask = None
        if logits.dim() == 3:
            mask = model._get_feature_vector_attention_mask(logits.shape[1], inputs["attention_mask"])
        sums = loss.sums(model, logits, logits + 1, inputs["attention_mask"], mask, labels)
    return model, inputs, loss, sums


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_of_labels_is_the_model_s_own_for_ctc(reduction):
    labels = torch.tensor([[3, 4, 4, 5], [6, 7, -100, -100]])
    model, inputs, loss, sums = batch_sums(CTC, labels, ctc_loss_reduction=reduction)
    with torch.no_grad():
        expected = model(**inputs, labels=labels).loss
    scale = 2 if reduction == "mean" else 1  # of two clips
    assert sums["task_loss"].item() == pytest.approx(scale * expected.item(), rel=1e-5)
    assert loss.count_labels(labels) == 2 and loss.units["task_loss"] == "num_labels"
    assert sums["logits_loss"].item() == pytest.approx(0, abs=1e-5)  # a shift of all logits changes no distribution


def test_clips_without_labels_or_with_too_many_add_nothing_to_ctc():
    torch.manual_seed(0)
    logits, frames = torch.randn(3, 6, 5, requires_grad=True), torch.tensor([6, 6, 6])
    labels = torch.full((3, 8), -100)
    labels[0, :2] = torch.tensor([1, 2])
    labels[2] = 1  # eight labels in six frames
    losses = ctc_losses(logits, labels, frames, blank=0, per_label=False)
    assert losses[0] > 0 and losses[1] == losses[2] == 0
    losses.sum().backward()
    assert logits.grad.isfinite().all() and not logits.grad[1:].any()
    assert HeadLoss(CTC, 1.0, 1.0, 1.0).count_labels(labels) == 2


def test_loss_of_labels_is_the_model_s_own_for_classes_of_clips():
    labels = torch.tensor([2, 0])
    model, inputs, loss, sums = batch_sums(CLASSIFICATION, labels)
    with torch.no_grad():
        expected = model(**inputs, labels=labels).loss.item()
    assert sums["task_loss"].item() == pytest.approx(2 * expected, rel=1e-5)
    assert loss.units == {"logits_loss": "num_clips", "task_loss": "num_labels"}
    _, _, loss, some = batch_sums(CLASSIFICATION, torch.tensor([2, -100]))
    assert some["task_loss"] < sums["task_loss"] and loss.count_labels(torch.tensor([2, -100])) == 1


def test_loss_of_labels_is_the_model_s_own_for_frames():
    labels = torch.arange(24).remainder(3).repeat(2, 1)
    model, inputs, loss, sums = batch_sums(FRAMES, labels)
    with torch.no_grad():
        expected = model(**inputs, labels=torch.nn.functional.one_hot(labels, 3)).loss.item()
    assert sums["task_loss"].item() == pytest.approx(48 * expected, rel=1e-5)
    assert loss.count_labels(labels) == 48
    with pytest.raises(ValueError, match=r"name 25 frames, but its clip has at most 24"):
        batch_sums(FRAMES, torch.zeros(2, 25, dtype=torch.long))


# ---- Which head is kept ----


@pytest.mark.parametrize(
    ("task", "layout"), [("ctc", "base"), ("classification", "large"), ("frame-classification", "large")]
)
def test_student_and_fast_teacher_give_the_teacher_s_logits(task, layout):
    model = fine_tuned(task, layout, use_weighted_layer_sum=layout == "large")
    teacher, inputs = Teacher(model), padded_batch()
    with torch.no_grad():
        stock = model(**inputs, output_hidden_states=True)
        student = build_student(model).eval()
        torch.testing.assert_close(student(**inputs).logits, stock.logits, atol=1e-5, rtol=1e-5)
    means, logits = teacher.outputs([[0], [1, 3]], **inputs)
    torch.testing.assert_close(logits, stock.logits, atol=1e-5, rtol=1e-5)
    expected = (stock.hidden_states[1] + stock.hidden_states[3]) / 2
    torch.testing.assert_close(means[1], expected, atol=1e-5, rtol=0)
    assert head_of(student) == teacher.head == head_of(model)
    assert student.config.id2label[2] == "stop" and student.config.label2id["no"] == 1
    assert student.config is student.base_model.config


def own_messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("skill_hf")]


def test_a_loaded_model_keeps_its_head_and_a_directory_is_asked_for_it(ctc_directory, caplog):
    caplog.set_level(logging.WARNING)
    assert Teacher(fine_tuned()).head == CTC
    assert Teacher(ctc_directory, task="ctc").head == CTC
    assert Teacher(ctc_directory, task="encoder").head is Teacher(fine_tuned(), task="encoder").head is None
    assert own_messages(caplog) == []
    assert type(Teacher(ctc_directory).model).__name__ == "WavLMModel"
    [message] = own_messages(caplog)
    assert "is a WavLMForCTC" in message and "pass `task='ctc'`" in message and "\n" not in message


def test_the_head_for_speakers_is_left_out_with_a_warning(caplog):
    small = {"tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 8}
    model = WavLMForXVector(tiny_config(**small))
    assert Teacher(model).head is None
    assert "is a WavLMForXVector" in caplog.text and "of a kind that is not distilled" in caplog.text
    with pytest.raises(ValueError, match="is a WavLMForXVector: fine-tune it first, or leave `task` out"):
        Teacher(model, task="ctc")


@pytest.mark.parametrize(
    ("make", "task", "match"),
    [
        (fine_tuned, "x-vector", "`task` must be one of encoder, ctc, classification, frame-classification, but is"),
        (fine_tuned, "classification", "`task` is classification, .* is a WavLMForCTC: pass `task='ctc'`"),
        (lambda: fine_tuned().base_model, "ctc", "is a WavLMModel: fine-tune it first"),
        (lambda: AutoModelForCTC.from_config(family_config("hubert-large")), "frame-classification", "have heads for"),
        (lambda: fine_tuned("classification", num_labels=1, **{**dict.fromkeys(LABELS)}), None, "regression with 1"),
        (lambda: fine_tuned("classification", problem_type="multi_label_classification"), None, "multi_label"),
        (lambda: fine_tuned(add_adapter=True, num_adapter_layers=1), None, "add_adapter"),
    ],
)
def test_heads_that_cannot_be_are_refused_in_one_line(make, task, match):
    with pytest.raises(ValueError, match=match) as error:
        Teacher(make(), task)
    assert "\n" not in str(error.value)


def test_a_damaged_or_missing_head_is_refused(tmp_path, ctc_directory):
    model = fine_tuned()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite weights in lm_head\.weight"):
        Teacher(model)
    directory = shutil.copytree(ctc_directory, tmp_path / "ctc")
    fine_tuned().base_model.save_pretrained(directory, max_shard_size="1GB")  # its config names no head
    with pytest.raises(ValueError, match="is a WavLMModel: fine-tune it first"):
        Teacher(directory, task="ctc")
    shutil.copy(ctc_directory / "config.json", directory)
    with pytest.raises(ValueError, match=r"lm_head\.\w+ is missing"):
        Teacher(directory, task="ctc")


def test_a_missing_tokenizer(tmp_path, clips, caplog):
    fine_tuned().save_pretrained(tmp_path / "teacher")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="comes without a tokenizer .* pass `processing_class=") as error:
        SkillDistillationTrainer(tmp_path / "teacher", task="ctc", args=TrainingArguments(tmp_path, use_cpu=True))
    assert "\n" not in str(error.value)
    # Who gives a feature extractor of his own can do without.
    assert make_trainer(tmp_path, clips, fine_tuned()).tokenizer is None
    assert "writes no text" in caplog.text


def test_labels_need_a_head_and_rows_need_labels(tmp_path, clips, processor):
    with pytest.raises(ValueError, match="`task_weight` is 0.5, but the teacher keeps no head"):
        make_trainer(tmp_path, clips, fine_tuned().base_model, {"task_weight": 0.5})
    trainer = make_trainer(tmp_path, clips, fine_tuned(), {"task_weight": 0.5}, processor=processor)
    with pytest.raises(ValueError, match="rows of `train_dataset` have no `labels`, only input_values"):
        trainer.train()


# ---- Pruning around a head ----


@pytest.mark.parametrize(
    ("task", "layout"), [("ctc", "large"), ("classification", "base"), ("frame-classification", "large")]
)
def test_gated_equals_pruned_and_the_head_is_a_fixed_cost(task, layout, tmp_path):
    model = fine_tuned(task, layout)
    student, inputs = build_student(model).eval(), padded_batch()
    student.base_model.add_gates(["conv_channels", "attention_heads", "ffn_dims"])
    generator = torch.Generator().manual_seed(0)
    for _, gate in student.base_model.named_gates():
        gate.log_alpha.data = 2 * torch.randn(gate.size, generator=generator) - 0.5
    expected = {
        budget: cost_after_pruning(student.base_model, budget.unit_costs(student))
        for budget in (ParameterBudget(), MacBudget(0.7, 8_000))
    }
    with torch.no_grad():
        gated = student(**inputs).logits
        student.base_model.prune()
        pruned = student(**inputs).logits
    torch.testing.assert_close(pruned, gated, atol=1e-4, rtol=1e-4)
    assert list(expected.values()) == [student.num_parameters(), count_macs(student, 0.7, sampling_rate=8_000)]
    assert student.num_parameters() < model.num_parameters()
    head_size = student.num_parameters() - student.base_model.num_parameters()
    assert head_size == model.num_parameters() - model.base_model.num_parameters()
    student.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = AUTO_CLASSES[task].from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(**inputs).logits, pruned)


# ---- A run ----


RUN = {"task_weight": 0.1, "shrink_steps": 2, "logits_temperature": 2.0, "logits_weight": 0.5}


def labelled_clips() -> list[dict]:
    clips = noise_clips(12, 12_000)
    for clip in clips[:-2]:
        clip["labels"] = "AB CAD"  # the tokenizer of the teacher makes ids of it
    return clips


@pytest.fixture(scope="module")
def run(tmp_path_factory, ctc_directory):
    directory = tmp_path_factory.mktemp("run") / "student"
    trainer = make_trainer(directory, labelled_clips(), ctc_directory, RUN, task="ctc", processor=None)
    trainer.train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_card, "save_figures", lambda directory, report: [])  # they take seconds
        trainer.save_model(str(directory / "saved"))
    return trainer


def test_a_fine_tuned_model_becomes_a_smaller_one(run):
    assert type(run.model) is WavLMSkillStudentForCTC and run.stage == 3
    assert abs(run.model.num_parameters() / fine_tuned().num_parameters() - 0.5) < 0.01
    assert run.report().num_teacher_parameters == run.teacher.num_parameters() == fine_tuned().num_parameters()
    assert not torch.equal(run.model.lm_head.weight, run.teacher.lm_head.weight)
    rows = [row for row in run.state.log_history if "loss" in row]
    assert [row["stage"] for row in rows] == [1] * 4 + [2] * 2
    for row in rows:
        total = row["distillation_loss"] + 0.5 * row["logits_loss"] + 0.1 * row["task_loss"] + row["lagrangian_loss"]
        assert row["loss"] == pytest.approx(total, abs=1e-3)
    start = run.record.losses["start"]
    assert start["logits_loss"] == pytest.approx(0, abs=1e-5)
    assert start["distillation_loss"] == pytest.approx(-1, abs=1e-4)
    assert run.record.losses["end"]["logits_loss"] > 0
    assert len(run.record.layer_distances["cka"]) == 4
    assert run.report().results()["student_class"] == "WavLMSkillStudentForCTC"


def test_evaluation_is_that_of_the_logits_themselves(run):
    """Each clip alone, by the stock model, torch's distributions, and the student's own loss."""
    metrics = run.evaluate()
    divergences, frames, losses = 0.0, 0, []
    for row in run.eval_dataset:
        batch = run.eval_data_collator([row])
        labels = batch.pop("labels")
        with torch.no_grad():
            target, student = fine_tuned()(**batch).logits / 2, run.model(**batch, labels=labels)
        p, q = (torch.distributions.Categorical(logits=logits) for logits in (target, student.logits / 2))
        divergences += 4 * torch.distributions.kl_divergence(p, q).sum().item()
        frames += target.shape[1]
        losses.append(student.loss.item())
    assert metrics["eval_logits_loss"] == pytest.approx(divergences / frames, rel=1e-3)
    assert metrics["eval_task_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    total = metrics["eval_distillation_loss"] + 0.5 * metrics["eval_logits_loss"] + 0.1 * metrics["eval_task_loss"]
    assert metrics["eval_loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("step", [3, 5])
def test_resumed_equals_uninterrupted(run, ctc_directory, tmp_path, step):
    settings = {"recipe": RUN, "task": "ctc"}
    with pytest.raises(Kill):
        make_trainer(tmp_path, labelled_clips(), ctc_directory, callbacks=[KillAt(step)], **settings).train()
    checkpoint = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"vocab.json", "tokenizer_config.json", "preprocessor_config.json", "config.json"} <= checkpoint
    resumed = make_trainer(tmp_path, labelled_clips(), ctc_directory, **settings)
    resumed.train(resume_from_checkpoint=True)
    expected, actual = run.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == actual.keys()
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


@pytest.mark.parametrize(
    ("task", "recipe", "named"),
    [("ctc", {"logits_temperature": 1.0}, "logits_temperature"), ("encoder", {"task_weight": 0.0}, "teacher.head")],
)
def test_checkpoints_know_their_head(run, ctc_directory, task, recipe, named):
    trainer = make_trainer(run.args.output_dir, labelled_clips(), ctc_directory, RUN | recipe, task=task)
    with pytest.raises(ValueError, match=f"different recipe.*{named}"):
        trainer.train(resume_from_checkpoint=True)


def test_long_recordings_are_recognised_in_chunks_as_by_a_stock_model(run):
    directory = run.args.output_dir + "/saved"
    student, processor = AutoModelForCTC.from_pretrained(directory).eval(), AutoProcessor.from_pretrained(directory)
    encoder = student.base_model.to_stock()
    encoder.config.update({"vocab_size": student.config.vocab_size, "pad_token_id": student.config.pad_token_id})
    stock = AutoModelForCTC.from_config(encoder.config).eval()
    setattr(stock, stock.base_model_prefix, encoder)
    stock.lm_head = student.lm_head
    audio = np.random.default_rng(5).standard_normal(16_000 * 6).astype(np.float32)

    def text(model, **kwargs) -> str:
        parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor, "device": "cpu"}
        return pipeline("automatic-speech-recognition", model, **parts)(audio, **kwargs)["text"]

    chunks = {"chunk_length_s": 2, "stride_length_s": 0.5}
    assert text(student, **chunks) == text(stock, **chunks) != ""
    assert len(text(student, **chunks)) == pytest.approx(len(text(student)), rel=0.3)


def test_what_is_saved_loads_and_writes_text(run):
    directory = run.args.output_dir + "/saved"
    student = AutoModelForCTC.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    assert type(student) is type(run.model) and processor.tokenizer.get_vocab() == VOCABULARY
    audio = np.random.default_rng(5).standard_normal(12_000).astype(np.float32)
    with torch.no_grad():
        inputs = processor(audio, sampling_rate=16_000, return_tensors="pt")
        tokens = student(**inputs).logits.argmax(-1)[0].tolist()
    merged = [token for token, last in zip(tokens, [None, *tokens[:-1]], strict=True) if token != last and token]
    letters = {index: letter for letter, index in VOCABULARY.items()}
    expected = "".join(letters[token] for token in merged).replace("|", "")
    heard = pipeline("automatic-speech-recognition", directory, device="cpu")(audio)["text"]
    assert heard == processor.decode(tokens) and heard.replace(" ", "") == expected
    card = Path(directory, "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: automatic-speech-recognition" in card and "A speech model with" in card
    assert "copy of the teacher's that was trained with the encoder, to give the teacher's logits and on" in card
    assert "| Divergence of logits | Loss of labels |" in card and "a temperature T of 2.0" in card
    texts = [Path(directory, name).read_text(encoding="utf-8") for name in ("tokenizer_config.json", "README.md")]
    assert run.args.output_dir not in "".join(texts)


def test_a_student_that_is_pushed_takes_its_tokenizer_along(run, tmp_path):
    student = AutoModelForCTC.from_pretrained(run.args.output_dir + "/saved")
    hub._copy_feature_extractor(tmp_path, student, token=None)
    assert load_tokenizer(tmp_path).get_vocab() == VOCABULARY
    assert (tmp_path / "preprocessor_config.json").is_file()


def test_a_student_with_a_head_is_a_teacher(run):
    teacher, inputs = Teacher(run.args.output_dir + "/saved", task="ctc"), padded_batch()
    with torch.no_grad():
        expected = run.model(**inputs).logits
    torch.testing.assert_close(teacher.outputs([[0]], **inputs)[1], expected, atol=1e-5, rtol=1e-5)
    assert teacher.tokenizer().get_vocab() == VOCABULARY


@pytest.mark.parametrize(("task", "labels"), [("classification", "no"), ("frame-classification", [0, 1, 2] * 6)])
def test_other_heads_train_and_keep_their_classes(tmp_path, task, labels):
    clips = noise_clips(6, 10_000)
    for clip in clips[1:]:
        clip["labels"] = labels
    clips[0]["labels"] = None
    teacher = fine_tuned(task, "large", use_weighted_layer_sum=True)
    trainer = make_trainer(tmp_path, clips, teacher, {"task_weight": 1.0}, max_steps=3, save_strategy="no")
    trainer.train()
    assert {"eval_logits_loss", "eval_task_loss"} <= trainer.evaluate().keys()
    trainer.save_student(str(tmp_path / "saved"))
    loaded = AUTO_CLASSES[task].from_pretrained(tmp_path / "saved")
    assert loaded.config.id2label == LABELS["id2label"] and type(loaded) is type(trainer.model)


def test_accumulated_steps_equal_one_large_batch(tmp_path):
    """Clips of unequal length, of which not all have labels: each loss is a mean over all that it is a mean over."""
    rng = np.random.default_rng(0)
    lengths = [9_000, 12_000, 15_000, 11_000]
    clips = [{"input_values": rng.standard_normal(length).astype(np.float32), "labels": 1} for length in lengths]
    clips[2]["labels"] = None
    still = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "final_dropout": 0.0}
    states = []
    for size, accumulation in ((4, 1), (2, 2)):
        trainer = make_trainer(
            tmp_path,
            clips,
            fine_tuned("classification", "large", **still),
            {"layer_groups": [[0, 1], [2, 3]], "num_clusters": None, "task_weight": 1.0, "shared_gate_noise": True},
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            save_strategy="no",
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        states.append(trainer)
    one, many = ([row for row in trainer.state.log_history if "loss" in row] for trainer in states)
    for large, small in zip(one, many, strict=True):
        for name in ("loss", "distillation_loss", "logits_loss", "task_loss", "grad_norm"):
            assert small[name] == pytest.approx(large[name], rel=1e-3, abs=1e-5), name


def test_another_family_in_bf16_with_gradient_checkpointing(tmp_path, processor):
    torch.manual_seed(0)
    teacher = with_noise(AutoModelForCTC.from_config(family_config("xls-r", pad_token_id=0)))
    kwargs = {"max_steps": 3, "save_strategy": "no", "bf16": True, "gradient_checkpointing": True}
    trainer = make_trainer(tmp_path, noise_clips(6, 9_000), teacher, processor=processor, **kwargs)
    trainer.train()
    metrics = trainer.evaluate()
    assert np.isfinite(metrics["eval_logits_loss"]) and "eval_task_loss" not in metrics
    trainer.save_student(str(tmp_path / "saved"))
    assert type(AutoModelForCTC.from_pretrained(tmp_path / "saved")) is Wav2Vec2SkillStudentForCTC
    # The encoder alone loads, too.
    assert type(AutoModel.from_pretrained(tmp_path / "saved")) is Wav2Vec2ForSkillStudent


def test_a_student_to_start_from_has_the_same_head(tmp_path, clips, processor):
    kwargs = {"skill_config": SkillConfig(**RECIPE), "processing_class": processor}
    kwargs["args"] = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="must be a WavLMSkillStudentForCTC without gates, but is a WavLMForSkillS"):
        SkillDistillationTrainer(fine_tuned(), model=build_student(fine_tuned().base_model), **kwargs)
    student = build_student(fine_tuned(vocab_size=11))
    with pytest.raises(ValueError, match="`model` has `vocab_size` 11, but the teacher has 9"):
        SkillDistillationTrainer(fine_tuned(), model=student, **kwargs)


def test_command_line(tmp_path, ctc_directory, run):
    settings = SHORT | {
        "teacher_name_or_path": str(ctc_directory),
        "student_name_or_path": run.args.output_dir + "/saved",
        "audio_dir": str(write_audio(tmp_path / "audio", number=3)),
        "output_dir": str(tmp_path / "out"),
        "recipe": "wav2vec2-base-960h-ctc-075",
    }
    trainer = distill.make_trainer(*distill.parse(command_line(settings))[0], distill.StageClock())
    assert trainer.teachers[0].head == CTC and type(trainer.model) is WavLMSkillStudentForCTC
    assert trainer.model.config.conv_dim == run.model.config.conv_dim
    with pytest.raises(ValueError, match="task"):
        distill.parse(command_line(settings | {"task": "asr"}))
    finished = SimpleNamespace(model=run.model, args=SimpleNamespace(output_dir=run.args.output_dir + "/saved"))
    distill.check_saved_student(finished)
    with torch.no_grad():
        finished.model = copy.deepcopy(run.model)
        finished.model.lm_head.bias += 1
    with pytest.raises(RuntimeError, match="differs from the trained one"):
        distill.check_saved_student(finished)


def test_a_shortened_model_with_its_head_is_a_start(tmp_path, ctc_directory, caplog):
    def warnings() -> list[str]:
        return [record.message for record in caplog.records if record.name == "skill_hf.distillation.task_heads"]

    audio, shorter = str(write_audio(tmp_path / "audio", number=3)), tmp_path / "shorter"
    words = [str(ctc_directory), "--num_layers", "2", "--audio_dir", audio, "--max_seconds", "0.5"]
    assert shorten.main([*words, "--task", "ctc", "--output_dir", str(shorter)]) == 0
    (removed,) = json.loads((shorter / "shortened.json").read_text())["removed_layers"]
    student, stock = AutoModelForCTC.from_pretrained(shorter).eval(), AutoModelForCTC.from_pretrained(ctc_directory)
    del stock.base_model.encoder.layers[removed - 1]
    with torch.no_grad():
        expected, actual = (model.eval()(**padded_batch()).logits for model in (stock, student))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert type(student) is WavLMSkillStudentForCTC
    assert AutoProcessor.from_pretrained(shorter).tokenizer.get_vocab() == VOCABULARY

    settings = SHORT | {"teacher_name_or_path": str(ctc_directory), "student_name_or_path": str(shorter)}
    settings |= {"audio_dir": audio, "output_dir": str(tmp_path / "out")}
    parsed = distill.parse(command_line(settings | {"task": "ctc"}))[0]
    trainer = distill.make_trainer(*parsed, distill.StageClock())
    assert trainer.model.lm_head.weight.equal(student.lm_head.weight)
    # Without a task the heads are left out, with a word on both, here and when layers are removed.
    assert not warnings()
    trainer = distill.make_trainer(*distill.parse(command_line(settings))[0], distill.StageClock())
    assert head_of(trainer.model) is None
    assert [message.partition(", but")[0] for message in warnings()] == [
        f"Student `{shorter}` is a WavLMSkillStudentForCTC",
        f"Teacher `{ctc_directory}` is a WavLMForCTC",
    ]
    assert shorten.main([*words, "--output_dir", str(tmp_path / "encoder")]) == 0
    assert "To keep its head, pass `task='ctc'`" in warnings()[-1]
    assert not (tmp_path / "encoder" / "vocab.json").exists()
    caplog.clear()
    assert shorten.main([*words, "--task", "encoder", "--output_dir", str(tmp_path / "encoder")]) == 0
    assert not warnings()
    assert shorten.main([*words, "--task", "classification", "--output_dir", str(tmp_path / "none")]) == 2


# ---- Labels of rows ----


@pytest.mark.parametrize(
    ("settings", "value", "expected"),
    [
        ({"one_per_clip": True, "ids": LABELS["label2id"]}, "stop", [2]),
        ({"one_per_clip": True}, np.int64(1), [1]),
        ({"one_per_clip": True}, torch.tensor(1), [1]),
        ({"one_per_clip": False}, [0, 2, -100], [0, 2, -100]),
        ({"one_per_clip": False, "blank": 0}, np.array([1, 2, -100]), [1, 2]),
        ({"one_per_clip": False, "blank": 0}, None, []),
    ],
)
def test_label_ids(settings, value, expected):
    assert LabelEncoder(num_classes=3, **settings)(value) == expected


@pytest.mark.parametrize(
    ("settings", "value", "match"),
    [
        ({"one_per_clip": True, "ids": LABELS["label2id"]}, "maybe", r"holds 'maybe', but must be from 0 to 2 or of"),
        ({"one_per_clip": True}, 3, "holds 3, but must be from 0 to 2"),
        ({"one_per_clip": True}, 1.0, "must be one label"),
        ({"one_per_clip": True}, [1], "must be one label"),
        ({"one_per_clip": False}, 1, "must be a list of labels"),
        ({"one_per_clip": False}, "AB", "must be a list of labels"),
        ({"one_per_clip": False, "blank": 0}, [1, 0], "holds 0, the blank"),
        ({"one_per_clip": False}, [[1]], r"holds \[1\]"),
        ({"one_per_clip": False}, [True], "holds True"),
    ],
)
def test_labels_that_cannot_be(settings, value, match):
    with pytest.raises(ValueError, match=match):
        LabelEncoder(num_classes=3, **settings)(value)


def test_labelled_clips_are_padded_and_cropped_ones_lose_their_labels(processor):
    rows = [
        {"input_values": np.ones(length, np.float32), "labels": text}
        for length, text in ((8_000, "AB"), (12_000, "BAD"), (20_000, "FED"))
    ]
    encoder = LabelEncoder(9, one_per_clip=False, blank=0, tokenizer=processor.tokenizer)
    extractor = processor.feature_extractor
    batch = SpeechCollator(extractor, max_seconds=1.0, min_seconds=0.1, label_encoder=encoder)(rows)
    assert batch["input_values"].shape == (3, 16_000)
    assert batch["attention_mask"].sum(-1).tolist() == [8_000, 12_000, 16_000]
    assert batch["labels"].tolist() == [[3, 4, -100], [4, 3, 6], [-100] * 3]
    nothing = SpeechCollator(extractor, label_encoder=encoder)([{"input_values": np.ones(5, np.float32)}])
    assert nothing["labels"].tolist() == [[-100]] and not nothing["attention_mask"].any()
    classes = SpeechCollator(extractor, max_seconds=1.0, min_seconds=0.1, label_encoder=LabelEncoder(3, True))
    assert classes([{**row, "labels": 2} for row in rows])["labels"].tolist() == [2, 2, 2]
