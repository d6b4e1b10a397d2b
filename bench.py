"""Speed and memory, as ratios measured in one run on one machine.

    python bench.py                         # 6 layers of width 384
    python bench.py --gpu                   # GPT-2's size, within 4 minutes of a GPU
    python bench.py --what=meta,generation  # these parts alone

Parts: training, meta (what meta-attention costs), generation, memory (on CUDA) and
preparation (without --gpu). "As nanoGPT" is GPT-2 with learned positions and all logits
at once, which computes the whole context again for each token it generates; on a CPU it
is eager and in float32.

The rows of a group take turns, so that whatever slows the machine slows them all. Each
reports its best round, since disturbances only add time, and its spread: how far the
median lies above the best. Speed and time are ratios to the group's first row.
Writes results/bench_DEVICE.json; until the last part is done, its name ends in .part.
"""
import gc
import multiprocessing
import os
import statistics
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import config as settings
import prepare
from machine import Machine, processor
from model import GPT, Block, GPTConfig
from train import optimizer_step

import torch
from torch.nn import functional as F

GPU_SIZE = {"batch_size": 24}
CPU_SIZE = {"batch_size": 2, "n_layer": 6, "n_head": 6, "n_embd": 384}


# --------------------------------------------------------------------------------------
# Measurement

def compare(group, variants, machine, rounds=7):
    """Time the variants, print a row for each, and return the rows.

    variants: {name: work}; work() returns its number of tokens, and of floating-point
    operations (0: not counted). Peaks of memory include the weights of all variants.
    """
    gc.collect()  # frees the models of the group before
    seconds = {name: [] for name in variants}
    peaks, sizes, rows = {}, {}, []
    for _ in range(1 + rounds):
        for name, work in variants.items():
            machine.synchronize()
            if machine.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            sizes[name] = work()
            machine.synchronize()
            seconds[name].append(time.perf_counter() - start)
            if machine.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated()
    for name, (tokens, flops) in sizes.items():
        timed = seconds[name][1:]  # the first round compiles and warms up
        best = min(timed)
        row = {"group": group, "variant": name, "seconds": best, "tokens_per_s": tokens / best}
        rows.append(row)
        row["speedup"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        row["time_ratio"] = 1 / row["speedup"]
        row["spread"] = statistics.median(timed) / best - 1
        row["peak_bytes"] = peaks.get(name, 0)
        row["mfu"] = flops / best / machine.peak_flops() if machine.peak_flops() else 0.0
        print(f"{group:<11} {name:<38} {best:>8.3f} {row['tokens_per_s']:>11,.0f} "
              f"{row['speedup']:>7.2f}x {row['time_ratio']:>7.3f}x {row['spread']:>6.0%} "
              f"{row['peak_bytes'] / 1e9:>6.1f} {row['mfu']:>6.1%}", flush=True)
    return rows


# --------------------------------------------------------------------------------------
# Training steps

def model_loss(model, x, y, n_meta):
    return model(x, y, n_meta)[1]


def all_logits_loss(model, x, y, n_meta):
    logits = model.lm_head(model.hidden_states(x, n_meta))                 # (B, T, vocab_size)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)


@dataclass
class TrainingStep:
    """An optimizer step on random tokens, a tenth of them meta-tokens."""
    machine: Machine
    sequences: int           # of the step
    micro_batch: int
    shape: GPTConfig
    model_class: type = GPT
    as_nanogpt: bool = False

    def build(self):
        shape, machine = self.shape, self.machine
        torch.manual_seed(0)
        self.model = self.model_class(shape).to(machine.device)
        self.optimizer = self.model.configure_optimizer(1e-4)
        self.loss = all_logits_loss if self.as_nanogpt else model_loss
        if machine.compile:
            self.loss = torch.compile(self.loss, dynamic=False)
        self.n_meta = 0
        x = torch.randint(shape.text_vocab_size, (self.micro_batch, shape.block_size))
        if shape.meta_id is not None:
            self.n_meta = shape.block_size // 10
            x[:, 9::10] = shape.meta_id
        self.x = x.to(machine.device)                                      # (B, T)
        self.y = self.x.roll(-1, dims=1)                                   # (B, T)
        return self

    def losses(self, n):
        for _ in range(n):
            with self.machine.autocast():
                loss = self.loss(self.model, self.x, self.y, self.n_meta)
            yield loss / n

    def __call__(self):
        losses = self.losses(self.sequences // self.micro_batch)
        scaler = torch.amp.GradScaler(self.machine.type, enabled=False)
        optimizer_step(losses, self.model, self.optimizer, scaler, grad_clip=1.0)
        tokens = self.sequences * self.shape.block_size
        return tokens, tokens * self.model.flops_per_token(self.shape.block_size, self.n_meta)


def compile_one(step):
    with suppress(torch.OutOfMemoryError):  # beside the others: it may still fit alone
        next(step.build().losses(1)).backward()


def compile_ahead(steps, config):
    """Compile the steps side by side, in processes of their own.

    torch caches compiled code on disk, so this process need not compile it again.
    """
    start = time.perf_counter()
    with ProcessPoolExecutor(
            min(4, prepare.cores()), multiprocessing.get_context("spawn"), max_tasks_per_child=1,
            initializer=Machine, initargs=(config.device, config.dtype, config.compile)) as pool:
        list(pool.map(compile_one, steps))
    print(f"compiled {len(steps)} steps in {time.perf_counter() - start:.0f} s", flush=True)


# --------------------------------------------------------------------------------------
# Meta-attention as the paper writes it, over all tokens

class DenseMeta:
    """The mask over all tokens: True where M + P is 0, False where it is -inf."""

    def __init__(self, is_meta):
        """is_meta (B, T), bool"""
        T = is_meta.size(1)
        causal = torch.ones(T, T, dtype=torch.bool, device=is_meta.device).tril()
        diagonal = torch.eye(T, dtype=torch.bool, device=is_meta.device)
        mask = is_meta.unsqueeze(2) & is_meta.unsqueeze(1) & causal        # (B, T, T)
        self.mask = (mask | diagonal).unsqueeze(1)  # softmax needs a key in every row
        self.is_meta = is_meta.unsqueeze(-1)                               # (B, T, 1)

    def update(self, layer, k, v):
        """What attention asks of a cache: keys, values, and the attention mask."""
        return k, v, self.mask


class DenseBlock(Block):
    def forward(self, x, rope, meta=None, cache=None, meta_cache=None):
        x = x + self.attn(self.ln_1(x), rope)
        rows = self.meta_attn(self.ln_meta(x), rope, cache=meta)           # (B, T, C)
        x = x + rows * meta.is_meta
        return x + self.mlp(self.ln_2(x))


class DenseGPT(GPT):
    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h:
            block.__class__ = DenseBlock

    def find_meta(self, is_meta, positions, n_meta):
        return DenseMeta(is_meta)


# --------------------------------------------------------------------------------------
# The parts

def gpt2(shape):
    """GPT-2 of the same depth and width."""
    return replace(shape, pos="absolute", meta_id=None, meta_attention=False)


def nanogpt_machine(machine):
    """How nanoGPT's scripts use the machine."""
    return machine if machine.type == "cuda" else Machine(machine.type, "float32", "false")


def training_steps(config, shape, machine):
    """Steps by group: ours beside nanoGPT's, and what meta-attention costs."""
    n = config.batch_size
    nanogpt_n, sizes, sequences = n, [n], n
    if config.gpu:
        nanogpt_n, sizes, sequences = n // 2, [n, 2 * n], 4 * n
    training = {f"GPT-2 as nanoGPT, micro-batch {nanogpt_n}": TrainingStep(
        nanogpt_machine(machine), sequences, nanogpt_n, gpt2(shape), as_nanogpt=True)}
    for size in sizes:
        step = partial(TrainingStep, machine, sequences, size)
        training[f"GPT-2, micro-batch {size}"] = step(gpt2(shape))
        training[f"Meta+RoPE, micro-batch {size}"] = step(shape)
    step = partial(TrainingStep, machine, sequences, n)
    meta = {"no meta-attention": step(replace(shape, meta_attention=False)),
            "meta-attention": step(shape),
            "meta-attention by a dense mask": step(shape, DenseGPT)}
    return {"training": training, "meta": meta}


def memory(config, shape, machine):
    """Bytes a token takes in training, and the largest micro-batch that fits."""
    n, T = config.batch_size, shape.block_size
    rows = []
    for size in (n, 2 * n):
        step = TrainingStep(machine, size, size, shape)
        rows += compare("memory", {f"Meta+RoPE, micro-batch {size}": step.build()}, machine, 2)
        del step  # free its memory for the next
    per_token = (rows[1]["peak_bytes"] - rows[0]["peak_bytes"]) / (n * T)
    fixed = rows[0]["peak_bytes"] - n * T * per_token
    total = torch.cuda.get_device_properties(machine.device).total_memory
    largest = int((0.95 * total - fixed) / per_token / T)  # 5% for CUDA and for fragments
    print(f"memory: {per_token / 1e3:,.0f} kB a token and {fixed / 1e9:.1f} GB; a micro-batch of "
          f"{largest} takes 95% of {total / 1e9:.0f} GB")
    return [*rows, {"group": "memory", "bytes_per_token": per_token, "fixed_bytes": fixed,
                    "device_bytes": total, "largest_micro_batch": largest}]


def draw(model, n, prompt=1, batch=1, **options):
    """Draw n text tokens after a prompt of `prompt` tokens, as sample.py does."""
    start = torch.zeros(batch, prompt, dtype=torch.long, device=model.lm_head.weight.device)
    model.generate(start, n, temperature=0.8, top_k=200, seed=0, **options)
    return batch * n, 0


def draw_as_nanogpt(model, n, machine):
    with machine.autocast():
        return draw(model, n, use_cache=False)


def generation(config, shape, machine):
    """Generate text after a prompt of one token; then time the first token."""
    torch.manual_seed(0)
    nanogpt = GPT(gpt2(shape)).to(machine.device).eval()
    plain = GPT(gpt2(shape)).to(machine.device, machine.dtype).eval()
    ours = GPT(shape).to(machine.device, machine.dtype).eval()
    rows = []
    for n in (300, 1000) if config.gpu else (400,):
        rows += compare("generation", {
            f"GPT-2 as nanoGPT, {n} tokens": partial(
                draw_as_nanogpt, nanogpt, n, nanogpt_machine(machine)),
            f"GPT-2, {n} tokens": partial(draw, plain, n)}, machine, rounds=2)
    variants = {"Meta+RoPE, no meta-tokens": partial(draw, ours, 400),
                "Meta+RoPE, per text token": partial(draw, ours, 400, meta_rate=0.1)}
    if config.gpu:
        variants["Meta+RoPE, 64 sequences"] = partial(draw, ours, 400, batch=64)
    rows += compare("generation", variants, machine, rounds=5)
    prompts = [1, min(512, shape.block_size // 2)]
    return rows + compare("first token", {
        f"behind a prompt of {n}": partial(draw, ours, 1, prompt=n) for n in prompts}, machine)


def preparation(config, shape, machine):
    """GPT-2's BPE over 8 copies of the standard library."""
    encoding = prepare.get_tokenizer("gpt2")
    files = prepare.files_below(sysconfig.get_paths()["stdlib"], (".py",))
    texts = []
    for key, path in files:
        if "site-packages" not in key:
            with suppress(UnicodeDecodeError):  # a few test files, which prepare.py refuses
                texts += [Path(path).read_text("utf-8")] * 8
    with tempfile.TemporaryDirectory() as folder, chdir(folder):  # where data/ will lie
        os.mkdir("texts")
        for i, text in enumerate(texts):
            Path(f"texts/{i}.txt").write_text(text, "utf-8")
        return compare("preparation", {
            "the tokenizer alone, in threads": partial(tokenize, encoding, texts),
            "prepare.py": prepare_texts}, machine, rounds=3)


def tokenize(encoding, texts):
    """What prepare.py cannot do without."""
    encode = partial(encoding.encode_to_numpy, disallowed_special=())
    with ThreadPoolExecutor(prepare.cores()) as pool:
        return sum(len(tokens) for tokens in pool.map(encode, texts)), 0


def prepare_texts():
    config = settings.load(["--source=texts", "--dataset=d", "--overwrite", "--val_fraction=0.05"])
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        prepare.prepare(config)
    splits = prepare.read_manifest(config)["splits"].values()
    return sum(split["text_tokens"] + split["dropped_text_tokens"] for split in splits), 0


# --------------------------------------------------------------------------------------

def choose_shape(config, machine):
    """Meta+RoPE: with --gpu in the paper's size, else small."""
    if config.gpu and machine.type != "cuda" and not config.typed("device"):
        raise config.error(f"gpu=True, but the device is {machine.type}: leave --gpu out, or "
                           "rehearse with --device= and small sizes")
    for name, value in (GPU_SIZE if config.gpu else CPU_SIZE).items():
        if not config.given(name):
            setattr(config, name, value)
    vocabulary = {} if config.gpu else {"vocab_size": 512, "meta_id": 500}
    return config.checked(GPTConfig, block_size=config.block_size, n_layer=config.n_layer,
                          n_head=config.n_head, n_embd=config.n_embd, **vocabulary)


def main(argv=None):
    sizes = ("block_size", "n_layer", "n_head", "n_embd", "batch_size")
    config = settings.load(argv, ("what", *sizes, settings.Benchmark, settings.Machine), __doc__)
    machine = config.checked(Machine, config.device, config.dtype, config.compile)
    shape = choose_shape(config, machine)
    steps = training_steps(config, shape, machine)
    parts = {"generation": generation}
    if machine.type == "cuda":
        parts["memory"] = memory
    if not config.gpu:
        parts["preparation"] = preparation
    names = config.parts([*steps, *parts])
    path = "_".join(["results/bench", *machine.name().split()])
    if config.what != "all":
        path = "_".join([path, *names])
    result = {"device": machine.name(), "processor": processor(), "cores": prepare.cores(),
              "torch": torch.__version__, "dtype": machine.dtype_name(),
              "batch_size": config.batch_size, "model": asdict(shape), "rows": []}
    print(f"{machine.name()} ({processor()}, {prepare.cores()} cores), {machine.dtype_name()}, "
          f"torch {torch.__version__}; {shape.n_layer} layers of width {shape.n_embd}")
    if machine.compile:
        torch._dynamo.config.recompile_limit = 64  # of one function, by several models
        ahead = []
        for name in names:
            ahead += steps.get(name, {}).values()
        compile_ahead(ahead, config)
    print(f"{'':<51} seconds    tokens/s    speed     time spread     GB    MFU")
    os.makedirs("results", exist_ok=True)
    for name in names:
        if name in steps:
            built = {variant: step.build() for variant, step in steps.pop(name).items()}
            result["rows"] += compare(name, built, machine)
            del built
        else:
            result["rows"] += parts[name](config, shape, machine)
        prepare.write_json(f"{path}.json.part", result)
    os.replace(f"{path}.json.part", f"{path}.json")
    print(f"written to {path}.json")


if __name__ == "__main__":
    main()
