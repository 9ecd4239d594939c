"""What can be found wrong before any process is started, without loading the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any, Protocol, runtime_checkable

from async_rl.buffer.demonstrations import Shown
from async_rl.config import Settings
from async_rl.config.settings import CriticSettings, OptimizerSettings, ReferenceSettings
from async_rl.errors import UserError, check_lora_package
from async_rl.generator.facilities import slots_of
from async_rl.model.architecture import PROJECTIONS, DecoderConfig, check_targets
from async_rl.model.folder import check_context, check_folder, check_for_vllm, read_headers
from async_rl.model.foreign import check_expert_targets, frozen_experts
from async_rl.model.tokenizer import Tokenizer, asks_for_date, control_in, problem_tokens
from async_rl.model.varlen import choose_backend
from async_rl.objective.conflicts import check_effect
from async_rl.objective.library import load_recipe
from async_rl.objective.own import is_own_function
from async_rl.objective.recipe import Recipe, Requirements, passes, requirements
from async_rl.run.demonstrations import demonstrations_of
from async_rl.run.fitting import fit_prompts
from async_rl.run.inputs import Inputs, inputs_of
from async_rl.run.memory import check_room_here
from async_rl.run.placement import (
    Placement,
    describe_links,
    describe_threads,
    place_here,
    read_cores,
    threads_here,
    ways_here,
)
from async_rl.run.rebuilding import describe_rebuilding
from async_rl.run.rollouts import check_rollout, check_windows
from async_rl.run.teachers import check_teachers
from async_rl.task import Problem, Task, make_task
from async_rl.task.problem_fields import ProblemSources, check_texts, read_sources
from async_rl.task.rehearsed import Rehearsed
from async_rl.task.weigh import has_group_reward, weights_of
from async_rl.trajectory import Split
from async_rl.weights.vllm_release import installed_release
from async_rl.weights.way import Way

MOST_PROMPTS = 500
"""prompts of a split that are looked at"""
MOST_EPISODES = 20
TOKEN_BYTES = 10
"""of a trajectory on the wire: token and log-prob, and its share of the turns"""
REMEDY = "raise generator.max_context, or use a model with a longer context or an easier task"
SPLITS: tuple[Split, ...] = ("train", "eval")
LOOKED_AT = 256
"""problems of each split that the digest covers, spread over it; small splits are covered whole"""
PLACE = "where"
"""in a problem's data: the file and line it came from, which may differ between hosts"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the checks found out and the launcher needs."""

    notes: list[str]
    """for the user; not wrong"""
    train_problems: int
    placement: Placement
    ways: tuple[Way, ...] = ()
    """that weights take to each generator"""
    vocabulary: int = 0
    """tokens the model knows; 0: only transformers can say"""
    task_digest: str = ""
    """of the problems, for generators that join"""
    inputs: Inputs
    """what the run is begun with, or goes on with"""
    demonstrations: tuple[Shown, ...] = ()
    """of pool.file, of a new run"""
    not_adapted: str = ""
    """what adapters leave out of the model, for the user"""
    sources: ProblemSources | None = None
    """of the training problems, where the sampler chooses among them"""
    settings: Settings
    """the checked settings, with the `task.args` and threads that preflight chose; every process gets these"""


