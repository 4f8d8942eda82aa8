"""`python -m stillhouse.trainer.verify`: a JSON object (an item and `timeout_s`) in, its verdict as JSON out."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict
from typing import Any

from stillhouse.core.parent import die_with_parent
from stillhouse.trainer.verify.judges import Item, Judges, Verdict, VerifierError


async def judge(request: dict[str, Any]) -> Verdict:
    """The verdict on one item."""
    judges = Judges(timeout_s=request["timeout_s"], workers=1)
    try:
        item = Item(request["verifier"], request["text"], request["answer"], request.get("row", {}))
        return (await judges.judge([item]))[0]
    finally:
        await judges.close()


def main() -> None:
    """Read, judge, print."""
    die_with_parent()
    try:
        verdict = asyncio.run(judge(json.load(sys.stdin)))
    except VerifierError as error:
        sys.exit(error.message)
    print(json.dumps(asdict(verdict)))


if __name__ == "__main__":
    main()
