"""Types of flags that may be left out. Spelled with typing.Optional: for `int | None` tyro imports typeguard, which takes 70 ms."""

from typing import Optional

MaybeInt = Optional[int]  # noqa: UP045
MaybeFloat = Optional[float]  # noqa: UP045
MaybeStr = Optional[str]  # noqa: UP045
