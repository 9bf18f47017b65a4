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
from draw_study import NOTHING, TABLES, DrawArguments, fill, link_to, make_blocks, number, spread  # noqa: E402
from study_design import Condition, Student  # noqa: E402
from study_results import DISTANCE, SCORES, compare, holm, read_study, share_kept, tasks_with_gain  # noqa: E402


pytest.importorskip("matplotlib")

WAVLM = Condition("wavlm", 0.75)
# KS and SID count what is right, ASV and PR errors. The teacher is better than filterbanks in SID with one seed only.
REFERENCES = {
    "teacher": {"ks_accuracy": [79, 81], "asv_eer": [10, 10], "sid_accuracy": [50, 60], "pr_per": [20, 20]},
    "fbank": {"ks_accuracy": [41, 39], "asv_eer": [30, 30], "sid_accuracy": [52, 40], "pr_per": [80, 80]},
}


def write_references(directory, references) -> None:
    found = {name: {"scores": scores, "learning_rates": {}} for name, scores in references.items()}
    (directory / "references.wavlm.json").write_text(json.dumps(found), encoding="utf-8")


def row_of(method: str, seed: int, distance: float = 0.5, condition=WAVLM, settings=None, **scores) -> dict:
    row = {
        "key": Student(method, condition, seed).key,
        "layer_groups": [[0, 1, 2], [3, *range(4, 13)]],
        "parameters": 250_000 + seed,
        "sparsity_reached": 0.75,
        "cut": {"step": 160, "left": 1, "wanted": 2, "shift": -0.25},
        "losses": [[140, -0.5], [160, -0.6], [180, -0.4], [240, -0.7]],
        "distances": {"cka": [distance] * 13},
        "architecture": {"num_heads": [seed, 2, 0]},
        "seconds": {"training": 100.0},
        "settings": {
            "batch_size": 4,
            "max_seconds": 2.0,
            "precision": "bfloat16",
            "processor": "some processor",
            "python": "3.11",
            "torch": "2.13",
            "transformers": "5.24",
            "datasets": "5.2",
        }
        | (settings or {}),
    }
    return row | ({"scores": scores} if scores else {})


SCORED = {"ks_accuracy": 60, "asv_eer": 15, "sid_accuracy": 45, "pr_per": 35}


def write_rows(directory, rows, worker: int = 0) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / f"students.{worker}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def results(tmp_path):
    directory = tmp_path / "results"
    directory.mkdir()
    write_references(directory, REFERENCES)
    return directory


def test_share_of_the_gain_by_hand(results):
    write_rows(results, [row_of("SKILL", 0, **SCORED), row_of("one group", 0)])
    study = read_study(results)
    assert tasks_with_gain(study, "wavlm") == ["ks_accuracy", "asv_eer", "pr_per"]
    # (60 - 40) / (80 - 40), (15 - 30) / (10 - 30), (35 - 80) / (20 - 80)
    share = share_kept(study, "wavlm")
    assert study.values(share, "SKILL", WAVLM) == {0: pytest.approx((50 + 75 + 75) / 3)}
    assert study.values(share, "one group", WAVLM) == {}
    assert not tasks_with_gain(study, "hubert")


def test_paired_test_by_hand(results):
    ours, theirs = [0.3, 0.5, 0.2], [0.35, 0.5, 0.3]
    rows = [row_of("SKILL", seed, value) for seed, value in enumerate(theirs)]
    rows += [row_of("one group", seed, value) for seed, value in enumerate(ours)]
    rows += [row_of("one group", 3, 0.1), row_of("SKILL", 0, 0.9, Condition("hubert", 0.75))]
    write_rows(results, rows)
    found = compare(read_study(results), DISTANCE, "one group", "SKILL", WAVLM)
    differences = np.subtract(ours, theirs)
    np.testing.assert_allclose(found.differences, differences)
    assert found.better == 2
    assert found.p == pytest.approx(ttest_1samp(differences, 0).pvalue)


