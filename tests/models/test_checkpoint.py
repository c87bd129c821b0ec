"""Reading model directories: both formats, single and sharded, and every way in which one can be broken."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from pregate.config import UsageError
from pregate.models.checkpoint import open_checkpoint, read_config
from pregate.models.side_files import side_files
from tests.make_switch_base import TINY, make

FORMS = [("bin", 1), ("bin", 3), ("safetensors", 1), ("safetensors", 3)]


@pytest.fixture(params=FORMS, ids=[f"{form}-{files}" for form, files in FORMS])
def directory(request, tmp_path: Path) -> Path:
    form, files = request.param
    make(tmp_path / "model", form, files, **TINY)
    return tmp_path / "model"


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """The naive way: load every file whole."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.iterdir()):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        elif file.suffix == ".bin":
            tensors |= torch.load(file, weights_only=True)
    return tensors


def sentence(error: pytest.ExceptionInfo) -> str:
    """The message, checked to be one sentence on one line."""
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text, text
    return text


def test_names_shapes_dtypes_and_bits_are_those_of_the_files(directory):
    opened = open_checkpoint(str(directory))
    truth = stored(directory)
    assert opened.directory == directory
    assert opened.config == json.loads((directory / "config.json").read_text())
    assert sorted(opened.names()) == sorted(truth)
    read = opened.read(opened.names())
    for name, tensor in truth.items():
        assert opened.shape(name) == tuple(tensor.shape)
        assert opened.dtype(name) == tensor.dtype == read[name].dtype
        assert opened.num_bytes(name) == tensor.numel() * tensor.itemsize
        assert torch.equal(read[name], tensor), name


def test_only_the_named_tensors_are_read(directory):
    opened = open_checkpoint(str(directory))
    some = [opened.names()[-1], opened.names()[0]]
    assert set(opened.read(some)) == set(some)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_other_dtypes_pass(tmp_path, dtype):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.arange(6).reshape(2, 3).to(dtype)}, tmp_path / "model.safetensors")
    opened = open_checkpoint(str(tmp_path))
    assert opened.dtype("a") == dtype and opened.num_bytes("a") == 6 * dtype.itemsize
    assert torch.equal(opened.read(["a"])["a"], torch.arange(6).reshape(2, 3).to(dtype))


def test_views_are_read_as_tensors_of_their_own(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    flat = torch.arange(12.0)
    torch.save({"a": flat[:4], "b": flat[4:].view(2, 4).t()}, tmp_path / "pytorch_model.bin")
    read = open_checkpoint(str(tmp_path)).read(["a", "b"])
    assert torch.equal(read["a"], flat[:4]) and torch.equal(read["b"], flat[4:].view(2, 4).t())
    save_file(read, tmp_path / "copy.safetensors")


def test_safetensors_are_preferred(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    opened = open_checkpoint(str(tmp_path))
    assert [file.name for file in opened.files] == ["model.safetensors"]
    assert torch.equal(opened.read(["a"])["a"], torch.ones(2))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"b": "gone.safetensors"}}')
    assert open_checkpoint(str(tmp_path)).names() == ["a"], "transformers reads the single file first"


