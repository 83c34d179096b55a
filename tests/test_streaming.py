"""Training from an object store: a real S3-compatible server on the loopback, the real console script."""

import datetime
import importlib.util
import ipaddress
import json
import re
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
import requests
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from litgpt import GPT, Config
from litgpt.utils import save_config
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.server import ThreadedMotoServer
from werkzeug.serving import make_server

from litgpt_memsinks import MemSinksData, remote
from litgpt_memsinks.errors import MemSinksError
from litgpt_memsinks.prepare.manifest import Manifest
from litgpt_memsinks.prepare.prepare import prepare
from tests.console import BOTH, TINY_MODEL, litgpt, logged, memsinks, pretrain_arguments, run, started

B, T = 2, 16


@pytest.fixture(scope="module")
def server():
    """The server's URL."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory):
    """A server's https:// URL and the file of its certificate."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    today = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(encoding))
    (folder / "key.pem").write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    server = make_server(
        "127.0.0.1",
        0,
        DomainDispatcherApplication(create_backend_app),
        threaded=True,
        request_handler=MotoRequestHandler,
        ssl_context=(str(folder / "certificate.pem"), str(folder / "key.pem")),
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}", folder / "certificate.pem"
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def chunked(tmp_path_factory, corpus_dir, tokenizer_dir):
    """A prepared folder of many chunks."""
    folder = tmp_path_factory.mktemp("chunked") / "data"
    prepare(
        train=corpus_dir / "train.jsonl",
        validation=corpus_dir / "validation.jsonl",
        tokenizer_dir=tokenizer_dir,
        out_dir=folder,
        repeated_documents=8,
        repeats=6,
        chunk_bytes=60_000,
    )
    assert len(list((folder / "train").glob("*.bin"))) > 4
    return folder


@pytest.fixture
def environment(server, tmp_path):
    """What a user sets, and nothing of the machine: a fresh cache outside the home folder, no AWS profile."""
    return {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "LITDATA_CACHE_DIR": str(tmp_path / "cache"),
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def here(monkeypatch, environment):
    """The same for this process."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # litdata reads its variable when it is imported
    monkeypatch.setattr("litdata.utilities.dataset_utilities._LITDATA_CACHE_DIR", environment["LITDATA_CACHE_DIR"])
    return Path(environment["LITDATA_CACHE_DIR"])


class Bucket:
    """A bucket of its own for each test."""

    def __init__(self, server, name):
        self.client = boto3.client(
            "s3",
            endpoint_url=server,
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )
        self.name = name
        self.client.create_bucket(Bucket=name)

    def upload(self, folder, prefix="prepared"):
        """Copy a folder there and return its URL."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{self.name}/{prefix}"

    def put(self, key, content):
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    def delete(self, key):
        self.client.delete_object(Bucket=self.name, Key=key)


@pytest.fixture
def bucket(server, request):
    return Bucket(server, re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:60].strip("-"))


def rows(data_path, split, num_workers=0, **settings):
    data = MemSinksData(data_path=data_path, num_workers=num_workers, seed=7, **settings)
    data.connect(batch_size=B, max_seq_length=T)
    return torch.stack(list(getattr(data, f"{split}_dataloader")()))


def check(data_path, **settings):
    data = MemSinksData(data_path=data_path, **settings)
    return data, data.check(padded_vocab_size=512, block_size=T, batch_size=B)


