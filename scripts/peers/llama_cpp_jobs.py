"""llama.cpp through llama-cpp-python's C interface: jobs in turn, one JSON list on stdout.

Random token ids, greedy; the weights are converted to GGUF once (llama_gguf.py).
"""

import ctypes
import random
import time

import llama_cpp

import jobs


def batch_of(tokens, positions, sequences, wanted):
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i] = token
        batch.pos[i] = positions[i]
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequences[i]
        batch.logits[i] = wanted[i]
    return batch


def decode(context, tokens, positions, sequences, wanted):
    batch = batch_of(tokens, positions, sequences, wanted)
    if llama_cpp.llama_decode(context, batch) != 0:
        raise RuntimeError("llama_decode failed")
    llama_cpp.llama_synchronize(context)
    llama_cpp.llama_batch_free(batch)


def main():
    a = jobs.parse(jobs.arguments())
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(lambda *_: None), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        a.model.encode(), llama_cpp.llama_model_default_params())
    most = max(streams for streams, _, _ in a.jobs)
    p = llama_cpp.llama_context_default_params()
    p.n_ctx = max(streams * (prompt + output + 16) for streams, prompt, output in a.jobs)
    p.kv_unified = True  # else every stream gets an equal share of n_ctx
    p.n_batch = p.n_ubatch = 2048
    p.n_seq_max = most
    p.n_threads = p.n_threads_batch = a.threads
    context = llama_cpp.llama_init_from_model(model, p)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    source = random.Random(1)

    def run(streams, prompt, output):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        begin = time.monotonic()
        todo = [(source.randrange(10, vocabulary), i, s, i == prompt - 1)
                for s in range(streams) for i in range(prompt)]
        for at in range(0, len(todo), 2048):
            decode(context, *map(list, zip(*todo[at:at + 2048])))
        started = time.monotonic()
        for step in range(output - 1):
            decode(context, [source.randrange(10, vocabulary) for _ in range(streams)],
                   [prompt + step] * streams, list(range(streams)), [True] * streams)
        end = time.monotonic()
        return started - begin, end - started, end - begin

    run(1, 8, 4)
    jobs.report(a.jobs, run)


if __name__ == "__main__":
    main()
