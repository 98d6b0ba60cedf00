"""The folders that MaskMoE uses by default."""

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]


def runs_folder() -> Path:
    """Return the folder in which runs are kept by default.

    The folder is `runs` in the checkout if this code lies in one, else `runs` in the current folder.
    """
    is_checkout = (_CHECKOUT / "launch" / "pretrain.sh").exists()
    return (_CHECKOUT if is_checkout else Path.cwd()) / "runs"