def test_comparisons_of_few_seeds(results):
    write_rows(results, [row_of("SKILL", 0, 0.3), row_of("one group", 0, 0.2), row_of("every layer", 0, 0.3)])
    study = read_study(results)
    assert math.isnan(compare(study, DISTANCE, "one group", "SKILL", WAVLM).p)
    assert compare(study, DISTANCE, "every layer", "SKILL", WAVLM).p == 1.0
    assert compare(study, DISTANCE, "last layer", "SKILL", WAVLM) is None


@pytest.mark.parametrize("metric, better", [("ks_accuracy", 2), ("asv_eer", 0)])
def test_fewer_errors_are_better(results, metric, better):
    rows = [row_of("SKILL", seed, **SCORED) for seed in (0, 1)]
    rows += [row_of("one group", seed, **(SCORED | {metric: SCORED[metric] + 1 + seed})) for seed in (0, 1)]
    write_rows(results, rows)
    assert compare(read_study(results), SCORES[metric], "one group", "SKILL", WAVLM).better == better


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, math.nan, 0.5]), [0.04, 0.09, 0.09, math.nan, 0.5])
    np.testing.assert_allclose(holm([0.4, 0.6]), [0.8, 0.8])


def test_rows_that_are_not_planned_come_last(results):
    write_rows(results, [row_of("SKILL", 99), row_of("SKILL + half root", 0), row_of("SKILL", 0)])
    rows = read_study(results).rows
    assert [(student.method, student.seed) for student in rows] == [
        ("SKILL", 0),
        ("SKILL", 99),
        ("SKILL + half root", 0),
    ]


def test_rows_of_different_settings_are_an_error(results):
    write_rows(results, [row_of("SKILL", 0), row_of("SKILL", 1, settings={"batch_size": 8})])
    with pytest.raises(ValueError, match="different `batch_size`: 4 and 8. They cannot be compared"):
        read_study(results)


def test_missing_directory_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="There is no directory"):
        read_study(tmp_path / "nowhere")


