"""Pages of the REST reference from docs/openapi.json: one for each tag, one for the schemas, an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

INDEX: Final = """# REST

Every route, from the gateway's OpenAPI document, which is [here](../../openapi.json) for programs. Keys, limits, errors
and paging are explained in [REST](../../api.md). A running gateway has the same at `/docs`, to be tried.

"""
Document = dict[str, Any]


def pages(document: Document) -> dict[str, str]:
    """Markdown by the page's name."""
    routes = [
        (tag_of(operation), method, path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    tags = sorted({tag for tag, *_ in routes})
    made = {
        tag: f"# {title(tag)}\n\n" + "\n".join(_operation(*route) for name, *route in routes if name == tag)
        for tag in tags
    }
    table = "| route | | |\n|---|---|---|\n" + "\n".join(
        f"| [`{method.upper()} {path}`]({tag}.md#{anchor(operation)}) | {operation['summary']} | {_first(operation)} |"
        for tag, method, path, operation in routes
    )
    schemas = "# Schemas\n\n" + "\n".join(
        _schema(name, schema) for name, schema in document["components"]["schemas"].items()
    )
    return made | {"index": INDEX + table + "\n", "schemas": schemas}


def tag_of(operation: Document) -> str:
    return operation["tags"][0].lower()


def title(tag: str) -> str:
    return "OpenAI's routes" if tag == "openai" else tag.capitalize()


def anchor(operation: Document) -> str:
    """Anchor of an operation's heading."""
    return operation["summary"].lower().replace(" ", "-")


def shown(name: str) -> str:
    """A schema's name for people: `Page_Job_` is a page of Job."""
    if not name.startswith("Page_"):
        return name
    return "Page of objects" if "dict" in name else f"Page of {name[5:-1]}"


def _first(operation: Document) -> str:
    return _cell(operation.get("description", "").split("\n\n")[0])


def _cell(text: str) -> str:
    """Text that fits a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _operation(method: str, path: str, operation: Document) -> str:
    parts = [f"## {operation['summary']}", f"`{method.upper()} {path}`", operation.get("description", "")]
    parameters = operation.get("parameters", [])
    if parameters:
        parts += ["| parameter | in | type | |\n|---|---|---|---|\n" + "\n".join(map(_parameter, parameters))]
    if body := operation.get("requestBody"):
        parts += ["**Body:** " + ", ".join(_media(body["content"]))]
    for status, response in operation["responses"].items():
        gives = ", ".join(_media(response.get("content", {})))
        meaning = "Errors" if status == "default" else status
        parts += [f"**{meaning}:** {gives or response['description']}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _parameter(parameter: Document) -> str:
    about = parameter.get("description", "")
    needed = " (required)" if parameter.get("required") else ""
    type_ = _type(parameter["schema"])
    return f"| `{parameter['name']}` | {parameter['in']}{needed} | {type_} | {_cell(about)} |"


def _media(content: Document) -> Iterator[str]:
    for kind, media in content.items():
        yield f"`{kind}` {_type(media.get('schema', {}))}".rstrip()


def _schema(name: str, schema: Document) -> str:
    parts = [f"## {shown(name)}", schema.get("description", "")]
    if fields := schema.get("properties"):
        required = schema.get("required", [])
        rows = [_field(field, value, field in required) for field, value in fields.items()]
        parts += ["| field | type | default | |\n|---|---|---|---|\n" + "\n".join(rows)]
    elif not schema.get("description"):
        parts += [_type(schema)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _field(name: str, schema: Document, is_required: bool) -> str:
    default = "required" if is_required else f"`{json.dumps(schema['default'])}`" if "default" in schema else ""
    return f"| `{name}` | {_type(schema)} | {_cell(default)} | {_cell(schema.get('description', ''))} |"


def _type(schema: Document) -> str:
    """A schema in a few words, with links to those that have a name."""
    if ref := schema.get("$ref"):
        name = ref.rpartition("/")[2]
        return f"[{shown(name)}](schemas.md#{shown(name).lower().replace(' ', '-')})"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[key]))
    if "allOf" in schema:
        return " and ".join(_type(one) for one in schema["allOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    return f"{schema.get('type', 'anything')}{_limits(schema)}"


def _limits(schema: Document) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    return f" {', '.join(limits)}" if limits else ""
