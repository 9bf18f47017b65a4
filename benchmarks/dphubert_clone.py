"""
DPHuBERT's own code (github.com/pyf98/DPHuBERT), unchanged, from the user's clone: its models with our weights, and its
training step.
"""

import importlib
import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers import WavLMModel

from skill_hf import WavLMForSkillStudent
from skill_hf.distillation.distiller import identity_map


# Largest difference between its outputs and ours, relative to the largest value, with the same weights.
TOLERANCE = 1e-4


class DPHuBERT:
    """
    Args:
        directory (`str`): a clone of the repository.

    Raises:
        `ValueError`: if it is none.
    """

    def __init__(self, directory: str):
        self.directory = Path(directory)
        if not (self.directory / "wav2vec2" / "model.py").is_file():
            raise ValueError(
                f"`{directory}` has no wav2vec2/model.py: pass a clone of github.com/pyf98/DPHuBERT with `--dphubert`."
            )
        with self._on_path():
            self._model = importlib.import_module("wav2vec2.model")

    @contextmanager
    def _on_path(self):
        sys.path.insert(0, str(self.directory))
        try:
            yield
        finally:
            sys.path.remove(str(self.directory))

    def build(self, model: WavLMModel | WavLMForSkillStudent, gates: bool = False) -> nn.Module:
        """
        Its model of the shape and with the weights of `model`, in eval mode; with `gates` on the units that its recipe
        prunes.

        Raises:
            `ValueError`: if a weight has no place in it.
        """
        config = model.config
        heads = getattr(config, "remaining_heads", None)
        heads = [list(range(config.num_attention_heads))] * config.num_hidden_layers if heads is None else heads
        units = getattr(config, "intermediate_sizes", [config.intermediate_size] * config.num_hidden_layers)
        built = self._model.wavlm_model(
            extractor_mode=f"{config.feat_extract_norm}_norm",
            extractor_conv_layer_config=list(
                zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
            ),
            extractor_conv_bias=config.conv_bias,
            encoder_embed_dim=config.hidden_size,
            encoder_projection_dropout=config.feat_proj_dropout,
            encoder_pos_conv_kernel=config.num_conv_pos_embeddings,
            encoder_pos_conv_groups=config.num_conv_pos_embedding_groups,
            encoder_num_layers=config.num_hidden_layers,
            encoder_use_attention=[bool(left) for left in heads],
            encoder_use_feed_forward=[bool(left) for left in units],
            encoder_total_num_heads=[config.num_attention_heads] * config.num_hidden_layers,
            encoder_remaining_heads=[list(left) for left in heads],
            encoder_num_buckets=config.num_buckets,
            encoder_max_distance=config.max_bucket_distance,
            encoder_attention_dropout=config.attention_dropout,
            encoder_ff_interm_features=list(units),
            encoder_ff_interm_dropout=config.activation_dropout,
            encoder_dropout=config.hidden_dropout,
            encoder_layer_norm_first=config.do_stable_layer_norm,
            encoder_layer_drop=config.layerdrop,
            aux_num_out=None,
            normalize_waveform=False,
            extractor_prune_conv_channels=gates,
            encoder_prune_attention_heads=gates,
            encoder_prune_feed_forward_intermediate=gates,
        )
        missing, unexpected = built.load_state_dict(_converted_weights(model, heads), strict=False)
        # What it has beside a WavLM: the scale of the last channels, all ones, and the gates.
        missing = [name for name in missing if "hard_concrete" not in name and name != DUMMY_WEIGHT]
        if missing or unexpected:
            raise ValueError(f"The weights do not fit DPHuBERT's model: {missing} are missing, {unexpected} too many.")
        return built.eval()

    def build_training_step(self, teacher: nn.Module, student: nn.Module, layers: list[int]) -> "TrainingStep":
        """
        Its stage 1 for `teacher` and `student` of [`build`]: loss, gates, Lagrangian and optimizer are its own; only
        the first of `layers` has a projection for itself, as in its recipe.
        """
        lightning = self._import_lightning()
        size = student.encoder.feature_projection.projection.out_features
        projections = [identity_map(size) for _ in range(2)]
        module = lightning.DistillModule(
            teacher_model=teacher.requires_grad_(False).eval(),
            student_model=student.train(),
            distill_mode="layer2layer",
            distill_layers=layers,
            distill_linear_projs=nn.ModuleList([projections[0], *[projections[1]] * (len(layers) - 1)]),
            distill_loss=lightning.DistillLoss(l2_weight=0, l1_weight=1, cos_weight=1, cos_type="raw"),
            learning_rate=2e-4,
            weight_decay=0.0,
            warmup_updates=15_000,
            max_updates=50_000,
            use_reg=True,
            reg_learning_rate=0.02,
            target_sparsity=0.75,
            sparsity_warmup_updates=5_000,
            tsv_dir="",
            train_subset="",
            seconds_per_batch=0,
            num_workers=0,
        )
        return TrainingStep(module, module.configure_optimizers()["optimizer"])

    def _import_lightning(self) -> ModuleType:
        """
        Its lightning.py. Of pytorch_lightning it needs a base class alone, of its data loading, which wants
        torchaudio, nothing: both are stood in for, so that neither has to be installed.
        """
        stands_in = {
            "pytorch_lightning": _module("pytorch_lightning", LightningModule=LightningModule),
            "dataset": _module("dataset"),
            "dataset.audio_dataset": _module(
                "dataset.audio_dataset",
                BucketizeBatchSampler=None,
                DistributedBatchSampler=None,
                CollateFnAudio=None,
                AudioDataset=None,
            ),
        }
        before = {name: sys.modules.get(name) for name in stands_in}
        # Under another name than its own, which is that of a package.
        spec = importlib.util.spec_from_file_location("dphubert_lightning", self.directory / "lightning.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules.update(stands_in)
        try:
            with self._on_path():
                spec.loader.exec_module(module)
        finally:
            for name, original in before.items():
                if original is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = original
        # It passes on an argument that schedulers of today's torch no longer take.
        module.LinearDecayLRScheduler = lambda *args, **kwargs: None
        return module


class LightningModule(nn.Module):
    """What DPHuBERT's `DistillModule` uses of Lightning's."""

    global_step = 0

    def log_dict(self, values):
        """Lightning keeps the values until it writes a line."""


class TrainingStep:
    """One step as Lightning makes it: loss, backward, clipping by the recipe's norm, optimizer."""

    max_grad_norm = 10.0

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer):
        self.module, self.optimizer = module, optimizer

    def __call__(self, input_values: torch.Tensor, autocast) -> None:
        lengths = torch.full((len(input_values),), input_values.shape[1], device=input_values.device)
        with autocast:
            loss = self.module.training_step((input_values, lengths), 0)
        self.optimizer.zero_grad()
        loss.backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        self.module.global_step += 1


