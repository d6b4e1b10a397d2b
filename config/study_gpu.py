"""The study's models for one GPU: GPT-2's BPE, novels, recall within 512 tokens."""
dataset = "novels_meta"
source = "novels"               # a folder of text files; results/gpu_study.sh takes SOURCE=
val_fraction = 0.03
block_size = 512
n_layer = 6
n_head = 6
n_embd = 384
max_iters = 5000                # 82M positions: one H200 takes a minute
batch_size = 32
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 200
log_interval = 100
eval_interval = 1000
eval_tokens = 400_000
train_length = 512
eval_lengths = "128,256,512,768,1024"
phase_steps = 500               # four phases from 64 to 512
task_batch_size = 32
task_lr = 7e-4
val_interval = 250
test_examples = 1000
seed = 1
