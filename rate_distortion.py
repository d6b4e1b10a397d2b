"""Rate-distortion of hidden states (paper, section 5): a part of analyze.py.

How well does a state h predict y through a channel of limited rate? A variational
bottleneck is trained on frozen states,

    q(z|h) = N(mu(h), diag sigma^2(h)),    q(y|z) = softmax(W z + b),

to minimise distortion + beta * rate: E[-log q(y|z)] + beta * KL(q(z|h) || N(0, I)).
Each beta gives one point of a curve, measured on held-out examples.

Theorem 5.1 is about the best possible encoder. These are trained, and each curve lies
above the best one by an unknown amount: their order illustrates the theorem, it cannot
verify it.

Shapes: n examples, C width; H bottlenecks side by side, b examples a step, d size of z.
"""
import math
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import checkpoint as checkpoints
import eval_synthetic
import prepare
from model import GPT

import numpy as np
import torch
import torch.nn as nn
from matplotlib.figure import Figure
from torch.nn import functional as F
from tqdm import tqdm

LATENT = 32                          # d
BETAS = np.logspace(-3, 0, 10)       # the paper's 0.01 to 1, and smaller ones
CLASSES = 256                        # next tokens that are told apart; the rest are one class
TOKENS = 1 << 13                     # tokens of a batch


# --------------------------------------------------------------------------------------
# The bottleneck

def kl_to_prior(mu, log_var):
    """KL(N(mu, diag exp(log_var)) || N(0, I)) in nats: (..., d) -> (...)."""
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(-1)


class Bottlenecks(nn.Module):
    """H bottlenecks that share nothing. mu and log sigma^2 are linear in h."""

    def __init__(self, H, n_features, n_classes):
        super().__init__()
        encoder_bias = torch.zeros(H, 1, 2 * LATENT)
        encoder_bias[..., LATENT:] = -2.0  # log sigma^2: little noise at first
        self.encoder = nn.Parameter(
            0.3 * torch.randn(H, n_features, 2 * LATENT) / math.sqrt(n_features))
        self.encoder_bias = nn.Parameter(encoder_bias)
        self.decoder = nn.Parameter(torch.randn(H, LATENT, n_classes) / math.sqrt(LATENT))
        self.decoder_bias = nn.Parameter(torch.zeros(H, 1, n_classes))

    def forward(self, x, y):
        """Mean distortion and rate in nats, each (H,), of x (H, b, C) and y (H, b)."""
        encoded = torch.baddbmm(self.encoder_bias, x, self.encoder)        # (H, b, 2 d)
        mu, log_var = encoded.chunk(2, -1)                                 # (H, b, d)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)
        logits = torch.baddbmm(self.decoder_bias, z, self.decoder)         # (H, b, classes)
        distortion = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        return distortion.view(y.shape).mean(1), kl_to_prior(mu, log_var).mean(1)


@torch.no_grad()
def held_out(bottlenecks, x, y, draws=8):
    """Distortion and rate (2, H) of x (n, C) and y (n,), over several draws of z."""
    H, total = len(bottlenecks.encoder), 0
    for rows in torch.arange(len(x), device=x.device).split(256):
        for _ in range(draws):
            means = bottlenecks(x[rows].expand(H, -1, -1), y[rows].expand(H, -1))
            total = total + torch.stack(means) * len(rows)
    return total / len(x) / draws


