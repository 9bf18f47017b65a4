"""
Time and peak memory of one step of stage 1: ours, as in the trainer, and a peer's.

Each rival runs in a separate process, so memory is measured separately, but only one runs at a time: they take turns
step by step.
"""

import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
import torch
from compared_models import halfway_config, make_teacher, num_parameters, pruned_config, random_weights
from dphubert_clone import DPHuBERT, TrainingStep
from inference import Case
from memory import memory_bytes
from operators import end_profile, start_profile
from torch import nn
from transformers import TrainerCallback, Wav2Vec2FeatureExtractor, WavLMModel

from skill_hf import SkillConfig, SkillDistillationTrainer, SkillTrainingArguments, WavLMForSkillStudent
from skill_hf.compression.macs import count_macs
from skill_hf.data import SpeechCollator
from skill_hf.models.families import build_student


NUM_GROUPS = 4
# Those of the published recipe; learning rate and target sparsity follow from them, and no run gets that far.
MAX_STEPS = 75_000


@dataclass(frozen=True)
class Rival:
    """
    Args:
        name (`str`): as in the tables.
        kind (`str`): `skill`, ours; `dphubert`, its own code; `plain`, stock models without gates.
        size (`str`): `unpruned`, `halfway` or `pruned`, what the student has left before gates are added.
        checkpointing (`bool`): whether activations are computed a second time instead of kept.
        compiled (`bool`): whether the trainer compiles what it trains.
    """

    name: str
    kind: str
    size: str = "unpruned"
    checkpointing: bool = False
    compiled: bool = False


RIVALS = (
    Rival("skill", "skill"),
    Rival("skill, saving memory", "skill", checkpointing=True),
    Rival("skill, halfway", "skill", size="halfway"),
    Rival("skill, pruned", "skill", size="pruned"),
    Rival("skill, compiled", "skill", compiled=True),
)
DPHUBERT = Rival("dphubert", "dphubert")
PLAIN = Rival("plain peer", "plain")


@dataclass(frozen=True)
class Settings:
    """What all rivals share; picklable, as each is a process."""

    teacher: str | None
    pruned: str  # a shape's name, or the directory of a student
    dphubert: str | None
    device: str
    threads: int
    case: Case
    precision: str
    runs: int
    warmup: int
    seed: int
    profile: bool = False
    compiler: str = "inductor"

    @property
    def steps(self) -> int:
        """Those that are timed, and one more to be profiled."""
        return self.warmup + self.runs + self.profile


