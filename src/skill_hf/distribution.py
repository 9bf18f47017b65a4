"""
Several processes: what they tell each other, and parameters that FSDP2 divides among them.

A process of DistributedDataParallel holds all parameters. One of FSDP2 holds a part of each during the steps of a
stage, all of them before and after: what lies between the stages, and what is saved, is the same with every engine.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DynamoBackend,
    TorchDynamoPlugin,
    broadcast_object_list,
    compare_versions,
    gather_object,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel


# The first whose `Trainer` saves on all processes together; that clips gradients of both kinds of parameters; that
# divides frozen layers of several dtypes.
FSDP_NEEDS = {"transformers": "5.23", "accelerate": "1.15", "torch": "2.8"}
FSDP_VARIABLE = "ACCELERATE_USE_FSDP"
NO_DEEPSPEED = (
    "the cut between the stages rebuilds parameters and optimizer, which no stage of ZeRO allows; use data"
    " parallelism, or FSDP2, which divides them as ZeRO does"
)
# Variables of `accelerate launch` for other engines -> name, and why a run cannot use it.
REFUSED_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", NO_DEEPSPEED),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "it has no speech encoders; use data parallelism"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "`parallelism_config`",
        "only data is divided, or parameters by FSDP2; leave it out of the file of accelerate",
    ),
}
# Variable of `accelerate launch`, its key in a file -> the value that it must have, and why.
FSDP_SETTINGS = {
    ("FSDP_VERSION", "fsdp_version"): ("2", "1 is no longer developed"),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "fsdp_cpu_ram_efficient_loading"): (
        "false",
        "the student is a copy of a teacher that every process has in memory",
    ),
    ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params"): ("false", "gates stay on the device of the batch"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing"): (
        "false",
        "`gradient_checkpointing` of the training arguments does it",
    ),
}


# How many versions of one layer torch may compile: with gradients and without, for one length and for any. A test
# with clips of unequal length needs 9.
VERSIONS_OF_A_LAYER = 16
# Graphs of a GPU refer to parameters by their address, which changes whenever FSDP gathers them.
COMPILERS_WITH_GRAPHS = {"mode": ("reduce-overhead", "max-autotune"), "backend": ("cudagraphs",)}


# ---- What processes tell each other ----


def on_all_processes(accelerator: Accelerator, function: Callable, needed: bool = True):
    """
    Returns the result of `function()` on the main process. It runs where it is `needed`; a `ValueError` or `OSError`
    in one process is raised in all of them.
    """
    return results_of_all(accelerator, function, needed)[0]


def results_of_all(accelerator: Accelerator, function: Callable, needed: bool = True) -> list:
    """The results of `function()` on all processes where it is `needed`; for errors see [`on_all_processes`]."""
    result = error = None
    if needed:
        try:
            result = function()
        except (ValueError, OSError) as raised:
            error = raised
    outcomes = gathered(accelerator, (needed, result, error))
    for *_, error in outcomes:
        if error is not None:
            raise error
    return [result for ran, result, _ in outcomes if ran]


def from_main_process(accelerator: Accelerator, function: Callable):
    """The result of `function()`, which only the main process calls, on all of them."""
    shared = [function() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(shared)
    return shared[0]


def gathered(accelerator: Accelerator, value) -> list:
    """`value`, of any type, of each process."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def stacked(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` of each process, `(processes, *shape)`; all of one shape, on the device of the process."""
    return accelerator.gather(tensor[None]) if accelerator.num_processes > 1 else tensor[None]


# ---- Engines ----


def check_environment() -> None:
    """
    Raises:
        `ValueError`: if `accelerate launch` asks for an engine that a run cannot use, or for FSDP with settings that
            it cannot have.
    """
    for variable, (engine, why) in REFUSED_ENGINES.items():
        if _is_on(variable):
            raise ValueError(f"{engine} is selected, but {why}.")
    if not _is_on(FSDP_VARIABLE):
        return
    for (variable, key), (wanted, why) in FSDP_SETTINGS.items():
        value = os.environ.get(variable, "1" if wanted == "2" else wanted).lower()
        if value != wanted:
            raise ValueError(f"`{key}` is {value}, but must be {wanted}: {why}. Set it in the file of accelerate.")
    for library, least in FSDP_NEEDS.items():
        if compare_versions(library, "<", least):
            raise ValueError(f"FSDP needs {library} {least} or newer; update it, or use data parallelism.")


