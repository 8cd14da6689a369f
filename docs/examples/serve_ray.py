"""Serves many tasks on one base with Ray Serve: requests for different tasks share a batch.

    pip install "diffscaler[serve,diffusers]"
    python docs/examples/serve_ray.py                # the pocket base and its tasks, on the CPU
    curl -s localhost:8000/v1/pictures --json '{"prompt": "cat", "task": "ink"}' -o cat.png

    python docs/examples/serve_ray.py --base stabilityai/stable-diffusion-3.5-medium --tasks mine \
        --device cuda --dtype bfloat16 --max-replicas 8 --affinity

HTTP: POST /v1/pictures (JSON in, PNG out), GET /v1/tasks, GET /-/healthz. `--address auto` joins a
running Ray cluster instead of starting one here. How it scales: docs/scale.md.

Two deployments: `Api` reads JSON and needs no torch; `Painters` has one base per replica. A replica
gathers its requests into batches itself (serving/batching.py), each with one forward per step.
`serve.multiplexed` would undo that: Serve splits a batch by model id, so that no two tasks could
meet in one, and it counts models where TaskBank counts bytes. What it offers besides, sending a
task where it is loaded, is `--affinity`: consistent hashing of the task's name.
"""

# No `from __future__ import annotations` here: FastAPI needs the real ones after Ray's pickling.
import argparse
import asyncio
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray is imported: nothing is sent

import ray
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.metrics import Counter, Histogram
from serving.batching import Batcher
from serving.requests import Facts, PictureRequest, RequestError, tasks_of

POCKET = Path(__file__).resolve().parents[2] / "assets" / "pocket"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
#: Bytes of Ray's object store here: pictures pass through it one at a time.
OBJECT_STORE = 100 * 2**20


class Body(BaseModel):
    """The JSON of POST /v1/pictures. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Annotated[str, Field(max_length=2000)]
    task: Annotated[
        str | dict[str, float] | None, Field(description='"ink", {"ink": 0.7, "neon": 0.3} or null')
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Annotated[int, Field(ge=1, le=100)] = 20
    guidance: Annotated[float, Field(ge=0, le=30)] = 3.5
    width: Annotated[int | None, Field(ge=16, le=4096, multiple_of=16)] = None
    height: Annotated[int | None, Field(ge=16, le=4096, multiple_of=16)] = None


@serve.deployment
class Painters:
    """One replica: one base on one device, and the batches it draws."""

    def __init__(
        self,
        most: int,
        patience: float,
        one_task_per_batch: bool,
        most_pixels: int | None,
        **painter: Any,
    ) -> None:
        from serving.painter import Painter  # torch and diffusers: only where the pictures are made

        self._painter = Painter(**painter)
        self._most_pixels = most_pixels or self._painter.side**2
        key = PictureRequest.task_key if one_task_per_batch else PictureRequest.batch_key
        self._batcher: Batcher[PictureRequest, Any] = Batcher(self._paint, key.fget, most, patience)
        self._replica = serve.get_replica_context().replica_tag
        sizes = [1, 2, 4, 8, 16, 32, 64]
        self._rows = Histogram("diffscaler_batch_rows", "pictures in a batch", boundaries=sizes)
        self._tasks = Histogram("diffscaler_batch_tasks", "tasks in a batch", boundaries=sizes)
        times = [0.1, 0.3, 1, 3, 10, 30]
        self._seconds = Histogram("diffscaler_batch_seconds", "a batch's time", boundaries=times)
        self._hits = Counter("diffscaler_task_hits", "tasks that a batch found loaded")
        self._misses = Counter("diffscaler_task_misses", "tasks that a batch had to load")

    def check_health(self) -> None:
        """Ray Serve asks now and then, and replaces a replica that raises."""
        self._painter.check_health()

    def names(self) -> list[str]:
        """Returns the tasks there are now."""
        return self._painter.tasks.names()

    async def draw(self, body: dict[str, Any]) -> tuple[int, bytes | str, Facts | None]:
        """Returns (status, PNG or message, facts). Errors are values: they cross processes."""
        try:
            request = self._request(body)
            # files are read here, so that no batch waits for a disk
            await asyncio.to_thread(self._painter.tasks.prefetch, list(request.tasks))
            picture, waited = await self._batcher.submit(request)
        except RequestError as error:
            return error.status, str(error), None
        except Exception as error:
            return 500, f"the picture could not be made: {error}", None
        facts = replace(picture.facts, waited=waited, replica=self._replica)
        return 200, await asyncio.to_thread(picture.png), facts

    def _request(self, body: dict[str, Any]) -> PictureRequest:
        """Returns the request.

        Raises:
            RequestError: Names that cannot be, or too large a picture.
        """
        tasks = tasks_of(body.pop("task"))
        side = self._painter.side
        body["width"], body["height"] = body["width"] or side, body["height"] or side
        if body["width"] * body["height"] > self._most_pixels:
            raise RequestError(
                422,
                f"{body['width']} x {body['height']} pixels are more than the "
                f"{self._most_pixels:,} this server draws",
            )
        return PictureRequest(tasks=tasks, **body)

    def _paint(self, requests: list[PictureRequest]) -> Sequence[Any]:
        answers = self._painter.paint(requests)
        facts = next((a.facts for a in answers if not isinstance(a, Exception)), None)
        if facts is not None:
            self._rows.observe(facts.rows)
            self._tasks.observe(facts.tasks)
            _add(self._misses, facts.misses)
            _add(self._hits, facts.tasks - facts.misses)
            self._seconds.observe(facts.seconds)
        return answers


def _add(counter: Counter, count: int) -> None:
    if count > 0:  # Ray's counters refuse 0
        counter.inc(count)


web = FastAPI(title="DiffScaler", docs_url=None, redoc_url=None)


@web.exception_handler(RequestValidationError)
async def _refuse(_: Request, error: RequestValidationError) -> Response:
    """Says in one line what is wrong, as all other errors are said."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return JSONResponse({"error": f"{where or 'body'}: {first['msg']}"}, 422)


