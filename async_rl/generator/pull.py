"""New weights into an engine: fetched as tensors and loaded, or led into vLLM's workers by the trainer's calls."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from async_rl.errors import RunFailed, UserError
from async_rl.generator.engine import Engine
from async_rl.trajectory.codec import WireError
from async_rl.weights.shared_memory import WeightsError
from async_rl.wire import messages as msg
from async_rl.wire.channel import AsyncDealer, WireTimeout

if TYPE_CHECKING:
    from torch import Tensor


# -------------------- merging
# Adapters that arrive alone, added to this process's own copy of the model: whole weights for any engine.
#
# The copy lies beside the engine's weights, in the dtype of the model's files. The sum is the trainer's, bit
# for bit (`model.lora.merged`), so the canary compares checksums as ever: of a base that is not the trainer's,
# an adapter that is old, damaged or not added at all.


class Source(Protocol):
    """Where adapters come from."""

    def read(self) -> tuple[int, dict[str, Tensor]]: ...

    def close(self) -> None: ...


class MergingSource:
    """A source of adapters as a source of whole weights."""

    def __init__(self, source: Source, base: Mapping[str, Tensor], scaling: float) -> None:
        """`base`: all weights of the model by name, on the device where sums are made; `scaling`: alpha / rank."""
        self._source = source
        self._base = base
        self._scaling = scaling

    def read(self) -> tuple[int, dict[str, Tensor]]:
        """The source's version, and all weights with its adapters added: float32 where there is one, else the base's
        own. Raises WeightsError when the adapters do not fit the base."""
        version, adapters = self._source.read()
        return version, add_to(self._base, adapters, self._scaling)

    def close(self) -> None:
        self._source.close()


def add_to(base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """All weights, `base` left as it is. Raises WeightsError for an adapter that is not whole or fits no weight."""
    from async_rl.model.lora import A, B, merged

    weights = dict(base)
    layers = {name.removesuffix(A).removesuffix(B) for name in adapters}
    for layer in layers:
        a, b, weight = adapters.get(layer + A), adapters.get(layer + B), base.get(f"{layer}.weight")
        if a is None or b is None or weight is None or tuple(weight.shape) != (b.shape[0], a.shape[1]):
            raise WeightsError(
                f"the adapter of {layer} does not fit the model here: is model.path the model the run trains?"
            )
        weights[f"{layer}.weight"] = merged(weight, a.to(weight.device), b.to(weight.device), scaling)
    return weights


AGAIN_S = 3.0
"""what is not answered for so long is asked again"""
SOON_S = 0.1
"""pause before asking again for a version that is not there yet"""


class WeightSource(Protocol):
    """Where a generator gets its weights."""

    async def bring(self, engine: Engine, *, first: bool) -> None:
        """Wait for a version newer than the engine's (`first`: for any) and have the engine hold it. A source may
        know of none: then nothing is changed. Raises WeightsError or RunFailed."""
        ...

    def close(self) -> None: ...


class TensorReader(Protocol):
    """Shared memory or a stream."""

    def read(self) -> tuple[int, dict[str, Tensor]]:
        """The newest version, or one newer than was read last. Raises WeightsError."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Linkable(Protocol):
    """An engine that takes weights from the trainer's calls: vLLM."""

    async def obey(self, method: str, version: int, detail: Mapping[str, Any]) -> None:
        """Do what the trainer's side of vLLM wants done: init, start, update, finish. Tokens sampled after finish
        carry `version`. Raises RunFailed."""
        ...


