"""Checking plain data against a JSON Schema that ships with the package: the part of draft 2020-12 that our schemas use.

Unlike a general validator it says for each problem what was found, what is accepted and where, and refuses a keyword it does not know, so
that a schema cannot promise what is not checked.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
_KNOWN = frozenset(
    {"$schema", "$id", "$defs", "$ref", "title", "description", "type", "properties", "required", "additionalProperties", "items"}
    | {"enum", "const", "minimum", "maximum", "minItems", "maxItems"}
)


def schema_problems(data: Any, schema: Mapping[str, Any]) -> list[str]:
    """Return everything in which data do not follow a schema, each problem with its place.

    Parameters
    ----------
    data : object
        As `json.loads` returns it.
    schema : mapping

    Returns
    -------
    list of str
        Empty if there is none.
    """
    return _problems(data, schema, schema, "")


def _problems(data: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> list[str]:
    unknown = set(schema) - _KNOWN
    assert not unknown, f"the schema uses {unknown}, which nothing checks"
    if "$ref" in schema:
        return _problems(data, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, where)
    place = where or "the file"
    kinds = schema.get("type")
    if kinds is not None:
        names = [kinds] if isinstance(kinds, str) else list(kinds)
        if not any(_is(data, n) for n in names):
            return [f"{place}: expected {' or '.join(names)}, found {reprlib.repr(data)}"]
    if isinstance(data, float) and not math.isfinite(data):
        return [f"{place}: {data} is no finite number"]
    found = _value(data, schema, place)
    if isinstance(data, dict):
        found += _object(data, schema, root, where)
    if isinstance(data, list) and "items" in schema:
        for i, value in enumerate(data):
            found += _problems(value, schema["items"], root, f"{where}[{i}]")
    return found


def _value(data: Any, schema: Mapping[str, Any], place: str) -> list[str]:
    found = []
    if "const" in schema and data != schema["const"]:
        found.append(f"{place}: expected {schema['const']!r}, found {reprlib.repr(data)}")
    if "enum" in schema and data not in schema["enum"]:
        found.append(f"{place}: expected one of {', '.join(map(str, schema['enum']))}, found {reprlib.repr(data)}")
    if _is(data, "number") and data < schema.get("minimum", -math.inf):
        found.append(f"{place}: {data} is below {schema['minimum']}")
    if _is(data, "number") and data > schema.get("maximum", math.inf):
        found.append(f"{place}: {data} is above {schema['maximum']}")
    if isinstance(data, list):
        least, most = schema.get("minItems", 0), schema.get("maxItems", math.inf)
        if not least <= len(data) <= most:
            bounds = f"{least} or more" if most == math.inf else f"{least}" if least == most else f"{least} to {most}"
            found.append(f"{place}: expected {bounds} values, found {len(data)}")
    return found


def _object(data: dict[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> list[str]:
    properties = schema.get("properties", {})
    prefix = f"{where}." if where else ""
    found = [f"{prefix}{name}: missing" for name in schema.get("required", ()) if name not in data]
    extra = schema.get("additionalProperties", True)
    for name, value in data.items():
        if name in properties:
            found += _problems(value, properties[name], root, f"{prefix}{name}")
        elif extra is False:
            found.append(f"{prefix}{name}: unknown key; accepted are {', '.join(properties)}")
        elif isinstance(extra, Mapping):
            found += _problems(value, extra, root, f"{prefix}{name}")
    return found


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind])
