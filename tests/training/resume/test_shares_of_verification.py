"""The ranks of a run verify the files of a checkpoint together, each a share of them."""

import shutil
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

from maskmoe.checkpoint.series import checkpoint_path
from maskmoe.training.ranks import Ranks
from maskmoe.training.resume.find_checkpoint import find_checkpoint


@pytest.mark.runs("expert parallel 2, undisturbed")
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_flipped_byte_of_any_file_is_found_by_some_rank(runs, tmp_path: Path, num_ranks: int) -> None:
    """The ranks are threads, which meet at one store."""
    folder = shutil.copytree(runs[0].checkpoints, tmp_path / "copy")
    args = Namespace(load=str(folder), ckpt_step=None, verify_checkpoint=True)

    def chosen() -> set[Path | None]:
        store = HashStore()
        ranks = [Ranks(store, rank, num_ranks) for rank in range(num_ranks)]
        with ThreadPoolExecutor(num_ranks) as threads:
            return set(threads.map(lambda rank: find_checkpoint(args.load, args, rank), ranks))

    newest, older = checkpoint_path(folder, 21), checkpoint_path(folder, 14)
    assert chosen() == {newest}
    tensors = sorted(newest.glob("*.distcp"))
    assert len(tensors) >= 2
    for path in (*tensors, newest / ".metadata"):
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
        assert chosen() == {older}, path.name
        path.write_bytes(content)
