"""Stores how one model routes every token of a probe."""

import json
import os
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from maskmoe.cli import atomic_output
from maskmoe.errors import UserError

NO_EXPERT = -1
_METADATA_KEY = "maskmoe_routing_trace"
_DTYPES = {"token_ids": "I64", "experts": "I16", "weights": "F32", "entropy": "F32", "num_visible": "I16"}


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
        record = {
            "layers": self.layers,
            "num_experts": self.num_experts,
            "name": self.name,
            "iteration": self.iteration,
        }
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _DTYPES}
        with atomic_output(path) as temporary:
            save_file(tensors, temporary, metadata={_METADATA_KEY: json.dumps(record)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RoutingTrace":
        """Read a trace that `save` wrote.

        Raises:
            UserError: the file is missing, damaged, or not a trace.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                if {name: file.get_slice(name).get_dtype() for name in file.keys()} != _DTYPES:  # noqa: SIM118
                    raise UserError(f"{path} is not a trace of routing; make it with tools/analyze_routing.py")
                tensors = {name: file.get_tensor(name) for name in _DTYPES}
                record = json.loads((file.metadata() or {})[_METADATA_KEY])
            trace = cls(**tensors, **(record | {"layers": tuple(record["layers"])}))
            trace._check_shapes()
        except OSError as error:
            raise UserError(f"cannot read trace of routing {path}: {error.strerror or error}") from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a trace of routing, or is damaged; make it again") from error
        return trace

    def _check_shapes(self) -> None:
        """Check that the shapes of all arrays agree. Raises ValueError."""
        of_token = (len(self.layers), len(self.token_ids))
        if self.entropy.shape != of_token or self.num_visible.shape != of_token:
            raise ValueError("per-token arrays differ in shape")
        if self.experts.shape != self.weights.shape or self.experts.shape[:-1] != of_token:
            raise ValueError("experts and weights differ in shape")
