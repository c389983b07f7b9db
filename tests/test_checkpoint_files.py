"""Conversion of files: shards, other tensors, memory, failures, and the command."""

import errno
import gc
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoint_cases import H, I, load_all, per_expert, same, sharded
from fastmoe_rs import checkpoints, cli
from fastmoe_rs.checkpoints import LAYOUTS, convert_checkpoint, convert_state_dict, files


def test_sharded_checkpoints(tmp_path):
    source, state = sharded(tmp_path)
    report = convert_checkpoint(source, tmp_path / "out", "transposed", max_shard_size=700)
    assert len(report.files) > 3
    same(load_all(tmp_path / "out"), convert_state_dict(state, "transposed"))
    for file in report.files:
        with safe_open(tmp_path / "out" / file, "pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            sizes = [tensors.get_tensor(name).nbytes for name in tensors.keys()]  # noqa: SIM118
        assert sum(sizes) <= 700 or len(sizes) == 1
    small = {file.name for file in (tmp_path / "out").iterdir()} - set(report.files)
    assert small == {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    one = convert_checkpoint(source, tmp_path / "one", "transposed")
    assert one.files == ["model.safetensors"]
    same(load_all(tmp_path / "one"), load_all(tmp_path / "out"))


def test_other_tensors_are_copied_byte_for_byte(tmp_path):
    """Also NaN payloads and dtypes that torch does not have."""
    nan = torch.tensor([0x7FC00001, -1, 5], dtype=torch.int32).view(torch.float32)
    state = per_expert() | {"odd": nan, "flags": torch.tensor([True, False]), "none": torch.empty(0, 3)}
    save_file(state, tmp_path / "a")
    raw = bytearray((tmp_path / "a").read_bytes())
    raw[:] = raw.replace(b'"odd":{"dtype":"F32"', b'"odd":{"dtype":"U32"')
    (tmp_path / "a").write_bytes(raw)
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "fused")
    with safe_open(tmp_path / "b", "pt") as tensors:
        assert tensors.get_slice("odd").get_dtype() == "U32"
        assert tensors.get_tensor("odd").view(torch.int32).tolist() == [0x7FC00001, -1, 5]
        assert tensors.get_tensor("flags").tolist() == [True, False]
        assert tensors.get_tensor("none").shape == (0, 3)


@pytest.mark.parametrize(("source", "to"), [("per-expert", "gpt-oss"), ("transposed", "mixtral")])
def test_one_expert_is_in_memory_at_a_time(source, to, tmp_path, monkeypatch):
    save_file(convert_state_dict(per_expert(experts=16), source), tmp_path / "a")
    live, most = 0, 0

    def died(size):
        nonlocal live
        live -= size

    def counted(tensor):
        nonlocal live, most
        live += tensor.nbytes
        most = max(most, live)
        weakref.finalize(tensor, died, tensor.nbytes)
        return tensor

    read, data = files.Reader.read, files.data
    monkeypatch.setattr(files.Reader, "read", lambda *args: counted(read(*args)))
    monkeypatch.setattr(checkpoints, "data", lambda tensor: data(counted(tensor)))
    gc.disable()
    try:
        convert_checkpoint(tmp_path / "a", tmp_path / "b", to)
    finally:
        gc.enable()
    one_expert = 4 * 3 * H * I
    assert 0 < most <= 2 * one_expert  # as it was and as it will be
    assert live <= one_expert


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    source, _ = sharded(tmp_path)
    left = iter(range(20))

    def data(tensor):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "no space left on device")
        return files.data(tensor)

    monkeypatch.setattr(checkpoints, "data", data)
    with pytest.raises(OSError, match=r"no space left on device: .*model-0"):
        convert_checkpoint(source, tmp_path / "out", "mixtral", max_shard_size=500)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]


def test_command(tmp_path, capsys):
    source, state = sharded(tmp_path)
    assert tuple(LAYOUTS) == cli.LAYOUTS
    target = tmp_path / "out"
    arguments = ["convert", str(source), str(target), "--to", "fused", "--max-shard-size", "1KB"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("3 layers of 3 experts from 'per-expert' to 'fused': ")
    same(load_all(target), convert_state_dict(state, "fused"))
    assert cli.main(arguments) == 1
    assert f"fastmoe_rs convert: {target}: exists" in capsys.readouterr().err
    back = ["convert", str(target), str(tmp_path / "back"), "--to", "mixtral", "--from", "fused"]
    assert cli.main(back) == 0
    for wrong in (["--to", "flat"], ["--to", "fused", "--max-shard-size", "0GB"], []):
        with pytest.raises(SystemExit) as caught:
            cli.main([*arguments[:3], *wrong])
        assert caught.value.code == 2