def measure_training(settings: Settings, rivals: list[Rival], peaks: dict) -> Iterator[dict]:
    """
    A row for each rival. `ratio` is its time over that of the first rival, the peer, and `memory_ratio` the same of
    peak memory; `profile` says which operators take the time of one more step, if `settings` ask for it.

    Args:
        settings (`Settings`): of this precision.
        rivals (`list[Rival]`): the first is the peer.
        peaks (`dict`): as in inference.
    """
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    try:
        for rival in rivals:
            connections[rival.name], theirs = context.Pipe()
            processes.append(context.Process(target=run_rival, args=(rival, settings, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            connections[rival.name].recv()  # built, before the next one is
        seconds = {rival.name: [] for rival in rivals}
        for _ in range(settings.steps):
            for name, connection in connections.items():
                connection.send("step")
                seconds[name].append(connection.recv())
        results = {}
        for name, connection in connections.items():
            connection.send("end")
            results[name] = connection.recv()
    except (EOFError, BrokenPipeError):
        raise RuntimeError("A rival of the training step has ended early; its error stands above.") from None
    finally:
        for process in processes:
            process.terminate()
            process.join()
    peer_median, peer_memory = None, None
    for rival in rivals:
        counted, result = seconds[rival.name][settings.warmup :][: settings.runs], results[rival.name]
        middle, memory = median(counted), result["peak_bytes"]
        peer_median, peer_memory = peer_median or middle, peer_memory or memory
        peak = peaks["flops"].get(settings.precision)
        yield {
            "case": str(settings.case),
            "rival": rival.name,
            "kind": rival.kind,
            "size": rival.size,
            "checkpointing": rival.checkpointing,
            "compiled": rival.compiled,
            "precision": settings.precision,
            **result,
            "seconds": counted,
            "median": middle,
            "ratio": middle / peer_median,
            "memory_ratio": memory / peer_memory,
            "bound": 2 * result["macs"] / peak,
            "share_of_flops": 2 * result["macs"] / peak / middle,
        }


def is_of_stage(row: dict) -> bool:
    """Whether a row is of our rival at a size that a stage goes through, with the other settings as usual."""
    # Results of before there was a compiled rival do not say that theirs are not.
    return row["kind"] == "skill" and not row["checkpointing"] and not row.get("compiled", False)


def average_over_stage(rows: list[dict], schedule: list[tuple[float, float]], steps: int = 1000) -> float:
    """
    Mean seconds of a step over a stage in which the student shrinks.

    Args:
        rows (`list[dict]`): those that `is_of_stage`, in one precision.
        schedule (`list[tuple[float, float]]`): pairs of the share of the stage that is over and the share of the
            teacher's parameters that the student has left then, with straight lines between them.
        steps (`int`): points of the stage that are averaged over.

    Between the sizes that were measured, and no farther, time is taken to be linear in the number of parameters.
    """
    sizes = sorted((row["student_parameters"] / row["teacher_parameters"], row["median"]) for row in rows)
    times, shares = zip(*sorted(schedule), strict=True)
    left = np.interp((np.arange(steps) + 0.5) / steps, times, shares)
    return float(np.interp(left, *zip(*sizes, strict=True)).mean())


def run_rival(rival: Rival, settings: Settings, connection: Connection) -> None:
    """The process of one rival: builds it, then makes a step and sends its seconds whenever it is told to."""
    start_bytes = memory_bytes("VmRSS")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    teacher = make_teacher(settings.teacher, settings.seed)
    student = _make_student(rival, settings, teacher)
    result = {
        "start_bytes": start_bytes,  # of interpreter and libraries, part of the peak on a CPU
        "teacher_parameters": num_parameters(teacher),
        "student_parameters": num_parameters(student),
        # Forward of the teacher; forward of the student, and twice that backward.
        "macs": settings.case.clips
        * (count_macs(teacher, settings.case.seconds) + 3 * count_macs(student, settings.case.seconds)),
    }
    steps = {"skill": skill_steps, "dphubert": dphubert_steps, "plain": plain_steps}[rival.kind]
    baton = Baton(connection, device, settings)
    steps(rival, settings, teacher, student, device, baton)
    connection.send(result | {"peak_bytes": baton.peak_bytes or _peak_bytes(device), "profile": baton.profile})


class Baton:
    """
    A rival's side of the turns: waits to be told to step, sends how long it took, and holds still till the end. The
    last step is profiled if the settings ask for it; the peak of memory is that before it.
    """

    def __init__(self, connection: Connection, device: torch.device, settings: Settings):
        self.connection, self.device, self.steps = connection, device, settings.steps
        self.num_done = 0
        self.peak_bytes = self.profile = None
        self._profiled_step = self.steps - 1 if settings.profile else None
        self._started = self._profiler = None

    def wait(self) -> None:
        if not self.num_done:
            self.connection.send("built")
        self.connection.recv()
        if self.num_done == self._profiled_step:
            self.peak_bytes = _peak_bytes(self.device)
            self._profiler = start_profile(self.device)
        self._started = self._now()

    def done(self) -> None:
        start, end = self._started, self._now()
        if self._profiler is not None:
            self.profile = end_profile(self._profiler, self.device)
        if self.device.type == "cuda":
            end.synchronize()
            self.connection.send(start.elapsed_time(end) / 1000)
        else:
            self.connection.send(end - start)
        self.num_done += 1
        if self.num_done == self.steps:
            self.connection.recv()

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class TakeTurns(TrainerCallback):
    """Has the real loop of the trainer wait before each step and tell its time after it."""

    def __init__(self, baton: Baton):
        self.baton = baton

    def on_step_begin(self, args, state, control, **kwargs):
        self.baton.wait()

    def on_step_end(self, args, state, control, **kwargs):
        self.baton.done()
        control.should_training_stop = self.baton.num_done == self.baton.steps


def skill_steps(rival, settings, teacher, student, device, baton) -> None:
    """Steps of [`SkillDistillationTrainer`] in its own loop, from the batch to the optimizer."""
    groups = [group.tolist() for group in np.array_split(np.arange(teacher.config.num_hidden_layers + 1), NUM_GROUPS)]
    feature_extractor = Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    clip = {"max_seconds": settings.case.seconds, "min_seconds": settings.case.seconds}
    rows = settings.case.noise(settings.seed, torch.device("cpu")).numpy()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = SkillDistillationTrainer(
            teacher=teacher,
            model=student,
            skill_config=SkillConfig(layer_groups=groups, use_projections=True),  # as the peers have them
            args=SkillTrainingArguments(
                output_dir=output_dir,
                max_steps=MAX_STEPS,
                per_device_train_batch_size=settings.case.clips,
                bf16=settings.precision == "bf16",
                gradient_checkpointing=rival.checkpointing,
                torch_compile_backend=settings.compiler if rival.compiled else None,
                use_cpu=device.type == "cpu",
                dataloader_pin_memory=device.type == "cuda",
                seed=settings.seed,
                logging_steps=MAX_STEPS,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=[{"input_values": row} for _ in range(settings.steps) for row in rows],
            processing_class=feature_extractor,
            data_collator=SpeechCollator(feature_extractor, **clip),
            callbacks=[TakeTurns(baton)],
        )
        trainer.train()


def dphubert_steps(rival, settings, teacher, student, device, baton) -> None:
    """Steps of DPHuBERT's module, with its models, gates and loss."""
    clone = DPHuBERT(settings.dphubert)
    step = clone.build_training_step(
        clone.build(teacher).to(device), clone.build(student, gates=True).to(device), _single_layers(teacher)
    )
    step.module.to(device)
    _take_steps(step, settings, device, baton)


def plain_steps(rival, settings, teacher, student, device, baton) -> None:
    """
    Steps of stock models: a frozen teacher, a student with all its weights, all hidden states of both; L1 and cosine
    between four layers, AdamW. It has no gates.
    """
    stock = WavLMModel(teacher.config)
    stock.load_state_dict(teacher.state_dict())
    stock.config.apply_spec_augment = False
    stock.config.layerdrop = 0.0
    module = PlainPeer(teacher.requires_grad_(False), stock, _single_layers(teacher)).to(device)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    _take_steps(TrainingStep(module, torch.optim.AdamW(parameters, lr=2e-4)), settings, device, baton)


class PlainPeer(nn.Module):
    """Distils four layers of a stock model into another."""

    global_step = 0

    def __init__(self, teacher: WavLMModel, student: WavLMModel, layers: list[int]):
        super().__init__()
        self.teacher, self.student, self.layers = teacher.eval(), student.train(), layers
        size = teacher.config.hidden_size
        self.projections = nn.ModuleList(nn.Linear(size, size) for _ in layers)

    def training_step(self, batch, batch_index):
        input_values, _ = batch
        with torch.no_grad():
            targets = self.teacher(input_values, output_hidden_states=True).hidden_states
        hidden_states = self.student(input_values, output_hidden_states=True).hidden_states
        loss = 0
        for layer, projection in zip(self.layers, self.projections, strict=True):
            prediction, target = projection(hidden_states[layer]), targets[layer]
            cosine = nn.functional.cosine_similarity(prediction, target, dim=-1).mean()
            loss = loss + nn.functional.l1_loss(prediction, target) - cosine
        return loss / len(self.layers)


def _make_student(rival: Rival, settings: Settings, teacher: WavLMModel) -> WavLMForSkillStudent:
    if rival.size == "unpruned":
        return build_student(teacher)
    config = read_pruned_config(settings.pruned, teacher.config)
    if rival.size == "halfway":
        config = halfway_config(teacher.config, config)
    return random_weights(WavLMForSkillStudent(config), settings.seed).train()


def read_pruned_config(pruned: str, teacher_config):
    """Of a student in a directory, or of a shape that has a name."""
    if Path(pruned).is_dir():
        return WavLMForSkillStudent.config_class.from_pretrained(pruned)
    return pruned_config(pruned, teacher_config)


def _single_layers(teacher: WavLMModel) -> list[int]:
    """The layers of DPHuBERT's recipe: 0, 4, 8 and 12 of 12."""
    return [round(layer) for layer in np.linspace(0, teacher.config.num_hidden_layers, NUM_GROUPS)]


def _take_steps(step: TrainingStep, settings: Settings, device: torch.device, baton: Baton) -> None:
    input_values = settings.case.noise(settings.seed, torch.device("cpu"))
    for _ in range(settings.steps):
        autocast = contextlib.nullcontext()
        if settings.precision == "bf16":
            autocast = torch.autocast(device.type, dtype=torch.bfloat16)
        baton.wait()
        step(input_values.to(device), autocast)
        baton.done()


def _peak_bytes(device: torch.device) -> int:
    """Most memory of this process so far: of the device, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory_bytes("VmHWM")
