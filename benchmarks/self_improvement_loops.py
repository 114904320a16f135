"""The loops of ``benchmarks/self_improvement.py``: stages of a pipeline for each, and the models they start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from rlhf_lightning.data.final_answer import final_answer
from rlhf_lightning.data.tasks import open_task
from rlhf_lightning.self_improvement.challenger import challenges
from rlhf_lightning.self_improvement.templates import fill
from rlhf_lightning.utils.files import json_line, write_atomically

OVERNIGHT = "configs/pipelines/overnight.yaml"
SAMPLING = {"max_new_tokens": 48}
ROUNDS = 3
PROBLEMS = 256
RATES = {"sft": 5.0e-4, "dpo": 1.0e-4}
PROMPTS = f"sums:prompts?rows={PROBLEMS}&seed=${{variables.problems}}${{round.number}}"
CAREFUL = f"sums:demonstrations?careless=0&rows={PROBLEMS}&seed=${{variables.problems}}${{round.number}}"
Stages = dict[str, Any]

# Prompts that the taught start has learned, apart from sums.
QUESTION = "{prompt} {completion} {statement}"
STATEMENT = "Right?"
CRITIQUE = "{prompt}\n{answer}\nWrong:"
REVISION = "{prompt}\n{answer}\nWrong: {critique}\nBetter:"
CHALLENGE = "{examples}\n\nTask:"


@dataclass(frozen=True)
class Loop:
    """A loop: a stage whose model is its end, and stages before it."""

    label: str
    stage: dict[str, Any]
    before: Stages = field(default_factory=dict)
    start: str = "start"


def suite(name: str, prompts: str) -> dict[str, Any]:
    """A suite of one task."""
    return {"name": name, "tasks": [{"name": "sums", "prompts": prompts, "sampling": SAMPLING}]}


VALIDATION = suite("validation", "sums:prompts?split=validation&rows=300")


def trained(kind: Literal["sft", "dpo"], model: str, rows: str, **trainer: Any) -> dict[str, Any]:
    """A stage that trains on rows."""
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": RATES[kind], "weight_decay": 0.0}}
    return {
        "kind": "fit",
        "config": [f"configs/{kind}/default.yaml", "configs/trainer/cpu.yaml"],
        "model": {"init_args": {"model": model, "optimizer": optimizer}},
        "data": {"init_args": {"train": rows, "global_batch_size": 16}},
        "trainer": {"max_epochs": 1, "logger": False, "callbacks": []} | trainer,
    }


def rounds(label: str, body: Stages, *, start: str = "start", anew: bool = False, gated: bool = True) -> Loop:
    """A loop of rounds: rows of the stage ``own``, and training on them, from the start if ``anew``."""
    kind = body["own"]["rows"][0]
    place = f"${{variables.{start}}}"
    model = place if anew else "${round.model}"
    train = trained("sft" if kind == "demonstrations" else "dpo", model, f"${{outputs.own.{kind}}}")
    # Without a gate each round is measured, too, and accepted whatever it is.
    criteria = {"accept": "better"} if gated else {"accept": "not_worse", "threshold": 1.0}
    stage = {
        "kind": "rounds",
        "model": place,
        "rounds": ROUNDS,
        "suite": VALIDATION,
        "criteria": criteria | {"patience": ROUNDS},
        "body": body | {"train": train},
        "evaluate": False,
    }
    return Loop(label, stage, start=start)


def sampled(*rows: str, **options: Any) -> Stages:
    """Rows of four samples for each problem."""
    own = {"kind": "sample", "model": "${round.model}", "prompts": PROMPTS, "num_samples": 4, "sampling": SAMPLING}
    return {"own": own | {"rows": [*rows, "samples"]} | options}


def league() -> Stages:
    """The accepted model and earlier ones, drawn by how it does against each, answer the same problems."""
    own = {"kind": "self-play", "model": "${round.model}", "opponents": "${round.earlier}", "prompts": PROMPTS}
    return {"own": own | {"num_samples": 2, "sampling": SAMPLING, "rows": ["pairs", "samples"]}}


def revised(**options: Any) -> Stages:
    """The model finds faults with its answers and revises them, until the verifier says that they are right."""
    own = {"kind": "refine", "model": "${round.model}", "prompts": PROMPTS, "sampling": SAMPLING, "good_enough": 1.0}
    return {"own": own | {"critique": CRITIQUE, "revision": REVISION, "rows": ["pairs", "samples"]} | options}


def challenged() -> Stages:
    """The model writes problems; where it solves one sometimes, the answer that most samples give is right."""
    problems = {
        "kind": "challenge",
        "model": "${round.model}",
        "prompts": PROMPTS,
        "number": PROBLEMS,
        "num_examples": 2,
        "template": CHALLENGE,
        "writing": {"max_new_tokens": 24},
        "num_samples": 8,
        "sampling": SAMPLING,
        "low": 0.25,
    }
    return {"problems": problems} | sampled("pairs", prompts="${outputs.problems.prompts}")


def within(name: str, label: str) -> Loop:
    """RAFT as a callback: rows of the start, then two rounds of their own, in one run of training."""
    problems = "sums:prompts?rows={rows}&seed=${{variables.problems}}{number}"
    right: dict[str, Any] = {"num_samples": 4, "sampling": SAMPLING, "keep": 4}
    first = {"model": "${variables.start}", "prompts": problems.format(rows=PROBLEMS, number=1)}
    own = right | {"prompts": problems.format(rows=ROUNDS * PROBLEMS, number=2), "prompts_per_round": PROBLEMS}
    own |= {"folder": "${run_dir}/" + name + "/rows", "seed": "${seed}"}
    gate = {"suite": VALIDATION, "folder": "${run_dir}/" + name + "/accepted", "criteria": {"accept": "better"}}
    callbacks = [
        {"class_path": "rlhf_lightning.callbacks.SelfImprovement", "init_args": own},
        {"class_path": "rlhf_lightning.callbacks.CapabilityGate", "init_args": gate},
    ]
    rows = "${outputs." + name + "_first.demonstrations}"
    stage = trained("sft", "${variables.start}", rows, max_epochs=ROUNDS, callbacks=callbacks) | {"evaluate": False}
    return Loop(label, stage, {f"{name}_first": sampled("demonstrations", **first, **right)["own"]})


def reward(name: str, **arguments: Any) -> dict[str, Any]:
    """A learned reward."""
    return {"class_path": f"rlhf_lightning.rewards.{name}", "init_args": arguments}


RIGHT = {"name": "right", "statement": STATEMENT}
ITSELF = reward("ConstitutionReward", principles=[RIGHT], judge="${round.model}", question=QUESTION)
BY_RIGHT_ANSWERS = {
    "raft": rounds("RAFT", sampled("demonstrations", keep=4)),
    "rest_em": rounds("ReST-EM", sampled("demonstrations", num_samples=8, keep=10), anew=True),
    "star": rounds("STaR", sampled("demonstrations", hint="{prompt}{answer}\n"), anew=True),
    "within": within("within", "RAFT within one fit"),
    "dpo": rounds("iterative DPO", sampled("pairs")),
    "league": rounds("play against a league", league()),
    "spin": rounds("SPIN", sampled("spin", num_samples=1, prompts=CAREFUL)),
}
BY_MODELS = {
    "reward": rounds(
        "DPO by a reward model", sampled("pairs", verifier=reward("RewardModelReward", model="${variables.reward}"))
    ),
    "process": rounds(
        "DPO by a process reward model",
        sampled("pairs", verifier=reward("ProcessModelReward", model="${variables.process}")),
    ),
}
# The first of them to compare the others with.
FROM_TAUGHT = {
    "dpo_taught": rounds("iterative DPO", sampled("pairs"), start="taught"),
    "judged": rounds("self-rewarding", sampled("pairs", verifier=ITSELF), start="taught"),
    "refine": rounds("critique and revision", revised(), start="taught"),
    "refine_judged": rounds("the same, as its own judge", revised(verifier=ITSELF, good_enough=None), start="taught"),
    "challenge": rounds("problems of its own", challenged(), start="taught"),
}
SHORT = sampled("pairs", verifier="self_improvement.shortness")
# No requirement says how much such loops learn: the gate must keep them from falling, and one falls without.
UNFIT = {
    "untaught": rounds("its own judge, untaught", sampled("pairs", verifier=ITSELF)),
    "poisoned_gated": rounds("poisoned, with the gate", SHORT),
    "poisoned": rounds("poisoned, without it", SHORT, gated=False),
}
# Of the figure.
PANELS: dict[str, dict[str, Loop]] = {
    "by the right answers": BY_RIGHT_ANSWERS,
    "by reward models": BY_MODELS,
    "from a start that judges, revises and asks": FROM_TAUGHT,
    "by rewards that mislead": UNFIT,
}
LOOPS = {name: loop for loops in PANELS.values() for name, loop in loops.items()}


def starting(run_dir: Path) -> Any:
    """The models that loops start from, and the ones that rank samples; all but the taught start as of one night."""
    stages = {name: OmegaConf.load(OVERNIGHT).stages[name] for name in ("sft", "reward", "steps", "process")}
    stages["taught"] = OmegaConf.create(OmegaConf.to_container(stages["sft"]))
    stages["taught"].data.init_args.train = str(write_lessons(run_dir.parent))
    stages["taught"].trainer.max_steps = 1000
    stages["taught"].trainer.val_check_interval = 500
    for name in ("sft", "reward", "process", "taught"):
        stages[name].trainer.logger, stages[name].evaluate = False, False
    return OmegaConf.create({"run_dir": str(run_dir), "seed": 0, "threads": 1, "stages": stages})


def looping(seed: int, run_dir: Path, start: Path, names: Sequence[str] = tuple(LOOPS)) -> Any:
    """Loops, and the comparison of their ends with the start."""
    stages: Stages = {}
    for name in names:
        stages |= LOOPS[name].before | {name: LOOPS[name].stage}
    starts = {start: f"${{variables.{start}}}" for start in sorted({LOOPS[name].start for name in names})}
    stages["ends"] = {
        "kind": "evaluate",
        "models": starts | {name: "${outputs." + name + ".model}" for name in names},
        "suite": suite("held out", "sums:prompts?split=test&rows=500&seed=9"),
    }
    places = {"start": "sft", "taught": "taught", "reward": "reward", "process": "process"}
    variables = {name: str(start / stage / "model") for name, stage in places.items()} | {"problems": seed + 1}
    written = {"run_dir": str(run_dir), "seed": seed, "threads": 1, "variables": variables, "stages": stages}
    return OmegaConf.create(written)


# Lessons of the taught start besides sums: to judge answers, to say what is wrong with them, to revise them, and to
# write problems. Its sums are the same as those of the other start.
LESSONS = {"demonstrations": 25600, "judgements": 16000, "critiques": 6400, "revisions": 12800, "problems": 3200}


def write_lessons(folder: Path) -> Path:
    """Writes the rows of the taught start."""
    sums = open_task(f"sums:demonstrations?rows={LESSONS['demonstrations']}")
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in sums]
    rows += islice(judgements(), LESSONS["judgements"])
    rows += islice((critique for critique, _ in revisions()), LESSONS["critiques"])
    rows += islice((revision for _, revision in revisions()), LESSONS["revisions"])
    rows += new_problems()
    file = folder / "lessons.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(map(json_line, rows)))
    return file


def judgements() -> Iterator[dict[str, Any]]:
    """Answers with the verdict on them, asked for as ``ModelJudge`` asks."""
    for row in open_task(f"sums:demonstrations?rows={LESSONS['judgements']}&seed=100&careless=0.4&slips=0.5"):
        question = QUESTION.format(prompt=row["prompt"], completion=row["completion"], statement=STATEMENT)
        verdict = "yes" if final_answer(row["completion"]) == row["answer"] else "no"
        yield {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": verdict}],
        }


def revisions() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Answers with what is wrong with them, and with better ones."""
    number = LESSONS["revisions"]
    drafts = open_task(f"sums:demonstrations?rows={number}&seed=101&careless=0.5&slips=0.5")
    careful = open_task(f"sums:demonstrations?rows={number}&seed=101&careless=0")
    for draft, better in zip(drafts, careful, strict=True):
        steps = draft["completion"].split("\n")
        slips = [ours for theirs, ours in zip(steps, better["completion"].split("\n"), strict=False) if theirs != ours]
        fault = "no steps" if len(steps) == 1 else slips[0] if slips else "nothing"
        values = {"prompt": draft["prompt"], "answer": draft["completion"], "critique": fault}
        yield (
            {"prompt": fill(CRITIQUE, values), "completion": fault},
            {"prompt": fill(REVISION, values), "completion": better["completion"]},
        )


def new_problems() -> list[dict[str, Any]]:
    """Problems after two like them."""
    prompts = [row["prompt"] for row in open_task(f"sums:prompts?rows={2 * LESSONS['problems']}&seed=102")]
    known, wanted = prompts[: LESSONS["problems"]], prompts[LESSONS["problems"] :]
    asked = challenges(known, number=len(wanted), num_examples=2, template=CHALLENGE)
    return [{"prompt": prompt, "completion": problem} for prompt, problem in zip(asked, wanted, strict=True)]
