"""The token tree's layout, against a slow definition of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from danlu.tree import NO_PREDICTOR, Node, Segment, Trajectory, TreeBatch, branches, conversation, forest


@st.composite
def forests(draw: st.DrawFn) -> list[Node]:
    """Depth-first forests: each node's parent is on the path to the node before it, or none."""
    nodes: list[Node] = []
    path: list[int] = []
    for index in range(draw(st.integers(1, 9))):
        depth = draw(st.integers(0, len(path)))
        parent = path[depth - 1] if depth else -1
        path = [*path[:depth], index]
        ids = draw(st.lists(st.integers(0, 50), min_size=1, max_size=5))
        weights = [draw(st.sampled_from([0.0, 1.0, -0.5])) for _ in ids]
        if parent < 0:
            weights[0] = 0.0
        nodes.append(Node(ids, weights, parent))
    return nodes


def ancestors(nodes: list[Node], node: int) -> list[int]:
    return [*ancestors(nodes, nodes[node].parent), node] if node >= 0 else []


def text_before(nodes: list[Node], node: int) -> list[int]:
    return [i for n in ancestors(nodes, nodes[node].parent) for i in nodes[n].ids]


@given(forests())
def test_layout(nodes: list[Node]) -> None:
    batch = TreeBatch.of(nodes)
    assert (batch.tokens, batch.nodes) == (sum(len(n.ids) for n in nodes), len(nodes))
    assert batch.input_ids_T.tolist() == [i for n in nodes for i in n.ids]
    assert batch.loss_weight_T.tolist() == [w for n in nodes for w in n.loss_weights]
    assert batch.is_action_T.tolist() == [w != 0 for n in nodes for w in n.loss_weights]
    assert batch.node_parent_N.tolist() == [n.parent for n in nodes]
    end = 0
    for index, node in enumerate(nodes):
        start, end = end, end + len(node.ids)
        assert (int(batch.node_start_N[index]), int(batch.node_end_N[index])) == (start, end)
        before = len(text_before(nodes, index))
        assert batch.position_ids_T[start:end].tolist() == list(range(before, before + len(node.ids)))
    assert end == batch.tokens


@given(forests())
def test_predictor_reads_exactly_the_text_before_a_token(nodes: list[Node]) -> None:
    batch = TreeBatch.of(nodes)
    ids, predictors = batch.input_ids_T.tolist(), batch.predictor_T.tolist()

    def history(token: int) -> list[int]:
        """Ids from the root to `token`, by following predictors alone."""
        return [*history(predictors[token]), ids[token]] if token != NO_PREDICTOR else []

    for index, node in enumerate(nodes):
        for offset in range(len(node.ids)):
            token = int(batch.node_start_N[index]) + offset
            assert history(predictors[token]) == text_before(nodes, index) + list(node.ids[:offset])


@given(forests())
def test_paths_leaves_and_token_index(nodes: list[Node]) -> None:
    batch = TreeBatch.of(nodes)
    assert batch.leaves() == [i for i in range(len(nodes)) if all(n.parent != i for n in nodes)]
    for index in range(len(nodes)):
        assert batch.path(index) == ancestors(nodes, index)
        text = batch.input_ids_T[batch.token_index(batch.path(index))].tolist()
        assert text == text_before(nodes, index) + list(nodes[index].ids)


