"""HTTP: from bytes to the service and back."""

from deployments.http.app import build_asgi
from deployments.http.auth import KeyEntry, Keys, TenantIdentity
from deployments.http.service import HttpCall, Reply, Service, StreamReply

__all__ = [
    "HttpCall",
    "KeyEntry",
    "Keys",
    "Reply",
    "Service",
    "StreamReply",
    "TenantIdentity",
    "build_asgi",
]
