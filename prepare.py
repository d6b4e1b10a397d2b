"""Turns text into files of tokens with meta-tokens among them, ready to train on.

    python prepare.py config/meta_gpt2.py                       # C4, about 200 GB
    python prepare.py --source='books/*.txt' --dataset=books --val_fraction=0.05

A data set is a folder data/<dataset>/ of shards and a manifest.json. A shard is a row
of blocks of block_size tokens. Every block has the same number of meta-tokens, at
places of its own. Its targets are the same row of tokens, one later: a shard ends with
a copy of the next block's first token. Killed at any moment and started again,
prepare.py goes on and ends with the same bytes, whatever the number of workers.
--block_size, --seed and --overwrite count here, too.
"""
import errno
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import platform
import re
import shlex
import sys
import sysconfig
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import NamedTuple

import config as settings

import numpy as np
import tiktoken
from tqdm import tqdm

META = "<|meta|>"              # how the meta-token is printed
SPLITS = ("train", "val")
DTYPE = np.dtype(np.uint16)    # of the files: GPT-2's ids and the meta-token end at 50,257
SHARD_TOKENS = 100_000_000
SHARD = r"(train|val)_\d{5}\.bin"
GROUP = 256                    # blocks whose meta-tokens are placed together
BATCH_CHARS = 1 << 20          # text tokenised at a time; the longest piece of a text file
SECTION_CHARS = 1 << 16        # a piece of a lone text file
SMALL_BYTES = 1 << 24          # a source in which a split may come away empty
SAVE_SECONDS = 10              # between two saves of progress.json
MUST_FIT = ("tokenizer", "block_size", "meta_rate", "meta_placement")  # data and model
PLAIN_TEXT = (".txt", ".md", ".py")
ENDINGS = (*PLAIN_TEXT, ".jsonl", ".json", ".parquet")  # each also with .gz


def main(argv=None):
    groups = (settings.Data, "block_size", settings.Preparation, "overwrite", "seed")
    config = settings.load(argv, groups, __doc__)
    if config.verify:
        verify(config, read_manifest(config))
        print(f"{folder_of(config.dataset)}: checksums match")
    else:
        prepare(config)


# --------------------------------------------------------------------------------------
# Tokens, and meta-tokens among them (paper, section 3)

def get_tokenizer(name):
    """'gpt2' or 'bytes' as a tiktoken.Encoding. The meta-token's id is its n_vocab."""
    if name == "bytes":
        return tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]{1,16}", special_tokens={"<|endoftext|>": 256},
            mergeable_ranks={bytes([byte]): byte for byte in range(256)})
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:  # tiktoken downloads by requests, whose errors are many
        raise SystemExit(
            f"error: cannot get GPT-2's BPE files ({type(e).__name__}): go online once, or set "
            "TIKTOKEN_CACHE_DIR to a folder that holds them, or use --tokenizer=bytes") from None


def decode(encoding, tokens, show_meta=False):
    """The text of a list of ids. show_meta prints meta-tokens and end-of-text, too."""
    special = {encoding.n_vocab: META, encoding.eot_token: "<|endoftext|>"}
    if not show_meta:  # decode as a whole: a meta-token may stand inside a character
        return encoding.decode([token for token in tokens if token not in special])
    text = ""
    for name, run in itertools.groupby(tokens, key=special.get):
        run = list(run)
        text += name * len(run) if name else encoding.decode(run)
    return text


def meta_per_block(meta_rate, block_size):
    """M = round(k T)."""
    return round(meta_rate * block_size)


def meta_places(n_blocks, block_size, n_meta, rng, placement="random"):
    """Where the meta-tokens go: bool (n_blocks, block_size), n_meta True in each row.

    No block begins with one. 'random' draws every set of places with equal probability,
    by Floyd's algorithm on all blocks at once; 'periodic' spaces them evenly.
    """
    places = np.zeros((n_blocks, block_size), dtype=bool)
    if placement == "periodic":
        middles = (2 * np.arange(n_meta) + 1) * (block_size - 1) // (2 * max(n_meta, 1))
        places[:, 1 + middles] = True
        return places
    rows = np.arange(n_blocks)
    for last in range(block_size - n_meta, block_size):
        drawn = rng.integers(1, last + 1, size=n_blocks)
        taken = places[rows, drawn]
        places[rows, np.where(taken, last, drawn)] = True
    return places


