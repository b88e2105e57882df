"""Rewriting calls that Hugging Face models make through a dispatch table: before heads are repeated or packed.

A table is shared by all models of the process. The function under a key in use is replaced by one that calls it; it
asks the calling module whether its forward is being rewritten, and passes calls of all other modules through.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Self

from torch import Tensor, nn

from fullrank.capture.dispatch import LOCK
from fullrank.edit.announcing import announced
from fullrank.edit.call import Call
from fullrank.edit.chain import Chain, settled
from fullrank.edit.forwards import EditedForward
from fullrank.edit.packed import PackedCall, documents_of, from_the_end
from fullrank.errors import EditError

__all__ = ["Lease", "lease_for"]

_TABLE = "ALL_ATTENTION_FUNCTIONS"


class Redirect:
    """Stands in a dispatch table in place of a function.

    Attributes:
        function: what is called in the end.
        key: under which it stands.
        before: what the table held of its own under the key; None where it only inherited it.
        leases: how many edits need it. While a model is looked at, `function` is what sees the calls as they are made.
    """

    def __init__(self, function: Callable[..., Any], key: str, before: Any) -> None:
        self.function, self.key, self.before = function, key, before
        self.leases = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        forward = given["module"].__dict__.get("forward")
        if not isinstance(forward, EditedForward) or not forward.running or given["query"].ndim != 4:
            return self.function(*args, **kwargs)
        for mode in forward.running:  # neither the function nor what edits compute is a call of the module
            mode.busy = True
        try:
            return self._rewritten(forward, given, args[len(_NAMES) :])
        finally:
            for mode in forward.running:
                mode.busy = False

    def _rewritten(self, forward: EditedForward, given: dict[str, Any], rest: tuple[Any, ...]) -> Any:
        chain = Chain(forward.running)
        final: Call | None = None
        if chain.place is not None:
            call = _call(self.key, chain.place, given)
            final = chain.begin(call, partial(settled, keep_bias="position_bias" in given))
            _write(self.key, given, call, final)
        others: tuple[Any, ...]
        if final is not None and (final.weights is not None or final.attend is not None):
            output = announced(final, final.product)
            others = (final.weights,)
        else:
            keywords = {name: item for name, item in given.items() if name not in _NAMES}
            returned = self.function(*(given.get(name) for name in _NAMES), *rest, **keywords)
            if final is None:
                return returned
            output, others = returned[0].transpose(1, 2), tuple(returned[1:])
        output = chain.end(final, output)
        return (output.transpose(1, 2).contiguous(), *others)


_NAMES = ("module", "query", "key", "value", "attention_mask")


def _call(key: str, place: Any, given: dict[str, Any]) -> Call:
    """A dispatched call; causality is a flag of the module that counts where no full mask is given."""
    mask, query, keys = given.get("attention_mask"), given["query"], given["key"].shape[2]
    flag = given.get("is_causal")
    flag = getattr(given["module"], "is_causal", True) if flag is None else flag
    full = mask is not None and (not isinstance(mask, Tensor) or mask.ndim == 4)
    whole = "flash" in key or "flex" in key  # other kernels are told of caps and sinks too, and leave them out
    if isinstance(mask, Tensor) and mask.ndim == 2:  # (batch, keys): which are no padding
        mask = mask[:, None, None, :keys].bool()
    causal, window = bool(flag) and not full and query.shape[2] > 1, None if full else given.get("sliding_window")
    documents = documents_of(key, given, causal=causal, window=window) if mask is None else None
    if documents is None and not full:
        documents = from_the_end(key, given, causal=causal, window=window, real=mask)
    seen: Any = documents or (mask[..., :keys] if isinstance(mask, Tensor) else mask)
    kind = Call if documents is None else PackedCall
    return kind(
        place=place,
        kernel=key,
        query=query,
        key=given["key"],
        value=given["value"],
        mask=seen,
        causal=causal and documents is None,
        window=window if documents is None else None,
        bias=given.get("position_bias"),
        scale=given.get("scaling"),
        softcap=given.get("softcap") if whole else None,
        sink=given.get("s_aux") if whole else None,
        dropout=given.get("dropout") or 0.0,
    )


def _write(key: str, given: dict[str, Any], call: Call, changed: Call) -> None:
    given["query"], given["key"], given["value"] = changed.query, changed.key, changed.value
    if changed.scale != call.scale:
        given["scaling"] = changed.scale
    if not changed.changed_mask(call):
        return
    if "flash" in key or "flex" in key or isinstance(call, PackedCall):
        raise EditError(
            f"the mask of {changed.place.path} cannot be changed: the kernel {key!r} takes none; use "
            "attn_implementation='sdpa' or 'eager'."
        )
    if "position_bias" in given:
        given["position_bias"], changed = changed.bias, changed.change(bias=None)
    added = changed.additive() if changed.mask is not None or changed.bias is not None else None
    if isinstance(added, Tensor) and added.is_floating_point():
        added = added.to(given["query"].dtype)
    given["attention_mask"] = added
    given["is_causal"] = changed.causal and added is None


class Lease:
    """Keeps redirects in dispatch tables; a copy of it, made with a copy of a model, keeps them too.

    Args:
        where: the Python modules that use the tables, and the keys.
    """

    def __init__(self, where: tuple[tuple[str, str], ...]) -> None:
        self.where = where
        held = [(source, key) for source, key in where if _acquire(source, key)]
        self._release = weakref.finalize(self, _release, held)
        self._release.atexit = False

    def release(self) -> None:
        """Give the redirects up; the last to do so puts the tables back."""
        self._release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(self.where)

    def __reduce__(self) -> Any:
        return type(self), (self.where,)


def lease_for(module: nn.Module) -> Lease | None:
    """A lease of the tables from which a module gets its attention function, or None where it uses none."""
    key = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if not isinstance(key, str) or key == "eager":
        return None
    sources = {kind.__module__ for kind in type(module).__mro__}
    where = tuple((source, key) for source in sorted(sources) if key in (_table(source) or ()))
    return Lease(where) if where else None


def _table(source: str) -> Any:
    table = getattr(sys.modules.get(source), _TABLE, None)
    return table if isinstance(getattr(table, "_local_mapping", None), dict) else None


def _acquire(source: str, key: str) -> bool:
    table = _table(source)
    if table is None:
        return False
    with LOCK:
        if key not in table:
            return False
        found = table[key]
        if not isinstance(found, Redirect):
            found = Redirect(found, key, table._local_mapping.get(key))
            table._local_mapping[key] = found
        found.leases += 1
    return True


def _release(held: list[tuple[str, str]]) -> None:
    for source, key in held:
        table = _table(source)
        with LOCK:
            found = None if table is None else table._local_mapping.get(key)
            if not isinstance(found, Redirect):
                continue
            found.leases -= 1
            if found.leases == 0 and found.before is None:
                del table._local_mapping[key]
            elif found.leases == 0:
                table._local_mapping[key] = found.before
