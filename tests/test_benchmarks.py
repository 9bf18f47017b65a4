"""`benchmarks/run_benchmarks.py`: the real command on tiny models, and the pruned shapes. No time is asserted."""

import json
import math
import sys
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
from conftest import tiny_teacher
from example_helpers import FEW_CONVOLUTIONS
from transformers import WavLMConfig, WavLMModel

from skill_hf import WavLMForSkillStudent, WavLMSkillStudentConfig
from skill_hf.compression.macs import count_macs
from skill_hf.models.families import build_student


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import compared_models  # noqa: E402
import operators  # noqa: E402
import predict_cost  # noqa: E402
import run_benchmarks  # noqa: E402
import shrinking  # noqa: E402
import tables  # noqa: E402
import training_step  # noqa: E402
from machine import memory_traffic  # noqa: E402


RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
TINY_PEAKS = ["--gemm_sizes", "64", "--copied_megabytes", "1", "--threads", "1", "--runs", "3", "--warmup", "1"]


def save_models(directory, layers=3, **kwargs) -> dict[str, str]:
    """A tiny teacher and a pruned student, whose layer 1 has no attention and layer 2 no feed-forward block."""
    teacher = tiny_teacher(num_hidden_layers=layers, **kwargs)
    teacher.save_pretrained(directory / "teacher")
    left = {
        "conv_dim": [5, 16, 6, 7, 16, 8, 11][: len(teacher.config.conv_dim)],
        "remaining_heads": [[1, 3], [], [0, 1, 2, 3]][:layers],
        "intermediate_sizes": [5, 48, 0][:layers],
        "removed_attention_blocks": [1] if layers > 1 else [],
        "removed_ffn_blocks": [2] if layers > 2 else [],
    }
    fields = build_student(teacher).config.to_dict()
    WavLMForSkillStudent(WavLMSkillStudentConfig(**fields | left)).save_pretrained(directory / "pruned")
    return {"teacher": str(directory / "teacher"), "pruned": str(directory / "pruned")}


@pytest.fixture
def directories(tmp_path) -> dict[str, str]:
    return save_models(tmp_path)


def run(directories, tmp_path, *arguments) -> dict:
    """Results as the file has them."""
    output = tmp_path / "benchmarks.json"
    models = ["--teacher", directories["teacher"], "--models", directories["pruned"], "--pruned", "none"]
    returned = run_benchmarks.main([*models, *TINY_PEAKS, "--output", str(output), *arguments])
    results = json.loads(output.read_text(encoding="utf-8"))
    assert results == json.loads(json.dumps(returned))
    return results


def test_inference_and_clustering(directories, tmp_path, capsys):
    arguments = ["--cases", "1x0.5", "2x1", "--modes", "eager", "--clustering_case", "3x0.5", "--profile"]
    results = run(directories, tmp_path, "--parts", "inference", "clustering", *arguments)

    assert [row["name"] for row in results["models"]] == ["stock", "student", "pruned"]
    assert (
        results["models"][0]["parameters"] == results["models"][1]["parameters"] > results["models"][2]["parameters"]
    )
    rows = {(row["case"], row["model"], row["precision"]): row for row in results["inference"]}
    assert set(rows) == {
        (case, model, precision)
        for case in ("1x0.5", "2x1")
        for model in ("stock", "student", "pruned")
        for precision in ("fp32", "bf16")
    }
    for (case, _, precision), row in rows.items():
        assert len(row["seconds"]) == 3 and row["median"] == median(row["seconds"])
        assert row["ratio"] == rows[case, "stock", "fp32"]["median"] / row["median"]
        assert row["bound"] == 2 * row["macs"] / results["peaks"]["flops"][precision]
        assert row["share_of_flops"] == pytest.approx(row["bound"] / row["median"])
        assert row["traffic_bytes"] > 0
    model = WavLMModel.from_pretrained(directories["teacher"])
    assert rows["2x1", "stock", "fp32"]["macs"] == 2 * count_macs(model, 1.0)

    bare, cka = results["clustering"]
    assert (bare["measure"], bare["ratio"], cka["measure"]) == ("forward", 1, "cka")
    assert cka["ratio"] == median(cka["seconds"]) / median(bare["seconds"])

    assert len(results["profiles"]) == 6
    assert {"convolutions", "matrix products", "norms"} <= set(results["profiles"][0]["groups"])
    assert results["machine"]["threads"] == 1 and results["settings"]["seed"] == 0
    printed = capsys.readouterr().out
    for title in ("Models", "Inference", "Clustering", "Profile of stock, bf16 eager, 1x0.5"):
        assert f"### {title}" in printed
    assert len([line for line in printed.splitlines() if line.startswith("| 2x1 | ")]) == 6


