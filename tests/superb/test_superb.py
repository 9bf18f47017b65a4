import pytest

from skill_hf.superb import METRICS, PUBLISHED, MeasuredTask, comparison_table, results_page, superb_score


# As the benchmark and the projects print them.
SCORES = {
    "WavLM Large": 1145,
    "WavLM Base+": 1106,
    "HuBERT Base": 941,
    "DPWavLM": 926,
    "LightHuBERT small": 901,
    "STaRHuBERT-L": 896,
    "STaRHuBERT": 887,
    "DPHuBERT": 866,
    "ARMHuBERT-S": 828,
    "DistilHuBERT": 717,
}


def test_score_reproduces_the_published_ones():
    assert {row.name for row in PUBLISHED} == SCORES.keys()
    for row in PUBLISHED:
        # Printed rounded by some, cut off by others.
        assert superb_score(row.results) == pytest.approx(SCORES[row.name], abs=1), row.name


def test_floor_scores_0_and_best_1000():
    assert superb_score({name: metric.floor for name, metric in METRICS.items()}) == pytest.approx(0)
    assert superb_score({name: metric.best for name, metric in METRICS.items()}) == pytest.approx(1000)
    # Two metrics of one task weigh as much as one of another.
    half = {name: metric.best if metric.task == "sf" else metric.floor for name, metric in METRICS.items()}
    assert superb_score(half) == pytest.approx(100)
    half["sf_f1"] = METRICS["sf_f1"].floor
    assert superb_score(half) == pytest.approx(50)


def test_missing_and_unknown_metrics_are_named():
    results = PUBLISHED[0].results
    with pytest.raises(ValueError, match="lack pr_per, sd_der"):
        superb_score({name: value for name, value in results.items() if name not in ("pr_per", "sd_der")})
    with pytest.raises(ValueError, match="no metric ks_acc;"):
        superb_score(results | {"ks_acc": 1.0})


def page_rows(name: str, superb_data: bool) -> list[str]:
    page = results_page(name, [MeasuredTask({"ks_accuracy": 95.5}, "data", superb_data), MeasuredTask({}, "other")])
    assert "| KS acc ↑ | 95.50 | data |" in page.splitlines()
    names = {row.name for row in PUBLISHED} | {f"**{name}**"}
    return [line for line in page.splitlines() if line.split(" | ")[0].strip("| ") in names]


def test_table_sets_a_model_beside_the_published_ones():
    between = PUBLISHED[3].results | {"ks_accuracy": 96.0}
    lines = comparison_table("mine", between, 23.6).splitlines()
    assert len(lines) == 2 + len(PUBLISHED) + 1
    assert len({line.count("|") for line in lines}) == 1
    names = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert names.index("**mine**") == names.index("DPWavLM") + 1
    assert "| 23.6 | " in lines[2 + names.index("**mine**")]
    assert page_rows(name="mine", superb_data=False) == []
    assert len(page_rows(name="mine", superb_data=True)) == len(PUBLISHED) + 1
    partial = comparison_table("mine", {"ks_accuracy": 95.5}).splitlines()[2]
    assert partial.startswith("| **mine** | – | – | 95.50 | – |")
