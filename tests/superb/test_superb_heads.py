"""SUPERB's heads against direct ones, clip by clip and without padding, that take over their weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from transformers import WavLMForXVector

from skill_hf.superb.heads import ClassificationHead, CTCHead, MeanSpeakerHead, WeightedSum, XVectorHead


LAYERS, SIZE = 3, 12
FRAMES = (20, 33, 17, 28)


def clips(frames=FRAMES, seed: int = 0) -> list[torch.Tensor]:
    """Hidden states of clips, `(frames, layers, hidden size)`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, LAYERS, SIZE, generator=generator) for length in frames]


def padded(states: list[torch.Tensor], more: int = 0) -> dict[str, torch.Tensor]:
    longest = max(map(len, states)) + more
    batch = torch.zeros(len(states), longest, LAYERS, SIZE)
    for row, clip in enumerate(states):
        batch[row, : len(clip)] = clip
    return {"hidden_states": batch, "num_frames": torch.tensor([len(clip) for clip in states])}


def noisy(head):
    """At initialisation all layers weigh the same."""
    torch.manual_seed(1)
    with torch.no_grad():
        head.weighted_sum.scores.normal_()
    return head.eval()


def projected(head, clip: torch.Tensor) -> torch.Tensor:
    """`(frames, projection size)`, by loops."""
    exponentials = [math.exp(score) for score in head.weighted_sum.scores.tolist()]
    summed = sum(weight / sum(exponentials) * clip[:, layer] for layer, weight in enumerate(exponentials))
    return summed @ head.projector.weight.T + head.projector.bias


# ------------------------------------------------------------------------------------------------------- weighted sum
def test_weighted_sum_starts_even_and_sums_to_one():
    layer = WeightedSum(LAYERS)
    states = clips()[0]
    torch.testing.assert_close(layer(states), states.mean(1))
    with torch.no_grad():
        layer.scores.copy_(torch.tensor([0.0, math.log(2.0), math.log(5.0)]))
    torch.testing.assert_close(layer.weights, torch.tensor([1, 2, 5]) / 8)
    torch.testing.assert_close(layer(states), (states[:, 0] + 2 * states[:, 1] + 5 * states[:, 2]) / 8)


def test_every_layer_weight_is_trained():
    head = ClassificationHead(LAYERS, SIZE, [4])
    head(**padded(clips()), labels=torch.tensor([[0], [1], [2], [3]]))["loss"].backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in head.parameters())


# ----------------------------------------------------------------------------------------------------- classification
@pytest.mark.parametrize("num_classes", [[5], [4, 2, 3]])
def test_classification_equals_a_direct_one(num_classes):
    head = noisy(ClassificationHead(LAYERS, SIZE, num_classes))
    labels = torch.tensor([[index % number for number in num_classes] for index in range(4)])
    output = head(**padded(clips(), more=5), labels=labels)
    assert head.projector.weight.shape == (256, SIZE)
    losses, best = torch.zeros(len(num_classes)), []
    for clip, label in zip(clips(), labels.tolist(), strict=True):
        pooled = sum(projected(head, clip)) / len(clip)
        scores = (pooled @ head.classifier.weight.T + head.classifier.bias).split(num_classes)
        losses += torch.tensor([-math.log(softmax(part)[at]) for part, at in zip(scores, label, strict=True)])
        best.append([part.tolist().index(max(part.tolist())) for part in scores])
    torch.testing.assert_close(output["loss"], (losses / 4).sum(), atol=1e-5, rtol=0)
    assert output["logits"].tolist() == best


def softmax(scores: torch.Tensor) -> list[float]:
    exponentials = [math.exp(score) for score in scores.tolist()]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.parametrize("head_class", ["classification", "speaker"])
