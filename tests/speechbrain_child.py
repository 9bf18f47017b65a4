"""
What `test_use_in_speechbrain.py` does in processes that see SpeechBrain. Takes a JSON list of calls, each a list of a
function of this file and its arguments; they write what they saw to files.
"""

import contextlib
import io
import json
import re
import sys
import textwrap
from unittest import mock

import torch


def wrap(output: str, inputs: str, settings: list[dict], *sources: str) -> None:
    """
    What SpeechBrain's own wrapper makes of a padded batch, for each set of options and each source: with the package
    imported, or, if they trust remote code, without it.
    """
    if any(options.get("trust_remote_code") for options in settings):
        sys.modules["skill_hf"] = None  # any import of it fails
    else:
        import skill_hf  # noqa: F401
    try:
        from speechbrain.integrations.huggingface.wav2vec2 import Wav2Vec2
    except ImportError:  # 1.0
        from speechbrain.lobes.models.huggingface_transformers.wav2vec2 import Wav2Vec2

    batch = torch.load(inputs)
    results = []
    for options in settings:
        encoders = {source: Wav2Vec2(source, f"{output}-cache", freeze=True, **options) for source in sources}
        results.append({source: encoder(batch["wavs"], batch["lengths"]) for source, encoder in encoders.items()})
    torch.save(results, output)


def wrap_by_yaml(output: str, inputs: str, source: str) -> None:
    """The same, all hidden states, of the wrapper that the YAML in the example's documentation describes."""
    import use_in_speechbrain
    from hyperpyyaml import load_hyperpyyaml

    recipe = re.search(r"^    encoder: !new:.*?\n\n", use_in_speechbrain.__doc__, re.MULTILINE | re.DOTALL)[0]
    overrides = {"encoder": {"source": source, "save_path": f"{output}-cache"}}
    encoder = load_hyperpyyaml(textwrap.dedent(recipe), overrides)["encoder"]
    batch = torch.load(inputs)
    torch.save(encoder(batch["wavs"], batch["lengths"]), output)


def wrap_by_example(output: str, inputs: str, *sources: str) -> None:
    """What the example's encoder makes of clips normalised one by one, in a batch and alone, and what it trains."""
    from use_in_speechbrain import load_encoder

    batch, results = torch.load(inputs), {}
    for source in sources:
        encoder = load_encoder(source, freeze=False).eval()
        clips = [
            torch.from_numpy(encoder.feature_extractor(clip.numpy(), sampling_rate=16_000)["input_values"][0])
            for clip in batch["clips"]
        ]
        wavs = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        with torch.no_grad():
            together, alone = encoder(wavs, batch["lengths"]), [encoder(clip[None]) for clip in clips]
        encoder.train()
        in_training = encoder(wavs, batch["lengths"])
        in_training.square().mean().backward()
        results[source] = {
            "together": together,
            "alone": alone,
            "num_hidden_states": len(in_training),
            "has_gradient": {name: weight.grad is not None for name, weight in encoder.model.named_parameters()},
        }
    torch.save(results, output)


def classify(output: str, *arguments: str) -> None:
    """Runs the example: what it prints, and whether its encoder was in training mode at each step of training."""
    import use_in_speechbrain

    modes = []

    class WatchedBrain(use_in_speechbrain.SpeakerBrain):
        def on_fit_batch_end(self, *args):
            modes.append(self.hparams.encoder.model.training)

    printed, complained = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(use_in_speechbrain, "SpeakerBrain", WatchedBrain),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(complained),
    ):
        status = use_in_speechbrain.main(list(arguments))
    torch.save((status, printed.getvalue(), complained.getvalue(), modes), output)


if __name__ == "__main__":
    for name, *arguments in json.loads(sys.argv[1]):
        globals()[name](*arguments)