def test_tables_by_hand(results):
    rows = [row_of("SKILL", seed, distance) for seed, distance in ((0, 0.03), (1, 0.05))]
    rows += [row_of("SKILL + by size", 0, 0.02), row_of("DPHuBERT", 0, 0.07), row_of("SKILL + projections", 0, 0.06)]
    longer = " + longer first stage"
    rows += [
        row_of(f"SKILL + projections{change}{longer}", 0, far) for change, far in (("", 0.05), (" + half root", 0.08))
    ]
    rows += [row_of("first apart", 0, 0.04), row_of("first apart + by size", 0, 0.035)]
    rows += [row_of("SKILL + masked", 0) | {"distances_second_speaker": {"cka": [0.625] * 13}}]
    short = Condition("wavlm", 0.9, 60)
    for name, loss in (("", -0.5), (" + rates halved", -0.4), (" + gates halved", -0.6), (" + as published", -0.1)):
        rows += [row_of(f"SKILL{name}", 0, abs(loss), condition=short) | {"held_out": {"end": loss}}]
    write_rows(results, rows)
    blocks = make_blocks(read_study(results), ".")
    assert blocks["second speaker"].splitlines()[2:] == ["| SKILL + masked | 1 | 0.500 | 0.625 |"]
    assert "| SKILL | 0.040 ± 0.014 (2) |" in blocks["distances"]
    assert "| 0.75 | mean distance (1 − CKA) ↓ | DPHuBERT | 1 | +0.040 | 0 of 1 | – | – |" in blocks["against SKILL"]
    assert blocks["options"].splitlines()[4:] == [
        "| *SKILL* | 0.040 ± 0.014 |",
        "| + projections | +0.030 (0 of 1 better, p –) |",
        "| + by size | −0.010 (1 of 1 better, p –) |",
        "| + masked | +0.470 (0 of 1 better, p –) |",
        "| *SKILL + projections + longer first stage* | 0.050 |",
        "| + half root | +0.030 (0 of 1 better, p –) |",
    ]
    assert "| first apart | {0}, {1–6}, {7–12} | 0.040 | 0.035 | – |" in blocks["unequal"]
    assert (
        "| 0.75 | SKILL | 2 | −0.2, −0.2 | −0.600 ± 0.000 | −0.400 ± 0.000 | −0.700 ± 0.000 | 2, 3 |" in blocks["cuts"]
    )
    assert "SKILL's groups: {0–2}, {3–12}." in blocks["layers"]
    (results / "before").mkdir()
    write_rows(results / "before", [row_of("SKILL", seed, distance) for seed, distance in ((0, 0.13), (1, 0.17))])
    far = [row_of(name, 0, distance) for name, distance in (("SKILL", 0.2), ("SKILL + masked", 0.6))]
    (results / "before" / "before").mkdir()
    write_rows(results / "before" / "before", far)
    earlier = make_blocks(read_study(results), ".")
    change = "| 0.75 | mean distance (1 − CKA) ↓ | SKILL | 2 | 0.150 ± 0.028 | −0.110 ± 0.014 | 0.058 |"
    assert change in earlier["against before"]
    assert "| 0.75 | mean distance (1 − CKA) ↓ | SKILL | 1 | 0.200 | −0.070 | – |" in earlier["against the first"]
    assert "| + masked | +0.400 (0 of 1 better, p –) |" in earlier["options of the first"]
    assert earlier["options before"] == NOTHING
    assert "| 0.9 | 60 | −0.500 (1) | −0.100 (1) gates halved | 0.500 (1) | 0.100 (1) |" in blocks["defaults"]


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
    conditions = (WAVLM, Condition("wavlm", 0.9), Condition("hubert", 0.9, 960))
    rows = [
        row_of(name, seed, 0.1 * (seed + 1), condition, **SCORED)
        for name in ("SKILL", "DPHuBERT", "one group")
        for seed in (0, 1)
        for condition in conditions
    ]
    masked = row_of("SKILL + masked", 0) | {"distances_second_speaker": {"cka": [0.5] * 13}}
    short = row_of("SKILL", 0, condition=Condition("wavlm", 0.5, 60)) | {"held_out": {"end": -0.5}}
    rows += [row_of("SKILL + blocks", 0), row_of("first apart", 0), masked, short]
    (results / "before" / "before").mkdir(parents=True)
    for directory in (results, results / "before", results / "before" / "before"):
        write_rows(directory, rows)
    page = all_blocks(tmp_path / "study.md")
    args = DrawArguments(results, page, tmp_path / "pictures" / "of")
    draw_study.run(args)
    filled = page.read_text(encoding="utf-8")
    assert "![Mean distance of each student to its teacher](pictures/of/study_distances.png)" in filled
    assert NOTHING not in filled
    printed = capsys.readouterr().out
    assert all(line in printed for line in filled.splitlines() if not line.startswith("<!--"))
    for picture in draw_study.PICTURES.values():
        assert len((args.figures / picture.file).read_bytes()) < 150_000
    draw_study.run(args)
    assert page.read_text(encoding="utf-8") == filled


@pytest.mark.parametrize("have", ["nothing", "references alone", "a baseline alone", "no references"])
def test_study_that_has_only_begun_is_drawn(have, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    if have != "nothing" and have != "no references":
        write_references(results, {"teacher": REFERENCES["teacher"]})
    if have == "a baseline alone":
        write_rows(results, [row_of("every layer", 0)])
    if have == "no references":
        write_rows(results, [row_of("SKILL", 0), row_of("DPHuBERT", 0)])
    page = all_blocks(tmp_path / "study.md")
    draw_study.run(DrawArguments(results, page, tmp_path))
    rest = {"unequal", "second speaker", "options", "defaults", "against before", "distances before", "options before"}
    rest |= {"against SKILL before", "against the first", "options of the first"}
    empty = {
        "nothing": set(TABLES),
        "references alone": set(TABLES),
        "a baseline alone": {"against SKILL", *rest},
        "no references": {"tasks", *rest},
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
    blocks = make_blocks(read_study(args.results), link_to(args.figures, args.page))
    assert set(re.findall("<!-- study: (.*?) -->", page)) == set(TABLES)
    assert fill(page, blocks) == page, "The results are newer than the page: run examples/study/draw_study.py."
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (args.page.parent / picture).stat().st_size < 150_000
