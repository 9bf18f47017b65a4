"""`EngineTrainer`: the methods of transformers' `Trainer` that depend on how processes share the training."""

from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..distribution import (
    average_gradients,
    compile_layers,
    divide_scaler,
    divide_when_prepared,
    divides_parameters,
    load_whole_states,
    take_compiler,
    whole,
    whole_states,
)
from .optimization import check_optimizer, gate_parameters
from .restoring import reunite


class EngineTrainer(Trainer):
    """
    Trains `distiller` with the engine that `accelerate launch` has chosen: one process, DistributedDataParallel or
    FSDP2. Checkpoints are the same with each. What FSDP2 needs is in [`skill_hf.distribution`].

    Attributes:
        divides_parameters (`bool`): whether FSDP divides the parameters of a stage among processes.
        shrinking ([`ShrinkCallback`], *optional*): what shrinks the student in stage 1.
    """

    shrinking = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.divides_parameters = divides_parameters(self.accelerator)
        self._compiler = None
        if self.divides_parameters:
            backend, mode = self.args.torch_compile_backend, self.args.torch_compile_mode
            self._compiler = take_compiler(self.accelerator, backend, mode)
            divide_scaler(self.accelerator)
        # Otherwise the Trainer would write checkpoints that only FSDP can read.
        self.is_fsdp_enabled = False
        if self.args.ddp_find_unused_parameters is None and self.accelerator.ddp_handler is not None:
            # Groups may leave out the last layers. With gradient checkpointing the Trainer would not look, since that
            # fails with reentrant checkpoints, which a student does not have.
            self.accelerator.ddp_handler.find_unused_parameters = True

    def optimizer_class(self, model) -> tuple[type[torch.optim.Optimizer], dict]:
        """Class and arguments of the optimizer of `model`, given by the user or chosen by the training arguments."""
        return self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)

    def check_optimizer(self, needed_by: str, instead: str) -> None:
        """See [`~skill_hf.distillation.optimization.check_optimizer`], for the optimizer of this run."""
        cls, kwargs = self.optimizer_class(self.student)
        check_optimizer(cls, kwargs | {"lr": 1e-3}, self.args.device, needed_by, instead)

    def divide(self) -> None:
        """
        Before a stage: the processes will share the parameters of distiller and teachers, if FSDP is used. After an
        error within the stage they still do, and only a new trainer can go on.
        """
        if not self.divides_parameters:
            return
        layers = self.student.base_model.encoder.layers
        if self._compiler is not None:
            compile_layers(layers, self._compiler)
        divide_when_prepared(self.distiller, layers, gate_parameters(self.distiller), self.accelerator)
        for teacher in self.teachers:
            teacher.divide(self.accelerator, self._autocast_dtype)

    def reunite(self) -> None:
        """After a stage: every process has the whole models again."""
        if self.divides_parameters:
            reunite(self)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.divides_parameters and self.accelerator.sync_gradients:
            average_gradients(gate_parameters(self.distiller), self.accelerator)
        return loss

    def _mixed_mesh_grad_norm(self, *args, **kwargs) -> torch.Tensor:
        # The Trainer computes this norm itself, without unscaling first as `Accelerator.clip_grad_norm_` does.
        self.accelerator.unscale_gradients()
        return super()._mixed_mesh_grad_norm(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self.shrinking is not None:
            self.shrinking.before_evaluation(self.control)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.shrinking is not None:
            self.shrinking.after_evaluation(self.control)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.make_optimizer(self.model if model is None else model)
            if self.divides_parameters:
                load_whole_states(self.optimizer)
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.divides_parameters:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # The Trainer would load the whole state of the optimizer onto each GPU.
        for target, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
            path = Path(checkpoint) / name
            if path.is_file():  # not at the cut
                target.load_state_dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Below accelerate's wrapper.
        is_divided = self.divides_parameters
        with whole_states(self.optimizer.optimizer, self.args.should_save) if is_divided else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.divides_parameters and state_dict is None:
            state_dict = whole(self.model.state_dict(), self.args.should_save)
        super()._save(output_dir, state_dict)
