"""Continue a prompt with a trained model.

    python sample.py                                       # from the checkpoint in out/
    python sample.py --start="def main(" --stream --show_meta
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --num_samples=3

Each token is computed once: its keys and values stay in a cache. On a GPU a step is
captured as a CUDA graph once, and then replayed.
"""
import codecs
import itertools
import math
import os
import sys

import config as settings
from machine import Machine, is_out_of_memory
from prepare import decode, get_tokenizer, inject, meta_per_block, meta_places
from train import load_saved

import numpy as np
import torch


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
           meta_rate=0.0, seed=None, use_cache=True):
    """Yield what follows the prompt idx (B, T), one token (B, 1) after the other.

    max_new_tokens counts text. Meta-tokens come on top: they are never sampled, but fed
    at random places, as in training, round(meta_rate * block_size) in each block.
    temperature 0 takes the likeliest token (see `sample`). When the window is full,
    generation goes on from its last half. use_cache=False computes the same without
    caches.

    Raises ValueError for an empty prompt, or a meta_rate without meta-tokens.
    """
    c = model.config
    if idx.size(1) == 0:
        raise ValueError("an empty prompt: give at least one token")
    if meta_rate > 0 and c.meta_id is None:
        raise ValueError(f"meta_rate={meta_rate}, but the model has no meta-tokens")
    if seed is None:
        seed = 0 if temperature == 0 else torch.randint(2**62, ()).item()
    generator = torch.Generator(idx.device).manual_seed(seed)
    n_meta = min(round(meta_rate * c.block_size), c.block_size - 1)
    schedule = itertools.islice(meta_schedule(c.block_size, n_meta, seed), idx.size(1), None)
    decoder = Decoder(model)
    if use_cache:
        size = min(idx.size(1) + max_new_tokens + n_meta, c.block_size)
        decoder = CachedDecoder(model, len(idx), size)

    window = idx
    for _ in range(max_new_tokens):
        while next(schedule):                   # whether the next position's is a meta-token
            meta_token = torch.full_like(idx[:, :1], c.meta_id)            # (B, 1)
            window = torch.cat([window, meta_token], dim=1)
            yield meta_token
        if window.size(1) > c.block_size:
            window = window[:, -max(c.block_size // 2, 1):]
            decoder.clear()
        logits = decoder.next_logits(window)                               # (B, vocab_size)
        logits = logits[:, :c.text_vocab_size].float()
        token = sample(logits, temperature, top_k, top_p, generator)       # (B, 1)
        window = torch.cat([window, token], dim=1)
        yield token


def meta_schedule(block_size, n_meta, seed):
    """Yield for each position in turn whether a meta-token is due there.

    Each block of block_size positions has n_meta, drawn anew, and none at its first.
    """
    rng = torch.Generator().manual_seed(seed)
    while True:
        places = torch.randperm(block_size - 1, generator=rng)[:n_meta] + 1
        places = set(places.tolist())
        yield from (position in places for position in range(block_size))


def sample(logits, temperature, top_k, top_p, generator):
    """Draw a token for each row of logits (B, V), float32: (B, 1).

    A temperature below 1e-5 counts as 0: divided by it, logits would overflow.
    """
    if temperature < 1e-5:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        logits = keep_top_k(logits, top_k)
    if top_p is not None and top_p < 1:
        logits = keep_top_p(logits, top_p)
    # Of p_i / Exp(1), the largest is at i with probability p_i. Unlike
    # torch.multinomial, this does not make the host wait for the GPU.
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1, keepdim=True)


def keep_top_k(logits, k):
    """logits (B, V) with -inf at all but the k likeliest tokens."""
    kth = logits.topk(min(k, logits.size(-1))).values[:, -1:]              # (B, 1)
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits, p):
    """logits (B, V) with -inf at all but the likeliest tokens that share p."""
    values, order = logits.sort(descending=True)
    probs = values.softmax(-1)
    likelier = probs.cumsum(-1) - probs         # probability of the tokens before it
    return logits.scatter(1, order, values.masked_fill(likelier >= p, -math.inf))


# --------------------------------------------------------------------------------------
# From a window of tokens to the logits of the next one

class Decoder:
    """Computes the whole window each time, as nanoGPT does."""

    def __init__(self, model):
        self.model = model

    def clear(self):
        """Forget the window: another one follows."""

    def next_logits(self, window):
        """window (B, T) -> (B, vocab_size)"""
        return self.model.lm_head(self.model.hidden_states(window)[:, -1])


