"""OpenVINO GenAI, continuous batching: one job, one JSON line on stdout.

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
    arguments.add_argument("--streams", type=int, required=True)
    arguments.add_argument("--prompt", type=int, required=True)
    arguments.add_argument("--output", type=int, required=True)
    a = arguments.parse_args()
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
    prefill = run(a.streams, a.prompt, 1)
    whole = run(a.streams, a.prompt, a.output) if a.output > 1 else prefill
    print(json.dumps({"prefill_tok_s": a.streams * a.prompt / prefill,
                      "decode_tok_s": a.streams * (a.output - 1) / (whole - prefill)
                                      if a.output > 1 else 0,
                      "whole_tok_s": a.streams * a.output / whole}))


if __name__ == "__main__":
    main()
