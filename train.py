"""Train a GPT-2 with meta-tokens: on a CPU, on one GPU, or on many.

    python train.py config/quickstart.py                 # five minutes on a laptop
    python train.py config/meta_gpt2_h100.py             # the paper's model on one GPU
    torchrun --nproc_per_node=8 train.py                 # the same model on eight GPUs

What a step reads, its learning rate and its dropout depend only on the settings and the
step number (and on the clock, if max_minutes is set). So a run that was killed and
resumed goes on as if nothing had happened, and a run on eight processes takes the same
steps as on one. out_dir gets ckpt.pt (the latest state), best.pt (the one with the
lowest validation loss), log.jsonl and loss.png.
"""
import math
import os
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields

import config as settings
import checkpoint
import prepare
from machine import Machine, Speed, StopRequest, duration, is_first_process, is_out_of_memory
from model import GPT, GPTConfig, pad_vocab
from prepare import Blocks

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

# Below, `config` is a Config: all settings, and where each was set.
#   config.given(name)              whether a config file or the command line has set it
#   config.given_values(names)      {name: value} of those that were given
#   config.typed(name)              whether the command line has; typed_values likewise
#   config.remember(saved, names)   sets those not given to what the dictionary `saved`
#                                   says; they still do not count as given
#   config.checked(function, ...)   calls it, and turns a ValueError into config.error
#   config.error(message)           a SystemExit of one line, to be raised

# When a run is resumed, its settings come from the checkpoint, except those given again
# and these:
OF_THIS_RUN = {"init_from", "out_dir", "overwrite", "eval_only", "device", "compile"}

# Whenever training starts from a checkpoint, architecture and tokenizer are its own. If
# one of them is given and differs, those in checkpoint.MAY_CHANGE (block_size, dropout,
# ...) replace the checkpoint's, and any other is an error.
COMPARED_WITH_CHECKPOINT = ("tokenizer", *checkpoint.ARCHITECTURE)


# --------------------------------------------------------------------------------------
# Data: which blocks a step reads

def shuffled(positions, n, seed, epoch):
    """Apply a pseudo-random permutation of range(n) to positions, an array of uint64.

    This gives the order of an epoch without storing it. A Feistel network permutes
    range(4**half), the smallest such range that holds n numbers. A result of n or more
    is permuted again, until it is below n: this is still one-to-one.
    """
    bits = (n - 1).bit_length()                  # of the largest position
    half = np.uint64(max((bits + 1) // 2, 1))    # half of them, rounded up
    low_bits = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)

    def permute(values):
        left, right = values >> half, values & low_bits
        for key in keys:  # the constants are splitmix64's; the products wrap around
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low_bits)
        return (left << half) | right

    positions = permute(positions)
    while (outside := positions >= n).any():
        positions[outside] = permute(positions[outside])
    return positions


def blocks_of_samples(samples, n_blocks, seed):
    """Map indices of samples to indices of blocks (uint64 arrays).

    Sample s, counted from the start of the run, reads the block at position
    s % n_blocks in the shuffled order of epoch s // n_blocks.
    """
    epochs, positions = np.divmod(samples, np.uint64(n_blocks))
    numbers = np.empty_like(positions)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        numbers[inside] = shuffled(positions[inside], n_blocks, seed, int(epoch))
    return numbers


def micro_batches(blocks, first_sample, batch_size, accumulation, seed, rank, world):
    """Yield this process's micro-batches (x, y) endlessly, from a sample on.

    A step has `accumulation` of them, dealt out to the processes in turn. What one
    reads depends only on the seed, on how many samples were read before the step, and
    on its index in the step.
    """
    while True:
        for index_in_step in range(rank, accumulation, world):
            first = first_sample + index_in_step * batch_size
            samples = np.arange(first, first + batch_size, dtype=np.uint64)
            yield blocks.batch(blocks_of_samples(samples, len(blocks), seed))
        first_sample += accumulation * batch_size


