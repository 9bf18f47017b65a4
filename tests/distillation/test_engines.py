"""Engines of accelerate: FSDP2 on two processes does what DistributedDataParallel does, and so do the ready files."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import TorchDynamoPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from conftest import noise_clips, tiny_teacher
from processes import WITHOUT_GPU, run_by_torchrun, run_in_processes
from test_kills import same
from test_shrinking import CloseGates
from test_skill_trainer import Kill, KillAt, StopAt, make_trainer, use_float16_on_cpus
from test_task_heads import fine_tuned
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModel, TrainerCallback

from skill_hf import SkillTrainingArguments, WavLMForSkillStudent, distribution


FILES = Path(distribution.__file__).with_name("recipes") / "accelerate"


def environment_of(name: str) -> dict[str, str]:
    """What `accelerate launch` sets for the processes with one of the ready files."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FILES / f"{name}.yaml"), "script.py"])
    arguments, *_ = _validate_launch_command(arguments)
    if arguments.num_processes > 1:
        # Its port may be in use, and these processes have their own.
        arguments.main_process_port = 0
        environment = prepare_multi_gpu_env(arguments)
    else:
        _, environment = prepare_simple_launcher_cmd_env(arguments)
    return {key: value for key, value in environment.items() if os.environ.get(key) != value}


