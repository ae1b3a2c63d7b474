"""Logits of the transformers library for small models over the cross product of what a config can say.

Writes expected.json beside this file; ../oracle.rs makes the same models, opens them as a user's directory is opened, and compares. Nothing but torch and
transformers is needed, and neither is needed to run the test:

    pip install torch transformers
    python make.py

To add a family: an entry in FAMILIES, with what its configs have beside BASE and the choices that are its own.

Weights are not stored: an element depends on the name of its tensor and its place, by the formula of `value`, and is exact in bf16 and f16 too.
"""
import copy
import itertools
import json
import os

import torch
import transformers
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

transformers.logging.set_verbosity_error()

TOKENS = [(7 * i * i + 3 * i + 1) % 40 for i in range(24)]
POSITIONS = [11, 23]
BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}

# A family: fields of all its configs, and lists of choices, one of each of which a config has.
HEADS = [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 16}, {"num_attention_heads": 8, "head_dim": 6}]
WINDOWS_OF_QWEN = [
    {},
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
]
FAMILIES = {
    "llama": {
        "fields": {"architectures": ["LlamaForCausalLM"]},
        "choices": [
            HEADS + [{"num_key_value_heads": None}],
            [{}, {"attention_bias": True}, {"mlp_bias": True}, {"attention_bias": True, "mlp_bias": True}],
        ],
    },
    "mistral": {
        "fields": {"architectures": ["MistralForCausalLM"]},
        "choices": [HEADS, [{}, {"sliding_window": None}, {"sliding_window": 5}, {"sliding_window": 11}]],
    },
    "qwen2": {
        "fields": {"architectures": ["Qwen2ForCausalLM"]},
        "choices": [HEADS + [{"num_key_value_heads": None}], WINDOWS_OF_QWEN],
    },
    "qwen3": {
        "fields": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8},
        "choices": [HEADS[:4], WINDOWS_OF_QWEN, [{}, {"attention_bias": True}]],
    },
    "phi3": {
        "fields": {"architectures": ["Phi3ForCausalLM"], "pad_token_id": 0},
        "turns": 1,
        # The class allows no other kind.
        "ropes": [0, 1, 13, 14, 15, 16],
        "choices": [HEADS[:3] + [{"num_key_value_heads": None}], [{}, {"sliding_window": 5}], [{"partial_rotary_factor": 0.5}, {}]],
    },
    "smollm3": {
        "fields": {"architectures": ["SmolLM3ForCausalLM"], "pad_token_id": 0},
        "turns": 1,
        # In two kinds the library forgets the base beside them, and takes the class's, which is not that of the others.
        "ropes": [rope for rope in range(17) if rope not in (2, 6)],
        "choices": [HEADS[:3], [{}, {"no_rope_layers": [0, 1, 1]}, {"no_rope_layer_interval": 2}], [{}, {"attention_bias": True}, {"mlp_bias": True}]],
    },
    "olmo2": {
        "fields": {"architectures": ["Olmo2ForCausalLM"], "pad_token_id": 0},
        "turns": 1,
        "choices": [HEADS[:3] + [{"num_key_value_heads": None}], [{}, {"attention_bias": True}]],
    },
    "granite": {
        "fields": {"architectures": ["GraniteForCausalLM"]},
        "turns": 1,
        "choices": [
            HEADS[:3] + [{"num_key_value_heads": None}],
            [{}, {"attention_bias": True}, {"mlp_bias": True}],
            [{"attention_multiplier": 0.2}, {"residual_multiplier": 0.5, "logits_scaling": 2.0}, {"embedding_multiplier": 3.0}],
        ],
    },
}

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def longrope(dim, **more):
    factors = {"short_factor": [1.0 + 0.125 * i for i in range(dim // 2)], "long_factor": [1.5 + 0.5 * i for i in range(dim // 2)]}
    return {"rope_type": "longrope", **factors, **more}


# Rotary kinds, for heads of `dim` elements. All of them change something within 24 tokens.
ROPES = [
    lambda dim: {},
    lambda dim: {"rope_theta": 500.0},
    lambda dim: {"rope_parameters": PLAIN, "rope_scaling": {"type": "linear", "factor": 4.0}},
    lambda dim: {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 300.0}},
    # Longer than the trained positions, and not.
    lambda dim: {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 13},
    lambda dim: {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 24, "rope_theta": 700.0},
    lambda dim: {"rope_parameters": PLAIN, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    lambda dim: {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}, "max_position_embeddings": 32, "rope_theta": 200.0},
    lambda dim: {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "attention_factor": 1.5, "rope_theta": 50.0}},
    lambda dim: {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4, "beta_slow": 0.5, "mscale": 1.5, "mscale_all_dim": 0.5},
                 "original_max_position_embeddings": 16},
    lambda dim: {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "original_max_position_embeddings": 32}},
    lambda dim: {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}},
    lambda dim: {"rope_parameters": {"rope_type": "default", "rope_theta": 400.0}, "rope_scaling": {**LLAMA3, "rope_theta": 400.0},
                 "max_position_embeddings": 32},
    lambda dim: {"rope_scaling": longrope(dim), "original_max_position_embeddings": 16},
    lambda dim: {"rope_scaling": longrope(dim, original_max_position_embeddings=32)},
    lambda dim: {"rope_parameters": longrope(dim, factor=4.0, original_max_position_embeddings=20, rope_theta=900.0)},
    lambda dim: {"rope_scaling": longrope(dim, attention_factor=1.25, original_max_position_embeddings=8)},
]
# The library goes by model_type, whatever the class is.
ENDS = [
    {},
    {"tie_word_embeddings": True},
    {"hidden_act": "gelu_pytorch_tanh"},
    {"rms_norm_eps": 1e-3, "tie_word_embeddings": True},
    {"architectures": ["LLaMAForCausalLM"]},
]
STORED = [("F32", 1), ("BF16", 1), ("F16", 2), ("BF16", 3), ("F32", 2)]

