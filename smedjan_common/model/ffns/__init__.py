"""The menu of feed-forwards (FFNS): one row each, a file each, as the mixers'."""

from smedjan_common.model.ffns import experts, swiglu
from smedjan_common.model.spec import FfnSpec

FFNS: dict[str, FfnSpec] = {row.name: row for row in (swiglu.ROW, experts.ROW)}
