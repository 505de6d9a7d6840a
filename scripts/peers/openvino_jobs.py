"""OpenVINO GenAI, continuous batching: jobs in turn, one JSON list on stdout.

The model is what `optimum-cli export openvino --weight-format fp16` made of the checkpoint. Random
token ids, greedy.
"""

import random
import time

import numpy
import openvino
import openvino_genai

import jobs


def main():
    a = jobs.parse(jobs.arguments())
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
    jobs.report(a.jobs, jobs.by_difference(run))


if __name__ == "__main__":
    main()
