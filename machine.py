"""The machine a script runs on: device, precision, processes, signals, the clock."""
import os
import platform
import re
import signal
import time
from contextlib import nullcontext, suppress

import prepare

import torch
import torch.distributed as dist

# Peak of dense bf16 and fp16 matrix products in FLOP/s, by the name the driver gives
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
}


class Machine:
    """Device, precision, and the rank of this process under torchrun.

    device: 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'; dtype: 'auto' or a name in torch;
    compile: 'auto', 'true' or 'false'. Raises ValueError for a missing device.
    """

    def __init__(self, device="auto", dtype="auto", compile="auto"):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device)
        self.type = self.device.type
        self.dtype = pick_dtype(self.device) if dtype == "auto" else getattr(torch, dtype)
        self.compile = compile == "true" or (compile == "auto" and self.type == "cuda")
        if self.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
        if self.world > 1:
            self.join()

    def join(self):
        """Find the other processes. On a CPU they share the machine's cores."""
        if self.type == "cpu":
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
            torch.set_num_threads(max(prepare.cores() // local_world, 1))
            dist.init_process_group("gloo")
        else:
            dist.init_process_group("cpu:gloo,cuda:nccl")

    def autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.type, self.dtype)

    def all_reduce(self, values, op=dist.ReduceOp.SUM):
        """The sums (or maxima) of a list of numbers over all processes."""
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

    def synchronize(self):
        """Wait for all work that the device has queued."""
        if self.type != "cpu":
            getattr(torch, self.type).synchronize()

    def name(self):
        return torch.cuda.get_device_name(self.device) if self.type == "cuda" else self.type

    def dtype_name(self):
        return str(self.dtype).removeprefix("torch.")

    def peak_flops(self):
        """FLOP/s of all processes together; None for an unknown device or precision."""
        if self.type != "cuda" or self.dtype == torch.float32:
            return None
        peak = PEAK_FLOPS.get(self.name())
        return None if peak is None else peak * self.world


def is_first_process():
    """Whether this is torchrun's first process, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def pick_device(name):
    """A torch.device for the setting `device`. Raises ValueError if there is none."""
    alone = "WORLD_SIZE" not in os.environ  # else torchrun gives each process its own GPU
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available() and alone:
            name = "mps"
    if not alone and not re.fullmatch(r"cpu|cuda|mps", name):
        raise ValueError(f"device={name}: expected cpu, cuda or mps with torchrun")
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):
        raise ValueError(f"device={name}: expected cpu, cuda, cuda:N or mps")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(name)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"device={device}, but this machine has {torch.cuda.device_count()} "
                         "CUDA devices: use --device=cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={device}, but this machine has no MPS: use --device=cpu")
    return device


def pick_dtype(device):
    """The type in which this device is fast at matrix products."""
    if device.type == "cuda":
        is_ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if is_ampere else torch.float16
    is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cpu" and is_fast else torch.float32


def processor():
    """The name of the CPU."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        found = re.search(r"model name\s*: (.+)", file.read())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def is_out_of_memory(error):
    """Whether an exception says that memory ran out, on whatever device."""
    is_one = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_one or re.search("can't allocate memory|out of memory", str(error)) is not None


class Speed:
    """Tokens per second since the last look, and MFU, the share of the peak FLOP/s.

    Restart it after whatever should not count: an evaluation, a compilation.
    """

    def __init__(self, step, tokens_per_step, flops_per_token, peak_flops):
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops            # None if unknown
        self.restart(step)

    def restart(self, step):
        self.step, self.time = step, time.monotonic()

    def look(self, step):
        """(tokens_per_s, mfu); mfu is None if the peak is unknown."""
        tokens = (step - self.step) * self.tokens_per_step
        tokens_per_s = tokens / (time.monotonic() - self.time)
        self.restart(step)
        if self.peak_flops is None:
            return tokens_per_s, None
        return tokens_per_s, tokens_per_s * self.flops_per_token / self.peak_flops


def duration(seconds):
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class StopRequest:
    """Records a SIGINT or SIGTERM in `signal`, 0 until then. A second one kills."""

    def __init__(self):
        self.signal, self.parent = 0, os.getppid()
        self.handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def look(self):
        """The signal, or 0. A process of a torchrun that has died is to stop, too."""
        is_orphan = "WORLD_SIZE" in os.environ and os.getppid() != self.parent
        return signal.SIGTERM if is_orphan else self.signal

    def restore(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