class CachedDecoder:
    """Computes each token of a growing window once."""

    def __init__(self, model, batch_size, size):
        c, weight = model.config, model.lm_head.weight
        shape = (batch_size, c.n_head, size, c.head_dim)
        n_meta_layers = c.n_layer if c.meta_attention else 0
        dtype = weight.dtype
        is_autocast = torch.is_autocast_enabled(weight.device.type)
        if is_autocast:
            dtype = torch.get_autocast_dtype(weight.device.type)
        self.model = model
        # Autocast frees its copies of the weights, and a graph would go on reading them
        self.uses_graphs = weight.is_cuda and not is_autocast
        self.caches = [KVCache(n_layer, shape, dtype, weight.device, self.uses_graphs)
                       for n_layer in (c.n_layer, n_meta_layers)]
        self.seen = 0                           # tokens of the window that are cached
        self.graphs = {}                        # captured steps, by their number of tokens

    def clear(self):
        self.seen = 0
        for cache in self.caches:
            cache.clear()

    def next_logits(self, window):
        """window (B, T) -> (B, vocab_size)"""
        is_prompt = self.seen == 0
        new = window[:, self.seen:]                                        # (B, n)
        self.seen = window.size(1)
        if is_prompt:
            logits = self.compute(new, n_meta=None)
            for cache in self.caches:           # the meta-cache, too, if it is still empty
                cache.is_prompt = False
            return logits
        # A step: one token of text, and the meta-tokens after it, seldom more than one
        if self.uses_graphs and new.size(1) <= 2:
            return self.replay(new)
        return self.compute(new, n_meta=new.size(1) - 1)

    def compute(self, new, n_meta):
        x = self.model.hidden_states(new, n_meta, self.caches)             # (B, n, C)
        return self.model.lm_head(x[:, -1])                                # (B, vocab_size)

    def replay(self, new):
        """`compute` as a CUDA graph: one launch instead of hundreds.

        Use the result before the next step, which overwrites it.
        """
        n = new.size(1)
        if n not in self.graphs:
            graph, own_new = torch.cuda.CUDAGraph(), new.clone()
            with torch.cuda.device(new.device), torch.cuda.graph(graph):
                own_logits = self.compute(own_new, n_meta=n - 1)
            self.graphs[n] = graph, own_new, own_logits
        graph, own_new, own_logits = self.graphs[n]
        own_new.copy_(new)
        graph.replay()
        return own_logits


class KVCache:
    """The keys and values of one attention, in all layers: plain tensors.

    With fixed_shapes, a step attends to all slots and masks the unused ones, and never
    asks the device for its length: it has the same shapes and addresses each time, as a
    CUDA graph needs. Otherwise it reads only the used slots, which is faster on a CPU.
    """

    def __init__(self, n_layer, shape, dtype, device, fixed_shapes):
        """shape: (B, nh, size, hs)"""
        B, _, size, _ = shape
        self.k = torch.zeros(n_layer, *shape, dtype=dtype, device=device)
        self.v = torch.zeros(n_layer, *shape, dtype=dtype, device=device)
        self.is_real = torch.zeros(B, size, dtype=torch.bool, device=device)
        self.length = torch.zeros((), dtype=torch.long, device=device)
        self.fixed_shapes = fixed_shapes
        self.is_prompt = True                   # nothing is cached yet
        self.slots = self.mask = None           # of one step: set by advance, for update

    def clear(self):
        self.is_real.zero_()
        self.length.zero_()
        self.is_prompt = True

    def advance(self, is_real):
        """Make room for n more tokens. Returns their slots, (n,), from 0 on.

        is_real (B, n), bool: False for padding, which no later token may see. Only
        meta-attention has any (see MetaTokens.gather).
        """
        n, size = is_real.size(1), self.is_real.size(1)
        self.slots = self.length + torch.arange(n, device=is_real.device)  # (n,)
        self.length.add_(n)
        self.is_real.index_copy_(1, self.slots, is_real)
        self.mask = None                        # the prompt sees itself alone, causally
        if not self.is_prompt:
            S = size if self.fixed_shapes else int(self.length)
            slots = torch.arange(S, device=is_real.device)
            is_later = slots > self.slots.unsqueeze(1)                     # (n, S)
            is_hidden = is_later | ~self.is_real[:, None, None, :S]        # (B, 1, n, S)
            # Not a bool mask: each layer would turn it into this one
            self.mask = self.k.new_zeros(is_hidden.shape).masked_fill_(is_hidden, -math.inf)
        return self.slots

    def update(self, layer, k, v):
        """Store k and v, (B, nh, n, hs). Return keys, values and mask to attend by."""
        self.k[layer].index_copy_(2, self.slots, k)
        self.v[layer].index_copy_(2, self.slots, v)
        if self.mask is None:
            return k, v, None
        S = self.mask.size(-1)
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S], self.mask


