"""Models in directories that are damaged, too large for memory or of someone else: one clear error each, and soon."""

import copy
import json
import os
import pickle
import resource
import time

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_config, tiny_teacher
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_modeling_wavlm_skill_student import PRUNED, pruned_student
from transformers import (
    CONFIG_MAPPING,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    Data2VecAudioConfig,
    Data2VecAudioForCTC,
    Data2VecAudioModel,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
    WavLMForAudioFrameClassification,
    WavLMForCTC,
    WavLMForXVector,
    WavLMModel,
    WhisperFeatureExtractor,
)

from skill_hf import (
    SkillConfig,
    SkillDistillationTrainer,
    WavLMForSkillStudent,
    WavLMSkillStudentConfig,
    layer_similarity,
)
from skill_hf.distillation.teacher import load_teacher
from skill_hf.encoders import PretrainedEncoder
from skill_hf.models.families import build_student, load_student
from skill_hf.models.loading import (
    check_feature_extractor,
    load_config,
    load_feature_extractor,
    load_model,
    plain_feature_extractor,
)


# Bytes that a refusal may take at most, and seconds of a processor.
MEMORY, SECONDS = 300e6, 20.0


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher")
    tiny_teacher().save_pretrained(directory)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def student_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("student")
    pruned_student("base").save_pretrained(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def put(files, directory):
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def refused(function, *pattern):
    """The message of the one error: of one line, in little time and memory."""
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError) as caught:
        function()
    assert time.process_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 < MEMORY
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    for part in pattern:
        assert part in message
    return message


# ---- Ways to damage a directory ----


def field(name, value, file="config.json"):
    def damage(directory):
        path = directory / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    damage.__name__ = f"{name}={str(value)[:20]}"
    return damage


def content(name, data, but=None):
    def damage(directory):
        if but is not None:
            (directory / but).unlink()
        (directory / name).write_bytes(data)

    damage.__name__ = f"{name}:{data[:12]!r}"
    return damage


def weights(change):
    def damage(directory):
        path = directory / "model.safetensors"
        tensors = load_file(path)
        save_file(change(tensors), path, {"format": "pt"})

    return damage


def each(change):
    return weights(lambda tensors: {name: change(name, tensor) for name, tensor in tensors.items()})


def without(part):
    return weights(lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name})


def of_type(dtype, part="encoder.layers.0"):
    return each(lambda name, tensor: tensor.to(dtype) if part in name else tensor)


def one_value(value, part="encoder.layers.1.final_layer_norm.weight"):
    def change(name, tensor):
        if part in name:
            tensor.flatten()[0] = value
        return tensor

    return each(change)


def in_place_of(name, make):
    def damage(directory):
        path = directory / name
        path.unlink()
        make(path)

    return damage


def pickled(change):
    def damage(directory):
        path = directory / "model.safetensors"
        torch.save(change(load_file(path)), directory / "pytorch_model.bin")
        path.unlink()

    return damage


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mknod, (str(self.path),))


def runs_code(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(directory / "ran")))


def index(value):
    return content("model.safetensors.index.json", json.dumps(value).encode(), but="model.safetensors")