def divide_on_cpus() -> None:
    """accelerate uses FSDP on GPUs only, though torch can do it anywhere."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


class Watch(TrainerCallback):
    """What each process holds of the parameters in a step, and of how many."""

    def __init__(self):
        self.held = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        numbers = [(distribution.own_part(parameter).numel(), parameter.numel()) for parameter in model.parameters()]
        self.held.append(tuple(map(sum, zip(*numbers, strict=True))))


# Gates and learned multipliers: all kinds of parameters that FSDP leaves whole.
RECIPE = {"num_clusters": 2, "final_steps": 6, "lagrange_multiplier": "learned", "final_learning_rate": 1e-4}
SHRINKING = {"shrink_steps": 4}  # in steps 4 and 8
WITH_LESS_MEMORY = {"recipe": RECIPE | SHRINKING, "gradient_checkpointing": True}
# Two micro-batches a step, of clips of unequal length: processes and micro-batches have different numbers of frames.
RUN = {
    "max_steps": 20,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 8,
}


def make(output_dir, layout, *callbacks, recipe=RECIPE, teacher=tiny_teacher, **kwargs):
    """`teacher`: makes one or several of a layout."""
    callbacks = [*([CloseGates()] if "shrink_steps" in recipe else []), *callbacks]
    return make_trainer(output_dir, noise_clips(16, 12_000), teacher(layout), recipe, callbacks, **RUN | kwargs)


def train(output_dir, layout, *callbacks, resume=None, **kwargs) -> tuple:
    """A trainer after its run, and what it gave."""
    trainer = make(output_dir, layout, *callbacks, **kwargs)
    evaluations = [] if resume else [trainer.evaluate()["eval_loss"]]
    trainer.train(resume_from_checkpoint=resume)
    evaluations.append(trainer.evaluate()["eval_loss"])
    trainer.save_model(str(output_dir))
    rows = trainer.state.log_history
    result = {
        "weights": trainer.model.state_dict(),
        "losses": [row["distillation_loss"] for row in rows if "distillation_loss" in row],
        "evaluations": evaluations + [row["eval_loss"] for row in rows if "eval_loss" in row],
        "sizes": [row["num_parameters"] for row in rows if "num_parameters" in row],
    }
    return trainer, result


def use_fsdp(**changes: str) -> None:
    os.environ.update(environment_of("fsdp2") | {"ACCELERATE_MIXED_PRECISION": "no"} | changes)
    divide_on_cpus()


def by_data_parallelism(output, number):
    return train(f"{output}/whole", "large", **WITH_LESS_MEMORY)


def by_fsdp(output, number):
    use_fsdp()
    watch = Watch()
    _, whole = train(f"{output}/whole", "large", watch, **WITH_LESS_MEMORY)
    # In stage 1, between both shrinkings.
    with pytest.raises(Kill):
        make(f"{output}/killed", "large", KillAt(7), **WITH_LESS_MEMORY).train()
    _, killed = train(f"{output}/killed", "large", resume=True, **WITH_LESS_MEMORY)
    results = {"whole": whole | {"held": watch.held}, "killed": killed}
    # Where the student shrinks.
    stopped = make(f"{output}/stopped", "large", StopAt(4), save_strategy="no", **WITH_LESS_MEMORY)
    stopped.train()
    results["stopped"] = stopped.state.global_step, [path.name for path in Path(output).glob("stopped/checkpoint-*")]
    # From what processes with another engine have saved: in each stage, and at the cut.
    for step in (12, 14, 18):
        saved = Path(output).parent / "by_data_parallelism" / "whole" / f"checkpoint-{step}"
        other = f"from-{step}"
        trainer, results[other] = train(f"{output}/{other}", "large", resume=str(saved), **WITH_LESS_MEMORY)
    return trainer, results


@pytest.mark.nightly
def test_fsdp_equals_data_parallelism(tmp_path):
    ddp, _ = run_in_processes(by_data_parallelism, tmp_path / "by_data_parallelism", number=2)
    fsdp, others = run_in_processes(by_fsdp, tmp_path / "by_fsdp", number=2)
    whole = fsdp["whole"]
    assert fsdp.pop("stopped") == others.pop("stopped") == (4, ["checkpoint-4"])
    assert whole["losses"] == pytest.approx(ddp["losses"], abs=1e-4)
    assert whole["evaluations"] == pytest.approx(ddp["evaluations"], abs=1e-4)
    assert len(whole["losses"]) == len(whole["held"]) == 20
    for sizes in (ddp["sizes"], whole["sizes"]):
        assert sizes[2] > sizes[5] > sizes[9] > sizes[-1]
    assert sizes[9:] == ddp["sizes"][9:]
    for held, number in whole["held"]:
        assert held < 0.6 * number
    for name, result in fsdp.items():
        torch.testing.assert_close(result["weights"], ddp["weights"], atol=1e-4, rtol=0)
        assert same(result["weights"], others[name]["weights"])
    assert same(fsdp["killed"]["weights"], whole["weights"])
    engines = (tmp_path / "by_fsdp", tmp_path / "by_data_parallelism")
    names, others = [{path.name for path in (run / "whole" / "checkpoint-20").iterdir()} for run in engines]
    assert names == others
    assert type(AutoModel.from_pretrained(tmp_path / "by_fsdp" / "whole")) is WavLMForSkillStudent
    # One process takes over, with the same number of clips in a step.
    resume = str(tmp_path / "by_fsdp" / "whole" / "checkpoint-18")
    trainer, alone = train(
        tmp_path / "alone", "large", recipe=RECIPE | SHRINKING, resume=resume, per_device_train_batch_size=4
    )
    assert trainer.state.global_step == 20
    torch.testing.assert_close(alone["weights"], whole["weights"], atol=1e-3, rtol=0)


def two_teachers(layout: str) -> list:
    return [tiny_teacher(layout), tiny_teacher(layout, hidden_size=24, num_attention_heads=2)]


def classifier(layout: str):
    return fine_tuned("classification", layout)


def without_dropout(layout: str):
    """Compilers draw its noise in another order."""
    return tiny_teacher(layout, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)


# Setting of a run, and of accelerate's file -> how far losses may be from those of data parallelism.
VARIANTS = {
    "bf16": (
        {"bf16": True, "recipe": RECIPE | {"use_projections": True}},
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        1e-3,
    ),
    "fp16": ({"recipe": RECIPE | SHRINKING}, {}, 1e-3),
    "best": ({"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_steps": 8}, {}, 1e-4),
    "defaults": ({"recipe": {"normalize_states": True} | SHRINKING}, {}, 1e-4),
    "two teachers": ({"teacher": two_teachers, "recipe": {"teacher_targets": "separate"}}, {}, 1e-4),
    "a head": ({"teacher": classifier}, {}, 1e-4),
    "compiled": (
        {
            "teacher": without_dropout,
            "recipe": RECIPE | SHRINKING,
            "torch_compile": True,
            "torch_compile_backend": "eager",
            "gradient_checkpointing": True,
        },
        {},
        1e-4,
    ),
}


def by_variant(output, number):
    """The variant is the name of the folder."""
    folder = Path(output)
    settings, changes, _ = VARIANTS[folder.parent.name]
    if folder.name == "fsdp":
        use_fsdp(**changes)
    if folder.parent.name == "fp16":
        use_float16_on_cpus(pytest.MonkeyPatch(), init_scale=2.0**22)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    trainer, result = train(f"{output}/run", "base", **settings)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= len(trainer.model.encoder.layers) if trainer.args.torch_compile else graphs == 0
    scale = trainer.accelerator.scaler and trainer.accelerator.scaler.get_scale()
    assert scale is None or 1 < scale < 2.0**22
    return trainer, result | {"scale": scale}


@pytest.mark.nightly
@pytest.mark.parametrize("variant", VARIANTS)
def test_fsdp_with(tmp_path, variant):
    (tmp_path / variant).mkdir()
    ddp, fsdp = [run_in_processes(by_variant, tmp_path / variant / engine, number=2)[0] for engine in ("ddp", "fsdp")]
    # In half precision the mean: Adam makes whole steps of gates even from gradients that are rounding errors.
    statistic = np.mean if variant in ("bf16", "fp16") else np.max
    for values in ("losses", "evaluations"):
        assert statistic(np.abs(np.subtract(fsdp[values], ddp[values]))) < VARIANTS[variant][-1]
    assert fsdp["scale"] == ddp["scale"]


class Peak(TrainerCallback):
    """The most that a process took in a step, in MiB; Linux only."""

    def __init__(self):
        self.peak = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        Path("/proc/self/clear_refs").write_text("5")

    def on_step_end(self, args, state, control, **kwargs):
        status = Path("/proc/self/status").read_text()
        self.peak = max(self.peak, int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024)


def peak_memory(output, number):
    """Of a large student and clips of half a second, above what a process takes before it has a model."""
    if Path(output).name == "fsdp":
        use_fsdp()
    before, peak = psutil.Process().memory_info().rss / 2**20, Peak()
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 4}
    settings = {"max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    settings["save_strategy"] = "no"
    teacher = tiny_teacher("large", **shape)
    trainer = make_trainer(output, noise_clips(4, 12_000), teacher, RECIPE | {"final_steps": 2}, [peak], **settings)
    trainer.train()
    return trainer, peak.peak - before


@pytest.mark.nightly
def test_processes_of_fsdp_need_less_memory(tmp_path, monkeypatch):
    monkeypatch.setitem(WITHOUT_GPU, "MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is given back
    ddp, fsdp = [max(run_by_torchrun(peak_memory, tmp_path / engine, number=2)) for engine in ("ddp", "fsdp")]
    print(f"DistributedDataParallel {ddp:.0f} MiB, FSDP2 {fsdp:.0f} MiB")
    assert fsdp < 0.75 * ddp


def scale_gradients(output, number):
    """A plain gradient and one that is divided, of which one process's part overflows in the second step."""
    use_fsdp()
    trainer = make(output, "base")
    mesh = init_device_mesh("cpu", (number,))
    plain = torch.nn.Parameter(torch.ones(3))
    divided = torch.nn.Parameter(distribute_tensor(torch.ones(number), mesh))
    optimizer = torch.optim.SGD([plain, divided], lr=1.0)
    scaler = distribution.DividedGradScaler("cpu", init_scale=4.0)
    values = []
    for last in (1.0, float("inf"), 1.0):
        whole = torch.tensor([1.0] * (number - 1) + [last])
        loss = (plain.sum() + (divided * distribute_tensor(whole, mesh)).sum().full_tensor()) / 2
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        values.append((plain.tolist(), divided.full_tensor().tolist(), scaler.get_scale()))
    return trainer, values