def test_averaged_states_give_the_same_as_frames(head_class):
    head, labels = (
        (ClassificationHead(LAYERS, SIZE, [3]), torch.tensor([[0], [1], [2], [0]]))
        if head_class == "classification"
        else (MeanSpeakerHead(LAYERS, SIZE, 3), torch.tensor([0, 1, 2, 0]))
    )
    noisy(head)
    frames = head(**padded(clips(), more=3), labels=labels)
    means = head(**padded([clip.mean(0, keepdim=True) for clip in clips()]), labels=labels)
    for name in ("loss", "logits"):
        torch.testing.assert_close(means[name], frames[name], atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------- speakers
def x_vector(head, clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and classified vector of one clip, by loops over time."""
    hidden = projected(head, clip)
    for layer, offsets in zip(head.tdnn, ((-2, -1, 0, 1, 2), (-2, 0, 2), (-3, 0, 3), (0,), (0,)), strict=True):
        spliced = [
            torch.cat([hidden[frame + offset] for offset in offsets])
            for frame in range(-offsets[0], len(hidden) - offsets[-1])
        ]
        hidden = (torch.stack(spliced) @ layer.kernel.weight.T + layer.kernel.bias).relu()
    mean = hidden.mean(0)
    std = ((hidden - mean).square().sum(0) / (len(hidden) - 1)).clamp_min(1e-8).sqrt()
    embedding = (head.embedding.weight @ torch.cat([mean, std]) + head.embedding.bias).relu()
    return embedding, (head.output.weight @ embedding + head.output.bias).relu()


def am_softmax(objective, vectors: list[torch.Tensor], speakers: list[int]) -> float:
    """Equation 6 of arXiv 1801.05599, scale 30 and margin 0.4."""
    losses = []
    for vector, speaker in zip(vectors, speakers, strict=True):
        cosines = [F.cosine_similarity(vector, column, dim=0).item() for column in objective.weight.T]
        target = math.exp(30 * (cosines[speaker] - 0.4))
        others = sum(math.exp(30 * cosine) for index, cosine in enumerate(cosines) if index != speaker)
        losses.append(-math.log(target / (target + others)))
    return sum(losses) / len(losses)


@torch.no_grad()
def test_x_vectors_equal_direct_ones():
    head = noisy(XVectorHead(LAYERS, SIZE, 3))
    output = head(**padded(clips(), more=4), labels=torch.tensor([2, 0, 1, 2]))
    pairs = [x_vector(head, clip) for clip in clips()]
    assert output["logits"].shape == (4, 512)
    torch.testing.assert_close(output["logits"], torch.stack([pair[0] for pair in pairs]), atol=1e-5, rtol=1e-4)
    expected = am_softmax(head.objective, [pair[1] for pair in pairs], [2, 0, 1, 2])
    assert output["loss"].item() == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_x_vectors_equal_those_of_transformers():
    """One clip alone, since `WavLMForXVector` has the padding take part."""
    config = tiny_config(num_hidden_layers=LAYERS - 1, hidden_size=SIZE, use_weighted_layer_sum=True)
    model = WavLMForXVector(config).eval()
    head = noisy(XVectorHead(LAYERS, SIZE, 7))
    model.layer_weights.copy_(head.weighted_sum.scores)
    for name in ("projector", "tdnn"):
        getattr(model, name).load_state_dict(getattr(head, name).state_dict())
    model.feature_extractor.load_state_dict(head.embedding.state_dict())
    waveform = torch.randn(1, 9000)
    states = torch.stack(model.wavlm(waveform, output_hidden_states=True).hidden_states, dim=2)
    theirs = model(waveform)
    embedding, _ = head.embed(states, torch.tensor([states.shape[1]]))
    # A channel that never fires has standard deviation 1e-4 here, for the gradient's sake, and 0 there.
    torch.testing.assert_close(embedding, theirs.embeddings.relu(), atol=2e-4, rtol=0)
    assert embedding.max() > 0.02


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 14, 15, 16])
def test_a_clip_shorter_than_the_context_is_repeated(frames):
    head = noisy(XVectorHead(LAYERS, SIZE, 3))
    (short, long) = clips((frames, 30))
    repeated = torch.cat([short] * 16)[: max(frames, 16)]
    embeddings = head(**padded([short, long]))["logits"]
    assert torch.isfinite(embeddings).all()
    torch.testing.assert_close(embeddings[0], x_vector(head, repeated)[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(embeddings[1], x_vector(head, long)[0], atol=1e-5, rtol=1e-4)


def test_gradients_of_constant_clips_are_finite():
    """Their standard deviation is zero, whose square root has no derivative."""
    head = XVectorHead(LAYERS, SIZE, 2)
    constant = [clip[:1].expand(20, -1, -1) for clip in clips((1, 1))]
    head(**padded(constant), labels=torch.tensor([0, 1]))["loss"].backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


@pytest.mark.parametrize("head_class", [XVectorHead, MeanSpeakerHead])
def test_speakers_that_were_not_heard_in_training_do_not_count(head_class):
    head = noisy(head_class(LAYERS, SIZE, 3))
    some = head(**padded(clips()), labels=torch.tensor([2, -100, 1, -100]))
    known = head(**padded([clips()[0], clips()[2]]), labels=torch.tensor([2, 1]))
    torch.testing.assert_close(some["loss"], known["loss"], atol=1e-5, rtol=1e-5)
    assert some["logits"].shape[0] == 4
    none = head(**padded(clips()), labels=torch.full((4,), -100))["loss"]
    none.backward()
    assert none.item() == 0


@torch.no_grad()
def test_mean_speaker_head_is_a_projection_of_the_mean():
    head = noisy(MeanSpeakerHead(LAYERS, SIZE, 3))
    output = head(**padded(clips(), more=2), labels=torch.tensor([0, 1, 2, 0]))
    vectors = [projected(head, clip).mean(0) for clip in clips()]
    torch.testing.assert_close(output["logits"], torch.stack(vectors), atol=1e-5, rtol=1e-5)
    assert output["loss"].item() == pytest.approx(am_softmax(head.objective, vectors, [0, 1, 2, 0]), abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------- CTC
LABELS = [[1, 2, 2, 3], [4, 1, 4], [3], [2, 1, 3, 3, 1]]


def lstm(module: torch.nn.LSTM, hidden: torch.Tensor) -> torch.Tensor:
    """Both directions of both layers by the equations, frame by frame."""
    for layer in range(2):
        directions = []
        for suffix in ("", "_reverse"):
            names = [f"{name}_l{layer}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            w, u, b, c = (getattr(module, name) for name in names)
            state = cell = torch.zeros(module.hidden_size)
            outputs = []
            for frame in hidden if not suffix else hidden.flip(0):
                i, f, g, o = (w @ frame + b + u @ state + c).chunk(4)
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                state = o.sigmoid() * cell.tanh()
                outputs.append(state)
            outputs = torch.stack(outputs)
            directions.append(outputs.flip(0) if suffix else outputs)
        hidden = torch.cat(directions, dim=-1)
    return hidden


@torch.no_grad()
@pytest.mark.parametrize("lstm_size", [0, 6])
def test_ctc_equals_torch_s_loss_of_unpadded_clips_one_by_one(lstm_size):
    head = noisy(CTCHead(LAYERS, SIZE, 5, lstm_size, 10))
    labels = torch.tensor([label + [-100] * (6 - len(label)) for label in LABELS])
    output = head(**padded(clips(), more=3), labels=labels)
    losses = []
    for row, (clip, label) in enumerate(zip(clips(), LABELS, strict=True)):
        hidden = projected(head, clip)
        hidden = lstm(head.lstm, hidden) if lstm_size else hidden
        scores = hidden @ head.classifier.weight.T + head.classifier.bias
        log_probabilities = scores - scores.exp().sum(-1, keepdim=True).log()
        loss = F.ctc_loss(log_probabilities[:, None], torch.tensor([label]), (len(clip),), (len(label),))
        losses.append(loss.item())  # of `reduction="mean"`: divided by the number of symbols
        best = output["logits"][row]
        assert best[: len(clip)].tolist() == scores.argmax(-1).tolist()
        assert (best[len(clip) :] == -100).all()
    assert output["loss"].item() == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert output["logits"].shape == (4, max(FRAMES) + 3)


def test_superb_s_sizes_of_ctc():
    assert CTCHead(LAYERS, SIZE, 5).classifier.in_features == 256
    with torch.device("meta"):
        head = CTCHead(LAYERS, SIZE, 5, 1024, 1024)
    assert (head.lstm.num_layers, head.lstm.bidirectional, head.lstm.dropout) == (2, True, 0.2)
    assert head.classifier.in_features == 2048


@torch.no_grad()
def test_a_text_too_long_for_its_clip_costs_nothing():
    head = noisy(CTCHead(LAYERS, SIZE, 5))
    short, long = clips((2, 30))
    both = head(**padded([short, long]), labels=torch.tensor([[1, 2, 3], [1, 2, 3]]))["loss"]
    only = head(**padded([long]), labels=torch.tensor([[1, 2, 3]]))["loss"]
    torch.testing.assert_close(both, only / 2)


@torch.no_grad()
def test_a_text_without_known_symbols_is_all_blanks():
    head = noisy(CTCHead(LAYERS, SIZE, 5))
    clip = clips()[0]
    loss = head(**padded([clip]), labels=torch.full((1, 2), -100))["loss"].item()
    scores = projected(head, clip) @ head.classifier.weight.T + head.classifier.bias
    assert loss == pytest.approx(-scores.log_softmax(-1)[:, 0].sum().item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------ all of them
HEADS = {
    "classification": (
        lambda: ClassificationHead(LAYERS, SIZE, [4, 2]),
        torch.tensor([[0, 1], [1, 0], [2, 1], [3, 0]]),
    ),
    "speaker": (lambda: MeanSpeakerHead(LAYERS, SIZE, 3), torch.tensor([0, 1, 2, -100])),
    "x_vector": (lambda: XVectorHead(LAYERS, SIZE, 3), torch.tensor([0, 1, 2, -100])),
    "phonemes": (lambda: CTCHead(LAYERS, SIZE, 5), torch.tensor([[1, 2], [3, 3], [4, -100], [1, 4]])),
    "characters": (lambda: CTCHead(LAYERS, SIZE, 5, 6), torch.tensor([[1, 2], [3, 3], [4, -100], [1, 4]])),
}


@torch.no_grad()
@pytest.mark.parametrize("name", HEADS)
def test_padding_changes_nothing(name):
    build, labels = HEADS[name]
    head = noisy(build())
    tight, wide = head(**padded(clips()), labels=labels), head(**padded(clips(), more=9), labels=labels)
    torch.testing.assert_close(tight["loss"], wide["loss"], atol=1e-5, rtol=1e-5)
    width = tight["logits"].shape[1]
    torch.testing.assert_close(tight["logits"], wide["logits"][:, :width], atol=1e-5, rtol=1e-5)
    if wide["logits"].shape[1] > width:
        assert (wide["logits"][:, width:] == -100).all()
    for row, clip in enumerate(clips()):
        one = head(**padded([clip]))["logits"][0]
        torch.testing.assert_close(tight["logits"][row, : len(one)], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_half_precision_from_the_cache_is_computed_in_float32(name):
    build, labels = HEADS[name]
    head = noisy(build())
    batch = padded([clip.half() for clip in clips()])
    exact = head(**batch, labels=labels)
    half = head(**batch | {"hidden_states": batch["hidden_states"].half()}, labels=labels)
    assert half["loss"].dtype == torch.float32
    torch.testing.assert_close(half["loss"], exact["loss"])
    assert set(head(**batch)) == {"logits"} and set(half) == {"loss", "logits"}


@pytest.mark.parametrize("name", HEADS)
def test_one_step_of_training_lowers_the_loss(name):
    build, labels = HEADS[name]
    torch.manual_seed(0)
    head = build()
    optimizer = torch.optim.SGD(head.parameters(), 1e-3)
    before = head.eval()(**padded(clips()), labels=labels)["loss"]
    before.backward()
    optimizer.step()
    assert head(**padded(clips()), labels=labels)["loss"] < before