@given(st.lists(forests(), min_size=1, max_size=4))
def test_forest_is_its_trees_end_to_end(trees: list[list[Node]]) -> None:
    together, alone = TreeBatch.of(forest(trees)), [TreeBatch.of(t) for t in trees]
    for name in ("input_ids_T", "position_ids_T", "loss_weight_T", "is_action_T"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(b, name) for b in alone]))
    tokens, count = 0, 0
    predictors, starts, parents = [], [], []
    for b in alone:
        predictors += [p + tokens if p >= 0 else p for p in b.predictor_T.tolist()]
        starts += [s + tokens for s in b.node_start_N.tolist()]
        parents += [p + count if p >= 0 else p for p in b.node_parent_N.tolist()]
        tokens, count = tokens + b.tokens, count + b.nodes
    assert together.predictor_T.tolist() == predictors
    assert together.node_start_N.tolist() == starts
    assert together.node_parent_N.tolist() == parents


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ([Node([], [])], "node 0: 0 ids"),
        ([Node([1, 2], [0.0])], "node 0: 2 ids and 1 loss weights"),
        ([Node([1], [0.0]), Node([1], [0.0], parent=1)], "node 1: parent 1"),
        # 0 -> 1, 0 -> 2, then a child of 1: its subtree was left already.
        ([Node([1], [0.0]), Node([1], [0.0], 0), Node([1], [0.0], 0), Node([1], [0.0], 1)], "depth first"),
        ([Node([1], [0.0]), Node([1], [0.0]), Node([1], [0.0], 0)], "depth first"),
        ([Node([1, 2], [1.0, 1.0])], "root's first token"),
        ([Node([1, 2], [0.0, 1.0], is_action=[True])], "is_action"),
    ],
)
def test_refused_layouts(nodes: list[Node], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TreeBatch.of(nodes)


def test_is_action_must_fit_each_node() -> None:
    """Lengths that are wrong in two nodes and right in sum would mark the wrong tokens."""
    wrong = [Node([1, 2], [0.0, 1.0], is_action=[False]), Node([3], [1.0], 0, is_action=[True, True])]
    with pytest.raises(ValueError, match="is_action"):
        TreeBatch.of(wrong)


def test_conversation_drops_the_weight_that_nothing_predicts() -> None:
    [node] = conversation([7, 8, 9], [1.0, 0.0, 1.0])
    assert (list(node.ids), list(node.loss_weights), node.parent) == ([7, 8, 9], [0.0, 0.0, 1.0], -1)


def test_branches_share_their_prompt() -> None:
    batch = TreeBatch.of(branches([5, 6], [[7], [8, 9]], weights=[1.0, -1.0]))
    assert batch.input_ids_T.tolist() == [5, 6, 7, 8, 9]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 2, 3]
    assert batch.predictor_T.tolist() == [-1, 0, 1, 1, 3]
    assert batch.loss_weight_T.tolist() == [0, 0, 1, -1, -1]
    assert batch.loss_index().tolist() == batch.action_index().tolist() == [2, 3, 4]
    assert batch.leaves() == [1, 2]
    with pytest.raises(ValueError):
        branches([5], [[1], [2]], weights=[1.0])


def test_actions_without_loss_stay_actions() -> None:
    batch = TreeBatch.of(branches([5, 6], [[7, 8]], weights=[0.0]))
    assert batch.loss_index().tolist() == [] and batch.action_index().tolist() == [2, 3]


def test_trajectory_with_a_tool_in_the_middle() -> None:
    segments = (
        Segment((1, 2), False),
        Segment((3, 4), True, (-0.1, -0.2)),  # the call
        Segment((5, 6, 7), False),  # its result: nobody sampled it
        Segment((8,), True, (-0.3,)),
    )
    trajectory = Trajectory(segments, policy_version=3, finished=True)
    assert trajectory.prompt == (1, 2)
    assert trajectory.actions == (3, 4, 8)
    assert trajectory.logprobs == (-0.1, -0.2, -0.3)
    batch = TreeBatch.of(trajectory.nodes())
    assert batch.input_ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.node_parent_N.tolist() == [-1, 0]
    assert batch.action_index().tolist() == batch.loss_index().tolist() == [2, 3, 7]
    # The last action is predicted by the tool's last token.
    assert batch.predictor_T[batch.action_index()].tolist() == [1, 2, 6]
    # A tool in the roll-out changes nothing in what the policy did.
    plain = replace(trajectory, segments=(segments[0], segments[1], segments[3]))
    assert (plain.actions, plain.logprobs) == (trajectory.actions, trajectory.logprobs)


def test_to_moves_every_tensor() -> None:
    moved = TreeBatch.of(branches([5], [[7]])).to("meta")
    assert {t.device.type for t in vars(moved).values()} == {"meta"}
