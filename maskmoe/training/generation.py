"""Continue a prompt: `torchrun … -m maskmoe.training.generate --load DIR --use-checkpoint-args --prompt TEXT`."""

import argparse

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.training import print_rank_0
from torch import Tensor

from maskmoe.errors import UserError
from maskmoe.megatron_compat.globals import get_tokenizer
from maskmoe.training.console import console, progress_bar
from maskmoe.training.setup import leaving_process_groups, load_model, parse_and_check_args, write_on_first_rank


def add_generation_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `generation` group, and defaults for the settings of training that Megatron requires."""
    group = parser.add_argument_group(title="generation")
    group.add_argument("--prompt", required=True, help="the text to continue")
    for flag, default, meaning in (
        ("--max-new-tokens", 64, "stop after this many tokens, or at the end of the text"),
        ("--temperature", 0.8, "divides the logits before a token is drawn; 0 always takes the most probable token"),
        ("--top-k", 50, "draw among this many of the most probable tokens; 0: all"),
    ):
        group.add_argument(flag, type=type(default), default=default, help=meaning)
    group.add_argument("--sample-output", metavar="FILE", help="also write the text to this file")
    parser.set_defaults(micro_batch_size=1, skip_train=True, no_load_optim=True, no_load_rng=True)
    return parser


def check_generation(args: argparse.Namespace) -> None:
    """Refuse settings with which no text can be generated.

    Raises:
        UserError: Names the setting.
    """
    if args.pipeline_model_parallel_size > 1 or args.sequence_parallel or args.context_parallel_size > 1:
        raise UserError("generation works with tensor and expert parallelism, not with pipelines or split sequences")
    if args.temperature < 0 or args.top_k < 0 or args.max_new_tokens < 1:
        raise UserError("--temperature and --top-k must not be negative, --max-new-tokens must be positive")


def tokenize_prompt(args: argparse.Namespace, prompt: str) -> list[int]:
    """Return the token ids of the prompt, at least one; call this before the model is loaded.

    Args:
        args: Megatron's arguments and the arguments of generation.
        prompt: The prompt.

    Raises:
        UserError: The prompt is empty or has no tokens, or the text would be longer than the model's positions.
    """
    try:
        prompt_ids = get_tokenizer().tokenize(prompt)
    except ValueError as error:  # NullTokenizer takes numbers only
        raise UserError(f"--prompt cannot be tokenized by {args.tokenizer_type}: {error}") from error
    if not prompt_ids:
        raise UserError("--prompt is empty")
    if len(prompt_ids) + args.max_new_tokens > args.max_position_embeddings:
        raise UserError(
            f"{len(prompt_ids)} prompt tokens and {args.max_new_tokens} new ones exceed the model's "
            f"{args.max_position_embeddings} positions; lower --max-new-tokens"
        )
    return prompt_ids


def sample_next_token(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw the next token.

    Args:
        logits: [vocab].
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Draw among this many of the most probable tokens; 0 draws among all.
        generator: Random generator on the CPU, in the same state on all ranks.

    Returns:
        The id of the token, int64 [1].
    """
    if temperature == 0:
        return logits.argmax().view(1)
    logits = logits.float().cpu() / temperature
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    return torch.multinomial(torch.softmax(logits, dim=0), 1, generator=generator)


@torch.no_grad()
def generate(args: argparse.Namespace, model: torch.nn.Module, prompt_ids: list[int]) -> list[int]:
    """Return the prompt's token ids and their continuation; a collective call with equal results on all ranks.

    The model computes the whole text again for every token. This needs no cache, and is fast enough for short samples.

    Args:
        args: Megatron's arguments and the arguments of generation.
        model: This rank's part of the model.
        prompt_ids: Token ids of the prompt, at least one.

    """
    tokenizer = get_tokenizer()
    model.eval()
    generator = torch.Generator().manual_seed(args.seed)
    tokens = torch.tensor([prompt_ids], device=torch.cuda.current_device())  # [1, sequence]
    for _ in progress_bar(range(args.max_new_tokens), "generating", "token"):
        position_ids = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        logits = gather_from_tensor_model_parallel_region(model(tokens, position_ids, None)[:, -1])
        # Ids beyond the tokenizer's vocabulary pad the embedding, and have no visible experts.
        next_token = sample_next_token(logits[0, : tokenizer.vocab_size], args.temperature, args.top_k, generator)
        next_token = next_token.to(tokens.device)
        # Ranks may differ in the last bit of a logit, but must continue with the same token.
        torch.distributed.broadcast(next_token, src=0)
        if next_token.item() == tokenizer.eod:
            break
        tokens = torch.cat([tokens, next_token.unsqueeze(0)], dim=1)
    return tokens[0].tolist()


def main() -> None:
    """Generate as the command line says."""
    args = parse_and_check_args(add_generation_arguments, reads_data=lambda _: False)
    check_generation(args)
    prompt_ids = tokenize_prompt(args, args.prompt)
    with leaving_process_groups():
        model = load_model(args)
        console.end_of_loading()
        text = get_tokenizer().detokenize(generate(args, model, prompt_ids))
        print_rank_0(text)
        write_on_first_rank(args.sample_output, text + "\n")
