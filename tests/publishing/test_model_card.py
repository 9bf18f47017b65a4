import dataclasses
import re
import socket
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_teacher
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from test_skill_trainer import Kill, KillAt, make_trainer
from transformers import Wav2Vec2FeatureExtractor

import skill_hf
from skill_hf import SkillConfig
from skill_hf.compression.macs import count_macs
from skill_hf.compression.pruning import fit_gates
from skill_hf.grouping.clustering import layer_tree
from skill_hf.models.families import build_student
from skill_hf.publishing import model_card, teacher_metadata
from skill_hf.publishing.model_card import (
    FIGURES,
    TASKS,
    DatasetContent,
    StudentContent,
    TrainingContent,
    card_data,
    student_card,
    write_model_card,
)
from skill_hf.publishing.run_record import RunRecord
from skill_hf.publishing.run_report import RunReport
from skill_hf.publishing.teacher_metadata import teacher_license
from skill_hf.recipe.schedule import StageSteps


STAGE_1 = {"stage": 1, "step": 20, "distillation_loss": -0.25, "l1_loss": 0.5, "l2_loss": 7.0, "cosine_loss": -0.75}
STAGE_1 |= {"sparsity": 0.125, "target_sparsity": 0.5}
STAGE_2 = STAGE_1 | {"stage": 2, "step": 30, "distillation_loss": -0.5, "cosine_loss": -0.8125, "sparsity": 0.5}
HELD_OUT = {"step": 25, "eval_distillation_loss": -0.375, "eval_l1_loss": 0.125}
SIMILARITY = 1 - np.abs(np.subtract.outer([0, 1, 5, 7], [0, 1, 5, 7])) / 10
TAGS = ["skill-hf", "skill", "distillation", "structured-pruning", "speech"]
HEADS = {
    "WavLMForSkillStudent": "AutoModel",
    "WavLMSkillStudentForCTC": "AutoModelForCTC",
    "WavLMSkillStudentForSequenceClassification": "AutoModelForAudioClassification",
    "WavLMSkillStudentForAudioFrameClassification": "AutoModelForAudioFrameClassification",
    "WavLMSkillStudentForXVector": "AutoModelForAudioXVector",
}
# What a name must not do to Python, YAML, Markdown or the template.
HOSTILE = [
    'x"; import os; os.mkdir("owned")  #',
    "'+__import__('os').mkdir('owned')+'",
    "back`tick ```\n# Heading",
    "new\nline\n---\nlicense: evil\n---",
    "{{ 7 * 7 }} {% raw %} | cell |",
    "back\\slash é 😀",
]


