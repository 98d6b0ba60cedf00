"""What the routers of one model did with every token of a probe."""

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
_DTYPES = {
    "token_ids": "I64",
    "experts": "I16",
    "weights": "F32",
    "entropy": "F32",
    "num_visible": "I16",
}


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routing of all tokens in all layers that have experts.

    Attributes:
        token_ids: int64 [tokens].
        layers: their numbers, from 1, as Megatron counts them; layers without experts are left out.
        experts: int16 [layers, tokens, k], the best first; `NO_EXPERT` where fewer than k were chosen.
        weights: float32 [layers, tokens, k], 0 where there is no expert.
        entropy: float32 [layers, tokens], of the probabilities of the visible experts, in nats.
        num_visible: int16 [layers, tokens], V of the token's id.
        num_experts: N.
        name: of the model, for people.
        iteration: of training; None if it is not known.
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
        """k, the most experts that a token can have."""
        return self.experts.shape[-1]

    @property
    def is_routable(self) -> np.ndarray:
        """Tokens whose id sees two experts or more, bool [layers, tokens]."""
        return self.num_visible > 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file atomically. Raises UserError if `path` cannot be written."""
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
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing, damaged, or something else.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                if {name: file.get_slice(name).get_dtype() for name in file.keys()} != _DTYPES:  # noqa: SIM118
                    raise UserError(f"{path} is no trace of routing; make it with tools/analyze_routing.py")
                tensors = {name: file.get_tensor(name) for name in _DTYPES}
                record = json.loads((file.metadata() or {})[_METADATA_KEY])
            trace = cls(**tensors, **(record | {"layers": tuple(record["layers"])}))
            trace._check_shapes()
        except OSError as error:
            raise UserError(f"cannot read trace of routing {path}: {error.strerror or error}") from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no trace of routing, or damaged; make it again") from error
        return trace

    def _check_shapes(self) -> None:
        """Raises ValueError where arrays do not fit together."""
        of_token = (len(self.layers), len(self.token_ids))
        if self.entropy.shape != of_token or self.num_visible.shape != of_token:
            raise ValueError("per-token arrays differ in shape")
        if self.experts.shape != self.weights.shape or self.experts.shape[:-1] != of_token:
            raise ValueError("experts and weights differ in shape")
