"""
`examples/use_in_s3prl.py`: a student as an upstream of the real s3prl, from the package index, in processes of their
own: its interfaces for Python, and a task of SUPERB by its own runner.
"""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import padded_batch
from example_helpers import EXAMPLES
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
from transformers import AutoFeatureExtractor, AutoModel, HubertConfig, HubertModel, Wav2Vec2FeatureExtractor


pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def s3prl() -> Path:
    packages = ("s3prl==0.4.18", "omegaconf==2.4.0", "tensorboardX==2.6.5", *REQUESTS)
    # It calls what torchaudio 2.9 removed.
    return install("s3prl-0.4.18", *packages, "torchaudio==2.8.0", without=TORCHAUDIO_EXTENSIONS)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Students of both layouts, and a stock model of another family."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    torch.manual_seed(0)
    HubertModel(HubertConfig(**sizes, feat_extract_norm="layer")).save_pretrained(root / "hubert")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(root / "hubert")
    return save_students(root) | {"hubert": root / "hubert"}


def test_hidden_states_are_those_of_the_model(s3prl, models, tmp_path):
    clips = padded_clips()
    wavs = padded_batch()["input_values"]
    torch.save({"wavs": wavs, "lengths": torch.tensor([8000, 6000]), "clips": clips}, tmp_path / "inputs.pt")
    run(TESTS / "s3prl_child.py", tmp_path / "out", tmp_path / "inputs.pt", *models.values(), packages=[s3prl])
    results = torch.load(tmp_path / "out")
    for name, directory in models.items():
        result = results[str(directory)]
        extractor = AutoFeatureExtractor.from_pretrained(directory)
        inputs = extractor([clip.numpy() for clip in clips], sampling_rate=16_000, padding=True, return_tensors="pt")
        config = {} if name == "hubert" else {"masked_group_norm": True}
        all_states, last_state = outputs(directory, **inputs, **config)
        assert_close(result["features"], all_states)
        assert_close(result["last_hidden_state"], last_state)

        # s3prl repeats the last frame until there is one for every 320 samples that were begun.
        assert result["downsample_rates"] == [320] * len(all_states)
        assert result["hidden_states"].shape[2] == 25 > all_states.shape[2] == 24
        assert_close(result["hidden_states"][:, :, :24], all_states)
        assert result["lengths"].tolist() == [[25, 19]] * len(all_states)
        assert_close(result["weighted_sum"], result["hidden_states"].mean(0))
        assert [len(features) for features in result["unpadded"]] == [24, 19]
        for index, features in enumerate(result["unpadded"]):
            assert_close(features, all_states[:, index, : len(features)].mean(0))

        for index, alone in enumerate(result["alone"]):
            assert_close(result["features"][:, [index], : alone.shape[2]], alone, atol=1e-4)
        unmasked = (result["unmasked"] - result["hidden_states"])[:, 1, :18].abs().max()
        assert (unmasked > 1e-2) == (name == "base")
        assert result["num_in_training"] == len(all_states)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """SUPERB's emotion recognition in its own form, with the demo's speakers for emotions."""
    directory = tmp_path_factory.mktemp("task") / "speech"
    rows = save_speech(directory)
    labels = {speaker: index for index, speaker in enumerate(sorted({row["speaker"] for row in rows}))}
    (directory / "Session1").mkdir()
    for split in ("train", "test"):
        clips = [{"path": row["file_name"], "label": row["speaker"]} for row in rows]
        table = json.dumps({"labels": labels, "meta_data": clips})
        (directory / "Session1" / f"{split}_meta_data.json").write_text(table)
    steps = {"total_steps": 4, "log_step": 2, "eval_step": 4, "save_step": 4, "gradient_accumulate_steps": 1}
    data = {"root": str(directory), "meta_data": str(directory), "test_fold": "fold1", "pre_load": True}
    data |= {"valid_ratio": 0.34, "num_workers": 0, "train_batch_size": 2, "eval_batch_size": 2}
    head = {"projector_dim": 16, "select": "UtteranceLevel", "UtteranceLevel": {"pooling": "MeanPooling"}}
    config = {
        "runner": {**steps, "gradient_clipping": 1, "max_keep": 1, "eval_dataloaders": ["dev", "test"]},
        "optimizer": {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 1e-2},
        "downstream_expert": {"datarc": data, "modelrc": head},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


@pytest.mark.parametrize("entry", ["skill_student", "skill_student_remote_code"])
def test_task_of_superb_by_its_runner(s3prl, models, task, tmp_path, entry):
    """With the package, frozen, all layers; and without it, in transformers 4, fine-tuned, the last one."""
    packages, options, variables = [s3prl], [], {}
    remote_code = entry == "skill_student_remote_code"
    if remote_code:
        (tmp_path / "skill_hf.py").write_text("raise ImportError")
        packages += [install("transformers-4.57.6", *VERSIONS["4.57.6"]), tmp_path]
        options = ["-f", "-s", "last_hidden_state"]
        variables = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = ["-m", "train", "-u", entry, "-k", models["large"], "-d", "emotion", "-c", task / "config.yaml"]
    arguments += ["-p", tmp_path / "result", "--device", "cpu", *options]
    run(EXAMPLES / "use_in_s3prl.py", *arguments, packages=packages, **variables)

    assert bool(list(tmp_path.glob("modules/**/modeling_wavlm_skill_student.py"))) == remote_code
    log = (tmp_path / "result" / "log.log").read_text(encoding="utf-8")
    lines = re.findall(r"^(train|dev|test) at step (\d): [01]\.\d+$", log, re.MULTILINE)
    assert lines == [("train", "2"), ("train", "4"), ("dev", "4"), ("test", "4")]
    states = torch.load(tmp_path / "result" / "states-4.ckpt", weights_only=False)
    if remote_code:
        before = AutoModel.from_pretrained(models["large"])
        for name, parameter in before.named_parameters():
            changed = not torch.equal(states["Upstream"][f"model.{name}"], parameter)
            assert changed or "_proj." not in name and "_dense." not in name, name
    else:
        assert "Upstream" not in states
        assert states["Featurizer"]["weights"].abs().min() > 0  # each layer's share was learnt, from 0
