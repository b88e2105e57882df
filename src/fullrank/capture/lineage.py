"""Which function made which tensor of a forward from what: a light graph that keeps no activation alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.capture.tensors import tensors_in

__all__ = ["BLANK", "INDEXING", "WRITTEN", "Lineage", "Node", "Ref"]

INDEXING = frozenset({"__getitem__", "index_select", "gather", "take_along_dim", "__setitem__", "index_copy"})
"""Their indices say where a value goes, not what it is made of; they are kept, because they are needed to go that way
again."""
WRITTEN = "written into a view"
"""Name of the node of a tensor after something was written into a view of it."""

BLANK = frozenset(
    {
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_full",
    }
    | {"new_empty", "new_tensor"}
)
"""They look at a tensor's shape and at nothing else of it: what is kept of them is the number they fill it with."""


@dataclass(eq=False, slots=True)
class Node:
    """One function call, or a tensor that no call was seen to make.

    Attributes:
        order: how many nodes were made before.
        name: of the function; `parameter`, `buffer`, `given` for a tensor without one.
        function: the function.
        args: what it was called with, tensors replaced by `Ref`.
        kwargs: likewise.
        parents: the tensors among them.
        shapes: of the tensors it returned.
        data: whether anything that the model was called with went into it.
        stored: whether a parameter, or a packed integer buffer, went into it.
        floating: whether what it returned is floating.
        tensor: the name of a parameter or buffer.
        path: the module that ran.
        attention: whether it was seen to be attention.
        kept: small integer tensors that indices were given by.
    """

    order: int
    name: str
    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    parents: tuple[Ref, ...] = ()
    shapes: tuple[torch.Size, ...] = ()
    data: bool = False
    stored: bool = False
    floating: bool = True
    tensor: str = ""
    path: str = ""
    attention: bool = False
    kept: Tensor | None = None

    @property
    def out(self) -> Ref:
        """The first tensor it returned."""
        return Ref(self, 0)


@dataclass(frozen=True, slots=True)
class Ref:
    """One tensor: the call that made it, and which of its results it is."""

    node: Node
    index: int

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.node.shapes[self.index]