def refusal(data_path, **settings):
    with pytest.raises(MemSinksError) as caught:
        check(data_path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def failure(result):
    """The one line with which a command failed."""
    assert result.returncode == 1, result.stdout[-3000:]
    assert "Traceback" not in result.stdout, result.stdout[-3000:]
    return result.stdout.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------- training


def test_stock_command_trains_from_a_bucket_as_from_disk(bucket, chunked, environment, tmp_path):
    settings = {"iterations": 3, "data__num_workers": 1, "eval__interval": 2, "eval__max_iters": 1}
    url = bucket.upload(chunked)
    with ThreadPoolExecutor() as pool:
        remote_run = pool.submit(litgpt, *pretrain_arguments(tmp_path / "remote", url, **settings), **environment)
        litgpt(*pretrain_arguments(tmp_path / "local", chunked, **settings))
        remote_run.result()
    assert len(logged(tmp_path / "remote")) == 3
    for column in ("loss", "val_loss"):
        assert logged(tmp_path / "remote", column) == logged(tmp_path / "local", column)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "remote/final" / name).read_bytes() == (chunked / "tokenizer" / name).read_bytes()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_rows_are_those_on_disk(here, bucket, chunked, split, num_workers):
    url = bucket.upload(chunked)
    streamed = rows(url, split, num_workers)
    assert len(streamed) > 100
    assert torch.equal(streamed, rows(chunked, split, num_workers))
    assert torch.equal(streamed, rows(url + "/", split, num_workers))  # and again, from the cache


def test_rows_over_tls_are_those_on_disk(here, chunked, tls_server, monkeypatch):
    """The way to AWS itself: recent releases of litdata take another client for it."""
    url, certificate = tls_server
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    path = Bucket(url, "tls").upload(chunked)
    check(path)
    assert not MemSinksData(data_path=path)._prepare_process(f"{path}/train")
    assert torch.equal(rows(path, "train", num_workers=1), rows(chunked, "train", num_workers=1))


@pytest.mark.long
def test_workers_that_are_not_forked_stream_too(here, bucket, chunked, tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(
        "import sys, torch\n"
        "from litgpt_memsinks import MemSinksData\n"
        "if __name__ == '__main__':\n"
        "    torch.multiprocessing.set_start_method('spawn')\n"
        "    data = MemSinksData(data_path=sys.argv[1], num_workers=1)\n"
        "    data.connect(batch_size=1, max_seq_length=64)\n"
        "    print(sum(1 for _ in data.val_dataloader()))\n"
    )
    result = run([script, bucket.upload(chunked)], imported=BOTH)
    assert int(result.stdout.split()[-1]) > 40


def test_storage_options_reach_every_request(here, bucket, chunked, server, monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    options = {"endpoint_url": server, "aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    url = bucket.upload(chunked)
    check(url, storage_options=options)
    assert torch.equal(rows(url, "val", storage_options=options), rows(chunked, "val"))
    assert "secret" not in repr(MemSinksData(storage_options=options))


# ------------------------------------------------------------------------------------------------------ the small files


def test_check_reads_what_is_there_now(here, bucket, prepared):
    url = bucket.upload(prepared)
    data, manifest = check(url)
    assert manifest == Manifest.read(prepared)
    assert (data.tokenizer_dir / "tokenizer.json").read_bytes() == (prepared / "tokenizer/tokenizer.json").read_bytes()
    assert MemSinksData(data_path=url).tokenizer_dir == data.tokenizer_dir
    assert here in data.tokenizer_dir.parents
    changed = json.loads((prepared / "memsinks.json").read_text()) | {"duplicates": 12345}
    bucket.put("prepared/memsinks.json", json.dumps(changed))
    assert check(url)[1].duplicates == 12345
    assert manifest == Manifest.read(data.tokenizer_dir.parent)  # what a run has read does not change under it


def test_many_processes_at_once_copy_one_whole_folder(here, bucket, prepared):
    url = bucket.upload(prepared)
    code = f"from litgpt_memsinks import MemSinksData; print(MemSinksData(data_path={url!r}).tokenizer_dir)"
    command = [sys.executable, "-c", code]
    with started(command) as one, started(command) as other:
        assert one.wait() == other.wait() == 0, one.output + other.output
        (folder,) = {one.output.strip(), other.output.strip()}
    assert (Path(folder) / "tokenizer.json").read_bytes() == (prepared / "tokenizer/tokenizer.json").read_bytes()
    assert list((here / "memsinks").iterdir()) == [Path(folder).parent]  # nothing half-written beside it


def test_race_for_the_copy_has_one_winner(here, tmp_path):
    files = {f"{number}/file": bytes([number]) * 10_000 for number in range(50)}
    barrier = threading.Barrier(4)

    def keep():
        barrier.wait()
        return remote._keep(files)

    with ThreadPoolExecutor(4) as pool:
        (folder,) = {future.result() for future in [pool.submit(keep) for _ in range(4)]}
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("*/*")} == files
    assert list(folder.parent.iterdir()) == [folder]


def test_cache_that_cannot_be_written_is_named(here, bucket, prepared):
    here.write_text("a file, not a folder")
    message = refusal(bucket.upload(prepared))
    assert str(here) in message
    assert "LITDATA_CACHE_DIR" in message


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda bucket: bucket.delete("prepared/memsinks.json"), "/prepared' has no memsinks.json: it holds a plain"),
        (lambda bucket: bucket.put("prepared/memsinks.json", b"{"), "/prepared/memsinks.json' is not JSON"),
        (lambda bucket: bucket.delete("prepared/val/index.json"), "/prepared/val/index.json' is missing"),
        (lambda bucket: bucket.put("prepared/tokenizer/tokenizer.json", b"{}"), "/prepared/tokenizer' did not make"),
        (lambda bucket: bucket.delete("prepared/tokenizer/tokenizer.json"), "/prepared/tokenizer' has no tokenizer"),
    ],
)
def test_half_copied_folder_is_refused_by_its_url(here, server, prepared, break_it, message):
    bucket = Bucket(server, f"half-{time.time_ns()}")
    url = bucket.upload(prepared)
    break_it(bucket)
    assert f"'s3://{bucket.name}{message}" in refusal(url)
    assert str(here) not in refusal(url)


