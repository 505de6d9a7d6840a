"""The experts of DeepSeek-MoE-16B (model_type "deepseek"), which `transformers` does not have.

The formula is that of modeling_deepseek.py in the repository of deepseek-ai/deepseek-moe-16b-base:
softmax over all experts, the best num_experts_per_tok of them with their probabilities (divided by
their sum if norm_topk_prob), plus shared experts that see every token. Attention, norms and the
dense layers are LLaMA's.
"""

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP


class Router(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob

    def forward(self, x):
        logits = nn.functional.linear(x, self.weight)
        weights, indices = torch.topk(logits.float().softmax(-1), self.top_k, dim=-1, sorted=False)
        if self.top_k > 1 and self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights.to(x.dtype), indices


class DeepseekMoe(nn.Module):
    def __init__(self, config):
        super().__init__()

        def mlp(intermediate):
            part = type(config)(**{**config.to_dict(), "intermediate_size": intermediate})
            return LlamaMLP(part)

        self.gate = Router(config)
        self.experts = nn.ModuleList(mlp(config.moe_intermediate_size)
                                     for _ in range(config.n_routed_experts))
        self.shared_experts = mlp(config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden):
        x = hidden.reshape(-1, hidden.shape[-1])
        _, weights, indices = self.gate(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(indices == e)
            if len(token):
                out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return (out + self.shared_experts(x)).view_as(hidden)


def with_experts(model, config):
    for i, layer in enumerate(model.model.layers):
        if i >= config.first_k_dense_replace and i % config.moe_layer_freq == 0:
            layer.mlp = DeepseekMoe(config)
    return model
