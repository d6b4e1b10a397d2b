"""GPT-2 with RoPE on plain text: the paper's without meta-tokens, 124M parameters."""
dataset = "c4"
source = "allenai/c4:en"
max_tokens = 99e9
meta_rate = 0
out_dir = "out/gpt2_rope"
meta_attention = False