def preflight(settings: Settings, *, resumed: bool = False) -> Facts:
    """Check model, tokenizer, devices, task, recipe and their fit. Raises UserError.

    `resumed`: the run keeps the prompts that it began with."""
    config = check_folder(settings.model.path)
    for name in ("generator", "trainer") if settings.generator.count else ("trainer",):  # who joins looks for itself
        check_device(f"{name}.device", getattr(settings, name).device, rehearsed=settings.task.name == Rehearsed.name)
    settings = threads_here(settings)
    placement = place_here(settings)
    if settings.generator.engine == "vllm":
        installed_release()
        check_for_vllm(settings.model.path)
    ways = ways_here(settings, placement)
    chosen = settings.trainer
    choose_backend(chosen.attention, device=chosen.device, half=chosen.dtype == "bfloat16")
    not_adapted = check_lora(settings, config) if settings.lora.rank else ""
    tokenizer = Tokenizer.of(settings.model)
    task = make_task(settings.task.name, settings.task.args)
    weights_of(task, settings.task.reward_weights)
    slots_of(task, settings.generator.task_slots)
    check_task_processes(settings, task)
    context = check_context(settings.model.path, config, settings.generator.max_context)
    check_message_size(context, settings.wire.max_message_mb)
    settings, task, left_out = (settings, task, []) if resumed else fit_prompts(settings, task, tokenizer, context)
    dated = [f"the chat template writes a date: {settings.model.template_time} in all of this run"]
    notes = dated if tokenizer.dated and settings.model.template_time else []
    notes += [not_adapted] if not_adapted else []
    notes += [*task.notes, *left_out]
    if max(chosen.threads, settings.generator.threads) > 1:
        notes.append(describe_threads(settings, read_cores()))
    notes += describe_links(ways) + check_room_here(settings) + check_fit(task, tokenizer, context)
    notes += describe_control_tokens(task, tokenizer) + describe_rebuilding(settings, context)
    notes += check_recipe(settings, task, tokenizer, built_in=config is not None)
    shown, said = ((), []) if resumed else demonstrations_of(settings, task, tokenizer, context)
    notes += said
    held_out = len(task.problems("eval"))
    if settings.evaluation.problems > held_out:
        notes.append(
            f"evaluation.problems is {settings.evaluation.problems}, but task '{task.name}' holds out {held_out}; "
            "all of them are used"
        )
    vocabulary = config.vocabulary if config is not None else 0
    digest = task_digest(task, tokenizer)
    return Facts(
        inputs=inputs_of(task, tokenizer, digest),
        demonstrations=shown,
        notes=notes,
        train_problems=len(task.problems("train")),
        placement=placement,
        ways=ways,
        vocabulary=vocabulary,
        task_digest=digest,
        not_adapted=not_adapted,
        sources=check_sampler(settings, task),
        settings=settings,
    )


def check_task_processes(settings: Settings, task: Task) -> None:
    """Refuse processes of their own for a task that judges whole groups. Raises UserError."""
    if settings.generator.task_processes and has_group_reward(task):
        raise UserError(
            f"generator.task_processes: task '{task.name}' judges whole groups by what their episodes keep, which "
            "stays in one process; leave the setting out"
        )


def check_signal(settings: Settings, task: Task) -> None:
    """Refuse to drop groups of equal rewards where all rewards are equal by design. Raises UserError."""
    if task.credits_turns and settings.buffer.drop_zero_signal:
        raise UserError(
            f"buffer.drop_zero_signal=true would refuse every group: task '{task.name}' gives its rewards to turns, "
            "and those of its episodes are all equal; set it to false"
        )


def check_recipe(settings: Settings, task: Task, tokenizer: Tokenizer, *, built_in: bool) -> list[str]:
    """Check that the recipe has an effect with this task, these teachers and this rollout plan. Returns notes; raises
    UserError. `built_in`: the model is the built-in decoder."""
    recipe = load_recipe(settings.recipe)
    needs = requirements(recipe)
    check_layers(settings, needs, built_in=built_in)
    notes = check_effect(
        recipe,
        group_size=settings.batch.group_size,
        updates_per_batch=settings.updates.epochs * settings.updates.minibatches,
        max_staleness=settings.staleness.max_staleness,
        has_critic=needs.value,
        single_turn=task.single_turn,
        credits_turns=task.credits_turns,
        noted=(noted := _noted_by(task)),
        parts=task.reward_parts,
        pool=settings.pool,
    )
    notes += check_teachers(settings, recipe, tokenizer, noted) + check_rollout(settings, recipe)
    check_windows(settings, recipe, judges_groups=has_group_reward(task))
    check_signal(settings, task)
    return notes + describe_warmups(settings, has_critic=needs.value)


def _noted_by(task: Task) -> Sequence[str] | None:
    """Names that the task says it notes; None: it does not say."""
    return task.noted if "noted" in {*getattr(task, "__dict__", ()), *vars(type(task))} else None


def check_sampler(settings: Settings, task: Task) -> ProblemSources | None:
    """What the sampler needs of the task, and the sources of its problems. Raises UserError for what is missing."""
    chosen = settings.sampler
    if chosen.turns == "adaptive" and task.single_turn:
        raise UserError(
            f"sampler.turns=adaptive does nothing with task '{task.name}', whose episodes are one turn; leave it out"
        )
    if chosen.choose in ("band", "thompson", "curriculum") and chosen.candidates > len(task.problems("train")):
        raise UserError(
            f"sampler.candidates is {chosen.candidates}, but task '{task.name}' has {len(task.problems('train'))} "
            "training problems; lower it"
        )
    if chosen.start == "field":
        check_texts(task, chosen.start_field)
    if chosen.choose != "ucb":
        return None
    if not chosen.source_field:
        raise UserError("sampler.choose=ucb needs sampler.source_field: the field of the data that names the source")
    return read_sources(task, chosen.source_field)


