"""What trackers get while a student is trained, read back from TensorBoard's files."""

import io

import numpy as np
import pytest
from conftest import noise_clips
from test_skill_trainer import make_trainer


pytest.importorskip("tensorboard", reason="needs tensorboard")
pytest.importorskip("matplotlib", reason="needs matplotlib")


def test_tensorboard_gets_terms_sparsity_and_pictures(tmp_path, monkeypatch):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    recipe = {"layer_groups": [[0, 1], [2, 3]], "gate_learning_rate": None}
    trainer = make_trainer(tmp_path / "run", noise_clips(20, 14_000), recipe=recipe, report_to="tensorboard")
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0})
    events.Reload()
    for name in ("distillation_loss", "l1_loss", "cosine_loss", "sparsity", "target_sparsity", "lambda_1", "stage"):
        steps = [event.step for event in events.Scalars(f"train/{name}")]
        assert steps == list(range(1, 10)), name
    pictures = events.Images("architecture")
    # Of stage 1, whose last step is followed by the cut.
    assert [picture.step for picture in pictures] == [1, 2, 3, 4, 5]
    first, *_, last = (np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))) for picture in pictures)
    assert first.ndim == 3 and min(first.shape[:2]) > 300
    assert (first != last).any()  # units have gone


def test_without_a_tracker_nothing_is_drawn(tmp_path, monkeypatch):
    from skill_hf.distillation import watching

    monkeypatch.setattr(watching, "draw", lambda *args: pytest.fail("drawn"))
    make_trainer(tmp_path, noise_clips(20, 14_000), recipe={"layer_groups": [[0, 1], [2, 3]]}).train()