DUMMY_WEIGHT = "feature_extractor.dummy_weight"


def _converted_weights(model: WavLMModel | WavLMForSkillStudent, heads: list[list[int]]) -> dict[str, torch.Tensor]:
    """The weights by DPHuBERT's names; its gates of the position bias have a constant for every head, left or not."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "masked_spec_embed":
            continue
        name = name.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        if name.startswith("feature_projection."):
            name = f"encoder.{name}"
        elif name.startswith("encoder."):
            name = f"encoder.transformer.{name.removeprefix('encoder.')}"
        if name.endswith("gru_rel_pos_const"):
            left = heads[int(name.split(".")[3])]
            tensor = tensor.new_ones(1, model.config.num_attention_heads, 1, 1).index_copy(
                1, torch.tensor(left, device=tensor.device), tensor
            )
        weights[name] = tensor
    return weights


@torch.no_grad()
def check_agreement(name: str, model: nn.Module, other: nn.Module, input_values: torch.Tensor) -> float:
    """
    Largest difference between the outputs of `model`, one of ours or stock, and of DPHuBERT's `other`, relative to the
    largest value.

    Raises:
        `ValueError`: if it is above `TOLERANCE`.
    """
    expected = model(input_values).last_hidden_state
    difference = ((other(input_values)[0] - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"DPHuBERT's model with the weights of `{name}` gives other outputs (relative difference"
            f" {difference:.1e}); a time of it would say nothing."
        )
    return difference


def _module(name: str, **contents) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents)
    return module
