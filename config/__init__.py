"""Every setting of every script, and the parser that reads them.

    python train.py config/quickstart.py --batch_size=8 --overwrite

A config file is a few assignments in Python; `--key=value` after it overrides, a bare `--flag` means True,
and whatever nobody sets keeps the default below: the paper's 152M Meta+RoPE model. One file drives every
script, and each script reads the settings that concern it.
"""
import ast
import difflib
import inspect
import math
import os
import re
import sys
from dataclasses import dataclass, fields

# OpenMP's threads spin while they wait for each other. Where something else keeps a core busy, a long spin holds up the very thread that
# is waited for: two cores trained at a 30th of their speed. Read when torch is loaded, which is why the scripts import this first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@dataclass
class Config:
    # Data: what prepare.py writes and train.py reads
    dataset: str = "c4_meta"            # name of the data set: the folder data/<dataset>/
    source: str = "allenai/c4:en"       # 'stdlib' (embedded), files, folders, globs (comma-separated), or a Hugging Face name[:config]
    text_field: str = "text"            # column that holds the text (.jsonl, .parquet, Hugging Face)
    tokenizer: str = "gpt2"             # 'gpt2' (BPE, 50,257 ids) or 'bytes' (256 bytes and end-of-text)
    meta_rate: float = 0.1              # k: meta-tokens as a share of all tokens; 0 writes plain text
    meta_placement: str = "random"      # 'random' (uniform, the paper's) or 'periodic'
    val_fraction: float = 0.0005        # share of the documents held out for validation
    max_tokens: int = 0                 # stop preparing after this many text tokens; 0: the whole source
    workers: int = 0                    # processes that tokenise or draw examples; 0: one per core
    verify: bool = False                # prepare.py: only check the checksums of what is there

    # Model
    block_size: int = 1024              # tokens in the context window, meta-tokens included
    n_layer: int = 12                   # transformer blocks
    n_head: int = 12                    # heads of either attention
    n_embd: int = 768                   # width of the residual stream
    dropout: float = 0.0                # probability
    bias: bool = False                  # biases in Linear and LayerNorm (GPT-2 has them)
    pos: str = "rope"                   # positions: 'rope', 'absolute' (learned) or 'none'
    rope_base: float = 10000.0          # base of RoPE's wavelengths
    yarn_scale: float = 1.0             # YaRN: window / original window; 1: plain RoPE
    beta_fast: float = 32.0             # YaRN: frequencies above this many turns in the original window stay
    beta_slow: float = 1.0              # YaRN: frequencies below this many turns are divided by yarn_scale
    meta_attention: bool = True         # the second attention of every block, among meta-tokens only
    zero_meta_pos: bool = False         # no positional encoding at meta-tokens ("No Pos")
    zero_meta_embd: bool = False        # no token embedding at meta-tokens ("No embed")

    # Training
    init_from: str = "scratch"          # 'scratch', 'resume', a checkpoint (file or folder), or 'gpt2', 'gpt2-medium', ...
    out_dir: str = "out"                # checkpoints, log.jsonl and loss.png
    overwrite: bool = False             # let a run from scratch replace the one in out_dir
    max_iters: int = 200000             # optimiser steps
    max_minutes: float = 0.0            # stop by the clock; the learning rate follows whichever ends first; 0: no limit
    batch_size: int = 12                # sequences in a micro-batch
    gradient_accumulation_steps: int = 40  # micro-batches in a step, over all processes: 40 = 8 GPUs x 5
    learning_rate: float = 6e-4         # peak of the cosine schedule
    min_lr: float = 6e-5                # its end
    warmup_iters: int = 2000            # steps of linear warm-up
    lr_decay_iters: int = 0             # step at which min_lr is reached; 0: max_iters
    weight_decay: float = 0.1           # on matrices only
    beta1: float = 0.9                  # AdamW's memory of the gradient
    beta2: float = 0.95                 # AdamW's memory of its square
    grad_clip: float = 1.0              # largest norm of the gradient; 0: no clipping
    log_interval: int = 10              # steps between lines on the terminal and in log.jsonl
    eval_interval: int = 1000           # steps between evaluations, each with a checkpoint
    eval_tokens: int = 2_457_600        # text tokens to validate on, from the first on: the same for every model that is compared
    eval_only: bool = False             # evaluate once and exit
    seed: int = 1337                    # of data order, initial weights, injection and sampling

    # Machine
    device: str = "auto"                # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: the best there is
    dtype: str = "auto"                 # 'float32', 'bfloat16', 'float16'; auto: bfloat16 where the device is fast at it
    compile: str = "auto"               # torch.compile: true or false; auto: on CUDA, but not in sample.py

    # Sampling
    start: str = ""                     # prompt; 'FILE:prompt.txt' reads a file, '-' standard input; empty: a start of our own
    num_samples: int = 1                # continuations to draw
    max_new_tokens: int = 300           # text tokens to draw for each
    temperature: float = 0.8            # 0: greedy
    top_k: int = 200                    # draw among the k likeliest; 0: all
    top_p: float = 1.0                  # draw among the likeliest that share this probability; 1: all
    stream: bool = False                # print tokens as they come
    show_meta: bool = False             # print meta-tokens as <|meta|>

    # Synthetic tasks
    task: str = "list_recall"           # 'list_recall', 'segment_counting', 'parity', 'copying', or 'all' of them in turn
    placement: str = "task"             # marks at what is asked for ('task', the paper's), at all there is to ask, 'random', or 'none'
    marker: str = "meta"                # the mark: 'meta', 'fresh' (new to the model), 'text' (#), 'none'; or several (comma-separated)
    add_meta: bool = False              # give a checkpoint without meta-tokens some, and meta-attention that starts at zero
    train_length: int = 1024            # longest examples of fine-tuning, in tokens; the curriculum is 64, 128, ... up to it
    eval_lengths: str = "128,256,512,1024,2048"  # lengths to measure at: examples of up to so many tokens, and over half as many
    rows: str = "all"                   # full, no_pos, no_pos_meta, no_embed, no_meta_attention, no_meta (comma-separated), or 'all'
    label: str = ""                     # name of the model in results and figures; empty: from init_from and marker
    phase_steps: int = 1125             # optimiser steps in each phase of the curriculum: 5 x 1125 x 16 = 90,000 examples
    task_batch_size: int = 16           # examples in a step
    task_lr: str = "1e-4,3e-4,1e-3"     # peak learning rate of fine-tuning; of several (comma-separated) the best on validation examples
    task_warmup: int = 100              # steps of linear warm-up, a tenth of the run at most
    trial_steps: int = 300              # steps of the trial of each learning rate
    val_interval: int = 250             # steps between validations, each with a checkpoint
    val_examples: int = 256             # validation examples, of train_length
    test_examples: int = 2000           # test examples at each evaluation length: 5 x 2000 = 10,000
    stop_solved: bool = False           # stop as soon as validation is solved; False: equal steps for all models
    plot: bool = False                  # draw and tabulate the results named behind it

    # Analysis
    analysis_blocks: int = 64           # validation blocks to look into; of perplexity, sequences of four windows
    compare: str = ""                   # checkpoints of eval_synthetic.py (comma-separated) to draw rate against distortion beside this one
    bottleneck_examples: int = 8000     # examples that train a bottleneck; a quarter as many validate, and half as many test it
    bottleneck_steps: int = 1500        # optimiser steps of 128 examples
    bottleneck_seeds: int = 5           # bottlenecks trained for each beta

    # Analysis and benchmark
    what: str = "all"                   # parts (comma-separated), or 'all': the script's own, which it names when asked for another
    gpu: bool = False                   # bench.py: GPT-2's size and vocabulary on a GPU, beside nanoGPT's way to run it

    def __post_init__(self):
        self.origin = {}  # where each setting was given: 'config/x.py:3' or 'command line'; absent: the default

    def given(self, name):
        return name in self.origin

    def typed(self, name):
        return self.origin.get(name) == "command line"

    def error(self, message):
        """One line for people: the message, and where each setting it mentions (as `name=`) was set."""
        names = [n for n in dict.fromkeys(re.findall(r"(?<![-\w])(\w+)=", str(message))) if n in SETTINGS]
        where = ", ".join(f"{n}: {self.origin.get(n, 'default')}" for n in names)
        return SystemExit(f"error: {message}" + (f" ({where})" if where else ""))

    def parts(self, every):
        """The names that `what` asks for, of those that a script has. Raises SystemExit."""
        names = list(every) if self.what == "all" else self.what.split(",")
        if unknown := set(names) - set(every):
            raise self.error(f"what={self.what}: no part {', '.join(sorted(unknown))}; there are {', '.join(every)}")
        return names

    def numbers(self, name, kind, expected):
        """A setting of numbers above 0 with commas between them, as a list of int (digits alone) or float. Raises SystemExit."""
        parts = getattr(self, name).split(",")
        try:
            values = [kind(part) for part in parts]
        except ValueError:
            values = [0]
        if not all(0 < value < math.inf for value in values) or (kind is int and [*map(str, values)] != parts):
            raise self.error(f"{name}={getattr(self, name)}: expected {expected}")
        return values


