"""The messages of a chat request: roles and texts, whatever form clients give them."""

from typing import Any

from smedjan_common.serving.api_error import refused
from smedjan_common.serving.fields import kind
from smedjan_common.text.cuts import mend_surrogates

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}  # developer: OpenAI's newer name
MOST_MESSAGES = 4096


def read_messages(value: Any) -> list[dict[str, str]]:
    """[{"role", "content"}], content joined where it comes in parts, null as nothing. Raises ApiError."""
    if not isinstance(value, list) or not value:
        raise refused("messages", "messages must be an array of at least one message.")
    if len(value) > MOST_MESSAGES:
        raise refused("messages", f"messages has {len(value)} messages, and {MOST_MESSAGES} are the most.")
    return [_message(each, f"messages[{i}]") for i, each in enumerate(value)]


def _message(value: Any, at: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise refused(at, f"{at} must be an object, and is {kind(value)}.")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else kind(role)
        raise refused(f"{at}.role", f"{at}.role is {shown}, and must be one of {', '.join(ROLES)}.")
    if calls := [name for name in ("tool_calls", "function_call", "audio") if value.get(name)]:
        raise refused(f"{at}.{calls[0]}", f"{at}.{calls[0]} asks for what this server does not do.", "unsupported_parameter")
    return {"role": ROLES[role], "content": _text(value.get("content"), f"{at}.content")}


def _text(value: Any, at: str) -> str:
    """A string, null, or parts that are texts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return mend_surrogates(value)
    if not isinstance(value, list):
        raise refused(at, f"{at} must be a string or an array of parts, and is {kind(value)}.")
    return mend_surrogates("".join(_part(each, f"{at}[{i}]") for i, each in enumerate(value)))


def _part(value: Any, at: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise refused(at, f"{at} must be an object, and is {kind(value)}.")
    if value.get("type") not in ("text", "input_text", "output_text"):
        shown = repr(value["type"][:40]) if isinstance(value.get("type"), str) else kind(value.get("type"))
        raise refused(f"{at}.type", f"{at}.type is {shown}, and this model reads text alone.", "unsupported_parameter")
    if not isinstance(value.get("text"), str):
        raise refused(f"{at}.text", f"{at}.text must be a string, and is {kind(value.get('text'))}.")
    return value["text"]