def inject(text, places, meta_id):
    """Put meta-tokens where places is True, and the text, in order, elsewhere."""
    tokens = np.full(places.shape, meta_id, dtype=text.dtype)
    tokens[~places] = text
    return tokens


# --------------------------------------------------------------------------------------
# Sources

class Piece(NamedTuple):
    """A document, or a part of one that is too long to tokenise at once."""
    key: str     # its hash decides between training and validation ...
    text: str
    ends: bool   # whether the document ends here
    split: str | None = None   # ... unless this does


SKIPPED = Piece("", "", False)  # a row without text


class SourceError(Exception):
    """A source that cannot be read. The message is one line for people."""


def open_source(config, begun, damaged):
    """(version, changed, bytes, pieces) of 'stdlib', local files or a set on the hub.

    Skip the pieces that `begun` (a progress.json) counts, and keep its revision.
    `changed` differs when a file was edited. It and bytes are None on the hub.
    damaged: a dictionary, see `judged`.
    """
    name, field, done = config.source, config.text_field, begun.get("pieces", 0)
    if name != "stdlib" and is_on_hub(name):
        revision = begun["of"]["source_version"] if begun else newest_revision(name)
        rows = enumerate(hub_rows(name, revision, done), done + 1)
        return revision, None, None, judged(row_pieces(rows, field, name), name, damaged)
    try:
        files = stdlib_files() if name == "stdlib" else find_files(name)
        stats = [os.stat(path) for _, path in files]
    except OSError as e:
        raise SourceError(f"cannot read {e.filename}: {e.strerror}") from None
    listing = "".join(f"{key} {stat.st_size}\n" for (key, _), stat in zip(files, stats))
    version = f"{len(files)} files, sha256 of names and sizes {sha256(listing.encode())[:16]}"
    if name == "stdlib":
        version = f"Python {platform.python_version()}"
    changed = sha256(f"{listing} {[stat.st_mtime_ns for stat in stats]}".encode())
    pieces = file_pieces(files, field, damaged)
    n_bytes = sum(stat.st_size for stat in stats)
    if n_bytes < SMALL_BYTES or len(files) == 1:
        pieces = serve_both_splits(pieces, config.val_fraction, config.block_size)
    return version, changed, n_bytes, itertools.islice(pieces, done, None)


def stdlib_files():
    """(key, path) of the Python standard library without its tests."""
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = files_below(sysconfig.get_paths()["stdlib"], (".py",))
    return [(key, path) for key, path in files if not skip & set(key.split("/")[:-1])]


def find_files(source):
    """(key, path) of comma-separated files, folders and globs."""
    files = []
    for pattern in map(os.path.expanduser, filter(None, source.split(","))):
        exists = os.path.exists(pattern)  # brackets may be part of a name
        found = [pattern] if exists else sorted(glob.glob(pattern, recursive=True))
        if "**" in pattern:  # it finds folders and what is in them, by links more than once
            files_found = [path for path in found if not os.path.isdir(path)]
            found = {os.path.realpath(path): path for path in reversed(files_found)}.values()
            found = sorted(found)
        paths = [path for place in found for _, path in files_below(place, ENDINGS)]
        if not paths:
            raise SourceError(f"source={pattern}: no such file, or nothing that ends in "
                              f"{', '.join(ENDINGS)} (or that and .gz)")
        before_wildcard = pattern if exists else re.split(r"[*?[]", pattern)[0]
        root = pattern if os.path.isdir(pattern) else os.path.dirname(before_wildcard)
        files += [(key_of(path, root), path) for path in paths]
    return files


