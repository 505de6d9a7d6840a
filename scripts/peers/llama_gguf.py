"""A LLaMA checkpoint (safetensors, bf16) as a GGUF file without a vocabulary, for the llama.cpp peer.

  llama_gguf.py CHECKPOINT OUT --type bf16|q8_0|q4_0
"""

import argparse
import json
import pathlib

import gguf
import numpy
from safetensors import safe_open

LAYER = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm"}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name):
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return OUTER[stem] + ".weight"
    number, rest = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{LAYER[rest]}.weight"


def for_rope(rows, heads):
    """llama.cpp rotates neighbours, the checkpoint halves of a head."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("checkpoint", type=pathlib.Path)
    arguments.add_argument("out", type=pathlib.Path)
    arguments.add_argument("--type", choices=["bf16", "q8_0", "q4_0"], required=True)
    a = arguments.parse_args()
    config = json.loads((a.checkpoint / "config.json").read_text())
    kind = gguf.GGMLQuantizationType[a.type.upper()]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    part = a.out.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for path in sorted(a.checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                # numpy knows no bf16.
                values = file.get_tensor(name).float().numpy()
                if values.ndim == 1:
                    writer.add_tensor(gguf_name(name), values)
                    continue
                if ".q_proj." in name or ".k_proj." in name:
                    values = for_rope(values, heads if ".q_proj." in name
                                      else config["num_key_value_heads"])
                data = gguf.quants.quantize(numpy.ascontiguousarray(values), kind)
                writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(a.out)


if __name__ == "__main__":
    main()
