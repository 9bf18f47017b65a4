"""The model card, `README.md`, of every saved student: what it is, and how it was made."""

import functools
import importlib.metadata
import io
import json
import logging
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..compression.macs import count_macs
from ..compression.units import KINDS, shown_kinds, sizes_of, units_in_teacher
from ..losses import LOSS_TERMS, term_weights
from ..models.loading import hub_id_of, valid_hub_id
from ..recipe.skill_config import SkillConfig
from ..version import __version__
from .dataset_description import DatasetContent, code_text, describe_datasets
from .plots import plot_architecture, plot_layer_distances, plot_layer_similarity, plot_training
from .run_report import RunReport
from .teacher_metadata import SeveralTeachers, add_other_teachers, several_teachers, teacher_license


logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
FIGURES = ("architecture.png", "layer_similarity.png", "layer_distances.png", "training.png")
PRECISIONS = {"bf16": "bfloat16 mixed", "fp16": "float16 mixed"}
HEAD_LOSS_LABELS = {"logits_loss": "Divergence of logits", "task_loss": "Loss of labels"}
EXAMPLE_SECONDS = 10.0  # what multiply-accumulates are counted for
CURVE_ROWS = 8


class Task(NamedTuple):
    """A task on the Hub, which has none for frames or speakers, and the last lines of the code example."""

    pipeline_tag: str
    last_lines: str


# By the auto class of a student.
TASKS = {
    "AutoModel": Task(
        "feature-extraction",
        "    hidden_states = model(**inputs, output_hidden_states=True).hidden_states\n"
        "print(len(hidden_states), hidden_states[-1].shape, hidden_states[-1][0, 0, :3])",
    ),
    "AutoModelForCTC": Task(
        "automatic-speech-recognition",
        "    tokens = model(**inputs).logits.argmax(-1)\n"
        "print(tokens.shape)  # the tokenizer's `batch_decode(tokens)` turns them into text",
    ),
    "AutoModelForAudioClassification": Task(
        "audio-classification",
        "    probabilities = model(**inputs).logits.softmax(-1)[0]\n"
        "print({model.config.id2label[index]: p for index, p in enumerate(probabilities.tolist())})",
    ),
    "AutoModelForAudioFrameClassification": Task(
        "voice-activity-detection",
        "    logits = model(**inputs).logits\nprint(logits.shape)  # (clips, frames, labels)",
    ),
    "AutoModelForAudioXVector": Task(
        "feature-extraction",
        "    embeddings = torch.nn.functional.normalize(model(**inputs).embeddings, dim=-1)\n"
        "print(embeddings.shape)  # the dot product of two clips' embeddings is their similarity",
    ),
}

SNIPPET = """\
import numpy as np
import torch
from transformers import AutoFeatureExtractor, {auto_class}

name = {name}
feature_extractor = AutoFeatureExtractor.from_pretrained(name)
model = {auto_class}.from_pretrained(name, trust_remote_code=True).eval()

audio = np.random.default_rng(0).standard_normal({rate})  # one second, mono, {rate} Hz: replace it with yours
inputs = feature_extractor(audio, sampling_rate={rate}, return_tensors="pt").to(model.device, model.dtype)
with torch.no_grad():
{last_lines}"""


@dataclass
class UnitsContent:
    """Units of one kind: their name, and their number in each convolution or layer."""

    label: str
    places: str  # `convolution` or `layer`
    left: list[int]
    whole: list[int | None]  # before pruning

    @property
    def total_label(self) -> str:
        return f"{self.label} of the convolutions" if self.places == "convolution" else self.label


@dataclass
class StudentContent:
    """
    Values for the template for every student, as plain numbers and strings, one field for each placeholder. `None` or
    empty means unknown; the paragraph is then left out.
    """

    student_class: str
    student_id: str | None
    teacher_id: str | None
    snippet: str
    num_parameters: int
    macs: int
    macs_seconds: float
    units: list[UnitsContent]
    versions: dict[str, str]


