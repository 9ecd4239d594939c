"""Credit among answers that fork from one another, against the definitions by brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support_methods import batch, of_answer, of_group, policy_of
from support_trees import advantages, forked, path
from torch import Tensor

from async_rl.errors import UserError
from async_rl.objective import Columns, ObjectiveState
from async_rl.objective.coefficients import coefficients
from async_rl.objective.library import load_recipe

OFF = {"trust": {"rule": "none"}, "aggregate": {"mode": "seq_mean_token_sum"}}


@pytest.mark.parametrize("seed", range(8))
def test_a_token_has_the_mean_advantage_of_the_answers_that_go_through_it(seed: int) -> None:
    columns = forked(seed)
    of_path: dict[tuple[int, int], list[float]] = {}
    for answer, advantage in enumerate(advantages(columns)):
        for token in path(columns, answer):
            of_path.setdefault(token, []).append(advantage)
    wanted = [
        sum(of_path[answer, place]) / len(of_path[answer, place])
        for answer, tokens in enumerate(of_answer(columns))
        for place in range(len(tokens))
    ]
    got = policy_of(columns, "arpo", **OFF) * len(columns.reward)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_a_batch_whose_answers_all_begin_with_the_prompt_has_no_shared_token() -> None:
    columns = replace(forked(0), forks=torch.tensor([[-1, 0]]).expand(18, 2))
    got = policy_of(columns, "arpo", **OFF)
    torch.testing.assert_close(got, policy_of(replace(columns, forks=None), "arpo", **OFF))


class Node:
    """A place in the tree of a group: behind so many tokens of an answer."""

    def __init__(self, columns: Columns, answer: int, at: int) -> None:
        assert columns.forks is not None
        length, forks = len(of_answer(columns)[answer]), columns.forks.tolist()
        cuts = sorted({s for p, s in forks if p == answer and s >= at} | {length})
        self.segments: list[tuple[int, int, int, float]] = []
        """(answer, first token, behind the last, value at the end)"""
        begins = [(answer, at)]
        if any(p == answer and s == at for p, s in forks):
            begins += [(i, 0) for i, (p, s) in enumerate(forks) if p == answer and s == at]
            cuts = [c for c in cuts if c > at] or [length]
        for own, start in begins:
            end = cuts[0] if own == answer else self.first_cut(columns, own)
            leaf = not any(p == own and s == end for p, s in forks)
            value = float(columns.reward[own]) if leaf else Node(columns, own, end).value
            self.segments.append((own, start, end, value))
        self.value = sum(value for *_, value in self.segments) / len(self.segments)

    @staticmethod
    def first_cut(columns: Columns, answer: int) -> int:
        assert columns.forks is not None
        return min([s for p, s in columns.forks.tolist() if p == answer] + [len(of_answer(columns)[answer])])


@pytest.mark.parametrize("counts", [True, False])
def test_a_segment_is_credited_with_what_it_did_to_the_value(counts: bool) -> None:
    """One root of 6 tokens with reward 1, cut behind 2 and 4; forks with rewards 0 and 0 there and 1, 0 there, of which
    the last one counts, or does not because its log-probs are broken."""
    owner = torch.arange(5).repeat_interleave(torch.tensor([6, 4, 4, 2, 2]))
    n = len(owner)
    columns = replace(
        batch(0, groups=1, size=5), log_prob=torch.full((n,), -0.7, dtype=torch.float64),
        log_behaviour=torch.full((n,), -0.7, dtype=torch.float64), turn_of_token=owner,
        version=torch.zeros(n, dtype=torch.int64), log_reference=None, value=None,
        entropy=torch.ones(n, dtype=torch.float64), reward=torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64),
        forks=torch.tensor([[-1, 0], [0, 2], [0, 2], [0, 4], [0, 4]]),
    )  # fmt: skip
    if not counts:
        columns = replace(columns, log_prob=torch.where(owner == 4, torch.nan, columns.log_prob))
    at_four = (1 + 1 + 0) / 3 if counts else (1 + 1) / 2
    at_two = (at_four + 0 + 0) / 3
    prompt = at_two  # the only root's
    wanted = [at_two - prompt] * 2 + [at_four - at_two] * 2 + [1 - at_four] * 2
    wanted += [0 - at_two] * 8 + [1 - at_four] * 2 + [0 - at_four if counts else 0.0] * 2
    got = policy_of(columns, "spo", mask={"probability_below": 1.0}, **OFF) * 5
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(8))
def test_segment_gains_are_those_of_the_tree(seed: int) -> None:
    columns = forked(seed)
    assert columns.forks is not None
    gains: dict[tuple[int, int], float] = {}

    def credit(node: Node) -> None:
        for answer, start, end, value in node.segments:
            for place in range(start, end):
                gains[answer, place] = value - node.value
            if any(p == answer and s == end for p, s in columns.forks.tolist()):  # type: ignore[union-attr]
                credit(Node(columns, answer, end))

    forks = columns.forks.tolist()
    for members in of_group(columns):
        roots = [i for i in members if forks[i][0] < 0]
        firsts = []
        for i in roots:
            end = Node.first_cut(columns, i)
            leaf = not any(p == i and s == end for p, s in forks)
            firsts.append((i, end, float(columns.reward[i]) if leaf else Node(columns, i, end).value))
        value = sum(v for *_, v in firsts) / len(firsts)
        for i, end, v in firsts:
            for place in range(end):
                gains[i, place] = v - value
            if any(p == i and s == end for p, s in forks):
                credit(Node(columns, i, end))
    wanted = [gains[i, place] for i, tokens in enumerate(of_answer(columns)) for place in range(len(tokens))]
    got = policy_of(columns, "spo", mask={"probability_below": 1.0}, **OFF) * len(columns.reward)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_remax_takes_off_the_greedy_answers_reward_and_does_not_train_it(seed: int) -> None:
    columns = batch(seed)
    greedy = torch.zeros(len(columns.reward), dtype=torch.bool)
    greedy[[members[0] for members in of_group(columns)[:2]]] = True
    columns = replace(columns, greedy=greedy)
    baseline = [float(columns.reward[members[0]]) for members in of_group(columns)]

    def loss(log_prob: Tensor) -> Tensor:
        total = log_prob.new_zeros(())
        for number, members in enumerate(of_group(columns)[:2]):
            for i in members[1:]:
                rows = of_answer(columns)[i]
                weight = (log_prob[rows] - columns.log_behaviour[rows]).exp().clamp(max=2.0).detach()
                total = total + (weight * log_prob[rows]).sum() * (columns.reward[i] - baseline[number])
        return -total / len(columns.reward)

    log_prob = columns.log_prob.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(log_prob), log_prob)
    torch.testing.assert_close(policy_of(columns, "remax"), -gradient, rtol=1e-9, atol=1e-13)
    metrics = coefficients(columns, load_recipe({"name": "remax"}), ObjectiveState())[0].metrics
    assert metrics["reject/greedy/trajectories"] == 2
    assert metrics["reject/no_greedy/trajectories"] == 4


def test_choices_that_exclude_forks_are_refused() -> None:
    for changes in ({"baseline": "group_mean"}, {"scale": "group_std"}):
        with pytest.raises(UserError, match="difference of values"):
            load_recipe({"name": "spo", "advantage": changes})