def prefetched(batches, device):
    """Yield the same batches on the device, while a thread reads the next one."""
    def read():
        x, y = next(batches)
        return (x.pin_memory(), y.pin_memory()) if device.type == "cuda" else (x, y)

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read)
        while True:
            x, y = coming.result()
            coming = reader.submit(read)
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


# --------------------------------------------------------------------------------------
# One step

def learning_rate(step, minutes, peak, floor, warmup, steps, max_minutes=0.0):
    """Linear warm-up to peak, then a cosine down to floor.

    It reaches floor when the steps or the minutes run out, whichever is first.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    if max_minutes:
        progress = max(progress, minutes / max_minutes)
    return floor + 0.5 * (1 + math.cos(math.pi * min(progress, 1))) * (peak - floor)


def optimizer_step(losses, model, optimizer, scaler, grad_clip):
    """Take one step. Returns (loss, norm of the gradient), tensors on the device.

    losses: an iterator that computes the losses of this process's micro-batches one by
    one, each divided by their number. grad_clip=0 turns clipping off.
    """
    total = 0.0
    for loss in losses:
        scaler.scale(loss).backward()
        total = total + loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def micro_losses(model, batches, machine, config, step, n_meta):
    """Yield the loss of each of this process's micro-batches in a step / their number.

    n_meta: meta-tokens in each block.
    """
    n = config.gradient_accumulation_steps // machine.world
    for i in range(n):
        if machine.world > 1:  # DDP averages the gradients once, in the last backward
            model.require_backward_grad_sync = i == n - 1
        if config.dropout > 0:
            index_in_step = machine.rank + i * machine.world       # as in micro_batches
            seed_dropout(config.seed, step, index_in_step)
        x, y = next(batches)
        with machine.autocast():
            loss = model(x, y, n_meta)[1]
        yield loss / n


def seed_dropout(*numbers):
    """Make the next masks depend on these numbers alone, not on what ran before."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def diverged(loss, norm, scaler):
    """Whether training has failed."""
    if scaler.is_enabled():  # it skips a step of infinite norm, and lowers its scale
        return not math.isfinite(loss)
    return not (math.isfinite(loss) and math.isfinite(norm))


@torch.no_grad()
def evaluate(model, blocks, eval_tokens, batch_size, machine):
    """Mean loss in nats per text token, over the first eval_tokens of text.

    That is the same text for any meta_rate, block_size and batch_size, up to rounding
    to whole blocks. The processes share the blocks.
    """
    n_blocks = min(len(blocks), max(1, round(eval_tokens / blocks.text_per_block)))
    numbers = range(machine.rank, n_blocks, machine.world)
    total = torch.zeros((), device=machine.device)
    model.eval()
    for i in range(0, len(numbers), batch_size):
        own = list(numbers[i:i + batch_size])
        # Fill up the last batch, so that nothing is compiled again for its shape
        x, y = blocks.batch(own + [0] * (batch_size - len(own)))
        y[len(own):] = -1
        with machine.autocast():
            loss = model(x.to(machine.device), y.to(machine.device), blocks.n_meta)[1]
        # The loss is a mean over text targets. Each block has text_per_block of them:
        # none begins with a meta-token, so y lacks one text token of x and has another
        total += loss * len(own)
    model.train()
    total, count = machine.all_reduce([total.item(), len(numbers)])
    return total / count


# --------------------------------------------------------------------------------------
# What a run starts from

