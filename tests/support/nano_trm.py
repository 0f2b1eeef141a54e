"""A checkpoint as nano-trm writes one, with random weights, and what its model answers, computed plainly."""

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 3
SETTINGS = {
    "hidden_size": 16,
    "num_heads": 2,
    "num_layers": 2,
    "H_cycles": 2,
    "L_cycles": 3,
    "N_supervision": STEPS,
    "N_supervision_val": STEPS,
    "halt_exploration_prob": 0.1,
    "ffn_expansion": 4,
    "puzzle_emb_dim": 0,
    "puzzle_emb_len": 0,
    "rope_theta": 10000,
    "pos_emb_type": "1d",
    "use_mlp_t": False,
    "use_conv_swiglu": False,
    "vocab_size": 12,
    "max_grid_size": 9,
    "seq_len": 81,
    "learning_rate": 1e-4,
}


def width(size: int, expansion: int) -> int:
    return -(round(expansion * size * 2 / 3) // -256) * 256


def checkpoint_of(seed: int, **changes) -> dict:
    """What `torch.load` of such a file gives."""
    settings = {**SETTINGS, **changes}
    generator = torch.Generator().manual_seed(seed)
    hidden, tokens = settings["hidden_size"], settings["vocab_size"]
    length = settings["seq_len"] + settings["puzzle_emb_len"]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    def gated(name: str, size: int) -> dict[str, Tensor]:
        inner = width(size, settings["ffn_expansion"])
        return {
            f"{name}.gate_up_proj.weight": draw(2 * inner, size),
            f"{name}.down_proj.weight": draw(size, inner),
        }

    state = {"input_embedding.embedding_weight": draw(tokens, hidden), "lm_head.weight": draw(tokens, hidden)}
    state |= {"q_head.weight": draw(1, hidden), "q_head.bias": draw(1)}
    for number in range(settings["num_layers"]):
        layer = f"lenet.layers.{number}"
        if settings["use_mlp_t"]:
            state |= gated(f"{layer}.mlp_t", length)
        else:
            state[f"{layer}.self_attn.qkv_proj.weight"] = draw(3 * hidden, hidden)
            state[f"{layer}.self_attn.o_proj.weight"] = draw(hidden, hidden)
        state |= gated(f"{layer}.mlp", hidden)
    averages = {name: draw(*value.shape) for name, value in state.items()}
    for name in ("z_H_init", "z_L_init"):
        state[name] = draw(1, hidden)[0] * hidden**0.5
    if settings["puzzle_emb_dim"]:
        state["puzzle_emb.weights"] = draw(1, settings["puzzle_emb_dim"])
    return {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "callbacks": {
            "EMACallback": {"shadow": averages, "decay": 0.999},
            "ModelCheckpoint{}": {"best": 1.0},
        },
        "hyper_parameters": settings,
    }


def answers_of(content: dict, inputs: Tensor, averaged: bool) -> tuple[Tensor, Tensor]:
    """Logits (B, L, tokens) and halting logits (B,) after the last step, for their tokens (B, L)."""
    settings, state = content["hyper_parameters"], dict(content["state_dict"])
    state |= content["callbacks"]["EMACallback"]["shadow"] if averaged else {}
    hidden, heads, prefix = settings["hidden_size"], settings["num_heads"], settings["puzzle_emb_len"]
    table = _rotary(inputs.shape[1] + prefix, hidden // heads) if settings["pos_emb_type"] else None

    def gated(name: str, x: Tensor) -> Tensor:
        gate, up = F.linear(x, state[f"{name}.gate_up_proj.weight"]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, state[f"{name}.down_proj.weight"])

    def attention(name: str, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = F.linear(x, state[f"{name}.qkv_proj.weight"]).view(batch, length, 3, heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(_turned(query, table), _turned(key, table), value)
        return F.linear(read.transpose(1, 2).reshape(batch, length, -1), state[f"{name}.o_proj.weight"])

    def network(x: Tensor, injection: Tensor) -> Tensor:
        x = x + injection
        for number in range(settings["num_layers"]):
            layer = f"lenet.layers.{number}"
            if settings["use_mlp_t"]:
                x = x.transpose(1, 2)
                x = _norm(x + gated(f"{layer}.mlp_t", x)).transpose(1, 2)
            else:
                x = _norm(x + attention(f"{layer}.self_attn", x))
            x = _norm(x + gated(f"{layer}.mlp", x))
        return x

    tokens = F.embedding(inputs, state["input_embedding.embedding_weight"])
    if prefix:
        row = state["puzzle_emb.weights"][0]
        row = F.pad(row, (0, prefix * hidden - len(row))).view(1, prefix, hidden)
        tokens = torch.cat((row.expand(len(inputs), -1, -1), tokens), 1)
    tokens = hidden**0.5 * tokens
    z_H, z_L = state["z_H_init"].expand_as(tokens), state["z_L_init"].expand_as(tokens)
    for _ in range(STEPS * settings["H_cycles"]):
        for _ in range(settings["L_cycles"]):
            z_L = network(z_L, z_H + tokens)
        z_H = network(z_H, z_L)
    halting = F.linear(z_H[:, 0], state["q_head.weight"], state["q_head.bias"])[:, 0]
    return F.linear(z_H, state["lm_head.weight"])[:, prefix:], halting


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def _rotary(length: int, size: int) -> tuple[Tensor, Tensor]:
    frequency = 1.0 / (10000 ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def _turned(x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
    if table is None:
        return x
    (cos, sin), (first, second) = table, x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