def rate_distortion_curve(x, y, betas, seeds, steps, lr=2e-2, desc=None):
    """Train a bottleneck for each beta and seed, all at once; measure its best state.

    x and y hold states (n, C) and classes (n,) of "train", "validation" (to choose that
    state) and "test". Returns (distortion, rate) in nats, each (len(betas), seeds).
    """
    mean, std = x["train"].mean(0), x["train"].std(0).clamp(min=1e-6)
    x = {split: (states - mean) / std for split, states in x.items()}
    found = torch.cat([*y.values()]).unique()
    y = {split: torch.searchsorted(found, classes) for split, classes in y.items()}  # no gaps
    beta = torch.tensor(betas, dtype=torch.float32).repeat_interleave(seeds).to(mean.device)
    bottlenecks = Bottlenecks(len(beta), len(mean), len(found)).to(mean.device)
    optimizer = torch.optim.Adam(bottlenecks.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best = torch.full_like(beta, math.inf)
    best_state = {name: p.detach().clone() for name, p in bottlenecks.named_parameters()}
    for step in tqdm(range(1, steps + 1), desc=desc, leave=False, disable=desc is None):
        rows = torch.randint(len(x["train"]), (len(beta), 128), device=mean.device)
        distortion, rate = bottlenecks(x["train"][rows], y["train"][rows])
        optimizer.zero_grad()
        (distortion + beta * rate).sum().backward()
        optimizer.step()
        schedule.step()
        if step % max(steps // 20, 1) == 0:
            distortion, rate = held_out(bottlenecks, x["validation"], y["validation"], draws=2)
            objective = distortion + beta * rate
            better = objective < best
            best[better] = objective[better]
            for name, p in bottlenecks.named_parameters():
                best_state[name][better] = p.detach()[better]
    bottlenecks.load_state_dict(best_state)
    measured = held_out(bottlenecks, x["test"], y["test"])                 # (2, H)
    return measured.view(2, len(betas), seeds).cpu().numpy()


# --------------------------------------------------------------------------------------
# States, and what they are to predict

@torch.no_grad()
def inputs_of(model, idx, modules, zeroed=None):
    """What each module gets as the model reads idx (B, T): [(module, *args)], in order.

    zeroed: tokens whose input embedding becomes 0, bool (B, T).
    """
    seen = []
    hooks = [module.register_forward_pre_hook(lambda module, args: seen.append((module, *args)))
             for module in modules]
    if zeroed is not None:
        hooks.append(model.transformer.wte.register_forward_hook(
            lambda module, args, x: x.masked_fill(zeroed.unsqueeze(-1), 0)))
    try:
        model.hidden_states(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def final_states(model, idx):
    """The output of the last block, before ln_f: idx (B, T) -> (B, T, C)."""
    [(_, x)] = inputs_of(model, idx, [model.transformer.ln_f])
    return x


def batches_of(sequences, length):
    """Sequences of one length in batches of about TOKENS tokens, or one by one."""
    n = max(TOKENS // length, 1)
    return [sequences[i:i + n] for i in range(0, len(sequences), n)]


def joined(batches):
    """[{name: tensor (B, ...)}, ...] -> {name: tensor (sum of B, ...)}."""
    result = {}
    for name in batches[0]:
        result[name] = torch.cat([batch[name] for batch in batches])
    return result


@dataclass
class Reader:
    """A model, and the examples of List Recall that it reads."""
    model: GPT
    label: str
    stream: eval_synthetic.Stream


def label_of(checkpoint, path):
    """The --label= that the model was tuned with, else the name of its file."""
    return checkpoint["settings"].get("label") or checkpoints.stem(path)


def open_models(subject):
    """{label: (model, checkpoint)}: the model that is looked into, then --compare='s.

    Raises ValueError if one cannot be loaded, or two have one label.
    """
    opened = {subject.label: (subject.model, subject.checkpoint)}
    for path in filter(None, subject.config.compare.split(",")):
        checkpoint = checkpoints.load(path)
        label = label_of(checkpoint, path)
        if label in opened:
            raise ValueError(f"two models of one name, {label}: rename a file, or tune with "
                             "another --label=")
        opened[label] = checkpoints.build(checkpoint).to(subject.device).eval(), checkpoint
    return opened


def open_readers(subject):
    """(readers, length): the model that is looked into, then those of --compare=.

    All read the same prompts of up to `length` tokens, each with the marks that it was
    tuned on. Raises ValueError if they cannot.
    """
    config = subject.config
    readers, lengths = [], set()
    for label, (model, checkpoint) in open_models(subject).items():
        untuned = {"train_length": None, "stream": {
            "task": "list_recall", "placement": "task", "mark": model.config.meta_id,
            "tokenizer": config.tokenizer}}
        run = checkpoint.get("run", untuned)
        stream = eval_synthetic.Stream(**run["stream"] | {"seed": config.seed})
        if (stream.task, stream.tokenizer) != ("list_recall", config.tokenizer):
            raise ValueError(f"rate_distortion needs List Recall with tokenizer "
                             f"{config.tokenizer}, but {label} was tuned on {stream.task} with "
                             f"tokenizer {stream.tokenizer}")
        readers.append(Reader(model, label, stream))
        lengths.add(run["train_length"])
    lengths.discard(None)  # of models that were not tuned
    if len(lengths) > 1:
        raise ValueError(f"tuned at different lengths, {sorted(lengths)} tokens")
    [length] = lengths or [min(config.train_length, config.block_size)]
    shortest = eval_synthetic.min_length("list_recall", subject.encoding)
    if length < shortest:
        raise ValueError(f"train_length={length}: List Recall needs {shortest} tokens")
    return readers, length


def places_of(example, stream):
    """Where the states of an example of List Recall are taken: {name: positions}.

    "answer" predicts the answer's first token (of bytes, the one after its space). If
    lists have marks, three more have read the same text: "meta", the mark after the
    queried list; "text", the token before it, equally far from the answer in text
    tokens; and "mean", all the text up to there.
    """
    space = 1 if stream.tokenizer == "bytes" else 0
    places = {"answer": [len(example.tokens) - example.n_answer + space - 1]}
    if stream.mark is None or stream.placement not in ("task", "all"):
        return places
    mark, *others = np.flatnonzero(example.tokens == stream.mark)
    if stream.placement == "all":
        names = re.findall(r"^List (\w+):", example.prompt, re.MULTILINE)
        asked = re.search(r"of list (\w+)\?", example.prompt)[1]
        mark = [mark, *others][names.index(asked)]
    text = np.flatnonzero(example.tokens[:mark] != stream.mark)
    return places | {"meta": [mark], "text": [mark - 1], "mean": text}


def recall_features(reader, split, n, length, device, pool):
    """{name: (n, C)}: states of n examples, averaged over each of their places_of.

    Also "first" (n,), the answer's first token, and "y" (n,), its index in ITEMS.
    """
    features = {"first": [], "y": []}
    examples = eval_synthetic.draw_split(pool, reader.stream, split, length, n)
    for batch in tqdm(batches_of(examples, length), desc=f"{reader.label}: {split}", leave=False):
        x = eval_synthetic.collate(batch, length)[0].to(device)            # (B, T)
        for example, states in zip(batch, final_states(reader.model, x)):
            places = places_of(example, reader.stream)
            for name, positions in places.items():
                own = states[torch.as_tensor(positions, device=device)]    # (positions, C)
                features.setdefault(name, []).append(own.mean(0).cpu())
            first = example.tokens[places["answer"][0] + 1]
            features["first"].append(torch.tensor(first))
            word = eval_synthetic.ITEMS.index(example.answer.strip())
            features["y"].append(torch.tensor(word))
    return {name: torch.stack(values) for name, values in features.items()}


def next_token_features(model, blocks, numbers, n, device):
    """States at n places in plain text, each (n, C), and "y" (n,), the next text token.

    "meta": at a meta-token between two text tokens; "text": at the text token before
    it. Both have read the same text, and y is the next text token for both.
    """
    batches, found = [], 0
    numbers = np.random.default_rng(0).permutation(numbers)  # to cover all documents
    for own in batches_of(numbers, blocks.block_size):
        x, y = (tokens.to(device) for tokens in blocks.batch(own))         # (B, T)
        is_meta = x == blocks.meta_id
        is_behind_text = F.pad(~is_meta[:, :-1], (1, 0))
        at = is_meta & is_behind_text & (y != blocks.meta_id)
        before = F.pad(at[:, 1:], (0, 1))
        states = final_states(model, x)                                    # (B, T, C)
        batches.append({"meta": states[at].cpu(), "text": states[before].cpu(), "y": y[at].cpu()})
        found += len(batches[-1]["y"])
        if found >= n:
            break
    return {name: values[:n] for name, values in joined(batches).items()}


# --------------------------------------------------------------------------------------
# The part. A panel is a list of curves: (label, features by split, the states' name
# in these features, the classes' name)

def recall_panels(subject, sizes):
    """{title: panel} about List Recall: between models, and within the first."""
    config = subject.config
    readers, length = config.checked(open_readers, subject)
    features = [{} for _ in readers]
    workers = config.workers or min(prepare.cores(), 4)
    with ProcessPoolExecutor(workers, initializer=eval_synthetic.start_worker) as pool:
        for reader, own in zip(readers, features):
            for split, n in sizes.items():
                own[split] = recall_features(reader, split, n, length, subject.device, pool)
    title = f"List Recall in up to {length} tokens: the answer's first token, where it is predicted"
    panels = {title: [(reader.label, own, "answer", "first")
                      for reader, own in zip(readers, features)]}
    if "meta" in features[0]["train"]:
        title = f"List Recall: the answer, from long before it, in {subject.label}"
        panels[title] = [("the mark after the queried list", features[0], "meta", "y"),
                         ("the text token before the mark", features[0], "text", "y"),
                         ("mean over the text up to there", features[0], "mean", "y")]
    return panels


def plain_text_panel(subject, sizes):
    """The panel about plain text. Each split is a part of the validation blocks."""
    blocks, features = subject.blocks, {}
    ends = np.cumsum([0, *sizes.values()])
    cuts = (len(blocks) * ends // ends[-1]).tolist()
    if min(np.diff(cuts)) == 0:
        raise subject.config.error(f"{len(blocks)} validation blocks cannot be cut into three "
                                   "parts: prepare more with a higher --val_fraction=")
    for (split, n), start, stop in zip(sizes.items(), cuts, cuts[1:]):
        features[split] = next_token_features(subject.model, blocks, range(start, stop), n,
                                              subject.device)
    counts = torch.bincount(features["train"]["y"])
    frequent = counts.topk(min(CLASSES, len(counts))).indices
    class_of = torch.full((blocks.meta_id,), len(frequent))  # all others are one class
    class_of[frequent] = torch.arange(len(frequent))
    for own in features.values():
        own["y"] = class_of[own["y"]]
    return [("the meta-token", features, "meta", "y"),
            ("the text token before it", features, "text", "y")]


def measure_panel(title, panel, seeds, steps, device):
    """The panel's findings; its rates and distortions are arrays (betas, seeds)."""
    curves = {}
    for label, features, name_of_x, name_of_y in panel:
        x = {split: own[name_of_x].to(device) for split, own in features.items()}
        y = {split: own[name_of_y].to(device) for split, own in features.items()}
        distortion, rate = rate_distortion_curve(x, y, BETAS, seeds, steps, desc=label)
        curves[label] = {"rate": rate, "distortion": distortion}
    share = torch.bincount(y["test"]).double() / len(y["test"])
    entropy_of_y = torch.special.entr(share).sum().item()
    highest = [curve["rate"].mean(1).max() for curve in curves.values()]
    common = float(min(entropy_of_y, *highest))  # a rate that every curve reaches
    there = {}
    for label, curve in curves.items():
        rate, distortion = (curve[name].mean(1)[::-1] for name in ("rate", "distortion"))
        there[label] = float(np.interp(common, rate, distortion))
    return {"title": title, "examples": {split: len(classes) for split, classes in y.items()},
            "H(Y)": entropy_of_y, "rate": common, "distortion_at_rate": there, "curves": curves}


def draw_panel(ax, panel):
    """Distortion over rate: the mean of the seeds, and their range as a band."""
    lowest, entropy_of_y = math.inf, panel["H(Y)"]
    for i, (label, curve) in enumerate(panel["curves"].items()):
        rate, distortion = curve["rate"].mean(1), curve["distortion"]
        low, high = distortion.min(1), distortion.max(1)
        lowest = min(lowest, low.min())
        ax.plot(rate, distortion.mean(1), marker="o", markersize=3, color=f"C{i}", label=label)
        ax.fill_between(rate, low, high, color=f"C{i}", alpha=0.25, linewidth=0)
    ax.axhline(entropy_of_y, color="gray", linestyle="--", linewidth=1,
               label=f"no information: H(Y) = {entropy_of_y:.2f} nats")
    ax.axline((0, entropy_of_y), slope=-1, color="gray", linestyle=":",
              label="lower bound: H(Y) - rate")
    ax.set_title(panel["title"], fontsize="medium")
    ax.set(xlabel="rate: KL(q(z|h) || N(0, I)) (nats)",
           ylabel="held-out distortion: -log q(y|z) (nats)",
           xlim=(-0.1, 4 * entropy_of_y),
           ylim=(0.8 * min(lowest, entropy_of_y), 1.1 * max(lowest, entropy_of_y)))
    ax.legend(title=f"{panel['examples']['test']:,} held-out examples; band: range of "
              f"{distortion.shape[1]} seeds", fontsize="small")
    ax.grid(alpha=0.3)


def rate_distortion(subject):
    """The part of analyze.py: (findings, figure, summary)."""
    config, n = subject.config, subject.config.bottleneck_examples
    sizes = {"train": n, "validation": max(n // 4, 1), "test": max(n // 2, 1)}
    panels = recall_panels(subject, sizes)
    if subject.reads_plain_text:
        title = f"Plain text: the next text token, in {subject.label}"
        panels[title] = plain_text_panel(subject, sizes)
    torch.manual_seed(config.seed)
    measured = []
    for title, panel in panels.items():
        measured.append(measure_panel(title, panel, config.bottleneck_seeds,
                                      config.bottleneck_steps, subject.device))
    figure = Figure(figsize=(7.5 * len(measured), 5.5), layout="constrained")
    figure.suptitle("Frozen states of the last layer, before ln_f, through trained bottlenecks")
    for ax, panel in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured):
        draw_panel(ax, panel)

    said = []
    for panel in measured:
        there = panel["distortion_at_rate"].items()
        values = ", ".join(f"{label} {distortion:.3f}" for label, distortion in there)
        said.append(f"{panel['title']}, at rate {panel['rate']:.2f}: {values}")
    findings = {"betas": BETAS, "panels": measured}
    return findings, figure, f"held-out distortion (nats). {'; '.join(said)}"
