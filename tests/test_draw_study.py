"""`examples/study/draw_study.py`: statistics by hand, incomplete studies, and the committed page."""

import json
import math
import re
import sys

import numpy as np
import pytest
from example_helpers import EXAMPLES
from scipy.stats import ttest_1samp


sys.path.insert(0, str(EXAMPLES / "study"))

import draw_study  # noqa: E402
import study_results  # noqa: E402
from draw_study import NOTHING, TABLES, DrawArguments, fill, link_to, make_blocks, number, spread  # noqa: E402
from run_study import run_key  # noqa: E402
from study_design import MEASURES, resolve  # noqa: E402
from study_results import (  # noqa: E402
    DPHUBERT_DISTANCE,
    MEAN_DISTANCE,
    SCORES,
    Study,
    agreements,
    compare,
    compare_on_one_machine,
    compare_with_teacher,
    detectable_effect,
    holm,
    mean_share,
    power,
    read_study,
    shares,
    tasks_with_gain,
)


pytest.importorskip("matplotlib")

PLACES = [0, 1, 2, 10, 11, 12, 13, 20, 21, 22, 23, 24, 25]
SIMILARITY = dict.fromkeys(MEASURES, np.exp(-np.abs(np.subtract.outer(PLACES, PLACES)) / 100))
SKILL = [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]
# KS and SID count what is right, ASV and PR errors. The teacher is better than filterbanks in SID with one seed only.
REFERENCES = {
    "teacher": {"ks_accuracy": [79, 81], "asv_eer": [10, 10], "sid_accuracy": [50, 60], "pr_per": [20, 20]},
    "fbank": {"ks_accuracy": [41, 39], "asv_eer": [30, 30], "sid_accuracy": [52, 40], "pr_per": [80, 80]},
}


def write_clusters(directory, seeds) -> None:
    clusters = {
        "similarity": {measure: matrix.tolist() for measure, matrix in SIMILARITY.items()},
        "groups": {
            measure: {
                "16": {"skill": [[*range(5)], [*range(5, 13)]], "4 clusters": SKILL},
                "512": {"skill": SKILL, "4 clusters": SKILL},
            }
            for measure in MEASURES
        },
    }
    for seed in seeds:
        (directory / f"clusters.{seed}.json").write_text(json.dumps(clusters), encoding="utf-8")


def write_references(directory, references) -> None:
    rates = {"ks": [0.01, 0.01], "asv": [0.003, 0.003], "sid": [0.003, 0.003], "pr": [0.001, 0.001]}
    found = {name: {"scores": scores, "learning_rates": rates} for name, scores in references.items()}
    (directory / "references.json").write_text(json.dumps(found), encoding="utf-8")


def row_of(name: str, seed: int, sparsity: float = 0.75, distances=None, settings=None, **scores) -> dict:
    method = resolve(name, SIMILARITY, seed)
    return {
        "key": run_key(method, sparsity, seed),
        **method.fields(),
        "sparsity": sparsity,
        "seed": seed,
        "parameters": 250_000 + seed,
        "sparsity_reached": 0.75,
        "distances": {"cka": [0.5] * 13 if distances is None else distances},
        "scores": {"ks_accuracy": 60, "asv_eer": 15, "sid_accuracy": 45, "pr_per": 35} | scores,
        "architecture": {"num_heads": [seed, 2, 0]},
        "seconds": {"training": 100.0, "probes": 50.0},
        "settings": {
            "max_steps": 240,
            "batch_size": 4,
            "max_seconds": 2.0,
            "learning_rates": {"ks": [0.001]},
            "processor": "some processor",
            "python": "3.11",
            "torch": "2.13",
            "transformers": "5.24",
            "datasets": "5.2",
        }
        | (settings or {}),
    }


