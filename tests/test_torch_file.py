"""Files of torch.save: both formats are read as torch reads them, and nothing in a file can do more than be read."""

import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from sora_jax.evaluate import torch_file

WEIGHT = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
CONTENT = WEIGHT.tobytes()


# Pickles by hand, so that no torch is needed and anything can be said in them.


def said(value) -> bytes:
    """The instructions that make a str, int, None or tuple; bytes are instructions already."""
    match value:
        case bytes():
            return value
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case None:
            return b"N"
        case int():
            return b"J" + struct.pack("<i", value)
        case tuple():
            return b"(" + b"".join(map(said, value)) + b"t"


def named(module, name) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments) -> bytes:
    return function + said(arguments) + b"R"


def tensor(shape, strides, offset=0, count=24, kind="FloatStorage", key="0") -> bytes:
    storage = said(("storage", named("torch", kind), key, "cpu", count)) + b"Q"
    hooks = call(named("collections", "OrderedDict"))
    return call(named("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, strides, b"\x89", hooks)


def dict_of(**values) -> bytes:
    return b"}(" + b"".join(said(name) + said(value) for name, value in values.items()) + b"u"


def program(instructions: bytes) -> bytes:
    return b"\x80\x02" + instructions + b"."


GOOD = dict_of(weight=tensor((2, 3, 4), (12, 4, 1)), turned=tensor((3, 2), (4, 12), offset=1), epoch=7)


def zip_file(path, instructions, storage=CONTENT, compression=zipfile.ZIP_STORED, **more):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("net/data.pkl", program(instructions))
        archive.writestr("net/data/0", storage)
        for name, content in more.items():
            archive.writestr(f"net/{name}", content)
    return path


def legacy_file(path, instructions, storage=CONTENT, count=24, keys=("0",)):
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, machine)]
    path.write_bytes(
        b"".join(head) + program(instructions) + pickle.dumps(list(keys), 2) + struct.pack("<q", count) + storage
    )
    return path


WRITERS = {"zip": zip_file, "legacy": legacy_file}
each_format = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@each_format
def test_tensors_are_read_with_their_strides(write, tmp_path):
    state = torch_file.read_state_dict(write(tmp_path / "net.pth", GOOD))
    assert list(state) == ["weight", "turned"]
    np.testing.assert_array_equal(state["weight"], WEIGHT)
    np.testing.assert_array_equal(state["turned"], WEIGHT[:, :, 1].T)
    assert state["turned"].flags.c_contiguous and state["turned"].flags.writeable


