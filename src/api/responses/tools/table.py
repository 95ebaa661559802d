"""The tools of a Responses request. Tools in a namespace are offered under joined names.

`{"type": "namespace", "name": "crm", "tools": [{"type": "function", "name": "find"}]}` becomes the function
`crm__find`; a call of it is returned as `{"name": "find", "namespace": "crm"}`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from gptoss.api.hosted.entries import ENTRIES, WEB_SEARCH, PlacedEntry, read_entry
from gptoss.api.hosted.names import hashed_name, joined_name
from gptoss.api.hosted.service import Prepared
from gptoss.api.http.errors import InvalidRequest, from_validation
from gptoss.api.http.fields import Strict
from gptoss.api.http.tool_choice import CustomDefinition, FunctionDefinition
from gptoss.api.responses.tools.calls import CallKind
from gptoss.api.responses.tools.client_tools import KINDS, ClientTool, shown_as
from gptoss.api.telemetry.warn_once import WarnOnce
from gptoss.generation.request import FunctionTool
from gptoss.harmony.conversation import FreeText

MAX_FUNCTIONS = 1024  # with those inside namespaces
T = TypeVar("T", bound=Strict)
Place = tuple[int | str, ...]
_CHOOSABLE = ("function", "custom", "namespace", *KINDS)
logger = logging.getLogger(__name__)
_warn_left_out = WarnOnce(logger, "tools of type %s are not offered to the model: no client runs them", limit=100)


class FunctionEntry(FunctionDefinition):
    type: Literal["function"] = "function"


class InputFormat(Strict):
    """`syntax` and `definition` are there where the type is `grammar`: see read_tools."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None


class CustomEntry(CustomDefinition):
    type: Literal["custom"] = "custom"
    format: InputFormat | None = None

    @property
    def free_text(self) -> FreeText:
        if self.format is None or self.format.type == "text":
            return FreeText()
        return FreeText(self.format.syntax, self.format.definition or "")


Entry = FunctionEntry | CustomEntry | ClientTool


class NamespaceTool(Strict):
    type: Literal["namespace"]
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    tools: Annotated[list[Any], Field(max_length=MAX_FUNCTIONS)]


@dataclass(frozen=True, slots=True)
class Offered:
    """One tool that the model may see, and the field of the request that holds it."""

    where: str
    tool: Entry
    namespace: str | None = None
    introduction: str | None = None  # the namespace's description, with its first tool


@dataclass(slots=True)
class ToolTable:
    """What a request offers, by the names that the model uses and by those that the client uses."""

    offered: dict[str, Offered] = field(default_factory=dict)  # by the model's name
    shown: list[dict[str, Any]] = field(default_factory=list)  # as the response repeats them
    hosted: Prepared | None = None  # what the server runs
    _names: dict[tuple[str | None, str], str] = field(default_factory=dict)  # the client's: model's

    def add(self, one: Offered) -> None:
        """Adds a tool. Raises InvalidRequest if it is there already."""
        key = (one.namespace, one.tool.name)
        if key in self._names:
            within = "" if one.namespace is None else f" in namespace {one.namespace!r}"
            raise InvalidRequest(
                f"Two tools are named {one.tool.name!r}{within}.", f"{one.where}.name", "invalid_value"
            )
        name = one.tool.name
        if one.namespace is not None:
            name = joined_name(one.namespace, name)
            if name in self.offered:
                name = hashed_name(one.namespace, one.tool.name)
        self._names[key] = name
        self.offered[name] = one

    def model_name(self, namespace: str | None, name: str) -> str:
        """The name under which the model calls a function.

        Without a namespace: the function of that name, or the only one of that name in a namespace.
        """
        known = self._names.get((namespace, name))
        if known is not None:
            return known
        if namespace is not None:
            return joined_name(namespace, name)
        within = [flat for (_, child), flat in self._names.items() if child == name]
        return within[0] if len(within) == 1 and name not in self.offered else name

    def kind_of(self, name: str) -> CallKind:
        """The kind of the tool that the model calls by this name."""
        one = self.offered.get(name)
        return "function" if one is None else one.tool.type

    def client_name(self, name: str) -> dict[str, str]:
        """The fields of a call that name what the model called."""
        one = self.offered.get(name)
        if one is None or one.namespace is None:
            return {"name": name}
        return {"name": one.tool.name, "namespace": one.namespace}

    def in_namespace(self, namespace: Any) -> list[str]:
        """The model's names of its functions."""
        return [name for name, one in self.offered.items() if one.namespace == namespace]

    def namespaces_of(self, name: str) -> list[str]:
        """Those that have a function of this name."""
        return [space for space, child in self._names if child == name and space is not None]

    def functions(self) -> list[FunctionTool]:
        """All tools as functions, under the names that the model uses."""
        hosted = self.hosted.functions if self.hosted is not None else ()
        return [*(_shown(name, one) for name, one in self.offered.items()), *hosted]

    def where(self, index: int) -> str:
        """The field of the request that holds `functions()[index]`."""
        hosted = self.hosted.where if self.hosted is not None else ()
        fields: list[str] = [*(one.where for one in self.offered.values()), *hosted]
        return fields[index]


