"""A generator of the launcher's that lies. `python -m support_liar LIE SPEC`; only what it reports is changed."""

from __future__ import annotations

import sys

from async_rl.generator.__main__ import main
from async_rl.instruments.chaos.liar import LIES, lie_from_now_on
from async_rl.process_spec import GeneratorSpec, parse_spec

if __name__ == "__main__":
    lie_from_now_on(next(lie for lie in LIES if lie == sys.argv[1]), 0)
    main(parse_spec(GeneratorSpec, sys.argv[2:]))
