"""The fake engine as a process of its own, which can be killed like a real one."""

from __future__ import annotations

import argparse

from tests.fake_engine.engine import FakeEngine
from tests.fake_engine.weights import ANSWER_TOKENS


def main() -> None:
    """Serve on 127.0.0.1 until the process ends."""
    parser = argparse.ArgumentParser(prog="python -m tests.fake_engine", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="tiny", help="name of the base")
    parser.add_argument("--root", default="/models/tiny", help="path of the base, as it is listed")
    parser.add_argument("--api-key")
    parser.add_argument("--max-loras", type=int, default=4)
    parser.add_argument("--max-cpu-loras", type=int)
    parser.add_argument("--max-model-len", type=int, default=131_072)
    parser.add_argument("--answer-tokens", type=int, default=ANSWER_TOKENS)
    parser.add_argument("--default-system", help="what its chat template says as the system")
    FakeEngine(**vars(parser.parse_args())).run()


if __name__ == "__main__":
    main()