def test_plain_or_narrow_chunks_are_refused(here, bucket, prepared):
    url = bucket.upload(prepared)
    index = json.loads((prepared / "train/index.json").read_text())
    index["config"]["data_format"] = ["no_header_tensor:20"]
    bucket.put("prepared/train/index.json", json.dumps(index))
    assert f"'{url}/train' holds no_header_tensor:20, not int32" in refusal(url)


@pytest.mark.parametrize(
    ("data_path", "message"),
    [
        ("http://host/prepared", "chunks stream from s3://, gs://, azure://, r2:// only"),
        ("hf://datasets/me/prepared", "chunks stream from s3://, gs://, azure://, r2:// only"),
        (Path("s3://bucket/prefix"), "Give a string like 's3://bucket/prefix', not a pathlib.Path"),
        ("s3:///prefix", "names no bucket"),
        ("r2://bucket/prefix", "data_connection_id is required"),
    ],
)
def test_url_that_cannot_stream_is_refused(here, data_path, message):
    assert message in refusal(data_path)


@pytest.mark.parametrize(
    ("scheme", "module", "package"),
    [("gs", "google.cloud.storage", "google-cloud-storage"), ("azure", "azure.storage.blob", "azure-storage-blob")],
)
def test_store_without_its_package_says_what_to_install(here, monkeypatch, scheme, module, package):
    name = {"gs": "_GOOGLE_STORAGE_AVAILABLE", "azure": "_AZURE_STORAGE_AVAILABLE"}[scheme]
    if importlib.util.find_spec(module.split(".")[0]) is not None:
        monkeypatch.setattr(f"litdata.streaming.downloader.{name}", False)
    assert refusal(f"{scheme}://bucket/prepared").endswith(f"pip install {package}")


def test_unknown_storage_option_is_named(here, bucket, prepared):
    message = refusal(bucket.upload(prepared), storage_options={"endpoint": "x"})
    assert "unexpected keyword argument 'endpoint'" in message
    assert "data.storage_options" in message


