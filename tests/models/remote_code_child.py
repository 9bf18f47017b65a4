"""
What a user does with published students where skill_hf is not installed; `test_remote_code.py` runs it in several
versions of transformers. Takes a directory and writes `results.json` and a fine-tuned model into it.
"""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch


sys.modules["skill_hf"] = None  # any import of it fails

import transformers  # noqa: E402
from transformers import (  # noqa: E402
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForAudioXVector,
    AutoModelForCTC,
    Trainer,
    TrainingArguments,
    pipeline,
)


HEADS = (
    AutoModelForCTC,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForAudioXVector,
)
REMOTE = {"trust_remote_code": True}


def difference(one, two) -> float:
    """Relative to the largest value, as rounding is."""
    return ((one - two).abs().max() / two.abs().max()).item()


def error_of(function) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@torch.no_grad()
def use_encoder(directory: Path, inputs: dict) -> dict:
    student = AutoModel.from_pretrained(directory, **REMOTE).eval()
    expected = torch.load(directory.with_name(f"{directory.name}.expected"))
    output = student(**inputs, output_hidden_states=True)
    # In float64: layer norms over a few channels enlarge what float32 rounds.
    exact, samples = copy.deepcopy(student).double(), inputs["input_values"].double()
    states_and_stock = [
        model(**inputs | {"input_values": samples}, output_hidden_states=True).hidden_states
        for model in (exact, exact.to_stock())
    ]
    states = [difference(one, two) for one, two in zip(output.hidden_states, expected["hidden_states"], strict=True)]
    # The head that the repository has; of an encoder alone, all heads, whose weights are random.
    heads, [saved_as] = {}, student.config.architectures
    for auto_class in HEADS:
        if "logits" in expected and not student.config.auto_map.get(auto_class.__name__, "").endswith(f".{saved_as}"):
            continue
        model = auto_class.from_pretrained(directory, **REMOTE).eval()
        states_in_head, logits = model.base_model(**inputs).last_hidden_state, model(**inputs).logits
        heads[auto_class.__name__] = [
            type(model).__name__,
            difference(states_in_head, expected["last_hidden_state"]),
            difference(logits, expected.get("logits", logits)),
        ]
        assert logits.isfinite().all()
    return {
        "module": type(student).__module__.split(".")[0],
        "extractor": type(AutoFeatureExtractor.from_pretrained(directory)).__name__,
        "attention": student.config._attn_implementation,
        "hidden_states": states,
        "last_hidden_state": difference(output.last_hidden_state, expected["last_hidden_state"]),
        # Which of the two sides of a Large model's final norm its last hidden state is on depends on the version.
        "stock": max(map(difference, *states_and_stock)),
        "heads": heads,
        "prune": error_of(student.prune),
    }


def fine_tune(directory: Path, output: Path) -> dict:
    """Two steps of the stock Trainer, saved and loaded again."""
    torch.manual_seed(0)
    model = AutoModelForAudioClassification.from_pretrained(directory, num_labels=2, **REMOTE)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{"input_values": np.random.default_rng(i).standard_normal(4000), "labels": i % 2} for i in range(4)]
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_steps=2
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=lambda rows: {
            "input_values": torch.tensor(np.stack([row["input_values"] for row in rows]), dtype=torch.float32),
            "labels": torch.tensor([row["labels"] for row in rows]),
        },
    )
    trainer.train()
    trainer.save_model()
    AutoFeatureExtractor.from_pretrained(directory).save_pretrained(output)
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    audio = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    logits = {}
    with torch.no_grad():
        for name, path in (("output_dir", output), ("checkpoint", output / "checkpoint-2")):
            loaded = AutoModelForAudioClassification.from_pretrained(path, **REMOTE).eval()
            logits[name] = difference(loaded(audio).logits, model.eval()(audio).logits)
        torch.save(model(audio).logits, output / "logits.pt")
    return {"changed": len(changed), "all": len(before), "difference": logits}


def main(root: Path) -> None:
    inputs = torch.load(root / "inputs.pt")
    audio = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    results = {
        "version": transformers.__version__,
        "encoders": {path.stem: use_encoder(path.with_suffix(""), inputs) for path in sorted(root.glob("*.expected"))},
        "text": pipeline("automatic-speech-recognition", model=str(root / "ctc"), **REMOTE)(audio)["text"],
        "labels": pipeline("audio-classification", model=str(root / "classifier"), top_k=3, **REMOTE)(audio),
        "fine_tuning": fine_tune(root / "base", root / "fine_tuned"),
        "broken": error_of(lambda: AutoModel.from_pretrained(root / "broken", **REMOTE)),
        "refused": error_of(lambda: AutoModel.from_pretrained(root / "base")),
    }
    (root / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
