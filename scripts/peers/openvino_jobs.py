"""OpenVINO GenAI, continuous batching: jobs in turn, one JSON list on stdout.

The model is what `optimum-cli export openvino --weight-format fp16` made of the checkpoint. Random
token ids, greedy.
"""

import argparse
import json
import random
import time

import numpy
import openvino
import openvino_genai


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--threads", type=int, required=True)
    arguments.add_argument("--jobs", required=True, help="STREAMS:PROMPT:OUTPUT,...")
    a = arguments.parse_args()
    jobs = [tuple(map(int, job.split(":"))) for job in a.jobs.split(",")]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_batched_tokens = 2048
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        a.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": a.threads})
    source = random.Random(1)

    def run(streams, prompt, output):
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = output
        config.ignore_eos = True
        config.do_sample = False
        prompts = [openvino.Tensor(numpy.array(
            [[source.randrange(10, 30000) for _ in range(prompt)]], dtype=numpy.int64))
            for _ in range(streams)]
        begin = time.monotonic()
        pipeline.generate(prompts, [config] * streams)
        return time.monotonic() - begin

    run(1, 8, 4)
    results = []
    for streams, prompt, output in jobs:
        prefill = run(streams, prompt, 1)
        whole = run(streams, prompt, output)
        results.append({"prefill_tok_s": streams * prompt / prefill,
                        "decode_tok_s": streams * (output - 1) / (whole - prefill),
                        "whole_tok_s": streams * output / whole})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
