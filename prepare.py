"""Turns text into files of tokens with meta-tokens scattered among them, ready to train on.

    python prepare.py config/meta_gpt2.py                                    # C4, about 200 GB
    python prepare.py --source='books/*.txt' --dataset=books --val_fraction=0.05

A data set is a folder data/<dataset>/ of shards and a manifest.json. A shard is a row of blocks of block_size tokens,
each with the same number of meta-tokens at places of its own, and one more token: a copy of the next block's first,
so that a block's targets are the same row of tokens, one later. Killed at any moment and started again, it goes on
and ends with the same bytes, whatever the number of workers.
"""
import glob
import gzip
import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import signal
import sys
import sysconfig
import threading
import time
import zlib
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, suppress

import config as settings

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

META = "<|meta|>"                 # how the meta-token is printed
SHARD_TOKENS = 100_000_000
DTYPE = np.dtype(np.uint16)       # of the files: GPT-2's ids, with the meta-token, end at 50,257
BATCH_CHARS = 1 << 20             # text handed to a worker at a time, and the longest piece of a plain-text file
SECTION_CHARS = 1 << 16           # of a lone text file, the unit that goes to training or validation
SAVE_SECONDS = 10                 # between two notes of how far we are
PLAIN, ROWS = (".txt", ".md", ".py"), (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")


def main(argv=None):
    config = settings.load(argv)
    if config.verify:
        manifest = read_manifest(config)
        verify(config, manifest)
        print(f"{folder_of(config.dataset)}: {sum(len(s['shards']) for s in manifest['splits'].values())} shards, checksums match")
    else:
        prepare(config)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

def get_tokenizer(name):
    """'gpt2' or 'bytes', as a tiktoken.Encoding. Its n_vocab is the id of the meta-token."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,16}", special_tokens={"<|endoftext|>": 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:  # tiktoken downloads by requests, whose errors are many
        raise SystemExit(f"error: cannot get GPT-2's BPE files ({type(e).__name__}): go online once, or set TIKTOKEN_CACHE_DIR "
                         "to a folder that holds them, or use --tokenizer=bytes") from None


def decode(encoding, tokens, show_meta=False):
    """Text of a list of ids. Meta-tokens and end-of-text are left out; with show_meta they are printed."""
    if not show_meta:  # a character of several tokens may have a meta-token inside: decode it whole
        return encoding.decode([token for token in tokens if token < encoding.n_vocab and token != encoding.eot_token])
    names = {encoding.n_vocab: META, encoding.eot_token: "<|endoftext|>"}
    return "".join(names[key] * len(list(run)) if key in names else encoding.decode(list(run))
                   for key, run in itertools.groupby(tokens, lambda token: token if token in names else None))


# ----------------------------------------------------------------------------------------------------------------------
# Injection (paper, section 3)

def meta_per_block(meta_rate, block_size):
    """M = round(k T)."""
    return round(meta_rate * block_size)


def meta_places(n_blocks, block_size, n_meta, rng, placement="random"):
    """Where the meta-tokens of n_blocks blocks go: bool (n_blocks, block_size), n_meta in each row, none at position 0.

    'random' draws every set of places with equal probability, by Floyd's algorithm on all blocks at once; 'periodic'
    spaces them evenly.
    """
    places = np.zeros((n_blocks, block_size), dtype=bool)
    if placement == "periodic":
        places[:, 1 + (2 * np.arange(n_meta) + 1) * (block_size - 1) // (2 * max(n_meta, 1))] = True
        return places
    rows = np.arange(n_blocks)
    for last in range(block_size - n_meta, block_size):
        drawn = rng.integers(1, last + 1, size=n_blocks)
        places[rows, np.where(places[rows, drawn], last, drawn)] = True
    return places


def inject(text, places, meta_id):
    """Fills the False of places, in order, with the text tokens, and the True with meta-tokens."""
    tokens = np.full(places.shape, meta_id, dtype=text.dtype)
    tokens[~places] = text
    return tokens


# ----------------------------------------------------------------------------------------------------------------------
# Sources: each yields pieces (key, text, ends), where the key's hash decides between training and validation, and
# ends says that the document does

class Source:
    """What config.source names: self.files, or a data set on the hub if there are none; its size, if known, and version."""

    def __init__(self, config):
        self.config, self.bytes, self.version = config, None, None
        if config.source == "stdlib":
            root = sysconfig.get_paths()["stdlib"]
            skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
            self.files = [(key, path) for key, path in files_below(root, (".py",)) if not skip & set(key.split("/")[:-1])]
            self.version = f"Python {platform.python_version()}"
        else:
            self.files = local_files(config)
        if self.files:
            self.bytes = sum(os.path.getsize(path) for _, path in self.files)
            sizes = "".join(f"{key} {os.path.getsize(path)}\n" for key, path in self.files)
            self.version = self.version or f"{len(self.files)} files, sha256 of names and sizes {sha256(sizes.encode())[:16]}"
        else:  # at the revision that was begun with: another one since is no reason to begin anew
            before = {} if config.overwrite else begun_with(folder_of(config.dataset))
            self.version = before["source_version"] if before.get("source") == config.source else hub_revision(config)

    def pieces(self, skip):
        """All pieces but the first `skip`."""
        if not self.files:
            yield from hub_pieces(self.config, self.version, skip)
            return
        for key, path in self.files:
            for piece in file_pieces(key, path, self.config.text_field, lone=len(self.files) == 1):
                if skip == 0:
                    yield piece
                else:
                    skip -= 1


def begun_with(folder):
    """The description of the data in a folder, or of the beginning of some; {} if there are none."""
    for name in ("manifest.json", "progress.json"):
        with suppress(OSError, ValueError), open(os.path.join(folder, name), encoding="utf-8") as file:
            there = json.load(file)
            return there.get("of", there)
    return {}


def files_below(root, endings):
    """(key, path) of the files in a folder, in the order of their keys."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names if name.endswith(endings)]
    return sorted((key_of(path, root), path) for path in paths)


def key_of(path, root):
    """A document's name wherever the corpus lies: its path below the root, with slashes."""
    return os.path.relpath(path, root).replace(os.sep, "/")


def local_files(config):
    """(key, path) of the files that config.source names; none if it is a data set on the hub."""
    files, patterns = [], [os.path.expanduser(pattern) for pattern in config.source.split(",") if pattern]
    for pattern in patterns:
        found, exists = [], os.path.exists(pattern)  # brackets may be part of a name
        root = pattern if os.path.isdir(pattern) else os.path.dirname(pattern if exists else re.split(r"[*?[]", pattern)[0]) or "."
        for path in [pattern] if exists else sorted(glob.glob(pattern, recursive=True)):
            if os.path.isdir(path) and "**" not in pattern:
                found += [(key_of(inner, root), inner) for _, inner in files_below(path, PLAIN + ROWS)]
            elif os.path.isfile(path) and path.endswith(PLAIN + ROWS):
                found.append((key_of(path, root), path))
        is_a_path = exists or pattern.startswith((".", "/")) or glob.has_magic(pattern) or pattern.endswith(PLAIN + ROWS)
        if not found and (is_a_path or len(patterns) > 1):
            raise config.error(f"source={pattern}: no such file, or nothing that ends in {', '.join(PLAIN + ROWS)}")
        files += found
    return files


def file_pieces(key, path, text_field, lone):
    try:
        if path.endswith(PLAIN):
            for i, (text, ends) in enumerate(text_sections(path, SECTION_CHARS if lone else BATCH_CHARS)):
                yield f"{key}#{i}" if lone else key, text, ends
        else:
            for number, row in enumerate(parquet_rows(path, text_field), 1) if path.endswith(".parquet") else json_rows(path):
                yield row_piece(row, text_field, f"{path}: row {number}")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        raise SystemExit(f"error: cannot read {path}: {e}") from None


def row_piece(row, text_field, where):
    """A row of a table is a document, and its text its own key."""
    if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
        raise SystemExit(f"error: {where} has no text in '{text_field}': name the column with --text_field=")
    return row[text_field], row[text_field], True


def text_sections(path, size):
    """(text, ends): a file in sections of about `size` characters. They end before a single space between two words, as
    BPE's own pieces do, or, in a text without any, wherever the size says."""
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        rest = file.read(size)
        while more := file.read(size):
            cut = rest.rfind(" ", 1, len(rest) - 1)
            while cut > 0 and (rest[cut - 1].isspace() or rest[cut + 1].isspace()):
                cut = rest.rfind(" ", 1, cut)
            cut = cut if cut > 0 else len(rest)
            yield rest[:cut], False
            rest = rest[cut:] + more
        yield rest, True


def json_rows(path):
    """(number, row) of every line that is not blank."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                if not line.isspace():
                    yield number, json.loads(line)
            except ValueError as e:
                raise SystemExit(f"error: {path}:{number}: not JSON ({e})") from None


def parquet_rows(path, text_field):
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile
    try:
        file = ParquetFile(path)
        columns = [text_field] if text_field in file.schema_arrow.names else []
        for batch in file.iter_batches(batch_size=1000, columns=columns):
            yield from batch.to_pylist()
    except ArrowException as e:
        raise SystemExit(f"error: cannot read {path}: {str(e).splitlines()[0]}") from None


@contextmanager
def hub_errors(config):
    try:
        yield
    except Exception as e:  # offline, unknown, private, not installed, a stream that breaks: the hub's errors are many
        raise config.error(f"source={config.source}: cannot be read from the Hugging Face hub ({type(e).__name__}: "
                           f"{str(e).split(chr(10))[0][:100]}): go online, or name local files") from None


def hub_revision(config):
    with hub_errors(config):
        from huggingface_hub import HfApi
        return HfApi().dataset_info(config.source.partition(":")[0]).sha


def hub_pieces(config, revision, skip):
    """A Hugging Face data set, streamed at one revision, so that a resumed run reads the same."""
    with hub_errors(config):
        from datasets import load_dataset
        name, _, configuration = config.source.partition(":")
        rows = load_dataset(name, configuration or None, split="train", streaming=True, revision=revision)
        for number, row in enumerate(rows.skip(skip), skip + 1):
            yield row_piece(row, config.text_field, f"{config.source}: row {number}")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenising, in worker processes

def start_worker():
    """A worker ends with its parent, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def end_with_parent():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def start_tokeniser(tokenizer, val_fraction):
    global encoding, val_share
    start_worker()
    encoding, val_share = get_tokenizer(tokenizer), val_fraction


def tokenise(batch):
    """The tokens of a list of pieces, each document ended by end-of-text: {'train': (n,), 'val': (m,)}."""
    tokens = {"train": [], "val": []}
    for key, text, ends in batch:
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate is no text
        split = tokens["val" if is_validation(key, val_share) else "train"]
        split.append(encoding.encode_to_numpy(text, disallowed_special=()))
        if ends:
            split.append(np.array([encoding.eot_token]))
    return {split: np.concatenate([np.empty(0, DTYPE), *parts], dtype=DTYPE, casting="unsafe") for split, parts in tokens.items()}


def is_validation(key, val_fraction):
    digest = hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * 2**64


def batches(pieces):
    """Lists of pieces of about BATCH_CHARS characters."""
    batch, chars = [], 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece[1])
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def ordered_map(pool, function, items, ahead):
    """(item, function(item)) in order, computed by the pool with at most `ahead` items under way."""
    pending = deque()
    for item in items:
        pending.append((item, pool.submit(function, item)))
        if len(pending) >= ahead:
            item, future = pending.popleft()
            yield item, future.result()
    for item, future in pending:
        yield item, future.result()


