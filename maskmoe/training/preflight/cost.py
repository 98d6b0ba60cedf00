"""Counts the floating-point operations of a training run.

A matrix product takes two operations for each parameter and token in the forward pass, and twice as many in the
backward pass. The counts of `check.parameters` are exact, so these products are exact, too. Core attention, gated delta
rules and the scans of Mamba layers have no parameters and are added. Norms, activation functions, the optimizer and
other work in proportion to the hidden size are left out, as in Megatron's `num_floating_point_operations`.
"""

from argparse import Namespace
from collections import Counter
from dataclasses import dataclass

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from maskmoe.training.preflight.assumed_gpu import AssumedGpu, assumed_gpu
from maskmoe.training.preflight.parameters import ModelParameters
from maskmoe.training.settings.batch_sizes import trained_samples

_PASSES = 3  # a forward pass, and the gradients of inputs and of weights
_PER_PRODUCT = 2  # multiply and add


@dataclass(frozen=True)
class TrainingCost:
    """The floating-point operations of a training run.

    Attributes:
        flops_per_token: operations of the forward and the backward pass.
        recomputed_flops_per_token: operations of the forward pass that the backward pass repeats.
        tokens: all tokens of the run, those before a checkpoint included.
        gpu: the GPU that is assumed for GPU-hours.
    """

    flops_per_token: float
    recomputed_flops_per_token: float
    tokens: int
    gpu: AssumedGpu

    @property
    def flops(self) -> float:
        """Return the operations of the whole run."""
        return (self.flops_per_token + self.recomputed_flops_per_token) * self.tokens

    @property
    def gpu_hours(self) -> float:
        """Return the GPU-hours of the whole run on the assumed GPU."""
        return self.gpu.hours(self.flops)


def compute_cost(args: Namespace, config: TransformerConfig, model: ModelParameters) -> TrainingCost:
    """Count the operations of a training run.

    Args:
        args: arguments that Megatron has validated.
        config: the model's configuration.
        model: the parameters of the model.
    """
    counter = _ForwardFlops(args, config, model)
    return TrainingCost(
        flops_per_token=_PASSES * counter.total,
        recomputed_flops_per_token=counter.recomputed,
        tokens=trained_samples(args) * args.seq_length,
        gpu=assumed_gpu(args),
    )


class _ForwardFlops:
    """The operations of the forward pass for one token.

    Args:
        args: arguments that Megatron has validated.
        config: the model's configuration.
        model: the parameters of the model.
    """

    def __init__(self, args: Namespace, config: TransformerConfig, model: ModelParameters) -> None:
        self._config, self._seq_length, self._model = config, args.seq_length, model
        whole = model.whole
        # All depths of multi-token prediction can share one layer.
        uses = len(whole.predictions) if config.mtp_use_repeated_layer else 1
        weights = Counter(whole.matrices)
        for kind, number in whole.matrices_of_predictions.items():
            weights[kind] += uses * number
        weights["experts"] = round(weights["experts"] * model.expert_use.mean / (model.num_experts or 1))
        self._products = {kind: _PER_PRODUCT * number for kind, number in weights.items()}
        symbols = "".join(whole.layers + whole.predictions)
        mixing = {Symbols.ATTENTION: self._core_attention, Symbols.MLA: self._core_attention}
        mixing |= {Symbols.GDN: self._gated_delta_rule, Symbols.MAMBA: self._scan}
        self._core = {symbol: symbols.count(symbol) * count() for symbol, count in mixing.items() if symbol in symbols}
        outputs = 1 + len(whole.predictions)
        self._logits = _PER_PRODUCT * model.padded_vocab_size * config.hidden_size * outputs

    @property
    def total(self) -> float:
        """The operations of the whole model."""
        return self._layers + self._logits

    @property
    def recomputed(self) -> float:
        """The operations that recomputation repeats."""
        config, products = self._config, self._products
        if config.recompute_granularity == "full":
            return self._layers * self._share_of_recomputed_layers()
        if config.recompute_granularity != "selective":
            return 0
        # Norms, activation functions and up-projections of latent attention are left out.
        repeated: dict[str, float] = {
            "core_attn": self._core.get(Symbols.ATTENTION, 0) + self._core.get(Symbols.MLA, 0),
            "mlp": products.get("MLP", 0),
            "moe": products.get("experts", 0) + products.get("shared experts", 0) + products.get("router", 0),
        }
        return sum(repeated.get(module, 0) for module in config.recompute_modules or ())

    @property
    def _layers(self) -> float:
        return sum(self._products.values()) + sum(self._core.values())

    def _share_of_recomputed_layers(self) -> float:
        """Return the share of the decoder's layers that full recomputation computes again."""
        if self._config.recompute_method != "block":
            return 1
        chunks = [chunk for stage in self._model.stages for chunk in stage]
        recomputed = sum(min(self._config.recompute_num_layers or 1, chunk.num_layers) for chunk in chunks)
        return recomputed / max(1, sum(chunk.num_layers for chunk in chunks))

    def _core_attention(self) -> float:
        """Return the operations of scores and weighted values in one layer; a query sees half of the keys on average.

        A sliding window is not taken into account.
        """
        config = self._config
        if isinstance(config, MLATransformerConfig):
            key_width, value_width = config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim
        else:
            key_width = value_width = config.kv_channels or 0
        return _PER_PRODUCT * config.num_attention_heads * (key_width + value_width) * self._seq_length / 2

    def _gated_delta_rule(self) -> float:
        """Return the operations on the state of one layer: four for each of its entries, see Megatron's count."""
        config = self._config
        state = (config.linear_key_head_dim or 0) * (config.linear_value_head_dim or 0)
        return _PER_PRODUCT * 4 * (config.linear_num_value_heads or 0) * state

    def _scan(self) -> float:
        """Return the operations of the scan of one Mamba layer: seven for each entry of its state, as in Megatron."""
        config = self._config
        heads = config.mamba_num_heads or 2 * config.hidden_size // config.mamba_head_dim
        return 7 * heads * config.mamba_head_dim * config.mamba_state_dim
