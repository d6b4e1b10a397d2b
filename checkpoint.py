"""What training leaves in out_dir: checkpoints and the log. Also loads OpenAI's GPT-2.

A checkpoint is a dictionary in ckpt.pt (the last state of a run) or in best.pt (that of
the lowest validation loss). Loading never runs code from a file. Whatever is wrong with
a file raises a ValueError of one line.
"""
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import sys
import zipfile
from contextlib import suppress
from dataclasses import asdict, fields

from model import GPT, GPTConfig

import torch

# The architecture comes from the checkpoint. These settings may be changed afterwards:
MAY_CHANGE = ("block_size", "yarn_scale", "dropout", "zero_meta_pos", "zero_meta_embd")
# These may not, but meta-attention may be added to a model without meta-tokens:
FIXED = ("n_layer", "n_head", "n_embd", "bias", "pos", "rope_base", "beta_fast", "beta_slow",
         "meta_attention")
ARCHITECTURE = FIXED + MAY_CHANGE


def load_trained(name, given, checkpoint=None):
    """(model, checkpoint) by name: a checkpoint's file or folder, or a GPT-2.

    given: {setting: value} of what was asked for, of ARCHITECTURE and the tokenizer.
    checkpoint: what load(name) returned, if it was read before. Raises ValueError if
    the file is bad, or if a setting that may not change differs.
    """
    if checkpoint is None and is_pretrained(name):
        model = load_gpt2(name)
        checkpoint = {"step": None, "settings": {"tokenizer": "gpt2"}}
    else:
        checkpoint = checkpoint or load(name)
        model = build(checkpoint)
    found = asdict(model.config) | {"tokenizer": checkpoint["settings"]["tokenizer"]}
    for setting in ("tokenizer", *FIXED):
        asked = given.get(setting, found[setting])
        may_be_added = setting == "meta_attention" and model.config.meta_id is None
        if asked != found[setting] and not may_be_added:
            raise ValueError(f"{setting}={asked}, but the checkpoint has {found[setting]}: "
                             "leave it out, or train from scratch")
    changes = {setting: given[setting] for setting in MAY_CHANGE if setting in given}
    return model.reconfigured(**changes), checkpoint


# --------------------------------------------------------------------------------------
# Our own checkpoints

def load(path):
    """The dictionary that was saved: 'model', 'model_config', 'settings', 'step', ...

    path is a .pt file, or a folder that holds ckpt.pt.
    """
    if not path.endswith(".pt"):
        path = os.path.join(path, "ckpt.pt")
    if not os.path.exists(path):
        raise ValueError(f"no checkpoint {path}: python train.py config/quickstart.py makes "
                         "out/ckpt.pt")
    checkpoint = read_tensors(path)
    needed = {"model", "model_config", "settings", "step"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of train.py")
    differing = checkpoint["model_config"].keys() ^ {field.name for field in fields(GPTConfig)}
    if differing:
        raise ValueError(f"{path} was written by another version: its architecture differs "
                         f"in {', '.join(sorted(differing))}")
    return checkpoint


def build(checkpoint):
    """The model of a checkpoint, on the CPU."""
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    return load_weights(model, unwrapped(checkpoint["model"]), "the checkpoint")


def load_weights(model, weights, source):
    """Load weights into a model and return it. source names them if they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:200]
        raise ValueError(f"{source} is of another architecture: {reason}") from None
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise ValueError(f"{source} is of another architecture: lm_head.weight is not tied to "
                         "the embedding")
    return model


def unwrapped(weights):
    """The same, without what torch.compile and DistributedDataParallel add to names."""
    wrapper = r"\b(_orig_mod|module)\."
    return {re.sub(wrapper, "", name): value for name, value in weights.items()}


def save(path, contents, advice="run the same command again"):
    """Replace the file at once, or leave it as it was.

    Raises SystemExit, with advice on how to go on, if that fails.
    """
    try:
        with open(path + ".tmp", "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        # torch's zip writer meets the error of the system and raises one of its own
        reason = e if isinstance(e, OSError) else e.__context__
        if not isinstance(reason, OSError):
            raise
        is_full = reason.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "make room" if is_full else "mend that"
        if os.path.exists(path):
            mend = f"it is still the one before; {mend}, and {advice}"
        raise SystemExit(f"error: cannot save {path} ({reason.strerror}): {mend}") from None


def keep_best(out_dir):
    """Make best.pt what ckpt.pt is now."""
    last, best = os.path.join(out_dir, "ckpt.pt"), os.path.join(out_dir, "best.pt")
    if os.path.exists(best + ".tmp"):
        os.remove(best + ".tmp")
    try:
        os.link(last, best + ".tmp")  # no copy: ckpt.pt is replaced, never written to
    except OSError:
        shutil.copyfile(last, best + ".tmp")
    os.replace(best + ".tmp", best)


def remove_run(out_dir):
    """Remove what a run left, ckpt.pt first: without it nothing can be resumed."""
    for name in ("ckpt.pt", "best.pt", "log.jsonl", "loss.png"):
        for path in (os.path.join(out_dir, name), os.path.join(out_dir, name + ".tmp")):
            with suppress(FileNotFoundError):
                os.remove(path)


def load_optimizer(optimizer, scaler, checkpoint):
    """Restore the moments and the loss scale, but keep today's decay and betas.

    Raises ValueError if the parameters are others, as with meta-tokens added.
    """
    refusal = ValueError("a resumed run keeps its parameters: to change them, name its checkpoint "
                         "with --init_from=, and a new --out_dir=")
    today = [{name: group[name] for name in ("weight_decay", "betas", "fused")}
             for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except ValueError:  # another number of parameters
        raise refusal from None
    if any(state["exp_avg"].shape != p.shape for p, state in optimizer.state.items()):
        raise refusal
    for group, values in zip(optimizer.param_groups, today):
        group.update(values)
    if scaler.is_enabled() and checkpoint["scaler"]:  # empty if it was not float16 then
        scaler.load_state_dict(checkpoint["scaler"])


def stem(path):
    """A checkpoint's name: its file's without .pt, or its folder's."""
    return os.path.basename(os.path.normpath(path)).removesuffix(".pt")


def sha256_of_weights(model):
    digest = hashlib.sha256()
    for name, p in model.state_dict().items():
        digest.update(name.encode() + p.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_tensors(path):
    """Tensors and plain values from a file of torch.save, or tensors from .safetensors.

    Code in it does not run.
    """
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{path} needs the package safetensors: pip install safetensors") from None
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e.strerror or e}") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is not a checkpoint, or holds more than weights: "
                         "refused") from None
    except Exception as e:  # a damaged file raises whatever its bytes lead to
        reason = str(e).split("\n")[0][:100] or type(e).__name__
        raise ValueError(f"{path} is truncated or damaged ({reason})") from None


