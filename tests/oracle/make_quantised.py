#!/usr/bin/env python3
"""Makes tiny quantised checkpoints, one per number format, and their logits.

    python3 make_quantised.py OUT_DIR [NAME ...]

Needs torch, transformers and safetensors; running the tests needs none of them. The formats are
written here from their published descriptions (msModelSlim, compressed-tensors, fp8 blocks, AWQ,
GPTQ), independently of the product. The reference is the formula of each format applied in fp32: the
model of transformers with every quantised linear layer replaced by that formula.

OUT_DIR/<name>/{config.json, quant_model_description.json?, model.safetensors, reference.json,
logits.f32}, as make_reference.py.
"""

import argparse
import json
import os
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import quantised_families
from make_reference import randomise

SHAPE = dict(vocab_size=170, hidden_size=96, intermediate_size=160, num_hidden_layers=2,
             num_attention_heads=6, num_key_value_heads=3, head_dim=16,
             max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False)


class Linear(torch.nn.Module):
    """y = run(x) + bias"""

    def __init__(self, run, bias):
        super().__init__()
        self.run, self.bias = run, bias

    def forward(self, x):
        y = self.run(x)
        return y if self.bias is None else y + self.bias


def per_row(w, most):
    scale = w.abs().amax(1, keepdim=True) / most
    return torch.clamp(torch.round(w / scale), -most - 1, most), scale


def int_products(x, q, scale, x_scale, x_zero=0.0, w_zero=None, add=0.0):
    """x quantised to 8 bits, whole sums, then the scales."""
    xq = torch.clamp(torch.round(x / x_scale) + x_zero, -128, 127)
    w = q if w_zero is None else q - w_zero
    return ((xq - 0.0).double() @ w.double().T + add).float(), xq


def token_scale(x):
    s = x.abs().amax(-1, keepdim=True) / 127.0
    return torch.where(s > 0, s, torch.ones_like(s))


