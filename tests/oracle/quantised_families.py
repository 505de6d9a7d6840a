"""Tiny quantised checkpoints of mixtures of experts and of latent attention. See make_quantised.py.

Models are those of families.py with every quantised linear layer, single experts too, replaced by its
format's formula in fp32. A seed is taken only if slightly other sums (a noise of 3e-7 on every linear
layer's output, as another order of sums gives) change no logit by more than a quarter of what the
tests allow: no activation then lies on an edge between two int8 values, no router is undecided.
"""

import json
import os
import re
import shutil

import torch
from safetensors.torch import save_file
from transformers.models.llama import modeling_llama

import families

# Wide enough for groups of 16 or 32, and still not a multiple of panels or ranks.
MIXTRAL = dict(families.DENSE, hidden_size=64, intermediate_size=48, num_local_experts=5,
               num_experts_per_tok=2, num_attention_heads=6, num_key_value_heads=2)
QWEN3 = dict(families.DENSE, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
             num_experts=7, num_experts_per_tok=3, norm_topk_prob=True, num_attention_heads=8,
             num_key_value_heads=2, decoder_sparse_step=1)
V3 = dict(families.MLA, q_lora_rank=26, n_routed_experts=10, n_group=5, topk_group=2,
          num_experts_per_tok=4, n_shared_experts=1, routed_scaling_factor=2.5,
          norm_topk_prob=True, rope_parameters=families.MLA_YARN)
K2 = dict(families.MLA, hidden_size=64, moe_intermediate_size=32, q_lora_rank=26,
          n_routed_experts=7, n_group=1, topk_group=1, num_experts_per_tok=3, n_shared_experts=1,
          routed_scaling_factor=2.827, norm_topk_prob=True,
          rope_parameters=dict(families.MLA_YARN, mscale=1.0))
GLM = dict(families.MOE, head_dim=12, n_routed_experts=7, n_shared_experts=1,
           num_experts_per_tok=3, first_k_dense_replace=1, routed_scaling_factor=2.5,
           norm_topk_prob=True, n_group=1, topk_group=1, attention_bias=True, use_qk_norm=True,
           partial_rotary_factor=0.5)
LLAMA = dict(families.DENSE, hidden_size=96, intermediate_size=160, num_attention_heads=6,
             num_key_value_heads=3, head_dim=16)
SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def is_expert(layer):
    return ".experts." in layer


def not_kv_b(layer):
    return not layer.endswith("kv_b_proj")


def all_layers(layer):
    return True


def pdmix(q):
    """The tensors of W8A8_DYNAMIC and of W8A8; the formula of the former."""
    def make(name, w, bias, generator):
        tensors, module, _ = q.ms_weight("W8A8_DYNAMIC", True)(name, w, bias, generator)
        other, _, _ = q.ms_w8a8(False)(name, w, bias, generator)
        return {**other, **tensors}, module, "W8A8_MIX"
    return make


# name: (model_type, keys, options, formats, quantization_config or None, tokens).
# options: those of families.py; norm_bias: biases of norms (anti-outlier); kv: int8 KV cache, "c8" with
# scales per channel in the checkpoint, "rows" with one per token and head, found at run time.
# formats: of a layer by name, the maker of make_quantised.py or None for float.
def combinations(q):
    dynamic, static, w8a16 = q.ms_weight("W8A8_DYNAMIC", False), q.ms_w8a8(False), q.ms_weight("W8A16", False)
    only_experts = q.ct_config(q.weights_of(4, "group", True, 32), None, "pack-quantized")
    only_experts["ignore"] = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
                              r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    int8 = q.ct_config(q.weights_of(8, "channel"), q.DYNAMIC, "int-quantized")
    int8["ignore"] = ["lm_head", r"re:.*block_sparse_moe\.gate$"]
    return {
        "mixtral_ct_w8a8": ("mixtral", MIXTRAL, {"old": True}, lambda n: q.ct_int8(True), int8, 20),
        "qwen3_moe_gptq": ("qwen3_moe", QWEN3, {}, lambda n: q.gptq(4, True, "gptq"),
                           {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True,
                            "sym": False}, 40),
        "qwen3_moe_fp8": ("qwen3_moe", QWEN3, {}, lambda n: q.fp8_blocks(32),
                          {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                           "weight_block_size": [32, 32]}, 40),
        "deepseek_v3_fp8": ("deepseek_v3", V3, {"old": True, "extra": SIGMOID},
                            lambda n: q.fp8_blocks(16),
                            {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                             "weight_block_size": [16, 16]}, 40),
        "deepseek_v3_ms_w8a8": ("deepseek_v3", V3,
                                {"old": True, "extra": SIGMOID, "norm_bias": True},
                                lambda n: dynamic if is_expert(n) else
                                static if not_kv_b(n) else None, None, 12),
        "kimi_k2_ct_w4a16": ("deepseek_v3", K2, {"old": True, "as": "kimi_k2", "extra": SIGMOID},
                             lambda n: q.ct_packed(4, 32, True, False) if is_expert(n) else None,
                             only_experts, 40),
        "llama_ms_anti_outlier": ("llama", LLAMA, {"old": True, "norm_bias": True},
                                  lambda n: static if "self_attn" in n else
                                  q.ms_weight("W8A8_DYNAMIC", True), None, 16),
        "llama_ms_pdmix": ("llama", LLAMA, {"old": True}, lambda n: pdmix(q), None, 16),
        "llama_ms_c8": ("llama", LLAMA, {"old": True, "kv": "c8"}, lambda n: w8a16, None, 24),
        "llama_kv_int8": ("llama", LLAMA, {"old": True, "kv": "rows"}, lambda n: None, None, 24),
        "glm4_moe_ms_w8a16": ("glm4_moe", GLM, {"old": True}, lambda n: w8a16, None, 40),
    }


