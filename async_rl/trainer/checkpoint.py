"""A learner on disk and back: everything a step depends on, in safetensors and JSON.

A checkpoint is a Hugging Face folder of the policy (config, tokenizer, weights) with, beside it:
`optimizer.safetensors` (moments by parameter name), `critic.safetensors` and `critic_optimizer.safetensors`
where there is a critic (each in parts where several ranks wrote it, see rows.py), `adapter/` (peft's format; the
folder's own weights then have them added) where adapters are trained, `learner.json` (version, objective's running
state, random generators) and
`progress.json` (what the trainer's loop remembers). The learning-rate schedule is a function of the version.
The KL reference is the initial model (`initial_hash` says which bytes that was), or where it follows the policy in
`reference.safetensors`.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from async_rl.errors import RunFailed, UserError
from async_rl.model.folder import save_folder
from async_rl.model.lora import read_adapters
from async_rl.objective import ObjectiveState
from async_rl.trainer.manifest import Partial, checkpoint_path, list_checkpoints, write_partial
from async_rl.trainer.sharding import RowFiles, load_weights, save_rows
from async_rl.trainer.team import Save, Team

if TYPE_CHECKING:
    from async_rl.trainer.critic import Critic
    from async_rl.trainer.learner import Learner

Weights = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
Progress = Mapping[str, Any]
"""plain data, for JSON"""
ADAPTERS = "adapter"
"""folder in a checkpoint, as peft writes one"""


def save_checkpoint(
    folder: Path,
    learner: Learner,
    progress: Progress,
    *,
    source: Path,
    keep: int,
    spared: Path | None = None,
    team: Team | None = None,
) -> Path:
    """Write the learner's state as a whole, durable folder; keep the newest `keep` folders, and `spared`.

    As `write_checkpoint`. Raises OSError or SafetensorError when the folder cannot be written.
    """
    team = team or Team(learner.ranks)
    partial = write_checkpoint(folder, learner, progress, source=source, team=team)
    partial.finish(team.keepalive)
    delete_old(folder, keep=keep, spared=spared)
    return partial.final


def write_checkpoint(folder: Path, learner: Learner, progress: Progress, *, source: Path, team: Team) -> Partial:
    """Write the learner's state into files that are not a checkpoint before `Partial.finish`; the learner may go on.

    The leader calls it, and orders every other rank to write its part (`save_part`). `source` gives config and
    tokenizer. Raises OSError or SafetensorError when the files cannot be written.
    """

    def write(into: Path) -> None:
        save_folder(into, learner.model, source=source, weights=team.weights(learner))
        if learner.adapters is not None:
            learner.adapters.save(into / ADAPTERS, base=str(source))
        team.send(Save(folder=into))
        save_part(into, learner)
        state = {"version": learner.version, "objective": learner.state.to_dict(), "random": random_state()}
        (into / "learner.json").write_text(json.dumps(state) + "\n")
        (into / "progress.json").write_text(json.dumps(dict(progress)) + "\n")

    return write_partial(checkpoint_path(folder, learner.version), write)


def delete_old(folder: Path, *, keep: int, spared: Path | None) -> None:
    """Delete all checkpoints but the newest `keep`, and `spared`."""
    for old in list_checkpoints(folder)[:-keep]:
        if old != spared:
            shutil.rmtree(old)


def save_part(folder: Path, learner: Learner) -> None:
    """Write this rank's part of a checkpoint, after the leader's weights: of the moments, and of the critic.

    Collective: when it returns, all have written. Raises RunFailed where this rank cannot write.
    """
    ranks = learner.ranks
    try:
        save_rows(optimizer_state(learner.optimizer, _names(learner)), folder, "optimizer", ranks)
        if learner.critic is not None:
            save_rows(learner.critic.state_dict(), folder, "critic", ranks)
            moments = optimizer_state(learner.critic.optimizer, _critic_names(learner))
            save_rows(moments, folder, "critic_optimizer", ranks)
        if learner.reference_moves:
            save_rows({n: p.detach() for n, p in _reference(learner).items()}, folder, "reference", ranks)
    except (OSError, SafetensorError) as error:
        if ranks.leads:
            raise  # the loop reports it
        raise RunFailed(
            f"its part of the checkpoint of version {learner.version} cannot be written to {folder} "
            f"({getattr(error, 'strerror', None) or error}); make room there, or let every rank see that folder, "
            "and resume the run"
        ) from None
    ranks.barrier()


def load_checkpoint(path: Path, learner: Learner) -> Progress:
    """Put a fresh learner of the same settings into the state of a checkpoint that `damage_of` found whole."""
    try:
        if learner.adapters is not None:
            learner.adapters.load(read_adapters(path / ADAPTERS))
        else:
            load_weights(learner.model, path)
        load_optimizer(learner.optimizer, _names(learner), path, "optimizer")
        if learner.critic is not None:
            _load_rows(learner.critic.named_parameters(), path, "critic")
            load_optimizer(learner.critic.optimizer, _critic_names(learner), path, "critic_optimizer")
        if learner.reference_moves:
            _load_rows(_reference(learner), path, "reference")
        state = json.loads((path / "learner.json").read_text())
        learner.version = state["version"]
        learner.state = ObjectiveState.from_dict(state["objective"])
        set_random_state(state["random"])
        progress: Progress = json.loads((path / "progress.json").read_text())
    except (KeyError, FileNotFoundError) as error:
        raise UserError(f"{path} does not belong to these settings: {error} is not in it") from None
    return progress


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's tensors as `<what>/<parameter>`; parameters that never had a gradient have none."""
    return {
        f"{what}/{names[parameter]}": value
        for parameter, values in optimizer.state.items()
        for what, value in values.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], folder: Path, stem: str) -> None:
    """The inverse of `optimizer_state`, bit by bit, whatever number of ranks wrote it. Raises KeyError for a
    parameter it does not have."""
    parameters = {name: parameter for parameter, name in names.items()}
    optimizer.state.clear()
    with RowFiles(folder, stem) as files:
        for key in sorted(files.names()):
            what, _, name = key.partition("/")
            parameter = parameters[name]
            scalar = what == "step"
            value = files.scalar(key).to(parameter.device) if scalar else files.as_laid_out(key, parameter)
            optimizer.state[parameter][what] = value


