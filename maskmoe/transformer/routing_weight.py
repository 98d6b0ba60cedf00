"""The weight of a selected expert's output, made from the expert's probability."""

from typing import Literal

from torch import Tensor

RoutingWeight = Literal["probability", "scaled", "one"]


def weights_of_probs(probs: Tensor, num_visible: Tensor, topk: int, kind: RoutingWeight) -> Tensor:
    """Return the weights of the selected experts.

    - `probability`: the probabilities.
    - `scaled`: the probabilities times V / min(k, V). If all visible experts are equally probable, as in a router that
      has learned nothing, the weights of a token add up to 1.
    - `one`: the probabilities, divided by their sum over the token's selected experts. The sum counts as a constant in
      the gradient, because the weights could not learn otherwise if k = 1. So the weight is exactly 1 if k = 1, and its
      gradient is that of the logarithm of the probability.

    A token with one visible expert has probability 1, and keeps weight 1 without a gradient.

    Args:
        probs: [tokens, experts], the probabilities among the visible experts; 0 for experts that are not selected.
        num_visible: int64 [tokens], V.
        topk: k.
        kind: the kind of weight.

    Returns:
        [tokens, experts], 0 where `probs` is 0.
    """
    if kind == "scaled":
        scale = num_visible / num_visible.clamp(max=topk)  # [tokens]
        return probs * scale.unsqueeze(-1).to(probs.dtype)
    if kind == "one":
        return probs / probs.detach().sum(dim=-1, keepdim=True)
    return probs
