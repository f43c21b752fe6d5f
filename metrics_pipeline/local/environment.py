"""The env file that the first `up` writes, and the environments of child processes."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from dotenv import dotenv_values, set_key

from metrics_pipeline.errors import InstallError
from metrics_pipeline.settings import Settings, env_file

SECRETS = tuple(name.upper() for name in Settings.group("secrets"))
