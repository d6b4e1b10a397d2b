"""Looks inside a trained model: do its meta-tokens sharpen attention, cache the text before them, and compress it?

    python analyze.py config/quickstart.py --init_from=out                     # everything, into out/analysis/
    python analyze.py --init_from=out --what=sharpening,residual,attention,rate_distortion,perplexity
    python analyze.py --init_from=out --what=attention --start="def main("
    python analyze.py --init_from=out/a.pt --what=rate_distortion --compare=out/b.pt,out/c.pt      # tuned by eval_synthetic.py

Each part writes <what>.json and <what>.png and prints two lines. They go to analysis/ beside the checkpoint (of a file
that is not ckpt.pt, such as out/best.pt, to out/analysis/best/), or to <out_dir>/analysis/ if the command line names an out_dir.
All is computed in float32, from the validation text of the data set that the checkpoint was trained on, or of --dataset.

Shapes: B sequences, T tokens, L layers, C width, nh heads of size hs; S sets of keys; H bottlenecks side by side.
"""
import json
import math
import os
import re
import shlex
import sys
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict
from functools import partial

import config as settings
import eval_synthetic
import prepare
import sample
import train
from model import rotate

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

SCORES = 1 << 24                     # attention scores, or logits, that are held at once: 64 MB
TOKENS = 1 << 13                     # tokens of a batch
BINS = np.linspace(-16, 16, 6401)    # of the histograms, in nats: medians are right to 0.005
BETAS = np.logspace(-3, 0, 10)       # the weights of the rate: the paper's 0.01 to 1, and smaller ones
LATENT = 32                          # size of a bottleneck's z
CLASSES = 256                        # next tokens that are told apart; the rest are one class
MAX_SHOWN = 128                      # tokens of a map that can still be read; of our own start, half as many
COLORS = {"meta": "C3", "text": "C0"}
START = """def count(path):
    counts = {}
    with open(path) as file:
        for word in file.read().split():
            counts[word] = counts.get(word, 0) + 1
    return counts
"""


# ----------------------------------------------------------------------------------------------------------------------
# Capture: hooks see what the fast path computes, and leave it as it is

@torch.no_grad()
def read(model, idx, *hooks):
    """Runs the model on idx (B, T) for what the hooks see, lists of handles, and removes them. Logits are those of one position."""
    try:
        model(idx, at=torch.zeros_like(idx[:, :1]))
    finally:
        for handle in sum(hooks, []):
            handle.remove()


def on_causal_attention(model, visit):
    """Calls visit(attn, x, rope) in every layer: the module, its input (B, T, C), and the rotary tables."""
    def hook(attn, args):
        visit(attn, *args[:2])
    return [block.attn.register_forward_pre_hook(hook) for block in model.transformer.h]


def on_meta_attention(model, visit):
    """The same for the gathered meta-tokens: x is (B, M, C)."""
    def hook(attn, args):
        x, norm, meta, _ = args
        visit(attn, norm(x.gather(1, meta.index.expand(-1, -1, x.size(-1)))), meta.rope)
    return [block.meta_attn.register_forward_pre_hook(hook) for block in model.transformer.h if model.config.meta_attention]


def on_residual(model, visit):
    """Calls visit(x) with the residual stream (B, T, C), L + 1 times: before the first block, and after each."""
    blocks = model.transformer.h
    before = blocks[0].register_forward_pre_hook(lambda module, args: visit(args[0]))
    return [before, *(block.register_forward_hook(lambda module, args, x: visit(x)) for block in blocks)]


def on_final(model, visit):
    """Calls visit(x) with the final hidden state (B, T, C), before ln_f."""
    return [model.transformer.ln_f.register_forward_pre_hook(lambda module, args: visit(args[0]))]


def zeroing(model, mask):
    """Zeroes the input embedding of the tokens of a mask, bool (B, T)."""
    return [model.transformer.wte.register_forward_hook(lambda module, args, x: x.masked_fill(mask.unsqueeze(-1), 0))]


