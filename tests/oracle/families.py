"""Tiny random checkpoints of every family, in the layout in which such models are published, and
their logits. See make_reference.py.

Stored as bf16, so that the same weights, widened, serve the comparison in fp32. A seed is taken
only if its routers choose the same experts in bf16 as in fp32, also with slightly other weights, and
its greedy tokens do not hang on rounding: the tests then compare arithmetic, not ties.
"""

import json
import os
import re
import shutil

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import deepseek_moe

DENSE = dict(vocab_size=170, hidden_size=56, intermediate_size=70, num_hidden_layers=2,
             num_attention_heads=7, num_key_value_heads=1, head_dim=8,
             max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False)
MOE = dict(DENSE, moe_intermediate_size=22)
MLA = dict(vocab_size=170, hidden_size=56, intermediate_size=70, moe_intermediate_size=10,
           num_hidden_layers=2, num_attention_heads=7, num_key_value_heads=7, kv_lora_rank=22,
           qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14, max_position_embeddings=256,
           rms_norm_eps=1e-6, tie_word_embeddings=False, first_k_dense_replace=1)
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=16, rope_theta=10000.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64, rope_theta=10000.0)
LINEAR = dict(rope_type="linear", factor=4.0, rope_theta=10000.0)
MLA_YARN = dict(YARN, mscale=0.707, mscale_all_dim=1.0, beta_fast=32, beta_slow=1)

# name: (model_type of transformers, configuration, options)
# options: as: model_type written to config.json; old: spelling of transformers 4; fused: experts
# stored as 3-D tensors, as transformers 5 holds them; shards; by_token: logits computed one token
# after the other; extra: keys for config.json that transformers does not know; drop: keys that
# published files of this family do not have; skip: seeds at which a router of ours in bf16 does not
# choose as in fp32.
FAMILIES = {
    "yarn": ("llama", dict(DENSE, rope_parameters=YARN), {"old": True}),
    "dynamic": ("llama", dict(DENSE, max_position_embeddings=16,
                              rope_parameters=dict(rope_type="dynamic", factor=4.0,
                                                   rope_theta=10000.0)), {"by_token": True}),
    "qwen2": ("qwen2", dict(DENSE), {"old": True, "drop": ["head_dim"]}),
    "qwen2_window": ("qwen2", dict(DENSE, use_sliding_window=True, sliding_window=5,
                                   max_window_layers=1), {"drop": ["head_dim"]}),
    "qwen3": ("qwen3", dict(DENSE, hidden_size=50, num_attention_heads=25, num_key_value_heads=5, head_dim=6,
                            attention_bias=True), {}),
    "ernie4_5": ("ernie4_5", dict(DENSE, use_bias=True), {"old": True}),
    "mixtral": ("mixtral", dict(DENSE, intermediate_size=22, num_local_experts=5,
                                num_experts_per_tok=2), {"old": True, "shards": 2}),
    "mixtral_fused": ("mixtral", dict(DENSE, intermediate_size=22, num_local_experts=5,
                                      num_experts_per_tok=2, sliding_window=6), {"fused": True}),
    "qwen2_moe": ("qwen2_moe", dict(MOE, num_experts=7, num_experts_per_tok=3,
                                    shared_expert_intermediate_size=38, norm_topk_prob=False,
                                    decoder_sparse_step=1, mlp_only_layers=[0]),
                  {"old": True, "drop": ["head_dim"]}),
    "qwen3_moe": ("qwen3_moe", dict(MOE, num_experts=7, num_experts_per_tok=3, norm_topk_prob=True,
                                    attention_bias=True, decoder_sparse_step=2), {}),
    "qwen3_moe_fused": ("qwen3_moe", dict(MOE, num_experts=5, num_experts_per_tok=2,
                                          norm_topk_prob=False), {"fused": True}),
    "deepseek": ("llama", dict(MOE, n_routed_experts=7, n_shared_experts=2, num_experts_per_tok=3,
                               norm_topk_prob=False, first_k_dense_replace=1, moe_layer_freq=1,
                               num_key_value_heads=7), {"as": "deepseek", "old": True}),
    "deepseek_v2": ("deepseek_v2", dict(MLA, q_lora_rank=None, n_routed_experts=25, n_group=5,
                                        topk_group=2, num_experts_per_tok=4, n_shared_experts=2,
                                        topk_method="group_limited_greedy",
                                        routed_scaling_factor=5.0, rope_parameters=MLA_YARN),
                    {"old": True, "skip": 8}),
    "deepseek_v2_greedy": ("deepseek_v2", dict(MLA, q_lora_rank=26, n_routed_experts=7,
                                               num_experts_per_tok=3, n_shared_experts=1,
                                               topk_method="greedy", routed_scaling_factor=1.0,
                                               attention_bias=True), {"as": "deepseekv2"}),
    "deepseek_v3": ("deepseek_v3", dict(MLA, q_lora_rank=26, n_routed_experts=25, n_group=5,
                                        topk_group=2, num_experts_per_tok=4, n_shared_experts=1,
                                        routed_scaling_factor=2.5, norm_topk_prob=True,
                                        rope_parameters=MLA_YARN),
                    {"old": True, "extra": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}}),
    "kimi_k2": ("deepseek_v3", dict(MLA, q_lora_rank=26, n_routed_experts=7, n_group=1,
                                    topk_group=1, num_experts_per_tok=3, n_shared_experts=1,
                                    routed_scaling_factor=2.827, norm_topk_prob=True,
                                    rope_parameters=dict(MLA_YARN, mscale=1.0)),
                {"old": True, "as": "kimi_k2",
                 "extra": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}}),
    "glm4_moe": ("glm4_moe", dict(MOE, head_dim=12, n_routed_experts=7, n_shared_experts=1,
                                  num_experts_per_tok=3, first_k_dense_replace=1,
                                  routed_scaling_factor=2.5, norm_topk_prob=True, n_group=1,
                                  topk_group=1, attention_bias=True, use_qk_norm=True,
                                  partial_rotary_factor=0.5), {"old": True}),
    "ernie4_5_moe": ("ernie4_5_moe", dict(MOE, moe_num_experts=7, moe_k=3, moe_num_shared_experts=2,
                                          moe_layer_start_index=1, use_bias=True), {"old": True}),
    # Seeds follow from the place: what is new comes last.
    "llama3": ("llama", dict(DENSE, rope_parameters=LLAMA3), {"old": True}),
    "linear": ("llama", dict(DENSE, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR), {}),
    "mistral": ("mistral", dict(DENSE, sliding_window=7), {"old": True}),
}


