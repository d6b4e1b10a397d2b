"""The baseline: GPT-2 with learned positions on plain text, 124M parameters."""
dataset = "c4"
source = "allenai/c4:en"
max_tokens = 99e9               # 200,000 steps read 98.3B text tokens
meta_rate = 0
out_dir = "out/gpt2"
pos = "absolute"
meta_attention = False
