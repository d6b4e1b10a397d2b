"""Continues a prompt with a trained model.

    python sample.py                                          # from the checkpoint in out/
    python sample.py --start="def main(" --stream --show_meta
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --num_samples=3
"""
import codecs
import os
import sys

import config as settings
from prepare import decode, get_tokenizer, inject, meta_per_block, meta_places
from train import adopt_settings, load_saved, pick_device

import numpy as np
import torch


def read_start(config):
    """The prompt's text. Raises SystemExit if there is none."""
    if not config.given("start"):
        return None
    text = config.start
    if text == "-":
        text = sys.stdin.read()
    elif text.startswith("FILE:"):
        try:
            with open(text[5:], encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as e:
            raise config.error(f"start={config.start}: {getattr(e, 'strerror', None) or 'not UTF-8 text'}") from None
    if not text:
        raise config.error(f"start={config.start}: an empty prompt; leave it out for a start of our own")
    return text


def inject_prompt(tokens, config, meta_id):
    """A prompt with meta-tokens as in the training data."""
    n_meta = meta_per_block(config.meta_rate, config.block_size)
    blocks = -(-len(tokens) // (config.block_size - n_meta))
    places = meta_places(blocks, config.block_size, n_meta, np.random.default_rng(config.seed), config.meta_placement).ravel()
    end = np.flatnonzero(~places)[len(tokens) - 1] + 1
    return inject(np.array(tokens), places[:end], meta_id)


def run(config):
    device, dtype = pick_device(config)
    model, checkpoint = load_saved(config)
    adopt_settings(config, checkpoint, ("meta_rate", "meta_placement"))
    if model.config.meta_id is None and config.meta_rate > 0:
        if config.typed("meta_rate"):
            raise config.error(f"meta_rate={config.meta_rate}, but the model has no meta-tokens")
        config.meta_rate = 0.0
    encoding, text = get_tokenizer(config.tokenizer), read_start(config)
    prompt = [encoding.eot_token] if text is None else encoding.encode_ordinary(text)
    if config.meta_rate > 0:
        prompt = inject_prompt(prompt, config, model.config.meta_id)
    if model.config.pos == "absolute" and len(prompt) > model.config.block_size:
        raise config.error(f"the prompt has {len(prompt)} tokens, but the model has learned positions for "
                           f"{model.config.block_size}: shorten it")

    model.to(device, dtype).eval()
    prompt = torch.tensor(np.array(prompt), device=device).unsqueeze(0)
    options = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p, "meta_rate": config.meta_rate,
               "seed": config.seed, "compiled": config.compile == "true"}
    if prompt.size(1) + (config.max_new_tokens - 1) / (1 - config.meta_rate) > model.config.block_size:
        print(f"[longer than the window of {model.config.block_size} tokens: each time it is full, generation goes on from its last half]",
              file=sys.stderr)
    if not config.stream:
        for i, tokens in enumerate(model.generate(prompt.repeat(config.num_samples, 1), config.max_new_tokens, **options)):
            print(("-" * 40 + "\n" if i else "") + decode(encoding, tokens.tolist(), config.show_meta))
        return
    for i in range(config.num_samples):
        print(("-" * 40 + "\n" if i else "") + decode(encoding, prompt[0].tolist(), config.show_meta), end="", flush=True)
        bytes_to_text = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens
        for token in model.stream(prompt, config.max_new_tokens, **options | {"seed": config.seed + i}):
            if token.item() < encoding.eot_token:
                print(bytes_to_text.decode(encoding.decode_single_token_bytes(token.item())), end="", flush=True)
            elif config.show_meta:
                print(decode(encoding, [token.item()], show_meta=True), end="", flush=True)
        print(bytes_to_text.decode(b"", final=True))


def main(argv=None):
    try:
        run(settings.load(argv))
    except KeyboardInterrupt:
        raise SystemExit("") from None
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