def check_start(config, world):
    """Refuse settings that would fail later."""
    if config.out_dir.endswith(".pt") or os.path.isfile(config.out_dir):
        raise config.error(f"out_dir={config.out_dir}: name a folder")
    if config.init_from == "scratch":
        if config.yarn_scale > 1:
            raise config.error(f"yarn_scale={config.yarn_scale} extends a trained model: name it "
                               "with --init_from=")
        check_meta_tokens(config)
        new_model_config(config, text_vocab_size=50257)  # only checks the architecture
    if config.gradient_accumulation_steps % world:
        raise config.error(f"gradient_accumulation_steps={config.gradient_accumulation_steps} is "
                           f"not divisible by the {world} processes")
    files = [os.path.join(config.out_dir, name) for name in ("ckpt.pt", "best.pt")]
    is_begun = any(map(os.path.exists, files))
    if config.init_from != "resume" and is_begun and not config.overwrite:
        raise config.error(f"{config.out_dir} holds a run already: --init_from=resume "
                           "continues it, --overwrite replaces it, --out_dir= names another")


def check_meta_tokens(config):
    if config.meta_attention and config.meta_rate == 0:
        raise config.error(f"meta_attention={config.meta_attention} needs meta-tokens, but "
                           f"meta_rate={config.meta_rate}")


def new_model_config(config, text_vocab_size):
    """The architecture that the settings ask for. Raises SystemExit if impossible."""
    values = {name: getattr(config, name) for name in checkpoint.ARCHITECTURE}
    meta_id = text_vocab_size if config.meta_rate > 0 else None
    return config.checked(GPTConfig, vocab_size=pad_vocab(text_vocab_size + 1), meta_id=meta_id,
                          text_vocab_size=text_vocab_size, **values)


def open_trained(config, path, given, saved=None):
    """(model, checkpoint) at a path. Copies its architecture and tokenizer into config.

    given: the settings that somebody asked for. Those of checkpoint.MAY_CHANGE may
    differ from the checkpoint's, and a line says so. saved: the checkpoint, if it was
    read before. Raises SystemExit if any other setting differs, or if the file is bad.
    """
    model, saved = config.checked(checkpoint.load_trained, path, given, saved)
    config.tokenizer = saved["settings"]["tokenizer"]
    for name in checkpoint.ARCHITECTURE:
        if name == "meta_attention" and model.config.meta_id is None:
            continue  # leave it as asked: open_model may still add meta-attention
        setattr(config, name, getattr(model.config, name))
    for name, before in saved.get("model_config", {}).items():  # OpenAI's GPT-2 has none
        after = getattr(model.config, name)
        if after != before and is_first_process():
            print(f"{name}={after} replaces the checkpoint's {before}", file=sys.stderr)
    c = model.config
    fitting = c.yarn_scale * c.original_block_size
    if c.yarn_scale > 1 and c.block_size != fitting and is_first_process():
        print(f"yarn_scale={c.yarn_scale} suits block_size={fitting:g} (the last window without "
              f"YaRN was {c.original_block_size}), not {c.block_size}", file=sys.stderr)
    return model, saved


def load_saved(config):
    """(model, checkpoint, path) of out_dir, or of the --init_from= that was typed.

    Here, unlike in training, init_from and the architecture count only if typed. A
    config file says how training began, say from gpt2, and not what came of it. The
    tokenizer always counts, and must be the checkpoint's.
    """
    given = config.given_values(["tokenizer"]) | config.typed_values(checkpoint.ARCHITECTURE)
    if config.typed("init_from") and config.init_from not in ("resume", "scratch"):
        return *open_trained(config, config.init_from, given), config.init_from
    # Pass the file: if out_dir=gpt2 were missing, open_trained would fetch GPT-2
    own_file = os.path.join(config.out_dir, "ckpt.pt")
    return *open_trained(config, own_file, given), config.out_dir


def open_data(config, machine):
    """The manifest of the data, checked by the first process for all."""
    manifest = problem = None
    if machine.rank == 0:
        try:
            manifest = prepared_manifest(config)
        except SystemExit as e:
            problem = str(e)
    manifest, problem = machine.from_first((manifest, problem))
    if problem:
        raise SystemExit(problem if machine.rank == 0 else 1)
    return manifest