def write_runs(directory, rows, worker: int = 0, end: str = "\n") -> None:
    text = "\n".join(json.dumps(row) for row in rows) + end
    (directory / f"runs.{worker}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def results(tmp_path):
    directory = tmp_path / "results"
    directory.mkdir()
    write_clusters(directory, (0, 1, 2))
    write_references(directory, REFERENCES)
    return directory


def test_share_of_the_gain_by_hand(results):
    study = read_study(results)
    assert tasks_with_gain(study, "fbank") == ["ks_accuracy", "asv_eer", "pr_per"]
    run = row_of("skill", 0)
    assert shares(study, run) == pytest.approx({"ks_accuracy": 50, "asv_eer": 75, "pr_per": 75})
    assert mean_share(study).value(run) == pytest.approx(200 / 3)
    # Better than the teacher, and worse than the floor.
    run = row_of("skill", 0, ks_accuracy=84, asv_eer=32, pr_per=80)
    assert shares(study, run) == pytest.approx({"ks_accuracy": 110, "asv_eer": -10, "pr_per": 0}, abs=1e-9)
    assert math.isnan(mean_share(study, "untrained").value(run))


def test_paired_test_by_hand(results):
    values = {"skill": [60, 62, 64], "dphubert": [59, 60, 61]}
    write_runs(
        results, [row_of(name, seed, ks_accuracy=value) for name in values for seed, value in enumerate(values[name])]
    )
    found = compare(read_study(results), SCORES["ks_accuracy"], "dphubert", 0.75)
    assert found.differences.tolist() == [1, 2, 3]
    # t = 2 / (1 / sqrt 3); with two degrees of freedom p = 1 - t / sqrt(t^2 + 2), and 95 % lie within 4.302653.
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert found.better == 3
    assert found.detectable == pytest.approx(detectable_effect(3))


def test_fewer_errors_are_better(results):
    values = {"skill": [10, 11, 12], "dphubert": [13, 13, 11]}
    write_runs(
        results,
        [
            row_of(name, seed, asv_eer=value, distances=[value / 100] * 13)
            for name in values
            for seed, value in enumerate(values[name])
        ],
    )
    study = read_study(results)
    found = compare(study, SCORES["asv_eer"], "dphubert", 0.75)
    assert found.differences.tolist() == [-3, -2, 1]
    assert found.better == 2
    # Of 20 points of gain: 15, 10 and -5 % in one of three tasks.
    assert compare(study, mean_share(study), "dphubert", 0.75).differences == pytest.approx([5, 10 / 3, -5 / 3])
    assert compare(study, MEAN_DISTANCE, "dphubert", 0.75).better == 2


def test_students_against_the_teacher_by_hand(results):
    rows = [row_of("skill", seed, ks_accuracy=83 + seed, asv_eer=9 + seed, pr_per=21 + seed) for seed in range(3)]
    write_runs(results, rows)
    study = read_study(results)  # the teacher has two seeds
    assert compare_with_teacher(study, "ks_accuracy", "skill", 0.75).differences.tolist() == [83 - 79, 84 - 81]
    assert compare_with_teacher(study, "ks_accuracy", "dphubert", 0.75) is None
    text = draw_study.against_teacher(study)
    # t = 3.5 / 0.5; with one degree of freedom p = 1 - 2 / pi arctan t.
    assert f"| SKILL | 2 | +3.5 ({1 - 2 / math.pi * math.atan(7):.3f}) |" in text and "DPHuBERT" not in text


def test_pairs_of_one_machine(results):
    """A repeat takes the place of a student that was trained elsewhere; seed 2 has no pair."""
    here, there = ({"processor": name} for name in ("here", "there"))
    rows = [row_of("skill", seed, settings=here, ks_accuracy=60) for seed in range(3)]
    rows += [row_of("dphubert", 0, settings=here, ks_accuracy=50)]
    rows += [row_of("dphubert", seed, settings=there, ks_accuracy=40) for seed in (1, 2)]
    write_runs(results, [*rows, row_of("skill", 1, settings=there, ks_accuracy=65)])
    study = read_study(results)
    assert compare(study, SCORES["ks_accuracy"], "dphubert", 0.75).differences.tolist() == [10, 20, 20]
    assert compare_on_one_machine(study, SCORES["ks_accuracy"], "dphubert", 0.75).differences.tolist() == [10, 25]
    assert compare_on_one_machine(study, SCORES["ks_accuracy"], "last layer", 0.75) is None
    assert "The same for pairs that were trained on one machine" in draw_study.significance(study)
    assert "| SKILL | – | AAA | – |" in draw_study.machines(study)
    assert "| DPHuBERT | – | ABB | – |" in draw_study.machines(study)


def test_comparison_takes_the_seeds_that_both_have(results):
    rows = [row_of("skill", seed, ks_accuracy=60 + seed) for seed in (0, 2)]
    rows += [row_of("dphubert", seed, ks_accuracy=50) for seed in (1, 2)] + [row_of("last layer", 1)]
    write_runs(results, rows)
    study = read_study(results)
    found = compare(study, SCORES["ks_accuracy"], "dphubert", 0.75)
    assert found.differences.tolist() == [12]
    assert math.isnan(found.p) and math.isnan(found.low)
    assert compare(study, SCORES["ks_accuracy"], "last layer", 0.75) is None
    text = draw_study.significance(study)
    assert "| KS acc ↑ | DPHuBERT | 1 | +12.0 | – | – | – | 1 of 1 | – |" in text


def test_same_runs_show_no_difference(results):
    write_runs(results, [row_of(name, seed) for name in ("skill", "dphubert") for seed in (0, 1)])
    found = compare(read_study(results), SCORES["ks_accuracy"], "dphubert", 0.75)
    assert (found.p, found.low, found.high, found.better) == (1, 0, 0, 0)


def test_holm_by_hand():
    corrected = holm([0.01, 0.04, math.nan, 0.03])
    np.testing.assert_allclose(corrected, [0.03, 0.06, math.nan, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.6]), [1, 1])
    assert not holm([]).size