def load_critic(path: Path, critic: Critic) -> None:
    """The critic of a checkpoint, as the one that another run begins with. Raises UserError where there is none that
    fits."""
    parameters = {n: p for n, p in critic.named_parameters().items() if not n.startswith("slow_")}
    try:
        _load_rows(parameters, path, "critic")
    except (OSError, KeyError, UserError, SafetensorError) as error:
        raise UserError(
            f"critic.path: {path} holds no critic of this kind ({error}); name a checkpoint of a run with one"
        ) from None
    critic.begin_target()


def _load_rows(parameters: Mapping[str, Tensor], folder: Path, stem: str) -> None:
    """Overwrite parameters, by name, by what `save_rows` wrote. Raises KeyError for one that is not there in its
    shape."""
    with RowFiles(folder, stem) as files, torch.no_grad():
        for name, parameter in parameters.items():
            kept = files.as_laid_out(name, parameter)
            if kept.shape != parameter.shape:
                raise KeyError(f"{stem}: {name} of shape {tuple(parameter.shape)}")
            parameter.copy_(kept)


def _reference(learner: Learner) -> dict[str, Tensor]:
    """Parameters of a reference that follows the policy."""
    assert isinstance(learner.reference, nn.Module)
    return dict(learner.reference.named_parameters())


def _names(learner: Learner) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in learner.model.named_parameters()}


def _critic_names(learner: Learner) -> dict[Tensor, str]:
    assert learner.critic is not None
    return {parameter: name for name, parameter in learner.critic.named_parameters().items()}


# Random numbers.


def random_state() -> dict[str, Any]:
    """Of torch (CPU, and each GPU), numpy and Python, as plain data."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [bytes(state).hex() for state in cuda],
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of `random_state`; a GPU that is not there (any more) is left out."""
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_bytes(one) for one in state["cuda"]])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
