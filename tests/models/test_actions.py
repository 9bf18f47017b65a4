"""
What a student does by the package (`add_gates`, `prune`, `push_to_hub`) in the three places that its file may be: the
package's own, a copy in the modules cache of transformers beside the package, and such a copy without the package.
"""

import importlib
import json
import os
import subprocess
import sys

import pytest
from test_modeling_wavlm_skill_student import pruned_student

import skill_hf
from skill_hf.models import modeling_skill_student


# Loads the student of the directory in argv and tells, as JSON, what its actions do. `{before}` runs first.
CHILD = """
import contextlib, io, json, logging, sys
{before}
from transformers import AutoModel, utils

def stock_push(self, repo_id, **kwargs):
    return ["stock", repo_id, kwargs["private"]]

utils.hub.PushToHubMixin.push_to_hub = stock_push

def outcome(function, *args, **kwargs):
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        logging.basicConfig(stream=stderr, force=True)
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            result = f"{{type(error).__name__}}: {{error}}"
    return result, [line for line in stderr.getvalue().splitlines() if "card" in line]

def load():
    return AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)

student = load()
seen = {{
    "module": type(student).__module__,
    "gating": student.gating,
    "pushed": outcome(student.push_to_hub, "me/student", private=True),
}}
for action in ("add_gates", "named_gates", "num_expected_parameters", "prune"):
    seen[action] = outcome(getattr(student, action))[0]
{after}
json.dump(seen, sys.stdout)
"""

IMPORT_LATER = """
import skill_hf
seen["pushed_after_import"] = outcome(student.push_to_hub, "me/student", private=True)
seen["loaded_after_import"] = type(load()).__module__
"""


def visit(directory, cache, before="", after="") -> dict:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD.format(before=before, after=after), str(directory)],
        env=os.environ | {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


@pytest.fixture
def published(tmp_path):
    pruned_student("base").save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def assert_actions_say_what_to_install(seen):
    assert seen["module"].startswith("transformers_modules.")
    assert seen["gating"] is None
    for action in ("add_gates", "named_gates", "num_expected_parameters", "prune"):
        assert seen[action].startswith(f"ImportError: `{action}` needs the skill-hf package")
        assert "pip install skill-hf" in seen[action] and "import skill_hf" in seen[action]


def test_copy_without_the_package(published, tmp_path):
    seen = visit(published, tmp_path / "modules", before='sys.modules["skill_hf"] = None')
    assert_actions_say_what_to_install(seen)
    assert seen["pushed"] == [["stock", "me/student", True], []]


@pytest.mark.nightly
def test_copy_beside_the_package(published, tmp_path):
    """Which may be of another version, and does not act on it: that is said."""
    seen = visit(published, tmp_path / "modules", after=IMPORT_LATER)
    assert_actions_say_what_to_install(seen)
    for moment in ("pushed", "pushed_after_import"):
        result, (warning,) = seen[moment]
        assert result == ["stock", "me/student", True]
        assert "may differ from the installed" in warning and "`import skill_hf`, load the student again" in warning
    assert seen["loaded_after_import"] == "skill_hf.models.modeling_wavlm_skill_student"


def test_package_fills_the_table_of_its_own_file():
    actions = modeling_skill_student.ACTIONS
    assert actions.keys() == skill_hf._ACTIONS.keys()
    for module, function in skill_hf._ACTIONS.values():
        assert callable(getattr(importlib.import_module(f"skill_hf.{module}"), function))


def test_actions_of_the_package_get_their_arguments(monkeypatch):
    student, calls = pruned_student("base"), []
    monkeypatch.setattr("skill_hf.publishing.hub.push_model", lambda *args, **kwargs: calls.append((args, kwargs)))
    student.push_to_hub("me/student", private=True)
    assert calls == [((student, "me/student"), {"private": True})]
    student.add_gates(["ffn_dims"], 8)
    assert student.gating.kinds == ["ffn_dims"] and student.gating.width_multiple == 8
    assert {name.rpartition(".")[2] for name, _ in student.named_gates()} == {"dim_gate"}
    student.prune()
    assert student.gating is None
