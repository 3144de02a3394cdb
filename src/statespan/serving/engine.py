"""Engine: the loop that serves many requests with one model (docs/serving.md)."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from statespan.errors import UserError, first_line
from statespan.generation.speculative import MOST_PENDING
from statespan.models.language_model import LanguageModel, Tokenizer
from statespan.serving.admission import Admission
from statespan.serving.decode import Decode, Failed, PlainDecode
from statespan.serving.drafters import drafter_of
from statespan.serving.inbox import Inbox
from statespan.serving.job import Job, Sample
from statespan.serving.metrics import EngineMetrics
from statespan.serving.options import EngineOptions, num_pages
from statespan.serving.prefix_cache import PrefixCache
from statespan.serving.prompts import Prompts
from statespan.serving.request import Event, FinishReason, Request
from statespan.serving.rows import Rows
from statespan.serving.runner import Runner
from statespan.serving.scheduler import CANDIDATES, MOST_HELD_UP, MOST_PASSED, Queue, plan_prefill
from statespan.serving.speculative import SpeculativeDecode
from statespan.serving.spill import SpillStore, model_identity
from statespan.serving.state_pool import StatePool

_log = logging.getLogger(__name__)


class Engine:
    """Requests go in by `submit`, events come out of `step`, which one thread calls as long as it is not `idle`.

    A request gives the tokens that `generate` gives with the same seed, whatever runs beside it.

    Args:
        model: set to evaluation; nothing else may use it while the engine steps.
        options: limits.
        tokenizer: instead of `model.tokenizer`; without one events carry no text.
        draft: a smaller model that drafts `options.num_drafts` tokens a step: of the same vocabulary, or a subword
            model for a byte model. None: drafts come from the text itself.

    Raises:
        UserError: options that cannot be, a folder to spill to that cannot be used, or a draft model that does not fit.

    Example:
        >>> import statespan
        >>> from statespan.serving.request import GenerationOptions, Request
        >>> engine = Engine(statespan.build("jamba-tiny", seed=0), EngineOptions(num_pages=16))
        >>> engine.submit(Request((1, 2, 3), GenerationOptions(max_new_tokens=4, temperature=0)))
        >>> ids = []
        >>> while not engine.idle:
        ...     ids += [token for event in engine.step() for token in event.token_ids]
        >>> len(ids)
        4
    """

    def __init__(
        self,
        model: LanguageModel,
        options: EngineOptions = EngineOptions(),
        tokenizer: Tokenizer | None = None,
        draft: LanguageModel | None = None,
    ) -> None:
        self.model, self.options = model.eval(), options
        self.tokenizer = tokenizer or model.tokenizer
        self.pool = StatePool(model, options.max_rows + 1, num_pages(model, options, draft), options.page_size)
        self.runner = Runner(model, self.pool)
        self.rows = Rows(self.pool, max(options.prefill_tokens, MOST_PENDING + 1 + options.num_drafts))
        self.cache = self._new_cache()
        if self.cache is not None and self.pool.slides:
            self.pool.pages.reclaim = self.cache.free_pages  # rows find what they were promised
        self._admission = Admission(model, options, self.rows, self.cache, has_text=self.tokenizer is not None)
        self.use(self._new_decode(draft))
        self._prompts = Prompts(self.runner, self.rows, self.cache, self._admission, options)
        self._inbox = Inbox(options.max_waiting)
        self._queue: Queue[Job] = Queue()
        self._dated: set[Job] = set()  # those with a deadline that have not ended
        self._counts: Counter[str] = Counter()  # of EngineMetrics
        self._finished: Counter[str] = Counter()  # samples by reason

    def _new_cache(self) -> PrefixCache | None:
        options = self.options
        if options.cache_bytes == 0:
            return None
        spill = None
        if options.spill_bytes or options.spill_dir is not None:
            identity = model_identity(self.model, options.page_size)
            spill = SpillStore(identity, options.spill_bytes, options.spill_dir, options.spill_dir_bytes)
        return PrefixCache(self.pool, options.cache_bytes, spill)

    def _new_decode(self, draft: LanguageModel | None) -> Decode:
        device, plain_only = self.model.device, self.options.num_drafts == 0
        plain = PlainDecode(self.runner, self.model.config.vocab_size, device, ahead=device.type == "cuda")
        if plain_only and draft is not None:
            raise UserError("a draft model needs EngineOptions.num_drafts of at least 1")
        if plain_only:
            return plain
        drafter = None if draft is None else drafter_of(draft, self.model, self.options, self.pool.pages.num_pages)
        return SpeculativeDecode(plain, self.runner, num_drafts=self.options.num_drafts, drafter=drafter)

    def use(self, decode: Decode) -> None:
        """Decode by another step from now on. Nothing may be running."""
        self.decode, self._admission.extra_tokens = decode, decode.extra_tokens

    def warm_up(self) -> None:
        """On a GPU, compile kernels and capture graphs now, before somebody waits for them. Nothing may be running."""
        if self.model.device.type != "cuda":
            return
        self._prompts.warm_up()
        self.runner.warm_up()
        if isinstance(self.decode, SpeculativeDecode):
            self.decode.warm_up()

    def submit(self, request: Request) -> None:
        """Put a request in the queue. Any thread may call this.

        Raises:
            RequestRefused: it can never be served, the message says why; or its id is in use.
            QueueFull: as many wait as may.
        """
        self._admission.check(request)
        self._inbox.submit(request, len(self._queue))

    def cancel(self, request_id: str) -> None:
        """End a request at the next step, with finish_reason "cancelled". Any thread may call this."""
        self._inbox.cancel(request_id)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._inbox or self._queue or self.rows.prefilling or self.rows.active)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One step: who is done leaves, who fits is admitted, some prompt tokens, one decode step; [] when idle."""
        if self.idle:
            return []
        self._counts["steps"] += 1
        return [*self._leave(), *self._admit(), *self._prefill(), *self._decode()]

    @torch.inference_mode()
    def embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The final norm's output [n h] float32 on the CPU at the last token of each prompt; between two steps.

        Raises:
            RequestRefused: a prompt is empty, too long, or not of the vocabulary.
            QueueFull: running requests leave no memory for it.
        """
        return torch.stack([self._prompts.embed(tuple(prompt)) for prompt in prompts])

    def metrics(self) -> EngineMetrics:
        """Counters and gauges of now. Any thread may call this."""
        cache, pages = self.cache, self.pool.pages
        gauges = {
            "waiting": len(self._inbox) + len(self._queue),
            "prefilling": len(self.rows.prefilling),
            "decoding": len(self.rows.active),
            "rows": self.rows.num_rows,
            "pages_free": pages.num_free,
            "pages": pages.num_pages - 1,
        }
        counts = dict(self._counts) | {"requests": self._inbox.num_requests}  # copied at once: another thread counts on
        if isinstance(self.decode, SpeculativeDecode):
            counts["drafted_tokens"] = self.decode.report.drafted
            counts["accepted_tokens"] = self.decode.report.accepted
        if cache is not None:
            counts |= cache.counts
            gauges |= {"cache_snapshots": len(cache), "cache_bytes": cache.num_bytes}
            if cache.spill is not None:
                counts |= cache.spill.counts
                gauges |= {"spill_bytes": cache.spill.memory_bytes, "spill_dir_bytes": cache.spill.disk_bytes}
        return EngineMetrics(finished=dict(self._finished), **counts, **gauges)

    def close(self) -> None:
        """Drop all requests, and snapshots unless there is a folder to keep them in. Nothing else works afterwards."""
        if not self._inbox.close():
            return
        _log.info(self.metrics().cache_summary)
        for job in self._running():
            self.rows.drop(job)
        self._queue.clear()
        if self.cache is not None:
            self.cache.close()

    def check(self) -> None:
        """Raise AssertionError where rows, pages or the prefix cache disagree about who holds what."""
        pool, pages = self.pool, self.pool.pages
        self.rows.check()
        held = Counter(page for row in range(pool.num_rows) for page in pool.pages_of(row))
        if self.cache is not None:
            self.cache.check()
            for node in self.cache.nodes():
                held.update(() if node.snapshot is None else node.snapshot.pages)
        for page in range(1, pages.num_pages):
            assert pages.holders(page) == held[page], f"page {page} has {pages.holders(page)} holders, not {held[page]}"
        assert pages.num_free == pages.num_pages - 1 - len(held)
        reclaimable = 0 if self.cache is None else self.cache.reclaimable()
        assert pages.num_free + reclaimable >= self.rows.pages_promised, "pages were promised that are not there"
        self._inbox.check([*self._queue, *self._running()])

    def _running(self) -> list[Job]:
        """Jobs that have rows."""
        return [*self.rows.prefilling, *dict.fromkeys(sample.job for sample in self.rows.active)]

    def _leave(self) -> list[Event]:
        """Take what came from other threads; end what was cancelled or is late."""
        arrived, cancelled = self._inbox.take()
        for job in arrived:
            self._queue.add(job)
            if job.request.deadline_s is not None:
                self._dated.add(job)
        events: list[Event] = []
        if not cancelled and not any(job.expired for job in self._dated):
            return events
        for job in [*self._queue, *self._running()]:
            if job.request.id in cancelled:
                events += self._end(job, "cancelled")
            elif job.expired:
                events += self._end(job, "deadline")
        return events

    def _admit(self) -> list[Event]:
        """Give rows and pages to the next jobs of the queue; one that finds too little lets a few others pass."""
        events: list[Event] = []
        held_up: list[Job] = []
        for job in self._queue[:CANDIDATES]:
            overdue = any(other.times_passed >= MOST_PASSED for other in held_up)
            if overdue or not self.rows.num_free or len(held_up) == MOST_HELD_UP:
                break
            try:
                if self._admission.awaits(job):
                    continue
                started = job.request.num_samples <= self.rows.num_free and self._admission.start(job)
            except Exception as error:
                events += self._fail([job], error)
                continue
            if not started:
                held_up.append(job)
                continue
            self._queue.remove(job)
            for other in held_up:
                other.times_passed += 1
        return events

    def _prefill(self) -> list[Event]:
        """Absorb some tokens of prompts; those that are done become samples."""
        events: list[Event] = []
        left, share = self.options.prefill_tokens, self.options.longest_waiting_share
        while plan := plan_prefill(self.rows.prefilling, left, share):
            try:
                count = sum(count for _, count in plan)
                left -= count
                self._prompts.absorb(plan)
                self._counts["prefill_tokens"] += count
            except Exception as error:
                events += self._fail([job for job, _ in plan], error)
        for job in sorted(self.rows.prefilling, key=lambda job: job.order):
            if job.num_to_prefill == 0:
                events += self._activate(job)
        return events

    def _activate(self, job: Job) -> list[Event]:
        """The prompt is absorbed but for its last token, which the next decode step feeds."""
        if job.request.options.max_new_tokens == 0:
            return self._end(job, "length")
        try:
            samples = [Sample(job, index, self.tokenizer, self.model) for index in range(job.request.num_samples)]
            self.rows.activate(job, samples, self._admission.row_tokens(job.request))
        except Exception as error:
            return self._fail([job], error)
        return []

    def _decode(self) -> list[Event]:
        """The next tokens of all active rows."""
        samples = list(self.rows.active)
        if not samples:
            return []
        try:
            outcomes = self.decode(samples)
        except Exception as error:
            return self._fail(dict.fromkeys(sample.job for sample in samples), error)
        events: list[Event] = []
        for sample, outcome in zip(samples, outcomes, strict=True):
            if outcome == []:
                continue
            try:
                event = sample.end("error", outcome.error) if isinstance(outcome, Failed) else sample.extend(outcome)
            except Exception as error:  # of a tokenizer or a constraint
                event = sample.end("error", _told(error))
            self._counts["generated_tokens"] += len(event.token_ids)
            if event.finish_reason is not None:
                self._finish(sample, event.finish_reason)
            events.append(event)
        return events

    def _finish(self, sample: Sample, reason: FinishReason) -> None:
        """A sample ended; what it absorbed may be the beginning of the next turn."""
        absorbed = self.pool.num_tokens[sample.row]  # with speculation it may lag, or hold tokens after the end
        sound = reason in ("stop", "eos", "length") and absorbed <= len(sample.token_ids)
        if sound and sample.job.request.reuse and sample.num_new > 1:
            self._prompts.remember(sample.row, sample.token_ids[:absorbed])
        self.rows.leave(sample)
        self._count_end(sample.job, reason)

    def _count_end(self, job: Job, reason: FinishReason) -> None:
        self._finished[reason] += 1
        job.num_open -= 1
        if job.num_open == 0:
            self._dated.discard(job)
            self._inbox.ended(job.request.id)

    def _end(self, job: Job, reason: FinishReason, error: str | None = None) -> list[Event]:
        """End what is left of a job, wherever it is; its memory is free."""
        samples = [sample for sample in self.rows.active if sample.job is job]
        events = [sample.end(reason, error) for sample in samples]
        if not samples:
            usage = job.usage()
            events = [
                Event(job.request.id, index, (), "", (), reason, usage, error)
                for index in range(job.request.num_samples)
            ]
        if job in self._queue:
            self._queue.remove(job)
        self.rows.drop(job)
        for _ in events:
            self._count_end(job, reason)
        return events

    def _fail(self, jobs: Iterable[Job], error: Exception) -> list[Event]:
        """A step raised: its jobs end with an error, and the engine goes on."""
        self._counts["failures"] += 1
        if not isinstance(error, UserError):
            _log.error("a step of the engine failed", exc_info=error)
        return [event for job in jobs for event in self._end(job, "error", _told(error))]


def _told(error: Exception) -> str:
    """In one line, for who asked."""
    return first_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
