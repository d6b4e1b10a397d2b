"""The paper's second variant: meta-tokens and meta-attention with learned positions."""
dataset = "c4_meta"
source = "allenai/c4:en"
max_tokens = 89e9
out_dir = "out/meta_gpt2_ape"
pos = "absolute"
