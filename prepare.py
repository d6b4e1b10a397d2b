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
import json
import os
import platform
import signal
import sys
import sysconfig
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import tiktoken
from tqdm import tqdm

import config as settings

META = "<|meta|>"                 # how the meta-token is printed
SHARD_TOKENS = 100_000_000
BATCH_CHARS = 1 << 20             # text handed to a worker at a time, and the longest piece of a plain-text file
SECTION_CHARS = 1 << 16           # of a lone text file, the unit that goes to training or validation
SAVE_SECONDS = 10                 # between two notes of how far we are
PLAIN, ROWS = (".txt", ".md", ".py"), (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")


def main(argv=None):
    config = settings.load(argv)
    if config.verify:
        manifest = read_manifest(config)
        verify(config, manifest)
        print(f"{folder_of(config)}: {sum(len(s['shards']) for s in manifest['splits'].values())} shards, checksums match")
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
    """Text of a list of ids; meta-tokens and end-of-text are left out unless show_meta."""
    text, run = [], []
    for token in [*tokens, None]:
        if token is not None and token < encoding.n_vocab and token != encoding.eot_token:
            run.append(token)
            continue
        text.append(encoding.decode(run, errors="replace"))
        run = []
        if show_meta and token is not None:
            text.append(META if token == encoding.n_vocab else encoding.decode([token]))
    return "".join(text)


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
        else:
            self.version = hub_revision(config)

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


def files_below(root, endings):
    """(key, path) of the files in a folder: the key is the path below it, with slashes, and orders them."""
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith(endings):
                path = os.path.join(folder, name)
                found.append((os.path.relpath(path, root).replace(os.sep, "/"), path))
    return sorted(found)


def local_files(config):
    """(key, path) of the files that config.source names; none if it is a data set on the hub."""
    files = []
    for pattern in filter(None, config.source.split(",")):
        matches = sorted(glob.glob(pattern, recursive=True))
        for path in matches:
            if os.path.isdir(path):
                files += files_below(path, PLAIN + ROWS)
            elif path.endswith(PLAIN + ROWS):
                files.append((os.path.basename(path), path))
        is_a_path = matches or pattern.startswith((".", "/", "~")) or pattern.endswith(PLAIN + ROWS) or glob.has_magic(pattern)
        if is_a_path and not files:
            raise config.error(f"source={pattern}: no such file, or nothing that ends in {', '.join(PLAIN + ROWS)}")
    return files


def file_pieces(key, path, text_field, lone):
    if path.endswith(PLAIN):
        sections = text_sections(path, SECTION_CHARS if lone else BATCH_CHARS)
        for i, (text, ends) in enumerate(sections):
            yield f"{key}#{i}" if lone else key, text, ends
    else:
        for number, row in enumerate(parquet_rows(path, text_field) if path.endswith(".parquet") else json_rows(path), 1):
            if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
                raise SystemExit(f"error: {path}: row {number} has no text in '{text_field}': name the column with --text_field=")
            yield row[text_field], row[text_field], True


def text_sections(path, size):
    """(text, ends): a file in sections of about `size` characters, cut where BPE cuts as well: behind a single newline
    between two other characters that are no white space."""
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        rest = file.read(size)
        while more := file.read(size):
            cut = rest.rfind("\n", 1, len(rest) - 1)
            while cut > 0 and (rest[cut - 1].isspace() or rest[cut + 1].isspace()):
                cut = rest.rfind("\n", 1, cut)
            if cut > 0:
                yield rest[:cut + 1], False
                rest = rest[cut + 1:]
            rest += more
        yield rest, True


def json_rows(path):
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
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
    except (ArrowException, OSError) as e:
        raise SystemExit(f"error: {path}: {str(e).splitlines()[0]}") from None


def hub_error(config, e):
    return config.error(f"source={config.source}: cannot be read from the Hugging Face hub ({type(e).__name__}: "
                        f"{str(e).split(chr(10))[0][:100]}): go online, or name local files")


def hub_revision(config):
    try:
        from huggingface_hub import HfApi
        return HfApi().dataset_info(config.source.partition(":")[0]).sha
    except Exception as e:  # offline, unknown, private, not installed: the hub's errors are many
        raise hub_error(config, e) from None


def hub_pieces(config, revision, skip):
    """A Hugging Face data set, streamed at one revision, so that a resumed run reads the same."""
    try:
        from datasets import load_dataset
        name, _, configuration = config.source.partition(":")
        rows = load_dataset(name, configuration or None, split="train", streaming=True, revision=revision)
        for row in rows.skip(skip):
            yield row[config.text_field], row[config.text_field], True
    except Exception as e:  # as above, and a stream that breaks
        raise hub_error(config, e) from None


# ----------------------------------------------------------------------------------------------------------------------
# Tokenising, in worker processes

def start_worker(tokenizer, val_fraction, parent):
    global encoding, val_share
    encoding, val_share = get_tokenizer(tokenizer), val_fraction
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business

    def end_with_parent():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def tokenise(batch):
    """The tokens of a list of pieces, each document ended by end-of-text: {'train': uint32, 'val': uint32}."""
    tokens = {"train": [], "val": []}
    for key, text, ends in batch:
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate is no text
        split = tokens["val" if is_validation(key, val_share) else "train"]
        split.append(encoding.encode_to_numpy(text, disallowed_special=()))
        if ends:
            split.append(np.array([encoding.eot_token]))
    return {split: np.concatenate([np.empty(0, np.uint32), *parts], dtype=np.uint32, casting="unsafe")
            for split, parts in tokens.items()}


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
        self.dtype = np.dtype(np.uint16 if meta_id < 2**16 else np.uint32)
        self.n_meta = meta_per_block(config.meta_rate, config.block_size)
        self.text_per_block = config.block_size - self.n_meta
        self.blocks_per_shard = SHARD_TOKENS // config.block_size
        self.shards, self.blocks, self.file = [], 0, None  # finished shards; blocks in all
        self.rest = np.empty(0, self.dtype)                # text that is no whole block yet
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
        self.rest = np.array(state["rest"], self.dtype)
        size = self.blocks % self.blocks_per_shard * self.config.block_size * self.dtype.itemsize
        if size:
            self.file = open(self.path(len(self.shards)), "r+b")
            self.file.truncate(size)
            self.file.seek(size)

    def add(self, text):
        self.rest = np.concatenate([self.rest, text.astype(self.dtype)])
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
        self.file.close()
        self.file = None
        path = self.path(len(self.shards))
        tokens = os.path.getsize(path) // self.dtype.itemsize
        self.shards.append({"file": os.path.basename(path), "tokens": tokens, "bytes": os.path.getsize(path), "sha256": sha256_of(path)})

    def close(self):
        """Ends the last shard; returns this split's part of the manifest."""
        if self.file:
            self.end_shard()
        return {"blocks": self.blocks, "tokens": self.blocks * self.config.block_size, "text_tokens": self.blocks * self.text_per_block,
                "dropped_text_tokens": len(self.rest), "shards": self.shards}


def prepare(config):
    """Writes data/<dataset>/ as the config says, or says that it is there already. Raises SystemExit with one line."""
    folder = folder_of(config)
    if os.path.exists(os.path.join(folder, "manifest.json")) and not config.overwrite:
        check_fit(config, read_manifest(config))
        print(f"{folder} is prepared already")
        return
    encoding, source = get_tokenizer(config.tokenizer), Source(config)
    description = {
        "format": 1, "tokenizer": config.tokenizer, "vocab_size": encoding.n_vocab, "meta_id": encoding.n_vocab,
        "block_size": config.block_size, "meta_rate": config.meta_rate,
        "meta_per_block": meta_per_block(config.meta_rate, config.block_size), "meta_placement": config.meta_placement,
        "seed": config.seed, "source": config.source, "source_version": source.version, "text_field": config.text_field,
        "val_fraction": config.val_fraction, "max_tokens": config.max_tokens,
    }
    writers = {split: SplitWriter(folder, split, config, encoding.n_vocab) for split in ("train", "val")}
    try:
        os.makedirs(folder, exist_ok=True)
        progress = begin(folder, description, writers)
        write_tokens(config, source, writers, progress)
        finish(config, writers, progress)
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the same command goes on from here") from None
    except OSError as e:
        raise SystemExit(f"error: cannot write {folder}: {e.strerror}; make room, and the same command goes on from here") from None


def begin(folder, description, writers):
    """How far an interrupted run of the same description came, with the writers set to go on there; or a fresh start."""
    progress = {"of": description, "pieces": 0, "documents": 0, "chars": 0, "tokens": 0}
    path = os.path.join(folder, "progress.json")
    saved = None
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            saved = json.load(file)
    if saved is None or saved["of"] != description:
        remove_from(folder, os.listdir(folder))
        return progress
    for split, writer in writers.items():
        writer.resume(saved[split])
    print(f"going on behind {saved['documents']:,} documents, {saved['tokens']:,} text tokens")
    return {name: saved[name] for name in progress}


def write_tokens(config, source, writers, progress):
    """Tokenises the source from where progress is, and notes every few seconds how far it came."""
    def save():
        state = {split: writer.state() for split, writer in writers.items()}
        write_json(os.path.join(folder_of(config), "progress.json"), progress | state)

    workers = config.workers or os.cpu_count()
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(config.tokenizer, config.val_fraction, os.getpid()))
    bar = tqdm(desc=f"preparing {folder_of(config)}", unit=" tokens", unit_scale=True, initial=progress["tokens"],
               total=config.max_tokens or None)
    saved_at = time.monotonic()
    save()
    try:
        for batch, tokens in ordered_map(pool, tokenise, batches(source.pieces(progress["pieces"])), ahead=2 * workers + 1):
            if config.max_tokens:  # all of the validation text, and training text up to the limit
                room = max(config.max_tokens - progress["tokens"] - len(tokens["val"]), 0)
                tokens["train"] = tokens["train"][:room]
            for split, writer in writers.items():
                writer.add(tokens[split])
                progress["tokens"] += len(tokens[split])
            progress["pieces"] += len(batch)
            progress["documents"] += sum(ends for _, _, ends in batch)
            progress["chars"] += sum(len(text) for _, text, _ in batch)
            if source.bytes and not config.max_tokens:
                bar.total = max(progress["tokens"], round(progress["tokens"] / progress["chars"] * source.bytes))
            bar.update(progress["tokens"] - bar.n)
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save()
                saved_at = time.monotonic()
            if config.max_tokens and progress["tokens"] >= config.max_tokens:
                break
        bar.total = progress["tokens"]
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)


