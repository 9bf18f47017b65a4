"""`examples/study/drop_layers.py` on a tiny teacher and a few clips of the demo."""

import json
import sys

import pytest
from conftest import tiny_teacher
from example_helpers import DEMO, EXAMPLES, copy_clips, read_metadata, run_main, save_feature_extractor


sys.path.insert(0, str(EXAMPLES / "study"))

import drop_layers  # noqa: E402

from skill_hf.analysis import layer_distances  # noqa: E402
from skill_hf.compression.layer_dropping import drop_layers as without_layers  # noqa: E402
from skill_hf.data import calibration_waveforms  # noqa: E402
from skill_hf.data.speech_datasets import load_audio_dir  # noqa: E402
from skill_hf.encoders import feature_extractor_for  # noqa: E402
from skill_hf.models.families import load_student  # noqa: E402


def test_every_order_has_a_row_for_each_number(tmp_path):
    tiny_teacher(num_hidden_layers=4).save_pretrained(tmp_path / "teacher")
    save_feature_extractor(tmp_path / "teacher")
    rows = read_metadata(DEMO / "audio" / "heldout")
    speech = copy_clips(DEMO / "audio" / "heldout", tmp_path / "speech", rows[:3])
    settings = {"teacher": tmp_path / "teacher", "audio_dir": speech, "eval_audio_dir": speech, "max_seconds": 0.5}
    settings |= {"num_dropped": [1, 2], "output": tmp_path / "dropped.json"}
    status, lines, _ = run_main(drop_layers, settings)
    assert status == 0
    found = json.loads((tmp_path / "dropped.json").read_text(encoding="utf-8"))
    assert [(row["order"], len(row["removed"])) for row in found["rows"]] == [
        (order, number) for order in drop_layers.ORDERS for number in (1, 2)
    ]
    assert [row["removed"] for row in found["rows"][-4:]] == [[2], [2, 3], [4], [3, 4]]
    assert all(1 not in row["removed"] for row in found["rows"])
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(drop_layers.ORDERS) + 1

    # The student of the last row, measured by itself.
    teacher = load_student(settings["teacher"]).eval()
    extractor = feature_extractor_for(str(settings["teacher"]), teacher.config)
    audio = calibration_waveforms(load_audio_dir(speech), 24, 0.5, 0, extractor)
    distances = layer_distances(teacher, without_layers(teacher, [2, 3]), audio, progress=False)["cka"]
    assert found["rows"][-1]["distances"] == pytest.approx(distances, abs=1e-6)
    assert distances[:3] == pytest.approx(0, abs=1e-6) and (distances[3:] > 1e-3).all()
    first, second = (found["rows"][index]["distances"][-1] for index in (-4, -3))
    assert table[-3] == f"| from the bottom | {first:.3f} (2) | {second:.3f} (2, 3) |"


def test_too_many_layers_are_one_line(tmp_path):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    save_feature_extractor(tmp_path / "teacher")
    speech = copy_clips(DEMO / "audio" / "heldout", tmp_path / "speech", read_metadata(DEMO / "audio" / "heldout")[:2])
    settings = {"teacher": tmp_path / "teacher", "audio_dir": speech, "eval_audio_dir": speech}
    status, _, errors = run_main(drop_layers, settings | {"max_seconds": 0.5})
    assert status == 2 and len(errors) == 1 and "`num_dropped` must be from 0 to 2, but is 4" in errors[0]
