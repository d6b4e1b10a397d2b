"""Fine-tune a trained model on a recall task, and measure what meta-tokens do there.

    python eval_synthetic.py config/quickstart.py --init_from=out --task=list_recall
    python eval_synthetic.py config/quickstart.py --init_from=out --task=all
    python results/plot_synthetic.py results/*.json     # a figure and tables

A meta-token is an extra token that pre-training scatters over the text and never
predicts; meta-attention is a second attention in each block, among meta-tokens only
(Shah et al., arXiv 2509.16278). Here meta-tokens mark places in a prompt.

The tasks are those of that paper's section 4 and appendix D. An example is a prompt and
its answer. A prompt consists of units (lists, bit strings or texts, each with a name)
and a question about one of them. Marks stand at some places in it. A mark is the
meta-token (--marker=meta), a token that the model never saw (fresh), or a plain '#'
(text). --placement says where the marks are:

    task      at the unit in question, as in the paper: they tell which unit matters
    all       at every unit alike: they tell nothing
    random    as many as with `task`, anywhere
    none      nowhere

In List Recall, `task` and `all` also have one after "Answer:".

The text of an example is the same whatever its marks. To make it so, its "length" is
the number of tokens with --placement=all; with fewer marks it has fewer than that.
"exact" is the share of examples whose answer is right in every token.

Writes results/<name>.json, and the fine-tuned model to <out_dir>/<name>.pt. The same
command resumes after a kill, and takes the same steps (unless --max_minutes is set).
"""
import copy
import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import NamedTuple

import config as settings
import checkpoint
import prepare
import train
from machine import Machine, StopRequest, duration, is_out_of_memory, processor
from model import rope_tables

import numpy as np
import torch
from torch.nn import functional as F

# Below, `config` is a Config: all settings. Of its methods, these are used here:
#   config.typed(name)             whether the command line has set it
#   config.checked(function, ...)  calls it, and turns a ValueError into config.error
#   config.error(message)          a SystemExit of one line, to be raised
#   config.numbers(name, ...)      the numbers in a setting such as 128,256,512

GO_ON = "the same command, without --overwrite, goes on"

# --------------------------------------------------------------------------------------
# The tasks: functions that draw a Unit. `word` is what Segment Counting counts.

# Behind a space each word is one token of GPT-2's BPE, and four of the byte tokenizer:
# the length of a text follows from its number of words.
WORDS = re.findall(r"\w+", """
act age aid aim air ale ape arc arm art ash axe bad bag bar bat bay bed bee bet big bin bit
bow box boy bud bug bus buy cab can cap car cat cop cow cry cub cup cut dad dam day den dig
dim dip dog dot dry due dug dye ear eat egg elf end eye fan far fat fax few fig fin fit fix
fly fog fox fry fun fur gap gas gem gum gut guy gym hat hay hen hip hit hop hot hub hut ice
ink inn jam jar jaw jet job joy jug kid kin kit lab lad lap law leg lid lip log lot low mad
man map mat mix mob mud mug nap net new nut oak odd oil old one orb ore owl own pad pan paw
pay pen pet pie pig pin pit pod pop pot raw ray red rib rim rod row rug run sad sap saw sea
set shy sip sit six ski sky son soy spy sub sum sun tab tag tan tap tar tax tea ten tie tin
tip toe ton top toy try tub tug two use van vet vow wax way web wet wig win wit yes zip zoo
""")
ITEMS = WORDS[::3]                                       # what lists and texts are made of
NAMES = [word for i, word in enumerate(WORDS) if i % 3]  # names of units
MARK = "\0"                                              # in a text: a mark may stand here


class Unit(NamedTuple):
    """A list, a bit string or a text, and a question about it."""
    text: str
    question: str
    answer: str
    offers: list   # plausible answers in this unit: see Example.chance


def draw_items(rng, n, word=None, count=0):
    """n items in random order: `word` count times, and others once each."""
    # Draw one more than needed, as `word` may be among them
    drawn = [ITEMS[i] for i in rng.choice(len(ITEMS), n - count + 1, replace=False)]
    others = [item for item in drawn if item != word]
    return rng.permutation(others[:n - count] + [word] * count).tolist()


def list_recall(name, word, rng):
    items = draw_items(rng, rng.integers(2, 7))
    i = rng.integers(len(items))
    return Unit(f"List {name}: {', '.join(items)}.{MARK}\n",
                f"Question: item {i + 1} of list {name}? Answer:{MARK}", f" {items[i]}", items)


