"""What the project promises, each promise checked against independent code."""
import contextlib
import errno
import glob
import gzip
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from concurrent.futures import Future
from dataclasses import fields, replace
from types import SimpleNamespace

import config as settings
import analyze
import bench
import checkpoint
import eval_synthetic
import prepare
import rate_distortion
import recall
import sample
import train
from machine import Machine
from model import (
    GPT,
    GPTConfig,
    LinearCrossEntropy,
    MetaTokens,
    pad_vocab,
    rope_frequencies,
    rope_tables,
    rotate,
)
from results import draw_analysis, plot_synthetic

import numpy as np
import pytest
import safetensors.torch
import tiktoken
import torch
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch.nn import functional as F

torch.set_num_threads(1)  # tiny models: two threads would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"


# --------------------------------------------------------------------------------------
# Tools that several parts share

HERE = os.path.dirname(os.path.abspath(__file__))
WRAPPERS = ["_orig_mod.", "module.", "module._orig_mod."]  # torch.compile's, DDP's, both
META = 60
TINY = GPTConfig(block_size=64, vocab_size=64, n_layer=2, n_head=2, n_embd=16, meta_id=META)


def gpt2_bpe():
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception:
        pytest.skip("GPT-2's BPE files are not in TIKTOKEN_CACHE_DIR and cannot be downloaded")


def build(seed=0, **changes):
    """A tiny model in float64, with parameters so large that differences show."""
    torch.manual_seed(seed)
    model = GPT(replace(TINY, **changes)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


def text_with_meta(counts, T=24, seed=0):
    """(len(counts), T) random ids; row i holds counts[i] meta-tokens."""
    rng = torch.Generator().manual_seed(seed)
    idx = torch.randint(0, META, (len(counts), T), generator=rng)
    for row, count in zip(idx, counts):
        row[torch.randperm(T, generator=rng)[:count]] = META
    return idx


def small_model(**changes):
    """An untrained model for bytes."""
    shape = {"block_size": 256, "vocab_size": 320, "n_layer": 2, "n_head": 2, "n_embd": 64,
             "meta_id": 257}
    torch.manual_seed(0)
    return GPT(GPTConfig(**shape | changes))


def save_model(path, **changes):
    """Save an untrained model as train.py saves a trained one."""
    model = small_model(**{"n_embd": 16, "n_layer": 1} | changes)
    checkpoint.save(path, {
        "model": model.state_dict(), "model_config": vars(model.config), "step": 7,
        "settings": {"tokenizer": "bytes", "seed": 5}})


def weights_of(folder):
    return checkpoint.load(folder)["model"]


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def write_bytes(path, content):
    with open(path, "wb") as file:
        file.write(content)


def folder_bytes(folder):
    return {name: read_bytes(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}


def refusal(run, *args):
    """The one line with which run(*args) refuses."""
    with pytest.raises(SystemExit) as refused:
        run(*args)
    message = str(refused.value)
    assert "\n" not in message.strip() and message.startswith("error: ")
    return message


def script(name, *args, launcher=(), **options):
    """Run one of our scripts as a user does."""
    command = [sys.executable, *launcher, os.path.join(HERE, name), *args]
    environment = os.environ | options.pop("env", {})
    return subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env=environment, **options)


HOLD = "import prepare; lock = prepare.lock({path!r}, 'busy'); print(1, flush=True); input()"


@contextlib.contextmanager
def held_elsewhere(path):
    """Lock a file in another process, which is killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(path=path)], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": HERE})
    process.stdout.readline()
    yield
    process.kill()
    process.communicate()


def document(i):
    words = [f"word{i * j % 97}" for j in range(5 + i * 7 % 60)]
    return f"Document {i}: {' '.join(words)}\n\n  é ✓\n"


TEXTS = [document(i) for i in range(120)]


DRAW = checkpoint.Log.draw


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, with the documents TEXTS in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint.Log, "draw", lambda log: None)  # it takes half a test's time
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 640)
    os.makedirs("texts/deep")
    for i, text in enumerate(TEXTS):
        folder = "texts/deep" if i % 2 else "texts"
        with open(f"{folder}/{i:03d}.txt", "w", encoding="utf-8", newline="") as file:
            file.write(text)
    return tmp_path


DATA = ["--source=texts", "--dataset=d", "--tokenizer=bytes", "--block_size=32",
        "--val_fraction=0.2", "--workers=1"]


def configure(*args):
    return settings.load([*DATA, *args])


@pytest.fixture
def prepared(workplace):
    prepare.prepare(configure())
    return workplace


def read_split(split, folder="data/d"):
    """All tokens of a split, the one behind them, and the manifest.

    Reads without the project's code. A shard ends with a copy of the next one's first
    token.
    """
    with open(f"{folder}/manifest.json") as file:
        manifest = json.load(file)
    paths = sorted(glob.glob(f"{folder}/{split}_*.bin"))
    shards = [np.fromfile(path, np.uint16) for path in paths]
    for shard, following in zip(shards, shards[1:]):
        assert shard[-1] == following[0]
    sizes = [shard["tokens"] for shard in manifest["splits"][split]["shards"]]
    assert [len(shard) for shard in shards] == sizes
    tokens = np.concatenate([shard[:-1] for shard in shards])
    return tokens, int(shards[-1][-1]), manifest


SMALL = [*DATA, "--n_layer=2", "--n_head=2", "--n_embd=16", "--batch_size=2",
         "--gradient_accumulation_steps=2", "--warmup_iters=2", "--eval_tokens=128",
         "--device=cpu", "--dtype=float32", "--max_iters=12", "--eval_interval=4",
         "--log_interval=2", "--learning_rate=1e-2"]
PLAIN_DATA = ["--dataset=plain", "--meta_rate=0"]


# --------------------------------------------------------------------------------------
# model.py: against the formulas with dense masks

def complex_turn(x, turn):
    """Multiply the pairs (x[i], x[i + hs/2]), read as complex numbers, by turn."""
    real, imaginary = x.chunk(2, -1)
    turned = torch.complex(real, imaginary) * turn
    return torch.cat((turned.real, turned.imag), -1)


def dense_attention(x, layer, n_head, allowed, angles, scale):
    """softmax(QK^T/sqrt(d) + mask) V with an explicit (B, T, T) mask.

    The rotations are complex. Rows that see nothing are 0.
    """
    B, T, C = x.shape
    qkv = F.linear(x, layer.c_attn.weight, layer.c_attn.bias)    # (B, T, 3C)
    qkv = qkv.view(B, T, 3, n_head, C // n_head)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)                         # (B, nh, T, hs) each
    if angles is not None:
        turn = torch.polar(torch.full_like(angles, scale), angles)
        turn = turn[:, None]                                     # (B, 1, T, hs/2)
        q = complex_turn(q, turn)
        k = complex_turn(k, turn)
    scores = q @ k.transpose(-1, -2) / math.sqrt(C // n_head)    # (B, nh, T, T)
    scores = scores.masked_fill(~allowed[:, None], -math.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    out = (weights @ v).transpose(1, 2).reshape(B, T, C)
    out = F.linear(out, layer.c_proj.weight, layer.c_proj.bias)
    return out * allowed.any(-1, keepdim=True)


def dense_mlp(x, mlp):
    hidden = F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)
    inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
    hidden = 0.5 * hidden * (1 + torch.tanh(inner))
    return F.linear(hidden, mlp.c_proj.weight, mlp.c_proj.bias)


def dense_gpt(model, idx, turn_meta=True):
    """The paper's model as its equations say, position by position: (B, T, V)."""
    c, w = model.config, model.transformer
    B, T = idx.shape
    is_meta = torch.zeros_like(idx, dtype=torch.bool)
    if c.meta_id is not None:
        is_meta = idx == c.meta_id
    at_meta = is_meta[..., None]                                      # (B, T, 1)
    causal = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
    among_meta = causal & is_meta[:, :, None] & is_meta[:, None, :]   # (B, T, T)

    x = w.wte.weight[idx]                                             # (B, T, C)
    if c.zero_meta_embd:
        x = x.masked_fill(at_meta, 0)
    if c.pos == "absolute":
        position = w.wpe.weight[:T].expand(B, T, -1)
        if c.zero_meta_pos:
            position = position.masked_fill(at_meta, 0)
        x = x + position
    angles, scale = None, 1.0
    if c.pos == "rope":
        inv_freq, scale = rope_frequencies(c)
        angles = torch.arange(T)[:, None] * inv_freq
        angles = angles.double().expand(B, T, -1)                     # (B, T, hs/2)
        if c.zero_meta_pos:
            angles = angles.masked_fill(at_meta, 0)
    meta_angles = angles if turn_meta else 0 * angles

    def norm(x, ln):
        return F.layer_norm(x, (c.n_embd,), ln.weight, ln.bias)

    for block in w.h:
        x = x + dense_attention(norm(x, block.ln_1), block.attn, c.n_head, causal, angles, scale)
        if c.meta_attention:
            x = x + dense_attention(norm(x, block.ln_meta), block.meta_attn, c.n_head,
                                    among_meta, meta_angles, scale)
        x = x + dense_mlp(norm(x, block.ln_2), block.mlp)
    return norm(x, w.ln_f) @ w.wte.weight.T


def described(changes):
    return ",".join(f"{name}={value}" for name, value in changes.items()) or "rope"


@pytest.mark.parametrize("counts", [(3, 3), (0, 5, 1), (0, 0), (24, 2)],
                         ids=["equal", "ragged", "none", "all"])
@pytest.mark.parametrize("changes", [
    {},
    {"bias": True},
    {"pos": "none"},
    {"pos": "absolute"},
    {"yarn_scale": 4.0, "original_block_size": 16},
    {"zero_meta_pos": True},
    {"pos": "absolute", "zero_meta_pos": True},
    {"zero_meta_embd": True},
    {"meta_attention": False},
], ids=described)
def test_the_model_equals_dense_masks_in_values_and_gradients(counts, changes):
    model, idx = build(**changes), text_with_meta(counts)
    targets = torch.randint(0, META, idx.shape)
    dense_logits = dense_gpt(model, idx)
    dense_loss = F.cross_entropy(dense_logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(idx)[0], dense_logits, rtol=1e-6, atol=1e-6)
    for n_meta in (None, max(counts), max(counts) + 3):
        loss = model(idx, targets, n_meta=n_meta)[1]
        torch.testing.assert_close(loss, dense_loss, rtol=1e-6, atol=1e-6)

    names, parameters = zip(*model.named_parameters())
    ours = torch.autograd.grad(loss, parameters, materialize_grads=True)
    dense = torch.autograd.grad(dense_loss, parameters, materialize_grads=True)
    for name, a, b in zip(names, ours, dense):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
def test_the_chunked_loss_equals_cross_entropy_in_value_and_gradients(monkeypatch, chunk):
    monkeypatch.setattr("model.LOGITS_AT_ONCE", chunk)
    x = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(-1, 11, (23,))

    loss = LinearCrossEntropy.apply(x, weight, targets, True)
    expected = F.cross_entropy(x @ weight.t(), targets, ignore_index=-1)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(3 * loss, (x, weight))
    expected_gradients = torch.autograd.grad(3 * expected, (x, weight))
    torch.testing.assert_close(gradients, expected_gradients)

    with torch.autocast("cpu", torch.bfloat16):
        loss = LinearCrossEntropy.apply(x.float(), weight.float(), targets, True)
        logits = F.linear(x.float(), weight.float()).float()
        expected = F.cross_entropy(logits, targets, ignore_index=-1)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected)
        [gradient] = torch.autograd.grad(loss, x)
        [expected_gradient] = torch.autograd.grad(expected, x)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0.03, atol=2e-3)


def test_no_token_sees_a_later_one():
    model, idx = build(), text_with_meta((4, 7))
    before = model(idx)[0]
    for t in (5, 12, 23):
        for token in (1, META):
            changed = idx.clone()
            changed[:, t] = token
            after = model(changed)[0]
            torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-10, atol=1e-10)


def test_text_tokens_get_exactly_nothing_from_meta_attention():
    model, idx = build(bias=True, pos="none"), text_with_meta((4, 0, 9))
    block, is_meta = model.transformer.h[0], idx == META
    with torch.no_grad():
        for p in block.mlp.c_proj.parameters():
            p.zero_()
    meta = MetaTokens(is_meta, 9)
    meta.rope = None
    x = torch.randn(3, 24, 16, dtype=torch.float64)
    without, with_meta = block(x, None), block(x, None, meta)
    assert torch.equal(without[~is_meta], with_meta[~is_meta])
    assert not torch.isclose(without[is_meta], with_meta[is_meta]).all(-1).any()


def test_meta_tokens_are_gathered_in_their_order_and_added_back_in_place():
    idx = text_with_meta((4, 0, 9))
    x, rows = torch.randn(3, 24, 5), torch.randn(3, 10, 5)
    meta = MetaTokens(idx == META, 10)
    gathered, added, expected = meta.gather(x), meta.add(x, rows), x.clone()
    for row, count in enumerate((4, 0, 9)):
        places = (idx[row] == META).nonzero().flatten()
        assert torch.equal(gathered[row, :count], x[row, places])
        assert meta.is_real[row].tolist() == [True] * count + [False] * (10 - count)
        expected[row, places] += rows[row, :count]
    assert torch.equal(added, expected)


def test_rope_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        turned_q = rotate(q, rope_tables(TINY, torch.tensor([[i]])))
        turned_k = rotate(k, rope_tables(TINY, torch.tensor([[j]])))
        return (turned_q * turned_k).sum()

    for distance in (0, 1, 7, 40):
        near, far = score(distance, 0), score(900 + distance, 900)
        torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert not torch.isclose(score(3, 0), score(4, 0), rtol=1e-3)


def test_yarn_reaches_its_known_limits():
    config = GPTConfig(n_embd=768, n_head=12, block_size=1024)
    plain, scale = rope_frequencies(config)
    assert plain.dtype == torch.float32 and scale == 1.0
    torch.testing.assert_close(plain, torch.tensor([10000 ** (-2 * i / 64) for i in range(32)]))
    same, scale = rope_frequencies(replace(config, yarn_scale=1.0))
    assert torch.equal(same, plain) and scale == 1.0
    for s in (4.0, 8.0):
        longer = replace(config, block_size=int(1024 * s), yarn_scale=s)
        extended, scale = rope_frequencies(longer)
        assert scale == pytest.approx(0.1 * math.log(s) + 1)
        assert torch.equal(extended[:6], plain[:6])                # the ramp is 0 up to index 5
        torch.testing.assert_close(extended[18:], plain[18:] / s)  # and 1 from index 18 on
        between = (plain / extended)[6:18]
        assert (between > 1).all() and (between < s).all() and (between.diff() > 0).all()
    turns = 1024 * plain / (2 * math.pi)
    assert (turns[:6] > 32).all() and (turns[18:] < 1).all()


def test_yarn_extends_the_last_window_without_it():
    first = GPTConfig(n_embd=16, n_head=2, block_size=256)
    grown = replace(first, block_size=1024)               # and trained on, without YaRN
    extended = replace(grown, block_size=4096, yarn_scale=4.0)
    assert extended.original_block_size == 1024
    assert replace(extended, block_size=8192, yarn_scale=8.0).original_block_size == 1024


def test_zeroing_the_meta_embedding_leaves_its_output_row_alone():
    model, idx = build(zero_meta_embd=True), text_with_meta((4, 2))
    before = model(idx)[0]
    with torch.no_grad():
        model.transformer.wte.weight[META] += 1
    after = model(idx)[0]
    others = torch.arange(64) != META
    assert torch.equal(before[..., others], after[..., others])
    assert not torch.isclose(before[:, 1:, META], after[:, 1:, META]).any()


@pytest.mark.parametrize("switch", ["zero_meta_pos", "zero_meta_embd"])
@pytest.mark.parametrize("pos", ["rope", "absolute"])
def test_zeroing_acts_at_meta_tokens_only(pos, switch):
    model, zeroed = build(pos=pos), build(pos=pos, **{switch: True})
    without, idx = text_with_meta((0, 0)), text_with_meta((1, 1))
    assert torch.equal(model(without)[0], zeroed(without)[0])
    for row, a, b in zip(idx, model(idx)[0], zeroed(idx)[0]):
        first = int((row == META).nonzero()[0])
        assert torch.equal(a[:first], b[:first])
        if first > 0:  # at position 0 RoPE turns nothing anyway
            assert not torch.isclose(a[first], b[first]).all()


def test_the_loss_ignores_targets_that_are_meta_tokens_or_minus_one():
    model, idx = build(), text_with_meta((5, 2))
    targets = text_with_meta((6, 3), seed=1)
    targets[0, :4] = -1
    counted = (targets != META) & (targets != -1)
    log_p = model(idx)[0].log_softmax(-1)
    total = 0
    for b, t in counted.nonzero():
        total -= log_p[b, t, targets[b, t]]
    torch.testing.assert_close(model(idx, targets)[1], total / counted.sum())


def test_predictions_at_some_positions_equal_those_made_at_all_positions():
    model, idx, targets = build(), text_with_meta((5, 2)), text_with_meta((6, 3), seed=1)
    at, rows = torch.tensor([[7, 0, 3], [9, 4, 1]]), torch.arange(2)[:, None]
    x = model.hidden_states(idx)[rows, at]
    torch.testing.assert_close(model.lm_head(x), model(idx)[0][rows, at])
    others_ignored = torch.full_like(targets, -1)
    others_ignored[rows, at] = targets[rows, at]
    loss = model.loss(x, targets[rows, at])
    torch.testing.assert_close(loss, model(idx, others_ignored)[1])


def test_parameter_counts_are_those_of_the_paper():
    def millions(**changes):
        with torch.device("meta"):
            return GPT(GPTConfig(**changes)).num_params() / 1e6

    plain = millions(meta_id=None, meta_attention=False, pos="absolute")
    assert millions() == pytest.approx(151.9, abs=0.05)
    assert plain == pytest.approx(123.6, abs=0.05)
    assert abs(millions() - millions(meta_attention=False, n_layer=16)) < 0.004


def test_flops_per_token_agree_with_the_counter_of_torch():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(block_size=256, vocab_size=512, n_layer=3, n_head=4, n_embd=128,
                       meta_id=500)
    model = GPT(config)
    idx = torch.randint(0, 500, (2, 256))
    idx[:, 10:36] = 500
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx, n_meta=26)[1].backward()
    counted = counter.get_total_flops() / idx.numel()
    assert counted == pytest.approx(model.flops_per_token(256, 26), rel=0.02)


