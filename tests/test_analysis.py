import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_teacher
from transformers import BatchFeature, WavLMConfig, WavLMModel

from skill_hf import WavLMForSkillStudent, WavLMSkillStudentConfig, WavLMSkillStudentForCTC
from skill_hf.analysis import layer_distances
from skill_hf.compression.macs import count_macs
from skill_hf.models.families import build_student


LENGTHS = [4000, 4000, 4000, 6400, 4000, 5000, 5000]


@pytest.fixture
def audio():
    rng = np.random.default_rng(0)
    return [(rng.standard_normal(length) * 0.1).astype(np.float32) for length in LENGTHS]


def changed_copy(teacher, *, seed=1, scale=0.1):
    """A student whose every weight is off a little, so that later layers are farther away."""
    student = build_student(teacher)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in student.encoder.parameters():
            parameter += scale * torch.randn_like(parameter)
    return student.eval()


def distances_of(teacher, student, audio, **kwargs):
    return layer_distances(teacher, student, audio, progress=False, **kwargs)


@torch.no_grad()
def frames_of(model, audio):
    """(hidden states, frames, features), float64, each waveform passed on its own."""
    states = [
        torch.stack(model(torch.as_tensor(waveform)[None], output_hidden_states=True).hidden_states)[:, 0]
        for waveform in audio
    ]
    return torch.cat(states, dim=1).double()


def reference_cka(x, y):
    """By Gram matrices over frames (Kornblith et al., equations 3 and 4), where the package uses cross-products."""
    centring = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    gram_x, gram_y = (centring @ z @ z.T @ centring for z in (x, y))
    return float((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm()))


def test_distances_agree_with_their_definitions_at_every_layer(teacher, audio):
    student = changed_copy(teacher)
    distances = distances_of(teacher, student, audio)
    pairs = list(zip(frames_of(teacher, audio), frames_of(student, audio), strict=True))
    assert len(pairs) == teacher.config.num_hidden_layers + 1
    np.testing.assert_allclose(distances["cka"], [1 - reference_cka(x, y) for x, y in pairs], atol=1e-5)
    cosine = [1 - float(F.cosine_similarity(x, y, dim=-1).mean()) for x, y in pairs]
    np.testing.assert_allclose(distances["cosine"], cosine, atol=1e-5)
    assert min(cosine[1:]) > 0.005  # the two differ enough for a wrong layer or a swapped model to show


def test_an_exact_copy_is_at_distance_zero(teacher, audio):
    distances = distances_of(teacher, build_student(teacher), audio)
    for values in distances.values():
        np.testing.assert_allclose(values, 0, atol=1e-5)


def test_cka_alone_is_blind_to_a_rotation(audio):
    teacher = tiny_teacher()
    rotated = WavLMModel(teacher.config)
    rotated.load_state_dict(teacher.state_dict())
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    rotated.encoder.layers[-1].final_layer_norm.register_forward_hook(lambda module, args, output: output @ rotation)
    distances = distances_of(teacher, rotated, audio)
    assert distances["cka"][-1] < 1e-5
    assert distances["cosine"][-1] > 0.5


def test_batching_changes_nothing_but_rounding(teacher, audio):
    student = changed_copy(teacher)
    alone, together = (distances_of(teacher, student, iter(audio), batch_size=size) for size in (1, 4))
    for name, values in alone.items():
        assert values.dtype == np.float64
        np.testing.assert_allclose(together[name], values, atol=1e-5)


def test_feature_extractor_prepares_the_audio(audio):
    teacher = tiny_teacher()
    student = changed_copy(teacher)

    class Clipped:
        sampling_rate = 16_000

        def __call__(self, values, sampling_rate, return_tensors):
            return BatchFeature({"input_values": [np.clip(values, -0.05, 0.05)]})

    expected = distances_of(teacher, student, [np.clip(waveform, -0.05, 0.05) for waveform in audio])["cosine"]
    prepared = distances_of(teacher, student, audio, feature_extractor=Clipped())["cosine"]
    np.testing.assert_allclose(prepared, expected, atol=1e-6)
    assert not np.allclose(distances_of(teacher, student, audio)["cosine"], expected, atol=1e-4)


def test_models_run_in_eval_mode_and_go_back(audio):
    teacher = tiny_teacher()
    student = changed_copy(teacher)
    expected = distances_of(teacher, student, audio)["cosine"]
    student.config.hidden_dropout = 0.5
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    student.train()
    student.feature_extractor.eval()
    np.testing.assert_array_equal(distances_of(teacher, student, audio)["cosine"], expected)
    assert student.training and student.encoder.layers[0].training
    assert not student.feature_extractor.training and not teacher.training


