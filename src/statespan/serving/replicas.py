"""Several engines behind one server: a Ray Serve deployment, with sessions that come back to their replica.

The HTTP server stays one process: keys, limits, logs and TLS are the same with one engine or many. A reply depends on
its prompt, options and seed alone, so when a replica dies another one repeats its replies, and what clients have
already got is left out.
"""

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.generation.batch import TokenLogprob
from statespan.inspection.tokens import TokenView
from statespan.serving.backend import Events, Grammar, LocalBackend, ModelSource
from statespan.serving.metrics import EngineMetrics
from statespan.serving.options import EngineOptions
from statespan.serving.replica_events import Refused, ReplicaEvents
from statespan.serving.request import Event, Request, RequestRefused

APP, DEPLOYMENT = "statespan", "replica"
WATCH_S = 1.0  # between two looks at how many replicas run
OBJECT_STORE_BYTES = 100 << 20  # replies are small; Ray would take a third of the memory
RAY_ENVIRONMENT = {  # read when ray is imported
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: Ray listens at 127.0.0.1 alone
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
}

logger = logging.getLogger("statespan.serving")


class Replica:
    """What runs in each of Ray's processes: one engine."""

    def __init__(self, source: ModelSource, options: EngineOptions, num_threads: int) -> None:
        from ray import serve

        _keep_to_loopback()
        torch.set_num_threads(num_threads)
        self._backend = LocalBackend(source.load(), options, source.load_draft())
        self._backend.engine.engine.warm_up()
        self._backend.engine.start()
        self._id = serve.get_replica_context().replica_id.unique_id

    async def stream(self, request: Request, grammar: Grammar | None) -> AsyncGenerator[Refused | list[Event], None]:
        """First an empty list, once the request is accepted, or why it is refused; then events, as they come."""
        try:
            events = await self._backend.stream(request, grammar=grammar)
        except UserError as error:
            yield Refused.of(error)
            return
        try:
            yield []
            async for event in events:
                yield [event]
        finally:
            await events.aclose()

    async def embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """As a backend's."""
        return await self._backend.embed(prompts)

    async def score(self, prompt: Sequence[int], num_top: int) -> list[TokenLogprob | None]:
        """As a backend's."""
        return await self._backend.score(prompt, num_top)

    async def token_view(self, ids: Sequence[int], layer: int) -> TokenView:
        """As a backend's."""
        return await self._backend.token_view(ids, layer)

    async def metrics(self) -> tuple[str, EngineMetrics]:
        """The replica's name and its engine's metrics."""
        return self._id, (await self._backend.metrics())["0"]

    async def check_health(self) -> None:
        """Ray replaces a replica where this raises."""
        if not self._backend.ready:
            raise RuntimeError("the engine stopped")

    async def __del__(self) -> None:  # Ray calls it, and waits, when a replica is to go
        await self._backend.close()


