"""Find the Arrow files of datasets that Hugging Face's `datasets` has saved on this machine, without that library.

A saved dataset is one of:

- a folder written by `Dataset.save_to_disk`, with `state.json`, which lists the files;
- a folder written by `DatasetDict.save_to_disk`, with `dataset_dict.json`, which lists the splits, one folder each;
- a folder of the cache of `load_dataset`, with `dataset_info.json` and files named `NAME-SPLIT.arrow` or
  `NAME-SPLIT-00000-of-00002.arrow`; or the name of a cached dataset, such as `owner/name`.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from maskmoe.errors import UserError
from maskmoe.files.json_files import read_json

_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+")
_ENTRIES_LOOKED_AT = 1000


def find_saved_dataset(folder: Path, split: str | None) -> list[Path]:
    """Return the Arrow files of the dataset in a folder, in order.

    Args:
        folder: The folder.
        split: Name of the split. None chooses the only split.

    Raises:
        UserError: The folder is not a saved dataset, is not complete, or does not have the split; or it has several
            splits, and none is chosen.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _list_of_names(read_json(folder / "dataset_dict.json"), "splits", folder / "dataset_dict.json")
        split = _choose_split(folder, splits, split)
        return _files_of_state(folder / split)
    if (folder / "state.json").is_file():
        saved = read_json(folder / "state.json").get("_split")
        if split not in (None, saved):
            raise UserError(f"input {folder} is a single split{f' {saved!r}' if saved else ''}, not {split!r}")
        return _files_of_state(folder)
    if (folder / "dataset_info.json").is_file():
        splits = read_json(folder / "dataset_info.json").get("splits")
        if isinstance(splits, dict) and splits:
            return _files_of_cache(folder, _choose_split(folder, [*splits], split))
    raise UserError(f"input {folder} is a folder, not a file, and holds no saved dataset; {_advice(folder)}")


def find_cached_dataset(name: str, split: str | None) -> list[Path]:
    """Return the Arrow files of a dataset in the cache of `datasets`, in order.

    Args:
        name: `owner/name` or `name`, as for `datasets.load_dataset`.
        split: Name of the split. None chooses the only split.

    Raises:
        UserError: No dataset of that name is cached, or several versions are, or the split cannot be chosen.
    """
    cache = cache_folder()
    wanted = list(map(_without_case, name.split("/")))
    folders = []
    if _NAME.fullmatch(name) and cache.is_dir():
        names = [
            entry for entry in cache.iterdir() if [_without_case(part) for part in entry.name.split("___")] == wanted
        ]
        # Folders below are CONFIGURATION/VERSION/HASH; the name of an unfinished one ends in ".incomplete".
        found = (info.parent for entry in names for info in entry.glob("*/*/*/dataset_info.json"))
        folders = sorted(folder for folder in found if folder.suffix != ".incomplete")
    if not folders:
        raise UserError(f"input {name} does not exist, and {cache} has no dataset of that name")
    if len(folders) > 1:
        listed = ", ".join(map(str, folders[:3])) + (", …" if len(folders) > 3 else "")
        raise UserError(f"input {name} is cached in {len(folders)} forms; give one of the folders: {listed}")
    return find_saved_dataset(folders[0], split)


def cache_folder() -> Path:
    """Return the folder in which `datasets` caches prepared datasets."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return Path(os.environ.get("HF_DATASETS_CACHE") or f"{home}/datasets").expanduser()


def _without_case(name: str) -> str:
    """Return a name in the form in which the cache's folders and the Hub's names are alike."""
    return name.replace("_", "").lower()


def _choose_split(folder: Path, splits: Sequence[str], split: str | None) -> str:
    listed = ", ".join(splits)
    if split is None and len(splits) != 1:
        raise UserError(
            f"input {folder} has the splits {listed}; choose one with --dataset-split or, if the command lacks this "
            "flag, name the files of one split"
        )
    if split is not None and split not in splits:
        raise UserError(f"input {folder} has no split {split!r}; its splits are {listed}")
    return splits[0] if split is None else split


def _files_of_state(folder: Path) -> list[Path]:
    """Return the files that `state.json` lists."""
    path = folder / "state.json"
    state = read_json(path)
    if state.get("_indices_data_files"):
        raise UserError(f"input {folder} has a list of selected rows; save the dataset again after flatten_indices()")
    files = state.get("_data_files")
    entries = files if isinstance(files, list) else [None]
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
    return _existing_files(folder, _list_of_names({"_data_files": names}, "_data_files", path))


def _files_of_cache(folder: Path, split: str) -> list[Path]:
    """Return the files of one split in a folder of the cache."""
    pattern = re.compile(rf".+-{re.escape(split)}(?:-(\d{{5}})-of-(\d{{5}}))?\.arrow")
    matches = sorted((match for entry in os.listdir(folder) if (match := pattern.fullmatch(entry))), key=lambda m: m[0])
    numbers = [match[1] and int(match[1]) for match in matches]
    expected = [*range(int(matches[0][2]))] if matches and matches[0][2] else [None]
    if numbers != expected:
        raise UserError(f"input {folder} lacks files of the split {split!r}, or has too many; cache the dataset again")
    return _existing_files(folder, [match[0] for match in matches])


def _list_of_names(values: dict[str, Any], key: str, path: Path) -> list[str]:
    """Return a list of file names of a JSON object. A name that leads out of the folder is refused."""
    names = values.get(key)
    are_names = isinstance(names, list) and all(
        isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\0"} for name in names
    )
    if not are_names:
        raise UserError(f"{path} is damaged ({key} is not a list of file names); save the dataset again")
    return names


def _existing_files(folder: Path, names: Iterable[str]) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        if not path.is_file():
            raise UserError(f"input {folder} is not complete: {path.name} does not exist; save the dataset again")
    return paths


def _advice(folder: Path) -> str:
    """Say how to name the files of a folder: by the most frequent suffix."""
    try:
        suffixes = Counter(path.suffix for path in islice(folder.iterdir(), _ENTRIES_LOOKED_AT) if path.suffix)
    except OSError:
        suffixes = Counter()
    pattern = f"*{suffixes.most_common(1)[0][0]}" if suffixes else "*"
    return f"name the files, for example {folder}/{pattern}"