def check_sums(path):
    """Raise ValueError if a part of a zip is damaged. torch.load does not look."""
    if not zipfile.is_zipfile(path):  # torch wrote none before 1.6
        return
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} does not match its checksum")


# --------------------------------------------------------------------------------------
# The log

class Log:
    """log.jsonl, the lines on the terminal, and loss.png: of the first process only."""

    def __init__(self, out_dir, progress, is_on):
        """Begin the log in out_dir, or continue it from where a checkpoint was.

        progress: what the checkpoint counts: step, logged, evaluated, text_tokens.
        is_on: False in all processes but one.
        """
        self.path = os.path.join(out_dir, "log.jsonl")
        self.picture = os.path.join(out_dir, "loss.png")
        self.is_on, self.entries = is_on, []
        if not is_on:
            return
        if os.path.exists(self.path):
            self.entries = self.read(progress)
        with open(self.path + ".tmp", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in self.entries)
        os.replace(self.path + ".tmp", self.path)

    def read(self, progress):
        """The entries that the checkpoint counts. The run will write the others again.

        A line that is damaged, as by a crash, is left out.
        """
        entries = []
        with open(self.path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with suppress(ValueError, TypeError, KeyError):
                    entry = json.loads(line)
                    known = progress.step
                    known = progress.logged if "loss" in entry else known
                    known = progress.evaluated if "val_loss" in entry else known
                    if entry["step"] <= known:
                        entries.append(entry)
        return entries

    def write(self, line, progress, **entry):
        """Add an entry, and show it as a line."""
        if self.is_on:
            entry = {"step": progress.step, "text_tokens": progress.text_tokens} | entry
            self.entries.append(entry)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        self.say(line)

    def say(self, line):
        if not self.is_on:
            return
        try:
            print(line, flush=True)
        except BrokenPipeError:  # as after `| head`. Save and stop, as by a signal
            sys.stdout = open(os.devnull, "w")
            signal.raise_signal(signal.SIGTERM)

    def draw(self):
        """Draw training and validation loss over the text seen."""
        train = [e for e in self.entries if "loss" in e]
        val = [e for e in self.entries if "val_loss" in e]
        losses = [e["loss"] for e in train] + [e["val_loss"] for e in val]
        if not self.is_on or len(losses) < 2:
            return
        from matplotlib.figure import Figure
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        self.curve(axes, train, "loss", "training", alpha=0.6)
        self.curve(axes, val, "val_loss", "validation", marker="o", markersize=3)
        top = min(max(losses), 2.5 * min(losses))  # the first steps would flatten the rest
        axes.set(xlabel="text tokens seen (millions)", ylabel="loss (nats per text token)",
                 ylim=(0.95 * min(losses), top))
        axes.grid(alpha=0.3)
        axes.legend()
        try:
            figure.savefig(self.picture + ".tmp", format="png", dpi=120)
            os.replace(self.picture + ".tmp", self.picture)
        except OSError as e:  # a run can go on without its picture
            self.say(f"cannot draw {self.picture}: {e.strerror}")

    @staticmethod
    def curve(axes, entries, name, label, **style):
        if entries:
            tokens = [e["text_tokens"] / 1e6 for e in entries]
            losses = [e[name] for e in entries]
            axes.plot(tokens, losses, label=f"{label}, {losses[-1]:.3f} at the end", **style)


# --------------------------------------------------------------------------------------
# OpenAI's GPT-2, and models made of it, in Hugging Face's format

# What config.json leaves out is as in the smallest GPT-2
SIZES = {"n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}

# What model.py computes. A config.json that says anything else is of another model, and
# one that says nothing means the first of these values.
COMPUTED = {
    "model_type": ("gpt2",),
    "vocab_size": (50257,),             # the tokenizer's: other ids would mean nothing
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}


def is_pretrained(name):
    """Whether it names a folder in Hugging Face's format, or may be a GPT-2 on the hub.

    Those are 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', 'distilgpt2', owner/name.
    """
    if os.path.exists(name):
        return os.path.isfile(os.path.join(name, "config.json"))
    is_on_hub = re.fullmatch(r"(distil)?gpt2[\w.-]*|\w[\w.-]*/\w[\w.-]*", name)
    return bool(is_on_hub) and not name.endswith(".pt")


def load_gpt2(name):
    """The GPT-2 in a folder with config.json and weights, or of that name on the hub.

    It has no meta-tokens yet: see GPT.with_meta_tokens.
    """
    folder = folder_with("config.json", name)
    model = GPT(gpt2_config(os.path.join(folder, "config.json")))
    weights = {}
    for path in weights_files(name):
        for key, value in unwrapped(read_tensors(path)).items():
            if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                value = value.t()  # Hugging Face's Conv1D holds (in, out)
            weights["transformer." + key.removeprefix("transformer.")] = value
    embedding = weights.get("transformer.wte.weight")
    weights["lm_head.weight"] = weights.get("transformer.lm_head.weight", embedding)
    wanted = model.state_dict().keys()  # the file also holds causal masks
    weights = {key: value for key, value in weights.items() if key in wanted}
    return load_weights(model, weights, name)


def gpt2_config(path):
    """The GPTConfig of a config.json. Raise ValueError if model.py computes another."""
    hf = read_json(path)
    hf = {**SIZES, "n_positions": hf.get("n_ctx", 1024), **hf}  # n_ctx: its old name
    for key in SIZES:
        if type(hf[key]) is not int or hf[key] <= 0:
            raise ValueError(f"{path}: {key} is {hf[key]!r}, not a positive number")
    mlp_size = {"n_inner": (None, 4 * hf["n_embd"])}
    for key, values in (COMPUTED | mlp_size).items():
        value = hf.get(key, values[0])
        if value not in values:
            expected = " or ".join(map(repr, values))
            raise ValueError(f"{path}: {key} is {value!r}, but model.py is a GPT-2 with {expected}")
    return GPTConfig(
        block_size=hf["n_positions"], vocab_size=50257, n_layer=hf["n_layer"],
        n_head=hf["n_head"], n_embd=hf["n_embd"], bias=True, pos="absolute", meta_id=None,
        meta_attention=False)


def weights_files(name):
    """Paths of a GPT-2's weights: one file, or the shards that an index names."""
    for file, pattern in (("model.safetensors", "model*.safetensors*"),
                          ("pytorch_model.bin", "pytorch_model*.bin*")):
        folder = folder_with(pattern, name)
        path = os.path.join(folder, file)
        if os.path.isfile(path):
            return [path]
        if os.path.isfile(path + ".index.json"):
            shards = sorted(set(read_json(path + ".index.json")["weight_map"].values()))
            for shard in shards:
                if os.path.basename(shard) != shard:
                    raise ValueError(f"{path}.index.json names {shard}, which is no file beside it")
            return [os.path.join(folder, shard) for shard in shards]
    raise ValueError(f"{name} holds neither model.safetensors nor pytorch_model.bin")


def read_json(path):
    """The dictionary in a JSON file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            contents = json.load(file)
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot read {path} as JSON: {e}") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is not a dictionary")
    return contents


def folder_with(pattern, name):
    """The folder `name`, or one with files of that GPT-2 from the Hugging Face hub."""
    if os.path.isdir(name):
        return name
    repository = name
    if "/" not in name:
        owner = "distilbert" if name.startswith("distil") else "openai-community"
        repository = f"{owner}/{name}"
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(repository, allow_patterns=pattern)
    except Exception as e:  # offline, unknown, not permitted, not installed
        reason = f"{type(e).__name__}: {str(e)[:100]}".splitlines()[0]
        raise ValueError(f"no checkpoint or folder {name}, and no {repository} from the Hugging "
                         f"Face hub ({reason}): check the name, go online, or name a folder "
                         "with config.json and model.safetensors") from None
