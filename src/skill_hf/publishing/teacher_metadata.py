"""What the card of a student says of its teachers: their licence, and all of them where they are several."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_url
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from ..models.loading import hub_id_of
from .plots import format_groups
from .run_report import OtherTeacher, RunReport


logger = logging.getLogger(__name__)

HUB_TIMEOUT = 5.0  # seconds; a card does not wait longer for the licence of the teacher


@dataclass
class SeveralTeachers:
    """
    All teachers but the first, for the template.

    Args:
        names (`list[str]`): ids on the Hub, or what the others are.
        links (`list[str]`): the same, with links.
        groups (`list[tuple[str, str]]`): link and groups of layers of each teacher whose groups are known.
        is_averaged (`bool`): whether targets are averages over the teachers.
    """

    names: list[str]
    links: list[str]
    groups: list[tuple[str, str]]
    is_averaged: bool


def several_teachers(report: RunReport) -> SeveralTeachers | None:
    """Values for the template; `None` for one teacher."""
    if not report.other_teachers:
        return None
    ids = [hub_id_of(other.name) for other in report.other_teachers]
    types = [f"a `{other.model.config.model_type}` model" for other in report.other_teachers]
    links = [
        f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else kind
        for hub_id, kind in zip(ids, types, strict=True)
    ]
    return SeveralTeachers(
        names=[hub_id or kind for hub_id, kind in zip(ids, types, strict=True)],
        links=links,
        groups=[
            (link, format_groups(other.layer_groups))
            for link, other in zip(links, report.other_teachers, strict=True)
            if other.layer_groups
        ],
        is_averaged=report.skill_config.teacher_targets == "average",
    )


def add_other_teachers(data: ModelCardData, others: Sequence[OtherTeacher]) -> None:
    """
    Adds teachers to the metadata of a card: `base_model` becomes a list of all known ids. A licence stays only if it
    is that of all teachers.
    """
    if not others:
        return
    ids = [name for name in (data.base_model, *(hub_id_of(other.name) for other in others)) if name]
    data.base_model = list(dict.fromkeys(ids)) or None
    if len(data.base_model or []) > 1:
        data["base_model_relation"] = "finetune"  # the Hub would take a list for a merge
    if any(teacher_license(other.name) != data.license for other in others):
        data.license = None


def teacher_license(name: str | Path | None) -> str | None:
    """
    Licence in the card of a model, such as `"mit"`, or `None`: if there is no card or no licence in it, or the Hub
    cannot be reached within a few seconds or must not be contacted (`HF_HUB_OFFLINE`).

    Args:
        name (`str` or `Path`, *optional*): local directory or Hub id of the model.
    """
    readme, hub_id = Path(name or "") / REPOCARD_NAME, hub_id_of(name)
    try:
        card = readme.read_text(encoding="utf-8") if name and readme.is_file() else hub_id and _card_on_hub(hub_id)
        licence = ModelCard(card, ignore_metadata_errors=True).data.get("license") if card else None
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        logger.info("The card of %s cannot be read: %s", name, error)
        return None
    return licence if isinstance(licence, str) else None


@functools.cache  # a run writes its card several times, and may have no network
def _card_on_hub(repo_id: str) -> str | None:
    # One request. `ModelCard.load` would go on for half a minute where there is no network.
    url = hf_hub_url(repo_id, REPOCARD_NAME)
    try:
        response = get_session().get(url, headers=build_hf_headers(), timeout=HUB_TIMEOUT)
        hf_raise_for_status(response)
    except Exception as error:  # the client's HTTP library has been three by now, each with errors of its own
        logger.info("The card of %s could not be read on the Hub: %s", repo_id, error)
        return None
    return response.text
