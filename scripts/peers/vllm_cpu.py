"""vLLM on CPUs: one job, one JSON line on stdout. Random token ids, greedy, bf16, no prefix cache."""

import argparse
import json
import os
import random
import time


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--threads", type=int, required=True)
    arguments.add_argument("--streams", type=int, required=True)
    arguments.add_argument("--prompt", type=int, required=True)
    arguments.add_argument("--output", type=int, required=True)
    a = arguments.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{a.threads - 1}"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(a.model, dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=False,
              max_model_len=a.prompt + a.output + 16, max_num_seqs=max(32, a.streams))
    source = random.Random(1)

    def run(streams, prompt, output):
        prompts = [{"prompt_token_ids": [source.randrange(10, 30000) for _ in range(prompt)]}
                   for _ in range(streams)]
        sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        begin = time.monotonic()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.monotonic() - begin

    run(1, 8, 4)
    prefill = run(a.streams, a.prompt, 1)
    whole = run(a.streams, a.prompt, a.output) if a.output > 1 else prefill
    print(json.dumps({"prefill_tok_s": a.streams * a.prompt / prefill,
                      "decode_tok_s": a.streams * (a.output - 1) / (whole - prefill)
                                      if a.output > 1 else 0,
                      "whole_tok_s": a.streams * a.output / whole}))


if __name__ == "__main__":
    main()