@dataclass
class TrainingContent:
    """Additional values for the template for a student of this run, in the same form."""

    teacher_type: str
    num_teacher_parameters: int
    teacher_macs: int
    printed: str | None  # by the snippet
    budget: str  # what is counted for it
    sparsity: float
    target_sparsity: float
    groups: list[list[int]] | None
    clustering: str | None  # how the groups were found; `None` if set by hand
    merges: list[tuple[list[int], list[int], float]]  # of the tree: which hidden states with which, at which distance
    first_layer: int  # hidden state that the first row of the tree stands for
    silhouettes: dict[int, float]  # by number of groups
    half_groups: list[list[list[int]]]  # what each half of the calibration set gives
    cut: dict | None  # see `RunRecord`
    measured_on: str
    measured: list[tuple[str, float, float]]  # moment, loss, cosine similarity
    student_layers: str
    has_projections: bool
    datasets: list[DatasetContent]
    calibration: tuple[int, float]  # clips at most, seconds each
    recipe: dict[str, str]
    stages: list[tuple[int, float]] | None  # optimizer steps and peak learning rate of each
    gate_learning_rate: float | None
    num_steps_done: int
    clips_per_step: int | None
    seconds_per_step: float | None
    precision: str
    seed: int
    head_losses: list[str]  # of a head that was distilled, by their names in logs
    temperature: float
    loss_names: list[str]
    losses: list[tuple[str, int, list[str]]]  # of what, at which step, values
    curve: list[tuple[int, float, float]]  # step, sparsity, target
    figures: list[str]
    several: SeveralTeachers | None  # what the card says of others than the first


def write_model_card(directory: str | Path, report: RunReport) -> None:
    """
    Writes `README.md` and, if matplotlib is installed, its figures (`FIGURES`) into `directory`. The card contains no
    local paths.

    If a student was saved in `directory`, the card's code example is run on it, and the card shows the output.

    Args:
        directory (`str` or `Path`):
            Directory of the saved student.
        report ([`~skill_hf.publishing.run_report.RunReport`]):
            The run. Unknown values are left out.

    Raises:
        `RuntimeError`: if the code example fails. The saved student is unchanged, and no card is written.
    """
    student, rate = report.student, report.sampling_rate
    described = describe_datasets(report.train_dataset, report.eval_dataset)
    data = card_data(student, report.teacher_name, [item.hub_id for item in described if item.hub_id])
    content = _student_content(student, data, report.hub_model_id, rate, report.teacher.config)
    printed = None
    if (Path(directory) / CONFIG_NAME).is_file():
        try:
            printed = _run(_snippet(student, str(directory), rate))
        except Exception as error:
            raise RuntimeError(
                f"The student was saved in `{directory}`, but the code example in its model card fails, so no"
                f" {REPOCARD_NAME} was written: {type(error).__name__}: {error}"
            ) from error
    training = _training_content(report, described, printed, save_figures(directory, report))
    add_other_teachers(data, report.other_teachers)
    _render(data, content, training).save(Path(directory) / REPOCARD_NAME)


def student_card(model: PreTrainedModel, repo_id: str | None = None) -> ModelCard:
    """
    A shorter card for a student without a trainer: size, remaining units of each layer, usage, citations.

    Args:
        model ([`~transformers.PreTrainedModel`]): a student of any class.
        repo_id (`str`, *optional*): its id on the Hub.

    Raises:
        `ValueError`: if `model` is not a student.
    """
    data = card_data(model)
    return _render(data, _student_content(model, data, repo_id), None)


def card_data(
    model: PreTrainedModel, teacher: str | Path | None = None, datasets: Sequence[str] = ()
) -> ModelCardData:
    """
    Metadata of a student's card. Unknown fields are left out.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A student of any class; the task is that of its class, the tags are `model.model_tags`.
        teacher (`str` or `Path`, *optional*):
            Hub id or local directory of the teacher, `model.config.base_model` by default. Only an id on the Hub
            becomes `base_model`; the licence is also read from a directory.
        datasets (`Sequence[str]`, *optional*):
            Hub ids of the training data.

    Raises:
        `ValueError`: if `model` is not a student.
    """
    base_model = getattr(model.config, "base_model", None)
    return ModelCardData(
        base_model=hub_id_of(teacher) or hub_id_of(base_model),
        datasets=sorted(set(datasets)) or None,
        library_name="transformers",
        license=teacher_license(teacher) or teacher_license(base_model),
        pipeline_tag=TASKS[_classes(model)[1]].pipeline_tag,
        tags=list(model.model_tags or []),
    )


