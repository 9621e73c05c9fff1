"""YAML without what it does silently: two values for one key, numbers that are other numbers, merges without end.

PyYAML reads YAML 1.1, where 017 is 15 and 1:30 is 90. Nobody means that in a file of knobs.
"""

import re

import yaml

MOST_MERGED = 10_000  # pairs of keys and values that `<<` may bring into one mapping
OTHER_NUMBERS = re.compile(r"[-+]?(0[0-7_]+|0[bB].*|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


class StrictLoader(yaml.SafeLoader):
    """Raises yaml.YAMLError where SafeLoader would take the last of equal keys, or a number for what it seems not."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._flattened: set[int] = set()  # nodes, which an alias brings again with what was merged into them

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if id(node) not in self._flattened:
            self._require_once(node)
            self._flattened.add(id(node))
        super().flatten_mapping(node)
        if len(node.value) > MOST_MERGED:
            raise yaml.constructor.ConstructorError(None, None, "too many keys are merged by <<", node.start_mark)

    def _require_once(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value[:80]} stands here twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)

    def _number(self, node: yaml.ScalarNode) -> int | float:
        if OTHER_NUMBERS.fullmatch(node.value):
            problem = f"{node.value[:80]} is another number in YAML than it seems; write it in plain decimals"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        whole = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader._number)
StrictLoader.add_constructor("tag:yaml.org,2002:float", StrictLoader._number)
