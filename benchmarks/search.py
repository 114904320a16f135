"""Accuracy against tokens on the embedded task: votes, best-of-n and searches over steps, with four kinds of scorer.

    python benchmarks/search.py                       # seeds 0, 1, 2; continues where it was stopped
    python benchmarks/search.py --seeds 0 --scale 0.1 --problems 8 --run_dir runs/search-quick   # does it run at all

For each seed a model of 0.6M weights learns sums of three to nine numbers from scratch. From it come two policies:

* one mostly guesses the answer, and writes steps, with a slip now and then, in a third of its solutions. It solves five
  numbers up to 12, and up to 20: larger than the sums that it has learned to guess;
* one writes steps, each wrong with a probability of a quarter. It has learned that on three to six numbers
  and solves eight.

and the scorers: a process reward model (PRM), which learns to tell wrong sums from short solutions and then from
solutions of both policies, whose steps are labelled; a reward model (RM), which starts from the PRM and learns from
pairs of these solutions; and for each policy PPO's critic, which learns values of the policy's own solutions while the
policy stays as it is.

Tokens are sampled by the policy or read by a scorer, per problem. The verifier knows the right
answer, so it is a bound and no method; it judges whole solutions, and the critic unfinished ones.

Majority, best-of-n and weighted best-of-n for all n are estimates from one set of samples of each problem: exact for
best-of-n, over random subsets for the others. ``table.md`` and ``search.svg`` are written next to the runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from search_models import MOST_TOKENS, Row, train

from rlhf_lightning.data.final_answer import answer_key
from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.inference import (
    DVTS,
    MCTS,
    AStar,
    BeamSearch,
    Budget,
    LocalEngine,
    MajorityVote,
    ParticleFilter,
    ProcessScorer,
    RewardScorer,
    SamplingParams,
    ValueScorer,
    VerifierScorer,
)
from rlhf_lightning.metrics.at_k import expected_best
from rlhf_lightning.rewards import exact_answer

# The task's difficulty, and the kind of policy that is searched.
SETTINGS = {
    "up to 12": ("terms=5&high=12", "guesses"),
    "larger, up to 20": ("terms=5&high=20", "guesses"),
    "longer, eight numbers": ("terms=8&high=12", "slips"),
}
SCORERS = ("RM", "PRM", "critic", "verifier")
SEARCHES = ("beam", "DVTS", "MCTS", "A*", "particles")
SAMPLES = 32
SHOWN = (4, 16)
SUBSETS = 100


class Point(NamedTuple):
    """Accuracy and tokens per problem of one method, on the mean over seeds."""

    accuracy: float
    spread: float
    tokens: float


# Measuring.


class Bench:
    """One seed's policy and scorers, and the problems of one setting.

    Args:
        folders: what ``train`` returned.
        setting: one of :data:`SETTINGS`.
        problems: their number.
        seed: of the samples.
    """

    def __init__(self, folders: dict[str, str], setting: str, problems: int, seed: int) -> None:
        keys, policy = SETTINGS[setting]
        self.engine = LocalEngine.from_pretrained(folders[policy])
        self.scorers: dict[str, Any] = {
            "RM": RewardScorer(folders["RM"]),
            "PRM": ProcessScorer(folders["PRM"], aggregation="min"),
            "critic": ValueScorer(folders[f"critic of {policy}"]),
            "verifier": VerifierScorer(exact_answer),
        }
        for name in ("RM", "PRM", "critic"):
            self.scorers[name].attach(self.engine)
        rows = open_task(f"sums:prompts?split=test&rows={problems}&seed={seed}&{keys}")
        self.prompts, self.answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
        self.seeds = [1000 * seed + number for number in range(problems)]
        self.sampling = SamplingParams(max_new_tokens=MOST_TOKENS)

    def right(self, texts: Sequence[str]) -> list[float]:
        """1 for each right solution."""
        return [value or 0.0 for value in exact_answer(self.prompts, texts, answer=self.answers)]

    def greedy(self) -> Row:
        """The policy's likeliest tokens."""
        params = dataclasses.replace(self.sampling, temperature=0.0)
        found = [group[0] for group in self.engine.generate(self.prompts, 1, params)]
        tokens = statistics.mean(len(completion.token_ids) for completion in found)
        return {"accuracy": statistics.mean(self.right([c.text for c in found])), "policy": tokens, "scorer": 0.0}

    def selections(self) -> Iterator[Row]:
        """Majority and best-of-n for every n, from one set of samples."""
        results = MajorityVote(self.engine, n=SAMPLES, sampling=self.sampling).search(
            self.prompts, self.seeds, columns={"answer": self.answers}
        )
        sets = [result.candidates for result in results]
        whole = [candidate for candidates in sets for candidate in candidates]
        drawn = statistics.mean(len(candidate.token_ids) for candidate in whole)
        keys = [[answer_key(candidate.text) for candidate in candidates] for candidates in sets]
        right = [
            [value or 0.0 for value in exact_answer([""] * SAMPLES, [c.text for c in candidates], [answer] * SAMPLES)]
            for candidates, answer in zip(sets, self.answers, strict=True)
        ]
        ones = [[1.0] * SAMPLES for _ in sets]
        yield from ({"method": "majority", "scorer_name": "", **row} for row in votes(keys, right, ones, drawn, None))
        for name in SCORERS:
            scores = self.scorers[name].score(whole)
            values = [scores.values[n : n + SAMPLES] for n in range(0, len(whole), SAMPLES)]
            # Tokens read to score the first n; a prompt is read with the first.
            read = [statistics.mean(scores.tokens[n::SAMPLES]) for n in range(SAMPLES)]
            curves = [expected_best(of, hits) for of, hits in zip(values, right, strict=True)]
            for n in range(1, SAMPLES + 1):
                accuracy = statistics.mean(curve[n - 1] for curve in curves)
                row = {"n": n, "accuracy": accuracy, "policy": n * drawn, "scorer": sum(read[:n])}
                yield {"method": "best-of-n", "scorer_name": name, **row}
            # Weights must not be negative.
            shares = [[float(torch.tensor(v).sigmoid()) if name == "RM" else max(v, 0.0) for v in of] for of in values]
            for row in votes(keys, right, shares, drawn, read):
                yield {"method": "weighted", "scorer_name": name, **row}

    def search(self, method: str, name: str, size: int) -> Row:
        """One search over steps with one scorer; ``size`` candidates a round."""
        options: dict[str, Any] = {"scorer": self.scorers[name], "sampling": self.sampling}
        if name == "verifier":
            options["value"] = self.scorers["critic"]
        # The PRM's scores are probabilities; others weigh by exp(score / temperature).
        tilt = {} if name == "PRM" else {"potential": "exponential", "temperature": 1.0 if name == "RM" else 0.2}
        make: dict[str, Callable[[], Any]] = {
            "beam": lambda: BeamSearch(self.engine, width=max(1, size // 4), expand=4, **options),
            "DVTS": lambda: DVTS(self.engine, width=max(1, size // 4), expand=4, **options),
            "MCTS": lambda: MCTS(
                self.engine, simulations=size, actions=4, leaves=2, rollouts=1, rollout_weight=0.5, **options
            ),
            "A*": lambda: AStar(self.engine, actions=4, budget=Budget(expansions=3 * size), **options),
            "particles": lambda: ParticleFilter(self.engine, particles=size, **tilt, **options),
        }
        start = time.process_time()
        results = make[method]().search(self.prompts, self.seeds, columns={"answer": self.answers})
        return {
            "accuracy": statistics.mean(self.right([result.text for result in results])),
            "policy": statistics.mean(result.tokens for result in results),
            "scorer": statistics.mean(result.scorer_tokens for result in results),
            "seconds": time.process_time() - start,
        }


def votes(
    keys: Sequence[Sequence[Any]],
    right: Sequence[Sequence[float]],
    weights: Sequence[Sequence[float]],
    drawn: float,
    read: Sequence[float] | None,
) -> Iterator[Row]:
    """Weighted votes among n of the samples, on the mean over random subsets."""
    draw = random.Random(0)
    for n in (1, 2, 4, 8, 16, SAMPLES):
        hits = []
        for key, hit, weight in zip(keys, right, weights, strict=True):
            value = dict(zip(key, hit, strict=True))
            for _ in range(SUBSETS if n < SAMPLES else 1):
                chosen = draw.sample(range(len(key)), n)
                totals: Counter[Any] = Counter()
                for place in chosen:
                    totals[key[place]] += weight[place]  # type: ignore[assignment]
                hits.append(value[totals.most_common(1)[0][0]])
        scorer = 0.0 if read is None else sum(read[:n])
        yield {"n": n, "accuracy": statistics.mean(hits), "policy": n * drawn, "scorer": scorer}


def measure(args: argparse.Namespace, seed: int, done: list[Row]) -> Iterator[Row]:
    """All rows of a seed that were not measured before."""
    folders = train(args.run_dir / f"seed-{seed}", seed, args.scale)
    for setting in SETTINGS:
        bench = Bench(folders, setting, args.problems, seed)
        common = {"seed": seed, "setting": setting}

        def is_new(method: str, name: str = "", n: int = 0, common: Row = common) -> bool:
            wanted = {**common, "method": method, "scorer_name": name, "n": n}
            return not any(wanted.items() <= row.items() for row in done)

        if is_new("greedy"):
            yield {**common, "method": "greedy", "scorer_name": "", "n": 0, **bench.greedy()}
        if is_new("weighted", SCORERS[-1], SAMPLES):
            yield from ({**common, **row} for row in bench.selections())
        for method in SEARCHES:
            for name in SCORERS:
                for size in args.sizes if name == "PRM" else args.sizes[:1]:
                    if is_new(method, name, size):
                        row = bench.search(method, name, size)
                        yield {**common, "method": method, "scorer_name": name, "n": size, **row}


# Reporting.


def points(rows: Sequence[Row]) -> dict[tuple[str, str, str, int], Point]:
    """Means over the seeds by setting, method, scorer and size."""
    groups: dict[tuple[str, str, str, int], list[Row]] = defaultdict(list)
    for row in {(r["seed"], r["setting"], r["method"], r["scorer_name"], r["n"]): r for r in rows}.values():
        groups[row["setting"], row["method"], row["scorer_name"], row["n"]].append(row)
    return {
        key: Point(
            statistics.mean(row["accuracy"] for row in group),
            statistics.pstdev([row["accuracy"] for row in group]),
            statistics.mean(row["policy"] + row["scorer"] for row in group),
        )
        for key, group in groups.items()
    }


def table(found: dict[tuple[str, str, str, int], Point], sizes: Sequence[int]) -> str:
    """A table in Markdown: accuracy at tokens per problem, by method and scorer."""
    lines = []
    for setting in SETTINGS:
        lines += [f"| {setting} | no scorer | {' | '.join(SCORERS)} |", "|---" * (len(SCORERS) + 2) + "|"]
        listed = [("greedy", 0), *(("majority", n) for n in SHOWN)]
        listed += [(method, n) for method in ("best-of-n", "weighted") for n in SHOWN]
        listed += [(method, n) for method in SEARCHES for n in sizes]
        for method, n in listed:
            cells = [found.get((setting, method, name, n)) for name in ("", *SCORERS)]
            shown = ["" if p is None else f"{100 * p.accuracy:.0f} % at {p.tokens:,.0f}" for p in cells]
            if any(shown):
                lines.append(f"| {method}{f', {n}' if n else ''} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines)


def draw(found: dict[tuple[str, str, str, int], Point], path: Path) -> None:
    """Accuracy against tokens: lines for selections over n, marks for searches."""
    from matplotlib.figure import Figure

    colours = {"": "#444444", "RM": "#1f6f8b", "PRM": "#d1495b", "critic": "#edae49", "verifier": "#66a182"}
    marks = dict(zip(SEARCHES, "os^DP", strict=True))
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(SETTINGS), sharey=True), SETTINGS, strict=True):
        own = {key[1:]: point for key, point in found.items() if key[0] == setting}
        for method, style in (("majority", "-"), ("best-of-n", "-"), ("weighted", ":")):
            for name, colour in colours.items():
                line = sorted((p.tokens, p.accuracy) for (m, s, _), p in own.items() if (m, s) == (method, name))
                if line:
                    axes.plot(*zip(*line, strict=True), style, color=colour, lw=1.4, label=f"{method} {name}".strip())
        for (method, name, _), point in own.items():
            if method in marks:
                axes.plot(point.tokens, point.accuracy, marks[method], color=colours[name], ms=6, mec="white", mew=0.6)
        if (greedy := own.get(("greedy", "", 0))) is not None:
            axes.plot(greedy.tokens, greedy.accuracy, "*", color="black", ms=11, label="greedy")
        for method, mark in marks.items():
            axes.plot([], [], mark, color="#888888", label=method)
        axes.set_xscale("log")
        axes.set_title(setting, fontsize=10)
        axes.set_xlabel("tokens per problem, sampled and scored", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy, mean of the seeds", fontsize=9)
    figure.axes[-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def main() -> int:
    """Trains, measures what is missing, and writes the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--problems", type=int, default=40)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[8], help="of searches; all with the PRM, the first with others"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps of training")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/search"))
    parser.add_argument("--figure", type=Path, help="further place of the figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    log = args.run_dir / "rows.jsonl"
    rows: list[Row] = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for seed in args.seeds:
        for row in measure(args, seed, list(rows)):
            rows.append(row)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if "seconds" in row:
                print({name: value for name, value in row.items() if name != "setting"}, flush=True)
    found = points([row for row in rows if row["seed"] in args.seeds])
    (args.run_dir / "table.md").write_text(table(found, args.sizes))
    print(table(found, args.sizes))
    for path in (args.run_dir / "search.svg", *filter(None, [args.figure])):
        draw(found, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
