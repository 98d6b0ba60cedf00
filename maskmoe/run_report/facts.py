"""Describes a run by the arguments that Megatron writes to TensorBoard."""

from collections.abc import Mapping

OWN_TEXT = "maskmoe/"
"""Beginning of the tags of the texts that MaskMoE writes to TensorBoard; the page shows them as settings."""

_MOST_DIGITS = 15

Facts = dict[str, str]
"""The values of settings by the names that the page gives them."""


class Arguments:
    """The arguments of a run as text.

    Args:
        texts: the texts by tag.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def get(self, name: str) -> str:
        """Return an argument as text; empty if the argument is unknown, None or False."""
        value = self._texts.get(name, "")
        return "" if value in ("None", "False") else value

    def number(self, name: str) -> int | None:
        """Return an argument that is a whole number; None if the argument is unknown or another value."""
        value = self._texts.get(name, "")
        return int(value) if value.isdecimal() and len(value) <= _MOST_DIGITS else None

    def sentence(self, *parts: str) -> str:
        """Fill in templates such as `{num_layers} layers`, and join those whose arguments are all known."""
        filled = []
        for part in parts:
            before, _, rest = part.partition("{")
            name, _, after = rest.partition("}")
            if value := self.get(name):
                filled.append(f"{before}{value}{after}")
        return ", ".join(filled)


def describe_run(texts: Mapping[str, str]) -> Facts:
    """Return the settings that a reader looks for first. An unknown setting is left out.

    Args:
        texts: the texts that the run has logged, by tag.
    """
    arguments = Arguments(texts)
    own = {tag.removeprefix(OWN_TEXT): text for tag, text in texts.items() if tag.startswith(OWN_TEXT)}
    facts = {
        "model": arguments.sentence(
            *("{num_layers} layers", "layer pattern {hybrid_layer_pattern}", "hidden size {hidden_size}"),
            *("{num_attention_heads} attention heads", "{num_experts} experts", "top-{moe_router_topk}"),
            *("expert hidden size {moe_ffn_hidden_size}", "{padded_vocab_size} ids with padding"),
        ),
        "layout": arguments.sentence(
            *("ranks {world_size}", "tensor {tensor_model_parallel_size}", "pipeline {pipeline_model_parallel_size}"),
            *("context {context_parallel_size}", "data {data_parallel_size}", "expert {expert_model_parallel_size}"),
            *("expert tensor {expert_tensor_parallel_size}", "dispatcher {moe_token_dispatcher_type}"),
        ),
        "training": arguments.sentence(
            *("{train_iters} iterations", "{train_samples} samples", "global batch {global_batch_size}"),
            *(
                "micro-batch {micro_batch_size}",
                "sequence length {seq_length}",
                "learning rate {lr}",
                "{lr_decay_style} decay",
            ),
            *("optimizer {optimizer}", "{params_dtype}", "seed {seed}"),
        ),
        "mask": arguments.get("routing_mask"),
        "data": arguments.sentence("{data_path}", "split {split}", "{tokenizer_type}", "{tokenizer_model}"),
        "checkpoints": arguments.sentence("{save}", "loaded from {load}", "every {save_interval} iterations"),
    }
    return {name: value for name, value in (facts | own).items() if value}


def all_arguments(texts: Mapping[str, str]) -> Facts:
    """Return all of Megatron's and MaskMoE's arguments by name, in alphabetical order."""
    return {tag: text for tag, text in sorted(texts.items()) if not tag.startswith(OWN_TEXT)}