def files_below(root, endings):
    """(key, path) of a folder's files, or of one file, in the order of their keys.

    Links are followed, each folder is read once, and names that begin with a dot are
    left out.
    """
    paths, seen = [] if os.path.isdir(root) else [root], set()
    for folder, inside, names in os.walk(root, followlinks=True):
        is_new = os.path.realpath(folder) not in seen
        seen.add(os.path.realpath(folder))
        inside[:] = [name for name in inside if is_new and name[0] != "."]
        inside.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        paths += [os.path.join(folder, name) for name in names if is_new and name[0] != "."]
    return sorted((key_of(path, root), path) for path in paths if kind_of(path) in endings)


def kind_of(path):
    """The ending in lower case, and without .gz."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def key_of(path, root):
    """A document's name wherever the corpus lies: its path below the root, with /."""
    return os.path.relpath(path, root).replace(os.sep, "/")


def judged(pieces, name, damaged):
    """The pieces of a file. Note in `damaged` which share of it was no text.

    Bytes that cannot be decoded became U+FFFD. Above 1% raise SourceError.
    """
    chars = replaced = 0
    for piece in pieces:
        chars += len(piece.text)
        replaced += piece.text.count("\ufffd")
        yield piece
    share = replaced / max(chars, 1)
    if share > 0.01:
        raise SourceError(f"{name}: {100 * share:.0f}% of its characters are no UTF-8: convert it")
    if share > 0:
        damaged[name] = share