# ----------------------------------------------------------------------------------------------------------------------
# Writing

class SplitWriter:
    """Cuts one split's text tokens into blocks, injects the meta-tokens and appends to shards."""
    GROUP = 256  # blocks whose places are drawn together

    def __init__(self, folder, split, config, meta_id):
        self.folder, self.split, self.config, self.meta_id = folder, split, config, meta_id
        self.n_meta = meta_per_block(config.meta_rate, config.block_size)
        self.text_per_block = config.block_size - self.n_meta
        self.blocks_per_shard = max(SHARD_TOKENS // config.block_size, 1)
        self.shards, self.blocks, self.file = [], 0, None  # finished shards; blocks in all
        self.rest = np.empty(0, DTYPE)                     # text that is no whole block yet
        self.group, self.places = None, None

    def path(self, number):
        return os.path.join(self.folder, f"{self.split}_{number:05d}.bin")

    def state(self):
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        return {"shards": self.shards, "blocks": self.blocks, "rest": self.rest.tolist()}

    def resume(self, state):
        """Goes on from a state, and forgets what was written after it."""
        self.shards, self.blocks = state["shards"], state["blocks"]
        self.rest = np.array(state["rest"], DTYPE)
        size = self.blocks % self.blocks_per_shard * self.config.block_size * DTYPE.itemsize
        if size:
            self.file = open(self.path(len(self.shards)), "r+b")
            self.file.truncate(size)
            self.file.seek(size)

    def add(self, text):
        self.rest = np.concatenate([self.rest, text])
        while (len(self.rest) - 1) // self.text_per_block > 0:  # one token stays: the copy that ends a shard
            group, row = divmod(self.blocks, self.GROUP)
            if group != self.group:
                rng = np.random.default_rng([self.config.seed, self.split == "val", group])
                self.group = group
                self.places = meta_places(self.GROUP, self.config.block_size, self.n_meta, rng, self.config.meta_placement)
            n = min((len(self.rest) - 1) // self.text_per_block, self.GROUP - row,
                    self.blocks_per_shard - self.blocks % self.blocks_per_shard)
            text, self.rest = np.split(self.rest, [n * self.text_per_block])
            self.file = self.file or open(self.path(len(self.shards)), "wb")
            self.file.write(inject(text, self.places[row:row + n], self.meta_id).tobytes())
            self.blocks += n
            if self.blocks % self.blocks_per_shard == 0:
                self.end_shard()

    def end_shard(self):
        self.file.write(self.rest[:1].tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.file = None
        path = self.path(len(self.shards))
        tokens = os.path.getsize(path) // DTYPE.itemsize
        self.shards.append({"file": os.path.basename(path), "tokens": tokens, "bytes": os.path.getsize(path), "sha256": sha256_of(path)})

    def close(self):
        """Ends the last shard; returns this split's part of the manifest."""
        if self.file:
            self.end_shard()
        return {"blocks": self.blocks, "tokens": self.blocks * self.config.block_size, "text_tokens": self.blocks * self.text_per_block,
                "dropped_text_tokens": len(self.rest), "shards": self.shards}


def prepare(config):
    """Writes data/<dataset>/ as the config says, or says that it is there already. Raises SystemExit with one line."""
    folder, again = folder_of(config.dataset), "the same command" + " without --overwrite" * config.overwrite
    try:
        encoding, source = get_tokenizer(config.tokenizer), Source(config)
        description = {
            "format": 1, "tokenizer": config.tokenizer, "text_vocab_size": encoding.n_vocab, "meta_id": encoding.n_vocab,
            "block_size": config.block_size, "meta_rate": config.meta_rate,
            "meta_per_block": meta_per_block(config.meta_rate, config.block_size), "meta_placement": config.meta_placement,
            "seed": config.seed, "source": config.source, "source_version": source.version, "text_field": config.text_field,
            "val_fraction": config.val_fraction, "max_tokens": config.max_tokens,
        }
        if os.path.exists(os.path.join(folder, "manifest.json")) and not config.overwrite:
            refuse_other(config, read_manifest(config), description)
            print(f"{folder} is prepared already")
            return
        writers = {split: SplitWriter(folder, split, config, encoding.n_vocab) for split in ("train", "val")}
        os.makedirs(folder, exist_ok=True)
        progress = begin(config, description, writers)
        write_tokens(config, source, writers, progress)
        finish(config, writers, progress)
    except KeyboardInterrupt:
        raise SystemExit(f"\ninterrupted; {again} goes on from here") from None
    except BrokenExecutor:
        raise SystemExit(f"error: a worker was killed, for want of memory perhaps; {again} goes on from here, with fewer --workers= "
                         "if need be") from None
    except OSError as e:
        raise SystemExit(f"error: cannot write {folder}: {e.strerror}; make room, and {again} goes on from here") from None


def refuse_other(config, there, description):
    """Refuses to take a folder's data, or the beginning of some, for what the description says."""
    for name, value in description.items():
        if there.get(name) != value:
            raise config.error(f"{folder_of(config.dataset)} holds data of {name} {there.get(name)}, not {value}: name another --dataset, "
                               "or --overwrite them")


def begin(config, description, writers):
    """How far an interrupted run came, with the writers set to go on there; or a fresh start."""
    folder, progress = folder_of(config.dataset), {"of": description, "pieces": 0, "documents": 0, "chars": 0, "tokens": 0}
    path = os.path.join(folder, "progress.json")
    if config.overwrite or not os.path.exists(path):
        remove_from(folder, os.listdir(folder))
        return progress
    with open(path, encoding="utf-8") as file:
        saved = json.load(file)
    refuse_other(config, saved["of"], description)
    for split, writer in writers.items():
        writer.resume(saved[split])
    print(f"going on behind {saved['documents']:,} documents, {saved['tokens']:,} text tokens")
    return {name: saved[name] for name in progress}


def write_tokens(config, source, writers, progress):
    """Tokenises the source from where progress is, and notes every few seconds how far it came."""
    def save():
        state = {split: writer.state() for split, writer in writers.items()}
        write_json(os.path.join(folder_of(config.dataset), "progress.json"), progress | state)

    limit = config.max_tokens or sys.maxsize
    if progress["tokens"] >= limit:
        return
    workers = config.workers or cores()
    pool = ProcessPoolExecutor(workers, initializer=start_tokeniser, initargs=(config.tokenizer, config.val_fraction))
    bar = tqdm(desc=f"preparing {folder_of(config.dataset)}", unit=" tokens", unit_scale=True, initial=progress["tokens"],
               total=config.max_tokens or None)
    saved_at = time.monotonic()
    try:
        for batch, tokens in ordered_map(pool, tokenise, batches(source.pieces(progress["pieces"])), ahead=2 * workers + 1):
            room = max(limit - progress["tokens"] - len(tokens["val"]), 0)  # all of the validation text, and training text up to the limit
            tokens["train"] = tokens["train"][:room]
            for split, writer in writers.items():
                writer.add(tokens[split])
                progress["tokens"] += len(tokens[split])
            progress["pieces"] += len(batch)
            progress["documents"] += sum(ends for _, _, ends in batch)
            progress["chars"] += sum(len(text) for _, text, _ in batch)
            if source.bytes and not config.max_tokens:
                bar.total = max(progress["tokens"], round(progress["tokens"] / max(progress["chars"], 1) * source.bytes))
            bar.update(progress["tokens"] - bar.n)
            if progress["tokens"] >= limit:
                break
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save()
                saved_at = time.monotonic()
        bar.total = progress["tokens"]
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)


def cores():
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def finish(config, writers, progress):
    """Ends the shards and writes the manifest, with which the data set is complete."""
    folder = folder_of(config.dataset)
    splits = {split: writer.close() for split, writer in writers.items()}
    for split, part in splits.items():
        if part["blocks"] == 0:
            raise config.error(f"val_fraction={config.val_fraction} left the {split} split {part['dropped_text_tokens']} text tokens of "
                               f"{progress['documents']} documents, less than a block of block_size={config.block_size}")
    write_json(os.path.join(folder, "manifest.json"), progress["of"] | {"documents": progress["documents"], "splits": splits})
    remove_from(folder, ["progress.json"])
    print(f"{folder}: " + ", ".join(f"{part['tokens']:,} {split} tokens ({part['text_tokens']:,} text)" for split, part in splits.items()))


# ----------------------------------------------------------------------------------------------------------------------
# The folder

def folder_of(dataset):
    return os.path.join("data", dataset)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path, value):
    """All of it, or nothing."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def remove_from(folder, names):
    """Removes our own files, among names, from a folder."""
    for name in names:
        if name in ("manifest.json", "progress.json") or (name.startswith(("train_", "val_")) and name.endswith(".bin")):
            path = os.path.join(folder, name)
            if os.path.exists(path):
                os.remove(path)


def read_manifest(config):
    """data/<dataset>/manifest.json, its shards' sizes checked. Raises SystemExit with one line."""
    folder, command = folder_of(config.dataset), prepare_command(config)
    path = os.path.join(folder, "manifest.json")
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        sizes = {shard["file"]: shard["bytes"] for split in ("train", "val") for shard in manifest["splits"][split]["shards"]}
        for name in ("tokenizer", "text_vocab_size", "meta_id", "block_size", "meta_rate", "meta_per_block", "meta_placement"):
            manifest[name]
    except FileNotFoundError:
        raise SystemExit(f"error: no data in {folder}: run {command}") from None
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"error: {path} is damaged: run {command} --overwrite") from None
    for name, size in sizes.items():
        path = os.path.join(folder, name)
        found = os.path.getsize(path) if os.path.exists(path) else None
        if found != size:
            problem = "is missing" if found is None else f"has {found} bytes, not {size}"
            raise SystemExit(f"error: {path} {problem}: run {command} --overwrite")
    return manifest