def save_figures(directory: str | Path, report: RunReport) -> list[str]:
    """
    Draws the remaining units of each layer, the similarity of the teacher's layers with the tree of their clustering,
    the distance between student and teacher at every layer, and the training curves, as far as they are known.

    Args:
        directory (`str` or `Path`): directory for the figures (`FIGURES`).
        report ([`~skill_hf.publishing.run_report.RunReport`]): the run.

    Returns:
        `list[str]`: names of the written files; empty without matplotlib.
    """
    history, config, record = report.log_history, report.skill_config, report.record
    figures = {}
    try:
        figures["architecture.png"] = plot_architecture(report.student.config, report.teacher.config)
        if report.layer_similarity is not None:
            figures["layer_similarity.png"] = plot_layer_similarity(
                report.layer_similarity, report.layer_tree, report.layer_groups, _first_layer(config)
            )
        if record.layer_distances:
            figures["layer_distances.png"] = plot_layer_distances(
                {"student": record.layer_distances["cka"]},
                f"distance to the {'first ' if report.other_teachers else ''}teacher (1 - CKA), {record.measured_on}",
                {"student": report.layer_groups},
            )
        if any("distillation_loss" in line for line in history):
            terms = [f"{term}_loss" for term in _weighted_terms(config)]
            cut = report.steps and report.steps.joint
            figures["training.png"] = plot_training(history, terms, cut, report.head_losses)
    except ImportError as error:
        logger.info("No figures were drawn; the model card has tables instead. %s", error)
    for name in FIGURES:
        (Path(directory) / name).unlink(missing_ok=True)  # that of an earlier run would be published with this one
    for name, figure in figures.items():
        figure.savefig(Path(directory) / name)
    return list(figures)


def _render(data: ModelCardData, content: StudentContent, training: TrainingContent | None) -> ModelCard:
    return ModelCard.from_template(data, template_path=str(TEMPLATE), training=training, **vars(content))


def _units_content(config: PreTrainedConfig, teacher_config: PreTrainedConfig | None) -> list[UnitsContent]:
    num_layers = None if teacher_config is None else teacher_config.num_hidden_layers
    teacher_sizes = None if teacher_config is None else sizes_of(teacher_config)
    units, content = units_in_teacher(config, num_layers), []
    for name in shown_kinds(config):
        kind, left = KINDS[name], [0 if group is None else group.size for group in units[name]]
        whole = [next(filter(None, units[name])).whole] * len(left) if teacher_sizes is None else teacher_sizes[name]
        content.append(UnitsContent(kind.label.capitalize(), kind.places, left, whole))
    return content


