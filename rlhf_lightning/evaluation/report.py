"""Reports of evaluations: a table, ``results.json``, a page, and a history of all runs into the same folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from ..utils.files import check_names, claim, read_marker, write_atomically
from .history import HISTORY, remember
from .results import AtK, PairedResult, TaskResult, at_k_of, compare_all
from .wins import COLUMNS, Wins

RESULTS, PAGE = "results.json", "report.html"
_NAMES = (RESULTS, PAGE, HISTORY)
_KIND = "evaluation"
_OF_MODELS = ("config.json", "adapter_config.json")
# Prompts that the page shows of each task; those on which models differ come first.
_SHOWN = 12


@dataclass(frozen=True)
class Report:
    """Results of models on a suite.

    Attributes:
        suite: name of the suite.
        results: of every model and task, the models in their order.
        seed: of samples and resamples.
        wins: win rates against the first model, of tasks that ask for them.
    """

    suite: str
    results: tuple[TaskResult, ...]
    seed: int = 0
    wins: tuple[Wins, ...] = ()

    @cached_property
    def comparisons(self) -> list[PairedResult]:
        """Every model compared with the first, on the same prompts."""
        return compare_all(self.results, seed=self.seed)

    @cached_property
    def at_k(self) -> list[AtK]:
        """Estimates at k with their intervals, each compared with the first model's."""
        return at_k_of(self.results, seed=self.seed)

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(dict.fromkeys(result.model for result in self.results))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(dict.fromkeys(result.task.name for result in self.results))

    def result(self, model: str, task: str) -> TaskResult:
        """Returns the result of a model on a task.

        Raises:
            KeyError: the report has no such task.
        """
        for found in self.results:
            if (found.model, found.task.name) == (model, task):
                return found
        raise KeyError(f"there is no result of {model!r} on {task!r}; models are {self.models}, tasks {self.tasks}")

    def comparison(self, model: str, task: str) -> PairedResult | None:
        """Returns the comparison of a model with the first, if there is one."""
        fitting = (found for found in self.comparisons if (found.model, found.task) == (model, task))
        return next(fitting, None)

    def table(self) -> str:
        """Formats accuracies, intervals, scores over sections, estimates at k and comparisons as a Markdown table.

        Intervals and comparisons of estimates at k, and win rates, follow in tables of their own.
        """
        lines = [
            "| task | model | right | 95 % interval | score | pass@k | maj@k | best@k | difference | p |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for task in self.tasks:
            for found in (result for result in self.results if result.task.name == task):
                lines.append(f"| {task} | {found.model} | {' | '.join(self._cells(found))} |")
        if self.at_k:
            heads = f"| task | model | {' | '.join(_AT_K_COLUMNS)} |"
            lines += ["", heads, "|---|---|---|" + "---:|" * (len(_AT_K_COLUMNS) - 1)]
        for at_k in self.at_k:
            lines.append(f"| {at_k.task} | {at_k.model} | {' | '.join(_at_k_cells(at_k))} |")
        if self.wins:
            lines += [
                "",
                f"| task | model | against | {' | '.join(COLUMNS)} |",
                "|---|---|---|" + "---:|" * len(COLUMNS),
            ]
        for wins in self.wins:
            lines.append(f"| {wins.task} | {wins.model} | {wins.baseline} | {' | '.join(wins.cells())} |")
        return "\n".join(lines)

    def _cells(self, found: TaskResult) -> list[str]:
        metrics = found.metrics
        at_k = [_largest_k(metrics, kind) for kind in _AT_K]
        paired = self.comparison(found.model, found.task.name)
        difference, p_value = "", ""
        if paired is not None:
            difference, p_value = _difference_cells(paired)
        interval = f"{metrics['accuracy_low']:.1%} to {metrics['accuracy_high']:.1%}"
        score = f"{metrics['score']:.1%}" if "score" in metrics else ""
        return [f"{metrics['accuracy']:.1%}", interval, score, *at_k, difference, p_value]

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values: metrics and comparisons first, then every sample."""
        return {
            "suite": self.suite,
            "seed": self.seed,
            "metrics": {
                model: {r.task.name: r.metrics for r in self.results if r.model == model} for model in self.models
            },
            "comparisons": [asdict(found) for found in self.comparisons],
            "at_k": [asdict(found) for found in self.at_k],
            "win_rates": [asdict(found) for found in self.wins],
            "results": [result.as_dict() for result in self.results],
        }

    @classmethod
    def read(cls, folder: str | Path) -> Report:
        """Reads the report that was saved in a folder.

        Raises:
            FileNotFoundError: the folder holds no report.
        """
        path = Path(folder).expanduser() / RESULTS
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no {RESULTS} in {str(folder)!r}: pass the output folder of an evaluation"
            )
        written = json.loads(path.read_text(encoding="utf-8"))
        wins = tuple(map(Wins.read, written.get("win_rates", ())))
        return cls(written["suite"], tuple(map(TaskResult.read, written["results"])), written["seed"], wins)

    @staticmethod
    def check_output(folder: str | Path) -> None:
        """Refuses a folder that is something else: a model or a run, or one with other files of these names.

        Raises:
            ValueError: naming the folder or the file.
        """
        place = Path(folder).expanduser()
        if place.exists() and not place.is_dir():
            raise ValueError(f"output {str(folder)!r} is a file: pass a folder")
        # The list of another kind of folder would be lost, and with it the right to replace what is on it.
        record = read_marker(place)
        kind = None if record is None else record["kind"]
        if kind not in (None, _KIND) or any((place / name).is_file() for name in _OF_MODELS):
            raise ValueError(
                f"output {str(folder)!r} is the folder of a {kind or 'model'}, and a report would change it: write to "
                "a folder of its own"
            )
        check_names(place, _KIND, _NAMES)

    def save(self, folder: str | Path) -> Path:
        """Writes ``results.json`` and ``report.html``, and appends new results to ``history.jsonl``.

        Args:
            folder: is made if it does not exist; may hold other files.

        Returns:
            The page.

        Raises:
            ValueError: one of these files exists and was not written by an evaluation.
        """
        place = Path(folder).expanduser()
        self.check_output(place)
        claim(place, _KIND, _NAMES)
        write_atomically(place / RESULTS, json.dumps(self.as_dict(), ensure_ascii=False, indent=1) + "\n")
        remember(place / HISTORY, self.results, self.suite, self.seed)
        write_atomically(place / PAGE, self.page())
        return place / PAGE

    def page(self) -> str:
        """Makes the HTML page: the table, all metrics, and completions of the same prompts side by side."""
        # Completions are untrusted text: autoescape; an undefined name is a mistake of the template.
        template = (Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8")
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        return environment.from_string(template).render(
            suite=self.suite, seed=self.seed, models=self.models, tasks=[self._task_view(task) for task in self.tasks]
        )

    def _task_view(self, task: str) -> dict[str, Any]:
        found = [result for result in self.results if result.task.name == task]
        rows = [{"result": result, "paired": self.comparison(result.model, task)} for result in found]
        names = list(dict.fromkeys(name for result in found for name in result.metrics))
        return {
            "name": task,
            "options": {name: value for name, value in found[0].task.as_dict().items() if value not in (None, {}, [])},
            "rows": rows,
            "at_k": [(at_k.model, _at_k_cells(at_k)) for at_k in self.at_k if at_k.task == task],
            "at_k_columns": _AT_K_COLUMNS,
            "wins": [wins for wins in self.wins if wins.task == task],
            "win_columns": COLUMNS,
            "metrics": [(name, [result.metrics.get(name) for result in found]) for name in names],
            "sections": [
                (name.removeprefix("section/"), [result.metrics.get(name) for result in found])
                for name in names
                if name.startswith("section/") or name == "score"
            ],
            "prompts": self._side_by_side(found),
        }

    def _side_by_side(self, found: list[TaskResult]) -> list[dict[str, Any]]:
        """Picks prompts to show: those on which models differ most first, in the order of the rows."""
        by_row = [{prompt.row_id: prompt for prompt in result.prompts} for result in found]
        rows = [row for row in by_row[0] if all(row in prompts for prompts in by_row)]
        scores = {row: [result.scores.get(row) for result in found] for row in rows}
        rows = sorted(rows, key=lambda row: _spread(scores[row]), reverse=True)[:_SHOWN]
        shown = []
        for row in rows:
            texts = [result.task.shown(prompts[row]) for result, prompts in zip(found, by_row, strict=True)]
            answers = [{"score": score, "text": text} for score, text in zip(scores[row], texts, strict=True)]
            shown.append({"prompt": _as_text(by_row[0][row].prompt), "answers": answers})
        return shown


_AT_K = ("pass", "maj", "best")


_AT_K_COLUMNS = ("estimate", "value", "95 % interval", "difference", "p")


def _difference_cells(paired: PairedResult) -> tuple[str, str]:
    of = paired.comparison
    difference = f"{of.difference:+.1%} ({of.low:+.1%} to {of.high:+.1%})"
    return difference + ("" if paired.differing else ": no prompt differs"), f"{of.p_value:.3g}"


def _at_k_cells(found: AtK) -> list[str]:
    of = found.interval
    paired = ("", "") if found.paired is None else _difference_cells(found.paired)
    return [found.estimate, f"{of.value:.1%}", f"{of.low:.1%} to {of.high:.1%}", *paired]


def _largest_k(metrics: Mapping[str, float], kind: str) -> str:
    """Formats an estimate at the largest k that it was made for; empty without one."""
    ks = [int(name.removeprefix(f"{kind}@")) for name in metrics if name.startswith(f"{kind}@")]
    return f"{metrics[f'{kind}@{max(ks)}']:.1%} (k={max(ks)})" if ks else ""


def _spread(scores: list[float | None]) -> float:
    given = [score for score in scores if score is not None]
    return max(given) - min(given) if given else 0.0


def _as_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt or ())
