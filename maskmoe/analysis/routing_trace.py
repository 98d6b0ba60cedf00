"""Stores how one model routes every token of a probe."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from maskmoe.files.outputs import atomic_output

NO_EXPERT = -1


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routing of all tokens in all layers with experts.

    Attributes:
        token_ids: int64 [tokens].
        experts: int16 [layers, tokens, k], the chosen experts, the best first; `NO_EXPERT` fills the places of tokens
            with fewer than k experts.
        weights: float32 [layers, tokens, k], the weights of the chosen experts; 0 for `NO_EXPERT`.
        entropy: float32 [layers, tokens], entropy of the probabilities of the visible experts, in nats.
        num_visible: int16 [layers, tokens], number of visible experts of the token's id, V.
        num_experts: number of experts in a layer, N.
    """

    token_ids: np.ndarray
    experts: np.ndarray
    weights: np.ndarray
    entropy: np.ndarray
    num_visible: np.ndarray
    num_experts: int

    @property
    def is_routable(self) -> np.ndarray:
        """Return whether the id of a token sees two or more experts, bool [layers, tokens]."""
        return self.num_visible > 1

    def save(self, path: Path, checkpoint: str, layers: tuple[int, ...]) -> None:
        """Write the arrays to a safetensors file, atomically; its metadata has the other values as JSON.

        Args:
            path: the file to write.
            checkpoint: the name of the model.
            layers: numbers of the layers with experts, from 1.

        Raises:
            UserError: the file cannot be written.
        """
        tensors = {name: np.ascontiguousarray(v) for name, v in vars(self).items() if isinstance(v, np.ndarray)}
        record = {"checkpoint": checkpoint, "layers": layers, "num_experts": self.num_experts}
        with atomic_output(path) as temporary:
            save_file(tensors, temporary, metadata={name: json.dumps(value) for name, value in record.items()})