def prepared_manifest(config):
    """The manifest, checked. Prepares source=stdlib, as that needs no download.

    But not as a data set whose name was typed: it may be meant to be another source's.
    """
    manifest_file = os.path.join(prepare.folder_of(config.dataset), "manifest.json")
    is_own = config.source == "stdlib" and (config.typed("source") or not config.typed("dataset"))
    if is_own and not os.path.exists(manifest_file):
        prepare.prepare(config)
    manifest = prepare.read_manifest(config)
    prepare.check_fit(config, manifest)
    splits = manifest["splits"].values()
    if sum(shard["bytes"] for split in splits for shard in split["shards"]) < 1e9:
        prepare.verify(config, manifest)  # checksums: for larger data they take minutes
    return manifest


def open_model(config, manifest, trained):
    """The model to train: `trained`, or a new one if that is None.

    It gets meta-tokens if meta_rate > 0 and the trained model has none.
    """
    if trained is None:
        return GPT(new_model_config(config, manifest["text_vocab_size"]))
    if trained.config.meta_id is None:
        if config.meta_rate > 0:
            return trained.with_meta_tokens(manifest["meta_id"], config.meta_attention)
        # A plain model on plain text: meta_attention=True is the default, and an error
        # only if somebody asked for it.
        if config.given("meta_attention"):
            check_meta_tokens(config)
    return trained


def evaluate_saved(config, machine):
    """Print the validation loss of out_dir's model, or of the --init_from= typed."""
    trained, saved, _ = load_saved(config)
    # The data must have the checkpoint's share and places of meta-tokens, or those that
    # were asked for
    config.remember(saved["settings"], ("meta_rate", "meta_placement"))
    manifest = open_data(config, machine)
    if trained.config.meta_id is None and config.meta_rate > 0:
        raise config.error(f"meta_rate={config.meta_rate}, but the checkpoint has no meta-tokens: "
                           "name a --dataset= of plain text, and --meta_rate=0")
    model = trained.to(machine.device)
    blocks = Blocks(prepare.folder_of(config.dataset), manifest, "val")
    model = torch.compile(model) if machine.compile else model
    loss = evaluate(model, blocks, config.eval_tokens, config.batch_size, machine)
    if machine.rank == 0:
        print(f"validation {loss:.4f} nats per text token, perplexity {math.exp(loss):.2f}")


# --------------------------------------------------------------------------------------
# A run

@dataclass
class Progress:
    """How far a run has come. Its checkpoints hold it."""
    step: int = 0
    samples: int = 0           # blocks read
    text_tokens: int = 0       # text tokens in them
    minutes: float = 0.0
    best_val_loss: float = math.inf
    best_step: int = -1        # the step of best.pt; -1: none, or unknown
    evaluated: int = -1        # the step of the last evaluation
    logged: int = 0            # the step of the last line that told the training loss
    loss_sum: float = 0.0      # the sum of the losses since that step


def saved_progress(saved, text_per_block):
    """The Progress in a checkpoint."""
    names = {field.name for field in fields(Progress)}
    progress = Progress(**{name: saved[name] for name in names & saved.keys()})
    if "samples" not in saved:  # an older version did not count them
        before = saved["settings"]
        blocks_per_step = before["batch_size"] * before["gradient_accumulation_steps"]
        progress.samples = progress.step * blocks_per_step
        progress.text_tokens = progress.samples * text_per_block
        progress.evaluated = progress.logged = progress.step
    return progress


def fingerprint(manifest, eval_tokens):
    """What losses depend on besides the model, as {name: checksum or number}."""
    data = {"eval_tokens": eval_tokens}
    for split, part in manifest["splits"].items():
        checksums = [shard["sha256"] for shard in part["shards"]]
        data[split] = prepare.sha256("".join(checksums).encode())
    return data


