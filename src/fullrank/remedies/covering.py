"""How far a change of weights by their roles reaches: branches and parameters of blocks that have none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fullrank.capture.reference import module_at
from fullrank.capture.weights import Weight
from fullrank.capture.wrappers import bare
from fullrank.edit import Branch
from fullrank.errors import RemedyError
from fullrank.remedies.patient import Patient

__all__ = ["branches_of", "check_branches", "identities", "notes_on_branches", "notes_on_rest"]

_BLOCK = frozenset(("q", "k", "v", "o", "up", "gate", "down"))
_NAMED = 4  # in a sentence


def branches_of(patient: Patient) -> dict[str, int]:
    """How many branches each stack adds to its stream: 2L with attention and MLP.

    Where additions to the stream cannot be followed, the last weights that are known are counted.

    Returns:
        The number of each stack, by name.
    """
    followed = not patient.branches.notes
    counts = {}
    for stack in patient.anatomy.stacks:
        counts[stack.name] = 0
        for layer, weights in enumerate(stack.weights, 1):
            found, calls = len(patient.branches.of(stack.name, layer)), _calls(weights)
            counts[stack.name] += found if found and followed else max(found, calls)
    return counts


def check_branches(patient: Patient) -> None:
    """Refuse where a branch has no last weight that is known, so that it would keep its size while others lose theirs.

    Args:
        patient: the model.

    Raises:
        RemedyError: for example of linear attention and of state spaces beside attention.
    """
    unknown = _unknown(patient)
    if unknown:
        one = unknown[0]
        more = f", nor of {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise RemedyError(
            f"of the branch {one.path} of {one.stack} layer {one.layer} no last weight is known{more}: it would keep "
            "its size while other branches change theirs, and depth would count wrongly."
        )


def notes_on_branches(patient: Patient) -> tuple[str, ...]:
    """A sentence that names branches without a last weight that is known, where there are any."""
    paths = list(dict.fromkeys(one.path for one in _unknown(patient)))
    return (f"Of these branches no weights are known, and they stay as they are: {_listed(paths)}.",) if paths else ()


def notes_on_rest(patient: Patient, roles: Sequence[str], found: Sequence[Weight]) -> tuple[str, ...]:
    """Sentences on matrices of the blocks that stay as they are.

    Args:
        patient: the model.
        roles: that are changed; where these are all of a block, matrices without any role are named.
        found: the weights that are changed; what adds to the same roles is named.

    Returns:
        None, one or two.
    """
    held = identities(patient)
    changed = {key for one in found for key in (one.parameter, held.get(one.parameter))}
    beside = [name for one in found for name in one.beside if not {name, held.get(name)} & changed]
    notes = []
    if beside:
        names = _listed(list(dict.fromkeys(beside)))
        notes.append(f"What adds to these weights beside them, such as adapters, stays as it is: {names}.")
    rest = list(_without_role(patient, held)) if set(roles) >= _BLOCK else []
    rest = [name for name in rest if name not in beside]
    if rest:
        notes.append(f"Matrices of the blocks that have none of these roles stay as they are: {_listed(rest)}.")
    return tuple(notes)


def identities(patient: Patient) -> dict[str, int]:
    """Which object each name of a parameter stands for, so that those of several names are told.

    Returns:
        By name, with and without what `torch.compile` and data parallelism put before it.
    """
    return {
        name.replace("_orig_mod.", ""): id(tensor)
        for model in (bare(patient.model), patient.model)
        for name, tensor in model.named_parameters(remove_duplicate=False)
    }


def _unknown(patient: Patient) -> list[Branch]:
    """Of layers with more branches than last weights, those branches that have none inside."""
    found: list[Branch] = []
    for stack in patient.anatomy.stacks:
        for layer, (block, weights) in enumerate(zip(stack.paths, stack.weights, strict=True), 1):
            branches = list(patient.branches.of(stack.name, layer).values())
            last = [one.parameter for one in weights if one.role in ("o", "down")]
            if len(branches) > _calls(weights):
                inside = [_inside(patient, one, block) for one in branches]
                found += [
                    one
                    for one, prefix in zip(branches, inside, strict=True)
                    if not any(name.startswith(prefix) for name in last)
                ]
    return found


def _inside(patient: Patient, branch: Branch, block: str) -> str:
    """How names of a branch's weights begin: with its module, or with the one around it where that is mere dropout."""
    module = module_at(patient.model, branch.path)
    around = branch.path.rpartition(".")[0]
    bare_of_weights = module is not None and next(module.parameters(), None) is None
    return f"{around if bare_of_weights and around.startswith(f'{block}.') else branch.path}."


def _calls(weights: Sequence[Weight]) -> int:
    return len({one.call for one in weights if one.role in ("o", "down")})


def _without_role(patient: Patient, held: dict[str, int]) -> Iterator[str]:
    stacks = patient.anatomy.stacks
    inside = tuple({f"{path}." for stack in stacks for path in stack.paths})
    known = {one.parameter for stack in stacks for layer in stack.weights for one in layer}
    known |= {other for stack in stacks for layer in stack.weights for one in layer for other in one.beside}
    tensors = {held[name] for name in known if name in held}
    for name, parameter in patient.model.named_parameters():
        name = name.replace("_orig_mod.", "")
        if parameter.ndim < 2 or not name.startswith(inside) or id(parameter) in tensors:
            continue
        path, _, made = name.partition(".parametrizations.")
        if made and f"{path}.{made.partition('.')[0]}" in known:
            continue
        yield name


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
