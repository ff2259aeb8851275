"""Where the seed document imports `RateLimitConfig` from."""

from forebay.config import RateLimitConfig

__all__ = ["RateLimitConfig"]