def claim(config, machine, progress):
    """Make out_dir this run's, and remove what another left there unless it is resumed.

    The first process returns a lock, which is to be kept. Raises SystemExit if another
    run is writing there.
    """
    if machine.rank > 0:
        return None
    os.makedirs(config.out_dir, exist_ok=True)
    lock = prepare.lock(
        os.path.join(config.out_dir, ".lock"),
        f"{config.out_dir} is in use by another run: wait for it, or name another --out_dir=")
    if config.init_from != "resume":
        checkpoint.remove_run(config.out_dir)
    elif progress.best_step == progress.step:
        # The run may have been killed between saving ckpt.pt and making it best.pt
        checkpoint.keep_best(config.out_dir)
    return lock


def train(config):
    # The machine, the checkpoint to start from, the data
    trained = saved = None
    if config.init_from == "resume":
        # Restore its settings first, as all that follows depends on them
        saved = config.checked(checkpoint.load, config.out_dir)
        config.remember(saved["settings"], settings.SETTINGS.keys() - OF_THIS_RUN)
    machine = config.checked(Machine, config.device, config.dtype, config.compile)
    torch.manual_seed(config.seed)
    if config.eval_only:
        return evaluate_saved(config, machine)
    check_start(config, machine.world)
    if config.init_from != "scratch":
        given = config.given_values(COMPARED_WITH_CHECKPOINT)
        trained, saved = open_trained(config, config.init_from, given, saved)
    manifest = open_data(config, machine)
    folder, data = prepare.folder_of(config.dataset), fingerprint(manifest, config.eval_tokens)
    train_blocks, val_blocks = Blocks(folder, manifest, "train"), Blocks(folder, manifest, "val")

    # Model and optimizer
    raw_model = open_model(config, manifest, trained).to(machine.device)
    optimizer = raw_model.configure_optimizer(
        config.learning_rate, config.weight_decay, (config.beta1, config.beta2))
    scaler = torch.amp.GradScaler(machine.type, enabled=machine.dtype == torch.float16)
    progress, is_data_new = Progress(), False
    if config.init_from == "resume":
        config.checked(checkpoint.load_optimizer, optimizer, scaler, saved)
        progress = saved_progress(saved, train_blocks.text_per_block)
        is_data_new = saved.get("data", data) != data  # older checkpoints do not name it
    if is_data_new:
        progress.best_val_loss, progress.best_step = math.inf, -1
        if machine.rank == 0:
            print("the data or eval_tokens are not those before: the best loss starts anew",
                  file=sys.stderr)
    del trained, saved  # free their memory
    # Three views of the same weights: raw_model; local_model, which is compiled; and
    # model, which also averages the gradients over the processes
    local_model = torch.compile(raw_model) if machine.compile else raw_model
    model = distributed(local_model, machine, raw_model.config.meta_attention,
                        train_blocks.n_meta)

    # The batches, the log, the clock
    first_step, minutes_before = progress.step, progress.minutes
    batches = prefetched(
        micro_batches(train_blocks, progress.samples, config.batch_size,
                      config.gradient_accumulation_steps, config.seed, machine.rank,
                      machine.world), machine.device)
    blocks_per_step = config.gradient_accumulation_steps * config.batch_size
    tokens_per_step = blocks_per_step * config.block_size
    _lock = claim(config, machine, progress)  # held until this function ends
    log = checkpoint.Log(config.out_dir, progress, is_on=machine.rank == 0)
    write_header(log, config, machine, raw_model, train_blocks, progress, tokens_per_step)
    flops_per_token = raw_model.flops_per_token(config.block_size, train_blocks.n_meta)
    speed = Speed(first_step, tokens_per_step, flops_per_token, machine.peak_flops())
    stop_request, started = StopRequest(), time.monotonic()
    # Of the losses since the last log line, on this process. progress.loss_sum is the
    # mean over the processes, for a run that is stopped between two log lines. If each
    # goes on from that mean, the next mean is right
    loss_sum = torch.full((), progress.loss_sum, device=machine.device)
    norm = lr = 0.0

    while True:
        # All processes must decide alike, so they exchange their signals and clocks
        step = progress.step
        minutes = minutes_before + (time.monotonic() - started) / 60
        stop_signal, progress.minutes = machine.all_reduce(
            [stop_request.look(), minutes], dist.ReduceOp.MAX)
        done = step >= config.max_iters or 0 < config.max_minutes <= progress.minutes
        is_eval_due = step % config.eval_interval == 0 or done
        if progress.evaluated == step and not is_data_new:
            is_eval_due = False  # it was evaluated here before it was resumed
        is_log_due = step > first_step and (step % config.log_interval == 0 or is_eval_due)

        if is_log_due or stop_signal:
            [total] = machine.all_reduce([loss_sum.item()])
            progress.loss_sum = total / machine.world
            mean_loss = progress.loss_sum / max(step - progress.logged, 1)
            check_finite(mean_loss, float(norm), scaler, step, lr, config.out_dir)
        if is_log_due:
            write_step(log, config, progress, mean_loss, float(norm), lr, speed)
            loss_sum.zero_()
            progress.loss_sum, progress.logged = 0.0, step
        elif machine.compile and step == first_step + 1:
            machine.synchronize()       # the first step compiled: do not count that time
            speed.restart(step)
        if stop_signal:
            save(machine, config, raw_model, optimizer, scaler, progress, data)
            log.say(f"stopped and saved at step {step}; go on with: {go_on_command()}")
            break
        if is_eval_due:
            val_loss = evaluate(local_model, val_blocks, config.eval_tokens, config.batch_size,
                                machine)
            check_finite(val_loss, float(norm), scaler, step, lr, config.out_dir)
            progress.evaluated = step
            if val_loss < progress.best_val_loss:
                progress.best_val_loss, progress.best_step = val_loss, step
            write_evaluation(log, progress, val_loss)
            save(machine, config, raw_model, optimizer, scaler, progress, data)
            log.draw()
            speed.restart(step)
        if done:
            break

        lr = learning_rate(
            step, progress.minutes, peak=config.learning_rate, floor=config.min_lr,
            warmup=config.warmup_iters, steps=config.lr_decay_iters or config.max_iters,
            max_minutes=config.max_minutes)
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = micro_losses(model, batches, machine, config, step, train_blocks.n_meta)
        loss, norm = optimizer_step(losses, raw_model, optimizer, scaler, config.grad_clip)
        loss_sum += loss
        progress.step += 1
        progress.samples += blocks_per_step
        progress.text_tokens += blocks_per_step * train_blocks.text_per_block

    stop_request.restore()
    if stop_signal:
        # 128 + signal is what a shell expects: `train.py && next` does not go on. Only
        # the first process returns it. The others get here while it still saves, and if
        # one of them failed, torchrun would kill it
        raise SystemExit(128 + int(stop_signal) if machine.rank == 0 else 0)
    if progress.step == first_step:
        log.say(f"nothing is left to do after {first_step} steps and {minutes_before:.1f} minutes: "
                "a higher --max_iters= or --max_minutes= goes on")
    if machine.rank == 0:
        print_sample(raw_model, config, progress.best_val_loss)


