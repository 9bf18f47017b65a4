import json

import pytest

from skill_hf.publishing.run_record import MAX_LOSS_RISE, MIN_COSINE_SIMILARITY, MOMENTS, RunRecord


def record(before=-0.8, after=-0.7, cosine=0.9, shift=0.0) -> RunRecord:
    losses = {"start": -1.0, "before_cut": before, "after_cut": after, "end": -0.8}
    return RunRecord(
        silhouettes={2: 0.5, 3: 0.25},
        cut={"left": 2000, "wanted": 1000, "shift": shift},
        measured_on="32 held-out clips",
        losses={when: {"distillation_loss": loss, "cosine_similarity": cosine} for when, loss in losses.items()},
    )


def test_a_record_survives_json():
    stored = json.loads(json.dumps(record().to_dict()))
    assert RunRecord.from_dict(stored) == record()
    assert RunRecord.from_dict({}) == RunRecord()


def test_the_summary_has_a_line_for_each_moment():
    lines = record().summary()
    assert len(lines) == 1 + len(MOMENTS)
    assert "32 held-out clips" in lines[0]
    assert [line.split()[-2:] for line in lines[1:]] == [
        ["-1.000", "0.900"],
        ["-0.800", "0.900"],
        ["-0.700", "0.900"],
        ["-0.800", "0.900"],
    ]
    assert not RunRecord().summary()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"after": -0.8 + MAX_LOSS_RISE + 0.01}, ["0.21", "max_steps", "gate_learning_rate", "target_sparsity"]),
        ({"cosine": MIN_COSINE_SIMILARITY - 0.1}, ["0.70", "target_sparsity"]),
    ],
)
def test_advice_names_the_value_and_what_to_change(settings, words):
    (advice,) = record(**settings).advice()
    assert all(word in advice for word in words)
    assert not record().advice()


def test_a_shift_is_told():
    assert any("2,000" in line and "1,000" in line and "-4.400" in line for line in record(shift=-4.4).summary())


def test_fields_of_a_later_version_are_ignored():
    assert RunRecord.from_dict({"silhouettes": {"2": 0.5}, "surprise": 1}).silhouettes == {2: 0.5}
    record = RunRecord(cut={"left": 1, "wanted": 2, "shift": 0.0}, layer_distances={"cka": [0.5]})
    assert RunRecord.from_dict(record.to_dict()) == record


WRONG = dict.fromkeys(RunRecord().to_dict(), 1) | {"num_teachers": 0}


@pytest.mark.parametrize("values", [None, [], 1, *({name: value} for name, value in WRONG.items())], ids=str)
def test_values_of_a_wrong_type_are_named(values):
    named = f"`{next(iter(values))}` must be" if isinstance(values, dict) else "it must be an object"
    with pytest.raises(ValueError, match=named):
        RunRecord.from_dict(values)
