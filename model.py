"""GPT-2 with learned meta-tokens (Shah et al., arXiv 2509.16278), in one file.

What is notable, against GPT-2 and nanoGPT:
- a meta-token, one learned token scattered over the text, and never a target of the loss
- meta-attention: a second attention in every block, in which only meta-tokens see each other, computed on the
  gathered meta-tokens alone, so that it costs next to nothing and no T x T mask exists
- rotary positions (RoPE), and their extension to longer windows by YaRN; learned positions and none at all, too
- positions or embeddings zeroed at meta-tokens ("No Pos", "No embed")
- generation with key-value caches, in which a meta-token rides along with the text token before it

Shapes: B sequences, T tokens, M meta-tokens of a sequence (at most), C width, nh heads of size hs.
"""
import itertools
import json
import math
import os
import pickle
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """Architecture. The defaults are the paper's Meta+RoPE model (152M parameters).

    Raises ValueError for a combination that cannot be built.
    """
    block_size: int = 1024             # tokens in the window, meta-tokens included
    vocab_size: int = 50304            # rows of the embedding: the tokenizer's ids, the meta-token, padding
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False                 # in Linear and LayerNorm; GPT-2 has them
    pos: str = "rope"                  # 'rope', 'absolute' (learned, added to the embedding) or 'none'
    rope_base: float = 10000.0
    yarn_scale: float = 1.0            # YaRN's s: window / original window; 1: plain RoPE
    original_block_size: int | None = None  # the window before YaRN; None: block_size
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    meta_id: int | None = 50257        # id of the meta-token; None: a model without meta-tokens
    meta_attention: bool = True
    zero_meta_pos: bool = False        # no positional encoding at meta-tokens, in both attentions
    zero_meta_embd: bool = False       # no input embedding at meta-tokens; the tied output row stays
    text_vocab_size: int | None = None  # ids that are text, and may be sampled; None: those below meta_id, or all

    def __post_init__(self):
        if self.original_block_size is None:
            self.original_block_size = self.block_size
        if self.text_vocab_size is None:
            self.text_vocab_size = self.vocab_size if self.meta_id is None else self.meta_id
        if self.pos not in ("rope", "absolute", "none"):
            raise ValueError(f"pos={self.pos}: expected rope, absolute or none")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.pos == "rope" and self.head_dim % 2:
            raise ValueError(f"pos=rope needs an even head size, but n_embd={self.n_embd} / n_head={self.n_head} is {self.head_dim}")
        if self.yarn_scale > 1 and self.pos != "rope":
            raise ValueError(f"yarn_scale={self.yarn_scale} needs RoPE, but pos={self.pos}")
        if self.meta_attention and self.meta_id is None:
            raise ValueError("meta_attention=True needs meta-tokens, but there are none (meta_id is None)")
        if self.meta_id is not None and not 0 < self.text_vocab_size <= self.meta_id < self.vocab_size:
            raise ValueError(f"meta_id={self.meta_id}: expected an id behind those of text, text_vocab_size={self.text_vocab_size}, "
                             f"and below vocab_size={self.vocab_size}")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head


# ----------------------------------------------------------------------------------------------------------------------
# Rotary positions

