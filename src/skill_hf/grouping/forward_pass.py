"""Hidden states of one model, or of two on the same clips: what can be compared, and one pass over the audio."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.batches import checked_inputs_of_models, equal_length_batches
from ..models.loading import refuse_adapter
from ..models.model_modes import eval_mode
from ..models.properties import frame_step, receptive_field


def check_models(models: Sequence[PreTrainedModel], feature_extractors: Sequence, roles: Sequence[str]) -> None:
    """
    Refuses models whose hidden states cannot be compared frame by frame.

    Args:
        models (sequence of [`~transformers.PreTrainedModel`]): one or two.
        feature_extractors (`Sequence`): one for each, or `None`.
        roles (`Sequence[str]`): what errors call each.

    Raises:
        `ValueError`: if one takes no `input_values` or has an adapter, or two have other sampling rates or frames.
    """
    for model, role in zip(models, roles, strict=True):
        refuse_adapter(model.config, f"`{role}`")
        if model.main_input_name != "input_values":
            raise ValueError(
                f"`{role}` must be a speech encoder that takes `input_values`, but {type(model).__name__} takes"
                f" `{model.main_input_name}`."
            )
    rates = [extractor.sampling_rate for extractor in feature_extractors if extractor is not None]
    if len(set(rates)) > 1:
        raise ValueError(
            f"`{roles[0]}` takes audio of {rates[0]} Hz and `{roles[1]}` of {rates[1]} Hz; only models of one sampling"
            " rate can be compared."
        )
    frames = [(frame_step(model.config), receptive_field(model.config)) for model in models]
    if len(set(frames)) > 1:
        raise ValueError(
            f"`{roles[0]}` makes a frame every {frames[0][0]} samples, of {frames[0][1]} samples, and `{roles[1]}`"
            f" every {frames[1][0]}, of {frames[1][1]}; only models of the same frame rate can be compared."
        )


def run_over_clips(
    models: Sequence[PreTrainedModel],
    audio: Iterable,
    feature_extractors: Sequence,
    consume: Callable[..., None],
    *,
    batch_size: int,
    title: str,
    progress: bool,
) -> None:
    """
    Sends each clip through all models, in eval mode and without gradients. A batch holds only neighbouring waveforms
    of the same length, so nothing is ever padded.

    Args:
        models (sequence of [`~transformers.PreTrainedModel`]): each on the device where it is.
        audio (`Iterable`): waveforms or rows, read once and lazily.
        feature_extractors (`Sequence`): one for each model, or `None` where waveforms are its `input_values`.
        consume (`Callable`): takes the hidden states of one batch, a tuple of `(batch, frames, features)` from each
            model.
        batch_size (`int`): largest number of waveforms in one forward pass.
        title (`str`): of the progress bar.
        progress (`bool`): whether to show it.

    Raises:
        `ValueError`: if there is no audio or a waveform cannot be used.
    """
    waveforms = checked_inputs_of_models(audio, feature_extractors, receptive_field(models[0].config))
    total = len(audio) if hasattr(audio, "__len__") else None
    num_clips = 0
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for model in models:
            stack.enter_context(eval_mode(model))
        bar = stack.enter_context(tqdm(desc=title, total=total, unit="clip", disable=not progress))
        for batch in equal_length_batches(waveforms, batch_size):  # (B, models, samples)
            states = []
            for model, inputs in zip(models, batch.unbind(1), strict=True):
                inputs = inputs.to(model.device, model.dtype)
                states.append(model(input_values=inputs, output_hidden_states=True).hidden_states)
            consume(*states)
            num_clips += len(batch)
            bar.update(len(batch))
    if not num_clips:
        raise ValueError("There is no audio to compare layers on; give at least one waveform.")
