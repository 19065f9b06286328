"""The menu of feed-forwards (FFNS): one row each, a file each, as the mixers'."""

from typing import Any

from smedjan_common.model.ffns import experts, swiglu
from smedjan_common.model.spec import FfnSpec

FFNS: dict[str, FfnSpec[Any]] = {row.name: row for row in (swiglu.ROW, experts.ROW)}
