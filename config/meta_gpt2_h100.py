"""The paper's model on one 80 GB GPU: 480 sequences a step, as on eight."""
dataset = "c4_meta"
source = "allenai/c4:en"
max_tokens = 89e9
out_dir = "out/meta_gpt2_h100"
batch_size = 48
gradient_accumulation_steps = 10
