"""No training on the CPU by mistake, and no GPU opened but the one that is asked for."""

import os

import pytest
import torch

import predict
from process import device as device_module
from process.device import choose_device, use_device

pytestmark = pytest.mark.usefixtures("restore_process")


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A machine that has a GPU which torch cannot use."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(device_module, "DEVICE_FILES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "nvidia0"


def fail_to_start():
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update it.\nmore")


def test_a_gpu_that_cannot_be_used_is_an_error_with_the_reason(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", fail_to_start)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match=r"has a GPU \(.*nvidia0\).*driver on your system is too old.*--device cpu$"):
        choose_device(None)
    with pytest.raises(ValueError, match=r"--device cuda: .*is too old \(found version 11040\).*use --device cpu$"):
        choose_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"torch \S+ is built without CUDA; mend that"):
        choose_device(None)


def test_the_cpu_is_taken_where_it_is_asked_for_or_no_gpu_is_meant(gpu, monkeypatch):
    assert choose_device("cpu").type == "cpu"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert choose_device(None).type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    gpu.unlink()
    (gpu.parent / "nvidiactl").touch()
    assert choose_device(None).type == "cpu"


def test_memory_in_segments_that_grow_unless_the_user_says_otherwise(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: used.append((device, os.environ.copy())))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    use_device(torch.device("cpu"))
    assert not used and "PYTORCH_ALLOC_CONF" not in os.environ
    use_device(torch.device("cuda", 1))
    assert used[0][0] == torch.device("cuda", 1)
    assert used[0][1]["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    use_device(torch.device("cuda", 1))
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_the_current_gpu_needs_no_number(monkeypatch):
    """torch's own function is called, which refuses a device without one, on a machine without a GPU too."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    with pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_device(torch.device("cuda"))
    use_device(torch.device("cuda"))


def test_predict_uses_the_gpu_that_is_asked_for_before_anything_else(monkeypatch, tmp_path):
    class NextStep(Exception):
        pass

    def next_step(paths):
        raise NextStep

    used = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.setattr(predict, "search_images", next_step)
    with pytest.raises(NextStep):
        predict.run(["--checkpoint", "model.pth", str(tmp_path), "--device", "cuda:1"])
    assert used == [torch.device("cuda", 1)]
