"""The study of attention to the preceding token."""

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from studies import preceding_token
from support.datasets import write_documents
from support.paths import EXPORTED_MODEL

from maskmoe.errors import UserError


def test_models_are_measured(tmp_path, monkeypatch, capsys):
    """Plain transformers, with one window at a time, finds the same losses and attention."""
    from transformers import AutoModelForCausalLM

    import maskmoe.huggingface  # noqa: F401 (registers the model)

    model = AutoModelForCausalLM.from_pretrained(
        EXPORTED_MODEL, attn_implementation="eager", dtype=torch.float32
    ).eval()
    length = model.config.max_position_embeddings + 1
    tokens = np.random.default_rng(1).integers(0, 4, 3 * length + 2)
    write_documents(tmp_path / "text", [tokens])
    words = ["--models", EXPORTED_MODEL, "--datasets", tmp_path / "text", "--output", tmp_path / "result.json"]
    monkeypatch.setattr(sys, "argv", ["preceding_token.py", *map(str, words)])
    preceding_token.main()
    (found,) = json.loads((tmp_path / "result.json").read_text())
    assert found["model"] == "model"
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert f"{found['repeated']:8.3f}" in capsys.readouterr().out

    losses, attention = {True: [], False: []}, []
    for window in tokens[: 3 * length].reshape(3, length).tolist():
        outputs = model(torch.tensor([window[:-1]]), output_attentions=True)
        logarithms, pairs = outputs.logits[0].log_softmax(-1), [*pairwise(window)]
        for position, pair in enumerate(pairs):
            losses[pair in pairs[:position]].append(-logarithms[position, pair[1]].item())
        attention += [outputs.attentions[0][0, :, i, i - 1].tolist() for i in range(1, length - 1)]
    assert found["repeated"] == pytest.approx(np.mean(losses[True]), rel=1e-5)
    assert found["other"] == pytest.approx(np.mean(losses[False]), rel=1e-5)
    assert found["attention"] == pytest.approx(np.mean(attention, axis=0).max(), rel=1e-5)
    assert found["repeated_share"] == pytest.approx(len(losses[True]) / (3 * (length - 1)))


def test_short_dataset_is_refused(tmp_path):
    write_documents(tmp_path / "text", [range(6)])
    with pytest.raises(UserError, match=r"text has 6 tokens, fewer than a window of 7; use a longer text"):
        preceding_token.read_windows([str(tmp_path / "text")], 7)
