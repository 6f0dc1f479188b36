"""Token trees: the one batch layout; and trajectories: what a roll-out is made of.

Padding is waste, and a pair or a group of roll-outs repeats its prompt. So a batch is a flat forest: nodes laid end to end,
depth first. A node attends to its ancestors fully and to itself causally; positions continue from the parent's end. The
hidden state that predicts a token is found by `predictor_T`: the parent's last token for a child's first token, the token
before otherwise. Nothing is shifted and no token is lost at a branch.

Axes: T tokens of the batch, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor

NO_PREDICTOR = -1


@dataclass(frozen=True, slots=True)
class Node:
    """A run of tokens in a tree.

    Args:
        ids: token ids, at least one.
        loss_weights: one float per token, 0 where no loss is taken; may be negative (unlikelihood) or fractional.
        parent: index of the parent node among the nodes given with it; -1 for a root. A parent stands before its children.
        is_action: one bool per token: sampled by a policy (roll-outs). None: where the loss weight is not 0.
    """

    ids: Sequence[int]
    loss_weights: Sequence[float]
    parent: int = -1
    is_action: Sequence[bool] | None = None


@dataclass(frozen=True)
class TreeBatch:
    """A forest of nodes as flat tensors. Make one with `TreeBatch.of`.

    Attributes:
        input_ids_T, position_ids_T: int64.
        loss_weight_T: float32; a root's first token has no predictor and therefore weight 0.
        is_action_T: bool.
        predictor_T: int64, index of the token whose hidden state predicts token t; -1 for a root's first token.
        node_start_N, node_end_N: int64, half-open token ranges; node_parent_N: int64, -1 for roots.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    loss_weight_T: Tensor
    is_action_T: Tensor
    predictor_T: Tensor
    node_start_N: Tensor
    node_end_N: Tensor
    node_parent_N: Tensor

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> Self:
        """Lays nodes end to end.

        Raises:
            ValueError: a node is empty, its lists differ in length, or it does not follow its parent depth first.
        """
        ids: list[int] = []
        positions: list[int] = []
        weights: list[float] = []
        actions: list[bool] = []
        predictors: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        path: list[int] = []
        for index, node in enumerate(nodes):
            length = len(node.ids)
            if length == 0 or len(node.loss_weights) != length:
                raise ValueError(f"node {index}: {length} ids and {len(node.loss_weights)} loss weights")
            if node.is_action is not None and len(node.is_action) != length:
                raise ValueError(f"node {index}: {length} ids and {len(node.is_action)} entries of is_action")
            while path and path[-1] != node.parent:
                path.pop()
            if node.parent >= 0 and not path:
                raise ValueError(f"node {index}: parent {node.parent} is not on the path before it (depth first)")
            path.append(index)
            start = len(ids)
            root = node.parent < 0
            first = 0 if root else positions[ends[node.parent] - 1] + 1
            if root and node.loss_weights[0] != 0:
                raise ValueError(f"node {index}: a root's first token cannot carry loss, nothing predicts it")
            ids.extend(node.ids)
            positions.extend(range(first, first + length))
            weights.extend(node.loss_weights)
            actions.extend(node.is_action if node.is_action is not None else [w != 0 for w in node.loss_weights])
            predictors.append(NO_PREDICTOR if root else ends[node.parent] - 1)
            predictors.extend(range(start, start + length - 1))
            starts.append(start)
            ends.append(start + length)
        return cls(
            input_ids_T=torch.tensor(ids, dtype=torch.int64),
            position_ids_T=torch.tensor(positions, dtype=torch.int64),
            loss_weight_T=torch.tensor(weights, dtype=torch.float32),
            is_action_T=torch.tensor(actions, dtype=torch.bool),
            predictor_T=torch.tensor(predictors, dtype=torch.int64),
            node_start_N=torch.tensor(starts, dtype=torch.int64),
            node_end_N=torch.tensor(ends, dtype=torch.int64),
            node_parent_N=torch.tensor([n.parent for n in nodes], dtype=torch.int64),
        )

    @property
    def tokens(self) -> int:
        """T."""
        return self.input_ids_T.numel()

    @property
    def nodes(self) -> int:
        """N."""
        return self.node_start_N.numel()

    def path(self, node: int) -> list[int]:
        """Node indices from the root down to `node`."""
        parents = self.node_parent_N.tolist()
        found = [node]
        while parents[found[-1]] >= 0:
            found.append(parents[found[-1]])
        return found[::-1]

    def leaves(self) -> list[int]:
        """Nodes without children, in order."""
        inner = set(self.node_parent_N.tolist())
        return [n for n in range(self.nodes) if n not in inner]

    def token_index(self, path: Iterable[int]) -> Tensor:
        """Token indices of the nodes of a path, in order."""
        starts, ends = self.node_start_N.tolist(), self.node_end_N.tolist()
        return torch.cat([torch.arange(starts[n], ends[n]) for n in path])

    def loss_index(self) -> Tensor:
        """Indices of the tokens that carry loss."""
        return self.loss_weight_T.nonzero().squeeze(1)

    def action_index(self) -> Tensor:
        """Indices of action tokens."""
        return self.is_action_T.nonzero().squeeze(1)

    def before_loss(self) -> Tensor:
        """Indices of the tokens that predict those that carry loss."""
        return self.predictor_T[self.loss_index()]

    def before_actions(self) -> Tensor:
        """Indices of the tokens that predict actions; of branches of one node, that node's last token comes up for each."""
        return self.predictor_T[self.action_index()]

    def answer_ends(self) -> Tensor:
        """Indices of the last tokens of all nodes that have a parent."""
        return self.node_end_N[self.node_parent_N >= 0] - 1

    def filled(self, tokens: int) -> Self:
        """The same batch and behind it one more tree of `tokens` zeros (>= 0), which no loss reads: for a size that comes back."""
        if not tokens:
            return self
        start = self.tokens
        new = {
            "input_ids_T": [0] * tokens,
            "position_ids_T": [0] * tokens,
            "loss_weight_T": [0.0] * tokens,
            "is_action_T": [False] * tokens,
            "predictor_T": [NO_PREDICTOR] * tokens,
            "node_start_N": [start],
            "node_end_N": [start + tokens],
            "node_parent_N": [-1],
        }
        own = {name: getattr(self, name) for name in new}
        return replace(self, **{name: torch.cat([x, x.new_tensor(new[name])]) for name, x in own.items()})

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def conversation(ids: Sequence[int], loss_weights: Sequence[float]) -> list[Node]:
    """One conversation (or document) as one node. The first token's weight is dropped: nothing predicts it."""
    return [Node(ids, [0.0, *loss_weights[1:]])]


