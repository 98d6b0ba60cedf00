"""Continue prompts: `torchrun … -m maskmoe.training.generate --load DIR --use-checkpoint-args --prompt TEXT`."""

import argparse

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.training import print_rank_0
from torch import Tensor

from maskmoe.errors import UserError
from maskmoe.files.untrusted import reading
from maskmoe.megatron_compat.globals import get_tokenizer
from maskmoe.training.inference.flags import add_generation_arguments
from maskmoe.training.inference.loading import check_output, load_model, write_on_first_rank
from maskmoe.training.inference.prompts import Prompts, check_prompt
from maskmoe.training.loop.rank_store import sharing_failures
from maskmoe.training.settings.checks import parse_and_check_args
from maskmoe.training.settings.run_settings import leaving_process_groups
from maskmoe.training.watch.console import console, progress_bar


def check_generation(args: argparse.Namespace) -> None:
    """Refuse settings with which no text can be generated.

    Raises:
        UserError: Names the setting.
    """
    if args.pipeline_model_parallel_size > 1 or args.sequence_parallel or args.context_parallel_size > 1:
        raise UserError("generation works with tensor and expert parallelism, not with pipelines or split sequences")
    if args.prompts_file and args.prompts_per_batch > 1 and args.moe_expert_capacity_factor is not None:
        raise UserError("--moe-expert-capacity-factor lets the texts of a batch change each other: use --batch-size 1")


def tokenize_prompt(args: argparse.Namespace, prompt: str) -> list[int]:
    """Return the token ids of a prompt, at least one.

    A NullTokenizer reads ids from the text, so they may be words, or ids that the model lacks.

    Raises:
        UserError: The tokenizer cannot read the prompt, an id is beyond the vocabulary, the prompt has no token, or the
            text would be longer than the model's positions.
    """
    tokenizer = get_tokenizer()
    with reading("the prompt does not suit the tokenizer: it", "a NullTokenizer takes token ids separated by spaces"):
        prompt_ids = list(tokenizer.tokenize(prompt))
    if beyond := [token for token in prompt_ids if not 0 <= token < tokenizer.vocab_size]:
        last = tokenizer.vocab_size - 1
        raise UserError(f"the prompt has the token id {beyond[0]}, but the vocabulary has ids 0 to {last}")
    check_prompt(prompt_ids, args.max_new_tokens, args.max_position_embeddings)
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
    logits = logits.float().cpu()
    logits = (logits - logits.max()) / temperature  # no logit becomes infinite
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    return torch.multinomial(torch.softmax(logits, dim=0), 1, generator=generator)


@torch.no_grad()
def generate(args: argparse.Namespace, model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    """Return the token ids of prompts and their continuations; a collective call with equal results on all ranks.

    The model computes the whole texts again for every token. This needs no cache, and is fast enough for short samples.
    A text does not depend on the other texts: shorter texts are padded on the right, where no layer looks at, and
    each text has its own random generator, which starts from `--seed`.

    Args:
        args: Megatron's arguments and the arguments of generation.
        model: This rank's part of the model.
        prompts: Token ids of the prompts, which `tokenize_prompt` has accepted.
    """
    tokenizer, device = get_tokenizer(), torch.cuda.current_device()
    model.eval()
    texts = [list(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(args.seed) for _ in texts]
    unfinished = list(range(len(texts)))
    for _ in progress_bar(range(args.max_new_tokens), "generating", "token"):
        lengths = [len(texts[index]) for index in unfinished]
        padded = [texts[index] + [0] * (max(lengths) - len(texts[index])) for index in unfinished]
        tokens = torch.tensor(padded, device=device)  # [texts, longest]
        position_ids = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        logits = model(tokens, position_ids, None)  # [texts, longest, vocab / tensor-parallel ranks]
        last = torch.tensor(lengths, device=device) - 1
        logits = gather_from_tensor_model_parallel_region(logits[torch.arange(len(lengths), device=device), last])
        # Ids beyond the tokenizer's vocabulary pad the embedding, and have no visible experts.
        next_tokens = [
            sample_next_token(row[: tokenizer.vocab_size], args.temperature, args.top_k, generators[index]).to(device)
            for row, index in zip(logits, unfinished, strict=True)
        ]
        # Ranks may differ in the last bit of a logit, but must continue with the same tokens.
        new = torch.cat(next_tokens)
        torch.distributed.broadcast(new, src=0)
        for index, token in zip(unfinished, new.tolist(), strict=True):
            texts[index].append(token)
        unfinished = [index for index in unfinished if texts[index][-1] != tokenizer.eod]
        if not unfinished:
            break
    has_ended = [
        len(text) > len(prompt) and text[-1] == tokenizer.eod for text, prompt in zip(texts, prompts, strict=True)
    ]
    return [text[:-1] if ended else text for text, ended in zip(texts, has_ended, strict=True)]


def main() -> None:
    """Generate as the command line says."""
    with sharing_failures():
        args = parse_and_check_args(add_generation_arguments, reads_data=False).args
        check_generation(args)
        prompts = Prompts(args)
        check_output(args.output, args)
        prompts_ids = [tokenize_prompt(args, prompt) for prompt in prompts.texts]
    with leaving_process_groups():
        model = load_model(args)
        console.end_of_loading()
        tokens = [text for batch in prompts.batches() for text in generate(args, model, prompts_ids[batch])]
        output = prompts.output([get_tokenizer().detokenize(text) for text in tokens])
        print_rank_0(output)
        write_on_first_rank(args.output, output + "\n")
