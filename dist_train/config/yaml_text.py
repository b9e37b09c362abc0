"""YAML as a user of the command line means it: what looks like a time or an account number is a text."""

from __future__ import annotations

import re
from typing import Any

import yaml

from data_shards.errors import first_line

_DEEPEST, _MOST_NODES = 50, 100_000
_TOO_DEEP = f"nested more than {_DEEPEST} deep"


class _Loader(yaml.SafeLoader):
    """Safe, with numbers that are written as YAML 1.2 and JSON write them, and no key twice in a mapping.

    YAML 1.1 takes 12:00:00 for 43,200 (base 60), 0123 for 83, 1_2 for 12 and 2026-11-26 for a date.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that is given twice: the first value would be lost without a word."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"key {key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return node


_OTHERWISE = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OTHERWISE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_OTHERWISE[0], re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """The plain values in a text. Raises ValueError, with one line, where it is no YAML or holds too much."""
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except Exception as error:  # of a value that is not what its tag says (!!timestamp x) PyYAML raises anything
        raise ValueError(f"a value is not of its tag: {first_line(error)}") from None
    layer, nodes = [tree], 0
    for _ in range(_DEEPEST):
        nodes += len(layer)
        if nodes > _MOST_NODES:  # an alias counts as often as it stands there
            raise ValueError(f"more than {_MOST_NODES:,} values")
        layer = [below for node in layer for below in _below(node)]
        if not layer:
            return tree
    raise ValueError(_TOO_DEEP)


def _below(node: Any) -> list[Any]:
    return [*node.keys(), *node.values()] if isinstance(node, dict) else node if isinstance(node, list) else []