class Noisy(torch.nn.Module):
    """Adds noise of `noise` to what `inner` gives; 0 changes nothing."""
    noise = 0.0

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y = self.inner(x)
        return y * (1 + Noisy.noise * torch.randn(y.shape)) if Noisy.noise else y


class BiasedNorm(torch.nn.Module):
    def __init__(self, norm, bias):
        super().__init__()
        self.norm, self.bias = norm, bias

    def forward(self, x):
        return self.norm(x) + self.bias


attend = modeling_llama.eager_attention_forward


def attend_int8(module, query, key, value, *arguments, **named):
    """Keys and values as an int8 cache gives them back: [batch, head, token, channel]."""
    scales = getattr(module, "kv_scales", None)

    def stored(x, which):
        if scales == "rows":
            most = x.abs().amax(-1, keepdim=True)
            return torch.round(x * (127.0 / most)) * (most / 127.0)
        scale, offset = (t.reshape(1, x.shape[1], 1, x.shape[3]) for t in scales[which])
        return (torch.clamp(torch.round(x / scale) + offset, -128, 127) - offset) * scale

    if scales is not None:
        key, value = stored(key, "k"), stored(value, "v")
    return attend(module, query, key, value, *arguments, **named)


modeling_llama.eager_attention_forward = attend_int8


def cache_scales(model, kind, generator):
    """Sets the scales of every layer's cache; returns the tensors of the checkpoint."""
    state = {}
    for name, module in model.named_modules():
        if not name.endswith("self_attn"):
            continue
        if kind == "rows":
            module.kv_scales = "rows"
            continue
        width = model.config.num_key_value_heads * model.config.head_dim
        module.kv_scales = {}
        for part in "kv":
            scale = (0.02 + 0.03 * torch.rand(width, generator=generator)).bfloat16()
            offset = torch.randint(-9, 10, (width,), generator=generator).bfloat16()
            state[f"{name}.{part}_proj.kv_cache_scale"] = scale
            state[f"{name}.{part}_proj.kv_cache_offset"] = offset
            module.kv_scales[part] = (scale.float(), offset.float())
    return state


def bias_norms(model, generator):
    state = {}
    for name, module in list(model.named_modules()):
        if re.search(r"(input_layernorm|post_attention_layernorm|q_a_layernorm)$", name):
            bias = torch.randn(module.weight.shape, generator=generator) * 0.5
            state[name + ".bias"] = bias
            parent = model.get_submodule(name.rsplit(".", 1)[0])
            setattr(parent, name.rsplit(".", 1)[1], BiasedNorm(module, bias))
    return state


class Experts(torch.nn.Module):
    def __init__(self, linears, act):
        super().__init__()
        self.linears, self.act = linears, act  # [(gate, up, down)], functions of x

    def forward(self, x, index, weights):
        out = torch.zeros_like(x)
        for e, (gate, up, down) in enumerate(self.linears):
            token, place = torch.where(index == e)
            if len(token):
                y = down(self.act(gate(x[token])) * up(x[token]))
                out.index_add_(0, token, y * weights[token, place, None])
        return out


