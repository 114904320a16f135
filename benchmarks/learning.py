"""Trains every method on the embedded task over several seeds, and checks held-out metrics against requirements.

    python benchmarks/learning.py                                 # seeds 0, 1, 2, everything
    python benchmarks/learning.py --seeds 0 --only dpo grpo       # some of it
    python benchmarks/learning.py --figure benchmarks/learning.png

Runs configs/pipelines/quickstart.yaml with further stages: an ensemble of reward models, a process reward model,
policies trained with it and with the verifier, and a reward that can be hacked, with and without a guard. Stages that
are finished are not repeated. The exit status says whether all requirements hold.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

QUICKSTART = "configs/pipelines/quickstart.yaml"
VERIFIER = "rlhf_lightning.rewards.exact_answer"
# Requirements for every seed.
LEAST_SFT, MOST_SFT = 0.30, 0.75  # for the mean over the seeds
LEAST_PAIR_ACCURACY, LEAST_STEP_F1, LEAST_GRPO = 0.90, 0.85, 0.90
MOST_GRPO_SECONDS = 240
GAINS = {
    "dpo": 0.15,
    "simpo": 0.12,
    "kto": 0.12,
    "ppo": 0.15,
    "ppo_verifier": 0.15,
    "grpo_steps": 0.0,
    "ppo_steps": 0.0,
}
GROUPS = ("dpo", "simpo", "kto", "grpo", "ppo", "ppo_verifier", "grpo_steps", "ppo_steps", "rewards", "hacked")


def number_of_steps(completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that can be hacked: it pays for steps, since solutions in steps are right more often than guesses."""
    return [float(completion.count("=")) for completion in completions]


def pipeline(groups: Sequence[str]) -> Any:
    """The quickstart's stages and those of this script."""
    config: Any = OmegaConf.load(QUICKSTART)
    reward, grpo, ppo = config.stages.reward, config.policies.grpo.grpo, config.policies.ppo.ppo
    logger = config.stages.sft.trainer.logger

    # Reward models: an ensemble, a longer run, and a process reward model.
    members = {"num_models": 4, "bootstrap": True, "optimizer": {"init_args": {"lr": 5.0e-4}}}
    train = "sums:preference?rows=9600&careless=0.15&seed=${seed}2"
    changes = {"model": {"init_args": members}, "data": {"init_args": {"train": train}}}
    ensemble = OmegaConf.merge(reward, changes)
    # The quickstart's reward model is trained too briefly to detect slips with every seed.
    train = "sums:preference?rows=32000&careless=0.15&seed=${seed}2"
    longer = OmegaConf.merge(reward, {"data": {"init_args": {"train": train}}})
    steps = OmegaConf.merge(
        reward,
        {
            "config": ["configs/process_reward/default.yaml", *reward.config[1:]],
            # Start from the reward model, which detects wrong steps already: from SFT it takes several times as long.
            "model": {
                "init_args": {"model": "${outputs.reward_longer.model}", "optimizer": {"init_args": {"lr": 3.0e-4}}}
            },
            "data": {
                "init_args": {
                    "train": "sums:stepwise?rows=16000&seed=${seed}4",
                    "val": "sums:stepwise?split=validation&rows=200",
                    "test": "sums:stepwise?split=test&rows=500",
                    "global_batch_size": 32,
                }
            },
            "trainer": {"val_check_interval": 200, "logger": logger},
        },
    )
    for key in ("pooling", "center_rewards_coefficient"):
        del steps.model.init_args[key]

    # Policies: rewarded step by step, by a reward that can be hacked, and by the verifier.
    dense = {
        "model": {
            "init_args": {
                "rewards": [],
                "process_reward": {
                    "class_path": "rlhf_lightning.rewards.ProcessModelSteps",
                    "init_args": {"model": "${outputs.process_reward.model}"},
                },
            }
        }
    }
    hacked = OmegaConf.merge(
        grpo,
        {
            "model": {"init_args": {"rewards": ["learning.number_of_steps"], "reference": "frozen"}},
            "trainer": {"callbacks": [config.policies.dpo.dpo.trainer.callbacks[0]], "max_steps": 40},
            "export": {"monitor": None},
        },
    )
    guard = {"class_path": "rlhf_lightning.callbacks.KLGuard", "init_args": {"max_kl": 0.03}}
    guarded = OmegaConf.merge(hacked, {"trainer": {"callbacks": [*hacked.trainer.callbacks, guard]}})

    verified = {"model": {"init_args": {"rewards": [VERIFIER]}}}
    config.policies |= {
        "rewards": {"reward_longer": longer, "ensemble": ensemble, "process_reward": steps},
        "ppo_verifier": {"ppo_verifier": OmegaConf.merge(ppo, verified)},
        "grpo_steps": {"reward_longer": longer, "process_reward": steps, "grpo_steps": OmegaConf.merge(grpo, dense)},
        "ppo_steps": {"reward_longer": longer, "process_reward": steps, "ppo_steps": OmegaConf.merge(ppo, dense)},
        "hacked": {"hacked": hacked, "hacked_guarded": guarded},
    }
    config.policy = list(groups)
    return config