SETTINGS = {f.name: f.type for f in fields(Config)}
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
CHOICES = {
    "tokenizer": ("gpt2", "bytes"),
    "meta_placement": ("random", "periodic"),
    "task": ("list_recall", "segment_counting", "parity", "copying", "all"),
    "placement": ("task", "all", "random", "none"),
    "marker": ("meta", "fresh", "text", "none"),
    "pos": ("rope", "absolute", "none"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "compile": ("auto", "true", "false"),
}
POSITIVE = ("block_size", "n_layer", "n_head", "n_embd", "rope_base", "batch_size", "gradient_accumulation_steps",
            "log_interval", "eval_interval", "eval_tokens", "num_samples", "max_new_tokens", "train_length", "phase_steps",
            "task_batch_size", "trial_steps", "val_interval", "val_examples", "test_examples", "analysis_blocks", "bottleneck_examples",
            "bottleneck_steps", "bottleneck_seeds")
NOT_NEGATIVE = ("max_tokens", "workers", "max_iters", "max_minutes", "learning_rate", "min_lr", "warmup_iters",
                "lr_decay_iters", "weight_decay", "grad_clip", "temperature", "top_k", "seed", "task_warmup")


def load(argv=None):
    """Reads config files and `--key=value` overrides, in the order given, into a Config.

    Raises SystemExit with one line that names the key and where it was set; `--help` prints the list and exits.
    """
    config = Config()
    for arg in sys.argv[1:] if argv is None else argv:
        if arg in ("-h", "--help"):
            print(help_text())
            raise SystemExit(0)
        if not arg.startswith("--"):
            read_file(config, arg)
            continue
        name, equals, text = arg[2:].partition("=")
        flag = "true" if name == "compile" else True
        assign(config, name, text if equals else flag, "command line")
    check(config)
    return config


def read_file(config, path):
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, UnicodeDecodeError):
        raise SystemExit(f"error: no config file '{path}' (settings are written --key=value)") from None
    except SyntaxError as e:
        raise SystemExit(f"error: {path}:{e.lineno}: {e.msg}") from None
    for node in tree.body:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise SystemExit(f"error: {where}: a config file holds assignments only, such as n_layer = 12")
        try:
            value = arithmetic(node.value)
        except ValueError:
            raise SystemExit(f"error: {where}: {ast.unparse(node)}: write a plain value or arithmetic on numbers") from None
        assign(config, node.targets[0].id, value, where)