@pytest.mark.slow
def test_an_overflow_in_one_process_skips_the_step_in_all(tmp_path):
    results = run_in_processes(scale_gradients, tmp_path / "run", number=2)
    halves = [[0.5] * 3, [0.5] * 2]
    assert results == [[(*halves, 4.0), (*halves, 2.0), ([0.0] * 3, [0.0] * 2, 2.0)]] * 2


# ---- What is refused, and the ready files ----


def test_trainers_of_the_same_arguments_are_compiled_alike():
    accelerator = SimpleNamespace(state=SimpleNamespace(dynamo_plugin=TorchDynamoPlugin(backend="eager")))
    for _ in range(2):
        compiler = distribution.take_compiler(accelerator, "eager", None)
        assert compiler["backend"] == "eager"
        assert accelerator.state.dynamo_plugin.backend == "NO"
    assert distribution.take_compiler(accelerator, None, None) is None
    for settings, message in (
        (("inductor", "reduce-overhead"), "`torch_compile_mode` is reduce-overhead, which records CUDA graphs"),
        (("cudagraphs", None), "`torch_compile_backend` is cudagraphs, which records CUDA graphs"),
    ):
        with pytest.raises(ValueError, match=message):
            distribution.take_compiler(accelerator, *settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is selected, but the cut between the stages rebuilds"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "`parallelism_config` is selected, but only data is divided"),
        ({"FSDP_VERSION": "1"}, "`fsdp_version` is 1, but must be 2: 1 is no longer developed"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "`fsdp_cpu_ram_efficient_loading` is true, but must be false"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "`fsdp_offload_params` is true, but must be false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "`fsdp_activation_checkpointing` is true, but must be false"),
        ({}, "FSDP cannot be used by 1 process.* on cpu: it needs several processes, each with a GPU"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, changes, message):
    for name, value in (environment_of("fsdp2") | {"ACCELERATE_MIXED_PRECISION": "no"} | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as error:
        SkillTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        make(tmp_path, "base")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted(FILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_files(path):
    """accelerate reads each, and starts what its comment and docs/engines.md say."""
    environment = environment_of(path.stem)
    engine = {"fsdp2": "FSDP", "eight_gpus": "MULTI_GPU", "two_nodes": "MULTI_GPU"}.get(path.stem, "NO")
    config = load_config_from_file(str(path))
    assert config.distributed_type == engine and config.num_processes == NUM_PROCESSES[path.stem]
    assert environment["ACCELERATE_MIXED_PRECISION"] == ("no" if path.stem == "cpu" else "bf16")
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (engine == "FSDP")
    # One process must not see several GPUs.
    assert (environment.get("CUDA_VISIBLE_DEVICES") == "0") == (path.stem == "one_gpu")
    assert f"`{path.name}`" in (Path(__file__).parents[2] / "docs" / "engines.md").read_text()


NUM_PROCESSES = {"cpu": 1, "one_gpu": 1, "eight_gpus": 8, "two_nodes": 16, "fsdp2": 8}
