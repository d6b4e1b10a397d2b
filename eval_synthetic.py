"""Fine-tunes a trained model on a recall task and measures what its meta-tokens do there (paper, section 4, appendix D).

    python eval_synthetic.py config/quickstart.py --init_from=out --task=list_recall --train_length=256 --eval_lengths=128,256,512
    python eval_synthetic.py config/quickstart.py --init_from=out --task=all
    python eval_synthetic.py --plot results/*.json             # accuracy over length, a table, paired differences

The same text comes with marks of four kinds (the meta-token, a fresh token, an ordinary one, none) at places that tell the
answer's (as in the paper) or say nothing about it: whatever differs between two runs is the model or the mark. Writes
results/<name>.json, and the fine-tuned model to out_dir. The same command goes on after a kill, and takes the same steps (but
for the clock, where max_minutes is set).
"""
import copy
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache

import config as settings
import prepare
import train
from model import rope_frequencies

import numpy as np
import torch
from torch.nn import functional as F

FORMAT = "synthetic tasks 1"
CONTENT = {"label", "task", "placement", "marker", "train_length", "seeds", "learning_rate", "validation", "tests", "rows", "run", "config"}
FIRST_PHASE = 64                     # tokens; every further phase of the curriculum is twice as long
EVAL_TOKENS = 16384                  # positions in a batch of evaluation
TUNE_TOKENS = 32768                  # positions in a micro-batch of fine-tuning: about 20 GB for GPT-2
GENERATED = 256                      # examples that are also generated freely
SOLVED = 0.99                        # exact match on validation at which stop_solved stops
TEST_SEED = 0                        # of validation and test: the same examples for every run, so that runs can be compared
SPLITS = ("train", "validation", "test")
T_975 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t, by number of seeds
PLACES = {"task": "marks at what is asked for", "all": "marks at all alike", "random": "marks anywhere", "none": "no marks"}
MARK = "\0"                          # where a mark may stand, in the templates below

# Common words of three letters: each a single token of GPT-2's BPE behind a space, and four bytes, so that the length of a
# text follows from its number of words
WORDS = re.findall(r"\w+", """
act age aid aim air ale ape arc arm art ash axe bad bag bar bat bay bed bee bet big bin bit bow box boy bud bug bus buy cab can cap car
cat cop cow cry cub cup cut dad dam day den dig dim dip dog dot dry due dug dye ear eat egg elf end eye fan far fat fax few fig fin fit
fix fly fog fox fry fun fur gap gas gem gum gut guy gym hat hay hen hip hit hop hot hub hut ice ink inn jam jar jaw jet job joy jug kid
kin kit lab lad lap law leg lid lip log lot low mad man map mat mix mob mud mug nap net new nut oak odd oil old one orb ore owl own pad
pan paw pay pen pet pie pig pin pit pod pop pot raw ray red rib rim rod row rug run sad sap saw sea set shy sip sit six ski sky son soy
spy sub sum sun tab tag tan tap tar tax tea ten tie tin tip toe ton top toy try tub tug two use van vet vow wax way web wet wig win wit
yes zip zoo""")
ITEMS = WORDS[::3]                                           # what lists and texts are made of
NAMES = [word for i, word in enumerate(WORDS) if i % 3]      # what they are called


# ----------------------------------------------------------------------------------------------------------------------
# The tasks. A prompt is a number of units (lists, bit strings, texts) and a question about one of them. Each function
# returns a unit, the question about it, the answer, and all answers that a guess within the unit could give.

def mixed(rng, n, word, count):
    """n items in random order: `word` count times, and others once each."""
    others = [item for item in rng.choice(ITEMS, n - count + 1, replace=False).tolist() if item != word]
    return rng.permutation(others[:n - count] + [word] * count).tolist()


def list_recall(name, word, rng):
    items = mixed(rng, rng.integers(2, 7), None, 0)
    i = rng.integers(len(items))
    return (f"List {name}: {', '.join(items)}.{MARK}\n", f"Question: item {i + 1} of list {name}? Answer:{MARK}", f" {items[i]}", items)


def segment_counting(name, word, rng):
    """The word stands in every list, inside the segment (0 to 4 times) and outside."""
    count = rng.integers(5)
    before, inside, after = (" ".join(mixed(rng, n, word, k)) for n, k in (
        (rng.integers(1, 4), rng.integers(2)), (rng.integers(4, 9), count), (rng.integers(1, 4), rng.integers(2))))
    return (f"List {name}: {before} [{MARK} {inside}{MARK} ] {after}.\n",
            f"Question: how often is {word} in the segment of list {name}? Answer:", f" {count}", range(5))


def parity(name, word, rng):
    before, after = rng.integers(2, size=rng.integers(1, 9)), rng.integers(2, size=rng.integers(1, 5))
    return (f"Bits {name}: {' '.join(map(str, before))} *{MARK} {' '.join(map(str, after))}.\n",
            f"Question: parity of the bits before * in bits {name}? Answer:", f" {before.sum() % 2}", range(2))


def copying(name, word, rng):
    before, span, after = (" ".join(mixed(rng, n, None, 0)) for n in (rng.integers(1, 4), rng.integers(3, 7), rng.integers(1, 4)))
    return (f"Text {name}: {before} [{MARK} {span}{MARK} ] {after}.\n", f"Question: what is in brackets in text {name}? Answer:",
            f" {span}", [span])


TASKS = {function.__name__: function for function in (list_recall, segment_counting, parity, copying)}


@dataclass(frozen=True)
class Stream:
    """What examples depend on, apart from split, length and number."""
    task: str
    placement: str      # marks at what is asked for ('task', as in the paper), at all units alike ('all'), anywhere ('random'), or 'none'
    mark: int | None    # its id; None: no marks
    tokenizer: str
    seed: int           # of training examples; validation and test are the same for all


