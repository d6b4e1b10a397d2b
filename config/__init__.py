"""All settings of all scripts, and the parser that reads them.

    python train.py config/quickstart.py --batch_size=8 --overwrite

A config file holds assignments, such as n_layer = 12. `--name=value` after it overrides
the file, and a bare `--flag` means True. The defaults are the paper's 152M Meta+RoPE
model. Every script accepts every setting, so one config file drives them all.
"""
import ast
import difflib
import io
import math
import operator
import os
import re
import sys
from dataclasses import dataclass, field, fields

# How long OpenMP's threads spin before they sleep. It is read when torch is loaded, so
# import config before torch. The default is long: while another process kept one of two
# cores busy, it made training up to 30 times slower. A fifth of this makes generation
# half as fast, as waking a thread takes longer than a small matrix product.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

NOT_NEGATIVE, POSITIVE, FROM_ONE = "at least 0", "positive", "at least 1"
BELOW_ONE, UP_TO_ONE = "at least 0 and below 1", "above 0 and at most 1"


def setting(default, meaning, allowed=NOT_NEGATIVE):
    """Declare a setting. `allowed` is a range above, or a tuple of choices."""
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed})


@dataclass
class Data:
    dataset: str = setting("c4_meta", "name of the data set: the folder data/<dataset>/")
    source: str = setting("allenai/c4:en", "'stdlib' (Python's own), files, folders or globs "
                          "(comma-separated), or Hugging Face's name[:config]")
    tokenizer: str = setting("gpt2", "BPE of 50,257 tokens, or bytes", ("gpt2", "bytes"))
    meta_rate: float = setting(0.1, "share of meta-tokens; 0: plain text", BELOW_ONE)
    meta_placement: str = setting("random", "their places in a block", ("random", "periodic"))


@dataclass
class Preparation:
    text_field: str = setting("text", "column with the text (.jsonl, .parquet, Hugging Face)")
    val_fraction: float = setting(0.0005, "share of documents held out for validation", BELOW_ONE)
    max_tokens: int = setting(0, "stop after this many text tokens; 0: read the whole source")
    workers: int = setting(0, "threads that tokenize, processes that draw examples; 0: all cores")
    verify: bool = setting(False, "only check the prepared files against their checksums")


@dataclass
class Model:
    block_size: int = setting(1024, "tokens in the context window, with meta-tokens", POSITIVE)
    n_layer: int = setting(12, "transformer blocks", POSITIVE)
    n_head: int = setting(12, "heads of attention, and of meta-attention", POSITIVE)
    n_embd: int = setting(768, "width of the residual stream", POSITIVE)
    dropout: float = setting(0.0, "probability of dropping a value", BELOW_ONE)
    bias: bool = setting(False, "biases in Linear and LayerNorm, as in GPT-2")
    pos: str = setting("rope", "positions; absolute: learned", ("rope", "absolute", "none"))
    rope_base: float = setting(10000.0, "base of RoPE's wavelengths", POSITIVE)
    yarn_scale: float = setting(1.0, "YaRN: new window / old window; 1: plain RoPE", FROM_ONE)
    beta_fast: float = setting(32.0, "YaRN keeps frequencies with more turns in the old window")
    beta_slow: float = setting(1.0, "YaRN divides frequencies with fewer turns by yarn_scale")
    meta_attention: bool = setting(True, "a second attention in each block, among meta-tokens")
    zero_meta_pos: bool = setting(False, "no positions at meta-tokens (the paper's No Pos)")
    zero_meta_embd: bool = setting(False, "no embeddings at meta-tokens (the paper's No embed)")


