"""Draws method.png, the figure of the README: which token sees which, and what is predicted.

    python results/draw_method.py
"""
import os

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

TOKENS = ["The", "cat", "M", "that", "sat", "on", "M", "the", "mat", "was", "M", "mine"]
TEXT, META, NONE = "#c9d7e8", "#f28e2b", "#f4f4f4"


def main():
    is_meta = np.array([token == "M" for token in TOKENS])
    n = len(TOKENS)
    causal = np.tril(np.ones((n, n), dtype=bool))
    among = causal & is_meta[:, None] & is_meta[None, :]

    figure = plt.figure(figsize=(11, 6.4), layout="constrained")
    rows = figure.add_gridspec(2, 2, height_ratios=[1, 3.4])
    draw_stream(figure.add_subplot(rows[0, :]), is_meta)
    draw_mask(figure.add_subplot(rows[1, 0]), causal, is_meta, "causal self-attention\nevery token sees all before it")
    draw_mask(figure.add_subplot(rows[1, 1]), among, is_meta, "meta-attention, the second in each block\nonly meta-tokens see each other")
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "method.png")
    figure.savefig(path, dpi=130)
    print(path)


def draw_stream(axes, is_meta):
    """The tokens, and below each what it is trained to predict."""
    for i, token in enumerate(TOKENS):
        axes.add_patch(Rectangle((i, 1.2), 0.94, 0.8, color=META if is_meta[i] else TEXT))
        axes.text(i + 0.47, 1.6, token, ha="center", va="center", fontsize=12, weight="bold" if is_meta[i] else None)
        following = TOKENS[i + 1] if i + 1 < len(TOKENS) else "…"
        no_loss = following == "M"
        axes.text(i + 0.47, 0.45, "no loss" if no_loss else following, ha="center", va="center", fontsize=9 if no_loss else 12,
                  color="#999999" if no_loss else "#333333", style="italic" if no_loss else None)
        arrow = {"arrowstyle": "->", "color": "#cccccc" if no_loss else "#555555"}
        axes.annotate("", (i + 0.47, 0.75), (i + 0.47, 1.15), arrowprops=arrow)
    axes.text(-0.2, 1.6, "input", ha="right", va="center", fontsize=11)
    axes.text(-0.2, 0.45, "target", ha="right", va="center", fontsize=11)
    axes.set(xlim=(-1.3, len(TOKENS) + 0.1), ylim=(0, 2.6))
    axes.set_title("M is the meta-token: one learned token, at random places, 10% of all (here more), and never a target", fontsize=12)
    axes.axis("off")


def draw_mask(axes, mask, is_meta, title):
    """One square for each pair of a query (row) and a key (column)."""
    n = len(TOKENS)
    for query in range(n):
        for key in range(n):
            both = is_meta[query] and is_meta[key]
            color = (META if both else TEXT) if mask[query, key] else NONE
            axes.add_patch(Rectangle((key, query), 0.92, 0.92, color=color))
    axes.set(xlim=(-0.1, n), ylim=(n, -0.1), aspect="equal", xticks=np.arange(n) + 0.46, yticks=np.arange(n) + 0.46,
             xlabel="key", ylabel="query")
    axes.set_xticklabels(TOKENS, rotation=60, fontsize=9)
    axes.set_yticklabels(TOKENS, fontsize=9)
    for label, meta in zip([*axes.get_xticklabels(), *axes.get_yticklabels()], [*is_meta, *is_meta]):
        label.set_color("#c25e00" if meta else "#333333")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=12)


if __name__ == "__main__":
    main()
