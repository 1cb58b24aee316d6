"""Tiny random Hugging Face models of each family that chronomoe.attach knows."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY, WIDTH, EXPERTS, TOP_K = 64, 32, 8, 2
FAMILIES = ("olmoe", "mixtral", "qwen3", "deepseek", "gpt_oss")
SHARED: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, num_experts_per_tok=TOP_K, pad_token_id=0, bos_token_id=1,
    eos_token_id=1,
)  # fmt: skip


def build(family: str, experts: str = "grouped_mm", seed: int = 0, **changes: Any) -> Any:
    """A model in train mode whose parameters are random and all different from 0."""
    import transformers as t

    if family == "olmoe":
        kind, options = t.OlmoeConfig, dict(num_experts=EXPERTS, norm_topk_prob=False)
    elif family == "mixtral":
        kind, options = t.MixtralConfig, dict(num_local_experts=EXPERTS)
    elif family == "qwen3":
        kind = t.Qwen3MoeConfig
        options = dict(num_experts=EXPERTS, moe_intermediate_size=16, norm_topk_prob=True, head_dim=16)
    elif family == "deepseek":
        kind = t.DeepseekV3Config
        options = dict(
            n_routed_experts=EXPERTS, moe_intermediate_size=16, n_group=4, topk_group=2, n_shared_experts=1,
            first_k_dense_replace=1, num_hidden_layers=3, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=16,
        )  # fmt: skip
    else:
        kind = t.GptOssConfig
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        options = dict(
            num_local_experts=EXPERTS, head_dim=16, sliding_window=8, rope_parameters=rope,
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
    if family != "deepseek":
        options["output_router_logits"] = True
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(kind(**SHARED | options | changes), experts_implementation=experts)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.copy_(0.2 * torch.randn(EXPERTS))
    return model.train()


def tokens(batch: int = 2, length: int = 10, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