class ReplicaBackend:
    """A Backend over replicas. Ray listens at 127.0.0.1 only, and all its processes end with `close`.

    Args:
        source: the model that each replica loads.
        options: of each engine.
        num_replicas: how many; each takes a GPU where the source's device is one.
    """

    def __init__(self, source: ModelSource, options: EngineOptions, num_replicas: int) -> None:
        self.source, self.options, self.num_replicas = source, options, num_replicas
        self.num_running = 0
        self._handle: Any = None
        self._streams: set[ReplicaEvents] = set()
        self.closing = False
        self._watcher: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        return self.num_running > 0 and not self.closing

    async def start(self) -> None:
        self._handle = await asyncio.to_thread(self._start)
        self.num_running = self.num_replicas
        self._watcher = asyncio.create_task(self._watch())

    def _start(self) -> Any:
        """Ray, Serve and the replicas, all loaded; the deployment's handle."""
        os.environ |= RAY_ENVIRONMENT
        import ray
        from ray import serve
        from ray.serve.config import RequestRouterConfig
        from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
        from ray.serve.schema import LoggingConfig

        logging.getLogger("ray").setLevel(logging.ERROR)  # its processes' ends, too, are news to it
        cpus = os.cpu_count() or 1
        ray.init(
            address="local",
            num_cpus=max(cpus, self.num_replicas),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address="127.0.0.1",
        )
        quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
        serve.start(proxy_location="Disabled", logging_config=quiet)  # HTTP is ours
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        deployment: Any = serve.deployment(
            Replica,
            name=DEPLOYMENT,
            num_replicas=self.num_replicas,
            max_ongoing_requests=self.options.max_rows + self.options.max_waiting,  # the engine's queue decides
            ray_actor_options={"num_cpus": 1, "num_gpus": 0 if self.source.device in ("cpu", "mps") else 1},
            health_check_period_s=2,
            logging_config=quiet,
            graceful_shutdown_timeout_s=10,
            request_router_config=RequestRouterConfig(request_router_class=cast(Any, ConsistentHashRouter)),
        )
        application = deployment.bind(self.source, self.options, max(1, cpus // self.num_replicas))
        return serve.run(application, name=APP, route_prefix=None)

    async def stream(self, request: Request, *, grammar: Grammar | None = None, session: str | None = None) -> Events:
        if not self.ready:
            raise RequestRefused("no replica is running")
        if request.options.seed is None:  # so that another replica can repeat the reply
            request = replace(request, options=replace(request.options, seed=secrets.randbits(62)))
        events = ReplicaEvents(self, request, grammar, session or request.id)
        await events.open()
        self._streams.add(events)
        return events

    def submit(self, request: Request, grammar: Grammar | None, session: str) -> Any:
        """Ray's generator of what the session's replica gives."""
        return self._handle.options(stream=True, session_id=session).stream.remote(request, grammar)

    def forget(self, events: "ReplicaEvents") -> None:
        """These events are read, or closed."""
        self._streams.discard(events)

    async def embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        return await self._handle.embed.remote(prompts)

    async def score(self, prompt: Sequence[int], num_top: int) -> list[TokenLogprob | None]:
        return await self._handle.score.remote(prompt, num_top)

    async def token_view(self, ids: Sequence[int], layer: int) -> TokenView:
        return await self._handle.token_view.remote(ids, layer)

    async def metrics(self) -> Mapping[str, EngineMetrics]:
        answers = await self._handle.broadcast("metrics").results_async(timeout_s=5, return_exceptions=True)
        return dict(sorted(answer for answer in answers if isinstance(answer, tuple)))

    async def close(self, *, drain_s: float = 0) -> None:
        self.closing = True
        if self._watcher is not None:
            self._watcher.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while self._streams:
                    await asyncio.sleep(0.05)
        for events in list(self._streams):
            events.end()
        if self._handle is not None:
            self._handle = None
            await asyncio.to_thread(_shutdown)

    async def _watch(self) -> None:
        """Keeps `num_running`, and says when it changes."""
        from ray import serve

        while True:
            await asyncio.sleep(WATCH_S)
            with contextlib.suppress(Exception):  # the controller may be busy or restarting itself
                status = await asyncio.to_thread(serve.status)
                states: Mapping[Any, int] = status.applications[APP].deployments[DEPLOYMENT].replica_states
                count = sum(number for state, number in states.items() if str(state).endswith("RUNNING"))
                if count != self.num_running:
                    logger.warning("replicas", extra={"fields": {"running": count, "of": self.num_replicas}})
                self.num_running = count


def _keep_to_loopback() -> None:
    """Make Serve's port in this process, for calls between deployments, one of 127.0.0.1.

    It would listen at every address and unpickle what comes, and there is no setting for it.
    """
    from ray.serve._private import replica as replica_module

    replica: Any = replica_module
    add_port = replica.add_port_to_grpc_server

    def add_local_port(server: Any, address: str) -> int:
        return add_port(server, address.replace("[::]", "127.0.0.1"))

    replica.add_port_to_grpc_server = add_local_port


def _shutdown() -> None:
    import ray
    from ray import serve

    with contextlib.suppress(Exception):  # the processes end with Ray in any case
        serve.delete(APP)  # the engines close
    ray.shutdown()
