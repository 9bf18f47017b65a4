import pytest
import torch

from skill_hf.distillation.loss_sums import LossSums
from skill_hf.losses import TRAINING_LOSSES


def losses(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value + index) for index, name in enumerate(TRAINING_LOSSES)}


def test_means_are_weighted():
    sums = LossSums(torch.device("cpu"))
    sums.add(losses(1.0) | {"num_frames": torch.tensor(3)}, torch.tensor(3), weight=torch.tensor(3))
    sums.add(losses(5.0), 1.0, weight=1.0)
    expected = {name: (3 * (1 + index) + 5 + index) / 4 for index, name in enumerate(TRAINING_LOSSES)}
    assert sums.means() == pytest.approx(expected)
    assert list(sums.means()) == list(TRAINING_LOSSES)


def test_nothing_and_what_does_not_count_have_no_mean():
    sums = LossSums(torch.device("cpu"))
    assert sums.means() == {} and not sums.losses
    sums.add(losses(1.0), torch.tensor(0), weight=torch.tensor(0))
    assert sums.means() == {} and sums.losses


def test_processes_are_added_up():
    class Two:
        num_processes = 2

        @staticmethod
        def gather(values):
            assert values.shape == (1, len(TRAINING_LOSSES) + 1)
            return torch.cat([values, 3 * values])  # the other one has three times as much

    sums = LossSums(torch.device("cpu"))
    sums.add(losses(2.0), 1.0, weight=2.0)
    assert sums.means(Two) == pytest.approx({name: (2 + i) / 2 for i, name in enumerate(TRAINING_LOSSES)})
