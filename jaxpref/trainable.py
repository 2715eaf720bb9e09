"""Which parameters are trained: a tree in two parts, and back together."""

import re
from typing import Any

import jax
from jax.tree_util import DictKey


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

    >>> merge({"a": {"b": 1}, "d": 3}, {"a": {"c": 2}})
    {'a': {'b': 1, 'c': 2}, 'd': 3}
    """
    merged = dict(one)
    for name, part in other.items():
        merged[name] = merge(merged[name], part) if name in merged else part
    return dict(sorted(merged.items()))


def _is_leaf(x: Any) -> bool:
    # Boxes with axis names, and abstract arrays, are whole.
    return not isinstance(x, dict)
