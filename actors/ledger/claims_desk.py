"""The desk of requests that are answered once: claims, and what became of them."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable

from actors.ledger.idempotency import GRACE_S, Claim, Finish, Outcome
from actors.ledger.policy import StoreFailed
from actors.ref import Clock, OwnerRef, OwnerUnavailable

WAIT_S = 2.0
"""How long one message waits for another request's answer."""
ANSWER_WAIT_S = 5.0
FINISH_S = 5.0
"""For how long an end is told the ledger again, where it does not take it."""
BACK_OFF_S = (0.05, 1.0)


class ClaimsDesk:
    """Tells the ledger of requests that have a key. Owns nothing but the names it gives to claims.

    Failure behaviour: with the ledger away, or its store failing, a claim fails with
    OwnerUnavailable, and the call is not to be made. An end that is not taken within FINISH_S is
    given up: the claim lapses, and until then its key is under way.
    """

    def __init__(
        self,
        ref: OwnerRef,
        holder: str,
        clock: Clock = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        nonce: str | None = None,
    ) -> None:
        self._ref = ref
        self._holder = holder
        self._clock = clock
        self._pause = pause
        self._prefix = nonce or secrets.token_hex(8)
        self._minted = 0
        self._claims = 0
        self._failures = 0

    def new(self, tenant: str, key: str, fingerprint: str) -> Claim:
        """A claim that was not made yet; each has a token of its own."""
        self._minted += 1
        token = f"{self._prefix}-{self._minted}"
        whole = f"{len(tenant)} {tenant} {key}".encode("utf-8", "surrogatepass")
        name = hashlib.sha256(whole).hexdigest()
        return Claim(name, fingerprint, token, self._holder, 0.0)

    async def claim(self, claim: Claim, left_s: float) -> Outcome:
        """How a claim stands whose call has `left_s` seconds; waits WAIT_S of them for another's.

        Raises OwnerUnavailable: nobody knows, and it may be held.
        """
        self._claims += 1
        wait_s = min(WAIT_S, max(0.0, left_s))
        asked = Claim(
            claim.name, claim.fingerprint, claim.token, claim.holder, max(0.0, left_s) + GRACE_S
        )
        try:
            told: Outcome = await self._ref.ask(
                "claim", asked, wait_s, timeout_s=wait_s + ANSWER_WAIT_S
            )
        except StoreFailed as error:
            self._failures += 1
            raise OwnerUnavailable(self._ref.name, error.reason) from None
        except OwnerUnavailable:
            self._failures += 1
            raise
        return told

    async def finish(self, claim: Claim, answer: bytes | None) -> bool:
        """Hands in an answer, or gives the key back. False: it is not kept, or nobody knows."""
        finish = Finish(claim.name, claim.token, answer)
        ends_s = self._clock() + FINISH_S
        back_off_s = BACK_OFF_S[0]
        while True:
            try:
                return bool(await self._ref.ask("finish", finish, timeout_s=ANSWER_WAIT_S))
            except (OwnerUnavailable, StoreFailed):
                self._failures += 1
                if self._clock() + back_off_s >= ends_s:
                    return False
            await self._pause(back_off_s)
            back_off_s = min(2 * back_off_s, BACK_OFF_S[1])

    def stats(self) -> dict[str, int]:
        return {"claims": self._claims, "failures": self._failures}
