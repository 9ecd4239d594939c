"""An environment server made with the package openenv-core. The test runs it as a program, which prints its port."""

import asyncio
import socket
import sys
from typing import Any

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Said(Action):
    text: str


class Shown(Observation):
    hint: str
    tries: int = 0


class Pair(Action):
    row: int
    column: int


class Guessing(Environment):
    """A secret from 0 to 9 that the seed decides; each step is told lower or higher."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self.secret, self.tries = 0, 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **more: Any) -> Shown:
        self.secret, self.tries = (seed or 0) % 10, 0
        return Shown(hint=f"a number from 0 to {more.get('most', 9)}")

    def step(self, action: Action, timeout_s: float | None = None, **more: Any) -> Shown:
        assert isinstance(action, Said)
        self.tries += 1
        guess = int(action.text)
        if guess == self.secret:
            return Shown(hint="found", tries=self.tries, reward=1.0, done=True)
        return Shown(hint="higher" if guess < self.secret else "lower", tries=self.tries, reward=-0.25)

    @property
    def state(self) -> State:
        return State(step_count=self.tries)


async def main(action: type[Action]) -> None:
    app = create_fastapi_app(Guessing, action, Shown, max_concurrent_envs=2)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    print(listening.getsockname()[1], flush=True)
    await serving


if __name__ == "__main__":
    asyncio.run(main({"said": Said, "pair": Pair}[sys.argv[1]]))
