"""Draws method.png, README's picture: what sees what, and what is predicted.

    python results/draw_method.py
"""
import os

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

TOKENS = ["The", "cat", "M", "that", "sat", "on", "M", "the", "mat", "was", "M", "mine"]
TEXT, META, NONE = "#c9d7e8", "#f28e2b", "#f4f4f4"
PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "method.png")


def draw_stream(axes):
    """The tokens, and below each what it is trained to predict."""
    for i, (token, target) in enumerate(zip(TOKENS, [*TOKENS[1:], "…"])):
        middle = i + 0.47
        color, weight = (META, "bold") if token == "M" else (TEXT, "normal")
        axes.add_patch(Rectangle((i, 1.2), 0.94, 0.8, color=color))
        axes.text(middle, 1.6, token, ha="center", va="center", fontsize=12, weight=weight)
        arrow = "#555555"
        style = {"fontsize": 12, "color": "#333333"}
        if target == "M":
            target, arrow = "no loss", "#cccccc"
            style = {"fontsize": 9, "color": "#999999", "style": "italic"}
        axes.text(middle, 0.45, target, ha="center", va="center", **style)
        axes.annotate("", (middle, 0.75), (middle, 1.15),
                      arrowprops={"arrowstyle": "->", "color": arrow})
    axes.text(-0.2, 1.6, "input", ha="right", va="center", fontsize=11)
    axes.text(-0.2, 0.45, "target", ha="right", va="center", fontsize=11)
    axes.set(xlim=(-1.3, len(TOKENS) + 0.1), ylim=(0, 2.6))
    axes.set_title("M is the meta-token: one learned token, at random places, "
                   "10% of all (here more), and never a target", fontsize=12)
    axes.axis("off")


def draw_mask(axes, mask, is_meta, title):
    """One square for each query (row) and key (column): mask (T, T), is_meta (T,)."""
    n = len(TOKENS)
    for query in range(n):
        for key in range(n):
            color = TEXT
            if is_meta[query] and is_meta[key]:
                color = META
            if not mask[query, key]:
                color = NONE
            axes.add_patch(Rectangle((key, query), 0.92, 0.92, color=color))
    middles = np.arange(n) + 0.46
    axes.set(xlim=(-0.1, n), ylim=(n, -0.1), aspect="equal", xlabel="key", ylabel="query")
    axes.set_xticks(middles, TOKENS, rotation=60, fontsize=9)
    axes.set_yticks(middles, TOKENS, fontsize=9)
    for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        label.set_color("#c25e00" if label.get_text() == "M" else "#333333")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=12)


def main():
    is_meta = np.array([token == "M" for token in TOKENS])
    causal = np.tril(np.ones((len(TOKENS), len(TOKENS)), dtype=bool))
    among_meta = causal & is_meta[:, None] & is_meta[None, :]
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[1, 3.4])
    draw_stream(figure.add_subplot(grid[0, :]))
    draw_mask(figure.add_subplot(grid[1, 0]), causal, is_meta,
              "causal self-attention\nevery token sees all before it")
    draw_mask(figure.add_subplot(grid[1, 1]), among_meta, is_meta,
              "meta-attention, the second in each block\nonly meta-tokens see each other")
    figure.savefig(PATH, dpi=130)
    print(PATH)


if __name__ == "__main__":
    main()
