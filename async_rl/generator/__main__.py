"""The generator process; started by the launcher."""

from __future__ import annotations

from async_rl.config import Settings
from async_rl.events import GeneratorReady
from async_rl.process import TOLD_TO_END, Terminated, dump_stacks_on_signal, fail, on_sigterm, run_process
from async_rl.process_spec import GeneratorSpec, read_spec
from async_rl.run_folder import RunFolder
from async_rl.tidying import freeze_set_up
from async_rl.wire.channel import AsyncDealer, ipc_endpoint
from async_rl.wire.heartbeat import Activity, Heartbeat, make_heartbeat
from async_rl.wire.keys import keys_in

LEAVE_S = 0.5
"""longest time for the last messages of a generator that got SIGTERM"""


async def generate(
    spec: GeneratorSpec, folder: RunFolder, settings: Settings, activity: Activity, heartbeat: Heartbeat
) -> None:
    """Build the engine and generate until the buffer says stop. On SIGTERM, finished work is sent first."""
    from async_rl.generator.build import make_engine, make_weights
    from async_rl.generator.loop import GeneratorLoop, make_options
    from async_rl.generator.step_mark import StepMark
    from async_rl.generator.task_pool import in_processes
    from async_rl.model.tokenizer import Tokenizer
    from async_rl.task import make_task
    from async_rl.weights.shared_memory import segment_path

    tokenizer = Tokenizer.of(settings.model)
    engine = make_engine(settings, tokenizer, way=spec.way)
    dump_stacks_on_signal()  # the engine's libraries are loaded
    limit = settings.wire.max_message_mb << 20
    dealer = AsyncDealer(spec.endpoint, spec.name, max_message_bytes=limit, keys=keys_in(settings.wire.keys))
    links = ipc_endpoint(folder.path, "weights")
    weights = make_weights(
        settings, segment_path(folder.path), spec.weights_endpoint, spec.name, here=True, way=spec.way, links=links
    )
    folder.record(GeneratorReady(name=spec.name))
    try:
        task = in_processes(make_task(settings.task.name, settings.task.args), settings)
        mark = StepMark.create(folder.step_mark(spec.name))
        mark.watch_exit()
        freeze_set_up()
        loop = GeneratorLoop(
            make_options(settings, spec.name),
            engine,
            task,
            tokenizer,
            dealer,
            weights,
            activity=activity,
            buffer_silent_s=lambda: heartbeat.buffer_silent_s,
            record=folder.record,
            on_stuck=lambda why: fail(spec, why),
            mark=mark,
        )
        on_sigterm(lambda: loop.leave("told to end"), folder.path)
        await loop.run()
        if loop.leaving:
            dealer.close(linger_s=LEAVE_S)
            raise Terminated(TOLD_TO_END)
    finally:
        weights.close()
        dealer.close(linger_s=0)  # the buffer said stop and is gone


def main(spec: GeneratorSpec) -> None:
    """Generate until the run ends; ends this process."""
    from async_rl.generator.task_code import run_to_end

    folder = RunFolder(spec.path)

    def work() -> None:
        settings, activity = folder.settings(), Activity()
        with make_heartbeat(
            spec.name, "generator", activity, settings.wire, spec.endpoint, pipe=spec.pipes.pulse
        ) as heartbeat:
            run_to_end(generate(spec, folder, settings, activity, heartbeat))

    run_process(spec, work)


if __name__ == "__main__":
    main(read_spec(GeneratorSpec))
