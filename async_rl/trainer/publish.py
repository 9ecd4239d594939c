"""Where the trainer's weights go: into shared memory, over links, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from async_rl.config import Settings
from async_rl.events import RecordEvent
from async_rl.model.decoder import DTYPES, Decoder
from async_rl.run_folder import RunFolder
from async_rl.trainer.learner import Learner
from async_rl.weights.broadcast import Broadcast
from async_rl.weights.link import Control, LinkServer, MakeLink, Staged, WeightLink
from async_rl.weights.shared_memory import WeightPublisher, segment_path
from async_rl.weights.upload import WeightUpload
from async_rl.weights.vllm_links import HAS_PACKED, IpcLink
from async_rl.weights.vllm_release import Release, installed_release
from async_rl.weights.way import LINKS, needs_segment
from async_rl.wire import messages as msg
from async_rl.wire.channel import ipc_endpoint
from async_rl.wire.endpoint import is_tcp
from async_rl.wire.keys import keys_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor


COPIES = 2
"""most versions that are staged in main memory: the newest, and one that a frozen generator holds"""


class Publisher(Protocol):
    def publish(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], version: int) -> None:
        """Let generators have this version from now on. Raises RunFailed when it cannot."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Both:
    """For runs where some generators are linked and others read shared memory, which holds what is staged for links."""

    links: LinkServer
    staged: Staged
    segment: WeightPublisher
    keepalive: Callable[[], None]

    def publish(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], version: int) -> None:
        self.links.publish(tensors, version)
        self.segment.publish(self._with_keepalives(), version)

    def _with_keepalives(self) -> Iterator[tuple[str, Tensor]]:
        for pair in self.staged.named_parameters():
            self.keepalive()
            yield pair

    def close(self) -> None:
        with ExitStack() as both:
            both.enter_context(closing(self.segment))
            both.enter_context(closing(self.links))


def make_publisher(
    folder: RunFolder,
    settings: Settings,
    learner: Learner,
    ways: Iterable[str],
    record: RecordEvent,
    make_link: Callable[[Staged], MakeLink] | None = None,
    keepalive: Callable[[], None] = lambda: None,
    upload_to: str = "",
) -> Publisher:
    """The publisher of a run.

    Args:
        ways: that weights take to the run's own generators (run/placement.py); none are known for a trainer that
            somebody else starts.
        make_link: by default the links of the installed release of vLLM.
        keepalive: called often while a publication waits or copies.
        upload_to: the run's weight server, where this process is on another machine than the run; empty: it is not.

    Raises UserError.
    """
    ways = set(ways)
    linked = ways & set(LINKS)
    sent = learner.sent()
    if upload_to:
        return WeightUpload(
            upload_to,
            sent,
            keys=keys_in(settings.wire.keys),
            timeout_s=settings.wire.timeout_s,
            dtype=segment_dtype(settings, learner),
            keepalive=keepalive,
        )
    if not linked:
        return WeightPublisher(segment_path(folder.path), sent, dtype=segment_dtype(settings, learner))
    shapes = {name: tuple(tensor.shape) for name, tensor in sent.items()}
    device = next(iter(sent.values())).device
    main = "ipc" not in linked  # a second copy, if it comes to that, is for main memory
    staged = Staged(shapes, DTYPES[settings.generator.dtype], device, in_main_memory=main, copies=COPIES if main else 1)
    links = LinkServer(
        ipc_endpoint(folder.path, "weights"),
        staged,
        (make_link or links_by_release(installed_release(), broadcast=settings.weights.broadcast))(staged),
        timeout_s=settings.weights.timeout_s,
        record=record,
        in_turns=not settings.weights.broadcast,
        keepalive=keepalive,
    )
    if not needs_segment(ways, tcp=is_tcp(settings.wire.endpoint)):
        return links
    return Both(links, staged, WeightPublisher(segment_path(folder.path), dict(staged.named_parameters())), keepalive)


def segment_dtype(settings: Settings, learner: Learner) -> torch.dtype | None:
    """The dtype of the weights in shared memory: that of the engine, which casts them to it anyway, so half of the
    bytes of float32 travel. None: the trainer's own, where something else is made of them: adapters, which are added to
    the base in float32; a quantized model; one of another architecture, of which an engine may keep some in float32."""
    chosen = settings.generator
    alone = learner.adapters is not None and learner.options.send_adapters
    if alone or chosen.quantization != "none" or not isinstance(learner.model, Decoder):
        return None
    return DTYPES[chosen.dtype]


def links_by_release(release: Release, *, broadcast: bool = False) -> Callable[[Staged], MakeLink]:
    """Of an installed vLLM. `broadcast`: NCCL's go to all generators at once."""

    def of(staged: Staged) -> MakeLink:
        together = Broadcast(staged) if broadcast else None

        def make(ask: msg.AskLink, control: Control) -> WeightLink:
            if ask.way == "ipc":
                return IpcLink(control, staged, has_packed=release >= HAS_PACKED)
            if together is not None:
                return together.member(ask, control)
            from async_rl.weights.vllm_links import make_nccl_link

            return make_nccl_link(control, staged, workers=ask.workers, release=release)

        return make

    return of