def describe_warmups(settings: Settings, *, has_critic: bool) -> list[str]:
    """A note where a warm-up lasts as long as the run: the policy, or the full learning rate, never gets its turn."""
    steps, notes = settings.trainer.steps, []
    critic, optimizer = settings.critic.warmup_steps if has_critic else 0, settings.optimizer.warmup_steps
    if critic >= steps:
        notes.append(
            f"critic.warmup_steps is {critic} and the run has {steps} steps: they train the critic alone, and the "
            "policy stays as it is; lower it, or raise trainer.steps"
        )
    elif optimizer >= steps:
        notes.append(
            f"optimizer.warmup_steps is {optimizer} and the run has {steps} steps: the learning rate reaches "
            f"{steps / (optimizer + 1):.2f} of optimizer.learning_rate; lower it, or raise trainer.steps"
        )
    return notes


def with_template_time(settings: Settings) -> Settings:
    """`settings` with the date that the chat template writes, when it asks for one: every process of the run, and of a
    resumed one, renders the same prompts."""
    try:
        dated = not settings.model.template_time and asks_for_date(Path(settings.model.path))
    except UserError:  # preflight says it in its place
        return settings
    if not dated:
        return settings
    now = datetime.now().isoformat(timespec="seconds")
    return replace(settings, model=replace(settings.model, template_time=now))


def check_idle(settings: Settings) -> None:
    """Raises UserError for settings that a new run would not use. (A lab's grid may have them: its recipes share
    settings.)"""
    optimizer, usual = settings.optimizer, CriticSettings()
    if optimizer.schedule == "constant" and optimizer.final_share != OptimizerSettings().final_share:
        raise UserError(
            "optimizer.final_share does nothing with optimizer.schedule=constant; set optimizer.final_share=0, or "
            "optimizer.schedule to linear or cosine"
        )
    recipe, updates = load_recipe(settings.recipe), settings.updates
    if updates.kl_stop and updates.epochs * updates.minibatches == 1 and passes(recipe) == 1:
        raise UserError(
            "updates.kl_stop does nothing with one update a batch, which is always taken; set updates.epochs or "
            "updates.minibatches, or leave it out"
        )
    if settings.reference != ReferenceSettings() and not requirements(recipe).reference:
        raise UserError(
            f"reference.* does nothing with recipe={recipe.name}, which has no reference policy; leave it out, or set "
            "recipe.kl.coefficient"
        )
    idle = [one.name for one in fields(usual) if getattr(settings.critic, one.name) != getattr(usual, one.name)]
    if idle and not requirements(recipe).value:
        remedy = " ".join(f"critic.{name}={getattr(usual, name)}" for name in idle)
        raise UserError(
            f"critic.* does nothing with recipe={recipe.name}, which has no critic; leave it out (or set {remedy}), or "
            "choose a recipe with one (ppo, st_ppo)"
        )
    if problem := critic_problem(settings.critic, recipe):
        raise UserError(problem)


def critic_problem(critic: CriticSettings, recipe: Recipe) -> str:
    """What the recipe's critic has no use for, or an empty text."""
    turn_q = recipe.advantage.credit == "turn_q"
    if critic.loss != "squared":
        if turn_q or recipe.trust.rule == "bpo" or is_own_function(recipe.name):
            return f"critic.loss={critic.loss} is for token_gae and turn_gae with one head; set critic.loss=squared"
        if recipe.gae.value_clip:
            return (
                f"recipe.gae.value_clip bounds a squared error, which critic.loss={critic.loss} has not; set "
                "recipe.gae.value_clip=0"
            )
    if critic.target_average and not turn_q and (recipe.gae.critic_trace == 1 and not recipe.gae.bootstrap_truncated):
        return (
            "critic.target_average does nothing with recipe.gae.critic_trace=1, whose targets are returns without any "
            "value in them; lower recipe.gae.critic_trace, e.g. 0.95, or leave it out"
        )
    return ""


