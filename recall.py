"""Two parts of analyze.py: do meta-tokens help to recall, and do they cache?

`recall` reads natural text, with no tuning and no marks. `cache` reads the prompts of a
model that eval_synthetic.py tuned, and hides what stands before the question.

Shapes: B sequences, T tokens, M meta-tokens, W text tokens in a window, C width.
"""
import math
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import config as settings
import eval_synthetic
import prepare
from model import GPT
from rate_distortion import Reader, batches_of, open_models

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F
from tqdm import tqdm

NUMBERS = 1 << 24                    # logits held at once: 64 MB


def text_of(found, *place):
    """An estimate as text; place: its index, if there are several."""
    mean, high = found["mean"][place], found["high"][place]
    return f"{mean:.3f} ± {high - mean:.3f}"


@torch.no_grad()
def text_losses(model, idx, targets):
    """Cross-entropy of each text target in nats: (B, T), NaN at meta-tokens."""
    rows = max(NUMBERS // model.config.vocab_size, 1)
    states, losses = model.hidden_states(idx).flatten(0, 1), []            # (B T, C)
    for h, y in zip(states.split(rows), targets.flatten().split(rows)):
        losses.append(F.cross_entropy(model.lm_head(h), y, reduction="none"))
    is_meta = targets == (-1 if model.config.meta_id is None else model.config.meta_id)
    return torch.cat(losses).view(targets.shape).masked_fill(is_meta, math.nan)


# --------------------------------------------------------------------------------------
# Recall in natural text: what does a bigram cost that has occurred before, by its
# distance ("associative recall hits": Zoology, Arora et al. 2023, arXiv 2312.04927)?

FIRST_COUNTED = 64                   # the text tokens before it have little to recall
MAX_LINES = 5                        # of a figure that one can still read


@dataclass
class Reading:
    """A model, and how many meta-tokens stand among the text of a window."""
    model: GPT
    n_meta: int
    placement: str


def text_per_window(readings):
    """W = T - M of the first model with meta-tokens.

    Without any, as if the first model had the paper's share of them.
    """
    for reading in readings:
        if reading.n_meta > 0:
            return reading.model.config.block_size - reading.n_meta
    T = readings[0].model.config.block_size
    return T - prepare.meta_per_block(settings.Config.meta_rate, T)


def open_readings(subject):
    """(W, {name: Reading}): text tokens in a window, and the models that read it.

    Models with meta-tokens are there twice, at the end without them. Raises ValueError
    if the models cannot read the same windows.
    """
    config, readings, without = subject.config, {}, {}
    for label, (model, checkpoint) in open_models(subject).items():
        saved, n_meta = checkpoint["settings"], 0
        if saved["tokenizer"] != config.tokenizer:
            raise ValueError(f"{label} reads tokens of {saved['tokenizer']}, but {subject.label} "
                             f"of {config.tokenizer}: compare models of one tokenizer")
        if model.config.meta_id is not None:
            rate = saved.get("meta_rate", config.meta_rate)
            n_meta = prepare.meta_per_block(rate, model.config.block_size)
        readings[label] = Reading(model, n_meta, saved.get("meta_placement", "random"))
        if n_meta > 0:
            without[f"{label}, no meta-tokens"] = Reading(model, 0, "random")
    W = text_per_window(list(readings.values()))
    for label, reading in readings.items():
        T, M = reading.model.config.block_size, reading.n_meta
        reading.n_meta = round(W * M / (T - M))  # as dense as in its own window
        if W + reading.n_meta > T:
            raise ValueError(f"{label} has a window of {T} tokens, too few for {W} text tokens "
                             f"and {reading.n_meta} meta-tokens")
    return W, readings | without


def read_windows(subject, W):
    """analysis_blocks windows of validation text, spread evenly over it: (n, W).

    Without the meta-tokens, a block's text goes on in the next block.
    """
    blocks, config = subject.blocks, subject.config
    n_text = len(blocks) * blocks.text_per_block
    if W <= FIRST_COUNTED or n_text < 2 * W:
        raise config.error(
            f"recall needs two windows of more than {FIRST_COUNTED} text tokens, but they have "
            f"{W}, and {prepare.folder_of(config.dataset)} has {n_text} to validate on")
    windows = []
    numbers = np.linspace(0, n_text // W - 1, config.analysis_blocks)
    for start in W * np.unique(numbers.astype(int)):
        first, skip = divmod(start, blocks.text_per_block)
        stop = first + math.ceil((skip + W) / blocks.text_per_block)
        tokens = blocks.batch(range(first, stop))[0].flatten().numpy()
        windows.append(tokens[tokens != blocks.meta_id][skip:skip + W])
    return np.stack(windows)


def distances_of(window):
    """How far back each bigram of W tokens occurred last; 0: never. (W - 1,)"""
    seen, distances = {}, []
    for place, bigram in enumerate(zip(window, window[1:])):
        distances.append(place - seen.get(bigram, place))
        seen[bigram] = place
    return distances


def losses_of(reading, text, seed, name):
    """The loss of each text token but a window's first: (n, W) -> (n, W - 1).

    Models with equally many meta-tokens have them at the same places.
    """
    (n, W), model, losses = text.shape, reading.model, []
    length, rng = W + reading.n_meta, np.random.default_rng(seed)
    places = prepare.meta_places(n, length, reading.n_meta, rng, reading.placement)
    tokens = text
    if reading.n_meta > 0:
        tokens = prepare.inject(text.flatten(), places, model.config.meta_id)
    tokens = torch.from_numpy(tokens).to(model.lm_head.weight.device)      # (n, length)
    for own in tqdm(batches_of(tokens, length), desc=name, leave=False):
        losses.append(text_losses(model, own[:, :-1], own[:, 1:]).cpu())
    return torch.cat(losses).double().numpy()[~places[:, 1:]].reshape(n, W - 1)


def ratio(sums, counts):
    """Means of all tokens, from the sums and counts of each window, (n, classes) both.

    95% intervals by the delta method for a ratio of two means: windows count as
    independent, the tokens of one do not.
    """
    n, total = len(sums), counts.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.sum(0) / total
        variance = ((sums - mean * counts)**2).sum(0) / total**2
        half = 1.96 * np.sqrt(variance * np.divide(n, n - 1))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def measure_recall(subject):
    """The findings: loss by class of distance, and each model's minus the first's."""
    W, readings = subject.config.checked(open_readings, subject)
    text = read_windows(subject, W)                                        # (n, W)
    edges = [1, *(2**i for i in range(5, 40) if 2**i < W - 1), W - 1]
    names = ["new", *(f"{low}-{high - 1}" for low, high in zip(edges, edges[1:]))]
    distances = np.array([distances_of(window) for window in text.tolist()])
    counted = slice(FIRST_COUNTED - 1, None)  # of W - 1: a window's first token has no loss
    classes = np.digitize(distances[:, counted], edges)  # 0: new
    is_class = classes == np.arange(len(names))[:, None, None]             # (classes, n, tokens)
    counts, sums = is_class.sum(-1).T, {}                                  # (n, classes)
    for name, reading in readings.items():
        losses = losses_of(reading, text, subject.config.seed, name)[:, counted]
        sums[name] = (losses * is_class).sum(-1).T                         # (n, classes)
    found, minus_first = {}, {}
    for name, own in sums.items():
        found[name] = ratio(own, counts)
        if name != subject.label:
            minus_first[name] = ratio(own - sums[subject.label], counts)
    return {"windows": len(text), "text_per_window": W, "classes": names,
            "tokens": counts.sum(0), "loss": found, "minus_first": minus_first}


def draw_recall(findings):
    """Differences to the first model by class, or the loss of a model that is alone."""
    first, names = next(iter(findings["loss"])), findings["classes"]
    curves, title = findings["minus_first"], f"Loss of {first} by distance"
    figure = Figure(figsize=(7, 5), layout="constrained")
    ax = figure.subplots()
    ax.set_ylabel(f"loss minus that of {first} (nats per text token)")
    if curves:
        other, curve = next(iter(curves.items()))
        title = (f"Loss of {other} minus that of {first}:\n{text_of(curve, 0)} on new bigrams,\n"
                 f"{text_of(curve, -1)} on those last seen {names[-1]} tokens before")
        ax.axhline(0, color="gray", linewidth=1)
    else:
        curves = findings["loss"]
        ax.set_ylabel("loss (nats per text token)")
    for i, (name, curve) in enumerate(list(curves.items())[:MAX_LINES]):
        x = np.arange(len(names)) + 0.08 * i  # side by side
        ax.errorbar(x, curve["mean"], curve["high"] - curve["mean"], fmt="o", capsize=3,
                    color=f"C{i}", label=name)
        ax.plot(x[1:], curve["mean"][1:], color=f"C{i}")
    shares = 100 * findings["tokens"] / findings["tokens"].sum()
    ticks = [f"{name}\n{share:.0f}%" for name, share in zip(names, shares)]
    ax.set_xticks(range(len(names)), labels=ticks)
    ax.set_title(title, fontsize="medium")
    ax.set_xlabel("text tokens since the bigram occurred last, and share of the text\n"
                  f"({findings['windows']} windows of {findings['text_per_window']} text tokens, "
                  "95% intervals over windows)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    return figure


def recall(subject):
    findings = measure_recall(subject)
    found, far = findings["loss"][subject.label], findings["classes"][-1]
    said = [f"{subject.label} {text_of(found, -1)} and {text_of(found, 0)}"]
    for name, difference in findings["minus_first"].items():
        said.append(f"{name}, minus that: {text_of(difference, -1)} and {text_of(difference, 0)}")
    return findings, draw_recall(findings), (
        f"loss of bigrams last seen {far} text tokens before, and of new ones (nats per text "
        f"token): {'; '.join(said)}")


# --------------------------------------------------------------------------------------
# Caching, the causal test: if a mark stores the text before it (paper, section 5),
# the answer survives when that text is hidden. As in gist masking (Mu et al., arXiv
# 2304.08467), queries from the question on see only some of the keys before it; but the
# model was not trained so. All else stays as it is: attention before the question, and
# meta-attention. So in List Recall the mark after "Answer:" still sees earlier marks
# by meta-attention, even under "nothing".

# The keys before the question that are visible, besides the first token. It always is,
# because models rest attention there that they have no use for. It has seen nothing but
# itself, so it cannot tell the answer.
CONDITIONS = {"everything": "all keys", "nothing": "none", "marks alone": "all marks",
              "random text": "as many random text tokens as there are marks",
              "queried unit": "the unit that the question is about, marks included"}


class Restriction:
    """Stands for a KVCache: gives attention a mask, and keeps nothing."""

    def __init__(self, is_before, is_visible):
        """bool (B, T): the queries that see all earlier keys, the keys others see."""
        T = is_before.size(1)
        is_causal = torch.ones(T, T, dtype=torch.bool, device=is_before.device).tril()
        mask = is_causal & (is_before.unsqueeze(2) | is_visible.unsqueeze(1))  # (B, T, T)
        self.mask = mask.unsqueeze(1)                                      # (B, 1, T, T)

    def advance(self, is_real):
        return torch.arange(is_real.size(1), device=is_real.device)        # (T,)

    def update(self, layer, k, v):
        return k, v, self.mask


def find_question(example, stream):
    """Which of an example's n tokens stand before the question, and which in the unit
    that it is about, marks included: bool (n,) each.
    """
    prompt, encoding = example.prompt, eval_synthetic.get_encoding(stream.tokenizer)
    question = prompt.rindex("\n") + 1  # the last line; each unit is a line, too
    name = re.search(r"(\w+)\?", prompt[question:])[1]
    unit = re.search(rf"^\w+ {name}: .*\n", prompt, re.MULTILINE)
    sizes = [0 if token == stream.mark else len(encoding.decode_single_token_bytes(token))
             for token in example.tokens]
    starts = np.cumsum(sizes) - sizes  # where in the text each token begins
    return starts < question, (starts >= unit.start()) & (starts < unit.end())


def visible_keys(example, stream, rng):
    """{condition: the keys visible from the question on, bool (n,)}, and is_before."""
    is_before, is_in_unit = find_question(example, stream)
    is_mark = is_before & (example.tokens == stream.mark)
    text = np.flatnonzero(is_before & ~is_mark)[1:]  # after the first token
    is_drawn = np.zeros_like(is_mark)
    is_drawn[rng.choice(text, is_mark.sum(), replace=False)] = True
    always = ~is_before
    always[0] = True
    keys = [is_before, np.zeros_like(is_mark), is_mark, is_drawn, is_in_unit]
    return {name: always | own for name, own in zip(CONDITIONS, keys)}, is_before


def stack(rows, T, device):
    """bool (n,) of several examples -> (B, T)"""
    return torch.stack([F.pad(torch.from_numpy(row), (0, T))[:T] for row in rows]).to(device)


@torch.no_grad()
def right_answers(reader, examples, length, device, seed):
    """{condition: which answers are right in every token, bool (n,)}

    As in eval_synthetic.measure, the right tokens stand before each that is predicted.
    """
    model, right = reader.model, {condition: [] for condition in CONDITIONS}
    rng = np.random.default_rng(seed)  # every model gets the same random text tokens
    for batch in tqdm(batches_of(examples, length), desc=reader.label, leave=False):
        x, at, y = eval_synthetic.collate(batch, length)                   # (B, T), (B, A) twice
        keys, is_before = zip(*[visible_keys(example, reader.stream, rng) for example in batch])
        is_before = stack(is_before, x.size(1), device)                    # (B, T)
        for condition in CONDITIONS:
            is_visible = stack([own[condition] for own in keys], x.size(1), device)
            caches = Restriction(is_before, is_visible), None  # None: of meta-attention
            states = eval_synthetic.answer_states(model, x, at, device, caches)
            logits = model.lm_head(states)[..., :model.config.text_vocab_size]  # (B, A, V)
            is_right = logits.argmax(-1).cpu() == y
            right[condition].append((is_right | (y < 0)).all(1))           # y < 0: padding
    return {condition: torch.cat(batches).numpy() for condition, batches in right.items()}


def open_tuned(subject):
    """(readers, length): models tuned on the same examples, of up to `length` tokens.

    Raises ValueError if they were not, or if they have no marks.
    """
    readers, tuned_on = [], set()
    for label, (model, checkpoint) in open_models(subject).items():
        if "run" not in checkpoint:
            raise ValueError(f"cache needs models tuned by eval_synthetic.py, which {label} is not")
        run = checkpoint["run"]
        stream, length = eval_synthetic.Stream(**run["stream"]), run["train_length"]
        if stream.mark is None:
            raise ValueError(f"cache needs marks, but {label} was tuned without")
        readers.append(Reader(model, label, stream))
        tuned_on.add(f"{stream.task}, placement {stream.placement}, tokenizer {stream.tokenizer}, "
                     f"{length} tokens")
    if len(tuned_on) > 1:
        raise ValueError(f"tuned on different examples: {'; '.join(sorted(tuned_on))}")
    return readers, length


def lengths_of(config, readers, train_length):
    """The length of tuning, then other ones in --eval_lengths=, if that is given."""
    lengths, task = [train_length], readers[0].stream.task
    if config.given("eval_lengths"):
        lengths += config.numbers("eval_lengths", int, "lengths in tokens, such as 128,256,512")
    encoding = eval_synthetic.get_encoding(readers[0].stream.tokenizer)
    shortest = eval_synthetic.min_length(task, encoding)
    if min(lengths) < shortest:
        raise config.error(f"eval_lengths={config.eval_lengths}: {task} needs {shortest} tokens")
    for c in [reader.model.config for reader in readers]:
        if c.pos == "absolute" and max(lengths) > c.block_size:
            raise config.error(f"eval_lengths={config.eval_lengths}, but learned positions end at "
                               f"{c.block_size}")
    return list(dict.fromkeys(lengths))


def share_of(right):
    """Exact match, with its 95% interval."""
    low, high = eval_synthetic.wilson(int(right.sum()), len(right))
    return {"exact": right.mean(), "low": low, "high": high}


def measure_cache(subject):
    """The findings: exact match by length, model and condition."""
    config = subject.config
    readers, train_length = config.checked(open_tuned, subject)
    by_length, workers = {}, config.workers or min(prepare.cores(), 4)
    with ProcessPoolExecutor(workers, initializer=eval_synthetic.start_worker) as pool:
        for length in lengths_of(config, readers, train_length):
            models = {}
            for reader in readers:
                examples = eval_synthetic.draw_split(
                    pool, reader.stream, "test", length, config.test_examples)
                right = right_answers(reader, examples, length, subject.device, config.seed)
                models[reader.label] = {name: share_of(own) for name, own in right.items()}
            by_length[length] = eval_synthetic.facts(examples) | {"models": models}
    return {"task": readers[0].stream.task, "placement": readers[0].stream.placement,
            "train_length": train_length, "conditions": CONDITIONS, "by_length": by_length}


def draw_cache(findings):
    """Exact match by condition: a panel for each length, a colour for each model."""
    by_length, places = findings["by_length"], np.arange(len(CONDITIONS))
    figure = Figure(figsize=(7, 1 + 3 * len(by_length)), layout="constrained")
    figure.suptitle(f"{findings['task']}, placement {findings['placement']}: what attention sees,\n"
                    "from the question on, of the tokens before it")
    axes = figure.subplots(len(by_length), 1, squeeze=False)[:, 0]
    for ax, (length, own) in zip(axes, by_length.items()):
        for i, (label, found) in enumerate(own["models"].items()):
            low, exact, high = (100 * np.array([point[name] for point in found.values()])
                                for name in ("low", "exact", "high"))
            shifted = places + 0.15 * (i - (len(own["models"]) - 1) / 2)
            ax.vlines(shifted, low, high, color=f"C{i}")
            ax.plot(shifted, exact, "o", color=f"C{i}", label=label)
        ax.axhline(100 * own["chance"], color="gray", linestyle=":", label="chance")
        ax.set_xticks(places, labels=CONDITIONS)
        ax.set(title=f"up to {length} tokens; {own['n']:,} test examples, 95% intervals",
               ylim=(-4, 104), ylabel="exact match (%)")
        ax.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize="small")
    return figure


def cache(subject):
    findings = measure_cache(subject)
    length = findings["train_length"]
    own, said = findings["by_length"][length], []
    for label, found in own["models"].items():
        shares = [f"{name} {100 * point['exact']:.1f}%" for name, point in found.items()]
        said.append(f"{label}: {', '.join(shares)}")
    return findings, draw_cache(findings), (
        f"exact match in up to {length} tokens, by what the question sees (chance "
        f"{100 * own['chance']:.1f}%). {'; '.join(said)}")
