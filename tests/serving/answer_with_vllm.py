"""Answer prompts with vLLM for several models; runs in build/serving.

The arguments are a file with a request in JSON and a file for the answers.
"""

import json
import os
import sys
from pathlib import Path

# Models are loaded one after another. Processes that fork need not import vLLM again for each model. Ranks of tensor
# parallelism may share cores. Multi-latent attention expands keys and values, since vLLM's own layer supports other
# models only.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_MLA_DISABLE": "1",
}

from vllm import LLM, SamplingParams


def answer(folder: str, prompts: list[list[int]], max_tokens: int, **options) -> list[dict]:
    """Return the greedy continuation of each prompt and the log-probabilities of all ids but the first."""
    defaults = {"dtype": "float32", "trust_remote_code": True, "skip_tokenizer_init": True, "enforce_eager": True}
    llm = LLM(folder, **(defaults | {"max_model_len": 64, "kv_cache_memory_bytes": 64 << 20} | options))
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=0, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    answers = []
    for result in results:
        tokens = list(result.outputs[0].token_ids)
        pairs = [*zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True)]
        pairs += zip(tokens, result.outputs[0].logprobs, strict=True)
        answers.append({"tokens": tokens, "logprobs": [logprobs[token].logprob for token, logprobs in pairs]})
    llm.llm_engine.engine_core.shutdown()
    return answers


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    answers = {}
    for name, folder in request.pop("models").items():
        try:
            answers[name] = answer(folder, **request)
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
        Path(sys.argv[2]).write_text(json.dumps(answers))
