"""
Figures of a compression. Each function returns a `matplotlib.figure.Figure`, created without pyplot: no window is
opened and no settings are changed. Without matplotlib it raises an `ImportError` that names the extra to install.
"""

import math
import textwrap
from collections.abc import Sequence
from itertools import cycle
from string import ascii_uppercase

import numpy as np
from scipy.cluster.hierarchy import dendrogram

from ..compression.units import KINDS, Units, shown_kinds, units_by_kind, units_in_teacher
from ..losses import LOSS_TERMS


# Okabe and Ito's colours, told apart by colour-blind readers too; those that are faint on white are left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LIGHT, DARK = "#D9D9D9", "#404040"
HELD_OUT = COLOURS[3]  # of the loss on held-out data
MARKERS = "osD^vP"
MOST_NUMBERS = 14  # rows and columns of a matrix whose values are written into it
FEW_POINTS = 20  # a line through no more of them gets marks, since a single one would not show
LOSS_LABELS = {f"{name}_loss": term.label for name, term in LOSS_TERMS.items()}
HEAD_LABELS = {"logits_loss": "divergence\nof logits", "task_loss": "loss\nof labels"}


def plot_layer_similarity(similarity: np.ndarray, tree: np.ndarray, layer_groups: list[list[int]], first_layer=0):
    """
    Similarity of the teacher's layers as a heat map, with the dendrogram of their clustering on its left.

    Rows and columns are in the order of the dendrogram's leaves. This is the order of the layers, unless a group
    contains layers that are not neighbours.

    Args:
        similarity (`numpy.ndarray` of shape `(N, N)`): symmetric, with ones on its diagonal.
        tree (`numpy.ndarray` of shape `(N - 1, 4)`): linkage matrix of [`layer_tree`].
        layer_groups (`list[list[int]]`): hidden-state indices of each group.
        first_layer (`int`, *optional*, defaults to 0): hidden-state index of the first row.

    Raises:
        `ValueError`: if the tree and the matrix have different numbers of layers.
    """
    figure = new_figure(8, 5.6)
    similarity, num_rows = np.asarray(similarity), len(tree) + 1
    if len(similarity) != num_rows:
        raise ValueError(f"`tree` joins {num_rows} layers, but `similarity` has {len(similarity)} rows.")
    # Of two branches the one with the lower layer comes first.
    tree, leaves = np.array(tree, dtype=float), [[row] for row in range(num_rows)]
    for merge in tree:
        merge[:2] = sorted(merge[:2], key=lambda node: min(leaves[int(node)]))
        leaves.append(leaves[int(merge[0])] + leaves[int(merge[1])])
    order = leaves[-1]
    rows_of = [[layer - first_layer for layer in group if layer >= first_layer] for group in layer_groups]
    colour_of = {row: colour for rows, colour in zip(rows_of, cycle(COLOURS)) for row in rows}

    tree_axes, axes = figure.subplots(1, 2, sharey=True, width_ratios=(1, 3.2))
    matrix = similarity[np.ix_(order, order)]
    lowest, digits = matrix.min(), 2 if matrix.min() < 0.9 else 3
    limits = {"vmin": min(lowest, 0.999), "vmax": 1}
    _draw_matrix(axes, matrix, "similarity", f".{digits}f", cmap="Greys", **limits)
    label_axes(axes, xlabel="hidden state" if first_layer else "hidden state (0: input of the first layer)", spines=[])
    axes.tick_params(length=0, labelleft=True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(num_rows), [row + first_layer for row in order], fontsize=9, fontweight="bold")
        for row, label in zip(order, axis.get_ticklabels(), strict=True):
            label.set_color(colour_of.get(row, DARK))
    for rows in rows_of:
        # One frame, unless the tree doesn't hold the group together (groups set by hand).
        for start, end in index_runs(order.index(row) for row in rows):
            low, high = start - 0.5, end + 0.5
            x, y = [low, high, high, low, low], [low, low, high, high, low]
            axes.plot(x, y, color=colour_of[rows[0]], lw=3, clip_on=False, solid_joinstyle="miter")

    def colour_of_link(node: int) -> str:
        colours = {colour_of.get(row, DARK) for row in leaves[node]}
        return colours.pop() if len(colours) == 1 else DARK

    drawn = dendrogram(tree, no_plot=True, link_color_func=colour_of_link)
    for x, y, colour in zip(drawn["dcoord"], drawn["icoord"], drawn["color_list"], strict=True):
        # scipy puts leaf i at 5 + 10 i.
        tree_axes.plot(x, (np.array(y) - 5) / 10, color=colour, lw=1.8, solid_joinstyle="miter")
    tree_axes.set_xlim(1.05 * tree[:, 2].max() or 1, 0)
    tree_axes.xaxis.get_major_locator().set_params(nbins=3)  # small distances have long labels
    tree_axes.tick_params(axis="y", length=0, labelleft=False)
    label_axes(tree_axes, xlabel="distance (1 − similarity)", spines=["bottom"])

    figure.suptitle(textwrap.fill(f"Groups of hidden states: {format_groups(layer_groups)}", 90), fontsize=11)
    return figure


