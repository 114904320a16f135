"""The command ``merge``, soups, and the report of conflicts."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_lightning.cli import main
from rlhf_lightning.merging import conflict_report, greedy_soup, uniform_soup, verify

from .test_merge import folders, states  # noqa: F401


def test_the_command_merges_and_verifies(folders, tmp_path, capsys):  # noqa: F811
    config = tmp_path / "merge.yaml"
    config.write_text(f"method: ties\nbase: {folders['base']}\ndensity: 0.5\nlayers: {{embed: {{scale: 0.5}}}}\n")
    models = f"[{folders['a']}, {folders['b']}]"
    main(["merge", "--config", str(config), "--models", models, "--output", str(tmp_path / "out"), "--preset=peft"])
    assert "merged:" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert manifest["options"]["density"] == 0.5
    assert manifest["options"]["preset"] == "peft"
    assert manifest["layers"] == {"embed": {"scale": 0.5}}
    main(["merge", "verify", str(tmp_path / "out")])
    assert "nothing differs" in capsys.readouterr().out
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(SystemExit) as ended:
        main(["merge", "verify", str(tmp_path / "out")])
    assert ended.value.code == 1
    assert "sha256" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method=ties", "--densty=0.5"], "did you mean"),
        (["--method=slerp", "--density=0.5"], "the method slerp takes no 'density'"),
        (["--method=linear", "--rows=x.jsonl"], "rows is read by the methods fisher and regmean only"),
        (["--method=greedy_soup"], "give prompts"),
        (["--method=linear", "--prompts=x"], "prompts are read by method greedy_soup only"),
        (["--method=lineer"], "did you mean 'linear'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, folders, tmp_path, capsys):  # noqa: F811
    models = f"[{folders['a']}, {folders['b']}]"
    with pytest.raises(SystemExit):
        main(["merge", *arguments, "--models", models, "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


def distance(target):
    """A metric whose best mean is known: minus the distance of one tensor to a target."""

    def evaluate(folder):
        return -float((load_file(folder / "model.safetensors")["model.norm.weight"] - target).norm())

    return evaluate


def test_a_greedy_soup_takes_what_helps(folders, tmp_path):  # noqa: F811
    a, b, c = (state["model.norm.weight"] for state in states(folders, "a", "b", "c"))
    models = [folders[name] for name in "abc"]
    # The best single model is b; with c the mean is the target, with a it would be worse.
    soup = greedy_soup(models, tmp_path / "soup", evaluate=distance(0.55 * b + 0.45 * c))
    assert soup.ingredients == [str(folders["b"]), str(folders["c"])]
    assert soup.value == pytest.approx(-0.05 * float((b - c).norm()), rel=1e-3)
    found = load_file(tmp_path / "soup" / "model.safetensors")["model.norm.weight"]
    torch.testing.assert_close(found, (b + c) / 2)
    assert verify(tmp_path / "soup") == []

    # Where no mean helps, the soup is the best model; less may be better.
    soup = greedy_soup(models, tmp_path / "one", evaluate=lambda f: -distance(a)(f), mode="min")
    assert soup.ingredients == [str(folders["a"])]
    assert torch.equal(load_file(tmp_path / "one" / "model.safetensors")["model.norm.weight"], a)
    assert [len(soup.values), len(soup.tried)] == [3, 2]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    with pytest.raises(ValueError, match="is nan"):
        greedy_soup(models, tmp_path / "none", evaluate=lambda folder: float("nan"))
    assert not (tmp_path / "none").exists()


def test_a_uniform_soup_is_the_mean(folders, tmp_path):  # noqa: F811
    uniform_soup([folders[name] for name in "abc"], tmp_path / "soup")
    found = load_file(tmp_path / "soup" / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(found[key], sum(state[key] for state in states(folders, "a", "b", "c")) / 3)
    with pytest.raises(ValueError, match="at least two"):
        uniform_soup([folders["a"]], tmp_path / "other")


def test_conflicts_equal_a_naive_count(folders, tmp_path, capsys):  # noqa: F811
    report = conflict_report([folders["a"], folders["b"]], folders["base"])
    start, a, b = states(folders, "base", "a", "b")
    for tensor in report.tensors:
        one, other = (state[tensor.name].double() - start[tensor.name].double() for state in (a, b))
        cosine = float((one * other).sum() / one.norm() / other.norm())
        assert tensor.cosines[0] == pytest.approx(cosine, abs=1e-5)
        both = (one != 0) & (other != 0)
        assert tensor.sign_disagreement[0] == pytest.approx(float(((one * other < 0) & both).sum() / both.sum()))
        assert tensor.drift[0] == pytest.approx(float(one.norm() / start[tensor.name].double().norm()), rel=1e-5)
    assert len(report.tensors) == len(start)
    main(
        [
            *("merge", "conflicts", "--models", f"[{folders['a']}, {folders['b']}]"),
            *("--base", str(folders["base"]), "--output", str(tmp_path)),
        ]
    )
    assert "cosine" in capsys.readouterr().out
    assert json.loads((tmp_path / "conflicts.json").read_text())["pairs"] == [[0, 1]]
    assert (tmp_path / "conflicts.png").read_bytes().startswith(b"\x89PNG")


def test_models_without_a_common_base_are_warned_of(folders, tmp_path):  # noqa: F811
    shutil.copytree(folders["a"], tmp_path / "other")
    path = tmp_path / "other" / "model.safetensors"
    generator = torch.Generator().manual_seed(9)
    state = {name: torch.randn(value.shape, generator=generator) for name, value in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    report = conflict_report([folders["a"], tmp_path / "other"], folders["base"])
    assert any("no common base" in warning for warning in report.warnings)
    assert any("has moved by" in warning for warning in report.warnings)

    # Models that were trained a little are not.
    (start,) = states(folders, "base")
    for number in range(2):
        shutil.copytree(folders["a"], tmp_path / f"near{number}")
        near = {name: v + 1e-3 * torch.randn(v.shape, generator=generator) for name, v in start.items()}
        save_file(near, tmp_path / f"near{number}" / "model.safetensors", metadata={"format": "pt"})
    near = [tmp_path / "near0", tmp_path / "near1"]
    assert not any("common base" in w or "moved" in w for w in conflict_report(near, folders["base"]).warnings)
