"""The study "choice or damping": an independent script finds the page's numbers in the tables; README repeats rows.

Its routers choose and weigh as their names say.
"""

import lzma
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from support import small_moe as moe
from support.paths import ROOT
from torch.nn.functional import one_hot

from maskmoe.transformer.token_ids import TokenIds

STUDY = ROOT / "tools" / "studies" / "choice_or_damping"
PAGE = ROOT / "docs" / "study" / "choice-or-damping.md"


def test_page_has_the_numbers_of_its_tables(tmp_path: Path) -> None:
    for name in ("results.jsonl", "measures.jsonl"):
        (tmp_path / name).write_bytes(lzma.decompress((STUDY / "data" / f"{name}.xz").read_bytes()))
    words = [sys.executable, STUDY / "check_numbers.py", tmp_path / "results.jsonl", PAGE]
    outcome = subprocess.run(words, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout


def rows(text: str) -> list[list[str]]:
    return [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if line.startswith("| MaskMoE −")]


def test_readme_repeats_rows_of_the_page() -> None:
    of_page = {cells[0]: [cells[2], *cells[5:7]] for cells in rows(PAGE.read_text()) if len(cells) > 9}
    of_readme = rows((ROOT / "README.md").read_text().partition("## Results")[2].partition("##")[0])
    assert len(of_readme) == 6
    for label, *numbers in of_readme:
        assert numbers == of_page[label.replace(", 32 experts, 4,096 ids", ", 9 M tokens, N = 32")]


@pytest.mark.parametrize("name", ["GatedHashRouter", "UnitWeightRouter", "SecondChoiceRouter"])
def test_routers_of_the_study(one_rank: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STUDY)
    router_class = getattr(import_module("interventions"), name)
    mask = moe.make_mask(moe.random_visible_sets(1, 1, 20, 5))
    router = moe.make_router(moe.make_config(5, 1), mask, router_class=router_class)
    generator = torch.Generator().manual_seed(2)
    logits, ids = torch.randn(30, 2, 5, generator=generator), torch.randint(0, 20, (30, 2), generator=generator)
    visible = torch.from_numpy(mask.visible_sets(0))[ids.flatten()]
    scores = logits.flatten(0, 1).masked_fill(~visible, float("-inf")).softmax(dim=-1)
    experts = scores.argmax(dim=-1)
    if name == "SecondChoiceRouter":
        experts = scores.topk(2).indices.gather(1, (visible.sum(dim=-1, keepdim=True) > 1).long()).flatten()
    elif name == "GatedHashRouter":
        router.own_expert.copy_(torch.from_numpy(mask.visible_sets(0)).long().argmax(dim=1))
        experts = visible.long().argmax(dim=-1)

    probs, routing_map = router.routing(logits.to(moe.DEVICE), TokenIds(ids.to(moe.DEVICE)))

    assert torch.equal(routing_map.cpu(), one_hot(experts, 5).bool())
    weights = probs.sum(dim=-1).cpu()
    if name == "GatedHashRouter":
        torch.testing.assert_close(weights, scores.gather(1, experts.unsqueeze(-1)).flatten())
    elif name == "UnitWeightRouter":
        assert torch.equal(weights, torch.ones_like(weights))
    assert router.statistics.take()[0][0] == 60  # Every token is counted once.
    # Dispatch may skip a router whose weights are fixed.
    hash_mask = moe.make_mask(moe.random_visible_sets(1, 1, 20, 5, sizes=(1,)))
    assert moe.make_router(moe.make_config(5, 1), hash_mask, router_class=router_class).fixed_weight is None
    assert moe.make_router(moe.make_config(5, 1), hash_mask).fixed_weight == 1