def make_student(teacher):
    student = build_student(teacher)
    student.add_gates()
    student.eval()
    fit_gates(student, student.num_parameters() // 2)
    student.prune()
    return student


def with_head(class_name: str, student):
    torch.manual_seed(0)
    return getattr(skill_hf, class_name)(student.config).eval()


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher("base", num_attention_heads=2)


@pytest.fixture(scope="module")
def student(teacher):
    return make_student(teacher)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    teacher_metadata._card_on_hub.cache_clear()


@pytest.fixture
def figures():
    """For tests with figures; the others go without matplotlib, which is faster."""
    return pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def without_matplotlib(request, monkeypatch):
    if "figures" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def report(teacher, student):
    """Of a finished run."""
    return RunReport(
        student=student,
        teacher=teacher,
        teacher_name="microsoft/wavlm-base-plus",
        skill_config=SkillConfig(target_sparsity=0.5),
        record=RunRecord(
            silhouettes={2: 0.481, 3: 0.47},
            half_groups=[[[0, 1], [2, 3]], [[0], [1, 2, 3]]],
            cut={"left": 30_000, "wanted": 20_000, "shift": -4.4},
            measured_on="32 held-out clips",
            losses={"after_cut": {"distillation_loss": -0.5, "cosine_similarity": 0.75}},
            layer_distances={"cka": [0.0, 0.1, 0.2, 0.1], "cosine": [0.0] * 4},
        ),
        layer_groups=[[0, 1], [2, 3]],
        layer_similarity=SIMILARITY,
        layer_tree=layer_tree(SIMILARITY, SkillConfig()),
        steps=StageSteps(joint=2000, final=1000, sparsity_warmup=5, final_warmup=5),
        num_steps_done=3000,
        log_history=[
            STAGE_1 | {"step": 10, "distillation_loss": 99.0, "sparsity": 0.0625},
            STAGE_1,
            HELD_OUT | {"eval_distillation_loss": 99.0},
            STAGE_2,
            HELD_OUT,
            {"step": 30, "train_loss": 98.0},
        ],
        learning_rates=(3e-4, 1e-4),
        clips_per_step=6,
        seed=11,
        train_dataset=[{}] * 1234,
    )


def test_the_card_tells_how_clear_the_groups_are_and_what_the_cut_did(tmp_path, report, figures):
    text = written(tmp_path, report)
    assert "Mean silhouette of each number of groups (larger means clearer groups): 2: 0.481, 3: 0.470." in text
    assert "the two halves of the calibration set give [[0, 1], [2, 3]] and [[0], [1, 2, 3]]." in text
    assert "the gates left 30,000 parameters; the target was 20,000. The units to cut were chosen" in text
    assert "20,000. The units to cut were chosen with a shift of all gates by -4.400." in text
    assert "| Measured on 32 held-out clips | Distillation loss | Cosine similarity to the teacher |" in text
    assert "| After the cut | -0.5000 | 0.7500 |" in text
    assert "](layer_distances.png)" in text
    report.record.half_groups = [report.layer_groups] * 2
    report.record.cut["shift"] = 0.0
    text = written(tmp_path, report)
    assert "Both halves of the calibration set give the same groups." in text
    assert "The cut needed no shift of the gates." in text


def written(directory, report) -> str:
    write_model_card(directory, report)
    return (directory / "README.md").read_text(encoding="utf-8")


def saved(directory, report) -> Path:
    report.student.save_pretrained(directory)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(directory)
    return directory


def code(card: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", card, re.DOTALL)


def rows_below(card: str, *headings: str) -> list[list[str]]:
    """Cells of the table with these headings."""
    _, _, rest = card.partition(f"| {' | '.join(headings)} |\n".replace("|  |", "| |"))
    assert rest, f"no table of {headings}"
    table = rest.partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def images(card: str) -> list[str]:
    return re.findall(r"!\[.*\]\((.*)\)", card)


# ------------------------------------------------------------------------------------------------------------ metadata
def test_metadata(tmp_path, report):
    assert ModelCard(written(tmp_path, report)).data.to_dict() == {
        "base_model": "microsoft/wavlm-base-plus",
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": TAGS,
    }


@pytest.mark.parametrize(
    ("class_name", "task"),
    [
        ("WavLMForSkillStudent", "feature-extraction"),
        ("WavLMSkillStudentForCTC", "automatic-speech-recognition"),
        ("WavLMSkillStudentForSequenceClassification", "audio-classification"),
        ("WavLMSkillStudentForAudioFrameClassification", "voice-activity-detection"),
        ("WavLMSkillStudentForXVector", "feature-extraction"),
    ],
)
def test_task_and_tags_follow_from_the_class(student, class_name, task):
    data = card_data(with_head(class_name, student))
    assert data.pipeline_tag == task
    assert data.tags == TAGS
    assert data.library_name == "transformers"


def test_metadata_from_arguments_and_from_the_config(tmp_path, student, monkeypatch):
    monkeypatch.setattr(student.config, "base_model", "someone/teacher", raising=False)
    assert card_data(student).base_model == "someone/teacher"
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    data = card_data(student, "other/teacher", datasets=["b/x", "a/y", "b/x"])
    assert (data.base_model, data.datasets, data.license) == ("other/teacher", ["a/y", "b/x"], None)
    data = card_data(student, tmp_path)
    assert (data.base_model, data.datasets, data.license) == ("someone/teacher", None, "mit")
    for name in [*HOSTILE, str(tmp_path), "../x", ""]:
        monkeypatch.setattr(student.config, "base_model", name)
        assert "base_model" not in card_data(student, name).to_dict()


def test_tags_of_the_user_are_kept(student, monkeypatch):
    monkeypatch.setattr(student, "model_tags", [*TAGS, "mine"])
    assert card_data(student).tags == [*TAGS, "mine"]


def test_a_class_of_the_user_is_loaded_as_what_it_derives_from(student):
    class Mine(skill_hf.WavLMForSkillStudent):
        pass

    card = student_card(Mine(student.config))
    assert "from skill_hf import WavLMForSkillStudent\n" in card.text and "Mine" not in card.text


def test_only_students_have_a_card(teacher):
    with pytest.raises(ValueError, match="for students, but the model is a WavLMModel"):
        card_data(teacher)


# ------------------------------------------------------------------------------------------------ licence of a teacher
@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (b"---\nlicense: cc-by-sa-3.0\ntags: [x]\n---\n# Teacher", "cc-by-sa-3.0"),
        (b"---\r\nlicense: mit\r\n---\r\n", "mit"),
        (b"---\ntags: [x]\n---\n# Teacher", None),
        (b"---\nlicense: [mit, gpl]\n---\n", None),
        (b"---\nlicense:\n---\n", None),
        (b"---\nlicense: 1.0\n---\n", None),
        (b"---\nmodel-index: nonsense\nlicense: mit\n---\n", "mit"),
        (b"---\nlicense: {{{\n---\n", None),
        (b"---\n- license\n---\n", None),
        (b"---\nself: 1\nlicense: mit\n---\n", None),
        (b"---\n1: 2\nlicense: mit\n---\n", None),
        (b"# Teacher\n\nlicense: mit", None),
        (b"\xff\xfe\x00---", None),
        (b"", None),
    ],
)
def test_licence_in_a_directory(tmp_path, card, licence):
    (tmp_path / "README.md").write_bytes(card)
    assert teacher_license(tmp_path) == licence
    assert teacher_license(str(tmp_path)) == licence