def segment_counting(name, word, rng):
    """The word stands 0 to 4 times in the segment, and perhaps on either side of it."""
    count = rng.integers(5)
    n_before, count_before = rng.integers(1, 4), rng.integers(2)
    n_inside = rng.integers(4, 9)
    n_after, count_after = rng.integers(1, 4), rng.integers(2)
    before = " ".join(draw_items(rng, n_before, word, count_before))
    inside = " ".join(draw_items(rng, n_inside, word, count))
    after = " ".join(draw_items(rng, n_after, word, count_after))
    return Unit(f"List {name}: {before} [{MARK} {inside}{MARK} ] {after}.\n",
                f"Question: how often is {word} in the segment of list {name}? Answer:",
                f" {count}", [0, 1, 2, 3, 4])


def parity(name, word, rng):
    bits = rng.integers(2, size=rng.integers(1, 9))
    rest = rng.integers(2, size=rng.integers(1, 5))
    return Unit(f"Bits {name}: {' '.join(map(str, bits))} *{MARK} {' '.join(map(str, rest))}.\n",
                f"Question: parity of the bits before * in bits {name}? Answer:",
                f" {bits.sum() % 2}", [0, 1])


def copying(name, word, rng):
    lengths = rng.integers(1, 4), rng.integers(3, 7), rng.integers(1, 4)
    before, span, after = (" ".join(draw_items(rng, n)) for n in lengths)
    return Unit(f"Text {name}: {before} [{MARK} {span}{MARK} ] {after}.\n",
                f"Question: what is in brackets in text {name}? Answer:", f" {span}", [span])


TASKS = {task.__name__: task for task in (list_recall, segment_counting, parity, copying)}


# --------------------------------------------------------------------------------------
# One example

@dataclass(frozen=True)
class Stream:
    """What identifies a series of examples. `draw` draws them by number."""
    task: str
    placement: str      # of marks: 'task', 'all', 'random' or 'none', see above
    mark: int | None    # its id; None: no marks
    tokenizer: str
    seed: int           # of training examples alone


@dataclass
class Example:
    tokens: np.ndarray  # ids of prompt and answer, marks included
    n_answer: int       # how many of them, at the end, are the answer
    prompt: str         # without marks
    answer: str
    chance: float       # probability that a guess among all answers on offer is right


get_encoding = cache(prepare.get_tokenizer)


def length_of(text, encoding):
    """Tokens of a text, with a mark at every MARK."""
    return len(encoding.encode_ordinary(text.replace(MARK, ""))) + text.count(MARK)


@cache
def min_length(task, encoding):
    """The tokens of the longest unit with its question and answer.

    No example may be shorter, so that any unit fits. 500 draws are sure to have the
    longest: in every task, at least one draw in 45 is as long.
    """
    rng = np.random.default_rng(0)
    units = [TASKS[task](NAMES[0], ITEMS[0], rng) for _ in range(500)]
    return max(length_of(unit.text + unit.question + unit.answer, encoding) for unit in units)


def filler(n, rng, encoding):
    """A line of n tokens without information."""
    if n == 0:
        return ""
    # rest: 0 with GPT-2's BPE; with bytes up to 3, filled by newlines
    n_words, rest = divmod(n - 1, length_of(" cat", encoding))
    return "".join(f" {word}" for word in rng.choice(ITEMS, n_words)) + "\n" * (rest + 1)


def make_example(stream, shortest, longest, rng):
    """Draw an Example of shortest to longest tokens, uniformly, from a numpy Generator.

    The unit in question does not depend on the length: a longer text has more units, up
    to one for each of the 138 names (2,000 tokens of GPT-2's BPE), and a line of filler
    takes what room is left. With '#' for a mark, and placement 'task':

        List fox: pad, rod, car, run.
        List pet: vet, bug.
        List rim: ear, pie, elf, leg, ore, try.#
         mad due old car fin kin
        Question: item 3 of list rim? Answer:# elf
    """
    draw_unit, encoding = TASKS[stream.task], get_encoding(stream.tokenizer)
    name, *other_names = rng.permutation(NAMES).tolist()
    word = str(rng.choice(ITEMS))
    length = rng.integers(max(shortest, min_length(stream.task, encoding)), longest + 1)
    asked = draw_unit(name, word, rng)
    # Token counts add up: no token reaches across a MARK or the end of a line. (GPT-2's
    # "\n\n" does not arise: its BPE splits off the newline before the next line's text)
    room = length - length_of(asked.text + asked.question + asked.answer, encoding)

    others, offers = [], set(asked.offers)
    for other_name in other_names:
        other = draw_unit(other_name, word, rng)
        n_tokens = length_of(other.text, encoding)
        if n_tokens > room:
            break
        room -= n_tokens
        others.append(other.text)
        offers.update(other.offers)
    others.insert(rng.integers(len(others) + 1), filler(room, rng, encoding))
    i = rng.integers(len(others) + 1)  # the place of the unit in question

    parts = ["".join(others[:i]), asked.text, "".join(others[i:]), asked.question]
    # For each MARK: is it in the unit in question, or in the question itself?
    is_asked = np.repeat([False, True, False, True], [part.count(MARK) for part in parts])
    tokens = with_marks("".join(parts), is_asked, stream, rng)
    answer = encoding.encode_ordinary(asked.answer)
    prompt = "".join(parts).replace(MARK, "")
    return Example(np.append(tokens, answer), len(answer), prompt, asked.answer, 1 / len(offers))