@dataclass
class Training:
    init_from: str = setting("scratch", "'scratch', 'resume', a checkpoint (file or folder), or a "
                             "GPT-2: a folder, or gpt2, gpt2-xl, owner/name on the hub")
    out_dir: str = setting("out", "folder for checkpoints, log.jsonl and loss.png")
    max_iters: int = setting(200_000, "optimizer steps")
    batch_size: int = setting(12, "sequences in a micro-batch", POSITIVE)
    gradient_accumulation_steps: int = setting(40, "micro-batches in a step, over all processes",
                                               POSITIVE)
    learning_rate: float = setting(6e-4, "peak of the cosine schedule")
    min_lr: float = setting(6e-5, "end of the cosine schedule")
    warmup_iters: int = setting(2000, "steps of linear warm-up")
    lr_decay_iters: int = setting(0, "step that reaches min_lr; 0: max_iters")
    weight_decay: float = setting(0.1, "AdamW: decay of weight matrices")
    beta1: float = setting(0.9, "AdamW: decay of the running mean of gradients", BELOW_ONE)
    beta2: float = setting(0.95, "AdamW: decay of the running mean of their squares", BELOW_ONE)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: no limit")
    log_interval: int = setting(10, "steps between lines of the log", POSITIVE)
    eval_interval: int = setting(1000, "steps between evaluations, and checkpoints", POSITIVE)
    eval_only: bool = setting(False, "evaluate once and exit")
    eval_tokens: int = setting(2_457_600, "evaluate on the first so many text tokens", POSITIVE)
    max_minutes: float = setting(0.0, "time limit, also for the learning rate; 0: none")
    overwrite: bool = setting(False, "replace what is there already")
    seed: int = setting(1337, "of data order, initial weights, meta-tokens and sampling")


@dataclass
class Machine:
    device: str = setting("auto", "'cpu', 'cuda', 'cuda:1' or 'mps'; auto: the fastest there is")
    dtype: str = setting("auto", "precision; auto: bfloat16 where the device is fast at it",
                         ("auto", "float32", "bfloat16", "float16"))
    compile: str = setting("auto", "use torch.compile; auto: on CUDA", ("auto", "true", "false"))


@dataclass
class Sampling:
    start: str = setting("", "prompt, FILE:prompt.txt, or - for standard input; empty: none")
    num_samples: int = setting(1, "continuations to draw", POSITIVE)
    max_new_tokens: int = setting(300, "text tokens in each continuation", POSITIVE)
    temperature: float = setting(0.8, "0: always the likeliest token")
    top_k: int = setting(200, "draw from the k likeliest; 0: from all")
    top_p: float = setting(1.0, "draw from the likeliest, of this total probability", UP_TO_ONE)
    stream: bool = setting(False, "print each token as soon as it is drawn")
    show_meta: bool = setting(False, "print meta-tokens as <|meta|>")


@dataclass
class Tasks:
    task: str = setting("list_recall", "synthetic task",
                        ("list_recall", "segment_counting", "parity", "copying", "all"))
    placement: str = setting("task", "where marks go; task: at the unit in question (the "
                             "paper's), all: at every unit", ("task", "all", "random", "none"))
    marker: str = setting("meta", "mark; fresh: a new token, text: #; several: comma-separated",
                          ("meta", "fresh", "text", "none"))
    add_meta: bool = setting(False, "add meta-tokens and meta-attention to a model without them")
    train_length: int = setting(1024, "train at 64, 128, ... up to this many tokens", POSITIVE)
    eval_lengths: str = setting("128,256,512,1024,2048", "lengths of test examples, in tokens")
    rows: str = setting("all", "full, no_pos, no_pos_meta, no_embed, no_meta_attention, no_meta "
                        "(comma-separated), or 'all'")
    label: str = setting("", "name in results and figures; empty: from init_from and marker")
    phase_steps: int = setting(1125, "steps at each training length", POSITIVE)
    task_batch_size: int = setting(16, "examples in a step", POSITIVE)
    task_lr: float = setting(3e-4, "peak learning rate, for the paper's model; a smaller one "
                             "needs a higher rate", POSITIVE)
    task_warmup: int = setting(100, "steps of linear warm-up; at most a tenth of the run")
    val_interval: int = setting(250, "steps between validations, and checkpoints", POSITIVE)
    val_examples: int = setting(256, "validation examples, of train_length", POSITIVE)
    test_examples: int = setting(2000, "test examples of each length", POSITIVE)
    stop_solved: bool = setting(False, "stop as soon as validation is solved")


@dataclass
class Analysis:
    what: str = setting("all", "parts of the script to run (comma-separated), or 'all'")
    analysis_blocks: int = setting(64, "validation blocks to look at", POSITIVE)
    compare: str = setting("", "more checkpoints (comma-separated), for rate_distortion, recall "
                           "and cache")
    bottleneck_examples: int = setting(8000, "examples that train a bottleneck", POSITIVE)
    bottleneck_steps: int = setting(1500, "optimizer steps, of 128 examples", POSITIVE)
    bottleneck_seeds: int = setting(5, "bottlenecks trained for each beta", POSITIVE)


