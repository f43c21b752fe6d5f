"""Answers of our own servers, believed only when they are ours: of the data folder that is meant."""

from __future__ import annotations

from urllib.parse import urlsplit

import requests

from metrics_pipeline import loopback
from metrics_pipeline.data_folder import HEADER, folder_id
from metrics_pipeline.settings import Settings


class ForeignAnswerError(Exception):
    """Somebody else answers: the part of another data folder, or another program."""


def ask(settings: Settings, url: str, timeout: float = 3) -> requests.Response:
    """The answer of one of our own servers: producer, COPY sink, exporter.

    Args:
        settings: whose data folder it has to be of.
        url: what to ask.
        timeout: seconds.

    Raises:
        requests.RequestException: there was none.
        ForeignAnswerError: it is somebody else's.
    """
    answer = loopback.get(url, timeout)
    theirs, ours = answer.headers.get(HEADER, ""), folder_id(settings)
    if theirs != ours:
        whose = "that of another data folder" if theirs else "not of this pipeline"
        raise ForeignAnswerError(
            f"what answers on {urlsplit(url).netloc} is {whose} ({settings.data_dir}): it is left alone"
        )
    return answer
