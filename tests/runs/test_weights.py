"""The safetensors format, against a file made by hand and against the safetensors package where it is installed."""

import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxgpt import partition
from jaxgpt.partition import MeshConfig
from jaxgpt.runs.weights import INDEX, SINGLE, open_weights, write_weights

TENSORS = {
    "a/kernel": np.arange(24, dtype=np.float32).reshape(4, 6) / 7,
    "a/kernel:scale": np.array([[-1, 0, 127]], np.int8),
    "b": np.array([1.5, -2.25], ml_dtypes.bfloat16),
    "bytes": np.arange(5, dtype=np.uint8),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3, np.int32),
}


def write(folder, **kwargs) -> list[str]:
    layout = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in TENSORS.items()}
    return write_weights(str(folder), layout, lambda name: TENSORS[name], **kwargs)


def check(folder) -> None:
    found = open_weights(str(folder))
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name].read(), array)


def by_hand(folder, header: dict | bytes, data: bytes = b"", length: int | None = None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / SINGLE
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def test_a_file_made_by_hand_is_read(tmp_path):
    data = struct.pack("<3f", 1, -2, 0.5) + struct.pack("<2b", -128, 127)
    entries = {
        "__metadata__": {"format": "pt"},
        "x": {"dtype": "F32", "shape": [3, 1], "data_offsets": [0, 12]},
        "y": {"dtype": "I8", "shape": [2], "data_offsets": [12, 14]},
    }
    by_hand(tmp_path, entries, data)
    found = open_weights(str(tmp_path))
    assert found["x"].read().tolist() == [[1], [-2], [0.5]]
    assert found["x"].read((slice(1, 3), slice(None))).tolist() == [[-2], [0.5]]
    assert found["y"].read().tolist() == [-128, 127]


def test_what_is_written_has_the_layout_of_the_format(tmp_path):
    assert write(tmp_path) == [SINGLE]
    raw = (tmp_path / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    begin, end = header["a/kernel"]["data_offsets"]
    assert raw[8 + length + begin : 8 + length + end] == TENSORS["a/kernel"].tobytes()
    ends = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    assert ends[0][0] == 0
    assert ends[-1][1] == len(raw) - 8 - length
    assert all(one[1] == two[0] for one, two in zip(ends, ends[1:], strict=False))


def test_many_files_have_an_index_and_no_tensor_is_read_twice(tmp_path):
    asked = []
    layout = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in TENSORS.items()}
    read = lambda name: (asked.append(name), TENSORS[name])[1]
    files = write_weights(str(tmp_path), layout, read, max_file_bytes=100)
    assert asked == sorted(TENSORS)
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in TENSORS.values())
    check(tmp_path)
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match=f"{files[1]} is missing"):
        open_weights(str(tmp_path))


def test_the_reference_implementation_reads_and_writes_the_same(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="the oracle: pip install safetensors")
    names = [name for name in TENSORS if TENSORS[name].dtype != ml_dtypes.bfloat16]
    write(tmp_path)
    theirs = safetensors.load_file(tmp_path / SINGLE)
    for name in names:
        np.testing.assert_array_equal(theirs[name], TENSORS[name])
    safetensors.save_file({name: TENSORS[name] for name in names}, tmp_path / SINGLE)
    found = open_weights(str(tmp_path))
    for name in names:
        np.testing.assert_array_equal(found[name].read(), TENSORS[name])


@pytest.mark.parametrize("spec", [("fsdp", "tensor"), (None, "tensor"), (("data", "fsdp"), None), (None, None)])
def test_sharded_reads_are_parts_of_the_whole(tmp_path, spec):
    mesh = partition.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    write(tmp_path)
    tensor = open_weights(str(tmp_path))["a/kernel"]
    array = tensor.put(NamedSharding(mesh, PartitionSpec(*spec)), np.float32)
    np.testing.assert_array_equal(array, TENSORS["a/kernel"])
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, TENSORS["a/kernel"][shard.index])