def check_fit(config, manifest):
    """Refuses data that were prepared otherwise than the config says, with the command that would make it right."""
    for name in ("tokenizer", "block_size", "meta_rate", "meta_placement"):
        if manifest[name] != getattr(config, name):
            raise config.error(f"{folder_of(config.dataset)} was prepared with {name} {manifest[name]}, but {name}={getattr(config, name)}: "
                               f"name another --dataset, or run {prepare_command(config)} --overwrite")


def verify(config, manifest):
    """Compares every shard's checksum with the manifest."""
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            path = os.path.join(folder_of(config.dataset), shard["file"])
            if sha256_of(path) != shard["sha256"]:
                raise SystemExit(f"error: {path} was altered (its checksum differs): run {prepare_command(config)} --overwrite")


def prepare_command(config):
    """The command that prepares the data that the config asks for."""
    names = ("dataset", "source", "text_field", "tokenizer", "block_size", "meta_rate", "meta_placement", "val_fraction", "max_tokens",
             "seed")
    given = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(settings.Config, name)}
    return shlex.join(["python", "prepare.py", *(f"--{name}={value}" for name, value in given.items())])


class Blocks:
    """The blocks of one split: x is a block, y the same tokens one later."""

    def __init__(self, folder, manifest, split):
        shards = manifest["splits"][split]["shards"]
        self.block_size = manifest["block_size"]
        self.meta_id = manifest["meta_id"]
        self.n_meta = manifest["meta_per_block"]
        self.text_per_block = self.block_size - self.n_meta
        self.paths = [os.path.join(folder, shard["file"]) for shard in shards]
        self.ends = np.cumsum([shard["tokens"] // self.block_size for shard in shards])

    def __len__(self):
        return int(self.ends[-1])

    def read(self, number):
        """Block `number` and the token behind it: uint16 (T + 1,)."""
        shard = int(np.searchsorted(self.ends, number, side="right"))
        first = int(self.ends[shard - 1]) if shard > 0 else 0
        offset = (int(number) - first) * self.block_size * DTYPE.itemsize
        tokens = np.fromfile(self.paths[shard], DTYPE, self.block_size + 1, offset=offset)
        if tokens.max() > self.meta_id:
            raise SystemExit(f"error: {self.paths[shard]}: token id {tokens.max()} is beyond the "
                             "vocabulary: the data are damaged, prepare them again")
        return tokens

    def batch(self, numbers):
        """(x, y) of these blocks, each int64 (len(numbers), T)."""
        tokens = np.stack([self.read(number) for number in numbers])       # (B, T + 1)
        tokens = torch.from_numpy(tokens.astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


if __name__ == "__main__":
    main()