def outside(directory):
    other = directory.parent / "elsewhere"
    other.mkdir()
    os.rename(directory / "model.safetensors", other / "model.safetensors")
    names = load_file(other / "model.safetensors")
    places = dict.fromkeys(names, "../elsewhere/model.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def expanded(tensors):
    name = "encoder.layers.0.attention.q_proj.weight"
    return tensors | {name: torch.zeros(1).expand(100_000, 100_000)}


def truncated(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def header(size):
    return content("model.safetensors", size.to_bytes(8, "little") + b"{}")


HUGE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_buckets", "num_labels")
HUGE += ("num_conv_pos_embeddings", "num_conv_pos_embedding_groups", "vocab_size", "classifier_proj_size")
NOT_JSON = (b"", b"{", b"[1, 2]", b"\xff\xfe\x00{", b"[" * 100_000, b"null", b'{"model_type": "wavlm"', b"\x00" * 10)

# What is broken, and words of the message.
TEACHERS = [
    *[(field(name, 10**9), f"`{name}`") for name in HUGE],
    (field("hidden_size", 2**20), "config.json describes"),
    (field("conv_dim", [10**9] * 7), "`conv_dim`"),
    (field("conv_dim", [2**20] * 7), "config.json describes"),
    (field("conv_kernel", [2**20] * 7), "config.json describes"),
    (field("num_hidden_layers", 40), "encoder.layers.3"),
    (field("num_hidden_layers", 256), "256 layers"),
    (field("num_hidden_layers", 2**20), "layers"),
    (field("intermediate_size", 2**20), "config.json describes"),
    (field("num_hidden_layers", 4), "encoder.layers.3"),
    (field("num_hidden_layers", 2), "encoder.layers.2"),
    (field("num_hidden_layers", 0), "layers"),
    (field("num_hidden_layers", "three"), "num_hidden_layers"),
    (field("num_hidden_layers", None), "num_hidden_layers"),
    (field("num_hidden_layers", 3.5), "num_hidden_layers"),
    (field("num_hidden_layers", float("nan")), "`num_hidden_layers`"),
    (field("num_attention_heads", 0), "zero"),
    (field("num_attention_heads", 5), "divisible"),
    (field("conv_stride", [0] * 7), "`conv_stride`"),
    (field("conv_stride", [5, 2]), "conv_stride"),
    (field("conv_dim", "sixteen"), "conv_dim"),
    (field("conv_dim", []), "conv"),
    (field("layer_norm_eps", float("inf")), "`layer_norm_eps`"),
    (field("hidden_act", "evil"), "evil"),
    (field("hidden_dropout", 7.0), "7"),
    (field("id2label", [1, 2]), "config.json"),
    (field("feat_extract_norm", "layer"), "`feat_extract_norm`"),
    (field("do_stable_layer_norm", True), "`do_stable_layer_norm`"),
    (field("conv_bias", True), "conv.bias is missing"),
    (field("add_adapter", True), "`add_adapter`"),
    (field("quantization_config", {"quant_method": "bitsandbytes"}), "quantised"),
    (field("model_type", "no-such-model"), "'no-such-model'"),
    (field("model_type", ["wavlm"]), "['wavlm']"),
    (field("model_type", None), "None"),
    (field("model_type", "bert"), "is a `bert`; teachers"),
    *[(content("config.json", data), "config.json") for data in NOT_JSON],
    (in_place_of("config.json", os.mkdir), "config.json in it is not a file"),
    (in_place_of("config.json", os.mkfifo), "config.json in it is not a file"),
    (in_place_of("config.json", lambda path: path.symlink_to("nowhere")), "config.json in it is not a file"),
    (in_place_of("config.json", lambda path: None), "no config.json"),
    (in_place_of("model.safetensors", os.mkdir), "model.safetensors in it is not a file"),
    (in_place_of("model.safetensors", os.mkfifo), "model.safetensors in it is not a file"),
    (in_place_of("model.safetensors", lambda path: None), "neither model.safetensors nor pytorch_model.bin"),
    (content("model.safetensors", b""), "weights"),
    (content("model.safetensors", b"not a file of weights"), "weights"),
    (header(10**9), "weights"),
    (header(2**62), "weights"),
    (truncated, "weights"),
    (without("encoder.layers.1."), "encoder.layers.1.attention"),
    (without("encoder.pos_conv_embed"), "pos_conv_embed"),
    (weights(lambda tensors: {f"other.{name}": tensor for name, tensor in tensors.items()}), "is missing"),
    (weights(lambda tensors: {"a": torch.zeros(60_000)}), "1 tensors"),
    (weights(lambda tensors: tensors | {"encoder.layers.7.layer_norm.weight": torch.ones(32)}), "encoder.layers.7"),
    (each(lambda name, tensor: tensor[:1].clone() if "q_proj.weight" in name else tensor), "q_proj.weight has shape"),
    (each(lambda name, tensor: torch.zeros_like(tensor)), "all zeros"),
    (each(lambda name, tensor: tensor * 0 if "encoder.layers" in name else tensor), "all zeros"),
    (each(lambda name, tensor: tensor * 0 if "conv_layers.3.conv" in name else tensor), "conv_layers.3.conv.weight"),
    (each(lambda name, tensor: tensor * torch.nan), "NaN"),
    (one_value(torch.nan), "encoder.layers.1.final_layer_norm.weight"),
    (one_value(torch.inf), "encoder.layers.1.final_layer_norm.weight"),
    (one_value(-torch.inf, "feature_projection.projection.bias"), "feature_projection.projection.bias"),
    *[(of_type(dtype), "encoder.layers.0") for dtype in (torch.int8, torch.bool, torch.complex64, torch.int64)],
    (of_type(torch.float8_e4m3fn), "float8_e4m3fn"),
    (runs_code, "not a pickle of plain weights"),
    (pickled(lambda tensors: [1, 2]), "something other than named weights"),
    (pickled(lambda tensors: tensors | {"x": 3}), "something other than named weights"),
    (pickled(expanded), "larger than its stored data"),
    (content("pytorch_model.bin", b"\x80\x02", but="model.safetensors"), "not a pickle of plain weights"),
    (content("pytorch_model.bin", b"", but="model.safetensors"), "not a pickle of plain weights"),
    (index([1, 2]), "model.safetensors.index.json"),
    (index({"weight_map": [1]}), "`weight_map`"),
    (index({"weight_map": {"a": 5}}), "`weight_map`"),
    (index({}), "`weight_map`"),
    (index({"weight_map": {"a": "missing.safetensors"}}), "missing.safetensors"),
    (index({"weight_map": {"a": "/etc/passwd"}}), "'/etc/passwd'"),
    (index({"weight_map": {"a": "config.json"}}), "'config.json'"),
    (outside, "'../elsewhere/model.safetensors'"),
]


def names_of(cases):
    return [f"{number}-{case[0].__name__}" for number, case in enumerate(cases)]


@pytest.mark.parametrize(("damage", "pattern"), TEACHERS, ids=names_of(TEACHERS))
def test_teachers_that_cannot_be_used(teacher_files, tmp_path, damage, pattern):
    directory = put(teacher_files, tmp_path / "teacher")
    damage(directory)
    refused(lambda: load_teacher(directory), str(directory), pattern)
    assert not (directory / "ran").exists()


LOADERS = {
    "load_student": load_student,
    "layer_similarity": lambda directory: layer_similarity(directory, [], progress=False),
    "load_model": lambda directory: load_model(directory, AutoModelForCTC),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (field("num_hidden_layers", 4), "encoder.layers.3"),
        (field("num_hidden_layers", 2), "encoder.layers.2"),
        (without("encoder.layers.1."), "encoder.layers.1"),
        (field("num_hidden_layers", 10**9), "`num_hidden_layers`"),
        (field("add_adapter", True), "`add_adapter`"),
        (one_value(torch.nan), "NaN"),
        (runs_code, "not a pickle"),
    ],
)
def test_the_same_rule_wherever_an_encoder_is_loaded(teacher_files, tmp_path, load, damage, pattern):
    directory = put(teacher_files, tmp_path / "teacher")
    damage(directory)
    refused(lambda: load(directory), pattern)


@pytest.mark.parametrize(
    "source", [None, 5, b"teacher", "", [], torch.nn.Linear(2, 2), object()], ids=lambda value: type(value).__name__
)
def test_things_that_are_no_teacher(source):
    refused(lambda: load_teacher(source))


def test_a_file_is_no_teacher(teacher_files, tmp_path):
    directory = put(teacher_files, tmp_path / "teacher")
    refused(lambda: load_teacher(directory / "config.json"), "pass its directory")


@pytest.mark.parametrize("load", [load_teacher, load_student, load_model])
def test_a_peft_adapter_needs_its_model(teacher_files, tmp_path, load):
    model = get_peft_model(tiny_teacher(), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    refused(lambda: load(tmp_path), "it has a PEFT adapter alone", "`merge_and_unload()`")
    tiny_config().save_pretrained(tmp_path)
    refused(lambda: load(tmp_path), "it has a PEFT adapter alone")
    # Beside a model it changes nothing.
    loaded = load(put(teacher_files, tmp_path))
    torch.testing.assert_close(loaded.state_dict(), tiny_teacher().state_dict(), atol=0, rtol=0)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    load(tmp_path / "merged")


def test_neither_code_nor_files_of_others_are_read(teacher_files, tmp_path, monkeypatch):
    directory = put(teacher_files, tmp_path / "teacher")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks at the terminal"))
    (directory / "evil.py").write_text("open('ran', 'w')\n")
    monkeypatch.chdir(directory)
    evil = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoFeatureExtractor": "someone/else--evil.E"}
    for name, value in {
        "auto_map": evil,
        "custom_pipelines": {"x": {"impl": "evil.P"}},
        "transformers_weights": "../other.safetensors",
        "configuration_files": ["config.4.0.json"],
        "fusion_config": {"a": True},
        "note": "private",
        "tokenizer_class": "EvilTokenizer",
    }.items():
        field(name, value)(directory)
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/else"}')
    field("auto_map", evil, "preprocessor_config.json")(directory)
    field("note", "private", "preprocessor_config.json")(directory)
    teacher = load_teacher(directory)
    assert type(teacher) is WavLMModel
    student = build_student(teacher)
    student.save_pretrained(tmp_path / "student")
    plain_feature_extractor(load_feature_extractor(directory)).save_pretrained(tmp_path / "student")
    WavLMForSkillStudent.from_pretrained(put(teacher_files, tmp_path / "stock")).save_pretrained(tmp_path / "other")
    for path in (tmp_path / "student" / "config.json", tmp_path / "other" / "config.json"):
        published = json.loads(path.read_text())
        assert published["auto_map"] == WavLMSkillStudentConfig().auto_map
        assert published.keys() <= WavLMSkillStudentConfig().to_dict().keys()
        assert "private" not in path.read_text() and str(tmp_path) not in path.read_text()
    extractor = json.loads((tmp_path / "student" / "preprocessor_config.json").read_text())
    assert extractor.keys() <= Wav2Vec2FeatureExtractor().to_dict().keys()
    assert not (directory / "ran").exists()
    # Code alone, of a kind that transformers does not know.
    field("model_type", "evil")(directory)
    refused(lambda: load_teacher(directory), "'evil'")


@pytest.mark.parametrize(
    "model_class", [WavLMForCTC, WavLMForXVector, WavLMForAudioFrameClassification, Wav2Vec2ForPreTraining]
)
@pytest.mark.parametrize("pickle_", [False, True])
def test_heads_and_what_pretraining_left_are_no_part_of_the_encoder(model_class, tmp_path, pickle_):
    sizes = {"vocab_size": 9, "tdnn_dim": (8,) * 5, "xvector_output_dim": 8, "codevector_dim": 8}
    config = tiny_config(**sizes)
    if model_class is Wav2Vec2ForPreTraining:
        kept = Wav2Vec2Config().to_dict()
        fields = {name: value for name, value in config.to_dict().items() if name in kept and name != "model_type"}
        config = Wav2Vec2Config(**fields)
    torch.manual_seed(0)
    model = model_class(config)
    model.save_pretrained(tmp_path)
    if pickle_:  # as older versions wrote it
        tensors = load_file(tmp_path / "model.safetensors")
        for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
            tensors = {name.replace(f"parametrizations.weight.{new}", old): part for name, part in tensors.items()}
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    for auto_class in (AutoModel, AutoModelForCTC, AutoModelForAudioClassification):
        loaded = load_model(tmp_path, auto_class)
        torch.testing.assert_close(loaded.base_model.state_dict(), model.base_model.state_dict(), atol=0, rtol=0)
        assert all(parameter.isfinite().all() for parameter in loaded.parameters())
        assert loaded.config.name_or_path == str(tmp_path) and not loaded.training


@pytest.mark.parametrize("model_class", [Data2VecAudioModel, Data2VecAudioForCTC])
def test_encoders_of_other_families_load_with_the_same_checks(tmp_path, model_class):
    known = Data2VecAudioConfig().to_dict()
    fields = {name: value for name, value in tiny_config().to_dict().items() if name in known and name != "model_type"}
    model = model_class(Data2VecAudioConfig(**fields))
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.base_model.state_dict(), atol=0, rtol=0)
    refused(lambda: load_teacher(tmp_path), "is a `data2vec-audio`; teachers")
    without("encoder.layers.1.")(tmp_path)
    refused(lambda: load_model(tmp_path), "encoder.layers.1")


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("data2vec-audio", {"num_conv_pos_embeddings": 5}, "positional convolution is a stack"),
        ("sew", {"conv_dim": (16,) * 13}, "half of the frames"),
        ("sew-d", {"conv_dim": (16,) * 13}, "half of the frames"),
        ("wav2vec2-conformer", {}, "convolutions within its layers"),
        ("wav2vec2-bert", {}, "convolutions within its layers, and its input is a spectrogram"),
        ("whisper", {"d_model": 24, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}, "input is a spectrogram"),
    ],
)
def test_families_without_a_student_are_refused_by_name_with_the_reason(tmp_path, model_type, fields, reason):
    sizes = TINY | {"encoder_layers": 1, "decoder_layers": 1, "conv_depthwise_kernel_size": 3, "squeeze_factor": 2}
    known = CONFIG_MAPPING[model_type]().to_dict()
    sizes = {name: size for name, size in sizes.items() if name in known}
    AutoModel.from_config(CONFIG_MAPPING[model_type](**sizes | fields)).save_pretrained(tmp_path)
    for load in (load_teacher, load_student):
        refused(lambda load=load: load(tmp_path), f"is a `{model_type}`; teachers", f"Not `{model_type}`: ", reason)


