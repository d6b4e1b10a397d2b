"""Extends a trained meta_gpt2 from 1024 to 4096 tokens by YaRN.

It trains on for 400 steps, as YaRN's authors do.
"""
init_from = "out/meta_gpt2"
dataset = "c4_meta_4k"
source = "allenai/c4:en"
max_tokens = 1.2e9              # enough to include text that meta_gpt2 held out
out_dir = "out/yarn_4k"
block_size = 4096
yarn_scale = 4
batch_size = 3
gradient_accumulation_steps = 40
max_iters = 400
learning_rate = 6e-5
min_lr = 6e-6
warmup_iters = 20
eval_interval = 100
eval_tokens = 500_000
