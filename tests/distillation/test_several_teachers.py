"""Several teachers: what they give as targets, what each of them hears, and a whole run with them."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import family_teacher, noise_clips, tiny_teacher, with_noise
from huggingface_hub import ModelCardData
from short_distillation import command_line, on_folder, results_of, write_inputs
from test_skill_trainer import RECIPE, Kill, KillAt
from transformers import SEWConfig, TrainingArguments, Wav2Vec2FeatureExtractor

from skill_hf import SkillConfig, SkillDistillationTrainer
from skill_hf.cli import distill
from skill_hf.data.collator import SpeechCollator
from skill_hf.distillation.distiller import same_relative_depth
from skill_hf.distillation.ensemble import zero_mean_unit_variance
from skill_hf.distillation.projection_start import RIDGE, LeastSquares
from skill_hf.distillation.run_validation import check_data
from skill_hf.models.model_modes import padding_ignored
from skill_hf.publishing.run_record import RunRecord
from skill_hf.publishing.run_report import OtherTeacher
from skill_hf.publishing.teacher_metadata import add_other_teachers


RAW = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
NORMALISED = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)


def recordings(number: int = 8) -> list[dict]:
    """Clips of noise with an offset, of different loudness and length, as audio."""
    rng = np.random.default_rng(0)
    return [
        {
            "audio": {
                "array": (0.05 * (1 + index) * rng.standard_normal(6000 + 400 * index) + 0.1).astype(np.float32),
                "sampling_rate": 16_000,
            }
        }
        for index in range(number)
    ]


def pair(average: bool) -> list:
    """WavLM, and a HuBERT of another layout; for separate targets also of another width and depth."""
    sizes = {} if average else {"hidden_size": 48, "num_hidden_layers": 5, "num_conv_pos_embedding_groups": 4}
    return [tiny_teacher(), family_teacher("hubert-large", **sizes)]


def make_trainer(output_dir, teachers, clips=None, recipe=None, callbacks=None, **kwargs):
    given = {name: kwargs.pop(name) for name in ("data_collator", "processing_class", "task") if name in kwargs}
    arguments = {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1}
    arguments |= {"learning_rate": 1e-3, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    clips = noise_clips(12, 9_000) if clips is None else clips
    trainer = SkillDistillationTrainer(
        teacher=teachers,
        skill_config=SkillConfig(**RECIPE | {"target_sparsity": 0.5} | (recipe or {})),
        args=TrainingArguments(output_dir=str(output_dir), **arguments | kwargs),
        train_dataset=clips,
        eval_dataset=clips[:3],
        callbacks=callbacks,
        **given,
    )
    if isinstance(trainer.data_collator, SpeechCollator):
        trainer.data_collator.min_seconds = 0.3
    return trainer


# ---- Targets and loss, computed from the hidden states of stock models ----


def stock_means(model, clip: np.ndarray, groups) -> list[torch.Tensor]:
    with torch.no_grad():
        states = model(torch.as_tensor(clip)[None], output_hidden_states=True).hidden_states
    return [torch.stack([states[index] for index in group]).mean(0)[0] for group in groups]


@pytest.mark.parametrize("average", [True, False])
def test_targets_and_loss_are_those_of_a_direct_computation(average, tmp_path):
    # The WavLM has group norm and hears audio as it is, the HuBERT has layer norm and hears it normalised.
    teachers, clips = pair(average), recordings()
    recipe = {"teacher_targets": "average" if average else "separate", "num_clusters": 3}
    trainer = make_trainer(tmp_path, teachers, clips, recipe)
    trainer._setup()
    trainer.steps = trainer.skill_config.resolve_steps(6)
    groups = trainer.groups_of_teachers
    assert groups[0] != groups[1] and all(len(of_teacher) == 3 for of_teacher in groups)
    distiller = trainer._make_distiller().eval()

    # Padded frames are left out: each clip alone has as many frames as it has in the batch.
    rows, frames, terms, targets = [clips[0], clips[2]], [], {"l1": [], "cosine": []}, []
    batch = trainer.eval_data_collator(rows)
    for row in rows:
        raw = row["audio"]["array"]
        heard = [extractor(raw, sampling_rate=16_000).input_values[0] for extractor in (RAW, NORMALISED)]
        means = [stock_means(*three) for three in zip(teachers, heard, groups, strict=True)]
        if average:
            predictions, targets = means[0], [(a + b) / 2 for a, b in zip(*means, strict=True)]
        else:
            nearest = [0, 1, 1, 2, 2, 3]  # of 3 layers: 0, 0.6, 1.2, 1.8, 2.4, 3
            inputs = stock_means(teachers[0], heard[0], [[nearest[index] for index in group] for group in groups[1]])
            maps = distiller.projections
            predictions = means[0] + [F.linear(x, m.weight, m.bias) for x, m in zip(inputs, maps, strict=True)]
            targets = means[0] + means[1]
        frames.append(len(targets[0]))
        for prediction, target in zip(predictions, targets, strict=True):
            terms["l1"].append(frames[-1] * F.l1_loss(prediction, target))
            terms["cosine"].append(-F.cosine_similarity(prediction, target, dim=-1).sum())
    expected = {name: sum(values) / len(targets) / sum(frames) for name, values in terms.items()}

    with padding_ignored(*trainer.encoders), torch.no_grad():
        actual = trainer.teacher_targets(**batch)
        _, outputs = trainer.compute_loss(distiller, batch, return_outputs=True)
    assert [tuple(of_set.shape[::3]) for of_set in actual] == [(3, 32)] if average else [(3, 32), (3, 48)]
    for index, target in enumerate(targets):  # of the longer clip
        torch.testing.assert_close(actual[index // 3][index % 3, 1], target, atol=1e-5, rtol=0)
    assert outputs["num_frames"] == sum(frames) and frames[0] < frames[1]
    for name, value in (expected | {"distillation": expected["l1"] + expected["cosine"]}).items():
        torch.testing.assert_close(outputs[f"{name}_loss"], value, atol=1e-5, rtol=1e-5)


def test_normalisation_is_that_of_the_feature_extractor():
    rows = [row["audio"]["array"] for row in recordings(3)]
    expected = NORMALISED(rows, sampling_rate=16_000, padding=True, return_tensors="pt")
    raw = RAW(rows, sampling_rate=16_000, padding=True, return_tensors="pt")
    actual = zero_mean_unit_variance(raw.input_values, raw.attention_mask)
    torch.testing.assert_close(actual, expected.input_values, atol=1e-5, rtol=0)
    alone = zero_mean_unit_variance(raw.input_values[2:])
    torch.testing.assert_close(alone[0], expected.input_values[2], atol=1e-5, rtol=0)
    assert not zero_mean_unit_variance(torch.zeros(1, 9), torch.zeros(1, 9).long()).any()  # an unreadable batch


@pytest.mark.parametrize("normalised_first", [True, False])
def test_each_teacher_hears_audio_as_its_own_extractor_prepares_it(normalised_first, tmp_path):
    teachers = pair(average=True)[:: -1 if normalised_first else 1]
    trainer = make_trainer(tmp_path, teachers, recordings())
    batch = trainer.data_collator(recordings())
    hubert, wavlm = (0, 1) if normalised_first else (1, 0)
    heard = trainer.ensemble.prepare(hubert, **batch)
    torch.testing.assert_close(heard.mean(-1), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(heard.std(-1), torch.ones(8), atol=1e-3, rtol=0)
    assert trainer.ensemble.prepare(wavlm, **batch).mean() > 0.05
    assert trainer.processing_class.do_normalize == normalised_first
    seen = []
    trainer.student.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer._setup()
    trainer.steps = trainer.skill_config.resolve_steps(6)
    trainer.distiller = trainer._make_distiller()
    trainer.compute_loss(trainer.distiller, batch)
    torch.testing.assert_close(seen[-1], trainer.ensemble.prepare(0, **batch))


def test_one_way_of_preparing_audio_is_left_to_the_collator(tmp_path):
    teachers = [tiny_teacher(), family_teacher("hubert-base")]
    trainer = make_trainer(tmp_path, teachers, recordings())
    assert not trainer.ensemble.is_audio_raw and trainer.data_collator.feature_extractor is trainer.processing_class


# ---- Projections ----


def test_projections_start_at_the_ridge_regression_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((200, 6)) * np.geomspace(1, 1e-2, 6) + 1).astype(np.float32)
    y = (x @ rng.standard_normal((6, 4)) + 0.1 * rng.standard_normal((200, 4))).astype(np.float32)
    fit = LeastSquares()
    for part in (slice(0, 50), slice(50, 200)):
        fit.update(torch.as_tensor(x[part]), torch.as_tensor(y[part]))
    weight, bias = fit.solve()
    ridge = linear_model.Ridge(alpha=RIDGE * x.var(0).mean() * len(x)).fit(x.astype(float), y - x @ np.eye(6, 4))
    np.testing.assert_allclose(weight, ridge.coef_ + np.eye(4, 6), atol=1e-4)
    np.testing.assert_allclose(bias, ridge.intercept_, atol=1e-4)
    same = LeastSquares()
    same.update(torch.as_tensor(x), torch.as_tensor(x))
    np.testing.assert_allclose(same.solve().weight, np.eye(6), atol=1e-6)


def test_equal_frames_give_equal_fits():
    torch.manual_seed(0)
    x, y = torch.randn(200, 4) @ torch.randn(4, 32), torch.randn(200, 48)
    fit = LeastSquares()
    fit.update(x, y)
    rng = np.random.default_rng(0)
    memory, fits = [], set()
    for _ in range(1000):
        memory = [*memory[-20:], bytearray(rng.integers(1, 5000))]  # so that the solver's memory lies elsewhere
        fits.add(fit.solve().weight.tobytes())
    assert len(fits) == 1


def test_a_fitted_start_is_nearer_than_the_identity_and_survives_gates_and_cut(tmp_path):
    recipe = {"teacher_targets": "separate", "final_steps": 1}
    trainer = make_trainer(tmp_path, pair(average=False), recordings(), recipe, max_steps=2, save_strategy="no")
    before = trainer.evaluate()["eval_distillation_loss"]
    starts, trainer.projection_starts = trainer.projection_starts, []
    trainer.distiller = None
    assert before < trainer.evaluate()["eval_distillation_loss"] - 0.1
    trainer.distiller, trainer.projection_starts = None, starts
    assert trainer.evaluate()["eval_distillation_loss"] == before
    trainer.train()
    assert [tuple(linear.weight.shape) for linear in trainer.distiller.projections] == [(48, 32)] * 2
    assert trainer.record.losses["start"]["distillation_loss"] == pytest.approx(before, abs=1e-4)


def test_the_last_layer_predicts_the_groups_of_all_teachers(tmp_path):
    recipe = {"teacher_targets": "separate", "student_layers": "last", "layer_groups": [[1], [2, 3]]}
    trainer = make_trainer(tmp_path, pair(average=False), recordings(), recipe | {"num_clusters": None})
    trainer._setup()
    distiller = trainer._make_distiller()
    assert trainer.groups_of_teachers == [[[1], [2, 3]]] * 2 and distiller.student_groups == [[-1]] * 4
    assert [tuple(start.weight.shape) for start in trainer.projection_starts] == [(48, 32)] * 2
    trainer.steps = trainer.skill_config.resolve_steps(6)
    loss = trainer.compute_loss(distiller.eval(), trainer.data_collator(recordings()))
    loss.backward()
    assert len(distiller.projections) == 4
    assert all(linear.weight.grad.abs().sum() > 0 for linear in distiller.projections)


@pytest.mark.parametrize("layers, other", [(12, 24), (24, 12), (12, 12), (3, 5), (5, 3)])
def test_depths_correspond_from_first_to_last(layers, other):
    states = [same_relative_depth(index, layers, other) for index in range(layers + 1)]
    assert states[0] == 0 and states[-1] == other and states == sorted(states)
    assert all(abs(state / other - index / layers) <= 0.5 / other + 1e-9 for index, state in enumerate(states))


# ---- Identical teachers ----


def test_the_average_of_identical_teachers_is_one_of_them_bit_for_bit(tmp_path):
    trainers = []
    for name, teachers in (("one", tiny_teacher()), ("two", [tiny_teacher(), tiny_teacher()])):
        recipe = {"use_projections": True}  # averages always have them
        trainers.append(make_trainer(tmp_path / name, teachers, None, recipe, max_steps=3, save_strategy="no"))
        trainers[-1].train()
    one, two = trainers
    assert two.groups_of_teachers == [one.layer_groups] * 2
    for (name, weight), (_, other) in zip(one.model.state_dict().items(), two.model.state_dict().items(), strict=True):
        assert torch.equal(weight, other), name
    logs = [[line.get("loss") for line in trainer.state.log_history] for trainer in trainers]
    assert logs[0] == logs[1]


def test_separate_heads_of_identical_teachers_give_the_gradient_of_one(tmp_path):
    results = []
    for teachers in ([tiny_teacher()], [tiny_teacher(), tiny_teacher()]):
        trainer = make_trainer(tmp_path, teachers, recipe={"teacher_targets": "separate", "use_projections": True})
        trainer._setup()
        trainer.steps = trainer.skill_config.resolve_steps(6)
        distiller = trainer._make_distiller().eval()
        torch.manual_seed(1)
        with_noise(trainer.student)  # an exact copy has no gradient but rounding errors
        loss = trainer.compute_loss(distiller, trainer.eval_data_collator(noise_clips(3, 9_000)))
        loss.backward()
        weights = dict(trainer.student.named_parameters())
        gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        results.append((loss.detach(), gradients, [linear.weight.grad for linear in distiller.projections]))
    (loss, gradients, of_maps), (loss_of_two, gradients_of_two, of_maps_of_two) = results
    torch.testing.assert_close(loss_of_two, loss, atol=1e-6, rtol=0)
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_of_two[name], gradient, atol=1e-6, rtol=1e-4)
    for index, gradient in enumerate(of_maps * 2):  # each group of each teacher counts equally
        torch.testing.assert_close(of_maps_of_two[index], gradient / 2, atol=1e-6, rtol=1e-4)


# ---- Runs ----


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    recipe = {"teacher_targets": "separate", "final_steps": 2, "shrink_steps": 2}
    clips, teachers = recordings(), pair(average=False)
    whole = make_trainer(tmp_path / "whole", teachers, clips, recipe, max_steps=5)
    whole.train()
    assert whole.stage == 3 and whole.student.num_parameters() < whole.teachers[0].num_parameters
    killed = make_trainer(tmp_path / "killed", teachers, clips, recipe, [KillAt(2)], max_steps=5, save_steps=1)
    with pytest.raises(Kill):
        killed.train()
    resumed = make_trainer(tmp_path / "killed", teachers, clips, recipe, max_steps=5)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.groups_of_teachers == whole.groups_of_teachers
    np.testing.assert_array_equal(resumed.other_calibrations[0].similarity, whole.other_calibrations[0].similarity)
    assert resumed.other_calibrations[0].silhouettes == whole.other_calibrations[0].silhouettes
    for name, weight in whole.distiller.state_dict().items():
        assert torch.equal(weight, resumed.distiller.state_dict()[name]), name

    # Each teacher, in its place, belongs to the run.
    first, second = teachers
    for others, message in (
        ([first], r"teacher\[1\] \(checkpoint: .*hubert.*, now: None\)"),
        ([first, second, second], r"teacher\[2\] \(checkpoint: None"),
        ([first, with_other_weights(second)], r"teacher\[1\].weights \(checkpoint"),
    ):
        other = make_trainer(tmp_path / "killed", others, clips, recipe, max_steps=5)
        with pytest.raises(ValueError, match=f"belongs to a different r.*{message}"):
            other.train(resume_from_checkpoint=True)

    path = tmp_path / "killed" / "checkpoint-1" / "skill_state.json"
    for value, message in (
        (3, "`other_teachers` in skill_state.json must list objects"),
        ([{}], "`layer_groups` in skill_state.json must list layers"),
        ([{"layer_groups": [[0]], "silhouettes": 3}], "`record` in skill_state.json is not valid"),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"other_teachers": value}))
        with pytest.raises(ValueError, match=message):
            other.train(resume_from_checkpoint=str(path.parent))


def with_other_weights(model):
    with torch.no_grad():
        model.encoder.layers[0].final_layer_norm.bias += 1
    return model


def test_states_of_one_teacher_are_as_before(tmp_path):
    trainer = make_trainer(tmp_path, tiny_teacher())
    trainer._setup()
    trainer.steps = trainer.skill_config.resolve_steps(6)
    state = trainer._skill_state()
    assert "other_teachers" not in state and state["teacher"]["model_type"] == "wavlm"
    results = trainer.report().results()
    assert "other_teachers" not in results and "teacher_targets" not in results


def test_the_head_of_the_first_teacher_is_kept(tmp_path):
    from test_task_heads import fine_tuned

    fine_tuned().save_pretrained(tmp_path / "wavlm")
    trainer = make_trainer(
        tmp_path / "out", [fine_tuned("classification"), fine_tuned(), str(tmp_path / "wavlm")], task="classification"
    )
    assert [teacher.head for teacher in trainer.teachers] == ["SequenceClassification", None, None]
    trainer._setup()
    targets, logits = trainer.teacher_outputs(torch.randn(2, 6000))
    assert [tuple(of_set.shape[:2]) for of_set in targets] == [(2, 2)] and logits.shape == (2, 3)


# ---- What is refused ----


def test_teachers_that_cannot_teach_together(tmp_path):
    wavlm, hubert = pair(average=True)
    wide, short = family_teacher("hubert-base", hidden_size=48), family_teacher("hubert-base", num_hidden_layers=2)
    fast = family_teacher("hubert-base", conv_stride=(5, 2, 2, 2, 2, 2, 1))
    SEWConfig(architectures=["SEWModel"]).save_pretrained(tmp_path / "sew")
    groups = {"layer_groups": [[0, 1], [3]], "num_clusters": None}
    for teachers, recipe, message in (
        ([], {}, "`teacher` is an empty list"),
        ([wavlm, str(tmp_path / "sew")], {}, "is a `sew`; teachers"),
        ([wavlm, None], {}, "teacher"),
        ([wavlm, fast], {}, r"`teacher\[0\]` makes a frame every 320 samples.*`teacher\[1\]` every 160"),
        ([wavlm, hubert, wide], {}, r"`teacher\[0\]` has `hidden_size` 32 and `teacher\[2\]` 48.* to separate"),
        ([wavlm, short], {"num_clusters": 4}, r"`teacher\[1\]` has only 3 layers to group, too few for 4 groups"),
        ([wavlm, short], groups, r"all teachers and names layer 3, but .* `teacher\[1\]` are 0 to 2"),
        (
            [wavlm, hubert],
            {"projection_groups": [[0, 1]], "teacher_targets": "separate"},
            "`teacher_targets` separate no groups share a projection; leave it out",
        ),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            make_trainer(tmp_path, teachers, recipe=recipe)
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="`teacher_targets` must be one of average, separate"):
        SkillConfig(teacher_targets="both")


def test_teachers_of_two_sampling_rates(tmp_path):
    teachers = [tmp_path / "slow", tmp_path / "fast"]
    for directory, rate in zip(teachers, (8_000, 16_000), strict=True):
        tiny_teacher().save_pretrained(directory)
        Wav2Vec2FeatureExtractor(sampling_rate=rate).save_pretrained(directory)
    with pytest.raises(ValueError, match=r"`teacher\[0\]` takes audio of 8000 Hz and `teacher\[1\]` of 16000 Hz"):
        make_trainer(tmp_path / "out", teachers)
    with pytest.raises(ValueError, match=r"`output_dir`, .*, is the `teacher\[1\]`"):
        trainer = make_trainer(teachers[1], [tiny_teacher(), str(teachers[1])])
        trainer.train()


def test_the_first_teacher_s_number_of_groups_must_fit_the_others(tmp_path):
    short = family_teacher("hubert-base", num_hidden_layers=1)
    recipe = {"num_clusters": None, "distance_threshold": 1e-9}
    trainer = make_trainer(tmp_path, [tiny_teacher(), short], recipe=recipe)
    with pytest.raises(ValueError, match=r"`teacher\[1\]` has only 2 layers to group, too few for 4 groups"):
        trainer._setup()
    trainer = make_trainer(
        tmp_path, [tiny_teacher(), short], recipe={"num_clusters": None, "teacher_targets": "separate"}
    )
    trainer._setup()
    assert trainer.groups_of_teachers[1] == [[0], [1]]


def test_audio_that_is_normalised_already_cannot_be_given_to_a_teacher_that_is_not(tmp_path):
    hubert_first, raw_first = pair(average=True)[::-1], pair(average=True)
    for kwargs, message in (
        ({"clips": noise_clips(6, 9_000)}, "rows of `train_dataset` have `input_values`; pass rows with `audio`"),
        ({"clips": recordings(), "data_collator": lambda rows: {}}, "`data_collator` normalises all of it"),
        ({"clips": recordings(), "data_collator": SpeechCollator(NORMALISED)}, "`data_collator` normalises all of it"),
    ):
        with pytest.raises(ValueError, match=f"differ in `do_normalize`.*{message}"):
            make_trainer(tmp_path, hubert_first, **kwargs).train()
    check_data(make_trainer(tmp_path, raw_first, noise_clips(6, 9_000)))  # as they are, they can be normalised

    class Louder(Wav2Vec2FeatureExtractor):
        def __call__(self, audio, **kwargs):
            return super().__call__(2 * np.asarray(audio), **kwargs)

    with pytest.raises(ValueError, match="needs a Wav2Vec2FeatureExtractor, but `processing_class` is a Louder"):
        make_trainer(tmp_path, raw_first, recordings(), processing_class=Louder(do_normalize=False))


# ---- What is written ----


def test_advice_counts_from_what_the_copy_of_the_first_teacher_reaches():
    at = {moment: {"distillation_loss": 0.0, "cosine_similarity": cosine} for moment, cosine in (("start", 0.8),)}
    for cosine, sentences in ((0.7, 0), (0.6, 1)):
        losses = at | {"end": {"distillation_loss": 0.0, "cosine_similarity": cosine}}
        advice = RunRecord(losses=losses, num_teachers=2).advice_on_student()
        assert len(advice) == sentences and all("to the teachers' (below 0.64 " in sentence for sentence in advice)
        assert len(RunRecord(losses=losses).advice_on_student()) == 1
    assert "exact prediction of all targets: -1 and 1" in RunRecord(losses=losses, num_teachers=2).summary()[0]
    assert RunRecord.from_dict(RunRecord(num_teachers=2).to_dict()).num_teachers == 2


@pytest.fixture(scope="module")
def on_the_command_line(tmp_path_factory):
    """A run of a WavLM and a wider HuBERT from directories, with separate targets; the directory of the student."""
    folder = write_inputs(tmp_path_factory.mktemp("several"))
    family_teacher("hubert-base", hidden_size=48).save_pretrained(folder / "hubert")
    RAW.save_pretrained(folder / "hubert")
    settings = on_folder(folder, folder / "out", teacher_name_or_path=None, max_steps=2, num_heldout=0)
    settings |= {"teacher": [str(folder / "teacher"), str(folder / "hubert")], "teacher_targets": "separate"}
    assert distill.main(command_line(settings | {"num_clusters": 2})) == 0
    return folder / "out"


def test_a_run_on_the_command_line_names_all_teachers(on_the_command_line):
    results = results_of(on_the_command_line)
    assert results["teacher"] == "teacher" and results["teacher_targets"] == "separate"
    (other,) = results["other_teachers"]
    assert other["teacher"] == "hubert" and len(other["layer_groups"]) == 2
    assert other["teacher_parameters"] == family_teacher("hubert-base", hidden_size=48).num_parameters()
    assert json.loads((on_the_command_line / "skill_config.json").read_text())["teacher_targets"] == "separate"
    card = (on_the_command_line / "README.md").read_text()
    assert card.count("\n# SKILL student of a `wavlm` model and a `hubert` model\n") == 1
    assert "fewer than the first of its teachers, a `wavlm` model. It was distilled" in card
    assert "also learned from a `hubert` model ([Ensemble" in card and "each teacher has targets of its own." in card
    groups = ", ".join(str(group)[1:-1] for group in other["layer_groups"])
    assert (
        "\nGroups of a `hubert` model: {" in card and "Each group of each other teacher has its own linear map" in card
    ), groups


@pytest.mark.parametrize("names", [["me/a", "you/b"], [None, "you/b"], ["me/a", None], ["me/a", "me/a"]])
def test_metadata_lists_the_teachers_that_have_a_name(names):
    data = ModelCardData(base_model=names[0])
    add_other_teachers(data, [OtherTeacher(names[1], tiny_teacher())])
    known = list(dict.fromkeys(filter(None, names)))
    assert data.base_model == known
    assert data.to_dict().get("base_model_relation") == ("finetune" if len(known) > 1 else None)


@pytest.mark.parametrize("licences", [("mit", "mit"), ("mit", "apache-2.0"), ("mit", None), (None, "mit")])
def test_a_licence_is_stated_only_if_all_teachers_have_it(licences, tmp_path):
    header = f"license: {licences[1]}\n" if licences[1] else "tags: [x]\n"
    (tmp_path / "README.md").write_text(f"---\n{header}---\n")
    data = ModelCardData(license=licences[0])
    add_other_teachers(data, [OtherTeacher(tmp_path, tiny_teacher())])
    assert data.license == (licences[0] if licences[0] == licences[1] else None)


def test_one_value_and_lists_are_teachers_in_settings_of_every_kind(tmp_path):
    needed = {"audio_dir": "a", "output_dir": str(tmp_path / "out")}
    for value, expected in (("one", "one"), (["one"], "one"), (["one", "two"], ["one", "two"])):
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(needed | {"teacher_name_or_path": value}))
        assert distill.parse([str(path)])[0][0].teacher_name_or_path == expected
        words = command_line(needed | {"teacher": value})
        assert distill.parse(words)[0][0].teacher_name_or_path == expected
    assert distill.parse(command_line(needed))[0][0].teacher_name_or_path == "microsoft/wavlm-base-plus"
    recipe = distill.parse(command_line(needed | {"recipe": "hubert-base-075"}))[0][0]
    assert recipe.teacher_name_or_path == "facebook/hubert-base-ls960"
    path.write_text(json.dumps(needed | {"teacher_name_or_path": 3}))
    with pytest.raises(ValueError, match="`teacher_name_or_path` in .* must be .* but is 3"):
        distill.parse([str(path)])