def test_weights_in_parts_and_in_other_precisions(tmp_path):
    model = tiny_teacher()
    model.half().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    teacher = load_teacher(tmp_path)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    torch.testing.assert_close(teacher.state_dict(), model.float().state_dict(), atol=0, rtol=0)
    # Files may be overwritten afterwards.
    before = copy.deepcopy(teacher.state_dict())
    for path in tmp_path.glob("*.safetensors"):
        with open(path, "r+b") as file:
            file.write(b"\0" * path.stat().st_size)
    torch.testing.assert_close(teacher.state_dict(), before, atol=0, rtol=0)


def test_a_mask_vector_may_be_missing_or_unused(teacher_files, tmp_path):
    directory = put(teacher_files, tmp_path / "teacher")
    without("masked_spec_embed")(directory)
    load_teacher(directory)
    field("mask_time_prob", 0.0)(put(teacher_files, directory))
    load_teacher(directory)


def quantised():
    return torch.ao.quantization.quantize_dynamic(tiny_teacher(), {torch.nn.Linear}, dtype=torch.qint8)


def gated():
    student = build_student(tiny_teacher())
    student.add_gates()
    return student


def changed(name, value):
    teacher = tiny_teacher()
    teacher.get_parameter(name).data.fill_(value)
    return teacher


