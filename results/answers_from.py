"""Where tuned models take their answers to List Recall and Copying from: of greedy answers, the share that is right; whose
first word is an item of the list, or begins the span of the text, that was asked for; and of any list or span.

    python results/answers_from.py out/study/*list_recall*.pt out/study/*copying*.pt
"""
import os
import re
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import eval_synthetic
from train import load_checkpoint, model_of

EXAMPLES = 400


def offers(prompt):
    """{name: the first words of the answers that its list or text holds}."""
    lists = {name: items.split(", ") for name, items in re.findall(r"^List (\w+): (.*)\.$", prompt, re.M)}
    return lists or {name: [word] for name, word in re.findall(r"^Text (\w+): .*\[ (\w+)", prompt, re.M)}


for path in sys.argv[1:]:
    checkpoint = load_checkpoint(path)
    model, stream = model_of(checkpoint).eval(), eval_synthetic.Stream(**checkpoint["run"]["stream"])
    right = in_queried = in_any = 0
    for number in range(EXAMPLES):
        example = eval_synthetic.draw(stream, "test", checkpoint["run"]["train_length"], number)
        prompt = torch.from_numpy(example.tokens[:-example.n_answer])[None]
        tokens = model.generate(prompt, example.n_answer, temperature=0)[0, prompt.size(1):].tolist()
        answer, offered = eval_synthetic.get_encoding(stream.tokenizer).decode(tokens).strip(), offers(example.prompt)
        right += answer == example.answer.strip()
        word = re.match(r"\w*", answer)[0]
        in_queried += word in offered[re.search(r"(?:of list|in text) (\w+)\?", example.prompt)[1]]
        in_any += any(word in words for words in offered.values())
    print(f"{path}: right {100 * right / EXAMPLES:.1f}%, begun as what was asked for {100 * in_queried / EXAMPLES:.1f}%, as any "
          f"{100 * in_any / EXAMPLES:.1f}% of {EXAMPLES}", flush=True)