def with_marks(text, is_asked, stream, rng):
    """The ids of a text, with marks where the stream's placement wants them.

    is_asked: for each MARK in the text, whether placement 'task' wants it.
    """
    encoding = get_encoding(stream.tokenizer)
    pieces = [encoding.encode_ordinary(piece) for piece in text.split(MARK)]
    tokens = np.concatenate(pieces).astype(int)
    if stream.mark is None or stream.placement == "none":
        return tokens
    places = np.cumsum([len(piece) for piece in pieces[:-1]])  # tokens before each MARK
    if stream.placement != "all":
        places = places[is_asked]
    if stream.placement == "random":  # as many, but anywhere after the first token
        places = rng.permutation(len(tokens))[:len(places)] + 1
    return np.insert(tokens, places, stream.mark)


# --------------------------------------------------------------------------------------
# Streams of examples

SPLITS = ("train", "validation", "test")
TEST_SEED = 0  # of validation and test: all runs have the same


def split_of(prompt):
    """Half of all prompts are for training. The text decides: none is in two splits."""
    digest = hashlib.blake2b(prompt.encode()).digest()
    return ("train", "train", "validation", "test")[digest[0] % 4]


def draw(stream, split, longest, number, exactly=None):
    """Example `number` of a split, of more than longest/2 and at most longest tokens.

    If `exactly` is given, it has that length, and `longest` is used in the seed alone.
    An example depends on these arguments only. It is drawn again until it is in the
    split.
    """
    bounds = (longest // 2 + 1, longest) if exactly is None else (exactly, exactly)
    seed = stream.seed if split == "train" else TEST_SEED
    for attempt in itertools.count():
        rng = np.random.default_rng([seed, SPLITS.index(split), longest, number, attempt])
        example = make_example(stream, *bounds, rng)
        if split_of(example.prompt) == split:
            return example


class Request(NamedTuple):
    """What a worker process is to draw: arguments of `draw`, for several numbers."""
    stream: Stream
    split: str
    longest: int
    numbers: range
    exactly: int | None = None


def draw_all(request):
    stream, split, longest, numbers, exactly = request
    return [draw(stream, split, longest, number, exactly) for number in numbers]


def draw_split(pool, stream, split, length, n):
    """The first n examples of a split."""
    parts = [range(i, min(i + 32, n)) for i in range(0, n, 32)]
    requests = [Request(stream, split, length, numbers) for numbers in parts]
    drawn = prepare.ordered_map(pool, draw_all, requests, ahead=64)  # (request, examples)
    return [example for _, examples in drawn for example in examples]


def start_worker():
    """Make a worker end with its parent, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def end_with_parent():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def collate(examples, longest):
    """A batch (x, at, y) of int64 tensors. x (B, T): the tokens, padded at the right.
    at (B, A): the positions that predict the answers. y (B, A): the answers, then -1.

    T is rounded up to a multiple of 16, within `longest`, and A to a multiple of 8.
    """
    T, A = max(len(e.tokens) for e in examples), max(e.n_answer for e in examples)
    T, A = min(16 * math.ceil(T / 16), longest), 8 * math.ceil(A / 8)
    x = torch.zeros(len(examples), T, dtype=torch.long)
    at = torch.zeros(len(examples), A, dtype=torch.long)
    y = torch.full_like(at, -1)
    for i, e in enumerate(examples):
        n = len(e.tokens) - 1  # the last token is predicted, never read
        x[i, :n] = torch.from_numpy(e.tokens[:-1])
        at[i, :e.n_answer] = torch.arange(n - e.n_answer, n)
        y[i, :e.n_answer] = torch.from_numpy(e.tokens[-e.n_answer:])
    return x, at, y


# --------------------------------------------------------------------------------------
# Model and mark

def open_model(config):
    """(model, mark, identity): the model, on the CPU; its mark's id, or None; and which
    checkpoint it is. Raises SystemExit if model and mark do not go together.
    """
    torch.manual_seed(config.seed)  # for the meta-attention that --add_meta makes
    # The model in out_dir, or in a typed --init_from=, with a typed block_size,
    # yarn_scale ... This also sets config.tokenizer.
    model, saved, path = train.load_saved(config)
    identity = {"path": os.path.normpath(path), "step": saved["step"],
                "seed": saved["settings"].get("seed"),
                "sha256_of_weights": checkpoint.sha256_of_weights(model)}
    encoding = get_encoding(config.tokenizer)
    if config.add_meta:
        if model.config.meta_id is not None:
            raise config.error(f"add_meta={config.add_meta}, but the checkpoint has meta-tokens")
        # A config file's meta_attention was for pre-training. Only a typed one counts.
        wants_attention = True
        if config.typed("meta_attention"):
            wants_attention = config.meta_attention
        model = model.with_meta_tokens(encoding.n_vocab, wants_attention)
    for name in ("zero_meta_pos", "zero_meta_embd"):
        if getattr(config, name) and model.config.meta_id is None:
            raise config.error(f"{name}=True, but the checkpoint has no meta-tokens")
    mark = None
    marker = "none" if config.placement == "none" else config.marker
    if marker == "meta":
        mark = model.config.meta_id
        if mark is None:
            raise config.error(f"marker={marker}, but the checkpoint has no meta-tokens: give it "
                               "some by --add_meta, or choose another")
    elif marker == "text":
        mark = encoding.encode_ordinary("#")[0]
    elif marker == "fresh":
        mark = encoding.n_vocab + 1  # the meta-token's id is n_vocab
        model = with_fresh_token(model, mark)
    return model, mark, identity


@torch.no_grad()
def with_fresh_token(model, token):
    """Give the model a token it never saw, embedded as the mean of the text rows."""
    if token >= model.config.vocab_size:
        # Only OpenAI's GPT-2 gets here: models trained by train.py have rows to spare.
        # Let with_meta_tokens enlarge the embedding, then forget the meta-token.
        model = model.with_meta_tokens(token, meta_attention=False)
        model.config.meta_id = None
    wte = model.transformer.wte.weight
    wte[token] = wte[:model.config.text_vocab_size].mean(0)
    return model


# --------------------------------------------------------------------------------------
# Measurement. A row of a result measures the fine-tuned model at one length:
#   full               as it is
#   no_pos             meta-tokens have no position (RoPE: 0) in both attentions
#   no_pos_meta        they are at position 0 in meta-attention alone
#   no_embed           their input embedding is zero
#   no_meta_attention  meta-attention is skipped
#   no_meta            the marks are taken out of the prompts

# Settings of model.config. hidden_states reads them each time: nothing is built anew.
ABLATIONS = {"no_pos": {"zero_meta_pos": True}, "no_embed": {"zero_meta_embd": True},
             "no_meta_attention": {"meta_attention": False}}


def possible_rows(model, mark):
    """The rows that make a difference, for this model and its mark's id."""
    c = model.config
    is_meta = mark is not None and mark == c.meta_id
    possible = {"full": True, "no_pos": is_meta and c.pos != "none",
                "no_pos_meta": is_meta and c.meta_attention and c.pos == "rope",
                "no_embed": is_meta, "no_meta_attention": is_meta and c.meta_attention,
                "no_meta": mark is not None}
    return [row for row in possible if possible[row]]


@contextmanager
def ablated(model, row):
    """Change the model as the row says, inside the `with` block."""
    whole, hooks = model.config, []
    model.config = replace(whole, **ABLATIONS.get(row, {}))
    if row == "no_pos_meta":
        # Block calls meta_attn(x, rope, cache). Give it x, the rope of position 0, and
        # no cache, as none is in use. Its shape, (1, 1, 1, hs/2), serves all of them
        position = torch.zeros(1, 1, device=model.lm_head.weight.device)
        rope = rope_tables(whole, position)
        hooks = [block.meta_attn.register_forward_pre_hook(lambda _, args: (args[0], rope))
                 for block in model.transformer.h]
    try:
        yield
    finally:
        model.config = whole
        for hook in hooks:
            hook.remove()


def answer_states(model, x, at, device, caches=None):
    """Hidden states (B, A, C) of x (B, T) at positions `at` (B, A), both on the CPU.

    caches: see GPT.hidden_states. Only recall.py gives any, to hide tokens.
    """
    n_meta = 0
    if model.config.meta_id is not None:
        # The most that any example has. hidden_states would count on the GPU, and wait
        n_meta = int((x == model.config.meta_id).sum(1).max())
    h = model.hidden_states(x.to(device, non_blocking=True), n_meta, caches)  # (B, T, C)
    at = at.to(device, non_blocking=True).unsqueeze(-1)                  # (B, A, 1)
    return h.gather(1, at.expand(-1, -1, h.size(-1)))                    # (B, A, C)


EVAL_TOKENS = 16384  # in a batch, with padding


@torch.no_grad()
def measure(model, examples, longest, machine):
    """Is each token of an answer the likeliest, given the right ones before it?

    Returns (correct, token_accuracy, loss): bool (n,), which answers are right in every
    token; the share of tokens that are right; nats a token.
    """
    model.eval()
    correct, hits, count, loss = np.zeros(len(examples), dtype=bool), 0, 0, 0.0
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    batch_size = max(EVAL_TOKENS // longest, 1)
    for start in range(0, len(examples), batch_size):
        batch = by_length[start:start + batch_size]
        x, at, y = collate([examples[i] for i in batch], longest)
        with machine.autocast():
            logits = model.lm_head(answer_states(model, x, at, machine.device))
        logits = logits[..., :model.config.text_vocab_size].float()      # (B, A, V)
        y = y.to(machine.device)
        is_answer, is_hit = y >= 0, logits.argmax(-1) == y
        correct[batch] = (is_hit | ~is_answer).all(1).cpu().numpy()
        hits, count = hits + is_hit.sum().item(), count + is_answer.sum().item()
        loss += F.cross_entropy(logits[is_answer], y[is_answer], reduction="sum").item()
    model.train()
    return correct, hits / count, loss / count


def measure_row(model, row, examples, length, mark, machine):
    """One row of a result. "correct" has a bit for each example, in hexadecimal."""
    if row == "no_meta":  # out of distribution: the model was tuned with marks
        examples = [replace(e, tokens=e.tokens[e.tokens != mark]) for e in examples]
    with ablated(model, row):
        correct, token_accuracy, _ = measure(model, examples, length, machine)
    exact, (low, high) = float(correct.mean()), wilson(int(correct.sum()), len(correct))
    print(f"  {row:<18} exact {100 * exact:5.1f}% ({100 * low:.1f} to {100 * high:.1f}), tokens "
          f"{100 * token_accuracy:5.1f}%", flush=True)
    return {"row": row, "length": length, "by": "teacher forcing", "n": len(correct),
            "exact": exact, "low": low, "high": high, "token_accuracy": token_accuracy,
            "out_of_distribution": row == "no_meta",
            "correct": np.packbits(correct).tobytes().hex()}


def wilson(hits, n):
    """95% interval of a share (Wilson 1927)."""
    z, p = 1.96, hits / n
    middle, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


# --------------------------------------------------------------------------------------
# Fine-tuning. It has phases of equally many steps (or minutes), each on longer examples
# than the one before. Phase 256 has examples of 129 to 256 tokens. Phases double from
# 64 on, and the last one is train_length.

PHASES = [64 << i for i in range(24)]
TUNE_TOKENS = 32768                    # in a micro-batch: about 20 GB for GPT-2
SOLVED = 0.99                          # exact match in validation at which --stop_solved stops


@dataclass
class Progress:
    """How far fine-tuning has come; part of its checkpoints."""
    step: int = 0
    minutes: float = 0.0
    phase: int = 0      # of the last step
    history: list = field(default_factory=list)  # an entry for each validation
    losses: list = field(default_factory=list)   # of the steps since the last one

    def train_loss(self):
        """The mean of the losses. Fetches each from the device only once."""
        self.losses = [float(loss) for loss in self.losses]
        return sum(self.losses) / max(len(self.losses), 1)


def requests(run, progress):
    """Yield a Request for every step to come.

    All examples of a step have one length, which saves padding: one between half the
    phase's longest and its longest. This runs up to 32 steps ahead of training. With
    max_minutes it chooses the phase by the time that has passed when it makes the
    request. So a phase may begin up to 32 steps late.
    """
    config = run.config
    n, shortest = config.task_batch_size, min_length(config.task, get_encoding(config.tokenizer))
    for step in range(progress.step, run.steps):
        share_done = step / run.steps
        if config.max_minutes:
            share_done = max(share_done, progress.minutes / config.max_minutes)
        phase = run.phases[min(int(share_done * len(run.phases)), len(run.phases) - 1)]
        rng = np.random.default_rng([config.seed, step])
        length = int(rng.integers(max(phase // 2 + 1, shortest), phase + 1))
        numbers = range(step * n, (step + 1) * n)
        yield Request(run.stream, "train", longest=phase, numbers=numbers, exactly=length)


def micro_losses(model, x, at, y, machine):
    """A batch's loss, in parts that fit the memory, each weighted by its tokens."""
    n_rows, n_targets = max(TUNE_TOKENS // x.size(1), 1), int((y >= 0).sum())
    for own_x, own_at, own_y in zip(x.split(n_rows), at.split(n_rows), y.split(n_rows)):
        share = int((own_y >= 0).sum()) / n_targets
        with machine.autocast():
            h = answer_states(model, own_x, own_at, machine.device)     # (B, A, C)
            loss = model.loss(h, own_y.to(machine.device, non_blocking=True))
        yield loss * share  # not inside autocast: the caller now runs the backward pass


def fine_tune(run, saved, pool, machine):
    """Take the steps that are left. Returns the history of validation.

    Meanwhile the pool draws the examples of the next 32 steps. Raises SystemExit when a
    signal asks to stop, or when the loss is no longer finite.
    """
    config, model = run.config, run.model
    optimizer = model.configure_optimizer(
        config.task_lr, config.weight_decay, (config.beta1, config.beta2))
    scaler = torch.amp.GradScaler(machine.type, enabled=machine.dtype == torch.float16)
    progress = Progress()
    if saved:
        checkpoint.load_optimizer(optimizer, scaler, saved)
        progress = Progress(**saved["progress"])
    validation = draw_split(
        pool, run.stream, "validation", config.train_length, config.val_examples)
    batches = prepare.ordered_map(pool, draw_all, requests(run, progress), ahead=32)
    started = time.monotonic() - 60 * progress.minutes
    first_step, first_minutes = progress.step, progress.minutes
    stop_request, norm = StopRequest(), 0.0
    model.train()
    while True:
        step = progress.step
        progress.minutes = (time.monotonic() - started) / 60
        if step % config.log_interval == 0 and step > first_step:
            minutes_a_step = (progress.minutes - first_minutes) / (step - first_step)
            print_step(run, progress, minutes_a_step)
        is_over = step >= run.steps or 0 < config.max_minutes <= progress.minutes
        is_validation_due = is_over or step % config.val_interval == 0
        # False at step 0, and just after resuming from a validation: that state needs
        # neither validation nor saving
        has_new_steps = len(progress.losses) > 0
        if is_validation_due and has_new_steps:
            exact, loss = validate(model, validation, progress, config.train_length, machine)
            is_solved = exact >= SOLVED and progress.phase == run.phases[-1]
            is_over = is_over or (config.stop_solved and is_solved)
            save(run, optimizer, scaler, progress, loss, float(norm), is_over)
        if stop_request.signal:
            if has_new_steps and not is_validation_due:  # else saved above, or nothing new
                save(run, optimizer, scaler, progress, progress.train_loss(), float(norm), is_over)
            raise SystemExit(f"stopped at step {step}; {GO_ON} from there")
        if is_over:
            break

        request, examples = next(batches)
        progress.phase = request.longest
        lr = train.learning_rate(
            step, progress.minutes, peak=config.task_lr, floor=config.task_lr / 10,
            warmup=min(config.task_warmup, run.steps // 10), steps=run.steps,
            max_minutes=config.max_minutes)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if config.dropout > 0:
            train.seed_dropout(config.seed, step)
        losses = micro_losses(model, *collate(examples, progress.phase), machine)
        loss, norm = train.optimizer_step(losses, model, optimizer, scaler, config.grad_clip)
        progress.losses.append(loss)
        progress.step += 1
    stop_request.restore()
    return progress.history


def print_step(run, progress, minutes_a_step):
    minutes_left = (run.steps - progress.step) * minutes_a_step
    if run.config.max_minutes:
        minutes_left = min(minutes_left, run.config.max_minutes - progress.minutes)
    width = len(str(run.steps))
    print(f"step {progress.step:>{width}}/{run.steps} | length {progress.phase} | "
          f"loss {progress.train_loss():.4f} | ETA {duration(60 * minutes_left)}", flush=True)


def validate(model, examples, progress, length, machine):
    """Add an entry to the history. Returns its exact match and its loss."""
    correct, token_accuracy, loss = measure(model, examples, length, machine)
    exact = float(correct.mean())
    progress.history.append({
        "step": progress.step, "minutes": progress.minutes, "phase": progress.phase,
        "exact": exact, "token_accuracy": token_accuracy, "loss": loss,
        "train_loss": progress.train_loss()})
    progress.losses.clear()
    print(f"step {progress.step}: validation at {length}: exact {100 * exact:.1f}%, tokens "
          f"{100 * token_accuracy:.1f}%, loss {loss:.3f}", flush=True)
    return exact, loss


def save(run, optimizer, scaler, progress, loss, norm, is_over):
    """Save all that a resumed run needs, unless loss or gradient are not finite."""
    if train.diverged(loss, norm, scaler):
        raise SystemExit(f"error: the loss is {loss}, the gradient's norm {norm} at step "
                         f"{progress.step}: the last good state is kept; try a lower --task_lr")
    checkpoint.save(run.checkpoint, {
        "model": run.model.state_dict(), "model_config": asdict(run.model.config),
        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
        "settings": asdict(run.config), "run": run.identity, "label": run.label,
        "step": progress.step, "progress": asdict(progress), "finished": is_over}, GO_ON)


# --------------------------------------------------------------------------------------
# A run, and its files

FORMAT = "synthetic tasks 1"
# Settings that change the fine-tuned model, and those that change only what is measured
TUNED_BY = ("seed", "train_length", "phase_steps", "task_batch_size", "task_lr", "task_warmup",
            "val_interval", "val_examples", "max_minutes", "weight_decay", "beta1", "beta2",
            "grad_clip", "dropout", "stop_solved")
MEASURED_BY = ("eval_lengths", "rows", "test_examples")
MARKED = {"meta": "with meta-tokens", "fresh": "with a fresh token", "text": "with #",
          "none": "without marks"}


class Run:
    """One task for one model and mark. Raises SystemExit for what cannot be run."""

    def __init__(self, config):
        self.config = config
        self.model, mark, self.pretrained = open_model(config)
        self.marker, self.placement = config.marker, config.placement
        if mark is None:
            self.marker, self.placement = "none", "none"
        self.stream = Stream(config.task, self.placement, mark, config.tokenizer, config.seed)
        shortest = min_length(config.task, get_encoding(config.tokenizer))
        self.phases = [length for length in PHASES if shortest <= length < config.train_length]
        self.phases.append(config.train_length)
        self.steps = config.phase_steps * len(self.phases)
        self.lengths = config.numbers("eval_lengths", int, "lengths in tokens, such as 128,256,512")
        possible = possible_rows(self.model, mark)
        self.rows = possible if config.rows == "all" else config.rows.split(",")
        self.check(shortest, possible)

        self.label = config.label
        if not self.label:
            self.label = f"{checkpoint.stem(self.pretrained['path'])} {MARKED[self.marker]}"
        name = (f"{self.label}_{config.task}_{self.placement}_{self.marker}_{config.train_length}"
                f"_s{self.pretrained['seed']}_{config.seed}")
        name = re.sub(r"[^\w.-]+", "_", name)
        self.result = f"results/{name}.json"
        self.checkpoint = os.path.join(config.out_dir, f"{name}.pt")
        self.identity = {setting: getattr(config, setting) for setting in TUNED_BY}
        self.identity |= {"stream": asdict(self.stream), "pretrained": self.pretrained,
                          "model": asdict(self.model.config)}

    def check(self, shortest, possible):
        """Refuse a length or a row that is not possible."""
        config, c = self.config, self.model.config
        used = {"train_length": config.train_length, "eval_lengths": min(self.lengths)}
        for name, length in used.items():
            if length < shortest:
                raise config.error(f"{name}={length} is too short: {config.task} needs "
                                   f"{shortest} tokens")
        if c.pos == "absolute" and config.train_length > c.block_size:
            raise config.error(f"train_length={config.train_length}, but there are learned "
                               f"positions for {c.block_size}")
        for row in set(self.rows) - set(possible):
            raise config.error(f"rows={config.rows}: {row} is not among what this model and "
                               f"marker allow: {', '.join(possible)}")

    def go(self, pool, machine):
        """Fine-tune, measure and write the result, or resume what was begun."""
        config = self.config
        os.makedirs("results", exist_ok=True)
        os.makedirs(config.out_dir, exist_ok=True)
        _lock = self.lock()  # until this function ends
        result = self.find(self.result, read_result)
        if result and all(result["config"][name] == getattr(config, name) for name in MEASURED_BY):
            print(f"{self.result} is there already")
            return
        # If only what is measured differs, the finished model is found below
        print(f"{self.result}: {self.steps} steps, phases {', '.join(map(str, self.phases))}",
              flush=True)
        saved = self.find(self.checkpoint, checkpoint.load)
        if saved:
            self.model.load_state_dict(saved["model"])
            print(f"going on from step {saved['step']}")
        self.model.to(machine.device)
        if saved and saved["finished"]:
            history = saved["progress"]["history"]
        else:
            history = fine_tune(self, saved, pool, machine)
        self.measure_all(history, pool, machine)

    def lock(self):
        """Keep other processes from these files while what this returns is kept."""
        return prepare.lock(f"{self.result}.lock", f"{self.result} is being made by another "
                            "process: wait for it, or name another --label=")

    def forget(self):
        """Remove what an earlier run left in these files."""
        os.makedirs("results", exist_ok=True)
        _lock = self.lock()
        for path in (self.result, self.checkpoint):
            with suppress(FileNotFoundError):
                os.remove(path)

    def find(self, path, load):
        """What an earlier run with the same settings left in a file, or None."""
        if not os.path.exists(path):
            return None
        found = self.config.checked(load, path)
        # "a b" and "a_b" have the same file name. Older checkpoints have no label
        is_label_same = found.get("label", self.label) == self.label
        if found.get("run") != self.identity or not is_label_same:
            raise SystemExit(f"error: {path} is of other settings: name another --label=, or "
                             "--overwrite it")
        return found

    def measure_all(self, history, pool, machine):
        """Measure all rows at all lengths, and write the result."""
        config, c, tests, rows = self.config, self.model.config, {}, []
        for length in self.lengths:
            print(f"{length} tokens", flush=True)
            if c.pos == "absolute" and length > c.block_size:
                impossible = f"learned positions end at {c.block_size}"
                rows.append({"row": "full", "length": length, "impossible": impossible})
                continue
            examples = draw_split(pool, self.stream, "test", length, config.test_examples)
            tests[str(length)] = facts(examples)
            rows += [measure_row(self.model, row, examples, length, self.stream.mark, machine)
                     for row in self.rows]
        prepare.write_json(self.result, {
            "format": FORMAT, "label": self.label, "task": config.task,
            "placement": self.placement, "marker": self.marker,
            "train_length": config.train_length, "pretrained": self.pretrained,
            "seeds": {"pretraining": self.pretrained["seed"], "fine-tuning": config.seed,
                      "test": TEST_SEED},
            "commit": commit(),
            "hardware": {"device": machine.name(), "processor": processor(),
                         "cores": os.cpu_count(), "dtype": machine.dtype_name(),
                         "torch": torch.__version__},
            "validation": history,
            "tests": tests, "rows": rows, "run": self.identity, "config": asdict(config)})
        print(f"written to {self.result}")


def facts(examples):
    """What a result says about the test examples of one length."""
    [(_, most_frequent)] = Counter(e.answer for e in examples).most_common(1)
    prompts = "\n".join(e.prompt for e in examples)
    return {"n": len(examples), "chance": float(np.mean([e.chance for e in examples])),
            "majority": most_frequent / len(examples),
            "mean_tokens": float(np.mean([len(e.tokens) for e in examples])),
            "sha256_of_prompts": prepare.sha256(prompts.encode())}


def read_result(path):
    """A file that this script wrote. Raises SystemExit for anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
        result["run"].pop("trial_steps", None)  # a setting of an older version
        version = result["format"]
        for name in ("label", "task", "placement", "seeds", "tests", "rows", "config"):
            result[name]  # or a KeyError
    except OSError:
        raise SystemExit(f"error: no result {path}: write one with python eval_synthetic.py "
                         "--task=...") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        version = None
    if version != FORMAT:
        raise SystemExit(f"error: {path} is not a result of eval_synthetic.py, or not of the "
                         f"format '{FORMAT}'")
    return result


def commit():
    """The commit of this code, "-dirty" added if it was changed; None if unknown."""
    folder = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# --------------------------------------------------------------------------------------
# The script

# What --help lists: all settings of a group, and these
GROUPS = (settings.Tasks, "meta_attention", "init_from", "out_dir", "overwrite", "max_minutes",
          "weight_decay", "beta1", "beta2", "grad_clip", "dropout", "block_size", "yarn_scale",
          "zero_meta_pos", "zero_meta_embd", "log_interval", "seed", "workers", "device", "dtype")


def main(argv=None):
    config = settings.load(argv, GROUPS, __doc__)
    if "WORLD_SIZE" in os.environ:
        raise SystemExit("error: fine-tuning runs in one process: start it with python alone")
    machine = config.checked(Machine, config.device, config.dtype)
    tasks = TASKS if config.task == "all" else [config.task]
    markers, workers = config.marker.split(","), config.workers or prepare.cores()
    try:
        with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
            runs = []  # all are checked before the first begins
            for task, marker in itertools.product(tasks, markers):
                own = copy.copy(config)
                own.task, own.marker = task, marker
                if config.label and len(markers) > 1:
                    own.label = f"{config.label} {marker}"
                runs.append(Run(own))
            if config.overwrite:  # at once, so that the same command without it resumes
                for run in runs:
                    run.forget()
            while runs:
                runs.pop(0).go(pool, machine)  # popped, so that its model is then freed
    except KeyboardInterrupt:
        raise SystemExit(f"error: interrupted; {GO_ON}") from None
    except BrokenExecutor:
        raise SystemExit("error: a worker was killed, perhaps for lack of memory: try fewer "
                         f"--workers; {GO_ON}") from None
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        raise SystemExit(f"error: {machine.name()} has too little memory: try a shorter "
                         "--train_length, or a smaller --task_batch_size") from None
    except OSError as e:
        raise SystemExit(f"error: {e.filename or config.out_dir}: {e.strerror}") from None


if __name__ == "__main__":
    main()