def whole_numbers():
    teacher = tiny_teacher()
    teacher.encoder.layer_norm.bias = torch.nn.Parameter(torch.ones(32, dtype=torch.int32), requires_grad=False)
    return teacher


def more_layers():
    teacher = tiny_teacher()
    teacher.encoder.layers.append(copy.deepcopy(teacher.encoder.layers[0]))
    return teacher


def with_adapter():
    teacher = tiny_teacher()
    get_peft_model(teacher, LoraConfig(target_modules=["q_proj"]))
    return teacher


OBJECTS = {
    "quantised": (quantised, "quantised"),
    "gated": (gated, "prune()"),
    "peft": (lambda: get_peft_model(tiny_teacher(), LoraConfig(target_modules=["q_proj"])), "merge_and_unload"),
    "peft inside": (with_adapter, "PEFT"),
    "meta": (lambda: tiny_teacher().to("meta"), "meta device"),
    "int": (whole_numbers, "int32"),
    "adapter": (lambda: tiny_teacher(add_adapter=True), "`add_adapter`"),
    "nan": (lambda: changed("encoder.layer_norm.bias", torch.nan), "encoder.layer_norm.bias"),
    "inf": (lambda: changed("encoder.layer_norm.weight", torch.inf), "encoder.layer_norm.weight"),
    "zeros": (lambda: changed("feature_projection.projection.weight", 0.0), "feature_projection.projection.weight"),
    "layers": (more_layers, "encoder.layers.3"),
    "family": (
        lambda: Data2VecAudioModel(Data2VecAudioConfig(num_hidden_layers=1, hidden_size=48)),
        "`data2vec-audio`",
    ),
}


