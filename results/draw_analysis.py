"""Draw the figures of analysis.md from the JSON files of results/analysis/.

    python results/draw_analysis.py
"""
import json
import os

import numpy as np
from matplotlib.figure import Figure

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "analysis")
STYLES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."),
          ("#8A4FA3", "D", (0, (7, 2)))]


def findings(name):
    with open(f"{FOLDER}/{name}.json", encoding="utf-8") as file:
        return json.load(file)["figures"]


def figure_with(title, columns=1):
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def save(figure, name):
    path = f"{FOLDER}/{name}.png"
    figure.savefig(path, dpi=120)
    print(path)


def draw_line(ax, x, points, label, style):
    """points: (n,), or {"mean", "low", "high"} of such. The label stands at the end."""
    color, marker, line = style
    mean = points["mean"] if isinstance(points, dict) else points
    ax.plot(x, mean, color=color, marker=marker, linestyle=line, label=label)
    if isinstance(points, dict):
        ax.fill_between(x, points["low"], points["high"], color=color, alpha=0.2, linewidth=0)
    ax.grid(alpha=0.3)


def sharpening():
    found = findings("sharpening")
    figure, axes = figure_with("Meta-tokens do not sharpen attention: zeroing text does more", 2)
    names = {"boost": "largest logit,\nwith minus without (nats)",
             "drop": "entropy of attention,\nwithout minus with (nats)"}
    kinds = {"meta-tokens\nzeroed": "meta-tokens zeroed",
             "as many text\ntokens zeroed": "as many text tokens zeroed"}
    for ax, (name, axis) in zip(axes, names.items()):
        for row, kind in enumerate(kinds.values()):
            color, marker, _ = STYLES[row]
            value = found[kind][name]
            ax.errorbar(value["mean"], row, xerr=value["high"] - value["mean"], color=color,
                        marker=marker, markersize=8, capsize=4)
        ax.axvline(0, color="black", linestyle=":")
        ax.set_yticks([0, 1], labels=list(kinds))
        ax.set(ylim=(1.6, -0.6), xlabel=axis)
        ax.grid(alpha=0.3)
    save(figure, "sharpening")


def residual():
    found = findings("residual")
    figure, (ax,) = figure_with("A meta-token resembles the text right before it, and no other")
    curves = {"meta-token": "meta-token, with earlier text",
              "text token before it": "control: the text token before it, with earlier text"}
    distances = [first for first, last in found["distances"]]
    for (label, name), style in zip(curves.items(), STYLES):
        last = {key: values[-1] for key, values in found["curves"][name].items()}
        draw_line(ax, distances, last, label, style)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.set(xlabel="distance to the text (tokens)", ylim=(0, 1),
           ylabel="cosine similarity after the last block")
    ax.legend()
    save(figure, "residual")


def attention():
    found = findings("attention")["attention_on_meta_tokens"]["of text queries"]
    shares = 100 * np.array(found["per_layer_and_head"])  # (layers, heads)
    figure, (ax,) = figure_with("Text gives meta-tokens half the attention of a uniform one")
    for layer, heads in enumerate(shares, start=1):
        ax.plot([layer] * len(heads), heads, "o", color=STYLES[0][0], alpha=0.7)
        ax.plot(layer, heads.mean(), "_", color="black", markersize=30)
    uniform = 100 * found["if_uniform"]
    ax.axhline(uniform, color="black", linestyle=":")
    ax.annotate(" uniform", (0.6, uniform), (0, 4), textcoords="offset points")
    ax.set(xlabel="layer (a dot for each head, a bar for their mean)", xlim=(0.6, 3.4),
           ylabel="attention on meta-tokens (%)", ylim=(0, 23), xticks=[1, 2, 3])
    ax.grid(alpha=0.3)
    save(figure, "attention")


def perplexity():
    found = findings("perplexity")
    figure, (ax,) = figure_with("Far context is unused; beyond the window only YaRN copes")
    for (name, runs), style in zip(found["by_context"].items(), STYLES):
        points = [run["minus_one_window"] for run in runs.values()]
        lengths = list(map(int, runs))
        draw_line(ax, lengths, {key: [point[key] for point in points] for key in points[0]},
                  name.replace("no_pos", "zeroed positions"), style)
    ax.axvline(found["window"], color="gray", linestyle=":", label="the window")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.set(xlabel="length of what is read (bytes)",
           ylabel="loss of the same last 32 bytes,\nminus that after 256 (nats)")
    ax.legend()
    save(figure, "perplexity")


def rate_distortion(source, number, name, title, limit):
    """Distortion over rate, the mean of five seeds, up to a rate of limit nats."""
    panel = findings(source)["panels"][number]
    figure, (ax,) = figure_with(title)
    for (label, curve), style in zip(panel["curves"].items(), STYLES):
        rate, distortion = (np.mean(curve[key], axis=1) for key in ("rate", "distortion"))
        draw_line(ax, rate, distortion, label, style)
    ax.axhline(panel["H(Y)"], color="black", linestyle=":", label="nothing known")
    ax.set(xlabel="rate: what is let through (nats)", xlim=(0, limit),
           ylabel="distortion: what stays unknown (nats)")
    ax.legend()
    save(figure, name)


def main():
    sharpening()
    residual()
    attention()
    perplexity()
    rate_distortion("rate_distortion", 0, "rate_distortion",
                    "What the state tells about the answer follows the recall", 12)
    rate_distortion("rate_distortion", 1, "rate_distortion_mark",
                    "A mark tells about the answer what its text tells, and no more", 17)
    rate_distortion("rate_distortion_untuned", 2, "rate_distortion_untuned",
                    "Untuned, a meta-token tells no more about the next token than text", 12)


if __name__ == "__main__":
    main()