def hosted_entries(tools: Sequence[Any], runs: Callable[[str], bool]) -> list[PlacedEntry]:
    """The tools that this server runs. Raises InvalidRequest. `runs`: whether it runs those of a type."""
    found: list[PlacedEntry] = []
    for index, given in enumerate(tools):
        where = f"tools[{index}]"
        kind = _kind(given, where)
        if kind in ENTRIES and runs(kind):
            found.append(PlacedEntry(where, read_entry(given, where, ("tools", index))))
    return found


def read_tools(tools: Sequence[Any], hosted: Prepared | None = None) -> ToolTable:
    """The tools of a request. Raises InvalidRequest. `hosted`: what the server runs of them.

    Clients offer tools that OpenAI runs with every request and can do without: these are left out with a warning.
    """
    table, namespaces = ToolTable(hosted=hosted), []
    entries = hosted.entries if hosted is not None else {}
    for index, given in enumerate(tools):
        where, place = f"tools[{index}]", ("tools", index)
        if where in entries:
            table.shown.append(entries[where].shown())
            continue
        if _kind(given, where) == "namespace":
            group = _validated(NamespaceTool, given, place)
            children = _children(group, index)
            namespaces += children
            table.shown.append(group.model_dump() | {"tools": [_dump(child.tool) for child in children]})
            continue
        tool = _entry(given, where, place)
        if tool is not None:
            table.add(Offered(where, tool))
            table.shown.append(_dump(tool))
    for child in namespaces:  # after the others, whose names stay as they are
        table.add(child)
    if len(table.offered) > MAX_FUNCTIONS:
        text = f"'tools' offers {len(table.offered)} functions; at most {MAX_FUNCTIONS} are allowed."
        raise InvalidRequest(text, "tools", "array_above_max_length")
    return table


def _children(group: NamespaceTool, index: int) -> list[Offered]:
    children: list[Offered] = []
    for inner, given in enumerate(group.tools):
        where = f"tools[{index}].tools[{inner}]"
        tool = _entry(given, where, ("tools", index, "tools", inner), within_namespace=True)
        if tool is not None:
            introduction = None if children else group.description
            children.append(Offered(where, tool, group.name, introduction))
    return children


def _entry(given: Any, where: str, place: Place, *, within_namespace: bool = False) -> Entry | None:
    """The tool; None for one that the client does not run."""
    kind = _kind(given, where)
    if kind == "function":
        return _validated(FunctionEntry, given, place)
    if kind == "custom":
        tool = _validated(CustomEntry, given, place)
        _check_format(tool.format, where)
        return tool
    if kind in KINDS and not within_namespace:
        client_tool = _validated(ClientTool, given, place)
        if not client_tool.is_hosted:
            return client_tool
        kind = f"{kind} in a container"
    _warn_left_out([kind])
    return None


def _check_format(wanted: InputFormat | None, where: str) -> None:
    if wanted is None or wanted.type == "text":
        return
    for name in ("syntax", "definition"):
        if getattr(wanted, name) is None:
            missing = f"{where}.format.{name}"
            raise InvalidRequest(f"Missing required parameter: '{missing}'.", missing, "missing_required_parameter")


def _dump(tool: Entry) -> dict[str, Any]:
    """A tool as the response repeats it."""
    return tool.model_dump(exclude_none=isinstance(tool, ClientTool))


def _kind(tool: Any, where: str) -> str:
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    if not isinstance(kind, str):
        raise InvalidRequest("A tool is an object with a type.", where, "invalid_type")
    return kind


def _validated(model: type[T], given: Any, within: Place) -> T:
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        raise from_validation(error, within) from None