def test_truncated_file_is_refused_by_name(directory):
    file = sorted(p for p in directory.iterdir() if p.suffix in (".bin", ".safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UsageError) as error:
        open_checkpoint(str(directory))
    assert file.name in sentence(error) and "truncated" in sentence(error) and "fetch it again" in sentence(error)


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_missing_shard_is_refused_by_name(tmp_path, form):
    make(tmp_path / "model", form, 3, **TINY)
    shard = next((tmp_path / "model").glob(f"*-00002-of-00003.{form}"))
    shard.unlink()
    with pytest.raises(UsageError) as error:
        open_checkpoint(str(tmp_path / "model"))
    assert shard.name in sentence(error) and "lists" in sentence(error)


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_shard_without_a_promised_tensor_is_refused(tmp_path, form):
    make(tmp_path / "model", form, 3, **TINY)
    shard = next((tmp_path / "model").glob(f"*-00002-of-00003.{form}"))
    tensors = load_file(shard) if form == "safetensors" else torch.load(shard, weights_only=True)
    name = sorted(tensors)[0]
    del tensors[name]
    (save_file if form == "safetensors" else torch.save)(tensors, shard)
    with pytest.raises(UsageError) as error:
        open_checkpoint(str(tmp_path / "model"))
    assert shard.name in sentence(error) and name in sentence(error) and "promises" in sentence(error)


def test_index_decides_between_two_shards_with_one_name(tmp_path):
    make(tmp_path / "model", "bin", 3, **TINY)
    first, second, _ = sorted((tmp_path / "model").glob("*.bin"))
    tensors = torch.load(first, weights_only=True)
    torch.save({**torch.load(second, weights_only=True), "shared.weight": torch.zeros(1)}, second)
    opened = open_checkpoint(str(tmp_path / "model"))
    assert torch.equal(opened.read(["shared.weight"])["shared.weight"], tensors["shared.weight"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_what_is_not_weights_is_explained(tmp_path, name, content, words):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as error:
        open_checkpoint(str(tmp_path))
    assert name in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_old_pickle_format_and_code_in_files_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UsageError, match=r"before 1\.6") as error:
        open_checkpoint(str(tmp_path))
    assert "can run code" in sentence(error) and "safetensors version" in sentence(error)
    assert "load it" not in str(error.value), "loading it is what runs its code"
    torch.save({"a": torch.nn.Linear(2, 2)}, file)
    with pytest.raises(UsageError, match="more than tensors"):
        open_checkpoint(str(tmp_path))
    torch.save({"model": {"a": torch.ones(2)}}, file)
    with pytest.raises(UsageError, match="plain state dict"):
        open_checkpoint(str(tmp_path))


def test_broken_surroundings_are_refused(tmp_path):
    make(tmp_path / "model", "bin", 2, **TINY)
    index = tmp_path / "model" / "pytorch_model.bin.index.json"
    for content, words in (("{", "not valid JSON"), ("[]", "JSON object"), ("{}", "no weight_map")):
        index.write_text(content)
        with pytest.raises(UsageError, match=words):
            open_checkpoint(str(tmp_path / "model"))
    index.unlink()
    with pytest.raises(UsageError, match="holds no weights"):
        open_checkpoint(str(tmp_path / "model"))
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        open_checkpoint(str(tmp_path / "model"))
    with pytest.raises(UsageError, match="is a file"):
        open_checkpoint(str(shutil.copyfile(__file__, tmp_path / "file")))


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (["a.bin"], "does not say which tensor lies in which file"),
        ("a.bin", "does not say which tensor"),
        ({"a": 1}, "does not say which tensor"),
        ({"a": None}, "does not say which tensor"),
        ({"a": ["b.bin"]}, "does not say which tensor"),
        ({"a": "../outside.bin"}, "'../outside.bin', which is no name of a file beside it"),
        ({"a": "/etc/passwd"}, "'/etc/passwd', which is no name"),
        ({"a": "sub/dir.bin"}, "'sub/dir.bin', which is no name"),
        ({"a": "..\\outside.bin"}, "which is no name of a file"),
        ({"a": ".."}, "'..', which is no name"),
        ({"a": "b\0.bin"}, "which is no name of a file"),
        ({}, "no weight_map"),
    ],
)
@pytest.mark.parametrize("index", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
def test_an_index_points_beside_itself_or_is_refused_unopened(tmp_path, monkeypatch, index, weight_map, words):
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    for place in (tmp_path / "outside.bin", tmp_path / "model" / "sub" / "dir.bin"):
        torch.save({"a": torch.ones(1)}, place)
    (tmp_path / "model" / index).write_text(json.dumps({"weight_map": weight_map}))
    monkeypatch.setattr("pregate.models.checkpoint._describe", lambda file: pytest.fail(f"{file} was opened"))
    with pytest.raises(UsageError) as error:
        open_checkpoint(str(tmp_path / "model"))
    assert words in sentence(error) and index in sentence(error)


def test_a_file_of_other_things_than_plain_tensors_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for state in ({1: torch.ones(2)}, {"a": torch.ones(2, 2).to_sparse()}, [torch.ones(2)]):
        torch.save(state, tmp_path / "pytorch_model.bin")
        with pytest.raises(UsageError, match="more than"):
            open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (HFValidationError("bad"), "cannot be a hub id"),
        (LocalEntryNotFoundError("offline"), "hub cannot be reached"),
        (HfHubHTTPError.__new__(HfHubHTTPError), "denies access"),
        (OSError("socket"), "denies access"),
    ],
)
def test_unknown_hub_ids_end_in_one_sentence(monkeypatch, raised, words):
    def snapshot_download(*args, **kwargs):
        raise raised

    monkeypatch.setattr("pregate.models.checkpoint.snapshot_download", snapshot_download)
    for call in (read_config, open_checkpoint, side_files):
        with pytest.raises(UsageError) as error:
            call("nobody/nothing")
        assert "nobody/nothing" in sentence(error) and words in sentence(error)


@pytest.mark.parametrize(("form", "files"), FORMS)
def test_hub_downloads_only_what_is_read(monkeypatch, tmp_path, form, files):
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    make(hub, form, files, **TINY)
    for other in ("flax_model.msgpack", "tf_model.h5", "README.md", "tokenizer.json"):
        (hub / other).write_text("{}")
    if form == "safetensors":
        torch.save({}, hub / "pytorch_model.bin")
    cache.mkdir()

    def snapshot_download(repo, revision=None, allow_patterns=()):
        assert (repo, revision) == ("google/switch-base-8", "abc")
        for name in allow_patterns:
            if (hub / name).is_file():
                shutil.copyfile(hub / name, cache / name)
        return str(cache)

    monkeypatch.setattr("pregate.models.checkpoint.snapshot_download", snapshot_download)
    assert read_config("google/switch-base-8", "abc")["d_model"] == TINY["d_model"]
    assert [file.name for file in cache.iterdir()] == ["config.json"]
    opened = open_checkpoint("google/switch-base-8", "abc")
    assert sorted(opened.names()) == sorted(stored(hub))
    fetched = {file.name for file in cache.iterdir()} - {"config.json"}
    assert fetched == {f.name for f in opened.files} | ({f.name for f in hub.glob("*.index.json")})
    assert [file.name for file in side_files("google/switch-base-8", "abc")] == ["tokenizer.json"]


def test_reading_drops_its_mappings(tmp_path):
    """Resident memory falls back once what was read is dropped, so a walk over a model stays small."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("needs /proc")
    for form in ("bin", "safetensors"):
        make(tmp_path / form, form, **TINY)
        opened = open_checkpoint(str(tmp_path / form))
        read = opened.read(opened.names())
        assert str(tmp_path / form) in maps.read_text()
        del read
        assert str(tmp_path / form) not in maps.read_text()
