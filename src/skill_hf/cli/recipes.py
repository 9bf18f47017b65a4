"""Recipes of this package by name: settings for a teacher and a sparsity, in YAML files that a user can copy."""

import difflib
from pathlib import Path

from .settings import read_settings


DIRECTORY = Path(__file__).resolve().parents[1] / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes, sorted."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def load_recipe(name: str) -> dict:
    """
    Settings of the recipe `name`, such as `hubert-base-075`.

    Raises:
        `ValueError`: if there is no such recipe.
    """
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ValueError(f"There is no recipe {name!r}. {hint}The recipes are {', '.join(names)}.")
    return read_settings(str(DIRECTORY / f"{name}.yaml"))