def divides_parameters(accelerator: Accelerator) -> bool:
    """
    Whether FSDP divides the parameters of what is trained.

    Raises:
        `ValueError`: if `accelerate launch` asks for it, but accelerate does without.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and _is_on(FSDP_VARIABLE):
        raise ValueError(
            f"FSDP cannot be used by {accelerator.num_processes} process(es) on {accelerator.device.type}: it needs"
            " several processes, each with a GPU. Choose another file of accelerate."
        )
    return plugin is not None


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def forward_context(accelerator: Accelerator, is_divided: bool):
    """
    Autocast for the forward of a model that FSDP divides: accelerate leaves it alone. Casts are not kept, which would
    hold all parameters at once. Within the model of another engine it changes nothing.
    """
    return accelerator.autocast(AutocastKwargs(cache_enabled=not is_divided))


def rebuild_data_parallel(module: nn.Module, accelerator: Accelerator) -> None:
    """
    Lets a module within `module` that is wrapped in DistributedDataParallel, if there is one, reduce the gradients of
    the parameters that it has now. The wrapper stays the same object, which the training loop holds.
    """
    for wrapper in module.modules():
        if isinstance(wrapper, DistributedDataParallel):
            handler = accelerator.ddp_handler
            kwargs = {} if handler is None else handler.to_kwargs()
            devices = {"device_ids": wrapper.device_ids, "output_device": wrapper.output_device}
            wrapper.__init__(wrapper.module, **devices, **kwargs)
            if handler is not None:
                handler.register_comm_hook(wrapper)
            break


# ---- FSDP2 ----


def divide_when_prepared(
    model: nn.Module,
    layers: Sequence[nn.Module],
    whole: Iterable[nn.Parameter],
    accelerator: Accelerator,
) -> None:
    """
    Lets `accelerator.prepare` divide the parameters of `model` among processes: those of each of `layers` together,
    and the rest. Tensors of whole parameters can be loaded into it as before.

    Args:
        model (`nn.Module`): what is trained.
        layers (`Sequence[nn.Module]`): each is gathered when it runs.
        whole (`Iterable[nn.Parameter]`): parameters that every process keeps, for which [`average_gradients`] is to be
            called before each step.
        accelerator (`Accelerator`): with FSDP's settings, which this completes.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers})
    plugin.ignored_modules = [nn.ParameterList(whole)]
    # Parameters are gathered in float32, and autocast chooses what runs in half precision, as with other engines.
    plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    # Otherwise each process would keep the whole gradient until the last micro-batch.
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    model.register_load_state_dict_pre_hook(_divide_state)


def take_compiler(accelerator: Accelerator, backend: str | None, mode: str | None) -> dict | None:
    """
    Returns the arguments of torch.compile if it is on, for [`compile_layers`], and switches it off in accelerate: what
    that compiles as a whole runs past the hooks that gather a layer, and by regions it compiles lists of modules that
    have no forward.

    Args:
        accelerator (`Accelerator`): whose trainer has just been made.
        backend, mode (`str`, *optional*): of the training arguments; by default what `accelerate launch` has set.

    Raises:
        `ValueError`: if the mode or backend does not suit FSDP.
    """
    # Not that of `accelerator.state`, which trainers of the same arguments share.
    plugin = TorchDynamoPlugin(backend=backend, mode=mode)
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend=DynamoBackend.NO)
    if plugin.backend == DynamoBackend.NO:
        return None
    arguments = plugin.to_kwargs()
    for name, values in COMPILERS_WITH_GRAPHS.items():
        if arguments.get(name) in values:
            raise ValueError(
                f"`torch_compile_{name}` is {arguments[name]}, which records CUDA graphs, but with FSDP parameters"
                " change their place in memory; use the backend inductor, with the mode default or"
                " max-autotune-no-cudagraphs."
            )
    return arguments