def pack_int32(q, bits, along):
    """Unsigned codes into int32, low bits first, along dimension 0 or 1."""
    q = q.to(torch.int64)
    if along == 0:
        return pack_int32(q.T.contiguous(), bits, 1).T.contiguous()
    per = 32 // bits
    padded = torch.zeros(q.shape[0], (q.shape[1] + per - 1) // per * per, dtype=torch.int64)
    padded[:, :q.shape[1]] = q
    words = torch.zeros(q.shape[0], padded.shape[1] // per, dtype=torch.int64)
    for i in range(per):
        words |= padded[:, i::per] << (bits * i)
    words = torch.where(words >= 2 ** 31, words - 2 ** 32, words)
    return words.to(torch.int32)


def grouped(w, group, bits, symmetric, order=None):
    """Codes [n, k] (unsigned), scale and zero [n, groups], the value. order: g_idx."""
    n, k = w.shape
    groups = k // group
    g_idx = torch.arange(k) // group if order is None else order
    most = 2 ** bits - 1
    scale, zero = torch.zeros(n, groups), torch.zeros(n, groups)
    q = torch.zeros(n, k)
    for g in range(groups):
        columns = (g_idx == g).nonzero()[:, 0]
        part = w[:, columns]
        if symmetric:
            s = part.abs().amax(1) / (most // 2)
            z = torch.full((n,), float(2 ** (bits - 1)))
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            s = (high - low) / most
            z = torch.clamp(torch.round(-low / s), 0, most)
        s = s.half().float()
        scale[:, g], zero[:, g] = s, z
        q[:, columns] = torch.clamp(torch.round(part / s[:, None] + z[:, None]), 0, most)
    value = (q - zero[:, g_idx]) * scale[:, g_idx]
    return q, scale, zero, value, g_idx


# Each: (name, weight, bias, generator) -> (tensors of the layer, module of the reference).

def ms_w8a8(packed):
    def make(name, w, bias, generator):
        q, scale = per_row(w, 127)
        scale = scale[:, 0]
        x_scale = torch.tensor([0.03 + 0.01 * torch.rand(1, generator=generator).item()])
        x_zero = torch.tensor([float(torch.randint(-20, 20, (1,), generator=generator))])
        x_scale = x_scale.bfloat16().float() if not packed else x_scale.half().float()
        deq = x_scale * scale
        quant_bias = torch.round((0 if bias is None else bias / deq) - x_zero * q.sum(1)).to(torch.int32)
        if packed:
            stored = torch.tensor([int.from_bytes(bytes(v.numpy().tobytes()), "little")
                                   for v in deq], dtype=torch.int64)
        else:
            stored = deq
        small = torch.float16 if packed else torch.bfloat16
        tensors = {".weight": q.to(torch.int8), ".input_scale": x_scale.to(small),
                   ".input_offset": x_zero.to(small), ".quant_bias": quant_bias,
                   ".deq_scale": stored}

        def run(x):
            sums, _ = int_products(x, q, scale, x_scale, x_zero, None, quant_bias.double())
            return sums * deq
        return tensors, Linear(run, None), "W8A8"
    return make


def ms_weight(kind, extra_bias):
    def make(name, w, bias, generator):
        q, scale = per_row(w, 127)
        offset = torch.zeros_like(scale)
        if kind == "W8A16":
            offset = torch.randint(-3, 4, scale.shape, generator=generator).float()
            q = torch.clamp(q + offset, -128, 127)
        if extra_bias and bias is None:
            bias = torch.randn(w.shape[0], generator=generator) * 0.3
        tensors = {".weight": q.to(torch.int8), ".weight_scale": scale, ".weight_offset": offset}
        if bias is not None:
            tensors[".bias"] = bias
        if kind == "W8A16":
            def run(x):
                return x @ ((q - offset) * scale).T
        else:
            def run(x):
                s = token_scale(x)
                sums, _ = int_products(x, q, scale, s, 0.0, offset)
                return sums * s * scale[:, 0]
        return tensors, Linear(run, bias), kind
    return make


def ct_int8(dynamic, weight_zeros=False):
    def make(name, w, bias, generator):
        q, scale = per_row(w, 127)
        scale = scale.bfloat16().float()
        tensors = {".weight": q.to(torch.int8), ".weight_scale": scale.bfloat16()}
        zero = None
        if weight_zeros:
            zero = torch.randint(-5, 6, scale.shape, generator=generator).float()
            q = torch.clamp(q + zero, -128, 127)
            tensors[".weight"] = q.to(torch.int8)
            tensors[".weight_zero_point"] = zero.to(torch.int8)
        if dynamic:
            def run(x):
                s = token_scale(x)
                sums, _ = int_products(x, q, scale, s, 0.0, zero)
                return sums * s * scale[:, 0]
        else:
            x_scale = torch.tensor([0.03]).bfloat16()
            x_zero = torch.tensor([7], dtype=torch.int8)
            tensors[".input_scale"], tensors[".input_zero_point"] = x_scale, x_zero

            def run(x):
                xq = torch.clamp(torch.round(x / x_scale.float()) + 7, -128, 127) - 7
                w2 = q if zero is None else q - zero
                return (xq.double() @ w2.double().T).float() * x_scale.float() * scale[:, 0]
        if bias is not None:
            tensors[".bias"] = bias
        return tensors, Linear(run, bias), None
    return make


def ct_packed(bits, group, symmetric, order):
    def make(name, w, bias, generator):
        n, k = w.shape
        size = group or k
        g_idx = None
        if order:
            g_idx = (torch.arange(k) // size)[torch.randperm(k, generator=generator)]
        q, scale, zero, value, g_idx = grouped(w, size, bits, symmetric, g_idx)
        tensors = {".weight_packed": pack_int32(q, bits, 1), ".weight_scale": scale.half(),
                   ".weight_shape": torch.tensor([n, k])}
        if not symmetric:
            tensors[".weight_zero_point"] = pack_int32(zero, bits, 0)
        if order:
            tensors[".weight_g_idx"] = g_idx.to(torch.int32)
        if bias is not None:
            tensors[".bias"] = bias
        return tensors, Linear(lambda x: x @ value.T, bias), None
    return make


def ct_weight_int8(name, w, bias, generator):
    q, scale = per_row(w, 127)
    tensors = {".weight": q.to(torch.int8), ".weight_scale": scale}
    return tensors, Linear(lambda x: x @ (q * scale).T, bias), None


def fp8_blocks(block):
    def make(name, w, bias, generator):
        n, k = w.shape
        rows, columns = (n + block - 1) // block, (k + block - 1) // block
        q = torch.zeros(n, k, dtype=torch.float8_e4m3fn)
        inverse = torch.zeros(rows, columns)
        value = torch.zeros(n, k)
        for r in range(rows):
            for c in range(columns):
                at = (slice(r * block, (r + 1) * block), slice(c * block, (c + 1) * block))
                s = w[at].abs().max() / 448.0
                q[at] = (w[at] / s).to(torch.float8_e4m3fn)
                inverse[r, c] = s
                value[at] = q[at].float() * s
        tensors = {".weight": q, ".weight_scale_inv": inverse}
        return tensors, Linear(lambda x: x @ value.T, bias), None
    return make


def awq(name, w, bias, generator):
    q, scale, zero, value, _ = grouped(w, 32, 4, False)
    places = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(codes):  # [m, n] -> [m, n / 8]
        mixed = codes.reshape(codes.shape[0], -1, 8)[:, :, places].reshape(codes.shape[0], -1)
        return pack_int32(mixed, 4, 1)
    tensors = {".qweight": pack(q.T.contiguous()), ".qzeros": pack(zero.T.contiguous()),
               ".scales": scale.T.contiguous().half()}
    return tensors, Linear(lambda x: x @ value.T, bias), None


def gptq(bits, order, version):
    def make(name, w, bias, generator):
        k = w.shape[1]
        g_idx = None
        if order:
            g_idx = (torch.arange(k) // 32)[torch.randperm(k, generator=generator)]
        q, scale, zero, value, g_idx = grouped(w, 32, bits, False, g_idx)
        if version == "gptq":  # stored less one; a zero point of 0 cannot be told from 2^bits
            q = torch.where(zero[:, g_idx] == 0, q, q)
            stored = (zero - 1) % (2 ** bits)
        else:
            stored = zero
        tensors = {".qweight": pack_int32(q.T.contiguous(), bits, 0),
                   ".qzeros": pack_int32(stored.T.contiguous(), bits, 1),
                   ".scales": scale.T.contiguous().half(), ".g_idx": g_idx.to(torch.int32)}
        return tensors, Linear(lambda x: x @ value.T, bias), None
    return make


def ct_config(weights, activations, form):
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
            "kv_cache_scheme": None, "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights,
                                          "input_activations": activations,
                                          "output_activations": None}}}


def weights_of(bits, strategy, symmetric=True, group=None, actorder=None):
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
            "group_size": group, "dynamic": False, "actorder": actorder}


DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}