def go_on_command():
    """The command that resumes this run."""
    dropped = ("--init_from", "--overwrite")
    arguments = [arg for arg in sys.argv[1:] if not arg.startswith(dropped)]
    launcher = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        launcher = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    return shlex.join([*launcher, "train.py", *arguments, "--init_from=resume"])


def distributed(model, machine, has_meta_attention, n_meta):
    """The model, averaging its gradients over the processes if there are several."""
    if machine.world == 1:
        return model
    device_ids = [machine.device.index] if machine.type == "cuda" else None
    has_unused = has_meta_attention and n_meta == 0  # plain text: meta-attention is idle
    return DistributedDataParallel(model, device_ids=device_ids,
                                   find_unused_parameters=has_unused)


def write_header(log, config, machine, model, blocks, progress, tokens_per_step):
    line = (f"{model.num_params() / 1e6:.1f}M parameters; "
            f"{len(blocks) * blocks.block_size / 1e6:,.1f}M training tokens, "
            f"{tokens_per_step:,} per step; {machine.world} x {machine.name()}, "
            f"{machine.dtype_name()}")
    if machine.compile:
        line += ", compiled"
    log.write(line, progress, parameters=model.num_params(), world=machine.world,
              device=machine.name(), dtype=str(machine.dtype), torch=torch.__version__,
              settings=asdict(config))


