"""Look inside a trained model: do its meta-tokens sharpen attention, and cache text?

    python analyze.py config/quickstart.py --init_from=out     # all, into out/analysis/
    python analyze.py --init_from=out --what=sharpening,residual,perplexity
    python analyze.py --init_from=out --what=attention --start="def main("
    python analyze.py --init_from=out/a.pt --what=rate_distortion --compare=out/b.pt
    python analyze.py --init_from=out/a.pt --what=cache --compare=out/b.pt,out/c.pt
    python analyze.py --init_from=out/plain --what=recall --compare=out/meta

Each part prints a line and writes <part>.json and <part>.png: to out/analysis/ for the
checkpoint out, to out/analysis/best/ for out/best.pt, or to <out_dir>/analysis/ if
--out_dir= is typed. The text is the validation split of the checkpoint's data, or of
--dataset=. Of a model that eval_synthetic.py tuned, sharpening and residual read
validation prompts of its task, and look at its marks in place of meta-tokens.
Everything is computed in float32.

Shapes: B sequences, T tokens, M meta-tokens, L layers, C width, nh heads of size hs.
"""
import math
import os
import shlex
import sys
from concurrent.futures import BrokenExecutor
from dataclasses import asdict

import config as settings
import checkpoint as checkpoints
import eval_synthetic
import prepare
import sample
import train
from machine import is_out_of_memory, pick_device
from model import rotate
from rate_distortion import batches_of, inputs_of, joined, label_of, rate_distortion
from recall import cache, recall, text_losses, text_of

import numpy as np
import torch
from matplotlib import colormaps, rcParams
from matplotlib.figure import Figure
from torch.nn import functional as F
from tqdm import tqdm

NUMBERS = 1 << 24                    # attention scores held at once: 64 MB
MAX_SHOWN = 128                      # tokens of a map that one can still read
COLORS = {"meta": "C3", "text": "C0"}


# --------------------------------------------------------------------------------------
# What the fast path computes, seen by hooks that leave it as it is

def attention_inputs(model, idx, name, zeroed=None):
    """[(attention, x, rope)] by layer. name: "attn", or "meta_attn" of gathered x."""
    modules = [getattr(block, name) for block in model.transformer.h]
    return [inputs[:3] for inputs in inputs_of(model, idx, modules, zeroed)]


def residual_stream(model, idx):
    """The residual stream before the first block and after each: (L + 1, B, T, C)."""
    modules = [*model.transformer.h, model.transformer.ln_f]
    return torch.stack([x for _, x, *_ in inputs_of(model, idx, modules)])


@torch.no_grad()
def attention_rows(attn, x, rope):
    """Logits of an attention over x (B, T, C) from its weights, some queries at a time.

    Yields (rows, logits): a slice of n queries, and (B, nh, n, rows.stop) before the
    softmax, -inf at later keys. So a long context never takes a T x T matrix.
    """
    B, T, C = x.shape
    q, k, _ = attn.c_attn(x).split(C, dim=2)
    q = q.view(B, T, attn.n_head, -1).transpose(1, 2)                      # (B, nh, T, hs)
    k = k.view(B, T, attn.n_head, -1).transpose(1, 2)                      # (B, nh, T, hs)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    n = max(NUMBERS // (B * attn.n_head * T), 1)
    for start in range(0, T, n):
        stop = min(start + n, T)
        logits = q[:, :, start:stop] @ k[:, :, :stop].transpose(-1, -2) / math.sqrt(q.size(-1))
        is_later = torch.ones_like(logits[0, 0], dtype=torch.bool).triu(start + 1)
        yield slice(start, stop), logits.masked_fill(is_later, -math.inf)


# --------------------------------------------------------------------------------------
# Statistics. A part's findings hold arrays, which become lists in its .json

