"""
Uses a student as an upstream of s3prl, the toolkit of the SUPERB benchmark (arXiv 2105.01051).

s3prl's own entries for Hugging Face models (`hf_hubert_custom`, `hf_wav2vec2_custom`) load one class each. The entries
here use `AutoModel`: `skill_student` loads a student, or any WavLM, HuBERT or wav2vec 2.0; `skill_student_remote_code`
loads a student without skill-hf, with the Python files in its repository. `-k` is a directory or a Hub id:

    pip install s3prl tensorboardX "torchaudio<2.9"
    python examples/use_in_s3prl.py -m train -n emotion -u skill_student -k wavlm-small -d emotion -c config.yaml

All arguments are passed to s3prl's `run_downstream.py`; the configuration of each task is in the repository of s3prl.
In Python, with this folder on `PYTHONPATH`:

    import use_in_s3prl  # adds the entries
    from s3prl.nn import Featurizer, S3PRLUpstream

    upstream = S3PRLUpstream("skill_student", path_or_url="wavlm-small")
    hidden_states, lengths = upstream(wavs, wav_lengths)
    weighted_sum, lengths = Featurizer(upstream)(hidden_states, lengths)

s3prl 0.4.18 needs functions that torchaudio 2.9 removed. To read its own checkpoints (`-e`, `-m evaluate`) with torch
2.6 or newer, set `TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1`.
"""

import contextlib
import math
import sys

import huggingface_hub
import torch
from transformers import AutoFeatureExtractor, AutoModel


try:
    from s3prl import hub
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"error: s3prl cannot be imported ({error}): pip install s3prl.", file=sys.stderr)
    sys.exit(2)

with contextlib.suppress(ImportError):  # the other entry needs none
    import skill_hf  # noqa: F401  (makes students known to AutoModel)


class UpstreamExpert(torch.nn.Module):
    """
    A speech encoder in s3prl's form.

    Args:
        ckpt (`str`): directory or Hub id.
        model_config (`str`, *optional*): s3prl passes it; not used, since the directory holds the configuration.
        refresh (`bool`, *optional*, defaults to `False`): whether to download a model again that is in the cache.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether to run the model's own Python files.
        masked_group_norm (`bool`, *optional*, defaults to `True`): whether the convolutions of a student with group
            norm leave padding out, as its layers do. `False`, and all other models with group norm: what they make of
            a clip depends on the longest clip of its batch.
    """

    def __init__(self, ckpt, model_config=None, refresh=False, trust_remote_code=False, masked_group_norm=True):
        super().__init__()
        source = {"force_download": refresh, "trust_remote_code": trust_remote_code}
        self.feature_extractor = AutoFeatureExtractor.from_pretrained(ckpt, **source)
        self.model = AutoModel.from_pretrained(ckpt, dtype=torch.float32, **source)
        if hasattr(self.model.config, "masked_group_norm"):
            self.model.config.masked_group_norm = masked_group_norm
        # s3prl counts on the same number of hidden states in training, and has its own SpecAugment.
        self.model.config.layerdrop = 0.0
        self.model.config.apply_spec_augment = False

    def get_downsample_rates(self, key: str = None) -> int:
        """Samples in a frame, of every hidden state."""
        return math.prod(self.model.config.conv_stride)

    def forward(self, wavs: list[torch.Tensor]) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
        """
        Args:
            wavs (`list[torch.Tensor]`): clips of any lengths, each `(samples,)`, at the model's rate. They are
                normalised here, one by one, if the model wants that.

        Returns:
            `dict` of `hidden_states`, a tuple of layers + 1 tensors `(batch, frames, hidden_size)`, and
            `last_hidden_state`, the model's output.
        """
        inputs = self.feature_extractor(
            [wav.detach().cpu().numpy() for wav in wavs],
            sampling_rate=self.feature_extractor.sampling_rate,
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        outputs = self.model(**inputs.to(wavs[0].device), output_hidden_states=True)
        return {"hidden_states": outputs.hidden_states, "last_hidden_state": outputs.last_hidden_state}


def skill_student(*args, **kwargs):
    return UpstreamExpert(*args, **kwargs)


def skill_student_remote_code(*args, **kwargs):
    return UpstreamExpert(*args, trust_remote_code=True, **kwargs)


hub.skill_student = skill_student
hub.skill_student_remote_code = skill_student_remote_code


def main():
    # s3prl's runner imports two names, for its own uploads, that huggingface_hub 1.0 removed.
    for name in ("HfFolder", "Repository"):
        if not hasattr(huggingface_hub, name):
            setattr(huggingface_hub, name, None)
    from s3prl.run_downstream import main as run_downstream

    run_downstream()


if __name__ == "__main__":
    main()
