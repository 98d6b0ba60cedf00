"""A checkpoint whose model or tokenizer differs from the run's is refused, or completes the settings of the run."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.training import checkpointing

from maskmoe.conversion.config_mapping import _FIXED_ARGS
from maskmoe.errors import UserError
from maskmoe.training.resume import changed_settings
from maskmoe.training.resume.changed_settings import (
    check_same_model,
    find_changed_settings,
    settings_of_checkpoint,
    take_padding_of_checkpoint,
    take_settings_of_checkpoint,
)

CHECKPOINT = Path("checkpoints/iter_0000007")
# Arguments with which a model computes something else, without another pattern, and without those that are refused.
FUNCTION = {
    *("window_attn_skip_freq", "rope_scaling_factor", "rotary_scaling_factor", "yarn_beta_fast"),
    *("mup_width_mult", "mup_base_hidden_size", "mup_embedding_mult", "mup_output_mult", "mup_base_head_dim"),
    *("mup_attn_scale_power", "moe_expert_capacity_factor", *_FIXED_ARGS),
} - {
    *("hybrid_layer_pattern", "experimental_attention_variant", "linear_attention_freq"),
    *("heterogeneous_layers_config_path", "apply_residual_connection_post_layernorm"),
    *("moe_router_force_load_balancing", "moe_router_force_biased"),
}


def another(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    return f"not {value}" if isinstance(value, str) else (value or 0) + 1


def replace_fields(args: Namespace, **fields: object) -> Namespace:
    return Namespace(**{**vars(args), **fields})


@pytest.fixture(scope="module")
def args(parse) -> Namespace:
    """The arguments of a run, which the checkpoint holds, too."""
    return parse("")


@pytest.fixture
def save(monkeypatch) -> Callable[..., None]:
    """Let the checkpoint hold the arguments of a run, and further parts of its state."""

    def save(saved: Namespace, **state: object) -> None:
        monkeypatch.setattr(changed_settings, "read_common_state", lambda checkpoint: {"args": saved} | state)

    return save


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"hidden_size": 64}, ["--hidden-size 32 in the checkpoint, 64 in this run"]),
        (
            {"moe_ffn_hidden_size": 48, "num_attention_heads": 4},
            ["--moe-ffn-hidden-size 32", "--num-attention-heads 2"],
        ),
        ({"moe_router_enable_expert_bias": True}, ["--moe-router-enable-expert-bias"]),
        (
            {"tokenizer_sha256": "b" * 64},
            [f"the digest of --tokenizer-model {'a' * 64} in the checkpoint, {'b' * 64} in"],
        ),
    ],
)
def test_checkpoint_of_another_model_is_refused(args, save, fields, parts):
    save(replace_fields(args, tokenizer_sha256="a" * 64))
    check_same_model(replace_fields(args, tokenizer_sha256=None), CHECKPOINT)  # unknown
    with pytest.raises(UserError) as refusal:
        check_same_model(replace_fields(args, **fields), CHECKPOINT)
    for part in (str(CHECKPOINT), *parts):
        assert part in str(refusal.value)


def test_settings_without_flags_are_taken_from_the_checkpoint(args, save):
    save(replace_fields(args, beta_fast=16))
    with pytest.raises(UserError, match=r"--beta-fast 16 in the checkpoint.* --use-checkpoint-args takes"):
        check_same_model(args, CHECKPOINT)
    check_same_model(replace_fields(args, **settings_of_checkpoint(args, CHECKPOINT)), CHECKPOINT)


@pytest.mark.parametrize(("saved", "ranks", "expected"), [(1024, 2, 1024), (512, 3, 768), (384, 2, 768)])
def test_padding_is_taken_from_a_checkpoint_if_it_fits(args, save, saved, ranks, expected):
    """The ranks can divide the embedding, which has a row for each of the 510 ids; else the run has its own padding."""
    save(replace_fields(args, padded_vocab_size=saved))
    args = replace_fields(args, padded_vocab_size=768, tensor_model_parallel_size=ranks)
    take_padding_of_checkpoint(args, CHECKPOINT, vocab_size=510)
    assert args.padded_vocab_size == expected
    notes = " ".join(find_changed_settings(replace_fields(args, load="load"), CHECKPOINT).notes)
    assert (f"--padded-vocab-size {saved} in the checkpoint, 768 in this run" in notes) == (expected == 768)


def test_function_of_a_model_is_taken_from_the_checkpoint(args, save, monkeypatch, tmp_path):
    saved = replace_fields(args, **{name: another(getattr(args, name)) for name in FUNCTION})
    save(saved)
    state = {"args": saved, "iteration": 21}
    monkeypatch.setattr(checkpointing, "_load_base_checkpoint", lambda *_, **__: (state, "", False, None))
    completed = replace_fields(args, load=str(tmp_path), **settings_of_checkpoint(args, CHECKPOINT))
    completed = take_settings_of_checkpoint(completed, CHECKPOINT)
    assert {name: getattr(completed, name) for name in FUNCTION} == {name: getattr(saved, name) for name in FUNCTION}
    given = take_settings_of_checkpoint(replace_fields(args, load=str(tmp_path)), CHECKPOINT, FUNCTION)
    assert {name: getattr(given, name) for name in FUNCTION} == {name: getattr(args, name) for name in FUNCTION}


def test_model_of_a_tokenizer_is_not_taken_for_another_type(args, save, monkeypatch, tmp_path):
    saved = replace_fields(args, tokenizer_type="SentencePieceTokenizer", tokenizer_model="theirs.model")
    save(saved)
    loaded = {"args": saved, "iteration": 21}, "", False, None
    monkeypatch.setattr(checkpointing, "_load_base_checkpoint", lambda *_, **__: loaded)
    ours = replace_fields(args, load=str(tmp_path), tokenizer_type="HuggingFaceTokenizer", tokenizer_model=None)
    taken = take_settings_of_checkpoint(ours, CHECKPOINT, ["tokenizer_type"])
    assert (taken.tokenizer_type, taken.tokenizer_model) == ("HuggingFaceTokenizer", None)


def test_model_that_computes_something_else_is_refused_or_noted(args, save):
    for name in FUNCTION:
        before = another(getattr(args, name))
        save(replace_fields(args, **{name: before}))
        try:
            check_same_model(args, CHECKPOINT)
            answer = " ".join(find_changed_settings(args, CHECKPOINT).notes)
        except UserError as error:
            answer = str(error)
        assert f" {before} in the checkpoint, {getattr(args, name)} in this run" in answer


def test_optimizer_state_of_another_implementation_needs_names(args, save):
    args = replace_fields(args, use_distributed_optimizer=True)
    other = replace_fields(args, transformer_impl="transformer_engine")
    save(args, content_metadata={"distrib_optim_sharding_type": "fully_reshardable"})
    check_same_model(other, CHECKPOINT)
    save(args, content_metadata={"distrib_optim_sharding_type": "dp_reshardable"})
    for accepted in (args, replace_fields(other, no_load_optim=True)):
        check_same_model(accepted, CHECKPOINT)
    with pytest.raises(UserError, match=r"in the order of its parameters.* --dist-ckpt-optim-fully-reshardable"):
        check_same_model(other, CHECKPOINT)


def test_hybrid_run_continues_the_gpt_model_of_its_pattern(args, save):
    save(args)
    check_same_model(replace_fields(args, hybrid_layer_pattern="*E*E|*E*E", num_layers=8), CHECKPOINT)
    for pattern in ("*-*E*E*E", "*E*E*E*E/*E", "**EEEE**", "G*EM*EG*E*E"):
        with pytest.raises(UserError, match=r"continues with --hybrid-layer-pattern '\*E\*E\*E\*E', not with"):
            check_same_model(replace_fields(args, hybrid_layer_pattern=pattern, num_layers=8), CHECKPOINT)


def test_layers_that_flags_choose_by_number_continue_in_a_gpt_model_only(args, save):
    saved = replace_fields(args, no_rope_freq=[0, 1, 0, 1])
    save(saved)
    check_same_model(saved, CHECKPOINT)
    with pytest.raises(UserError, match=r"has --no-rope-freq, .* pass --num-layers"):
        check_same_model(replace_fields(saved, hybrid_layer_pattern="*E*E*E*E", num_layers=8), CHECKPOINT)


def test_checkpoint_of_a_hybrid_model_is_for_the_same_pattern(args, save):
    saved = replace_fields(args, hybrid_layer_pattern="*E*E|*E*E/*E", mtp_num_layers=1, num_layers=8)
    save(saved)
    with pytest.raises(UserError, match=r"cannot be loaded into a GPT model: pass --hybrid-layer-pattern '\*E\*E\|"):
        check_same_model(args, CHECKPOINT)
    check_same_model(replace_fields(saved, hybrid_layer_pattern="*E|*E|*E|*E/*E"), CHECKPOINT)
    with pytest.raises(UserError, match=r"not with '\*E\*E\*E\*-/\*E'"):
        check_same_model(replace_fields(saved, hybrid_layer_pattern="*E*E*E*-/*E"), CHECKPOINT)


@pytest.mark.parametrize("name", ["hybrid_layer_pattern", "hybrid_override_pattern"])
def test_bounds_of_stages_are_taken_from_a_checkpoint_if_their_number_is_equal(name, save):
    save(Namespace(**{name: "*E|*E|*E|*E/*E"}))
    for stages, expected in ((4, "*E|*E|*E|*E/*E"), (2, "*E*E*E*E/*E")):
        args = Namespace(pipeline_model_parallel_size=stages)
        assert settings_of_checkpoint(args, CHECKPOINT) == {"hybrid_layer_pattern": expected}
