"""GPT-2 with learned meta-tokens (Shah et al., arXiv 2509.16278), in one file.

What differs from GPT-2 and nanoGPT:
- a meta-token: one learned token, scattered over the text, that is never a target
- meta-attention: a second attention in every block, among meta-tokens only. It runs
  on the gathered meta-tokens, so it costs next to nothing and needs no T x T mask
- rotary positions (RoPE), extended to longer windows by YaRN; learned positions, or
  none, also work
- "No Pos" and "No embed": positions or embeddings zeroed at meta-tokens

sample.py generates from it, checkpoint.py loads and saves it, train.py trains it.
Shapes: B sequences, T tokens, M meta-tokens in a sequence, C channels, nh heads of
size hs (C = nh * hs).
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """The architecture. The defaults are the paper's Meta+RoPE model (152M parameters).

    Raises ValueError for a combination that cannot be built.
    """
    block_size: int = 1024              # tokens in the window, meta-tokens included
    vocab_size: int = 50304             # text ids, the meta-token, padding to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False                  # biases in Linear and LayerNorm; GPT-2 has them
    pos: str = "rope"                   # 'rope', 'absolute' (learned) or 'none'
    rope_base: float = 10000.0
    yarn_scale: float = 1.0             # YaRN's s: window / original window; 1: plain RoPE
    original_block_size: int | None = None  # the last window without YaRN; None: block_size
    beta_fast: float = 32.0             # YaRN keeps frequencies with more turns per old window
    beta_slow: float = 1.0              # YaRN divides those with fewer turns than this by s
    meta_id: int | None = 50257         # None: a model without meta-tokens
    meta_attention: bool = True
    zero_meta_pos: bool = False         # "No Pos": meta-tokens have no position
    zero_meta_embd: bool = False        # "No embed": meta-tokens have no input embedding
    text_vocab_size: int | None = None  # ids below it may be sampled; None: those below meta_id

    def __post_init__(self):
        if self.original_block_size is None or self.yarn_scale <= 1:
            self.original_block_size = self.block_size  # with YaRN, replace() keeps it
        if self.text_vocab_size is None:
            self.text_vocab_size = self.vocab_size if self.meta_id is None else self.meta_id
        if self.pos not in ("rope", "absolute", "none"):
            raise ValueError(f"pos={self.pos}: expected rope, absolute or none")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.pos == "rope" and self.head_dim % 2:
            raise ValueError(f"pos=rope needs an even head size, but n_embd={self.n_embd} / "
                             f"n_head={self.n_head} is {self.head_dim}")
        if self.yarn_scale > 1 and self.pos != "rope":
            raise ValueError(f"yarn_scale={self.yarn_scale} needs RoPE, but pos={self.pos}")
        if self.meta_attention and self.meta_id is None:
            raise ValueError("meta_attention=True needs meta-tokens, but meta_id is None")
        if self.meta_id is None:
            return
        if not 0 < self.text_vocab_size <= self.meta_id < self.vocab_size:
            raise ValueError(f"meta_id={self.meta_id} must come after the ids of text "
                             f"(text_vocab_size={self.text_vocab_size}) and below "
                             f"vocab_size={self.vocab_size}")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head


class CausalSelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(hs) + causal mask) V, among all tokens or meta-tokens."""

    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.layer = layer                      # its place in a cache

    def forward(self, x, rope=None, cache=None):
        """x (B, T, C) -> (B, T, C). rope: cos and sin of the tokens' positions."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)                                   # (3, B, nh, T, hs)
        qk, v = qkv[:2], qkv[2]
        if rope is not None:
            qk = rotate(qk, rope)               # both at once: half as many kernels
        q, k = qk                                                          # (B, nh, T, hs) each
        mask = None                             # None: the causal mask
        if cache is not None:
            # k and v, (B, nh, S, hs), now include earlier tokens. The mask says which
            # of S each of T may see. It is None only for a prompt, where S = T.
            k, v, mask = cache.update(self.layer, k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0)              # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")                       # (B, T, 4 C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class MetaTokens:
    """Where the meta-tokens of a batch are: gathers their rows, adds updates to them.

    The paper (section 3) writes meta-attention over all T tokens:

        softmax(Q K^T / sqrt(d_k) + causal mask + P) V,
        P[i, j] = 0 if i and j are meta-tokens, else -inf

    A text token's row of P is all -inf: it sees nothing, and gets no update. Among the
    meta-tokens, in their order, the two masks together are just a causal mask. So we
    gather their rows, run ordinary causal attention on these, and add the result back.
    """

    def __init__(self, is_meta, n_meta):
        """is_meta (B, T), bool; n_meta: M, the most meta-tokens in any sequence."""
        # Positions with all meta-tokens first, and both kinds in their order
        T = is_meta.size(1)
        rank = torch.arange(T, device=is_meta.device) + T * ~is_meta       # (B, T)
        meta_first = rank.argsort(dim=1)                                   # (B, T)
        self.index = meta_first[:, :n_meta]                                # (B, M)
        self.is_real = is_meta.gather(1, self.index)                       # (B, M)
        self.rope = None                        # cos and sin; GPT.find_meta sets it

    def gather(self, x):
        """The rows of the meta-tokens: (B, T, C) -> (B, M, C).

        A sequence with fewer than M of them gets rows of text as padding, behind its
        own. Causality hides the padding from the real rows, and `add` drops it.
        """
        return x.gather(1, self.index.unsqueeze(-1).expand(-1, -1, x.size(-1)))

    def add(self, x, rows):
        """Add rows (B, M, C) to x (B, T, C) at the meta-tokens, and nowhere else."""
        rows = rows.masked_fill(~self.is_real.unsqueeze(-1), 0)
        return x.scatter_add(1, self.index.unsqueeze(-1).expand_as(rows), rows.type_as(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        if config.meta_attention:
            self.ln_meta = nn.LayerNorm(config.n_embd, bias=config.bias)
            self.meta_attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, rope, meta=None, cache=None, meta_cache=None):
        """x (B, T, C) -> (B, T, C). meta None: no meta-tokens, or no meta-attention."""
        x = x + self.attn(self.ln_1(x), rope, cache)
        if meta is not None:
            rows = meta.gather(x)                                          # (B, M, C)
            rows = self.meta_attn(self.ln_meta(rows), meta.rope, meta_cache)
            x = meta.add(x, rows)               # rows of text stay exactly as they are
        return x + self.mlp(self.ln_2(x))


# --------------------------------------------------------------------------------------
# Rotary positions

def rope_frequencies(config, device=None):
    """RoPE's angular frequencies, changed by YaRN (Peng et al. 2023, "NTK-by-parts").

    Returns (inv_freq, attention_scale): float32 (hs/2,), in radians per position, and a
    factor on cos and sin. It scales q and k alike, and so the scores by its square.
    With yarn_scale <= 1 this is plain RoPE, and the factor is 1.
    """
    d, s = config.head_dim, config.yarn_scale
    exponents = torch.arange(0, d, 2, dtype=torch.float32, device=device) / d
    inv_freq = config.rope_base ** -exponents                              # (hs/2,)
    if s <= 1:
        return inv_freq, 1.0

    def index_of(turns):
        """The (fractional) index of the frequency that makes `turns` per window.

        It solves 2 pi base^(2i / d) = original window / turns for i.
        """
        wavelength = config.original_block_size / turns
        return d * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_base))

    # The fast frequencies, up to index `low`, stay. The slow ones, from `high` on, are
    # divided by s. (The last index is d/2 - 1; the bound d - 1 is that of YaRN's code.)
    low = max(math.floor(index_of(config.beta_fast)), 0)
    high = min(math.ceil(index_of(config.beta_slow)), d - 1)
    index = torch.arange(d // 2, dtype=torch.float32, device=device)
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)             # (hs/2,)
    return inv_freq * (1 - ramp) + inv_freq / s * ramp, 0.1 * math.log(s) + 1.0


def rope_tables(config, positions):
    """cos and sin of the angles: positions (B or 1, T) -> (B or 1, 1, T, hs/2) each."""
    inv_freq, attention_scale = rope_frequencies(config, positions.device)
    angles = positions[:, None, :, None] * inv_freq                        # float32
    return angles.cos() * attention_scale, angles.sin() * attention_scale


def rotate(x, rope):
    """Rotate each pair (x[i], x[i + hs/2]) of x (..., T, hs) by its token's angle."""
    cos, sin = rope                                                        # (B or 1, 1, T, hs/2)
    x1, x2 = x.chunk(2, dim=-1)                                            # (..., T, hs/2)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)


