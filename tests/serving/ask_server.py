"""Send completion requests to a server with OpenAI's client, eight at a time; runs in build/serving.

The arguments are the server's address, a file with the requests in JSON and a file for the answers.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI


def ask(client: OpenAI, request: dict) -> dict:
    """Return the text of a greedy completion, its ids, and the log-probabilities of these ids."""
    response = client.completions.create(
        model="model", temperature=0, logprobs=0, extra_body={"return_token_ids": True}, **request
    )
    (choice,) = response.choices
    return {"text": choice.text, "tokens": choice.token_ids, "logprobs": choice.logprobs.token_logprobs}


if __name__ == "__main__":
    _, address, request_file, answer_file = sys.argv
    client = OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda request: ask(client, request), json.loads(Path(request_file).read_text())))
    Path(answer_file).write_text(json.dumps(answers))
