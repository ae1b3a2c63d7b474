"""Makes the fixtures of this folder: `python make.py` in it, with torch and transformers 5.

A model that is there keeps its weights, and only its expected logits are computed again; others are made with random ones.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers import (
    Gemma3TextConfig,
    GraniteConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

HERE = Path(__file__).parent
SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=None,
)
NEW = {
    "gemma3": Gemma3TextConfig(
        **SIZES | dict(num_hidden_layers=3),
        head_dim=16,
        query_pre_attn_scalar=10,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
        final_logit_softcapping=4.0,
    ),
    "phi3": Phi3Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}, sliding_window=24),
    "smollm3": SmolLM3Config(**SIZES | dict(num_hidden_layers=3), no_rope_layers=[1, 0, 1], attention_bias=True, mlp_bias=True),
    "olmo2": Olmo2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "granite": GraniteConfig(
        **SIZES,
        embedding_multiplier=3.0,
        attention_multiplier=0.5,
        residual_multiplier=0.4,
        logits_scaling=2.5,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_only_layers=[0],
        norm_topk_prob=False,
    ),
    "mixtral": MixtralConfig(**SIZES | dict(intermediate_size=24), num_local_experts=4, num_experts_per_tok=2, sliding_window=20),
}
for name in ["gemma3", "phi3", "smollm3", "olmo2", "granite", "qwen3_moe", "mixtral"]:
    if (HERE / name).exists():
        continue
    config = NEW[name]
    torch.manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            noise = torch.randn_like(tensor)
            if "norm" in key:
                tensor.copy_(0.3 * noise + (0.0 if name == "gemma3" else 1.0))
            elif key.endswith("bias"):
                tensor.copy_(0.3 * noise)
            elif key.endswith("embed_tokens.weight"):
                tensor.copy_(noise * (0.2 if config.tie_word_embeddings else 1.0))
            else:
                # Routers choose clearly: what is near a tie is decided by rounding.
                tensor.copy_(noise * (3.0 if "gate.weight" in key else 1.0) / tensor.shape[-1] ** 0.5)
    model.to(torch.bfloat16).save_pretrained(HERE / name)

for dir in sorted(HERE.iterdir()):
    if not (dir / "config.json").exists() or dir.name == "reference":
        continue
    expected = dir / "expected_logits.json"
    ids = json.loads(expected.read_text())["input_ids"] if expected.exists() else [(7 * i * i + 3 * i + 5) % 96 for i in range(40)]
    model = AutoModelForCausalLM.from_pretrained(dir, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    rows = {str(i): [round(v, 6) for v in logits[i].tolist()] for i in (0, 19, 39)}
    expected.write_text(json.dumps({"input_ids": ids, "logits": rows}) + "\n")
    print(dir.name, logits.abs().max().item())
