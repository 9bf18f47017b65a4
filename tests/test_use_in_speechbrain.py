"""
A student in SpeechBrain's wrapper, and `examples/use_in_speechbrain.py`: the real package, from the package index, in
processes of their own.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import padded_batch
from example_helpers import DEMO
from hub_server import HubServer
from package_index import REQUESTS, install
from speech_toolkits import (
    TESTS,
    TORCHAUDIO_EXTENSIONS,
    assert_close,
    outputs,
    padded_clips,
    run,
    save_speech,
    save_students,
)
from test_remote_code import VERSIONS
from transformers import AutoFeatureExtractor, AutoModel

from skill_hf import WavLMForSkillStudent


pytestmark = pytest.mark.nightly

WRONG = {
    "one clip": r"Each speaker needs two clips, but these have one: \d+\.$",
    "no speakers": r"metadata\.csv has no column speaker\.$",
    "wrong rate": r"\.ogg must be mono at 16000 Hz, but has 1 channel\(s\) at 24000 Hz\.$",
    "short segments": r"`segment_seconds` must be a number from 0\.5 to 1000000, but is 0\.2\.$",
}


def speechbrain(version: str = "1.1.2", torchaudio: str = "2.11.0") -> Path:
    packages = (f"speechbrain=={version}", "hyperpyyaml==1.2.3", "ruamel.yaml==0.18.16", "sentencepiece==0.2.3")
    packages += (f"torchaudio=={torchaudio}", *REQUESTS)
    return install(f"speechbrain-{version}", *packages, without=TORCHAUDIO_EXTENSIONS)


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> dict[str, Path]:
    return save_students(tmp_path_factory.mktemp("students"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "inputs.pt"
    wavs = padded_batch()["input_values"]
    # SpeechBrain counts lengths in shares of the longest clip.
    torch.save({"wavs": wavs, "lengths": torch.tensor([1.0, 0.75]), "clips": padded_clips()}, path)
    return path


@pytest.fixture(scope="module")
def demo_student(tmp_path_factory) -> Path:
    """Half of the heads and of the feed-forward units of the demo's teacher."""
    directory, teacher = tmp_path_factory.mktemp("demo_student"), DEMO / "teacher"
    student = WavLMForSkillStudent.from_pretrained(teacher, dtype=torch.float32)
    student.add_gates(["attention_heads", "ffn_dims"])
    for _, gate in student.named_gates():
        gate.log_alpha.data[::2] = -9.0
    student.prune()
    student.half().save_pretrained(directory)  # as it may be published; the example computes in float32
    AutoFeatureExtractor.from_pretrained(teacher).save_pretrained(directory)
    return directory


def run_calls(*calls, packages: list[Path], **variables: str) -> None:
    run(TESTS / "speechbrain_child.py", json.dumps(calls, default=str), packages=packages, **variables)


@pytest.fixture(scope="module")
def visit(students, inputs, demo_student, tmp_path_factory) -> Path:
    """Where the one process wrote what it saw that has both SpeechBrain and this package."""
    root = tmp_path_factory.mktemp("visit")
    speech = root / "speech"
    save_speech(speech)
    faulty = {name: shutil.copytree(speech, root / name) for name in WRONG if name != "short segments"}
    table = (speech / "metadata.csv").read_text(encoding="utf-8")
    (faulty["one clip"] / "metadata.csv").write_text("\n".join(table.splitlines()[:5]), encoding="utf-8")
    (faulty["no speakers"] / "metadata.csv").write_text(table.replace("speaker", "reader", 1), encoding="utf-8")
    clip = next(faulty["wrong rate"].glob("*.ogg"))
    soundfile.write(clip, soundfile.read(clip)[0], 24_000, format="OGG", subtype="OPUS")
    arguments = ["--model", demo_student, "--segment_seconds", "1.2", "--batch_size", "4", "--num_epochs", "3"]
    arguments += ["--learning_rate", "1e-3", "--audio_dir"]
    with HubServer(root / "hub", users={}).running() as server:
        for layout, directory in students.items():
            server.create(f"me/{layout}")
            server.commit(f"me/{layout}", "main", {path.name: path.read_bytes() for path in directory.iterdir()})
        sources = [*students.values(), *(f"me/{layout}" for layout in students)]
        run_calls(
            ["wrap", root / "wrap", inputs, [{"output_all_hiddens": True}, {}, {"output_norm": True}], *sources],
            ["wrap_by_yaml", root / "wrap_by_yaml", inputs, students["base"]],
            ["wrap_by_example", root / "wrap_by_example", inputs, *students.values()],
            ["classify", root / "frozen", *arguments, speech],
            ["classify", root / "tuned", *arguments, speech, "--output_dir", root / "student"],
            *(["classify", root / f"{name}.pt", *arguments, directory] for name, directory in faulty.items()),
            ["classify", root / "short segments.pt", "--segment_seconds", "0.2"],
            packages=[speechbrain()],
            **server.environment(root / "home"),
        )
    return root