@dataclass
class Benchmark:
    gpu: bool = setting(False, "models of GPT-2's size on a GPU, beside nanoGPT's way to run one")


ALL_GROUPS = (Data, Preparation, Model, Training, Machine, Sampling, Tasks, Analysis, Benchmark)


@dataclass
class Config(*ALL_GROUPS):
    def __post_init__(self):
        self.origin = {}  # where a setting was set: 'config/x.py:3' or 'command line'

    def given(self, name):
        """Whether a config file or the command line sets it."""
        return name in self.origin

    def typed(self, name):
        """Whether the command line sets it."""
        return self.origin.get(name) == "command line"

    def given_values(self, names):
        return {name: getattr(self, name) for name in names if self.given(name)}

    def typed_values(self, names):
        return {name: getattr(self, name) for name in names if self.typed(name)}

    def remember(self, saved, names):
        """Take from a checkpoint's settings what is not given now."""
        for name in names:
            if name in saved and not self.given(name):
                setattr(self, name, saved[name])

    def error(self, message):
        """SystemExit that also says where each setting in it (`name=`) was set."""
        names = dict.fromkeys(re.findall(r"(?<![-\w])(\w+)=", str(message)))
        where = [f"{n}: {self.origin.get(n, 'default')}" for n in names if n in SETTINGS]
        return SystemExit(f"error: {message}" + (f" ({', '.join(where)})" if where else ""))

    def checked(self, function, *args, **kwargs):
        """Call the function. Its ValueError becomes a one-line error."""
        try:
            return function(*args, **kwargs)
        except ValueError as e:
            raise self.error(e) from None

    def parts(self, every):
        """The parts of a script that `what` names."""
        names = list(every) if self.what == "all" else self.what.split(",")
        if unknown := sorted(set(names) - set(every)):
            raise self.error(f"what={self.what}: no part {', '.join(unknown)}; "
                             f"there are {', '.join(every)}")
        return names

    def numbers(self, name, kind, expected):
        """The positive numbers (digits alone) in a comma-separated setting."""
        texts = getattr(self, name).split(",")
        if not all(text.isdecimal() and kind(text) > 0 for text in texts):
            raise self.error(f"{name}={getattr(self, name)}: expected {expected}")
        return [kind(text) for text in texts]


SETTINGS = {f.name: f for f in fields(Config)}
KINDS = {bool: "True or False", int: "a whole number below 2^63", float: "a number", str: "text"}
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}
OF_NANOGPT = {"eval_iters": "eval_tokens", "always_save_checkpoint": "eval_interval"}
MAX_RESULT = 1e30            # of arithmetic in a config file
MAX_CHARACTERS = 1_000_000   # in a config file


