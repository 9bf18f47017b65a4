"""Cost of clustering: `layer_similarity` compared with a plain forward pass of the teacher on the same audio."""

from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from inference import Case
from stopwatch import take_turns
from transformers import WavLMModel

from skill_hf import layer_similarity
from skill_hf.distillation.teacher import fast_teacher


BATCH_SIZE = 8


def measure_clustering(
    teacher: WavLMModel, case: Case, measures: list[str], device: torch.device, runs: int, warmup: int, seed: int
) -> Iterator[dict]:
    """
    A row for each measure; `ratio` is its time over that of the stock teacher's bare forward. The teacher is clustered
    as the trainer does it, in the student's faster forward.
    """
    fast = fast_teacher(teacher)
    clips = case.noise(seed, torch.device("cpu"))
    audio = list(clips.numpy())

    @torch.no_grad()
    def forward():
        for batch in clips.split(BATCH_SIZE):
            teacher(batch.to(device))

    def cluster(measure):
        layer_similarity(fast, audio, similarity=measure, batch_size=BATCH_SIZE, progress=False)

    calls = {"forward": forward} | {measure: partial(cluster, measure) for measure in measures}
    taken = take_turns(calls, runs, warmup, device)
    bare = median(taken["forward"])
    for name, seconds in taken.items():
        middle = median(seconds)
        yield {"case": str(case), "measure": name, "seconds": seconds, "median": middle, "ratio": middle / bare}