def attention_rows(attn, x, rope):
    """Reference path: the logits of an attention from its own weights, some queries at a time.

    x is (B, T, C). Yields (rows, logits): a slice of n queries, and (B, nh, n, rows.stop), before the softmax, -inf at later
    keys. n is such that no more than SCORES are held at once: never a T x T matrix of a long context.
    """
    B, T, _ = x.shape
    q, k, _ = attn.c_attn(x).view(B, T, 3, attn.n_head, -1).permute(2, 0, 3, 1, 4)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    n = max(SCORES // (B * attn.n_head * T), 1)
    for start in range(0, T, n):
        stop = min(start + n, T)
        logits = q[:, :, start:stop] @ k[:, :, :stop].transpose(-1, -2) / math.sqrt(q.size(-1))
        later = torch.ones(stop - start, stop, dtype=torch.bool, device=x.device).triu(start + 1)
        yield slice(start, stop), logits.masked_fill(later, -math.inf)


def batches_of(sequences, length):
    """Sequences of one length, TOKENS tokens at a time, or one by one where each has more."""
    n = max(TOKENS // length, 1)
    return [sequences[i:i + n] for i in range(0, len(sequences), n)]


# ----------------------------------------------------------------------------------------------------------------------
# Statistics

def interval(values):
    """Mean over the first axis, and half the 95% interval by the normal approximation; NaN in values is no value."""
    with np.errstate(invalid="ignore", divide="ignore"):
        n = np.isfinite(values).sum(0)
        mean = np.nansum(values, 0) / n
        return mean, 1.96 * np.sqrt(np.nansum((values - mean)**2, 0) / (n - 1) / n)


def listed(values):
    """Numbers for JSON: nested lists, None for what is not finite."""
    values = np.asarray(values, dtype=float)
    return np.where(np.isfinite(values), np.round(values, 6), None).tolist()


def estimate(values):
    """interval() of values (n, ...) for JSON."""
    mean, half = interval(np.asarray(values, dtype=float))
    return {"mean": listed(mean), "low": listed(mean - half), "high": listed(mean + half)}


def text_of(values):
    mean, half = interval(np.asarray(values, dtype=float))
    return f"{mean:.3f} ± {half:.3f}"


# ----------------------------------------------------------------------------------------------------------------------
# 1. Sharpening (paper, section 4.4, theorem 4.1): meta-tokens raise logits, and lower the entropy of attention

def entropy(logits):
    """H = -sum a log a of the attention a = softmax(logits), in nats: (..., T) -> (...)."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def entropy_slope(logits, keys):
    """dH/dDelta as the logits of some keys (bool, like logits) rise together: -sum over them of a_j (log a_j + H).

    For one key it is negative exactly where a_j > exp(-H): a condition that theorem 4.1 needs and does not state.
    """
    a = logits.softmax(-1)
    return ((torch.special.entr(a) - a * entropy(logits).unsqueeze(-1)) * keys).sum(-1)


def measured_slope(logits, keys, delta=1e-4):
    """The same by a central difference: for logits in float64."""
    return (entropy(logits + delta * keys) - entropy(logits - delta * keys)) / (2 * delta)


@torch.no_grad()
def row_statistics(attn, x, rope, key_sets):
    """What every query of a causal attention sees in sets of keys, bool (S, B, T).

    Returns (top, entropy, met): the largest logit of each set (S, B, nh, T), the entropy (B, nh, T) in nats, and how many keys
    of each set meet the theorem's condition a_j > exp(-H) (S, B, nh, T).
    """
    top, H, met = [], [], []
    for _, logits in attention_rows(attn, x, rope):
        sets = key_sets[:, :, None, None, :logits.size(-1)]
        H.append(entropy(logits))
        sharp = logits.softmax(-1) > (-H[-1]).exp().unsqueeze(-1)
        top.append(torch.stack([logits.masked_fill(~keys, -math.inf).amax(-1) for keys in sets]))
        met.append(torch.stack([(sharp & keys).sum(-1) for keys in sets]))
    return torch.cat(top, -1), torch.cat(H, -1), torch.cat(met, -1)


def random_text(is_meta, generator):
    """As many text tokens as the row has meta-tokens, at random, and like these never the first: bool (B, T)."""
    order = torch.rand(is_meta.shape, generator=generator).to(is_meta.device).masked_fill(is_meta, 2)
    order[:, 0] = 2
    return (order.argsort(-1).argsort(-1) < is_meta.sum(-1, keepdim=True)) & ~is_meta


def sharpen(model, idx, control):
    """Boost and drop of one batch, for the meta-tokens and for the control, bool (B, T).

    Returns (queries, {"meta": {...}, "text": {...}}). queries, bool (B, T): text that neither changes, behind the first of both.
    Each has "boost" (largest logit as it is, minus the same with the embeddings zeroed), "boost_keys" (over the zeroed
    keys), "drop" (entropy with them zeroed, minus as it is), and "met" and "pairs": keys that meet the condition on the
    unboosted row, of all that the query sees. Each (L, B, nh, T), pairs (1, B, 1, T).
    """
    is_meta = idx == model.config.meta_id
    sets = torch.stack([torch.ones_like(is_meta), is_meta, control])

    def run(mask):
        layers = []
        read(model, idx, zeroing(model, mask), on_causal_attention(model, lambda *inputs: layers.append(row_statistics(*inputs, sets))))
        top, H, met = (torch.stack(t) for t in zip(*layers))
        return top.transpose(0, 1), H, met.transpose(0, 1)

    (top, H, _), result = run(torch.zeros_like(is_meta)), {}
    for i, name in ((1, "meta"), (2, "text")):
        top_0, H_0, met_0 = run(sets[i])
        result[name] = {"boost": top[0] - top_0[0], "boost_keys": top[i] - top_0[i], "drop": H_0 - H, "met": met_0[i],
                        "pairs": sets[i].cumsum(-1)[None, :, None]}
    return ~is_meta & ~control & (sets[1:].cumsum(-1) > 0).all(0), result


def check_slopes(model, idx, every=16):
    """entropy_slope against measured_slope on the model's real rows of text queries, unboosted, every 16th.

    Returns two arrays (n, 2): raising one meta key (of each row the one with the largest and with the smallest a_j), and all.
    """
    is_meta, one, together = (idx == model.config.meta_id).cpu(), [], []

    def visit(*inputs):
        for rows, logits in attention_rows(*inputs):
            logits = logits[:, :, ::every].cpu().double()
            keys = is_meta[:, None, None, :logits.size(-1)] & ~is_meta[:, None, rows, None][:, :, ::every] & logits.isfinite()
            logits, keys = logits[keys.any(-1)], keys[keys.any(-1)]
            for best in (logits.masked_fill(~keys, -math.inf).argmax(-1), logits.masked_fill(~keys, math.inf).argmin(-1)):
                single = F.one_hot(best, logits.size(-1)).bool()
                one.append(torch.stack([entropy_slope(logits, single), measured_slope(logits, single)], -1))
            together.append(torch.stack([entropy_slope(logits, keys), measured_slope(logits, keys)], -1))

    read(model, idx, zeroing(model, idx == model.config.meta_id), on_causal_attention(model, visit))
    return torch.cat(one).numpy(), torch.cat(together).numpy()


def sharpening(subject):
    kinds = {"meta": "meta-tokens zeroed", "text": "as many text tokens zeroed"}
    titles = {"boost": "largest logit, over all keys", "boost_keys": "largest logit, over the zeroed keys", "drop": "entropy of attention"}
    axis = {"boost": "logit boost (nats)", "boost_keys": "logit boost (nats)", "drop": "entropy drop (nats)"}
    generator, slopes = torch.Generator().manual_seed(subject.config.seed), None
    means = {(kind, name): [] for kind in kinds for name in (*titles, "share")}
    counts = {(kind, name): np.zeros(len(BINS) - 1, dtype=int) for kind in kinds for name in titles}
    for idx in subject.batches("sharpening"):
        slopes = slopes or check_slopes(subject.model, idx)
        queries, result = sharpen(subject.model, idx, random_text(idx == subject.model.config.meta_id, generator))
        queries = queries[None, :, None]                                                        # (1, B, 1, T)
        for kind, values in result.items():
            for name in titles:
                value = values[name].masked_fill(~queries, 0)                                   # (L, B, nh, T)
                means[kind, name].append((value.sum(-1) / queries.sum(-1)).transpose(0, 1).cpu())
                value = value[queries.expand_as(value)].cpu().numpy()
                counts[kind, name] += np.histogram(value.clip(BINS[0], BINS[-1]), BINS)[0]
            share = (values["met"] * queries).sum(-1) / (values["pairs"] * queries).sum(-1)
            means[kind, "share"].append(share.transpose(0, 1).cpu())
    means = {key: torch.cat(values).numpy() for key, values in means.items()}                   # (blocks, L, nh)
    n_blocks, n = len(means["meta", "boost"]), int(counts["meta", "boost"].sum())

    findings = {"blocks": n_blocks, "values": n, "a_value_is": "of a text query, a layer and a head", "interval_is": "over blocks"}
    for kind, title in kinds.items():
        findings[title] = {name: estimate(means[kind, name].mean((1, 2))) | {"per_layer_and_head": estimate(means[kind, name])}
                           for name in (*titles, "share")}
        for name in titles:
            findings[title][name]["median"] = float(np.interp(0.5, np.cumsum(counts[kind, name]) / n, BINS[1:]))
    findings["slope"] = {name: {"rows": len(pair), "falls": int((pair[:, 0] < 0).sum()), "rises": int((pair[:, 0] > 0).sum()),
                                "largest_difference": float(np.abs(pair[:, 0] - pair[:, 1]).max())}
                         for name, pair in zip(("one meta key", "all meta keys"), slopes)}

    figure, axes = new_figure([list(titles), [f"{name} of heads" for name in titles]], 15, 8.5)
    for name, title in titles.items():
        cumulative = {kind: np.cumsum(counts[kind, name]) / n for kind in kinds}
        edges = np.linspace(*np.interp((0.005, 0.995), sum(cumulative.values()) / 2, BINS[1:]), 61)
        for kind, label in kinds.items():
            mean, half = interval(means[kind, name].mean((1, 2)))
            share = 100 * np.diff(np.interp(edges, BINS[1:], cumulative[kind]))
            axes[name].stairs(share, edges, fill=True, color=COLORS[kind], alpha=0.5, label=f"{label}: mean {mean:+.3f} ± {half:.3f}")
            axes[name].axvline(mean, color=COLORS[kind], linestyle="--")
        axes[name].set(title=f"{title}: {'without minus with' if name == 'drop' else 'with minus without'}", xlabel=axis[name],
                       ylabel="share of (query, layer, head) (%)")
        axes[name].set_ylim(0, 1.3 * axes[name].get_ylim()[1])  # room for the legend
        axes[name].legend(fontsize="x-small", loc="upper right")
        ax = axes[f"{name} of heads"]
        heat_map(ax, means["meta", name].mean(0), axis[name])
        ax.set(title="the same by layer and head, meta-tokens zeroed", xlabel="head", ylabel="layer")
        for ticks, size in ((ax.set_xticks, means["meta", name].shape[2]), (ax.set_yticks, means["meta", name].shape[1])):
            ticks(range(size), labels=range(1, size + 1))
    figure.suptitle(f"Causal attention of text queries, with some input embeddings and without; {n_blocks} validation blocks, {n:,} values")
    said = {key: text_of(values.mean((1, 2))) for key, values in means.items()}
    slope = findings["slope"]["one meta key"]
    return findings, figure, (
        f"logit boost {said['meta', 'boost']} (control {said['text', 'boost']}), entropy drop {said['meta', 'drop']} "
        f"(control {said['text', 'drop']}) nats; {n_blocks} blocks",
        f"a_j > exp(-H) in {100 * means['meta', 'share'].mean():.1f}% of (query, meta key) pairs; slope of H right to "
        f"{slope['largest_difference']:.0e}: falls in {slope['falls']:,} of {slope['rows']:,} rows, rises in {slope['rises']:,}")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Implicit caching (paper, section 5): the residual stream at a meta-token resembles that of the text before it

def similarity_by_distance(x, queries, keys, edges):
    """Mean cosine similarity of queries with earlier keys, both bool (B, T), in x (B, T, C), by their distance.

    edges are n + 1 distances in tokens, ascending: bin i holds edges[i] <= distance < edges[i + 1]. Returns (B, n), NaN where
    there is no pair.
    """
    rows, edges = [], torch.as_tensor(edges, device=x.device)
    for row, q, k in zip(F.normalize(x, dim=-1), queries, keys):
        q, k = q.nonzero(), k.nonzero()                                                         # (n_q, 1), (n_k, 1)
        bins = torch.bucketize(q - k.T, edges, right=True)                                      # 0: too near, n + 1: too far
        similarity = row[q[:, 0]] @ row[k[:, 0]].T                                              # (n_q, n_k)
        sums = torch.bincount(bins.flatten(), similarity.flatten(), minlength=len(edges) + 1)
        rows.append(sums[1:len(edges)] / torch.bincount(bins.flatten(), minlength=len(edges) + 1)[1:len(edges)])
    return torch.stack(rows)


def residual(subject):
    model, n = subject.model, 0
    kinds = {"meta": "meta-token, with earlier text", "text": "control: the text token before it, with earlier text",
             "other": "meta-token, with earlier meta-tokens"}
    edges = sorted({round(2 ** (i / 2)) for i in range(2 * int(math.log2(subject.blocks.block_size)) + 1)})
    curves, example = {kind: [] for kind in kinds}, None
    for idx in subject.batches("residual"):
        is_meta, stream = idx == model.config.meta_id, []
        read(model, idx, on_residual(model, stream.append))
        before_meta = F.pad(is_meta[:, 1:], (0, 1)) & ~is_meta
        for kind, queries, keys in (("meta", is_meta, ~is_meta), ("text", before_meta, ~is_meta), ("other", is_meta, is_meta)):
            curves[kind].append(torch.stack([similarity_by_distance(x, queries, keys, edges) for x in stream], 1).cpu())
        n += int(is_meta.sum())
        if example is None:
            at = int((is_meta[0] & F.pad(before_meta[0, :-1], (1, 0))).nonzero().flatten()[-1])  # the last one that stands behind text
            first = max(at - 48, 0)
            tokens = labels(subject.encoding, idx[0, first:at + 1].tolist())
            example = {kind: torch.stack([F.cosine_similarity(x[0, first:at + 1], x[0, i], dim=-1) for x in stream]).cpu()
                       for kind, i in (("meta", at), ("text", at - 1))}                         # (L + 1, 49)
    curves = {kind: torch.cat(values).numpy() for kind, values in curves.items()}               # (blocks, L + 1, bins)
    n_blocks, layers = len(curves["meta"]), model.config.n_layer + 1

    findings = {"blocks": n_blocks, "meta_tokens": n, "interval_is": "over blocks", "layers": "0: the embedding, i: after block i",
                "distances": [[a, b - 1] for a, b in zip(edges, edges[1:])],
                "curves": {kinds[kind]: estimate(values) for kind, values in curves.items()},
                "example": {"tokens": tokens, "meta_token": listed(example["meta"]), "text_token_before_it": listed(example["text"])}}
    figure, axes = new_figure([list(kinds), ["map of meta"] * 3, ["map of text"] * 3], 15, 7 + 0.5 * layers)
    for kind, title in kinds.items():
        for layer in range(layers):
            mean, half = interval(curves[kind][:, layer])
            t = layer / (layers - 1)
            color = (t, 0.7 * (1 - abs(2 * t - 1)), 1 - t)                                      # blue at the embedding, red at the end
            axes[kind].plot(edges[:-1], mean, color=color, label=f"after block {layer}" if layer else "embedding")
            axes[kind].fill_between(edges[:-1], mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
        axes[kind].set_xscale("log", base=2)
        axes[kind].set(title=title, xlabel="distance (tokens)", ylabel="mean cosine similarity", ylim=(-0.3, 1.03))
        axes[kind].grid(alpha=0.3)
    axes["meta"].legend(fontsize="small", ncols=2)
    for kind, title in (("meta", "the meta-token at the right end"), ("text", "control: the text token before it")):
        ax = axes[f"map of {kind}"]
        heat_map(ax, example[kind], "cosine similarity", limits=(-1, 1))
        token_axis(ax.xaxis, tokens)
        ax.set(title=f"one example, {title}: similarity with each token", ylabel="after block", yticks=range(layers))
    figure.suptitle(f"Residual stream: {n:,} meta-tokens of {n_blocks} validation blocks; 95% intervals over blocks")
    far = np.searchsorted(edges, edges[-1] // 4)
    said = {kind: f"{text_of(curves[kind][:, -1, 0])} and {text_of(curves[kind][:, -1, far])}" for kind in kinds}
    return findings, figure, (
        f"after the last block, cosine similarity of a meta-token with the text {edges[0]} and {edges[far]} tokens back: {said['meta']},",
        f"of the text token before it: {said['text']}; {n:,} meta-tokens of {n_blocks} blocks")


# ----------------------------------------------------------------------------------------------------------------------
# 3. Attention: where meta-tokens look, and who looks at them

def attention_maps(model, idx):
    """Attention of one sequence, idx (1, T): causal (L, nh, T, T), and among its meta-tokens, mean over heads, (L, M, M) or None."""
    causal, meta = [], []

    def keep(maps):
        def visit(*inputs):
            T = inputs[1].size(1)
            rows = [F.pad(logits.softmax(-1)[0], (0, T - logits.size(-1))) for _, logits in attention_rows(*inputs)]
            maps.append(torch.cat(rows, 1).cpu().numpy())
        return visit

    read(model, idx, on_causal_attention(model, keep(causal)), on_meta_attention(model, keep(meta)))
    return np.stack(causal), np.stack(meta).mean(1) if meta else None


def attention(subject):
    config, model = subject.config, subject.model
    start, longest = sample.read_start(config), min(MAX_SHOWN, model.config.block_size)
    tokens = subject.encoding.encode_ordinary(START if start is None else start)
    tokens = sample.inject_prompt(tokens, config, model.config.meta_id).astype(np.int64)
    if start is None:
        tokens = tokens[:min(MAX_SHOWN // 2, longest)]
    is_meta, T = tokens == model.config.meta_id, len(tokens)
    if longest < T:
        raise config.error(f"the prompt has {T} tokens, but a map has room for {longest}: give a shorter --start=")
    if not is_meta[:-1].any():
        raise config.error(f"the prompt of {T} tokens has no meta-token inside, at meta_rate={config.meta_rate}: give a longer --start= or "
                           "another --seed=")
    causal, meta = attention_maps(model, torch.from_numpy(tokens)[None].to(subject.device))
    names, places = labels(subject.encoding, tokens.tolist()), np.flatnonzero(is_meta)
    meta_names = [f"{''.join(n for n in names[:place] if n != prepare.META)[-8:]} {place}" for place in places]
    on_meta = causal[..., is_meta].sum(-1)                                                      # (L, nh, T)
    uniform = is_meta.cumsum() / np.arange(1, T + 1)
    behind = np.arange(T) > places[0]
    queries = {kind: rows for kind, rows in (("text", behind & ~is_meta), ("meta", behind & is_meta)) if rows.any()}
    by_layer, share = causal.mean(1), {kind: on_meta[:, :, rows].mean(-1) for kind, rows in queries.items()}  # (L, T, T), (L, nh)

    def strongest(weights):
        return [[int(i), names[i], round(float(weights[i]), 4)] for i in np.argsort(-weights)[:5]]

    findings = {
        "tokens": names, "attention_on_meta_tokens": {f"of {kind} queries": {
            "queries": int(rows.sum()), "per_layer_and_head": listed(share[kind]), "if_uniform": float(uniform[rows].mean())}
            for kind, rows in queries.items()},
        "meta_tokens": [{"position": int(i), "text_before": name, "looks_at": strongest(by_layer[:, i].mean(0)),
                         "is_looked_at_by": strongest(by_layer[:, :, i].mean(0))} for i, name in zip(places, meta_names)]}
    last, size = model.config.n_layer - 1, max(0.11 * T, 5)
    second_row = ["queries"] * 3 if meta is None else ["meta 0", f"meta {last}", "queries"]
    figure, axes = new_figure([["causal 0", f"causal {last}", "layers"], second_row], 3 * size, 1.8 * size)
    for name, maps, ticks, what in (("causal", by_layer, names, "token"), ("meta", meta, meta_names, "text before it, position")):
        for layer in {0, last} if maps is not None else ():
            ax, shown = axes[f"{name} {layer}"], np.where(np.tri(len(maps[layer])), maps[layer], np.nan)
            heat_map(ax, shown, "attention", limits=(0, np.nanquantile(shown, 0.98)), cmap="magma_r")
            token_axis(ax.xaxis, ticks)
            token_axis(ax.yaxis, ticks)
            ax.set(title=f"{name} attention, layer {layer + 1}, mean over heads", xlabel=f"key: {what}", ylabel=f"query: {what}")
    for kind, rows in queries.items():
        layers = range(1, last + 2)
        axes["layers"].plot(layers, share[kind], "o", color=COLORS[kind], alpha=0.4)
        axes["layers"].plot(layers, share[kind].mean(1), color=COLORS[kind], label=f"of {rows.sum()} {kind} queries (dots: heads)")
        axes["layers"].axhline(uniform[rows].mean(), color=COLORS[kind], linestyle=":", label=f"of {kind} queries, if uniform")
    axes["layers"].set(title="attention on meta-tokens by layer", xlabel="layer", ylabel="share of attention", xticks=layers)
    axes["queries"].bar(range(T), on_meta.mean((0, 1)), color=np.where(is_meta, COLORS["meta"], COLORS["text"]))
    axes["queries"].step(range(T), uniform, color="black", where="mid", linestyle=":", label="if uniform")
    token_axis(axes["queries"].xaxis, names)
    axes["queries"].set(title="attention on meta-tokens by query", xlabel="query", ylabel="share of attention, mean over layers and heads")
    for name in ("layers", "queries"):
        axes[name].legend()
    figure.suptitle(f"One prompt of {T} tokens, {len(places)} of them meta-tokens (red squares)")
    said = [f"{kind} queries give meta-tokens {100 * share[kind].mean():.1f}% of their attention ({100 * uniform[rows].mean():.1f}% if "
            f"uniform, {100 * share[kind].max():.1f}% in one head)" for kind, rows in queries.items()]
    return findings, figure, ("; ".join(said), f"one prompt of {T} tokens, {len(places)} of them meta-tokens")


# ----------------------------------------------------------------------------------------------------------------------
# 4. Rate-distortion (paper, section 5, theorem 5.1): the variational bottleneck

THEOREM = ("Theorem 5.1 is about the best possible encoder: at no rate is its distortion larger with meta-tokens than without. These "
           "encoders are trained (linear, Gaussian), and their rates upper bounds: a curve lies above the best one by an unknown amount, "
           "so that the order of curves illustrates the theorem and cannot verify it. No encoder gets below H(Y) - rate.")


def kl_to_prior(mu, log_var):
    """KL(N(mu, diag exp(log_var)) || N(0, I)) in nats: (..., d) -> (...)."""
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(-1)


class Bottlenecks(nn.Module):
    """H bottlenecks side by side: q(z|h) = N(mu(h), diag sigma^2(h)), q(y|z) = softmax(W z + b); mu and log sigma^2 are linear."""

    def __init__(self, n_heads, n_features, n_classes):
        super().__init__()
        self.encoder = nn.Parameter(0.3 * torch.randn(n_heads, n_features, 2 * LATENT) / math.sqrt(n_features))
        self.encoder_bias = nn.Parameter(torch.cat([torch.zeros(n_heads, 1, LATENT), torch.full((n_heads, 1, LATENT), -2.0)], -1))
        self.decoder = nn.Parameter(torch.randn(n_heads, LATENT, n_classes) / math.sqrt(LATENT))
        self.decoder_bias = nn.Parameter(torch.zeros(n_heads, 1, n_classes))

    def forward(self, x, y):
        """x (H, B, C), y (H, B) -> (distortion, rate), each (H,): means of -log q(y|z), z drawn once, and of the KL, in nats."""
        mu, log_var = torch.baddbmm(self.encoder_bias, x, self.encoder).chunk(2, -1)            # (H, B, d)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)
        logits = torch.baddbmm(self.decoder_bias, z, self.decoder)                              # (H, B, classes)
        distortion = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        return distortion.mean(1), kl_to_prior(mu, log_var).mean(1)


@torch.no_grad()
def held_out(model, x, y, draws=8):
    """Distortion and rate (2, H) on examples x (n, C), y (n,), the noise drawn several times."""
    H, total = len(model.encoder), 0
    for rows in torch.arange(len(x), device=x.device).split(256):
        for _ in range(draws):
            total = total + torch.stack(model(x[rows].expand(H, -1, -1), y[rows].expand(H, -1))) * len(rows)
    return total / len(x) / draws


def rate_distortion_curve(x, y, betas, seeds, steps, lr=2e-2, desc=None):
    """Trains a bottleneck for every beta and seed, all together; each keeps its best state on the validation examples.

    x and y are dictionaries of "train", "validation", "test": features (n, C) and classes (n,). Returns (distortion, rate) on
    test, each (len(betas), seeds), in nats.
    """
    mean, std = x["train"].mean(0), x["train"].std(0).clamp(min=1e-6)
    x = {split: (v - mean) / std for split, v in x.items()}
    H, found = len(betas) * seeds, torch.cat([*y.values()]).unique()
    y = {split: torch.searchsorted(found, v) for split, v in y.items()}  # classes without gaps
    beta = torch.tensor(betas, dtype=torch.float32, device=mean.device).repeat_interleave(seeds)  # (H,)
    model = Bottlenecks(H, x["train"].size(1), len(found)).to(mean.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, best_state = torch.full((H,), math.inf, device=mean.device), None
    for step in tqdm(range(1, steps + 1), desc=desc, leave=False, disable=desc is None):
        rows = torch.randint(len(x["train"]), (H, 128), device=mean.device)
        distortion, rate = model(x["train"][rows], y["train"][rows])
        optimizer.zero_grad()
        (distortion + beta * rate).sum().backward()  # of H bottlenecks that share nothing
        optimizer.step()
        schedule.step()
        if step % max(steps // 20, 1) == 0:
            distortion, rate = held_out(model, x["validation"], y["validation"], draws=2)
            better = distortion + beta * rate < best
            best = torch.where(better, distortion + beta * rate, best)
            state = {name: p.detach().clone() for name, p in model.named_parameters()}
            best_state = {name: torch.where(better[:, None, None], p, best_state[name] if best_state else p) for name, p in state.items()}
    model.load_state_dict(best_state)
    return held_out(model, x["test"], y["test"]).view(2, len(betas), seeds).cpu().numpy()


def cached(folder, key, compute):
    """compute(), a dictionary of tensors, kept on disk for whoever asks with an equal key again."""
    path = os.path.join(folder, f"features_{prepare.sha256(json.dumps(key, sort_keys=True).encode())[:16]}.pt")
    if not os.path.exists(path):
        train.save(path, compute())
    return torch.load(path, weights_only=True)


class Reader:
    """A model, and the examples of List Recall that it reads: those that eval_synthetic.py tuned it on, or the config's."""

    def __init__(self, config, model, checkpoint, label):
        run = checkpoint.get("run")
        stream = run["stream"] if run else {
            "task": "list_recall", "placement": "task", "mark": model.config.meta_id, "tokenizer": config.tokenizer}
        self.model, self.label, self.length = model, label, run and run["train_length"]  # None: not tuned
        self.stream = eval_synthetic.Stream(**stream | {"seed": config.seed})            # the same text for all
        if (self.stream.task, self.stream.tokenizer) != ("list_recall", config.tokenizer):
            raise config.error(f"rate_distortion is about List Recall in tokens of {config.tokenizer}, but {label} was tuned on "
                               f"{self.stream.task} in tokens of {self.stream.tokenizer}")

    @classmethod
    def of_file(cls, config, path):
        try:
            checkpoint = train.load_checkpoint(path)
            if "run" not in checkpoint:
                raise ValueError(f"{path} was not tuned by eval_synthetic.py")
            return cls(config, train.model_of(checkpoint).eval(), checkpoint, label_of(checkpoint, path))
        except ValueError as e:
            raise config.error(f"compare={config.compare}: {e}") from None

    def features(self, split, length, n, device, pool):
        """Final hidden states of n examples, each (n, C); "first" (n,), the first token of the answer, of bytes that behind the
        space; and "y" (n,), which of all words is the answer.

        "answer": at the position that predicts "first": of words, the last of the prompt, of bytes, the space behind it. Where
        lists have marks also three that have read the same text, up to the mark behind the queried list: "meta", at that mark;
        "text", at the text token right before it, equally many text tokens away from the answer; "mean", over all that text.
        """
        features, examples = {}, eval_synthetic.draw_split(pool, self.stream, split, length, n)
        mark = self.stream.mark
        for batch in tqdm(batches_of(examples, length), desc=f"{self.label}: {split} examples", leave=False):
            x, states = eval_synthetic.collate(batch, length)[0].to(device), []
            read(self.model, x, on_final(self.model, states.append))
            for e, row, h in zip(batch, x, states[0]):
                first = len(e.tokens) - e.n_answer + (self.stream.tokenizer == "bytes")  # behind a space of its own
                own = {"answer": h[first - 1], "first": torch.tensor(e.tokens[first])}
                if mark is not None and self.stream.placement in ("task", "all"):
                    names = re.findall(r"^List (\w+):", e.prompt, re.MULTILINE)
                    asked = re.search(r"of list (\w+)\?", e.prompt)[1]
                    at = int((row == mark).nonzero()[names.index(asked) if self.stream.placement == "all" else 0])
                    own |= {"meta": h[at], "text": h[at - 1], "mean": h[:at][row[:at] != mark].mean(0)}
                for name, value in own.items():
                    features.setdefault(name, []).append(value.cpu().clone())  # not a view of all states
        return {name: torch.stack(values) for name, values in features.items()} | {
            "y": torch.tensor([eval_synthetic.ITEMS.index(e.answer.strip()) for e in examples])}


def next_token_features(model, blocks, numbers, n, device):
    """Final hidden states of n places in plain text, each (n, C), and "y" (n,), the id of the text token behind.

    "meta": at a meta-token between two text tokens; "text": at the one before it. Both have read the same text, and the
    second cannot know that a meta-token comes: to both, y is the next token.
    """
    features, found = {"meta": [], "text": [], "y": []}, 0
    numbers = np.random.default_rng(0).permutation(numbers)  # of all documents alike
    for own in batches_of(numbers, blocks.block_size):
        x, y = (t.to(device) for t in blocks.batch(own))
        states, is_meta = [], x == blocks.meta_id
        read(model, x, on_final(model, states.append))
        at = is_meta & F.pad(~is_meta[:, :-1], (1, 0)) & (y != blocks.meta_id)
        for name, value in (("meta", states[0][at]), ("text", states[0][F.pad(at[:, 1:], (0, 1))]), ("y", y[at])):
            features[name].append(value.cpu())
        found += int(at.sum())
        if found >= n:
            break
    return {name: torch.cat(values)[:n] for name, values in features.items()}


def recall_lines(subject, sizes):
    """(length, lines at the answer, lines within the model): each line is (label, features by split, name of x, name of y)."""
    config = subject.config
    readers = [Reader(config, subject.model, subject.checkpoint, subject.label)]
    readers += [Reader.of_file(config, path) for path in config.compare.split(",") if path]
    lengths = {reader.length for reader in readers} - {None} or {min(config.train_length, subject.model.config.block_size)}
    length, shortest = max(lengths), eval_synthetic.min_length("list_recall", subject.encoding)
    models = [reader.label for reader in readers]
    if len(set(models)) < len(models):
        raise config.error(f"compare={config.compare}: two models of one name among {', '.join(models)}: rename a file, or "
                           "tune with another --label=")
    if len(lengths) > 1:
        raise config.error(f"compare={config.compare}: tuned at different lengths, {', '.join(map(str, sorted(lengths)))} tokens")
    for reader in readers:
        c = reader.model.config
        if c.pos == "absolute" and c.block_size < length:
            raise config.error(f"compare={config.compare}: prompts of {length} tokens, but the learned positions of {reader.label} end at "
                               f"{c.block_size}")
    if length < shortest:
        raise config.error(f"train_length={config.train_length}, block_size={config.block_size}: List Recall needs {shortest} tokens")
    lines, names = [], {"meta": "the mark behind the queried list", "text": "the text token before that",
                        "mean": "mean over the text up to there"}
    with ProcessPoolExecutor(config.workers or min(prepare.cores(), 4), initializer=prepare.start_worker) as pool:
        for reader in readers:
            reader.model.to(subject.device)
            key = {"stream": asdict(reader.stream), "weights": train.sha256_of_weights(reader.model),
                   "model": asdict(reader.model.config), "length": length}
            lines.append((reader.label, {split: cached(subject.folder, key | {"split": split, "n": n}, partial(
                reader.features, split, length, n, subject.device, pool)) for split, n in sizes.items()}, "answer", "first"))
    own = lines[0][1]  # of the model that is looked into
    return length, lines, [(label, own, name, "y") for name, label in names.items() if name in own["train"]]


def next_token_lines(subject, sizes):
    """Such lines for plain text: the validation blocks are cut into three, and the most frequent next tokens told apart."""
    blocks, device, features = subject.blocks, subject.device, {}
    cuts = (len(blocks) * np.cumsum([*sizes.values()]) // sum(sizes.values())).tolist()
    if min(np.diff([0, *cuts])) == 0:
        raise subject.config.error(f"{len(blocks)} validation blocks cannot be cut into three parts: prepare more by --val_fraction=")
    for (split, n), start, stop in zip(sizes.items(), [0, *cuts], cuts):
        key = {"weights": subject.sha256, "model": asdict(subject.model.config), "data": subject.data, "blocks": [start, stop], "n": n}
        compute = partial(next_token_features, subject.model, blocks, np.arange(start, stop), n, device)
        features[split] = cached(subject.folder, key, compute)
    frequent = torch.bincount(features["train"]["y"]).topk(min(CLASSES, int(features["train"]["y"].max()) + 1)).indices
    classes = torch.full((blocks.meta_id,), len(frequent))
    classes[frequent] = torch.arange(len(frequent))
    features = {split: f | {"y": classes[f["y"]]} for split, f in features.items()}
    return [("the meta-token", features, "meta", "y"), ("the text token before it", features, "text", "y")]


def rate_distortion(subject):
    config, panels, said = subject.config, {}, []
    n = config.bottleneck_examples
    sizes = {"train": n, "validation": max(n // 4, 1), "test": max(n // 2, 1)}
    length, at_answer, within = recall_lines(subject, sizes)
    panels[f"List Recall: the answer's first token, where it is predicted\n(prompts of up to {length} tokens)"] = at_answer
    if within:
        panels[f"List Recall: the answer, from far before it\n(within {subject.label})"] = within
    if subject.compares_plain_text:
        panels[f"Plain text: the next text token\n(within {subject.label})"] = next_token_lines(subject, sizes)
    findings = {"theorem": THEOREM, "state": "of the last layer, before ln_f", "betas": listed(BETAS), "seeds": config.bottleneck_seeds,
                "panels": [], "seeds_are": "of initial weights, noise and order: their range leaves out the choice of examples"}
    figure, axes = new_figure([list(panels)], 6.5 * len(panels), 5.5)
    torch.manual_seed(config.seed)
    for title, lines in panels.items():
        ax, curves = axes[title], {}
        for i, (label, features, *names) in enumerate(lines):
            x, y = ({split: f[name].to(subject.device) for split, f in features.items()} for name in names)
            D, R = rate_distortion_curve(x, y, BETAS, config.bottleneck_seeds, config.bottleneck_steps, desc=label)  # (betas, seeds)
            curves[label] = R, D
            ax.plot(R.mean(1), D.mean(1), marker="o", markersize=3, color=f"C{i}", label=label)
            ax.fill_between(R.mean(1), D.min(1), D.max(1), color=f"C{i}", alpha=0.25, linewidth=0)
        entropy_of_y = float(torch.distributions.Categorical(torch.bincount(y["test"]).double()).entropy())
        at = float(min(entropy_of_y, *(R.mean(1).max() for R, _ in curves.values())))           # a rate that every curve reaches
        there = {label: float(np.interp(at, R.mean(1)[::-1], D.mean(1)[::-1])) for label, (R, D) in curves.items()}
        findings["panels"].append({
            "title": " ".join(title.split()), "examples": {split: len(v) for split, v in y.items()}, "H(Y)": entropy_of_y,
            "rate": at, "distortion_at_rate": there, "curves": {label: {"rate": listed(R), "distortion": listed(D)}
                                                               for label, (R, D) in curves.items()}})
        said.append(f"{title.splitlines()[0]}, at rate {at:.2f}: " + ", ".join(f"{label} {D:.3f}" for label, D in there.items()))
        ax.axhline(entropy_of_y, color="gray", linestyle="--", linewidth=1, label=f"nothing known: H(Y) = {entropy_of_y:.2f} nats")
        ax.axline((0, entropy_of_y), slope=-1, color="gray", linestyle=":", label="no encoder gets below: H(Y) - rate")
        ax.set(title=title, xlabel="rate: KL(q(z|h) || N(0, I)) (nats)", ylabel="held-out distortion: -log q(y|z) (nats)")
        ax.set(xlim=(-0.1, 4 * entropy_of_y), ylim=(0.8 * min(D.min() for _, D in curves.values()), 1.1 * entropy_of_y))
        ax.legend(title=f"{len(y['test']):,} held-out examples; band: range of {config.bottleneck_seeds} seeds", fontsize="small",
                  loc="best")
        ax.grid(alpha=0.3)
    figure.suptitle("Frozen states of the last layer, before ln_f, through trained bottlenecks")
    return findings, figure, ("held-out distortion (nats). " + "; ".join(said),
                             "trained bottlenecks, whose rates are upper bounds: they illustrate theorem 5.1, and cannot verify it")


# ----------------------------------------------------------------------------------------------------------------------
# 5. Perplexity over length: does the model use far context?

@torch.no_grad()
def text_losses(model, idx, targets):
    """Cross-entropy of every text target, in nats: (B, T), NaN where the target is a meta-token."""
    states, rows = [], max(SCORES // model.config.vocab_size, 1)
    read(model, idx, on_final(model, states.append))
    parts = zip(model.transformer.ln_f(states[0]).flatten(0, 1).split(rows), targets.flatten().split(rows))
    losses = torch.cat([F.cross_entropy(model.lm_head(x), y, reduction="none") for x, y in parts]).view(targets.shape)
    return losses if model.config.meta_id is None else losses.masked_fill(targets == model.config.meta_id, math.nan)


def runs_over_length(c, lengths):
    """{variant: {length: changes of the model's config}}: as trained; by YaRN beyond the window; both without positions at
    meta-tokens. Learned positions end with the window."""
    runs = {}
    for no_pos in (False, True) if c.meta_id is not None and c.pos != "none" else (False,):
        for yarn in (False, True) if c.pos == "rope" else (False,):
            possible = [n for n in lengths if (n > c.block_size if yarn else n <= c.block_size or c.pos != "absolute")]
            runs[("YaRN" if yarn else "as trained") + ", no_pos" * no_pos] = {
                n: {"zero_meta_pos": no_pos or c.zero_meta_pos, "yarn_scale": n / c.original_block_size if yarn else c.yarn_scale}
                for n in possible}
    return runs


def perplexity(subject):
    config, model, blocks = subject.config, subject.model, subject.blocks
    window, longest = model.config.block_size, 4 * model.config.block_size
    per_sequence, tail = -(-longest // blocks.block_size), max(window // 8, 1)
    n = min(len(blocks) // per_sequence, config.analysis_blocks)
    if n < 2:
        raise config.error(f"{prepare.folder_of(config)} has {len(blocks)} validation blocks, but two sequences of four windows, "
                           f"block_size={window}, take {2 * per_sequence}: prepare more by --val_fraction=")
    firsts = np.linspace(0, len(blocks) - per_sequence, n).astype(int)
    edges = np.linspace(0, longest, 33).astype(int)
    lengths = [window // 4, window // 2, window, 2 * window, longest]
    runs, by_context, by_position = runs_over_length(model.config, lengths), {}, {}
    for name, run in runs.items():
        for length, changes in run.items():
            changed, losses = model.reconfigured(**changes).to(subject.device).eval(), []
            for own in tqdm(batches_of(firsts, length), desc=f"{name}, {length} tokens", leave=False):
                pairs = [blocks.batch(range(first, first + per_sequence)) for first in own]
                x, y = (torch.stack([pair[i].flatten()[longest - length:longest] for pair in pairs]) for i in (0, 1))
                losses.append(text_losses(changed, x.to(subject.device), y.to(subject.device)).cpu().numpy())
            losses = np.concatenate(losses)                                                     # (n, length)
            by_context.setdefault(name, {})[length] = np.nanmean(losses[:, -tail:], 1)          # (n,)
        by_position[name] = np.stack([np.nanmean(losses[:, a:b], 1) for a, b in zip(edges, edges[1:]) if b <= length], 1)  # the longest
    base = by_context["as trained"][window]

    ends = f"learned positions end at {window}" if model.config.pos == "absolute" else None
    findings = {"sequences": n, "window": window, "interval_is": "over sequences of consecutive validation blocks, meta-tokens in place",
                "by_context_is": f"the text among the last {tail} tokens of a sequence, the same whatever the context", "impossible": ends,
                "position_edges": edges.tolist(),
                "by_position": {name: estimate(values) for name, values in by_position.items()},
                "by_context": {name: {str(length): estimate(v) | {"minus_one_window": estimate(v - base)} for length, v in values.items()}
                               for name, values in by_context.items()}}
    figure, axes = new_figure([["position", "context"]], 14, 5.5)
    for i, name in enumerate(runs):
        mean, half = interval(by_position[name])
        middle = ((edges[:-1] + edges[1:]) / 2)[:len(mean)]
        axes["position"].plot(middle, mean, color=f"C{i}", label=name)
        axes["position"].fill_between(middle, mean - half, mean + half, color=f"C{i}", alpha=0.15, linewidth=0)
        points = np.array([interval(values - base) for values in by_context[name].values()])    # (lengths, 2)
        axes["context"].errorbar(list(by_context[name]), *points.T, marker="o", capsize=3, color=f"C{i}", label=name)
    axes["context"].set_xscale("log", base=2)
    axes["context"].set_xticks(lengths, labels=map(str, lengths))
    axes["position"].set(title=f"By position in what is read: {max(runs['as trained'])} tokens", xlabel="position (tokens)",
                         ylabel="loss (nats per text token)")
    axes["context"].set(title=f"The same last {tail} tokens behind more and more context:\ntheir loss, minus that of one window as trained",
                        xlabel="length of what is read (tokens)", ylabel="difference of loss (nats per text token)")
    for ax in axes.values():
        ax.axvline(window, color="gray", linestyle=":", label="the window")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    figure.suptitle(f"Validation text of {config.dataset}: {n} sequences, 95% intervals over them" + (f"; {ends}" if ends else ""))
    said = [f"{name} {text_of(by_context[name][longest] - base)}" for name in runs if longest in by_context[name]]
    return findings, figure, (
        f"loss of the same last {tail} tokens after {lengths[0]} and {window} tokens: {text_of(by_context['as trained'][lengths[0]])} and "
        f"{text_of(base)} nats per text token; {n} sequences",
        f"after {longest} tokens, minus after {window}: {', '.join(said)}" if said else f"no more than one window: {ends}")


# ----------------------------------------------------------------------------------------------------------------------
# Figures

def new_figure(mosaic, width, height):
    """(figure, {name: axes}) for rows of names, in inches."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplot_mosaic(mosaic)


def heat_map(ax, values, label, limits=None, cmap="RdBu_r"):
    """values (rows, columns); without limits the colours are symmetric around 0."""
    values = np.asarray(values)
    low, high = limits or (-np.abs(values).max(), np.abs(values).max())
    image = ax.imshow(values, cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label=label, fraction=0.05)


def token_axis(axis, names):
    """Ticks with the names of tokens, a red square for meta-tokens."""
    shown = ["■" if name == prepare.META else name for name in names]
    axis.set_ticks(range(len(names)), labels=shown, fontsize=9 if len(names) < 60 else 6, family="monospace")
    for name, tick in zip(shown, axis.get_ticklabels()):
        tick.set(color=COLORS["meta"] if name == "■" else "black", rotation=90 if axis.axis_name == "x" and len(name) > 1 else 0)


def labels(encoding, tokens):
    """Readable names of tokens: white space is shown, what is no character alone is its bytes in hexadecimal."""
    def label(token):
        if token >= encoding.n_vocab:
            return prepare.META
        piece = encoding.decode_single_token_bytes(token)
        text = piece.decode("utf-8", "replace").replace("\n", "↵").replace("\t", "→").replace(" ", "␣").replace("$", r"\$")
        return text if text.isprintable() and "\ufffd" not in text else piece.hex()
    return [label(token) for token in tokens]


# ----------------------------------------------------------------------------------------------------------------------
# The script

PARTS = {part.__name__: part for part in (sharpening, residual, attention, rate_distortion, perplexity)}
NEED_META = {"sharpening", "residual", "attention"}
NEED_TEXT = {"sharpening", "residual", "perplexity"}
DATA = ("dataset", "source", "text_field", "val_fraction", "max_tokens")


class Subject:
    """The model that is looked into, the validation text it reads, and where results go. Raises SystemExit."""

    def __init__(self, config, names):
        self.config, self.device = config, train.pick_device(config)[0]
        self.model, self.checkpoint = train.load_saved(config)
        self.path = train.checkpoint_path(config)
        self.commit = eval_synthetic.commit()  # now: what is written may itself be part of the repository
        self.folder, self.sha256 = folder_of(config, self.path), train.sha256_of_weights(self.model)
        self.label = config.label or label_of(self.checkpoint, self.path)
        self.encoding, self.data, self.blocks = prepare.get_tokenizer(config.tokenizer), None, None
        if self.model.config.meta_id is None and (lacking := [name for name in names if name in NEED_META]):
            raise config.error(f"what={config.what}: {', '.join(lacking)}: the checkpoint has no meta-tokens; it allows "
                               "--what=rate_distortion,perplexity")
        train.adopt_settings(config, self.checkpoint, ("meta_rate", "meta_placement", *(() if config.given("dataset") else DATA)))
        # of rate_distortion: without meta-tokens there is nothing to compare, and a tuned model has forgotten plain text
        self.compares_plain_text = self.model.config.meta_id is not None and "run" not in self.checkpoint
        if NEED_TEXT & {*names} or ("rate_distortion" in names and self.compares_plain_text):
            self.open_data()
        self.model.to(self.device).eval()

    def open_data(self):
        config, model = self.config, self.model.config
        manifest, folder = prepare.read_manifest(config), prepare.folder_of(config)
        if manifest["tokenizer"] != config.tokenizer:
            raise config.error(f"{folder} was written by tokenizer {manifest['tokenizer']}, but the checkpoint reads {config.tokenizer}")
        if (manifest["meta_per_block"] > 0) != (model.meta_id is not None):
            raise config.error(f"{folder} has {manifest['meta_per_block']} meta-tokens a block, but the checkpoint is one "
                               f"with{'out' * (model.meta_id is None)} meta-tokens: name another --dataset=")
        if model.pos == "absolute" and manifest["block_size"] > model.block_size:
            raise config.error(f"{folder} has blocks of {manifest['block_size']} tokens, but learned positions end at {model.block_size}")
        self.data = {"dataset": config.dataset} | {name: manifest[name] for name in ("block_size", "meta_per_block", "meta_placement")}
        self.data["sha256_of_shards"] = [shard["sha256"] for shard in manifest["splits"]["val"]["shards"]]
        self.blocks = train.Blocks(config, manifest, "val")

    def batches(self, desc):
        """analysis_blocks of the validation blocks, spread evenly over them all: (B, T) each."""
        numbers = np.unique(np.linspace(0, len(self.blocks) - 1, self.config.analysis_blocks).astype(int))
        for own in tqdm(batches_of(numbers, self.blocks.block_size), desc=desc, leave=False):
            yield self.blocks.batch(own)[0].to(self.device)


def folder_of(config, path):
    if train.is_pretrained(path) or config.typed("out_dir"):
        return os.path.join(config.out_dir, "analysis")
    if path.endswith(".pt"):
        return os.path.join(os.path.dirname(path), "analysis", *([] if train.stem(path) == "ckpt" else [train.stem(path)]))
    return os.path.join(path, "analysis")


def label_of(checkpoint, path):
    """The --label= that the model was tuned with, else the name of its file."""
    return checkpoint["settings"].get("label") or train.stem(path)


def write(subject, name, argv, findings, figure, summary):
    """<what>.json and <what>.png: each all of it, or nothing."""
    path = os.path.join(subject.folder, name)
    prepare.write_json(f"{path}.json", {
        "what": name, "summary": summary, "figures": findings, "command": shlex.join(["python", "analyze.py", *argv]),
        "checkpoint": {"path": subject.path, "step": subject.checkpoint["step"], "sha256_of_weights": subject.sha256},
        "model": asdict(subject.model.config), "data": subject.data, "commit": subject.commit, "device": str(subject.device),
        "torch": torch.__version__, "config": asdict(subject.config)})
    figure.savefig(f"{path}.png.tmp", format="png", dpi=100)
    os.replace(f"{path}.png.tmp", f"{path}.png")
    print(f"{name}: {summary[0]}\n{' ' * len(name)}  {summary[1]}", flush=True)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    config = settings.load(argv)
    names = config.parts(PARTS)
    try:
        subject = Subject(config, names)
        os.makedirs(subject.folder, exist_ok=True)
        for name in names:
            write(subject, name, argv, *PARTS[name](subject))
        print(f"written to {subject.folder}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the parts that are written stay") from None
    except BrokenExecutor:
        raise SystemExit("error: a worker was killed, for want of memory perhaps") from None
    except torch.OutOfMemoryError:
        raise SystemExit("error: the device has too little memory: try --device=cpu; the parts that are written stay") from None
    except OSError as e:
        raise SystemExit(f"error: {e.filename or config.out_dir}: {e.strerror}") from None


if __name__ == "__main__":
    main()
