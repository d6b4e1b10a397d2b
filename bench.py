"""Speed and memory, as ratios measured in one run on one machine.

    python bench.py                                       # everything that this machine can
    python bench.py --what=meta,generation                # these parts alone; choices (micro-batch, attention's kernel) only so
    python bench.py --gpu                                 # GPT-2's size, vocabulary and window, beside nanoGPT's way to run it

Prints a table and writes results/bench_<device>.json (before its end: .part), the device followed by the parts where some were
named. Rows of a group take turns, so that a machine that slows down slows them all, and each reports the best of its rounds: what
disturbs a measurement only ever adds to it.
"""
import contextlib
import itertools
import json
import multiprocessing
import os
import statistics
import sysconfig
import tempfile
import time
from dataclasses import asdict, replace

import config as settings
import prepare
from model import GPT, GPTConfig, LinearCrossEntropy, MetaAttention, rotate
from train import Blocks, Machine, micro_batches, prefetched

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROUNDS = 7
SEQUENCES = 96  # of an optimiser step on a GPU, in as many micro-batches as they take: train.py has several, too


class DenseMetaAttention(MetaAttention):
    """Meta-attention as the formula is written: all rows, and a T x T mask. What the compact form is measured against."""

    def forward(self, x, norm, meta, slots=None):
        B, T, C = x.shape
        if not hasattr(meta, "mask"):  # once a forward pass, for all layers
            meta.is_meta = torch.zeros(B, T, dtype=torch.bool, device=x.device).scatter_(1, meta.index[..., 0], ~meta.padding[..., 0])
            among = meta.is_meta[:, :, None] & meta.is_meta[:, None, :] & torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
            meta.mask = (among | torch.eye(T, dtype=torch.bool, device=x.device))[:, None]  # no row may be empty
        q, k, v = self.c_attn(norm(x)).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, self.rope), rotate(k, self.rope)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=meta.mask).transpose(1, 2).reshape(B, T, C)
        return x + self.c_proj(y) * meta.is_meta.unsqueeze(-1)


def dense(model):
    """The same model with dense masks in place of the compact form."""
    rope = model._rope_tables(torch.arange(model.config.block_size, device=model.lm_head.weight.device), None)
    for block in model.transformer.h:
        block.meta_attn.__class__, block.meta_attn.rope = DenseMetaAttention, rope
    return model


def reset_peak(machine):
    if machine.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def peak_bytes(machine):
    """Peak memory since reset_peak: the device's on CUDA, the process's resident set on Linux, else None."""
    if machine.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if not os.path.exists("/proc/self/status"):
        return None
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def compare(group, variants, machine, rounds=ROUNDS):
    """Times variants, {name: function that does the work once and returns (tokens, flops or None)}, in turns. The first
    is what the others are a ratio of; spread is how far the median lies above the best; memory is with the weights
    and optimizers of all variants. Returns rows."""
    seconds, peaks, tokens, flops = {}, {}, {}, {}
    for turn in range(rounds + 1):
        for name, work in variants.items():
            reset_peak(machine)
            synchronize(machine)
            before = time.perf_counter()
            tokens[name], flops[name] = work()
            synchronize(machine)
            if turn > 0:  # the first turn compiles and warms up
                seconds.setdefault(name, []).append(time.perf_counter() - before)
                peaks[name] = max(peaks.get(name) or 0, peak_bytes(machine) or 0) or None
    base, peak_flops, rows = None, machine.peak_flops(), []
    for name in variants:
        per_token = min(seconds[name]) / tokens[name]
        base = base or per_token
        spread = statistics.median(seconds[name]) / min(seconds[name]) - 1
        mfu = flops[name] / per_token / tokens[name] / peak_flops if peak_flops and flops[name] else None
        rows.append({"group": group, "variant": name, "tokens_per_s": 1 / per_token, "speedup": base / per_token,
                     "time_ratio": per_token / base, "spread": spread, "peak_bytes": peaks[name], "mfu": mfu})
        print(f"{group:<12} {name:<44} {1 / per_token:>12,.0f} {base / per_token:>7.2f}x {per_token / base:>7.3f}x {100 * spread:>5.0f}% "
              + (f"{peaks[name] / 1e6:>7,.0f} MB" if peaks[name] else f"{'':>10}") + (f" {100 * mfu:>5.1f}%" if mfu else ""), flush=True)
    return rows


def synchronize(machine):
    if machine.type != "cpu":
        getattr(torch, machine.type).synchronize()