def finish(config, writers, progress):
    """Ends the shards and writes the manifest, with which the data set is complete."""
    folder = folder_of(config)
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

def folder_of(config):
    return os.path.join("data", config.dataset)


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
    folder, command = folder_of(config), prepare_command()
    path = os.path.join(folder, "manifest.json")
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        shards = [shard for split in ("train", "val") for shard in manifest["splits"][split]["shards"]]
    except FileNotFoundError:
        raise SystemExit(f"error: no data in {folder}: run {command}") from None
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"error: {path} is damaged: run {command} --overwrite") from None
    for shard in shards:
        path = os.path.join(folder, shard["file"])
        size = os.path.getsize(path) if os.path.exists(path) else None
        if size != shard["bytes"]:
            problem = "is missing" if size is None else f"has {size} bytes, not {shard['bytes']}"
            raise SystemExit(f"error: {path} {problem}: run {command} --overwrite")
    return manifest


def check_fit(config, manifest):
    """Refuses data that were prepared otherwise than the config says, with the command that would make it right."""
    for name in ("tokenizer", "block_size", "meta_rate", "meta_placement"):
        if manifest[name] != getattr(config, name):
            raise config.error(f"{folder_of(config)} was prepared with {name} {manifest[name]}, but {name}={getattr(config, name)}: "
                               f"name another --dataset, or run {prepare_command()} --overwrite")


def verify(config, manifest):
    """Compares every shard's checksum with the manifest."""
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            path = os.path.join(folder_of(config), shard["file"])
            if sha256_of(path) != shard["sha256"]:
                raise SystemExit(f"error: {path} was altered (its checksum differs): run {prepare_command()} --overwrite")


def prepare_command():
    """The command that prepares what this process was asked to use."""
    return " ".join(["python prepare.py", *(arg for arg in sys.argv[1:] if arg not in ("--overwrite", "--verify"))])


if __name__ == "__main__":
    main()
