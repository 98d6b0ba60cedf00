"""The layers of a model that a routing mask has tables for."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from maskmoe.errors import UserError

LAYER_FREQUENCY_ERROR = (
    "--moe-layer-freq must be 1 or more, or a list of 0 and 1 that gives experts to a layer, such as [0]+[1]*23"
)
_MLP, _MOE, _PREDICTION = "-", "E", "/"


@dataclass(frozen=True)
class FeedForwardLayers:
    """The feed-forward layers of a model: its MLPs and MoE layers, numbered from 1 through the whole model.

    In Megatron-Core's `GPTModel`, each transformer layer has one. In `HybridModel`, each symbol `-` or `E` of the
    pattern is one. A GPT model and its hybrid twin have equal instances, so a routing mask for one fits the other.

    Attributes:
        decoder: Whether each feed-forward layer of the decoder has experts.
        prediction: Whether each layer of multi-token prediction has experts. Numbers follow the decoder's.
    """

    decoder: tuple[bool, ...]
    prediction: tuple[bool, ...] = ()

    @classmethod
    def of_frequency(cls, frequency: int | list[int], num_layers: int, num_predictions: int = 0) -> Self:
        """Return the layers of a `GPTModel` with Megatron's `--moe-layer-freq`.

        `frequency` says every how many layers have experts, counting from layer 0, or has a 0 or 1 for each layer. The
        `num_predictions` layers of multi-token prediction repeat the decoder's last layer.

        Raises:
            UserError: The frequency is no pattern, or gives no layer experts.
        """
        if isinstance(frequency, int) and frequency >= 1:
            frequency = [int(layer % frequency == 0) for layer in range(num_layers)]
        if not (isinstance(frequency, list) and all(layer in (0, 1) for layer in frequency) and 1 in frequency):
            raise UserError(LAYER_FREQUENCY_ERROR)
        decoder = tuple(map(bool, frequency))
        return cls(decoder, decoder[-1:] * num_predictions)

    @classmethod
    def of_pattern(cls, pattern: str) -> Self:
        """Return the feed-forward layers of a `HybridModel` with a valid `--hybrid-layer-pattern`."""
        decoder, *predictions = pattern.split(_PREDICTION)
        return cls(*(tuple(s == _MOE for s in part if s in (_MLP, _MOE)) for part in (decoder, "".join(predictions))))

    @classmethod
    def of_args(cls, args: Namespace) -> Self:
        """Return the feed-forward layers of the model that Megatron's arguments, validated or saved, describe."""
        if getattr(args, "hybrid_layer_pattern", None) is not None:
            return cls.of_pattern(args.hybrid_layer_pattern)
        num_predictions = args.mtp_num_layers or 0
        if not args.num_experts:
            return cls((False,) * args.num_layers, (False,) * num_predictions)
        return cls.of_frequency(args.moe_layer_freq, args.num_layers, num_predictions)

    def pattern(self, attention: str) -> str:
        """Return the hybrid twin's `--hybrid-layer-pattern`, without stages; attention has the symbol `*` or `+`."""

        def symbols(layers: Iterable[bool]) -> str:
            return "".join(attention + (_MOE if has_experts else _MLP) for has_experts in layers)

        return _PREDICTION.join([symbols(self.decoder), *(symbols([has_experts]) for has_experts in self.prediction)])

    @property
    def has_experts(self) -> tuple[bool, ...]:
        """Whether each feed-forward layer of the model has experts."""
        return self.decoder + self.prediction

    def __str__(self) -> str:
        num_dense = len(self.has_experts) - self.num_moe_layers
        dense = f", and {num_dense} feed-forward layers without experts" if num_dense else ""
        return f"{self.num_moe_layers}{dense}"

    @property
    def num_moe_layers(self) -> int:
        """The number of MoE layers."""
        return sum(self.has_experts)

    def table(self, number: int, num_tables: int) -> int:
        """Return the mask's table, from 0, of the MoE layer with a number among the feed-forward layers.

        A mask has one table for all layers, for each feed-forward layer, or for each MoE layer.
        """
        if num_tables == 1:
            return 0
        return number - 1 if num_tables == len(self.has_experts) else sum(self.has_experts[: number - 1])