def arithmetic(node):
    """The value of a literal, or of + - * / // ** on literals, so that a config may say 5 * 8."""
    if isinstance(node, ast.BinOp):
        left, right = arithmetic(node.left), arithmetic(node.right)
        operations = {ast.Add: lambda: left + right, ast.Sub: lambda: left - right, ast.Mult: lambda: left * right,
                      ast.Div: lambda: left / right, ast.FloorDiv: lambda: left // right, ast.Pow: lambda: left ** right}
        try:
            return operations[type(node.op)]()
        except (KeyError, TypeError, ArithmeticError) as e:
            raise ValueError(str(e)) from None
    return ast.literal_eval(node)


def assign(config, name, value, where):
    if name not in SETTINGS:
        close = difflib.get_close_matches(name, SETTINGS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else " (--help lists them all)"
        raise SystemExit(f"error: {where}: unknown setting '{name}'{hint}")
    try:
        setattr(config, name, convert(value, SETTINGS[name], from_text=where == "command line"))
    except ValueError:
        hint = f" (write --{name}=...)" if value is True else ""
        raise SystemExit(f"error: {where}: {name}={value}: expected {KINDS[SETTINGS[name]]}{hint}") from None
    if name == "compile":
        config.compile = config.compile.lower()
    config.origin[name] = where


def convert(value, kind, from_text):
    """`value` as a `kind`. From the command line it comes as text (or True, for a bare flag)."""
    if kind is str and from_text and value is True:
        raise ValueError
    if kind is str and isinstance(value, bool):
        return str(value)  # compile = True
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    if kind is bool and from_text and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    if kind in (int, float) and not isinstance(value, bool) and (from_text or isinstance(value, (int, float))):
        number = float(value)
        if kind is float and number == number:
            return number
        if kind is int and number.is_integer():  # 1e9 is a whole number, too
            return int(number) if "e" in str(value).lower() or not isinstance(value, str) else int(value)
    raise ValueError


def check(config):
    """Refuses values and combinations that no script can use; GPTConfig refuses the rest."""
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        if not set(value.split(",") if name == "marker" else [value]) <= set(choices):
            raise config.error(f"{name}={value}: expected one of {', '.join(choices)}")
    for name in POSITIVE + NOT_NEGATIVE:
        value = getattr(config, name)
        if value < 0 or (value == 0 and name in POSITIVE):
            raise config.error(f"{name}={value} must be {'positive' if name in POSITIVE else 'at least 0'}")
    for name in ("dropout", "val_fraction", "meta_rate"):
        if not 0 <= getattr(config, name) < 1:
            raise config.error(f"{name}={getattr(config, name)} must be at least 0 and below 1")
    if not 0 < config.top_p <= 1:
        raise config.error(f"top_p={config.top_p} must be above 0 and at most 1")
    if config.meta_rate > 0 and not 1 <= round(config.meta_rate * config.block_size) <= config.block_size - 1:
        raise config.error(f"meta_rate={config.meta_rate} puts no meta-token, or nothing else, into block_size={config.block_size}")


def help_text():
    """The settings above with defaults and comments, read from this very file."""
    lines = [__doc__.strip(), ""]
    for line in inspect.getsource(Config).splitlines():
        if setting := re.match(r"    (\w+): \w+ = (.+?) +# (.+)", line):
            lines.append(f"  --{setting[1]}={setting[2]:<{max(1, 30 - len(setting[1]))}} {setting[3]}")
        elif section := re.match(r"    # (.+)", line):
            lines.append(("\n" if lines[-1] else "") + section[1])
        elif "def " in line:
            break
    return "\n".join(lines)
