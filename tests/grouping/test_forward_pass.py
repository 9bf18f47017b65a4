import pytest
from conftest import tiny_teacher
from transformers import BertConfig, BertModel, Wav2Vec2FeatureExtractor

from skill_hf import layer_similarity
from skill_hf.analysis import layer_distances
from skill_hf.grouping.forward_pass import check_models


def check(*models, extractors=(None, None)):
    check_models(models, extractors[: len(models)], ["a/teacher", "a/student"][: len(models)])


def test_models_of_the_same_frames_can_be_compared():
    check(tiny_teacher())
    check(tiny_teacher(), tiny_teacher("large", hidden_size=48, num_hidden_layers=2))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ({"conv_stride": (5, 2, 2, 2, 2, 2, 1)}, "makes a frame every 320 samples, .* `a/student` every 160"),
        ({"conv_kernel": (10, 3, 3, 3, 3, 2, 3)}, "every 320 samples, of 400 samples, .* every 320, of 560;"),
    ],
)
def test_other_frames_are_refused(frames, message):
    with pytest.raises(ValueError, match=message):
        check(tiny_teacher(), tiny_teacher(**frames))


def test_both_functions_refuse_other_frames():
    teacher, other = tiny_teacher(), tiny_teacher(conv_stride=(5, 2, 2, 2, 2, 2, 1))
    with pytest.raises(ValueError, match="`teacher` makes a frame .* `other` .* the same frame rate"):
        layer_similarity(teacher, [], other=other)
    with pytest.raises(ValueError, match="`teacher` makes a frame .* `student` .* the same frame rate"):
        layer_distances(teacher, other, [])


def test_other_sampling_rates_are_refused():
    extractors = [Wav2Vec2FeatureExtractor(sampling_rate=rate) for rate in (16_000, 8_000)]
    with pytest.raises(ValueError, match="`a/teacher` takes audio of 16000 Hz and `a/student` of 8000 Hz; only"):
        check(tiny_teacher(), tiny_teacher(), extractors=extractors)


def test_other_inputs_are_refused():
    text_model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match="`a/student` must be a speech encoder .* BertModel takes `input_ids`"):
        check(tiny_teacher(), text_model)
    with pytest.raises(ValueError, match="`a/teacher` has `add_adapter`"):
        check(tiny_teacher(add_adapter=True))