def test_a_teacher_without_a_card_has_no_licence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")  # that of another, in the working directory
    for name in (None, "", tmp_path / "none", "none", "some/teacher", *HOSTILE):
        assert teacher_license(name) is None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine, with a card that names a licence, and without."""
    with HubServer(tmp_path / "hub", users={}).running() as server:
        server.create("some/teacher")
        server.commit("some/teacher", "main", {"README.md": b"---\nlicense: cc-by-4.0\n---\n"})
        server.create("some/other")
        url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", url, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def test_licence_on_the_hub_is_asked_for_once(hub, tmp_path, report):
    report.teacher_name = "some/teacher"
    for _ in range(2):
        assert ModelCard(written(tmp_path, report)).data.license == "cc-by-4.0"
    assert len(hub.requests) == 1


@pytest.mark.parametrize("name", ["some/other", "some/missing"])
def test_no_licence_on_the_hub(hub, tmp_path, report, name):
    report.teacher_name = name
    assert "license" not in ModelCard(written(tmp_path, report)).data.to_dict()
    assert hub.requests


def test_the_hub_is_not_asked_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert teacher_license("some/teacher") is None
    assert not hub.requests


def test_a_hub_that_does_not_answer_does_not_hold_up_the_card(hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/{{repo_id}}/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", url, raising=False)
        monkeypatch.setattr(teacher_metadata, "HUB_TIMEOUT", 0.2)
        start = time.monotonic()
        assert teacher_license("some/teacher") is None
        assert time.monotonic() - start < 5
    assert teacher_license("another/teacher") is None  # nobody listens


# ------------------------------------------------------------------------------------------------- what the card tells
def test_card_tells_what_the_student_is(tmp_path, report, teacher, student):
    card = written(tmp_path, report)
    before, after = teacher.num_parameters(), student.num_parameters()
    assert f"| Parameters | {before:,} | {after:,} | {100 * after / before:.1f} % |" in card
    assert f"the share of the teacher's parameters that was removed: {1 - after / before:.4f} (target: 0.5)" in card
    macs = [round(count_macs(model, seconds=10.0) / 1e6) for model in (teacher, student)]
    assert macs[1] < macs[0]
    share = 100 * macs[1] / macs[0]
    assert f"| Million multiply-accumulates | {macs[0]:,} | {macs[1]:,} | {share:.1f} % |" in card
    assert "for one clip of 10.0 seconds" in card
    heads = [len(left) for left in student.config.remaining_heads]
    units = student.config.intermediate_sizes
    assert heads != [2, 2, 2] or units != [48, 48, 48]
    rows = [[str(layer + 1), f"{heads[layer]} of 2", f"{units[layer]} of 48"] for layer in range(3)]
    assert rows_below(card, "Layer", "Attention heads", "Feed-forward units") == rows
    rows = [[str(index), f"{channels} of 16"] for index, channels in enumerate(student.config.conv_dim, start=1)]
    assert rows_below(card, "Convolution", "Channels") == rows
    assert f"| Attention heads | 6 | {sum(heads)} |" in card
    assert f"| Feed-forward units | 144 | {sum(units)} |" in card
    assert f"| Channels of the convolutions | 112 | {sum(student.config.conv_dim)} |" in card


def test_card_tells_which_budget_the_target_is_of(tmp_path, report, teacher, student):
    report.skill_config = SkillConfig(target_sparsity=0.5, budget="macs", budget_seconds=2.5)
    card = written(tmp_path, report)
    removed = 1 - count_macs(student, 2.5) / count_macs(teacher, 2.5)
    assert "the teacher's multiply-accumulates for 2.5 seconds of audio that was removed: " in card
    assert f"was removed: {removed:.4f} (target: 0.5)" in card
    assert '| `budget` | `"macs"` |' in card


def test_a_teacher_that_is_a_student_is_compared_layer_by_layer(tmp_path, report, student):
    report.teacher, report.student = student, make_student(student)
    card = written(tmp_path, report)
    pairs = zip(report.student.config.intermediate_sizes, student.config.intermediate_sizes, strict=True)
    rows = rows_below(card, "Layer", "Attention heads", "Feed-forward units")
    assert [row[2] for row in rows] == [f"{left} of {all}" for left, all in pairs]


def test_card_tells_how_it_was_trained(tmp_path, report):
    card = written(tmp_path, report)
    assert "| 1: distil and prune | 2,000 | 0.0003 |" in card
    assert "| 2: distil after the cut | 1,000 | 0.0001 |" in card
    assert "Clips per step: 6; precision: float32; seed: 11; peak learning rate of the gates: 0.024." in card
    report.clips_per_step, report.seconds_per_step = None, 640.0
    assert "\nSeconds of audio per step, at most: 640; precision: float32;" in written(tmp_path, report)
    assert rows_below(card, "Loss", "Step", "Distillation loss", "L1", "− cosine similarity") == [
        ["Training, stage 1", "20", "-0.2500", "0.5000", "-0.7500"],
        ["Training, stage 2", "30", "-0.5000", "0.5000", "-0.8125"],
        ["Held-out data", "25", "-0.3750", "0.1250", "–"],
    ]
    assert f"skill-hf {skill_hf.__version__}, " in card
    assert f"torch {torch.__version__}" in card
    for identifier in ("arXiv:2402.16830", "arXiv:2305.17651", "@software{skill_hf,"):
        assert identifier in card


def test_each_of_several_evaluation_sets_has_its_row(tmp_path, report):
    report.eval_dataset = {"clean": [{}] * 5, "other|`": [{}] * 7}
    report.log_history += [
        {"step": 30, "eval_clean_distillation_loss": -0.75, "eval_clean_l1_loss": 0.5},
        {"step": 30, "eval_other|`_distillation_loss": -0.5},
    ]
    card = written(tmp_path, report)
    rows = rows_below(card, "Loss", "Step", "Distillation loss", "L1", "− cosine similarity")
    assert rows[-2:] == [
        ["Held-out data, `clean`", "30", "-0.7500", "0.5000", "–"],
        ["Held-out data, `other`", "30", "-0.5000", "–", "–"],
    ]
    assert [row[0] for row in rows_below(card, "", "Dataset", "Clips", "Hours")] == [
        "Training",
        "Held out clean",
        "Held out other",
    ]


def test_only_fields_of_the_recipe_that_differ_are_listed(tmp_path, report):
    assert re.findall(r"^\| `(\w+)` \| `(.*)` \|$", written(tmp_path, report), re.M) == [("target_sparsity", "0.5")]
    report.skill_config = SkillConfig()
    assert "The recipe is skill-hf's default;" in written(tmp_path, report)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "`cka` similarity, `average` linkage, the tree cut where the mean silhouette is largest."),
        (
            {"similarity": "cosine", "linkage": "ward", "num_clusters": 2, "contiguous": True},
            "`cosine` similarity, neighbouring groups only, `ward` linkage, the tree cut into 2 groups.",
        ),
        ({"distance_threshold": 0.3}, "the tree cut at a distance of 0.3."),
        ({"layer_groups": [[0, 1], [2, 3]]}, "The groups were set by hand."),
        ({}, "For each group, the student was trained to match the teacher's mean over the group's hidden states."),
        ({"use_projections": True}, "through a linear map, learned to predict the teacher's. These maps were removed"),
        ({"student_layers": "last"}, "The student's last hidden state, through one linear map for each group,"),
        (
            {"calibration_samples": 3000},
            "measured on up to 3,000 clips of the training data, cropped to 10.0 seconds.",
        ),
    ],
)
def test_card_tells_where_the_groups_come_from(tmp_path, report, fields, sentence):
    report.skill_config = SkillConfig(**fields)
    card = written(tmp_path, report)
    assert sentence in card
    assert rows_below(card, "Group", "Hidden states") == [["1", "0, 1"], ["2", "2, 3"]]
    assert "was not included" not in card


def test_card_before_training(tmp_path, report):
    report.steps = report.layer_groups = report.layer_similarity = report.train_dataset = None
    report.layer_tree = None
    report.num_steps_done, report.log_history = 0, []
    card = written(tmp_path, report)
    assert "It has not been trained yet." in card
    for heading in ("Groups of layers", "## Data", "| Loss |", "| Sparsity |"):
        assert heading not in card
    assert "None" not in card


def test_stopped_training_is_admitted(tmp_path, report):
    assert "stopped" not in written(tmp_path, report)
    report.num_steps_done = 2500
    assert "Training was stopped at step 2,500 of 3,000." in written(tmp_path, report)


def test_a_student_with_gates_has_no_card(tmp_path, report, teacher):
    report.student = build_student(teacher)
    report.student.add_gates()
    with pytest.raises(ValueError, match="still has its gates"):
        write_model_card(tmp_path, report)


# ---------------------------------------------------------------------------------------------------------------- data
class Features(torch.utils.data.Dataset):
    """A dataset of one's own, whose attributes mean what they mean to its author."""

    def __init__(self):
        self.features, self.info, self.split = torch.zeros(3, 2), "spoken", [1, 2]

    def __len__(self):
        return 7


