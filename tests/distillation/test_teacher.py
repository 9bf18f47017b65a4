from pathlib import Path

import pytest
import torch
from conftest import family_teacher, padded_batch, tiny_teacher
from transformers import Wav2Vec2FeatureExtractor, WavLMModel

from skill_hf.distillation.run_identity import checksum
from skill_hf.distillation.teacher import Teacher
from skill_hf.losses import group_means


def named(name: str = "", commit: str | None = None) -> WavLMModel:
    model = tiny_teacher()
    model.config.name_or_path, model.config._commit_hash = name, commit
    return model


@pytest.mark.parametrize(
    ("source", "name", "hub_id"),
    [
        (named(), "", None),
        (named("someone/teacher", "0" * 40), "someone/teacher", "someone/teacher"),
        (named("someone/teacher"), "", None),  # a directory, perhaps, as seen from another one
        (named("/no/directory"), "", None),
    ],
)
def test_name_of_a_loaded_model(source, name, hub_id):
    teacher = Teacher(source)
    assert (teacher.name, teacher.hub_id, teacher.directory) == (name, hub_id, None)


@pytest.mark.parametrize(
    "source", [None, 5, 0, b"teacher", ["teacher"], {}, torch.nn.Linear(2, 2), float("nan"), True]
)
def test_what_is_no_teacher_is_refused_in_one_line(source):
    with pytest.raises(ValueError, match="teacher") as error:
        Teacher(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("as_path", [True, False])
def test_a_directory_is_found_again_from_another_one(tmp_path, monkeypatch, as_path):
    tiny_teacher().save_pretrained(tmp_path / "here" / "teacher")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    teacher = Teacher(Path("teacher") if as_path else "teacher")
    monkeypatch.chdir(tmp_path / "there")
    assert teacher.directory == tmp_path / "here" / "teacher"
    assert str(teacher.name) == "teacher"
    monkeypatch.chdir(tmp_path / "here")
    assert teacher.hub_id is None
    assert Teacher(teacher.model).directory == tmp_path / "here" / "teacher"


def test_the_model_is_frozen_and_counted():
    teacher = Teacher(tiny_teacher().half().train())
    assert teacher.model.dtype == torch.float32 and not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.num_parameters == tiny_teacher().num_parameters()
    assert teacher.config is teacher.model.config


def test_checksums_tell_teachers_of_one_size_apart():
    first, second = Teacher(tiny_teacher()), Teacher(tiny_teacher())
    assert first.weights_checksum() == second.weights_checksum() == checksum(tiny_teacher())
    assert first.identity() == second.identity()
    with torch.no_grad():
        second.model.encoder.layers[0].layer_norm.weight[0] += 1
    assert first.weights_checksum() != second.weights_checksum()
    assert first.identity() == second.identity()  # which looks at one weight
    with torch.no_grad():
        second.model.feature_projection.projection.weight[0, 0] += 1
    assert first.identity() != second.identity()
    first, second = (Teacher(family_teacher("hubert-batch-norm")) for _ in range(2))
    second.model.encoder.pos_conv_embed.batch_norm.running_mean[0] += 1
    assert first.weights_checksum() != second.weights_checksum()
    assert set(first.identity()) == {"model_type", "num_parameters", "checksum"}  # that older checkpoints have


def test_fast_copies_are_made_once_and_share_the_weights():
    teacher = Teacher(tiny_teacher())
    fast, half = teacher.fast_copy(), teacher.fast_copy(torch.bfloat16)
    assert fast is teacher.fast_copy() and half is teacher.fast_copy(torch.bfloat16)
    assert fast is not half and fast is not teacher.model
    weights = [model.encoder.layers[0].feed_forward.output_dense.weight for model in (teacher.model, fast, half)]
    assert weights[0] is weights[1] or weights[0].data_ptr() == weights[1].data_ptr()
    assert weights[2].dtype == torch.bfloat16


def test_a_model_of_another_class_is_its_own_copy():
    class Mine(WavLMModel):
        pass

    teacher = Teacher(Mine(tiny_teacher().config))
    assert teacher.fast_copy() is teacher.model


def test_targets_are_means_of_the_hidden_states():
    teacher, groups, inputs = Teacher(tiny_teacher()), [[0, 3], [1]], padded_batch()
    with torch.no_grad():
        states = teacher.model(**inputs, output_hidden_states=True).hidden_states
    targets = teacher.targets(groups, **inputs)
    torch.testing.assert_close(targets, group_means(states, groups), atol=1e-5, rtol=0)
    assert not targets.requires_grad


def test_its_feature_extractor_or_the_usual_one(layout, tmp_path, caplog):
    teacher = Teacher(tiny_teacher(layout))
    assert teacher.feature_extractor().do_normalize == (layout == "large")
    assert "has no preprocessor_config.json" in caplog.text
    tiny_teacher(layout).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=layout == "base", sampling_rate=8_000).save_pretrained(tmp_path)
    extractor = Teacher(tmp_path).feature_extractor()
    assert (extractor.do_normalize, extractor.sampling_rate) == (layout == "base", 8_000)
