"""vLLM on CPUs: jobs in turn, one JSON list on stdout. Random token ids, greedy, bf16, no prefix cache."""

import os
import random
import time

import jobs


def main():
    arguments = jobs.arguments()
    arguments.add_argument("--eager", action="store_true")
    a = jobs.parse(arguments)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{a.threads - 1}"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(a.model, dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=False,
              enforce_eager=a.eager,
              max_model_len=max(prompt + output + 16 for _, prompt, output in a.jobs),
              max_num_seqs=max(32, *(streams for streams, _, _ in a.jobs)))
    source = random.Random(1)

    def run(streams, prompt, output):
        prompts = [{"prompt_token_ids": [source.randrange(10, 30000) for _ in range(prompt)]}
                   for _ in range(streams)]
        sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        begin = time.monotonic()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.monotonic() - begin

    run(1, 8, 4)
    jobs.report(a.jobs, jobs.by_difference(run))


if __name__ == "__main__":
    main()