def rope_frequencies(config, device=None):
    """RoPE's angular frequencies, with YaRN inside (Peng et al. 2023, section 3: NTK-by-parts).

    Returns (inv_freq, attention_scale): float32 (head_dim / 2,), in radians per position, and the float by which
    cos and sin are scaled. With yarn_scale s <= 1 that is plain RoPE and 1.0.
    """
    d, s = config.head_dim, config.yarn_scale
    inv_freq = config.rope_base ** (-torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)
    if s <= 1:
        return inv_freq, 1.0

    def index_of(turns):  # the (fractional) index of the frequency that makes so many turns in the original window
        return d * math.log(config.original_block_size / (turns * 2 * math.pi)) / (2 * math.log(config.rope_base))

    low = max(math.floor(index_of(config.beta_fast)), 0)
    high = min(math.ceil(index_of(config.beta_slow)), d - 1)
    ramp = ((torch.arange(d // 2, dtype=torch.float32, device=device) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return inv_freq * (1 - ramp) + inv_freq / s * ramp, 0.1 * math.log(s) + 1.0


@torch.library.custom_op("meta_tokens::cos_sin", mutates_args=())
def cos_sin(angles: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Their cosines and sines, scaled. An operator of its own, into which torch.compile does not look: else it would
    compute them anew, with the frequencies, for every element that is rotated, in every layer."""
    return angles.cos() * scale, angles.sin() * scale


@cos_sin.register_fake
def _(angles, scale):
    return torch.empty_like(angles), torch.empty_like(angles)


def rotate(x, rope):
    """Turns each pair (x[i], x[i + hs/2]) by its token's angle: RoPE with GPT-NeoX's half-split pairing.

    x is (B, nh, T, hs); rope is (cos, sin), each (T, hs/2) or (B, 1, T, hs/2).
    """
    cos, sin = rope
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


# ----------------------------------------------------------------------------------------------------------------------
# The two attentions, and the block

class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, rope=None, slots=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # 3 x (B, nh, T, hs)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        mask = None
        if slots is not None:
            k, v, mask = slots.fill(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


@dataclass
class MetaTokens:
    """Where the meta-tokens of a batch are: what meta-attention needs to know."""
    index: torch.Tensor    # (B, M, 1), int64: position in the sequence, ascending; padded at the end with 0
    padding: torch.Tensor  # (B, M, 1), bool: True at the end of sequences with fewer than M meta-tokens
    rope: tuple | None     # (cos, sin) at these positions, each (B, 1, M, hs/2)


class MetaAttention(CausalSelfAttention):
    """softmax(Q K^T / sqrt(d_k) + M + P) V, where P[i, j] = 0 if i and j are meta-tokens, else -inf (paper, section 3).

    Among the meta-tokens alone, in their order, M + P is the causal mask. A text token's row is all -inf: it gets
    exactly nothing. Padding stands behind every real row, so that causality hides it.
    """

    def forward(self, x, norm, meta, slots=None):
        """x + meta_attn(norm(x)), for x (B, T, C)."""
        index = meta.index.expand(-1, -1, x.size(-1))
        rows = norm(x.gather(1, index))                                  # (B, M, C)
        rows = super().forward(rows, meta.rope, slots)
        return x.scatter_add(1, index, rows.masked_fill(meta.padding, 0).type_as(x))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2's GELU
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        if config.meta_attention:
            self.ln_meta = nn.LayerNorm(config.n_embd, bias=config.bias)
            self.meta_attn = MetaAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, meta=None, slots=None, meta_slots=None):
        """x (B, T, C) -> (B, T, C). meta is None where there is no meta-token, or no meta-attention."""
        x = x + self.attn(self.ln_1(x), rope, slots)
        if meta is not None:
            x = self.meta_attn(x, self.ln_meta, meta, meta_slots)
        return x + self.mlp(self.ln_2(x))


# ----------------------------------------------------------------------------------------------------------------------
# The loss

LOGITS_AT_ONCE = 2**28  # 1 GiB in float32


class LinearCrossEntropy(torch.autograd.Function):
    """cross_entropy(x W^T, targets, ignore_index=-1), in nats, a chunk of rows at a time.

    All the logits, (B T, vocab_size), would take more memory than the rest of the model. So the logits of each chunk are turned
    into its loss and its gradients at once, and freed; backward only scales these.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, training):
        """x (N, C), weight (vocab_size, C), targets (N,): the mean over the targets that are not -1, a scalar."""
        rows, precise = max(LOGITS_AT_ONCE // len(weight), 1), torch.promote_types(x.dtype, torch.float32)
        loss, grad_x = x.new_zeros((), dtype=precise), []
        grad_weight = torch.zeros_like(weight, dtype=precise) if training else None
        for h, y in zip(x.split(rows), targets.split(rows)):
            is_target, y = (y >= 0).unsqueeze(1).to(precise), y.clamp(min=0).unsqueeze(1)
            product = F.linear(h, weight)                                            # (rows, vocab_size), as autocast says
            logits = product.to(precise)
            log_z = logits.logsumexp(1, keepdim=True)
            log_p = logits.gather(1, y) - log_z                                      # of the targets
            loss -= (log_p * is_target).sum()
            if training:  # d loss / d logits = softmax - one_hot, in the products' precision before the targets' column is put in
                at_targets = (log_p.exp() - 1) * is_target
                grad = logits.sub_(log_z).exp_().mul_(is_target).to(product.dtype).scatter_(1, y, at_targets.to(product.dtype))
                grad_x.append(grad @ weight)
                grad_weight += grad.t() @ h
        n = (targets >= 0).sum()
        if training:
            ctx.save_for_backward(torch.cat(grad_x), grad_weight, n)
        return loss / n

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight, n = ctx.saved_tensors
        return grad_x.to(grad_weight.dtype) * (grad / n), grad_weight * (grad / n), None, None


# ----------------------------------------------------------------------------------------------------------------------
# Key-value caches, for generation

@dataclass
class Slots:
    """Where n tokens go in one block's cache, and what they see there."""
    keys: torch.Tensor         # (B, nh, size, hs)
    values: torch.Tensor
    index: torch.Tensor        # (n,), int64
    mask: torch.Tensor | None  # (B, 1, n, size), added to the scores; None for a prompt, which sees itself alone, causally

    def fill(self, k, v):
        """Puts k and v, (B, nh, n, hs), there. Returns the keys and values to attend to, and the mask."""
        self.keys.index_copy_(2, self.index, k)
        self.values.index_copy_(2, self.index, v)
        return (k, v, None) if self.mask is None else (self.keys, self.values, self.mask)


class KVCache:
    """The keys and values of attention, or of meta-attention, in every block, for B sequences of up to `size` tokens.

    They are allocated once, and their length stays on the device: each step of n tokens has the same shapes and addresses,
    which CUDA graphs need. is_static tells torch.compile so.
    """

    def __init__(self, n_layer, shape, dtype, device, is_static=False):
        """shape: (B, nh, size, hs)"""
        self.kv = [[torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)] for _ in range(n_layer)]
        self.length = torch.zeros((), dtype=torch.long, device=device)
        self.padding = torch.zeros(shape[0], shape[2], dtype=torch.bool, device=device)  # slots without a token: in meta-attention's alone
        if is_static:
            for tensor in (self.length, self.padding, *sum(self.kv, [])):
                torch._dynamo.mark_static_address(tensor, guard=False)

    def clear(self):
        self.length.zero_()
        self.padding.zero_()

    def take(self, n, is_prompt, padding=None):
        """For each block the Slots of the next n tokens; padding (B, n), bool, says where a row has none."""
        index = self.length + torch.arange(n, device=self.length.device)
        self.length.add_(n)  # += would be an assignment, too, which a compiled step would have to return
        if padding is not None:
            self.padding.index_copy_(1, index, padding)
        mask = None
        if not is_prompt:
            is_visible = (torch.arange(self.padding.size(1), device=index.device) <= index[:, None]) & ~self.padding[:, None, None]
            mask = torch.zeros_like(is_visible, dtype=self.kv[0][0].dtype).masked_fill(~is_visible, -math.inf)
        return [Slots(k, v, index, mask) for k, v in self.kv]


# ----------------------------------------------------------------------------------------------------------------------
# The model

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
        })
        if config.pos == "absolute":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2 scales what enters the residual stream
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def num_params(self):
        """Parameters without the table of learned positions, as GPT-2's are counted (124M)."""
        return sum(p.numel() for name, p in self.named_parameters() if "wpe" not in name)

    def flops_per_token(self, T, n_meta=0):
        """Floating-point operations of forward and backward for one of T positions, n_meta of them meta-tokens:
        6 per parameter plus 12 C T per attention layer (PaLM, appendix B, as nanoGPT counts), and meta-attention's
        share of both at the meta-tokens alone."""
        c = self.config
        meta_params = sum(p.numel() for name, p in self.named_parameters() if "meta" in name)
        text = 6 * (self.num_params() - meta_params) + 12 * c.n_layer * c.n_embd * T
        return text + c.meta_attention * n_meta / T * (6 * meta_params + 12 * c.n_layer * c.n_embd * n_meta)

    def forward(self, idx, targets=None, n_meta=None, at=None, caches=None, is_prompt=False):
        """idx: (B, T) token ids; targets: (B, T), -1 where there is nothing to predict.
        n_meta: an upper bound on the meta-tokens of a row, as a host integer; without it they are counted, which
        waits for the device. at: (B, A), the positions to predict at, where it is not all of them; A then stands for T in targets
        and logits. caches: a KVCache of attention and one of meta-attention, to which idx is appended; is_prompt: they are empty.

        Returns (logits, None), logits (B, T, vocab_size); or, with targets, (None, loss): the mean cross-entropy in
        nats over the positions whose target is neither -1 nor the meta-token (paper, section 3).
        Raises ValueError where learned positions end before idx does.
        """
        c, T = self.config, idx.size(1)
        if c.pos == "absolute" and c.block_size < T:
            raise ValueError(f"{T} tokens, but there are learned positions for block_size={c.block_size}")
        text_cache, meta_cache = caches or (None, None)
        nowhere = [None] * c.n_layer
        slots = text_cache.take(T, is_prompt) if caches else nowhere
        positions = slots[0].index if caches else torch.arange(T, device=idx.device)
        is_meta = None if c.meta_id is None else idx == c.meta_id                    # (B, T)

        x = self.transformer.wte(idx)                                                # (B, T, C)
        if c.zero_meta_embd and is_meta is not None:
            x = x.masked_fill(is_meta.unsqueeze(-1), 0)
        if c.pos == "absolute":
            p = self.transformer.wpe(positions)                                      # (T, C)
            x = x + (p if is_meta is None or not c.zero_meta_pos else p * ~is_meta.unsqueeze(-1))
        x = F.dropout(x, c.dropout, self.training)

        rope = self._rope_tables(positions, is_meta) if c.pos == "rope" else None
        meta = self._find_meta(is_meta, n_meta, rope) if c.meta_attention else None
        meta_slots = meta_cache.take(meta.index.size(1), is_prompt, meta.padding[..., 0]) if caches and meta is not None else nowhere
        for block, *own_slots in zip(self.transformer.h, slots, meta_slots):
            x = block(x, rope, meta, *own_slots)
        x = self.transformer.ln_f(x)
        if at is not None:
            x = x.gather(1, at.unsqueeze(-1).expand(-1, -1, c.n_embd))               # (B, A, C)

        if targets is None:
            return self.lm_head(x), None
        if c.meta_id is not None:
            targets = targets.masked_fill(targets == c.meta_id, -1)
        return None, LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), torch.is_grad_enabled())

    def _rope_tables(self, positions, is_meta):
        """cos and sin, (T, hs/2); or (B, 1, T, hs/2) when meta-tokens are turned by no angle ("No Pos", section 4)."""
        inv_freq, attention_scale = rope_frequencies(self.config, positions.device)
        angles = positions.unsqueeze(-1) * inv_freq                                  # (T, hs/2), float32
        if self.config.zero_meta_pos and is_meta is not None:
            angles = angles * ~is_meta[:, None, :, None]
        return cos_sin(angles, attention_scale)

    def _find_meta(self, is_meta, n_meta, rope):
        """The positions of the meta-tokens, each row's first; None if there are none."""
        B, T = is_meta.shape
        M = int(is_meta.sum(1).max()) if n_meta is None else min(n_meta, T)
        if M == 0:
            return None
        count = is_meta.cumsum(1)                                                    # (B, T)
        slot = torch.where(is_meta, count - 1, M).clamp(max=M)                       # text goes to slot M, cut off below
        positions = torch.arange(T, device=slot.device).expand(B, T)
        index = slot.new_zeros(B, M + 1).scatter_(1, slot, positions)[:, :M]         # (B, M)
        padding = torch.arange(M, device=slot.device) >= count[:, -1:]               # (B, M)
        if rope is not None:
            rope = tuple(t.expand(B, 1, -1, -1).gather(2, index[:, None, :, None].expand(-1, 1, -1, t.size(-1))) for t in rope)
        return MetaTokens(index.unsqueeze(-1), padding.unsqueeze(-1), rope)

    def configure_optimizer(self, learning_rate, weight_decay=0.1, betas=(0.9, 0.95)):
        """AdamW that decays matrices only."""
        groups = [{"params": [p for p in self.parameters() if p.dim() >= 2], "weight_decay": weight_decay},
                  {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    # ------------------------------------------------------------------------------------------------------------------
    # Trained models

    def take_weights(self, weights, source):
        """Takes over weights from a source, which is named where they do not fit, and returns itself. Raises ValueError."""
        try:
            self.load_state_dict(weights)
        except RuntimeError as e:
            raise ValueError(f"{source} is of another architecture: {' '.join(str(e).split())[:200]}") from None
        return self

    def reconfigured(self, **changes):
        """A copy of this model with other settings that leave the parameters as they are: block_size (but for learned positions),
        yarn_scale, dropout, zero_meta_pos, zero_meta_embd. Raises ValueError where they do not fit together."""
        model = GPT(replace(self.config, **changes))
        model.load_state_dict(self.state_dict())
        return model

    @classmethod
    def from_pretrained(cls, name):
        """OpenAI's GPT-2 in Hugging Face's format. name: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder with
        config.json and pytorch_model.bin. For meta-tokens see with_meta_tokens.

        Raises ValueError, with what to do, if it cannot be had or is no GPT-2.
        """
        config_file, weights_file = (find_pretrained(name, file) for file in ("config.json", "pytorch_model.bin"))
        with open(config_file, encoding="utf-8") as file:
            hf = json.load(file)
        if hf.get("model_type") != "gpt2":
            raise ValueError(f"{name} is no GPT-2: its config.json says model_type {hf.get('model_type')}")
        model = cls(GPTConfig(block_size=hf["n_positions"], vocab_size=hf["vocab_size"], n_layer=hf["n_layer"],
                              n_head=hf["n_head"], n_embd=hf["n_embd"], bias=True, pos="absolute", meta_id=None, meta_attention=False))
        weights = {"transformer." + key.removeprefix("transformer."): value for key, value in read_torch_file(weights_file).items()}
        weights["lm_head.weight"] = weights.get("transformer.wte.weight")
        weights = {key: weights[key] for key in model.state_dict() if key in weights}  # the file holds masks, too
        for key in weights:
            if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                weights[key] = weights[key].t()  # Hugging Face's Conv1D holds (in, out)
        return model.take_weights(weights, weights_file)

    @torch.no_grad()
    def with_meta_tokens(self, meta_id, meta_attention=True):
        """A copy of this model without meta-tokens that has them, and computes the same logits for text.

        Meta-attention's output starts at zero. The rows of the embedding beyond the text's start at the mean of those:
        at zero, their logits would tower over a trained model's, which lie far below 0.
        """
        vocab_size = max(self.config.vocab_size, pad_vocab(meta_id + 1))
        text = min(self.config.text_vocab_size, meta_id)
        model = GPT(replace(self.config, vocab_size=vocab_size, meta_id=meta_id, meta_attention=meta_attention, text_vocab_size=text))
        embedding = self.transformer.wte.weight[:text]
        embedding = torch.cat([embedding, embedding.mean(0).expand(vocab_size - text, -1)])
        model.load_state_dict(model.state_dict() | self.state_dict() | {"transformer.wte.weight": embedding, "lm_head.weight": embedding})
        for block in model.transformer.h if meta_attention else ():
            nn.init.zeros_(block.meta_attn.c_proj.weight)
        return model

    # ------------------------------------------------------------------------------------------------------------------
    # Generation

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, *args, **kwargs):
        """The prompt idx (B, T) and everything fed after it, meta-tokens included: (B, T + ...). Takes what stream takes."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, *args, **kwargs)], dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, meta_rate=0.0, seed=None, use_cache=True,
               compiled=False):
        """Yields the tokens that follow the prompt idx (B, T), as (B, 1): max_new_tokens of text, and meta-tokens.

        temperature 0 is greedy. A meta-token is never sampled, but fed at places drawn beforehand for the whole batch:
        round(meta_rate * block_size) of the positions 1..block_size-1 of each block of the sequence.
        When the window is full, generation goes on from its last half, re-based to position 0. use_cache=False computes the same
        from the whole window each time. compiled=True compiles the step behind the prompt, on a GPU into a CUDA graph, which
        takes a while.
        Raises ValueError for an empty prompt, or a meta_rate for a model without meta-tokens.
        """
        c = self.config
        if idx.size(1) == 0:
            raise ValueError("an empty prompt: give at least one token")
        if meta_rate > 0 and c.meta_id is None:
            raise ValueError(f"meta_rate={meta_rate}, but the model has no meta-tokens")
        if seed is None:
            seed = int(torch.randint(2**62, ())) if temperature > 0 else 0
        generator = torch.Generator(idx.device).manual_seed(seed)
        per_block = min(round(meta_rate * c.block_size), c.block_size - 1)
        is_due = itertools.islice(self._schedule(per_block, seed), idx.size(1), None)
        caches = self._new_caches(idx, max_new_tokens + per_block, compiled) if use_cache else ()
        step = torch.compile(self, mode="reduce-overhead", dynamic=False) if compiled else self
        window, new, is_prompt = idx, idx, True  # new: what the caches have not seen
        for _ in range(max_new_tokens):
            while next(is_due):  # a meta-token is fed along with the text token before it, in one step
                token = torch.full_like(idx[:, :1], c.meta_id)
                window, new = torch.cat([window, token], 1), torch.cat([new, token], 1)
                yield token
            if window.size(1) > c.block_size:
                window = new = window[:, -(max(c.block_size // 2, 1)):]
                is_prompt = True
                for cache in caches:
                    cache.clear()
            seen = new if caches else window
            last = idx.new_full((idx.size(0), 1), seen.size(1) - 1)
            is_step = caches and not is_prompt
            run = step if is_step and seen.size(1) <= 2 else self  # two meta-tokens in a row are too rare to be compiled
            n_meta = seen.size(1) - 1 if is_step else None         # in a step all but the first
            logits = run(seen, n_meta=n_meta, at=last, caches=caches, is_prompt=is_prompt)[0][:, 0]
            is_prompt = False
            new = self._sample(logits, temperature, top_k, top_p, generator)
            window = torch.cat([window, new], 1)
            yield new

    def _new_caches(self, idx, more, is_static):
        """Empty caches with room for the window, or for idx (B, T) and so many tokens more, if that is less; static ones are all of
        one size, for which nothing has to be compiled anew."""
        c, of = self.config, idx.device.type
        dtype = torch.get_autocast_dtype(of) if torch.is_autocast_enabled(of) else self.lm_head.weight.dtype
        size = c.block_size if is_static else min(idx.size(1) + more, c.block_size)
        shape = (idx.size(0), c.n_head, size, c.head_dim)
        return [KVCache(n_layer, shape, dtype, idx.device, is_static) for n_layer in (c.n_layer, c.n_layer if c.meta_attention else 0)]

    def _schedule(self, per_block, seed):
        """For one position of the sequence after the other: is a meta-token due? At so many of each block, never its first."""
        size, rng = self.config.block_size, torch.Generator().manual_seed(seed)
        while True:
            places = set(torch.randperm(size - 1, generator=rng)[:per_block].tolist())
            yield from (position - 1 in places for position in range(size))

    def _sample(self, logits, temperature, top_k, top_p, generator):
        """Next text tokens (B, 1) from logits (B, vocab_size)."""
        logits = logits[:, :self.config.text_vocab_size].float()
        if temperature == 0:
            return logits.argmax(-1, keepdim=True)
        logits = logits / temperature
        if top_k and top_k < logits.size(-1):
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
        if top_p is not None and top_p < 1:
            values, order = logits.sort(descending=True)
            before = values.softmax(-1).cumsum(-1) - values.softmax(-1)  # probability of all that are likelier
            logits = logits.scatter(1, order, values.masked_fill(before >= top_p, -math.inf))
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)


# ----------------------------------------------------------------------------------------------------------------------
# Files

def pad_vocab(n):
    """The next multiple of 64, which matrix units like better."""
    return -(-n // 64) * 64


def read_torch_file(path):
    """Tensors and plain values from a file of torch.save; code in it is refused. Raises ValueError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint {path}") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is not a checkpoint, or holds more than weights: refused") from None
    except Exception as e:  # a damaged file raises whatever its bytes lead to
        raise ValueError(f"{path} is truncated or damaged ({str(e).split(chr(10))[0][:100] or type(e).__name__})") from None


def find_pretrained(name, file):
    """Path of a file of a pre-trained GPT-2, in the folder `name` or from the Hugging Face hub."""
    if os.path.isdir(name):
        if not os.path.isfile(path := os.path.join(name, file)):
            raise ValueError(f"{name} holds neither ckpt.pt nor Hugging Face's {file}")
        return path
    try:
        from huggingface_hub import hf_hub_download
        return hf_hub_download(name if "/" in name else f"openai-community/{name}", file)
    except Exception as e:  # the hub's own errors are many: offline, unknown, not permitted, not installed
        raise ValueError(f"cannot get {file} of '{name}' from the Hugging Face hub ({type(e).__name__}): go online, or "
                         f"put config.json and pytorch_model.bin into a folder and name that") from None
