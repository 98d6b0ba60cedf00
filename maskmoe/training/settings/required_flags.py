"""Finds flags that a run needs and that its command line lacks; Megatron reports them late, or by a traceback."""

from argparse import Namespace
from collections.abc import Iterator


def missing_flags(args: Namespace, has_checkpoint: bool) -> Iterator[str]:
    """Yield an error for each missing flag, which says what to pass.

    Args:
        args: parsed arguments; Megatron need not have validated them.
        has_checkpoint: whether the run loads a checkpoint, which may hold the schedule of the learning rate.
    """
    yield from missing_sizes(args)
    if args.micro_batch_size is None:
        yield "no micro-batch size: pass --micro-batch-size"
    if args.save is not None and args.save_interval is None:
        yield "no interval between checkpoints: --save needs --save-interval"
    takes_schedule = args.use_checkpoint_opt_param_scheduler and not (args.finetune or args.no_load_optim)
    if not args.skip_train:
        yield from missing_schedule(args, takes_learning_rate=has_checkpoint and takes_schedule)


def missing_sizes(args: Namespace) -> Iterator[str]:
    """Yield an error for each missing flag without which the sizes of the model are unknown.

    Args:
        args: parsed arguments; Megatron need not have validated them.
    """
    if args.num_layers is None and args.encoder_num_layers is None and args.hybrid_layer_pattern is None:
        yield "no number of layers: pass --num-layers, or --hybrid-layer-pattern"
    if args.hidden_size is None:
        yield "no hidden size: pass --hidden-size"
    if args.num_attention_heads is None:
        yield "no number of attention heads: pass --num-attention-heads"
    if args.seq_length is None and args.encoder_seq_length is None:
        yield "no sequence length: pass --seq-length"
    if args.max_position_embeddings is None:
        yield "no number of positions: pass --max-position-embeddings, at least --seq-length"


def missing_schedule(args: Namespace, takes_learning_rate: bool = False) -> Iterator[str]:
    """Yield an error for each missing flag without which the length or the learning rate of training is unknown.

    Args:
        args: parsed arguments; Megatron need not have validated them.
        takes_learning_rate: whether the learning rate of a checkpoint replaces the arguments'.
    """
    if args.train_iters is None and args.train_samples is None:
        yield "no length of training: pass --train-iters or --train-samples"
    if args.lr is None and not takes_learning_rate:
        yield "no learning rate: pass --lr"
