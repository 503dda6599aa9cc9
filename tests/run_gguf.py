"""In a process of its own: llama.cpp's next tokens after a prompt of ids, of a GGUF file.

    python run_gguf.py MODEL.gguf '[1, 2, 3]' LETTER

Prints {id: log-prob} of the 10 likeliest ones as JSON. LETTER is the id of a token that is a whole
letter: it is made the one that is taken, as none is told of a token that is half a character.
"""

from __future__ import annotations

import json
import sys

import xllamacpp


def main() -> None:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = sys.argv[1]
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = 1
    parameters.warmup = False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(parameters)
    prompt = json.loads(sys.argv[2])
    request = {"prompt": prompt, "max_tokens": 1, "logprobs": 10, "temperature": 0}
    request["logit_bias"] = [[int(sys.argv[3]), 1000]]  # of the choice, not of the log-probs
    answer = server.handle_completions(request)
    [first] = answer["choices"][0]["logprobs"]["content"]
    print(json.dumps({token["id"]: token["logprob"] for token in first["top_logprobs"]}))


if __name__ == "__main__":
    main()