def expected_of_wrapper(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """It masks what the lengths leave out; if the model wants normalised audio, each row is, with its padding."""
    batch = padded_batch()
    if AutoFeatureExtractor.from_pretrained(directory).do_normalize:
        batch["input_values"] = torch.nn.functional.layer_norm(batch["input_values"], (8000,))
    return outputs(directory, **batch)


def test_stock_wrapper_takes_directories_and_hub_ids(visit, students):
    all_of, last_of, normalised_of = torch.load(visit / "wrap")
    for layout, directory in students.items():
        all_states, last_state = expected_of_wrapper(directory)
        for source in (str(directory), f"me/{layout}"):
            assert_close(all_of[source], all_states)
            assert_close(last_of[source], last_state)
            assert_close(normalised_of[source], torch.nn.functional.layer_norm(last_state, last_state.shape[1:]))


def test_recipe_of_the_documentation_takes_a_student(visit, students):
    assert_close(torch.load(visit / "wrap_by_yaml"), expected_of_wrapper(students["base"])[0])


@pytest.mark.parametrize("version", ["1.1.2", "1.0.3"])
def test_stock_wrapper_takes_students_without_the_package(students, inputs, tmp_path, version):
    """SpeechBrain 1.0 in transformers 4: it can't be imported beside 5."""
    packages = [speechbrain()]
    if version == "1.0.3":
        packages = [speechbrain(version, torchaudio="2.8.0"), install("transformers-4.57.6", *VERSIONS["4.57.6"])]
    settings = [{"output_all_hiddens": True, "output_norm": False, "trust_remote_code": True}]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run_calls(["wrap", tmp_path / "out", inputs, settings, *students.values()], packages=packages, **environment)
    (all_of,) = torch.load(tmp_path / "out")
    for layout, directory in students.items():
        all_states, last_state = expected_of_wrapper(directory)
        if layout == "large" and version == "1.0.3":
            all_states[-1] = last_state  # transformers 4 returns it behind the final norm
        assert_close(all_of[str(directory)], all_states)


def test_encoder_of_the_example(visit, students):
    results = torch.load(visit / "wrap_by_example")
    for directory in students.values():
        result = results[str(directory)]
        extractor = AutoFeatureExtractor.from_pretrained(directory)
        clips = [clip.numpy() for clip in padded_clips()]
        batch = extractor(clips, sampling_rate=16_000, padding=True, return_tensors="pt")
        assert_close(result["together"], outputs(directory, **batch, masked_group_norm=True)[0])
        for index, alone in enumerate(result["alone"]):
            assert_close(result["together"][:, [index], : alone.shape[2]], alone, atol=1e-4)
        assert result["num_hidden_states"] == len(result["together"])  # in training, too
        # The weights of the transformer train; convolutions are frozen, and nothing is masked by SpecAugment.
        for name, has_gradient in result["has_gradient"].items():
            if name == "masked_spec_embed" or name.startswith("feature_extractor."):
                assert not has_gradient, name
            elif "_proj." in name or "_dense." in name:
                assert has_gradient, name


@pytest.mark.parametrize("way", ["frozen", "tuned"])
def test_example_learns_speakers(visit, way):
    status, printed, _, modes = torch.load(visit / way)
    assert status == 0
    line = r"^Epoch (\d), (\w+): loss ([\d.]+), ([\d.]+)% of (\d+) segments right$"
    epochs = re.findall(line, printed, re.MULTILINE)
    # Three seconds make segments of 1.2, 1.2 and 0.6 seconds. One clip in three is for the test.
    assert [(epoch, split, number) for epoch, split, _, _, number in epochs] == [
        (epoch, *rest) for epoch in "123" for rest in (("training", "12"), ("test", "6"))
    ]
    losses = [float(loss) for _, split, loss, _, _ in epochs if split == "training"]
    assert losses[-1] < losses[0]
    # `Brain.fit` sets the mode of its modules: dropout is for the encoder that is trained, not for a frozen one.
    assert modes == [way == "tuned"] * 9


def test_fine_tuned_student_is_saved_as_one(visit, demo_student):
    before = AutoModel.from_pretrained(demo_student, dtype=torch.float32)
    after = AutoModel.from_pretrained(visit / "student")
    assert type(after) is WavLMForSkillStudent and after.dtype == torch.float32
    assert after.config.remaining_heads == before.config.remaining_heads
    for name, parameter in after.named_parameters():
        frozen = name.startswith("feature_extractor.") or name == "masked_spec_embed"
        assert torch.equal(parameter, before.get_parameter(name)) == frozen, name
    assert AutoFeatureExtractor.from_pretrained(visit / "student").do_normalize


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_one_line(visit, name):
    status, _, complained, _ = torch.load(visit / f"{name}.pt")
    assert status == 2
    (line,) = (line for line in complained.splitlines() if line.startswith("error: "))
    assert re.search(WRONG[name], line)
