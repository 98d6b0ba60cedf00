"""Samples whose documents are rearranged to fill in the middle: prefix, suffix, middle, with a token before each."""

from argparse import Namespace
from typing import Any

import numpy as np
from megatron.training.datasets.fim_dataset import GPTFIMDataset

from maskmoe.errors import UserError
from maskmoe.megatron_compat.globals import get_tokenizer

TOKENS = ("prefix", "middle", "suffix", "pad", "eod")
"""The names of the tokens that `GPTFIMDataset` needs, each with a flag `--fim-NAME-token`."""


class FillInMiddleDataset(GPTFIMDataset):
    """`GPTFIMDataset` whose samples depend on their index only.

    Megatron's class draws all samples from one random generator, in the order in which they are read. A run that
    resumes, or reads with another number of workers, would then see other samples than a run without interruption.
    """

    np_rng: np.random.RandomState

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[np.ndarray, np.ndarray, list]:
        """Return token ids, documents and lengths of a sample, drawn from a generator of its own."""
        self.np_rng = np.random.RandomState([self.config.random_seed, idx])
        return super()._query_document_sample_shuffle_indices(idx)


def token_settings(args: Namespace) -> dict[str, Any]:
    """Return the setting of `GPTFIMDatasetConfig` that no argument of Megatron has by its name."""
    return {"fim_extra_tokens": {name: getattr(args, f"fim_{name}_token") for name in TOKENS}}


def check_tokens(args: Namespace) -> None:
    """Check that the tokenizer, a HuggingFaceTokenizer, has every token that `GPTFIMDataset` inserts.

    Raises:
        UserError: a token is missing; Megatron would insert the id of an unknown token, or fail while training.
    """
    vocabulary = get_tokenizer()._tokenizer.tokenizer.get_vocab()
    for name in TOKENS:
        token = getattr(args, f"fim_{name}_token")
        if token not in vocabulary:
            raise UserError(
                f"--tokenizer-model {args.tokenizer_model} has no token {token}, which --fim-data needs: add the token "
                f"before the tokenizer is used, or name another one by --fim-{name}-token"
            )
