"""The tokenizer of a model that writes text, and how it is saved beside a student."""

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from transformers.utils import cached_file

from .loading import one_error


# Any of them says that there is a tokenizer.
TOKENIZER_FILES = ("tokenizer_config.json", "vocab.json", "tokenizer.json")


def load_tokenizer(
    source: str | os.PathLike, what: str = "The model", token: bool | str | None = None
) -> PreTrainedTokenizerBase | None:
    """
    The tokenizer in a directory or repository, whose code is not run; `None` if there is none.

    Args:
        source (`str` or `PathLike`): Hub id or local directory.
        what (`str`, *optional*, defaults to `"The model"`): what errors call the model.
        token (*optional*): of the Hub.

    Raises:
        `ValueError`: if there is one that cannot be loaded.
    """
    with one_error(f"The tokenizer of {what[0].lower()}{what[1:]} `{source}` cannot be used; pass another one."):
        if not any(_has_file(source, name, token) for name in TOKENIZER_FILES):
            return None
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, token=token)
    # Names of code that is not published along.
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def _has_file(source, name: str, token) -> bool:
    if os.path.isdir(source):
        return Path(source, name).is_file()
    return cached_file(str(source), name, token=token, _raise_exceptions_for_missing_entries=False) is not None


def save_processor(
    directory: str | os.PathLike,
    feature_extractor: Wav2Vec2FeatureExtractor,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Writes what prepares audio and, with a tokenizer, what makes text of a head's output, into `directory`."""
    if tokenizer is not None:
        Wav2Vec2Processor(feature_extractor=feature_extractor, tokenizer=tokenizer).save_pretrained(directory)
    # A processor's file holds this, too; releases of transformers before 5 look for a file of its own.
    feature_extractor.save_pretrained(directory)
