"""Draw the accuracy that eval_synthetic.py measured, and print it as tables.

    python results/plot_synthetic.py results/out_*.json
    python results/plot_synthetic.py results/study.jsonl --show=seeds --out=study.png
    python results/plot_synthetic.py results/study.jsonl --panel="all: D meta|C pause"

A .json file holds one result. A .jsonl file holds a study: one result a line, each with
the part of the study that it belongs to. Results of one label are one model's seeds.
"""
import argparse
import itertools
import json
import math
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import eval_synthetic

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure

MARKED = {
    "task": "marks at the queried unit",
    "all": "marks at every unit",
    "random": "marks anywhere",
}
PLACES = MARKED | {"none": "no marks"}

# Student's t at 97.5%, by number of seeds
T_975 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


# --------------------------------------------------------------------------------------
# Reading and grouping

def read(paths, part):
    """{where: result} of all files; of a study, only the lines of that part."""
    results = {}
    for path in paths:
        if path.endswith(".jsonl"):
            results |= read_study(path, part)
        elif not os.path.basename(path).startswith("bench_"):  # bench.py's lie beside ours
            results[path] = eval_synthetic.read_result(path)
    for result in results.values():  # leave out lengths that learned positions do not reach
        result["rows"] = [row for row in result["rows"] if "impossible" not in row]
    if not results:
        raise SystemExit(f"error: no results in {' '.join(paths)}, or none of --part={part}")
    return results