def _filling(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    place = {"full_like": 1, "new_full": 2}.get(name)
    if place is None:
        return {"fill": 1 if "ones" in name else 0} if "zeros" in name or "ones" in name else {}
    value = kwargs.get("fill_value", args[place] if len(args) > place else None)
    return {"fill": value} if isinstance(value, int | float) else {}


class Lineage:
    """Writes down the functions of one forward.

    Args:
        model: whose parameters and buffers are known by name.
        owner: the module that runs now, with its name: under offloading and sharding its parameters are other tensors
            during the forward.
    """

    def __init__(self, model: nn.Module, owner: Callable[[], tuple[nn.Module, str] | None]) -> None:
        self.nodes: list[Node] = []
        self.last_attention: Node | None = None
        self._known: dict[int, tuple[weakref.ref[Tensor], Ref]] = {}
        self._owner = owner
        for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in named:
                self._leaf(tensor, kind, name.replace("_orig_mod.", ""))

    def see(self, function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take in one call."""
        made = list(tensors_in(output))
        if not made:
            if name not in ("__setitem__",) or not args or not isinstance(args[0], Tensor):
                return
            made = [args[0]]
        if name == "__get__":
            name = getattr(getattr(function, "__self__", None), "__name__", name)
        if name in BLANK:
            args, kwargs = (), _filling(name, args, kwargs) | {"dtype": made[0].dtype}
        keep = name in INDEXING
        parents: list[Ref] = []
        args = tuple(self._light(value, parents, keep=keep) for value in args)
        kwargs = {key: self._light(value, parents, keep=keep) for key, value in kwargs.items()}
        sources = parents[:1] if keep and name != "__setitem__" else parents
        owner = self._owner()
        node = Node(
            order=len(self.nodes),
            name=name,
            function=function,
            args=args,
            kwargs=kwargs,
            parents=tuple(parents),
            shapes=tuple(tensor.shape for tensor in made),
            data=any(parent.node.data for parent in sources),
            stored=any(parent.node.stored for parent in sources),
            floating=made[0].is_floating_point() or made[0].is_complex(),
            path=owner[1] if owner is not None else "",
        )
        self.nodes.append(node)
        for index, tensor in enumerate(made):
            self._know(tensor, Ref(node, index))
        if name.endswith("_") and not name.startswith("__") and made[0]._is_view():
            self._write_through(made[0], node)

    def _write_through(self, view: Tensor, written: Node) -> None:
        """What is written into a view is written into the tensor that it is a view of."""
        base = view._base
        found = None if base is None else self._known.get(id(base))
        if base is None or found is None or found[0]() is not base or not base.is_contiguous():
            return
        where = (view.shape, view.stride(), view.storage_offset() - base.storage_offset())
        parents = (found[1], written.out)
        node = Node(
            order=len(self.nodes),
            name=WRITTEN,
            args=(*parents, *where),
            parents=parents,
            shapes=(base.shape,),
            data=any(parent.node.data for parent in parents),
            stored=any(parent.node.stored for parent in parents),
            floating=written.floating,
            path=written.path,
        )
        self.nodes.append(node)
        self._know(base, node.out)

    def see_attention(self) -> None:
        """The call that was taken in last is attention."""
        if self.nodes:
            self.nodes[-1].attention = True
            self.last_attention = self.nodes[-1]

    def ref(self, tensor: Tensor) -> Ref:
        """Where a tensor came from; one that no call was seen to make is a new leaf."""
        found = self._known.get(id(tensor))
        known = found[1] if found is not None and found[0]() is tensor else None
        if known is None or (known.node.name != "parameter" and isinstance(tensor, nn.Parameter)):
            # fetched for this call (offloading, sharding) by functions that were seen
            return self._owned(tensor) or known or self._leaf(tensor, "given", "")
        return known

    def enter(self, state: Tensor) -> None:
        """A tensor is a state, even where it was made from nothing but parameters (learned queries) or from zeros."""
        ref = self.ref(state)
        if ref.node.data or ".parametrizations." in f".{ref.node.tensor}.":
            return
        node = Node(
            order=len(self.nodes),
            name="alias",
            parents=(ref,),
            shapes=(state.shape,),
            data=True,
            stored=ref.node.stored,
            floating=ref.node.floating,
        )
        self.nodes.append(node)
        self._know(state, node.out)

    # ------------------------------------------------------------ leaves

    def _owned(self, tensor: Tensor) -> Ref | None:
        owner = self._owner()
        if owner is not None:
            module, path = owner
            for prefix, inner in (("", module), *((f"{name}.", child) for name, child in module.named_children())):
                for kind, held in (("parameter", inner._parameters), ("buffer", inner._buffers)):
                    for name, mine in held.items():
                        if mine is tensor:
                            return self._leaf(tensor, kind, f"{path}.{prefix}{name}".removeprefix("."))
        return None

    def _leaf(self, tensor: Tensor, kind: str, name: str) -> Ref:
        packed = kind == "buffer" and tensor.ndim > 1 and not tensor.is_floating_point() and tensor.dtype != torch.bool
        node = Node(
            order=len(self.nodes),
            name=kind,
            shapes=(tensor.shape,),
            data=kind == "given",
            stored=kind == "parameter" or packed,
            floating=tensor.is_floating_point(),
            tensor=name,
        )
        if not tensor.is_floating_point() and kind == "given" and tensor.ndim < 3:
            node.kept = tensor.detach()
        self.nodes.append(node)
        ref = Ref(node, 0)
        self._know(tensor, ref)
        return ref

    def _light(self, value: Any, parents: list[Ref], *, keep: bool) -> Any:
        if isinstance(value, Tensor):
            ref = self.ref(value)
            if keep and not value.is_floating_point() and not value.is_complex() and ref.node.kept is None:
                ref.node.kept = value.detach()
            parents.append(ref)
            return ref
        if isinstance(value, tuple | list):
            kept = [self._light(item, parents, keep=keep) for item in value]
            return kept if isinstance(value, list) else tuple(kept)
        if isinstance(value, torch.UntypedStorage | torch.TypedStorage):
            return None  # the file of offloaded weights would stay mapped
        return value

    def _know(self, tensor: Tensor, ref: Ref) -> None:
        key = id(tensor)
        self._known[key] = (weakref.ref(tensor, partial(self._forget, key)), ref)

    def _forget(self, key: int, dead: weakref.ref[Tensor]) -> None:
        found = self._known.get(key)
        if found is not None and found[0] is dead:
            del self._known[key]
