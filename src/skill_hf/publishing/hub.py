"""Uploads the files of a student, and nothing else, to the Hub in one commit."""

import filecmp
import json
import logging
import re
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copy
from tempfile import TemporaryDirectory

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HFValidationError, HTTPError
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, FEATURE_EXTRACTOR_NAME

from ..models.families import head_of
from ..models.loading import load_feature_extractor
from ..models.processors import load_tokenizer, save_processor
from ..models.properties import has_gates
from ..recipe.skill_config import SKILL_CONFIG_NAME
from ..version import __version__
from . import model_card


logger = logging.getLogger(__name__)

# One for all, so that uploads in the background come one after the other.
api = HfApi(library_name="skill-hf", library_version=__version__)

RESULTS_NAME = "all_results.json"
# As transformers names them.
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: str | list[str] | None = None,
) -> CommitInfo:
    """
    Implements `push_to_hub` of a student: uploads the model and a model card, in one commit.

    A card that is already in the repository keeps its text and metadata; only missing metadata is added. Otherwise, if
    the weights are still those of a directory written by the trainer, the card and figures from there are uploaded;
    any other model gets a short card. The feature extractor from the model's source is uploaded as well, and the
    tokenizer of a CTC model, unless the repository has one.

    Args:
        model (`PreTrainedModel`):
            A student, with or without a head.
        repo_id (`str`):
            Id on the Hub, `name` or `namespace/name`. Created if it does not exist.
        revision (`str`, *optional*):
            The branch to push to, created if it does not exist.
        commit_message, commit_description, private, token, create_pr, max_shard_size, tags (*optional*):
            As in [`~transformers.PreTrainedModel.push_to_hub`].

    Raises:
        `ValueError`: if the student still has gates.
    """
    if has_gates(model):
        raise ValueError(
            "The student still has its gates: call `prune()`, or let `train()` end, before publishing it."
        )
    repo_id = create_repository(repo_id, private, token)
    if not create_pr:
        create_branch(repo_id, revision, token)
    published = api.list_repo_files(repo_id, revision=revision, token=token)
    with TemporaryDirectory() as directory:
        folder = Path(directory)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if FEATURE_EXTRACTOR_NAME not in published:
            _copy_feature_extractor(folder, model, token)
        source = _unchanged_source(folder, model)
        if REPOCARD_NAME in published:
            card = _published_card(repo_id, revision, token)
        elif source is not None:
            card = ModelCard.load(source / REPOCARD_NAME)
            card.text = model_card.rename_in_snippets(card.text, repo_id)
            for name in (*model_card.FIGURES, RESULTS_NAME):
                if (source / name).is_file():
                    copy(source / name, folder)
        else:
            card = model_card.student_card(model, repo_id)
        if source is not None:
            copy(source / SKILL_CONFIG_NAME, folder)
        data = model_card.card_data(model)
        add_tags(data, tags)
        add_metadata(card.data, data)
        card.save(folder / REPOCARD_NAME)
        return upload(
            folder,
            repo_id,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


@dataclass(frozen=True)
class Destination:
    """
    The repository that a run is published to.

    Args:
        repo_id (`str`): full id on the Hub, `namespace/name`.
        output_dir (`Path`): the directory of the run, with card and figures; used in error messages.
        token, revision: as in [`SkillDistillationTrainer.push_to_hub`].
    """

    repo_id: str
    output_dir: Path
    token: bool | str | None
    revision: str | None


def open_repository(
    repo_id: str,
    output_dir: str | Path,
    *,
    exists: bool,
    token: bool | str | None,
    revision: str | None,
    private: bool | None,
) -> Destination:
    """
    Creates a repository and its branch if they do not exist.

    Args:
        repo_id (`str`): id on the Hub, `name` or `namespace/name`.
        output_dir (`str` or `Path`): directory of the run.
        exists (`bool`): whether the repository already exists.
        token, revision, private: as in [`SkillDistillationTrainer.push_to_hub`].

    Raises:
        `OSError`: if the Hub cannot be reached or refuses.
    """
    with _explain_failure(Path(output_dir), repo_id):
        if not exists:
            repo_id = create_repository(repo_id, private, token)
        create_branch(repo_id, revision, token)
    return Destination(repo_id, Path(output_dir), token, revision)


def push_run(
    folder: TemporaryDirectory, destination: Destination, commit_message: str, blocking: bool
) -> CommitInfo | Future:
    """
    Uploads a student with the card, the figures and the results of its run, in one commit.

    Args:
        folder (`TemporaryDirectory`): contains the student's files; removed after the upload.
        destination ([`Destination`]): the result of `open_repository`.
        commit_message (`str`): message of the commit.
        blocking (`bool`): whether to wait for the upload; in both cases it reads only `folder`.

    Raises:
        `OSError`: if the Hub cannot be reached or refuses.
    """
    extra_files = (REPOCARD_NAME, *model_card.FIGURES, RESULTS_NAME)
    for name in extra_files:
        if (destination.output_dir / name).is_file():
            copy(destination.output_dir / name, folder.name)

    def push() -> CommitInfo:
        with folder, _explain_failure(destination.output_dir, destination.repo_id):
            return upload(
                Path(folder.name),
                destination.repo_id,
                replaced=extra_files,
                commit_message=commit_message,
                token=destination.token,
                revision=destination.revision,
            )

    return push() if blocking else api.run_as_future(push)


@contextmanager
def explain_refusal(repo_id: str):
    """Used before training: turns any error of the Hub or of the connection into an `OSError` of one line."""
    try:
        yield
    except (HFValidationError, HTTPError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"`push_to_hub` is True, but `{repo_id}` cannot be written to: check the network, `hub_model_id` and your"
            f" token (`hf auth login` or `hub_token`), or set it to False and publish later. ({reason})"
        ) from error


@contextmanager
def _explain_failure(output_dir: Path, repo_id: str):
    try:
        yield
    except HFValidationError as error:
        raise OSError(
            f"The student is saved in `{output_dir}`, but `{repo_id}` is not a valid repository name: set"
            f" `hub_model_id` and call `trainer.push_to_hub()` again. ({error})"
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"The student is saved in `{output_dir}`, but could not be pushed to `{repo_id}`: call"
            " `trainer.push_to_hub()` again, or load it from there and call its own `push_to_hub`."
            f" ({reason})"
        ) from error


def edit_metadata(directory: str | Path, metadata: dict, tags: str | list[str] | None) -> None:
    """Writes entries of `metadata` that are not `None` into the metadata of the card in `directory`, and adds tags."""
    path = Path(directory) / REPOCARD_NAME
    card = ModelCard.load(path)
    for name, value in metadata.items():
        if value is not None:
            card.data[name] = value
    add_tags(card.data, tags)
    card.save(path)


def create_repository(repo_id: str, private: bool | None, token: bool | str | None) -> str:
    """Creates the repository if it does not exist; returns its full id, `namespace/name`."""
    return api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id


def create_branch(repo_id: str, revision: str | None, token: bool | str | None) -> None:
    """Creates the branch `revision` from `main`, if it is a branch name and does not exist."""
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)


