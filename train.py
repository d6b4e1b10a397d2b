"""Trains a GPT-2 with meta-tokens: on a CPU, on one GPU, or on many.

    python train.py config/quickstart.py                                  # five minutes on a laptop
    python train.py config/meta_gpt2_h100.py                              # the paper's 152M model on one GPU
    torchrun --nproc_per_node=8 train.py                                  # the same on eight

What a step does is a function of the settings and its number alone (and of the clock, where max_minutes is set):
killed and resumed, or spread over more processes, a run takes the same steps. Writes ckpt.pt (the last state), best.pt
(of the lowest validation loss), log.jsonl and loss.png to out_dir.
"""
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields

import config as settings
import prepare
from model import GPT, GPTConfig, pad_vocab, read_torch_file

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

FROM_CHECKPOINT = ("n_layer", "n_head", "n_embd", "bias", "pos", "rope_base", "beta_fast", "beta_slow", "meta_attention")
MAY_OVERRIDE = ("block_size", "yarn_scale", "dropout", "zero_meta_pos", "zero_meta_embd")
OF_THIS_RUN = ("init_from", "out_dir", "overwrite", "eval_only", "device", "dtype", "compile")  # not kept by --init_from=resume
NO_CHECKPOINT = {"step": None, "settings": {}}  # of OpenAI's GPT-2

# Peak of dense bf16/fp16 matrix products in FLOP/s, by the exact name that the driver gives the device
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12, "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12,
    "Tesla V100-SXM2-16GB": 125e12, "Tesla V100-SXM2-32GB": 125e12,
}


# ----------------------------------------------------------------------------------------------------------------------
# Machine