def test_power_is_what_simulated_tests_have():
    samples = np.random.default_rng(0).normal(1, 1, (20_000, 5))
    test = ttest_1samp(samples, 0, axis=1)
    assert power(1, 5) == pytest.approx(((test.pvalue < 0.05) & (test.statistic > 0)).mean(), abs=0.015)
    assert power(detectable_effect(5), 5) == pytest.approx(0.8)
    assert detectable_effect(2) > detectable_effect(5) > detectable_effect(20)


def test_agreement_of_groups_by_hand():
    def groups(few, many):
        return {measure: {16: {"skill": few}, 512: {"skill": many}} for measure in MEASURES}

    pairs, crossed, one = [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 1, 2, 3]]
    study = Study({}, {0: groups(pairs, pairs), 1: groups(crossed, pairs), 2: groups(one, pairs)}, {}, {})
    # Of crossed pairs no two stay together, where chance has a third of a pair: (0 - 2/3) / (2 - 2/3).
    assert agreements(study, "skill", with_largest=True)["cka"] == {16: pytest.approx([1, -0.5, 0])}
    assert agreements(study, "skill", with_largest=False)["cka"] == {16: pytest.approx([-0.5, 0, 0]), 512: [1, 1, 1]}


def test_runs_are_found_by_the_groups_that_methods_share(results):
    write_runs(results, [row_of("skill", 0)])
    study = read_study(results)
    assert study.methods["skill", 0].layer_groups == tuple(map(tuple, SKILL))
    assert study.runs_of("skill", 0.75).keys() == study.runs_of("3 clusters", 0.75).keys() == {0}
    assert not study.runs_of("skill", 0.5) and not study.runs_of("2 clusters", 0.75)


def test_first_of_two_lines_counts_and_torn_ones_do_not(results, caplog):
    rows = [row_of("skill", 0, ks_accuracy=60), row_of("skill", 0, ks_accuracy=70)]
    write_runs(results, rows, end='\n{"key": "[[torn')
    write_runs(results, [row_of("skill", 0, ks_accuracy=80), row_of("skill", 1, ks_accuracy=90)], worker=1)
    found = read_study(results).runs_of("skill", 0.75)
    assert {seed: run["scores"]["ks_accuracy"] for seed, run in found.items()} == {0: 60, 1: 90}
    assert "runs.0.jsonl has an incomplete line" in caplog.text


def test_students_trained_twice_are_compared(results):
    rows = [row_of("skill", seed, settings={"processor": "a CPU"}) for seed in (0, 1)]
    write_runs(results, rows)
    assert "trained twice" not in draw_study.setting(read_study(results))
    on_gpu = {"settings": {"processor": "a GPU"}, "distances": [0.5] * 12 + [0.24]}
    again = [row_of("skill", 0, **on_gpu, asv_eer=14, pr_per=38), row_of("skill", 1, **on_gpu, asv_eer=15.5)]
    write_runs(results, [*again, row_of("skill", 2, **on_gpu)], worker=1)
    text = draw_study.setting(read_study(results))
    assert "| on a CPU | 2 students, 100 s to train one, 50 s" in text and "| on a GPU | 1 students" in text
    assert "2 students were trained twice: 2 on a CPU and a GPU." in text
    # The second keeps 72.5 instead of 75 % of the gain in one of three tasks; in the first two tasks cancel out.
    scores = "KS acc ↑ 0.0, ASV EER ↓ 1.0, SID acc ↑ 0.0, PR PER ↓ 3.0"
    assert f"{scores}, share kept (%) ↑ 0.8, mean distance (1 − CKA) ↓ 0.020." in text


def test_run_of_no_method_is_passed_over(results, caplog):
    write_runs(results, [row_of("skill", 0), row_of("skill", 1) | {"key": "of another teacher"}])
    study = read_study(results)
    assert study.runs_of("skill", 0.75).keys() == {0}
    assert "1 runs" in caplog.text and "do not belong to any method" in caplog.text
    assert "| students | 1 of " in draw_study.setting(study)