def plot_cross_similarity(
    similarity: np.ndarray, names: tuple[str, str] = ("the teacher", "the other"), first_layer: int = 0
):
    """
    Similarity of each layer of one model to each layer of another as a heat map. The layer of the other model that
    each layer is most similar to is outlined.

    Args:
        similarity (`numpy.ndarray` of shape `(N, M)`): a row for each layer of the first model, from
            [`layer_similarity`] with `other`.
        names (`tuple[str, str]`, *optional*): of the two models.
        first_layer (`int`, *optional*, defaults to 0): hidden-state index of the first row and column.
    """
    figure, similarity = new_figure(8, 5.6), np.asarray(similarity)
    axes = figure.subplots()
    lowest, highest = similarity.min(), max(similarity.max(), similarity.min() + 1e-3)
    digits = 2 if highest - lowest > 0.1 else 3
    _draw_matrix(axes, similarity, "similarity", f".{digits}f", cmap="Greys", vmin=lowest, vmax=highest)
    _label_states(axes, similarity.shape, names, first_layer)
    for row, column in enumerate(similarity.argmax(1)):
        x, y = column + np.array([-0.5, 0.5, 0.5, -0.5, -0.5]), row + np.array([-0.5, -0.5, 0.5, 0.5, -0.5])
        axes.plot(x, y, color=COLOURS[1], lw=2, clip_on=False, solid_joinstyle="miter")
    title = f"Outlined: for each layer of {names[0]} the most similar one of {names[1]}"
    figure.suptitle(textwrap.fill(title, 90), fontsize=11)
    return figure


def plot_similarity_difference(
    difference: np.ndarray, sets: tuple[str, str], names: tuple[str, str] | None = None, first_layer: int = 0
):
    """
    How the similarity of layers differs between two sets of audio, such as two languages, as a heat map.

    Args:
        difference (`numpy.ndarray` of shape `(N, M)`): similarity on the first set, less that on the second.
        sets (`tuple[str, str]`): names of the sets.
        names (`tuple[str, str]`, *optional*): of the models of rows and columns, if they are two.
        first_layer (`int`, *optional*, defaults to 0): hidden-state index of the first row and column.
    """
    figure, difference = new_figure(8, 5.6), np.asarray(difference)
    axes = figure.subplots()
    largest = max(np.abs(difference).max(), 1e-3)
    digits = 2 if largest > 0.1 else 3
    limits = {"vmin": -largest, "vmax": largest}
    _draw_matrix(axes, difference, "difference of similarities", f"+.{digits}f", cmap="PuOr", **limits)
    _label_states(axes, difference.shape, names, first_layer)
    title = f"Similarity of layers on {sets[0]} minus that on {sets[1]}"
    figure.suptitle(textwrap.fill(title, 90), fontsize=11)
    return figure


