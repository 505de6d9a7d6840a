#!/usr/bin/env python3
"""Makes the committed LoRA adapters (PEFT's layout) and their reference logits.

    python3 make_adapters.py DATA OUT_DIR    # DATA: the checkpoints of make_reference.py

Needs torch, transformers and safetensors. The reference is a fp32 forward of the base model with
W + scale * B A merged into its weights, the definition of LoRA. PEFT itself is not needed; where it is
installed, its own forward with the adapter is compared too.

OUT_DIR/<name>/{adapter_config.json, adapter_model.safetensors, reference.json, logits.f32}.
"""

import json
import math
import os
import re
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# name: (base, stored dtype, keys of adapter_config.json)
ADAPTERS = {
    "all_r4": ("nine_heads_f32", torch.float32, dict(r=4, lora_alpha=8, target_modules=ALL)),
    # Another rank, odd, and only some of the layers; also for a batch of two adapters.
    "attention_r5": ("nine_heads_f32", torch.bfloat16,
                     dict(r=5, lora_alpha=3, use_rslora=True, target_modules=r".*\.(q|v|o)_proj")),
    "patterns": ("nine_heads_f32", torch.float16,
                 dict(r=2, lora_alpha=4, target_modules=["down_proj", "up_proj", "k_proj"],
                      layers_to_transform=[1], rank_pattern={"down_proj": 20},
                      alpha_pattern={"layers.1.mlp.up_proj": 9})),
    "all_linear_tied_bf16": ("tied_bf16", torch.bfloat16,
                             dict(r=8, lora_alpha=16, target_modules="all-linear")),
    # A norm between q_proj and attention; biases; dense layers beside experts.
    "qwen3_r3": ("qwen3", torch.float32, dict(r=3, lora_alpha=6, target_modules=ALL)),
    "biases_r6": ("biases_f16", torch.float16, dict(r=6, lora_alpha=6, target_modules=ALL)),
    "mixtral_attention": ("mixtral", torch.float32,
                          dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj",
                                                                  "o_proj"])),
}


def targets(config, module):
    target = config["target_modules"]
    if target == "all-linear":
        return True
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    if not any(module == t or module.endswith("." + t) for t in target):
        return False
    layers = config.get("layers_to_transform")
    return layers is None or int(re.match(r".*?\.[^.]*\.(\d+)\.", module).group(1)) in layers


def pattern_value(patterns, module, usual):
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return usual


def load(data, base):
    return AutoModelForCausalLM.from_pretrained(
        os.path.join(data, base), dtype=torch.float32, attn_implementation="eager",
        experts_implementation="eager").eval()


def make(data, out, name, seed):
    base, dtype, keys = ADAPTERS[name]
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, bias="none",
                  lora_dropout=0.0, fan_in_fan_out=False, inference_mode=True,
                  init_lora_weights=True, modules_to_save=None, use_dora=False, use_rslora=False,
                  rank_pattern={}, alpha_pattern={}) | keys
    model = load(data, base)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear) or module == "lm_head" or \
                not targets(config, module):
            continue
        r = pattern_value(config["rank_pattern"], module, config["r"])
        alpha = pattern_value(config["alpha_pattern"], module, config["lora_alpha"])
        scale = alpha / (math.sqrt(r) if config["use_rslora"] else r)
        rows, k = layer.weight.shape
        a = (torch.randn((r, k), generator=generator) * k ** -0.5).to(dtype)
        b = (torch.randn((rows, r), generator=generator) * 0.6 * r ** -0.5).to(dtype)
        stem = "base_model.model." + module
        tensors[stem + ".lora_A.weight"] = a.contiguous()
        tensors[stem + ".lora_B.weight"] = b.contiguous()
        with torch.no_grad():
            layer.weight.add_(scale * (b.float() @ a.float()))
    directory = os.path.join(out, name)
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    save_file(tensors, os.path.join(directory, "adapter_model.safetensors"),
              metadata={"format": "pt"})
    with open(os.path.join(directory, "adapter_config.json"), "w") as f:
        json.dump(config, f, indent=1, sort_keys=True)
        f.write("\n")
    with open(os.path.join(data, base, "reference.json")) as f:
        ids = torch.tensor([json.load(f)["tokens"]])
    with torch.no_grad():
        logits = model(ids).logits[0].float().contiguous()
    std = logits.std().item()
    logits.numpy().astype("<f4").tofile(os.path.join(directory, "logits.f32"))
    with open(os.path.join(directory, "reference.json"), "w") as f:
        json.dump({"base": base, "tokens": ids[0].tolist(), "std": std}, f)
        f.write("\n")
    print(f"{name}: {len(tensors) // 2} layers, std {std:.2f}{compare(data, base, directory, ids, logits)}")


def compare(data, base, directory, ids, logits):
    try:
        from peft import PeftModel
    except ImportError:
        return ""
    model = load(data, base)
    model = PeftModel.from_pretrained(model, directory).eval()
    with torch.no_grad():
        worst = (model(ids).logits[0].float() - logits).abs().max().item()
    assert worst < 1e-3 * logits.std().item(), worst
    return f", PEFT's own differs by {worst:.1e}"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    for seed, name in enumerate(ADAPTERS):
        make(sys.argv[1], sys.argv[2], name, 500 + seed)
