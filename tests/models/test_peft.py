"""Students under peft's LoRA: projections are modules whose forward runs, so adapters on them train."""

import json

import pytest
import torch
from conftest import padded_batch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from test_modeling_common import HEADS, STILL, labels_for, make_model
from transformers import AutoModelForAudioClassification, Trainer, TrainingArguments

from skill_hf import WavLMForSkillStudent, WavLMSkillStudentForSequenceClassification


TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"]


def lora(**kwargs) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **kwargs)


def adapted_layers(model) -> set[str]:
    return {
        name.split(".lora_A")[0].partition("encoder.")[2] for name, _ in model.named_parameters() if "lora_A" in name
    }


@pytest.mark.parametrize("model_class", [WavLMForSkillStudent, *HEADS], ids=lambda model_class: model_class.__name__)
def test_every_adapter_gets_a_gradient(model_class, layout):
    model = get_peft_model(make_model(model_class, layout, **STILL), lora())
    # Layer 0 has no heads, layer 1 no feed-forward units: the bias that is left takes no adapter.
    left = {0: ["intermediate_dense", "output_dense"], 1: ["q_proj", "k_proj", "v_proj", "out_proj"], 2: TARGETS}
    block = {name: "attention" if "proj" in name else "feed_forward" for name in TARGETS}
    assert adapted_layers(model) == {f"layers.{i}.{block[name]}.{name}" for i, names in left.items() for name in names}
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)  # B starts at 0, which would keep gradients from A
    output = model(**padded_batch(), **labels_for(model_class))
    (output.last_hidden_state.square().sum() if "last_hidden_state" in output else output.loss).backward()
    for name, parameter in model.named_parameters():
        assert ("lora_" in name) == parameter.requires_grad
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_trained_saved_loaded_and_merged(tmp_path):
    make_model(WavLMForSkillStudent, "base", **STILL).save_pretrained(tmp_path / "student")
    torch.manual_seed(0)
    student = AutoModelForAudioClassification.from_pretrained(tmp_path / "student", num_labels=2)
    model = get_peft_model(student, lora(modules_to_save=["projector", "classifier"]))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(1)
    rows = [{"input_values": torch.randn(4000), "labels": i % 2} for i in range(4)]
    arguments = TrainingArguments(
        output_dir=tmp_path / "run", max_steps=3, learning_rate=0.05, report_to=[], use_cpu=True, save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=rows).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in changed)

    model.eval()
    with torch.no_grad():
        expected = model(**padded_batch()).logits
        model.save_pretrained(tmp_path / "adapter")
        base = AutoModelForAudioClassification.from_pretrained(tmp_path / "student", num_labels=2)
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**padded_batch()).logits, expected)
        merged = loaded.merge_and_unload()
        assert type(merged) is WavLMSkillStudentForSequenceClassification
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForAudioClassification.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(**padded_batch()).logits, expected, atol=1e-5, rtol=0)


def test_adapter_directory_names_its_student(tmp_path):
    make_model(WavLMForSkillStudent, "base").save_pretrained(tmp_path / "student")
    model = get_peft_model(WavLMForSkillStudent.from_pretrained(tmp_path / "student"), lora())
    model.save_pretrained(tmp_path / "adapter")
    # peft imports a package that it doesn't know only if it is told to.
    allowed = ["skill_hf.models.modeling_wavlm_skill_student"]
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=allowed)
    assert type(loaded.base_model.model) is WavLMForSkillStudent
    assert adapted_layers(loaded) == adapted_layers(model)

    # As an adapter names it that was saved before the modules moved into folders.
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["auto_mapping"]["parent_library"] == allowed[0]
    config["auto_mapping"]["parent_library"] = allowed[0].replace("models.", "")
    path.write_text(json.dumps(config))
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=[allowed[0].replace("models.", "")])
    assert type(loaded.base_model.model) is WavLMForSkillStudent
