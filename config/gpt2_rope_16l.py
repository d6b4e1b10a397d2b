"""The parameter-matched control: GPT-2 with RoPE and 16 layers on plain text.

Its 152M parameters are those of 12 layers with meta-attention.
"""
dataset = "c4"
source = "allenai/c4:en"
max_tokens = 99e9
meta_rate = 0
out_dir = "out/gpt2_rope_16l"
n_layer = 16
meta_attention = False
