"""SUPERB's downstream heads (arXiv 2105.01051, section 3): small networks over a weighted sum of hidden states."""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import WavLMConfig
from transformers.models.wavlm.modeling_wavlm import AMSoftmaxLoss, TDNNLayer


class WeightedSum(nn.Module):
    """
    `sum_l softmax(w)_l h_l` over the layers: `(..., layers, hidden size)` -> `(..., hidden size)`.

    Args:
        num_layers (`int`): number of hidden states, including the input of the first layer.
    """

    def __init__(self, num_layers: int):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(num_layers))

    @property
    def weights(self) -> torch.Tensor:
        """Share of each layer, of shape `(layers,)`; they sum to 1."""
        return self.scores.softmax(0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...ld,l->...d", hidden_states, self.weights.to(hidden_states.dtype))


def valid_frames(hidden: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
    """Mask of `(batch, frames)`: True for frames that are not padding."""
    return torch.arange(hidden.shape[1], device=hidden.device) < num_frames[:, None]


def mean_over_time(hidden: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
    """`(batch, frames, size)` -> `(batch, size)`, without padding."""
    masked = hidden * valid_frames(hidden, num_frames)[..., None]
    return masked.sum(1) / num_frames[:, None]


class Head(nn.Module):
    """
    Base of all heads: the weighted sum and a linear projection of it.

    Inputs are `hidden_states` of shape `(batch, frames, layers, hidden size)`, padded with zeros, `num_frames` of
    shape `(batch,)` and the labels of the task; heads return a dict of `loss` and `logits`.
    """

    def __init__(self, num_layers: int, hidden_size: int, projection_size: int):
        super().__init__()
        self.weighted_sum = WeightedSum(num_layers)
        self.projector = nn.Linear(hidden_size, projection_size)

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.projector(self.weighted_sum(hidden_states.to(self.projector.weight.dtype)))


class ClassificationHead(Head):
    """
    Projection to 256, mean over time, one linear classifier for each label; losses of several labels are added
    (keyword spotting, speaker identification, emotion recognition; intents have three labels).

    Everything before the mean is linear, so hidden states that are already averaged over time give the same result.

    Args:
        num_classes (`list[int]`): number of classes of each label.
    """

    def __init__(self, num_layers: int, hidden_size: int, num_classes: list[int], projection_size: int = 256):
        super().__init__(num_layers, hidden_size, projection_size)
        self.num_classes = num_classes
        self.classifier = nn.Linear(projection_size, sum(num_classes))

    def forward(self, hidden_states, num_frames, labels=None):
        """`labels`: int64 of shape `(batch, labels)`. `logits`: predicted classes of the same shape."""
        pooled = mean_over_time(self.project(hidden_states), num_frames)
        parts = self.classifier(pooled).split(self.num_classes, dim=-1)
        output = {"logits": torch.stack([part.argmax(-1) for part in parts], dim=-1)}
        if labels is not None:
            output["loss"] = sum(F.cross_entropy(part, label) for part, label in zip(parts, labels.T, strict=True))
        return output


def _additive_margin_softmax(size: int, num_speakers: int) -> AMSoftmaxLoss:
    """
    Initialises weights as small as SUPERB's: only their direction matters, and longer weights rotate more slowly.
    """
    objective = AMSoftmaxLoss(size, num_speakers)
    nn.init.xavier_normal_(objective.weight)
    return objective


class MeanSpeakerHead(Head):
    """
    A speaker embedding that is a projection of the mean over time, trained to distinguish speakers with the additive
    margin softmax (arXiv 1801.05599) of [`XVectorHead`]. It needs only averaged hidden states.
    """

    def __init__(self, num_layers: int, hidden_size: int, num_speakers: int, projection_size: int = 256):
        super().__init__(num_layers, hidden_size, projection_size)
        self.objective = _additive_margin_softmax(projection_size, num_speakers)

    def embed(self, hidden_states, num_frames) -> tuple[torch.Tensor, torch.Tensor]:
        """The embedding, and the input of the classifier in training; each of shape `(batch, size)`."""
        embedding = mean_over_time(self.project(hidden_states), num_frames)
        return embedding, embedding

    def forward(self, hidden_states, num_frames, labels=None):
        """
        `labels`: speakers, int64 of shape `(batch,)`; speakers not in the training set are -100 and ignored. `logits`:
        embeddings of shape `(batch, size)`.
        """
        embedding, classified = self.embed(hidden_states, num_frames)
        output = {"logits": embedding}
        if labels is not None:
            known = labels >= 0
            output["loss"] = self.objective(classified[known], labels[known]) if known.any() else embedding.sum() * 0
        return output


class XVectorHead(MeanSpeakerHead):
    """
    SUPERB's x-vector network (time delay layers, mean and standard deviation over time) with additive margin softmax.
    The embedding is the output of the first of two linear layers after the pooling.
    """

    def __init__(self, num_layers: int, hidden_size: int, num_speakers: int):
        config = WavLMConfig()  # its defaults for x-vectors are SUPERB's
        size = config.xvector_output_dim
        super().__init__(num_layers, hidden_size, num_speakers, config.tdnn_dim[0])
        self.objective = _additive_margin_softmax(size, num_speakers)
        self.tdnn = nn.ModuleList(TDNNLayer(config, layer) for layer in range(len(config.tdnn_dim)))
        self.context = sum((k - 1) * d for k, d in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True))
        self.embedding = nn.Linear(2 * config.tdnn_dim[-1], size)
        self.output = nn.Linear(size, size)

    def embed(self, hidden_states, num_frames) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.project(hidden_states)
        # A clip shorter than the network's context is repeated: else no two frames would be left of it.
        hidden, num_frames = _repeat_to(hidden, num_frames, self.context + 2)
        for layer in self.tdnn:
            hidden = layer(hidden)
        num_frames = num_frames - self.context
        mean = mean_over_time(hidden, num_frames)
        deviation = (hidden - mean[:, None]).square() * valid_frames(hidden, num_frames)[..., None]
        std = (deviation.sum(1) / (num_frames[:, None] - 1)).clamp_min(1e-8).sqrt()
        embedding = F.relu(self.embedding(torch.cat([mean, std], dim=-1)))
        return embedding, F.relu(self.output(embedding))


def _repeat_to(hidden: torch.Tensor, num_frames: torch.Tensor, shortest: int) -> tuple[torch.Tensor, torch.Tensor]:
    if bool((num_frames >= shortest).all()):
        return hidden, num_frames
    lengths = num_frames.clamp_min(shortest)
    clips = [
        clip[torch.arange(int(length), device=clip.device) % int(frames)]
        for clip, frames, length in zip(hidden, num_frames, lengths, strict=True)
    ]
    return nn.utils.rnn.pad_sequence(clips, batch_first=True), lengths


class CTCHead(Head):
    """
    Connectionist temporal classification over symbols; 0 is the blank.

    Args:
        num_symbols (`int`): number of symbols, including the blank.
        lstm_size (`int`, *optional*, defaults to 0): width of a bidirectional LSTM of two layers with dropout 0.2,
            1024 for SUPERB's speech recognition; 0, as for its phoneme recognition, keeps the head linear.
        projection_size (`int`, *optional*, defaults to 256): 1024 with an LSTM.
    """

    def __init__(
        self, num_layers: int, hidden_size: int, num_symbols: int, lstm_size: int = 0, projection_size: int = 256
    ):
        super().__init__(num_layers, hidden_size, projection_size)
        self.lstm = None
        if lstm_size:
            self.lstm = nn.LSTM(
                projection_size, lstm_size, num_layers=2, dropout=0.2, bidirectional=True, batch_first=True
            )
        self.classifier = nn.Linear(2 * lstm_size or projection_size, num_symbols)

    def forward(self, hidden_states, num_frames, labels=None):
        """
        `labels`: symbols, int64 of shape `(batch, longest)`, padded with -100. `logits`: the most likely symbol of
        each frame, shape `(batch, frames)`, padding -100.
        """
        hidden = self.project(hidden_states)
        if self.lstm is not None:
            packed = nn.utils.rnn.pack_padded_sequence(hidden, num_frames.cpu(), True, enforce_sorted=False)
            # Of full length, as the parts of a batch on several devices are joined again.
            hidden, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], True, total_length=hidden.shape[1])
        log_probabilities = self.classifier(hidden).log_softmax(-1, dtype=torch.float32)
        best = log_probabilities.argmax(-1).masked_fill(~valid_frames(hidden, num_frames), -100)
        output = {"logits": best}
        if labels is not None:
            output["loss"] = F.ctc_loss(
                log_probabilities.transpose(0, 1),
                labels.clamp_min(0),
                num_frames,
                (labels >= 0).sum(-1),
                zero_infinity=True,
            )
        return output


