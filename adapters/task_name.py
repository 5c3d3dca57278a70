"""What a task may be called, wherever its name is read."""

from __future__ import annotations

import re

TASK_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