# An activation that fp32 in another order rounds to the other int8 moves everything after it by about
# a step: the seeds of formats with int8 activations are such that none of 40 tokens does. Others are
# such that greedy tokens do not repeat themselves.
SEEDS = {"ms_w8a8_dynamic_f32": 40, "ms_w8a16_f32": 64}

# name: (maker, dtype of the float tensors, quantization_config or None, mixed, biases)
FORMATS = {
    "ms_w8a8_f32": (ms_w8a8(False), torch.float32, None, True, False),
    "ms_w8a8_packed_f16": (ms_w8a8(True), torch.float16, None, False, True),
    "ms_w8a8_dynamic_f32": (ms_weight("W8A8_DYNAMIC", True), torch.float32, None, False, False),
    "ms_w8a16_f32": (ms_weight("W8A16", False), torch.float32, None, True, True),
    "ct_w8a8_dynamic_f32": (ct_int8(True), torch.float32,
                            ct_config(weights_of(8, "channel"), DYNAMIC, "int-quantized"), False, True),
    "ct_w8a8_static_f32": (ct_int8(False, True), torch.float32,
                           ct_config(weights_of(8, "channel", False), STATIC, "int-quantized"),
                           False, False),
    "ct_w8a16_bf16": (ct_packed(8, 0, True, False), torch.bfloat16,
                      ct_config(weights_of(8, "channel"), None, "pack-quantized"), False, False),
    "ct_w8a16_int_f32": (ct_weight_int8, torch.float32,
                         ct_config(weights_of(8, "channel"), None, "int-quantized"), False, False),
    "ct_w8a16_g32_f32": (ct_packed(8, 32, False, False), torch.float32,
                         ct_config(weights_of(8, "group", False, 32), None, "pack-quantized"), False,
                         False),
    "ct_w4a16_g32_bf16": (ct_packed(4, 32, True, False), torch.bfloat16,
                          ct_config(weights_of(4, "group", True, 32), None, "pack-quantized"), False,
                          False),
    "ct_w4a16_order_f32": (ct_packed(4, 32, False, True), torch.float32,
                           ct_config(weights_of(4, "group", False, 32, "group"), None,
                                     "pack-quantized"), False, True),
    "fp8_blocks_f32": (fp8_blocks(64), torch.float32,
                       {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
                        "weight_block_size": [64, 64]}, False, False),
    "awq_f16": (awq, torch.float16, {"quant_method": "awq", "bits": 4, "group_size": 32,
                                     "version": "gemm", "zero_point": True}, False, False),
    "gptq_order_f16": (gptq(4, True, "gptq"), torch.float16,
                       {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True,
                        "sym": False}, False, False),
    "gptq8_v2_f16": (gptq(8, False, "gptq_v2"), torch.float16,
                     {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False,
                      "sym": False, "checkpoint_format": "gptq_v2"}, False, False),
}


