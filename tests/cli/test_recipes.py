"""The recipes of the package: each loads, and each runs on a shrunken teacher of its family."""

import json
from pathlib import Path

import pytest
import torch
from conftest import family_config, family_teacher, with_noise
from short_distillation import command_line, on_folder, results_of, write_inputs
from transformers import (
    AutoModelForCTC,
    AutoProcessor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

from skill_hf import Wav2Vec2SkillStudentForCTC
from skill_hf.cli import distill
from skill_hf.cli.recipes import load_recipe, recipe_names


# Teacher of the recipes -> its layout in `conftest.LAYOUTS`.
LAYOUT_OF = {
    "hubert-base": "hubert-base",
    "hubert-large": "hubert-large",
    "wav2vec2-base": "wav2vec2-base",
    "wavlm-base-plus": "wavlm-base",
    "wavlm-large": "wavlm-large",
    "xls-r-300m": "xls-r",
}
SPARSITY_OF = {"05": 0.5, "075": 0.75, "09": 0.9}
FINE_TUNED = "wav2vec2-base-960h-ctc-075"  # with a head
SMALL = {"num_hidden_layers": 2, "intermediate_size": 256}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("shared"))


def test_recipes_are_there_for_each_teacher_and_sparsity():
    names = [f"{teacher}-{digits}" for teacher in LAYOUT_OF for digits in SPARSITY_OF]
    assert recipe_names() == sorted([*names, FINE_TUNED])


@pytest.mark.parametrize("name", recipe_names())
def test_settings_of_a_recipe(name, tmp_path):
    """They are valid, and those that are given override them."""
    words = ["--recipe", name, "--audio_dir", "recordings", "--output_dir", str(tmp_path), "--seed", "7"]
    model_args, data_args, skill_config, training_args = distill.parse(words)[0]
    settings = load_recipe(name)
    assert model_args.teacher_name_or_path == settings["teacher_name_or_path"]
    assert skill_config.target_sparsity == SPARSITY_OF[name.rpartition("-")[2]]
    assert data_args.max_seconds == settings["max_seconds"]
    assert model_args.task == ("ctc" if name == FINE_TUNED else None)
    assert (training_args.max_steps, training_args.seed) == (75_000, 7)
    # A step of 640 s of audio, also on four devices.
    assert training_args.seconds_per_batch * training_args.gradient_accumulation_steps == 640
    assert training_args.gradient_accumulation_steps % 4 == 0
    (by_clips,) = distill.parse([*words, "--per_device_train_batch_size", "8"])
    assert (by_clips[3].seconds_per_batch, by_clips[3].per_device_train_batch_size) == (None, 8)
    (accumulated,) = distill.parse([*words, "--gradient_accumulation_steps", "3"])
    assert (accumulated[3].seconds_per_batch, accumulated[3].gradient_accumulation_steps) == (
        training_args.seconds_per_batch,
        3,
    )
    (changed,) = distill.parse([*words, "--target_sparsity", "0.3", "--max_steps", "30"])
    assert (changed[2].target_sparsity, changed[3].max_steps) == (0.3, 30)


def run_recipe(name: str, shared: Path, folder: Path) -> None:
    """Runs a recipe on `folder/teacher`, into `folder/out`."""
    settings = on_folder(shared, folder / "out", teacher_name_or_path=str(folder / "teacher"), recipe=name)
    del settings["target_sparsity"]
    assert distill.main(command_line(settings)) == 0
    results, sparsity = results_of(folder / "out"), SPARSITY_OF[name.rpartition("-")[2]]
    assert results["target_sparsity"] == sparsity
    assert results["sparsity"] == pytest.approx(sparsity, abs=0.03)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in recipe_names() if name != FINE_TUNED])
def test_a_recipe_runs_on_a_small_teacher_of_its_family(name, shared, tmp_path):
    family_teacher(LAYOUT_OF[name.rpartition("-")[0]], **SMALL).save_pretrained(tmp_path / "teacher")
    run_recipe(name, shared, tmp_path)


def test_the_recipe_with_a_head_runs_on_a_small_teacher(shared, tmp_path):
    torch.manual_seed(0)
    teacher = AutoModelForCTC.from_config(family_config("wav2vec2-base", pad_token_id=0, **SMALL))
    with_noise(teacher).save_pretrained(tmp_path / "teacher")
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", "|", *"ABCDEF"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None)
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(tmp_path / "teacher")
    run_recipe(FINE_TUNED, shared, tmp_path)
    assert results_of(tmp_path / "out")["record"]["losses"]["start"]["logits_loss"] == pytest.approx(0, abs=1e-5)
    assert type(AutoModelForCTC.from_pretrained(tmp_path / "out")) is Wav2Vec2SkillStudentForCTC
    assert AutoProcessor.from_pretrained(tmp_path / "out").tokenizer.get_vocab() == vocabulary


@pytest.mark.parametrize(
    ("name", "message"), [("hubert-bse-075", "Did you mean hubert-base-075"), ("../x", "The recipes are")]
)
def test_a_recipe_that_is_not_there(name, message, capsys):
    assert distill.main(["--recipe", name, "--audio_dir", "x", "--output_dir", "y"]) == 2
    assert message in capsys.readouterr().err