@dataclass
class Example:
    tokens: np.ndarray  # ids of prompt and answer, marks in place
    n_answer: int       # how many of them, at the end, are the answer
    prompt: str         # the prompt without its marks
    answer: str
    chance: float       # probability that a guess among all answers that the prompt offers is right


get_encoding = cache(prepare.get_tokenizer)


@cache
def encode_piece(piece, encoding):
    return encoding.encode_ordinary(piece)


def encode(text, encoding):
    """Ids of a text of our words, piece by piece as BPE splits it: from a table, the tokenizer itself would take much longer."""
    return [token for piece in re.findall(r" ?\w+| ?[^\w\s]|\s", text) for token in encode_piece(piece, encoding)]


def n_tokens(text, encoding):
    """Tokens of a template with a mark wherever one may stand."""
    return len(encode(text.replace(MARK, ""), encoding)) + text.count(MARK)


@cache
def min_length(task, encoding):
    """The length from which on every example fits: tokens of the longest of 500 prompts of one unit, with its answer."""
    rng = np.random.default_rng(0)
    return max(sum(n_tokens(text, encoding) for text in TASKS[task](NAMES[0], ITEMS[0], rng)[:3]) for _ in range(500))


def filler(n, rng, encoding):
    """A line of n tokens that says nothing."""
    words, rest = divmod(max(n - 1, 0), n_tokens(" cat", encoding))
    return "".join(f" {word}" for word in rng.choice(ITEMS, words)) + "\n" * (rest + min(n, 1))


def make_example(stream, shortest, longest, rng):
    """An Example of a length uniform in shortest..longest tokens, as drawn from rng (a numpy Generator).

    The text is the same whatever the mark and its placement: its length counts the marks of 'all', the most. A longer text
    has more units, up to one for each of the 138 names (2,000 tokens of GPT-2's BPE); a line of filler takes the room that is
    left. Which unit is asked for, and what it holds, does not depend on the length. E.g. with '#' for a mark:

        List fox: pad, rod, car, run.
        List pet: vet, bug.
        List rim: ear, pie, elf, leg, ore, try.#
         mad due old car fin kin
        Question: item 3 of list rim? Answer:# elf
    """
    task, encoding = stream.task, get_encoding(stream.tokenizer)
    name, *names = rng.permutation(NAMES).tolist()
    word = str(rng.choice(ITEMS))
    room = int(rng.integers(max(shortest, min_length(task, encoding)), longest + 1))
    unit, question, answer, offers = TASKS[task](name, word, rng)
    room -= sum(n_tokens(text, encoding) for text in (unit, question, answer))
    others, offered = [], set(offers)
    for name in names:
        other, _, _, offers = TASKS[task](name, word, rng)
        needed = n_tokens(other, encoding)
        if needed > room:
            break
        room -= needed
        others.append(other)
        offered.update(offers)
    others.insert(rng.integers(len(others) + 1), filler(room, rng, encoding))
    texts = [(other, False) for other in others]
    texts.insert(rng.integers(len(others) + 1), (unit, True))
    texts.append((question, True))

    tokens, own, places = [], [], []  # places: where a mark may stand; own: those of what is asked for
    for text, is_asked_for in texts:
        for i, piece in enumerate(text.split(MARK)):
            if i > 0:
                places.append(len(tokens))
            if i > 0 and is_asked_for:
                own.append(len(tokens))
            tokens += encode(piece, encoding)
    anywhere = rng.permutation(len(tokens))[:len(own)] + 1
    tokens = np.array(tokens)
    if stream.mark is not None:
        tokens = np.insert(tokens, {"task": own, "all": places, "random": anywhere, "none": []}[stream.placement], stream.mark)
    answer_tokens = encode(answer, encoding)
    prompt = "".join(text for text, _ in texts).replace(MARK, "")
    return Example(np.append(tokens, answer_tokens), len(answer_tokens), prompt, answer, 1 / len(offered))


# ----------------------------------------------------------------------------------------------------------------------
# Streams of examples

def split_of(prompt):
    """Half of all prompts are for training, a quarter each for validation and test: by their text, so that none is in two."""
    return ("train", "train", "validation", "test")[hashlib.blake2b(prompt.encode()).digest()[0] % 4]


