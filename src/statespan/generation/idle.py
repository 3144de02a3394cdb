"""Idle: what a call made for a model, such as CUDA graphs over its weights, kept for the next call."""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary, finalize, ref

from statespan.models.capture import addresses
from statespan.models.language_model import LanguageModel

Made = TypeVar("Made")
_Key = tuple[Hashable, tuple[int, ...]]


class Idle(Generic[Made]):
    """Things that one call at a time has, and that wait in between; any thread may call.

    A thing is good for a form, such as a batch size, and for weights that lie where they lay when it was taken; what
    training writes there it reads. It must not hold the model, with which it goes.

    Args:
        most: things of a model that wait; the oldest leave.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._waiting: WeakKeyDictionary[LanguageModel, dict[Made, _Key]] = WeakKeyDictionary()
        self._taken: WeakKeyDictionary[Made, _Key] = WeakKeyDictionary()

    def take(self, model: LanguageModel, form: Hashable, make: Callable[[], Made]) -> Made:
        """The newest thing of this form that waits, or else a new one (or None); the caller's until `give_back`."""
        if not has_graphs(model):
            return make()
        key = form, addresses(model)
        with self._lock:
            waiting = self._waiting.get(model, {})
            moved = [thing for thing, its in waiting.items() if its[1] != key[1]]  # named, so that it ends later
            found = next((thing for thing, its in reversed(waiting.items()) if its == key), None)
            for thing in (*moved, *([] if found is None else [found])):
                del waiting[thing]
        made = make() if found is None else found
        if made is not None:
            self._taken[made] = key
        return made

    def give_back(self, model: LanguageModel | None, thing: Made) -> None:
        """Keep a thing for the next call, unless it was not taken, or the model is gone (None).

        A batch that is collected calls this from anywhere, `take` included: it never waits, and is content to lose it.
        """
        key = self._taken.pop(thing, None)
        if model is None or key is None or not self._lock.acquire(blocking=False):
            return
        try:
            waiting = self._waiting.setdefault(model, {})
            waiting[thing] = key
            oldest = [(each, waiting.pop(each)) for each in list(waiting)[: -self._most]]
        finally:
            self._lock.release()
        del oldest  # graphs end outside the lock

    def waiting(self, model: LanguageModel) -> list[Made]:
        """Those that wait, oldest first."""
        return list(self._waiting.get(model, {}))


def give_back_at_end(
    batch: object, model: LanguageModel, holds: list[Made], give_back: Callable[[LanguageModel | None, Made], None]
) -> None:
    """When the batch goes, give back what `holds` has first then; nothing here may keep the batch or the model."""
    finalize(batch, _give_back_held, ref(model), holds, give_back)


def _give_back_held(
    model: "ref[LanguageModel]", holds: list[Made], give_back: Callable[[LanguageModel | None, Made], None]
) -> None:
    give_back(model(), holds[0])


def has_graphs(model: LanguageModel) -> bool:
    """Whether its steps and chunks may become CUDA graphs."""
    return model.device.type == "cuda"