class Machine:
    """Device, precision and place among the processes."""

    def __init__(self, config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, self.dtype = pick_device(config)
        self.type = self.device.type
        self.compile = config.compile == "true" or (config.compile == "auto" and self.type == "cuda")
        if self.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 where float32 is left
        if self.world > 1:
            if self.type == "cpu":  # the processes of a machine share its cores
                torch.set_num_threads(max(prepare.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", self.world)), 1))
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.type == "cuda" else "gloo")

    def autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.type, self.dtype)

    def all_reduce(self, values, op=dist.ReduceOp.SUM):
        """The sums (or maxima) over all processes of a list of numbers, which stays on the host."""
        values = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(values, op)
        return values.tolist()

    def from_first(self, value):
        """The first process's value, on all of them."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def name(self):
        return torch.cuda.get_device_name(self.device) if self.type == "cuda" else self.type

    @staticmethod
    def processor():
        """The name of the CPU."""
        with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
            if found := re.search(r"model name\s*: (.+)", file.read()):
                return found[1]
        return platform.processor() or platform.machine()

    def peak_flops(self):
        """FLOP/s of all processes together; None for an unknown device or precision."""
        if self.type != "cuda" or self.dtype == torch.float32:
            return None
        peak = PEAK_FLOPS.get(self.name())
        return peak and peak * self.world


def pick_device(config):
    """(torch.device, dtype of the matrix products) for the settings device and dtype. Raises SystemExit."""
    name, alone = config.device, "WORLD_SIZE" not in os.environ
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and alone else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name) or (":" in name and not alone):
        raise config.error(f"device={name}: expected cpu, cuda, {'cuda:N ' if alone else ''}or mps")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise config.error(f"device={device}, but this machine has {torch.cuda.device_count()} CUDA devices: use --device=cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise config.error(f"device={device}, but this machine has no MPS: use --device=cpu")
    if config.dtype != "auto":
        return device, getattr(torch, config.dtype)
    if device.type == "cuda":
        return device, torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return device, torch.bfloat16 if fast else torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# Data

class Blocks:
    """The blocks of one split: x is a block, y the same tokens one later."""

    def __init__(self, config, manifest, split):
        self.block_size, self.meta_id = manifest["block_size"], manifest["meta_id"]
        self.text_per_block = self.block_size - manifest["meta_per_block"]
        shards = manifest["splits"][split]["shards"]
        self.paths = [os.path.join(prepare.folder_of(config), shard["file"]) for shard in shards]
        self.ends = np.cumsum([shard["tokens"] // self.block_size for shard in shards])
        self.prepare_command = prepare.prepare_command(config)

    def __len__(self):
        return int(self.ends[-1])

    def batch(self, numbers):
        """(x, y), each int64 (len(numbers), T). Raises SystemExit for an id that no tokenizer wrote."""
        tokens = np.empty((len(numbers), self.block_size + 1), dtype=np.int64)
        for row, number in zip(tokens, numbers):
            shard = int(np.searchsorted(self.ends, number, side="right"))
            start = int(number - (self.ends[shard - 1] if shard else 0)) * self.block_size
            row[:] = np.fromfile(self.paths[shard], prepare.DTYPE, self.block_size + 1, offset=start * prepare.DTYPE.itemsize)
            if row.max() > self.meta_id:
                raise SystemExit(f"error: {self.paths[shard]}: token id {row.max()} is beyond the vocabulary: "
                                 f"run {self.prepare_command} --overwrite")
        tokens = torch.from_numpy(tokens)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def shuffled(positions, n, seed, epoch):
    """Where a pseudo-random permutation of range(n) sends positions (uint64 array): one epoch's order, without a table.

    A Feistel network permutes the next power of 4; what falls outside range(n) is sent on until it falls inside.
    """
    half = np.uint64(max((n - 1).bit_length() + 1, 2) // 2)
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)

    def permute(v):
        left, right = v >> half, v & low
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        return left << half | right

    positions = permute(positions)
    while (outside := positions >= n).any():
        positions[outside] = permute(positions[outside])
    return positions


def micro_batches(blocks, config, machine, step):
    """This process's micro-batches (x, y), for ever, from a step on. Which blocks a micro-batch holds depends on the
    seed, the step and its number among all processes' alone."""
    while True:
        for micro in range(machine.rank, config.gradient_accumulation_steps, machine.world):
            first = (step * config.gradient_accumulation_steps + micro) * config.batch_size
            samples = np.arange(first, first + config.batch_size, dtype=np.uint64)
            epochs, positions = np.divmod(samples, np.uint64(len(blocks)))
            numbers = np.concatenate([shuffled(positions[epochs == e], len(blocks), config.seed, int(e)) for e in np.unique(epochs)])
            x, y = blocks.batch(numbers)
            yield (x.pin_memory(), y.pin_memory()) if machine.type == "cuda" else (x, y)
        step += 1


def prefetched(batches, device):
    """The same batches on the device, the next one read in a thread meanwhile."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, batches)
        while True:
            x, y = coming.result()
            coming = reader.submit(next, batches)
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


@torch.no_grad()
def evaluate(model, blocks, config, machine):
    """Mean loss in nats per text token over the first eval_tokens of the split, to the nearest block: the same text whatever
    the meta_rate, the window and the batch. Processes share the blocks."""
    n = min(len(blocks), max(1, round(config.eval_tokens / blocks.text_per_block)))
    numbers = range(machine.rank, n, machine.world)
    model.eval()
    total = torch.zeros((), device=machine.device)
    for i in range(0, len(numbers), config.batch_size):
        own = numbers[i:i + config.batch_size]
        x, y = blocks.batch([*own, *[0] * (config.batch_size - len(own))])
        y[len(own):] = -1  # a full batch keeps the shape that is compiled
        with machine.autocast():
            loss = model(x.to(machine.device), y.to(machine.device), n_meta=blocks.block_size - blocks.text_per_block)[1]
        total += loss * len(own)
    model.train()
    total, count = machine.all_reduce([total.item(), len(numbers)])
    return total / count


# ----------------------------------------------------------------------------------------------------------------------
# Model and checkpoints

def load_checkpoint(path):
    """The dictionary that was saved: 'model', 'model_config', 'settings', 'optimizer', 'step', ...

    path is a .pt file, or a folder that holds ckpt.pt. Raises ValueError, one line, if it is missing, truncated or
    something else.
    """
    if not path.endswith(".pt"):
        path = os.path.join(path, "ckpt.pt")
    checkpoint = read_torch_file(path)
    if not isinstance(checkpoint, dict) or not {"model", "model_config", "settings", "step"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of train.py")
    if differing := checkpoint["model_config"].keys() ^ {f.name for f in fields(GPTConfig)}:
        raise ValueError(f"{path} was written by another version: its architecture differs in {', '.join(sorted(differing))}")
    return checkpoint


def model_of(checkpoint):
    """Its model, on the CPU. Raises ValueError if the weights do not fit."""
    return GPT(GPTConfig(**checkpoint["model_config"])).take_weights(checkpoint["model"], "the checkpoint")


def load_saved(config):
    """load_trained for what a config file has trained: of the checkpoint in out_dir, even where the file's init_from names the model
    that the run began with, and with the checkpoint's window and positions. What the command line says wins."""
    if not config.typed("init_from"):
        config.init_from = "resume"
    return load_trained(config, config.typed)


def load_trained(config, is_asked):
    """(model, checkpoint) that init_from names, on the CPU: a checkpoint (the one in out_dir for 'resume' and 'scratch') or
    OpenAI's GPT-2, for which it is NO_CHECKPOINT. The config takes over architecture and tokenizer, but for the settings of
    MAY_OVERRIDE that is_asked.

    Raises SystemExit for a bad file, or where the command line asks for another architecture.
    """
    try:
        if is_pretrained(config.init_from):
            model, checkpoint, tokenizer = GPT.from_pretrained(config.init_from), NO_CHECKPOINT, "gpt2"
        else:
            checkpoint = load_checkpoint(checkpoint_path(config))
            model, tokenizer = model_of(checkpoint), checkpoint["settings"]["tokenizer"]
        adopt(config, asdict(model.config) | {"tokenizer": tokenizer}, is_asked)
        overrides = {name: getattr(config, name) for name in MAY_OVERRIDE}
        if config.pos == "absolute":  # the table of positions stays as it is
            if config.block_size > model.config.block_size:
                raise ValueError(f"block_size={config.block_size}, but the checkpoint has learned positions for "
                                 f"{model.config.block_size}")
            overrides["block_size"] = model.config.block_size
        return model.reconfigured(**overrides), checkpoint
    except ValueError as e:
        raise config.error(e) from None


def checkpoint_path(config):
    """Where load_trained reads: out_dir for a run's own checkpoint."""
    return config.out_dir if config.init_from in ("resume", "scratch") else config.init_from


def stem(path):
    """A checkpoint's name: its file's without .pt, or its folder's."""
    return os.path.basename(os.path.normpath(path)).removesuffix(".pt")


def sha256_of_weights(model):
    digest = hashlib.sha256()
    for name, p in model.state_dict().items():
        digest.update(name.encode() + p.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def adopt(config, found, is_asked):
    """Takes architecture and tokenizer from a checkpoint, and says so where a config file would have it otherwise and may, if asked.
    Meta-attention may be asked of a model without meta-tokens."""
    for name in ("tokenizer", *FROM_CHECKPOINT, *MAY_OVERRIDE):
        value, asked = found[name], getattr(config, name)
        was_asked = config.given(name) if name == "tokenizer" else config.typed(name)
        if (name in MAY_OVERRIDE and is_asked(name)) or (name == "meta_attention" and found["meta_id"] is None):
            continue
        if was_asked and asked != value:
            raise config.error(f"{name}={asked}, but the checkpoint has {value}: leave it out, or train from scratch")
        if name in MAY_OVERRIDE and config.given(name) and asked != value:
            print(f"{name}={value}, as the checkpoint has it; --{name}={asked} would be as {config.origin[name]} has it", file=sys.stderr)
            config.origin[name] = "the checkpoint"
        setattr(config, name, value)


def new_model_config(config, text_vocab_size):
    """The architecture that the settings ask for. Raises SystemExit if there is none such."""
    try:
        return GPTConfig(vocab_size=pad_vocab(text_vocab_size + 1), meta_id=text_vocab_size if config.meta_rate > 0 else None,
                         text_vocab_size=text_vocab_size, **{name: getattr(config, name) for name in FROM_CHECKPOINT + MAY_OVERRIDE})
    except ValueError as e:
        raise config.error(e) from None


def is_pretrained(init_from):
    """A name of OpenAI's GPT-2, or a folder in Hugging Face's format."""
    return os.path.isfile(os.path.join(init_from, "config.json")) or (init_from.startswith("gpt2") and not os.path.exists(init_from))


def adopt_settings(config, checkpoint, names):
    """Takes these settings from a checkpoint where they were not given now."""
    for name in names:
        if name in checkpoint["settings"] and not config.given(name):
            setattr(config, name, checkpoint["settings"][name])


def resume_settings(config):
    """With --init_from=resume, whatever was not given now is as it was then."""
    try:
        adopt_settings(config, load_checkpoint(config.out_dir), settings.SETTINGS.keys() - set(OF_THIS_RUN))
    except ValueError as e:
        raise config.error(e) from None


def save(path, checkpoint, advice="run the same command again"):
    """Replaces the file at once, or leaves it as it is. Raises SystemExit, with advice on how to go on, if the disk is full."""
    try:
        with open(path + ".tmp", "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        before = f"it is still the one before; make room, and {advice}" if os.path.exists(path) else "make room"
        raise SystemExit(f"error: cannot save {path} ({str(e).splitlines()[0]}): {before}") from None


def keep_best(out_dir):
    """Makes best.pt what ckpt.pt is now."""
    last, best = os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "best.pt")
    if os.path.exists(best + ".tmp"):
        os.remove(best + ".tmp")
    try:
        os.link(last, best + ".tmp")  # no second copy: ckpt.pt will be replaced, not written to
    except OSError:
        shutil.copyfile(last, best + ".tmp")
    os.replace(best + ".tmp", best)


def load_optimizer(optimizer, scaler, checkpoint):
    """Takes over the moments and the scale of the loss, and keeps the settings of now."""
    settings_of_now = [{name: group[name] for name in ("weight_decay", "betas", "fused")} for group in optimizer.param_groups]
    optimizer.load_state_dict(checkpoint["optimizer"])
    for group, now in zip(optimizer.param_groups, settings_of_now):
        group.update(now)
    if scaler.is_enabled() and checkpoint["scaler"]:  # empty, if the run was not in float16 then
        scaler.load_state_dict(checkpoint["scaler"])


def go_on_command():
    arguments = [arg for arg in sys.argv[1:] if not arg.startswith(("--init_from", "--overwrite"))]
    launcher = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"] if "LOCAL_WORLD_SIZE" in os.environ else ["python"]
    return f"go on with: {shlex.join([*launcher, 'train.py', *arguments, '--init_from=resume'])}"


# ----------------------------------------------------------------------------------------------------------------------
# The log

class Log:
    """log.jsonl, lines on the terminal, and loss.png; of the first process only."""

    def __init__(self, config, machine, step):
        self.path, self.on = os.path.join(config.out_dir, "log.jsonl"), machine.rank == 0
        self.picture = os.path.join(config.out_dir, "loss.png")
        self.entries = self.read(step) if self.on and step > 0 and os.path.exists(self.path) else []
        if self.on:
            with open(self.path + ".tmp", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in self.entries)
            os.replace(self.path + ".tmp", self.path)

    def read(self, step):
        """What was logged up to a step; a line that a crash cut short is none."""
        with open(self.path, encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("}\n")]
        return [entry for entry in map(json.loads, lines) if entry["step"] <= step]

    def write(self, line=None, **entry):
        if self.on:
            self.entries.append(entry)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        self.say(line)

    def say(self, line):
        if self.on and line:
            print(line, flush=True)

    def draw(self):
        if not self.on or len(self.entries) < 2:
            return
        from matplotlib.figure import Figure
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, label, style in (("loss", "training", {"alpha": 0.6}), ("val_loss", "validation", {"marker": "o", "markersize": 3})):
            entries = [e for e in self.entries if name in e]
            ends = [e["step"] for e in entries[-3:]]
            if name == "loss" and len(ends) == 3 and 2 * (ends[2] - ends[1]) < ends[1] - ends[0]:
                entries.pop()  # the mean of a few steps only
            if entries:
                points = [(e["text_tokens"] / 1e6, e[name]) for e in entries]
                axes.plot(*zip(*points), label=f"{label}, {points[-1][1]:.3f} at the end", **style)
        losses = [e[name] for e in self.entries for name in ("loss", "val_loss") if name in e]
        top = min(max(losses), 2.5 * min(losses))  # the first steps would flatten the rest
        axes.set(xlabel="text tokens seen (millions)", ylabel="loss (nats per text token)", ylim=(0.95 * min(losses), top))
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.picture + ".tmp", format="png", dpi=120)
        os.replace(self.picture + ".tmp", self.picture)


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


# ----------------------------------------------------------------------------------------------------------------------
# Training

def learning_rate(config, step, minutes):
    """Linear warm-up, then a cosine down to min_lr over the steps, or over the minutes if these end first."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    progress = (step - config.warmup_iters) / max((config.lr_decay_iters or config.max_iters) - config.warmup_iters, 1)
    if config.max_minutes:
        progress = max(progress, minutes / config.max_minutes)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * min(progress, 1))) * (config.learning_rate - config.min_lr)


def diverged(loss, norm, scaler):
    """Whether the loss, or the gradient's norm, is no longer finite. A step of such a gradient a GradScaler in use skips."""
    return not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled())