def estimate(values):
    """The mean over the first axis and its 95% interval (normal). NaNs are left out."""
    values = np.asarray(values, dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        n = np.isfinite(values).sum(0)
        mean = np.nansum(values, 0) / n
        half = 1.96 * np.sqrt(np.nansum((values - mean)**2, 0) / (n - 1) / n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def for_json(value):
    """Findings with lists for arrays, and None for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: for_json(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(own) for own in value]
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    if value.dtype.kind != "f":
        return value.tolist()
    rounded = np.round(value.astype(float), 6)
    return np.where(np.isfinite(value), rounded, None).tolist()


# --------------------------------------------------------------------------------------
# 1. Sharpening (paper, section 4.4): do meta-tokens raise a query's largest logit, and
# lower the entropy of its attention? Control: as many text tokens

KINDS = {"meta": "meta-tokens zeroed", "text": "as many text tokens zeroed"}
CHANGES = {"boost": "largest logit, over all keys: with minus without",
           "boost_keys": "largest logit, over the zeroed keys: with minus without",
           "drop": "entropy of attention: without minus with"}


def entropy(logits):
    """H = -sum a log a in nats, of attention a = softmax(logits): (..., T) -> (...)."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def meets_condition(logits):
    """Where a key's attention a_j exceeds exp(-H): (..., T), bool.

    Theorem 4.1 needs this but does not say so. If only the logit of key j rises,
    dH/dlogit = -a_j (log a_j + H), so the entropy falls exactly where this holds.
    """
    return logits.softmax(-1) > (-entropy(logits)).exp().unsqueeze(-1)


def row_statistics(attn, x, rope, keys):
    """Of each query, (4, B, nh, T): its largest logit, the largest at the keys, its
    entropy, and how many of the keys meet the condition. keys: bool (B, T).
    """
    found = []
    for rows, logits in attention_rows(attn, x, rope):
        is_key = keys[:, None, None, :rows.stop]                           # (B, 1, 1, keys)
        at_keys = logits.masked_fill(~is_key, -math.inf)
        n_met = (meets_condition(logits) & is_key).sum(-1).type_as(logits)
        found.append(torch.stack([logits.amax(-1), at_keys.amax(-1), entropy(logits), n_met]))
    return torch.cat(found, -1)


def sharpen(model, idx, keys, queries):
    """Compare attention with the embeddings of some keys, and with them zeroed.

    keys, queries: bool (B, T). Returns CHANGES, each (B, L, nh, T), NaN except at
    queries; and "share" (B, L, nh), the share of pairs of a query and an earlier key
    that meet the theorem's condition before the key's logit is raised.
    """
    states = []
    for zeroed in (None, keys):
        layers = [row_statistics(*inputs, keys)
                  for inputs in attention_inputs(model, idx, "attn", zeroed)]
        states.append(torch.stack(layers, 2))                              # (4, B, L, nh, T)
    with_keys, without = states
    queries = queries[:, None, None]                                       # (B, 1, 1, T)
    change = (with_keys - without).masked_fill(~queries, math.nan).cpu()
    n_met = (without[3] * queries).sum(-1)                                 # (B, L, nh)
    n_pairs = (keys.cumsum(-1)[:, None, None] * queries).sum(-1)           # (B, 1, 1)
    return {"boost": change[0], "boost_keys": change[1], "drop": -change[2],
            "share": (n_met / n_pairs).cpu()}


def random_text(is_meta, is_text, generator):
    """As many text tokens as a row of is_meta (B, T) has meta-tokens; not the first."""
    order = torch.rand(is_meta.shape, generator=generator).to(is_meta.device)
    order = order.masked_fill(~is_text, 2)
    order[:, 0] = 2
    return (order.argsort(-1).argsort(-1) < is_meta.sum(-1, keepdim=True)) & is_text


def by_head(values):
    """Estimates from (blocks, L, nh): of the mean, and of each head."""
    return {**estimate(values.mean((1, 2))), "per_layer_and_head": estimate(values)}


def measure_sharpening(subject):
    """The findings: {kind: {change: estimates, median and histogram}}."""
    generator = torch.Generator().manual_seed(subject.config.seed)
    batches = {kind: [] for kind in KINDS}
    for idx, is_text in subject.batches("sharpening"):
        is_meta = idx == subject.mark
        zeroed = {"meta": is_meta, "text": random_text(is_meta, is_text, generator)}
        queries = is_text & ~zeroed["text"]
        for keys in zeroed.values():
            queries &= keys.cumsum(-1) > 0  # after the first of both kinds
        for kind, keys in zeroed.items():
            batches[kind].append(sharpen(subject.model, idx, keys, queries))

    values = {kind: joined(own) for kind, own in batches.items()}      # (blocks, L, nh, T)
    is_value = values["meta"]["drop"].isfinite()
    findings = {"blocks": len(is_value), "values": int(is_value.sum()), "read": subject.read}
    for kind, title in KINDS.items():
        findings[title] = {"share": by_head(values[kind]["share"].double().numpy())}
    for name in CHANGES:
        both = np.stack([values[kind][name][is_value] for kind in KINDS])  # (kinds, values)
        edges = np.linspace(*np.quantile(both, (0.005, 0.995)), 61)
        for kind, own in zip(KINDS, both):
            means = values[kind][name].double().nanmean(-1).numpy()        # (blocks, L, nh)
            percent = 100 * np.histogram(own, edges)[0] / len(own)
            findings[KINDS[kind]][name] = {**by_head(means), "edges": edges, "percent": percent}
    return findings


def draw_sharpening(findings):
    """Above: how values change, beside the control. Below: the mean of each head."""
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    figure.suptitle("Causal attention of text queries, with some input embeddings and without; "
                    f"{findings['blocks']} {findings['read']}, {findings['values']:,} values")
    for (name, title), (above, below) in zip(CHANGES.items(), figure.subplots(2, 3).T):
        for kind, label in KINDS.items():
            own = findings[label][name]
            above.stairs(own["percent"], own["edges"], fill=True, alpha=0.5, color=COLORS[kind],
                         label=f"{label}: mean {text_of(own)}")
            above.axvline(own["mean"], color=COLORS[kind], linestyle="--")
        above.set(title=title, xlabel="nats", ylabel="share of (query, layer, head) (%)")
        above.set_ylim(0, 1.3 * above.get_ylim()[1])  # room for the legend
        above.legend(fontsize="x-small", loc="upper right")
        heads = findings[KINDS["meta"]][name]["per_layer_and_head"]["mean"]  # (L, nh)
        heat_map(below, heads, "nats")
        below.set(title="its mean by layer and head, meta-tokens zeroed", xlabel="head",
                  ylabel="layer")
        below.set_xticks(range(heads.shape[1]), labels=range(1, heads.shape[1] + 1))
        below.set_yticks(range(heads.shape[0]), labels=range(1, heads.shape[0] + 1))
    return figure


def sharpening(subject):
    findings = measure_sharpening(subject)
    meta, text = (findings[title] for title in KINDS.values())
    return findings, draw_sharpening(findings), (
        f"logit boost {text_of(meta['boost'])} (control {text_of(text['boost'])}), entropy drop "
        f"{text_of(meta['drop'])} (control {text_of(text['drop'])}) nats; a_j > exp(-H) in "
        f"{100 * meta['share']['mean']:.1f}% of (query, meta key) pairs")


# --------------------------------------------------------------------------------------
# 2. Implicit caching (paper, section 5): does the residual stream at a meta-token
# resemble that of the text before it? Control: the text token before the meta-token

SIMILARITIES = {"meta": "meta-token, with earlier text",
                "text": "control: the text token before it, with earlier text"}


def similarity_by_distance(x, queries, keys, edges):
    """Mean cosine similarity in x (B, T, C) of queries with earlier keys, bool (B, T).

    edges: n + 1 ascending distances; bin i holds edges[i] <= distance < edges[i + 1].
    Returns (B, n), NaN where there is no pair.
    """
    rows, edges = [], torch.as_tensor(edges, device=x.device)
    for row, q, k in zip(F.normalize(x, dim=-1), queries, keys):
        q, k = q.nonzero().flatten(), k.nonzero().flatten()
        similarity = row[q] @ row[k].T                                     # (n_q, n_k)
        bins = torch.bucketize(q[:, None] - k, edges, right=True).flatten()  # 0: too near
        sums = torch.bincount(bins, similarity.flatten(), minlength=len(edges) + 1)
        counts = torch.bincount(bins, minlength=len(edges) + 1)
        rows.append((sums / counts)[1:len(edges)])
    return torch.stack(rows)


def measure_residual(subject):
    """The findings: curves (L + 1, distances) of SIMILARITIES, the embedding first."""
    n_edges = 2 * int(math.log2(subject.length)) + 1
    edges = sorted({round(2 ** (i / 2)) for i in range(n_edges)})
    batches = []
    for idx, is_text in subject.batches("residual"):
        is_meta = idx == subject.mark
        is_before = F.pad(is_meta[:, 1:], (0, 1)) & is_text  # text that a meta-token follows
        stream, curves = residual_stream(subject.model, idx), {}
        for kind, queries in (("meta", is_meta), ("text", is_before)):
            layers = [similarity_by_distance(x, queries, is_text, edges) for x in stream]
            curves[kind] = torch.stack(layers, 1).cpu()                    # (B, L + 1, n)
        batches.append(curves)
    curves = joined(batches)
    return {"blocks": len(curves["meta"]), "read": subject.read, "edges": edges,
            "curves": {title: estimate(curves[kind]) for kind, title in SIMILARITIES.items()}}


def draw_residual(findings):
    """Similarity over distance: of meta-tokens, and of the control."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(f"Residual stream in {findings['blocks']} {findings['read']}; "
                    "95% intervals over them")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (title, curve) in zip(axes, findings["curves"].items()):
        n_layer = len(curve["mean"]) - 1
        for layer in np.unique(np.linspace(0, n_layer, 5).astype(int)):  # five lines at most
            color = colormaps["viridis"](0.9 * layer / n_layer)
            label = f"after block {layer}" if layer else "embedding"
            ax.plot(findings["edges"][:-1], curve["mean"][layer], color=color, label=label)
            ax.fill_between(findings["edges"][:-1], curve["low"][layer], curve["high"][layer],
                            color=color, alpha=0.2, linewidth=0)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.set(title=title, xlabel="distance (tokens)", ylabel="mean cosine similarity")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return figure


def residual(subject):
    findings = measure_residual(subject)
    distances = findings["edges"][:-1]
    far = np.searchsorted(distances, subject.length // 4)
    meta, text = (f"{text_of(curve, -1, 0)} and {text_of(curve, -1, far)}"
                  for curve in findings["curves"].values())
    return findings, draw_residual(findings), (
        f"cosine similarity with the text 1 and {distances[far]} tokens back, after the last "
        f"block: of a meta-token {meta}, of the text token before it {text}")


# --------------------------------------------------------------------------------------
# 3. Attention of one prompt: how much of it do meta-tokens get?

def read_prompt(subject):
    """Ids (T,) of --start= with meta-tokens, or of the first validation block."""
    config, meta_id = subject.config, subject.model.config.meta_id
    room = min(MAX_SHOWN, subject.model.config.block_size)
    start = sample.read_start(config)
    if start is None:
        tokens = subject.blocks.batch([0])[0][0, :room // 2].numpy()
    else:
        tokens = subject.encoding.encode_ordinary(start)
        tokens = sample.inject_prompt(tokens, config, meta_id).astype(np.int64)
    if len(tokens) > room:
        raise config.error(f"the prompt has {len(tokens)} tokens, but a map has room for {room}: "
                           "give a shorter --start=")
    if meta_id not in tokens[:-1]:
        raise config.error(
            f"the prompt of {len(tokens)} tokens has no meta-token inside, at "
            f"meta_rate={config.meta_rate}: give a longer --start= or another --seed=")
    return tokens


def attention_maps(model, idx, name):
    """Attention of one sequence (1, T): (L, nh, T, T), of "meta_attn" (L, nh, M, M)."""
    layers = []
    for attn, x, rope in attention_inputs(model, idx, name):
        rows = []
        for _, logits in attention_rows(attn, x, rope):
            rows.append(F.pad(logits[0].softmax(-1), (0, x.size(1) - logits.size(-1))))
        layers.append(torch.cat(rows, 1).cpu().numpy())
    return np.stack(layers)


def measure_attention(subject, tokens):
    """(findings, maps): means over heads, "causal" (L, T, T) and "meta" (L, M, M)."""
    model, is_meta = subject.model, tokens == subject.model.config.meta_id
    idx = torch.from_numpy(tokens)[None].to(subject.device)                # (1, T)
    causal = attention_maps(model, idx, "attn")
    maps = {"causal": causal.mean(1)}
    if model.config.meta_attention:
        maps["meta"] = attention_maps(model, idx, "meta_attn").mean(1)     # (L, M, M)
    on_meta = causal[..., is_meta].sum(-1)                                 # (L, nh, T)
    uniform = is_meta.cumsum() / np.arange(1, len(tokens) + 1)  # if all keys got the same
    is_behind = np.arange(len(tokens)) > is_meta.argmax()
    shares = {}
    for kind, rows in (("text", is_behind & ~is_meta), ("meta", is_behind & is_meta)):
        if rows.any():
            shares[f"of {kind} queries"] = {
                "queries": int(rows.sum()), "if_uniform": uniform[rows].mean(),
                "per_layer_and_head": on_meta[:, :, rows].mean(-1)}
    names = names_of(subject.encoding, tokens.tolist())
    return {"tokens": names, "attention_on_meta_tokens": shares}, maps


def draw_attention(findings, maps):
    """Maps of the last layer, and the attention on meta-tokens by layer."""
    names = findings["tokens"]
    size = max(0.11 * len(names), 5)
    figure = Figure(figsize=((len(maps) + 1) * size, 0.9 * size), layout="constrained")
    figure.suptitle(f"One prompt of {len(names)} tokens; meta-tokens are red squares")
    *axes, right = figure.subplots(1, len(maps) + 1)
    places = [str(i) for i, name in enumerate(names) if name == prepare.META]
    ticks = {"causal": names, "meta": places}
    for ax, (kind, layers) in zip(axes, maps.items()):
        shown = layers[-1].copy()
        shown[np.triu_indices(len(shown), 1)] = np.nan
        heat_map(ax, shown, "attention", (0, np.nanquantile(shown, 0.98)), "magma_r")
        token_axis(ax.xaxis, ticks[kind])
        token_axis(ax.yaxis, ticks[kind])
        ax.set(title=f"{kind} attention, last layer, mean over heads", xlabel="key",
               ylabel="query")
    layers = range(1, len(maps["causal"]) + 1)
    for (which, own), color in zip(findings["attention_on_meta_tokens"].items(), ("C0", "C3")):
        heads = own["per_layer_and_head"]                                  # (L, nh)
        right.plot(layers, heads, "o", color=color, alpha=0.4)
        right.plot(layers, heads.mean(1), color=color, label=f"{which} (dots: heads)")
        right.axhline(own["if_uniform"], color=color, linestyle=":", label=f"{which}, if uniform")
    right.set(title="attention on meta-tokens by layer", xlabel="layer", xticks=layers,
              ylabel="share of attention")
    right.legend()
    return figure


def attention(subject):
    findings, maps = measure_attention(subject, read_prompt(subject))
    said = []
    for which, own in findings["attention_on_meta_tokens"].items():
        heads = 100 * own["per_layer_and_head"]
        said.append(f"{heads.mean():.1f}% {which} ({100 * own['if_uniform']:.1f}% if uniform, "
                    f"{heads.max():.1f}% in one head)")
    return findings, draw_attention(findings, maps), f"on meta-tokens: {'; '.join(said)}"


# --------------------------------------------------------------------------------------
# 4. Rate-distortion: in rate_distortion.py
# 5. Perplexity over length: does the model use far context?

def variants(c, lengths):
    """{name: {length: changes of the model's config c}}.

    As trained, and by YaRN beyond the window; both also without positions at
    meta-tokens. Learned positions end with the window.
    """
    runs = {}
    no_pos = {"": c.zero_meta_pos}
    if c.meta_id is not None and c.pos != "none":
        no_pos[", no_pos"] = True
    for suffix, zero in no_pos.items():
        possible = [n for n in lengths if n <= c.block_size or c.pos != "absolute"]
        runs["as trained" + suffix] = {n: {"zero_meta_pos": zero} for n in possible}
        if c.pos == "rope":
            runs["YaRN" + suffix] = {
                n: {"zero_meta_pos": zero, "yarn_scale": n / c.original_block_size}
                for n in possible if n > c.block_size}
    return runs


def read_sequences(subject):
    """x and y of validation text, each (n, T): sequences of four windows."""
    blocks, length = subject.blocks, 4 * subject.model.config.block_size
    size = -(-length // blocks.block_size)  # blocks of a sequence
    n = min(len(blocks) // size, subject.config.analysis_blocks)
    if n < 2:
        raise subject.config.error(
            f"{prepare.folder_of(subject.config.dataset)} has {len(blocks)} validation blocks, "
            f"but two sequences of four windows (block_size={length // 4}) need {2 * size}: "
            "prepare more with a higher --val_fraction=")
    firsts = np.linspace(0, len(blocks) - size, n).astype(int)
    numbers = (firsts[:, None] + np.arange(size)).flatten()
    return [tokens.view(n, -1)[:, :length] for tokens in blocks.batch(numbers)]


def loss_at_end(subject, changes, x, y, tail):
    """The mean loss of the last tokens of each sequence x (n, T): (n,)."""
    model, losses = subject.model.reconfigured(**changes).to(subject.device).eval(), []
    for rows in batches_of(torch.arange(len(x)), x.size(1)):
        own = text_losses(model, x[rows].to(subject.device), y[rows].to(subject.device))
        losses.append(own[:, -tail:].nanmean(1).cpu())
    return torch.cat(losses).numpy()


def measure_perplexity(subject):
    """The findings: the loss of the same text by length of context."""
    c = subject.model.config
    window, tail = c.block_size, max(c.block_size // 8, 1)
    lengths = [window // 4, window // 2, window, 2 * window, 4 * window]
    x, y = read_sequences(subject)
    by_context = {}
    for name, runs in variants(c, lengths).items():
        by_context[name] = {}
        for length, changes in tqdm(runs.items(), desc=name, leave=False):
            losses = loss_at_end(subject, changes, x[:, -length:], y[:, -length:], tail)
            by_context[name][length] = losses                              # (n,)
    one_window = by_context["as trained"][window]
    for runs in by_context.values():
        for length, losses in runs.items():
            difference = estimate(losses - one_window)  # of the same text: paired
            runs[length] = {**estimate(losses), "minus_one_window": difference}
    return {"sequences": len(x), "window": window, "tail": tail, "by_context": by_context}


def draw_perplexity(findings):
    """How the loss of the same text changes with the length of its context."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    ax, window = figure.subplots(), findings["window"]
    for name, runs in findings["by_context"].items():
        points = [run["minus_one_window"] for run in runs.values()]
        mean = [point["mean"] for point in points]
        half = [point["high"] - point["mean"] for point in points]
        ax.errorbar([*runs], mean, half, marker="o", capsize=3, label=name)
    ax.axvline(window, color="gray", linestyle=":", label="the window")
    ax.set_xscale("log", base=2)
    lengths = [*findings["by_context"]["as trained"]]
    ax.set_xticks(lengths, labels=map(str, lengths))
    ax.set(title=f"Loss on the same last {findings['tail']} tokens as the context grows\n"
           f"({findings['sequences']} sequences, 95% intervals over them)",
           xlabel="length of the context (tokens)",
           ylabel=f"loss, minus that after {window} tokens as trained (nats per text token)")
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def perplexity(subject):
    findings = measure_perplexity(subject)
    window, by_context = findings["window"], findings["by_context"]
    summary = f"no more than one window: learned positions end at {window}"
    if subject.model.config.pos != "absolute":
        said = [f"{name} {text_of(found[4 * window]['minus_one_window'])}"
                for name, found in by_context.items()]
        summary = (f"loss of the same {findings['tail']} tokens after {4 * window} tokens, minus "
                   f"that after {window}: {', '.join(said)} nats per text token")
    return findings, draw_perplexity(findings), summary


# --------------------------------------------------------------------------------------
# Figures

def heat_map(ax, values, label, limits=None, cmap="RdBu_r"):
    """values (rows, columns); without limits the colours are symmetric around 0."""
    low, high = limits or (-np.abs(values).max(), np.abs(values).max())
    image = ax.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect="auto",
                      interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label=label, fraction=0.05)


def token_axis(axis, names):
    """Ticks with the names of tokens; a meta-token is a red square."""
    shown = ["■" if name == prepare.META else name for name in names]
    axis.set_ticks(range(len(names)), labels=shown, fontsize=9 if len(names) < 60 else 6,
                   family="monospace", rotation=90 if axis.axis_name == "x" else 0)
    for name, tick in zip(shown, axis.get_ticklabels()):
        if name == "■":
            tick.set_color(COLORS["meta"])


SHOWN = str.maketrans({"\n": "↵", "\t": "→", " ": "␣"})


def names_of(encoding, tokens):
    """Readable names: white space is shown, half a character as \\x and its byte."""
    names = []
    for token in tokens:
        if token >= encoding.n_vocab:
            names.append(prepare.META)
        else:
            piece = encoding.decode_single_token_bytes(token)
            names.append(piece.decode("utf-8", "backslashreplace").translate(SHOWN))
    return names


# --------------------------------------------------------------------------------------
# The script. A part maps a Subject to (findings, figure, one-line summary)

PARTS = {part.__name__: part
         for part in (sharpening, residual, attention, rate_distortion, perplexity, recall,
                      cache)}
OF_MARKS = {"sharpening", "residual"}
NEED_META = {"attention", *OF_MARKS}
DATA = ("dataset", "source", "text_field", "val_fraction", "max_tokens")
HELP = (settings.Analysis, "init_from", "out_dir", "dataset", "start", "train_length",
        "eval_lengths", "test_examples", "label", "workers", "seed", "device")


class Subject:
    """A model to look into, the text it reads, and where results go.

    Raises SystemExit if they do not fit together.
    """

    def __init__(self, config, names):
        self.config = config
        self.device = config.checked(pick_device, config.device)
        self.model, self.checkpoint, self.path = train.load_saved(config)
        self.label = config.label or label_of(self.checkpoint, self.path)
        self.commit = eval_synthetic.commit()  # now: results may be part of the repository
        self.folder = folder_of(config, self.path)
        self.encoding = prepare.get_tokenizer(config.tokenizer)
        self.data = self.blocks = None
        is_tuned = "run" in self.checkpoint
        possible = [name for name in PARTS if name != "cache" or is_tuned]
        if config.what == "all":
            names = possible
        self.names = names
        self.mark, self.stream, self.length = self.model.config.meta_id, None, None
        self.read = "validation blocks"
        has_meta = self.mark is not None
        if is_tuned:
            run = self.checkpoint["run"]
            self.stream, self.length = eval_synthetic.Stream(**run["stream"]), run["train_length"]
            self.mark, self.read = self.stream.mark, f"validation prompts of {self.stream.task}"
        lacking = [name for name in names if name in NEED_META and not has_meta]
        if self.mark is not None:  # any mark will do for these
            lacking = [name for name in lacking if name not in OF_MARKS]
        if lacking:
            allowed = ",".join(name for name in possible if name not in NEED_META)
            raise config.error(
                f"what={config.what}: {', '.join(lacking)}: the checkpoint has no meta-tokens; "
                f"it allows --what={allowed}")
        config.remember(self.checkpoint["settings"], ("meta_rate", "meta_placement"))
        if not config.given("dataset"):
            config.remember(self.checkpoint["settings"], DATA)
        # Tuning makes a model forget plain text, so rate_distortion then reads none
        self.reads_plain_text = has_meta and not is_tuned
        needs_data = {"perplexity", "recall"} if is_tuned else {"perplexity", "recall", *OF_MARKS}
        if not config.given("start"):
            needs_data.add("attention")
        if self.reads_plain_text:
            needs_data.add("rate_distortion")
        if needs_data & set(names):
            self.open_data()
        self.model.to(self.device).eval()

    def open_data(self):
        config, c = self.config, self.model.config
        manifest, folder = prepare.read_manifest(config), prepare.folder_of(config.dataset)
        n_meta = manifest["meta_per_block"]
        if manifest["tokenizer"] != config.tokenizer:
            raise config.error(f"{folder} was prepared with tokenizer {manifest['tokenizer']}, "
                               f"but the checkpoint uses {config.tokenizer}")
        if (n_meta > 0) != (c.meta_id is not None):
            kind = "without" if c.meta_id is None else "with"
            raise config.error(f"{folder} has {n_meta} meta-tokens a block, but the checkpoint was "
                               f"trained {kind} them: name another --dataset=")
        if c.pos == "absolute" and manifest["block_size"] > c.block_size:
            raise config.error(f"{folder} has blocks of {manifest['block_size']} tokens, but "
                               f"learned positions end at {c.block_size}")
        self.blocks = train.Blocks(folder, manifest, "val")
        self.length = self.length or self.blocks.block_size
        self.data = {"dataset": config.dataset, "validation": manifest["splits"]["val"]}

    def batches(self, desc):
        """Yield (idx, is_text) (B, T): validation blocks, spread evenly, or prompts."""
        n = self.config.analysis_blocks
        if self.stream is None:
            numbers = np.unique(np.linspace(0, len(self.blocks) - 1, n).astype(int))
            for own in tqdm(batches_of(numbers, self.length), desc=desc, leave=False):
                idx = self.blocks.batch(own)[0].to(self.device)
                yield idx, idx != self.mark
            return
        prompts = [torch.from_numpy(eval_synthetic.draw(
            self.stream, "validation", self.length, number).tokens) for number in range(n)]
        for own in tqdm(batches_of(prompts, self.length), desc=desc, leave=False):
            idx = [F.pad(tokens, (0, self.length - len(tokens)), value=-1) for tokens in own]
            idx = torch.stack(idx).to(self.device)                         # (B, T); -1: padding
            yield idx.clamp(min=0), (idx >= 0) & (idx != self.mark)


def folder_of(config, path):
    """Where results go."""
    if checkpoints.is_pretrained(path) or config.typed("out_dir"):
        return os.path.join(config.out_dir, "analysis")
    if not path.endswith(".pt"):
        return os.path.join(path, "analysis")
    if os.path.basename(path) == "ckpt.pt":
        return os.path.join(os.path.dirname(path), "analysis")
    return os.path.join(os.path.dirname(path), "analysis", checkpoints.stem(path))


def write(subject, name, argv, findings, figure, summary):
    """Write <part>.json and <part>.png, each of them whole or not at all."""
    path = os.path.join(subject.folder, name)
    prepare.write_json(f"{path}.json", {
        "what": name, "summary": summary, "figures": for_json(findings),
        "command": shlex.join(["python", "analyze.py", *argv]),
        "checkpoint": {"path": subject.path, "step": subject.checkpoint["step"],
                       "sha256_of_weights": checkpoints.sha256_of_weights(subject.model)},
        "config": asdict(subject.config), "data": subject.data, "commit": subject.commit,
        "device": str(subject.device), "torch": torch.__version__})
    figure.savefig(f"{path}.png.tmp", format="png", dpi=100)
    os.replace(f"{path}.png.tmp", f"{path}.png")
    print(f"{name}: {summary}", flush=True)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    config = settings.load(argv, HELP, __doc__)
    names = config.parts(PARTS)
    rcParams["text.parse_math"] = False         # a $ in a label or a token is no formula
    try:
        subject = Subject(config, names)
        os.makedirs(subject.folder, exist_ok=True)
        for name in subject.names:
            write(subject, name, argv, *PARTS[name](subject))
        print(f"written to {subject.folder}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the parts that are written stay") from None
    except BrokenExecutor:
        raise SystemExit("error: a worker was killed, perhaps for lack of memory") from None
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        raise SystemExit("error: the device has too little memory: try --device=cpu") from None
    except OSError as e:
        raise SystemExit(f"error: {e.filename or config.out_dir}: {e.strerror}") from None


if __name__ == "__main__":
    main()
