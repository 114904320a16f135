"""Accuracy against tokens on the embedded task: votes, best-of-n and searches over steps, with four kinds of scorer.

    python benchmarks/search.py                       # seeds 0, 1, 2; continues where it was stopped
    python benchmarks/search.py --seeds 0 --scale 0.1 --problems 8 --run_dir runs/search-quick   # does it run at all

For each seed a model of 0.6M weights learns sums of three to six numbers from scratch: up to 12, and in every seventh
row up to 20. The policy continues with solutions that are mostly of a careless author, or have slips. From the same
model, a process reward model (PRM) and then a reward model (RM) learn from labelled solutions with numbers up to 20;
PPO's critic learns values of the policy's own solutions while the policy stays as it is. Then test problems of five
numbers are solved: up to 12, and harder, up to 20. Tokens are those that the policy sampled plus those that a scorer
read, per problem. The verifier knows the right answer, so it is a bound and no method; it judges whole solutions, and
the critic those that are not finished.

Majority, best-of-n and weighted best-of-n for all n are estimates from one set of samples of each problem: exact for
best-of-n, over random subsets for the others. ``table.md`` and ``search.svg`` are written next to the runs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch

from rlhf_lightning import PPOModule, ProcessRewardModule, RewardModule, SFTModule
from rlhf_lightning.callbacks import ModelExport
from rlhf_lightning.core import WarmupSchedule
from rlhf_lightning.data.final_answer import answer_key
from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.datamodules import PreferenceDataModule, PromptDataModule, SFTDataModule, StepwiseDataModule
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

NANO = "configs/models/nano"
SETTINGS = {"up to 12": "terms=5&high=12", "harder, up to 20": "terms=5&high=20"}
SCORERS = ("RM", "PRM", "critic", "verifier")
SEARCHES = ("beam", "DVTS", "MCTS", "A*", "particles")
SAMPLES = 32
SHOWN = (4, 16)
SUBSETS = 100
MOST_TOKENS = 96
Row = dict[str, Any]


class Point(NamedTuple):
    """Accuracy and tokens per problem of one method, on the mean over seeds."""

    accuracy: float
    spread: float
    tokens: float


# Training.


def sources(contract: str, rows: int, seed: int, keys: str) -> list[str]:
    """A task of each length."""
    return [f"sums:{contract}?rows={max(1, rows // 4)}&terms={n}&seed={seed}{keys}" for n in range(3, 7)]


def labelled(rows: int, seed: int) -> list[Row]:
    """Solutions with labelled steps; every fourth is a guess, whose only step is its answer."""
    found = [row for source in sources("stepwise", rows * 3 // 4, seed, "&high=20") for row in open_task(source)]
    for source in sources("demonstrations", rows // 4, seed, "&high=20&careless=1"):
        for row in open_task(source):
            right = row["completion"] == f"#{row['answer']}"
            found.append({"prompt": row["prompt"], "completions": [row["completion"]], "labels": [right]})
    return found


def optimizers(rate: float) -> dict[str, Any]:
    """AdamW with a short warm-up."""
    return {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0),
        "lr_scheduler": lambda optimizer: WarmupSchedule(optimizer, warmup_steps=0.1),
    }


def fit(folder: Path, make: Callable[[], tuple[Any, Any]], **export: str) -> str:
    """Trains and exports, unless that was done before."""
    done = Path(export.get("critic_folder", str(folder)))
    if not done.is_dir():
        start = time.process_time()
        module, data = make()
        lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ModelExport(str(folder), **export)],
        ).fit(module, data)
        print(f"{done}: {time.process_time() - start:.0f} s", flush=True)
    return str(done)


def train(folder: Path, seed: int, scale: float) -> dict[str, str]:
    """Trains the policy and the scorers of one seed."""
    lightning.seed_everything(seed, verbose=False)

    def rows(steps: int, batch: int) -> int:
        return max(1, round(steps * scale)) * batch

    def base() -> tuple[Any, Any]:
        train = sources("demonstrations", rows(360, 64), seed, "&high=12&careless=0.1")
        train += sources("demonstrations", rows(60, 64), seed, "&high=20&careless=0.1")
        return SFTModule(NANO, init="random", **optimizers(2e-3)), SFTDataModule(train, global_batch_size=64)

    def sft() -> tuple[Any, Any]:
        train = sources("demonstrations", rows(60, 64), 40 + seed, "&high=12&careless=0.65&slips=0.3")
        return SFTModule(start, **optimizers(3e-4)), SFTDataModule(train, global_batch_size=64)

    def process() -> tuple[Any, Any]:
        data = StepwiseDataModule(labelled(rows(220, 32), 10 + seed), global_batch_size=32)
        return ProcessRewardModule(start, **optimizers(5e-4)), data

    def reward() -> tuple[Any, Any]:
        # It starts from what the PRM has learned of steps.
        data = PreferenceDataModule(
            sources("preference", rows(110, 32), 20 + seed, "&high=20&careless=0.3"), global_batch_size=32
        )
        return RewardModule(found["PRM"], pooling="mean", center_rewards_coefficient=0.01, **optimizers(3e-4)), data

    def critic() -> tuple[Any, Any]:
        # Only the critic's own weights learn while it is warmed up; its values start as the rewards.
        value = {"model": found["RM"], "warmup_iterations": 10**6, "coef": 1.0, "cliprange": None}
        module = PPOModule(
            policy,
            rewards=[exact_answer],
            num_generations=4,
            num_updates=2,
            max_completion_length=MOST_TOKENS,
            kl_coef=0.0,
            value=value,
            gae={"lam": 1.0, "whiten_advantages": False},
            seed=seed,
            **optimizers(3e-4),
        )
        train = sources("prompts", rows(20, 32), 30 + seed, "&high=20")
        return module, PromptDataModule(train, global_batch_size=32)

    start = fit(folder / "base", base)
    policy = fit(folder / "policy", sft)
    found = {"policy": policy, "PRM": fit(folder / "PRM", process)}
    found["RM"] = fit(folder / "RM", reward)
    found["critic"] = fit(folder / "after", critic, critic_folder=str(folder / "critic"))
    return found


# Measuring.


class Bench:
    """One seed's policy and scorers, and the problems of one setting.

    Args:
        folders: what ``train`` returned.
        setting: the task's difficulty.
        problems: their number.
        seed: of the samples.
    """

    def __init__(self, folders: dict[str, str], setting: str, problems: int, seed: int) -> None:
        self.engine = LocalEngine.from_pretrained(folders["policy"])
        self.scorers: dict[str, Any] = {
            "RM": RewardScorer(folders["RM"]),
            "PRM": ProcessScorer(folders["PRM"], aggregation="min"),
            "critic": ValueScorer(folders["critic"]),
            "verifier": VerifierScorer(exact_answer),
        }
        for name in ("RM", "PRM", "critic"):
            self.scorers[name].attach(self.engine)
        rows = open_task(f"sums:prompts?split=test&rows={problems}&seed={seed}&{setting}")
        self.prompts, self.answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
        self.seeds = [1000 * seed + number for number in range(problems)]
        self.sampling = SamplingParams(max_new_tokens=MOST_TOKENS)

    def right(self, texts: Sequence[str]) -> list[float]:
        """1 for each right solution."""
        return [value or 0.0 for value in exact_answer(self.prompts, texts, answer=self.answers)]

    def greedy(self) -> Row:
        """The policy's likeliest tokens."""
        params = SamplingParams(max_new_tokens=MOST_TOKENS, temperature=0.0)
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
            # What scoring the first n reads; a prompt is read with the first.
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
    for setting, keys in SETTINGS.items():
        bench = Bench(folders, keys, args.problems, seed)
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
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, setting in zip(figure.subplots(1, 2, sharey=True), SETTINGS, strict=True):
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
    figure.axes[1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
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