class DiarizationHead(nn.Module):
    """
    A unidirectional one-layer LSTM on the weighted sum, without a projection, as in s3prl; then a linear layer that
    predicts for each frame which speakers are speaking.

    The loss is binary cross-entropy for the best assignment of outputs to speakers, chosen for each recording
    (permutation-invariant training, arXiv 1909.05952).

    Args:
        num_speakers (`int`): maximum number of speakers in a recording.
        lstm_size (`int`, *optional*, defaults to 512): width of the LSTM.
    """

    def __init__(self, num_layers: int, hidden_size: int, num_speakers: int, lstm_size: int = 512):
        super().__init__()
        self.weighted_sum = WeightedSum(num_layers)
        self.lstm = nn.LSTM(hidden_size, lstm_size, batch_first=True)
        self.classifier = nn.Linear(lstm_size, num_speakers)

    def forward(self, hidden_states, num_frames, labels=None):
        """
        `labels`: 1 if a speaker is speaking, float of shape `(batch, any frames, speakers)`; missing frames are
        silent. `logits`: above 0 if a speaker is speaking, shape `(batch, frames, speakers)`, padding -100.
        """
        hidden, _ = self.lstm(self.weighted_sum(hidden_states.to(self.classifier.weight.dtype)))
        logits = self.classifier(hidden)
        valid = valid_frames(hidden, num_frames)[..., None]
        output = {"logits": logits.masked_fill(~valid, -100)}
        if labels is not None:
            labels = F.pad(labels, (0, 0, 0, max(0, hidden.shape[1] - labels.shape[1])))[:, : hidden.shape[1]] * valid
            # -y log p - (1 - y) log(1 - p) = softplus(x) - x y, summed over frames for each output with each speaker.
            silent = (F.softplus(logits) * valid).sum(1)[..., None]
            losses = silent - torch.einsum("bto,bts->bos", logits, labels)
            pairs = [linear_sum_assignment(matrix) for matrix in losses.detach().float().cpu().nan_to_num().numpy()]
            chosen = torch.stack([matrix[pair].sum() for matrix, pair in zip(losses, pairs, strict=True)])
            output["loss"] = chosen.sum() / (num_frames.sum() * losses.shape[-1])
        return output
