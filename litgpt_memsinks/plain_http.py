"""Streaming chunks from S3-compatible stores without TLS, ``http://``, as MinIO and Ceph often are inside a cluster.

Recent releases of litdata fetch chunks with obstore, which refuses ``http://`` unless told otherwise, and litdata has
no setting for that. Here they come through boto3, with which litdata fetches its index anyway.
"""

import asyncio
import os
import threading
from typing import Any

from litdata.streaming.downloader import S3Downloader, register_downloader


class BotoDownloader(S3Downloader):
    """The downloader of litdata, with boto3 for the chunks too."""

    def download_file(self, remote_filepath: str, local_filepath: str) -> None:
        """Download one file. Safe to call from several threads and processes at once."""
        if os.path.exists(local_filepath):
            return
        scratch = f"{local_filepath}.tmp.{os.getpid()}.{threading.get_ident()}"
        try:
            with open(scratch, "wb") as file:
                self.download_fileobj(remote_filepath, file)
            os.replace(scratch, local_filepath)
        finally:
            if os.path.exists(scratch):
                os.remove(scratch)

    async def adownload_file(self, remote_filepath: str, local_filepath: str) -> None:
        """Download one file in a thread."""
        await asyncio.to_thread(self.download_file, remote_filepath, local_filepath)


def is_plain_http(storage_options: dict[str, Any] | None) -> bool:
    """Whether boto3 would speak ``http://``, by ``storage_options``, the environment or the AWS profile."""
    import boto3

    options = {key: value for key, value in (storage_options or {}).items() if key != "data_connection_id"}
    endpoint: str = boto3.Session().client("s3", **options).meta.endpoint_url
    return endpoint.startswith("http://")


def use_boto(worker: int = 0) -> None:
    """Have this process download ``s3://`` through boto3. Also a ``worker_init_fn``, whose argument is not used."""
    register_downloader("s3://", BotoDownloader, overwrite=True)
