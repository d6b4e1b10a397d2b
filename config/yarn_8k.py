"""Extends a trained meta_gpt2 from 1024 to 8192 tokens by YaRN.

It trains on for 400 steps, as YaRN's authors do.
"""
init_from = "out/meta_gpt2"
dataset = "c4_meta_8k"
source = "allenai/c4:en"
max_tokens = 1.2e9              # enough to include text that meta_gpt2 held out
out_dir = "out/yarn_8k"
block_size = 8192
yarn_scale = 8
batch_size = 1
gradient_accumulation_steps = 56
max_iters = 400
learning_rate = 6e-5
min_lr = 6e-6
warmup_iters = 20
eval_interval = 100
eval_tokens = 500_000