class StopRequest:
    """Whether SIGINT or SIGTERM has asked to stop, until restore(): its number, or 0. The second signal is final."""

    def __init__(self):
        self.asked = 0
        self.handlers = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame):
        self.asked = number
        signal.signal(number, signal.SIG_DFL)

    def restore(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def no_meta_tokens(config):
    return config.error(f"meta_attention={config.meta_attention} needs meta-tokens, but meta_rate={config.meta_rate}")


def check_start(config, machine):
    """Refuses what would go wrong later."""
    if config.init_from == "scratch":
        if config.yarn_scale > 1:
            raise config.error(f"yarn_scale={config.yarn_scale} extends a trained model: name it with --init_from=")
        if config.meta_attention and config.meta_rate == 0:
            raise no_meta_tokens(config)
        new_model_config(config, text_vocab_size=50257)
    if config.gradient_accumulation_steps % machine.world:
        raise config.error(f"gradient_accumulation_steps={config.gradient_accumulation_steps} is not divisible by the "
                           f"{machine.world} processes")
    last = os.path.join(config.out_dir, "ckpt.pt")
    if config.init_from != "resume" and os.path.exists(last) and not config.overwrite:
        raise config.error(f"{config.out_dir} holds a run already: --init_from=resume goes on with it, --overwrite replaces it, "
                           "--out_dir= names another")


def open_data(config, machine):
    """The manifest of the data, checked; the embedded corpus is prepared on the way."""
    manifest = problem = None
    if machine.rank == 0:
        try:
            if config.source == "stdlib" and not os.path.exists(os.path.join(prepare.folder_of(config), "manifest.json")):
                prepare.prepare(config)
            manifest = prepare.read_manifest(config)
            prepare.check_fit(config, manifest)
            if sum(shard["bytes"] for split in manifest["splits"].values() for shard in split["shards"]) < 1e9:
                prepare.verify(config, manifest)
        except SystemExit as e:
            problem = str(e)
    manifest, problem = machine.from_first((manifest, problem))
    if problem:
        raise SystemExit(problem if machine.rank == 0 else 1)
    return manifest


def open_model(config, manifest, trained):
    """The model to train: the trained one, with meta-tokens added if only the data have them, or a new one."""
    if trained is None:
        return GPT(new_model_config(config, manifest["text_vocab_size"]))
    if trained.config.meta_id is None and config.meta_rate > 0:
        return trained.with_meta_tokens(manifest["meta_id"], config.meta_attention)
    if trained.config.meta_id is None and config.meta_attention and config.given("meta_attention"):
        raise no_meta_tokens(config)
    return trained


def evaluate_saved(config, machine):
    """Prints the validation loss of the model that the config has trained, or that the command line names."""
    trained, checkpoint = load_saved(config)
    adopt_settings(config, checkpoint, ("meta_rate", "meta_placement"))
    manifest = open_data(config, machine)
    if trained.config.meta_id is None and config.meta_rate > 0:
        raise config.error(f"meta_rate={config.meta_rate}, but the checkpoint has no meta-tokens: name a --dataset= of plain text, and "
                           "--meta_rate=0")
    model = open_model(config, manifest, trained).to(machine.device)
    loss = evaluate(torch.compile(model) if machine.compile else model, Blocks(config, manifest, "val"), config, machine)
    if machine.rank == 0:
        print(f"validation {loss:.4f} nats per text token, a perplexity of {math.exp(loss):.2f}")


def train(config):
    machine = Machine(config)
    torch.manual_seed(config.seed)
    if config.init_from == "resume":
        resume_settings(config)
    if config.eval_only:
        return evaluate_saved(config, machine)
    check_start(config, machine)
    trained, checkpoint = (None, None) if config.init_from == "scratch" else load_trained(config, config.given)
    manifest = open_data(config, machine)
    train_blocks, val_blocks = (Blocks(config, manifest, split) for split in ("train", "val"))
    n_meta = manifest["meta_per_block"]

    raw_model = open_model(config, manifest, trained).to(machine.device)
    optimizer = raw_model.configure_optimizer(config.learning_rate, config.weight_decay, (config.beta1, config.beta2))
    scaler = torch.amp.GradScaler(machine.type, enabled=machine.dtype == torch.float16)
    step, best, minutes_before = 0, math.inf, 0.0
    if config.init_from == "resume":
        step, best, minutes_before = checkpoint["step"], checkpoint["best_val_loss"], checkpoint["minutes"]
        load_optimizer(optimizer, scaler, checkpoint)
    del checkpoint, trained
    local_model = model = torch.compile(raw_model) if machine.compile else raw_model
    if machine.world > 1:
        model = DistributedDataParallel(local_model, device_ids=[machine.device.index] if machine.type == "cuda" else None,
                                        find_unused_parameters=raw_model.config.meta_attention and n_meta == 0)

    own_micro_batches = config.gradient_accumulation_steps // machine.world
    tokens_per_step = config.gradient_accumulation_steps * config.batch_size * config.block_size
    text_per_step = config.gradient_accumulation_steps * config.batch_size * train_blocks.text_per_block
    flops_per_token, peak = raw_model.flops_per_token(config.block_size, n_meta), machine.peak_flops()

    os.makedirs(config.out_dir, exist_ok=True)
    log = Log(config, machine, step)
    log.write(f"{raw_model.num_params() / 1e6:.1f}M parameters; {len(train_blocks) * config.block_size / 1e6:,.1f}M training tokens, "
              f"{tokens_per_step:,} a step; {machine.world} x {machine.name()}, {str(machine.dtype).removeprefix('torch.')}"
              + (", compiled" if machine.compile else ""),
              step=step, text_tokens=step * text_per_step, parameters=raw_model.num_params(), world=machine.world, device=machine.name(),
              dtype=str(machine.dtype), torch=torch.__version__, settings=asdict(config))

    def save_state():
        if machine.rank == 0:
            save(os.path.join(config.out_dir, "ckpt.pt"), {
                "model": raw_model.state_dict(), "model_config": asdict(raw_model.config), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "settings": asdict(config), "step": step, "best_val_loss": best, "minutes": minutes},
                go_on_command())

    def check_finite(loss):
        if diverged(loss, norm, scaler):
            last = os.path.join(config.out_dir, "ckpt.pt")
            good = f"the last good checkpoint is {last}" if os.path.exists(last) else "no checkpoint was saved before"
            raise SystemExit(f"error: the loss is {loss}, the gradient's norm {norm} at step {step}, learning rate {lr:.2e}: {good}; "
                             "try a lower --learning_rate")

    stop_request = StopRequest()
    batches = prefetched(micro_batches(train_blocks, config, machine, step), machine.device)
    started = timed = time.monotonic()
    loss_sum, norm, lr = torch.zeros((), device=machine.device), 0.0, 0.0
    first_step = logged_step = timed_step = step
    stop, minutes = 0, minutes_before
    while True:
        if machine.world == 1 or step % config.log_interval == 0:  # all stop at the same step, by the same clock
            minutes = minutes_before + (time.monotonic() - started) / 60
            stop, minutes = machine.all_reduce([stop_request.asked, minutes], dist.ReduceOp.MAX)
        done = step >= config.max_iters or (config.max_minutes and minutes >= config.max_minutes)

        if step > logged_step and (step % config.log_interval == 0 or step % config.eval_interval == 0 or done or stop):
            steps = step - logged_step
            [loss], norm = machine.all_reduce([loss_sum.item() / steps / machine.world]), float(norm)
            check_finite(loss)
            now = time.monotonic()
            speed = (step - timed_step) * tokens_per_step / (now - timed)
            left = (config.max_iters - step) * tokens_per_step / speed
            if config.max_minutes:
                left = min(left, 60 * (config.max_minutes - minutes))
            mfu = speed * flops_per_token / peak if peak else None
            log.write(f"step {step:>{len(str(config.max_iters))}}/{config.max_iters} | loss {loss:.4f} | {speed:,.0f} tokens/s"
                      + (f" | MFU {100 * mfu:.1f}%" if mfu else "") + f" | lr {lr:.2e} | ETA {duration(max(left, 0))}",
                      step=step, text_tokens=step * text_per_step, loss=loss, lr=lr, tokens_per_s=speed, mfu=mfu,
                      grad_norm=norm if math.isfinite(norm) else None, minutes=minutes)
            timed, timed_step, logged_step = now, step, step
            loss_sum.zero_()
        elif machine.compile and step == first_step + 1:  # the first step took as long as it took to compile
            loss_sum.item()
            timed, timed_step = time.monotonic(), step

        if stop:
            save_state()
            log.say(f"stopped and saved at step {step}; {go_on_command()}")
            break
        if done or (step % config.eval_interval == 0 and (step > first_step or step == 0)):
            before = time.monotonic()
            val_loss = evaluate(local_model, val_blocks, config, machine)
            check_finite(val_loss)
            improved, best = val_loss < best, min(val_loss, best)
            if step > first_step or config.init_from != "resume":
                save_state()
            if improved and machine.rank == 0:
                keep_best(config.out_dir)
            log.write(f"step {step}: validation {val_loss:.4f} nats per text token" + (", the best so far" if improved else ""),
                      step=step, text_tokens=step * text_per_step, val_loss=val_loss, minutes=minutes)
            log.draw()
            timed += time.monotonic() - before
        if done:
            break

        lr = learning_rate(config, step, minutes)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for micro in range(own_micro_batches):
            if machine.world > 1:
                model.require_backward_grad_sync = micro == own_micro_batches - 1
            if config.dropout > 0:  # the same masks whatever the number of processes
                number = machine.rank + micro * machine.world
                torch.manual_seed(int(np.random.SeedSequence([config.seed, step, number]).generate_state(1)[0]))
            x, y = next(batches)
            with machine.autocast():
                loss = model(x, y, n_meta=n_meta)[1] / own_micro_batches
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1

    stop_request.restore()
    if stop:
        # as shells count, so that what waits behind && does not begin; of the first alone, as torchrun ends all when one fails
        raise SystemExit(128 + int(stop) if machine.rank == 0 else 0)
    if machine.rank == 0:
        print(f"\n{config.out_dir}: ckpt.pt, best.pt ({best:.4f}), log.jsonl, loss.png. A sample:\n")
        encoding = prepare.get_tokenizer(config.tokenizer)
        prompt = torch.tensor([[encoding.eot_token]], device=machine.device)
        raw_model.eval()
        tokens = raw_model.generate(prompt, 200, temperature=0.8, meta_rate=config.meta_rate, seed=config.seed)
        print(prepare.decode(encoding, tokens[0].tolist()))


def main(argv=None):
    config = settings.load(argv)
    try:
        train(config)
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    except torch.OutOfMemoryError:
        raise config.error(f"too little memory for batch_size={config.batch_size}: halve it and double --gradient_accumulation_steps, "
                           "which takes the same steps") from None
    except OSError as e:
        raise SystemExit(f"error: {e.filename or config.out_dir}: {e.strerror}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
