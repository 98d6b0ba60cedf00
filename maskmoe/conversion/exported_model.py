"""Loads a model that `maskmoe convert` has exported, after checks that its files are whole and belong together."""

import contextlib
import os
from pathlib import Path
from typing import Any

from maskmoe.conversion.safetensors_files import SafetensorsSource
from maskmoe.errors import UserError
from maskmoe.files.untrusted import check_regular, reading

_LISTED_NAMES = 3
_ADVICE = "export the model again"
# Without `trust_remote_code`, transformers would offer to run code of the folder.
_OPTIONS: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_exported_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder, without running code of the folder.

    Raises:
        UserError: the tokenizer is missing or damaged, or a file of the folder is not a regular file.
    """
    from transformers import AutoTokenizer

    # Without the registered model, transformers would warn of an unknown type.
    import maskmoe.huggingface  # noqa: F401 (registers the model)

    for path in folder.iterdir():
        if not path.is_dir():
            check_regular(path)  # transformers would wait for the writer of a pipe
    with reading(f"the tokenizer in {folder}", _ADVICE):
        return AutoTokenizer.from_pretrained(folder, **_OPTIONS)


def load_exported_model(folder: Path, tokenizer: Any) -> Any:
    """Load the model of a folder, in evaluation mode and on the CPU, without running code of the folder.

    Args:
        folder: the folder.
        tokenizer: the tokenizer of the folder.

    Raises:
        UserError: a file is missing or damaged, or lies outside the folder; weights are missing, superfluous, of
            another shape or type, NaN or infinite; or the tokenizer has ids that the model lacks.
    """
    import torch
    from transformers import AutoModelForCausalLM, logging

    import maskmoe.huggingface  # noqa: F401 (registers the model)

    stored = SafetensorsSource(folder).tensors
    integers = [name for name, spec in stored.items() if not spec.dtype.is_floating_point]
    if names := [name for name in integers if ".routing_mask." not in name]:
        raise UserError(f"the model in {folder} has weights that are no floating-point numbers: {_list(names)}")
    logging.set_verbosity_error()  # it would warn of damaged weights, which are refused here
    # A progress bar and a report of damaged weights go to stderr; the errors below name the same weights.
    with (
        reading(f"the model in {folder}", _ADVICE),
        open(os.devnull, "w") as devnull,
        contextlib.redirect_stderr(devnull),
    ):
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, **_OPTIONS
        )
        num_ids = len(tokenizer)
    for problem, meaning in (
        ("missing_keys", "lacks the weights"),
        ("unexpected_keys", "has the unknown weights"),
        ("mismatched_keys", "has weights of another shape:"),
    ):
        if names := sorted(str(name[0] if isinstance(name, tuple) else name) for name in loading.get(problem) or ()):
            raise UserError(f"the model in {folder} {meaning} {_list(names)}; {_ADVICE}")
    if names := [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]:
        raise UserError(f"the model in {folder} has weights that are NaN or infinite: {_list(names)}")
    if num_ids > model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {num_ids} ids, but the model has only {model.config.vocab_size}: they do "
            "not belong together"
        )
    return model.eval()


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED_NAMES} more" if len(names) > _LISTED_NAMES else ""
    return ", ".join(names[:_LISTED_NAMES]) + more