X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGE = {
    "no header": (lambda folder: (folder / SINGLE).write_bytes(b"abc"), "does not fit"),
    "a header beyond the end": (lambda folder: by_hand(folder, {"x": X}, bytes(8), length=1 << 40), "does not fit"),
    "no JSON": (lambda folder: by_hand(folder, b"{x: 1}  "), "header cannot be read"),
    "no text": (lambda folder: by_hand(folder, b"\xff\xfe\xfd\xfc"), "header cannot be read"),
    "a list": (lambda folder: by_hand(folder, b"[1, 2]"), "header cannot be read"),
    "an entry without a shape": (lambda folder: by_hand(folder, {"x": {"dtype": "F32"}}), "header cannot be read"),
    "an unknown dtype": (lambda folder: by_hand(folder, {"x": X | {"dtype": "F8_E4M3"}}, bytes(8)), "F8_E4M3"),
    "a wrong size": (lambda folder: by_hand(folder, {"x": X | {"shape": [3]}}, bytes(8)), "x have the wrong size"),
    "a negative begin": (lambda folder: by_hand(folder, {"x": X | {"data_offsets": [-8, 0]}}, bytes(8)), "wrong size"),
    "data cut off": (lambda folder: by_hand(folder, {"x": X}, bytes(7)), "is cut off: x ends at byte"),
    "no index": (lambda folder: (folder / INDEX).write_text("[]"), "expected a JSON object, found list"),
    "an index of numbers": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"x": 3}}'),
        "does not say where",
    ),
    "a shape of floats": (
        lambda folder: by_hand(folder, {"x": X | {"shape": [2.0]}}, bytes(8)),
        "header cannot be read",
    ),
    "a deep header": (lambda folder: by_hand(folder, b'{"x": ' + b"[" * 100_000), "nested too deeply"),
    "half an index": (lambda folder: (folder / INDEX).write_text('{"weight_map": {"x'), "not valid JSON"),
    "an index that is no text": (lambda folder: (folder / INDEX).write_bytes(b"\xff{}"), "not valid UTF-8"),
    "a deep index": (lambda folder: (folder / INDEX).write_text("[" * 100_000), "nested too deeply"),
    "nothing": (lambda folder: None, "has no weights"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_each_kind_is_refused_in_one_sentence(tmp_path, kind):
    damage, words = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        open_weights(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def split(folder) -> list[str]:
    """Weights in two files, with their index."""
    layout = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in TENSORS.items()}
    return write_weights(str(folder), layout, lambda name: TENSORS[name], max_file_bytes=100)


@pytest.mark.parametrize("name", ["../{}", "{folder}/../{}", "sub/../../{}", "..", "", "./{}"])
def test_an_index_names_files_of_its_folder_only(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    first, _ = split(folder)
    (folder / first).rename(tmp_path / first)
    index = json.loads((folder / INDEX).read_text())
    other = name.format(first, folder=folder)
    index["weight_map"] = {t: other if file == first else file for t, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names the file .* which is not in the folder itself"):
        open_weights(str(folder))


@pytest.mark.parametrize("name", ["single", "part", "index"])
def test_a_link_out_of_the_folder_is_refused_but_for_the_cache_of_the_hub(tmp_path, name):
    folder = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    if name == "single":
        write(folder)
    else:
        split(folder)
    file = {"single": SINGLE, "part": "model-00002-of-00002.safetensors", "index": INDEX}[name]
    (folder / file).rename(blobs / "f00d")
    (folder / file).symlink_to("../../blobs/f00d")
    check(folder)
    (folder / file).unlink()
    (blobs / "f00d").rename(tmp_path / "elsewhere")
    (folder / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{file} is a link to .*elsewhere, outside of the folder"):
        open_weights(str(folder))


def test_a_tensor_that_is_not_what_was_promised_is_not_written(tmp_path):
    layout = {"x": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(ValueError, match=r"x is float32\[3\], not float32\[2\]"):
        write_weights(str(tmp_path), layout, lambda name: np.zeros(3, np.float32))
    assert not (tmp_path / SINGLE).exists()