def encoding_of(beginning):
    """UTF-16 if the first bytes are its mark, else UTF-8. A mark is no text."""
    return "utf-16" if beginning[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def open_text(path):
    file = gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb")
    return io.TextIOWrapper(file, encoding_of(file.peek(2)), errors="replace", newline="")


def file_pieces(files, text_field, damaged):
    """The pieces of text files, each a document, and of tables of documents."""
    lone = len(files) == 1  # its sections go to training or validation one by one
    for key, path in files:
        try:
            if kind_of(path) in PLAIN_TEXT:
                sections = enumerate(text_sections(path, SECTION_CHARS if lone else BATCH_CHARS))
                pieces = (Piece(f"{key}#{number}" if lone else key, text, ends)
                          for number, (text, ends) in sections)
            else:
                read_rows = parquet_rows if kind_of(path) == ".parquet" else json_rows
                pieces = row_pieces(read_rows(path, text_field), text_field, path)
            yield from judged(pieces, path, damaged)
        except (OSError, EOFError, ValueError, zlib.error) as e:
            reason = (str(e) or type(e).__name__).splitlines()[0]
            raise SourceError(f"cannot read {path}: {reason}") from None


def text_sections(path, size):
    """(text, ends) of a text file, in sections of about `size` characters.

    A section ends before a single space between two words, where BPE cuts, too. In a
    text without any it ends after `size` characters.
    """
    with open_text(path) as file:
        rest = file.read(size)
        while more := file.read(size):
            up_to_last_word = re.match(r".*\S(?= \S)", rest, re.DOTALL)
            section = up_to_last_word[0] if up_to_last_word else rest
            yield section, False
            rest = rest[len(section):] + more
        yield rest, True


def serve_both_splits(pieces, val_fraction, block_size):
    """The pieces of a small source. Its end is for validation if hashes fail one split.

    They may leave it less than a block, as there is little text or few documents. Eight
    characters a token are enough, or a quarter of the text.
    """
    held, n_held, chars = deque(), 0, dict.fromkeys(SPLITS, 0)
    for piece in pieces:
        held.append(piece)
        n_held += len(piece.text)
        chars[split_of(piece.key, val_fraction)] += len(piece.text)
        while n_held - len(held[0].text) >= max(2 * SECTION_CHARS, 16 * block_size):
            n_held -= len(held[0].text)
            yield held.popleft()
    total = sum(chars.values())
    enough = min(total // 4, 8 * block_size)
    if min(chars.values()) >= enough:
        yield from held
        return
    n_val = min(max(int(val_fraction * total), enough), n_held - enough)
    left = n_held - n_val  # for training
    for piece in held:
        n = min(len(piece.text), left)
        left -= n
        if 0 < n < len(piece.text):
            yield piece._replace(text=piece.text[:n], ends=False, split="train")
            yield piece._replace(text=piece.text[n:], split="val")
        elif piece is SKIPPED:
            yield piece
        else:
            yield piece._replace(split="train" if n == len(piece.text) else "val")


def json_rows(path, text_field):
    """(line number, row) of every line that is not blank."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            try:
                if not line.isspace():
                    yield number, json.loads(line)
            except ValueError as e:
                raise SourceError(f"{path}:{number}: not JSON ({e})") from None


def parquet_rows(path, text_field):
    """(number, row) of every row, which holds only the column text_field."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile
    try:
        batches = ParquetFile(path).iter_batches(batch_size=1000, columns=[text_field])
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from enumerate(rows, 1)
    except ArrowException as e:
        raise ValueError(e) from None


def row_pieces(rows, text_field, where):
    """A row is a document, and its text is its key. Null is no document."""
    for number, row in rows:
        missing = None if number > 1 else 0  # a first row tells whether there is a column
        text = row.get(text_field, missing) if isinstance(row, dict) else 0
        if isinstance(text, bytes):
            text = text.decode(encoding_of(text), "replace")
        if text is None:
            yield SKIPPED
        elif isinstance(text, str):
            yield Piece(text, text, True)
        else:
            raise SourceError(f"{where}: row {number} has no text in '{text_field}': "
                              "name the column with --text_field=")


def is_on_hub(source):
    """Whether this is no path but a name on the Hugging Face hub, as allenai/c4:en."""
    is_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:.+)?", source)
    return is_name and kind_of(source) not in ENDINGS and not os.path.exists(source)


def hub_rows(source, revision, skip):
    """Stream the rows of a data set on the hub after the first `skip`."""
    name, _, configuration = source.partition(":")
    with hub_errors(source):
        from datasets import load_dataset
        yield from load_dataset(name, configuration or None, split="train", streaming=True,
                                revision=revision).skip(skip)


def newest_revision(source):
    with hub_errors(source):
        from huggingface_hub import HfApi
        return HfApi().dataset_info(source.partition(":")[0]).sha


@contextmanager
def hub_errors(source):
    try:
        yield
    except Exception as e:  # offline, unknown, private, not installed, a broken stream ...
        reason = f"{type(e).__name__}: {str(e)[:100]}".splitlines()[0]
        raise SourceError(f"source={source}: cannot be read from the Hugging Face hub "
                          f"({reason}): go online, or name local files") from None


# --------------------------------------------------------------------------------------
# Tokenising, in threads: tiktoken releases the GIL

class Tokeniser(threading.local):
    """Turns a batch of pieces into tokens.

    Each thread that uses it calls __init__ and gets an encoding of its own: threads
    that share one wait for each other's regular expression.
    """

    def __init__(self, encoding, val_fraction):
        self.val_fraction = val_fraction
        self.encoding = tiktoken.Encoding(
            encoding.name, pat_str=encoding._pat_str, special_tokens=encoding._special_tokens,
            mergeable_ranks=encoding._mergeable_ranks)

    def __call__(self, batch):
        """{'train': (n,), 'val': (m,)}, end-of-text after each document."""
        parts = {split: [np.empty(0, DTYPE)] for split in SPLITS}
        for key, text, ends, split in batch:
            split = split or split_of(key, self.val_fraction)
            text = text.encode("utf-8", "replace").decode()  # a lone surrogate is no text
            parts[split] += self.encode(text)
            if ends:
                parts[split].append([self.encoding.eot_token])
        return {split: np.concatenate(tokens, dtype=DTYPE, casting="unsafe")
                for split, tokens in parts.items()}

    def encode(self, text):
        """Arrays of tokens: one, unless tiktoken refuses a million blanks in a row."""
        encode = partial(self.encoding.encode_to_numpy, disallowed_special=())
        try:
            return [encode(text)]
        except ValueError:  # where there are many blanks, BPE knows no longer tokens
            return [encode(part) for part in re.split(r"(\s{524288})", text)]


def split_of(key, val_fraction):
    digest = hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest()
    return "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"


def batches_of(pieces):
    """Lists of pieces with about BATCH_CHARS characters in all."""
    batch, chars = [], 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def ordered_map(pool, function, items, ahead):
    """(item, function(item)) in order. The pool holds at most `ahead` items."""
    pending = deque()
    for item in items:
        pending.append((item, pool.submit(function, item)))
        if len(pending) >= ahead:
            item, future = pending.popleft()
            yield item, future.result()
    for item, future in pending:
        yield item, future.result()


def cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# --------------------------------------------------------------------------------------
# Writing

class SplitWriter:
    """Cuts one split's text into blocks, injects the meta-tokens and writes shards."""

    def __init__(self, folder, split, recipe, state):
        """Resume from a state, and discard what was written after it."""
        self.folder, self.split, self.recipe = folder, split, recipe
        self.block_size = recipe["block_size"]
        self.text_per_block = self.block_size - recipe["meta_per_block"]
        self.blocks_per_shard = max(SHARD_TOKENS // self.block_size, 1)
        self.blocks = state["blocks"]                # in all
        self.shards = state["shards"]                # the finished ones
        self.rest = np.array(state["rest"], DTYPE)   # text that is no whole block yet
        self.places = []                             # of the next blocks, up to a group's end
        if self.in_shard():
            os.truncate(self.path(), self.bytes_in_shard())

    def in_shard(self):
        """The number of blocks in the shard that is being written."""
        return self.blocks % self.blocks_per_shard

    def bytes_in_shard(self):
        return self.in_shard() * self.block_size * DTYPE.itemsize

    def path(self):
        return os.path.join(self.folder, f"{self.split}_{len(self.shards):05d}.bin")

    def state(self):
        """The state to resume from. All that comes before it is safe on the disk."""
        writing = {}
        if self.in_shard():
            flush(self.path())
            writing[os.path.basename(self.path())] = self.bytes_in_shard()
        return {"shards": self.shards, "writing": writing, "blocks": self.blocks,
                "rest": self.rest.tolist()}

    def add(self, text):
        """Write all complete blocks, but keep one token for end_shard."""
        self.rest = np.concatenate([self.rest, text])
        while len(self.rest) > self.text_per_block:
            if len(self.places) == 0:
                self.places = self.draw_places()
            left = self.blocks_per_shard - self.in_shard()
            n = min((len(self.rest) - 1) // self.text_per_block, len(self.places), left)
            text, self.rest = np.split(self.rest, [n * self.text_per_block])
            places, self.places = np.split(self.places, [n])
            with open(self.path(), "ab" if self.in_shard() else "wb") as file:
                file.write(inject(text, places, self.recipe["meta_id"]).tobytes())
            self.blocks += n
            if n == left:
                self.end_shard()

    def draw_places(self):
        """The places in the next blocks, up to the end of their group."""
        group, row = divmod(self.blocks, GROUP)
        rng = np.random.default_rng([self.recipe["seed"], SPLITS.index(self.split), group])
        return meta_places(GROUP, self.block_size, self.recipe["meta_per_block"], rng,
                           self.recipe["meta_placement"])[row:]

    def end_shard(self):
        path = self.path()
        with open(path, "ab") as file:
            file.write(self.rest[:1].tobytes())  # the copy of the next block's first token
        flush(path)
        size = os.path.getsize(path)
        self.shards.append({"file": os.path.basename(path), "tokens": size // DTYPE.itemsize,
                            "bytes": size, "sha256": sha256_of(path)})

    def close(self):
        """End the last shard; return this split's part of the manifest."""
        if self.in_shard():
            self.end_shard()
        return {"blocks": self.blocks, "tokens": self.blocks * self.block_size,
                "text_tokens": self.blocks * self.text_per_block,
                "dropped_text_tokens": len(self.rest), "shards": self.shards}


def prepare(config):
    """Write data/<dataset>/ unless it is there. Raise SystemExit with one line."""
    folder = folder_of(config.dataset)
    again = "the same command without --overwrite" if config.overwrite else "the same command"
    busy = f"another prepare.py is writing {folder}: wait, or name another --dataset"
    try:
        os.makedirs(folder, exist_ok=True)
        complete = os.path.exists(f"{folder}/manifest.json") and not config.overwrite
        with nullcontext() if complete else lock(f"{folder}/.lock", busy):
            write_data(config, folder)
    except SourceError as e:
        raise config.error(e) from None
    except KeyboardInterrupt:
        raise SystemExit(f"\ninterrupted; {again} resumes") from None
    except OSError as e:
        advice = "make room" if e.errno in (errno.ENOSPC, errno.EDQUOT) else "put that right"
        raise SystemExit(f"error: cannot write {folder}: {e.strerror}; {advice}, "
                         f"and {again} resumes") from None


def write_data(config, folder):
    """Begin a data set, or go on with it."""
    progress, damaged = read_progress(config), {}
    encoding = get_tokenizer(config.tokenizer)
    version, changed, n_bytes, pieces = open_source(config, progress, damaged)
    recipe = recipe_of(config, encoding, version)
    if progress:
        check_same(config, progress["of"], recipe)
        if "splits" in progress["of"]:
            print(f"{folder} is prepared already")
            return
        if progress.get("changed", changed) != changed:
            raise config.error(f"source={config.source} was edited since {folder} was begun: "
                               f"run {prepare_command(config)} --overwrite")
        print(f"resuming after {progress['documents']:,} documents")
    else:
        remove_older(folder)
        progress = {"of": recipe, "changed": changed, "pieces": 0, "documents": 0,
                    "skipped_rows": 0, "chars": 0, "tokens": 0}
        progress |= {split: {"shards": [], "blocks": 0, "rest": []} for split in SPLITS}
        write_json(f"{folder}/progress.json", progress)  # makes the shards to come our own
    tokenise = Tokeniser(encoding, config.val_fraction)
    splits = write_shards(folder, progress, pieces, n_bytes, tokenise, config.workers or cores())
    write_manifest(folder, progress, splits)
    if damaged:
        worst = max(damaged, key=damaged.get)
        print(f"warning: {worst}: {100 * damaged[worst]:.2g}% of its characters are no UTF-8 and "
              f"became U+FFFD (files with such in all: {len(damaged)})", file=sys.stderr)


def write_shards(folder, progress, pieces, n_bytes, tokenise, workers):
    """Write the pieces, up to max_tokens; return the manifest's part on each split.

    Counts in `progress`, and saves it now and then. n_bytes is the size of the source,
    from which the bar guesses the end.
    """
    recipe = progress["of"]
    writers = {split: SplitWriter(folder, split, recipe, progress[split]) for split in SPLITS}
    limit = recipe["max_tokens"] or sys.maxsize
    bar = tqdm(desc=f"preparing {folder}", unit=" tokens", unit_scale=True,
               initial=progress["tokens"], total=recipe["max_tokens"] or None)
    saved_at = time.monotonic()
    with ThreadPoolExecutor(workers) as pool, bar:
        batches = batches_of(pieces)
        for batch, tokens in ordered_map(pool, tokenise, batches, ahead=2 * workers + 1):
            room = limit - progress["tokens"] - len(tokens["val"])  # validation text goes first
            tokens["train"] = tokens["train"][:max(room, 0)]
            for split, writer in writers.items():
                writer.add(tokens[split])
                progress["tokens"] += len(tokens[split])
            progress["pieces"] += len(batch)
            progress["documents"] += sum(piece.ends for piece in batch)
            progress["skipped_rows"] = progress.get("skipped_rows", 0) + batch.count(SKIPPED)
            progress["chars"] += sum(len(piece.text) for piece in batch)
            if n_bytes and not recipe["max_tokens"]:
                bar.total = progress["tokens"] * n_bytes // max(progress["chars"], 1)
            bar.update(progress["tokens"] - bar.n)
            if progress["tokens"] >= limit:
                break
            if time.monotonic() - saved_at > SAVE_SECONDS:
                states = {split: writer.state() for split, writer in writers.items()}
                write_json(f"{folder}/progress.json", progress | states)
                saved_at = time.monotonic()
    return {split: writer.close() for split, writer in writers.items()}


def write_manifest(folder, progress, splits):
    """Complete the data set. Raise if a split is empty."""
    recipe, documents = progress["of"], progress["documents"]
    fault = f"val_fraction={recipe['val_fraction']}"
    if progress["tokens"] < 4 * recipe["block_size"]:
        fault = f"the short source={recipe['source']}"
    if 0 < recipe["max_tokens"] <= progress["tokens"]:
        fault = f"max_tokens={recipe['max_tokens']}"
    for split, part in splits.items():
        if part["blocks"] == 0:
            raise SourceError(
                f"{fault} left the {split} split {part['dropped_text_tokens']} text tokens of "
                f"{documents} documents, less than a block of block_size={recipe['block_size']}")
    skipped = progress.get("skipped_rows", 0)
    counts = {"documents": documents}
    if skipped:
        counts["skipped_rows"] = skipped
        print(f"{skipped:,} rows without text were skipped")
    write_json(f"{folder}/manifest.json", recipe | counts | {"splits": splits})
    with suppress(FileNotFoundError):
        os.remove(f"{folder}/progress.json")
    print(f"{folder}: {splits['train']['tokens']:,} tokens to train on, "
          f"{splits['val']['tokens']:,} to validate on")


def recipe_of(config, encoding, source_version):
    """All that decides what is written; the head of the manifest."""
    return {
        "format": 1,
        "tokenizer": config.tokenizer,
        "text_vocab_size": encoding.n_vocab,
        "meta_id": encoding.n_vocab,
        "block_size": config.block_size,
        "meta_rate": config.meta_rate,
        "meta_per_block": meta_per_block(config.meta_rate, config.block_size),
        "meta_placement": config.meta_placement,
        "seed": config.seed,
        "source": config.source,
        "source_version": source_version,
        "text_field": config.text_field,
        "val_fraction": config.val_fraction,
        "max_tokens": config.max_tokens,
    }


# --------------------------------------------------------------------------------------
# What lies in a folder

def folder_of(dataset):
    """data/<dataset>. Raise SystemExit if that is not a folder in data/."""
    if dataset in ("", ".", "..") or os.path.basename(dataset) != dataset:
        raise SystemExit(f"error: dataset={dataset}: expected the plain name of a folder in data/")
    return os.path.join("data", dataset)


def read_progress(config):
    """progress.json; {"of": manifest} if the data are complete; {} to begin anew."""
    if not config.overwrite:
        if os.path.exists(os.path.join(folder_of(config.dataset), "manifest.json")):
            return {"of": read_manifest(config)}
        with suppress(FileNotFoundError):
            progress = read_checked(config, "progress.json")
            return progress if progress["pieces"] > 0 else {}
    return {}


def read_manifest(config):
    """manifest.json, compared with the files. Raise SystemExit with one line."""
    try:
        return read_checked(config, "manifest.json")
    except FileNotFoundError:
        raise SystemExit(f"error: no data in {folder_of(config.dataset)}: "
                         f"run {prepare_command(config)}") from None


def read_checked(config, name):
    """manifest.json or progress.json, compared with the files that it names."""
    folder = folder_of(config.dataset)
    path = os.path.join(folder, name)
    try:
        described, sizes = read_description(path)
    except ValueError:
        raise SystemExit(f"error: {path} is damaged: move {folder} away, and run "
                         f"{prepare_command(config)}") from None
    for shard, size in sizes.items():
        path = os.path.join(folder, shard)
        found = os.path.getsize(path) if os.path.exists(path) else None
        begun = "of" in described  # then more may have been written
        if found is None or found < size or (found > size and not begun):
            problem = "is missing" if found is None else f"has {found} bytes, not {size}"
            command = prepare_command(config, described.get("of", described))
            raise SystemExit(f"error: {path} {problem}: run {command} --overwrite")
    return described


def read_description(path):
    """(a manifest or progress, {shard: bytes}). Raise ValueError if it is damaged."""
    with open(path, encoding="utf-8") as file:
        described, sizes = json.load(file), {}
    try:
        recipe, parts = described.get("of", described), described.get("splits", described)
        for split in SPLITS:
            sizes |= {shard["file"]: shard["bytes"] for shard in parts[split]["shards"]}
            sizes |= parts[split].get("writing", {})
        names = ("text_vocab_size", "meta_id", "meta_per_block", *MUST_FIT)
        right = [type(recipe[name]) for name in names] == [int, int, int, str, int, float, str]
        right &= all(re.fullmatch(SHARD, name) for name in sizes)
        numbers = [*sizes.values(), *(parts[split]["blocks"] for split in SPLITS)]
        if "of" in described:
            numbers += [described[name] for name in ("pieces", "documents", "chars", "tokens")]
        right &= {*map(type, numbers)} == {int}
    except (KeyError, TypeError, AttributeError):
        right = False
    if not right:
        raise ValueError(f"{path} is damaged")
    return described, sizes


def remove_older(folder):
    """Remove an older preparation. Raise SystemExit if there are other such files."""
    shards = {name for name in os.listdir(folder) if re.fullmatch(r"(train|val)_.*\.bin", name)}
    own = set()
    for name in ("manifest.json", "progress.json"):
        with suppress(FileNotFoundError, ValueError):  # a damaged one tells of no shards
            described, sizes = read_description(os.path.join(folder, name))
            own |= set(sizes)
            if "of" in described:  # more shards may have been begun since
                own |= {shard for shard in shards if re.fullmatch(SHARD, shard)}
    if foreign := sorted(shards - own):
        raise SystemExit(f"error: {os.path.join(folder, foreign[0])} belongs to no preparation "
                         "that is known: move it away, or name another --dataset")
    notes = ("manifest.json.tmp", "progress.json.tmp", "manifest.json", "progress.json")
    for name in (*sorted(own), *notes):  # what tells of the shards goes last
        with suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))


def verify(config, manifest):
    """Compare all checksums with the manifest's. Raise SystemExit with one line."""
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            path = os.path.join(folder_of(config.dataset), shard["file"])
            if sha256_of(path) != shard["sha256"]:
                raise SystemExit(f"error: {path} was altered (its checksum differs): run "
                                 f"{prepare_command(config, manifest)} --overwrite")


def check_fit(config, manifest):
    """Refuse data that the model of the config cannot train on."""
    check_same(config, manifest, {name: getattr(config, name) for name in MUST_FIT})


def prepare_command(config, recipe=None):
    """The command that prepares what the config asks for, or the data of a recipe."""
    values = vars(config) | (recipe or {})
    command = ["python", "prepare.py"]
    for name in ("dataset", "source", "text_field", "tokenizer", "block_size", "meta_rate",
                 "meta_placement", "val_fraction", "max_tokens", "seed"):
        if values[name] != getattr(settings.Config, name):
            command.append(f"--{name}={values[name]}")
    return shlex.join(command)


def check_same(config, there, wanted):
    """Refuse data that were prepared, or begun, with other values than wanted."""
    differing = {name: value for name, value in wanted.items() if there.get(name) != value}
    if differing:
        # Replace no source of the user's by a default.
        asked = {name: value for name, value in differing.items()
                 if name in MUST_FIT or config.given(name)}
        name, value = next(iter(differing.items()))
        raise config.error(
            f"{folder_of(config.dataset)} was prepared with {name} {there.get(name)}, but "
            f"{name}={value}: name another --dataset, or run "
            f"{prepare_command(config, there | asked)} --overwrite")


def lock(path, busy):
    """Lock a file. Returns it open: the lock ends when it is closed.

    The operating system closes it when the process ends, however it ends. The empty
    file stays. Raises SystemExit(busy) if another process holds the lock.
    """
    file = open(path, "ab")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise SystemExit(f"error: {busy}") from None
        raise
    return file


def write_json(path, value):
    """Write the file whole, or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
    flush(path + ".tmp")
    os.replace(path + ".tmp", path)


def flush(path):
    """Do not return before the file is safe on the disk."""
    with open(path, "ab") as file:
        os.fsync(file.fileno())


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        """Block `number` and the token after it: uint16 (T + 1,)."""
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
        import torch  # here, as preparing needs no torch, and loading it takes a second
        tokens = np.stack([self.read(number) for number in numbers])       # (B, T + 1)
        tokens = torch.from_numpy(tokens.astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


if __name__ == "__main__":
    main()