def make(out, names):
    for seed, (name, (maker, dtype, quantization, mixed, biases)) in enumerate(FORMATS.items()):
        if names and name not in names:
            continue
        directory = os.path.join(out, name)
        seed = SEEDS.get(name, seed)
        shutil.rmtree(directory, ignore_errors=True)
        os.makedirs(directory)
        config = LlamaConfig(**SHAPE, attention_bias=biases, mlp_bias=biases)
        config._attn_implementation = "eager"
        model = LlamaForCausalLM(config).eval()
        randomise(model, seed)
        generator = torch.Generator().manual_seed(500 + seed)
        state, description = {}, {}
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.copy_(tensor.to(dtype).float())
            for layer, module in list(model.named_modules()):
                if not isinstance(module, torch.nn.Linear) or layer == "lm_head":
                    continue
                kind = "FLOAT"
                # Mixed: a float layer among quantised ones, also within q, k, v and gate, up.
                if mixed and layer.endswith(("layers.0.self_attn.k_proj", "layers.1.mlp.up_proj",
                                             "layers.1.mlp.down_proj")):
                    description[layer + ".weight"] = kind
                    continue
                bias = None if module.bias is None else module.bias.detach().clone()
                tensors, replacement, kind = maker(layer, module.weight.detach(), bias, generator)
                parent = model.get_submodule(layer.rsplit(".", 1)[0])
                setattr(parent, layer.rsplit(".", 1)[1], replacement)
                for suffix, tensor in tensors.items():
                    state[layer + suffix] = tensor.contiguous()
                    description[layer + suffix] = kind
                if bias is not None and layer + ".bias" not in state and kind != "W8A8":
                    state[layer + ".bias"] = bias.to(dtype)
            for key, tensor in model.state_dict().items():
                if ".run" not in key and key not in state and not key.endswith(".bias"):
                    state[key] = tensor.to(dtype).contiguous()
                    description.setdefault(key, "FLOAT")
            for key, tensor in model.named_parameters():
                if key.endswith(".bias"):  # of float layers
                    state[key] = tensor.to(dtype).contiguous()
            ids = torch.randint(0, config.vocab_size, (1, 40), generator=generator)
            logits = model(ids).logits[0].float().contiguous()
            tokens = ids[:, :8]
            for _ in range(32):
                best = model(tokens).logits[0, -1].argmax()
                tokens = torch.cat([tokens, best.view(1, 1)], dim=1)
        std = logits.std().item()
        assert std >= 1.0, f"{name}: standard deviation {std}"
        distinct = len(set(tokens[0, 8:].tolist()))
        save_file(state, os.path.join(directory, "model.safetensors"))
        text = json.loads(config.to_json_string(use_diff=True))
        text["torch_dtype"] = str(dtype).split(".")[-1]
        text.pop("transformers_version", None)
        text.pop("dtype", None)
        if quantization is not None:
            text["quantization_config"] = quantization
        else:
            text["quantize"] = "w8a8"
            with open(os.path.join(directory, "quant_model_description.json"), "w") as f:
                json.dump(dict(description, model_quant_type="W8A8"), f, indent=0, sort_keys=True)
        with open(os.path.join(directory, "config.json"), "w") as f:
            json.dump(text, f, indent=1, sort_keys=True)
            f.write("\n")
        logits.numpy().astype("<f4").tofile(os.path.join(directory, "logits.f32"))
        with open(os.path.join(directory, "reference.json"), "w") as f:
            json.dump({"tokens": ids[0].tolist(), "std": std}, f)
            f.write("\n")
        print(f"{name}: seed {seed}, std {std:.2f}, {distinct} distinct greedy tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("name", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make(arguments.out, arguments.name)
    quantised_families.make(arguments.out, arguments.name, sys.modules[__name__])
