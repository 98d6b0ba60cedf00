"""Pretrain a MaskMoE language model: `torchrun … -m maskmoe.training.pretrain <Megatron flags> --routing-mask FILE`."""

from collections.abc import Iterator
from functools import partial

from megatron.core.enums import ModelType
from megatron.training import get_timers, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from maskmoe.cli import run_tool
from maskmoe.training.batch import get_batch, loss_function, train_valid_test_datasets_provider
from maskmoe.training.setup import leaving_process_groups, model_config_from_args, parse_and_check_args
from maskmoe.transformer.gpt_model import MaskMoEGPTModel


def forward_step(data_iterator: Iterator, model: MaskMoEGPTModel) -> tuple:
    """One micro-batch forward, in the form that Megatron's schedules take."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    output = model(
        batch.tokens, batch.position_ids, batch.attention_mask, labels=batch.labels, loss_mask=batch.loss_mask
    )
    return output, partial(loss_function, batch.loss_mask)


def main() -> None:
    args = parse_and_check_args()
    with leaving_process_groups():
        pretrain(
            pretrain_cfg_container_from_args(args, model_config_from_args(args)),
            train_valid_test_datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
        )


if __name__ == "__main__":
    run_tool(main)