def plot_groups(
    groups: Sequence[list[list[int]]],
    silhouettes: Sequence[float | None],
    stability: Sequence[float | None],
    chosen: int | None = None,
):
    """
    The groups of layers for every number of groups, with the silhouette and the stability of each.

    Args:
        groups (sequence of `list[list[int]]`): hidden-state indices of each group; first of one group of all layers,
            then of two, and so on.
        silhouettes (sequence of `float` or `None`): of each number of groups.
        stability (sequence of `float` or `None`): of each number of groups, as [`all_cuts`] gives it.
        chosen (`int`, *optional*): number of groups that is chosen; it is marked.
    """
    layers = sorted(layer for group in groups[0] for layer in group)
    figure = new_figure(8, 1.6 + 0.28 * len(groups))
    from matplotlib.colors import to_rgb

    axes, curves = figure.subplots(1, 2, sharey=True, width_ratios=(2.4, 1))
    colour_of: dict[int, int] = {}  # first layer of a group -> its colour, which it keeps when other groups split
    cells = np.zeros((len(groups), len(layers), 3))
    for row, partition in enumerate(groups):
        for group in partition:
            number = colour_of.setdefault(min(group), len(colour_of))
            for layer in group:
                column = layers.index(layer)
                cells[row, column] = 0.45 + 0.55 * np.array(to_rgb(COLOURS[number % len(COLOURS)]))
                style = {"ha": "center", "va": "center", "fontsize": 8 if len(layers) <= 14 else 6}
                axes.text(column, row, _letters(number), fontweight="bold" if row + 1 == chosen else None, **style)
    title = "same letter: same group" + ("; bold: the chosen groups" if chosen is not None else "")
    axes.imshow(cells, aspect="auto")
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(groups)), range(1, len(groups) + 1))
    axes.set_xticks(np.arange(len(layers) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(groups) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", lw=1.5)
    axes.tick_params(which="both", length=0)
    label_axes(axes, title, "hidden state", "number of groups", spines=[])
    for name, values, colour, marker in (
        ("silhouette", silhouettes, COLOURS[0], "o"),
        ("stability", stability, COLOURS[1], "s"),
    ):
        points = [(value, row) for row, value in enumerate(values) if value is not None]
        if points:
            curves.plot(*np.array(points).T, color=colour, marker=marker, markersize=5, lw=1.8, label=name)
    if curves.lines:
        curves.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    if chosen is not None:
        curves.axhline(chosen - 1, color=DARK, lw=1, ls=":")
    curves.grid(axis="x", color=LIGHT, lw=0.8)
    curves.tick_params(axis="y", which="both", length=0, labelleft=False)
    label_axes(curves, xlabel="1: best", spines=["bottom"])
    return figure


def plot_architecture(config, teacher_config):
    """
    Remaining units of each layer, in front of the teacher's sizes in grey: one panel for each kind of unit, such as
    channels of the convolutions, attention heads (number and indices) and units of the feed-forward blocks. Layers are
    counted from 1, like hidden states.

    Args:
        config (`PreTrainedConfig`): config of the student.
        teacher_config (`PreTrainedConfig`): config of the teacher, a stock model or a student.
    """
    bars = {"convolution": [], "layer": []}
    grids = []
    units = units_in_teacher(config, teacher_config.num_hidden_layers), units_by_kind(teacher_config)
    for name in shown_kinds(config):
        kind, (student, teacher) = KINDS[name], (by_place[name] for by_place in units)
        bars[kind.places].append((f"{kind.label.capitalize()} per {kind.places}", student, teacher))
        if teacher[0].indices is not None:
            grids.append((f"Which {kind.label}", student, teacher))
    panels = [(_plot_sizes, *panel) for panel in bars["convolution"]]
    panels += [(_plot_indices, *panel) for panel in grids]
    panels += [(_plot_sizes, *panel) for panel in bars["layer"]]
    num_rows = math.ceil(len(panels) / 2)
    figure = new_figure(8, 3 * num_rows)
    places = figure.subplots(num_rows, 2, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.remove()
    for axes, (plot, *panel) in zip(places, panels, strict=False):
        plot(axes, *panel)
    for axes in figure.axes:
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(axis="x", length=0)
        axes.set_xticks(range(1, int(axes.dataLim.xmax) + 1, 1 if axes.dataLim.xmax < 14 else 2))
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def plot_layer_distances(distances: dict, ylabel: str = "distance to the teacher", groups: dict | None = None):
    """
    Distance between student and teacher at every hidden state, one line for each method.

    Args:
        distances (`dict[str, numpy.ndarray]`): name of a method -> distances of shape `(num_hidden_layers + 1,)`,
            starting with the input of the first layer.
        ylabel (`str`, *optional*, defaults to `"distance to the teacher"`): measure and unit of the distances.
        groups (`dict[str, list[list[int]]]`, *optional*): name of a method -> hidden-state indices of the groups that
            it distils, shown as filled marks on its line and letters below it.
    """
    figure = new_figure(8, 4 if groups is None else 4 + 0.25 * len(distances))
    axes = figure.subplots()
    for row, (name, colour, marker) in enumerate(zip(distances, cycle(COLOURS), cycle(MARKERS))):
        distance = np.asarray(distances[name])
        own_groups = [range(len(distance))] if groups is None else groups.get(name, [])
        letters = {layer: letter for group, letter in zip(own_groups, cycle(ascii_uppercase)) for layer in group}
        others = [layer for layer in range(len(distance)) if layer not in letters]
        style = {"color": colour, "marker": marker, "markersize": 7}
        axes.plot(distance, label=name, lw=2, markevery=sorted(letters), **style)
        axes.plot(others, distance[others], ls="", markerfacecolor="white", **style)
        if groups is not None:
            below = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": colour}
            y = -45 - 16 * row
            axes.annotate(name, (0, 0), (-6, y), "axes fraction", ha="right", **below)
            for layer, letter in letters.items():
                axes.annotate(letter, (layer, 0), (0, y), ("data", "axes fraction"), ha="center", **below)
    length = max(map(len, distances.values()))
    axes.set_xticks(range(0, length, 1 if length <= 14 else 2))
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.grid(axis="y", color=LIGHT, lw=0.8)
    axes.legend(frameon=False, fontsize=9)
    title = "" if groups is None else "filled marks: hidden states that are distilled; letters: their groups"
    label_axes(axes, title, "hidden state (0: input of the first layer)", ylabel)
    return figure


def plot_training(
    log_history: list[dict],
    loss_terms: Sequence[str] | None = None,
    cut: int | None = None,
    head_losses: Sequence[str] = (),
):
    """
    Loss terms, losses of a head, multiplier of the size constraint, and sparsity with its target, over the optimizer
    steps of both stages, with the cut between them marked.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`. Lines without `distillation_loss` or
            `eval_distillation_loss` are ignored.
        loss_terms (`Sequence[str]`, *optional*): terms to draw in addition to their weighted sum, such as `l1_loss`;
            by default all of [`~skill_hf.losses.LOSS_TERMS`] that the log contains.
        cut (`int`, *optional*): the last step of stage 1; by default the last logged one.
        head_losses (`Sequence[str]`, *optional*): losses of a head, each in its own panel, since their scales differ.

    Raises:
        `ValueError`: if there are no lines from training.
    """
    figure = new_figure(8, 6 + 1.3 * len(head_losses))
    lines = [line for line in log_history if "distillation_loss" in line]
    if not lines:
        raise ValueError("`log_history` has no line with `distillation_loss`; train for `logging_steps` steps first.")
    heights = (3, *[1.6] * len(head_losses), 1.3, 2)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    terms, *of_head, multiplier, sparsity = panels

    # The stages are drawn separately: one line would turn the sudden change at the cut into a slope.
    first_stage = [line for line in log_history if line.get("stage") == 1]
    later = [line for line in log_history if line.get("stage") != 1]

    def draw(axes, name: str, label: str | None, colour: str, scale: float = 1.0, **style) -> None:
        for part in (first_stage, later):
            points = [(line["step"], scale * line[name]) for line in part if name in line]
            if points:
                marks = {"marker": "o", "markersize": 4} if len(points) <= FEW_POINTS else {}
                axes.plot(*np.array(points).T, color=colour, label=label, **marks | style)
                label = None

    draw(terms, "distillation_loss", "distillation loss", DARK, lw=2.2)
    if loss_terms is None:
        loss_terms = [name for name in LOSS_LABELS if any(name in line for line in lines)]
    for name, colour in zip(loss_terms, cycle(colour for colour in COLOURS if colour != HELD_OUT)):
        draw(terms, name, LOSS_LABELS.get(name, name), colour)
    diamonds = {"ls": "", "marker": "D", "markersize": 6, "markeredgecolor": "white", "zorder": 3}
    draw(terms, "eval_distillation_loss", "held-out distillation loss", HELD_OUT, **diamonds)
    for axes, name, colour in zip(of_head, head_losses, COLOURS, strict=False):
        draw(axes, name, "training", colour)
        draw(axes, f"eval_{name}", "held out", HELD_OUT, **diamonds)
    draw(multiplier, "lambda_1", None, COLOURS[0])
    draw(sparsity, "target_sparsity", "target", DARK, 100, ls="--")
    draw(sparsity, "sparsity", "student", COLOURS[0], 100, lw=2)
    labels = ("loss", *(HEAD_LABELS[name] for name in head_losses), "multiplier", "sparsity (%)")
    for axes, label in zip(panels, labels, strict=True):
        label_axes(axes, ylabel=label, xlabel="optimizer step" if axes is sparsity else "")
        axes.grid(axis="y", color=LIGHT, lw=0.8)
        if axes is not multiplier:
            axes.legend(frameon=False, fontsize=8)

    if first_stage and len(first_stage) < len(lines):
        cut = first_stage[-1]["step"] if cut is None else cut
        ends = [100 * lines[len(first_stage) - 1]["sparsity"], 100 * lines[len(first_stage)]["sparsity"]]
        sparsity.plot([cut, cut], ends, color=COLOURS[0], lw=2, ls=(0, (1, 1)))
        for axes in panels:
            axes.axvline(cut, color=DARK, lw=1, ls=":")
        for text, side in (("stage 1: distil and prune  ", "right"), ("  stage 2: distil", "left")):
            style = {"ha": side, "va": "bottom", "fontsize": 8, "color": DARK}
            terms.text(cut, 1, text, transform=terms.get_xaxis_transform(), **style)
    return figure


def new_figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: `pip install skill-hf[plots]`.") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _draw_matrix(axes, matrix: np.ndarray, label: str, number_format: str, **colours) -> None:
    """A heat map with a colour bar, and its values if they are few."""
    image = axes.imshow(matrix, aspect="auto", **colours)
    label_axes(axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=30).ax, ylabel=label, spines=[])
    if max(matrix.shape) <= MOST_NUMBERS:
        for (y, x), value in np.ndenumerate(matrix):
            red, green, blue, _ = image.cmap(image.norm(value))
            colour = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
            axes.text(x, y, f"{value:{number_format}}", ha="center", va="center", fontsize=7, color=colour)


def _label_states(axes, shape: tuple[int, int], names: tuple[str, str] | None, first_layer: int) -> None:
    for axis, size in zip((axes.yaxis, axes.xaxis), shape, strict=True):
        axis.set_ticks(range(size), range(first_layer, first_layer + size))
    note = "" if first_layer else " (0: input of the first layer)"
    ylabel, xlabel = ("hidden state" if name is None else f"hidden state of {name}" for name in names or (None, None))
    label_axes(axes, xlabel=f"{xlabel}{note}", ylabel=ylabel, spines=[])
    axes.tick_params(length=0)


def _letters(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    return (_letters(number // 26 - 1) if number >= 26 else "") + ascii_uppercase[number % 26]


def _plot_sizes(axes, title: str, student: list[Units | None], teacher: list[Units]) -> None:
    places, sizes = range(1, len(student) + 1), [units.size for units in teacher]
    axes.bar(places, sizes, color=LIGHT, label="teacher")
    remaining = [0 if units is None else units.size for units in student]
    bars = axes.bar(places, remaining, color=COLOURS[0], label="left in the student")
    axes.bar_label(bars, padding=2, fontsize=7, rotation=90 if len(student) > 8 and max(sizes) > 99 else 0)
    axes.set_ylim(0, 1.12 * max(sizes))
    label_axes(axes, title)


def _plot_indices(axes, title: str, student: list[Units | None], teacher: list[Units]) -> None:
    from matplotlib.colors import ListedColormap

    grid = np.full((teacher[0].whole, len(teacher)), np.nan)
    for layer, (left, units) in enumerate(zip(student, teacher, strict=True)):
        grid[list(units.indices), layer] = 0
        if left is not None:
            grid[list(left.indices), layer] = 1
    x, y = np.arange(grid.shape[1] + 1) + 0.5, np.arange(grid.shape[0] + 1) - 0.5
    colours = ListedColormap([LIGHT, COLOURS[0]])
    axes.pcolormesh(x, y, grid, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=1)
    label_axes(axes, title, ylabel="index", spines=[])


def label_axes(axes, title="", xlabel="", ylabel="", spines=("left", "bottom")) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in spines)


def format_groups(layer_groups: list[list[int]]) -> str:
    """`{0–1, 4}, {2–3}`"""
    names = [", ".join(str(a) if a == b else f"{a}–{b}" for a, b in index_runs(group)) for group in layer_groups]
    return ", ".join(f"{{{name}}}" for name in names)


def index_runs(indices) -> list[tuple[int, int]]:
    """First and last index of each run of consecutive `indices`."""
    indices = sorted(indices)
    starts, ends = ([i for i in indices if i + step not in indices] for step in (-1, 1))
    return list(zip(starts, ends, strict=True))
