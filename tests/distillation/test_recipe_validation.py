import math

import datasets
import numpy as np
import pytest
from conftest import tiny_teacher
from transformers import TrainingArguments

from skill_hf import SkillConfig, SkillDistillationTrainer
from skill_hf.distillation.recipe_validation import warn_of_slow_gates
from skill_hf.recipe.schedule import gate_travel


@pytest.mark.parametrize(
    ("rate", "steps", "units", "warned"),
    [
        (0.02, 40, ["attention_heads"], True),
        (0.15, 40, ["conv_channels", "ffn_dims"], True),
        (0.15, 100, ["attention_heads"], False),
        (0.02, 50_000, ["attention_heads"], False),
        (0.1, 40, ["ffn_dims"], False),  # which start half open
        (0.0, 40, ["ffn_dims"], True),
        (None, 1, ["attention_heads"], False),
    ],
)
def test_gates_that_cannot_get_there_are_warned_about(rate, steps, units, warned, caplog):
    config = SkillConfig(gate_learning_rate=rate, pruning_units=units)
    warn_of_slow_gates(config, steps)
    assert ("`gate_learning_rate`" in caplog.text) is warned
    if warned:
        # A gate starts at the logit of its probability to be open and is as likely closed as open at 2/3 ln(1/11).
        start = math.log(0.99 / 0.01) if units != ["ffn_dims"] else 0.0
        distance = start - 2 / 3 * math.log(1 / 11)
        assert f"needs {distance:.1f} to close" in caplog.text
        assert gate_travel(rate, steps) < distance
        own = SkillConfig().resolve_gate_learning_rate(steps)
        assert f"({own:.2g} would be used)" in caplog.text


ROWS = [{"audio": np.zeros(16_000, np.float32)}]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_dataset": (row for row in ROWS)}, "`train_dataset` must be a dataset.*generator"),
        ({"train_dataset": 3}, "`train_dataset` must be a dataset.*int"),
        ({"train_dataset": "a folder"}, "`train_dataset` must be a dataset.*str"),
        ({"train_dataset": {"audio": [1]}}, "`train_dataset` is a dict of audio"),
        (
            {"train_dataset": datasets.DatasetDict(train=datasets.Dataset.from_list([{"a": 1}]))},
            "DatasetDict of train",
        ),
        ({"eval_dataset": {}}, "`eval_dataset` is an empty dict"),
        ({"eval_dataset": {"clean": (row for row in ROWS)}}, r"`eval_dataset\['clean'\]` must be a dataset"),
    ],
)
def test_what_is_no_set_of_rows(given, words, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=3, report_to="none", use_cpu=True)
    sets = {"train_dataset": ROWS, "eval_dataset": ROWS} | given
    with pytest.raises(ValueError, match=words) as error:
        SkillDistillationTrainer(teacher=tiny_teacher(), args=args, **sets).train()
    assert "\n" not in str(error.value)
