"""The errors people see. Each message names the input, the reason and the next step.

    PipelineError
    ├── SettingError     a setting is missing, malformed or contradicts another
    ├── RecordError      a reading is not what the wire format says
    ├── ServiceError     PostgreSQL, the broker, Connect or Dagster cannot be used
    ├── DriftError       what runs differs from what is configured, and may not be changed in silence
    ├── BusyError        something that may exist once exists already (a producer, a keeper, a port)
    └── InstallError     the machine or a download is not fit to run the embedded stack

Library errors are caught only where one of these can say more; the cause is kept (`raise … from`).
"""


class PipelineError(Exception):
    """Base of all errors that are shown without a traceback; exit code 1."""

    exit_code = 1


class SettingError(PipelineError):
    """A setting is missing, malformed or contradicts another; the message begins with its name."""

    exit_code = 2


class RecordError(PipelineError):
    """A reading is refused.

    Attributes:
        reason: a short code for counting, such as `bad_uuid`; one of `metric.REASONS`, or `bad_line` of a replayed file.
        detail: what was wrong with which field.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class ServiceError(PipelineError):
    """PostgreSQL, the broker, Connect or Dagster cannot be reached or refused what was asked."""


class DriftError(PipelineError):
    """A running part differs from its configuration in a way that is not mended without being asked."""


class BusyError(PipelineError):
    """What may exist only once exists already."""


class InstallError(PipelineError):
    """The machine or a download is not fit to run the embedded stack."""