# --------------------------------------------------------------------------------------
# The script

GROUPS = (settings.Sampling, "init_from", "out_dir", "block_size", "yarn_scale", "meta_rate",
          "meta_placement", "zero_meta_pos", "zero_meta_embd", "seed", "device", "dtype")


def main(argv=None):
    config = settings.load(argv, GROUPS, __doc__)
    try:
        run(config)
    except KeyboardInterrupt:
        raise SystemExit("") from None
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        raise config.error("too little memory: try a smaller --num_samples") from None


def run(config):
    machine = config.checked(Machine, config.device, config.dtype)
    model, saved, _ = load_saved(config)
    encoding = get_tokenizer(config.tokenizer)
    config.remember(saved["settings"], ("meta_rate", "meta_placement"))
    if model.config.meta_id is None and not config.typed("meta_rate"):
        config.meta_rate = 0.0
    prompt = make_prompt(config, model.config, encoding)
    n_new = (config.max_new_tokens - 1) / (1 - config.meta_rate)  # the last is not fed
    if len(prompt) + n_new > model.config.block_size:
        print(f"[longer than the window of {model.config.block_size} tokens: each time it is "
              "full, generation goes on from its last half]", file=sys.stderr)

    model.to(machine.device, machine.dtype).eval()
    for i, tokens in enumerate(draw(model, prompt, machine.device, config)):
        if i > 0:
            print("-" * 40)
        print_tokens(tokens, encoding, config.show_meta)


def draw(model, prompt, device, config):
    """Yield the tokens of each sample: the prompt's, and what follows."""
    idx = torch.tensor(prompt, device=device).unsqueeze(0)                 # (1, T)
    options = {"temperature": config.temperature, "top_k": config.top_k,
               "top_p": config.top_p, "meta_rate": config.meta_rate}
    if not config.stream:
        idx = idx.repeat(config.num_samples, 1)                            # (B, T)
        idx = model.generate(idx, config.max_new_tokens, seed=config.seed, **options)
        yield from idx.tolist()
        return
    for seed in range(config.seed, config.seed + config.num_samples):
        new = stream(model, idx, config.max_new_tokens, seed=seed, **options)
        yield itertools.chain(prompt, (token.item() for token in new))


def print_tokens(tokens, encoding, show_meta):
    """Print tokens as they come, but a character only when all its tokens are there."""
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        text = ""
        if token < encoding.eot_token:
            text = characters.decode(encoding.decode_single_token_bytes(token))
        elif show_meta:
            text = decode(encoding, [token], show_meta=True)
        print(text, end="", flush=True)
    print(characters.decode(b"", final=True))


def make_prompt(config, model_config, encoding):
    """The prompt's tokens, with meta-tokens. Raises SystemExit if they do not fit."""
    if config.meta_rate > 0 and model_config.meta_id is None:
        raise config.error(f"meta_rate={config.meta_rate}, but the model has no meta-tokens")
    text = read_start(config)
    prompt = [encoding.eot_token] if text is None else encoding.encode_ordinary(text)
    if config.meta_rate > 0:
        prompt = inject_prompt(prompt, config, model_config.meta_id).tolist()
    if model_config.pos == "absolute" and len(prompt) > model_config.block_size:
        raise config.error(f"the prompt has {len(prompt)} tokens, but the model has learned "
                           f"positions for {model_config.block_size}: shorten it")
    return prompt


def read_start(config):
    """The prompt's text; None without --start. Raises SystemExit if unreadable."""
    if not config.given("start"):
        return None
    text = config.start
    try:
        if config.start == "-":
            text = sys.stdin.read()
        elif config.start.startswith("FILE:"):
            with open(config.start.removeprefix("FILE:"), encoding="utf-8") as file:
                text = file.read()
    except UnicodeDecodeError:
        raise config.error(f"start={config.start}: not UTF-8 text") from None
    except OSError as e:
        raise config.error(f"start={config.start}: {e.strerror}") from None
    if not text:
        raise config.error(f"start={config.start}: an empty prompt; leave it out to begin a "
                           "new document")
    return text


def inject_prompt(tokens, config, meta_id):
    """A prompt with meta-tokens as in the training data."""
    n_meta = meta_per_block(config.meta_rate, config.block_size)
    n_blocks = math.ceil(len(tokens) / (config.block_size - n_meta))
    rng = np.random.default_rng(config.seed)
    places = meta_places(n_blocks, config.block_size, n_meta, rng, config.meta_placement)
    places = places.ravel()                                                # (blocks * T,)
    end = np.flatnonzero(~places)[len(tokens) - 1] + 1          # after the last token
    return inject(np.array(tokens), places[:end], meta_id)


if __name__ == "__main__":
    main()
