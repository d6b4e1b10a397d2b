"""Where tuned models take their answers to List Recall from: of greedy answers, the share that is right, that stands in the
queried list, and that stands in any list of the prompt.

    python results/which_list.py out/study/*list_recall*.pt
"""
import os
import re
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import eval_synthetic
from model import GPT, load_checkpoint

EXAMPLES = 400

for path in sys.argv[1:]:
    checkpoint = load_checkpoint(path)
    model, stream = GPT.from_checkpoint(checkpoint).eval(), eval_synthetic.Stream(**checkpoint["run"]["stream"])
    right = in_queried = in_any = 0
    for number in range(EXAMPLES):
        example = eval_synthetic.draw(stream, "test", checkpoint["run"]["train_length"], number)
        prompt = torch.from_numpy(example.tokens[:-example.n_answer])[None]
        tokens = model.generate(prompt, example.n_answer, temperature=0)[0, prompt.size(1):].tolist()
        answer = eval_synthetic.get_encoding(stream.tokenizer).decode(tokens).strip()
        lists = {name: items.split(", ") for name, items in re.findall(r"^List (\w+): (.*)\.$", example.prompt, re.M)}
        right += answer == example.answer.strip()
        in_queried += answer in lists[re.search(r"of list (\w+)\?", example.prompt)[1]]
        in_any += any(answer in items for items in lists.values())
    print(f"{path}: right {100 * right / EXAMPLES:.1f}%, from the queried list {100 * in_queried / EXAMPLES:.1f}%, from any list "
          f"{100 * in_any / EXAMPLES:.1f}% of {EXAMPLES}", flush=True)
