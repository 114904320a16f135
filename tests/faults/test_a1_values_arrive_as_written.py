"""Values in a file, on the command line and in YAML reach the code as written: every source by every entrance."""

from __future__ import annotations

import gzip
import inspect
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from lightning import Callback, LightningDataModule, LightningModule

from rlhf_lightning import callbacks, datamodules, modules
from rlhf_lightning.cli import Parser, PostTrainingCLI, main
from rlhf_lightning.datamodules import PromptDataModule
from rlhf_lightning.pipeline import load_pipeline
from rlhf_lightning.pipeline.fit_stage import StageCLI
from rlhf_lightning.pipeline.stages import FitStage
from rlhf_lightning.utils import yaml_parser

pytestmark = pytest.mark.filterwarnings("ignore")

NANO = str(Path(__file__).parents[2] / "configs/models/nano")
# Each is something else to one version of YAML or another, or to a reader that guesses.
TEXTS = ["yes", "4", "12:30", "~", "Note: hello", "1e3", "null", "true", "0x10", "010", "1_000", "2024-01-01", "- a"]
TEXTS += ["# c", "{a: b}", "[1, 2]", "'q'", '"q"', "&a b", "*a", "!!int 3", "1.50", "off", "Ünï", ".inf", " padded "]
ROWS = [{"prompt": f"{text}?", "answer": text} for text in TEXTS]
SPLITS = {"train": ROWS[:20], "val": ROWS[20:23], "test": ROWS[23:25], "predict": ROWS[25:]}
HUB_SPLITS = {"train": "train", "val": "validation", "test": "test", "predict": "predict"}


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def csv_bytes(rows: list[dict[str, str]]) -> bytes:
    out = io.BytesIO()
    pyarrow.csv.write_csv(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def arrow_file(path: Path, rows: list[dict[str, str]], open_writer: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, open_writer(sink, table.schema) as writer:
        writer.write_table(table)


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, tuple[str, Callable[[Path, list[dict[str, str]]], Any]]] = {
    "jsonl": (".jsonl", lambda path, rows: path.write_bytes(lines(rows))),
    "json-list": (".json", lambda path, rows: path.write_text(json.dumps(rows, indent=1))),
    "json-lines": (".json", lambda path, rows: path.write_bytes(lines(rows))),
    "csv": (".csv", lambda path, rows: path.write_bytes(csv_bytes(rows))),
    "parquet": (".parquet", write_table),
    "arrow-stream": (".arrow", lambda path, rows: arrow_file(path, rows, pa.ipc.new_stream)),
    "arrow-file": (".arrow", lambda path, rows: arrow_file(path, rows, pa.ipc.new_file)),
    "gz": (".jsonl.gz", lambda path, rows: path.write_bytes(gzip.compress(lines(rows)))),
}


def write_source(kind: str, folder: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> str | list[str]:
    """Writes the rows of a split and says what a user would call them."""
    rows = SPLITS[split]
    if kind == "folder":
        (folder / split).mkdir()
        (folder / split / f"{HUB_SPLITS[split]}.jsonl").write_bytes(lines(rows))
        return str(folder / split)
    if kind == "files":
        files = [folder / f"{split}-{part}.json" for part in range(2)]
        for file, part in zip(files, (rows[:1], rows[1:]), strict=True):
            file.write_bytes(lines(part))
        return [str(file) for file in files if file.stat().st_size]
    if kind == "hub":
        monkeypatch.setattr(datasets, "load_dataset", hub)
        return f"org/name?split={HUB_SPLITS[split]}"
    suffix, write = WRITERS[kind]
    write(folder / f"{split}{suffix}", rows)
    return str(folder / f"{split}{suffix}")


def hub(name: str, config: str | None, *, streaming: bool, **options: Any) -> Any:
    """Stands in for the hub."""
    assert (name, config) == ("org/name", None)
    loaded = {HUB_SPLITS[split]: datasets.Dataset.from_list(rows) for split, rows in SPLITS.items()}
    return {split: rows.to_iterable_dataset() for split, rows in loaded.items()} if streaming else loaded


def by_options(sources: dict[str, Any], folder: Path, prefix: str = "--data.") -> Any:
    texts = {s: source if isinstance(source, str) else json.dumps(source) for s, source in sources.items()}
    given = [f"{prefix}{split}={source}" for split, source in texts.items()]
    return PostTrainingCLI([*MODULE, "--data=PromptDataModule", "--data.shuffle=false", *given], run=False).datamodule


def by_init_args(sources: dict[str, Any], folder: Path) -> Any:
    return by_options(sources, folder, "--data.init_args.")


def by_file(sources: dict[str, Any], folder: Path) -> Any:
    (folder / "mine.yaml").write_text(json.dumps({"data": data_section(sources)}))
    return PostTrainingCLI([*MODULE, f"--config={folder / 'mine.yaml'}"], run=False).datamodule


def by_pipeline(sources: dict[str, Any], folder: Path) -> Any:
    stage = {"kind": "fit", "model": MODEL, "data": data_section(sources), "trainer": {"accelerator": "cpu"}}
    (folder / "pipeline.yaml").write_text(json.dumps({"run_dir": str(folder / "run"), "stages": {"one": stage}}))
    return stage_data(folder / "pipeline.yaml")


def by_override(sources: dict[str, Any], folder: Path) -> Any:
    stage = {"kind": "fit", "model": MODEL, "data": data_section({}), "trainer": {"accelerator": "cpu"}}
    (folder / "pipeline.yaml").write_text(json.dumps({"run_dir": str(folder / "run"), "stages": {"one": stage}}))
    texts = {s: source if isinstance(source, str) else json.dumps(source) for s, source in sources.items()}
    return stage_data(folder / "pipeline.yaml", [f"stages.one.data.init_args.{s}={text}" for s, text in texts.items()])


def stage_data(file: Path, overrides: list[str] | None = None) -> Any:
    pipeline = load_pipeline(file, overrides or [])
    stage = pipeline.stages["one"]
    assert isinstance(stage, FitStage)
    return StageCLI(stage, pipeline.folder("one"), 0).datamodule


MODEL = {"class_path": "SFTModule", "init_args": {"model": NANO, "init": "random"}}
MODULE = ["--model=SFTModule", f"--model.model={NANO}", "--model.init=random", "--trainer.accelerator=cpu"]
ENTRANCES = [by_options, by_init_args, by_file, by_pipeline, by_override]


def data_section(sources: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": "PromptDataModule", "init_args": {"shuffle": False, **sources}}


def values(batches: Any) -> list[dict[str, Any]]:
    return [dict(example.fields) for batch in batches for example in batch.examples]


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("kind", [*WRITERS, "folder", "files", "hub"])
def test_rows_of_every_source_by_every_entrance(
    kind: str, entrance: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {split: write_source(kind, tmp_path, split, monkeypatch) for split in SPLITS}
    data = entrance(sources, tmp_path)
    assert isinstance(data, PromptDataModule)
    assert {split: source for split, source in data.sources.items()} == sources
    data._tokenizer = NANO
    for streaming in (False, True):
        data.streaming, data.shuffle_buffer = streaming, 0
        data._train_loader = None
        assert values(data.train_dataloader()) == SPLITS["train"]
    data.setup()
    assert values(data.val_dataloader()) == SPLITS["val"]
    assert values(data.test_dataloader()) == SPLITS["test"]
    assert values(data.predict_dataloader()) == SPLITS["predict"]


# Values that are no rows: every kind of type by every entrance.

REWARD = "tests.faults.test_a1_values_arrive_as_written.Reward"


class Reward:
    """A reward that remembers what it was made of."""

    def __init__(self, text: Any, more: Any) -> None:
        self.text, self.more = text, more

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [1.0 for _ in completions]


# One option of each kind: strings in a mapping, as its keys, in lists, in a tuple, and wherever anything is allowed.
MANY = [*TEXTS, "a\nb: c", 'it\'s \\n "2"']
GIVEN: dict[str, Any] = {
    "model.rewards": [
        {"class_path": REWARD, "init_args": {"text": MANY[0], "more": [MANY, {"a": MANY, "b": [None, 1e-3, 7]}]}}
    ],
    "model.lora": {"r": 4, "target_modules": MANY, "bias": "none", "layers_pattern": None, "rank_pattern": {"a": 2}},
    "data.columns": dict(zip(MANY[::-1], MANY, strict=True)),
    "data.train": [{"prompt": text, "answer": text, "deep": {"list": [text, None, 4, 0.5, True]}} for text in MANY],
    "data.test": [*MANY, "b.jsonl"],
}


METHODS = {
    "grpo": ("GRPOModule", "PromptDataModule", {"rewards": ["rlhf_lightning.rewards.exact_answer"]}),
    "process_reward": ("ProcessRewardModule", "StepwiseDataModule", {}),
}


def sections(method: str, given: dict[str, Any]) -> dict[str, Any]:
    module, data, required = METHODS[method]
    content: dict[str, Any] = {
        "model": {"class_path": module, "init_args": {"model": NANO, "init": "random", **required}},
        "data": {"class_path": data, "init_args": {}},
        "trainer": {"accelerator": "cpu"},
    }
    for key, value in given.items():
        section, _, name = key.partition(".")
        content[section]["init_args"][name] = value
    return content


def cli_by_options(method: str, given: dict[str, Any], folder: Path, inside: str = "") -> PostTrainingCLI:
    (folder / "base.yaml").write_text(json.dumps(sections(method, {})))
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}
    keys = {key: key.replace(".", f".{inside}", 1) for key in given}
    args = [f"--{keys[key]}={text}" for key, text in texts.items()]
    return PostTrainingCLI([f"--config={folder / 'base.yaml'}", *args], run=False)


def cli_by_init_args(method: str, given: dict[str, Any], folder: Path) -> PostTrainingCLI:
    return cli_by_options(method, given, folder, "init_args.")


def cli_by_file(method: str, given: dict[str, Any], folder: Path) -> PostTrainingCLI:
    (folder / "mine.yaml").write_text(json.dumps(sections(method, given)))
    return PostTrainingCLI([f"--config={folder / 'mine.yaml'}"], run=False)


def cli_by_own_dump(method: str, given: dict[str, Any], folder: Path) -> PostTrainingCLI:
    """A configuration that the parser wrote, as it does for every run, read again."""
    first = cli_by_file(method, given, folder)
    first.parser.save(first.config, folder / "saved.yaml", skip_none=False)
    return PostTrainingCLI([f"--config={folder / 'saved.yaml'}"], run=False)


def cli_by_pipeline(method: str, given: dict[str, Any], folder: Path) -> PostTrainingCLI:
    stages = {"one": {"kind": "fit", **sections(method, given)}}
    (folder / "pipeline.yaml").write_text(json.dumps({"run_dir": str(folder / "run"), "stages": stages}))
    pipeline = load_pipeline(folder / "pipeline.yaml")
    return StageCLI(pipeline.stages["one"], pipeline.folder("one"), 0)  # type: ignore[arg-type]


def only_plain(value: Any) -> bool:
    """Whether no string is of a class of its own: it could not be pickled where weights alone are loaded."""
    if isinstance(value, dict):
        return all(only_plain(key) and only_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(only_plain, value))
    return not isinstance(value, str) or type(value) is str


CLI_ENTRANCES = [cli_by_options, cli_by_init_args, cli_by_file, cli_by_own_dump, cli_by_pipeline]


@pytest.mark.parametrize("entrance", CLI_ENTRANCES)
def test_lists_mappings_and_what_may_be_anything_by_every_entrance(
    entrance: Callable[..., PostTrainingCLI], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli = entrance("grpo", GIVEN, tmp_path)
    model, data = cli.model, cli.datamodule
    reward = model.rewards.functions[0]
    asked = GIVEN["model.rewards"][0]["init_args"]
    assert {"text": reward.text, "more": reward.more} == asked
    assert model.lora == GIVEN["model.lora"]
    assert data.columns == GIVEN["data.columns"]
    assert (data.sources["train"], data.sources["test"]) == (GIVEN["data.train"], GIVEN["data.test"])
    # Strings of a class of their own could not be read back where a checkpoint is loaded with its weights only.
    assert only_plain([vars(reward), dict(model.hparams), model.lora, data.columns, data.sources])
    assert model.hparams["lora"] == GIVEN["model.lora"]
    if isinstance(cli, StageCLI):  # what decides whether a stage is finished already
        assert cli.merged["model"]["init_args"]["rewards"] == GIVEN["model.rewards"]
        assert cli.merged["data"]["init_args"]["train"] == GIVEN["data.train"]


@pytest.mark.parametrize("text", ["yes", "Note: hello", "# c", "12:30", "1e3", "4"])
@pytest.mark.parametrize("entrance", [cli_by_options, cli_by_init_args, cli_by_file])
def test_a_text_alone_by_every_entrance(
    entrance: Callable[..., PostTrainingCLI], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ("model.step_separator", "data.step_separator", "data.val", "data.tokenizer")
    cli = entrance("process_reward", dict.fromkeys(keys, text), tmp_path)
    assert cli.model.options.step_separator == cli.datamodule.step_separator == text
    assert cli.datamodule.sources["val"] == cli.datamodule._tokenizer == text
    (tmp_path / text).write_text("class_path: none\n")  # nor is a file of that name read
    cli = entrance("process_reward", dict.fromkeys(keys, text), tmp_path)
    assert cli.model.options.step_separator == cli.datamodule.step_separator == text


@pytest.mark.parametrize("form", ["--data.columns.{}={}", "--data.init_args.columns.{}={}"])
def test_one_key_of_a_mapping(form: str, tmp_path: Path) -> None:
    texts = [text for text in TEXTS if text not in ("null", "{a: b}", "[1, 2]")]
    args = [form.format(f"key{number}", text) for number, text in enumerate(texts)]
    cli = PostTrainingCLI(
        [*MODULE, "--data=PromptDataModule", *args, "--model.lora.r=8", "--model.lora.bias=null"], run=False
    )
    assert cli.datamodule.columns == {f"key{number}": text for number, text in enumerate(texts)}
    assert cli.model.lora == {"r": 8, "bias": None}


@pytest.mark.parametrize("text", ["{a: b}", "[1, 2]"])
def test_a_list_or_a_mapping_is_refused_where_a_text_belongs(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *MODULE, "--data=StepwiseDataModule", f"--data.step_separator={text}"])
    assert "step_separator: " in (said := capsys.readouterr().err)
    assert "is not allowed: expected str" in said


def test_a_key_twice_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "twice.yaml").write_text("model:\n  class_path: SFTModule\nmodel:\n  class_path: DPOModule\n")
    with pytest.raises(SystemExit):
        main(["fit", f"--config={tmp_path / 'twice.yaml'}"])
    assert "found the key 'model' twice" in capsys.readouterr().err


def test_the_dumper_and_the_loader_agree() -> None:
    value = {
        text: [text, {"a": text}]
        for text in [*MANY, "", "\n", "a: b\n", "é\x7f\u2028", "-", "?", "0o7", "+1", "1e-3", "0b1"]
    }
    value["numbers"] = [0, -1, 1.5, 1e-5, 1e300, 2**70, True, False, None, float("inf")]
    assert yaml_parser.load(yaml_parser.dump(value), "file") == value
    assert only_plain(yaml_parser.plain(yaml_parser.load(yaml_parser.dump(value), "file")))
    flowing = yaml_parser.flow(repr([value["numbers"][:-1], TEXTS, "a\nb", "it's"]))
    assert yaml_parser.load(flowing) == [value["numbers"][:-1], TEXTS, "a\nb", "it's"]


# Parsing alone reads no rows.


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are opened from here on."""
    if not _WATCHED:
        sys.addaudithook(lambda event, args: _WATCHED[-1].append(str(args[0])) if event == "open" else None)
    _WATCHED.append([])
    return _WATCHED[-1]


_WATCHED: list[list[str]] = []
SUFFIXES = [".jsonl", ".json", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".yaml"]


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_parsing_opens_no_rows(entrance: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"rows{suffix}" for suffix in SUFFIXES]
    for file in files:
        with file.open("wb") as written:
            written.truncate(200 * 2**20)  # takes no room on the disk
    seen = opened(monkeypatch)
    for part in (files[:4], files[3:]):
        entrance(dict(zip(SPLITS, map(str, part), strict=True)), tmp_path)
    assert not [name for name in seen if Path(name) in files]


def test_print_config_opens_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS))
    seen = opened(monkeypatch)
    with pytest.raises(SystemExit):
        main(
            [
                "fit",
                *MODULE,
                "--data=PromptDataModule",
                f"--data.train={file}",
                "--data.streaming=true",
                "--print_config",
            ]
        )
    assert yaml_parser.load(capsys.readouterr().out)["data"]["init_args"]["train"] == str(file)
    assert str(file) not in seen


def test_no_option_reads_a_file_as_its_value() -> None:
    """But a class's, which may be a file with its class_path and init_args: optimizer, schedule, loss, filters."""
    for package in (modules, datamodules, callbacks):
        for cls in (getattr(package, name) for name in package.__all__):
            if inspect.isclass(cls) and issubclass(cls, LightningModule | LightningDataModule | Callback):
                parser = Parser()
                parser.add_class_arguments(cls, "it", sub_configs=True, fail_untyped=False)
                reading = {action.dest for action in parser._actions if getattr(action, "_enable_path", False)}
                assert reading <= {"it.optimizer", "it.lr_scheduler", "it.loss", "it.filters"}, cls