@pytest.mark.parametrize(("make", "pattern"), OBJECTS.values(), ids=OBJECTS)
def test_models_as_objects_that_cannot_be_used(make, pattern):
    model = make()
    refused(lambda: load_teacher(model), pattern)


# ---- Feature extractors ----


def whisper(directory):
    WhisperFeatureExtractor().save_pretrained(directory)


EXTRACTORS = [
    *[
        (field("sampling_rate", rate, "preprocessor_config.json"), "`sampling_rate`")
        for rate in (0, None, "16000", -1, 10**9, 16000.5, True, [16000], float("nan"))
    ],
    (field("do_normalize", "no", "preprocessor_config.json"), "`do_normalize`"),
    (field("return_attention_mask", 1, "preprocessor_config.json"), "`return_attention_mask`"),
    (field("padding_side", "left", "preprocessor_config.json"), "`padding_side`"),
    (field("padding_value", float("nan"), "preprocessor_config.json"), "`padding_value`"),
    (field("padding_value", "0", "preprocessor_config.json"), "`padding_value`"),
    (field("feature_size", 10**9, "preprocessor_config.json"), "`feature_size`"),
    (field("feature_extractor_type", "EvilExtractor", "preprocessor_config.json"), "EvilExtractor"),
    (whisper, "WhisperFeatureExtractor"),
    *[(content("preprocessor_config.json", data), "preprocessor_config.json") for data in NOT_JSON],
    (in_place_of("preprocessor_config.json", os.mkfifo), "not a file"),
    (content("processor_config.json", b"{"), "processor_config.json"),
    (content("processor_config.json", b'{"feature_extractor": 5}'), "processor_config.json"),
]