def load(argv=None, groups=ALL_GROUPS, usage=__doc__):
    """Read config files and `--name=value` arguments, in their order, into a Config.

    --help prints `usage` and the settings of `groups`: dataclasses above, or names of
    single settings. Raises SystemExit with one line if something is wrong.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack a character: print a ?
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    config = Config()
    for argument in sys.argv[1:] if argv is None else argv:
        if argument in ("-h", "--help"):
            print(help_text(groups, usage))
            raise SystemExit(0)
        if not argument.startswith("--"):
            read_file(config, argument)
            continue
        name, equals, text = argument.removeprefix("--").partition("=")
        assign(config, name, text if equals else True, "command line")
    check(config)
    return config


def help_text(groups, usage):
    lines = [usage.strip()]
    for group in groups:
        if isinstance(group, str):
            lines.append(help_line(SETTINGS[group]))
        else:
            lines += ["", group.__name__, *map(help_line, fields(group))]
    return "\n".join(lines)


def help_line(declared):
    assignment = f"--{declared.name}={declared.default}"
    meaning, allowed = declared.metadata["meaning"], declared.metadata["allowed"]
    choices = f" ({', '.join(allowed)})" if isinstance(allowed, tuple) else ""
    return f"  {assignment:<33}  {meaning}{choices}"


def read_file(config, path):
    """Take the assignments of a config file. Nothing in it is run."""
    for statement in parse(path):
        where = f"{path}:{statement.lineno}"
        match statement:
            case ast.Expr(ast.Constant()):
                continue  # a docstring
            case ast.Assign([ast.Name(name)], expression):
                try:
                    value = evaluate(expression)
                except (ValueError, TypeError, ArithmeticError, RecursionError):
                    raise refusal(where, f"{name}: write a plain value, or arithmetic on numbers "
                                  f"with results of at most {MAX_RESULT:.0e}") from None
                assign(config, name, value, where)
            case _:
                raise refusal(where, "a config file holds assignments only, such as n_layer = 12")


def parse(path):
    """The statements of a config file as syntax trees."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(MAX_CHARACTERS + 1)
        if len(text) > MAX_CHARACTERS:
            raise refusal(path, f"a config file has at most {MAX_CHARACTERS:,} characters")
        return ast.parse(text).body
    except SyntaxError as e:
        raise refusal(f"{path}:{e.lineno}", e.msg) from None
    except (OSError, ValueError, RecursionError, MemoryError):
        raise refusal(f"no config file '{path}'", "settings are written --name=value") from None


def evaluate(expression):
    """The value of a literal, or of arithmetic on numbers, such as 5 * 8."""
    if not isinstance(expression, ast.BinOp):
        return ast.literal_eval(expression)
    left, right = evaluate(expression.left), evaluate(expression.right)
    operation = OPERATIONS.get(type(expression.op))
    if operation is None or not {type(left), type(right)} <= {int, float}:
        raise ValueError
    estimate = operation(float(left), float(right))  # as floats 9**9**9 overflows at once
    if not abs(estimate) <= MAX_RESULT:
        raise ValueError
    return operation(left, right)


def assign(config, name, value, where):
    if name not in SETTINGS:
        close = [OF_NANOGPT.get(name), *difflib.get_close_matches(name, SETTINGS, n=1)]
        meant = next(filter(None, close), None)
        hint = f"did you mean {meant}?" if meant else "--help lists them"
        raise refusal(where, f"unknown setting '{name}' ({hint})")
    if name == "compile":
        value = str(value).lower()  # a config file may say True
    kind = SETTINGS[name].type
    try:
        setattr(config, name, convert(value, kind))
    except ValueError:
        hint = f" (write --{name}=...)" if value is True else ""
        raise refusal(where, f"{name}={value}: expected {KINDS[kind]}{hint}") from None
    config.origin[name] = where


def convert(value, kind):
    """The value as bool, int, float or str. The command line gives text, or True."""
    text = str(value)
    if kind is str and isinstance(value, str):
        return text
    if kind is bool and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if kind is int and abs(float(text)) < 2**63 and float(text).is_integer():  # or 1e9
        return int(text) if text.lstrip("+-").isdecimal() else int(float(text))
    if kind is float and math.isfinite(float(text)):
        return float(text)
    raise ValueError


def refusal(where, message):
    return SystemExit(f"error: {where}: {message}")


def check(config):
    """Refuse values that no script can use. GPTConfig checks the architecture."""
    for name, declared in SETTINGS.items():
        value, allowed = getattr(config, name), declared.metadata["allowed"]
        if isinstance(allowed, tuple):
            chosen = value.split(",") if name == "marker" else [value]
            if not set(chosen) <= set(allowed):
                raise config.error(f"{name}={value}: expected one of {', '.join(allowed)}")
        elif declared.type in (int, float) and not in_range(value, allowed):
            raise config.error(f"{name}={value} must be {allowed}")
    n_meta = round(config.meta_rate * config.block_size)
    if config.meta_rate > 0 and not 1 <= n_meta < config.block_size:
        raise config.error(f"meta_rate={config.meta_rate} leaves no meta-token, or no text, "
                           f"in block_size={config.block_size}")


def in_range(value, allowed):
    ranges = {NOT_NEGATIVE: value >= 0, POSITIVE: value > 0, FROM_ONE: value >= 1,
              BELOW_ONE: 0 <= value < 1, UP_TO_ONE: 0 < value <= 1}
    return ranges[allowed]