def run(config: Any, run_dir: Path, seed: int) -> dict[str, Any]:
    """Runs the pipeline in a process of its own and returns its stages' summaries."""
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, run_dir / "pipeline.yaml")
    command = [sys.executable, "-m", "rlhf_lightning", "pipeline", "--config", str(run_dir / "pipeline.yaml")]
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(
        [*command, "--run_dir", str(run_dir), f"seed={seed}"],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return {stage["stage"]: stage for stage in summary["stages"]}


def disagreement(run_dir: Path, source: str) -> float:
    """Mean standard deviation over the ensemble's members on pairs of a source."""
    import lightning

    from rlhf_lightning import RewardModule
    from rlhf_lightning.datamodules import PreferenceDataModule

    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    module = RewardModule.from_pretrained(str(run_dir / "ensemble/model"))
    (metrics,) = trainer.test(module, PreferenceDataModule(test=source), verbose=False)
    return float(metrics["test/rewards/disagreement"])


def figures(stages: dict[str, Any], run_dir: Path) -> dict[str, float]:
    """The metrics of a seed, by name."""
    found = {name: stage["test_accuracy"] for name, stage in stages.items() if stage["test_accuracy"] is not None}
    if "process_reward" in stages:
        found["pair_accuracy"] = stages["reward_longer"]["metrics"]["test/rewards/accuracies"]
        found["step_f1"] = stages["process_reward"]["metrics"]["test/first_error_f1"]
    if "ensemble" in stages:
        found["std"] = disagreement(run_dir, "sums:preference?split=test&rows=500")
        found["std_shifted"] = disagreement(run_dir, "sums:preference?split=test&rows=500&low=30&high=60")
    if "grpo" in stages:
        found["grpo_seconds"] = stages["grpo"]["seconds"]
    return found


def requirements(found: list[dict[str, float]]) -> dict[str, bool]:
    """The requirements, and whether every seed meets them."""
    checks: dict[str, bool] = {}
    sft = statistics.mean(seed["sft"] for seed in found)
    checks[f"SFT between {LEAST_SFT:.0%} and {MOST_SFT:.0%} on the mean"] = LEAST_SFT <= sft <= MOST_SFT
    if "std" in found[0]:
        name = "ensemble: larger standard deviation on shifted problems"
        checks[name] = all(seed["std_shifted"] > seed["std"] for seed in found)
    if "step_f1" in found[0]:
        name = f"reward model: pair accuracy at least {LEAST_PAIR_ACCURACY:.0%}"
        checks[name] = all(seed["pair_accuracy"] >= LEAST_PAIR_ACCURACY for seed in found)
        name = f"process reward model: first-error F1 at least {LEAST_STEP_F1}"
        checks[name] = all(seed["step_f1"] >= LEAST_STEP_F1 for seed in found)
    for stage, gain in GAINS.items():
        if stage in found[0]:
            more = f"at least {100 * gain:.0f} points" if gain else "something"
            checks[f"{stage}: gains {more}"] = all(seed[stage] - seed["sft"] > gain for seed in found)
    if "hacked" in found[0]:
        checks["hacked reward: ends higher with the KL guard"] = all(s["hacked_guarded"] > s["hacked"] for s in found)
    if "grpo" in found[0]:
        name = f"grpo: at least {LEAST_GRPO:.0%} within {MOST_GRPO_SECONDS} s"
        checks[name] = all(s["grpo"] >= LEAST_GRPO and s["grpo_seconds"] <= MOST_GRPO_SECONDS for s in found)
    return checks


def sample_next_tokens(run_dirs: Sequence[Path], path: Path) -> None:
    """Accuracy on validation problems against seconds of training: SFT, then the five that start from it.

    Thin lines are seeds. Time includes a method's preparations: sampling pairs, or training the reward model.
    """
    from matplotlib.figure import Figure

    from rlhf_lightning.loggers import read_history
    from rlhf_lightning.pipeline.figures import points

    needs = {"dpo": ["pairs"], "simpo": ["pairs"], "kto": ["pairs"], "grpo": [], "ppo_verifier": [], "ppo": ["reward"]}
    labels = {"ppo": "ppo (learned reward)", "ppo_verifier": "ppo (verifier)", "grpo": "grpo (verifier)"}
    colours = dict(zip(needs, ("#1f6f8b", "#66a182", "#edae49", "#d1495b", "#8d6a9f", "#444444"), strict=True))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 2])
    for number, run_dir in enumerate(run_dirs):
        summary = json.loads((run_dir / "summary.json").read_text())
        seconds = {stage["stage"]: stage["seconds"] for stage in summary["stages"]}
        left.plot(
            *points(read_history(run_dir / "sft/history.jsonl"), "val/accuracy", "seconds"), color="#888888", lw=1.2
        )
        for name, colour in colours.items():
            if not (run_dir / name / "history.jsonl").is_file():
                continue
            x, y = points(read_history(run_dir / name / "history.jsonl"), "val/accuracy", "seconds")
            before = sum(seconds[stage] for stage in needs[name])
            label = labels.get(name, name) if number == 0 else None
            right.plot([before + at for at in x], y, color=colour, lw=1.2, marker="o", ms=2.5, label=label)
    left.set_title("sft, from scratch", fontsize=10)
    right.set_title("from the SFT model; pairs and reward model included", fontsize=10)
    left.set_ylabel("greedy accuracy, validation problems", fontsize=9)
    right.set_xscale("symlog", linthresh=10)
    right.set_xticks([0, 2, 5, 10, 20, 50, 100], ["0", "2", "5", "10", "20", "50", "100"])
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.set_xlabel("seconds of training, one core", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Runs all seeds, prints the table, and reports which requirements hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run_dir", type=Path, default=Path("runs/learning"))
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="POLICY", help=", ".join(GROUPS))
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()

    run_dirs = {seed: args.run_dir / f"seed-{seed}" for seed in args.seeds}
    config = pipeline(args.only)
    found = [figures(run(config, run_dir, seed), run_dir) for seed, run_dir in run_dirs.items()]
    table = Table(title="held-out figures", title_justify="left")
    for heading in ("", *(f"seed {seed}" for seed in args.seeds), "mean"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in found[0]:
        values = [seed[name] for seed in found]
        shown = [f"{value:.3f}" for value in (*values, statistics.mean(values))]
        table.add_row(name, *shown)
    Console().print(table)
    if args.figure is not None:
        sample_next_tokens(list(run_dirs.values()), args.figure)
    checks = requirements(found)
    for name, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {name}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
