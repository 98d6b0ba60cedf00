"""The faults of checkpoints are named."""

import pytest
from support.runs import write_checkpoint

from maskmoe.run_status.status import checkpoint_state


def states(folder, verify=False):
    return {path.name: checkpoint_state(path, verify) for path in sorted(folder.glob("iter_*"), reverse=True)}


@pytest.fixture
def folder(tmp_path):
    for iteration in (10, 20):
        write_checkpoint(tmp_path, iteration)
    return tmp_path


def test_faults_are_named(folder):
    for iteration in (30, 40, 50):
        write_checkpoint(folder, iteration, with_manifest=iteration != 30)
    (folder / "iter_0000050" / "metadata.json").unlink()
    (folder / "iter_0000040" / "__0_0.distcp").write_bytes(bytes(999))
    assert list(states(folder).items()) == [
        ("iter_0000050", "damaged: was not finished: it has no metadata.json"),
        ("iter_0000040", "damaged: __0_0.distcp has 999 of 1000 bytes"),
        ("iter_0000030", "complete, without digests"),
        ("iter_0000020", "complete"),
        ("iter_0000010", "complete"),
    ]


def test_a_flipped_byte_is_found_by_verification(folder):
    (folder / "iter_0000020" / "__0_0.distcp").write_bytes(bytes(999) + b"1")
    assert states(folder)["iter_0000020"] == "complete"
    fault = "damaged: __0_0.distcp does not have the content that was saved"
    assert states(folder, verify=True) == {"iter_0000020": fault, "iter_0000010": "verified"}
