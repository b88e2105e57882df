"""The torch function mode that rewrites the attention calls of one module while its forward runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fullrank.capture.softmax import SOFTMAX, axes_of_product, spelt_out
from fullrank.edit.announcing import announced
from fullrank.edit.call import Call
from fullrank.edit.chain import Chain, settled
from fullrank.edit.fitting import broadcasts
from fullrank.edit.layout import KernelLayout
from fullrank.edit.looked_into import looked_into, unflatten
from fullrank.edit.made_map import MadeMap, inverse
from fullrank.edit.places import Place
from fullrank.edit.softmaxes import CARRY, PRODUCTS, Softmax, Softmaxes, fits, give_up
from fullrank.errors import EditError

__all__ = ["After", "Before", "Rewriting"]

Before = Callable[[Call], Call]
"""Called before the kernel; returns the call, changed by `Call.change` or not. Sees what edits made earlier changed."""

After = Callable[[Call, Tensor], Tensor]
"""Called after the kernel with the call as all edits made it, those made later too, and its output (batch, heads,
queries, width)."""


class Rewriting(TorchFunctionMode):
    """Sees the functions that a module calls; attention calls are made with what `before` and `after` make of them.

    It lives as long as one forward of the module and is entered inside it: so a compiler traces it, and activation
    checkpointing, which runs the forward again in the backward pass and perhaps in another thread, enters it again.

    Args:
        before: changes calls, or None.
        after: changes outputs, or None.
        take: gives the place of the next attention call of the module; None where it is not to be changed.
        path: of the module.
        batch: sequences in what the module was called with.
        heads: that the module states.
        given: the stream that the module was called with, as (sequences, tokens, width), or None.
        running: all that rewrite calls of the module now, this one among them, outermost first.
    """

    def __init__(
        self,
        before: Before | None,
        after: After | None,
        take: Callable[[], Place | None],
        path: str,
        batch: int | None,
        heads: int | None,
        given: Tensor | None = None,
        running: list[Any] | None = None,
    ) -> None:
        super().__init__()
        self._running: list[Rewriting] = [self] if running is None else running
        self.before, self.after, self.given = before, after, given
        self.path, self.batch, self.heads = path, batch, heads
        self.calls = 0
        self.busy = False
        self._take = take
        self._width = 0  # of the values of the call that happens, before they are changed
        self._softmaxes = Softmaxes()

    def take(self) -> Place | None:
        """The place of the attention call that happens now."""
        self.calls += 1
        return self._take()

    def begin(self, call: Call) -> Call:
        """The call that is to be made.

        Returns:
            What `before` made of it.

        Raises:
            EditError: where `before` returns something else than a call, or changes what this kernel does not show.
        """
        call = call.change(input=self.given)
        self._width = call.value.shape[-1]
        if self.before is None:
            return call
        changed = self.before(call)
        if not isinstance(changed, Call):
            raise EditError(f"before returned a {type(changed).__name__}; it must return call or call.change(…).")
        for name in ("query", "key", "logits"):
            if getattr(call, name) is None and getattr(changed, name) is not None:
                raise EditError(f"before set {name}, which attention in {self.path} ({call.kernel}) does not show.")
        if call.query is None and changed.scale != call.scale:
            raise EditError(
                f"before set scale, which attention in {self.path} ({call.kernel}) does not show; change logits."
            )
        if call.query is None and changed.attend is not None:
            raise EditError(f"before set attend, and attention in {self.path} shows no queries and keys; set weights.")
        for name in ("window", "softcap", "sink"):
            if getattr(changed, name) is not getattr(call, name):
                raise EditError(f"before set {name}, which cannot be changed in {self.path}; change the mask.")
        if changed.weights is None or changed.weights is call.weights:
            return changed
        rows = call.query if call.query is not None else call.logits
        assert rows is not None
        shape = (changed.value.shape[0], *rows.shape[1:-1], changed.keys)
        if not broadcasts(changed.weights.shape, shape):
            raise EditError(f"the new map in {self.path} is {tuple(changed.weights.shape)}, and {shape} is needed.")
        return changed.change(weights=changed.weights.expand(shape))

    def end(self, call: Call, output: Tensor) -> Tensor:
        """The output that is to be handed on.

        Returns:
            What `after` made of it; where `before` widened the values, it may be as wide as they were.

        Raises:
            EditError: where `after` returns something of another shape.
        """
        if self.after is None:
            return output
        changed = self.after(call, output)
        narrow = (*output.shape[:-1], self._width)
        if not isinstance(changed, Tensor) or changed.shape not in (output.shape, narrow):
            found = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise EditError(f"after returned {found} in {self.path}; it must return a tensor {tuple(output.shape)}.")
        return changed.to(output.dtype)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function, or the attention call that is made in its place."""
        kwargs = kwargs or {}
        if self.busy:
            return unflatten(*args, **kwargs) if func is Tensor.unflatten else func(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            with self:
                return looked_into(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return self._alone(lambda: self._fused(func, args, kwargs))
        name = getattr(func, "__name__", "")
        if name in SOFTMAX:
            output = func(*args, **kwargs)
            self._softmaxes.begin(func, args, kwargs, output)
            return output
        if name in CARRY:
            output = unflatten(*args, **kwargs) if func is Tensor.unflatten else func(*args, **kwargs)
            self._softmaxes.carry(func, args, kwargs, output)
            return output
        if name in PRODUCTS:
            return self._product(func, args, kwargs)
        if name == "einsum":
            return self._einsum(func, args, kwargs)
        return func(*args, **kwargs)

    # ------------------------------------------------------------ fused kernels

    def _alone(self, run: Callable[[], Any]) -> Any:
        """Run the call for all that rewrite it: neither its kernel nor what edits compute is a call of the module."""
        for mode in self._running:
            mode.busy = True
        try:
            return run()
        finally:
            for mode in self._running:
                mode.busy = False

    def _fused(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        chain = Chain(self._running)
        if chain.place is None:
            return func(*args, **kwargs)
        given = {**dict(zip(_SDPA, args, strict=False)), **kwargs}
        query, key, value = given["query"], given["key"], given["value"]
        mask = given.get("attn_mask")
        layout = KernelLayout.of(query, self.batch, self.heads, self.path)
        call = Call(
            place=chain.place,
            kernel="scaled_dot_product_attention",
            query=layout.fold(query),
            key=layout.fold(key),
            value=layout.fold(value),
            mask=None if mask is None else layout.fold_mask(mask),
            causal=bool(given.get("is_causal", False)),
            scale=given.get("scale"),
            dropout=given.get("dropout_p", 0.0),
        )
        changed = chain.begin(call, settled)
        if changed.weights is not None or changed.attend is not None:
            output = announced(changed, changed.product)
            like = query
        else:
            for name in ("query", "key", "value"):
                if getattr(changed, name) is not getattr(call, name):
                    given[name] = layout.unfold(getattr(changed, name), given[name], name)
            if changed.changed_mask(call):
                added = changed.additive()
                given["attn_mask"] = None if added is None else _typed(layout.unfold_mask(added), given["query"])
                given["is_causal"] = changed.causal and added is None
            given["scale"] = changed.scale
            like = func(**given)
            output = layout.fold(like)
        return layout.unfold(chain.end(changed, output), like, "output")

    # ------------------------------------------------------------ models that softmax themselves

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        factors = (*args, *kwargs.values())
        if len(factors) != 2:
            return func(*args, **kwargs)
        weights, value = factors
        softmax = self._softmaxes.find(weights)
        if softmax is None or not fits(softmax, weights, value):
            return func(*args, **kwargs)
        return self._alone(lambda: self._made(softmax, weights, value, None, func))

    def _einsum(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        equation, *factors = args
        if len(factors) == 1 and isinstance(factors[0], tuple | list):
            factors = list(factors[0])
        if not isinstance(equation, str) or len(factors) != 2 or "->" not in equation:
            return func(*args, **kwargs)
        inputs, out = spelt_out(equation.replace(" ", ""), factors)
        labels = inputs.split(",")
        for mine, other in ((0, 1), (1, 0)):
            softmax = self._softmaxes.find(factors[mine])
            orders = None if softmax is None else axes_of_product(labels[mine], labels[other], out)
            if softmax is None or orders is None:
                continue
            weights, value = factors[mine].permute(orders[0]), factors[other].permute(orders[1])
            if not fits(softmax, weights, value):
                continue

            def run(weights: Tensor, value: Tensor, orders: Any = orders, first: bool = mine == 0) -> Tensor:
                pair = weights.permute(inverse(orders[0])), value.permute(inverse(orders[1]))
                return func(equation, *(pair if first else pair[::-1])).permute(orders[2])  # type: ignore[no-any-return]

            made = self._alone(partial(self._made, softmax, weights, value, orders[0], run))
            return made.permute(inverse(orders[2]))
        return func(*args, **kwargs)

    def _made(
        self,
        softmax: Softmax,
        weights: Tensor,
        value: Tensor,
        order: tuple[int, ...] | None,
        run: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The product of a map that the model made and values, in (…, queries, keys) and (…, keys, width)."""
        keys = weights.shape[-1]
        full = softmax.logits if order is None or softmax.logits.ndim != len(order) else softmax.logits.permute(order)
        rows = full if full.ndim > weights.ndim else weights  # what has sequences and heads apart
        chain = Chain(self._running)
        if chain.place is None:
            return run(weights, value)
        layout = KernelLayout.of(rows, self.batch, self.heads, self.path)
        folded = layout.fold(weights)
        made = MadeMap(softmax, weights, value.dtype, order, full, layout)
        call = Call(
            place=chain.place,
            kernel="softmax",
            value=layout.fold(value),
            weights=folded,
            logits=layout.fold(full[..., :keys]).reshape(folded.shape),
            remade=None if keys < full.shape[-1] else made.remade,
        )
        changed = chain.begin(call, made.settle)
        if changed.value is not call.value:
            value = layout.unfold(changed.value, value, "value")
        if made.weights is weights:
            output = run(weights, value)
        else:
            give_up(softmax.result)
            output = announced(changed, partial(run, made.weights, value))
        if not chain.changes_output:
            return output
        return layout.unfold(chain.end(changed, layout.fold(output)), output, "output")


_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def _typed(mask: Tensor, query: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask.to(query.dtype)
