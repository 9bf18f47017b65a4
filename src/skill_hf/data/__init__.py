"""From files to batches. Public names are imported at first use."""

import importlib


_PLACES = {
    "AudioError": "audio",
    "SpeechCollator": "collator",
    "calibration_waveforms": "collator",
    "disable_audio_decoding": "speech_datasets",
    "load_audio_dir": "speech_datasets",
    "load_speech_dataset": "speech_datasets",
    "read_audio": "audio",
}

__all__ = list(_PLACES)


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