def check_lora(settings: Settings, config: DecoderConfig | None) -> str:
    """A note on the weights that adapters leave out; empty where there are none. Raises UserError without peft, and
    for a target that the model does not have."""
    check_lora_package()
    if config is not None:
        check_targets(settings.lora.targets, PROJECTIONS)
        return ""
    shapes = read_headers(Path(settings.model.path))
    check_expert_targets(settings.lora.targets, shapes)
    return frozen_experts(shapes)


def check_layers(settings: Settings, needs: Requirements, *, built_in: bool = True) -> None:
    """Raises UserError for ways to run a layer that rule out exact norms of each trajectory's gradient, and for what
    only the built-in decoder can do. `built_in`: the model is one."""
    chosen = settings.trainer
    if chosen.compile and not built_in:
        raise UserError(
            f"trainer.compile is for the built-in decoder, and {settings.model.path} is a model that transformers "
            "defines; set trainer.compile=false"
        )
    if not needs.per_trajectory_norms:
        return
    if not built_in:
        raise UserError(
            "recipe.opob.norm=exact needs the gradients of every layer, which are known for the built-in decoder only, "
            f"and {settings.model.path} is a model that transformers defines; set recipe.opob.norm to logit or length"
        )
    if chosen.checkpoint_activations != "none":
        raise UserError(
            "trainer.checkpoint_activations=layer would save nothing: recipe.opob.norm=exact "
            "keeps every layer's input until the baseline is known; set recipe.opob.norm to logit or length, or lower "
            "trainer.micro_batch_tokens"
        )
    if chosen.compile:
        raise UserError(
            "trainer.compile has no effect with recipe.opob.norm=exact, which watches every layer from outside; set "
            "trainer.compile=false, or recipe.opob.norm to logit or length"
        )


def check_message_size(context: int, max_message_mb: int) -> None:
    """Raises UserError unless the longest trajectory fits into one message. `context`: tokens, 0: not known."""
    needed = context * TOKEN_BYTES
    if needed > max_message_mb << 20:
        raise UserError(
            f"wire.max_message_mb is {max_message_mb}, but a trajectory of {context} tokens (the context) takes up to "
            f"{-(-needed // 2**20)} MB; raise it, or lower generator.max_context"
        )


def check_device(name: str, device: str, *, rehearsed: bool = False) -> None:
    """Raises UserError unless this machine has the torch device that setting `name` asks for. `rehearsed`: the config
    is played through with `--fake-model` already."""
    if device == "cpu":
        return
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise UserError(f"{name} is '{device}'; it must be cpu, cuda or cuda:N")
    import torch

    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "finds no GPU here"
        play = "" if rehearsed else ", or play the config through on a CPU with `run --fake-model`"
        raise UserError(f"{name} is '{device}', but torch {torch.__version__} {why}; set {name}=cpu{play}")
    found = torch.cuda.device_count()
    if index and int(index) >= found:
        raise UserError(f"{name} is '{device}', but this machine has {found} GPU(s): cuda:0 to cuda:{found - 1}")


def check_fit(task: Task, tokenizer: Tokenizer, context: int) -> list[str]:
    """Check that prompts of both splits, everything the environment may say, and a whole episode fit the tokenizer and
    the context (tokens; 0: not known). Returns notes; raises UserError naming the problem."""
    longest = 0
    for split in SPLITS:
        longest = max(longest, _check_prompts(task, tokenizer, split, context))
    if task.demonstrates:
        try:
            tokenizer.encode(task.alphabet)
        except ValueError as error:
            raise UserError(f"task '{task.name}' does not fit the tokenizer: {error}") from None
        needed = _longest_demonstration(task, tokenizer)
        if context and needed > context:
            raise UserError(
                f"an episode of task '{task.name}' takes up to {needed} tokens, the context holds {context}; {REMEDY}"
            )
    answer = getattr(getattr(task, "settings", None), "max_tokens", 0)
    if context and longest + answer > context:
        return [
            f"task.args.max_tokens is {answer}, but behind the longest prompt seen ({longest} tokens) the context of "
            f"{context} leaves {context - longest}; longer answers are cut"
        ]
    return []


def describe_control_tokens(task: Task, tokenizer: Tokenizer) -> list[str]:
    """A note on the control tokens in the prompts that were looked at, and what becomes of them."""
    found: dict[str, str] = {}
    for split in SPLITS:
        problems = task.problems(split)
        for number in spread(len(problems), min(MOST_PROMPTS, task.looked_at)):
            for token in control_in(problems[number], tokenizer):
                found.setdefault(
                    token, str(problems[number].data.get("where", f"problem {number} of the {split} split"))
                )
    if not found:
        return []
    as_what = "they steer the model" if tokenizer.in_data == "allow" else "they are plain text there"
    named = ", ".join(f"{token!r} ({where})" for token, where in list(found.items())[:3])
    return [f"messages hold control tokens of the model: {named}; {as_what} (model.control_tokens={tokenizer.in_data})"]


