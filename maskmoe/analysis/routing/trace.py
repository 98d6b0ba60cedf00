"""Stores how one model routes every token of a probe."""

import json
import os
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output
from maskmoe.files.untrusted import check_regular

NO_EXPERT = -1
_METADATA_KEY = "maskmoe_routing_trace"
_TENSORS = ("token_ids", "experts", "weights", "entropy", "num_visible")


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routing of all tokens in all layers with experts.

    Attributes:
        token_ids: int64 [tokens].
        layers: numbers of the layers with experts, from 1, as Megatron counts layers.
        experts: int16 [layers, tokens, k], the chosen experts, the best first; `NO_EXPERT` fills the places of tokens
            with fewer than k experts.
        weights: float32 [layers, tokens, k], the weights of the chosen experts; 0 for `NO_EXPERT`.
        entropy: float32 [layers, tokens], entropy of the probabilities of the visible experts, in nats.
        num_visible: int16 [layers, tokens], number of visible experts of the token's id, V.
        num_experts: number of experts in a layer, N.
        name: the name of the model, for people.
        iteration: the iteration of training; None if it is unknown.
    """

    token_ids: np.ndarray
    layers: tuple[int, ...]
    experts: np.ndarray
    weights: np.ndarray
    entropy: np.ndarray
    num_visible: np.ndarray
    num_experts: int
    name: str
    iteration: int | None = None

    @property
    def topk(self) -> int:
        """Return k, the largest number of experts of a token."""
        return self.experts.shape[-1]

    @property
    def is_routable(self) -> np.ndarray:
        """Return whether the id of a token sees two or more experts, bool [layers, tokens]."""
        return self.num_visible > 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace to a safetensors file, atomically. Raises UserError if the file cannot be written."""
        record = {name: getattr(self, name) for name in ("layers", "num_experts", "name", "iteration")}
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}
        with atomic_output(path) as temporary:
            save_file(tensors, temporary, metadata={_METADATA_KEY: json.dumps(record)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RoutingTrace":
        """Read a trace that `save` wrote.

        Raises:
            UserError: the file is missing, damaged, or not a trace.
        """
        check_regular(path)
        try:
            with safe_open(path, framework="numpy") as file:
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
                record = json.loads((file.metadata() or {})[_METADATA_KEY])
            trace = cls(**tensors, **(record | {"layers": tuple(record["layers"])}))
            shape = (len(trace.layers), len(trace.token_ids), trace.topk)
            if not trace.experts.shape == trace.weights.shape == shape:
                raise ValueError("experts and weights differ in shape")
            if not trace.entropy.shape == trace.num_visible.shape == shape[:2]:
                raise ValueError("per-token arrays differ in shape")
        except OSError as error:
            raise UserError(f"cannot read trace of routing {path}: {error.strerror or error}") from error
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is not a trace of routing, or is damaged; make it with maskmoe analyze --save-traces"
            ) from error
        return trace