def compile_layers(layers: Sequence[nn.Module], arguments: dict) -> None:
    """Compiles the forward of each layer, within the hooks that gather it."""
    torch.compiler.reset()  # of layers that are no longer there
    # For all together: they differ in their shapes, but share the code of which torch counts the versions.
    most = VERSIONS_OF_A_LAYER * len(layers)
    for layer in layers:
        layer.forward = CompiledForward(torch.compile(layer.forward, **arguments), most)


class CompiledForward:
    """
    Args:
        forward (`Callable`): a compiled function.
        versions (`int`): how many versions of its code torch may compile, in whichever thread it runs.
    """

    def __init__(self, forward: Callable, versions: int):
        self.forward = forward
        in_all = max(versions, torch._dynamo.config.accumulated_recompile_limit)
        self.limits = {"recompile_limit": versions, "accumulated_recompile_limit": in_all}

    def __call__(self, *args, **kwargs):
        with torch._dynamo.config.patch(self.limits):
            return self.forward(*args, **kwargs)


def divide_frozen(model: nn.Module, layers: nn.ModuleList, parent: nn.Module, accelerator: Accelerator) -> None:
    """
    Divides the parameters of `layers` of a `model` that is not trained among processes; each layer is gathered when it
    runs. `parent` is the module whose forward runs the layers. All other parameters stay whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    divided = {parameter for layer in layers for parameter in layer.parameters()}
    fully_shard(parent, mesh=mesh, ignored_params=set(model.parameters()) - divided)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of `tensor`."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class DividedGradScaler(torch.amp.GradScaler):
    """
    The gradient scaler of float16 for divided and whole parameters, in float32 and on one device; one call of torch's
    takes either, not both. What overflows in one process is an overflow in all.
    """

    @torch.no_grad()
    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        gradients = [own_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, inv_scale)
        torch.distributed.all_reduce(found_inf, torch.distributed.ReduceOp.MAX)
        return {found_inf.device: found_inf}


def divide_scaler(accelerator: Accelerator) -> None:
    """Gives `accelerator` a scaler for divided parameters, if float16 needs one."""
    if accelerator.scaler is not None:
        handler = accelerator.scaler_handler
        kwargs = {} if handler is None else handler.to_kwargs()
        accelerator.scaler = DividedGradScaler(accelerator.device.type, **kwargs)


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Gives whole parameters of a model that FSDP divides the mean of their gradients on all processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= accelerator.num_processes
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def whole(state, keep: bool):
    """
    A state of a model or optimizer with whole tensors, on the CPU, in place of divided ones. All processes must call
    it; where `keep` is `False` there is nothing in their place.
    """
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value, keep) for value in state]
    if not hasattr(state, "full_tensor"):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if keep else None


@torch.no_grad()
def copy_whole(divided: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Copies the tensors of a divided state into those of a whole one, one after the other."""
    for name, tensor in state.items():
        source = divided[name]
        tensor.copy_(source.full_tensor() if hasattr(source, "full_tensor") else source)


def _divided_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor that all processes have, divided as `like` is."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(like, "full_tensor") or hasattr(tensor, "full_tensor"):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _divide_state(model: nn.Module, state: dict, *args) -> None:
    for name, tensor in model.state_dict().items():
        if name in state:
            state[name] = _divided_like(state[name], tensor)


def load_whole_states(optimizer: torch.optim.Optimizer) -> None:
    """Lets `optimizer` load states of whole parameters once its own are divided."""

    def divide(optimizer: torch.optim.Optimizer, state: dict) -> dict:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        indices = [index for group in state["param_groups"] for index in group["params"]]
        divided = {}
        for index, parameter in zip(indices, parameters, strict=True):
            if index in state["state"]:
                divided[index] = {
                    key: _divided_like(value, parameter) if getattr(value, "shape", None) == parameter.shape else value
                    for key, value in state["state"][index].items()
                }
        return state | {"state": divided}

    optimizer.register_load_state_dict_pre_hook(divide)


@contextmanager
def whole_states(optimizer: torch.optim.Optimizer, keep: bool) -> Iterator[None]:
    """
    Within this context, which all processes must enter, `optimizer.state_dict()` has what [`whole`] gives for its
    state.
    """
    state = whole(optimizer.state_dict(), keep)
    handle = optimizer.register_state_dict_post_hook(lambda *args: state)
    try:
        yield
    finally:
        handle.remove()