def _check_prompts(task: Task, tokenizer: Tokenizer, split: Split, context: int) -> int:
    """Tokens of the longest prompt, of problems spread over the split. Raises UserError for one that the model cannot
    be given."""
    problems = task.problems(split)
    if not len(problems):
        where = "task.args.eval_path or eval_share" if split == "eval" else "task.args.path"
        raise UserError(f"task '{task.name}' has no problem in its {split} split; see {where}")
    longest = 0
    spread_out = spread(len(problems), min(MOST_PROMPTS, task.looked_at))
    for number in dict.fromkeys([*_one_of_each_form(problems), *spread_out]):
        problem = problems[number]
        where = problem.data.get("where", f"problem {number} of the {split} split")
        try:
            tokens = len(problem_tokens(problem, tokenizer))
        except ValueError as error:
            raise UserError(f"task '{task.name}' does not fit the tokenizer: {where}: {error}") from None
        except UserError as error:
            raise UserError(f"task '{task.name}': {where}: {error}") from None
        if context and tokens >= context:
            raise UserError(
                f"task '{task.name}': {where}: the prompt has {tokens} tokens, the context holds {context}; {REMEDY}"
            )
        longest = max(longest, tokens)
    return longest


@runtime_checkable
class HasForms(Protocol):
    """Problems that list the first of each form themselves (`_one_of_each_form`)."""

    @property
    def one_of_each_form(self) -> list[int]: ...


def _one_of_each_form(problems: Sequence[Problem]) -> list[int]:
    """Of problems that are held in memory, the first of each form: which roles and fields its messages have, and what
    else it gives to the chat template. A row that a template cannot show is found, however rare its form."""
    if isinstance(problems, HasForms):
        return problems.one_of_each_form
    if not isinstance(problems, list):
        return []
    first: dict[Any, int] = {}
    for number, problem in enumerate(problems):
        if isinstance(problem.prompt, str):
            continue
        messages = frozenset(
            (str(message.get("role")), isinstance(message.get("content"), str), *sorted(map(str, message)))
            for message in problem.prompt
        )
        first.setdefault((messages, bool(problem.tools), *sorted(map(str, problem.template_args))), number)
    return list(first.values())


def _longest_demonstration(task: Task, tokenizer: Tokenizer) -> int:
    """Tokens of the longest of a few fair episodes, with the end of text."""
    problems = task.problems("train")
    longest = 0
    for number in range(min(MOST_EPISODES, len(problems))):
        shown = task.demonstration(problems[number], Random(number))
        longest = max(longest, len(tokenizer.encode("".join(segment.text for segment in shown))) + 1)
    return longest


# ------------------------------------------------------------------------------------------------ the digest


def task_digest(task: Task, tokenizer: Tokenizer) -> str:
    """A line by which two hosts find out whether they work on the same problems. It is made of the task's name, the
    number of its problems, the tokens that end a turn, and of some problems the prompt's tokens and what the reward is
    given; so it differs where the data, the settings that make problems, or the tokenizer differ."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{task.name} {tokenizer.vocab_size} {sorted(tokenizer.end_ids)}".encode())
    for split in SPLITS:
        problems = task.problems(split)
        digest.update(f" {split} {len(problems)}".encode())
        for index in spread(len(problems), min(LOOKED_AT, task.looked_at)):
            digest.update(_described(problems[index], tokenizer))
    return digest.hexdigest()


def spread(count: int, most: int = LOOKED_AT) -> Sequence[int]:
    """At most `most` indices below `count`, two or more, the first and the last among them."""
    if count <= most:
        return range(count)
    return [i * (count - 1) // (most - 1) for i in range(most)]


def _described(problem: Problem, tokenizer: Tokenizer) -> bytes:
    tokens = problem_tokens(problem, tokenizer)
    data = {name: value for name, value in problem.data.items() if name != PLACE}
    return json.dumps([problem.index, tokens, data], sort_keys=True, default=_kind).encode()


def _kind(value: Any) -> str:
    """A value that JSON cannot hold counts by its type: its text may hold an address."""
    return type(value).__name__