@pytest.mark.nightly
def test_compiled_and_int8(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    # Whether inductor compiles students is tested where they are.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    directories = save_models(tmp_path, layers=1, **FEW_CONVOLUTIONS)
    arguments = ["--cases", "1x0.5", "--precisions", "fp32", "int8", "--modes", "compiled", "onnx", "--only", "pruned"]
    results = run(directories, tmp_path, "--parts", "inference", "--profile", *arguments)
    forms = [(row["model"], row["precision"], row["mode"]) for row in results["inference"]]
    assert forms == [
        ("stock", "fp32", "eager"),
        ("pruned", "fp32", "compiled"),
        ("pruned", "fp32", "onnx"),
        ("pruned", "int8", "onnx"),
    ]
    *_, onnx, int8 = results["inference"]
    assert onnx["bound"] > 0 and int8["bound"] is None and int8["traffic_bytes"] is None

    profiles = {(row["model"], row["precision"], row["mode"]): row for row in results["profiles"]}
    files = [("pruned", precision, "onnx") for precision in ("fp32", "int8")]
    assert set(profiles) == {("stock", precision, "onnx") for precision in ("fp32", "int8")} | set(files)
    in_floats, in_integers = ({one["name"]: one for one in profiles[form]["operators"]} for form in files)
    assert in_floats["Conv"]["group"] == "convolutions" and in_floats["Conv"]["calls"] == 3
    assert in_integers["Conv"]["calls"] == 2
    for form in files:
        assert 0 < sum(profiles[form]["groups"].values()) < 10
        assert {"convolutions", "matrix products", "activations", "norms"} <= set(profiles[form]["groups"])


def test_quick_compiles_nothing():
    args = run_benchmarks.BenchmarkArguments(quick=True)
    assert args.modes == ["eager"]
    compiled = {rival.name: rival.compiled for rival in training_step.RIVALS}
    assert [compiled[name] for name in args.training_rivals] == [False] * 4


@pytest.mark.nightly
def test_training_step(directories, tmp_path, capsys):
    rivals = ["--training_rivals", "skill, pruned", "skill, compiled", "--training_compiler", "eager"]
    arguments = ["--training_case", "2x0.5", *rivals, "--profile"]
    results = run(directories, tmp_path, "--parts", "training", "--training_precisions", "fp32", *arguments)
    rows = {row["rival"]: row for row in results["training"]}
    assert list(rows) == ["plain peer", "skill, pruned", "skill, compiled"]
    assert [row["compiled"] for row in rows.values()] == [False, False, True]
    peer = rows["plain peer"]
    for row in rows.values():
        assert len(row["seconds"]) == 3
        assert row["ratio"] == median(row["seconds"]) / median(peer["seconds"])
        assert row["memory_ratio"] == row["peak_bytes"] / peer["peak_bytes"]
        assert 0 < row["start_bytes"] < row["peak_bytes"]
    teacher, pruned = (peer["teacher_parameters"], rows["skill, pruned"]["student_parameters"])
    assert pruned == compared_models.num_parameters(WavLMForSkillStudent.from_pretrained(directories["pruned"]))
    assert peer["student_parameters"] == teacher > pruned
    printed = capsys.readouterr().out
    assert "| 2x0.5 | skill, pruned | fp32 |" in printed
    assert [(row["model"], row["mode"]) for row in results["profiles"]] == [
        ("plain peer", "training step"),
        ("skill, pruned", "training step"),
        ("skill, compiled", "training step"),
    ]
    for row in results["profiles"]:
        assert {"convolutions", "matrix products", "optimizer"} <= set(row["groups"])
    assert "### Profile of skill, pruned, fp32 training step, 2x0.5" in printed


def test_pruned_shapes():
    config = WavLMConfig(**compared_models.BASE_PLUS)
    sizes = {}
    with torch.device("meta"):
        teacher_macs = count_macs(WavLMModel(config), 10.0)
        for name in compared_models.PRUNED_SHAPES:
            model = WavLMForSkillStudent(compared_models.pruned_config(name, config))
            sizes[name] = (compared_models.num_parameters(model), count_macs(model, 1.0), count_macs(model, 10.0))
    # DPWavLM has 23 586 325 parameters and 2.8 times fewer MACs; DiariZen's paper gives its own.
    assert sizes["parameters-75"][0] == pytest.approx(23_586_325, rel=1e-4)
    assert sizes["parameters-75"][1] == pytest.approx(6.915e9 / 2.8, rel=1e-3)
    assert sizes["diarizen-s80"][0] == pytest.approx(18.87e6, rel=1e-3)
    assert sizes["diarizen-s80"][1] == pytest.approx(1.134e9, rel=1e-3)
    assert sizes["macs-75"][2] / teacher_macs == pytest.approx(0.25, abs=5e-4)


def test_halfway_is_in_the_middle():
    config = WavLMConfig(**compared_models.BASE_PLUS)
    pruned = compared_models.pruned_config("diarizen-s80", config)
    halfway = compared_models.halfway_config(config, pruned)
    assert halfway.conv_dim[0] == (90 + 512) // 2
    assert [len(heads) for heads in halfway.remaining_heads][:2] + halfway.intermediate_sizes[:1] == [7, 7, 1869]
    assert (pruned.removed_attention_blocks, halfway.removed_attention_blocks) == ([8, 9], [])


def test_average_over_a_stage():
    rows = [
        {"teacher_parameters": 100, "student_parameters": size, "median": seconds}
        for size, seconds in ((100, 4.0), (50, 3.0), (25, 1.0))
    ]
    average = training_step.average_over_stage
    assert average(rows, [(0, 1), (1, 1)]) == 4
    assert average(rows, [(0, 0.1), (1, 0.1)]) == 1  # smaller than any that was measured
    # Half of the stage from 4 to 3 seconds, half from there to 1.
    assert average(rows, [(0, 1), (0.5, 0.5), (1, 0.25)]) == pytest.approx((3.5 + 2) / 2)


def test_stage_that_shrinks_in_another_shape():
    rows = [
        {"student_parameters": size, "median": seconds, "checkpointing": checkpointing}
        for size, seconds, checkpointing in ((100, 8.0, False), (100, 4.0, False), (100, 6.0, True), (50, 2.0, False))
    ]
    rows = [row | {"teacher_parameters": 100, "precision": "fp32", "kind": "skill"} for row in rows]
    rows.append(rows[1] | {"median": 1.0, "compiled": True})
    run = {"stage_1": [{"step": 5, "num_parameters": 10}, {"step": 10, "num_parameters": 5}]}
    # Of 8 seconds of the peer: half of the stage at 4, then from there to 2.
    assert shrinking.stage_in_another_shape(run, 10, rows) == pytest.approx((4 + 3) / 2 / 8)


def test_summary_of_runs_with_and_without_shrinking():
    runs = [
        {"seed": seed, "shrink_steps": steps, "stage_1_seconds": seconds, "eval_distillation_loss": loss}
        for seed, steps, seconds, loss in ((0, 0, 10.0, 1.0), (0, 5, 6.0, 1.2), (1, 0, 20.0, 2.0), (1, 5, 10.0, 1.9))
    ]
    summary = shrinking.summarise([*runs, runs[1] | {"seed": 2}])  # whose other run is still to come
    assert summary[5]["time_ratio"]["mean"] == pytest.approx((0.6 + 0.5) / 2)
    assert summary[5]["loss_difference"]["mean"] == pytest.approx((0.2 - 0.1) / 2)
    assert summary[0]["loss_difference"] == {"mean": 0, "std": 0}


def test_memory_traffic_counts_what_is_read_and_written():
    left, right = torch.ones(10, 20), torch.ones(20, 30)
    assert memory_traffic(lambda: left @ right) == 4 * (200 + 600 + 300)
    assert memory_traffic(lambda: left.t().unsqueeze(0)) == 0
    assert memory_traffic(lambda: left + left) == 4 * (200 + 200)  # read once


@pytest.mark.parametrize(
    "name, group",
    [
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::addmm", "matrix products"),
        ("aten::gelu", "activations"),
        ("aten::native_group_norm", "norms"),
        ("aten::copy_", "copies"),
        ("aten::add", "other"),
        ("## Call CompiledFxGraph fmmconv ##", "compiled"),
    ],
)
def test_groups_of_operators(name, group):
    assert operators.group_of(name) == group


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cases", "4-10"], "clips x seconds such as 4x10, but is `4-10`"),
        (["--parts", "speed"], "`--parts` must be some of inference, training, clustering, but holds `speed`"),
        (["--runs", "0"], "`--runs` must be at least 1, but is 0"),
        (["--schedule", "0:2"], "`--schedule` must be pairs of shares"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        run_benchmarks.main(arguments)


def test_unknown_names(directories, tmp_path):
    with pytest.raises(ValueError, match="`--only` names other; there are stock, student, pruned"):
        run(directories, tmp_path, "--parts", "inference", "--only", "other")
    with pytest.raises(ValueError, match="`--dphubert`"):
        run(directories, tmp_path, "--parts", "inference", "--dphubert", str(tmp_path))
    with pytest.raises(ValueError, match="is one of WavLM Base\\+, and the teacher is not"):
        run(directories, tmp_path, "--parts", "inference", "--pruned", "macs-75")


@pytest.mark.parametrize(
    "name",
    [
        "batches.json",
        "batches10.json",
        "compiled.json",
        "compiled_step.json",
        "forward.json",
        "forward_h200.json",
        "fused.json",
        "int8.json",
        "int8_fused.json",
        "long.json",
        "step.json",
        "step_h200.json",
    ],
)
def test_the_page_says_what_the_results_say(name):
    page = (RESULTS.parents[1] / "docs" / "speed.md").read_text(encoding="utf-8")
    results = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    measured = [part for part in ("inference", "training", "stages", "clustering") if results[part]]
    assert measured
    for part in measured:
        title, _, table = tables.DRAWN[part](results[part]).partition("\n\n")
        assert table in page, title
    assert tables.render(results).splitlines()[0] in page  # the machine, versions and seed


def test_the_page_has_the_predicted_cost(capsys):
    assert predict_cost.main(["--measured", str(RESULTS / "step_h200.json")]) == 0
    _, _, printed = capsys.readouterr().out.strip().partition("\n\n")
    assert printed in (RESULTS.parents[1] / "docs" / "speed.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_prediction_of_the_measured_batch_is_what_was_measured(precision):
    results = json.loads((RESULTS / "step_h200.json").read_text(encoding="utf-8"))
    base = predict_cost.build("WavLM Base+")
    measured = predict_cost.Measured.read(results, precision, base)
    (row,) = (row for row in results["training"] if row["rival"] == "skill" and row["precision"] == precision)
    least, most = measured.step(base, 160.0)
    assert 0.97 * least <= row["median"] <= 1.03 * most
    assert least == pytest.approx(most, rel=0.03)
    assert measured.memory(base, 160.0) == pytest.approx(row["peak_bytes"], rel=0.01)


def test_results_without_steps_are_named(tmp_path, capsys):
    (tmp_path / "forward.json").write_text((RESULTS / "forward_h200.json").read_text(encoding="utf-8"))
    assert predict_cost.main(["--measured", str(tmp_path / "forward.json")]) == 2
    assert "forward.json has no measured training steps" in capsys.readouterr().err


def test_the_page_says_where_a_step_goes():
    page = (RESULTS.parents[1] / "docs" / "speed.md").read_text(encoding="utf-8")
    results = json.loads((RESULTS / "step.json").read_text(encoding="utf-8"))
    shares = [
        {
            group: f"{seconds / sum(row['groups'].values()):.0%}".replace("%", " %")
            for group, seconds in row["groups"].items()
        }
        for row in results["profiles"]
    ]
    assert f"| group | {' | '.join(row['model'] for row in results['profiles'])} |" in page
    for group in shares[0]:
        assert f"| {group} | {' | '.join(row[group] for row in shares)} |" in page


def test_the_page_says_what_units_cost():
    page = " ".join((RESULTS.parents[1] / "docs" / "speed.md").read_text(encoding="utf-8").split())
    costs = json.loads((RESULTS / "latency.json").read_text(encoding="utf-8"))
    picoseconds, errors = costs["picoseconds"], costs["errors"]
    channels = [1, *[512] * 7]
    parts = {
        "convolutions": sum(map(math.prod, zip(channels, channels[1:], picoseconds["channel_pairs"], strict=False)))
        + 512 * sum(picoseconds["conv_channels"]),
        "attention": 12 * (12 * picoseconds["attention_heads"] + picoseconds["any_head"]),
        "feed-forward": 12 * (3072 * picoseconds["ffn_dims"] + picoseconds["any_ffn_dim"]),
        "what no gate changes": picoseconds["fixed"],
    }
    whole = sum(parts.values()) + 512 * picoseconds["projection"]
    for part, cost in parts.items():
        assert f"| {part} | {100 * cost / whole:.0f} % |" in page
    second, last = (picoseconds["channel_pairs"][index] / 1e6 for index in (1, -1))
    assert f"{second:.2f} us for a pair of channels of the second convolution, {last:.2f} us of the last |" in page
    head, heads, units, block = (
        picoseconds[name] / 1e9 for name in ("attention_heads", "any_head", "ffn_dims", "any_ffn_dim")
    )
    assert f"{head:.1f} ms for a head, {heads:.1f} ms for what the heads of a layer share |" in page
    assert f"{100 * units:.1f} ms for 100 units, {block:.1f} ms for the rest of a block |" in page
    heldout = errors["heldout"]
    assert f"{heldout['mean']:.1f} % off on average and {heldout['worst']:.1f} % at worst" in page
    assert f"the unpruned model {errors['unpruned']:.1f} %. " in page
    fitted = errors["fitted"]
    assert f"({fitted['mean']:.1f} % off on average, {fitted['worst']:.1f} % at worst)" in page


def test_the_page_says_what_shrinking_came_to(capsys):
    page = (RESULTS.parents[1] / "docs" / "speed.md").read_text(encoding="utf-8")
    result, step = (
        json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in ("shrinking.json", "step.json")
    )
    shrinking.print_result(result, step["training"])
    assert capsys.readouterr().out.rstrip() in page
    assert result["summary"] == json.loads(json.dumps(shrinking.summarise(result["runs"])))
