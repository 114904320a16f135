"""Draws a search tree as a page: no other files, no network, every text escaped."""

from __future__ import annotations

import math
from html import escape

from .completion import readable
from .trees import Node, SearchTree

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }
h1 { font-size: 1.2em; margin: 0 0 .2em; }
p { margin: .2em 0 1em; color: #555; }
code { font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; margin: 0; display: inline; }
ul { list-style: none; margin: 0; padding-left: 1.4em; border-left: 1px solid #ddd; }
ul.tree { padding-left: 0; border-left: 0; }
summary, .leaf { padding: .1em .4em; border-radius: 4px; cursor: default; }
summary { cursor: pointer; }
.leaf { padding-left: 1.45em; }
.chosen > details > summary, .chosen > .leaf { background: #d9efdc; }
.rollout > .leaf { color: #777; font-style: italic; }
.bar { display: inline-block; width: 4em; height: .6em; margin-right: .5em; background: #eee; border-radius: 3px; }
.bar i { display: block; height: 100%; background: #1f6f8b; border-radius: 3px; }
.facts { color: #666; font-size: .85em; margin-left: .8em; white-space: nowrap; }
.end { color: #1d7a3a; font-weight: 600; } .cut { color: #b3541e; font-weight: 600; }
button { font: inherit; margin: 0 .4em 1em 0; }
"""
_SCRIPT = """
function fold(open) { document.querySelectorAll("details").forEach(d => d.open = open(d)); }
"""
_BUTTONS = (
    ("expand all", "d => true"),
    ("collapse all", "d => false"),
    ("chosen path", "d => d.parentElement.classList.contains('chosen')"),
)


def draw(tree: SearchTree) -> str:
    """Draws a tree: every step with its visits, value, prior and score; the chosen path is marked, branches fold.

    Args:
        tree: any tree.

    Returns:
        A whole HTML page.

    Example:
        >>> page = draw(SearchTree(Node(visits=1), "1<2?"))
        >>> "1&lt;2?" in page, "1<2?" in page
        (True, False)
    """
    most = max((node.visits for node in tree.nodes()), default=0)
    facts = [f"{sum(1 for _ in tree.nodes()):,} nodes", f"seed {tree.seed}"]
    facts += [f"{name.replace('_', ' ')} {_number(value)}" for name, value in tree.statistics.items()]
    buttons = "".join(f'<button onclick="fold({code})">{name}</button>' for name, code in _BUTTONS)
    title = escape(tree.strategy or "search")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n<script>{_SCRIPT}</script>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n<p><code>{_text(tree.prompt)}</code></p>\n<p>{escape(', '.join(facts))}</p>\n{buttons}\n"
        f'<ul class="tree">\n{_branches(tree.root, most)}</ul>\n</body>\n</html>\n'
    )


def _branches(root: Node, most: int) -> str:
    """The items of all nodes, without recursion: a search may be deeper than Python's stack."""
    parts: list[str] = []
    todo: list[Node | str] = [root]
    while todo:
        node = todo.pop()
        if isinstance(node, str):
            parts.append(node)
            continue
        marks = " ".join(["node", *["chosen"] * node.chosen, *["rollout"] * node.rollout])
        below = [*node.children, *node.rollouts]
        if below:
            # Branches that no simulation has taken, and those not chosen, are folded where there are many.
            opened = " open" if node.chosen or node.parent is None else ""
            parts.append(f'<li class="{marks}"><details{opened}><summary>{_label(node, most)}</summary>\n<ul>\n')
            todo += ["</ul>\n</details></li>\n", *reversed(below)]
        else:
            parts.append(f'<li class="{marks}"><div class="leaf">{_label(node, most)}</div></li>\n')
    return "".join(parts)


def _label(node: Node, most: int) -> str:
    share = 100 * node.visits / most if most else 0
    bar = f'<span class="bar"><i style="width:{share:.0f}%"></i></span>'
    ends = {"stop": '<span class="end"> end</span>', "length": '<span class="cut"> cut off</span>', None: ""}
    text = _text(node.text) if node.parent is not None else "prompt"
    facts = [f"visits {node.visits}"]
    for name, value in (("value", node.value), ("score", node.score)):
        facts += [] if value is None else [f"{name} {_number(value)}"]
    if node.parent is not None and not node.rollout:
        facts.append(f"prior {_number(node.prior)}")
    facts += [f"drawn {node.multiplicity} times"] if node.multiplicity > 1 else []
    kind = "rollout: " if node.rollout else ""
    return f'{bar}<code>{kind}{text}</code>{ends[node.finish_reason]}<span class="facts">{", ".join(facts)}</span>'


def _text(text: str) -> str:
    """A step on one line, its line ends shown as signs."""
    return escape(readable(text).replace("\n", "\N{RETURN SYMBOL}"))


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else str(value)
