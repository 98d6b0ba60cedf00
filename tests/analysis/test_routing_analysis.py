"""The recorded routing equals the routing of the model, computed by hand."""

import numpy as np
import pytest
import torch
from support.tiny_maskmoe import NUM_EXPERTS, make_model, random_ids, random_mask

from maskmoe.analysis.probe_text import windows_of
from maskmoe.analysis.routing_analysis import record_routing, selected_experts
from maskmoe.analysis.routing_statistics import NO_EXPERT

SEQ_LENGTH, BATCH_SIZE = 16, 3


def make_probe(num_tokens: int) -> np.ndarray:
    return random_ids(num_tokens).numpy()


@pytest.mark.parametrize("topk", [1, 2, 4])
@pytest.mark.parametrize("settings", [{}, {"norm_topk_prob": True}, {"mlp_layer_types": ["sparse", "dense", "sparse"]}])
def test_equals_routing_by_hand(topk, settings):
    """The masks show one to all experts, so some tokens see fewer than k experts."""
    mask, probe = random_mask(), make_probe(100)
    model = make_model(mask, num_experts_per_tok=topk, **settings)
    trace = record_routing(model.model, probe, SEQ_LENGTH, BATCH_SIZE)

    layers = [n for n in (1, 2, 3) if settings.get("mlp_layer_types", ["sparse"] * 3)[n - 1] == "sparse"]
    assert (trace.num_experts, len(trace.experts)) == (NUM_EXPERTS, len(layers))
    logits = [
        model(torch.from_numpy(window[None]), output_router_logits=True).router_logits
        for batch in windows_of(probe, SEQ_LENGTH, BATCH_SIZE)
        for window in batch
    ]
    for index, layer in enumerate(layers):
        z = torch.cat([of_window[index] for of_window in logits]).detach().double().numpy()
        visible = mask.visible_sets(layer - 1)[probe]
        assert np.array_equal(np.isfinite(z), visible)
        for token in range(100):
            seen = np.flatnonzero(visible[token])
            p = np.exp(z[token, seen] - z[token, seen].max())
            p /= p.sum()
            order = np.argsort(-p)[:topk]
            weights = p[order] / p[order].sum() if settings.get("norm_topk_prob") else p[order]
            padding = topk - len(order)
            assert trace.experts[index, token].tolist() == [*seen[order], *[NO_EXPERT] * padding]
            np.testing.assert_allclose(trace.weights[index, token], [*weights, *[0] * padding], atol=1e-5)
            np.testing.assert_allclose(trace.entropy[index, token], -(p * np.log(p)).sum(), atol=1e-5)
            assert trace.num_visible[index, token] == len(seen)


@pytest.mark.parametrize("scoring_func", ["sigmoid", "sqrtsoftplus"])
def test_entropy_of_other_scores(scoring_func):
    """The entropy is computed from the scores of the visible experts, divided by their sum."""
    model, probe = make_model(random_mask(), scoring_func=scoring_func), make_probe(16)
    trace = record_routing(model.model, probe, SEQ_LENGTH, BATCH_SIZE)
    logits = model(torch.from_numpy(probe[None]), output_router_logits=True).router_logits
    for entropy, z in zip(trace.entropy, logits, strict=True):
        for token in range(16):
            seen = z[token][z[token].isfinite()].double()
            scores = seen.sigmoid() if scoring_func == "sigmoid" else torch.nn.functional.softplus(seen).sqrt()
            p = scores / scores.sum()
            assert entropy[token] == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)


def test_a_weight_of_zero_is_a_choice_and_a_repetition_is_none():
    indices = torch.tensor([[3, 1, 2], [3, 3, 3], [0, 2, 0]])
    assert selected_experts(indices).tolist() == [[3, 1, 2], [3, NO_EXPERT, NO_EXPERT], [0, 2, NO_EXPERT]]


def test_batches_do_not_matter():
    model, tokens = make_model().model, make_probe(100)
    one_by_one = record_routing(model, tokens, SEQ_LENGTH, batch_size=1)
    together = record_routing(model, tokens, SEQ_LENGTH, BATCH_SIZE)
    assert np.array_equal(one_by_one.experts, together.experts)
    assert not any(layer.mlp.gate._forward_hooks for layer in model.layers)
