"""Who may import whom: the layers of the package, held in place."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import skill_hf
from skill_hf.cli.main import COMMANDS
from skill_hf.metrics import METRICS


PACKAGE = Path(__file__).parents[1] / "src" / "skill_hf"

# Module -> what it may import of this package. Lower layers stand first; a new module needs a line of its own.
LAYERS = {
    "version": set(),
    "fields": set(),
    "files": set(),
    "configuration_skill_student": set(),
    "units": {"configuration_skill_student"},
    "skill_config": {"fields", "files", "units"},
    "gates": set(),
    "losses": set(),
    "audio_decoding": set(),
    "remote_files": set(),
    "audio": {"audio_decoding", "remote_files"},
    "speech_datasets": {"audio", "remote_files"},
    "data": {"audio", "speech_datasets"},
    "loading": {"configuration_skill_student", "files", "gates"},
    "encoders": {"data", "loading"},
    "model_modes": {"data"},
    "similarity": {"data", "loading", "losses", "model_modes", "skill_config"},
    "plots": {"losses", "units"},
    "argument_validation": set(),
    "early_stopping": set(),
    "skill_training_args": {"argument_validation", "skill_config"},
    "optimization": set(),
    "run_validation": {"argument_validation", "early_stopping", "optimization"},
    # Files that `evaluate.load` takes one by one: they stand alone.
    "metrics/accuracy": set(),
    "metrics/diarization_error_rate": set(),
    "metrics/equal_error_rate": set(),
    "metrics/error_rate": set(),
    "metrics/slot_filling": set(),
    "metrics/term_weighted_value": set(),
    "metrics/__init__": {
        "metrics/accuracy",
        "metrics/diarization_error_rate",
        "metrics/equal_error_rate",
        "metrics/error_rate",
        "metrics/slot_filling",
        "metrics/term_weighted_value",
    },
    "superb/scores": set(),
    "superb/heads": set(),
    "superb/features": {"audio", "encoders", "files"},
    "superb/tasks": {"metrics/__init__", "superb/heads"},
    "superb/diarization": {"metrics/__init__", "superb/heads", "superb/tasks"},
    "superb/slot_filling": {"metrics/__init__", "superb/tasks"},
    "superb/query_by_example": {"encoders", "metrics/__init__", "superb/features", "superb/tasks"},
    "superb/registry": {"superb/diarization", "superb/slot_filling", "superb/tasks"},
    "superb/evaluation": {"checkpointing", "encoders", "files", "superb/features", "superb/tasks"},
    "superb/__init__": {"superb/scores"},
    # Published with every student, so they import nothing that isn't published beside them.
    "fast_layers": set(),
    "weight_checks": set(),
    "modeling_skill_student": {"configuration_skill_student", "fast_layers", "weight_checks"},
    "configuration_wavlm_skill_student": {"configuration_skill_student"},
    "modeling_wavlm_skill_student": {
        "configuration_skill_student",
        "configuration_wavlm_skill_student",
        "fast_layers",
        "modeling_skill_student",
        "weight_checks",
    },
    "families": {"loading", "modeling_wavlm_skill_student"},
    "analysis": {"data", "gates", "model_modes", "similarity"},
    "storage": set(),
    "checkpointing": {"files", "skill_config", "storage"},
    "run_identity": {"data"},
    "divergence": {"checkpointing", "losses"},
    "interruption": {"checkpointing"},
    "clustering": {"skill_config"},
    "export": {"data", "fast_layers", "files", "gates"},
    "budgets": {"analysis", "gates", "units"},
    "latency": {"budgets", "data", "families", "units", "version"},
    "run_record": set(),
    "run_report": {"budgets", "run_record", "skill_config"},
    "dataset_description": {"loading"},
    "model_card": {
        "analysis",
        "dataset_description",
        "loading",
        "losses",
        "plots",
        "run_report",
        "skill_config",
        "units",
        "version",
    },
    "pruning": {"budgets", "gates", "units"},
    "publishing": {"gates", "loading", "model_card", "skill_config", "version"},
    "recipe_validation": {"budgets", "data", "families", "gates", "loading", "pruning", "skill_config", "units"},
    "shrinking": {"optimization", "pruning"},
    "loss_sums": {"losses"},
    "cut": {"budgets", "pruning"},
    "teacher": {"families", "fast_layers", "files", "loading", "losses", "run_identity"},
    "calibration": {"clustering", "data", "losses", "similarity", "skill_config"},
    "student_measurements": {"analysis", "data", "loss_sums", "model_modes"},
    "unreadable_clips": {"checkpointing", "data"},
    "distillation": {"budgets", "gates", "losses", "pruning"},
    # What transformers' loop calls, then the Hub, then the run.
    "distillation_trainer": {
        "audio",
        "budgets",
        "data",
        "distillation",
        "divergence",
        "gates",
        "loss_sums",
        "losses",
        "model_modes",
        "optimization",
        "pruning",
        "skill_config",
        "teacher",
        "unreadable_clips",
    },
    "publishing_trainer": {"distillation", "distillation_trainer", "gates", "model_card", "publishing"},
    "skill_trainer": {
        "argument_validation",
        "calibration",
        "checkpointing",
        "clustering",
        "cut",
        "data",
        "distillation",
        "divergence",
        "early_stopping",
        "families",
        "files",
        "gates",
        "interruption",
        "loading",
        "loss_sums",
        "model_card",
        "model_modes",
        "pruning",
        "publishing_trainer",
        "recipe_validation",
        "run_identity",
        "run_record",
        "run_report",
        "run_validation",
        "shrinking",
        "skill_config",
        "skill_training_args",
        "storage",
        "student_measurements",
        "teacher",
    },
    # The top floor: nothing imports it.
    "cli/__init__": set(),
    "cli/settings": {"encoders"},
    "cli/distill": {
        "cli/settings",
        "data",
        "divergence",
        "families",
        "interruption",
        "skill_config",
        "skill_trainer",
        "skill_training_args",
    },
    "cli/export": {
        "cli/settings",
        "configuration_wavlm_skill_student",
        "data",
        "encoders",
        "export",
        "files",
        "loading",
        "modeling_wavlm_skill_student",
    },
    "cli/info": {"analysis", "cli/settings", "families", "loading", "model_card", "units"},
    "cli/main": {"cli/distill", "cli/export", "cli/info", "version"},
    "__init__": {
        "clustering",
        "configuration_wavlm_skill_student",
        "modeling_skill_student",
        "modeling_wavlm_skill_student",
        "pruning",
        "publishing",
        "similarity",
        "skill_config",
        "skill_trainer",
        "skill_training_args",
        "version",
    },
}

# Travel with every student and stay as they are, while the package's modules may move.
SHARED = ("configuration_skill_student", "fast_layers", "modeling_skill_student", "weight_checks")
FAMILIES = ("wavlm",)
KINDS = ("configuration", "modeling")
PUBLISHED = (*SHARED, *(f"{kind}_{family}_skill_student" for family in FAMILIES for kind in KINDS))
# Modules that import by a computed name, which `imported_modules` cannot read, and the tables that they take it from.
COMPUTED = {
    "__init__": {*skill_hf._LAZY.values(), *(module for module, _ in skill_hf._ACTIONS.values())},
    "metrics/__init__": {f"metrics/{name}" for name in METRICS},
    "cli/main": {f"cli/{name}" for name in COMMANDS},
}


def module_of(names: list[str]) -> str:
    """The module that these names below the package are, or are taken from: `superb/heads`, `superb/__init__`."""
    for length in range(len(names), -1, -1):
        path = PACKAGE.joinpath(*names[:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.relative_to(PACKAGE).with_suffix("").as_posix()
    raise AssertionError("The package has no __init__.py.")


def imported_modules(path: Path) -> set[str]:
    """
    Modules of this package that `path` imports anywhere, in functions and for type checkers too, or names in a string
    of its own, such as the argument of `importlib.import_module`.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [[*absolute(path, "." * node.level + (node.module or "")), alias.name] for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_module_name(node.value):
            imported = [absolute(path, node.value)]
        else:
            continue
        found |= {module_of(names[1:]) for names in imported if names[0] == "skill_hf"}
    return found


def absolute(path: Path, name: str) -> list[str]:
    """Parts of a module's name as it is imported in `path`: `.data`, `..data`, `skill_hf.data`."""
    level = len(name) - len(name.lstrip("."))
    # One dot is the package that the module, or the `__init__`, lies in.
    base = path.relative_to(PACKAGE.parent).parts[:-level] if level else ()
    return [*base, *filter(None, name.lstrip(".").split("."))]


def is_module_name(text: str) -> bool:
    """Whether a string is a name such as `skill_hf.pruning` or `.pruning`, and nothing else."""
    if re.fullmatch(r"skill_hf(\.\w+)+", text):
        return True
    # A relative name must be one of a module that exists, or every suffix of a file would be one.
    return bool(re.fullmatch(r"\.{1,3}[a-z]\w*(\.\w+)*", text)) and text.lstrip(".").replace(".", "/") in LAYERS


def computed_imports(path: Path) -> list[str]:
    """Calls that import a module whose name is computed."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    importing = [
        call
        for call in calls
        if (getattr(call.func, "attr", None) or getattr(call.func, "id", None)) in ("import_module", "__import__")
    ]
    return [ast.unparse(call) for call in importing if not isinstance(call.args[0], ast.Constant)]


def test_every_module_has_a_layer():
    assert {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")} == set(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_module_imports_only_what_its_layer_permits(module):
    assert imported_modules(PACKAGE / f"{module}.py") <= LAYERS[module]


def test_layers_have_no_cycle():
    assert set(TopologicalSorter(LAYERS).static_order()) == set(LAYERS)
    assert not any("__init__" in permitted for permitted in LAYERS.values())


def test_modules_have_no_cycle_late_imports_counted():
    graph = {module: imported_modules(PACKAGE / f"{module}.py") for module in LAYERS}
    for module, imported in COMPUTED.items():
        assert imported <= LAYERS[module]
        graph[module] |= imported
    assert set(TopologicalSorter(graph).static_order()) == set(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_names_of_imported_modules_are_computed_from_known_tables_only(module):
    assert bool(computed_imports(PACKAGE / f"{module}.py")) == (module in COMPUTED)


@pytest.mark.parametrize("module", PUBLISHED)
def test_published_files_name_no_module_of_the_package(module):
    """Not even in text: where a link in a docstring leads today, there may be nothing tomorrow."""
    assert "skill_hf." not in (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    assert imported_modules(PACKAGE / f"{module}.py") <= set(PUBLISHED)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_a_family_import_all_that_they_need_themselves(kind, family):
    """Transformers 4 copies what they import from a local directory, but not what that imports in turn."""
    entry = f"{kind}_{family}_skill_student"
    direct = imported_modules(PACKAGE / f"{entry}.py")
    assert direct >= {name for module in direct for name in imported_modules(PACKAGE / f"{module}.py")}
    # They alone are what `auto_map` names, so nothing else brings the shared files along.
    assert direct == ({"configuration_skill_student"} if kind == "configuration" else {*PUBLISHED} - {entry})


def test_shared_files_load_no_family(tmp_path):
    """A student of one family must not stop loading when transformers drops another."""
    (tmp_path / "published").mkdir()
    for name in SHARED:
        shutil.copy(PACKAGE / f"{name}.py", tmp_path / "published")
    code = (
        "import importlib, re, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "for name in sys.argv[2:]:\n"
        "    importlib.import_module(f'published.{name}')\n"
        "print(*[name for name in sys.modules if re.match(r'transformers\\.models\\.(?!auto\\b)\\w+\\.', name)])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *SHARED], capture_output=True, text=True, timeout=300, check=True
    )
    assert result.stdout.split() == []


@pytest.mark.parametrize(
    "file, line, modules",
    [
        ("gates.py", "from .data import AudioError, read_audio", {"data"}),
        ("gates.py", "from . import data, losses", {"data", "losses"}),
        ("gates.py", "from .superb import heads, METRICS", {"superb/heads", "superb/__init__"}),
        ("gates.py", "import skill_hf.superb.heads as x, skill_hf, torch", {"superb/heads", "__init__"}),
        ("gates.py", "from skill_hf.metrics import load_metric", {"metrics/__init__"}),
        ("superb/heads.py", "from ..data import read_audio", {"data"}),
        ("superb/heads.py", "from .tasks import Task", {"superb/tasks"}),
        ("superb/heads.py", "from .. import data", {"data"}),
        ("superb/heads.py", "def f():\n    from ..metrics import load_metric", {"metrics/__init__"}),
        ("superb/__init__.py", "from .scores import METRICS", {"superb/scores"}),
        ("superb/__init__.py", "from . import scores", {"superb/scores"}),
        ("superb/__init__.py", "from ..encoders import FilterBank", {"encoders"}),
        ("__init__.py", "from .version import __version__", {"version"}),
        ("gates.py", "importlib.import_module('skill_hf.pruning')", {"pruning"}),
        ("gates.py", "importlib.import_module('.pruning', 'skill_hf')", {"pruning"}),
        ("gates.py", "MODULES = {'a': 'skill_hf.superb.heads'}", {"superb/heads"}),
        ("superb/heads.py", "__import__('..data', level=2)", {"data"}),
        ("gates.py", "'See skill_hf.pruning for more.'; SUFFIX = '.json'; NAME = 'pruning'", set()),
    ],
)
def test_all_forms_of_imports_are_understood(tmp_path, monkeypatch, file, line, modules):
    for path in PACKAGE.rglob("*.py"):
        copy = tmp_path / "skill_hf" / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "skill_hf")
    (tmp_path / "skill_hf" / file).write_text(line)
    assert imported_modules(tmp_path / "skill_hf" / file) == modules
