import sys

import numpy as np
import pytest
from conftest import tiny_config

from skill_hf import SkillConfig, WavLMSkillStudentConfig
from skill_hf.grouping.clustering import cluster_layers, layer_tree
from skill_hf.publishing.plots import (
    COLOURS,
    DARK,
    plot_architecture,
    plot_cross_similarity,
    plot_groups,
    plot_layer_distances,
    plot_layer_similarity,
    plot_similarity_difference,
    plot_training,
)


pytest.importorskip("matplotlib")

GROUPS = [[[1, 2, 3]], [[1, 3], [2]], [[1], [2], [3]]]
DRAWN = {
    "cross similarity": lambda: plot_cross_similarity(np.eye(3, 4)),
    "difference": lambda: plot_similarity_difference(np.eye(3) - 0.5, ("a", "b")),
    "groups": lambda: plot_groups(GROUPS, [None, 0.5, None], [1.0, 0.2, 1.0], chosen=2),
    "similarity": lambda: plot_layer_similarity(*similar_layers([0, 1, 5, 6]), [[0, 1], [2, 3]]),
    "architecture": lambda: plot_architecture(student_config(), tiny_config()),
    "distances": lambda: plot_layer_distances({"groups": np.arange(4.0)}),
    "training": lambda: plot_training([{"step": step, "distillation_loss": 1.0, "sparsity": 0.5} for step in (1, 2)]),
}


def student_config(**kwargs) -> WavLMSkillStudentConfig:
    fields = tiny_config().to_diff_dict()
    del fields["model_type"]
    return WavLMSkillStudentConfig(**fields | kwargs)


