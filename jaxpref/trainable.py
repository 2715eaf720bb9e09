"""Which parameters are trained: a tree in two parts, and back together."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey

from jaxpref import nf4

_MATRICES = "layers/(query|key|value|out|gate|up|down)"


def path_of(path: tuple) -> str:
    """A leaf's place as text: `layers/query`."""
    return "/".join(key.key for key in path if isinstance(key, DictKey))


def partition(params: Any, pattern: str) -> tuple[Any, Any]:
    """Splits nested dictionaries by a regular expression for the leaves' paths.

    Args:
      params: nested dictionaries of anything.
      pattern: searched for in each path, `layers/query` for example.

    Returns:
      The leaves whose path matches, and the others, each in the dictionaries it was in.

    >>> partition({"a": {"b": 1, "c": 2}, "d": 3}, "a/b|d")
    ({'a': {'b': 1}, 'd': 3}, {'a': {'c': 2}})
    """
    matching: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_leaf):
        part = matching if re.search(pattern, path_of(path)) else others
        *folders, name = path_of(path).split("/")
        for folder in folders:
            part = part.setdefault(folder, {})
        part[name] = leaf
    return matching, others


def merge(one: Any, other: Any) -> Any:
    """Nested dictionaries with the leaves of both, which share none.

    Where one of them is empty the other is given back as it is, whatever kind of tree it is.

    >>> merge({"a": {"b": 1}, "d": 3}, {"a": {"c": 2}})
    {'a': {'b': 1, 'c': 2}, 'd': 3}
    """
    if isinstance(other, dict) and not other:
        return one
    if isinstance(one, dict) and not one:
        return other
    merged = dict(one)
    for name, part in other.items():
        merged[name] = merge(merged[name], part) if name in merged else part
    return dict(sorted(merged.items()))


def store_frozen(frozen: Any, dtype: str, *, convert: Callable[[Any, str], Any]) -> Any:
    """Frozen parameters as `model.frozen_dtype` has them kept.

    Args:
      frozen: nested dictionaries of arrays, or of abstract ones.
      dtype: float32, bfloat16 or nf4; nf4 is for the layers' matrices, beside bfloat16.
      convert: `(array, dtype)` to the array in it.
    """

    def store(path: tuple, x: Any) -> Any:
        matrix = re.fullmatch(_MATRICES, path_of(path)) and nf4.fits(x.shape)
        return convert(x, "bfloat16" if dtype == "nf4" and not matrix else dtype)

    return jax.tree_util.tree_map_with_path(store, frozen)


def as_array(x: jax.Array, dtype: str) -> Any:
    """An array in a dtype or in nf4."""
    if dtype != "nf4":
        return x.astype(dtype)
    places = jax.tree.map(lambda like: like.sharding, nf4.abstract(x))
    return jax.device_put(nf4.quantize(x), places)


def as_abstract(x: jax.Array | jax.ShapeDtypeStruct, dtype: str) -> Any:
    """What `as_array` makes of an array, or of an abstract one: shape, dtype and sharding."""
    if dtype == "nf4":
        return nf4.abstract(x)
    return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding)


def _is_leaf(x: Any) -> bool:
    # Boxes with axis names, and abstract arrays, are whole.
    return not isinstance(x, dict)
