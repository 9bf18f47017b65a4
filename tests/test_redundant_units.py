"""`examples/study/redundant_units.py`: teachers with units that can go without loss, and what is counted."""

import json
import sys

import pytest
import torch
from conftest import tiny_teacher
from example_helpers import DEMO, EXAMPLES, copy_clips, read_metadata, run_main, save_feature_extractor


sys.path.insert(0, str(EXAMPLES / "study"))

import redundant_units  # noqa: E402
from redundant_units import idle_layers, twins_kept, useless_share, with_idle_layers, with_twin_heads  # noqa: E402


def states(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(torch.randn(1, 8_000), output_hidden_states=True).hidden_states


def test_idle_layers_change_nothing_but_their_norms():
    model = tiny_teacher("large")
    with_idle_layers(model)
    hidden_states = states(model)
    assert idle_layers(3) == [1]
    torch.testing.assert_close(hidden_states[2], hidden_states[1])
    assert not torch.allclose(hidden_states[1], hidden_states[0], atol=1e-2)


@pytest.mark.parametrize("removed", [0, 1])
def test_either_twin_does_for_both(removed):
    model = tiny_teacher()
    with_twin_heads(model)
    expected = states(model)
    size = model.config.hidden_size // model.config.num_attention_heads
    with torch.no_grad():
        for layer in model.encoder.layers:
            weight = layer.attention.out_proj.weight.unflatten(1, (-1, size))
            weight[:, removed::2] = 0
            weight *= 2
    for state, other in zip(states(model), expected, strict=True):
        torch.testing.assert_close(state, other, atol=1e-5, rtol=1e-5)


def test_counts_by_hand():
    row = {"heads": [[0, 1, 2], [0], [0, 2]], "ffn_dims": [10, 5, 7]}
    assert useless_share(row, 10, 4) == pytest.approx(37.5)
    kept, by_chance = twins_kept(row, 4)
    assert kept == pytest.approx(100) and by_chance == pytest.approx(100 * (2 + 1 + 5 / 3) / 5)
    assert twins_kept({"heads": [[0, 1]]}, 4)[0] == 50


@pytest.mark.nightly
def test_a_row_for_each_teacher_and_start(tmp_path):
    tiny_teacher(num_attention_heads=4).save_pretrained(tmp_path / "teacher")
    save_feature_extractor(tmp_path / "teacher")
    rows = read_metadata(DEMO / "audio" / "heldout")
    speech = copy_clips(DEMO / "audio" / "heldout", tmp_path / "speech", rows[:4])
    settings = {"teacher": tmp_path / "teacher", "audio_dir": speech, "max_seconds": 0.5, "max_steps": 6}
    settings |= {"seeds": [0], "batch_size": 2, "output": tmp_path / "found.json"}
    status, lines, _ = run_main(redundant_units, settings)
    assert status == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [(row["teacher"], row["start"]) for row in found["rows"]] == [
        (teacher, start) for teacher in redundant_units.TEACHERS for start in redundant_units.STARTS
    ]
    assert found["rows"][0]["loss"] != found["rows"][1]["loss"]
    assert len([line for line in lines if line.startswith("|")]) == 2 + 4