def test_a_training_step_neither_breaks_the_graph_nor_waits_for_the_device():
    model = GPT(TINY)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for seed in range(4):
        idx = text_with_meta((3, 3), seed=seed)
        torch.testing.assert_close(compiled(idx, idx, n_meta=3)[1], model(idx, idx)[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    model.to("meta")  # where no value exists that the host could wait for
    idx = torch.zeros(2, 24, dtype=torch.long, device="meta")
    model(idx, idx, n_meta=3)[1].backward()
    with pytest.raises(RuntimeError):
        model(idx, idx)


def test_once_training_and_validation_have_run_nothing_is_compiled_again():
    model = GPT(TINY)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = model.configure_optimizer(1e-3)

    def train_and_validate(seed):
        for i in range(2):
            idx = text_with_meta((3, 3), seed=seed + i)
            compiled(idx, idx, n_meta=3)[1].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.eval()
        with torch.no_grad():
            compiled(idx, torch.full_like(idx, -1), n_meta=3)
        model.train()

    train_and_validate(0)
    idx = text_with_meta((3, 3))
    with torch._dynamo.config.patch(error_on_recompile=True):
        train_and_validate(10)
        with pytest.raises(torch._dynamo.exc.RecompileError):  # the check itself works
            compiled(idx, idx, n_meta=4)


def test_rotary_tables_are_float32_in_a_model_of_any_precision():
    model, tables = GPT(TINY).bfloat16(), []
    attention = model.transformer.h[0].attn
    attention.register_forward_pre_hook(lambda _, args: tables.append(args[1]))
    model(torch.zeros(1, 1000, dtype=torch.long))
    angles = torch.arange(1000)[:, None] * rope_frequencies(TINY)[0]
    [(cos, sin)] = tables
    assert torch.equal(cos, angles.cos()[None, None])
    assert torch.equal(sin, angles.sin()[None, None])


def test_the_optimizer_decays_matrices_only():
    model = GPT(replace(TINY, bias=True))
    groups = model.configure_optimizer(1e-3, weight_decay=0.1).param_groups
    for group in groups:
        for p in group["params"]:
            assert (p.dim() >= 2) == (group["weight_decay"] == 0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_tiny_model_learns_one_batch_by_heart():
    torch.manual_seed(0)
    model, idx = GPT(replace(TINY, n_embd=32)), text_with_meta((3, 3), T=33)
    optimizer = model.configure_optimizer(1e-2, weight_decay=0.0)
    for _ in range(150):
        loss = model(idx[:, :-1], idx[:, 1:], n_meta=3)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02


@pytest.mark.parametrize("changes, named", [
    ({"n_embd": 15}, "n_embd"),
    ({"n_embd": 6, "n_head": 2}, "n_embd"),
    ({"pos": "absolute", "yarn_scale": 2.0}, "pos"),
    ({"meta_id": None}, "meta_id"),
    ({"meta_id": 64}, "meta_id"),
    ({"pos": "spiral"}, "pos"),
])
def test_impossible_architectures_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        replace(TINY, **changes)


# --------------------------------------------------------------------------------------
# model.py: generation

@pytest.mark.parametrize("changes", [
    {},
    {"pos": "absolute"},
    {"pos": "none"},
    {"zero_meta_pos": True},
    {"meta_attention": False},
], ids=str)
@pytest.mark.parametrize("options", [
    {"temperature": 0},
    {"seed": 3, "top_k": 9},
    {"seed": 4, "top_p": 0.7, "temperature": 1.3},
], ids=str)
def test_cached_generation_equals_uncached_past_the_window_too(changes, options):
    model = build(block_size=16, **changes)
    for counts, T in (((1, 4), 9), ((0, 3), 25), ((0,), 1)):
        prompt = text_with_meta(counts, T)
        cached = model.generate(prompt, 40, meta_rate=0.2, use_cache=True, **options)
        uncached = model.generate(prompt, 40, meta_rate=0.2, use_cache=False, **options)
        assert torch.equal(cached, uncached)
        assert torch.equal(cached[:, :T], prompt)
        assert ((cached[:, T:] != META).sum(1) == 40).all()


def test_a_step_of_generation_is_one_graph_that_is_the_same_every_time(monkeypatch):
    """What a CUDA graph needs, seen by a compiler that refuses to leave the graph."""
    eager = sample.CachedDecoder.compute
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True, dynamic=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def compute(self, new, n_meta):
        new = new.clone(memory_format=torch.contiguous_format)
        for cache in self.caches:
            cache.fixed_shapes = True           # as on a GPU
        if n_meta is not None and new.size(1) <= 2:  # a step, not a prompt
            return compiled(self, new, n_meta)
        return eager(self, new, n_meta)

    model, prompt = build(block_size=16, n_layer=1), text_with_meta((1, 4), 20)
    expected = model.generate(prompt, 60, meta_rate=0.25, seed=1)  # past the window
    monkeypatch.setattr(sample.CachedDecoder, "compute", compute)
    assert torch.equal(model.generate(prompt, 60, meta_rate=0.25, seed=1), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one token, and two


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_step_equals_the_eager_one(monkeypatch):
    model = build(block_size=16).cuda()
    for counts, T in (((1, 4), 9), ((0,), 1)):
        prompt = text_with_meta(counts, T).cuda()
        captured = model.generate(prompt, 60, meta_rate=0.25, seed=1)
        uncached = model.generate(prompt, 60, meta_rate=0.25, seed=1, use_cache=False)
        assert torch.equal(captured, uncached)


def test_generation_samples_text_only_and_feeds_meta_tokens_on_schedule():
    model = build(block_size=20)
    with torch.no_grad():
        model.transformer.wte.weight[META:] *= 50  # what must not be sampled would be
    start = torch.zeros(3, 1, dtype=torch.long)
    tokens = model.generate(start, 200, meta_rate=0.15, seed=1)
    assert (tokens[:, 1:] <= META).all()
    is_meta = tokens == META
    assert (is_meta == is_meta[:1]).all()  # one schedule for the batch
    n_blocks = len(is_meta[0]) // 20
    blocks = is_meta[0, :n_blocks * 20].view(n_blocks, 20)
    assert (blocks.sum(1) == 3).all() and not blocks[:, 0].any()
    assert len(blocks.unique(dim=0)) > 1
    again = model.generate(start, 200, meta_rate=0.15, seed=1)
    assert torch.equal(tokens, again)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.full((1, 64), -20.0)
    logits[0, :4] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(**options):
        return {int(sample.sample(logits, 1.0, generator=generator, **options)) for _ in range(200)}

    assert drawn(top_k=2, top_p=None) == {0, 1}
    assert drawn(top_k=None, top_p=0.79) == {0, 1}
    assert drawn(top_k=None, top_p=0.81) == {0, 1, 2}


def test_tokens_are_drawn_with_their_probabilities():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = sample.sample(logits, 1.0, None, None, generator)
    counts = torch.bincount(drawn.flatten(), minlength=4)
    expected = 20_000 * probs
    chi_square = ((counts - expected)**2 / expected).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


def test_a_temperature_next_to_nothing_takes_the_likeliest_token():
    logits, generator = torch.randn(50, 30), torch.Generator().manual_seed(0)
    for temperature in (0, 1e-40, 1e-9, 1e-5):
        drawn = sample.sample(logits, temperature, 200, 0.9, generator)
        assert torch.equal(drawn.flatten(), logits.argmax(1))


# --------------------------------------------------------------------------------------
# checkpoint.py: GPT-2's own weights

def hugging_face_folder(folder, vocab=50257):
    """A tiny GPT-2 of random weights in Hugging Face's format, as it was until 2023."""
    C, L = 12, 2
    torch.manual_seed(0)
    shapes = {"wte.weight": (vocab, C), "wpe.weight": (16, C),
              "ln_f.weight": (C,), "ln_f.bias": (C,)}
    block_shapes = {
        "ln_1.weight": (C,), "ln_1.bias": (C,),
        "attn.c_attn.weight": (C, 3 * C), "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,), "ln_2.bias": (C,),
        "mlp.c_fc.weight": (C, 4 * C), "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (4 * C, C), "mlp.c_proj.bias": (C,),
    }
    for i in range(L):
        for name, shape in block_shapes.items():
            shapes[f"h.{i}.{name}"] = shape
    weights = {name: torch.randn(shape) * 0.4 for name, shape in shapes.items()}
    causal_mask = torch.ones(1, 1, 16, 16).tril()
    weights["h.0.attn.bias"] = causal_mask  # as old files carry it
    torch.save(weights, folder / "pytorch_model.bin")
    write_config(folder, vocab_size=vocab, layer_norm_epsilon=1e-5)
    return weights


def write_config(folder, **changes):
    config = {"model_type": "gpt2", "n_layer": 2, "n_head": 3, "n_embd": 12, "n_positions": 16}
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_pretrained_gpt2_computes_what_its_weights_say(tmp_path):
    w = hugging_face_folder(tmp_path)
    idx = torch.randint(0, 50, (2, 10))
    causal = torch.ones(10, 10).tril().bool()

    def norm(x, name):
        variance = x.var(-1, keepdim=True, unbiased=False)
        x = (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv1d(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def heads(x):
        return x.view(2, 10, 3, 4).transpose(1, 2)  # (B, nh, T, hs)

    x = w["wte.weight"][idx] + w["wpe.weight"][:10]
    for i in range(2):
        q, k, v = conv1d(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(12, -1)
        scores = heads(q) @ heads(k).transpose(-1, -2) / 2
        weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
        out = (weights @ heads(v)).transpose(1, 2).reshape(2, 10, 12)
        x = x + conv1d(out, f"h.{i}.attn.c_proj")
        hidden = conv1d(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        x = x + conv1d(F.gelu(hidden, approximate="tanh"), f"h.{i}.mlp.c_proj")
    expected = norm(x, "ln_f") @ w["wte.weight"].T
    logits = checkpoint.load_gpt2(str(tmp_path))(idx)[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_adding_meta_tokens_leaves_the_logits_of_text_as_they_were(tmp_path):
    hugging_face_folder(tmp_path)
    plain, idx = checkpoint.load_gpt2(str(tmp_path)), torch.randint(0, 50257, (2, 10))
    model = plain.with_meta_tokens(50257)
    assert model.config.vocab_size == 50304 and model.config.text_vocab_size == 50257
    assert torch.equal(model(idx)[0][..., :50257], plain(idx)[0])
    mean = plain.transformer.wte.weight.mean(0)
    torch.testing.assert_close(model.transformer.wte.weight[50257:], mean.expand(47, -1))
    for block in model.transformer.h:
        assert not block.meta_attn.c_proj.weight.any()
        assert not block.meta_attn.c_proj.bias.any()
        assert block.meta_attn.c_attn.weight.any()
    idx[:, 4] = 50257
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    for block in model.transformer.h:
        assert block.meta_attn.c_proj.weight.grad.any()


def save_as_today(folder, weights, shards=1):
    """What save_pretrained writes: model.safetensors, or shards and their index."""
    names = sorted(name for name in weights if name != "h.0.attn.bias")
    files = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        own = {f"transformer.{name}": weights[name] for name in names[i::shards]}
        safetensors.torch.save_file(own, folder / file)
        files |= dict.fromkeys(own, file)
    if shards > 1:
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_gpt2_in_safetensors_is_loaded_even_beside_an_older_file(tmp_path, shards):
    weights = hugging_face_folder(tmp_path)
    expected = checkpoint.load_gpt2(str(tmp_path)).state_dict()
    save_as_today(tmp_path, weights, shards)
    for older_file in (b"never read", None):
        if older_file is None:
            os.remove(tmp_path / "pytorch_model.bin")
        else:
            write_bytes(tmp_path / "pytorch_model.bin", older_file)
        model, saved = checkpoint.load_trained(str(tmp_path), {})
        assert saved["settings"]["tokenizer"] == "gpt2"
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, expected[name])


def test_what_gpt2s_config_leaves_out_is_as_in_the_smallest_gpt2(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = checkpoint.gpt2_config(str(tmp_path / "config.json"))
    assert (config.n_layer, config.n_head, config.n_embd) == (12, 12, 768)
    assert (config.block_size, config.vocab_size) == (1024, 50257)
    (tmp_path / "config.json").write_text('\ufeff{"n_ctx": 16}')  # its old name, after a mark
    assert checkpoint.gpt2_config(str(tmp_path / "config.json")).block_size == 16


@pytest.mark.parametrize("change", [
    {"model_type": "llama"}, {"vocab_size": 50258}, {"activation_function": "relu"},
    {"layer_norm_epsilon": 1e-6}, {"scale_attn_weights": False}, {"n_inner": 40},
    {"scale_attn_by_inverse_layer_idx": True}, {"add_cross_attention": True},
    {"tie_word_embeddings": False}, {"quantization_config": {}}, {"n_head": "3"},
    {"n_layer": 0}, {"n_embd": None}, {"n_positions": [16]}])
def test_a_gpt2_that_model_py_does_not_compute_is_refused_by_name(tmp_path, change):
    hugging_face_folder(tmp_path)
    write_config(tmp_path, n_inner=48, activation_function="gelu_pytorch_tanh")
    checkpoint.load_gpt2(str(tmp_path))
    write_config(tmp_path, **change)
    (key, value), = change.items()
    with pytest.raises(ValueError, match=re.escape(f"config.json: {key} is {value!r}, ")):
        checkpoint.load_gpt2(str(tmp_path))


def test_bad_files_of_a_gpt2_are_refused_in_one_line(tmp_path):
    def refused():
        with pytest.raises(ValueError) as error:
            checkpoint.load_gpt2(str(tmp_path))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "config.json as JSON: [Errno 2]" in refused()
    for text, expected in (("{", "config.json as JSON"), ("[1]", "json is not a dictionary")):
        (tmp_path / "config.json").write_text(text)
        assert expected in refused()
    write_config(tmp_path)
    assert "holds neither model.safetensors nor pytorch_model.bin" in refused()
    weights = hugging_face_folder(tmp_path)
    weights["lm_head.weight"] = torch.zeros(50257, 12)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert "lm_head.weight is not tied to the embedding" in refused()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"transformer.wte.weight": "../x.safetensors"}}')
    assert "names ../x.safetensors, which is no file beside it" in refused()
    index.write_text('{"weight_map": {"transformer.wte.weight": "x.safetensors"}}')
    assert "cannot read" in refused() and "x.safetensors: No such file" in refused()
    (tmp_path / "model.safetensors").write_text("hello")
    assert "model.safetensors is truncated or damaged" in refused()


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_gpt2s_of_compiled_and_distributed_models_are_loaded(tmp_path, prefix):
    weights = hugging_face_folder(tmp_path)
    expected = checkpoint.load_gpt2(str(tmp_path)).state_dict()
    wrapped = {f"{prefix}transformer.{name}": weight for name, weight in weights.items()}
    torch.save(wrapped, tmp_path / "pytorch_model.bin")
    found = checkpoint.load_gpt2(str(tmp_path)).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_names_that_may_be_on_the_hub_are_looked_up_there(tmp_path, monkeypatch):
    import huggingface_hub
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    save_as_today(tmp_path, hugging_face_folder(tmp_path))
    for name, repository in (("gpt2-medium", "openai-community/gpt2-medium"),
                             ("distilgpt2", "distilbert/distilgpt2"), ("me/my.gpt2", "me/my.gpt2")):
        checkpoint.load_trained(name, {})
        # config.json first: a model of another kind is refused before its weights come
        assert asked == [(repository, "config.json"), (repository, "model*.safetensors*")]
        asked.clear()
    os.remove("model.safetensors")
    checkpoint.load_trained("gpt2", {})
    assert asked[-1] == ("openai-community/gpt2", "pytorch_model*.bin*")
    asked.clear()
    os.makedirs("out/run1")
    for name in ("out/run1", "none", "out/run1.pt", "./none", "out/a/b"):
        with pytest.raises(ValueError, match="no checkpoint"):
            checkpoint.load_trained(name, {})
    assert not asked


@pytest.mark.parametrize("name, repository", [
    ("gpt2", "openai-community/gpt2"), ("out/run1", "out/run1")])
def test_what_is_neither_here_nor_on_the_hub_is_refused_for_both(workplace, monkeypatch, name,
                                                                  repository):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = refused_sample(f"--init_from={name}")
    assert (f"no checkpoint or folder {name}, and no {repository} from the Hugging Face hub "
            "(ConnectionError: offline): check the name, go online, or name") in message


# --------------------------------------------------------------------------------------
# config: settings and the parser

CONFIGS = [path for path in sorted(glob.glob(f"{HERE}/config/*.py")) if "__init__" not in path]
WORLDS = {"study": (1,), "study_gpu": (1,), "quickstart": (1, 2), "meta_gpt2_h100": (1, 2)}


def millions_in_readme(name):
    """The number of parameters that README's table of configs states, as text."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        readme = file.read()
    return re.search(rf"^\| `{name}` \|.*\| ([\d.]+)M \|$", readme, re.M)[1]


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_describes_a_run_of_the_size_that_readme_says(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings.load([path])
    name = os.path.basename(path).removesuffix(".py")
    for world in WORLDS.get(name, (1, 2, 8)):
        train.check_start(config, world)
    if config.init_from == "scratch":
        text_vocab_size = 257 if config.tokenizer == "bytes" else 50257
        with torch.device("meta"):
            model = GPT(train.new_model_config(config, text_vocab_size))
        same_size = "meta_gpt2" if name == "meta_gpt2_h100" else name
        assert f"{model.num_params() / 1e6:.1f}" == millions_in_readme(same_size)


def test_the_defaults_are_the_run_of_the_paper():
    defaults, paper = settings.load([]), settings.load([f"{HERE}/config/meta_gpt2.py"])
    differing = {name for name, value in vars(defaults).items() if getattr(paper, name) != value}
    assert differing == {"out_dir", "max_tokens", "origin"}
    assert train.new_model_config(defaults, 50257) == GPTConfig()


def help_of(run, *args):
    """{setting: meaning} as `run --help` prints them, and all that it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as end:
        run([*args, "--help"])
    assert end.value.code == 0
    lines = re.findall(r"^  --(\w+)=\S*  +(.+)$", output.getvalue(), re.M)
    assert len(lines) == len(dict(lines))
    return dict(lines), output.getvalue()


def names_of(*groups):
    return [declared.name for group in groups for declared in fields(group)]


def test_help_lists_every_setting_with_its_meaning():
    meanings, _ = help_of(settings.load)
    assert list(meanings) == names_of(*settings.ALL_GROUPS)
    assert set(meanings) == set(settings.SETTINGS)
    assert all(len(meaning) > 5 for meaning in meanings.values())


def test_the_help_of_train_lists_its_groups_in_at_most_45_settings():
    groups = (settings.Training, settings.Model, settings.Data, settings.Machine)
    meanings, text = help_of(train.main)
    assert list(meanings) == names_of(*groups) and len(meanings) <= 45
    assert text.startswith(train.__doc__.strip())
    assert all(f"\n{group.__name__}\n" in text for group in groups)


@pytest.mark.parametrize("module, expected", [
    (sample, [*names_of(settings.Sampling), "init_from", "out_dir", "block_size", "yarn_scale",
              "meta_rate", "meta_placement", "zero_meta_pos", "zero_meta_embd", "seed", "device",
              "dtype"]),
    (prepare, [*names_of(settings.Data), "block_size", *names_of(settings.Preparation),
               "overwrite", "seed"]),
    (bench, ["what", "block_size", "n_layer", "n_head", "n_embd", "batch_size",
             *names_of(settings.Benchmark, settings.Machine)]),
], ids=["sample", "prepare", "bench"])
def test_the_help_of_a_script_lists_its_own_settings_only(module, expected):
    meanings, text = help_of(module.main)
    assert text.startswith(module.__doc__.strip())
    assert list(meanings) == expected


def test_help_lists_groups_and_single_settings_in_the_order_asked_for():
    meanings, text = help_of(lambda argv: settings.load(argv, (settings.Machine, "seed"), "Usage."))
    assert list(meanings) == ["device", "dtype", "compile", "seed"]
    assert text.startswith("Usage.\n\nMachine\n  --device=auto ")


def test_a_setting_of_another_script_is_accepted():
    assert settings.load(["--gpu", "--seed=3"], (settings.Machine,)).gpu


def test_values_are_read_as_the_types_of_their_settings(tmp_path):
    (tmp_path / "c.py").write_text(
        '"""A config."""\nn_layer = 3 * 2\nlearning_rate = 1  # an int\nmax_tokens = 1e9\n'
        "n_head = 2\nmax_iters = 2**4 // 3 - 1\nwarmup_iters = 6 / 3\n"
        "seed = 1234567890123456789\ncompile = True\n")
    config = settings.load([str(tmp_path / "c.py"), "--n_head=4", "--overwrite", "--bias=true",
                            "--eval_only=0", "--batch_size=1e3", "--start=a=b"])
    assert (config.n_layer, config.learning_rate, config.max_tokens) == (6, 1.0, 1_000_000_000)
    assert (config.max_iters, config.warmup_iters, config.n_head) == (4, 2, 4)
    assert type(config.max_tokens) is type(config.warmup_iters) is int
    assert type(config.learning_rate) is float and config.seed == 1234567890123456789
    assert (config.overwrite, config.bias, config.eval_only) == (True, True, False)
    assert (config.compile, config.batch_size, config.start) == ("true", 1000, "a=b")
    for argument in ("--compile", "--compile=TRUE"):
        assert settings.load([argument]).compile == "true"
    assert config.origin["n_layer"].endswith("c.py:2") and config.origin["n_head"] == "command line"


def test_a_config_knows_what_was_given_and_what_was_typed(tmp_path):
    (tmp_path / "c.py").write_text("n_layer = 6\nn_head = 2\n")
    config = settings.load([str(tmp_path / "c.py"), "--n_head=4"])
    assert config.given("n_layer") and config.given("n_head") and not config.given("n_embd")
    assert config.typed("n_head") and not config.typed("n_layer")
    assert config.given_values(["n_layer", "n_embd"]) == {"n_layer": 6}
    config.remember({"n_layer": 9, "n_embd": 99, "seed": 5}, ["n_layer", "n_embd", "dropout"])
    assert (config.n_layer, config.n_embd, config.seed) == (6, 99, 1337)
    assert str(config.error("n_layer=6 is too deep for dropout=0.0: add --n_embd=")) == (
        "error: n_layer=6 is too deep for dropout=0.0: add --n_embd= "
        f"(n_layer: {tmp_path}/c.py:1, dropout: default)")
    assert config.checked(max, 1, 2) == 2
    assert refusal(config.checked, int, "x").startswith("error: invalid literal")


@pytest.mark.parametrize("args, expected", [
    (["--blok_size=3"], "command line: unknown setting 'blok_size' (did you mean block_size?)"),
    (["--n_layer=many"], "command line: n_layer=many: expected a whole number"),
    (["--n_layer=2.5"], "expected a whole number"),
    (["--bias=7"], "expected True or False"),
    (["--learning_rate=nan"], "learning_rate=nan: expected a number"),
    (["--learning_rate"], "expected a number (write --learning_rate=...)"),
    (["--start"], "expected text (write --start=...)"),
    (["--task_lr=1e-3,2e-3"], "task_lr=1e-3,2e-3: expected a number"),
    (["--compile=perhaps"], "compile=perhaps: expected one of auto, true, false"),
    (["--pos=sinus"], "pos=sinus: expected one of rope, absolute, none"),
    (["--marker=meta,blue"], "marker=meta,blue: expected one of meta, fresh, text, none"),
    (["--batch_size=0"], "batch_size=0 must be positive"),
    (["--top_k=-1"], "top_k=-1 must be at least 0"),
    (["--top_p=0"], "top_p=0.0 must be above 0 and at most 1"),
    (["--meta_rate=1.5"], "meta_rate=1.5 must be"),
    (["--beta1=1"], "beta1=1.0 must be at least 0 and below 1"),
    (["--beta2=-1"], "beta2=-1.0 must be at least 0 and below 1"),
    (["--yarn_scale=0.5"], "yarn_scale=0.5 must be at least 1"),
    (["--yarn_scale=inf"], "yarn_scale=inf: expected a number"),
    (["--seed=1e30"], "seed=1e30: expected a whole number below 2^63"),
    (["--eval_iters=200"], "unknown setting 'eval_iters' (did you mean eval_tokens?)"),
    (["--meta_rate=0.001", "--block_size=64"], "meta_rate=0.001 leaves no meta-token"),
    (["missing.py"], "no config file 'missing.py'"),
    (["bad_syntax.py"], "bad_syntax.py:2: "),
    (["bad_line.py"], "bad_line.py:1: a config file holds assignments only"),
    (["bad_target.py"], "bad_target.py:1: a config file holds assignments only"),
    (["bad_call.py"], "bad_call.py:1: "),
    (["bad_key.py"], "bad_key.py:2: unknown setting 'n_layers' (did you mean n_layer?)"),
    (["bad_type.py"], "bad_type.py:1: n_head=a dozen: expected a whole number"),
])
def test_bad_settings_are_refused_in_one_line(tmp_path, monkeypatch, args, expected):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "bad_syntax": "n_layer = 1\nn_head = (", "bad_line": "import os",
        "bad_target": "n_layer = n_head = 2", "bad_call": "n_layer = open('x')",
        "bad_key": "n_head = 2\nn_layers = 3", "bad_type": "n_head = 'a dozen'",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert expected in refusal(settings.load, args)


@pytest.mark.parametrize("text, expected", [
    ("seed = 9**9**9", "c.py:1: seed: write a plain value, or arithmetic"),
    ("seed = 10**20 * 10**20", "c.py:1: seed: write a plain value, or arithmetic"),
    ("seed = 2 / 0", "c.py:1: seed: write a plain value, or arithmetic"),
    ("seed = (-8)**0.5", "c.py:1: seed="),
    ("start = 'a' * 10**10", "c.py:1: start: write a plain value, or arithmetic"),
    ("start = ['a'] * 10**10", "c.py:1: start: write a plain value, or arithmetic"),
    ("seed = " + "1 + " * 50_000 + "1", "c.py"),
    ("seed = " + "(" * 50_000, "c.py"),
    ("seed = " + "9" * 10_000, "c.py"),
    ("seed = 1\0", "c.py"),
    ("# " + "a" * 1_000_000, "c.py: a config file has at most 1,000,000 characters"),
], ids=range(11))
def test_a_config_file_that_asks_for_too_much_is_refused(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(text)
    start = time.perf_counter()
    assert expected in refusal(settings.load, ["c.py"])
    assert time.perf_counter() - start < 2


AT_TORCH = """
import os, sys
class AtTorch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, AtTorch())
"""


@pytest.mark.parametrize("name", ["train", "eval_synthetic", "sample", "analyze", "bench"])
def test_openmp_is_told_how_long_to_spin_before_torch_is_imported(name):
    """OpenMP reads the variable then: every script must import config before torch."""
    environment = os.environ | {"PYTHONPATH": HERE}
    environment.pop("GOMP_SPINCOUNT", None)
    result = subprocess.run([sys.executable, "-c", f"{AT_TORCH}import {name}"],
                            env=environment, capture_output=True, text=True)
    assert result.stdout == "5000\n"


# --------------------------------------------------------------------------------------
# prepare.py

def test_every_block_has_its_meta_tokens_at_distinct_places_behind_the_first():
    for seed in range(5):
        for T, rate in ((8, 0.1), (10, 0.9), (256, 0.1), (1024, 0.05), (1024, 0.2)):
            M = prepare.meta_per_block(rate, T)
            for placement in ("random", "periodic"):
                places = prepare.meta_places(50, T, M, np.random.default_rng(seed), placement)
                assert places.shape == (50, T)
                assert (places.sum(1) == M).all()
                assert not places[:, 0].any()
            gaps = np.diff(np.flatnonzero(places[0]))
            assert M < 2 or gaps.max() - gaps.min() <= 1  # periodic


def test_every_set_of_places_is_equally_likely():
    places = prepare.meta_places(60_000, 6, 2, np.random.default_rng(0))
    sets, counts = np.unique(places, axis=0, return_counts=True)
    assert len(sets) == 10  # 5 choose 2
    chi_square = ((counts - 6000) ** 2 / 6000).sum()
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_injection_keeps_the_text_and_its_order():
    places = prepare.meta_places(7, 20, 3, np.random.default_rng(1))
    text = np.arange(7 * 17, dtype=np.uint16)
    tokens = prepare.inject(text, places, 999)
    assert ((tokens == 999) == places).all()
    assert (tokens[tokens != 999] == text).all()
    assert tokens.dtype == np.uint16


def test_a_character_with_a_meta_token_inside_is_decoded_whole():
    encoding = prepare.get_tokenizer("bytes")
    a, b = "é".encode()
    assert prepare.decode(encoding, [65, a, 257, b, 256]) == "Aé"
    shown = prepare.decode(encoding, [65, 257, 66, 257, 257, 256], show_meta=True)
    assert shown == "A<|meta|>B<|meta|><|meta|><|endoftext|>"


@pytest.mark.parametrize("rate", [0.1, 0.0])
@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_without_meta_tokens_the_files_are_the_documents(workplace, tokenizer, rate):
    utf8 = SimpleNamespace(encode_ordinary=lambda text: list(text.encode()), n_vocab=257,
                           eot_token=256)
    encoding = gpt2_bpe() if tokenizer == "gpt2" else utf8
    prepare.prepare(configure(f"--tokenizer={tokenizer}", f"--meta_rate={rate}"))
    found = {}
    for split in ("train", "val"):
        tokens, after, manifest = read_split(split)
        blocks = tokens.reshape(-1, 32)
        assert ((blocks == encoding.n_vocab).sum(1) == round(32 * rate)).all()
        found[split] = [*tokens[tokens != encoding.n_vocab].tolist(), after]
        assert manifest["splits"][split]["text_tokens"] == len(found[split]) - 1
        y = np.append(tokens, after)[1:].reshape(-1, 32)
        n_targets = (y != encoding.n_vocab).sum(1)
        assert (n_targets == 32 - round(32 * rate)).all()
    names = []
    for i, text in enumerate(TEXTS):
        names.append((f"deep/{i:03d}.txt" if i % 2 else f"{i:03d}.txt", text))
    for split in ("train", "val"):
        expected = []
        for name, text in sorted(names):
            if prepare.split_of(name, 0.2) == split:
                expected += [*encoding.encode_ordinary(text), encoding.eot_token]
        dropped = manifest["splits"][split]["dropped_text_tokens"]
        assert found[split] == expected[:len(expected) - dropped + 1] and 0 < dropped <= 32
    assert 0.1 < manifest["splits"]["val"]["tokens"] / manifest["splits"]["train"]["tokens"] < 0.5


def test_preparation_does_not_depend_on_the_number_of_workers(workplace, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARS", 500)
    for workers in (1, 3):
        prepare.prepare(configure(f"--workers={workers}", f"--dataset=w{workers}"))
    assert folder_bytes("data/w1") == folder_bytes("data/w3")


@pytest.mark.parametrize("limit", ["--max_tokens=0", "--max_tokens=9000"])
def test_preparation_killed_and_started_again_ends_with_the_same_bytes(workplace, limit):
    program = ("import sys, time, prepare, config\n"
               "prepare.SHARD_TOKENS, prepare.BATCH_CHARS, prepare.SAVE_SECONDS = 640, 300, 0\n"
               "slow = float(sys.argv.pop(1))\n"
               "add = prepare.SplitWriter.add\n"
               "prepare.SplitWriter.add = lambda self, text: (time.sleep(slow), add(self, text))\n"
               "prepare.prepare(config.load())\n")
    arguments = ["--source=texts", "--tokenizer=bytes", "--block_size=32",
                 "--val_fraction=0.2", "--workers=2", limit]

    def run(slow, dataset):
        command = [sys.executable, "-c", program, str(slow), *arguments, f"--dataset={dataset}"]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": HERE}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    whole = run(0, "whole")
    for pieces in (1, 30):
        process = run(0.02, "killed")
        while process.poll() is None:
            try:
                with open("data/killed/progress.json") as file:
                    if json.load(file)["pieces"] >= pieces:
                        break
            except (FileNotFoundError, ValueError):
                time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    last = run(0, "killed")
    output, _ = last.communicate()
    assert last.returncode == 0 and "resuming after" in output, output
    assert whole.wait() == 0
    assert folder_bytes("data/killed") == folder_bytes("data/whole")


def test_all_formats_hold_the_same_documents(workplace):
    from datasets import Dataset
    rows = [{"body": text, "n": i} for i, text in enumerate(TEXTS)]
    os.makedirs("jsonl")
    with open("jsonl/a.jsonl", "w") as file, gzip.open("jsonl/b.json.gz", "wt") as zipped:
        for row in rows[:60]:
            file.write(json.dumps(row) + "\n" * (1 + row["n"] % 2))  # a blank line is no row
        for row in rows[60:]:
            zipped.write(json.dumps(row) + "\n")
    os.makedirs("hub")
    Dataset.from_list(rows).to_parquet("rows.parquet")
    Dataset.from_list(rows).to_parquet("hub/train.parquet")
    for name in ("jsonl", "rows.parquet", "jsonl/*.jsonl,jsonl/*.gz"):
        for done in (0, 100):
            config = configure(f"--source={name}", "--text_field=body")
            *_, pieces = prepare.open_source(config, {"pieces": done}, {})
            assert [piece.text for piece in pieces] == TEXTS[done:]
    for done in (0, 110):  # read as a Hugging Face data set, streaming
        assert [row["body"] for row in prepare.hub_rows("hub", None, done)] == TEXTS[done:]


def test_a_data_set_of_the_hub_stays_at_the_revision_that_was_begun_with(
        workplace, monkeypatch, capsys):
    config, read = configure("--source=some/set"), []

    def rows(source, revision, skip):
        read.append(revision)
        yield from ({"text": text} for text in TEXTS)

    monkeypatch.setattr(prepare, "hub_rows", rows)
    monkeypatch.setattr(prepare, "newest_revision", lambda source: "first")
    prepare.prepare(config)
    monkeypatch.setattr(prepare, "newest_revision", lambda source: pytest.fail("asked again"))
    prepare.prepare(config)
    assert "is prepared already" in capsys.readouterr().out
    monkeypatch.setattr(prepare, "newest_revision", lambda source: "second")
    prepare.prepare(configure("--source=some/set", "--overwrite"))
    assert read == ["first", "second"]
    assert prepare.read_manifest(config)["source_version"] == "second"


def test_a_glob_names_documents_by_their_path_below_it(workplace):
    by_folder = prepare.find_files("texts")
    assert len({key for key, _ in by_folder}) == len(TEXTS)
    for source in ("texts/**/*.txt", "texts/*", "texts/[0-9]*.txt,texts/*/*.txt"):
        assert sorted(prepare.find_files(source)) == by_folder
    os.rename("texts", "texts [1]")
    assert prepare.find_files("texts [1]") == [(key, f"texts [1]/{key}") for key, _ in by_folder]


@pytest.mark.parametrize("text", [
    "".join(TEXTS) + "\n\n\n  x\ny\n \n\nz it's",
    "A line of words,\r\n\r\nand 3  more.\r\n" * 90,
    "one line " * 900,
], ids=["text", "CRLF", "line"])
def test_a_long_text_is_cut_where_bpe_cuts(workplace, text):
    with open("long.md", "w", encoding="utf-8", newline="") as file:
        file.write(text)
    sections = list(prepare.text_sections("long.md", 256))
    assert "".join(t for t, _ in sections) == text
    assert [ends for _, ends in sections] == [False] * (len(sections) - 1) + [True]
    assert len(sections) > 8 and all(len(t) < 600 for t, _ in sections)
    encoding = gpt2_bpe()
    tokens = []
    for t, _ in sections:
        tokens += encoding.encode_ordinary(t)
    assert tokens == encoding.encode_ordinary(text)


def test_a_text_without_spaces_is_cut_all_the_same(workplace):
    with open("long.txt", "w", encoding="utf-8") as file:
        file.write("文字" * 5000)
    sections = list(prepare.text_sections("long.txt", 256))
    assert "".join(t for t, _ in sections) == "文字" * 5000 and len(sections) > 30


def test_a_lone_file_is_split_into_training_and_validation(workplace, monkeypatch):
    monkeypatch.setattr(prepare, "SECTION_CHARS", 500)
    with open("lone.txt", "w") as file:
        file.write("a line of words\n" * 2000)
    prepare.prepare(configure("--source=lone.txt"))
    assert all(len(read_split(split)[0]) > 1000 for split in ("train", "val"))


def test_max_tokens_stops_there(workplace, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARS", 300)
    prepare.prepare(configure("--max_tokens=4000", "--workers=2"))
    splits = read_split("train")[2]["splits"].values()
    assert sum(s["text_tokens"] + s["dropped_text_tokens"] for s in splits) == 4000


def test_other_data_are_not_taken_for_what_was_asked(prepared):
    prepare.prepare(configure())  # the same: nothing to do
    message = refusal(prepare.main, [*DATA, "--seed=7"])
    assert "data/d was prepared with seed 1337, but seed=7" in message
    prepare.main([*DATA, "--seed=7", "--overwrite"])
    assert read_split("train")[2]["seed"] == 7


@pytest.mark.parametrize("manifest", [None, b"{"], ids=["lost", "damaged"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_files_of_another_origin_are_never_removed(workplace, manifest, overwrite):
    os.makedirs("data/d")
    write_bytes("data/d/train_00000.bin", b"mine")
    if manifest:
        write_bytes("data/d/manifest.json", manifest)
    message = refusal(prepare.prepare, configure(*overwrite))
    assert ("move it away, or name another" in message) or ("damaged: move data/d away" in message)
    assert read_bytes("data/d/train_00000.bin") == b"mine"


def test_overwriting_removes_what_the_manifest_names_and_no_more(prepared):
    write_bytes("data/d/notes.txt", b"mine")
    prepare.prepare(configure("--overwrite", "--max_tokens=9000"))
    assert read_bytes("data/d/notes.txt") == b"mine"
    read_split("train")  # fails if an older shard is left
    write_bytes("data/d/val_mine.bin", b"mine")
    before = folder_bytes("data/d")
    assert "val_mine.bin belongs to no prep" in refusal(prepare.prepare, configure("--overwrite"))
    assert folder_bytes("data/d") == before


@pytest.mark.parametrize("name", ["", ".", "..", "../texts", "/tmp", "a/b"])
def test_a_dataset_is_a_plain_name(workplace, name):
    assert "expected the plain name" in refusal(prepare.prepare, configure(f"--dataset={name}"))


def advice(message):
    """The arguments of the `python prepare.py` that a message advises."""
    return shlex.split(re.search(r"run python prepare\.py (.*--overwrite)", message)[1])


def test_advice_to_overwrite_keeps_the_users_source(prepared):
    manifest = read_bytes("data/d/manifest.json")
    for names in (["--tokenizer=bytes"], ["--tokenizer=bytes", "--block_size=64"], []):
        message = refusal(train.main, ["--dataset=d", *names])
        assert {"--source=texts", "--val_fraction=0.2"} < set(advice(message))
        assert ("--block_size=64" in advice(message)) == ("--block_size=64" in names)
        assert set(advice(refusal(prepare.main, ["--dataset=d", *names]))) == set(advice(message))
    assert "--source=gone" in advice(refusal(prepare.main, ["--dataset=d", "--source=gone"]))
    os.remove("data/d/val_00000.bin")
    prepare.main(advice(refusal(prepare.read_manifest, settings.load(["--dataset=d"]))))
    assert read_bytes("data/d/manifest.json") == manifest


def interrupt(config, monkeypatch):
    """Prepare, but stop before the manifest, as a killed process would."""
    with monkeypatch.context() as context:
        context.setattr(prepare, "SAVE_SECONDS", 0)
        context.setattr(prepare, "BATCH_CHARS", 300)
        context.setattr(prepare, "write_manifest", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.prepare(config)


def test_a_begun_preparation_whose_files_were_damaged_is_refused(workplace, monkeypatch):
    interrupt(configure(), monkeypatch)
    for name in ("train_00000.bin", os.path.basename(max(glob.glob("data/d/val_*")))):
        content = read_bytes(f"data/d/{name}")
        write_bytes(f"data/d/{name}", content[:2])
        assert f"{name} has 2 bytes, not " in refusal(prepare.prepare, configure())
        write_bytes(f"data/d/{name}", content)
    progress = read_bytes("data/d/progress.json")
    for damaged in (progress[:99], b"[]", progress.replace(b"blocks", b"bloks")):
        write_bytes("data/d/progress.json", damaged)
        expected = "progress.json is damaged: move data/d away, and run python prepare.py --data"
        assert expected in refusal(prepare.prepare, configure())


def test_a_shard_has_a_plain_name_inside_its_folder(prepared):
    manifest = read_bytes("data/d/manifest.json")
    for name in (b"../d/train_00000.bin", b"/etc/passwd"):
        write_bytes("data/d/manifest.json", manifest.replace(b"train_00000.bin", name))
        assert "is damaged" in refusal(prepare.read_manifest, configure())


def test_a_data_set_is_prepared_by_one_process_at_a_time(workplace):
    os.makedirs("data/d")
    with held_elsewhere("data/d/.lock"):
        assert "another prepare.py is writing data/d" in refusal(prepare.prepare, configure())
    prepare.prepare(configure())


def test_only_a_full_disk_asks_for_room(workplace, monkeypatch):
    write_bytes("data", b"")
    message = refusal(prepare.prepare, configure())
    assert "cannot write data/d: Not a directory" in message and "room" not in message
    os.remove("data")

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepare, "flush", full)
    assert "No space left on device; make room" in refusal(prepare.prepare, configure())


def prepared_text(split, dataset="d"):
    """What a split of bytes holds, without its meta-tokens and ends of text."""
    tokens, after, _ = read_split(split, f"data/{dataset}")
    tokens = np.append(tokens, after)
    return tokens[tokens < 256].astype(np.uint8).tobytes()


@pytest.mark.parametrize("tokenizer, n_blocks", [("bytes", 5), ("gpt2", 5), ("gpt2", 60)])
@pytest.mark.parametrize("val_fraction", [0.0005, 0.05, 0.95])
def test_a_lone_short_text_serves_both_splits(workplace, tokenizer, n_blocks, val_fraction):
    text = "".join(TEXTS)
    tokens = gpt2_bpe().encode_ordinary(text) if tokenizer == "gpt2" else list(text.encode())
    block_size = len(tokens) // n_blocks
    write_bytes("lone.txt", text.encode())
    prepare.prepare(settings.load([
        "--source=lone.txt", "--dataset=d", f"--tokenizer={tokenizer}",
        f"--val_fraction={val_fraction}", f"--block_size={block_size}"]))
    manifest = read_split("val")[2]
    n_val, n_train = (manifest["splits"][split]["text_tokens"] for split in ("val", "train"))
    share = n_val / (n_val + n_train)
    assert share > 0.15 if n_blocks == 5 else abs(share - val_fraction) < 0.2


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_few_documents_serve_both_splits(workplace, monkeypatch, ending):
    os.makedirs("few")
    for i, text in enumerate(TEXTS[:9]):
        line = text * 9 if ending == "txt" else json.dumps({"text": text * 9}) + "\n"
        write_bytes(f"few/{i}.{ending}", line.encode())
    few = ["--source=few", "--val_fraction=1e-6"]
    prepare.prepare(configure("--dataset=whole", "--workers=2", *few))
    manifest = read_split("val", "data/whole")[2]
    assert all(part["blocks"] > 4 for part in manifest["splits"].values())
    assert manifest["documents"] == 9
    interrupt(configure(*few), monkeypatch)
    prepare.prepare(configure(*few))
    assert folder_bytes("data/d") == folder_bytes("data/whole")


def test_the_end_of_a_lone_short_text_is_held_out(workplace):
    text = "".join(TEXTS).encode().decode("ascii", "ignore").encode()
    write_bytes("lone.txt", text)
    prepare.prepare(configure("--source=lone.txt", "--val_fraction=0.05"))
    cut = len(text) - int(0.05 * len(text))
    train, val = prepared_text("train"), prepared_text("val")
    assert text[:cut].startswith(train) and len(train) > cut - 32
    assert text[cut:].startswith(val) and len(val) > len(text) - cut - 32


def test_a_lone_short_text_is_prepared_alike_after_an_interruption(workplace, monkeypatch):
    monkeypatch.setattr(prepare, "SECTION_CHARS", 1000)
    write_bytes("lone.txt", "".join(TEXTS).encode())
    arguments = ["--source=lone.txt", "--val_fraction=1e-6"]
    prepare.prepare(configure("--dataset=whole", "--workers=2", *arguments))
    interrupt(configure(*arguments), monkeypatch)
    prepare.prepare(configure(*arguments))
    assert folder_bytes("data/d") == folder_bytes("data/whole")


@pytest.mark.parametrize("args, fault", [
    (["--max_tokens=10"], "max_tokens=10"),
    (["--source=lone.txt"], "the short source=lone.txt"),
    (["--val_fraction=1e-9"], "val_fraction=1e-09"),
])
def test_an_empty_split_names_what_is_at_fault(workplace, monkeypatch, args, fault):
    monkeypatch.setattr(prepare, "SMALL_BYTES", 1000)
    write_bytes("lone.txt", b"Too short a text.")
    message = refusal(prepare.prepare, configure(*args))
    assert message.startswith(f"error: {fault} left the ") and "less than a block" in message


def test_a_source_edited_after_an_interruption_is_refused(workplace, monkeypatch):
    config = configure()
    interrupt(config, monkeypatch)
    text = read_bytes("texts/000.txt")
    write_bytes("texts/000.txt", text.upper())
    os.utime("texts/000.txt", ns=(1, 1))  # whatever the clock's resolution
    assert "source=texts was edited since data/d was begun" in refusal(prepare.prepare, config)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with its mark"])
def test_a_byte_order_mark_is_no_part_of_the_text(workplace, encoding):
    codec, _, with_mark = encoding.partition(" ")
    for name, text in (("a.txt", "É" * 500), ("a.jsonl", json.dumps({"text": "É" * 500}))):
        text = "\ufeff" * bool(with_mark) + text
        with open(name, "w", encoding=codec, newline="") as file:
            file.write(text)
        *_, pieces = prepare.open_source(configure(f"--source={name}"), {}, {})
        assert "".join(piece.text for piece in pieces) == "É" * 500


def test_bytes_that_are_no_text_are_replaced_and_counted(workplace, capsys):
    from datasets import Dataset
    line = "a caf\xe9 and many more words, " + "of plain text " * 20
    write_bytes("latin.txt", "".join(TEXTS * 2).encode() + line.encode("latin-1") * 20)
    rows = [{"text": f"{i} {line}".encode("latin-1")} for i in range(50)]
    Dataset.from_list(rows).to_parquet("bytes.parquet")
    for source in ("latin.txt", "bytes.parquet"):
        prepare.prepare(configure(f"--source={source}", "--overwrite", "--val_fraction=0.5"))
        warnings = re.findall(r"warning: (.*): 0.*% of its characters", capsys.readouterr().err)
        assert warnings == [source]
        assert "a caf\ufffd and".encode() in prepared_text("train") + prepared_text("val")
    write_bytes("latin.txt", "d\xe9j\xe0 vu ".encode("latin-1") * 500)
    message = refusal(prepare.prepare, configure("--source=latin.txt", "--dataset=new"))
    assert "latin.txt: 25% of its characters are no UTF-8" in message
    assert not os.path.exists("data/new/manifest.json")


def rows_with_nulls(name):
    from datasets import Dataset
    rows = [{"body": text if i % 9 else None, "n": i} for i, text in enumerate(TEXTS)]
    if name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(name)
    else:
        with open(name, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "some/set"])
def test_rows_without_text_are_skipped_and_counted(workplace, monkeypatch, capsys, name):
    rows = rows_with_nulls("rows.parquet" if "/" in name else name)
    monkeypatch.setattr(prepare, "hub_rows", lambda source, revision, skip: iter(rows[skip:]))
    monkeypatch.setattr(prepare, "newest_revision", lambda source: "first")
    arguments = [f"--source={name}", "--text_field=body"]
    prepare.prepare(configure("--dataset=whole", *arguments))
    assert "14 rows without text were skipped" in capsys.readouterr().out
    manifest = read_split("train", "data/whole")[2]
    assert (manifest["documents"], manifest["skipped_rows"]) == (106, 14)
    interrupt(configure(*arguments), monkeypatch)
    prepare.prepare(configure(*arguments))
    assert "resuming after 106 documents" in capsys.readouterr().out
    assert folder_bytes("data/d") == folder_bytes("data/whole")
    message = refusal(prepare.prepare, configure(f"--source={name}", "--dataset=new"))
    assert "row 1 has no text in 'text'" in message


@pytest.mark.parametrize("blank", [" ", "\n", " \n"])
def test_a_million_blanks_are_cut_where_it_changes_nothing(blank):
    tokenise = prepare.Tokeniser(gpt2_bpe(), 0.5)
    text = f"one{blank * (600_000 // len(blank))} two"
    whole = tokenise.encoding.encode_ordinary(text)
    tokenise.encoding = SimpleNamespace(encode_to_numpy=refuse_long(tokenise.encoding))
    parts = tokenise.encode(text)
    assert len(parts) > 1 and np.concatenate(parts).tolist() == whole
    tokenise = prepare.Tokeniser(gpt2_bpe(), 0.5)
    tokens = np.concatenate(tokenise.encode("one" + blank * 1_500_000 + " two"))
    assert tokenise.encoding.decode(tokens.tolist()) == "one" + blank * 1_500_000 + " two"


def refuse_long(encoding):
    """encode_to_numpy, which fails above 599,000 characters, as tiktoken does later."""
    def encode(text, **options):
        if len(text) > 599_000:
            raise ValueError("Max stack size exceeded")
        return encoding.encode_to_numpy(text, **options)
    return encode


def test_endings_are_known_in_either_case_and_zipped(workplace):
    os.makedirs("many")
    write_bytes("many/A.TXT", b"text A")
    write_bytes("many/b.txt.gz", gzip.compress(b"text b"))
    write_bytes("many/c.json", b'{"text": "text c"}')
    write_bytes("many/d.Jsonl.GZ", gzip.compress(b'{"text": "text d"}'))
    write_bytes("many/e.pdf", b"none")
    write_bytes("many/._f.txt", b"none")
    os.makedirs("many/.git")
    write_bytes("many/.git/g.txt", b"none")
    *_, pieces = prepare.open_source(configure("--source=many"), {}, {})
    assert [piece.text for piece in pieces] == ["text A", "text b", "text c", "text d"]


def test_linked_folders_are_read_once(workplace):
    before = prepare.find_files("texts")
    os.symlink("..", "texts/deep/loop")
    assert prepare.find_files("texts") == before
    assert len(prepare.find_files("texts/**")) == len(before)
    os.symlink("deep", "texts/a_link")
    assert prepare.find_files("texts") == before
    os.makedirs("elsewhere")
    write_bytes("elsewhere/new.txt", b"new")
    os.symlink("../elsewhere", "texts/b_link")
    os.symlink("../../elsewhere", "texts/deep/c_link")
    linked = ("deep/c_link/new.txt", "texts/deep/c_link/new.txt")
    assert prepare.find_files("texts") == sorted([*before, linked])


def test_a_dangling_link_is_named(workplace):
    os.symlink("nowhere", "texts/gone.txt")
    for source in ("texts", "texts/*", "texts/**"):
        message = refusal(prepare.prepare, configure(f"--source={source}"))
        assert "cannot read texts/gone.txt: No such file" in message


def test_the_embedded_corpus_is_the_standard_library_without_its_tests():
    files = prepare.stdlib_files()
    keys = [key for key, _ in files]
    assert "os.py" in keys and "json/decoder.py" in keys
    for key in keys:
        assert not {"test", "tests", "site-packages"} & set(key.split("/")[:-1])
    assert 5e6 < sum(os.path.getsize(path) for _, path in files) < 40e6


def test_bad_sources_are_refused_in_one_line(workplace, monkeypatch):
    os.makedirs("bad")
    with open("bad/a.jsonl", "w") as file:
        file.write('{"text": "fine"}\n\n{"text": 3}\n')
    with open("bad/b.jsonl", "w") as file:
        file.write("no json\n")
    with open("bad/c.parquet", "w") as file:
        file.write("no parquet")
    with open("bad/d.jsonl", "wb") as file:
        file.write(b'{"text": "\xff"}')
    with open("bad/e.json.gz", "wb") as file:
        file.write(gzip.compress(b'{"text": "a"}' * 999)[:-9])
    open("bad/empty.txt", "w").close()
    for source, expected in {
        "nowhere/*.txt": "source=nowhere/*.txt: no such file",
        "bad/b.jsonl": "bad/b.jsonl:1: not JSON",
        "bad/a.jsonl": "bad/a.jsonl: row 3 has no text in 'text'",
        "bad/c.parquet": "cannot read bad/c.parquet: ",
        "bad/d.jsonl": "bad/d.jsonl: 100% of its characters are no UTF-8",
        "bad/e.json.gz": "cannot read bad/e.json.gz: ",
        "texts,gone.txt": "source=gone.txt: no such file",
        "gone,texts": "source=gone: no such file",
        "bad/empty.txt": "less than a block",
    }.items():
        assert expected in refusal(prepare.prepare, configure(f"--source={source}"))
    monkeypatch.setattr(prepare, "SMALL_BYTES", 0)
    message = refusal(prepare.prepare, configure("--val_fraction=0"))
    assert "val_fraction=0.0 left the val split 0 text tokens" in message
    assert not os.path.exists("data/d/manifest.json")
    import huggingface_hub

    def offline(*args):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    message = refusal(prepare.prepare, configure("--source=allenai/c4:en"))
    assert ("cannot be read from the Hugging Face hub (ConnectionError: offline): go online"
            in message)


def test_without_the_network_gpt2s_bpe_says_what_to_do(monkeypatch):
    def offline(name):
        raise ConnectionError("offline")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert "set TIKTOKEN_CACHE_DIR" in refusal(prepare.get_tokenizer, "gpt2")


# --------------------------------------------------------------------------------------
# train.py, with checkpoint.py and machine.py

def start_training(*args, launcher=()):
    """Start train.py and return at once; its stdout can be read line by line."""
    return subprocess.Popen([sys.executable, *launcher, os.path.join(HERE, "train.py"), *args],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train_small(*args):
    train.train(settings.load([*SMALL, *args]))


def train_plain(*args):
    """A run without meta-tokens and meta-attention, on data without meta-tokens."""
    prepare.prepare(configure(*PLAIN_DATA))
    train_small(*PLAIN_DATA, "--meta_attention=False", "--out_dir=plain", *args)


def read_log(folder="out"):
    with open(f"{folder}/log.jsonl") as file:
        return [json.loads(line) for line in file]


def val_losses(folder="out"):
    return [entry["val_loss"] for entry in read_log(folder) if entry.get("val_loss")]


def test_an_epoch_visits_every_block_once():
    for n in (1, 2, 3, 17, 64, 1000, 4097):
        for epoch in (0, 1):
            order = train.shuffled(np.arange(n, dtype=np.uint64), n, seed=5, epoch=epoch)
            assert sorted(order.tolist()) == list(range(n))


def test_every_epoch_has_an_order_of_its_own():
    blocks = np.arange(1000, dtype=np.uint64)
    first = train.shuffled(blocks, 1000, seed=5, epoch=0)
    second = train.shuffled(blocks, 1000, seed=5, epoch=1)
    assert (first != second).mean() > 0.98
    assert abs(np.corrcoef(first, blocks)[0, 1]) < 0.15


def test_an_epoch_is_shuffled_without_a_table_of_its_blocks():
    few_of_many = np.arange(2**40, 2**40 + 4, dtype=np.uint64)
    train.shuffled(few_of_many, 96_000_000 * 2**20, seed=0, epoch=0)  # no memory holds so many


def test_batches_depend_on_seed_and_sample_but_not_on_the_number_of_processes(prepared):
    config = settings.load([*SMALL, "--gradient_accumulation_steps=4"])
    blocks = prepare.Blocks("data/d", prepare.read_manifest(config), "train")

    def take(rank, world, first_sample, n):
        batches = train.micro_batches(blocks, first_sample, batch_size=2, accumulation=4,
                                      seed=1337, rank=rank, world=world)
        return [next(batches) for _ in range(n)]

    alone = take(0, 1, 0, 8)
    pairs = [take(rank, 2, 0, 4) for rank in (0, 1)]
    for i, (x, y) in enumerate(alone):
        rank, turn = i % 2, i // 2
        assert torch.equal(x, pairs[rank][turn][0])
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert (x == 257).sum() == 2 * 3
        assert (y != 257).sum() == 2 * 29
    next_step = take(0, 1, 8, 4)
    for (x, _), (same_x, _) in zip(alone[4:], next_step):
        assert torch.equal(x, same_x)


class Recorder:
    """Stands for a model: notes its targets; its loss is the mean of its inputs."""

    def __init__(self):
        self.targets = []

    def train(self, mode=True):
        pass

    eval = train

    def __call__(self, x, y, n_meta):
        self.targets += y[(y >= 0) & (y != 257)].tolist()
        return None, x[y[:, 0] >= 0].double().mean()


def test_evaluation_is_the_mean_over_the_same_text_whatever_the_meta_rate(prepared):
    prepare.prepare(configure(*PLAIN_DATA))
    spans = []
    for dataset, rate in (("d", 0.1), ("plain", 0.0)):
        config = settings.load([*SMALL, f"--dataset={dataset}", f"--meta_rate={rate}"])
        blocks = prepare.Blocks(f"data/{dataset}", prepare.read_manifest(config), "val")
        recorder = Recorder()
        loss = train.evaluate(recorder, blocks, 320, 2, Machine("cpu", "float32"))
        n_blocks = round(320 / blocks.text_per_block)
        means = [blocks.batch([i])[0].double().mean().item() for i in range(n_blocks)]
        assert loss == pytest.approx(np.mean(means))
        spans.append(recorder.targets)
    shorter = min(map(len, spans))
    assert spans[0][:shorter] == spans[1][:shorter]
    assert abs(len(spans[0]) - len(spans[1])) < 32


def test_a_data_set_that_was_named_is_not_filled_from_another_source(workplace):
    message = refusal(train.main, [f"{HERE}/config/quickstart.py", "--dataset=mine"])
    assert "no data in data/mine: run python prepare.py --dataset=mine" in message


def test_a_run_writes_checkpoints_a_log_and_a_picture(prepared, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint.Log, "draw", DRAW)
    train_small()
    written = sorted(os.listdir("out"))
    assert written == [".lock", "best.pt", "ckpt.pt", "log.jsonl", "loss.png"]
    assert read_bytes("out/loss.png").startswith(b"\x89PNG")
    entries = read_log()
    assert entries[-1]["step"] == 12
    assert entries[-1]["val_loss"] < entries[1]["val_loss"]
    assert entries[-2]["text_tokens"] == 12 * 2 * 2 * (32 - 3)
    printed = capsys.readouterr().out
    assert "ETA" in printed and "tokens/s" in printed and "A sample:" in printed
    saved = checkpoint.load("out")
    assert saved["step"] == 12 and saved["settings"]["dataset"] == "d"
    model = checkpoint.build(saved)
    assert model.config.vocab_size == pad_vocab(258)
    assert model.config.text_vocab_size == 257


def test_a_run_in_bfloat16_keeps_float32_weights_and_learns(prepared, capsys):
    train_small("--dtype=bfloat16")
    assert all(p.dtype == torch.float32 for p in weights_of("out").values())
    entries = read_log()
    assert entries[-1]["val_loss"] < entries[1]["val_loss"] - 0.3
    sample.main(["--device=cpu", "--dtype=bfloat16", "--max_new_tokens=5"])


def losses_by_step(folder):
    """The log's losses, without the times, which no two runs share."""
    entries = []
    for entry in read_log(folder):
        kept = {name: entry[name] for name in ("step", "loss", "val_loss") if name in entry}
        if len(kept) > 1:
            entries.append(kept)
    return entries


def test_a_run_killed_and_resumed_ends_with_the_same_bits(prepared):
    arguments = [*SMALL, "--dropout=0.1", "--max_iters=40", "--eval_interval=10",
                 "--eval_tokens=64"]
    whole = script("train.py", *arguments, "--out_dir=whole")
    assert whole.returncode == 0, whole.stderr

    process = start_training(*arguments, "--out_dir=killed")
    step = 2 * np.random.default_rng().integers(3, 15)
    for line in process.stdout:
        if f"{step}/40" in line:
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    assert checkpoint.load("killed")["step"] < 40

    resumed = script("train.py", "--init_from=resume", "--out_dir=killed",
                     "--device=cpu", "--dtype=float32")  # it remembers the rest
    assert resumed.returncode == 0, resumed.stderr
    whole_weights, resumed_weights = weights_of("whole"), weights_of("killed")
    for name, weight in whole_weights.items():
        assert torch.equal(weight, resumed_weights[name])
    assert losses_by_step("killed") == losses_by_step("whole")


def test_two_processes_take_the_same_steps_as_one(prepared):
    one_block = ["--eval_tokens=32", "--batch_size=1"]  # the second process evaluates none
    two = script("train.py", *SMALL, *one_block, "--out_dir=two", launcher=TWO)
    assert two.returncode == 0, two.stderr
    train_small(*one_block, "--out_dir=one")
    for a, b in zip(weights_of("one").values(), weights_of("two").values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert val_losses("one") == pytest.approx(val_losses("two"), rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint_to_resume(prepared, number):
    process = start_training(*SMALL, "--max_iters=100000", "--eval_interval=100000")
    for line in process.stdout:
        if "tokens/s" in line:
            process.send_signal(number)
            break
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "--init_from=resume" in output and "Traceback" not in errors
    assert f"saved at step {checkpoint.load('out')['step']}" in output


class StopAt:
    """Stands for a StopRequest: asks to stop before the step of this number."""

    def __init__(self, step):
        self.looks = step + 1

    def __call__(self):
        return self

    def look(self):
        self.looks -= 1
        return 0 if self.looks else signal.SIGINT

    def restore(self):
        pass


def die(*args, **kwargs):
    raise SystemExit("error: killed")


@pytest.mark.parametrize("step", [0, 3, 4, 5, 9, 10])
def test_a_run_that_was_stopped_has_the_log_of_one_that_was_not(prepared, monkeypatch, step):
    arguments = ["--max_iters=10", "--eval_interval=5", "--log_interval=4"]
    train_small(*arguments, "--out_dir=whole")
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopRequest", StopAt(step))
        with pytest.raises(SystemExit, match="130"):
            train_small(*arguments)
    train_small(*arguments, "--init_from=resume")
    assert losses_by_step("out") == losses_by_step("whole")


@pytest.mark.parametrize("function", ["save", "keep_best"])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_run_killed_at_an_evaluation_has_the_log_and_the_best_of_one_that_was_not(
        prepared, monkeypatch, function, last):
    arguments = ["--max_iters=10", "--eval_interval=5"]
    train_small(*arguments, "--out_dir=whole")
    real, calls = getattr(checkpoint, function), itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, function,
                      lambda *args, **named: (die if next(calls) == last else real)(*args, **named))
        assert refusal(train_small, *arguments) == "error: killed"
    start = "--init_from=resume" if os.path.exists("out/ckpt.pt") else "--overwrite"
    train_small(*arguments, start)
    assert losses_by_step("out") == losses_by_step("whole")
    saved, best = checkpoint.load("out"), checkpoint.load("out/best.pt")
    assert best["step"] == saved["best_step"]


def test_an_overwriting_run_killed_at_its_start_leaves_nothing_to_resume(prepared, monkeypatch):
    train_small("--max_iters=2")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", die)
        refusal(train_small, "--overwrite")
    assert "no checkpoint out/ckpt.pt" in refusal(train_small, "--init_from=resume")
    assert not os.path.exists("out/best.pt")


def test_a_run_resumed_with_another_batch_goes_on_behind_what_was_read(prepared, monkeypatch):
    samples, read = [], train.blocks_of_samples

    def noted(numbers, *args):
        samples.extend(numbers.tolist())
        return read(numbers, *args)

    monkeypatch.setattr(train, "blocks_of_samples", noted)
    train_small("--max_iters=3", "--batch_size=4")
    n_read = checkpoint.load("out")["samples"]
    del samples[n_read:]  # what was only prefetched
    train_small("--max_iters=6", "--batch_size=2", "--init_from=resume")
    n_read = checkpoint.load("out")["samples"]
    assert samples[:n_read] == list(range(n_read))
    text_tokens = [entry["text_tokens"] for entry in read_log()]
    assert text_tokens == sorted(text_tokens) and text_tokens[-1] == 29 * n_read


def test_the_best_loss_is_of_todays_data(prepared, capsys):
    prepare.prepare(configure("--dataset=other", "--seed=5"))
    train_small("--max_iters=2")
    saved = torch.load("out/ckpt.pt")
    checkpoint.save("out/ckpt.pt", saved | {"best_val_loss": 0.0})
    capsys.readouterr()
    train_small("--max_iters=4", "--init_from=resume")
    assert checkpoint.load("out")["best_val_loss"] == 0.0
    assert capsys.readouterr().err == ""
    for change in ("--dataset=other", "--eval_tokens=58"):
        for steps in (4, 2):  # a finished run, too, is evaluated on them
            checkpoint.save("out/ckpt.pt", saved | {"best_val_loss": 0.0})
            train_small(f"--max_iters={steps}", "--init_from=resume", change)
            assert "are not those before: the best loss" in capsys.readouterr().err
            assert checkpoint.load("out/best.pt")["step"] == steps
            assert checkpoint.load("out")["best_val_loss"] > 0


def test_a_run_of_an_older_version_is_resumed(prepared):
    train_small("--max_iters=4")
    saved = torch.load("out/ckpt.pt")
    for name in ("samples", "text_tokens", "best_step", "evaluated", "logged", "loss_sum", "data"):
        del saved[name]
    checkpoint.save("out/ckpt.pt", saved)
    train_small("--max_iters=8", "--init_from=resume")
    train_small("--max_iters=8", "--out_dir=whole")
    assert [e["step"] for e in losses_by_step("out")] == [
        e["step"] for e in losses_by_step("whole")]
    assert read_log()[-1]["text_tokens"] == read_log("whole")[-1]["text_tokens"]


def test_a_run_stopped_between_two_lines_is_resumed_with_fewer_steps(prepared, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopRequest", StopAt(3))
        with pytest.raises(SystemExit, match="130"):
            train_small("--log_interval=10")
    train_small("--init_from=resume", "--max_iters=3", "--log_interval=3")
    assert checkpoint.load("out")["step"] == checkpoint.load("out")["evaluated"] == 3


def test_a_resumed_run_keeps_its_parameters(prepared):
    train_plain("--max_iters=2")
    more = ["--out_dir=plain", "--dataset=d", "--meta_rate=0.1", "--meta_attention=True"]
    train_small("--max_iters=2", "--pos=absolute")
    prepare.prepare(configure("--dataset=short", "--block_size=16"))
    shorter = ["--pos=absolute", "--dataset=short", "--block_size=16"]
    for change in (more, shorter):
        message = refusal(train_small, "--init_from=resume", *change)
        assert "a resumed run keeps its parameters" in message


def test_a_finished_run_says_why_it_does_not_go_on(prepared, capsys):
    train_small("--max_iters=2")
    capsys.readouterr()
    train_small("--max_iters=2", "--init_from=resume")
    assert "nothing is left to do after 2 steps" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_precision(prepared):
    train_small("--max_iters=2", "--dtype=bfloat16")
    train.main(["--init_from=resume", "--max_iters=4", "--device=cpu"])
    assert read_log()[-1]["step"] == 4 and read_log()[0]["dtype"] == "torch.bfloat16"
    assert checkpoint.load("out")["settings"]["dtype"] == "bfloat16"


def test_a_second_run_in_a_folder_is_refused_until_the_first_ends(prepared):
    os.makedirs("out")
    with held_elsewhere("out/.lock"):
        assert "out is in use by another run" in refusal(train_small)
    assert os.listdir("out") == [".lock"]
    train_small("--max_iters=1")


def test_a_run_goes_on_without_its_picture(prepared, monkeypatch, capsys):
    from matplotlib.figure import Figure

    def savefig(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.Log, "draw", DRAW)
    monkeypatch.setattr(Figure, "savefig", savefig)
    train_small()
    assert "cannot draw out/loss.png: No space left on device" in capsys.readouterr().out
    assert checkpoint.load("out")["step"] == 12


def test_a_run_whose_reader_leaves_saves_and_stops(prepared):
    process = start_training(*SMALL, "--max_iters=100000", "--eval_interval=100000")
    for line in process.stdout:
        if "tokens/s" in line:
            process.stdout.close()
            break
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert errors == "" and checkpoint.load("out")["step"] > 0


TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_processes_end_soon_after_torchrun_whether_it_was_asked_or_killed(prepared):
    arguments = [*SMALL, "--max_iters=1000000", "--eval_interval=1000000",
                 "--log_interval=1000000"]
    steps = [0]
    for number, start in ((signal.SIGTERM, []), (signal.SIGKILL, ["--init_from=resume"])):
        process = start_training(*arguments, *start, launcher=TWO)
        for line in process.stdout:
            if "M parameters" in line:
                break
        time.sleep(1)
        process.send_signal(number)
        process.stdout.read()  # to its end: all have ended
        process.wait(timeout=60)
        steps.append(checkpoint.load("out")["step"])
    assert steps == sorted(set(steps))
    prepare.lock("out/.lock", "a process still runs").close()


def test_the_learning_rate_reaches_its_floor_with_the_last_step_or_the_last_minute():
    def rate(step, minutes):
        return train.learning_rate(step, minutes, peak=1, floor=0.1, warmup=10, steps=1000,
                                   max_minutes=5)

    assert rate(9, 0) == pytest.approx(10 / 11)
    assert rate(1000, 0) == pytest.approx(0.1)
    assert rate(505, 0) == pytest.approx(0.55)
    assert rate(20, 5) == pytest.approx(0.1)
    assert rate(20, 2.5) == pytest.approx(0.55)


def test_a_run_stops_when_its_minutes_are_over(prepared):
    started = time.monotonic()
    train_small("--max_iters=1000000", "--max_minutes=0.02", "--eval_interval=1000000")
    assert time.monotonic() - started < 30
    assert 0 < checkpoint.load("out")["step"] < 1000000


def test_a_loss_that_is_not_finite_stops_before_the_checkpoint_is_overwritten(prepared):
    diverging = ["--learning_rate=1e30", "--grad_clip=0", "--eval_interval=5", "--log_interval=100"]
    expected = (r"the loss is (nan|inf), .* at step 5, learning rate .*: "
                "the last good checkpoint is out/ckpt.pt")
    with pytest.raises(SystemExit, match=expected):
        train_small(*diverging)
    assert checkpoint.load("out")["step"] == 0


def test_too_little_memory_is_reported_in_one_line(prepared, monkeypatch):
    def hidden_states(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GPT, "hidden_states", hidden_states)
    message = refusal(train.main, [*SMALL, "--batch_size=4"])
    assert "too little memory for batch_size=4: halve it and double" in message
    save_model("meta.pt")
    message = refusal(eval_synthetic.main, ["--init_from=meta.pt", *TUNE])
    assert "cpu has too little memory: try" in message
    message = refusal(sample.main, ["--device=cpu", "--init_from=meta.pt"])
    assert "too little memory: try a smaller --num_samples" in message
    message = refusal(analyze.main, [*LOOK, "--init_from=meta.pt", "--what=perplexity"])
    assert message == "error: the device has too little memory: try --device=cpu"


WITH_LITTLE_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
import train
train.main()
"""


def test_more_memory_than_there_is_is_asked_for_in_vain(prepared):
    message = refusal(train.main, [*SMALL, "--batch_size=1e15"])
    assert "too little memory for batch_size=1000000000000000" in message


def test_a_full_disk_leaves_the_old_checkpoint(prepared):
    train_small("--max_iters=2")
    before = read_bytes("out/ckpt.pt")
    arguments = ["--init_from=resume", "--max_iters=4", "--device=cpu"]
    result = subprocess.run([sys.executable, "-c", WITH_LITTLE_DISK, *arguments],
                            env=os.environ | {"PYTHONPATH": HERE}, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "cannot save out/ckpt.pt (File too large): it is still the one before" in result.stderr
    assert read_bytes("out/ckpt.pt") == before
    assert not os.path.exists("out/ckpt.pt.tmp")


@pytest.mark.parametrize("code, expected", [
    (errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EACCES, "mend that")])
def test_a_checkpoint_that_cannot_be_saved_says_why(tmp_path, monkeypatch, code, expected):
    def fsync(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    path, reason = str(tmp_path / "ckpt.pt"), os.strerror(code)
    assert refusal(checkpoint.save, path, {}).endswith(f"({reason}): {expected}")
    write_bytes(path, b"before")
    message = refusal(checkpoint.save, path, {}, "resume")
    assert message.endswith(f"({reason}): it is still the one before; {expected}, and resume")
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_yarn_extends_the_window_of_a_checkpoint(prepared, capsys):
    train_small("--max_iters=2", "--out_dir=meta")
    prepare.prepare(configure("--block_size=64", "--dataset=long"))
    train_small("--n_layer=2", "--init_from=meta", "--out_dir=yarn", "--dataset=long",
                "--block_size=64", "--yarn_scale=2", "--max_iters=2")
    config = checkpoint.load("yarn")["model_config"]
    assert config["block_size"] == 64
    assert config["original_block_size"] == 32
    assert config["yarn_scale"] == 2.0
    assert "suits" not in capsys.readouterr().err
    for arguments, window in (([], 64), (["--block_size=48"], 48)):
        with open("before.py", "w") as file:  # what training started from does not count
            file.write("block_size = 32\n")
        model = train.load_saved(settings.load(["before.py", "--init_from=yarn", *arguments]))[0]
        assert (model.config.block_size, model.config.yarn_scale) == (window, 2.0)
    assert "yarn_scale=2.0 suits block_size=64 (the last window without YaRN was 32), not 48" in (
        capsys.readouterr().err)


def test_a_checkpoint_without_meta_tokens_is_given_some(prepared):
    train_plain("--max_iters=2")
    assert checkpoint.load("plain")["model_config"]["meta_id"] is None
    train_small("--init_from=plain", "--out_dir=added", "--max_iters=2")
    assert checkpoint.load("added")["model_config"]["meta_attention"]
    added = set(weights_of("added")) - set(weights_of("plain"))
    assert added == {
        "transformer.h.0.ln_meta.weight",
        "transformer.h.0.meta_attn.c_attn.weight",
        "transformer.h.0.meta_attn.c_proj.weight",
        "transformer.h.1.ln_meta.weight",
        "transformer.h.1.meta_attn.c_attn.weight",
        "transformer.h.1.meta_attn.c_proj.weight",
    }


def test_the_best_checkpoint_is_kept_when_the_last_is_worse(tmp_path):
    checkpoint.save(str(tmp_path / "ckpt.pt"), {"step": 1})
    checkpoint.keep_best(str(tmp_path))
    checkpoint.save(str(tmp_path / "ckpt.pt"), {"step": 2})
    assert torch.load(tmp_path / "best.pt")["step"] == 1
    assert torch.load(tmp_path / "ckpt.pt")["step"] == 2


def test_a_resumed_optimizer_follows_the_settings_given_now(prepared):
    train_small("--max_iters=2")
    train_small("--max_iters=4", "--init_from=resume", "--weight_decay=0.5", "--beta2=0.5")
    decayed, others = checkpoint.load("out")["optimizer"]["param_groups"]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0.0)
    assert decayed["betas"] == (0.9, 0.5)


def test_eval_only_evaluates_the_trained_model(prepared, capsys):
    train_small()
    best = checkpoint.load("out")["best_val_loss"]
    capsys.readouterr()
    with open("again.py", "w") as file:  # begins with one model and ends with another
        file.write('init_from = "elsewhere"\n')
    expected = f"validation {best:.4f} nats per text token, perplexity {math.exp(best):.2f}"
    for arguments in ([], ["again.py"]):
        train_small(*arguments, "--eval_only")
        assert expected in capsys.readouterr().out


def test_eval_only_remembers_that_a_model_has_no_meta_tokens(prepared, capsys):
    train_plain("--max_iters=2")
    best = checkpoint.load("plain")["best_val_loss"]
    capsys.readouterr()
    train_small("--dataset=plain", "--out_dir=plain", "--eval_only")
    assert f"validation {best:.4f}" in capsys.readouterr().out
    config = settings.load([*SMALL, "--init_from=plain", "--eval_only", "--meta_rate=0.1"])
    message = refusal(train.train, config)
    assert "meta_rate=0.1, but the checkpoint has no meta-tokens" in message


def test_learned_positions_are_cropped_to_a_shorter_window(prepared, capsys):
    save_model("long.pt", block_size=64, pos="absolute", n_layer=2)
    table = weights_of("long.pt")["transformer.wpe.weight"]
    train_small("--init_from=long.pt", "--max_iters=0", "--pos=absolute")
    assert torch.equal(weights_of("out")["transformer.wpe.weight"], table[:32])
    best = checkpoint.load("out")["best_val_loss"]
    train.main(["--eval_only", "--dataset=d", "--eval_tokens=128", "--batch_size=2",
                "--device=cpu", "--dtype=float32"])
    assert f"validation {best:.4f}" in capsys.readouterr().out.splitlines()[-1]
    train_small("--init_from=resume", "--max_iters=2", "--pos=absolute")


def test_damaged_lines_of_a_log_are_left_out(prepared):
    train_small("--max_iters=4")
    with open("out/log.jsonl", "ab") as file:
        file.write(b'{}\n\xff\x00\n[4]\n{"step": "4"}\n{"step": 4, "lo')  # the last cut short
    train_small("--max_iters=6", "--init_from=resume")
    steps = [entry["step"] for entry in read_log()]
    assert steps[-1] == 6 and steps == sorted(steps)


def test_mfu_is_counted_against_the_device_at_hand_or_not_at_all():
    h100 = {"type": "cuda", "dtype": torch.bfloat16, "world": 8,
            "name": lambda: "NVIDIA H100 80GB HBM3"}
    unknown = {"name": lambda: "NVIDIA GeForce RTX 4090 Laptop GPU"}
    assert Machine.peak_flops(SimpleNamespace(**h100)) == 8 * 989e12
    for change in ({"type": "cpu"}, {"dtype": torch.float32}, unknown):
        assert Machine.peak_flops(SimpleNamespace(**h100 | change)) is None


def test_micro_batches_that_the_processes_cannot_share_are_refused():
    expected = "gradient_accumulation_steps=40 is not divisible by the 3 processes"
    with pytest.raises(SystemExit, match=expected):
        train.check_start(settings.load([]), world=3)


@pytest.mark.parametrize("args, expected", [
    (["--n_embd=15"],
     "n_embd=15 is not divisible by n_head=2 (n_embd: command line, n_head: command line)"),
    (["--n_embd=6"], "needs an even head size"),
    (["--pos=absolute", "--yarn_scale=2"], "yarn_scale=2.0 extends a trained model"),
    (["--meta_rate=0"], "meta_attention=True needs meta-tokens, but meta_rate=0.0"),
    (["--dataset=nothing"],
     "no data in data/nothing: "
     "run python prepare.py --dataset=nothing --source=texts --tokenizer=bytes"),
    (["--block_size=64"], "was prepared with block_size 32, but block_size=64"),
    (["--meta_rate=0.2"], "was prepared with meta_rate 0.1, but meta_rate=0.2"),
    (["--tokenizer=gpt2"], "was prepared with tokenizer bytes, but tokenizer=gpt2"),
    (["--init_from=nowhere"], "no checkpoint nowhere"),
    (["--init_from=resume"], "no checkpoint out/ckpt.pt"),
    (["--device=quantum"], "device=quantum: expected cpu, cuda, cuda:N or mps"),
    (["--device=meta"], "device=meta: expected cpu, cuda, cuda:N or mps"),
    (["--device=cuda:99"], "device=cuda:99, but this machine has"),
    (["--out_dir=x.pt"], "out_dir=x.pt: name a folder"),
    (["--out_dir=texts/000.txt"], "out_dir=texts/000.txt: name a folder"),
])
def test_impossible_runs_are_refused_in_one_line(prepared, args, expected):
    assert expected in refusal(train.main, [*SMALL, *args])
    assert not os.path.exists("out")


def test_damaged_shards_are_refused_in_one_line(prepared):
    shard = "data/d/train_00000.bin"
    content = read_bytes(shard)
    write_bytes(shard, content[:-2])
    expected = f"{shard} has {len(content) - 2} bytes, not {len(content)}"
    assert expected in refusal(train.main, SMALL)
    write_bytes(shard, b"\xff\xff" + content[2:])
    assert f"{shard} was altered" in refusal(train.main, SMALL)
    manifest = prepare.read_manifest(settings.load(SMALL))
    blocks = prepare.Blocks("data/d", manifest, "train")
    assert "token id 65535 is beyond the vocabulary" in refusal(blocks.batch, [0])
    os.remove(shard)
    assert f"{shard} is missing" in refusal(train.main, SMALL)


def test_a_damaged_manifest_is_refused_in_one_line(prepared):
    manifest = read_bytes("data/d/manifest.json")
    renamed = manifest.replace(b'"block_size"', b'"blok_size"')
    for damaged in (manifest[:100], b"[]", renamed):
        write_bytes("data/d/manifest.json", damaged)
        assert "manifest.json is damaged" in refusal(train.main, SMALL)
    os.remove("data/d/manifest.json")
    assert "no data in data/d" in refusal(train.main, SMALL)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.fixture
def trained(prepared):
    """A folder in which train.py has trained one step."""
    train_small("--max_iters=1")
    return prepared


def refused_sample(*args):
    return refusal(sample.main, ["--device=cpu", *args])


def test_settings_that_contradict_the_checkpoint_are_refused_in_one_line(trained):
    expected = "n_layer=5, but the checkpoint has 2"
    assert expected in refused_sample("--n_layer=5")
    assert expected in refusal(train.main, [*SMALL, "--n_layer=5", "--init_from=resume"])
    with open("bpe.py", "w") as file:
        file.write('tokenizer = "gpt2"')
    for tokenizer in ("--tokenizer=gpt2", "bpe.py"):
        expected = "tokenizer=gpt2, but the checkpoint has bytes"
        assert expected in refused_sample(tokenizer)


def test_files_that_are_no_checkpoints_are_refused_and_never_run(trained):
    content = read_bytes("out/ckpt.pt")
    for name, data in {
        "truncated.pt": content[:len(content) // 2],
        "text.pt": b"hello",
        "byte.pt": b"\x80",
        "malicious.pt": pickle.dumps(Malicious(), protocol=2),
    }.items():
        write_bytes(name, data)
        assert f"{name} is" in refused_sample(f"--init_from={name}")
    assert not os.path.exists("was_run")


def test_a_flipped_bit_in_the_weights_is_refused(trained):
    content = bytearray(read_bytes("out/ckpt.pt"))
    weight = weights_of("out")["transformer.h.0.mlp.c_fc.weight"].numpy().tobytes()
    content[content.index(weight) + 99] ^= 1
    write_bytes("flipped.pt", content)
    torch.load("flipped.pt")  # notices nothing
    message = refused_sample("--init_from=flipped.pt")
    assert "flipped.pt is truncated or damaged (" in message
    assert "does not match its checksum)" in message


def test_without_a_checkpoint_a_command_that_makes_one_is_named(workplace):
    expected = "no checkpoint out/ckpt.pt: python train.py config/quickstart.py makes out/ckpt.pt"
    assert expected in refused_sample()
    config = settings.load([f"{HERE}/config/quickstart.py"])
    assert config.out_dir == "out" and config.init_from == "scratch"


def test_checkpoints_of_other_programs_and_versions_are_refused_in_one_line(trained):
    torch.save({"weights": torch.zeros(1)}, "other.pt")
    assert "other.pt is not a checkpoint of train.py" in refused_sample("--init_from=other.pt")
    saved = torch.load("out/ckpt.pt")
    saved["model_config"]["n_embd"] = 32
    torch.save(saved, "changed.pt")
    assert "of another architecture" in refused_sample("--init_from=changed.pt")
    saved["model_config"].pop("pos")
    torch.save(saved, "older.pt")
    expected = "was written by another version: its architecture differs in pos"
    assert expected in refused_sample("--init_from=older.pt")


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_weights_of_compiled_and_distributed_models_are_loaded(prefix):
    model = small_model()
    weights = {prefix + name: weight for name, weight in model.state_dict().items()}
    saved = {"model": weights, "model_config": vars(model.config)}
    for name, weight in checkpoint.build(saved).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    weights[prefix + "lm_head.weight"] = model.lm_head.weight + 1
    with pytest.raises(ValueError, match="lm_head.weight is not tied to the embedding"):
        checkpoint.build(saved)


# --------------------------------------------------------------------------------------
# sample.py

def test_meta_tokens_are_injected_into_every_block_of_a_prompt():
    config = settings.load(["--meta_rate=0.25", "--block_size=16"])
    text = list(range(1, 31))
    tokens = sample.inject_prompt(text, config, 99)
    assert tokens[tokens != 99].tolist() == text
    assert tokens[-1] != 99
    blocks = tokens.reshape(-1)[:32].reshape(2, 16)
    assert (blocks == 99).sum(1).tolist() == [4, 4]


def test_a_prompt_beyond_learned_positions_is_refused(prepared):
    train_small("--max_iters=1", "--pos=absolute")
    assert "the prompt has" in refused_sample(f"--start={'x' * 40}")
    with pytest.raises(ValueError, match="learned positions for block_size=64"):
        build(pos="absolute")(torch.zeros(1, 65, dtype=torch.long))
    longer = [*SMALL, "--init_from=out", "--out_dir=longer", "--block_size=64"]
    expected = "block_size=64, but the checkpoint has learned positions for 32"
    assert expected in refusal(train.main, longer)


@pytest.mark.parametrize("options", [
    [], ["--show_meta"], ["--temperature=0"], ["--meta_rate=0", "--top_k=3"],
], ids=" ".join)
def test_samples_begin_with_the_prompt_and_are_the_same_when_streamed(trained, capsys, options):
    def sampled(*more):
        capsys.readouterr()
        sample.main(["--device=cpu", "--start=é ✓ ", "--max_new_tokens=20", *options, *more])
        return capsys.readouterr().out

    one = sampled()
    assert one.replace("<|meta|>", "").startswith("é ✓ ")
    assert ("<|meta|>" in one) == (options == ["--show_meta"])
    assert sampled("--stream") == one
    line = "\n" + "-" * 40 + "\n"
    assert sampled("--num_samples=2").count(line) == 1
    two_streamed = sampled("--num_samples=2", "--stream")
    assert two_streamed.count(line) == 1
    assert two_streamed.startswith(one)


def test_a_sample_without_a_prompt_begins_a_document(trained, capsys):
    capsys.readouterr()
    sample.main(["--device=cpu", "--show_meta", "--max_new_tokens=1"])
    assert capsys.readouterr().out.startswith("<|endoftext|>")


def test_a_character_is_printed_when_all_its_tokens_are_there(capsys):
    encoding = prepare.get_tokenizer("bytes")
    first, last = "é".encode()
    tokens = [65, first, encoding.n_vocab, last, encoding.eot_token, first]
    sample.print_tokens(tokens, encoding, show_meta=False)
    sample.print_tokens(tokens, encoding, show_meta=True)
    assert capsys.readouterr().out == "Aé\ufffd\nA<|meta|>é<|endoftext|>\ufffd\n"


def test_bad_prompts_are_refused_in_one_line(workplace, monkeypatch):
    train_plain("--max_iters=1", "--out_dir=out")
    write_bytes("bytes.txt", b"\xff\xfe")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for argument, expected in [
        ("--start=", "start=: an empty prompt"),
        ("--start=-", "start=-: an empty prompt"),
        ("--start=FILE:none.txt", "start=FILE:none.txt: No such file or directory"),
        ("--start=FILE:bytes.txt", "start=FILE:bytes.txt: not UTF-8 text"),
        ("--meta_rate=0.1", "meta_rate=0.1, but the model has no meta-tokens"),
        ("--device=tpu", "device=tpu: expected cpu"),
        ("--init_from=none.pt", "no checkpoint none.pt"),
    ]:
        assert expected in refused_sample(argument)


def test_bad_prompts_are_refused_by_a_model_with_meta_tokens_too(trained):
    assert "start=: an empty prompt" in refused_sample("--start=")
    assert "start=FILE:none.txt: No such file" in refused_sample("--start=FILE:none.txt")


# --------------------------------------------------------------------------------------
# eval_synthetic.py

ROOM = {"bytes": (192, 500), "gpt2": (64, 300)}  # lengths that every task fits into
HASH = ord("#")


def tokenizer(name):
    if name == "gpt2":
        gpt2_bpe()
    return eval_synthetic.get_encoding(name)


def stream_of(task="list_recall", mark=HASH, placement="task", seed=1, name="bytes"):
    return eval_synthetic.Stream(task, placement, mark, name, seed)


def examples(task, n=40, length=300, placement="task", mark=HASH, name="bytes"):
    tokenizer(name)
    stream = stream_of(task, mark, placement, name=name)
    return [eval_synthetic.make_example(stream, length // 2 + 1, length, np.random.default_rng(i))
            for i in range(n)]


def text_of(tokens):
    return bytes(tokens.tolist()).decode()


def read_answer(prompt):
    """(answer, all answers that the prompt offers), by a reading of its own."""
    lists = dict(re.findall(r"^(?:List|Bits|Text) (\w+): (.*)\.$", prompt, re.M))
    question = prompt.rpartition("\n")[2]
    inside = {name: re.search(r"\[ (.*) \]", body) for name, body in lists.items()}
    if m := re.fullmatch(r"Question: item (\d+) of list (\w+)\? Answer:", question):
        offered = {item for body in lists.values() for item in body.split(", ")}
        return lists[m[2]].split(", ")[int(m[1]) - 1], offered
    if m := re.fullmatch(r"Question: how often is (\w+) in the segment of list (\w+)\? Answer:",
                         question):
        return str(len(re.findall(rf"\b{m[1]}\b", inside[m[2]][1]))), set("01234")
    if m := re.fullmatch(r"Question: parity of the bits before \* in bits (\w+)\? Answer:",
                         question):
        return str(lists[m[1]].partition("*")[0].count("1") % 2), set("01")
    m = re.fullmatch(r"Question: what is in brackets in text (\w+)\? Answer:", question)
    return inside[m[1]][1], {span[1] for span in inside.values()}


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
@pytest.mark.parametrize("task", eval_synthetic.TASKS)
def test_the_prompt_without_its_marks_determines_the_answer(task, name):
    encoding = tokenizer(name)
    mark = encoding.n_vocab
    for placement, length in itertools.product(("task", "all", "random", "none"), ROOM[name]):
        for e in examples(task, 8, length, placement, mark, name):
            text = prepare.decode(encoding, e.tokens.tolist())
            assert text == e.prompt + e.answer
            assert e.tokens[e.tokens != mark].tolist() == encoding.encode_ordinary(text)
            assert encoding.decode(e.tokens[-e.n_answer:].tolist()) == e.answer
            answer, offered = read_answer(e.prompt)
            assert e.answer == f" {answer}" and e.chance == pytest.approx(1 / len(offered))


def test_the_examples_are_those_of_the_published_results():
    digests = {"list_recall": "68c703af56607938", "segment_counting": "32902d3f38a7e557",
               "parity": "55426eb7ce9bb25f", "copying": "2e126869022ef4d3"}
    for task, digest in digests.items():
        drawn = [eval_synthetic.draw(stream_of(task, 257, placement), split, 300, number)
                 for placement in ("task", "all", "random") for split in eval_synthetic.SPLITS
                 for number in range(10)]
        tokens = [e.tokens.tolist() for e in drawn]
        assert prepare.sha256(json.dumps(tokens).encode())[:16] == digest


def test_the_example_of_the_docstring_is_one():
    e = eval_synthetic.make_example(stream_of(), 150, 210, np.random.default_rng(11))
    shown = textwrap.indent(text_of(e.tokens), " " * 4)
    assert shown in inspect.getdoc(eval_synthetic.make_example)


def test_words_are_single_tokens_of_gpt2s_bpe():
    words = eval_synthetic.WORDS
    assert len(set(words)) == len(words)
    assert not set(eval_synthetic.NAMES) & set(eval_synthetic.ITEMS)
    for word in words:
        assert len(gpt2_bpe().encode_ordinary(f" {word}")) == 1 and len(word) == 3


@pytest.mark.parametrize("task", eval_synthetic.TASKS)
def test_the_text_is_the_same_whatever_the_mark_and_its_place(task):
    plain = examples(task, mark=None)
    for placement in ("task", "all", "random", "none"):
        hashes, others = examples(task, placement=placement), examples(task, placement=placement,
                                                                       mark=258)
        for e, other, p in zip(hashes, others, plain):
            assert e.prompt == p.prompt and ((e.tokens == HASH) == (other.tokens == 258)).all()
            assert (e.tokens[e.tokens != HASH] == p.tokens).all() and e.tokens[0] != HASH
            assert (placement == "none") == (HASH not in e.tokens)


@pytest.mark.parametrize("task", eval_synthetic.TASKS)
def test_marks_of_placement_all_do_not_depend_on_what_is_asked(task):
    """An expression that never looks at the question finds them; those of 'task' stand
    at the unit that is asked for, and 'random' has as many."""
    wrapped = (r"\[( .*?) \]", r"[#\1# ]")
    where = {"list_recall": (r"(?m)(^List .*\.)$", r"\1#"), "parity": (r"\*", r"*#")}
    where = where.get(task, wrapped)
    for everywhere, own, anywhere in zip(*(examples(task, placement=placement)
                                           for placement in ("all", "task", "random"))):
        context, _, question = everywhere.prompt.rpartition("\n")
        mark = "#" if task == "list_recall" else ""
        tail = f"\n{question}{mark}{everywhere.answer}"
        assert text_of(everywhere.tokens) == re.sub(*where, context) + tail
        name = re.search(r"(\w+)\? Answer", question)[1]
        lines = [re.sub(*where, line) if f" {name}: " in line else line
                 for line in context.split("\n")]
        assert text_of(own.tokens) == "\n".join(lines) + tail
        assert (anywhere.tokens == HASH).sum() == (own.tokens == HASH).sum()


@pytest.mark.parametrize("task", eval_synthetic.TASKS)
def test_only_distance_grows_with_length(task):
    """Lengths are uniform in (L/2, L]. At every length what is asked for has the same
    distribution and stands anywhere, and the answers are balanced."""
    mean_words, answers = {}, {}
    for length in (256, 1024):
        drawn = examples(task, 200, length, "all", name="gpt2")
        lengths = np.array([len(e.tokens) for e in drawn])
        assert lengths.min() > length // 2 and lengths.max() <= length
        assert abs((lengths > 0.75 * length).mean() - 0.5) < 0.11
        assert abs(lengths.mean() / length - 0.75) < 0.03
        n_words, depths = [], []
        for e in drawn:
            name = re.search(r"(\w+)\? Answer", e.prompt)[1]
            n_words.append(len(re.search(rf"^\w+ {name}: (.*)$", e.prompt, re.M)[1].split()))
            is_asked = [f" {name}: " in line for line in e.prompt.split("\n")[:-1]]
            depths.append(is_asked.index(True) / (len(is_asked) - 1))
        assert abs(np.mean(depths) - 0.5) < 0.06
        mean_words[length], answers[length] = np.mean(n_words), [e.answer for e in drawn]
    assert abs(mean_words[256] - mean_words[1024]) < 0.15 * mean_words[256]
    n = {"parity": 2, "segment_counting": 5}.get(task, 0)
    for found, i in itertools.product(answers.values(), range(n)):
        assert abs(found.count(f" {i}") / len(found) - 1 / n) < 0.09


def test_streams_are_functions_of_seed_split_length_and_number_and_share_no_example():
    def prompts(split, numbers, **changes):
        return [eval_synthetic.draw(stream_of(**changes), split, 128, i).prompt for i in numbers]

    forward = prompts("train", range(30))
    assert prompts("train", reversed(range(30)), mark=None, placement="all") == forward[::-1]
    assert not set(forward) & set(prompts("train", range(30), seed=2))
    assert prompts("test", range(9)) == prompts("test", range(9), seed=2)
    texts = {split: set(prompts(split, range(250), task="parity"))
             for split in eval_synthetic.SPLITS}
    assert len(texts["train"]) == 250
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]
    assert {eval_synthetic.split_of(text) for text in texts["test"]} == {"test"}


def test_a_batch_is_padded_at_the_right_and_asks_for_the_answers_alone():
    drawn = examples("copying", 5, 256)
    x, at, y = eval_synthetic.collate(drawn, 256)
    longest, longest_answer = max(len(e.tokens) for e in drawn), max(e.n_answer for e in drawn)
    assert x.size(1) % 16 == 0 and x.size(1) - 16 < longest
    assert at.shape == y.shape and y.size(1) % 8 == 0 and y.size(1) - 8 < longest_answer
    for row, where, target, e in zip(x, at, y, drawn):
        n = len(e.tokens) - 1
        assert row[:n].tolist() == e.tokens[:-1].tolist() and not row[n:].any()
        assert text_of(target[target >= 0]) == e.answer and (target >= 0).sum() == e.n_answer
        read_before = row[where[1:e.n_answer]]  # a token is read, then the next is predicted
        assert read_before.tolist() == target[:e.n_answer - 1].tolist()
        assert where[e.n_answer - 1] == n - 1
    assert eval_synthetic.collate(drawn, 250)[0].size(1) <= 250


class Now:
    """Stands for a pool: does the work at once."""

    def submit(self, function, item):
        future = Future()
        future.set_result(function(item))
        return future


def spell(name, word, rng):
    """A task to be learned in seconds: repeat what stands behind the mark."""
    word = "ab" * rng.integers(1, 4)
    return eval_synthetic.Unit(f"[{eval_synthetic.MARK}{word}]", "?", word, ["ab"])


SPELL = ["--train_length=64", "--task_lr=3e-3", "--val_interval=1000", "--log_interval=1000",
         "--task_warmup=10", "--weight_decay=0"]


@pytest.fixture
def spelling(monkeypatch, tmp_path):
    """spelling(settings...): fine-tune a small model on this task; (run, history)."""
    monkeypatch.setitem(eval_synthetic.TASKS, "spell", spell)

    def tune(*args, phases=(64,)):
        config = settings.load([*SPELL, *args])
        config.task, config.tokenizer = "spell", "bytes"
        run = SimpleNamespace(
            config=config, stream=stream_of("spell", 257), phases=phases, model=small_model(),
            steps=config.phase_steps * len(phases), identity={}, label="spell",
            checkpoint=str(tmp_path / "tuned.pt"))
        return run, eval_synthetic.fine_tune(run, None, Now(), Machine("cpu", "float32"))

    return tune


def test_a_tiny_model_learns_a_tiny_task_and_is_measured_as_it_generates(spelling):
    run, history = spelling("--phase_steps=60")
    assert history[-1]["token_accuracy"] > 0.9 and history[-1]["loss"] < 0.5
    drawn = eval_synthetic.draw_split(Now(), run.stream, "test", 64, 30)
    correct, token_accuracy, _ = eval_synthetic.measure(
        run.model, drawn, 64, Machine("cpu", "float32"))
    model, hits = run.model.double(), []
    for is_correct, e in zip(correct, drawn):  # one by one, in float64, without padding
        tokens = torch.from_numpy(e.tokens[None])
        logits = model(tokens)[0][0, -e.n_answer - 1:-1, :257]
        is_hit = logits.argmax(-1).numpy() == e.tokens[-e.n_answer:]
        assert is_hit.all() == is_correct
        hits += is_hit.tolist()
        generated = model.generate(tokens[:, :-e.n_answer], e.n_answer, temperature=0)
        assert torch.equal(generated, tokens) == is_correct
    assert token_accuracy == pytest.approx(np.mean(hits))


def test_greedy_generation_with_the_cache_is_right_where_teacher_forcing_is():
    """It takes all of a model's own answers for right, and none of another's."""
    model, machine = small_model().eval(), Machine("cpu", "float32")
    drawn = examples("copying", 20, 256, "all", 257)
    for e in drawn[::2]:
        prompt = torch.from_numpy(e.tokens[None, :-e.n_answer])
        e.tokens = model.generate(prompt, e.n_answer, temperature=0)[0].numpy()
    correct, _, _ = eval_synthetic.measure(model, drawn, 256, machine)
    assert correct.tolist() == [True, False] * 10


def test_micro_batches_of_tuning_take_the_same_steps(spelling, monkeypatch):
    whole, [of_whole] = spelling("--phase_steps=3")  # 16 examples at once
    monkeypatch.setattr(eval_synthetic, "TUNE_TOKENS", 320)
    parts, [of_parts] = spelling("--phase_steps=3")  # 5 at a time, answers of unequal lengths
    assert of_whole["train_loss"] == pytest.approx(of_parts["train_loss"], rel=1e-6)
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_tuning_ends_when_validation_is_solved(spelling, monkeypatch):
    monkeypatch.setattr(eval_synthetic, "SOLVED", 0.5)
    run, history = spelling("--phase_steps=1000", "--val_interval=1", "--stop_solved")
    *unsolved, solved = history
    assert solved["step"] < 1000
    assert solved["exact"] >= 0.5 > max(point["exact"] for point in unsolved)
    assert checkpoint.load(run.checkpoint)["finished"]


def test_tuning_ends_when_time_is_up_with_all_phases_behind_it(spelling, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: 0.6 * next(ticks))  # 100 looks a minute
    _, history = spelling("--phase_steps=1000000", "--max_minutes=1", "--task_batch_size=4",
                          phases=(32, 64))
    last = history[-1]
    assert 1 <= last["minutes"] < 1.1 and 32 < last["step"] <= 100 and last["phase"] == 64


def test_rows_change_what_they_name_and_nothing_stays_behind():
    model, idx = build(), text_with_meta((4, 7))
    before = model(idx)[0]
    references = {
        "full": dense_gpt(model, idx),
        "no_pos": dense_gpt(build(zero_meta_pos=True), idx),
        "no_pos_meta": dense_gpt(model, idx, turn_meta=False),
        "no_embed": dense_gpt(build(zero_meta_embd=True), idx)}
    for row, reference in references.items():
        with eval_synthetic.ablated(model, row):
            torch.testing.assert_close(model(idx)[0], reference, rtol=1e-6, atol=1e-6)
        assert torch.equal(model(idx)[0], before)
    with eval_synthetic.ablated(model, "no_meta_attention"):
        without = model(idx)[0]
    for block in model.transformer.h:
        block.meta_attn.c_proj.weight.data.zero_()
    torch.testing.assert_close(model(idx)[0], without)


@pytest.mark.parametrize("changes, mark, possible", [
    ({}, META, "full no_pos no_pos_meta no_embed no_meta_attention no_meta"),
    ({}, 61, "full no_meta"),
    ({}, None, "full"),
    ({"pos": "absolute"}, META, "full no_pos no_embed no_meta_attention no_meta"),
    ({"meta_attention": False}, META, "full no_pos no_embed no_meta")])
def test_rows_are_those_that_model_and_mark_allow(changes, mark, possible):
    assert eval_synthetic.possible_rows(build(**changes), mark) == possible.split()


PLAIN = {"meta_id": None, "meta_attention": False, "text_vocab_size": 257}


def test_a_fresh_token_starts_at_the_mean_of_the_text():
    no_row_to_spare = {"meta_id": None, "meta_attention": False, "vocab_size": 257}
    for changes in ({}, PLAIN, no_row_to_spare):
        model = small_model(**changes)
        meta_id, idx = model.config.meta_id, torch.randint(0, 256, (1, 20))
        logits = model(idx)[0][..., :257]
        model = eval_synthetic.with_fresh_token(model, 258)
        wte = model.transformer.wte.weight
        torch.testing.assert_close(wte[258], wte[:257].mean(0))
        assert model.config.meta_id == meta_id
        assert torch.equal(model(idx)[0][..., :257], logits)


TUNE = ["--device=cpu", "--dtype=float32", "--train_length=192", "--phase_steps=6",
        "--val_interval=3", "--log_interval=1", "--val_examples=8", "--test_examples=12",
        "--task_batch_size=4", "--eval_lengths=192,256", "--workers=1"]


def stop_at(process, line, number):
    """Send a signal when the process has printed a line that begins so."""
    for printed in process.stdout:
        if printed.startswith(line):
            return process.send_signal(number)


def test_a_tuning_killed_and_started_again_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model("meta.pt")
    arguments = ["--init_from=meta.pt", *TUNE, "--dropout=0.1", "--label=whole"]
    eval_synthetic.main(arguments)
    arguments[-1] = "--label=killed"
    command = [sys.executable, os.path.join(HERE, "eval_synthetic.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        stop_at(process, "step  8/12", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        stop_at(process, "step 10/12", signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "stopped at step 1" in errors and "goes on from there" in errors
    assert "Traceback" not in errors
    eval_synthetic.main(arguments)

    weights, results = [], []
    for label in ("whole", "killed"):
        name = f"{label}_list_recall_task_meta_192_s5_1337"
        weights.append(weights_of(f"out/{name}.pt"))
        results.append(eval_synthetic.read_result(f"results/{name}.json"))
        assert [entry["step"] for entry in results[-1]["validation"]] == [3, 6, 9, 12]
        for entry in results[-1]["validation"]:
            del entry["minutes"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for key in ("validation", "rows", "tests", "pretrained"):
        assert results[0][key] == results[1][key]


def test_a_stop_request_saves_no_weights_that_are_not_finite(tmp_path, monkeypatch):
    class StopAfterFourSteps:
        def __init__(self):
            self.looks = itertools.count()

        @property
        def signal(self):
            return 2 if next(self.looks) >= 4 else 0

    monkeypatch.chdir(tmp_path)
    save_model("meta.pt")
    monkeypatch.setattr(eval_synthetic, "StopRequest", StopAfterFourSteps)
    arguments = ["--init_from=meta.pt", *TUNE, "--val_interval=100", "--task_warmup=0"]
    message = refusal(eval_synthetic.main, [*arguments, "--task_lr=1e38"])
    assert "the gradient's norm nan" in message
    assert glob.glob("out/*.pt") == []
    with pytest.raises(SystemExit, match="stopped at step 4; .*without --overwrite.* goes on"):
        eval_synthetic.main([*arguments, "--task_lr=1e-3", "--overwrite"])
    assert len(glob.glob("out/*.pt")) == 1


@pytest.mark.parametrize("args, expected", [
    (["--task=juggling"], "task=juggling: expected one of list_recall, segment_counting, parity, "
                          "copying, all (task: command line)"),
    (["--placement=above"], "placement=above: expected one of"),
    (["--marker=flag"], "marker=flag: expected one of"),
    (["--eval_lengths=128,many"], "eval_lengths=128,many: expected lengths in tokens"),
    (["--eval_lengths=+192"], "eval_lengths=+192: expected lengths in tokens"),
    (["--task_lr=1e-3,fast"], "task_lr=1e-3,fast: expected a number"),
    (["--task_lr=0"], "task_lr=0.0 must be positive"),
    (["--train_length=64"], "train_length=64 is too short: list_recall needs 83 tokens"),
    (["--eval_lengths=64", "--marker=none"],
     "eval_lengths=64 is too short: list_recall needs 83 tokens"),
    (["--task=all", "--eval_lengths=128"],
     "eval_lengths=128 is too short: segment_counting needs 137 tokens"),
    (["--init_from=plain.pt"], "marker=meta, but the checkpoint has no meta-tokens"),
    (["--init_from=plain.pt", "--marker=text", "--rows=full,no_pos"],
     "no_pos is not among what this model and marker allow: full"),
    (["--init_from=meta.pt", "--add_meta"], "add_meta=True, but the checkpoint has meta-tokens"),
    (["--init_from=ape.pt"], "train_length=192, but there are learned positions for 128"),
    (["--init_from=nowhere"], "no checkpoint nowhere"),
])
def test_impossible_tunings_are_refused_in_one_line(tmp_path, monkeypatch, args, expected):
    monkeypatch.chdir(tmp_path)
    save_model("meta.pt")
    save_model("ape.pt", pos="absolute", block_size=128)
    save_model("plain.pt", **PLAIN)
    assert expected in refusal(eval_synthetic.main, ["--init_from=meta.pt", *TUNE, *args])
    assert not os.path.exists("results") and not os.path.exists("out")


def test_results_of_the_version_that_searched_rates_are_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model("plain.pt", **PLAIN)
    arguments = ["--init_from=plain.pt", *TUNE, "--marker=none"]
    eval_synthetic.main(arguments)
    [path] = glob.glob("results/*.json")
    result = json.load(open(path))
    result["run"]["trial_steps"] = 300
    json.dump(result, open(path, "w"))
    capsys.readouterr()
    eval_synthetic.main(arguments)
    assert capsys.readouterr().out == f"{path} is there already\n"


def test_a_model_extended_by_yarn_is_tuned_and_measured_beyond_its_window(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model("rope.pt", block_size=64)
    eval_synthetic.main(["--init_from=rope.pt", "--yarn_scale=4", "--block_size=256", *TUNE,
                         "--eval_lengths=192,640", "--rows=full", "--label=yarn"])
    name = "yarn_list_recall_task_meta_192_s5_1337"
    rows = eval_synthetic.read_result(f"results/{name}.json")["rows"]
    assert [(row["length"], row["n"]) for row in rows] == [(192, 12), (640, 12)]
    c = GPTConfig(**checkpoint.load(f"out/{name}.pt")["model_config"])
    assert (c.block_size, c.original_block_size, c.yarn_scale) == (256, 64, 4.0)


def test_meta_tokens_are_added_for_fine_tuning(tmp_path, monkeypatch):
    def opened(*args):
        config = settings.load([*args, "--init_from=plain.pt", "--add_meta"])
        return eval_synthetic.open_model(config)

    monkeypatch.chdir(tmp_path)
    save_model("plain.pt", **PLAIN)
    (model, mark, identity), (again, _, same_identity) = opened(), opened()
    assert identity == same_identity
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert mark == model.config.meta_id == 257
    assert not model.transformer.h[0].meta_attn.c_proj.weight.any()
    with open("plain.py", "w") as file:  # how it was pre-trained
        file.write("meta_attention = False\n")
    assert opened("plain.py")[0].config.meta_attention
    assert not opened("plain.py", "--meta_attention=False")[0].config.meta_attention


# --------------------------------------------------------------------------------------
# results/plot_synthetic.py: figure and tables

def test_intervals_are_the_known_ones():
    low, high = eval_synthetic.wilson(10, 20)
    assert (low, high) == pytest.approx((0.2993, 0.7007), abs=1e-3)  # Wilson's formula, as tabled
    assert eval_synthetic.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-3)


def test_a_difference_is_of_the_seeds_that_both_have():
    a = {1: np.array([0, 0, 1, 1, 0.0])}
    b = {7: np.array([1, 0, 1, 1, 1.0]), 1: np.array([1, 0, 1, 1, 0.0])}
    mean, low, high = plot_synthetic.paired_difference(a, b)
    over_examples = 1.96 * np.std([1, 0, 0, 0, 0], ddof=1) / 5**0.5  # all that one seed can say
    assert mean == pytest.approx(0.2) and (high - low) / 2 == pytest.approx(over_examples)


def test_without_common_seeds_the_means_are_compared():
    a = {2: np.array([0, 0, 1, 1, 0.0])}
    b = {7: np.array([1, 0, 1, 1, 1.0]), 1: np.array([1, 0, 1, 1, 0.0])}
    mean, low, high = plot_synthetic.paired_difference(a, b)
    over_examples = 1.96 * np.std([1, 0, 0, 0, 0.5], ddof=1) / 5**0.5
    assert mean == pytest.approx(0.3) and (high - low) / 2 == pytest.approx(over_examples)


def test_a_difference_is_as_uncertain_as_seeds_or_examples_make_it():
    zeros = {seed: np.zeros(100) for seed in (1, 2, 3)}
    by_seed = {1: np.full(100, 0.2), 2: np.full(100, 0.3), 3: np.full(100, 0.1)}
    mean, low, high = plot_synthetic.paired_difference(zeros, by_seed)
    over_seeds = 4.30 * 0.1 / 3**0.5
    assert mean == pytest.approx(0.2) and (high - low) / 2 == pytest.approx(over_seeds)
    by_example = {seed: np.arange(100) % 2.0 for seed in (1, 2, 3)}
    mean, low, high = plot_synthetic.paired_difference(zeros, by_example)
    over_examples = 1.96 * np.std(by_example[1], ddof=1) / 10
    assert mean == pytest.approx(0.5) and (high - low) / 2 == pytest.approx(over_examples)
    one = plot_synthetic.paired_difference({1: np.zeros(1)}, {1: np.ones(1)})
    assert one == (1, -1, 1)  # one example of one seed says nothing


def a_result(label, placement, seed, task="copying", steps=10):
    """As much of a result as it takes to group it."""
    run = {"seed": seed, "pretrained": f"of {seed}", "stream": {"seed": seed}, "phase_steps": steps}
    return {"tests": {}, "task": task, "placement": placement, "label": label, "seeds": seed,
            "run": run}


def panels_of(*results):
    return plot_synthetic.panels_of(dict(enumerate(results)))


def test_results_are_grouped_by_task_and_placement():
    first, second = a_result("B", "task", 1), a_result("B", "task", 2)
    everywhere, parity = a_result("B", "all", 1), a_result("A", "none", 1, "parity")
    panels = panels_of(everywhere, second, first, parity)
    assert list(panels) == [("parity", "none"), ("copying", "task"), ("copying", "all")]
    assert panels["copying", "task"] == {"B": [first, second]}
    assert panels["copying", "all"] == {"B": [everywhere]}


def test_models_without_marks_are_compared_at_equal_steps():
    marked, everywhere = a_result("B", "task", 1), a_result("B", "all", 1, steps=30)
    unmarked, longer = a_result("A", "none", 1), a_result("A longer", "none", 1, steps=30)
    assert panels_of(unmarked, longer, marked, everywhere) == {
        ("copying", "task"): {"A": [unmarked], "B": [marked]},
        ("copying", "all"): {"A longer": [longer], "B": [everywhere]}}
    assert panels_of(unmarked, longer, marked) == {
        ("copying", "task"): {"A": [unmarked], "B": [marked]},
        ("copying", "none"): {"A longer": [longer]}}
    same = a_result("B", "none", 1)
    assert panels_of(same, marked) == {
        ("copying", "task"): {"B, no marks": [same], "B": [marked]}}


def test_results_of_a_label_differ_only_in_their_seeds():
    first, second = a_result("B", "task", 1), a_result("B", "task", 2)
    assert refusal(panels_of, first, a_result("B", "task", 1)) == \
        "error: 1: 'B' has two results of the same seeds: name only one of them"
    second["run"]["trial_steps"] = 300  # a setting of older versions, without any effect
    assert panels_of(first, second) == {("copying", "task"): {"B": [first, second]}}
    second["run"]["stream"]["mark"] = 35
    assert "1: 'B' has results of different settings" in refusal(panels_of, first, second)


def test_a_task_is_learned_at_the_first_validation_with_half_right():
    group = []
    for exact in ([0, 0.5, 0.4, 0.9], [0, 0.1, 0.2, 0.49], [0.6, 0, 0, 0]):
        points = [{"step": 500 * (i + 1), "exact": share} for i, share in enumerate(exact)]
        group.append({"validation": points})
    assert plot_synthetic.learned_at(group) == "1,000, never, 500"


def test_the_study_gives_the_numbers_of_its_page():
    shown = {
        "main": ["| D meta, 3 seeds | full | 256 | 97.7 (96.0-98.8) | 97.2 (94.5-99.5) | "
                 "71.8 (66.2-75.5) | 30.3 (26.5-32.2) | 800, 800, 600 |",
                 "| A GPT-2, 3,600 steps | full | 256 | 78.2 (73.9-82.0) | 55.8 (50.9-60.5) | "
                 "22.2 (18.4-26.6) | 5.2 (3.5-7.9) | 1,600 |",
                 "| D meta, 3 seeds | full, generated (n <= 256) | 256 | ",
                 "| D meta - B GPT-2, # | 3 | +1.1 (-4.7 to +6.9) | +1.2 (-8.9 to +11.3) | "],
        "rates": ["| rate 4e-3, D meta, 3 seeds | full | 256 | "],
        "beyond": ["| YaRN, D meta, 3 seeds | full | 512 | 99.0 (98.5-99.2) | 98.8 (98.2-99.0) | "
                   "96.2 (94.5-98.2) | 68.6 (63.7-72.8) | 34.6 (31.5-39.5) | "],
        "variants": ["| learned positions, D meta | full | 256 | "],
    }
    study = os.path.join(HERE, "results/study.jsonl")
    for part, lines in shown.items():
        panels = plot_synthetic.panels_of(plot_synthetic.read([study], part))
        tables = "\n".join(plot_synthetic.tables(panels))
        assert [line for line in lines if line not in tables] == []


def test_the_study_asks_only_for_settings_that_exist():
    listed = subprocess.run(["bash", "results/study.sh"], cwd=HERE, env=os.environ | {"LIST": "1"},
                            capture_output=True, text=True, check=True)
    jobs = [shlex.split(line) for line in listed.stdout.splitlines()]
    assert {job[0] for job in jobs} == {"prepare", "pretrain", "tune"}
    for job in jobs:
        given = [word for word in job if word.startswith("--")]
        config = settings.load([os.path.join(HERE, "config/study.py"), *given])
        assert config.n_layer == (4 if "deep" in job else 3)  # a model is tuned with its own depth


def test_the_gpu_study_goes_through_its_stages(tmp_path):
    for path in (*glob.glob(f"{HERE}/*.py"), f"{HERE}/results/gpu_study.sh",
                 f"{HERE}/results/plot_synthetic.py", *glob.glob(f"{HERE}/config/*.py")):
        copy = tmp_path / os.path.relpath(path, HERE)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    python = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    tiny = ["--max_tokens=30000", "--max_iters=2", "--batch_size=2", "--eval_tokens=512",
            "--phase_steps=1", "--val_examples=4", "--test_examples=4"]
    done = subprocess.run(
        ["bash", "results/gpu_study.sh", *tiny], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PATH": python, "SMALL": "1", "ONLY": "prepare|deep|plot"})
    assert done.returncode == 0, done.stdout + done.stderr
    stages = re.findall(r"^(\S+): \d+ s$", done.stdout, re.M)
    assert stages == ["preparing", "pre-training", "tuning", "drawing"]
    labels = {json.loads(path.read_text())["label"] for path in tmp_path.glob("results/*.json")}
    assert labels == {"F deeper GPT-2, fresh token"}


@pytest.fixture(scope="module")
def tuned_once(tmp_path_factory):
    """A folder with runs of two models and two seeds."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_model("ape.pt", pos="absolute", block_size=192)
        save_model("plain.pt", meta_id=None, meta_attention=False, text_vocab_size=257)
        eval_synthetic.main(["--init_from=ape.pt", *TUNE, "--task_lr=1e-3", "--task=all"])
        plain = ["--init_from=plain.pt", *TUNE, "--task_lr=1e-3", "--placement=all"]
        eval_synthetic.main([*plain, "--marker=none,fresh", "--seed=1"])
        eval_synthetic.main([*plain, "--marker=none", "--seed=2"])
    return folder


@pytest.fixture
def tuned(tuned_once, tmp_path, monkeypatch):
    """The results of these runs, in a copy of their folder to work in."""
    shutil.copytree(tuned_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return sorted(glob.glob("results/*.json"))


def test_runs_are_measured_tabled_and_drawn(tuned, capsys):
    assert len(tuned) == 7
    ape = eval_synthetic.read_result(
        "results/ape_with_meta-tokens_list_recall_task_meta_192_s5_1337.json")
    assert [row["row"] for row in ape["rows"]] == \
        ["full", "no_pos", "no_embed", "no_meta_attention", "no_meta", "full"]
    assert ape["rows"][-1]["impossible"] == "learned positions end at 192"
    assert ape["rows"][-2]["out_of_distribution"]
    assert ape["pretrained"]["step"] == 7 and ape["seeds"]["pretraining"] == 5
    for row in ape["rows"][:-1]:
        assert row["n"] == 12 and row["low"] <= row["exact"] <= row["high"]

    open("results/bench_cpu.json", "w").close()  # bench.py's lie beside them
    plot_synthetic.main([*tuned, "results/bench_cpu.json"])
    printed = capsys.readouterr().out
    assert open("results/synthetic.png", "rb").read(4) == b"\x89PNG"
    assert "| chance |" in printed
    assert "| plain without marks, 2 seeds |" in printed and "| never, never |" in printed
    assert "| plain with a fresh token - plain without marks |" in printed
    for table in printed.split("\n\n"):
        assert len({line.count("|") for line in table.splitlines() if "|" in line}) <= 1


def test_a_figure_has_the_panels_that_were_asked_for(tuned, monkeypatch):
    drawn = texts_of_figures(monkeypatch)
    plain = [path for path in tuned if "plain" in path]
    plot_synthetic.main([*plain, "--show=seeds", "--title=What came out"])
    assert {"What came out", "plain without marks", "plain with a fresh token"} <= drawn
    drawn.clear()
    plot_synthetic.main([*plain, "--show=length", "--panel=all: plain without marks|no such label"])
    assert "plain without marks" in drawn and "plain with a fresh token" not in drawn
    assert "--show=rows: expected length" in refusal(plot_synthetic.main, [*plain, "--show=rows"])
    message = refusal(plot_synthetic.main, [*plain, "--panel=task: plain without marks"])
    assert "no panel has any of the models" in message


def test_a_panel_has_five_lines_at_most(monkeypatch):
    study = os.path.join(HERE, "results/study.jsonl")
    panels = plot_synthetic.panels_of(plot_synthetic.read([study], "main"))
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: shown.append(figure))
    shown = []
    plot_synthetic.draw(panels, "none.png", ["length"], [], None)
    figure, = shown
    models = [len(ax.texts) - 2 for ax in figure.axes]  # "chance" and "training length"
    assert sum(models) == sum(map(len, panels.values())) and max(models) == 5


def test_a_label_is_never_taken_for_a_formula(tuned, monkeypatch):
    result = json.load(open(tuned[0])) | {"label": "a$b_$c"}
    with open("formula.json", "w") as file:
        json.dump(result, file)
    drawn = texts_of_figures(monkeypatch)
    plot_synthetic.main(["formula.json"])
    assert {text for text in drawn if "$" in text} == {"a$b_$c"}


def texts_of_figures(monkeypatch):
    """The texts in all figures from now on, in which matplotlib looks for formulas."""
    texts, savefig = set(), Figure.savefig

    def saving(figure, *args, **kwargs):
        savefig(figure, *args, **kwargs)
        texts.update(text.get_text() for text in figure.findobj(Text))

    monkeypatch.setattr(Figure, "savefig", saving)
    monkeypatch.setitem(rcParams, "text.parse_math", True)
    return texts


def test_what_is_tuned_already_is_not_tuned_again(tuned, capsys):
    again = ["--init_from=ape.pt", *TUNE]
    eval_synthetic.main([*again, "--task_lr=1e-3"])
    assert "is there already" in capsys.readouterr().out
    eval_synthetic.main([*again, "--task_lr=1e-3", "--rows=full"])  # measured anew
    assert "step 12/12" not in capsys.readouterr().out
    assert len(eval_synthetic.read_result(tuned[1])["rows"]) == 2
    same_file = [f"--label={os.path.basename(tuned[1]).split('_list_recall')[0]}"]
    for change in (["--task_lr=1e-4"], ["--task_lr=1e-3", *same_file]):
        message = refusal(eval_synthetic.main, [*again, *change])
        assert "is of other settings: name another --label=" in message


def test_two_tunings_do_not_share_a_file(tuned):
    run = eval_synthetic.Run(settings.load(["--init_from=ape.pt", *TUNE, "--task_lr=1e-3"]))
    with held_elsewhere(f"{run.result}.lock"):
        message = refusal(eval_synthetic.main, ["--init_from=ape.pt", *TUNE, "--task_lr=1e-3"])
        assert message.startswith(f"error: {tuned[1]} is being made by another process")


def test_a_study_is_a_line_for_each_result(tuned, capsys):
    with open("study.jsonl", "w") as study:
        for path in tuned:
            part = "small" if "plain" in path else "main"
            result = {"part": part} | json.load(open(path))
            study.write(json.dumps(result) + "\n")
    plot_synthetic.main(["study.jsonl", "--part=small"])
    of_study = capsys.readouterr().out
    assert "plain without marks" in of_study and "ape with" not in of_study
    plot_synthetic.main([path for path in tuned if "plain" in path])
    assert capsys.readouterr().out == of_study
    assert "no results in study.jsonl, or none of --part=large" in \
        refusal(plot_synthetic.main, ["study.jsonl", "--part=large"])


def test_bad_results_are_refused_in_one_line(tuned):
    def refused(*paths):
        return refusal(plot_synthetic.main, list(paths))

    assert "no result results/*.json" in refused("results/*.json")
    part = json.dumps({"format": eval_synthetic.FORMAT, "rows": []})
    for name, content in {"list": "[]", "text": "hello", "other": '{"rows": []}',
                          "part": part}.items():
        for path in (f"{name}.json", f"{name}.jsonl"):
            open(path, "w").write(content)
        assert f"{name}.json is not a result of eval_synthetic.py" in refused(f"{name}.json")
        assert f"{name}.jsonl is not a study" in refused(f"{name}.jsonl")
    assert "gone.jsonl: No such file" in refused("gone.jsonl")
    good = open(tuned[0]).read()

    def changed(name, before, after):
        open(name, "w").write(good.replace(before, after))
        return name

    old = changed("old.json", eval_synthetic.FORMAT, "synthetic tasks 0")
    assert "not of the format 'synthetic tasks 1'" in refused(old)
    digest = json.loads(good)["tests"]["192"]["sha256_of_prompts"]
    easier = changed("easier.json", digest, "0" * 64)
    assert "were measured on different test examples of copying at 192" in refused(tuned[0], easier)
    longer = changed("longer.json", '"train_length": 192', '"train_length": 256')
    assert "has results of different settings" in refused(tuned[0], longer)
    twice = changed("twice.json", "", "")
    assert "has two results of the same seeds" in refused(tuned[0], twice)


def test_what_only_some_seeds_measured_is_left_out_of_the_figure(tuned, capsys):
    path = "results/plain_without_marks_list_recall_none_none_192_s5_2.json"
    changes = (lambda rows: rows[0].update(row="no_meta"),
               lambda rows: rows[1].update(length=300),
               list.clear)
    for change in changes:
        result = eval_synthetic.read_result(path)
        change(result["rows"])
        json.dump(result, open(path, "w"))
        plot_synthetic.main(tuned)
        assert "written to results/synthetic.png" in capsys.readouterr().out


def test_the_figures_of_the_analysis_are_drawn_from_its_results(tmp_path, monkeypatch):
    for path in glob.glob(f"{HERE}/results/analysis/*.json"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(draw_analysis, "FOLDER", str(tmp_path))
    draw_analysis.main()
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    measured = {path.stem for path in tmp_path.glob("*.json")} & {*drawn}
    assert drawn == measured | {"rate_distortion_mark"} and len(drawn) == 7


# --------------------------------------------------------------------------------------
# analyze.py

@pytest.mark.parametrize("numbers", [1 << 24, 100], ids=["at once", "in chunks"])
@pytest.mark.parametrize("changes", [
    {}, {"bias": True}, {"pos": "none"}, {"pos": "absolute"},
    {"yarn_scale": 4.0, "original_block_size": 16}, {"zero_meta_pos": True},
    {"pos": "absolute", "zero_meta_pos": True}], ids=str)
def test_analysis_sees_the_attention_that_the_fast_path_computes(changes, numbers, monkeypatch):
    monkeypatch.setattr(analyze, "NUMBERS", numbers)
    model, idx = build(**changes), text_with_meta((4, 7))
    for name in ("attn", "meta_attn"):
        outputs = []
        handles = [getattr(block, name).register_forward_hook(
            lambda module, args, y, outputs=outputs: outputs.append(y))
            for block in model.transformer.h]
        inputs = analyze.attention_inputs(model, idx, name)
        for handle in handles:
            handle.remove()
        assert len(inputs) == len(outputs) == 2
        for (module, x, rope), y in zip(inputs, outputs):
            chunks = list(analyze.attention_rows(module, x, rope))
            assert len(chunks) > 1 or numbers > 100
            v = module.c_attn(x).chunk(3, -1)[2]
            v = v.view(*x.shape[:2], module.n_head, -1).transpose(1, 2)
            rows = [logits.softmax(-1) @ v[:, :, :rows.stop] for rows, logits in chunks]
            attended = torch.cat(rows, 2).transpose(1, 2).reshape(x.shape)
            assert torch.allclose(module.c_proj(attended), y)


def test_capture_leaves_the_model_as_it_was():
    model, idx = build(), text_with_meta((4, 7))
    before = model(idx)[0]
    stream = analyze.residual_stream(model, idx)
    final = rate_distortion.final_states(model, idx)
    assert len(stream) == 3 and torch.equal(stream[-1], final)
    assert torch.equal(stream[0], model.transformer.wte(idx))
    assert torch.equal(model.lm_head(model.transformer.ln_f(final)), before)
    assert torch.equal(model(idx)[0], before)
    blocks = [*model.transformer.h]
    with pytest.raises(IndexError):  # of an id beyond the vocabulary; hooks go all the same
        rate_distortion.inputs_of(model, idx + 99, blocks, zeroed=idx == META)
    assert torch.equal(model(idx)[0], before) and not any(b._forward_pre_hooks for b in blocks)


def test_zeroing_is_what_no_embed_does():
    model, idx = build(), text_with_meta((4, 7))
    [(_, x)] = rate_distortion.inputs_of(model, idx, [model.transformer.ln_f], idx == META)
    model.config = replace(model.config, zero_meta_embd=True)
    assert torch.equal(model.lm_head(model.transformer.ln_f(x)), model(idx)[0])


def test_entropy_is_that_of_its_definition():
    logits = torch.randn(3, 5, 7, dtype=torch.float64)
    logits[0, :, 4:] = -math.inf
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(analyze.entropy(logits), expected)
    assert analyze.entropy(torch.zeros(8)).item() == pytest.approx(math.log(8))


def entropy_slope(logits, keys):
    """dH/dDelta as the logits of some keys (bool, like logits) rise together by Delta.

    It is -sum over them of a_j (log a_j + H); autograd and differences check it below.
    """
    a, H = logits.softmax(-1), analyze.entropy(logits).unsqueeze(-1)
    return ((torch.special.entr(a) - a * H) * keys).sum(-1)


def measured_slope(logits, keys, delta=1e-4):
    """The same by a central difference: for logits in float64."""
    higher, lower = analyze.entropy(logits + delta * keys), analyze.entropy(logits - delta * keys)
    return (higher - lower) / (2 * delta)


def test_entropy_falls_exactly_where_the_theorem_has_its_condition():
    torch.manual_seed(0)
    logits = torch.randn(400, 9, dtype=torch.float64)
    keys = F.one_hot(torch.arange(400) % 9, 9).bool()
    slope, meets = entropy_slope(logits, keys), analyze.meets_condition(logits)[keys]
    assert ((slope < 0) == meets).all() and 50 < meets.sum() < 350
    small_step = analyze.entropy(logits + 1e-3 * keys) - analyze.entropy(logits)
    assert ((small_step < 0) == meets).double().mean() > 0.99
    for raised in (keys, torch.rand(400, 9) < 0.4):  # one key, and several together
        leaf = logits.clone().requires_grad_()
        analyze.entropy(leaf).sum().backward()
        expected = (leaf.grad * raised).sum(-1)
        assert torch.allclose(entropy_slope(logits, raised), expected)
        assert torch.allclose(measured_slope(logits, raised), expected, atol=1e-7)


def test_the_theorems_slope_holds_on_the_models_own_rows():
    model, idx = build(), text_with_meta((9, 12), T=60)
    is_meta, n_rows = idx == META, 0
    for inputs in analyze.attention_inputs(model, idx, "attn", zeroed=is_meta):
        for rows, logits in analyze.attention_rows(*inputs):
            keys = is_meta[:, None, None, :rows.stop] & logits.isfinite()
            is_query = ~is_meta[:, None, rows].expand(logits.shape[:-1]) & keys.any(-1)
            logits, keys = logits[is_query], keys[is_query]                # (rows, keys)
            meets = analyze.meets_condition(logits)
            for of in (logits.masked_fill(~keys, -math.inf).argmax(-1),
                       logits.masked_fill(~keys, math.inf).argmin(-1)):
                one = F.one_hot(of, logits.size(-1)).bool()
                slope = entropy_slope(logits, one)
                assert torch.allclose(slope, measured_slope(logits, one), rtol=0, atol=1e-7)
                assert ((slope < 0) == meets[one]).all() and (slope < 0).any() and (slope > 0).any()
            together = entropy_slope(logits, keys)
            assert torch.allclose(together, measured_slope(logits, keys), rtol=0, atol=1e-7)
            assert (together < 0).any() and (together > 0).any()
            n_rows += len(logits)
    assert n_rows > 100


def planted_boost(boost):
    """One head in which queries give meta-tokens the logit `boost`, and others 0."""
    model = build(n_layer=1, n_head=1, pos="none", bias=True, meta_attention=False)
    u = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(8)
    v = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).repeat(4)
    block = model.transformer.h[0]  # u and v are orthogonal, LayerNorm leaves them alone
    with torch.no_grad():
        model.transformer.wte.weight[:] = v
        model.transformer.wte.weight[META] = u
        block.ln_1.weight.fill_(1)
        block.ln_1.bias.zero_()
        block.attn.c_attn.weight.zero_()
        block.attn.c_attn.bias.zero_()
        block.attn.c_attn.bias[0] = 4 * boost   # q = (4 boost, 0, ...), divided by sqrt(16)
        block.attn.c_attn.weight[16] = u / 16   # k = (1, 0, ...) at meta-tokens
    return model


def test_a_planted_boost_is_recovered():
    boost, idx = 2.0, text_with_meta((4, 7), T=32)
    model, is_meta = planted_boost(boost), idx == META
    control = analyze.random_text(is_meta, ~is_meta, torch.Generator().manual_seed(1))
    assert torch.equal(control.sum(1), is_meta.sum(1))
    assert not (control & is_meta).any() and not control[:, 0].any()
    queries = ~is_meta & ~control & (is_meta.cumsum(1) > 0)
    n, m = torch.arange(1, 33), is_meta.cumsum(1)
    Z = n - m + m * math.exp(boost)
    drop = n.log() - (Z.log() - m * math.exp(boost) / Z * boost)
    found = analyze.sharpen(model, idx, is_meta, queries)
    for name, expected in (("boost", boost), ("boost_keys", boost), ("drop", drop[queries])):
        values = found[name][:, 0, 0]                                      # (B, T)
        assert torch.equal(values.isnan(), ~queries)
        expected = torch.as_tensor(expected, dtype=torch.float64)
        assert torch.allclose(values[queries], expected, atol=1e-4)
    behind_both = queries & (control.cumsum(1) > 0)
    found = analyze.sharpen(model, idx, control, behind_both)
    for name in analyze.CHANGES:
        assert found[name][:, 0, 0][behind_both].abs().max() < 1e-6
    assert not found["share"].any()  # the row is sharp: text is below exp(-H)


@torch.no_grad()
def test_the_share_of_pairs_that_meet_the_condition_is_counted_before_the_logits_rise():
    model, idx = build(n_layer=1, n_head=1, pos="none"), text_with_meta((4, 7), T=32)
    keys, block, n_met, n_pairs = idx == META, model.transformer.h[0], [0, 0], [0, 0]
    x = block.ln_1(model.transformer.wte(idx).masked_fill(keys.unsqueeze(-1), 0))
    q, k, _ = block.attn.c_attn(x).chunk(3, -1)
    for row in range(2):
        for i in range(32):
            a = (k[row, :i + 1] @ q[row, i] / math.sqrt(16)).softmax(0)
            H = -(a * a.log()).sum()
            for j in range(i + 1):
                if keys[row, j] and not keys[row, i]:
                    n_pairs[row] += 1
                    n_met[row] += bool(a[j] > math.exp(-H))
    share = analyze.sharpen(model, idx, keys, ~keys)["share"][:, 0, 0]
    assert share.tolist() == pytest.approx([n_met[0] / n_pairs[0], n_met[1] / n_pairs[1]])
    assert 0 < n_met[0] < n_pairs[0]


def test_sharpening_is_measured_behind_the_first_of_both_kinds(looked_into):
    subject = analyze.Subject(settings.load(LOOK), ["sharpening"])
    found = analyze.measure_sharpening(subject)
    idx = torch.cat([idx for idx, _ in subject.batches("")])
    is_meta = idx == 257
    generator = torch.Generator().manual_seed(subject.config.seed)
    control = analyze.random_text(is_meta, ~is_meta, generator)
    behind = (is_meta.cumsum(1) > 0) & (control.cumsum(1) > 0)
    queries = behind & ~is_meta & ~control
    assert found["values"] == queries.sum() * 4  # layers and heads
    values = analyze.sharpen(subject.model, idx, control, queries)["drop"]
    means = values.double().nanmean(-1).mean((1, 2))
    drop = found["as many text tokens zeroed"]["drop"]
    assert drop["mean"] == pytest.approx(means.mean().item(), abs=1e-6)
    assert 98 < drop["percent"].sum() <= 100


def test_a_tuned_model_is_looked_into_as_it_reads_the_prompts_of_its_task(looked_into):
    save_tuned("out/tuned.pt", placement="task", mark=HASH)
    args = [*LOOK, "--init_from=out/tuned.pt", "--what=sharpening,residual"]
    subject = analyze.Subject(settings.load(args), ["sharpening", "residual"])
    [(idx, is_text)] = subject.batches("")
    assert idx.shape == is_text.shape == (4, 96) and subject.data is None
    for number, (row, is_own) in enumerate(zip(idx, is_text)):
        example = eval_synthetic.draw(subject.stream, "validation", 96, number)
        tokens = torch.from_numpy(example.tokens)
        assert torch.equal(row[:len(tokens)], tokens) and not is_own[len(tokens):].any()
        assert torch.equal(is_own[:len(tokens)], tokens != HASH)
    analyze.main(args)
    for name in ("sharpening", "residual"):
        assert result_of(name, "out/analysis/tuned")["read"] == "validation prompts of list_recall"


def test_a_planted_similarity_is_recovered():
    angle = 0.1 * torch.arange(40, dtype=torch.float64)  # similarity at distance d: cos(d / 10)
    x = 7 * torch.stack([angle.cos(), angle.sin()], -1).repeat(2, 1, 1)
    queries = torch.rand(2, 40) < 0.4
    found = analyze.similarity_by_distance(x, queries, ~queries, [1, 2, 3, 5, 100])
    expected = torch.tensor([0.1, 0.2], dtype=torch.float64).cos().expand(2, 2)
    assert torch.allclose(found[:, :2], expected)
    assert ((found[:, 2] > math.cos(0.4)) & (found[:, 2] < math.cos(0.3))).all()
    assert analyze.similarity_by_distance(x, queries & False, ~queries, [1, 5]).isnan().all()


def test_losses_are_the_models_own(monkeypatch):
    model, idx = build(), text_with_meta((4, 7), T=40)
    x, y = idx[:, :-1], idx[:, 1:]
    for numbers in (1 << 24, 1000):  # all logits at once, and in chunks
        monkeypatch.setattr(recall, "NUMBERS", numbers)
        losses = recall.text_losses(model, x, y)
        assert torch.equal(losses.isnan(), y == META)
        assert losses.nanmean().item() == pytest.approx(model(x, y)[1].item())


def test_every_variant_of_length_is_a_model_that_can_be_built():
    def lengths_of(runs):
        return {name: list(run) for name, run in runs.items()}
    runs = analyze.variants(TINY, [16, 64, 128, 256])
    assert lengths_of(runs) == {
        "as trained": [16, 64, 128, 256], "YaRN": [128, 256],
        "as trained, no_pos": [16, 64, 128, 256], "YaRN, no_pos": [128, 256]}
    c = build().reconfigured(**runs["YaRN, no_pos"][256]).config
    assert (c.block_size, c.yarn_scale, c.original_block_size, c.zero_meta_pos) == (64, 4, 64, True)
    learned = analyze.variants(replace(TINY, pos="absolute"), [16, 64, 128])
    assert lengths_of(learned) == {"as trained": [16, 64], "as trained, no_pos": [16, 64]}
    plain = replace(TINY, pos="none", meta_id=None, meta_attention=False)
    assert list(analyze.variants(plain, [128])) == ["as trained"]


LOOK = ["--dataset=d", "--device=cpu", "--analysis_blocks=4", "--bottleneck_examples=24",
        "--bottleneck_steps=4", "--bottleneck_seeds=2", "--train_length=96", "--workers=1",
        "--meta_rate=0.2"]


@pytest.fixture
def looked_into(workplace):
    """Data in blocks of 96 tokens, and an untrained checkpoint out/ckpt.pt for them."""
    prepare.prepare(configure("--block_size=96", "--meta_rate=0.2"))
    os.makedirs("out")
    save_model("out/ckpt.pt", block_size=96, n_layer=2)
    return workplace


def test_a_planted_loss_is_found_where_it_is(looked_into, monkeypatch):
    """A loss that grows from 0 to 1 over what is read."""
    monkeypatch.setattr(analyze, "text_losses", lambda model, x, y: (
        torch.arange(x.size(1)) / x.size(1)).expand(x.shape))
    monkeypatch.setattr(rate_distortion, "TOKENS", 200)  # less than one sequence
    analyze.main([*LOOK, "--what=perplexity"])
    figures = result_of("perplexity")
    assert figures["sequences"] == 4 and figures["window"] == 96
    by_context = figures["by_context"]
    assert list(by_context["as trained"]) == ["24", "48", "96", "192", "384"]
    for length in (96, 192, 384):
        mean = by_context["as trained, no_pos"][str(length)]["mean"]
        assert mean == pytest.approx(1 - 6.5 / length, abs=1e-5)
    low = by_context["YaRN"]["384"]["minus_one_window"]["low"]
    assert low == pytest.approx(6.5 / 96 - 6.5 / 384, abs=1e-5)


def test_analysis_writes_all_its_parts(looked_into, capsys):
    analyze.main([*LOOK, "--init_from=out", "--start=def f(self, x): return x"])
    out = capsys.readouterr().out
    names = [name for name in analyze.PARTS if name != "cache"]  # it needs a tuned model
    assert out.count("\n") == len(names) + 1
    for name in names:
        with open(f"out/analysis/{name}.json") as file:
            result = json.load(file, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert result["what"] == name and result["summary"] in out
        assert result["checkpoint"]["step"] == 7 and result["config"]["analysis_blocks"] == 4
        assert len(result["checkpoint"]["sha256_of_weights"]) == 64
        assert result["command"].startswith("python analyze.py --dataset=d")
        assert open(f"out/analysis/{name}.png", "rb").read(4) == b"\x89PNG"
    panels = result_of("rate_distortion")["panels"]
    assert [list(panel["curves"]) for panel in panels] == [
        ["out"],
        ["the mark after the queried list", "the text token before the mark",
         "mean over the text up to there"],
        ["the meta-token", "the text token before it"]]
    assert np.shape(panels[0]["curves"]["out"]["rate"]) == (10, 2)
    assert panels[0]["examples"] == {"train": 24, "validation": 6, "test": 12}
    assert not glob.glob("out/analysis/*.tmp")


def test_no_part_of_the_analysis_takes_a_text_for_a_formula(looked_into, monkeypatch):
    drawn = texts_of_figures(monkeypatch)
    analyze.main([*LOOK, "--label=a$b_$c"])
    analyze.main([*LOOK, "--what=attention", "--start=$x_$ and more"])
    with_dollars = {text for text in drawn if "$" in text}
    assert {"$", "a$b_$c"} <= with_dollars
    assert all("a$b_$c" in text for text in with_dollars - {"$"})


def result_of(name, folder="out/analysis"):
    with open(f"{folder}/{name}.json") as file:
        return json.load(file)["figures"]


def test_attention_on_meta_tokens_is_measured_behind_the_first(looked_into):
    """Queries of zeros spread their attention evenly."""
    checkpoint_of_zeros = checkpoint.load("out")
    for name, weights in checkpoint_of_zeros["model"].items():
        if "c_attn" in name:
            weights.zero_()
    checkpoint.save("out/ckpt.pt", checkpoint_of_zeros)
    analyze.main([*LOOK, "--what=attention"])
    figures = result_of("attention")
    shares = figures["attention_on_meta_tokens"]
    is_meta = np.array([name == prepare.META for name in figures["tokens"]])
    uniform = is_meta.cumsum() / np.arange(1, len(is_meta) + 1)
    is_behind = np.arange(len(is_meta)) > is_meta.argmax()
    for kind, rows in (("text", ~is_meta), ("meta", is_meta)):
        own = shares[f"of {kind} queries"]
        assert own["queries"] == (rows & is_behind).sum()
        assert own["if_uniform"] == pytest.approx(uniform[rows & is_behind].mean(), abs=1e-5)
        assert np.allclose(own["per_layer_and_head"], own["if_uniform"], atol=1e-5)


@pytest.mark.parametrize("args, expected", [
    (["--what=sharpness"], "what=sharpness: no part sharpness; there are sharpening, residual, "
     "attention, rate_distortion, perplexity, recall, cache"),
    (["--init_from=plain.pt"], "sharpening, residual, attention: the checkpoint has no "
     "meta-tokens; it allows --what=rate_distortion,perplexity,recall"),
    (["--init_from=plain.pt", "--what=perplexity"],
     "data/d has 19 meta-tokens a block, but the checkpoint was trained without them"),
    (["--dataset=nothing"], "no data in data/nothing: run python prepare.py"),
    (["--what=attention", "--start=x", "--seed=1"],
     "the prompt of 1 tokens has no meta-token inside, at meta_rate=0.2"),
    (["--what=attention", f"--start={'x' * 99}"],
     "but a map has room for 96: give a shorter --start="),
    (["--what=attention", "--start=x", "--meta_rate=0"],
     "has no meta-token inside, at meta_rate=0.0"),
    (["--what=rate_distortion", "--compare=gone.pt"], "no checkpoint gone.pt"),
    (["--what=rate_distortion", "--compare=parity.pt"],
     "needs List Recall with tokenizer bytes, but parity was tuned on parity"),
    (["--what=rate_distortion", "--compare=a.pt,b.pt"],
     "tuned at different lengths, [96, 192] tokens"),
    (["--what=rate_distortion", "--compare=a.pt,a.pt"],
     "two models of one name, a: rename a file"),
    (["--what=rate_distortion", "--train_length=64"], "List Recall needs 83 tokens"),
    (["--what=cache"], "cache needs models tuned by eval_synthetic.py, which out is not"),
    (["--what=cache", "--init_from=a.pt", "--compare=parity.pt"],
     "tuned on different examples: list_recall, placement all, tokenizer bytes, 96 tokens; parity"),
    (["--what=cache", "--init_from=unmarked.pt"], "unmarked was tuned without"),
    (["--what=cache", "--init_from=a.pt", "--eval_lengths=96,64"],
     "eval_lengths=96,64: list_recall needs 83 tokens"),
    (["--what=cache", "--init_from=ape.pt", "--eval_lengths=128"],
     "eval_lengths=128, but learned positions end at 96"),
    (["--what=perplexity", "--block_size=9999"],
     "two sequences of four windows (block_size=9999) need"),
    (["--what=recall", "--compare=bpe.pt"],
     "bpe reads tokens of gpt2, but out of bytes: compare models of one tokenizer"),
    (["--what=recall", "--compare=short.pt"],
     "short has a window of 90 tokens, too few for 77 text tokens and 19 meta-tokens"),
    (["--what=recall", "--block_size=80"], "two windows of more than 64 text tokens, but they "
     "have 64, and data/d has"),
    (["--what=recall", "--block_size=9999"], "text tokens, but they have 7999, and data/d has"),
    (["--init_from=nowhere"], "no checkpoint nowhere"),
    (["--analysis_blocks=0"], "analysis_blocks=0 must be positive"),
])
def test_what_cannot_be_looked_into_is_refused_in_one_line(looked_into, args, expected):
    save_model("plain.pt", meta_id=None, meta_attention=False, text_vocab_size=257)
    save_tuned("a.pt")
    save_tuned("b.pt", length=192)
    save_tuned("parity.pt", task="parity")
    save_tuned("unmarked.pt", mark=None)
    save_tuned("ape.pt", pos="absolute")
    save_model("short.pt", block_size=90)
    checkpoint.save("bpe.pt", torch.load("short.pt") | {"settings": {"tokenizer": "gpt2"}})
    assert expected in refusal(analyze.main, [*LOOK, *args])


def test_a_checkpoint_without_meta_tokens_has_its_perplexity(workplace):
    prepare.prepare(configure("--block_size=96", "--meta_rate=0"))
    save_model("plain.pt", block_size=96, pos="absolute", meta_id=None, meta_attention=False,
               text_vocab_size=257)
    analyze.main([*LOOK, "--init_from=plain.pt", "--what=perplexity"])
    figures = result_of("perplexity", "analysis/plain")
    assert list(figures["by_context"]["as trained"]) == ["24", "48", "96"]


def last_distance(text, place):
    """How far before place its bigram ended last: by comparing with all, 0 if never."""
    for distance in range(1, place):
        if text[place - distance - 1:place - distance + 1] == text[place - 1:place + 1]:
            return distance
    return 0


def test_the_distance_of_a_bigram_is_that_to_its_last_occurrence():
    for symbols in (1, 3, 10):
        text = np.random.default_rng(symbols).integers(symbols, size=90).tolist()
        expected = [last_distance(text, place) for place in range(1, 90)]
        assert recall.distances_of(text) == expected
    assert recall.distances_of([1, 2, 1, 2, 2, 1]) == [0, 0, 2, 0, 3]


def test_intervals_of_recall_are_those_of_a_bootstrap_over_windows():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 40, (300, 2))
    level = rng.normal(1, 0.5, (300, 1))  # tokens of one window resemble each other
    sums = counts * level + rng.normal(0, 1, (300, 2)) * counts**0.5
    found = recall.ratio(sums, counts)
    drawn = rng.integers(300, size=(4000, 300))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    assert np.allclose(found["mean"], sums.sum(0) / counts.sum(0))
    assert np.allclose(found["high"] - found["mean"], 1.96 * means.std(0), rtol=0.06)
    assert np.allclose(found["mean"] - found["low"], 1.96 * means.std(0), rtol=0.06)
    nowhere = recall.ratio(np.zeros((3, 1)), np.zeros((3, 1)))
    assert np.isnan([*nowhere.values()]).all()


@pytest.mark.parametrize("n_meta", [0, 5])
def test_a_text_token_is_predicted_by_whatever_stands_before_it(n_meta, monkeypatch):
    monkeypatch.setattr(rate_distortion, "TOKENS", 50)  # two windows at once
    model, text = build(), np.random.default_rng(0).integers(META, size=(3, 20))
    reading = recall.Reading(model, n_meta, "random")
    losses = recall.losses_of(reading, text, 7, "")
    places = prepare.meta_places(3, 20 + n_meta, n_meta, np.random.default_rng(7))
    for row, is_meta, own in zip(text.tolist(), places, losses):
        sequence = [META if meta else row.pop(0) for meta in is_meta]
        log_p = model(torch.tensor([sequence]))[0][0].log_softmax(-1)
        expected = [-log_p[i, token].item() for i, token in enumerate(sequence[1:])
                    if token != META]
        assert own.tolist() == pytest.approx(expected)


def val_text():
    """The validation text of data/d without its meta-tokens."""
    tokens, _, manifest = read_split("val")
    return tokens[tokens != manifest["meta_id"]].tolist()


@pytest.mark.parametrize("rate, size", [("0.2", 96), ("0", 50), ("0.5", 30)])
def test_windows_are_the_running_text_of_the_data(workplace, rate, size):
    config = configure(f"--block_size={size}", f"--meta_rate={rate}", "--analysis_blocks=9999")
    prepare.prepare(config)
    blocks = train.Blocks("data/d", prepare.read_manifest(config), "val")
    subject, text = SimpleNamespace(blocks=blocks, config=config), val_text()
    windows = recall.read_windows(subject, 77)
    assert len(windows) == len(text) // 77 > 9
    assert windows.flatten().tolist() == text[:77 * len(windows)]
    config.analysis_blocks = 3
    spread = windows[[0, (len(windows) - 1) // 2, -1]]
    assert np.array_equal(recall.read_windows(subject, 77), spread)


def test_a_planted_recall_is_found_where_it_is(looked_into, monkeypatch):
    """The model of three layers is 0.5 better at 32 to 63 tokens, and 0.25 worse on new
    bigrams; without meta-tokens any model is 2 worse at fewer than 32."""
    texts = []

    def planted(model, x, y):
        losses = torch.full(x.shape, math.nan)
        for row, (*before, last) in zip(losses, torch.cat([x, y[:, -1:]], 1).tolist()):
            places = [i for i, token in enumerate([*before, last]) if token != 257]
            text = [[*before, last][i] for i in places]
            texts.append((model.config.n_layer, len(before) + 1 - len(text), tuple(text)))
            assert places[0] == 0
            for place in range(1, len(text)):
                distance = last_distance(text, place)
                loss = 3 + text[place] / 256
                if model.config.n_layer == 3:
                    loss += 0.25 * (distance == 0) - 0.5 * (32 <= distance < 64)
                if len(text) == len(before) + 1 and 0 < distance < 32:
                    loss += 2
                row[places[place] - 1] = loss
        return losses

    monkeypatch.setattr(recall, "text_losses", planted)
    save_model("b.pt", block_size=120, n_layer=3)
    save_model("plain.pt", meta_id=None, meta_attention=False, text_vocab_size=257)
    analyze.main([*LOOK, "--what=recall", "--compare=b.pt,plain.pt"])
    found = result_of("recall")
    text = val_text()
    firsts = [77 * int(i) for i in np.linspace(0, len(text) // 77 - 1, 4)]
    expected = {tuple(text[first:first + 77]) for first in firsts}
    for reader in ((2, 19), (3, 19), (1, 0), (2, 0), (3, 0)):
        read = [own for *who, own in texts if tuple(who) == reader]
        assert len(read) == 4 and set(read) == expected
    distances = [last_distance(list(own), place) for own in expected for place in range(64, 77)]
    counts = [sum(low <= d < high for d in distances)
              for low, high in ((0, 1), (1, 32), (32, 64), (64, 76))]
    assert found["classes"] == ["new", "1-31", "32-63", "64-75"] and found["tokens"] == counts
    differences = {name: own["mean"] for name, own in found["minus_first"].items()}
    assert differences == {
        "b": [0.25, 0, -0.5, 0], "plain": [0, 2, 0, 0], "out, no meta-tokens": [0, 2, 0, 0],
        "b, no meta-tokens": [0.25, 2, -0.5, 0]}
    assert found["minus_first"]["b"]["low"] == found["minus_first"]["b"]["high"]


def test_recall_of_bpe_and_of_a_model_that_is_alone(workplace, capsys):
    gpt2_bpe()
    prepare.prepare(configure("--tokenizer=gpt2", "--block_size=40", "--meta_rate=0"))
    save_model("plain.pt", vocab_size=50304, meta_id=None, meta_attention=False,
               text_vocab_size=50257, pos="absolute", block_size=80)
    saved = torch.load("plain.pt")
    checkpoint.save("plain.pt", saved | {"settings": {"tokenizer": "gpt2"}})
    analyze.main([*LOOK, "--init_from=plain.pt", "--what=recall"])
    found = result_of("recall", "analysis/plain")
    assert found["text_per_window"] == 72 and found["minus_first"] == {}
    assert "recall: loss of bigrams last seen 64-70 text tokens before" in capsys.readouterr().out


# --------------------------------------------------------------------------------------
# analyze.py: caching

@pytest.mark.parametrize("name", ["bytes", "gpt2"])
@pytest.mark.parametrize("task", eval_synthetic.TASKS)
def test_the_queried_unit_is_the_one_that_answers_the_question(task, name):
    encoding, length = tokenizer(name), ROOM[name][1]
    mark = encoding.n_vocab
    for placement in ("task", "all", "random"):
        stream = stream_of(task, mark, placement, name=name)
        for e in examples(task, 20, length, placement, mark, name):
            is_before, is_in_unit = recall.find_question(e, stream)
            before, unit, rest = (prepare.decode(encoding, e.tokens[own].tolist())
                                  for own in (is_before, is_in_unit, ~is_before))
            assert before == e.prompt[:e.prompt.index("Question: ")]
            assert before + rest == e.prompt + e.answer
            assert unit.endswith("\n") and unit.count("\n") == 1 and "\n" + unit in "\n" + before
            answer, _ = read_answer(unit + rest.removesuffix(e.answer))
            assert e.answer == f" {answer}"
            if placement == "task":
                assert not np.any(is_before & ~is_in_unit & (e.tokens == mark))


def visible_by_reading(e, mark, rng):
    """[places before the question that a condition shows], from an example's text."""
    text = "".join("#" if token == mark else chr(token) for token in e.tokens)
    question = text.index("Question: ")
    name = re.search(r"(?:list|bits|text) (\w+)\?", text)[1]
    [unit] = re.finditer(rf"^(?:List|Bits|Text) {name}: .*\n", text, re.M)
    marks = [i for i in range(question) if text[i] == "#"]
    letters = [i for i in range(1, question) if text[i] != "#"]
    drawn = rng.choice(letters, len(marks), replace=False).tolist()
    return question, [range(question), [0], [0, *marks], [0, *drawn], [0, *range(*unit.span())]]


def states_after_forgetting(model, e, question, shown):
    """Read up to the question, spoil all that is not shown, and read on: (A, C)."""
    x = torch.from_numpy(e.tokens[None, :-1])
    caches = sample.CachedDecoder(model, 1, x.size(1)).caches
    model.hidden_states(x[:, :question], caches=caches)
    hidden = sorted({*range(question)} - {*shown})
    caches[0].is_real[:, hidden] = False
    for kept in (caches[0].k, caches[0].v):                           # (L, 1, nh, T, hs)
        kept[..., hidden, :] = torch.randn_like(kept[..., hidden, :])
    for kept in caches:
        kept.is_prompt = False
    return model.hidden_states(x[:, question:], caches=caches)[0, -e.n_answer:]


@pytest.mark.parametrize("changes", [{}, {"pos": "absolute", "block_size": 320}, PLAIN], ids=str)
@pytest.mark.parametrize("task", eval_synthetic.TASKS)
@torch.no_grad()
def test_what_is_hidden_could_as_well_be_noise(task, changes, monkeypatch):
    """And the rest is as it was: a cache of keys and values gives the same states."""
    model = small_model(**changes).double().eval()
    for p in model.parameters():
        p.normal_(0, 0.2)
    mark, seen, compute = model.config.meta_id or HASH, [], eval_synthetic.answer_states
    monkeypatch.setattr(eval_synthetic, "answer_states",
                        lambda *args: seen.append(compute(*args)) or seen[-1])
    monkeypatch.setattr(rate_distortion, "TOKENS", 600)  # batches of two
    drawn = examples(task, 4, 300, "all", mark)
    reader = rate_distortion.Reader(model, "", stream_of(task, mark, "all"))
    recall.right_answers(reader, drawn, 300, "cpu", seed=3)
    rng = np.random.default_rng(3)
    for i, e in enumerate(drawn):
        question, conditions = visible_by_reading(e, mark, rng)
        of_example = [states[i % 2, :e.n_answer] for states in seen[i // 2 * 5:][:5]]
        for states, shown in zip(of_example, conditions):
            expected = states_after_forgetting(model, e, question, shown)
            torch.testing.assert_close(states, expected)
        for a, b in itertools.combinations(of_example, 2):
            assert not torch.allclose(a, b)  # no condition is another one


def test_with_everything_visible_exact_match_is_that_of_tuning():
    """Every other example asks for the model's own answer."""
    model, stream = small_model().eval(), stream_of("copying", 257, "all")
    drawn = examples("copying", 20, 256, "all", 257)
    for e in drawn[::2]:
        prompt = torch.from_numpy(e.tokens[None, :-e.n_answer])
        e.tokens = model.generate(prompt, e.n_answer, temperature=0)[0].numpy()
    right = recall.right_answers(rate_distortion.Reader(model, "", stream), drawn, 256, "cpu", 0)
    measured, _, _ = eval_synthetic.measure(model, drawn, 256, Machine("cpu", "float32"))
    assert right["everything"].tolist() == measured.tolist() == [True, False] * 10


def store(name, word, rng):
    """A task whose answer is the letter before the mark."""
    letter = "abcdefgh"[rng.integers(8)]
    return eval_synthetic.Unit(f"List {name}: {letter}{eval_synthetic.MARK}\n",
                               f"Question: list {name}?", letter, [*"abcdefgh"])


class Planted:
    """Knows the letter before the mark wherever one key is visible: that of the mark
    (distance 0), or that of the letter (distance 1).
    """
    config = GPTConfig(vocab_size=320, meta_id=257)

    def __init__(self, distance):
        self.distance = distance

    def hidden_states(self, idx, n_meta, caches):
        _, _, mask = caches[0].update(0, None, None)                      # (B, 1, T, T)
        mark = (idx == 257).int().argmax(1, keepdim=True)                 # (B, 1)
        key = (mark - self.distance).unsqueeze(1).expand(-1, idx.size(1), -1)  # (B, T, 1)
        is_visible = mask[:, 0].gather(2, key)                            # (B, T, 1)
        return F.one_hot(idx.gather(1, mark - 1), 320) * is_visible       # (B, T, 320)

    def lm_head(self, states):
        return states


@pytest.mark.parametrize("distance, expected", [
    (0, {"everything": 1, "nothing": 0, "marks alone": 1, "random text": 0, "queried unit": 1}),
    (1, {"everything": 1, "nothing": 0, "marks alone": 0, "random text": 0.02,
         "queried unit": 1})], ids=["caching", "looking up"])
def test_a_planted_way_to_answer_is_told_from_the_other(monkeypatch, distance, expected):
    monkeypatch.setitem(eval_synthetic.TASKS, "store", store)
    reader = rate_distortion.Reader(Planted(distance), "", stream_of("store", 257))
    drawn = examples("store", 200, 80, "task", 257)
    right = recall.right_answers(reader, drawn, 80, "cpu", 0)
    for condition, share in expected.items():  # one of 50 letters is drawn at random
        assert right[condition].mean() == pytest.approx(share, abs=0.03 if 0 < share < 1 else 0)


def test_tuned_models_are_compared_under_every_condition(workplace, capsys):
    save_tuned("a.pt")
    save_tuned("b.pt", mark=HASH)
    look = ["--what=cache", "--init_from=a.pt", "--device=cpu", "--workers=1", "--test_examples=6"]
    analyze.main([*look, "--compare=b.pt", "--eval_lengths=128,96"])
    assert "a: everything 0.0%, nothing 0.0%, marks alone 0.0%" in capsys.readouterr().out
    assert open("analysis/a/cache.png", "rb").read(4) == b"\x89PNG"
    figures = result_of("cache", "analysis/a")
    assert list(figures["by_length"]) == ["96", "128"] and figures["train_length"] == 96
    for length, own in figures["by_length"].items():
        drawn = [eval_synthetic.draw(stream_of(placement="all"), "test", int(length), i)
                 for i in range(6)]
        assert own["sha256_of_prompts"] == eval_synthetic.facts(drawn)["sha256_of_prompts"]
        assert own["n"] == 6 and list(own["models"]) == ["a", "b"]
        for found in own["models"].values():
            assert list(found) == list(recall.CONDITIONS)
            for point in found.values():
                assert point["low"] <= point["exact"] <= point["high"]


# --------------------------------------------------------------------------------------
# rate_distortion.py

def test_the_rate_is_the_kl_to_the_prior():
    mu, log_var = torch.randn(2, 5, 7, dtype=torch.float64)
    own = torch.distributions.Normal(mu, (log_var / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    expected = torch.distributions.kl_divergence(own, prior).sum(-1)
    assert torch.allclose(rate_distortion.kl_to_prior(mu, log_var), expected)


def test_a_gaussian_source_gives_its_known_curve(monkeypatch):
    """y is Gaussian in 30 bins, h correlates with it by rho. So, with a slope of -beta,

    D(R) = H(y) + log(1 - rho^2 (1 - exp(-2 R))) / 2.
    """
    monkeypatch.setattr(rate_distortion, "LATENT", 4)
    torch.manual_seed(0)
    rho, betas, edges = 0.8, (0.05, 0.2, 0.4), torch.linspace(-2.4, 2.4, 29)
    x, y = {}, {}
    for split, n in (("train", 20000), ("validation", 4000), ("test", 8000)):
        source = torch.randn(n)
        y[split] = torch.bucketize(source, edges)
        x[split] = (rho * source + math.sqrt(1 - rho**2) * torch.randn(n)).unsqueeze(-1)
    cdf = F.pad(torch.distributions.Normal(0, 1).cdf(edges), (1, 1))
    cdf[-1] = 1
    entropy = torch.distributions.Categorical(cdf.diff()).entropy().item()
    D, R = rate_distortion.rate_distortion_curve(x, y, betas, seeds=2, steps=800, lr=0.05)
    assert D.shape == R.shape == (3, 2)
    known = entropy + 0.5 * np.log(1 - rho**2 * (1 - np.exp(-2 * R)))
    excess = D - known  # at best 0, but for the noise of 8000 examples
    assert excess.min() > -0.02 and excess.max() < 0.06
    best = [-0.5 * math.log(beta * (1 - rho**2) / (rho**2 * (1 - beta))) for beta in betas]
    assert np.abs(R.mean(1) - best).max() < 0.2


def save_tuned(path, length=96, pos="rope", **changes):
    """A checkpoint as eval_synthetic.py leaves it."""
    save_model(path, block_size=96, pos=pos)
    stream = {"task": "list_recall", "placement": "all", "mark": 257, "tokenizer": "bytes",
              "seed": 3} | changes
    run = {"stream": stream, "train_length": length}
    checkpoint.save(path, torch.load(path) | {"run": run})


def test_models_are_compared_on_the_same_examples(looked_into, monkeypatch):
    seen, compute = [], rate_distortion.recall_features
    monkeypatch.setattr(rate_distortion, "recall_features",
                        lambda *args: seen.append(compute(*args)) or seen[-1])
    save_tuned("out/a.pt")
    save_tuned("out/b.pt", mark=None)
    shutil.rmtree("data")  # List Recall needs none
    analyze.main([*LOOK, "--init_from=out/a.pt", "--compare=out/b.pt", "--what=rate_distortion"])
    panels = result_of("rate_distortion", "out/analysis/a")["panels"]
    assert list(panels[0]["curves"]) == ["a", "b"]
    answers = [str(own["y"].tolist()) for own in seen]
    assert len(seen) == 6 and len({*answers}) == 3  # each split's are the same for both


@pytest.mark.parametrize("placement", ["task", "all"])
def test_states_within_a_prompt_are_taken_at_the_queried_list(monkeypatch, placement):
    """The planted state of a token is its own position."""
    monkeypatch.setattr(rate_distortion, "final_states", lambda model, x: torch.arange(
        x.size(1)).expand(x.shape).unsqueeze(-1).float())
    stream = eval_synthetic.Stream("list_recall", placement, 257, "bytes", 0)
    examples = [eval_synthetic.draw(stream, "test", 256, i) for i in range(20)]
    monkeypatch.setattr(eval_synthetic, "draw_split", lambda *_: examples)
    reader = rate_distortion.Reader(None, "", stream)
    features = rate_distortion.recall_features(reader, "test", 20, 256, "cpu", None)
    for i, e in enumerate(examples):
        text = "".join("#" if token == 257 else chr(token) for token in e.tokens)
        name = re.search(r"of list (\w+)\?", text)[1]
        at = text.index(".#", text.index(f"List {name}: ")) + 1
        found = [features[key][i].item() for key in ("meta", "text", "answer")]
        assert found == [at, at - 1, text.index("Answer:# ") + 8]
        assert chr(features["first"][i]) == e.answer[1]
        before = [j for j in range(at) if text[j] != "#"]
        assert features["mean"][i].item() == pytest.approx(np.mean(before))
        assert eval_synthetic.ITEMS[features["y"][i]] == e.answer.strip()


def test_next_tokens_are_the_same_from_both_places(looked_into):
    manifest = prepare.read_manifest(settings.load([*LOOK]))
    blocks = train.Blocks("data/d", manifest, "val")
    model = small_model(block_size=96, n_layer=1)
    states = rate_distortion.next_token_features(model, blocks, range(2), 1000, "cpu")
    x, y = blocks.batch(np.random.default_rng(0).permutation(range(2)))
    expected = []
    for row in torch.cat([x, y[:, -1:]], 1).tolist():
        for i in range(1, 96):
            if row[i] == 257 and row[i - 1] != 257 and row[i + 1] != 257:
                expected.append(row[i + 1])
    assert states["y"].tolist() == expected and len(expected) > 10
    assert len(states["meta"]) == len(states["text"]) == len(expected)


def test_text_too_short_for_three_parts_is_refused():
    subject = SimpleNamespace(blocks=[0, 1], device="cpu", config=settings.load([]))
    sizes = {"train": 4, "validation": 1, "test": 2}
    assert "2 validation blocks cannot be cut into three parts" in refusal(
        rate_distortion.plain_text_panel, subject, sizes)


# --------------------------------------------------------------------------------------
# The scripts as a user types them

@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A folder in which the first command of README has been run, on less data."""
    folder = tmp_path_factory.mktemp("quickstart")
    result = script("train.py", f"{HERE}/config/quickstart.py", "--max_iters=3",
                    "--eval_tokens=512", "--batch_size=2", cwd=folder)
    return folder, result


def test_the_quickstart_prepares_trains_and_samples(quickstart):
    folder, result = quickstart
    assert result.returncode == 0, result.stderr
    assert "A sample:" in result.stdout
    assert (folder / "out/loss.png").exists()


def test_sample_reads_its_prompt_from_a_file_and_streams(quickstart):
    folder, _ = quickstart
    (folder / "prompt.txt").write_text("def main(")
    result = script("sample.py", "--max_new_tokens=30", "--start=FILE:prompt.txt", "--show_meta",
                    "--stream", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.replace("<|meta|>", "").startswith("def main(")
    assert "<|meta|>" in result.stdout
    assert "[longer than the window" not in result.stderr


def test_sample_reads_its_prompt_from_a_pipe_and_says_when_the_window_ends(quickstart):
    folder, _ = quickstart
    result = script("sample.py", "--max_new_tokens=250", "--start=-", "--temperature=0",
                    cwd=folder, input="def main(")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def main(")
    assert "<|meta|>" not in result.stdout
    assert "[longer than the window of 256 tokens" in result.stderr


def test_sample_ends_quietly_when_its_reader_has_enough(quickstart):
    folder, _ = quickstart
    sampling = f"{sys.executable} {HERE}/sample.py --stream --max_new_tokens=60"
    command = f"{sampling} | head -c 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=folder,
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert len(result.stdout) == 1


def test_train_overwrites_a_run_on_request_only(quickstart):
    folder, _ = quickstart
    again = script("train.py", f"{HERE}/config/quickstart.py", cwd=folder)
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1 and "--overwrite" in again.stderr


def test_one_config_file_drives_every_script(workplace, capsys):
    """The paper's config at a thousandth of its size, on a file in C4's format."""
    gpt2_bpe()
    with gzip.open("c4.json.gz", "wt") as file:
        for i, text in enumerate(TEXTS):
            row = {"text": text, "timestamp": "2019-04-25T12:57:54Z",
                   "url": f"https://example.org/{i}"}
            file.write(json.dumps(row) + "\n")
    arguments = [
        f"{HERE}/config/meta_gpt2.py", "--source=c4.json.gz", "--val_fraction=0.3", "--workers=1",
        "--n_embd=24", "--n_layer=1", "--max_iters=2", "--eval_tokens=1024", "--batch_size=1",
        "--gradient_accumulation_steps=2", "--device=cpu", "--dtype=float32"]
    prepare.main(arguments)
    prepare.main([*arguments, "--verify"])
    train.main(arguments)
    capsys.readouterr()
    sample.main([*arguments, "--start=The ", "--max_new_tokens=5"])
    assert capsys.readouterr().out.startswith("The ")
    train.main([*arguments, "--init_from=out/meta_gpt2", "--out_dir=next", "--max_iters=1"])
    with open("again.py", "w") as file:  # begins with one model and ends with another
        file.write('init_from = "out/meta_gpt2"\nout_dir = "next"\n')
    os.remove("out/meta_gpt2/ckpt.pt")
    sample.main(["again.py", "--device=cpu", "--max_new_tokens=5"])


def test_what_a_terminal_cannot_print_is_a_question_mark(quickstart):
    result = script("sample.py", "--max_new_tokens=20", "--device=cpu", "--start=\u2713 \u00e9",
                    env={"PYTHONIOENCODING": "cp1252"}, cwd=quickstart[0], encoding="cp1252")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("? \u00e9")


def test_a_refusal_is_one_line_and_a_non_zero_exit(tmp_path):
    for name in ("prepare.py", "train.py", "sample.py"):
        result = script(name, "--blok_size=3", cwd=tmp_path)
        assert result.returncode == 1 and result.stdout == ""
        assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
        assert not os.listdir(tmp_path)


# --------------------------------------------------------------------------------------
# bench.py

@pytest.mark.parametrize("changes", [{}, {"pos": "absolute"}, {"zero_meta_pos": True}])
def test_gathered_meta_tokens_compute_what_the_dense_mask_does(changes):
    model = build(**changes)
    dense = bench.DenseGPT(model.config).double()
    dense.load_state_dict(model.state_dict())
    idx = text_with_meta([5, 1, 0, 24])
    expected = dense.hidden_states(idx)
    assert torch.allclose(model.hidden_states(idx), expected, rtol=0, atol=1e-12)
    without = build(meta_attention=False, **changes)
    without.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(without.hidden_states(idx), expected, atol=1e-3)


def test_all_logits_at_once_give_the_loss_that_chunks_do():
    model = build(meta_id=None, meta_attention=False, pos="absolute")
    x, y = text_with_meta([0, 0]), text_with_meta([0, 0], seed=1)
    y[0, :7] = -1
    assert torch.allclose(bench.all_logits_loss(model, x, y, 0), model(x, y)[1], rtol=1e-12)


def test_the_benchmark_writes_a_row_for_each_variant(workplace, capsys):
    sizes = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=40", "--batch_size=2"]
    bench.main([*sizes, "--what=training,meta", "--device=cpu", "--dtype=float32"])
    printed = capsys.readouterr().out
    with open("results/bench_cpu_training_meta.json") as file:
        rows = json.load(file)["rows"]
    variants = {row["variant"]: row for row in rows}
    assert list(variants) == [
        "GPT-2 as nanoGPT, micro-batch 2", "GPT-2, micro-batch 2", "Meta+RoPE, micro-batch 2",
        "no meta-attention", "meta-attention", "meta-attention by a dense mask"]
    assert all(name in printed for name in variants)
    base, dense = variants["no meta-attention"], variants["meta-attention by a dense mask"]
    assert base["speedup"] == 1 and base["tokens_per_s"] == 2 * 40 / base["seconds"]
    assert dense["time_ratio"] == pytest.approx(dense["seconds"] / base["seconds"])
    assert not os.path.exists("results/bench_cpu_training_meta.json.part")


def test_the_benchmark_of_a_gpu_is_not_run_on_a_cpu_by_mistake(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "the device is cpu" in refusal(bench.main, ["--gpu"])


def test_the_benchmark_counts_text_tokens_alone():
    assert bench.draw(build(), 6, prompt=3, batch=2, meta_rate=0.3) == (12, 0)
    assert bench.draw_as_nanogpt(build(), 6, Machine("cpu", "float32")) == (6, 0)


def test_the_benchmark_of_preparation_leaves_out_what_is_no_text(tmp_path, monkeypatch):
    text = "def f(x):\n    return x\n" * 2000
    n_tokens = 8 * len(gpt2_bpe().encode_ordinary(text))
    (tmp_path / "good.py").write_text(text)
    (tmp_path / "latin.py").write_bytes(b"\xe9" * 100)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    alone, whole = bench.preparation(None, None, Machine("cpu", "float32"))
    assert alone["tokens_per_s"] * alone["seconds"] == pytest.approx(n_tokens)
    assert whole["tokens_per_s"] * whole["seconds"] == pytest.approx(n_tokens, abs=8)  # ends
