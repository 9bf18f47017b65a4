"""Who may import whom: the layers of the package, held in place."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "src" / "skill_hf"

# Module -> what it may import of this package. Lower layers stand first; a new module needs a line of its own.
LAYERS = {
    "version": set(),
    "skill_config": set(),
    "configuration_wavlm_skill_student": set(),
    "gates": set(),
    "losses": set(),
    "data": set(),
    "similarity": {"data"},
    "plots": set(),
    "skill_training_args": set(),
    "superb": set(),
    # Published with every student, so it imports nothing that isn't published beside it.
    "modeling_wavlm_skill_student": {"configuration_wavlm_skill_student"},
    "analysis": {"data", "similarity"},
    "checkpointing": {"skill_config"},
    "clustering": {"skill_config"},
    "export": {"data"},
    "budgets": {"analysis", "gates", "skill_config"},
    "model_card": {"analysis", "budgets", "plots", "version"},
    "pruning": {"budgets", "gates"},
    "publishing": {"model_card", "pruning", "skill_config", "version"},
    "recipe_validation": {"budgets", "data", "pruning", "skill_config"},
    "distillation": {"budgets", "losses", "pruning"},
    "families": {"modeling_wavlm_skill_student"},
    "skill_trainer": {
        "budgets",
        "checkpointing",
        "clustering",
        "data",
        "distillation",
        "families",
        "losses",
        "model_card",
        "pruning",
        "publishing",
        "recipe_validation",
        "similarity",
        "skill_config",
        "skill_training_args",
    },
    "__init__": {
        "clustering",
        "configuration_wavlm_skill_student",
        "modeling_wavlm_skill_student",
        "similarity",
        "skill_config",
        "skill_trainer",
        "skill_training_args",
        "version",
    },
}


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that `path` imports anywhere, in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["skill_hf" if node.level else "", node.module]))
            # `from . import x` may name a module; `from .x import y` names x, whatever y is.
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "skill_hf" else [base]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "skill_hf":
                found.add(rest.partition(".")[0] or "__init__")
    return found


def test_every_module_has_a_layer():
    assert {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")} == set(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_module_imports_only_what_its_layer_permits(module):
    assert imported_modules(PACKAGE / f"{module}.py") <= LAYERS[module]


def test_layers_have_no_cycle():
    order = list(TopologicalSorter(LAYERS).static_order())
    assert order[-1] == "__init__"