def write_step(log, config, progress, loss, norm, lr, speed):
    step, steps = progress.step, config.max_iters
    tokens_per_s, mfu = speed.look(step)
    seconds_left = (steps - step) * speed.tokens_per_step / tokens_per_s
    if config.max_minutes:
        seconds_left = min(seconds_left, 60 * (config.max_minutes - progress.minutes))
    width = len(str(steps))
    line = f"step {step:>{width}}/{steps} | loss {loss:.4f} | {tokens_per_s:,.0f} tokens/s"
    if mfu is not None:
        line += f" | MFU {100 * mfu:.1f}%"
    line += f" | lr {lr:.2e} | ETA {duration(seconds_left)}"
    log.write(line, progress, loss=loss, lr=lr, tokens_per_s=tokens_per_s, mfu=mfu,
              grad_norm=norm if math.isfinite(norm) else None, minutes=progress.minutes)


def write_evaluation(log, progress, val_loss):
    line = f"step {progress.step}: validation {val_loss:.4f} nats per text token"
    if progress.best_step == progress.step:
        line += ", the best so far"
    log.write(line, progress, val_loss=val_loss, minutes=progress.minutes)


def check_finite(loss, norm, scaler, step, lr, out_dir):
    """Raise SystemExit if training has failed: keep the last good checkpoint."""
    if not diverged(loss, norm, scaler):
        return
    last = os.path.join(out_dir, "ckpt.pt")
    good = "no checkpoint was saved before"
    if os.path.exists(last):
        good = f"the last good checkpoint is {last}"
    raise SystemExit(f"error: the loss is {loss}, the gradient's norm {norm} at step {step}, "
                     f"learning rate {lr:.2e}: {good}; try a lower --learning_rate")


def save(machine, config, model, optimizer, scaler, progress, data):
    """Write ckpt.pt, and best.pt if this is the best so far."""
    if machine.rank > 0:
        return
    contents = {"model": model.state_dict(), "model_config": asdict(model.config),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "settings": asdict(config), "data": data, **asdict(progress)}
    path = os.path.join(config.out_dir, "ckpt.pt")
    checkpoint.save(path, contents, advice=f"go on with: {go_on_command()}")
    if progress.best_step == progress.step:
        checkpoint.keep_best(config.out_dir)


def print_sample(model, config, best_val_loss):
    print(f"\n{config.out_dir}: ckpt.pt, best.pt ({best_val_loss:.4f}), log.jsonl, loss.png. "
          "A sample:\n")
    encoding = prepare.get_tokenizer(config.tokenizer)
    prompt = torch.tensor([[encoding.eot_token]], device=model.lm_head.weight.device)
    model.eval()
    tokens = model.generate(prompt, 200, temperature=0.8, meta_rate=config.meta_rate,
                            seed=config.seed)
    print(prepare.decode(encoding, tokens[0].tolist()))


def main(argv=None):
    groups = (settings.Training, settings.Model, settings.Data, settings.Machine)
    config = settings.load(argv, groups, __doc__)
    try:
        train(config)
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None
    except (MemoryError, RuntimeError) as e:
        if is_out_of_memory(e):
            raise config.error(
                f"too little memory for batch_size={config.batch_size}: halve it and double "
                "--gradient_accumulation_steps, which takes the same steps") from None
        if "by peer" in str(e) or isinstance(e, dist.DistError):  # closed, or reset, by peer
            raise SystemExit("error: another process of this run has ended") from None
        raise
    except OSError as e:
        raise SystemExit(f"error: {e.filename or config.out_dir}: {e.strerror or e}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