@serve.deployment
@serve.ingress(web)
class Api:
    """HTTP in front of the painters."""

    def __init__(self, painters: Any, affinity: bool) -> None:
        self._painters = painters
        self._affinity = affinity

    @web.post("/v1/pictures")
    async def pictures(self, body: Body) -> Response:
        """Draws one picture: PNG, or {"error": …} with a status that says whose fault it is."""
        handle = self._painters
        if self._affinity:
            first = body.task if isinstance(body.task, str) else next(iter(body.task or {}), "")
            handle = handle.options(session_id=first)
        try:
            status, result, facts = await handle.draw.remote(body.model_dump())
        except BackPressureError:
            return JSONResponse(
                {"error": "all replicas are busy and the queue is full"}, 503, {"Retry-After": "1"}
            )
        if facts is None:
            return JSONResponse({"error": result}, status)
        return Response(result, status, facts.headers(), "image/png")

    @web.get("/v1/tasks")
    async def tasks(self) -> dict[str, list[str]]:
        """Lists the tasks."""
        return {"tasks": await self._painters.names.remote()}


def application(args: argparse.Namespace) -> serve.Application:
    """Returns what `serve.run` runs.

    A replica may hold several batches' worth of requests, so that the next batch is full when the
    one before it ends; more wait in front of the replicas, and beyond `most_waiting` get a 503.
    """
    scaling = AutoscalingConfig(
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas,
        target_ongoing_requests=1.5 * args.rows,
        upscale_delay_s=10,
        downscale_delay_s=120,
    )
    routing = RequestRouterConfig()
    if args.affinity:  # all may stand in: a popular task needs more replicas than a few
        routing = RequestRouterConfig(
            request_router_class=ROUTER,
            request_router_kwargs={"num_fallback_replicas": args.max_replicas},
        )
    painters = Painters.options(
        autoscaling_config=scaling,
        # with affinity this is when a task's home is full and its neighbours take over
        max_ongoing_requests=(2 if args.affinity else 4) * args.rows,
        max_queued_requests=args.most_waiting,
        request_router_config=routing,
        health_check_period_s=10,
        graceful_shutdown_timeout_s=60,
        ray_actor_options={
            "num_cpus": args.cpus,
            "num_gpus": float(args.device.startswith("cuda")),
        },
    )
    api = Api.options(
        num_replicas=args.api_replicas,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
    )
    base = Path(args.base)
    return api.bind(
        painters.bind(
            args.rows,
            args.patience,
            args.one_task_per_batch,
            args.most_pixels,
            base=str(base.resolve()) if base.exists() else args.base,
            tasks=str(args.tasks.resolve()),
            device=args.device,
            dtype=args.dtype,
            device_bytes=int(args.device_mb * 2**20),
            host_bytes=int(args.host_mb * 2**20),
        ),
        args.affinity,
    )


def build(options: dict[str, str]) -> serve.Application:
    """For `serve run serve_ray:build device=cuda affinity=true` and Ray's config files."""
    flags = [f"--{n}" if v == "true" else f"--{n}={v}" for n, v in options.items()]
    return application(arguments(flags))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--base", default=str(POCKET), help="assets/pocket, or any diffusers pipeline")
    add("--tasks", type=Path, default=POCKET / "diffscaler", help="folder of task files")
    add("--device", default="cpu")
    add("--dtype", default="float32")
    add("--device-mb", type=float, default=512, help="MiB of tasks on a replica's device")
    add("--host-mb", type=float, default=4096, help="MiB of tasks in a replica's memory beside")
    add("--rows", type=int, default=8, help="the most pictures in a batch")
    add("--patience", type=float, default=0.02, help="seconds a free model waits for a full batch")
    add("--one-task-per-batch", action="store_true", help="never mix tasks, to compare")
    add("--most-pixels", type=int, help="of a picture; default: the base's own size")
    add("--most-waiting", type=int, default=200, help="requests waiting for a replica, then 503")
    add("--min-replicas", type=int, default=1)
    add("--max-replicas", type=int, default=1)
    add("--api-replicas", type=int, default=1, help="processes that read requests")
    add("--cpus", type=float, default=1, help="CPU cores of a replica")
    add("--affinity", action="store_true", help="send a task where it is loaded already")
    add("--address", help="of a running Ray cluster; default: start one here")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000)
    add("--metrics-port", type=int, help="where Prometheus finds the metrics; default: any free")
    return parser.parse_args(given)


def main() -> None:
    """Serves until SIGINT or SIGTERM; requests in the works are then finished."""
    args = arguments()
    own = {
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE,
        "_metrics_export_port": args.metrics_port,
    }
    ray.init(args.address, log_to_driver=False, **({} if args.address else own))
    serve.start(http_options=HTTPOptions(host=args.host, port=args.port))
    serve.run(application(args), name="diffscaler")
    print(f"serving on http://{args.host}:{args.port}", flush=True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    serve.delete("diffscaler")  # waits for the replicas, which finish what they have
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