def draw(stream, split, length, number, exactly=None):
    """Example `number` of a split, of up to `length` tokens and more than half as many, or of `exactly` so many, counted with the
    marks of placement 'all'. Validation and test are the same for every seed."""
    shortest, longest = (exactly, exactly) if exactly else (length // 2 + 1, length)
    seed = [stream.seed if split == "train" else TEST_SEED, SPLITS.index(split), length, number]
    for attempt in itertools.count():
        example = make_example(stream, shortest, longest, np.random.default_rng([*seed, attempt]))
        if split_of(example.prompt) == split:
            return example


def draw_batch(job):
    stream, split, length, numbers, exactly = job
    return [draw(stream, split, length, number, exactly) for number in numbers]


def draw_split(pool, stream, split, length, n):
    jobs = [(stream, split, length, range(i, min(i + 32, n)), None) for i in range(0, n, 32)]
    return [example for _, batch in prepare.ordered_map(pool, draw_batch, jobs, ahead=64) for example in batch]


def collate(examples, longest, bucket=64):
    """(x, at, y): int64 (B, T), padded at the right; the positions that predict the answers' tokens, (B, A), and these tokens, -1
    behind the last. T is a multiple of bucket, or longest; A one of 8."""
    T = min(-(-max(len(e.tokens) for e in examples) // bucket) * bucket, longest)
    B, A = len(examples), -(-max(e.n_answer for e in examples) // 8) * 8
    x, at, y = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, A, dtype=torch.long), torch.full((B, A), -1)
    for row, e in enumerate(examples):
        n = len(e.tokens) - 1
        x[row, :n] = torch.from_numpy(e.tokens[:-1])
        at[row, :e.n_answer] = torch.arange(n - e.n_answer, n)
        y[row, :e.n_answer] = torch.from_numpy(e.tokens[-e.n_answer:])
    return x, at, y


def meta_bound(model, x):
    """An upper bound on the meta-tokens of a row: 0, 16, 32, 64, ...; few values, as the model is compiled anew for each."""
    n_meta = 0 if model.config.meta_id is None else int((x == model.config.meta_id).sum(1).max())
    return n_meta and min(max(16, 1 << (n_meta - 1).bit_length()), x.size(1))


# ----------------------------------------------------------------------------------------------------------------------
# Models and marks

def open_model(config):
    """(model, id of the mark, identity of the checkpoint), on the CPU. Raises SystemExit where they do not fit together."""
    torch.manual_seed(config.seed)  # of the meta-attention that may be added
    model, checkpoint = train.load_saved(config)
    identity = {"path": os.path.normpath(train.checkpoint_path(config)), "step": checkpoint["step"],
                "seed": checkpoint["settings"].get("seed"), "sha256_of_weights": train.sha256_of_weights(model)}
    encoding, kind = get_encoding(config.tokenizer), config.marker if config.placement != "none" else "none"
    if config.add_meta:
        if model.config.meta_id is not None:
            raise config.error(f"add_meta={config.add_meta}, but the checkpoint has meta-tokens")
        config.meta_attention = config.meta_attention or not config.typed("meta_attention")
        model = model.with_meta_tokens(encoding.n_vocab, config.meta_attention)
    for name, asked in (("marker", kind == "meta"), ("zero_meta_pos", config.zero_meta_pos), ("zero_meta_embd", config.zero_meta_embd)):
        if asked and model.config.meta_id is None:
            raise config.error(f"{name}={getattr(config, name)}, but the checkpoint has no meta-tokens: give it some by --add_meta, or "
                               "choose another")
    if kind == "fresh":
        model = with_fresh_token(model, encoding.n_vocab + 1)
    mark = {"meta": model.config.meta_id, "fresh": encoding.n_vocab + 1, "text": encoding.encode_ordinary("#")[0], "none": None}
    return model, mark[kind], identity


@torch.no_grad()
def with_fresh_token(model, token):
    """The model with an ordinary token that pre-training never saw, its embedding the mean of the text's."""
    if token >= model.config.vocab_size:  # OpenAI's GPT-2 has no row to spare
        model = model.with_meta_tokens(token, meta_attention=False)
        model.config.meta_id = None
    wte = model.transformer.wte.weight
    wte[token] = wte[:model.config.text_vocab_size].mean(0)
    return model


def possible_rows(model, mark):
    """What can be measured: the model as it is, without one of the meta-tokens' parts, and without the marks."""
    c, is_meta = model.config, mark is not None and mark == model.config.meta_id
    possible = {"full": True, "no_pos": is_meta and c.pos != "none", "no_pos_meta": is_meta and c.pos == "rope" and c.meta_attention,
                "no_embed": is_meta, "no_meta_attention": is_meta and c.meta_attention, "no_meta": mark is not None}
    return [row for row, is_possible in possible.items() if is_possible]


@contextmanager
def ablated(model, row):
    """The model as the row says, for a while."""
    changes = {"no_pos": {"zero_meta_pos": True}, "no_embed": {"zero_meta_embd": True}, "no_meta_attention": {"meta_attention": False}}
    before, hooks = model.config, []

    def unturned(module, args):
        x, norm, meta, slots = args
        cos, sin = meta.rope
        return x, norm, replace(meta, rope=(torch.full_like(cos, rope_frequencies(model.config)[1]), torch.zeros_like(sin))), slots

    model.config = replace(before, **changes.get(row, {}))
    if row == "no_pos_meta":  # angle 0 in meta-attention alone: there, between meta-tokens, exactly no position
        hooks = [block.meta_attn.register_forward_pre_hook(unturned) for block in model.transformer.h]
    try:
        yield
    finally:
        model.config = before
        for hook in hooks:
            hook.remove()


# ----------------------------------------------------------------------------------------------------------------------
# Measurement

@torch.no_grad()
def measure(model, examples, longest, machine):
    """Teacher-forced: given the right answer up to there, is each of its tokens the likeliest of the text's?

    Returns (correct, token_accuracy, loss): bool (n,), exact match of each example; share of the answer tokens; nats each.
    """
    model.eval()
    correct, hits, count, loss = np.zeros(len(examples), dtype=bool), 0, 0, 0.0
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    batch_size = max(EVAL_TOKENS // longest, 1)
    for batch in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
        x, at, y = collate([examples[i] for i in batch], longest)
        n_meta = meta_bound(model, x)
        x, at, y = (t.to(machine.device) for t in (x, at, y))
        with machine.autocast():
            logits = model(x, n_meta=n_meta, at=at)[0][..., :model.config.text_vocab_size].float()
        is_answer, hit = y >= 0, logits.argmax(-1) == y
        correct[batch] = (hit | ~is_answer).all(1).cpu().numpy()
        hits, count = hits + hit.sum().item(), count + is_answer.sum().item()
        loss += F.cross_entropy(logits[is_answer], y[is_answer], reduction="sum").item()
    model.train()
    return correct, hits / count, loss / count


@torch.no_grad()
def measure_generation(model, examples, machine):
    """Exact match, bool (n,), of what greedy generation with the KV cache begins with."""
    model.eval()
    correct, before, by_length = np.zeros(len(examples), dtype=bool), model.config, {}
    for i, e in enumerate(examples):
        by_length.setdefault(len(e.tokens) - e.n_answer, []).append(i)  # prompts of one length need no padding
    model.config = replace(before, block_size=max(before.block_size, *(len(e.tokens) for e in examples)))  # the positions as they were
    for n_prompt, group in by_length.items():
        longest = max(examples[i].n_answer for i in group)
        prompts = torch.from_numpy(np.stack([examples[i].tokens[:n_prompt] for i in group])).to(machine.device)
        with machine.autocast():
            tokens = model.generate(prompts, longest, temperature=0)[:, n_prompt:].cpu().numpy()
        for i, row in zip(group, tokens):
            correct[i] = np.array_equal(row[:examples[i].n_answer], examples[i].tokens[n_prompt:])
    model.config = before
    model.train()
    return correct


def wilson(hits, n):
    """95% interval of a share (Wilson 1927)."""
    z, p = 1.96, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max((middle - half) / (1 + z * z / n), 0.0), min((middle + half) / (1 + z * z / n), 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Fine-tuning

def fine_tune(run, model, lr, steps, minutes, state=None, save=False):
    """Trains the model on the answers of one curriculum; with `save` it saves as it goes, to be called again with that state.

    Returns the history of validation at the training length: [{step, minutes, phase, exact, token_accuracy, loss, train_loss}].
    Raises SystemExit when it was asked to stop (SIGINT, SIGTERM), or the loss is no longer finite.
    """
    config, machine, device = run.config, run.machine, run.machine.device
    schedule = replace(config, learning_rate=lr, min_lr=lr / 10, warmup_iters=min(config.task_warmup, steps // 10), max_iters=steps,
                       lr_decay_iters=0, max_minutes=minutes)
    optimizer = model.configure_optimizer(lr, config.weight_decay, (config.beta1, config.beta2))
    scaler = torch.amp.GradScaler(machine.type, enabled=machine.dtype == torch.float16)
    step, minutes_before, history, loss_sum, summed = 0, 0.0, [], torch.zeros((), device=device), 0
    if state:
        step, minutes_before, history, summed = state["step"], state["minutes"], state["history"], state["summed"]
        loss_sum += state["loss_sum"]
        train.load_optimizer(optimizer, scaler, state)
    torch._dynamo.config.cache_size_limit = 64  # two lengths a phase, and few numbers of meta-tokens
    forward = torch.compile(model, dynamic=False) if machine.compile else model
    started, B = time.monotonic(), config.task_batch_size
    first_step, longest, norm = step, None, 0.0  # longest: of the phase, in tokens
    go_on = "the same command" + " without --overwrite" * config.overwrite + " goes on"

    def clock():
        return minutes_before + (time.monotonic() - started) / 60

    def phase(step):
        progress = max(step / steps, clock() / minutes if minutes else 0)
        return run.phases[min(int(progress * len(run.phases)), len(run.phases) - 1)]

    def save_state(finished):
        train.save(run.checkpoint, {
            "model": model.state_dict(), "model_config": asdict(model.config), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "settings": asdict(config), "step": step, "minutes": clock(), "history": history,
            "loss_sum": loss_sum.item(), "summed": summed, "run": run.identity, "lr": run.lr, "finished": finished},
            go_on)

    def check_finite(loss):
        if train.diverged(loss, norm, scaler):
            raise SystemExit(f"error: the loss is {loss}, the gradient's norm {float(norm)} at step {step}: the last good state is kept; "
                             "try a lower --task_lr")

    def job(step):
        """The examples of a step are all of one length, so that there is next to no padding."""
        longest = phase(step)
        shortest = max(longest // 2 + 1, min_length(run.stream.task, get_encoding(run.stream.tokenizer)))
        length = np.random.default_rng([config.seed, step]).integers(shortest, longest + 1)
        return run.stream, "train", longest, range(step * B, (step + 1) * B), int(length)

    stop_request = train.StopRequest()
    batches = prepare.ordered_map(run.pool, draw_batch, map(job, itertools.count(step)), ahead=32)  # drawn by other processes meanwhile
    model.train()
    while True:
        done = step >= steps or 0 < minutes <= clock()
        if (done or (save and step > 0 and step % config.val_interval == 0)) and not (history and history[-1]["step"] == step):
            correct, token_accuracy, loss = measure(model, run.validation, config.train_length, machine)
            if save:  # a trial may fail
                check_finite(loss)
            history.append({"step": step, "minutes": clock(), "phase": longest, "exact": float(correct.mean()),
                            "token_accuracy": token_accuracy, "loss": loss, "train_loss": loss_sum.item() / max(summed, 1)})
            loss_sum, summed = torch.zeros_like(loss_sum), 0
            done = done or (config.stop_solved and save and history[-1]["phase"] == run.phases[-1] and history[-1]["exact"] >= SOLVED)
            chance = np.mean([e.chance for e in run.validation])
            print(f"step {step}: validation at {config.train_length}: exact {100 * correct.mean():.1f}% (by chance {100 * chance:.1f}%), "
                  f"tokens {100 * token_accuracy:.1f}%, loss {loss:.3f}", flush=True)
            if save:
                save_state(finished=done)
        if stop_request.asked and not done:
            if save:
                check_finite(loss_sum.item())
                save_state(finished=False)
            raise SystemExit(f"stopped at step {step}; {go_on} from " + ("there" if save else "the beginning"))
        if done:
            break
        (_, _, longest, _, _), examples = next(batches)
        x, at, y = collate(examples, longest, bucket=longest // 4 if machine.compile else 16)  # two shapes a phase, or as they come
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(schedule, step, clock())
        if config.dropout > 0:
            torch.manual_seed(int(np.random.SeedSequence([config.seed, step]).generate_state(1)[0]))
        n_meta = meta_bound(model, x)
        x, at, y = (t.to(device, non_blocking=True) for t in (x, at, y))
        rows, n_targets = max(TUNE_TOKENS // x.size(1), 1), (y >= 0).sum()
        for own_x, own_at, own_y in zip(x.split(rows), at.split(rows), y.split(rows)):
            with machine.autocast():
                loss = forward(own_x, own_y, n_meta=n_meta, at=own_at)[1] * ((own_y >= 0).sum() / n_targets)
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        summed, step = summed + 1, step + 1
        if step % config.log_interval == 0:
            left = (time.monotonic() - started) / (step - first_step) * (steps - step)
            left = min(left, 60 * (minutes - clock())) if minutes else left
            print(f"step {step:>{len(str(steps))}}/{steps} | length {longest} | loss {loss_sum.item() / summed:.4f} | "
                  f"ETA {train.duration(max(left, 0))}", flush=True)
    stop_request.restore()
    return history


class Run:
    """One task for one model: where it reads and writes, and what it depends on. Raises SystemExit for what cannot be run."""

    def __init__(self, config, pool, machine):
        self.config, self.pool, self.machine = config, pool, machine
        self.lengths = config.numbers("eval_lengths", int, "lengths in tokens, such as 128,256,512")
        self.rates = config.numbers("task_lr", float, "learning rates above 0, such as 3e-4 or 1e-4,3e-4,1e-3")
        self.model, mark, self.pretrained = open_model(config)
        encoding = get_encoding(config.tokenizer)
        self.marker, self.placement = ("none", "none") if mark is None else (config.marker, config.placement)
        self.stream = Stream(config.task, self.placement, mark, config.tokenizer, config.seed)
        shortest = min_length(config.task, encoding)
        for name, length in (("train_length", config.train_length), *(("eval_lengths", length) for length in self.lengths)):
            if length < shortest:
                raise config.error(f"{name}={length} is too short: {config.task} needs {shortest} tokens")
        if self.model.config.pos == "absolute" and config.train_length > self.model.config.block_size:
            raise config.error(f"train_length={config.train_length}, but there are learned positions for {self.model.config.block_size}")
        possible = possible_rows(self.model, mark)
        self.rows = possible if config.rows == "all" else config.rows.split(",")
        for row in self.rows:
            if row not in possible:
                raise config.error(f"rows={config.rows}: {row} is not among what this model and marker allow: {', '.join(possible)}")
        shorter = [FIRST_PHASE << i for i in range(24) if shortest <= FIRST_PHASE << i < config.train_length]
        self.phases = [*shorter, config.train_length]
        marked = {"meta": "with meta-tokens", "fresh": "with a fresh token", "text": "with #", "none": "without marks"}[self.marker]
        self.label = config.label or f"{train.stem(self.pretrained['path'])} {marked}"
        self.name = re.sub(r"[^\w.-]+", "_", f"{self.label}_{config.task}_{self.placement}_{self.marker}_"
                                              f"{config.train_length}_s{self.pretrained['seed']}_{config.seed}")
        self.result, self.checkpoint = f"results/{self.name}.json", os.path.join(config.out_dir, f"{self.name}.pt")
        settings_of_run = ("seed", "train_length", "phase_steps", "task_batch_size", "task_warmup", "trial_steps",
                           "val_interval", "val_examples", "max_minutes", "weight_decay", "beta1", "beta2", "grad_clip",
                           "dropout", "stop_solved")
        self.identity = {"stream": asdict(self.stream), "pretrained": self.pretrained, "model": asdict(self.model.config),
                         "task_lr": self.rates[0] if len(self.rates) == 1 else self.rates,
                         **{name: getattr(config, name) for name in settings_of_run}}
        self.lr = {"chosen": self.rates[0], "tried": {}}

    def go(self):
        """Fine-tunes, measures and writes the result, or goes on with what was begun."""
        config, state = self.config, None
        if os.path.exists(self.result) and not config.overwrite:
            there = read_result(self.result)
            if there["run"] != self.identity:
                raise SystemExit(f"error: {self.result} is of other settings: name another --label=, or --overwrite it")
            if all(there["config"][name] == getattr(config, name) for name in ("eval_lengths", "rows", "test_examples")):
                print(f"{self.result} is there already")
                return
        os.makedirs("results", exist_ok=True)
        os.makedirs(config.out_dir, exist_ok=True)
        if os.path.exists(self.checkpoint) and not config.overwrite:
            try:
                state = train.load_checkpoint(self.checkpoint)
            except ValueError as e:
                raise SystemExit(f"error: {e}: --overwrite starts anew") from None
            if state.get("run") != self.identity:
                raise SystemExit(f"error: {self.checkpoint} is of other settings: name another --label=, or --overwrite it")
            self.model, self.lr = train.model_of(state), state["lr"]
            print(f"going on behind step {state['step']}")
        self.model.to(self.machine.device)
        steps = config.phase_steps * len(self.phases)
        print(f"{self.name}: {steps} steps of {config.task_batch_size}, phases {', '.join(map(str, self.phases))}", flush=True)
        self.validation = draw_split(self.pool, self.stream, "validation", config.train_length, config.val_examples)
        several = len(self.rates) > 1
        if several and state is None:
            self.choose_rate()
        minutes = config.max_minutes * (0.7 if several else 1)  # the trials have had the rest
        history = state["history"] if state and state["finished"] else fine_tune(
            self, self.model, self.lr["chosen"], steps, minutes, state, save=True)
        tests, rows = self.measure_rows()
        prepare.write_json(self.result, {
            "format": FORMAT, "label": self.label, "task": config.task, "placement": self.placement,
            "marker": self.marker, "train_length": config.train_length, "pretrained": self.pretrained,
            "seeds": {"pretraining": self.pretrained["seed"], "fine-tuning": config.seed, "test": TEST_SEED}, "commit": commit(),
            "hardware": {"device": self.machine.name(), "processor": self.machine.processor(), "cores": os.cpu_count(),
                         "dtype": str(self.machine.dtype).removeprefix("torch."), "torch": torch.__version__},
            "learning_rate": self.lr, "validation": history, "tests": tests, "rows": rows, "run": self.identity,
            "config": asdict(config)})
        print(f"written to {self.result}")

    def choose_rate(self):
        """Tries each rate in a short run of the whole curriculum; the lowest loss on validation wins. What was tried is kept."""
        config, kept = self.config, self.checkpoint.removesuffix(".pt") + "_rates.json"
        if os.path.exists(kept) and not config.overwrite:
            with open(kept, encoding="utf-8") as file:
                there = json.load(file)
            self.lr["tried"] = there["tried"] if there["run"] == self.identity else {}
        for lr in self.rates:
            if str(lr) in self.lr["tried"]:
                continue
            print(f"trial of learning rate {lr:g}")
            minutes = 0.3 * config.max_minutes / len(self.rates)
            loss = fine_tune(self, copy.deepcopy(self.model), lr, config.trial_steps, minutes)[-1]["loss"]
            self.lr["tried"][str(lr)] = loss if math.isfinite(loss) else sys.float_info.max
            prepare.write_json(kept, {"run": self.identity, "tried": self.lr["tried"]})
        self.lr["chosen"] = float(min(self.lr["tried"], key=self.lr["tried"].get))

    def measure_rows(self):
        """(tests, rows): what the test examples of every evaluation length are, and every row measured on them."""
        config, model, stream, tests, rows = self.config, self.model, self.stream, {}, []
        started, done, total = time.monotonic(), 0, sum(self.lengths)
        for length in self.lengths:
            if model.config.pos == "absolute" and length > model.config.block_size:
                rows.append({"row": "full", "length": length, "impossible": f"learned positions end at {model.config.block_size}"})
                print(f"{length} tokens: not possible, learned positions end at {model.config.block_size}", flush=True)
                continue
            examples = draw_split(self.pool, stream, "test", length, config.test_examples)
            answers = Counter(e.answer for e in examples)
            tests[str(length)] = test = {
                "n": len(examples), "chance": float(np.mean([e.chance for e in examples])),
                "majority": max(answers.values()) / len(examples), "mean_tokens": float(np.mean([len(e.tokens) for e in examples])),
                "sha256_of_prompts": prepare.sha256("\n".join(e.prompt for e in examples).encode())}
            print(f"{length} tokens: {test['n']} examples, exact match by chance {100 * test['chance']:.1f}%, by the most frequent answer "
                  f"{100 * test['majority']:.1f}%"
                  + (f"; ETA {train.duration((time.monotonic() - started) / done * (total - done))}" if done else ""), flush=True)
            for row in self.rows:
                inputs = [replace(e, tokens=e.tokens[e.tokens != stream.mark]) for e in examples] if row == "no_meta" else examples
                with ablated(model, row):
                    rows.append(score(row, length, "teacher forcing", *measure(model, inputs, length, self.machine)[:2]))
                    if config.task == "copying" and row == "full":
                        rows.append(score(row, length, "generation", measure_generation(model, inputs[:GENERATED], self.machine)))
            done += length
        return tests, rows


def score(row, length, by, correct, token_accuracy=None):
    """A row of a result, and its line on the terminal. correct: bool (n,), kept as the hexadecimal of its bits."""
    low, high = wilson(int(correct.sum()), len(correct))
    print(f"  {row:<18} {by:<15} exact {100 * correct.mean():5.1f}% ({100 * low:.1f} to {100 * high:.1f})"
          + (f", tokens {100 * token_accuracy:5.1f}%" if token_accuracy is not None else "")
          + (" (out of distribution: it was tuned with marks)" if row == "no_meta" else ""), flush=True)
    return {"row": row, "length": length, "by": by, "n": len(correct), "exact": float(correct.mean()), "low": low, "high": high,
            "token_accuracy": token_accuracy, "out_of_distribution": row == "no_meta", "correct": np.packbits(correct).tobytes().hex()}


def commit():
    """The commit of this code, '-dirty' behind it if it was changed since; None outside a repository."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# Figure and table

def read_result(path):
    """A file written by this script. Raises SystemExit for anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
        if not isinstance(result, dict) or not str(result.get("format", "")).startswith(FORMAT.rpartition(" ")[0]):
            raise ValueError
        if result["format"] == FORMAT and not result.keys() >= CONTENT:
            raise ValueError
    except OSError:
        raise SystemExit(f"error: no result {path}: write one with python eval_synthetic.py --task=...") from None
    except ValueError:
        raise SystemExit(f"error: {path} is not a result of eval_synthetic.py") from None
    if result["format"] != FORMAT:
        raise SystemExit(f"error: {path} is of format '{result['format']}', not '{FORMAT}': measure it again")
    return result


def merge(results):
    """{(task, placement): {label: [result of each seed]}}, a panel each. Lines without marks stand in every panel of their task; where
    some were tuned for as many steps as the panel's, only those.

    Raises SystemExit where results of a task cannot be compared, or those of a line differ in more than their seeds.
    """
    def recipe(run):
        return run | {"seed": None, "pretrained": None, "stream": run["stream"] | {"seed": None}}

    tests, lines = {}, {}
    for path, result in results.items():
        for length, test in result["tests"].items():
            there, first = tests.setdefault((result["task"], length), (test["sha256_of_prompts"], path))
            if there != test["sha256_of_prompts"]:
                raise SystemExit(f"error: {path} and {first} were measured on different test examples of {result['task']} at {length}")
        group = lines.setdefault((result["task"], result["placement"], result["label"]), [])
        if group and recipe(group[0]["run"]) != recipe(result["run"]):
            raise SystemExit(f"error: {path}: '{result['label']}' has results of different settings: give them different --label=")
        if any(other["seeds"] == result["seeds"] for other in group):
            raise SystemExit(f"error: {path}: '{result['label']}' has another result of the same seeds: name one of the two")
        group.append(result)
        group.sort(key=lambda result: str(result["seeds"]))
    panels = {}
    for task in TASKS:
        by_place = {place: {label: group for (t, p, label), group in lines.items() if (t, p) == (task, place)} for place in PLACES}
        unmarked = by_place.pop("none")
        for place, marked in by_place.items():
            if marked:
                steps = {group[0]["run"]["phase_steps"] for group in marked.values()}
                equal = {label: group for label, group in unmarked.items() if group[0]["run"]["phase_steps"] in steps}
                unmarked_here = {label + ", no marks" * (label in marked): group for label, group in (equal or unmarked).items()}
                panels[task, place] = unmarked_here | marked
        if unmarked and not any(by_place.values()):
            panels[task, "none"] = unmarked
    return panels


def rows_of(group, length, row="full", by="teacher forcing"):
    """{seeds: the row} of a line's results that measured it."""
    return {str(result["seeds"]): r for result in group for r in result["rows"]
            if (r["row"], r["length"], r.get("by")) == (row, length, by)}


def correct_of(group, length, row="full", by="teacher forcing"):
    """Exact match of a line's results, {seeds: float (n,)}, where they measured it."""
    return {seeds: np.unpackbits(np.frombuffer(bytes.fromhex(r["correct"]), np.uint8), count=r["n"]).astype(float)
            for seeds, r in rows_of(group, length, row, by).items()}


def paired_difference(a, b):
    """Mean of b - a, each {seeds: exact match, float (n,)} on the same examples, and its 95% interval: the wider one of that over
    examples (normal approximation) and that over the seeds which both have (Student's t). Without such, all seeds' means are compared."""
    differences = np.array([b[seeds] - a[seeds] for seeds in a if seeds in b] or [np.mean([*b.values()], 0) - np.mean([*a.values()], 0)])
    means = (differences.mean(0), 1.96), (differences.mean(1), T_975.get(len(differences), 2.26))
    half = max((t * over.std(ddof=1) / math.sqrt(len(over)) for over, t in means if len(over) > 1), default=math.inf)
    mean = differences.mean()
    return mean, max(mean - half, -1.0), min(mean + half, 1.0)


def cell(correct):
    """Accuracy in %, with its Wilson interval, or over several seeds their range."""
    if not correct:
        return "-"
    first, *others = correct.values()
    seeds = [c.mean() for c in (first, *others)]
    low, high = (min(seeds), max(seeds)) if others else wilson(first.sum(), first.size)
    return f"{100 * np.mean(seeds):.1f} ({100 * low:.1f}-{100 * high:.1f})"


def learned_at(group):
    """When half of validation was right for the first time: the fine-tuning step of each seed."""
    steps = (next((point["step"] for point in result["validation"] if point["exact"] >= 0.5), None) for result in group)
    return ", ".join("never" if step is None else f"{step:,}" for step in steps)


def tables(panels):
    """Markdown, per panel: accuracy in every row and how soon it was learned, and the paired differences of the lines."""
    for (task, place), lines in panels.items():
        every = [result for group in lines.values() for result in group]
        lengths = sorted({row["length"] for result in every for row in result["rows"]})
        head, rule = "".join(f" {length} |" for length in lengths), "---|" * (len(lengths) + 3)
        tests = {int(length): test for result in every for length, test in result["tests"].items()}
        n = " or ".join(map(str, sorted({test["n"] for test in tests.values()})))
        yield (f"\n**{task}, {PLACES[place]}**: exact match in % of {n} examples a length, teacher-forced (95% interval; of several seeds "
               f"their range)\n\n| model | row | tuned at |{head} half of validation right at step |\n|{rule}---|")
        for name in ("chance", "majority"):
            cells = (f"{100 * tests[length][name]:.1f}" if length in tests else "-" for length in lengths)
            yield f"| {name} | | | " + " | ".join(cells) + " | |"
        for line, group in lines.items():
            first = f"| {line}, {len(group)} seeds |" if len(group) > 1 else f"| {line} |"
            tuned = group[0]["train_length"]
            generated = f", generated (n <= {GENERATED})"
            for row, by in dict.fromkeys((r["row"], r["by"]) for result in group for r in result["rows"] if "by" in r):
                cells = (cell(correct_of(group, length, row, by)) for length in lengths)
                what = row + {"no_meta": " (out of distribution)"}.get(row, "") + generated * (by == "generation")
                yield f"{first} {what} | {tuned} | " + " | ".join(cells) + f" | {learned_at(group) if what == 'full' else ''} |"
            shares = ([r["token_accuracy"] for r in rows_of(group, length).values()] for length in lengths)  # the paper's metric
            cells = (f"{100 * np.mean(seeds):.1f}" if seeds else "-" for seeds in shares)
            yield f"{first} full, token accuracy | {tuned} | " + " | ".join(cells) + " | |"
        if len(lines) > 1:
            yield ("\nPaired differences on the same examples, in points (95% interval: the wider of that over examples and that over the "
                   f"seeds which both have)\n\n| second minus first | such seeds | |{head}\n|{rule}")
        for a, b in itertools.combinations(lines, 2):
            shared = {str(result["seeds"]) for result in lines[a]} & {str(result["seeds"]) for result in lines[b]}
            pairs = ((correct_of(lines[a], length), correct_of(lines[b], length)) for length in lengths)
            differences = (100 * np.array(paired_difference(*pair)) if all(pair) else None for pair in pairs)
            cells = ("-" if d is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*d) for d in differences)
            yield f"| {b} - {a} | {len(shared)} | | " + " | ".join(cells) + " |"


def curve(ax, points, n_seeds, style):
    """The mean over seeds in %, each of them, and a band from the lowest to the highest. points: {x: [y of each seed]}, of which those
    that some seed lacks are left out."""
    x = sorted(x for x, seeds in points.items() if len(seeds) == n_seeds)
    seeds = 100 * np.array([points[at] for at in x]).reshape(-1, n_seeds)
    ax.plot(x, seeds.mean(1), **style)
    if n_seeds > 1 and x:
        ax.fill_between(x, seeds.min(1), seeds.max(1), color=style["color"], alpha=0.15, linewidth=0)
        ax.plot(x, seeds, color=style["color"], linewidth=0.7)


def plot(paths):
    """results/synthetic.png, and the tables on the terminal. bench.py's files, which lie beside ours, are passed over."""
    paths = [path for path in paths if not os.path.basename(path).startswith("bench_")]
    if not paths:
        raise SystemExit("error: --plot needs results, such as: python eval_synthetic.py --plot results/*.json")
    panels = merge({path: read_result(path) for path in paths})
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 0.8 + 4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 2, squeeze=False)
    labels = list(dict.fromkeys(line for lines in panels.values() for line in lines))
    for (test, tuning), ((task, place), lines) in zip(axes, panels.items()):
        for line, group in lines.items():
            style = {"color": f"C{labels.index(line)}", "marker": "o", "markersize": 3, "label": line}
            measured = {row["length"]: correct_of(group, row["length"]) for result in group for row in result["rows"]}
            curve(test, {length: [c.mean() for c in seeds.values()] for length, seeds in measured.items()}, len(group), style)
            exact = [(point["step"], point["exact"]) for result in group for point in result["validation"]]
            curve(tuning, {step: [e for s, e in exact if s == step] for step, _ in exact}, len(group), style)
        every = [result for group in lines.values() for result in group]
        chance = {int(length): 100 * facts["chance"] for result in every for length, facts in result["tests"].items()}
        test.plot(*zip(*sorted(chance.items())), color="black", linestyle="--", linewidth=1, label="chance")
        for i, length in enumerate(sorted({result["train_length"] for result in every})):
            test.axvline(length, color="gray", linestyle=":", label="training length" if i == 0 else None)
            if length in chance:
                tuning.axhline(chance[length], color="black", linestyle="--", linewidth=1)
        test.set_xscale("log", base=2)
        test.set_xticks(sorted(chance), labels=map(str, sorted(chance)))
        test.minorticks_off()
        test.set(title=f"{task.replace('_', ' ')}, {PLACES[place]}: test", xlabel="evaluation length (tokens)", ylabel="exact match (%)",
                 ylim=(-3, 103))
        tuning.set(title="validation at the training length", xlabel="fine-tuning step", ylim=(-3, 103))
        for ax in (test, tuning):
            ax.grid(alpha=0.3)
    entries = {name: line for ax in axes[:, 0] for line, name in zip(*ax.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, fontsize="small")
    os.makedirs("results", exist_ok=True)
    figure.savefig("results/synthetic.png.tmp", format="png", dpi=120)
    os.replace("results/synthetic.png.tmp", "results/synthetic.png")
    print("\n".join(tables(panels)) + "\n\nwritten to results/synthetic.png")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    paths = [arg for arg in argv if arg.endswith(".json")]
    config = settings.load([arg for arg in argv if arg not in paths])
    if config.plot:
        return plot(paths)
    if paths:
        raise SystemExit(f"error: {paths[0]} is for --plot to read: write that before it, or leave the file out")
    if "WORLD_SIZE" in os.environ:
        raise SystemExit("error: fine-tuning runs in one process: start it with python, not torchrun")
    machine, names = train.Machine(config), TASKS if config.task == "all" else [config.task]
    try:
        with ProcessPoolExecutor(config.workers or prepare.cores(), initializer=prepare.start_worker) as pool:
            runs = []
            for task, marker in itertools.product(names, config.marker.split(",")):  # all are checked before the first begins
                own = copy.copy(config)
                own.task, own.marker = task, marker
                own.label = f"{config.label} {marker}" if config.label and marker != config.marker else config.label
                runs.append(Run(own, pool, machine))
            while runs:
                runs.pop(0).go()  # and lets go of its model
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on") from None
    except BrokenExecutor:
        raise SystemExit("error: a worker was killed, for want of memory perhaps; the same command goes on") from None
    except torch.OutOfMemoryError:
        raise SystemExit(f"error: {machine.name()} has too little memory: try a shorter --train_length, or fewer examples a step by "
                         "--task_batch_size") from None
    except OSError as e:
        raise SystemExit(f"error: {e.filename or config.out_dir}: {e.strerror}") from None


if __name__ == "__main__":
    main()
