"""What the student hears may be distorted or masked; the teacher hears the clean audio."""

import numpy as np
import pytest
import torch
from conftest import noise_clips, tiny_teacher
from test_skill_trainer import Kill, KillAt, make_trainer

from skill_hf.data.distortion import Distortion


def train(directory, clips, resume=None, callbacks=None, mask_prob=0.0, **kwargs):
    recipe = {"layer_groups": [[0, 1], [2, 3]], "student_mask_prob": mask_prob}
    trainer = make_trainer(directory, clips, recipe=recipe, callbacks=callbacks, **kwargs)
    trainer.data_collator.distortion = Distortion(mixing_prob=1.0)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_teacher_hears_the_clean_audio_and_evaluation_too(tmp_path, monkeypatch):
    clips = noise_clips(20, 14_000)
    trainer = make_trainer(tmp_path, clips, recipe={"layer_groups": [[0, 1], [2, 3]]}, max_steps=3)
    trainer.data_collator.distortion = Distortion(mixing_prob=1.0)
    heard, student_heard = [], []
    teacher_outputs = trainer.teacher_outputs

    def record(input_values, attention_mask=None):
        heard.append(input_values.clone())
        return teacher_outputs(input_values, attention_mask)

    monkeypatch.setattr(trainer, "teacher_outputs", record)
    trainer.student.register_forward_pre_hook(
        lambda module, args, kwargs: student_heard.append((module.training, (args or [kwargs["input_values"]])[0])),
        with_kwargs=True,
    )
    trainer.train()
    training = [values for is_training, values in student_heard if is_training]
    originals = [np.asarray(clip["input_values"], np.float32) for clip in clips]

    def is_clean(values: torch.Tensor) -> bool:
        """Whether each row begins as a part of a clip does."""
        windows = [np.lib.stride_tricks.sliding_window_view(clip, 20) for clip in originals]
        return all(any((window == row[:20].numpy()).all(1).any() for window in windows) for row in values)

    assert len(training) == 3 and heard and all(map(is_clean, heard))
    assert not any(torch.equal(values, other) for values in training for other in heard)
    heard.clear(), student_heard.clear()
    trainer.evaluate()
    assert heard and all(torch.equal(values, clean) for (_, values), clean in zip(student_heard, heard, strict=True))


def test_a_resumed_run_hears_the_same(tmp_path):
    clips = noise_clips(20, 14_000)
    whole = train(tmp_path / "whole", clips, mask_prob=0.3)
    with pytest.raises(Kill):
        train(tmp_path / "killed", clips, callbacks=[KillAt(3)], mask_prob=0.3)
    resumed = train(tmp_path / "killed", clips, resume=True, mask_prob=0.3)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_frames_are_masked_for_the_student_in_training_alone(tmp_path):
    clips = noise_clips(20, 20_000)
    teacher = tiny_teacher(mask_time_prob=0.05, mask_time_length=4)
    recipe = {"layer_groups": [[0, 1], [2, 3]], "student_mask_prob": 0.5}
    trainer = make_trainer(tmp_path, clips, teacher, recipe=recipe, max_steps=3)
    shares = {True: [], False: []}

    def count(module, args, kwargs):
        (hidden_states,) = args[:1] or (kwargs["hidden_states"],)
        masked = (hidden_states == trainer.student.masked_spec_embed.detach()).all(-1)
        shares[module.training].append(masked.float().mean().item())

    trainer.student.encoder.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    trainer.evaluate()
    # Spans overlap, so fewer frames are masked than the share says.
    # Stage 2 has an encoder of its own.
    assert len(shares[True]) == 2 and all(0.2 < share < 0.6 for share in shares[True])
    assert shares[False] and not any(shares[False])
    assert trainer.student.config.mask_time_prob == 0.05 and trainer.student.config.apply_spec_augment


def test_a_teacher_without_a_mask_embedding_is_refused(tmp_path):
    teacher = tiny_teacher(mask_time_prob=0.0, mask_feature_prob=0.0)
    with pytest.raises(ValueError, match=r"`student_mask_prob` is 0.1, but this teacher has no embedding"):
        make_trainer(tmp_path, noise_clips(4, 14_000), teacher, recipe={"student_mask_prob": 0.1})
