"""Engine: the loop that serves many requests with one model (docs/serving.md)."""

import logging
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from statespan.errors import UserError
from statespan.generation.speculative import MOST_PENDING
from statespan.models.language_model import LanguageModel, Tokenizer
from statespan.serving.admission import Admission
from statespan.serving.decode import Decode, Failed, PlainDecode
from statespan.serving.drafters import drafter_of
from statespan.serving.job import Job, Sample
from statespan.serving.jobs import Jobs, told
from statespan.serving.metrics import EngineMetrics
from statespan.serving.options import EngineOptions, num_pages
from statespan.serving.prefix_cache import prefix_cache_of
from statespan.serving.prompts import Prompts
from statespan.serving.request import Event, FinishReason, Request
from statespan.serving.rows import Rows
from statespan.serving.runner import Runner
from statespan.serving.scheduler import CANDIDATES, MOST_HELD_UP, MOST_PASSED, plan_prefill
from statespan.serving.speculative import SpeculativeDecode
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
        self.cache = prefix_cache_of(model, self.pool, options)
        if self.cache is not None and self.pool.slides:
            self.pool.pages.reclaim = self.cache.free_pages  # rows find what they were promised
        self._admission = Admission(model, options, self.rows, self.cache, has_text=self.tokenizer is not None)
        self.use(self._new_decode(draft))
        self._prompts = Prompts(self.runner, self.rows, self.cache, self._admission, options)
        self._jobs = Jobs(self.rows, options.max_waiting)

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
        self._jobs.inbox.submit(request, len(self._jobs.queue))

    def cancel(self, request_id: str) -> None:
        """End a request at the next step, with finish_reason "cancelled". Any thread may call this."""
        self._jobs.inbox.cancel(request_id)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._jobs

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One step: who is done leaves, who fits is admitted, some prompt tokens, one decode step; [] when idle."""
        if self.idle:
            return []
        self._jobs.counts["steps"] += 1
        return [*self._jobs.arrive(), *self._admit(), *self._prefill(), *self._decode()]

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
            "waiting": len(self._jobs.inbox) + len(self._jobs.queue),
            "prefilling": len(self.rows.prefilling),
            "decoding": len(self.rows.active),
            "rows": self.rows.num_rows,
            "pages_free": pages.num_free,
            "pages": pages.num_pages - 1,
        }
        counts = dict(self._jobs.counts)  # copied at once: another thread counts on
        counts["requests"] = self._jobs.inbox.num_requests
        if isinstance(self.decode, SpeculativeDecode):
            counts["drafted_tokens"] = self.decode.report.drafted
            counts["accepted_tokens"] = self.decode.report.accepted
        if cache is not None:
            counts |= cache.counts
            gauges |= {"cache_snapshots": len(cache), "cache_bytes": cache.num_bytes}
            if cache.spill is not None:
                counts |= cache.spill.counts
                gauges |= {"spill_bytes": cache.spill.memory_bytes, "spill_dir_bytes": cache.spill.disk_bytes}
        return EngineMetrics(finished=dict(self._jobs.finished), **counts, **gauges)

    def close(self) -> None:
        """Drop all requests, and snapshots unless there is a folder to keep them in. Nothing else works afterwards."""
        if not self._jobs.close():
            return
        _log.info(self.metrics().cache_summary)
        if self.cache is not None:
            self.cache.close()

    def check(self) -> None:
        """Raise AssertionError where rows, pages or the prefix cache disagree about who holds what."""
        pool, pages = self.pool, self.pool.pages
        self._jobs.check()
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

    def _admit(self) -> list[Event]:
        """Give rows and pages to the next jobs of the queue; one that finds too little lets a few others pass."""
        events: list[Event] = []
        held_up: list[Job] = []
        for job in self._jobs.queue[:CANDIDATES]:
            overdue = any(other.times_passed >= MOST_PASSED for other in held_up)
            if overdue or not self.rows.num_free or len(held_up) == MOST_HELD_UP:
                break
            try:
                if self._admission.awaits(job):
                    continue
                started = job.request.num_samples <= self.rows.num_free and self._admission.start(job)
            except Exception as error:
                events += self._jobs.fail([job], error)
                continue
            if not started:
                held_up.append(job)
                continue
            self._jobs.queue.remove(job)
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
                self._jobs.counts["prefill_tokens"] += count
            except Exception as error:
                events += self._jobs.fail([job for job, _ in plan], error)
        for job in sorted(self.rows.prefilling, key=lambda job: job.order):
            if job.num_to_prefill == 0:
                events += self._activate(job)
        return events

    def _activate(self, job: Job) -> list[Event]:
        """The prompt is absorbed but for its last token, which the next decode step feeds."""
        if job.request.options.max_new_tokens == 0:
            return self._jobs.end(job, "length")
        try:
            samples = [Sample(job, index, self.tokenizer, self.model) for index in range(job.request.num_samples)]
            self.rows.activate(job, samples, self._admission.row_tokens(job.request))
        except Exception as error:
            return self._jobs.fail([job], error)
        return []

    def _decode(self) -> list[Event]:
        """The next tokens of all active rows."""
        samples = list(self.rows.active)
        if not samples:
            return []
        try:
            outcomes = self.decode(samples)
        except Exception as error:
            return self._jobs.fail(dict.fromkeys(sample.job for sample in samples), error)
        events: list[Event] = []
        for sample, outcome in zip(samples, outcomes, strict=True):
            if outcome == []:
                continue
            try:
                event = sample.end("error", outcome.error) if isinstance(outcome, Failed) else sample.extend(outcome)
            except Exception as error:  # of a tokenizer or a constraint
                event = sample.end("error", told(error))
            self._jobs.counts["generated_tokens"] += len(event.token_ids)
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
        self._jobs.count_end(sample.job, reason)
