"""What the tests of positions and of the model share: RoPE settings of every method, and a small
LLaMA."""
import math

import torch
from reference import complete

from methods import METHODS, RopeConfig
from model import LLaMA, ModelConfig

IMPLEMENTATIONS = ["naive", "tiled", "sdpa"]
VOCAB = 61


def implementations_for(rope):
    """sdpa cannot merge the bands of a distance map on a CPU."""
    return ["naive", "tiled"] if METHODS[rope.rope_type].distance_map else IMPLEMENTATIONS


# ---- RoPE ----------------------------------------------------------------------------------------

# Every method as it comes (reference.complete adds s = 4, L = 64, LongRoPE's factors), and with
# settings of its own. A new method is tested by being in METHODS.
CONFIGS = [
    *({"rope_type": name} for name in METHODS),
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "ntk", "factor": 8.0},
    {"rope_type": "dynamic", "factor": 1.0},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256},
    {"rope_type": "llama3", "low_freq_factor": 0.7, "high_freq_factor": 9.0},
    {"rope_type": "ntk_by_parts", "beta_fast": 8, "beta_slow": 0.5, "factor": 7.5},
    {"rope_type": "yarn", "truncate": False, "original_max_position_embeddings": 300},
    {"rope_type": "yarn", "ramp": "turns", "original_max_position_embeddings": 300},
    {"rope_type": "yarn", "beta_fast": 20.0, "beta_slow": 0.3, "factor": 11.0,
     "original_max_position_embeddings": 300},
    {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "mscale": 0.5},
    {"rope_type": "yarn", "attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "dynamic_yarn", "factor": 1.0, "truncate": False},
    {"rope_type": "dynamic_yarn", "ramp": "index", "beta_fast": 4, "beta_slow": 0.5},
    {"rope_type": "longrope", "attention_factor": 1.25},
    {"rope_type": "abf", "new_rope_theta": 1e6, "rope_theta": 3e4},
    {"rope_type": "dprope", "threshold": 0.3, "factor": 2.0},
    {"rope_type": "dprope", "bins": 12, "factor": 3.0, "original_max_position_embeddings": 100},
    {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    {"rope_type": "proportional", "partial_rotary_factor": 0.6},
    {"rope_type": "clex", "max_factor": 5},
    {"rope_type": "drope", "log_scale": 0.103},
    *({"rope_type": name, "partial_rotary_factor": 0.5} for name in METHODS),
    *({"rope_type": name, "resonance": True} for name in METHODS),
]


def label(value):
    """A short name of a rope dict for pytest's list."""
    if not isinstance(value, dict) or "rope_type" not in value:
        return None
    silent = {"rope_type", "original_max_position_embeddings", "low_freq_factor",
              "high_freq_factor"}
    settings = [f"{key}={setting}" for key, setting in value.items()
                if key not in silent and not isinstance(setting, list)]
    return "-".join([value["rope_type"], *settings])


def config_of(name, head_dim=16, **settings):
    """The RopeConfig of a method with s = 4, L = 64, and what it cannot do without."""
    return RopeConfig.from_dict(complete({"rope_type": name, **settings}, head_dim))


def every_rope(window, head_dim=8):
    """Every method with L = window, and what may be combined with any: {name: RopeConfig}."""
    def config(name, **settings):
        return config_of(name, head_dim, original_max_position_embeddings=window, **settings)
    return {
        **{name: config(name) for name in METHODS},
        "yarn, the paper's ramp": config("yarn", ramp="turns"),
        "dynamic by length alone": config("dynamic", factor=1.0),
        "dynamic_yarn by length alone": config("dynamic_yarn", factor=1.0),
        "half the pairs": config("proportional", partial_rotary_factor=0.5),
        "half the head": config("dynamic", partial_rotary_factor=0.5),
        "half the head, drope": config("drope", partial_rotary_factor=0.5),
        "half the head, clex": config("clex", partial_rotary_factor=0.5),
        "half the head, xpos": config("xpos", partial_rotary_factor=0.5),
        "resonance": config("yarn", resonance=True),
        "resonance, dynamic": config("dynamic", resonance=True),
        "random positions": config("linear", random_positions=100),
        "random positions, alibi": config("alibi", random_positions=100),
    }


# ---- A model -------------------------------------------------------------------------------------

ROPES = every_rope(12)
LLAMA3 = RopeConfig("llama3", 8.0, 32)
DYNAMIC = RopeConfig("dynamic", 2.0, 16)


def build(seed=0, attention="auto", **changes):
    """A small LLaMA with weights large enough that every part matters to the logits, which are
    about 1."""
    config = ModelConfig(**{"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
                            "vocab_size": VOCAB, "multiple_of": 16, "max_seq_len": 64, **changes})
    model, generator = LLaMA(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1:
                p.copy_(1 + 0.3 * noise)
            elif name == "tok_embeddings.weight" and not config.tied:
                p.copy_(noise)
            else:
                size = 0.5 if name.startswith("clex") else 1.5
                p.copy_(size * noise / math.sqrt(p.shape[1]))
    model.attention = attention
    return model


def draw_tokens(*shape, seed=0):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
