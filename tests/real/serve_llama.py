"""llama.cpp's own HTTP server, embedded by xllamacpp, on a free port of loopback.

    python tests/real/serve_llama.py MODEL.gguf

Prints `listening on http://127.0.0.1:PORT` once the model answers, and serves until its standard input
closes: a test run that dies takes its server with it. Mean pooling lets one server answer chat, completions
and embeddings alike.
"""

import sys

from xllamacpp import CommonParams, Server, llama_pooling_type

CONTEXT_TOKENS = 2048  # of each of the four slots


def main(model: str) -> None:
    params = CommonParams()
    params.model.path = model
    params.model_alias = {"smollm2-135m"}
    params.port = 0
    params.n_parallel = 4
    params.n_ctx = 4 * CONTEXT_TOKENS
    params.cpuparams.n_threads = 1  # two wait for each other where the machine is busy
    params.cpuparams_batch.n_threads = 1
    params.embedding = True
    params.pooling_type = llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    params.endpoint_slots = True
    params.endpoint_metrics = True
    params.verbosity = 2
    server = Server(params)  # returns when the model is loaded
    print(f"listening on {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
