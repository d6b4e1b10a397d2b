"""OpenAI's GPT-2 (124M) with added meta-tokens and meta-attention, 1B more tokens."""
init_from = "gpt2"
dataset = "c4_meta_1b"
source = "allenai/c4:en"
max_tokens = 1e9
val_fraction = 0.005
out_dir = "out/finetune_gpt2_meta"
meta_attention = True
max_iters = 2000
learning_rate = 1e-4
min_lr = 1e-5
warmup_iters = 100
eval_interval = 250
