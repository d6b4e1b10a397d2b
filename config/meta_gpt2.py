"""The paper's model: GPT-2 with meta-tokens, meta-attention and RoPE, 152M parameters.

It reads 98B tokens of C4. These are the defaults, written out, and max_tokens. On eight
GPUs, each takes 5 micro-batches of 12 sequences in a step: 480 in all.
"""
dataset = "c4_meta"
source = "allenai/c4:en"
max_tokens = 89e9               # 200,000 steps read 88.5B text tokens and 9.8B meta-tokens
meta_rate = 0.1
out_dir = "out/meta_gpt2"
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
pos = "rope"
meta_attention = True
batch_size = 12
gradient_accumulation_steps = 5 * 8
max_iters = 200_000
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
