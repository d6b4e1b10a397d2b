"""Tells where tuned models take their answers to List Recall and Copying from.

    python results/answers_from.py out/study/*list_recall*.pt out/study/*copying*.pt

Prints three shares of each model's greedy answers: those that are right; those whose
first word is an item of the list (or begins the span of the text) that was asked for;
and those whose first word is an item of any list (or begins any span).
"""
import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import config  # noqa: F401  it sets what torch reads when it is loaded
import checkpoint
import eval_synthetic

import torch

EXAMPLES = 400


def first_words(prompt):
    """{name: the first words of the answers that its list or text holds}."""
    words = {}
    for name, items in re.findall(r"^List (\w+): (.*)\.$", prompt, re.MULTILINE):
        words[name] = items.split(", ")
    for name, word in re.findall(r"^Text (\w+): .*\[ (\w+)", prompt, re.MULTILINE):
        words[name] = [word]
    return words


def greedy_answer(model, example, encoding):
    prompt = torch.from_numpy(example.tokens[:-example.n_answer])[None]  # (1, T)
    tokens = model.generate(prompt, example.n_answer, temperature=0)
    return encoding.decode(tokens[0, prompt.size(1):].tolist()).strip()


def main():
    for path in sys.argv[1:]:
        saved = checkpoint.load(path)
        model = checkpoint.build(saved).eval()
        stream = eval_synthetic.Stream(**saved["run"]["stream"])
        encoding = eval_synthetic.get_encoding(stream.tokenizer)
        right = from_queried = from_any = 0
        for number in range(EXAMPLES):
            example = eval_synthetic.draw(stream, "test", saved["run"]["train_length"], number)
            answer = greedy_answer(model, example, encoding)
            offered = first_words(example.prompt)
            queried = re.search(r"(?:of list|in text) (\w+)\?", example.prompt)[1]
            word = re.match(r"\w*", answer)[0]
            right += answer == example.answer.strip()
            from_queried += word in offered[queried]
            from_any += any(word in words for words in offered.values())
        print(f"{path}: right {right / EXAMPLES:.1%}, begun as what was asked for "
              f"{from_queried / EXAMPLES:.1%}, as any {from_any / EXAMPLES:.1%} of {EXAMPLES}",
              flush=True)


if __name__ == "__main__":
    main()
