"""The study's models at a size for one GPU: GPT-2's BPE, tests up to 1024 tokens."""
dataset = "study_gpu_meta"      # results/study.sh takes --source= for more text
source = "stdlib"
val_fraction = 0.02
block_size = 512
n_layer = 6
n_head = 6
n_embd = 384
max_iters = 4000
batch_size = 64
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 200
log_interval = 100
eval_interval = 1000
eval_tokens = 655_360
train_length = 512
eval_lengths = "128,256,512,768,1024"
phase_steps = 500               # four phases from 64 to 512
task_batch_size = 32
val_interval = 100
test_examples = 1000