def upload(
    folder: Path,
    repo_id: str,
    *,
    replaced: tuple[str, ...] = (),
    token: bool | str | None = None,
    revision: str | None = None,
    **kwargs,
) -> CommitInfo:
    """
    Uploads all files of `folder` in one commit, so that nobody can load a mixture of an old and a new student. If
    `folder` contains weights, other weight files in the repository are deleted.

    Args:
        folder (`Path`):
            The files to upload.
        repo_id (`str`):
            An existing repository.
        replaced (`tuple[str, ...]`, *optional*):
            Names of other files to delete if they are not in `folder`.
        token, revision, kwargs (*optional*):
            As in [`~huggingface_hub.HfApi.create_commit`].
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    published = api.list_repo_files(repo_id, revision=revision, token=token)
    # An adapter comes without weights of its own: those that are there stay.
    has_weights = any(map(_WEIGHTS.fullmatch, files))
    stale = [
        name
        for name in published
        if name not in files and (name in replaced or (has_weights and _WEIGHTS.fullmatch(name)))
    ]
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    return api.create_commit(repo_id, operations, token=token, revision=revision, **kwargs)


def add_metadata(data: ModelCardData, more: ModelCardData) -> None:
    """Adds missing entries to `data`, in place, and appends missing tags."""
    add_tags(data, more.tags)
    for name, value in vars(more).items():
        if data.get(name) is None:
            data[name] = value


def add_tags(data: ModelCardData, tags: str | list[str] | None) -> None:
    """Appends missing `tags` to `data`, in place."""
    tags = [tags] if isinstance(tags, str) else tags or []
    data.tags = list(dict.fromkeys([*(data.tags or []), *tags]))


def _published_card(repo_id: str, revision: str | None, token: bool | str | None) -> ModelCard:
    try:
        return ModelCard.load(api.hf_hub_download(repo_id, REPOCARD_NAME, revision=revision, token=token))
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"The metadata of {REPOCARD_NAME} in `{repo_id}` cannot be read; fix it on the Hub and push again."
            f" ({error})"
        ) from error


def _copy_feature_extractor(folder: Path, model: PreTrainedModel, token: bool | str | None) -> None:
    """Copies the feature extractor, and the tokenizer of a CTC model, from its source, if it was loaded from one."""
    source = model.config.name_or_path
    if not source:
        return
    try:
        extractor = load_feature_extractor(source, token=token)
        tokenizer = load_tokenizer(source, token=token) if head_of(model) == "CTC" else None
    except ValueError as error:
        logger.warning("%s It is not published.", error)
        return
    if extractor is not None:
        save_processor(folder, extractor, tokenizer)


def _unchanged_source(folder: Path, model: PreTrainedModel) -> Path | None:
    """
    The local directory that `model` was loaded from, if the trainer wrote it, and config and weights are unchanged in
    `folder`, where `model` was saved.
    """
    source = Path(model.config.name_or_path)
    files = (CONFIG_NAME, SKILL_CONFIG_NAME, REPOCARD_NAME)
    if not model.config.name_or_path or not all((source / name).is_file() for name in files):
        return None
    weights = {path.name for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name)}
    if not weights or filecmp.cmpfiles(source, folder, weights, shallow=False)[0] != sorted(weights):
        return None
    source_config, config = (json.loads((path / CONFIG_NAME).read_text(encoding="utf-8")) for path in (source, folder))
    # Training adds fields that no student has, such as `use_cache`; they don't survive loading.
    differing = {name for name in config if source_config.get(name) != config[name]}
    return source if differing <= {"transformers_version"} else None