# --------------------------------------------------------------------------------------
# The loss

LOGITS_AT_ONCE = 2**28  # 1 GiB in float32


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(x @ weight.T, targets, ignore_index=-1), a chunk at a time.

    All logits, (B T, vocab_size), would take more memory than everything else. So
    the forward pass turns each chunk of them into its loss and its gradients, then
    frees it; the backward pass only scales these gradients.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, needs_grad):
        """x (N, C), weight (vocab_size, C), targets (N,) -> mean loss in nats.

        needs_grad is an argument because grad mode is always off in here.
        """
        chunk = max(LOGITS_AT_ONCE // len(weight), 1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        loss = torch.zeros((), dtype=dtype, device=x.device)
        grad_x, grad_weight = [], None
        if needs_grad:
            grad_weight = torch.zeros_like(weight, dtype=dtype)
        for h, y in zip(x.split(chunk), targets.split(chunk)):
            is_target = (y >= 0).unsqueeze(1).to(dtype)                    # (n, 1)
            y = y.clamp(min=0).unsqueeze(1)                                # (n, 1)
            product = F.linear(h, weight)       # (n, vocab_size), bfloat16 under autocast
            logits = product.to(dtype)
            log_z = logits.logsumexp(1, keepdim=True)                      # (n, 1)
            log_p = logits.gather(1, y) - log_z                            # (n, 1)
            loss -= (log_p * is_target).sum()
            if needs_grad:
                # d loss / d logits = softmax - one_hot, and 0 where there is no target.
                # The targets' p - 1 is computed in float32 and written over their p: in
                # bfloat16, a p near 1 is 1, and would leave no gradient.
                softmax = logits.sub_(log_z).exp_().mul_(is_target).to(product.dtype)
                p_minus_1 = ((log_p.exp() - 1) * is_target).to(product.dtype)
                grad = softmax.scatter_(1, y, p_minus_1)
                grad_x.append(grad @ weight)
                grad_weight += grad.t() @ h
        n_targets = (targets >= 0).sum()
        if needs_grad:
            ctx.save_for_backward(torch.cat(grad_x), grad_weight, n_targets)
        return loss / n_targets

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight, n_targets = ctx.saved_tensors
        scale = grad_loss / n_targets
        return grad_x.to(grad_weight.dtype) * scale, grad_weight * scale, None, None


# --------------------------------------------------------------------------------------
# The model

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
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
        """All parameters except learned positions, as in nanoGPT (GPT-2: 124M)."""
        return sum(p.numel() for name, p in self.named_parameters() if "wpe" not in name)

    def flops_per_token(self, T, n_meta=0):
        """Floating-point operations per token, forward and backward, in a window of T.

        6 per parameter, 12 C T per attention layer, as in nanoGPT (PaLM, appendix B).
        Meta-attention is computed at n_meta of T tokens, and weighted by that share.
        """
        c = self.config
        meta_params = sum(p.numel() for name, p in self.named_parameters() if "meta" in name)
        flops = 6 * (self.num_params() - meta_params) + 12 * c.n_layer * c.n_embd * T
        if not c.meta_attention:
            return flops
        meta_flops = 6 * meta_params + 12 * c.n_layer * c.n_embd * n_meta
        return flops + n_meta / T * meta_flops

    def forward(self, idx, targets=None, n_meta=None):
        """Return (logits, None), or with targets (None, loss).

        idx (B, T): token ids; targets (B, T): the next ones, -1 where there is nothing
        to predict; logits (B, T, vocab_size); loss: see `loss`. n_meta: how many
        meta-tokens a sequence has at most (any more would get no meta-attention).
        Without it they are counted, which makes the host wait for the GPU.
        """
        x = self.hidden_states(idx, n_meta)                                # (B, T, C)
        if targets is None:
            return self.lm_head(x), None
        return None, self.loss(x, targets)

    def loss(self, x, targets):
        """Mean cross-entropy in nats, for hidden states x (B, T, C) and targets (B, T).

        It ignores targets of -1 and meta-tokens: no model is trained to predict a
        meta-token (paper, section 3).
        """
        if self.config.meta_id is not None:
            targets = targets.masked_fill(targets == self.config.meta_id, -1)
        return LinearCrossEntropy.apply(
            x.flatten(0, 1), self.lm_head.weight, targets.flatten(), torch.is_grad_enabled())

    def hidden_states(self, idx, n_meta=None, caches=None):
        """The last hidden states, after ln_f: idx (B, T) -> (B, T, C).

        n_meta: see `forward`. caches: a KVCache (sample.py) of attention and one of
        meta-attention; idx then holds only the tokens that they have not seen.
        Raises ValueError if there are more tokens than learned positions.
        """
        c, T = self.config, idx.size(1)
        if c.pos == "absolute" and c.block_size < T:
            raise ValueError(f"{T} tokens, but learned positions for block_size={c.block_size}")
        meta_id = -1 if c.meta_id is None else c.meta_id  # no token has the id -1
        is_meta = idx == meta_id                                           # (B, T)
        cache, meta_cache = caches or (None, None)
        if cache is None:
            positions = torch.arange(T, device=idx.device)
        else:
            # Reserve a slot for each new token, and get its position
            is_real = torch.ones_like(is_meta)  # no padding
            positions = cache.advance(is_real)                             # (T,)
        positions = positions.unsqueeze(0)                                 # (1, T)

        x = self.transformer.wte(idx)                                      # (B, T, C)
        if c.zero_meta_embd:
            x = x.masked_fill(is_meta.unsqueeze(-1), 0)
        if c.pos == "absolute":
            pos_emb = self.transformer.wpe(positions)                      # (1, T, C)
            if c.zero_meta_pos:
                pos_emb = pos_emb.masked_fill(is_meta.unsqueeze(-1), 0)    # (B, T, C)
            x = x + pos_emb
        x = F.dropout(x, c.dropout, self.training)

        rope = None
        if c.pos == "rope":
            if c.zero_meta_pos:  # at position 0, RoPE turns nothing
                positions = positions.masked_fill(is_meta, 0)              # (B, T)
            rope = rope_tables(c, positions)
        meta = self.find_meta(is_meta, positions, n_meta)
        if meta is not None and meta_cache is not None:
            meta_cache.advance(meta.is_real)    # slots for M rows; nobody sees padding
        for block in self.transformer.h:
            x = block(x, rope, meta, cache, meta_cache)
        return self.transformer.ln_f(x)

    def find_meta(self, is_meta, positions, n_meta):
        """MetaTokens of is_meta (B, T); None without any, or without meta-attention."""
        if not self.config.meta_attention:
            return None
        if n_meta is None:
            n_meta = int(is_meta.sum(1).max())
        if n_meta == 0:
            return None
        meta = MetaTokens(is_meta, n_meta)
        if self.config.pos == "rope":           # positions in the window, not 0 to M - 1
            meta_positions = positions.expand_as(is_meta).gather(1, meta.index)    # (B, M)
            meta.rope = rope_tables(self.config, meta_positions)
        return meta

    def configure_optimizer(self, learning_rate, weight_decay=0.1, betas=(0.9, 0.95)):
        """AdamW that decays matrices only."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay},
                  {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, **options):
        """The prompt idx (B, T) as it is, and its continuation.

        options: see `stream` in sample.py, which samples text and inserts meta-tokens.
        """
        from sample import stream  # imported here because sample.py imports this file
        return torch.cat([idx, *stream(self, idx, max_new_tokens, **options)], dim=1)

    def reconfigured(self, **changes):
        """A copy, on the CPU, with changed settings that leave the parameters alone.

        Such are block_size, yarn_scale, dropout, zero_meta_pos and zero_meta_embd. Only
        learned positions are cropped, to a smaller block_size. Raises ValueError if it
        is larger than they are, or if settings cannot be combined.
        """
        model, weights = GPT(replace(self.config, **changes)), self.state_dict()
        if self.config.pos == "absolute":
            n, n_wanted = self.config.block_size, model.config.block_size
            if n_wanted > n:
                raise ValueError(f"block_size={n_wanted}, but the checkpoint has learned "
                                 f"positions for {n}")
            weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:n_wanted]
        model.load_state_dict(weights)
        return model

    @torch.no_grad()
    def with_meta_tokens(self, meta_id, meta_attention=True):
        """A copy, on the CPU, with meta-tokens added to a model that has none.

        Given text alone, it gives text ids the same logits. Meta-attention's output
        starts at zero. New rows of the embedding start at the mean of the text rows.
        (At zero their logits would be 0, and a trained GPT-2's are far below 0: the new
        ids would take all the probability.)
        """
        c = self.config
        vocab_size = max(c.vocab_size, pad_vocab(meta_id + 1))
        # Without meta-tokens text_vocab_size may count padding, which starts at meta_id
        n_text = min(c.text_vocab_size, meta_id)
        model = GPT(replace(c, vocab_size=vocab_size, meta_id=meta_id, text_vocab_size=n_text,
                            meta_attention=meta_attention))
        text = self.transformer.wte.weight[:n_text]                        # (n_text, C)
        new_rows = text.mean(0).expand(vocab_size - n_text, -1)
        weights = model.state_dict() | self.state_dict()
        weights["transformer.wte.weight"] = torch.cat([text, new_rows])
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        model.load_state_dict(weights)
        if meta_attention:
            for block in model.transformer.h:
                nn.init.zeros_(block.meta_attn.c_proj.weight)
        return model


def pad_vocab(n):
    """The next multiple of 64, a size that GPUs multiply faster."""
    return math.ceil(n / 64) * 64