# Windows that a config leaves out, which count beyond their 4096 positions: the number of tokens, and those of the last position are compared.
N_LONG = 4300
LONG = [
    ("mistral", {"num_hidden_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 2}),
]

# Frequencies that change while a sequence grows: its first ten tokens in one pass with a cache, then one after another.
N_FIRST = 10
STEPPED = [
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 13}),
    ("qwen3", {"rope_scaling": longrope(8, original_max_position_embeddings=16)}),
]

# What is refused here, and why, where the library is no reason: (family, fields, words of the refusal, reason or None where the library fails too).
REFUSED = [
    ("llama", {"rope_scaling": {"factor": 4.0}}, "rope_scaling", "the library forgets the factor without a type"),
    ("llama", {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_theta", "the library forgets the base"),
    ("llama", {"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, "rope_type", "in no family here"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor", None),
    ("llama", {"rope_scaling": {"rope_type": "su", "factor": 4.0}}, "rope_type", None),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "warp": 2}}, "warp", "unknown fields may change the arithmetic"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act", "no slot for the exact GELU"),
    ("llama", {"hidden_act": "relu"}, "hidden_act", "no slot for it"),
    ("llama", {"sliding_window": 5}, "sliding_window", "the class has none, and the library forgets it"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping", "the class has none, and the library forgets it"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "the class has none, and the library forgets it"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters", "without layer_types the library forgets it"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads", None),
    ("llama", {"rms_norm_eps": None, "max_position_embeddings": None}, "max_position_embeddings", None),
    ("mistral", {"num_key_value_heads": None}, "num_key_value_heads", None),
    ("mistral", {"attention_bias": True}, "attention_bias", "the class has none, and the library forgets it"),
    ("mistral", {"sliding_window": 5, "layer_types": ["full_attention"] * 3}, "layer_types", "the library forgets it"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding_window", None),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types", None),
    ("qwen2", {"mlp_bias": True}, "mlp_bias", "the class has none, and the library forgets it"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["chunked_attention"] * 3}, "layer_types", None),
]


def hashed(name, n):
    """The high bytes of splitmix64 over a counter that begins at the FNV-1a hash of the name."""
    mask = (1 << 64) - 1
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 & mask
    for i in range(n):
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        yield (z ^ z >> 31) >> 56


def value(name, byte):
    """An element, of seven bits."""
    if name.endswith("norm.weight"):
        return 1 + (byte // 4 - 32) / 64
    scale = 1 if "embed_tokens" in name else 0.5 if "q_proj" in name or "k_proj" in name or name.endswith("bias") else 0.25
    return (2 * (byte // 2) - 127) / 128 * scale


def model(config):
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)), attn_implementation="eager")
    built = built.float().eval()
    for name, tensor in built.named_parameters():
        values = [value(name, byte) for byte in hashed(name, tensor.numel())]
        tensor.data.copy_(torch.tensor(values, dtype=torch.float32).view(tensor.shape))
    return built


def logits(config, tokens=TOKENS):
    with torch.no_grad():
        return model(config)(torch.tensor([tokens])).logits[0]


def stepped_logits(config):
    built, cache = model(config), transformers.DynamicCache()
    pieces = [TOKENS[:N_FIRST]] + [[token] for token in TOKENS[N_FIRST:]]
    with torch.no_grad():
        rows = [built(torch.tensor([piece]), cache=cache, use_cache=True).logits[0] for piece in pieces]
    return torch.cat(rows)


def rounded(rows):
    return [[float(f"{x:.5f}") for x in row] for row in rows.tolist()]


def config_of(family, changes):
    return {**BASE, "model_type": family, **FAMILIES[family]["fields"], **changes}


def cases():
    """Every rotary kind with every family, four times or as often as it says, the other choices taken in turn so that all pairs of neighbours meet."""
    for family, (turn, rope) in itertools.product(FAMILIES, itertools.product(range(4), range(len(ROPES)))):
        if turn >= FAMILIES[family].get("turns", 4) or rope not in FAMILIES[family].get("ropes", range(len(ROPES))):
            continue
        number = turn * len(ROPES) + rope
        changes = {}
        lists = FAMILIES[family]["choices"] + [ENDS]
        for i, choices in enumerate(lists):
            changes.update(choices[(number * (i + 1) + number // len(choices) + turn) % len(choices)])
        # A field that the class does not have is not written.
        merged = config_of(family, changes)
        dim = merged.get("head_dim") or merged["hidden_size"] // merged["num_attention_heads"]
        dim = int(dim * merged.get("partial_rotary_factor", 1))
        changes.update(ROPES[rope](dim))
        dtype, shards = STORED[number % len(STORED)]
        yield family, changes, dtype, shards


def main():
    out = {"tokens": TOKENS, "positions": POSITIONS, "base": BASE, "families": {}, "cases": [], "n_long": N_LONG, "long": [], "n_first": N_FIRST, "stepped": [], "refused": []}
    for family, parts in FAMILIES.items():
        out["families"][family] = parts["fields"]
    seen = {}
    for family, changes, dtype, shards in cases():
        rows = logits(config_of(family, changes))[POSITIONS]
        assert torch.isfinite(rows).all() and rows.abs().max() > 0.5, (family, changes)
        key = tuple(round(x, 3) for x in rows[1].tolist())
        if key in seen and seen[key] != (family, json.dumps(changes)):
            print("the same logits:", family, changes, "and", *seen[key])
        seen[key] = (family, json.dumps(changes))
        out["cases"].append({"family": family, "changes": changes, "dtype": dtype, "shards": shards, "logits": rounded(rows)})
    for family, changes in LONG:
        changes["max_position_embeddings"] = 8192
        tokens = [(7 * i * i + 3 * i + 1) % 40 for i in range(N_LONG)]
        rows = logits(config_of(family, changes), tokens)[-1:]
        unlimited = logits(config_of(family, {**changes, "sliding_window": None}), tokens)[-1:]
        assert (rows - unlimited).abs().max() > 0.01, "the window counts"
        out["long"].append({"family": family, "changes": changes, "dtype": "F32", "shards": 1, "logits": rounded(rows)})
    for family, changes in STEPPED:
        config = config_of(family, changes)
        rows = stepped_logits(config)[POSITIONS]
        assert (rows - logits(config)[POSITIONS]).abs().max() > 0.01, "a pass of its own for each token is another model"
        out["stepped"].append({"family": family, "changes": changes, "dtype": "F32", "shards": 1, "logits": rounded(rows)})
    for family, changes, words, reason in REFUSED:
        try:
            logits(config_of(family, changes))
            fails = False
        except Exception:
            fails = True
        assert fails == (reason is None), (family, changes, fails)
        out["refused"].append({"family": family, "changes": changes, "words": words, "reason": reason or "the library fails too"})
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "expected.json")
    with open(path, "w") as file:
        lines = lambda items: "[\n" + ",\n".join(json.dumps(item, separators=(",", ":")) for item in items) + "\n]"
        file.write("{\n" + ",\n".join(f'"{k}": ' + (lines(v) if k in ("cases", "long", "stepped", "refused") else json.dumps(v)) for k, v in out.items()) + "\n}\n")
    print(len(out["cases"]), "models,", len(out["refused"]), "refusals, transformers", transformers.__version__)


if __name__ == "__main__":
    main()