def test_runs_of_different_settings_are_an_error(results):
    write_runs(results, [row_of("skill", 0), row_of("skill", 1, settings={"max_steps": 120})])
    with pytest.raises(ValueError, match="different `max_steps`: 120 and 240"):
        read_study(results)


def test_missing_directory_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="There is no directory"):
        read_study(tmp_path / "nowhere")


def test_distances_of_the_distilled_and_of_the_others(results):
    # A tenth at DPHuBERT's hidden states 0, 4, 8 and 12, four tenths elsewhere.
    distances = [0.1 if layer % 4 == 0 else 0.4 for layer in range(13)]
    rows = [row_of(name, 0, distances=distances) for name in ("skill", "dphubert", "last layer")]
    assert DPHUBERT_DISTANCE.value(rows[0]) == pytest.approx(0.1)
    write_runs(results, [*rows, row_of("skill", 1, 0.9), row_of("skill", 0, 0.9)])
    text = draw_study.distances(read_study(results))
    assert "| 0.75 | SKILL | 1 | 0.308 | 0.308 | – | 0.100 | 0.400 | 2 |" in text
    assert "| 0.75 | DPHuBERT | 1 | 0.308 | 0.100 | 0.400 | 0.100 | 0.400 | 2 |" in text
    assert "| 0.75 | last layer | 1 | 0.308 | 0.100 | 0.325 | 0.100 | 0.400 | 2 |" in text
    assert "| 0.9 | SKILL | 2 | 0.500 ± 0.000 | 0.500 ± 0.000 | – | 0.500 ± 0.000 | 0.500 ± 0.000 | 2, 3 |" in text


def test_main_table_by_hand(results):
    rows = [row_of("skill", seed, ks_accuracy=value) for seed, value in enumerate((58, 60, 62))] + [
        row_of("dphubert", 1)
    ]
    write_runs(results, rows)
    text = draw_study.main_table(read_study(results))
    assert "| *teacher* | 2 | 1,000,000 | 80.0 ± 1.4 | 10.0 ± 0.0 | 55.0 ± 7.1 | 20.0 ± 0.0 |" in text
    assert "| SKILL | 3 | 250,001 | 60.0 ± 2.0 | 15.0 ± 0.0 | 45.0 ± 0.0 | 35.0 ± 0.0 |" in text
    assert "| SKILL | 3 | 50.0 ± 5.0 | 75.0 ± 0.0 | – | 75.0 ± 0.0 | 66.7 ± 1.7 | – | – |" in text
    assert "| DPHuBERT | 1 | 50.0 | 75.0 | – | 75.0 | 66.7 | – | – |" in text
    assert "does not beat fbank with every seed in SID acc ↑" in text
    assert "No runs yet: DistilHuBERT, last layer, every layer, one group, random groups." in text


def test_other_sparsities_are_told_task_by_task(results):
    write_runs(results, [row_of("skill", 0), row_of("skill", 1, 0.9, ks_accuracy=44), row_of("dphubert", 0, 0.5)])
    text = draw_study.sparsities(read_study(results))
    assert "| SKILL | – | 66.7 (1) | 53.3 (1) |" in text
    assert "| DPHuBERT | 66.7 (1) | – | – |" in text
    at_half, at_nine_tenths = text.split("Task by task at sparsity ")[1:]
    assert at_half.startswith("0.5:") and "| DPHuBERT | 1 | 50.0 |" in at_half and "SKILL" not in at_half
    assert at_nine_tenths.startswith("0.9:") and "| SKILL | 1 | 10.0 | 75.0 | – | 75.0 | 53.3 |" in at_nine_tenths


def test_groups_name_the_seeds_and_the_choice(results):
    text = draw_study.groups_table(read_study(results))
    assert "| cka | 3 | {0–2}, {3–6}, {7–12} | 0, 1, 2 |" in text
    silhouettes = text[text.index("| measure | 2 | 3 |") :].splitlines()
    assert re.fullmatch(r"\| cka \| 0\.\d\d \| \*\*0\.\d\d\*\* \|[^*]*", silhouettes[2])


@pytest.mark.parametrize(
    "values, digits, text",
    [([], 1, "–"), ([math.nan], 1, "–"), ([2.34], 1, "2.3"), ([1, 3], 2, "2.00 ± 1.41"), ([-0.04], 1, "0.0")],
)
def test_spread_tells_what_there_is(values, digits, text):
    assert spread(values, digits) == text


def test_number_has_a_sign_if_asked():
    assert [number(value, 1, signed=True) for value in (1.24, -1.26, 0)] == ["+1.2", "−1.3", "+0.0"]