def test_datasets_that_are_not_of_datasets_and_lengths_that_are_not_known(tmp_path, report):
    report.train_dataset = Features()
    assert "| Training | not named | 7 | – |" in written(tmp_path, report)
    report.train_dataset = datasets.Dataset.from_dict({"audio": ["a"] * 2, "length": [1.0, None]})
    assert "| Training | not named | 2 | – |" in written(tmp_path, report)


def test_data_without_a_name(tmp_path, report):
    report.train_dataset = datasets.Dataset.from_dict({"audio": ["/secret/a.wav"] * 3, "length": [1800.0, 900, 2700]})
    report.eval_dataset = iter([])
    rows = rows_below(written(tmp_path, report), "", "Dataset", "Clips", "Hours")
    assert rows == [["Training", "not named", "3", "1.50"], ["Held out", "not named", "–", "–"]]


@pytest.mark.parametrize("streaming", [False, True])
def test_data_of_a_local_directory_goes_by_its_name(tmp_path, report, streaming):
    corpus = tmp_path / "secret" / "my|corpus"
    corpus.mkdir(parents=True)
    (corpus / "train.csv").write_text("length\n16000\n32000\n")  # whole numbers: no seconds
    report.train_dataset = datasets.load_dataset(
        str(corpus), split="train", streaming=streaming, cache_dir=str(tmp_path / "cache")
    )
    card = written(tmp_path, report)
    number = "–" if streaming else "2"
    assert rows_below(card, "", "Dataset", "Clips", "Hours") == [["Training", "`my corpus, train`", number, "–"]]
    assert "secret" not in card and "datasets" not in ModelCard(card).data.to_dict()