def read_study(path, part):
    results = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                result = json.loads(text)
                if result["format"] != eval_synthetic.FORMAT:
                    raise ValueError
                if result["part"] == part:
                    results[f"{path}, line {number}"] = result
    except OSError as error:
        raise SystemExit(f"error: {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise SystemExit(f"error: {path} is not a study, a result on each line") from None
    return results


def panels_of(results):
    """{(task, placement): {label: group}}; a group is the results of one model's seeds.

    Models without marks join the panels whose models were tuned for as many steps.
    """
    check_same_examples(results)
    groups = group_by_label(results)
    panels = {}
    for task in eval_synthetic.TASKS:
        unmarked = groups.get((task, "none"), {})
        left_over = dict(unmarked)
        for placement in MARKED:
            marked = groups.get((task, placement))
            if not marked:
                continue
            steps = set(map(steps_of, marked.values()))
            panel = panels[task, placement] = {}
            for label, group in unmarked.items():
                if steps_of(group) in steps:
                    name = f"{label}, no marks" if label in marked else label
                    panel[name] = group
                    left_over.pop(label, None)
            panel |= marked
        if left_over:
            panels[task, "none"] = left_over
    return panels


def steps_of(group):
    return group[0]["run"]["phase_steps"]


def check_same_examples(results):
    """Raise unless results of one task and length are of the same test examples."""
    seen = {}
    for where, result in results.items():
        for length, test in result["tests"].items():
            digest = test["sha256_of_prompts"]
            expected, first = seen.setdefault((result["task"], length), (digest, where))
            if digest != expected:
                raise SystemExit(f"error: {where} and {first} were measured on different test "
                                 f"examples of {result['task']} at {length}")


def group_by_label(results):
    """{(task, placement): {label: [result of each seed]}}. Raise if settings differ."""
    groups = {}
    for where, result in results.items():
        label, panel = result["label"], (result["task"], result["placement"])
        group = groups.setdefault(panel, {}).setdefault(label, [])
        if group and recipe(group[0]) != recipe(result):
            raise SystemExit(f"error: {where}: '{label}' has results of different settings: "
                             "give them different --label=")
        if any(seeds_of(other) == seeds_of(result) for other in group):
            raise SystemExit(f"error: {where}: '{label}' has two results of the same seeds: "
                             "name only one of them")
        group.append(result)
        group.sort(key=seeds_of)
    return groups


def recipe(result):
    """What a result depends on, without its seeds and a setting of older versions."""
    run = result["run"]
    stream = run["stream"] | {"seed": None}
    return run | {"stream": stream, "seed": None, "pretrained": None, "trial_steps": None}


def seeds_of(result):
    return str(result["seeds"])


# --------------------------------------------------------------------------------------
# Statistics

def rows_of(group, length, name="full"):
    """{seeds: row}, of the seeds that measured it."""
    rows = {}
    for result in group:
        for row in result["rows"]:
            if row["length"] == length and row_name(row) == name:
                rows[seeds_of(result)] = row
    return rows


def row_name(row):
    if row["row"] == "no_meta":
        return "no_meta (out of distribution)"
    if row.get("by") == "generation":  # in older results, of the first 256 examples
        return f"{row['row']}, generated (n <= 256)"
    return row["row"]


def correct_of(group, length, name="full"):
    """{seeds: (n,), 1.0 for each example that was right, otherwise 0.0}."""
    correct = {}
    for seeds, row in rows_of(group, length, name).items():
        bits = np.frombuffer(bytes.fromhex(row["correct"]), np.uint8)
        correct[seeds] = np.unpackbits(bits, count=row["n"]).astype(float)
    return correct


def learned_at(group):
    """The first step with half of validation right, of each seed."""
    steps = []
    for result in group:
        learned = [point["step"] for point in result["validation"] if point["exact"] >= 0.5]
        steps.append(f"{learned[0]:,}" if learned else "never")
    return ", ".join(steps)


def paired_difference(a, b):
    """Mean of b - a and its 95% interval: (mean, low, high). a, b: from correct_of.

    The interval is the wider of two: over examples (normal approximation), and over the
    seeds that both have (Student's t). If they share none, compare their means.
    """
    differences = [b[seeds] - a[seeds] for seeds in a if seeds in b]
    if not differences:
        differences = [np.mean(list(b.values()), axis=0) - np.mean(list(a.values()), axis=0)]
    differences = np.array(differences)  # (seeds, n)
    n_seeds, n = differences.shape
    halves = []
    if n > 1:
        halves.append(1.96 * standard_error(differences.mean(axis=0)))
    if n_seeds > 1:
        halves.append(T_975.get(n_seeds, 2.26) * standard_error(differences.mean(axis=1)))
    mean, half = differences.mean(), max(halves, default=math.inf)
    return mean, max(mean - half, -1.0), min(mean + half, 1.0)


def standard_error(x):
    return x.std(ddof=1) / math.sqrt(len(x))


def lengths_of(panel):
    results = itertools.chain(*panel.values())
    return sorted({row["length"] for result in results for row in result["rows"]})


def tests_of(panel):
    """{length: what is known about its test examples}."""
    results = itertools.chain(*panel.values())
    tests = {int(n): test for result in results for n, test in result["tests"].items()}
    return dict(sorted(tests.items()))


# --------------------------------------------------------------------------------------
# Tables, in Markdown

def tables(panels):
    for (task, placement), panel in panels.items():
        yield from accuracy_table(f"{task}, {PLACES[placement]}", panel)
        if len(panel) > 1:
            yield from difference_table(panel)


def accuracy_table(title, panel):
    lengths, tests = lengths_of(panel), tests_of(panel)
    sizes = sorted({test["n"] for test in tests.values()})
    yield (f"\n**{title}**: exact match (%) on {' or '.join(map(str, sizes))} examples per length, "
           "teacher-forced (95% interval; the range if several seeds)\n")
    yield line("model", "row", "tuned at", *lengths, "half of validation right at step")
    yield rule(len(lengths) + 4)
    for name in ("chance", "majority"):
        cells = [f"{100 * tests[n][name]:.1f}" if n in tests else "-" for n in lengths]
        yield line(name, "", "", *cells, "")
    for label, group in panel.items():
        model = f"{label}, {len(group)} seeds" if len(group) > 1 else label
        tuned_at = group[0]["train_length"]
        for name in dict.fromkeys(row_name(row) for result in group for row in result["rows"]):
            cells = [accuracy_cell(correct_of(group, length, name)) for length in lengths]
            yield line(model, name, tuned_at, *cells, learned_at(group) if name == "full" else "")
        cells = [token_accuracy_cell(rows_of(group, length)) for length in lengths]
        yield line(model, "full, token accuracy", tuned_at, *cells, "")


def difference_table(panel):
    lengths = lengths_of(panel)
    yield ("\nPaired differences on the same examples, in points (95% interval: the wider of those "
           "over examples and over shared seeds)\n")
    yield line("second minus first", "shared seeds", *lengths)
    yield rule(len(lengths) + 2)
    for a, b in itertools.combinations(panel, 2):
        shared = set(map(seeds_of, panel[a])) & set(map(seeds_of, panel[b]))
        cells = [difference_cell(panel[a], panel[b], length) for length in lengths]
        yield line(f"{b} - {a}", len(shared), *cells)


def line(*cells):
    return "".join(f"| {cell} " if cell != "" else "| " for cell in cells) + "|"


def rule(n_columns):
    return "|" + "---|" * n_columns


def accuracy_cell(correct):
    """Accuracy in %, with the range over seeds, or of one seed its Wilson interval."""
    if not correct:
        return "-"
    shares = [right.mean() for right in correct.values()]
    low, high = min(shares), max(shares)
    if len(correct) == 1:
        right, = correct.values()
        low, high = eval_synthetic.wilson(right.sum(), right.size)
    return f"{100 * np.mean(shares):.1f} ({100 * low:.1f}-{100 * high:.1f})"


def token_accuracy_cell(rows):
    """The paper's metric: the answer tokens that are right, in %."""
    if not rows:
        return "-"
    return f"{100 * np.mean([row['token_accuracy'] for row in rows.values()]):.1f}"


def difference_cell(a, b, length):
    a, b = correct_of(a, length), correct_of(b, length)
    if not a or not b:
        return "-"
    mean, low, high = paired_difference(a, b)
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


# --------------------------------------------------------------------------------------
# Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#8A4FA3", "#333333")
LINES = ("-", "--", "-.", (0, (7, 2)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")
MOST = len(COLORS)                  # lines in a panel
GAP = 7                             # between two names, in points of exact match


def draw(panels, path, views, choices, title):
    """Draw each panel in each view. choices: (placement, labels) of the panels."""
    drawn = []
    for (task, placement), panel in panels.items():
        groups = [labels for place, labels in choices if place == placement]
        if not choices:
            size = len(panel) if views == ["seeds"] else MOST
            groups = [list(panel)[i:i + size] for i in range(0, len(panel), size)]
        for labels in groups:
            part = {label: panel[label] for label in labels if label in panel}
            name = f"{task.replace('_', ' ')}, {PLACES[placement]}"
            drawn += [(name, part, view) for view in views if part]
    if not drawn:
        raise SystemExit("error: no panel has any of the models that --panel= names")
    n_columns, height = (1, 2.1) if views == ["seeds"] else (min(2, len(drawn)), 3.7)
    n_rows = math.ceil(len(drawn) / n_columns)
    figure = Figure(figsize=(8.4, 0.4 + height * n_rows), layout="constrained")
    for i, (name, part, view) in enumerate(drawn, start=1):
        ax = figure.add_subplot(n_rows, n_columns, i)
        VIEWS[view](ax, part)
        ax.set_title(name, fontsize="medium")
        ax.tick_params(labelsize="small")
        ax.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def draw_lengths(ax, panel):
    """The test at each length."""
    tests = tests_of(panel)
    result = next(iter(panel.values()))[0]
    unit = "bytes" if result["run"]["stream"]["tokenizer"] == "bytes" else "tokens"
    draw_curves(ax, panel, exact_by_length, {n: test["chance"] for n, test in tests.items()})
    ax.set(xlabel=f"prompt length ({unit})", ylabel="test: exact match (%)")
    ax.set_xticks(list(tests))
    for length in {group[0]["train_length"] for group in panel.values()}:
        ax.axvline(length, color="gray", linestyle=":")
        ax.annotate("training length", (length, 50), (-12, 0), textcoords="offset points",
                    rotation=90, va="center", color="gray", fontsize="small")


def draw_steps(ax, panel):
    """Validation at the training length, over the steps of fine-tuning."""
    steps = [step for group in panel.values() for step in exact_by_step(group[0])]
    draw_curves(ax, panel, exact_by_step, dict.fromkeys(sorted(steps), chance_of(panel)))
    ax.set(xlabel="step of fine-tuning", ylabel="validation: exact match (%)")


def draw_seeds(ax, panel):
    """The test at the training length: a row for each model, a dot for each seed."""
    for row, group in enumerate(panel.values()):
        for i, result in enumerate(group):
            exact = exact_by_length(result).get(result["train_length"], math.nan)
            ax.plot(100 * exact, row, MARKERS[i % MOST], color=COLORS[i % MOST], alpha=0.8)
    ax.axvline(100 * chance_of(panel), color="black", linestyle=":")
    ax.annotate(" chance", (100 * chance_of(panel), -0.6), va="center", fontsize="small")
    ax.set_yticks(range(len(panel)), labels=list(panel))
    ax.set(xlim=(-3, 103), ylim=(len(panel) - 0.4, -1),
           xlabel="test at the training length: exact match (%), a dot for each seed")


VIEWS = {"length": draw_lengths, "steps": draw_steps, "seeds": draw_seeds}


def draw_curves(ax, panel, curve_of, chance):
    """The mean over seeds as a line, each seed as a dot, and the names at the right."""
    curves = {label: list(map(curve_of, group)) for label, group in panel.items()}
    styles = zip(("black", *COLORS), (":", *LINES), ("", *MARKERS))
    names = []
    for (label, seeds), style in zip([("chance", [chance]), *curves.items()], styles):
        color, line_style, marker = style
        x = sorted(set(seeds[0]).intersection(*seeds))
        percent = np.array([[100 * curve[at] for at in x] for curve in seeds])  # (seeds, x)
        if x:
            ax.plot(x, percent.mean(axis=0), color=color, linestyle=line_style, linewidth=2)
            ax.plot(x, percent.T, linestyle="", marker=marker, color=color, alpha=0.8)
            names.append((percent[:, -1].mean(), label, color, marker))
    ax.set_ylim(-3, 103)
    at, right = -math.inf, ax.get_yaxis_transform()  # x in widths of the panel
    for y, label, color, marker in sorted(names):
        at = max(y, at + GAP)
        ax.plot(1.06, at, marker=marker, color=color, transform=right, clip_on=False)
        ax.annotate(label, (1.1, at), xycoords=right, va="center", color=color, fontsize="small")


def exact_by_length(result):
    return {row["length"]: row["exact"] for row in result["rows"] if row_name(row) == "full"}


def exact_by_step(result):
    return {point["step"]: point["exact"] for point in result["validation"]}


def chance_of(panel):
    length = next(iter(panel.values()))[0]["train_length"]
    return tests_of(panel)[length]["chance"]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="results, .json or .jsonl")
    add("--part", default="main", help="the part of a study to show (main)")
    add("--out", default="results/synthetic.png", help="where to draw")
    add("--show", default="length,steps", help="what to draw: length, steps or seeds")
    add("--panel", action="append", default=[], metavar="PLACEMENT: LABEL|LABEL",
        help="draw only these models of task, all, random or none (again: another panel)")
    add("--title", help="the message of the figure")
    args = parser.parse_args(argv)
    if not args.files:
        raise SystemExit("error: name results to plot, such as results/study.jsonl")
    views = args.show.split(",")
    if not VIEWS.keys() >= set(views):
        raise SystemExit(f"error: --show={args.show}: expected {', '.join(VIEWS)}")
    rcParams["text.parse_math"] = False         # a $ in a label is no formula
    panels = panels_of(read(args.files, args.part))
    print("\n".join(tables(panels)))
    choices = [choice.partition(": ")[::2] for choice in args.panel]
    choices = [(placement, labels.split("|")) for placement, labels in choices]
    draw(panels, args.out, views, choices, args.title)
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