@pytest.mark.parametrize(("damage", "pattern"), EXTRACTORS, ids=names_of(EXTRACTORS))
def test_feature_extractors_that_cannot_be_used(teacher_files, tmp_path, damage, pattern):
    directory = put(teacher_files, tmp_path / "teacher")
    damage(directory)
    refused(lambda: load_feature_extractor(directory), str(directory), pattern)
    refused(lambda: layer_similarity(directory, [], progress=False), pattern)


def test_feature_extractors_that_can_be_used(teacher_files, tmp_path):
    directory = put(teacher_files, tmp_path / "teacher")
    assert not load_feature_extractor(directory).do_normalize
    (directory / "processor_config.json").write_text(json.dumps({"feature_extractor": {"do_normalize": True}}))
    assert load_feature_extractor(directory).do_normalize
    for name in ("processor_config.json", "preprocessor_config.json"):
        (directory / name).unlink()
    assert load_feature_extractor(directory) is None


class OwnExtractor:
    """What a user may write: nothing but what is called."""

    sampling_rate = 8_000

    def __call__(self, samples, sampling_rate):
        return {"input_values": [np.tanh(samples)]}


class Louder(Wav2Vec2FeatureExtractor):
    pass


def test_feature_extractors_as_objects():
    check_feature_extractor(OwnExtractor())
    check_feature_extractor(Wav2Vec2FeatureExtractor(sampling_rate=np.int64(8000)))
    refused(lambda: check_feature_extractor(WhisperFeatureExtractor()), "input_features")
    for value in (None, 5, "extractor", object()):
        refused(lambda value=value: check_feature_extractor(value), "`sampling_rate`")
    assert plain_feature_extractor(OwnExtractor()).sampling_rate == 8_000
    louder = plain_feature_extractor(Louder(return_attention_mask=True))
    assert type(louder) is Wav2Vec2FeatureExtractor and louder.return_attention_mask
    extractor = Wav2Vec2FeatureExtractor(
        do_normalize=False, note="private", auto_map={"AutoFeatureExtractor": "a--b.C"}
    )
    assert plain_feature_extractor(extractor).to_dict() == Wav2Vec2FeatureExtractor(do_normalize=False).to_dict()


