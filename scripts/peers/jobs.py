"""What the peers' scripts have in common: arguments, jobs and the one JSON list on stdout."""

import argparse
import json


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--jobs", required=True, help="STREAMS:PROMPT:OUTPUT,...")
    return parser


def parse(parser):
    """The arguments, with jobs as tuples of streams, prompt and output tokens."""
    parsed = parser.parse_args()
    parsed.jobs = [tuple(map(int, job.split(":"))) for job in parsed.jobs.split(",")]
    return parsed


def report(jobs, measure):
    """measure(streams, prompt, output): seconds of prefill, of decoding, and of all."""
    results = []
    for streams, prompt, output in jobs:
        prefill, decoding, whole = measure(streams, prompt, output)
        results.append({"prefill_tok_s": streams * prompt / prefill,
                        "decode_tok_s": streams * (output - 1) / decoding,
                        "whole_tok_s": streams * output / whole})
    print(json.dumps(results))


def by_difference(run):
    """A measure for whoever tells only how long everything took: run(streams, prompt, output)."""
    def measure(streams, prompt, output):
        prefill = run(streams, prompt, 1)
        whole = run(streams, prompt, output)
        return prefill, whole - prefill, whole
    return measure
