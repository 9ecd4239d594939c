"""Exact OPOB with packing kept: per-trajectory gradient norms and the baselined gradient in one backward pass.

Formulas: docs/algorithms.md#exact-norms, #two-columns. Shapes: N tokens, t policy tokens and i trajectories of a
micro-batch; T, I and G of the batch (this rank's share of it where ranks share a batch); H hidden.

With exact norms a recipe answers two columns that are proportional within a trajectory: policy_t = R_i c_t and
baseline_t = c_t. The gradient is sum_i (R_i - b_i) G_i with G_i = sum_t c_t grad log pi_t, and b depends on every
|G_i|^2. So the backward pass runs with c, and autograd forms no weight gradient. Hooks keep each layer's input a and
output gradient g; norms come from those (async_rl_kernels.segment_gradient), and each weight gradient (m g)^T a is
formed once, when m = R - b is known. Nothing per trajectory is stored but the gradients of vectors (norms, biases), and
micro-batches stay as packed as they were.

Memory. Any backward saves a, and when g of a layer is kept, autograd has freed more of it (q, k, v, the inputs of norms
and activations): one packed micro-batch needs about what an ordinary backward needs (bench/opob.py). A group that is
cut by the end of a micro-batch does not keep its a and g until it is complete, since groups can be longer than
micro-batches. Its two sums are formed instead, sum R_i G_i in `.grad` and sum G_i in one extra copy of the gradient,
and b is subtracted when its last trajectory has been seen. One baseline for the whole batch is treated alike. Norms
first and a second pass over the batch would save that copy for a third more time.

Over ranks: exact_over_ranks.py. Weight gradients that are formed from hooks are not seen by FSDP: each is formed whole
and summed over the ranks into their rows of `.grad` while the next is formed. The largest, of the embedding or the
head, needs the most memory: vocabulary x hidden x 4 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from async_rl.errors import UserError
from async_rl.model.decoder import Attention, Decoder, LayerExecution, Linear, RMSNorm, linear
from async_rl.model.repeats import Repeats
from async_rl.model.tree_attention import RepeatedAttention, repeats_of
from async_rl.model.varlen import Kernel
from async_rl.trainer.forward import ModelArithmetic, log_probs
from async_rl.trainer.packing import MicroBatch, PackedBatch
from async_rl.trainer.ranks import free, gather_head, is_sharded, keep_head_after_backward
from async_rl.trainer.reduction import Reduction
from async_rl_kernels import LogProbs
from async_rl_kernels.head_gradient import HeadGradient
from async_rl_kernels.segment_gradient import Segments, embedding_norm_squares, segment_sums, weight_norm_squares

if TYPE_CHECKING:
    from async_rl.model.huggingface import Model


Sums = dict[Tensor, Tensor]
"""parameter -> a gradient of its shape that is kept beside `.grad`"""


class TrajectoryGradient:
    """Per-trajectory gradients of a model: their norms, and weighted sums of them.

    Use: `forward(micro)`, then `add(batch, ...)`; or `add` alone when the columns are known. `forward`, `backward` and
    `accumulate` of one micro-batch are what `add` is made of. Raises UserError for a model whose layers are not known
    here.
    """

    def __init__(self, model: Model, arithmetic: ModelArithmetic) -> None:
        if not isinstance(model, Decoder):
            raise UserError(
                "recipe.opob.norm=exact needs the gradients of every layer, which are known for the built-in decoder "
                f"only, not for {type(model).__name__}; set recipe.opob.norm to logit or length"
            )
        self._model = model
        self._arithmetic = arithmetic
        self._record: Record | None = None
        keep_head_after_backward(model)

    def add(
        self,
        batch: PackedBatch,
        policy: Tensor,
        baseline: Tensor,
        baselines: Callable[[Tensor], Tensor],
        *,
        scope: Literal["group", "batch"] = "group",
    ) -> Tensor:
        """Add the gradient of -(sum_t policy_t log pi_t - sum_groups b_g sum_t baseline_t log pi_t) to `.grad`.

        Returns |sum_{t in i} baseline_t grad log pi_t|^2, [I] float64.

        Args:
            policy, baseline: [T], proportional within each trajectory.
            baselines: norm squares [I] -> b [G]. With several micro-batches it is called more than once, with 0 for
                trajectories not seen yet, and read for groups seen completely.
            scope: batch when any b depends on trajectories of other groups.
        """
        last = len(batch.micro_batches) - 1
        reward = proportion(policy, baseline, batch)
        group = batch.group_of_trajectory
        owner = group.tolist() if scope == "group" else [0] * len(group)
        first = {i: owner.index(i) for i in set(owner)}
        # Summed up around the scope's first reward: equal rewards leave exact zeros.
        provisional = reward[[first[i] for i in owner]]
        norm_squares = torch.zeros(len(group), dtype=torch.float64, device=reward.device)
        carried: Sums = {}
        for number, micro in enumerate(batch.micro_batches):
            part = micro.trajectories
            norm_squares[part] = self.norms(micro, baseline[micro.policy])
            # Trajectories from `cut` on belong to a scope that goes on in the next micro-batch.
            cut = part.stop
            if number < last and owner[part.stop] == owner[part.stop - 1]:
                cut = max(part.start, first[owner[part.stop]])
            multipliers = (reward - provisional)[part]
            if cut > part.start:
                found = baselines(norm_squares)[group].to(reward)
                done = slice(0, cut - part.start)
                multipliers[done] = (reward - found)[part][done]
                for parameter, total in carried.items():
                    _buffer(parameter, None).sub_(total * (found - provisional)[part.start].to(total.dtype))
                carried = {}
            self.accumulate(multipliers)
            if cut < part.stop:
                self.accumulate(torch.ones_like(multipliers), first=cut - part.start, into=carried)
            self.forget()
        return norm_squares

    def add_known(self, micro: MicroBatch, coefficients: Tensor) -> None:
        """Add the gradient of -sum_t coefficients_t log pi_t to `.grad`, [t]: an ordinary step, without norms."""
        found = log_probs(self._model, micro, self._arithmetic).log_prob
        loss = -(coefficients.to(found.dtype) * found).sum()
        gather_head(self._model)
        loss.backward()
        free(self._model)

    def norms(self, micro: MicroBatch, weights: Tensor) -> Tensor:
        """`backward` of weights [t], after `forward` where this micro-batch was not the last to be run: [i] float64."""
        if self._record is None or self._record.micro is not micro:
            self.forward(micro)
        return self.backward(weights)

    def forget(self) -> None:
        """Free what was kept for the last micro-batch."""
        self._record = None
        free(self._model)

    def forward(self, micro: MicroBatch) -> LogProbs:
        """Log-probs, entropies, sums of squares of the policy tokens, [t] each, detached; keeps what `backward`
        needs."""
        device = micro.tokens.device
        free(self._model)  # gradients go to the sharded parameters, which are the module's now
        record = Record.of(micro, self._model.head)
        inputs = record.model_inputs(self._arithmetic.kernel)
        with torch.enable_grad(), Hooks(self._model, record), self._arithmetic.autocast(device):
            if is_sharded(self._model):  # autograd forms no gradient of a weight that it is not asked for
                hidden = self._model(*inputs)
            else:
                weights = {name: p.detach() for name, p in self._model.named_parameters()}
                hidden = functional_call(self._model, weights, inputs)
        head = self._model.head
        record.hidden = micro.stretched(hidden.to(head.dtype))
        record.head = HeadGradient(
            record.hidden.detach(),
            head.detach(),
            micro.targets,
            record.policy,
            temperature=self._arithmetic.temperature,
            products=self._arithmetic.products(device),
        )
        self._record = record
        return record.head.log_probs

    @torch.no_grad()
    def backward(self, weights: Tensor) -> Tensor:
        """|sum_{t in i} weights_t grad log pi_t|^2 over all parameters that are trained, [i] float64.

        weights: [t] of the micro-batch last given to `forward`.
        """
        record = self._record
        assert record is not None, "forward first"
        assert record.head is not None
        policy, segments = record.policy, record.segments
        largest = torch.zeros(len(policy), dtype=torch.float64, device=weights.device)
        largest.scatter_reduce_(0, policy.ids, weights.abs().double(), "amax")
        record.scale = torch.where(largest > 0, largest, 1.0)
        scaled = (weights.double() / record.scale[policy.ids]).to(record.head.log_probs.log_prob.dtype)
        gather_head(self._model)
        gradient, norm_squares = record.head.backward(scaled)
        if not record.head_weight.requires_grad:
            norm_squares = torch.zeros_like(norm_squares)
        if policy.rows == 0:
            return norm_squares
        assert record.hidden is not None
        assert record.embedded is not None
        with torch.enable_grad():
            (record.embedding_gradient,) = torch.autograd.grad(record.hidden, record.embedded, gradient)
        record.hidden = None
        for shared in record.inputs:
            if shared.uses:
                gradients, rows = [g for _, g in shared.uses], shared.rows
                norm_squares += weight_norm_squares(shared.activations, gradients, shared.segments, rows)
        for _, each in record.vectors:
            norm_squares += torch.linalg.vecdot(each, each)
        if record.embedding_weight is not None and record.embedding_weight.requires_grad:
            tokens = record.tokens
            norm_squares += embedding_norm_squares(record.embedding_gradient, tokens, segments)
            if self._model.lm_head is None:
                embedded = record.embedded.detach()
                norm_squares += 2 * record.head.product_with_embedding(
                    embedded, record.embedding_gradient, tokens, segments
                )
        return norm_squares.clamp_(min=0) * record.scale.square()

    @torch.no_grad()
    def accumulate(self, multipliers: Tensor, *, first: int = 0, into: Sums | None = None) -> None:
        """Add the gradient of -sum_{i >= first} multipliers_i sum_t weights_t log pi_t to `.grad`, or to `into`.

        multipliers: [i] of the micro-batch last given to `backward`.
        """
        record = self._record
        assert record is not None, "forward first"
        assert record.head is not None
        assert record.scale is not None, "backward first"
        segments, policy = record.segments, record.policy
        each = multipliers.double() * record.scale
        each[:first] = 0
        reduction = Reduction()
        if record.head_weight.requires_grad:
            with _summing(record.head_weight, into, reduction) as total:
                record.head.accumulate(total, each[policy.ids], first=first)
        for shared in record.inputs:
            for weight, gradient, activations in shared.weighted(each, first):
                _add_product(weight, gradient.T, activations, into, reduction)
        for vector, values in record.vectors:
            with _summing(vector, into, reduction) as total:
                total.add_(each.to(values.dtype) @ values)
        embedding = record.embedding_weight
        if record.embedding_gradient is not None and embedding is not None and embedding.requires_grad:
            rows = slice(segments.start(first), None)
            of_row = each[segments.ids[rows], None]
            with _summing(embedding, into, reduction) as total:
                values = record.embedding_gradient[rows] * of_row.to(total.dtype)
                total.index_add_(0, record.tokens[rows], values.to(total.dtype))
        reduction.finish()


@dataclass(slots=True, eq=False)
class SharedInput:
    """The input of linear layers that read the same tensor: q, k, v; gate, up. n: N, or t behind the last attention."""

    activations: Tensor  # [n, in], in the dtype of the product; with `repeats` [rows, in]
    segments: Segments
    """of the n rows"""
    repeats: Repeats | None
    """which of the N tokens are one row, and so have one activation"""
    uses: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """weight [out, in] and gradient of the layer's output [n, out]"""

    @property
    def rows(self) -> Tensor | None:  # [n] int64
        """The activation of each of the n."""
        return None if self.repeats is None else self.repeats.rows

    def weighted(self, each: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(weight, [m, out], [m, in]): the product of the two is the weight's gradient, summed with multipliers `each`
        [i] over trajectories from `first` on (it is 0 for others)."""
        if self.repeats is not None:
            of_token = each[self.segments.ids]
            for weight, gradient in self.uses:
                yield weight, self.repeats.sums(gradient, of_token).to(self.activations.dtype), self.activations
        elif self.uses:
            part = slice(self.segments.start(first), None)
            of_row = each[self.segments.ids[part], None].to(self.activations.dtype)
            activations = self.activations[part] * of_row
            for weight, gradient in self.uses:
                yield weight, gradient[part], activations


@dataclass(slots=True, kw_only=True, eq=False)
class Record:
    """One micro-batch between `forward` and the end of `accumulate`.

    Gradients in it are those of -sum_t c_t / s_i log pi_t, with s_i the largest |c_t| of trajectory i, so that
    importance weights of any size neither under- nor overflow in a square.
    """

    micro: MicroBatch
    tokens: Tensor  # [N] int64
    segments: Segments
    """the N tokens, by trajectory"""
    policy: Segments
    """the t policy tokens"""
    repeats: Repeats | None
    """which tokens are one row of the micro-batch's tree"""
    head_weight: Tensor
    embedding_weight: Tensor | None = None
    embedded: Tensor | None = None  # [N, H], leaf of the graph
    hidden: Tensor | None = None  # [t, H], root of the graph
    head: HeadGradient | None = None
    inputs: list[SharedInput] = field(default_factory=list)
    vectors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """norm weight or bias [width] and its gradient in each trajectory [i, width]"""
    embedding_gradient: Tensor | None = None  # [N, H]
    scale: Tensor | None = None  # [i] float64, s_i

    @classmethod
    def of(cls, micro: MicroBatch, head_weight: Tensor) -> Record:
        device = micro.tokens.device
        repeats = None if micro.tree is None else repeats_of(micro.tree, device)
        return cls(
            micro=micro,
            tokens=micro.tokens if repeats is None else micro.tokens[repeats.rows],
            segments=Segments(micro.lengths, device),
            policy=Segments(micro.policy_lengths, device),
            repeats=repeats,
            head_weight=head_weight,
        )

    def model_inputs(self, kernel: Kernel | None) -> tuple[Tensor, Tensor, Attention, Tensor]:
        """What the model is called with: all N tokens, those of a shared beginning for each trajectory."""
        micro = self.micro
        if self.repeats is None:
            return micro.tokens, micro.positions, micro.attention(kernel), micro.predictor_tokens
        assert micro.tree is not None
        attention = RepeatedAttention(micro.tree, self.repeats, kernel)
        return self.tokens, micro.positions[self.repeats.rows], attention, micro.predictor_tokens

    def segments_of(self, rows: int) -> Segments:
        """Those of an input of so many rows: all tokens, or behind the last layer's attention those that predict."""
        assert rows in (self.segments.rows, self.policy.rows)
        return self.segments if rows == self.segments.rows else self.policy


class Hooks:
    """A context in which each use of a trained parameter of the model adds its part to `record`."""

    def __init__(self, model: Decoder, record: Record) -> None:
        self._model = model
        self._record = record
        self._handles: list[Any] = []
        self._sources: list[tuple[Tensor, SharedInput]] = []
        """inputs seen last: an adapter's own comes between those of the layers it stands beside"""

    def __enter__(self) -> None:
        # Every layer's input is kept anyway; one computed again would call the hooks twice, one compiled never.
        self._execution = self._model.set_execution(LayerExecution())
        # Parameters are taken here: during functional_call modules hold detached stand-ins.
        for module in self._model.modules():
            hook: Callable[..., Tensor | None]
            if isinstance(module, Linear):
                module.repeats = self._record.repeats
            match module:
                case nn.Linear():
                    hook = partial(self._linear, module.weight, module.bias)
                case RMSNorm():
                    hook = partial(self._norm, module.weight)
                case nn.Embedding():
                    hook = self._embedding
                    self._record.embedding_weight = module.weight
                case _:
                    assert not list(module.parameters(recurse=False)), f"{type(module).__name__} has parameters"
                    continue
            self._handles.append(module.register_forward_hook(hook))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._model.modules():
            if isinstance(module, Linear):
                module.repeats = None
        self._model.set_execution(self._execution)
        self._sources.clear()

    def _linear(
        self,
        weight: Tensor,
        bias: Tensor | None,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        output: Tensor,
    ) -> None:
        """Keep input [n, in] and output gradient [n, out] of a linear layer. weight [out, in], bias [out]."""
        record = self._record
        if not weight.requires_grad and (bias is None or not bias.requires_grad):
            return
        shared = self._shared(inputs[0], output.dtype)

        def keep(gradient: Tensor) -> None:  # [n, out]
            if weight.requires_grad:
                shared.uses.append((weight, gradient))
            if bias is not None and bias.requires_grad:
                record.vectors.append((bias, segment_sums(gradient, shared.segments)))

        output.register_hook(keep)

    def _shared(self, source: Tensor, dtype: torch.dtype) -> SharedInput:
        """The record's entry of an input `source` [n, in]."""
        found = next((shared for seen, shared in self._sources if seen is source), None)
        if found is None:
            segments, repeats = self._record.segments_of(source.shape[0]), self._record.repeats
            activations = source.detach()
            if repeats is not None and segments is self._record.segments:
                activations = activations.index_select(0, repeats.one)
            else:
                repeats = None
            found = SharedInput(activations.to(dtype), segments, repeats)
            self._record.inputs.append(found)
        others = [pair for pair in self._sources if pair[0] is not source]
        self._sources = [*others[-1:], (source, found)]
        return found

    def _norm(self, weight: Tensor, module: RMSNorm, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep the gradient of a norm's weight [width] in each trajectory, [i, width]. inputs [n, ..., width]."""
        record, x = self._record, inputs[0].detach()
        if not weight.requires_grad:
            return

        def keep(gradient: Tensor) -> None:  # [n, ..., width]
            # d(loss)/d(weight) = sum of gradient * x / rms(x), over tokens and, for q and k, heads
            rows = x.flatten(0, -2).to(weight.dtype)
            per_row = torch.rsqrt(torch.linalg.vecdot(rows, rows) / rows.shape[-1] + module.eps)
            values = gradient.flatten(0, -2) * rows
            record.vectors.append((weight, segment_sums(values, record.segments_of(x.shape[0]), per_row)))

        output.register_hook(keep)

    def _embedding(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Make the embedded tokens [N, H] the leaf of the graph."""
        self._record.embedded = output.detach().requires_grad_()
        return self._record.embedded


def proportion(policy: Tensor, baseline: Tensor, batch: PackedBatch) -> Tensor:
    """R_i with policy_t = R_i baseline_t in each trajectory, 0 where both are 0: [I] float64. policy, baseline [T]."""
    lengths = torch.tensor(
        [n for micro in batch.micro_batches if not micro.idle for n in micro.policy_lengths], dtype=torch.int64
    )
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(policy.device)
    zero = torch.zeros(len(lengths), dtype=torch.float64, device=policy.device)
    largest = zero.scatter_reduce(0, owner, baseline.abs().double(), "amax")[owner]
    unit = torch.where(largest > 0, baseline.double() / largest, 0.0)
    share = torch.where(largest > 0, policy.double() / largest, 0.0)
    result = zero.index_add(0, owner, share * unit) / zero.index_add(0, owner, unit.square()).clamp(min=1e-300)
    error = (policy - result[owner] * baseline).abs()
    assert not (error > 1e-3 * policy.abs() + 1e-30).any(), "policy is not a multiple of baseline in a trajectory"
    return result


def _buffer(parameter: Tensor, into: Sums | None) -> Tensor:
    """The tensor, of the parameter's shape, in which its gradient is summed up; zeros when new."""
    if into is not None:
        if parameter not in into:
            into[parameter] = torch.zeros_like(parameter)
        return into[parameter]
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


@contextmanager
def _summing(parameter: Tensor, into: Sums | None, reduction: Reduction) -> Iterator[Tensor]:
    """The tensor to add the gradient of `parameter` to, of the whole parameter's shape.

    For a sharded parameter it is given to `reduction` at the end.
    """
    if isinstance(parameter, DTensor):
        assert into is None, "sums by group need whole gradients"
        total = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        yield total
        reduction.add(parameter, total)
    else:
        yield _buffer(parameter, into)


def _add_product(weight: Tensor, left: Tensor, right: Tensor, into: Sums | None, reduction: Reduction) -> None:
    """Add left [out, N] @ right [N, in] to the gradient of `weight`, in its dtype.

    The first product becomes the sum itself: zeros to add it to would cost two more passes over the weight.
    """
    total = None if isinstance(weight, DTensor) else weight.grad if into is None else into.get(weight)
    if total is not None and left.dtype == total.dtype and left.device.type != "cpu":
        total.addmm_(left, right)
        return
    product = linear(left, right.T).to(weight.dtype)  # on a CPU twice as fast as addmm
    if isinstance(weight, DTensor):
        assert into is None, "sums by group need whole gradients"
        reduction.add(weight, product)
    elif total is not None:
        total.add_(product)
    elif into is None:
        weight.grad = product
    else:
        into[weight] = product
