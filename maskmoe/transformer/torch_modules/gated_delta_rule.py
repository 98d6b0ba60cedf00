"""The gated delta rule in plain torch."""

from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import pad

CHUNK = 64
"""Number of tokens that are computed together."""


def chunked_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **unused: Any
) -> tuple[Tensor, None]:
    """Compute the gated delta rule (arXiv 2412.06464) in chunks of tokens, in fp32.

    Each value head has a state S [channels, value channels], which is 0 before the first token. A token decays the
    state, corrects the value that the state holds for the token's key, and reads the value for the token's query:

        S = exp(g) S
        S = S + k (beta (v - S^T k))^T
        output = S^T q / sqrt(channels)

    The corrections of a chunk depend on each other by a unit lower triangular matrix. Solving for all of them at once
    leaves one step for each chunk instead of one step for each token.

    Args:
        query: [batch, sequence, key heads, channels].
        key: [batch, sequence, key heads, channels].
        value: [batch, sequence, value heads, value channels]; a key head serves neighbouring value heads.
        g: [batch, sequence, value heads], the logarithm of the decay, at most 0.
        beta: [batch, sequence, value heads], the strength of the correction.
        unused: the other arguments of `torch_chunk_gated_delta_rule` of Megatron-Core; ignored.

    Returns:
        output [batch, sequence, value heads, value channels] in the dtype of `value`, and None in place of the state
        after the last token.
    """
    sequence, key_heads, channels = query.shape[1:]
    value_channels = value.shape[-1]

    # Cut the sequence. The value heads of a key head form a group: [chunks, batch, key heads, group, CHUNK, any].
    queries, keys, values = (_to_chunks(tensor, key_heads) for tensor in (query, key, value))
    strengths, log_decays = (_to_chunks(tensor.unsqueeze(-1), key_heads) for tensor in (beta, g))
    queries = queries * channels**-0.5

    # Compute the decay from the start of the chunk to each token, from each token to the end of the chunk, and between
    # tokens. The decay back to an earlier token is 0, because its logarithm is positive and could overflow.
    log_decays = log_decays.cumsum(dim=-2)
    since_start = log_decays.exp()
    to_end = (log_decays[..., -1:, :] - log_decays).exp()
    is_later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=query.device).triu(1)
    between = (log_decays - log_decays.mT).masked_fill(is_later, float("-inf")).exp()

    # Solve for the corrections as if the state before the chunk were 0, and for what they subtract of that state.
    dependence = (keys @ keys.mT) * (strengths * between)
    corrections = solve_triangular(dependence, strengths * values, upper=False, unitriangular=True)
    readers = solve_triangular(dependence, (strengths * since_start) * keys, upper=False, unitriangular=True)

    # Pass the state [batch, key heads, group, channels, value channels] from chunk to chunk. A query reads the state
    # before its chunk, and the corrections of its chunk up to its own token.
    scores = (queries @ keys.mT) * between
    chunks = (corrections, readers, since_start * queries, scores, (to_end * keys).mT, since_start[..., -1:, :])
    state = values.new_zeros(*corrections.shape[1:4], channels, value_channels)
    outputs = []
    for correction, reader, query_of_state, score, writer, decay in zip(*map(torch.unbind, chunks), strict=True):
        correction = correction - reader @ state
        outputs.append(query_of_state @ state + score @ correction)
        state = decay * state + writer @ correction
    output = torch.stack(outputs).permute(1, 0, 4, 2, 3, 5).flatten(1, 2)[:, :sequence]
    return output.reshape(value.shape).to(value.dtype), None


def _to_chunks(tensor: Tensor, key_heads: int) -> Tensor:
    """Cut a sequence of heads [batch, sequence, heads, any] into fp32 [chunks, batch, key heads, group, CHUNK, any].

    Zeros fill the last chunk.
    """
    padded = pad(tensor.float(), (0, 0, 0, 0, 0, -tensor.shape[1] % CHUNK))
    return padded.unflatten(2, (key_heads, -1)).unflatten(1, (-1, CHUNK)).permute(1, 0, 3, 4, 2, 5).contiguous()
