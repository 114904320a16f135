"""Search trees: files and drawings."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import pytest

from rlhf_lightning.inference import MCTS, Node, SearchTree

from .toy import PROMPT, Judge, ToyEngine, random_table

VOID = {"meta", "link", "br"}


def searched():
    table = random_table(3, 3, seed=1, early=True)
    judge = Judge(lambda text: -math.inf if "a" in text else len(text) / 10)
    strategy = MCTS(ToyEngine(table), scorer=judge, simulations=30, actions=3, rollouts=1, rollout_weight=0.5)
    return strategy.search([PROMPT], seeds=[5])[0]


def test_a_tree_is_read_as_it_was_written(tmp_path):
    result = searched()
    path = result.tree.save(tmp_path / "tree.json")
    read = SearchTree.load(path)
    assert json.loads(path.read_text()) == result.tree.to_json() == read.to_json()
    assert (read.strategy, read.seed, read.prompt, read.prompt_ids) == ("MCTS", 5, PROMPT, result.tree.prompt_ids)
    for one, other in zip(result.tree.nodes(), read.nodes(), strict=True):
        assert one.all_token_ids() == other.all_token_ids()
        assert one.all_logprobs() == other.all_logprobs()
        assert [child.text for child in one.rollouts] == [child.text for child in other.rollouts]
    assert any(node.score == -math.inf for node in read.nodes())


def test_the_chosen_path_ends_in_the_chosen_solution():
    result = searched()
    chosen = [node for node in result.tree.nodes() if node.chosen]
    assert [node.parent for node in chosen] == [None, *chosen[:-1]]
    assert chosen[-1].all_token_ids() == result.token_ids
    assert chosen[-1].depth == len(chosen) - 1
    assert chosen[-1] in list(result.tree.leaves())


class Outline(HTMLParser):
    """Checks that tags are balanced, and counts items by class."""

    def __init__(self):
        super().__init__()
        self.open, self.items, self.text, self.names = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.names |= {name for name, _ in attrs}
        if tag == "li":
            self.items.append(dict(attrs)["class"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def outline(page):
    parser = Outline()
    parser.feed(page)
    assert not parser.open
    return parser


def test_a_drawing_shows_every_node(tmp_path):
    result = searched()
    page = result.tree.save(tmp_path / "tree.html").read_text()
    nodes = list(result.tree.nodes())
    found = outline(page)
    assert len(found.items) == len(nodes)
    assert sum("chosen" in item.split() for item in found.items) == sum(node.chosen for node in nodes)
    assert sum("rollout" in item.split() for item in found.items) == sum(node.rollout for node in nodes)
    assert not found.names & {"src", "href"}
    for node in nodes:
        assert any(f"visits {node.visits}" in text for text in found.text)


def test_texts_are_escaped_and_depth_is_no_limit():
    evil = "</code><script>alert('&\"')</script>\n\ud800"
    root = node = Node(visits=2000)
    for number in range(2000):
        child = Node((number,), evil if number == 0 else "x", (-0.5,), parent=node, visits=1)
        node.children.append(child)
        node = child
    tree = SearchTree(root, evil, (1,), "<b>", 0, {"log_evidence": -math.inf})
    page = outline(tree_page(tree))
    assert len(page.items) == 2001
    assert sum("alert('&\"')" in text for text in page.text) == 2  # as text, of the prompt and the first step
    assert SearchTree.from_json(json.loads(json.dumps(tree.to_json(), allow_nan=False))).to_json() == tree.to_json()
    assert node.depth == 2000


def tree_page(tree):
    from rlhf_lightning.inference.tree_drawing import draw

    return draw(tree)


def test_bad_files_are_refused(tmp_path):
    tree = SearchTree(Node())
    with pytest.raises(ValueError, match=r"a tree is saved as .json, or drawn as .html"):
        tree.save(tmp_path / "tree.txt")
    assert not list(tmp_path.iterdir())
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad.json is no JSON file"):
        SearchTree.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match=r"bad.json holds no search tree"):
        SearchTree.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="format is None; a search tree has 1"):
        SearchTree.from_json({})
    with pytest.raises(ValueError, match="the values are of no search tree"):
        SearchTree.from_json({**tree.to_json(), "nodes": []})
    values = tree.to_json()
    values["nodes"][0]["finish_reason"] = "done"
    with pytest.raises(ValueError, match="finish_reason is 'done'"):
        SearchTree.from_json(values)