def test_how_it_was_read_is_no_name(tmp_path, report):
    report.train_dataset = datasets.Dataset.from_generator(
        lambda: iter([{"x": 1}]), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert report.train_dataset.info.dataset_name == "generator"
    assert rows_below(written(tmp_path, report), "", "Dataset", "Clips", "Hours")[0][1] == "not named"


def test_data_of_the_hub_is_linked(tmp_path, report):
    info = datasets.DatasetInfo(dataset_name="openslr/librispeech_asr", config_name="all", builder_name="parquet")
    report.train_dataset = datasets.Dataset.from_dict({"x": [0]}, info=info, split="train.clean.100")
    report.eval_dataset = report.train_dataset
    card = written(tmp_path, report)
    link = "[`openslr/librispeech_asr, all, train.clean.100`](https://huggingface.co/datasets/openslr/librispeech_asr)"
    assert [row[1] for row in rows_below(card, "", "Dataset", "Clips", "Hours")] == [link, link]
    assert ModelCard(card).data.datasets == ["openslr/librispeech_asr"]


# ------------------------------------------------------------------------------------------------- figures and tables
def test_figures_are_drawn_and_shown(tmp_path, report, figures):
    card = written(tmp_path, report)
    assert sorted(images(card)) == sorted(FIGURES) == sorted(path.name for path in tmp_path.glob("*.png"))
    for name in FIGURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "Joined with" not in card and "| Sparsity |" not in card


def test_figures_of_an_earlier_run_are_not_left(tmp_path, report, figures):
    report.layer_similarity = None
    report.layer_tree = None
    report.log_history = []
    report.record = RunRecord()
    for name in FIGURES:
        (tmp_path / name).write_text("of an earlier run")
    assert images(written(tmp_path, report)) == ["architecture.png"] == [path.name for path in tmp_path.glob("*.png")]
    assert (tmp_path / "architecture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("include_embeddings", [True, False])
def test_without_matplotlib_there_are_tables(tmp_path, report, include_embeddings):
    (tmp_path / "architecture.png").write_text("of an earlier run")
    report.skill_config = SkillConfig(include_embeddings=include_embeddings)
    first = 0 if include_embeddings else 1
    card = written(tmp_path, report)
    assert not images(card) and not list(tmp_path.glob("*.png"))
    # Layers at 0, 1, 5 and 7 on a line, 10 units long: average linkage.
    a, b, c, d = range(first, first + 4)
    assert rows_below(card, "Hidden states", "Joined with", "Distance") == [
        [f"{a}", f"{b}", "0.1000"],
        [f"{c}", f"{d}", "0.2000"],
        [f"{a}, {b}", f"{c}, {d}", "0.5500"],
    ]
    assert ("Hidden state 0 was not included." in card) == (not include_embeddings)
    assert rows_below(card, "Step", "Sparsity", "Target") == [
        ["10", "0.0625", "0.5000"],
        ["20", "0.1250", "0.5000"],
        ["30", "0.5000", "0.5000"],
    ]


def test_a_long_curve_is_cut_to_some_rows(tmp_path, report):
    report.log_history = [STAGE_1 | {"step": step} for step in range(1, 1001)]
    rows = rows_below(written(tmp_path, report), "Step", "Sparsity", "Target")
    assert [row[0] for row in rows] == ["1", "144", "286", "429", "572", "715", "857", "1,000"]


# ------------------------------------------------------------------------------------------------------------ snippets
def test_snippet_is_run_and_its_output_shown(tmp_path, report, student, monkeypatch, capsys):
    first, second = code(written(saved(tmp_path, report), report))
    (printed,) = code((tmp_path / "README.md").read_text(encoding="utf-8"), "text")
    assert capsys.readouterr().out == ""

    # A reader's way, from the directory of the card.
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(first, names)
    assert capsys.readouterr().out.strip() == printed
    hidden_states = names["hidden_states"]
    assert printed.startswith("4 torch.Size([1, 49, 32]) tensor([")
    shown = [float(number) for number in re.findall(r"-?\d+\.\d+", printed)]
    assert shown == pytest.approx(hidden_states[-1][0, 0, :3].tolist(), abs=1e-4)
    exec(second, names)
    with torch.no_grad():
        again = names["model"](**names["inputs"], output_hidden_states=True).hidden_states
    torch.testing.assert_close(again, hidden_states)


def test_running_the_snippet_changes_nothing_else(tmp_path, report, monkeypatch):
    def connect(*args):
        raise AssertionError("the network was used")

    report.student = make_student(report.teacher).train()
    saved(tmp_path, report)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    weights = {name: tensor.clone() for name, tensor in report.student.state_dict().items()}
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.random.get_rng_state(), np.random.get_state()[1], torch.get_num_threads(), torch.get_default_dtype()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", connect)
    report.teacher_name = None
    (printed,) = code(written(tmp_path, report), "text")
    after = torch.random.get_rng_state(), np.random.get_state()[1], torch.get_num_threads(), torch.get_default_dtype()
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    assert torch.is_grad_enabled() and report.student.training and printed
    for name, tensor in report.student.state_dict().items():
        assert torch.equal(tensor, weights[name])
    for path, content in files.items():
        assert path.read_bytes() == content


@pytest.mark.parametrize("layout_of_teacher", ["base", "large"])
def test_snippet_runs_on_a_bfloat16_student(tmp_path, report, layout_of_teacher):
    report.student = make_student(tiny_teacher(layout_of_teacher)).bfloat16()
    report.teacher = tiny_teacher(layout_of_teacher)
    (printed,) = code(written(saved(tmp_path, report), report), "text")
    assert "dtype=torch.bfloat16" in printed


def test_without_a_saved_student_nothing_is_printed(tmp_path, report):
    card = written(tmp_path, report)
    assert "It printed" not in card and not code(card, "text")


def test_snippet_that_fails_leaves_the_student_and_says_so(tmp_path, report):
    saved(tmp_path, report)
    (tmp_path / "preprocessor_config.json").unlink()
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    words = rf"The student was saved in `{re.escape(str(tmp_path))}`, but the code example .* no README.md was written"
    with pytest.raises(RuntimeError, match=f"{words}: OSErr") as error:
        write_model_card(tmp_path, report)
    assert isinstance(error.value.__cause__, OSError)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_snippets_name_the_repository_once_it_is_known(tmp_path, report):
    report.hub_model_id = "someone/student"
    first, second = code(written(saved(tmp_path, report), report))
    assert 'name = "someone/student"\n' in first
    assert '.from_pretrained("someone/student")' in second
    for snippet in (first, second):
        compile(snippet, "README.md", "exec")
    assert code((tmp_path / "README.md").read_text(encoding="utf-8"), "text")  # run on the directory


@pytest.mark.parametrize("class_name", HEADS)
def test_card_of_a_student_without_a_trainer(tmp_path, student, class_name, monkeypatch, capsys):
    model = with_head(class_name, student)
    card = str(student_card(model, "someone/student"))
    assert f"A speech model of {model.num_parameters():,} parameters, made with skill-hf" in card
    heads = [len(left) for left in model.config.remaining_heads]
    rows = [[str(i + 1), f"{heads[i]} of 2", f"{model.config.intermediate_sizes[i]} of 48"] for i in range(3)]
    assert rows_below(card, "Layer", "Attention heads", "Feed-forward units") == rows
    assert [row[1] for row in rows_below(card, "Convolution", "Channels")] == [*map(str, model.config.conv_dim)]
    assert f"{model.num_parameters():,} | {round(count_macs(model) / 1e6):,} |" in card
    for absent in ("None", "## Training", "## Groups", "Teacher", "!["):
        assert absent not in card
    assert "arXiv:2402.16830" in card

    model.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path)
    first, second = code(card)
    assert f"{HEADS[class_name]}.from_pretrained(name, trust_remote_code=True)" in first
    names = {}
    exec(first.replace('"someone/student"', repr(str(tmp_path))), names)
    assert type(names["model"]) is type(model)
    assert capsys.readouterr().out.strip()
    exec(second.replace('"someone/student"', repr(str(tmp_path))), names)
    assert type(names["model"]) is type(model)


def test_card_without_a_trainer_names_the_teacher(student, monkeypatch):
    monkeypatch.setattr(student.config, "base_model", "someone/teacher", raising=False)
    card = student_card(student)
    assert card.data.base_model == "someone/teacher"
    assert card.text.strip().startswith("# SKILL student of someone/teacher\n")
    assert "from the encoder of [someone/teacher](https://huggingface.co/someone/teacher), made" in card.text
    assert 'name = "."' in card.text


# ---------------------------------------------------------------------------------------------------------- robustness
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_but_text(tmp_path, report, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    plain = written(tmp_path, report)
    directory = saved(tmp_path / name.replace("/", ""), report)
    info = datasets.DatasetInfo(dataset_name=name, config_name=name, builder_name="parquet")
    report.train_dataset = datasets.Dataset.from_dict({"x": [0]}, info=info)
    report.eval_dataset = {name: report.train_dataset}
    report.log_history.append({"step": 30, f"eval_{name}_distillation_loss": 1.0})
    report.hub_model_id = report.teacher_name = name
    card = written(directory, report)

    assert not list(tmp_path.rglob("owned"))
    assert code(card, "text")  # the snippet ran, in this directory
    assert ModelCard(card).data.to_dict() == {
        key: value for key, value in ModelCard(plain).data.to_dict().items() if key != "base_model"
    }
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
    assert [line for line in card.splitlines() if line.startswith("#")][2:] == [
        line for line in plain.splitlines() if line.startswith("#")
    ][2:]
    assert "49" not in re.sub(r"torch.Size.*|\d[\d,.]+", "", card)
    assert code(card)[0].splitlines()[:4] == code(plain)[0].splitlines()[:4]
    assert 'name = "."' in code(card)[0]
    assert all(len(row) == 4 for row in rows_below(card, "", "Dataset", "Clips", "Hours"))
    assert all(
        len(row) == 5 for row in rows_below(card, "Loss", "Step", "Distillation loss", "L1", "− cosine similarity")
    )
    assert not re.search(r"(?<!`)`{2}(?!`)", card)

    card = student_card(report.student, name)
    assert 'name = "."' in card.text and card.data.library_name == "transformers"


def test_no_local_path_is_published(tmp_path, report, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("secret/teacher").mkdir(parents=True)
    for name in (
        str(tmp_path / "teacher"),
        "./teacher",
        "secret/teacher",
        "secret/teacher/",
        Path("teacher"),
        "",
        None,
    ):
        report.teacher_name = name
        card = written(tmp_path, report)
        assert "base_model" not in card
        assert "fewer than its teacher, a `wavlm` model. " in card
        assert "secret" not in card
        assert tmp_path.name not in card


@pytest.mark.parametrize("with_figures", [False, True])
def test_no_blank_is_left_and_no_paragraph_runs_into_another(tmp_path, report, monkeypatch, with_figures):
    if with_figures:
        monkeypatch.setattr(model_card, "save_figures", lambda *_: list(FIGURES))
    cards = [written(saved(tmp_path, report), report)]
    report.skill_config = SkillConfig(layer_groups=[[0], [3]], student_layers="last")
    report.layer_similarity = report.layer_tree = None
    cards += [written(tmp_path, report), student_card(report.student).content]
    for card in cards:
        text = re.sub(r"```.*?```", "", card, flags=re.DOTALL)
        assert not re.search(r"\{[{%#]|[}%#]\}", text)
        assert "None" not in text
        # A heading, an image or a table needs an empty line before it.
        assert not re.search(r"[^\n]\n(#|!\[)", text)
        assert not re.search(r"\n[^|\n][^\n]*\n\|", text)
        assert not re.search(r"\|\n[^|\n]", text)  # and a table one after it
        assert "\n\n\n\n" not in card and not re.search(r"^ ", text, re.M)


def test_every_field_has_its_place():
    template = model_card.TEMPLATE.read_text(encoding="utf-8")
    for prefix, content in (("", StudentContent), (r"training\.", TrainingContent), (r"dataset\.", DatasetContent)):
        for field in dataclasses.fields(content):
            assert re.search(rf"\b{prefix}{field.name}\b", template), field.name
    known = {
        f.name for content in (StudentContent, TrainingContent, DatasetContent) for f in dataclasses.fields(content)
    }
    for name in re.findall(r"\b(?:training|dataset)\.(?!png)(\w+)", template):
        assert name in known


def test_every_task_has_a_class():
    assert set(TASKS) == set(HEADS.values())


# ------------------------------------------------------------------------------------------------------ a real trainer
@pytest.mark.slow
@pytest.mark.parametrize("step", [4, pytest.param(8, marks=pytest.mark.nightly)], ids=["stage 1", "stage 2"])
def test_resumed_run_has_the_card_of_an_uninterrupted_one(tmp_path, clips, figures, step):
    whole = make_trainer(tmp_path / "whole", clips, eval_strategy="steps", eval_steps=3)
    whole.train()
    whole.save_model()
    killed = make_trainer(
        tmp_path / "killed", clips, eval_strategy="steps", eval_steps=3, callbacks=[KillAt(step + 1)]
    )
    with pytest.raises(Kill):
        killed.train()
    resumed = make_trainer(tmp_path / "killed", clips, eval_strategy="steps", eval_steps=3)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    for name in ("README.md", *FIGURES):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list(tmp_path.glob("*/checkpoint-*/*.png")) and not list(tmp_path.glob("*/checkpoint-*/README.md"))
