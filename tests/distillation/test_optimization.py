import pytest
import torch
from torch import nn

from skill_hf.distillation.optimization import OWN_GROUPS, make_optimizer


class Distiller(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
        self.gate = nn.Module()
        self.gate.log_alpha = nn.Parameter(torch.zeros(3))
        self.lambda_1, self.lambda_2 = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))


def optimizer_of(model, /, decayed=("linear.weight",), max_log_alpha=None, **kwargs):
    return make_optimizer(
        model,
        torch.optim.AdamW,
        kwargs,
        decayed=set(decayed),
        weight_decay=0.5,
        learning_rate=0.1,
        gate_learning_rate=0.2,
        max_log_alpha=max_log_alpha,
    )


def test_gates_have_their_own_rate_and_no_decay():
    model = Distiller()
    optimizer = optimizer_of(model, lr=7.0, eps=1e-3)  # the rate of another stage
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        ([names[parameter] for parameter in group["params"]], group["lr"], group["weight_decay"], group["eps"])
        for group in optimizer.param_groups
    ]
    assert groups == [
        (["linear.weight"], 0.1, 0.5, 1e-3),
        (["linear.bias"], 0.1, 0.0, 1e-3),
        (["lambda_1", "lambda_2", "gate.log_alpha"], 0.2, 0.0, 1e-3),
    ]


def test_groups_without_a_parameter_are_left_out():
    groups = optimizer_of(nn.Linear(2, 2), decayed=("weight", "bias")).param_groups
    assert [len(group["params"]) for group in groups] == [2]


@pytest.mark.parametrize("limit", [0.3, None])
def test_no_step_opens_a_gate_beyond_its_limit(limit):
    model = Distiller()
    del model.lambda_1, model.lambda_2
    nn.init.zeros_(model.linear.bias)
    optimizer = optimizer_of(model, max_log_alpha=limit)
    resumed = optimizer_of(model, max_log_alpha=limit)
    for turn in (optimizer, resumed):
        resumed.load_state_dict(optimizer.state_dict())
        for _ in range(4):
            model.gate.log_alpha.grad = torch.tensor([-1.0, 1.0, 0.0])
            model.linear.bias.grad = torch.full((2,), -1.0)
            model.linear.weight.grad = torch.zeros(2, 2)
            turn.step()
        opened, closed, still = model.gate.log_alpha.tolist()
        assert opened == pytest.approx(0.3) if limit else opened > 0.6
        assert closed < -0.6 and still == 0
    assert (model.linear.bias > 0.31).all()  # of other parameters there is no limit


@pytest.mark.parametrize("name", sorted(OWN_GROUPS))
def test_optimizers_that_group_parameters_are_refused(name):
    with pytest.raises(ValueError, match=f"AdamW sets its own `{name}`; gates need their own group"):
        optimizer_of(Distiller(), **{name: []})