def branches(
    prompt: Sequence[int], responses: Sequence[Sequence[int]], weights: Sequence[float] | None = None
) -> list[Node]:
    """A prompt with several responses below it: a pair (chosen first), a K-wise ranking or a roll-out group.

    Args:
        prompt: at least one id.
        responses: each at least one id; every response token is an action.
        weights: one loss weight per response, default 1.
    """
    factors = weights if weights is not None else [1.0] * len(responses)
    nodes = [Node(prompt, [0.0] * len(prompt), is_action=[False] * len(prompt))]
    nodes += [
        Node(ids, [weight] * len(ids), parent=0, is_action=[True] * len(ids))
        for ids, weight in zip(responses, factors, strict=True)
    ]
    return nodes


def forest(trees: Iterable[Sequence[Node]]) -> list[Node]:
    """Several trees one after the other; parent indices are moved along."""
    nodes: list[Node] = []
    for tree in trees:
        offset = len(nodes)
        nodes += [replace(n, parent=n.parent + offset) if n.parent >= 0 else n for n in tree]
    return nodes


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a trajectory: a prompt, an answer, a tool call or its result.

    Args:
        ids: token ids.
        is_action: sampled by the policy; KL, GAE, whitening and the ratio see these tokens only.
        logprobs: of each sampled token under the distribution it was drawn from; actions only.
    """

    ids: tuple[int, ...]
    is_action: bool
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What one roll-out produced.

    Args:
        segments: in order; the first is the prompt.
        policy_version: the version of the weights that sampled it.
        finished: the last action token is a stop token.
    """

    segments: tuple[Segment, ...]
    policy_version: int
    finished: bool
    seed: int = 0
    info: dict[str, float] = field(default_factory=dict)

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.segments[0].ids

    @property
    def actions(self) -> tuple[int, ...]:
        return tuple(i for s in self.segments if s.is_action for i in s.ids)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """Of the action tokens, as the sampler recorded them."""
        return tuple(p for s in self.segments if s.is_action for p in (s.logprobs or ()))

    def nodes(self) -> list[Node]:
        """As one prompt node with one child that holds everything after it."""
        tail = self.segments[1:]
        ids = [i for s in tail for i in s.ids]
        actions = [s.is_action for s in tail for _ in s.ids]
        prompt = Node(self.prompt, [0.0] * len(self.prompt), is_action=[False] * len(self.prompt))
        return [prompt, Node(ids, [float(a) for a in actions], parent=0, is_action=actions)]


def group(trajectories: Sequence[Trajectory]) -> list[Node]:
    """Roll-outs of one prompt as one tree: the prompt, and below it what followed in each."""
    nodes = [t.nodes() for t in trajectories]
    return [nodes[0][0], *(tail for _, tail in nodes)]