def run(tmp_path, teacher, **kwargs):
    clips = [{"input_values": np.random.default_rng(0).standard_normal(33_000).astype(np.float32)}] * 4
    recipe = {"final_steps": 1, "layer_groups": [[0, 1], [2, 3]], "num_clusters": None}
    trainer = SkillDistillationTrainer(
        teacher,
        SkillConfig(target_sparsity=0.5, **recipe),
        TrainingArguments(str(tmp_path / "out"), max_steps=2, save_steps=1, report_to="none", use_cpu=True),
        train_dataset=clips,
        **kwargs,
    )
    trainer.train()
    trainer.save_model()
    return tmp_path / "out"


def test_a_run_publishes_nothing_of_the_teachers_that_it_does_not_know(teacher_files, tmp_path):
    directory = put(teacher_files, tmp_path / "teacher")
    for file in ("config.json", "preprocessor_config.json"):
        for name in ("AutoConfig", "AutoModel", "AutoFeatureExtractor"):
            field("auto_map", {name: "someone/else--evil.E"}, file)(directory)
            field("note", "someone/else", file)(directory)
    output = run(tmp_path, str(directory))
    for path in (path for path in output.rglob("*") if path.suffix in (".json", ".py", ".md", ".yaml")):
        assert "someone/else" not in path.read_text()
    assert not AutoFeatureExtractor.from_pretrained(output).do_normalize
    assert type(AutoModel.from_pretrained(output)) is WavLMForSkillStudent


def test_a_run_with_a_feature_extractor_of_ones_own(teacher_files, tmp_path, caplog):
    class Padded(OwnExtractor):
        def pad(self, rows, **kwargs):
            return Wav2Vec2FeatureExtractor(return_attention_mask=True).pad(rows, **kwargs)

    output = run(tmp_path, str(put(teacher_files, tmp_path / "teacher")), processing_class=Padded())
    saved = AutoFeatureExtractor.from_pretrained(output)
    assert type(saved) is Wav2Vec2FeatureExtractor and not saved.do_normalize and saved.sampling_rate == 8000
    assert "prepares audio differently from your Padded" in caplog.text


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("damage", [each(lambda name, tensor: tensor * torch.nan), without("encoder.layers.1.")])
def test_a_run_is_refused_before_training(teacher_files, tmp_path, damage, by_hand):
    directory = put(teacher_files, tmp_path / "teacher")
    damage(directory)
    groups = {"layer_groups": [[0, 1], [2, 3]], "num_clusters": None} if by_hand else {}
    refused(lambda: SkillDistillationTrainer(directory, SkillConfig(**groups)), str(directory))
    refused(lambda: SkillDistillationTrainer(tiny_teacher(), model=changed("encoder.layer_norm.bias", torch.nan)))


def test_an_adapter_is_refused_wherever_frames_are_counted():
    teacher = tiny_teacher(add_adapter=True)
    extractor = Wav2Vec2FeatureExtractor()
    refused(lambda: PretrainedEncoder(teacher, extractor), "`add_adapter`")
    refused(lambda: layer_similarity(teacher, [np.ones(8000, np.float32)], progress=False), "`add_adapter`")
    student = WavLMForSkillStudent(WavLMSkillStudentConfig(**tiny_config(add_adapter=True).to_dict()))
    refused(lambda: SkillDistillationTrainer(tiny_teacher(), model=student), "`add_adapter`")


# ---- Students, as anybody loads them ----


