"""Describes the data of a run for its model card: names, numbers of clips, hours; no local paths."""

import re
from dataclasses import dataclass
from pathlib import Path

import datasets

from ..models.loading import hub_id_of


@dataclass
class DatasetContent:
    """A set of clips: purpose, name, id on the Hub, numbers of clips and hours."""

    use: str
    name: str | None
    hub_id: str | None
    num_clips: int | None
    hours: float | None


def describe_datasets(train_dataset, eval_dataset) -> list[DatasetContent]:
    """
    Args:
        train_dataset (*optional*): rows.
        eval_dataset (*optional*): rows, or a dict of several sets by name.
    """
    named = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    sets = {"Training": train_dataset}
    sets |= {f"Held out {name}".strip(): dataset for name, dataset in named.items()}
    return [_describe(code_text(use), dataset) for use, dataset in sets.items() if dataset is not None]


def _describe(use: str, dataset) -> DatasetContent:
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        num_clips = len(dataset) if hasattr(dataset, "__len__") else None
        return DatasetContent(use=use, name=None, hub_id=None, num_clips=num_clips, hours=None)
    info = dataset.info
    name = info.dataset_name
    if name == getattr(info, "builder_name", None):  # "csv", "generator": how it was read, not what it is
        name = None
    hub_id = hub_id_of(name)
    if name is not None and hub_id is None:
        name = Path(name).name
    parts = [info.config_name, dataset.split]
    details = [str(part) for part in parts if part is not None and not str(part).startswith("default")]
    # In seconds, as `load_audio_dir` makes it; others count samples or tokens there.
    length = (dataset.features or {}).get("length")
    lengths = (
        dataset["length"]
        if isinstance(dataset, datasets.Dataset) and getattr(length, "dtype", "").startswith("float")
        else [None]
    )
    return DatasetContent(
        use=use,
        name=name and code_text(", ".join([name, *details])),
        hub_id=hub_id,
        num_clips=len(dataset) if hasattr(dataset, "__len__") else None,
        hours=None if None in lengths else sum(lengths) / 3600,
    )


def code_text(text: str) -> str:
    """`text` for a code span in a table, without characters that would end the span or the cell."""
    return re.sub(r"[\s`|]+", " ", text).strip()
