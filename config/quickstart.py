"""A small Meta+RoPE model of Python source, byte by byte: five minutes on two cores."""
dataset = "stdlib"
source = "stdlib"
tokenizer = "bytes"
val_fraction = 0.05
block_size = 256
n_layer = 4
n_head = 6
n_embd = 192
max_iters = 6000
max_minutes = 4.5
batch_size = 16
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
eval_interval = 250
eval_iters = 8