def test_file_that_the_store_denies_because_it_is_not_there(here, monkeypatch, bucket, prepared):
    """A key that may read but not list is told 403, not 404, of the tokenizer files that most tokenizers lack."""
    url = bucket.upload(prepared)
    lacking = {f"{url}/tokenizer/{name}" for name in ("tokenizer.model", "generation_config.json")}
    status, asked = remote._status, []

    def denying(error):
        asked.append(status(error))
        return 403 if asked[-1] == 404 else asked[-1]

    monkeypatch.setattr(remote, "_status", denying)
    check(url)
    assert len(asked) >= len(lacking)
    bucket.delete("prepared/memsinks.json")
    assert f"Reading '{url}/memsinks.json' is denied, or it is not there" in refusal(url)


@pytest.fixture
def strict_server(server):
    """The server, checking keys as AWS does."""
    requests.post(f"{server}/moto-api/reset-auth", data="0", timeout=10)
    yield server
    requests.post(f"{server}/moto-api/reset-auth", data="inf", timeout=10)


BAD_STORES = {
    "no bucket": ("s3://nowhere/prepared", {}, "There is no prepared data at 's3://nowhere/prepared'"),
    "no prefix": ("{url}/deeper", {}, "Check bucket and prefix, or copy a prepared folder there"),
    "no key": ("{url}", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "Unable to locate credentials"),
    "no profile": ("{url}", {"AWS_PROFILE": "me"}, "ProfileNotFound: The config profile (me) could not be found"),
    "no such endpoint": ("{url}", {"AWS_ENDPOINT_URL": "nonsense"}, "Invalid endpoint: nonsense"),
}


@pytest.mark.parametrize("case", sorted(BAD_STORES))
def test_bad_store_is_refused(case, here, server, prepared, monkeypatch):
    path, settings, message = BAD_STORES[case]
    url = Bucket(server, "bad-" + case.replace(" ", "-")).upload(prepared)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert message in refusal(path.format(url=url))
    assert not here.exists()


def test_endpoint_that_does_not_answer_ends_in_one_clear_line_soon(environment, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"  # nobody listens there
    arguments = pretrain_arguments(
        tmp_path / "out", "s3://bucket/prepared", data__storage_options=f"{{endpoint_url: '{endpoint}'}}"
    )
    error = failure(litgpt(*arguments, check=False, **environment))  # litdata itself would try for hours
    assert error.startswith("Error: 's3://bucket/prepared/memsinks.json' cannot be read (EndpointConnectionError")
    assert endpoint in error  # the setting goes before the environment
    assert not (tmp_path / "out/final").exists()


def test_wrong_key_is_refused(here, bucket, strict_server):
    message = refusal(f"s3://{bucket.name}/prepared")
    assert message.startswith(f"Reading 's3://{bucket.name}/prepared/memsinks.json' is denied")
    assert "Check the credentials" in message


def test_missing_chunk_ends_the_run(bucket, chunked, environment, tmp_path):
    """Not one line, but an end: litdata's own error, which names the file."""
    url = bucket.upload(chunked)
    for path in (chunked / "train").glob("*.bin"):
        bucket.delete(f"prepared/train/{path.name}")
    environment |= {"MAX_WAIT_TIME": "4", "FORCE_DOWNLOAD_TIME": "2"}  # older litdata waits two minutes
    result = litgpt(*pretrain_arguments(tmp_path / "out", url), check=False, **environment)
    assert result.returncode != 0
    assert re.search(r"404|hasn't been found", result.stdout)


def test_evaluate_asks_for_a_copy(tmp_path):
    config = Config(**TINY_MODEL)
    save_config(config, tmp_path)
    torch.save(GPT(config).state_dict(), tmp_path / "lit_model.pth")
    arguments = ["--checkpoint_dir", tmp_path, "--data_path", "s3://bucket/prepared"]
    error = failure(memsinks("evaluate", *arguments, check=False))
    assert "is a URL, but this command reads a folder on disk" in error
    assert "aws s3 sync" in error