def _student_content(
    model: PreTrainedModel,
    data: ModelCardData,
    repo_id,
    rate: int = 16_000,
    teacher_config: PreTrainedConfig | None = None,
) -> StudentContent:
    student_id = valid_hub_id(repo_id)
    return StudentContent(
        student_class=_classes(model)[0],
        student_id=student_id,
        teacher_id=data.base_model,
        snippet=_snippet(model, student_id, rate),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=count_macs(model, EXAMPLE_SECONDS, rate),
        macs_seconds=EXAMPLE_SECONDS,
        units=_units_content(model.config, teacher_config),
        versions={"skill-hf": __version__, "Python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("transformers", "torch", "datasets")},
    )


def _training_content(
    report: RunReport, datasets: list[DatasetContent], printed: str | None, figures: list[str]
) -> TrainingContent:
    config, steps, record, teacher = report.skill_config, report.steps, report.record, report.teacher.config
    default, terms, rates = SkillConfig(), _weighted_terms(config), report.learning_rates
    head_losses = [name for name in report.head_losses if getattr(config, name.replace("_loss", "_weight"))]
    return TrainingContent(
        teacher_type=teacher.model_type,
        num_teacher_parameters=report.num_teacher_parameters,
        teacher_macs=count_macs(report.teacher, EXAMPLE_SECONDS, report.sampling_rate),
        printed=printed,
        budget=report.budget.quantity,
        sparsity=report.sparsity,
        target_sparsity=config.target_sparsity,
        groups=report.layer_groups,
        clustering=None if config.layer_groups else _clustering(config),
        merges=_merges(report.layer_tree, _first_layer(config)),
        first_layer=_first_layer(config),
        silhouettes=record.silhouettes,
        half_groups=record.half_groups,
        cut=record.cut,
        measured_on=record.measured_on,
        measured=record.loss_rows(),
        student_layers=config.student_layers,
        has_projections=config.has_projections(1 + len(report.other_teachers)),
        datasets=datasets,
        calibration=(config.calibration_samples, config.calibration_seconds),
        recipe={
            # Of dozens of costs, it's enough to tell where they were measured.
            name: code_text(json.dumps(value["measured_on"])) if name == "latency_costs" else json.dumps(value)
            for name, value in config.to_dict().items()
            if value != getattr(default, name)
        },
        stages=steps and rates and list(zip((steps.joint, steps.final), rates, strict=True)),
        gate_learning_rate=steps and config.resolve_gate_learning_rate(steps.joint),
        num_steps_done=report.num_steps_done,
        clips_per_step=report.clips_per_step,
        seconds_per_step=report.seconds_per_step,
        precision=PRECISIONS.get(report.precision, "float32"),
        seed=report.seed,
        head_losses=head_losses,
        temperature=config.logits_temperature,
        loss_names=[
            "Distillation loss",
            *(LOSS_TERMS[term].label for term in terms),
            *(HEAD_LOSS_LABELS[name] for name in head_losses),
        ],
        losses=_losses(report.log_history, ["distillation_loss", *(f"{term}_loss" for term in terms), *head_losses]),
        curve=_curve(report.log_history),
        figures=figures,
        several=several_teachers(report),
    )


def _classes(model: PreTrainedModel) -> tuple[str, str]:
    """
    Names of the student's class and of the auto class that loads it, from the `auto_map` of the student's config.
    """
    auto_map = getattr(model.config, "auto_map", None) or {}
    auto_class_of = {path.rpartition(".")[2]: auto_class for auto_class, path in auto_map.items()}
    for name in [cls.__name__ for cls in type(model).__mro__]:
        if auto_class_of.get(name) in TASKS:
            return name, auto_class_of[name]
    raise ValueError(f"The model card of skill-hf is for students, but the model is a {type(model).__name__}.")


def _snippet(model: PreTrainedModel, name: str | None, rate: int) -> str:
    """Code that uses the student `name`, a Hub id or directory; by default the working directory."""
    if name is None:
        literal = '"."  # the directory of this file, or its id on the Hub'
    else:
        # Plain names look as they do elsewhere; with `repr`, no name whatsoever is more than a string.
        literal = f'"{name}"' if re.fullmatch(r"[\w./-]+", name, re.ASCII) else repr(name)
    auto_class = _classes(model)[1]
    return SNIPPET.format(auto_class=auto_class, name=literal, rate=rate, last_lines=TASKS[auto_class].last_lines)


def rename_in_snippets(text: str, repo_id: str) -> str:
    """The text of a card with code examples changed to load from `repo_id`."""
    text = re.sub(r"^name = .*$", f'name = "{repo_id}"', text, flags=re.MULTILINE)
    return re.sub(r"""\.from_pretrained\((?:"[^"\n]*"|'[^'\n]*')\)""", f'.from_pretrained("{repo_id}")', text)


def _run(snippet: str) -> str:
    """Output of `snippet`. Neither the code nor what it loads changes anything that the caller uses."""
    printed = io.StringIO()
    with torch.random.fork_rng(devices=[]):
        exec(compile(snippet, REPOCARD_NAME, "exec"), {"print": functools.partial(print, file=printed)})
    return printed.getvalue().strip()


def _first_layer(skill_config) -> int:
    return 0 if skill_config.include_embeddings else 1


def _weighted_terms(skill_config) -> list[str]:
    return [term for term, weight in term_weights(skill_config).items() if weight]


def _clustering(config) -> str:
    if config.num_clusters is not None:
        cut = f"into {config.num_clusters} groups"
    elif config.distance_threshold is not None:
        cut = f"at a distance of {config.distance_threshold}"
    else:
        cut = "where the mean silhouette is largest"
    merges = "neighbouring groups only, " if config.contiguous else ""
    return f"`{config.similarity}` similarity, {merges}`{config.linkage}` linkage, the tree cut {cut}"


def _merges(tree, first_layer: int) -> list[tuple[list[int], list[int], float]]:
    """The hidden states that are joined and their distance, in the order of scipy's linkage matrix."""
    if tree is None:
        return []
    nodes = [[layer] for layer in range(first_layer, first_layer + len(tree) + 1)]
    merges = []
    for a, b, distance, _ in tree:
        left, right = sorted([nodes[int(a)], nodes[int(b)]])
        nodes.append(sorted(left + right))
        merges.append((left, right, float(distance)))
    return merges


def _losses(log_history: list[dict], names: list[str]) -> list[tuple[str, int, list[str]]]:
    """The last log line of each stage and of each evaluation."""
    last = {}
    for line in log_history:
        if "distillation_loss" in line:
            last[f"Training, stage {line['stage']}"] = "", line
    for line in log_history:
        for key in line:
            if match := re.fullmatch("(eval_(.+_)?)distillation_loss", key):
                name = (match[2] or "").removesuffix("_")
                last["Held-out data" + (f", `{code_text(name)}`" if name else "")] = match[1], line
    return [
        (what, line["step"], [f"{line[prefix + name]:.4f}" if prefix + name in line else "–" for name in names])
        for what, (prefix, line) in last.items()
    ]


def _curve(log_history: list[dict]) -> list[tuple[int, float, float]]:
    """Some of the log lines of sparsity, evenly spaced, including the first and the last."""
    lines = [(line["step"], line["sparsity"], line["target_sparsity"]) for line in log_history if "sparsity" in line]
    if len(lines) <= CURVE_ROWS:
        return lines
    return [lines[round(row * (len(lines) - 1) / (CURVE_ROWS - 1))] for row in range(CURVE_ROWS)]
