"""Who may import whom: the layers of the package, held in place."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import FAMILIES, SHARED_CODE

import skill_hf
import skill_hf.data
from skill_hf.cli.main import COMMANDS
from skill_hf.metrics import METRICS


PACKAGE = Path(__file__).parents[1] / "src" / "skill_hf"

# Folder, or module beside the folders -> those that it may import, which stand on lower floors.
FLOORS = {
    "data": set(),
    "distribution": set(),
    "files": set(),
    "losses": set(),
    "metrics": set(),
    "storage": set(),
    "version": set(),
    "models": {"files"},
    "compression": {"models"},
    "recipe": {"compression", "distribution", "files", "losses", "models"},
    "conversion": {"files", "models"},
    "encoders": {"models"},
    "export": {"files", "models"},
    "latency": {"compression", "models", "recipe", "version"},
    "windows": {"data", "encoders", "models"},
    # Its class names are in adapters of PEFT.
    "modeling_wavlm_skill_student": {"models"},
    "grouping": {"data", "distribution", "losses", "models", "recipe"},
    "publishing": {"compression", "losses", "models", "recipe", "version"},
    "analysis": {"compression", "grouping"},
    "distillation": {
        "compression",
        "data",
        "distribution",
        "files",
        "grouping",
        "losses",
        "models",
        "publishing",
        "recipe",
        "storage",
        "version",
    },
    "superb": {"data", "distillation", "encoders", "files", "metrics"},
    "cli": {
        "compression",
        "conversion",
        "data",
        "distillation",
        "distribution",
        "encoders",
        "export",
        "files",
        "grouping",
        "losses",
        "models",
        "publishing",
        "recipe",
        "storage",
        "version",
    },
    # Hands out public names and registers students; nothing imports it.
    "__init__": {"compression", "distillation", "grouping", "models", "publishing", "recipe", "version"},
}
MOST_FLOORS = 7
MODULES = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in sorted(PACKAGE.rglob("*.py"))]

# Travel with every student and stay as they are, while the package's modules may move.
SHARED = tuple(f"models/{name}" for name in SHARED_CODE)
KINDS = ("configuration", "modeling")
PUBLISHED = (*SHARED, *(f"models/{kind}_{family}_skill_student" for family in FAMILIES for kind in KINDS))
# Modules that import by a computed name, which `imported_modules` cannot read, and the tables that they take it from.
COMPUTED = {
    "__init__": [*skill_hf._LAZY.values(), *(module for module, _ in skill_hf._ACTIONS.values())],
    "metrics/__init__": [f"metrics.{name}" for name in METRICS],
    "data/__init__": [f"data.{name}" for name in skill_hf.data._PLACES.values()],
    "cli/main": [f"cli.{name}" for name in COMMANDS],
}
MOST_LINES = 500


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
    """Whether a string is a name such as `skill_hf.compression.pruning` or `.pruning`, and nothing else."""
    if re.fullmatch(r"skill_hf(\.\w+)+", text):
        return True
    # A relative name must be one of a module that exists, or every suffix of a file would be one.
    return bool(re.fullmatch(r"\.{1,3}[a-z]\w*(\.\w+)*", text)) and text.lstrip(".").replace(".", "/") in MODULES


def computed_imports(path: Path) -> list[str]:
    """Calls that import a module whose name is computed."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    importing = [
        call
        for call in calls
        if (getattr(call.func, "attr", None) or getattr(call.func, "id", None)) in ("import_module", "__import__")
    ]
    return [ast.unparse(call) for call in importing if not isinstance(call.args[0], ast.Constant)]


def all_imported(module: str) -> set[str]:
    """Late imports and those by a computed name counted."""
    computed = {name.replace(".", "/") for name in COMPUTED.get(module, ())}
    assert computed <= set(MODULES)
    return imported_modules(PACKAGE / f"{module}.py") | computed


def folder_of(module: str) -> str:
    return module.partition("/")[0]


def test_every_folder_has_a_floor():
    assert {folder_of(module) for module in MODULES} == set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_floor_permits(module):
    folder = folder_of(module)
    assert {folder_of(imported) for imported in all_imported(module)} - {folder} <= FLOORS[folder]


def test_files_are_short():
    lengths = {module: len((PACKAGE / f"{module}.py").read_text(encoding="utf-8").splitlines()) for module in MODULES}
    assert [module for module, length in lengths.items() if length > MOST_LINES] == []


def test_floors():
    heights = {}
    for folder in TopologicalSorter(FLOORS).static_order():
        heights[folder] = 1 + max((heights[lower] for lower in FLOORS[folder]), default=0)
    heights.pop("__init__")
    assert max(heights.values()) == MOST_FLOORS


def test_modules_have_no_cycle():
    graph = {module: all_imported(module) - {module} for module in MODULES}
    assert set(TopologicalSorter(graph).static_order()) == set(MODULES)
    assert not any("__init__" in imported for imported in graph.values())


@pytest.mark.parametrize("module", MODULES)
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
    entry = f"models/{kind}_{family}_skill_student"
    direct = imported_modules(PACKAGE / f"{entry}.py")
    assert direct >= {name for module in direct for name in imported_modules(PACKAGE / f"{module}.py")}
    # They alone are what `auto_map` names, so nothing else brings the shared files along.
    shared = {"models/configuration_skill_student"} if kind == "configuration" else {*SHARED}
    own = set() if kind == "configuration" else {f"models/configuration_{family}_skill_student"}
    assert direct == shared | own


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
    names = [name.removeprefix("models/") for name in SHARED]
    command = [sys.executable, "-c", code, str(tmp_path), *names]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize(
    "file, line, modules",
    [
        ("losses.py", "from .data import AudioError, read_audio", {"data/__init__"}),
        ("losses.py", "from . import data, losses", {"data/__init__", "losses"}),
        ("losses.py", "from .superb import heads, METRICS", {"superb/heads", "superb/__init__"}),
        ("losses.py", "import skill_hf.superb.heads as x, skill_hf, torch", {"superb/heads", "__init__"}),
        ("losses.py", "from skill_hf.metrics import load_metric", {"metrics/__init__"}),
        ("superb/heads.py", "from ..data.audio import read_audio", {"data/audio"}),
        ("superb/heads.py", "from .tasks import Task", {"superb/tasks"}),
        ("superb/heads.py", "from .. import data", {"data/__init__"}),
        ("superb/heads.py", "def f():\n    from ..metrics import load_metric", {"metrics/__init__"}),
        ("superb/__init__.py", "from .scores import METRICS", {"superb/scores"}),
        ("superb/__init__.py", "from . import scores", {"superb/scores"}),
        ("superb/__init__.py", "from ..encoders import FilterBank", {"encoders"}),
        ("__init__.py", "from .version import __version__", {"version"}),
        ("losses.py", "importlib.import_module('skill_hf.compression.pruning')", {"compression/pruning"}),
        ("losses.py", "importlib.import_module('.files', 'skill_hf')", {"files"}),
        ("losses.py", "MODULES = {'a': 'skill_hf.superb.heads'}", {"superb/heads"}),
        ("superb/heads.py", "__import__('..files', level=2)", {"files"}),
        ("losses.py", "'See skill_hf.compression.pruning for more.'; SUFFIX = '.json'; NAME = 'pruning'", set()),
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
