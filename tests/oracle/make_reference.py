#!/usr/bin/env python3
"""Makes the committed reference data of the model tests with the public `transformers`.

    python3 make_reference.py tiny     OUT_DIR [NAME...]   # random checkpoints + logits: llama, mistral
    python3 make_reference.py families OUT_DIR [NAME...]   # the same of the other families
    python3 make_reference.py long     OUT_DIR             # 32,768 tokens on a tiny yarn checkpoint
    python3 make_reference.py real     CHECKPOINT OUT.json # reference of a real checkpoint

Needs torch, transformers and safetensors; running the tests needs none of them. The reference is
always computed in fp32: weights stored as bf16 or f16 are widened exactly.

tiny, families: OUT_DIR/<name>/{config.json, *.safetensors, reference.json, logits.f32}. logits.f32
holds the logits of every position, f32 little-endian [tokens, vocab].
real: per prompt its token ids and, per position, log-sum-exp, the ten best logits and a fixed
sample of others.
"""

import argparse
import json
import os
import shutil

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import MistralConfig, MistralForCausalLM

import families

SMALL = dict(vocab_size=170, hidden_size=54, intermediate_size=70, num_hidden_layers=2,
             num_attention_heads=6, num_key_value_heads=3, head_dim=10,
             max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64, rope_theta=10000.0)

# name: (config, stored dtype, options)
TINY = {
    "untied_f32": (SMALL, torch.float32, {}),
    "tied_bf16": (dict(SMALL, tie_word_embeddings=True), torch.bfloat16, {}),
    "biases_f16": (dict(SMALL, attention_bias=True, mlp_bias=True), torch.float16, {}),
    "linear_f16": (dict(SMALL, rope_parameters=dict(rope_type="linear", factor=4.0,
                                                    rope_theta=10000.0)), torch.float16, {}),
    # As transformers 4 spelled it: rope_theta, rope_scaling, torch_dtype.
    "llama3_bf16": (dict(SMALL, rope_parameters=LLAMA3), torch.bfloat16, {"old_spelling": True}),
    # The proportions of SmolLM2, in several files with an index.
    "nine_heads_f32": (dict(SMALL, hidden_size=72, num_attention_heads=9, num_key_value_heads=3,
                            head_dim=8, intermediate_size=100, vocab_size=177,
                            tie_word_embeddings=True), torch.float32, {"shards": 3}),
    "mistral_window_f32": (dict(SMALL, sliding_window=7, num_hidden_layers=1), torch.float32,
                           {"mistral": True}),
}


def randomise(model, seed):
    """Weights of a size at which every part of the network matters to the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, scale):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)

    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                normal(tensor, 0.7)
            elif "norm" in name:
                normal(tensor, 0.2)
                tensor.add_(1.0)
            elif "q_proj" in name or "k_proj" in name:
                normal(tensor, 1.0 * tensor.shape[1] ** -0.5)
            elif "embed" in name:
                normal(tensor, 0.7)
            elif "lm_head" in name:
                normal(tensor, 2.0 * tensor.shape[1] ** -0.5)
            else:
                normal(tensor, 1.0 * tensor.shape[1] ** -0.5)


def store(model, config, dtype, directory, options):
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        state[name] = tensor.detach().to(dtype).contiguous().clone()
    families.store(state, options, directory)
    text = json.loads(config.to_json_string(use_diff=True))
    text["dtype"] = str(dtype).split(".")[-1]
    text.pop("transformers_version", None)
    if options.get("old_spelling"):
        rope = dict(text.pop("rope_parameters"))
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope
        text["torch_dtype"] = text.pop("dtype")
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(text, f, indent=1, sort_keys=True)
        f.write("\n")
    return state


def tiny(out, names):
    for seed, (name, (keys, dtype, options)) in enumerate(TINY.items()):
        if names and name not in names:
            continue
        directory = os.path.join(out, name)
        shutil.rmtree(directory, ignore_errors=True)
        os.makedirs(directory)
        mistral = options.get("mistral", False)
        config = (MistralConfig if mistral else LlamaConfig)(**keys)
        config._attn_implementation = "eager"
        model = (MistralForCausalLM if mistral else LlamaForCausalLM)(config).eval()
        randomise(model, seed)
        state = store(model, config, dtype, directory, options)
        # What was stored is the truth.
        model.load_state_dict({n: t.float() for n, t in state.items()}, strict=False)
        model.tie_weights()
        generator = torch.Generator().manual_seed(1000 + seed)
        ids = torch.randint(0, config.vocab_size, (1, 40), generator=generator)
        with torch.no_grad():
            logits = model(ids).logits[0].float().contiguous()
        std = logits.std().item()
        assert std >= 1.0, f"{name}: standard deviation {std}"
        logits.numpy().astype("<f4").tofile(os.path.join(directory, "logits.f32"))
        with open(os.path.join(directory, "reference.json"), "w") as f:
            json.dump({"tokens": ids[0].tolist(), "std": std}, f)
            f.write("\n")
        print(f"{name}: std {std:.2f}")


PROMPTS = [
    "What is the capital of France?",
    "The quick brown fox jumps over the lazy dog. Once upon a time",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "\u4e2d\u56fd\u7684\u9996\u90fd\u662f\u5317\u4eac\uff0c\u6cd5\u56fd\u7684\u9996\u90fd\u662f",
    "\U0001F600\U0001F680 emoji and symbols: \u20ac \u00b1 \u2264",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584, 4181, 6765,",
]


def real(checkpoint, out):
    from transformers import AutoTokenizer
    config = AutoConfig.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    sample = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(1))
    sample = sorted(sample[:24].tolist())
    prompts = []
    for text in PROMPTS:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits[0].float()
        positions = []
        for row in logits:
            best = torch.topk(row, 10)
            positions.append({"lse": round(torch.logsumexp(row, 0).item(), 6),
                              "top": best.indices.tolist(),
                              "top_logits": [round(x, 5) for x in best.values.tolist()],
                              "sample_logits": [round(row[i].item(), 5) for i in sample]})
        prompts.append({"text": text, "tokens": ids[0].tolist(), "std": logits.std().item(),
                        "positions": positions})
        print(f"{len(ids[0])} tokens, std {logits.std().item():.2f}")
    with open(out, "w") as f:
        json.dump({"sample": sample, "prompts": prompts}, f, separators=(",", ":"))
        f.write("\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("tiny", "families"):
        p = commands.add_parser(command)
        p.add_argument("out")
        p.add_argument("name", nargs="*")
    p = commands.add_parser("long")
    p.add_argument("out")
    p = commands.add_parser("real")
    p.add_argument("checkpoint")
    p.add_argument("out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "tiny":
        tiny(arguments.out, arguments.name)
    elif arguments.command == "families":
        families.make(arguments.out, arguments.name)
    elif arguments.command == "long":
        families.make_long(arguments.out)
    else:
        real(arguments.checkpoint, arguments.out)
