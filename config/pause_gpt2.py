"""Meta-tokens in the data but no meta-attention, as pause tokens (Goyal et al. 2024): what does the attention add?"""
dataset = "c4_meta"
source = "allenai/c4:en"
max_tokens = 89e9
out_dir = "out/pause_gpt2"
meta_attention = False