@each_format
def test_a_checkpoint_gives_its_state_dict(write, tmp_path):
    state = torch_file.read_state_dict(write(tmp_path / "net.pth", dict_of(epoch=3, state_dict=GOOD)))
    np.testing.assert_array_equal(state["weight"], WEIGHT)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_is_read_as_torch_reads_it(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    whole = torch.arange(24.0).reshape(2, 3, 4) - 5
    tensors = {
        "whole": whole,
        "turned": whole.transpose(0, 2),
        "part": whole[1, ::2, 1:],
        "spread": whole[:, :1].expand(2, 5, 4),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(whole + 1),
    } | {str(kind): whole.to(kind) for kind in (torch.float64, torch.float16, torch.int32, torch.int16, torch.int8)}
    tensors |= {"truth": whole > 3, "byte": whole.abs().byte()}
    checkpoint = {
        "state_dict": tensors,
        "epoch": 3,
        "rate": 0.1,
        "moments": [{"beta": (0.9, None)}, whole.double() + 1],
    }
    torch.save(checkpoint, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    state = torch_file.read_state_dict(tmp_path / "net.pth")
    assert list(state) == list(tensors)
    for name, wanted in tensors.items():
        assert state[name].dtype == wanted.detach().numpy().dtype
        np.testing.assert_array_equal(state[name], wanted.detach().numpy())
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(network.state_dict(), tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    state = torch_file.read_state_dict(tmp_path / "net.pth")
    for name, wanted in network.state_dict().items():
        np.testing.assert_array_equal(state[name], wanted.numpy())


HOSTILE = {
    "asks for 'posix system'": call(named("posix", "system"), "touch {witness}"),
    "asks for 'builtins eval'": call(named("builtins", "eval"), "open('{witness}', 'w')"),
    "asks for 'torch load'": call(named("torch", "load"), "{witness}"),
    "calls torch FloatStorage": call(named("torch", "FloatStorage"), 3),
    "instruction INST": b"(" + said("touch {witness}") + b"iposix\nsystem\n",
    "instruction STACK_GLOBAL": said("posix") + said("system") + b"\x93",
    "a value is not where it should be": dict_of(weight=tensor((2,), (1,))) + named("torch", "FloatStorage") + b"}b",
}


@each_format
@pytest.mark.parametrize("reason", HOSTILE)
def test_a_hostile_file_is_refused_and_does_nothing(write, reason, tmp_path):
    witness = tmp_path / "w"
    text = HOSTILE[reason]
    for said_text in (b"touch {witness}", b"open('{witness}', 'w')", b"{witness}"):
        text = text.replace(
            b"X" + struct.pack("<I", len(said_text)) + said_text,
            said(said_text.decode().replace("{witness}", str(witness))),
        )
    with pytest.raises(ValueError, match=reason):
        torch_file.read_state_dict(write(tmp_path / "net.pth", dict_of(weight=tensor((2,), (1,)), evil=text)))
    assert not witness.exists()


def test_the_hostile_file_would_do_harm(tmp_path):
    """The same instructions in pickle.loads leave their mark, so that the test above tests something."""
    pickle.loads(program(call(named("posix", "system"), f"touch {tmp_path / 'w'}")))
    assert (tmp_path / "w").exists()


CLAIMS = {
    "beyond its storage": tensor((5, 5), (5, 1)),
    "reaches beyond": tensor((2,), (1,), offset=23),
    "or negative ones": tensor((2,), (-1,), offset=3),
    "tensors claim": tensor((2**15, 2**15), (0, 0)),
    "tensors claim .* at most": tensor((2,), (1,), count=2**30),
    "1 axes and 2 strides": tensor((2,), (1, 1)),
    "wrong types": tensor((2, "3"), (1, 1)),
    "BFloat16Storage": tensor((2,), (1,), kind="BFloat16Storage"),
    "neither strings nor whole numbers": b"}(" + said((("a",), 1))[1:-1] + b"u",
    "never kept": b"h\x07",
    "a mark is missing": b"Nt",
    "not a state dict": tensor((2,), (1,)),
    "no tensor": dict_of(epoch=1),
}


@each_format
@pytest.mark.parametrize("reason", CLAIMS)
def test_false_claims_are_found(write, reason, tmp_path):
    value = CLAIMS[reason]
    alone = reason in ("not a state dict", "no tensor")
    with pytest.raises(ValueError, match=reason):
        torch_file.read_state_dict(write(tmp_path / "net.pth", value if alone else dict_of(a=value)))


def test_containers_that_are_not_of_torch_are_refused(tmp_path):
    path = tmp_path / "net.pth"
    with pytest.raises(FileNotFoundError):
        torch_file.read_state_dict(path)
    for content in (b"", b"hello", pickle.dumps({"a": 1}), b"PK\x03\x04" + bytes(40)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"no file of torch\.save"):
            torch_file.read_state_dict(path)
    with pytest.raises(ValueError, match="compressed"):
        torch_file.read_state_dict(zip_file(path, GOOD, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="big-endian"):
        torch_file.read_state_dict(zip_file(path, GOOD, byteorder=b"big"))
    with pytest.raises(ValueError, match="shorter"):
        torch_file.read_state_dict(zip_file(path, GOOD, storage=bytes(92)))
    with pytest.raises(ValueError, match="more than 96 bytes"):
        torch_file.read_state_dict(zip_file(path, GOOD, storage=bytes(100)))
    with pytest.raises(ValueError, match="without net/data/0"):
        torch_file.read_state_dict(rename_entry(zip_file(path, GOOD), "net/data/0", "net/data/1"))
    with pytest.raises(ValueError, match="ends too early"):
        torch_file.read_state_dict(legacy_file(path, GOOD, storage=bytes(92)))
    with pytest.raises(ValueError, match="another size"):
        torch_file.read_state_dict(legacy_file(path, GOOD, count=23))
    with pytest.raises(ValueError, match="not those that its tensors use"):
        torch_file.read_state_dict(legacy_file(path, GOOD, keys=("1",)))


def rename_entry(path, old, new):
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    return path


def test_files_too_large_are_not_opened(tmp_path):
    path = tmp_path / "net.pth"
    path.touch()
    os.truncate(path, torch_file.MAX_FILE_BYTES + 1)  # sparse
    with pytest.raises(ValueError, match="at most"):
        torch_file.read_state_dict(path)


def test_long_programs_and_deep_nests_end(tmp_path):
    with pytest.raises(ValueError, match=r"more than \d+ instructions"):
        torch_file.read_state_dict(legacy_file(tmp_path / "long.pth", b"N" * (torch_file.MAX_INSTRUCTIONS + 1)))
    # Each tuple holds the one before twice: to hash, compare or print the last would take for ever.
    deep = said("a") + b"".join(b"q\x01h\x01\x86" for _ in range(200))
    with pytest.raises(ValueError, match="neither strings nor whole numbers"):
        torch_file.read_state_dict(legacy_file(tmp_path / "deep.pth", b"}" + deep + b"Ns"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pickletools, of strings with wrong escapes
@pytest.mark.filterwarnings("ignore::UserWarning")  # zipfile, of entries that are there twice
@each_format
def test_a_damaged_file_is_read_or_refused_with_one_kind_of_error(write, tmp_path, rng):
    whole = write(tmp_path / "net.pth", GOOD).read_bytes()
    refused = 0
    for trial in range(200):
        damaged = bytearray(whole)
        if trial % 2:
            del damaged[rng.integers(len(whole)) :]
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] = rng.integers(256) if damaged else 0
        (tmp_path / "damaged.pth").write_bytes(damaged)
        try:
            torch_file.read_state_dict(tmp_path / "damaged.pth")
        except ValueError as error:
            refused += 1
            assert str(tmp_path / "damaged.pth") in str(error)
    assert refused > 100


def test_a_file_names_itself_in_errors(tmp_path):
    with pytest.raises(ValueError, match=r"net\.pth: .*torch\.save\(model\.state_dict\(\), path\)"):
        torch_file.read_state_dict(zip_file(tmp_path / "net.pth", dict_of(a=call(named("os", "system"), "true"))))