def similar_layers(places: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Similarity and tree of layers at `places` on a line: the nearer, the more alike."""
    similarity = np.exp(-np.abs(np.subtract.outer(places, places)) / 10)
    return similarity, layer_tree(similarity, SkillConfig())


def texts(artists) -> list[str]:
    return [artist.get_text() for artist in artists]


@pytest.mark.parametrize("name", DRAWN)
def test_figure_is_as_wide_as_a_readme_and_needs_no_pyplot(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    path = tmp_path / "figure.png"
    DRAWN[name]().savefig(path)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") == 1200


@pytest.mark.parametrize("name", DRAWN)
def test_missing_matplotlib_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install skill-hf\[plots\]"):
        DRAWN[name]()


def test_similarity_keeps_groups_together_and_names_them():
    # Layer 4 is like layers 0 and 1.
    similarity, tree = similar_layers([0, 1, 10, 11, 2, 30])
    groups = cluster_layers(similarity, SkillConfig(num_clusters=3))
    assert groups == [[0, 1, 4], [2, 3], [5]]
    tree_axes, axes, bar = plot_layer_similarity(similarity, tree, groups).axes

    order = [0, 1, 4, 2, 3, 5]
    colours = [COLOURS[group] for group in (0, 0, 0, 1, 1, 2)]
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), similarity[np.ix_(order, order)])
    assert image.get_clim() == (similarity.min(), 1)
    assert axes.figure.get_suptitle() == "Groups of hidden states: {0–1, 4}, {2–3}, {5}"
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert texts(labels) == [str(row) for row in order]
        assert [label.get_color() for label in labels] == colours
    # Each group's frame is as large as the group.
    frames = [(line.get_color(), line.get_xdata().min(), line.get_ydata().max()) for line in axes.lines]
    assert frames == [(COLOURS[0], -0.5, 2.5), (COLOURS[1], 2.5, 4.5), (COLOURS[2], 4.5, 5.5)]
    assert texts(axes.texts)[:3] == ["1.00", "0.90", "0.82"]


def test_labels_of_small_distances_do_not_run_into_each_other():
    similarity, tree = similar_layers([0, 0.01, 0.02, 0.08, 0.12])
    figure = plot_layer_similarity(similarity, tree, [[0, 1, 2], [3, 4]])
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels() if label.get_text()]
    boxes = sorted(boxes, key=lambda box: box.x0)
    assert len(boxes) > 1
    for left, right in zip(boxes, boxes[1:], strict=False):
        assert left.x1 + 5 < right.x0


def test_dendrogram_meets_the_rows_of_the_matrix():
    similarity, tree = similar_layers([0, 1, 10, 11, 2, 30])
    tree_axes, axes, _ = plot_layer_similarity(similarity, tree, [[0, 1, 4], [2, 3], [5]]).axes
    assert tree_axes.get_ylim() == axes.get_ylim() == (5.5, -0.5)
    ends = {}
    for line in tree_axes.lines:
        x, y = line.get_xydata()[[0, 3]].T
        ends |= {row: line.get_color() for row in y[x == 0]}
    # A leaf has the colour of its group, but for the one whose only link leads out of it.
    assert ends == dict.fromkeys((0, 1, 2), COLOURS[0]) | dict.fromkeys((3, 4), COLOURS[1]) | {5: DARK}
    assert sorted(line.get_xdata().max() for line in tree_axes.lines) == pytest.approx(sorted(tree[:, 2]))


def test_groups_set_by_hand_need_not_follow_the_tree():
    similarity, tree = similar_layers(np.arange(1.0, 5.0))
    tree_axes, axes, _ = plot_layer_similarity(similarity, tree, [[0], [1, 3], [4]], first_layer=1).axes
    assert texts(axes.get_xticklabels()) == ["1", "2", "3", "4"]
    assert [label.get_color() for label in axes.get_xticklabels()] == [COLOURS[1], DARK, COLOURS[1], COLOURS[2]]
    frames = [(line.get_color(), line.get_xdata().min()) for line in axes.lines]
    assert frames == [(COLOURS[1], -0.5), (COLOURS[1], 1.5), (COLOURS[2], 2.5)]


def test_numbers_that_are_close_have_more_digits():
    similarity, tree = similar_layers([0, 0.01, 0.02])
    assert texts(plot_layer_similarity(similarity, tree, [[0, 1, 2]]).axes[1].texts)[:3] == ["1.000", "0.999", "0.998"]


def test_large_matrix_has_no_numbers():
    similarity, tree = similar_layers(np.arange(15.0))
    assert not plot_layer_similarity(similarity, tree, [list(range(15))]).axes[1].texts


def test_cross_similarity_marks_the_most_similar_layer():
    matrix = np.array([[0.9, 0.1, 0.2], [0.3, 0.2, 0.8]])
    axes, bar = plot_cross_similarity(matrix, ("wavlm", "hubert"), first_layer=1).axes
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), matrix)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("hidden state of hubert", "hidden state of wavlm")
    assert texts(axes.get_xticklabels()) == ["1", "2", "3"] and texts(axes.get_yticklabels()) == ["1", "2"]
    assert [(line.get_xdata().mean().round(), line.get_ydata().min()) for line in axes.lines] == [(0, -0.5), (2, 0.5)]
    assert texts(axes.texts) == ["0.90", "0.10", "0.20", "0.30", "0.20", "0.80"]
    assert bar.get_ylabel() == "similarity"
    assert "(0: input of the first layer)" in plot_cross_similarity(np.ones((2, 2))).axes[0].get_xlabel()


def test_difference_is_centred_on_zero():
    matrix = np.array([[0.0, -0.04], [-0.04, 0.0], [0.02, 0.01]])
    axes = plot_similarity_difference(matrix, ("english", "dutch"), ("a", "b")).axes[0]
    assert axes.images[0].get_clim() == (-0.04, 0.04)
    assert texts(axes.texts) == ["+0.000", "-0.040", "-0.040", "+0.000", "+0.020", "+0.010"]
    assert axes.figure.get_suptitle() == "Similarity of layers on english minus that on dutch"
    assert axes.get_ylabel() == "hidden state of a"
    assert plot_similarity_difference(np.zeros((2, 2)), ("a", "b")).axes[0].get_ylabel() == "hidden state"


def test_groups_keep_their_letter_when_others_split():
    axes, curves = plot_groups(GROUPS, [None, 0.5, None], [1.0, 0.2, 1.0], chosen=2).axes
    letters = {(text.get_position()[::-1]): text.get_text() for text in axes.texts}
    assert ["".join(letters[row, column] for column in range(3)) for row in range(3)] == ["AAA", "ABA", "ABC"]
    assert texts(axes.get_xticklabels()) == ["1", "2", "3"] and texts(axes.get_yticklabels()) == ["1", "2", "3"]
    bold = {text.get_position()[1] for text in axes.texts if text.get_fontweight() == "bold"}
    assert bold == {1}
    cells = axes.images[0].get_array()
    assert (cells[1, 0] == cells[2, 0]).all() and (cells[2, 2] != cells[2, 0]).any()
    lines = {line.get_label(): line.get_xydata().tolist() for line in curves.lines}
    assert lines["silhouette"] == [[0.5, 1]] and lines["stability"] == [[1, 0], [0.2, 1], [1, 2]]
    many = [[list(range(30))], [[layer] for layer in range(30)]]
    assert texts(plot_groups(many, [None] * 2, [None] * 2).axes[0].texts)[-1] == "AD"


def test_tree_of_another_matrix_is_an_error():
    similarity, tree = similar_layers([0, 1, 2, 3])
    with pytest.raises(ValueError, match="`tree` joins 4 layers, but `similarity` has 3 rows"):
        plot_layer_similarity(similarity[:3, :3], tree, [[0, 1, 2]])


def test_architecture_shows_what_is_left_before_the_teacher():
    teacher = tiny_config(conv_dim=(16, 16, 16, 16, 16, 16, 12))
    student = student_config(
        conv_dim=[1, 2, 3, 4, 5, 6, 7],
        remaining_heads=[[0, 3], [], [1]],
        intermediate_sizes=[48, 0, 7],
    )
    conv, grid, heads, units = plot_architecture(student, teacher).axes

    def heights(axes):
        return [[bar.get_height() for bar in container] for container in axes.containers]

    assert heights(conv) == [[16] * 6 + [12], [1, 2, 3, 4, 5, 6, 7]]
    assert heights(heads) == [[4, 4, 4], [2, 0, 1]]
    assert heights(units) == [[48, 48, 48], [48, 0, 7]]
    assert texts(units.texts) == ["48", "0", "7"]
    left = grid.collections[0].get_array()
    assert left.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]


def test_architecture_of_a_students_student():
    teacher = student_config(remaining_heads=[[1, 2], [0], []], intermediate_sizes=[9, 8, 0])
    student = student_config(remaining_heads=[[2], [], []], intermediate_sizes=[5, 8, 0])
    _, grid, heads, units = plot_architecture(student, teacher).axes
    assert [bar.get_height() for bar in heads.containers[0]] == [2, 1, 0]
    assert [bar.get_height() for bar in units.containers[0]] == [9, 8, 0]
    # What the teacher lacks itself is blank.
    assert grid.collections[0].get_array().filled(9).tolist() == [[9, 0, 9], [0, 9, 9], [1, 9, 9], [9, 9, 9]]


def test_distances_mark_the_distilled_layers():
    distances = {"SKILL": np.array([1.0, 2, 3, 4]), "DPHuBERT": np.array([1.0, 5, 5, 1])}
    groups = {"SKILL": [[0, 2], [1, 3]], "DPHuBERT": [[0], [3]]}
    (axes,) = plot_layer_distances(distances, "mean absolute error", groups).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["SKILL"].get_markevery() == [0, 1, 2, 3]
    assert lines["DPHuBERT"].get_markevery() == [0, 3]
    np.testing.assert_array_equal(lines["DPHuBERT"].get_ydata(), [1, 5, 5, 1])
    hollow = axes.lines[3]
    assert hollow.get_markerfacecolor() == "white"
    assert hollow.get_xydata().tolist() == [[1, 5], [2, 5]]
    assert texts(axes.texts) == ["SKILL", "A", "A", "B", "B", "DPHuBERT", "A", "B"]
    assert [text.xy[0] for text in axes.texts[1:5]] == [0, 2, 1, 3]
    assert axes.get_ylabel() == "mean absolute error"
    assert axes.get_ylim()[0] == 0


def test_distances_without_groups_mark_every_layer():
    (axes,) = plot_layer_distances({"SKILL": [1.0, 2.0]}).axes
    assert axes.lines[0].get_markevery() == [0, 1]
    assert not axes.texts
    assert not axes.get_title()


def test_training_shows_both_stages():
    def line(step, stage):
        return {
            "step": step,
            "stage": stage,
            "distillation_loss": -step,
            "l1_loss": 1,
            "l2_loss": 3,
            "sparsity": 0.5 / stage,
        }

    log = [line(10, 1), {"step": 15, "eval_distillation_loss": -9}, line(20, 1), line(30, 2), {"step": 30, "loss": 1}]
    terms, penalty, sparsity = plot_training(log).axes
    curves = {curve.get_label(): curve.get_xydata().tolist() for curve in terms.lines}
    assert curves["distillation loss"] == [[10, -10], [20, -20]]
    assert curves["held-out distillation loss"] == [[15, -9]]
    assert curves["L1"] == [[10, 1], [20, 1]]
    assert curves["L2"] == [[10, 3], [20, 3]] and "− cosine similarity" not in curves  # which the log lacks
    # The cut happens at once: no line slopes from one stage to the other, and single points have marks.
    after = [curve for curve in terms.lines if curve.get_xydata().tolist() == [[30, -30]]]
    assert [curve.get_marker() for curve in after] == ["o"]
    before, after, jump, _ = sparsity.lines
    assert before.get_xydata().tolist() == [[10, 50], [20, 50]]
    assert after.get_xydata().tolist() == [[30, 25]]
    assert jump.get_xydata().tolist() == [[20, 50], [20, 25]]
    for axes in (terms, penalty, sparsity):
        assert axes.lines[-1].get_xdata() == [20, 20]  # the cut
    assert plot_training(log, cut=25).axes[0].lines[-1].get_xdata() == [25, 25]
    labels = [curve.get_label() for curve in plot_training(log, ["l2_loss"]).axes[0].lines]
    assert "L2" in labels and "L1" not in labels


def test_losses_of_a_head_have_panels_of_their_own():
    log = [{"step": 1, "stage": 1, "distillation_loss": -1.0, "sparsity": 0.1, "logits_loss": 2.0, "task_loss": 90.0}]
    log.append({"step": 1, "eval_logits_loss": 3.0})
    panels = plot_training(log, head_losses=("logits_loss", "task_loss")).axes
    assert [axes.get_ylabel().replace("\n", " ") for axes in panels[1:3]] == ["divergence of logits", "loss of labels"]
    assert [curve.get_xydata().tolist() for curve in panels[1].lines] == [[[1, 2]], [[1, 3]]]
    assert [curve.get_xydata().tolist() for curve in panels[2].lines] == [[[1, 90]]]


def test_training_of_one_stage_has_no_cut():
    log = [{"step": step, "stage": 1, "distillation_loss": 0.0, "sparsity": 0.1} for step in (1, 2)]
    _, _, sparsity = plot_training(log).axes
    assert [line.get_label() for line in sparsity.lines] == ["student"]


def test_training_without_training_is_an_error():
    with pytest.raises(ValueError, match="no line with `distillation_loss`"):
        plot_training([{"eval_distillation_loss": 1.0, "step": 1}])