def test_models_that_do_not_match_are_refused(audio):
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match="`num_hidden_layers` 3, but the student has 2"):
        distances_of(teacher, tiny_teacher(num_hidden_layers=2), audio)
    with pytest.raises(ValueError, match="`hidden_size` 32, but the student has 48"):
        distances_of(teacher, tiny_teacher(hidden_size=48), audio)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_broken_layer_is_named_with_its_model(audio, role):
    models = {"teacher": tiny_teacher(), "student": tiny_teacher()}
    with torch.no_grad():
        models[role].encoder.layers[1].final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=f"Hidden state 2 of the {role} has NaN"):
        distances_of(models["teacher"], models["student"], audio)


def test_a_layer_that_does_not_vary_is_named(audio):
    constant = tiny_teacher()
    with torch.no_grad():
        constant.encoder.layers[2].final_layer_norm.weight.zero_()
    with pytest.raises(ValueError, match="Hidden state 3 .* does not vary"):
        distances_of(tiny_teacher(), constant, audio)


def test_no_audio_is_an_error():
    with pytest.raises(ValueError, match="no audio"):
        distances_of(tiny_teacher(), tiny_teacher(), [])


# ------------------------------------------------------------------------------------------------ multiply-accumulates
def closed_form(config, samples: int) -> tuple[int, int]:
    """
    Multiply-accumulates by the formulas of the layers, for a stock config or a student's: those that published tables
    count (convolutions, projections, attention with its part that is quadratic in the frames, feed-forward blocks),
    and what PyTorch counts besides: WavLM's gate of the position bias, a linear map of each head's input.
    """
    layers, size = config.num_hidden_layers, config.hidden_size
    heads = [len(left) for left in getattr(config, "remaining_heads", [range(config.num_attention_heads)] * layers)]
    units = getattr(config, "intermediate_sizes", [config.intermediate_size] * layers)
    head_size = size // config.num_attention_heads
    frames, channels, total = samples, 1, 0
    for width, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        frames = (frames - kernel) // stride + 1
        total += frames * channels * width * kernel
        channels = width
    kernel, groups = config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
    # An even kernel, padded by half of it on both sides, gives a frame too many, which is cut off.
    total += frames * channels * size + (frames + 1 - kernel % 2) * size * (size // groups) * kernel
    for number, width in zip(heads, units, strict=True):
        total += (
            frames * 4 * size * number * head_size + 2 * frames**2 * number * head_size + 2 * frames * size * width
        )
    return total, sum(heads) * frames * head_size * 8


PRUNED = {  # DiariZen's wavlm_base_s80_md
    "conv_dim": [90, 161, 173, 181, 351, 155, 137],
    "remaining_heads": [list(range(heads)) for heads in (2, 3, 3, 5, 2, 1, 4, 4, 0, 0, 2, 1)],
    "intermediate_sizes": [666, 660, 649, 1080, 237, 299, 437, 573, 53, 80, 211, 334],
    "removed_attention_blocks": [8, 9],
}


@pytest.mark.parametrize(
    ("make", "published"),
    [
        (lambda: WavLMModel(WavLMConfig()), 6.911e9),
        (lambda: WavLMForSkillStudent(WavLMSkillStudentConfig()), 6.911e9),
        (lambda: WavLMForSkillStudent(WavLMSkillStudentConfig(**PRUNED)), 1.134e9),
    ],
    ids=["stock", "unpruned", "pruned"],
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_macs_are_those_of_the_formulas_and_of_published_tables(make, published, implementation):
    with torch.device("meta"):
        model = make()
    if isinstance(model, WavLMForSkillStudent):
        model.set_attn_implementation(implementation)
    table, rest = closed_form(model.config, 16_000)
    assert table == pytest.approx(published, rel=5e-4)
    assert count_macs(model, seconds=1.0) == table + rest
    assert rest < 0.01 * table
    assert count_macs(model) == sum(closed_form(model.config, 160_000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counting_macs_leaves_the_model_as_it_is(layout, dtype):
    model = build_student(tiny_teacher(layout)).to(dtype)
    model.encoder.layers[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    assert count_macs(model, 0.5, sampling_rate=8_000) == sum(closed_form(model.config, 4_000))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu" and torch.equal(tensor, before[name])


def test_macs_of_a_head_are_counted():
    config = WavLMSkillStudentConfig(**{**tiny_config().to_diff_dict(), "model_type": "", "vocab_size": 50})
    encoder, head = WavLMForSkillStudent(config), WavLMSkillStudentForCTC(config)
    assert count_macs(head, 1.0) - count_macs(encoder, 1.0) == 49 * 32 * 50


def test_what_cannot_be_counted_is_refused():
    student = build_student(tiny_teacher())
    with pytest.raises(ValueError, match="`seconds` is 0.02, 320 samples, but the model needs 400"):
        count_macs(student, 0.02)
    student.add_gates()
    with pytest.raises(ValueError, match="still has its gates"):
        count_macs(student)
