"""Checks the settings of a model that the user's own script builds."""

from argparse import ArgumentParser, Namespace

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import add_megatron_arguments

from maskmoe.errors import UserError
from maskmoe.routing_mask.feed_forward_layers import LAYER_FREQUENCY_ERROR, FeedForwardLayers, is_layer_frequency
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.settings.arguments import add_maskmoe_arguments
from maskmoe.training.settings.refused_settings import refused_settings


def check_settings(config: TransformerConfig, mask: RoutingMask, hybrid_layer_pattern: str | None = None) -> list[str]:
    """Refuse settings of a model that a routing mask cannot work with; report defaults that differ.

    The checks are those of `maskmoe pretrain`, which name settings by Megatron's flags. Settings that a configuration
    lacks, such as the format of checkpoints, count as left at their defaults.

    Args:
        config: The configuration of the model's layers.
        mask: The routing mask. Its vocabulary size is not checked, because a configuration has none.
        hybrid_layer_pattern: The pattern of a `MaskMoEHybridModel`; None for a `MaskMoEGPTModel`.

    Returns:
        A line for each setting whose value is not MaskMoE's default, where MaskMoE's default is not Megatron's.

    Raises:
        UserError: Names all settings that are refused, and how the mask does not fit the layers and the layout.
    """
    parser = ArgumentParser()
    megatrons = add_megatron_arguments(parser).parse_args([])
    ours = add_maskmoe_arguments(parser).parse_args([])
    # A configuration has most settings of the arguments, by the same names.
    settings = vars(config) | {"num_experts": config.num_moe_experts, "routing_mask": mask}
    settings |= {"hybrid_layer_pattern": hybrid_layer_pattern, "is_hybrid_model": False}  # the old flag is refused
    kind = config.cp_comm_type or "p2p"
    settings["cp_comm_type"] = [kind] if isinstance(kind, str) else kind
    settings["te_rng_tracker"] = config.use_te_rng_tracker
    settings["mtp_num_layers"] = config.mtp_num_layers or 0  # a pattern alone builds no multi-token prediction
    args = Namespace(**vars(ours) | settings)

    errors = list(refused_settings(args))
    if (
        args.virtual_pipeline_model_parallel_size
        and args.pipeline_model_parallel_size == 2
        and not args.overlap_p2p_comm
    ):
        # Megatron's arguments refuse this, its configuration does not.
        errors.append(
            "An interleaved pipeline of 2 stages mixes up messages: set overlap_p2p_comm=True and batch_p2p_comm=False."
        )
    if hybrid_layer_pattern is None and not is_layer_frequency(args.moe_layer_freq, bool(args.num_experts)):
        errors.append(f"{LAYER_FREQUENCY_ERROR}.")
    elif args.num_experts:
        try:
            mask.check_fits(
                vocab_size=mask.vocab_size,
                num_experts=args.num_experts,
                layers=FeedForwardLayers.of_args(args),
                expert_model_parallel_size=args.expert_model_parallel_size,
            )
        except UserError as error:
            errors.append(f"{error}.")
    if errors:
        raise UserError(" ".join(errors))
    return [
        f"{name} is {settings[name]!r}, MaskMoE's default is {default!r}"
        for name, default in vars(ours).items()
        if name in settings and default != getattr(megatrons, name, default) and default != settings[name]
    ]
