"""Publishing over HTTP: the real `huggingface_hub` client against the small Hub of hub_server.py."""

import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import STUDENT_CODE, padded_batch, tiny_teacher
from hub_server import HubServer
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from test_modeling_wavlm_skill_student import pruned_student
from test_skill_trainer import StopAt, make_trainer
from transformers import TrainerCallback, Wav2Vec2FeatureExtractor

from skill_hf import (
    HubertSkillStudentForCTC,
    WavLMForSkillStudent,
    WavLMSkillStudentForCTC,
    WavLMSkillStudentForSequenceClassification,
)
from skill_hf.models.families import build_student
from skill_hf.publishing import hub as publishing


# Files of any student, and what tells of the run that made it.
STUDENT = {
    "config.json",
    "model.safetensors",
    *STUDENT_CODE,
    "preprocessor_config.json",
    "README.md",
}
RUN = {"skill_config.json", "architecture.png", "layer_distances.png", "training.png"}
CLUSTERED = {"layer_similarity.png"}
RESULTS = {"all_results.json"}
HUB = {".gitattributes"}  # every repository begins with it
JUNK = [
    "_cut/model.safetensors",
    "runs/events.out.tfevents.1",
    "teacher/model.safetensors",
    "optimizer.pt",
    "training_args.bin",
    "model.safetensors.bak",
    "best.pt",
    "notes.txt",
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer(tmp_path_factory.mktemp("hub"), users={"hf_me": "me", "hf_team": "team"}).running() as server:
        yield server
    assert [request for request in server.requests if request[0] == "unknown"] == []


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """
    Runs a function of this file in another process, whose Hub is the server and whose user is `me`: the client reads
    its endpoint when it is imported.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hub.environment(tmp_path_factory.mktemp("client"), token="hf_me").items():
            patch.setenv(name, value)
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(int).result()  # starts the process
    with pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result(timeout=300)


@pytest.fixture(scope="module")
def published(client, tmp_path_factory):
    """Directory of a run that was published as `me/student`."""
    directory = tmp_path_factory.mktemp("run") / "student"
    client(run_and_push, directory)
    return directory


def sent(hub, endpoint: str, repo_id: str) -> list[dict]:
    """Arguments of the requests to an endpoint about one repository."""
    return [given for name, given in hub.requests if name == endpoint and given.get("repo_id") == repo_id]


def card_of(hub, repo_id: str) -> ModelCard:
    return ModelCard(hub.files(repo_id)["README.md"].read_text(encoding="utf-8"))


# ---- What runs in the client's process ----


def trained(output_dir, teacher=None, layer_groups=([0, 1], [2, 3]), **kwargs):
    rng = np.random.default_rng(0)
    clips = [{"input_values": rng.standard_normal(33_000).astype(np.float32)} for _ in range(8)]
    recipe = {"final_steps": 1} | ({"layer_groups": list(layer_groups), "num_clusters": None} if layer_groups else {})
    trainer = make_trainer(output_dir, clips, teacher, recipe, max_steps=3, save_steps=1, **kwargs)
    trainer.train()
    return trainer


@torch.no_grad()
def outputs(model) -> list[torch.Tensor]:
    return list(model.eval()(**padded_batch(), output_hidden_states=True).hidden_states)


def run_and_push(output_dir: Path) -> None:
    trainer = trained(output_dir, layer_groups=None)
    trainer.save_state()
    for name in JUNK:
        (output_dir / name).parent.mkdir(exist_ok=True)
        (output_dir / name).write_text(name)
    trainer.save_metrics("all", {"loss": 1.0}, combined=False)
    before = {path for path in output_dir.rglob("*") if path.is_file()}
    info = trainer.push_to_hub(tags="mine", language="en")
    assert info.repo_url.repo_id == "me/student"
    after = {path for path in output_dir.rglob("*") if path.is_file()}
    assert after - before == {output_dir / name for name in STUDENT | RUN | CLUSTERED}
    assert before <= after
    torch.save(outputs(trainer.model), output_dir.parent / "outputs.pt")


def run_with_push_to_hub(output_dir: Path) -> None:
    trainer = trained(
        output_dir,
        push_to_hub=True,
        hub_model_id="team/student",
        hub_private_repo=True,
        hub_token="hf_team",
        hub_revision="first",
    )
    trainer.save_model()
    trainer.push_to_hub("Once more", tags="more")
    trainer.push_to_hub(revision="second", blocking=False).result()


def run_that_is_refused(output_dir: Path) -> list[str]:
    trainer = trained(output_dir)
    messages = []
    for _ in range(2):
        with pytest.raises(OSError, match="push_to_hub") as error:
            trainer.push_to_hub()
        assert isinstance(error.value.__cause__, HfHubHTTPError)
        messages.append(str(error.value))
        saved = WavLMForSkillStudent.from_pretrained(output_dir)
        for expected, actual in zip(outputs(trainer.model), outputs(saved), strict=True):
            assert torch.equal(expected, actual)
    trainer.push_to_hub()
    return messages


def run_without_a_right(output_dir: Path, **kwargs) -> int:
    with pytest.raises(OSError, match="`push_to_hub` is True, but `.*` cannot be written to") as error:
        trained(output_dir, push_to_hub=True, **kwargs)
    assert "\n" not in str(error.value)
    return error.value.__cause__.response.status_code


def run_from_the_hub(output_dir: Path, teacher: str) -> None:
    trained(output_dir, teacher).push_to_hub()
    WavLMForSkillStudent.from_pretrained(teacher).push_to_hub("copy")


def run_example(folder: Path, *sparsities: str) -> None:
    from skill_hf.cli import distill

    tiny_teacher().save_pretrained(folder / "teacher")
    Wav2Vec2FeatureExtractor().save_pretrained(folder / "teacher")
    (folder / "audio").mkdir()
    for index in range(4):
        samples = np.random.default_rng(index).standard_normal(40_000)
        soundfile.write(folder / "audio" / f"{index}.wav", 0.1 * samples, 16_000)
    settings = {
        "teacher_name_or_path": folder / "teacher",
        "audio_dir": folder / "audio",
        "output_dir": folder / "example",
        "max_steps": 2,
        "final_steps": 1,
        "save_steps": 1,
        "logging_steps": 1,
        "layer_groups": "[[0, 1], [2, 3]]",
        "per_device_train_batch_size": 2,
        "report_to": "none",
    }
    arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    arguments += ["--target_sparsity", *sparsities] if sparsities else []
    assert distill.main([*arguments, "--use_cpu", "--push_to_hub"]) == 0


def run_on_another_process(output_dir: Path) -> None:
    trainer = trained(output_dir)
    trainer.is_world_process_zero = lambda: False
    assert trainer.push_to_hub() is None


def push_loaded(model_class, source: Path, repo_id: str, shift: float = 0.0, **kwargs) -> str:
    model = model_class.from_pretrained(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += shift
    info = model.push_to_hub(repo_id, **kwargs)
    return info.pr_url or info.commit_url


def upload_adapter(folder: Path, repo_id: str) -> None:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"an adapter")
    publishing.upload(folder, repo_id, commit_message="Upload adapter")


def load_card(repo_id: str) -> dict:
    return ModelCard.load(repo_id).data.to_dict()


# ---- The trainer ----


@pytest.mark.slow
def test_only_the_student_goes_up(hub, published):
    files = hub.files("me/student")
    assert set(files) == STUDENT | RUN | CLUSTERED | RESULTS | HUB
    for name in STUDENT | RUN | CLUSTERED | RESULTS:
        assert files[name].read_bytes() == (published / name).read_bytes(), name
        assert str(published.parent).encode() not in files[name].read_bytes(), name
    (commit,) = sent(hub, "commit", "me/student")
    assert commit["summary"] == "End of training"
    assert hub.private["me/student"] is False


@pytest.mark.slow
def test_card_on_the_hub(hub, client, published):
    data = client(load_card, "me/student")
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "feature-extraction"
    assert {"skill-hf", "mine"} <= set(data["tags"])
    assert data["language"] == "en"
    assert "base_model" not in data  # the teacher is a model in memory
    assert "license" not in data
    text = card_of(hub, "me/student").text
    assert 'name = "me/student"' in text
    for name in CLUSTERED | RUN - {"skill_config.json"}:
        assert f"({name})" in text


LOAD_WITHOUT_SKILL_HF = """
import sys
sys.modules["skill_hf"] = None
import torch
from huggingface_hub import snapshot_download
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCTC
sys.path.insert(0, {tests!r})
from conftest import padded_batch
model = AutoModel.from_pretrained("me/student", trust_remote_code=True).eval()
assert type(model).__name__ == "WavLMForSkillStudent"
with torch.no_grad():
    actual = model(**padded_batch(), output_hidden_states=True).hidden_states
expected = torch.load({outputs!r})
assert len(actual) == len(expected) and all(map(torch.equal, actual, expected))
assert AutoFeatureExtractor.from_pretrained("me/student").sampling_rate == 16_000
head = AutoModelForCTC.from_pretrained("me/hubert", trust_remote_code=True).eval()
assert type(head).__name__ == "HubertSkillStudentForCTC"
with torch.no_grad():
    assert torch.equal(head(**padded_batch()).logits, torch.load({logits!r}))
print(snapshot_download("me/student"))
model.push_to_hub("stock")
"""


@pytest.mark.slow
def test_round_trip_without_skill_hf(hub, client, published, tmp_path):
    head = HubertSkillStudentForCTC(pruned_student("hubert-large").config).eval()
    head.save_pretrained(tmp_path / "hubert")
    with torch.no_grad():
        torch.save(head(**padded_batch()).logits, tmp_path / "logits.pt")
    client(push_loaded, HubertSkillStudentForCTC, tmp_path / "hubert", "me/hubert")
    other_code = {name.replace("wavlm", "hubert") for name in STUDENT_CODE}
    assert set(hub.files("me/hubert")) == {"config.json", "model.safetensors", "README.md", *other_code} | HUB
    assert card_of(hub, "me/hubert").data.pipeline_tag == "automatic-speech-recognition"

    paths = {"outputs": published.parent / "outputs.pt", "logits": tmp_path / "logits.pt"}
    paths["tests"] = Path(__file__).parents[1]
    script = LOAD_WITHOUT_SKILL_HF.format(**{name: str(path) for name, path in paths.items()})
    environment = {**os.environ, **hub.environment(tmp_path, token="hf_me")}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    snapshot = Path(result.stdout.strip().splitlines()[-1])
    for name, path in hub.files("me/student").items():
        assert (snapshot / name).read_bytes() == path.read_bytes(), name
    # What was loaded from the Hub is published again by the stock method.
    assert {"config.json", "model.safetensors"} | STUDENT_CODE < set(hub.files("me/stock"))
    assert "skill-hf" in card_of(hub, "me/stock").data.tags


@pytest.mark.slow
def test_push_to_hub_in_the_arguments(hub, client, tmp_path):
    hub.create("team/student")
    stale = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "layer_similarity.png"]
    kept = ["onnx/model.safetensors", "vocab.json"]
    hub.branches["team/student"]["first"] = hub.commit(
        "team/student", "main", dict.fromkeys([*stale, *kept], b"of before")
    )
    client(run_with_push_to_hub, tmp_path / "run")
    assert list(tmp_path.glob("run/checkpoint-*"))
    commits = [(given["summary"], given["revision"]) for given in sent(hub, "commit", "team/student")]
    assert commits == [("Model save", "first"), ("Once more", "first"), ("End of training", "second")]
    for revision in ("first", "second"):
        assert set(hub.files("team/student", revision)) == STUDENT | RUN | set(kept) | HUB
    assert set(hub.files("team/student")) == {*stale, *kept} | HUB
    (creation,) = [given for name, given in hub.requests if name == "create" and given["organization"] == "team"]
    assert creation["visibility"] == "private"


@pytest.mark.slow
def test_refused_upload_loses_nothing(hub, client, tmp_path):
    hub.failures["commit"] = [403, 500]
    messages = client(run_that_is_refused, tmp_path / "refused")
    for status, message in zip((403, 500), messages, strict=True):
        assert "`me/refused`" in message
        assert str(tmp_path / "refused") in message
        assert str(status) in message
        assert "\n" not in message
    assert set(hub.files("me/refused")) == STUDENT | RUN | HUB


@pytest.mark.slow
def test_no_right_to_push_shows_before_training(hub, client, tmp_path):
    assert client(run_without_a_right, tmp_path / "wrong", hub_model_id="me/wrong", hub_token="hf_wrong") == 401
    assert client(run_without_a_right, tmp_path / "other", hub_model_id="others/student") == 403
    assert not list(tmp_path.rglob("checkpoint-*"))
    assert "others/student" not in hub.branches


@pytest.mark.slow
def test_teacher_on_the_hub(hub, client, tmp_path):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: mit\n---\n# Teacher\n")
    hub.create("microsoft/tiny-wavlm")
    files = {path.name: path.read_bytes() for path in (tmp_path / "teacher").iterdir()}
    hub.commit("microsoft/tiny-wavlm", "main", files)
    client(run_from_the_hub, tmp_path / "of-hub", "microsoft/tiny-wavlm")
    for name in ("me/of-hub", "me/copy"):
        data = card_of(hub, name).data
        assert data.base_model == "microsoft/tiny-wavlm"
        assert data.license == "mit"
        settings = json.loads(hub.files(name)["preprocessor_config.json"].read_text())
        assert settings["do_normalize"] is True
    assert set(hub.files("me/copy")) == STUDENT | HUB


@pytest.mark.nightly
def test_only_the_first_process_uploads(hub, client, tmp_path):
    number = len(hub.requests)
    client(run_on_another_process, tmp_path)
    assert len(hub.requests) == number
    # It has been saved, though, and can be published from there.
    client(push_loaded, WavLMForSkillStudent, tmp_path, "me/later")
    assert set(hub.files("me/later")) == STUDENT | RUN | HUB
    text = card_of(hub, "me/later").text
    assert 'name = "me/later"' in text
    assert '"."' not in text


@pytest.mark.nightly
def test_example_publishes_once_and_no_path(hub, client, tmp_path):
    client(run_example, tmp_path)
    files = hub.files("me/example")
    assert set(files) == STUDENT | RUN | RESULTS | HUB
    assert len(sent(hub, "commit", "me/example")) == 1
    assert json.loads(files["all_results.json"].read_text())["teacher"] == "teacher"
    for name, path in files.items():
        assert str(tmp_path).encode() not in path.read_bytes(), name


@pytest.mark.nightly
def test_students_of_several_sparsities_have_repositories_of_their_own(hub, client, tmp_path):
    client(run_example, tmp_path, "0.2", "0.4")
    for name in ("example-sparsity-0.2", "example-sparsity-0.4"):
        files = hub.files(f"me/{name}")
        assert set(files) == STUDENT | RUN | RESULTS | HUB
        assert f'"me/{name}"' in files["README.md"].read_text()
        for path in files.values():
            assert str(tmp_path).encode() not in path.read_bytes()


def test_unfinished_student_is_refused(tmp_path, clips):
    class Push(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match="not finished"):
                trainer.push_to_hub()
            steps.append(state.global_step)

    steps = []
    recipe = {"final_steps": 1}
    trainer = make_trainer(tmp_path, clips, recipe=recipe, max_steps=2, callbacks=[Push()], save_strategy="no")
    trainer.train()
    assert steps == [1, 2]  # one of each stage
    trainer = make_trainer(tmp_path, clips, max_steps=4, callbacks=[StopAt(1)], save_strategy="no")
    trainer.train()
    with pytest.raises(ValueError, match="not finished"):
        trainer.push_to_hub()
    with pytest.raises(ValueError, match="still has its gates"):
        trainer.model.push_to_hub("me/never")


# ---- Models ----


@pytest.mark.slow
def test_pushed_model_takes_its_card_along(hub, client, published):
    client(push_loaded, WavLMForSkillStudent, published, "me/again")
    files = hub.files("me/again")
    assert set(files) == STUDENT | RUN | CLUSTERED | RESULTS | HUB
    for name in (STUDENT | RUN | CLUSTERED | RESULTS) - {"config.json", "README.md"}:
        assert files[name].read_bytes() == (published / name).read_bytes(), name
    (commit,) = sent(hub, "commit", "me/again")
    assert commit["summary"] == "Upload WavLMForSkillStudent"
    card = card_of(hub, "me/again")
    assert "mine" in card.data.tags
    assert 'name = "me/again"\n' in card.text and '.from_pretrained("me/again")' in card.text
    assert "me/student" not in card.text

    # An adapter that is pushed on top leaves the weights where they are.
    client(upload_adapter, published.parent / "adapter", "me/again")
    assert set(hub.files("me/again")) > STUDENT | {"adapter_model.safetensors"}


@pytest.mark.slow
def test_a_card_about_other_weights_is_not_taken_along(hub, client, published):
    client(push_loaded, WavLMForSkillStudent, published, "me/changed", shift=1.0)
    assert set(hub.files("me/changed")) == STUDENT | HUB
    assert "Distillation loss" in card_of(hub, "me/student").text
    assert "Distillation loss" not in card_of(hub, "me/changed").text


@pytest.mark.slow
def test_a_card_on_the_hub_that_cannot_be_read(hub, client, published):
    hub.create("me/torn")
    hub.commit("me/torn", "main", {"README.md": b"---\nmodel-index: 3\n---\n# Mine\n"})
    with pytest.raises(ValueError, match="README.md in `me/torn` cannot be read; fix it on the Hub"):
        client(push_loaded, WavLMForSkillStudent, published, "me/torn")
    assert set(hub.files("me/torn")) == {"README.md"} | HUB


@pytest.mark.slow
def test_second_push_of_a_head_keeps_what_the_user_wrote(hub, client, published):
    settings = {"tags": ["first"], "private": True}
    client(push_loaded, WavLMSkillStudentForCTC, published, "me/ctc", **settings)
    assert set(hub.files("me/ctc")) == STUDENT | HUB
    assert hub.private["me/ctc"] is True
    data = card_of(hub, "me/ctc").data
    assert {"skill-hf", "first"} <= set(data.tags)
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "automatic-speech-recognition"

    text = "---\nlicense: cc0-1.0\npipeline_tag: other\ntags: [own]\n---\n\n# Mine\n\nWords of the user.\n"
    extractor = b'{"feature_extractor_type": "Wav2Vec2FeatureExtractor", "of": "the user"}'
    hub.commit("me/ctc", "main", {"README.md": text.encode(), "preprocessor_config.json": extractor})
    before = hub.files("me/ctc")["model.safetensors"].read_bytes()
    client(push_loaded, WavLMSkillStudentForCTC, published, "me/ctc", shift=1.0, tags="second")
    card = card_of(hub, "me/ctc")
    assert card.text == "\n# Mine\n\nWords of the user.\n"
    assert (card.data.license, card.data.pipeline_tag) == ("cc0-1.0", "other")
    assert card.data.library_name == "transformers"
    assert card.data.tags[0] == "own"
    assert {"skill-hf", "second"} <= set(card.data.tags)
    assert hub.files("me/ctc")["preprocessor_config.json"].read_bytes() == extractor
    assert hub.files("me/ctc")["model.safetensors"].read_bytes() != before


@pytest.mark.slow
def test_arguments_of_push_to_hub_arrive(hub, client, published):
    head = WavLMSkillStudentForSequenceClassification
    message = {"commit_message": "Title", "commit_description": "Text"}
    client(push_loaded, head, published, "me/head", revision="dev", max_shard_size="20KB", **message)
    (commit,) = sent(hub, "commit", "me/head")
    assert (commit["summary"], commit["description"], commit["revision"]) == ("Title", "Text", "dev")
    assert set(hub.files("me/head")) == HUB
    assert "model.safetensors.index.json" in hub.files("me/head", "dev")

    # A pull request to a repository of others.
    hub.create("others/head")
    url = client(push_loaded, head, published, "others/head", create_pr=True)
    assert url == f"{hub.url}/others/head/discussions/1"
    assert set(hub.files("others/head")) == HUB
    assert "model.safetensors" in hub.files("others/head", "refs/pr/1")

    # One file takes the place of shards.
    client(push_loaded, head, published, "me/head", revision="dev", token="hf_me")
    weights = [name for name in hub.files("me/head", "dev") if name.startswith("model")]
    assert sorted(weights) == ["model.safetensors", "modeling_skill_student.py", "modeling_wavlm_skill_student.py"]

    with pytest.raises(OSError, match="401"):
        client(push_loaded, head, published, "me/head", token="hf_wrong")


def test_student_from_nowhere_has_no_source(tmp_path):
    """An empty `name_or_path` is not the present directory."""
    from skill_hf.publishing.hub import _unchanged_source

    model = build_student(tiny_teacher())
    assert model.config.name_or_path == ""
    model.save_pretrained(tmp_path)
    assert _unchanged_source(tmp_path, model) is None
