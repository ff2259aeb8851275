"""A provider that does not exist: four wire formats, scripted faults, and a log of what was asked.

    python -m tests.support.simulator --port 0 --log upstream.jsonl --ready-file port.txt

Rules it lives by:
1. What it answers is a function of what it was asked (`truth.py`), so that a test can work out
   the right answer and see that the right caller got it.
2. It misbehaves only when told to: by `POST /control/script`, by the model name (`sim-500`,
   `sim-latency=0.2`), or by words in the prompt (`[[status=429 retry-after=2]]`).
3. What it logs is the oracle: one line when a request has arrived, one when it is over, appended
   and never rewritten. A credential is logged as a hash only.

idea                      file
what is the right answer  truth.py
what goes wrong, when     script.py
four wire formats         dialects/
sockets and time          server.py
the oracle                log.py
"""

from __future__ import annotations

from tests.support.simulator.log import hash_credential
from tests.support.simulator.truth import answer_text, count_tokens, pieces, vector

__all__ = ["answer_text", "count_tokens", "hash_credential", "pieces", "vector"]
