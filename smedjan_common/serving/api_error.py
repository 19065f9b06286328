"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`, always an object, with a fitting status.

Clients try 408, 409, 429 and 5xx again by themselves, twice; `x-should-retry: false` keeps them from it where it cannot help.
"""

from typing import Any, NamedTuple


class Status(NamedTuple):
    """What an error of a status is called. retry: whether the same request may succeed later; None leaves that to the client."""

    type: str
    code: str | None = None
    retry: bool | None = None


STATUSES = {
    400: Status("invalid_request_error"),
    401: Status("authentication_error", "invalid_api_key"),
    403: Status("permission_error", "forbidden"),
    404: Status("invalid_request_error", "not_found"),
    405: Status("invalid_request_error", "method_not_allowed"),
    408: Status("timeout_error", "request_timeout", retry=False),
    413: Status("invalid_request_error", "body_too_large"),
    429: Status("rate_limit_error", "rate_limit_exceeded", retry=True),
    500: Status("server_error", "internal_error", retry=False),
    503: Status("server_error", "unavailable", retry=True),
}


class ApiError(Exception):
    """An answer that is an error. param: the field of the request it is about. retry_after: seconds."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after
        self.code = code or STATUSES[status].code

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": self.message, "type": STATUSES[self.status].type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What clients read before they try again."""
        again = STATUSES[self.status].retry
        found = {} if again is None else {"x-should-retry": str(again).lower()}
        return found | ({} if self.retry_after is None else {"retry-after": str(self.retry_after)})


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """A request that cannot be answered, because of its field `param`."""
    return ApiError(400, message, param, code)
