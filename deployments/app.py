"""The Serve application, for `serve run deployments.app:build`, `serve deploy` and `forebay up`.

One deployment is on the request path; the embedded models, where the configuration has them, are
deployments of their own beside it.

Annotations are evaluated here: Serve reads `build`'s to know what its arguments are.
"""

import os
import uuid
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from deployments.fleet import CPU_SHARE, Fleet, fleet_of
from deployments.gateway import Gateway
from deployments.local_models import LocalChat, LocalEmbed
from forebay import config as configuration
from forebay.config import SystemConfig
from forebay.providers.served import APP, CHAT_DEPLOYMENT, EMBED_DEPLOYMENT, GATEWAY_DEPLOYMENT
from forebay.routing import ModelTable
from forebay.secrets import Vault
from forebay.system import NAMESPACE

ONGOING_MAX = 1000
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")
"""Serve makes its line for the access log of each request before it is thrown away, unless nobody
listens to its level."""
DRAIN_S = 330.0  # longer than the longest stream


class Args(BaseModel):
    """What `serve run` and a Serve file may pass: `config=forebay.yaml namespace=forebay`."""

    model_config = ConfigDict(extra="forbid")

    config: str | None = None
    namespace: str = NAMESPACE


def build(args: Args) -> Application:
    """The application for a configuration file, or for the embedded default.

    Raises:
        ConfigurationError: with file, line and field.
    """
    path = None if args.config is None else Path(args.config)
    return application(configuration.load(path, os.environ), args.namespace)


def application(config: SystemConfig, namespace: str, fleet: Fleet | None = None) -> Application:
    """The application for a configuration that is loaded already; `fleet` is `fleet_of` it."""
    vault = Vault(Path(config.data_dir))
    occasion = f"deployed {uuid.uuid4().hex}"
    document = config.document(vault)
    gateway = _gateway(fleet or fleet_of(config))
    bound: Application = gateway.bind(document, occasion, namespace, *_models(config))
    return bound


def _gateway(fleet: Fleet) -> Any:
    replicas = fleet.replicas
    options: dict[str, Any] = {"num_replicas": replicas.min}
    if replicas.max > replicas.min:
        options = {
            "autoscaling_config": {
                "min_replicas": replicas.min,
                "max_replicas": replicas.max,
                "target_ongoing_requests": ONGOING_MAX // 2,
            }
        }
    return serve.deployment(
        name=GATEWAY_DEPLOYMENT,
        max_ongoing_requests=ONGOING_MAX,
        max_constructor_retry_count=3,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": fleet.cpus},
        logging_config=QUIET,
        **options,
    )(serve.ingress(None)(Gateway))


def _models(config: SystemConfig) -> list[Application]:
    """The embedded models that the configuration names."""
    table = ModelTable.build(config.gateway)
    kinds: dict[str, tuple[type, str]] = {
        "smollm2-135m": (LocalChat, CHAT_DEPLOYMENT),
        "wordllama-256": (LocalEmbed, EMBED_DEPLOYMENT),
    }
    wanted = {
        deployment.model.removeprefix("local/")
        for name in table.names()
        for deployment in table.group(name).deployments
        if deployment.provider == "local"
    }
    return [
        serve.deployment(
            name=name,
            max_ongoing_requests=ONGOING_MAX,
            ray_actor_options={"num_cpus": CPU_SHARE},
            logging_config=QUIET,
        )(kind).bind(model)
        for model, (kind, name) in kinds.items()
        if model in wanted
    ]


__all__ = ["APP", "Args", "application", "build", "fleet_of"]