def randomise(model, seed):
    """Weights of a size at which every part of the network matters to the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, scale, mean=0.0):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + mean)

    tensors = list(model.named_parameters())
    tensors += [(n, b) for n, b in model.named_buffers() if "correction_bias" in n]
    with torch.no_grad():
        for name, tensor in tensors:
            width = tensor.shape[-1] ** -0.5
            if "correction_bias" in name:
                normal(tensor, 0.3)
            elif name.endswith("bias"):
                normal(tensor, 0.5)
            elif "norm" in name:
                normal(tensor, 0.2, 1.0)
            elif re.search(r"(gate|gate_proj|shared_expert_gate)\.weight$", name) and (
                    "gate_proj" not in name):
                normal(tensor, 2.0 * width)
            elif "embed" in name:
                normal(tensor, 0.7)
            elif "lm_head" in name:
                normal(tensor, 2.0 * width)
            elif "o_proj" in name or "down_proj" in name:
                normal(tensor, 0.6 * width)  # as in a trained model, layers add little each
            else:
                normal(tensor, width)


def published(state, model_type):
    """From the fused experts of transformers 5 to the tensors of published checkpoints."""
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    block = "mlp"
    if model_type == "mixtral":
        names = {"gate": "w1", "up": "w3", "down": "w2"}
        block = "block_sparse_moe"
    result = {}
    for name, tensor in state.items():
        name = name.replace("mlp.gate.moe_statics.", "mlp.moe_statics.")
        at = re.match(r"(.*\.)mlp\.(experts|gate)\.(gate_up_proj|down_proj|weight)$", name)
        if at is None or (at.group(2) == "gate") != (at.group(3) == "weight"):
            result[name] = tensor
        elif at.group(2) == "gate":
            result[f"{at.group(1)}{block}.gate.weight"] = tensor
        else:
            for e, matrix in enumerate(tensor):
                to = f"{at.group(1)}{block}.experts.{e}."
                if at.group(3) == "down_proj":
                    result[f"{to}{names['down']}.weight"] = matrix.clone()
                else:
                    gate, up = matrix.chunk(2)
                    result[f"{to}{names['gate']}.weight"] = gate.clone()
                    result[f"{to}{names['up']}.weight"] = up.clone()
    return result


def build(model_type, keys, options):
    config = AutoConfig.for_model(model_type, **keys)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    if options.get("as") == "deepseek":
        deepseek_moe.with_experts(model, config)
    return model.eval(), config


def choices(model, ids):
    """Logits, and the experts that every router chose."""
    chosen = []
    hooks = [module.register_forward_hook(
        lambda m, i, o: chosen.append(o[2].reshape(-1, o[2].shape[-1]).sort(-1).values))
        for module in model.modules() if type(module).__name__.endswith("Router")]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0].float()
    for hook in hooks:
        hook.remove()
    return logits, chosen


def logits_of(model, ids, options):
    if not options.get("by_token"):
        return choices(model, ids)[0]
    rows, cache = [], None
    with torch.no_grad():
        for i in range(ids.shape[1]):
            step = model(ids[:, i:i + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            rows.append(step.logits[0, 0].float())
    return torch.stack(rows)


def greedy(model, ids, count, options):
    """Tokens, and the smallest lead of a chosen one in standard deviations."""
    tokens, lead = ids, float("inf")
    for _ in range(count):
        row = logits_of(model, tokens, options)[-1]
        best = row.topk(2).values
        lead = min(lead, ((best[0] - best[1]) / row.std()).item())
        tokens = torch.cat([tokens, row.argmax().view(1, 1)], dim=1)
    return tokens[0, ids.shape[1]:].tolist(), lead


def write_config(config, options, directory):
    text = json.loads(config.to_json_string(use_diff=False))
    for key in ("transformers_version", "_name_or_path", "architectures", "id2label", "label2id",
                "return_dict", "output_hidden_states", "problem_type", "chunk_size_feed_forward",
                "is_encoder_decoder", "output_attentions", "use_cache", "attention_dropout",
                "initializer_range", "_experts_implementation", *options.get("drop", [])):
        text.pop(key, None)
    text = {k: v for k, v in text.items() if v is not None or k == "q_lora_rank"}
    text["dtype"] = "bfloat16"
    text["model_type"] = options.get("as", config.model_type)
    text.update(options.get("extra", {}))
    if text["model_type"] == "qwen3_moe" and not options.get("fused"):
        text["num_experts"] = text.pop("num_local_experts")
    if "kv_lora_rank" in text:
        text.pop("head_dim", None)
    if options.get("old"):
        rope = dict(text.pop("rope_parameters"))
        text["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            text["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        kind = rope.pop("rope_type", "default")
        text["rope_scaling"] = None if kind == "default" else dict(rope, type=kind)
        text["torch_dtype"] = text.pop("dtype")
        if "num_local_experts" in text and "n_routed_experts" in text:
            text.pop("num_local_experts")
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(text, f, indent=1, sort_keys=True)
        f.write("\n")


def store(state, options, directory):
    shards = options.get("shards", 1)
    if shards == 1:
        save_file(state, os.path.join(directory, "model.safetensors"))
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: t for j, (n, t) in enumerate(sorted(state.items())) if j % shards == i}
        save_file(part, os.path.join(directory, file))
        weight_map.update({n: file for n in part})
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {}, "weight_map": weight_map}, f, indent=1)


def make(out, names):
    for number, (name, (model_type, keys, options)) in enumerate(FAMILIES.items()):
        if names and name not in names:
            continue
        model, config = build(model_type, keys, options)
        half, _ = build(model_type, keys, options)
        for seed in range(300 * number + options.get("skip", 0), 300 * number + 300):
            randomise(model, seed)
            state = {}
            for key, tensor in model.state_dict().items():
                if key == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                state[key] = tensor.detach().to(torch.bfloat16).contiguous().clone()
            # What was stored is the truth.
            model.load_state_dict({n: t.float() for n, t in state.items()}, strict=False)
            model.tie_weights()
            half.load_state_dict(model.state_dict())
            half.bfloat16()
            generator = torch.Generator().manual_seed(1000 + seed)
            ids = torch.randint(0, config.vocab_size, (1, 40), generator=generator)
            _, chosen = choices(model, ids)
            _, rounded = choices(half, ids)
            half.float()
            shaken = []
            for shake in range(3):
                with torch.no_grad():
                    noise = torch.Generator().manual_seed(shake)
                    for to, tensor in zip(half.parameters(), model.parameters()):
                        to.copy_(tensor * (1 + 0.003 * torch.randn(tensor.shape, generator=noise)))
                shaken += choices(half, ids)[1]
            if any(not torch.equal(a, b)
                   for a, b in zip(chosen * 4, rounded + shaken)):
                continue
            tokens, lead = greedy(model, ids[:, :8], 32, options)
            if lead < 2e-3 or len(set(tokens)) < 8:
                continue
            break
        else:
            raise SystemExit(f"{name}: no seed will do")
        logits = logits_of(model, ids, options).contiguous()
        std = logits.std().item()
        assert std >= 1.0, f"{name}: standard deviation {std}"
        directory = os.path.join(out, name)
        shutil.rmtree(directory, ignore_errors=True)
        os.makedirs(directory)
        if not options.get("fused"):
            state = published(state, model_type)
        store(state, options, directory)
        write_config(config, options, directory)
        logits.numpy().astype("<f4").tofile(os.path.join(directory, "logits.f32"))
        with open(os.path.join(directory, "reference.json"), "w") as f:
            json.dump({"tokens": ids[0].tolist(), "std": std, "greedy": tokens}, f)
            f.write("\n")
        print(f"{name}: seed {seed}, std {std:.2f}, {len(set(tokens))} distinct, lead {lead:.4f}",
              flush=True)


def make_long(out):
    """A yarn checkpoint and the logits after 32,768 tokens, in the same fp32."""
    name = "long_yarn"
    keys = dict(vocab_size=170, hidden_size=40, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=5, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-5,
                max_position_embeddings=32768, tie_word_embeddings=False,
                rope_parameters=dict(rope_type="yarn", factor=8.0, rope_theta=10000.0,
                                     original_max_position_embeddings=4096))
    config = AutoConfig.for_model("llama", **keys)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    randomise(model, 7)
    state = {n: t.detach().to(torch.bfloat16).contiguous().clone()
             for n, t in model.state_dict().items()}
    model.load_state_dict({n: t.float() for n, t in state.items()})
    # The test makes the same tokens: x = x * 1664525 + 1013904223 mod 2^32, (x >> 8) % vocab.
    x, tokens = 12345, []
    for _ in range(32768):
        x = (x * 1664525 + 1013904223) % 2**32
        tokens.append((x >> 8) % 170)
    cache = None
    with torch.no_grad():
        for begin in range(0, len(tokens), 1024):
            step = model(torch.tensor([tokens[begin:begin + 1024]]), past_key_values=cache,
                         use_cache=True, logits_to_keep=1)
            cache = step.past_key_values
    logits = step.logits[0, -1].float()
    directory = os.path.join(out, name)
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    save_file(state, os.path.join(directory, "model.safetensors"))
    write_config(config, {}, directory)
    logits.numpy().astype("<f4").tofile(os.path.join(directory, "logits.f32"))
    with open(os.path.join(directory, "reference.json"), "w") as f:
        json.dump({"std": logits.std().item()}, f)
        f.write("\n")
    print(f"{name}: std {logits.std().item():.2f}")
