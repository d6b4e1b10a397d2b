"""Meta-tokens without meta-attention, as pause tokens (Goyal et al. 2024).

The comparison shows what meta-attention adds.
"""
dataset = "c4_meta"
source = "allenai/c4:en"
max_tokens = 89e9
out_dir = "out/pause_gpt2"
meta_attention = False