class Fetched:
    """Tensors come to this process, which hands them on."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader

    async def bring(self, engine: Engine, *, first: bool) -> None:
        # Copying a large model must not stop the other coroutines.
        version, tensors = await asyncio.to_thread(self._reader.read)
        if version > engine.version or first:
            try:
                await engine.load(tensors, version)
            except ValueError as error:  # the same would happen again
                raise UserError(f"model.path: this generator's model is not the one that is trained: {error}") from None

    def close(self) -> None:
        self._reader.close()


class Linked:
    """Tensors go from the trainer's GPU to vLLM's workers; only what is to be done passes here."""

    def __init__(self, endpoint: str, name: str, *, way: str, workers: int, first_s: float, timeout_s: float) -> None:
        """`endpoint`: of the trainer's link server (weights/link.py). `first_s`: longest wait for the first weights,
        while the trainer loads its model; `timeout_s`: of every later transfer."""
        self._first_s = first_s
        self._name, self._way, self._workers, self._timeout_s = name, way, workers, timeout_s
        self._session = time.time_ns()
        self._dealer = AsyncDealer(endpoint, f"{name}/link {self._session}")  # what was meant for a life before is lost
        self._version = -1
        """of the transfer under way"""

    async def bring(self, engine: Engine, *, first: bool) -> None:
        assert isinstance(engine, Linkable)
        after = -1 if first else engine.version
        patience, setting = (self._first_s, "wire.timeout_s") if first else (self._timeout_s, "weights.timeout_s")
        deadline = time.monotonic() + patience
        self._version, asked_at = -1, 0.0
        while True:
            now = time.monotonic()
            if now > deadline:
                raise RunFailed(
                    f"{self._name} waited {patience:g} s ({setting}) for the trainer to send weights "
                    f"newer than version {after} over {self._way}"
                )
            if now - asked_at > AGAIN_S and self._version < 0:
                asked_at = now
                await self._ask(after)
            try:
                message = await self._dealer.receive(SOON_S, "the trainer's next call")
            except WireTimeout:
                continue
            except WireError as error:
                raise RunFailed(f"{self._name} cannot read what the trainer sends: {error}") from None
            match message:
                case msg.LinkCall():
                    if await self._obey(engine, message, after, deadline):
                        return
                case msg.Waiting() if self._version < 0:
                    asked_at = now - AGAIN_S + SOON_S
                    if not first:
                        return  # the trainer will say when there is one
                case msg.Refused(reason=reason):
                    raise RunFailed(f"{self._name} gets no weights over {self._way}: {reason}")

    async def _ask(self, after: int) -> None:
        await self._dealer.send(
            msg.AskLink(
                name=self._name,
                pid=os.getpid(),
                session=self._session,
                way=self._way,
                workers=self._workers,
                after=after,
            )
        )

    async def _obey(self, engine: Linkable, call: msg.LinkCall, after: int, deadline: float) -> bool:
        """Do it and say so; whether it was the last one. Raises RunFailed: an engine whose update went wrong half
        way holds nobody knows what."""
        try:
            self._check(call, after)
            left = max(0.0, deadline - time.monotonic())
            await asyncio.wait_for(engine.obey(call.method, call.version, call.detail), left)
        except TimeoutError:
            reason = f"its part of '{call.method}' did not come from the trainer within {self._timeout_s:g} s"
            await self._answer(call, reason)
            raise RunFailed(f"{self._name}, weights version {call.version} over {self._way}: {reason}") from None
        except RunFailed as error:
            await self._answer(call, str(error))
            raise
        await self._answer(call)
        return call.method == "finish"

    def _check(self, call: msg.LinkCall, after: int) -> None:
        """Raises RunFailed for a version that cannot be."""
        if call.method == "init":
            return
        if call.method == "start":
            self._version = call.version
        if call.version != self._version or call.version <= after:
            raise RunFailed(
                f"{self._name}: '{call.method}' is for weights version {call.version}, but the transfer under way is "
                f"of version {self._version}, and this generator holds version {after}"
            )

    async def _answer(self, call: msg.LinkCall, error: str = "") -> None:
        await self._dealer.send(msg.LinkAnswer(session=self._session, number=call.number, error=error))

    def close(self) -> None:
        self._dealer.close(linger_s=0.5)