def quantise(model, model_type, formats, generator):
    """Replaces the layers; returns the tensors and the description of all of them."""
    state, description, replaced = {}, {}, {}

    def one(name, weight, bias=None):
        maker = formats(name)
        if maker is None:
            return Noisy(lambda x: torch.nn.functional.linear(x, weight, bias))
        tensors, module, kind = maker(name, weight, bias, generator)
        for suffix, tensor in tensors.items():
            state[name + suffix] = tensor.contiguous()
            description[name + suffix] = kind
        if bias is not None and name + ".bias" not in state and kind != "W8A8":
            state[name + ".bias"] = bias
        replaced[name] = True
        return Noisy(module)

    published = families.published(
        {n: t.detach() for n, t in model.state_dict().items()}, model_type)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and "experts." not in name.replace(
                "shared_experts.", ""):
            bias = None if module.bias is None else module.bias.detach().clone()
            parent = model.get_submodule(name.rsplit(".", 1)[0])
            setattr(parent, name.rsplit(".", 1)[1], one(name, module.weight.detach(), bias))
        elif name.endswith(".experts"):
            prefix = name[:-len("experts")]
            if model_type == "mixtral":
                prefix = prefix.replace("mlp.", "block_sparse_moe.")
            parts = ("w1", "w3", "w2") if model_type == "mixtral" else (
                "gate_proj", "up_proj", "down_proj")
            linears = []
            for e in range(module.gate_up_proj.shape[0]):
                names = [f"{prefix}experts.{e}.{part}" for part in parts]
                linears.append([one(n, published[n + ".weight"]) for n in names])
            parent = model.get_submodule(name.rsplit(".", 1)[0])
            setattr(parent, "experts", Experts(linears, torch.nn.functional.silu))
    for name, tensor in published.items():
        layer = name.rsplit(".", 1)[0]
        if layer not in replaced:
            state[name] = tensor.contiguous().clone()
            description.setdefault(name, "FLOAT")
    return state, description


def make(out, names, q):
    for number, (name, (model_type, keys, options, formats, config_entry, count)) in enumerate(
            combinations(q).items()):
        if names and name not in names:
            continue
        for seed in range(7000 + 300 * number, 7300 + 300 * number):
            model, config = families.build(model_type, keys, options)
            families.randomise(model, seed)
            generator = torch.Generator().manual_seed(500 + seed)
            with torch.no_grad():
                state, description = quantise(model, model_type, formats, generator)
                if options.get("norm_bias"):
                    state.update(bias_norms(model, generator))
                if options.get("kv"):
                    state.update(cache_scales(model, options["kv"], generator))
            ids = torch.randint(0, config.vocab_size, (1, count), generator=generator)
            with torch.no_grad():
                Noisy.noise = 0.0
                logits = model(ids, use_cache=False).logits[0].float().contiguous()
                std, worst = logits.std().item(), 0.0
                torch.manual_seed(seed)
                Noisy.noise = 3e-7
                for _ in range(8):
                    other = model(ids, use_cache=False).logits[0].float()
                    worst = max(worst, (other - logits).abs().max().item() / std)
                Noisy.noise = 0.0
            if worst < 2.5e-5 and std >= 1.0:
                break
        else:
            raise SystemExit(f"{name}: no seed will do")
        directory = os.path.join(out, name)
        shutil.rmtree(directory, ignore_errors=True)
        os.makedirs(directory)
        save_file(state, os.path.join(directory, "model.safetensors"))
        families.write_config(config, options, directory)
        path = os.path.join(directory, "config.json")
        with open(path) as f:
            text = json.load(f)
        text["torch_dtype" if "torch_dtype" in text else "dtype"] = "float32"
        if config_entry is not None:
            text["quantization_config"] = config_entry
        elif options.get("kv") != "rows":
            kind = "w8a16" if "w8a16" in name or "c8" in name else "w8a8_dynamic"
            text["quantize"] = kind
            with open(os.path.join(directory, f"quant_model_description_{kind}.json"), "w") as f:
                extra = {"kv_cache_type": "C8"} if options.get("kv") else {}
                json.dump(dict(description, model_quant_type=kind.upper(), **extra), f, indent=0,
                          sort_keys=True)
        with open(path, "w") as f:
            json.dump(text, f, indent=1, sort_keys=True)
            f.write("\n")
        logits.numpy().astype("<f4").tofile(os.path.join(directory, "logits.f32"))
        with open(os.path.join(directory, "reference.json"), "w") as f:
            json.dump({"tokens": ids[0].tolist(), "std": std}, f)
            f.write("\n")
        print(f"{name}: seed {seed}, std {std:.2f}, shaken {worst:.1e}", flush=True)
