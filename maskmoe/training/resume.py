"""Finds the newest sound checkpoint to resume from, and checks that it fits the run's model and tokenizer."""

import json
import sys
from argparse import Namespace
from itertools import count
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import load_common_state_dict

from maskmoe.checkpoint.integrity import Damage, check_content, check_structure
from maskmoe.checkpoint.series import RELEASE, Choice, checkpoint_path, choose_checkpoint, read_tracker, write_tracker
from maskmoe.errors import UserError
from maskmoe.training.rank_store import RankStore

# Arguments that decide the shapes of a model's parameters, or their meaning.
_MODEL_ARGUMENTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "group_query_attention",
    "num_query_groups",
    "kv_channels",
    "multi_latent_attention",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_latent_size",
    "moe_router_enable_expert_bias",
    "mtp_num_layers",
    "normalization",
    "swiglu",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "qk_layernorm_all_heads",
    "untie_embeddings_and_output_weights",
    "position_embedding_type",
    "layernorm_epsilon",
)
# Settings of a model that Megatron 0.19 does not take from the checkpoint with `--use-checkpoint-args`.
_ARGUMENTS_LEFT_OUT_BY_MEGATRON = (
    "layernorm_epsilon",
    "moe_router_group_topk",
    "moe_router_num_groups",
    "moe_shared_expert_gate",
    "qk_layernorm",
    "qk_layernorm_all_heads",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
)


def find_checkpoint(args: Namespace, ranks: RankStore) -> Path | None:
    """Return the checkpoint to load, whose content all ranks verify together; None to start from the beginning.

    Damaged checkpoints are skipped with a warning. An unusable tracker is rewritten, since Megatron cannot start with
    it.

    Args:
        args: Megatron's arguments, of which `load`, `ckpt_step` and `verify_checkpoint` are used.
        ranks: The ranks of the run; all of them must call this function.

    Raises:
        UserError: There are checkpoints, but none is sound.
    """
    if args.load is None:
        return None
    if ranks.rank > 0:
        return _answer_first_rank(ranks)
    questions = count()

    def check(checkpoint: Path) -> None:
        """Raise `Damage` if a checkpoint is damaged; asks all ranks to verify their shares of its files."""
        check_structure(checkpoint)
        if args.verify_checkpoint:
            question = f"checkpoint/{next(questions)}"
            ranks.broadcast(question, json.dumps({"verify": str(checkpoint)}))
            for damage in ranks.gather(f"{question}/damage", _damage_of_my_share(checkpoint, ranks)):
                if damage:
                    raise Damage(checkpoint, damage)

    answer: dict[str, str | None] = {"error": "choosing the checkpoint failed on the first rank"}
    try:
        choice = choose_checkpoint(args.load, args.ckpt_step, check)
        _warn_of_rejected(choice)
        if choice.iteration is not None and args.ckpt_step is None and read_tracker(args.load) is None:
            write_tracker(args.load, choice.iteration)
            _warn(f"the tracker file in {args.load} was unusable; it names iteration {choice.iteration} now")
        answer = {"chosen": str(choice.checkpoint) if choice.checkpoint else None}
        return choice.checkpoint
    except UserError as error:
        answer = {"error": str(error)}
        raise
    finally:
        # The other ranks wait for an answer, so send one even if this rank fails.
        ranks.broadcast(f"checkpoint/{next(questions)}", json.dumps(answer))


def checkpoint_to_load(args: Namespace) -> Path | None:
    """Return the checkpoint that `find_checkpoint` chose, after its choice was stored in `args.ckpt_step`."""
    if args.load is None:
        return None
    if args.ckpt_step is not None:
        return checkpoint_path(args.load, args.ckpt_step)
    release = Path(args.load) / RELEASE
    return release if release.exists() else None


def _answer_first_rank(ranks: RankStore) -> Path | None:
    """Verify a share of every checkpoint that the first rank asks for, and return its choice.

    This is the part of `find_checkpoint` that all ranks but the first run.
    """
    for number in count():
        question = f"checkpoint/{number}"
        message = json.loads(ranks.broadcast(question))
        if "error" in message:
            raise UserError(message["error"])
        if "chosen" in message:
            return Path(message["chosen"]) if message["chosen"] else None
        ranks.gather(f"{question}/damage", _damage_of_my_share(Path(message["verify"]), ranks))


def _damage_of_my_share(checkpoint: Path, ranks: RankStore) -> str:
    """Return the damage of this rank's share of a checkpoint's files; empty if the files are sound."""
    try:
        check_content(checkpoint, slice(ranks.rank, None, ranks.world_size))
    except Damage as damage:
        return damage.fault
    return ""


def further_checkpoint_args(checkpoint: Path) -> dict[str, Any]:
    """Return the settings of a checkpoint's model that `--use-checkpoint-args` of Megatron does not take from it."""
    saved = load_common_state_dict(checkpoint).get("args", Namespace())
    return {name: getattr(saved, name) for name in _ARGUMENTS_LEFT_OUT_BY_MEGATRON if hasattr(saved, name)}


def check_same_model(args: Namespace, checkpoint: Path) -> None:
    """Check that a checkpoint's model and tokenizer are the model and the tokenizer of this run.

    Raises:
        UserError: Names all differences, with both values of each.
    """
    saved = load_common_state_dict(checkpoint).get("args")
    if saved is None:
        return
    differences = [
        f"--{name.replace('_', '-')} {getattr(saved, name)} in the checkpoint, {getattr(args, name)} in this run"
        for name in _MODEL_ARGUMENTS
        if hasattr(saved, name)
        and getattr(saved, name) != getattr(args, name, None)
        and (name != "num_query_groups" or args.group_query_attention)  # its value is arbitrary otherwise
    ]
    if differences:
        raise UserError(f"checkpoint {checkpoint} holds another model: {'; '.join(differences)}")
    theirs, ours = getattr(saved, "tokenizer_sha256", None), args.tokenizer_sha256
    if theirs is not None and ours is not None and theirs != ours:
        raise UserError(
            f"checkpoint {checkpoint} was trained with another tokenizer ({saved.tokenizer_model}, sha256 "
            f"{theirs[:12]}…) than --tokenizer-model {args.tokenizer_model} ({ours[:12]}…)"
        )


def _warn_of_rejected(choice: Choice) -> None:
    for damage in choice.rejected:
        _warn(f"checkpoint {damage}")
    if choice.rejected:
        _warn(f"resuming from {choice.checkpoint}" if choice.checkpoint else "starting from the beginning")


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
