"""The optimizer of a stage, with separate groups for weights, norms and gates."""

from functools import partial

import torch
from torch import nn


GATE_PARAMETERS = ("log_alpha", "lambda_1", "lambda_2")
# Arguments of optimizers that group the parameters by themselves.
OWN_GROUPS = {"params", "model", "optimizer_dict"}


# Of the parameter that an optimizer is tried on: 8-bit ones keep small parameters in 32 bit.
TRIED_SHAPE = (96, 96)


def check_optimizer(
    cls: type[torch.optim.Optimizer], kwargs: dict, device: torch.device, needed_by: str, instead: str
) -> None:
    """
    Takes one step on a dummy parameter and checks the state, which has to be cut or divided like the parameter.

    Args:
        cls, kwargs, device: class and arguments of the optimizer, and where it runs.
        needed_by, instead (`str`): for the error: what needs it, and what to do without.

    Raises:
        `ValueError`: if the optimizer's state contains anything but single numbers and tensors of the parameter's
            shape.
    """
    if kwargs.keys() & OWN_GROUPS:
        return  # refused when it is made for real
    parameter = nn.Parameter(torch.zeros(TRIED_SHAPE, device=device))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = cls([parameter], **kwargs)
    if callable(getattr(optimizer, "train", None)):  # without a schedule they have modes
        optimizer.train()
    optimizer.step()
    for name, value in optimizer.state[parameter].items():
        is_number = value is None or isinstance(value, (bool, int, float))
        if isinstance(value, torch.Tensor):
            is_number = value.numel() == 1
        if not is_number and getattr(value, "shape", None) != parameter.shape:
            raise ValueError(
                f"{needed_by} cannot be used with the optimizer {cls.__name__}: its `{name}` does not have the"
                f" parameter's shape. Use a different one, such as `adamw_torch`, or {instead}."
            )


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of a distiller that are learned with `gate_learning_rate`, in order."""
    return [parameter for name, parameter in model.named_parameters() if name.endswith(GATE_PARAMETERS)]


def make_optimizer(
    model: nn.Module,
    cls: type[torch.optim.Optimizer],
    kwargs: dict,
    *,
    decayed: set[str],
    weight_decay: float,
    learning_rate: float,
    gate_learning_rate: float,
    max_log_alpha: float | None = None,
) -> torch.optim.Optimizer:
    """
    An optimizer over all trainable parameters of `model`.

    Args:
        model (`nn.Module`): a distiller.
        cls, kwargs: class and arguments of the optimizer.
        decayed (`set[str]`): names of parameters that weight decay applies to; gates are not among them.
        weight_decay, learning_rate (`float`): of this stage; they override `kwargs`.
        gate_learning_rate (`float`): of gates and Lagrange multipliers.
        max_log_alpha (`float`, *optional*): what each step keeps gates from exceeding, for models without learned
            multipliers.

    Raises:
        `ValueError`: if the optimizer makes its own parameter groups.
    """
    for name in sorted(kwargs.keys() & OWN_GROUPS):
        raise ValueError(f"The optimizer {cls.__name__} sets its own `{name}`; gates need their own group.")
    # The order matters: the learning rate that is logged is that of the first group.
    groups = {
        "decayed": {"params": [], "weight_decay": weight_decay},
        "not_decayed": {"params": [], "weight_decay": 0.0},
        "gates": {"params": [], "weight_decay": 0.0, "lr": gate_learning_rate},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_gate = name.endswith(GATE_PARAMETERS)
            group = "gates" if is_gate else "decayed" if name in decayed else "not_decayed"
            groups[group]["params"].append(parameter)
    optimizer = cls([group for group in groups.values() if group["params"]], **kwargs | {"lr": learning_rate})
    if max_log_alpha is not None and groups["gates"]["params"]:
        optimizer.register_step_post_hook(partial(limit_gates, max_log_alpha=max_log_alpha))
    return optimizer


@torch.no_grad()
def limit_gates(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict, max_log_alpha: float) -> None:
    """Clips the gates, which are the last group of `optimizer`, after a step of it."""
    for log_alpha in optimizer.param_groups[-1]["params"]:
        log_alpha.clamp_(max=max_log_alpha)
