"""`SkillDistiller`: everything that is trained, with one forward that returns every loss."""

from collections.abc import Sequence

import torch
from torch import nn

from ..compression.budgets import UnitCosts
from ..compression.multiplier import MultiplierEstimate
from ..compression.pruning import expected_cost, seed_gates
from ..losses import attended, distillation_sums, group_means, lagrangian
from ..models.properties import has_gates, student_states
from .ensemble import TargetSet
from .state_norms import StateNorms
from .task_heads import HeadLoss


class SkillDistiller(nn.Module):
    """
    Student, projections and learned Lagrange multipliers. All trained parameters are used in this one forward, as
    data-parallel wrappers require; the teacher is not part of it.

    Args:
        student (`PreTrainedModel`): with gates in the first stage, pruned in the second; with a head or without.
        target_sets (sequence of [`~skill_hf.distillation.ensemble.TargetSet`]): what is predicted; the first set is
            of the teacher that the student is a copy of, of which it may lack some layers.
        costs ([`~skill_hf.compression.budgets.UnitCosts`]): costs of the student's units, in the unit of the budget.
        teacher_cost (`int`): the teacher's cost in the same unit, of which sparsity is a share.
        loss_weights (`dict[str, float]`): weight of each of [`~skill_hf.losses.LOSS_TERMS`].
        use_projections (`bool`, *optional*, defaults to `False`): whether groups of the first target set have
            projections; groups of other sets always have them.
        projection_groups (`list[list[int]]`, *optional*): indices of groups that share a projection.
        student_layers (`str`, *optional*, defaults to `"group"`): `group` or `last`, the student's states that predict
            a group.
        group_weights (`str`, *optional*, defaults to `"equal"`): `equal` or `size`, how much a group counts.
        state_sizes (sequence of `tuple[int, int]`, *optional*): number and width of the hidden states of each teacher,
            if they are normalised.
        multiplier (`str`, *optional*, defaults to `"estimated"`): `estimated` or `learned`, how the multiplier of the
            constraint on the size is found.
        final_sparsity (`float`, *optional*, defaults to 0.75): the target at the end of the schedule, which estimated
            multipliers need.
        previous ([`SkillDistiller`], *optional*): the one of the first stage, whose projections and normalisation
            go on; by default new projections, identity maps where the widths are equal.
        head_loss ([`~skill_hf.distillation.task_heads.HeadLoss`], *optional*): what the student's head adds.
    """

    def __init__(
        self,
        student: nn.Module,
        target_sets: Sequence[TargetSet],
        costs: UnitCosts,
        teacher_cost: int,
        loss_weights: dict[str, float],
        use_projections: bool = False,
        projection_groups: Sequence[Sequence[int]] | None = None,
        student_layers: str = "group",
        group_weights: str = "equal",
        state_sizes: Sequence[tuple[int, int]] = (),
        multiplier: str = "estimated",
        final_sparsity: float = 0.75,
        previous: "SkillDistiller | None" = None,
        head_loss: HeadLoss | None = None,
    ):
        super().__init__()
        self.student = student
        self.head_loss = head_loss
        self.target_sets = target_sets
        self.student_layers = student_layers
        self.group_weights = group_weights
        self.costs = costs
        self.teacher_cost = teacher_cost
        self.loss_weights = loss_weights
        widths = [targets.width for targets in target_sets for _ in targets.groups]
        first = 0 if use_projections else len(target_sets[0].groups)
        sharing = list(projection_groups or [[index] for index in range(first, len(widths))])
        self.projection_of_group = {group: index for index, groups in enumerate(sharing) for group in groups}
        if previous is None:
            self.projections = nn.ModuleList(
                identity_map(student.config.hidden_size, widths[groups[0]]) for groups in sharing
            )
            self.state_norms = nn.ModuleList(StateNorms(*size) for size in state_sizes)
        else:
            self.projections, self.state_norms = previous.projections, previous.state_norms
        self.has_gates = has_gates(student)
        is_estimated = self.has_gates and multiplier == "estimated"
        self.multiplier_estimate = MultiplierEstimate(final_sparsity) if is_estimated else None
        if self.has_gates and multiplier == "learned":
            self.lambda_1 = nn.Parameter(torch.zeros(()))
            self.lambda_2 = nn.Parameter(torch.zeros(()))

    @property
    def config(self):
        return self.student.config

    @property
    def groups_at_depth(self) -> list[list[int]]:
        """
        The groups of one target set after the other, by hidden-state indices of the first teacher. Those of a teacher
        of another depth are at the same relative depth.
        """
        num_layers = self.target_sets[0].num_layers
        return [
            [same_relative_depth(index, targets.num_layers, num_layers) for index in group]
            for targets in self.target_sets
            for group in targets.groups
        ]

    @property
    def student_groups(self) -> list[list[int]]:
        """Indices of the student's hidden states that predict each group."""
        if self.student_layers == "last":
            return [[-1]] * len(self.groups_at_depth)
        states = student_states(self.config, self.target_sets[0].num_layers)
        return [[states[index] for index in group] for group in self.groups_at_depth]

    def group_features(self, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """
        The student's mean of each group, before its projection if it has one, from the student's hidden states:
        `(groups, batch, frames, hidden_size)`, float32.
        """
        if not self.state_norms:
            return group_means(hidden_states, self.student_groups)
        # By index of the first teacher, whose constants normalise them.
        indices = student_states(self.config, self.target_sets[0].num_layers)
        states = [self.state_norms[0](index, hidden_states[state].float()) for index, state in enumerate(indices)]
        groups = self.groups_at_depth
        return group_means(states, [[-1]] * len(groups) if self.student_layers == "last" else groups)

    def weights_of_groups(self) -> list[float] | None:
        """How much each group of all target sets counts; they add up to 1. `None` if all count equally."""
        if self.group_weights == "equal":
            return None
        sizes = [len(group) for targets in self.target_sets for group in targets.groups]
        return [size / sum(sizes) for size in sizes]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs):
        # Reentrant checkpoints would go through the graph of a gate's value once for each part of a batch.
        settings = (gradient_checkpointing_kwargs or {}) | {"use_reentrant": False}
        self.student.gradient_checkpointing_enable(settings, **kwargs)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **kwargs):
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    # The estimate of the multiplier goes through this graph a second time, which compilers do not allow.
    @torch.compiler.disable
    def sparsity(self) -> torch.Tensor:
        """Removed share of the teacher's cost, in expectation if there are gates; a float scalar."""
        return (1 - expected_cost(self.student.base_model, self.costs) / self.teacher_cost).float()

    def forward(
        self,
        input_values: torch.Tensor,
        targets: Sequence[torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        target_sparsity: float = 0.0,
        gate_seed: int | None = None,
        num_frames: torch.Tensor | float | None = None,
        penalty_scale: float = 1.0,
        target_logits: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_clips: torch.Tensor | float | None = None,
        num_labels: torch.Tensor | float | None = None,
    ) -> dict[str, torch.Tensor]:
        r"""
        `loss = sum of weighted distillation terms / num_frames + penalty_scale * Lagrangian`. With an estimated
        multiplier the Lagrangian is not part of the value of the loss, only of the gates' gradients. The student's
        mean hidden state of each group predicts the teacher's (SKILL, arXiv 2402.16830), through the group's linear
        map if it has one. Terms are means over the groups of all target sets, in which each group counts equally,
        whatever its width. With a head, the weighted losses of its logits and of the labels are added.

        Args:
            input_values (`torch.FloatTensor` of shape `(batch, samples)`): audio as prepared by the feature extractor.
            targets (sequence of `torch.FloatTensor` of shape `(groups, batch, frames, width)`): group means of each
                target set.
            attention_mask (`torch.LongTensor` of shape `(batch, samples)`, *optional*): 0 at padded samples.
            target_sparsity (`float`, *optional*): value of the schedule at this step.
            gate_seed (`int`, *optional*): fixes the noise of the gates.
            num_frames (*optional*): divisor of sums over frames; by default the valid frames of this batch.
            penalty_scale (`float`, *optional*): factor of the Lagrangian, for batches that are accumulated.
            target_logits (`torch.FloatTensor`, *optional*): of the teacher's head; `(batch, frames, classes)`, or
                `(batch, classes)` where a clip has one prediction.
            labels (`torch.LongTensor`, *optional*): as [`~skill_hf.data.labels.pad_labels`] gives them.
            num_clips, num_labels (*optional*): as `num_frames`, for what losses of the head are means over.

        Returns:
            `dict`: `loss`, each of [`~skill_hf.losses.TRAINING_LOSSES`] and of the head's losses, `num_frames`,
            `num_clips`, `num_labels` and `sparsity`, scalars; all but `loss` are detached.
        """
        sparsity = self.sparsity()
        if self.has_gates:
            gating = self.student.base_model.gating
            seed_gates(self.student.base_model, gate_seed)
            if self.multiplier_estimate is not None and self.training and sparsity.requires_grad:
                log_alphas = [gate.log_alpha for gate in gating.gates]
                gating.common_shift = self.multiplier_estimate.common_shift(
                    log_alphas, sparsity, target_sparsity, penalty_scale
                )
        outputs = self.student(input_values, attention_mask=attended(attention_mask), output_hidden_states=True)
        means = self.group_features(outputs.hidden_states)
        frame_mask = frame_mask_of(self.student, means.shape[2], attention_mask)
        frames = means.shape[1] * means.shape[2] if frame_mask is None else frame_mask.sum()
        weights = self.weights_of_groups()
        sums = self._distillation_sums(means, targets, frame_mask, weights)
        divisor = _divisor(frames, num_frames)
        terms = {name: value / divisor for name, value in sums.items()}
        loss = distillation_loss = sum(self.loss_weights[name] * term for name, term in terms.items())
        counts, head_terms = {"num_frames": frames}, {}
        if self.head_loss is not None:
            clips = len(input_values) if attention_mask is None else attention_mask.bool().any(-1).sum()
            counts |= {"num_clips": clips, "num_labels": self.head_loss.count_labels(labels)}
            given = {"num_frames": num_frames, "num_clips": num_clips, "num_labels": num_labels}
            sums = self.head_loss.sums(self.student, outputs.logits, target_logits, attention_mask, frame_mask, labels)
            for name, unit in self.head_loss.units.items():
                head_terms[name] = sums[name] / _divisor(counts[unit], given[unit])
                loss = loss + self.head_loss.weights[name] * head_terms[name]
        penalty = torch.zeros_like(loss)
        if self.has_gates and self.multiplier_estimate is None:
            penalty = penalty_scale * lagrangian(sparsity, target_sparsity, self.lambda_1, self.lambda_2)
            # In evaluation only the distillation loss counts: it must compare gated with pruned students.
            loss = loss + penalty if self.training else loss
        outputs = {f"{name}_loss": term for name, term in terms.items()} | head_terms
        outputs |= {"distillation_loss": distillation_loss, "lagrangian_loss": penalty, "sparsity": sparsity}
        outputs = {name: value.detach() for name, value in outputs.items()}
        counts = {name: _scalar(count, loss.device) for name, count in counts.items()}
        return {"loss": loss, **outputs, **counts}

    def multipliers(self) -> tuple[float, float]:
        """`lambda_1` and `lambda_2` of the Lagrangian, 0 where there is none."""
        if not self.has_gates:
            return 0.0, 0.0
        if self.multiplier_estimate is None:
            return self.lambda_1.item(), self.lambda_2.item()
        value = self.multiplier_estimate.value
        return 0.0 if value is None else value.item(), 0.0

    def _predictions(self, means: torch.Tensor, groups: slice) -> torch.Tensor:
        """Of the groups of one target set, all of which have projections or none."""
        if groups.start not in self.projection_of_group:
            return means[groups]
        projections = [self.projections[self.projection_of_group[group]] for group in range(groups.start, groups.stop)]
        return torch.stack([project(mean) for project, mean in zip(projections, means[groups], strict=True)])

    def _distillation_sums(self, means, targets, frame_mask, weights) -> dict[str, torch.Tensor]:
        """Sums over valid frames and weighted groups; `means` and `weights` have an entry for each group."""
        totals, first = {}, 0
        for target in targets:
            groups = slice(first, first + len(target))
            first += len(target)
            prediction, of_set = self._predictions(means, groups), weights and weights[groups]
            share = len(target) / len(means) if weights is None else 1.0
            for name, value in distillation_sums(prediction, target, frame_mask, of_set).items():
                totals[name] = totals.get(name, 0.0) + share * value
        return totals


def _divisor(count: torch.Tensor | int, given: torch.Tensor | float | None) -> torch.Tensor | float:
    """What sums are divided by: `count`, or what was `given` for a larger batch; 1 where there is nothing to sum."""
    divisor = count if given is None else given
    return divisor + (divisor == 0) if torch.is_tensor(divisor) else divisor


def frame_mask_of(model, frames: int, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """`(batch, frames)`, True for frames that are not padding, from a mask over samples; `None` without padding."""
    if attention_mask is None:
        return None
    mask = model._get_feature_vector_attention_mask(frames, attended(attention_mask))
    return mask & attention_mask.bool().any(-1, keepdim=True)


def same_relative_depth(index: int, num_layers: int, other_num_layers: int) -> int:
    """
    The hidden state of a model of `other_num_layers` at the depth of hidden state `index` of one of `num_layers`,
    rounded half up; the input of the first layer and the last output stay what they are.
    """
    return (2 * index * other_num_layers + num_layers) // (2 * num_layers)


def identity_map(size: int, out_size: int | None = None) -> nn.Linear:
    """A linear map initialised to the identity; with another `out_size`, cut or filled with zeros."""
    linear = nn.Linear(size, size if out_size is None else out_size)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _scalar(number: torch.Tensor | int, device: torch.device) -> torch.Tensor:
    # `as_tensor` would compile a version of the forward for each number.
    return number.to(device) if isinstance(number, torch.Tensor) else torch.full((), number, device=device)