def training_step(config, machine, batch_size, compiled, precise=False, make_dense=False, all_logits=False, batches=None, kernel=None):
    """A function that takes one optimiser step of a model on random tokens with meta-tokens among them, or on the next batches."""
    torch.manual_seed(0)
    model = GPT(config).to(machine.device)
    model = dense(model) if make_dense else model
    optimizer = model.configure_optimizer(1e-4)
    T, n_meta = config.block_size, prepare.meta_per_block(0.1, config.block_size)
    accumulation = max(SEQUENCES // batch_size, 1) if machine.type == "cuda" else 1

    def loss_of(x, y):
        with sdpa_kernel(kernel) if kernel else contextlib.nullcontext():  # in here, as a graph keeps the kernel it was compiled with
            if all_logits:  # as nanoGPT computes it
                return F.cross_entropy(model(x)[0].flatten(0, 1).float(), y.flatten(), ignore_index=-1)
            return model(x, y, n_meta=n_meta)[1]

    run = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    tokens = torch.randint(0, config.text_vocab_size, (batch_size, T + 1))
    if config.meta_id is not None:
        for row in tokens:
            row[1 + torch.randperm(T - 1)[:n_meta]] = config.meta_id
    batches = batches or itertools.repeat((tokens[:, :-1].to(machine.device), tokens[:, 1:].to(machine.device)))
    n_tokens = accumulation * batch_size * T
    flops = model.flops_per_token(T, n_meta) * n_tokens

    def step():
        for _ in range(accumulation):
            x, y = next(batches)
            with torch.autocast(machine.type, machine.dtype, enabled=not precise and machine.dtype != torch.float32):
                loss = run(x, y)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return n_tokens, None if precise else flops

    return step


def training(config, shape, machine):
    """Optimiser steps: on a CPU at block 256 against float32 eager; on a GPU, plain text at block 1024 against nanoGPT's way."""
    if config.gpu:
        plain = replace(shape, meta_id=None, meta_attention=False)
        learned = replace(plain, pos="absolute")
        return compare("training", {
            "GPT-2 as nanoGPT runs it, micro-batch 12": training_step(learned, machine, 12, compiled=True, all_logits=True),
            f"GPT-2, micro-batch {config.batch_size}": training_step(learned, machine, config.batch_size, compiled=True),
            f"GPT-2 with RoPE, micro-batch {config.batch_size}": training_step(plain, machine, config.batch_size, compiled=True),
            f"Meta+RoPE, micro-batch {config.batch_size}": training_step(shape, machine, config.batch_size, compiled=True)}, machine)
    shape, dtype = replace(shape, block_size=256), str(machine.dtype).removeprefix("torch.")
    variants = {"float32, eager": training_step(shape, machine, config.batch_size, compiled=False, precise=True)}
    if machine.dtype != torch.float32:
        variants[f"{dtype}, eager"] = training_step(shape, machine, config.batch_size, compiled=False)
    variants[f"{dtype}, compiled"] = training_step(shape, machine, config.batch_size, compiled=True)
    return compare("training", variants, machine)


def meta(config, shape, machine):
    """What meta-attention costs at block 1024, k = 0.1: the compact form and the dense mask, against none."""
    without, rows, batch = replace(shape, meta_attention=False), [], config.batch_size if config.gpu else max(config.batch_size // 4, 1)
    for compiled in (True,) if config.gpu else (False, True):
        how = "compiled" if compiled else "eager"
        rows += compare("meta", {
            f"no meta-attention, {how}": training_step(without, machine, batch, compiled),
            f"meta-attention, {how}": training_step(shape, machine, batch, compiled),
            f"meta-attention by dense mask, {how}": training_step(shape, machine, batch, compiled, make_dense=True),
        }, machine)
    return rows


def loss(config, shape, machine):
    """Forward and backward of the loss over GPT-2's vocabulary: all logits at once, and in chunks."""
    torch.manual_seed(0)
    tokens = 24 * 1024 if config.gpu else 8 * 1024
    head = torch.nn.Linear(shape.n_embd, 50304, bias=False, device=machine.device)
    x = torch.randn(tokens, shape.n_embd, device=machine.device, requires_grad=True)
    y = torch.randint(0, 50257, (tokens,), device=machine.device)

    def work(function):
        run = torch.compile(function) if machine.compile else function

        def step():
            with machine.autocast():
                run().backward()
            x.grad = head.weight.grad = None
            return tokens, None
        return step

    return compare("loss", {"all logits at once": work(lambda: F.cross_entropy(head(x).float(), y)),
                            "in chunks": work(lambda: LinearCrossEntropy.apply(x, head.weight, y, True))}, machine, rounds=3)


def tuning(config, shape, machine):
    """Forward and backward of fine-tuning on 8 answer tokens a sequence with GPT-2's vocabulary: predicting everywhere, and there alone."""
    torch.manual_seed(0)
    B, T, A = 16, 512 if config.gpu else 256, 8
    model = GPT(replace(shape, vocab_size=50304, meta_id=50257, block_size=T)).to(machine.device)
    tokens = torch.randint(0, 50257, (B, T + 1), device=machine.device)
    x, y = tokens[:, :-1], tokens[:, 1:]
    at = torch.arange(T - A, T, device=machine.device).expand(B, A)
    everywhere, answers = torch.full_like(y, -1).scatter(1, at, y.gather(1, at)), y.gather(1, at)
    forward = torch.compile(model, dynamic=False) if machine.compile else model

    def work(y, at=None):
        def step():
            with machine.autocast():
                forward(x, y, n_meta=16, at=at)[1].backward()
            model.zero_grad(set_to_none=True)
            return B * T, None
        return step

    return compare("tuning", {"predicting everywhere": work(everywhere), "predicting at the answers": work(answers, at)}, machine, rounds=3)


def memory(config, shape, machine):
    """Bytes that a token takes in training, from the peaks of two micro-batches, and the largest that the device holds."""
    rows = []
    for n in (8, 16):  # both hold whole chunks of logits, which grow no more; one after the other, so that only one model is there
        rows += compare("memory", {f"Meta+RoPE, micro-batch {n}": training_step(shape, machine, n, machine.compile)}, machine, rounds=2)
    per_token = (rows[1]["peak_bytes"] - rows[0]["peak_bytes"]) / (8 * shape.block_size)
    fixed = rows[0]["peak_bytes"] - 8 * shape.block_size * per_token
    device = torch.cuda.get_device_properties(machine.device).total_memory
    largest = int((0.95 * device - fixed) / per_token / shape.block_size)  # the rest for CUDA itself, and for what fragments
    print(f"{'memory':<12} {per_token / 1e3:,.0f} kB a token and {fixed / 1e6:,.0f} MB: a micro-batch of {largest} "
          f"in 95% of {device / 2**30:.0f} GiB")
    return rows + [{"group": "memory", "variant": "Meta+RoPE", "bytes_per_token": per_token, "fixed_bytes": fixed,
                    "device_bytes": device, "largest_micro_batch": largest}]


def choices(config, shape, machine):
    """What a config may choose, at block 1024: the micro-batch, and the kernel of the attentions."""
    sizes, kernels = (1, 2, 4), (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    if config.gpu:
        sizes, kernels = (8, 16, 24, 32, 48), (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)

    def step(size, kernel=None):
        return training_step(shape, machine, size, machine.compile, kernel=kernel)

    rows = compare("micro-batch", {f"{size}": step(size) for size in sizes}, machine, rounds=3)
    return rows + compare("kernel", {"torch's choice": step(sizes[1])} | {kernel.name: step(sizes[1], kernel) for kernel in kernels},
                          machine, rounds=3)


def reading(config, shape, machine):
    """Shuffled blocks of 1024 from disk through train.py's loader: alone, from the page cache and with the cache dropped before;
    and under training, against a batch that is there already."""
    T, n_blocks, plain = 1024, 20_000, replace(shape, meta_id=None, meta_attention=False)
    batch = config.batch_size if config.gpu else max(config.batch_size // 4, 1)
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        os.makedirs("data/d")
        tokens = np.random.default_rng(0).integers(0, plain.text_vocab_size, n_blocks * T + 1).astype(np.uint16)
        tokens.tofile("data/d/train_00000.bin")
        manifest = {"block_size": T, "meta_id": 50257, "meta_per_block": 0,
                    "splits": {"train": {"shards": [{"file": "train_00000.bin", "tokens": n_blocks * T}]}}}

        def batches(size):
            own = settings.load(["--dataset=d", f"--batch_size={size}", "--gradient_accumulation_steps=1"])
            return prefetched(micro_batches(Blocks(own, manifest, "train"), own, machine, 0), machine.device)

        def read(cold):
            if cold and hasattr(os, "posix_fadvise"):
                with open("data/d/train_00000.bin", "rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            coming = batches(24)
            for _ in range(100):
                next(coming)
            return 100 * 24 * T, None

        rows = compare("reading", {"page cache warm": lambda: read(False), "page cache cold": lambda: read(True)}, machine, rounds=3)
        return rows + compare("reading", {
            "training step, batch in memory": training_step(plain, machine, batch, machine.compile),
            "training step, batches read": training_step(plain, machine, batch, machine.compile, batches=batches(batch))}, machine)


def generation(config, shape, machine):
    """500 (on a GPU 1,000) text tokens from a prompt of one: without caches, with them, compiled. Then, compiled where training is,
    500 with meta-tokens, per text token and per position fed; on a GPU several sequences at a time. And, eager, the first token."""
    torch.manual_seed(0)
    model = GPT(shape).to(machine.device, machine.dtype).eval()

    def draw(per_position=False, batch=1, prompt=1, new=500, compiled=machine.compile, **options):
        start = torch.zeros(batch, prompt, dtype=torch.long, device=machine.device)

        def work():
            tokens = model.generate(start, new, seed=0, compiled=compiled, **options)
            return batch * (tokens.size(1) - prompt if per_position else new), None
        return work

    new = 1000 if config.gpu else 500
    rows = compare("generation", {"no cache": draw(new=new, use_cache=False), "KV cache": draw(new=new, compiled=False),
                                  "KV cache, compiled": draw(new=new, compiled=True)}, machine, rounds=2)
    rows += compare("generation", {"KV cache, text only": draw(), "with meta-tokens, per text token": draw(meta_rate=0.1),
                                   "with meta-tokens, per position fed": draw(per_position=True, meta_rate=0.1)}, machine,
                    rounds=3 if config.gpu else ROUNDS)
    rows += compare("generation", {f"batch {n}": draw(batch=n) for n in (1, 8, 64)}, machine, rounds=2) if config.gpu else []
    return rows + compare("first token", {f"of a prompt of {n}": draw(prompt=n, new=1, compiled=False) for n in (1, 512)}, machine)


def count_tokens(text):
    return len(prepare.get_tokenizer("gpt2").encode_ordinary(text))


def preparation(config, shape, machine):
    """GPT-2's BPE over 8 copies of the standard library on all cores, against a bare pool that keeps nothing."""
    texts = []
    for _, path in prepare.files_below(sysconfig.get_paths()["stdlib"], (".py",)):
        if "site-packages" not in path:
            with open(path, encoding="utf-8", errors="replace", newline="") as file:
                texts.append(file.read())
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):  # where data/ will lie
        os.makedirs("texts")
        chunks = []
        for i in range(8):
            for j in range(0, len(texts), 100):
                chunks.append("".join(texts[j:j + 100]))
                with open(f"texts/{i}_{j}.txt", "w", encoding="utf-8", errors="replace", newline="") as file:
                    file.write(chunks[-1])

        def bare():
            with multiprocessing.Pool(prepare.cores()) as pool:
                return sum(pool.imap(count_tokens, chunks)), None

        def ours():
            with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                prepare.prepare(settings.load(["--source=texts", "--dataset=d", "--overwrite", "--val_fraction=0.05"]))
            with open("data/d/manifest.json") as file:
                splits = json.load(file)["splits"].values()
            return sum(s["text_tokens"] + s["dropped_text_tokens"] for s in splits), None

        return compare("preparation", {"bare pool around encode_ordinary": bare, "prepare.py": ours}, machine, rounds=3)


def main(argv=None):
    config = settings.load(argv)
    every = {part.__name__: part for part in (
        training, meta, loss, tuning, generation, reading, memory if config.gpu else preparation, choices)}
    names = [name for name in config.parts(every) if name != "choices" or config.what != "all"]  # on request only, it takes long
    size = {"batch_size": 24} if config.gpu else {"n_layer": 6, "n_head": 6, "n_embd": 384, "batch_size": 8}
    for name, value in size.items():
        if not config.given(name):
            setattr(config, name, value)
    machine = Machine(config)
    if config.gpu and machine.type != "cuda":
        raise config.error(f"gpu={config.gpu}, but the device is {machine.type}: leave it out")
    vocabulary = {} if config.gpu else {"vocab_size": 512, "meta_id": 500}
    try:
        shape = GPTConfig(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, **vocabulary)
    except ValueError as e:
        raise config.error(e) from None
    print(f"{machine.name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {shape.n_layer} layers, width "
          f"{shape.n_embd}, batch {config.batch_size}")
    print(f"{'':<12} {'':<44} {'tokens/s':>12} {'speed':>8} {'time':>8} {'spread':>6} {'memory':>10} {'MFU':>6}")
    torch._dynamo.config.cache_size_limit = 64  # of a function, which each part compiles for its shapes
    os.makedirs("results", exist_ok=True)
    path, rows = "_".join(["results/bench", *machine.name().split(), *(names if config.what != "all" else ())]) + ".json", []
    for name in names:
        rows += every[name](config, shape, machine)
        prepare.write_json(path + ".part", {  # should a later part run out of time or memory
            "device": machine.name(), "processor": machine.processor(), "cores": os.cpu_count(), "torch": torch.__version__,
            "dtype": str(machine.dtype), "batch_size": config.batch_size, "model": asdict(shape), "rows": rows})
    os.replace(path + ".part", path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
