"""When this program was made: the present is not before that. Pure.

In a checkout this is a date of the past. A package sets it to its own date (SOURCE_DATE_EPOCH), see `packaging/debian/rules`.
"""

from datetime import UTC, datetime

BUILT = datetime.fromtimestamp(1767225600, UTC)  # 1 January 2026