def _shown(name: str, one: Offered) -> FunctionTool:
    """The tool under the name that the model uses."""
    tool = one.tool
    if isinstance(tool, ClientTool):
        return shown_as(tool.type)
    description = "\n\n".join(filter(None, (one.introduction, tool.description))) or None
    label = f"'{tool.name}'" + ("" if one.namespace is None else f" of namespace '{one.namespace}'")
    if isinstance(tool, CustomEntry):
        return FunctionTool(name, description, label=label, free_text=tool.free_text)
    return FunctionTool(name, description, tool.parameters, bool(tool.strict), label)


def read_choice(choice: Any, table: ToolTable) -> Any:
    """`tool_choice` in chat's form, with the model's names.

    Values that are not valid are left for `read_tool_choice`.
    """
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") == "namespace":
        names = table.in_namespace(choice.get("name"))
        if not names:
            raise InvalidRequest(
                f"'tool_choice' names the namespace {choice.get('name')!r}, which offers no tool.",
                "tool_choice",
                "invalid_value",
            )
        return {"type": "allowed_tools", "mode": "required", "tools": [*map(_named, names)]}
    kind = choice.get("type")
    if table.hosted is not None and kind in ENTRIES:
        return _read_hosted_choice(choice, table.hosted)
    if kind in KINDS:
        return _named(_chosen_name(None, str(kind), table))
    if kind in ("function", "custom") and kind not in choice:
        name, namespace = choice.get("name"), choice.get("namespace")
        if isinstance(name, str) and isinstance(namespace, str | None):
            name = _chosen_name(namespace, name, table)
        return _named(name)
    return _read_allowed(choice, table) if choice.get("type") == "allowed_tools" else choice


def _read_hosted_choice(choice: Mapping[str, Any], hosted: Prepared) -> Any:
    """A choice of a tool that the server runs: one of its functions is called.

    A server that cannot be reached leaves the model free.
    """
    kind, label = choice.get("type"), choice.get("server_label")
    if kind != "mcp":
        kinds = WEB_SEARCH if kind in WEB_SEARCH else (str(kind),)  # types of one tool
        names = next((hosted.recipients[one] for one in kinds if one in hosted.recipients), [])
    elif not any(one.label == label for one in hosted.listings):
        text = f"'tool_choice' names the MCP server {label!r}, which is not in 'tools'."
        raise InvalidRequest(text, "tool_choice.server_label", "invalid_value")
    else:
        tool = choice.get("name")
        names = hosted.names_of(str(label), tool if isinstance(tool, str) else None)
        is_down = any(one.label == label and one.failure is not None for one in hosted.listings)
        if not names and is_down:
            return "auto"
    if not names:
        raise InvalidRequest("'tool_choice' names a tool that is not in 'tools'.", "tool_choice", "invalid_value")
    return {"type": "allowed_tools", "mode": "required", "tools": [*map(_named, names)]}


def _read_allowed(choice: Mapping[str, Any], table: ToolTable) -> Any:
    """Tools that are not offered are left out."""
    inner = choice.get("allowed_tools")  # chat's form
    flat = {**choice, **inner} if isinstance(inner, Mapping) else {**choice}
    flat.pop("allowed_tools", None)
    tools = flat.get("tools")
    if not isinstance(tools, list):
        return choice
    allowed: list[Any] = []
    for tool in tools:
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if isinstance(kind, str) and table.hosted is not None and kind in ENTRIES:
            read = read_choice(tool, table)
            allowed += read["tools"] if isinstance(read, Mapping) else []
            continue
        if isinstance(kind, str) and (kind not in _CHOOSABLE or (kind in KINDS and kind not in table.offered)):
            _warn_left_out([kind])
            continue
        read = read_choice(tool, table)
        allowed += read["tools"] if kind == "namespace" else [read]
    if tools and not allowed and flat.get("mode", "auto") == "auto":
        return "none"
    if tools and not allowed:
        raise InvalidRequest(
            "'tool_choice' allows none of the tools that are offered to the model.",
            "tool_choice",
            "invalid_value",
        )
    return flat | {"tools": allowed}


def _chosen_name(namespace: str | None, name: str, table: ToolTable) -> str:
    model_name = table.model_name(namespace, name)
    if model_name in table.offered:
        return model_name
    within = table.namespaces_of(name) if namespace is None else []
    if within:
        raise InvalidRequest(
            f"'tool_choice' names {name!r}, which the namespaces {', '.join(map(repr, within))} have: add 'namespace'.",
            "tool_choice",
            "invalid_value",
        )
    of = "" if namespace is None else f" of namespace {namespace!r}"
    raise InvalidRequest(f"'tool_choice' names {name!r}{of}, which is not in 'tools'.", "tool_choice", "invalid_value")


def _named(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}