STUDENTS = [
    *[(field(name, 10**9), f"`{name}`") for name in HUGE],
    *[(field(name, [10**9] * 7), f"`{name}[0]`") for name in ("conv_dim", "conv_kernel", "conv_stride")],
    (field("tdnn_dim", [10**9] * 5), "`tdnn_dim[0]`"),
    (field("intermediate_sizes", [10**9, 0, 48]), "`intermediate_sizes[0]`"),
    (field("remaining_heads", [[], [10**9], [0, 1, 2, 3]]), "`remaining_heads[1]`"),
    # Below the largest size that there may be at all: found by what the file declares.
    (field("hidden_size", 2**20), "`hidden_size`"),
    (field("num_buckets", 2**20), "`num_buckets`"),
    (field("intermediate_sizes", [2**20, 0, 48]), "`intermediate_sizes[0]`"),
    (field("intermediate_sizes", [5, 0, 2**20]), "`intermediate_sizes[2]`"),
    (field("conv_dim", [2**20, 16, 5, 7, 16, 2, 11]), "`conv_dim[0]`"),
    (field("conv_kernel", [10, 3, 3, 3, 2**20, 2, 2]), "`conv_kernel[4]`"),
    (field("num_conv_pos_embeddings", 2**20), "`num_conv_pos_embeddings`"),
    (field("num_conv_pos_embedding_groups", 8), "`num_conv_pos_embedding_groups`"),
    (field("num_attention_heads", 8), "`num_attention_heads`"),
    (field("feat_extract_norm", "layer"), "`feat_extract_norm`"),
    (field("do_stable_layer_norm", True), "`do_stable_layer_norm`"),
    (field("conv_bias", True), "`conv_bias`"),
    *[(of_type(dtype), "floating") for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)],
    (one_value(torch.nan), "encoder.layers.1.final_layer_norm.weight"),
    (one_value(-torch.inf, "feature_projection.projection.weight"), "feature_projection.projection.weight"),
    (truncated, "model.safetensors"),
    (content("model.safetensors", b""), "model.safetensors"),
    (header(2**62), "model.safetensors"),
    (outside, "outside its directory"),
    (pickled(expanded), "pytorch_model.bin"),
    (runs_code, "pytorch_model.bin"),
]


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCTC], ids=lambda auto_class: auto_class.__name__)
@pytest.mark.parametrize(("damage", "pattern"), STUDENTS, ids=names_of(STUDENTS))
def test_students_that_cannot_be_used(student_files, tmp_path, auto_class, damage, pattern):
    directory = put(student_files, tmp_path / "student")
    damage(directory)
    refused(lambda: auto_class.from_pretrained(directory), pattern)
    assert not (directory / "ran").exists()
    refused(lambda: load_teacher(directory))


@pytest.mark.parametrize(
    ("auto_class", "name", "value"),
    [
        (AutoModelForCTC, "vocab_size", 2**20),
        (AutoModelForAudioClassification, "classifier_proj_size", 2**20),
    ],
)
def test_a_new_head_is_not_larger_than_an_encoder(student_files, tmp_path, auto_class, name, value):
    directory = put(student_files, tmp_path / "student")
    field(name, value)(directory)
    refused(lambda: auto_class.from_pretrained(directory, ignore_mismatched_sizes=True), f"`{name}`")


ANYTHING = (
    None,
    "text",
    "",
    -1,
    10**9,
    10**400,
    True,
    [],
    {},
    1.5,
    0,
    [1],
    [None],
    {"a": 1},
    [[1]],
    "1",
    b"x",
    object(),
)
ANYTHING += (float("nan"), float("inf"), np.int64(3), "two\nlines" * 1000)


@pytest.mark.parametrize("name", sorted(WavLMSkillStudentConfig().to_dict()))
def test_every_field_takes_a_value_or_names_itself(name):
    fields = tiny_config().to_dict() | PRUNED
    for value in ANYTHING:
        try:
            config = WavLMSkillStudentConfig(**fields | {name: value})
        except ValueError as error:
            assert f"`{name}" in str(error) and "\n" not in str(error) and len(str(error)) < 1000
        else:
            with torch.device("meta"):
                WavLMForSkillStudent(config)
            config.to_json_string()


def test_fields_of_others_are_left_out(student_files, tmp_path):
    directory = put(student_files, tmp_path / "student")
    for name, value in {"custom_pipelines": {"x": {"impl": "e.P"}}, "note": "private", "_private": 1}.items():
        field(name, value)(directory)
    AutoModel.from_pretrained(directory).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()).keys() <= (
        WavLMSkillStudentConfig().to_dict().keys()
    )


def test_a_config_of_a_stock_model_that_is_too_large_is_refused_without_weights(tmp_path):
    for name, value, pattern in (
        ("num_hidden_layers", 10**6, "layers"),
        ("conv_dim", [4096] * 10**5, "conv_dim"),
        ("intermediate_size", 2**20, "describes"),
        ("num_labels", 10**9, "`num_labels`"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict() | {name: value, "hidden_size": 8192}))
        refused(lambda: load_config(tmp_path), pattern)