def test_blocks_are_replaced_again_and_again():
    page = (
        "Prose.\n<!-- study: main -->\nold | 1\n<!-- end -->\nMore \\1.\n\n"
        "<!-- study: groups -->\n<!-- end -->\nEnd.\n"
    )
    blocks = {"main": r"new \1", "groups": "two\nlines", "not in the page": "x"}
    filled = fill(page, blocks)
    assert filled == (
        "Prose.\n<!-- study: main -->\nnew \\1\n<!-- end -->\nMore \\1.\n\n"
        "<!-- study: groups -->\ntwo\nlines\n<!-- end -->\nEnd.\n"
    )
    assert fill(filled, blocks) == filled
    assert fill("No block.\n", blocks) == "No block.\n"


@pytest.mark.parametrize(
    "page, message",
    [
        ("<!-- study: mian -->\n<!-- end -->\n", "no block 'mian'; the blocks are main, groups"),
        ("<!-- study: main -->\n", "has no `<!-- end -->`"),
        ("<!-- study: main -->\n<!-- study: groups -->\n<!-- end -->\n", "'main' has no `<!-- end -->`"),
        ("<!-- study: main -->\n<!-- end -->\n<!-- study:groups -->\n", "A block has no"),
    ],
)
def test_page_with_wrong_markers_is_an_error(page, message):
    with pytest.raises(ValueError, match=message):
        fill(page, {"main": "", "groups": ""})


def all_blocks(path):
    path.write_text("".join(f"<!-- study: {name} -->\n<!-- end -->\n" for name in TABLES), encoding="utf-8")
    return path


@pytest.mark.nightly
def test_study_of_several_stages_is_drawn(results, tmp_path, capsys):
    rows = [row_of(name, seed) for name in ("skill", "dphubert", "one group") for seed in (0, 1)]
    write_runs(results, rows + [row_of("skill", 0, 0.5)])
    page = all_blocks(tmp_path / "study.md")
    args = DrawArguments(results, page, tmp_path / "pictures" / "of")
    draw_study.run(args)
    filled = page.read_text(encoding="utf-8")
    assert "![Distance of each method to the teacher by layer](pictures/of/study_distances.png)" in filled
    assert NOTHING not in filled
    printed = capsys.readouterr().out
    assert all(line in printed for line in filled.splitlines() if not line.startswith("<!--"))
    for picture in draw_study.PICTURES.values():
        content = (args.figures / picture.file).read_bytes()
        assert int.from_bytes(content[16:20], "big") == 1200 and len(content) < 150_000
    draw_study.run(args)
    assert page.read_text(encoding="utf-8") == filled


@pytest.mark.parametrize(
    "have", ["nothing", "one seed of clusters", "no references", "a baseline alone", "no clusters"]
)
def test_study_that_has_only_begun_is_drawn(have, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    if have in ("one seed of clusters", "a baseline alone", "no references"):
        write_clusters(results, (0,))
    if have in ("a baseline alone", "no clusters"):
        write_references(results, {"teacher": REFERENCES["teacher"]})
    if have in ("a baseline alone", "no clusters"):
        write_runs(results, [row_of("every layer", 0)])
    if have == "no references":
        write_runs(results, [row_of("skill", 0), row_of("dphubert", 0)])
    page = all_blocks(tmp_path / "study.md")
    draw_study.run(DrawArguments(results, page, tmp_path))
    empty = {
        "nothing": set(TABLES),
        "one seed of clusters": set(TABLES) - {"groups", "stability"},
        "no references": {"references", "against the teacher"},
        "a baseline alone": {"significance", "variants"},
        "no clusters": set(TABLES) - {"references"},
    }
    blocks = make_blocks(read_study(results), ".")
    assert {name for name, block in blocks.items() if block == NOTHING} == empty[have]
    assert {path.name for path in tmp_path.glob("*.png")} == {
        picture.file for name, picture in draw_study.PICTURES.items() if name not in empty[have]
    }


def test_missing_page_is_an_error(results, tmp_path):
    with pytest.raises(ValueError, match="There is no page"):
        draw_study.run(DrawArguments(results, tmp_path / "nowhere.md", tmp_path))


def test_committed_page_says_what_the_committed_results_say():
    args = DrawArguments()
    page = args.page.read_text(encoding="utf-8")
    study = study_results.read_study(args.results)
    blocks = make_blocks(study, link_to(args.figures, args.page))
    assert set(re.findall("<!-- study: (.*?) -->", page)) == set(TABLES)
    assert fill(page, blocks) == page, "The results are newer than the page: run examples/study/draw_study.py."
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (args.page.parent / picture).stat().st_size < 150_000
