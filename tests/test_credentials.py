"""No credential is written or shown: fields of a spec refuse them, messages and records mask them."""

import json
import sys

import pytest

from mosaic_dist.credentials import mask
from mosaic_dist.data.characters import character_tokenizer
from mosaic_dist.errors import UserError
from mosaic_dist.run import main
from mosaic_dist.spec import SpecError, override
from mosaic_dist.train import folder as folder_module
from mosaic_dist.train.folder import RunFolder
from tests.train.expert_run import run

SECRET = "wJal/rXU:tnFE@MI"
URLS = {
    f"s3://AKIAEXAMPLE:{SECRET}@bucket/data": "s3://***@bucket/data",
    f"s3://AKIAEXAMPLE:{SECRET}@bucket/data@v2": "s3://***@v2",
    f"sftp://user:{SECRET}@host:22/data": "sftp://***@host:22/data",
    f"sftp://:{SECRET}@host/data": "sftp://***@host/data",
    "https://wJalToken@host/data": "https://***@host/data",
    "https://b.s3.amazonaws.com/d?X-Amz-Credential=wJal&X-Amz-Signature=wJal&v=1": "https://b.s3.amazonaws.com/d"
    "?X-Amz-Credential=***&X-Amz-Signature=***&v=1",
    "https://a.blob.core.windows.net/d?sv=2024&sig=wJal%2F": "https://a.blob.core.windows.net/d?sv=2024&sig=***",
    "https://host/d?token=wJal": "https://host/d?token=***",
    "https://host/d?AWSAccessKeyId=wJal&access_key=wJal": "https://host/d?AWSAccessKeyId=***&access_key=***",
}
HARMLESS = (
    "s3://bucket/data@v2:1/x",
    "sftp://user@host:22/data",
    "sftp://host:22/data@v2",
    "azure-dl://container@account/data",
    "oci://bucket@namespace/data",
    "hf://datasets/owner/name@main",
    "https://host:8080/data?version=3&tokenizer=gpt2",
    "a folder/with:colons@and?token=x",
)


@pytest.mark.parametrize("url", URLS)
def test_urls_with_credentials_are_refused_by_every_field_and_masked_in_every_message(url):
    assert mask(url) == URLS[url]
    mixture = [{"path": "s3://bucket/web"}, {"path": url}]
    for changes, path in (
        ({"data.path": url}, r"data\.path"),
        ({"data.streams": mixture}, r"data\.streams\[1\]\.path"),
        ({"init_from": url}, "init_from"),
    ):
        with pytest.raises(SpecError, match=rf"{path}: .* AWS_SECRET_ACCESS_KEY") as caught:
            override(run, changes)
        assert "wJal" not in str(caught.value)
    assert "wJal" not in str(UserError(f"cannot fetch {url}/index.json")) + repr(UserError(url))


@pytest.mark.parametrize("url", HARMLESS)
def test_other_urls_are_left_as_they_are(url):
    assert mask(url) == url
    assert override(run, {"data.path": url}).data.path == url


def test_a_run_folder_masks_what_is_recorded_beside_the_run(tmp_path, monkeypatch):
    url = f"s3://AKIAEXAMPLE:{SECRET}@bucket/data"
    diff = f'+    path="{url}",\n+export AWS_SECRET_ACCESS_KEY=wJalr\n+HF_TOKEN="wJalr"\n+token = words'
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--data", url])
    monkeypatch.setattr(folder_module, "_git", lambda *words: diff if words[0] == "diff" else "")
    folder = RunFolder(tmp_path / "run")
    folder.claim(run)
    character_tokenizer("abc").save(tmp_path)
    config = {"comet": {"api_key": "wJalr"}, "train_batch_size": 8}
    folder.describe(run, config, {}, tmp_path / "tokenizer.json")
    written = {path.name: path.read_text() for path in folder.path.iterdir() if path.is_file()}
    assert {"run.yaml", "environment.json", "ds_config.json", "git.diff"} <= written.keys()
    assert [name for name, text in written.items() if "wJal" in text or "tnFE" in text] == []
    assert json.loads(written["environment.json"])["command"] == ["recipe.py", "--data", "s3://***@bucket/data"]
    assert json.loads(written["ds_config.json"]) == {"comet": {"api_key": "***"}, "train_batch_size": 8}
    assert written["git.diff"].splitlines() == [
        '+    path="s3://***@bucket/data",',
        "+export AWS_SECRET_ACCESS_KEY=***",
        '+HF_TOKEN="***"',
        "+token = words",
    ]


def test_a_run_yaml_that_holds_a_credential_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    text = override(run, {"data.path": "s3://bucket/data"}).to_yaml()
    folder.run_yaml.write_text(text.replace("s3://", f"s3://AKIAEXAMPLE:{SECRET}@"))
    with pytest.raises(UserError, match=r"run\.yaml: data\.path: 's3://\*\*\*@bucket/data' has credentials"):
        folder.claim(run)


def test_a_command_line_with_a_credential_ends_before_anything_is_written(tmp_path, monkeypatch, capsys):
    url = f"s3://AKIAEXAMPLE:{SECRET}@bucket/data"
    monkeypatch.chdir(tmp_path)
    for data in (url, f"{url}=0.5,s3://bucket/code=0.5"):
        monkeypatch.setattr(sys, "argv", ["recipe.py", "--data", data, "--data.cache", "cache", "--output", "run"])
        with pytest.raises(SystemExit, match="2"):
            main(run)
        told = capsys.readouterr()
        assert "@bucket/data' has credentials in a URL, which would be written down; remove them" in told.err
        assert "wJal" not in told.out + told.err
    assert list(tmp_path.iterdir()) == []
